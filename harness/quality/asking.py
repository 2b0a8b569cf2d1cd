"""Puts prompts to a server, greedily, and takes down what it answers: tokens, logprobs, and what else was likely.

Several at once, as the server will be used; what order and batch do to the answers shows when the baseline is asked
twice (`round`). A server that is no vLLM gives text alone: then nothing can be said token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import httpx

from harness.engines import Target
from harness.engines.control import connect
from harness.errors import EngineError, RunError
from harness.quality.checks import Execute, judge
from harness.quality.prompts import Prompt
from harness.records import Answer
from harness.redact import without_keys

ALTERNATIVES = 10
"""Likeliest tokens taken down at each position. OpenAI's API and vLLM's default allow 20; they fill the file."""
ANSWER_TIMEOUT_S = 600.0
CHAT = "/v1/chat/completions"
_DIGITS = 4
"""Of logarithms that a server computes from bfloat16 logits, whose own steps are a hundred times as large."""


@dataclass(frozen=True, slots=True)
class Manner:
    """What a server understands beyond the plain chat API."""

    token_ids: bool = True
    """vLLM's return_token_ids and return_tokens_as_token_ids."""
    alternatives: int = ALTERNATIVES
    """top_logprobs; 0: the server gives no logprobs."""


_MANNERS = (Manner(), Manner(alternatives=5), Manner(False), Manner(False, 5), Manner(False, 0))
"""From best to worst."""


def connected(target: Target) -> httpx.Client:
    """A client of this server that several threads may share; to be used as a context manager."""
    # Probabilities over a whole vocabulary are as large as they are.
    return connect(target.base_url, target.api_key, ANSWER_TIMEOUT_S, most_bytes=None)


def manner_of(client: httpx.Client, model: str) -> Manner:
    """The best manner that the server takes. Raises EngineError, with the server's own words, when it takes none."""
    said = ""
    for manner in _MANNERS:
        body = _body(model, [{"role": "user", "content": "Say yes."}], 4, manner)
        reply = post(client, CHAT, body)
        if reply.status_code == 200:
            return manner
        said = f"HTTP {reply.status_code}: {' '.join(reply.text.split())[:300]}"
    raise EngineError(
        f"{client.base_url} takes no chat request ({without_keys(said)})",
        remedy="check the model's name, its chat template, and KNEEBENCH_API_KEY",
    )


def ask(client: httpx.Client, model: str, prompt: Prompt, manner: Manner = _MANNERS[0]) -> Answer:
    """One answer, not judged yet and of no precision yet; `error` says why there is none.

    Raises EngineError when the server cannot be reached: then the others have no answer either.
    """
    reply = post(client, CHAT, _body(model, prompt.messages, prompt.max_tokens, manner))
    if reply.status_code != 200:
        told = without_keys(" ".join(reply.text.split())[:200])
        return Answer(prompt.id, "", error=f"HTTP {reply.status_code}: {told}")
    try:
        return _read(prompt.id, reply.json(), manner)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return Answer(prompt.id, "", error=f"an answer that is no chat completion ({type(error).__name__})")


def ask_all(
    target: Target,
    prompts: Sequence[Prompt],
    precision: str,
    round: int,
    execute: Execute | None,
    concurrency: int,
    on_answer: Callable[[Answer], None],
) -> None:
    """Ask all, `concurrency` at a time, and hand over each answer as it comes, judged.

    The second round goes backwards, so that each prompt meets others in its batch. Raises EngineError when the server
    stops answering; what came before was handed over.
    """
    order = prompts if round == 1 else prompts[::-1]
    with connected(target) as client:
        manner = manner_of(client, target.model)

        def answered(prompt: Prompt) -> Answer:
            answer = replace(ask(client, target.model, prompt, manner), precision=precision, round=round)
            if answer.error is not None:
                return answer
            try:
                judged = judge(prompt, answer.text, execute)
            except RunError as error:  # no room for its code just now says nothing about the answer
                return replace(answer, note=f"not executed: {str(error).splitlines()[0]}")
            return replace(answer, ok=judged.ok, note=judged.note)

        with ThreadPoolExecutor(concurrency) as pool:
            waiting: set[Future[Answer]] = {pool.submit(answered, prompt) for prompt in order}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for answer in done:
                        on_answer(answer.result())
            except BaseException:
                for answer in waiting:
                    answer.cancel()
                raise


def _body(model: str, messages: Sequence[dict[str, str]], max_tokens: int, manner: Manner) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0, "seed": 0,
    }  # fmt: skip
    if manner.alternatives:
        body |= {"logprobs": True, "top_logprobs": manner.alternatives}
    if manner.token_ids:
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    return body


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Raises EngineError when the server cannot be reached."""
    try:
        return client.post(path, json=body)
    except httpx.HTTPError as error:
        raise EngineError(
            f"{client.base_url} stopped answering: {without_keys(str(error)) or type(error).__name__}",
            remedy="look at the server's log; the same command goes on with what is missing",
        ) from error


def _read(prompt_id: str, told: Any, manner: Manner) -> Answer:
    choice = told["choices"][0]
    usage = told.get("usage") or {}
    content = (choice.get("logprobs") or {}).get("content") or []
    ids = tuple(int(token) for token in choice.get("token_ids") or ()) if manner.token_ids else ()
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    if ids and len(content) == len(ids):
        alternatives = tuple(_likeliest(item, token) for item, token in zip(content, ids, strict=True))
    return Answer(
        prompt_id,
        "",
        text=str(choice["message"].get("content") or ""),
        tokens=ids,
        logprobs=tuple(round(float(item["logprob"]), _DIGITS) for item in content),
        alternatives=alternatives,
        finish_reason=choice.get("finish_reason"),
        prompt_tokens=usage.get("prompt_tokens"),
    )


def _likeliest(item: Any, chosen: int) -> tuple[tuple[int, float], ...]:
    """(token id, ln p), most likely first; the ids come as "token_id:17"."""
    found = {chosen: round(float(item["logprob"]), _DIGITS)}
    for other in item.get("top_logprobs") or ():
        found.setdefault(int(other["token"].removeprefix("token_id:")), round(float(other["logprob"]), _DIGITS))
    return tuple(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
