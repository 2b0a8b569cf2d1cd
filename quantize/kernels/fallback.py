"""The kernels in plain torch: the same functions, the same roundings, for machines without a GPU.

Every weight is round16((q - z) s), rounded once: q - z has at most 9 bits and a scale at most 11, so that their product
is exact in float32. `gemv` never makes a weight: it adds up (q - z) x of a group in float32 and multiplies by s once.
The functions take what tensors.py has checked.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense
from torch.nn.functional import pad

from quantize.kernels.tensors import COLUMNS, ROWS, Stored, Tiles, shape_of_tiles, up, width
from quantize.packing import unpack

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that lies in nibble 0 (lowest), 1, 2, ... of AWQ's words."""


def integers(stored: Stored) -> tuple[Tensor, Tensor]:
    """q: uint8 [N, K], inputs as the model has them; z: int16 [G, N]."""
    n, k, bits = stored.n, stored.k, stored.bits
    if stored.layout == "awq":
        q = _awq(stored.qweight).T.contiguous()
    else:
        q = unpack(stored.qweight.T, bits, k)
    if stored.qzeros is None:
        return q, torch.full((stored.groups, n), 1 << (bits - 1), dtype=torch.int16, device=q.device)
    zeros = _awq(stored.qzeros) if stored.layout == "awq" else unpack(stored.qzeros, bits, n)
    return q, zeros.to(torch.int16) + (1 if stored.layout == "gptq" else 0)  # v1 stores z - 1, so that z may be 2^bits


def dequantize(stored: Stored) -> Tensor:
    """The weights [N, K]; NaN where g_idx names a group that is not there."""
    q, zeros = integers(stored)
    groups = _group_of(stored)
    there = (groups >= 0) & (groups < stored.groups)
    groups = groups.clamp(0, stored.groups - 1)
    weights = _rounded(q, zeros.T[:, groups], stored.scales.T[:, groups])
    return weights.masked_fill_(~there, torch.nan)


