"""What a sweep looks like while it runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import re
import time

from rich.console import Console
from rich.status import Status

from harness.analysis import metrics
from harness.records import Cell, RequestRecord, SweepPoint

REFRESH_S = 0.5
"""The live line is redrawn this often at most: drawing it competes with the load for the same core."""


class Progress:
    """An Observer that talks to the terminal. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Status("", console=console, refresh_per_second=4) if console.is_terminal else None
        self._cell: Cell | None = None
        self._position = ""
        self._began = self._drawn = 0.0
        self._latencies_ms: list[float] = []
        self._tokens = 0
        self._cell_seconds: list[float] = []
        self._left = 0
        self._last_stage = ""

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def status(self, text: str) -> None:
        if self._live is not None:
            self._live.update(text)
            return
        stage = re.sub(r" \((?:\d+ s|\d+ of \d+)\)$", "", text)  # a log wants each stage once, not each step of it
        if stage != self._last_stage:
            self._console.print(text, markup=False, highlight=False)
        self._last_stage = stage

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False)

    def cell_begins(self, cell: Cell, number: int, total: int) -> None:
        self._cell, self._position, self._left = cell, f"{number}/{total}", total - number
        self._began, self._drawn, self._latencies_ms, self._tokens = time.monotonic(), 0.0, [], 0

    def request_ended(self, record: RequestRecord) -> None:
        self._tokens += metrics.output_tokens(record)
        latency_ms = metrics.e2e_ms(record)
        if record.phase == "measured" and record.error is None and latency_ms is not None:
            self._latencies_ms.append(latency_ms)
        now = time.monotonic()
        if self._live is not None and self._cell is not None and now - self._drawn > REFRESH_S:
            self._drawn = now
            self._live.update(self._line(now))

    def cell_ended(self, point: SweepPoint) -> None:
        self._cell_seconds.append(time.monotonic() - self._began)
        reasons = f" ({', '.join(point.verdict_reasons)})" if point.verdict_reasons else ""
        tok_s, p95_ms = _figure(point.tok_s), _figure(point.p95_ms)
        self._console.print(
            f"{self._position:>5}  {point.precision:<8} {_load(point):<12} {tok_s:>7} tok/s  p95 {p95_ms:>7} ms  "
            f"{point.verdict}{reasons}",
            markup=False,
            highlight=False,
        )

    def _line(self, now: float) -> str:
        assert self._cell is not None
        p95 = metrics.percentile(self._latencies_ms, 95, metrics.MIN_P95)
        return (
            f"cell {self._position}: {self._cell.precision} at {_load(self._cell)}, "
            f"{len(self._latencies_ms)} requests, "
            f"{_figure(self._tokens / max(now - self._began, 1e-9))} tok/s, p95 {_figure(p95)} ms{self._eta(now)}"
        )

    def _eta(self, now: float) -> str:
        """Cells done so far, averaged, say how long the rest will take; engine starts come on top."""
        if not self._cell_seconds:
            return ""
        mean = sum(self._cell_seconds) / len(self._cell_seconds)
        left = max(0.0, mean - (now - self._began)) + mean * self._left
        return f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"


def _load(of: Cell | SweepPoint) -> str:
    """'8 users', or '2.5 req/s' of an open loop."""
    if of.rate_rps is not None:
        return f"{of.rate_rps:g} req/s"
    return f"{of.conc} user{'s' if of.conc != 1 else ''}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
