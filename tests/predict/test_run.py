"""A predicted run: the same tables as a measured one, each figure with its band; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis import metrics
from harness.analysis.knee import find_knees
from harness.errors import InputError, ModelError
from harness.job import SweepRequest
from harness.predict import cell, coefficients, run
from harness.predict.bands import bands
from harness.predict.cards import card
from harness.predict.shapes import shape
from harness.records import Cell, RequestRecord, Scenario, SweepPoint, read_table
from harness.report.papers import write_report
from harness.report.run import load_run
from harness.scenario import load_scenario

SCENARIO = Scenario("tests", input_tokens=96, output_tokens=24, requests=40, min_window_s=0.0)
REQUEST = SweepRequest(
    SCENARIO, (1, 8, 32), model="qwen2.5-1.5b", precisions=("bf16", "awq"), engine="simulated", gpu="rtx-2000-ada"
)


class Quiet:
    """An Observer that remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


def predicted(where: Path, request: SweepRequest = REQUEST) -> tuple[list[SweepPoint], Quiet]:
    watching = Quiet()
    path = run.sweep(replace(request, out=where), watching)
    return read_table(path / "points.csv", SweepPoint), watching


def test_a_predicted_run_is_a_run(tmp_path: Path) -> None:
    points, _ = predicted(tmp_path / "run")
    assert [(point.precision, point.conc) for point in points] == [
        (precision, conc) for precision in ("bf16", "awq") for conc in (1, 8, 32)
    ]
    for point in points:
        assert point.source == "predicted" and point.gpu == "NVIDIA RTX 2000 Ada Generation"
        assert (point.verdict, point.verdict_reasons) == ("suspect", ("unvalidated",))
        for name in ("tok_s", "p95_ms", "ttft_p95_ms", "tpot_p95_ms"):
            low, value, high = (getattr(point, f"{name}{end}") for end in ("_lo", "", "_hi"))
            assert low < value < high
        assert point.requests >= 40 and point.kv_cache_tokens and point.weights_gib
        assert point.send_lag_p99_ms is None and point.started_at is None
    assert points[3].tok_s > points[0].tok_s and points[2].tok_s > points[1].tok_s > points[0].tok_s  # type: ignore[operator]
    told = tomllib.loads((tmp_path / "run" / "run.toml").read_text(encoding="utf-8"))["run"]
    assert told["predicted"]["basis"] == "architecture" and told["model"] == "shape:qwen2.5-1.5b"
    written = load_run(tmp_path / "run")
    assert written.predicted and find_knees(written.points, written.slo)
    write_report(tmp_path / "run", tmp_path / "papers")
    assert "Predicted" in (tmp_path / "papers" / "capacity.md").read_text(encoding="utf-8")


def test_the_same_request_comes_to_the_same_bytes(tmp_path: Path) -> None:
    predicted(tmp_path / "one")
    predicted(tmp_path / "two")
    for name in ("points.csv", "requests.csv"):
        one, two = ((tmp_path / run / name).read_text(encoding="utf-8") for run in ("one", "two"))
        assert one.replace("one,", "two,", 1_000_000) == two


@pytest.mark.parametrize("conc", [1, 5])
def test_figures_are_those_of_the_requests(conc: int) -> None:
    """The lean way to a row's figures comes to what metrics.summarise makes of the same requests."""
    what = cell.served(card("l4"), shape("qwen2.5-0.5b").architecture, "awq", SCENARIO, coefficients.fitted())
    wanted = Cell("awq", conc)
    load, simulation = cell.predict(SCENARIO, wanted, what)
    lean = cell.figures(SCENARIO, load, simulation)
    full = metrics.summarise(cell.records(wanted, load, simulation), *cell.window_ns(load), SCENARIO.slo)
    for name in ("requests", "errors", "goodput", "input_tokens_mean", "output_tokens_mean"):
        assert lean[name] == full[name], name
    for name in ("p50_ms", "p95_ms", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "window_s", "req_s"):
        assert lean[name] == pytest.approx(full[name], rel=1e-5), name
    # A token that comes at the very edge of the window may fall on either side of a nanosecond.
    assert lean["tok_s"] == pytest.approx(full["tok_s"], rel=0.01)


def test_a_validated_card_has_its_own_band_and_is_valid(tmp_path: Path) -> None:
    points, _ = predicted(tmp_path / "run", replace(REQUEST, gpu="l4", concurrencies=(8,)))
    low, high = bands().ends("tok_s", "users", "card")
    for point in points:
        assert (point.verdict, point.verdict_reasons) == ("valid", ())
        assert point.tok_s_lo == pytest.approx(point.tok_s * low) and point.tok_s_hi == pytest.approx(
            point.tok_s * high
        )  # type: ignore[operator]


def test_a_card_without_bf16_serves_fp16_and_says_so(tmp_path: Path) -> None:
    points, watching = predicted(tmp_path / "run", replace(REQUEST, gpu="t4", concurrencies=(4,)))
    assert [point.precision for point in points] == ["fp16", "awq"]
    assert any("no BF16" in note for note in watching.notes)


