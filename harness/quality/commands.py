"""The commands that judge answers: parse, call, print. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import decide
from harness.options import ApiKeyFile, Calibration, EngineArg, EnginePython, GpuMemoryUtilization, KvCache

if TYPE_CHECKING:
    from harness.quality.job import Part

app = typer.Typer()

Model = Annotated[str, typer.Option(help="demo, a directory, or a hub name.")]
Precisions = Annotated[
    str,
    typer.Option(
        help="The baseline first: bf16, rtn, awq, gptq, ..., METHOD-3bit and METHOD-2bit, or NAME=PATH|HUB-ID."
    ),
]
Prompts = Annotated[
    str | None, typer.Option(help="Failure prompts: demo, general, or a .toml file. [demo for demo, else general]")
]
Out = Annotated[
    Path | None, typer.Option(help="Directory; one that is there goes on. [results/<date>-<model>-quality]")
]
Run = Annotated[Path | None, typer.Option(help="A sweep's run: what is found goes there and into its papers.")]
Endpoint = Annotated[
    list[str] | None, typer.Option(help="NAME=URL of a server that runs already; repeated, the baseline first.")
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")]
Context = Annotated[int | None, typer.Option(min=64, help="Context to serve. [the model's own, 8192 at most]")]
Gate = Annotated[
    str, typer.Option(help='Limits, as "kl<0.02, accuracy_drop<1pp"; exit code 1 when a precision breaks one.')
]


@app.command(short_help="Ask all precisions the same: what breaks?")
def failures(
    model: Model = "demo",
    precisions: Precisions = "bf16,awq",
    prompts: Prompts = None,
    out: Out = None,
    run: Run = None,
    endpoint: Endpoint = None,
    api_key_file: ApiKeyFile = None,
    concurrency: Concurrency = 8,
    max_model_len: Context = None,
    gate: Gate = "",
    engine_python: EnginePython = None,
    calibration: Calibration = None,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_gib: KvCache = None,
    engine_arg: EngineArg = None,
) -> None:
    """Ask every precision the same prompts, judge the answers, and say what breaks: failures.csv and failures.md."""
    options = locals()
    _measure(("answers",), options)


@app.command(short_help="How far from the baseline; ship or do not ship.")
def quality(
    model: Model = "demo",
    precisions: Precisions = "bf16,awq",
    prompts: Prompts = None,
    text: Annotated[
        Path | None,
        typer.Option(help="What KL and perplexity are taken on: .txt or .jsonl. [the baseline's own answers]"),
    ] = None,
    window: Annotated[int, typer.Option(min=16, help="Tokens of each text.")] = 512,
    texts: Annotated[int, typer.Option(min=2, help="How many texts.")] = 24,
    tasks: Annotated[str | None, typer.Option(help="Public tasks of lm-eval, as gsm8k,arc_easy.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question. [the task's own]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. [all]")] = None,
    include: Annotated[Path | None, typer.Option(help="A directory of your own lm-eval tasks (YAML).")] = None,
    out: Out = None,
    run: Run = None,
    endpoint: Endpoint = None,
    api_key_file: ApiKeyFile = None,
    concurrency: Concurrency = 8,
    max_model_len: Context = None,
    gate: Gate = "",
    engine_python: EnginePython = None,
    calibration: Calibration = None,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_gib: KvCache = None,
    engine_arg: EngineArg = None,
) -> None:
    """All that failures does, and how far each precision's distributions are from the baseline's: KL, perplexity,
    flips, where in the context; public tasks; ship or do not ship."""
    options = locals()
    _measure(("answers", "text", "tasks") if tasks else ("answers", "text"), options)


def _measure(parts: tuple[Part, ...], given: dict[str, Any]) -> None:
    from harness.analysis.gate import parse_gate
    from harness.progress import Progress
    from harness.quality.job import QualityRequest, measure

    console = decide.console()
    parse_gate(given["gate"])  # a typing mistake is found before anything is started
    given |= {
        "precisions": decide.listed(given["precisions"], "--precisions"),
        "endpoints": tuple(given.pop("endpoint") or ()),
        "engine_args": tuple(given.pop("engine_arg") or ()),
        "tasks": decide.listed(given["tasks"], "--tasks") if given.get("tasks") is not None else (),
    }
    with Progress(console) as progress:
        directory = measure(QualityRequest(parts, **given), progress, argv=sys.argv[1:])
    decide.finish_quality(console, directory)
