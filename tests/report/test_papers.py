"""All papers of a run at once: complete, the same bytes each time, nothing left over, and many runs in one go."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.assumptions import Assumptions
from harness.quality.directory import QualityDirectory
from harness.quality.prompts import Prompt, PromptSet
from harness.records import Answer, Knee, Ratio, SweepPoint, read_table
from harness.report.papers import MANY, write_report, write_reports
from harness.slo import Slo
from tests.report.test_report import POINTS, REQUESTS, RUN_TOML, run_dir

PAPERS = {
    "capacity.md", "capacity.html", "cost.xlsx", "risk_brief.md", "business_case.md", "knees.csv", "comparison.csv",
}  # fmt: skip

PROMPTS = PromptSet("few", (Prompt("p1", "factual", "What?", "exact", ("bf16",)),))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "harness", *arguments], capture_output=True, text=True, timeout=120)


def test_all_of_them_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    directory = run_dir(tmp_path / "results" / "demo", requests=REQUESTS)
    first = write_report(directory, tmp_path / "a")
    second = write_report(directory, tmp_path / "b")
    again = write_report(directory, tmp_path / "a")
    assert {path.name for path in first if path.parent == tmp_path / "a"} == PAPERS
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file()) == sorted(first), "nothing else"


def test_the_records_behind_the_words(tmp_path: Path) -> None:
    """AWQ's answers take 0.6 of BF16's at 8 users and as long at 32; the rows say 240 and 420 tok/s at 8."""
    write_report(run_dir(tmp_path / "demo", requests=REQUESTS), tmp_path / "out")
    ratios = {(ratio.conc, ratio.metric): ratio for ratio in read_table(tmp_path / "out" / "comparison.csv", Ratio)}
    assert {conc for conc, _ in ratios} == {8, 16, 32}
    assert (ratios[8, "p95_ms"].ratio, ratios[8, "tok_s"].ratio) == (pytest.approx(0.6, rel=0.06), 420 / 240)
    knees = {knee.precision: knee for knee in read_table(tmp_path / "out" / "knees.csv", Knee)}
    assert (knees["bf16"].safe_conc, knees["bf16"].cause) == (16, "kv_cache")
    assert knees["awq"].safe_conc == 32 and knees["awq"].beyond_range


def test_a_table_that_has_no_rows_any_more_is_taken_away(tmp_path: Path) -> None:
    write_report(run_dir(tmp_path / "demo", requests=REQUESTS), tmp_path / "out")
    write_report(run_dir(tmp_path / "alone", POINTS[:4]), tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.csv").exists()


def test_another_service_level_and_other_assumptions(tmp_path: Path) -> None:
    """BF16 takes 1.3 s at 8 users and 2.2 s at 16: at 2 s it is safe up to 8. 0.72 USD are twice the run's own."""
    directory = run_dir(tmp_path / "demo", requests=REQUESTS)
    write_report(directory, tmp_path / "own")
    write_report(directory, tmp_path / "other", Slo(p95_s=2.0), Assumptions(usd_per_hour=0.72, requests_per_day=1e6))
    own, other = ((tmp_path / name / "capacity.md").read_text() for name in ("own", "other"))
    assert "| BF16 | 16 |" in own and "| BF16 | 8 |" in other and "p95 ≤ 2 s" in other
    assert "Nobody said what traffic is expected" in own and "1,000,000 requests a day" in other
    assert "0.36 USD an hour" in own and "0.72 USD an hour" in other


def test_a_run_may_carry_its_assumptions(tmp_path: Path) -> None:
    directory = run_dir(tmp_path / "demo")
    (directory / "assumptions.toml").write_text("users = 77\n")
    write_report(directory, tmp_path / "out")
    assert "77 users at the peak" in (tmp_path / "out" / "capacity.md").read_text()


@pytest.mark.parametrize(
    "points",
    [
        [SweepPoint("demo", name, conc, verdict_reasons=("errors",)) for name in ("bf16", "awq") for conc in (1, 8)],
        [replace(point, verdict="invalid", verdict_reasons=("errors",)) for point in POINTS],
        POINTS[:1],
        POINTS[:4],
        [replace(point, conc=0, rate_rps=2.5, arrivals="trace") for point in (POINTS[2], POINTS[6])],
        [replace(point, conc=0, rate_rps=point.conc / 8, arrivals="poisson") for point in POINTS],
        [replace(point, usd_per_hour=None, utilisation=None, req_s=None) for point in POINTS],
        [replace(point, p95_ms=99_000.0, p95_ms_lo=98_000.0, p95_ms_hi=99_900.0) for point in POINTS],
    ],
    ids=["all failed", "all invalid", "one row", "one precision", "one trace", "open loop", "no price", "never inside"],
)
def test_papers_of_runs_that_are_not_as_they_should_be(tmp_path: Path, points: Sequence[SweepPoint]) -> None:
    written = write_report(run_dir(tmp_path / "demo", points), tmp_path / "out", None, Assumptions(users=50))
    names = {path.name for path in written}
    assert names >= {"capacity.md", "capacity.html", "cost.xlsx", "risk_brief.md", "business_case.md"}
    for name in ("capacity.md", "risk_brief.md", "business_case.md"):
        text = (tmp_path / "out" / name).read_text()
        assert len(text) > 500 and not re.search(r"\bnan\b|\bNaN\b|\binf\b|\bNone\b(?! of)", text)


