"""What ends a sweep from outside, at each of its stages: rows are kept, and every process that it started is ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.job import resume
from harness.report.papers import write_report
from tests.faults.hostile import Quiet
from tests.faults.test_engine_process import Engine
from tests.test_resume import check_whole, end, line, lines, living, rows, small, until

Begin = Callable[..., subprocess.Popen[str]]
Truth = Callable[..., str]


@pytest.fixture
def background() -> Iterator[Begin]:
    """`background(*arguments, ignores=...)` starts a sweep as a script's background job: it ignores SIGINT, and has a
    process group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, ignores: signal.Signals = signal.SIGINT) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                line(*arguments), stdout=pipe, stderr=pipe, text=True, start_new_session=True,
                preexec_fn=lambda: _only_ignoring(ignores),
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        end(process)


def _only_ignoring(ignored: signal.Signals) -> None:
    """Whatever the tests themselves were started under, as nohup."""
    for number in (signal.SIGTERM, signal.SIGHUP, ignored):
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)


def code(process: subprocess.Popen[str]) -> int:
    """As a shell shows it. Python ends itself by SIGINT where it was interrupted in an exec, as of a dataclass."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def served(engine: Engine, tmp_path: Path, conc: str) -> tuple[str, ...]:
    return (
        "--model", str(engine.model), "--precisions", "bf16", "--engine-python", str(engine.home / "python"),
        "--scenario", small(tmp_path), "--out", str(tmp_path / "run"), "--conc", conc,
    )  # fmt: skip


@pytest.mark.parametrize(("how", "whom"), [(signal.SIGTERM, "sweep"), (signal.SIGHUP, "group")], ids=["term", "hup"])
def test_a_signal_in_a_cell_ends_the_sweep_as_ctrl_c_does(
    how: signal.Signals, whom: str, background: Begin, engine: Engine, tmp_path: Path
) -> None:
    """Sent to the sweep alone (kill), or to all of its group (a terminal that goes, a scheduler): the same end."""
    out = tmp_path / "run"
    process = background(*served(engine, tmp_path, "1,2,3"))
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    family = psutil.Process(process.pid).children(recursive=True)
    assert engine.processes() and len(family) >= 2, "an engine and a generator"
    os.killpg(process.pid, how) if whom == "group" else process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert code(process) == 130 and "every finished row is on disk" in said, said
    assert "generator" not in said and "Traceback" not in said
    assert not living(family) and not engine.processes()
    before = rows(out)
    assert 1 <= len(before) < 3
    resume(out, Quiet())
    assert rows(out)[: len(before)] == before and [row.conc for row in rows(out)] == [1, 2, 3]
    assert not [path for path in out.iterdir() if path.name.startswith(".") or path.name.endswith(".partial")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_starts(how: signal.Signals, begin: Begin, engine: Engine, tmp_path: Path) -> None:
    """The engine is ended before it has answered once; the run has no row yet, and can be resumed."""
    out = tmp_path / "run"
    engine.does("hangs")
    process = begin(*served(engine, tmp_path, "1"))
    assert until(lambda: lines(out / "engine-bf16-r1.log"), process), process.communicate()
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert code(process) == 130 and "interrupted" in said and "Traceback" not in said, said
    assert not engine.processes() and not (out / "points.csv").exists()
    engine.does("serve")
    resume(out, Quiet())
    assert [row.conc for row in rows(out)] == [1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_papers_are_written(how: signal.Signals, begin: Begin, truth: Truth, tmp_path: Path) -> None:
    """The run is finished: nothing is to be resumed, and `bench report` writes what is missing."""
    out = tmp_path / "run"
    process = begin(
        "--endpoint", truth("--ttft-ms", "5", "--gap-ms", "1"), "--model", "truth", "--conc", "1",
        "--scenario", small(tmp_path), "--out", str(out),
    )  # fmt: skip
    assert until(lambda: lines(out / "points.csv") == 2 and not list(out.glob(".*")), process)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert code(process) == 130 and "interrupted" in said and "Traceback" not in said, said
    assert [row.conc for row in rows(out)] == [1]
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
    write_report(out, out / "report")
    check_whole(out)


def test_a_sweep_under_nohup_outlives_its_terminal(background: Begin, truth: Truth, tmp_path: Path) -> None:
    """nohup has SIGHUP ignored: it is not heard, and the sweep goes on to its end."""
    out = tmp_path / "run"
    process = background(
        "--endpoint", truth("--ttft-ms", "5", "--gap-ms", "1"), "--model", "truth", "--conc", "1,2",
        "--scenario", small(tmp_path), "--out", str(out), ignores=signal.SIGHUP,
    )  # fmt: skip
    assert until(lambda: lines(out / "requests.csv") > 2, process), process.communicate()
    os.killpg(process.pid, signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert [row.conc for row in rows(out)] == [1, 2]
    check_whole(out)
