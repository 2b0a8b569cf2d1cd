"""How far another node's clock is from ours, and records moved from that clock to ours.

Several generators drive one server, each on its own node with its own CLOCK_REALTIME. The owner of the sweep asks each
one for the time, before a cell and after it:

    owner   sent ───────╮                    ╭─────► back     offset     = ((received − sent) + (answered − back)) / 2
                         ╲                  ╱                 round trip = (back − sent) − (answered − received)
    other                 received ─ answered                 error      = round trip / 2

(NTP's: RFC 5905, section 8.) Neither way took less than no time, so at worst the whole round trip was spent on one of
them, and the true offset is within the error however the two differ. The ping of the least round trip bounds it best.

Latencies need no offset. A request is meant, sent and answered on one clock, its generator's: both ends of every
difference are off by the same, which falls out. What needs one time is what lies between nodes: which requests began
inside the window, which tokens arrived in it, and in an open loop the common start of the schedule that is shared out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.records import RequestRecord

PINGS = 16
"""Twice as many as NTP's filter looks back on: between cells there is time, and the more, the shorter the shortest."""

STEP_NS = 5_000_000_000
"""A clock that was set by more than this ends the cell; one that was set back by less holds it up by no more."""


def realtime_offset_ns() -> int:
    """CLOCK_REALTIME - CLOCK_MONOTONIC here: constant, whatever NTP slews, until somebody sets the clock.

    Of three readings the one that took the least time: a turn that is lost between the two clocks looks like a step.
    """
    found = []
    for _ in range(3):
        before_ns, now_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        found.append((after_ns - before_ns, now_ns - before_ns))
    return min(found)[1]


@dataclass(frozen=True, slots=True)
class Ping:
    """One question for the time, ns since the epoch: the outer two on our clock, the inner two on the other's."""

    sent_ns: int
    received_ns: int
    answered_ns: int
    back_ns: int

    @property
    def rtt_ns(self) -> int:
        """What both ways took together; a difference of durations, so neither clock's setting is in it."""
        return (self.back_ns - self.sent_ns) - (self.answered_ns - self.received_ns)


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The other clock less ours: the truth is within `offset_ns` ± `error_ns`."""

    offset_ns: int
    error_ns: int
    rtt_min_ns: int


def offset(pings: Sequence[Ping]) -> ClockOffset:
    """The offset by the ping of the least round trip, rounded so that the truth stays inside.

    `pings` must not be empty. A clock that was set between two stamps can make a round trip below zero: then that is
    the error, for nothing better is known.
    """
    best = min(pings, key=lambda ping: abs(ping.rtt_ns))
    twice = (best.received_ns - best.sent_ns) + (best.answered_ns - best.back_ns)
    return ClockOffset(twice // 2, -(-abs(best.rtt_ns) // 2), best.rtt_ns)


def over(before: ClockOffset, after: ClockOffset) -> ClockOffset:
    """`before`, by which a cell's records were moved, and how wrong that was at any moment until `after`.

    A clock's rate keeps its sign within a cell, so at each moment the true offset lies between those of both ends. The
    first is within `before.error_ns` of where the records were put, the last within |drift| + `after.error_ns`.
    """
    drift_ns = after.offset_ns - before.offset_ns
    return replace(before, error_ns=max(before.error_ns, abs(drift_ns) + after.error_ns))


def moved(record: RequestRecord, offset_ns: int) -> RequestRecord:
    """A record of a clock `offset_ns` ahead of ours, in our time; `chunk_us` count from `intended_ns` and stay."""

    def ours(at_ns: int | None) -> int | None:
        return None if at_ns is None else at_ns - offset_ns

    return replace(
        record,
        intended_ns=record.intended_ns - offset_ns,
        sent_ns=ours(record.sent_ns),
        first_token_ns=ours(record.first_token_ns),
        last_token_ns=ours(record.last_token_ns),
        end_ns=ours(record.end_ns),
    )
