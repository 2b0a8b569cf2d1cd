"""The search for max safe concurrency: its steps by hand, its end on any curve, its budget, and a whole one.

The oracle of the whole one is a server that runs four requests at a time and lets the others wait in turn: with N users
an answer takes N/4 turns, so the load at which p95 meets an SLO can be computed.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import budget
from harness.budget import Budget
from harness.errors import InputError
from harness.records import Scenario, SweepPoint, read_table
from harness.search import Bracket, Ended, Search, bracket, next_load
from harness.slo import Slo

SLO = Slo(p95_s=3.0)
LOOK = Search(SLO)


def row(conc: int, p95_s: float | None, half_s: float = 0.01, **more: object) -> SweepPoint:
    values: dict[str, object] = {"verdict": "valid", **more}
    if p95_s is not None:
        values |= {"p95_ms": p95_s * 1e3, "p95_ms_lo": (p95_s - half_s) * 1e3, "p95_ms_hi": (p95_s + half_s) * 1e3}
    return SweepPoint("run", "awq", conc, **values)  # type: ignore[arg-type]


def found(curve: Callable[[int], SweepPoint], search: Search = LOOK) -> tuple[list[SweepPoint], Ended]:
    """The rows of a whole search over `curve`, and why it ended."""
    rows: list[SweepPoint] = []
    while True:
        step = next_load(rows, search)
        if isinstance(step, str):
            return rows, step
        before = [point for point in rows if point.conc == step]
        assert 1 <= step <= search.most and len(before) < 2 and all(point.verdict == "invalid" for point in before)
        assert len(rows) < 60, "a search comes to an end"
        rows.append(replace(curve(step), attempt=len(before) + 1))


def test_it_doubles_then_bisects_in_the_middle_of_the_logs() -> None:
    """p95 is N / 8 seconds, so the SLO of 3 s is met up to 24 users.

    1 2 4 8 16 are inside, 32 (4 s) is not. √(16 · 32) = 22.6 → 23 (2.9 s, inside); √(23 · 32) = 27.1 → 27 (3.4 s, out):
    (27 − 23) / (27 + 23) = 0.08 is within 0.1.
    """
    rows, why = found(lambda conc: row(conc, conc / 8))
    assert [point.conc for point in rows] == [1, 2, 4, 8, 16, 32, 23, 27] and why == "precise"
    known = bracket(rows, SLO)
    assert known == Bracket(23, 27) and known.width == pytest.approx(0.08)


def test_a_finer_precision_ends_at_neighbours() -> None:
    """Between 24 (3.00 s, in doubt by 0.01) and its neighbours 23 and 25 there is nothing left to measure."""
    rows, why = found(lambda conc: row(conc, conc / 8, 0.0), replace(LOOK, precision=0.001))
    assert why == "precise" and bracket(rows, SLO) == Bracket(24, 25)


def test_a_load_in_doubt_is_not_measured_again_but_closed_in() -> None:
    """±0.5 s put 20..28 users in doubt; what is left of the interval is noise, and the search says so."""
    rows, why = found(lambda conc: row(conc, conc / 8, 0.5))
    known = bracket(rows, SLO)
    assert why == "noise" and known is not None and known.high is not None
    assert known.low <= 20 and 28 <= known.high and known.doubt
    assert (min(known.doubt) - known.low) / (min(known.doubt) + known.low) <= 0.1 / 4 + 0.03


@pytest.mark.parametrize(
    ("curve", "why", "low", "high"),
    [
        (lambda conc: row(conc, 0.5), "largest", 256, None),
        (lambda conc: row(conc, 9.0), "smallest", 0, 1),
        (lambda conc: row(conc, 3.0, 0.5) if conc == 1 else row(conc, 9.0), "smallest", 0, 2),
        (lambda conc: row(conc, None, verdict="invalid"), "unusable", None, None),
        (lambda conc: row(conc, 0.5) if conc < 40 else row(conc, 0.5, verdict="invalid"), "client", 32, None),
    ],
)
def test_ends_without_a_bracket(
    curve: Callable[[int], SweepPoint], why: str, low: int | None, high: int | None
) -> None:
    rows, ended = found(curve)
    known = bracket(rows, SLO)
    assert ended == why
    assert (known and known.low, known and known.high) == (low, high)


def test_beyond_the_client_it_goes_back_halfway() -> None:
    """64 is invalid, twice, 32 usable: 45 lies between and is tried before the search gives up."""
    rows, _ = found(lambda conc: row(conc, 0.5) if conc < 40 else row(conc, 0.5, verdict="invalid"))
    assert [point.conc for point in rows][:10] == [1, 2, 4, 8, 16, 32, 64, 64, 45, 45]


def test_a_row_that_was_spoiled_once_is_measured_again_and_forgotten() -> None:
    """8 users are invalid the first time: the search goes on as if that had never been."""
    spoiled = iter([True])
    rows, why = found(
        lambda conc: row(conc, 9.0, verdict="invalid") if conc == 8 and next(spoiled, False) else row(conc, conc / 8)
    )
    assert [point.conc for point in rows] == [1, 2, 4, 8, 8, 16, 32, 23, 27] and why == "precise"


def test_it_begins_where_it_is_told_to_and_goes_below_if_it_must() -> None:
    """16 users are outside already: 8, 4, 2 follow, and 32 of the list is not measured for nothing."""
    rows, why = found(lambda conc: row(conc, conc * 1.0), replace(LOOK, first=(16, 32)))
    assert [point.conc for point in rows] == [16, 8, 4, 2, 3] and why == "noise"
    assert bracket(rows, SLO) == Bracket(2, 4, (3,))


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.3, 400),
    st.floats(0.2, 3.0),
    st.floats(0, 0.4),
    st.integers(0, 10_000),
    st.sampled_from([0.02, 0.1, 0.3]),
)
def test_it_ends_on_any_curve_and_keeps_what_it_promises(
    knee: float, slope: float, noise: float, seed: int, precision: float
) -> None:
    """p95 = 3 s · (N / knee)^slope, each row off by a factor within its own interval: the bracket holds the knee."""
    draw = random.Random(seed)

    def curve(conc: int) -> SweepPoint:
        true = 3.0 * (conc / knee) ** slope
        seen = true * math.exp(draw.uniform(-noise, noise))
        ends = {"p95_ms_lo": seen * math.exp(-noise) * 1e3, "p95_ms_hi": seen * math.exp(noise) * 1e3}
        return replace(row(conc, seen), **ends)

    search = replace(LOOK, precision=precision, most=512)
    rows, why = found(curve, search)
    known = bracket(rows, SLO)
    assert known is not None
    assert known.low <= knee * (1 + 1e-9) and (known.high is None or known.high >= knee * (1 - 1e-9))
    if why == "precise" and known.high is not None:
        assert known.high - known.low <= 1 or (known.width or 0) <= precision
    if why == "largest":
        assert known.high is None and max(point.conc for point in rows) == 512


def test_a_search_goes_on_from_its_rows_alone() -> None:
    """Whatever is cut off, the same rows follow: that is what --resume does."""
    rows, _ = found(lambda conc: row(conc, conc / 8))
    for kept in range(len(rows)):
        assert next_load(rows[:kept], LOOK) == rows[kept].conc


def test_shares_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 cells and 60 min, 5 cells and 10 min are gone and two precisions left: (24 − 5) / 2 → 10 cells, 25 min."""
    monkeypatch.setattr(budget.time, "monotonic", lambda: 1600.0)
    share = Budget.share(replace(LOOK, max_cells=24, max_minutes=60.0), 5, 1000.0, 2)
    assert (share.last_cell, share.deadline_s) == (15, 1600.0 + 1500.0)


