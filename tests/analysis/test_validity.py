"""Each reason on both sides of its threshold, from records and rows made by hand; test_verdicts.py provokes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest

from harness.analysis import validity
from harness.analysis.validity import Conditions, judge, worsen
from harness.records import RequestRecord, SweepPoint, Verdict

MS = 1_000_000
Records = Sequence[RequestRecord]
POINT = SweepPoint("run", "awq", 8, window_s=5.0, ttft_p50_ms=100.0, requests=120)
"""A row whose every other figure is missing: nothing to blame."""
PLAIN = Conditions()


def request(
    number: int, *, ttft_ms: float = 100.0, answer_ms: float = 90.0, lag_ms: float = 0.0, tokens: int = 10, **more: Any
) -> RequestRecord:
    """One a 10 ms, sent `lag_ms` late; the server takes `ttft_ms` for the first token and `answer_ms` for the rest."""
    intended = 1000 * MS + number * 10 * MS
    sent = intended + round(lag_ms * MS)
    first = sent + round(ttft_ms * MS)
    last = first + round(answer_ms * MS)
    record = RequestRecord(
        "cell", 0, number, "measured", intended, 1, sent, first, last, last,
        input_tokens_asked=32, output_tokens_asked=tokens, prompt_tokens=32, completion_tokens=tokens,
        clock="kernel", reads=10, chunk_ids=True, chunk_us=(0,) * tokens, chunk_tokens=(1,) * tokens,
    )  # fmt: skip
    return replace(record, **more)


def good(n: int = 120, **more: Any) -> list[RequestRecord]:
    """Requests of a healthy cell: TTFT 100 ms, 10 ms a token, kernel stamps, lengths as asked."""
    return [request(number, **more) for number in range(n)]


def some(bad: int, n: int = 100, **more: Any) -> list[RequestRecord]:
    """A healthy cell in which so many requests, evenly spread, are otherwise."""
    return [request(number, **(more if number % (n // bad) == 0 else {})) for number in range(n)]


def reasons(records: Records, conditions: Conditions = PLAIN, **row: Any) -> tuple[str, ...]:
    return judge(records, replace(POINT, **row), conditions)[1]


def test_a_healthy_point_is_valid() -> None:
    assert judge(good(), POINT, PLAIN) == ("valid", ())


def test_no_load_of_the_host_can_spoil_a_point() -> None:
    """A CPU engine shares our cores. What was not asked cannot be held against anyone: no input tells of a CPU."""
    names = [field.name for record in (Conditions, SweepPoint, RequestRecord) for field in fields(record)]
    assert not [name for name in names if "cpu" in name or "load" in name]
    # A loop that was late all the time, on stamps that the kernel made before it woke, and everything at its bound.
    busy = {"loop_lag_p99_ms": 500.0, "coalesced_share": 0.05, "chunks_s": 9e9, "clock_step_ms": -1.0}
    assert judge(good(lag_ms=2.0), replace(POINT, **busy), PLAIN) == ("valid", ())


# --- counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (100, ("valid", ())),
        (99, ("suspect", ("too_few_samples",))),
        (20, ("suspect", ("too_few_samples",))),
        (19, ("invalid", ("too_few_samples",))),
        (0, ("invalid", ("too_few_samples",))),
    ],
)
def test_too_few_samples(n: int, expected: tuple[Verdict, tuple[str, ...]]) -> None:
    """What did not end well, or was no part of the window, is no sample."""
    others = [
        *good(50, error="timeout"), *good(50, phase="warmup"), *good(50, phase="held"), *good(50, error="cut"),
    ]  # fmt: skip
    assert judge(good(n) + others, POINT, PLAIN) == expected


@pytest.mark.parametrize(
    ("ended_well", "failed", "verdict"),
    [(190, 0, "valid"), (190, 1, "suspect"), (191, 10, "suspect"), (190, 10, "invalid")],
)
def test_errors(ended_well: int, failed: int, verdict: str) -> None:
    """10 of 201 are 4.98 %, 10 of 200 are 5 %."""
    found = judge(good(ended_well), replace(POINT, errors=failed), PLAIN)
    assert found == (verdict, ("errors",) if failed else ())


# --- client_bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lag_ms", "marked"), [(2.0, False), (2.001, True)])
def test_half_of_all_requests_late(lag_ms: float, marked: bool) -> None:
    """TTFT 100 ms: 2 ms are far from 5 % of any p95, and yet every figure is shifted."""
    records = [request(number, lag_ms=lag_ms if number % 2 == 0 else 0.0) for number in range(101)]
    assert reasons(records) == (("client_bound",) if marked else ())


@pytest.mark.parametrize(
    ("ttft_ms", "lag_ms", "marked"),
    [
        (100.0, 5.0, False),  # 5 % of 100 ms
        (100.0, 5.1, True),
        (10.0, 2.0, False),  # 5 % would be 0.5 ms; below 2 ms nobody cares
        (10.0, 2.1, True),
        (400.0, 20.0, False),
        (400.0, 20.5, True),
    ],
)
def test_p95_of_ttft_without_our_own_lag(ttft_ms: float, lag_ms: float, marked: bool) -> None:
    """One request in ten is late, so p95 is `ttft_ms + lag_ms`, and without our lag `ttft_ms`; the median lag is 0."""
    records = [request(n, ttft_ms=ttft_ms, answer_ms=900.0, lag_ms=lag_ms if n % 10 == 0 else 0.0) for n in range(100)]
    assert reasons(records) == (("client_bound",) if marked else ())


@pytest.mark.parametrize(("lag_ms", "marked"), [(25.0, False), (25.5, True)])
def test_p95_of_e2e_without_our_own_lag(lag_ms: float, marked: bool) -> None:
    """The late ones have the shortest TTFT (20 ms) and the longest answers: p95 of E2E is 500 + lag, 5 % are 25 ms."""
    records = some(10, ttft_ms=20.0, answer_ms=480.0, lag_ms=lag_ms, tokens=49)
    assert reasons(records) == (("client_bound",) if marked else ())


def test_a_slow_server_is_no_late_client() -> None:
    """One request in ten takes 2 s longer, and all of it is the server's."""
    assert reasons(some(10, ttft_ms=2100.0)) == ()


