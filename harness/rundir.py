"""A run's directory: one writer at a time, self-describing, every finished row durable.

run.toml           the plan: scenario, precisions, loads, flags, digests of what was read
environment.json   machine, versions, git state; paths and names redacted (environment-2.json: of the first resume)
requests.csv       one line a request, written as they end
points.csv         one line a cell, fsynced as it ends: a cell is done when its row is here
gpu.csv            ten lines a second and card while a cell runs; only where there is a card
engine-<precision>-r<repeat>.log, .json   (engine-awq-r1-2.log: of its second start)
assumptions.toml   prices and traffic for its reports; only with --assume
.unfinished.json   what --resume needs, with this machine's paths; gone when the last cell is done

Whatever ends a sweep (kill -9 included), each file is whole, or is not there, or is a table whose torn last line is
cut when it is opened again. Descriptions are therefore written under another name first.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import functools
import itertools
import json
import os
import platform
import re
import stat
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from harness import __version__
from harness.engines import LOOPBACK, EngineInfo
from harness.errors import InputError, RunError
from harness.files import PARTIAL, opened, plain_name, write_whole
from harness.inert import uncell
from harness.records import (
    Environment,
    GpuSample,
    RequestRecord,
    SweepPoint,
    TableWriter,
    cut_torn_line,
    long_cells,
    read_table,
    write_table,
)
from harness.redact import redact, redacted

UNFINISHED = ".unfinished.json"
ASSUMPTIONS = "assumptions.toml"


class RunDirectory:
    """An open run directory, locked against a second writer. Use as a context manager.

    Opening it changes nothing that was measured; tables are opened when they are first written to.
    """

    host = LOOPBACK
    """Engines that log here are asked from this machine alone."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Raises InputError when it holds a run already (unless it is resumed), or another sweep writes into it."""
        self.path = path
        self.done: list[SweepPoint] = []
        """Rows of a run that is resumed."""
        self._outdated = False
        """points.csv holds rows that are to be measured again."""
        self._tables: list[TableWriter] = []
        if resume:
            _check_resumable(path)  # before a directory is made for it
        self._lock = locked(path)
        try:
            if resume:
                _check_resumable(path)
                for leftover in path.glob(f"*{PARTIAL}"):
                    leftover.unlink()
                self.done, self._outdated = _rows_that_stay(path / "points.csv")
            elif (path / "points.csv").exists() or (path / UNFINISHED).exists():
                raise InputError(
                    f"{path} holds a run already",
                    allowed="a new or empty directory",
                    remedy=(
                        f"`bench sweep --resume {path}` finishes it"
                        if (path / UNFINISHED).exists()
                        else "choose another --out, or leave it out: runs are then named by date and model"
                    ),
                )
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        for table in self._tables:
            # A full disk must not hide the error that it caused, nor keep the lock.
            with contextlib.suppress(OSError):
                table.close()
        self._unlock()

    def _unlock(self) -> None:
        unlock(self.path, self._lock)

    def add_request(self, record: RequestRecord) -> None:
        """Append to requests.csv."""
        with writing():
            self._requests.add(record)
            self._requests.flush()

    def add_point(self, point: SweepPoint) -> None:
        """Append to points.csv, durably and after the requests behind it: the cell is done."""
        with writing():
            self._requests.flush(durable=True)
            self._points.add(point, durable=True)
            # What is written to a file that has been removed is kept nowhere, and nobody is told.
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock")):
                raise FileNotFoundError(errno.ENOENT, "somebody has put another directory in its place")

    def add_gpu_sample(self, sample: GpuSample) -> None:
        """Append to gpu.csv."""
        with writing():
            self._gpu.add(sample)
            self._gpu.flush()

    def attempts(self) -> dict[str, int]:
        """The highest attempt of each cell that has left lines in requests.csv or gpu.csv."""
        highest: dict[str, int] = {}
        for name, record_type in (("requests.csv", RequestRecord), ("gpu.csv", GpuSample)):
            path = self.path / name
            if not path.exists():
                continue
            TableWriter(path, record_type).close()  # sees that it has these columns, and cuts a torn line
            with long_cells(), path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    key = uncell(row["cell"])
                    highest[key] = max(highest.get(key, 0), int(row["attempt"]))
        return highest

    def remember(self, request: Mapping[str, Any]) -> None:
        """Keep what a resume needs. It holds paths of this machine, so it is for its owner alone."""
        write(self.path / UNFINISHED, json.dumps(request, indent=1) + "\n", mode=0o600)

    def finish(self) -> None:
        """Every cell has its row: there is nothing to resume."""
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def describe(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write run.toml, once: a run that is resumed goes on as it was begun."""
        if not (self.path / "run.toml").exists():
            write(self.path / "run.toml", to_toml(redacted(tables)))

    def assume(self, text: str) -> None:
        """Keep a file of assumptions with the run, for its reports."""
        if not (self.path / ASSUMPTIONS).exists():
            write(self.path / ASSUMPTIONS, text)

    def described(self) -> dict[str, Any]:
        """The table [run] of run.toml; empty before it is written."""
        path = self.path / "run.toml"
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["run"] if path.exists() else {}
        return found

    def describe_environment(self, environment: Environment) -> None:
        """Write environment.json, or the next number's when the run is resumed."""
        write_record(self.fresh("environment", ".json"), environment)

    def fresh(self, stem: str, suffix: str) -> Path:
        return fresh(self.path, stem, suffix)

    def describe_engine(self, log: Path, info: EngineInfo) -> None:
        """Write what the engine said of itself beside its log."""
        write_record(log.with_suffix(".json"), info)

    def clean_logs(self) -> None:
        """Redact what engines wrote before a sweep was killed, which otherwise happens when they are stopped."""
        for log in self.path.glob("engine-*.log"):
            write(log, redact(log.read_text(encoding="utf-8", errors="replace")))

    @functools.cached_property
    def _requests(self) -> TableWriter:
        return self._table("requests.csv", RequestRecord)

    @functools.cached_property
    def _points(self) -> TableWriter:
        if self._outdated:
            write_table(self.path / "points.csv", self.done, SweepPoint)
        return self._table("points.csv", SweepPoint)

    @functools.cached_property
    def _gpu(self) -> TableWriter:
        return self._table("gpu.csv", GpuSample)

    def _table(self, name: str, record_type: type[Any]) -> TableWriter:
        self._tables.append(TableWriter(self.path / name, record_type))
        return self._tables[-1]


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """A disk that takes no more becomes a RunError that says what to do."""
    try:
        yield
    except BrokenPipeError:
        raise  # that was the terminal
    except OSError as error:
        raise RunError(
            f"the run directory cannot be written: {error.strerror or error}; all rows before that are on disk",
            remedy="free space on the disk, then: bench sweep --resume with that directory, or bench quality as before",
        ) from error


def write(path: Path, text: str, mode: int = 0o666) -> None:
    with writing():
        write_whole(path, text, mode=mode)


def write_record(path: Path, record: Environment | EngineInfo) -> None:
    """As JSON, without this machine's paths and names."""
    write(path, json.dumps(redacted(asdict(record)), indent=2) + "\n")


def fresh(directory: Path, stem: str, suffix: str) -> Path:
    """A path that is not there yet: stem.log, then stem-2.log, stem-3.log ... The stem may hold somebody's words."""
    stem = plain_name(stem)
    paths = itertools.chain([f"{stem}{suffix}"], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
    return next(directory / name for name in paths if not (directory / name).exists())


def unlock(path: Path, lock: TextIO) -> None:
    (path / ".lock").unlink(missing_ok=True)  # while it is ours: nobody may take it and lose it to us
    lock.close()


def locked(path: Path) -> TextIO:
    """The directory's lock file, made and locked. It goes when the process does, however that ends."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open(opened(path / ".lock"), "w")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}", remedy="choose another --out") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / ".lock")):
                return lock
        except FileNotFoundError:
            pass  # whoever held it has removed it between our two steps, and so it locks nothing: once more
        except BlockingIOError as error:
            lock.close()
            raise InputError(
                f"{path} is being written by another sweep", remedy="wait for its end, or choose another --out"
            ) from error
        except OSError as error:
            lock.close()
            raise InputError(
                f"{path} cannot be locked: {error.strerror}", remedy="choose an --out on another file system"
            ) from error
        lock.close()


def remembered(path: Path) -> dict[str, Any]:
    """What `remember` kept. Raises InputError when there is nothing to resume."""
    _check_resumable(path)
    _check_ours(path / UNFINISHED)
    try:
        found: dict[str, Any] = json.loads((path / UNFINISHED).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError, RecursionError) as error:
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


def _check_ours(file: Path) -> None:
    """Raise InputError where somebody else could have written what a resume does again: it names programs to start."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise InputError(
            f"{file} is a link, another user's, or others may write it; it says which programs a resume starts",
            allowed="a run that you have begun yourself",
            remedy="resume it as the user who began it, or run the sweep anew",
        )


def _rows_that_stay(path: Path) -> tuple[list[SweepPoint], bool]:
    """Rows of finished cells, and whether the table holds others.

    Where the engine died or refused everything, a resume is a second chance.
    """
    if not path.exists():
        return [], False
    cut_torn_line(path)
    if not path.stat().st_size:
        return [], False
    rows = read_table(path, SweepPoint)
    stay = [row for row in rows if not {"engine_died", "gave_up"} & set(row.verdict_reasons)]
    return stay, len(stay) < len(rows)


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
    plain = ("".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name).strip("-")[:80]
             for name in (model, scenario))  # fmt: skip
    return "-".join([f"{now:%Y%m%d-%H%M%S}", *plain])


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
        argv=tuple(without_places(item) for item in argv),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def without_places(argument: str) -> str:
    """An argument with its absolute paths cut to their last part: where things lie is this machine's business.

    A URL keeps its host: what follows it may be an account, or a key.
    """
    argument = re.sub(r"(\w+://[^/\s?#]*+)(?!/?(?:v1)?/?(?:\s|$))[^\s\"',}]+", r"\1/<path>", argument)
    return re.sub(r"(?<![\w./])~?/(?!/)(?:[^/\s=,]+/)+", "<path>/", argument)


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
