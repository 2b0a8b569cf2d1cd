"""Did fewer bits bring the FLOP ceiling closer, or just relieve bandwidth? Judged by rules, on the linear layers.

Linear layers are what quantization changes, and they are taken as one: multiplying alone (BF16), unpacking and
multiplying (INT4), output head included. With the interval of their ratio, base time / other time, and the ridge:

    interval holds 1, or there is none      undecided
    below 1                                 slower: unpacking costs more than the saved bytes bring
    above 1, no work known                  faster
    above 1, base right of the ridge        at peak: operations bounded it before, bits change none of them
    above 1, base below NEAR of its roof    elsewhere: neither ceiling was near, so neither was relieved
    above 1, not fewer bytes                elsewhere
    above 1, other right of the ridge       closer: bytes bounded it before, operations do now
    above 1, other left of it               relieved: bytes bound both

A prefill is one sample: nothing is judged of its ratio, only on which side of the ridge its work lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.analysis.ceilings import LINEARS, Ceiling, Phase, Point, side
from harness.analysis.compare import Estimate

Answer = Literal["relieved", "closer", "at peak", "elsewhere", "faster", "slower", "undecided"]

NEAR = 0.3
"""Share of its roof from which a kernel counts as held back by it. Below, more of the ceiling would change little."""
CACHED = 1.0
"""Share of the bandwidth beyond which weights came out of a cache: memory cannot have delivered them."""


@dataclass(frozen=True, slots=True)
class Relief:
    """One precision's linear layers against the baseline's, in one phase."""

    phase: Phase
    answer: Answer
    ratio: Estimate
    """How many times as fast they are."""
    base: Point | None
    other: Point | None
    """None: the work is not known."""

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes of the other / of the baseline."""
        return self.other.work.bytes / self.base.work.bytes if self.base and self.other else None

    @property
    def realised(self) -> float | None:
        """Time saved / time that the saved bytes take at the baseline's own GB/s; None where no bytes are saved.

        1: bytes went at the rate of before. Below: part of the gain went into unpacking. Above: they went faster too.
        """
        if self.base is None or self.other is None or self.other.work.bytes >= self.base.work.bytes:
            return None
        hoped = self.base.ms * (1 - self.other.work.bytes / self.base.work.bytes)
        return (self.base.ms - self.other.ms) / hoped


def relief(
    phase: Phase, base: Sequence[Point], other: Sequence[Point], ratio: Estimate, ceiling: Ceiling | None
) -> Relief:
    """Judge one phase. `ratio` is of the linear layers' times; the points are all those of the two precisions."""
    one, two = linears(base, phase), linears(other, phase)
    return Relief(phase, _answer(one, two, ratio, ceiling), ratio, one, two)


def linears(points: Sequence[Point], phase: Phase) -> Point | None:
    """The linear layers as one; None where their work is not known."""
    return next((point for point in points if point.phase == phase and point.kind == LINEARS), None)


def cached(point: Point, ceiling: Ceiling) -> bool:
    """Whether more was read than memory delivers, so that a bandwidth ceiling of memory says nothing."""
    return point.shares(ceiling)[0] > CACHED


def _answer(base: Point | None, other: Point | None, ratio: Estimate, ceiling: Ceiling | None) -> Answer:
    if ratio.lo is None or ratio.hi is None or ratio.lo <= 1 <= ratio.hi:
        return "undecided"
    if ratio.hi < 1:
        return "slower"
    if base is None or other is None or ceiling is None:
        return "faster"
    if side(base.work, ceiling) == "compute":
        return "at peak"
    if max(base.shares(ceiling)) < NEAR or other.work.bytes >= base.work.bytes:
        return "elsewhere"
    return "closer" if side(other.work, ceiling) == "compute" else "relieved"
