"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

A few input channels are much louder than the rest, and the rounding of their weights makes most of the error. Scaling
such a channel up before rounding, and its input down by the same factor, leaves the product as it is and shrinks the
channel's share of the error (paper, eq. 4):

    L(s) = || (Q(W diag(s)) diag(s)^-1 - W) X' ||^2        s* = argmin L(s)

The search runs over one exponent (eq. 5), with x the root mean square of each channel:

    s = x^a        a in {0, 0.05, ..., 0.95}, every fourth first, then nearer and nearer neighbours of the best

The inverse factor goes into the operation before (`blocks.Site`) and costs nothing when served. Q clips: each group's
range is narrowed by the factor that suits it best (`scheme.search`), which gives its outermost weights an error and all
others a finer step. a = 0 without clipping is round-to-nearest. With `--method awq+gptq` the folds are the same and the
rounding is GPTQ's.

Every loss is a trace with the Gram matrix G of the inputs (`walk.InputStats`), so nothing is run forward:

    || (W - What) X' ||^2 / tokens = tr(D G D')      D = W - What

Scales are ranked by its largest part, the groups' own errors (`scheme.least_error`), on a sample of the rows; what one
group's error adds to another's is in the last search of the clipping. (KL over all judged tokens at 4 bits 0.0039 so,
0.0042 with the whole trace of all rows, which takes a third more time, and three times as long on wide layers.)

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
from quantize.scheme import SHRINKS, Scheme, diagonal_blocks, least_error
from quantize.walk import InputStats

EXPONENTS = tuple(i / 20 for i in range(20))
STRIDES = (4, 2, 1)
"""Of the exponents: all of the first, then the two neighbours of the best."""
CLIPPED = SHRINKS[::2]
"""The factors that a scale is ranked with."""
ROWS = 256
"""Of each layer at most: they rank the scales as all of them do."""
_QUIETEST = 1e-4  # of the loudest channel: one that never spoke on the calibration data may speak later


@torch.no_grad()
def best_scale(weights: Sequence[tuple[Tensor, Scheme]], seen: InputStats, site: Site, heads: Heads) -> Tensor:
    """The scale [in] of least loss over the grid, summed over `weights` [out, in], which share the input `seen`.

    No scale at all, which is a = 0, is among those tried.
    """
    loudness = tie(seen.gram.diagonal().sqrt(), site, heads)
    sampled = [(weight[:: -(-len(weight) // ROWS)], scheme, len(weight)) for weight, scheme in weights]
    blocks = {scheme: diagonal_blocks(seen.gram, scheme.groups(len(seen.gram))) for _, scheme, _ in sampled}

    def total(exponent: float) -> float:
        scale = _scale(loudness, exponent)
        found = 0.0
        for weight, scheme, rows in sampled:
            inverse = (1 / scale).view(len(blocks[scheme]), -1)
            gram = blocks[scheme] * inverse[:, :, None] * inverse[:, None, :]
            found += least_error(weight * scale, scheme, gram, CLIPPED) * rows / len(weight)
        return found

    losses: dict[int, float] = {}
    near = 0
    for stride in STRIDES:
        everywhere = range(0, len(EXPONENTS), stride)
        for i in (near - stride, near + stride) if losses else everywhere:
            if i not in losses and 0 <= i < len(EXPONENTS):
                losses[i] = total(EXPONENTS[i])
        near = min(losses, key=losses.__getitem__)
    return _scale(loudness, EXPONENTS[near])


def _scale(x: Tensor, exponent: float) -> Tensor:
    """x^a; the geometric middle of its range is 1, which keeps the numbers in range."""
    scale = x.clamp(min=_QUIETEST * float(x.max())) ** exponent
    return scale / torch.sqrt(scale.max() * scale.min())
