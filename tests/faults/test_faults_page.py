"""docs/faults.md is what tools/faults.py makes of the entries, and every test that they name exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faults
import pytest

ENTRY = '[[fault]]\nname = "a | b"\nprovoked = "p"\nexpected = "e"\ntest = "t.py::t"\n'


def test_every_test_that_is_named_exists() -> None:
    tests = [fault.test for entries in faults.read().values() for fault in entries]
    files = sorted({test.partition("::")[0] for test in tests})
    assert files and all((faults.ROOT / file).is_file() for file in files)
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(line, cwd=faults.ROOT, capture_output=True, text=True, timeout=120).stdout.splitlines()
    exist = {*collected, *(test.partition("[")[0] for test in collected)}
    assert not [test for test in tests if test not in exist]


def test_the_page_is_that_of_the_entries() -> None:
    found = faults.read()
    outcomes = {fault.test: "passed" for entries in found.values() for fault in entries}
    assert faults.PAGE.read_text(encoding="utf-8") == faults.page(found, outcomes), "run: python tools/faults.py"


def test_a_page_worked_by_hand(tmp_path: Path) -> None:
    """Two entries of one file, one of them mended: 2 faults, 1 held at once, 1 mended, 1 of them passes."""
    (tmp_path / "engine.toml").write_text(
        ENTRY + ENTRY.replace("a | b", "c").replace("t.py::t", "u.py::u[1]") + 'mended = "m"'
    )
    found = faults.read(tmp_path)
    text = faults.page(found, {"t.py::t": "passed", "u.py::u[1]": "failed"})
    assert "| Engine and network | 2 | 1 | 1 | 1 |" in text
    assert "| a \\| b | p | e | passed | `t.py::t` |" in text
    assert "| c | p | e | failed, after mending | `u.py::u[1]` |" in text and "- **c**: m" in text


@pytest.mark.parametrize("text", [ENTRY.replace('"e"', '""'), ENTRY + 'walls = "3"', ENTRY + ENTRY, "[[fault]]\n"])
def test_entries_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError):
        faults.read(tmp_path)


def test_a_test_that_did_not_run_is_missing_and_a_failed_case_fails_all() -> None:
    seen = faults._Outcomes()
    seen.seen = {"a.py::t[1]": "passed", "a.py::t[2]": "failed", "a.py::u": "passed"}
    assert [seen.of(test) for test in ("a.py::t", "a.py::t[1]", "a.py::u", "a.py::v")] == [
        "failed",
        "passed",
        "passed",
        "missing",
    ]
