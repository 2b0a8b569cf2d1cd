"""What a correct answer costs, by hand and against figures of others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from harness.analysis.correct import accuracy_kept, correct_lines, usd_per_1000_correct
from harness.analysis.evidence import Evidence, prompts_needed
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions
from harness.records import Outcomes, SweepPoint
from harness.slo import Slo


def row(precision: str, conc: int, req_s: float | None, p95_ms: float) -> SweepPoint:
    return SweepPoint(
        "run", precision, conc, tok_s=None if req_s is None else 32 * req_s, p95_ms=p95_ms, p95_ms_lo=p95_ms * 0.9,
        p95_ms_hi=p95_ms * 1.1, req_s=req_s, usd_per_hour=0.36, utilisation=0.5, verdict="valid", requests=120,
    )  # fmt: skip


POINTS = [row("bf16", 1, 1.0, 500), row("bf16", 8, 10.0, 2000), row("awq", 1, 2.0, 300), row("awq", 8, 16.0, 1500)]
PAIRED = [Outcomes("awq", "all", 50, 45, 36, 12, 3, answered=50), Outcomes("awq", "factual", 20, 20, 10, 10, 0)]
KNEES = find_knees(POINTS, Slo(3.0))


def test_by_hand() -> None:
    """At 8 users BF16 completes 10 requests a second, AWQ 16. An hour is 0.36 USD, half of it used: 18,000 and 28,800
    answers an hour. BF16 has 45 of 50 right: 0.36 / (18,000 × 0.9) × 1,000 = 0.0222222 USD for 1,000 correct. AWQ has
    36 of 50: 0.36 / (28,800 × 0.72) × 1,000 = 0.0173611. An answer of AWQ costs 0.0125 / 0.02 = 0.625 of one of BF16,
    so it pays from 62.5 % of BF16's accuracy on; it keeps 36 / 45 = 80 %."""
    base, awq = correct_lines(POINTS, KNEES, PAIRED, "bf16")
    assert (base.precision, base.at, base.right, base.items, base.accuracy) == ("bf16", 8, 45, 50, 0.9)
    assert base.usd_per_1000_correct == pytest.approx(0.36 / (18_000 * 0.9) * 1000)
    assert (base.break_even, base.kept) == (None, None)
    assert (awq.usd_per_1000_answers, awq.usd_per_1000_correct) == (pytest.approx(0.0125), pytest.approx(0.0173611111))
    assert (awq.break_even, awq.kept) == (pytest.approx(0.625), pytest.approx(0.8))


def test_the_interval_is_that_of_the_accuracy_turned_over() -> None:
    """36 of 50 by scipy's Wilson: the dearest price belongs to the lowest accuracy."""
    _, awq = correct_lines(POINTS, KNEES, PAIRED, "bf16")
    wilson = binomtest(36, 50).proportion_ci(0.95, method="wilson")
    assert (awq.accuracy_lo, awq.accuracy_hi) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    assert awq.usd_per_1000_correct_lo == pytest.approx(0.0125 / wilson.high)
    assert awq.usd_per_1000_correct_hi == pytest.approx(0.0125 / wilson.low)


def test_dearer_where_it_keeps_too_little() -> None:
    """Of the factual prompts it keeps half, and it pays from 62.5 % on: 0.0125 / 0.5 = 0.025 against 0.02 / 1."""
    base, awq = correct_lines(POINTS, KNEES, PAIRED, "bf16", family="factual")
    assert awq.kept is not None and awq.break_even is not None and awq.kept < awq.break_even
    assert awq.usd_per_1000_correct == pytest.approx(0.025) and base.usd_per_1000_correct == pytest.approx(0.02)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.2, 5.0))
def test_break_even_is_where_the_prices_meet(base_right: int, right: int, pace: float) -> None:
    points = [*POINTS[:3], row("awq", 8, 10.0 * pace, 1500)]
    lost, won = max(base_right - right, 0), max(right - base_right, 0)
    base, awq = correct_lines(points, KNEES, [Outcomes("awq", "all", 60, base_right, right, lost, won)], "bf16")
    assert base.usd_per_1000_correct and awq.usd_per_1000_correct and awq.kept and awq.break_even
    cheaper = awq.usd_per_1000_correct < base.usd_per_1000_correct * (1 - 1e-9)
    dearer = awq.usd_per_1000_correct > base.usd_per_1000_correct * (1 + 1e-9)
    assert not (cheaper and awq.kept <= awq.break_even) and not (dearer and awq.kept >= awq.break_even)


def test_nothing_right_has_no_price_and_one_right_no_upper_end_at_zero() -> None:
    _, none = correct_lines(POINTS, KNEES, [Outcomes("awq", "all", 20, 10, 0, 10, 0)], "bf16")
    assert (none.usd_per_1000_correct, none.usd_per_1000_correct_hi, none.kept) == (None, None, 0.0)
    assert none.usd_per_1000_correct_lo is not None and none.note == "not one answer was right"
    for items in range(1, 300):  # whatever rounding leaves of a lower end that is 0
        (_, line) = correct_lines(POINTS, KNEES, [Outcomes("awq", "all", items, items, 0, items, 0)], "bf16")
        assert line.usd_per_1000_correct_hi is None and line.accuracy_lo == 0.0
    assert usd_per_1000_correct(0.36, 2.0, 0.0) is None
    assert usd_per_1000_correct(0.36, 2.0, 0.8) == pytest.approx(0.0625)


