"""The command line: parse, call, print; nothing else. Heavy imports stand inside the command that needs them.

Here are the commands that measure; those that decide from what was measured are in decide.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import __version__, decide, options
from harness.errors import InputError, KneebenchError
from harness.predict import commands as cards
from harness.quality import commands as quality
from harness.redact import without_keys
from harness.telemetry import commands as traces

if TYPE_CHECKING:
    from harness.search import Search
    from harness.slo import Slo

app = typer.Typer(
    help="BF16 or INT4, how many users, at what cost, and what breaks? Serve, load, measure, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
engine_app = typer.Typer(help="The environment that vLLM runs in.", no_args_is_help=True)
app.add_typer(engine_app, name="engine")
app.add_typer(cards.app)
app.add_typer(quality.app)
app.add_typer(traces.app)
app.add_typer(decide.app)


_INTERRUPTED = 130


def main() -> None:
    """Run the command line; a KneebenchError becomes one clear message and its exit code."""
    try:
        code = app(standalone_mode=False)
    except KneebenchError as error:
        print(f"error: {without_keys(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # `bench ... | head`
        sys.stderr.close()
        raise SystemExit(141) from None
    except Exception as error:
        # Usage errors of the parser itself carry their own formatting and exit code 2.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this
        print("interrupted; every finished row is on disk", file=sys.stderr)
    if isinstance(code, int) and code:
        raise SystemExit(code)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        print(f"kneebench {__version__}")
        raise typer.Exit


@app.command()
def sweep(
    context: typer.Context,
    model: options.Model = "demo",
    precisions: Annotated[
        str | None,
        typer.Option(
            help="bf16, rtn, awq, gptq, awq+gptq, smoothquant, or NAME=PATH|HUB-ID; NAME@kneebench: with our kernels. "
            "[bf16,awq]"
        ),
    ] = None,
    conc: options.Concurrency = None,
    scenario: options.Scenario = "chat",
    arrivals: options.Arrivals = None,
    rate: options.Rate = None,
    input_tokens: options.InputTokens = None,
    output_tokens: options.OutputTokens = None,
    requests: options.Requests = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Measure until the interval of p95 is within ± this share of it, as 5%; with --until: the interval "
            "of max safe concurrency. [10%]"
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Grow and bisect the concurrency until it is known how many users keep this SLO.")
    ] = None,
    max_cells: Annotated[int | None, typer.Option(min=1, help="Budget of --until, all precisions. [12 each]")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.1, help="Budget of --until, from the start. [60]")] = None,
    max_conc: Annotated[int | None, typer.Option(min=1, max=4096, help="Most users that --until tries. [256]")] = None,
    max_window: Annotated[str | None, typer.Option(help="Longest window of a cell, as 120s.")] = None,
    slo: options.ServiceLevel = None,
    slo_p95: Annotated[str | None, typer.Option(help="Short for --slo p95=..., as 3s or 800ms.")] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of the card.")] = None,
    utilisation: options.Utilisation = None,
    seed: Annotated[int | None, typer.Option(help="Seed of prompts and lengths.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Server sessions for each precision, interleaved ABBA.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run directory. [results/<date>-<model>-<scenario>]")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Carry on with an interrupted run; everything else is read from it.")
    ] = None,
    assume: options.Assume = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Measure a server that runs already; key from KNEEBENCH_API_KEY.")
    ] = None,
    api: Annotated[str | None, typer.Option(help="completions or chat; overrides the scenario.")] = None,
    calibration: options.Calibration = None,
    engine_python: options.EnginePython = None,
    port: options.Port = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    kv_cache_gib: options.KvCache = None,
    engine_arg: options.EngineArg = None,
    client_processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that make the load. [one for each 512 users]")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, or simulated: predicted for --gpu, nothing is started.")] = "vllm",
    gpu: Annotated[str | None, typer.Option(help="The card to predict for, as l4. [bench gpus --list]")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="With --engine simulated: what `bench calibrate` found of your card.")
    ] = None,
) -> None:
    """Quantize what is missing, serve each precision, drive it with load, write CSVs and the report."""
    from harness.engines.address import Address
    from harness.progress import Progress
    from harness.scenario import load_scenario
    from harness.slo import parse_duration, parse_share
    from harness.sweep import parse_concurrencies, parse_rates

    console = decide.console()
    if resume is not None:
        _check_alone(context, "resume")
        from harness import job

        with Progress(console) as progress:
            run_dir = job.resume(resume, progress, argv=sys.argv[1:])
        decide.finish_sweep(console, run_dir)
        return

    level = decide.slo_of(slo, slo_p95) if until is None else _until(until, slo, slo_p95)
    plan = load_scenario(
        scenario,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests,
        slo=level,
        usd_per_hour=usd_per_hour,
        utilisation=utilisation,
        seed=seed,
        api=_one_of(api, "--api", ("completions", "chat")),
        arrivals=_one_of(arrivals, "--arrivals", ("closed", "constant", "poisson", "gamma", "trace")),
        precision=None if precision is None or until else parse_share(precision, "--precision"),
        max_window_s=None if max_window is None else parse_duration(max_window, "--max-window"),
    )
    if conc is not None and plan.arrivals != "closed":
        raise InputError(
            f"--conc with arrivals = {plan.arrivals}: an open loop has no number of users",
            allowed="--rate",
            remedy="say how many requests come a second: --rate 0.5,1,2",
        )
    concurrencies = tuple(parse_concurrencies(conc or ("1" if until else "1,8,16,32")))
    rates = tuple(parse_rates(rate)) if rate is not None else ()
    if endpoint is not None:
        Address.parse(endpoint)
        if model == "demo":
            raise InputError(
                "--endpoint without --model",
                allowed="the name that the server knows the model by",
                remedy="add --model NAME",
            )

    _one_of(engine, "--engine", ("vllm", "simulated"))
    if engine == "vllm" and (gpu or profile):
        raise InputError("--gpu and --profile are for a card that is predicted", allowed="--engine simulated with them")
    if engine == "simulated":
        from harness.predict import run

        plan = plan if usd_per_hour is not None else run.priced(plan, gpu)

    from harness import job

    wanted = decide.listed(precisions, "--precisions") if precisions else ("served",) if endpoint else ("bf16", "awq")
    request = job.SweepRequest(
        scenario=plan,
        concurrencies=concurrencies,
        model=model,
        precisions=wanted,
        repeats=repeats,
        out=out,
        endpoint=endpoint,
        engine_python=engine_python,
        calibration=calibration,
        port=port,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
        engine_args=tuple(engine_arg or ()),
        rates=rates,
        client_processes=client_processes,
        assume=None if assume is None else decide.assumptions_text(assume),
        search=_search(
            level if until else None, precision, concurrencies, max_conc, max_cells, max_minutes, len(wanted)
        ),
        engine="simulated" if engine == "simulated" else "vllm",
        gpu=gpu,
        profile=profile,
    )
    with Progress(console) as progress:
        run_dir = job.sweep(request, progress, argv=sys.argv[1:])
    decide.finish_sweep(console, run_dir)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def quantize(context: typer.Context) -> None:
    """Quantize a model to a checkpoint that vLLM loads as it is. `bench quantize --help` lists methods and schemes."""
    from harness import checkpoints, models

    checkpoints.check_quantizer()
    from quantize.__main__ import main as run

    def resolve(model: str) -> str:
        return str(models.resolve(model).path) if "--dry-run" in context.args else _with_weights(model)

    def say(made: dict[str, Any]) -> str:
        verb = "found" if made["cached"] else "made"
        return f"{verb} {made['path']} ({made['method']}, {made['format']}, {made['seconds']:.1f} s)"

    raise typer.Exit(run(context.args, "bench quantize", resolve, say))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def kernels(context: typer.Context) -> None:
    """Our CUDA kernels beside the ceiling, cuBLAS and other INT4 kernels, by layer and tokens."""
    from harness import checkpoints

    checkpoints.check_quantizer()
    from quantize.kernels.bench import main as run

    raise typer.Exit(run(context.args, "bench kernels"))


@app.command(
    context_settings={
        "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
        "allow_interspersed_args": False,  # or the parser would eat the --
    }
)  # fmt: skip
def recover(context: typer.Context) -> None:
    """Quality against cost: rtn, awq, gptq and training (qat, qad) at several bits, in a table, a figure and words."""
    from harness import checkpoints

    checkpoints.check_quantizer()
    from quantize.recover import main as run

    raise typer.Exit(run(context.args, "bench recover", _with_weights))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A model's directory, quantized or not.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not one line a kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """What a checkpoint holds: layers, bits, sizes, zero points, outliers; and faults, with exit code 1."""
    from harness import checkpoints

    checkpoints.check_quantizer()
    from quantize import inspection
    from quantize.errors import QuantizeError

    try:
        found = inspection.inspect(checkpoint)
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print(inspection.to_json(found))
    else:
        inspection.show(found, decide.console(), layers=layers)
    raise typer.Exit(1 if found.faults else 0)


@app.command()
def doctor(
    engine_log: Annotated[
        Path | None, typer.Option(help="Read vLLM's log instead: what failed in it, and what to do.")
    ] = None,
) -> None:
    """What is here, what is missing for which command, and what brings it."""
    from rich.table import Table
    from rich.text import Text

    from harness.doctor import examine

    if engine_log is not None:
        _diagnose(engine_log)
        return
    table = Table.grid(padding=(0, 2))
    for finding in examine():
        told = Text(finding.detail)
        if finding.state != "ok" and finding.remedy:
            told.append(f"\nfor {finding.needed_for}: {finding.remedy}", style="dim")
        table.add_row(_MARKS[finding.state], Text(finding.what, no_wrap=True), told)
    decide.console().print(table)


def _diagnose(log: Path) -> None:
    """Print the failure modes that a log shows; docs/failure-modes.md has them all."""
    from harness.engines.modes import advice, diagnose

    try:
        met = diagnose(log.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"--engine-log {log}: cannot be read ({error.strerror})") from error
    console = decide.console()
    for one in met:
        times = f", {one.count} times" if one.count > 1 else ""
        console.print(f"{one.mode.title}  (line {one.line_number}{times})", markup=False, highlight=False, style="bold")
        console.print(f"  {one.line}\n  {advice(one.mode)}", markup=False, highlight=False)
    if not met:
        console.print("no failure that is known shows in this log; some leave no line (docs/failure-modes.md)")
    raise typer.Exit(1 if met else 0)


_MARKS = {"ok": "✓", "missing": "✗", "caution": "!"}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def truth(context: typer.Context) -> None:
    """A scripted server with known delays, to test clients against. `bench truth --help` lists what it can do."""
    from harness.load.truth import main as serve

    serve(context.args)


@app.command()
def selftest() -> None:
    """How many streams this machine's client can time; sweeps then mark what goes beyond."""
    from rich.table import Table

    from harness.load import selftest as test

    console = decide.console()
    console.print("truth server on loopback, TTFT 50 ms, 20 ms a token; p99 errors in ms; two minutes at most")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("streams", "processes", "tok/s", "TTFT p50", "TTFT p99", "chunk p99", "us/token", "server late"):
        table.add_column(column, justify="right")

    def show(step: test.Step) -> None:
        figures = (f"{step.ttft_error_p50_ms:.2f}", f"{step.ttft_error_p99_ms:.2f}", f"{step.chunk_error_p99_ms:.2f}")
        table.add_row(
            str(step.streams), str(step.processes), f"{step.chunks_s:,.0f}", *figures,
            f"{step.cpu_us_per_chunk:.1f}", f"{step.server_late_p99_ms:.2f}", style=None if step.good else "dim",
        )  # fmt: skip
        console.print(f"{step.streams} streams: {'good' if step.good else 'beyond 1 ms'}", highlight=False)

    ceiling = test.run_ladder(show)
    console.print()
    console.print(table)
    if ceiling is None:
        console.print("\nNot even the smallest load was timed within 1 ms: is the machine busy?")
        raise typer.Exit(1)
    kept = test.keep_ceiling(ceiling)
    end = "at least " if ceiling.open_end else ""
    console.print(f"\nclient ceiling: {end}{ceiling.streams} streams, {ceiling.chunks_s:,.0f} tok/s", highlight=False)
    console.print(f"kept in {kept}", markup=False, highlight=False)


