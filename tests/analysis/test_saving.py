"""Savings by hand, as published, and what keeps one from being said."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.saving import Saving, savings
from harness.assumptions import Assumptions
from harness.records import Knee, SweepPoint

SLO = "p95 ≤ 3 s"


def row(precision: str, conc: int, tok_s: float | None, spread: float | None = None, **more: object) -> SweepPoint:
    """`spread`: the interval of tok_s reaches from tok_s / spread to tok_s × spread."""
    values: dict[str, object] = {"usd_per_hour": 0.36, "utilisation": 1.0, "verdict": "valid", **more}
    if spread and tok_s:
        values |= {"tok_s_lo": tok_s / spread, "tok_s_hi": tok_s * spread}
    return SweepPoint("run", precision, conc, tok_s=tok_s, **values)  # type: ignore[arg-type]


def knees(base: int | None, other: int | None) -> list[Knee]:
    return [
        Knee(name, SLO, safe_conc=safe, cross_lo=None if safe is None else float(safe))
        for name, safe in (("bf16", base), ("awq", other))
    ]


def saved(points: list[SweepPoint], found: list[Knee], assumptions: Assumptions | None = None) -> Saving:
    (saving,) = savings(points, found, assumptions or Assumptions())
    return saving


def test_a_saving_at_each_ones_own_safe_load_by_hand() -> None:
    """BF16 delivers 100 tok/s at 8 users, AWQ 200 at 16, each within a factor of 1.25: 1.00 and 0.50 USD/1M, 50 % less.

    MOVER: ln 2 ± √(ln² 1.25 + ln² 1.25) = 0.6931 ± 0.3156, ratios 1.4587 and 2.7422: 1 − 1/1.4587 = 31.4 % and
    1 − 1/2.7422 = 63.5 %. What AWQ does at 8 users, and BF16 at 16, is not asked.
    """
    points = [row("bf16", 8, 100.0, 1.25), row("bf16", 16, 900.0), row("awq", 8, 9.0), row("awq", 16, 200.0, 1.25)]
    saving = saved(points, knees(8, 16))
    assert (saving.precision, saving.baseline, saving.slo, saving.basis) == ("awq", "bf16", SLO, "rows")
    half = math.sqrt(2) * math.log(1.25)
    ends = (1 - 0.5 * math.exp(half), 1 - 0.5 * math.exp(-half))
    assert (saving.share_lo, saving.share, saving.share_hi) == tuple(map(pytest.approx, (ends[0], 0.5, ends[1])))
    assert (round(ends[0], 3), round(ends[1], 3)) == (0.314, 0.635)


def test_a_saving_may_be_a_loss() -> None:
    """100 tok/s against 80: 1 − 100 / 80 = −25 %."""
    saving = saved([row("bf16", 8, 100.0), row("awq", 8, 80.0)], knees(8, 8))
    assert (saving.share, saving.share_lo, saving.share_hi) == (pytest.approx(-0.25), None, None)


def test_sessions_of_one_repeat_are_paired() -> None:
    """100 and 400 tok/s against 150 and 600: 1.5 times each, so 1 − 1/1.5 = 33.3 % without a doubt, although the
    sessions differ fourfold. The third repeat has no partner."""
    speeds = ((1, 100.0), (2, 400.0))
    points = [row("bf16", 8, tok_s, repeat=repeat) for repeat, tok_s in (*speeds, (3, 70.0))]
    points += [row("awq", 16, tok_s * 1.5, repeat=repeat) for repeat, tok_s in speeds]
    points += [row("awq", 16, 1.0, repeat=3, verdict="invalid")]
    saving = saved(points, knees(8, 16))
    assert (saving.basis, saving.pairs) == ("sessions", 2)
    assert (saving.share_lo, saving.share, saving.share_hi) == (pytest.approx(1 / 3),) * 3


def test_one_common_repeat_is_no_pair_of_sessions() -> None:
    """AWQ's two sessions of 200 and 300 tok/s have a median of 250: 1 − 100 / 250 = 60 %."""
    points = [row("bf16", 8, 100.0, 1.1, repeat=1), row("awq", 8, 200.0, 1.1, repeat=1), row("awq", 8, 300.0, repeat=2)]
    saving = saved(points, knees(8, 8))
    assert (saving.basis, saving.pairs, saving.share) == ("rows", 0, pytest.approx(0.6))


