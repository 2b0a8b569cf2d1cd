"""Run directories made of a few rows: what is refused, what is said in front of the figures, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.records import Cell, RequestRecord, SweepPoint, write_table
from harness.report.versus import (
    Versus,
    cautions,
    compare_runs,
    headline,
    notes,
    page,
    parse_metrics,
    rows,
    title,
    write_page,
)
from harness.rundir import to_toml

MS = 1_000_000
SCENARIO = {"name": "chat", "input_tokens": 128, "output_tokens": 32, "seed": 7, "requests": 120, "slo_p95_s": 3.0}
SETTINGS = {"model": "demo", "max_num_seqs": 256, "engine_args": []}
ENVIRONMENT = {
    "kneebench_version": "0.1.0", "cpu": "Some CPU", "cpu_cores": 8, "gpu": "Some RTX", "driver": "550.54",
    "started_at": "2026-11-20T18:00:00+00:00",
}  # fmt: skip


def row(tok_s: float, repeat: int = 1, conc: int = 8, precision: str = "awq", **more: object) -> SweepPoint:
    """Of a valid session; its latencies are 100, 200 and 300 s over its tok_s."""
    values: dict[str, object] = {
        "run_id": "march", "p95_ms": 1e5 / tok_s, "ttft_p50_ms": 2e5 / tok_s, "tpot_p50_ms": 3e5 / tok_s,
        "verdict": "valid", "engine": "vllm", "engine_version": "0.32.0", "kernel": "Marlin", "memory_kind": "gpu",
        "checkpoint_sha256": precision * 16, **more,
    }  # fmt: skip
    return SweepPoint(precision=precision, conc=conc, tok_s=tok_s, repeat=repeat, **values)  # type: ignore[arg-type]


def repeated(*figures: float, **more: object) -> list[SweepPoint]:
    return [row(figure, repeat, **more) for repeat, figure in enumerate(figures, start=1)]  # type: ignore[arg-type]


def answers(point: SweepPoint, e2e_ms: float, count: int = 30) -> list[RequestRecord]:
    """Requests of a row's cell, all alike; TTFT is a tenth of E2E."""
    cell = Cell(point.precision, point.conc).key
    return [
        RequestRecord(
            cell, 0, number, "measured", number * MS, first_token_ns=int((number + e2e_ms / 10) * MS),
            last_token_ns=int((number + e2e_ms) * MS), completion_tokens=91,
        )
        for number in range(count)
    ]  # fmt: skip


def written(
    where: Path,
    points: list[SweepPoint],
    requests: list[RequestRecord] | None = None,
    *,
    scenario: dict[str, object] | None = None,
    settings: dict[str, object] | None = None,
    environment: dict[str, object] | None = None,
) -> Path:
    """A run directory with these rows; the mappings change what all test runs have."""
    where.mkdir()
    points = [replace(point, run_id=where.name) for point in points]
    write_table(where / "points.csv", points, SweepPoint)
    if requests is not None:
        write_table(where / "requests.csv", requests, RequestRecord)
    tables = {"run": SETTINGS | (settings or {}), "scenario": SCENARIO | (scenario or {})}
    (where / "run.toml").write_text(to_toml(tables), encoding="utf-8")
    (where / "environment.json").write_text(json.dumps(ENVIRONMENT | (environment or {})), encoding="utf-8")
    return where


STEADY = (100.0, 101.0, 99.0, 100.5)


@pytest.fixture
def march(tmp_path: Path) -> Path:
    return written(tmp_path / "march", repeated(*STEADY))


def april(march: Path, points: list[SweepPoint] | None = None, **changed: dict[str, object]) -> Versus:
    """`march` against a run a month later, which is the same but for what is given."""
    points = points or repeated(*STEADY, engine_version="0.33.0")
    later = written(
        march.parent / "april",
        points,
        **{**changed, "environment": {"started_at": "2026-12-20T18:00:00+00:00", **changed.get("environment", {})}},
    )  # fmt: skip
    return compare_runs(march, later)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_slowdown_is_told_by_cell_and_fails(march: Path) -> None:
    """All by a quarter, TTFT by more; of a single figure there is no most."""
    slow = [replace(point, ttft_p50_ms=3e5 / (point.tok_s or 0)) for point in repeated(*(f * 0.8 for f in STEADY))]
    found = april(march, slow)
    said = headline(found)
    assert said.startswith(
        "Regressed: 4 of 4 figures are worse by more than 5 %. Most of all AWQ at 8 users: TTFT p50 1.875× [1."
    )
    assert "restart" not in said
    single = compare_runs(march, march.parent / "april", metrics=["tok_s"])
    assert "worse by more than 5 %. AWQ at 8 users: tok/s 0.800× [0.7" in headline(single)
    assert (found.exit_code(), found.exit_code(strict=True)) == (1, 1)


