"""A little of the fuzzing that `python benchmarks/fuzz.py` does for hours, by fixed seeds. What it found stays mended.

Only errors that a reader declares may come of any input. Inputs that take long are told by pytest's timeout alone.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from harness import redact
from harness.load import answer
from harness.telemetry import prometheus
from tests.fuzz.mutator import mutate
from tests.fuzz.targets import TARGETS, found

FOUND = list(found())


@pytest.mark.parametrize("name", TARGETS)
def test_real_inputs_are_read(name: str) -> None:
    for data in TARGETS[name].seeds():
        TARGETS[name].read(data)


@pytest.mark.parametrize(("name", "path"), FOUND, ids=[f"{name}-{path.name}" for name, path in FOUND])
def test_what_broke_a_reader_once_is_read_or_refused(name: str, path: Path) -> None:
    TARGETS[name].read(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_odd_inputs_are_read_or_refused(name: str) -> None:
    target, rng = TARGETS[name], random.Random(f"ci/{name}")
    seeds = target.seeds()
    for _ in range(target.in_ci):
        target.read(mutate(rng, rng.choice(seeds), seeds, min(target.longest, 1 << 13)))


PUMPED = {
    "spaces": b" " * 99 + b"x",
    "dashes": b"-",
    "options": b"--key",
    "keys": b"sk-",
    "tokens": b"-eyJ",
    "bearers": b"bearer ",
    "addresses": b"10.1.1.",
    "types": b"dtype=torch.x,",
    "kernels": b"Using marlin",
    "processes": b"(EngineCore pid=1 pid=",
    "versions": b"LLM engine (v",
    "frames": b'  File "a", line 1, in f\nError:\n',
    "one traceback": b'  File "a", line 1, in f\n',
    "errors": b"Error:\n",
}
"""Pieces of which a long line or log was made that took minutes, by readers that looked at each place of it anew."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", PUMPED.values(), ids=PUMPED)
@pytest.mark.parametrize("name", ["vllm_log", "redacted"])
def test_a_quarter_mebibyte_of_one_piece_is_read_in_time(name: str, piece: bytes) -> None:
    """Of dashes, 32 KiB took the redactor 17 s once, and eight times as much takes 64 times as long: 18 minutes."""
    TARGETS[name].read(piece * ((1 << 18) // len(piece)))


@pytest.mark.timeout(120)
def test_half_a_log_of_frames_and_half_of_errors() -> None:
    """Each error was looked at with every frame above it: 64 KiB took half a minute."""
    TARGETS["vllm_log"].read(b'  File "a", line 1, in f\n' * 4000 + b"ValueError: x\n" * 8000)


# --- that it would find something -------------------------------------------------------------------------------------


_on_body = answer.ResponseReader.on_body


def _forgets_half_a_line(self: answer.ResponseReader, body: bytes) -> None:
    _on_body(self, body[: body.rfind(b"\n") + 1])


BROKEN: dict[str, tuple[str, Any, str, Any]] = {
    "a reader that forgets half a line": ("events", answer.ResponseReader, "on_body", _forgets_half_a_line),
    "counters that take infinity": ("metrics", prometheus.math, "isfinite", lambda value: True),
    "keys that are left in": ("redacted", redact, "without_keys", lambda text: text),
    "a parser that raises what it does not declare": ("scenario", tomllib, "loads", lambda text: {}["x"]),
}


@pytest.mark.parametrize(("name", "where", "what", "instead"), BROKEN.values(), ids=BROKEN)
def test_a_broken_reader_is_found(
    name: str, where: Any, what: str, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, what, instead)
    with pytest.raises((AssertionError, ArithmeticError, LookupError, ValueError)):
        test_odd_inputs_are_read_or_refused(name)
        for target, path in FOUND:
            if target == name:
                TARGETS[name].read(path.read_bytes())


# --- the mutator ------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_inputs() -> None:
    corpus = [b'{"a": 1, "b": [2, "c"]}', b"x = 1\n"]

    def made(seed: str) -> list[bytes]:
        rng = random.Random(seed)
        return [mutate(rng, rng.choice(corpus), corpus, 64) for _ in range(200)]

    assert made("a") == made("a") != made("b")
    assert all(len(data) <= 64 for data in made("a"))


def test_every_kind_of_change_comes_up() -> None:
    """An odd value in place of one, a piece a hundredfold, a cut, and the other input's end."""
    rng, corpus = random.Random("kinds"), [b"count = 7\nrest\n", b"(the other one)"]
    made = [mutate(rng, corpus[0], corpus, 4096) for _ in range(3000)]
    assert any(data.startswith(b"count = NaN\nrest") for data in made)
    assert any(len(data) > 1000 and len(set(data)) < 20 for data in made)
    assert any(corpus[0].startswith(data) and len(data) < 9 for data in made)
    assert any(data.startswith(b"count") and data.endswith(b"other one)") for data in made)
    assert mutate(rng, b"", [b""], 64) is not None


# --- benchmarks/fuzz.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[Callable[[bytes], None]], fuzz.Watched]]:
    """`watched(read)`: the counted form of a reader, whose finds go to tmp_path; its clock is stopped at the end."""
    handler = signal.getsignal(signal.SIGVTALRM)
    yield lambda read: fuzz.Watched("t", read, tmp_path, 1)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)


def test_crashes_are_counted_and_the_shortest_input_is_kept(watched: Any, tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        if b"x" in data:
            raise KeyError("x")

    target = watched(read)
    for data in (b"a", b"xxx", b"x", b"xx"):
        target(data)
    assert (target.inputs, target.crashes, target.hangs) == (4, 3, 0)
    (kept,) = [path for path in tmp_path.iterdir() if path.suffix != ".txt"]
    assert kept.name.startswith("t-crash-KeyError-test_fuzz-") and kept.read_bytes() == b"x"
    assert "KeyError" in kept.with_name(kept.name + ".txt").read_text()


def test_a_hang_is_stopped_and_told_from_a_crash(watched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.1)
    monkeypatch.setattr(fuzz, "SLOW_S", 0.1)

    def read(data: bytes) -> None:
        try:
            while data:
                pass
        except Exception:  # a reader may catch whatever is an Exception; this must get through
            pass

    target = watched(read)
    target(b"")
    target(b"loop")
    assert (target.inputs, target.crashes, target.hangs, target.slow) == (2, 0, 1, 1)
    assert target.slowest_bytes == 4


def test_a_process_that_falls_silent_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SILENT_S", 0.2)
    monkeypatch.setattr(fuzz, "by_chance", lambda *_: time.sleep(60))
    said = fuzz._child("words", 10, 0, tmp_path, guided=False)
    assert said["died"] and said["inputs"] == 0


def test_rounds_go_on_where_they_stopped_and_end_in_a_table(tmp_path: Path) -> None:
    """Twice the same command; the second adds only what is missing to its larger number."""
    for inputs in (200, 300):
        command = [
            sys.executable,
            "benchmarks/fuzz.py",
            "--unguided",
            "--inputs",
            str(inputs),
            "--target",
            "words",
            "--target",
        ]
        done = subprocess.run(
            [*command, "trace", "--out", str(tmp_path)], capture_output=True, text=True, check=True, cwd=fuzz.ROOT
        )
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert sum(row["inputs"] for row in rows) >= 300 and {row["target"] for row in rows} == {"words", "trace"}
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert len({(row["round"], row["target"]) for row in rows}) == len(rows)
    assert not any(row["crashes"] or "died" in row for row in rows)
    total = sum(row["inputs"] for row in rows)
    assert f"| **all** | {total:,} |" in done.stdout


def test_the_table_adds_up(tmp_path: Path) -> None:
    """Two rounds of a target: 100 + 300 inputs in 2 + 2 s are 100 a second; the process that died counts as a hang."""
    rows = [
        {"round": 0, "target": "a", "guided": False, "inputs": 100, "cpu_s": 2.0, "crashes": 1, "slow": 0, "hangs": 0,
         "slowest_s": 0.25, "slowest_bytes": 7},
        {"round": 1, "target": "a", "guided": True, "inputs": 300, "cpu_s": 2.0, "crashes": 0, "slow": 2, "hangs": 1,
         "slowest_s": 1.5, "slowest_bytes": 9, "died": 9},
    ]  # fmt: skip
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = "| 400 | 300 | 100 | 1 | 2 | 2 | 1,500 ms (9 bytes) |"
    assert fuzz.table(path).splitlines()[2:] == [f"| a {figures}", f"| **all** {figures}"]
