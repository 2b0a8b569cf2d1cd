"""Native charts over Levels and Workings: they move when an input does. Colours are those of the figures."""

from __future__ import annotations

import math
from typing import Any

from xlsxwriter.utility import xl_range_abs
from xlsxwriter.worksheet import Worksheet

from harness.analysis.levels import load
from harness.report.plots import STYLES
from harness.report.run import Run
from harness.report.workbook.layout import HEADER, Layout
from harness.report.workbook.page import head, set_up
from harness.report.workbook.pen import FAINT, Pen
from harness.slo import Slo

MARKERS = {"o": "circle", "s": "square", "^": "triangle", "D": "diamond", "v": "long_dash", "P": "plus", "X": "x"}
LIMIT = "#B42318"
WIDTH, HEIGHT = 620, 340
_ROWS, _COLUMNS = 18, 10
"""Cells that a chart takes: of 20 px by 64 px, with a little room."""
_LIMITED = (("p95", "p95 latency", "s"), ("ttft", "TTFT, p95", "s"), ("tpot", "TPOT, p95", "s"))


def write_charts(pen: Pen, sheet: Worksheet, run: Run, layout: Layout) -> None:
    """tok/s, what the service level limits with its line, and the price over the load; safe load, price and spend."""
    banded = " Bars on a line: its 95 % error band, from validation." if run.predicted else ""
    head(pen, sheet, run, "Charts", f"They follow the inputs.{banded}")
    ends = _limit_lines(pen, sheet, run.slo, layout)
    drawn = [("tok_s", "Output tokens a second", "tok/s")]
    drawn += [limited for limited in _LIMITED if limited[0] == "p95" or limited[0] in ends]
    drawn += [("only", "USD for 1M output tokens, the whole hour on them", "USD")]
    over = [_over_load(pen, layout, *each, ends.get(each[0])) for each in drawn if layout.levels]
    bars = [
        _bars(pen, layout, ("slo_load",), "Safe load of a card", layout.unit, "General"),
        _bars(pen, layout, ("slo_only",), "USD for 1M output tokens at the safe load", "USD", "0.000"),
        _bars(pen, layout, ("usd_per_month", "api_month"), "Spend a month, and the API's for the same traffic", "USD",
              "#,##0"),
    ]  # fmt: skip
    for at, chart in enumerate((*over, *bars)):
        sheet.insert_chart(HEADER + (at // 2) * _ROWS, (at % 2) * _COLUMNS, chart)
    last = HEADER + ((len(over) + len(bars) + 1) // 2) * _ROWS
    sheet.print_area(0, 0, last, 2 * _COLUMNS - 1)
    set_up(sheet, landscape=False)


def _limit_lines(pen: Pen, sheet: Worksheet, slo: Slo, layout: Layout) -> dict[str, tuple[int, int]]:
    """The two ends of each limit's line, beside the charts: (row, column) of the first. They read the input."""
    column, row = 2 * _COLUMNS + 1, HEADER
    limits = (("p95", "p95", slo.p95_s), ("ttft", "TTFT", slo.ttft_s), ("tpot", "TPOT", slo.tpot_s))
    loads = sorted({load(level) for level in layout.levels})
    found: dict[str, tuple[int, int]] = {}
    if slo.goodput is not None or not loads:
        return found
    for key, name, limit in limits:
        if limit is not None:
            pen.text(sheet, row, column, "Load", "how")
            pen.text(sheet, row, column + 1, f"{name} limit, s", "how")
            for at, end in enumerate((loads[0], loads[-1])):
                pen.value(sheet, row + 1 + at, column, end)
                pen.formula(sheet, row + 1 + at, column + 1, f"=slo_{key}_s", limit)
            found[key] = row, column
            row += 4
    return found


def _over_load(pen: Pen, layout: Layout, key: str, title: str, unit: str, limit: tuple[int, int] | None = None) -> Any:
    """A line for each precision over the load, which grows by factors: its axis is logarithmic."""
    chart = pen.book.add_chart({"type": "scatter", "subtype": "straight_with_markers"})
    column, loads = layout.level_columns.index(key), layout.level_columns.index("load")
    for at, precision in enumerate(layout.precisions):
        block = layout.block(precision)
        if block is not None:
            colour, marker = STYLES[at % len(STYLES)]
            up, down = (_column(layout, f"{key}_{way}", block) for way in ("up", "down"))
            chart.add_series({
                "name": ["Answer", HEADER, 2 + at],
                "categories": ["Levels", block[0], loads, block[1], loads],
                "values": ["Levels", block[0], column, block[1], column],
                "line": {"color": colour, "width": 2.25},
                "marker": {"type": MARKERS[marker], "size": 7, "fill": {"color": colour}, "border": {"color": colour}},
                "y_error_bars": {"type": "custom", "plus_values": up, "minus_values": down,
                                 "line": {"color": colour, "width": 1}},
            })  # fmt: skip
    if limit is not None:
        row, first = limit
        chart.add_series({
            "name": ["Charts", row, first + 1],
            "categories": ["Charts", row + 1, first, row + 2, first],
            "values": ["Charts", row + 1, first + 1, row + 2, first + 1],
            "line": {"color": LIMIT, "width": 1.75, "dash_type": "dash"},
            "marker": {"type": "none"},
        })  # fmt: skip
    axis = {"name": "concurrent users" if layout.closed else "requests sent a second", **_QUIET}
    least = min((load(level) for level in layout.levels), default=0.0)
    if least > 0:
        axis |= {"name": f"{axis['name']} (log scale)", "log_base": 2, "min": 2.0 ** math.floor(math.log2(least))}
    chart.set_x_axis(axis)
    return _finished(chart, pen.words.titled(title), unit)


def _column(layout: Layout, key: str, block: tuple[int, int]) -> str:
    return f"=Levels!{xl_range_abs(block[0], at := layout.level_columns.index(key), block[1], at)}"


def _bars(pen: Pen, layout: Layout, keys: tuple[str, ...], title: str, unit: str, form: str) -> Any:
    """A line of Workings as a bar for each precision, in its colour; of several lines, each in a colour of its own."""
    chart = pen.book.add_chart({"type": "column"})
    last = 1 + len(layout.precisions)
    colours = [{"fill": {"color": STYLES[at % len(STYLES)][0]}} for at in range(len(layout.precisions))]
    for key, grey in zip(keys, ("#475467", "#C3CBD5"), strict=False):
        row = layout.lines[key]
        chart.add_series({
            "name": ["Workings", row, 0],
            "categories": ["Workings", HEADER, 2, HEADER, last],
            "values": ["Workings", row, 2, row, last],
            "gap": 80,
            "data_labels": {"value": True, "num_format": form},
            **({"points": colours} if len(keys) == 1 else {"fill": {"color": grey}}),
        })  # fmt: skip
    chart.set_x_axis(_QUIET)
    return _finished(chart, pen.words.titled(title), unit, legend=len(keys) > 1)


_QUIET: dict[str, Any] = {"num_font": {"color": FAINT}, "name_font": {"color": FAINT, "bold": False, "size": 9},
          "major_gridlines": {"visible": False}}  # fmt: skip


def _finished(chart: Any, title: str, unit: str, legend: bool = True) -> Any:
    chart.set_title({"name": title, "name_font": {"size": 12, "bold": True}, "overlay": False})
    grid = {"major_gridlines": {"visible": True, "line": {"color": "#E4E7EC", "width": 0.75}}}
    chart.set_y_axis({**_QUIET, **grid, "name": unit, "min": 0, "line": {"none": True}})
    chart.set_legend({"position": "bottom"} if legend else {"none": True})
    chart.set_size({"width": WIDTH, "height": HEIGHT})
    chart.show_blanks_as("gap")
    return chart
