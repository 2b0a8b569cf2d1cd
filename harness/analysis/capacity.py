"""What one card carries: users, tokens and memory at the operating point.

The operating point is the largest tested load whose service level is safely kept (knee.safe_load).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from harness.analysis.knee import safe_load
from harness.analysis.levels import levels, load, precision_order
from harness.records import CapacityLine, Knee, SweepPoint


def capacity_lines(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> list[CapacityLine]:
    """One line for each knee. Memory does not depend on the load: it is that of `memory_split`.

    `users` is None in an open loop: its safe rate stands in the knee.
    """
    merged = {(level.precision, load(level)): level for level in levels(points)}
    memory = {line.precision: line for line in memory_split(points)}
    lines = []
    for knee in knees:
        safe = safe_load(knee)
        at = merged.get((knee.precision, safe)) if safe else None
        held = memory.get(knee.precision, MemoryLine(knee.precision))
        lines.append(
            CapacityLine(
                precision=knee.precision,
                slo=knee.slo,
                users=knee.safe_conc,
                tok_s=at.tok_s if at else None,
                req_s=at.req_s if at else None,
                p95_ms=at.p95_ms if at else None,
                weights_gib=held.weights_gib,
                kv_cache_gib=held.kv_cache_gib,
                kv_cache_tokens=held.kv_cache_tokens,
                verdict=at.verdict if at else None,
            )
        )
    return lines


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """What the engine of one precision holds, GiB: medians over its rows. None: the engine did not say."""

    precision: str
    kind: str | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    other_gib: float | None = None

    @property
    def total_gib(self) -> float:
        """Sum of the parts that are known."""
        return sum(part for part in (self.weights_gib, self.kv_cache_gib, self.other_gib) if part)


def memory_split(points: Sequence[SweepPoint]) -> list[MemoryLine]:
    """One line for each precision. A row whose load was invalid still tells its engine's memory, so all rows count."""
    lines = []
    for precision in precision_order(points):
        own = [point for point in points if point.precision == precision]
        tokens = _median([point.kv_cache_tokens for point in own])
        lines.append(
            MemoryLine(
                precision=precision,
                kind=next((point.memory_kind for point in own if point.memory_kind), None),
                weights_gib=_median([point.weights_gib for point in own]),
                kv_cache_gib=_median([point.kv_cache_gib for point in own]),
                kv_cache_tokens=None if tokens is None else round(tokens),
                other_gib=_median([point.other_gib for point in own]),
            )
        )
    return lines


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
