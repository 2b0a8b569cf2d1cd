"""The sheets behind the answer: Inputs, Quality, Workings, Levels, Points, Prices, Notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xlsxwriter.worksheet import Worksheet

from harness.analysis.correct import CorrectLine
from harness.analysis.headline import label
from harness.assumptions import Assumptions
from harness.prices import Prices
from harness.report.run import Run
from harness.report.workbook.answers import COUNTS
from harness.report.workbook.inputs import RENT_OR_OWN, Input, checked, empty
from harness.report.workbook.layout import FIRST, HEADER, NAMED, POINT_COLUMNS, ROWS_OWN, Layout
from harness.report.workbook.merged import MERGED, formula
from harness.report.workbook.page import columns, head, header, section, set_up, titled
from harness.report.workbook.pen import Pen, plain
from harness.report.workbook.values import Cells


def write_inputs(
    pen: Pen, sheet: Worksheet, run: Run, groups: Sequence[tuple[str, Sequence[Input]]],
    given: Mapping[str, float | str | None], assumptions: Assumptions,
) -> None:  # fmt: skip
    """The cells that may be changed, each with its unit, ends, meaning and name, and whether it is in order."""
    head(pen, sheet, run, "Inputs", "Change what is yellow, and every sheet follows.")
    header(pen, sheet, ["What", "Value", "Unit", "From", "To", "Check", "Meaning", "Name in formulas"], (1, 3, 4))
    row = HEADER
    for title, cells in groups:
        row += 1
        of_api = assumptions.api_name if cells[0].name.startswith("api_") else ""
        section(pen, sheet, row, f"{title}: {of_api}" if of_api else title, 7)
        for cell in cells:
            row += 1
            pen.text(sheet, row, 0, cell.title)
            if cell.name == RENT_OR_OWN:
                sheet.write_string(row, 1, str(given[cell.name]), pen.format("input"))
            else:
                pen.value(sheet, row, 1, given[cell.name], "input", cell.form)
            pen.text(sheet, row, 2, cell.unit, "how")
            for column, end in enumerate(() if cell.name == RENT_OR_OWN else cell.ends, start=3):
                pen.value(sheet, row, column, end, form="count" if end >= 1000 else "any")
            pen.text(sheet, row, 6, cell.meaning)
            pen.text(sheet, row, 7, cell.name, "how")
            _validate(sheet, row, cell)
            pen.formula(sheet, row, 5, _check(cell, row), checked(cell, given[cell.name]), "word", "how")
            pen.book.define_name(cell.name, f"=Inputs!$B${row + 1}")
        row += 1
    for at, source in enumerate(assumptions.sources, start=row + 1):
        pen.text(sheet, at, 0, f"As it was: {source}", "lead")
    for wrong in ("outside", "needed"):
        sheet.conditional_format(FIRST, 5, row, 5, {"type": "cell", "criteria": "==", "value": f'"{wrong}"',
                                                    "format": pen.format("wrong")})  # fmt: skip
    columns(sheet, [30, 14, 11, 12, 18, 12, 96, 24])
    sheet.freeze_panes(FIRST, 2)
    set_up(sheet, header_row=HEADER)


def _validate(sheet: Worksheet, row: int, cell: Input) -> None:
    if cell.name == RENT_OR_OWN:
        sheet.data_validation(row, 1, row, 1, {"validate": "list", "source": ["rent", "own"], "ignore_blank": False})
        return
    low, high = cell.ends
    sheet.data_validation(row, 1, row, 1, {
        "validate": "integer" if cell.whole else "decimal",
        "criteria": "between",
        "minimum": f"=$D${row + 1}",  # not as figures: Python writes 1e-06, and a formula knows no small e
        "maximum": f"=$E${row + 1}",
        "ignore_blank": not cell.needed,
        "error_title": cell.title,
        "error_message": f"{'A whole number' if cell.whole else 'A number'} from {low:g} to {high:g}, in {cell.unit}.",
    })  # fmt: skip


def _check(cell: Input, row: int) -> str:
    """Pasting steps over a cell's validation; this formula does not."""
    at = f"B{row + 1}"
    if cell.name == RENT_OR_OWN:
        return f'=IF({at}="","needed",IF(OR({at}="rent",{at}="own"),"ok","outside"))'
    whole = f",{at}=INT({at})" if cell.whole else ""
    inside = f'IF(AND({at}>=D{row + 1},{at}<=E{row + 1}{whole}),"ok","outside")'
    return f'=IF({at}="","{empty(cell)}",IF(ISNUMBER({at}),{inside},"outside"))'


