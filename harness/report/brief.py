"""risk_brief.md, for whoever signs off a precision, and business_case.md, for whoever pays for it.

Words and tables only: the decision, the claims and the bullets come from harness.analysis, the sentences about cards
and money from planning.py, those about knees from knees.py. Text from outside goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.analysis.bullets import AGAINST, FOR, OF_ANSWERS, Absent, Bullet
from harness.analysis.capacity import Freed, operating_levels
from harness.analysis.case import Case, make_case
from harness.analysis.claims import Claim, Judged, failures, judge
from harness.analysis.crossover import find_crossovers
from harness.analysis.decision import decide, decide_alone, validity
from harness.analysis.evidence import Evidence
from harness.analysis.levels import Axis, axis, precision_order
from harness.analysis.saving import Saving
from harness.analysis.sides import percent, times
from harness.analysis.trials import Outcome
from harness.assumptions import Assumptions
from harness.records import Knee, Ratio
from harness.report.guidance import beyond, cite, guidance_table, risks_table
from harness.report.knees import cause_words, crossover_words, rule_of_thumb
from harness.report.logs import logs_words
from harness.report.page import write_page
from harness.report.planning import (
    demand_sentence,
    freed_sentences,
    has_demand,
    hour_sentences,
    savings_sentences,
)
from harness.report.predicted import box
from harness.report.run import Run
from harness.report.setup import cautions
from harness.report.tables import escape, named, table

ENOUGH = 5
"""Supported bullets from which one may speak of a case."""


def write_brief(
    run: Run,
    knees: Sequence[Knee],
    ratios: Sequence[Ratio],
    assumptions: Assumptions,
    path: Path,
    evidence: Evidence | None = None,
) -> Path:
    """Write the Quantization Risk Brief. `ratios`: those of `compare`, as in comparison.csv; `evidence`: of quality."""
    case = _case(run, knees, ratios, assumptions, evidence)
    told = run.settings.get("checkpoint_bytes")
    groups = judge(run.points, run.requests, knees, ratios, told if isinstance(told, dict) else None, evidence)
    decision = decide(case) if case else decide_alone(next(iter(knees), None), run.points, run.slo)
    decision += " Measure it before anybody signs." if run.predicted else ""
    return write_page(
        "risk_brief.md.j2",
        path,
        run.words,
        box=box(run),
        title=escape(f"{run.model}, {run.scenario_name} scenario"),
        decision=escape(f"{run.words.on(run.machine, ':')} {decision}"),
        validity=_validity(run, knees),
        cautions=cautions(run),
        thumb=rule_of_thumb(run.points, knees, run.machine),
        causes=[f"**{named(knee.precision)}**. {words}" for knee in knees if (words := cause_words(knee))],
        guidance=guidance_table(run, knees, assumptions) if knees else "",
        beyond=[line for knee in knees if (line := beyond(run, knee))],
        risks=risks_table(run, knees, case),
        logs=logs_words(run),
        judged=evidence is not None,
        crossover=crossover_words(run.points, find_crossovers(run.points, ratios)),
        spread=" The intervals know nothing of run-to-run spread."
        if any(r.basis == "requests" for r in ratios)
        else "",
        claims=[
            _claims(title, judged, axis(run.points), EXPECTED if run.predicted else {})
            for title, judged in zip(("INT4 against BF16", "AWQ against GPTQ"), groups, strict=True)
        ],
        run=run.name,
    )


def write_case(
    run: Run,
    knees: Sequence[Knee],
    ratios: Sequence[Ratio],
    assumptions: Assumptions,
    path: Path,
    evidence: Evidence | None = None,
) -> Path:
    """Write the business case: the bullets that the run supports, and which it does not."""
    case = _case(run, knees, ratios, assumptions, evidence)
    gains = [bullet(case) for bullet in (*FOR, *(OF_ANSWERS if case.answers else ()))] if case else []
    losses = [bullet(case) for bullet in AGAINST] if case else []
    unit = axis(run.points)
    return write_page(
        "business_case.md.j2",
        path,
        run.words,
        box=box(run),
        title=escape(f"{run.model}, {run.scenario_name} scenario"),
        about=_about(run, case),
        validity=_validity(run, knees, f"On {run.machine}: "),
        cautions=cautions(run),
        pair=case is not None,
        judged=case is not None and case.answers is not None,
        one=named(case.sides.one) if case else "",
        summary=_summary(gains, run.predicted),
        gains=[_bullet(found, unit) for found in gains if isinstance(found, Bullet)],
        losses=[_bullet(found, unit) for found in losses if isinstance(found, Bullet)],
        absent=[
            run.words.said(f"{found.title}: {escape(found.why)}.", "Not predicted:")
            for found in [*gains, *losses]
            if isinstance(found, Absent)
        ],
        assumed=[escape(run.words.assumed(line)) for line in _assumed(run, knees, assumptions)],
        run=run.name,
    )


def _validity(run: Run, knees: Sequence[Knee], start: str = "") -> str:
    """What stands behind the operating points; behind those of a prediction, its box says."""
    if run.predicted:
        return ""
    return escape(f"{start}{validity(operating_levels(run.points, knees), run.points)}")


def _case(
    run: Run, knees: Sequence[Knee], ratios: Sequence[Ratio], assumptions: Assumptions, evidence: Evidence | None
) -> Case | None:
    on_gpu, failed = run.device == "gpu", failures(run.requests)
    return make_case(run.points, knees, ratios, run.slo, assumptions, on_gpu, failed, run.settings, evidence)


# --- the claims -------------------------------------------------------------------------------------------------------


EXPECTED = {"supported": "expected", "refuted": "not expected", "not measured": "not predicted"}
"""What a prediction says in the place of an outcome: it supports nothing."""


def _claims(title: str, judged: Sequence[Judged], unit: Axis, called: Mapping[str, str]) -> dict[str, Any]:
    """A table of the claims that the run speaks of, and the others by the reason why it does not.

    A line for each claim; where there are several precisions, each has its part of it. `called`: outcomes that have
    another name in this run.
    """
    claims: dict[Claim, list[Judged]] = {}
    for one in judged:
        claims.setdefault(one.claim, []).append(one)
    several = len({one.one for one in judged}) > 1
    spoken = {claim: [one for one in all_ if one.finding.outcome != "not measured"] for claim, all_ in claims.items()}
    rows = [_claim(claim, found, several, unit, called) for claim, found in spoken.items() if found]
    lacking: dict[str, list[str]] = {}
    for claim, all_ in claims.items():
        for why in dict.fromkeys(one.finding.why for one in all_ if one.finding.outcome == "not measured"):
            names = [named(one.one) for one in all_ if one.finding.outcome == "not measured" and one.finding.why == why]
            whose = f" ({', '.join(names)})" if len(names) < len(all_) else ""
            lacking.setdefault(why, []).append(_linked(claim) + whose)
    header = ("Claim", "", "Figure [95 %]", "Row")
    outcomes = [one.finding.outcome for one in judged]
    kinds: tuple[Outcome, ...] = ("supported", "refuted", "undecided", "not measured")
    counts = [f"{outcomes.count(kind)} {called.get(kind, kind)}" for kind in kinds]
    precisions = len(judged) // len(claims)
    return {
        "title": title,
        "summary": f"{len(claims)} claims{f', {precisions} precisions' if several else ''}: {', '.join(counts)}.",
        "table": table(header, rows, words=header) if rows else "",
        "unmeasured": [
            f"{'Not predicted, ' if called else ''}*{escape(why)}*: {'; '.join(found)}"
            for why, found in lacking.items()
        ],
    }


def _claim(
    claim: Claim, found: Sequence[Judged], several: bool, unit: Axis, called: Mapping[str, str]
) -> tuple[str, ...]:
    outcomes, figures, rows = [], [], []
    for one in found:
        name = f"{named(one.one)} " if several else ""
        outcomes.append(f"{name}**{called.get(one.finding.outcome, one.finding.outcome)}**")
        words = "; ".join(part for part in (times(one.finding.ratio), escape(one.finding.why)) if part)
        figures.append(f"{name}{words}")
        rows += [cite(one.finding.row, unit)] if one.finding.row else []
    return _linked(claim), ", ".join(outcomes), " / ".join(figures), "; ".join(rows)


def _linked(claim: Claim) -> str:
    return f"{claim.topic}: [{claim.says}]({claim.source})"


# --- the bullets ------------------------------------------------------------------------------------------------------


def _bullet(bullet: Bullet, unit: Axis) -> dict[str, str]:
    rows = "; ".join(cite(row, unit) for row in bullet.rows)
    about = " ".join(_sentences(bullet.about))
    return {"title": bullet.title, "text": escape(f"{about} {bullet.text}".strip()), "rows": rows}


def _sentences(about: Saving | Freed | None) -> list[str]:
    if isinstance(about, Saving):
        return savings_sentences([about])
    return freed_sentences([about]) if about else []


def _about(run: Run, case: Case | None) -> str:
    if case is None:
        return f"{named(run.points[0].precision)} alone was measured: with nothing to compare there is no case to make."
    one, base = named(case.sides.one), named(case.sides.other)
    others = [named(name) for name in precision_order(run.points) if name not in case.sides.names]
    sieved = case.evidence is not None and any(
        case.evidence.passed(name) is False for name in precision_order(run.points)
    )
    most = "it delivers most inside the service level"
    most += ", among those whose answers did not fail the gate" if sieved else ""
    chosen = f" (of it and {', '.join(others)} {most})" if others else ""
    said = "what this run's own numbers support, and what they do not"
    if run.predicted:
        said = "what is predicted to speak for it, and what is not"
    return f"{one} against {base}{chosen}, at {run.slo.words}: {said}."


def _summary(found: Sequence[Bullet | Absent], predicted: bool) -> str:
    held = sum(isinstance(one, Bullet) for one in found)
    words = f"{held} of the {len(found)} bullets that were tested are supported."
    if predicted:
        words = f"{held} of {len(found)} bullets are predicted to hold; no measurement supports any of them."
    return words if held >= ENOUGH else f"{words} Fewer than five are no case: what the others lack stands below."


def _assumed(run: Run, knees: Sequence[Knee], assumptions: Assumptions) -> list[str]:
    """What was not measured: the price of the hour, the demand, what is kept free, and where prices come from."""
    each = "user" if assumptions.users_per_tenant == 1 else "users at once"
    free = f"{percent(assumptions.headroom)} of the safe load of each is kept free, {assumptions.failover} in reserve."
    return [
        *hour_sentences(run.points, knees, assumptions),
        demand_sentence(assumptions) if has_demand(assumptions) else free,
        f"A tenant is {assumptions.users_per_tenant} {each}, and a user holds {assumptions.context_tokens:,} tokens.",
        *(f"{source}." for source in assumptions.sources),
    ]
