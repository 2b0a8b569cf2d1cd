"""The simulated server from outside, over sockets; and what it understands and says, without any."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.analysis import metrics
from harness.engines import Target
from harness.engines.address import Address
from harness.engines.endpoint import attach
from harness.errors import InputError
from harness.load import dialect
from harness.load.client import Connection, fill
from harness.load.workload import drawn_lengths, make_ask
from harness.predict import cell
from harness.predict.answers import (
    CHAT_ANSWER_TOKENS,
    CHAT_TOKENS,
    COMPLETION_TOKENS,
    MESSAGE_TOKENS,
    Model,
    Refusal,
    Wording,
    read_question,
    tokenized,
)
from harness.predict.bands import Band
from harness.predict.cards import card
from harness.predict.exporter import Exporter
from harness.predict.limits import Asked
from harness.predict.realtime import State
from harness.predict.roofline import Coefficients
from harness.predict.scheduler import simulate
from harness.predict.server import serve
from harness.predict.serving import Serving, announced, prepared
from harness.predict.shapes import shape
from harness.predict.stretches import Served
from harness.records import Cell, RequestRecord, Scenario
from harness.telemetry.prometheus import NAMES, read_counters

DATA = Path(__file__).parent.parent / "data"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONTEXT = 32_768
MODEL = Model("m", 100, 32_000)

# What the command does, with coefficients that no later fit changes.
RUN = """
import sys
from tests.predict.test_server import serving
from harness.predict.server import serve
serve(serving(*sys.argv[1:]), say=lambda text: print(text, flush=True))
"""


def serving(gpu: str, model: str, precision: str, name: str = "") -> Serving:
    known, scenario = shape(model), Scenario("test", max_model_len=CONTEXT)
    what = cell.served(card(gpu), known.architecture, precision, scenario, Coefficients())
    return Serving(name or known.name, what)


class Running:
    """A server in a process of its own."""

    def __init__(self, *names: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *names], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert self.process.stdout is not None
        self.said = "".join(iter(self.process.stdout.readline, "  Ctrl-C ends it\n"))
        self.url = re.findall(r"(http://127\.0\.0\.1:\d+)/v1", self.said)[0]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> str:
        """What it said last."""
        self.process.send_signal(how)
        said, _ = self.process.communicate(timeout=20)
        return said


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A small model: a token every few ms."""
    running = Running("l4", "qwen2.5-0.5b", "awq")
    try:
        yield running
    finally:
        running.stop()


