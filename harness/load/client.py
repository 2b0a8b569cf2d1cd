"""One streamed request -> one RequestRecord.

Idea: at hundreds of streams on few cores, a client that stamps a token when its event loop gets round to it measures
its own queue. So we own the socket: it is read with `recvmsg`, and the stamp is the kernel's receive time
(SO_TIMESTAMPNS), taken before the loop was even woken. Send times come from the same clock, CLOCK_REALTIME.

Constraints: a read that holds several segments carries only the last one's stamp, so such reads are counted
(`coalesced_reads`). Where the platform gives no stamp, user time is used and the record says `clock = "user"`.
Under TLS the stamp belongs to the encrypted bytes that completed a record: decryption goes through ssl.MemoryBIO, so
the pairing of bytes and stamp survives.

    socket --recvmsg--> bytes + stamp --(TLS)--> answer.ResponseReader --fill--> RequestRecord
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from harness.engines.address import Address
from harness.inert import one_line
from harness.load.answer import ResponseReader, StreamError
from harness.load.poller import LEAST_GAP_NS, Poller
from harness.records import RequestRecord

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module has no name for it
_TIMESPEC = struct.Struct("@qq")
_Stamp = int | list[tuple[int, int, bytes]]
"""Our own time in ns, or the ancillary data of a recvmsg."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
_READ_BYTES = 1 << 12
_BATCH = 16
"""Reads of one answer that are parsed together: the kernel has stamped them, and a warm parser costs a third."""
_LOOK_S = 1.0
"""A socket is looked at so often even when the event loop says nothing of it."""
_LAST_READS = 2
"""Reads before the expected end that the event loop takes itself: the next question waits for the last one."""
_OUR_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Why this machine cannot open a connection, whatever the server does."""
_ID_CHARACTERS = "/[]=,:@+"
"""What may stand in a header as it is, besides letters, digits and -._~"""


@dataclass(slots=True)
class Exchange:
    """One request and what came back, before it is made into a record."""

    reader: ResponseReader
    sent_ns: int | None = None
    end_ns: int = 0
    """The kernel's receipt of the last byte of the answer; for a failure, when we noticed."""
    kernel_clock: bool = True
    error: tuple[str, str] | None = None


