"""Options that several commands share: one name, one type and one help text each; and which of them were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness import completing
from harness.errors import InputError
from harness.suggest import did_you_mean

Model = Annotated[
    str,
    typer.Option(
        help="demo, a directory, a hub name, or shape:NAME (architecture alone, random weights).",
        autocompletion=completing.models,
    ),
]
Concurrency = Annotated[str | None, typer.Option(help="Concurrent users, one cell each. [1,8,16,32]")]
Scenario = Annotated[
    str,
    typer.Option(help="A name (chat, batch, rag, code, agent) or a .toml file.", autocompletion=completing.scenarios),
]
Arrivals = Annotated[
    str | None, typer.Option(help="closed, constant, poisson, gamma or trace; overrides the scenario.")
]
Rate = Annotated[str | None, typer.Option(help="Requests a second of an open loop, one cell each.")]
InputTokens = Annotated[int | None, typer.Option(help="Mean prompt length; overrides the scenario.")]
OutputTokens = Annotated[int | None, typer.Option(help="Mean answer length; overrides the scenario.")]
Requests = Annotated[int | None, typer.Option(help="Requests in each cell's window; overrides the scenario.")]
ServiceLevel = Annotated[
    str | None, typer.Option(help="Service level: p95=3s, ttft=500ms, tpot=50ms, goodput=90%, joined by commas.")
]
Utilisation = Annotated[float | None, typer.Option(help="Share of the hour under this load, 0 to 1.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="vLLM's limit on requests in a batch.")]
GpuMemoryUtilization = Annotated[float, typer.Option(min=0.05, max=1.0, help="vLLM's share of the card.")]
Calibration = Annotated[Path | None, typer.Option(help="Text for AWQ and GPTQ: .txt or .jsonl. [the model's own]")]
EnginePython = Annotated[Path | None, typer.Option(help="Python of an environment that has vLLM.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File of yours, mode 0600, with the endpoint's key. [KNEEBENCH_API_KEY]")
]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port for vLLM on loopback. [a free one]")]
KvCache = Annotated[float | None, typer.Option(min=0.1, help="KV cache on a CPU machine.")]
EngineArg = Annotated[
    list[str] | None, typer.Option(help="Another flag of vLLM, as --engine-arg=--block-size=32; may be repeated.")
]
TensorParallel = Annotated[int, typer.Option(min=1, help="Cards that share each layer.")]
PipelineParallel = Annotated[int, typer.Option(min=1, help="Stages of cards, one after the other.")]
KvCacheDtype = Annotated[str | None, typer.Option(help="Type of the KV cache, as fp8. [the model's]")]
MaxModelLen = Annotated[int | None, typer.Option(help="Context in tokens; overrides the scenario. [what it needs]")]
Vary = Annotated[
    list[str] | None,
    typer.Option(help="Serve each precision with each value, as max_num_seqs=64,128; repeated: all combinations."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and, at the end, where the report is.")]
Cluster = Annotated[
    str | None, typer.Option(help="Spread the sessions over a Ray cluster: auto, or HOST:PORT (docs/cluster.md).")
]
Card = Annotated[str | None, typer.Option(help="With --cluster: types of cards to measure on, as l4,rtx-a4000. [any]")]
Load = Annotated[str, typer.Option(help="With --cluster: generators beside the engine, or away on other nodes.")]
Plan = Annotated[bool, typer.Option("--plan", help="Print cells, GPU-hours, $ and hours, and start nothing.")]
Assume = Annotated[Path | None, typer.Option(help="Prices and traffic for the reports, a .toml file (docs/cost.md).")]


def typed(context: typer.Context, but: tuple[str, ...]) -> list[str]:
    """The options of this command line as they were typed, without those of `but` (by their parameter's name)."""
    return [
        f"--{param.name.replace('_', '-')}" if param.param_type_name == "option" else param.name.upper()
        for param in context.command.params
        if param.name and param.name not in but and source_of(context, param.name) == "COMMANDLINE"
    ]


def source_of(context: typer.Context, name: str) -> str:
    """Where a parameter has its value from: COMMANDLINE, DEFAULT_MAP (a file: sweepfile.py), DEFAULT ..."""
    return getattr(context.get_parameter_source(name), "name", "")


def one_of(value: str | None, option: str, allowed: tuple[str, ...]) -> str | None:
    """The value that was typed. Raises InputError for one that is not allowed."""
    if value is not None and value not in allowed:
        raise InputError(f"{option} {value!r} is unknown{did_you_mean(value, allowed)}", allowed=", ".join(allowed))
    return value
