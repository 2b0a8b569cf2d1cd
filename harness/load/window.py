"""When measuring begins and ends: decided by one, outside the processes that make the load.

    users  |..warm-up..|-------- measured --------|---- held ----|
                       ^ window opens             ^ closes       ^ last measured request has ended: stop
                         every user has finished    enough requests have ended, and p95 is
                         its warm-up rounds         known as well as was asked, or time is up

Percentiles come from the requests begun inside the window, and the load is held until the last of them has ended:
dropping the unfinished would drop the slow. Tokens count where they arrive.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from harness.analysis import metrics
from harness.records import Cell, Phase, RequestRecord, Scenario

LOOK_EVERY_S = 0.5
"""How often the interval of p95 is worked out for the stop rule."""
TRACE_WARMUP_SHARE = 0.1


class Window:
    """The measuring window of one cell. Times are CLOCK_REALTIME in ns."""

    def __init__(self, scenario: Scenario, cell: Cell, *, start_ns: int = 0, trace_s: float | None = None) -> None:
        """`start_ns`: when the load begins; `trace_s`: how long the trace takes that is replayed, if one is."""
        self.open_ns: int | None = None
        self.close_ns: int | None = None
        self.gave_up: str | None = None
        """Why the cell was ended early, None when it was not."""
        self._scenario, self._cell, self._trace = scenario, cell, trace_s is not None
        self._warmup_s = scenario.warmup_s if trace_s is None else min(scenario.warmup_s, TRACE_WARMUP_SHARE * trace_s)
        # Every user asks at least three times: fewer, and the window would be one wave of requests and its ebb.
        self._least = max(scenario.requests, 3 * cell.conc)
        self._rounds: Counter[int] = Counter()
        self._warm_users = 0
        self._failures_in_a_row = 0
        self._e2e: list[tuple[int, float]] = []
        self._start_ns = start_ns
        self._looked_ns = 0

    def take(self, record: RequestRecord, now_ns: int) -> RequestRecord:
        """A request has ended: returns it with its phase, and moves the window on."""
        record = replace(record, phase=self._phase(record))
        if record.error == "cut":
            return record
        self._failures_in_a_row = self._failures_in_a_row + 1 if record.error else 0
        if self._failures_in_a_row >= 10 + max(16, self._cell.conc):
            self.give_up(
                f"{self._failures_in_a_row} requests in a row failed: {record.error} ({record.error_detail})", now_ns
            )
        self._warm_up(record, now_ns)
        if record.phase == "measured" and (latency_ms := metrics.e2e_ms(record)) is not None and not record.error:
            self._e2e.append((record.intended_ns, latency_ms))
        return record

    def tick(self, now_ns: int) -> None:
        """Let time pass: open or close the window where only the clock decides."""
        if self._cell.rate_rps is not None and self.open_ns is None:
            if now_ns - self._start_ns >= self._warmup_s * 1e9:
                self.open_ns = now_ns
        if self.open_ns is not None and self.close_ns is None and self._is_enough(now_ns):
            self.close_ns = now_ns

    def exhausted(self, now_ns: int) -> None:
        """A trace has come to its end: nothing more will begin."""
        if self.close_ns is None:
            self.close_ns = now_ns

    def give_up(self, why: str, now_ns: int) -> None:
        """End the cell early."""
        self.gave_up = self.gave_up or why
        if self.open_ns is not None and self.close_ns is None:
            self.close_ns = now_ns

    def _phase(self, record: RequestRecord) -> Phase:
        if self.open_ns is None or record.intended_ns < self.open_ns:
            return "warmup"
        inside = self.close_ns is None or record.intended_ns < self.close_ns
        return "measured" if inside and record.error != "cut" else "held"

    def _warm_up(self, record: RequestRecord, now_ns: int) -> None:
        if self._cell.rate_rps is not None or self.open_ns is not None:
            return
        self._rounds[record.user] += 1
        if self._rounds[record.user] == self._scenario.warmup_rounds:
            self._warm_users += 1
            if self._warm_users == self._cell.conc:
                self.open_ns = now_ns

    def _is_enough(self, now_ns: int) -> bool:
        assert self.open_ns is not None
        elapsed_s = (now_ns - self.open_ns) / 1e9
        if elapsed_s >= self._scenario.max_window_s:
            return True
        if self._trace or len(self._e2e) < self._least or elapsed_s < self._scenario.min_window_s:
            return False
        if self._scenario.precision is None:
            return True
        if now_ns - self._looked_ns < LOOK_EVERY_S * 1e9:
            return False
        self._looked_ns = now_ns
        spread = metrics.spread([latency for _, latency in sorted(self._e2e)], 95)
        return spread is not None and spread <= self._scenario.precision
