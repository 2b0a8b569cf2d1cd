"""A generator on another node: the same worker, its line to the parent a TCP connection to the owner of the sweep.

    owner                                                        other node
    with listen("10.0.0.5") as door:
        door.where, door.key  ── by whoever starts it ──►  KNEEBENCH_DOOR=<key> python -m harness.load.away <where>
        connection = door.admit()  ◄─────── TLS, token ──────────┘  then it is a generator
    Generators(away=[connection, ...])

What protects it: the connection is TLS 1.3, for a job carries the endpoint's API key. Each door has a certificate of
its own, and the key that a worker is started with holds the certificate's fingerprint and a random token, 32 bytes
each: the worker speaks to nobody else, and nobody else is listened to. Messages are pickles, so whoever holds the key
can run code on both sides: it goes through the environment, never into a command line, a file or a log.

What does not: whoever can reach the port can keep a worker waiting, by coming in numbers. That ends in an error.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import selectors
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from harness import __version__
from harness.errors import InputError, MissingTool, RunError
from harness.load.messages import Inbox, Welcome, packed
from harness.load.worker import Worker, become_generator
from harness.redact import hide

DOOR_VARIABLE = "KNEEBENCH_DOOR"
"""The environment variable in which a worker finds its door's key."""
_KEY = re.compile(r"[0-9a-f]{128}")
"""64 digits of token, 64 of the certificate's SHA-256."""
_TOKEN_DIGITS = 64
_GREETING_BYTES = 128
_GREETING_S = 5.0
"""Whoever has not said the token by then is closed."""
_MOST_GUESTS = 64
"""So many are heard out at once; more are closed."""
_TICK_S = 0.1
_SILENCE_S = 30.0
"""A worker that takes no more of a message for so long is lost."""
_READ_BYTES = 1 << 16
"""More than a record of TLS can hold, so none is left by half where no selector sees it."""
_REMEDY = "see that its node is up and reaches this one, then go on with --resume"


@dataclass(slots=True, eq=False)
class _Guest:
    """Somebody at the door who has not said the token yet."""

    sock: ssl.SSLSocket
    peer: str
    until_s: float
    shaken: bool = False
    said: bytearray = field(default_factory=bytearray)

    def greeting(self) -> bytes | None:
        """Its first line, once it is there. Raises OSError for whoever speaks no TLS, is gone, or says too much."""
        try:
            if not self.shaken:
                self.sock.do_handshake()
                self.shaken = True
            self.said += self.sock.recv(_GREETING_BYTES - len(self.said)) or b"\n"
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if len(self.said) >= _GREETING_BYTES:
            raise OSError("no greeting")
        return bytes(self.said[:-1]) if self.said.endswith(b"\n") else None


