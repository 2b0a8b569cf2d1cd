"""Fits the coefficients of roofline.py to what was published: kept rows (published.py) and kernel curves.

    observations ─► log(predicted / observed) ─► Gauss-Newton on the logs of the coefficients ─► Coefficients

Robust least squares: errors beyond `SCALE` count by their size, not their square (the pseudo-Huber loss), because hosts
differ and a published row may be wrong. A card's rows weigh n^-1/2 each, and so do a curve's points, so that the
much-measured ones do not decide alone. Each coefficient is held to its starting value by a normal prior of its log
(`PRIOR`): what no row tells stays where the literature has it, and a fit to few rows moves little.

Leaving a card out, its rows and its kernel curves are not in the sums. The Jacobian is taken over from the fit to all,
as in the chord method, so that a fold costs seconds: what is minimised, and what comes out of it, is still of the other
cards alone.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from harness.predict import cards, shapes
from harness.predict.expect import expected, uses
from harness.predict.published import Case, Condition, Quantity, Row, cases, read
from harness.predict.roofline import KERNELS, NAMES, Coefficients, Steps, changed, fused

Floats = NDArray[np.float64]

SCALE = 0.15
"""Error, as a log, from which a row is taken for an outlier step by step."""
PRIOR = 0.5
"""Standard deviation of a coefficient's log about its starting value: a factor of 1.6 either way is likely."""
PRIORS: Mapping[str, float] = dict.fromkeys(("read_16", "read_int4", "read_int8", "read_w8a8", "read_fp8"), 0.2) | (
    dict.fromkeys(("stream_v0_s", "step_v0_s", "step_v1_s", "row_exllama", "row_awq"), 1.0) | {"corner": 0.4}
)
"""Narrower where physics is: a share of the bandwidth cannot be above 1. Wider where nothing was known before."""
WEIGHTS: Mapping[str, float] = {"tok_s": 1.0, "tpot_p50_ms": 1.0, "ttft_p50_ms": 0.4}
"""Of a quantity's rows; those that are not here (99th percentiles) are predicted, not fitted."""
ROUNDS, ENOUGH = 10, 0.0005
"""A fit ends after so many rounds, or when one makes the loss smaller by no more than this share."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A point of a published kernel curve: how many times faster than 16 bit a kernel is at some tokens."""

    card: str
    kernel: str
    tokens: int
    layers: tuple[tuple[int, int], ...]
    """(in, out) of the linears that were timed, one after another."""
    speedup: float

    def predicted(self, coefficients: Coefficients) -> float:
        card, shape = cards.card(self.card), shapes.shape("llama-2-7b").architecture
        steps = Steps(card, shape, KERNELS[self.kernel], coefficients)
        plain = sum(steps.linear(k, n, self.tokens, KERNELS["16bit"]) for k, n in self.layers)
        return plain / sum(steps.linear(k, n, self.tokens) for k, n in self.layers)


_CURVE_KERNELS = {"INT4 Marlin": "marlin", "INT4 AWQ gemm": "awq-gemm"}
"""Exllama's curve is of its own library; engines have ports of it that are faster at ten rows and more."""
_CURVE_LAYERS = {
    "single GEMM 72k x 18k": ((18 * 1024, 72 * 1024),),
    "LLaMA-7B layers": fused(shapes.shape("llama-2-7b").architecture),
    "LLaMA-13B layers": fused(shapes.shape("llama-2-13b").architecture),
    "GEMM": ((4096, 4096),),
}
LARGE = 512
"""Tokens from which both kernels are bound by the tensor cores, so that their ratio hardly depends on the card: from
there on vLLM's own curve of Marlin (its pull request 2497), whose card is not named, is taken for an A100's."""
_UNNAMED = "a100-80gb-sxm"
_CURVE_CARDS = {
    "A10 24GB": "a10",
    "RTX 3090 24GB": "rtx-3090",
    "RTX A6000 48GB": "rtx-a6000",
    "A100-80GB": "a100-80gb-sxm",
}


