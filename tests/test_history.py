"""A directory of runs, whole and broken: every one is listed, and what is wrong with it is said."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.knee import find_knees, safe_load
from harness.errors import InputError
from harness.history import PastRun, history, read_run
from harness.records import SweepPoint, write_table
from harness.report.document import document
from harness.report.history import HEADER, rows
from harness.report.run import load_run
from harness.rundir import UNFINISHED, to_toml

RUN = {"model": "demo", "precisions": ["bf16", "awq"], "concurrencies": [1, 8, 16], "repeats": 1}
SCENARIO = {"name": "chat", "slo_p95_s": 3.0}
ENVIRONMENT = {
    "cpu": "Some CPU", "cpu_cores": 8, "gpu": "Some RTX", "engine": "vllm", "engine_version": "0.32.0",
    "started_at": "2026-11-20T18:00:00+00:00",
}  # fmt: skip


def json_of(runs: Sequence[PastRun]) -> list[dict[str, Any]]:
    """As `bench history --json` prints them."""
    told: list[dict[str, Any]] = json.loads(document("history", runs=runs))["runs"]
    return told


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    values: dict[str, object] = {
        "p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.1, "engine": "vllm", "engine_version": "0.33.0",
        "memory_kind": "gpu", "verdict": "valid", "started_at": "2026-11-20T18:05:00+00:00", **more,
    }  # fmt: skip
    return SweepPoint("run", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **values)  # type: ignore[arg-type]


ROWS = [
    row("bf16", 1, 50.0, 700.0),
    row("bf16", 8, 300.0, 1400.0),
    row("bf16", 16, 400.0, 4000.0, verdict="suspect"),
    row("awq", 1, 90.0, 400.0),
    row("awq", 8, 600.0, 800.0),
    row("awq", 16, 9999.0, 1.0, verdict="invalid"),
]
"""BF16 is safe at 8 users; so is AWQ, whose 16 are invalid."""


def made(
    where: Path, points: list[SweepPoint] = ROWS, run: object = RUN, scenario: object = SCENARIO,
    environment: object = ENVIRONMENT,
) -> Path:  # fmt: skip
    where.mkdir(parents=True)
    write_table(where / "points.csv", points, SweepPoint)
    (where / "run.toml").write_text(to_toml({"run": run, "scenario": scenario}), encoding="utf-8")  # type: ignore[dict-item]
    (where / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return where


def test_a_whole_run_is_told_as_its_files_have_it(tmp_path: Path) -> None:
    assert read_run(made(tmp_path / "one")) == PastRun(
        run="one",
        started_at="2026-11-20T18:00:00+00:00",
        model="demo",
        scenario="chat",
        precisions=("bf16", "awq"),
        engine="vllm",
        engine_version="0.33.0",
        machine="Some RTX",
        source="engine",
        cells_done=6,
        cells_planned=6,
        valid=4,
        suspect=1,
        invalid=1,
        slo="p95 ≤ 3 s",
        load_unit="users",
        safe_load={"bf16": 8, "awq": 8},
        tok_s=600.0,
    )


def test_the_safe_load_is_that_of_the_report(tmp_path: Path) -> None:
    """At another service level than the default: p95 ≤ 0.6 s leaves BF16 none and AWQ one user."""
    run = read_run(made(tmp_path / "one", scenario={"name": "chat", "slo_p95_s": 0.6}))
    assert run.safe_load == {"bf16": None, "awq": 1}
    assert run.slo == "p95 ≤ 0.6 s"


def test_the_safe_load_at_the_default_level_is_that_of_the_knees(tmp_path: Path) -> None:
    run = made(tmp_path / "one", scenario={"name": "chat"})
    knees = find_knees(ROWS, load_run(run).slo)
    assert read_run(run).safe_load == {knee.precision: safe_load(knee) for knee in knees}


def test_an_attempt_that_was_repeated_counts_once(tmp_path: Path) -> None:
    lost = replace(ROWS[0], verdict="invalid", verdict_reasons=("engine_died",), tok_s=1e6)
    run = read_run(made(tmp_path / "one", [lost, *(replace(point, attempt=2) for point in ROWS[:2])]))
    assert (run.cells_done, run.valid, run.invalid, run.tok_s) == (2, 2, 0, 300.0)


def test_an_open_loop_is_counted_in_requests_a_second(tmp_path: Path) -> None:
    points = [row("awq", 0, 90.0, p95, rate_rps=rate, arrivals="poisson") for rate, p95 in ((2.5, 900.0), (5.0, 9e3))]
    run = {"precisions": ["awq"], "concurrencies": [], "rates_rps": [2.5, 5.0], "repeats": 2}
    found = read_run(made(tmp_path / "one", points, run))
    assert (found.load_unit, found.safe_load, found.cells_done, found.cells_planned) == ("req/s", {"awq": 2.5}, 2, 4)


def test_a_search_has_no_plan_to_count(tmp_path: Path) -> None:
    found = read_run(made(tmp_path / "one", run=RUN | {"concurrencies": [], "rates_rps": [], "until": "p95=3s"}))
    assert (found.cells_done, found.cells_planned) == (6, None)
    assert rows([found])[0][HEADER.index("Cells")] == "6"


def test_a_run_that_was_stopped_is_unfinished_and_not_broken(tmp_path: Path) -> None:
    run = made(tmp_path / "one", ROWS[:2])
    (run / UNFINISHED).write_text("{}", encoding="utf-8")
    with (run / "points.csv").open("a", encoding="utf-8") as table:
        table.write("run,bf16,16,40")  # torn
    found = read_run(run)
    assert (found.unfinished, found.fault, found.cells_done, found.cells_planned) == (True, None, 2, 6)
    assert rows([found])[0][HEADER.index("Cells")] == "2/6"
    assert rows([found])[0][-1] == "unfinished"


# --- dates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "environment", "points", "date"),
    [
        ("20260101-120000-demo-chat", ENVIRONMENT, ROWS, "2026-11-20T18:00:00+00:00"),
        ("20260101-120000-demo-chat", {}, ROWS, "2026-11-20T18:05:00+00:00"),
        ("20260101-120000-demo-chat", {}, [], "2026-01-01T12:00:00"),
        ("20269901-120000-demo-chat", {}, [], None),
        ("nameless", {}, [], None),
    ],
)
def test_the_date_is_the_best_that_is_known(
    tmp_path: Path, name: str, environment: object, points: list[SweepPoint], date: str | None
) -> None:
    assert read_run(made(tmp_path / name, points, environment=environment)).started_at == date


def test_the_oldest_comes_first_and_what_has_no_date_before_it(tmp_path: Path) -> None:
    for name, started in (("a", "2026-11-20"), ("b", "2025-11-20"), ("c", None), ("d", "2026-01-20")):
        made(tmp_path / name, [], environment={"started_at": started})
    assert [run.run for run in history(tmp_path)] == ["c", "b", "d", "a"]


# --- broken runs ------------------------------------------------------------------------------------------------------


def test_every_broken_run_is_listed_with_why(tmp_path: Path) -> None:
    """Each is broken in one way; what can still be read of it is told."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no run")
    for name in ("trace", "quality"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.toml").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").write_text("no folder")
    made(tmp_path / "header", [])
    (made(tmp_path / "no-points") / "points.csv").unlink()
    (made(tmp_path / "no-toml") / "run.toml").unlink()
    (made(tmp_path / "no-environment") / "environment.json").unlink()
    (made(tmp_path / "nothing-yet", []) / "points.csv").write_text("")
    (made(tmp_path / "toml") / "run.toml").write_text("[run\n")
    (made(tmp_path / "json") / "environment.json").write_text("{")
    (made(tmp_path / "list") / "environment.json").write_text("[1, 2]")
    (made(tmp_path / "deep") / "environment.json").write_text("[" * 100_000)
    (made(tmp_path / "bytes") / "points.csv").write_bytes(b"\xff\xfe\x00run\n")
    (made(tmp_path / "columns") / "points.csv").write_text("run_id,precision,conc,future\nr,awq,1,2\n")
    (made(tmp_path / "nan") / "points.csv").write_text("run_id,precision,conc,tok_s\nr,awq,1,nan\n")
    (made(tmp_path / "cell") / "points.csv").write_text("run_id,precision,conc\nr,awq,many\n")
    found = {run.run: run.fault for run in history(tmp_path)}
    assert found == {
        "empty": "empty",
        "other": "no run",
        "quality": "no sweep: answers",
        "trace": "no sweep: traces",
        "header": "no cell finished",
        "no-points": "no points.csv",
        "no-toml": "no run.toml",
        "no-environment": None,
        "nothing-yet": found["nothing-yet"],
        "toml": found["toml"],
        "json": "environment.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "list": "environment.json holds no table",
        "deep": found["deep"],
        "bytes": found["bytes"],
        "columns": "points.csv: the columns are not those of SweepPoint in schema 1 (missing: none; unknown: future)",
        "nan": "points.csv line 2: tok_s cannot be 'nan'",
        "cell": "points.csv line 2: conc cannot be 'many'",
    }
    for name, beginning in (
        ("nothing-yet", "points.csv: the columns are not"), ("toml", "run.toml: "), ("deep", "environment.json: "),
        ("bytes", "points.csv: is no table of ours ('utf-8' codec"),
    ):  # fmt: skip
        assert (found[name] or "").startswith(beginning), name
    kept = {run.run: run for run in history(tmp_path)}
    assert (kept["no-toml"].cells_done, kept["no-toml"].cells_planned, kept["no-toml"].scenario) == (6, None, "unnamed")
    assert (kept["cell"].model, kept["cell"].machine, kept["cell"].cells_done) == ("demo", "Some RTX", 0)
    assert kept["json"].safe_load == kept["no-environment"].safe_load == {"bf16": 8, "awq": 8}
    told = {line[0]: line[-1] for line in rows(list(kept.values()))}
    assert told == {name: fault or "" for name, fault in found.items()}


