"""The locked-down runner against hostile programs: what each gets, and that no process and no file stays behind.

Both runners stand every test. What two protections refuse at once (a fork: the filter and the limit) is also looked at
from outside, in /proc, so that losing one of them shows.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import RunError
from harness.quality import inside, sandbox
from harness.quality.sandbox import Limits, Outcome, Runner

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(cpu_s=1, wall_s=20, memory_mib=256 + os.getpid() % 256, files_mib=2)
"""Short, and with a size of memory by which the processes of this test are known among others'."""
MARK = f"[1, {LIMITS.memory_mib}, 2, "
BOTH = {"bubblewrap": sandbox.bubblewrap, "namespaces": sandbox.namespaces}


@pytest.fixture(params=sorted(BOTH))
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Each of the two. After the test none of its processes is there; in CI both runners have to be."""
    if sys.platform != "linux" or (found := BOTH[request.param]()) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI promises {request.param}: is the package bubblewrap installed?")
        pytest.skip(f"no sandbox of {request.param} on this machine")
    yield found
    assert gone()


def processes() -> list[int]:
    """All processes of this test's sandboxes, by what stands on their command lines, wherever they hang in the tree."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if MARK in line and inside.__doc__ is not None and inside.__doc__[:40] in line:
                found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool]) -> bool:
    """Waits for something that the kernel does in its own time."""
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def gone() -> bool:
    return until(lambda: not processes())


# --- programs that mean well ------------------------------------------------------------------------------------------


def test_a_program_that_passes(runner: Runner) -> None:
    outcome = runner.run("def double(x):\n    return 2 * x\n\nassert double(4) == 8\nprint('fine')", LIMITS)
    assert outcome == Outcome("passed", "fine\n", "")


def test_a_failed_assertion_says_which(runner: Runner) -> None:
    outcome = runner.run("total = 3\nassert total == 4, f'total is {total}'", LIMITS)
    assert (outcome.status, outcome.note) == ("failed", "AssertionError: total is 3")
    assert "assert total == 4" in outcome.output and "inside" not in outcome.output
    assert 'answer.py", line 2' in outcome.output


def test_syntax_that_is_none(runner: Runner) -> None:
    assert runner.run("def f(:", LIMITS).note.startswith("SyntaxError")
    assert runner.run("x = '\ud800'", LIMITS).status == "failed"


def test_what_ordinary_answers_use(runner: Runner) -> None:
    outcome = runner.run(
        """from __future__ import annotations
import asyncio, collections, dataclasses, datetime, decimal, heapq, itertools, json, math, random, re, tempfile
@dataclasses.dataclass
class Point:
    x: int
async def one():
    return 1
assert asyncio.run(one()) == 1 and Point(1).x == 1
with tempfile.TemporaryFile() as file:
    file.write(b"x")
open("note.txt", "w").close()
assert __name__ != "__main__"
if __name__ == "__main__":
    input("Your number: ")
""",
        LIMITS,
    )
    assert outcome == Outcome("passed", "", "")


def test_standard_input_is_empty(runner: Runner) -> None:
    assert runner.run("input()", LIMITS).note == "EOFError: EOF when reading a line"


def test_the_runners_own_file_is_not_the_answers(runner: Runner) -> None:
    """Wound back, the file that the answer came in would say that the sandbox never started."""
    code = "import os\nfor number in range(3):\n    os.lseek(number, 0, os.SEEK_SET)"
    assert runner.run(code, LIMITS).status == "passed"


def test_the_future_of_this_file_is_not_the_answers(runner: Runner) -> None:
    """inside.py has postponed annotations; compiled with them, f.__annotations__ would hold the string 'int'."""
    assert runner.run("def f(x: int): pass\nassert f.__annotations__ == {'x': int}", LIMITS).status == "passed"


def test_the_same_answer_has_the_same_output_each_time(runner: Runner) -> None:
    """The order of a set of strings hangs on the hash seed: drawn anew it differs in nearly every run."""
    code = "print({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"
    assert len({runner.run(code, LIMITS).output for _ in range(3)}) == 1


