"""Trials of the knee: families of networks whose crossing is known, what a sweep would measure of them, what it says.

A trial is a network, an SLO, and the rows of a sweep over it, simulated request by request; then the rows are disturbed
(sessions that differ, levels that are missing, one that was slowed down), and the knee's interval is held against the
truth. Used by benchmarks/knees.py and by tests/analysis/test_knee_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from networks import (
    LARGEST,
    Floats,
    Network,
    Sessions,
    batch,
    crossing,
    curve,
    fcfs,
    response_percentile,
    simulate,
)

from harness.analysis import metrics
from harness.analysis.knee import find_knee
from harness.records import Knee, SweepPoint
from harness.search import Search, next_load
from harness.slo import Slo

GRID = (1, 2, 4, 8, 16, 32, 64)
REQUESTS = 120
"""In the window of a level, as in scenarios/chat.toml; at least three for each user, as load/window.py has it."""

FAMILIES: dict[str, Callable[[np.random.Generator], Network]] = {
    "soft": lambda rng: fcfs(1, rng.uniform(2, 20)),
    "sharp": lambda rng: fcfs(int(rng.choice([4, 8, 16])), rng.uniform(0, 1.5)),
    "batch": lambda rng: batch(rng.uniform(0.03, 0.3), rng.uniform(0.5, 5)),
    "batch, no pause": lambda rng: batch(rng.uniform(0.03, 0.3), 0.0),
    "thrash": lambda rng: batch(rng.uniform(0.02, 0.15), rng.uniform(0.5, 5), 10 ** rng.uniform(-3.7, -2.5)),
}
"""Shapes of curves. soft: one server, the latency bends early. sharp: several, flat and then straight up. batch: every
request more slows all the others a little, with a pause between questions and without one. thrash: beyond a peak the
server does less, the more it holds."""
LONG: dict[str, Callable[[np.random.Generator], Network]] = {
    "batch, even lengths": lambda rng: replace(batch(rng.uniform(0.03, 0.3), rng.uniform(0.5, 5)), work="uniform"),
}
"""As FAMILIES, but with lengths as a scenario draws them: little noise, and a truth that takes minutes to simulate."""
_SHAPES = FAMILIES | LONG
POOL = 20
"""Networks drawn of a family; a trial takes one of them with an SLO of its own."""


@dataclass(frozen=True)
class Study:
    """Trials of one family: in each a network, an SLO, and what a sweep measured of its levels."""

    grid: tuple[int, ...]
    networks: list[Network]
    slo_s: Floats
    truth: Floats
    """The load at which p95 passes the SLO."""
    seen: list[Sessions]
    """Of each level of the grid."""
    p95_s: Floats
    """[trials, levels, 3]: value, lo, hi."""


def draw(family: str, trials: int, seed: int, grid: tuple[int, ...] = GRID, *, beside: bool = False) -> Study:
    """Trials of a family. SLOs: see `_slo`; `beside`: each is crossed within 5 % of a tested level."""
    rng = np.random.default_rng([seed, list(_SHAPES).index(family)])
    pool = [_SHAPES[family](rng) for _ in range(POOL)]
    curves = [curve(network) for network in pool]
    picks = rng.integers(POOL, size=trials)
    slo_s = np.array([_slo(curves[pick], grid, rng, beside) for pick in picks])
    truth = np.array([crossing(curves[pick], slo) for pick, slo in zip(picks, slo_s, strict=True)])
    return _measured(grid, [pool[pick] for pick in picks], slo_s, truth, rng)


def _slo(p95_s: Floats, grid: tuple[int, ...], rng: np.random.Generator, beside: bool) -> float:
    """Evenly in logs from 1.1 times the p95 of a lone user to that of 56 users; on a grid that does not begin with 1,
    from the p95 of its second to that of its last but one level."""
    if beside:
        rising = [users for users in grid[1:-1] if p95_s[users - 1] > 1.1 * p95_s[0]]
        at = math.log(rng.choice(rising or grid[-2:-1])) + rng.uniform(-0.05, 0.05)
        return float(np.exp(np.interp(at, np.log(np.arange(1, LARGEST + 1)), np.log(p95_s))))
    least, most = (1.1 * p95_s[0], p95_s[55]) if grid[0] == 1 else (p95_s[grid[1] - 1], p95_s[grid[-2] - 1])
    return math.exp(rng.uniform(math.log(least), math.log(most)))


def draw_below(shape: Literal["flat", "rising"], trials: int, seed: int) -> Study:
    """Curves that do not reach their SLO, 1.1 to 3 times the p95 of LARGEST users: where nobody waits, and batches."""
    rng = np.random.default_rng(seed)
    pool = [fcfs(LARGEST, 0.0)] if shape == "flat" else [FAMILIES["batch"](rng) for _ in range(POOL)]
    most = [response_percentile(network, LARGEST) for network in pool]
    picks = rng.integers(len(pool), size=trials)
    slo_s = np.array([most[pick] for pick in picks]) * 3 ** rng.uniform(math.log(1.1) / math.log(3), 1, trials)
    return _measured(GRID, [pool[pick] for pick in picks], slo_s, np.full(trials, np.inf), rng)


def _measured(
    grid: tuple[int, ...], networks: list[Network], slo_s: Floats, truth: Floats, rng: np.random.Generator
) -> Study:
    """Each level simulated, and its p95 worked out as a sweep does."""
    seen = [simulate(networks, users, max(REQUESTS, 3 * users), rng) for users in grid]
    p95_s = [
        [(metrics.percentile(row, 95), *(metrics.percentile_interval(row, 95) or ())) for row in level.e2e_s]
        for level in seen
    ]
    return Study(grid, networks, slo_s, truth, seen, np.array(p95_s, dtype=float).swapaxes(0, 1))


def req_s(study: Study) -> Floats:
    """[trials, levels, 3]: requests/s of a study's levels and its interval, over the slices of the window."""
    found = np.empty((*study.p95_s.shape[:2], 3))
    for level, seen in enumerate(study.seen):
        for trial, (row, window_s) in enumerate(zip(seen.completions, seen.window_s, strict=True)):
            ends = metrics.block_bootstrap(row, lambda slices: slices.sum(axis=1)) or (0.0, 0.0)
            found[trial, level] = np.array([row.sum(), *ends]) / window_s
    return found


