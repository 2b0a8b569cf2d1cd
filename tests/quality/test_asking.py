"""Asking: what is read from an answer, what is said of a bad one, and how many are asked at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from harness.engines import Target
from harness.errors import EngineError, RunError
from harness.quality.asking import Manner, ask, ask_all, connected, manner_of
from harness.quality.prompts import Prompt
from harness.quality.sandbox import Outcome
from harness.records import Answer
from tests.quality.answering import serving

PROMPT = Prompt("p", "factual", "What is 2 + 2?", "exact", ("4",), max_tokens=9)


def completion(text: str = "4", ids: tuple[int, ...] = (17, 2), **choice: Any) -> dict[str, Any]:
    """As vLLM says it: ids of the answer, and at each position the likeliest by id."""
    content = [
        {
            "token": f"token_id:{token}",
            "logprob": -0.125 * (index + 1),
            "top_logprobs": [
                {"token": "token_id:5", "logprob": -3.0},
                {"token": f"token_id:{token}", "logprob": -0.125 * (index + 1)},
            ],
        }
        for index, token in enumerate(ids)
    ]
    whole = {
        "message": {"content": text}, "finish_reason": "stop", "token_ids": list(ids), "logprobs": {"content": content},
    }  # fmt: skip
    return {"choices": [whole | choice], "usage": {"prompt_tokens": 12}}


def client_of(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> httpx.Client:
    def handle(request: httpx.Request) -> httpx.Response:
        status, content = reply(json.loads(request.content))
        return httpx.Response(status, content=content if isinstance(content, bytes) else json.dumps(content).encode())

    return httpx.Client(transport=httpx.MockTransport(handle), base_url="http://server")


def test_what_an_answer_holds() -> None:
    asked: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(body)
        return 200, completion()

    with client_of(reply) as client:
        answer = ask(client, "m", PROMPT)
    assert answer == Answer(
        "p", "", text="4", tokens=(17, 2), logprobs=(-0.125, -0.25),
        alternatives=(((17, -0.125), (5, -3.0)), ((2, -0.25), (5, -3.0))), finish_reason="stop", prompt_tokens=12,
    )  # fmt: skip
    (body,) = asked
    assert (body["temperature"], body["max_tokens"], body["messages"]) == (0.0, 9, PROMPT.messages)
    assert "ignore_eos" not in body  # it is to stop by itself


def test_a_server_that_is_no_vllm_gives_text_alone() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if "return_token_ids" in body or body.get("top_logprobs", 0) > 5:
            return 400, {"error": "unknown field"}
        return 200, {"choices": [{"message": {"content": "four"}, "finish_reason": "stop", "logprobs": None}]}

    with client_of(reply) as client:
        manner = manner_of(client, "m")
        assert manner == Manner(token_ids=False, alternatives=5)
        answer = ask(client, "m", PROMPT, manner)
    assert (answer.text, answer.tokens, answer.alternatives, answer.error) == ("four", (), (), None)


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (500, {"error": "boom"}, "HTTP 500"),
        (429, b"slow down", "HTTP 429: slow down"),
        (200, b"<html>", "no chat completion"),
        (200, {"choices": []}, "no chat completion"),
        (200, {"choices": [{"message": None}]}, "no chat completion"),
        (200, [1], "no chat completion"),
    ],
)
def test_an_answer_that_is_none_is_said_and_kept(status: int, content: Any, said: str) -> None:
    with client_of(lambda body: (status, content)) as client:
        answer = ask(client, "m", PROMPT)
    assert answer.text == "" and answer.ok is None and said in str(answer.error)


def test_a_key_in_an_error_is_not_kept() -> None:
    with client_of(lambda body: (401, b"wrong key sk-abc123def456ghi789jkl0")) as client:
        assert "sk-abc" not in str(ask(client, "m", PROMPT).error)
        with pytest.raises(EngineError) as caught:
            manner_of(client, "m")
    assert "sk-abc" not in str(caught.value)


def test_a_server_that_refuses_everything_says_why() -> None:
    with client_of(lambda body: (404, {"error": "model m does not exist"})) as client:
        with pytest.raises(EngineError, match="model m does not exist"):
            manner_of(client, "m")


# --- many at once, against a server on a socket -----------------------------------------------------------------------


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", "factual", f"{n}", "exact", ("4",)) for n in range(count)]


def test_as_many_at_once_as_were_asked_for_and_each_once() -> None:
    together, most, lock, gate = 0, 0, threading.Lock(), threading.Barrier(4)
    order: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal together, most
        asked = body["messages"][0]["content"]
        if asked == "Say yes.":
            return 200, completion()
        with lock:
            together += 1
            most = max(most, together)
            order.append(asked)
        gate.wait(10)  # nobody is answered before four have asked
        with lock:
            together -= 1
        return 200, completion("4" if asked != "3" else "5")

    answers: list[Answer] = []
    with serving(reply) as url:
        ask_all(Target(url, "m"), prompts(8), "awq", 2, None, 4, answers.append)
    assert most == 4
    assert set(order[:4]) == {"7", "6", "5", "4"}  # the second round goes backwards
    assert sorted(answer.prompt_id for answer in answers) == [f"p{n}" for n in range(8)]
    assert {(answer.precision, answer.round) for answer in answers} == {("awq", 2)}
    assert {answer.prompt_id: answer.ok for answer in answers if not answer.ok} == {"p3": False}


def test_what_was_answered_before_the_server_died_was_handed_over() -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][0]["content"]
        return (0, None) if asked == "3" else (200, completion())

    answers: list[Answer] = []
    with serving(reply) as url:
        with pytest.raises(EngineError, match="stopped answering"):
            ask_all(Target(url, "m"), prompts(6), "awq", 1, None, 1, answers.append)
    assert [answer.prompt_id for answer in answers] == ["p0", "p1", "p2"]


def test_a_sandbox_that_does_not_start_judges_nobody() -> None:
    def no_room(code: str) -> Outcome:
        raise RunError("the sandbox did not start:\nno space")

    asked = [Prompt("c", "code", "Complete", "python", tests="assert f()"), *prompts(1)]
    answers: list[Answer] = []
    with serving(lambda path, body: (200, completion())) as url:
        ask_all(Target(url, "m"), asked, "awq", 1, no_room, 1, answers.append)
    assert {answer.prompt_id: (answer.ok, answer.note) for answer in answers} == {
        "c": (None, "not executed: the sandbox did not start:"), "p0": (True, ""),
    }  # fmt: skip


def test_the_key_goes_in_a_header_and_no_proxy_stands_before_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    seen: list[dict[str, Any]] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body)
        return 200, completion()

    with serving(reply) as url, connected(Target(url, "m", "secret-key")) as client:
        assert client.headers["Authorization"] == "Bearer secret-key"
        assert ask(client, "m", PROMPT).text == "4"
    assert "secret-key" not in json.dumps(seen)
