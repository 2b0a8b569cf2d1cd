"""Unpacking, exhaustively: each field of each word by arithmetic that is not the kernels' and not reference.py's.

A scale of 1 and a zero point of 0 make a weight equal to its integer, which both types of 16 bits hold exactly.
"""

from collections.abc import Callable

import numpy as np
import pytest

from quantize.kernels import reference
from quantize.kernels.reference import Array, Layer, Tiles
from tests.kernels.layers import TYPES, Kernels

ONE = {"float16": 0x3C00, "bfloat16": 0x3F80}
HALVES = np.arange(65536, dtype=np.uint32)
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of outputs 0..7 in an AWQ word: even outputs in the low half, odd ones in the high half."""


def plain(qweight: Array, n: int, k: int, layout: str, bits: int, dtype: str) -> Layer:
    """A layer of one group with z = 0 and s = 1."""
    words = np.zeros((1, n * bits // 32), dtype=np.int32)
    return Layer(qweight.view(np.int32), words, np.full((1, n), ONE[dtype], np.uint16), None, layout, bits, dtype)


def weights(kernels: Kernels, layer: Layer) -> Array:
    return reference.value(kernels.dequantize(layer), layer.dtype)


def all_half_words() -> Array:
    """uint32 [131072]: each half-word in the low half, then in the high half, the other being something else."""
    other = (HALVES * 40503 + 12345) & 0xFFFF
    return np.concatenate([HALVES | other << 16, other | HALVES << 16])


@pytest.mark.parametrize("dtype", TYPES)
def test_gptq_4_bits_each_half_word_in_each_half(kernels: Kernels, dtype: str) -> None:
    words = all_half_words().reshape(128, 1024)
    made = weights(kernels, plain(words, 1024, 1024, "gptq_v2", 4, dtype))
    for i in range(8):
        assert np.array_equal(made[:, i::8].T, words >> np.uint32(4 * i) & 15)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [128, 2])  # loads of 16 bytes, and of 4
def test_awq_each_half_word_in_each_half(kernels: Kernels, columns: int, dtype: str) -> None:
    words = all_half_words().reshape(-1, columns)
    n, k = 8 * columns, len(words)
    made = weights(kernels, plain(words, n, k, "awq", 4, dtype))
    for output, nibble in enumerate(AWQ_NIBBLE):
        assert np.array_equal(made[output::8].T, words >> np.uint32(4 * nibble) & 15)


@pytest.mark.parametrize("dtype", TYPES)
def test_gptq_8_bits_each_value_in_each_byte(kernels: Kernels, dtype: str) -> None:
    values = np.arange(256, dtype=np.uint32)
    words = np.stack([values << np.uint32(8 * i) | (values ^ 0xA5) << np.uint32(8 * (i + 1) % 32) for i in range(4)])
    made = weights(kernels, plain(words, 256, 16, "gptq_v2", 8, dtype))
    for i in range(4):
        assert np.array_equal(made[:, i::4].T, words >> np.uint32(8 * i) & 255)


@pytest.mark.parametrize("dtype", TYPES)
def test_gptq_2_bits_each_half_word_in_each_half(kernels: Kernels, dtype: str) -> None:
    words = all_half_words().reshape(128, 1024)
    made = weights(kernels, plain(words, 1024, 2048, "gptq_v2", 2, dtype))
    for i in range(16):
        assert np.array_equal(made[:, i::16].T, words >> np.uint32(2 * i) & 3)


def streams_of_3_bits() -> list[int]:
    """96-bit streams: each value in each of 32 places on zeros and on ones, and all values of the fields around both
    crossings (field 10 has bits 30..32, field 21 has bits 63..65) together."""
    ones = (1 << 96) - 1
    alone = [value << 3 * i for i in range(32) for value in range(8)]
    among = [ones ^ (7 - value) << 3 * i for i in range(32) for value in range(8)]
    crossings = [value << 3 * 9 for value in range(512)] + [value << 3 * 20 for value in range(512)]
    return alone + among + crossings


@pytest.mark.parametrize("dtype", TYPES)
def test_gptq_3_bits_each_value_in_each_place_and_across_words(kernels: Kernels, dtype: str) -> None:
    streams = streams_of_3_bits()
    n = len(streams)
    words = np.array([[stream >> 32 * w & 0xFFFFFFFF for stream in streams] for w in range(3)], dtype=np.uint32)
    made = weights(kernels, plain(words, n, 32, "gptq_v2", 3, dtype))
    assert made.tolist() == [[stream >> 3 * i & 7 for i in range(32)] for stream in streams]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("layout", "more"), [("gptq", 1), ("gptq_v2", 0)])
def test_zero_points_of_3_bits_across_words(kernels: Kernels, layout: str, more: int, dtype: str) -> None:
    # q = 0 and s = 1 make a weight -z. A row of zero points is a stream along the outputs; v1 stores z - 1.
    streams = streams_of_3_bits()
    groups = len(streams)
    zeros = np.array([[s >> 32 * w & 0xFFFFFFFF for w in range(3)] for s in streams], dtype=np.uint32).view(np.int32)
    none, ones = np.zeros((3 * groups, 32), dtype=np.int32), np.full((groups, 32), ONE[dtype], np.uint16)
    layer = Layer(none, zeros, ones, None, layout, 3, dtype)
    made = weights(kernels, layer)[:, ::32]  # one input of each group
    assert (-made.T).tolist() == [[(stream >> 3 * i & 7) + more for i in range(32)] for stream in streams]


@pytest.mark.parametrize(
    ("layout", "more", "bits"),
    [("gptq", 1, 4), ("gptq", 1, 8), ("gptq_v2", 0, 4), ("gptq_v2", 0, 8), ("awq", 0, 4)],
)
def test_each_zero_point_in_each_place(kernels: Kernels, layout: str, more: int, bits: int) -> None:
    """v1 reaches 2^bits: a field of 15 is a zero point of 16."""
    values, places = 1 << bits, 32 // bits
    fields = (np.arange(values)[:, None] + 5 * np.arange(places)) % values  # [groups, places]: all values in each place
    shifts = np.array(AWQ_NIBBLE if layout == "awq" else range(places)) * bits
    word = (fields.astype(np.uint64) << shifts.astype(np.uint64)).sum(axis=1).astype(np.uint32)
    n, k = 8, 32 * values
    layer = Layer(
        np.zeros((k, 1) if layout == "awq" else (k * bits // 32, n), dtype=np.int32),
        np.repeat(word[:, None], n // places, axis=1).view(np.int32),
        np.full((values, n), ONE["bfloat16"], np.uint16), None, layout, bits, "bfloat16",
    )  # fmt: skip
    wanted = np.tile(fields + more, n // places)
    assert np.array_equal(-weights(kernels, layer)[:, ::32].T, wanted)
    made = kernels.prepare(layer)
    assert np.array_equal(made.zeros[0, :, :8], wanted)


def chunk(words: Array, bits: int, dtype: str) -> Tiles:
    """uint32 [n/16, columns, bits/4, 32, 4] as tiles with z = 0 and s = 1."""
    rows, columns = words.shape[:2]
    return Tiles(
        np.ascontiguousarray(words).view(np.uint8),
        np.full((rows, 1, 16), ONE[dtype], np.uint16),
        np.zeros((rows, 1, 16), np.int16),
        16 * rows,
        64 * columns,
        bits,
        dtype,
    )


def read(words: Array, bits: int, weights: Array) -> None:
    """Each weight of [n, k] is the field where tiles.cuh's drawing has it, row and input by row and input."""
    for row in range(16):
        for column in range(64):
            lane, t, within = 4 * (row % 8) + column // 16, column % 16 // 4, column % 4
            register, second = row // 8 + 2 * (within // 2), within % 2
            if bits == 4:
                field = words[:, :, 0, lane, t] >> np.uint32(4 * register + 16 * second) & 15
            else:
                word = words[:, :, t // 2, lane, t % 2 * 2 + register // 2]
                field = word >> np.uint32(8 * (register % 2) + 16 * second) & 255
            assert np.array_equal(weights[row::16, column::64], field), (row, column)


@pytest.mark.parametrize("dtype", TYPES)
def test_tiles_of_4_bits_each_half_word_in_each_half(kernels: Kernels, dtype: str) -> None:
    # 131072 words in 1024 chunks of 128: shifted by one word for each of a lane's four, so each word meets each place.
    words = all_half_words()
    for place in range(4):
        shifted = np.roll(words, place).reshape(32, 32, 1, 32, 4)
        read(shifted, 4, reference.value(kernels.expand(chunk(shifted, 4, dtype)), dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_tiles_of_8_bits_each_value_in_each_byte(kernels: Kernels, dtype: str) -> None:
    # In chunk b each byte of the 1024 is b plus its own place: every value in every byte.
    place = np.arange(1024, dtype=np.uint8)
    words = (np.arange(256, dtype=np.uint8)[:, None] + place).view(np.uint32).reshape(16, 16, 2, 32, 4)
    read(words, 8, reference.value(kernels.expand(chunk(words, 8, dtype)), dtype))


def test_unpacking_reads_nothing_beyond_its_words(sanitized: Callable[..., None]) -> None:
    sanitized(__file__, "-k", "3_bits or zero_point")
