"""Two runs of one scenario, before and after an upgrade: how many times its figure each cell has now, and is it worse?

A cell is compared with itself: the same precision under the same load. r = x_after / x_before of a figure x; w says
how much worse that is, r for a latency and 1 / r for tok/s; t is the tolerance. With a 95 % interval of w:

          1/(1+t)      1      1+t                w
    ─────────┼─────────┼───────┼───────────────►
     ├────┤  │         │       │  ├─────┤        improved, regressed: all of it lies beyond the tolerance
             │    ├──────────┤ │                 unchanged: all of it lies within
         ├─────────────────┤   │                 undecided: anything else, and what has no interval

What the interval is made of depends on how often the server was started. The sessions of two runs did not take turns,
so repeat 2 before and repeat 2 after share no moment of the machine: they are two samples, not pairs. With n figures
each, s² the variance of their logs and v = s²/n:

    d = mean ln x_after − mean ln x_before       r = exp(d)       interval: exp(d ± t(0.975, ν) · √(v + v'))

    2 and more sessions each    ν = (v + v')² / (v²/(n−1) + v'²/(n'−1))          Welch, Biometrika 34, 1947
    1 against n                 the one takes the other's s², and ν = n − 1      Student, pooled: 0 · s² of the one

    1 against 1                 the requests are the same questions where the repeat is the same: `over_requests`,
                                as between two precisions. It knows nothing of run-to-run spread.

One session each is blind to what a restart alone changes: two equal runs whose sessions differ by s (standard deviation
of ln x) differ by √2·s. The tolerance is all that covers that; `spread_covered` says how much of it.

Many comparisons. Of 32 intervals of 95 % one or two miss by chance. A CI that fails on any of them fails for nothing,
so what is called regressed is chosen from all comparisons together: with p the one-sided p-value of w ≤ 1 + t,
Benjamini & Hochberg (J. R. Stat. Soc. B 57, 1995) at 2.5 %. If nothing is worse than the tolerance allows, all that is
called is false, and their rate is then the chance that anything is called at all: the exit code. If something is worse,
the exit code is right, and of what is called at most 2.5 % is expected to be false. It holds for independent figures
and for those that rise and fall together, as figures of one run do (Benjamini & Yekutieli, Ann. Stat. 29, 2001). 2.5 %
is one tail of the interval: what is called has its interval beyond the tolerance, and a single comparison is judged by
its interval alone. `improved` is chosen likewise, on its own; `unchanged` needs no such care, for no alarm hangs on it.

Predicted rows (harness/predict) have error bands and no noise: their ratio is `rows_ratio`, basis "bands", from both
intervals. A prediction beside a measurement is a check of the prediction (`Change.check`): nothing can have regressed,
and the question is whether the two agree, that is whether the interval of their ratio holds 1.

How often it is right, of made runs with 32 figures whose sessions differ by 2.4 %, at a tolerance of 5 %:

    sessions each                               2      3      4      5
    equal, and called regressed                 0      0      0      0 %
    15 % slower in all 8 cells, and found      17     98    100    100 %
    15 % slower in one cell of 8, and found     2     28     70     92 %
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control
from scipy.stats import t as student_t

from harness.analysis.compare import METRICS, Answered, Estimate, answered_in, over_requests, rows_ratio
from harness.analysis.levels import latest, levels, precision_order
from harness.records import RequestRecord, SweepPoint

TOLERANCE = 0.05
FALSE_RATE = 0.025
"""Share of the cells called regressed that may be called for nothing; one tail of a 95 % interval."""
HIGHER_IS_BETTER = ("tok_s",)

Side = Literal["before", "after"]
Outcome = Literal["regressed", "improved", "unchanged", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("regressed", "improved", "unchanged", "undecided")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run measured: its rows, and its requests as far as they are there."""

    points: Sequence[SweepPoint]
    requests: Sequence[RequestRecord] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one cell in the second run against the first; `ratio` is after / before."""

    precision: str
    conc: int
    rate_rps: float | None
    metric: str
    before: float
    """The figure, in the unit of its column; of several sessions their geometric mean."""
    after: float
    ratio: Estimate
    basis: Literal["sessions", "requests", "bands"]
    """requests: from within one session of each, which knows nothing of run-to-run spread; bands: one is predicted."""
    sessions: tuple[int, int]
    """How many, before and after."""
    pairs: int = 0
    """Requests that both answered; 0 on the basis of sessions."""
    freedom: float = math.inf
    """Degrees of freedom of the interval."""
    alone: Outcome = "undecided"
    """The verdict if this were the only comparison."""
    outcome: Outcome = "undecided"
    check: bool = False
    """One of the two figures is predicted and the other measured: they have no verdict but `agrees`."""

    @property
    def load(self) -> float:
        """Users, or requests a second."""
        return self.conc if self.rate_rps is None else self.rate_rps

    @property
    def agrees(self) -> bool | None:
        """Whether the ratio may be 1; None: it has no interval."""
        if self.ratio.lo is None or self.ratio.hi is None:
            return None
        return self.ratio.lo <= 1 <= self.ratio.hi


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row without a partner in the other run, and why."""

    point: SweepPoint
    run: Side
    """The run that the row is from."""
    why: Literal["absent", "invalid"]
    """absent: the other run has no row of this cell; invalid: this row is."""


