"""The command line outside of sweeps: every command has help, bad input is exit code 2, good input does its work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.slo import parse_duration

ROOT = Path(__file__).parent.parent
COMMANDS = (
    ("sweep",), ("report",), ("quantize",), ("recover",), ("inspect",), ("doctor",), ("engine",), ("engine", "install"),
)  # fmt: skip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_stands_in_the_readme(command: tuple[str, ...]) -> None:
    done = bench(*command, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout.lower()
    assert f"bench {command[0]}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_of_the_readme_exists() -> None:
    """A README that promises an option that is gone is wrong on the first command that a stranger types."""
    promised = set(re.findall(r"`bench sweep[^`]*`", (ROOT / "README.md").read_text(encoding="utf-8")))
    promised_options = {option for text in promised for option in re.findall(r"--[a-z0-9-]+", text)}
    assert promised_options
    assert promised_options <= set(re.findall(r"--[a-z0-9-]+", bench("sweep", "--help").stdout))


def test_version() -> None:
    done = bench("--version")
    assert done.returncode == 0 and re.fullmatch(r"kneebench \S+\n", done.stdout)


@pytest.mark.parametrize(
    ("text", "seconds"), [("3s", 3.0), ("800ms", 0.8), ("2.5", 2.5), ("1500 ms", 1.5)]
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "--slo-p95") == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-3s", "3m", "1e3", "three"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="--slo-p95"):
        parse_duration(text, "--slo-p95")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "/no/such/run"), "/no/such/run"),
        (("report", str(ROOT / "tests")), "no run"),
        (("quantize", "demo", "--method", "magic"), "magic"),
        (("quantize", "/no/such/model"), "/no/such/model"),
        (("quantize", "shape:qwen2.5-0.5b"), "no weights"),
        (("engine", "install", "tpu"), "tpu"),
        (("dance",), "dance"),
    ],
)
def test_bad_input_is_exit_code_2(arguments: tuple[str, ...], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_doctor_names_what_is_missing_and_what_brings_it() -> None:
    done = bench("doctor")
    assert done.returncode == 0
    for word in ("GPU", "vLLM", "torch", "disk", "memory"):
        assert word.lower() in done.stdout.lower()


@pytest.mark.parametrize("run", sorted(path.parent.name for path in (ROOT / "results").glob("*/points.csv")))
def test_the_committed_reports_are_what_their_csvs_give(run: str, tmp_path: Path) -> None:
    done = bench("report", str(ROOT / "results" / run), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    committed = ROOT / "reports" / run / "capacity.md"
    assert (tmp_path / "capacity.md").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
