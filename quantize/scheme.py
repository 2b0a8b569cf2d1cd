"""Group-wise integer quantization of a weight matrix, in plain torch: the reference for every kernel and format.

A row of W is cut into groups of `group_size` neighbours along the input dimension. Each group has one scale s and one
zero point z, and each weight one integer:

    asymmetric   s = (hi - lo) / (2^b - 1)    z = clamp(round(-lo / s))     lo = min(w, 0), hi = max(w, 0) of the group
    symmetric    s = max|w| / (2^(b-1) - 1)   z = 2^(b-1)
    both         q = clamp(round(w / s) + z, 0, 2^b - 1)                    what = (q - z) s

The range always holds 0, because z is stored unsigned: a group of one sign would otherwise need a z outside of it.

The scale is rounded to what the checkpoint can hold BEFORE the weights are rounded to it, so that `dequantize` gives
the numbers that the kernel multiplies with. "Can hold" means float16 and bfloat16 both: the AutoAWQ layout stores
float16, but vLLM casts the scales to the activations' type, and a float16 scale served with --dtype bfloat16 would be
off by up to 2^-9, silently. Eight significant bits cost next to nothing, since the integers are chosen afterwards, and
make one checkpoint mean one set of weights under either type.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import SchemeError

# The smallest positive float16. A group of zeros has no scale of its own; with this one it comes back as exact zeros.
_SMALLEST_SCALE = 2.0**-24


@dataclass(frozen=True)
class Scheme:
    """How a weight becomes integers: `bits` each, one scale and zero for `group_size` inputs, symmetric or not."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"bits = {self.bits}", "2 to 8", "Choose --bits 4, the one that vLLM's AWQ kernels run")
        if self.group_size < 1:
            raise SchemeError(
                f"group size = {self.group_size}", "a positive divisor of the input size", "Choose --group-size 128"
            )

    @property
    def highest(self) -> int:
        """The largest integer, 2^bits - 1."""
        return (1 << self.bits) - 1


class Quantized(NamedTuple):
    """A quantized matrix. q: uint8 [out, in]; scales: float16 [out, groups]; zeros: uint8 [out, groups]."""

    q: Tensor
    scales: Tensor
    zeros: Tensor


def groups_of(weight: Tensor, group_size: int) -> Tensor:
    """View [out, in] as [out, groups, group_size]. Raises SchemeError where the groups do not come out even."""
    rows, columns = weight.shape
    if columns % group_size:
        fits = [g for g in (128, 64, 32) if columns % g == 0]
        raise SchemeError(
            f"group size = {group_size} for a weight with {columns} inputs",
            "a divisor of the input size",
            f"Choose --group-size {fits[0]}" if fits else "No group size that vLLM serves (128, 64, 32) divides it",
        )
    return weight.view(rows, columns // group_size, group_size)


def quantize(weight: Tensor, scheme: Scheme, shrink: Tensor | None = None) -> Quantized:
    """Round `weight` [out, in] to the grid of `scheme`.

    `shrink` [out, groups], in (0, 1], narrows each group's range about zero: weights beyond it are clipped, and those
    inside it get a finer step. Without it the range is the group's own minimum and maximum. Raises SchemeError for NaN,
    infinity, a range too wide for a float16 scale, and a group size that does not divide the inputs.
    """
    if not torch.isfinite(weight).all():
        raise SchemeError("a weight with NaN or infinity", "finite numbers", "The model is damaged: fetch it again")
    w = groups_of(weight.float(), scheme.group_size)
    lo, hi = w.amin(dim=-1).clamp(max=0), w.amax(dim=-1).clamp(min=0)
    if shrink is not None:
        lo, hi = lo * shrink, hi * shrink
    if scheme.symmetric:
        middle = 1 << (scheme.bits - 1)
        scales = round_scales(torch.maximum(-lo, hi) / (middle - 1))
        zeros = torch.full_like(lo, middle)
    else:
        scales = round_scales((hi - lo) / scheme.highest)
        zeros = torch.round(-lo / scales.float()).clamp(0, scheme.highest)
    q = (torch.round(w / scales.float()[..., None]) + zeros[..., None]).clamp(0, scheme.highest)
    return Quantized(q.to(torch.uint8).view(weight.shape), scales, zeros.to(torch.uint8))


def round_scales(scales: Tensor) -> Tensor:
    """The nearest positive numbers that float16 and bfloat16 both represent, as float16.

    Rounding to bfloat16 leaves 8 significant bits, of which float16 drops some only where it is subnormal: what comes
    out is exact in both. Raises SchemeError where a scale is beyond float16.
    """
    rounded = scales.to(torch.bfloat16).to(torch.float16).clamp(min=_SMALLEST_SCALE)
    if not torch.isfinite(rounded).all():
        raise SchemeError(
            f"weights that need a scale of {scales.max().item():.3g}",
            "scales up to 65504, the largest float16",
            "Such weights are not those of a trained model: check the checkpoint",
        )
    return rounded


def dequantize(quantized: Quantized) -> Tensor:
    """(q - z) s as float32 [out, in]: exact, since 5 bits times 8 bits fit the 24 of a float32."""
    q, scales, zeros = quantized
    rows, columns = q.shape
    grouped = q.view(rows, scales.shape[1], -1).float()
    return ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).view(rows, columns)
