"""The layouts: exact round trips, words by hand, and compressed-tensors' own code as the judge."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import SchemeError
from quantize.packing import (
    CtInt8,
    CtPacked,
    pack,
    pack_awq,
    pack_ct,
    pack_gptq,
    pack_int8,
    unpack,
    unpack_awq,
    unpack_ct,
    unpack_gptq,
    unpack_int8,
)
from quantize.scheme import Quantized, Scheme, dequantize, quantize

BITS = (2, 3, 4, 8)


def integers(rows: int, columns: int, groups: int, seed: int, bits: int = 4, symmetric: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return Quantized(
        torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(rows, groups, generator=generator).to(torch.float16),
        torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros,
    )


def words_of(values: list[int], bits: int) -> list[int]:
    """The stream as one long integer, cut into signed words: slow, and nothing like the code it judges."""
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def same(left: Quantized, right: Quantized) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(
    rows=st.integers(1, 6).map(lambda n: 8 * n),
    columns=st.integers(1, 40),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_undoes_packing(rows: int, columns: int, groups: int, seed: int) -> None:
    quantized = integers(rows, columns, groups, seed)
    assert same(unpack_awq(pack_awq(quantized)), quantized)


@pytest.mark.parametrize("value", [0, 7, 8, 15])
def test_edges_survive(value: int) -> None:
    # 8 and more in the highest nibble set the sign of the int32.
    quantized = Quantized(
        torch.full((16, 5), value, dtype=torch.uint8),
        torch.ones(16, 1, dtype=torch.float16),
        torch.full((16, 1), value, dtype=torch.uint8),
    )
    assert same(unpack_awq(pack_awq(quantized)), quantized)


def test_every_value_in_every_place_survives() -> None:
    for place in range(8):
        q = torch.zeros(8, 16, dtype=torch.uint8)
        q[place] = torch.arange(16)
        quantized = Quantized(q, torch.ones(8, 1, dtype=torch.float16), torch.zeros(8, 1, dtype=torch.uint8))
        assert same(unpack_awq(pack_awq(quantized)), quantized)


def test_a_word_by_hand() -> None:
    # Outputs 0..7 hold 0..7. From the lowest nibble up lie outputs 0, 2, 4, 6, 1, 3, 5, 7.
    column = torch.arange(8, dtype=torch.uint8)[:, None]
    packed = pack_awq(Quantized(column, torch.ones(8, 1, dtype=torch.float16), column))
    assert packed.qweight.tolist() == packed.qzeros.tolist() == [[0x75316420]]


def test_shapes_and_types_are_those_of_the_kernel() -> None:
    packed = pack_awq(quantize(torch.randn(24, 256), Scheme(4, 128)))
    assert (packed.qweight.shape, packed.qweight.dtype) == ((256, 3), torch.int32)
    assert (packed.qzeros.shape, packed.qzeros.dtype) == ((2, 3), torch.int32)
    assert (packed.scales.shape, packed.scales.dtype) == ((2, 24), torch.float16)
    assert all(tensor.is_contiguous() for tensor in packed)


def test_a_reader_that_is_not_ours_reads_the_same_weights() -> None:
    converter = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter()
    quantized = quantize(torch.randn(48, 256, generator=torch.Generator().manual_seed(0)), Scheme(4, 64))
    packed = pack_awq(quantized)
    q, scales, zeros = converter._convert_gemm_module(packed.qweight, packed.scales, packed.qzeros)
    groups = (q.view(48, 4, 64).float() - zeros.view(48, 4, 1).float()) * scales.view(48, 4, 1).float()
    assert torch.equal(groups.reshape(48, 256), dequantize(quantized))


def test_outputs_that_do_not_fill_a_word_are_refused() -> None:
    with pytest.raises(SchemeError, match="12 outputs.*multiple of 8"):
        pack_awq(integers(12, 4, 1, seed=0))


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 3), count=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_the_stream_is_one_long_integer_and_comes_back(bits: int, rows: int, count: int, seed: int) -> None:
    values = integers(rows, count, 1, seed, bits).q
    words = pack(values, bits)
    assert words.tolist() == [words_of(row, bits) for row in values.tolist()]
    assert torch.equal(unpack(words, bits, count), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_packs_the_same_words(bits: int, symmetric: bool) -> None:
    quantized = integers(48, 160, 5, seed=bits, bits=bits, symmetric=symmetric)
    packed = pack_ct(quantized, bits, symmetric)

    def signed(values: torch.Tensor) -> torch.Tensor:
        return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)

    assert torch.equal(packed.weight_packed, pack_to_int32(signed(quantized.q), bits))
    assert torch.equal(unpack_from_int32(packed.weight_packed, bits, torch.Size((48, 160))), signed(quantized.q))
    assert packed.weight_shape.tolist() == [48, 160]
    assert (packed.weight_zero_point is None) == symmetric
    if packed.weight_zero_point is not None:
        assert torch.equal(packed.weight_zero_point, pack_to_int32(signed(quantized.zeros), bits, packed_dim=0))
    assert same(unpack_ct(packed, bits), quantized)


@given(
    bits=st.sampled_from(BITS),
    outputs=st.integers(1, 40),
    per_group=st.integers(1, 40),
    groups=st.integers(1, 3),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_compressed_tensors_undoes_any_shape(
    bits: int, outputs: int, per_group: int, groups: int, symmetric: bool, seed: int
) -> None:
    quantized = integers(outputs, per_group * groups, groups, seed, bits, symmetric)
    assert same(unpack_ct(pack_ct(quantized, bits, symmetric), bits), quantized)


@given(
    bits=st.sampled_from(BITS),
    outputs=st.integers(1, 2).map(lambda n: 32 * n),
    groups=st.integers(1, 3),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_undoes_packing_for_gptq(bits: int, outputs: int, groups: int, version: int, seed: int) -> None:
    quantized = integers(outputs, 32 * groups, groups, seed, bits)  # with zero points of 0: the words then borrow
    packed = pack_gptq(quantized, bits)
    if version == 2:
        packed = packed._replace(qzeros=pack(quantized.zeros.T, bits))
    assert same(unpack_gptq(packed, bits, version), quantized)


@pytest.mark.parametrize("bits", BITS)
def test_gptq_by_the_long_integer(bits: int) -> None:
    quantized = integers(32, 64, 2, seed=1, bits=bits)
    quantized = quantized._replace(zeros=quantized.zeros.clamp(min=1))  # what v1 can say of each by itself
    packed = pack_gptq(quantized, bits)
    assert packed.qweight.T.tolist() == [words_of(row, bits) for row in quantized.q.tolist()]
    assert packed.qzeros.tolist() == [words_of([z - 1 for z in row], bits) for row in quantized.zeros.T.tolist()]
    assert packed.g_idx is not None and packed.g_idx.tolist() == [0] * 32 + [1] * 32
    assert torch.equal(packed.scales, quantized.scales.T)


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)])
def test_symmetric_gptq_has_the_zero_points_that_published_checkpoints_have(bits: int, word: int) -> None:
    packed = pack_gptq(integers(32, 32, 1, seed=0, bits=bits, symmetric=True), bits)
    assert set(packed.qzeros.flatten().tolist()) == {word}


def test_int8_is_the_distance_to_the_middle() -> None:
    quantized = integers(5, 7, 1, seed=0, bits=8, symmetric=True)
    packed = pack_int8(quantized)
    assert packed.weight.dtype == torch.int8 and packed.weight_zero_point is None
    assert torch.equal(packed.weight.to(torch.int16) + 128, quantized.q.to(torch.int16))
    assert same(unpack_int8(packed), quantized)


def test_int8_of_other_tools_has_zero_points() -> None:
    tensors = CtInt8(torch.tensor([[-128, 0, 127]], dtype=torch.int8), torch.ones(1, 1), torch.tensor([[-3]]).char())
    assert unpack_int8(tensors).q.tolist() == [[0, 128, 255]]
    assert unpack_int8(tensors).zeros.tolist() == [[125]]


def test_layouts_are_contiguous_and_of_the_types_that_readers_expect() -> None:
    quantized = integers(32, 64, 2, seed=0, bits=4, symmetric=True)
    for tensors in (pack_gptq(quantized, 4), pack_ct(quantized, 4, True), pack_ct(quantized, 4, False)):
        for name, tensor in tensors._asdict().items():
            if tensor is not None:
                assert tensor.is_contiguous(), name
                expected = {"weight_shape": torch.int64, "scales": torch.float16, "weight_scale": torch.float16}
                assert tensor.dtype == expected.get(name, torch.int32), name


def test_a_scattered_group_is_refused() -> None:
    packed = pack_gptq(integers(32, 64, 2, seed=0), 4)
    assert packed.g_idx is not None
    with pytest.raises(SchemeError, match="g_idx.*desc_act"):
        unpack_gptq(packed._replace(g_idx=packed.g_idx.flip(0)), 4)
    assert same(unpack_gptq(packed._replace(g_idx=None), 4), unpack_gptq(packed, 4))


def test_the_gapped_words_of_older_compressed_tensors_are_refused() -> None:
    # 0.17 put 10 values of 3 bits into a word and left 2 bits unused: 13 words for 128 values instead of 12.
    packed = CtPacked(torch.zeros(4, 13, dtype=torch.int32), torch.ones(4, 1), None, torch.tensor([4, 128]))
    with pytest.raises(SchemeError, match="13 words.*12, without gaps"):
        unpack_ct(packed, 3)


def test_integers_that_are_not_words_are_refused() -> None:
    tensors = CtPacked(
        torch.zeros(4, 4, dtype=torch.int32),
        torch.ones(4, 1),
        torch.zeros(4, 1, dtype=torch.int8),
        torch.tensor([4, 32]),
    )
    with pytest.raises(SchemeError, match="int8.*int32"):
        unpack_ct(tensors, 4)


@pytest.mark.parametrize(("shape", "bits", "says"), [((32, 20), 4, "20 inputs"), ((30, 32), 8, "30 outputs")])
def test_gptq_words_must_be_full(shape: tuple[int, int], bits: int, says: str) -> None:
    with pytest.raises(SchemeError, match=f"{says}.*GPTQ"):
        pack_gptq(integers(*shape, 1, seed=0, bits=bits), bits)


def test_zero_points_never_vanish_into_a_symmetric_layout() -> None:
    quantized = integers(8, 32, 1, seed=0, bits=8)
    for lose in (lambda: pack_ct(quantized, 8, True), lambda: pack_int8(quantized)):
        with pytest.raises(SchemeError, match="zero points in a symmetric scheme"):
            lose()


def test_values_beyond_the_bits_are_refused() -> None:
    with pytest.raises(SchemeError, match="3-bit"):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)


def test_more_than_four_bits_are_refused() -> None:
    with pytest.raises(SchemeError, match="--bits 4"):
        pack_awq(quantize(torch.randn(8, 16), Scheme(8, 16)))