def test_no_change_passes(march: Path) -> None:
    found = april(march)
    assert headline(found) == "No regression: none of 4 figures is worse by more than 5 % (4 unchanged)."
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 0)


def test_an_improvement_passes_and_is_told(march: Path) -> None:
    found = april(march, repeated(*(figure * 1.5 for figure in STEADY)))
    assert headline(found).startswith(
        "No regression: none of 4 figures is worse by more than 5 % (4 improved). Most of all AWQ at 8 users: "
    )
    assert found.exit_code(strict=True) == 0


def test_what_is_undecided_is_said_and_fails_only_where_that_is_asked(march: Path) -> None:
    found = april(march, repeated(90.0, 110.0, 85.0, 104.0))
    assert headline(found) == (
        "No regression of more than 5 % is shown; not all of 4 figures are decided (4 undecided)."
    )
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


def test_other_outcomes_stand_beside_a_regression(march: Path) -> None:
    """Slower at 8 users, the same at 16."""
    march = written(march.parent / "march2", [*repeated(*STEADY), *repeated(*STEADY, conc=16)])
    found = april(march, [*repeated(*(figure * 0.8 for figure in STEADY)), *repeated(*STEADY, conc=16)])
    assert "Regressed: 4 of 8 figures are worse by more than 5 % (4 unchanged). Most of all AWQ at 8 users" in headline(
        found
    )


def test_a_regression_of_single_sessions_carries_its_caution(tmp_path: Path) -> None:
    one, two = row(100.0), row(70.0)
    before = written(tmp_path / "march", [one], answers(one, 100.0))
    after = written(tmp_path / "april", [two], answers(two, 140.0))
    found = compare_runs(before, after)
    assert found.exit_code() == 1
    assert " worse by more than 5 % (1 undecided). Most of all AWQ at 8 users: " in headline(found)
    assert headline(found).endswith(
        " 1.400× [1.400–1.400]. From one session of each run: a restart alone may have done that."
    )
    assert "only the tolerance covers that, up to 1.8 % between sessions (standard deviation)" in notes(found)[2]
    assert notes(found)[2].startswith("Requests: 30 questions that both runs answered are the pairs behind a ratio")
    assert rows(found)[1][1][-2:] == ("regressed", "30 requests")


def test_the_metrics_and_the_tolerance_are_those_asked_for(march: Path) -> None:
    later = written(march.parent / "april", repeated(*(figure * 0.8 for figure in STEADY)))
    found = compare_runs(march, later, 0.4, ("ttft_p50_ms",))
    assert [(change.metric, change.outcome) for change in found.changes] == [("ttft_p50_ms", "unchanged")]
    assert "none of 1 figures is worse by more than 40 %" in headline(found)
    assert "between 1/1.4 and 1.4" in notes(found)[0]
    assert "by more than 12.5 %" in headline(compare_runs(march, later, 0.125))


def test_two_sessions_are_told_to_be_few(march: Path) -> None:
    said = notes(april(march, repeated(100.0, 101.0)))[2]
    assert said.startswith("Sessions: 4 and 2 of the two runs; ") and "Two sessions hardly tell their spread" in said
    assert "Two sessions" not in " ".join(notes(compare_runs(march, march)))


def test_what_stands_alone_but_not_among_the_others_is_counted(march: Path) -> None:
    """Of 16 loads one is 8 % slower with p = 0.02 or so (see test_regression); the rest do not move."""
    quiet = [row(100.0 + (repeat + conc) % 3, repeat, 100 + conc) for conc in range(31) for repeat in (1, 2, 3, 4)]
    before = written(march.parent / "before", [*repeated(100.0, 102.0, 98.0, 101.0), *quiet])
    after = written(march.parent / "after", [*repeated(92.0, 90.0, 93.5, 94.0), *quiet])
    said = notes(compare_runs(before, after, metrics=["tok_s"]))
    assert " 1 beyond the tolerance alone did not stand among the others: undecided." in said[1]
    assert "Of 32 intervals" in said[1]


# --- what cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "settings", "told"),
    [
        ({"input_tokens": 512}, {}, "input_tokens 128 against 512"),
        ({"output_tokens": 64, "seed": 8}, {}, "output_tokens 32 against 64; seed 7 against 8"),
        ({"arrivals": "poisson"}, {}, "arrivals closed against poisson"),
        ({"shared_prefix": 0.5}, {}, "shared_prefix 0.0 against 0.5"),
        ({"dataset": "<path>/mine.csv"}, {}, "dataset none against mine.csv"),
        ({}, {"trace_sha256": "0123456789abcdef"}, "trace none against 0123456789ab"),
    ],
)
def test_other_questions_are_refused(
    march: Path, scenario: dict[str, object], settings: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match="did not ask the same") as refused:
        april(march, scenario=scenario, settings=settings)
    assert f": {told}\n" in str(refused.value)