Disturb = Callable[[np.random.Generator, Floats], Floats]
"""Figures of the levels of one trial, [levels, 3] -> what became of them; NaN: the level is missing."""


def session_noise(share: float) -> Disturb:
    """Each level is a session of its own: a factor that all its requests share, and that its interval does not know."""
    return lambda rng, figures: figures * np.exp(rng.normal(0, share, (len(figures), 1)))


def missing(count: int) -> Disturb:
    """So many levels were never measured."""

    def change(rng: np.random.Generator, figures: Floats) -> Floats:
        figures = figures.copy()
        figures[rng.choice(len(figures), count, replace=False)] = np.nan
        return figures

    return change


def outlier(least: float, most: float) -> Disturb:
    """One level, whichever it is, reads so many times its figure."""

    def change(rng: np.random.Generator, figures: Floats) -> Floats:
        figures = figures.copy()
        figures[rng.integers(len(figures))] *= rng.uniform(least, most)
        return figures

    return change


def knees(study: Study, disturb: Disturb | None = None, seed: int = 0) -> list[Knee]:
    """find_knee's answer in each trial."""
    rng = np.random.default_rng(seed)
    found = []
    for figures, slo_s in zip(study.p95_s, study.slo_s, strict=True):
        read = figures if disturb is None else disturb(rng, figures)
        found.append(find_knee(rows(study.grid, read), Slo(p95_s=float(slo_s))))
    return found


def searched(study: Study, precision: float, disturb: Disturb | None = None, seed: int = 0) -> list[Knee]:
    """find_knee's answer after a search, as `bench sweep --until` makes it; the study holds every load to its most."""
    rng = np.random.default_rng(seed)
    found = []
    for figures, slo_s in zip(study.p95_s, study.slo_s, strict=True):
        every = rows(study.grid, figures if disturb is None else disturb(rng, figures))
        search = Search(Slo(p95_s=float(slo_s)), precision=precision, most=study.grid[-1])
        measured: list[SweepPoint] = []
        while isinstance(load := next_load(measured, search), int):
            measured.append(every[load - 1])
        found.append(find_knee(measured, search.slo))
    return found


def rows(grid: tuple[int, ...], p95_s: Floats) -> list[SweepPoint]:
    """Rows of a sweep with these figures, [levels, 3]; NaN: there is none."""
    blank = SweepPoint("made", "bf16", 1, verdict="valid")
    return [
        replace(blank, conc=users, p95_ms=value * 1e3, p95_ms_lo=low * 1e3, p95_ms_hi=high * 1e3)
        for users, (value, low, high) in zip(grid, p95_s.tolist(), strict=True)
        if not math.isnan(value)
    ]


def covered(found: list[Knee], truth: Floats) -> float:
    """Share of the trials whose interval, cross_lo to cross_hi, holds the true crossing. An open end holds everything
    beyond it; no level inside is the claim that the crossing lies at or below the smallest of them."""
    held = []
    for knee, true in zip(found, truth, strict=True):
        low, high = knee.cross_lo, math.inf if knee.cross_hi is None else knee.cross_hi
        held.append(true <= (knee.tested_lo or 0.0) if low is None else low <= true <= high)
    return float(np.mean(held))
