"""docs/faults.md from tests/faults/*.toml: what is provoked, what is expected, and how its test ended.

    python tools/faults.py          runs every test that is named, and writes the page
    python tools/faults.py --list   only says what would be run

An entry is [[fault]] with name, provoked (how), expected (what the user sees and what is kept), test (a pytest id; one
of a parametrized test's or all of them) and, where the code failed at first, mended (what it did then). The page says
"passed" of what passed just now, and of nothing else; tests/faults/test_faults_page.py holds that it is current.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "faults"
PAGE = ROOT / "docs" / "faults.md"
TITLES = {"engine": "Engine and network", "machine": "Machine and files"}

OPENING = """# Faults

What is provoked, what a user then sees, and what is kept. Each row is a test that makes the fault happen, mostly to a
whole sweep: real sockets, real processes, real files. What is expected was written down from the design, before the
test: bad input ends with exit code 2 before anything is begun, a failed run with exit code 1, and either says what was
given, what is allowed and what to do; finished rows stay; a point that a fault has touched says so; a failure is a
record with its class; nothing waits for ever, and nothing that a server sends is held without bound.

This page is written by `python tools/faults.py` from `tests/faults/*.toml`, and the outcome is that of the tests it
ran. "Mended" is what the code did when the test was first run.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry."""

    name: str
    provoked: str
    expected: str
    test: str
    mended: str = ""


def read(folder: Path = FOLDER) -> dict[str, list[Fault]]:
    """The faults of each file, by the file's name without .toml. Raises ValueError for an entry that is not whole."""
    known = {field.name for field in fields(Fault)}
    found = {}
    for path in sorted(folder.glob("*.toml")):
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
        for entry in entries:
            if not known - {"mended"} <= set(entry) <= known or not all(entry.values()):
                raise ValueError(f"{path.name}: {entry.get('name')!r} has {sorted(entry)}, wanted: {sorted(known)}")
        found[path.stem] = [Fault(**entry) for entry in entries]
    names = [fault.name for faults in found.values() for fault in faults]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"named twice: {', '.join(twice)}")
    return found


def page(found: Mapping[str, Sequence[Fault]], outcomes: Mapping[str, str]) -> str:
    """The page; `outcomes` by the test of a fault."""
    parts = [OPENING, _counts(found, outcomes)]
    for area, faults in found.items():
        rows = [
            f"| {_cell(fault.name)} | {_cell(fault.provoked)} | {_cell(fault.expected)} "
            f"| {_outcome(fault, outcomes)} | `{_cell(fault.test)}` |"
            for fault in faults
        ]
        head = ["| fault | provoked by | expected | outcome | test |", "| --- | --- | --- | --- | --- |"]
        parts.append("\n".join([f"## {TITLES.get(area, area)}", "", *head, *rows]) + "\n")
    mended = [fault for faults in found.values() for fault in faults if fault.mended]
    if mended:
        lines = [f"- **{fault.name}**: {fault.mended}" for fault in mended]
        parts.append("\n".join(["## What was mended", "", *lines]) + "\n")
    return "\n".join(parts)


def _counts(found: Mapping[str, Sequence[Fault]], outcomes: Mapping[str, str]) -> str:
    rows = []
    for area, faults in found.items():
        passed = sum(outcomes[fault.test] == "passed" for fault in faults)
        mended = sum(bool(fault.mended) for fault in faults)
        rows.append(f"| {TITLES.get(area, area)} | {len(faults)} | {len(faults) - mended} | {mended} | {passed} |")
    head = "| area | faults | held at once | mended | pass now |\n| --- | ---: | ---: | ---: | ---: |"
    return "\n".join([head, *rows]) + "\n"


def _outcome(fault: Fault, outcomes: Mapping[str, str]) -> str:
    return f"{outcomes[fault.test]}, after mending" if fault.mended else outcomes[fault.test]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


class _Outcomes:
    """A plugin of pytest that remembers how each test ended: failed wins over skipped, skipped over passed."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        order = ["passed", "skipped", "failed"]
        before = self.seen.get(report.nodeid, "passed")
        self.seen[report.nodeid] = max(before, report.outcome, key=order.index)

    def of(self, test: str) -> str:
        """Of a test, or of all cases of a parametrized one."""
        ended = {outcome for seen, outcome in self.seen.items() if seen == test or seen.startswith(test + "[")}
        return next((outcome for outcome in ("failed", "skipped", "passed") if outcome in ended), "missing")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a test did not pass; the page is then left as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which tests would be run")
    found = read()
    tests = list(dict.fromkeys(fault.test for faults in found.values() for fault in faults))
    if parser.parse_args(argv).list:
        print("\n".join(tests))
        return 0
    outcomes = _Outcomes()
    pytest.main(["-q", "-n", "auto", f"--rootdir={ROOT}", *[str(ROOT / test) for test in tests]], plugins=[outcomes])
    ended = {test: outcomes.of(test) for test in tests}
    bad = [f"{test}: {outcome}" for test, outcome in ended.items() if outcome != "passed"]
    if bad:
        print("the page is left as it was:\n  " + "\n  ".join(bad), file=sys.stderr)
        return 1
    PAGE.write_text(page(found, ended), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(ended)} tests, {sum(map(len, found.values()))} faults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
