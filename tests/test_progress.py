"""What a sweep says while it runs: how long it will take, and what fits in how many columns."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from harness import progress
from harness.job import SweepRequest
from harness.progress import Course, Progress, course_of, duration, seconds_left
from harness.records import Cell, RequestRecord, SweepPoint
from harness.scenario import load_scenario
from harness.search import Search
from harness.slo import Slo
from harness.width import shortened

# --- how long it will take --------------------------------------------------------------------------------------------


def test_seconds_left_by_hand() -> None:
    """Loads 1, 8, 16 in two sessions. The first session's cells took 60, 20 and 10 s, its start 40 s. In the second
    the cell of 8 users has run for 15 s: 20 − 15 = 5, then 10 as before, no start: 15 s."""
    taken = {1.0: [60.0], 8.0: [20.0], 16.0: [10.0]}
    assert seconds_left([8, 16], taken, 0, [40.0], age=15.0) == 15.0


def test_a_load_not_yet_seen_takes_the_mean_of_all() -> None:
    """Of four loads two are known, 60 and 20 s. The cell of 16 users, under way, and that of 32 take 40 s each, 80;
    then a session of four more: a start of 30 s, 60 + 20 + 40 + 40. 80 + 30 + 160 = 270 s."""
    taken = {1.0: [60.0], 8.0: [20.0]}
    assert seconds_left([16, 32, 1, 8, 16, 32], taken, 1, [30.0]) == 270.0


def test_repeats_of_a_load_are_averaged_and_so_are_starts() -> None:
    """(50 + 70) / 2 = 60 and two starts of (20 + 40) / 2: 60 + 60 = 120 s; two at once: 60 s."""
    assert seconds_left([1], {1.0: [50.0, 70.0]}, 2, [20.0, 40.0]) == 120.0
    assert seconds_left([1], {1.0: [50.0, 70.0]}, 2, [20.0, 40.0], at_once=2.0) == 60.0


def test_a_cell_that_takes_longer_than_those_before_is_nearly_done() -> None:
    assert seconds_left([1, 8], {1.0: [10.0], 8.0: [5.0]}, age=99.0) == 5.0


def test_before_the_first_cell_has_ended_nobody_knows() -> None:
    assert seconds_left([1, 8], {}, 2, [30.0]) is None
    assert seconds_left([], {1.0: [9.0]}) == 0.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (3.2, "4 s"), (10, "10 s"), (31, "40 s"), (89, "90 s"), (90, "2 min"), (600, "10 min"),
     (5341, "1 h 30 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_course_of_a_request() -> None:
    chat = load_scenario("chat")
    request = SweepRequest(chat, (16, 1, 8, 8), precisions=("bf16", "smoothquant=PATH"))
    assert course_of(request) == Course((1.0, 8.0, 16.0), 120, None, len("smoothquant"))
    open_loop = replace(request, concurrencies=(), rates=(2.0, 0.5), scenario=replace(chat, precision=0.1))
    assert (course_of(open_loop).loads, course_of(open_loop).requests) == ((0.5, 2.0), None)
    search = replace(request, search=Search(Slo(3.0), max_minutes=7.0))
    assert (course_of(search).loads, course_of(search).minutes) == ((), 7.0)


# --- the terminal -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand, in place of time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def request(number: int, latency_ms: float = 100.0) -> RequestRecord:
    begun = 10**18 + number * 10**9
    return RequestRecord(
        cell="bf16-c8-r1", user=0, sequence=number, phase="measured", intended_ns=begun, sent_ns=begun,
        first_token_ns=begun + 10**6, last_token_ns=begun + int(latency_ms * 1e6), completion_tokens=10,
    )  # fmt: skip


def point(conc: int, seconds: float | None = None, precision: str = "bf16") -> SweepPoint:
    return SweepPoint("r", precision, conc, tok_s=1234.5, p95_ms=98765.4, duration_s=seconds, verdict="valid")


def console(width: int, **more: object) -> Console:
    return Console(file=io.StringIO(), width=width, _environ={"COLUMNS": str(width)}, **more)  # type: ignore[arg-type]


def written(of: Console) -> str:
    return of.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def sweep(clock: Clock, watch: Progress, loads: tuple[int, ...], sessions: int, cells: int) -> None:
    """So many cells of a sweep; starts take 100 s, a cell of n users 80/n s."""
    total = len(loads) * sessions
    for number in range(1, cells + 1):
        conc = loads[(number - 1) % len(loads)]
        if (number - 1) % len(loads) == 0:
            watch.status("vLLM: loading weights (0 s)")
            clock.now += 100
        watch.cell_begins(Cell("bf16", conc), number, total)
        clock.now += 80 / conc
        watch.cell_ended(point(conc))


def test_a_log_has_a_line_a_cell_with_what_is_left(clock: Clock) -> None:
    """Loads 1 and 8 take 80 and 10 s, a start 100. After the first cell the second is taken to last as long, 80, then
    a start and both: 80 + 100 + 160 = 340 s, 6 min. After the second: 100 + 80 + 10 = 190 s. After the third: 10 s."""
    log = console(80)
    watch = Progress(log, Course((1.0, 8.0), 120))
    with watch:
        sweep(clock, watch, (1, 8), 2, 4)
    lines = written(log).splitlines()
    assert lines[0] == "vLLM: loading weights (0 s)"
    cells = [line for line in lines if "tok/s" in line]
    assert cells[0] == "  1/4  bf16      1 user       1,234 tok/s  p95  98,765 ms  valid; ~6 min left"
    assert [line.partition("; ")[2] for line in cells] == [
        "~6 min left",
        "~4 min left",
        "~10 s left",
        "",
    ]
    assert "\x1b" not in written(log) and "\r" not in written(log)


def test_cells_that_are_heard_of_when_they_have_ended(clock: Clock) -> None:
    """A cluster tells of a cell at its end: its own 100 s count. Two nodes, 200 s of cells within 110 s: 200 / 110 at
    once. Two more cells of 100 s then take 200 / (200 / 110) = 110 s."""
    log = console(80)
    watch = Progress(log, Course((1.0,), 120))
    clock.now += 110
    for number in (1, 2):
        watch.cell_begins(Cell("bf16", 1), number, 4)
        watch.cell_ended(point(1, seconds=100.0))
    assert written(log).splitlines()[-1].endswith("~2 min left")


def test_a_search_says_what_its_budget_leaves(clock: Clock) -> None:
    log = console(80)
    watch = Progress(log, Course((), 120, minutes=10.0))
    clock.now += 240
    watch.cell_begins(Cell("bf16", 4), 3, 24)
    watch.cell_ended(point(4))
    assert written(log).startswith("    3  bf16") and "at most 6 min left" in written(log)


Line = Callable[[int, int], str]


@pytest.fixture
def line(clock: Clock) -> Line:
    """`line(columns, requests)`: the live line, so many requests and 4 s after the cell of 8 users began."""

    def live(columns: int, requests: int) -> str:
        watch = Progress(console(columns), Course((1.0, 8.0), 50))
        watch.cell_begins(Cell("bf16", 1), 1, 4)
        clock.now += 20
        watch.cell_ended(point(1))
        watch.cell_begins(Cell("a-precision-with-a-very-long-name", 8), 2, 4)
        clock.now += 0.1
        for number in range(requests):
            watch.request_ended(request(number))
        clock.now += 3.9
        assert watch._cell is not None
        return watch._line(watch._cell, clock.now).plain

    return live


def test_a_wide_live_line_has_everything(line: Line) -> None:
    """25 of 50 requests; 25 · 10 tokens in 3.9 s and the first one's own 0.1 s: 62.5, which Python rounds to 62. The
    cell is taken to last 20 s, as the other, of which 4 are over; then a session of two: 16 + 20 + 20 = 56 s."""
    assert line(200, 25) == (
        "cell 2/4: a-precision-wi…ery-long-name at 8 users, 25/50 requests, 62 tok/s, p95 100 ms, ~60 s left"
    )
    assert line(200, 0).endswith("at 8 users, warming up, ~60 s left")


def test_a_narrow_one_has_what_matters_most(line: Line) -> None:
    for columns in (120, 100, 80, 60, 40, 20):
        said = line(columns, 25)
        assert len(said) <= columns - 3 and said.startswith("cell 2/4")
    assert line(80, 25) == "cell 2/4: a-precision-wi…ery-long-name at 8 users, p95 100 ms, ~60 s left"
    assert line(70, 25) == "cell 2/4: a-precision-wi…ery-long-name at 8 users, ~60 s left"


def test_an_estimate_in_the_first_cell_goes_by_its_requests(clock: Clock) -> None:
    """25 of 50 requests in 10 s: the cell will take 20 s, and so will the other: 10 + 20 s."""
    watch = Progress(console(200), Course((1.0, 8.0), 50))
    watch.cell_begins(Cell("bf16", 1), 1, 2)
    for number in range(25):
        watch.request_ended(request(number))
    clock.now += 10
    assert watch._cell is not None
    assert watch._line(watch._cell, clock.now).plain.endswith("~30 s left")


def test_a_terminal_is_drawn_on_and_cleaned_up(clock: Clock) -> None:
    terminal = console(80, force_terminal=True)
    with Progress(terminal, Course((1.0, 8.0), 120)) as watch:
        sweep(clock, watch, (1, 8), 1, 2)
    assert "\x1b[2K" in written(terminal), "the live line is wiped"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(terminal))
    assert "  2/2  bf16      8 users      1,234 tok/s  p95  98,765 ms  valid\n" in plain.replace("\r", "")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_lines(clock: Clock, environment: dict[str, str]) -> None:
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, _environ=environment)
    with Progress(terminal, Course((1.0,), 120)) as watch:
        sweep(clock, watch, (1,), 2, 1)
    assert "\x1b" not in written(terminal) and "~3 min left" in written(terminal)


def test_no_color_has_none(clock: Clock) -> None:
    terminal = console(80, force_terminal=True, no_color=True)
    with Progress(terminal, Course((1.0,), 120)) as watch:
        sweep(clock, watch, (1,), 1, 1)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", written(terminal)), "no colour is set"


def test_quiet_says_nothing(clock: Clock) -> None:
    silent = console(80, force_terminal=True)
    silent.quiet = True
    with Progress(silent, Course((1.0,), 120)) as watch:
        sweep(clock, watch, (1,), 1, 1)
        watch.note("a note")
    assert written(silent) == ""


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "cut"),
    [("abcdefgh", 8, "abcdefgh"), ("abcdefghi", 8, "abcd…ghi"), ("abcdefghi", 5, "ab…hi"), ("abcdef", 3, "a…f"),
     ("abcdef", 2, "ab"), ("abc", 0, ""), ("", 5, "")],
)  # fmt: skip
def test_names_are_cut_in_the_middle(text: str, most: int, cut: str) -> None:
    assert shortened(text, most) == cut
    assert len(cut) <= max(most, 0)
