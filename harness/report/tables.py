"""Records as Markdown tables: figures to three digits, intervals in brackets, empty cells for what is missing.

Whatever came from outside (model, engine, scenario) goes through `escape`. Money is written "USD": a line with two
dollar signs is a formula to some renderers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.analysis.capacity import label
from harness.analysis.levels import precision_order
from harness.records import CapacityLine, CostLine, Knee, SweepPoint

WORDS = ("", "Precision", "Operating point", "Verdict")
"""Columns that hold words."""


def capacity_table(lines: Sequence[CapacityLine], knees: Sequence[Knee]) -> str:
    """What each precision carries at its operating point, beside its knee."""
    header = ("Precision", "Max safe concurrency", "Knee (interval)", "tok/s", "req/s", "p95, s", "Weights, GiB",
              "KV cache, GiB", "KV cache, tokens", "Verdict")  # fmt: skip
    by_precision = {knee.precision: knee for knee in knees}
    rows = [
        (
            named(line.precision),
            "none" if line.users is None else str(line.users),
            _knee_cell(by_precision[line.precision]),
            number(line.tok_s),
            number(line.req_s),
            number(_seconds(line.p95_ms)),
            number(line.weights_gib),
            number(line.kv_cache_gib),
            "" if line.kv_cache_tokens is None else f"{line.kv_cache_tokens:,}",
            line.verdict or "",
        )
        for line in lines
    ]
    return table(header, rows)


def points_table(points: Sequence[SweepPoint]) -> str:
    """Every row as measured, invalid ones too; a column for the repeat where there are several."""
    repeats = len({point.repeat for point in points}) > 1
    header = ["Precision", "Users", "tok/s", "p95, s", "TTFT p50 / p95, ms", "TPOT p50, ms", "req/s"]
    header += ["Requests", "Errors", "Verdict"]
    if repeats:
        header.insert(2, "Repeat")
    order = precision_order(points)
    rows = []
    for point in sorted(points, key=lambda point: (order.index(point.precision), point.conc, point.repeat)):
        both = (number(point.ttft_p50_ms), number(point.ttft_p95_ms))
        row = [
            named(point.precision),
            str(point.conc),
            interval(point.tok_s, point.tok_s_lo, point.tok_s_hi),
            interval(_seconds(point.p95_ms), _seconds(point.p95_ms_lo), _seconds(point.p95_ms_hi)),
            " / ".join(both) if any(both) else "",
            number(point.tpot_p50_ms),
            number(point.req_s),
            str(point.requests),
            str(point.errors),
            point.verdict + (f": {reasons(point)}" if point.verdict_reasons else ""),
        ]
        if repeats:
            row.insert(2, str(point.repeat))
        rows.append(row)
    return table(header, rows)


def cost_table(costs: Sequence[CostLine]) -> str:
    """Prices, the operating point of each precision in bold."""
    header = ("Precision", "Operating point", "Users", "tok/s", "USD/1M output tokens")
    rows = [
        (
            named(line.precision),
            f"**{line.operating_point}**" if "tested" in line.operating_point else line.operating_point,
            "none" if line.conc is None else str(line.conc),
            number(line.tok_s),
            interval(line.usd_per_1m_tokens, line.usd_per_1m_tokens_lo, line.usd_per_1m_tokens_hi),
        )
        for line in costs
    ]
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, cells taken as they are; columns of words to the left, of numbers to the right."""
    marks = ["---" if name in WORDS else "---:" for name in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


def number(value: float | None) -> str:
    """Three significant digits, thousands separated, empty for missing: 1,234  56.7  8.90  0.120."""
    if value is None:
        return ""
    if abs(value) < 1:
        return f"{value:#.3g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A figure and its interval: 2.41 [2.30–2.55]."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}–{number(high)}]"


def escape(text: object) -> str:
    """Text from outside as Markdown that shows it literally, on one line, inside a table too."""
    plain = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|~$#])", r"\\\1", plain)


def named(precision: str) -> str:
    """A precision's name for people; it may be the user's own (`--precisions NAME=PATH`)."""
    return escape(label(precision))


def reasons(point: SweepPoint) -> str:
    """Why a row is suspect or invalid, in words."""
    return ", ".join(escape(reason.replace("_", " ")) for reason in point.verdict_reasons)


def _knee_cell(knee: Knee) -> str:
    if knee.beyond_range:
        return "no knee in range"
    if knee.cross is None:
        return "never inside"
    high = "open" if knee.cross_hi is None else f"{knee.cross_hi:.0f}"
    return f"{knee.cross:.1f} [{knee.cross_lo:.0f}–{high}]"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
