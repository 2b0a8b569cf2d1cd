"""`bench calibrate`: a run read, its card fitted, and what came of it said on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.analysis.levels import axis, shown
from harness.predict import calibrate, points, profile
from harness.predict.calibrate import Figure, Predicted
from harness.predict.points import NextPoint
from harness.predict.profile import QUANTITIES, Profile
from harness.predict.subject import MIN_POINTS, Subject, subject
from harness.report.run import load_run

_NAMES = {"tok_s": "tok/s", "p95_ms": "p95 ms", "ttft_p50_ms": "TTFT p50", "tpot_p50_ms": "TPOT p50"}


def run(
    console: Console,
    run_dir: Path,
    *,
    use: str | None = None,
    count: int = MIN_POINTS,
    gpu: str | None = None,
    model: str | None = None,
    out: Path | None = None,
) -> Profile:
    """Fit, print, and write the profile to `out`. use: "bf16:1,awq:8"; without it `count` points are chosen."""
    what = subject(load_run(run_dir), gpu, model)
    found = calibrate.calibrate(what, points.choose(what, use, count))
    rest = calibrate.held_out(what, found)
    for line in told(found):
        console.print(line, markup=False, highlight=False)
    if rest:
        for names in (QUANTITIES[:2], QUANTITIES[2:]):
            console.print(beside(what, rest, names), "")
        console.print("* outside its band", style="dim")
        console.print(f"Median error: {_medians(rest)}.", markup=False, highlight=False)
    for line in advised(points.next_point(what, found)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        profile.write(found, out)
        console.print(f"Wrote {out}; bench predict --profile {out} uses it.", markup=False, highlight=False)
    return found


def told(found: Profile) -> list[str]:
    """What was fitted to what, and the factors: 1 is as predicted, the ends are of 95 %."""
    cells = ", ".join(f"{cell.precision}:{shown(cell.load)}" for cell in found.cells)
    lines = [f"{found.card.name}, fitted to {cells} of {found.run_id} ({found.model}, {found.scenario}).", ""]
    for name in found.estimate.names:
        middle, half = found.estimate.factor(name), found.estimate.spread(name)
        lines.append(f"  {name:<10} x {middle:.2f} [{middle / half:.2f} to {middle * half:.2f}]")
    return [*lines, *(f"Note: {note}." for note in found.notes), ""]


def beside(what: Subject, rows: Sequence[Predicted], names: Sequence[str]) -> Table:
    """The other cells in two figures: measured, predicted with its band; one that falls outside its band is marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("precision", no_wrap=True)
    table.add_column(axis(what.levels).unit, justify="right")
    for name in names:
        table.add_column(_NAMES[name], justify="right", no_wrap=True)
        table.add_column("predicted [95 % band]", no_wrap=True)
    for row in rows:
        load = row.cell.conc if row.cell.rate_rps is None else row.cell.rate_rps
        figures = (part for name in names for part in _figure(row.figures.get(name)))
        table.add_row(Text(row.cell.precision), shown(load), *figures)
    return table


def _figure(figure: Figure | None) -> tuple[Text, Text]:
    if figure is None or figure.measured is None:
        return Text(""), Text("")
    mark = "" if figure.lo <= figure.measured <= figure.hi else " *"
    measured, value, lo, hi = (
        f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
        for number in (figure.measured, figure.value, figure.lo, figure.hi)
    )
    return Text(measured), Text(f"{value} [{lo} to {hi}]{mark}")


def _medians(rows: Sequence[Predicted]) -> str:
    found = calibrate.medians(rows)
    return ", ".join(f"{_NAMES[name]} {100 * error:.1f} %" for name, error in found.items()) + f" of {len(rows)} cells"


def advised(point: NextPoint) -> list[str]:
    """Which point to take next, and what it would bring."""
    what = "is measured already" if point.is_measured else "is not measured yet"
    return [
        "",
        f"Next: {point.cell.key.rpartition('-r')[0]} {what}. Bands of the other cells would go from "
        f"±{100 * point.band:.0f} % to ±{100 * point.band_then:.0f} %, on the mean:",
        f"  {point.command}",
    ]
