"""Find out what an endpoint understands by asking it, once, before anything is measured.

From best to worst: prompts as token ids (exact lengths) on /v1/completions, text on /v1/completions, chat messages.
For text the number of words a token is calibrated with the server's own prompt count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx

from harness import models
from harness.architecture import read_config
from harness.engines import Target
from harness.engines.control import connect
from harness.errors import EngineError
from harness.load.answer import MOST_TOKENS
from harness.load.workload import WORDS, Dialect, vocabulary

_PROBE_TIMEOUT_S = 120.0


def of_model(model: models.Model, target: Target, *, chat: bool = False) -> Dialect:
    """Token ids of the model's own vocabulary where its files are here; otherwise, and for `chat`, the server is asked.

    Raises EngineError as `probe` does.
    """
    config = model.config_path
    if chat or config is None:
        return probe(target, chat=chat)
    size = int(read_config(config)["vocab_size"])
    return Dialect(vocabulary=vocabulary(size, models.special_ids(config.parent)))


def probe(target: Target, *, chat: bool = False) -> Dialect:
    """The best dialect that the server speaks; `chat` leaves out the completions API.

    Raises EngineError, with the server's own words, when it answers none of them.
    """
    answers: list[str] = []
    with _client(target) as client:
        ids = () if chat else _vocabulary(client, target.model)
        candidates = [] if chat else [Dialect(vocabulary=ids, vllm_extras=True)] if ids else []
        for path, is_chat in [("/v1/completions", False), ("/v1/chat/completions", True)]:
            if chat <= is_chat:
                candidates += [Dialect(path, is_chat, vllm_extras=extras) for extras in (True, False)]
        for dialect in candidates:
            response = _posted(client, target, dialect, _body(target.model, dialect, 16))
            if response.status_code == 200:
                return dialect if dialect.vocabulary else _calibrated(client, target, dialect)
            answers.append(f"{dialect.path}: {response.status_code} {' '.join(response.text.split())[:200]}")
    raise EngineError(
        f"{target.base_url} answers neither completions nor chat:\n  " + "\n  ".join(answers),
        remedy="check the model's name and KNEEBENCH_API_KEY",
    )


def tokenizer(target: Target) -> Callable[[str], list[int]] | None:
    """The server's own tokenizer as a function, without special tokens; None where the server has no /tokenize.

    It raises EngineError when the server stops answering. For text that stands in a file, before anything is measured.
    """
    # No connection is kept between calls, so nothing is left open when the function is dropped.
    client = _client(target, keep_alive=False)
    if _tokens(client, target.model, "a") is None:
        return None

    def tokenize(text: str) -> list[int]:
        ids = _tokens(client, target.model, text)
        if ids is None:
            raise EngineError(f"{target.base_url}/tokenize no longer answers", remedy="look at the server's own log")
        return ids

    return tokenize


def _client(target: Target, *, keep_alive: bool = True) -> httpx.Client:
    return connect(target.base_url, target.api_key, _PROBE_TIMEOUT_S, keep_alive=keep_alive)


def _posted(client: httpx.Client, target: Target, dialect: Dialect, body: dict[str, Any]) -> httpx.Response:
    try:
        return client.post(dialect.path, json=body)
    except httpx.HTTPError as error:
        raise EngineError(
            f"{target.base_url}{dialect.path} does not answer: {str(error) or type(error).__name__}",
            remedy="check the URL, and look at that server's own log",
        ) from error


def _body(model: str, dialect: Dialect, words: int, messages: int = 1) -> dict[str, Any]:
    """A short request; in chat its words are shared out among so many messages of a conversation."""
    body: dict[str, Any] = {"model": model, "max_tokens": 2, "temperature": 0.0}
    text = [WORDS[index % len(WORDS)] for index in range(words)]
    if dialect.vocabulary:
        body["prompt"] = list(dialect.vocabulary[:8])
    elif dialect.chat:
        shares = [text[words * part // messages : words * (part + 1) // messages] for part in range(messages)]
        body["messages"] = [
            {"role": "assistant" if part % 2 else "user", "content": " ".join(share)}
            for part, share in enumerate(shares)
        ]
    else:
        body["prompt"] = " ".join(text)
    if dialect.vllm_extras:
        body |= {"ignore_eos": True, "min_tokens": 2, "return_token_ids": True, "cache_salt": "probe"}
    return body


def _vocabulary(client: httpx.Client, model: str) -> tuple[int, ...]:
    """Ids of plain words, by the server's own tokenizer (vLLM and its kin have /tokenize); empty without one."""
    return tuple(sorted(set(_tokens(client, model, " ".join(WORDS)) or ())))


def _tokens(client: httpx.Client, model: str, text: str) -> list[int] | None:
    try:
        response = client.post("/tokenize", json={"model": model, "prompt": text, "add_special_tokens": False})
        ids = _told(response).get("tokens")
    except httpx.HTTPError:
        return None
    return ids if isinstance(ids, list) and all(isinstance(item, int) for item in ids) else None


def _told(response: httpx.Response) -> dict[str, Any]:
    """The object that it answers; empty for an answer that is none."""
    try:
        told = response.json() if response.status_code == 200 else None
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _calibrated(client: httpx.Client, target: Target, dialect: Dialect) -> Dialect:
    """Two prompts of known word counts give tokens = overhead + words / words_per_token.

    In chat the fewer words, said in two turns, give what the template adds with a turn. All words come equally often
    in each; the longer prompt shrinks until the context holds it.
    """

    def counted(words: int, messages: int = 1) -> int | None:
        usage = _told(_posted(client, target, dialect, _body(target.model, dialect, words, messages))).get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return tokens if isinstance(tokens, int) and 0 < tokens <= MOST_TOKENS else None

    few = len(WORDS)
    short = counted(few)
    many, long = next(((k * few, n) for k in (6, 3, 2) if (n := counted(k * few)) is not None), (0, None))
    if short is None or long is None or long <= short:
        return dialect  # the server does not count; the verdict will say length_mismatch if it matters
    tokens_per_word = (long - short) / (many - few)
    turns = counted(few, messages=3) if dialect.chat else None
    return replace(
        dialect,
        words_per_token=1 / tokens_per_word,
        overhead_tokens=max(0.0, short - few * tokens_per_word),
        turn_overhead_tokens=max(0.0, float(turns - short)) if turns is not None else 0.0,
    )
