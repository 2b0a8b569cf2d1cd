"""What a generator and its parent say to each other, and how it goes through a pipe."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any

_LENGTH = struct.Struct("<I")


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
    """A message as it goes through a pipe: its length, then its pickle."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Inbox:
    """Puts messages together again from a pipe's bytes, however they were cut."""

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
