"""The crossover: each case of fading and reversing by hand, the point between, and the traffic it holds for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.crossover import find_crossover, find_crossovers, traffic
from harness.records import Advantage, Ratio, SweepPoint

AHEAD, DOUBT, BEHIND = (1.3, 1.2, 1.4), (1.05, 0.95, 1.15), (0.8, 0.7, 0.9)


def lines(*figures: tuple[float, float, float], metric: str = "tok_s", first: int = 1) -> list[Ratio]:
    """Ratios under 1, 2, 4, ... users."""
    return [
        Ratio("awq", "bf16", first * 2**at, metric, ratio, low, high, 5)
        for at, (ratio, low, high) in enumerate(figures)
    ]


@pytest.mark.parametrize(
    ("figures", "outcome", "fades_at", "reverses_at"),
    [
        ((AHEAD, AHEAD), "always", None, None),
        ((AHEAD, DOUBT, AHEAD), "always", None, None),
        ((AHEAD, AHEAD, DOUBT, DOUBT), "fades", 4, None),
        ((AHEAD, DOUBT, BEHIND), "reverses", 2, 4),
        ((AHEAD, BEHIND), "reverses", 2, 2),
        ((AHEAD, BEHIND, DOUBT), "reverses", 2, 2),
        ((BEHIND, AHEAD, DOUBT), "fades", 4, None),
        ((DOUBT, AHEAD), "gains", None, None),
        ((BEHIND, DOUBT, AHEAD), "gains", None, None),
        ((AHEAD, BEHIND, AHEAD), "gains", None, None),
        ((BEHIND, DOUBT), "never", None, None),
        ((DOUBT, DOUBT), "undecided", None, None),
        ((AHEAD,), "always", None, None),
    ],
)
def test_cases(
    figures: tuple[tuple[float, float, float], ...],
    outcome: Advantage,
    fades_at: float | None,
    reverses_at: float | None,
) -> None:
    found = find_crossover(lines(*figures))
    assert (found.outcome, found.fades_at, found.reverses_at) == (outcome, fades_at, reverses_at)


def test_crossing_by_hand() -> None:
    """1.44 at 4 users and 1 / 1.2 at 16: ln 1.44 = 2 ln 1.2, so the ratio is 1 two thirds of the way in logs:
    4 · 4^(2/3) = 10.08 users."""
    found = find_crossover(
        [Ratio("awq", "bf16", 4, "tok_s", 1.44, 1.3, 1.6), Ratio("awq", "bf16", 16, "tok_s", 1 / 1.2, 0.8, 0.9)]
    )
    assert found.cross == pytest.approx(4 * 4 ** (2 / 3))
    assert (found.ahead, found.doubt, found.behind) == ((4,), (), (16,))
    assert (found.best, found.best_at) == (1.44, 4)


def test_crossing_of_a_gain_lies_below_it() -> None:
    """Behind by 1.2 at 1 user, ahead by 1.2 at 4: even in the middle of the logs, at 2."""
    found = find_crossover(
        [Ratio("awq", "bf16", 1, "tok_s", 1 / 1.2, 0.8, 0.9), Ratio("awq", "bf16", 4, "tok_s", 1.2, 1.1, 1.3)]
    )
    assert (found.outcome, found.cross) == ("gains", pytest.approx(2.0))


def test_a_fading_figure_that_stays_ahead_does_not_cross() -> None:
    assert find_crossover(lines(AHEAD, DOUBT)).cross is None


@pytest.mark.parametrize("metric", ["ttft_p50_ms", "tpot_p50_ms"])
def test_a_latency_is_ahead_when_it_is_less(metric: str) -> None:
    """The same figures as latencies: 0.8 [0.7–0.9] is ahead, 1.3 [1.2–1.4] behind; the best is the least."""
    found = find_crossover(lines(BEHIND, DOUBT, AHEAD, metric=metric))
    assert (found.outcome, found.fades_at, found.reverses_at) == ("reverses", 2, 4)
    assert (found.best, found.best_at) == (0.8, 1)
    assert found.cross is not None and 1 < found.cross < 2


def test_without_an_interval_nothing_is_sure() -> None:
    bare = [replace(line, ratio_lo=None, ratio_hi=None) for line in lines(AHEAD, AHEAD)]
    assert find_crossover(bare).outcome == "undecided"
    assert find_crossover(bare).doubt == (1, 2)


@given(
    st.lists(st.tuples(st.floats(0.3, 3), st.floats(0.01, 0.5), st.floats(0.01, 0.5)), min_size=1, max_size=6),
    st.sampled_from(["tok_s", "tpot_p50_ms"]),
)
def test_every_load_has_its_place_and_mirrored_figures_the_mirrored_one(
    drawn: list[tuple[float, float, float]], metric: str
) -> None:
    own = lines(*((ratio, ratio * (1 - low), ratio * (1 + high)) for ratio, low, high in drawn), metric=metric)
    found = find_crossover(list(reversed(own)))
    assert sorted((*found.ahead, *found.doubt, *found.behind)) == [line.conc for line in own]
    mirrored = [
        replace(line, ratio=1 / line.ratio, ratio_lo=1 / line.ratio_hi, ratio_hi=1 / line.ratio_lo)
        for line in own
        if line.ratio and line.ratio_lo and line.ratio_hi
    ]
    other = find_crossover(mirrored)
    assert (other.ahead, other.doubt, other.behind) == (found.behind, found.doubt, found.ahead)
    if found.cross is not None and found.outcome != "gains":
        assert found.ahead[-1] < found.cross <= max(line.conc for line in own)


def test_one_for_each_precision_and_metric() -> None:
    """p95 is no phase of its own and has no line; a rate is a load like any other."""
    rated = [replace(line, precision="gptq", conc=0, rate_rps=0.5 * line.conc) for line in lines(AHEAD, DOUBT)]
    empty = replace(lines(AHEAD, metric="ttft_p50_ms")[0], ratio=None, ratio_lo=None, ratio_hi=None)
    found = find_crossovers([], [*lines(AHEAD), *lines(DOUBT, metric="p95_ms"), empty, *rated])
    assert [(one.precision, one.metric, one.outcome, one.fades_at) for one in found] == [
        ("awq", "tok_s", "always", None),
        ("gptq", "tok_s", "fades", 1.0),
    ]


def row(given: float | None, made: float | None, attempt: int = 1) -> SweepPoint:
    return SweepPoint("run", "awq", 1, attempt=attempt, input_tokens_mean=given, output_tokens_mean=made)


@pytest.mark.parametrize(
    ("given", "made", "kind"),
    [
        (128, 32, "decode-heavy"),  # chat: 4 input tokens for each output token
        (256, 128, "decode-heavy"),  # batch
        (512, 96, "decode-heavy"),  # code
        (1536, 64, "prefill-heavy"),  # rag: 24
        (8.0, 1.0, "decode-heavy"),
        (8.1, 1.0, "prefill-heavy"),
        (100, 0, None),
        (None, None, None),
    ],
)
def test_traffic(given: float | None, made: float | None, kind: str | None) -> None:
    assert traffic([row(given, made)]) == kind


def test_traffic_is_the_last_attempts() -> None:
    assert traffic([row(1536, 64, attempt=1), row(128, 32, attempt=2)]) == "decode-heavy"


def test_traffic_goes_with_each_crossover() -> None:
    (found,) = find_crossovers([row(1536, 64)], lines(AHEAD, BEHIND))
    assert found.traffic == "prefill-heavy" and math.isclose(
        found.cross or 0, 1 * 2 ** (math.log(1.3) / math.log(1.3 / 0.8))
    )
