"""The kernels' host library on numpy arrays, and random layers to feed it.

Nothing here imports torch: the tests that use it also run in a process under AddressSanitizer, where torch is slow.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.kernels import reference
from quantize.kernels.library import StoredLayer, TiledLayer, open_library
from quantize.kernels.reference import Array, Layer, Tiles

LAYOUTS = ("awq", "gptq", "gptq_v2")
TYPES = ("float16", "bfloat16")


class Refused(Exception):
    """A kernel returned an error code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def address(array: Array | None) -> int:
    """Of the first element; 0, which is NULL, where there is no array."""
    return 0 if array is None else array.ctypes.data


def stored_struct(layer: Layer, /, **changed: int | None) -> StoredLayer:
    """kneebench.h's kb_stored of a layer; `changed` replaces fields."""
    wanted = {
        "qweight": address(layer.qweight),
        "qzeros": address(layer.qzeros),
        "scales": address(layer.scales),
        "g_idx": address(layer.g_idx),
        "n": layer.n,
        "k": layer.k,
        "groups": layer.groups,
        "group_size": layer.group_size,
        "bits": layer.bits,
        "layout": LAYOUTS.index(layer.layout),
        "dtype": TYPES.index(layer.dtype),
    }
    return StoredLayer(**(wanted | changed))


def tiles_struct(tiles: Tiles, /, **changed: int | None) -> TiledLayer:
    """kneebench.h's kb_tiles; `changed` replaces fields."""
    wanted = {
        "tiles": address(tiles.tiles),
        "scales": address(tiles.scales),
        "zeros": address(tiles.zeros),
        "n": tiles.n,
        "k": tiles.k,
        "groups": tiles.groups,
        "group_size": tiles.k // tiles.groups,
        "bits": tiles.bits,
        "dtype": TYPES.index(tiles.dtype),
    }
    return TiledLayer(**(wanted | changed))


def same(left: Array, right: Array, dtype: str) -> bool:
    """Bit for bit the same numbers of 16 bits, any NaN being like any other."""
    both = np.isnan(reference.value(left, dtype)) & np.isnan(reference.value(right, dtype))
    return left.shape == right.shape and bool(((left == right) | both).all())


def empty_tiles(n: int, k: int, groups: int, bits: int, dtype: str) -> Tiles:
    """Buffers of exactly the size that kneebench.h asks for, filled with a pattern that no result has by chance."""
    rows, columns = -(-n // 16), -(-k // 64)
    return Tiles(
        np.full((rows, columns, bits // 4, 32, 16), 0xA5, dtype=np.uint8),
        np.full((rows, groups, 16), 0x5A5A, dtype=np.uint16),
        np.full((rows, groups, 16), -23131, dtype=np.int16),
        n,
        k,
        bits,
        dtype,
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The C ABI on numpy arrays. Each method raises Refused for an error code."""

    library: ctypes.CDLL

    def call(self, name: str, *arguments: object) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise Refused(code, self.library.kb_message(code).decode())

    def prepare(self, layer: Layer, perm: Array | None = None) -> Tiles:
        out = empty_tiles(layer.n, layer.k, layer.groups, layer.bits, layer.dtype)
        self.call("kb_prepare", stored_struct(layer), address(perm), tiles_struct(out), None)
        return out

    def dequantize(self, layer: Layer) -> Array:
        out = np.full((layer.n, layer.k), 0x5A5A, dtype=np.uint16)
        self.call("kb_dequantize", stored_struct(layer), address(out), None)
        return out

    def expand(self, tiles: Tiles, perm: Array | None = None) -> Array:
        out = np.full((tiles.n, tiles.k), 0x5A5A, dtype=np.uint16)
        self.call("kb_expand", tiles_struct(tiles), address(perm), address(out), None)
        return out


def load(path: Path) -> Kernels:
    """A host library with its functions typed."""
    return Kernels(open_library(path))


def random_layer(
    n: int,
    k: int,
    group_size: int = -1,
    *,
    layout: str = "gptq",
    bits: int = 4,
    dtype: str = "float16",
    zeros: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Layer:
    """Every bit of every word by chance; scales of both signs, from subnormal to large; g_idx a random order."""
    rng = np.random.default_rng([seed, n, k, bits])
    groups = 1 if group_size == -1 else k // group_size
    shape = (k, n // 8) if layout == "awq" else (k * bits // 32, n)

    def words(*size: int) -> Array:
        return rng.integers(-(2**31), 2**31, size, dtype=np.int64).astype(np.int32)

    magnitude = 2.0 ** rng.uniform(-18, 6, (groups, n))
    scales = reference.nearest(magnitude * rng.choice([-1.0, 1.0], (groups, n)), dtype)
    g_idx = None
    if act_order:
        g_idx = rng.permutation(np.arange(k, dtype=np.int32) // np.int32(k // groups))
    return Layer(words(*shape), words(groups, n * bits // 32) if zeros else None, scales, g_idx, layout, bits, dtype)
