"""Closed queueing networks whose response times are known exactly, and simulations of them: the oracle of the knees.

    ┌──────────── N users, each thinks for think_s (exponential, mean) ◄────────────┐
    └──────────────────────────► one server, rates[n − 1] requests/s with n in it ──┘

With exponential work the number in the server has the product form (Gordon & Newell, Oper. Res. 15, 1967)

    p_N(n) ∝ think^(N−n) / (N−n)! · Π_{i≤n} 1 / rates[i − 1]

and a request finds the others as if its own user were not there: p_{N−1} (the arrival theorem: Lavenberg & Reiser,
J. Appl. Prob. 17, 1980; Sevcik & Mitrani, J. ACM 28, 1981). What follows for its response time depends on who is
served:

    fcfs   c servers in order of arrival: with n ≥ c before it, Erlang(n − c + 1) of rate c·μ, then Exp(μ)
    ps     all at once, each with its share rates[n − 1] / n, as continuous batching does: a Markov chain over the
           number of others in the server that ends with rate rates[n] / (n + 1) from state n; its generator is
           symmetrised, so that the tail is a sum of exponentials (Mitra, Adv. Appl. Prob. 13, 1981)

Work that is not exponential has no such form for response times; its truth is a long simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincc, gammaln

Floats = NDArray[np.float64]

LARGEST = 64
"""Users that the networks are defined for."""
SLICES = 40
"""Of the window, for the interval of throughput: as metrics.throughput_interval has it."""


@dataclass(frozen=True)
class Network:
    """One server and users who think. A unit of work takes a lone request 1 / rates[0] seconds."""

    discipline: Literal["fcfs", "ps"]
    rates: Floats
    """Requests/s with 1, 2, … in the server, LARGEST long. fcfs: min(n, servers) · μ."""
    think_s: float = 0.0
    servers: int = 1
    work: Literal["exponential", "uniform"] = "exponential"
    """uniform: 0.75 to 1.25, as scenarios/chat.toml draws its lengths."""


def fcfs(servers: int, think_s: float) -> Network:
    """Servers of 1 request/s each: a limit on running sequences (max_num_seqs) below which nothing slows down."""
    return Network("fcfs", np.minimum(np.arange(1.0, LARGEST + 1), servers), think_s, servers)


def batch(contention: float, think_s: float, coherency: float = 0.0) -> Network:
    """A card that batches: alone a request takes a second; n together n / (1 + a(n−1) + k·n(n−1)) requests/s.

    That is the Universal Scalability Law itself as a server: with k = 0 it levels off at 1 / a.
    """
    n = np.arange(1.0, LARGEST + 1)
    return Network("ps", n / (1 + contention * (n - 1) + coherency * n * (n - 1)), think_s)


def in_server(network: Network, users: int) -> Floats:
    """p_N(n), n = 0..N: the share of the time with n of the N users in the server."""
    if network.think_s == 0 or users == 0:
        return np.asarray(np.eye(users + 1)[users])
    n = np.arange(users + 1)
    served = np.concatenate([[0.0], np.cumsum(np.log(network.rates[:users]))])
    logs = (users - n) * math.log(network.think_s) - gammaln(users - n + 1) - served
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def throughput(network: Network, users: int) -> float:
    """Requests/s of N users: exact, whatever the distribution of the work where the server is shared (BCMP 1975)."""
    return float(in_server(network, users)[1:] @ network.rates[:users])


def saturation(network: Network) -> float:
    """N* = X_max · (R(1) + Z): where throughput's two asymptotes meet (Denning & Buzen, Comput. Surv. 10, 1978)."""
    return float(network.rates.max() * (1 / network.rates[0] + network.think_s))


def tail(network: Network, users: int) -> Callable[[float], float]:
    """t -> P(response time > t) with N users; exponential work."""
    if network.work != "exponential":
        raise ValueError("only exponential work has an exact response time")
    found = in_server(network, users - 1)
    return _fcfs_tail(network, found) if network.discipline == "fcfs" else _shared_tail(network, found)


