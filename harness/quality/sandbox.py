"""The locked-down runner for code that a language model wrote.

The threat: an answer that does what nobody meant, or what a poisoned checkpoint was made to do. It is Python, and may
be as hostile as it likes. It gets

    a room      Python's own library and the system's, read-only, /dev/null, and an empty /tmp of a limited size, in
                memory. Nothing of the user, the project, /etc, /proc or the machine's devices; no environment.
    no company  namespaces of its own for processes, network, mounts, IPC and host name. A filter of system calls
                refuses sockets, further processes and threads; there is no terminal.
    no rights   it is nobody: really, where we are root. No capabilities, and no way to any.
    a measure   of CPU and wall time, memory, files and output. The output goes into a file in memory whose size the
                kernel limits, so nobody has to read along.

and it ends with us: the first process of its namespace dies with ours, and the namespace with its first process.

Bubblewrap builds the room; where it is not installed, inside.py does the same with the kernel's calls, as root or in a
user namespace. What follows (rights, limits, filter) is inside.py in both. A runner is offered only after it has shown,
once a process, that the room holds what it should and nothing else.

What remains: flaws of the kernel and its side channels; load (one core for cpu_s and, with bubblewrap, as many empty
files as can be made in that time); and that a test stands in the same interpreter as the answer, so that an answer
written against this file could claim to have passed. An exit(0) in the middle cannot.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from harness.errors import RunError
from harness.quality import inside

Status = Literal["passed", "failed", "timeout", "killed"]

DEVICES = ("/dev/null", "/dev/urandom")
SYSTEM = ("/lib", "/lib32", "/lib64", "/libx32")
"""Directories on old systems, links into /usr on others."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an answer may use."""

    cpu_s: float = 2.0
    """Rounded up to whole seconds, which is what the kernel counts in."""
    wall_s: float = 15.0
    """From the start of the sandbox, which is some 0.05 s of it."""
    memory_mib: int = 256
    """Address space, the interpreter's own among it."""
    files_mib: int = 8
    """The size of /tmp, and the most that it may print."""
    output_bytes: int = 65536
    """The end of what it printed, as much of it as is kept."""


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it: its stdout and stderr, printable but for tabs and line ends, and in `note` the reason.

    passed: it ran to its last line. failed: it raised, or ended itself before. timeout: CPU or wall time was used up.
    killed: a signal ended it (SIGSEGV, SIGKILL, …).
    """

    status: Status
    output: str
    note: str


@dataclass(frozen=True, slots=True)
class Runner:
    """`run(code)` runs a program of Python in a room of its own; `command` is the words that start one."""

    name: str
    command: Callable[[Limits], list[str]]

    def run(self, code: str, limits: Limits = LIMITS) -> Outcome:
        """Runs `code` and returns when it has ended. RunError where the room could not be built: that is no outcome."""
        with memory_file(code.encode("utf-8", "surrogatepass") + b"\n") as source, memory_file() as output:
            returned: int | None = None
            with subprocess.Popen(
                self.command(limits),
                stdin=source,
                stdout=output,
                stderr=output,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # the same answer has to be judged the same in every precision
                start_new_session=True,
            ) as process:
                try:
                    returned = process.wait(limits.wall_s)
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    process.kill()
            text = readable(output, limits.output_bytes)
            if os.lseek(source, 0, os.SEEK_CUR) == 0:
                raise RunError(f"the sandbox ({self.name}) did not start:\n{text}")
            full = os.fstat(output).st_size >= limits.files_mib << 20
        status, note = verdict(returned, text, limits)
        if full and status == "failed":
            note = f"printed more than {limits.files_mib} MiB"
        return Outcome(status, text, note)


def verdict(returned: int | None, output: str, limits: Limits) -> tuple[Status, str]:
    """The status, and why, of what the sandbox returned; None where it had to be ended."""
    if returned is None:
        return "timeout", f"ran longer than {limits.wall_s:g} s"
    if returned == inside.FINISHED:
        return "passed", ""
    if returned == inside.RAISED:
        return "failed", (output.splitlines() or ["raised"])[-1]
    if returned < 0 or returned > 128:
        number = -returned if returned < 0 else returned - 128
        if number == signal.SIGXCPU:
            return "timeout", f"used more than {limits.cpu_s:g} s of CPU time"
        known = number in {item.value for item in signal.Signals}
        return "killed", f"ended by {signal.Signals(number).name if known else f'signal {number}'}"
    return "failed", "ended before its last line"


@contextmanager
def memory_file(content: bytes = b"") -> Iterator[int]:
    """The descriptor of a file that has no name, at its beginning."""
    with os.fdopen(os.memfd_create("answer"), "w+b", buffering=0) as file:
        file.write(content)
        file.seek(0)
        yield file.fileno()


def readable(file: int, most: int) -> str:
    """The last `most` bytes; what no terminal or page should get (controls, NUL, marks of direction) becomes U+FFFD."""
    size = os.fstat(file).st_size
    text = os.pread(file, most, max(0, size - most)).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def python() -> str:
    """This Python without its virtual environment, which the room does not have."""
    return str(Path(sys.base_prefix).resolve() / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def room() -> tuple[list[str], dict[str, str]]:
    """What is bound into the room, and its symbolic links: Python, its library, the system's libraries, two devices."""
    prefixes = {Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix).resolve(), Path("/usr")}
    wanted = {python(), "/etc/ld.so.cache", *SYSTEM, *DEVICES}
    wanted |= {str(prefix / name) for prefix in prefixes for name in ("lib", "lib32", "lib64", "libx32")}
    links = {path: os.readlink(path) for path in sorted(wanted) if os.path.islink(path) and path != python()}
    binds = [path for path in sorted(wanted) if os.path.exists(path) and path not in links]
    return [path for path in binds if not any(path.startswith(f"{other}/") for other in binds)], links


