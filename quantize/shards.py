"""safetensors files, read without mapping them and written the same way each time.

    8 bytes: the header's length ─► a JSON header: name ─► type, shape, begin and end ─► the tensors' bytes

The library maps a file, and the pages that were looked at count as the process's own until the tensor goes; what is
read here lies in memory of its own, and of the file no page does. It also writes its notes in another order each time,
and wants all tensors of a file in memory; here the same tensors and notes are the same bytes, and a tensor that lies in
another file is copied from there a stretch at a time, however large it is.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import ModelError
from quantize.shapes import Stored, read_header

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""By the header's words, in the library's order: it lays out the last of them first."""
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}

_STRETCH = 2**24
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Elsewhere:
    """A tensor in another file, which `write` copies without holding it."""

    file: Path
    stored: Stored

    @property
    def nbytes(self) -> int:
        return self.stored.bytes


Source = Tensor | Elsewhere


def read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors of `file`, in their stored type, on the CPU. Raises ModelError for a file that is not whole."""
    header = read_header(file)
    with file.open("rb") as opened:
        return {name: _read(opened, header[name], header[name].start, header[name].shape) for name in names}


def rows(file: Path, name: str, indices: Tensor) -> Tensor:
    """Some rows of one tensor, int64 [n] -> [n, ...]. No others are read."""
    stored = read_header(file)[name]
    of_row = stored.bytes // max(1, stored.shape[0])
    ids = indices.numpy()
    ends = np.flatnonzero(np.diff(ids) != 1) + 1  # of stretches of neighbours, which are read in one
    parts = []
    with file.open("rb") as opened:
        for part in np.split(ids, ends) if len(ids) else []:
            shape = (len(part), *stored.shape[1:])
            parts.append(_read(opened, stored, stored.start + int(part[0]) * of_row, shape))
    return torch.cat(parts) if parts else torch.empty((0, *stored.shape[1:]), dtype=_dtype(file, stored))


def write(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path`, and wait for the disk to have them. Raises OSError where it has no room.

    They lie as the library lays them, where the widest come first: by type, and of one type by name.
    """
    order = sorted(tensors, key=lambda name: (-_RANKS[_dtype_of(tensors[name])], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        shape = tensor.stored.shape if isinstance(tensor, Elsewhere) else tuple(tensor.shape)
        header[name] = {"dtype": _WORDS[_dtype_of(tensor)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in _bytes_of(tensors[name]):
                opened.write(part)
        opened.flush()
        os.fsync(opened.fileno())


def split(tensors: Mapping[str, Source], limit: int) -> Iterator[dict[str, Source]]:
    """`tensors` in their order, in parts of at most `limit` bytes; one that is larger by itself is a part alone."""
    part: dict[str, Source] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _read(opened: IO[bytes], stored: Stored, start: int, shape: tuple[int, ...]) -> Tensor:
    dtype = _dtype(Path(opened.name), stored)
    tensor = torch.empty(shape, dtype=dtype)
    if size := math.prod(shape) * dtype.itemsize:
        opened.seek(start)
        if opened.readinto(memoryview(_flat(tensor))) != size:  # type: ignore[attr-defined]
            raise ModelError(f"{opened.name}, which got shorter", "a whole safetensors file", "Fetch it again")
    return tensor


def _bytes_of(tensor: Source) -> Iterator[memoryview]:
    if not isinstance(tensor, Elsewhere):
        yield memoryview(_flat(tensor.detach().cpu().contiguous()))
        return
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.stored.start)
        left, stretch = tensor.stored.bytes, memoryview(bytearray(min(_STRETCH, tensor.stored.bytes)))
        while left:
            got = opened.readinto(stretch[:left])
            if not got:
                raise ModelError(f"{tensor.file}, which got shorter", "a whole safetensors file", "Fetch it again")
            yield stretch[:got]
            left -= got


def _flat(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU as a numpy array that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _dtype_of(tensor: Source) -> torch.dtype:
    return _dtype(tensor.file, tensor.stored) if isinstance(tensor, Elsewhere) else tensor.dtype


def _dtype(file: Path, stored: Stored) -> torch.dtype:
    if stored.dtype not in _DTYPES:
        raise ModelError(f"{file} with a tensor of type {stored.dtype}", ", ".join(_DTYPES), "Convert it")
    return _DTYPES[stored.dtype]