def test_whatever_a_file_holds_the_list_goes_on(tmp_path: Path) -> None:
    """Each file of a run cut at 25 places and with 25 bytes changed: a record each, that can be shown and is JSON."""
    rng = random.Random(3)
    whole = made(tmp_path / "whole")
    number = 0
    for name in ("run.toml", "environment.json", "points.csv"):
        data = (whole / name).read_bytes()
        for _ in range(25):
            at, byte = rng.randrange(len(data)), rng.randrange(256)
            for spoilt in (data[:at], data[:at] + bytes([byte]) + data[at + 1 :]):
                shutil.copytree(whole, tmp_path / "runs" / f"{number:03}")
                (tmp_path / "runs" / f"{number:03}" / name).write_bytes(spoilt)
                number += 1
    found = history(tmp_path / "runs")
    assert len(found) == number == 150
    assert sum(run.fault is not None for run in found) > 30
    assert len(json_of(found)) == len(rows(found)) == number


def test_descriptions_of_the_wrong_kind_are_no_trap(tmp_path: Path) -> None:
    wrong = {"precisions": "bf16", "concurrencies": 8, "model": 5, "repeats": "x"}
    odd = {"slo_p95_s": "soon", "name": ["a"], "slo_goodput": {}}
    found = read_run(made(tmp_path / "one", run=wrong, scenario=odd, environment={"gpu": ["x"], "started_at": 7}))
    assert (found.model, found.started_at, found.cells_planned) == ("5", "7", None)
    assert (found.slo, found.safe_load) == ("p95 ≤ 3 s", {"bf16": 8, "awq": 8})
    assert len(rows([found])[0]) == len(HEADER)
    (tmp_path / "one" / "run.toml").write_text("run = 3\nscenario = []\n")
    assert read_run(tmp_path / "one").cells_done == 6


