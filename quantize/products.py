"""Float32 matrix products on the CPU through oneDNN.

torch gives them to MKL, which takes its AVX2 kernels on processors that are not Intel's. oneDNN, which torch carries
too, looks at what the processor can do: on an AMD EPYC with AVX-512 245 GFLOP/s a core where MKL has 107, at the same
precision. Where torch has no oneDNN, and for anything but float32 on the CPU, torch's own products are used.

`Faster` puts them under a model's own code: nn.Linear, and attention, whose two products are most of its time.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_AVAILABLE = bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
_QUERIES = 128
"""At a time: of the keys, those after the last of them are left out. Shorter sequences are torch's: a call for each
head would cost more than it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: `x` [..., in], `weight` [out, in], `bias` [out] or None."""
    if not _ours(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return found
    # Contiguous, since oneDNN has fast kernels for few strides, and for the others one that is 100 times slower.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """`linear`, whose gradients are two more products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, len(weight))
        to_x = linear(rows, weight.T).view_as(x) if ctx.needs_input_grad[0] else None
        to_weight = linear(rows.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K' + causal mask) V: `query` [batch, heads, length, size], `key` and `value` the same with as
    many heads, or with fewer that neighbours share. No gradient flows through it."""
    heads, length, size = query.shape[1:]
    shared = heads // key.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    later = torch.full((_QUERIES, _QUERIES), -torch.inf).triu(1)
    for b in range(len(query)):
        for h in range(key.shape[1]):
            keys, values, own = key[b, h] * scale, value[b, h].T, slice(h * shared, (h + 1) * shared)
            for start in range(0, length, _QUERIES):
                end = min(start + _QUERIES, length)
                rows = end - start
                scores = linear(query[b, own, start:end].reshape(-1, size), keys[:end])
                scores.view(shared, rows, end)[:, :, start:].add_(later[:rows, :rows])
                seen = linear(torch.softmax(scores, dim=-1), values[:, :end])
                out[b, own, start:end] = seen.view(shared, rows, size)
    return out


def _ours(*tensors: Tensor) -> bool:
    """Whether oneDNN is there and takes all of them; autocast has its own way with them."""
    if not _AVAILABLE or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 for x in tensors)


class Faster(TorchFunctionMode):
    """While it is entered, torch.nn.functional.linear, which nn.Linear calls too, and causal
    scaled_dot_product_attention are the functions above."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return linear(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    length = query.shape[2]
    plain = is_causal and attn_mask is None and not dropout_p and key.shape[2] == length >= _QUERIES
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if plain and not learning and _ours(query, key, value):
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
