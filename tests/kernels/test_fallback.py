"""The torch functions against reference.py (numpy, written from the layouts alone) and against the CUDA sources, which
g++ built for the CPU: bit for bit where the arithmetic is defined so. Products are held against float64, with a bound.
"""

import ctypes
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize import packing, scheme
from quantize.kernels import fallback, library, native, operators, reference
from quantize.kernels.tensors import Stored, Tiles
from tests.kernels.layers import LAYOUTS, random_layer
from tests.kernels.torch_layers import TYPES, as_reference, numbers, same, stored_of

SIZES = [
    (16, 64, 32),  # one chunk
    (8, 8, -1),  # less than a chunk
    (24, 72, -1),  # n past a multiple of 16, k past a multiple of 64
    (40, 96, 32),
    (136, 192, 64),
    (32, 256, 128),
]
NONE = torch.empty(0, dtype=torch.int32)


def layers() -> Iterator[reference.Layer]:
    for (n, k, size), layout, dtype in product(SIZES, LAYOUTS, TYPES):
        for bits, zeros in product((4,) if layout == "awq" else (4, 8), (True, False)):
            yield random_layer(n, k, size, layout=layout, bits=bits, dtype=dtype, zeros=zeros)


def scattered() -> Iterator[reference.Layer]:
    for (n, k, size), bits, dtype in product([(24, 96, 32), (40, 192, 64), (16, 256, 128)], (4, 8), TYPES):
        yield random_layer(n, k, size, layout="gptq", bits=bits, dtype=dtype, act_order=True)


def name(layer: reference.Layer) -> str:
    zeros = "" if layer.qzeros is not None else "-symmetric"
    return f"{layer.layout}-{layer.bits}-{layer.n}x{layer.k}-{layer.group_size}-{layer.dtype}{zeros}"


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    return library.host()


@pytest.mark.parametrize("layer", [*layers(), *scattered()], ids=name)
def test_tiles_and_weights_are_the_reference_s_and_the_kernels(layer: reference.Layer, host: ctypes.CDLL) -> None:
    stored = stored_of(layer)
    perm = NONE if layer.g_idx is None else torch.from_numpy(reference.act_order(layer.g_idx))
    made, theirs = fallback.prepare(stored, perm), native.prepare(host, stored, perm, 0)
    for ours, native_s in zip(made, theirs, strict=True):
        assert torch.equal(ours.view(torch.uint8), native_s.view(torch.uint8))
    tiles = Tiles(*made, perm, stored.bits, stored.group_size, stored.n, stored.k)
    wanted = reference.prepare(layer, None if layer.g_idx is None else perm.numpy())
    assert np.array_equal(tiles.tiles.numpy(), wanted.tiles)
    assert np.array_equal(as_reference(tiles, layer.dtype).scales, wanted.scales)
    assert np.array_equal(tiles.zeros.numpy(), wanted.zeros)

    weights = numbers(reference.dequantize(layer), layer.dtype)
    assert same(fallback.expand(tiles), weights)
    assert same(native.expand(host, tiles, 0), weights)
    assert same(fallback.dequantize(stored), weights)
    assert same(native.dequantize(host, stored, 0), weights)


@pytest.mark.parametrize(("bits", "layout"), [(2, "gptq"), (3, "gptq"), (2, "gptq_v2"), (3, "gptq_v2")])
@pytest.mark.parametrize("dtype", TYPES)
def test_two_and_three_bits_are_dequantized(bits: int, layout: str, dtype: str, host: ctypes.CDLL) -> None:
    layer = random_layer(64, 96, 32, layout=layout, bits=bits, dtype=dtype, act_order=True)
    weights = numbers(reference.dequantize(layer), dtype)
    assert same(fallback.dequantize(stored_of(layer)), weights)
    assert same(native.dequantize(host, stored_of(layer), 0), weights)


def test_a_group_that_is_not_there_is_nan_and_nothing_else_is(host: ctypes.CDLL) -> None:
    layer = random_layer(32, 64, 32, layout="gptq", act_order=True)
    assert layer.g_idx is not None
    layer.g_idx[[3, 40]] = -1, 2  # of groups 0 and 1
    weights = fallback.dequantize(stored_of(layer))
    assert torch.isnan(weights).any(dim=0).nonzero().flatten().tolist() == [3, 40]
    assert same(weights, numbers(reference.dequantize(layer), layer.dtype))
    assert same(weights, native.dequantize(host, stored_of(layer), 0))


