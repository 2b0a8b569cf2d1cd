"""Where a precision leaves the service level: the crossing of p95 over the load, how sure it is, and why.

      p95 (log)                          ⊤
        │                            ⊤   ●   first level surely outside:  cross_hi
    SLO ┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─│╱─ ⊥ ─
        │               ⊤         ╱  ●       in doubt: its interval holds the SLO
        │   ⊤           ●  ╱         ⊥
        │   ●           ⊥                    last level surely inside:    cross_lo = safe load
        │   ⊥
        └───┴───────────┴────────────┴───┴── users, or req/s (log)

The interval spans the whole bracket, from the last tested level whose upper end is inside to the first whose lower
end is outside: between two tested concurrencies the curve can be a step (the cache just filled up). All that it assumes
is that p95 does not fall as users are added. Then the crossing lies above a load exactly if p95 is inside at it, so
each end of the bracket hangs on the interval of one level alone: if that keeps what it says, each end is wrong in 2.5 %
of runs at most, however many levels there are.

Where the data does fall, one of two levels was disturbed. The first excursion ends the promise, and a level outside
that reads slower than the whole interval of one with more users is in doubt (another job on the machine slows a level
down, none speeds it up): doubt widens the interval and no point is thrown away.

`cross` is an estimate within the bracket, and no promise. The levels' figures are made to rise (isotonic regression:
those that fall are given their common mean; Barlow et al. 1972) and joined by straight lines on log-log axes:
concurrencies are tested in geometric steps, errors of a latency are relative, and a closed loop's two regimes are both
straight there (latency flat below saturation, proportional to concurrency above it, by Little's law). A fitted curve
that stays inside has no knee in range. `boot_lo` and `boot_hi` are a bootstrap's interval of `cross`: each level's
figure is drawn from its own interval (two half normal distributions that meet in the figure, so that the ends of the
interval are 2.5 % and 97.5 %) 4,000 times, and all the above done again. It is narrower than the bracket by what
interpolation takes for granted. How often each of the two holds the truth: docs/knees.md.

An open loop is read the same way over its rates, with one thing less to lean on. Beyond what the server can carry its
queue never stops growing, so the p95 of such a level is as long as its window was: the bracket and its verdicts hold
(outside is outside, for however long it was watched), a level may well read faster than the one before it, and where
in the bracket `cross` falls says little. A record of an open loop has `safe_conc` None; `safe_load` reads both kinds.
One trace at one speed has no knee at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.analysis.levels import USERS, axis, levels, load, one_trace, precision_order
from harness.analysis.percentiles import Z95
from harness.records import Knee, SweepPoint
from harness.slo import Slo

Floats = NDArray[np.float64]

KV_FULL = 0.95
"""Share of the KV cache in use from which the next sequence has to wait or to evict one."""
DRAWS = 4000
"""Of each level's figure, for the interval of the interpolated crossing."""


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


def standing(points: Sequence[SweepPoint], slo: Slo) -> list[tuple[SweepPoint, Place]]:
    """The levels of one precision that have all the figures, by load, and where each stands among the others.

    Unlike `placed`, which sees a level alone, it takes back what a level with more users contradicts (closed loops).
    """
    known = [(level, place) for level in levels(points) if (place := placed(level, slo)) is not None]
    if axis(points) is not USERS:
        return known
    later = [[level for level, _ in known[at + 1 :]] for at in range(len(known))]
    return [
        (level, replace(place, surely_outside=_surely_outside(level, others, slo)))
        for (level, place), others in zip(known, later, strict=True)
    ]


def _surely_outside(level: SweepPoint, later: Sequence[SweepPoint], slo: Slo) -> bool:
    """Whether a level breaks a limit with its whole interval, and no later one's whole interval is below its figure."""
    for limit in limits(slo):
        value, low, _ = _read(level, limit)
        if low > limit.most and all(value <= _read(other, limit)[2] for other in later):
            return True
    return False


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
    places = standing(points, slo)
    tested = [level for level, _ in places]
    if not tested:
        return Knee(precision, slo.words)
    knee = Knee(precision, slo.words, tested_lo=float(load(tested[0])), tested_hi=float(load(tested[-1])))
    if not any(place.inside for _, place in places):
        return replace(knee, cause=_cause(tested[0], tested), limit=_broken(tested[0], slo)[0].name)

    safe, outside = bracketed([place for _, place in places])
    cross_lo = float(load(tested[safe - 1])) if safe else 0.0
    cross_hi = float(load(tested[outside])) if outside < len(tested) else None
    doubtful = tested[max(safe - 1, 0) : outside + 1]
    boot_lo, boot_hi = _bootstrap(doubtful, cross_lo, cross_hi, slo)
    knee = replace(
        knee,
        safe_conc=int(cross_lo) if cross_lo and axis(points) is USERS else None,
        cross_lo=cross_lo,
        cross_hi=cross_hi,
        boot_lo=boot_lo,
        boot_hi=boot_hi,
    )
    cross, limit = min(
        (float(_crossings(doubtful, limit, _figures(doubtful, limit))[0]), limit.name) for limit in limits(slo)
    )
    if math.isinf(cross):
        return replace(knee, beyond_range=True, cause=_end_of_range(points, tested[-1]))
    first_out = next((level for level in doubtful if load(level) > cross * (1 + 1e-9)), doubtful[-1])
    # 0: outside at the smallest level already, so that it begins below what was tested.
    return replace(knee, cross=cross or knee.tested_lo, limit=limit, cause=_cause(first_out, tested))


