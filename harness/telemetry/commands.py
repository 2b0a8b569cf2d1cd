"""`bench trace`: parse, call, print. Heavy imports stand inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness import decide, options
from harness.errors import InputError

app = typer.Typer()


@app.command(short_help="Where the time of one generation goes.")
def trace(
    context: typer.Context,
    model: options.Model = "demo",
    precisions: Annotated[
        str, typer.Option(help="The baseline first: bf16, rtn, awq, gptq, awq@kneebench, ..., or NAME=PATH|HUB-ID.")
    ] = "bf16,awq",
    tokens: Annotated[int, typer.Option(min=2, max=65536, help="Tokens to generate.")] = 200,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    saved: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            help="Read a trace that is there: PRECISION=FILE, trace-PRECISION.json.gz|.json|.sqlite, or the directory; "
            "may be repeated, the baseline first.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; with --from, where the paper goes. [results/<date>-<model>-trace]"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Card whose data sheet is the ceiling, as l4. [this machine's; bench gpus --list]"),
    ] = None,
    profiler: Annotated[
        str | None, typer.Option(help="nsys or torch. [nsys where it is on the PATH and a card is here, else torch]")
    ] = None,
    calibration: options.Calibration = None,
    engine_python: options.EnginePython = None,
    port: options.Port = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    kv_cache_gib: options.KvCache = None,
    engine_arg: options.EngineArg = None,
) -> None:
    """One generation a precision under a profiler: where its time goes, kernel by kernel, and what INT4 buys there."""
    if saved:
        _check_alone(context)
        decide.finish_trace(decide.console(), saved, out, gpu)
        return
    from harness.progress import Progress
    from harness.telemetry import tracing

    request = tracing.TraceRequest(
        model=model,
        precisions=decide.listed(precisions, "--precisions"),
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        out=out,
        gpu=gpu,
        profiler=_profiler(profiler),
        engine_python=engine_python,
        calibration=calibration,
        port=port,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
        engine_args=tuple(engine_arg or ()),
    )
    console = decide.console()
    with Progress(console) as progress:
        run_dir = tracing.record(request, progress, argv=sys.argv[1:])
    decide.finish_trace(console, [str(run_dir)], None, gpu)


def _profiler(name: str | None) -> Literal["torch", "nsys"] | None:
    if name not in (None, "torch", "nsys"):
        raise InputError(f"--profiler {name}", allowed="nsys, torch")
    return "torch" if name == "torch" else "nsys" if name == "nsys" else None


def _check_alone(context: typer.Context) -> None:
    """Raise InputError for an option that says how to record, beside traces that are recorded."""
    typed = options.typed(context, but=("saved", "out", "gpu"))
    if typed:
        raise InputError(f"--from together with {', '.join(typed)}", allowed="--from with --out and --gpu")
