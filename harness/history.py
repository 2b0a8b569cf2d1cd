"""The runs of a results directory, one record each: what was measured, how far it got, what it found.

A list must be quick and must not fall over one bad entry. So of each run only run.toml, environment.json and points.csv
are read (requests.csv holds nearly all of its bytes), and what is missing, torn or wrong in them becomes the record's
`fault`, beside whatever could be read. A thousand runs of eight cells take about 3 s.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.analysis.knee import find_knees, safe_load
from harness.analysis.levels import axis, latest
from harness.errors import InputError, RecordError
from harness.records import SweepPoint, read_table
from harness.report.run import Run, prediction_fault, slo_of
from harness.rundir import UNFINISHED


@dataclass(frozen=True, slots=True)
class PastRun:
    """One run, as far as its files tell it; text is as they have it."""

    run: str
    """Name of its directory."""
    started_at: str | None = None
    """ISO 8601; of the environment, else of the first row, else of the directory's name."""
    model: str | None = None
    scenario: str | None = None
    precisions: tuple[str, ...] = ()
    engine: str | None = None
    engine_version: str | None = None
    machine: str | None = None
    source: str | None = None
    """Where its rows are from, as SweepPoint.source; a predicted run was never measured."""
    cells_done: int = 0
    cells_planned: int | None = None
    """None: not known, or a search (`--until`), which plans as it goes."""
    valid: int = 0
    suspect: int = 0
    invalid: int = 0
    slo: str | None = None
    """The service level that the run was judged by, in words."""
    load_unit: str | None = None
    """users, or req/s."""
    safe_load: dict[str, float | None] = field(default_factory=dict)
    """Precision -> the largest load that is safe to promise at the service level; None: not even the smallest."""
    tok_s: float | None = None
    """The largest of all rows that are not invalid."""
    unfinished: bool = False
    """`bench sweep --resume` has something to do."""
    fault: str | None = None
    """What is missing or cannot be read."""


def history(directory: Path) -> list[PastRun]:
    """Every run below `directory`, the oldest first, those without a date in front; or `directory` itself if it is one.

    Each of its folders gets a record, an empty one too; hidden folders are passed over. Raises InputError when there
    is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory", allowed="a directory of runs, as results")
    try:
        folders = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{directory} cannot be read: {error.strerror}") from error
    if (directory / "points.csv").is_file():
        folders = [directory.resolve()]
    return sorted(map(read_run, folders), key=lambda run: (run.started_at or "", run.run))


def read_run(path: Path) -> PastRun:
    """What a run directory tells of itself. Never raises for what is in it: see `PastRun.fault`."""
    faults: list[str] = []
    points = _points(path / "points.csv", faults)
    toml = _described(path / "run.toml", tomllib.loads, faults)
    environment = _described(path / "environment.json", json.loads, faults)
    settings, scenario = (table if isinstance(table := toml.get(key), dict) else {} for key in ("run", "scenario"))
    run = Run(path.name, points, slo_of(scenario), scenario, settings, environment)
    faults = _nothing_there(path) or faults
    rows = latest(points)
    verdicts = [point.verdict for point in rows]
    return PastRun(
        run=path.name,
        started_at=_started_at(run),
        model=run.model if points or settings.get("model") else None,
        scenario=run.scenario_name if points or scenario else None,
        precisions=_precisions(run),
        engine=_text(run.common("engine") or environment.get("engine")),
        engine_version=_text(run.common("engine_version") or environment.get("engine_version")),
        source=points[0].source if points else None,
        machine=run.machine if points else _text(environment.get("gpu") or environment.get("cpu")),
        cells_done=len(rows),
        cells_planned=_planned(settings),
        valid=verdicts.count("valid"),
        suspect=verdicts.count("suspect"),
        invalid=verdicts.count("invalid"),
        slo=run.slo.words if points else None,
        load_unit=axis(points).unit if points else None,
        safe_load={knee.precision: safe_load(knee) for knee in find_knees(points, run.slo)} if points else {},
        tok_s=max((point.tok_s for point in rows if point.tok_s and point.verdict != "invalid"), default=None),
        unfinished=(path / UNFINISHED).is_file(),
        fault="; ".join(faults) or None,
    )


def _points(path: Path, faults: list[str]) -> list[SweepPoint]:
    try:
        points = read_table(path, SweepPoint)
    except (RecordError, UnicodeDecodeError) as error:
        faults.append(_first_line(error) if path.is_file() else "no points.csv")
        return []
    if not points:
        faults.append("no cell finished")
    if fault := prediction_fault(points):
        faults.append(f"points.csv {fault}")
        return []
    return points


def _described(path: Path, parse: Callable[[str], Any], faults: list[str]) -> Mapping[str, Any]:
    """A description, or nothing and a fault; a run without an environment.json is none the worse for it."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults += [] if path.name == "environment.json" else [f"no {path.name}"]
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no TOML, no JSON
        faults.append(f"{path.name}: {_first_line(error)}")
    else:
        if isinstance(found, dict):
            return found
        faults.append(f"{path.name} holds no table")
    return {}


def _nothing_there(path: Path) -> list[str]:
    """Why a folder is no run at all; empty when it is one."""
    if any((path / name).exists() for name in ("points.csv", "run.toml", UNFINISHED)):
        return []
    other = {"trace.toml": "no sweep: traces", "quality.toml": "no sweep: answers"}
    told = [what for name, what in other.items() if (path / name).exists()]
    if told:
        return told
    try:
        return ["no run" if any(path.iterdir()) else "empty"]
    except OSError as error:
        return [error.strerror or str(error)]


def _started_at(run: Run) -> str | None:
    told = _text(run.environment.get("started_at"))
    if told:
        return told
    first = min((point.started_at for point in run.points if point.started_at), default=None)
    if first:
        return first
    named = re.match(r"\d{8}-\d{6}(?=-|$)", run.name)
    try:
        return datetime.strptime(named[0], "%Y%m%d-%H%M%S").isoformat() if named else None
    except ValueError:  # digits, but no day
        return None


def _precisions(run: Run) -> tuple[str, ...]:
    """As planned, else as measured."""
    planned = run.settings.get("precisions")
    names = planned if isinstance(planned, list) else [point.precision for point in run.points]
    return tuple(dict.fromkeys(map(str, names)))


def _planned(settings: Mapping[str, Any]) -> int | None:
    """Cells of the plan: precisions × loads × repeats."""
    precisions = settings.get("precisions")
    loads = settings.get("concurrencies") or settings.get("rates_rps")
    repeats = settings.get("repeats", 1)
    if isinstance(precisions, list) and loads and isinstance(loads, list) and isinstance(repeats, int):
        return len(precisions) * len(loads) * repeats
    return None


def _text(value: object) -> str | None:
    return str(value) if value else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
