"""Disks that are full or read-only, directories that go away, and no home: what was written stays, and is added to.

A small file system of its own (mount in a namespace) is a full or a read-only disk; where that is not allowed a limit
on the size of files, or /proc, which nobody can write, has to do.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import main
from harness.job import SweepRequest, resume
from harness.records import RequestRecord, SweepPoint, read_table, write_table
from tests.faults.hostile import SCENARIO, Quiet, hostile, swept
from tests.test_resume import FAST, line, lines, refused, rows, small, until

__all__ = ["refused"]
Begin = Callable[..., subprocess.Popen[str]]
Refused = Callable[..., str]
Truth = Callable[..., str]
ROOT = Path(__file__).parents[2]
RUN = sorted(path.parent for path in (ROOT / "results").glob("*/points.csv"))[0]


def bench(
    *arguments: str, most_bytes: int | None = None, surroundings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with files of at most so many bytes."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=surroundings,
        preexec_fn=most_bytes and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))),  # type: ignore[func-returns-value]
    )


def mounted(at: Path, options: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's script where `at` is a small file system of its own; skips where nobody may mount."""
    at.mkdir()
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    may = subprocess.run([*alone, f"mount -t tmpfs -o size=64k none {at}"], capture_output=True)
    if may.returncode:
        pytest.skip("no mount in a namespace of one's own")
    both = f"mount -t tmpfs {options} none {at} && {{ {script} ; }}"
    return subprocess.run([*alone, both], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_a_full_disk_of_its_own(truth: Truth, tmp_path: Path) -> None:
    """ENOSPC in the middle of requests.csv: exit code 1 with what to do, and the run goes on elsewhere."""
    disk, kept = tmp_path / "disk", tmp_path / "run"
    arguments = (
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1,2,3", "--scenario", small(tmp_path),
        "--out", str(disk / "run"),
    )  # fmt: skip
    command = " ".join(line(*arguments))
    done = mounted(disk, "-o size=36k", f"{command}; ended=$?; cp -r {disk}/run {kept}; exit $ended")
    assert done.returncode == 1, done.stderr
    assert "No space left" in done.stderr and "free space" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    before = rows(kept)
    assert read_table(kept / "requests.csv", RequestRecord) and len(before) < 3
    resume(kept, Quiet())
    assert rows(kept)[: len(before)] == before and [row.conc for row in rows(kept)] == [1, 2, 3]


def test_no_room_for_a_row(truth: Truth, begin: Begin, tmp_path: Path) -> None:
    """The cell's requests are on the disk and its row is torn: the cell is measured again, nothing before is lost."""
    out = tmp_path / "run"
    process = begin(
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1,2,3", "--scenario", small(tmp_path),
        "--out", str(out),
    )  # fmt: skip
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    process.kill()
    process.wait()
    (row,) = rows(out)[:1]  # so many rows of other cells that theirs is the largest file
    write_table(out / "points.csv", [row, *(replace(row, conc=100 + number) for number in range(60))], SweepPoint)
    (out / "requests.csv").unlink()
    size = (out / "points.csv").stat().st_size
    done = bench("sweep", "--resume", str(out), most_bytes=size + 90)
    assert done.returncode == 1 and "File too large" in done.stderr and "--resume" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    torn = (out / "points.csv").read_bytes()
    assert len(torn) == size + 90 and not torn.endswith(b"\n") and len(rows(out)) == 61
    resume(out, Quiet())
    assert [row.conc for row in rows(out)][61:] == [2, 3] and rows(out)[0] == row


def test_no_room_for_the_papers(tmp_path: Path) -> None:
    """Exit code 1; no half paper lies there, and what was there stays."""
    out = tmp_path / "papers"
    out.mkdir()
    (out / "capacity.md").write_text("of before\n")
    done = bench("report", str(RUN), "--out", str(out), most_bytes=1000)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "To mend it" in done.stderr
    assert (out / "capacity.md").read_text() == "of before\n"
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial") or path.stat().st_size == 1000]


def test_a_disk_that_is_read_only(truth: Truth, tmp_path: Path) -> None:
    """Found before anything is measured: exit code 2, another --out."""
    disk = tmp_path / "disk"
    command = " ".join(line("--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--out", str(disk / "run")))
    done = mounted(disk, "-o ro,size=64k", command)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "another --out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sweep", "--endpoint", "URL", "--model", "truth", "--conc", "1", "--out", "/proc/run"), 2),
        (("report", str(RUN), "--out", "/proc/papers"), 2),
        (("init", "/proc/sweep.toml"), 2),
        (("quantize", "demo", "--method", "rtn", "--out", "/proc/out"), 2),
    ],
    ids=["sweep", "report", "init", "quantize"],
)
def test_a_place_that_nobody_can_write(
    arguments: tuple[str, ...],
    code: int,
    truth: Truth,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One clear message that names the place."""
    given = [truth(*FAST) if argument == "URL" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["bench", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == code and "/proc/" in said and "Traceback" not in said, said


@pytest.mark.parametrize("then", ["gone", "another"])
def test_a_run_directory_that_goes_away(then: str, tmp_path: Path) -> None:
    """Removed, or another in its place, between two cells: what is measured would be kept nowhere; the sweep ends."""
    out, seen = tmp_path / "run", set[str]()

    def on_record(record: RequestRecord) -> None:
        if record.cell not in seen and len(seen) == 1:
            shutil.move(out, tmp_path / "moved")
            if then == "another":
                out.mkdir()
                (out / ".lock").touch()
        seen.add(record.cell)

    with hostile() as server:
        request = SweepRequest(SCENARIO, (2, 3, 4), "truth", ("served",), out=out, endpoint=server.url)
        done = swept(out, request, on_record)
    assert done.code == 1 and "run directory cannot be written" in done.said, done.said
    assert "served-c4-r1" not in seen, "it ends with the cell"
    assert rows(tmp_path / "moved")[0].requests >= SCENARIO.requests
    assert not out.exists() or list(out.iterdir()) in ([], [out / ".lock"])


NO_HOME = {name: "/proc/nowhere" for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}


def test_a_cache_that_cannot_be_written(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is needed that is said, with the variable that names another."""
    for name, value in NO_HOME.items():
        monkeypatch.setenv(name, value)
    said = refused("--model", "shape:qwen2.5-0.5b", "--out", str(tmp_path / "run"))
    assert "/proc/nowhere" in said and "XDG_CACHE_HOME" in said and "Traceback" not in said


def test_no_home(truth: Truth, tmp_path: Path) -> None:
    """Where none is needed, none is missed: a sweep of an endpoint, with its papers."""
    out = tmp_path / "run"
    done = bench(
        "sweep", "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--scenario", small(tmp_path),
        "--out", str(out), surroundings=dict(os.environ) | NO_HOME,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(rows(out)) == 1 and (out / "report" / "capacity.html").exists()
