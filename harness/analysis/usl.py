"""Where throughput stops growing with users: three views that know nothing of a service level, beside the knee.

    tok_s                     ╱ λN: a lone user's rate, as if nobody were in the way
      │                   ╱  ·  ·  ·  ·  ·  ·  ·  ·  · most that the fit reaches
      │               ╱    ●      ●     ●
      │           ╱   ●    │             ╲ ●  beyond the peak, users take from each other
      │       ╱  ●         │       │
      │   ╱ ●              │       │
      └──┴─────────────────┴───────┴────────── users (linear)
                        saturation  peak

**Universal Scalability Law** (Gunther, Guerrilla Capacity Planning, 2007), from 6 levels on:

    X(N) = λN / (1 + σ(N−1) + κN(N−1))        λ a lone user's throughput, σ contention, κ coherency (crosstalk)

Turned over it is linear, N/X = a + b(N−1) + cN(N−1) with a = 1/λ, b = σ/λ, c = κ/λ, all of them ≥ 0. So the best fit by
relative residuals is a non-negative least squares problem: it has one answer, and no starting values. From it

    peak        N = √((1−σ)/κ), where the fit's throughput is largest
    saturation  X_most / λ, where a lone user's straight line meets the most that the fit reaches (1/σ where κ = 0)

Both need a throughput that bends: that surely grows with users (GROWTH) and surely falls behind the straight line
(BEND). Even then a fit that curves down is not yet a fall, for a throughput that levels off makes a peak, too. Within
the tested range a peak is only reported when the largest level is surely slower than the fastest, and beyond it when
its whole interval lies within REACH times the largest level. Intervals are a bootstrap: the figures drawn from their
own intervals, or with the spread of the fit's residuals where that is larger (sessions differ by more than one of them
knows), and fitted again.

**Kneedle** (Satopää et al., ICDCS Workshops 2011; the kneed package), from 6 levels on: the tested level that stands
out most above the straight line from the first to the last, both axes scaled to 0..1. Users are taken as they are, not
in logs: over ln N a straight line bends upwards and a saturating one has the shape of an S, which Kneedle is not for;
on networks of known saturation its errors were several times as large (docs/knees.md). It finds a knee in any noise,
so it, too, is only asked where throughput bends.

**Asymptotic bound** (Denning & Buzen, Comput. Surv. 10, 1978; Kleinrock, Queueing Systems II, 1976), from 2 levels on:

    N* = X_max · (R(1) + Z) = N₁ · X_max / X(N₁)        by Little's law, R + Z = N / X, whatever the users' pause Z is

taken from the smallest tested load N₁. Where that is more than 1 its users are in each other's way already, and N* is
an upper estimate. It decides below 6 levels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from kneed import KneeLocator
from numpy.typing import NDArray
from scipy.optimize import nnls

from harness.analysis.levels import USERS, axis, levels, precision_order
from harness.analysis.percentiles import Z95
from harness.records import Agreement, Knee, Saturation, Shape, SweepPoint

Floats = NDArray[np.float64]

LEAST_LEVELS = 6
"""For three parameters of a fit, and for a shape to be seen at all."""
REACH = 4.0
"""Times the largest tested load: a peak that may lie beyond is no prediction any more."""
GROWTH = 1.5
"""Throughput of the fastest level over that of the smallest, from which on it grows."""
BEND = 0.8
"""Share of the straight line's throughput that the largest level must fall short of, for there to be a knee."""
WIDEN = 1.5
"""Saturation within the knee's interval, widened by this factor at both ends, agrees with it."""
MISFIT = 0.1
"""Root mean square relative residual above which the law does not describe the curve."""
DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Usl:
    """A fit of the Universal Scalability Law. `misfit`: root mean square of (fit − X) / X."""

    rate: float
    contention: float
    coherency: float
    misfit: float

    def throughput(self, users: Floats) -> Floats:
        """X(N)."""
        others = users - 1
        return np.asarray(
            self.rate * users / (1 + self.contention * others + self.coherency * users * others), dtype=np.float64
        )

    @property
    def peak(self) -> float:
        """Users of the most throughput; inf: it grows for ever."""
        if self.coherency <= 0:
            return math.inf
        return max(1.0, math.sqrt(max(0.0, 1 - self.contention) / self.coherency))

    @property
    def saturation(self) -> float:
        """Users at which the straight line of a lone one meets the most that the fit reaches; inf: nowhere."""
        if math.isfinite(self.peak):
            return float(self.throughput(np.array(self.peak))) / self.rate
        return 1 / self.contention if self.contention > 0 else math.inf


