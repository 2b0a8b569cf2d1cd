"""How long one step of an engine takes: bytes against bandwidth, operations against the tensor rate, and the host.

    step = layers · (Σ linears + attention + elementwise + layer_s) + head + sampling + host

A linear layer of K inputs and N outputs on T tokens reads its weights and moves its activations, and multiplies:

    memory  = (weight bytes + 2 T (K + N)) / (bandwidth · read)      compute = 2 T K N / (tensor rate · mma)
    time    = (memory^p + compute^p)^(1/p)                            the roofline (Williams 2009), its corner rounded

    time │            ╱ compute         `read` and `mma`: the shares of the data sheet's figures that kernels of a
         │          ╱                   family reach; p: how sharp the corner is. All three are fitted to published
         │────────·  memory             kernel curves and engine runs (predict/fit.py), nothing of them is a guess
         └──────────────── tokens

Bandwidth has a second ceiling, of the multiprocessors: each streams weights at `sm_` GB/s at most, less where it has to
unpack them, which cards with few of them and fast memory (H20, H200) feel.

Kernel families differ in what they read and in how they multiply (`KERNELS`). Those that multiply row by row without
tensor cores (AWQ's own at few tokens, exllama) pay for each row anew, by the multiprocessors' own rate (`row_`). From
`dequantize_from` tokens on, weights are written out in 16 bit and multiplied by the library.

Decoding replays a CUDA graph; a step with prompt tokens does not, or only in pieces, and is launched layer by layer by
the host: such a step takes the longer of the two. The engine before V1 streams its answers from the process, and the
thread, that runs the steps, so there each sequence costs more where somebody listens (`stream_v0_s`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Literal

from harness.architecture import Architecture
from harness.errors import InputError
from harness.predict.cards import Card
from harness.predict.published import Era

Rate = Literal["16bit", "int8", "fp8"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A family of kernels behind the linear layers."""

    bits: float
    """Of a stored weight."""
    rate: Rate = "16bit"
    """What it multiplies with."""
    group: int | None = None
    """Inputs that share a 16-bit scale; None: one scale a row, which is nothing."""
    zeros: bool = False
    """4-bit zero points beside the scales."""
    read: str = "read_16"
    """Names of the coefficients that hold for it."""
    stream: str = "sm_16_gb_s"
    mma: str = "mma_16"
    call: str | None = None
    row: str | None = None
    dequantize_from: int | None = None
    """Tokens from which weights are written out in 16 bit first; the step pays for writing and reading them."""
    plateau: str | None = None
    """Least time of its matrix product, as a multiple of reading the weights in 16 bit."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of those that are its own."""
        return tuple(name for name in (self.read, self.stream, self.mma, self.row, self.plateau, self.call) if name)


