"""SmoothQuant: making activations as easy to quantize as weights (Xiao et al., arXiv 2211.10438).

With 8-bit activations a token's scale is set by its loudest channel, and every other channel of that token gets what
resolution is left. The channels that are loud are so for all tokens, while weights are even; so part of the difficulty
is moved from the one to the other, in a factor that the operation before takes up (paper, eq. 3-4):

    Y = (X diag(s)^-1) (diag(s) W')        s_j = max|X_j|^a / max|W_j|^(1 - a)

a = 1/2 shares it evenly, the paper's choice for most models. As there, only the inputs that come out of a norm are
smoothed: those of attention's output and of down_proj are left as they are.
"""

import torch
from torch import Tensor

STRENGTH = 0.5
"""The paper's alpha."""

_QUIETEST = 1e-5  # of the loudest: the paper's code clamps both maxima there


def smoothing(loudest: Tensor, heaviest: Tensor, strength: float = STRENGTH) -> Tensor:
    """s [in] from max|X_j| and max|W_j|, [in] each; a channel that is silent or unread is left alone."""
    scale = loudest.clamp(min=_QUIETEST) ** strength / heaviest.clamp(min=_QUIETEST) ** (1 - strength)
    return torch.where((loudest == 0) | (heaviest == 0), torch.ones_like(scale), scale)
