"""The papers of a predicted run: every block of them says so, and none of them speaks as of a measurement."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest
from rich.console import Console

from harness.analysis.compare import compare
from harness.analysis.cost import cost_lines
from harness.analysis.knee import find_knees
from harness.analysis.words import words_of
from harness.assumptions import Assumptions
from harness.errors import RecordError
from harness.history import history
from harness.quality.directory import QualityDirectory
from harness.records import Answer, Cell, RequestRecord, SweepPoint, read_table, write_table
from harness.report import plots, versus
from harness.report.brief import write_brief, write_case
from harness.report.guidance import risks_table
from harness.report.history import rows as history_rows
from harness.report.markdown import write_capacity
from harness.report.papers import write_report
from harness.report.predicted import box, marked, measure_command
from harness.report.run import load_run
from harness.report.terminal import capacity_tables, show_run
from harness.slo import Slo
from tests.report.test_brief import POINTS as BRIEF_POINTS
from tests.report.test_papers import PROMPTS
from tests.report.test_report import POINTS, answers, run_dir
from tests.report.test_report import RUN_TOML as BASE_TOML

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"

EXAMPLE = Path(__file__).parents[2] / "results" / "demo-until-p95-500ms"
CARD = "NVIDIA RTX 2000 Ada Generation"

RUN_TOML = """
[run]
model = "qwen2.5-1.5b"
precisions = ["bf16", "awq", "gptq"]
concurrencies = [1, 2, 4, 8, 16, 32, 64, 128]
max_model_len = 256
max_num_seqs = 256

[run.predicted]
card = "rtx-2000-ada"
basis = "architecture"
n = 42
median_error_tok_s = 0.098
median_error_tpot_ms = 0.12

[scenario]
name = "chat"
description = "Chat turns: 128 tokens in, 32 out"
input_tokens = 128
output_tokens = 32
slo_p95_s = 0.5
usd_per_hour = 0.25
utilisation = 1.0
"""
ENVIRONMENT = {"kneebench_version": "0.1.0", "cpu": "Some CPU", "cpu_cores": 2, "memory_gib": 8.0, "gpu": None}

BAND = 0.12
BANDED = ("tok_s", "p95_ms", "ttft_p95_ms", "tpot_p95_ms")
COUNTERS = (
    "send_lag_p99_ms", "loop_lag_p99_ms", "coalesced_share", "chunks_s", "clock_step_ms", "client_processes",
    "counter_gap", "prefix_hit_share", "power_w", "energy_j_per_token", "sm_clock_mhz", "temperature_c_max",
    "throttled_share", "checkpoint_sha256", "p99_ms_lo", "p99_ms_hi", "goodput_lo", "goodput_hi", "started_at",
)  # fmt: skip


def predicted(point: SweepPoint) -> SweepPoint:
    """A row as harness/predict writes it: no counters of a client, and the band of validation for an interval."""
    band = {f"{name}_{end}": None if (value := getattr(point, name)) is None else value * factor
            for name in BANDED for end, factor in (("lo", 1 - BAND), ("hi", 1 + BAND))}  # fmt: skip
    return replace(
        point, **dict.fromkeys(COUNTERS), **band, source="predicted", engine="vllm (predicted)", engine_version=None,
        gpu=CARD, memory_kind="gpu", model="qwen2.5-1.5b", verdict="valid", verdict_reasons=(),
    )  # fmt: skip


def predicted_run(
    directory: Path,
    points: Sequence[SweepPoint] | None = None,
    requests: Sequence[RequestRecord] = (),
    toml: str = RUN_TOML,
) -> Path:
    directory.mkdir(parents=True)
    rows = [predicted(point) for point in read_table(EXAMPLE / "points.csv", SweepPoint)] if points is None else points
    write_table(directory / "points.csv", rows, SweepPoint)
    write_table(directory / "requests.csv", requests, RequestRecord)
    (directory / "run.toml").write_text(toml)
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return directory


# --- what every paper must say ----------------------------------------------------------------------------------------

FORBIDDEN = re.compile(
    r"\b(?:measured|tested|safe to promise|supported|refuted|95 % intervals?|(?:this|the) run's (?:own|rows))\b", re.I
)
"""What a prediction has no right to say: not of itself, and not of anything else in its papers."""


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All papers of the example's rows as predictions."""
    root = tmp_path_factory.mktemp("predicted")
    write_report(
        predicted_run(root / "results" / "demo"), root / "out", None, Assumptions(users=100, api_name="an API")
    )
    return root / "out"