@pytest.mark.parametrize(
    ("rows_done", "now_s", "conc", "said"),
    [
        (3, 0.0, 8, "is kept up to 4 users, no load tested is surely outside: next 8 (3 of 24 cells"),
        (24, 0.0, None, "its share of the cells is used up"),
        (3, 3590.0, None, "8 users would take longer than its share of the minutes"),
    ],
)
def test_what_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch, rows_done: int, now_s: float, conc: int | None, said: str
) -> None:
    """At 2 requests a second 8 users take 2 + 120/2 + 2 · 8/2 = 70 s, which 3,590 of 3,600 s no longer hold."""
    monkeypatch.setattr(budget.time, "monotonic", lambda: now_s)
    own = [row(1, 0.5, req_s=2.0), row(2, 0.5, req_s=2.0), row(4, 0.6, req_s=2.0)]
    assert budget.seconds(8, own, Scenario("s")) == pytest.approx(70.0)
    share = Budget(LOOK, 0.0, 3600.0, 24)
    found_conc, words = share.next_load(own, rows_done, Scenario("s"))
    assert found_conc == conc and said in words


def test_a_window_ends_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.time, "monotonic", lambda: 3597.0)
    scenario = Budget(LOOK, 0.0, 3600.0, 24).window(Scenario("s", min_window_s=5.0, max_window_s=600.0))
    assert (scenario.min_window_s, scenario.max_window_s) == (3.0, 3.0)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", "sweep", *arguments], capture_output=True, text=True, timeout=120
    )


