"""A server that speaks the OpenAI API with predicted timing: for demos, dashboards and load tests without a card.

    socket ─► Message ─► Question ─► Realtime.ask            (truth_socket.py, answers.py, realtime.py)
    Realtime.advance ─► Tokens ─► a token to each of their sockets

Nobody may take it for an engine: each answer has the header X-Kneebench-Simulated, its text is the word "simulated",
and /v1/models says who owns the model.

Sockets are the truth server's, with its kernel stamps: a request was sent when the kernel had it, not when we looked.
So is the loop: asyncio's timers come in whole milliseconds, as much as a token of a small model takes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from harness import __version__
from harness.errors import InputError
from harness.load.client import SO_TIMESTAMPNS
from harness.load.truth_socket import Connection, Message
from harness.predict import answers
from harness.predict.answers import Question, Refusal, Wording
from harness.predict.exporter import Exporter
from harness.predict.limits import Asked
from harness.predict.realtime import Realtime, Tokens
from harness.predict.serving import Serving, announced

_TURN_SOCKETS = 64
"""Sockets that are looked at before tokens are again."""
_JSON = "application/json"


def serve(
    serving: Serving, *, host: str = "127.0.0.1", port: int = 0, speed: float = 1.0, say: Callable[[str], None] = print
) -> None:
    """Serve until SIGTERM or Ctrl-C; port 0 is any that is free. `say` gets what is served first, and last how well it
    kept time. speed: everything is so many times faster than predicted.

    Raises InputError when the address cannot be listened on.
    """
    with ExitStack() as held:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        listener = held.enter_context(_listen(host, port))
        server = _Server(serving, listener, speed)
        with _until_told():
            bound = listener.getsockname()
            say(announced(serving, f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}", speed))
            server.run()
        say(server.told())


class _Client(Connection):
    """A socket, and what is being answered on it."""

    def __init__(self, sock: socket.socket, epoll: select.epoll) -> None:
        super().__init__(sock, epoll)
        self.methods: deque[str] = deque()
        """Of `messages`, one each."""
        self.answer: _Answer | None = None

    def on_message_complete(self) -> None:
        self.methods.append(self._parser.get_method().decode("latin-1"))
        super().on_message_complete()


@dataclass(slots=True, eq=False)
class _Answer:
    """A request for tokens, from its arrival to its end. Times are the engine's, s."""

    asked: Asked
    question: Question
    client: _Client
    wording: Wording
    tokens: int = 0
    last_s: float = 0.0


