"""The reference quantizer: hand-computed groups, the bound on its error, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import SchemeError
from quantize.scheme import Scheme, dequantize, fake_quantize_tokens, grid, quantize, round_scales

FOUR = Scheme(bits=4, group_size=4)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_a_group_by_hand() -> None:
    # lo = -1, hi = 2.75: s = 3.75/15 = 0.25, z = 4; every weight is a multiple of the step.
    quantized = quantize(row(-1.0, 0.0, 0.25, 2.75), FOUR)
    assert quantized.scales.item() == 0.25
    assert quantized.zeros.item() == 4
    assert quantized.q.tolist() == [[0, 4, 5, 15]]
    assert dequantize(quantized).tolist() == [[-1.0, 0.0, 0.25, 2.75]]


def test_a_symmetric_group_by_hand() -> None:
    # max|w| = 3.75: s = 3.75/7.5 = 0.5, z = 8; -3.75 is -7.5 steps, which rounds to the even -8.
    quantized = quantize(row(-3.75, 0.0, 0.5, 1.2), Scheme(4, 4, symmetric=True))
    assert quantized.scales.item() == 0.5
    assert quantized.q.tolist() == [[0, 8, 9, 10]]
    assert dequantize(quantized).tolist() == [[-4.0, 0.0, 0.5, 1.0]]


def test_two_bits_symmetric_have_four_levels() -> None:
    # s = 1.5/1.5 = 1: -2, -1, 0 and 1.
    quantized = quantize(row(-1.5, -1.0, 0.2, 1.5), Scheme(2, 4, symmetric=True))
    assert dequantize(quantized).tolist() == [[-2.0, -1.0, 0.0, 1.0]]


def test_per_channel_is_one_group_a_row() -> None:
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    whole, grouped = quantize(weight, Scheme(8, -1)), quantize(weight, Scheme(8, 24))
    assert whole.scales.shape == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, grouped, strict=True))


def test_compressed_tensors_finds_the_same_grids() -> None:
    """But for the rounding of the scales, which is ours (the module's docstring says why)."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    groups = weight.view(16, 4, 32)
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
            theirs, zeros = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), arguments)
            ours = grid(weight, Scheme(bits, 32, symmetric))
            assert torch.allclose(ours.scales.float(), theirs, rtol=2**-8)
            # Theirs are signed; a zero point near .5 may round the other way with the scale rounded.
            assert torch.all((ours.zeros.int() - (zeros.int() + (1 << (bits - 1)))).abs() <= (0 if symmetric else 1))


def test_activations_are_scaled_by_token() -> None:
    x = torch.tensor([[1.0, -127.0, 0.4], [0.5, 0.25, 12.7]])
    assert torch.allclose(fake_quantize_tokens(x, 8), torch.tensor([[1.0, -127.0, 0.0], [0.5, 0.2, 12.7]]), atol=1e-6)
    assert torch.equal(fake_quantize_tokens(torch.zeros(2, 3), 8), torch.zeros(2, 3))
    assert fake_quantize_tokens(torch.tensor([[7.0, 3.4, -0.6]]), 4).tolist() == [[7.0, 3.0, -1.0]]


def test_groups_are_independent() -> None:
    quiet, loud = row(-1.0, 0.0, 0.25, 2.75), row(-100.0, 0.0, 25.0, 275.0)
    both = dequantize(quantize(torch.cat([quiet, loud], dim=1), FOUR))
    assert torch.equal(both, torch.cat([dequantize(quantize(w, FOUR)) for w in (quiet, loud)], dim=1))


def test_zeros_come_back_as_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1, 4:] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    assert torch.equal(dequantize(quantize(weight, FOUR)) == 0, weight == 0)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.03, -7.25e-4, 1000.0])
def test_a_constant_group_keeps_its_value(value: float) -> None:
    # The range is stretched to hold 0, so the constant lies at its end; what is left is the rounding of the scale.
    restored = dequantize(quantize(torch.full((2, 4), value), FOUR))
    assert torch.allclose(restored, torch.full((2, 4), value), rtol=2**-8)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_needs_no_zero_point_out_of_range(sign: int) -> None:
    weight = sign * row(10.0, 11.0, 12.0, 15.0)
    assert torch.equal(dequantize(quantize(weight, FOUR)), weight)


def test_shrink_clips_the_outermost_and_refines_the_rest() -> None:
    weight = row(-1.0, 0.11, 0.24, 2.75)
    half = dequantize(quantize(weight, FOUR, shrink=torch.tensor([[0.5]])))
    assert half.tolist() == [[-0.5, 0.125, 0.25, 1.375]]


@given(
    bits=st.sampled_from([3, 4, 8]),
    symmetric=st.booleans(),
    exponent=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_error_is_at_most_half_a_step_inside_the_range(
    bits: int, symmetric: bool, exponent: float, seed: int
) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    quantized = quantize(weight, Scheme(bits, 16, symmetric))
    step = quantized.scales.float().repeat_interleave(16, dim=1)
    # The scale's own rounding, up to 2^-9 of it, and that of the zero point move the ends of the range inwards.
    ends = step * (0.5 + 2**bits * 2**-9)
    assert torch.all((dequantize(quantized) - weight).abs() <= (step / 2 + ends) * 1.0001)
    assert int(quantized.q.max()) < 2**bits


@given(st.floats(1e-12, 6e4))
def test_scales_are_exact_in_both_half_precisions(value: float) -> None:
    scale = round_scales(torch.tensor([value]))
    assert scale.dtype == torch.float16 and scale > 0
    assert torch.equal(scale.to(torch.bfloat16).float(), scale.float())
    if value > 2**-14:  # where float16 is not subnormal
        assert abs(scale.item() / value - 1) <= 2**-8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(SchemeError, match="NaN or infinity"):
        quantize(row(1.0, 2.0, bad, 3.0), FOUR)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(SchemeError, match="65504"):
        quantize(row(0.0, 0.0, 0.0, 1e7), FOUR)


def test_a_group_size_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(SchemeError, match="group size = 128 for a weight with 192 inputs.*--group-size 64"):
        quantize(torch.ones(8, 192), Scheme(4, 128))


@pytest.mark.parametrize(("bits", "group_size"), [(1, 128), (9, 128), (5, 128), (4, 0), (4, -2)])
def test_a_scheme_that_cannot_be_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(SchemeError):
        Scheme(bits, group_size)
