"""What is asked: seeded prompts of exact token length, new text for each cell and repeat, the same for each precision.

A prompt is a list of token ids wherever the API takes them: decode(encode(x)) changes lengths, and then both the load
and the prefix cache are not what the plan says. Ids are drawn from a vocabulary without special tokens. For servers
that only take text, words are drawn and their number calibrated with the server's own count (dialect.py).

    prompt of a first request   = shared prefix (the cell's, if any) + new text
    prompt of a later turn      = all that was said before (History) + new text

Nothing here depends on the precision, and nothing but the cache salt on the attempt or the run: what was measured can
be asked again, and finds no warm cache. A server that takes no salt gets other text instead, of the same lengths.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import NormalDist

from harness.load.dataset import Prompt, Prompts, chosen
from harness.records import Cell, Scenario

WORDS = (
    "river stone light paper window garden winter market letter bridge silver morning number island forest engine "
    "summer village kitchen station picture harbour question weather journey captain machine evening country teacher "
    "mountain holiday library history orchard blanket whistle feather compass lantern pepper velvet copper meadow"
).split()
"""Plain words of one to three tokens in most vocabularies."""

LONGEST_QUANTILE = 0.999
"""A lognormal length has no end: what is drawn ends at this quantile, and the context is made for it."""
_HEAD_WORDS = 8
"""44**8 heads: two runs or cells that draw the same one will not happen."""
_NORMAL = NormalDist()


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
    turn_overhead_tokens: float = 0.0
    """For chat: tokens that the template adds with each further turn."""
    vllm_extras: bool = True
    """The server takes vLLM's ignore_eos, min_tokens, return_token_ids, cache_salt."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send: lengths wanted, the body with them, and what in it was not said before."""

    input_tokens: int
    """Of the whole prompt, the conversation before it included."""
    output_tokens: int
    body: bytes
    ids: tuple[int, ...] = ()
    """What is new in the prompt, as ids or as text."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """What was said in a conversation, in each form that a prompt may take."""

    tokens: int = 0
    ids: tuple[int, ...] = ()
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content)"""


NO_HISTORY = History()


def extended(history: History, ask: Ask, answer_ids: Sequence[int], answer_text: str) -> History:
    """The conversation once `ask` was answered.

    A server that takes ids and tells none of its answer gets ids of the prompt back in its place: the length is right.
    """
    answer = tuple(answer_ids) or tuple(islice(cycle(ask.ids), ask.output_tokens))
    return History(
        tokens=ask.input_tokens + (len(answer) or ask.output_tokens),
        ids=(*history.ids, *ask.ids, *answer) if ask.ids else (),
        text=history.text + ask.text + answer_text,
        messages=(*history.messages, ("user", ask.text), ("assistant", answer_text)),
    )


# --- lengths ----------------------------------------------------------------------------------------------------------


def drawn_length(mean: int, scenario: Scenario, rng: random.Random) -> int:
    """A length, at least 1, from the scenario's distribution around `mean`:

    fixed      mean
    uniform    evenly from mean * (1 ± jitter)
    lognormal  exp(N(mu, jitter**2)) without what lies above its 99.9 % quantile; mu is such that `mean` is the mean

    Where lengths come from a file and it does not tell one (empirical), that one is drawn as uniform.
    """
    jitter = scenario.length_jitter
    if scenario.length_distribution == "fixed":
        return max(1, mean)
    if scenario.length_distribution == "lognormal":
        normal = _NORMAL.inv_cdf(LONGEST_QUANTILE * (1 - rng.random()))
        return max(1, round(math.exp(lognormal_mu(mean, jitter) + jitter * normal)))
    return max(1, rng.randint(round(mean * (1 - jitter)), round(mean * (1 + jitter))))


def longest_length(mean: int, scenario: Scenario) -> int:
    """The longest length that `drawn_length` can give."""
    jitter = scenario.length_jitter
    if scenario.length_distribution == "fixed":
        return max(1, mean)
    if scenario.length_distribution == "lognormal":
        return max(1, round(math.exp(lognormal_mu(mean, jitter) + jitter * _NORMAL.inv_cdf(LONGEST_QUANTILE))))
    return max(1, round(mean * (1 + jitter)))


def lognormal_mu(mean: float, sigma: float) -> float:
    """mu of the lognormal whose mean below its q = 99.9 % quantile is `mean`.

    The mean of exp(N(mu, s**2)) below its q-quantile is exp(mu + s**2 / 2) * Phi(z - s) / q, where z = Phi**-1(q).
    """
    left = _NORMAL.cdf(_NORMAL.inv_cdf(LONGEST_QUANTILE) - sigma) / LONGEST_QUANTILE
    return math.log(mean / left) - sigma**2 / 2


def prefix_tokens(scenario: Scenario) -> int:
    """Length of what the first requests of all conversations of a cell have in common; it leaves one token to vary."""
    return min(round(scenario.shared_prefix * scenario.input_tokens), scenario.input_tokens - 1)


def drawn_lengths(scenario: Scenario, cell: Cell, user: int, sequence: int, prefix: int = 0) -> tuple[int, int]:
    """(new text with the prefix, answer) of a request: the prefix is always whole, and the lengths of the rest vary.

    Seeded by everything but the precision.
    """
    rng = random.Random(f"{_seed(scenario, cell)}/{user}/{sequence}")
    new = prefix + drawn_length(scenario.input_tokens - prefix, scenario, rng)
    return new, drawn_length(scenario.output_tokens, scenario, rng)


