"""A socket of the truth server, with the kernel's own receive stamps: bytes in, HTTP requests out, and bytes back."""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from array import array
from collections import deque
from dataclasses import dataclass

import httptools

from harness.errors import InputError

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module has no name for it
_TIMESPEC = struct.Struct("@qq")
_READ_BYTES = 1 << 16


def listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit both: a request that comes with the connection is stamped, too.
        listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(4096)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"--port {port}: cannot be listened on ({error}).", allowed="0 (any) to 65535", remedy="give a free one"
        ) from error
    return listener


@dataclass(frozen=True, slots=True)
class Message:
    """One HTTP request."""

    url: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool
    received_ns: int


class Connection:
    """A client's socket. Requests on it are answered one after the other."""

    def __init__(self, sock: socket.socket, epoll: select.epoll) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.messages: deque[Message] = deque()
        self.free_ns = 0
        """When its last answer ended: a pipelined request begins then, not at its arrival."""
        self.leaving = False
        """The client wants no further answer on it."""
        self.broken = False
        self.unsent: deque[tuple[bytes, array[int] | None]] = deque()
        self._epoll = epoll
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._stamp_ns = 0
        epoll.register(sock, select.EPOLLIN)

    def receive(self) -> None:
        """Take what has come; whole requests are in `messages` then."""
        try:
            data, ancillary, _, _ = self.sock.recvmsg(_READ_BYTES, socket.CMSG_SPACE(_TIMESPEC.size))
            self._stamp_ns = time.time_ns()
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack_from(payload)
                    self._stamp_ns = seconds * 10**9 + nanoseconds
            self.broken = self.broken or not data
            self._parser.feed_data(data)
        except BlockingIOError:
            return
        except (OSError, httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.broken = True

    def send(self, data: bytes, stamps: array[int] | None = None) -> None:
        """Send, and put the time into `stamps` once the kernel has taken it all."""
        if not self.unsent:
            try:
                taken = self.sock.send(data)
            except BlockingIOError:
                taken = 0
            except OSError:
                self.broken = True
                return
            if taken == len(data):
                if stamps is not None:
                    stamps.append(time.time_ns())
                return
            data = data[taken:]
            self._epoll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
        self.unsent.append((data, stamps))

    def flush(self) -> None:
        """The client reads again: send what had to wait."""
        waiting, self.unsent = self.unsent, deque()
        self._epoll.modify(self.sock, select.EPOLLIN)
        for data, stamps in waiting:
            self.send(data, stamps)

    def answer_json(self, status: int, body: object, stamps: array[int] | None = None) -> None:
        self.answer_with(status, b"application/json", json.dumps(body).encode(), stamps)

    def answer_with(self, status: int, kind: bytes, body: bytes, stamps: array[int] | None = None) -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (status, kind, len(body))
        self.send(head + body, stamps)

    def close(self) -> None:
        self._epoll.unregister(self.sock)
        self.sock.close()

    # -- httptools callbacks ------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url, keep_alive = self._url.decode("latin-1").partition("?")[0], self._parser.should_keep_alive()
        self.messages.append(Message(url, self._headers, bytes(self._body), keep_alive, self._stamp_ns))
