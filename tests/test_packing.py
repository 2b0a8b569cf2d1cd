"""The AWQ layout: exact round trips, a word by hand, and compressed-tensors' reader as the judge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import SchemeError
from quantize.packing import pack_awq, unpack_awq
from quantize.scheme import Quantized, Scheme, dequantize, quantize


def integers(rows: int, columns: int, groups: int, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    return Quantized(
        torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(rows, groups, generator=generator).to(torch.float16),
        torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8),
    )


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


def test_more_than_four_bits_are_refused() -> None:
    with pytest.raises(SchemeError, match="--bits 4"):
        pack_awq(quantize(torch.randn(8, 16), Scheme(8, 16)))
