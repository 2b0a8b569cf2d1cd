"""A run's directory: one writer at a time, self-describing, every finished row durable.

run.toml           the plan: scenario, precisions, concurrencies, flags
environment.json   machine, versions, git state; paths and names redacted
requests.csv       one line a request, flushed as they end
points.csv         one line a cell, fsynced as it ends
engine-<precision>-r<repeat>.log
"""

from __future__ import annotations

import fcntl
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
from harness.records import Environment, RequestRecord, SweepPoint, TableWriter
from harness.redact import redact


class RunDirectory:
    """An open run directory, locked against a second writer. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "points.csv").exists():
            raise InputError(
                f"{path} holds a run already",
                allowed="a new or empty directory",
                remedy="choose another --out, or leave it out: runs are then named by date and model",
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
        self.requests = TableWriter(path / "requests.csv", RequestRecord)
        self.points = TableWriter(path / "points.csv", SweepPoint)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.points.close()
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def describe(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write run.toml."""
        (self.path / "run.toml").write_text(redact(to_toml(tables)), encoding="utf-8")

    def describe_environment(self, environment: Environment) -> None:
        """Write environment.json."""
        text = json.dumps(asdict(environment), indent=2)
        (self.path / "environment.json").write_text(redact(text) + "\n", encoding="utf-8")

    def describe_engine(self, session: str, info: EngineInfo) -> None:
        """Write engine-<session>.json."""
        text = json.dumps(asdict(info), indent=2)
        (self.path / f"engine-{session}.json").write_text(redact(text) + "\n", encoding="utf-8")


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
        remedy="free space on the disk, then run the sweep again with another --out",
    )
