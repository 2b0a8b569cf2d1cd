"""A helper program run to its end, line by line."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence


def die_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: has Linux send the child SIGTERM when we die without cleaning up. No orphan may keep a GPU."""
    libc = ctypes.CDLL(None)  # loaded now: between fork and exec only the call itself is safe
    set_parent_death_signal = 1

    def ask() -> None:
        libc.prctl(set_parent_death_signal, int(signal.SIGTERM))

    return ask


def run_lines(command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> int:
    """Run a command in a session of its own, hand over each line of its output, and return its exit code.

    Whatever ends this call (Ctrl-C, an error in `on_line`) ends the command and all that it started. A progress bar's
    \\r ends a line too.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=dict(environment),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip())
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
