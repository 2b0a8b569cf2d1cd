"""The server whose delays are known: an OpenAI-compatible stream with a scripted TTFT and inter-token gap.

The oracle for the clock: a client's figures are compared with when this server really sent (`--log`), so that a late
server is never taken for a late client. It runs in a process of its own: two event loops in one would measure each
other. Its own loop, since asyncio's timers are coarse and its streams cost more than a token may:

    heap of (due, answer) --due--> answer's generator --one send() a chunk--> socket; the generator yields the next due
    epoll --readable--> recvmsg: bytes + kernel stamp --httptools--> request: due = stamp + ttft + k * gap

Times are CLOCK_REALTIME in ns. The schedule is absolute: a chunk that goes late makes no other one late.

    python -m harness.load.truth --port 8000 --ttft-ms 50 --gap-ms 20 [--close-after 3 ...]
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import resource
import select
import signal
import socket
import time
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import BinaryIO, get_type_hints

from harness import __version__
from harness.errors import InputError
from harness.load.script import (
    COMMENT,
    STREAM_END,
    STREAM_HEAD,
    Counters,
    Refusal,
    Request,
    Script,
    Wording,
    models,
    read_request,
    tokenized,
)
from harness.load.truth_socket import Connection, Message, listen

_TURN_TOKENS = 32
"""So many tokens are sent at most before sockets are looked at again, and so many sockets before tokens are."""
_TURN_SOCKETS = 4
_PIECE_NS = 1_000_000
_STALL_NS = 3600 * 10**9
_SHORTEST_SLEEP_S = 100e-6
"""What is due sooner than this waits for its neighbours: a sleep cost 30 us of CPU on a virtual machine."""
_IDLE_S = 0.001
"""The log is written when nothing is due for this long."""
_BACKLOG = 256
"""So many ended answers wait at most for a quiet moment; at 25,000 tokens a second there is none for hours."""


@dataclass(slots=True, eq=False)
class _Answer:
    """One request for tokens, from its arrival to its end."""

    number: int
    request: Request
    connection: Connection
    script: Script
    wording: Wording
    received_ns: int
    steps: Iterator[int] | None = None
    """Does what is due and yields when the next thing is; None: waits for a free place, or is over."""
    tokens: int = 0
    due_ns: array[int] = field(default_factory=lambda: array("q"))
    sent_ns: array[int] = field(default_factory=lambda: array("q"))

    def line(self) -> bytes:
        """Its line in the log."""
        entry = {
            "id": self.request.id,
            "received_ns": self.received_ns,
            "sent_ns": list(self.sent_ns),
            "due_ns": list(self.due_ns),
            "tokens": self.tokens,
            "prompt_tokens": self.request.prompt_tokens,
        }
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


class _Server:
    """The loop, its heap of what is due, and the counters."""

    def __init__(self, script: Script, listener: socket.socket, log: BinaryIO | None) -> None:
        self._faulty, self._calm = script, script.without_faults()
        self._listener, self._log = listener, log
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._answers: dict[Connection, _Answer] = {}
        self._heap: list[tuple[int, int, _Answer]] = []
        self._running: set[_Answer] = set()
        self._waiting: deque[_Answer] = deque()
        self._ended: deque[_Answer] = deque()
        self._counters = Counters()
        self._requests = 0
        self._first_ns = 0
        self._gap_ns = round(script.gap_ms * 1e6)
        self._steady = not script.gap_per_running_ms and not script.gap_growth
        self._lateness_us: Counter[int] = Counter()

    def run(self, wakeup: int) -> None:
        """Serve until something can be read from the descriptor `wakeup`."""
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(wakeup, select.EPOLLIN)
        watched, listening = [self._epoll.fileno()], self._listener.fileno()
        try:
            while True:
                self._send_due()
                # epoll's own timeout is rounded up to whole ms; select's is exact.
                if not select.select(watched, (), (), self._pause_s())[0]:
                    continue
                for descriptor, events in self._epoll.poll(0, _TURN_SOCKETS):
                    if descriptor == wakeup:
                        return
                    if descriptor == listening:
                        self._accept()
                    elif descriptor in self._connections:
                        self._take(self._connections[descriptor], events)
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._epoll.close()
            while self._ended:
                self._settle_ended()

    def figures(self) -> dict[str, float]:
        """How late chunks went, against the script."""
        late_us = sorted(self._lateness_us)
        reached = list(accumulate(self._lateness_us[late] for late in late_us))

        def late_ms(share: float) -> float:
            """Of the sent chunks in order of lateness, the one at `share`."""
            return late_us[bisect_right(reached, int(reached[-1] * share))] / 1e3 if reached else 0.0

        return {
            "tokens": self._counters.generation_tokens,
            "requests": self._requests,
            "p50_ms": late_ms(0.5),
            "p99_ms": late_ms(0.99),
            "max_ms": late_us[-1] / 1e3 if late_us else 0.0,
        }

    def _send_due(self) -> None:
        heap, now_ns = self._heap, time.time_ns
        for _ in range(_TURN_TOKENS):
            if not heap or heap[0][0] > now_ns():
                return
            _, number, answer = heap[0]
            due_ns = next(answer.steps, None) if answer.steps else None
            if due_ns is not None and not answer.connection.broken:
                heapq.heapreplace(heap, (due_ns, number, answer))
                continue
            heapq.heappop(heap)
            if answer.steps:
                self._end(answer)
                self._go_on(answer.connection)

    def _pause_s(self) -> float | None:
        """Until the next thing is due; None: nothing is. Where there is time, a line of the log is written."""
        pause_s = (self._heap[0][0] - time.time_ns()) / 1e9 if self._heap else None
        if pause_s is not None:
            pause_s = max(pause_s, _SHORTEST_SLEEP_S) if pause_s > 0 else 0.0
        if self._ended and (pause_s is None or pause_s > _IDLE_S or len(self._ended) > _BACKLOG):
            self._settle_ended()
            return 0.0
        return pause_s

    def _settle_ended(self) -> None:
        answer = self._ended.popleft()
        # Counted in steps of 10 us, so that hours of it stay small.
        late_ns = map(sub, answer.sent_ns, answer.due_ns)
        self._lateness_us.update(late // 10_000 * 10 for late in late_ns)
        if self._log is not None:
            self._log.write(answer.line())
            if not self._ended:
                self._log.flush()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._connections[sock.fileno()] = Connection(sock, self._epoll)

    def _take(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            connection.flush()
        if events & ~select.EPOLLOUT:
            connection.receive()
        self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        """Answer the connection's next requests, until one takes time."""
        while connection.messages and not (connection in self._answers or connection.broken or connection.leaving):
            message = connection.messages.popleft()
            connection.leaving = not message.keep_alive
            self._answer(connection, message)
        if connection.leaving and connection not in self._answers and not connection.unsent:
            connection.broken = True
        if connection.broken and connection.sock.fileno() in self._connections:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.close()
        if connection in self._answers:
            self._end(self._answers[connection])

    # -- what is answered ---------------------------------------------------------------------------------------
    def _answer(self, connection: Connection, message: Message) -> None:
        url, script = message.url, self._faulty
        if url == "/v1/chat/completions" or (url == "/v1/completions" and not script.chat_only):
            self._answer_tokens(connection, message)
        elif url == "/v1/models":
            connection.answer_json(200, models())
        elif url == "/version":
            connection.answer_json(200, {"version": f"truth-{__version__}"})
        elif url == "/health":
            connection.answer_with(200, b"text/plain", b"")
        elif url == "/metrics":
            self._counters.running, self._counters.waiting = len(self._running), len(self._waiting)
            self._counters.held_tokens = sum(answer.request.prompt_tokens + answer.tokens for answer in self._running)
            connection.answer_with(200, b"text/plain; version=0.0.4", self._counters.page(script))
        elif url == "/tokenize" and script.tokenize:
            try:
                connection.answer_json(200, tokenized(message.body))
            except Refusal as refusal:
                _refuse(connection, refusal)
        else:
            connection.answer_json(404, {"error": {"message": f"no {url} here", "code": 404}})

    def _answer_tokens(self, connection: Connection, message: Message) -> None:
        self._requests += 1
        script = self._calm if self._requests % self._faulty.every else self._faulty
        try:
            request = read_request(message.url, message.headers, message.body, script)
        except Refusal as refusal:
            _refuse(connection, refusal)
            return
        self._first_ns = self._first_ns or message.received_ns
        if script.preempt_every and self._requests % script.preempt_every == 0:
            self._counters.preemptions += 1
        wording = Wording(script, request, request.id or f"{self._requests:016x}", message.received_ns // 10**9)
        answer = _Answer(self._requests, request, connection, script, wording, message.received_ns)
        self._answers[connection] = answer
        if request.stream:
            connection.send(STREAM_HEAD + (wording.role() if request.chat else b""))
        if script.max_running is None or len(self._running) < script.max_running:
            self._start(answer, max(message.received_ns, connection.free_ns))
        else:
            self._waiting.append(answer)

    def _start(self, answer: _Answer, start_ns: int) -> None:
        self._running.add(answer)
        self._counters.prompt_tokens += answer.request.prompt_tokens
        answer.steps = self._stream(answer, start_ns) if answer.request.stream else self._whole(answer, start_ns)
        heapq.heappush(self._heap, (next(answer.steps), answer.number, answer))

    def _end(self, answer: _Answer) -> None:
        now_ns = time.time_ns()
        answer.steps = None
        answer.connection.free_ns = now_ns
        del self._answers[answer.connection]
        self._ended.append(answer)
        if answer not in self._running:
            self._waiting.remove(answer)
            return
        self._running.remove(answer)
        if self._waiting:
            self._start(self._waiting.popleft(), now_ns)

    def _stream(self, answer: _Answer, start_ns: int) -> Iterator[int]:
        """Sends the answer chunk by chunk; yields when the next thing is due."""
        script, connection, wording = answer.script, answer.connection, answer.wording
        count = max(0, answer.request.tokens - script.short)
        until, fault = script.fault_after(count)
        due_ns, cut = start_ns + round(script.ttft_ms * 1e6), script.drip or script.multibyte
        for index, first in enumerate(range(0, until, script.tokens_per_chunk), start=1):
            yield due_ns
            stop = min(first + script.tokens_per_chunk, until)
            empty = script.empty_text_every is not None and index % script.empty_text_every == 0
            if script.comment_every and index % script.comment_every == 0:
                connection.send(COMMENT)
            piece, piece_due_ns = wording.tokens(first, stop, last=stop == count, empty=empty), due_ns
            if cut:
                *early, piece = wording.pieces(piece)
                for drop in early:
                    connection.send(drop)
                    piece_due_ns += _PIECE_NS
                    yield piece_due_ns
            answer.tokens = stop
            self._counters.generation_tokens += stop - first
            if empty and not answer.request.ids_wanted:
                connection.send(piece)  # bears no token that anybody could see
            else:
                answer.due_ns.append(piece_due_ns)
                connection.send(piece, answer.sent_ns)
            due_ns += self._gap_ns if self._steady else self._gap_now_ns()
        if fault or not count:
            yield due_ns
        if fault == "stall":
            yield due_ns + _STALL_NS
        if fault in ("stall", "close"):
            connection.broken = True
        elif fault == "error":
            connection.send(wording.error(script.complaint("scripted failure", answer.request)) + STREAM_END)
        else:
            last = b"" if count else wording.tokens(0, 0, last=True, empty=True)
            connection.send(last + wording.ending(count))
        yield from _until_taken(connection)

    def _whole(self, answer: _Answer, start_ns: int) -> Iterator[int]:
        """Sends the answer at once, when its last token would have been due."""
        count = max(0, answer.request.tokens - answer.script.short)
        yield start_ns + round(answer.script.ttft_ms * 1e6) + max(0, count - 1) * self._gap_now_ns()
        answer.tokens = count
        self._counters.generation_tokens += count
        answer.due_ns.append(time.time_ns())
        answer.connection.answer_json(200, answer.wording.whole(count), answer.sent_ns)
        yield from _until_taken(answer.connection)

    def _gap_now_ns(self) -> int:
        script = self._faulty
        gap_ms = script.gap_ms + script.gap_per_running_ms * len(self._running)
        return round(gap_ms * 1e6 * (1 + script.gap_growth * (time.time_ns() - self._first_ns) / 1e9))


def _refuse(connection: Connection, refusal: Refusal) -> None:
    connection.answer_json(refusal.status, {"error": {"message": str(refusal), "code": refusal.status}})


def _until_taken(connection: Connection) -> Iterator[int]:
    """The answer is not over before the kernel has taken all of it."""
    while connection.unsent and not connection.broken:
        yield time.time_ns() + _PIECE_NS


def serve(script: Script, port: int = 0, log: Path | None = None) -> None:
    """Serve on loopback until SIGTERM or SIGINT. Prints `listening PORT` first, and its lateness on its way out.

    `log` gets a JSON line for each request that was answered with tokens: when it came and when each chunk was sent.
    Raises InputError when the port is taken or the log cannot be written.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        listener = held.enter_context(listen(port))
        file = held.enter_context(_open(log)) if log else None
        wakeup = held.enter_context(_signals())
        print(f"listening {listener.getsockname()[1]}", flush=True)
        server = _Server(script, listener, file)
        cpu_s = time.process_time()
        server.run(wakeup)
        figures = server.figures()
        cpu_us = (time.process_time() - cpu_s) * 1e6
        figures["cpu_us_per_token"] = cpu_us / max(1, figures["tokens"])
        print(f"lateness {json.dumps(figures)}", flush=True)


def _open(log: Path) -> BinaryIO:
    try:
        return log.open("ab")
    except OSError as error:
        raise InputError(f"--log {log}: cannot be written ({error.strerror}).", remedy="give another path") from error


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that becomes readable on SIGTERM and SIGINT."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = signal.set_wakeup_fd(writable)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield readable
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(readable)
        os.close(writable)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `bench truth`, and `python -m harness.load.truth`."""
    parser = argparse.ArgumentParser("bench truth", description="A scripted OpenAI-compatible server of known delays.")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0, the default, takes any that is free")
    parser.add_argument("--log", type=Path, help="a JSON line for each request: when it came, when each chunk was sent")
    kinds = get_type_hints(Script)
    for option in fields(Script):
        flag, text = "--" + option.name.replace("_", "-"), option.metadata["help"]
        if kinds[option.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        else:
            kind = float if kinds[option.name] is float else int
            parser.add_argument(flag, type=kind, default=option.default, metavar="N", help=text)
    given = vars(parser.parse_args(argv))
    port, log = given.pop("port"), given.pop("log")
    try:
        serve(Script(**given), port, log)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
