"""numbers.cuh on the CPU: roundings against numpy's and torch's, lop3 and prmt against what NVIDIA's manual says."""

import ctypes
import subprocess

import numpy as np
import pytest

from quantize.kernels import build, reference
from quantize.kernels.reference import Array
from tests.kernels.layers import TYPES, address, same

SHIM = """
#include "numbers.cuh"
extern "C" {
void narrow_half(const float *from, uint16_t *to, int n) {
    for (int i = 0; i < n; i++) to[i] = kb::nearest_half(from[i]);
}
void narrow_bfloat(const float *from, uint16_t *to, int n) {
    for (int i = 0; i < n; i++) to[i] = kb::nearest_bfloat(from[i]);
}
void widen_half(const uint16_t *from, float *to, int n) {
    for (int i = 0; i < n; i++) to[i] = kb::half_value(from[i]);
}
void widen_bfloat(const uint16_t *from, float *to, int n) {
    for (int i = 0; i < n; i++) to[i] = kb::bfloat_value(from[i]);
}
uint32_t mux(uint32_t a, uint32_t b, uint32_t c) { return kb::lop3<(0xf0 & 0xcc) | (~0xf0 & 0xaa)>(a, b, c); }
uint32_t exclusive(uint32_t a, uint32_t b, uint32_t c) { return kb::lop3<0xf0 ^ 0xcc ^ 0xaa>(a, b, c); }
uint32_t unequal(uint32_t a, uint32_t b, uint32_t c) { return kb::lop3<0xf0 & ~0xcc & 0xaa>(a, b, c); }
uint32_t bytes(uint32_t a, uint32_t b, uint32_t choice) { return kb::prmt(a, b, choice); }
}
"""
EDGES = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2**-25], dtype=np.float32)
NAMES = {"float16": "half", "bfloat16": "bfloat"}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions under test, built with UBSan, which needs no preloading."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "shim.cpp").write_text(SHIM)
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{build.FOLDER}",
         "-fsanitize=undefined", "-fno-sanitize-recover=all", "-o", "shim.so", "shim.cpp"],
        cwd=folder, check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(folder / "shim.so"))
    for name in NAMES.values():
        getattr(library, f"narrow_{name}").argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        getattr(library, f"widen_{name}").argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    for name in ("mux", "exclusive", "unequal", "bytes"):
        getattr(library, name).argtypes = [ctypes.c_uint32] * 3
        getattr(library, name).restype = ctypes.c_uint32
    return library


def narrowed(shim: ctypes.CDLL, values: Array, dtype: str) -> Array:
    out = np.empty(len(values), dtype=np.uint16)
    getattr(shim, f"narrow_{NAMES[dtype]}")(address(values), address(out), len(values))
    return out


def judged(values: Array, dtype: str) -> Array:
    """float32 -> bits, by numpy or torch."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    torch = pytest.importorskip("torch")
    bits: Array = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits


@pytest.mark.parametrize("dtype", TYPES)
def test_all_65536_numbers_survive_there_and_back(shim: ctypes.CDLL, dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(65536, dtype=np.float32)
    getattr(shim, f"widen_{NAMES[dtype]}")(address(bits), address(values), 65536)
    wanted = (
        bits.view(np.float16).astype(np.float32) if dtype == "float16" else (bits.astype(np.uint32) << 16).view("f4")
    )
    assert np.array_equal(values, wanted, equal_nan=True)
    assert same(narrowed(shim, values, dtype), bits, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_and_their_neighbours_round_to_nearest_even(shim: ctypes.CDLL, dtype: str) -> None:
    """The middle of each two neighbouring numbers, and the floats just below and above it; up to infinity."""
    largest = 0x7C00 if dtype == "float16" else 0x7F80
    bits = np.arange(largest, dtype=np.uint16)
    ends = reference.value(bits, dtype)
    step_up = np.append(ends[1:], 2 * ends[-1] - ends[-2])  # the number after the largest, if there were one
    middles = ((ends + step_up) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(end)) for end in (0, np.inf)]
    values = np.concatenate([middles, *beside])
    values = np.concatenate([values, -values])
    made = narrowed(shim, values, dtype)
    assert np.array_equal(made, judged(values, dtype))
    assert (made[:largest] & 1 == 0).all()  # a tie goes to the even neighbour


@pytest.mark.parametrize("dtype", TYPES)
def test_floats_of_any_bits_round_as_others_round_them(shim: ctypes.CDLL, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, EDGES])
    assert same(narrowed(shim, values, dtype), judged(values, dtype), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_reference_rounds_likewise(dtype: str) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 400_000, dtype=np.uint32)
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore"):  # float64 from a signalling NaN
        assert same(reference.nearest(values.astype(np.float64), dtype), judged(values, dtype), dtype)


def test_lop3_is_its_table(shim: ctypes.CDLL) -> None:
    for a, b, c in np.random.default_rng(2).integers(0, 2**32, (50, 3)).tolist():
        assert shim.mux(a, b, c) == (a & b) | (~a & c)
        assert shim.exclusive(a, b, c) == a ^ b ^ c
        assert shim.unequal(a, b, c) == a & ~b & c


def test_prmt_takes_bytes_by_number(shim: ctypes.CDLL) -> None:
    a, b = 0x33221100, 0x77665544
    assert shim.bytes(a, b, 0x3210) == a
    assert shim.bytes(a, b, 0x7654) == b
    assert shim.bytes(a, b, 0x7052) == 0x77005522
    for place in range(4):
        for source in range(8):
            assert shim.bytes(a, b, source << 4 * place) >> 8 * place & 255 == 0x11 * source


def test_each_16_bit_product_is_exact_in_a_float() -> None:
    """What lets one rounding be proven: integers of 9 bits by mantissas of 11 need 20 bits, and a float has 24."""
    mantissas = np.arange(1024, 2048, dtype=np.int64)
    steps = np.arange(-256, 256, dtype=np.int64)
    exact = mantissas[:, None] * steps
    assert np.array_equal(exact.astype(np.float32).astype(np.int64), exact)
