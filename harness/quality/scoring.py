"""What a server finds likely at each position of a text that it is given, and how far that is from the baseline's.

vLLM's prompt_logprobs: the whole vocabulary where it is small, the likeliest tokens elsewhere. One text of 256 tokens
and 1,280 words is 23 MB of JSON, so texts go one by one and what is kept of them are two arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.analysis.quality import coarse_kl, exact_kl
from harness.errors import EngineError
from harness.quality.asking import post
from harness.quality.texts import Text
from harness.records import Position
from harness.redact import without_keys

SMALL_VOCABULARY = 4096
"""Up to here the whole distribution is asked for."""
LIKELIEST = 100
"""Tokens asked for of a larger one; an engine that we did not start may allow fewer."""
FEWEST = 5
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Scored:
    """A text as one precision reads it. Position t (from 1) predicts token t after those before; row t - 1 is its own.

    ids, logprobs: [positions, k], most likely first; -1 and -inf where a row has fewer. `ids` None: the whole
    vocabulary, column v of `logprobs` being token v.
    """

    ids: NDArray[np.int32] | None
    logprobs: NDArray[np.float32]
    following: NDArray[np.float32]
    """ln p of the token that follows in the text, [positions]."""
    likeliest: NDArray[np.int32]


class _Alternative(msgspec.Struct):
    logprob: float
    rank: int | None = None


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Alternative] | None] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


def score(client: httpx.Client, model: str, text: Text, likeliest: int) -> Scored:
    """`likeliest`: how many to ask for; -1: the whole vocabulary. Raises EngineError when the server gives none."""
    body = {
        "model": model, "prompt": list(text.ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": likeliest,
    }  # fmt: skip
    reply = post(client, COMPLETIONS, body)
    if reply.status_code != 200:
        raise EngineError(f"prompt_logprobs: HTTP {reply.status_code}: {_words(reply)}")
    try:
        rows = msgspec.json.decode(reply.content, type=_Reply).choices[0].prompt_logprobs
    except (msgspec.DecodeError, IndexError) as error:
        raise EngineError(f"{client.base_url}: an answer without prompt_logprobs ({error})") from error
    if rows is None or len(rows) != len(text.ids):
        raise EngineError(f"{client.base_url} gives no prompt_logprobs", remedy="serve the model with vLLM")
    return _scored([row or {} for row in rows[1:]], text.ids[1:], whole=likeliest == -1)


def most_likeliest(client: httpx.Client, model: str, vocabulary: int | None) -> int:
    """How many likeliest tokens this server gives: -1 for all of a small vocabulary. Raises EngineError for none."""
    wanted = [-1] if vocabulary is not None and vocabulary <= SMALL_VOCABULARY else []
    said = ""
    for count in (*wanted, LIKELIEST, 20, FEWEST):
        body = {"model": model, "prompt": [1, 1], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count}
        reply = post(client, COMPLETIONS, body)
        if reply.status_code == 200:
            return count
        said = f"HTTP {reply.status_code}: {_words(reply)}"
    raise EngineError(
        f"{client.base_url} gives no prompt_logprobs ({said})",
        remedy="serve the model with vLLM, or leave out the text",
    )


def compare(text: Text, base: Scored, other: Scored, precision: str, round: int) -> list[Position]:
    """A row for each position of a text that both have read."""
    if base.ids is None and other.ids is None:
        kl = exact_kl(base.logprobs, other.logprobs)
    else:
        kl = np.array([coarse_kl(_pairs(base, row), _pairs(other, row)) for row in range(len(base.following))])
    return [
        Position(
            precision,
            round,
            text.id,
            index + 1,
            token,
            logprob=_rounded(other.following[index]),
            base_logprob=_rounded(base.following[index]),
            kl_nats=_rounded(kl[index]),
            agrees=bool(base.likeliest[index] == other.likeliest[index]),
            right=bool(other.likeliest[index] == token),
            base_right=bool(base.likeliest[index] == token),
        )
        for index, token in enumerate(text.ids[1:])
    ]


def _rounded(value: Any) -> float:
    """Seven digits: more than a float32 has."""
    return float(f"{float(value):.7g}")


def _scored(rows: Sequence[dict[str, _Alternative]], following: Sequence[int], *, whole: bool) -> Scored:
    found = [{int(token): given.logprob for token, given in row.items()} for row in rows]
    follows = np.array([row[token] for row, token in zip(found, following, strict=True)], dtype=np.float32)
    if whole:
        size = max(map(len, found), default=0)
        table = np.full((len(found), size), -np.inf, dtype=np.float32)
        for index, row in enumerate(found):
            table[index, list(row)] = list(row.values())
        return Scored(None, table, follows, table.argmax(axis=1).astype(np.int32))
    width = max(map(len, found), default=0)
    ids = np.full((len(found), width), -1, dtype=np.int32)
    values = np.full((len(found), width), -np.inf, dtype=np.float32)
    for index, row in enumerate(found):
        ordered = sorted(row.items(), key=lambda pair: (-pair[1], pair[0]))
        ids[index, : len(ordered)] = [token for token, _ in ordered]
        values[index, : len(ordered)] = [logprob for _, logprob in ordered]
    return Scored(ids, values, follows, ids[:, 0].copy())


def _pairs(scored: Scored, row: int) -> tuple[tuple[int, float], ...]:
    values = scored.logprobs[row].tolist()
    if scored.ids is None:
        return tuple(enumerate(values))
    return tuple((token, value) for token, value in zip(scored.ids[row].tolist(), values, strict=True) if token >= 0)


def _words(reply: httpx.Response) -> str:
    return without_keys(" ".join(reply.text.split())[:300])
