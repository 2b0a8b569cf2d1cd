"""Tests and intervals of paired.py: worked by hand, and beside scipy, statsmodels and published examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from harness.analysis import paired
from harness.analysis.paired import (
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    positive_mean_interval,
    share_interval,
    wilson,
)

Interval = Callable[[paired.Floats, paired.Floats], paired.Interval | None]
COUNTS = st.integers(min_value=0, max_value=40)


def test_mcnemar_by_hand() -> None:
    """9 lost, 1 gained: 2 · (C(10,0) + C(10,1)) / 2^10 = 22 / 1024. 4 and 0: 2 / 2^4 = 0.125."""
    assert mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert mcnemar(4, 0) == mcnemar(0, 4) == pytest.approx(0.125)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0


@given(COUNTS, COUNTS)
def test_mcnemar_is_that_of_statsmodels(b: int, c: int) -> None:
    if b + c:
        expected = statsmodels_mcnemar([[50, b], [c, 7]], exact=True).pvalue
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("b", "c", "n", "low", "high"),
    [(1, 7, 21, -0.517, -0.026), (6, 16, 161, -0.1240, -0.0054)],
    ids=["airway hyper-responsiveness", "complete response"],
)
def test_tangos_interval_as_published(b: int, c: int, n: int, low: float, high: float) -> None:
    """Fagerland, Lydersen and Laake (Stat. Med. 33, 2014), and the tests of the R package contingencytables."""
    found = paired_difference(b, c, n)
    assert found == (
        pytest.approx(low, abs=6e-4 if n == 21 else 6e-5),
        pytest.approx(high, abs=6e-4 if n == 21 else 6e-5),
    )


def test_without_a_discordant_pair_it_is_no_point() -> None:
    """± z² / (n + z²) with z² = 3.8415: 30 pairs ± 0.11351, 300 pairs ± 0.012643."""
    assert paired_difference(0, 0, 30) == (pytest.approx(-0.11351, abs=1e-5), pytest.approx(0.11351, abs=1e-5))
    assert paired_difference(0, 0, 300)[1] == pytest.approx(3.841459 / 303.841459, abs=1e-6)


@given(COUNTS, COUNTS, st.integers(min_value=0, max_value=60))
def test_tangos_ends_are_where_the_score_is_z(b: int, c: int, rest: int) -> None:
    """At an end, (b - c - n d)² = z² n (2 q + d (1 - d)), q the maximum of the likelihood, here found by searching."""
    n = b + c + rest
    if n == 0:
        return
    low, high = paired_difference(b, c, n)
    assert -1 <= low < (b - c) / n + 1e-12 and (b - c) / n - 1e-12 < high <= 1 and low < high
    for end in {low, high} - {-1.0, 1.0}:
        q = likeliest(b, c, n, end)
        assert (b - c - n * end) ** 2 == pytest.approx(3.841459 * n * (2 * q + end * (1 - end)), rel=2e-3, abs=2e-3)


def likeliest(b: int, c: int, n: int, d: float) -> float:
    """The share of c-pairs by a search, no formula: b-pairs have the share q + d, and the three add up to 1."""
    low, high = max(0.0, -d), (1 - d) / 2

    def log_likelihood(q: float) -> float:
        shares = ((b, q + d), (c, q), (n - b - c, 1 - 2 * q - d))
        return sum(count * math.log(max(share, 1e-300)) for count, share in shares if count)

    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if log_likelihood(left) < log_likelihood(right) else (low, right)
    return (low + high) / 2


@given(COUNTS, COUNTS, st.integers(min_value=1, max_value=60))
def test_swapping_the_precisions_mirrors_the_interval(b: int, c: int, rest: int) -> None:
    low, high = paired_difference(b, c, b + c + rest)
    assert paired_difference(c, b, b + c + rest) == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


@given(st.integers(min_value=0, max_value=50), st.integers(min_value=0, max_value=50))
def test_wilson_is_that_of_scipy_and_statsmodels(hits: int, misses: int) -> None:
    n = hits + misses
    if n:
        scipy_interval = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx(tuple(scipy_interval), abs=1e-6)
        assert wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-6)


@pytest.mark.parametrize("tests", [1, 2, 5, 12])
def test_holm_is_that_of_statsmodels(tests: int) -> None:
    for p_values in np.random.default_rng(tests).beta(0.4, 3, (2, tests)).round(3):  # rounded: some are equal
        assert holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([]) == []


def test_holm_by_hand() -> None:
    """Of three: 0.01 · 3 = 0.03, 0.02 · 2 = 0.04, and 0.03 · 1 is raised to the 0.04 before it."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