def _fcfs_tail(network: Network, found: Floats) -> Callable[[float], float]:
    """Found fewer than c: Exp(μ). Found n ≥ c: Erlang(k = n−c+1, cμ) + Exp(μ), whose tail is, for c > 1,

    P(Erlang > t) + e^(−μt) · (c / (c−1))^k · P(Gamma(k, (c−1)μ) ≤ t)            and Erlang(k+1, μ) for c = 1.
    """
    mu, servers = float(network.rates[0]), network.servers
    free, waiting = float(found[:servers].sum()), found[servers:]
    k = np.arange(1, len(waiting) + 1)

    def beyond(t: float) -> float:
        if servers == 1:
            late = gammaincc(k + 1, mu * t)
        else:
            rest = np.exp(k * math.log(servers / (servers - 1)) - mu * t) * gammainc(k, (servers - 1) * mu * t)
            late = gammaincc(k, servers * mu * t) + rest
        return free * math.exp(-mu * t) + float(waiting @ late)

    return beyond


def _shared_tail(network: Network, found: Floats) -> Callable[[float], float]:
    """State: others in the server, n = 0..N−1. They leave with n·r_n, r_n = rates[n]/(n+1), and come back with
    (N−1−n)/Z; the request ends with r_n. Up · down products are all that a symmetrised birth-death chain needs."""
    others = len(found) - 1
    n = np.arange(others + 1)
    each = network.rates[: others + 1] / (n + 1)
    if network.think_s == 0:
        return lambda t: math.exp(-float(each[-1]) * t)
    up, down = (others - n) / network.think_s, n * each
    rates, vectors = eigh_tridiagonal(-(up + down + each), np.sqrt(up[:-1] * down[1:]))
    logs = 0.5 * np.concatenate([[0.0], np.cumsum(np.log(up[:-1] / down[1:]))])
    scale = np.exp(logs - logs.max())
    weights = (found / scale) @ vectors * (vectors.T @ scale)
    return lambda t: float(weights @ np.exp(rates * t))


def response_percentile(network: Network, users: int, q: float = 95) -> float:
    """The q-th percentile of the response time with N users, s."""
    beyond, most = tail(network, users), 1 / float(network.rates[0])
    while beyond(most) > 1 - q / 100:
        most *= 2
    return float(brentq(lambda t: beyond(t) - (1 - q / 100), 0, most, xtol=1e-10))


def curve(network: Network) -> Floats:
    """p95 in s for 1..LARGEST users: exact, or where there is no exact one of 100 simulations of 1,000 requests each,
    every few users, and straight in logs between them."""
    if network.work == "exponential":
        return np.array([response_percentile(network, users) for users in range(1, LARGEST + 1)])
    some, rng = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 64), np.random.default_rng(0)
    seen = [np.percentile(simulate([network] * 100, users, 1000, rng).e2e_s, 95) for users in some]
    return np.asarray(np.exp(np.interp(np.log(np.arange(1, LARGEST + 1)), np.log(some), np.log(seen))))


def crossing(p95_s: Floats, slo_s: float) -> float:
    """The load at which a curve over 1..LARGEST users passes the SLO; between whole numbers straight in logs."""
    above = int(np.argmax(p95_s > slo_s))
    if above == 0:
        raise ValueError("the SLO is not crossed between 1 user and the most")
    share = math.log(slo_s / p95_s[above - 1]) / math.log(p95_s[above] / p95_s[above - 1])
    return float(above * ((above + 1) / above) ** share)


@dataclass(frozen=True)
class Sessions:
    """What a sweep would have seen of one level, once for each network."""

    e2e_s: Floats
    """[networks, requests]: the first requests begun inside the window, in the order in which they began."""
    completions: Floats
    """[networks, SLICES]: requests that ended in each slice of the window."""
    window_s: Floats


def simulate(networks: list[Network], users: int, requests: int, rng: np.random.Generator) -> Sessions:
    """One level of a closed loop by discrete events, for networks of one discipline at once.

    As a sweep does it: users begin one after the other, the window opens when each has been answered once, and load
    is held until the last request begun in it has ended.
    """
    play = _play_fcfs if networks[0].discipline == "fcfs" else _play_shared
    begun, ended, opens = play(networks, users, requests + 20 * users + 40, rng)
    order = np.argsort(begun, axis=1, kind="stable")
    begun, in_order = np.take_along_axis(begun, order, 1), np.take_along_axis(ended, order, 1)
    picks = (begun < opens[:, None]).sum(axis=1)[:, None] + np.arange(requests)
    if picks.max() >= begun.shape[1]:
        raise RuntimeError("the simulation ended before its window did")
    starts, ends = np.take_along_axis(begun, picks, 1), np.take_along_axis(in_order, picks, 1)
    if not np.isfinite(ends).all():
        raise RuntimeError("the simulation ended before the last request of its window did")
    window_s = starts[:, -1] - opens
    at = ((ended - opens[:, None]) / window_s[:, None] * SLICES).clip(-1, SLICES + 1)
    slices = np.stack([np.histogram(row[np.isfinite(row)], bins=np.arange(SLICES + 1))[0] for row in at])
    return Sessions(ends - starts, slices.astype(float), window_s)


