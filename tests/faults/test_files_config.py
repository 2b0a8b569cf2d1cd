"""Files that a user names and that are none, or none that can be read: every option that takes one says so and ends.

Each is given to the command line as it is. None may be waited for (a pipe without a writer, /dev/zero), be read to its
end because it is large, or end in a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_resume import refused

__all__ = ["refused"]
Refused = Callable[..., str]
MB = 1_000_000


def huge(path: Path) -> None:
    """100 MB without a single block on the disk."""
    with path.open("wb") as file:
        file.truncate(100 * MB)


def deep(path: Path) -> None:
    opened = b"[" * 100_000
    path.write_bytes(opened if path.suffix in (".json", ".jsonl") else b"x = " + opened)


FAULTS: dict[str, Callable[[Path], object]] = {
    "huge": huge,
    "deep": deep,
    "circle": lambda path: path.symlink_to(path.name),
    "directory": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "gone": lambda path: path.symlink_to("nowhere"),
    "utf-16": lambda path: path.write_bytes('name = "für viele"\n'.encode("utf-16")),
    "latin-1": lambda path: path.write_bytes('name = "für viele"\n'.encode("latin-1")),
    "nul": lambda path: path.write_bytes(b'name = "a\0b"\n'),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "empty": lambda path: path.touch(),
}
NOWHERE = ("--endpoint", "http://127.0.0.1:9", "--model", "m")
NAMED: dict[str, tuple[str, Callable[[Path], tuple[str, ...]]]] = {
    "scenario": ("f.toml", lambda path: ("--scenario", str(path), *NOWHERE)),
    "sweep file": ("f.toml", lambda path: (str(path),)),
    "assumptions": ("f.toml", lambda path: ("--assume", str(path), *NOWHERE)),
    "profile": ("f.toml", lambda path: ("--engine", "simulated", "--gpu", "l4", "--profile", str(path))),
    "cards": ("f.toml", lambda path: ("--engine", "simulated", "--gpu", f"{path}:x")),
    "trace": ("f.csv", lambda path: ("--scenario", str(scenario(path, "trace")), *NOWHERE)),
    "dataset": ("f.jsonl", lambda path: ("--scenario", str(scenario(path, "dataset")), *NOWHERE)),
    "dataset, json": ("f.json", lambda path: ("--scenario", str(scenario(path, "dataset")), *NOWHERE)),
    "config.json": ("config.json", lambda path: ("--model", str(path.parent))),
    "shape": ("f.json", lambda path: ("--model", f"shape:{path}")),
}
GOOD_WHEN_EMPTY = ("scenario", "sweep file", "assumptions")
"""All that they may say has a default."""


def scenario(path: Path, key: str) -> Path:
    file = path.with_name("scenario.toml")
    file.write_text(f'{key} = "{path.name}"\nslo_p95_s = 3.0\n')
    return file


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read(fault: str, refused: Refused, tmp_path: Path) -> None:
    """Of every option: exit code 2 before anything is begun; the message names the file."""
    for number, (named, (name, arguments)) in enumerate(NAMED.items()):
        if fault == "empty" and named in GOOD_WHEN_EMPTY:
            continue
        home = tmp_path / str(number)
        home.mkdir()
        path, out = home / name, home / "run"
        FAULTS[fault](path)
        said = refused(*arguments(path), "--out", str(out))
        assert said.startswith("error: ") and "Traceback" not in said, (named, said)
        assert name in said, (named, said)
        assert "\0" not in said and len(said) < 2000, named
        assert {entry.name for entry in home.iterdir()} <= {name, "scenario.toml"}, named


@pytest.mark.parametrize("key", ["trace", "dataset"])
def test_a_scenario_that_names_itself(key: str, refused: Refused, tmp_path: Path) -> None:
    """It is read as what it is named as, once, and is none."""
    path = tmp_path / "self.toml"
    path.write_text(f'{key} = "self.toml"\nslo_p95_s = 3.0\n')
    said = refused("--scenario", str(path), *NOWHERE)
    assert "self.toml" in said and "Traceback" not in said and "Allowed" in said, said


def test_a_byte_order_mark_is_no_fault(refused: Refused, tmp_path: Path) -> None:
    """An editor's mark before a good scenario is not seen: what is refused is the endpoint, where nobody listens."""
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbfslo_p95_s = 3.0\n")
    assert "does not answer" in refused("--scenario", str(path), *NOWHERE)