def test_requests_are_not_read(tmp_path: Path) -> None:
    run = made(tmp_path / "one")
    (run / "requests.csv").mkdir()
    assert read_run(run).fault is None


def test_a_run_itself_and_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "one")
    assert history(run) == history(tmp_path) == [read_run(run)]
    monkeypatch.chdir(run)
    assert history(Path()) == history(run)
    (tmp_path / "link").symlink_to(run)
    assert [found.run for found in history(tmp_path)] == ["link", "one"]
    with pytest.raises(InputError, match="is no directory"):
        history(tmp_path / "nothing")


# --- as it is shown ---------------------------------------------------------------------------------------------------


def test_a_row_by_its_words(tmp_path: Path) -> None:
    (line,) = rows(history(made(tmp_path / "one")))
    assert dict(zip(HEADER, line, strict=True)) == {
        "Run": "one", "Started": "2026-11-20 18:00", "Model": "demo", "Scenario": "chat", "Engine": "vllm 0.33.0",
        "Machine": "Some RTX", "Cells": "6/6", "Verdicts": "4 / 1 / 1",
        "Safe load": "BF16 8, AWQ 8 users (p95 ≤ 3 s)", "tok/s": "600", "": "",
    }  # fmt: skip


def test_a_precision_without_a_safe_load_and_one_without_rows() -> None:
    assert rows([PastRun("one", cells_done=7, valid=4, suspect=2, invalid=1)])[0][7] == "4 / 2 / 1"
    half = PastRun("one", precisions=("bf16", "awq"))
    assert rows([half])[0] == ("one", *[""] * 7, "BF16, AWQ", "", "")
    none = replace(half, safe_load={"bf16": None, "awq": 2.5}, load_unit="req/s", slo="p95 ≤ 3 s")
    assert rows([none])[0][HEADER.index("Safe load")] == "BF16 none, AWQ 2.5 req/s (p95 ≤ 3 s)"


def test_what_would_steer_a_terminal_is_shown_as_text(tmp_path: Path) -> None:
    run = made(tmp_path / "one", run=RUN | {"model": "evil\x1b[2J\nname"}, scenario={"name": "s\x07"})
    (line,) = rows([read_run(run)])
    assert (line[2], line[3]) == ("evil�[2J name", "s�")
    assert json_of([read_run(run)])[0]["model"] == "evil\x1b[2J\nname"


def test_json_has_every_field(tmp_path: Path) -> None:
    (found,) = json_of(history(made(tmp_path / "one")))
    assert found["safe_load"] == {"bf16": 8, "awq": 8}
    assert (found["precisions"], found["fault"], found["unfinished"]) == (["bf16", "awq"], None, False)
    assert found.keys() == {name for name in PastRun.__dataclass_fields__}
