"""What a decoder block is made of: its linear layers, and which operation feeds which.

The families below share one block (grouped-query attention, gated MLP, RMSNorm before each half):

    input_layernorm ─► q_proj k_proj v_proj ─► attention ─► o_proj ─► +
    post_attention_layernorm ─► gate_proj up_proj ─► act(gate) * up ─► down_proj ─► +

A `Fold` is a place where a factor per channel can move through the block without changing what it computes: the
operation before divides channel j by s_j, the linear layers after multiply column j by s_j. RMSNorm multiplies by its
weight, so that divides; v_proj reaches o_proj through a weighted mean over positions, and up_proj reaches down_proj
through a product, so their rows do. AWQ folds its scales this way, and so can SmoothQuant.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Fold:
    """`before` feeds `linears`, which all see the same input."""

    before: str
    linears: tuple[str, ...]


FOLDS = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)


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


def check_family(model_type: object) -> None:
    """Raise ModelError for an architecture whose folds are not known: a wrong fold would change the model silently."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"a model of type {model_type!r}", ", ".join(FAMILIES), "Add its folds to quantize/blocks.py and its test"
        )


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name in a block."""
    found = block.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise ModelError(f"{name} is a {type(found).__name__}", "nn.Linear", "This family is not supported")
    return found


def tie(values: Tensor, fold: Fold, heads: Heads) -> Tensor:
    """Average `values` [in] over the channels that must share one factor, keeping the shape.

    Only o_proj has such channels: with grouped-query attention the query heads h of one group all read the same row of
    v_proj, so channel (h, d) of o_proj's input can only be scaled together with (h', d) of its group.
    """
    if fold.before != "self_attn.v_proj" or heads.query == heads.key_value:
        return values
    grouped = values.view(heads.key_value, heads.query // heads.key_value, heads.size)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale: Tensor, heads: Heads, stored: torch.dtype) -> Tensor:
    """Divide by `scale` [in] before and multiply by it after, in place; returns the scale really applied, [in].

    A folded RMSNorm is stored in the type `stored`, so its rounding would leave each channel off by up to 2^-9 in
    bfloat16. The norm is rounded first and the factor taken from what it became; the linear layers, which get their own
    rounding anyway, absorb the difference, and the fold is exact.
    """
    before = block.get_submodule(fold.before)
    if isinstance(before, nn.Linear):
        rows = scale
        if fold.before == "self_attn.v_proj":
            rows = scale.view(heads.key_value, -1, heads.size)[:, 0].reshape(-1)
        before.weight.div_(rows[:, None])
        if before.bias is not None:
            before.bias.div_(rows)
    else:
        norm = before.get_parameter("weight")
        folded = (norm / scale).to(stored).to(norm.dtype)
        kept = (folded == 0) | ~torch.isfinite(folded)  # a dead channel, or one the type cannot hold: leave it alone
        folded = torch.where(kept, norm, folded)
        scale = torch.where(kept, torch.ones_like(scale), norm / folded)
        norm.copy_(folded)
    for name in fold.linears:
        linear(block, name).weight.mul_(scale)
    return scale