Key = tuple[str, int, float]
WORSE, BETTER = 1, -1


def changes(
    before: Sample, after: Sample, tolerance: float = TOLERANCE, metrics: Sequence[str] = METRICS
) -> list[Change]:
    """A line for each cell and metric that both runs have a figure of; by precision (the first run's order), then load.

    Invalid rows are left out, see `left_out`. `tolerance` is a share, 0.05 for 5 %; `metrics` are some of METRICS.
    """
    order = precision_order(before.points)
    one, two = _cells(before.points), _cells(after.points)
    answered = answered_in(before.requests), answered_in(after.requests)
    common = sorted(one.keys() & two.keys(), key=lambda key: (order.index(key[0]), *key[1:]))
    found = [_change(metric, one[key], two[key], answered) for key in common for metric in metrics]
    return _judged([change for change in found if change], tolerance)


def left_out(before: Sequence[SweepPoint], after: Sequence[SweepPoint]) -> list[LeftOut]:
    """Rows that are compared with nothing, the first run's in front. The last attempt at a cell is its row."""
    return [*_without_partner("before", before, after), *_without_partner("after", after, before)]


def overall(changes: Sequence[Change]) -> Outcome:
    """Of all together: regressed if anything is; else undecided if anything is; else improved if anything is."""
    outcomes = {change.outcome for change in changes}
    return next((name for name in ("regressed", "undecided", "improved") if name in outcomes), "unchanged")


def spread_covered(tolerance: float) -> float:
    """The run-to-run spread that the tolerance covers where there is one session of each run, as a share.

    Two equal sessions differ by √2 · s, and in one of 40 pairs the later is worse by more than 1.96 times that:
    s = ln(1 + t) / (1.96 · √2). For 5 % it is 1.8 %. Of 200 made pairs of equal runs with 32 figures, 0.5, 1.5, 4 and
    14 % were called regressed where s was 0, 1, 2 and 3 %.
    """
    return math.log1p(tolerance) / (float(student_t.ppf(0.975, math.inf)) * math.sqrt(2))


def over_sessions(before: Sequence[float], after: Sequence[float]) -> tuple[Estimate, float]:
    """The ratio of two independent samples of sessions, and the degrees of freedom of its interval.

    Three figures or more in all, none of them 0; a run with a single one borrows the other's spread.
    """
    logs = [np.log(np.asarray(figures, dtype=np.float64)) for figures in (before, after)]
    n, m = map(len, logs)
    spread = [float(sample.var(ddof=1)) for sample in logs if len(sample) > 1]
    v, w = spread[0] / n, spread[-1] / m
    d = float(logs[1].mean() - logs[0].mean())
    if min(n, m) == 1 or v + w == 0:
        freedom = float(max(n, m) - 1)
    else:
        freedom = (v + w) ** 2 / (v**2 / (n - 1) + w**2 / (m - 1))
    half = float(student_t.ppf(0.975, freedom)) * math.sqrt(v + w)
    return Estimate(math.exp(d), math.exp(d - half), math.exp(d + half)), freedom


def _without_partner(run: Side, rows: Sequence[SweepPoint], others: Sequence[SweepPoint]) -> list[LeftOut]:
    there = {_key(point) for point in others}
    found = []
    for point in latest(rows):
        if _key(point) not in there:
            found.append(LeftOut(point, run, "absent"))
        elif point.verdict == "invalid":
            found.append(LeftOut(point, run, "invalid"))
    return found