# --- what is refused inside -------------------------------------------------------------------------------------------

LIBC = "ctypes.CDLL(None, use_errno=True)"
REFUSED = {
    "connect out": "socket.create_connection(('192.0.2.1', 80), timeout=1)",
    "dns": "socket.getaddrinfo('example.org', 80)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "vsock, which no namespace holds": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "shadow": "open('/etc/shadow')",
    "passwd": "open('/etc/passwd')",
    "symlink out": "os.symlink('/etc/passwd', '/tmp/out') or open('/tmp/out')",
    "way up": "open('/tmp/../../../../etc/passwd')",
    "environ of init": "open('/proc/1/environ')",
    "memory of itself": "open('/proc/self/mem')",
    "sysfs": "os.listdir('/sys')",
    "disk": "open('/dev/vda')",
    "terminal": "open('/dev/tty')",
    "shared memory": "os.listdir('/dev/shm')",
    "write to the root": "open('/here', 'w')",
    "write to the devices": "open('/dev/here', 'w')",
    "write to the library": "open(os.path.join(os.path.dirname(os.__file__), 'here.py'), 'w')",
    "change the library": "open(os.__file__, 'a')",
    "touch the library": "os.utime(os.__file__)",
    "make a device": "os.mknod('/tmp/sda', 0o060666, os.makedev(8, 0))",
    "fork": "os.fork() or os._exit(0)",
    "shell": "subprocess.run(['/bin/sh', '-c', 'true'])",
    "spawn": "os.posix_spawn(sys.executable, ['python', '-c', ''], {})",
    "daemon": "(os.fork() or os.setsid() or os.fork()) or os._exit(0)",
    "setuid": "os.setuid(0)",
    "setgid": "os.setgid(0)",
    "groups": "os.setgroups([0])",
    "everyone": "os.kill(-1, signal.SIGKILL)",
    "the test": "os.kill(test, signal.SIGKILL)",
    "chroot": "os.chroot('/tmp')",
    "more cpu": "resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
    "higher priority": "os.nice(-5)",
    "ptrace": f"call({LIBC}.ptrace(16, os.getppid(), 0, 0))",
    "mount": f"call({LIBC}.mount(b'none', b'/tmp', b'tmpfs', 0, b''))",
    "remount": f"call({LIBC}.mount(b'none', b'/', b'', 32, b''))",
    "umount": f"call({LIBC}.umount2(b'/tmp', 2))",
    "unshare a user": f"call({LIBC}.unshare(0x10000000))",
    "clone a user": f"call({LIBC}.syscall(clone, 0x10000011, 0, 0, 0, 0))",
    "clone3": f"call({LIBC}.syscall(435, bytes(88), 88))",
    "keyring": f"call({LIBC}.syscall(keyctl, 0, -3, 0))",
    "memory outside its limit": "os.memfd_create('x')",
    "bpf": f"call({LIBC}.syscall(bpf, 0, bytes(64), 64))",
    "io_uring": f"call({LIBC}.syscall(425, 1, bytes(120)))",
    "host name": "socket.sethostname('other')",
}
"""What a program tries, in words, and the expression that has to raise OSError (or ValueError, from setrlimit)."""

COLUMN = inside.MACHINES.get(os.uname().machine, ("", 0))[1]
PREAMBLE = f"""import ctypes, os, resource, signal, socket, subprocess, sys
test = {os.getpid()}
clone, keyctl, bpf = {[inside.REFUSED[name][COLUMN] for name in ("clone", "keyctl", "bpf")]}
def call(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
"""


def attempts(wanted: dict[str, str]) -> str:
    """A program that makes each attempt and prints those that nothing stopped."""
    code = PREAMBLE
    for name, expression in wanted.items():
        code += f"try:\n    {expression}\n    print({name!r})\nexcept (OSError, ValueError):\n    pass\n"
    return code