def _drawn(networks: list[Network], rng: np.random.Generator) -> Floats:
    """Work of one request for each network, mean 1."""
    if networks[0].work == "uniform":
        return rng.uniform(0.75, 1.25, len(networks))
    return rng.exponential(size=len(networks))


def _play_fcfs(
    networks: list[Network], users: int, events: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """(begun, ended) [networks, events] in order of arrival, and when the last user had its first answer.

    In order of arrival the next event is always the earliest arrival: it gets the server that is free first.
    """
    trials = np.arange(len(networks))
    mu, think_s = (np.array([value(network) for network in networks]) for value in (_alone, _think))
    servers = np.array([network.servers for network in networks])
    free = np.where(np.arange(servers.max()) < servers[:, None], 0.0, np.inf)
    arrives = rng.uniform(0, 0.02 * users, (len(networks), users)) / mu[:, None]
    first = np.full(arrives.shape, np.inf)
    begun, ended = np.empty((2, len(networks), events))
    for event in range(events):
        user, server = arrives.argmin(axis=1), free.argmin(axis=1)
        arrival = arrives[trials, user]
        end = np.maximum(arrival, free[trials, server]) + _drawn(networks, rng) / mu
        free[trials, server] = end
        first[trials, user] = np.minimum(first[trials, user], end)
        arrives[trials, user] = end + rng.exponential(size=len(networks)) * think_s
        begun[:, event], ended[:, event] = arrival, end
    return begun, ended, first.max(axis=1)


def _play_shared(
    networks: list[Network], users: int, events: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """As `_play_fcfs`, requests in the order in which they began; the last ones have no end (inf)."""
    count = len(networks)
    trials, think_s = np.arange(count), np.array([_think(network) for network in networks])
    rates = np.stack([network.rates[:users] for network in networks])
    left = np.full((count, users), np.inf)
    wakes = rng.uniform(0, 0.02 * users, (count, users)) / rates[:, :1]
    number = np.zeros((count, users), dtype=np.int64)
    first, now, asked = np.full((count, users), np.inf), np.zeros(count), np.zeros(count, dtype=np.int64)
    begun, ended = np.full((2, count, events), np.inf)
    while asked.min() < events + 10 * users:  # the last of them are not looked at: they let the others end
        serving = np.isfinite(left).sum(axis=1)
        share = rates[trials, np.maximum(serving, 1) - 1] / np.maximum(serving, 1)
        done, awake = left.argmin(axis=1), wakes.argmin(axis=1)
        ends_in, wakes_in = left[trials, done] / share, wakes[trials, awake]
        ends = ends_in < wakes_in
        step = np.where(ends, ends_in, wakes_in)
        now += step
        left -= (step * share)[:, None]
        wakes -= step[:, None]
        rows, who = trials[ends], done[ends]
        known = number[rows, who] < events
        ended[rows[known], number[rows, who][known]] = now[rows[known]]
        first[rows, who] = np.minimum(first[rows, who], now[rows])
        left[rows, who] = np.inf
        wakes[rows, who] = (rng.exponential(size=count) * think_s)[rows]
        rows, who = trials[~ends], awake[~ends]
        wakes[rows, who] = np.inf
        left[rows, who] = _drawn(networks, rng)[rows]
        number[rows, who] = asked[rows]
        known = asked[rows] < events
        begun[rows[known], asked[rows[known]]] = now[rows[known]]
        asked[rows] += 1
    return begun, ended, first.max(axis=1)


def _alone(network: Network) -> float:
    return float(network.rates[0])


def _think(network: Network) -> float:
    return network.think_s
