"""The kernels through their C ABI (kneebench.h): fallback.py's functions, on the memory that the library takes.

`library` is library.load()'s, with tensors on a GPU and its stream, or library.host()'s, with tensors on the CPU and
stream 0. Results and workspace are torch's own tensors, so nothing here allocates behind its back or waits. The
functions take what tensors.py has checked; the library checks again, and its message becomes a RunError.
"""

import ctypes

import torch
from torch import Tensor

from quantize.errors import RunError
from quantize.kernels.library import StoredLayer, TiledLayer
from quantize.kernels.tensors import DTYPES, LAYOUTS, Stored, Tiles, shape_of_tiles, width

_GEMV, _GEMM = 0, 1
"""kneebench.h's KB_GEMV, KB_GEMM."""

_ALIGNMENT = 16
"""Bytes: what a thread reads at once."""


def prepare(library: ctypes.CDLL, stored: Stored, perm: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """tiles, scales and zeros of `stored`, its inputs in the order of `perm`, which may be empty."""
    packed, grouped = shape_of_tiles(stored.bits, stored.group_size, stored.n, stored.k)
    tiles = stored.qweight.new_empty(packed, dtype=torch.uint8)
    scales = stored.scales.new_empty(grouped)
    zeros = stored.scales.new_empty(grouped, dtype=torch.int16)
    made = Tiles(tiles, scales, zeros, perm, stored.bits, stored.group_size, stored.n, stored.k)
    stored = _compact(stored)
    _check(library, library.kb_prepare(_stored(stored), _address(perm), _tiles(made), stream))
    return tiles, scales, zeros


def dequantize(library: ctypes.CDLL, stored: Stored, stream: int) -> Tensor:
    """The weights [N, K]; NaN where g_idx names a group that is not there."""
    stored = _compact(stored)
    out = stored.scales.new_empty(stored.n, stored.k)
    _check(library, library.kb_dequantize(_stored(stored), out.data_ptr(), stream))
    return out


def expand(library: ctypes.CDLL, tiles: Tiles, stream: int) -> Tensor:
    """The weights [N, K], inputs as the model has them."""
    out = tiles.scales.new_empty(tiles.n, tiles.k)
    _check(library, library.kb_expand(_tiles(tiles), _address(tiles.perm), out.data_ptr(), stream))
    return out


def gemv(library: ctypes.CDLL, x: Tensor, tiles: Tiles, stream: int) -> Tensor:
    """x [..., K] of 1 to 8 tokens -> [..., N]."""
    return _product(library, library.kb_gemv, _GEMV, x, tiles, stream)


def gemm(library: ctypes.CDLL, x: Tensor, tiles: Tiles, stream: int) -> Tensor:
    """x [..., K] of 1 to 64 tokens -> [..., N]."""
    return _product(library, library.kb_gemm, _GEMM, x, tiles, stream)


def _product(
    library: ctypes.CDLL, kernel: "ctypes._NamedFuncPointer", number: int, x: Tensor, tiles: Tiles, stream: int
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], tiles.n)
    tokens = x.numel() // tiles.k
    if not tokens:
        return out
    x = x.index_select(-1, tiles.perm) if tiles.perm.numel() else _whole(x)
    layer = _tiles(tiles)
    size = library.kb_workspace(layer, tokens, number)
    if size < 0:
        _check(library, -size)
    workspace = x.new_empty(size, dtype=torch.uint8)
    _check(library, kernel(layer, x.data_ptr(), out.data_ptr(), tokens, _address(workspace), size, stream))
    return out


def _compact(stored: Stored) -> Stored:
    """`stored` as the kernels read it: see `_whole`."""
    return stored._replace(
        qweight=_whole(stored.qweight),
        qzeros=None if stored.qzeros is None else _whole(stored.qzeros),
        scales=_whole(stored.scales),
        g_idx=None if stored.g_idx is None else _whole(stored.g_idx),
    )


def _whole(tensor: Tensor) -> Tensor:
    """`tensor` without gaps, from a multiple of 16 bytes on: a view into another may be neither."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _stored(stored: Stored) -> StoredLayer:
    return StoredLayer(
        *(None if part is None else part.data_ptr() for part in stored[:4]),
        stored.n, stored.k, stored.groups, width(stored.group_size, stored.k), stored.bits,
        LAYOUTS.index(stored.layout), DTYPES.index(stored.scales.dtype),
    )  # fmt: skip


def _tiles(tiles: Tiles) -> TiledLayer:
    return TiledLayer(
        *(part.data_ptr() for part in tiles[:3]),
        tiles.n, tiles.k, tiles.groups, width(tiles.group_size, tiles.k), tiles.bits,
        DTYPES.index(tiles.scales.dtype),
    )  # fmt: skip


def _address(tensor: Tensor) -> int | None:
    return tensor.data_ptr() if tensor.numel() else None


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        said = library.kb_message(code).decode(errors="replace")
        raise RunError(
            f"a kernel refused: {said}", "what kneebench.h says of its arguments", "This is a bug: report it"
        )