def blocks(page: str) -> list[str]:
    """Headings, paragraphs, items and tables of a page, code and where links point taken out."""
    page = re.sub(r"\n(> )?```.*?```", "", page, flags=re.DOTALL)
    page = re.sub(r"\]\([^)]*\)", "]", re.sub(r"(?<!!)`[^`\n]*`", "", page))
    parts = re.split(r"\n(?:> ?)?\n(?:> ?)?|\n(?=- )", page)
    return [part for part in (part.strip("> \n") for part in parts) if part]


def check_page(page: str) -> None:
    found = blocks(page)
    assert len(found) > 6
    for block in found:
        if block.startswith("|"):  # a table says it in its header, or under its heading where it has none
            header = block.splitlines()[0]
            assert "predict" in header.lower() or not header.replace("|", "").strip(), block
        else:
            assert "predict" in block.replace("not predicted", "").lower(), block
        assert not FORBIDDEN.search(block), block


@pytest.mark.parametrize("name", ["capacity.md", "risk_brief.md", "business_case.md"])
def test_every_block_of_every_page_owns_up(papers: Path, name: str) -> None:
    check_page((papers / name).read_text())


def test_what_was_assumed_and_what_nobody_knows_is_no_prediction(papers: Path) -> None:
    """The demand and the rent were given; the machine that computed is not the card; and the noise of the levels, drawn
    one by one, is not how a prediction is wrong."""
    page = (papers / "capacity.md").read_text()
    assert "- Assumed for the prediction: An hour of a card costs 0.250 USD in rent." in page
    assert "- Assumed for the prediction: Demand: 100 users at the peak." in page
    assert f"| Card | {CARD}, from its data sheet |" in page and "| Computed on | Some CPU, 2 cores" in page
    assert "by noise alone" not in page and "run-to-run spread" not in page


def small(**more: object) -> list[SweepPoint]:
    """The small run of test_report, without the cell that failed, as predictions."""
    return [replace(predicted(point), **more) for point in POINTS if point.tok_s]  # type: ignore[arg-type]


