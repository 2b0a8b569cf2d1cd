"""Who asks when, in virtual time: the same users, lengths and window as a measured cell (load/window.py).

    users  |..warm-up..|-------- measured --------|---- held ----|

Lengths are drawn as for a measurement, from the same seeds, so a predicted cell is asked what a measured one would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile
from typing import Protocol

from harness.load.schedule import Arrival, arrivals, pace
from harness.load.window import TRACE_WARMUP_SHARE
from harness.load.workload import drawn_lengths
from harness.predict.limits import Asked, Load
from harness.predict.stretches import Served
from harness.records import Cell, Phase, Scenario


class CellLoad(Load, Protocol):
    """The load of one cell, and when measuring began and ended in it, s; None: it did not."""

    open_s: float | None
    close_s: float | None

    def phase(self, served: Served) -> Phase: ...


class Users:
    """A closed loop: each user asks again once answered, until the last measured request has ended."""

    def __init__(self, scenario: Scenario, cell: Cell) -> None:
        self.open_s: float | None = None
        self.close_s: float | None = None
        self._scenario, self._cell = scenario, cell
        self._pauses = [pace(scenario, cell, user) for user in range(cell.conc)]
        # As load/window.py has it: fewer, and the window would be one wave of requests and its ebb.
        self._least = max(scenario.requests, 3 * cell.conc)
        self._rounds: Counter[int] = Counter()
        self._warm = self._measured = self._left = 0
        self._begun: dict[int, float] = {}

    def first(self) -> Iterable[Asked]:
        return [self._asked(user, 0, 0.0) for user in range(self._cell.conc)]

    def after(self, served: Served) -> Asked | None:
        now = served.last_token_s
        if self.open_s is None:
            self._rounds[served.user] += 1
            self._warm += self._rounds[served.user] == self._scenario.warmup_rounds
            if self._warm == self._cell.conc:
                self.open_s = now
        elif self.phase(served) == "measured":
            self._measured += 1
            self._left -= 1
            if self.close_s is None and self._enough(now):
                self.close_s = now
                others = (begun for user, begun in self._begun.items() if user != served.user)
                self._left = sum(self.open_s <= begun < now for begun in others)
        if self.close_s is not None and self._left == 0:
            return None
        return self._asked(served.user, served.sequence + 1, now)

    def phase(self, served: Served) -> Phase:
        if self.open_s is None or served.arrival_s < self.open_s:
            return "warmup"
        return "measured" if self.close_s is None or served.arrival_s < self.close_s else "held"

    def _enough(self, now: float) -> bool:
        assert self.open_s is not None
        window = now - self.open_s
        if window >= self._scenario.max_window_s:
            return True
        return self._measured >= self._least and window >= self._scenario.min_window_s

    def _asked(self, user: int, sequence: int, now: float) -> Asked:
        begins = now + next(self._pauses[user])
        self._begun[user] = begins
        return Asked(begins, *_lengths(self._scenario, self._cell, user, sequence), user, sequence)


class Arrivals:
    """An open loop: requests come whether or not the ones before are answered, until enough have come in the window."""

    def __init__(self, asked: Sequence[Asked], open_s: float, requests: int) -> None:
        inside = [item for item in asked if item.arrival_s >= open_s]
        self.open_s: float | None = open_s if inside else None
        # The last one that counts is inside the window, which ends with it.
        self.close_s: float | None = inside[min(requests, len(inside)) - 1].arrival_s * (1 + 1e-12) if inside else None
        self._asked = asked

    def first(self) -> Iterable[Asked]:
        return self._asked

    def after(self, served: Served) -> Asked | None:
        return None

    def phase(self, served: Served) -> Phase:
        if self.open_s is None or served.arrival_s < self.open_s:
            return "warmup"
        return "measured" if self.close_s is None or served.arrival_s <= self.close_s else "held"


@lru_cache(maxsize=1 << 18)
def _lengths(scenario: Scenario, cell: Cell, user: int, sequence: int) -> tuple[int, int]:
    """Drawn once for all precisions and cards: they are asked the same."""
    return drawn_lengths(scenario, cell, user, sequence)


def cell_load(scenario: Scenario, cell: Cell, trace: Sequence[Arrival] = ()) -> CellLoad:
    """The load of a cell as the scenario describes it; `trace` is its arrivals where it replays one."""
    cell = replace(cell, precision="")  # which nothing here depends on
    if cell.rate_rps is None:
        return Users(scenario, cell)
    warmup_s = scenario.warmup_s
    if trace:
        last = list(arrivals(scenario, cell, trace))[-1].offset_s
        warmup_s = min(warmup_s, TRACE_WARMUP_SHARE * last)
    # Until the window has its requests and its least length, and then as long again: the load is held.
    expected_s = warmup_s + max(scenario.requests / cell.rate_rps, scenario.min_window_s)
    coming = takewhile(lambda arrival: trace or arrival.offset_s < 1.5 * expected_s, arrivals(scenario, cell, trace))
    asked = []
    for number, arrival in enumerate(coming):
        drawn = _lengths(scenario, cell, number, 0)
        sizes = arrival.input_tokens or drawn[0], arrival.output_tokens or drawn[1]
        asked.append(Asked(arrival.offset_s, max(1, sizes[0]), max(2, sizes[1]), number))
    least = scenario.requests if not trace else len(asked)
    inside = sum(warmup_s <= item.arrival_s < warmup_s + scenario.min_window_s for item in asked)
    return Arrivals(asked, warmup_s, max(least, inside))
