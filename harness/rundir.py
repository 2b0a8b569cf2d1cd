"""A run's directory: one writer at a time, self-describing, every finished row durable.

run.toml           the plan: scenario, precisions, concurrencies, flags
environment.json   machine, versions, git state; paths and names redacted (environment-2.json: of the first resume)
requests.csv       one line a request, written as they end
points.csv         one line a cell, fsynced as it ends: a cell is done when its row is here
gpu.csv            ten lines a second and card while a cell runs; only where there is a card
engine-<precision>-r<repeat>.log, .json   (engine-awq-r1-2.log: of its second start)
.unfinished.json   what --resume needs, with this machine's paths; gone when the last cell is done
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import itertools
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import __version__
from harness.engines import EngineInfo
from harness.errors import InputError, RunError
from harness.records import (
    Environment,
    GpuSample,
    RequestRecord,
    SweepPoint,
    TableWriter,
    cut_torn_line,
    read_table,
    write_table,
)
from harness.redact import redact

UNFINISHED = ".unfinished.json"


class RunDirectory:
    """An open run directory, locked against a second writer. Use as a context manager."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Raises InputError when it holds a run already (unless it is resumed), or another sweep writes into it."""
        self.path = path
        if resume:
            _check_resumable(path)
        elif (path / "points.csv").exists():
            raise InputError(
                f"{path} holds a run already",
                allowed="a new or empty directory",
                remedy=(
                    f"`bench sweep --resume {path}` finishes it"
                    if (path / UNFINISHED).exists()
                    else "choose another --out, or leave it out: runs are then named by date and model"
                ),
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}", remedy="choose another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InputError(f"{path} is being written by another sweep", remedy="choose another --out") from error
        self.done = _rows_that_stay(path / "points.csv") if resume else []
        """Rows of a run that is resumed."""
        self.requests = TableWriter(path / "requests.csv", RequestRecord)
        self.points = TableWriter(path / "points.csv", SweepPoint)
        self._gpu: TableWriter | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        # A full disk must not hide the error that it caused, nor keep the lock.
        with contextlib.suppress(OSError):
            for table in filter(None, (self.requests, self.points, self._gpu)):
                table.close()
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def add_gpu_sample(self, sample: GpuSample) -> None:
        """Append to gpu.csv, which begins with the first sample."""
        if self._gpu is None:
            self._gpu = TableWriter(self.path / "gpu.csv", GpuSample)
        self._gpu.add(sample)

    def attempts(self) -> dict[str, int]:
        """The highest attempt of each cell that requests.csv holds."""
        highest: dict[str, int] = {}
        self.requests.flush()
        with (self.path / "requests.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                highest[row["cell"]] = max(highest.get(row["cell"], 0), int(row["attempt"]))
        return highest

    def remember(self, request: Mapping[str, Any]) -> None:
        """Keep what a resume needs. It holds paths of this machine, so it is for its owner alone."""
        path = self.path / UNFINISHED
        path.touch(mode=0o600)
        path.write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Every cell has its row: there is nothing to resume."""
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def describe(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write run.toml."""
        (self.path / "run.toml").write_text(redact(to_toml(tables)), encoding="utf-8")

    def describe_environment(self, environment: Environment) -> None:
        """Write environment.json, or the next number's when the run is resumed."""
        text = json.dumps(asdict(environment), indent=2)
        self.fresh("environment", ".json").write_text(redact(text) + "\n", encoding="utf-8")

    def fresh(self, stem: str, suffix: str) -> Path:
        """A path that is not there yet: stem.log, then stem-2.log, stem-3.log ..."""
        paths = itertools.chain([f"{stem}{suffix}"], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
        return next(self.path / name for name in paths if not (self.path / name).exists())

    def describe_engine(self, log: Path, info: EngineInfo) -> None:
        """Write what the engine said of itself beside its log."""
        text = json.dumps(asdict(info), indent=2)
        log.with_suffix(".json").write_text(redact(text) + "\n", encoding="utf-8")


def remembered(path: Path) -> dict[str, Any]:
    """What `remember` kept. Raises InputError when there is nothing to resume."""
    _check_resumable(path)
    try:
        found: dict[str, Any] = json.loads((path / UNFINISHED).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path / UNFINISHED} cannot be read: {error}", remedy="run the sweep anew") from error


def _check_resumable(path: Path) -> None:
    if (path / UNFINISHED).is_file():
        return
    whole = (path / "points.csv").is_file()
    raise InputError(
        f"--resume {path}: " + ("that run is finished" if whole else "holds no run that was begun"),
        allowed="the directory of a sweep that was interrupted",
        remedy=f"`bench report {path}` writes its report" if whole else "name a directory under results/",
    )


def _rows_that_stay(path: Path) -> list[SweepPoint]:
    """Rows of finished cells. Where the engine died or refused everything, a resume is a second chance: out they go."""
    if not path.exists():
        return []
    cut_torn_line(path)
    if not path.stat().st_size:
        return []
    rows = read_table(path, SweepPoint)
    stay = [row for row in rows if not {"engine_died", "gave_up"} & set(row.verdict_reasons)]
    if len(stay) < len(rows):
        write_table(path, stay, SweepPoint)
    return stay


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Flat tables as TOML; None is left out (TOML has no null). Strings are JSON strings, which TOML reads alike."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        for key, value in table.items():
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml_value(item)}" for key, item in value.items()) + "}"
    # JSON's own escapes of characters beyond 16 bits are none in TOML, which takes them as they are, all but DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def run_name(model: str, scenario: str, now: datetime) -> str:
    """20261120-191500-demo-chat: sorts by time and says what it was."""
    plain = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in model).strip("-")
    return f"{now:%Y%m%d-%H%M%S}-{plain}-{scenario}"


def report_dir_of(run_dir: Path) -> Path:
    """reports/<run> beside results/<run>; a run elsewhere keeps its report inside itself."""
    run_dir = run_dir.resolve()
    if run_dir.parent.name == "results":
        return run_dir.parent.parent / "reports" / run_dir.name
    return run_dir / "report"


def describe_machine(engine: str | None, engine_version: str | None, argv: Sequence[str]) -> Environment:
    """The environment record of a run that starts now."""
    from harness.telemetry.gpu import gpus
    from harness.telemetry.host import host

    machine, cards = host(), gpus()
    card = cards[0] if cards else None
    commit, dirty = _git_state()
    return Environment(
        kneebench_version=__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=machine.cpu,
        cpu_cores=machine.cores,
        memory_gib=round(machine.memory_gib, 1),
        gpu=card.name if card else None,
        gpu_memory_gib=round(card.memory_gib, 1) if card else None,
        driver=card.driver if card else None,
        engine=engine,
        engine_version=engine_version,
        argv=tuple(_without_places(item) for item in argv),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _without_places(argument: str) -> str:
    """An argument with its absolute paths cut to their last part: where things lie is this machine's business."""
    return argument if "://" in argument else re.sub(r"(?<![\w.])~?/(?:[^/\s=,]+/)+", "<path>/", argument)


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the kneebench source tree; (None, None) for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    status = git("status", "--porcelain", "--", ".", "../quantize")
    return git("rev-parse", "--short=12", "HEAD"), None if status is None else bool(status)


def full_disk(error: OSError) -> RunError:
    """What to say when a row could not be written."""
    return RunError(
        f"a row could not be written: {error.strerror or error}; all rows before it are on disk",
        remedy="free space on the disk, then: bench sweep --resume with that directory",
    )