def test_a_precision_that_does_not_fit_is_left_out_with_a_word(tmp_path: Path) -> None:
    request = replace(REQUEST, model="qwen2.5-7b", gpu="rtx-4080", concurrencies=(4,))
    points, watching = predicted(tmp_path / "run", request)
    assert [point.precision for point in points] == ["awq"]
    assert any("bf16 does not fit NVIDIA GeForce RTX 4080" in note for note in watching.notes)
    with pytest.raises(ModelError, match="does not fit"):
        run.planned(replace(request, precisions=("bf16",)))


def test_open_loops_and_searches(tmp_path: Path) -> None:
    scenario = replace(SCENARIO, arrivals="poisson", warmup_s=1.0)
    points, _ = predicted(tmp_path / "open", replace(REQUEST, scenario=scenario, concurrencies=(), rates=(1.0, 2.0)))
    assert [point.rate_rps for point in points] == [1.0, 2.0, 1.0, 2.0]
    from harness.search import Search
    from harness.slo import parse_slo

    search = Search(parse_slo("p95=1s", "--until"), 0.2, (1,), 64, 20, 5.0)
    points, watching = predicted(tmp_path / "search", replace(REQUEST, gpu="l4", concurrencies=(1,), search=search))
    assert len({point.conc for point in points}) >= 4
    assert any("p95 ≤ 1 s" in note for note in watching.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu": None}, "--gpu"),
        ({"gpu": "gtx-1"}, "rtx-4080"),
        ({"repeats": 2}, "--repeats 2"),
        ({"model": "no-such-model"}, "qwen2.5-7b"),
        ({"precisions": ("awq=some/where",)}, "of your own"),
        ({"precisions": ("nf4",)}, "no kernel"),
        ({"scenario": replace(SCENARIO, turns=3)}, "turns = 3"),
        ({"scenario": replace(SCENARIO, shared_prefix=0.5)}, "shared_prefix"),
        ({"gpu": "rtx-2000-ada", "model": "qwen2.5-14b", "precisions": ("bf16",)}, "does not fit"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    request = replace(REQUEST, out=tmp_path / "run", **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        run.sweep(request, Quiet())
    assert not (tmp_path / "run").exists()


def test_the_price_is_the_cards_own_rent() -> None:
    assert run.priced(load_scenario("chat"), "rtx-2000-ada").usd_per_hour == 0.24
    assert run.priced(load_scenario("chat"), "rtx-3060-12gb").usd_per_hour == load_scenario("chat").usd_per_hour


def test_a_profile_predicts_other_models_on_the_same_machine(tmp_path: Path) -> None:
    from harness.predict import calibrate, points, profile
    from harness.predict.subject import subject

    measured = load_run(Path(__file__).parents[2] / "results" / "demo-until-p95-500ms")
    what = subject(measured)
    found = calibrate.calibrate(what, points.choose(what))
    profile.write(found, tmp_path / "profile.toml")
    request = replace(
        REQUEST,
        gpu=None,
        profile=tmp_path / "profile.toml",
        model="qwen2.5-0.5b",
        kv_cache_gib=2.0,
        concurrencies=(1, 4),
    )
    rows, _ = predicted(tmp_path / "run", request)
    assert all(row.memory_kind == "host" and row.verdict == "valid" for row in rows)
    assert all(row.tok_s_lo < row.tok_s < row.tok_s_hi for row in rows)  # type: ignore[operator]
    told = tomllib.loads((tmp_path / "run" / "run.toml").read_text(encoding="utf-8"))["run"]["predicted"]
    assert (told["basis"], told["of_run"]) == ("calibrated", "demo-until-p95-500ms")
    with pytest.raises(InputError, match="--gpu l4 with a profile"):
        run.planned(replace(request, gpu="l4"))


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_commands(tmp_path: Path) -> None:
    shared = ["--gpu", "l4", "--model", "qwen2.5-1.5b", "--precisions", "bf16,awq", "--conc", "1,4", "--requests", "30"]
    shown = bench("predict", *shared, "--input-tokens", "64", "--output-tokens", "16", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Predicted for NVIDIA L4" in shown.stdout and not list(tmp_path.iterdir())
    swept = bench("sweep", "--engine", "simulated", *shared, "--out", "run", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    assert all(row.source == "predicted" for row in read_table(tmp_path / "run" / "points.csv", SweepPoint))
    assert (tmp_path / "run" / "report" / "capacity.md").exists()
    listed = bench("gpus", "--list", cwd=tmp_path)
    assert listed.returncode == 0 and "rtx-5060-ti-16gb" in listed.stdout
    ranked = bench(
        "gpus", "--model", "qwen2.5-1.5b", "--users", "20", "--cards", "l4,t4", "--precisions", "awq", cwd=tmp_path
    )
    assert ranked.returncode == 0 and "predicted" in ranked.stdout.lower()
    for wrong in (["predict"], ["predict", "--gpu", "l4", "--refit"], ["sweep", "--gpu", "l4"], ["gpus"]):
        refused = bench(*wrong, cwd=tmp_path)
        assert refused.returncode == 2 and "Allowed" in refused.stderr, (wrong, refused.stderr)