def events(text: str) -> list[dict[str, Any]]:
    """The stream's JSON events; it must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


# --- over sockets ---


def test_what_it_says_of_itself(server: Running) -> None:
    """Whoever looks sees that it is simulated."""
    assert "simulated, nothing measured" in server.said
    for path in ("/health", "/v1/models", "/metrics", "/version", "/nothing"):
        assert httpx.get(server.url + path).headers["x-kneebench-simulated"] == "NVIDIA L4, awq"
    assert httpx.get(server.url + "/health").status_code == 200
    (offered,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert offered["id"] == "qwen2.5-0.5b"
    assert offered["owned_by"] == "kneebench-simulated"
    assert offered["max_model_len"] == CONTEXT
    with attach(server.url) as endpoint:
        assert endpoint.info.engine_version is not None and endpoint.info.engine_version.startswith("simulated")
        endpoint.check()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_answer_at_once_or_in_a_stream(server: Running, path: str) -> None:
    asked = {"model": "qwen2.5-0.5b", "max_tokens": 7, "return_token_ids": True, "ignore_eos": True, "min_tokens": 7}
    asked |= {"prompt": [5] * 20} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x" * 48}]}
    prompt = 20 if path == COMPLETIONS else CHAT_TOKENS + MESSAGE_TOKENS + 12
    usage = {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
    whole = httpx.post(server.url + path, json=asked)
    assert whole.status_code == 200 and whole.headers["x-kneebench-simulated"] == "NVIDIA L4, awq"
    (choice,) = whole.json()["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert text == " ".join(["simulated"] * 7)
    assert len(choice["token_ids"]) == 7
    assert choice["finish_reason"] == "length"
    assert whole.json()["usage"] == usage

    reply = httpx.post(server.url + path, json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-kneebench-simulated"] == "NVIDIA L4, awq"
    *chunks, last = events(reply.text)
    assert (last["choices"], last["usage"]) == ([], usage)
    parts = [chunk["choices"][0] for chunk in chunks]
    if path == CHAT:
        assert parts.pop(0)["delta"] == {"role": "assistant", "content": ""}
    assert [len(part["token_ids"]) for part in parts] == [1] * 7
    assert "".join(part["text"] if path == COMPLETIONS else part["delta"]["content"] for part in parts) == text
    assert [part["finish_reason"] for part in parts] == [None] * 6 + ["length"]


def test_errors_are_those_of_vllm(server: Running) -> None:
    def refused(status: int, words: str, body: object = None, method: str = "POST", path: str = COMPLETIONS) -> None:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        reply = httpx.request(method, server.url + path, content=content if body is not None else None)
        assert reply.status_code == status
        error = reply.json()["error"]
        assert words in error["message"] and error["code"] == status and {"type", "param"} < set(error)

    refused(404, "`other` does not exist", {"model": "other", "prompt": "a"})
    refused(404, "Not Found", path="/v1/embeddings")
    refused(405, "Method Not Allowed", method="GET")
    refused(405, "Method Not Allowed", path="/health")
    refused(400, "cannot be read", "{")
    refused(400, f"maximum context length is {CONTEXT} tokens", {"prompt": [1] * CONTEXT, "max_tokens": 1})
    assert httpx.head(server.url + "/health").status_code == 405
    assert httpx.get(server.url + "/health").status_code == 200, "and it still answers"


def test_metrics_are_read_like_an_engines(server: Running) -> None:
    """Token counts are to the token: a sweep compares them with what it received."""
    before = read_counters(httpx.get(server.url + "/metrics").text)
    for tokens in (3, 1, 9):
        httpx.post(server.url + COMPLETIONS, json={"prompt": [1] * 50, "max_tokens": tokens}).raise_for_status()
    page = httpx.get(server.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = read_counters(page.text)
    assert None not in [getattr(after, name) for name in NAMES]
    assert (after.prompt_tokens_total or 0) - (before.prompt_tokens_total or 0) == 150
    assert (after.generation_tokens_total or 0) - (before.generation_tokens_total or 0) == 13
    assert (after.prefix_queries_total, after.prefix_hits_total) == (after.prompt_tokens_total, 0)
    assert (after.running, after.waiting, after.kv_usage, after.preemptions_total) == (0, 0, 0.0, 0)
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    (simulated,) = families["kneebench_simulated"].samples
    assert simulated.value == 1
    assert simulated.labels == {"card": "NVIDIA L4", "precision": "awq", "model_name": "qwen2.5-0.5b"}
    assert "vllm:time_to_first_token_seconds" in families


def test_who_hangs_up_is_forgotten(server: Running) -> None:
    """A request that would take minutes runs and holds blocks until its client goes, in a stream or not."""

    def counters() -> Any:
        return read_counters(httpx.get(server.url + "/metrics").text)

    address = Address.parse(server.url)
    for stream in (True, False):
        body = json.dumps({"prompt": [1] * 500, "max_tokens": 30_000, "stream": stream}).encode()
        with closing(socket.create_connection((address.host, address.port), timeout=20)) as sock:
            sock.sendall(b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(body), body))
            if stream:
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
            until(lambda: counters().running == 1)
            assert counters().kv_usage > 0
        until(lambda: counters().running == 0)
        assert counters().kv_usage == 0
    assert 'finished_reason="abort",model_name="qwen2.5-0.5b"} 2.0' in httpx.get(server.url + "/metrics").text
    assert httpx.post(server.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_requests_on_one_connection_are_answered_in_turn(server: Running) -> None:
    address = Address.parse(server.url)
    bodies = [json.dumps({"prompt": "a", "max_tokens": tokens}).encode() for tokens in (5, 2)]
    asked = [b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(b), b) for b in bodies]
    with closing(socket.create_connection((address.host, address.port), timeout=20)) as sock:
        sock.sendall(b"".join(asked) + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        said = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
    assert re.findall(r'"completion_tokens": (\d)', said) == ["5", "2"]
    assert said.count("HTTP/1.1 200 OK") == 3
    assert said.endswith("content-length: 0\r\n\r\n")


def test_the_harness_speaks_with_it_as_with_vllm(server: Running) -> None:
    found = dialect.probe(Target(server.url, "qwen2.5-0.5b"))
    assert found.vllm_extras and not found.chat
    assert len(found.vocabulary) > 40
    chat = dialect.probe(Target(server.url, "qwen2.5-0.5b"), chat=True)
    assert chat.chat and chat.overhead_tokens == pytest.approx(CHAT_TOKENS + MESSAGE_TOKENS, abs=1)
    assert chat.turn_overhead_tokens == pytest.approx(2 * MESSAGE_TOKENS, abs=2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_told(how: signal.Signals) -> None:
    """In the middle of an answer, too; the port is free again, and it says what it did."""
    running = Running("l4", "qwen2.5-0.5b", "awq")
    try:
        address = Address.parse(running.url)
        with httpx.stream("POST", running.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1000, "stream": True}):
            said = running.stop(how)
        assert running.process.returncode == 0
        assert re.fullmatch(r"1 requests, \d+ simulated tokens, none more than [\d.]+ ms late\n", said)
        socket.create_server((address.host, address.port)).close()
    finally:
        running.process.kill()
        running.process.wait(timeout=20)


# --- agreement with the prediction ---

USERS, ROUNDS = 3, 2


class Rounds:
    """The users of the measurement below, in virtual time."""

    def __init__(self, scenario: Scenario, asked: Cell) -> None:
        self.scenario, self.cell = scenario, asked

    def first(self) -> Iterable[Asked]:
        return [self._asked(user, 0, 0.0) for user in range(USERS)]

    def after(self, served: Served) -> Asked | None:
        turn = served.sequence + 1
        return self._asked(served.user, turn, served.last_token_s) if turn < ROUNDS else None

    def _asked(self, user: int, turn: int, now: float) -> Asked:
        return Asked(now, *drawn_lengths(self.scenario, self.cell, user, turn), user, turn)


def test_the_harness_measures_what_is_predicted() -> None:
    """Three users of a 7B model on an L4, about 57 ms a token, timed by the harness's own client.

    Nothing goes out before its time, so a lone request's tokens cannot come sooner than predicted. How much later they
    come is this machine's matter: medians agree within a generous factor.
    """
    what = serving("l4", "qwen2.5-7b", "bf16").what
    scenario, asked = Scenario("test", input_tokens=64, output_tokens=10), Cell("bf16", USERS)
    served = simulate(Rounds(scenario, asked), what.limits, what.steps).served
    running = Running("l4", "qwen2.5-7b", "bf16")
    try:
        found = asyncio.run(measured(running.url, scenario, asked))
        lone = asyncio.run(measured(running.url, scenario, asked, users=1, rounds=1))[0]
    finally:
        running.stop()

    lengths = {(item.user, item.sequence): (item.input_tokens, item.output_tokens) for item in served}
    assert {(r.user, r.sequence): (r.prompt_tokens, r.completion_tokens) for r in found} == lengths
    for record in [*found, lone]:
        assert record.error is None
        assert record.chunk_ids and record.chunk_tokens == (1,) * record.output_tokens_asked
        assert list(record.chunk_us) == sorted(record.chunk_us)

    tpot = {(s.user, s.sequence): (s.last_token_s - s.first_token_s) / (s.output_tokens - 1) * 1e3 for s in served}
    ttft = {(s.user, s.sequence): (s.first_token_s - s.arrival_s) * 1e3 for s in served}
    assert 50 < statistics.median(tpot.values()) < 70
    for predicted, seen in ((tpot, metrics.tpot_ms), (ttft, metrics.ttft_ms)):
        ratios = [(seen(record) or 0.0) / predicted[record.user, record.sequence] for record in found]
        assert 0.8 < statistics.median(ratios) < 1.6

    alone = simulate(Alone(Asked(0.0, lone.input_tokens_asked, lone.output_tokens_asked)), what.limits, what.steps)
    soonest_us = alone.token_times(alone.served[0]) * 1e6
    assert len(lone.chunk_us) == len(soonest_us)
    assert all(at >= soonest - 1000 for at, soonest in zip(lone.chunk_us, soonest_us, strict=True))


class Alone:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def first(self) -> Iterable[Asked]:
        return [self.asked]

    def after(self, served: Served) -> Asked | None:
        return None


async def measured(
    url: str, scenario: Scenario, asked: Cell, users: int = USERS, rounds: int = ROUNDS
) -> list[RequestRecord]:
    async def user(number: int) -> list[RequestRecord]:
        connection, found = Connection(Address.parse(url)), []
        try:
            await connection.open()
            for turn in range(rounds):
                ask = make_ask(scenario, asked, number, turn, dialect.Dialect(vocabulary=range(100, 200)), "qwen2.5-7b")
                record = RequestRecord(
                    asked.key, number, turn, "measured", time.time_ns(),
                    input_tokens_asked=ask.input_tokens, output_tokens_asked=ask.output_tokens,
                )  # fmt: skip
                found.append(fill(record, await connection.exchange(COMPLETIONS, ask.body)))
        finally:
            connection.close()
        return found

    return [record for found in await asyncio.gather(*map(user, range(users))) for record in found]


# --- what cannot be served ---


def test_a_taken_port_is_said() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be listened on") as caught:
            serve(serving("l4", "qwen2.5-0.5b", "awq"), port=port, say=pytest.fail)
    assert caught.value.exit_code == 2
    for host, port in (("nowhere.invalid", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(InputError, match="cannot be listened on"):
            serve(serving("l4", "qwen2.5-0.5b", "awq"), host=host, port=port, say=pytest.fail)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("h9000", "qwen2.5-7b", "bf16"), "h9000"),
        (("l4", "qwen9", "bf16"), "qwen9"),
        (("l4", "qwen2.5-7b", "int1"), "int1"),
        (("rtx-2000-ada", "qwen2.5-14b", "bf16"), "does not fit"),
    ],
)
def test_what_cannot_be_served_is_said(names: tuple[str, str, str], words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("harness.predict.coefficients.fitted", Coefficients)
    with pytest.raises(InputError, match=words) as caught:
        prepared(*names)
    assert caught.value.exit_code == 2


# --- words ---


def test_a_band_is_told_beside_what_is_served() -> None:
    bare = serving("t4", "qwen2.5-0.5b", "fp16")
    one = Band("tok_s", "one", "architecture", 0.71, 1.38, 41, 9, 0.08)
    many = Band("tok_s", "users", "card", 0.6, 1.5, 77, 12, 0.14)
    said = announced(Serving(bare.name, bare.what, (one, many)), "http://127.0.0.1:1", 4.0)
    assert "4 times as fast as predicted" in said
    assert "a lone user: 95 % of 41 published measurements were 0.71 to 1.38 times what is predicted" in said
    assert said.count("unvalidated") == 1
    assert "several users: 95 % of 77 published measurements were 0.60 to 1.50 times" in said
    base_s, slope_s = bare.what.steps.decode(1)
    assert f"a token every {(base_s + 512 * slope_s) * 1e3:.1f} ms" in said


@pytest.mark.parametrize(("path", "recorded"), [(COMPLETIONS, "vllm_completions"), (CHAT, "vllm_chat")])
def test_chunks_are_those_of_vllm(path: str, recorded: str) -> None:
    """Key for key those recorded from vLLM 0.32, but for those of prompts and of its build."""
    theirs = events((DATA / f"{recorded}_stream.txt").read_text())
    asked = {"prompt": "a", "messages": [{"content": "a"}], "max_tokens": 3, "return_token_ids": True, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    wording = Wording(read_question(body, MODEL, chat=path == CHAT), MODEL, "name", 7)
    sent = b"".join(wording.token(number) for number in range(3)).decode()
    assert sent.endswith("0\r\n\r\n")
    ours = events(sent.replace("\r\n", "\n"))
    more = {"prompt_token_ids", "prompt_text", "system_fingerprint"}

    def keys(chunk: dict[str, Any]) -> tuple[set[str], set[str]]:
        return set(chunk) - more, {key for choice in chunk["choices"] for key in choice} - more - {"stop_reason"}

    for number in (0, 1, -2, -1):
        assert keys(ours[number]) == keys(theirs[number])
        assert ours[number]["object"] == theirs[number]["object"]
    assert set(ours[-1]["usage"]) == set(theirs[-1]["usage"])


def asking(chat: bool = False, **body: Any) -> Any:
    given = {"messages": [{"role": "user", "content": "abcdefgh"}]} if chat else {"prompt": "abcdefgh"}
    return read_question(json.dumps({**given, **body}).encode(), MODEL, chat=chat)


def test_how_long_an_answer_is() -> None:
    """100 tokens of context; the prompt has 2, as a chat 2 + 5 + 3."""
    assert (asking().tokens, asking().finish_reason) == (COMPLETION_TOKENS, "length")
    assert (asking(max_tokens=5, ignore_eos=True).tokens, asking(max_tokens=5).tokens) == (5, 5)
    assert (asking(max_tokens=99).tokens, asking(max_tokens=99).finish_reason) == (98, "length")
    assert asking(chat=True, max_tokens=5, max_completion_tokens=6).tokens == 6
    assert CHAT_ANSWER_TOKENS > 90
    cut = asking(chat=True)
    assert (cut.prompt_tokens, cut.tokens, cut.finish_reason) == (10, 90, "length")
    free = read_question(b'{"messages": [{"content": "a"}]}', Model("m", 4096, 9), chat=True)
    assert (free.tokens, free.finish_reason) == (CHAT_ANSWER_TOKENS, "stop")
    assert asking(prompt=[[1, 2, 3]]).prompt_tokens == asking(prompt=[1, 2, 3]).prompt_tokens == 3
    assert asking(prompt=["abcde"]).prompt_tokens == 2
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert asking(chat=True, messages=[{"role": "user", "content": parts}]).prompt_tokens == 9


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 101}, "max_tokens=101 cannot be greater than max_model_len=100"),
        ({"max_tokens": 0}, "at least 1, got 0"),
        ({"max_tokens": "5"}, "cannot be read"),
        ({"min_tokens": 6, "max_tokens": 5}, "less than or equal to max_tokens=5, got 6"),
        ({"min_tokens": -1}, "greater than or equal to 0"),
        ({"prompt": [1] * 100}, "your prompt contains 100 input tokens"),
        ({"prompt": ""}, "cannot be empty"),
        ({"prompt": [[]]}, "cannot be empty"),
        ({"prompt": ["a", "b"]}, "one prompt"),
        ({"prompt": 5}, "cannot be read"),
        ({"n": 2}, "one answer"),
        ({"stream_options": {"include_usage": True}}, "only be defined when"),
    ],
)
def test_what_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=re.escape(words)) as caught:
        asking(**body)
    assert caught.value.status == caught.value.body["error"]["code"] == 400
    with pytest.raises(Refusal):
        read_question(b"[" * 100_000, MODEL, chat=False)
    assert asking(prompt=[1] * 99).tokens == 1


def test_a_text_has_the_tokens_that_it_is_counted_for() -> None:
    for text in ("a", "abcd", "abcde", "größer", "𝄞"):
        body = json.dumps({"prompt": text}).encode()
        told = tokenized(body, MODEL)
        assert told["count"] == len(told["tokens"]) == read_question(body, MODEL, chat=False).prompt_tokens
        assert all(0 <= number < MODEL.vocabulary for number in told["tokens"])
    assert tokenized(b'{"messages": [{"content": "abcdef"}]}', MODEL)["count"] == 2
    for body in (b"{}", b'{"prompt": "\\ud800"}'):  # half a character, which JSON can write
        with pytest.raises(Refusal):
            tokenized(body, MODEL)


def test_metrics_have_the_names_and_kinds_of_vllm() -> None:
    """Against the page of a real vLLM 0.32, and a name that would break a page that does not escape it."""
    theirs = dict(re.findall(r"^# TYPE (vllm:\S+) (\S+)$", (DATA / "vllm_metrics.txt").read_text(), re.MULTILINE))
    exporter = Exporter('bad"\n}name\\', "card", "awq", 4096)
    exporter.first_token(10, 0.5, 0.1)
    exporter.ended("length", 10, 1, 0.5)
    page = exporter.page(State(3, 2, 0.25, 7)).decode()
    ours = dict(re.findall(r"^# TYPE (vllm:\S+) (\S+)$", page, re.MULTILINE))
    assert len(ours) > 12
    assert ours.items() <= theirs.items()
    told = read_counters(page)
    assert (told.running, told.waiting, told.kv_usage, told.preemptions_total) == (3, 2, 0.25, 7)
    assert read_counters(exporter.page(State(0, 0, 0.0, 9)).decode()).preemptions_total == 9
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    assert {sample.labels["model_name"] for sample in samples if "model_name" in sample.labels} == {'bad"\n}name\\'}


def test_a_hostile_card_cannot_write_headers() -> None:
    from harness.predict.server import _header_text

    assert _header_text("Käfer\r\nX: y, awq") == "K?fer??X: y, awq"
