"""GPTQ: rounding column by column, each making up for the errors of those before (Frantar et al., arXiv 2210.17323).

The output error of a layer is tr(D H D'), D = W - What, H = X'X / tokens + damping. With the columns in some order, let

    H = R R'        R upper triangular (Cholesky of H with rows and columns reversed)

    tr(D H D') = ||D R||^2 = sum over j of || D_j R_jj + sum over k<j of D_k R_kj ||^2

Column j of D R holds only the errors of columns up to j, so going from the first to the last each term is made small by
rounding not w_j but

    w_j + (sum over k<j of D_k R_kj) / R_jj       D_k = w_k - what_k

to its grid. That is GPTQ exactly (the paper's eq. 2-3: its Cholesky factor of H^-1 is R^-1), with the error handed on
as it is made rather than the weights kept up to date, and without inverting anything: one Cholesky of n^3/3 in place of
three, and one product more accurate. What is left of each column's term is the layer's loss, which comes for free.

- Blocks (paper, section 3.3 "lazy batch-updates"): the errors of finished blocks reach a block of columns in one matrix
  product; only inside the block they go column by column.
- Order ("act order"): columns with the largest H_jj first, while most others can still make up for them. The groups'
  scales are set beforehand from the original columns (static groups), so the order leaves no trace in the file.
- Layers that share their input share H and R, so they are stacked and done as one matrix: the columns are walked once.
- Damping: each diagonal element grows by a share of itself, so that it means the same for quiet channels as for loud
  ones, and the same before and after a fold. (The paper adds 1 % of the mean, which on a model with outlier channels is
  large beside the quiet ones: KL at 4 bits 0.0148 nat so, 0.0118 as here; at 3 bits 0.051 and 0.040.) Where the
  Cholesky fails all the same the share is ten times as large each time, and that is said (`Factor.damping`). A column
  whose input was never seen (H_jj = 0) is rounded to nearest: its weight is kept, since the calibration text is not all
  that will be served, and it has no say in any other's rounding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import RunError
from quantize.scheme import Grid, Scheme

BLOCK = 128
"""Columns that are walked one by one before their errors go on in one product (the paper's B)."""

DAMPING = 0.003
"""Of H's diagonal."""

DAMPING_AT_2_BITS = 0.03
"""There the errors that are handed on are as large as the weights (KL over windows: 0.36 nat so, 0.44 with 0.003)."""

_LEAST = 1e-4
"""Of its mean, added besides: so that a channel that was never seen has a diagonal, too."""

_DAMPINGS = 7  # the last, 3000 times the diagonal, is round to nearest in all but name


@dataclass(frozen=True)
class Factor:
    """H = R R' with the columns in `order` (int64 [in]); `upper` is R with each column divided by its R_jj, [in, in].

    damping: the share of H's diagonal that the Cholesky needed; 0 where no token was seen, and R is the identity.
    """

    order: Tensor
    upper: Tensor
    damping: float


@torch.no_grad()
def factor(gram: Tensor, *, order: bool = True, damping: float = DAMPING) -> Factor:
    """The factor of `gram` [in, in], damped as little as it takes; `order` puts the largest diagonal first.

    Raises RunError where no damping makes it positive definite, which is to say that it holds NaN or infinity.
    """
    diagonal = gram.diagonal()
    by = torch.arange(len(gram), device=gram.device)
    if order:
        by = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.mean())
    if mean == 0:
        return Factor(by, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), 0.0)
    if mean < 0 or not math.isfinite(mean):
        raise RunError("a Hessian that is none", "finite inputs", "Check the calibration text")
    backward = by.flip(0)
    reversed_h = gram[backward[:, None], backward]
    plain = reversed_h.diagonal().clone()
    for _ in range(_DAMPINGS):
        reversed_h.diagonal().copy_(damp(plain, damping))
        lower, failed = torch.linalg.cholesky_ex(reversed_h)
        if not int(failed):
            del reversed_h
            upper = lower.flip(0, 1)
            return Factor(by, upper.div_(upper.diagonal().clone()), damping)
        damping *= 10
    raise RunError("a Hessian that no damping makes positive definite", "finite inputs", "Check the calibration text")


def damp(diagonal: Tensor, damping: float) -> Tensor:
    """`diagonal` [in] of H as it is factored."""
    return diagonal + damping * diagonal.abs() + damping / DAMPING * _LEAST * diagonal.mean()


@torch.no_grad()
def round_columns(weight: Tensor, found: Factor, scheme: Scheme, points: Grid, block: int = BLOCK) -> Tensor:
    """The integers, uint8 [out, in], of `weight` [out, in] on the grid `points`, in the order of the factor.

    Computed in the type of the factor. Everything is kept transposed, so that a column of the weight is one stretch of
    memory.
    """
    rows, columns = weight.shape
    w = weight.T[found.order].to(found.upper.dtype)
    scales, zeros = points.scales.T.to(w.dtype), points.zeros.T.to(w.dtype)  # [groups, out]
    group = (found.order // (columns // len(scales))).tolist()
    q, errors = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        wanted = torch.addmm(w[start:end], found.upper[:start, start:end].T, errors[:start])
        inner = found.upper[start:end, start:end].T.contiguous()
        made = errors[start:end]
        for j in range(end - start):
            target = torch.addmv(wanted[j], made[:j].T, inner[j, :j])
            scale, zero = scales[group[start + j]], zeros[group[start + j]]
            integers = (torch.round(target / scale) + zero).clamp_(0, scheme.highest)
            q[start + j] = integers
            torch.addcmul(w[start + j], integers - zero, scale, value=-1, out=made[j])
    result = torch.empty_like(q, dtype=torch.uint8)
    result[found.order] = q.to(torch.uint8)
    return result.T.contiguous()
