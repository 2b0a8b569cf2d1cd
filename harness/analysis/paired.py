"""What two precisions say to the same question, compared in pairs: tests and 95 % intervals.

**Answers** are right or wrong. Of n prompts, b are right in the baseline alone and c in the precision alone; the others
do not say which is better. The drop is (b - c) / n, and its interval Tango's: all d that the score test lets live,

    |b - c - n d| ≤ z √( n (2 q + d (1 - d)) )      q: the likeliest share of c-pairs, if the drop were d
    q = (√(B² - 8 n C) - B) / (4 n)                 B = (2 n - b + c) d - b - c,   C = -c d (1 - d)

(Tango, Stat. Med. 17, 1998). With b = c = 0 it is ± z² / (n + z²) and no point. Of its kin it is taken because a gate
asks for the upper end: where a precision loses and gains nothing, the truth lies above that end in at most 3.5 % of
runs, and above that of Bonett and Price's adjusted Wald interval in 7 % (computed from the trinomial law, n from 15 to
200, up to 35 % of the pairs discordant). Each holds the truth in at least 92.8 % of runs.

**Positions** of a text are not independent: a hard text stays hard. So texts are the unit, each with a sum and a count
of positions, and what is estimated is sum of sums / sum of counts. Texts are few (8 to 64) and their means skewed; a
plain bootstrap of lognormal texts holds the truth in 65 to 90 %. Two intervals that err in different places are made,
and the wider end of each is taken:

    studentized bootstrap over whole texts     knows no law (Efron & Tibshirani 1993, section 12.5); too short for the
                                               tails that nobody saw
    a law for what the texts are like          Student's t for a mean; lognormal for a mean that is above 0 (Zhou & Gao,
                                               Stat. Med. 16, 1997); Wilson with the effective number of positions for
                                               a share (Korn & Graubard, Surv. Methodol. 24, 1998)

How often such intervals hold the truth: benchmarks/quality_trials.py and tests/analysis/test_paired_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest
from scipy.stats import t as student_t

from harness.analysis.percentiles import Z95

Floats = NDArray[np.float64]
Interval = tuple[float, float]

LEAST_TEXTS = 4
"""Texts below which no interval is given: what three of them do not show, nothing brings back."""
FLOOR = 0.01
"""Share of the mean; 99 % of lognormal texts are above it unless their logs spread by more than 1.4."""
DRAWS = 2000
_TAIL = DRAWS // 40
"""2.5 % of the draws."""


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value for b and c discordant pairs: is each kind as likely? 1 where there are none."""
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests as one: p'_(i) = max over j ≤ i of (m - j + 1) p_(j), at most 1 (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted


def paired_difference(b: int, c: int, n: int) -> Interval:
    """Tango's 95 % interval of (b - c) / n, of n > 0 pairs; it is never a point and never beyond -1..1."""
    difference = (b - c) / n

    def beyond(d: float) -> float:
        """How far the score at d is above 0, squared and with its sign, less what 95 % allow: a root is an end."""
        half = (2 * n - b + c) * d - b - c
        share = (math.sqrt(max(half * half + 8 * n * c * d * (1 - d), 0.0)) - half) / (4 * n)
        variance = n * (2 * share + d * (1 - d))
        return float((b - c - n * d) ** 2 - Z95**2 * variance)

    aside = 1e-9  # at the difference itself, a table without a pair of one kind has no variance: a root, but no end
    low = -1.0 if b - c == -n else float(brentq(beyond, -1.0, difference - aside, xtol=1e-12))
    high = 1.0 if b - c == n else float(brentq(beyond, difference + aside, 1.0, xtol=1e-12))
    return low, high


def wilson(hits: float, n: float, z: float = Z95) -> Interval:
    """Wilson's interval of a share, hits of n > 0 independent ones (J. Am. Stat. Assoc. 22, 1927).

    (hits + z²/2 ± z √( hits (n - hits) / n + z²/4 )) / (n + z²)
    """
    middle, half = hits + z * z / 2, z * math.sqrt(max(hits * (n - hits) / n, 0.0) + z * z / 4)
    return max((middle - half) / (n + z * z), 0.0), min((middle + half) / (n + z * z), 1.0)


