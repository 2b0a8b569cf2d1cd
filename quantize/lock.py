"""A directory that one process at a time writes to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import OutputError


@contextmanager
def held(folder: Path, out: Path, taken: str, remedy: str) -> Iterator[None]:
    """`folder`, made where it is missing, for this process alone; the lock goes with the process, however it ends.

    Raises OutputError naming `out`, which the user typed, where it cannot be made, and with `taken` and `remedy` where
    another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{out}: {error}", "a directory that can be created", "Choose another --out") from error
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(taken, "one run for each --out", remedy) from error
        yield
    finally:
        os.close(opened)
