"""One cell predicted: the load of a scenario on a model, in one precision, on one card, in virtual time.

Served (card, model, precision, limits) + Scenario + Cell ─► simulate ─► records, figures of a row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.analysis import metrics
from harness.architecture import Architecture
from harness.errors import InputError
from harness.load.schedule import Arrival
from harness.predict import memory as memories
from harness.predict import processor
from harness.predict.cards import Card
from harness.predict.limits import Limits, StepTime
from harness.predict.loads import CellLoad, cell_load
from harness.predict.memory import Memory
from harness.predict.roofline import AS_PREDICTED, KERNELS, Coefficients, Factors, Steps, kernel_of
from harness.predict.scheduler import simulate
from harness.predict.stretches import Served as Answer
from harness.predict.stretches import Simulation
from harness.records import Cell, RequestRecord, Scenario
from harness.scenario import context_served

EPOCH_NS = 1_000_000_000_000_000_000
"""Virtual time begins here on the clock of the records (September 2001), where no measurement can be."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model in one precision on one card, as an engine would serve it."""

    card: Card
    shape: Architecture
    precision: str
    kernel: str
    """A key of roofline.KERNELS, or of processor.KERNELS."""
    memory: Memory
    limits: Limits
    steps: StepTime
    gpu_memory_utilization: float = 0.9


def served(
    card: Card,
    shape: Architecture,
    precision: str,
    scenario: Scenario,
    coefficients: Coefficients,
    *,
    factors: Factors = AS_PREDICTED,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int | None = None,
    gpu_memory_utilization: float = 0.9,
    kv_cache_gib: float | None = None,
) -> Served:
    """What is served, with the limits that vLLM takes by default. Raises InputError where it does not fit the card."""
    context = context_served(scenario)
    batched = max_num_batched_tokens or memories.default_batch(card)[1]
    found = memories.memory(
        card,
        shape,
        precision,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        max_model_len=context,
        block_size=memories.default_block_size(card),
        kv_cache_gib=kv_cache_gib,
    )
    kernel, limits, steps = engine(
        card,
        shape,
        precision,
        coefficients,
        factors,
        kv_blocks=found.kv_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        max_model_len=context,
    )
    return Served(card, shape, precision, kernel, found, limits, steps, gpu_memory_utilization)


def engine(
    card: Card,
    shape: Architecture,
    precision: str,
    coefficients: Coefficients,
    factors: Factors = AS_PREDICTED,
    *,
    kv_blocks: int,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
) -> tuple[str, Limits, StepTime]:
    """The kernel, and what the scheduler is given: limits and step times, of a card or of a processor.

    Raises InputError for a precision without a kernel there.
    """
    limits = Limits(
        kv_blocks=kv_blocks,
        block_size=memories.default_block_size(card),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens or memories.default_batch(card)[1],
        max_model_len=max_model_len,
        request_s=coefficients.request_s * factors.host,
    )
    if card.generation == "cpu":
        kernel = processor.kernel_on(card, precision)
        steps = processor.ProcessorSteps(card, shape, processor.KERNELS[kernel], factors)
        return kernel, replace(limits, request_s=processor.request_s(factors)), steps
    kernel = kernel_of(card, precision)
    return kernel, limits, Steps(card, shape, KERNELS[kernel], coefficients, factors)


def check_scenario(scenario: Scenario) -> None:
    """Raises InputError for what virtual time does not know: a prefix cache, and texts that need a tokenizer."""
    refused = {
        f"turns = {scenario.turns}": scenario.turns > 1,
        f"shared_prefix = {scenario.shared_prefix}": scenario.shared_prefix > 0,
        f"dataset = {scenario.dataset}": scenario.dataset is not None,
    }
    for what, is_given in refused.items():
        if is_given:
            raise InputError(
                f"{scenario.name}: {what} cannot be predicted",
                allowed="one turn, no shared prefix, drawn lengths or a trace's: there is no prefix cache here",
                remedy="take --scenario chat, batch or code with --input-tokens and --output-tokens of your own",
            )


def predict(scenario: Scenario, cell: Cell, what: Served, trace: Sequence[Arrival] = ()) -> tuple[CellLoad, Simulation]:
    """The cell in virtual time. Raises InputError for a request that the engine could never serve."""
    load = cell_load(scenario, cell, trace)
    return load, simulate(load, what.limits, what.steps)


