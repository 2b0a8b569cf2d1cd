"""A server that does what no server should, on a real socket, and a sweep against it.

What is not said otherwise is done well: pages, prompts as token ids, and an answer of as many tokens as were asked for.
A fault is a function of a socket; it befalls only some of the streamed requests, or all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from harness import job
from harness.engines import Target
from harness.errors import KneebenchError
from harness.load.generators import Generators, LoadResult
from harness.load.script import STREAM_HEAD, Script, Wording, models, read_request, tokenized
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario, SweepPoint, read_table

Fault = Callable[[socket.socket], None]
"""Answers a request that was read, in its own way. Raises HangUp to end the connection."""

SCENARIO = Scenario(
    "faults", input_tokens=12, output_tokens=6, requests=24, min_window_s=0.1,
    request_timeout_s=10.0, token_timeout_s=5.0,
)  # fmt: skip
SOME, ALL = range(7, 1 << 30, 7), range(1 << 30)
"""The streamed requests that a fault befalls; each seventh is more than the 5 % that make a point invalid."""
IDS = Dialect(vocabulary=range(100, 1000))


def page(body: bytes, status: str = "200 OK", *headers: str, kind: str = "application/json") -> bytes:
    """A whole answer, as a server sends it."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(told: object) -> bytes:
    """An event of a stream, as a chunk. Bytes go as they are."""
    return chunk(b"data: " + (told if isinstance(told, bytes) else json.dumps(told).encode()) + b"\n\n")


def token(text: str = " a", **more: object) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "token_ids": [7], "finish_reason": None, **more}]})


def sends(data: bytes, ends: Callable[[socket.socket], None] = lambda sock: None) -> Fault:
    """Send that, and then `ends`: nothing (the connection is kept), `closes`, `resets` or `hangs`."""

    def fault(sock: socket.socket) -> None:
        sock.sendall(data)
        ends(sock)

    return fault


class HangUp(Exception):
    """The server is done with this connection."""


def closes(sock: socket.socket) -> NoReturn:
    raise HangUp


def resets(sock: socket.socket) -> NoReturn:
    """As a server whose process has died, or a firewall: RST instead of a farewell. It overtakes what is unread."""
    time.sleep(0.02)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise HangUp


def hangs(sock: socket.socket) -> None:
    """Neither sends nor closes, until the other side has gone."""
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


def drips(data: bytes, gap_s: float = 1.0) -> Fault:
    """A byte a second, until all is said or nobody listens."""

    def fault(sock: socket.socket) -> None:
        for byte in data:
            time.sleep(gap_s)
            sock.sendall(bytes([byte]))

    return fault


def floods(before: bytes, block: bytes, blocks: int, taken: list[int] | None = None) -> Fault:
    """100 MB or what it is to be, as fast as it is taken; `taken` gets an entry for each block that was."""

    def fault(sock: socket.socket) -> None:
        sock.sendall(before)
        for number in range(blocks):
            sock.sendall(block)
            if taken is not None:
                taken.append(number)

    return fault


@dataclass(frozen=True, slots=True)
class Switched:
    """Befalls every request from a moment on."""

    on: Callable[[], bool]

    def __contains__(self, number: object) -> bool:
        return self.on()


@dataclass(slots=True)
class Server:
    """What runs: where, and what it has seen."""

    url: str
    listener: socket.socket
    requests: int = 0
    connections: int = 0


