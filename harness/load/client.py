"""One streamed request -> one RequestRecord. The only HTTP and SSE reader of the project.

Idea: at hundreds of streams on few cores, a client that stamps a token when its event loop gets round to it measures
its own queue. So we own the socket: it is read with `recvmsg`, and the stamp is the kernel's receive time
(SO_TIMESTAMPNS), taken before the loop was even woken. Send times come from the same clock, CLOCK_REALTIME.

Constraints: a read that holds several segments carries only the last one's stamp, so such reads are counted
(`coalesced_reads`). Where the platform gives no stamp, user time is used and the record says `clock = "user"`.
Under TLS the stamp belongs to the encrypted bytes that completed a record: decryption goes through ssl.MemoryBIO, so
the pairing of bytes and stamp survives.

    socket --recvmsg--> bytes + stamp --(TLS)--> httptools --body--> events --> ResponseReader -> RequestRecord

ResponseReader is pure (bytes and stamps in, fields out): however a stream is cut, the record is the same.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import time
from dataclasses import replace
from typing import Any

import httptools

from harness.engines.address import Address
from harness.records import RequestRecord

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module has no name for it
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
_READ_BYTES = 1 << 16
_MAX_EVENT_BYTES = 16 << 20
"""A single event larger than this is no token stream: refuse it before memory does."""


class StreamError(Exception):
    """The stream said something that is no answer; `kind` becomes the record's error class."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class ResponseReader:
    """Takes a response's bytes with their stamps, in any cutting, and keeps what a RequestRecord needs."""

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep_alive = False
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.stamps: list[int] = []
        self.tokens: list[int] = []
        self.ids_seen = False
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish_reason: str | None = None
        self.reads = 0
        self.coalesced_reads = 0
        self._parser = httptools.HttpResponseParser(self)
        self._sse = False
        self._pending = bytearray()
        self._event: list[bytes] = []
        self._stamp_ns = 0
        self._finished_body = False

    def feed(self, data: bytes, stamp_ns: int) -> None:
        """Take the next bytes. Raises StreamError for anything that is not a proper token stream."""
        self._stamp_ns = stamp_ns
        self.reads += 1
        before = len(self.stamps)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            raise cause if isinstance(cause, StreamError) else StreamError("protocol", str(cause or error)) from None
        except httptools.HttpParserError as error:
            raise StreamError("protocol", f"not HTTP: {error}") from None
        if len(self.stamps) - before > 1:
            self.coalesced_reads += 1

    # -- httptools callbacks ------------------------------------------------------------------------------------
    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._sse = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pending += body
        if self.status == 200 and self._sse:
            self._take_lines()
        if len(self._pending) > _MAX_EVENT_BYTES:
            raise StreamError("protocol", f"an event of more than {_MAX_EVENT_BYTES >> 20} MiB")

    def on_message_complete(self) -> None:
        self.done = True
        self.keep_alive = self._parser.should_keep_alive()
        if self.status != 200:
            raise StreamError(f"http_{self.status}", self._pending.decode("utf-8", "replace")[:300])
        if not self._sse:
            start = self._pending[:200].decode("utf-8", "replace")
            raise StreamError("protocol", f"the answer is no event stream: {start}")

    # -- server-sent events (HTML living standard, section 9.2.6) -----------------------------------------------
    def _take_lines(self) -> None:
        # Cut at LF only: a CR before it is stripped, and a lone CR as line end is something no JSON stream sends.
        *lines, rest = self._pending.split(b"\n")
        self._pending = bytearray(rest)
        for raw in lines:
            line = bytes(raw).removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._event.append(line[5:].removeprefix(b" "))
            elif not line and self._event:
                event, self._event = b"\n".join(self._event), []
                self._take_event(event)
            # anything else (": comment" of a proxy, "event:", "id:") carries no token

    def _take_event(self, event: bytes) -> None:
        if event == b"[DONE]":
            return
        try:
            chunk = json.loads(event)
        except ValueError:
            raise StreamError("protocol", f"malformed event: {event[:200].decode('utf-8', 'replace')}") from None
        if not isinstance(chunk, dict):
            raise StreamError("protocol", f"an event that is no object: {event[:200].decode('utf-8', 'replace')}")
        if chunk.get("error"):
            raise StreamError("stream_error", json.dumps(chunk["error"])[:300])
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
            self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)
        for choice in chunk.get("choices") or ():
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        ids = choice.get("token_ids")
        # Token-bearing: it carries ids (vLLM sends empty text with an id for partial UTF-8 and for the end of the
        # sequence), else text. A delta with only a role is no token.
        if ids or text:
            self.ids_seen = self.ids_seen or bool(ids)
            self.stamps.append(self._stamp_ns)
            self.tokens.append(len(ids) if ids else 1)
            if self.first_token_ns is None:
                self.first_token_ns = self._stamp_ns
            self.last_token_ns = self._stamp_ns
            self.token_ids.extend(ids or ())
        if text:
            self.text.append(text)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


