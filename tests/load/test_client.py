"""The wire client against byte streams cut anywhere, and against a real server whose delays are known."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.analysis import metrics
from harness.engines.address import Address
from harness.errors import InputError
from harness.load.client import Connection, ResponseReader, StreamError
from harness.records import RequestRecord

DATA = Path(__file__).parent.parent / "data"


def stream(*events: object, head: bytes = b"") -> bytes:
    """A chunked event-stream response with these events, as vLLM frames them."""
    head = head or b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    bodies = [b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


def token(text: str, ids: list[int] | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "token_ids": ids, "finish_reason": None}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}}
EXAMPLE = stream(
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},  # a role is no token
    token("héé", [1]),
    token("", [2]),  # partial UTF-8: no text yet, but a token
    token("…\u2028世", [3, 4]),
    {"choices": [{"text": "", "token_ids": [], "finish_reason": "length"}]},
    USAGE,
    b"[DONE]",
)


def read(pieces: list[bytes], stamp_ns: int = 5_000_000) -> ResponseReader:
    reader = ResponseReader()
    for piece in pieces:
        reader.feed(piece, stamp_ns)
    return reader


def outcome(reader: ResponseReader) -> tuple[object, ...]:
    return (
        reader.done, reader.keep_alive, reader.stamps, reader.tokens, reader.token_ids, "".join(reader.text),
        reader.prompt_tokens, reader.completion_tokens, reader.finish_reason,
    )  # fmt: skip


def test_a_stream_read_whole() -> None:
    reader = read([EXAMPLE])
    assert reader.done and reader.keep_alive
    assert reader.token_ids == [1, 2, 3, 4]
    assert reader.tokens == [1, 1, 2]
    assert "".join(reader.text) == "héé…\u2028世"
    assert (reader.prompt_tokens, reader.completion_tokens, reader.finish_reason) == (7, 4, "length")
    assert reader.coalesced_reads == 1


@given(st.sets(st.integers(1, len(EXAMPLE) - 1)))
@settings(max_examples=300, deadline=None)
def test_any_cutting_gives_the_same_record(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(EXAMPLE)]
    pieces = [EXAMPLE[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert outcome(read(pieces)) == outcome(read([EXAMPLE]))


def test_a_token_is_stamped_with_the_read_that_completed_it() -> None:
    reader = ResponseReader()
    middle = EXAMPLE.index(b'"token_ids": [2]')
    reader.feed(EXAMPLE[:middle], 100)
    reader.feed(EXAMPLE[middle:], 250)
    assert reader.stamps == [100, 250, 250]
    assert (reader.first_token_ns, reader.last_token_ns) == (100, 250)


def test_proxy_comments_and_crlf_are_no_tokens() -> None:
    body = b": keep-alive\r\n\r\nevent: x\r\ndata: " + json.dumps(token("a")).encode() + b"\r\n\r\ndata: [DONE]\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    reader = read([head + body])
    assert reader.done and reader.tokens == [1] and not reader.ids_seen


@pytest.mark.parametrize("name", ["vllm_completions_stream.txt", "vllm_chat_stream.txt"])
@given(cuts=st.sets(st.integers(1, 2000), max_size=40))
@settings(max_examples=60, deadline=None)
def test_streams_recorded_from_vllm(name: str, cuts: set[int]) -> None:
    """Chunks of two tokens, a role-only first delta, empty text that carries a token: the ids add up to the usage."""
    body = (DATA / name).read_bytes()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    whole = head + body
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    reader = read([whole[start:end] for start, end in zip(edges, edges[1:], strict=False)])
    assert reader.done and reader.ids_seen
    assert sum(reader.tokens) == len(reader.token_ids) == reader.completion_tokens == 12
    assert len(reader.stamps) < 12, "counting chunks would have been wrong"
    assert reader.prompt_tokens == 16


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (stream({"error": {"message": "out of memory", "code": 500}}), "stream_error"),
        (stream(b"{half"), "protocol"),
        (stream(b"[1, 2]"), "protocol"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nslow", "http_429"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>", "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
    ],
)
def test_what_is_no_token_stream_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(StreamError) as caught:
        read([data])
    assert caught.value.kind == kind


def ask(
    base_url: str, body: dict[str, object], *, path: str = "/v1/completions", timeout_s: float = 5
) -> RequestRecord:
    """One request over a fresh connection."""

    async def run() -> RequestRecord:
        connection = Connection(Address.parse(base_url))
        record = RequestRecord("test", 0, 0, "measured", time.time_ns())
        try:
            return await connection.request(path, json.dumps(body).encode(), record, timeout_s)
        finally:
            connection.close()

    return uvloop.run(run())


BODY: dict[str, object] = {
    "model": "truth", "prompt": [1, 2, 3], "max_tokens": 5, "stream": True,
    "stream_options": {"include_usage": True}, "return_token_ids": True,
}  # fmt: skip


def test_the_clock_against_known_delays(truth) -> None:  # type: ignore[no-untyped-def]
    """Medians within 10 ms of the script even on a busy machine; the real bound is measured in benchmarks/."""
    url = truth("--ttft-ms", "60", "--gap-ms", "15")
    records = [ask(url, BODY) for _ in range(9)]
    assert all(record.error is None for record in records)
    assert [record.completion_tokens for record in records] == [5] * 9
    ttft = statistics.median(metrics.ttft_ms(record) or 0 for record in records)
    tpot = statistics.median(metrics.tpot_ms(record) or 0 for record in records)
    assert 60 <= ttft < 70
    assert 14 < tpot < 17
    assert all(record.clock == "kernel" for record in records)


def test_chat_and_servers_without_token_ids(truth) -> None:  # type: ignore[no-untyped-def]
    url = truth("--ttft-ms", "1", "--gap-ms", "1", "--no-token-ids")
    body = {**BODY, "messages": [{"role": "user", "content": "a b c"}]}
    record = ask(url, body, path="/v1/chat/completions")
    assert record.error is None
    assert record.chunk_tokens == (1, 1, 1, 1, 1) and not record.chunk_ids
    assert record.finish_reason == "length"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (("--close-after", "2"), "early_close"),
        (("--error-after", "2"), "stream_error"),
        (("--stall-after", "2"), "timeout"),
        (("--status", "503"), "http_503"),
    ],
)
def test_what_servers_do_becomes_a_record(truth, fault: tuple[str, ...], error: str) -> None:  # type: ignore[no-untyped-def]
    url = truth("--ttft-ms", "1", "--gap-ms", "1", *fault)
    record = ask(url, BODY, timeout_s=1)
    assert record.error == error
    assert record.error_detail
    if error != "http_503":
        assert len(record.chunk_us) == 2, "tokens before the fault are kept"


def test_nobody_listening_is_a_record() -> None:
    record = ask("http://127.0.0.1:9", BODY)
    assert record.error == "connect" and record.sent_ns is None


def test_a_connection_is_used_again(truth) -> None:  # type: ignore[no-untyped-def]
    url = truth("--ttft-ms", "1", "--gap-ms", "1")

    async def twice() -> tuple[RequestRecord, RequestRecord, bool]:
        connection = Connection(Address.parse(url))
        record = RequestRecord("test", 0, 0, "measured", time.time_ns())
        first = await connection.request("/v1/completions", json.dumps(BODY).encode(), record, 5)
        before = connection._sock
        second = await connection.request(
            "/v1/completions", json.dumps(BODY).encode(), replace(record, intended_ns=time.time_ns()), 5
        )
        same = before is not None and connection._sock is before
        connection.close()
        return first, second, same

    first, second, same = uvloop.run(twice())
    assert first.error is None and second.error is None and same


@pytest.mark.parametrize("url", ["ftp://host", "127.0.0.1:8000", "http://", "http://me:secret@host/"])
def test_urls_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(InputError):
        Address.parse(url)


def test_an_address_may_have_a_prefix_and_v1() -> None:
    assert Address.parse("https://host/api/v1/") == Address("host", 443, True, "/api")
