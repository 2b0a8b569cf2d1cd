"""Paired ratios: scipy is the oracle of both bases, a known truth that of the coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from harness.analysis.compare import Estimate, compare, paired_percentile_ratio, throughput_ratio
from harness.records import Cell, Ratio, RequestRecord, SweepPoint

MS = 1_000_000


def row(precision: str, tok_s: float, repeat: int = 1, conc: int = 8, **more: object) -> SweepPoint:
    """A session's row; its latencies are 100, 200 and 300 s over its tok_s."""
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.9, "tok_s_hi": tok_s * 1.1, "p95_ms": 1e5 / tok_s, "ttft_p50_ms": 2e5 / tok_s,
        "tpot_p50_ms": 3e5 / tok_s, "verdict": "valid", **more,
    }  # fmt: skip
    return SweepPoint("run", precision, conc, tok_s=tok_s, repeat=repeat, **values)  # type: ignore[arg-type]


def sessions(base: Sequence[float], other: Sequence[float], conc: int = 8) -> list[SweepPoint]:
    points = [row("bf16", value, repeat, conc) for repeat, value in enumerate(base, start=1)]
    return points + [row("awq", value, repeat, conc) for repeat, value in enumerate(other, start=1)]


def answers(precision: str, e2e_ms: Sequence[float], conc: int = 8, **more: object) -> list[RequestRecord]:
    """Requests of one cell, ten a user, one begun each ms; TTFT is a tenth of E2E, TPOT a hundredth."""
    cell = Cell(precision, conc, 1, more.pop("rate_rps", None)).key  # type: ignore[arg-type]
    made = []
    for number, total in enumerate(e2e_ms):
        start, first, last = number * MS, number * MS + int(total * MS / 10), number * MS + int(total * MS)
        values = {"phase": "measured", "first_token_ns": first, "last_token_ns": last, "completion_tokens": 91, **more}
        made.append(RequestRecord(cell, number % 10, number // 10, intended_ns=start, **values))  # type: ignore[arg-type]
    return made


def correlated(seed: int, n: int, truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Two series whose true ratio is `truth`: a common part (the prompt), and AR(1) noise of 0.3 of their own.

    Their logs correlate with 0.2² / (0.2² + 0.1² / (1 − 0.3²)) = 0.78.
    """
    rng = np.random.default_rng(seed)
    own = rng.normal(0, 0.1, (2, n))
    for i in range(1, n):
        own[:, i] += 0.3 * own[:, i - 1]
    series = 1000 * np.exp(rng.normal(0, 0.2, n) + own)
    return series[0], truth * series[1]


def only(lines: Sequence[Ratio], metric: str) -> Ratio:
    (line,) = (line for line in lines if line.metric == metric)
    return line


# --- sessions ---------------------------------------------------------------------------------------------------------

BASE, OTHER = (100.0, 110.0, 95.0, 104.0), (130.0, 139.0, 128.0, 131.0)


def test_sessions_agree_with_scipys_paired_t_test_on_logs() -> None:
    theirs = stats.ttest_rel(np.log(OTHER), np.log(BASE)).confidence_interval(0.95)
    line = only(compare(sessions(BASE, OTHER), []), "tok_s")
    assert (line.precision, line.baseline, line.conc, line.pairs, line.basis) == ("awq", "bf16", 8, 4, "sessions")
    assert line.ratio == pytest.approx(stats.gmean(OTHER) / stats.gmean(BASE))
    assert (line.ratio_lo, line.ratio_hi) == (pytest.approx(np.exp(theirs.low)), pytest.approx(np.exp(theirs.high)))


def test_each_metric_is_the_ratio_of_its_own_column() -> None:
    """Latencies are the reciprocal of tok_s here, so their ratios are, ends swapped."""
    lines = compare(sessions(BASE, OTHER), [])
    assert [line.metric for line in lines] == ["tok_s", "p95_ms", "ttft_p50_ms", "tpot_p50_ms"]
    tok_s = lines[0]
    assert tok_s.ratio and tok_s.ratio_lo and tok_s.ratio_hi
    for line in lines[1:]:
        inverse = (1 / tok_s.ratio, 1 / tok_s.ratio_hi, 1 / tok_s.ratio_lo)
        assert (line.ratio, line.ratio_lo, line.ratio_hi) == pytest.approx(inverse)


def test_ten_sessions_and_more_are_resampled() -> None:
    """scipy's percentile bootstrap of the mean log ratio, by other draws: the same to a tenth of its width."""
    rng = np.random.default_rng(5)
    base = 100 * np.exp(rng.normal(0, 0.2, 12))
    other = 1.2 * base * np.exp(rng.exponential(0.1, 12))
    theirs = stats.bootstrap((np.log(other / base),), np.mean, method="percentile", rng=9).confidence_interval
    line = only(compare(sessions(base, other), []), "tok_s")
    assert line.ratio_lo is not None and line.ratio_hi is not None
    ends = np.log([line.ratio_lo, line.ratio_hi])
    assert ends == pytest.approx([theirs.low, theirs.high], abs=0.1 * (theirs.high - theirs.low))
    student = stats.ttest_1samp(np.log(other / base), 0).confidence_interval(0.95)
    assert ends[1] - ends[0] < 0.95 * (student.high - student.low)  # else the two could not be told apart


def test_an_invalid_session_takes_its_partner_along() -> None:
    points = sessions(BASE, OTHER)
    points[1] = replace(points[1], verdict="invalid", tok_s=1.0)  # BF16, repeat 2
    fewer = sessions((100.0, 95.0, 104.0), (130.0, 128.0, 131.0))
    assert [replace(line, pairs=3) for line in compare(points, [])] == compare(fewer, [])


def test_a_missing_figure_takes_its_pair_along_for_that_metric_alone() -> None:
    points = sessions(BASE, OTHER)
    points[5] = replace(points[5], p95_ms=None)
    assert {line.metric: line.pairs for line in compare(points, [])} == {
        "tok_s": 4, "p95_ms": 3, "ttft_p50_ms": 4, "tpot_p50_ms": 4,
    }  # fmt: skip


def test_the_last_attempt_of_a_session_is_the_one_that_counts() -> None:
    again = [row("awq", 130.0, repeat=1, attempt=2), *sessions(BASE, (1.0, *OTHER[1:]))]
    assert compare(again, []) == compare(sessions(BASE, OTHER), [])


def test_a_load_that_only_one_has_gets_no_line() -> None:
    points = [*sessions(BASE, OTHER), row("awq", 200.0, 1, conc=16), row("awq", 200.0, 2, conc=16)]
    assert {line.conc for line in compare(points, [])} == {8}


def test_one_precision_has_nothing_to_compare() -> None:
    assert compare([row("awq", 1.0, repeat) for repeat in (1, 2)], []) == []


def test_every_precision_is_compared_with_bf16_wherever_it_stands() -> None:
    points = [row(name, value, repeat) for repeat in (1, 2) for name, value in (("awq", 2.0), ("rtn", 3), ("bf16", 1))]
    found = {(line.precision, line.baseline): line.ratio for line in compare(points, []) if line.metric == "tok_s"}
    assert found == {("awq", "bf16"): pytest.approx(2), ("rtn", "bf16"): pytest.approx(3)}


def test_rates_of_an_open_loop_are_loads_of_their_own() -> None:
    """Twice at 2 req/s, three times at 4; all have conc 0."""
    points = [
        row(name, factor * noise, repeat, 0, arrivals="poisson", rate_rps=rate)
        for rate, gain in ((4.0, 3.0), (2.0, 2.0))
        for name, factor in (("bf16", 1.0), ("awq", gain))
        for repeat, noise in ((1, 1.0), (2, 1.1))
    ]
    found = [(line.rate_rps, line.ratio) for line in compare(points, []) if line.metric == "tok_s"]
    assert found == [(2.0, pytest.approx(2)), (4.0, pytest.approx(3))]


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [50, 95])
def test_intervals_over_pairs_cover_the_truth(q: float) -> None:
    """200 made runs of 120 strongly correlated pairs, true ratio 0.8: 88 to 99 % of the intervals hold it."""
    found = [paired_percentile_ratio(*correlated(seed, 120, 0.8), q) for seed in range(200)]
    hits = sum((one.lo or 9) <= 0.8 <= (one.hi or 0) for one in found)
    assert 176 <= hits <= 198


@pytest.mark.parametrize(("metric", "q", "share"), [("p95_ms", 95, 1.0), ("ttft_p50_ms", 50, 0.1)])
def test_pairs_agree_with_scipys_paired_bootstrap_and_beat_the_unpaired_one(
    metric: str, q: float, share: float
) -> None:
    """Noise is independent from pair to pair here: blocks do no harm, and scipy's ordinary bootstrap is the oracle."""
    rng = np.random.default_rng(2)
    common, own = rng.normal(0, 0.4, 500), rng.normal(0, 0.1, (2, 500))
    base, other = 1000 * np.exp(common + own[0]), 800 * np.exp(common + own[1])
    requests = [*answers("bf16", base), *answers("awq", other)]
    line = only(compare([row("bf16", 100.0), row("awq", 100.0)], requests), metric)
    assert (line.pairs, line.basis) == (500, "requests")
    assert line.ratio == pytest.approx(np.percentile(other, q) / np.percentile(base, q), rel=1e-6)

    def ratio(x: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(np.percentile(share * x, q, axis=axis) / np.percentile(share * b, q, axis=axis))

    paired, apart = (
        stats.bootstrap((other, base), ratio, paired=pairs, n_resamples=1000, method="percentile", rng=3)
        for pairs in (True, False)
    )
    assert line.ratio_lo is not None and line.ratio_hi is not None
    width = line.ratio_hi - line.ratio_lo
    assert width == pytest.approx(paired.confidence_interval.high - paired.confidence_interval.low, rel=0.25)
    assert width < 0.65 * (apart.confidence_interval.high - apart.confidence_interval.low)


def test_requests_are_paired_by_user_and_sequence_not_by_place() -> None:
    """Half of the precision's requests are missing and the rest come in another order; each is twice its partner."""
    base = np.random.default_rng(1).lognormal(6, 0.5, 60)
    theirs, ours = answers("bf16", base), answers("awq", 2 * base)
    line = only(compare([row("bf16", 1.0), row("awq", 1.0)], theirs + ours[::-2]), "p95_ms")
    assert line.pairs == 30
    assert (line.ratio, line.ratio_lo, line.ratio_hi) == pytest.approx((2, 2, 2), rel=1e-4)


def test_only_what_both_were_asked_alike_and_answered_in_the_window_is_a_pair() -> None:
    base, other = answers("bf16", [100.0] * 30), answers("awq", [100.0] * 30)
    other[0] = replace(other[0], error="timeout")
    other[1] = replace(other[1], phase="held")
    other[2] = replace(other[2], output_tokens_asked=99)
    assert only(compare([row("bf16", 1.0), row("awq", 1.0)], base + other), "p95_ms").pairs == 27


def test_requests_of_a_lost_attempt_are_no_pairs() -> None:
    points = [row("bf16", 1.0), row("awq", 1.0, attempt=2)]
    lost, kept = answers("awq", [900.0] * 40), answers("awq", [200.0] * 30, attempt=2)
    line = only(compare(points, answers("bf16", [100.0] * 40) + lost + kept), "p95_ms")
    assert (line.ratio, line.pairs) == (pytest.approx(2), 30)


def test_arrivals_of_an_open_loop_are_pairs() -> None:
    points = [row(name, 1.0, 1, 0, arrivals="poisson", rate_rps=2.5) for name in ("bf16", "awq")]
    requests = answers("bf16", [100.0] * 30, 0, rate_rps=2.5) + answers("awq", [150.0] * 30, 0, rate_rps=2.5)
    line = only(compare(points, requests), "p95_ms")
    assert (line.ratio, line.rate_rps, line.conc) == (pytest.approx(1.5), 2.5, 0)


def test_fewer_than_twenty_pairs_have_the_rows_ratio_and_no_interval() -> None:
    """19 pairs whose times say 3, rows that say 2 (tok_s 100 against 50)."""
    requests = answers("bf16", [100.0] * 19) + answers("awq", [300.0] * 19)
    for line in compare([row("bf16", 100.0), row("awq", 50.0)], requests):
        assert line.ratio == pytest.approx(0.5 if line.metric == "tok_s" else 2.0)
        assert (line.ratio_lo, line.ratio_hi, line.pairs) == (None, None, 19)


def test_one_session_of_each_without_requests_has_no_line() -> None:
    assert compare([row("bf16", 100.0), row("awq", 50.0)], []) == []


def test_two_sessions_of_which_one_pair_is_left_are_paired_by_request() -> None:
    points = sessions((100.0, 100.0), (50.0, 50.0))
    points[3] = replace(points[3], verdict="invalid")
    requests = answers("bf16", [100.0] * 30) + answers("awq", [300.0] * 30)
    assert {(line.basis, line.pairs) for line in compare(points, requests)} == {("requests", 30)}


def test_throughput_of_two_windows_by_hand() -> None:
    """100 [80–125] and 200 [160–250]: half-widths ln 1.25, together √2 · ln 1.25 = 0.31557: 2 × e^∓0.31557."""
    base = SweepPoint("r", "bf16", 8, tok_s=100.0, tok_s_lo=80.0, tok_s_hi=125.0, verdict="valid")
    other = SweepPoint("r", "awq", 8, tok_s=200.0, tok_s_lo=160.0, tok_s_hi=250.0, verdict="valid")
    ratio = throughput_ratio([(base, other)])
    assert (ratio.value, ratio.lo, ratio.hi) == (2.0, pytest.approx(1.4587, abs=1e-4), pytest.approx(2.7421, abs=1e-4))
    requests = answers("bf16", [100.0] * 30) + answers("awq", [100.0] * 30)
    line = only(compare([base, other], requests), "tok_s")
    assert (line.ratio, line.ratio_lo, line.ratio_hi) == (ratio.value, ratio.lo, ratio.hi)


def test_no_pairs_have_no_throughput() -> None:
    assert throughput_ratio([]) == Estimate()
