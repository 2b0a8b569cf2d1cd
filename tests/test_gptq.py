"""GPTQ against its own definition: the columns one by one in float64, with the inverse Hessian and weights updated."""

import pytest
import torch
from torch import Tensor

from quantize import gptq
from quantize.errors import RunError
from quantize.rtn import find_grid
from quantize.scheme import Grid, Quantized, Scheme, dequantize, grid, loss, quantize, search, to_grid


def problem(columns: int = 128, rows: int = 24, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs, a few of them loud, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x[:, :5] *= 12
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x / tokens


def textbook(weight: Tensor, gram: Tensor, scheme: Scheme, points: Grid, order: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order (Frantar et al., eq. 2 and 3), nothing lazy and nothing factored.

    After column j is rounded, all columns not yet rounded move by -(w_j - q_j) / Hinv_jj * Hinv_j:, and row and column
    j are eliminated from the inverse.
    """
    columns = weight.shape[1]
    w = weight.clone()
    mean = gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + torch.diag(0.003 * gram.diagonal() + 1e-4 * mean))
    q = torch.zeros(weight.shape, dtype=torch.uint8)
    size = columns // points.scales.shape[1]
    left = order.tolist()
    while left:
        j = left.pop(0)
        scale, zero = points.scales[:, j // size].double(), points.zeros[:, j // size].double()
        integers = (torch.round(w[:, j] / scale) + zero).clamp(0, scheme.highest)
        q[:, j] = integers.to(torch.uint8)
        error = (w[:, j] - (integers - zero) * scale) / inverse[j, j]
        w[:, left] -= torch.outer(error, inverse[j, left])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("order", [True, False])
def test_the_integers_are_those_of_the_textbook(bits: int, symmetric: bool, group_size: int, order: bool) -> None:
    weight, gram = problem()
    scheme = Scheme(bits, group_size, symmetric)
    points = grid(weight, scheme)
    found = gptq.factor(gram, order=order)
    expected = textbook(weight, gram, scheme, points, found.order)
    assert torch.equal(gptq.round_columns(weight, found, scheme, points), expected)


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_the_size_of_a_block_changes_nothing(block: int) -> None:
    weight, gram = problem(columns=96)
    scheme = Scheme(3, 32)
    points, found = grid(weight, scheme), gptq.factor(gram)
    expected = gptq.round_columns(weight, found, scheme, points)
    assert torch.equal(gptq.round_columns(weight, found, scheme, points, block), expected)


@pytest.mark.parametrize("seed", range(5))
def test_float32_is_as_good_as_float64(seed: int) -> None:
    weight, gram = problem(columns=256, rows=64, tokens=2048, seed=seed)
    scheme = Scheme(4, 128, symmetric=True)
    points = find_grid(weight, scheme, "mse", gram)
    losses = []
    for dtype in (torch.float64, torch.float32):
        q = gptq.round_columns(weight.to(dtype), gptq.factor(gram.to(dtype)), scheme, points)
        losses.append(loss(weight - dequantize(Quantized(q, *points)).double(), gram))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_much_less_than_rounding_to_nearest(bits: int) -> None:
    weight, gram = problem(columns=256, rows=64)
    scheme = Scheme(bits, 64, symmetric=True)
    points = grid(weight, scheme)
    q = gptq.round_columns(weight, gptq.factor(gram), scheme, points)
    nearest = loss(weight - dequantize(Quantized(to_grid(weight, points, scheme), *points)), gram)
    assert loss(weight - dequantize(Quantized(q, *points)), gram) < nearest / 2


def test_the_largest_diagonal_comes_first() -> None:
    _, gram = problem()
    assert set(gptq.factor(gram).order[:5].tolist()) == set(range(5))


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weight, _ = problem()
    scheme = Scheme(4, 32)
    points = grid(weight, scheme)
    gram = torch.diag(torch.rand(128, dtype=torch.float64) + 0.1)
    assert torch.equal(gptq.round_columns(weight, gptq.factor(gram), scheme, points), quantize(weight, scheme).q)


def test_a_column_that_no_token_moved_is_rounded_to_nearest_and_disturbs_no_other() -> None:
    weight, gram = problem()
    gram[7, :], gram[:, 7] = 0, 0
    scheme = Scheme(4, 32)
    points, found = grid(weight, scheme), gptq.factor(gram)
    q = gptq.round_columns(weight, found, scheme, points)
    assert torch.equal(q[:, 7], quantize(weight, scheme).q[:, 7])
    changed = weight.clone()
    changed[:, 7] = weight[:, 7].flip(0)
    others = torch.arange(128) != 7
    again = gptq.round_columns(changed, found, scheme, points)
    assert torch.equal(again[:, others], q[:, others])


def test_a_layer_that_no_token_reached_is_rounded_to_nearest() -> None:
    weight, _ = problem()
    scheme = Scheme(4, 32)
    found = gptq.factor(torch.zeros(128, 128))
    assert found.damping == 0
    q = gptq.round_columns(weight, found, scheme, grid(weight, scheme))
    assert torch.equal(q, quantize(weight.float(), scheme).q)


def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    _, gram = problem()
    broken = gram.clone()
    size = gram.diagonal()[:20].sqrt()
    broken[:20, :20] = 1.3 * torch.outer(size, size)  # correlations of 1.3
    broken.diagonal().copy_(gram.diagonal())
    found = gptq.factor(broken)
    assert found.damping >= 0.3
    assert torch.isfinite(found.upper).all()
    assert gptq.factor(gram).damping == gptq.DAMPING


def test_a_hessian_with_nan_is_refused() -> None:
    _, gram = problem()
    gram[3, 4] = gram[4, 3] = float("nan")
    with pytest.raises(RunError, match="no damping"):
        gptq.factor(gram)
    gram[0, 0] = float("nan")
    with pytest.raises(RunError, match="that is none"):
        gptq.factor(gram)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_grid_is_no_worse_for_the_weights(symmetric: bool) -> None:
    weight, gram = problem()
    scheme = Scheme(3, 32, symmetric)
    plain = loss(weight - dequantize(quantize(weight, scheme)))
    found, least = search(weight, scheme)
    assert least < plain
    assert loss(weight - dequantize(found)) == pytest.approx(least)
    by_output, seen = search(weight.float(), scheme, gram.float())
    assert loss(weight.float() - dequantize(by_output), gram.float()) == pytest.approx(seen)
    assert seen < loss(weight - dequantize(quantize(weight, scheme)), gram)
