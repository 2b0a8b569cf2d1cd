"""The truth server from outside: what it sends, when (lower bounds and its own log only), and each way to misbehave."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.telemetry.prometheus import read_counters

DATA = Path(__file__).parent.parent / "data"
Truth = Callable[..., str]
FAST = ("--ttft-ms", "1", "--gap-ms", "1")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MS = 1_000_000


def body(tokens: int = 5, **more: Any) -> dict[str, Any]:
    return {
        "model": "m", "prompt": [1, 2, 3], "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, **more,
    }  # fmt: skip


def chat_body(tokens: int = 5, **more: Any) -> dict[str, Any]:
    return body(tokens, **more) | {"messages": [{"role": "user", "content": "a b c"}]}


def ask(url: str, asked: dict[str, Any], path: str = COMPLETIONS, **headers: str) -> httpx.Response:
    return httpx.post(url + path, json=asked, headers=headers, timeout=20)


def events(text: str) -> list[dict[str, Any]]:
    """The stream's JSON events; it must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def choices(text: str) -> list[dict[str, Any]]:
    return [choice for event in events(text) for choice in event.get("choices", [])]


def token_ids(text: str) -> list[int]:
    return [number for choice in choices(text) for number in choice.get("token_ids") or ()]


def usage(text: str) -> dict[str, int] | None:
    found: dict[str, int] | None = events(text)[-1].get("usage")
    return found


def counters(url: str) -> Any:
    return read_counters(httpx.get(url + "/metrics").text)


