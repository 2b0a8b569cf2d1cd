"""Does the knee's 95 % interval hold the true crossing? On closed queueing networks, whose p95 is known exactly.

benchmarks/networks.py has their laws and their simulation, knee_trials.py the trials; docs/knees.md a larger study.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.knee import find_knee
from harness.slo import Slo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import knee_trials as trials  # noqa: E402
import networks  # noqa: E402
from knee_trials import Study  # noqa: E402
from networks import Network  # noqa: E402

TRIALS = 500


@cache
def study(family: str) -> Study:
    """Levels of 1, 2, 4 .. 64 users, at least 120 requests each, simulated for 500 networks and SLOs of a family."""
    return trials.draw(family, TRIALS, seed=1)


@cache
def below(shape: str) -> Study:
    """The same of curves that do not reach their SLO."""
    return trials.draw_below(shape, TRIALS, seed=4)


CONDITIONS = {
    "as simulated": None,
    "sessions differ by 5 %": trials.session_noise(0.05),
    "sessions differ by 10 %": trials.session_noise(0.10),
    "two levels missing": trials.missing(2),
    "three levels": trials.missing(4),
    "one level disturbed": trials.outlier(2, 4),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", trials.FAMILIES)
def test_the_interval_holds_the_true_crossing(family: str, condition: str) -> None:
    found = trials.knees(study(family), CONDITIONS[condition])
    assert trials.covered(found, study(family).truth) >= 0.93


@pytest.mark.parametrize("family", ["soft", "batch"])
def test_levels_close_together_keep_what_they_say(family: str) -> None:
    """What `--until` ends with: no bracket so wide that it covers by its width alone."""
    close = trials.draw(family, 250, seed=2, grid=(12, 13, 15, 16, 18, 20, 22, 24, 27, 30, 33, 36))
    assert trials.covered(trials.knees(close), close.truth) >= 0.93


def test_a_search_keeps_what_it_says() -> None:
    """`--until` chooses each load by what it has seen, and so looks closest where a verdict can be wrong. On the family
    whose latencies are the hardest to know."""
    every = trials.draw("soft", 250, seed=3, grid=tuple(range(1, 65)))
    assert trials.covered(trials.searched(every, precision=0.1), every.truth) >= 0.93


def test_repeated_sessions_cover_what_sessions_differ_by() -> None:
    """Three sessions of each level, 10 % apart: their t-interval knows it."""
    drawn = study("batch")
    rng = np.random.default_rng(3)
    noisy = drawn.p95_s[:, :, None] * np.exp(rng.normal(0, 0.1, (*drawn.p95_s.shape[:2], 3, 1)))
    found = [
        find_knee(
            [
                replace(row, repeat=repeat + 1)
                for repeat in range(3)
                for row in trials.rows(drawn.grid, levels[:, repeat])
            ],
            Slo(p95_s=float(slo_s)),
        )
        for levels, slo_s in zip(noisy, drawn.slo_s, strict=True)
    ]
    assert trials.covered(found, drawn.truth) >= 0.93


@pytest.mark.parametrize("condition", ["as simulated", "sessions differ by 5 %", "two levels missing", "three levels"])
@pytest.mark.parametrize("shape", ["flat", "rising"])
def test_a_curve_that_does_not_cross_has_no_knee(shape: str, condition: str) -> None:
    """SLOs of 1.1 to 3 times the p95 of 64 users: on a server where nobody waits, and on cards that batch."""
    found = trials.knees(below(shape), CONDITIONS[condition])
    assert np.mean([knee.beyond_range or knee.cross_hi is None for knee in found]) >= 0.97
    assert np.mean([knee.beyond_range for knee in found]) >= 0.90


@pytest.mark.parametrize(
    ("network", "users"),
    [
        (networks.fcfs(1, 10.0), 16),
        (networks.fcfs(4, 2.0), 16),
        (networks.fcfs(8, 0.0), 32),
        (networks.batch(0.1, 3.0), 16),
        (networks.batch(0.1, 0.0), 16),
        (networks.batch(0.05, 2.0, 0.002), 24),
    ],
)
def test_the_laws_agree_with_the_simulation(network: Network, users: int) -> None:
    """The exact p95 and throughput against 100,000 requests of the simulator that the trials are made with."""
    seen = networks.simulate([network] * 25, users, 4000, np.random.default_rng(5))
    assert np.percentile(seen.e2e_s, 95) == pytest.approx(networks.response_percentile(network, users), rel=0.03)
    rate = float(np.mean(seen.completions.sum(axis=1) / seen.window_s))
    assert rate == pytest.approx(networks.throughput(network, users), rel=0.02)


def test_laws_by_hand() -> None:
    """One server, no thinking, 2 users: a request waits for the other's Exp(1) and has its own: Erlang(2, 1), whose
    tail is e^−t (1 + t) and whose p95 is 4.744. Throughput is 1.

    Two servers, think 1 s, 2 users: nobody waits, so Exp(1): p95 = ln 20, and each user asks once in 2 s.

    Sharing with r(1) = 1, r(2) = 1.6, no thinking: each of two has half of 1.6: Exp(0.8).

    N* = X_max (R(1) + Z): 4 servers, think 2 s: 4 · (1 + 2) = 12.
    """
    assert networks.response_percentile(networks.fcfs(1, 0.0), 2) == pytest.approx(4.744, abs=0.001)
    assert networks.throughput(networks.fcfs(1, 0.0), 2) == pytest.approx(1.0)
    assert networks.response_percentile(networks.fcfs(2, 1.0), 2) == pytest.approx(np.log(20))
    assert networks.throughput(networks.fcfs(2, 1.0), 2) == pytest.approx(1.0)
    assert networks.response_percentile(networks.batch(0.25, 0.0), 2) == pytest.approx(np.log(20) / 0.8)
    assert networks.saturation(networks.fcfs(4, 2.0)) == pytest.approx(12.0)
