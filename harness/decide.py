"""The commands that decide from what was measured: files in, files and words out. Parse, call, print; nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import completing, options
from harness.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.slo import Slo

app = typer.Typer()

_SLO = typer.Option(help="Another service level: p95=3s, ttft=500ms, tpot=50ms, goodput=90%, joined by commas.")
_ASSUME = typer.Option(help="Prices and traffic, a .toml file (docs/cost.md). [the run's own, else defaults]")


@app.command(short_help="The papers of a run, from its files alone.")
def report(
    run: Annotated[
        Path,
        typer.Argument(help="A run directory, results/<run>, or a directory of many.", autocompletion=completing.runs),
    ],
    out: Annotated[Path | None, typer.Option(help="Where it goes. [reports/<run> beside results/]")] = None,
    slo: Annotated[str | None, _SLO] = None,
    assume: Annotated[Path | None, _ASSUME] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Another run of the model, as of --scenario rag, for its crossovers.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the papers of a run from its files alone: capacity page, workbook, risk brief, business case."""
    from harness.assumptions import load_assumptions
    from harness.report.document import document, of_run
    from harness.report.papers import is_quality, is_run, is_trace, own_assumptions, write_papers, write_reports
    from harness.report.run import load_run
    from harness.rundir import report_dir_of

    level, given = slo_of(slo, None), None if assume is None else load_assumptions(assume)
    if as_json and (is_quality(run) or is_trace(run)):
        raise InputError(f"--json of {run}, which no sweep wrote", allowed="--json of a sweep's run, or of many runs")
    if is_quality(run):
        finish_quality(console(), run, out)
        return
    if is_trace(run):
        finish_trace(console(), [str(run)], out)
        return
    if is_run(run) or not run.is_dir():
        found, out = load_run(run, level), out or report_dir_of(run)
        given = given or load_assumptions(own_assumptions(run))
        written = write_papers(found, out, given, [load_run(other) for other in beside or []])
        if as_json:
            print(of_run("report", found, run, out, written))
        else:
            _say_where(console(), run, out)
        return
    if out is not None or beside:
        raise InputError(f"{run} is no run, and --out and --beside are for one", allowed="a run directory with them")
    reported = write_reports(run, level, given)
    if not reported:
        raise InputError(f"{run} holds no run", allowed="a directory that `bench sweep` wrote, or one of many of them")
    if as_json:
        print(document("reports", runs=reported))
    for one in () if as_json else reported:
        said = f"report  {_near(one.page)}" if one.page else f"failed  {_near(one.run)}: {one.fault}"
        console().print(said, markup=False, highlight=False, soft_wrap=True)
    if any(one.fault for one in reported):
        raise typer.Exit(1)


@app.command(short_help="Users a card carries, cards for a load, their cost.")
def capacity(
    run: Annotated[Path, typer.Argument(help="A run directory, results/<run>.", autocompletion=completing.runs)],
    slo: Annotated[str | None, _SLO] = None,
    users: Annotated[int | None, typer.Option(help="Concurrent users at the peak.")] = None,
    requests_per_day: Annotated[float | None, typer.Option(help="Expected traffic.")] = None,
    peak_factor: Annotated[float | None, typer.Option(help="Rate at the peak over the day's mean. [3]")] = None,
    trace: Annotated[Path | None, typer.Option(help="Take the traffic from a trace (CSV) instead.")] = None,
    headroom: Annotated[str | None, typer.Option(help="Share of a card that is kept free. [20%]")] = None,
    failover: Annotated[int | None, typer.Option(help="Cards that may be lost. [1]")] = None,
    users_per_tenant: Annotated[int | None, typer.Option(help="Concurrent users of one tenant. [1]")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Tokens of a user in the KV cache. [2048]")] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Rent of a card. [as the run was priced]")] = None,
    utilisation: Annotated[str | None, typer.Option(help="Share of the paid hour under load, as 60%.")] = None,
    rent: Annotated[str | None, typer.Option(help="A card's rent from the catalogue, as rtx-a4000.")] = None,
    own: Annotated[str | None, typer.Option(help="A card's price from the catalogue: own it instead.")] = None,
    electricity: Annotated[str | None, typer.Option(help="A region's electricity from the catalogue.")] = None,
    api: Annotated[str | None, typer.Option(help="An API of the catalogue to break even against.")] = None,
    prices: Annotated[Path | None, typer.Option(help="Your own prices, a .toml file like the catalogue.")] = None,
    assume: Annotated[Path | None, _ASSUME] = None,
    as_json: options.Json = False,
) -> None:
    """How many users and requests a card carries, how many cards that makes, and what they cost."""
    from harness.analysis.knee import find_knees
    from harness.assumptions import load_assumptions, with_trace
    from harness.report.papers import own_assumptions
    from harness.report.planning import capacity_document, planning_sentences
    from harness.report.run import load_run
    from harness.report.terminal import capacity_tables
    from harness.slo import parse_share

    found = load_run(run, slo_of(slo, None))
    given = load_assumptions(
        assume or own_assumptions(run),
        prices,
        users=users,
        requests_per_day=requests_per_day,
        peak_factor=peak_factor,
        headroom=None if headroom is None else parse_share(headroom, "--headroom"),
        failover=failover,
        users_per_tenant=users_per_tenant,
        context_tokens=context_tokens,
        usd_per_hour=usd_per_hour,
        utilisation=None if utilisation is None else parse_share(utilisation, "--utilisation"),
        rent=rent,
        own=own,
        electricity=electricity,
        api=api,
    )
    if trace is not None:
        given = with_trace(given, trace)
    knees = find_knees(found.points, found.slo)
    if not knees:
        raise InputError(f"{run} holds one trace at one speed: it has no safe load to plan with", allowed="other runs")
    if as_json:
        print(capacity_document(found, knees, given))
        return
    terminal = console()
    for table in capacity_tables(found.points, knees, given):
        terminal.print(table)
        terminal.print()
    for sentence in [*planning_sentences(found.points, knees, given), *(f"Price: {said}." for said in given.sources)]:
        terminal.print(sentence, markup=False, highlight=False)


