"""Which concurrency to measure next, when the question is how many users a service level carries.

    p95                                     grow      1 2 4 8 16 … until a load is surely outside the SLO
      │                        ⊤●           bracket   between the last load surely inside (low)
    SLO ┼ ─ ─ ─ ─ ─ ─ ─ ┬⊤─ ─ ─ ⊥                     and the first from which on all are surely outside (high)
      │        ⊤●       │⊥ in doubt         bisect    the wider gap at its two ends, in the middle of the logs,
      └────────┴────────┴───────┴── users             until (high − low) / (high + low) ≤ precision

Pure functions of the rows that are there: a sweep that is resumed goes on as if it had not been stopped. A load in
doubt (its interval holds the SLO) is an answer too: the gaps beside it are made narrow, and what then remains of the
interval is the noise of the measurement, which more requests in each cell make smaller, and more loads do not. A row
that is invalid is measured once more, for what spoiled it may have been another job on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.analysis.knee import bracketed, standing
from harness.analysis.levels import latest
from harness.records import SweepPoint
from harness.slo import Slo

Ended = Literal["precise", "noise", "largest", "client", "smallest", "unusable"]
WORDS: dict[Ended, str] = {
    "precise": "the interval is as narrow as was asked for",
    "noise": "what is left of the interval is noise: more --requests make it narrower",
    "largest": "the SLO holds up to the largest concurrency allowed: --max-conc raises it",
    "client": "the load could not be made or answered beyond this: see the reasons of the invalid rows",
    "smallest": "not even one user is safely inside the SLO",
    "unusable": "no row has a usable figure",
}


TRIES = 2
"""How often a load is measured whose row is invalid."""


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for, and what it may cost. `first`: loads that are measured in any case, then it doubles."""

    slo: Slo
    precision: float = 0.1
    """Half the width of the interval on max safe concurrency, as a share of its middle."""
    first: tuple[int, ...] = (1,)
    most: int = 256
    max_cells: int = 24
    """Over all precisions."""
    max_minutes: float = 60.0
    """From the start of the sweep, engine starts and quantizing included."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """What is known of one precision: safe up to `low` (0: not even the smallest), outside from `high` on (None: open).

    `doubt` are the tested loads between the two.
    """

    low: int
    high: int | None
    doubt: tuple[int, ...] = ()

    @property
    def width(self) -> float | None:
        """Half the interval over its middle; None where it is open."""
        return None if self.high is None else (self.high - self.low) / (self.high + self.low)


def bracket(points: Sequence[SweepPoint], slo: Slo) -> Bracket | None:
    """Of the rows of one precision, by the rule of knee.find_knee; None where none has a usable figure."""
    known = standing(points, slo)
    if not known:
        return None
    tested = [level.conc for level, _ in known]
    safe, outside = bracketed([place for _, place in known])
    high = tested[outside] if outside < len(tested) else None
    return Bracket(tested[safe - 1] if safe else 0, high, tuple(tested[safe:outside]))


def next_load(points: Sequence[SweepPoint], search: Search) -> int | Ended:
    """The next concurrency for one precision, from its rows so far; or why there is none."""
    rows = latest(points)
    for row in rows:
        if row.verdict == "invalid" and row.attempt < TRIES:
            return row.conc
    tested = {row.conc for row in rows}
    for load in sorted(search.first):
        known = bracket(points, search.slo)
        if load not in tested and not (known and known.high is not None and load > known.high):
            return load
    known = bracket(points, search.slo)
    if known is None:
        return "unusable"
    if known.high is None:
        return _larger(tested, known, search)
    if known.low == 0 and min(tested) > 1:
        return max(1, min(tested) // 2)
    if known.low == 0 and (not known.doubt or min(known.doubt) == 1):
        return "smallest"
    if known.high - known.low <= 1 or (known.width or 0.0) <= search.precision:
        return "precise" if known.low else "smallest"
    return _between(tested, known, search)


def _larger(tested: set[int], known: Bracket, search: Search) -> int | Ended:
    """Twice the largest load, as long as that one could be measured."""
    largest = max(tested)
    if largest > max((known.low, *known.doubt)):
        # The largest row is invalid. Halfway back there may be one that is not; near by, there is nothing to find.
        usable = max((known.low, *known.doubt))
        middle = _middle(usable, min(load for load in tested if load > usable), tested)
        return middle if middle and usable and middle / usable > 1 + 2 * search.precision else "client"
    return min(2 * largest, search.most) if largest < search.most else "largest"


def _between(tested: set[int], known: Bracket, search: Search) -> int | Ended:
    """The middle of the wider one of the two outer gaps; with nothing in doubt they are the same gap."""
    assert known.high is not None
    lower, upper = (known.low, min((*known.doubt, known.high))), (max((known.low, *known.doubt)), known.high)
    for start, end in sorted((lower, upper), key=lambda gap: gap[0] / gap[1]):
        # A gap beside a doubt is worth a quarter of the precision: the doubt itself is the rest.
        narrow = known.doubt and start and (end - start) / (end + start) <= search.precision / 4
        middle = _middle(start, end, tested)
        if middle is not None and not narrow:
            return middle
    return "noise"


def _middle(low: int, high: int, tested: set[int]) -> int | None:
    """The untested whole number nearest to the geometric middle of a gap; None where none is left."""
    middle = math.sqrt(max(low, 1) * high)
    left = [load for load in range(low + 1, high) if load not in tested]
    return min(left, key=lambda load: abs(math.log(load / middle)), default=None)