def test_mean_and_error_by_hand() -> None:
    """Texts of (sum, count) (2, 2), (6, 2), (4, 4): m = 12/8 = 1.5; residuals -1, 3, -2; √(3/2 · 14) / 8."""
    sums, counts = np.array([2.0, 6.0, 4.0]), np.array([2.0, 2.0, 4.0])
    assert paired._mean_and_error(sums, counts) == (1.5, pytest.approx(math.sqrt(21) / 8))


@pytest.mark.parametrize("n", [4, 6])
def test_the_bootstrap_by_hand(n: int) -> None:
    """Written out draw by draw: resample texts, t* = (m* - m) / error*, and the ends m - error · t*'s quantiles. Of
    four texts 1.6 % of the draws are one text four times: without an error, they lie beyond all the others."""
    sums, counts = np.array([1.0, 2.0, 4.0, 3.0, 9.0, 5.0])[:n], np.array([4.0, 5.0, 6.0, 4.0, 8.0, 5.0])[:n]
    mean, error = paired._mean_and_error(sums, counts)
    studentized = []
    for draw in paired._resamples(n).astype(int):
        texts = np.repeat(np.arange(n), draw)
        drawn_mean, drawn_error = paired._mean_and_error(sums[texts], counts[texts])
        moved = drawn_mean - mean
        studentized.append(moved / drawn_error if drawn_error > 1e-9 else math.copysign(math.inf, moved))
    low, high = sorted(studentized)[49], sorted(studentized)[1950]
    assert paired._bootstrap(sums, counts) == pytest.approx((mean - high * error, mean - low * error))


def test_resamples_are_whole_draws_and_always_the_same() -> None:
    drawn = paired._resamples(7)
    assert drawn.shape == (paired.DRAWS, 7) and (drawn.sum(axis=1) == 7).all()
    assert drawn.mean() == 1 and drawn.max() >= 4
    paired._resamples.cache_clear()
    assert (paired._resamples(7) == drawn).all()


def test_a_mean_holds_students_interval_and_hardly_more_where_that_is_right() -> None:
    """Normal texts of equal lengths: what scipy's t-test says, widened by at most a fifth."""
    means = np.random.default_rng(4).normal(3, 1, 30)
    low, high = mean_interval(means * 50, np.full(30, 50.0)) or (0.0, 0.0)
    expected = ttest_1samp(means, 0).confidence_interval(0.95)
    assert low <= expected.low + 1e-12 and expected.high <= high + 1e-12
    assert high - low < 1.2 * (expected.high - expected.low)


def test_the_lognormal_part_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four texts of one position: 1, 1, e, e. m = 1.85914; s² = 1/3; √(1/12 + (1/9)/6) = 0.319142; t(0.975, 3) =
    3.182446; factor exp(1.015653) = 2.761166. Alone, with the bootstrap out of the way: m / factor .. m · factor."""
    monkeypatch.setattr(paired, "_bootstrap", lambda *_: None)
    found = positive_mean_interval(np.array([1.0, 1.0, math.e, math.e]), np.ones(4))
    assert found == (pytest.approx(1.859141 / 2.761166, rel=1e-5), pytest.approx(1.859141 * 2.761166, rel=1e-5))


def test_a_text_with_next_to_nothing_counts_as_a_hundredth_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 1, 1, 0: m = 0.75, and ln 0.0075 = -4.892852 for the last; s² = 5.985000; √(s²/4 + s⁴/6) = 2.732451; the
    factor is exp(3.182446 · 2.732451) = 5978."""
    monkeypatch.setattr(paired, "_bootstrap", lambda *_: None)
    found = positive_mean_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4))
    assert found == (pytest.approx(0.75 / 5978, rel=1e-3), pytest.approx(0.75 * 5978, rel=1e-3))