def _seed(scenario: Scenario, cell: Cell) -> str:
    return f"{scenario.seed}/{cell.conc}/{cell.rate_rps}/{cell.repeat}"


# --- requests ---------------------------------------------------------------------------------------------------------


def make_ask(
    scenario: Scenario,
    cell: Cell,
    user: int,
    sequence: int,
    dialect: Dialect,
    model: str,
    *,
    salt: str = "",
    lengths: tuple[int, int] | None = None,
    prompts: Prompts | None = None,
    history: History = NO_HISTORY,
) -> Ask:
    """The request that `user` sends as its `sequence`-th in this cell.

    Seeded by everything but the precision: both precisions get the same prompts and lengths, and no two cells or
    repeats share text, so a prefix cache has nothing to find. `salt`, the run's nonce, makes sure of that where an
    earlier run or attempt has asked the same. `lengths` (a trace's) are those of the new text and of the answer.
    """
    seed = _seed(scenario, cell)
    text_seed = seed if dialect.vllm_extras else f"{seed}/{salt}/{cell.attempt}"
    prefix = 0 if history.tokens else prefix_tokens(scenario)
    passes = 0
    new, answer = lengths or drawn_lengths(scenario, cell, user, sequence, prefix)
    if prompts is None:
        if scenario.dataset is not None:
            raise ValueError("the scenario's prompts come from a dataset, and none are given")
        shared, own = random.Random(f"{text_seed}/prefix"), random.Random(f"{text_seed}/{user}/{sequence}/text")
        new = max(1, new)
        ids, text = _drawn(new, min(prefix, new - 1), dialect, shared, own, history)
    else:
        prompt, passes = chosen(prompts, sequence * cell.conc + user, seed)
        ids, text, new = _from_file(prompt, dialect, random.Random(f"{text_seed}/{passes}/head"), history)
        answer = prompt.output_tokens or answer
    answer = max(2, answer)
    body: dict[str, object] = {
        "model": model,
        "max_tokens": answer,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if dialect.chat:
        said = (*history.messages, ("user", text))
        body["messages"] = [{"role": role, "content": content} for role, content in said]
    else:
        body["prompt"] = history.ids + ids if ids else history.text + text
    if dialect.vllm_extras:
        # The output length is the plan's, not the model's: INT4 may stop earlier than BF16. It is verified afterwards.
        body |= {"ignore_eos": True, "min_tokens": answer, "return_token_ids": True}
        name = cell.key.replace("@", "+")  # vLLM refuses a salt with an @
        body["cache_salt"] = f"{salt}-{name}-a{cell.attempt}" + (f"-p{passes}" if passes else "")
    return Ask(history.tokens + new, answer, json.dumps(body).encode(), ids, text)


def _drawn(
    tokens: int, prefix: int, dialect: Dialect, shared: random.Random, own: random.Random, history: History
) -> tuple[tuple[int, ...], str]:
    """(ids, text) of so many tokens, one of them empty; the first `prefix` tokens are the cell's, the rest is new."""
    if dialect.vocabulary and not dialect.chat:
        return (*_ids(dialect.vocabulary, prefix, shared), *_ids(dialect.vocabulary, tokens - prefix, own)), ""
    overhead = dialect.turn_overhead_tokens if history.tokens else dialect.overhead_tokens
    count = max(1, round((tokens - overhead) * dialect.words_per_token))
    common = min(round(prefix * dialect.words_per_token), count - 1)
    return (), _spaced([*shared.choices(WORDS, k=common), *own.choices(WORDS, k=count - common)], dialect, history)


def _ids(vocabulary: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Random ids at half the cost of `choices`; 16 bits each, so the rare tokens of a large vocabulary never come."""
    size = len(vocabulary)
    return [vocabulary[number % size] for number in memoryview(rng.randbytes(2 * count)).cast("H")]


def _from_file(
    prompt: Prompt, dialect: Dialect, head: random.Random, history: History
) -> tuple[tuple[int, ...], str, int]:
    """(ids, text, tokens) of a prompt from a file; where no cache salt keeps cells and passes apart, a head does."""
    headed = not dialect.vllm_extras and not history.tokens
    if prompt.ids is not None and dialect.vocabulary and not dialect.chat:
        ids = (*_ids(dialect.vocabulary, _HEAD_WORDS, head), *prompt.ids) if headed else prompt.ids
        return ids, "", len(ids)
    words = head.choices(WORDS, k=_HEAD_WORDS) if headed else []
    counted = len(prompt.ids) if prompt.ids is not None else len(prompt.text.split()) / dialect.words_per_token
    overhead = dialect.turn_overhead_tokens if history.tokens else dialect.overhead_tokens
    tokens = round(counted + len(words) / dialect.words_per_token + overhead)
    return (), _spaced([*words, prompt.text], dialect, history), tokens


def _spaced(words: Sequence[str], dialect: Dialect, history: History) -> str:
    """Words as text; one that goes on where an answer ended begins with a space."""
    return (" " if history.tokens and not dialect.chat else "") + " ".join(words)


def vocabulary(size: int, special: Sequence[int]) -> tuple[int, ...]:
    """Ids below `size` without the special ones: an end-of-text inside a prompt is no prompt anybody sends."""
    excluded = set(special)
    return tuple(number for number in range(size) if number not in excluded)
