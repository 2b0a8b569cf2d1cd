"""Where a precision leaves the service level: the crossing of p95 over concurrency, how sure it is, and why.

      p95 (log)                          ⊤
        │                            ⊤   ●   first level surely outside:  cross_hi
    SLO ┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─│╱─ ⊥ ─
        │               ⊤         ╱  ●       in doubt: its interval holds the SLO
        │   ⊤           ●  ╱         ⊥
        │   ●           ⊥                    last level surely inside:    cross_lo = safe_conc
        │   ⊥
        └───┴───────────┴────────────┴───┴── concurrency (log)

`cross` is interpolated on log-log axes: concurrencies are tested in geometric steps, errors of a latency are relative,
and a closed loop's two regimes are both straight there (latency flat below saturation, proportional to concurrency
above it, by Little's law). Interpolation may move the estimate, never the promise: between two tested concurrencies
the curve can be a step (the cache just filled up), so the interval spans the whole bracket, from the last tested
level whose upper end is inside to the first whose lower end is outside. All it assumes is that p95 does not fall as
users are added. Where the data does fall (an outlier), the first excursion ends the promise and the last level not
surely outside ends the interval: doubt widens it and no point is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.analysis.levels import levels, precision_order
from harness.records import Knee, SweepPoint

KV_FULL = 0.95
"""Share of the KV cache in use from which the next sequence has to wait or to evict one."""


def find_knees(points: Sequence[SweepPoint], slo_p95_s: float) -> list[Knee]:
    """The knee of each precision of a run, the baseline first."""
    return [
        find_knee([point for point in points if point.precision == precision], slo_p95_s)
        for precision in precision_order(points)
    ]


def find_knee(points: Sequence[SweepPoint], slo_p95_s: float) -> Knee:
    """The knee of one precision at p95 ≤ `slo_p95_s`. Invalid points, and points without a p95, are left out.

    cross_lo is 0 when even the smallest tested level may be outside; cross_hi is None (open) when even the largest
    may be inside. A point without an interval counts as its own: only the bracket is left to say how unsure it is.
    """
    precisions = {point.precision for point in points}
    if len(precisions) != 1:
        raise ValueError(f"find_knee takes the points of one precision, got {sorted(precisions)}")
    precision = precisions.pop()
    slo_ms = slo_p95_s * 1e3
    tested = [level for level in levels(points) if level.p95_ms is not None]
    inside = [_p95(level) <= slo_ms for level in tested]
    if not any(inside):
        return Knee(precision, slo_p95_s, cause=_cause(tested[0], tested) if tested else "unknown")

    surely_inside = 0
    while surely_inside < len(tested) and _p95_hi(tested[surely_inside]) <= slo_ms:
        surely_inside += 1
    surely_outside = len(tested)
    while surely_outside > 0 and _p95_lo(tested[surely_outside - 1]) > slo_ms:
        surely_outside -= 1

    safe = tested[surely_inside - 1].conc if surely_inside else None
    cross_lo = float(safe or 0)
    cross_hi = float(tested[surely_outside].conc) if surely_outside < len(tested) else None
    if all(inside):
        return Knee(precision, slo_p95_s, safe, None, cross_lo, cross_hi, True, _end_of_range(points, tested[-1]))
    first_out = inside.index(False)
    # Outside at the very first level and inside later: the excursion starts below what was tested.
    cross = _crossing(tested[first_out - 1], tested[first_out], slo_ms) if first_out else float(tested[0].conc)
    return Knee(precision, slo_p95_s, safe, cross, cross_lo, cross_hi, False, _cause(tested[first_out], tested))


def _crossing(below: SweepPoint, above: SweepPoint, slo_ms: float) -> float:
    """Concurrency at which the straight line through two levels, log over log, meets the SLO.

    ln N = ln N₁ + (ln SLO − ln p₁) / (ln p₂ − ln p₁) · (ln N₂ − ln N₁)
    """
    if _p95(below) <= 0:
        return float(below.conc)
    share = math.log(slo_ms / _p95(below)) / math.log(_p95(above) / _p95(below))
    return float(below.conc * (above.conc / below.conc) ** share)


def _cause(level: SweepPoint, tested: Sequence[SweepPoint]) -> str:
    """What the first level outside the SLO ran into, by the engine's own counters; "unknown" where it has none."""
    if (level.preemptions or 0) > 0 or (level.kv_usage_peak or 0.0) >= KV_FULL:
        return "kv_cache"
    # A plateau takes two levels: a single peak below the concurrency can be a sample that came too late.
    plateau = sum(other.running_peak == level.running_peak for other in tested) > 1
    short = level.running_peak is not None and level.running_peak < level.conc
    if (level.waiting_peak or 0) > 0 and short and plateau:
        return "max_num_seqs"
    if "client_bound" in level.verdict_reasons:
        return "client"
    if level.preemptions is None and level.kv_usage_peak is None and level.waiting_peak is None:
        return "unknown"
    return "compute"


def _end_of_range(points: Sequence[SweepPoint], largest: SweepPoint) -> str:
    """Why no knee was reached: the client gave out beyond the largest usable level, or nobody went further."""
    beyond = [point for point in points if point.conc > largest.conc]
    return "client" if any("client_bound" in point.verdict_reasons for point in beyond) else "none"


def _p95(level: SweepPoint) -> float:
    return level.p95_ms if level.p95_ms is not None else math.inf


def _p95_lo(level: SweepPoint) -> float:
    return _p95(level) if level.p95_ms_lo is None else min(level.p95_ms_lo, _p95(level))


def _p95_hi(level: SweepPoint) -> float:
    return _p95(level) if level.p95_ms_hi is None else max(level.p95_ms_hi, _p95(level))
