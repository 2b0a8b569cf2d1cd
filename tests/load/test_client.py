"""The wire client against byte streams cut anywhere, and against a real server whose delays are known."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.analysis import metrics
from harness.engines.address import Address
from harness.errors import InputError
from harness.load.answer import ResponseReader, StreamError
from harness.load.client import Connection, Exchange, fill
from harness.load.poller import Poller
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


async def exchanged(
    connection: Connection, body: dict[str, object], **options: object
) -> tuple[RequestRecord, Exchange]:
    record = RequestRecord("test", 0, 0, "measured", time.time_ns())
    path = str(options.pop("path", "/v1/completions"))
    exchange = await connection.exchange(path, json.dumps(body).encode(), **options)  # type: ignore[arg-type]
    return fill(record, exchange), exchange


def ask(base_url: str, body: dict[str, object], **options: object) -> RequestRecord:
    """One request over a fresh connection."""

    async def run() -> RequestRecord:
        connection = Connection(Address.parse(base_url))
        try:
            return (await exchanged(connection, body, **options))[0]
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
        (("--stall-after", "2"), "stall"),
        (("--status", "503"), "http_503"),
    ],
)
def test_what_servers_do_becomes_a_record(truth, fault: tuple[str, ...], error: str) -> None:  # type: ignore[no-untyped-def]
    url = truth("--ttft-ms", "1", "--gap-ms", "1", *fault)
    record = ask(url, BODY, timeout_s=5, token_timeout_s=0.5)
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
        first, _ = await exchanged(connection, BODY)
        before = connection._sock
        second, _ = await exchanged(connection, BODY)
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


def test_the_servers_key_is_not_quoted_back_into_a_record(truth) -> None:  # type: ignore[no-untyped-def]
    url = truth("--ttft-ms", "1", "--echo-auth")

    async def run() -> RequestRecord:
        connection = Connection(Address.parse(url), "sk-quoted-back-0123456789")
        try:
            return (await exchanged(connection, BODY))[0]
        finally:
            connection.close()

    record = uvloop.run(run())
    assert record.error == "http_401" and record.error_detail and "<key>" in record.error_detail
    assert "sk-quoted-back-0123456789" not in record.error_detail


def test_without_kernel_stamps_the_record_says_user(truth, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("harness.load.client._ask_for_stamps", lambda sock: None)
    record = ask(truth("--ttft-ms", "30", "--gap-ms", "1"), BODY)
    assert record.error is None and record.clock == "user"
    assert (metrics.ttft_ms(record) or 0) >= 30


def test_what_can_wait_is_read_by_the_poller_and_stamped_by_the_kernel(truth, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """25 chunks 12 ms apart: all but the first and the last few go through the poller; stamps stay the server's."""
    log = tmp_path / "log.jsonl"
    url = truth("--ttft-ms", "5", "--gap-ms", "12", "--log", str(log))
    body = {**BODY, "max_tokens": 25}

    async def run() -> tuple[RequestRecord, int]:
        poller = Poller()
        reads = 0
        connection = Connection(Address.parse(url), poller=poller)
        plain = poller.add

        def counted(fd: int, on_readable: Callable[[], None], gap_ns: int) -> None:
            def once_more() -> None:
                nonlocal reads
                reads += 1
                on_readable()

            plain(fd, once_more, gap_ns)

        poller.add = counted  # type: ignore[method-assign]
        try:
            record, _ = await exchanged(connection, body, request_id="patient", expected_tokens=25)
            return record, reads
        finally:
            connection.close()
            poller.close()

    record, reads = uvloop.run(run())
    assert record.error is None and sum(record.chunk_tokens) == record.completion_tokens == 25
    assert 10 <= reads <= 22, "the poller read the middle, the loop the ends"
    line = json.loads(wait_for_line(log))
    assert line["id"] == "patient"
    late_ms = [
        (record.intended_ns + us * 1000 - sent) / 1e6 for us, sent in zip(record.chunk_us, line["sent_ns"], strict=True)
    ]
    # The poller comes round every 4 ms: were chunks stamped when they are read, the median would be over one.
    assert statistics.median(late_ms) < 0.5


def wait_for_line(path: Path) -> str:
    """The log's first line, once it is written."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.02)
    return path.read_text().splitlines()[0]


async def scripted(answers: list[bytes], *, close: bool) -> tuple[asyncio.Server, int]:
    """A server that gives each request the next answer, and then closes the connection or keeps it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(answers.pop(0))
            await writer.drain()
            if close:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def test_a_body_that_ends_with_the_connection() -> None:
    """HTTP/1.0 style, as some proxies forward streams: no length, not chunked, [DONE] and then the end."""
    body = b"data: " + json.dumps(token("a", [7])).encode() + b"\n\ndata: [DONE]\n\n"
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body

    async def run(answer: bytes) -> RequestRecord:
        server, port = await scripted([answer], close=True)
        async with server:
            return (await exchanged(Connection(Address("127.0.0.1", port, False, "")), BODY))[0]

    good = uvloop.run(run(whole))
    assert good.error is None and good.chunk_tokens == (1,)
    assert uvloop.run(run(whole.replace(b"data: [DONE]\n\n", b""))).error == "early_close"


def test_a_kept_connection_that_the_server_closed_is_opened_again() -> None:
    async def run() -> list[str | None]:
        server, port = await scripted([EXAMPLE, EXAMPLE], close=True)
        connection = Connection(Address("127.0.0.1", port, False, ""))
        async with server:
            first, _ = await exchanged(connection, BODY)
            # Before we notice that it closed: the request goes out on a dead connection, and once more on a new one.
            asyncio.get_running_loop().remove_reader(connection._sock)
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().add_reader(connection._sock, connection._on_readable)
            second, _ = await exchanged(connection, BODY)
        connection.close()
        return [first.error, second.error]

    assert uvloop.run(run()) == [None, None]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_keeps_the_kernels_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens arrive while our loop is away; the stamp is the kernel's all the same."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr("harness.load.client._tls_context", lambda: trusting)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(EXAMPLE[:-5])
        await writer.drain()
        await asyncio.sleep(0.5)
        writer.write(EXAMPLE[-5:])
        writer.close()

    ports: list[int] = []

    def background() -> None:
        async def main() -> None:
            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
            ports.append(server.sockets[0].getsockname()[1])
            await asyncio.sleep(1.5)
            server.close()

        asyncio.run(main())

    thread = threading.Thread(target=background)
    thread.start()
    while not ports:
        time.sleep(0.01)

    async def run() -> RequestRecord:
        connection = Connection(Address("127.0.0.1", ports[0], True, ""))
        await connection.open()
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.4)  # our loop is away while the tokens arrive
        record, _ = await exchanged(connection, BODY)
        connection.close()
        return record

    record = uvloop.run(run())
    thread.join()
    assert record.error is None and record.clock == "kernel" and record.chunk_tokens == (1, 1, 2)
    assert 50_000 <= record.chunk_us[0] < 350_000, "they came after 50 ms and could be read after 400"
    assert record.coalesced_reads == 1, "all came in one read, and the count says so"


def test_an_unknown_certificate_is_a_failed_connection(tmp_path: Path) -> None:
    """Nothing of the request is sent to a server that cannot prove who it is."""

    async def run() -> RequestRecord:
        server, port = await scripted([EXAMPLE], close=True)
        async with server:
            return (await exchanged(Connection(Address("127.0.0.1", port, True, "")), BODY, timeout_s=2.0))[0]

    record = uvloop.run(run())
    assert record.error in ("connect", "timeout") and record.sent_ns is None
