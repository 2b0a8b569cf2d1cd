"""What the kernels take: a layer as a checkpoint stores it, and the same layer in the kernels' own order, the tiles.

    Stored   qweight, qzeros, scales, g_idx as in quantize/packing.py: AWQ (gemm), GPTQ, GPTQ v2
    Tiles    what one warp wants next lies next; tiles.cuh says which value lies where

N outputs, K inputs, G groups; Np is N rounded up to 16, Kp is K rounded up to 64. Both are checked here, once for the
CUDA kernels and for the torch ones: whatever passes has the sizes that a kernel computes its addresses from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import InputError

LAYOUTS = ("awq", "gptq", "gptq_v2")
"""As the C ABI numbers them: kneebench.h's KB_AWQ, KB_GPTQ, KB_GPTQ_V2."""

DTYPES = (torch.float16, torch.bfloat16)
"""Likewise KB_FLOAT16, KB_BFLOAT16."""

ROWS, COLUMNS = 16, 64
"""Outputs and inputs of a chunk, the part of a weight that one warp reads at once."""

WORD = 32


class Stored(NamedTuple):
    """A linear layer as a checkpoint has it.

    qweight: int32, AWQ [K, N bits/32], GPTQ [K bits/32, N]; qzeros: int32 [G, N bits/32], None where the zero point is
    the middle, 2^(bits-1); scales: [G, N] in the type of the activations; g_idx: int32 [K], the group of each input,
    None where a group is neighbours; group_size: inputs of a group, -1 for the whole row.
    """

    qweight: Tensor
    qzeros: Tensor | None
    scales: Tensor
    g_idx: Tensor | None
    layout: str
    bits: int
    group_size: int

    @property
    def n(self) -> int:
        return self.qweight.shape[1] * (WORD // self.bits if self.layout == "awq" else 1)

    @property
    def k(self) -> int:
        rows = self.qweight.shape[0]
        return rows if self.layout == "awq" else rows * WORD // self.bits

    @property
    def groups(self) -> int:
        return self.scales.shape[0]


class Tiles(NamedTuple):
    """A linear layer as the kernels read it.

    tiles: uint8 [Np/16, Kp/64, bits/4, 32, 16]; scales: [Np/16, G, 16] in the type of the activations; zeros: int16, as
    scales; perm: int32 [K], the input that lies at each position, or [0] where all lie in their own.
    """

    tiles: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor
    bits: int
    group_size: int
    n: int
    k: int

    @property
    def groups(self) -> int:
        return self.k // width(self.group_size, self.k)

    @property
    def bytes(self) -> int:
        """What a product has to read of it."""
        return sum(part.numel() * part.element_size() for part in self[:4])


def width(group_size: int, k: int) -> int:
    """Inputs of a group."""
    return k if group_size == -1 else group_size


def up(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def shape_of_tiles(bits: int, group_size: int, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Tiles.tiles`, and of its scales and zeros."""
    rows = up(n, ROWS) // ROWS
    return (rows, up(k, COLUMNS) // COLUMNS, bits // 4, 32, 16), (rows, k // width(group_size, k), ROWS)


def check_stored(stored: Stored, bits: tuple[int, ...]) -> None:
    """Raise InputError for a layer that no kernel of these `bits` reads."""
    qweight, qzeros, scales, g_idx = stored[:4]
    _one_of("layout", stored.layout, LAYOUTS)
    _one_of("bits", stored.bits, (4,) if stored.layout == "awq" else bits)
    _dtype("qweight", qweight, torch.int32)
    _one_of("scales' type", scales.dtype, DTYPES)
    _dimensions("qweight", qweight, 2)
    _dimensions("scales", scales, 2)
    n, k = stored.n, stored.k
    size = width(stored.group_size, k)
    if size <= 0 or (size != k and size % 32) or k % size:
        raise InputError(
            f"group_size {stored.group_size} with {k} inputs",
            "a multiple of 32 that divides them, or -1 for all of them",
            "Quantize the layer with such groups, or dequantize it",
        )
    _shape("scales", scales, (k // size, n))
    if n % 8 or k % 8 or n * stored.bits % WORD:
        raise InputError(
            f"{n} outputs and {k} inputs of {stored.bits} bits",
            "multiples of 8 that fill 32-bit words", "Keep the layer in 16 bits",
        )  # fmt: skip
    if qzeros is not None:
        _dtype("qzeros", qzeros, torch.int32)
        _shape("qzeros", qzeros, (k // size, n * stored.bits // WORD))
    if g_idx is not None:
        if stored.layout == "awq":
            raise InputError("a g_idx in the AWQ layout", "none: it has groups of neighbours", "Leave it out")
        _dtype("g_idx", g_idx, torch.int32)
        _shape("g_idx", g_idx, (k,))
    _together("qweight", qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)


def check_tiles(tiles: Tiles) -> None:
    """Raise InputError for tiles of other sizes than bits, group_size, n and k say."""
    _one_of("bits", tiles.bits, (4, 8))
    n, k = tiles.n, tiles.k
    size = width(tiles.group_size, k)
    if n <= 0 or size <= 0 or k % size:
        raise InputError(
            f"n {n}, k {k}, group_size {tiles.group_size}",
            "what `prepare` was given",
            "Hand its results on as they are",
        )
    packed, grouped = shape_of_tiles(tiles.bits, tiles.group_size, n, k)
    _dtype("tiles", tiles.tiles, torch.uint8)
    _one_of("scales' type", tiles.scales.dtype, DTYPES)
    _dtype("zeros", tiles.zeros, torch.int16)
    _dtype("perm", tiles.perm, torch.int32)
    _shape("tiles", tiles.tiles, packed)
    _shape("scales", tiles.scales, grouped)
    _shape("zeros", tiles.zeros, grouped)
    _shape("perm", tiles.perm, (k,) if tiles.perm.numel() else (0,))
    for name, part in zip(("tiles", "scales", "zeros", "perm"), tiles[:4], strict=True):
        if not part.is_contiguous():
            raise InputError(f"{name} with gaps", "a contiguous tensor", f"Call contiguous() on {name} once, at load")
    _together("tiles", tiles.tiles, scales=tiles.scales, zeros=tiles.zeros, perm=tiles.perm)


def check_product(x: Tensor, tiles: Tiles, most: int | None = None) -> None:
    """Raise InputError where x [..., K] does not fit the tiles, or has more than `most` tokens."""
    check_tiles(tiles)
    if x.dim() < 1 or x.shape[-1] != tiles.k:
        raise InputError(f"x of shape {tuple(x.shape)}", f"[..., {tiles.k}]", "Give what the layer takes")
    if x.dtype != tiles.scales.dtype:
        raise InputError(
            f"x in {_name(x.dtype)} for scales in {_name(tiles.scales.dtype)}", "one type for both",
            "Prepare the layer with scales in the type of the activations",
        )  # fmt: skip
    if most is not None and (tokens := x.numel() // tiles.k) > most:
        raise InputError(f"{tokens} tokens", f"at most {most}", "Call `linear`, which chooses by the number of tokens")
    _together("tiles", tiles.tiles, x=x)


def _one_of(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        given, others = _name(value), ", ".join(map(_name, allowed))
        raise InputError(f"{what} {given}", others, "No kernel of this kind reads anything else")


def _dtype(what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise InputError(f"{what} in {_name(tensor.dtype)}", _name(dtype), "Give it as the checkpoint stores it")


def _dimensions(what: str, tensor: Tensor, count: int) -> None:
    if tensor.dim() != count or not tensor.numel():
        raise InputError(
            f"{what} of shape {tuple(tensor.shape)}", f"{count} dimensions, none empty", "Check the layout"
        )


def _shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{what} of shape {tuple(tensor.shape)}", str(shape), "Check layout, bits and group_size against the file"
        )


def _together(first: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise InputError(f"{name} on {other.device}, {first} on {tensor.device}", "one device", "Move one of them")


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
