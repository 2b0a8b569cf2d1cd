"""A method is a fold, a rounding, or one after the other, applied site by site as the calibration set goes through.

    fold        moves a factor a channel between a site's layers and the operation before them, which computes the same
                awq, smoothquant
    rounding    chooses the integers
                rtn: the nearest          awq: the nearest, clipped where that helps the output          gptq: one
                column after the other

One pass does both: at each site the inputs are those that the layers before give as they are now, rounded. Where the
operation before is such a layer (v before o, up before down), its integers stay what they are, for each row is rounded
on its own, and its scales are divided instead. They are rounded again then, which is an error of 2^-9 beside the 2^-4
of the integers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantize import awq, gptq, rtn, smoothquant
from quantize.blocks import Site, apply_fold, by_row, linear
from quantize.devices import spread
from quantize.formats import HEAD
from quantize.head import Head
from quantize.scheme import Grid, Quantized, Scheme, dequantize, loss, round_scales, search
from quantize.walk import InputStats, Step

SchemeOf = Callable[[str], Scheme | None]
"""The scheme of a linear layer by its name in the block; None where it is kept in 16 bits."""


class Method(NamedTuple):
    """`fold` is awq, smoothquant or None where nothing is folded; `rounding` is one of rtn, awq, gptq."""

    fold: str | None
    rounding: str

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.fold is not None or self.rounding != "rtn"


METHODS = {
    "rtn": Method(None, "rtn"),
    "awq": Method("awq", "awq"),
    "gptq": Method(None, "gptq"),
    "smoothquant": Method("smoothquant", "rtn"),
    "awq+gptq": Method("awq", "gptq"),
    "smoothquant+gptq": Method("smoothquant", "gptq"),
}


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer, in the block's own statistics.

    weight_sqnr_db: ||W||^2 / ||W - What||^2 in dB, of the weight as folded; output_sqnr_db: the same of W X', whose
    trace form is tr(W G W') / tr(D G D'), None without calibration. Both are None where nothing was lost, too.
    damping: as `gptq.Factor`, None for other methods; unseen: input channels that no calibration token ever moved.
    """

    name: str
    scheme: str
    weight_sqnr_db: float | None
    output_sqnr_db: float | None = None
    damping: float | None = None
    unseen: int = 0


@torch.no_grad()
def quantize_block(
    step: Step, method: Method, how: str, scheme_of: SchemeOf
) -> tuple[dict[str, Quantized], list[Layer]]:
    """Quantize the layers of `step.block` that `scheme_of` gives a scheme, and move the calibration set through it.

    `how` is the search for the grids, minmax, mse or output. The block's weights become what the integers stand for.
    """
    done: dict[str, Quantized] = {}
    layers: list[Layer] = []

    def visit(site: Site, stats: InputStats | None) -> Tensor | None:
        schemes = {name: scheme for name in site.linears if (scheme := scheme_of(name))}
        if not schemes:
            return None
        factor = _fold(step, site, stats, schemes, method.fold, done) if stats else None
        if stats and factor is not None:
            stats = stats.scaled(factor)
        weights = {name: linear(step.block, name).weight for name in schemes}
        rounded, damping = _round(weights, schemes, stats, method.rounding, how, [side.device for side in step.sides])
        for name, quantized in rounded.items():
            after = dequantize(quantized)
            lost = _energies(weights[name], after, stats)
            layers.append(_layer(step.prefix + name, schemes[name], lost, stats, damping))
            weights[name].copy_(after)
        done.update(rounded)
        return factor

    if method.calibrated:
        step.advance(visit)
    else:
        for site in step.family.sites:
            visit(site, None)
    return done, layers


@torch.no_grad()
def quantize_head(
    head: Head, scheme: Scheme, stats: InputStats | None, method: Method, how: str
) -> tuple[list[Quantized], Layer]:
    """The output head in slices of its rows, rounded one after the other: nothing is folded into it.

    `stats` are those of its inputs, None without calibration; `how` is as for `quantize_block`.
    """
    slices = []
    lost = torch.zeros(2 if stats is None else 4, dtype=torch.float64)
    for start, end in head.slices():
        weight = head.rows(start, end)
        rounded, damping = _round({HEAD: weight}, {HEAD: scheme}, stats, method.rounding, how)
        slices.append(rounded[HEAD])
        lost += _energies(weight, dequantize(rounded[HEAD]), stats)
    return slices, _layer(HEAD, scheme, lost, stats, damping)


