"""A level is one precision under one load: its repeats merged into a row that can be read like any other.

A load is a number of users (closed loop) or a rate of requests (open loop); `Axis` holds the words for the two.

Invalid repeats are left out, not averaged in; a level with none left does not exist, and callers that owe it to the
reader (report, headline) name it from the raw points. Medians, because one disturbed session out of three should
move nothing. The interval over repeats is the run-to-run one:

    2..9 repeats    exp(mean(ln x) ± t(0.975, n-1) · s / √n)       few and positive: logs, and t knows how few
    from 10         95 % percentile bootstrap of the median        enough to drop the assumption

A single repeat keeps its own interval, a bootstrap over requests that knows nothing of run-to-run spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from harness import variants
from harness.records import SweepPoint

BOOTSTRAP_FROM = 10
"""Repeats from which an interval needs no assumption about their spread."""

_WITH_INTERVAL = ("tok_s", "p95_ms", "p99_ms", "ttft_p95_ms", "tpot_p95_ms", "goodput")
_MEDIANS = (
    "vram_gib", "usd_per_1m_tokens", "req_s", "ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms",
    "p50_ms", "weights_gib", "kv_cache_gib", "kv_cache_tokens", "other_gib", "input_tokens_mean", "output_tokens_mean",
    "window_s", "duration_s", "chunks_s", "power_w", "energy_j_per_token", "sm_clock_mhz",
)  # fmt: skip
_WORST = (
    "kv_usage_peak", "preemptions", "prefix_hit_share", "running_peak", "waiting_peak", "send_lag_p99_ms",
    "loop_lag_p99_ms", "coalesced_share", "client_processes", "clock_offset_error_ms", "temperature_c_max",
    "throttled_share",
)  # fmt: skip
_FARTHEST = ("counter_gap", "clock_step_ms", "clock_offset_ms")
"""Signed, and 0 is right: the worst is the one farthest from it."""
_WHOLE = ("kv_cache_tokens",)


@dataclass(frozen=True, slots=True)
class Axis:
    """What the load of a run is counted in, with the words that a sentence needs."""

    unit: str
    noun: str
    nouns: str
    what: str

    def amount(self, load: float) -> str:
        """A load that was tested: "1 user", "16 users", "2.5 req/s"."""
        return "1 user" if self is USERS and load == 1 else f"{shown(load)} {self.unit}"

    def about(self, load: float) -> str:
        """An estimate between tested loads: 5.7 and 11 users, 5.72 and 11.3 req/s, for rates lie closer together."""
        digits = 2 if self is USERS else 3
        return f"{load:.{digits}g}" if load < 10 ** (digits - 1) else f"{load:.0f}"


USERS = Axis("users", "concurrency", "concurrencies", "users")
RATE = Axis("req/s", "rate", "rates", "requests per second")


def axis(points: Sequence[SweepPoint]) -> Axis:
    """Users, or requests a second where the run is an open loop; a run is one of the two."""
    return USERS if all(point.arrivals == "closed" and point.rate_rps is None for point in points) else RATE


def load(point: SweepPoint) -> float:
    """How hard a row was loaded, in the unit of its axis."""
    return point.conc if point.rate_rps is None else point.rate_rps


def shown(load: float) -> str:
    """A tested load as a figure: 16, 0.125; a trace's mean rate has no end, and is cut to 2.487."""
    return f"{load:g}" if load == int(load) else f"{load:.4g}"


def one_trace(points: Sequence[SweepPoint]) -> bool:
    """A recorded trace, replayed at one speed: a table of figures, with no load to vary and so no knee."""
    return len({load(point) for point in points}) == 1 and all(point.arrivals == "trace" for point in points)


def latest(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The last attempt at each cell: a row that was measured again counts no longer, whatever it said."""
    rows: dict[tuple[str, int, float | None, int], SweepPoint] = {}
    for point in points:
        key = point.precision, point.conc, point.rate_rps, point.repeat
        if key not in rows or point.attempt >= rows[key].attempt:
            rows[key] = point
    return list(rows.values())


def precision_order(points: Sequence[SweepPoint]) -> list[str]:
    """The precisions of a run, the baseline (BF16 where there is one, else the first) in front, settings together."""
    return variants.ordered([point.precision for point in points])


def compared(points: Sequence[SweepPoint]) -> dict[str, str]:
    """Each precision that is compared -> its baseline, which is served with the same engine arguments."""
    return variants.baselines([point.precision for point in points])


def levels(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """One row for each (precision, load) that has a repeat not judged invalid; ordered by both."""
    order = precision_order(points)
    cells: dict[tuple[int, int, float], list[SweepPoint]] = {}
    for point in latest(points):
        if point.verdict != "invalid":
            key = order.index(point.precision), point.conc, point.rate_rps or 0.0
            cells.setdefault(key, []).append(point)
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
    for name in _FARTHEST:
        merged[name] = max(_present(repeats, name), key=abs, default=None)
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
    if len(values) >= BOOTSTRAP_FROM:
        draws = np.random.default_rng(0).choice(values, size=(4000, len(values)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        return float(low), float(high)
    logs = np.log(values)
    half = float(student_t.ppf(0.975, len(logs) - 1)) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    middle = float(np.median(values))  # a skewed handful can push the mean's interval past its own median
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    return min(float(low), middle), max(float(high), middle)
