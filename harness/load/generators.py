"""The processes that make the load, held open over a sweep, and the one place where their records meet.

One generator drives some 500 streams on one core; more of them share the users (or arrivals) of a cell evenly. Those of
this machine stamp with the same CLOCK_REALTIME, so their records merge by being put together. Those of other nodes
(away.py) have clocks of their own: these are read before and after each cell, what goes there is told in their time,
and each record that comes is moved to ours before the window sees it (clocks.py).
"""

from __future__ import annotations

import functools
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from harness.engines import Target
from harness.errors import RunError
from harness.load import clocks
from harness.load.arrivals import MAX_IN_FLIGHT, Job
from harness.load.clocks import ClockOffset, Ping
from harness.load.dataset import Prompts
from harness.load.messages import (
    AskTime,
    Begin,
    Close,
    Done,
    Drained,
    Exhausted,
    Failed,
    Inbox,
    Overloaded,
    Ready,
    Stop,
    Time,
    packed,
)
from harness.load.schedule import Arrival
from harness.load.window import Window
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario
from harness.redact import redact

USERS_PER_GENERATOR = 512
_HEADSTART_S = 0.1
"""The common start is told this long before it comes."""
_TICK_S = 0.1
_GRACE_S = 5.0
_ANSWER_S = 30.0
"""A generator on another node that says nothing for so long, where it has nothing to do but to answer, is lost."""

