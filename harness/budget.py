"""What a search may still cost: cells and minutes, shared evenly by the precisions that are left.

The share of minutes counts from the start of the sweep, so engine starts and quantizing are in it. A cell whose likely
end lies beyond the share is not begun, and the window of one that is begun closes with it: what comes after is the end
of the requests that are under way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis.levels import USERS
from harness.records import Scenario, SweepPoint
from harness.search import WORDS, Search, bracket, next_load

_AROUND_S = 2.0
"""Of a cell, beside its load: the counters before and after, and the row."""


@dataclass(frozen=True, slots=True)
class Budget:
    """One precision's share. Times are of time.monotonic, seconds."""

    search: Search
    began_s: float
    deadline_s: float
    last_cell: int
    """How many rows the whole sweep may have when this precision is through."""

    @staticmethod
    def share(search: Search, rows: int, began_s: float, precisions_left: int) -> Budget:
        """An even part of what `rows` finished cells and the time since `began_s` have left."""
        now = time.monotonic()
        minutes_end = began_s + search.max_minutes * 60
        cells = max(0, search.max_cells - rows)
        return Budget(
            search,
            began_s,
            now + (minutes_end - now) / precisions_left,
            rows + math.ceil(cells / precisions_left),
        )

    def next_load(self, own: Sequence[SweepPoint], rows: int, scenario: Scenario) -> tuple[int | None, str]:
        """The next concurrency of a precision with the rows `own`, or None; and in words where the search stands."""
        wanted, known = next_load(own, self.search), bracket(own, self.search.slo)
        where = "nothing measured yet"
        if known is not None:
            upper = "no load tested is surely outside" if known.high is None else f"surely outside from {known.high}"
            kept = f"up to {USERS.amount(known.low)}" if known.low else "by no tested load for sure"
            where = f"{self.search.slo.words} is kept {kept}, {upper}"
        minutes = (time.monotonic() - self.began_s) / 60
        spent = f"{rows} of {self.search.max_cells} cells, {minutes:.1f} of {self.search.max_minutes:g} min"
        if isinstance(wanted, str):
            return None, f"{where}: {WORDS[wanted]} ({spent})"
        if rows >= self.last_cell:
            return None, f"{where}: its share of the cells is used up ({spent})"
        if time.monotonic() + seconds(wanted, own, scenario) > self.deadline_s:
            return None, f"{where}: {USERS.amount(wanted)} would take longer than its share of the minutes ({spent})"
        return wanted, f"{where}: next {wanted} ({spent})"

    def window(self, scenario: Scenario) -> Scenario:
        """The scenario with windows that end with the share of minutes."""
        left_s = max(0.1, self.deadline_s - time.monotonic())
        longest = min(scenario.max_window_s, left_s)
        return replace(scenario, max_window_s=longest, min_window_s=min(scenario.min_window_s, longest))


def seconds(conc: int, own: Sequence[SweepPoint], scenario: Scenario) -> float:
    """How long a cell is likely to take, by the most requests a second that a row of this precision has had.

    Warm-up rounds and the last answers are a round of all users each: conc / X.
    """
    most = max((point.req_s or 0.0 for point in own), default=0.0)
    if not most:
        return _AROUND_S
    asked = max(scenario.requests, 3 * conc)
    return _AROUND_S + max(scenario.min_window_s, asked / most) + (scenario.warmup_rounds + 1) * conc / most