def _fold(
    step: Step,
    site: Site,
    stats: InputStats,
    schemes: Mapping[str, Scheme],
    fold: str | None,
    done: dict[str, Quantized],
) -> Tensor | None:
    """Move a factor [in] into the operation before `site`, and return it; None where none is wanted or can be."""
    if fold is None or site.before is None:
        return None
    before = step.block.get_submodule(site.before)
    weights = [(linear(step.block, name).weight, scheme) for name, scheme in schemes.items()]
    if fold == "awq":
        scale = awq.best_scale(weights, stats, site, step.heads)
    elif isinstance(before, nn.Linear):
        return None  # SmoothQuant smooths what comes out of a norm
    else:
        heaviest = torch.cat([weight for weight, _ in weights]).abs().amax(dim=0)
        scale = smoothquant.smoothing(stats.abs_max, heaviest)
    stored = step.stored.get(f"{site.before}.weight", torch.float32)
    scale = apply_fold(step.block, site, scale, step.heads, step.family.offset, stored)
    if site.before in done and isinstance(before, nn.Linear):
        q, scales, zeros = done[site.before]
        rows = by_row(scale, site, step.heads)
        divided = scales.clone()
        divided[-len(rows) :] = round_scales(scales[-len(rows) :].float() / rows[:, None])
        done[site.before] = Quantized(q, divided, zeros)
        before.weight.copy_(dequantize(done[site.before]))
    return scale


def _round(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    stats: InputStats | None,
    rounding: str,
    how: str,
    devices: Sequence[str] = (),
) -> tuple[dict[str, Quantized], float | None]:
    """The integers of a site's layers, and GPTQ's damping. `devices` share in AWQ's search."""
    if rounding == "gptq" and stats is not None:
        return _gptq(weights, schemes, stats.gram, how)
    if rounding == "awq" and stats is not None:
        return _awq(weights, schemes, stats.gram, devices), None
    return {name: rtn.nearest(weight, schemes[name], how) for name, weight in weights.items()}, None


def _awq(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], gram: Tensor, devices: Sequence[str]
) -> dict[str, Quantized]:
    """Each layer by itself, on any of `devices`; what comes out lies where `gram` does."""
    names = list(weights)

    def searched(device: str, i: int) -> Quantized:
        found, _ = search(weights[names[i]].to(device), schemes[names[i]], gram.to(device))
        return Quantized(*(part.to(gram.device) for part in found))

    return dict(zip(names, spread(searched, len(names), devices or [str(gram.device)]), strict=True))


def _gptq(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], gram: Tensor, how: str
) -> tuple[dict[str, Quantized], float]:
    """The layers of each scheme stacked: they share the factor, and the columns are walked once."""
    coarse = min(scheme.bits for scheme in schemes.values()) == 2
    factor = gptq.factor(gram, damping=gptq.DAMPING_AT_2_BITS if coarse else gptq.DAMPING)
    done = {}
    for scheme in dict.fromkeys(schemes.values()):
        names = [name for name in weights if schemes[name] == scheme]
        grids = [rtn.find_grid(weights[name], scheme, how, gram) for name in names]
        points = Grid(torch.cat([g.scales for g in grids]), torch.cat([g.zeros for g in grids]))
        q = gptq.round_columns(torch.cat([weights[name] for name in names]), factor, scheme, points)
        sizes = [len(weights[name]) for name in names]
        for name, part, points in zip(names, torch.split(q, sizes), grids, strict=True):
            done[name] = Quantized(part, *points)
    return done, factor.damping


def _energies(before: Tensor, after: Tensor, stats: InputStats | None) -> Tensor:
    """||W||^2 and ||W - What||^2, and with calibration tr(W G W') and tr(D G D') too: float64 [2] or [4]."""
    difference = before - after
    grams = [None] if stats is None else [None, stats.gram]
    return torch.tensor([loss(each, gram) for gram in grams for each in (before, difference)], dtype=torch.float64)


def layer_of(name: str, scheme: Scheme, before: Tensor, after: Tensor) -> Layer:
    """What became of a layer whose weight was `before` and is `after`, [out, in] each, without calibration."""
    return _layer(name, scheme, _energies(before, after, None), None, None)


def _layer(name: str, scheme: Scheme, lost: Tensor, stats: InputStats | None, damping: float | None) -> Layer:
    """What became of a layer that `lost` so much (see `_energies`)."""
    signal, noise, *outputs = lost.tolist()
    weight = _decibels(signal, noise)
    if stats is None:
        return Layer(name, str(scheme), weight)
    return Layer(name, str(scheme), weight, _decibels(*outputs), damping, int((stats.abs_max == 0).sum()))


def _decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there was no signal or nothing was lost."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
