"""An engine whose answers are none: each wrong answer becomes a record with its class, and the good ones count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.load.script import STREAM_END, STREAM_HEAD
from tests.faults.hostile import (
    ALL,
    SCENARIO,
    Fault,
    Outcome,
    Switched,
    chunk,
    closes,
    drips,
    event,
    hangs,
    hostile,
    page,
    resets,
    sends,
    swept_endpoint,
    token,
)

NOISE = {"client_bound", "drifting", "too_few_samples"}
"""What a busy machine, or so few requests, may add to a verdict."""


def usage(**counts: object) -> Fault:
    """Tokens as asked, and such a usage."""
    told = b",".join(b'"%b":%b' % (name.encode(), str(value).encode()) for name, value in counts.items())
    tail = b'{"choices":[],"usage":{' + told + b"}}"
    return sends(STREAM_HEAD + token() * 5 + token(finish_reason="length") + event(tail) + STREAM_END)


def check_some(done: Outcome, kind: str) -> None:
    """Each seventh request failed so and is told as that; all others are good and make the figures."""
    assert done.code == 0, done.said
    (row,) = done.rows
    assert done.errors == {kind}, done.details
    failed = [record for record in done.records if record.phase == "measured" and record.error is not None]
    assert row.errors == len(failed) >= 2
    assert row.requests >= 24 and row.tok_s is not None and row.p95_ms is not None
    assert row.verdict == "invalid" and set(row.verdict_reasons) - NOISE == {"errors"}
    assert all(0 < len(detail) <= 500 and detail.isprintable() for detail in done.details.splitlines())


ANSWERS: dict[str, tuple[Fault, str, str]] = {
    "429": (sends(page(b'{"error":"slow down"}', "429 Too Many", "Retry-After: 1")), "http_429", "slow down"),
    "500": (sends(page(b'{"error":"boom"}', "500 Internal Server Error")), "http_500", "boom"),
    "503": (sends(page(b"overloaded", "503 Service Unavailable", kind="text/plain")), "http_503", "overloaded"),
    "500-closed": (sends(b"HTTP/1.1 500 Oh\r\n\r\nno length", closes), "http_500", "no length"),
    "500-binary": (sends(page(b"\x00\x1b[31m\xff,\"\n", "500 Oh", kind="image/png")), "http_500", "[31m"),
    "malformed-json": (sends(STREAM_HEAD + token() + event(b'{"choices": [') + STREAM_END), "protocol", "malformed"),
    "not-an-object": (sends(STREAM_HEAD + event(b"[1, 2]") + STREAM_END), "protocol", "malformed"),
    "bottomless-json": (sends(STREAM_HEAD + event(b"[" * 100_000) + STREAM_END), "protocol", ""),
    "no-utf8": (sends(STREAM_HEAD + event(b'{"choices":[{"text":"\xff"}]}') + STREAM_END), "protocol", ""),
    "wrong-content-type": (
        sends(page(b'data: {"choices":[{"text":"a"}]}\n\n', kind="application/octet-stream")),
        "protocol", "no event stream",
    ),
    "html": (sends(page(b"<html>Bad gateway", kind="text/html")), "protocol", "<html>"),
    "not-streamed": (sends(page(b'{"choices":[{"text":"a"}]}')), "protocol", "no event stream"),
    "compressed": (
        sends(page(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip", kind="text/event-stream")),
        "protocol", "compressed",
    ),
    "error-object": (sends(STREAM_HEAD + token() + event({"error": {"message": "oom"}}) + STREAM_END), "stream_error",
                     "oom"),
    "no-tokens": (sends(STREAM_HEAD + STREAM_END), "no_tokens", "without a token"),
    "another-protocol": (
        sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"), "protocol", "101",
    ),
    "not-http": (sends(b"SSH-2.0-OpenSSH_9.2\r\n", closes), "protocol", "not HTTP"),
    "answers-twice": (
        sends(STREAM_HEAD + token(finish_reason="length") + STREAM_END + page(b"{}", "500 Oh")),
        "protocol", "after the end",
    ),
    "endless-word": (
        sends(STREAM_HEAD + token(finish_reason="x" * 100_000) + STREAM_END), "protocol", "malformed event",
    ),
    "closes-early": (sends(STREAM_HEAD + token() * 2, closes), "early_close", "before the end"),
    "ends-early": (sends(STREAM_HEAD + token() * 2 + b"0\r\n\r\n"), "early_close", "neither"),
    "resets": (sends(STREAM_HEAD + token() * 2, resets), "early_close", ""),
    "negative-usage": (usage(prompt_tokens=12, completion_tokens=-6), "protocol", "malformed event"),
    "negative-prompt": (usage(prompt_tokens=-1, completion_tokens=6), "protocol", "malformed event"),
    "absurd-usage": (usage(prompt_tokens=12, completion_tokens=10**9), "protocol", "malformed event"),
    "beyond-integers": (usage(prompt_tokens=12, completion_tokens=10**40), "protocol", "malformed event"),
    "usage-as-text": (usage(prompt_tokens=12, completion_tokens='"6"'), "protocol", "malformed event"),
    "usage-nan": (usage(prompt_tokens=12, completion_tokens="NaN"), "protocol", "malformed event"),
    "usage-infinite": (usage(prompt_tokens=12, completion_tokens="1e999"), "protocol", "malformed event"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_a_record_with_its_class(name: str, tmp_path: Path) -> None:
    fault, kind, said = ANSWERS[name]
    with hostile(fault) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    check_some(done, kind)
    assert said in done.details


@pytest.mark.parametrize(
    ("fault", "chunks", "limits", "kind"),
    [
        (sends(STREAM_HEAD + token() * 3, hangs), 3, {"token_timeout_s": 0.3}, "stall"),
        (hangs, 0, {"request_timeout_s": 0.3}, "timeout"),
        (sends(STREAM_HEAD, hangs), 0, {"request_timeout_s": 0.3}, "timeout"),
        # One byte a second: neither the next token's time nor a byte's helps it.
        (lambda sock: (sock.sendall(STREAM_HEAD + token()), drips(token() * 9)(sock)), 1, {"token_timeout_s": 1.2},
         "stall"),
        (drips(STREAM_HEAD), 0, {"request_timeout_s": 1.2}, "timeout"),
        (lambda sock: (sock.sendall(STREAM_HEAD + token()), drips(chunk(b": keep-alive\n\n") * 900, 0.001)(sock)), 1,
         {"token_timeout_s": 0.3}, "stall"),
    ],
    ids=["stops-streaming", "never-answers", "head-only", "drips-tokens", "drips-head", "comments-only"],
)  # fmt: skip
def test_an_answer_that_takes_for_ever_is_ended(
    fault: Fault, chunks: int, limits: dict[str, float], kind: str, tmp_path: Path
) -> None:
    with hostile(fault) as server:
        done = swept_endpoint(server.url, tmp_path / "run", replace(SCENARIO, **limits))
    check_some(done, kind)
    failed = [record for record in done.records if record.error == kind]
    assert {len(record.chunk_us) for record in failed} == {chunks}, "tokens before the fault are kept"


def test_a_usage_of_nothing_is_unknown_and_marks_the_point(tmp_path: Path) -> None:
    with hostile(usage(prompt_tokens="null", completion_tokens="null")) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    (row,) = done.rows
    assert done.code == 0 and done.errors == set()
    assert any(record.completion_tokens is None for record in done.records if record.error is None)
    assert row.verdict != "valid" and "length_mismatch" in row.verdict_reasons


def test_a_usage_beyond_what_was_asked_marks_the_point_even_where_lengths_are_the_servers(tmp_path: Path) -> None:
    """A hosted server: no token ids, lengths not ours. It says 1,000 tokens where 6 were the most allowed."""
    text = event({"choices": [{"text": " a", "finish_reason": None}]}) * 5
    last = event({"choices": [{"text": " a", "finish_reason": "length"}]})
    count = event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 1000}})
    refused = page(b"{}", "404 Not Found")
    with hostile(sends(STREAM_HEAD + text + last + count + STREAM_END), ALL, pages={"/tokenize": refused}) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    (row,) = done.rows
    assert done.code == 0 and done.errors == set()
    assert row.verdict != "valid" and "length_mismatch" in row.verdict_reasons


def test_words_on_the_way_are_no_answer(tmp_path: Path) -> None:
    """103 Early Hints may come before any answer (RFC 9110, 15.2): a client reads on."""
    good = STREAM_HEAD + token() * 5 + token(finish_reason="length")
    told = event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 6}})
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with hostile(sends(hints + good + told + STREAM_END)) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == set() and done.rows[0].errors == 0


def test_a_server_that_closes_each_connection_at_once(tmp_path: Path) -> None:
    """Once more is tried where the connection was an old one; a new one that is closed is a failure."""
    with hostile(closes, range(20, 1 << 30)) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 1 and "early_close" in done.said and done.errors == {"early_close"}
    assert any(record.error is None for record in done.records), "what was good before is kept"


def test_an_engine_that_refuses_everything_ends_the_sweep_with_its_words(tmp_path: Path) -> None:
    """Exit code 1, the server's own words, a row that says so; what was measured before stays."""
    refuses = sends(page(b'{"error":"out of cheese"}', "503 Sorry"))
    with hostile(refuses, Switched(lambda: (tmp_path / "run" / "points.csv").exists())) as server:
        done = swept_endpoint(server.url, tmp_path / "run", conc=(2, 3))
    assert done.code == 1 and "http_503" in done.said and "out of cheese" in done.said and "--resume" in done.said
    good, bad = done.rows
    assert good.conc == 2 and good.errors == 0 and good.requests >= 24
    assert bad.verdict == "invalid" and "gave_up" in bad.verdict_reasons and bad.conc == 3
    assert bad.tok_s is None and bad.p95_ms is None, "missing is empty, never 0"
    assert json.loads((tmp_path / "run" / ".unfinished.json").read_text())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (page(b"{}", "500 Oh"), "HTTP 500"),
        (page(b"<html>login", kind="text/html"), "does not answer as an OpenAI-compatible server"),
        (page(b'{"data": [{"id"'), "does not answer as an OpenAI-compatible server"),
        (page(b"[" * 200_000), "does not answer as an OpenAI-compatible server"),
        (page(b'{"data": []}'), "it offers none"),
        (page(b'{"data": "x"}'), "does not answer as an OpenAI-compatible server"),
        (page(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip"), "compressed"),
        (page(b"", "307 Temporary Redirect", "Location: https://elsewhere.example/v1/models"), "elsewhere.example"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 300_000 + b"\r\n\r\n", "does not answer"),
        (b"SMTP ready\r\n", "does not answer"),
    ],
    ids=["500", "html", "torn", "bottomless", "none", "no-list", "compressed", "redirect", "long-head", "not-http"],
)
def test_a_models_page_that_is_none_is_bad_input(answer: bytes, said: str, tmp_path: Path) -> None:
    """Exit code 2, what was given and what to do, nothing begun."""
    with hostile(pages={"/v1/models": sends(answer, closes)}) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 2 and said in done.said and server.url in done.said, done.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("usage_told", [b'"12"', b'{"prompt_tokens": -4}', b'{"prompt_tokens": 1e30}', b"[]", b"null"])
def test_a_probe_that_is_answered_with_nonsense(usage_told: bytes, tmp_path: Path) -> None:
    """A server that only takes text is asked how it counts. It does not tell, and the sweep goes on and says so."""
    text = STREAM_HEAD + event({"choices": [{"text": " a", "finish_reason": "length"}]}) + STREAM_END

    def whole(sock: object) -> None:
        streams.append(1)
        sock.sendall(page(b'{"choices": [{"text": "a"}], "usage": ' + usage_told + b"}"))  # type: ignore[attr-defined]

    streams: list[int] = []
    pages = {"/tokenize": page(b"{}", "404 Not Found")}
    with hostile(sends(text), ALL, pages=pages, probe=whole) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    (row,) = done.rows
    assert streams and done.code == 0 and done.errors == set(), done.said
    assert row.verdict != "valid" and "length_mismatch" in row.verdict_reasons
