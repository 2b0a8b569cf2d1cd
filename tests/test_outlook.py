"""What a sweep would take: the sums by hand, and each basis before the next."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from harness import job, outlook
from harness.assumptions import Assumptions
from harness.errors import InputError
from harness.job import SweepRequest
from harness.outlook import Estimate, Outlook, Planned, Seen, Span, earlier, lines
from harness.records import Cell, RequestRecord, Scenario, SweepPoint, read_table, write_table
from harness.rundir import to_toml
from harness.search import Search
from harness.slo import Slo
from harness.sweep import Session, Variant, plan_sessions

CHAT = Scenario("chat", usd_per_hour=0.5)
DEMO = SweepRequest(CHAT, (1, 8), precisions=("bf16", "awq"))
SESSIONS = plan_sessions([Variant("bf16"), Variant("awq")], [1, 8])


def planned(start: float, *cells: float, usd: float = 2.0, cards: int = 1, card_type: str | None = None) -> Planned:
    """Seconds, measured; each figure's upper end is twice its lower."""
    variant = Variant("bf16", cards=cards, card_type=card_type)
    both = [Estimate(seconds, 2 * seconds, "x") for seconds in (start, *cells)]
    return Planned(Session(variant, 1), both[0], tuple(both[1:]), usd)


def test_the_sums_of_three_sessions_on_two_places() -> None:
    """Sessions of 30 + 60 + 60 = 150, 40 + 60 = 100 and 20 + 180 = 200 s. Hours: 450 s / 3600 = 0.125; at $2: $0.25.

    Two places: 150 and 100 begin at once; 200 follows the 100 and ends at 300 s, when the 150 have long ended.
    """
    found = Outlook((planned(30, 60, 60), planned(40, 60), planned(20, 180)), {None: 2})
    assert found.cells == 4
    assert found.gpu_hours == Span(0.125, 0.25)
    assert found.usd == Span(0.25, 0.5)
    assert found.wall_s == Span(300, 600)
    assert replace(found, places={None: 1}).wall_s == Span(450, 900)
    assert replace(found, places={None: 9}).wall_s == Span(200, 400)


def test_engines_on_several_cards_and_several_types_of_cards() -> None:
    """360 s on 2 cards are 0.2 GPU-hours, at $4 an hour and card $0.80; 720 s on one other card 0.2, at $1 $0.20.

    Each type has its own places: the longer of 360 and 720 s is the end.
    """
    two = planned(60, 300, cards=2, usd=4.0, card_type="l4")
    one = planned(120, 600, usd=1.0, card_type="a4000")
    found = Outlook((two, one), {"l4": 1, "a4000": 1})
    assert found.gpu_hours.lo == pytest.approx(0.4)
    assert found.usd.lo == pytest.approx(1.0)
    assert found.wall_s.lo == 720


def run_of(
    path: Path, rows: list[SweepPoint], scenario: Scenario = CHAT, starts: dict[str, float | None] | None = None
) -> None:
    path.mkdir(parents=True)
    described = asdict(replace(scenario, description="other words", usd_per_hour=9.0, slo_p95_s=1.0))
    (path / "run.toml").write_text(to_toml({"run": {"model": "demo"}, "scenario": described}), encoding="utf-8")
    write_table(path / "points.csv", rows, SweepPoint)
    for name, seconds in (starts or {}).items():
        (path / f"engine-{name}.json").write_text(json.dumps({"start_s": seconds}), encoding="utf-8")


def row(precision: str = "bf16", conc: int = 1, seconds: float | None = 10.0, **more: Any) -> SweepPoint:
    return SweepPoint("run", precision, conc, duration_s=seconds, model="demo", **more)


def test_earlier_runs_of_the_same_tell_how_long_it_takes(tmp_path: Path) -> None:
    """bf16: 10, 20 and 60 s at one user, median 20; 40 at 8. awq: only one user was measured. Starts: 30 and 50, 40."""
    run_of(tmp_path / "20260101-demo", [row(), row(seconds=20.0), row(conc=8, seconds=40.0)], starts={"bf16-r1": 30.0})
    run_of(tmp_path / "20260102-demo", [row(seconds=60.0), row("awq")], starts={"bf16-r2-2": 50.0, "awq-r1": None})
    found = outlook.outlook(DEMO, SESSIONS, earlier(tmp_path), {None: 1})
    bf16, awq = found.sessions
    assert bf16.cells == (
        Estimate(20.0, 20.0, "measured in 20260102-demo"), Estimate(40.0, 40.0, "measured in 20260101-demo"),
    )  # fmt: skip
    assert bf16.start == Estimate(40.0, 40.0, "measured in 20260102-demo")
    assert awq.cells[0].lo == 10.0 and awq.cells[1].basis == "bounds"
    assert awq.start == bf16.start, "of the same model in another precision"
    assert found.gpu_hours.lo == pytest.approx((40 + 20 + 40 + 40 + 10 + awq.cells[1].lo) / 3600)


