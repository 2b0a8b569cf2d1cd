"""The closed loop: how many are in flight, what is measured, and that it ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from harness.load.arrivals import LoadResult, closed_loop
from harness.records import Phase, RequestRecord


class FakeServer:
    """Answers after `delay_s`, the first measured request of user 0 after `slow_s`; counts who is in flight."""

    def __init__(self, delay_s: float = 0.01, slow_s: float = 0.0, error: str | None = None) -> None:
        self.delay_s, self.slow_s, self.error = delay_s, slow_s, error
        self.in_flight = 0
        self.peak = 0
        self.sent: list[tuple[int, Phase]] = []

    async def send(self, user: int, sequence: int, phase: Phase) -> RequestRecord:
        slow = bool(self.slow_s) and user == 0 and phase == "measured" and (0, "measured") not in self.sent
        self.sent.append((user, phase))
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        record = RequestRecord("test", user, sequence, phase, time.time_ns())
        try:
            await asyncio.sleep(self.slow_s if slow else self.delay_s)
        finally:
            self.in_flight -= 1
        return replace(record, end_ns=time.time_ns(), error=self.error)


def run(server: FakeServer, conc: int, requests: int, min_window_s: float = 0.0, warmup_rounds: int = 1) -> LoadResult:
    return asyncio.run(
        closed_loop(
            conc, server.send, requests=requests, min_window_s=min_window_s, warmup_rounds=warmup_rounds, seed=1
        )
    )


def test_every_user_warms_up_and_the_window_opens_after_the_last() -> None:
    server = FakeServer()
    result = run(server, conc=6, requests=30)
    assert server.peak == 6
    assert result.open_ns is not None and result.close_ns is not None
    warm = [record for record in result.records if record.phase == "warmup"]
    assert {record.user for record in warm} == set(range(6))
    measured = [record for record in result.records if record.phase == "measured"]
    assert len(measured) >= 30
    assert all(result.open_ns <= record.intended_ns <= result.close_ns for record in measured)


def test_load_is_held_until_the_slowest_measured_request_has_ended() -> None:
    """User 0's first measured request takes 0.4 s; the others go on asking, and the slow one is in the result."""
    server = FakeServer(delay_s=0.01, slow_s=0.4)
    result = run(server, conc=4, requests=20)
    slow = next(record for record in result.records if (record.user, record.phase) == (0, "measured"))
    assert slow.end_ns is not None
    assert slow.end_ns - slow.intended_ns > 0.35e9, "the slow request must not be cut off"
    assert result.close_ns is not None and result.close_ns < slow.end_ns, "the window closes before the drain"
    held = [record for record in result.records if record.phase == "held" and (record.end_ns or 0) < slow.end_ns]
    assert len(held) > 20


def test_the_window_lasts_its_least_time() -> None:
    result = run(FakeServer(), conc=2, requests=1, min_window_s=0.3)
    assert result.open_ns is not None and result.close_ns is not None
    assert result.close_ns - result.open_ns >= 0.3e9


def test_a_server_that_fails_everything_ends_the_cell() -> None:
    result = run(FakeServer(delay_s=0.001, error="http_500"), conc=3, requests=100_000)
    assert result.gave_up is not None and "http_500" in result.gave_up
    assert len(result.records) < 40
