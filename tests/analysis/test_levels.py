"""Repeats merged into a level: medians, worst cases, run-to-run intervals, and nothing invalid in any of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.levels import levels, precision_order
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


@given(st.lists(st.floats(min_value=1e-3, max_value=1e6), min_size=2, max_size=14))
def test_interval_holds_the_median(values: list[float]) -> None:
    (level,) = levels([point(index, value) for index, value in enumerate(values, start=1)])
    assert level.tok_s is not None and level.tok_s_lo is not None and level.tok_s_hi is not None
    assert math.nextafter(level.tok_s_lo, 0) <= level.tok_s <= math.nextafter(level.tok_s_hi, math.inf)
