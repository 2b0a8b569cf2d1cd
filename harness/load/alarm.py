"""Wakes the event loop at a given nanosecond of the wall clock.

uvloop's timers are whole milliseconds, which would show as send lag in every open loop. A Linux timerfd is exact to
the scheduler's wake-up, some 50 us; where there is none, the loop's own timers serve, and the send lag is recorded
either way.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import os
import struct
import sys
import time

_CLOCK_REALTIME, _NONBLOCK_CLOEXEC, _ABSOLUTE = 0, os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0), 1
_ITIMERSPEC = struct.Struct("@qqqq")  # interval s, ns; value s, ns


class Alarm:
    """Any number of sleepers on one timer. Belongs to the running loop; `close` it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._closed = False
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._fd = self._libc.timerfd_create(_CLOCK_REALTIME, _NONBLOCK_CLOEXEC) if self._libc else -1
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ring)

    def close(self) -> None:
        """Wake whoever still sleeps, and release the timer."""
        self._closed = True
        for _, _, sleeper in self._sleepers:
            if not sleeper.done():
                sleeper.set_result(None)
        self._sleepers.clear()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def until(self, at_ns: int) -> None:
        """Sleep until CLOCK_REALTIME reads `at_ns`; not at all when it does already, or when nobody rings any more."""
        if self._closed or at_ns <= time.time_ns():
            return
        sleeper = self._loop.create_future()
        heapq.heappush(self._sleepers, (at_ns, next(self._order), sleeper))
        if self._sleepers[0][2] is sleeper:
            self._set(at_ns)
        await sleeper

    def _set(self, at_ns: int) -> None:
        if self._fd < 0:
            self._loop.call_later(max(0, at_ns - time.time_ns()) / 1e9, self._wake)
            return
        assert self._libc is not None
        spec = _ITIMERSPEC.pack(0, 0, *divmod(at_ns, 1_000_000_000))
        if self._libc.timerfd_settime(self._fd, _ABSOLUTE, spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._wake()

    def _wake(self) -> None:
        now = time.time_ns()
        while self._sleepers and self._sleepers[0][0] <= now:
            sleeper = heapq.heappop(self._sleepers)[2]
            if not sleeper.done():
                sleeper.set_result(None)
        if self._sleepers:
            self._set(self._sleepers[0][0])
