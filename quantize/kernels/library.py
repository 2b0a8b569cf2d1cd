"""The kernels' shared library: found or built when first wanted, and loaded with ctypes.

    KNEEBENCH_KERNELS=FILE ─┐
    libkneebench.so beside  ├─► load() ─► ctypes, its version checked ─► native.py
    nvcc, cached by sources ┘

`host()` is the same C ABI made by g++ from the same sources: the kernels run on the CPU, for tests.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from quantize.errors import InputError
from quantize.kernels import build

VARIABLE = "KNEEBENCH_KERNELS"
VERSION = 1
"""kneebench.h's KB_VERSION: the ABI that the structures below describe."""


class StoredLayer(ctypes.Structure):
    """kneebench.h's kb_stored."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales", "g_idx")),
        *((name, ctypes.c_int32) for name in ("n", "k", "groups", "group_size", "bits", "layout", "dtype")),
    ]


class TiledLayer(ctypes.Structure):
    """kneebench.h's kb_tiles."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "scales", "zeros")),
        *((name, ctypes.c_int32) for name in ("n", "k", "groups", "group_size", "bits", "dtype")),
    ]


@cache
def load() -> ctypes.CDLL:
    """The library for this machine's GPUs. Raises InputError where none is to be had, RunError where nvcc fails."""
    if named := os.environ.get(VARIABLE):
        return open_library(Path(named))
    beside = Path(__file__).with_name(build.NAME)
    if beside.is_file():
        return open_library(beside)
    try:
        build.find("nvcc")
    except InputError as error:
        raise InputError(
            f"the GPU kernels, which are not built here, with {error.given}",
            f"nvcc on the PATH or under CUDA_HOME, {beside.name} beside {Path(__file__).name}, or {VARIABLE}=FILE",
            f"Install a CUDA toolkit, or run `make kernels` where there is one and name what it made in {VARIABLE}",
        ) from None
    return open_library(build.cuda(_cards()))


@cache
def host(sanitize: bool = False) -> ctypes.CDLL:
    """The same functions on host memory, streams ignored. Raises InputError without g++, RunError where it fails."""
    return open_library(build.host(sanitize))


def open_library(file: Path) -> ctypes.CDLL:
    """The library in `file`, its functions typed. Raises InputError for a file that is not it, or an older one."""
    remedy = f"Build it again with `make kernels`, or unset {VARIABLE} if that names it"
    try:
        found = ctypes.CDLL(str(file.resolve()))
        version = found.kb_version()
    except (OSError, AttributeError) as error:
        raise InputError(f"{file} as the kernels' library ({error})", "what `make kernels` makes", remedy) from None
    if version != VERSION:
        raise InputError(f"{file}, whose ABI is version {version}", f"version {VERSION}", remedy)
    stored, tiles = ctypes.POINTER(StoredLayer), ctypes.POINTER(TiledLayer)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    product = [tiles, pointer, pointer, number, pointer, ctypes.c_int64, pointer]
    for name, arguments, result in (
        ("kb_message", [number], ctypes.c_char_p),
        ("kb_check_stored", [stored, number], number),
        ("kb_check_tiles", [tiles], number),
        ("kb_prepare", [stored, pointer, tiles, pointer], number),
        ("kb_dequantize", [stored, pointer, pointer], number),
        ("kb_expand", [tiles, pointer, pointer, pointer], number),
        ("kb_gemv", product, number),
        ("kb_gemm", product, number),
        ("kb_workspace", [tiles, number, number], ctypes.c_int64),
    ):
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def _cards() -> tuple[int, ...]:
    """The compute capabilities to build for: those of the GPUs here, which takes nvcc a fraction of all; () for all,
    with PTX for the rest, where there is one that build.py does not list."""
    import torch  # a process under AddressSanitizer opens the library without it

    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    here = {10 * major + minor for major, minor in capabilities}
    return tuple(sorted(here)) if here <= set(build.CARDS) else ()
