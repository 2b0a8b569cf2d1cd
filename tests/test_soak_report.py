"""The soak's report: slopes whose truth is known, and a made-up soak that was written by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import lfilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import soak_report
from soak_report import Slope, chosen, own_errors_ms, page, read_soak, slope

from harness.load import selftest
from harness.records import RequestRecord, SweepPoint, write_table

MS = 1_000_000


# --- slopes -----------------------------------------------------------------------------------------------------------


def found(hours: Sequence[float], values: Sequence[float], loads: Sequence[str] | None = None) -> Slope:
    given = slope(hours, values, loads or ["a"] * len(hours))
    assert given is not None
    return given


def test_a_straight_line_is_its_own_slope() -> None:
    """100 + 3 MB an hour, without noise."""
    hours = [k / 10 for k in range(20)]
    given = found(hours, [100 + 3 * hour for hour in hours])
    assert (given.value, given.lo, given.hi) == pytest.approx((3, 3, 3)) and given.cells == 20


def test_each_load_has_a_level_of_its_own() -> None:
    """Loads at 10 and 50 in turn, both + 2 an hour. One level for both would see steps of 40 as noise."""
    hours = [k / 10 for k in range(20)]
    values = [(10 if k % 2 else 50) + 2 * hour for k, hour in enumerate(hours)]
    assert found(hours, values, ["a" if k % 2 else "b" for k in range(20)]).value == pytest.approx(2)
    assert found(hours, values, ["a" if k % 2 else "b" for k in range(20)]).hi == pytest.approx(2)
    assert found(hours, values).hi > 10


def test_by_hand() -> None:
    """Eight cells an hour apart, residuals +1 -1 -1 +1 twice: sum e = 0 and sum e t = 0 (0-1-2+3 + 4-5-6+7), so the
    slope stays 5.

    r = sum e(k) e(k-1) / sum e^2 = (-1+1-1+1-1+1-1) / 8 = -1/8; with p = 2: rho = (8 · -1/8 + 3) / 5 = 0.4.
    Of the rest the half width is checked against the formula with R written out below.
    """
    hours = [float(k) for k in range(8)]
    noise = np.array([1, -1, -1, 1] * 2, dtype=float)
    given = found(hours, list(7 + 5 * np.array(hours) + noise))
    assert (given.value, given.rho, given.cells) == (pytest.approx(5), pytest.approx(0.4), 8)
    x = np.array(hours) - 3.5
    alike = np.array([[0.4 ** abs(i - j) for j in range(8)] for i in range(8)])
    fit = np.ones((8, 8)) / 8 + np.outer(x, x) / 42
    variance = 8 / np.trace((np.eye(8) - fit) @ alike)
    error = np.sqrt(variance * (x @ alike @ x)) / 42
    # 8 (1 - 0.4) / (1 + 0.4) - 2 = 1.43, so 3 degrees of freedom: t = 3.1824 (any table).
    assert given.hi - given.value == pytest.approx(3.18245 * error, rel=1e-4)
    assert given.value - given.lo == pytest.approx(given.hi - given.value)


def test_too_few_cells_have_no_slope() -> None:
    assert slope([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], ["a"] * 3) is None
    assert slope([0.0] * 20, [1.0] * 20, ["a"] * 20) is None, "all at one time"


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("cells", [30, 90])
def test_the_interval_holds_the_truth_under_autocorrelation(cells: int, rho: float) -> None:
    """AR(1) noise around a known slope, three loads in turn. Of 200 intervals at least 0.95 - 3 · sqrt(0.95 · 0.05
    / 200) = 90 % hold it, unless they are wrong; and not all do, which would be an empty promise."""
    rng = np.random.default_rng(17)
    hours = np.arange(cells) * 80 / 3600
    loads = [str(k % 3) for k in range(cells)]
    noise = lfilter([1], [1, -rho], rng.standard_normal((200, cells + 200)), axis=1)[:, 200:]
    held = sum(given.lo <= 7 <= given.hi for row in noise for given in [found(hours, 7 * hours + row, loads)])
    assert 0.90 <= held / 200 < 1


def test_a_leak_is_seen_through_the_noise() -> None:
    """10 MB an hour under AR(1) noise of 0.5 MB: after two hours the interval leaves out zero, in every series."""
    rng = np.random.default_rng(4)
    hours = np.arange(90) * 80 / 3600
    for row in lfilter([1], [1, -0.5], rng.standard_normal((50, 290)), axis=1)[:, 200:]:
        given = found(hours, 100 + 10 * hours + 0.5 * row)
        assert 5 < given.lo < given.hi < 15


# --- a soak, by hand --------------------------------------------------------------------------------------------------


def soak(directory: Path, cells: int = 24) -> Path:
    """Cells of 100 s, loads 4 and 8 in turn. In each cell memory is 50 MB + 12 MB an hour, and 30 MB more in its
    middle; the client stamps the first token 2 ms late, and chunks 1 ms."""
    run = directory / "run"
    run.mkdir(parents=True)
    (directory / "began.txt").write_text("2026-11-22T08:00:00+00:00")
    lines = ["at_s,role,pid,rss_bytes,uss_bytes,descriptors,threads,cpu_s"]
    for at_s in range(0, cells * 100, 10):
        memory = round((50 + 12 * (at_s // 100 * 100 + 50) / 3600 + (30 if at_s % 100 in (40, 50) else 0)) * 1e6)
        # The sweep's command line names a folder "vllm", so the watch took it for an engine.
        lines += [f"{at_s:.1f},engine,10,{memory},{memory - 5_000_000},{12 + (at_s % 100 == 50)},3,1.00"]
        lines += [f"{at_s:.1f},generator,{pid},1000000,500000,7,3,1.00" for pid in (11, 12)] if at_s else []
    (directory / "processes.csv").write_text("\n".join([*lines, "2400.0,engine,10,99"]))
    points, requests, told = [], [], []
    for k in range(cells):
        begin = 1_795_334_400 * 1000 * MS + k * 100 * 1000 * MS
        points.append(
            SweepPoint(
                "run",
                "served",
                4 + 4 * (k % 2),
                tok_s=1000.0 + k % 2,
                verdict="valid" if k else "suspect",
                repeat=1 + k // 2,
                requests=64,
                duration_s=100.0,
                verdict_reasons=() if k else ("too_few_samples",),
                started_at=f"2026-11-22T08:{k * 100 // 60:02d}:{k * 100 % 60:02d}+00:00",
            )  # fmt: skip
        )
        for user in range(64):
            record = RequestRecord(
                f"served-c{4 + 4 * (k % 2)}-r{1 + k // 2}", user, 0, "measured", begin, first_token_ns=begin + 52 * MS,
                end_ns=begin + 91 * MS, chunk_us=(51_000, 71_000, 91_000), chunk_tokens=(1, 1, 1),
                error="timeout" if user == 1 else None,
            )  # fmt: skip
            requests.append(record)
            sent = [begin + at * MS for at in (50, 70, 90)]
            told.append({"id": record.request_id, "received_ns": begin, "sent_ns": sent, "due_ns": sent, "tokens": 3})
    write_table(run / "points.csv", points, SweepPoint)
    write_table(run / "requests.csv", requests, RequestRecord)
    probe = {"id": None, "received_ns": 1, "sent_ns": [2], "due_ns": [2], "tokens": 1}
    lines = [json.dumps(line, separators=(",", ":")) for line in (probe, *told)]
    (directory / "truth.jsonl").write_text("\n".join(lines) + '\n{"id":"served-c4-r1-a1/0/')
    return directory


def test_memory_is_the_least_of_each_cell_and_its_slope_that_of_the_script(tmp_path: Path) -> None:
    given = read_soak(soak(tmp_path / "truth"))
    assert set(role for role, _ in given.processes) == {"sweep", "generator"}, "the sweep is told by being there first"
    memory = given.processes["sweep", "rss_bytes"]
    assert memory.values == pytest.approx([50 + 12 * (k * 100 + 50) / 3600 for k in range(24)])
    assert memory.slope is not None and memory.slope.value == pytest.approx(12, rel=1e-6)
    assert memory.slope.cells == 18, "six cells of 100 s began in the first ten minutes"
    own = given.processes["sweep", "uss_bytes"]
    assert own.values[0] == pytest.approx(memory.values[0] - 5)
    generators = given.processes["generator", "rss_bytes"]
    assert generators.values[1:] == pytest.approx([2.0] * 23), "two processes are one role"
    assert given.processes["sweep", "descriptors"].values == (12.0,) * 24, "the median of a cell"
    assert memory.quarters == pytest.approx((50 + 12 * 800 / 3600, 50 + 12 * 2200 / 3600), abs=0.2)


def test_the_clocks_error_is_that_of_the_selftest(tmp_path: Path) -> None:
    """2 ms and 1 ms by the script, and what harness/load/selftest.py makes of the same records."""
    directory = soak(tmp_path / "truth")
    given = read_soak(directory)
    assert set(given.clock["ttft_p50"].values) == {2.0} and set(given.clock["chunk_p99"].values) == {1.0}
    assert len(given.clock["ttft_p99"].values) == 24
    record = RequestRecord(
        "c", 1, 2, "measured", 5_000_000, first_token_ns=60_300_000, chunk_us=(55_000, 74_999, 95_100)
    )
    sent = [55_100_000, 80_000_000, 100_000_000]
    told = {record.request_id: {"received_ns": 4_900_000, "sent_ns": sent}}
    chunks = [record.intended_ns + 1000 * offset for offset in record.chunk_us]
    ttft_ms, chunks_ms = own_errors_ms((record.intended_ns, 60_300_000, chunks), 4_900_000, sent)
    assert ([ttft_ms], chunks_ms) == selftest.own_errors_ms([record], told)
    assert ttft_ms == pytest.approx(5.1) and chunks_ms == pytest.approx([4.9, 0.0, 0.1])


def test_one_request_in_16_is_checked_whatever_its_place(tmp_path: Path) -> None:
    ids = [f"served-c4-r{k}-a1/{user}/0".encode() for k in range(100) for user in range(64)]
    assert 300 < sum(map(chosen, ids)) < 500
    given = read_soak(soak(tmp_path / "truth"))
    names = [
        f"served-c{4 + 4 * (k % 2)}-r{1 + k // 2}-a1/{user}/0" for k in range(24) for user in range(64) if user != 1
    ]
    assert given.requests_checked == sum(chosen(name.encode()) for name in names), "failed ones are not"


def test_a_soak_that_still_runs_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    directory = soak(tmp_path / "truth")
    (directory / "run" / "points.csv").unlink()
    (directory / "run" / "requests.csv").write_text("")
    given = read_soak(directory)
    assert given.cells == () and given.exit_code is None
    text = page([given])
    assert "0 cells" in text and "it still ran when this was written" in text and "nan" not in text


def test_the_same_files_make_the_same_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = soak(tmp_path / "truth")
    (directory / "end.json").write_text('{"sweep_exit_code": 130}')
    made = []
    for name in ("a", "b"):
        soak_report.main([str(directory), "--docs", str(tmp_path / name)])
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files})
    assert made[0] == made[1]
    pictures = {f"figures/soak-truth-{what}.png" for what in ("memory", "descriptors", "clock")}
    assert set(made[0]) == {"soak.md", *pictures}
    text = made[0]["soak.md"].decode()
    assert capsys.readouterr().out == 2 * (text + "\n")
    assert all(f"]({picture})" in text for picture in pictures)
    assert "24 cells (18 of them after the warm-up)" in text and "ended by SIGINT" in text
    assert "Verdicts: suspect 1, valid 23; reasons: too_few_samples 1." in text
    assert "| sweep: resident memory, MB | 52.67 | 57.33 | +12.00 | +12.00 to +12.00 | 18 |" in text
    assert "| TTFT error, p50, ms | 2.00 | 2.00 | +0.00 |" in text


def test_points_of_a_cell_that_was_measured_again_are_its_own(tmp_path: Path) -> None:
    directory = soak(tmp_path / "truth")
    before = read_soak(directory)
    point = replace(before.cells[3].point, attempt=2)
    write_table(directory / "run" / "points.csv", [point], SweepPoint)
    assert [cell.key for cell in read_soak(directory).cells] == ["served-c8-r2-a2"]
    assert read_soak(directory).clock["ttft_p50"].values == (), "the requests are of its first attempt"