def _cells(points: Sequence[SweepPoint]) -> dict[Key, list[SweepPoint]]:
    cells: dict[Key, list[SweepPoint]] = {}
    for point in latest(points):
        if point.verdict != "invalid":
            cells.setdefault(_key(point), []).append(point)
    return cells


def _key(point: SweepPoint) -> Key:
    return point.precision, point.conc, point.rate_rps or 0.0


def _change(
    metric: str, before: Sequence[SweepPoint], after: Sequence[SweepPoint], answered: tuple[Answered, Answered]
) -> Change | None:
    rows = [[point for point in side if (getattr(point, metric) or 0) > 0] for side in (before, after)]
    if not all(rows):
        return None
    figures = [[float(getattr(point, metric)) for point in side] for side in rows]
    first, freedom, pairs = rows[0][0], math.inf, 0
    predicted = [side[0].source == "predicted" for side in rows]
    alone = len(rows[0]) == len(rows[1]) == 1
    if any(predicted):
        ratio = rows_ratio(metric, [(levels(rows[0])[0], levels(rows[1])[0])])
    elif not alone:
        ratio, freedom = over_sessions(*figures)
    elif first.repeat == rows[1][0].repeat:
        ratio, pairs = over_requests(metric, (first, rows[1][0]), *answered)
    else:  # another repeat asks other questions
        ratio = Estimate(figures[1][0] / figures[0][0])
    means = [float(np.exp(np.log(side).mean())) for side in figures]
    return Change(
        precision=first.precision,
        conc=first.conc,
        rate_rps=first.rate_rps,
        metric=metric,
        before=means[0],
        after=means[1],
        ratio=ratio,
        basis="bands" if any(predicted) else "requests" if alone else "sessions",
        sessions=(len(rows[0]), len(rows[1])),
        pairs=pairs,
        freedom=freedom,
        check=predicted[0] != predicted[1],
    )


def _judged(found: Sequence[Change], tolerance: float) -> list[Change]:
    """The verdicts; all comparisons that have an interval count as one family."""
    known = [change for change in found if change.ratio.lo is not None and not change.check]
    if not known:
        return list(found)
    alone = [[_p_value(change, tolerance, sign) for change in known] for sign in (WORSE, BETTER)]
    together = [false_discovery_control(p_values) for p_values in alone]
    judged = (
        replace(change, alone=_outcome(change, tolerance, *own), outcome=_outcome(change, tolerance, *adjusted))
        for change, own, adjusted in zip(known, zip(*alone, strict=True), zip(*together, strict=True), strict=True)
    )
    return [change if change.ratio.lo is None or change.check else next(judged) for change in found]


def _outcome(change: Change, tolerance: float, worse: float, better: float) -> Outcome:
    if worse <= FALSE_RATE:
        return "regressed"
    if better <= FALSE_RATE:
        return "improved"
    _, low, high = _worse_by(change)
    return "unchanged" if -math.log1p(tolerance) <= low and high <= math.log1p(tolerance) else "undecided"


def _worse_by(change: Change) -> tuple[float, float, float]:
    """ln w and the ends of its interval, which has to be there."""
    value, low, high = (math.log(end) for end in (change.ratio.value, change.ratio.lo, change.ratio.hi) if end)
    return (-value, -high, -low) if change.metric in HIGHER_IS_BETTER else (value, low, high)


def _p_value(change: Change, tolerance: float, sign: int) -> float:
    """One-sided p-value of "not worse (WORSE) or not better (BETTER) than the tolerance", out of the interval.

    An interval's half is t(0.975, ν) standard errors, which gives the error back and with it the tail (Altman & Bland,
    BMJ 343, 2011, d2304); the half that points to the tolerance, for a resampled interval need not be even. So
    p ≤ 0.025 just where the interval ends beyond the tolerance.
    """
    value, low, high = _worse_by(change)
    gap = sign * value - math.log1p(tolerance)
    half = value - low if sign == WORSE else high - value
    if half <= 0:  # no spread at all
        return 0.0 if gap > 0 else 1.0
    return float(student_t.sf(gap / half * student_t.ppf(0.975, change.freedom), change.freedom))