def bracketed(places: Sequence[Place]) -> tuple[int, int]:
    """How many levels from the first on are surely inside, and from which one on all are surely outside."""
    safe = next((at for at, place in enumerate(places) if not place.surely_inside), len(places))
    outside = len(places)
    while outside > 0 and places[outside - 1].surely_outside:
        outside -= 1
    return safe, outside


def _broken(level: SweepPoint, slo: Slo) -> list[Limit]:
    """The limits that a level's figures break."""
    return [limit for limit in limits(slo) if (found := reading(level, limit.column)) and found[0] > limit.most]


def _read(level: SweepPoint, limit: Limit) -> tuple[float, float, float]:
    """The `reading` of a level that is known to have one."""
    found = reading(level, limit.column)
    assert found is not None
    return found


def _figures(tested: Sequence[SweepPoint], limit: Limit, draws: Floats | None = None) -> Floats:
    """The levels' figures [1, levels] on the scale of `_scaled`; with standard normal `draws` [n, levels] as many sets
    of them, each figure drawn from its interval: a draw of ±1.96 is the interval's end."""
    value, low, high = _scaled(np.array([_read(level, limit) for level in tested]).T, limit)
    if draws is None:
        return np.asarray(value[None])
    return np.asarray(value + draws / Z95 * np.where(draws > 0, high - value, value - low))


def _scaled(figures: Floats, limit: Limit) -> Floats:
    """The scale on which a figure's error is about the same everywhere and its curve about straight over ln load.

    Latencies: ln. Shares of requests: arcsin √share (Freeman & Tukey, Ann. Math. Stat. 21, 1950), for they may be 0.
    """
    if limit.column == "goodput":
        return np.asarray(np.arcsin(np.sqrt(np.clip(figures, 0, 1))))
    return np.asarray(np.log(np.maximum(figures, 1e-6)))


def rising(figures: Floats) -> Floats:
    """Isotonic regression of each row [n, levels]: the non-decreasing figures nearest to it, by least squares.

    fit_i = max over j ≤ i of the min over k ≥ i of mean(y_j .. y_k)
    """
    count = figures.shape[1]
    sums = np.concatenate([np.zeros((len(figures), 1)), np.cumsum(figures, axis=1)], axis=1)
    fit = np.full(figures.shape, -np.inf)
    for j in range(count):
        means = (sums[:, j + 1 :] - sums[:, [j]]) / np.arange(1, count - j + 1)
        fit[:, j:] = np.maximum(fit[:, j:], np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1])
    return fit


def _crossings(tested: Sequence[SweepPoint], limit: Limit, figures: Floats) -> Floats:
    """The load at which each row of figures [n, levels], made to rise, passes the limit, on a straight line:

    ln N = ln N₁ + (limit − y₁) / (y₂ − y₁) · (ln N₂ − ln N₁), y from `_scaled`. 0: outside at the smallest level
    already. inf: at none.
    """
    at = np.log([load(level) for level in tested])
    most = float(_scaled(np.array(limit.most), limit))
    fit = rising(figures)
    outside = fit > most
    first = outside.argmax(axis=1)
    before = np.maximum(first - 1, 0)
    above, below = (np.take_along_axis(fit, picks[:, None], 1)[:, 0] for picks in (first, before))
    share = (most - below) / np.where(above > below, above - below, 1.0)
    crossing = np.exp(at[before] + share * (at[first] - at[before]))
    return np.where(outside.any(axis=1), np.where(first > 0, crossing, 0.0), np.inf)


def _bootstrap(
    doubtful: Sequence[SweepPoint], cross_lo: float, cross_hi: float | None, slo: Slo
) -> tuple[float | None, float | None]:
    """95 % interval of the interpolated crossing by the levels' own intervals, within the bracket.

    `doubtful`: the levels of the bracket and its two ends. An end beyond the largest level is None. Both are None where
    a level has no interval to draw from.
    """
    if any(getattr(level, f"{limit.column}_lo") is None for level in doubtful for limit in limits(slo)):
        return None, None
    draws = np.random.default_rng(0).standard_normal((DRAWS, len(doubtful)))
    crossing = np.full(DRAWS, np.inf if cross_hi is None else cross_hi)
    for limit in limits(slo):  # one draw a level for all its limits: a slow session is slow in all of them
        crossing = np.minimum(crossing, _crossings(doubtful, limit, _figures(doubtful, limit, draws)))
    low, high = np.sort(np.maximum(crossing, cross_lo))[[int(0.025 * DRAWS), int(0.975 * DRAWS)]]
    high = max(high, load(doubtful[0]))  # as `cross` is put at the smallest level where it begins below it
    return (None if math.isinf(low) else float(low)), (None if math.isinf(high) else float(high))


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
