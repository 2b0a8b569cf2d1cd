"""The scheduler beside queueing theory: what was known exactly before there was any vLLM.

With a step of constant time the simulation is a queue of textbooks: max_num_seqs servers, first come first served, and
a request's service takes as many steps as it has output tokens. Theory is met within 4 standard errors of the mean, by
batch means over 40 slices of a long run (Law & Carson, Oper. Res. 27, 1979), with fixed seeds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import poisson

from harness.predict.scheduler import Asked, Limits, Scheduler, simulate
from harness.predict.stretches import Served, Simulation

Floats = NDArray[np.float64]
PLENTY = 100_000
"""Blocks that never end."""


@dataclass(frozen=True)
class Constant:
    """Every step takes the same."""

    step_s: float

    def decode(self, sequences: int) -> tuple[float, float]:
        return self.step_s, 0.0

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        return self.step_s


@dataclass
class Open:
    """Poisson arrivals of `rate` a second, one token in; `tokens` draws the output's length."""

    rate: float
    requests: int
    tokens: Callable[[random.Random], int]
    seed: int = 1

    def first(self) -> Iterable[Asked]:
        rng, at = random.Random(self.seed), 0.0
        for number in range(self.requests):
            at += rng.expovariate(self.rate)
            yield Asked(at, 1, self.tokens(rng), number)

    def after(self, served: Served) -> Asked | None:
        return None


@dataclass
class Closed:
    """Users who think for an exponential time and ask again."""

    users: int
    requests: int
    """Left to ask."""
    think_s: float
    tokens: Callable[[random.Random], int]
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def ask(self, at: float, user: int) -> Asked:
        self.requests -= 1
        think_s = self.rng.expovariate(1 / self.think_s) if self.think_s else 0.0
        return Asked(at + think_s, 1, self.tokens(self.rng), user)

    def first(self) -> Iterable[Asked]:
        return [self.ask(0.0, user) for user in range(self.users)]

    def after(self, served: Served) -> Asked | None:
        return self.ask(served.last_token_s, served.user) if self.requests > 0 else None


def geometric(mean: float) -> Callable[[random.Random], int]:
    """The number of tokens of an answer that ends after each with probability 1 / mean."""
    return lambda rng: 1 + int(math.log(1 - rng.random()) / math.log1p(-1 / mean))


def assert_mean(values: Sequence[float] | Floats, theory: float, bias: float = 0.0) -> None:
    """The mean of a correlated series is the theory's, give or take `bias`; and the run is long enough to tell."""
    series = np.asarray(values)[len(values) // 20 :]
    slices = np.array([part.mean() for part in np.array_split(series, 40)])
    error = slices.std(ddof=1) / math.sqrt(len(slices))
    assert error < 0.08 * theory
    assert abs(slices.mean() - theory) < 4 * error + bias


def waits(simulation: Simulation) -> Floats:
    """From arrival to service, in order of arrival."""
    served = sorted(simulation.served, key=lambda s: s.arrival_s)
    return np.array([s.scheduled_s - s.arrival_s for s in served])


def crommelin(load: float, servers: int) -> float:
    """Mean wait of M/D/c in service times, offered load a = λD (C. D. Crommelin, P.O.E.E. J. 26, 1933):

    Σ_{i≥1} [ P(N_ia ≥ ic) − c/a · P(N_ia ≥ ic + 1) ],  N_m Poisson of mean m
    """
    i = np.arange(1, 4000)
    reach = poisson.sf(i * servers - 1, i * load)
    return float(np.sum(reach - servers / load * poisson.sf(i * servers, i * load)))


def test_crommelin_is_pollaczek_and_khinchine_for_one_server() -> None:
    for load in (0.1, 0.5, 0.9):
        assert crommelin(load, 1) == pytest.approx(load / (2 * (1 - load)), rel=1e-6)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1(load: float) -> None:
    """One sequence at a time, one token: service D = 0.5 s. Mean wait ρD / 2(1 − ρ) (Pollaczek 1930, Khinchine 1932);
    for ρ = 0.8: 0.8 · 0.5 / 0.4 = 1 s."""
    simulation = simulate(Open(load / 0.5, 20_000, lambda rng: 1), Limits(PLENTY, max_num_seqs=1), Constant(0.5))
    assert_mean(waits(simulation), load * 0.5 / (2 * (1 - load)))
    assert simulation.busy_s == pytest.approx(20_000 * 0.5)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_m_g_1(load: float) -> None:
    """Answers of geometric length, mean m = 20 tokens of 0.05 s: E[S] = 1, E[S²] = (2m² − m) · 0.05² = 1.95 s².

    Mean wait λE[S²] / 2(1 − ρ); for ρ = 0.8: 0.8 · 1.95 / 0.4 = 3.9 s (exponential service: 4).
    """
    simulation = simulate(Open(load, 30_000, geometric(20)), Limits(PLENTY, max_num_seqs=1), Constant(0.05))
    assert_mean(waits(simulation), load * 1.95 / (2 * (1 - load)))


def test_m_m_1_in_distribution() -> None:
    """Tokens so short that a geometric answer is exponential: at ρ = 0.5 the time in the system is exponential too, of
    mean 1 / (μ − λ) = 2 s, so its percentiles are −2 ln(1 − q)."""
    simulation = simulate(Open(0.5, 30_000, geometric(500)), Limits(PLENTY, max_num_seqs=1), Constant(0.002))
    times = np.array([s.last_token_s - s.arrival_s for s in simulation.served])
    for q in (0.5, 0.9, 0.95):
        assert np.quantile(times, q) == pytest.approx(-2 * math.log(1 - q), rel=0.05)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.5), (4, 0.6), (8, 0.7)])