def interpreter(limits: Limits, binds: list[str] | None, links: dict[str, str]) -> list[str]:
    """Python with inside.py and its order. Isolated like -I, but for the hash seed that our own environment sets."""
    order = inside.Order(math.ceil(limits.cpu_s), limits.memory_mib, limits.files_mib, binds, links)
    text = Path(inside.__file__).read_text(encoding="utf-8")
    return [python(), "-s", "-P", "-S", "-B", "-c", text, json.dumps(order)]


def bubblewrap_command(program: str, limits: Limits) -> list[str]:
    """The room as bubblewrap's arguments. Root needs no user namespace, but the right to become nobody (inside.py)."""
    binds, links = room()
    who = "--unshare-user --uid 65534 --gid 65534"
    if os.geteuid() == 0:
        who = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID"
    command = [program, "--die-with-parent", *who.split()]
    command += "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --hostname sandbox".split()
    for path in binds:  # the directory first: above a file, bubblewrap makes one that nobody may enter
        command += ["--perms", "0755", "--dir", os.path.dirname(path)]
        command += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    for path, target in links.items():
        command += ["--symlink", target, path]
    command += ["--perms", "1777", "--size", str(limits.files_mib << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*command, "--chdir", "/tmp", "--", *interpreter(limits, None, {})]


def namespaces_command(limits: Limits) -> list[str]:
    """inside.py builds the room itself."""
    binds, links = room()
    return interpreter(limits, binds, links)


def trial() -> str:
    """A program that passes, and prints 1, where the room holds what `room` says and nothing can be reached from it."""
    binds, links = room()
    listing: dict[str, set[str]] = {}
    for path in (*binds, *links, "/tmp"):
        while path != "/":
            path, _, name = path.rpartition("/")
            path = path or "/"
            listing.setdefault(path, set()).add(name)
    holds = {path: sorted(names) for path, names in sorted(listing.items())}
    return f"""
import os, socket
for path, names in {holds!r}.items():
    assert sorted(os.listdir(path)) == names, path
assert os.listdir("/tmp") == [] and os.getcwd() == "/tmp" and not os.environ
assert os.getresuid() == (65534,) * 3 and os.getppid() < 10
for forbidden in (os.fork, socket.socket, lambda: open("/x", "w"), lambda: os.chroot("/tmp")):
    try:
        forbidden()
    except OSError:
        continue
    raise AssertionError(forbidden)
print(1)
"""


def tried(runner: Runner) -> Runner | None:
    """The runner, if it runs the trial as it should."""
    try:
        outcome = runner.run(trial())
    except (OSError, RunError):
        return None
    return runner if (outcome.status, outcome.output) == ("passed", "1\n") else None


@cache
def bubblewrap() -> Runner | None:
    """The runner that starts bubblewrap; None where that is not installed, too old (0.7 has sizes), or not allowed."""
    program = shutil.which("bwrap")
    return tried(Runner("bubblewrap", partial(bubblewrap_command, program))) if program else None


@cache
def namespaces() -> Runner | None:
    """The runner that needs nothing installed, on Linux from 5.12; None where users may not have namespaces."""
    return tried(Runner("namespaces", namespaces_command))


def find_runner() -> Runner | None:
    """Bubblewrap, else the kernel's namespaces, else None: then code is not executed, and whoever asked says so.

    Tried once a process. None on anything but Linux on x86-64 or arm64, and in containers without user namespaces.
    """
    if sys.platform != "linux" or platform.machine() not in inside.MACHINES:
        return None
    return bubblewrap() or namespaces()
