"""`bench history`: past runs as rows for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.headline import label
from harness.history import PastRun
from harness.inert import one_line
from harness.report.tables import number

HEADER = ("Run", "Started", "Model", "Scenario", "Engine", "Machine", "Cells", "Verdicts", "Safe load", "tok/s", "")


def rows(runs: Sequence[PastRun]) -> list[tuple[str, ...]]:
    """A row a run, as plain text under HEADER; the last cell says what is wrong with it.

    Verdicts are counts of valid / suspect / invalid rows; the safe load is that of each precision at the run's own
    service level; tok/s is the largest of the run.
    """
    found = []
    for run in runs:
        started = (run.started_at or "")[:16].replace("T", " ")
        engine = " ".join(part for part in (run.engine, run.engine_version) if part)
        verdicts = f"{run.valid} / {run.suspect} / {run.invalid}" if run.cells_done else ""
        what = "predicted, not measured" if run.source == "predicted" else ""
        note = "; ".join(part for part in (what, "unfinished" if run.unfinished else "", run.fault or "") if part)
        cells = (run.run, started, run.model, run.scenario, engine, run.machine, _cells(run), verdicts, _safe(run))
        found.append((*(one_line(cell or "") for cell in cells), number(run.tok_s), one_line(note)))
    return found


def _cells(run: PastRun) -> str:
    """8/8; 5 where no plan says how many."""
    return f"{run.cells_done}/{run.cells_planned}" if run.cells_planned is not None else str(run.cells_done or "")


def _safe(run: PastRun) -> str:
    """BF16 16, AWQ 24 users (p95 ≤ 3 s); the precisions alone where no load is known to be safe or not."""
    if not run.safe_load:
        return ", ".join(map(label, run.precisions))
    loads = (f"{label(name)} {'none' if load is None else f'{load:g}'}" for name, load in run.safe_load.items())
    return f"{', '.join(loads)} {run.load_unit} ({run.slo})"
