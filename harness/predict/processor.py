"""A processor instead of a card: what vLLM's CPU backend takes for a step, and a Card made of what a run says.

    step = host + layers · (launches + Σ linears) + head + attention

On a processor nothing overlaps: the thread that launches a layer computes it, so host and layers add up, where a card
takes the longer of the two. A linear layer reads its weights and then multiplies:

    16 bit    bytes / bandwidth + 2 T K N / rate
    INT4      bytes / bandwidth + K N / unpacking + 2 T K N / rate'

vLLM's only INT4 kernel there (CPUWNA16LinearKernel) unpacks the weights into BF16 anew in each call and multiplies them
with a kernel of its own. So INT4 is no faster for one user: unpacking takes longer than reading saves. And that is why
a processor has two factors more than a card. `quantized`: beside the 16-bit library those products are slower on one
kind of processor, and with AMX tiles faster. `unpacking`: that is plain vector work, which cores do about alike.

The constants are of one core, in round numbers between fits of all of them to four runs of vLLM 0.32.0 on two kinds of
server (AMD EPYC, Turin, and Intel Xeon with AMX; models of 2.7 and 494 million parameters; the run that the tests judge
a calibration by was not among them). They are where a calibration starts, and how the parts of one factor compare;
another processor may be several times as fast. Without a calibration nothing should be predicted of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.architecture import Architecture
from harness.errors import InputError
from harness.predict.cards import Card
from harness.predict.roofline import AS_PREDICTED, Factors, Kernel, fused, kernel_of, weight_bytes

KERNELS: Mapping[str, Kernel] = {"cpu-16bit": Kernel(16), "cpu-int4": Kernel(4, group=128, zeros=True)}

CORE_GB_S = 8.0
"""What a core reads, 10^9 bytes/s: weights that do not stay in its cache, and cached tokens."""
CORE_TFLOPS = 0.4
"""BF16, in the library's matrix products."""
INT4_RATE = 0.75
"""Rate of the INT4 kernel's products, as a share of the library's."""
CORE_UNPACKED = 4e9
"""Weights that a core unpacks in a second."""
ATTENTION_RATE = 0.4
"""Rate of prompt attention, as a share of the library's."""
LAYER_S = 130e-6
STEP_S = 400e-6
SEQUENCE_S = 110e-6
"""Of each sequence in a step: sampling, detokenizing, sending. The server shares the machine with the engine."""
REQUEST_S = 4e-3


def card_of(environment: Mapping[str, Any]) -> Card:
    """The machine of a run as a Card, by environment.json: processor, cores, memory.

    vLLM keeps one core for its server (VLLM_CPU_NUM_OF_RESERVED_CPU), the others compute. Raises InputError where the
    file does not say how many cores there are, or how much memory.
    """
    cores, memory = environment.get("cpu_cores"), environment.get("memory_gib")
    if not isinstance(cores, int) or cores < 1 or not isinstance(memory, int | float) or memory <= 0:
        raise InputError(
            f"environment.json: cpu_cores = {cores!r}, memory_gib = {memory!r}",
            allowed="a whole number of cores and the machine's memory",
            remedy="measure the run again with this version, or describe the machine in a TOML file: --gpu own.toml",
        )
    name = " ".join(str(environment.get("cpu") or "CPU").split())
    computing = max(1, cores - 1)
    return Card(
        id=re.sub(r"[^a-z0-9]+", "-", f"{name} {cores} cores".lower()).strip("-"),
        name=f"{name}, {cores} cores",
        generation="cpu",
        memory_gib=float(memory),
        bandwidth_gb_s=CORE_GB_S * computing,
        fp16_tflops=CORE_TFLOPS * computing,
        bf16_tflops=CORE_TFLOPS * computing,
        source="environment.json of the run",
        doubt="bandwidth and rates are those of typical cores, and nothing that was read or measured of this one",
    )


def request_s(factors: Factors) -> float:
    """From the client's send to the scheduler, s."""
    return REQUEST_S * factors.host


def kernel_on(card: Card, precision: str) -> str:
    """The key of KERNELS that serves a precision. Raises InputError for one that is neither 16 nor 4 bit."""
    on_card = kernel_of(card, precision)
    found = {"16bit": "cpu-16bit", "marlin": "cpu-int4"}.get(on_card)
    if found is None:
        raise InputError(
            f"{precision} on {card.name}: its step times are not known",
            allowed="bf16, fp16, awq, gptq, rtn, awq+gptq: 16 and 4 bit",
            remedy="leave its cells out with --use",
        )
    return found


@dataclass(frozen=True, slots=True)
class ProcessorSteps:
    """Step times of one model in one precision on a processor (limits.StepTime). Seconds."""

    card: Card
    shape: Architecture
    kernel: Kernel
    factors: Factors = AS_PREDICTED
    _decodes: dict[int, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)

    def decode(self, sequences: int) -> tuple[float, float]:
        """(a, b): a step that gives each of `sequences` its next token takes a + b · cached tokens that they read."""
        found = self._decodes.get(sequences)
        if found is None:
            found = self._decodes[sequences] = self._step(sequences, sequences), self._kv_s()
        return found

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        """Seconds of a step with `prompt` prompt tokens, which attend over `pairs`, beside `sequences` decodes.

        Prompt attention takes 4 operations a pair and head dimension, QK and PV.
        """
        operations = 4.0 * pairs * self.shape.heads * self.shape.head_dim * self.shape.layers
        attention = operations / (self._rate * ATTENTION_RATE) + self._kv_s() * context
        return self._step(sequences + prompt, sequences + finishing) + attention

    def linear(self, inputs: int, outputs: int, tokens: int) -> float:
        """One linear layer on `tokens`."""
        reading = weight_bytes(self.kernel, inputs, outputs) / self._bandwidth
        operations = 2.0 * tokens * inputs * outputs
        if self.kernel.bits == 16:
            return reading + operations / self._rate
        unpacking = inputs * outputs / (CORE_UNPACKED * self._cores * self.factors.unpacking)
        return reading + unpacking + operations / (self._rate * INT4_RATE * self.factors.quantized)

    def _step(self, tokens: int, sampled: int) -> float:
        """A step without attention: each layer on `tokens`; head, sampling and host for `sampled` of them."""
        linears = sum(self.linear(inputs, outputs, tokens) for inputs, outputs in fused(self.shape))
        h, v = self.shape.hidden, self.shape.vocabulary
        # Weights of 2 bytes, and logits in float32 that are written and read twice.
        head = (2.0 * h * v + 16.0 * sampled * v) / self._bandwidth + 2.0 * sampled * h * v / self._rate
        host = STEP_S + SEQUENCE_S * sampled + LAYER_S * self.shape.layers
        return self.shape.layers * linears + head + host * self.factors.host

    def _kv_s(self) -> float:
        """Seconds to read one cached token's keys and values in all layers."""
        return self.shape.kv_bytes_per_token / self._bandwidth

    @property
    def _cores(self) -> float:
        """Cores that compute, as `card_of` counted them; of a card in a file of one's own, typical ones like them."""
        return self.card.bandwidth_gb_s / CORE_GB_S

    @property
    def _bandwidth(self) -> float:
        return self.card.bandwidth_gb_s * 1e9 * self.factors.bandwidth

    @property
    def _rate(self) -> float:
        return (self.card.bf16_tflops or self.card.fp16_tflops) * 1e12 * self.factors.tensor
