"""What is measured: the linear layers of a model as vLLM runs them, filled with random integers.

Layers that read one input run as one product: q, k and v, and gate and up. The output head is left out: it is not
quantized as a rule. Random integers cost a kernel what a model's cost it, for no kernel here looks at them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quantize.blocks import family_of
from quantize.errors import InputError
from quantize.kernels.tensors import Stored, width
from quantize.packing import WORD, pack, pack_awq
from quantize.scheme import Quantized
from quantize.shapes import implied

_ROOT = Path(__file__).parents[2]
_SHAPES = (_ROOT / "scenarios" / "shapes", _ROOT / "harness" / "_scenarios" / "shapes")
"""Of the repository, and of the wheel."""

_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""What vLLM calls layers that it runs as one, by the first of them."""


@dataclass(frozen=True)
class Shape:
    """A product of one decoder block of `model`: n outputs, k inputs."""

    model: str
    layer: str
    n: int
    k: int


@dataclass(frozen=True)
class Layer:
    """q: uint8 [n, k]; scales: [n, groups] in 16 bit; zeros: uint8 [n, groups]. A weight is (q - z) s."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]

    @cached_property
    def stored(self) -> Stored:
        """The layer as a checkpoint has it: AWQ for 4 bits, GPTQ v2 for others."""
        parts = Quantized(self.q, self.scales, self.zeros)
        if self.bits == 4:
            return Stored(*pack_awq(parts), None, "awq", self.bits, self.group_size)
        words = pack(self.zeros.T.contiguous(), self.bits)
        return Stored(self.gptq_words, words, self.scales.T.contiguous(), None, "gptq_v2", self.bits, self.group_size)

    @property
    def gptq_words(self) -> Tensor:
        """q as GPTQ packs it: int32 [k bits/32, n]."""
        return pack(self.q, self.bits).T.contiguous()

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(q - z) s as [n, k]; in float64 without any rounding."""
        n, groups = self.scales.shape
        q = self.q.view(n, groups, -1).to(dtype if dtype == torch.float64 else torch.float32)
        return ((q - self.zeros[..., None].to(q.dtype)) * self.scales[..., None].to(q.dtype)).to(dtype).view(n, -1)


def shapes(name: str) -> list[Shape]:
    """The products of a block of the model `name`: a known shape (qwen2.5-7b), a config.json or the directory of one.

    Raises InputError for a name that is none of these, ModelError for an architecture that is not known.
    """
    file = _config(name)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: {error!r}", "the config.json of a model", "Name another file") from error
    tensors = implied(config | {"num_hidden_layers": 1}).tensors
    model = file.parent.resolve().name if file.name == "config.json" else file.stem
    found = []
    for site in family_of(model_type).sites:
        sizes = [tensors[f"model.layers.0.{linear}.weight"] for linear in site.linears]
        first = site.linears[0].rpartition(".")[2]
        layer = _FUSED.get(first, first) if len(sizes) > 1 else first
        found.append(Shape(model, layer, sum(outputs for outputs, _ in sizes), sizes[0][1]))
    return found


def rotated(
    shape: Shape, bits: int, group_size: int, dtype: torch.dtype, device: torch.device, least: int, seed: int
) -> Iterator[Layer]:
    """So many different layers of one shape that their packed integers are at least `least` bytes: no cache keeps a
    layer until its turn comes again. Raises InputError for a shape that the kernels do not take."""
    if shape.k % width(group_size, shape.k) or shape.n * bits % WORD:
        raise InputError(
            f"{shape.layer} of {shape.model}, {shape.n} x {shape.k}, in groups of {group_size}",
            "inputs in whole groups, outputs that fill 32-bit words", "Choose another --group-size",
        )  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(math.ceil(8 * least / (shape.n * shape.k * bits))):
        yield _random(shape, bits, group_size, dtype, device, generator)


def _random(
    shape: Shape, bits: int, group_size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Layer:
    """Integers of all values alike; scales of a weight's usual size, which float16 and bfloat16 both represent."""

    def integers(*size: int) -> Tensor:
        return torch.randint(0, 1 << bits, size, dtype=torch.uint8, device=device, generator=generator)

    groups = shape.k // width(group_size, shape.k)
    scales = torch.rand(shape.n, groups, device=device, generator=generator).mul_(0.01).add_(0.005)
    return Layer(integers(shape.n, shape.k), scales.bfloat16().to(dtype), integers(shape.n, groups), bits, group_size)


def _config(name: str) -> Path:
    name = name.removeprefix("shape:")  # as other commands call it
    path = Path(name).expanduser()
    for file in (path / "config.json", path, *(folder / f"{name}.json" for folder in _SHAPES)):
        if file.is_file():
            return file
    known = sorted({file.stem for folder in _SHAPES for file in folder.glob("*.json")})
    raise InputError(f"--models {name}", f"a config.json, its directory, or one of {', '.join(known)}", "Name another")
