"""What a decoder block is made of: its halves, their linear layers, and which operation feeds which.

    serial     norm ─► q k v ─► attention ─► o ─(─► norm)─► +  ─► norm ─► gate up ─► act(gate)*up ─► down ─(─► norm)─► +
    parallel   norm ─┬► q k v ─► attention ─► dense ─┐
                     └► fc1 ─► gelu ─► fc2 ─────────►+          (Phi-2)

Each half is a norm, the layers that read it (`inputs`), a core that ends before the last layer, and that layer
(`output`). With its last layer replaced by an identity, transformers' own module is the core, so attention, rotary
angles, head norms and activations are its code and not a copy of ours; only the order above is written here.

A `Site` is where layers share one input. If the operation before can take a factor per channel, it is foldable: that
operation divides channel j by s_j, the layers after multiply column j by s_j, and the block computes what it did. A
norm multiplies by its weight, so that divides (and a LayerNorm's bias with it; Gemma's weight is stored less one); v
reaches o through a weighted mean over positions, and up reaches down through a product, so their rows do. A GELU lets
no factor through. AWQ and SmoothQuant fold their scales this way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError


@dataclass(frozen=True)
class Site:
    """Linear layers that see the same input.

    `before`: the operation that a factor can be folded into, None if there is none. Where it is a linear layer, the
    factor goes into some of its rows: those of the values ("v", shared by query heads with grouped-query attention), or
    the last ones ("up").
    """

    linears: tuple[str, ...]
    before: str | None
    rows: str | None = None


@dataclass(frozen=True)
class Half:
    """norm ─► inputs ─► core ─► output (─► after) ─► +. `tail` is the output layer's name within the core module."""

    norm: str
    core: str
    output: Site
    after: str | None = None

    @property
    def tail(self) -> str:
        return self.output.linears[0].removeprefix(f"{self.core}.")


@dataclass(frozen=True)
class Stage:
    """Halves that read one norm's output: one, or two in parallel; `inputs` are all the layers that read it."""

    inputs: Site
    halves: tuple[Half, ...]


@dataclass(frozen=True)
class Family:
    """The blocks of an architecture. offset: a norm multiplies by its weight plus this; final: the norm at the end."""

    stages: tuple[Stage, ...]
    offset: float = 0.0
    final: str = "norm"

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the order in which they are computed."""
        return tuple(s for stage in self.stages for s in (stage.inputs, *(half.output for half in stage.halves)))

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of all linear layers, by site."""
        return tuple(name for site in self.sites for name in site.linears)


