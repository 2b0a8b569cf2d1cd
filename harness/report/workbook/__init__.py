"""cost.xlsx: prices, cards and spend of a run, in live formulas over the rows that were measured.

    inputs.py    the cells that may be changed          merged.py    formulas that merge the rows of a level
    lines.py     prices, as formulas                    values.py    the library's figure for each formula
    fleet.py     cards, spend, an API, the saving       layout.py    what stands where
    answers.py   what a correct answer costs
    answer.py    the first sheet                        sheets.py    those behind it
    charts.py    native charts                          notes.py     what the words mean
    page.py      what sheets share                      pen.py       cells, and how text from outside gets into them

Whoever changes a price, the traffic or the service level sees what it comes to, in Excel or LibreOffice, without this
program; a viewer that recalculates nothing shows the library's own figures, which stand in the file beside each
formula. No macro, no link, no clock: one run gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from xlsxwriter import Workbook

from harness.analysis.correct import CorrectLine, correct_lines
from harness.analysis.evidence import Evidence
from harness.analysis.levels import load, precision_order
from harness.assumptions import Assumptions
from harness.files import write_whole
from harness.prices import Prices
from harness.records import Knee
from harness.report.run import Run
from harness.report.workbook import sheets
from harness.report.workbook.answer import write_answer, write_one_load
from harness.report.workbook.answers import answers_cells
from harness.report.workbook.charts import write_charts
from harness.report.workbook.inputs import GROUPS, Input
from harness.report.workbook.inputs import values as input_values
from harness.report.workbook.layout import Layout, lay_out
from harness.report.workbook.notes import notes
from harness.report.workbook.pen import Pen, plain
from harness.report.workbook.values import Sessions, level_cells, workings_cells


def write_workbook(
    run: Run,
    knees: Sequence[Knee],
    assumptions: Assumptions,
    path: Path,
    prices: Prices | None = None,
    evidence: Evidence | None = None,
) -> Path:
    """Write cost.xlsx to `path`, whole or not at all, and return it.

    `knees`: what find_knees says of the run. Without any (one trace at one speed) the file holds levels and their
    prices, and nothing that takes a safe load. `prices`: a catalogue to choose from, on a sheet of its own. `evidence`:
    what was found about the answers, for the price of a correct one.
    """
    correct = _correct(run, knees, assumptions, evidence)
    layout = lay_out(run, bool(knees), judged=bool(correct))
    sessions = _sessions(layout)
    of_levels = [
        cells
        for precision in layout.precisions
        for cells in level_cells(
            [level for level in layout.levels if level.precision == precision], run.slo, assumptions, sessions
        )
    ]
    given = input_values(run, assumptions)
    groups = _used(layout)
    every = [cell for _, cells in groups for cell in cells]

    buffer = io.BytesIO()
    book = Workbook(buffer, {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False,
                             "strings_to_numbers": False})  # fmt: skip
    book.set_properties({"title": plain(f"{run.model}: cost and capacity{run.words.also}"), "created": _made(run),
                         "comments": "Written by kneebench from the rows of one run."})  # fmt: skip
    pen = Pen(book, run.words)
    names = ["Answer", "Inputs", *(["Quality"] if correct else []), *(["Charts", "Workings"] if knees else []),
             "Levels", "Points"]  # fmt: skip
    tabs = {name: book.add_worksheet(name) for name in (*names, *(["Prices"] if prices else []), "Notes")}
    for inputs in ("Inputs", *(["Quality"] if correct else [])):
        tabs[inputs].set_tab_color("#C9A227")
    if knees:
        of_knees = workings_cells(run.points, knees, assumptions, sessions)
        for cells, precision in zip(of_knees, layout.precisions, strict=True):
            cells |= answers_cells(correct.get(precision), correct.get(layout.precisions[0]))
        write_answer(pen, tabs["Answer"], run, layout, of_knees, every, given)
        sheets.write_workings(pen, tabs["Workings"], run, layout, of_knees)
        write_charts(pen, tabs["Charts"], run, layout)
    else:
        write_one_load(pen, tabs["Answer"], run, layout, of_levels)
    if correct:
        sheets.write_quality(pen, tabs["Quality"], run, layout, correct)
    sheets.write_inputs(pen, tabs["Inputs"], run, groups, given, assumptions)
    sheets.write_levels(pen, tabs["Levels"], run, layout, of_levels)
    sheets.write_points(pen, tabs["Points"], run, layout)
    if prices:
        sheets.write_prices(pen, tabs["Prices"], run, prices)
    sheets.write_notes(pen, tabs["Notes"], run, notes(run, layout))
    book.close()
    write_whole(path, buffer.getvalue())
    return path


def _correct(
    run: Run, knees: Sequence[Knee], assumptions: Assumptions, evidence: Evidence | None
) -> dict[str, CorrectLine]:
    """What a correct answer costs in each precision; empty where there is nothing to say."""
    if evidence is None or not knees or evidence.baseline != precision_order(run.points)[0]:
        return {}
    lines = correct_lines(run.points, knees, evidence.outcomes, evidence.baseline, assumptions)
    return {line.precision: line for line in lines}


def _used(layout: Layout) -> list[tuple[str, list[Input]]]:
    """The inputs that a formula reads: an open loop has no users to state, a single trace no cards to count."""
    formulas = [line.formula for section in layout.sections for line in section.lines]
    formulas += [line.formula for line in layout.level_lines]
    read = {name for formula in formulas for name in named(formula)}
    chosen = [(title, [cell for cell in cells if cell.name in read]) for title, cells in GROUPS]
    return [(title, cells) for title, cells in chosen if cells]


def named(formula: str) -> set[str]:
    """The input cells that the template of a formula names."""
    return set(re.findall(r"\b[a-z][a-z_0-9]+\b", re.sub(r'"[^"]*"|\{[^}]*\}', "", formula)))


def _sessions(layout: Layout) -> Sessions:
    """The rows with tokens that levels are merged from, where there are several sessions to pair."""
    rows = [layout.points[at] for behind in layout.behind for at in behind] if layout.repeats else []
    return {(row.precision, load(row), row.repeat): row for row in rows if row.tok_s}


def _made(run: Run) -> datetime:
    """The file's date: when its first row was measured, for the day on which a report is made is no part of it."""
    stamps = sorted(point.started_at for point in run.points if point.started_at)
    try:
        return datetime.fromisoformat(stamps[0][:19])
    except (IndexError, ValueError):
        return datetime(1980, 1, 1)
