"""How sure a percentile is: its 95 % interval from the requests of one run, which are not independent of each other.

If they were, nothing would have to be assumed about their distribution. Of n values B ~ Binomial(n, q) lie below the
true q-th percentile, so with x₁ ≤ x₂ ≤ … the values in order of size

    P(x_i ≤ truth < x_j) = P(i ≤ B < j)          i = B's 2.5 % quantile, j = its 97.5 % quantile + 1

(David & Nagaraja, Order Statistics, 3rd ed. 2003, section 7.1). Of 120 requests p95 lies between the 109th and the
119th. A bootstrap cannot do as well: it never draws more than was seen, and above p95 six of 120 were seen. Below 72
requests not even the slowest is surely above p95; the upper end is then as far from the middle as the lower, in logs.

In a queue all wait longer at once: what a request met, the next one meets too. n latencies then say as much about
their level as n / τ independent ones, τ their autocorrelation time, and p95 moves with the level. The two errors add up
as variances; s is the standard deviation of the logs, l the end above as a distance in logs:

    l' = √( l² + (1.96 s)² (τ − 1) / n )

How often such intervals hold the truth of a queueing network that can be computed: docs/knees.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Floats = NDArray[np.float64]

LEAST = 20
"""Values below which there is no interval."""
Z95 = 1.959964
"""97.5 % quantile of the normal distribution."""


def interval(values: Sequence[float] | Floats, q: float) -> tuple[float, float] | None:
    """95 % interval of the q-th percentile (0..100) of values in the order in which their requests began."""
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < LEAST:
        return None
    ordered, middle = np.sort(series), float(np.percentile(series, q))
    first, last = ranks(n, q)
    low = float(ordered[max(first, 1) - 1])
    if low <= 0:  # a share of the latencies is no time at all: there are no logs to count in
        return min(low, middle), float(ordered[min(last, n) - 1])
    down = math.log(middle / low)
    up = math.log(ordered[last - 1] / middle) if last <= n else max(down, math.log(ordered[-1] / middle))
    logs = np.log(np.maximum(series, ordered[ordered > 0][0]))
    shift = Z95**2 * float(logs.var()) * (autocorrelation_time(logs) - 1) / n
    return middle * math.exp(-math.sqrt(down**2 + shift)), middle * math.exp(math.sqrt(up**2 + shift))


@cache
def ranks(n: int, q: float) -> tuple[int, int]:
    """(i, j): between the i-th and the j-th of n values, counted from 1, lies the q-th percentile; j may be n + 1."""
    return int(binom.ppf(0.025, n, q / 100)), int(binom.ppf(0.975, n, q / 100)) + 1


def autocorrelation_time(series: Floats) -> float:
    """τ = 1 + 2 Σ ρ_k of a series, at least 1, by Geyer's initial monotone sequence (Stat. Sci. 7, 1992).

    Sums of neighbours, ρ_2m + ρ_2m+1, are positive and fall in any reversible chain: they are added up until one is
    not positive, and none counts for more than the one before it. What follows is noise.
    """
    n = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    if variance <= 1e-24 * max(1.0, float(series @ series)):
        return 1.0
    spectrum = np.abs(np.fft.rfft(centred, 2 * n)) ** 2
    correlations = np.fft.irfft(spectrum)[: n - n % 2] / variance
    pairs = np.minimum.accumulate(correlations.reshape(-1, 2).sum(axis=1))
    return max(1.0, 2 * float(pairs[pairs > 0].sum()) - 1)
