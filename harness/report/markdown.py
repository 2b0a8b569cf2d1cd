"""capacity.md and its figures from a run directory. Words and tables only: every number comes from harness.analysis.

The page's shape stands in templates/capacity.md.j2; this module turns records into the strings that fill it. A report
for another reader (HTML, workbook) starts from the same records and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.analysis.capacity import capacity_lines, memory_split, plan_cards
from harness.analysis.compare import MIN_PAIRS, compare
from harness.analysis.correct import correct_lines
from harness.analysis.cost import cost_lines, stated_lines
from harness.analysis.crossover import find_crossovers
from harness.analysis.evidence import Evidence
from harness.analysis.headline import alone, at_one_load, baseline_words, headlines
from harness.analysis.levels import RATE, USERS, axis, compared, latest, load, precision_order, shown
from harness.analysis.spend import spends
from harness.analysis.usl import find_saturations
from harness.analysis.words import Words
from harness.assumptions import Assumptions
from harness.records import Knee, Ratio, SweepPoint
from harness.report.answers import quality_notes, quality_table
from harness.report.knees import crossover_words, rule_of_thumb, views_table, views_words
from harness.report.logs import logs_words
from harness.report.page import write_page
from harness.report.planning import has_demand, plan_table, planning_sentences, spend_table, stated_table
from harness.report.plots import write_figures
from harness.report.predicted import box
from harness.report.run import Run
from harness.report.setup import cautions, per_hour, setup_table, utilisation
from harness.report.tables import (
    capacity_table,
    comparison_table,
    cost_table,
    escape,
    named,
    number,
    points_table,
    reasons,
)
from harness.variants import precision_of


def write_capacity(
    run: Run,
    knees: Sequence[Knee],
    ratios: Sequence[Ratio],
    assumptions: Assumptions,
    out_dir: Path,
    beside: Sequence[Run] = (),
    evidence: Evidence | None = None,
) -> list[Path]:
    """Write capacity.md and figures/ into `out_dir`; returns what was written, the page first."""
    costs = cost_lines(run.points, knees, assumptions)
    correct = correct_lines(run.points, knees, evidence.outcomes, evidence.baseline, assumptions) if evidence else []
    card_gib = run.environment.get("gpu_memory_gib") if run.device == "gpu" and not run.predicted else None
    figures = write_figures(
        run.points, knees, costs, out_dir / "figures", slo=run.slo, card_gib=card_gib, assumptions=assumptions
    )
    said = headlines(run.points, knees, run.machine) if knees else at_one_load(run.points, run.slo, run.machine)
    saturations = find_saturations(run.points, knees)
    memory_titles = {"gpu": "VRAM", "host": "Host memory (the engine ran on the CPU)"}
    page = write_page(
        "capacity.md.j2",
        out_dir / "capacity.md",
        run.words,
        box=box(run),
        title=escape(f"{run.model}, {run.scenario_name} scenario"),
        headlines=[escape(sentence) for sentence in said],
        cautions=cautions(run),
        setup=setup_table(run),
        figures={path.stem for path in figures},
        alt=_alt(run),
        unit=axis(run.points),
        rule=rule_of_thumb(run.points, knees, run.machine),
        knees=[_knee_words(run, knee) for knee in knees],
        views=views_table(run.points, knees, saturations) if knees else "",
        views_notes=views_words(run.points, knees, saturations) if knees else [],
        crossovers=_crossovers(run, ratios, beside),
        capacity=capacity_table(run.points, capacity_lines(run.points, knees), knees) if knees else "",
        comparison_title=_comparison_title(ratios),
        comparison=comparison_table(run.points, ratios) if ratios else "",
        comparison_notes=_comparison_notes(run, ratios),
        points=points_table(run.points),
        missing=", ".join(_missing_cells(run)),
        interval_note=_interval_note(run.points),
        memory_title=memory_titles.get(run.device or "", "Memory"),
        memory=_memory_words(run.points, run.words),
        cost=cost_table(run.points, costs, correct),
        quality=quality_table(evidence, correct, precision_order(run.points)) if evidence else "",
        quality_notes=quality_notes(evidence, correct) if evidence else [],
        logs=logs_words(run),
        price_note=_price_note(run, knees, assumptions),
        **_planning(run, knees, assumptions),
        run=run.name,
    )
    return [page, *figures]


def _knee_words(run: Run, knee: Knee) -> str:
    own = [point for point in run.points if point.precision == knee.precision]
    words = f"**{named(knee.precision)}** {escape(alone(knee, run.points))}."
    left_out = [
        f"{shown(load(point))} ({reasons(point) or 'no reason given'})"
        for point in latest(own)
        if point.verdict == "invalid"
    ]
    if left_out:
        words += f" Left out as invalid: {', '.join(left_out)}."
    return words


def _crossovers(run: Run, ratios: Sequence[Ratio], beside: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Where the advantage fades: of this run and of those beside it, each under its scenario's name."""
    found = [(run, ratios), *((other, compare(other.points, other.requests)) for other in beside)]
    return [
        (escape(f"{one.scenario_name}, {one.name}"), crossover_words(one.points, find_crossovers(one.points, own)))
        for one, own in found
        if own
    ]


