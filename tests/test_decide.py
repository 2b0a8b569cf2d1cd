"""The commands that compare and list runs, through the command line: what they print, and what they return to a CI."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.test_report import POINTS, REQUESTS, run_dir


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "harness", *arguments], capture_output=True, text=True, timeout=120)


def slower(factor: float) -> list[object]:
    """The same answers, each so many times as slow."""
    return [
        replace(
            record,
            first_token_ns=record.intended_ns + int(((record.first_token_ns or 0) - record.intended_ns) * factor),
            last_token_ns=record.intended_ns + int(((record.last_token_ns or 0) - record.intended_ns) * factor),
        )
        for record in REQUESTS
    ]


def test_an_upgrade_that_made_it_slower_fails_a_ci(tmp_path: Path) -> None:
    before = run_dir(tmp_path / "before", requests=REQUESTS)
    after = run_dir(tmp_path / "after", requests=slower(1.3))  # type: ignore[arg-type]
    done = bench("compare", str(before), str(after), "--metric", "p95_ms", "--out", str(tmp_path / "compare.md"))
    assert done.returncode == 1, done.stderr
    assert "Regressed" in done.stdout and "1.300×" in done.stdout
    assert "1.300×" in (tmp_path / "compare.md").read_text()
    better = bench("compare", str(after), str(before), "--metric", "p95_ms")
    assert better.returncode == 0 and "improved" in better.stdout
    lenient = bench("compare", str(before), str(after), "--metric", "p95_ms", "--tolerance", "50%")
    assert lenient.returncode == 0 and "No regression of more than 50 %" in lenient.stdout


def test_the_same_run_twice_passes_and_says_so(tmp_path: Path) -> None:
    run = run_dir(tmp_path / "run", requests=REQUESTS)
    done = bench("compare", str(run), str(run))
    assert done.returncode == 0 and "same run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{run}", "nowhere"), "is no directory"),
        (("{run}", "{run}", "--tolerance", "lots"), "--tolerance"),
        (("{run}", "{run}", "--metric", "beauty"), "beauty"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    run = str(run_dir(tmp_path / "run", requests=REQUESTS))
    done = bench("compare", *(argument.format(run=run) for argument in arguments))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_history(tmp_path: Path) -> None:
    run_dir(tmp_path / "results" / "good", POINTS)
    (tmp_path / "results" / "empty").mkdir()
    done = bench("history", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    good = next(line for line in done.stdout.splitlines() if line.startswith("good"))
    assert "demo_model" in good and "BF16 16, AWQ 32 users (p95 ≤ 3 s)" in good
    assert "empty" in done.stdout
    told = {run["run"]: run for run in json.loads(bench("history", str(tmp_path / "results"), "--json").stdout)["runs"]}
    assert told["good"]["safe_load"] == {"bf16": 16, "awq": 32} and told["empty"]["fault"] == "empty"
    assert bench("history", str(tmp_path / "nowhere")).returncode == 2