def test_crossovers_of_another_traffic_stand_beside(tmp_path: Path) -> None:
    """The same model under two scenarios: each one's crossovers under its own name."""
    chat = run_dir(tmp_path / "results" / "chat", requests=REQUESTS)
    rag = run_dir(tmp_path / "results" / "rag", toml=RUN_TOML.replace('"chat"', '"rag"'), requests=REQUESTS)
    write_report(chat, tmp_path / "alone")
    write_report(chat, tmp_path / "both", beside=[rag])
    alone, both = ((tmp_path / name / "capacity.md").read_text() for name in ("alone", "both"))
    assert "**chat, chat**" in both and "**rag, rag**" in both and "**chat, chat**" not in alone
    assert both.count("In tokens per second, AWQ") == 2 * alone.count("In tokens per second, AWQ")


def test_many_runs_one_of_them_broken(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in ("a", "b"):
        run_dir(results / name, POINTS[:4])
    run_dir(results / "broken", POINTS[:4])
    (results / "broken" / "points.csv").write_text("a,b\n1,2\n")
    (results / "empty").mkdir()
    found = write_reports(results)
    assert [(one.run.name, one.fault is None) for one in found] == [("a", True), ("b", True), ("broken", False)]
    assert (tmp_path / "reports" / "b" / "capacity.html").is_file() and not (tmp_path / "reports" / "broken").exists()
    done = bench("report", str(results))
    assert done.returncode == 1 and "broken" in done.stdout and "columns" in done.stdout


def test_so_many_runs_that_all_cores_have_work(tmp_path: Path) -> None:
    """The same bytes as one by one, in the same order, and the broken one is named."""
    results = tmp_path / "results"
    for number in range(MANY):
        run_dir(results / f"run{number}", POINTS[: number % 4 + 1])
    (results / "run3" / "run.toml").write_text("= =")
    found = write_reports(results)
    assert [one.run.name for one in found] == [f"run{number}" for number in range(MANY)]
    assert [one.run.name for one in found if one.fault] == ["run3"]
    (alone, *_) = write_report(results / "run2", tmp_path / "alone")
    assert (tmp_path / "reports" / "run2" / "capacity.md").read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "nowhere"), "is no directory"),
        (("report", "{run}", "--slo", "soon"), "--slo"),
        (("report", "{run}", "--assume", "nowhere.toml"), "nowhere.toml"),
        (("report", "{empty}"), "holds no run"),
        (("capacity", "{run}", "--users", "0"), "users = 0"),
        (("capacity", "{run}", "--rent", "abacus"), "abacus"),
        (("capacity", "{run}", "--headroom", "much"), "--headroom"),
        (("prices", "abacus"), "abacus"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: Sequence[str], said: str) -> None:
    places = {"run": str(run_dir(tmp_path / "demo", POINTS[:4])), "empty": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    done = bench(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "demo" / "report").exists()


def test_capacity_in_a_terminal(tmp_path: Path) -> None:
    """16 users are safe, 20 % kept free: 12.8. 100 users take 7.8 → 8 cards and one in reserve."""
    done = bench("capacity", str(run_dir(tmp_path / "demo", POINTS[:4])), "--users", "100", "--rent", "rtx-a4000")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "BF16 needs 9 cards at p95 ≤ 3 s, 8 for the load and 1 in reserve" in said
    assert "Price: NVIDIA RTX A4000 for $" in said


def test_what_holds_quality_alone_is_reported_among_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    with QualityDirectory(results / "judged") as directory:
        directory.describe({"model": "m", "baseline": "bf16", "precisions": ["bf16", "awq"]}, PROMPTS)
        for name, ok in (("bf16", True), ("awq", False)):
            directory.add_answer(Answer("p1", name, text=name, ok=ok))
    (found,) = write_reports(results)
    assert found.page == tmp_path / "reports" / "judged" / "failures.md"
    assert "AWQ" in found.page.read_text(encoding="utf-8")