_AWQ = Kernel(
    4,
    group=128,
    zeros=True,
    read="read_awq",
    mma="mma_awq",
    row="row_awq",
    plateau="plateau_awq",
    call="call_int4_s",
)
KERNELS: Mapping[str, Kernel] = {
    "16bit": Kernel(16),
    "marlin": Kernel(4, group=128, read="read_int4", stream="sm_int4_gb_s", mma="mma_int4", call="call_int4_s"),
    "awq-gemm": _AWQ,
    "awq-dequant": replace(_AWQ, dequantize_from=256),
    "exllama": Kernel(4, group=128, read="read_exllama", row="row_exllama", dequantize_from=50),
    "w8a16": Kernel(8, group=128, read="read_int8", mma="mma_int4", call="call_int4_s"),
    "w8a8": Kernel(8, rate="int8", read="read_w8a8", mma="mma_w8a8"),
    "fp8": Kernel(8, rate="fp8", read="read_fp8", mma="mma_fp8"),
    "fp8-marlin": Kernel(8, read="read_int8", mma="mma_int4", call="call_int4_s"),
}


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What is fitted (scenarios/catalogue/coefficients.toml). The values here are where a fit starts from.

    Shares of the data sheet's bandwidth (`read_`), of its dense tensor rate (`mma_`); seconds (`_s`).
    """

    read_16: float = 0.85
    read_int4: float = 0.80
    read_int8: float = 0.80
    read_awq: float = 0.60
    read_exllama: float = 0.70
    read_w8a8: float = 0.75
    read_fp8: float = 0.75
    read_kv: float = 0.70
    sm_16_gb_s: float = 20.0
    """Weights that one multiprocessor can stream, 10^9 bytes/s; 8-bit ones too."""
    sm_int4_gb_s: float = 12.0
    call_int4_s: float = 5e-6
    """Of each call of Marlin or AWQ's kernel, beyond its bytes: they end with a sum over blocks."""
    mma_16: float = 0.70
    mma_int4: float = 0.50
    mma_awq: float = 0.16
    mma_w8a8: float = 0.55
    mma_fp8: float = 0.55
    mma_attention: float = 0.45
    row_awq: float = 0.03
    """10^12 operations/s of a multiprocessor, without tensor cores."""
    row_exllama: float = 0.2
    plateau_awq: float = 3.0
    corner: float = 3.0
    """p of the rounded corner."""
    layer_s: float = 15e-6
    """Of each layer in a replayed graph: what its small kernels take beyond their bytes."""
    eager_v0_layer_s: float = 150e-6
    """Of each layer where the host launches it."""
    eager_v1_layer_s: float = 80e-6
    """The same in pieces of graphs."""
    step_v0_s: float = 1.5e-3
    step_v1_s: float = 1.0e-3
    sequence_v0_s: float = 40e-6
    sequence_v1_s: float = 15e-6
    """Host's work for each sequence in a step: bookkeeping, sampling's arguments, detokenizing."""
    stream_v0_s: float = 100e-6
    """More of it where answers are streamed."""
    request_s: float = 8e-3
    """From the client's send to the scheduler, and from the first token to the client."""


NAMES = tuple(item.name for item in fields(Coefficients))


@dataclass(frozen=True, slots=True)
class Factors:
    """What a calibration found of one card, against the model for all: 1 is as predicted."""

    bandwidth: float = 1.0
    tensor: float = 1.0
    host: float = 1.0
    """Of the seconds that the host adds, launches included."""
    quantized: float = 1.0
    """Of a processor: the rate at which weights of few bits are multiplied once unpacked, on top of `tensor`."""
    unpacking: float = 1.0
    """Of a processor: the rate at which they are unpacked."""


AS_PREDICTED = Factors()


_INT4 = frozenset({"gptq", "rtn", "awq+gptq", "w4a16", "qat", "qad", "awq"})


def kernel_of(card: Card, precision: str) -> str:
    """The kernel that vLLM takes for a precision on a card.

    16 bit: bf16, fp16 (a card without BF16 serves FP16). Weight-only 4 and 8 bit: Marlin from compute capability 7.5
    (Turing) on, exllama for GPTQ before (vLLM 0.32, model_executor/layers/quantization/auto_awq.py, auto_gptq.py and
    utils/marlin_utils.py). FP8: the tensor cores' own where the card has it, else Marlin. A name may ask for a kernel:
    awq@awq-gemm. Raises InputError for a precision without a kernel there.
    """
    name, _, asked = precision.partition("@")
    if asked:
        if asked not in KERNELS:
            raise InputError(f"--precisions {precision!r}: no such kernel", allowed=", ".join(KERNELS))
        return asked
    if name in ("bf16", "fp16"):
        return "16bit"
    if card.generation == "volta" and name in _INT4 - {"awq"}:
        return "exllama"
    kernels = dict.fromkeys(_INT4, "marlin") | {
        "w8a16": "w8a16",
        "gptq-8bit": "w8a16",
        "w8a8": "w8a8",
        "smoothquant": "w8a8",
        "fp8": "fp8" if card.fp8_tflops else "fp8-marlin",
    }
    if name in kernels and card.generation != "volta":
        return kernels[name]
    raise InputError(
        f"--precisions {precision!r}: no kernel is known for it on {card.name}",
        allowed=f"bf16, fp16, {', '.join(sorted(kernels))}; NAME@KERNEL with a kernel of {', '.join(KERNELS)}",
    )


