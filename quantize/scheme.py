"""Group-wise integer quantization of a weight matrix, in plain torch: the reference for every kernel and format.

A row of W is cut into groups of `group_size` neighbours along the input dimension, or is one group (per channel). Each
group has one scale s and one zero point z, and each weight one integer:

    asymmetric   s = (hi - lo) / (2^b - 1)    z = clamp(round(-lo / s))     lo = min(w, 0), hi = max(w, 0) of the group
    symmetric    s = max|w| / (2^(b-1) - 1/2) z = 2^(b-1)
    both         q = clamp(round(w / s) + z, 0, 2^b - 1)                    what = (q - z) s

The range always holds 0, because z is stored unsigned: a group of one sign would otherwise need a z outside of it. The
symmetric grid reaches from -2^(b-1) to 2^(b-1) - 1; dividing by the half between the two is what compressed-tensors
does as well, and at 2 bits it is the difference between three levels and four.

`grid` finds s and z, `to_grid` rounds to them; methods that move the weights between the two (GPTQ) call them apart.
A grid's range can be narrowed by a factor a group ("shrink"): the outermost weights are clipped and all others get a
finer step. `search` tries such factors and keeps the one of least squared error, of the weights alone (MSE) or of the
outputs, where the Gram matrix of the inputs is known.

The scale is rounded to what the checkpoint can hold BEFORE the weights are rounded to it, so that `dequantize` gives
the numbers that the kernel multiplies with. "Can hold" means float16 and bfloat16 both: the AutoAWQ layout stores
float16, but vLLM casts the scales to the activations' type, and a float16 scale served with --dtype bfloat16 would be
off by up to 2^-9, silently. Eight significant bits cost next to nothing, since the integers are chosen afterwards, and
make one checkpoint mean one set of weights under either type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import SchemeError

# The smallest positive float16. A group of zeros has no scale of its own; with this one it comes back as exact zeros.
_SMALLEST_SCALE = 2.0**-24

PER_CHANNEL = -1
"""As a group size: the whole row is one group."""

SHRINKS = tuple(1 - i / 20 for i in range(11))
"""The factors that `search` tries: down to half the range."""


@dataclass(frozen=True)
class Scheme:
    """How a weight becomes integers: `bits` each, one scale and zero for `group_size` inputs, symmetric or not.

    `activation_bits` is None where activations stay in 16 bits (W4A16, W8A16); 8 means per-token dynamic int8 (W8A8).
    4 (W4A4) can be evaluated (`fidelity`) and not stored: no layout that vLLM 0.32 reads on integers holds it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise SchemeError(
                f"bits = {self.bits}", "2, 3, 4 or 8", "Choose --bits 4, the one with the fastest kernels"
            )
        if self.group_size < 1 and self.group_size != PER_CHANNEL:
            raise SchemeError(
                f"group size = {self.group_size}",
                "a positive divisor of the input size, or -1 for one group a row",
                "Choose --group-size 128",
            )
        if self.activation_bits not in (None, 4, 8):
            raise SchemeError(
                f"activation bits = {self.activation_bits}", "4, 8 or none", "Choose W8A8 or weights only"
            )

    @property
    def highest(self) -> int:
        """The largest integer, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` inputs has. Raises SchemeError where they do not come out even."""
        size = columns if self.group_size == PER_CHANNEL else self.group_size
        if columns % size:
            fits = [g for g in (128, 64, 32) if columns % g == 0]
            raise SchemeError(
                f"group size = {size} for a weight with {columns} inputs",
                "a divisor of the input size",
                f"Choose --group-size {fits[0]}" if fits else "Choose --group-size -1, one group a row",
            )
        return columns // size

    def __str__(self) -> str:
        groups = "per channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        kind = "sym" if self.symmetric else "asym"
        return f"W{self.bits}A{self.activation_bits or 16} {groups} {kind}"


class Grid(NamedTuple):
    """The points that weights may take. scales: float16 [out, groups]; zeros: uint8 [out, groups]."""

    scales: Tensor
    zeros: Tensor