def curves(rows: Iterable[Row] | None = None) -> tuple[Curve, ...]:
    """Published figures of Marlin (github.com/IST-DASLab/marlin; vLLM, pull request 2497) and of AWQ's kernel."""
    found = []
    for row in rows if rows is not None else read():
        layers, kernel = _CURVE_LAYERS.get(row.model), _CURVE_KERNELS.get(row.precision)
        if not row.metric.startswith("speedup_vs_fp16") or layers is None or kernel is None:
            continue
        slowed = row.engine_version == "locked base clock"  # catalogues rate cards at their boost clock
        if slowed or (row.gpu not in _CURVE_CARDS and int(row.load) < LARGE):
            continue
        card = _CURVE_CARDS.get(row.gpu, _UNNAMED)
        found.append(Curve(card, kernel, int(row.load), layers, row.value))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Observation:
    """Something published that a fit looks at."""

    card: str
    weight: float
    value: float
    case: Case | None = None
    curve: Curve | None = None

    @property
    def condition(self) -> Condition:
        assert self.case is not None and self.case.condition is not None
        return self.case.condition


def observations() -> tuple[Observation, ...]:
    """The kept rows of a fitted quantity, and the kernel curves.

    Of Poisson arrivals only those at the lowest rate that a source has: the others are of servers that cannot follow,
    whose queues tell about a step's time what the lowest rate has told already. They are predicted all the same.
    """
    kept = [case for case in cases() if case.kept and case.quantity in WEIGHTS]
    lowest: dict[tuple[str, str], float] = {}
    for case in kept:
        rate = case.condition.load.rate_rps if case.condition else 0.0
        if rate:
            lowest[_served(case)] = min(rate, lowest.get(_served(case), rate))
    kept = [
        case for case in kept if case.condition and case.condition.load.rate_rps in (0.0, lowest.get(_served(case)))
    ]
    per_card = Counter(case.condition.card for case in kept if case.condition)
    found = [
        Observation(
            case.condition.card, WEIGHTS[case.quantity] * per_card[case.condition.card] ** -0.5, case.value, case
        )
        for case in kept
        if case.condition and case.quantity and case.value
    ]
    points = curves()
    count = Counter((point.card, point.kernel) for point in points)
    found += [
        Observation(point.card, count[point.card, point.kernel] ** -0.5, point.speedup, curve=point) for point in points
    ]
    return tuple(found)


def _served(case: Case) -> tuple[str, str]:
    return case.row.source, case.row.precision


