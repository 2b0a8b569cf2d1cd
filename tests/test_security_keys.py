"""Where a key may come from, and that nobody sees it: in `ps`, a traceback, a core dump, a stranger's file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import keys, redact
from harness.cli import main
from harness.errors import InputError
from harness.keys import endpoint_key, read_key

KEY = "sesame/Open+0123456789=="
Truth = Callable[..., str]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the surroundings, and none that an earlier test has hidden."""
    monkeypatch.setattr(redact, "_hidden", set())
    for name in keys.OURS:
        monkeypatch.delenv(name, raising=False)


def key_file(path: Path, content: str | bytes = f"{KEY}\n", mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


# --- files with a key -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_for_its_owner_alone(tmp_path: Path, mode: int) -> None:
    assert read_key(key_file(tmp_path / "key", mode=mode), "--api-key-file") == KEY
    assert redact.redact(f"said {KEY}") == "said <key>", "and from now on nothing says it"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o601, 0o777])
def test_a_file_that_others_may_use(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InputError, match=f"mode {mode:04o}") as caught:
        read_key(key_file(tmp_path / "key", mode=mode), "--api-key-file")
    assert caught.value.exit_code == 2 and "chmod 600" in str(caught.value) and KEY not in str(caught.value)


def test_what_is_no_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(key_file(tmp_path / "key"))
    os.mkfifo(tmp_path / "pipe", 0o600)  # which would be waited for
    for name, why in (("link", "symbolic link"), ("pipe", "no regular"), (".", "no regular"), ("none", "No such file")):
        with pytest.raises(InputError, match=why):
            read_key(tmp_path / name, "--api-key-file")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InputError, match="another user"):
        read_key(tmp_path / "key", "--api-key-file")


@pytest.mark.parametrize(
    "content",
    ["", " \n", f"{KEY} {KEY}", f"KEY={KEY}\nOTHER={KEY}", "ключ-0123456789", b"\xff\xfe" + KEY.encode(), "k" * 4097],
    ids=["empty", "blank", "two words", "a .env", "not ascii", "utf-16", "long"],
)
def test_a_file_that_holds_something_else(tmp_path: Path, content: str | bytes) -> None:
    """A private key or a .env file must not go to a server as a header, whoever has laid the name."""
    with pytest.raises(InputError) as caught:
        read_key(key_file(tmp_path / "key", content), "--api-key-file")
    assert KEY not in str(caught.value) and "--api-key-file" in str(caught.value)


def test_a_key_typed_where_its_file_is_wanted_is_not_repeated() -> None:
    with pytest.raises(InputError, match="--api-key-file") as caught:
        read_key(Path("unheard-of-by-anybody"), "--api-key-file")
    assert "unheard" not in str(caught.value)


# --- which key goes where ---------------------------------------------------------------------------------------------


def test_the_first_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option, named = key_file(tmp_path / "a", "from-the-option"), key_file(tmp_path / "b", "from-the-named-file")
    assert endpoint_key("h", loopback=False) is None
    monkeypatch.setenv("KNEEBENCH_API_KEY_FILE", str(named))
    assert endpoint_key("h", loopback=False) == "from-the-named-file"
    monkeypatch.setenv("KNEEBENCH_API_KEY", "from-the-variable\n")
    assert endpoint_key("h", loopback=False) == "from-the-variable"
    assert endpoint_key("h", loopback=False, file=option) == "from-the-option"


