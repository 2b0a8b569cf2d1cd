"""What a step has to move and to calculate at least, beside what the machine can: the roofline (Williams 2009).

    linear layer, K inputs, N outputs, T tokens      bytes = stored weights + 2 T (K + N)          FLOPs = 2 T K N
    attention, T tokens after C cached ones          bytes = keys and values read and written, queries, outputs
                                                     FLOPs = 4 · heads · head_dim · pairs          (QK and PV)
    output head, one token a step                    a linear layer H → V

    FLOP/s │        ┌──────────── peak            intensity = FLOPs / bytes
           │      ╱ ·                             roof(intensity) = min(peak, intensity · bandwidth)
           │    ╱   ·                             ridge = peak / bandwidth: left of it bytes decide, right of it FLOPs
           └──╱─────·──────────── intensity

These are the least: each weight read once a step, each vector moved once, nothing left in a cache. So what is achieved
is a lower estimate too. Norms, activations, sampling and copies have no line here: what they move depends on what an
engine merges into one kernel. Biases are left out. Unpacking's own arithmetic is no FLOP: nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness.analysis.timeline import LINEAR, Profile
from harness.architecture import Architecture, Quantization
from harness.predict.cards import Card
from harness.predict.roofline import fused

Route = Literal["gemm", "fused", "dequant"]
"""How linear layers are multiplied. gemm: as they are stored, or by a kernel that does not say that it unpacks; fused:
unpacked in the multiplying kernel; dequant: written out in 16 bit by a kernel of its own, then multiplied."""
Phase = Literal["prefill", "decode"]
Side = Literal["memory", "compute"]
"""Of the ridge: what bounds a kernel of that intensity."""

LINEARS, STEP = "linear layers", "step"
"""Points that are no one kind: the LINEAR kinds as one, output head included; all counted work over the whole step."""


FLOAT32 = "float32"
"""Kind of a peak that numpy measured."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a machine can do at most. Stands in trace.toml, so that a report needs no machine."""

    name: str
    bandwidth_gb_s: float
    """10^9 bytes a second."""
    tflops: float
    """10^12 operations a second, a multiplication and an addition being two."""
    kind: str
    """Of the operations: BF16, FP16, FLOAT32."""
    source: str
    """Where both figures are from: a data sheet, or how they were measured."""
    doubt: str = ""
    """What is uncertain in them; "" where nothing is."""

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which the operations take longer than the bytes."""
        return 1e3 * self.tflops / self.bandwidth_gb_s


def of_card(card: Card) -> Ceiling:
    """The data sheet's peaks: BF16 accumulating in float32, FP16 where the card knows no BF16."""
    return Ceiling(
        name=card.name,
        bandwidth_gb_s=card.bandwidth_gb_s,
        tflops=card.bf16_tflops or card.fp16_tflops,
        kind="BF16" if card.bf16_tflops else "FP16",
        source=f"data sheet: {card.source}",
        doubt=card.doubt,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes to and from memory, and operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


def side(work: Work, ceiling: Ceiling) -> Side:
    """What bounds this work on that machine, at its best."""
    return "compute" if work.intensity >= ceiling.ridge else "memory"


def linear_work(shape: Architecture, tokens: int, route: Route) -> dict[str, Work]:
    """Linear layers of all blocks on `tokens`, by kind of kernel."""
    stored, written, moved, flops = 0.0, 0.0, 0.0, 0.0
    for inputs, outputs in fused(shape):
        stored += _stored(shape.quantization, inputs, outputs)
        written += 2.0 * inputs * outputs
        moved += 2.0 * tokens * (inputs + outputs)
        flops += 2.0 * tokens * inputs * outputs
    layers = shape.layers
    if route == "dequant":
        return {
            "dequant": Work(layers * (stored + written), 0.0),
            "gemm": Work(layers * (written + moved), layers * flops),
        }
    return {route: Work(layers * (stored + moved), layers * flops)}


def head_work(shape: Architecture) -> Work:
    """The output head for the one token that is sampled."""
    h, v = shape.hidden, shape.vocabulary
    return Work(_stored(shape.head if not shape.tied else None, h, v) + 2.0 * (h + v), 2.0 * h * v)


def attention_work(shape: Architecture, tokens: int, cached: int) -> Work:
    """Causal attention of all layers: `tokens` new ones after `cached` ones, each over itself and all before it.

    A layer with a window reads what its first new token reaches back to, and pairs no further than the window.
    """
    reach = replace(shape, window=shape.window + tokens - 1) if shape.window else shape
    read = reach.kv_bytes(cached + tokens)
    vectors = 2.0 * 2 * tokens * shape.heads * shape.head_dim * shape.layers  # queries in, outputs out, 2 bytes each
    pairs = (shape.layers - shape.windowed_layers) * _pairs(tokens, cached, None)
    pairs += shape.windowed_layers * _pairs(tokens, cached, shape.window)
    written = tokens * shape.kv_bytes_per_token
    return Work(read + written + vectors, 4.0 * shape.heads * shape.head_dim * pairs)


def step_work(shape: Architecture, tokens: int, cached: int | None, route: Route) -> dict[str, Work]:
    """Work of one forward pass and its sampled token, by kind. `cached` None: the context is not known, no attention.

    The output head counts as gemm, unless it is quantized too and what is quantized runs in fused kernels.
    """
    found = linear_work(shape, tokens, route)
    place: str = "gemm" if shape.head is None or shape.tied or route != "fused" else "fused"
    found[place] = found[place] + head_work(shape) if place in found else head_work(shape)
    if cached is not None:
        found["attention"] = attention_work(shape, tokens, cached)
    return found


def route_of(shape: Architecture, busy: Mapping[str, float]) -> Route:
    """How a phase multiplied its linear layers, by the time of each kind of kernel in it.

    Where kernels of two ways ran, all is counted to the one that took longer: which layer went which way is not told.
    """
    if shape.quantization is None:
        return "gemm"
    unpacking = {route: busy.get(route, 0.0) for route in ("fused", "dequant")}
    if not any(unpacking.values()):
        return "gemm"
    return "fused" if unpacking["fused"] >= unpacking["dequant"] else "dequant"


@dataclass(frozen=True, slots=True)
class Point:
    """What was done in what time: a kind, in the median decode step or the prefill. Without FLOPs, off a roofline."""

    phase: Phase
    kind: str
    """One of kernels.csv, LINEARS or STEP."""
    ms: float
    work: Work

    @property
    def rates(self) -> tuple[float, float]:
        """(GB/s, TFLOP/s): 10^9 bytes and 10^12 operations a second."""
        return self.work.bytes / self.ms / 1e6, self.work.flops / self.ms / 1e9

    def shares(self, ceiling: Ceiling) -> tuple[float, float]:
        """(of the bandwidth, of the peak). The larger is achieved / roof at this intensity."""
        gb_s, tflops = self.rates
        return gb_s / ceiling.bandwidth_gb_s, tflops / ceiling.tflops


def points(one: Profile, shape: Architecture, prompt_tokens: int | None) -> list[Point]:
    """Every kind whose work is known, with LINEARS and STEP, of the median decode step and of the prefill.

    The median step is taken to stand in the middle of the generation, so its context is the prompt and half of the
    answer. Without `prompt_tokens` there is no attention and no prefill. A kind in which no time was spent has none.
    """
    found: list[Point] = []
    if one.step_ms:
        times = {kind: float(np.median(series)) for kind, series in one.kinds.items()}
        cached = None if prompt_tokens is None else prompt_tokens + (len(one.steps_ms) - 1) // 2
        work = step_work(shape, 1, cached, route_of(shape, times))
        linears = float(np.median(one.series(LINEAR)))
        found += _points("decode", work, times | {LINEARS: linears, STEP: one.step_ms})
    if one.prefill_ms and prompt_tokens:
        times = dict(one.prefill_kinds)
        work = step_work(shape, prompt_tokens, 0, route_of(shape, times))
        linears = sum(times.get(kind, 0.0) for kind in LINEAR)
        found += _points("prefill", work, times | {LINEARS: linears, STEP: one.prefill_ms})
    return found


def _points(phase: Phase, work: Mapping[str, Work], times: Mapping[str, float]) -> list[Point]:
    linears = {kind: done for kind, done in work.items() if kind in LINEAR}
    whole = {**work, LINEARS: _whole(linears), STEP: _whole(work)}
    return [Point(phase, kind, times[kind], done) for kind, done in whole.items() if times.get(kind)]


def raised(ceiling: Ceiling, points: Iterable[Point]) -> Ceiling:
    """A float32 peak, raised to what linear layers achieved where that is more: what was exceeded was no peak.

    A processor may multiply 16 bits faster than the float32 that numpy can measure. A data sheet's peak stays: nothing
    achieves more, so something else is wrong. Bandwidth stays: what is more than memory delivers, a cache delivered.
    """
    best = max((point.rates[1] for point in points if point.kind == LINEARS), default=0.0)
    if ceiling.kind != FLOAT32 or best <= ceiling.tflops:
        return ceiling
    word = (
        f"the peak of {ceiling.tflops:.3g} TFLOP/s was exceeded, and raised to the {best:.3g} that kernels here reach"
    )
    doubt = "; ".join(part for part in (ceiling.doubt, word) if part)
    return replace(ceiling, tflops=best, kind="as reached here", doubt=doubt)


def tokens_to_ridge(shape: Architecture, route: Route, ceiling: Ceiling) -> float | None:
    """Tokens a step from which the linear layers are bound by operations; None where their activations forbid it.

    With S stored bytes, and a bytes and f FLOPs a token: f T / (S + a T) = ridge, so T = ridge S / (f − ridge a).
    """
    one, two = (_whole(linear_work(shape, tokens, route)) for tokens in (1, 2))
    each = two.bytes - one.bytes
    spare = one.flops - ceiling.ridge * each
    return ceiling.ridge * (one.bytes - each) / spare if spare > 0 else None


def _whole(work: Mapping[str, Work]) -> Work:
    return sum(work.values(), Work(0.0, 0.0))


def _stored(quantization: Quantization | None, inputs: int, outputs: int) -> float:
    return 2.0 * inputs * outputs if quantization is None else quantization.bytes(inputs, outputs)


def _pairs(tokens: int, cached: int, window: int | None) -> int:
    """Σ over the new tokens i = 1..T of what each attends to: cached + i, at most the window."""
    if window is None:
        return tokens * cached + tokens * (tokens + 1) // 2
    return sum(min(cached + at, window) for at in range(1, tokens + 1))