def test_a_key_that_an_older_run_does_not_tell_has_its_default(march: Path) -> None:
    assert april(march, scenario={"turns": 1, "length_distribution": "uniform", "api": "completions"}).changes


def test_nothing_in_common_is_an_error_and_no_pass(march: Path) -> None:
    with pytest.raises(InputError, match="nothing to compare") as refused:
        april(march, repeated(100.0, 101.0, conc=16))
    assert "Only in march, left out: AWQ at 8 users; AWQ at 8 users, repeat 2" in str(refused.value)
    assert "Only in april, left out: AWQ at 16 users" in str(refused.value)


def test_what_is_left_out_is_named(march: Path) -> None:
    points = [
        *repeated(*STEADY[:3]),
        row(1.0, 4, verdict="invalid", verdict_reasons=("client_bound", "errors")),
        row(1.0, 1, 32, verdict="suspect", verdict_reasons=("drifting",)),
    ]
    found = april(march, points)
    said = notes(found)
    assert rows(found)[1][0][-1] == "4 + 3 sessions"
    assert "Only in april, left out: AWQ at 32 users." in said
    assert "Invalid in april, left out: AWQ at 8 users, repeat 4 (client bound, errors)." in said


def test_a_figure_that_one_run_lacks_is_named(march: Path) -> None:
    said = notes(april(march, [replace(point, p95_ms=None) for point in repeated(*STEADY)]))
    assert "AWQ at 8 users has no p95 in one of the runs." in said


def test_requests_that_cannot_be_read_leave_a_ratio(tmp_path: Path) -> None:
    before = written(tmp_path / "march", [row(100.0)], [])
    after = written(tmp_path / "april", [row(50.0)])
    (after / "requests.csv").write_text("what,is,this\n1,2,3\n", encoding="utf-8")
    found = compare_runs(before, after)
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)
    assert rows(found)[1][0][5] == "0.500×, no interval"
    said = " ".join(notes(found))
    assert "4 have no interval: fewer than 20 requests that both runs answered." in said
    assert "Requests after cannot be read: requests.csv: the columns are not those of RequestRecord" in said


# --- what differs -----------------------------------------------------------------------------------------------------


def test_two_runs_that_differ_in_the_engine_alone_need_no_caution(march: Path) -> None:
    found = april(march)
    assert cautions(found) == []
    assert title(found) == "march (vllm 0.32.0) → april (vllm 0.33.0)"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"environment": {"gpu": "Other"}}, "Machine: Some RTX, Some CPU, 8 cores → Other, Some CPU, 8 cores (another"),
        ({"environment": {"cpu_cores": 16}}, "Machine: Some RTX, Some CPU, 8 cores → Some RTX, Some CPU, 16 cores ("),
        ({"environment": {"driver": None}}, "Driver: 550.54 → not recorded."),
        ({"environment": {"kneebench_version": "0.2.0"}}, "kneebench: 0.1.0 → 0.2.0."),
        ({"settings": {"max_num_seqs": 64}}, "max_num_seqs: 256 → 64."),
        ({"settings": {"engine_args": ["--eager"]}}, "engine_args: not recorded → ['--eager']."),
        ({"settings": {"model": "other"}}, "Model: demo → other (another model: what changed is not the upgrade"),
        ({"scenario": {"slo_p95_s": 2.0}}, "Service level: p95 ≤ 3 s → p95 ≤ 2 s (no compared figure depends on it)."),
        ({"scenario": {"requests": 240}}, "requests: 120 → 240."),
        ({"scenario": {"name": "mine"}}, "Scenario: chat → mine."),
    ],
)  # fmt: skip
def test_what_differs_beside_the_engine_is_told(march: Path, changed: dict[str, dict[str, object]], told: str) -> None:
    (said,) = cautions(april(march, **changed))
    assert said.startswith(told)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"checkpoint_sha256": "f" * 64}, "AWQ checkpoint: awqawqawqawq → ffffffffffff."),
        ({"kernel": "torch.mm"}, "AWQ kernel: Marlin → torch.mm."),
        ({"source": "dummy-weights"}, "Source: engine → dummy-weights ("),
        ({"verdict": "suspect", "verdict_reasons": ("drifting",)}, "Suspect rows after: AWQ at 8 users (drifting); "),
    ],
)  # fmt: skip
def test_what_differs_in_the_rows_is_told(march: Path, more: dict[str, object], told: str) -> None:
    (said,) = cautions(april(march, repeated(*STEADY, **more)))
    assert said.startswith(told)


