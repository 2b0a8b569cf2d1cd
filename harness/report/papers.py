"""Every paper of a run, from its directory: what `bench report` writes. Each module knows its own paper, this one all.

capacity.md, figures/   the numbers               risk_brief.md      for who signs off the precision
capacity.html           the same, to play with    business_case.md   for who pays
cost.xlsx               the money, live           knees.csv, comparison.csv   for machines
failures.md, quality.md what breaks in the answers, with failures.csv, families.csv and fidelity.csv: where any were
                        compared
compute_graph.md        where a traced generation's time goes (`bench trace`), with kernels.csv
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from harness.analysis.compare import compare
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions, load_assumptions
from harness.errors import InputError, KneebenchError
from harness.prices import load_prices
from harness.quality.directory import SETTINGS, load_quality
from harness.records import Knee, Ratio, write_table
from harness.report.brief import write_brief, write_case
from harness.report.html import write_html
from harness.report.markdown import write_capacity
from harness.report.quality import evidence_of, write_quality, write_quality_papers
from harness.report.run import Run, load_run
from harness.report.trace import write_trace_papers
from harness.report.workbook import write_workbook
from harness.rundir import ASSUMPTIONS, report_dir_of
from harness.slo import Slo
from harness.telemetry import trace_files


def own_assumptions(run_dir: Path) -> Path | None:
    """The file of the run's own, where `bench sweep --assume` has put one."""
    path = run_dir / ASSUMPTIONS
    return path if path.is_file() else None


def write_report(
    run_dir: Path,
    out_dir: Path,
    slo: Slo | None = None,
    assumptions: Assumptions | None = None,
    beside: Sequence[Path] = (),
) -> list[Path]:
    """Write all papers of a run into `out_dir`, capacity.md first; returns what was written.

    `slo` and `assumptions` take the place of the run's own; `beside` are runs of the same model whose crossovers are
    shown next to this one's. Raises InputError when a directory is no run.
    """
    given = assumptions or load_assumptions(own_assumptions(run_dir))
    return write_papers(load_run(run_dir, slo), out_dir, given, [load_run(other) for other in beside])


def write_papers(run: Run, out_dir: Path, given: Assumptions, beside: Sequence[Run] = ()) -> list[Path]:
    """The same of a run that is read already."""
    knees = find_knees(run.points, run.slo)
    ratios = compare(run.points, run.requests)
    evidence = evidence_of(run.quality) if run.quality else None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out_dir} cannot be made: {error.strerror}", remedy="choose another --out") from error
    page, *figures = write_capacity(run, knees, ratios, given, out_dir, beside, evidence)
    written = [
        page,
        write_html(run, given, page.read_text(encoding="utf-8"), figures, out_dir / "capacity.html"),
        write_workbook(run, knees, given, out_dir / "cost.xlsx", load_prices(), evidence),
        write_brief(run, knees, ratios, given, out_dir / "risk_brief.md", evidence),
        write_case(run, knees, ratios, given, out_dir / "business_case.md", evidence),
        *_tables(knees, ratios, out_dir),
        *figures,
    ]
    if run.quality and evidence:
        written += write_quality_papers(run.quality, evidence, out_dir)
    return written


def _tables(knees: Sequence[Knee], ratios: Sequence[Ratio], out_dir: Path) -> list[Path]:
    """The records behind the words; a table of an earlier report without rows now is taken away."""
    written = []
    for name, rows, record in (("knees.csv", knees, Knee), ("comparison.csv", ratios, Ratio)):
        path = out_dir / name
        path.unlink(missing_ok=True)
        if rows:
            write_table(path, rows, record)
            written.append(path)
    return written


MANY = 8
"""Runs from which on it pays to start processes for them."""


@dataclass(frozen=True, slots=True)
class Reported:
    """One run of many: the first page of its report, or why there is none."""

    run: Path
    page: Path | None = None
    fault: str | None = None


def write_reports(directory: Path, slo: Slo | None = None, assumptions: Assumptions | None = None) -> list[Reported]:
    """The reports of all runs below `directory`, and of what holds quality or traces alone, in the order of their
    names. One that fails stops no other.

    A run takes a second or two, most of it for the figures, so many of them are shared out to all cores.
    """
    runs = sorted(
        path for path in directory.iterdir() if (path / "points.csv").is_file() or is_quality(path) or is_trace(path)
    )
    report = functools.partial(_reported, slo=slo, assumptions=assumptions)
    if len(runs) < MANY:
        return [report(run) for run in runs]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(report, runs))


def _reported(run_dir: Path, slo: Slo | None, assumptions: Assumptions | None) -> Reported:
    out = report_dir_of(run_dir)
    try:
        if is_quality(run_dir) and (found := load_quality(run_dir)):
            page, *_ = write_quality(found, out)
        elif is_trace(run_dir):
            page, *_ = write_trace_papers(trace_files.saved([str(run_dir)]), out)
        else:
            page, *_ = write_report(run_dir, out, slo, assumptions)
    except KneebenchError as error:
        return Reported(run_dir, fault=str(error).splitlines()[0])
    return Reported(run_dir, page)


def is_quality(path: Path) -> bool:
    """Whether a directory holds what was found about quality, and no sweep."""
    return (path / SETTINGS).is_file() and not is_run(path)


def is_trace(path: Path) -> bool:
    """Whether a directory holds traced generations."""
    return (path / trace_files.SETTINGS).is_file()


def is_run(path: Path) -> bool:
    return (path / "points.csv").exists() or (path / "run.toml").exists()
