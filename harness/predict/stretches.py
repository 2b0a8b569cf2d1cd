"""What a simulation leaves behind: its requests, and runs of like steps from which every token's time can be rebuilt.

A stretch is `steps` steps in a row that give the same sequences a token each. Step j = 0, 1, … of it takes
first_s + growth_s · j (each step the cache to read has grown by a token a sequence), so it ends at

    start_s + first_s · (j + 1) + growth_s · (j + 1) · j / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Stretch(NamedTuple):
    """Like steps in a row. Of the `sequences` that get a token in each of them, `decoding` had one before; the others
    end their prompts, which only single steps do."""

    start_s: float
    sequences: int
    steps: int
    first_s: float
    growth_s: float
    decoding: int

    def after(self, steps: int) -> float:
        """When so many of its steps are over, s."""
        return self.start_s + (self.first_s * steps + self.growth_s * (steps * (steps - 1) / 2))

    @property
    def end_s(self) -> float:
        return self.after(self.steps)

    def steps_until(self, time_s: float) -> int:
        """How many of such steps, at least one, it takes until one ends at this time or later."""
        if time_s <= self.after(1):
            return 1
        # The root of first·k + growth·k·(k − 1)/2 = left in the form that needs no growth; then to the exact step.
        left, middle = time_s - self.start_s, self.first_s - self.growth_s / 2
        steps = math.ceil(2 * left / (middle + math.sqrt(middle * middle + 2 * self.growth_s * left)))
        while self.after(steps) < time_s:
            steps += 1
        while self.after(steps - 1) >= time_s:
            steps -= 1
        return steps


class Stay(NamedTuple):
    """A request's time among the running, once its prompt was computed: a token at first_s (the server's clock), then
    one in each of `decodes` decode steps from number `decode` on. One stay unless it was preempted."""

    first_s: float
    decode: int
    decodes: int


@dataclass(slots=True)
class Served:
    """A request that got all its tokens. Times in s; the first and the last token's as the client sees them."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    user: int
    sequence: int
    scheduled_s: float
    """When the step began in which its prompt was first worked on."""
    first_token_s: float
    last_token_s: float
    preemptions: int
    stays: tuple[Stay, ...]


@dataclass(frozen=True)
class Simulation:
    """One simulated load, from the first arrival to the last token."""

    served: list[Served]
    """In the order in which they ended."""
    steps: int
    preemptions: int
    running_peak: int
    waiting_peak: int
    """Most requests that a step left waiting."""
    kv_peak: float
    """Largest share of the blocks in use."""
    busy_s: float
    """Time in which a step ran."""
    end_s: float
    """When the last step ended."""
    token_s: float
    """From the end of a step to the client."""
    stretches: list[Stretch] = field(repr=False)

    @cached_property
    def _step_ends(self) -> tuple[Floats, NDArray[np.int64], Floats]:
        """End of each step as the client sees it [steps], tokens given before each step and in all [steps + 1], and
        the ends of the decode steps alone, in the order of their numbers."""
        columns = np.array([tuple(stretch) for stretch in self.stretches], float).reshape(-1, len(Stretch._fields)).T
        steps = columns[2].astype(np.int64)
        start, sequences, _, first, growth, decoding = np.repeat(columns, steps, axis=1)
        done = np.arange(1, len(start) + 1) - np.repeat(np.cumsum(steps) - steps, steps)
        # Term by term as Stretch.after has it, so that both come to the same bits.
        ends = start + (first * done + growth * (done * (done - 1) / 2)) + self.token_s
        given = np.concatenate([[0], np.cumsum(sequences.astype(np.int64))])
        return ends, given, ends[decoding > 0]

    def tokens_between(self, start_s: float, end_s: float) -> int:
        """Tokens that reach clients at start_s ≤ t < end_s: windows that touch share none and lose none."""
        ends, given, _ = self._step_ends
        first, last = np.searchsorted(ends, [start_s, end_s])
        return int(given[max(first, last)] - given[first])

    def token_times(self, served: Served) -> Floats:
        """When each token of one of its requests reaches the client, s [output_tokens]."""
        decodes = self._step_ends[2]
        return np.concatenate(
            [
                np.concatenate([[stay.first_s + self.token_s], decodes[stay.decode : stay.decode + stay.decodes]])
                for stay in served.stays
            ]
        )