class Door:
    """Where workers from other nodes come in. Use as a context manager; connections that were let in outlive it.

    where: HOST:PORT, as a worker is told on its command line.
    key: what a worker must hold in KNEEBENCH_DOOR. Secret, new for each door.
    """

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, fingerprint: str) -> None:
        host, port = listener.getsockname()[:2]
        self.where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._token = secrets.token_hex(_TOKEN_DIGITS // 2)
        self.key = self._token + fingerprint
        hide(self.key, self._token)
        self._listener, self._context = listener, context
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._guests: set[_Guest] = set()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in list(self._guests):
            self._part(guest)
            guest.sock.close()
        self._selector.close()
        self._listener.close()

    def admit(self, timeout_s: float = 60.0) -> Connection:
        """Wait for one worker that was started, and let it in.

        Outside of this call nobody is answered. Whoever comes without the token is closed and delays nobody. Raises
        RunError when no worker comes in time, or one of another version of kneebench.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for key, _ in self._selector.select(_TICK_S):
                if key.data is None:
                    self._open()
                elif connection := self._hear(key.data):
                    return connection
            for guest in [guest for guest in self._guests if time.monotonic() > guest.until_s]:
                self._turn_away(guest)
        raise RunError(f"no load generator came from another node within {timeout_s:g} s", remedy=_REMEDY)

    def _open(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._guests) >= _MOST_GUESTS:
            sock.close()
            return
        sock.setblocking(False)
        try:
            tls = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except OSError:  # likewise
            sock.close()
            return
        guest = _Guest(tls, str(address[0]), time.monotonic() + _GREETING_S)
        self._guests.add(guest)
        self._selector.register(tls, selectors.EVENT_READ, guest)

    def _hear(self, guest: _Guest) -> Connection | None:
        try:
            greeting = guest.greeting()
        except OSError:  # ssl.SSLError is one
            self._turn_away(guest)
            return None
        if greeting is None:
            return None
        token, _, version = greeting.partition(b" ")
        if not hmac.compare_digest(token, self._token.encode()):
            self._turn_away(guest)
            return None
        if version != __version__.encode():
            self._turn_away(guest)
            raise RunError(
                f"a load generator of kneebench {version.decode('ascii', 'replace')} came to one of {__version__}",
                remedy="install the same version on all nodes",
            )
        self._part(guest)
        connection = Connection(guest.sock, guest.peer)
        connection.send(Welcome())
        return connection

    def _part(self, guest: _Guest) -> None:
        self._guests.remove(guest)
        self._selector.unregister(guest.sock)

    def _turn_away(self, guest: _Guest) -> None:
        self._part(guest)
        guest.sock.close()


class Connection:
    """A worker that was let in: what `Generators(away=...)` takes, and ends. Its clock is another than ours."""

    own_clock = True

    def __init__(self, sock: ssl.SSLSocket, peer: str) -> None:
        self.peer = peer
        """Address of its node; to be redacted wherever it is written."""
        self.spoiled = False
        """It was left in the middle of a cell."""
        _watch_line(sock)
        self._sock = sock
        self._inbox = Inbox()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Any) -> None:
        """Send it. Raises RunError when the worker is gone, or takes nothing for half a minute."""
        self._sock.settimeout(_SILENCE_S)
        try:
            self._sock.sendall(packed(message))
        except OSError as error:  # ssl.SSLError and TimeoutError are
            raise _gone(error) from error

    def receive(self) -> list[Any]:
        """The messages that are complete with what has come. Raises RunError when the worker or its node is gone."""
        self._sock.settimeout(0)
        try:
            data = self._sock.recv(_READ_BYTES)
        except ssl.SSLWantReadError:  # half a TLS record
            return []
        except OSError as error:
            raise _gone(error) from error
        if not data:
            raise _gone("it closed the connection")
        return self._inbox.feed(data)

    def end(self) -> None:
        """Hang up, by which the worker ends."""
        self._sock.close()


def listen(host: str = "127.0.0.1", port: int = 0) -> Door:
    """Open a door on the address by which other nodes reach this machine; port 0: any that is free.

    Raises InputError when it cannot be bound, MissingTool without the `openssl` command, which makes the certificate.
    """
    allowed = "an address of this machine that the other nodes reach, and a port from 0 (any) to 65535"
    context, fingerprint = _certified()
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise InputError(f"{host!r} is every address of this machine", allowed=allowed)
        listener = socket.create_server(where[:2], family=family, backlog=_MOST_GUESTS)
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port} cannot be listened on ({error})", allowed=allowed) from error
    listener.setblocking(False)
    return Door(listener, context, fingerprint)


def _certified() -> tuple[ssl.SSLContext, str]:
    """A server's side of TLS with a certificate of its own, made now, and the certificate's SHA-256."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise MissingTool("`openssl` is not installed", remedy="install it: it makes the certificate of each sweep")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:  # mode 0700, and gone before anybody comes
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "365", "-subj", "/CN=kneebench", "-keyout", str(key), "-out", str(certificate)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise RunError(f"openssl made no certificate:\n{made.stderr.strip()[-300:]}")
        context.load_cert_chain(certificate, key)
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    return context, hashlib.sha256(der).hexdigest()


def _watch_line(sock: socket.socket) -> None:
    """Hear within half a minute of a node that has vanished: it sends no farewell, and silence alone is no sign."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):  # not everywhere by these names
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _gone(why: object) -> RunError:
    return RunError(f"a load generator on another node was lost ({why}); every finished row is on disk", remedy=_REMEDY)


# -- the other side ------------------------------------------------------------------------------------------------


class _Line(asyncio.Protocol):
    """The worker's end of the connection."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self._let_in = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.worker = Worker(cast(asyncio.WriteTransport, transport))  # uvloop's own have another base

    def data_received(self, data: bytes) -> None:
        assert self.worker is not None
        self._let_in = True
        self.worker.heard(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._let_in:
            _say_and_exit(RunError("the owner of the sweep closed its door", remedy="give the key of this very door"))
        os._exit(0)


async def _work_away(host: str, port: int, key: str) -> None:
    token, fingerprint = key[:_TOKEN_DIGITS], key[_TOKEN_DIGITS:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Not who signed it counts, nor until when, but that it is the very one whose fingerprint we were given.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        sock = socket.create_connection((host, port), _SILENCE_S)
        _watch_line(sock)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, line = await loop.create_connection(_Line, sock=sock, ssl=context, server_hostname="")
    except OSError as error:
        return _say_and_exit(RunError(f"the owner of the sweep cannot be reached: {error}"))
    certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    if not hmac.compare_digest(hashlib.sha256(certificate).hexdigest(), fingerprint):
        return _say_and_exit(
            RunError("somebody else answers for the owner of the sweep: the certificate is not its own")
        )
    transport.write(f"{token} {__version__}\n".encode())
    assert line.worker is not None
    await line.worker.work()


def _say_and_exit(error: RunError) -> None:
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)  # from inside the event loop: there is nothing to tidy up


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m harness.load.away HOST:PORT`, with the door's key in KNEEBENCH_DOOR."""
    parser = argparse.ArgumentParser(description="A load generator for a sweep on another machine.")
    parser.add_argument("where", metavar="HOST:PORT")
    host, _, port = parser.parse_args(argv).where.rpartition(":")
    key = os.environ.pop(DOOR_VARIABLE, "")
    if not _KEY.fullmatch(key) or not port.isdecimal():
        parser.error(f"HOST:PORT, and the door's key of 128 hexadecimal digits in {DOOR_VARIABLE}, are needed")
    become_generator(lambda: _work_away(host.strip("[]"), int(port), key))


if __name__ == "__main__":
    main()