def errors(observed: Sequence[Observation], coefficients: Coefficients) -> Floats:
    """log(predicted / observed) of each observation. Each condition is predicted once."""
    known: dict[Condition, Mapping[Quantity, float]] = {}
    logs = []
    for item in observed:
        if item.curve is not None:
            predicted = item.curve.predicted(coefficients)
        else:
            condition = item.condition
            if condition not in known:
                known[condition] = expected(condition, coefficients)
            assert item.case is not None and item.case.quantity is not None
            predicted = known[condition][item.case.quantity]
        logs.append(math.log(predicted / item.value))
    return np.array(logs)


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients, by the logs that take the starting values to them, and how errors follow from those."""

    logs: Floats
    errors: Floats
    jacobian: Floats

    @property
    def coefficients(self) -> Coefficients:
        return at(self.logs)


def at(logs: Floats) -> Coefficients:
    return changed(Coefficients(), **dict(zip(NAMES, (float(value) for value in logs), strict=True)))


def fit(
    observed: Sequence[Observation], workers: int | None = None, say: Callable[[str], None] = lambda _: None
) -> Fit:
    """Coefficients that fit all of `observed`, by Gauss-Newton with halved steps. A minute or more on each core."""
    logs = np.zeros(len(NAMES))
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        now = errors(observed, at(logs))
        for number in range(ROUNDS):
            jacobian = _jacobian(observed, logs, now, pool)
            step, better = _solved(observed, logs, now, jacobian) - logs, False
            for _ in range(6):
                tried = errors(observed, at(logs + step))
                if _loss(observed, logs + step, tried) < _loss(observed, logs, now):
                    better = True
                    break
                step /= 2
            if not better:
                break
            gained = 1 - _loss(observed, logs + step, tried) / _loss(observed, logs, now)
            logs, now = logs + step, tried
            say(f"fit, round {number + 1}: {gained:.1%} better")
            if gained < ENOUGH:
                break
        return Fit(logs, now, _jacobian(observed, logs, now, pool))


def without(observed: Sequence[Observation], whole: Fit, keep: Sequence[bool]) -> Coefficients:
    """Coefficients of a fit to those that are kept; two steps of the chord method from the fit to all."""
    rest, jacobian = list(compress(observed, keep)), whole.jacobian[np.array(keep)]
    logs, now = whole.logs, whole.errors[np.array(keep)]
    for _ in range(2):
        step = _solved(rest, logs, now, jacobian) - logs
        for _ in range(4):
            tried = errors(rest, at(logs + step))
            if _loss(rest, logs + step, tried) < _loss(rest, logs, now):
                logs, now = logs + step, tried
                break
            step /= 2
    return at(logs)


def without_each(
    observed: Sequence[Observation], whole: Fit, groups: Sequence[str], names: Sequence[str]
) -> list[Coefficients]:
    """For each name, coefficients of a fit without the observations of that group."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(without, observed, whole, [group != name for group in groups]) for name in names]
        return [task.result() for task in tasks]


_STEP = 0.05
"""Of a log, for differences: what is simulated has small jumps, which a smaller step would take for slopes."""


def _jacobian(observed: Sequence[Observation], logs: Floats, now: Floats, pool: ProcessPoolExecutor) -> Floats:
    """d errors / d logs by differences, a coefficient a task; only rows that depend on it are predicted again."""
    used = [frozenset(NAMES) if item.curve else uses(item.condition) for item in observed]
    rows = [[at for at, names in enumerate(used) if name in names] for name in NAMES]
    tasks = [pool.submit(_moved, [observed[at] for at in rows[index]], logs, index) for index in range(len(NAMES))]
    jacobian = np.zeros((len(observed), len(NAMES)))
    for index, task in enumerate(tasks):
        jacobian[rows[index], index] = (task.result() - now[rows[index]]) / _STEP
    return jacobian


def _moved(observed: Sequence[Observation], logs: Floats, index: int) -> Floats:
    other = logs.copy()
    other[index] += _STEP
    return errors(observed, at(other))


def _priors() -> Floats:
    return np.array([PRIORS.get(name, PRIOR) for name in NAMES])


def _weights(observed: Sequence[Observation]) -> Floats:
    return np.array([item.weight for item in observed])


def _loss(observed: Sequence[Observation], logs: Floats, now: Floats) -> float:
    """Σ w² · 2 (sqrt(1 + (e/s)²) - 1) + Σ (log / prior)²."""
    rows = _weights(observed) ** 2 * 2 * (np.sqrt(1 + (now / SCALE) ** 2) - 1)
    return float(rows.sum() + ((logs / _priors()) ** 2).sum())


def _solved(observed: Sequence[Observation], logs: Floats, now: Floats, jacobian: Floats) -> Floats:
    """The logs that minimise the loss where errors are `now` + `jacobian` · (new - logs); reweighted ten times."""
    weights, priors = _weights(observed), _priors()
    new: Floats = logs
    for _ in range(10):
        predicted = now + jacobian @ (new - logs)
        each = weights**2 / np.sqrt(1 + (predicted / SCALE) ** 2) / SCALE**2
        matrix = jacobian.T @ (jacobian * each[:, None]) + np.diag(1 / priors**2)
        new = np.asarray(np.linalg.solve(matrix, jacobian.T @ (each * (jacobian @ logs - now))), dtype=np.float64)
    return np.asarray(np.clip(new, logs - 0.7, logs + 0.7), dtype=np.float64)
