"""kb_prepare and kb_expand: every layout against reference.py, bit for bit, and what is refused."""

import ctypes
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest

from quantize.kernels import reference
from quantize.kernels.reference import Layer
from tests.kernels.layers import (
    LAYOUTS,
    TYPES,
    Kernels,
    Refused,
    address,
    empty_tiles,
    random_layer,
    same,
    stored_struct,
    tiles_struct,
)

SIZES = [
    (16, 64, 32),  # one chunk
    (8, 8, -1),  # less than a chunk
    (24, 72, -1),  # n past a multiple of 16, k past a multiple of 64
    (24, 80, -1),  # k ends between the two lanes that store together
    (40, 96, 32),
    (136, 192, 64),  # more rows than the 8 chunks of a block
    (264, 256, 128),  # more outputs than a block of scales, two groups
    (32, 320, -1),
]


def layers() -> Iterator[Layer]:
    for (n, k, size), layout, dtype in product(SIZES, LAYOUTS, TYPES):
        for bits, zeros in product((4,) if layout == "awq" else (4, 8), (True, False)):
            yield random_layer(n, k, size, layout=layout, bits=bits, dtype=dtype, zeros=zeros)


def name(layer: Layer) -> str:
    zeros = "" if layer.qzeros is not None else "-symmetric"
    return f"{layer.layout}-{layer.bits}-{layer.n}x{layer.k}-{layer.group_size}-{layer.dtype}{zeros}"


@pytest.mark.parametrize("layer", list(layers()), ids=name)
def test_tiles_are_the_reference_s(kernels: Kernels, layer: Layer) -> None:
    made, wanted = kernels.prepare(layer), reference.prepare(layer)
    assert np.array_equal(made.tiles, wanted.tiles)
    assert np.array_equal(made.scales, wanted.scales)
    assert np.array_equal(made.zeros, wanted.zeros)
    weights = kernels.expand(made)
    assert same(weights, reference.expand(wanted), layer.dtype)
    assert same(weights, reference.dequantize(layer), layer.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "size"), [(24, 96, 32), (40, 192, 64), (16, 256, 128), (16, 72, -1)])
def test_act_order_comes_back_in_the_model_s_order(
    kernels: Kernels, n: int, k: int, size: int, bits: int, dtype: str
) -> None:
    layer = random_layer(n, k, size, bits=bits, dtype=dtype, act_order=True)
    assert layer.g_idx is not None
    perm = reference.act_order(layer.g_idx)
    made, wanted = kernels.prepare(layer, perm), reference.prepare(layer, perm)
    assert np.array_equal(made.tiles, wanted.tiles)
    assert np.array_equal(made.scales, wanted.scales)
    assert same(kernels.expand(made, perm), reference.dequantize(layer), dtype)
    assert same(kernels.expand(made), reference.dequantize(layer)[:, perm], dtype)


@pytest.mark.parametrize("position", [32, 40, 63])  # the first of its group, one in its midst, the last
@pytest.mark.parametrize("bad", [-1, 96, 2**31 - 1, -(2**31)])
def test_a_position_without_an_input_spoils_its_group_alone(kernels: Kernels, bad: int, position: int) -> None:
    layer = random_layer(24, 96, 32)
    perm = np.arange(96, dtype=np.int32)
    perm[position] = bad
    made = kernels.prepare(layer, perm)
    weights = reference.value(kernels.expand(made), layer.dtype)
    wanted = reference.value(reference.dequantize(layer), layer.dtype)
    assert np.isnan(weights[:, 32:64]).all()
    assert np.array_equal(weights[:, :32], wanted[:, :32])
    assert np.array_equal(weights[:, 64:], wanted[:, 64:])
    in_order = reference.value(kernels.expand(kernels.prepare(layer), perm), layer.dtype)
    assert np.isnan(in_order[:, position]).all()  # no position names it
    assert np.array_equal(np.delete(in_order, position, 1), np.delete(wanted, position, 1))


@pytest.mark.parametrize("position", [32, 40, 63])
@pytest.mark.parametrize("bad", [0, 2, -1, 2**31 - 1])
def test_a_group_index_that_disagrees_with_its_place_spoils_that_group(
    kernels: Kernels, bad: int, position: int
) -> None:
    layer = random_layer(24, 96, 32)
    g_idx = np.arange(96, dtype=np.int32) // 32
    g_idx[position] = bad  # belongs to group 1
    mixed = Layer(layer.qweight, layer.qzeros, layer.scales, g_idx, layer.layout, layer.bits, layer.dtype)
    made = kernels.prepare(mixed)
    spoiled = np.isnan(reference.value(made.scales, layer.dtype))
    assert spoiled[:, 1, :8].all() and not spoiled[:, [0, 2]].any()