def test_what_must_not_be_possible(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("hunter2")
    wanted = dict(REFUSED)
    for path in (tmp_path / "secret.txt", Path(__file__), ROOT / "pyproject.toml", Path.home() / ".ssh", Path.cwd()):
        wanted[str(path)] = f"os.stat({str(path)!r})"
    assert runner.run(attempts(wanted), LIMITS) == Outcome("passed", "", "")


def test_an_attempt_that_nothing_stops_would_be_seen(runner: Runner) -> None:
    assert runner.run(attempts({"read": "os.listdir('/')", "shadow": "open('/etc/shadow')"}), LIMITS).output == "read\n"


def test_the_filter_refuses_each_call_by_itself(runner: Runner) -> None:
    """With arguments that make no sense: whatever else stands in the way, the kernel would say EINVAL or EFAULT."""
    names = """clone clone3 socket memfd_create shmget msgget semget mq_open ptrace process_vm_readv process_vm_writev
        kcmp pidfd_getfd add_key request_key keyctl unshare setns chroot pivot_root mount umount2 open_tree move_mount
        fsopen fsconfig fsmount fspick mount_setattr bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
        io_uring_register"""
    numbers = {name: inside.REFUSED[name][COLUMN] for name in names.split()}
    if COLUMN == 0:
        numbers |= {"fork": 57, "vfork": 58}
    code = f"""import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers}.items():
    if libc.syscall(number, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != 1:
        print(name)"""
    assert runner.run(code, LIMITS) == Outcome("passed", "", "")


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_the_numbers_are_the_kernels(column: int) -> None:
    if not Path(HEADERS[column]).exists():
        pytest.skip("no kernel headers")
    found = re.findall(r"#define __NR_(\w+)\s+(\d+)$", Path(HEADERS[column]).read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in found}
    for name, ours in inside.REFUSED.items():
        if name in numbers or name in ("fork", "vfork"):  # a header may be older than a call
            assert ours[column] == numbers.get(name, inside.NONE), name


def test_the_calls_of_other_architectures_are_the_end(runner: Runner) -> None:
    """x32: the same kernel's calls under numbers that no table of the filter has. This one is getpid."""
    if COLUMN != 0:
        pytest.skip("x86-64 only")
    outcome = runner.run("import ctypes\nctypes.CDLL(None).syscall((1 << 30) + 39)", LIMITS)
    assert outcome == Outcome("killed", "", "ended by SIGSYS")


def test_a_listener_of_this_machine_is_not_reached(runner: Runner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outcome = runner.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", LIMITS)
        assert outcome.note.startswith(("PermissionError", "OSError"))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_room_holds_no_more_than_it_says(runner: Runner) -> None:
    top = {"dev", "etc", "lib", "lib32", "lib64", "libx32", "tmp", "usr", Path(sys.base_prefix).resolve().parts[1]}
    code = f"""import os
print(set(os.listdir("/")) - {top!r}, sorted(os.listdir("/dev")))
print(os.path.exists("/etc") and set(os.listdir("/etc")) - {{"ld.so.cache"}} or None)"""
    assert runner.run(code, LIMITS).output == "set() ['null', 'urandom']\nNone\n"


def test_nothing_of_our_environment_is_there(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    outcome = runner.run("import os, platform\nprint(dict(os.environ), os.getcwd(), platform.node())", LIMITS)
    assert outcome.output == "{} /tmp sandbox\n"


def test_only_tmp_can_be_written_to(runner: Runner) -> None:
    code = """import os
folders = [folder for folder, _, _ in os.walk("/") if os.access(folder, os.W_OK)]
print(len(list(os.walk("/"))) > 20, folders)"""
    assert runner.run(code, replace(LIMITS, cpu_s=20)).output == "True ['/tmp']\n"


def test_signals_to_init_and_parents_change_nothing(runner: Runner) -> None:
    code = """import os, signal
for pid in (os.getppid(), 1):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except PermissionError:
            pass
print("still here")"""
    assert runner.run(code, LIMITS) == Outcome("passed", "still here\n", "")


def test_two_runs_share_nothing(runner: Runner) -> None:
    code = "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/mine', 'w').write('x')"
    assert [runner.run(code, LIMITS).status for _ in range(2)] == ["passed", "passed"]
    with ThreadPoolExecutor(2) as pool:
        assert {outcome.status for outcome in pool.map(lambda _: runner.run(code, LIMITS), range(4))} == {"passed"}
    assert not Path("/tmp/mine").exists()


# --- what is measured out ---------------------------------------------------------------------------------------------


def test_one_file_cannot_be_larger_than_allowed(runner: Runner) -> None:
    outcome = runner.run("open('x', 'wb').write(bytes(3 << 20))", LIMITS)
    assert "File too large" in outcome.note


def test_the_temporary_directory_fills_up(runner: Runner) -> None:
    """2 MiB, minus the pages that directories take: a file of 1.5 MiB fits, a second one does not."""
    code = "for name in 'xy':\n    with open(name, 'wb') as file:\n        file.write(bytes(3 << 19))\n    print(name)"
    outcome = runner.run(code, LIMITS)
    assert outcome.output.startswith("x\n") and "No space left" in outcome.note


def test_open_files_are_counted(runner: Runner) -> None:
    assert "Too many open files" in runner.run("kept = [open('/dev/null') for _ in range(200)]", LIMITS).note


@pytest.mark.parametrize("code", ["bytearray(8 << 30)", "kept = [b'x' * (1 << 20) for _ in range(600)]"])
def test_memory_is_limited(runner: Runner, code: str) -> None:
    outcome = runner.run(code.replace("b'x' *", "bytearray(b'x') *"), LIMITS)
    assert (outcome.status, outcome.note) == ("failed", "MemoryError")


@pytest.mark.parametrize("loop", ["while True:\n    pass", "sum(iter(int, 1))"])
def test_an_endless_loop_is_a_timeout(runner: Runner, loop: str) -> None:
    outcome = runner.run(f"print('begun', flush=True)\n{loop}", LIMITS)
    assert outcome == Outcome("timeout", "begun\n", "used more than 1 s of CPU time")


def test_a_loop_that_ignores_its_signals_is_killed(runner: Runner) -> None:
    code = """import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    pass"""
    assert runner.run(code, LIMITS) == Outcome("killed", "", "ended by SIGKILL")


def test_sleep_is_a_timeout(runner: Runner) -> None:
    """Also where it takes no notice of being asked to end, and where it has closed its output and stopped itself."""
    asleep = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
    stopped = "import os, signal\nos.close(1)\nos.close(2)\nos.kill(os.getpid(), signal.SIGSTOP)"
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda code: runner.run(code, replace(LIMITS, wall_s=3)), (asleep, stopped)))
    assert outcomes == [Outcome("timeout", "", "ran longer than 3 s")] * 2


def test_endless_output_ends(runner: Runner) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = runner.run("while True:\n    print('x' * 1000)", LIMITS)
    assert (outcome.status, outcome.note) == ("failed", "printed more than 2 MiB")
    assert len(outcome.output) == LIMITS.output_bytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB


def test_endless_output_that_does_not_give_up(runner: Runner) -> None:
    code = "import os\nwhile True:\n    try:\n        os.write(2, b'x' * 9999)\n    except OSError:\n        pass"
    outcome = runner.run(code, LIMITS)
    assert outcome.status == "timeout" and len(outcome.output) == LIMITS.output_bytes


def test_of_a_long_line_the_end_is_kept(runner: Runner) -> None:
    outcome = runner.run("print('x' * 1_000_000 + 'end')", LIMITS)
    assert outcome.status == "passed"
    assert len(outcome.output) == LIMITS.output_bytes and outcome.output.endswith("xend\n")


def test_output_is_made_printable(runner: Runner) -> None:
    code = r"import os; os.write(1, b'a\0b\x1b[2Jc\xff\xfe\xe2\x80\xaed\te\rf\n\xc3\xa9')"
    assert runner.run(code, LIMITS).output == "a�b�[2Jc���d\te�f\né"


def test_a_bomb_of_processes(runner: Runner) -> None:
    """Bounded for the day on which it works: 50 children, each of which ends at once."""
    code = """import os
born = 0
for _ in range(50):
    try:
        if os.fork() == 0:
            os._exit(0)
        born += 1
    except OSError:
        pass
print(born)"""
    assert runner.run(code, LIMITS) == Outcome("passed", "0\n", "")


def test_a_bomb_of_threads(runner: Runner) -> None:
    code = """import threading
born = 0
for _ in range(50):
    try:
        threading.Thread(target=int).start()
        born += 1
    except RuntimeError:
        pass
print(born)"""
    assert runner.run(code, LIMITS) == Outcome("passed", "0\n", "")


def test_a_megabyte_of_code(runner: Runner) -> None:
    assert runner.run(f"text = '{'x' * 1_000_000}'\nassert len(text) == 1_000_000", LIMITS).status == "passed"


def test_crashes(runner: Runner) -> None:
    assert runner.run("import ctypes\nctypes.string_at(0)", LIMITS) == Outcome("killed", "", "ended by SIGSEGV")
    assert runner.run("import os\nos.abort()", LIMITS) == Outcome("killed", "", "ended by SIGABRT")
    assert runner.run("import os\nos.kill(os.getpid(), 9)", LIMITS) == Outcome("killed", "", "ended by SIGKILL")
    assert runner.run("def f():\n    f()\nf()", LIMITS).note.startswith("RecursionError")
    deep = "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6):\n    x = [x]\nrepr(x)"
    assert runner.run(deep, LIMITS).status in ("failed", "killed", "timeout")
    assert runner.run("(" * 100_000, LIMITS).status in ("failed", "killed")


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os, sys\nos.execv(sys.executable, ['python', '-c', ''])",
        "import atexit, os\natexit.register(os._exit, 0)\nimport sys\nsys.exit()",
    ],
)
def test_an_exit_code_of_zero_is_no_pass(runner: Runner, code: str) -> None:
    outcome = runner.run(f"{code}\nassert False", LIMITS)
    assert outcome == Outcome("failed", outcome.output, "ended before its last line")


