"""The layers of layers.py as torch tensors."""

import numpy as np
import torch
from torch import Tensor

from quantize.kernels import reference
from quantize.kernels.tensors import Stored, Tiles

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_of(layer: reference.Layer) -> Stored:
    """The very bits of `layer`."""
    parts = [None if part is None else torch.from_numpy(part.copy()) for part in (layer.qweight, layer.qzeros)]
    g_idx = None if layer.g_idx is None else torch.from_numpy(layer.g_idx.copy())
    scales = numbers(layer.scales, layer.dtype)
    assert parts[0] is not None
    return Stored(parts[0], parts[1], scales, g_idx, layer.layout, layer.bits, layer.group_size)


def numbers(bits: reference.Array, dtype: str) -> Tensor:
    """uint16 -> a tensor of `dtype` with these bits."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16).copy()).view(TYPES[dtype])


def bits_of(tensor: Tensor) -> reference.Array:
    """The bits of a 16-bit tensor: uint16."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit the same, any NaN being like any other."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    nan = torch.isnan(left) & torch.isnan(right)
    return bool(((left.contiguous().view(torch.int16) == right.contiguous().view(torch.int16)) | nan).all())


def as_reference(tiles: Tiles, dtype: str) -> reference.Tiles:
    return reference.Tiles(
        tiles.tiles.numpy(), bits_of(tiles.scales), tiles.zeros.numpy(), tiles.n, tiles.k, tiles.bits, dtype
    )
