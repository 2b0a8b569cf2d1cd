"""A level is one precision at one concurrency: its repeats merged into a row that can be read like any other.

Invalid repeats are left out, not averaged in; a level with none left does not exist, and callers that owe it to the
reader (report, headline) name it from the raw points. Medians, because one disturbed session out of three should
move nothing. The interval over repeats is the run-to-run one:

    2..9 repeats    exp(mean(ln x) ± t(0.975, n-1) · s / √n)       few and positive: logs, and t knows how few
    from 10         95 % percentile bootstrap of the median        enough to drop the assumption

A single repeat keeps its own interval, a bootstrap over requests that knows nothing of run-to-run spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from harness.records import SweepPoint

BASELINE = "bf16"

_WITH_INTERVAL = ("tok_s", "p95_ms", "p99_ms")
_MEDIANS = (
    "vram_gib", "usd_per_1m_tokens", "req_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "itl_p99_ms",
    "p50_ms", "weights_gib", "kv_cache_gib", "kv_cache_tokens", "other_gib", "input_tokens_mean", "output_tokens_mean",
    "window_s", "duration_s",
)  # fmt: skip
_WORST = (
    "kv_usage_peak", "preemptions", "prefix_hit_share", "running_peak", "waiting_peak", "send_lag_p99_ms",
    "loop_lag_p99_ms", "coalesced_share",
)  # fmt: skip
_WHOLE = ("kv_cache_tokens",)


def precision_order(points: Sequence[SweepPoint]) -> list[str]:
    """The precisions of a run, the baseline (BF16 where there is one, else the first) in front."""
    seen = list(dict.fromkeys(point.precision for point in points))
    return sorted(seen, key=lambda precision: precision.lower() != BASELINE)


def levels(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """One row for each (precision, concurrency) that has a repeat not judged invalid; ordered by both."""
    order = precision_order(points)
    cells: dict[tuple[int, int], list[SweepPoint]] = {}
    for point in points:
        if point.verdict != "invalid":
            cells.setdefault((order.index(point.precision), point.conc), []).append(point)
    return [_merge(cells[key]) for key in sorted(cells)]


def _merge(repeats: Sequence[SweepPoint]) -> SweepPoint:
    if len(repeats) == 1:
        return repeats[0]
    merged: dict[str, Any] = {}
    for name in _WITH_INTERVAL:
        values = _present(repeats, name)
        merged[name] = median(values) if values else None
        merged[f"{name}_lo"], merged[f"{name}_hi"] = _interval(repeats, name)
    for name in _MEDIANS:
        values = _present(repeats, name)
        merged[name] = median(values) if values else None
        if values and name in _WHOLE:
            merged[name] = round(merged[name])
    for name in _WORST:
        merged[name] = max(_present(repeats, name), default=None)
    return replace(
        repeats[0],
        **merged,
        requests=sum(point.requests for point in repeats),
        errors=sum(point.errors for point in repeats),
        verdict="suspect" if any(point.verdict == "suspect" for point in repeats) else "valid",
        verdict_reasons=tuple(dict.fromkeys(reason for point in repeats for reason in point.verdict_reasons)),
    )


def _present(repeats: Sequence[SweepPoint], name: str) -> list[Any]:
    return [value for point in repeats if (value := getattr(point, name)) is not None]


def _interval(repeats: Sequence[SweepPoint], name: str) -> tuple[float | None, float | None]:
    """Run-to-run interval of one column; that of the only repeat which has the figure, when there is just one."""
    having = [point for point in repeats if getattr(point, name) is not None]
    if len(having) == 1:
        return getattr(having[0], f"{name}_lo"), getattr(having[0], f"{name}_hi")
    values = np.array([getattr(point, name) for point in having], dtype=float)
    if not len(values) or values.min() <= 0:
        return None, None
    if len(values) >= 10:
        draws = np.random.default_rng(0).choice(values, size=(4000, len(values)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        return float(low), float(high)
    logs = np.log(values)
    half = float(student_t.ppf(0.975, len(logs) - 1)) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    middle = float(np.median(values))  # a skewed handful can push the mean's interval past its own median
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    return min(float(low), middle), max(float(high), middle)