def _serial(
    qkv: tuple[str, ...], gate_up: tuple[str, ...], norms: tuple[str, str], afters: tuple[str | None, str | None]
) -> tuple[Stage, ...]:
    attention = Half(norms[0], "self_attn", Site(("self_attn.o_proj",), qkv[-1], "v"), afters[0])
    mlp = Half(norms[1], "mlp", Site(("mlp.down_proj",), gate_up[-1], "up"), afters[1])
    return (
        Stage(Site(qkv, norms[0]), (attention,)),
        Stage(Site(gate_up, norms[1]), (mlp,)),
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA = Family(_serial(_QKV, _GATE_UP, _NORMS, (None, None)))
_SANDWICH = _serial(
    _QKV,
    _GATE_UP,
    ("input_layernorm", "pre_feedforward_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
)
_PHI = Stage(
    Site((*_QKV, "mlp.fc1"), "input_layernorm"),
    (
        Half("input_layernorm", "self_attn", Site(("self_attn.dense",), "self_attn.v_proj", "v")),
        Half("input_layernorm", "mlp", Site(("mlp.fc2",), None)),
    ),
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Family(_LLAMA.stages, offset=1.0),
    "gemma2": Family(_SANDWICH, offset=1.0),
    "gemma3_text": Family(_SANDWICH, offset=1.0),
    "phi": Family((_PHI,), final="final_layernorm"),
    "phi3": Family(_serial(("self_attn.qkv_proj",), ("mlp.gate_up_proj",), _NORMS, (None, None))),
}
"""By the model_type of config.json."""


@dataclass(frozen=True)
class Heads:
    """The block's attention: `query` heads share `key_value` heads, each `size` wide."""

    query: int
    key_value: int
    size: int


def heads_of(config: Any) -> Heads:
    """The heads of a transformers config, with the defaults that transformers has."""
    query = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or query
    return Heads(query, shared, getattr(config, "head_dim", None) or config.hidden_size // query)


def family_of(model_type: object) -> Family:
    """Raises ModelError for an architecture whose folds are not known: a wrong fold would change the model silently."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"a model of type {model_type!r}", ", ".join(FAMILIES), "Add its folds to quantize/blocks.py and its test"
        )
    return FAMILIES[model_type]


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name in a block."""
    found = block.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise ModelError(f"{name} is a {type(found).__name__}", "nn.Linear", "This family is not supported")
    return found


@contextmanager
def core_of(block: nn.Module, half: Half) -> Iterator[nn.Module]:
    """The core of a half: its module, which gives the last layer's input instead of its output."""
    core = block.get_submodule(half.core)
    tail = core.get_submodule(half.tail)
    setattr(core, half.tail, nn.Identity())
    try:
        yield core
    finally:
        setattr(core, half.tail, tail)


def tie(values: Tensor, site: Site, heads: Heads) -> Tensor:
    """Average `values` [in] over the channels that must share one factor, keeping the shape.

    Only attention's output has such channels: with grouped-query attention the query heads h of one group all read the
    same row of v_proj, so channel (h, d) of the input can only be scaled together with (h', d) of its group.
    """
    if site.rows != "v" or heads.query == heads.key_value:
        return values
    grouped = values.view(heads.key_value, heads.query // heads.key_value, heads.size)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def by_row(scale: Tensor, site: Site, heads: Heads) -> Tensor:
    """`scale` [in] of a site as the factors of the last rows of the linear layer before it, [rows]."""
    return scale.view(heads.key_value, -1, heads.size)[:, 0].reshape(-1) if site.rows == "v" else scale


@torch.no_grad()
def apply_fold(
    block: nn.Module, site: Site, scale: Tensor, heads: Heads, offset: float = 0.0, stored: torch.dtype = torch.float32
) -> Tensor:
    """Divide by `scale` [in] before and multiply by it after, in place; returns the scale really applied, [in].

    A folded norm is stored in the type `stored`, so its rounding would leave each channel off by up to 2^-9 in
    bfloat16. The norm is rounded first and the factor taken from what it became; the linear layers, which get their own
    rounding anyway, absorb the difference, and the fold is exact (but for a LayerNorm's bias, rounded on its own).
    """
    if site.before is None:
        raise ValueError(f"nothing before {site.linears} takes a factor")
    before = block.get_submodule(site.before)
    if isinstance(before, nn.Linear):
        rows = by_row(scale, site, heads)
        before.weight[-len(rows) :].div_(rows[:, None])  # of a fused layer they are the last ones
        if before.bias is not None:
            before.bias[-len(rows) :].div_(rows)
    else:
        scale = _fold_norm(before, scale, offset, stored)
    for name in site.linears:
        linear(block, name).weight.mul_(scale)
    return scale


def _fold_norm(before: nn.Module, scale: Tensor, offset: float, stored: torch.dtype) -> Tensor:
    weight = before.get_parameter("weight")
    norm = weight + offset
    folded = (norm / scale - offset).to(stored).to(norm.dtype)
    became = folded + offset
    # A dead channel, one the type cannot hold, and one that Gemma's offset rounds to nothing, are left alone.
    kept = (became == 0) | ~torch.isfinite(became) | (norm == 0)
    scale = torch.where(kept, torch.ones_like(scale), norm / became)
    weight.copy_(torch.where(kept, weight, folded))
    bias = getattr(before, "bias", None)
    if bias is not None:
        bias.div_(scale)
    return scale
