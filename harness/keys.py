"""Where an endpoint's key may come from, and who may have it. No option takes a key: `ps` and histories show options.

    --api-key-file PATH      a file that its owner alone can read
    KNEEBENCH_API_KEY        the key itself
    KNEEBENCH_API_KEY_FILE   as the option
    OPENAI_API_KEY           only for openai.com and for servers on this machine

The first of them that is there is the one that is used. What is read from a file is hidden from then on, as a key in an
environment variable is by its name (redact.py).
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Mapping
from pathlib import Path

from harness.errors import InputError
from harness.redact import hide

KEY, KEY_FILE, OPENAI_KEY = "KNEEBENCH_API_KEY", "KNEEBENCH_API_KEY_FILE", "OPENAI_API_KEY"
OURS = (KEY, KEY_FILE, OPENAI_KEY)
"""Environment variables that a server which we start has no use for."""
LONGEST = 4096
"""Bytes of a key file. Keys have some hundred; a larger file is another one, and is not read."""
_HOW = "install -m 600 /dev/null FILE, then write the key into it with an editor"


def endpoint_key(host: str, *, loopback: bool, file: Path | None = None) -> str | None:
    """The key for a server, None for none. Raises InputError for one that cannot be used, without repeating it."""
    if file is not None:
        return read_key(file, "--api-key-file")
    if key := _from_environment(KEY):
        return key
    if named := os.environ.get(KEY_FILE, "").strip():
        return read_key(Path(named), KEY_FILE)
    # It is set for another purpose than this; whoever runs `host` must not get it unasked.
    return _from_environment(OPENAI_KEY) if loopback or _is_openai(host) else None


def read_key(path: Path, option: str) -> str:
    """The key in a regular file of ours that nobody else may read or write.

    What is checked is the file that was opened, whatever its name leads to a moment later. Raises InputError.
    """
    path = path.expanduser()
    try:
        # Neither through a link, which somebody else may have laid, nor waiting for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        link = getattr(error, "errno", None) == errno.ELOOP
        why = "is a symbolic link" if link else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise _unusable(option, why, "name the file itself" if link else _HOW) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _unusable(option, "is no regular file", _HOW)
        if found.st_uid != os.geteuid():
            raise _unusable(option, "belongs to another user", "copy it into a file of your own")
        if found.st_mode & 0o077:
            raise _unusable(option, f"has mode {stat.S_IMODE(found.st_mode):04o}: others may use it", "chmod 600 FILE")
        content = os.read(descriptor, LONGEST + 1)
    finally:
        os.close(descriptor)
    if len(content) > LONGEST:
        raise _unusable(option, f"holds more than {LONGEST} bytes", "leave nothing in it but the key")
    try:
        key = _checked(content.decode("ascii").strip())
    except ValueError:
        raise _unusable(option, "holds more than one word of printable ASCII", "leave only the key in it") from None
    if not key:
        raise _unusable(option, "is empty", "write the key into it")
    hide(key)
    return key


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a program that speaks to no endpoint of ours: a server, which runs the code of many others."""
    return {name: value for name, value in environment.items() if name not in OURS}


def forbid_core_dumps() -> None:
    """A crash of this process, or of what it starts, leaves no image of its memory on the disk: it holds keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _from_environment(name: str) -> str | None:
    """Without the line end that `$(cat FILE)` in other shells than sh leaves, or a file with variables."""
    try:
        return _checked(os.environ.get(name, "").strip()) or None
    except ValueError:
        raise InputError(
            f"{name} holds characters that an HTTP header cannot carry",
            allowed="printable ASCII, without a space",
            remedy="set it again, to the key alone",
        ) from None


def _checked(key: str) -> str:
    """Raises ValueError for what no header carries as a token, a private key or a whole .env file above all."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError
    return key


def _is_openai(host: str) -> bool:
    return host == "openai.com" or host.endswith(".openai.com")


def _unusable(option: str, why: str, remedy: str) -> InputError:
    """Without the name: whoever mistakes the option for one that takes the key has typed it there."""
    return InputError(f"{option}: the file {why}", allowed="a file of yours with mode 0600 or 0400", remedy=remedy)
