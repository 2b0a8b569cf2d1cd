"""Reads sockets whose bytes can wait, many at once, every few ms.

The kernel has stamped what arrived, so when we read it changes no figure; what costs is waking up for it. At 64 streams
of 50 tokens a second a loop that wakes for each token spends twice as much CPU on waking as on reading. Only the end
of an answer is urgent, because the next question waits for it: near the end a connection goes back to the event loop.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

LOOKS_A_GAP = 2
"""Looks between two chunks of a stream: the more, the fewer chunks meet in one read (which blurs their stamps)."""
LEAST_GAP_NS = 5_000_000
"""Chunks that come closer than this are not worth it: the loop's timers are whole milliseconds."""

READS_A_TURN = 16
"""More are read in later turns of the event loop: the end of somebody's answer may be waiting for its turn."""


class Poller:
    """Belongs to the running loop. Its timer runs only while something is watched."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Callable[[], object], int]] = {}
        self._period_s = 0.0
        self._timer: asyncio.Handle | None = None

    def add(self, fd: int, on_readable: Callable[[], object], gap_ns: int) -> None:
        """Watch a socket on which chunks come `gap_ns` apart or more."""
        self._epoll.register(fd, select.EPOLLIN)
        self._watched[fd] = (on_readable, gap_ns)
        self._period_s = min(gap for _, gap in self._watched.values()) / LOOKS_A_GAP / 1e9
        if self._timer is None:
            self._timer = self._loop.call_later(self._period_s, self._look)

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)
        del self._watched[fd]

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._epoll.close()

    def _look(self) -> None:
        ready = self._epoll.poll(0, READS_A_TURN)
        for fd, _ in ready:
            watched = self._watched.get(fd)
            if watched is not None:  # an earlier callback of this round may have removed it
                watched[0]()
        if len(ready) == READS_A_TURN:
            self._timer = self._loop.call_soon(self._look)
        else:
            self._timer = self._loop.call_later(self._period_s, self._look) if self._watched else None
