"""Intervals of percentiles: ranks by hand, coverage where the truth is known, correlation, and what has no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from harness.analysis.percentiles import autocorrelation_time, interval, ranks


def test_ranks_of_p95_by_hand() -> None:
    """Of 120 values Binomial(120, 0.95) lie below p95: P(at most 108) = 1.7 %, at most 109: 3.8 %, at most 117: 94.2 %,
    at most 118: 98.4 %. So 2.5 % fall at 109 and 97.5 % at 118, and p95 lies between the 109th and the 119th."""
    assert [round(float(binom.cdf(k, 120, 0.95)), 3) for k in (108, 109, 117, 118)] == [0.017, 0.038, 0.942, 0.984]
    assert ranks(120, 95) == (109, 119)


def shuffled(values: list[float]) -> list[float]:
    return [values[at] for at in np.random.default_rng(0).permutation(len(values))]


def test_ends_are_those_values() -> None:
    """1..120 ms in no order: nothing is correlated, so the ends are the 109th and the 119th value as they are."""
    values = [float(value) for value in range(1, 121)]
    series = next(found for found in (shuffled(values[at:] + values[:at]) for at in range(120)) if tau(found) == 1)
    assert interval(series, 95) == (pytest.approx(109.0), pytest.approx(119.0))


def tau(series: list[float]) -> float:
    return autocorrelation_time(np.log(series))


def test_few_values_have_an_upper_end_as_far_as_the_lower() -> None:
    """Of 60 values the slowest lies below p95 with 0.95^60 = 4.6 %: the upper end is middle² / lower, or the slowest.

    Values e^0.01, e^0.02, ... e^0.60: p95 is at position 56.05, e^0.5705; the lower end has rank 53: e^0.53, 0.0405
    below in logs; the slowest, e^0.60, is 0.0295 above. So the upper end is e^0.611.
    """
    assert ranks(60, 95) == (53, 61)
    values = [math.exp(at / 100) for at in range(1, 61)]
    orders = (np.random.default_rng(seed).permutation(60) for seed in range(100))
    series = next(found for order in orders if tau(found := [values[at] for at in order]) == 1)
    low, high = interval(series, 95) or (0.0, 0.0)
    middle = float(np.percentile(values, 95))
    assert math.log(low) == pytest.approx(0.53)
    assert math.log(high) == pytest.approx(2 * math.log(middle) - 0.53) == pytest.approx(0.611, abs=0.001)


@pytest.mark.parametrize("least", [60, 120, 400])
@pytest.mark.parametrize("distribution", ["exponential", "lognormal", "uniform"])
def test_independent_values_are_covered_whatever_their_distribution(distribution: str, least: int) -> None:
    """95 % intervals hold the true p95 in at least 93 % of 500 runs."""
    truth = {"exponential": math.log(20), "lognormal": math.exp(1.6448536), "uniform": 0.95}[distribution]
    rng = np.random.default_rng(least)
    found = [interval(getattr(rng, distribution)(size=least), 95) for _ in range(500)]
    assert sum(low <= truth <= high for low, high in filter(None, found)) >= 465


def correlated(rho: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """ln x is a first-order autoregression of variance 1, so that p95 = e^1.645 and τ = (1 + ρ) / (1 − ρ)."""
    noise = rng.normal(size=n + 100)
    for at in range(1, len(noise)):
        noise[at] = rho * noise[at - 1] + math.sqrt(1 - rho**2) * noise[at]
    return np.asarray(noise[100:])


def test_autocorrelation_time_of_an_autoregression() -> None:
    """ρ = 0.8: τ = 1.8 / 0.2 = 9; without correlation 1."""
    rng = np.random.default_rng(2)
    times = [autocorrelation_time(correlated(0.8, 4000, rng)) for _ in range(30)]
    assert np.mean(times) == pytest.approx(9, rel=0.1)
    assert np.mean([autocorrelation_time(rng.normal(size=4000)) for _ in range(30)]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("rho", "least"), [(0.3, 0.94), (0.6, 0.92), (0.8, 0.84)])
def test_correlated_values_are_covered(rho: float, least: float) -> None:
    """Of 240 values. At ρ = 0.8 they say as much about their level as 27 would, and the spread itself is hardly known:
    95 % is not reached, but 71 % is what the ranks alone give."""
    rng = np.random.default_rng(4)
    found = [interval(np.exp(correlated(rho, 240, rng)), 95) for _ in range(300)]
    assert np.mean([low <= math.exp(1.6448536) <= high for low, high in filter(None, found)]) >= least


def test_half_the_spread_is_half_the_interval() -> None:
    """In logs all of it, the ranks' part and the correlation's, is in proportion to the spread of the latencies; and
    the unit does not matter."""
    logs = correlated(0.8, 240, np.random.default_rng(5))
    whole, half = interval(np.exp(logs), 95), interval(1000 * np.exp(logs / 2), 95)
    assert whole is not None and half is not None
    assert np.log(half) - math.log(1000) == pytest.approx(np.log(whole) / 2)


def test_series_without_spread_or_length() -> None:
    assert autocorrelation_time(np.full(50, 3.0)) == 1
    assert interval([5.0] * 50, 95) == (pytest.approx(5.0), pytest.approx(5.0))
    assert interval([1.0] * 19, 95) is None


def test_a_latency_of_nothing() -> None:
    """Zeros have no logs: the ends are the values at the ranks, and no number is missing."""
    low, high = interval([0.0] * 115 + [1.0, 2.0, 3.0, 4.0, 5.0], 95) or (-1.0, -1.0)
    assert (low, high) == (0.0, 4.0)
