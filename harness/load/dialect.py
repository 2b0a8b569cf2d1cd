"""Find out what an endpoint understands by asking it, once, before anything is measured.

From best to worst: prompts as token ids (exact lengths) on /v1/completions, text on /v1/completions, chat messages.
For text the number of words a token is calibrated with the server's own prompt count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx

from harness.engines import Target
from harness.errors import EngineError
from harness.load.workload import WORDS, Dialect

_PROBE_TIMEOUT_S = 120.0


def probe(target: Target, *, chat: bool = False) -> Dialect:
    """The best dialect that the server speaks; `chat` leaves out the completions API.

    Raises EngineError, with the server's own words, when it answers none of them.
    """
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    answers: list[str] = []
    with httpx.Client(base_url=target.base_url, headers=headers, timeout=_PROBE_TIMEOUT_S) as client:
        ids = () if chat else _vocabulary(client, target.model)
        candidates = [] if chat else [Dialect(vocabulary=ids, vllm_extras=True)] if ids else []
        for path, is_chat in [("/v1/completions", False), ("/v1/chat/completions", True)]:
            if chat <= is_chat:
                candidates += [Dialect(path, is_chat, vllm_extras=extras) for extras in (True, False)]
        for dialect in candidates:
            try:
                response = client.post(dialect.path, json=_body(target.model, dialect, 16))
            except httpx.HTTPError as error:
                raise EngineError(f"{target.base_url} does not answer: {error}", remedy="check the URL") from error
            if response.status_code == 200:
                return dialect if dialect.vocabulary else _calibrated(client, target.model, dialect)
            answers.append(f"{dialect.path}: {response.status_code} {' '.join(response.text.split())[:200]}")
    raise EngineError(
        f"{target.base_url} answers neither completions nor chat:\n  " + "\n  ".join(answers),
        remedy="check the model's name and KNEEBENCH_API_KEY",
    )


def _body(model: str, dialect: Dialect, words: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "max_tokens": 2, "temperature": 0.0}
    text = " ".join(WORDS[index % len(WORDS)] for index in range(words))
    if dialect.vocabulary:
        body["prompt"] = list(dialect.vocabulary[:8])
    elif dialect.chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if dialect.vllm_extras:
        body |= {"ignore_eos": True, "min_tokens": 2, "return_token_ids": True, "cache_salt": "probe"}
    return body


def _vocabulary(client: httpx.Client, model: str) -> tuple[int, ...]:
    """Ids of plain words, by the server's own tokenizer (vLLM and its kin have /tokenize); empty without one."""
    try:
        response = client.post(
            "/tokenize", json={"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        )
        ids = response.json().get("tokens") if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, AttributeError):
        return ()
    return tuple(sorted(set(ids))) if isinstance(ids, list) and all(isinstance(item, int) for item in ids) else ()


def _calibrated(client: httpx.Client, model: str, dialect: Dialect) -> Dialect:
    """Two prompts of known word counts give tokens = overhead + words / words_per_token."""
    counts: list[int] = []
    for words in (40, 240):
        response = client.post(dialect.path, json=_body(model, dialect, words))
        usage = response.json().get("usage") or {} if response.status_code == 200 else {}
        if isinstance(usage.get("prompt_tokens"), int):
            counts.append(usage["prompt_tokens"])
    if len(counts) < 2 or counts[1] <= counts[0]:
        return dialect  # the server does not count; the verdict will say length_mismatch if it matters
    tokens_per_word = (counts[1] - counts[0]) / 200
    return replace(
        dialect,
        words_per_token=1 / tokens_per_word,
        overhead_tokens=max(0.0, counts[0] - 40 * tokens_per_word),
    )
