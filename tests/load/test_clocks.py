"""The offset of another clock: by hand, and for any delays that a network can have."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis import metrics
from harness.analysis.validity import Conditions, judge
from harness.load import clocks
from harness.load.clocks import ClockOffset, Ping
from harness.records import RequestRecord, SweepPoint

OFFSETS = st.integers(-(10**18), 10**18)
DELAYS = st.integers(0, 10**10)
NOW = 1_800_000_000 * 10**9


def ping(sent_ns: int, offset_ns: int, there_ns: int, held_ns: int, back_ns: int) -> Ping:
    """As the stamps would be, when the ways take that long and the other node takes `held_ns` to answer."""
    received_ns = sent_ns + there_ns + offset_ns
    returned_ns = sent_ns + there_ns + held_ns + back_ns
    return Ping(sent_ns, received_ns, received_ns + held_ns, returned_ns)


def test_the_offset_by_hand() -> None:
    """Sent at 1000, received at 1530 of the other clock, answered at 1540, back at 1050.

    offset = ((1530 - 1000) + (1540 - 1050)) / 2 = (530 + 490) / 2 = 510
    round trip = (1050 - 1000) - (1540 - 1530) = 50 - 10 = 40; error = 20
    So the true offset lies in 490 ... 530: 530 if the way there took nothing, 490 if the way back did.
    """
    assert clocks.offset([Ping(1000, 1530, 1540, 1050)]) == ClockOffset(510, 20, 40)


def test_the_ping_of_the_least_round_trip_counts() -> None:
    """The first took 40 and says 510. The second took 22 - 14 = 8 and says (505 + (519 - 22)) / 2 = 1002 / 2 = 501."""
    slow, quick = Ping(1000, 1530, 1540, 1050), Ping(0, 505, 519, 22)
    assert clocks.offset([slow, quick]) == clocks.offset([quick, slow]) == ClockOffset(501, 4, 8)


@pytest.mark.parametrize(("there_ns", "back_ns"), [(1, 0), (0, 1), (3, 2)])
@pytest.mark.parametrize("offset_ns", [7, -7])
def test_half_a_nanosecond_is_rounded_so_that_the_truth_stays_inside(
    there_ns: int, back_ns: int, offset_ns: int
) -> None:
    found = clocks.offset([ping(0, offset_ns, there_ns, 5, back_ns)])
    assert abs(found.offset_ns - offset_ns) <= found.error_ns <= (there_ns + back_ns + 1) // 2


@given(
    OFFSETS, st.lists(st.tuples(st.integers(0, 10**12), DELAYS, DELAYS, DELAYS), min_size=1, max_size=clocks.PINGS)
)  # fmt: skip
def test_the_truth_is_within_the_error_whatever_the_ways_took(
    offset_ns: int, trips: list[tuple[int, int, int, int]]
) -> None:
    pings = [ping(NOW + later, offset_ns, there, held, back) for later, there, held, back in trips]
    found = clocks.offset(pings)
    assert abs(found.offset_ns - offset_ns) <= found.error_ns
    least_ns = min(there + back for _, there, _, back in trips)
    assert found.rtt_min_ns == least_ns and found.error_ns == (least_ns + 1) // 2, "and no larger than it must be"


@given(OFFSETS, st.integers(-(10**9), 10**9), st.floats(0, 1), DELAYS, DELAYS, DELAYS, DELAYS)
def test_records_are_within_the_error_at_any_moment_of_a_clock_that_drifts(
    offset_ns: int, drift_ns: int, moment: float, there: int, back: int, later_there: int, later_back: int
) -> None:
    before = clocks.offset([ping(NOW, offset_ns, there, 0, back)])
    after = clocks.offset([ping(NOW, offset_ns + drift_ns, later_there, 0, later_back)])
    over = clocks.over(before, after)
    assert over.offset_ns == before.offset_ns, "by which the records were moved"
    assert abs(offset_ns + round(moment * drift_ns) - over.offset_ns) <= over.error_ns


def test_drift_by_hand() -> None:
    """700 ± 20 before, 790 ± 30 after: at the end it may have been 820, and records were moved by 700: 120 wrong."""
    assert clocks.over(ClockOffset(700, 20, 40), ClockOffset(790, 30, 60)) == ClockOffset(700, 120, 40)
    assert clocks.over(ClockOffset(700, 20, 40), ClockOffset(610, 30, 60)).error_ns == 120
    assert clocks.over(ClockOffset(700, 20, 40), ClockOffset(701, 5, 10)).error_ns == 20, "the first is the worse one"


RECORD = RequestRecord(
    "x", 1, 2, "measured", 10_000_000, sent_ns=11_000_000, first_token_ns=31_000_000, last_token_ns=51_000_000,
    end_ns=51_000_001, completion_tokens=3, chunk_us=(21_000, 31_000, 41_000), chunk_tokens=(1, 1, 1),
)  # fmt: skip


def test_a_record_is_moved_and_its_latencies_are_not() -> None:
    ours = clocks.moved(RECORD, 4_000_000)
    assert (ours.intended_ns, ours.sent_ns, ours.end_ns) == (6_000_000, 7_000_000, 47_000_001)
    assert (ours.first_token_ns, ours.last_token_ns) == (27_000_000, 47_000_000)
    for figure in (metrics.ttft_ms, metrics.e2e_ms, metrics.tpot_ms):
        assert figure(ours) == figure(RECORD) is not None
    assert clocks.moved(ours, -4_000_000) == RECORD


def test_no_time_of_a_record_is_forgotten() -> None:
    """Every field in ns since the epoch moves by the same, so a new one cannot be missed."""
    times = [field.name for field in fields(RequestRecord) if field.name.endswith("_ns")]
    ours = clocks.moved(RECORD, 4_000_000)
    assert {getattr(RECORD, name) - getattr(ours, name) for name in times} == {4_000_000}


def test_what_a_failed_request_lacks_stays_empty() -> None:
    failed = RequestRecord("x", 1, 2, "measured", 10, error="connect")
    assert clocks.moved(failed, 4) == replace(failed, intended_ns=6)


@pytest.mark.parametrize(
    ("error_ms", "window_s", "rate_rps", "ttft_p95_ms", "uncertain"),
    [
        (None, 10.0, None, 50.0, False),  # all on this machine
        (50.0, 10.0, None, 50.0, False),  # 2 · 50 ms is 1 % of 10 s
        (50.01, 10.0, None, 50.0, True),
        (50.1, 20.0, None, 50.0, False),
        (1.0, 10.0, 5.0, 50.0, False),  # an open loop: 2 · 1 ms is within the 2 ms of own lag
        (1.1, 10.0, 5.0, 40.0, True),  # 2.2 ms is more than that and more than 5 % of 40 ms
        (1.1, 10.0, 5.0, 44.0, False),  # exactly 5 % of 44 ms
        (1.1, 10.0, 5.0, None, True),
        (1.1, 10.0, None, 40.0, False),  # a closed loop asks for no common time
        (9.0, None, None, None, False),  # there is no window to be wrong about
    ],
)
def test_clock_uncertain(
    error_ms: float | None, window_s: float | None, rate_rps: float | None, ttft_p95_ms: float | None, uncertain: bool
) -> None:
    point = SweepPoint(
        "run", "x", 8, window_s=window_s, rate_rps=rate_rps, ttft_p95_ms=ttft_p95_ms, clock_offset_error_ms=error_ms
    )
    assert ("clock_uncertain" in judge((), point, Conditions())[1]) == uncertain


def test_an_uncertain_clock_makes_a_good_point_suspect_and_no_worse() -> None:
    times = {"sent_ns": 10_000_000, "clock": "kernel", "output_tokens_asked": 3}
    good = [replace(RECORD, sequence=number, **times) for number in range(100)]  # type: ignore[arg-type]
    point = SweepPoint("run", "x", 8, window_s=1.0, clock_offset_error_ms=6.0)
    assert judge(good, point, Conditions()) == ("suspect", ("clock_uncertain",))
    assert judge(good, replace(point, clock_offset_error_ms=4.0), Conditions()) == ("valid", ())