@engine_app.command("install")
def engine_install(
    kind: Annotated[str, typer.Argument(help="cpu or cuda.")],
    extra_index_url: Annotated[
        str | None, typer.Option(help="Another package index for pip, such as the one with torch's CPU builds.")
    ] = None,
) -> None:
    """Make the environment for vLLM in the user's cache directory; does nothing when it is there."""
    from harness.engines import environment

    wanted = _one_of(kind, "KIND", ("cpu", "cuda"))
    console = decide.console()
    env = environment.install(
        "cuda" if wanted == "cuda" else "cpu",
        extra_index_url,
        lambda line: console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis"),
    )
    print(f"vLLM {env.vllm_version} in {env.python}")


def _until(until: str, slo: str | None, slo_p95: str | None) -> Slo:
    from harness.slo import parse_slo

    if slo is not None or slo_p95 is not None:
        raise InputError(
            "--until together with --slo", allowed="--until alone: what is looked for is the service level"
        )
    return parse_slo(until, "--until")


def _search(
    until: Slo | None,
    precision: str | None,
    first: tuple[int, ...],
    max_conc: int | None,
    max_cells: int | None,
    max_minutes: float | None,
    precisions: int,
) -> Search | None:
    from harness.search import Search
    from harness.slo import parse_share

    budget = {"--max-cells": max_cells, "--max-minutes": max_minutes, "--max-conc": max_conc}
    if until is None:
        for option, value in budget.items():
            if value is not None:
                raise InputError(f"{option} without --until", remedy="say what is looked for: --until p95=3s")
        return None
    share = 0.1 if precision is None else parse_share(precision, "--precision")
    if not 0 < share < 1:
        raise InputError(f"--precision {precision!r}", allowed="more than 0, below 100%")
    most = max_conc or 256
    if max(first) > most:
        raise InputError(f"--conc {max(first)} is above --max-conc {most}", remedy="raise --max-conc")
    return Search(until, share, first, most, max_cells or 12 * precisions, max_minutes or 60.0)


def _with_weights(model: str) -> str:
    """Where the model that is called so lies. Raises InputError for a shape."""
    from harness import models

    source = models.resolve(model)
    if source.random_weights:
        raise InputError(
            f"{model} has no weights to quantize",
            allowed="a model's directory, demo, or a hub name",
            remedy=f"`bench sweep --model {model}` measures the architecture in every precision",
        )
    return str(source.path)


def _check_alone(context: typer.Context, option: str) -> None:
    """Raise InputError when another option was typed beside one that stands for all of them."""
    typed = options.typed(context, but=(option,))
    if typed:
        raise InputError(
            f"--{option} together with {', '.join(typed)}",
            allowed=f"--{option} alone: a run is finished as it was begun",
            remedy="leave the others out, or begin another run",
        )


def _one_of(value: str | None, option: str, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise InputError(f"{option} {value!r} is unknown", allowed=", ".join(allowed))
    return value
