"""Names and links lead nowhere else: what a run writes lies in its directory, and what it reads in the checkpoint's."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from harness import models
from harness.engines.vllm import _start
from harness.errors import InputError, ModelError
from harness.files import opened, plain_name, write_whole
from harness.records import SweepPoint, TableWriter
from harness.rundir import UNFINISHED, RunDirectory, fresh, locked, remembered, run_name, unlock

HOSTILE = ("../../x", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "-rf")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("as it was")
    return path


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_from_outside_is_the_name_of_one_file(tmp_path: Path, name: str) -> None:
    plain = plain_name(name)
    assert plain and Path(plain).name == plain and not plain.startswith(".") and plain.isprintable()
    assert fresh(tmp_path, name, ".log").parent == tmp_path
    assert fresh(tmp_path, f"engine-{name}-r1", ".log").parent == tmp_path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_is_named_inside_of_results(name: str) -> None:
    named = run_name(name, name, datetime(2026, 11, 22))
    assert named == Path(named).name and named.startswith("20261122-000000-") and named.isprintable()
    assert len(run_name("m" * 999, "s" * 999, datetime(2026, 11, 22))) < 200, "a file system has an end"


@pytest.mark.parametrize("name", ["../m", "..", "/m", ".m", "-m", "a/b", "a b"])
def test_precisions_that_are_no_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="--precisions"):
        models.precision(f"{name}={tmp_path}", ("bf16",))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", 7, None])
def test_an_index_that_leads_out_of_its_checkpoint(tmp_path: Path, name: object) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="as a file of weights"):
        models.weight_files(model)


def test_a_checkpoint_may_be_made_of_links(tmp_path: Path) -> None:
    """The hub's cache is: snapshots link to blobs. They are read through, and never written to."""
    (tmp_path / "blob").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "snapshot" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert models.weight_files(tmp_path / "snapshot") == (tmp_path / "snapshot" / "model.safetensors",)


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_in_place_of_a_link(tmp_path: Path, victim: Path) -> None:
    for link in ("run.toml", "run.toml.partial"):
        (tmp_path / link).symlink_to(victim)
    write_whole(tmp_path / "run.toml", "ours")
    assert victim.read_text() == "as it was" and (tmp_path / "run.toml").read_text() == "ours"
    assert not (tmp_path / "run.toml").is_symlink() and not (tmp_path / "run.toml.partial").exists()


def test_a_file_that_holds_secrets_is_never_open_to_others(tmp_path: Path) -> None:
    """Also where a killed process, or a stranger, has left one of that name that is open to all."""
    (tmp_path / "f.partial").touch(mode=0o666)
    write_whole(tmp_path / "f", "text", mode=0o600)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("append", [True, False])
def test_nothing_is_added_to_what_a_link_leads_to(tmp_path: Path, victim: Path, append: bool) -> None:
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name in ("link", "dangling"):
        with pytest.raises(OSError):
            opened(tmp_path / name, append=append)
    assert victim.read_text() == "as it was" and not (tmp_path / "new").exists()


def test_links_laid_in_a_run_directory(tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("requests.csv", ".lock", "engine-bf16-r1.log", "page.md"):
        (run / name).symlink_to(victim)
    with pytest.raises(InputError, match="cannot be written"):
        locked(run)
    (run / ".lock").unlink()
    unlock(run, locked(run))
    victim.write_text("")  # a table that is empty would be begun
    with pytest.raises(OSError):
        TableWriter(run / "requests.csv", SweepPoint)
    with pytest.raises(OSError):
        _start(["/bin/echo", "said"], os.environ, run / "engine-bf16-r1.log")
    assert victim.read_text() == ""
    write_whole(run / "page.md", "page")
    assert victim.read_text() == "" and not (run / "page.md").is_symlink()


def test_an_engines_log_is_its_owners_until_it_is_redacted(tmp_path: Path) -> None:
    process = _start(["/bin/echo", "my key is ..."], os.environ, tmp_path / "engine.log")
    process.wait()
    assert (tmp_path / "engine.log").stat().st_mode & 0o777 == 0o600


# --- a resume does what it reads --------------------------------------------------------------------------------------


def test_only_ones_own_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.unfinished.json` says which Python to start an engine from: another user's would be run as us."""
    with RunDirectory(tmp_path) as directory:
        directory.remember({"engine_python": "/bin/true"})
    file = tmp_path / UNFINISHED
    assert file.stat().st_mode & 0o777 == 0o600
    assert remembered(tmp_path) == {"engine_python": "/bin/true"}
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(InputError, match="others may write it"):
            remembered(tmp_path)
    file.chmod(0o600)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(InputError, match="another user's"):
            remembered(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        remembered(tmp_path)