_Message = TypeVar("_Message")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Records of a cell in the order in which they ended, and the window, ns since the epoch (None: never opened)."""

    records: tuple[RequestRecord, ...]
    open_ns: int | None
    close_ns: int | None
    lags_ms: tuple[float, ...]
    gave_up: str | None = None
    """Why the cell was ended early, None when it was not."""
    processes: int = 1
    cpu_s: float = 0.0
    clock_step_ms: float = 0.0
    """The largest step of CLOCK_REALTIME that a generator saw."""
    clocks: tuple[ClockOffset, ...] = ()
    """Of each generator on another node, its clock less ours over the cell; empty: all are on this machine."""


class Generator(Protocol):
    """Whoever makes load for us: a process on this machine, or a connection to one on another (away.Connection)."""

    own_clock: bool
    """It stamps with another clock than ours."""
    spoiled: bool
    """It was left in the middle of a cell."""

    def fileno(self) -> int: ...
    def send(self, message: Any) -> None: ...
    def receive(self) -> list[Any]: ...
    def end(self) -> None: ...


def processes_for(conc: int, cores: int) -> int:
    """How many generators a cell gets when nobody says: one for each 512 users, never more than there are cores."""
    return max(1, min(cores, math.ceil(conc / USERS_PER_GENERATOR)))


class Generators:
    """Worker processes, started when first needed. Use as a context manager: leaving it ends them.

    With `away`, the generators on other nodes that are given drive every cell, all of them, and none runs here.
    """

    def __init__(self, away: Sequence[Generator] = ()) -> None:
        self._away = tuple(away)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Generators:
        return self

    def __exit__(self, *_: object) -> None:
        for generator in (*self._workers, *self._away):
            generator.end()
        self._workers.clear()

    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run on this machine."""
        return tuple(worker.process.pid for worker in self._workers)

    def run(
        self,
        cell: Cell,
        scenario: Scenario,
        dialect: Dialect,
        target: Target,
        *,
        processes: int = 1,
        salt: str = "",
        prompts: Prompts | None = None,
        trace: Sequence[Arrival] = (),
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> LoadResult:
        """Put the cell's load on `target` until its window is over. Raises RunError when a generator is lost.

        `processes` is how many workers of this machine share it; with generators on other nodes, their number counts.
        """
        workers: Sequence[Generator] = self._away or self._here(processes)
        shares = len(workers)
        try:
            for share, worker in enumerate(workers):
                worker.send(Job(cell, scenario, dialect, target, 0, share, shares, salt, prompts, tuple(trace)))
            for worker in workers:  # a dataset takes its time over a network, and none begins before all have it
                _awaited(worker, Ready)
            before = [_read_clock(worker) for worker in workers]
            start_ns = time.time_ns() + int(_HEADSTART_S * 1e9) + max(clock.rtt_min_ns for clock in before)
            trace_s = len(trace) / cell.rate_rps if trace and cell.rate_rps else None
            window = Window(scenario, cell, start_ns=start_ns, trace_s=trace_s)
            for worker, clock in zip(workers, before, strict=True):
                worker.send(Begin(start_ns + clock.offset_ns))
            load = _Cell(workers, window, on_record, [clock.offset_ns for clock in before]).run()
            over = [clocks.over(clock, _read_clock(worker)) for worker, clock in zip(workers, before, strict=True)]
        except BaseException:
            for worker in workers:
                worker.spoiled = True
            raise
        return replace(load, clocks=tuple(over) if self._away else ())

    def _here(self, processes: int) -> list[_Worker]:
        while len(self._workers) < processes:
            self._workers.append(_Worker())
        return self._workers[:processes]


def _read_clock(worker: Generator) -> ClockOffset:
    """How far a generator's clock is from ours, when it has nothing else to do; those of this machine have ours."""
    if not worker.own_clock:
        return ClockOffset(0, 0, 0)
    pings = []
    for _ in range(clocks.PINGS):
        sent_ns = time.time_ns()
        worker.send(AskTime())
        told = _awaited(worker, Time)
        pings.append(Ping(sent_ns, told.received_ns, told.answered_ns, time.time_ns()))
    return clocks.offset(pings)


def _awaited(worker: Generator, kind: type[_Message]) -> _Message:
    """The generator's next message of this kind. Raises RunError for one that fails, or is lost."""
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        while selector.select(_ANSWER_S if worker.own_clock else None):
            for message in worker.receive():
                if isinstance(message, Failed):
                    raise _defect(message)
                if isinstance(message, kind):
                    return message
    raise RunError(
        f"a load generator on another node has said nothing for {_ANSWER_S:g} s; every finished row is on disk",
        remedy="see that its node is up and reaches this one, then go on with --resume",
    )


def _defect(failed: Failed) -> RunError:
    return RunError(f"a load generator failed, which is a defect of kneebench:\n{failed.what}")


class _Cell:
    """The messages of one cell, from its beginning to the last Done. `offsets_ns`: the workers' clocks less ours."""

    def __init__(
        self,
        workers: Sequence[Generator],
        window: Window,
        on_record: Callable[[RequestRecord], None],
        offsets_ns: Sequence[int],
    ) -> None:
        self._workers, self._window, self._on_record = workers, window, on_record
        self._offsets_ns = offsets_ns
        self._clean = functools.lru_cache(256)(redact)
        self._records: list[RequestRecord] = []
        self._done: list[Done] = []
        self._drained = self._exhausted = 0
        self._told_close = self._told_stop = False
        self._clock_offset_ns = clocks.realtime_offset_ns()

    def run(self) -> LoadResult:
        with selectors.DefaultSelector() as selector:
            for worker, offset_ns in zip(self._workers, self._offsets_ns, strict=True):
                selector.register(worker, selectors.EVENT_READ, (worker, offset_ns))
            while len(self._done) < len(self._workers):
                for key, _ in selector.select(_TICK_S):
                    worker, offset_ns = key.data
                    for message in worker.receive():
                        self._take(message, offset_ns)
                self._advance()
        return LoadResult(
            tuple(self._records),
            self._window.open_ns,
            self._window.close_ns,
            tuple(lag for done in self._done for lag in done.lags_ms),
            self._window.gave_up,
            len(self._workers),
            sum(done.cpu_s for done in self._done),
            max((done.clock_step_ms for done in self._done), key=abs),
        )

    def _take(self, message: Any, offset_ns: int) -> None:
        now_ns = time.time_ns()
        if isinstance(message, RequestRecord):
            if offset_ns:
                message = clocks.moved(message, offset_ns)
            if message.error_detail is not None:
                # A server's words, and its echo of ours: no key, address or path of them goes to the disk.
                message = replace(message, error_detail=self._clean(message.error_detail))
            record = self._window.take(message, now_ns)
            self._records.append(record)
            self._on_record(record)
        elif isinstance(message, Drained):
            self._drained += 1
        elif isinstance(message, Exhausted):
            self._exhausted += 1
            if self._exhausted == len(self._workers):
                self._window.exhausted(now_ns)
        elif isinstance(message, Overloaded):
            self._window.give_up(
                f"more than {MAX_IN_FLIGHT} requests in flight: they come faster than they are answered", now_ns
            )
        elif isinstance(message, Done):
            self._done.append(message)
        elif isinstance(message, Failed):
            raise _defect(message)

    def _advance(self) -> None:
        window = self._window
        window.tick(time.time_ns())
        if window.close_ns is not None and not self._told_close:
            self._told_close = True
            for worker, offset_ns in zip(self._workers, self._offsets_ns, strict=True):
                worker.send(Close(window.close_ns + offset_ns))
        # By a clock that was set back nothing would be over for as long as that. The point is invalid anyway.
        stepped = abs(clocks.realtime_offset_ns() - self._clock_offset_ns) > clocks.STEP_NS
        over = stepped or window.gave_up is not None or self._drained == len(self._workers)
        if over and not self._told_stop:
            self._told_stop = True
            for worker in self._workers:
                worker.send(Stop())


class _Worker:
    """One generator process of this machine."""

    own_clock = False

    def __init__(self) -> None:
        command = [sys.executable, "-m", "harness.load.worker"]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except OSError as error:
            raise RunError(
                f"a load generator cannot be started: {error.strerror}",
                remedy="see whether memory or processes have run out, then go on with --resume",
            ) from error
        assert self.process.stdout is not None and self.process.stdin is not None
        self._stdout = self.process.stdout
        self._stdin = self.process.stdin
        self.spoiled = False
        self._inbox = Inbox()

    def fileno(self) -> int:
        return self._stdout.fileno()

    def send(self, message: Any) -> None:
        try:
            data = memoryview(packed(message))
            while data:
                data = data[self._stdin.write(data) :]
        except OSError as error:
            raise self._died() from error

    def receive(self) -> list[Any]:
        data = os.read(self._stdout.fileno(), 1 << 20)
        if not data:
            raise self._died()
        return self._inbox.feed(data)

    def end(self) -> None:
        """End it: by closing its stdin, and by its process id if that is not heard."""
        self._stdin.close()
        if self.spoiled:
            self.process.kill()
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()

    def _died(self) -> RunError:
        try:
            code: int | str = self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = "none yet"
        return RunError(
            f"a load generator ended in the middle of a cell (exit code {code}); every finished row is on disk",
            remedy="run the sweep again with --resume; if memory ran out, fewer users",
        )
