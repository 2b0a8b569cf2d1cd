"""Closer to the FLOP ceiling or relieved of bandwidth: every rule, and what lies just beside it."""

from __future__ import annotations

import pytest

from harness.analysis.ceilings import LINEARS, Ceiling, Point, Work
from harness.analysis.compare import Estimate
from harness.analysis.relief import Answer, cached, relief

CEILING = Ceiling("card", bandwidth_gb_s=1000, tflops=100, kind="BF16", source="made")  # ridge: 100 FLOPs a byte
FASTER, SLOWER = Estimate(2, 1.9, 2.1), Estimate(0.5, 0.4, 0.6)


def _point(megabytes: float, gflop: float, ms: float) -> Point:
    return Point("decode", LINEARS, ms, Work(megabytes * 1e6, gflop * 1e9))


# 1000 MB in 1.25 ms are 800 GB/s, 80 % of the bandwidth; 1 GFLOP: 1 a byte
BASE = _point(1000, 1, 1.25)
INT4 = _point(280, 1, 0.5)


@pytest.mark.parametrize(
    ("base", "other", "ratio", "answer"),
    [
        (BASE, INT4, FASTER, "relieved"),
        (BASE, INT4, SLOWER, "slower"),
        (BASE, INT4, Estimate(1.01, 0.99, 1.03), "undecided"),
        (BASE, INT4, Estimate(2), "undecided"),
        (BASE, INT4, Estimate(), "undecided"),
        (BASE, INT4, Estimate(2, 1, 3), "undecided"),
        (None, INT4, FASTER, "faster"),
        (None, None, SLOWER, "slower"),
        # 60 GFLOP: 60 a byte in 1000 MB, 214 in 280 MB, with the ridge at 100
        (_point(1000, 60, 1.25), _point(280, 60, 0.7), FASTER, "closer"),
        (_point(1000, 120, 1.25), _point(280, 120, 0.7), FASTER, "at peak"),
        # 1000 MB in 4 ms are 250 GB/s: neither ceiling is near
        (_point(1000, 1, 4), INT4, FASTER, "elsewhere"),
        (BASE, _point(1000, 1, 0.5), FASTER, "elsewhere"),
    ],
)
def test_the_answer(base: Point | None, other: Point | None, ratio: Estimate, answer: Answer) -> None:
    found = relief("decode", [base] if base else [], [other] if other else [], ratio, CEILING)
    assert found.answer == answer


def test_without_a_ceiling_nobody_knows_why_it_is_faster() -> None:
    assert relief("decode", [BASE], [INT4], FASTER, None).answer == "faster"


def test_only_the_phase_asked_for_counts() -> None:
    assert relief("prefill", [BASE], [INT4], FASTER, CEILING).base is None


def test_what_the_saved_bytes_brought_by_hand() -> None:
    """1000 MB took 1.25 ms; 720 MB fewer would save 0.9 ms at that rate. 0.75 ms were saved: 83 %. A precision that is
    slower by 0.25 ms saved less than nothing: -28 %."""
    found = relief("decode", [BASE], [INT4], FASTER, CEILING)
    assert found.bytes_ratio == pytest.approx(0.28)
    assert found.realised == pytest.approx(0.75 / 0.9)
    assert relief("decode", [BASE], [_point(280, 1, 1.5)], SLOWER, CEILING).realised == pytest.approx(-0.25 / 0.9)
    assert relief("decode", [BASE], [_point(1000, 1, 0.5)], FASTER, CEILING).realised is None


def test_more_than_memory_delivers_comes_from_a_cache() -> None:
    """1000 MB in 0.9 ms are 1,111 GB/s."""
    assert cached(_point(1000, 1, 0.9), CEILING)
    assert not cached(BASE, CEILING)
