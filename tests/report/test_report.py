"""A small fixed run, its golden page, and figures that are well-formed, right-sized and the same bytes each time.

After a wanted change of the page: KNEEBENCH_UPDATE_GOLDEN=1 pytest tests/report/test_report.py, then read the diff.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.analysis.compare import compare
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions
from harness.errors import InputError, RecordError
from harness.records import Cell, Ratio, RequestRecord, SweepPoint, write_table
from harness.report.markdown import write_capacity
from harness.report.placing import nice_ticks, spread
from harness.report.plots import latency
from harness.report.run import load_run
from harness.report.setup import setup_table
from harness.report.tables import escape, number, points_table, throughput_lines
from harness.slo import Slo

GOLDEN = Path(__file__).parents[1] / "golden" / "capacity.md"

RUN_TOML = """
[scenario]
name = "chat"
description = "short turns | with a pipe"
input_tokens = 128
output_tokens = 32
length_jitter = 0.25
seed = 7
slo_p95_s = 3.0
usd_per_hour = 0.36
utilisation = 0.5

[run]
model = "demo_model"
precisions = ["bf16", "awq"]
concurrencies = [1, 8, 16, 32, 64]
"""

ENVIRONMENT = {
    "kneebench_version": "0.1.0",
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Some CPU",
    "cpu_cores": 8,
    "memory_gib": 31.2,
    "gpu": "Some RTX 16 GB",
    "gpu_memory_gib": 16.0,
    "driver": "550.54",
    "engine": "vLLM",
    "engine_version": "0.11.0",
    "argv": [],
    "started_at": "2026-11-20T18:00:00+00:00",
}


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    weights, kv, tokens, kernel = (
        (7.6, 5.4, 40_000, "torch.mm") if precision == "bf16" else (2.1, 10.9, 81_000, "Marlin")
    )
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.95, "tok_s_hi": tok_s * 1.05, "p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.1,
        "weights_gib": weights, "kv_cache_gib": kv, "kv_cache_tokens": tokens, "other_gib": 1.4, "memory_kind": "gpu",
        "ttft_p50_ms": 50.0, "ttft_p95_ms": 80.0, "tpot_p50_ms": 20.5, "req_s": tok_s / 32, "kernel": kernel,
        "engine": "vLLM", "engine_version": "0.11.0", "gpu": "Some RTX 16 GB", "model": "demo_model", "requests": 120,
        "usd_per_hour": 0.36, "utilisation": 0.5, "preemptions": 0, "waiting_peak": 0, "running_peak": conc,
        "kv_usage_peak": 0.5, "checkpoint_sha256": precision * 16, "verdict": "valid",
    }  # fmt: skip
    return SweepPoint("demo", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **(values | more))  # type: ignore[arg-type]


POINTS = [
    row("bf16", 1, 35, 900),
    row("bf16", 8, 240, 1300),
    row("bf16", 16, 400, 2200),
    row("bf16", 32, 520, 5200, preemptions=3, kv_usage_peak=1.0),
    row("awq", 1, 70, 480),
    row("awq", 8, 420, 760, requests=60, verdict="suspect", verdict_reasons=("too_few_samples",)),
    row("awq", 16, 760, 1150),
    row("awq", 32, 1150, 2500),
    SweepPoint("demo", "awq", 64, model="demo_model", errors=64, verdict="invalid", verdict_reasons=("errors",)),
]


def answers(cell: Cell, count: int, factor: float, per_user: int = 10) -> list[RequestRecord]:
    """Requests of a cell, one begun every 50 ms: an answer of 40 tokens, TTFT 50 ms and TPOT 20 ms, times `factor`.

    What varies with the prompt is the same in every precision; a little is each precision's own.
    """
    prompts, own = random.Random(f"{cell.conc}/{cell.rate_rps}"), random.Random(cell.key)
    made = []
    for index in range(count):
        start = index * 50_000_000
        scale = factor * prompts.uniform(0.7, 1.3) * own.uniform(0.95, 1.05) * 1e6
        made.append(
            RequestRecord(
                cell.key, index // per_user, index % per_user, "measured", start, attempt=cell.attempt,
                first_token_ns=start + int(50 * scale), last_token_ns=start + int(830 * scale), completion_tokens=40,
            )
        )  # fmt: skip
    return made


REQUESTS = [
    record
    for conc, count, gain in ((8, 60, 0.6), (16, 12, 0.5), (32, 60, 1.0))
    for precision, factor in (("bf16", 1.0), ("awq", gain))
    for record in answers(Cell(precision, conc), count, factor)
]
"""At 8 users AWQ is faster, at 16 there are too few pairs for an interval, at 32 the two are alike; none at 1."""


def run_dir(
    path: Path,
    points: Sequence[SweepPoint] = POINTS,
    toml: str = RUN_TOML,
    requests: Sequence[RequestRecord] = (),
) -> Path:
    path.mkdir(parents=True)
    write_table(path / "points.csv", points, SweepPoint)
    if requests:
        write_table(path / "requests.csv", requests, RequestRecord)
    (path / "run.toml").write_text(toml)
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return path


def write_report(directory: Path, out: Path) -> list[Path]:
    """The page and its figures alone; all papers are in test_papers.py."""
    run = load_run(directory)
    out.mkdir(exist_ok=True)
    return write_capacity(run, find_knees(run.points, run.slo), compare(run.points, run.requests), Assumptions(), out)


def page(directory: Path, out: Path) -> str:
    return write_report(directory, out)[0].read_text()


def test_golden_page(tmp_path: Path) -> None:
    text = page(run_dir(tmp_path / "results" / "demo", requests=REQUESTS), tmp_path / "out")
    if os.environ.get("KNEEBENCH_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    directory = run_dir(tmp_path / "demo", requests=REQUESTS)
    first = [path.read_bytes() for path in write_report(directory, tmp_path / "a")]
    assert first == [path.read_bytes() for path in write_report(directory, tmp_path / "b")]
    assert first == [path.read_bytes() for path in write_report(directory, tmp_path / "a")]


def test_figures_are_well_formed_and_sized_for_a_readme(tmp_path: Path) -> None:
    written = write_report(run_dir(tmp_path / "demo"), tmp_path / "out")
    names = ["latency", "throughput", "memory", "cost"]
    assert [path.name for path in written] == ["capacity.md", *(f"{n}.{end}" for n in names for end in ("png", "svg"))]
    for path in written[1:]:
        if path.suffix == ".png":
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width == 1400 and 300 <= height <= 1200  # twice 700 px, for sharp screens
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_every_figure_of_the_page_exists(tmp_path: Path) -> None:
    text = page(run_dir(tmp_path / "demo"), tmp_path / "out")
    for name in ("latency", "throughput", "memory", "cost"):
        assert f"(figures/{name}.png)" in text and (tmp_path / "out" / "figures" / f"{name}.png").is_file()


def test_comparison_in_the_page(tmp_path: Path) -> None:
    """AWQ's answers take 0.6 of BF16's at 8 users and as long at 32; the rows say 240 and 420 tok/s at 8."""
    directory = run_dir(tmp_path / "demo", requests=REQUESTS)
    text = page(directory, tmp_path / "out")
    assert "## AWQ against BF16, paired" in text and "know nothing of run-to-run spread" in text
    rows = [line for line in text.splitlines() if "requests |" in line]
    assert [line.split(" | ")[1] for line in rows] == ["8", "16", "32"]
    assert ["undecided" in line for line in rows] == [False, False, True]
    assert rows[1].count("no interval") == 4 and "12 requests" in rows[1]


def test_comparison_of_sessions_needs_no_requests(tmp_path: Path) -> None:
    points = [replace(point, repeat=n, tok_s=(point.tok_s or 1) * n) for point in POINTS[:-1] for n in (1, 2)]
    text = page(run_dir(tmp_path / "demo", points), tmp_path / "out")
    assert "| AWQ | 8 | 1.75× [1.75–1.75] |" in text and "| 2 sessions |" in text
    assert "spread of their ratios from pair to pair" in text and "paired request by request" not in text


def test_requests_that_cannot_be_read_cost_the_pairs_and_not_the_report(tmp_path: Path) -> None:
    directory = run_dir(tmp_path / "demo")
    (directory / "requests.csv").write_text("cell,user\nbf16-c8-r1,0\n")
    written = write_report(directory, tmp_path / "out")
    assert "Nothing is paired by request: requests.csv: the columns are not those" in written[0].read_text()


def test_throughput_in_words_for_a_terminal() -> None:
    ratios = [
        Ratio("awq", "bf16", 1, "tok_s", 1.312, 1.2, 1.43, 3),
        Ratio("awq", "bf16", 8, "tok_s", 0.98, 0.95, 1.01, 3),
        Ratio("awq", "bf16", 8, "p95_ms", 5.0, 4.0, 6.0, 3),
        Ratio("rtn", "bf16", 0, "tok_s", 1.1, None, None, 12, "requests", 2.5),
    ]
    assert throughput_lines(ratios) == [
        "AWQ / BF16 tok/s: 1 user 1.31× [1.20–1.43]; 8 users 0.98× [0.95–1.01], undecided",
        "RTN / BF16 tok/s: 2.5 req/s 1.10×, no interval",
    ]


RATED = [
    replace(point, conc=0, rate_rps=point.conc / 8, arrivals="poisson", power_w=140.0, energy_j_per_token=140 / 400)
    for point in POINTS
]
"""The same run as an open loop at 0.125 to 8 requests a second, on a card that tells its power."""
RATED_TOML = RUN_TOML.replace("concurrencies = [1, 8, 16, 32, 64]", "rates_rps = [0.125, 1.0, 2.0, 4.0, 8.0]").replace(
    "seed = 7", 'seed = 7\narrivals = "poisson"'
)


def test_open_loop_speaks_of_rates_throughout(tmp_path: Path) -> None:
    requests = [
        record for point in RATED[:-1] for record in answers(Cell(point.precision, 0, 1, point.rate_rps), 30, 1)
    ]
    directory = run_dir(tmp_path / "demo", RATED, RATED_TOML, requests)
    text = page(directory, tmp_path / "out")
    for part in (
        "more requests per second than BF16 at p95 ≤ 3 s",
        "| Load | open loop, Poisson arrivals, seed 7 |",
        "its knee is at 2.57 (between 2 and 4)",
        "| Precision | Max safe rate, req/s | Knee (interval) | tok/s | completed/s |",
        "| BF16 | 2 | 2.57 [2–4] |",
        "| Precision | req/s | tok/s | p95, s |",
        "| BF16 | 0.125 | 35.0 [33.2–36.8] |",
        "| 1.09 | 140 | 0.350 | 120 |",
        "Planned and without a row: BF16 at 8.0 req/s.",
        "| BF16 | **largest tested rate inside p95 ≤ 3 s: 2 req/s** | 400 | 0.500",
        "read the bracket, not the crossing in it",
        "against requests sent per second",
    ):
        assert part in text
    figures = [line for line in text.splitlines() if line.startswith(("|", "**On", "- **", "!["))]
    assert not any(word in line for line in figures for word in ("users", "concurren", "closed loop"))


def test_figures_of_an_open_loop_stand_over_its_rates() -> None:
    knees = find_knees(RATED, Slo(3.0))
    upper, strip = latency(RATED, knees, 3.0).axes
    assert strip.get_xlabel() == "requests sent per second (open loop), log scale"
    assert [tick.get_text() for tick in strip.get_xticklabels()] == ["8", "4", "2", "1", "0.125"]
    assert [text.get_text() for text in strip.texts][0] == "at 2.57 req/s (2–4), KV cache full"
    curves = [line.get_xdata() for line in upper.lines if len(line.get_xdata()) == 4]
    assert curves == [pytest.approx([0.125, 1, 2, 4], rel=0.05)] * 2  # a few pixels apart, not to hide each other


def test_columns_of_power_are_there_only_with_power() -> None:
    text = points_table(POINTS)
    assert "Power" not in text and "J/token" not in text and "Attempt" not in text


def test_one_trace_gets_a_table_and_no_knee(tmp_path: Path) -> None:
    points = [replace(point, conc=0, rate_rps=2.5, arrivals="trace") for point in (POINTS[2], POINTS[6])]
    toml = RATED_TOML.replace('"poisson"', '"trace"\ntrace = "/home/me/monday.csv"').replace(
        "[0.125, 1.0, 2.0, 4.0, 8.0]", "[2.5]"
    )
    requests = [record for point in points for record in answers(Cell(point.precision, 0, 1, 2.5), 30, 1)]
    written = write_report(run_dir(tmp_path / "demo", points, toml, requests), tmp_path / "out")
    text = written[0].read_text()
    assert (
        "**On Some RTX 16 GB, BF16 keeps p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 2.2 s (1.98–2.42 s).**" in text
    )
    assert "open loop, arrivals of monday.csv, seed 7" in text and "/home/me" not in text
    assert "| AWQ | 2.5 | 760 [722–798] |" in text and "| AWQ | 2.5 req/s | 760 | 0.263" in text
    assert "## AWQ against BF16, paired" in text
    assert "knee" not in text.replace("kneebench", "").lower()
    assert {path.stem for path in written} == {"capacity", "memory"}


def test_a_cell_that_was_measured_again_shows_both_attempts(tmp_path: Path) -> None:
    died = replace(POINTS[0], verdict="invalid", verdict_reasons=("engine_died",))
    text = page(run_dir(tmp_path / "demo", [died, replace(POINTS[0], attempt=2), *POINTS[1:4]]), tmp_path / "out")
    assert "| Precision | Users | Attempt |" in text and "invalid: engine died" in text
    assert "Left out as invalid" not in text and "Invalid and left out" not in text


@pytest.mark.parametrize(
    ("scenario", "load", "lengths"),
    [
        ('arrivals = "gamma"\nburstiness = 0.25', "open loop, gamma arrivals of shape 0.25, seed not recorded", ""),
        ("turns = 3\nthink_s = 1.5", "closed loop, 3 turns a conversation, a pause of 1.5 s on average", ""),
        ('length_distribution = "empirical"\ndataset = "a/b/chats.json"\nshared_prefix = 0.5', "closed loop",
         "those of chats.json; 50% of each prompt is common to all"),
        ('length_distribution = "lognormal"\nlength_jitter = 0.4\ninput_tokens = 9\noutput_tokens = 3', "closed loop",
         "9 tokens in, 3 out on average, each drawn from a log-normal distribution of sigma 0.4"),
        ('length_distribution = "fixed"\nlength_jitter = 0.4\ninput_tokens = 9\noutput_tokens = 3', "closed loop",
         "9 tokens in, 3 out |"),
    ],
)  # fmt: skip
def test_load_and_lengths_in_words(tmp_path: Path, scenario: str, load: str, lengths: str) -> None:
    text = setup_table(load_run(run_dir(tmp_path / "demo", POINTS[:1], f"[scenario]\n{scenario}\n")))
    assert f"| Load | {load}" in text and f"| Lengths | {lengths}" in text


def test_one_precision(tmp_path: Path) -> None:
    text = page(run_dir(tmp_path / "demo", POINTS[:4]), tmp_path / "out")
    assert "**On Some RTX 16 GB, BF16 sustains 16 users at p95 ≤ 3 s;" in text


def test_single_point(tmp_path: Path) -> None:
    assert "no knee in range" in page(run_dir(tmp_path / "demo", POINTS[:1]), tmp_path / "out")


def test_every_cell_failed(tmp_path: Path) -> None:
    failed = [
        SweepPoint("demo", name, conc, verdict_reasons=("errors",)) for name in ("bf16", "awq") for conc in (1, 8)
    ]
    written = write_report(run_dir(tmp_path / "demo", failed), tmp_path / "out")
    text = written[0].read_text()
    assert "not decided: no usable p95 for BF16 and AWQ" in text
    assert "The engine gave no memory figures." in text
    assert len(written) == 1 and "figures/" not in text


def test_every_point_invalid_is_drawn_and_not_used(tmp_path: Path) -> None:
    points = [replace(point, verdict="invalid", verdict_reasons=("errors",)) for point in POINTS]
    written = write_report(run_dir(tmp_path / "demo", points), tmp_path / "out")
    assert "no usable p95" in written[0].read_text()
    assert {path.stem for path in written} == {
        "capacity",
        "latency",
        "throughput",
        "memory",
    }  # a price needs a valid row


def test_a_name_of_the_users_own_is_escaped(tmp_path: Path) -> None:
    points = [replace(point, precision="my|$x$_q") for point in POINTS[:4]]
    assert r"| MY\|\$X\$\_Q | 16 |" in page(run_dir(tmp_path / "demo", points), tmp_path / "out")


def test_repeats_are_listed_and_their_spread_is_used(tmp_path: Path) -> None:
    points = [replace(point, repeat=n, tok_s=(point.tok_s or 1) * n) for point in POINTS[:2] for n in (1, 2)]
    text = page(run_dir(tmp_path / "demo", points), tmp_path / "out")
    assert "| Precision | Users | Repeat |" in text and "spread between sessions" in text


def test_cpu_and_random_weights_are_said(tmp_path: Path) -> None:
    points = [replace(point, memory_kind="host", gpu=None, source="dummy-weights") for point in POINTS]
    text = page(run_dir(tmp_path / "demo", points), tmp_path / "out")
    assert "> Measured on a CPU." in text and "speed only, no quality claim" in text
    assert "On Some CPU (8 cores, CPU only)," in text and "## Host memory" in text


def test_endpoint_without_memory(tmp_path: Path) -> None:
    blank = {"weights_gib": None, "kv_cache_gib": None, "kv_cache_tokens": None, "other_gib": None, "memory_kind": None}
    points = [replace(point, source="endpoint", gpu=None, **blank) for point in POINTS[:4]]
    written = write_report(run_dir(tmp_path / "demo", points), tmp_path / "out")
    text = written[0].read_text()
    assert "On this endpoint," in text and "client only: Some RTX 16 GB" in text
    assert not any(path.stem == "memory" for path in written)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    points = [replace(point, model="/home/me/evil_*<b>|x", kernel="a|b\nc") for point in POINTS]
    text = page(run_dir(tmp_path / "demo", points), tmp_path / "out")
    assert r"evil\_\*\<b\>\|x" in text and r"a\|b c" in text and "/home/me" not in text


def test_bare_descriptions_are_enough(tmp_path: Path) -> None:
    directory = run_dir(tmp_path / "demo", toml="")
    (directory / "environment.json").unlink()
    assert "p95 ≤ 3 s" in page(directory, tmp_path / "out")


@pytest.mark.parametrize("missing", ["points.csv", "run.toml"])
def test_directory_that_is_no_run(tmp_path: Path, missing: str) -> None:
    directory = run_dir(tmp_path / "demo")
    (directory / missing).unlink()
    with pytest.raises(InputError, match=f"is no run: {missing} not there"):
        write_report(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        write_report(tmp_path / "nowhere", tmp_path / "out")


def test_empty_table_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row yet"):
        write_report(run_dir(tmp_path / "empty", []), tmp_path / "out")
    with pytest.raises(InputError, match=r"run\.toml"):
        write_report(run_dir(tmp_path / "toml", toml="= ="), tmp_path / "out")
    broken = run_dir(tmp_path / "csv")
    (broken / "points.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecordError, match="columns"):
        write_report(broken, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.12, "0.120"), (8.9, "8.90"), (56.7, "56.7"), (1234.4, "1,234")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_escape() -> None:
    assert escape("a_b*c|d\n$x$ `y` [z](u)") == r"a\_b\*c\|d \$x\$ \`y\` \[z\](u)"


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.0, 10.0], [0.0, 10.0]),
        ([0.0, 1.0], [-1.5, 2.5]),
        ([1.0, 0.0], [2.5, -1.5]),
        ([0.0, 0.0, 0.0], [-4.0, 0.0, 4.0]),
        ([0.0, 1.0, 3.0], [4 / 3 - 4, 4 / 3, 4 / 3 + 4]),
    ],
)
def test_labels_move_apart(wanted: list[float], placed: list[float]) -> None:
    assert spread(wanted, 4.0) == pytest.approx(placed)


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [((0.4, 6.0), [0.5, 1, 2, 5]), ((0.9, 3.5), [1, 1.5, 2, 3]), ((0.5, 5000), [1, 10, 100, 1000])],
)
def test_ticks_are_round(ends: tuple[float, float], ticks: list[float]) -> None:
    assert nice_ticks(*ends) == ticks