class Connection:
    """One keep-alive connection of one user. Not shared: a user waits for its answer before it asks again."""

    def __init__(self, address: Address, api_key: str | None = None, poller: Poller | None = None) -> None:
        self._address = address
        self._api_key = api_key
        self._poller = poller
        self._patient = False
        """The poller reads our socket, not the event loop."""
        self._reads_left = 0
        """Reads that can wait, of a patient connection."""
        self._sock: socket.socket | None = None
        self._tls: _Tls | None = None
        self._exchange: Exchange | None = None
        self._unread: list[tuple[bytes, _Stamp]] = []
        self._batch = 1
        self._expected_tokens = 0
        self._finished: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._common_head = self._make_head()

    async def open(self) -> None:
        """Connect now, so that the first request does not pay for it. Raises OSError or ssl.SSLError."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
        sock = await _connected(infos)
        try:
            if self._address.tls:
                self._tls = _Tls(self._address.host)
                await self._tls.handshake(loop, sock)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        loop.add_reader(sock, self._on_readable)

    def close(self) -> None:
        """Close; a server that is still answering aborts the request."""
        if self._sock is not None:
            self._be_prompt()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock, self._tls = None, None

    def cut(self) -> None:
        """End the exchange in flight, if there is one: the cell is over."""
        self._parse()
        self._fail(StreamError("cut", "ended by us with the cell"))

    async def exchange(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str = "",
        expected_tokens: int = 0,
        timeout_s: float = 300.0,
        token_timeout_s: float = 60.0,
    ) -> Exchange:
        """Send `body`, read the stream to its end. Never raises for what a server can do: the Exchange says it.

        `expected_tokens` is how many will come (0: nobody knows); it lets bytes wait that are not the last ones.
        `timeout_s` bounds the whole, `token_timeout_s` the silence after the first token.
        """
        self._exchange = done = Exchange(ResponseReader())
        deadline_ns = time.time_ns() + int(timeout_s * 1e9)
        own = f"X-Request-Id: {quote(request_id, _ID_CHARACTERS)}\r\n" if request_id else ""
        head = f"POST {self._address.prefix}{path} {self._common_head}{own}Content-Length: {len(body)}\r\n\r\n"
        data = head.encode("latin-1") + body
        for again in (True, False):
            used_before = self._sock is not None
            stage = "connect"
            try:
                async with asyncio.timeout((deadline_ns - time.time_ns()) / 1e9):
                    if self._sock is None:
                        await self.open()
                    stage = "send"
                    self._unread, self._batch, self._expected_tokens = [], 1, expected_tokens
                    self._finished = asyncio.get_running_loop().create_future()
                    self._finished.add_done_callback(_looked_at)
                    done.sent_ns = time.time_ns()
                    whole = await self._send(data, self._finished)
                stage = "answer"
                await self._answered(done.reader, self._finished, deadline_ns, token_timeout_s)
                done.reader.keep_alive &= whole
                break
            except TimeoutError:
                done.error = ("timeout", f"no end of the answer within {timeout_s:g} s (while waiting for: {stage})")
            except StreamError as problem:
                done.error = (problem.kind, self._without_key(str(problem)))
            except (OSError, ssl.SSLError) as problem:
                done.error = (_kind(problem, stage), f"{type(problem).__name__}: {problem}")
            self.close()
            # A kept-alive connection that the server had closed meanwhile says nothing about the server: once more.
            if not (again and used_before and done.error[0] == "early_close" and done.reader.reads == 0):
                break
            done.error = done.sent_ns = None
        self._be_prompt()
        self._exchange = self._finished = None
        done.reader.let_go()
        if done.error is None and not done.reader.keep_alive:
            self.close()
        if done.error is None and not done.reader.stamps:
            done.error = ("no_tokens", "the stream ended without a token")
        done.end_ns = done.reader.last_read_ns if done.error is None else time.time_ns()
        return done

    def _make_head(self) -> str:
        """What all requests of this connection have in common, from the HTTP version on."""
        lines = [
            "HTTP/1.1",
            f"Host: {self._address.authority}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
        ]
        if self._api_key:
            lines.append(f"Authorization: Bearer {self._api_key}")
        return "\r\n".join([*lines, ""])

    def _without_key(self, said: str) -> str:
        """A server may quote our header back at us; what it said goes to the disk."""
        return said.replace(self._api_key, "<key>") if self._api_key else said

    async def _send(self, data: bytes, finished: asyncio.Future[None]) -> bool:
        """Send it, or as much as the server takes: it may answer (413, 429) without reading. Whether all was sent.

        A server that is gone is no error here, for its answer may have come before: whoever reads will find either.
        """
        assert self._sock is not None
        if self._tls is not None:
            data = self._tls.encrypt(data)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent == len(data):
            return True
        rest = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(self._sock, memoryview(data)[sent:]))
        rest.add_done_callback(_looked_at)
        try:
            await asyncio.wait((rest, finished), return_when=asyncio.FIRST_COMPLETED)
            return rest.done() and rest.exception() is None
        finally:
            rest.cancel()

    async def _answered(
        self, reader: ResponseReader, finished: asyncio.Future[None], deadline_ns: int, token_timeout_s: float
    ) -> None:
        """Wait for the end of the answer. One timer looks at the last stamp now and then: none is set per token."""
        first_look_s = min(_LOOK_S, token_timeout_s, (deadline_ns - time.time_ns()) / 1e9)
        self._look_in(first_look_s, reader, deadline_ns, token_timeout_s)
        try:
            await finished
        finally:
            assert self._timer is not None
            self._timer.cancel()
            self._timer = None
            del finished  # an error holds this frame, which would hold the future, which holds the error

    def _look_in(self, seconds: float, reader: ResponseReader, deadline_ns: int, token_timeout_s: float) -> None:
        # A method and its arguments, not a closure: one that names itself is a cycle, and collections are off.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds + 0.002, self._look, reader, deadline_ns, token_timeout_s)

    def _look(self, reader: ResponseReader, deadline_ns: int, token_timeout_s: float) -> None:
        """End an answer that takes too long, or is silent for too long."""
        # uvloop forgets a socket that was reset after one read: what is left in it, and the error, are found here.
        for _ in range(_BATCH):
            if not self._on_readable():
                break
        self._parse()
        now = time.time_ns()
        token_timeout_ns = int(token_timeout_s * 1e9)
        # Counted from the last token: bytes that never become one (a drip, a proxy's comments) break no silence.
        silence_ends = (reader.stamps[-1] if reader.stamps else now) + token_timeout_ns
        if now >= deadline_ns:
            self._fail(TimeoutError())
        elif now >= silence_ends:
            self._fail(StreamError("stall", f"no token for {token_timeout_s:g} s after {len(reader.stamps)} chunks"))
        else:
            seconds = min(_LOOK_S, (min(deadline_ns, silence_ends) - now) / 1e9)
            self._look_in(seconds, reader, deadline_ns, token_timeout_s)

    def _fail(self, problem: Exception) -> None:
        if self._finished is not None and not self._finished.done():
            # Where it was raised is not told, and the frames there hold the future that now holds it: a cycle.
            problem.__context__ = None
            self._finished.set_exception(problem.with_traceback(None))

    def _on_readable(self) -> bool:
        """A callback, not a coroutine a read; it only takes bytes and stamp where it can, for that is the hot path.

        Whether there was something to read.
        """
        sock = self._sock
        if sock is None:
            return False
        stamp: _Stamp
        try:
            if _ANCILLARY_BYTES:
                data, stamp, _, _ = sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
            else:
                data, stamp = sock.recv(_READ_BYTES), 0
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as problem:
            self._parse()  # what came before counts
            self._fail(problem)
            self.close()
            return False
        if self._finished is None or self._finished.done():
            self.close()  # the server closed an idle connection, or speaks unasked: the next request gets a new one
            return False
        self._unread.append((data, stamp or time.time_ns()))
        self._reads_left -= 1
        # An answer's last bytes are an empty line, whatever they were cut into; before them nobody waits for the parse.
        if len(self._unread) >= self._batch or len(data) < 4 or data.endswith(b"\r\n\r\n") or not self._reads_left:
            self._parse()
        return bool(data)

    def _parse(self) -> None:
        """Take what was received into the exchange."""
        exchange, finished = self._exchange, self._finished
        if exchange is None or finished is None or finished.done():
            return
        reader, unread = exchange.reader, self._unread
        self._unread = []
        try:
            for data, stamp in unread:
                stamp_ns = _kernel_ns(stamp)
                if stamp_ns is None:
                    exchange.kernel_clock = False
                    stamp_ns = stamp if isinstance(stamp, int) else time.time_ns()
                if data and self._tls is not None:
                    data = self._tls.decrypt(data)
                    if not data and not self._tls.closed and self._tls.broken is None:
                        continue  # half a TLS record: its stamp is the stamp of the read that completes it
                if data:
                    reader.feed(data, stamp_ns)
                if self._tls is not None and self._tls.broken is not None:
                    raise self._tls.broken
                if not data:
                    reader.feed_eof()
            if reader.done:
                finished.set_result(None)
            elif reader.chunked and self._tls is None and exchange.kernel_clock:
                self._batch = min(4 * self._batch, _BATCH)
                self._choose_pace(reader)
        except (StreamError, OSError) as problem:  # ssl.SSLError is an OSError
            self._fail(problem)

    def _choose_pace(self, reader: ResponseReader) -> None:
        """Let the poller read while the end is far and chunks are too far apart to fall into one read."""
        chunks = len(reader.stamps)
        if self._poller is None or self._sock is None or chunks < 3:
            return
        # The shortest of late, not the mean: behind somebody's long prefill an engine's steps come fast again.
        late = reader.stamps[-_BATCH - 1 :]
        gap_ns = min(after - before for before, after in itertools.pairwise(late))
        self._reads_left = (self._expected_tokens - reader.received_tokens) // reader.largest_chunk - _LAST_READS
        patient = gap_ns >= LEAST_GAP_NS and self._reads_left > 0
        if patient and not self._patient:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._poller.add(self._sock.fileno(), self._on_readable, gap_ns)
            self._patient = True
        elif not patient:
            self._be_prompt()

    def _be_prompt(self) -> None:
        """Have the event loop read our socket again."""
        if self._patient:
            assert self._poller is not None and self._sock is not None
            self._poller.remove(self._sock.fileno())
            asyncio.get_running_loop().add_reader(self._sock, self._on_readable)
            self._patient = False


def fill(record: RequestRecord, exchange: Exchange) -> RequestRecord:
    """The record of a finished exchange; `record` says what was asked for, and when it was meant to go."""
    reader, error = exchange.reader, exchange.error
    origin = record.intended_ns
    return replace(
        record,
        sent_ns=exchange.sent_ns,
        first_token_ns=reader.stamps[0] if reader.stamps else None,
        last_token_ns=reader.stamps[-1] if reader.stamps else None,
        end_ns=exchange.end_ns,
        prompt_tokens=reader.prompt_tokens,
        completion_tokens=reader.completion_tokens,
        finish_reason=reader.finish_reason,
        clock="kernel" if exchange.kernel_clock else "user",
        reads=reader.reads,
        coalesced_reads=reader.coalesced_reads,
        chunk_ids=reader.ids_seen,
        chunk_us=tuple([(stamp - origin) // 1000 for stamp in reader.stamps]),
        chunk_tokens=tuple(reader.tokens),
        error=error[0] if error else None,
        error_detail=one_line(error[1]) if error else None,
    )


def _kind(problem: OSError, stage: str) -> str:
    """The class of a failure of the socket."""
    if problem.errno in _OUR_LIMITS and not isinstance(problem, socket.gaierror | ssl.SSLError):
        return "client"
    if isinstance(problem, ssl.SSLError) and stage != "connect":
        return "protocol"
    return "connect" if stage == "connect" else "early_close"


async def _connected(infos: Sequence[tuple[Any, ...]]) -> socket.socket:
    """A connection to the first address that takes one: `localhost` is ::1 first, where few servers listen."""
    problem = OSError("the name has no address")
    for family, kind, proto, _, where in infos:
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _ask_for_stamps(sock)
            await asyncio.get_running_loop().sock_connect(sock, where)
            return sock
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
    try:
        raise problem
    finally:
        del problem  # it holds this frame, and collections are off


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Its error, if it has one, may be told by another: asyncio would complain of one that nobody asked for."""
    if not future.cancelled():
        future.exception()