@pytest.mark.parametrize("order", [0, 1, 7])  # threads forwards, backwards, shuffled
def test_a_fault_is_seen_whichever_thread_comes_first(kernels: Kernels, order: int) -> None:
    layer = random_layer(24, 128, 128)
    perm = np.arange(128, dtype=np.int32)
    perm[100] = -1  # the fourth warp's
    kernels.library.kb_simt_set(order, 4, 90)
    try:
        made = kernels.prepare(layer, perm)
    finally:
        kernels.library.kb_simt_set(0, 4, 90)
    assert np.isnan(reference.value(kernels.expand(made), layer.dtype)).all()


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"qweight": None}, 1, "qweight is NULL"),
        ({"scales": None}, 1, "scales is NULL"),
        ({"n": 12}, 3, "n is 12: a multiple of 8"),
        ({"n": 0}, 3, "n is 0"),
        ({"n": -16}, 3, "n is -16"),
        ({"n": 2**20 + 8}, 3, "n is 1048584: a multiple of 8 up to 1048576"),
        ({"k": 100}, 3, "k is 100"),
        ({"groups": 2}, 3, "2 groups of 32 for k = 96"),
        ({"group_size": 48, "groups": 2}, 3, "group_size is 48: a multiple of 32"),
        ({"group_size": -1, "groups": 1}, 3, "group_size is -1"),
        ({"group_size": 2**31 - 32}, 3, "3 groups of 2147483616"),
        ({"bits": 3}, 4, "bits is 3: 4, 8 are allowed"),
        ({"bits": 0}, 4, "bits is 0"),
        ({"bits": 36}, 4, "bits is 36"),
        ({"layout": 3}, 5, "layout is 3"),
        ({"layout": 0, "g_idx": 16}, 5, "g_idx with layout AWQ"),
        ({"layout": 0, "bits": 8}, 4, "bits is 8: 4 are allowed"),
        ({"dtype": 2}, 6, "dtype is 2"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused(
    kernels: Kernels, changed: dict[str, int | None], code: int, said: str
) -> None:
    layer = random_layer(24, 96, 32)
    out = empty_tiles(24, 96, 3, 4, "float16")
    with pytest.raises(Refused, match=said) as refused:
        kernels.call("kb_prepare", stored_struct(layer, **changed), None, tiles_struct(out), None)
    assert refused.value.code == code
    assert (out.tiles == 0xA5).all()  # nothing was written


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"tiles": None}, 1, "tiles is NULL"),
        ({"zeros": None}, 1, "zeros is NULL"),
        ({"n": 32}, 3, "tiles of n, k, groups 32, 96, 3 for a layer of 24, 96, 3"),
        ({"bits": 8}, 4, "tiles of 8 bits for a layer of 4"),
        ({"dtype": 1}, 6, "tiles of dtype 1 for scales of dtype 0"),
        ({"bits": 2}, 4, "bits is 2: 4, 8 are allowed"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    kernels: Kernels, changed: dict[str, int | None], code: int, said: str
) -> None:
    layer = random_layer(24, 96, 32)
    out = empty_tiles(24, 96, 3, 4, "float16")
    with pytest.raises(Refused, match=said) as refused:
        kernels.call("kb_prepare", stored_struct(layer), None, tiles_struct(out, **changed), None)
    assert refused.value.code == code


@pytest.mark.parametrize("array", ["qweight", "qzeros", "scales", "g_idx"])
def test_an_array_off_its_alignment_is_refused(kernels: Kernels, array: str) -> None:
    layer = random_layer(24, 96, 32, act_order=True)
    struct = stored_struct(layer)
    setattr(struct, array, getattr(struct, array) + 8)
    out = empty_tiles(24, 96, 3, 4, "float16")
    with pytest.raises(Refused, match=f"{array} begins 8 bytes after a multiple of 16") as refused:
        kernels.call("kb_prepare", struct, None, tiles_struct(out), None)
    assert refused.value.code == 2


def test_perm_and_out_are_checked_too(kernels: Kernels) -> None:
    layer = random_layer(24, 96, 32)
    tiles = kernels.prepare(layer)
    out = np.empty((24, 96), dtype=np.uint16)
    with pytest.raises(Refused, match="perm begins 4 bytes"):
        kernels.call("kb_expand", tiles_struct(tiles), address(out) + 4, address(out), None)
    with pytest.raises(Refused, match="out is NULL"):
        kernels.call("kb_expand", tiles_struct(tiles), None, None, None)
    with pytest.raises(Refused, match="out begins 2 bytes"):
        kernels.call("kb_dequantize", stored_struct(layer), address(out) + 2, None)
    with pytest.raises(Refused, match="stored is NULL"):
        kernels.call("kb_prepare", None, None, tiles_struct(tiles), None)
    with pytest.raises(Refused, match="tiles is NULL"):
        kernels.call("kb_expand", None, None, address(out), None)


def test_every_code_has_a_message(kernels: Kernels) -> None:
    messages = [kernels.library.kb_message(code) for code in range(12)]
    assert messages[0] == b"no error" and messages[11] == b"an unknown error code"
    assert len(set(messages)) == 12
    assert kernels.library.kb_version() == 1


def test_structures_are_as_the_header_s(kernels: Kernels) -> None:
    # Four pointers and seven int32, three pointers and six: what library.py, this file and a C compiler make of them.
    layer = random_layer(24, 96, 32)
    assert ctypes.sizeof(stored_struct(layer)) == 4 * 8 + 7 * 4 + 4
    assert ctypes.sizeof(tiles_struct(kernels.prepare(layer))) == 3 * 8 + 6 * 4


def test_nothing_is_read_or_written_outside_the_buffers(sanitized: Callable[..., None]) -> None:
    sanitized(__file__)
