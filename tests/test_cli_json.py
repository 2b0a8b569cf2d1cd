"""What scripts read: --json prints one document and nothing else on stdout, --quiet the report's path alone."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.records import Knee, SweepPoint, read_table
from harness.report.document import document
from harness.width import wrapped

ROOT = Path(__file__).parent.parent
RUN = ROOT / "results" / "qwen2.5-0.5b-shape"
Bench = Callable[..., tuple[int, str, str]]
PREDICTED = ("sweep", "--engine", "simulated", "--gpu", "l4", "--model", "shape:qwen2.5-0.5b", "--conc", "1,4",
             "--precisions", "bf16,awq", "--output-tokens", "4", "--requests", "30")  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """`bench(*arguments)`: exit code, stdout and stderr of a command, in this process to save time."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def parsed(text: str) -> dict[str, Any]:
    """Strictly: NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in a document")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


# --- the form ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    name: str
    share: float | None
    days: tuple[date, ...] = ()


def test_a_record_is_its_fields_and_what_is_missing_is_null() -> None:
    record = Record("a≤b", math.nan, (date(2026, 11, 22),))
    text = document("doctor", one=record, more=[1, math.inf, None, True, Path("x/y")], table={2: {"b", "a"}})
    assert parsed(text) == {
        "schema": "kneebench.doctor/1",
        "one": {"name": "a≤b", "share": None, "days": ["2026-11-22"]},
        "more": [1, None, None, True, "x/y"],
        "table": {"2": ["a", "b"]},
    }
    assert text.isascii(), "a terminal or a pipe in any encoding takes it"
    assert parsed(document("doctor", third=Fraction(1, 4)))["third"] == 0.25


@pytest.mark.parametrize("what", [b"bytes", object(), Record, lambda: 1])
def test_what_is_no_data_is_refused(what: object) -> None:
    with pytest.raises(TypeError, match="is no data"):
        document("doctor", what=what)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_sweep_as_json(bench: Bench, tmp_path: Path) -> None:
    code, out, err = bench(*PREDICTED, "--out", tmp_path / "run", "--json")
    assert code == 0 and "tok/s" in err, "progress goes to stderr"
    told = parsed(out)
    points = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    assert told["schema"] == "kneebench.sweep/1" and told["source"] == "predicted"
    assert Path(told["run"]) == tmp_path / "run"
    assert [(row["precision"], row["conc"], row["verdict"]) for row in told["points"]] == [
        (row.precision, row.conc, row.verdict) for row in points
    ]
    assert told["points"][0].keys() == {field.name for field in fields(SweepPoint)}
    assert told["points"][0]["tok_s"] == points[0].tok_s and told["points"][0]["p99_ms"] == points[0].p99_ms
    assert [knee.keys() for knee in told["knees"]] == 2 * [{field.name for field in fields(Knee)}]
    assert {Path(name).name for name in told["papers"]} >= {"capacity.md", "capacity.html", "cost.xlsx"}
    assert all(Path(name).is_file() for name in told["papers"])


def test_a_quiet_sweep_says_where_its_report_is(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bench(*PREDICTED, "--out", "run", "--quiet")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert Path(line).name == "capacity.md" and Path(line).is_file()


def test_quiet_json_is_json_alone_and_errors_are_said(bench: Bench, tmp_path: Path) -> None:
    code, out, err = bench(*PREDICTED, "--out", tmp_path / "run", "--quiet", "--json")
    assert (code, err) == (0, "") and parsed(out)["points"]
    code, out, err = bench(*PREDICTED, "--out", tmp_path / "run", "--quiet", "--json")
    assert code == 2 and out == "" and "run" in err, "the directory is taken"


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("report {run} --out {tmp}/r", {"run", "report", "papers", "points", "knees", "ratios", "slo", "model"}),
        ("capacity {run} --users 50", {"plans", "prices", "spend", "assumptions", "sentences"}),
        ("compare {run} {run} --metric p95_ms", {"changes", "left_out", "headline", "tolerance"}),
        ("history {run}", {"runs"}),
        ("prices rtx-a4000", {"rents", "buys", "tariffs", "apis"}),
        ("gpus --list", {"cards", "rents"}),
        ("gpus --model qwen2.5-0.5b --users 5 --cards l4 --max-users 8", {"cards", "model", "sentences"}),
        ("scenarios", {"scenarios"}),
        ("scenarios chat", {"scenario"}),
        ("precisions", {"precisions"}),
        ("doctor", {"findings"}),
    ],
)  # fmt: skip
def test_every_command_with_a_table_has_it_as_json(bench: Bench, tmp_path: Path, line: str, keys: set[str]) -> None:
    code, out, _ = bench(*line.format(run=RUN, tmp=tmp_path).split(), "--json")
    told = parsed(out)
    assert code == 0 and keys <= told.keys()
    assert told["schema"].startswith("kneebench.") and told["schema"].endswith("/1")
    assert all(told[key] for key in keys - {"tariffs", "apis", "left_out"}), "nothing of it is empty"


def test_json_says_what_the_words_say(bench: Bench) -> None:
    """Nine cards, as the table of the same command has it."""
    _, out, _ = bench("capacity", RUN, "--users", "50", "--json")
    told = parsed(out)
    assert {plan["precision"]: plan["cards"] for plan in told["plans"]} == {"bf16": 9, "awq": 9}
    assert any("BF16 needs 9 cards" in sentence for sentence in told["sentences"])


def test_exit_codes_are_those_of_the_command_without_json(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    code, out, _ = bench("doctor", "--engine-log", tmp_path / "engine.log", "--json")
    assert code == 1 and parsed(out)["failures"][0]["line_number"] == 1
    assert bench("compare", RUN, RUN, "--strict", "--metric", "tok_s", "--json")[0] == 1


def test_many_runs(bench: Bench, tmp_path: Path) -> None:
    code, out, err = bench("report", tmp_path, "--json")
    assert code == 2 and out == "" and "holds no run" in err


# --- columns ----------------------------------------------------------------------------------------------------------


def test_errors_are_folded_between_words() -> None:
    said = "error: a long problem of many words\nAllowed: one-hyphenated-name, another."
    assert wrapped(said, 20).splitlines() == [
        "error: a long", "problem of many", "words", "Allowed:", "one-hyphenated-name,", "another.",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["--help", "sweep --help", "init --help", "gpus --help", "report --help"])
def test_help_fits_80_columns_and_breaks_no_word(bench: Bench, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = bench(*line.split())
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\w\.\.\.$", out, re.MULTILINE), "a sentence that is cut"
