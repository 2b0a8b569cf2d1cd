"""The processes that make the load, held open over a sweep, and the one place where their records meet.

One generator drives some 500 streams on one core; more of them share the users (or arrivals) of a cell evenly. All
stamp with the same machine's CLOCK_REALTIME, so their records merge by being put together.
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
from typing import Any

from harness.engines import Target
from harness.errors import RunError
from harness.load.arrivals import MAX_IN_FLIGHT, Job
from harness.load.dataset import Prompts
from harness.load.messages import Close, Done, Drained, Exhausted, Failed, Inbox, Overloaded, Stop, packed
from harness.load.schedule import Arrival
from harness.load.window import Window
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario
from harness.redact import redact

USERS_PER_GENERATOR = 512
_HEADSTART_S = 0.1
"""Jobs are handed out this long before their common start."""
_TICK_S = 0.1
_GRACE_S = 5.0


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


def processes_for(conc: int, cores: int) -> int:
    """How many generators a cell gets when nobody says: one for each 512 users, never more than there are cores."""
    return max(1, min(cores, math.ceil(conc / USERS_PER_GENERATOR)))


class Generators:
    """Worker processes, started when first needed. Use as a context manager: leaving it ends them."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def __enter__(self) -> Generators:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run."""
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
        """Put the cell's load on `target` until its window is over. Raises RunError when a generator dies."""
        while len(self._workers) < processes:
            self._workers.append(_Worker())
        workers = self._workers[:processes]
        start_ns = time.time_ns() + int(_HEADSTART_S * 1e9)
        trace_s = len(trace) / cell.rate_rps if trace and cell.rate_rps else None
        window = Window(scenario, cell, start_ns=start_ns, trace_s=trace_s)
        for share, worker in enumerate(workers):
            worker.send(Job(cell, scenario, dialect, target, start_ns, share, processes, salt, prompts, tuple(trace)))
        return _Cell(workers, window, on_record).run()


class _Cell:
    """The messages of one cell, from its jobs to the last Done."""

    def __init__(self, workers: Sequence[_Worker], window: Window, on_record: Callable[[RequestRecord], None]) -> None:
        self._workers, self._window, self._on_record = workers, window, on_record
        self._clean = functools.lru_cache(256)(redact)
        self._records: list[RequestRecord] = []
        self._done: list[Done] = []
        self._drained = self._exhausted = 0
        self._told_close = self._told_stop = False

    def run(self) -> LoadResult:
        try:
            with selectors.DefaultSelector() as selector:
                for worker in self._workers:
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
                while len(self._done) < len(self._workers):
                    for key, _ in selector.select(_TICK_S):
                        for message in key.data.receive():
                            self._take(message)
                    self._advance()
        except BaseException:
            for worker in self._workers:
                worker.spoiled = True
            raise
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

    def _take(self, message: Any) -> None:
        now_ns = time.time_ns()
        if isinstance(message, RequestRecord):
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
            raise RunError(f"a load generator failed, which is a defect of kneebench:\n{message.what}")

    def _advance(self) -> None:
        window = self._window
        window.tick(time.time_ns())
        if window.close_ns is not None and not self._told_close:
            self._told_close = True
            self._tell(Close(window.close_ns))
        over = window.gave_up is not None or self._drained == len(self._workers)
        if over and not self._told_stop:
            self._told_stop = True
            self._tell(Stop())

    def _tell(self, message: Any) -> None:
        for worker in self._workers:
            worker.send(message)


class _Worker:
    """One generator process."""

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
        self.stdout = self.process.stdout
        self._stdin = self.process.stdin
        self.spoiled = False
        """It was left in the middle of a cell."""
        self._inbox = Inbox()

    def send(self, message: Any) -> None:
        try:
            data = memoryview(packed(message))
            while data:
                data = data[self._stdin.write(data) :]
        except OSError as error:
            raise self._died() from error

    def receive(self) -> list[Any]:
        data = os.read(self.stdout.fileno(), 1 << 20)
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
        self.stdout.close()

    def _died(self) -> RunError:
        try:
            code: int | str = self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = "none yet"
        return RunError(
            f"a load generator ended in the middle of a cell (exit code {code}); every finished row is on disk",
            remedy="run the sweep again with --resume; if memory ran out, fewer users",
        )