def _comparison_title(ratios: Sequence[Ratio]) -> str:
    """AWQ against BF16, paired."""
    several = len({ratio.baseline for ratio in ratios}) > 1
    names = (precision_of(ratio.precision) if several else ratio.precision for ratio in ratios)
    others = " and ".join(map(named, dict.fromkeys(names)))
    paired = "" if any(ratio.basis == "bands" for ratio in ratios) else ", paired"
    return f"{others} against {_baseline(ratios)}{paired}" if ratios else ""


def _baseline(ratios: Sequence[Ratio]) -> str:
    return escape(baseline_words({ratio.precision: ratio.baseline for ratio in ratios}))


def _whose(ratios: Sequence[Ratio]) -> str:
    """BF16's, or BF16's with the same engine arguments."""
    name, several, rest = _baseline(ratios).partition(" with ")
    return f"{name}'s{several}{rest}"


def _comparison_notes(run: Run, ratios: Sequence[Ratio]) -> list[str]:
    """How to read the ratios, how the pairs were made, and what their intervals know."""
    bases = {ratio.basis for ratio in ratios}
    notes = []
    if ratios:
        notes.append(
            f"Each figure is a multiple of {_whose(ratios)} under the same load: above 1×, more tokens "
            "per second or a longer latency. Square brackets hold 95 % intervals; where one holds 1×, it is undecided "
            "which of the two is ahead."
        )
    if "sessions" in bases:
        notes.append(
            "Sessions: server sessions took turns, and each is paired with its neighbour of the same number; the "
            "interval is the spread of their ratios from pair to pair."
        )
    if "requests" in bases:
        notes.append(
            "Requests: one session of each, paired request by request (the same prompt and lengths; tok/s: the two "
            "windows as they are); the intervals come from within the sessions and know nothing of run-to-run spread. "
            f"Below {MIN_PAIRS} pairs it is the ratio of the two rows, without an interval."
        )
    if "bands" in bases:
        notes.append(
            "Predicted rows are not paired: a ratio's band is that of both rows, as if their errors were independent, "
            "so rather too wide for one card. A median has the band of its 95th percentile."
        )
    if run.requests_fault and "bands" not in bases and len({point.precision for point in run.points}) > 1:
        notes.append(f"Nothing is paired by request: {escape(run.requests_fault)}.")
    return notes


def _missing_cells(run: Run) -> list[str]:
    """Cells of the plan without any row: the sweep was cut short, or the engine never came up."""
    planned = run.settings.get("concurrencies" if axis(run.points) is USERS else "rates_rps", ())
    precisions = run.settings.get("precisions", ())
    if not isinstance(precisions, list) or not isinstance(planned, list):
        return []
    tail = "" if axis(run.points) is USERS else f" {RATE.unit}"
    have = {(point.precision, load(point)) for point in run.points}
    return [f"{named(str(p))} at {escape(at)}{tail}" for p in precisions for at in planned if (p, at) not in have]