def mean_interval(sums: Floats, counts: Floats) -> Interval | None:
    """95 % interval of the mean over positions; `sums` and `counts` of one text each. None below LEAST_TEXTS texts."""
    if len(sums) < LEAST_TEXTS:
        return None
    mean, error = _mean_and_error(sums, counts)
    half = _t(len(sums)) * error
    return _wider((mean - half, mean + half), _bootstrap(sums, counts))


def positive_mean_interval(sums: Floats, counts: Floats) -> Interval | None:
    """The same of values that are never negative, as KL; the lower end is above 0 unless all are 0.

    The law's part, with s² the variance over G texts of the logs of their means, about the mean m of all positions:

        m exp(± t(0.975, G-1) √( s²/G + s⁴ / (2 (G-1)) ))

    A text's mean below FLOOR × m counts as that: how little a text adds does not say how much another may. Where the
    bootstrap's lower end is no positive number, the law's stands. All sums 0: (0, 0), there was nothing to be seen.
    """
    mean, texts = float(sums.sum() / counts.sum()), len(sums)
    if texts < LEAST_TEXTS or mean <= 0:
        return None if texts < LEAST_TEXTS else (0.0, 0.0)
    variance = float(np.log(np.maximum(sums / counts, FLOOR * mean)).var(ddof=1))
    factor = math.exp(_t(texts) * math.sqrt(variance / texts + variance**2 / (2 * (texts - 1))))
    low, high = _wider((mean / factor, mean * factor), _bootstrap(sums, counts))
    return (low if low > 0 else mean / factor), high


def share_interval(hits: Floats, counts: Floats) -> Interval | None:
    """95 % interval of a share of positions, such as top-1 agreement; `hits` and `counts` of one text each.

    The law's part is Wilson's interval with z = t(0.975, G-1) and n the number of independent positions that would vary
    as much as the texts do, p (1 - p) / error²; all positions where every one or none is a hit, for then nothing tells
    how alike those of one text are.
    """
    texts, positions = len(hits), float(counts.sum())
    if texts < LEAST_TEXTS:
        return None
    share, error = _mean_and_error(hits, counts)
    effective = min(share * (1 - share) / error**2, positions) if error > 0 else positions
    low, high = _wider(wilson(effective * share, effective, _t(texts)), _bootstrap(hits, counts))
    return max(low, 0.0), min(high, 1.0)


def _mean_and_error(sums: Floats, counts: Floats) -> tuple[float, float]:
    """Mean over positions and its standard error over G texts: √( G/(G-1) Σ (sum_i - mean count_i)² ) / Σ count_i."""
    texts, positions = len(sums), float(counts.sum())
    mean = float(sums.sum()) / positions
    residuals = sums - mean * counts
    return mean, math.sqrt(texts / (texts - 1) * float(residuals @ residuals)) / positions


def _bootstrap(sums: Floats, counts: Floats) -> Interval | None:
    """Studentized bootstrap over texts: the ends are m - error × the 97.5 and the 2.5 % quantile of (m* - m) / error*.

    None where there is no error, or a quantile is infinite because too many draws have none.
    """
    mean, error = _mean_and_error(sums, counts)
    if error <= 1e-12 * abs(mean):
        return None
    texts, drawn, residuals = len(sums), _resamples(len(sums)), sums - mean * counts
    positions = drawn @ counts
    moved = drawn @ residuals / positions
    spread = drawn @ residuals**2 - 2 * moved * (drawn @ (residuals * counts)) + moved**2 * (drawn @ counts**2)
    errors = np.sqrt(np.maximum(spread, 0.0) * texts / (texts - 1)) / positions
    flat = errors <= 1e-7 * error
    studentized = np.sort(np.where(flat, np.copysign(np.inf, moved), moved / np.where(flat, 1.0, errors)))
    low, high = mean - error * studentized[-_TAIL], mean - error * studentized[_TAIL - 1]
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


@cache
def _resamples(texts: int) -> Floats:
    """How often each text is in each draw, DRAWS × texts; the same ones for everybody, so that precisions are alike."""
    return np.random.default_rng(0).multinomial(texts, np.full(texts, 1 / texts), size=DRAWS).astype(np.float64)


@cache
def _t(texts: int) -> float:
    return float(student_t.ppf(0.975, texts - 1))


def _wider(one: Interval, other: Interval | None) -> Interval:
    return one if other is None else (min(one[0], other[0]), max(one[1], other[1]))
