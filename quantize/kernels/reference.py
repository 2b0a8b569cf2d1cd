"""What the kernels compute, slowly and in numpy: the oracle that the tests hold them against.

Written from the layouts' definitions (stored.cuh, tiles.cuh) and from nothing else: fields come from a stream's bits
one by one, tiles from the drawing, and weights in float64 with one rounding. Numbers of 16 bits are given as their bits
(uint16) with the name of their type, because numpy has no bfloat16.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that lies in nibble 0 (lowest), 1, 2, ... of an AWQ word."""

TYPES = {"float16": (11, -14), "bfloat16": (8, -126)}
"""Bits of a number's mantissa, with the leading one; exponent of the smallest normal number."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer as a checkpoint stores it.

    qweight: int32, AWQ [k, n bits/32], GPTQ [k bits/32, n]; qzeros: int32 [groups, n bits/32], None where z is
    2^(bits-1) throughout; scales: uint16 [groups, n], the bits of `dtype`; g_idx: int32 [k] or None; layout: "awq",
    "gptq", "gptq_v2"; dtype: a key of `TYPES`.
    """

    qweight: Array
    qzeros: Array | None
    scales: Array
    g_idx: Array | None
    layout: str
    bits: int
    dtype: str

    @property
    def n(self) -> int:
        return int(self.scales.shape[1])

    @property
    def k(self) -> int:
        rows = int(self.qweight.shape[0])
        return rows if self.layout == "awq" else rows * 32 // self.bits

    @property
    def groups(self) -> int:
        return int(self.scales.shape[0])

    @property
    def group_size(self) -> int:
        return self.k // self.groups


@dataclass(frozen=True, slots=True)
class Tiles:
    """As tiles.cuh has them. tiles: uint8 [Np/16, Kp/64, bits/4, 32, 16]; scales: uint16 and zeros: int16
    [Np/16, groups, 16]."""

    tiles: Array
    scales: Array
    zeros: Array
    n: int
    k: int
    bits: int
    dtype: str

    @property
    def groups(self) -> int:
        return int(self.scales.shape[1])


def fields(words: Array, bits: int) -> Array:
    """int32 [rows, words] -> int64 [rows, 32 words / bits]: field i of a row is its bits i b .. i b + b - 1."""
    stream = np.unpackbits(np.ascontiguousarray(words, dtype="<i4").view(np.uint8), axis=1, bitorder="little")
    values: Array = stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))
    return values


def integers(layer: Layer) -> tuple[Array, Array]:
    """q: int64 [n, k], inputs as the model has them; z: int64 [n, groups]."""
    if layer.layout == "awq":
        q = _awq_rows(layer.qweight).T
    else:
        q = fields(layer.qweight.T, layer.bits)
    if layer.qzeros is None:
        return q, np.full((layer.n, layer.groups), 1 << (layer.bits - 1), dtype=np.int64)
    z = _awq_rows(layer.qzeros) if layer.layout == "awq" else fields(layer.qzeros, layer.bits)
    return q, z.T + (layer.layout == "gptq")  # v1 stores z - 1 in each field


def group_of(layer: Layer) -> Array:
    """The group of each input: int64 [k]."""
    if layer.g_idx is not None:
        return layer.g_idx.astype(np.int64)
    return np.arange(layer.k, dtype=np.int64) // layer.group_size


def dequantize(layer: Layer) -> Array:
    """The weights [n, k] as bits of `dtype`; NaN where g_idx names a group that is not there."""
    q, z = integers(layer)
    groups = group_of(layer)
    there = (groups >= 0) & (groups < layer.groups)
    groups = np.where(there, groups, 0)
    scales = value(layer.scales, layer.dtype).T[:, groups]
    return nearest(np.where(there, (q - z[:, groups]) * scales, np.nan), layer.dtype)


