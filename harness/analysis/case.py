"""One precision of a run against its baseline, gathered once: all that a decision or a bullet may speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.analysis.capacity import CardPlan, Freed, freed_memory, operating_levels, plan_cards
from harness.analysis.correct import CorrectLine, correct_lines
from harness.analysis.evidence import Evidence
from harness.analysis.headline import label
from harness.analysis.levels import axis, compared, latest, levels, load, one_trace
from harness.analysis.saving import Saving, savings
from harness.analysis.sides import SAFE, Sides
from harness.assumptions import Assumptions
from harness.records import Knee, Ratio, SweepPoint
from harness.slo import Slo


@dataclass(frozen=True, slots=True)
class Case:
    """A precision against the baseline, and all that a bullet may speak of. None: the run does not have it."""

    sides: Sides
    slo: Slo
    assumptions: Assumptions = Assumptions()
    on_gpu: bool = True
    levels: Mapping[str, SweepPoint] = field(default_factory=dict)
    """The operating point of each precision that has one."""
    plans: Mapping[str, CardPlan] = field(default_factory=dict)
    freed: Freed | None = None
    saving: Saving | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The server's settings, as run.toml has them."""
    evidence: Evidence | None = None
    """What was found about the answers; None: nobody looked at them."""
    correct: Mapping[str, CorrectLine] = field(default_factory=dict)
    """What a correct answer costs in each precision that was judged."""

    @property
    def one(self) -> str:
        return label(self.sides.one)

    @property
    def base(self) -> str:
        return label(self.sides.other)

    @property
    def answers(self) -> Evidence | None:
        """What was found about the answers of the two; None: nobody compared them."""
        return self.evidence if self.evidence and self.evidence.measured(self.sides.one) else None

    @property
    def card(self) -> str:
        return "card" if self.on_gpu else "machine"

    def amount(self, at: float) -> str:
        return axis(self.sides.points).amount(at)

    def level(self, precision: str, at: float) -> SweepPoint | None:
        return next((row for row in levels(self.sides.rows(precision)) if load(row) == at), None)

    def sound_loads(self) -> list[float]:
        """Loads at which the rows of both are valid, ascending."""
        return [
            at
            for at in self.sides.loads()
            if all(row.verdict == "valid" for row in self.sides.points if load(row) == at)
        ]

    def sound_safe_load(self) -> float | None:
        """The largest of them at which both keep the service level for sure."""
        most = SAFE.find(self.sides)
        return max((at for at in self.sound_loads() if most is not None and at <= most), default=None)

    def doubt(self) -> str:
        """Why the operating points support nothing; "" where both are valid."""
        if one_trace(self.sides.points):
            return "one trace has no knee, and so no operating point"
        for name in self.sides.names:
            at = self.levels.get(name)
            if at is None:
                return f"{label(name)} keeps {self.slo.words} for sure at no tested load"
            if at.verdict != "valid":
                return f"the operating point of {label(name)} is {at.verdict}: {reasons(at)}"
        return ""


def make_case(
    points: Sequence[SweepPoint],
    knees: Sequence[Knee],
    ratios: Sequence[Ratio],
    slo: Slo,
    assumptions: Assumptions,
    on_gpu: bool = True,
    failed: Mapping[str, Mapping[str, int]] | None = None,
    settings: Mapping[str, Any] | None = None,
    evidence: Evidence | None = None,
) -> Case | None:
    """The case of the precision that has the most tokens a second at its own safe load, against the baseline.

    One that did not pass the gate comes after all others. None where there is nothing to compare.
    """
    against = compared(points)
    others = list(against)
    if not others:
        return None
    operating = operating_levels(points, knees)

    def speed(precision: str) -> float:
        at = operating.get(precision)
        return (at.tok_s or 0.0) if at else 0.0

    refused = {name for name in others if evidence and evidence.passed(name) is False}
    one = max(others, key=lambda name: (name not in refused, speed(name)))
    base = against[one]
    sides = Sides(
        one,
        base,
        [point for point in latest(points) if point.precision in (one, base)],
        [ratio for ratio in ratios if (ratio.precision, ratio.baseline) == (one, base)],
        {knee.precision: knee for knee in knees},
        failed,
    )
    freed = freed_memory(points, assumptions.context_tokens)
    return Case(
        sides=sides,
        slo=slo,
        assumptions=assumptions,
        on_gpu=on_gpu,
        levels=operating,
        plans={plan.precision: plan for plan in plan_cards(points, knees, assumptions)},
        freed=next((line for line in freed if line.precision == one), None),
        saving=next((line for line in savings(points, knees, assumptions) if line.precision == one), None),
        settings=settings or {},
        evidence=evidence if evidence and evidence.baseline == base else None,
        correct=_correct(points, knees, assumptions, evidence),
    )


def _correct(
    points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions, evidence: Evidence | None
) -> dict[str, CorrectLine]:
    if evidence is None:
        return {}
    lines = correct_lines(points, knees, evidence.outcomes, evidence.baseline, assumptions)
    return {line.precision: line for line in lines}


def reasons(point: SweepPoint) -> str:
    """Why a row is suspect or invalid, for a sentence."""
    return ", ".join(point.verdict_reasons).replace("_", " ") or "no reason given"