@pytest.mark.parametrize(("share", "marked"), [(None, False), (0.05, False), (0.051, True)])
def test_coalesced_reads(share: float | None, marked: bool) -> None:
    assert reasons(good(), coalesced_share=share) == (("client_bound",) if marked else ())


@pytest.mark.parametrize(
    ("chunks_s", "ceiling", "marked"), [(5000.0, 5000.0, False), (5001.0, 5000.0, True), (9e9, None, False)]
)
def test_more_chunks_than_this_client_can_time(chunks_s: float, ceiling: float | None, marked: bool) -> None:
    found = reasons(good(), Conditions(ceiling_chunks_s=ceiling), chunks_s=chunks_s)
    assert found == (("client_bound",) if marked else ())


@pytest.mark.parametrize(
    ("clock", "lag_ms", "ttft_p50_ms", "marked"),
    [
        ("user", 5.0, 100.0, False),
        ("user", 5.1, 100.0, True),
        ("user", 5.0, 10.0, False),  # 5 % would be 0.5 ms
        ("user", 5.1, None, True),
        ("user", 20.0, 400.0, False),  # 5 % of 400 ms
        ("user", 20.5, 400.0, True),
        ("user", None, 100.0, False),
        ("kernel", 500.0, 100.0, False),
    ],
)
def test_a_late_loop_counts_where_it_made_the_stamps(
    clock: str, lag_ms: float | None, ttft_p50_ms: float | None, marked: bool
) -> None:
    found = reasons(some(1, clock=clock), loop_lag_p99_ms=lag_ms, ttft_p50_ms=ttft_p50_ms)
    assert found == (("client_bound",) if marked else ())


