"""A generator: a process that makes load and does nothing else. Its event loop is the clock, so it is left alone.

    parent ── Job, Close, Stop ──►  stdin  │ event loop: sockets, schedule │  stdout ──► records, Done ── parent

Everything else (rows, tables, the terminal, the engine's counters, statistics) happens in the parent. Generators never
hear Ctrl-C; they end when their stdin does, so that none outlives a parent that was killed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from harness.load.alarm import Alarm
from harness.load.arrivals import Job, Traffic, make_load
from harness.load.messages import Close, Done, Drained, Exhausted, Failed, Inbox, Overloaded, Stop, packed
from harness.load.poller import Poller

LAG_PERIOD_NS = 50_000_000
_FLUSH_S = 0.1


class _Outbox:
    """Sends messages to the parent in the gaps: many in one write, never waiting for a reader that is slow."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._waiting: list[bytes] = []

    def tell(self, message: Any) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._waiting.append(packed(message))

    def flush(self) -> None:
        if self._waiting:
            self._transport.write(b"".join(self._waiting))
            self._waiting.clear()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(1, "wb", buffering=0))
    outbox = _Outbox(transport)
    # A callback that raises would otherwise only be logged, and what it was to do would be waited for without end.
    loop.set_exception_handler(lambda _, context: outbox.tell(Failed(_told(context))))
    commands: asyncio.Queue[Any] = asyncio.Queue()
    inbox = Inbox()

    def on_stdin() -> None:
        data = os.read(0, 1 << 20)
        if not data:
            os._exit(0)  # the parent is gone
        for message in inbox.feed(data):
            commands.put_nowait(message)

    os.set_blocking(0, False)
    loop.add_reader(0, on_stdin)
    while True:
        job = await commands.get()
        if isinstance(job, Job):
            outbox.tell(await _run(job, commands, outbox.tell))
            outbox.flush()
            gc.collect()


async def _run(job: Job, commands: asyncio.Queue[Any], tell: Callable[[Any], None]) -> Done | Failed:
    alarm, poller = Alarm(), Poller()
    traffic = Traffic(job, alarm, poller, tell)
    lags_ms: list[float] = []
    cpu_s, offset_ns = time.process_time(), _clock_offset_ns()
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
    step_ms = (_clock_offset_ns() - offset_ns) / 1e6
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


def _clock_offset_ns() -> int:
    """CLOCK_REALTIME - CLOCK_MONOTONIC: constant, whatever NTP slews, until somebody sets the clock."""
    return time.time_ns() - time.monotonic_ns()


def _allow_many_sockets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _allow_many_sockets()
    gc.disable()  # a collection in the middle of a cell would be lag; there is one after each
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
