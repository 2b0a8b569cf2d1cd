"""The KV cache as the scheduler counts it: blocks free, and when each decoding sequence will want its next one.

A sequence that decodes grows by one token a step, so it needs a new block every `size` steps. Let decode steps be
numbered, d = 0, 1, …, and a sequence have `cached` tokens before step d: it needs a block in that step if size divides
cached, so ever after in the steps that leave the same remainder, (d − cached) mod size, its phase. How many sequences
have each phase is all that is kept: what any number of steps will need is then known without looking at a sequence.
"""

from __future__ import annotations


class Blocks:
    """`total` blocks of `size` tokens. Numbers of decode steps are the scheduler's."""

    __slots__ = ("free", "size", "total", "_phases", "_sequences")

    def __init__(self, total: int, size: int) -> None:
        self.total = self.free = total
        self.size = size
        self._phases = [0] * size
        self._sequences = 0

    def holding(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        return -(-tokens // self.size)

    def take(self, blocks: int) -> bool:
        """Takes blocks if so many are free; whether it did."""
        if blocks > self.free:
            return False
        self.free -= blocks
        return True

    def give(self, blocks: int) -> None:
        self.free += blocks

    def join(self, step: int, cached: int) -> None:
        """A sequence with so many cached tokens decodes from this step on."""
        self._phases[(step - cached) % self.size] += 1
        self._sequences += 1

    def leave(self, step: int, cached: int) -> None:
        """A sequence with so many cached tokens decodes no more; this step would have been its next."""
        self._phases[(step - cached) % self.size] -= 1
        self._sequences -= 1

    def needed(self, step: int, steps: int) -> int:
        """Blocks that all decoding sequences need in so many steps, this one the first: exact, in no time."""
        rounds, rest = divmod(steps, self.size)
        first = step % self.size
        last = first + rest
        partly = sum(self._phases[first:last])
        if last > self.size:
            partly += sum(self._phases[: last - self.size])
        return rounds * self._sequences + partly

    def lasting(self, step: int) -> int:
        """For how many steps, this one the first, the free blocks suffice. Something must decode."""
        steps = self.free // self._sequences * self.size
        left = self.free % self._sequences
        while (left := left - self._phases[(step + steps) % self.size]) >= 0:
            steps += 1
        return steps
