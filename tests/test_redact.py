from __future__ import annotations

import getpass
import socket
import tempfile
from pathlib import Path

import pytest

from harness.redact import redact


def test_paths_become_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ann"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    assert redact(f"log in {home}/work/results/x") == "log in <cwd>/results/x"
    assert redact(f"cache {home}/.cache") == "cache <home>/.cache"
    assert redact(f"{tempfile.gettempdir()}/vllm_dist_1") == "<tmp>/vllm_dist_1"
    assert redact(f"{home}abel/x") == f"{redact(str(tmp_path))}/annabel/x", "another user's directory is not ours"


def test_places_given_win_over_the_directories_that_hold_them(tmp_path: Path) -> None:
    model = tmp_path / "m"
    assert redact(f"model={model}, {model}/config.json", places={str(model): "<model>"}) == (
        "model=<model>, <model>/config.json"
    )


def test_a_place_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    text = redact(f"{tmp_path}/real/a {tmp_path}/link/a", places={str(tmp_path / "link"): "<model>"})
    assert text == "<model>/a <model>/a"


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "annas-tower")
    monkeypatch.setattr(getpass, "getuser", lambda: "annabel")
    assert redact("annabel@annas-tower: annabelle") == "<user>@<host>: annabelle"
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    assert redact("root cause") == "root cause", "an everyday word stays"


def test_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "verbosely")
    text = redact("abcdefgh12345 given-secret-1 verbosely", secrets=["given-secret-1"])
    assert text == "<key> <key> verbosely"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abc.DEF-123456", "Authorization: Bearer <key>"),
        ("token hf_abcdefghijklmnopqrst", "token <key>"),
        ("http://ann:pass@host/x", "http://<key>@host/x"),
        ("--api-key sekritsekrit --port 1", "--api-key <key> --port 1"),
        ("mq_connect_ip=192.168.7.20 (local), 127.0.0.1:80", "mq_connect_ip=<address> (local), 127.0.0.1:80"),
        ("vLLM 0.32.0 took 1.25 s", "vLLM 0.32.0 took 1.25 s"),
        ("max_tokens: 256, 1,024 tokens", "max_tokens: 256, 1,024 tokens"),
    ],
)
def test_shapes(text: str, clean: str) -> None:
    assert redact(text) == clean
