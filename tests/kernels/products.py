"""gemv and gemm of the host library on numpy arrays, layers whose products are exact, and bounds where they are not.

exact     scales are powers of two and activations small integers, so that every sum is an integer number of steps
          below 2^24: whatever the order, float32 makes no error, and the result is one rounding of the true value
rough     scales and activations of any value: each addition may round, and `bounds` says how far that goes
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from quantize.kernels import reference
from quantize.kernels.reference import Array, Layer, Tiles
from tests.kernels.layers import Kernels, address, random_layer, tiles_struct

MOST = {"gemv": 8, "gemm": 64}
"""Tokens that each kernel takes."""

SIZES = (
    (16, 64),  # one chunk
    (8, 8),  # less than a chunk, one group of 8
    (24, 160),  # n past a multiple of 16, k past a multiple of 64: 32 inputs in the last chunk
    (40, 72),  # eight inputs in the last chunk
    (136, 192),  # a block of gemm and one row more
    (56, 1344),  # 21 chunks: gemv's warps take several turns, gemm's ring goes round, both with a rest
)


@contextmanager
def machine(kernels: Kernels, order: int = 0, processors: int = 4, architecture: int = 90) -> Iterator[None]:
    """The emulated device: the order of its threads (0 forwards, 1 backwards, else a seed), its processors, its age."""
    kernels.library.kb_simt_set(order, processors, architecture)
    try:
        yield
    finally:
        kernels.library.kb_simt_set(0, 4, 90)


def workspace_bytes(kernels: Kernels, kernel: str, tiles: Tiles, tokens: int) -> int:
    return int(kernels.library.kb_workspace(tiles_struct(tiles), tokens, list(MOST).index(kernel)))


def multiply(kernels: Kernels, kernel: str, tiles: Tiles, x: Array) -> Array:
    """x, bits [tokens, k] in the prepared order -> bits [tokens, n]. All buffers have exactly the size they need."""
    tokens = len(x)
    y = np.full((tokens, tiles.n), 0x5A5A, dtype=np.uint16)
    workspace = np.full(workspace_bytes(kernels, kernel, tiles, tokens), 0xFF, dtype=np.uint8)  # NaN, where unwritten
    layer = tiles_struct(tiles)
    kernels.call(f"kb_{kernel}", layer, address(x), address(y), tokens, address(workspace), workspace.size, None)
    return y


def groups_of(k: int) -> list[int]:
    """The group sizes that a row of k inputs can have."""
    return [size for size in (32, 64, 128) if k % size == 0] + [-1]


def exact_layer(n: int, k: int, group_size: int, bits: int, dtype: str, seed: int = 0, **options: object) -> Layer:
    layer = random_layer(n, k, group_size, bits=bits, dtype=dtype, seed=seed, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng([seed, n, k])
    scales = 2.0 ** rng.integers(-2, 2, layer.scales.shape) * rng.choice([-1.0, 1.0], layer.scales.shape)
    return replace(layer, scales=reference.nearest(scales, dtype))


def exact_x(tokens: int, k: int, dtype: str, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, tokens, k])
    return reference.nearest(rng.integers(-3, 4, (tokens, k)).astype(float), dtype)


def rough_x(tokens: int, k: int, dtype: str, seed: int = 0) -> Array:
    return reference.nearest(np.random.default_rng([seed, tokens, k]).normal(0, 0.05, (tokens, k)), dtype)


def true_weights(tiles: Tiles) -> Array:
    """(q - z) s in float64, not rounded: [n, k]. q - z is what `reference.expand` gives where every scale is one."""
    ones = replace(tiles, scales=reference.nearest(np.ones(tiles.scales.shape), "float16"), dtype="float16")
    steps = reference.value(reference.expand(ones), "float16")
    scales = reference.value(tiles.scales, tiles.dtype).transpose(0, 2, 1).reshape(-1, tiles.groups)[: tiles.n]
    weights: Array = steps * np.repeat(scales, tiles.k // tiles.groups, axis=1)
    return weights


def bounds(x: Array, weights: Array, dtype: str) -> tuple[Array, Array]:
    """The lowest and highest numbers of `dtype` that float32 sums of x times `weights` (float64) may round to.

    Products of 16-bit numbers are exact in float32. A sum of m terms in any order, each addition with a relative error
    of at most u = 2^-23 (tensor cores may truncate), is off by no more than m u / (1 - m u) times the sum of absolute
    values (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). m is k, and 32 more for scales, lanes,
    warps and splits. Rounding to 16 bits keeps order, so it is applied to both ends.
    """
    inputs = reference.value(x, dtype)
    terms = (weights.shape[1] + 32) * 2.0**-23
    middle, slack = inputs @ weights.T, np.abs(inputs) @ np.abs(weights).T * terms / (1 - terms)
    low, high = (reference.value(reference.nearest(end, dtype), dtype) for end in (middle - slack, middle + slack))
    return low, high
