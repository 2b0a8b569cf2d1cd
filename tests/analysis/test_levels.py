"""Repeats merged into a level: medians, worst cases, run-to-run intervals, and nothing invalid in any of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.levels import RATE, USERS, axis, latest, levels, one_trace, precision_order, shown
from harness.records import SweepPoint, Verdict


def point(repeat: int, tok_s: float, verdict: Verdict = "valid", precision: str = "awq", conc: int = 8) -> SweepPoint:
    return SweepPoint(
        "run", precision, conc, tok_s=tok_s, repeat=repeat, verdict=verdict, requests=100, preemptions=repeat
    )


def test_single_repeat_passes_unchanged() -> None:
    only = point(1, 100.0)
    assert levels([only]) == [only]


def test_three_repeats_by_hand() -> None:
    """Logs of 90, 100, 120: mean ln = 4.630824, s = 0.145547; half = 4.302653 × 0.145547 / √3 = 0.361557.

    exp(4.630824 ∓ 0.361557) = 71.47, 147.29; the median is 100 and requests add up.
    """
    (level,) = levels([point(1, 90.0), point(2, 120.0), point(3, 100.0)])
    assert level.tok_s == 100.0
    assert (level.tok_s_lo, level.tok_s_hi) == (pytest.approx(71.47, abs=0.01), pytest.approx(147.29, abs=0.01))
    assert (level.requests, level.preemptions, level.verdict) == (300, 3, "valid")


def test_invalid_repeats_change_nothing() -> None:
    sound = [point(1, 90.0), point(2, 110.0)]
    assert levels([*sound, point(3, 9000.0, "invalid")]) == levels(sound)


def test_level_of_invalid_repeats_only_does_not_exist() -> None:
    assert levels([point(1, 90.0, "invalid"), point(2, 91.0, "invalid")]) == []


def test_one_suspect_repeat_makes_the_level_suspect() -> None:
    (level,) = levels([point(1, 90.0), point(2, 91.0, "suspect")])
    assert level.verdict == "suspect"


def test_baseline_comes_first_then_order_of_appearance() -> None:
    points = [point(1, 1.0, precision=name) for name in ("gptq", "awq", "bf16")]
    assert precision_order(points) == ["bf16", "gptq", "awq"]


def rated(rate: float, tok_s: float = 1.0, repeat: int = 1, **more: object) -> SweepPoint:
    """A row of an open loop."""
    values: dict[str, object] = {"arrivals": "poisson", "rate_rps": rate, **more}
    return replace(point(repeat, tok_s, conc=0), **values)  # type: ignore[arg-type]


def test_rates_are_never_merged_and_go_upwards() -> None:
    found = levels([rated(4, 40.0), rated(0.5, 5.0), rated(0.5, 7.0, 2)])
    assert [(level.rate_rps, level.tok_s) for level in found] == [(0.5, 6.0), (4, 40.0)]


def test_an_attempt_that_was_made_again_counts_no_longer() -> None:
    """Neither an invalid one that was mended, nor a sound one whose repetition is not."""
    mended = [replace(point(1, 1.0, "invalid")), replace(point(1, 90.0), attempt=2)]
    worse = [replace(point(2, 1.0, "invalid"), attempt=2), point(2, 50.0)]
    assert latest([*mended, *worse]) == [mended[1], worse[0]]
    assert [level.tok_s for level in levels([*mended, *worse])] == [90.0]


def test_new_columns_are_merged_as_what_they_are() -> None:
    """Figures by their median; what can spoil a row by its worst, signed ones by their distance from 0."""
    rows = [
        replace(point(repeat, 1.0), power_w=watts, energy_j_per_token=watts / 100, sm_clock_mhz=watts * 10,
                chunks_s=watts, temperature_c_max=heat, throttled_share=heat / 100, clock_step_ms=step,
                counter_gap=-step)
        for repeat, watts, heat, step in ((1, 90.0, 70.0, 0.5), (2, 120.0, 81.0, -3.0), (3, 100.0, 75.0, 1.0))
    ]  # fmt: skip
    (level,) = levels(rows)
    assert (level.power_w, level.energy_j_per_token, level.sm_clock_mhz, level.chunks_s) == (100, 1.0, 1000, 100)
    assert (level.temperature_c_max, level.throttled_share) == (81, 0.81)
    assert (level.clock_step_ms, level.counter_gap) == (-3.0, 3.0)


def test_the_axis_is_the_kind_of_loop() -> None:
    assert axis([point(1, 1.0)]) is USERS
    assert axis([rated(2.5)]) is RATE
    assert [USERS.amount(1), USERS.amount(16), RATE.amount(1), RATE.amount(2.5)] == [
        "1 user",
        "16 users",
        "1 req/s",
        "2.5 req/s",
    ]
    assert [USERS.about(5.66), USERS.about(11.31), RATE.about(5.657), RATE.about(11.31), RATE.about(113.1)] == [
        "5.7",
        "11",
        "5.66",
        "11.3",
        "113",
    ]


def test_loads_are_shown_as_they_were_asked() -> None:
    assert [shown(load) for load in (16, 1024, 0.125, 12.5, 2.4871239871)] == ["16", "1024", "0.125", "12.5", "2.487"]


def test_one_trace_is_a_trace_at_one_speed() -> None:
    trace = [rated(2.5, arrivals="trace"), rated(2.5, repeat=2, arrivals="trace")]
    assert one_trace(trace)
    assert not one_trace([*trace, rated(5, arrivals="trace")])
    assert not one_trace([rated(2.5)])


@given(st.lists(st.floats(min_value=1e-3, max_value=1e6), min_size=2, max_size=14))
def test_interval_holds_the_median(values: list[float]) -> None:
    (level,) = levels([point(index, value) for index, value in enumerate(values, start=1)])
    assert level.tok_s is not None and level.tok_s_lo is not None and level.tok_s_hi is not None
    assert math.nextafter(level.tok_s_lo, 0) <= level.tok_s <= math.nextafter(level.tok_s_hi, math.inf)
