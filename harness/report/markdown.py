"""capacity.md and its figures from a run directory. Words and tables only: every number comes from harness.analysis.

The page's shape stands in templates/capacity.md.j2; this module turns records into the strings that fill it. A report
for another reader (HTML, workbook) starts from the same records and tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from harness.analysis.capacity import MemoryLine, alone, capacity_lines, headlines, memory_split
from harness.analysis.cost import cost_lines
from harness.analysis.knee import find_knees
from harness.records import CostLine, Knee, SweepPoint
from harness.report.plots import write_figures
from harness.report.run import Run, load_run
from harness.report.setup import cautions, per_hour, setup_table, utilisation
from harness.report.tables import capacity_table, cost_table, escape, named, number, points_table, reasons

CAUSES = {
    "kv_cache": "the KV cache is full (or sequences are preempted) at the first level outside",
    "max_num_seqs": "the server's limit on running sequences (max_num_seqs): the rest wait in its queue",
    "client": "the load generator, not the server",
    "compute": "compute: nothing waits, nothing is preempted, the KV cache has room",
    "unknown": "unknown, the engine gave no counters",
}


def write_report(run_dir: Path, out_dir: Path) -> list[Path]:
    """Write capacity.md and figures/ into `out_dir`; returns what was written, the page first.

    Raises InputError when `run_dir` is no run.
    """
    run = load_run(run_dir)
    knees = find_knees(run.points, run.slo_p95_s)
    costs = cost_lines(run.points, knees)
    card_gib = run.environment.get("gpu_memory_gib") if run.device == "gpu" else None
    figures = write_figures(run.points, knees, costs, out_dir / "figures", card_gib=card_gib)
    page = out_dir / "capacity.md"
    page.write_text(_page(run, knees, costs, {path.stem for path in figures}), encoding="utf-8")
    return [page, *figures]


def _page(run: Run, knees: Sequence[Knee], costs: Sequence[CostLine], figures: set[str]) -> str:
    templates = Environment(
        loader=PackageLoader("harness.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML; text from outside goes through escape()
    )
    memory_titles = {"gpu": "VRAM", "host": "Host memory (the engine ran on the CPU)"}
    page = templates.get_template("capacity.md.j2").render(
        title=escape(f"{run.model}, {run.scenario_name} scenario"),
        headlines=[escape(sentence) for sentence in headlines(run.points, knees, run.machine)],
        cautions=cautions(run),
        setup=setup_table(run),
        figures=figures,
        alt=_alt(run, knees),
        knees=[_knee_words(run, knee) for knee in knees],
        capacity=capacity_table(capacity_lines(run.points, knees), knees),
        points=points_table(run.points),
        missing=", ".join(_missing_cells(run)),
        interval_note=_interval_note(run.points),
        memory_title=memory_titles.get(run.device or "", "Memory"),
        memory=_memory_words(memory_split(run.points)),
        cost=cost_table(costs),
        price_note=_price_note(run),
        run=run.name,
    )
    return re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"


def _knee_words(run: Run, knee: Knee) -> str:
    own = [point for point in run.points if point.precision == knee.precision]
    words = f"**{named(knee.precision)}** {escape(alone(knee, run.points))}."
    if knee.cross is not None:
        words += f" Cause: {CAUSES.get(knee.cause, escape(knee.cause))}."
    elif knee.beyond_range and knee.cause == "client":
        words += " Beyond it the load generator gave out, not the server."
    left_out = [f"{point.conc} ({reasons(point) or 'no reason given'})" for point in own if point.verdict == "invalid"]
    if left_out:
        words += f" Left out as invalid: {', '.join(left_out)}."
    return words


def _missing_cells(run: Run) -> list[str]:
    """Cells of the plan without any row: the sweep was cut short, or the engine never came up."""
    precisions, concs = run.settings.get("precisions", ()), run.settings.get("concurrencies", ())
    if not isinstance(precisions, list) or not isinstance(concs, list):
        return []
    have = {(point.precision, point.conc) for point in run.points}
    return [f"{named(str(p))} at {escape(c)}" for p in precisions for c in concs if (p, c) not in have]


def _interval_note(points: Sequence[SweepPoint]) -> str:
    if len({point.repeat for point in points}) > 1:
        return "A row's comes from its own server session; knees, capacity and price use the spread between sessions."
    return "They come from one server session each and know nothing of the spread between sessions."


def _memory_words(lines: Sequence[MemoryLine]) -> list[str]:
    known = [line for line in lines if line.total_gib]
    if not known:
        return ["The engine gave no memory figures."]
    words = []
    for line in known:
        split = (("weights", line.weights_gib), ("KV cache", line.kv_cache_gib), ("other", line.other_gib))
        parts = [f"{number(size)} GiB {name}" for name, size in split if size is not None]
        tokens = f"; the KV cache holds {line.kv_cache_tokens:,} tokens" if line.kv_cache_tokens else ""
        words.append(f"**{named(line.precision)}**: {', '.join(parts)}{tokens}.")
    base = known[0]
    for line in known[1:]:
        if base.weights_gib is None or line.weights_gib is None:
            continue
        saved = base.weights_gib - line.weights_gib
        verb = "frees" if saved >= 0 else "costs another"
        sentence = f"{named(line.precision)} {verb} {number(abs(saved))} GiB of weights against {named(base.precision)}"
        if base.kv_cache_tokens and line.kv_cache_tokens:
            sentence += f"; its KV cache holds {line.kv_cache_tokens / base.kv_cache_tokens:.2f}× the tokens"
        words.append(sentence + ".")
    words.append("Other: activations, graphs and the runtime.")
    totals = [line.total_gib for line in known]
    if known[0].kind == "gpu" and len(known) > 1 and max(totals) < 1.1 * min(totals):
        words.append("The totals are nearly equal because the engine fills what the weights leave with KV cache.")
    return words


def _price_note(run: Run) -> str:
    return (
        f"At {per_hour(run)} and {utilisation(run)} utilisation. The first row of each precision is its price; the "
        "others show what it would be elsewhere on the curve, inside the SLO or not."
    )


def _alt(run: Run, knees: Sequence[Knee]) -> dict[str, str]:
    """What each figure shows, for whoever cannot see it."""
    names = " and ".join(named(knee.precision) for knee in knees)
    tail = f"{names}, {escape(run.model)}"
    return {
        "latency": f"p95 latency in seconds against concurrent users, with the SLO line and the knees: {tail}",
        "throughput": f"output tokens per second against concurrent users: {tail}",
        "memory": f"memory in GiB split into weights, KV cache and other: {tail}",
        "cost": f"US dollars per million output tokens against concurrent users, operating points ringed: {tail}",
    }