def write_quality(pen: Pen, sheet: Worksheet, run: Run, layout: Layout, correct: Mapping[str, CorrectLine]) -> None:
    """How many answers of each precision were judged, and how many were right: inputs, of which a price is made."""
    head(pen, sheet, run, "Quality", "Type over what is yellow with the counts of your own prompts.")
    last = 2 + len(layout.precisions)
    header(pen, sheet, ["", "Unit", *(label(name) for name in layout.precisions), "What it is"], range(2, last))
    told = (
        ("Right answers", "of those judged, on all prompts that both answered"),
        ("Judged answers", "failures.md says which could not be"),
    )
    for at, (key, (title, how)) in enumerate(zip(COUNTS, told, strict=True), start=FIRST):
        pen.text(sheet, at, 0, title)
        pen.text(sheet, at, 1, "answers", "how")
        for column, name in enumerate(layout.precisions, start=2):
            line = correct.get(name)
            value = None if line is None else line.right if key == "right" else line.items
            pen.value(sheet, at, column, value, "input", "count")
        pen.text(sheet, at, last, how, "how")
    columns(sheet, [46, 11, *[15] * len(layout.precisions), 86])
    sheet.freeze_panes(FIRST, 2)
    set_up(sheet, header_row=HEADER)


def write_workings(pen: Pen, sheet: Worksheet, run: Run, layout: Layout, cells: Sequence[Cells]) -> None:
    """Every step from Levels and Inputs to Answer."""
    head(pen, sheet, run, "Workings", "Every step from Levels and Inputs to Answer.")
    how = 2 + len(layout.precisions)
    header(pen, sheet, ["", "Unit", *(label(name) for name in layout.precisions), "How it is found"], range(2, how))
    named = [layout.workings_cells(precision) for precision in layout.precisions]
    for part in layout.sections:
        section(pen, sheet, layout.lines[part.lines[0].key] - 1, part.title, how)
        for line in part.lines:
            row = layout.lines[line.key]
            titled(pen, sheet, row, line, how)
            for at, (precision, names) in enumerate(zip(layout.precisions, named, strict=True)):
                if precision in layout.against or not part.others_only:
                    worked = line.formula.format_map(names)
                    pen.formula(sheet, row, 2 + at, worked, cells[at].get(line.key), line.form)
    columns(sheet, [46, 11, *[15] * len(layout.precisions), 86])
    sheet.freeze_panes(FIRST, 2)
    set_up(sheet, header_row=HEADER)


def write_levels(pen: Pen, sheet: Worksheet, run: Run, layout: Layout, cells: Sequence[Cells]) -> None:
    """A row for each precision and load: its rows merged, held against the service level, and priced."""
    head(
        pen, sheet, run, "Levels", "Dark columns merge the rows of a precision under one load; gold ones follow Inputs."
    )
    merged = {column.key: column for column in MERGED}
    lines = {line.key: line for line in layout.level_lines}
    titles = _LEVEL_TITLES | {key: column.title for key, column in merged.items()}
    titles |= {line.key: f"{line.title}{f', {line.unit}' if line.unit else ''}" for line in layout.level_lines}
    for column, key in enumerate(layout.level_columns):
        title = titles.get(key) or f"tok/s, session {key.rpartition('_')[2]}"
        title += pen.words.also if key == "precision" else ""
        style = "header_live" if key in lines else "header" if key == "precision" else "header_figure"
        pen.text(sheet, HEADER, column, title, style)
    sheet.set_row(HEADER, 62)
    for at, (level, found, behind) in enumerate(zip(layout.levels, cells, layout.behind, strict=True)):
        row = FIRST + at
        names = layout.level_cells(row)
        for column, key in enumerate(layout.level_columns):
            value = found.get(key)
            if key == "precision":
                pen.text(sheet, row, column, label(level.precision))
            elif key == "rows":
                pen.value(sheet, row, column, len(behind))
            elif key in lines:
                pen.formula(sheet, row, column, lines[key].formula.format_map(names), value, lines[key].form)
            else:
                form = merged[key].form if key in merged else _OWN_FORMS.get(key, "rate")
                worked = _from_points(layout, key, behind)
                if worked is None or value is None:
                    pen.value(sheet, row, column, value, form=form)
                else:
                    pen.formula(sheet, row, column, worked, value, form)
    if layout.levels:
        inside, last = layout.level_columns.index("inside"), FIRST + len(layout.levels) - 1
        for word, style in (("yes", "right"), ("no", "wrong")):
            sheet.conditional_format(FIRST, inside, last, inside, {"type": "cell", "criteria": "==",
                                     "value": f'"{word}"', "format": pen.format(style)})  # fmt: skip
    columns(sheet, [14, 8, 9, 8, *[11.5] * (len(layout.level_columns) - len(NAMED))])
    sheet.freeze_panes(FIRST, len(NAMED))
    set_up(sheet, header_row=HEADER, first_columns=len(NAMED))


_LEVEL_TITLES = {
    "precision": "Precision", "rows": "Rows merged", "verdict": "Verdict", "load": "Load",
    "row_usd": "USD an hour, as in the row", "row_share": "Share of the hour, as in the row",
}  # fmt: skip
_OWN_FORMS = {"load": "any", "verdict": "word", "row_usd": "price", "row_share": "share"}