def _ask_for_stamps(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    except OSError:
        pass  # its reads then come without a stamp, and the record says so


def _kernel_ns(stamp: _Stamp) -> int | None:
    """The kernel's receive time in ns; None where the kernel gave none."""
    if not isinstance(stamp, int):
        for level, kind, payload in stamp:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(payload) >= _TIMESPEC.size:
                seconds, nanoseconds = _TIMESPEC.unpack_from(payload)
                return int(seconds * 1_000_000_000 + nanoseconds)
    return None


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """One for all connections: reading the system's certificates takes milliseconds."""
    return ssl.create_default_context()


class _Tls:
    """TLS over memory buffers: the socket stays ours, and with it the kernel's stamps."""

    def __init__(self, host: str) -> None:
        self.closed = False
        self.broken: ssl.SSLError | None = None
        """What was no TLS; what was decrypted before it counts."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = _tls_context().wrap_bio(self._incoming, self._outgoing, server_hostname=host)

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
        """What is readable after these bytes; b'' when a record is not complete yet, or the server said goodbye."""
        self._incoming.write(data)
        parts = []
        while True:
            try:
                part = self._object.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                self.closed = True
                break
            except ssl.SSLError as problem:
                self.broken = problem
                break
            if not part:
                self.closed = True
                break
            parts.append(part)
        return b"".join(parts)
