"""What a generator and its parent say to each other, and how it goes through a pipe or a connection."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Welcome:
    """To a generator on another node: it has been let in; what it is to do comes later."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a generator: it has its job, and waits for Begin."""


@dataclass(frozen=True, slots=True)
class Begin:
    """To a generator: the common start of the load, on its own clock."""

    start_ns: int


@dataclass(frozen=True, slots=True)
class AskTime:
    """To a generator on another node, between cells: say at once what your clock reads."""


@dataclass(frozen=True, slots=True)
class Time:
    """From a generator: its CLOCK_REALTIME in ns when it was asked, and when it answered."""

    received_ns: int
    answered_ns: int


@dataclass(frozen=True, slots=True)
class Close:
    """To a generator: the window has closed; say Drained when all that was to begin before has ended."""

    close_ns: int


@dataclass(frozen=True, slots=True)
class Stop:
    """To a generator: begin nothing more, end what is in flight, say Done."""


@dataclass(frozen=True, slots=True)
class Drained:
    """From a generator: everything that belongs into the window has ended."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """From a generator: its share of the trace has been sent."""


@dataclass(frozen=True, slots=True)
class Overloaded:
    """From a generator: more is in flight than can be meant."""


@dataclass(frozen=True, slots=True)
class Done:
    """From a generator: the job is over."""

    lags_ms: tuple[float, ...]
    """How late the event loop woke up, each 50 ms."""
    cpu_s: float
    clock_step_ms: float
    """How far CLOCK_REALTIME was set against CLOCK_MONOTONIC meanwhile."""


@dataclass(frozen=True, slots=True)
class Failed:
    """From a generator: a defect of ours, with its traceback."""

    what: str


def packed(message: Any) -> bytes:
    """A message as it goes through: its length, then its pickle."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Inbox:
    """Puts messages together again from the bytes that come, however they were cut."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with these bytes."""
        self._pending += data
        messages, start = [], 0
        while len(self._pending) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._pending, start)
            end = start + _LENGTH.size + size
            if end > len(self._pending):
                break
            messages.append(pickle.loads(memoryview(self._pending)[start + _LENGTH.size : end]))
            start = end
        if start:
            self._pending = self._pending[start:]
        return messages
