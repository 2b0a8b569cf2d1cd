"""kb_gemm on the emulated tensor cores: every size, type and token count against float64.

Where a layer is exact (products.py), the result must be the true value rounded once, bit for bit. Elsewhere it must be
what float32 sums of the *rounded* weights can be. What both kernels refuse, and their determinism, is in test_gemv.py.
"""

from itertools import product

import numpy as np
import pytest

from quantize.kernels import reference
from tests.kernels import products
from tests.kernels.layers import TYPES, Kernels, random_layer
from tests.kernels.products import SIZES, exact_layer, exact_x, groups_of, machine, multiply, rough_x, true_weights

KINDS = list(product((4, 8), TYPES))
EDGES = (1, 7, 8, 9, 16, 17, 31, 32, 33, 64)
"""Token counts on both sides of each number of token tiles (1, 2, 4, 8 of 8 tokens)."""


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_every_size_and_group(kernels: Kernels, bits: int, dtype: str) -> None:
    for n, k in SIZES:
        for i, size in enumerate(groups_of(k)):
            tiles = reference.prepare(exact_layer(n, k, size, bits, dtype))
            weights = true_weights(tiles)
            for tokens in EDGES[i::2] if n * k > 20000 else EDGES:
                x = exact_x(tokens, k, dtype)
                wanted = reference.nearest(reference.value(x, dtype) @ weights.T, dtype)
                got = multiply(kernels, "gemm", tiles, x)
                assert (got == wanted).all(), (n, k, size, tokens, np.argwhere(got != wanted)[:5])


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_every_token_count(kernels: Kernels, bits: int, dtype: str) -> None:
    tiles = reference.prepare(exact_layer(24, 136, -1, bits, dtype))
    weights = true_weights(tiles)
    for tokens in range(1, 65):
        x = exact_x(tokens, tiles.k, dtype)
        wanted = reference.nearest(reference.value(x, dtype) @ weights.T, dtype)
        assert (multiply(kernels, "gemm", tiles, x) == wanted).all(), tokens


@pytest.mark.parametrize(("bits", "dtype", "processors"), [(*kind, last) for kind in KINDS for last in (1, 2, 3, 100)])
def test_splits_of_the_inputs_add_up(kernels: Kernels, bits: int, dtype: str, processors: int) -> None:
    """21 chunks: one processor wants two splits of the one block, two want four; five of four or more is the most."""
    tiles = reference.prepare(exact_layer(56, 1344, 64, bits, dtype))
    x = exact_x(12, tiles.k, dtype)
    with machine(kernels, processors=processors):
        splits = min(2 * processors, 5)
        assert products.workspace_bytes(kernels, "gemm", tiles, 12) == splits * 12 * 56 * 4
        got = multiply(kernels, "gemm", tiles, x)
    assert (got == reference.nearest(reference.value(x, dtype) @ true_weights(tiles).T, dtype)).all()


@pytest.mark.parametrize(("bits", "dtype", "size"), [(*kind, last) for kind in KINDS for last in (32, 128, -1)])
def test_rough_values_are_sums_of_the_rounded_weights(kernels: Kernels, bits: int, dtype: str, size: int) -> None:
    tiles = reference.prepare(random_layer(40, 384, size, bits=bits, dtype=dtype))
    x, rounded = rough_x(19, tiles.k, dtype), reference.value(reference.expand(tiles), dtype)
    low, high = products.bounds(x, rounded, dtype)
    got = reference.value(multiply(kernels, "gemm", tiles, x), dtype)
    assert (low <= got).all() and (got <= high).all()


def test_weights_are_rounded_before_they_are_multiplied(kernels: Kernels) -> None:
    """s = 1 + 2^-10, z = 0, q = 15 and 8, x = 1 and -2. In float16, 15 s = 15.0146... is 15.015625 (steps of 2^-7), and
    8 s is exact.

    gemm: 15.015625 - 2 * 8.0078125 = -1. gemv, which multiplies by s last: (15 - 16) s = -1.0009765625.
    """
    layer = exact_layer(16, 64, -1, 4, "float16", layout="gptq_v2")
    layer.qweight[:] = 0x8F  # inputs 0 and 1 of each eight
    layer.scales[:] = 0x3C01
    assert layer.qzeros is not None
    layer.qzeros[:] = 0
    x = np.zeros((1, 64), dtype=np.uint16)
    x[0, :2] = reference.nearest(np.array([1.0, -2.0]), "float16")
    tiles = reference.prepare(layer)
    assert (reference.value(multiply(kernels, "gemm", tiles, x), "float16") == -1.0).all()
    assert (reference.value(multiply(kernels, "gemv", tiles, x), "float16") == -1.0009765625).all()
