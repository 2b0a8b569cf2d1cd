"""The reference quantizer: hand-computed groups, the bound on its error, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import SchemeError
from quantize.scheme import Scheme, dequantize, quantize, round_scales

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
    # max|w| = 3.5: s = 3.5/7 = 0.5, z = 8.
    quantized = quantize(row(-3.5, 0.0, 0.5, 1.2), Scheme(4, 4, symmetric=True))
    assert quantized.scales.item() == 0.5
    assert quantized.q.tolist() == [[1, 8, 9, 10]]
    assert dequantize(quantized).tolist() == [[-3.5, 0.0, 0.5, 1.0]]


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


@pytest.mark.parametrize(("bits", "group_size"), [(1, 128), (9, 128), (4, 0), (4, -1)])
def test_a_scheme_that_cannot_be_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(SchemeError):
        Scheme(bits, group_size)
