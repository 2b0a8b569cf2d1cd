"""What a sweep looks like while it runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status
from rich.text import Text

from harness.analysis import metrics
from harness.records import Cell, RequestRecord, SweepPoint
from harness.width import shortened

if TYPE_CHECKING:
    from harness.job import SweepRequest

REFRESH_S = 0.5
"""The live line is redrawn this often at most: drawing it competes with the load for the same core."""
_SPINNER = 3
"""Columns in front of the live line, and the last one, in which some terminals wrap."""
_LONGEST_NAME = 28


# --- how long it will take --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """What is known of a sweep before it begins, as far as its time goes."""

    loads: tuple[float, ...] = ()
    """Of each server session, in the order in which they run; (): not known, or found by a search."""
    requests: int | None = None
    """Measured in each cell at least, with few users."""
    minutes: float | None = None
    """What a search may take."""
    longest_name: int = 8
    """Of the precisions, in letters."""


def course_of(request: SweepRequest) -> Course:
    """That of a sweep that was asked for."""
    loads = () if request.search else sorted({*request.rates} or {*request.concurrencies})
    return Course(
        tuple(map(float, loads)),
        None if request.scenario.precision else request.scenario.requests,
        request.search.max_minutes if request.search else None,
        _LONGEST_NAME if request.vary else max(len(name.partition("=")[0]) for name in request.precisions),
    )


def seconds_left(
    ahead: Sequence[float],
    taken: Mapping[float, Sequence[float]],
    starts_left: int = 0,
    starts: Sequence[float] = (),
    age: float = 0.0,
    at_once: float = 1.0,
) -> float | None:
    """How long the rest of a sweep will take: (Σ cells ahead + starts left · mean start) / how many run at once.

    ahead: loads of the cells to come, the one under way first, which has run for `age` already; taken: load -> seconds
    of the cells that have ended. A cell will take as long as cells of its load have on average, else as cells of any
    load have: with the same number of requests few users take longer than many. starts: seconds of the engine's starts
    so far. None before the first cell has ended.
    """
    every = [seconds for cells in taken.values() for seconds in cells]
    if not every:
        return None
    likely = [fmean(taken.get(load) or every) for load in ahead]
    if likely:
        likely[0] = max(0.0, likely[0] - age)
    return (sum(likely) + starts_left * (fmean(starts) if starts else 0.0)) / at_once


def duration(seconds: float) -> str:
    """'40 s', '12 min', '2 h 05 min': no more than an estimate has."""
    if seconds < 90:
        return f"{10 * math.ceil(seconds / 10)} s" if seconds > 10 else f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


# --- the terminal -----------------------------------------------------------------------------------------------------


class Progress:
    """An Observer that talks to the terminal. Use as a context manager."""

    def __init__(self, console: Console, course: Course | None = None) -> None:
        self._console, self._course = console, course or Course()
        live = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._live = Status("preparing", console=console, refresh_per_second=4) if live else None
        self._cell: Cell | None = None
        self._number = self._total = self._tokens = 0
        self._opened = time.monotonic()
        self._began = self._drawn = 0.0
        self._answering: float | None = None
        """When the first request of the cell was sent."""
        self._latencies_ms: list[float] = []
        self._taken: dict[float, list[float]] = {}
        self._starts: list[float] = []
        self._starting: float | None = None
        self._last_stage = ""

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def status(self, text: str) -> None:
        if text.startswith("vLLM:") and self._starting is None:
            self._starting = time.monotonic()
        if self._live is not None:
            left = self._left(time.monotonic(), self._number + 1) if self._taken else ""
            self._live.update(self._fitting({"text": text, "left": left}, ("left",)))
            return
        stage = re.sub(r" \((?:\d+ s|\d+ of \d+)\)$", "", text)  # a log wants each stage once, not each step of it
        if stage != self._last_stage:
            self._say(text)
        self._last_stage = stage

    def note(self, text: str) -> None:
        """A line that stays."""
        self._say(text)

    def cell_begins(self, cell: Cell, number: int, total: int) -> None:
        now = time.monotonic()
        if self._starting is not None:
            self._starts.append(now - self._starting)
            self._starting = None
        self._cell, self._number, self._total = cell, number, total
        self._began, self._drawn, self._latencies_ms, self._tokens, self._answering = now, now, [], 0, None
        if self._live is not None:
            self._live.update(self._line(cell, now))

    def request_ended(self, record: RequestRecord) -> None:
        self._tokens += metrics.output_tokens(record)
        latency_ms = metrics.e2e_ms(record)
        now = time.monotonic()
        if self._answering is None:
            self._answering = now - (latency_ms or 0.0) / 1000
        if record.phase == "measured" and record.error is None and latency_ms is not None:
            self._latencies_ms.append(latency_ms)
        if self._live is not None and self._cell is not None and now - self._drawn > REFRESH_S:
            self._drawn = now
            self._live.update(self._line(self._cell, now))

    def cell_ended(self, point: SweepPoint) -> None:
        now = time.monotonic()
        # Its own time: on a cluster we hear of a cell only when it has ended.
        seconds = point.duration_s if point.duration_s is not None else now - self._began
        self._taken.setdefault(_load(point), []).append(seconds)
        reasons = f" ({', '.join(point.verdict_reasons)})" if point.verdict_reasons else ""
        left = self._left(now, self._number + 1) if self._live is None and self._number < self._total else ""
        most = min(max(8, self._course.longest_name), _LONGEST_NAME)
        self._say(
            f"{self._position():>5}  {shortened(point.precision, most):<{most}}  {_load_words(point):<10} "
            f"{_figure(point.tok_s):>7} tok/s  p95 {_figure(point.p95_ms):>7} ms  {point.verdict}{reasons}"
            f"{f'; {left}' if left else ''}"
        )

    def _say(self, text: str) -> None:
        # A file has no edge to fold at; and it keeps a line of a log a line.
        self._console.print(text, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def _line(self, cell: Cell, now: float) -> Text:
        """What fits the terminal, the less important left out: speed first, then the requests."""
        p95 = metrics.percentile(self._latencies_ms, 95, metrics.MIN_P95)
        done, least = len(self._latencies_ms), self._least(cell)
        speed = None if self._answering is None else self._tokens / max(now - self._answering, 1e-9)
        parts = {
            "cell": f"cell {self._position()}: {shortened(cell.precision, _LONGEST_NAME)} at {_load_words(cell)}",
            "requests": f"{done:,}{f'/{least:,}' if least else ''} requests" if done else "warming up",
            "speed": "" if speed is None else f"{_figure(speed)} tok/s",
            "p95": "" if p95 is None else f"p95 {_figure(p95)} ms",
            "left": self._left(now, self._number),
        }
        return self._fitting(parts, ("speed", "requests", "p95"))

    def _fitting(self, parts: dict[str, str], dropped_first: Sequence[str]) -> Text:
        """The parts in a line, as many as there is room for."""
        width = self._console.width - _SPINNER
        for name in dropped_first:
            if len(", ".join(filter(None, parts.values()))) > width:
                parts = {key: value for key, value in parts.items() if key != name}
        return Text(shortened(", ".join(filter(None, parts.values())), width))

    def _position(self) -> str:
        """3/8; of a search, which may end before: 3."""
        return str(self._number) if self._course.minutes is not None else f"{self._number}/{self._total}"

    def _left(self, now: float, number: int) -> str:
        """In words: with the cell of that number and those after it still to be done."""
        if self._course.minutes is not None:
            budget = max(0.0, self._course.minutes * 60 - (now - self._opened))
            return f"at most {duration(budget)} left"
        under_way = number == self._number
        seconds = seconds_left(
            self._ahead(number),
            self._taken or self._guessed(now),
            self._starts_left(number, started=under_way),
            self._starts,
            now - self._began if under_way else 0.0,
            max(1.0, sum(map(sum, self._taken.values())) / max(now - self._opened, 1e-9)),
        )
        return "" if seconds is None else f"~{duration(seconds)} left"

    def _least(self, cell: Cell) -> int | None:
        """Requests that the cell's window waits for (load/window.py); None: something else decides."""
        return None if self._course.requests is None else max(self._course.requests, 3 * cell.conc)

    def _guessed(self, now: float) -> dict[float, list[float]]:
        """What the first cell will have taken, by the share of its requests that has been measured."""
        least = self._least(self._cell) if self._cell else None
        done = len(self._latencies_ms)
        if self._cell is None or not least or not done:
            return {}
        return {_load(self._cell): [(now - self._began) * max(1.0, least / done)]}

    def _ahead(self, number: int) -> list[float]:
        """Loads of the cells from this one on: each session goes through all of them."""
        loads = self._course.loads or (math.nan,)
        return [loads[at % len(loads)] for at in range(number - 1, self._total)]

    def _starts_left(self, number: int, *, started: bool) -> int:
        """Engine starts before the end, when the cells from this one on are to be done."""
        if not self._course.loads:
            return 0
        place, loads = (number - 1) % len(self._course.loads), len(self._course.loads)
        sessions = math.ceil((place + self._total - number + 1) / loads)
        return sessions - 1 if started or place else sessions


def _load(of: Cell | SweepPoint) -> float:
    return float(of.conc) if of.rate_rps is None else of.rate_rps


def _load_words(of: Cell | SweepPoint) -> str:
    """'8 users', or '2.5 req/s' of an open loop."""
    if of.rate_rps is not None:
        return f"{of.rate_rps:g} req/s"
    return f"{of.conc} user{'s' if of.conc != 1 else ''}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
