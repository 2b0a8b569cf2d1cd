"""By how much one precision cuts the price of a million output tokens against the baseline, inside one service level.

Each stands at its own largest safe load, where it is cheapest while it keeps the service level. With H₁, H₂ what their
hours cost and u₁, u₂ the shares under load,

    share = 1 − price₂ / price₁ = 1 − (H₂ / u₂) / (H₁ / u₁) / (tok_s₂ / tok_s₁)

The ratio of the tok_s and its interval are `compare.throughput_ratio`'s: over the sessions of the same repeat where two
or more have both loads, else MOVER on the logs of the two levels' own intervals. The hours are taken as exact, and a
share below 0 raises the price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.analysis.capacity import operating_levels
from harness.analysis.compare import throughput_ratio
from harness.analysis.cost import hour_usd, worse_verdict
from harness.analysis.headline import label
from harness.analysis.levels import compared, latest, load
from harness.assumptions import Assumptions
from harness.records import Knee, SweepPoint, Verdict


@dataclass(frozen=True, slots=True)
class Saving:
    """What a precision saves against the baseline: a share of 0.38 cuts the price by 38 %, −0.05 raises it by 5 %."""

    precision: str
    baseline: str
    slo: str
    share: float | None = None
    share_lo: float | None = None
    share_hi: float | None = None
    basis: Literal["sessions", "rows"] = "rows"
    """rows: the intervals of the two levels, combined; sessions: the spread of their ratio from repeat to repeat."""
    pairs: int = 0
    """Server sessions paired."""
    verdict: Verdict | None = None
    """The worse of the two operating points'."""
    note: str = ""
    """Why there is no saving to speak of."""


def savings(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[Saving]:
    """Each precision against the baseline, by the formula of the module; none for a run without knees."""
    operating = operating_levels(points, knees)
    by_precision = {knee.precision: knee for knee in knees}
    against = compared([point for point in points if point.precision in by_precision])
    return [
        _saving(points, by_precision[base], by_precision[other], operating, assumptions)
        for other, base in against.items()
    ]


def _saving(
    points: Sequence[SweepPoint],
    base: Knee,
    other: Knee,
    operating: Mapping[str, SweepPoint],
    assumptions: Assumptions,
) -> Saving:
    saving = Saving(other.precision, base.precision, other.slo)
    missing = [label(knee.precision) for knee in (base, other) if knee.precision not in operating]
    if missing:
        return replace(saving, note=f"no tested load of {' and '.join(missing)} is safely inside {other.slo}")
    one, two = operating[base.precision], operating[other.precision]
    first, second = hour_usd(assumptions, one), hour_usd(assumptions, two)
    if first is None or second is None or not first.usd:
        return replace(saving, note="the hour has no price")
    if first.note != second.note:
        return replace(saving, note="only one of them had its power measured, and so pays for electricity")
    pairs = _same_repeats(points, one, two)
    ratio = throughput_ratio(pairs if len(pairs) > 1 else [(one, two)])
    if ratio.value is None:
        return replace(saving, note="no tokens per second")
    hours = (second.usd / second.utilisation) / (first.usd / first.utilisation)
    return replace(
        saving,
        share=1 - hours / ratio.value,
        share_lo=None if ratio.lo is None else 1 - hours / ratio.lo,
        share_hi=None if ratio.hi is None else 1 - hours / ratio.hi,
        basis="sessions" if len(pairs) > 1 else "rows",
        pairs=len(pairs) if len(pairs) > 1 else 0,
        verdict=worse_verdict(one, two),
    )


def _same_repeats(
    points: Sequence[SweepPoint], one: SweepPoint, two: SweepPoint
) -> list[tuple[SweepPoint, SweepPoint]]:
    """The rows of the two levels from the same repeats, neither one invalid and both with tokens."""
    rows = {
        (point.precision, load(point), point.repeat): point
        for point in latest(points)
        if point.verdict != "invalid" and point.tok_s
    }
    repeats = sorted(repeat for precision, at, repeat in rows if (precision, at) == (one.precision, load(one)))
    return [
        (rows[one.precision, load(one), repeat], rows[two.precision, load(two), repeat])
        for repeat in repeats
        if (two.precision, load(two), repeat) in rows
    ]
