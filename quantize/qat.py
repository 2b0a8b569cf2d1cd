"""Quantization-aware training: the forward pass sees the quantized weights, the backward pass reaches the real ones.

Each linear layer keeps its weight W in float32 and multiplies with what the checkpoint will hold,

    What = s clamp(round(W / s) + z, 0, 2^b - 1) - s z          s, z of the group (`scheme`: the same two functions)

Rounding has no slope, so the straight-through estimator takes it for the identity where it does not clip (Bengio et
al., arXiv 1308.3432), and a weight beyond its range gets no gradient (the mask of Jacob et al., arXiv 1712.05877, and
of torch's own fake_quantize):

    dL/dW = dL/dWhat  inside        0  clipped

The scales are recomputed at every step, as the group's plain range, or learned (LSQ, Esser et al., arXiv 1902.08153):

    dL/ds = g sum of dL/dWhat (q - z - W/s)  inside,  (q - z)  clipped        g = 1 / sqrt(group_size (2^b - 1))

summed over the group. What is learned is ln(s / s_0), since an optimizer that takes steps of one size (Adam) would
change a small scale by far more of itself than a large one. Zero points stay those of the start. A freeze ends either:
scales are constants from then on, and only the weights go on learning.

Everything else in the forward pass is what the checkpoint holds, too: scales are rounded to its type (`round_scales`)
and so are norms and biases (`Stored`), so that the exported model computes what the trained one did, bit for bit.

The layers are torch's parametrizations: a module is nn.Linear before and after, and its `weight` is What.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantize.scheme import Grid, Quantized, Scheme, fake_quantize_tokens, grid, round_scales, to_grid


class FakeQuantize(nn.Module):
    """A weight's parametrization: float32 [out, in] to what its integers stand for, float32 [out, in].

    `start` is the grid at the start. With `learned` the scales are parameters, else they follow the weight; after
    `freeze` they do neither.
    """

    def __init__(self, scheme: Scheme, start: Grid, learned: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("recomputed", torch.tensor(not learned))  # a buffer, so that a saved state knows
        self.log_ratio = nn.Parameter(torch.zeros_like(start.scales, dtype=torch.float32), requires_grad=learned)
        self.register_buffer("start", start.scales.float())
        self.register_buffer("zeros", start.zeros.clone())

    def points(self, weight: Tensor) -> Grid:
        """The grid of `weight` as training is now, in the checkpoint's types."""
        if bool(self.recomputed):
            return grid(weight.detach(), self.scheme)
        scales = cast(Tensor, self.start) * torch.exp(self.log_ratio.detach())
        return Grid(round_scales(scales), cast(Tensor, self.zeros))

    def forward(self, weight: Tensor) -> Tensor:
        """What, [out, in]."""
        points = self.points(weight)
        scales = points.scales.float()
        if self.log_ratio.requires_grad:
            exact = cast(Tensor, self.start) * torch.exp(self.log_ratio)
            scales = straight(exact, scales)
        found: Tensor = _Round.apply(weight, scales, points.zeros.float(), self.scheme.highest)  # type: ignore[no-untyped-call]
        return found

    def integers(self, weight: Tensor) -> Quantized:
        """`weight` as the checkpoint holds it."""
        points = self.points(weight)
        return Quantized(to_grid(weight, points, self.scheme), *points)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Keep the grid that `weight` has now."""
        if bool(self.recomputed):
            points = self.points(weight)
            cast(Tensor, self.start).copy_(points.scales.float())
            cast(Tensor, self.zeros).copy_(points.zeros)
            cast(Tensor, self.recomputed).fill_(False)
        self.log_ratio.requires_grad_(False)


class _Round(torch.autograd.Function):
    """(q - z) s with the gradients of the module's text. weight [out, in]; scales and zeros float32 [out, groups]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor, highest: int) -> Tensor:
        grouped = weight.view(*scales.shape, -1)
        steps = grouped / scales[..., None]
        wanted = torch.round(steps) + zeros[..., None]
        levels = wanted.clamp(0, highest) - zeros[..., None]
        inside = (wanted >= 0) & (wanted <= highest)
        # d What / d s: of a clipped weight its level, which is where it is stuck; else what rounding did to it.
        slope = torch.where(inside, levels - steps, levels) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside.view(weight.shape), slope)
        ctx.share = (grouped.shape[-1] * highest) ** -0.5
        return (levels * scales[..., None]).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        inside, slope = ctx.saved_tensors
        to_scales = None if slope is None else (grads[0].view(slope.shape) * slope).sum(dim=-1) * ctx.share
        return grads[0] * inside, to_scales, None, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight(x: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, the gradient of `x` going back."""
    found: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return found


class Stored(nn.Module):
    """A parameter's parametrization: float32 as the checkpoint's type will hold it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter, rounded."""
        return straight(parameter, parameter.detach().to(self.dtype).to(parameter.dtype))


def fake_quantize_inputs(layer: nn.Module, bits: int) -> None:
    """Have `layer` see its inputs as a kernel with dynamic per-token quantization does (W8A8), straight through."""

    def quantize(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        return straight(x, fake_quantize_tokens(x.detach(), bits)), *rest

    layer.register_forward_pre_hook(quantize)


def prepare(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    grids: Mapping[str, Grid],
    stored: Mapping[str, torch.dtype],
    learned: bool,
) -> None:
    """Make `model`, in float32, a student: its linear layers `schemes` fake-quantized, what else learns rounded.

    grids: where a layer's scales start, else its plain range; stored: the checkpoint's type of each tensor. Norms and
    biases learn with the weights; embeddings and lm_head, most of a small model, stay as they are.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if isinstance(module, nn.Embedding) or name == "lm_head":
            continue
        for parameter in own:
            if parameter == "weight" and (scheme := schemes.get(name)):
                start = grids.get(name) or grid(module.get_parameter("weight").detach(), scheme)
                parametrize.register_parametrization(module, "weight", FakeQuantize(scheme, start, learned))
                if scheme.activation_bits:
                    fake_quantize_inputs(module, scheme.activation_bits)
            else:
                dtype = stored.get(f"{name}.{parameter}", torch.float32)
                parametrize.register_parametrization(module, parameter, Stored(dtype))
            cast(Any, module).parametrizations[parameter].original.requires_grad_(True)


def quantizers(model: nn.Module) -> dict[str, tuple[FakeQuantize, Tensor]]:
    """The fake quantizer of each linear layer of a student, and the weight that it rounds."""
    found = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        listed = cast(Any, module).parametrizations["weight"]
        if isinstance(listed[0], FakeQuantize):
            found[name] = (listed[0], listed.original)
    return found


def freeze(model: nn.Module) -> None:
    """No scale of a student changes any more."""
    for quantizer, weight in quantizers(model).values():
        quantizer.freeze(weight)


@torch.no_grad()
def export(model: nn.Module) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """What a checkpoint of a student holds: integers by layer, and all other tensors by name, as float32."""
    integers = {name: quantizer.integers(weight) for name, (quantizer, weight) in quantizers(model).items()}
    kept = {}
    for name, module in model.named_modules():
        for parameter in [n for n, _ in module.named_parameters(recurse=False)]:
            if "parametrizations" not in name:
                kept[f"{name}.{parameter}"] = getattr(module, parameter).detach()
        if parametrize.is_parametrized(module):
            for parameter in cast(Any, module).parametrizations:
                if not (parameter == "weight" and name in integers):
                    kept[f"{name}.{parameter}"] = getattr(module, parameter).detach()
    return integers, kept
