"""A generator on a node whose clock is wrong: `python skewed.py NS HOST:PORT` is harness.load.away, NS ahead.

Whatever reads CLOCK_REALTIME in a generator reads it through here: its own stamps, the kernel's on what it received,
and the timer that wakes it.
"""

from __future__ import annotations

import sys
import time

SKEW_NS = int(sys.argv[1])
true_time_ns = time.time_ns
time.time_ns = lambda: true_time_ns() + SKEW_NS

from harness.load import away, client  # noqa: E402
from harness.load.alarm import Alarm  # noqa: E402

true_stamp, true_set = client._kernel_ns, Alarm._set


def stamp(received: client._Stamp) -> int | None:
    at_ns = true_stamp(received)
    return None if at_ns is None else at_ns + SKEW_NS


client._kernel_ns = stamp
Alarm._set = lambda self, at_ns: true_set(self, at_ns - SKEW_NS)  # type: ignore[method-assign]

away.main(sys.argv[2:])
