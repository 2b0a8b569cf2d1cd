"""What a command prints with --json: one document, for scripts.

    {"schema": "kneebench.capacity/1", "plans": [{"precision": "awq", "cards": 3, ...}], ...}

`schema` names the command and the version of its form: it grows when a key goes or changes its meaning; new keys may
come at any time. Keys of records are their fields, so units stand in their names. What is missing is null: no NaN, no
empty text in place of a figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from harness.report.run import Run

Kind = Literal[
    "capacity", "cards", "compare", "doctor", "gpus", "history", "precisions", "prices", "report", "reports",
    "scenario", "scenarios", "sweep",
]  # fmt: skip
VERSION = 1
"""Of all forms, as long as they are young."""


def document(kind: Kind, **parts: object) -> str:
    """The document with these parts, after `schema`. Raises TypeError for a part that is no data."""
    return json.dumps({"schema": f"kneebench.{kind}/{VERSION}", **_plain(parts)}, indent=1, allow_nan=False)


def of_run(kind: Literal["sweep", "report"], run: Run, where: Path, out: Path, written: Sequence[Path]) -> str:
    """A run: its points with their verdicts, knees, ratios to the baseline, and where its papers are."""
    from harness.analysis.compare import compare
    from harness.analysis.knee import find_knees

    return document(
        kind,
        run=where.resolve(),
        report=out.resolve(),
        model=run.model,
        scenario=run.scenario_name,
        source=run.source,
        slo=run.slo,
        papers=[path.resolve() for path in written],
        points=run.points,
        knees=find_knees(run.points, run.slo),
        ratios=compare(run.points, run.requests),
    )


def _plain(value: object) -> Any:
    """Records, paths and days as JSON has them."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (Path, date)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, bytes):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    raise TypeError(f"{type(value).__name__} is no data")
