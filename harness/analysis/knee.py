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
from dataclasses import dataclass, replace

from harness.analysis.levels import USERS, axis, levels, load, one_trace, precision_order
from harness.records import Knee, SweepPoint
from harness.slo import Slo

KV_FULL = 0.95
"""Share of the KV cache in use from which the next sequence has to wait or to evict one."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a service level: the column of a row that has to stay at or below `most`, and its name."""

    column: str
    most: float
    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a level stands to a service level: inside by its figures, and whether its intervals leave a doubt."""

    inside: bool
    surely_inside: bool
    surely_outside: bool


def limits(slo: Slo) -> tuple[Limit, ...]:
    """The limits as columns of points.csv; goodput is read as the share of requests outside, so that less is better."""
    if slo.goodput is not None:
        return (Limit("goodput", 1 - slo.goodput, "goodput"),)
    each = (("p95_ms", slo.p95_s, "p95"), ("ttft_p95_ms", slo.ttft_s, "TTFT"), ("tpot_p95_ms", slo.tpot_s, "TPOT"))
    return tuple(Limit(column, limit * 1e3, name) for column, limit, name in each if limit is not None)


def reading(level: SweepPoint, column: str) -> tuple[float, float, float] | None:
    """(value, lo, hi) of a limited column; a level without an interval has its own value at both ends."""
    value, low, high = (getattr(level, f"{column}{end}") for end in ("", "_lo", "_hi"))
    if value is None:
        return None
    low, high = min(value, value if low is None else low), max(value, value if high is None else high)
    return (1 - value, 1 - high, 1 - low) if column == "goodput" else (value, low, high)


def placed(level: SweepPoint, slo: Slo) -> Place | None:
    """A level against all the limits; None where it lacks one of the figures."""
    read = [(reading(level, limit.column), limit.most) for limit in limits(slo)]
    known = [(found, most) for found, most in read if found is not None]
    if not known or len(known) < len(read):
        return None
    return Place(
        inside=all(value <= most for (value, _, _), most in known),
        surely_inside=all(high <= most for (_, _, high), most in known),
        surely_outside=any(low > most for (_, low, _), most in known),
    )


def find_knees(points: Sequence[SweepPoint], slo: Slo) -> list[Knee]:
    """The knee of each precision of a run, the baseline first; none for one trace at one speed."""
    if one_trace(points):
        return []
    return [
        find_knee([point for point in points if point.precision == precision], slo)
        for precision in precision_order(points)
    ]


def safe_load(knee: Knee) -> float | None:
    """The largest tested load that is safe to promise, users or requests a second; None: not even the smallest."""
    return knee.cross_lo or None if knee.safe_conc is None else knee.safe_conc


def find_knee(points: Sequence[SweepPoint], slo: Slo) -> Knee:
    """The knee of one precision. Invalid points, and those without a figure that the service level needs, are out.

    cross_lo is 0 when even the smallest tested level may be outside; cross_hi is None (open) when even the largest
    may be inside. A point without an interval counts as its own: only the bracket is left to say how unsure it is.
    Several limits are kept together: the crossing is the first of theirs, and `limit` names which one it is.
    """
    precisions = {point.precision for point in points}
    if len(precisions) != 1:
        raise ValueError(f"find_knee takes the points of one precision, got {sorted(precisions)}")
    precision = precisions.pop()
    places = [(level, place) for level in levels(points) if (place := placed(level, slo)) is not None]
    tested = [level for level, _ in places]
    if not tested:
        return Knee(precision, slo.words)
    knee = Knee(precision, slo.words, tested_lo=float(load(tested[0])), tested_hi=float(load(tested[-1])))
    inside = [place.inside for _, place in places]
    if not any(inside):
        return replace(knee, cause=_cause(tested[0], tested), limit=_broken(tested[0], slo)[0].name)

    surely_inside = 0
    while surely_inside < len(tested) and places[surely_inside][1].surely_inside:
        surely_inside += 1
    surely_outside = len(tested)
    while surely_outside > 0 and places[surely_outside - 1][1].surely_outside:
        surely_outside -= 1

    cross_lo = float(load(tested[surely_inside - 1])) if surely_inside else 0.0
    cross_hi = float(load(tested[surely_outside])) if surely_outside < len(tested) else None
    safe = int(cross_lo) if cross_lo and axis(points) is USERS else None
    knee = replace(knee, safe_conc=safe, cross_lo=cross_lo, cross_hi=cross_hi)
    if all(inside):
        return replace(knee, beyond_range=True, cause=_end_of_range(points, tested[-1]))
    first_out = inside.index(False)
    # Outside at the very first level and inside later: the excursion starts below what was tested.
    cross, name = min(
        (_crossing(tested[first_out - 1], tested[first_out], limit) if first_out else knee.tested_lo or 0.0, limit.name)
        for limit in _broken(tested[first_out], slo)
    )
    return replace(knee, cross=cross, limit=name, cause=_cause(tested[first_out], tested))


def _broken(level: SweepPoint, slo: Slo) -> list[Limit]:
    """The limits that a level's figures break."""
    return [limit for limit in limits(slo) if (found := reading(level, limit.column)) and found[0] > limit.most]


def _crossing(below: SweepPoint, above: SweepPoint, limit: Limit) -> float:
    """The load at which the straight line through two levels meets the limit: latencies log over log,

        ln N = ln N₁ + (ln SLO − ln p₁) / (ln p₂ − ln p₁) · (ln N₂ − ln N₁)

    and shares of requests, which may be 0, as they are over the logarithm of the load.
    """
    first, second = reading(below, limit.column), reading(above, limit.column)
    assert first is not None and second is not None
    if limit.column == "goodput":
        share = (limit.most - first[0]) / (second[0] - first[0])
    elif first[0] <= 0:
        return float(load(below))
    else:
        share = math.log(limit.most / first[0]) / math.log(second[0] / first[0])
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