def fit_usl(users: Floats, tok_s: Floats) -> Usl | None:
    """The best fit by relative residuals of N/X. None: fewer than 3 levels, or no throughput that a lone user has."""
    if len(users) < 3 or tok_s.min() <= 0:
        return None
    each = users / tok_s
    terms = np.stack([np.ones_like(users), users - 1, users * (users - 1)], axis=1)
    (a, b, c), _ = nnls(terms / each[:, None], np.ones_like(users))
    if a <= 0:
        return None
    fit = Usl(float(1 / a), float(b / a), float(c / a), 0.0)
    return replace(fit, misfit=float(np.sqrt(np.mean((fit.throughput(users) / tok_s - 1) ** 2))))


def kneedle(users: Floats, tok_s: Floats) -> float | None:
    """The tested load at which Kneedle sees the knee of a throughput that rises and bends; None: it sees none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it finds nothing, which None says
        found = KneeLocator(users, tok_s, curve="concave", direction="increasing").knee
    return None if found is None else float(found)


def shape(users: Floats, figures: Floats) -> Shape:
    """flat, straight or bends, of throughputs [levels, 3] (value, lo, hi), as far as their intervals make it sure."""
    value, low, high = figures.T
    if low.max() < GROWTH * value[0] or low.max() <= high[0]:
        return "flat"
    return "bends" if high[-1] / users[-1] < BEND * value[0] / users[0] else "straight"


def find_saturations(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> list[Saturation]:
    """One for each precision with a knee; none in an open loop, where nothing waits for an answer: it has no curve of
    throughput over users, and up to saturation just as many are answered as ask."""
    if axis(points) is not USERS:
        return []
    own = {knee.precision: knee for knee in knees}
    return [
        find_saturation([point for point in points if point.precision == precision], own[precision])
        for precision in precision_order(points)
        if precision in own
    ]


def find_saturation(points: Sequence[SweepPoint], knee: Knee) -> Saturation:
    """The three views of one precision's throughput, and how they stand to its knee. Invalid points are left out."""
    usable = [level for level in levels(points) if level.tok_s]
    found = Saturation(knee.precision, levels=len(usable))
    if len(usable) < 2:
        return found
    users = np.array([level.conc for level in usable], dtype=float)
    figures = np.array([_throughput(level) for level in usable])
    found = replace(found, shape=shape(users, figures), **_bound(users, figures))
    if len(usable) >= LEAST_LEVELS:
        found = replace(found, **_law(users, figures, found.shape == "bends"))
        if found.shape == "bends":
            found = replace(found, kneedle=kneedle(users, figures[:, 0]))
    return replace(found, agreement=agreement(found, knee))


def agreement(found: Saturation, knee: Knee) -> Agreement | None:
    """How saturation stands to the SLO's crossing, whose interval is widened by WIDEN at both ends.

    agree: all views lie within it. latency: all lie above, the SLO is crossed before the card is saturated.
    throughput: all lie below, the card is saturated first. mixed: neither. None: nothing to compare.
    """
    if knee.tested_lo is None:
        return None
    low = (knee.cross_lo or 0.0) / WIDEN
    high = knee.tested_lo if knee.cross_lo is None else math.inf if knee.cross_hi is None else knee.cross_hi
    sides = {_side(view, low, high * WIDEN) for view in saturation_views(found)}
    return sides.pop() if len(sides) == 1 else "mixed" if sides else None