def test_the_share_part_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four texts of 100 with 80, 90, 90, 100 hits: share 0.9, error √(4/3 · 200) / 400 = 0.0408248; 0.09 / error² = 54
    positions that would vary as much. Wilson of 48.6 of 54 with z = t(0.975, 3) = 3.182446, z² = 10.127965:
    (53.663983 ± 3.182446 √(48.6 · 5.4 / 54 + 2.531991)) / 64.127965 = 0.836826 ± 0.134926."""
    monkeypatch.setattr(paired, "_bootstrap", lambda *_: None)
    found = share_interval(np.array([80.0, 90.0, 90.0, 100.0]), np.full(4, 100.0))
    assert found == (pytest.approx(0.836826 - 0.134926, abs=2e-6), pytest.approx(0.836826 + 0.134926, abs=2e-6))


@pytest.mark.parametrize("interval", [mean_interval, positive_mean_interval, share_interval])
def test_both_views_are_in_the_interval(interval: Interval, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider end of each; one text far out makes the bootstrap's upper end the farther one."""
    sums, counts = np.array([1.0, 1.2, 0.9, 1.1, 1.0, 2.5]), np.full(6, 10.0)
    both, drawn = interval(sums, counts), paired._bootstrap(sums, counts)
    monkeypatch.setattr(paired, "_bootstrap", lambda *_: None)
    law = interval(sums, counts)
    assert both and drawn and law and drawn[1] > law[1]
    assert both == (
        min(law[0], drawn[0] if drawn[0] > 0 else law[0]),
        min(drawn[1], 1.0 if interval is share_interval else 9),
    )


def test_agreement_and_disagreement_mirror_each_other() -> None:
    hits, counts = np.array([90.0, 88.0, 97.0, 93.0, 99.0]), np.array([100.0, 100.0, 110.0, 100.0, 120.0])
    agree, disagree = share_interval(hits, counts), share_interval(counts - hits, counts)
    assert agree and disagree
    assert agree == (pytest.approx(1 - disagree[1]), pytest.approx(1 - disagree[0]))


def test_positions_that_all_agree_leave_an_interval() -> None:
    """5 texts of 100, no miss: Wilson with z = t(0.975, 4) = 2.776445 from 500 / (500 + 7.708647) = 0.984817 on."""
    found = share_interval(np.full(5, 100.0), np.full(5, 100.0))
    assert found == (pytest.approx(500 / (500 + 2.776445**2), abs=1e-6), pytest.approx(1.0))


def test_what_never_differs_has_no_distance() -> None:
    assert positive_mean_interval(np.zeros(5), np.full(5, 10.0)) == (0.0, 0.0)
    assert mean_interval(np.zeros(5), np.full(5, 10.0)) == (0.0, 0.0)


def test_a_text_without_any_distance_has_no_log_and_an_interval_all_the_same() -> None:
    low, high = positive_mean_interval(np.array([0.0, 1.0, 2.0, 1.5, 1.0, 0.7]), np.full(6, 10.0)) or (0.0, 0.0)
    assert 0 < low < 6.2 / 60 < high < math.inf


@pytest.mark.parametrize("interval", [mean_interval, positive_mean_interval, share_interval])
def test_three_texts_are_too_few(interval: Interval) -> None:
    sums = np.array([1.0, 2.0, 1.5, 1.7])
    assert interval(sums[:3], np.full(3, 10.0)) is None
    assert interval(sums, np.full(4, 10.0)) is not None


@given(st.lists(st.floats(min_value=0, max_value=5), min_size=4, max_size=12), st.integers(min_value=1, max_value=30))
def test_intervals_are_finite_ordered_and_hold_the_estimate(values: list[float], count: int) -> None:
    counts = np.full(len(values), float(count))
    sums = np.array(values)
    mean = sums.sum() / counts.sum()
    for interval in (mean_interval(sums, counts), positive_mean_interval(sums, counts)):
        assert interval is not None and np.isfinite(interval).all()
        assert interval[0] <= mean + 1e-9 and mean - 1e-9 <= interval[1]
    low, high = share_interval(np.minimum(np.floor(sums), counts), counts) or (2.0, 2.0)
    assert 0 <= low <= high <= 1