@app.command(short_help="The catalogue of prices, with day and source.")
def prices(
    card: Annotated[str | None, typer.Argument(help="One card alone.")] = None,
    file: Annotated[Path | None, typer.Option("--prices", help="Your own prices, a .toml file.")] = None,
    as_json: options.Json = False,
) -> None:
    """The catalogue of prices: rent, cards, electricity and APIs, each with its day and its source."""
    from harness.prices import load_prices
    from harness.report.document import document
    from harness.report.terminal import price_table, prices_of

    found = prices_of(load_prices(file), card)
    if as_json:
        print(document("prices", rents=found.rents, buys=found.buys, tariffs=found.tariffs, apis=found.apis))
    else:
        console().print(price_table(found))


@app.command(short_help="Two runs, before and after: did anything regress?")
def compare(
    before: Annotated[Path, typer.Argument(help="The run before, results/<run>.", autocompletion=completing.runs)],
    after: Annotated[Path, typer.Argument(help="The run after.", autocompletion=completing.runs)],
    tolerance: Annotated[str, typer.Option(help="What may get worse without being a regression.")] = "5%",
    metric: Annotated[str | None, typer.Option(help="tok_s, p95_ms, ttft_p50_ms, tpot_p50_ms. [all]")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the comparison as Markdown as well.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Undecided is exit code 1, too.")] = False,
    as_json: options.Json = False,
) -> None:
    """Two runs, before and after an upgrade: paired ratios with intervals; exit code 1 where anything regressed."""
    from harness.report import versus
    from harness.report.terminal import print_rows
    from harness.slo import parse_share

    found = versus.compare_runs(before, after, parse_share(tolerance, "--tolerance"), versus.parse_metrics(metric))
    if out is not None:
        versus.write_page(found, out)
    if as_json:
        print(versus.to_json(found, before, after))
        raise typer.Exit(found.exit_code(strict))
    terminal = console()
    header, rows = versus.rows(found)
    print_rows(terminal, header[:-1], [row[:-1] for row in rows])  # without Pairs it fits 80 columns; notes tell them
    for sentence in (*versus.cautions(found), *versus.notes(found)):
        terminal.print(f"- {sentence}", markup=False, highlight=False)
    terminal.print(f"\n{versus.title(found)}", markup=False, highlight=False)
    terminal.print(versus.headline(found), markup=False, highlight=False, style="bold")
    raise typer.Exit(found.exit_code(strict))


@app.command(short_help="The runs of a directory.")
def history(
    directory: Annotated[Path, typer.Argument(help="A directory of runs.")] = Path("results"),
    as_json: options.Json = False,
) -> None:
    """The runs of a directory: what was measured, how far it got, what it found."""
    from harness.history import history as past_runs
    from harness.report import history as told
    from harness.report.document import document
    from harness.report.terminal import print_rows

    runs = past_runs(directory)
    if as_json:
        print(document("history", runs=runs))
    else:
        print_rows(console(), told.HEADER, told.rows(runs))


# --- what both halves of the command line need ------------------------------------------------------------------------


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where commands print; `stderr` where stdout is for a document, `quiet`: nowhere."""
    from harness.terminal import Terminal

    terminal = Terminal(stderr=stderr)
    terminal.quiet = quiet
    return terminal


def listed(text: str, option: str) -> tuple[str, ...]:
    """Names that were typed, joined by commas. Raises InputError for none."""
    items = tuple(part.strip() for part in text.split(",") if part.strip())
    if not items:
        raise InputError(f"{option} {text!r} names none", allowed="names, joined by commas, as in --help")
    return items


def slo_of(slo: str | None, slo_p95: str | None) -> Slo | None:
    """The service level that was typed. Raises InputError when it is none, or two."""
    from harness.slo import Slo, parse_duration, parse_slo

    if slo is not None and slo_p95 is not None:
        raise InputError("--slo together with --slo-p95", allowed="one of them", remedy="--slo p95=3s,ttft=500ms")
    if slo_p95 is not None:
        return Slo(parse_duration(slo_p95, "--slo-p95"))
    return None if slo is None else parse_slo(slo)


def assumptions_text(path: Path) -> str:
    """The text of a file of assumptions, once it is known to be good."""
    from harness.assumptions import load_assumptions

    load_assumptions(path)
    return path.read_text(encoding="utf-8-sig")


def finish_sweep(terminal: Console, run_dir: Path, *, quiet: bool = False, as_json: bool = False) -> None:
    """What a sweep ends with: its rows and knees in words, and its papers; quietly only where they are, or all of it as
    JSON. The run is read once for both."""
    from harness.assumptions import load_assumptions
    from harness.report.document import of_run
    from harness.report.papers import own_assumptions, write_papers
    from harness.report.run import load_run
    from harness.report.terminal import show_run
    from harness.rundir import report_dir_of

    run, out = load_run(run_dir), report_dir_of(run_dir)
    if not (quiet or as_json):
        show_run(terminal, run)
    written = write_papers(run, out, load_assumptions(own_assumptions(run_dir)))
    if as_json:
        print(of_run("sweep", run, run_dir, out, written))
    elif quiet:
        print(_near(written[0]))
    else:
        _say_where(terminal, run_dir, out)


def finish_quality(terminal: Console, directory: Path, out: Path | None = None) -> None:
    """What a look at answers ends with: its table, the gate's verdict and its papers, or those of the sweep's run that
    it belongs to. Ends the command with exit code 1 when a precision breaks the gate."""
    from harness.assumptions import load_assumptions
    from harness.quality.directory import load_quality
    from harness.report.papers import is_run, own_assumptions, write_papers
    from harness.report.quality import evidence_of, write_quality_papers
    from harness.report.run import load_run
    from harness.report.terminal import show_quality
    from harness.rundir import report_dir_of

    run, out = load_run(directory) if is_run(directory) else None, out or report_dir_of(directory)
    found = run.quality if run else load_quality(directory)
    assert found is not None
    evidence = evidence_of(found)
    show_quality(terminal, evidence)
    if run:
        write_papers(run, out, load_assumptions(own_assumptions(directory)))
    else:
        write_quality_papers(found, evidence, out)
    terminal.print()
    for what, name in (("what breaks", "failures.md"), ("how far", "quality.md"), ("rows", "failures.csv")):
        if (out / name).exists():
            terminal.print(f"{what:<12} {_near(out / name)}", markup=False, highlight=False, soft_wrap=True)
    if any(evidence.passed(precision) is False for precision in evidence.precisions):
        raise typer.Exit(1)


def _say_where(terminal: Console, run: Path, out: Path) -> None:
    terminal.print()
    for what, path in (
        ("report", out / "capacity.md"),
        ("page", out / "capacity.html"),
        ("costs", out / "cost.xlsx"),
        ("risks", out / "risk_brief.md"),
        ("case", out / "business_case.md"),
        ("rows", run / "points.csv"),
    ):
        terminal.print(f"{what:<7} {_near(path)}", markup=False, highlight=False, soft_wrap=True)


def finish_trace(terminal: Console, items: list[str], out: Path | None = None, gpu: str | None = None) -> None:
    """What traced generations end with: their papers. `items`: as --from names them."""
    from harness.report.trace import write_trace_papers
    from harness.telemetry.trace_files import saved

    page, *_, rows = write_trace_papers(saved(items), out, gpu)
    for what, path in (("timeline", page), ("rows", rows)):
        terminal.print(f"{what:<9} {_near(path)}", markup=False, highlight=False, soft_wrap=True)


def _near(path: Path) -> Path:
    """As seen from here, when it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
