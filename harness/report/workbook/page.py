"""What all sheets share: their first rows, headers, titles, and how they print."""

from __future__ import annotations

from collections.abc import Sequence

from xlsxwriter.worksheet import Worksheet

from harness.report.predicted import told
from harness.report.run import Run
from harness.report.setup import cautions
from harness.report.workbook.layout import HEADER
from harness.report.workbook.lines import Line
from harness.report.workbook.pen import Pen


def head(pen: Pen, sheet: Worksheet, run: Run, title: str, more: str = "") -> None:
    """The first rows: what the sheet is, of which run, and what nobody may miss."""
    of = f"{run.model} on {run.machine}, {run.scenario_name} scenario, run {run.name}. {more}".rstrip()
    warned = [*([f"{told(run)[0]} How wrong it may be: Notes."] if run.predicted else []), *cautions(run)]
    pen.text(sheet, 0, 0, f"{title} (predicted run)" if run.predicted else title, "title")
    pen.text(sheet, 1, 0, of, "lead")
    pen.text(sheet, 2, 0, " ".join(warned), "caution")


def header(pen: Pen, sheet: Worksheet, names: Sequence[str], figures: Sequence[int] = ()) -> None:
    """The titles of columns; `figures`: those over figures, which stand to the right."""
    over = {"": "Predicted", "Precision": f"Precision{pen.words.also}"} if pen.words.predicted else {}
    for column, name in enumerate(names):
        name = over.get(name, name) if not column else name
        pen.text(sheet, HEADER, column, name, "header_figure" if column in figures else "header")


def section(pen: Pen, sheet: Worksheet, row: int, title: str, last: int) -> None:
    for column in range(last + 1):
        pen.value(sheet, row, column, title if column == 0 else None, "section")


_PARTS = ("low end", "high end", "as a share")
"""Lines that say more of the line above them."""


def titled(pen: Pen, sheet: Worksheet, row: int, line: Line, how: int) -> None:
    pen.text(sheet, row, 0, line.title, "part" if line.title.startswith(_PARTS) else "label")
    pen.text(sheet, row, 1, line.unit, "how")
    pen.text(sheet, row, how, line.how, "how")


def columns(sheet: Worksheet, widths: Sequence[float]) -> None:
    for column, width in enumerate(widths):
        sheet.set_column(column, column, width)


def set_up(
    sheet: Worksheet, *, landscape: bool = True, header_row: int | None = None, first_columns: int | None = None
) -> None:
    """For print: A4, the header again on each page, the sheet's name and the page's number below.

    As wide as the page; a sheet too wide for that goes over several, with its `first_columns` again on each.
    """
    if landscape:
        sheet.set_landscape()
    sheet.set_paper(9)
    if first_columns is None:
        sheet.fit_to_pages(1, 0)
    else:
        sheet.repeat_columns(0, first_columns - 1)
        sheet.set_print_scale(70)
    sheet.set_margins(left=0.4, right=0.4, top=0.5, bottom=0.6)
    sheet.set_footer("&L&A&RPage &P of &N")
    sheet.hide_gridlines(2)
    if header_row is not None:
        sheet.repeat_rows(header_row)