@dataclass(frozen=True, slots=True)
class Steps:
    """Step times of one model in one precision on one card: what the scheduler asks (scheduler.StepTime). Seconds."""

    card: Card
    shape: Architecture
    kernel: Kernel
    coefficients: Coefficients
    factors: Factors = AS_PREDICTED
    era: Era = "v1"
    eager: bool = False
    """Decodes without CUDA graphs, too."""
    streamed: bool = True
    """Somebody listens; False: a batch, answered at its end."""
    _decodes: dict[int, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)
    _linears: dict[int, float] = field(default_factory=dict, compare=False, repr=False)

    def decode(self, sequences: int) -> tuple[float, float]:
        """(a, b): a step that gives each of `sequences` its next token takes a + b · cached tokens that they read."""
        found = self._decodes.get(sequences)
        if found is None:
            gpu = self._gpu(sequences, sequences)
            found = (self._launched(gpu) if self.eager else gpu) + self._host(sequences), self._kv_s()
            self._decodes[sequences] = found
        return found

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        """Seconds of a step with `prompt` prompt tokens, which attend over `pairs`, beside `sequences` decodes."""
        tokens = sequences + prompt
        gpu = self._gpu(tokens, sequences + finishing) + self._kv_s() * context + self._attention(pairs)
        return self._launched(gpu) + self._host(sequences + finishing)

    # --- what the card does -------------------------------------------------------------------------------------------

    def _gpu(self, tokens: int, sampled: int) -> float:
        """Every layer's linears and small kernels on `tokens`, and head and sampling for `sampled` of them."""
        layers = self.shape.layers * (self.coefficients.layer_s + self._elementwise(tokens))
        return layers + self._all_linears(tokens) + self._head(sampled)

    def _all_linears(self, tokens: int) -> float:
        found = self._linears.get(tokens)
        if found is None:
            found = self.shape.layers * sum(self.linear(k, n, tokens) for k, n in fused(self.shape))
            self._linears[tokens] = found
        return found

    def linear(self, inputs: int, outputs: int, tokens: int, kernel: Kernel | None = None) -> float:
        """One linear layer on `tokens`, alone."""
        kernel, c = kernel or self.kernel, self.coefficients
        moved = weight_bytes(kernel, inputs, outputs) + 2 * tokens * (inputs + outputs)
        operations = 2.0 * tokens * inputs * outputs
        memory = moved / self._bandwidth(getattr(c, kernel.read), getattr(c, kernel.stream))
        if kernel.call is not None:
            memory += getattr(c, kernel.call)
        if kernel.dequantize_from is not None and tokens >= kernel.dequantize_from:
            written = 2 * inputs * outputs / self._bandwidth(c.read_16)
            return memory + written + self.linear(inputs, outputs, tokens, KERNELS["16bit"])
        compute = operations / (self._tensor(kernel.rate) * getattr(c, kernel.mma))
        if kernel.plateau is not None:
            plateau = getattr(c, kernel.plateau) * 2 * inputs * outputs / self._bandwidth(c.read_16)
            compute = self._rounded(compute, plateau)
        if kernel.row is not None:
            rows = operations / ((self.card.sms or 1) * getattr(c, kernel.row) * 1e12 * self.factors.tensor)
            compute = rows if kernel.plateau is None else min(rows, compute)
        return self._rounded(memory, compute)

    def _head(self, rows: int) -> float:
        """The output head in 16 bit (or as it is stored), and sampling: logits in float32, read and written twice."""
        h, v = self.shape.hidden, self.shape.vocabulary
        logits = 16.0 * rows * v / self._bandwidth(self.coefficients.read_16)
        return self.linear(h, v, rows, KERNELS["16bit"]) + logits

    def _elementwise(self, tokens: int) -> float:
        """Norms, rotary embedding, activation and residuals of one layer: each reads and writes its vector once."""
        shape = self.shape
        width = 8 * shape.hidden + 3 * shape.intermediate + 3 * (shape.heads + shape.kv_heads) * shape.head_dim
        return 2.0 * tokens * width / self._bandwidth(self.coefficients.read_16)

    def _kv_s(self) -> float:
        """Seconds to read one cached token's keys and values in all layers."""
        return self.shape.kv_bytes_per_token / self._bandwidth(self.coefficients.read_kv)

    def _attention(self, pairs: int) -> float:
        """Prompt attention, which grows with the square: 4 operations a pair and head dimension (QK and PV)."""
        operations = 4.0 * pairs * self.shape.heads * self.shape.head_dim * self.shape.layers
        return operations / (self._tensor("16bit") * self.coefficients.mma_attention)

    # --- what the host does -------------------------------------------------------------------------------------------

    def _host(self, sequences: int) -> float:
        c = self.coefficients
        if self.era == "v1":
            return (c.step_v1_s + c.sequence_v1_s * sequences) * self.factors.host
        each = c.sequence_v0_s + (c.stream_v0_s if self.streamed else 0.0)
        return (c.step_v0_s + each * sequences) * self.factors.host

    def _launched(self, gpu: float) -> float:
        """Of a step without graphs: the card's time, or the time that the host takes to launch it, if that is more."""
        layer_s = self.coefficients.eager_v0_layer_s if self.era == "v0" else self.coefficients.eager_v1_layer_s
        return self._rounded(gpu, self.shape.layers * layer_s * self.factors.host)

    # --- ceilings -----------------------------------------------------------------------------------------------------

    def _bandwidth(self, read: float, stream: float | None = None) -> float:
        """Bytes/s: the share of the memory's, or what all multiprocessors can stream (10^9 bytes/s each)."""
        memory = self.card.bandwidth_gb_s * read
        if self.card.sms is not None and stream is not None:
            memory = min(memory, self.card.sms * stream)
        return memory * 1e9 * self.factors.bandwidth

    def _tensor(self, rate: Rate) -> float:
        """Operations/s by the data sheet; a card without the type multiplies in 16 bit."""
        given = {"16bit": None, "int8": self.card.int8_tops, "fp8": self.card.fp8_tflops}[rate]
        return (given or self.card.bf16_tflops or self.card.fp16_tflops) * 1e12 * self.factors.tensor

    def _rounded(self, one: float, two: float) -> float:
        """The larger of two times, with a rounded corner: (one^p + two^p)^(1/p)."""
        large, small = (one, two) if one >= two else (two, one)
        p = self.coefficients.corner
        return float(large * (1 + (small / large) ** p) ** (1 / p))


def fused(shape: Architecture) -> tuple[tuple[int, int], ...]:
    """(in, out) of a block's linears as engines run them: q, k and v are one, and so are gate and up."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    h, i = shape.hidden, shape.intermediate
    up = (h, i) if len(shape.linears) == 6 else (h, 2 * i)  # some have no gate
    return (h, q + 2 * kv), (q, h), up, (i, h)


@cache
def weight_bytes(kernel: Kernel, inputs: int, outputs: int) -> float:
    """Stored weights of one linear layer, with scales and zero points."""
    groups = inputs / kernel.group if kernel.group else 0.0
    return inputs * outputs * kernel.bits / 8 + groups * outputs * (2.0 + (0.5 if kernel.zeros else 0.0))


def changed(coefficients: Coefficients, **logs: float) -> Coefficients:
    """Coefficients with some of them multiplied by exp(log): how a fit and a sensitivity step."""
    return replace(coefficients, **{name: getattr(coefficients, name) * math.exp(log) for name, log in logs.items()})
