"""Each reason has a case that provokes it and one that must not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.analysis.validity import Conditions, judge
from harness.records import RequestRecord

MS = 1_000_000


def good(n: int = 120, **changes: object) -> list[RequestRecord]:
    """Requests as a healthy cell has them: TTFT 100 ms, 10 ms a token, kernel stamps, lengths as asked."""
    records = []
    for i in range(n):
        start = 1000 * MS + i * 10 * MS
        record = RequestRecord(
            "cell", 0, i, "measured", start, start + 100_000, start + 100 * MS, start + 190 * MS, start + 191 * MS,
            input_tokens_asked=32, output_tokens_asked=10, prompt_tokens=32, completion_tokens=10,
            clock="kernel", reads=10, chunk_ids=True,
            chunk_us=tuple(100_000 + 10_000 * k for k in range(10)), chunk_tokens=(1,) * 10,
        )  # fmt: skip
        records.append(replace(record, **changes))  # type: ignore[arg-type]
    return records


def test_a_healthy_point_is_valid() -> None:
    assert judge(good(), 5.0, Conditions(loop_lag_p99_ms=40.0)) == ("valid", ()), (
        "a late loop under kernel stamps is fine"
    )


@pytest.mark.parametrize(
    ("records", "conditions", "verdict", "reason"),
    [
        (good(99), Conditions(), "suspect", "too_few_samples"),
        (good(19), Conditions(), "invalid", "too_few_samples"),
        (good(100) + good(1, error="timeout"), Conditions(), "suspect", "errors"),
        (good(100) + good(10, error="timeout"), Conditions(), "invalid", "errors"),
        (good(sent_ns=1000 * MS + 9 * MS * 200), Conditions(), "invalid", "client_bound"),
        (good(coalesced_reads=2), Conditions(), "invalid", "client_bound"),
        (good(clock="user"), Conditions(loop_lag_p99_ms=40.0), "invalid", "client_bound"),
        (good(), Conditions(prefix_hit_share=0.2), "invalid", "cache_warm"),
        (good(completion_tokens=9), Conditions(), "suspect", "length_mismatch"),
        (good(prompt_tokens=31), Conditions(), "suspect", "length_mismatch"),
        (good(completion_tokens=None), Conditions(exact_lengths=False), "suspect", "length_mismatch"),
        (good(), Conditions(preemptions=3), "suspect", "preempting"),
        (good(), Conditions(quantized=True, kernel="AWQLinearKernel (dequantize)"), "suspect", "slow_kernel"),
        (good(), Conditions(gave_up="20 requests in a row failed"), "invalid", "gave_up"),
    ],
)
def test_each_reason(records: list[RequestRecord], conditions: Conditions, verdict: str, reason: str) -> None:
    found, reasons = judge(records, 5.0, conditions)
    assert found == verdict
    assert reason in reasons


def test_a_window_that_never_opened_is_invalid() -> None:
    assert judge(good(), None, Conditions()) == ("invalid", ("no_window",))


def later(record: RequestRecord, last_ms: int, **changes: object) -> RequestRecord:
    """The same request ten seconds later, its last token `last_ms` after its start."""
    start = record.intended_ns + 10_000 * MS
    moved = replace(record, intended_ns=start, sent_ns=start, first_token_ns=start + 100 * MS)
    return replace(moved, last_token_ns=start + last_ms * MS, **changes)  # type: ignore[arg-type]


def test_drift_is_seen_in_tpot_and_not_in_lengths() -> None:
    """TPOT goes from 10 to 14.4 ms: drift. E2E triples because answers are three times as long: none."""
    slower = [later(record, 230) for record in good(60)]
    assert judge(good(60) + slower, 5.0, Conditions())[1] == ("drifting",)
    tokens = {"completion_tokens": 30, "output_tokens_asked": 30, "chunk_tokens": (3,) * 10}
    longer = [later(record, 390, **tokens) for record in good(60)]
    assert judge(good(60) + longer, 5.0, Conditions()) == ("valid", ())


@pytest.mark.parametrize("kernel", ["CPUWNA16LinearKernel", "MarlinLinearKernel", "MacheteLinearKernel"])
def test_fused_kernels_are_fast(kernel: str) -> None:
    assert judge(good(), 5.0, Conditions(quantized=True, kernel=kernel)) == ("valid", ())
