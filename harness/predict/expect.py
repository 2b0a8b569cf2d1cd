"""What the predictor says of a published condition: the quantities of published.Quantity, by virtual time.

One stream needs no scheduler: a prompt and then decode steps, in closed form. Everything else is simulated, with the
limits that the engine of that time had.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np

from harness.predict import cards, memory, shapes
from harness.predict.limits import Asked, Limits
from harness.predict.published import Condition, Lengths, Quantity
from harness.predict.roofline import KERNELS, NAMES, Coefficients, Steps
from harness.predict.scheduler import simulate
from harness.predict.stretches import Served

ROUNDS = 6
"""Answers of each user that a closed loop is simulated for; the first is its warm-up and the last its ebb."""
_NORMAL = NormalDist()


def expected(condition: Condition, coefficients: Coefficients) -> Mapping[Quantity, float]:
    """Predictions for a condition, in the units of their names."""
    steps = steps_of(condition, coefficients)
    if condition.load.kind == "users" and condition.load.n == 1:
        return _one_stream(condition, steps)
    limits = limits_of(condition, coefficients)
    if condition.load.kind == "users":
        return _closed(condition, limits, steps)
    return _open(condition, limits, steps)


def uses(condition: Condition) -> frozenset[str]:
    """Names of the coefficients that a prediction of it depends on."""
    kernel = steps_of(condition, Coefficients()).kernel
    other_era = "_v1_" if condition.era == "v0" else "_v0_"
    foreign = {name for other in KERNELS.values() for name in other.coefficients}
    foreign -= {*kernel.coefficients, *KERNELS["16bit"].coefficients}
    return frozenset(name for name in NAMES if name not in foreign and other_era not in name)


def steps_of(condition: Condition, coefficients: Coefficients) -> Steps:
    card = cards.card(condition.card)
    kernel = "fp8-marlin" if condition.kernel == "fp8" and not card.fp8_tflops else condition.kernel
    long = condition.lengths.input_mean > (condition.graphs_to or math.inf)
    shape = shapes.shape(condition.shape).architecture
    return Steps(card, shape, KERNELS[kernel], coefficients, era=condition.era, eager=long, streamed=condition.streamed)


def _one_stream(condition: Condition, steps: Steps) -> dict[Quantity, float]:
    """TTFT = request + prompt; TPOT = a decode step at the answer's middle; tok/s = n / (TTFT + (n - 1) TPOT)."""
    prompt, answer = round(condition.lengths.input_mean), condition.lengths.output_mean
    base, slope = steps.decode(1)
    request_s = steps.coefficients.request_s if condition.streamed else 0.0
    ttft_s = request_s + steps.mixed(0, 0, prompt, prompt * (prompt + 1) // 2, 1)
    tpot_s = base + slope * (prompt + answer / 2)
    return {
        "ttft_p50_ms": 1e3 * ttft_s,
        "tpot_p50_ms": 1e3 * tpot_s,
        "tok_s": answer / (ttft_s + (answer - 1) * tpot_s),
    }


@cache
def _kv_blocks(card: str, shape: str, kernel: str, engine: str, batch: tuple[int, int], context: int) -> int:
    """What the engine of that time had for its cache; `batch`: max_num_seqs and max_num_batched_tokens."""
    found = memory.memory(
        cards.card(card),
        shapes.shape(shape).architecture,
        f"published@{kernel}",
        max_num_seqs=batch[0],
        max_num_batched_tokens=batch[1],
        max_model_len=context,
        engine=memory.ENGINES[engine],
    )
    return found.kv_blocks


def limits_of(condition: Condition, coefficients: Coefficients) -> Limits:
    """Before 0.8 whole prompts go first, in batches of up to the context's length (2,048 at least)."""
    context, old, seqs = condition.max_model_len, condition.era == "v0", condition.max_num_seqs
    # SGLang chunks by 8,192; vLLM's server by 2,048.
    batched = max(context, 2048) if old else 2048 if condition.engine == "vLLM" else 8192
    blocks = _kv_blocks(condition.card, condition.shape, condition.kernel, condition.era, (seqs, batched), context)
    return Limits(
        kv_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        chunked_prefill=not old,
        max_model_len=context,
        request_s=coefficients.request_s if condition.streamed else 0.0,
    )


def sampled(lengths: Lengths, count: int, seed: str) -> list[tuple[int, int]]:
    """Lengths of `count` requests: prompts lognormal, answers lognormal up to the cap, both with the means stated."""
    rng = random.Random(seed)
    return [(_prompt(lengths, rng.random()), _answer(lengths, rng.random())) for _ in range(count)]


def _prompt(lengths: Lengths, u: float) -> int:
    """Cut at the 97th percentile, as the data sets' lists of lengths are."""
    sigma = lengths.input_sigma
    if not sigma:
        return round(lengths.input_mean)
    return max(1, round(lengths.input_mean * math.exp(sigma * _NORMAL.inv_cdf(0.01 + 0.96 * u) - sigma**2 / 2)))


ANSWER_SIGMA = 0.9
"""Spread of the lengths of answers that end by themselves, of their logs: ShareGPT's, before the cap."""


def _answer(lengths: Lengths, u: float) -> int:
    if lengths.output_cap is None:
        return max(2, round(lengths.output_mean))
    drawn = math.exp(_mu(lengths.output_mean, lengths.output_cap) + ANSWER_SIGMA * _NORMAL.inv_cdf(0.001 + 0.998 * u))
    return max(2, min(lengths.output_cap, round(drawn)))


@cache
def _mu(mean: float, cap: int) -> float:
    """mu of the lognormal that has the mean when it is cut down to the cap:
    E min(X, c) = e^(mu + s²/2) Φ((ln c - mu - s²)/s) + c (1 - Φ((ln c - mu)/s))."""

    def capped(mu: float) -> float:
        s, ln = ANSWER_SIGMA, math.log(cap)
        below = math.exp(mu + s * s / 2) * _NORMAL.cdf((ln - mu - s * s) / s)
        return below + cap * (1 - _NORMAL.cdf((ln - mu) / s))

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if capped(middle) < mean else (low, middle)
    return low


class _Asking:
    """Requests known from the start, or users who ask `ROUNDS` times each."""

    def __init__(self, first: Sequence[Asked], again: Mapping[int, list[tuple[int, int]]] | None = None) -> None:
        self._first, self._again = first, again or {}

    def first(self) -> Iterable[Asked]:
        return self._first

    def after(self, served: Served) -> Asked | None:
        left = self._again.get(served.user)
        return Asked(served.last_token_s, *left.pop(), served.user, served.sequence + 1) if left else None


def _closed(condition: Condition, limits: Limits, steps: Steps) -> dict[Quantity, float]:
    """Users with their first answers as warm-up: the window ends when the first of them has had its last."""
    users = condition.load.n
    drawn = sampled(condition.lengths, users * ROUNDS, f"users/{users}")
    again = {user: drawn[user * ROUNDS : user * ROUNDS + ROUNDS - 1] for user in range(users)}
    first = [Asked(0.0, *drawn[user * ROUNDS + ROUNDS - 1], user) for user in range(users)]
    found = simulate(_Asking(first, again), limits, steps)
    opened = max(item.last_token_s for item in found.served if item.sequence == 0)
    closed = min(item.last_token_s for item in found.served if item.sequence == ROUNDS - 1)
    inside = [item for item in found.served if item.sequence > 0]
    tokens = found.tokens_between(opened, closed) if closed > opened else 0
    quantities = _latencies(inside)
    if tokens:
        quantities["tok_s"] = tokens / (closed - opened)
    return quantities


def _open(condition: Condition, limits: Limits, steps: Steps) -> dict[Quantity, float]:
    load = condition.load
    rng, now, first = random.Random(f"arrivals/{load.n}"), 0.0, []
    for number, lengths in enumerate(sampled(condition.lengths, load.n, f"{load.kind}/{load.n}")):
        now += rng.expovariate(load.rate_rps) if load.kind == "poisson" else 0.0
        first.append(Asked(now, *lengths, number))
    found = simulate(_Asking(first), limits, steps)
    quantities = _latencies(found.served)
    quantities["tok_s"] = sum(item.output_tokens for item in found.served) / found.end_s
    return quantities


def _latencies(served: Sequence[Served]) -> dict[Quantity, float]:
    ttft = np.array([item.first_token_s - item.arrival_s for item in served]) * 1e3
    spans = [(item.last_token_s - item.first_token_s, item.output_tokens - 1) for item in served]
    tpot = np.array([1e3 * span / tokens for span, tokens in spans if tokens > 0])
    return {
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_p50_ms": float(np.percentile(tpot, 50)),
        "tpot_p99_ms": float(np.percentile(tpot, 99)),
    }
