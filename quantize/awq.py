"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

A few input channels are much louder than the rest, and the rounding of their weights makes most of the error. Scaling
such a channel up before rounding, and its input down by the same factor, leaves the product as it is and shrinks the
channel's share of the error (paper, eq. 4):

    L(s) = || (Q(W diag(s)) diag(s)^-1 - W) X' ||^2        s* = argmin L(s)

The search runs over one exponent (eq. 5), with x the root mean square of each channel:

    s = x^a        a in {0, 0.05, ..., 0.95}, every second first, then the neighbours of the best

The inverse factor goes into the operation before (`blocks.Site`) and costs nothing when served. Q clips: each group's
range is narrowed by the factor that suits it best (`scheme.search`), which gives its outermost weights an error and all
others a finer step. a = 0 without clipping is round-to-nearest: the search starts there and leaves it only for less
loss. With `--method awq+gptq` the folds are the same and the rounding is GPTQ's.

Every loss is a trace with the Gram matrix G of the inputs (`walk.InputStats`), so nothing is run forward:

    || (W - What) X' ||^2 / tokens = tr(D G D')      D = W - What

Where this differs from the authors' code, and why (KL in nats of the demo model at 4 bits, 65,536 tokens of
calibration, over windows / over conversations; differences of a tenth are within what another draw of text does):
- Theirs searches the scale without clipping and clips afterwards. The two compete for the same error: for the first
  down_proj of an earlier demo model the scale that was best alone ended at a loss of 0.0041 with clipping, and no scale
  at all did too. Here each scale is scored with the clipping that it will get.
- Their x is the mean |x|. The loss is of squares, and with the root mean square it is 0.0056 / 0.0035, with the mean
  0.0067 / 0.0057.
- They clip each group as if the others made no error. One more round, with what the others leave, is
  0.0053 / 0.0021 where without it is 0.0070 / 0.0067.
- Their second grid, s = x^a / w^(1-a) with the weights' magnitude w, added 2 % at most, and is left out.
- They do not clip q and k. Here the trace is the judge.
- With grouped-query attention they leave v_proj -> o_proj out. Here the channels that share a row of v_proj share a
  factor (`blocks.tie`).
- They take the error of q, k and v after the softmax; here it is that of the three products, summed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.blocks import Heads, Site, tie
from quantize.scheme import Scheme, search
from quantize.walk import InputStats

EXPONENTS = tuple(i / 20 for i in range(20))
_QUIETEST = 1e-4  # of the loudest channel: one that never spoke on the calibration data may speak later


@torch.no_grad()
def best_scale(weights: Sequence[tuple[Tensor, Scheme]], seen: InputStats, site: Site, heads: Heads) -> Tensor:
    """The scale [in] of least loss over the grid, summed over `weights` [out, in], which share the input `seen`.

    No scale at all, which is a = 0, is among those tried.
    """
    loudness = tie(seen.gram.diagonal().sqrt(), site, heads)

    def total(exponent: float) -> float:
        scale = _scale(loudness, exponent)
        gram = seen.gram / torch.outer(scale, scale)
        return sum(search(weight * scale, scheme, gram, sweeps=0)[1] for weight, scheme in weights)

    losses = {exponent: total(exponent) for exponent in EXPONENTS[::2]}
    near = EXPONENTS.index(min(losses, key=losses.__getitem__))
    losses |= {
        exponent: total(exponent) for exponent in EXPONENTS[max(near - 1, 0) : near + 2] if exponent not in losses
    }
    return _scale(loudness, min(losses, key=losses.__getitem__))


def _scale(x: Tensor, exponent: float) -> Tensor:
    """x^a; the geometric middle of its range is 1, which keeps the numbers in range."""
    scale = x.clamp(min=_QUIETEST * float(x.max())) ** exponent
    return scale / torch.sqrt(scale.max() * scale.min())