def test_a_run_against_itself_and_runs_in_the_wrong_order_are_told(march: Path) -> None:
    assert cautions(compare_runs(march, march)) == ["Both directories hold the same run: nothing can have changed."]
    (said,) = cautions(april(march, environment={"started_at": "2026-10-01T00:00:00+00:00"}))
    assert "measured later (2026-11-20T18:00:00+00:00, 2026-10-01T00:00:00+00:00)" in said


def test_an_endpoint_is_told(tmp_path: Path) -> None:
    before, after = (written(tmp_path / name, repeated(*STEADY, source="endpoint")) for name in ("march", "april"))
    (said,) = cautions(compare_runs(before, after))
    assert "the machine behind it is unknown" in said


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_verdict_cautions_figures_and_how_to_read_them(march: Path, tmp_path: Path) -> None:
    points = repeated(*(figure * 0.8 for figure in STEADY))
    found = april(march, points, environment={"gpu": "Other RTX"})
    write_page(found, tmp_path / "compare.md")
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert text == page(found)
    assert text.startswith("# march (vllm 0.32.0) → april (vllm 0.32.0)\n\nRegressed: 4 of 4 figures")
    order = ["- Machine: Some RTX", "## What was measured", "- Started: 2026-11-20", "## Figures", "## How to read it"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    head = "| Precision | Users | Figure | Before | After | After / before | Verdict | Pairs |\n"
    assert f"{head}| --- | ---: | --- | ---: | ---: | ---: | --- | --- |\n" in text
    line = next(line for line in text.splitlines() if line.startswith("| AWQ | 8 | tok/s |"))
    assert line.startswith(r"| AWQ | 8 | tok/s | 100 | 80.1 | 0.800× \[0.7")
    assert line.endswith(r"\] | **regressed** | 4 + 4 sessions |")
    assert text.count("**regressed**") == 4


def test_rates_are_named_as_such(tmp_path: Path) -> None:
    more: dict[str, object] = {"conc": 0, "arrivals": "poisson", "rate_rps": 2.5}
    scenario: dict[str, object] = {"arrivals": "poisson"}
    before, after = (
        written(tmp_path / name, repeated(*(figure * by for figure in STEADY), **more), scenario=scenario)
        for name, by in (("march", 1.0), ("april", 0.8))
    )
    found = compare_runs(before, after)
    assert "Most of all AWQ at 2.5 req/s: " in headline(found)
    assert rows(found)[0][1] == "req/s" and rows(found)[1][0][1] == "2.5"


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    name = "<b>*x*\x1b[31m|y"
    before, after = (
        written(tmp_path / run, repeated(*(figure * by for figure in STEADY), precision=name, kernel="k\x1b[2J"))
        for run, by in (("march", 1.0), ("april", 0.8))
    )
    found = compare_runs(before, after)
    text = page(found)
    assert r"\<B\>\*X\*⟨U+001B⟩\[31M\|Y" in text
    assert "<B>" not in text and "\x1b" not in text
    for said in (
        headline(found),
        title(found),
        *cautions(found),
        *notes(found),
        *(" ".join(r) for r in rows(found)[1]),
    ):
        assert said.isprintable()


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    one, two = row(100.0), row(70.0)
    before = written(tmp_path / "march", [one], answers(one, 100.0))
    after = written(tmp_path / "april", [two], answers(two, 140.0))
    assert page(compare_runs(before, after)) == page(compare_runs(before, after))


# --- input ------------------------------------------------------------------------------------------------------------


def test_metrics_as_they_are_typed() -> None:
    assert parse_metrics(None) == ("tok_s", "p95_ms", "ttft_p50_ms", "tpot_p50_ms")
    assert parse_metrics(" p95_ms, tok_s,p95_ms") == ("p95_ms", "tok_s")
    for text in ("", ",", "tok_s,p99_ms"):
        with pytest.raises(InputError, match="--metric") as refused:
            parse_metrics(text)
        assert "tok_s, p95_ms, ttft_p50_ms, tpot_p50_ms" in str(refused.value)


def test_a_tolerance_that_allows_anything_is_refused(march: Path) -> None:
    with pytest.raises(InputError, match="--tolerance 100%"):
        compare_runs(march, march, 1.0)


def test_no_run_and_a_file_that_cannot_be_written(march: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        compare_runs(march, tmp_path / "nothing")
    with pytest.raises(InputError, match="--out"):
        write_page(compare_runs(march, march), tmp_path / "nowhere" / "compare.md")
