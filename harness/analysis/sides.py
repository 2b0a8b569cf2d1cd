"""Two precisions of a run side by side: their rows and ratios, where each is found again, and loads to speak of.

Ratios are of the first precision over the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.analysis.capacity import MemoryLine, memory_split
from harness.analysis.compare import METRICS, Estimate, Pair, rows_ratio, session_pairs
from harness.analysis.evidence import Evidence
from harness.analysis.knee import safe_load
from harness.analysis.levels import USERS, axis, load, one_trace
from harness.records import Knee, Ratio, SweepPoint
from harness.variants import is_baseline


@dataclass(frozen=True, slots=True)
class Row:
    """Where a figure is found again: a file of the run, or of its report (all but points.csv and run.toml)."""

    table: Literal[
        "points.csv", "run.toml", "knees.csv", "comparison.csv", "families.csv", "fidelity.csv", "failures.csv"
    ]
    precision: str
    """As in the table; of several they are joined by commas."""
    column: str
    at: float | None = None
    """Users, or requests a second in an open loop; None: all of its loads."""


_PARTS = {"total_gib": "weights_gib, kv_cache_gib, other_gib"}
"""The columns of points.csv behind a sum."""


def times(ratio: Estimate) -> str:
    """A ratio in words: 1.31× [1.20–1.43]; an end that is open or unknown says so."""
    if ratio.value is None and ratio.lo is None and ratio.hi is None:
        return ""
    value = "" if ratio.value is None else f"{ratio.value:.2f}×"
    if ratio.lo is None and ratio.hi is None:
        return f"{value}, no interval"
    if ratio.lo == ratio.hi:
        return value
    if ratio.lo is None or ratio.hi is None:
        span = f"{ratio.lo:.2f} or more" if ratio.lo is not None else f"{ratio.hi:.2f} or less"
    else:
        span = f"{ratio.lo:.2f}–{ratio.hi:.2f}"
    return f"{value} [{span}]".lstrip()


def percent(share: float) -> str:
    """A share in words: 38 %."""
    return f"{100 * share:.0f} %"


@dataclass(frozen=True, slots=True)
class Sides:
    """Two precisions of a run: all that a trial looks at."""

    one: str
    other: str
    points: Sequence[SweepPoint]
    """The last attempt at each cell of the two, invalid ones too."""
    ratios: Sequence[Ratio] = ()
    """`one` / `other`, paired."""
    knees: Mapping[str, Knee] | None = None
    failed: Mapping[str, Mapping[str, int]] | None = None
    """Kinds of failed requests of each precision, counted; None: there is no requests.csv to say."""
    checkpoint_bytes: Mapping[str, int] | None = None
    evidence: Evidence | None = None
    """What was found about the answers of the run's precisions."""

    @property
    def names(self) -> tuple[str, str]:
        return self.one, self.other

    def rows(self, precision: str) -> list[SweepPoint]:
        return [point for point in self.points if point.precision == precision]

    def knee(self, precision: str) -> Knee | None:
        return (self.knees or {}).get(precision)

    def memory(self, precision: str) -> MemoryLine:
        return next(line for line in memory_split(self.points) if line.precision == precision)

    def pairs(self, at: float) -> list[Pair]:
        """(other, one) of each repeat at a load, neither of them invalid."""
        found = session_pairs(self.points, self.other, self.one)
        return next((pairs for pairs in found if load(pairs[0][0]) == at), [])

    def loads(self) -> list[float]:
        """Loads at which both have a usable row, ascending."""
        return sorted(load(pairs[0][0]) for pairs in session_pairs(self.points, self.other, self.one))

    def ratio(self, metric: str, at: float) -> Estimate:
        """The paired ratio where the comparison has the metric, else that of the rows by their own intervals."""
        if metric not in METRICS:
            return rows_ratio(metric, self.pairs(at))
        for found in self.ratios:
            if found.metric == metric and at == (found.conc if found.rate_rps is None else found.rate_rps):
                return Estimate(found.ratio, found.ratio_lo, found.ratio_hi)
        return Estimate()

    def row(self, column: str, at: float | None = None) -> Row:
        """Where a ratio of a column is found: as it is in comparison.csv, or by the two rows that it is made of."""
        if column in METRICS and at is not None and is_baseline(self.other):
            return Row("comparison.csv", self.one, column, at)
        return Row("points.csv", ", ".join(self.names), _PARTS.get(column, column), at)

    def suspicions(self, at: float) -> str:
        """Suspect rows of the two at a load, with their reasons."""
        suspect = [point for point in self.points if load(point) == at and point.verdict == "suspect"]
        told = [f"{point.precision} {', '.join(point.verdict_reasons).replace('_', ' ')}" for point in suspect]
        return f"suspect row: {'; '.join(dict.fromkeys(told))}" if told else ""


# --- the load at which a claim is tried -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Where:
    """The load that a claim speaks of: how it is called, and which one it is in a run; None: it was not tested."""

    words: str
    find: Callable[[Sides], float | None]


def _one_user(sides: Sides) -> float | None:
    return 1.0 if axis(sides.points) is USERS and 1 in sides.loads() else None


def _some_users(sides: Sides) -> float | None:
    return max((at for at in sides.loads() if axis(sides.points) is USERS and 16 <= at <= 32), default=None)


def _most(sides: Sides) -> float | None:
    loads = sides.loads()
    return loads[-1] if len(loads) > 1 else None


def _safe(sides: Sides) -> float | None:
    if one_trace(sides.points):
        return next(iter(sides.loads()), None)
    knees = [knee for name in sides.names if (knee := sides.knee(name))]
    most = min((safe_load(knee) or 0.0 for knee in knees), default=0.0) if len(knees) == 2 else 0.0
    return max((at for at in sides.loads() if at <= most), default=None)


ONE_USER = Where("at 1 user", _one_user)
SOME_USERS = Where("at 16 to 32 users", _some_users)
MOST = Where("at more than one load", _most)
"""The largest load of both."""
SAFE = Where("at a load where both keep the service level for sure", _safe)
"""The largest of these; one trace has its own load and no other."""