def figures(scenario: Scenario, load: CellLoad, simulation: Simulation) -> dict[str, Any]:
    """The fields of a SweepPoint that a load tells: those of metrics.summarise, by the same definitions, without ends.

    Intervals are not of this run: the same load comes to the same times. They come from validation (bands.py).
    """
    inside = sorted(
        (item for item in simulation.served if load.phase(item) == "measured"), key=lambda item: item.arrival_s
    )
    e2e = np.array([item.last_token_s - item.arrival_s for item in inside]) * 1e3
    ttft = np.array([item.first_token_s - item.arrival_s for item in inside]) * 1e3
    tokens = np.array([item.output_tokens for item in inside])
    tpot = (e2e - ttft)[tokens > 1] / (tokens[tokens > 1] - 1)
    found: dict[str, Any] = {
        "requests": len(inside),
        "errors": 0,
        "p50_ms": metrics.percentile(e2e, 50),
        "p95_ms": metrics.percentile(e2e, 95, metrics.MIN_P95),
        "p99_ms": metrics.percentile(e2e, 99, metrics.MIN_P99),
        "ttft_p50_ms": metrics.percentile(ttft, 50),
        "ttft_p95_ms": metrics.percentile(ttft, 95, metrics.MIN_P95),
        "tpot_p50_ms": metrics.percentile(tpot, 50),
        "tpot_p95_ms": metrics.percentile(tpot, 95, metrics.MIN_P95),
        "input_tokens_mean": float(np.mean([item.input_tokens for item in inside])) if inside else None,
        "output_tokens_mean": float(np.mean(tokens)) if inside else None,
        "preemptions": simulation.preemptions,
        "running_peak": simulation.running_peak,
        "waiting_peak": simulation.waiting_peak,
        "kv_usage_peak": simulation.kv_peak,
    }
    if load.open_s is not None and load.close_s is not None and load.close_s > load.open_s:
        seconds = load.close_s - load.open_s
        ended = sum(load.open_s <= item.last_token_s < load.close_s for item in simulation.served)
        found |= {
            "window_s": seconds,
            "tok_s": simulation.tokens_between(load.open_s, load.close_s) / seconds or None,
            "req_s": ended / seconds or None,
        }
    share = _goodput(scenario, e2e, ttft, inside)
    return found | {"goodput": share}


def _goodput(scenario: Scenario, e2e: Any, ttft: Any, inside: Sequence[Answer]) -> float | None:
    """Share of the requests that kept every limit of the service level; None below 20 of them."""
    if len(inside) < metrics.MIN_P95:
        return None
    slo = scenario.slo
    tokens = np.array([max(1, item.output_tokens - 1) for item in inside])
    limits = ((e2e, slo.p95_s), (ttft, slo.ttft_s), ((e2e - ttft) / tokens, slo.tpot_s))
    kept = np.ones(len(inside), dtype=bool)
    for values, limit in limits:
        if limit is not None:
            kept &= values <= limit * 1e3
    return float(kept.mean())


def records(cell: Cell, load: CellLoad, simulation: Simulation) -> list[RequestRecord]:
    """The requests as a measurement would have recorded them, in the order in which they ended."""
    return [_record(cell, load, simulation, answer) for answer in simulation.served]


def _record(cell: Cell, load: CellLoad, simulation: Simulation, answer: Answer) -> RequestRecord:
    sent = EPOCH_NS + round(answer.arrival_s * 1e9)
    offsets = np.rint((simulation.token_times(answer) - answer.arrival_s) * 1e6).astype(int)
    return RequestRecord(
        cell=cell.key,
        user=answer.user,
        sequence=answer.sequence,
        phase=load.phase(answer),
        intended_ns=sent,
        attempt=cell.attempt,
        sent_ns=sent,
        first_token_ns=EPOCH_NS + round(answer.first_token_s * 1e9),
        last_token_ns=EPOCH_NS + round(answer.last_token_s * 1e9),
        end_ns=EPOCH_NS + round(answer.last_token_s * 1e9),
        input_tokens_asked=answer.input_tokens,
        output_tokens_asked=answer.output_tokens,
        prompt_tokens=answer.input_tokens,
        completion_tokens=answer.output_tokens,
        finish_reason="length",
        chunk_ids=True,
        chunk_us=tuple(offsets.tolist()),
        chunk_tokens=(1,) * answer.output_tokens,
    )


def window_ns(load: CellLoad) -> tuple[int | None, int | None]:
    """When measuring began and ended, on the clock of the records."""
    edges = (load.open_s, load.close_s)
    opened, closed = (None if edge is None else EPOCH_NS + round(edge * 1e9) for edge in edges)
    return opened, closed


def described(what: Served) -> Mapping[str, Any]:
    """The fields of a SweepPoint that what is served tells."""
    return {
        "weights_gib": what.memory.weights_gib,
        "kv_cache_gib": what.memory.kv_gib,
        "kv_cache_tokens": what.memory.kv_tokens,
        "memory_kind": "host" if what.card.generation == "cpu" else "gpu",
        "kernel": what.kernel,
        "gpu": what.card.name,
    }
