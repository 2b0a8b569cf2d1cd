"""Which layers get how many bits, so that the checkpoint is no larger than asked: `--target-gib`.

Layers differ in what a bit is worth. One pass over calibration text measures it: in each block, with everything else in
full precision, the layers of one site are rounded to b bits and the block is run. What that does to the residual stream
behind the block is the damage of that choice,

    d(site, b) = ||h_out(b) - h_out||^2 / ||h_out||^2

which has attention, activations and norms in it. Small errors of different sites add up about independently, so the
choice is a knapsack: the least sum of damages among those that fit,

    min sum_s d(s, b_s)     such that     sum_s bytes(s, b_s) <= target - bytes of all that is not quantized

solved exactly by scipy's mixed-integer solver. A site is one choice because vLLM fuses its layers into one matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from quantize import formats
from quantize.blocks import linear
from quantize.errors import SchemeError
from quantize.estimate import packed_bytes
from quantize.recipe import Exception_, Recipe, with_bits
from quantize.rtn import nearest
from quantize.scheme import Scheme, dequantize
from quantize.walk import Step, forward, hidden, walk
from quantize.weights import ModelDir

BITS = (2, 3, 4, 8, 16)
"""What may be chosen, from the recipe's own bits up; 16 is the layer as it is."""

_GIB = 2**30
_SEQUENCES = 16
"""A damage is a mean over tokens, so a few thousand of them give it well enough to rank sites."""


@dataclass(frozen=True)
class Choice:
    """A site's layers, by full name, with one scheme: what it costs (bytes) and what it damages (see above)."""

    site: tuple[str, ...]
    scheme: Scheme | None
    size: int
    damage: float


def allocate(
    source: ModelDir, recipe: Recipe, sequences: Sequence[Sequence[int]], target_gib: float, device: str = "cpu"
) -> Recipe:
    """`recipe` with exceptions that make the checkpoint at most `target_gib`; its own exceptions stay as they are.

    Raises SchemeError where even the recipe's own bits are too large, and where nothing needs to be quantized.
    """
    choices = measure(source, recipe, sequences[:_SEQUENCES], device)
    fixed = _fixed_bytes(source, choices)
    chosen = choose(choices, int(target_gib * _GIB) - fixed)
    if chosen is None:
        least = fixed + sum(min(c.size for c in choices if c.site == site) for site in {c.site for c in choices})
        raise SchemeError(
            f"--target-gib {target_gib:g}",
            f"{least / _GIB:.4g} or more with {recipe.scheme.bits} bits and more (of which {fixed / _GIB:.4g} GiB are "
            "embeddings, norms and what is kept)",
            "Choose fewer --bits, or a larger target",
        )
    if all(choice.scheme is None for choice in chosen):
        whole = fixed + sum(choice.size for choice in chosen)
        raise SchemeError(
            f"--target-gib {target_gib:g}",
            f"less than {whole / _GIB:.4g}, the size of the model as it is",
            "Serve the model as it is, or name a smaller target",
        )
    everything = [name for choice in chosen for name in choice.site]
    by_scheme: dict[Scheme | None, list[str]] = {}
    for choice in chosen:
        if choice.scheme != recipe.scheme:
            by_scheme.setdefault(choice.scheme, []).extend(choice.site)
    found = tuple(
        Exception_(f"^{pattern}", scheme)
        for scheme, names in by_scheme.items()
        for pattern in formats.patterns(names, everything)
    )
    return replace(recipe, exceptions=(*found, *recipe.exceptions))


@torch.no_grad()
def measure(source: ModelDir, recipe: Recipe, sequences: Sequence[Sequence[int]], device: str = "cpu") -> list[Choice]:
    """Every choice of every site; one that the recipe has an exception for has only that."""
    choices: list[Choice] = []
    for step in walk(source, sequences, device):
        assert step.flow is not None
        before = [hidden(step, batch) for batch in range(len(step.flow))]
        plain = [_real(step, batch, forward(step, h, batch)) for batch, h in enumerate(before)]
        energy = sum(float((h.double() ** 2).sum()) for h in plain)
        for site in step.family.sites:
            names = tuple(step.prefix + name for name in site.linears)
            weights = {name: linear(step.block, name).weight for name in site.linears}
            own = recipe.scheme_of(names[0])
            options: Sequence[Scheme | None] = [own]
            if own == recipe.scheme:
                options = [_with_bits(recipe.scheme, bits) for bits in BITS if bits >= recipe.scheme.bits]
            for scheme in options:
                size = sum(_stored_bytes(weight, scheme) for weight in weights.values())
                choices.append(Choice(names, scheme, size, _damage(step, weights, scheme, before, plain) / energy))
        step.advance()
    return choices


def choose(choices: Sequence[Choice], budget: int) -> list[Choice] | None:
    """One choice a site, of least total damage within `budget` bytes; None where nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    sites = list(dict.fromkeys(choice.site for choice in choices))
    once = np.zeros((len(sites), len(choices)))
    for column, choice in enumerate(choices):
        once[sites.index(choice.site), column] = 1
    sizes = np.array([[choice.size for choice in choices]], dtype=float)
    damage = np.array([choice.damage for choice in choices])
    found = milp(
        damage / max(damage.max(), 1e-300),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(sizes / 2**20, -np.inf, budget / 2**20)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    if found.x is None:
        return None
    return [choice for choice, taken in zip(choices, found.x, strict=True) if taken > 0.5]


def _damage(
    step: Step,
    weights: Mapping[str, torch.Tensor],
    scheme: Scheme | None,
    before: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
) -> float:
    """||h_out(b) - h_out||^2 over the real places; the weights are put back."""
    if scheme is None:
        return 0.0
    kept = {name: weight.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.copy_(dequantize(nearest(weight, scheme, "mse")))
    total = 0.0
    for batch, h in enumerate(before):
        total += float(((_real(step, batch, forward(step, h, batch)) - plain[batch]).double() ** 2).sum())
    for name, weight in weights.items():
        weight.copy_(kept[name])
    return total


def _real(step: Step, batch: int, hidden: torch.Tensor) -> torch.Tensor:
    assert step.flow is not None
    return hidden[step.flow.real[batch].to(hidden.device)]


def _stored_bytes(weight: torch.Tensor, scheme: Scheme | None) -> int:
    rows, columns = weight.shape
    return rows * columns * 2 if scheme is None else packed_bytes("compressed-tensors", scheme, rows, columns)


def _with_bits(scheme: Scheme, bits: int) -> Scheme | None:
    return None if bits == 16 else with_bits(scheme, bits)


def _fixed_bytes(source: ModelDir, choices: Sequence[Choice]) -> int:
    """All that is stored as it is: tensors that are no weight of a linear layer in a block."""
    chosen = {f"{name}.weight" for choice in choices for name in choice.site}
    return sum(source.nbytes(name) for name in source.files if name not in chosen)
