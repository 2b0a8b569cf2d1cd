"""Token sequences of different lengths, in batches that a causal model can run.

Each is padded on the right, where causal attention keeps the padding from being seen: no mask is needed to run them,
only one to leave the padding out of what is counted afterwards. Sorting by length first leaves little of it: 3 % of the
built-in text's places, 17 % of the demo model's conversations, of 16 to 59 tokens each. The order that they come in
plays no part, so the same set gives the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS = 1024  # of one batch: enough to keep a matrix product busy (2048 were no quicker), little memory besides


@dataclass(frozen=True)
class Batch:
    """`ids`: int64 [sequences, length]; `real`: bool, the same shape, False where there is padding."""

    ids: Tensor
    real: Tensor


def batches(sequences: Sequence[Sequence[int]], tokens: int = _TOKENS) -> list[Batch]:
    """`sequences` by falling length, in batches of at most `tokens` places each, but never less than one sequence."""
    remaining = sorted((list(ids) for ids in sequences if ids), key=lambda ids: (-len(ids), ids))
    made = []
    while remaining:
        length = len(remaining[0])
        count = max(1, tokens // length)
        taken, remaining = remaining[:count], remaining[count:]
        made.append(
            Batch(
                torch.tensor([ids + [0] * (length - len(ids)) for ids in taken]),
                torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in taken]),
            )
        )
    return made
