"""What is asked: seeded prompts of exact token length, new text for each cell and repeat, the same for each precision.

A prompt is a list of token ids wherever the API takes them: decode(encode(x)) changes lengths, and then both the load
and the prefix cache are not what the plan says. Ids are drawn from a vocabulary without special tokens. For servers
that only take text, words are drawn and their number calibrated with the server's own count (dialect.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import Cell, Scenario

WORDS = (
    "river stone light paper window garden winter market letter bridge silver morning number island forest engine "
    "summer village kitchen station picture harbour question weather journey captain machine evening country teacher "
    "mountain holiday library history orchard blanket whistle feather compass lantern pepper velvet copper meadow"
).split()
"""Plain words of one to three tokens in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server understands (found out by dialect.py, or known because we started it)."""

    path: str = "/v1/completions"
    chat: bool = False
    vocabulary: tuple[int, ...] | range = ()
    """Ids that prompts may be drawn from; empty: prompts go as text."""
    words_per_token: float = 0.6
    """For text prompts: words to send for each token wanted."""
    overhead_tokens: float = 0.0
    """For text prompts: tokens that the server adds to any prompt (chat template, BOS)."""
    vllm_extras: bool = True
    """The server takes vLLM's ignore_eos, min_tokens, return_token_ids, cache_salt."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send: lengths wanted, and the body with them."""

    input_tokens: int
    output_tokens: int
    body: bytes


def drawn_length(mean: int, jitter: float, rng: random.Random) -> int:
    """A length drawn evenly from mean·(1 ± jitter), at least 1."""
    return max(1, rng.randint(round(mean * (1 - jitter)), round(mean * (1 + jitter))))


def make_ask(scenario: Scenario, cell: Cell, user: int, sequence: int, dialect: Dialect, model: str) -> Ask:
    """The request that `user` sends as its `sequence`-th in this cell.

    Seeded by everything but the precision: both precisions get the same prompts and lengths, and no two cells or
    repeats share text, so a prefix cache has nothing to find. On vLLM a cache salt makes sure of that.
    """
    rng = random.Random(f"{scenario.seed}/{cell.conc}/{cell.repeat}/{user}/{sequence}")
    wanted_in = drawn_length(scenario.input_tokens, scenario.length_jitter, rng)
    wanted_out = max(2, drawn_length(scenario.output_tokens, scenario.length_jitter, rng))
    body: dict[str, object] = {
        "model": model,
        "max_tokens": wanted_out,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if dialect.vocabulary and not dialect.chat:
        body["prompt"] = rng.choices(dialect.vocabulary, k=wanted_in)
    else:
        text = _text(wanted_in, dialect, rng)
        if dialect.chat:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
    if dialect.vllm_extras:
        # The output length is the plan's, not the model's: INT4 may stop earlier than BF16. It is verified afterwards.
        body |= {"ignore_eos": True, "min_tokens": wanted_out, "return_token_ids": True}
        body["cache_salt"] = f"{scenario.seed}-{cell.key}"
    return Ask(wanted_in, wanted_out, json.dumps(body).encode())


def _text(tokens: int, dialect: Dialect, rng: random.Random) -> str:
    count = max(1, round((tokens - dialect.overhead_tokens) * dialect.words_per_token))
    return " ".join(rng.choices(WORDS, k=count))


def vocabulary(size: int, special: Sequence[int]) -> tuple[int, ...]:
    """Ids below `size` without the special ones: an end-of-text inside a prompt is no prompt anybody sends."""
    excluded = set(special)
    return tuple(number for number in range(size) if number not in excluded)