def _from_points(layout: Layout, key: str, behind: Sequence[int]) -> str | None:
    """The formula of a column of Levels that reads the raw rows behind it; None: the figure stands as it is."""
    rows = {id(layout.points[at]): at for at in behind}
    first = layout.points[behind[0]]
    if key == "load":
        return f"={layout.point_cell(behind[0], 'conc' if first.rate_rps is None else 'rate_rps')}"
    if key == "verdict":
        each = ",".join(f'{layout.point_cell(at, "verdict")}="suspect"' for at in behind)
        return f'=IF(OR({each}),"suspect","valid")'
    if key in ROWS_OWN:
        return f"={layout.point_cell(behind[0], 'usd_per_hour' if key == 'row_usd' else 'utilisation')}"
    if key.startswith("repeat_"):
        own = [at for at in behind if f"repeat_{layout.points[at].repeat}" == key]
        return f"={layout.point_cell(own[0], 'tok_s')}" if own else None
    column = next(merged for merged in MERGED if merged.key == key)
    return formula(
        column, [layout.points[at] for at in behind], lambda row, name: layout.point_cell(rows[id(row)], name)
    )


def write_points(pen: Pen, sheet: Worksheet, run: Run, layout: Layout) -> None:
    """points.csv as it is, its units in the names of its columns; rows that do not count are struck through."""
    head(pen, sheet, run, "Points", "The rows as measured; those struck through do not count.")
    header(pen, sheet, POINT_COLUMNS, range(1, len(POINT_COLUMNS)))
    sheet.set_row(HEADER, 32)
    counted = {at for behind in layout.behind for at in behind}
    for at, point in enumerate(layout.points):
        style = "figure" if at in counted else "left_out"
        for column, name in enumerate(POINT_COLUMNS):
            if name == "counted":
                value: object = "yes" if at in counted else "no: " + _why(layout, at)
            else:
                value = getattr(point, name)
                value = ", ".join(value) if isinstance(value, tuple) else value
            pen.value(sheet, FIRST + at, column, value, style)
    columns(sheet, [min(24, max(11, len(name) + 2)) for name in POINT_COLUMNS])
    sheet.freeze_panes(FIRST, 3)
    sheet.autofilter(HEADER, 0, FIRST + len(layout.points) - 1, len(POINT_COLUMNS) - 1)
    set_up(sheet, header_row=HEADER, first_columns=3)


def _why(layout: Layout, at: int) -> str:
    return "invalid" if layout.points[at].verdict == "invalid" else "measured again"


def write_prices(pen: Pen, sheet: Worksheet, run: Run, prices: Prices) -> None:
    """The catalogue, to choose from: each price with its day and its source. Nothing here is read by a formula."""
    head(pen, sheet, run, "Prices", "Type those that are yours into Inputs: no formula reads this sheet.")
    header(pen, sheet, ["What", "Name", "From", "USD", "Per", "As of", "Source", "Note"], range(3, 4))
    rows: list[tuple[object, ...]] = [
        (
            "rent",
            rent.name,
            f"{rent.provider}, {rent.kind}",
            rent.usd_per_hour,
            "hour",
            rent.as_of,
            rent.source,
            rent.note,
        )
        for rent in prices.rents
    ]  # fmt: skip
    rows += [("card", buy.name, "", buy.usd, "card", buy.as_of, buy.source, buy.note) for buy in prices.buys]
    rows += [
        ("electricity", tariff.region, "", tariff.usd_per_kwh, "kWh", tariff.as_of, tariff.source, tariff.note)
        for tariff in prices.tariffs
    ]
    for api in prices.apis:
        for what, usd in (("input", api.usd_per_1m_input), ("output", api.usd_per_1m_output)):
            rows.append(("API", api.model, api.provider, usd, f"1M {what} tokens", api.as_of, api.source, api.note))
    for at, row in enumerate(rows):
        for column, value in enumerate(row):
            style, form = ("figure", "price") if column == 3 else ("label", "any")
            pen.value(sheet, FIRST + at, column, value, style, form)
    columns(sheet, [11, 34, 28, 12, 17, 12, 60, 60])
    sheet.freeze_panes(FIRST, 2)
    set_up(sheet, header_row=HEADER)


def write_notes(pen: Pen, sheet: Worksheet, run: Run, notes: Sequence[tuple[str, str]]) -> None:
    """What is what, and where it is from."""
    head(pen, sheet, run, "Notes")
    for at, (term, words) in enumerate(notes):
        pen.text(sheet, FIRST + at, 0, term, "term")
        pen.text(sheet, FIRST + at, 1, words, "wrapped")
        sheet.set_row(FIRST + at, 16 * (1 + len(plain(words)) // 118))  # not every viewer fits the height itself
    columns(sheet, [22, 110])
    set_up(sheet)