def raw(path: str, asked: dict[str, Any], *headers: str) -> bytes:
    """A request's bytes."""
    data = json.dumps(asked).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_until(sock: socket.socket, ends: bytes, times: int = 1) -> bytes:
    data = bytearray()
    while data.count(ends) < times:
        piece = sock.recv(1 << 20)
        assert piece, "the server closed"
        data += piece
    return bytes(data)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class Run:
    """A server of one test: its URL while it runs; what it printed and logged once it was stopped."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.load.truth", "--log", str(log), *arguments],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = "http://127.0.0.1:" + self._process.stdout.readline().removeprefix("listening ").strip()
        self.figures: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self._process.send_signal(how)
        said, _ = self._process.communicate(timeout=20)
        self.figures = json.loads(said.removeprefix("lateness "))
        self.rows = [json.loads(line) for line in self._log.read_text().splitlines()]
        return self._process.returncode


@contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator[Run]:
    run = Run(tmp_path / "truth.log", *arguments)
    try:
        yield run
    finally:
        if run._process.returncode is None:
            run.stop()


# -- what an answer looks like ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "recorded"), [(COMPLETIONS, "vllm_completions"), (CHAT, "vllm_chat")])
def test_chunks_are_those_of_vllm(truth: Truth, path: str, recorded: str) -> None:
    """Key for key those recorded from vLLM 0.32, but for two optional ones: usage null, and no prompt ids."""
    theirs = events((DATA / f"{recorded}_stream.txt").read_text())
    ours = events(ask(truth(*FAST), chat_body() if path == CHAT else body(), path).text)

    def keys(chunks: list[dict[str, Any]]) -> tuple[set[str], set[str], set[str]]:
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        return {key for chunk in chunks for key in chunk}, {key for part in parts for key in part}, set(chunks[-1])

    for their_keys, our_keys in zip(keys(theirs), keys(ours), strict=True):
        assert their_keys - {"prompt_token_ids", "prompt_text", "system_fingerprint"} == our_keys
    assert {chunk["object"] for chunk in ours} == {chunk["object"] for chunk in theirs}
    assert [chunk["choices"] for chunk in (ours[-1], theirs[-1])] == [[], []]
    assert set(ours[-1]["usage"]) == set(theirs[-1]["usage"])


def test_a_completion(truth: Truth) -> None:
    answer = ask(truth(*FAST), body(5))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert token_ids(answer.text) == [100, 101, 102, 103, 104]
    assert "".join(choice["text"] for choice in choices(answer.text)).split() == ["t0", "t1", "t2", "t3", "t4"]
    assert [choice["finish_reason"] for choice in choices(answer.text)] == [None] * 4 + ["length"]
    assert usage(answer.text) == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_a_chat_begins_with_a_role_that_is_no_token(truth: Truth) -> None:
    said = choices(ask(truth(*FAST), chat_body(2), CHAT).text)
    assert said[0]["delta"] == {"role": "assistant", "content": ""} and "token_ids" not in said[0]
    assert [choice["delta"]["content"] for choice in said[1:]] == [" t0", " t1"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]}]
    answers = [ask(truth(*FAST), chat_body(2, **more), CHAT) for more in ({}, {"messages": parts})]
    assert [(usage(answer.text) or {})["prompt_tokens"] for answer in answers] == [8, 8]


def test_nothing_that_was_not_asked_for(truth: Truth) -> None:
    url = truth(*FAST)
    plain = body(3, prompt="four words are here", stream_options={}, return_token_ids=False)
    text = ask(url, plain).text
    assert usage(text) is None and token_ids(text) == [] and len(choices(text)) == 3
    whole = ask(url, {**plain, "stream": False}).json()
    assert whole["choices"][0]["text"].split() == ["t0", "t1", "t2"]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    message = ask(url, {**chat_body(2), "stream": False}, CHAT).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": " t0 t1"}


def test_other_pages(truth: Truth) -> None:
    url = truth("--tokenize")
    assert [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]] == ["truth"]
    assert httpx.get(url + "/version").json()["version"].startswith("truth-")
    assert httpx.get(url + "/health").status_code == 200
    assert httpx.get(url + "/v2/none").status_code == 404
    first, again = (
        httpx.post(url + "/tokenize", json={"prompt": text}).json() for text in ("river stone river", "stone river")
    )
    assert first["count"] == 3 and first["tokens"][0] == first["tokens"][2] != first["tokens"][1]
    assert again["tokens"] == first["tokens"][1:], "a word's id hangs on the word alone"
    assert all(100 <= number <= 29_999 for number in first["tokens"])
    assert httpx.post(truth("--no-tokenize") + "/tokenize", json={"prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    "data", [b"{half", b"[1]", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": [1, "a"]}']
)
def test_bodies_that_are_no_request(truth: Truth, data: bytes) -> None:
    answer = httpx.post(truth() + COMPLETIONS, content=data)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_what_is_not_http_is_hung_up_on(truth: Truth) -> None:
    with closing(connect(truth())) as sock:
        sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        assert sock.recv(100) == b""


# -- connections --------------------------------------------------------------------------------------------------


def test_requests_in_one_write_are_answered_in_turn(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "5", "--gap-ms", "2") as run, closing(connect(run.url)) as sock:
        sock.sendall(raw(COMPLETIONS, body(3), "X-Request-Id: one") + raw(COMPLETIONS, body(4), "X-Request-Id: two"))
        text = read_until(sock, b"0\r\n\r\n", 2).decode()
        run.stop()
    assert re.findall(r'"id":"cmpl-(\w+)"', text) == ["one"] * 4 + ["two"] * 5
    assert [(row["id"], row["tokens"]) for row in run.rows] == [("one", 3), ("two", 4)]
    assert run.rows[1]["due_ns"][0] >= run.rows[0]["sent_ns"][-1] + 5 * MS, "the second begins when the first is over"


def test_a_request_may_come_in_pieces(truth: Truth) -> None:
    with closing(connect(truth(*FAST))) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = raw(COMPLETIONS, body(2))
        for start in range(0, len(data), 40):
            sock.sendall(data[start : start + 40])
            time.sleep(0.001)
        assert b'"completion_tokens":2' in read_until(sock, b"0\r\n\r\n")


def test_connection_close_is_obeyed(truth: Truth) -> None:
    with closing(connect(truth(*FAST))) as sock:
        sock.sendall(raw(COMPLETIONS, body(2), "Connection: close"))
        read_until(sock, b"0\r\n\r\n")
        assert sock.recv(10) == b""


@pytest.mark.parametrize(("tokens", "per_chunk"), [(40_000, 1), (800_000, 5000)])
def test_who_does_not_read_delays_nobody_and_loses_nothing(truth: Truth, tokens: int, per_chunk: int) -> None:
    """Some ten MB, more than socket buffers hold; of large chunks the kernel takes a part."""
    url = truth("--ttft-ms", "0", "--gap-ms", "0", "--tokens-per-chunk", str(per_chunk))
    with closing(connect(url)) as lazy:
        lazy.sendall(raw(COMPLETIONS, body(tokens)))
        until(lambda: counters(url).generation_tokens_total == tokens)
        assert len(token_ids(ask(url, body(5)).text)) == 5
        assert counters(url).running == 1, "its answer is not over before it was taken"
        data = read_until(lazy, b"0\r\n\r\n")
    ids = b",".join(re.findall(rb'"token_ids":\[([\d,]+)\]', data))
    assert [int(number) for number in ids.split(b",")] == [100 + number % 29_900 for number in range(tokens)]


def test_who_leaves_is_dropped(truth: Truth) -> None:
    url = truth("--ttft-ms", "60000", "--max-running", "1")
    with closing(connect(url)) as first, closing(connect(url)) as second:
        for sock in (first, second):
            sock.sendall(raw(COMPLETIONS, body()))
        until(lambda: (counters(url).running, counters(url).waiting) == (1, 1))
        second.close()
        until(lambda: (counters(url).running, counters(url).waiting) == (1, 0))
    until(lambda: counters(url).running == 0)


# -- when ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_absolute_and_nothing_goes_early(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "12.5", "--gap-ms", "3") as run:
        before = time.time_ns()
        ask(run.url, body(20), **{"X-Request-Id": "a"})
        after = time.time_ns()
        assert run.stop() == 0
    (row,) = run.rows
    assert row["id"] == "a" and (row["tokens"], row["prompt_tokens"]) == (20, 3)
    assert before <= row["received_ns"] <= row["sent_ns"][0] and row["sent_ns"][-1] <= after
    assert [due - row["received_ns"] for due in row["due_ns"]] == [12.5 * MS + 3 * MS * number for number in range(20)]
    assert all(sent >= due for sent, due in zip(row["sent_ns"], row["due_ns"], strict=True))


def test_the_whole_answer_waits_for_its_last_token(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "10", "--gap-ms", "5") as run:
        ask(run.url, body(7, stream=False))
        run.stop()
    assert run.rows[0]["sent_ns"][0] - run.rows[0]["received_ns"] >= 40 * MS


def test_arrival_is_when_the_kernel_received(tmp_path: Path) -> None:
    """The server is stopped while the request comes: a stamp of its own would be late by all that time."""
    with running(tmp_path, *FAST) as run, closing(connect(run.url)) as sock:
        read = httpx.get(run.url + "/health")  # it has certainly accepted the connection before this one
        assert read.status_code == 200
        run._process.send_signal(signal.SIGSTOP)
        sock.sendall(raw(COMPLETIONS, body(2)))
        time.sleep(0.3)
        woken = time.time_ns()
        run._process.send_signal(signal.SIGCONT)
        read_until(sock, b"0\r\n\r\n")
        run.stop()
    assert run.rows[0]["received_ns"] < woken
    assert run.rows[0]["sent_ns"][0] - run.rows[0]["due_ns"][0] > 200 * MS, "and it owns to its lateness"
    assert run.figures["max_ms"] > 200


def test_only_so_many_run_and_the_others_wait_in_turn(truth: Truth) -> None:
    """Prompts of 1,000, 2,000 and 3,000 tokens: the KV cache tells who runs."""
    url = truth("--ttft-ms", "60000", "--max-running", "1")
    socks = [connect(url) for _ in range(3)]
    for number, sock in enumerate(socks):
        sock.sendall(raw(COMPLETIONS, body(prompt=[0] * 1000 * (number + 1))))
        until(lambda number=number: (counters(url).running, counters(url).waiting) == (1, number))
    for number, sock in enumerate(socks):
        assert counters(url).kv_usage == 1000 * (number + 1) / 65_536
        sock.close()
        until(
            lambda number=number: counters(url).waiting == max(0, 1 - number) and counters(url).running == (number < 2)
        )


def test_who_waited_has_its_whole_ttft_to_go(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "20", "--gap-ms", "10", "--max-running", "1") as run:
        socks = [connect(run.url) for _ in range(3)]
        for sock in socks:
            sock.sendall(raw(COMPLETIONS, body(10)))
        for sock in socks:
            read_until(sock, b"0\r\n\r\n")
            sock.close()
        run.stop()
    assert len(run.rows) == 3
    for first, then in zip(run.rows, run.rows[1:], strict=False):
        assert first["received_ns"] <= then["received_ns"] and then["due_ns"][0] >= first["sent_ns"][-1] + 20 * MS


def test_a_server_that_saturates_and_one_that_drifts(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "1", "--gap-ms", "2", "--gap-per-running-ms", "1.5") as run:
        ask(run.url, body(5))
        run.stop()
    due = run.rows[0]["due_ns"]
    assert {then - first for first, then in zip(due, due[1:], strict=False)} == {3.5 * MS}
    (tmp_path / "truth.log").unlink()
    with running(tmp_path, "--ttft-ms", "0", "--gap-ms", "5", "--gap-growth", "10") as run:
        ask(run.url, body(21))
        run.stop()
    row = run.rows[0]
    for due_ns, then in zip(row["due_ns"], row["due_ns"][1:], strict=False):
        grown = 5 * (1 + 10 * (due_ns - row["received_ns"]) / 1e9)
        assert then - due_ns >= grown * MS * 0.999
    assert row["due_ns"][-1] - row["due_ns"][-2] >= 10 * MS, "after 100 ms at 1000 % a second it has doubled"


# -- manners ------------------------------------------------------------------------------------------------------


def test_chunks_of_several_tokens(truth: Truth) -> None:
    said = choices(ask(truth(*FAST, "--tokens-per-chunk", "3"), body(8)).text)
    assert [choice["token_ids"] for choice in said] == [[100, 101, 102], [103, 104, 105], [106, 107]]
    assert [choice["text"] for choice in said] == [" t0 t1 t2", " t3 t4 t5", " t6 t7"]
    assert [choice["finish_reason"] for choice in said] == [None, None, "length"]


@pytest.mark.parametrize(("ids", "logged"), [(True, 6), (False, 4)])
def test_chunks_without_text(tmp_path: Path, ids: bool, logged: int) -> None:
    with running(tmp_path, *FAST, "--empty-text-every", "3") as run:
        said = choices(ask(run.url, body(6, return_token_ids=ids)).text)
        run.stop()
    assert [bool(choice["text"]) for choice in said] == [True, True, False] * 2
    assert len(run.rows[0]["sent_ns"]) == logged, "without ids a chunk without text bears nothing"


def test_comments_of_a_proxy(truth: Truth) -> None:
    text = ask(truth(*FAST, "--comment-every", "2"), body(6)).text
    assert text.count(": keep-alive\n\n") == 3 and len(token_ids(text)) == 6


def test_dripping(tmp_path: Path) -> None:
    with running(tmp_path, "--ttft-ms", "1", "--gap-ms", "50", "--drip", "60") as run, closing(connect(run.url)) as s:
        s.sendall(raw(COMPLETIONS, body(2, stream_options={})))
        data = read_until(s, b"0\r\n\r\n")
        run.stop()
    chunk = re.findall(rb"[0-9a-f]+\r\ndata: \{.*?\}\n\n\r\n", data)[0]
    pieces = -(-len(chunk) // 60)
    assert pieces > 2 and run.rows[0]["due_ns"][0] - run.rows[0]["received_ns"] == (1 + pieces - 1) * MS
    assert run.rows[0]["sent_ns"][0] >= run.rows[0]["due_ns"][0], "a token is sent when its last byte is"


def test_characters_cut_between_writes(truth: Truth) -> None:
    cut, data = 0, b""
    with closing(connect(truth("--ttft-ms", "1", "--gap-ms", "5", "--multibyte"))) as sock:
        sock.sendall(raw(COMPLETIONS, body(40)))
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(1 << 16)
            try:
                data.decode()
            except UnicodeDecodeError:
                cut += 1
    assert re.findall(r"世(\d+)", data.decode()) == [str(number) for number in range(40)]
    assert cut > 0


def test_servers_that_know_less(truth: Truth) -> None:
    assert token_ids(ask(truth(*FAST, "--no-token-ids"), body()).text) == []
    chat_only = truth(*FAST, "--chat-only")
    assert ask(chat_only, body()).status_code == 404 and ask(chat_only, chat_body(), CHAT).status_code == 200
    strict = truth(*FAST, "--strict")
    assert "return_token_ids" in ask(strict, body()).json()["error"]["message"]
    asked = {key: value for key, value in body().items() if key != "return_token_ids"}
    assert ask(strict, asked).status_code == 200


def test_counters(truth: Truth) -> None:
    url = truth(*FAST, "--cache-hits", "0.25", "--preempt-every", "2", "--counter-factor", "1.5")
    for _ in range(4):
        ask(url, body(10, prompt=list(range(20))))
    found = counters(url)
    assert (found.running, found.waiting, found.kv_usage) == (0, 0, 0)
    assert (found.prompt_tokens_total, found.generation_tokens_total) == (80, 60)
    assert (found.prefix_queries_total, found.prefix_hits_total) == (80, 20)
    assert found.preemptions_total == 2


def test_the_cache_fills(truth: Truth) -> None:
    url = truth("--ttft-ms", "60000")
    with closing(connect(url)) as sock:
        sock.sendall(raw(COMPLETIONS, body(prompt=list(range(32_768)))))
        until(lambda: counters(url).running == 1)
        assert counters(url).kv_usage == 0.5


# -- faults -------------------------------------------------------------------------------------------------------


def outcome(url: str, **more: Any) -> tuple[object, ...]:
    """(status, tokens, end): how the stream of a request for five tokens ended."""
    text, status = "", 0
    try:
        with httpx.stream("POST", url + COMPLETIONS, json=body(**more), timeout=0.5) as answer:
            status = answer.status_code
            for piece in answer.iter_text():
                text += piece
    except httpx.TransportError as error:
        return status, text.count("token_ids"), type(error).__name__
    return status, text.count("token_ids"), "error" if '"error"' in text else "done"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (("--status", "503"), (503, 0, "error")),
        (("--close-after", "2"), (200, 2, "RemoteProtocolError")),
        (("--error-after", "2"), (200, 2, "error")),
        (("--stall-after", "2"), (200, 2, "ReadTimeout")),
        (("--close-after", "5"), (200, 5, "done")),
        (("--short", "2"), (200, 3, "done")),
        (("--echo-auth",), (401, 0, "error")),
    ],
)
def test_faults_befall_all_or_each_so_many_th(
    truth: Truth, fault: tuple[str, ...], expected: tuple[object, ...]
) -> None:
    assert outcome(truth(*FAST, *fault)) == expected
    some = truth(*FAST, *fault, "--every", "2")
    assert [outcome(some) for _ in range(4)] == [(200, 5, "done"), expected] * 2


def test_faults_in_the_count(truth: Truth) -> None:
    assert usage(ask(truth(*FAST, "--no-usage"), body()).text) is None
    assert (usage(ask(truth(*FAST, "--prompt-tokens-off", "7"), body()).text) or {})["prompt_tokens"] == 10
    assert (usage(ask(truth(*FAST, "--prompt-tokens-off", "-1"), body()).text) or {})["prompt_tokens"] == 2
    text = ask(truth(*FAST, "--short", "2"), body()).text
    assert (usage(text) or {})["completion_tokens"] == 3 and choices(text)[-1]["finish_reason"] == "stop"
    nothing = choices(ask(truth(*FAST, "--short", "9"), body()).text)
    assert [(choice["text"], choice["finish_reason"]) for choice in nothing] == [("", "stop")]


def test_errors_that_quote_the_key(truth: Truth) -> None:
    key = {"Authorization": "Bearer kb-secret"}
    assert "Bearer kb-secret" in ask(truth(*FAST, "--echo-auth"), body(), **key).text
    stream = truth(*FAST, "--echo-auth", "--error-after", "1")
    assert ask(stream, body(stream=False), **key).status_code == 200
    assert "Bearer kb-secret" in ask(stream, body(), **key).text


# -- the program --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_lateness_and_a_whole_log(tmp_path: Path, how: signal.Signals) -> None:
    with running(tmp_path, *FAST) as run, closing(connect(run.url)) as sock:
        ask(run.url, body(4))
        until(lambda: (tmp_path / "truth.log").read_text().count("\n") == 1)  # written while it serves
        sock.sendall(raw(COMPLETIONS, body(100_000), "X-Request-Id: unfinished"))
        read_until(sock, b"token_ids", 3)
        assert run.stop(how) == 0
    assert [row["id"] for row in run.rows] == [None, "unfinished"]
    assert run.rows[1]["tokens"] == len(run.rows[1]["sent_ns"]) >= 3
    assert set(run.figures) == {"tokens", "requests", "p50_ms", "p99_ms", "max_ms", "cpu_us_per_token"}
    assert (run.figures["tokens"], run.figures["requests"]) == (sum(row["tokens"] for row in run.rows), 2)
    late = [sent - due for row in run.rows for sent, due in zip(row["sent_ns"], row["due_ns"], strict=True)]
    assert run.figures["max_ms"] == max(late) // 10_000 / 100 and run.figures["cpu_us_per_token"] > 0


def test_the_log_is_written_although_there_is_no_quiet_moment(tmp_path: Path) -> None:
    """With a token due each 0.2 ms the log once waited, in memory, for the end of the load: hours of a soak."""
    with running(tmp_path, "--ttft-ms", "0", "--gap-ms", "0.2") as run, closing(connect(run.url)) as sock:
        sock.sendall(raw(COMPLETIONS, body(100_000), "X-Request-Id: never quiet"))
        read_until(sock, b"token_ids", 3)
        with closing(connect(run.url)) as other:
            other.sendall(b"".join(raw(COMPLETIONS, body(1), f"X-Request-Id: {n}") for n in range(600)))
            until(lambda: (tmp_path / "truth.log").read_text().count("\n") >= 200)
        run.stop(signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gap-ms", "-1"), "--gap-ms -1: out of range"),
        (("--every", "0"), "Allowed: 1 or more"),
        (("--status", "99"), "Allowed: 200 to 599"),
        (("--cache-hits", "1.5"), "Allowed: 0 to 1"),
        (("--ttft-ms", "nan"), "--ttft-ms nan: out of range"),
        (("--log", "/no/such/directory/log"), "--log /no/such/directory/log: cannot be written"),
        (("--port", "70000"), "--port 70000: cannot be listened on"),
        (("--colour",), "--colour"),
    ],
)
def test_options_that_cannot_be(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.load.truth", *arguments], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "harness.load.truth", "--port", port], capture_output=True, text=True, timeout=20
        )
    assert done.returncode == 2 and f"--port {port}: cannot be listened on" in done.stderr
