"""What the engine's own logs say of failures, in a few lines."""

from __future__ import annotations

from harness.engines.modes import Met, found_in
from harness.report.run import Run
from harness.report.tables import escape

LONGEST = 160
"""Characters of a log line that are shown."""


def logs_words(run: Run) -> list[str]:
    """A line for each failure mode that a log shows: what it is, where it stands, what to do.

    The rows' own are told by their verdicts.
    """
    return [_words(met) for met in found_in(run.logs, ())]


def _words(met: Met) -> str:
    seen = "" if met.count == 1 else f", {met.count} times"
    where = f"{escape(met.where)}, line {met.line_number}{seen}"
    said = met.line if len(met.line) <= LONGEST else met.line[: LONGEST - 1] + "…"
    told = f"It means: {escape(met.mode.means)}. What to do: {escape(met.mode.remedy)}."
    return f"**{escape(met.mode.title)}** ({where}): {escape(said)}. {told}"