@pytest.mark.parametrize(
    ("host", "loopback", "sent"),
    [
        ("127.0.0.1", True, True),
        ("api.openai.com", False, True),
        ("10.0.0.7", False, False),
        ("notopenai.com", False, False),
        ("openai.com.evil.example", False, False),
    ],
)
def test_a_key_for_openai_goes_to_no_stranger(
    monkeypatch: pytest.MonkeyPatch, host: str, loopback: bool, sent: bool
) -> None:
    """Many a shell has OPENAI_API_KEY set for other programs; `--endpoint http://somebody` must not get it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert endpoint_key(host, loopback=loopback) == (KEY if sent else None)


def test_the_name_of_a_key_file_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY_FILE", "/somewhere/the-file")
    assert redact.without_keys("/somewhere/the-file") == "/somewhere/the-file"


def test_an_engine_gets_none_of_them() -> None:
    assert keys.without_ours({"PATH": "/bin", "HF_TOKEN": "t", **dict.fromkeys(keys.OURS, KEY)}) == {
        "PATH": "/bin", "HF_TOKEN": "t",
    }  # fmt: skip


# --- while a sweep runs -----------------------------------------------------------------------------------------------


def test_no_command_line_of_a_sweep_shows_the_key(truth: Truth, tmp_path: Path) -> None:
    """Every process that the sweep starts is looked at as `ps` sees it, a hundred times a second, and the run after."""
    path, out = key_file(tmp_path / "key"), tmp_path / "run"
    scenario = tmp_path / "s.toml"
    scenario.write_text("input_tokens = 12\noutput_tokens = 6\nrequests = 30\nmin_window_s = 0.5\n")
    url = truth("--ttft-ms", "5", "--gap-ms", "1", "--echo-auth", "--every", "7")
    command = [sys.executable, "-m", "harness", "sweep", "--endpoint", url, "--model", "truth", "--conc", "2"]
    process = subprocess.Popen(
        [*command, "--scenario", str(scenario), "--out", str(out), "--api-key-file", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    while process.poll() is None:
        tree = [psutil.Process(process.pid)]
        try:
            tree += tree[0].children(recursive=True)
            seen |= {" ".join(one.cmdline()) for one in tree}
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.01)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert any("harness.load.worker" in line for line in seen), "the generator was looked at"
    assert not any(KEY in line for line in seen) and KEY not in said
    files = [file for file in out.rglob("*") if file.is_file()]
    assert "your header is Bearer <key>" in (out / "requests.csv").read_text(), "it was sent"
    assert len(files) >= 5 and not any(KEY.encode() in file.read_bytes() for file in files)
    assert str(tmp_path) not in (out / "environment.json").read_text(), "nor where the key lies"


def test_a_key_file_needs_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["sweep"], ["failures"]):
        monkeypatch.setattr(sys, "argv", ["bench", *command, "--api-key-file", str(key_file(tmp_path / "key"))])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and "--api-key-file without --endpoint" in capsys.readouterr().err


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_a_traceback_holds_no_key_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that nobody expected, with the key in its words, in those of its cause, and in its line of source."""

    def fails(*_: object, **__: object) -> None:
        try:
            raise ValueError(f"Authorization: Bearer {KEY}")
        except ValueError as cause:
            raise RuntimeError(f"{KEY} at {Path.home()}\x1b[31m") from cause

    monkeypatch.setenv("KNEEBENCH_API_KEY", KEY)
    monkeypatch.setattr("harness.history.history", fails)
    monkeypatch.setattr(sys, "argv", ["bench", "history", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" in said and "in fails" in said
    assert "Bearer <key>" in said and "RuntimeError: <key> at <home>⟨U+001B⟩[31m" in said
    assert KEY not in said and "\x1b" not in said and str(Path.cwd()) not in said


def test_a_traceback_of_a_thread(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", KEY)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    redact.tell_errors_redacted()

    def fails() -> None:
        raise OSError(f"no {KEY}")

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    assert "OSError: no <key>" in capsys.readouterr().err


def test_a_usage_error_repeats_no_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", KEY)
    for typed in (["sweep", "--repeats", KEY], ["history", "a", KEY], [KEY]):
        monkeypatch.setattr(sys, "argv", ["bench", *typed])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and "Usage" in said.err and KEY not in said.out + said.err
        assert "--repeats" in typed or "<key>" in said.err


def test_no_core_dump_of_a_process_that_may_hold_a_key() -> None:
    code = "import resource, subprocess, sys\nfrom harness.keys import forbid_core_dumps\nforbid_core_dumps()\n"
    child = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    code += f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)),
    )  # fmt: skip
    assert done.stdout == "0\n", "what it starts inherits it"


def test_the_key_file_is_remembered_for_a_resume_and_not_recorded(truth: Truth, tmp_path: Path) -> None:
    path, out = key_file(tmp_path / "key"), tmp_path / "run"
    url = truth("--ttft-ms", "5", "--gap-ms", "1", "--error-after", "2")
    command = [sys.executable, "-m", "harness", "sweep", "--endpoint", url, "--model", "truth", "--conc", "1"]
    done = subprocess.run(
        [*command, "--requests", "20", "--out", str(out), "--api-key-file", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 1, "every request fails, so the run stays unfinished"
    assert json.loads((out / ".unfinished.json").read_text())["api_key_file"] == str(path)
    assert (out / ".unfinished.json").stat().st_mode & 0o777 == 0o600
    assert "key_file" not in (out / "run.toml").read_text()
