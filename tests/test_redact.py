"""What leaves the machine without its paths, names and keys."""

from __future__ import annotations

import getpass
import json
import socket
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from harness.redact import hide, holds_key, redact, redacted, takes_key


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


def test_keys_from_the_environment_and_keys_that_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.redact._hidden", set())
    monkeypatch.setenv("MY_API_KEY", " abcdefgh12345\n")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "verbosely")
    assert redact("abcdefgh12345 given-secret-1 verbosely") == "<key> given-secret-1 verbosely"
    hide("given-secret-1", "EMPTY")
    assert redact("abcdefgh12345 given-secret-1 verbosely") == "<key> <key> verbosely"
    assert redact("key: EMPTY") == "key: EMPTY", "what stands for no key is no secret"
    assert holds_key("x abcdefgh12345"), "one that a user typed is refused"
    assert not holds_key("x given-secret-1"), "one that we took out of a URL is only hidden"


@pytest.mark.parametrize("key", ["abcDEF/123+456==", 'quo"ted-key-1', "back\\slash-key-1", "schlüssel-0815"])
def test_however_a_server_spells_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", key)
    spelled = [
        key,
        json.dumps({"said": key}),
        json.dumps({"said": key}).replace("/", "\\/").replace("+", "\\u002B"),
        f"http://h/?said={quote(key)}",
        f"http://h/?said={quote(key, safe='')}",
    ]
    for text in spelled:
        clean = redact(text)
        assert "<key>" in clean and "123" not in clean and "-1" not in clean and "0815" not in clean, text


def test_a_key_that_was_cut_with_the_text_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", "abcdefgh12345")
    assert redact("one: your key is abcdefgh12\ntwo abcdefgh123456") == "one: your key is <key>\ntwo <key>6"
    assert redact("abcdef-not and abcd") == "abcdef-not and abcd"


def test_our_own_name_is_no_key_and_what_a_cut_leaves_of_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.redact._hidden", {"kneebench-Rw8xQz31fGh5vB2nM7kL0pT4sY6uA9cE"})
    for text in ("--quantization kneebench", "kneebench", "made by kneebench-", "awq@kneebench\nnext"):
        assert redact(text) == text
    assert redact("key kneebench-Rw8xQz31") == "key <key>"
    assert redact("key kneebench-Rw8xQz\nnext") == "key <key>\nnext"


def test_numbers_stay_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "20261120")
    found = redacted({"seed": 20261120, "rate": 0.5, "note": "20261120", "list": ["a", ("20261120", None)], "on": True})
    assert found == {"seed": 20261120, "rate": 0.5, "note": "<key>", "list": ["a", ["<key>", None]], "on": True}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abc.DEF-123456", "Authorization: Bearer <key>"),
        ('{"authorization": "Basic dXNlcjpwYXNz"}', '{"authorization": "Basic <key>"}'),
        ("X-Api-Key: sekritsekrit", "X-Api-Key: <key>"),
        ("token hf_abcdefghijklmnopqrst", "token <key>"),
        ("runs/of-sk-proj-0123456789abcdef", "runs/of-<key>"),
        ("http://ann:pass@host/x", "http://<key>@host/x"),
        ("https://ghost-token@host/x", "https://<key>@host/x"),
        ("--api-key sekritsekrit --port 1", "--api-key <key> --port 1"),
        ("--hf-token=sekritsekrit", "--hf-token=<key>"),
        (
            "non-default args: {'api_key': ['sekritsekrit'], 'port': 1}",
            "non-default args: {'api_key': ['<key>'], 'port': 1}",
        ),
        ("kneebench-0123456789abcdefghijklmnopqrstuv", "<key>"),
        ("mq_connect_ip=192.168.7.20 (local), 127.0.0.1:80", "mq_connect_ip=<address> (local), 127.0.0.1:80"),
        # what only looks like one
        ("vLLM 0.32.0 took 1.25 s", "vLLM 0.32.0 took 1.25 s"),
        ("max_tokens: 256, 1,024 tokens", "max_tokens: 256, 1,024 tokens"),
        ("hf-internal-testing/tiny-random-LlamaForCausalLM", "hf-internal-testing/tiny-random-LlamaForCausalLM"),
        ("missing key: model.embed_tokens.weight", "missing key: model.embed_tokens.weight"),
        ("--max-num-batched-tokens 81920000", "--max-num-batched-tokens 81920000"),
        ("api_key=None, sk-learn-based-pipelines", "api_key=None, sk-learn-based-pipelines"),
    ],
)
def test_shapes(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean, "twice is once: a resumed run cleans its logs again"


@pytest.mark.parametrize("flag", ["--api-key", "--api_key", "--api-k", "--hf-token", "--some.password"])
def test_flags_that_take_a_key(flag: str) -> None:
    assert takes_key(flag)


@pytest.mark.parametrize("flag", ["--ssl-keyfile", "--max-num-batched-tokens", "--api-server-count", "--tokenizer"])
def test_flags_that_take_none(flag: str) -> None:
    assert not takes_key(flag)
