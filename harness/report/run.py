"""A run directory as a report sees it: points.csv, run.toml and environment.json, and requests.csv for the pairs.

The rows are read strictly (a wrong column is an error), the two descriptions leniently: they only say with what the
rows were made, and a report of an older run is worth more than a complaint about a missing key. Nor does a report wait
for the requests: without them, or with a table of them that a crash left torn, it lacks what was paired by request.
What was found about quality, where the directory has any, comes with it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from harness.analysis.metrics import judged_by
from harness.analysis.words import Words, words_of
from harness.errors import InputError, RecordError
from harness.quality.directory import Quality, load_quality
from harness.records import RequestRecord, Scenario, SweepPoint, read_table
from harness.slo import Slo

_NEEDED = ("points.csv", "run.toml")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, read. `scenario` and `settings` are the tables [scenario] and [run] of run.toml."""

    name: str
    points: list[SweepPoint]
    slo: Slo
    """What it is judged by: its scenario's service level, or another that was asked for."""
    scenario: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    requests: Sequence[RequestRecord] = ()
    requests_fault: str | None = None
    """Why requests.csv is there and could not be read."""
    quality: Quality | None = None
    """What was asked of the same precisions, and what they answered."""
    logs: Mapping[str, str] = field(default_factory=dict)
    """The engine's logs, by their names."""

    @property
    def model(self) -> str:
        """The model as the rows name it, else run.toml; of a path on somebody's machine only its last part."""
        name = str(self.common("model") or self.settings.get("model") or "unnamed model")
        return PurePosixPath(name).name if name.startswith(("/", "~")) else name

    @property
    def machine(self) -> str:
        """What the headline speaks of: the card, else the CPU and that it is one, else the endpoint.

        Of a predicted run it is the card that was predicted: the environment tells of whatever computed it.
        """
        if self.predicted:
            return str(self.common("gpu") or "a card that is not named")
        if self.source == "endpoint":
            return "this endpoint"
        gpu = self.common("gpu") or self.environment.get("gpu")
        if gpu and self.device == "gpu":
            return str(gpu)
        if self.device != "host":
            return "this machine"
        cores = self.environment.get("cpu_cores")
        return f"{self.environment.get('cpu') or 'a CPU'} ({f'{cores} cores, ' if cores else ''}CPU only)"

    @property
    def device(self) -> str | None:
        """Where the engine ran: gpu, host, or None when nobody says (an endpoint)."""
        kinds = {point.memory_kind for point in self.points if point.memory_kind}
        if kinds:
            return "host" if "host" in kinds else "gpu"
        if self.source == "endpoint":
            return None
        if self.common("gpu") or self.environment.get("gpu"):
            return "gpu"
        return "host" if "gpu" in self.environment else None

    @property
    def source(self) -> str:
        """engine, dummy-weights, endpoint or predicted: one run has one."""
        return self.points[0].source

    @property
    def predicted(self) -> bool:
        """Whether no figure of this run was measured: harness/predict made them."""
        return bool(self.points) and self.source == "predicted"

    @property
    def words(self) -> Words:
        """How its papers speak of its figures."""
        scenario = (self.scenario_name, self.scenario.get("description"))
        names = [str(name) for name in (self.name, self.model, self.settings.get("model"), *scenario) if name]
        return words_of(self.points, names)

    @property
    def scenario_name(self) -> str:
        """As run.toml says, else as the rows do."""
        return str(self.scenario.get("name") or self.common("scenario") or "unnamed")

    def common(self, column: str) -> Any:
        """The first value that any row gives in this column."""
        return common(self.points, column)


def load_run(run_dir: Path, slo: Slo | None = None) -> Run:
    """Read a run directory, to be judged by `slo` or by its own. Raises InputError when it is none, RecordError when
    its table cannot be read."""
    missing = [name for name in _NEEDED if not (run_dir / name).is_file()]
    if missing:
        what = "is no run" if run_dir.is_dir() else "is no directory"
        raise InputError(
            f"{run_dir} {what}: {' and '.join(missing)} not there",
            allowed="a directory that `bench sweep` wrote, results/<run>",
            remedy="name one of the directories under results/",
        )
    points = read_table(run_dir / "points.csv", SweepPoint)
    if not points:
        raise InputError(f"{run_dir}: points.csv holds no row yet", remedy="let the sweep finish at least one cell")
    if fault := prediction_fault(points):
        raise RecordError(f"{run_dir}: points.csv {fault}", remedy="keep them in run directories of their own")
    try:
        toml = tomllib.loads((run_dir / "run.toml").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
        raise InputError(f"{run_dir / 'run.toml'}: {error}", remedy="restore the file as the sweep wrote it") from error
    quality = load_quality(run_dir)
    if quality and points[0].source == "predicted":
        raise RecordError(
            f"{run_dir} holds predicted rows beside answers that somebody asked for",
            remedy="move what `bench quality` wrote to a directory of its own and report it there",
        )
    requests, fault = _requests(run_dir / "requests.csv")
    scenario = _table(toml, "scenario")
    own = slo_of(scenario)
    if slo is not None and slo != own:
        points = judged_by(points, requests, slo)
    return Run(
        name=run_dir.resolve().name,
        points=points,
        slo=slo or own,
        scenario=scenario,
        settings=_table(toml, "run"),
        environment=_environment(run_dir / "environment.json"),
        requests=requests,
        requests_fault=fault,
        quality=quality,
        logs={path.name: path.read_text(encoding="utf-8", errors="replace") for path in _logs(run_dir)},
    )


def prediction_fault(points: Sequence[SweepPoint]) -> str | None:
    """What keeps rows from being read as one run: predictions among measurements, and predictions said to be repeats.

    A mean of the two is neither, and a repeated prediction has the same error again: its spread would pass for a band.
    """
    predicted = [point for point in points if point.source == "predicted"]
    if predicted and len(predicted) < len(points):
        return "mixes predicted and measured rows"
    return "repeats a prediction" if len({point.repeat for point in predicted}) > 1 else None


def slo_of(scenario: Mapping[str, Any]) -> Slo:
    """The run's own service level; the scenario's default where it does not say."""
    names = ("slo_p95_s", "slo_ttft_s", "slo_tpot_s", "slo_goodput")
    given = [_limit(scenario.get(name)) for name in names]
    return Slo(*given) if any(given) else Scenario("").slo


def _limit(told: object) -> float | None:
    """None also for what limits nothing: NaN, and a number that no float holds, which no answer is as late as."""
    try:
        limit = float(told) if isinstance(told, int | float) else 0.0
    except OverflowError:
        return None
    return limit if math.isfinite(limit) and limit > 0 else None


def _table(toml: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = toml.get(name, {})
    return table if isinstance(table, dict) else {}


def _requests(path: Path) -> tuple[list[RequestRecord], str | None]:
    if not path.is_file():
        return [], None
    try:
        return read_table(path, RequestRecord), None
    except RecordError as error:
        return [], str(error).splitlines()[0]


def _logs(run_dir: Path) -> list[Path]:
    return sorted([*run_dir.glob("engine-*.log"), *run_dir.glob("quality-*.log")])


def _environment(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}", remedy="restore the file, or remove it to report without it") from error
    return value if isinstance(value, dict) else {}


def common(points: Sequence[SweepPoint], column: str) -> Any:
    """The first value that a row gives in this column."""
    return next((value for point in points if (value := getattr(point, column)) is not None), None)