@pytest.mark.parametrize(
    ("changed", "scenario"),
    [
        ({"seconds": None}, CHAT),
        ({"model": "other"}, CHAT),
        ({"gpu": "NVIDIA L4"}, CHAT),
        ({"engine_args": "--max-num-seqs 4"}, CHAT),
        ({"rate_rps": 1.0}, CHAT),
        ({"source": "predicted"}, CHAT),
        ({"verdict_reasons": ("engine_died",)}, CHAT),
        ({"verdict_reasons": ("gave_up",)}, CHAT),
        ({}, replace(CHAT, requests=121)),
        ({}, replace(CHAT, output_tokens=33)),
    ],
)
def test_what_was_measured_otherwise_tells_nothing(tmp_path: Path, changed: dict[str, Any], scenario: Scenario) -> None:
    made = replace(row(seconds=changed.pop("seconds", 10.0)), **changed)
    run_of(tmp_path / "run", [made], scenario)
    cell = outlook.outlook(DEMO, SESSIONS, earlier(tmp_path), {None: 1}).sessions[0].cells[0]
    assert cell.basis == "bounds"


def test_a_card_is_known_by_any_of_its_names(tmp_path: Path) -> None:
    """A row of an L4 tells of --card l4, of awq[card=L4], and of this machine if that is its card; of no A4000."""
    run_of(tmp_path / "run", [row("awq", gpu="NVIDIA L4"), row("bf16[card=l4]", seconds=12.0, gpu="NVIDIA L4")])
    seen = earlier(tmp_path)
    request = replace(DEMO, concurrencies=(1,))
    for name, card_type, here, seconds in (
        ("awq", "l4", None, 10.0),
        ("awq[card=L4]", "L4", None, 10.0),
        ("bf16", None, "NVIDIA L4", 12.0),
    ):
        sessions = plan_sessions([Variant(name, card_type=card_type)], [1])
        (one,) = outlook.outlook(request, sessions, seen, {card_type: 1}, here).sessions
        assert one.cells[0] == Estimate(seconds, seconds, "measured in run")
    sessions = plan_sessions([Variant("awq", card_type="rtx-a4000")], [1])
    assert outlook.outlook(request, sessions, seen, {"rtx-a4000": 1}).sessions[0].cells[0].basis != "measured in run"