class Connection:
    """One keep-alive connection of one user. Not shared: a user waits for its answer before it asks again."""

    def __init__(self, address: Address, api_key: str | None = None) -> None:
        self._address = address
        self._api_key = api_key
        self._sock: socket.socket | None = None
        self._tls: _Tls | None = None
        self.kernel_clock = False

    async def open(self) -> None:
        """Connect now, so that the first request does not pay for it. Raises OSError or ssl.SSLError."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
        family, kind, proto, _, where = infos[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.kernel_clock = _ask_for_stamps(sock)
            await loop.sock_connect(sock, where)
            if self._address.tls:
                self._tls = _Tls(self._address.host)
                await self._tls.handshake(loop, sock)
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock, self._tls = None, None

    def head(self, path: str, length: int) -> bytes:
        """The request's header block."""
        lines = [
            f"POST {self._address.prefix}{path} HTTP/1.1",
            f"Host: {self._address.authority}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {length}",
        ]
        if self._api_key:
            lines.append(f"Authorization: Bearer {self._api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    async def request(self, path: str, body: bytes, record: RequestRecord, timeout_s: float) -> RequestRecord:
        """Send `body`, read the stream to its end, return `record` filled. Never raises for what a server can do.

        `record.intended_ns` is when the request was meant to go; the wait from there to the send is in TTFT.
        Cancelling it closes the connection, which makes the server abort the request.
        """
        reader = ResponseReader()
        sent_ns: int | None = None
        error: tuple[str, str] | None = None
        stage = "connect"
        try:
            async with asyncio.timeout(timeout_s):
                if self._sock is None:
                    await self.open()
                stage = "send"
                sent_ns = time.time_ns()
                await self._send(self.head(path, len(body)) + body)
                stage = "read"
                await self._read(reader)
        except TimeoutError:
            error = ("timeout", f"no end of the answer within {timeout_s:g} s (while waiting for: {stage})")
        except StreamError as problem:
            error = (problem.kind, str(problem))
        except (OSError, ssl.SSLError) as problem:
            error = ("connect" if stage == "connect" else "early_close", f"{type(problem).__name__}: {problem}")
        finally:
            if not (reader.done and reader.keep_alive and error is None):
                self.close()
        if error is None and not reader.stamps:
            error = ("no_tokens", "the stream ended without a token")
        return _fill(record, reader, sent_ns, self.kernel_clock, error)

    async def _send(self, data: bytes) -> None:
        assert self._sock is not None
        if self._tls is not None:
            data = self._tls.encrypt(data)
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def _read(self, reader: ResponseReader) -> None:
        """Read until the message is complete. A callback, not a coroutine a read: that is what 16 us a token need."""
        loop = asyncio.get_running_loop()
        sock, tls = self._sock, self._tls
        assert sock is not None
        finished: asyncio.Future[None] = loop.create_future()

        def on_readable() -> None:
            if finished.done():
                return
            try:
                data, stamp_ns = _receive(sock)
                if data and tls is not None:
                    data = tls.decrypt(data)
                    if not data:
                        return  # half a TLS record: its stamp is the stamp of the read that completes it
                if data:
                    reader.feed(data, stamp_ns)
                    if reader.done:
                        finished.set_result(None)
                else:
                    finished.set_exception(StreamError("early_close", "the server closed before the end of the answer"))
            except (BlockingIOError, InterruptedError):
                return
            except (StreamError, OSError) as problem:
                finished.set_exception(problem)

        loop.add_reader(sock, on_readable)
        try:
            await finished
        finally:
            loop.remove_reader(sock)


def _ask_for_stamps(sock: socket.socket) -> bool:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return _ANCILLARY_BYTES > 0


def _receive(sock: socket.socket) -> tuple[bytes, int]:
    """(bytes, stamp in ns): the kernel's receive time of the last segment read, else user time."""
    if _ANCILLARY_BYTES:
        data, ancillary, _, _ = sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(payload) >= _TIMESPEC.size:
                seconds, nanoseconds = _TIMESPEC.unpack_from(payload)
                return data, seconds * 1_000_000_000 + nanoseconds
        return data, time.time_ns()
    return sock.recv(_READ_BYTES), time.time_ns()


class _Tls:
    """TLS over memory buffers: the socket stays ours, and with it the kernel's stamps."""

    def __init__(self, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    async def handshake(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        while True:
            try:
                self._object.do_handshake()
                finished = True
            except ssl.SSLWantReadError:
                finished = False
            if self._outgoing.pending:
                await loop.sock_sendall(sock, self._outgoing.read())
            if finished:
                return
            data = await loop.sock_recv(sock, _READ_BYTES)
            if not data:
                raise ConnectionError("closed during the TLS handshake")
            self._incoming.write(data)

    def encrypt(self, data: bytes) -> bytes:
        self._object.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """What is readable after these bytes; b'' when a record is not complete yet."""
        self._incoming.write(data)
        parts = []
        while True:
            try:
                part = self._object.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                break
            if not part:
                break
            parts.append(part)
        return b"".join(parts)


def _fill(
    record: RequestRecord,
    reader: ResponseReader,
    sent_ns: int | None,
    kernel_clock: bool,
    error: tuple[str, str] | None,
) -> RequestRecord:
    origin = record.intended_ns
    return replace(
        record,
        sent_ns=sent_ns,
        first_token_ns=reader.first_token_ns,
        last_token_ns=reader.last_token_ns,
        end_ns=time.time_ns(),
        prompt_tokens=reader.prompt_tokens,
        completion_tokens=reader.completion_tokens,
        finish_reason=reader.finish_reason,
        clock="kernel" if kernel_clock else "user",
        reads=reader.reads,
        coalesced_reads=reader.coalesced_reads,
        chunk_ids=reader.ids_seen,
        chunk_us=tuple((stamp - origin) // 1000 for stamp in reader.stamps),
        chunk_tokens=tuple(reader.tokens),
        error=error[0] if error else None,
        error_detail=" ".join(error[1].split()) if error else None,
    )