class Quantized(NamedTuple):
    """A quantized matrix. q: uint8 [out, in]; scales: float16 [out, groups]; zeros: uint8 [out, groups]."""

    q: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(weight: Tensor, scheme: Scheme, shrink: Tensor | None = None) -> Quantized:
    """Round `weight` [out, in] to the nearest points of its grid. `shrink` and errors as for `grid`."""
    points = grid(weight, scheme, shrink)
    return Quantized(to_grid(weight, points, scheme), *points)


def grid(weight: Tensor, scheme: Scheme, shrink: Tensor | None = None) -> Grid:
    """The grid of `weight` [out, in].

    `shrink` [out, groups], in (0, 1], narrows each group's range about zero; without it the range is the group's own
    minimum and maximum. Raises SchemeError for NaN, infinity, a range too wide for a float16 scale, and a group size
    that does not divide the inputs.
    """
    lo, hi = _range(weight, scheme)
    return _points(lo, hi, scheme) if shrink is None else _points(lo * shrink, hi * shrink, scheme)


def to_grid(weight: Tensor, points: Grid, scheme: Scheme) -> Tensor:
    """The integers, uint8 [out, in], of the grid's points nearest to `weight` [out, in]."""
    w = weight.float().view(weight.shape[0], points.scales.shape[1], -1)
    zeros = points.zeros.float()[..., None]
    q = (torch.round(w / points.scales.float()[..., None]) + zeros).clamp(0, scheme.highest)
    return q.to(torch.uint8).view(weight.shape)


def search(
    weight: Tensor, scheme: Scheme, gram: Tensor | None = None, shrinks: Sequence[float] = SHRINKS
) -> tuple[Quantized, float]:
    """`weight` [out, in] on the grid of least squared error, and that error.

    Without `gram` the error is ||W - What||^2. With it, [in, in], it is that of the outputs, tr(D G D') with D =
    W - What: each group is searched with its own diagonal block of G, as if the others made no error; then each group
    once more with what the others' errors add to its own,

        D_g G_gg D_g' + 2 D_g (sum over h != g of G_gh D_h')

    which can only lower the whole. The last word is between that and the plain grid.
    """
    grouped, lo, hi = _grouped(weight, scheme)
    blocks = None if gram is None else diagonal_blocks(gram, grouped.shape[1])
    best, _ = _best_alone(grouped, lo, hi, scheme, blocks, shrinks)
    if gram is not None and grouped.shape[1] > 1:
        best = _sweep(grouped, gram, scheme, lo, hi, best, shrinks)
    tried = [quantize(weight, scheme), quantize(weight, scheme, best)]
    losses = [loss(weight - dequantize(quantized), gram) for quantized in tried]
    chosen = losses.index(min(losses))
    return tried[chosen], losses[chosen]


def least_error(weight: Tensor, scheme: Scheme, blocks: Tensor, shrinks: Sequence[float] = SHRINKS) -> float:
    """Nearly the loss that `search` leaves of `weight` [out, in], at a fraction of its time.

    The sum of the groups' own errors, each with its best factor, by the diagonal `blocks` [groups, size, size] of the
    Gram matrix: what one group's error adds to another's, of either sign, is left out.
    """
    _, least = _best_alone(*_grouped(weight, scheme), scheme, blocks, shrinks)
    return float(least.sum(dtype=torch.float64))


def diagonal_blocks(gram: Tensor, groups: int) -> Tensor:
    """[groups, size, size] of `gram` [in, in]."""
    size = len(gram) // groups
    span = torch.arange(groups, device=gram.device)
    return gram.view(groups, size, groups, size)[span, :, span, :]


