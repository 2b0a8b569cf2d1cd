"""Where a precision leaves the service level: the crossing of p95 over the load, how sure it is, and why.

      p95 (log)                          ⊤
        │                            ⊤   ●   first level surely outside:  cross_hi
    SLO ┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─│╱─ ⊥ ─
        │               ⊤         ╱  ●       in doubt: its interval holds the SLO
        │   ⊤           ●  ╱         ⊥
        │   ●           ⊥                    last level surely inside:    cross_lo = safe load
        │   ⊥
        └───┴───────────┴────────────┴───┴── users, or req/s (log)

`cross` is interpolated on log-log axes: concurrencies are tested in geometric steps, errors of a latency are relative,
and a closed loop's two regimes are both straight there (latency flat below saturation, proportional to concurrency
above it, by Little's law). Interpolation may move the estimate, never the promise: between two tested concurrencies
the curve can be a step (the cache just filled up), so the interval spans the whole bracket, from the last tested
level whose upper end is inside to the first whose lower end is outside. All it assumes is that p95 does not fall as
users are added. Where the data does fall (an outlier), the first excursion ends the promise and the last level not
surely outside ends the interval: doubt widens it and no point is thrown away.

An open loop is read the same way over its rates, with one thing less to lean on. Beyond what the server can carry its
queue never stops growing, so the p95 of such a level is as long as its window was: the bracket and its verdicts hold
(outside is outside, for however long it was watched), and where in the bracket `cross` falls says little. A record
of an open loop has `safe_conc` None; `safe_load` reads both kinds. One trace at one speed has no knee at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.analysis.levels import USERS, axis, levels, load, one_trace, precision_order
from harness.records import Knee, SweepPoint

KV_FULL = 0.95
"""Share of the KV cache in use from which the next sequence has to wait or to evict one."""


def find_knees(points: Sequence[SweepPoint], slo_p95_s: float) -> list[Knee]:
    """The knee of each precision of a run, the baseline first; none for one trace at one speed."""
    if one_trace(points):
        return []
    return [
        find_knee([point for point in points if point.precision == precision], slo_p95_s)
        for precision in precision_order(points)
    ]


def safe_load(knee: Knee) -> float | None:
    """The largest tested load that is safe to promise, users or requests a second; None: not even the smallest."""
    return knee.cross_lo or None if knee.safe_conc is None else knee.safe_conc


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

    cross_lo = float(load(tested[surely_inside - 1])) if surely_inside else 0.0
    cross_hi = float(load(tested[surely_outside])) if surely_outside < len(tested) else None
    safe = int(cross_lo) if cross_lo and axis(points) is USERS else None
    if all(inside):
        return Knee(precision, slo_p95_s, safe, None, cross_lo, cross_hi, True, _end_of_range(points, tested[-1]))
    first_out = inside.index(False)
    # Outside at the very first level and inside later: the excursion starts below what was tested.
    cross = _crossing(tested[first_out - 1], tested[first_out], slo_ms) if first_out else float(load(tested[0]))
    return Knee(precision, slo_p95_s, safe, cross, cross_lo, cross_hi, False, _cause(tested[first_out], tested))


def _crossing(below: SweepPoint, above: SweepPoint, slo_ms: float) -> float:
    """The load at which the straight line through two levels, log over log, meets the SLO.

    ln N = ln N₁ + (ln SLO − ln p₁) / (ln p₂ − ln p₁) · (ln N₂ − ln N₁)
    """
    if _p95(below) <= 0:
        return float(load(below))
    share = math.log(slo_ms / _p95(below)) / math.log(_p95(above) / _p95(below))
    return float(load(below) * (load(above) / load(below)) ** share)


def _cause(level: SweepPoint, tested: Sequence[SweepPoint]) -> str:
    """What the first level outside the SLO ran into, by the engine's own counters; "unknown" where it has none."""
    if (level.preemptions or 0) > 0 or (level.kv_usage_peak or 0.0) >= KV_FULL:
        return "kv_cache"
    # A plateau takes two levels: a single peak below the concurrency can be a sample that came too late. An open loop
    # has no number of users to fall short of: there the limit is a number that no level exceeds.
    peaks = [other.running_peak or 0 for other in tested]
    running = level.running_peak or 0
    limited = running < level.conc if axis(tested) is USERS else running == max(peaks)
    if (level.waiting_peak or 0) > 0 and running and limited and peaks.count(running) > 1:
        return "max_num_seqs"
    if "client_bound" in level.verdict_reasons:
        return "client"
    if level.preemptions is None and level.kv_usage_peak is None and level.waiting_peak is None:
        return "unknown"
    return "compute"


def _end_of_range(points: Sequence[SweepPoint], largest: SweepPoint) -> str:
    """Why no knee was reached: the client gave out beyond the largest usable level, or nobody went further."""
    beyond = [point for point in points if load(point) > load(largest)]
    return "client" if any("client_bound" in point.verdict_reasons for point in beyond) else "none"


def _p95(level: SweepPoint) -> float:
    return level.p95_ms if level.p95_ms is not None else math.inf


def _p95_lo(level: SweepPoint) -> float:
    return _p95(level) if level.p95_ms_lo is None else min(level.p95_ms_lo, _p95(level))


def _p95_hi(level: SweepPoint) -> float:
    return _p95(level) if level.p95_ms_hi is None else max(level.p95_ms_hi, _p95(level))