def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    table = {
        "input_tokens": 12,
        "output_tokens": 6,
        "length_distribution": "fixed",
        "requests": 60,
        "min_window_s": 0.1,
    }
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return str(path)


def test_a_whole_search(truth: Callable[..., str], tmp_path: Path) -> None:
    """Four at a time, 20 + 5 · 4 = 40 ms each: N users wait N/4 turns, so 200 ms are met up to 20 of them."""
    assumed = tmp_path / "ours.toml"
    assumed.write_text("users = 123\n")
    url = truth("--ttft-ms", "20", "--gap-ms", "4", "--max-running", "4")
    for attempt in range(3):  # a busy machine may spoil a row, and its search then ends elsewhere
        out = tmp_path / f"run-{attempt}"
        done = bench(
            "--endpoint", url, "--model", "truth", "--until", "p95=200ms", "--precision", "20%", "--max-cells", "14",
            "--scenario", small(tmp_path), "--out", str(out), "--assume", str(assumed),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = read_table(out / "points.csv", SweepPoint)
        assert len(rows) <= 14
        if all(point.verdict != "invalid" for point in rows):
            break
    assert list(dict.fromkeys(point.conc for point in rows))[:3] == [1, 2, 4]
    known = bracket(rows, Slo(p95_s=0.2))
    assert known is not None and 4 <= known.low <= 20, "the server cannot be faster than it is"
    assert "next" in done.stdout and "of 14 cells" in done.stdout
    told = tomllib.loads((out / "run.toml").read_text())
    assert told["run"]["until"] == "p95=0.2s" and told["scenario"]["slo_p95_s"] == 0.2
    page = (out / "report" / "capacity.md").read_text()
    assert "p95 ≤ 0.2 s" in page and "123 users at the peak" in page


def test_the_budget_of_cells_is_kept(truth: Callable[..., str], tmp_path: Path) -> None:
    done = bench(
        "--endpoint", truth("--ttft-ms", "5", "--gap-ms", "1"), "--model", "truth", "--until", "ttft=1s",
        "--max-cells", "3", "--scenario", small(tmp_path), "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    if all(point.verdict != "invalid" for point in rows):  # a busy machine may spoil a row, which is measured again
        assert [point.conc for point in rows] == [1, 2, 4]
        assert "its share of the cells is used up (3 of 3 cells" in " ".join(done.stdout.split())
    assert 1 <= len(rows) <= 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--until", "soon"), "--until"),
        (("--until", "p95=3s", "--slo-p95", "3s"), "--until together with --slo"),
        (("--until", "p95=3s", "--repeats", "2"), "--repeats 2"),
        (("--until", "p95=3s", "--arrivals", "poisson", "--rate", "1"), "arrivals = poisson"),
        (("--until", "p95=3s", "--precision", "0"), "--precision"),
        (("--until", "p95=3s", "--conc", "64", "--max-conc", "32"), "--max-conc"),
        (("--max-cells", "3"), "--max-cells without --until"),
        (("--slo", "p95=3s", "--slo-p95", "3s"), "--slo together"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: Sequence[str], said: str) -> None:
    done = bench(*arguments, "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_search_of_a_slo_without_a_figure_is_refused() -> None:
    with pytest.raises(InputError, match="goodput of what"):
        from harness.slo import parse_slo

        parse_slo("goodput=90%")
