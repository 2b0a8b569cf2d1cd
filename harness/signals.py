"""What ends a command ends it as Ctrl-C does: rows are kept, engine and generators are ended, logs are cleaned.

Left alone, SIGTERM (kill, a shutdown, a scheduler whose time is up) and SIGHUP (a terminal that has gone) end Python on
the spot, and what it has started runs on: an engine that holds a card.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Within it, ENDING raise KeyboardInterrupt in the main thread, which is the one to call this.

    One that is ignored stays so, which is what nohup asks for. SIGINT is left alone: a shell's background job ignores
    it, and these end such a job all the same.
    """
    found = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in found:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)