def test_what_is_missing_is_said() -> None:
    slow = find_knees(POINTS, Slo(0.1))
    lines = correct_lines(POINTS, slow, PAIRED, "bf16")
    assert [line.usd_per_1000_correct for line in lines] == [None, None]
    assert lines[1].accuracy == 0.72 and lines[1].note == "no tested load is safely inside the service level"
    free = [replace(point, usd_per_hour=None) for point in POINTS]
    assert correct_lines(free, KNEES, PAIRED, "bf16")[1].note == "no price of an hour is given"
    unknown = [replace(point, req_s=None) for point in POINTS]
    assert correct_lines(unknown, KNEES, PAIRED, "bf16")[1].note == "requests a second are not known"
    assert correct_lines(POINTS, KNEES, [Outcomes("awq", "all", 0, 0, 0)], "bf16") == []
    assert correct_lines(POINTS, KNEES, PAIRED, "bf16", Assumptions(usd_per_hour=0.72))[1].usd_per_1000_correct == (
        pytest.approx(2 * 0.0173611111)
    )


def test_the_ratio_of_accuracies_is_as_in_the_r_package() -> None:
    """161 pairs: both 59, one alone 6, the other alone 16 (Cavo et al. 2012). R's contingencytables gives for
    Bonett and Price's hybrid Wilson interval 0.8667 [0.7579 to 0.9910]. And 1, 1, 7 of 21 (Bentur et al. 2009), worked
    by hand: n* = 9, k = 1.959964 × 0.608581 / (0.492366 + 0.142134) = 1.87990; Wilson with it 0.066306 to 0.534780 of
    2/9 and 0.579565 to 0.978915 of 8/9: 0.067734 to 0.922727."""
    cavo = accuracy_kept(Outcomes("awq", "all", 161, 75, 65, 16, 6))
    assert [round(end or 0, 4) for end in (cavo.value, cavo.lo, cavo.hi)] == [0.8667, 0.7579, 0.9910]
    bentur = accuracy_kept(Outcomes("awq", "all", 21, 8, 2, 7, 1))
    assert [round(end or 0, 4) for end in (bentur.value, bentur.lo, bentur.hi)] == [0.25, 0.0677, 0.9227]
    assert accuracy_kept(Outcomes("awq", "all", 9, 0, 3, 0, 3)).value is None


def test_the_ratio_s_interval_holds_the_truth() -> None:
    """500 draws of 60 prompts: both have 0.62 right, BF16 alone 0.18, AWQ alone 0.06: 0.68 / 0.8 = 0.85."""
    chance, held = random.Random(1), 0
    for _ in range(500):
        kinds = chance.choices(("both", "lost", "won", "none"), (0.62, 0.18, 0.06, 0.14), k=60)
        both, lost, won = (kinds.count(kind) for kind in ("both", "lost", "won"))
        kept = accuracy_kept(Outcomes("awq", "all", 60, both + lost, both + won, lost, won))
        held += (kept.lo or 0.0) <= 0.85 <= (kept.hi or 9.0)
    assert held >= 465


def test_prompts_needed_by_hand() -> None:
    """4 of 30 pairs lost, none won: psi = d = 0.13333; (1.959964 √0.13333 + 0.841621 √(0.13333 − 0.017778))² / 0.017778
    = (0.715678 + 0.286092)² / 0.017778 = 56.45, so 57. Where as many are won as lost, no number tells."""
    assert prompts_needed(Outcomes("awq", "reasoning", 30, 30, 26, 4, 0)) == 57
    assert prompts_needed(Outcomes("awq", "reasoning", 30, 28, 28, 2, 2)) is None


def test_two_quantized_precisions_are_paired_with_each_other() -> None:
    """Of prompts a, b, c, d AWQ has a, b and c right, GPTQ a alone; e was judged for AWQ only. GPTQ loses 2 of 4."""
    evidence = Evidence("bf16", ("awq", "gptq"), right={
        "awq": {"a": True, "b": True, "c": True, "d": False, "e": True},
        "gptq": {"a": True, "b": False, "c": False, "d": False},
    })  # fmt: skip
    pair = evidence.pair("gptq", "awq")
    assert pair is not None
    assert (pair.items, pair.base_right, pair.right, pair.right_to_wrong, pair.wrong_to_right) == (4, 3, 1, 2, 0)
    assert (pair.drop, pair.p_value) == (0.5, 0.5)
    assert evidence.pair("gptq", "int8") is None


def test_the_worst_family_is_the_one_that_loses_most() -> None:
    rows = [
        Outcomes("awq", "factual", 30, 30, 29, 1, 0, 0.033, -0.08, 0.17),
        Outcomes("awq", "code", 30, 20, 22, 1, 3, -0.067),
        Outcomes("awq", "reasoning", 30, 30, 26, 4, 0, 0.133, 0.005, 0.297),
        Outcomes("awq", "all", 90, 80, 77, 6, 3, 0.033),
    ]
    evidence = Evidence("bf16", ("awq",), rows)
    worst = evidence.worst("awq")
    assert worst is not None and worst.family == "reasoning"
    assert evidence.counted("bf16") == (80, 90) and evidence.counted("awq") == (77, 90)
