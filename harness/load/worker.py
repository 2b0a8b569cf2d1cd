"""A generator: a process that makes load and does nothing else. Its event loop is the clock, so it is left alone.

    parent ── Job, Begin, Close, Stop ──►  │ event loop: sockets, schedule │  ──► Ready, records, Done ── parent

Everything else (rows, tables, the terminal, the engine's counters, statistics) happens in the parent. Here the line to
the parent is stdin and stdout; on another node it is a connection (away.py). Generators never hear Ctrl-C, nor
what else ends a command; they end when that line does, so that none outlives a parent that was killed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from harness.load.alarm import Alarm
from harness.load.arrivals import Job, Traffic, make_load
from harness.load.clocks import realtime_offset_ns
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
from harness.load.poller import Poller
from harness.redact import hide, tell_errors_redacted
from harness.signals import ENDING

LAG_PERIOD_NS = 50_000_000
_FLUSH_S = 0.1


class Worker:
    """The generator at work: does what `heard` brings and sends what comes of it to the parent, through `transport`.

    What it sends goes in the gaps: many messages in one write, never waiting for a reader that is slow.
    """

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._waiting: list[bytes] = []
        self._inbox = Inbox()
        self._commands: asyncio.Queue[Any] = asyncio.Queue()

    def heard(self, data: bytes) -> None:
        """Take bytes from the parent; none: it is gone, and so are we."""
        received_ns = time.time_ns()
        if not data:
            os._exit(0)
        for message in self._inbox.feed(data):
            if isinstance(message, AskTime):
                self._transport.write(packed(Time(received_ns, time.time_ns())))
            else:
                self._commands.put_nowait(message)

    def tell(self, message: Any) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)
        self._waiting.append(packed(message))

    async def work(self) -> None:
        """Do one job after the other, until the parent is gone."""
        # A callback that raises would otherwise only be logged, and what it was to do would be waited for without end.
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.tell(Failed(_told(context))))
        while True:
            job = await self._commands.get()
            if not isinstance(job, Job):
                continue
            self._tell_now(Ready())
            begin = await self._commands.get()
            assert isinstance(begin, Begin)
            self._tell_now(await _run(replace(job, start_ns=begin.start_ns), self._commands, self.tell))
            gc.collect()

    def _tell_now(self, message: Any) -> None:
        self.tell(message)
        self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._transport.write(b"".join(self._waiting))
            self._waiting.clear()


async def _work_for_parent() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(1, "wb", buffering=0))
    worker = Worker(transport)
    os.set_blocking(0, False)
    loop.add_reader(0, lambda: worker.heard(os.read(0, 1 << 20)))
    await worker.work()


async def _run(job: Job, commands: asyncio.Queue[Any], tell: Callable[[Any], None]) -> Done | Failed:
    if job.target.api_key:
        hide(job.target.api_key)
    alarm, poller = Alarm(), Poller()
    traffic = Traffic(job, alarm, poller, tell)
    lags_ms: list[float] = []
    cpu_s, offset_ns = time.process_time(), realtime_offset_ns()
    helpers = [
        asyncio.create_task(_measure_lag(alarm, lags_ms)),
        asyncio.create_task(_tell_when(traffic.overloaded, Overloaded(), tell)),
        asyncio.create_task(_tell_when(traffic.exhausted, Exhausted(), tell)),
    ]
    load = asyncio.create_task(make_load(traffic))
    # Loads end when they are told to; one that ends by itself had an error, which `await load` then raises.
    load.add_done_callback(lambda task: commands.put_nowait(Stop()) if _failed(task) else None)
    try:
        while True:
            command = await commands.get()
            if isinstance(command, Stop):
                break
            if isinstance(command, Close):
                helpers.append(asyncio.create_task(_tell_drained(traffic, command.close_ns, tell)))
        traffic.stop()
        for helper in helpers:
            helper.cancel()
        alarm.close()
        await load
        traffic.finish_chores()
    except Exception:
        return Failed(traceback.format_exc())
    finally:
        traffic.close()
        poller.close()
    step_ms = (realtime_offset_ns() - offset_ns) / 1e6
    return Done(tuple(lags_ms), time.process_time() - cpu_s, step_ms)


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return "".join(traceback.format_exception(error)) if error else str(context.get("message"))


def _failed(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is not None


async def _tell_drained(traffic: Traffic, close_ns: int, tell: Callable[[Any], None]) -> None:
    await traffic.drained(close_ns)
    tell(Drained())


async def _tell_when(event: asyncio.Event, message: Any, tell: Callable[[Any], None]) -> None:
    await event.wait()
    tell(message)


async def _measure_lag(alarm: Alarm, lags_ms: list[float]) -> None:
    while True:
        due_ns = time.time_ns() + LAG_PERIOD_NS
        await alarm.until(due_ns)
        lags_ms.append((time.time_ns() - due_ns) / 1e6)


def _allow_many_sockets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def become_generator(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Make this process one, whose event loop does `work` alone."""
    import uvloop

    for number in (signal.SIGINT, *ENDING):  # sent to the whole group: the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    tell_errors_redacted()
    _allow_many_sockets()
    gc.disable()  # a collection in the middle of a cell would be lag; there is one after each
    uvloop.run(work())


if __name__ == "__main__":
    become_generator(_work_for_parent)