def test_what_is_told_of_lag_and_reads_is_about_the_measured_requests() -> None:
    """Lags 0..100 ms: p99 is 99. Two of four reads were coalesced; warm-up and drain have none of either."""
    records = [request(n, lag_ms=n, reads=4, coalesced_reads=2) for n in range(101)]
    others = good(500, phase="warmup", lag_ms=900.0) + good(500, phase="held", sent_ns=None)
    assert validity.send_lag_p99_ms([*records, *others]) == 99
    assert validity.coalesced_share([*records, *others]) == 0.5
    assert validity.coalesced_share([]) is None and validity.send_lag_p99_ms(others) is None


# --- the server's own doing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "marked"), [(None, False), (0.01, False), (0.011, True)])
def test_cache_warm(share: float | None, marked: bool) -> None:
    assert reasons(good(), prefix_hit_share=share) == (("cache_warm",) if marked else ())
    assert reasons(good(), Conditions(new_prompts=False), prefix_hit_share=share) == (), "hits are what was asked for"


SHORT_IDS = (1,) * 9
"""Ids of nine tokens where the usage says ten."""


@pytest.mark.parametrize(
    ("off", "exact", "inexact"),
    [
        ({"completion_tokens": 9, "chunk_tokens": SHORT_IDS}, True, False),
        ({"completion_tokens": 11, "chunk_ids": False}, True, True),  # more than was asked for is wrong anyway
        ({"prompt_tokens": 31}, True, False),
        ({"completion_tokens": None}, True, True),
        ({"chunk_tokens": SHORT_IDS}, True, True),
        ({"prompt_tokens": None}, False, False),
        ({"chunk_tokens": SHORT_IDS, "chunk_ids": False}, False, False),
    ],
    ids=["answer short", "answer long", "prompt", "no usage", "ids against usage", "no prompt count", "chunks, no ids"],
)
def test_length_mismatch(off: dict[str, Any], exact: bool, inexact: bool) -> None:
    """One request of a hundred may be off, two are marked. Lengths that were not exact must still agree."""
    for conditions, marked in ((PLAIN, exact), (Conditions(exact_lengths=False), inexact)):
        assert reasons(some(1, **off), conditions) == ()
        assert reasons(some(2, **off), conditions) == (("length_mismatch",) if marked else ())


@pytest.mark.parametrize("reason", ["foreign_load", "tokens_lost", "counters_short"])
def test_counters_that_disagree(reason: str) -> None:
    assert judge(good(), POINT, Conditions(counters=reason)) == ("suspect", (reason,))


@pytest.mark.parametrize(("precision", "marked"), [(None, False), (0.51, False), (0.49, True)])
def test_imprecise(precision: float | None, marked: bool) -> None:
    """Six of 120 take 390 ms, the others 190: p95 is 190 + 0.05 * 200 = 200 ms (0.95 * 119 = 113.05).

    A resample that draws a slow one five times or less has a p95 of 190 ms, one that draws seven or more has 390, so
    the interval is 190..390 ms, and half of it is half of 200.
    """
    records = some(6, n=120, answer_ms=290.0, tokens=30)
    assert reasons(records, Conditions(precision=precision)) == (("imprecise",) if marked else ())


def then(change: Callable[[int], RequestRecord], n: int = 60) -> list[RequestRecord]:
    """Half a healthy cell, and its second half otherwise."""
    return good(n) + [change(number) for number in range(n, 2 * n)]


@pytest.mark.parametrize(("tpot_ms", "marked"), [(12.5, False), (12.6, True), (8.0, False), (7.9, True)])
def test_drifting(tpot_ms: float, marked: bool) -> None:
    """From 10 ms a token to 12.5 is a factor of 1.25, to 8 one of 1 / 1.25."""
    records = then(lambda number: request(number, answer_ms=9 * tpot_ms))
    assert reasons(records) == (("drifting",) if marked else ())
    as_they_ended = [record for pair in zip(records[:60], records[60:], strict=True) for record in pair]
    assert reasons(as_they_ended) == reasons(records), "in the order in which they began"


def test_drift_is_not_seen_in_the_lengths_of_answers() -> None:
    """Answers three times as long at 10 ms a token."""
    assert reasons(then(lambda number: request(number, answer_ms=290.0, tokens=30))) == ()