def test_m_d_c(servers: int, load: float) -> None:
    """c sequences at once, 500 tokens of 2 ms each: c servers of D = 1 s. Who comes within a step waits for its end, at
    most 2 ms, and so the wait is Crommelin's with up to that more."""
    arrivals = Open(load * servers, 25_000, lambda rng: 500)
    simulation = simulate(arrivals, Limits(PLENTY, max_num_seqs=servers), Constant(0.002))
    assert_mean(waits(simulation), crommelin(load * servers, servers), bias=0.002)
    assert simulation.running_peak == servers


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kv_blocks", [12, PLENTY])
def test_littles_law(kv_blocks: int, chunked: bool) -> None:
    """L = λW (Little, Oper. Res. 9, 1961), short of memory or not. L: what the scheduler's own queues hold, step by
    step; W: from the first step that begins once a request is there to its last token, as the simulation tells it."""
    limits = Limits(kv_blocks, max_num_seqs=8, chunked_prefill=chunked)
    load = Open(2.0, 500, lambda rng: rng.randint(1, 120))
    simulation = simulate(load, limits, Constant(0.02))
    assert (simulation.preemptions > 0) is (kv_blocks == 12)

    scheduler, arrivals = Scheduler(limits, Constant(0.02)), list(load.first())
    begun: list[float] = []
    now, area = 0.0, 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, arrivals[0].arrival_s)
        while arrivals and arrivals[0].arrival_s <= now:
            scheduler.add(arrivals.pop(0))
        begun.append(now)
        stretch, _, ended = scheduler.next_step(now)
        area += (stretch.end_s - now) * (len(scheduler.running) + len(scheduler.waiting) + len(ended))
        now = stretch.end_s
    found = np.searchsorted(np.array(begun) + 1e-9, [s.arrival_s for s in simulation.served])
    stays = [s.last_token_s - begun[at] for s, at in zip(simulation.served, found, strict=True)]
    rate = len(simulation.served) / simulation.end_s
    assert area / now == pytest.approx(rate * np.mean(stays))


@pytest.mark.parametrize("users", [0, 12])
def test_littles_law_of_decoding(users: int) -> None:
    """The same for the stage between first and last token: L is what the stretches say, sequences that decode times
    their length; λW is the requests' own times."""
    load = Closed(users, 2000, 1.5, geometric(60)) if users else Open(2.0, 2000, geometric(60))
    simulation = simulate(load, Limits(PLENTY, max_num_seqs=8), Constant(0.02))
    area = sum(stretch.decoding * (stretch.end_s - stretch.start_s) for stretch in simulation.stretches)
    assert area == pytest.approx(sum(s.last_token_s - s.first_token_s for s in simulation.served))


@pytest.mark.parametrize("users", [1, 7, 32])
def test_users_who_never_think(users: int) -> None:
    """n users, a step of a = 0.03 s, 50 tokens each: a token a step for each, so n / a tokens/s, and each answer takes
    50 a = 1.5 s from question to end. 20 rounds."""
    simulation = simulate(Closed(users, users * 20, 0.0, lambda rng: 50), Limits(PLENTY), Constant(0.03))
    assert simulation.end_s == pytest.approx(20 * 1.5)
    assert simulation.tokens_between(3.0, 27.0) == pytest.approx(users / 0.03 * 24, abs=2 * users)
    assert [s.last_token_s - s.arrival_s for s in simulation.served] == pytest.approx([1.5] * users * 20)


def test_more_users_than_places() -> None:
    """24 users for 8 places: 8 / 0.03 tokens/s, and by N = X · R an answer takes 24 / (8 / 1.5) = 4.5 s."""
    simulation = simulate(Closed(24, 24 * 20, 0.0, lambda rng: 50), Limits(PLENTY, max_num_seqs=8), Constant(0.03))
    times = np.array([s.last_token_s - s.arrival_s for s in simulation.served])
    assert times[24:] == pytest.approx(4.5)
    assert (simulation.running_peak, simulation.waiting_peak) == (8, 16)
    assert simulation.end_s == pytest.approx(24 * 20 * 1.5 / 8)


@pytest.mark.parametrize(("users", "places"), [(5, 1), (12, 4)])
def test_machine_repair(users: int, places: int) -> None:
    """Users who think for Z = 4 s (exponential) and answers of 1 s (geometric, 400 tokens, nearly exponential) at c
    places: the machines and repairmen of Palm (1947). With n of N asking, p(n) ∝ N! / (N − n)! · Z^−n / Π min(i, c);
    throughput Σ p(n) min(n, c), and an answer takes N / X − Z."""
    n = np.arange(users + 1)
    logs = gammaln(users + 1) - gammaln(users - n + 1) - n * math.log(4.0)
    logs -= np.concatenate([[0.0], np.cumsum(np.log(np.minimum(np.arange(1, users + 1), places)))])
    p = np.exp(logs - logs.max())
    throughput = float(p @ np.minimum(n, places) / p.sum())
    simulation = simulate(
        Closed(users, 30_000, 4.0, geometric(400)), Limits(PLENTY, max_num_seqs=places), Constant(0.0025)
    )
    times = [s.last_token_s - s.arrival_s for s in sorted(simulation.served, key=lambda s: s.arrival_s)]
    assert_mean(times, users / throughput - 4.0, bias=0.0025)
