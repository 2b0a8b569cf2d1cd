"""The kernels as torch operators, `torch.ops.kneebench.*`: CUDA where the tensors lie on a GPU, plain torch on the CPU.

    qweight, qzeros, scales, g_idx ─► prepare, once at load ─► tiles, scales, zeros, perm ─► linear, at every step
                                 └──► dequantize                                         └─► gemv, gemm, expand

    layer = tiles_of(Stored(qweight, qzeros, scales, g_idx, layout="gptq", bits=4, group_size=128))
    y = linear(x, *layer)

`Stored` and `Tiles` (tensors.py) say what each argument is. Each operator has a function that knows the shape of the
result alone, so that torch.compile and vLLM trace through it. On a GPU they run on torch's current stream, take their
memory from torch and never wait, so a CUDA graph captures them (except `prepare`, which looks at values). They are for
inference: no gradient flows through them. Only torch is needed here: engines have environments of their own.

Raises InputError (quantize/errors.py) where sizes, types or devices do not fit; RunError where a kernel refuses.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library, register_fake

from quantize.errors import InputError
from quantize.kernels import dispatch, fallback, library, native
from quantize.kernels.tensors import Stored, Tiles, check_product, check_stored, check_tiles, shape_of_tiles

GEMV_TOKENS, GEMM_TOKENS = 8, 64
"""What each takes at most."""

_STORED = "Tensor qweight, Tensor? qzeros, Tensor scales, Tensor? g_idx, str layout, int bits, int group_size"
_TILES = "Tensor tiles, Tensor scales, Tensor zeros, Tensor perm, int bits, int group_size, int n, int k"
_LIBRARY: Any = Library("kneebench", "DEF")  # type: ignore[no-untyped-call]

_R = TypeVar("_R")


def neighbours(g_idx: Tensor, group_size: int) -> bool:
    """Whether g_idx [K] says what no g_idx says: each group_size neighbouring inputs (-1: all) are a group."""
    k = len(g_idx)
    usual = torch.arange(k, dtype=g_idx.dtype, device=g_idx.device) // (k if group_size == -1 else group_size)
    return torch.equal(g_idx, usual)


def tiles_of(stored: Stored) -> Tiles:
    """`prepare`, and what it gives as the products take it; a g_idx that says nothing is left out."""
    if stored.g_idx is not None and neighbours(stored.g_idx, stored.group_size):
        stored = stored._replace(g_idx=None)
    tiles, scales, zeros, perm = prepare(*stored)
    return Tiles(tiles, scales, zeros, perm, stored.bits, stored.group_size, stored.n, stored.k)


# --- at load ----------------------------------------------------------------------------------------------------------


def _prepare_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored, perm = _ordered(Stored(*arguments))
    return *fallback.prepare(stored, perm), perm


def _prepare_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored, perm = _ordered(Stored(*arguments))
    return *_native(native.prepare, perm, stored, perm), perm


def _prepare_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored = Stored(*arguments)
    packed, grouped = shape_of_tiles(stored.bits, stored.group_size, stored.n, stored.k)
    return (
        stored.qweight.new_empty(packed, dtype=torch.uint8),
        stored.scales.new_empty(grouped),
        stored.scales.new_empty(grouped, dtype=torch.int16),
        stored.qweight.new_empty(0 if stored.g_idx is None else stored.k),
    )


def _ordered(stored: Stored) -> tuple[Stored, Tensor]:
    """`stored`, checked, and the order of its inputs in which each group's are neighbours."""
    check_stored(stored, (4, 8))
    if stored.g_idx is None:
        return stored, stored.qweight.new_empty(0)
    perm = torch.argsort(stored.g_idx, stable=True)
    if not neighbours(stored.g_idx[perm], stored.group_size):
        raise InputError(
            "a g_idx whose groups are not all of one size",
            f"{stored.k // stored.groups} inputs in each of {stored.groups} groups",
            "Dequantize the layer instead",
        )
    return stored, perm.to(torch.int32)


def _dequantize_cpu(*arguments: Any) -> Tensor:
    return fallback.dequantize(_readable(Stored(*arguments)))


def _dequantize_cuda(*arguments: Any) -> Tensor:
    stored = _readable(Stored(*arguments))
    return _native(native.dequantize, stored.qweight, stored)


def _dequantize_shape(*arguments: Any) -> Tensor:
    stored = Stored(*arguments)
    return stored.scales.new_empty(stored.n, stored.k)


def _readable(stored: Stored) -> Stored:
    check_stored(stored, (2, 3, 4, 8))
    return stored


# --- at every step ----------------------------------------------------------------------------------------------------


