"""The run directory: what it says of the machine, what it keeps to itself, and what is left of it after a crash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines import EngineInfo
from harness.errors import InputError, RunError
from harness.records import GpuSample, RequestRecord, SweepPoint, read_table
from harness.rundir import UNFINISHED, RunDirectory, describe_machine, remembered, to_toml, writing

SCALARS = st.one_of(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1), st.booleans())


def point(conc: int, *reasons: str) -> SweepPoint:
    return SweepPoint("run", "bf16", conc, verdict_reasons=reasons)


def request(cell: str, attempt: int = 1) -> RequestRecord:
    return RequestRecord(cell, 0, 0, "measured", 1, attempt)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was interrupted: one good row, one of a dead engine."""
    with RunDirectory(tmp_path / "run") as directory:
        directory.remember({"model": "m"})
        for row in (point(1), point(2, "engine_restarted", "engine_died"), point(4, "gave_up")):
            directory.add_request(request(f"bf16-c{row.conc}-r1"))
            directory.add_point(row)
    return tmp_path / "run"


# --- what is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/srv/engines/vllm/bin/python", "<path>/python"),
        ("awq=/data/models/mine-awq", "awq=<path>/mine-awq"),
        ("~/models/x", "<path>/x"),
        ("--out=/var/tmp/run", "--out=<path>/run"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://api.example.com", "https://api.example.com"),
        ("https://api.example.com/accounts/8842/v1", "https://api.example.com/<path>"),
        ("--to=http://host:1/a?b=c", "--to=http://host:1/<path>"),
        ('{"a": "http://host/b", "c": "/data/d/e"}', '{"a": "http://host/<path>", "c": "<path>/e"}'),
        ("file:///data/secret/place", "file:///<path>"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("results/mine", "results/mine"),
        ("./here/run", "./here/run"),
        ("1,8,16,32", "1,8,16,32"),
    ],
)
def test_arguments_are_recorded_without_this_machines_places(argument: str, kept: str) -> None:
    assert describe_machine("vllm", "0", [argument]).argv == (kept,)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.one_of(SCALARS, st.lists(SCALARS))))
def test_run_toml_reads_back(table: dict[str, object]) -> None:
    assert tomllib.loads(to_toml({"run": table})) == {"run": table}


def test_descriptions_hold_no_key_and_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "20261120")
    with RunDirectory(tmp_path / "run") as directory:
        directory.describe({"run": {"seed": 20261120, "engine_args": ["--x=20261120"]}})
        directory.describe_engine(
            directory.fresh("engine-awq-r1", ".log"), EngineInfo("vllm", kv_cache_tokens=20261120)
        )
    toml = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert toml["run"] == {"seed": 20261120, "engine_args": ["--x=<key>"]}
    assert json.loads((tmp_path / "run" / "engine-awq-r1.json").read_text())["kv_cache_tokens"] == 20261120


