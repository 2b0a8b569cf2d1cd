"""The command line: parse, call, print; nothing else. Heavy imports stand inside the command that needs them.

`bench sweep` is in sweeping.py; the commands that decide from what was measured are in decide.py.
"""

from __future__ import annotations

import errno
import io
import shlex
import sys
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from harness import __version__, completing, decide, options, sweepfile, sweeping
from harness.errors import InputError, KneebenchError
from harness.inert import visible
from harness.keys import forbid_core_dumps
from harness.predict import commands as cards
from harness.quality import commands as quality
from harness.redact import tell_errors_redacted, told, without_keys
from harness.signals import as_ctrl_c
from harness.telemetry import commands as traces
from harness.width import wrapped

app = typer.Typer(
    help="BF16 or INT4, how many users, at what cost, and what breaks? Serve, load, measure, report.",
    no_args_is_help=True,
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
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of what a disk says, whichever file it is: nobody's defect."""


def main() -> None:
    """Run the command line; a KneebenchError becomes one clear message and its exit code.

    Nothing that went wrong is told with a key in it, or with words that the terminal would obey.
    """
    forbid_core_dumps()
    tell_errors_redacted()
    try:
        with as_ctrl_c():
            code = app(standalone_mode=False)
    except KneebenchError as error:
        said = f"error: {visible(without_keys(str(error)))}"
        print(wrapped(said, get_terminal_size().columns) if sys.stderr.isatty() else said, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # `bench ... | head`
        sys.stderr.close()
        raise SystemExit(141) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            print(visible(without_keys(f"error: {_no_room(error)}")), file=sys.stderr)
            raise SystemExit(1) from None
        # Usage errors of the parser itself carry their own formatting and exit code 2.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            print(told(error), file=sys.stderr, end="")
            raise SystemExit(1) from None
        usage = io.StringIO()
        show(usage)
        print(visible(without_keys(usage.getvalue())), file=sys.stderr, end="")
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this, and as_ctrl_c the other signals into Ctrl-C
        print("interrupted; every finished row is on disk", file=sys.stderr)
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _no_room(error: OSError) -> str:
    what = error.filename or "what was to be written"
    return (
        f"{what}: the disk does not take it ({error.strerror}); what is there is whole.\n"
        "To mend it: free space, or choose another place, and run the command again."
    )


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        print(f"kneebench {__version__}")
        raise typer.Exit


app.command(cls=sweepfile.SweepCommand, short_help="Measure: quantize, serve, load, write rows and papers.")(
    sweeping.sweep
)


@app.command(short_help="Write a sweep.toml to begin with.")
def init(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("sweep.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a sweep.toml with every option, its default and its meaning, made for this machine."""
    from harness import starter
    from harness.engines import environment
    from harness.telemetry.gpu import gpus

    assert context.parent is not None
    command = context.parent.command.get_command(context, "sweep")  # type: ignore[attr-defined]
    cards = gpus()
    starter.write(file, starter.text(sweepfile.options(command), cards), force=force)
    print(f"wrote {file}")
    if not environment.installed():
        print(f"first: bench engine install {'cuda' if cards else 'cpu'}")
    print(f"then:  bench sweep {shlex.quote(str(file))}")


@app.command(short_help="Loads that have a name.")
def scenarios(
    name: Annotated[
        str | None,
        typer.Argument(help="One of them: its file, to copy and change.", autocompletion=completing.scenarios),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """The loads that have a name, or the whole file of one."""
    from harness import listing
    from harness.report.document import document
    from harness.scenario import load_scenario

    if name is not None:
        file = listing.scenario_file(name)
        text = document("scenario", scenario=load_scenario(name)) if as_json else file.read_text(encoding="utf-8")
        print(text.rstrip())
    elif as_json:
        print(document("scenarios", scenarios=listing.scenarios()))
    else:
        console = decide.console()
        console.print(listing.scenario_table(listing.scenarios()))
        console.print("\nYour own: `bench scenarios chat > mine.toml`, change it, `bench sweep --scenario mine.toml`.")


@app.command(short_help="What --precisions takes, and what it stands for.")
def precisions(as_json: options.Json = False) -> None:
    """What --precisions takes: bits, layout, what it needs, and the kernel that serves it."""
    from harness import listing
    from harness.report.document import document

    found = listing.precisions()
    if as_json:
        print(document("precisions", precisions=found))
        return
    console = decide.console()
    console.print(listing.precision_table(found))
    console.print()
    for line in (*(f"{one.name}: {one.method}." for one in found), *listing.NOTES):
        console.print(line, markup=False, highlight=False)


@app.command(
    short_help="A model to a checkpoint in few bits.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
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


@app.command(
    short_help="Our CUDA kernels beside others and the ceiling.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def kernels(context: typer.Context) -> None:
    """Our CUDA kernels beside the ceiling, cuBLAS and other INT4 kernels, by layer and tokens."""
    from harness import checkpoints

    checkpoints.check_quantizer()
    from quantize.kernels.bench import main as run

    raise typer.Exit(run(context.args, "bench kernels"))


@app.command(
    short_help="Quality against cost of every method, in a table.",
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


@app.command(short_help="What a checkpoint holds, and its faults.")
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
        print(f"error: {visible(str(error))}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print(inspection.to_json(found))
    else:
        inspection.show(found, decide.console(), layers=layers)
    raise typer.Exit(1 if found.faults else 0)


@app.command(short_help="What is here, what is missing, what brings it.")
def doctor(
    engine_log: Annotated[
        Path | None, typer.Option(help="Read vLLM's log instead: what failed in it, and what to do.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """What is here, what is missing for which command, and what brings it."""
    from rich.table import Table
    from rich.text import Text

    from harness.doctor import examine
    from harness.report.document import document

    if engine_log is not None:
        _diagnose(engine_log, as_json)
        return
    found = examine()
    if as_json:
        print(document("doctor", findings=found))
        return
    table = Table.grid(padding=(0, 2))
    for finding in found:
        told = Text(finding.detail)
        if finding.state != "ok" and finding.remedy:
            told.append(f"\nfor {finding.needed_for}: {finding.remedy}", style="dim")
        table.add_row(_MARKS[finding.state], Text(finding.what, no_wrap=True), told)
    decide.console().print(table)


def _diagnose(log: Path, as_json: bool) -> None:
    """Print the failure modes that a log shows; docs/failure-modes.md has them all."""
    from harness.engines.modes import advice, diagnose
    from harness.report.document import document

    try:
        met = diagnose(log.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"--engine-log {log}: cannot be read ({error.strerror})") from error
    if as_json:
        told = [
            {"id": one.mode.id, "title": one.mode.title, "line_number": one.line_number, "line": one.line,
             "count": one.count, "advice": advice(one.mode)}
            for one in met
        ]  # fmt: skip
        print(document("doctor", failures=told))
        raise typer.Exit(1 if met else 0)
    console = decide.console()
    for one in met:
        times = f", {one.count} times" if one.count > 1 else ""
        console.print(f"{one.mode.title}  (line {one.line_number}{times})", markup=False, highlight=False, style="bold")
        console.print(f"  {one.line}\n  {advice(one.mode)}", markup=False, highlight=False)
    if not met:
        console.print("no failure that is known shows in this log; some leave no line (docs/failure-modes.md)")
    raise typer.Exit(1 if met else 0)


_MARKS = {"ok": "✓", "missing": "✗", "caution": "!"}


@app.command(
    short_help="A scripted server with known delays.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def truth(context: typer.Context) -> None:
    """A scripted server with known delays, to test clients against. `bench truth --help` lists what it can do."""
    from harness.load.truth import main as serve

    serve(context.args)


@app.command(short_help="How many streams this machine can time.")
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

    wanted = options.one_of(kind, "KIND", ("cpu", "cuda"))
    console = decide.console()
    env = environment.install(
        "cuda" if wanted == "cuda" else "cpu",
        extra_index_url,
        lambda line: console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis"),
    )
    print(f"vLLM {env.vllm_version} in {env.python}")


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
