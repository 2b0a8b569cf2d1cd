"""The columns of Levels that merge the raw rows of a level, as analysis/levels.py does, in formulas over Points.

one row            the row's own figure and interval
2..9 rows          median; exp(mean(ln x) ± t(0.975, n-1) · s / √n), never narrower than to the median
from 10            median; an interval that was resampled, which no formula can: the figure stands as it is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.analysis.levels import BOOTSTRAP_FROM
from harness.records import SweepPoint


@dataclass(frozen=True, slots=True)
class Merged:
    """A column of Levels: from which column of points.csv, which end of its interval, and divided by what.

    `judged`: the service level is held against it, so a row without an interval is its own.
    """

    key: str
    title: str
    form: str
    column: str
    end: str = ""
    per: int = 1
    judged: bool = False


def _limited(key: str, title: str, column: str) -> list[Merged]:
    ends = (("", title), ("lo", "low end"), ("hi", "high end"))
    return [
        Merged(key + (f"_{end}" if end else ""), words, "seconds", column, end, 1000, bool(end)) for end, words in ends
    ]


MERGED = (
    Merged("tok_s", "tok/s", "rate", "tok_s"),
    Merged("tok_s_lo", "low end", "rate", "tok_s", "lo"),
    Merged("tok_s_hi", "high end", "rate", "tok_s", "hi"),
    Merged("req_s", "Answered, req/s", "rate", "req_s"),
    *_limited("p95", "p95, s", "p95_ms"),
    *_limited("ttft", "TTFT p95, s", "ttft_p95_ms"),
    *_limited("tpot", "TPOT p95, s", "tpot_p95_ms"),
    Merged("goodput", "Goodput", "share", "goodput"),
    Merged("goodput_lo", "low end", "share", "goodput", "lo", judged=True),
    Merged("input_tokens", "Input tokens of a request", "rate", "input_tokens_mean"),
    Merged("output_tokens", "Output tokens of a request", "rate", "output_tokens_mean"),
    Merged("power", "Power, W", "rate", "power_w"),
)


def formula(merged: Merged, rows: Sequence[SweepPoint], cell: Callable[[SweepPoint, str], str]) -> str | None:
    """The cell's formula; None where it has none: a figure that no row has, or one that was resampled.

    `cell` says where a row's figure stands: Points!$K$7.
    """
    having = [row for row in rows if getattr(row, merged.column) is not None]
    if not having:
        return None
    figures = [cell(row, merged.column) for row in having]
    over = f"/{merged.per}" if merged.per > 1 else ""
    middle = figures[0] if len(figures) == 1 else f"MEDIAN({','.join(figures)})"
    if not merged.end:
        return f"={middle}{over}"
    least, worst = ("MIN", "-") if merged.end == "lo" else ("MAX", "+")
    if len(having) == 1:
        end = f"{merged.column}_{merged.end}"
        known = getattr(having[0], end) is not None
        if not merged.judged:
            return f"={cell(having[0], end)}{over}" if known else None
        return f"={least}({middle},{cell(having[0], end)}){over}" if known else f"={middle}{over}"
    if min(getattr(row, merged.column) for row in having) <= 0:
        return f"={middle}{over}" if merged.judged else None
    if len(having) >= BOOTSTRAP_FROM:
        return None
    logs, count = ",".join(f"LN({figure})" for figure in figures), len(figures)
    half = f"TINV(0.05,{count - 1})*STDEV({logs})/SQRT({count})"
    return f"={least}({middle},EXP(AVERAGE({logs}){worst}{half})){over}"
