"""When the next request begins, and when measuring begins and ends.

The closed loop: `conc` users, each of whom asks again as soon as it is answered.

    users  |..warm-up..|-------- measured --------|---- held ----|
                       ^ window opens             ^ closes       ^ last measured request has ended: stop
                         every user has finished    enough requests
                         its warm-up rounds         have begun

Percentiles come from the requests begun inside the window, and the load is held until the last of them has ended:
dropping the unfinished would drop the slow. Tokens count where they arrive. Users start a little apart, and lengths
are jittered, so that requests do not march in step.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from harness.records import Phase, RequestRecord

RAMP_S_PER_USER = 0.02
"""Users begin this far apart on average: a thundering herd of prefills is not what users look like."""


class Send(Protocol):
    """Sends the `sequence`-th request of `user` and returns its record; never raises for what a server can do."""

    def __call__(self, user: int, sequence: int, phase: Phase) -> Awaitable[RequestRecord]: ...


@dataclass(slots=True)
class LoopLag:
    """How late the event loop wakes up: a client that is late itself cannot time others in user space."""

    period_s: float = 0.02
    lags_ms: list[float] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(self.period_s)
            self.lags_ms.append((time.perf_counter() - before - self.period_s) * 1e3)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Records of a cell in the order in which they ended, and the window, ns since the epoch (None: never opened)."""

    records: tuple[RequestRecord, ...]
    open_ns: int | None
    close_ns: int | None
    lags_ms: tuple[float, ...]
    gave_up: str | None = None
    """Why the cell was ended early, None when it was not."""


async def closed_loop(
    conc: int,
    send: Send,
    *,
    requests: int,
    min_window_s: float,
    warmup_rounds: int,
    seed: int,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> LoadResult:
    """Keep `conc` requests in flight until `requests` have begun in a window of `min_window_s` or more and ended.

    A server that fails every request ends the cell: after 10 + `conc` failures in a row nothing new is sent.
    """
    state = _State(conc, requests, min_window_s, warmup_rounds, on_record)
    rng = random.Random(f"ramp/{seed}/{conc}")
    starts = [rng.uniform(0, RAMP_S_PER_USER * conc) for _ in range(conc)]
    lag = LoopLag()
    async with asyncio.TaskGroup() as group:
        lag_task = group.create_task(lag.run())
        users = [group.create_task(_user(index, starts[index], send, state)) for index in range(conc)]
        await state.finished.wait()
        for task in [*users, lag_task]:
            task.cancel()
    return LoadResult(tuple(state.records), state.open_ns, state.close_ns, tuple(lag.lags_ms), state.gave_up)


class _State:
    """What the users of one closed loop share; single-threaded, so no locks."""

    def __init__(
        self,
        conc: int,
        requests: int,
        min_window_s: float,
        warmup_rounds: int,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        self.conc, self.requests, self.min_window_ns = conc, requests, int(min_window_s * 1e9)
        self.warmup_rounds, self.on_record = warmup_rounds, on_record
        self.records: list[RequestRecord] = []
        self.open_ns: int | None = None
        self.close_ns: int | None = None
        self.gave_up: str | None = None
        self.finished = asyncio.Event()
        self._warm = 0
        self._begun = 0
        self._outstanding = 0
        self._failures = 0

    def begin(self) -> Phase:
        """Phase of a request that begins now."""
        if self.open_ns is None:
            return "warmup"
        now = time.time_ns()
        if self.close_ns is None and self._begun >= self.requests and now - self.open_ns >= self.min_window_ns:
            self.close_ns = now
            self._stop_if_done()
        if self.close_ns is not None:
            return "held"
        self._begun += 1
        self._outstanding += 1
        return "measured"

    def end(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.on_record(record)
        if record.phase == "measured":
            self._outstanding -= 1
            self._stop_if_done()
        self._failures = self._failures + 1 if record.error else 0
        if self._failures >= 10 + self.conc:
            self.gave_up = f"{self._failures} requests in a row failed: {record.error} ({record.error_detail})"
            if self.open_ns is not None and self.close_ns is None:
                self.close_ns = time.time_ns()
            self.finished.set()

    def user_is_warm(self) -> None:
        self._warm += 1
        if self._warm == self.conc:
            self.open_ns = time.time_ns()

    def _stop_if_done(self) -> None:
        if self.close_ns is not None and self._outstanding == 0:
            self.finished.set()


async def _user(index: int, start_s: float, send: Send, state: _State) -> None:
    await asyncio.sleep(start_s)
    sequence = 0
    while True:
        phase = state.begin()
        record = await send(index, sequence, phase)
        state.end(record)
        sequence += 1
        if sequence == state.warmup_rounds:
            state.user_is_warm()
        if record.error:
            await asyncio.sleep(0.05)  # a server that refuses at once must not be hammered