def test_the_hours_of_an_owner_differ_by_their_watts() -> None:
    """No capital; 1 USD/kWh: 200 W cost 0.20 USD an hour, 150 W 0.15 USD. At equal tok/s: 1 − 0.15 / 0.20 = 25 %."""
    points = [row("bf16", 8, 100.0, power_w=200.0), row("awq", 8, 100.0, power_w=150.0)]
    assert saved(points, knees(8, 8), Assumptions(card_usd=0.0, usd_per_kwh=1.0)).share == pytest.approx(0.25)


def test_a_share_of_the_hour_divides_each_price() -> None:
    """The same hour, BF16's half busy and AWQ's wholly: at equal tok/s half the price, 50 %."""
    points = [row("bf16", 8, 100.0, utilisation=0.5), row("awq", 8, 100.0)]
    assert saved(points, knees(8, 8)).share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("points", "found", "assumptions", "note"),
    [
        ([row("bf16", 8, 1.0), row("awq", 8, 1.0)], knees(None, 8), {}, "no tested load of BF16 is safely inside p95"),
        ([row("bf16", 8, 1.0), row("awq", 8, 1.0)], knees(None, None), {}, "no tested load of BF16 and AWQ is safely"),
        ([row("bf16", 8, 1.0, usd_per_hour=None), row("awq", 8, 1.0)], knees(8, 8), {}, "the hour has no price"),
        ([row("bf16", 8, 1.0), row("awq", 8, 1.0)], knees(8, 8), {"usd_per_hour": 0.0}, "the hour has no price"),
        ([row("bf16", 8, None), row("awq", 8, 1.0)], knees(8, 8), {}, "no tokens per second"),
        (
            [row("bf16", 8, 1.0), row("awq", 8, 1.0, power_w=150.0)],
            knees(8, 8),
            {"card_usd": 9.0, "usd_per_kwh": 0.3},
            "only one of them had its power measured",
        ),
    ],
)
def test_no_saving_says_why(
    points: list[SweepPoint], found: list[Knee], assumptions: dict[str, float], note: str
) -> None:
    saving = saved(points, found, Assumptions(**assumptions))  # type: ignore[arg-type]
    assert saving.share is None and saving.note.startswith(note)


def test_a_suspect_point_makes_a_suspect_saving() -> None:
    assert saved([row("bf16", 8, 1.0, verdict="suspect"), row("awq", 8, 1.0)], knees(8, 8)).verdict == "suspect"
    assert saved([row("bf16", 8, 1.0), row("awq", 8, 1.0)], knees(8, 8)).verdict == "valid"


def test_one_precision_or_no_knees_save_nothing() -> None:
    assert savings([row("awq", 8, 1.0)], knees(8, 8)[1:], Assumptions()) == []
    assert savings([row("awq", 8, 1.0)], [], Assumptions()) == []


@pytest.mark.parametrize(
    ("base", "other", "base_usd", "other_usd"),
    [
        ((396, 13322.038133738903), (472, 15103.478140564233), 0.05608918205464634, 0.049473519626937246),
        ((40, 2814.6815209464726), (52, 3653.099267481628), 0.26547309763520216, 0.20454473517149782),
    ],
)
def test_a_saving_as_published(
    base: tuple[int, float], other: tuple[int, float], base_usd: float, other_usd: float
) -> None:
    """Qwen3-8B on an H100, BF16 and FP8, each at the most users inside one service level, at 2.69 USD an hour: the
    prices are another tool's (github.com/tgarg01/silybench-data, derived/csv/hosted_costs.csv)."""
    points = [row(name, *at, usd_per_hour=2.69) for name, at in (("bf16", base), ("awq", other))]
    assert saved(points, knees(base[0], other[0])).share == pytest.approx(1 - other_usd / base_usd, rel=1e-9)


tokens = st.floats(1.0, 1e5)


@given(tokens, tokens, st.floats(1.0, 1.5), st.floats(1.0, 1.5))
def test_the_interval_holds_the_share_and_turning_round_undoes_it(
    one: float, two: float, first: float, second: float
) -> None:
    """(1 − share) of the one against the other, times that of the other against the one, is 1; so are crossed ends."""
    points = [row("bf16", 8, one, first), row("awq", 8, two, second)]
    there = saved(points, knees(8, 8))
    (back,) = savings([row("bf16", 8, two, second), row("awq", 8, one, first)], knees(8, 8), Assumptions())
    assert there.share is not None and there.share_lo is not None and there.share_hi is not None
    assert back.share is not None and back.share_lo is not None and back.share_hi is not None
    assert there.share_lo <= there.share + 1e-9 and there.share <= there.share_hi + 1e-9 and there.share_hi < 1
    assert (1 - there.share) * (1 - back.share) == pytest.approx(1)
    assert (1 - there.share_lo) * (1 - back.share_hi) == pytest.approx(1)
