"""The first sheet of cost.xlsx: what people came for, all of it read from the sheets behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xlsxwriter.utility import xl_rowcol_to_cell
from xlsxwriter.worksheet import Worksheet

from harness.analysis.headline import label
from harness.report.run import Run
from harness.report.workbook.inputs import RENT_OR_OWN, Input, checked
from harness.report.workbook.layout import FIRST, HEADER, Layout
from harness.report.workbook.merged import MERGED
from harness.report.workbook.page import columns, head, header, section, set_up, titled
from harness.report.workbook.pen import Pen
from harness.report.workbook.values import Cells

ANSWER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What a card carries inside the service level",
     ("slo_load", "slo_tok_s", "slo_tok_s_lo", "slo_tok_s_hi", "slo_req_s", "slo_p95", "slo_verdict")),
    ("1M tokens at that load",
     ("slo_hour", "slo_only", "slo_only_lo", "slo_only_hi", "slo_input", "slo_output", "slo_blended")),
    ("1,000 correct answers at that load", ("accuracy", "correct", "correct_lo", "correct_hi")),
    ("Accuracy that pays, against the baseline", ("even", "kept", "pays")),
    ("Saving against the baseline, at equal service level", ("saving", "saving_lo", "saving_hi")),
    ("1M tokens at the stated chat load",
     ("chat_load", "chat_safe", "chat_only", "chat_only_lo", "chat_only_hi", "chat_input", "chat_output",
      "chat_blended")),
    ("1M tokens at the stated batch load",
     ("batch_load", "batch_safe", "batch_only", "batch_only_lo", "batch_only_hi", "batch_input", "batch_output",
      "batch_blended")),
    ("Cards for the traffic",
     ("cards", "cards_lo", "cards_hi", "cards_for_load", "bound_by", "used_peak", "used_mean", "tenants")),
    ("What they cost", ("usd_per_day", "usd_per_month", "effective_only", "effective_blended")),
    ("Against the API",
     ("api_day", "api_month", "card_even", "card_even_share", "card_pays", "fleet_even", "fleet_even_share",
      "fleet_pays")),
    ("Memory freed against the baseline", ("freed_gib", "freed_tokens", "freed_users")),
)  # fmt: skip
"""Lines of Workings that the first sheet repeats."""


def write_answer(
    pen: Pen, sheet: Worksheet, run: Run, layout: Layout, cells: Sequence[Cells], inputs: Sequence[Input],
    given: Mapping[str, float | str | None],
) -> None:  # fmt: skip
    """What people came for: a line a figure, a column a precision, all of it read from Workings."""
    head(pen, sheet, run, "What it carries and what it costs")
    count, how = len(layout.precisions), 2 + len(layout.precisions)
    header(pen, sheet, ["", "Unit", *(label(name) for name in layout.precisions), "How it is found"], range(2, how))
    row = FIRST
    section(pen, sheet, row, "With these inputs (change them on the sheet Inputs)", how)
    for cell in inputs:
        if cell.name in _ECHOED:
            row += 1
            empty = '"none"' if cell.name.startswith("slo") else '"not given"'
            value = given[cell.name]
            pen.text(sheet, row, 0, cell.title)
            pen.text(sheet, row, 1, cell.unit, "how")
            pen.formula(sheet, row, 2, f'=IF({cell.name}="",{empty},{cell.name})',
                        empty.strip('"') if value is None else value, cell.form)  # fmt: skip
    row += 1
    pen.text(sheet, row, 0, "All inputs in order")
    in_order = all(checked(cell, given[cell.name]) in ("ok", "not given") for cell in inputs)
    checks = [f'COUNTIF(Inputs!$F${FIRST + 1}:$F$200,"{wrong}")' for wrong in ("outside", "needed")]
    pen.formula(sheet, row, 2, f'=IF({"+".join(checks)}=0,"yes","no: see Inputs")',
                "yes" if in_order else "no: see Inputs", "word")  # fmt: skip
    lines = {line.key: line for part in layout.sections for line in part.lines}
    others = {line.key for part in layout.sections if part.others_only for line in part.lines}
    for title, keys in ANSWER:
        known = [lines[key] for key in keys if key in lines]
        if not known or (not layout.against and known[0].key in others):
            continue
        row += 2
        section(pen, sheet, row, title, how)
        for line in known:
            row += 1
            titled(pen, sheet, row, line, how)
            for at, precision in enumerate(layout.precisions):
                if line.key in others and precision not in layout.against:
                    if line is known[0]:
                        pen.text(sheet, row, 2 + at, layout.standing(precision), "aside")
                    continue
                source = xl_rowcol_to_cell(layout.lines[line.key], 2 + at)
                style = "strong" if line.key in _STRONG else "figure"
                pen.formula(sheet, row, 2 + at, f"=Workings!{source}", cells[at].get(line.key), line.form, style)
    columns(sheet, [46, 11, *[15] * count, 86])
    sheet.freeze_panes(FIRST, 2)
    set_up(sheet, landscape=False, header_row=HEADER)


def write_one_load(pen: Pen, sheet: Worksheet, run: Run, layout: Layout, cells: Sequence[Cells]) -> None:
    """In place of the answer where there was one load: no safe load to find, and what each precision made of it."""
    head(pen, sheet, run, "What each precision made of one load")
    keys = ("precision", "load", "tok_s", "p95", "inside", "hour", "only", "only_lo", "only_hi", "blended")
    forms = {merged.key: merged.form for merged in MERGED} | {line.key: line.form for line in layout.level_lines}
    titles = ["Precision", "Load, req/s", "tok/s", "p95, s", "Surely inside the service level", "An hour, USD",
              "1M output tokens, USD", "low end", "high end", "1M tokens, blended, USD"]  # fmt: skip
    header(pen, sheet, titles, range(1, len(titles)))
    sheet.set_row(HEADER, 32)
    for at, (level, found) in enumerate(zip(layout.levels, cells, strict=True)):
        row = FIRST + at
        pen.text(sheet, row, 0, label(level.precision))
        for column, key in enumerate(keys[1:], start=1):
            source = f"Levels!{xl_rowcol_to_cell(row, layout.level_columns.index(key))}"
            pen.formula(sheet, row, column, f'=IF({source}="","",{source})', found.get(key), forms.get(key, "any"))
    row = FIRST + len(layout.levels) + 1
    pen.text(sheet, row, 0, "One trace at one speed: with no load to vary there is no safe load, and no cards to plan.")
    columns(sheet, [16, 12, 12, 12, 18, *[14] * 5])
    sheet.freeze_panes(FIRST, 1)
    set_up(sheet, header_row=HEADER)


_ECHOED = ("slo_p95_s", "slo_ttft_s", "slo_tpot_s", "slo_goodput", RENT_OR_OWN, "usd_per_hour", "utilisation",
           "users", "requests_per_day")  # fmt: skip
_STRONG = ("slo_load", "slo_only", "saving", "cards", "usd_per_month")