class _Server:
    """The loop, its sockets, and the engine."""

    def __init__(self, serving: Serving, listener: socket.socket, speed: float) -> None:
        self._model, self._speed, self._listener = serving.model, speed, listener
        self._engine = Realtime(serving.what.limits, serving.what.steps)
        shown, precision = (_header_text(text) for text in (serving.what.card.name, serving.what.precision))
        self._mark = f"X-Kneebench-Simulated: {shown}, {precision}\r\n".encode("ascii")
        self._exporter = Exporter(serving.name, serving.what.card.name, serving.what.precision, self._model.context)
        self._start, self._created = time.monotonic(), int(time.time())
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._answers: dict[int, _Answer] = {}
        """By number, which is the `user` of what the engine was asked."""
        self._requests = self._tokens = 0
        self._routes: dict[str, tuple[str, Callable[[_Client, Message], None]]] = {
            "/health": ("GET", lambda client, _: self._send(client, 200, b"", "text/plain")),
            "/v1/models": (
                "GET",
                lambda client, _: self._send_json(client, answers.models(self._model, self._created)),
            ),
            "/version": ("GET", lambda client, _: self._send_json(client, {"version": f"simulated-{__version__}"})),
            "/metrics": ("GET", self._metrics),
            "/tokenize": ("POST", lambda c, message: self._send_json(c, answers.tokenized(message.body, self._model))),
            "/v1/completions": ("POST", self._ask),
            "/v1/chat/completions": ("POST", self._ask),
        }

    def run(self) -> None:
        """Serve until an exception ends it."""
        self._epoll.register(self._listener, select.EPOLLIN)
        watched, listening = [self._epoll.fileno()], self._listener.fileno()
        try:
            while True:
                tokens = self._engine.advance(self._now_s())
                if tokens is not None:
                    self._give(tokens)
                # epoll's own timeout is rounded up to whole ms; select's is exact.
                if not select.select(watched, (), (), self._pause_s())[0]:
                    continue
                for descriptor, events in self._epoll.poll(0, _TURN_SOCKETS):
                    if descriptor == listening:
                        self._accept()
                    elif descriptor in self._clients:
                        self._take(self._clients[descriptor], events)
        finally:
            for client in list(self._clients.values()):
                client.close()
            self._epoll.close()

    def told(self) -> str:
        """What was served, and how well it kept time."""
        worst_ms = self._exporter.worst_lag_s * 1e3
        return f"{self._requests} requests, {self._tokens} simulated tokens, none more than {worst_ms:.1f} ms late"

    def _now_s(self) -> float:
        return (time.monotonic() - self._start) * self._speed

    def _pause_s(self) -> float | None:
        """Until something is due; None: nothing is."""
        due_s = self._engine.due_s
        return None if due_s == float("inf") else max(0.0, (due_s - self._now_s()) / self._speed)

    # -- tokens -------------------------------------------------------------------------------------------------
    def _give(self, tokens: Tokens) -> None:
        for request in tokens.requests:
            answer = self._answers.get(request.asked.user)
            if answer is None:
                continue  # its client has gone
            question, sent_s = answer.question, answer.asked.arrival_s
            if answer.tokens:
                self._exporter.next_token((tokens.at_s - answer.last_s) / self._speed)
            else:
                waited_s = (request.scheduled_s or sent_s) - sent_s
                waits = (tokens.at_s - sent_s, waited_s)
                self._exporter.first_token(question.prompt_tokens, *(wait / self._speed for wait in waits))
            if question.stream:
                answer.client.send(answer.wording.token(answer.tokens))
            answer.tokens += 1
            answer.last_s = tokens.at_s
            self._tokens += 1
            if answer.tokens == question.tokens:
                if not question.stream:
                    self._send_json(answer.client, answer.wording.whole())
                self._end(answer, question.finish_reason)
                self._go_on(answer.client)
            elif answer.client.broken:
                self._go_on(answer.client)
        self._exporter.lagged(max(0.0, self._now_s() - tokens.at_s) / self._speed)

    def _end(self, answer: _Answer, reason: str) -> None:
        question, seconds = answer.question, (self._now_s() - answer.asked.arrival_s) / self._speed
        self._exporter.ended(reason, question.prompt_tokens, answer.tokens, seconds)
        del self._answers[answer.asked.user]
        answer.client.answer = None
        answer.client.free_ns = time.time_ns()

    # -- sockets ------------------------------------------------------------------------------------------------
    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            self._clients[sock.fileno()] = _Client(sock, self._epoll)

    def _take(self, client: _Client, events: int) -> None:
        if events & select.EPOLLOUT:
            client.flush()
        if events & ~select.EPOLLOUT:
            client.receive()
        self._go_on(client)

    def _go_on(self, client: _Client) -> None:
        """Answer the client's next requests, until one takes time."""
        while client.messages and not (client.answer or client.broken or client.leaving):
            message = client.messages.popleft()
            client.leaving = not message.keep_alive
            self._answer(client, client.methods.popleft(), message)
        if client.leaving and not client.answer and not client.unsent:
            client.broken = True
        if client.broken and client.sock.fileno() in self._clients:
            del self._clients[client.sock.fileno()]
            client.close()
            if client.answer is not None:
                self._engine.drop(client.answer.asked)
                self._end(client.answer, "abort")

    # -- what is answered ---------------------------------------------------------------------------------------
    def _answer(self, client: _Client, method: str, message: Message) -> None:
        try:
            if message.url not in self._routes:
                raise Refusal(404, "Not Found", "Not Found")
            allowed, answer = self._routes[message.url]
            if method != allowed:
                raise Refusal(405, "Method Not Allowed", "Method Not Allowed")
            answer(client, message)
        except Refusal as refusal:
            body = b"" if method == "HEAD" else json.dumps(refusal.body).encode()
            self._send(client, refusal.status, body)

    def _ask(self, client: _Client, message: Message) -> None:
        question = answers.read_question(message.body, self._model, chat=message.url.startswith("/v1/chat"))
        number = self._requests
        age_s = max(0, time.time_ns() - max(message.received_ns, client.free_ns)) / 1e9
        sent_s = max(0.0, self._now_s() - age_s * self._speed)
        asked = Asked(sent_s, question.prompt_tokens, question.tokens, number)
        try:
            self._engine.ask(asked)
        except InputError as error:
            raise Refusal(400, str(error)) from None
        self._requests += 1
        name = message.headers.get("x-request-id") or f"{number:016x}"
        client.answer = _Answer(asked, question, client, Wording(question, self._model, name, int(time.time())))
        self._answers[number] = client.answer
        if question.stream:
            client.send(self._head(200, "text/event-stream; charset=utf-8") + b"transfer-encoding: chunked\r\n\r\n")

    def _metrics(self, client: _Client, message: Message) -> None:
        page = self._exporter.page(self._engine.state(self._now_s()))
        self._send(client, 200, page, "text/plain; version=0.0.4; charset=utf-8")

    def _send_json(self, client: _Client, body: object) -> None:
        self._send(client, 200, json.dumps(body).encode())

    def _send(self, client: _Client, status: int, body: bytes, kind: str = _JSON) -> None:
        client.send(self._head(status, kind) + b"content-length: %d\r\n\r\n%b" % (len(body), body))

    def _head(self, status: int, kind: str) -> bytes:
        words = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {kind}\r\n"
        return words.encode("ascii") + self._mark


def _header_text(text: str) -> str:
    """What a header can carry of it."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)


def _listen(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port <= 65535:
            raise OSError("there is no such port")
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(address[0]), port), family=family, backlog=4096)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error})",
            allowed="an address of this machine, and a port from 1 to 65535 that nobody else has",
            remedy="leave --port out: any that is free is taken then",
        ) from error
    listener.setblocking(False)
    # Accepted sockets inherit both.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return listener


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block, and nothing else."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
