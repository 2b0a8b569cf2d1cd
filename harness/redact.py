"""Takes machine paths, names and keys out of text that leaves the machine: engine logs, environment records, reports.

A results directory is meant to be committed and shown; where it was measured is nobody's business but its owner's.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

# Values of environment variables named like this are secrets; so is whatever stands where a key usually stands.
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SECRET_SHAPES = (
    re.compile(r"(?<=bearer )[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"\b(?:sk|hf|ghp|gho|glpat)[-_][\w-]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?<=[-_]key[= ])[\w.-]{8,}", re.IGNORECASE),
)
_SHORTEST_SECRET = 8
_ADDRESS = re.compile(r"(?<![\w.])(?!127\.|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
# A name shorter than this, or one of these, is an everyday word: replacing it would maim the text and hide nothing.
_SHORTEST_NAME = 4
_EVERYDAY = frozenset({"root", "user", "admin", "localhost", "runner", "ubuntu", "vllm", "server", "model"})


def redact(text: str, *, secrets: Iterable[str] = (), places: Mapping[str, str] | None = None) -> str:
    """`text` with paths, network addresses, user name, host name and keys replaced by <placeholders>.

    `secrets` are replaced wherever they stand, and so are the values of environment variables named like secrets.
    `places` are further paths with their placeholders: {"/data/models/m": "<model>"}.
    """
    for secret in sorted({*secrets, *_environment_secrets()}, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "<key>")
    for shape in _SECRET_SHAPES:
        text = shape.sub("<key>", text)
    for path, placeholder in _longest_first({**_machine_places(), **(places or {})}):
        # A place ends where the path does: /home/ann must not eat into /home/annabel.
        text = re.sub(re.escape(path) + r"(?![\w-])", placeholder, text)
    for name, placeholder in _names().items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", placeholder, text)
    return _ADDRESS.sub("<address>", text)


def _environment_secrets() -> set[str]:
    return {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}


def _machine_places() -> dict[str, str]:
    return {
        str(Path.home()): "<home>",
        tempfile.gettempdir(): "<tmp>",
        str(Path(__file__).resolve().parents[1]): "<kneebench>",
        sys.prefix: "<env>",
        str(Path.cwd()): "<cwd>",
    }


def _longest_first(places: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each place as written and with symbolic links followed; inner places before those that hold them."""
    both = {os.path.realpath(path): placeholder for path, placeholder in places.items()} | dict(places)
    return sorted(((path, mark) for path, mark in both.items() if len(path) > 1), key=lambda item: -len(item[0]))


def _names() -> dict[str, str]:
    names = {socket.gethostname(): "<host>"}
    try:
        names[getpass.getuser()] = "<user>"
    except (OSError, KeyError):  # a container's user may have no name
        pass
    return {n: mark for n, mark in names.items() if len(n) >= _SHORTEST_NAME and n.lower() not in _EVERYDAY}