def _grouped(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [out, in] as [out, groups, size], and the least and greatest of each group."""
    return weight.float().view(len(weight), scheme.groups(weight.shape[1]), -1), *_range(weight, scheme)


def _best_alone(
    grouped: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme, blocks: Tensor | None, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The factor [out, groups] of each group's least error, and that error, as if the others made none."""
    best = least = torch.empty(0)
    for i, shrink in enumerate(shrinks):
        difference = grouped - _rounded(grouped, lo * shrink, hi * shrink, scheme)
        seen = difference if blocks is None else torch.einsum("ogi,gij->ogj", difference, blocks)
        error = (seen * difference).sum(dim=-1)
        if i == 0:
            best, least = torch.full_like(error, shrink), error
        else:
            best = torch.where(error < least, shrink, best)
            least = torch.minimum(error, least)
    return best, least


def _sweep(
    grouped: Tensor, gram: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, best: Tensor, shrinks: Sequence[float]
) -> Tensor:
    """`best` [out, groups] after one round in which each group takes the factor that suits what the others left."""
    rows, groups, size = grouped.shape
    best = best.clone()
    errors = (grouped - _rounded(grouped, lo * best, hi * best, scheme)).view(rows, -1)
    for g in range(groups):
        own = slice(g * size, (g + 1) * size)
        block = gram[own, own]
        others = errors @ gram[:, own] - errors[:, own] @ block
        weight, least = grouped[:, g : g + 1], None
        for shrink in shrinks:
            low, high = lo[:, g : g + 1] * shrink, hi[:, g : g + 1] * shrink
            made = (weight - _rounded(weight, low, high, scheme))[:, 0]
            error = ((made @ block + 2 * others) * made).sum(dim=-1)
            if least is None:
                least, chosen, factor = error, made, torch.full_like(error, shrink)
                continue
            better = error < least
            least = torch.where(better, error, least)
            factor = torch.where(better, shrink, factor)
            chosen = torch.where(better[:, None], made, chosen)
        errors[:, own], best[:, g] = chosen, factor
    return best


def _rounded(grouped: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> Tensor:
    """What `grouped` [out, groups, size] becomes on the grid of ranges `lo` to `hi`, [out, groups]."""
    scales, zeros = _points(lo, hi, scheme)
    s, z = scales.float()[..., None], zeros.float()[..., None]
    return (grouped / s).round_().add_(z).clamp_(0, scheme.highest).sub_(z).mul_(s)  # in place: the search lives here


def loss(difference: Tensor, gram: Tensor | None = None) -> float:
    """tr(D G D'): the mean squared length, over tokens, of the output error that D = W - What [out, in] makes."""
    seen = difference if gram is None else difference @ gram
    return float(torch.sum(seen * difference, dtype=torch.float64))


def dequantize(quantized: Quantized) -> Tensor:
    """(q - z) s as float32 [out, in]: exact, since 9 bits times 8 bits fit the 24 of a float32."""
    q, scales, zeros = quantized
    rows, groups = scales.shape
    grouped = q.view(rows, groups, -1).float()
    return ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).view(q.shape)


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


def fake_quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """Activations [..., in] as a kernel with dynamic per-token quantization sees them: s = max|x| / (2^(b-1) - 1).

    The formula is that of vLLM's dynamic_scaled_int8_quant for 8 bits; 4 is the same one, for evaluation.
    """
    highest = (1 << (bits - 1)) - 1
    scale = x.abs().amax(dim=-1, keepdim=True).float() / highest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.round(x.float() / scale).clamp(-highest - 1, highest) * scale).to(x.dtype)


def _range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Least and greatest of each group with zero between them, float32 [out, groups] each."""
    rows, columns = weight.shape
    w = weight.float().view(rows, scheme.groups(columns), -1)
    lo, hi = w.amin(dim=-1), w.amax(dim=-1)  # aminmax along a dimension takes ten times as long
    if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):  # they hand NaN on
        raise SchemeError("a weight with NaN or infinity", "finite numbers", "The model is damaged: fetch it again")
    return lo.clamp(max=0), hi.clamp(min=0)


def _points(lo: Tensor, hi: Tensor, scheme: Scheme) -> Grid:
    if scheme.symmetric:
        scales = round_scales(torch.maximum(-lo, hi) / (scheme.middle - 0.5))
        return Grid(scales, torch.full_like(scales, scheme.middle, dtype=torch.uint8))
    scales = round_scales((hi - lo) / scheme.highest)
    return Grid(scales, torch.round(-lo / scales.float()).clamp(0, scheme.highest).to(torch.uint8))