def prepare(stored: Stored, perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tiles, scales and zeros of `stored`, its inputs in the order of `perm`, which may be empty."""
    q, zeros = integers(stored)
    if perm.numel():
        q = q[:, perm]
    n, k, bits = stored.n, stored.k, stored.bits
    more = (0, up(n, ROWS) - n)
    scales = pad(stored.scales, more)
    zeros = pad(zeros, more)
    q = _padded(q, zeros, bits)
    packed, grouped = shape_of_tiles(bits, stored.group_size, n, k)
    parts = [x.view(stored.groups, -1, ROWS).transpose(0, 1).contiguous() for x in (scales, zeros)]
    return _tiled(q, bits).view(packed), parts[0].view(grouped), parts[1].view(grouped)


def expand(tiles: Tiles) -> Tensor:
    """The weights [N, K], inputs as the model has them."""
    q, zeros, scales = _flat(tiles)
    grouped = q.view(tiles.n, tiles.groups, -1)
    weights = _rounded(grouped, zeros[..., None], scales[..., None]).view(tiles.n, tiles.k)
    if not tiles.perm.numel():
        return weights
    out = torch.empty_like(weights)
    out[:, tiles.perm] = weights
    return out


def gemv(x: Tensor, tiles: Tiles) -> Tensor:
    """x [..., K] -> [..., N]: sum over groups of s sum over inputs of (q - z) x, in float32, rounded once."""
    q, zeros, scales = _flat(tiles)
    groups = tiles.groups
    values = q.view(tiles.n, groups, -1).float().sub_(zeros[..., None].float())
    inputs = _prepared(x, tiles).reshape(-1, groups, tiles.k // groups).float()
    sums = torch.einsum("tgi,ngi->tng", inputs, values)
    return (sums * scales.float()).sum(dim=-1).to(x.dtype).view(*x.shape[:-1], tiles.n)


def gemm(x: Tensor, tiles: Tiles) -> Tensor:
    """x [..., K] -> [..., N] by the weights of `expand`, in float32, rounded once."""
    return dense(x.float(), expand(tiles).float()).to(x.dtype)


def matmul(x: Tensor, tiles: Tiles) -> Tensor:
    """x [..., K] -> [..., N] by the weights of `expand` and torch's own product in 16 bit."""
    return dense(x, expand(tiles))


def _prepared(x: Tensor, tiles: Tiles) -> Tensor:
    return x.index_select(-1, tiles.perm) if tiles.perm.numel() else x


def _rounded(q: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """round16((q - z) s) in the type of the scales."""
    return q.float().sub_(zeros.float()).mul_(scales.float()).to(scales.dtype)


def _awq(words: Tensor) -> Tensor:
    """int32 [rows, N/8] -> uint8 [rows, N]."""
    rows, columns = words.shape
    nibbles = unpack(words, 4, 8 * columns).view(rows, columns, 8)
    values = torch.empty_like(nibbles)
    values[..., list(_AWQ_ORDER)] = nibbles
    return values.view(rows, -1)


def _group_of(stored: Stored) -> Tensor:
    """The group of each input: int64 [K]."""
    if stored.g_idx is not None:
        return stored.g_idx.long()
    return torch.arange(stored.k, device=stored.qweight.device) // width(stored.group_size, stored.k)


def _padded(q: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """q [N, K] -> [Np, Kp] with q = z, the weight that is zero, in what was added; zeros: [G, Np]."""
    n, k = q.shape
    last = zeros[-1].clamp(max=(1 << bits) - 1).to(torch.uint8)
    out = last[:, None].repeat(1, up(k, COLUMNS))
    out[:n, :k] = q
    return out


# Row 8 h + g and input 16 c + 4 t + 2 p + e of a chunk lie in lane 4 g + c (tiles.cuh):
#   4 bits   word t            nibble h + 2 p + 4 e, so byte 4 t + 2 e + p has row g low and row g + 8 high
#   8 bits   vector v = t / 2  byte 4 (2 (t % 2) + p) + 2 e + h


def _tiled(q: Tensor, bits: int) -> Tensor:
    """uint8 [Np, Kp] -> the tiles, uint8, in order."""
    rows, columns = q.shape[0] // ROWS, q.shape[1] // COLUMNS
    if bits == 4:
        parts = q.view(rows, 2, 8, columns, 4, 4, 2, 2)  # rows h g columns c t p e
        return (parts[:, 0] | parts[:, 1] << 4).permute(0, 2, 1, 3, 4, 6, 5).contiguous()  # rows columns g c t e p
    parts = q.view(rows, 2, 8, columns, 4, 2, 2, 2, 2)  # rows h g columns c v t%2 p e
    return parts.permute(0, 3, 5, 2, 4, 6, 7, 8, 1).contiguous()  # rows columns v g c t%2 p e h


def _untiled(tiles: Tensor, bits: int) -> Tensor:
    """The inverse of `_tiled`."""
    rows, columns = tiles.shape[:2]
    if bits == 4:
        bytes = tiles.view(rows, columns, 8, 4, 4, 2, 2).permute(0, 2, 1, 3, 4, 6, 5)  # rows g columns c t p e
        parts = torch.stack((bytes & 15, bytes >> 4), dim=1)
    else:
        parts = tiles.view(rows, columns, 2, 8, 4, 2, 2, 2, 2).permute(0, 8, 3, 1, 4, 2, 5, 6, 7)
    return parts.reshape(rows * ROWS, columns * COLUMNS)


def _flat(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """q: uint8 [N, K] in the prepared order; z and s: [N, G]."""
    q = _untiled(tiles.tiles, tiles.bits)[: tiles.n, : tiles.k]
    zeros, scales = (part.transpose(1, 2).reshape(-1, tiles.groups)[: tiles.n] for part in (tiles.zeros, tiles.scales))
    return q, zeros, scales