# --- seen from outside ------------------------------------------------------------------------------------------------


def asleep() -> list[int]:
    """Sandboxed processes that run their answer, which sleeps: behind the filter, and with no descriptor of ours."""
    found = []
    for pid in processes():
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            files = sorted(os.listdir(f"/proc/{pid}/fd"))
            if "Seccomp:\t2" in status and "State:\tS" in status and files == ["0", "1", "2"]:
                found.append(pid)
    return found


def test_each_protection_seen_from_outside(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one protection hides from the answer because another stands before it, the kernel tells us about."""
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(runner.run, "import time\ntime.sleep(1000)", LIMITS)
        assert until(lambda: bool(asleep()))
        (pid,) = asleep()
        try:
            look_at(pid)
        finally:
            os.kill(pid, signal.SIGKILL)
        assert sleeping.result() == Outcome("killed", "", "ended by SIGKILL")


def look_at(pid: int) -> None:
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    assert status["Uid"].split() == status["Gid"].split() == [str(user)] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    for name in ("net", "pid", "mnt", "ipc", "uts", "cgroup"):
        assert os.readlink(proc / "ns" / name) != os.readlink(f"/proc/self/ns/{name}"), name
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max cpu time"] == ["1", "2"]
    assert limits["Max address space"] == [str(LIMITS.memory_mib << 20)] * 2
    assert limits["Max file size"] == [str(2 << 20)] * 2
    assert limits["Max processes"] == ["1", "1"]
    assert limits["Max open files"] == ["64", "64"]
    assert limits["Max core file size"] == limits["Max locked memory"] == limits["Max msgqueue size"] == ["0", "0"]
    assert os.getsid(pid) != os.getsid(0)
    assert b"hunter2" not in (proc / "environ").read_bytes()
    mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
    writable = {place for _, place, kind, options, *_ in mounts if "rw" in options.split(",")}
    assert writable <= {"/tmp", *sandbox.DEVICES}
    assert all("nosuid" in options.split(",") for _, _, _, options, *_ in mounts)


WAITING = """
import signal
from harness.quality import sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
limits = sandbox.Limits(cpu_s=1, wall_s=1000, memory_mib={memory}, files_mib=2)
sandbox.{name}().run("import time\\ntime.sleep(1000)", limits)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_us(runner: Runner, number: signal.Signals) -> None:
    """Ctrl-C, and an end that leaves no time to tidy up."""
    code = WAITING.format(memory=LIMITS.memory_mib, name=runner.name)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            assert until(lambda: bool(asleep()))
            process.send_signal(number)
            assert process.wait(20) != 0
            assert gone()
        finally:
            process.kill()
            for pid in processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# --- finding one ------------------------------------------------------------------------------------------------------


def test_bubblewrap_is_preferred_then_namespaces_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Runner(name, lambda limits: ["false"]) for name in ("first", "second"))
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: first)
    monkeypatch.setattr(sandbox, "namespaces", lambda: second)
    assert sandbox.find_runner() is first
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: None)
    assert sandbox.find_runner() is second
    monkeypatch.setattr(sandbox, "namespaces", lambda: None)
    assert sandbox.find_runner() is None


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_no_runner_where_none_was_tested(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    monkeypatch.setattr(sandbox.sys, "platform", system)
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: pytest.fail("was tried"))
    assert sandbox.find_runner() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