def _interval_note(points: Sequence[SweepPoint]) -> str:
    if len({point.repeat for point in points}) > 1:
        return "A row's comes from its own server session; knees, capacity and price use the spread between sessions."
    return "They come from one server session each and know nothing of the spread between sessions."


def _memory_words(points: Sequence[SweepPoint], spoken: Words) -> list[str]:
    known = [line for line in memory_split(points) if line.total_gib]
    if not known:
        return ["The engine gave no memory figures."]
    words = []
    for held in known:
        split = (("weights", held.weights_gib), ("KV cache", held.kv_cache_gib), ("other", held.other_gib))
        parts = [f"{number(size)} GiB {name}" for name, size in split if size is not None]
        tokens = f"; the KV cache holds {held.kv_cache_tokens:,} tokens" if held.kv_cache_tokens else ""
        words.append(f"**{named(held.precision)}**: {', '.join(parts)}{tokens}.")
    by_precision = {held.precision: held for held in known}
    for other, baseline in compared(points).items():
        base, line = by_precision.get(baseline), by_precision.get(other)
        if base is None or line is None or base.weights_gib is None or line.weights_gib is None:
            continue
        saved = base.weights_gib - line.weights_gib
        verb = "frees" if saved >= 0 else "costs another"
        sentence = f"{named(line.precision)} {verb} {number(abs(saved))} GiB of weights against {named(base.precision)}"
        if base.kv_cache_tokens and line.kv_cache_tokens:
            sentence += f"; its KV cache holds {line.kv_cache_tokens / base.kv_cache_tokens:.2f}× the tokens"
        words.append(sentence + ".")
    words.append(f"Other{spoken.also}: activations, graphs and the runtime.")
    totals = [line.total_gib for line in known]
    if known[0].kind == "gpu" and len(known) > 1 and max(totals) < 1.1 * min(totals):
        words.append("The totals are nearly equal because the engine fills what the weights leave with KV cache.")
    return words


def _planning(run: Run, knees: Sequence[Knee], assumptions: Assumptions) -> dict[str, Any]:
    """Cards and spend, as far as anybody said what is expected; prices at the stated points in any case."""
    if not knees:
        return {"stated": "", "plan": "", "spend": "", "planning": [], "sources": []}
    asked = has_demand(assumptions)
    return {
        "stated": stated_table(stated_lines(run.points, knees, assumptions)),
        "plan": plan_table(plan_cards(run.points, knees, assumptions), assumptions) if asked else "",
        "spend": spend_table(spends(run.points, knees, assumptions)) if asked else "",
        "planning": [escape(sentence) for sentence in planning_sentences(run.points, knees, assumptions)],
        "sources": [escape(source) for source in assumptions.sources],
    }


def _price_note(run: Run, knees: Sequence[Knee], assumptions: Assumptions) -> str:
    rest = (
        " The first row of each precision is its price; the others show what it would be elsewhere on the curve, "
        "inside the SLO or not."
    )
    hour = per_hour(run) if assumptions.usd_per_hour is None else f"{assumptions.usd_per_hour:g} USD an hour"
    share = utilisation(run) if assumptions.utilisation is None else f"{assumptions.utilisation:.0%}"
    price = "At what owning a card costs" if assumptions.owned else f"At {hour}"
    return f"{price} and {share} utilisation.{rest if knees else ''}"


def _alt(run: Run) -> dict[str, str]:
    """What each figure shows, for whoever cannot see it."""
    names = " and ".join(named(precision) for precision in precision_order(run.points))
    tail = f"{names}, {escape(run.model)}{run.words.also}"
    over = "concurrent users" if axis(run.points) is USERS else "requests sent per second"
    return {
        "latency": f"p95 latency in seconds against {over}, with the SLO line and the knees: {tail}",
        "throughput": f"output tokens per second against {over}: {tail}",
        "memory": f"memory in GiB split into weights, KV cache and other: {tail}",
        "cost": f"US dollars per million output tokens against {over}, operating points ringed: {tail}",
    }
