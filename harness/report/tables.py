"""Records as Markdown tables: figures to three digits, intervals in brackets, empty cells for what is missing.

Whatever came from outside (model, engine, scenario) goes through `escape`. Money is written "USD": a line with two
dollar signs is a formula to some renderers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.analysis.compare import METRICS
from harness.analysis.correct import CorrectLine
from harness.analysis.headline import label
from harness.analysis.knee import safe_load
from harness.analysis.levels import RATE, USERS, axis, load, precision_order, shown
from harness.records import CapacityLine, CostLine, Knee, Ratio, SweepPoint

WORDS = ("", "Precision", "Operating point", "Verdict", "Pairs")
"""Columns that hold words."""
COMPARED = {"tok_s": "tok/s", "p95_ms": "p95", "ttft_p50_ms": "TTFT p50", "tpot_p50_ms": "TPOT p50"}
"""How the metrics of a comparison are called."""


def capacity_table(points: Sequence[SweepPoint], lines: Sequence[CapacityLine], knees: Sequence[Knee]) -> str:
    """What each precision carries at its operating point, beside its knee."""
    unit = axis(points)
    most = "Max safe concurrency" if unit is USERS else f"Max safe rate, {unit.unit}"
    header = ("Precision", most, "Knee (interval)", "tok/s", _completed(points), "p95, s", "Weights, GiB",
              "KV cache, GiB", "KV cache, tokens", "Verdict")  # fmt: skip
    by_precision = {knee.precision: knee for knee in knees}
    rows = []
    for line in lines:
        safe = safe_load(by_precision[line.precision])
        rows.append((
            named(line.precision),
            "none" if safe is None else f"{safe:g}",
            _knee_cell(by_precision[line.precision]),
            number(line.tok_s),
            number(line.req_s),
            number(_seconds(line.p95_ms)),
            number(line.weights_gib),
            number(line.kv_cache_gib),
            "" if line.kv_cache_tokens is None else f"{line.kv_cache_tokens:,}",
            line.verdict or "",
        ))  # fmt: skip
    return table(header, rows)


def points_table(points: Sequence[SweepPoint]) -> str:
    """Every row as measured, invalid ones too; columns for repeats, attempts and power where there is any to show."""
    order = precision_order(points)
    rows = sorted(points, key=lambda point: (order.index(point.precision), load(point), point.repeat, point.attempt))
    columns: dict[str, list[str]] = {"Precision": [named(point.precision) for point in rows]}
    columns[_load_name(points)] = [shown(load(point)) for point in rows]
    if len({point.repeat for point in points}) > 1:
        columns["Repeat"] = [str(point.repeat) for point in rows]
    if any(point.attempt > 1 for point in points):
        columns["Attempt"] = [str(point.attempt) for point in rows]
    columns |= {
        "tok/s": [interval(point.tok_s, point.tok_s_lo, point.tok_s_hi) for point in rows],
        "p95, s": [interval(*map(_seconds, (point.p95_ms, point.p95_ms_lo, point.p95_ms_hi))) for point in rows],
        "TTFT p50 / p95, ms": [_both(point.ttft_p50_ms, point.ttft_p95_ms) for point in rows],
        "TPOT p50, ms": [number(point.tpot_p50_ms) for point in rows],
        _completed(points): [number(point.req_s) for point in rows],
    }
    if any(point.power_w is not None for point in points):
        columns["Power, W"] = [number(point.power_w) for point in rows]
    if any(point.energy_j_per_token is not None for point in points):
        columns["J/token"] = [number(point.energy_j_per_token) for point in rows]
    columns |= {
        "Requests": [str(point.requests) for point in rows],
        "Errors": [str(point.errors) for point in rows],
        "Verdict": [point.verdict + (f": {reasons(point)}" if point.verdict_reasons else "") for point in rows],
    }
    return table(tuple(columns), list(zip(*columns.values(), strict=True)))


def comparison_table(points: Sequence[SweepPoint], ratios: Sequence[Ratio]) -> str:
    """The paired ratios, a row for each precision and load; a ratio that may be 1 says that it is undecided."""
    rows: dict[tuple[str, float], dict[str, Ratio]] = {}
    for ratio in ratios:
        rows.setdefault((ratio.precision, _load_of(ratio)), {})[ratio.metric] = ratio
    header = ("Precision", _load_name(points), *(COMPARED[metric] for metric in METRICS), "Pairs")
    body = []
    for (precision, at), found in rows.items():
        pairs = {basis: max((r.pairs for r in found.values() if r.basis == basis), default=0)
                 for basis in ("sessions", "requests")}  # fmt: skip
        cells = (_ratio_cell(found[metric]) if metric in found else "" for metric in METRICS)
        words = ", ".join(f"{count} {basis}" for basis, count in pairs.items() if count)
        words = words or "none: error bands" * any(ratio.basis == "bands" for ratio in found.values())
        body.append((named(precision), shown(at), *cells, words))
    return table(header, body)


def throughput_lines(ratios: Sequence[Ratio]) -> list[str]:
    """For a terminal, a line for each precision: "AWQ / BF16 tok/s: 1 user 1.31× [1.20–1.43]; 8 users ..."."""
    lines: dict[str, list[str]] = {}
    for ratio in ratios:
        if ratio.metric == "tok_s" and ratio.ratio is not None:
            unit = USERS if ratio.rate_rps is None else RATE
            words = f"{unit.amount(_load_of(ratio))} {_ratio_cell(ratio)}"
            lines.setdefault(f"{label(ratio.precision)} / {label(ratio.baseline)} tok/s", []).append(words)
    return [f"{name}: {'; '.join(found)}" for name, found in lines.items()]


def cost_table(points: Sequence[SweepPoint], costs: Sequence[CostLine], correct: Sequence[CorrectLine] = ()) -> str:
    """Prices, the operating point of each precision in bold; it names its load itself where that is a rate.

    `correct`: what 1,000 correct answers cost there, a column where anybody knows.
    """
    columns = {
        "Precision": [named(line.precision) for line in costs],
        "Operating point": [_bold_operating(line.operating_point) for line in costs],
        "Users": ["none" if line.conc is None else str(line.conc) for line in costs],
        "tok/s": [number(line.tok_s) for line in costs],
        "USD/1M output tokens": [
            interval(line.usd_per_1m_tokens, line.usd_per_1m_tokens_lo, line.usd_per_1m_tokens_hi) for line in costs
        ],
    }
    if any(line.usd_per_1000_correct is not None for line in correct):
        prices = {line.precision: correct_price(line) for line in correct}
        columns["USD/1,000 correct answers"] = [
            prices.get(line.precision, "") if "tested" in line.operating_point else "" for line in costs
        ]
    if axis(points) is RATE:
        del columns["Users"]
    return table(tuple(columns), list(zip(*columns.values(), strict=True)))


def correct_price(line: CorrectLine) -> str:
    """USD for 1,000 correct answers, with the interval that its accuracy gives it."""
    if line.usd_per_1000_correct is not None and line.usd_per_1000_correct_hi is None:
        return f"{number(line.usd_per_1000_correct)} [{number(line.usd_per_1000_correct_lo)} or more]"
    return interval(line.usd_per_1000_correct, line.usd_per_1000_correct_lo, line.usd_per_1000_correct_hi)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = WORDS) -> str:
    """A Markdown table, cells taken as they are; columns of words to the left, of numbers to the right."""
    marks = ["---" if name in words else "---:" for name in header]
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
    return re.sub(r"([\\`*_\[\]<>|~$#&])", r"\\\1", plain)


def named(precision: str) -> str:
    """A precision's name for people; it may be the user's own (`--precisions NAME=PATH`)."""
    return escape(label(precision))


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def reasons(point: SweepPoint) -> str:
    """Why a row is suspect or invalid, in words."""
    return ", ".join(escape(reason.replace("_", " ")) for reason in point.verdict_reasons)


def _load_name(points: Sequence[SweepPoint]) -> str:
    return "Users" if axis(points) is USERS else RATE.unit


def _completed(points: Sequence[SweepPoint]) -> str:
    """Requests answered a second: in an open loop "req/s" is what was asked."""
    return "req/s" if axis(points) is USERS else "completed/s"


def _load_of(ratio: Ratio) -> float:
    return ratio.conc if ratio.rate_rps is None else ratio.rate_rps


def _ratio_cell(ratio: Ratio) -> str:
    """1.31× [1.20–1.43]; what may be 1 is undecided."""
    if ratio.ratio is None:
        return ""
    if ratio.ratio_lo is None or ratio.ratio_hi is None:
        return f"{ratio.ratio:.2f}×, no interval"
    undecided = ", undecided" if ratio.ratio_lo <= 1 <= ratio.ratio_hi else ""
    return f"{ratio.ratio:.2f}× [{ratio.ratio_lo:.2f}–{ratio.ratio_hi:.2f}]{undecided}"


def _bold_operating(operating_point: str) -> str:
    return f"**{operating_point}**" if "tested" in operating_point else operating_point


def _both(one: float | None, two: float | None) -> str:
    words = number(one), number(two)
    return " / ".join(words) if any(words) else ""


def _knee_cell(knee: Knee) -> str:
    if knee.beyond_range:
        return "no knee in range"
    if knee.cross is None:
        return "never inside"
    high = "open" if knee.cross_hi is None else f"{knee.cross_hi:g}"
    return f"{knee.cross:.{1 if knee.cross >= 10 else 2}f} [{knee.cross_lo:g}–{high}]"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
