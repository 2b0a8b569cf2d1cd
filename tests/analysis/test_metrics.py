"""Formulas by hand-worked tables, and the bootstrap against scipy's and against known coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.analysis import metrics
from harness.records import RequestRecord

MS = 1_000_000


def request(
    start_ms: int,
    chunks_ms: tuple[int, ...],
    tokens: tuple[int, ...] | None = None,
    usage: int | None = None,
    **more: object,
) -> RequestRecord:
    """A measured request meant at `start_ms`, with token-bearing chunks so many ms later."""
    tokens = tokens or (1,) * len(chunks_ms)
    return RequestRecord(
        "cell", 0, 0, "measured",
        intended_ns=start_ms * MS,
        sent_ns=start_ms * MS,
        first_token_ns=(start_ms + chunks_ms[0]) * MS if chunks_ms else None,
        last_token_ns=(start_ms + chunks_ms[-1]) * MS if chunks_ms else None,
        completion_tokens=sum(tokens) if usage is None else usage,
        chunk_ids=usage is None,
        chunk_us=tuple(chunk * 1000 for chunk in chunks_ms),
        chunk_tokens=tokens,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_ttft_e2e_tpot() -> None:
    """Chunks at 50, 70, 130 ms carrying 1, 2, 2 tokens: TTFT 50, E2E 130, TPOT (130 - 50) / (5 - 1) = 20."""
    record = request(1000, (50, 70, 130), (1, 2, 2))
    assert (metrics.ttft_ms(record), metrics.e2e_ms(record), metrics.tpot_ms(record)) == (50, 130, 20)


def test_tpot_counts_tokens_by_usage_never_chunks() -> None:
    """Three chunks, but the server counts nine tokens: (130 - 50) / 8 = 10."""
    assert metrics.tpot_ms(request(0, (50, 70, 130), usage=9)) == 10


def test_one_token_has_no_tpot_and_no_answer_has_no_times() -> None:
    assert metrics.tpot_ms(request(0, (50,))) is None
    nothing = request(0, ())
    assert metrics.ttft_ms(nothing) is metrics.e2e_ms(nothing) is metrics.tpot_ms(nothing) is None


def test_throughput_counts_tokens_where_they_arrive() -> None:
    """Window 1,000..3,000 ms. One request's tokens at 900, 1,100, 1,500; another's at 2,900, 3,100: 3 tokens / 2 s."""
    records = [request(500, (400, 600, 1000)), request(2500, (400, 600))]
    assert metrics.throughput_tok_s(records, 1000 * MS, 3000 * MS) == 1.5


def test_chunks_without_ids_share_the_usage_evenly() -> None:
    """Two chunks, six tokens by usage, one chunk inside the window: 3 tokens / 1 s."""
    records = [request(0, (500, 1500), usage=6)]
    assert metrics.throughput_tok_s(records, 0, 1000 * MS) == 3


def test_missing_stays_missing() -> None:
    assert metrics.percentile([], 95) is None
    assert metrics.percentile([1.0] * 19, 95, metrics.MIN_P95) is None
    found = metrics.summarise([], None, None)
    assert found["p95_ms"] is None and found["output_tokens_mean"] is None and "tok_s" not in found


def test_failed_requests_are_counted_and_not_measured() -> None:
    good = [request(i, (50, 60)) for i in range(30)]
    bad = [request(i, (9999, 99999), error="timeout") for i in range(3)]
    found = metrics.summarise(good + bad, 0, 1000 * MS)
    assert (found["requests"], found["errors"], found["p95_ms"]) == (30, 3, 60)


def test_percentile_interval_agrees_with_scipy_on_independent_values() -> None:
    """For independent draws blocks do no harm: the interval is close to scipy's ordinary bootstrap."""
    values = np.random.default_rng(1).lognormal(3, 0.4, 400)
    low, high = metrics.percentile_interval(values, 95) or (0, 0)
    theirs = stats.bootstrap((values,), lambda x, axis: np.percentile(x, 95, axis=axis), method="percentile", rng=2)
    span = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.35 * span)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.35 * span)


def test_the_interval_covers_the_truth() -> None:
    """Correlated latencies (AR(1), 0.3) of known median: 95 % intervals hold it in at least 88 % of 200 runs."""
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        noise = rng.normal(size=220)
        for i in range(1, len(noise)):
            noise[i] = 0.3 * noise[i - 1] + noise[i]
        interval = metrics.block_bootstrap(100 + noise[20:], lambda x: np.percentile(x, 50, axis=1), seed=trial)
        assert interval is not None
        hits += interval[0] <= 100 <= interval[1]
    assert hits >= 176


def test_too_few_values_have_no_interval() -> None:
    assert metrics.percentile_interval([1.0] * 19, 95) is None