def act_order(g_idx: Array) -> Array:
    """int32 [k]: the input that lies at each position, so that groups are neighbours again."""
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def prepare(layer: Layer, perm: Array | None = None) -> Tiles:
    """The tiles of a layer of 4 or 8 bits, whose `perm`, where there is one, is `act_order` of its g_idx."""
    n, k, bits = layer.n, layer.k, layer.bits
    q, z = integers(layer)
    rows, columns = -(-n // 16) * 16, -(-k // 64) * 64
    padded = np.zeros((rows, columns), dtype=np.int64)
    padded[:n] = np.minimum(z[:, -1:], (1 << bits) - 1)  # inputs beyond k weigh nothing
    padded[:n, :k] = q if perm is None else q[:, perm]
    tiles = np.zeros((rows // 16, columns // 64, bits // 4, 32, 4), dtype=np.uint32)
    for row in range(16):
        for column in range(64):
            vector, lane, word, shift = place(row, column, bits)
            tiles[:, :, vector, lane, word] |= (padded[row::16, column::64] << shift).astype(np.uint32)
    return Tiles(
        tiles.astype("<u4").view(np.uint8),
        _by_rows(layer.scales, rows),
        _by_rows(z.T.astype(np.int16), rows),
        n,
        k,
        bits,
        layer.dtype,
    )


def place(row: int, column: int, bits: int) -> tuple[int, int, int, int]:
    """Vector, lane, word and shift of the integer at `row` (0..15) and `column` (0..63) of a chunk, by the drawing."""
    lane = row % 8 * 4 + column // 16
    fragment, within = divmod(column % 16, 4)
    register = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}[row // 8, within // 2]
    second = within % 2
    if bits == 4:
        return 0, lane, fragment, 4 * register + 16 * second
    vector, place_in_vector = divmod(fragment, 2)
    return vector, lane, 2 * place_in_vector + register // 2, 8 * (register % 2) + 16 * second


def expand(tiles: Tiles, perm: Array | None = None) -> Array:
    """The weights [n, k] as bits of `dtype`, in the model's order where `perm` is given, else in the prepared order."""
    rows, columns = tiles.tiles.shape[0] * 16, tiles.tiles.shape[1] * 64
    words = tiles.tiles.view("<u4").astype(np.int64)
    q = np.zeros((rows, columns), dtype=np.int64)
    for row in range(16):
        for column in range(64):
            vector, lane, word, shift = place(row, column, tiles.bits)
            q[row::16, column::64] = words[:, :, vector, lane, word] >> shift & ((1 << tiles.bits) - 1)
    groups = np.arange(tiles.k) // (tiles.k // tiles.groups)
    z = tiles.zeros.transpose(0, 2, 1).reshape(rows, -1)[: tiles.n, groups].astype(np.int64)
    scales = value(tiles.scales, tiles.dtype).transpose(0, 2, 1).reshape(rows, -1)[: tiles.n, groups]
    weights = nearest((q[: tiles.n, : tiles.k] - z) * scales, tiles.dtype)
    if perm is None:
        return weights
    out = np.full_like(weights, 0xFFFF)  # NaN, where no position names an input
    there = (perm >= 0) & (perm < tiles.k)
    out[:, perm[there]] = weights[:, there]
    return out


def product(x: Array, weights: Array, dtype: str) -> Array:
    """x [tokens, k] times weights [n, k], both as bits of `dtype` -> float64 [tokens, n], not rounded to 16 bits."""
    result: Array = value(x, dtype) @ value(weights, dtype).T
    return result


def value(bits: Array, dtype: str) -> Array:
    """uint16 -> the float64 that these bits of `dtype` stand for."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def nearest(values: Array, dtype: str) -> Array:
    """float64 -> uint16, the bits of the nearest number of `dtype`; ties to even, beyond the largest infinity."""
    precision, least = TYPES[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        exponent = np.maximum(np.frexp(values)[1] - 1, least)  # |values| = m 2^exponent with 1 <= m < 2, or m < 1
        step = np.ldexp(1.0, exponent - precision + 1)
        rounded = np.rint(values / step) * step
        if dtype == "float16":
            bits: Array = rounded.astype(np.float16).view(np.uint16)
        else:
            bits = (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits


def _awq_rows(words: Array) -> Array:
    """int32 [rows, n/8] -> int64 [rows, n]."""
    nibbles = fields(words, 4).reshape(len(words), -1, 8)
    values = np.empty_like(nibbles)
    values[..., list(AWQ_ORDER)] = nibbles
    return values.reshape(len(words), -1)


def _by_rows(values: Array, rows: int) -> Array:
    """[groups, n] -> [rows/16, groups, 16], zero beyond n."""
    groups, n = values.shape
    padded = np.zeros((groups, rows), dtype=values.dtype)
    padded[:, :n] = values
    return np.ascontiguousarray(padded.reshape(groups, -1, 16).transpose(1, 0, 2))
