"""The papers of a traced generation, from its files alone: compute_graph.md with its figures, and kernels.csv."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.analysis.ceilings import of_card
from harness.predict.cards import card
from harness.report.compute_graph import Conditions, write
from harness.rundir import report_dir_of, writing
from harness.telemetry.trace_files import KERNELS, Saved, read_trace, write_rows


def write_trace_papers(found: Saved, out: Path | None = None, gpu: str | None = None) -> list[Path]:
    """Read the traces and write the papers; the page comes first, the rows last.

    `out`: None: reports/<run> beside results/, or `report` beside traces that lie elsewhere. `gpu`: the card whose data
    sheet is the ceiling, in place of the recorded one. Raises InputError for a trace that cannot be read.
    """
    if gpu is not None:
        found = replace(found, ceiling=of_card(card(gpu)))
    traces = [read_trace(precision, path) for precision, path in found.files.items()]
    out = out or report_dir_of(next(iter(found.files.values())).resolve().parent)
    with writing():
        out.mkdir(parents=True, exist_ok=True)
        written = write(traces, found.shapes, found.ceiling, out, conditions(found))
    write_rows(traces, out / KERNELS)
    return [*written, out / KERNELS]


def conditions(found: Saved) -> Conditions:
    """What trace.toml tells, as the page wants it."""
    told = found.settings
    traced, untraced = told.get("traced_tpot_ms", {}), told.get("untraced_tpot_ms", {})
    facts = {f"kernel of {precision}": str(kernel) for precision, kernel in told.get("kernels", {}).items()}
    if told.get("profiler"):
        facts["profiler"] = str(told["profiler"])
    if told.get("engine_args"):
        facts["engine arguments"] = " ".join(map(str, told["engine_args"]))
    return Conditions(
        model=str(told.get("model", "")),
        prompt_tokens=told.get("prompt_tokens"),
        output_tokens=told.get("tokens"),
        machine=str(told.get("machine", "")),
        engine=str(told.get("engine", "")),
        tpot_ms={precision: (traced[precision], untraced.get(precision)) for precision in traced},
        files={precision: path.name for precision, path in found.files.items()},
        facts=facts,
    )
