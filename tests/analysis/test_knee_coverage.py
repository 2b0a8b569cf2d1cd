"""Does the knee's 95 % interval hold the true crossing? On closed queueing networks, whose p95 is known exactly.

benchmarks/networks.py has the networks, their laws and their simulations; docs/knees.md a larger study of the same.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def _networks() -> ModuleType:
    """benchmarks/networks.py; benchmarks/ is no package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = module
    spec.loader.exec_module(module)
    return module


nw = _networks()
TRIALS = 500


@cache
def study(family: str) -> object:
    """Levels of 1, 2, 4 .. 64 users, at least 120 requests each, simulated for 500 networks and SLOs of a family."""
    return nw.draw(family, TRIALS, seed=1)


@cache
def below(shape: str) -> object:
    """The same of curves that do not reach their SLO."""
    return nw.draw_below(shape, TRIALS, seed=4)


CONDITIONS = {
    "as simulated": None,
    "sessions differ by 5 %": nw.session_noise(0.05),
    "sessions differ by 10 %": nw.session_noise(0.10),
    "two levels missing": nw.missing(2),
    "three levels": nw.missing(4),
    "one level disturbed": nw.outlier(2, 4),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", nw.FAMILIES)
def test_the_interval_holds_the_true_crossing(family: str, condition: str) -> None:
    found = nw.knees(study(family), CONDITIONS[condition])
    assert nw.covered(found, study(family).truth) >= 0.93


@pytest.mark.parametrize("family", ["soft", "batch"])
def test_levels_close_together_keep_what_they_say(family: str) -> None:
    """What `--until` ends with: no bracket so wide that it covers by its width alone."""
    close = nw.draw(family, 250, seed=2, grid=(12, 13, 15, 16, 18, 20, 22, 24, 27, 30, 33, 36))
    assert nw.covered(nw.knees(close), close.truth) >= 0.93


def test_repeated_sessions_cover_what_sessions_differ_by() -> None:
    """Three sessions of each level, 10 % apart: their t-interval knows it."""
    drawn = study("batch")
    rng = np.random.default_rng(3)
    noisy = drawn.p95_s[:, :, None] * np.exp(rng.normal(0, 0.1, (*drawn.p95_s.shape[:2], 3, 1)))
    found = [
        nw.find_knee(
            [
                nw.replace(row, repeat=repeat + 1)
                for repeat in range(3)
                for row in nw.rows(drawn.grid, levels[:, repeat])
            ],
            nw.Slo(p95_s=float(slo_s)),
        )
        for levels, slo_s in zip(noisy, drawn.slo_s, strict=True)
    ]
    assert nw.covered(found, drawn.truth) >= 0.93


@pytest.mark.parametrize("condition", ["as simulated", "sessions differ by 5 %", "two levels missing", "three levels"])
@pytest.mark.parametrize("shape", ["flat", "rising"])
def test_a_curve_that_does_not_cross_has_no_knee(shape: str, condition: str) -> None:
    """SLOs of 1.1 to 3 times the p95 of 64 users: on a server where nobody waits, and on cards that batch."""
    found = nw.knees(below(shape), CONDITIONS[condition])
    assert np.mean([knee.beyond_range or knee.cross_hi is None for knee in found]) >= 0.97
    assert np.mean([knee.beyond_range for knee in found]) >= 0.90


@pytest.mark.parametrize(
    ("network", "users"),
    [
        (nw.fcfs(1, 10.0), 16),
        (nw.fcfs(4, 2.0), 16),
        (nw.fcfs(8, 0.0), 32),
        (nw.batch(0.1, 3.0), 16),
        (nw.batch(0.1, 0.0), 16),
        (nw.batch(0.05, 2.0, 0.002), 24),
    ],
)
def test_the_laws_agree_with_the_simulation(network: object, users: int) -> None:
    """The exact p95 and throughput against 100,000 requests of the simulator that the trials are made with."""
    seen = nw.simulate([network] * 25, users, 4000, np.random.default_rng(5))
    assert np.percentile(seen.e2e_s, 95) == pytest.approx(nw.response_percentile(network, users), rel=0.03)
    rate = float(np.mean(seen.completions.sum(axis=1) / seen.window_s))
    assert rate == pytest.approx(nw.throughput(network, users), rel=0.02)


def test_laws_by_hand() -> None:
    """One server, no thinking, 2 users: a request waits for the other's Exp(1) and has its own: Erlang(2, 1), whose
    tail is e^−t (1 + t) and whose p95 is 4.744. Throughput is 1.

    Two servers, think 1 s, 2 users: nobody waits, so Exp(1): p95 = ln 20, and each user asks once in 2 s.

    Sharing with r(1) = 1, r(2) = 1.6, no thinking: each of two has half of 1.6: Exp(0.8).

    N* = X_max (R(1) + Z): 4 servers, think 2 s: 4 · (1 + 2) = 12.
    """
    assert nw.response_percentile(nw.fcfs(1, 0.0), 2) == pytest.approx(4.744, abs=0.001)
    assert nw.throughput(nw.fcfs(1, 0.0), 2) == pytest.approx(1.0)
    assert nw.response_percentile(nw.fcfs(2, 1.0), 2) == pytest.approx(np.log(20))
    assert nw.throughput(nw.fcfs(2, 1.0), 2) == pytest.approx(1.0)
    assert nw.response_percentile(nw.batch(0.25, 0.0), 2) == pytest.approx(np.log(20) / 0.8)
    assert nw.saturation(nw.fcfs(4, 2.0)) == pytest.approx(12.0)