VARIANTS = {
    "gains": [predicted(point) for point in BRIEF_POINTS if point.tok_s],
    "unvalidated": small(verdict="suspect", verdict_reasons=("unvalidated",)),
    "open loop": [replace(point, conc=0, rate_rps=point.conc / 8, arrivals="poisson") for point in small()],
    "one trace": [replace(point, conc=0, rate_rps=2.5, arrivals="trace") for point in small()[2:7:4]],
    "one precision": small()[:4],
    "one row": small()[:1],
    "never inside": small(p95_ms=99_000.0, p95_ms_lo=98_000.0, p95_ms_hi=99_900.0),
    "all failed": small(tok_s=None, p95_ms=None, verdict="invalid", verdict_reasons=("errors",)),
    "on a CPU": small(memory_kind="host"),
    "owned": small(usd_per_hour=None, utilisation=None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_whatever_the_run(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [Path(f"{name}.png") for name in ("latency", "throughput", "memory", "cost")]
    monkeypatch.setattr("harness.report.markdown.write_figures", lambda *_, **__: drawn)  # seconds, and not read here
    run = load_run(predicted_run(tmp_path / "run", VARIANTS[variant]))
    knees, ratios = find_knees(run.points, run.slo), compare(run.points, run.requests)
    asked = Assumptions(users=50, requests_per_day=1e6, sources=("a card, as somebody sells it",))
    given = replace(asked, card_usd=600.0, utilisation=0.5) if variant == "owned" else asked
    check_page(write_brief(run, knees, ratios, given, tmp_path / "brief.md").read_text())
    check_page(write_case(run, knees, ratios, given, tmp_path / "case.md").read_text())
    check_page(write_capacity(run, knees, ratios, given, tmp_path)[0].read_text())


def test_what_speaks_for_a_precision_is_predicted_to(tmp_path: Path) -> None:
    run = load_run(predicted_run(tmp_path / "run", VARIANTS["gains"], toml=RUN_TOML.replace("0.5\n", "3.0\n", 1)))
    knees, ratios = find_knees(run.points, run.slo), compare(run.points, run.requests)
    case = write_case(run, knees, ratios, Assumptions(users=100), tmp_path / "case.md").read_text()
    brief = write_brief(run, knees, ratios, Assumptions(), tmp_path / "brief.md").read_text()
    assert re.search(r"[5-9] of 9 bullets are predicted to hold; no measurement supports any of them\.", case)
    assert "- Predicted: **Lower cost a token.** AWQ cuts serving cost" in case
    assert "- Assumed for the prediction: An hour of a card costs" in case
    assert f"**Predicted for {CARD}: Serve AWQ up to" in brief and "Measure it before anybody signs.**" in brief
    assert re.search(
        r"18 claims, 2 precisions: \d+ expected, \d+ not expected, \d+ undecided, \d+ not predicted\.", brief
    )
    assert "| **These are predictions.** Nothing ran" in brief and "measure before buying: `bench sweep " in brief
    assert "Another start of the server" not in brief


class Page(HTMLParser):
    """The text of each block of an HTML page, and the names of its figures."""

    BLOCKS = ("h1", "h2", "p", "li", "pre", "thead")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.names: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.names += [value or "" for name, value in attrs if tag == "svg" and name == "aria-label"]
        if tag in self.BLOCKS:
            self.found.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if {"script", "style", "nav", "form", "pre"} & set(self._open):
            return
        self.text.append(data)
        if any(tag in self.BLOCKS for tag in self._open):
            tag, text = self.found[-1]
            self.found[-1] = tag, text + data


def test_the_page_for_a_browser(papers: Path) -> None:
    source = (papers / "capacity.html").read_text()
    page = Page()
    page.feed(source)
    said = [text for tag, text in page.found if tag in ("h1", "h2", "p", "li", "thead") and text.strip()]
    silent = [text for text in said if "predict" not in text.replace("not predicted", "").lower()]
    assert len(said) > 60
    assert [text.split()[0] for text in silent] == [], silent
    assert len(page.names) == 4 and all("predicted" in name for name in page.names)
    assert not FORBIDDEN.search(re.sub(r"`[^`]*`", "", "".join(page.text)))
    assert "<title>Capacity, predicted: " in source
    assert "`Simulated ${" in source and "`Tested ${" not in source
    names = [
        precision["name"] for precision in json.loads(source.split('id="data">')[1].split("</script>")[0])["precisions"]
    ]
    assert names == ["BF16, predicted", "AWQ, predicted", "GPTQ, predicted"]


# --- the box ----------------------------------------------------------------------------------------------------------


def test_the_box_says_what_a_prediction_is_and_how_to_measure(papers: Path) -> None:
    command = (
        "bench sweep --model qwen2.5-1.5b --precisions bf16,awq,gptq --scenario chat --conc 1,2,4,8,16,32,64,128 "
        "--input-tokens 128 --output-tokens 32 --slo p95=0.5s --max-num-seqs 256"
    )
    for name in ("capacity.md", "risk_brief.md", "business_case.md"):
        top = (papers / name).read_text().split("```")[0:2]
        assert f"> **Predicted for {CARD}: nothing ran." in top[0]
        assert "> Unvalidated: fewer than three points of this card are published." in top[0]
        assert "n = 42; median error tok/s 9.8 %, TPOT 12 %; card rtx-2000-ada." in top[0]
        assert shlex.split(top[1].replace("\\\n>", "").replace("\n>", "")) == shlex.split(command)


def test_the_command_is_one_that_bench_takes(tmp_path: Path) -> None:
    """Typer itself reads it: no option of it is unknown, and what follows is refused for the model alone."""
    run = load_run(predicted_run(tmp_path / "run", toml=RUN_TOML.replace("qwen2.5-1.5b", "no/such; $(model)`")))
    words = shlex.split(measure_command(run))
    assert words[:4] == ["bench", "sweep", "--model", "no/such; $(model)`"]
    options = {word for word in words if word.startswith("--")}
    helped = subprocess.run(
        [sys.executable, "-m", "harness", "sweep", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert all(option in helped.stdout for option in options), options


@pytest.mark.parametrize(
    ("table", "said", "unsaid"),
    [
        (
            'basis = "card"\nn = 7',
            "on published points of this card, predicted by a fit that had not seen",
            "Unvalidated",
        ),
        ('basis = "calibrated"', "left out of its fit", "Unvalidated"),
        ('basis = "architecture"', "Unvalidated: fewer than three", "no such thing"),
        ('basis = "a *hostile* | word"', r"a \*hostile\* \| word", "Unvalidated"),
        ("", "on what is not recorded", "Unvalidated"),
    ],
)
def test_what_the_band_stands_on(tmp_path: Path, table: str, said: str, unsaid: str) -> None:
    toml = re.sub(r"\[run.predicted\].*?\n\n", f"[run.predicted]\n{table}\n\n", RUN_TOML, flags=re.DOTALL)
    run = load_run(predicted_run(tmp_path / "run", small()[:1], toml=toml))
    assert said in box(run) and unsaid not in box(run)


def test_a_row_that_is_unvalidated_is_enough(tmp_path: Path) -> None:
    toml = RUN_TOML.replace('basis = "architecture"', 'basis = "card"')
    run = load_run(predicted_run(tmp_path / "run", VARIANTS["unvalidated"], toml=toml))
    assert "Unvalidated" in box(run)
    assert "fewer than three published points" in risks_table(run, find_knees(run.points, run.slo), None)


def test_a_measured_run_has_no_box_and_its_own_words(tmp_path: Path) -> None:
    run = load_run(run_dir(tmp_path / "demo", POINTS[:2]))
    page = "# Tested\n\nIt was measured.\n\n| Precision |\n| --- |\n| BF16 |\n"
    assert box(run) == "" and marked(page, run.words) == page and not run.predicted
    assert run.words.said("measured") == run.words.titled("measured") == run.words.assumed("measured") == "measured"


# --- words ------------------------------------------------------------------------------------------------------------


def test_names_from_outside_keep_their_words() -> None:
    """Names may be made of our words, and then nothing of them is turned round nor taken for an admission."""
    rows = small(model="well measured", scenario="tested-twice")[:1]
    words = words_of(rows, ["the predicted one"])
    assert words.reworded("well measured was measured, as tested-twice tested") == (
        "well measured was predicted, as tested-twice simulated"
    )
    assert words.said("the predicted one is fast") == "Predicted: the predicted one is fast"
    assert words.said("It was measured, not tested.") == "It was predicted, not simulated."
    assert words.reworded("results/measured/x `tested` measured_ms") == "results/measured/x `tested` measured_ms"
    assert (
        words.titled("VRAM split") == "Predicted VRAM split" and words.titled("Price of it") == "Predicted price of it"
    )


def test_code_and_links_stay(tmp_path: Path) -> None:
    words = words_of(small()[:1])
    page = "Measured `measured` [tested](https://tested/measured)\n\n```\nmeasured\n```\n\n- one\n- two, predicted\n"
    assert marked(page, words) == (
        "Predicted `measured` [simulated](https://tested/measured)\n\n```\nmeasured\n```\n\n- Predicted: one\n"
        "- two, predicted\n"
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def test_every_figure_says_it_and_draws_the_band() -> None:
    points = small()
    knees = find_knees(points, Slo(p95_s=3.0))
    costs = cost_lines(points, knees)
    drawn = {
        "Predicted p95 latency against users": plots.latency(points, knees, 3.0),
        "Predicted throughput against users": plots.throughput(points),
        "Predicted price of a million output tokens": plots.cost(points, knees, costs),
        "Predicted VRAM split": plots.memory(points),
    }
    for title, figure in drawn.items():
        axes = figure.axes[0]
        assert axes.get_title() == title
        if "VRAM" not in title:
            assert "band: 95 % error of validation" in figure.get_supxlabel()
            assert all(line.get_linestyle() == "--" for line in axes.lines if len(line.get_xdata()) == 4)
    bands = [item for item in drawn["Predicted throughput against users"].axes[0].collections]
    spans = [(item.get_paths()[0].vertices[:, 1].min(), item.get_paths()[0].vertices[:, 1].max()) for item in bands]
    assert spans == [
        (pytest.approx(35 * 0.88), pytest.approx(520 * 1.12)),
        (pytest.approx(70 * 0.88), pytest.approx(1150 * 1.12)),
    ]
    measured = plots.throughput([point for point in POINTS if point.tok_s])
    assert measured.axes[0].get_title() == "Throughput against users" and not measured.axes[0].collections
    assert "band" not in measured.get_supxlabel()


# --- the workbook -----------------------------------------------------------------------------------------------------


def test_every_sheet_and_every_chart_of_the_workbook(papers: Path) -> None:
    with ZipFile(papers / "cost.xlsx") as book:
        texts = ["".join(part.itertext()) for part in ElementTree.fromstring(book.read("xl/sharedStrings.xml"))]
        names = [name for name in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name)]
        for name in names:
            cells = {cell.get("r"): cell for cell in ElementTree.fromstring(book.read(name)).iter(f"{{{MAIN}}}c")}
            title, caution = (texts[int(cells[at].findtext(f"{{{MAIN}}}v") or -1)] for at in ("A1", "A3"))
            assert title.endswith("(predicted run)") and caution.startswith(f"Predicted for {CARD}: nothing ran.")
            shown = [cell.findtext(f"{{{MAIN}}}{part}") or "" for cell in cells.values() for part in ("v", "f")]
            assert not [text for text in shown if FORBIDDEN.search(text)]
        charts = [book.read(name).decode() for name in book.namelist() if name.startswith("xl/charts/chart")]
    assert len(names) == 8 and len(charts) == 6
    assert all("<a:t>Predicted " in chart for chart in charts)
    assert not [text for text in texts if FORBIDDEN.search(text)]
    assert "Precision, predicted" in texts and "Error bands" in texts


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_ratio_of_two_predictions_has_the_band_of_both() -> None:
    """BF16 100 tok/s [88–112], AWQ 200 [176–224]: hypot(ln(200/176), ln(112/100)) = hypot(0.1278, 0.1133) = 0.1708,
    so 2 · e^±0.1708 = 1.686 and 2.373. TPOT medians 20 and 10 ms have the band of their p95, 12 % either way: 0.5 with
    0.4215 and 0.5931. Of the requests, answered alike in every detail, nothing is taken."""
    rows = [predicted(replace(POINTS[0], precision=name, tok_s=tok_s, tpot_p50_ms=tpot, tpot_p95_ms=1.5 * tpot))
            for name, tok_s, tpot in (("bf16", 100.0, 20.0), ("awq", 200.0, 10.0))]  # fmt: skip
    for requests in ((), answered_alike()):
        found = {ratio.metric: ratio for ratio in compare(rows, requests)}
        speed, decode = found["tok_s"], found["tpot_p50_ms"]
        assert (speed.ratio, speed.basis, speed.pairs) == (2.0, "bands", 1)
        assert (speed.ratio_lo, speed.ratio_hi) == (pytest.approx(1.686, abs=1e-3), pytest.approx(2.373, abs=1e-3))
        assert (decode.ratio_lo, decode.ratio_hi) == (pytest.approx(0.4215, abs=1e-3), pytest.approx(0.5931, abs=1e-3))


def answered_alike() -> list[RequestRecord]:
    return [record for name in ("bf16", "awq") for record in answers(Cell(name, 1), 40, 1.0)]


# --- kept apart -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*small()[:2], POINTS[2]], "mixes predicted and measured rows"),
        ([POINTS[2], *small()[:2]], "mixes predicted and measured rows"),
        ([replace(point, repeat=n) for point in small()[:2] for n in (1, 2)], "repeats a prediction"),
    ],
)
def test_rows_that_are_not_of_one_kind(tmp_path: Path, rows: Sequence[SweepPoint], said: str) -> None:
    directory = predicted_run(tmp_path / "results" / "demo", rows)
    with pytest.raises(RecordError, match=said):
        load_run(directory)
    (past,) = history(tmp_path / "results")
    assert said in (past.fault or "") and past.tok_s is None


def test_answers_beside_predictions(tmp_path: Path) -> None:
    directory = predicted_run(tmp_path / "demo", small()[:2])
    with QualityDirectory(directory) as answers_kept:
        answers_kept.describe({"model": "m", "baseline": "bf16", "precisions": ["bf16"]}, PROMPTS)
        answers_kept.add_answer(Answer("p1", "bf16", text="4", ok=True))
    with pytest.raises(RecordError, match="predicted rows beside answers"):
        load_run(directory)


def test_history_shows_the_source(tmp_path: Path) -> None:
    predicted_run(tmp_path / "results" / "a-prediction", small())
    run_dir(tmp_path / "results" / "measured", POINTS)
    found = {run.run: run for run in history(tmp_path / "results")}
    assert (found["a-prediction"].source, found["measured"].source) == ("predicted", "engine")
    assert found["a-prediction"].machine == CARD
    notes = {row[0]: row[-1] for row in history_rows(list(found.values()))}
    assert notes == {"a-prediction": "predicted, not measured", "measured": ""}


def test_the_terminal(tmp_path: Path) -> None:
    run = load_run(predicted_run(tmp_path / "demo", small()))
    shown = io.StringIO()
    show_run(Console(file=shown, width=400), run)
    text = shown.getvalue()
    # The rows of the table stand under its title, which says it; each figure of theirs has its band.
    rows = [line for line in text.splitlines() if line.startswith(tuple({point.precision for point in run.points}))]
    assert len(rows) == len(run.points) and all(row.count("[") >= 3 for row in rows)
    lines = [line for line in text.splitlines() if re.search(r"\d", line) and line not in rows]
    assert text.strip().startswith("Predicted\n") or text.strip().startswith("Predicted ")
    spoken = [line for line in lines if not line.startswith(("precision", "bench sweep", "Unvalidated"))]
    assert spoken and all("predict" in line.lower() for line in spoken) and not FORBIDDEN.search(text)
    assert measure_command(run) in text
    tables = capacity_tables(run.points, find_knees(run.points, run.slo), Assumptions(users=50))
    assert [str(table.title) for table in tables] == [
        "Cards, predicted",
        "USD for 1M tokens, predicted",
        "Spend, predicted",
    ]


def versus_toml() -> str:
    """The scenario of test_report's run, so that both asked the same."""
    return RUN_TOML.split("[scenario]")[0] + BASE_TOML.split("[run]")[0]


def test_a_prediction_beside_a_measurement_is_checked(tmp_path: Path) -> None:
    """tok/s predicted 10 % above what was measured, p95 25 % above. Measured ±5 and ±10 %, bands ±12 %: tok/s agrees,
    for ln 1.1 = 0.095 is less than hypot(ln(1/0.88), ln 1.05) = 0.137; p95 does not, ln 1.25 = 0.223 against
    hypot(ln(1/0.88), ln 1.1) = 0.160. Nothing has regressed."""
    rows = [predicted(replace(point, tok_s=1.1 * point.tok_s, p95_ms=1.25 * point.p95_ms))
            for point in POINTS[:4] if point.tok_s and point.p95_ms]  # fmt: skip
    before = run_dir(tmp_path / "card", POINTS[:4])
    after = predicted_run(tmp_path / "guess", rows, toml=versus_toml())
    found = versus.compare_runs(before, after, metrics=("tok_s", "p95_ms"))
    said = versus.headline(found)
    assert said == (
        "Predicted against measured: median error tok/s 10 % (n = 4), p95 25 % (n = 4). 4 of 8 figures agree within "
        "their intervals."
    )
    assert {row[2]: row[6] for row in versus.rows(found)[1]} == {"tok/s": "agrees", "p95, ms": "disagrees"}
    assert versus.rows(found)[0][3:5] == ("Before", "After, predicted")
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)
    assert versus.title(found).endswith(", predicted") and "regress" not in versus.page(found).lower()
    assert any(caution.startswith("guess is predicted.") for caution in versus.cautions(found))
    turned = versus.compare_runs(after, before, metrics=("tok_s",))
    assert "median error tok/s 10 % (n = 4)" in versus.headline(turned)


def test_two_predictions_are_compared_as_such(tmp_path: Path) -> None:
    """Half the tok/s: 0.5 · e^±0.171 is 0.42 to 0.59, surely worse; said of predictions, and not as if it had run."""
    one = predicted_run(tmp_path / "one", small()[:4], toml=versus_toml())
    slow = [predicted(replace(point, tok_s=(point.tok_s or 0) / 2)) for point in POINTS[:4]]
    two = predicted_run(tmp_path / "two", slow, toml=versus_toml())
    found = versus.compare_runs(one, two, metrics=("tok_s",))
    assert found.exit_code() == 1 and versus.headline(found).startswith("Predicted: Regressed: 4 of 4 figures")
    assert found.changes[0].basis == "bands" and found.changes[0].ratio.lo == pytest.approx(0.5 / 1.1863, abs=1e-3)
    assert versus.rows(found)[0][3:5] == ("Before, predicted", "After, predicted")