@contextlib.contextmanager
def hostile(
    fault: Fault | None = None,
    befalls: Container[int] = SOME,
    *,
    pages: Mapping[str, Fault | bytes] | None = None,
    tls: Callable[[int], ssl.SSLContext] | None = None,
    admits: Callable[[int, socket.socket], None] = lambda number, sock: None,
    probe: Fault | None = None,
    unread: bool = False,
) -> Iterator[Server]:
    """Serve on loopback until the block is left.

    `befalls`: numbers of the streamed requests, from 1, that meet the fault. `pages`: in place of the good ones.
    `probe`: the answer to what does not stream, by which a sweep finds out what a server understands.
    `tls`: the context for each connection, by its number. `admits` may end a connection as it begins.
    `unread`: the fault comes before the request's body was read.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if unread:  # or the kernel takes a megabyte for us
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    scheme = "https" if tls else "http"
    server = Server(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", listener)
    held: list[socket.socket] = []
    threads: list[threading.Thread] = []
    streamed = itertools.count(1)

    def serve(sock: socket.socket, number: int) -> None:
        with contextlib.ExitStack() as open_, contextlib.suppress(OSError, ValueError, HangUp):
            open_.callback(sock.close)
            admits(number, sock)
            if tls is not None:
                sock = tls(number).wrap_socket(sock, server_side=True)
                open_.callback(sock.close)
                held.append(sock)
            stream = open_.enter_context(sock.makefile("rb"))
            while line := stream.readline():
                url, headers = line.split()[1].decode(), _headers(stream)
                length = int(headers.get("content-length", 0))
                given = (pages or {}).get(url)
                streams = url == "/v1/completions" and "text/event-stream" in headers.get("accept", "")
                count = next(streamed) if streams else 0
                server.requests = max(server.requests, count)
                if streams and unread and count in befalls and fault is not None:
                    fault(sock)
                    continue
                body = stream.read(length)
                if len(body) < length:
                    return  # cut with its cell
                if isinstance(given, bytes):
                    sock.sendall(given)
                elif given is not None:
                    given(sock)
                elif streams and count in befalls and fault is not None:
                    fault(sock)
                elif probe is not None and url == "/v1/completions" and not streams:
                    probe(sock)
                else:
                    sock.sendall(_good(url, headers, body, streams))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                held.append(sock)
                server.connections += 1
                threads.append(threading.Thread(target=serve, args=(sock, server.connections), daemon=True))
                threads[-1].start()

    door = threading.Thread(target=accept, daemon=True)
    door.start()
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
        listener.close()
        door.join()
        for sock in held:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join(timeout=5)
        assert not any(thread.is_alive() for thread in threads), "a fault that does not end with its connection"


def _headers(stream: object) -> dict[str, str]:
    found = {}
    while line := stream.readline().strip():  # type: ignore[attr-defined]
        name, _, value = line.decode("latin-1").partition(":")
        found[name.lower()] = value.strip()
    return found


def _good(url: str, headers: Mapping[str, str], body: bytes, streams: bool) -> bytes:
    if url == "/v1/models":
        return page(json.dumps(models()).encode())
    if url == "/tokenize":
        return page(json.dumps(tokenized(body)).encode())
    if url != "/v1/completions":
        return page(b"{}", "404 Not Found")
    asked = read_request(url, headers, body, Script())
    wording = Wording(Script(), asked, "x", 0)
    if not streams:
        return page(json.dumps(wording.whole(asked.tokens)).encode())
    tokens = [wording.tokens(n, n + 1, last=n + 1 == asked.tokens, empty=False) for n in range(asked.tokens)]
    return STREAM_HEAD + b"".join(tokens) + wording.ending(asked.tokens)


# --- what a user does -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sweep that has ended: what it returned, what it said, and what lies on the disk."""

    code: int
    said: str
    rows: list[SweepPoint]
    records: list[RequestRecord]
    out: Path

    @property
    def errors(self) -> set[str]:
        """The classes of the requests that failed; those that we cut ourselves are no failures."""
        return {record.error for record in self.records if record.error not in (None, "cut")}

    @property
    def details(self) -> str:
        """What requests.csv says of the failures."""
        return "\n".join(record.error_detail or "" for record in self.records if record.error not in (None, "cut"))


class Quiet:
    """Watches a sweep and says nothing; `on_record` may act."""

    def __init__(self, on_record: Callable[[RequestRecord], None] = lambda record: None) -> None:
        self._on_record = on_record

    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None: ...

    def request_ended(self, record: RequestRecord) -> None:
        self._on_record(record)


def swept(
    out: Path, request: job.SweepRequest, on_record: Callable[[RequestRecord], None] = lambda record: None
) -> Outcome:
    """`bench sweep` without its terminal and its papers: what the command does, in this process to save time."""
    code, said = 0, ""
    try:
        job.sweep(request, Quiet(on_record))
    except KneebenchError as error:  # the command prints it, and returns its code
        code, said = error.exit_code, str(error)
    tables = (out / "points.csv", SweepPoint), (out / "requests.csv", RequestRecord)
    rows, records = (read_table(path, kind) if path.exists() else [] for path, kind in tables)
    return Outcome(code, said, rows, records, out)  # type: ignore[arg-type]


def swept_endpoint(
    url: str, out: Path, scenario: Scenario = SCENARIO, conc: tuple[int, ...] = (2,), model: str = "truth"
) -> Outcome:
    """A sweep of a server that runs already."""
    return swept(out, job.SweepRequest(scenario, conc, model, ("served",), out=out, endpoint=url))


def driven(url: str, scenario: Scenario = SCENARIO, conc: int = 2) -> tuple[LoadResult, int]:
    """The load of one cell without a control plane, and by how many bytes the generator's memory grew at its peak."""
    with Generators() as generators:
        with hostile() as good:  # everything that is loaded once is loaded now
            generators.run(Cell("warm", conc), scenario, IDS, Target(good.url, "truth"))
        before = peak_bytes(generators.pids()[0])
        load = generators.run(Cell("served", conc), scenario, IDS, Target(url, "truth"))
        return load, peak_bytes(generators.pids()[0]) - before


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held, by the kernel's account."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no VmHWM")
