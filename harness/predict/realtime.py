"""The scheduler against a clock: what `simulate` does in virtual time, as time passes and nobody knows who asks next.

    ask ─► coming ──request_s──► Scheduler ─► a step begins ········ it ends ──token_s──► Tokens
                                                 └─ the next one begins ─┘

It reads no clock and never waits: its caller says what time it is, and asks when it is worth coming back (`due_s`). A
step begins when the one before ended, not when somebody looked: whoever looks late gets late tokens, with the times at
which they were due, and no later one is late for it. Fed with the arrivals of a simulation, it gives the same tokens at
the same times.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import NamedTuple

from harness.predict.scheduler import Asked, Limits, Request, Scheduler, StepTime


class Tokens(NamedTuple):
    """One token for each of `requests`, which reach their clients at `at_s`."""

    at_s: float
    requests: list[Request]


class State(NamedTuple):
    """What an engine tells of itself."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the blocks in use."""
    preemptions: int
    """Since the start."""


class Realtime:
    """An engine whose time is the caller's: seconds since whenever, from 0 on, never back."""

    def __init__(self, limits: Limits, steps: StepTime) -> None:
        self._limits = limits
        self._scheduler = Scheduler(limits, steps)
        self._coming: list[tuple[float, int, Asked]] = []
        """Heap of those on their way to the scheduler: when they arrive there, and their number."""
        self._number = 0
        self._inside: dict[Asked, Request] = {}
        self._leaving: deque[Tokens] = deque()
        """Tokens made, or in the making, in the order in which they go out."""
        self._free_s = 0.0
        """When the last step ends, or ended."""
        self._ending: list[Request] = []
        """Those whose last token the last step gives: the scheduler has let go of them when it begins."""

    @property
    def due_s(self) -> float:
        """When something happens next; infinity: nothing does before somebody asks."""
        return min(self._begins_s(), self._leaving[0].at_s if self._leaving else math.inf)

    def ask(self, asked: Asked) -> None:
        """A request is sent at asked.arrival_s. No two may have the same user and sequence.

        Raises InputError for one that could never be served.
        """
        self._limits.check(asked)
        heapq.heappush(self._coming, (asked.arrival_s + self._limits.request_s, self._number, asked))
        self._number += 1

    def drop(self, asked: Asked) -> None:
        """Its client has gone. The step that runs is not undone, but the next does without it."""
        request = self._inside.pop(asked, None)
        if request is not None:
            self._scheduler.drop(request)
            return
        self._coming = [item for item in self._coming if item[2] != asked]
        heapq.heapify(self._coming)

    def advance(self, now: float) -> Tokens | None:
        """The next tokens that are out by now; None: nothing more has happened yet. Call it until it says so.

        Who answers them by asking at once is still in time for the step that begins then.
        """
        while True:
            if self._leaving and self._leaving[0].at_s <= now:
                return self._leaving.popleft()
            begins_s = self._begins_s()
            if begins_s > now:
                return None
            self._begin(begins_s)

    def state(self, now: float) -> State:
        """Those that a step works on run until it ends, and hold their blocks as long."""
        scheduler, block_size = self._scheduler, self._limits.block_size
        ending = self._ending if now < self._free_s else []
        # The last token is given and never cached.
        held = sum(-(-(item.asked.input_tokens + item.asked.output_tokens - 1) // block_size) for item in ending)
        return State(
            running=len(scheduler.running) + len(ending),
            waiting=len(scheduler.waiting) + sum(at_s <= now for at_s, _, _ in self._coming),
            kv_usage=scheduler.kv_usage + held / self._limits.kv_blocks,
            preemptions=scheduler.preemptions,
        )

    def _begins_s(self) -> float:
        """When the next step begins, as far as it is known now."""
        if not self._scheduler.idle:
            return self._free_s
        return max(self._free_s, self._coming[0][0]) if self._coming else math.inf

    def _begin(self, now: float) -> None:
        """A step begins: with all that have arrived by now, as simulate has it."""
        while self._coming and self._coming[0][0] <= now:
            asked = heapq.heappop(self._coming)[2]
            self._inside[asked] = self._scheduler.add(asked)
        stretch, given, ended = self._scheduler.next_step(now)
        self._free_s = stretch.end_s
        if given:
            self._leaving.append(Tokens(stretch.end_s + self._limits.token_s, given))
        over = {(served.user, served.sequence) for served in ended}
        self._ending = [item for item in given if (item.asked.user, item.asked.sequence) in over] if over else []
        for request in self._ending:
            del self._inside[request.asked]