def _expand_cpu(*arguments: Any) -> Tensor:
    return fallback.expand(_whole(Tiles(*arguments)))


def _expand_cuda(*arguments: Any) -> Tensor:
    tiles = _whole(Tiles(*arguments))
    return _native(native.expand, tiles.tiles, tiles)


def _expand_shape(*arguments: Any) -> Tensor:
    tiles = Tiles(*arguments)
    return tiles.scales.new_empty(tiles.n, tiles.k)


def _whole(tiles: Tiles) -> Tiles:
    check_tiles(tiles)
    return tiles


def _gemv_cpu(x: Tensor, *arguments: Any) -> Tensor:
    return fallback.gemv(x, _fitting(x, arguments, GEMV_TOKENS))


def _gemv_cuda(x: Tensor, *arguments: Any) -> Tensor:
    return _native(native.gemv, x, x, _fitting(x, arguments, GEMV_TOKENS))


def _gemm_cpu(x: Tensor, *arguments: Any) -> Tensor:
    return fallback.gemm(x, _fitting(x, arguments, GEMM_TOKENS))


def _gemm_cuda(x: Tensor, *arguments: Any) -> Tensor:
    return _native(native.gemm, x, x, _fitting(x, arguments, GEMM_TOKENS))


def _linear_cpu(x: Tensor, *arguments: Any) -> Tensor:
    return fallback.matmul(x, _fitting(x, arguments))


def _linear_cuda(x: Tensor, *arguments: Any) -> Tensor:
    tiles = _fitting(x, arguments)
    kernel = dispatch.choose(dispatch.limits(x.device), x.numel() // tiles.k)
    if kernel == "gemv":
        return _native(native.gemv, x, x, tiles)
    if kernel == "gemm":
        return _native(native.gemm, x, x, tiles)
    return torch.nn.functional.linear(x, _native(native.expand, x, tiles))


def _product_shape(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], Tiles(*arguments).n)


def _fitting(x: Tensor, arguments: tuple[Any, ...], most: int | None = None) -> Tiles:
    tiles = Tiles(*arguments)
    check_product(x, tiles, most)
    return tiles


# --- what torch is told -----------------------------------------------------------------------------------------------


def _define(schema: str, cpu: Callable[..., Any], cuda: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Register an operator; returns it, to be called."""
    name = _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    register_fake(f"kneebench::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.kneebench, name).default


def _native(function: Callable[..., _R], where: Tensor, *arguments: Any) -> _R:
    """Call a function of native.py on the device where `where` lies, on torch's current stream there."""
    with torch.cuda.device(where.device):
        return function(library.load(), *arguments, torch.cuda.current_stream().cuda_stream)


prepare = _define(
    f"prepare({_STORED}) -> (Tensor tiles, Tensor scales, Tensor zeros, Tensor perm)",
    _prepare_cpu, _prepare_cuda, _prepare_shapes,
)  # fmt: skip
"""A layer of 4 or 8 bits as a checkpoint stores it -> tiles, scales, zeros, perm, of which the products make theirs.

With g_idx, perm is [K]: pass None where groups are `neighbours`, and products need not gather. Raises InputError for a
g_idx that does not give each group group_size inputs.
"""

dequantize = _define(f"dequantize({_STORED}) -> Tensor", _dequantize_cpu, _dequantize_cuda, _dequantize_shape)
"""The weights [N, K] of a layer of 2, 3, 4 or 8 bits as a checkpoint stores it, in the type of its scales.

Any g_idx will do; an input whose group is not there is NaN.
"""

expand = _define(f"expand({_TILES}) -> Tensor", _expand_cpu, _expand_cuda, _expand_shape)
"""The weights [N, K] of a prepared layer, inputs in the model's order: what `dequantize` gives, bit for bit."""

gemv = _define(f"gemv(Tensor x, {_TILES}) -> Tensor", _gemv_cpu, _gemv_cuda, _product_shape)
"""x [..., K] of at most GEMV_TOKENS tokens, inputs in the model's order -> [..., N]. No weight is made in 16 bits."""

gemm = _define(f"gemm(Tensor x, {_TILES}) -> Tensor", _gemm_cpu, _gemm_cuda, _product_shape)
"""x [..., K] of at most GEMM_TOKENS tokens -> [..., N], by the weights of `expand`. A GPU needs capability 8.0."""

linear = _define(f"linear(Tensor x, {_TILES}) -> Tensor", _linear_cpu, _linear_cuda, _product_shape)
"""x [..., K] of any number of tokens -> [..., N]: `gemv`, `gemm`, or `expand` and torch's own product, by the table of
dispatch.py; on a CPU the last."""