def test_a_run_is_described_as_it_was_begun(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        assert directory.described() == {}
        directory.describe({"run": {"repeats": 1}})
        directory.describe({"run": {"repeats": 2}})
        assert directory.described() == {"repeats": 1}
        environment = describe_machine("vllm", "0.32.0", [])
        directory.describe_environment(environment)
        directory.describe_environment(environment)
    assert sorted(contents(tmp_path / "run")) == ["environment-2.json", "environment.json", "run.toml"]


def test_what_a_resume_needs_is_for_its_owner_alone(begun: Path) -> None:
    assert (begun / UNFINISHED).stat().st_mode & 0o777 == 0o600
    assert remembered(begun) == {"model": "m"}
    with RunDirectory(begun, resume=True) as directory:
        directory.finish()
    assert not (begun / UNFINISHED).exists()


def test_logs_of_an_engine_whose_sweep_was_killed_are_cleaned(begun: Path) -> None:
    log = begun / "engine-awq-r1.log"
    log.write_text(f"key kneebench-0123456789abcdefghijklmnopqrstuv in {Path.home()}/x\n")
    with RunDirectory(begun, resume=True) as directory:
        directory.clean_logs()
    assert log.read_text() == "key <key> in <home>/x\n"


# --- one writer -------------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as first:
        first.remember({})
        for resume in (False, True):
            with pytest.raises(InputError, match="being written by another sweep"):
                RunDirectory(tmp_path / "run", resume=resume)
        first.add_point(point(1))
    assert sorted(contents(tmp_path / "run")) == [UNFINISHED, "points.csv", "requests.csv"]


def test_the_lock_of_a_killed_sweep_is_free(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom harness.rundir import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])) as directory:\n"
        "    directory.remember({})\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False)
    assert (tmp_path / "run" / ".lock").exists()
    with RunDirectory(tmp_path / "run", resume=True) as directory:
        assert directory.done == []
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_its_holder_has_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened while another sweep held it, locked when that one had ended: a third would make and lock a new file."""
    path, calls, lock = tmp_path / "run", 0, fcntl.flock

    def ends_between(file: Any, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (path / ".lock").unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", ends_between)
    with RunDirectory(path):
        monkeypatch.undo()
        with pytest.raises(InputError, match="being written by another sweep"):
            RunDirectory(path)
    assert calls == 2


def test_a_run_is_not_written_over(begun: Path) -> None:
    before = contents(begun)
    with pytest.raises(InputError, match="--resume"):
        RunDirectory(begun)
    (begun / UNFINISHED).rename(begun / "kept")
    with pytest.raises(InputError, match="choose another --out"):
        RunDirectory(begun)
    with pytest.raises(InputError, match="that run is finished"):
        RunDirectory(begun, resume=True)
    (begun / "kept").rename(begun / UNFINISHED)
    assert contents(begun) == before


def test_a_sweep_that_was_killed_before_its_first_row_is_a_run_as_well(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        directory.remember({"model": "m"})
    with pytest.raises(InputError, match="--resume"):
        RunDirectory(tmp_path / "run")
    with RunDirectory(tmp_path / "run", resume=True) as directory:
        assert (directory.done, directory.attempts()) == ([], {})


@pytest.mark.parametrize("made", [True, False])
def test_nothing_to_resume(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "run").mkdir()
    for use in (remembered, lambda path: RunDirectory(path, resume=True)):
        with pytest.raises(InputError, match="no run that was begun"):
            use(tmp_path / "run")
    assert (tmp_path / "run").exists() == made
    assert not made or contents(tmp_path / "run") == {}


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_looking_at_a_run_changes_nothing(begun: Path) -> None:
    """A resume that is refused (another engine, another checkpoint) must not cost the rows that it would replace."""
    before = contents(begun)
    with RunDirectory(begun, resume=True) as directory:
        assert [row.conc for row in directory.done] == [1]
        assert directory.attempts() == {"bf16-c1-r1": 1, "bf16-c2-r1": 1, "bf16-c4-r1": 1}
    assert contents(begun) == before


def test_rows_of_a_dead_engine_go_when_the_next_row_comes(begun: Path) -> None:
    with RunDirectory(begun, resume=True) as directory:
        directory.add_point(point(8))
    assert [row.conc for row in read_table(begun / "points.csv", SweepPoint)] == [1, 8]
    assert len(read_table(begun / "requests.csv", RequestRecord)) == 3, "what was measured stays"


@pytest.mark.parametrize("written", [1, 20, 40])
def test_a_row_that_was_torn_is_measured_again(begun: Path, written: int) -> None:
    for name in ("points.csv", "requests.csv"):
        *whole, last = (begun / name).read_bytes().splitlines(keepends=True)
        (begun / name).write_bytes(b"".join(whole) + last[:written])
    with RunDirectory(begun, resume=True) as directory:
        assert [row.conc for row in directory.done] == [1]
        assert directory.attempts() == {"bf16-c1-r1": 1, "bf16-c2-r1": 1}
        directory.add_request(request("bf16-c2-r1", 2))
        directory.add_point(point(2))
    assert [row.conc for row in read_table(begun / "points.csv", SweepPoint)] == [1, 2]
    assert [r.attempt for r in read_table(begun / "requests.csv", RequestRecord)] == [1, 1, 2]


def test_answers_of_any_length_can_be_read_back(begun: Path) -> None:
    """The times of 30,000 chunks are a cell longer than Python's csv takes unless it is told to."""
    with RunDirectory(begun, resume=True) as directory:
        directory.add_request(replace(request("bf16-c8-r1"), chunk_us=tuple(range(1_000_000, 1_030_000))))
        assert directory.attempts()["bf16-c8-r1"] == 1
    assert len(read_table(begun / "requests.csv", RequestRecord)[-1].chunk_us) == 30_000


def test_gpu_samples_count_as_an_attempt_too(begun: Path) -> None:
    """A sweep killed before a cell's first request had ended has left samples of the card, and they have a number."""
    with RunDirectory(begun, resume=True) as directory:
        directory.add_gpu_sample(GpuSample("bf16-c16-r1", 1, 0))
        directory.add_gpu_sample(GpuSample("bf16-c2-r1", 1, 0, attempt=3))
        assert len((begun / "gpu.csv").read_text().splitlines()) == 3, "they are not kept back"
        assert directory.attempts() == {"bf16-c1-r1": 1, "bf16-c2-r1": 3, "bf16-c4-r1": 1, "bf16-c16-r1": 1}


# --- full disks and half files ----------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_file_that_was_there(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(begun)
    with RunDirectory(begun, resume=True) as directory:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device(?s:.*)--resume"):
            directory.remember({"model": "other"})
        with pytest.raises(RunError, match="No space left on device"):
            directory.describe({"run": {}})
        monkeypatch.undo()
    assert contents(begun) == before, "nor does half a file stay behind"


def test_half_files_of_a_killed_sweep_are_removed(begun: Path) -> None:
    before = contents(begun)
    for name in (f"{UNFINISHED}.partial", "points.csv.partial"):
        (begun / name).write_text("ha")
    with RunDirectory(begun, resume=True):
        pass
    assert contents(begun) == before


def test_a_failure_to_write_is_one_that_the_user_understands() -> None:
    with pytest.raises(RunError, match="No space left(?s:.*)To mend it: free space") as caught:
        with writing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 1
    with pytest.raises(BrokenPipeError):  # `bench sweep | head`
        with writing():
            raise BrokenPipeError
