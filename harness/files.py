"""Files that are whole or not there, whatever happens while they are written; and no file but the one that is meant.

What a user names to be read is a file of some size, or is refused: reading a pipe or /dev/zero would never end.

A name in a directory of ours may be a link that somebody else has laid there (a directory in /tmp, a run unpacked from
an archive). What is written goes to that name and never through it: to ~/.bashrc, say.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

PARTIAL = ".partial"
"""What a file's name ends in until it is complete."""


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write it (text as UTF-8) under another name, make it durable, give it its own. A link of that name is replaced.

    Raises OSError and then leaves nothing.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # what a killed process has left, or somebody else has laid
        with open(_descriptor(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def opened(path: Path, *, append: bool = False, mode: int = 0o666) -> int:
    """The descriptor of a file to be written to, made where it is not there; emptied, or to be added to.

    Raises OSError where it is a link, whatever that leads to.
    """
    return _descriptor(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC), mode)


MOST_BYTES = 2**24
"""Of a file of settings: a thousand times what any of ours has."""


def readable(path: Path, most: int = MOST_BYTES) -> os.stat_result:
    """What the system tells of a file, before it is opened. Raises OSError for what is none, or has more than `most`
    bytes."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, and no file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, and {most:,} are the most", str(path))
    return found


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """UTF-8, with or without a byte order mark. Raises OSError as `readable` does, UnicodeDecodeError otherwise."""
    readable(path, most)
    return path.read_text(encoding="utf-8-sig")


def plain_name(name: str) -> str:
    """`name` as the name of a file: what would lead into another directory, or hides it, becomes a hyphen."""
    inside = "".join("-" if letter in "/\\\0" or not letter.isprintable() else letter for letter in name)
    return "-" + inside[1:] if inside.startswith(".") else inside or "-"


def _descriptor(path: Path, flags: int, mode: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
