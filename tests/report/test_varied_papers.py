"""A run whose engine arguments vary, through all of its papers: each setting readable, each compared with its like."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from harness.analysis.capacity import freed_memory
from harness.analysis.case import make_case
from harness.analysis.claims import is_int4, is_method, judge
from harness.analysis.compare import compare
from harness.analysis.headline import baseline_words, headlines, label
from harness.analysis.knee import find_knees
from harness.analysis.levels import compared, precision_order
from harness.analysis.saving import savings
from harness.assumptions import Assumptions
from harness.history import read_run
from harness.records import SweepPoint, read_table, write_table
from harness.report.papers import write_papers
from harness.report.plots import short
from harness.report.predicted import measure_command
from harness.report.run import Run, load_run
from harness.report.tables import throughput_lines
from harness.report.terminal import show_run
from harness.report.workbook.layout import lay_out
from harness.rundir import to_toml
from harness.slo import Slo
from tests.report.workbook_cases import USUAL, row, run_of, varied

BF16, AWQ = "bf16[max_num_seqs={}]", "awq[max_num_seqs={}]"
SLO = Slo(3.0)


def rows() -> list[SweepPoint]:
    """bf16 in 16 and 64, awq in 16, 64 and 128; see workbook_cases.varied. AWQ is 2.0, 1.75, 1.9 times as fast at 1, 8,
    16 users, in each setting: both are faster by the same 1.15 in the second."""
    return varied(USUAL)


def twice() -> list[SweepPoint]:
    """The same in two server sessions each."""
    return [replace(point, repeat=repeat) for point in rows() for repeat in (1, 2)]


def test_ratios_are_of_one_setting() -> None:
    ratios = [one for one in compare(rows(), []) if one.metric == "tok_s"]
    assert {(one.precision, one.baseline) for one in ratios} <= {(AWQ.format(n), BF16.format(n)) for n in (16, 64)}
    found = {(one.precision, one.conc): one.ratio for one in compare(twice(), []) if one.metric == "tok_s"}
    for setting in (16, 64):
        assert found[AWQ.format(setting), 1] == pytest.approx(70 / 35)
        assert found[AWQ.format(setting), 8] == pytest.approx(420 / 240)
    assert (AWQ.format(64), 32) not in found, "BF16 was not measured there"
    assert not [key for key in found if "128" in key[0]], "nor in that setting at all"


def test_memory_and_price_are_compared_in_one_setting() -> None:
    points = [
        replace(point, kv_cache_tokens=point.kv_cache_tokens and point.kv_cache_tokens * (2 if "64" in name else 1))
        for point in rows()
        for name in (point.precision,)
    ]
    freed = {(line.precision, line.baseline): line.kv_tokens for line in freed_memory(points)}
    assert freed == {
        (AWQ.format(16), BF16.format(16)): 81_900 - 40_000,
        (AWQ.format(64), BF16.format(64)): 2 * (81_900 - 40_000),
    }
    saved = savings(rows(), find_knees(rows(), SLO), Assumptions())
    assert [(line.precision, line.baseline) for line in saved] == list(freed)
    # AWQ at its safe 16 users against BF16 at its safe 16 (setting 16): 1 - 400 / 1150 where 32 users are safe, too.
    assert saved[0].share == pytest.approx(1 - 400 / 1150)


def test_a_sentence_for_each_setting_that_both_have() -> None:
    knees = find_knees(rows(), SLO)
    said = headlines(rows(), knees, "X")
    assert len(said) == 2 and "AWQ[seqs=16]" in said[0] and "BF16[seqs=16]" in said[0] and "seqs=64" not in said[0]
    alone = [point for point in rows() if "awq" in point.precision]
    assert compared(alone) == {AWQ.format(64): AWQ.format(16), AWQ.format(128): AWQ.format(16)}
    unpaired = [point for point in rows() if point.precision in (BF16.format(16), AWQ.format(128))]
    assert [sentence.split(" sustains")[0] for sentence in headlines(unpaired, find_knees(unpaired, SLO), "X")] == [
        "On X, BF16[seqs=16]",
        "On X, AWQ[seqs=128]",
    ]


def test_the_case_is_against_the_same_setting() -> None:
    knees = find_knees(rows(), SLO)
    case = make_case(rows(), knees, compare(rows(), []), SLO, Assumptions())
    assert case is not None and case.sides.names in {(AWQ.format(n), BF16.format(n)) for n in (16, 64)}
    assert case.freed is not None and case.freed.baseline == case.sides.other


def test_claims_pair_what_was_served_alike() -> None:
    gptq = [
        replace(point, precision=point.precision.replace("awq", "gptq")) for point in rows() if "awq" in point.precision
    ]
    points = [
        *(point for point in rows() if "[max_num_seqs=16]" not in point.precision or "awq" not in point.precision),
        *gptq,
    ]
    against_bf16, methods = judge(points, [], find_knees(points, SLO), compare(points, []))
    assert {(one.one, one.other) for one in against_bf16} == {
        (AWQ.format(64), BF16.format(64)),
        ("gptq[max_num_seqs=16]", BF16.format(16)),
        ("gptq[max_num_seqs=64]", BF16.format(64)),
    }
    assert {(one.one, one.other) for one in methods} == {(AWQ.format(64), "gptq[max_num_seqs=64]")}


def test_a_setting_is_no_part_of_what_a_precision_is() -> None:
    assert is_int4("awq[kv_cache_dtype=fp8]") and is_method("awq[quantization=gptq]", "awq")
    assert not is_int4("bf16[quantization=awq]")


def test_names_are_short_and_stay_apart() -> None:
    assert label("awq[max_num_seqs=64]") == "AWQ[seqs=64]"
    assert label("gptq-3bit[block_size=16]") == "GPTQ 3-bit[block_size=16]", "what has no short name keeps its own"
    assert short("awq[max_num_seqs=64,max_num_batched_tokens=2048]") == "AWQ seqs=64,batched=2048"
    names = [short(f"a-precision-with-a-name[max_num_seqs={n}]") for n in (64, 128)]
    assert len(set(names)) == 2
    assert baseline_words(compared(rows())) == "BF16 with the same engine arguments"
    assert baseline_words({"awq": "bf16"}) == "BF16" and baseline_words({}) == ""


def test_the_workbook_takes_each_baseline_from_its_own_column() -> None:
    layout = lay_out(run_of(rows()), with_workings=True)
    assert layout.precisions == tuple(precision_order(rows()))
    columns = {name: "CDEFG"[at] for at, name in enumerate(layout.precisions)}
    for setting in (16, 64):
        cells = layout.workings_cells(AWQ.format(setting))
        assert re.fullmatch(rf"\$?{columns[BF16.format(setting)]}\d+", cells["base_slo_tok_s"])
        assert cells["base_all_tok_s"] == layout.level_range(BF16.format(setting), "tok_s")
    assert layout.standing(BF16.format(64)) == "the baseline" and layout.standing(AWQ.format(128)) == "no baseline"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    out = tmp_path / "run"
    out.mkdir()
    write_table(out / "points.csv", twice(), SweepPoint)
    names = list(dict.fromkeys(point.precision for point in rows()))
    run = {"model": "demo", "precisions": names, "concurrencies": [1, 8, 16, 32], "repeats": 2,
           "vary": {"max_num_seqs": ["16", "64", "128"]}, "max_num_seqs": 256}  # fmt: skip
    (out / "run.toml").write_text(to_toml({"run": run, "scenario": {"name": "chat", "slo_p95_s": 3.0}}))
    return out


def test_every_paper_is_written_and_readable(directory: Path, tmp_path: Path) -> None:
    written = write_papers(load_run(directory), tmp_path / "report", Assumptions())
    page = (tmp_path / "report" / "capacity.md").read_text()
    assert "## AWQ against BF16 with the same engine arguments" in page
    assert "a multiple of BF16's with the same engine arguments under the same load" in page
    assert r"| AWQ\[seqs=64\] | kernel not named by the engine, engine arguments --max-num-seqs 64 |" in page
    prose = page.replace("figures/", "")
    assert "max_num_seqs=" not in prose.replace(r"\_", "_"), "the long name is for files and tables of figures"
    assert {path.suffix for path in written} >= {".md", ".html", ".xlsx", ".png", ".svg", ".csv"}
    html = (tmp_path / "report" / "capacity.html").read_text()
    assert '"base": 0' in html and '"base": 1' in html and '"baseline": "BF16 with the same engine arguments"' in html
    drawn = (tmp_path / "report" / "figures" / "latency.svg").read_text()
    assert len(drawn) > 1000


def printed(run: Run, width: int) -> list[str]:
    out = io.StringIO()
    show_run(Console(file=out, width=width), run)
    return out.getvalue().splitlines()


def test_a_terminal_of_80_columns(directory: Path) -> None:
    found = printed(load_run(directory), 80)
    head = next(line for line in found if line.startswith("precision"))
    assert head.split()[:3] == ["precision", "seqs", "users"]
    table = found[found.index(head) + 1 :]
    assert table[0].split()[:4] == ["bf16", "16", "1", "35"]
    assert max(map(len, found)) <= 80 and "seqs: max_num_seqs" in found
    said = throughput_lines(compare(twice(), []))
    assert [line.split(":")[0] for line in said] == [f"AWQ[seqs={n}] / BF16[seqs={n}] tok/s" for n in (16, 64)]


def test_the_command_that_would_measure_a_prediction_says_what_varies(directory: Path) -> None:
    command = measure_command(load_run(directory))
    assert "--precisions bf16,awq " in command and "--vary max_num_seqs=16,64,128" in command


def test_history_counts_the_cells_of_every_setting(directory: Path) -> None:
    past = read_run(directory)
    assert past.cells_planned == 5 * 4 * 2 and past.fault is None
    assert past.safe_load[AWQ.format(16)] == 32 and set(past.precisions) == {p.precision for p in rows()}


def old_rows() -> Sequence[SweepPoint]:
    return [row("bf16", 1, 35, 900), row("awq", 1, 70, 480)]


def test_tables_of_before_have_no_such_column(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    write_table(path, old_rows(), SweepPoint)
    lines = [line.split(",") for line in path.read_text().splitlines()]
    at = lines[0].index("engine_args")
    path.write_text("\n".join(",".join(cells[:at] + cells[at + 1 :]) for cells in lines) + "\n")
    assert [point.engine_args for point in read_table(path, SweepPoint)] == [None, None]
