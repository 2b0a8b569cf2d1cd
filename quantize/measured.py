"""A program run to its end in a process group of its own, and what that took: wall time and the most memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MEASURE = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
began = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setsigdef=[signal.SIGINT])
_, status, usage = os.wait4(child, 0)
code = os.waitstatus_to_exitcode(status)
print()  # what it wrote need not end with a line
seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
print(json.dumps({"code": code, "seconds": seconds, "cpu": cpu, "maxrss": usage.ru_maxrss}))
"""
"""Starts a program, waits for it and says what it took, from a process as small as an interpreter can be.

A child's ru_maxrss is never less than what its parent held when it started it (exec keeps the high-water mark of the
memory that it replaces), and whoever compares models holds two of them.
"""

Watch = Callable[[str], None]
"""Told each line that a program writes to stderr, as it comes."""


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit code (-N: by signal N), wall seconds, seconds of all processors together, the largest
    resident set in MiB, and the last lines that it wrote to stdout and to stderr."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    said: str
    complained: str


def execute(command: Sequence[str], log: Path, watch: Watch) -> Ended:
    """Run `command`, a program's path and its arguments; what it writes to stderr is in `log`, too.

    Where this is interrupted, so is the program, and all that it started.
    """
    measuring = [sys.executable, "-IS", "-c", _MEASURE, *command]
    last = ""
    with tempfile.TemporaryFile("w+") as answer, log.open("w", encoding="utf-8") as kept:
        with subprocess.Popen(
            measuring, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.PIPE, text=True, errors="replace",
            process_group=0,
        ) as process:  # fmt: skip
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    kept.write(line)
                    if line.strip():
                        last = line.strip()
                        watch(last)
                process.wait()
            except BaseException:
                _end(process)
                raise
        answer.seek(0)
        lines = [line for line in answer.read().splitlines() if line.strip()]
    if process.returncode:  # the process that measures: the other's end is told in what it says
        return Ended(process.returncode, 0.0, 0.0, 0.0, "", last)
    took = json.loads(lines[-1])
    peak = took["maxrss"] * (1 if sys.platform == "darwin" else 1024) / 2**20
    return Ended(took["code"], took["seconds"], took["cpu"], peak, lines[-2] if len(lines) > 1 else "", last)


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupt the process group, so that it puts away what it holds; kill it if that takes long."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=20)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
