"""What runs inside the sandbox, before the answer and around it. sandbox.py hands this text to `python -c`.

    build_room()  only where bubblewrap does not: own namespaces, and a root directory that holds Python and no more
    lock()        nobody instead of root, no capabilities, no new ones, limits, and a filter of system calls
    run(answer)   read from standard input only now, when nothing can be unlocked any more

It imports nothing but the standard library, because nothing else is in the room. Whatever it cannot do is an OSError
and the end: an answer never starts in a room that is not locked.
"""

from __future__ import annotations

import ctypes
import errno
import json
import linecache
import os
import resource
import signal
import struct
import sys
import traceback
import types
from typing import NamedTuple

FINISHED, RAISED, LEFT = 90, 91, 92
"""Exit codes: the answer ran to its end; it raised; it asked to be ended. An answer that ends itself has others."""
NOBODY = 65534
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""os.uname().machine: its AUDIT_ARCH (linux/audit.h), and its column in REFUSED."""

NONE = -1
REFUSED = {
    # Further processes and threads: a limit alone does not hold root, and counts the user's other processes.
    "clone": (56, 220),
    "fork": (57, NONE),
    "vfork": (58, NONE),
    "clone3": (435, 435),
    # Sockets: vsock, netlink and the kernel's crypto are not, or not wholly, behind a network namespace.
    "socket": (41, 198),
    # Memory that no limit of this process counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # Other processes, and keys.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Rooms within the room: user namespaces open most of the kernel's flaws.
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # Large doors into the kernel that no test of a function needs.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
"""System calls that fail with EPERM: (x86_64, aarch64), from the kernel's syscall_64.tbl and asm-generic/unistd.h."""

ROOM = "/proc"
"""Where the new root is put together: a directory that is everywhere and that nothing is bound from."""
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
CLONE_NEWUSER = 0x10000000
CLONE_REST = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Namespaces of mounts, cgroups, host name, IPC, processes and network."""
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
CAPABILITY_VERSION_3 = 0x20080522


class Order(NamedTuple):
    """What sandbox.py asks for. `binds` is None where bubblewrap has built the room."""

    cpu_s: int
    memory_mib: int
    files_mib: int
    binds: list[str] | None
    links: dict[str, str]


def call(name: str, *arguments: object) -> int:
    """A function of the C library. Raises OSError where it returns -1."""
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def leave_host() -> None:
    """Namespaces of our own. As root they belong to root, who then becomes nobody; a user needs a user namespace too,
    in which being nobody is a name for the user, and which has the right to mount."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_REST | (CLONE_NEWUSER if user else 0))
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_room(binds: list[str], links: dict[str, str], files_mib: int) -> None:
    """A root directory that holds `binds`, read-only, `links`, and an empty /tmp of a limited size; nothing else."""
    call("sethostname", b"sandbox", 7)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.umask(0o022)
    for path in binds:
        os.makedirs(ROOM + os.path.dirname(path), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(ROOM + path)
        else:
            os.close(os.open(ROOM + path, os.O_CREAT | os.O_EXCL))
        mount(path, ROOM + path, "", MS_BIND | MS_REC)
    for path, target in links.items():
        os.symlink(target, ROOM + path)
    os.mkdir(ROOM + "/tmp")
    os.chdir(ROOM)
    call("pivot_root", b".", b".")  # the old root is now mounted over the new one, and goes
    call("umount2", b".", MNT_DETACH)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={files_mib}m,nr_inodes=4096,mode=1777")
    os.chdir("/tmp")


def drop_rights() -> None:
    """Root becomes nobody, whom limits hold; then no capabilities, and none through a program of another owner."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(order: Order) -> None:
    """Resource limits; no soft limit below its hard one but that of CPU time, whose signal tells why it ended."""
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, order.cpu_s, order.cpu_s + 1),
        (resource.RLIMIT_AS, order.memory_mib << 20, order.memory_mib << 20),
        (resource.RLIMIT_STACK, 8 << 20, 8 << 20),
        (resource.RLIMIT_FSIZE, order.files_mib << 20, order.files_mib << 20),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 1, 1),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        most = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, most), most))


def refuse_calls() -> None:
    """REFUSED as a seccomp filter (classic BPF). Another machine's call numbers are the end of the process."""
    architecture, column = MACHINES[os.uname().machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 1 << 30), (give, 0, 0, kill)]  # x32: the same calls under other numbers
    for numbers in REFUSED.values():
        if numbers[column] != NONE:
            steps += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    steps.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def lock(order: Order) -> None:
    """Everything that the process does to itself. Nothing of it can be taken back."""
    drop_rights()
    limit(order)
    refuse_calls()


def take_answer() -> bytes:
    """All of standard input, which is then empty. sandbox.py sees that it was read, and so that the room was locked."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    with os.fdopen(0, "rb", closefd=False) as file:
        answer = file.read()
    os.dup2(nothing, 0)
    os.closerange(3, 64)
    return answer


def run(answer: bytes) -> int:
    """Runs the answer as a module that is not `__main__`, so that a demonstration at its end stays asleep."""
    linecache.cache["answer.py"] = (len(answer), None, answer.decode("utf-8", "replace").splitlines(True), "answer.py")
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    sys.argv = ["answer.py"]
    os.environ.clear()
    try:
        exec(compile(answer, "answer.py", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        return FINISHED
    except SystemExit:
        return LEFT
    except BaseException as error:
        inner = error.__traceback__.tb_next if error.__traceback__ else None
        sys.stdout.flush()
        traceback.print_exception(error.with_traceback(inner))
        return RAISED


def follow(child: int) -> None:
    """Waits for the child and ends as it did, a signal as 128 + its number."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    """Where bubblewrap has built the room, this is its second process. Else: this, init of the new room, its second."""
    order = Order(*json.loads(sys.argv[1]))
    if order.binds is not None:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        leave_host()
        if child := os.fork():
            follow(child)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # init gets no signal from inside that it has no handler for
        build_room(order.binds, order.links, order.files_mib)
        drop_rights()
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # becoming nobody forgot it
        if child := os.fork():
            follow(child)
    lock(order)
    code = run(take_answer())
    os._exit(code)


if __name__ == "__main__":
    main()
