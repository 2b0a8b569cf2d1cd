"""Attaching to a server that runs: a small one, here, on a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.engines.address import Address
from harness.engines.endpoint import attach
from harness.errors import EngineError, InputError

KEY = "right-key-123"
METRICS = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_bytes()


class Handler(BaseHTTPRequestHandler):
    pages = {
        "/v1/models": json.dumps({"data": [{"id": "alpha"}, {"id": "beta"}]}).encode(),
        "/one/v1/models": json.dumps({"data": [{"id": "only"}]}).encode(),
        "/html/v1/models": b"<html>hello</html>",
        "/version": b'{"version": "0.32.0"}',
        "/metrics": METRICS,
    }

    def do_GET(self) -> None:
        body = self.pages.get(self.path, b"")
        status = 200 if body else 404
        if self.path.startswith("/v1/") and self.headers["Authorization"] != f"Bearer {KEY}":
            status, body = 401, b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("KNEEBENCH_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_attach(url: str) -> None:
    with attach(url + "/v1/", "beta") as engine:
        assert engine.target.base_url == url
        assert engine.target.model == "beta"
        assert engine.target.api_key == KEY and KEY not in repr(engine.target)
        assert (engine.info.source, engine.info.engine_version) == ("endpoint", "0.32.0")
        assert engine.counters().generation_tokens_total == 134
        assert engine.memory_gib() is None
        engine.check()


def test_model_may_be_left_out_where_there_is_one(url: str) -> None:
    with attach(url + "/one") as engine:
        assert engine.target.model == "only"
        assert engine.counters().running is None, "no counters there: None, not 0"


def test_unknown_model_names_those_offered(url: str) -> None:
    for model in ("gamma", None):
        with pytest.raises(InputError, match="Allowed: alpha, beta") as caught, attach(url, model):
            pass
        assert caught.value.exit_code == 2


def test_wrong_key_names_the_variable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", "wrong")
    with pytest.raises(InputError, match="KNEEBENCH_API_KEY"), attach(url, "alpha"):
        pass
    monkeypatch.delenv("KNEEBENCH_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with attach(url, "alpha") as engine:
        assert engine.target.api_key == KEY


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [("http://bench.invalid", KEY, True), ("https://bench.invalid", KEY, False), ("http://bench.invalid", "", False)],
)
def test_a_key_over_plain_http_is_told_before_it_is_sent(
    url: str, key: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", key)
    told: list[str] = []
    with pytest.raises(InputError), attach(url, "alpha", warn=told.append):  # the name leads nowhere
        pass
    assert ["plain http" in text and KEY not in text for text in told] == [True] * warned


def test_what_is_no_such_server(url: str) -> None:
    with pytest.raises(InputError, match="OpenAI-compatible"), attach(url + "/html"):
        pass
    with pytest.raises(InputError, match=r"OpenAI-compatible server \(HTTP 404\)"), attach(url + "/nothing"):
        pass
    with pytest.raises(InputError, match="does not answer"), attach("http://127.0.0.1:9"):
        pass


def test_a_server_that_goes_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNEEBENCH_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with attach(f"http://127.0.0.1:{server.server_port}", "alpha") as engine:
        server.shutdown()
        server.server_close()
        thread.join()
        with pytest.raises(EngineError, match="stopped answering"):
            engine.check()
        assert engine.counters().running is None


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        ("http://host:8000/v1", "http://host:8000"),
        ("https://api.example.com/proxy/v1/", "https://api.example.com/proxy"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_base_of(given: str, base: str) -> None:
    assert Address.parse(given).base_url == base


@pytest.mark.parametrize("given", ["", "host:8000", "ftp://host", "http://", "http://host:99999", "http://h/v1?key=1"])
def test_what_is_no_url(given: str) -> None:
    with pytest.raises(InputError):
        Address.parse(given)


def test_credentials_in_the_url_are_refused_and_not_repeated() -> None:
    for given in ("http://ann:s3cret@host:8000", "http://s3cret@host"):
        with pytest.raises(InputError, match="KNEEBENCH_API_KEY") as caught:
            Address.parse(given)
        assert "s3cret" not in str(caught.value)