def test_runs_that_cannot_be_read_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.toml").write_text("[run")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "run.toml").write_text("scenario = 3")
    run_of(tmp_path / "other", [row()], starts={"bf16-r1": None})
    (tmp_path / "other" / "engine-bf16-r2.json").write_text("[1]")
    (tmp_path / "other" / "points.csv").write_text("a,b\n1,2\n")
    assert earlier(tmp_path) == Seen({}, {}) == earlier(tmp_path / "nowhere")


def test_what_is_assumed_goes_before_the_predictor_and_this_before_bounds() -> None:
    assumed = Assumptions(start_s=25.0, cell_s=90.0)
    request = replace(DEMO, model="shape:qwen2.5-0.5b", concurrencies=(4,))
    sessions = plan_sessions([Variant("bf16", card_type="l4")], [4])
    (one,) = outlook.outlook(request, sessions, Seen(), {"l4": 1}, None, assumed).sessions
    assert one.cells == (Estimate(90.0, 90.0, "assumed"),) and one.start == Estimate(25.0, 25.0, "assumed")
    (one,) = outlook.outlook(request, sessions, Seen(), {"l4": 1}).sessions
    assert one.cells[0].basis == "predicted for NVIDIA L4"
    varied = [replace(session, variant=replace(session.variant, engine_args=("--x",))) for session in sessions]
    for other in (varied, plan_sessions([Variant("bf16", card_type="no-such-card")], [4])):
        (one,) = outlook.outlook(request, other, Seen(), {None: 1}).sessions
        assert one.cells[0].basis == "bounds"


def test_a_prediction_is_what_the_predictor_runs(tmp_path: Path) -> None:
    """From the first question to the last token of the same cell in a predicted run, and 2 s."""
    request = replace(DEMO, model="shape:qwen2.5-0.5b", precisions=("bf16",), concurrencies=(4,))
    sessions = plan_sessions([Variant("bf16", card_type="l4")], [4])
    (one,) = outlook.outlook(request, sessions, Seen(), {"l4": 1}).sessions

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    job.sweep(replace(request, engine="simulated", gpu="l4", out=tmp_path / "run"), Silent())
    records = read_table(tmp_path / "run" / "requests.csv", RequestRecord)
    lasted_s = (max(r.last_token_ns or 0 for r in records) - min(r.intended_ns for r in records)) / 1e9
    assert one.cells[0].lo == one.cells[0].hi == pytest.approx(lasted_s + 2.0, abs=0.05)


def test_bounds_are_those_of_the_scenario() -> None:
    """Users: 2 + 5 s at least; 2 + 600 + 300 of warm-up + 300 of the last answer = 1202 at most. An open loop warms up
    for its 5 s: 2 + 5 + 5 at least, 2 + 5 + 600 + 300 = 907 at most. The start: at most the engine's half an hour."""
    (bf16, _) = outlook.outlook(DEMO, SESSIONS, Seen(), {None: 1}).sessions
    assert bf16.cells[0] == Estimate(7.0, 1202.0, "bounds") and bf16.start == Estimate(0.0, 1800.0, "bounds")
    opened = replace(DEMO, scenario=replace(CHAT, arrivals="poisson"))
    sessions = [Session(Variant("bf16"), 1, (Cell("bf16", 0, 1, 2.0),))]
    (one,) = outlook.outlook(opened, sessions, Seen(), {None: 1}).sessions
    assert one.cells[0] == Estimate(12.0, 907.0, "bounds")


def test_a_search_takes_its_budget_at_most_and_an_endpoint_needs_no_start() -> None:
    """20 minutes for two precisions: 600 s each."""
    search = replace(DEMO, search=Search(Slo(3.0), max_minutes=20.0))
    sessions = [Session(Variant(name), 1) for name in ("bf16", "awq")]
    found = outlook.outlook(search, sessions, Seen(), {None: 1}, None, Assumptions(start_s=0.0))
    assert found.wall_s == Span(14.0, 1200.0)
    endpoint = replace(DEMO, endpoint="http://127.0.0.1:1")
    assert outlook.outlook(endpoint, SESSIONS, Seen(), {None: 1}).sessions[0].start == Estimate(
        0.0, 0.0, "runs already"
    )


def test_what_is_said() -> None:
    found = Outlook((planned(30, 60, 60), planned(40, 60)), {None: 2})
    said = [" ".join(line) for line in lines(found, "GPU")]
    assert said[:4] == [
        "plan 3 cells in 2 server sessions, 2 at once",
        "GPU-hours between 0.07 and 0.14",
        "price between $0.14 and $0.28 at $2 an hour",
        "wall time between 2 min and 5 min",
    ]
    assert "starts 2: between 30 s and 80 s each, x" in said and "cells 3: between 60 s and 2 min each, x" in said


def test_prices_are_by_the_card_where_none_was_typed() -> None:
    typed = replace(DEMO, card_types=("l4",))
    assert outlook._prices(typed)("l4") == 0.5
    assert outlook._prices(replace(typed, price_by_card=True))("l4") != 0.5


def test_the_command_starts_nothing(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "harness",
        "sweep",
        "--plan",
        "--conc",
        "1,8",
        "--repeats",
        "2",
        "--usd-per-hour",
        "3",
    ]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert "8 cells in 4 server sessions, 1 at once" in done.stdout and "$3 an hour" in done.stdout
    assert "starts        4: between 0 s and 30 min each, bounds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--card", "l4"), "--card without --cluster"),
        (("--load", "away"), "--load away without --cluster"),
        (("--load", "far"), "--load 'far' is unknown"),
        (("--cluster", "auto", "--engine", "simulated", "--gpu", "l4"), "--cluster with --engine simulated"),
    ],
)
def test_options_of_a_cluster_alone(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    line = [sys.executable, "-m", "harness", "sweep", "--plan", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr


def test_a_prediction_needs_no_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--plan with --engine simulated"):
        outlook.look(replace(DEMO, engine="simulated"))
