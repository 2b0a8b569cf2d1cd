"""Takes machine paths, names and keys out of text that leaves the machine: engine logs, records, errors, reports.

A results directory is meant to be committed and shown; where it was measured is nobody's business but its owner's.
A key is known because somebody told (`hide`), by the name of the environment variable that holds it, or by its shape.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.errors import InputError
from harness.inert import visible

# Values of environment variables named like this are secrets; so is whatever stands where a key usually stands.
_SECRET_NAME = re.compile(
    r"API_?KEY|(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_PAT|KNEEBENCH_DOOR)$", re.IGNORECASE
)
_VALUE = r"""[^\s"'\[\](){},;&<>]{8,}"""
_SECRET_SHAPES = (
    re.compile(r"(bearer(?:\s+|%20))[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"(?<![A-Za-z0-9])()(?:sk-(?=[\w-]{0,200}?\d)[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}"
        r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abpr]-[\w-]{10,}|(?:gsk_|nvapi-|xai-|pplx-)[\w-]{16,}"
        r"|AIza[\w-]{30,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,2000}\.[\w-]{8,}\.[\w-]{8,}|kneebench-[\w-]{32})"
    ),
    re.compile(r"(://)[^/\s@]+(?=@)"),
    re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?)" + _VALUE, re.IGNORECASE),
    re.compile(
        r"((?:(?:api|access|secret|auth|private)[-_ ]?key|(?:access|auth|hf|api|refresh|session)[-_ ]?token"
        r"|client[-_ ]?secret|passw(?:or)?d)[\"']?\s*[:=]\s*[\[\"']*)" + _VALUE,
        re.IGNORECASE,
    ),
    re.compile(r"(--[\w-]{0,60}?(?:key|token|secret|password)[\s=]+)" + _VALUE, re.IGNORECASE),
)
"""What is in front of the key is the first group, and stays."""
_SHORTEST_SECRET = 6
"""EMPTY, none, test: what stands for a key where none is wanted is no secret, and common words must stay readable."""
_OUR_KEYS = "kneebench-"
"""How the keys begin that engines/vllm.py makes."""
_hidden: set[str] = set()

_ADDRESS = re.compile(r"(?<![\w.])(?!127\.|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
# A name shorter than this, or one of these, is an everyday word: replacing it would maim the text and hide nothing.
_SHORTEST_NAME = 4
_EVERYDAY = frozenset({"root", "user", "admin", "localhost", "runner", "ubuntu", "vllm", "server", "model"})


def hide(*secrets: str) -> None:
    """From now on these are keys, wherever they stand."""
    _hidden.update(secrets)


def redact(text: str, places: Mapping[str, str] | None = None) -> str:
    """`text` with paths, network addresses, user name, host name and keys replaced by <placeholders>.

    `places` are further paths with their placeholders: {"/data/models/m": "<model>"}.
    """
    text = without_keys(text)
    for path, placeholder in _longest_first({**_machine_places(), **(places or {})}):
        # A place ends where the path does: /home/ann must not eat into /home/annabel.
        text = re.sub(re.escape(path) + r"(?![\w-])", placeholder, text)
    for name, placeholder in _names().items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", placeholder, text)
    return _ADDRESS.sub("<address>", text)


def redacted(value: Any) -> Any:
    """The same for every string inside of mappings and sequences: numbers stay numbers, whatever a key looks like."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redacted(item) for name, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def without_keys(text: str) -> str:
    """`text` with every key that is known or looks like one replaced by <key>."""
    return _without(text, _hidden | _environment_secrets())


def holds_key(text: str) -> bool:
    """Whether somebody's key stands in it, by what the environment holds or by its looks."""
    return _without(text, _environment_secrets()) != text


def told(error: BaseException) -> str:
    """The traceback of what nobody expected, fit to be shown to others: without keys and places, and inert."""
    return visible(redact("".join(traceback.format_exception(error))))


def tell_errors_redacted() -> None:
    """Have Python tell errors that nothing caught so, of this thread and of all others."""

    def tell(_: type[BaseException], error: BaseException, __: object) -> None:
        print(told(error), file=sys.stderr, end="")

    def tell_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
            print(told(failed.exc_value), file=sys.stderr, end="")

    sys.excepthook, threading.excepthook = tell, tell_thread


def takes_key(flag: str) -> bool:
    """Whether the value of a flag with this name is a key: --api-key, --hf-token."""
    return bool(_SECRET_NAME.search(flag.replace("-", "_")) or re.match(r"--api[-_]k", flag))


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            for spelled in _spellings(secret):
                text = text.replace(spelled, "<key>")
            text = _without_beginning(text, secret)
    for shape in _SECRET_SHAPES:
        text = shape.sub(r"\1<key>", text)
    return text


def _environment_secrets() -> set[str]:
    """By their variables' names. A variable that says where a key lies holds none."""
    return {
        value.strip()
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and not name.upper().endswith(("_FILE", "_PATH"))
    }


def _spellings(secret: str) -> list[str]:
    """As it is, inside of JSON (two ways: some escape more than they must), inside of a URL."""
    escaped = json.dumps(secret)[1:-1]
    more = escaped.replace("/", "\\/").replace("+", "\\u002B")
    return sorted({secret, escaped, more, quote(secret), quote(secret, safe="")}, key=len, reverse=True)


def _without_beginning(text: str, secret: str) -> str:
    """A server's words are cut to a length, and the cut may go through a key: what is left of it stands at the end.

    The name that our own keys begin with is no part of the secret: it stands in many a line.
    """
    known = len(_OUR_KEYS) if secret.startswith(_OUR_KEYS) else 0
    pattern = re.escape(secret[: known + _SHORTEST_SECRET])
    return re.sub(
        rf"{pattern}\S*$", lambda found: "<key>" if secret.startswith(found[0]) else found[0], text, flags=re.MULTILINE
    )


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


def refuse_keys(typed: Mapping[str, Iterable[object]], engine_args: Iterable[str] = ()) -> None:
    """Raise InputError for a key in what was typed, option by option, or in what is passed on to vLLM: it would be
    recorded, and command lines show in `ps` besides."""
    for option, values in typed.items():
        if any(holds_key(str(value)) for value in values):
            raise InputError(
                f"{option} holds a key",
                allowed="keys in environment variables or a file of yours, where no record and no `ps` shows them",
                remedy="KNEEBENCH_API_KEY takes an endpoint's key (or --api-key-file), HF_TOKEN the hub's; vLLM gets a "
                "new one each time",
            )
    for item in engine_args:
        flag = item.partition("=")[0].partition(" ")[0]
        if flag.startswith("--") and takes_key(flag):
            raise InputError(
                f"--engine-arg {flag}: its value is a key",
                allowed="flags without secrets: they are recorded, and `ps` shows them",
                remedy="leave it out, vLLM gets a new key each time; the hub's goes into HF_TOKEN",
            )