def test_no_drift_is_told_from_fewer_than_forty() -> None:
    for half, expected in ((19, ("too_few_samples",)), (20, ("too_few_samples", "drifting"))):
        assert reasons(then(lambda number: request(number, answer_ms=900.0), half)) == expected


@pytest.mark.parametrize(("ttft_ms", "marked"), [(147.5, False), (148.0, True)])
def test_an_open_loop_drifts_when_its_queue_grows(ttft_ms: float, marked: bool) -> None:
    """E2E from 190 ms to 237.5 is a factor of 1.25, all of it in the queue. In a closed loop there is no such queue."""
    records = then(lambda number: request(number, ttft_ms=ttft_ms))
    assert reasons(records, rate_rps=100.0) == (("drifting",) if marked else ())
    assert reasons(records) == ()


@pytest.mark.parametrize(("preemptions", "marked"), [(None, False), (0, False), (1, True)])
def test_preempting(preemptions: int | None, marked: bool) -> None:
    assert reasons(good(), preemptions=preemptions) == (("preempting",) if marked else ())


@pytest.mark.parametrize(("share", "marked"), [(None, False), (0.05, False), (0.051, True)])
def test_throttled(share: float | None, marked: bool) -> None:
    assert reasons(good(), throttled_share=share) == (("throttled",) if marked else ())


@pytest.mark.parametrize(
    "kernel",
    ["CPUWNA16LinearKernel", "MarlinLinearKernel", "MacheteLinearKernel", "CutlassW4A8LinearKernel",
     "ConchLinearKernel", "ExllamaLinearKernel", "HummingLinearKernel", "Dynamic4bitLinearKernel", None],
)  # fmt: skip
def test_fused_kernels_are_fast(kernel: str | None) -> None:
    """Names that vLLM 0.32.0 picks from for 4-bit weights; None: it did not say."""
    assert reasons(good(), Conditions(quantized=True), kernel=kernel) == ()


@pytest.mark.parametrize("kernel", ["TritonW4A16LinearKernel", "EmulationMxfp8LinearKernel", "unquantized bfloat16"])
def test_slow_kernel(kernel: str) -> None:
    assert reasons(good(), Conditions(quantized=True), kernel=kernel) == ("slow_kernel",)
    assert reasons(good(), kernel=kernel) == (), "BF16 has no other"


@pytest.mark.parametrize(("step_ms", "marked"), [(None, False), (1.0, False), (1.1, True), (-1.0, False), (-1.1, True)])
def test_clock_step(step_ms: float | None, marked: bool) -> None:
    assert reasons(good(), clock_step_ms=step_ms) == (("clock_step",) if marked else ())


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_s", [None, 0.0])
def test_no_window(window_s: float | None) -> None:
    assert judge(good(), replace(POINT, window_s=window_s), PLAIN) == ("invalid", ("no_window",))


def test_gave_up() -> None:
    found = judge(good(), POINT, Conditions(gave_up="28 requests in a row failed"))
    assert found == ("invalid", ("gave_up",))


def test_the_worst_reasons_stand_in_front_and_none_is_left_out() -> None:
    row = replace(POINT, errors=1, preemptions=2, prefix_hit_share=0.5, clock_step_ms=40.0)
    verdict, found = judge(good(50), row, Conditions(counters="foreign_load"))
    assert verdict == "invalid"
    assert set(found[:2]) == {"cache_warm", "clock_step"}
    assert set(found[2:]) == {"too_few_samples", "errors", "preempting", "foreign_load"}


@pytest.mark.parametrize(
    ("before", "by", "after"),
    [("valid", "suspect", "suspect"), ("suspect", "suspect", "suspect"), ("invalid", "suspect", "invalid"),
     ("valid", "invalid", "invalid"), ("suspect", "invalid", "invalid")],
)  # fmt: skip
def test_a_point_only_gets_worse(before: Verdict, by: Verdict, after: Verdict) -> None:
    row = worsen(replace(POINT, verdict=before, verdict_reasons=("errors",)), "engine_restarted", by)
    assert (row.verdict, row.verdict_reasons) == (after, ("engine_restarted", "errors"))