def test_our_own_checkpoints_mean_the_same_weights_here() -> None:
    """packing.py and scheme.py wrote them; their dequantization is exact, here it is rounded once."""
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    asymmetric, symmetric = scheme.Scheme(4, 32), scheme.Scheme(4, 32, symmetric=True)
    awq = scheme.quantize(weight, asymmetric)
    stored = Stored(*packing.pack_awq(awq), None, "awq", 4, 32)
    assert torch.equal(fallback.dequantize(stored), scheme.dequantize(awq).half())
    gptq = scheme.quantize(weight, symmetric)
    parts = packing.pack_gptq(gptq, 4)
    assert torch.equal(fallback.dequantize(Stored(*parts, "gptq", 4, 32)), scheme.dequantize(gptq).half())


# --- products ---------------------------------------------------------------------------------------------------------


def usual(layer: reference.Layer) -> Stored:
    """`layer` with scales of a model's size, for products that stay in range."""
    stored = stored_of(layer)
    generator = torch.Generator().manual_seed(layer.n)
    scales = torch.rand(stored.scales.shape, generator=generator) * 0.02 - 0.01
    return stored._replace(scales=scales.to(stored.scales.dtype))


def exact(stored: Stored) -> Tensor:
    """(q - z) s as float64, without rounding."""
    q, zeros = fallback.integers(stored)
    groups = fallback._group_of(stored)
    return (q.double() - zeros.T[:, groups].double()) * stored.scales.T[:, groups].double()


@pytest.mark.parametrize("layer", [*list(layers())[::3], *scattered()], ids=name)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_products_are_within_their_rounding_of_float64(layer: reference.Layer, tokens: int, host: ctypes.CDLL) -> None:
    """The sum of K products in float32, in any order, is off by K 2^-24 sum |w x| at most, and the result is rounded
    once, by half of 2^-7 (bfloat16) or 2^-10 (float16) of itself at most. gemm's weights are rounded before."""
    stored = usual(layer)
    tiles = operators.tiles_of(stored)
    x = torch.randn(tokens, stored.k, generator=torch.Generator().manual_seed(7)).to(stored.scales.dtype)
    half = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11
    for weights, results in (
        (exact(stored), (fallback.gemv(x, tiles), native.gemv(host, x, tiles, 0))),
        (fallback.dequantize(stored).double(), (fallback.gemm(x, tiles), native.gemm(host, x, tiles, 0))),
    ):
        wanted = x.double() @ weights.T
        summed = stored.k * 2.0**-23 * (x.double().abs() @ weights.abs().T)
        for result in results:
            # 2^-25: half the smallest float16, where results are that small
            assert ((result.double() - wanted).abs() <= summed + half * (wanted.abs() + summed) + 2.0**-25).all()


def test_the_dispatched_product_is_torch_s_with_the_expanded_weights() -> None:
    stored = usual(random_layer(32, 64, 32, layout="gptq", dtype="bfloat16", act_order=True))
    tiles = operators.tiles_of(stored)
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(fallback.matmul(x, tiles), torch.nn.functional.linear(x, fallback.dequantize(stored)))


def test_shapes_of_x_are_kept_and_no_token_is_no_token(host: ctypes.CDLL) -> None:
    tiles = operators.tiles_of(usual(random_layer(24, 72, layout="gptq", dtype="bfloat16")))
    x = torch.randn(2, 3, 72, generator=torch.Generator().manual_seed(5)).bfloat16()
    flat = fallback.gemv(x.reshape(6, 72), tiles)
    assert torch.equal(fallback.gemv(x, tiles), flat.view(2, 3, 24))
    assert native.gemv(host, x, tiles, 0).shape == (2, 3, 24)
    assert native.gemv(host, x[:0], tiles, 0).shape == fallback.gemm(x[:0], tiles).shape == (0, 3, 24)


def test_views_that_a_kernel_could_not_read_are_copied(host: ctypes.CDLL) -> None:
    """x that begins 2 bytes after a multiple of 16, and x with gaps: a kernel reads 16 bytes at a time."""
    tiles = operators.tiles_of(usual(random_layer(16, 64, layout="gptq", dtype="bfloat16")))
    wide = torch.randn(65 * 4, generator=torch.Generator().manual_seed(5)).bfloat16()
    shifted = wide[1 : 1 + 128].view(2, 64)
    assert shifted.data_ptr() % 16 == 2
    gaps = wide.view(4, 65)[:, :64]
    for x in (shifted, gaps):
        assert torch.equal(native.gemv(host, x, tiles, 0), native.gemv(host, x.clone(), tiles, 0))


def test_a_layer_of_transposed_views_is_prepared_all_the_same(host: ctypes.CDLL) -> None:
    stored = stored_of(random_layer(16, 64, 32, layout="gptq"))
    views = stored._replace(qweight=stored.qweight.T.contiguous().T, scales=stored.scales.T.contiguous().T)
    assert not views.qweight.is_contiguous()
    for ours, plain in zip(native.prepare(host, views, NONE, 0), fallback.prepare(stored, NONE), strict=True):
        assert torch.equal(ours, plain)