def test_a_runner_is_tried_before_it_is_offered() -> None:
    """One that is not there, one that does nothing, and one that locks the process but leaves it in this room."""
    for words in (["/nowhere/bwrap"], ["/bin/false"]):
        assert sandbox.tried(Runner("broken", lambda limits, words=words: words)) is None  # type: ignore[misc]
    no_room = Runner("no room", lambda limits: sandbox.interpreter(limits, None, {}))
    assert no_room.run("print(1)", LIMITS) == Outcome("passed", "1\n", "")
    assert sandbox.tried(no_room) is None


@pytest.mark.parametrize("more", [["--bind", "/", "/mnt"], ["--dir", "/home"]])
def test_a_room_with_more_in_it_is_not_offered(more: list[str]) -> None:
    program = shutil.which("bwrap")
    if program is None or sandbox.bubblewrap() is None:
        pytest.skip("no bubblewrap")

    def command(limits: Limits) -> list[str]:
        ours = sandbox.bubblewrap_command(program, limits)
        return [ours[0], *more, *ours[1:]]

    assert sandbox.tried(Runner("more", command)) is None


def test_a_room_that_cannot_be_built_is_an_error_and_no_outcome() -> None:
    if sys.platform != "linux":
        pytest.skip("the sandbox is Linux's")
    runner = Runner("broken", lambda limits: ["/bin/sh", "-c", "echo no namespaces >&2; exit 1"])
    with pytest.raises(RunError, match="no namespaces"):
        runner.run("print(1)", LIMITS)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, ("timeout", "ran longer than 20 s")),
        (inside.FINISHED, ("passed", "")),
        (inside.RAISED, ("failed", "KeyError: 'x'")),
        (inside.LEFT, ("failed", "ended before its last line")),
        (0, ("failed", "ended before its last line")),
        (128 + signal.SIGXCPU, ("timeout", "used more than 1 s of CPU time")),
        (128 + signal.SIGKILL, ("killed", "ended by SIGKILL")),
        (-signal.SIGTERM, ("killed", "ended by SIGTERM")),
        (255, ("killed", "ended by signal 127")),
    ],
)
def test_what_an_exit_code_means(returned: int | None, expected: tuple[str, str]) -> None:
    assert sandbox.verdict(returned, "Traceback\nKeyError: 'x'\n", LIMITS) == expected


def test_an_ordinary_user_has_both_runners_too(runner: Runner) -> None:
    """Where the tests run as root: the same for somebody else, with a Python that he may read."""
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    code = f"from harness.quality import sandbox\nprint(sandbox.{runner.name}() is not None)"
    words = ["/usr/bin/python3", "-B", "-c", code]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, user=1234, group=1234, extra_groups=[], env=environment, cwd="/", capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no Python 3.11 of the system, or not allowed to read the project: {done.stderr[-200:]}")
    assert done.stdout == "True\n"