def _side(view: float, low: float, high: float) -> Agreement:
    return "throughput" if view < low else "latency" if view > high else "agree"


def saturation_views(found: Saturation) -> list[float]:
    """The estimates of saturation that count: Kneedle's and the law's, if it fits; below 6 levels the bound's."""
    if found.shape != "bends":
        return []
    if found.levels < LEAST_LEVELS:
        return [found.bound] if found.bound else []
    fits = found.usl_misfit is not None and found.usl_misfit <= MISFIT
    return [view for view in (found.kneedle, found.usl_saturation if fits else None) if view is not None]


def _throughput(level: SweepPoint) -> tuple[float, float, float]:
    """(value, lo, hi) of tok_s; without an interval, its own value at both ends."""
    value = level.tok_s or 0.0
    return value, min(value, level.tok_s_lo or value), max(value, level.tok_s_hi or value)


def _bound(users: Floats, figures: Floats) -> dict[str, Any]:
    """N* and its interval: that of the ratio of two independent figures, by their own intervals in logs (MOVER)."""
    fastest = int(figures[:, 0].argmax())
    (first, first_lo, first_hi), (most, most_lo, most_hi) = np.log(np.maximum(figures[[0, fastest]], 1e-9))
    middle = float(users[0]) * math.exp(most - first)
    return {
        "bound": middle,
        "bound_lo": middle * math.exp(-math.hypot(most - most_lo, first_hi - first)),
        "bound_hi": middle * math.exp(math.hypot(most_hi - most, first - first_lo)),
        "bound_from": float(users[0]),
    }


def _law(users: Floats, figures: Floats, bends: bool) -> dict[str, Any]:
    """The fit's parameters and, where throughput bends, its saturation and its peak. Empty where there is no fit."""
    fit = fit_usl(users, figures[:, 0])
    if fit is None:
        return {}
    found: dict[str, Any] = {
        "usl_rate": fit.rate,
        "usl_contention": fit.contention,
        "usl_coherency": fit.coherency,
        "usl_misfit": fit.misfit,
    }
    if not bends:
        return found
    fits = _refitted(users, figures, fit)
    if math.isfinite(fit.saturation):
        found |= _with_interval("usl_saturation", fit.saturation, [other.saturation for other in fits])
    largest, fastest = float(users[-1]), figures[figures[:, 0].argmax()]
    if fit.peak > largest or figures[-1, 2] < fastest[1]:
        peak = _with_interval("usl_peak", fit.peak, [other.peak for other in fits])
        if (peak["usl_peak_hi"] or math.inf) <= REACH * largest:
            found |= peak
    return found


def _refitted(users: Floats, figures: Floats, fit: Usl) -> list[Usl]:
    """The law fitted to DRAWS sets of figures that were drawn from their intervals, or from the residuals' spread."""
    value, low, high = np.log(np.maximum(figures, 1e-9)).T
    residual = Z95 * fit.misfit * math.sqrt(len(users) / (len(users) - 3))
    up, down = np.maximum(residual, high - value), np.maximum(residual, value - low)
    draws = np.random.default_rng(0).standard_normal((DRAWS, len(users)))
    drawn = np.exp(value + draws / Z95 * np.where(draws > 0, up, down))
    return [other for row in drawn if (other := fit_usl(users, row)) is not None]


def _with_interval(name: str, middle: float, draws: Sequence[float]) -> dict[str, float | None]:
    """A figure and the ends of its 95 % interval; an end at infinity is open."""
    low, high = np.sort(draws)[[int(0.025 * len(draws)), int(0.975 * len(draws))]]
    ends = (min(middle, float(low)), max(middle, float(high)))
    return {name: middle, f"{name}_lo": ends[0], f"{name}_hi": ends[1] if math.isfinite(ends[1]) else None}
