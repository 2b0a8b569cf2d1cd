"""Training text that the model writes itself, for whoever has none: no data, and its own distribution.

LLM-QAT (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv 2305.17888,
section 3.1): a first token is drawn at random from the vocabulary, the next few (3 to 5) are the likeliest, which leads
from an arbitrary token to something that the model would say, and the rest is sampled from its softmax, not just from
the likeliest tokens: noise is what keeps the texts diverse.

The random token stands in for a beginning that the model knows. Where it knows one, the text begins with that, and all
that follows is sampled, so documents have exactly the model's probabilities (Magpie does this with the chat template:
Xu et al., arXiv 2406.08464):

    a chat template     what it writes before the first user's words; the model then writes question and answer
    a BOS token         that token
    neither             LLM-QAT's random token and its greedy ones

In a conversation the first end mark is the question's: what the template writes from there to the answer's first word
is put there, so a model that was only trained to answer does answer. The document ends with the answer. Without a
template, or where its marks are no special tokens, it ends at the first end-of-sequence token, and at `length` tokens
in any case.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.calibration import conversation, load_tokenizer
from quantize.errors import CalibrationError, RunError, SchemeError

GREEDY = (3, 5)
"""The likeliest tokens after a random one: from, to."""

_WORDS = ("kneebench-question", "kneebench-answer")  # what a template is rendered with to find what it writes itself


@dataclass(frozen=True)
class Frame:
    """What documents consist of besides the model's words, in token ids.

    beginning: what each begins with, () for a random one of `openers`, the ordinary tokens; turns: for each turn of a
    conversation the mark that ends it and what the template writes after that; ends: what ends a document anywhere.
    """

    beginning: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    openers: tuple[int, ...]


@dataclass
class _Document:
    """A document being written; `greedy` tokens are yet to be the likeliest, `due` are the template's."""

    ids: list[int]
    greedy: int
    turn: int = 0
    due: list[int] = field(default_factory=list)


def write(
    model: Any,
    tokenizer_dir: Path,
    out: Path,
    tokens: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
    batch: int = 16,
    say: Callable[[int, int], None] | None = None,
) -> Path:
    """Let `model`, a transformers model, write documents of at most `length` tokens until they hold `tokens`.

    `out` gets a line {"input_ids": [...]} for each and is there when all are. `batch` documents are written at a time;
    `say` is called with the tokens done and in all. The same arguments give the same file on one machine. Raises
    SchemeError for a number out of range, CalibrationError without a tokenizer, RunError where the disk is full.
    """
    frame = frame_of(model, tokenizer_dir)
    _check(tokens, length, temperature, batch, len(frame.beginning) or 1)
    generator = torch.Generator(model.device).manual_seed(seed)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w") as file:
                written = 0
                while written < tokens:
                    for ids in documents(model, frame, length, temperature, batch, generator):
                        if written < tokens:
                            file.write(json.dumps({"input_ids": ids}) + "\n")
                            written += len(ids)
                    if say:
                        say(min(written, tokens), tokens)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} could not be written ({error})",
            "a file in a directory that can be made, on a disk with room",
            "Make room and run it again",
        ) from error
    return out


@torch.no_grad()
def documents(
    model: Any, frame: Frame, length: int, temperature: float, batch: int, generator: torch.Generator
) -> list[list[int]]:
    """`batch` documents, written together; one that has ended leaves the batch. Temperature divides the logits."""
    made = [_Document(*_begin(frame, generator)) for _ in range(batch)]
    rows, cache = made, None
    ids = torch.tensor([row.ids for row in rows], device=model.device)
    while rows:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        likeliest = logits.argmax(dim=-1).tolist()
        sampled = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0].tolist()
        left = [i for i, row in enumerate(rows) if _add(row, frame, likeliest[i], sampled[i], length)]
        if len(left) < len(rows):
            rows = [rows[i] for i in left]
            cache.batch_select_indices(torch.tensor(left, dtype=torch.long, device=model.device))
        ids = torch.tensor([row.ids[-1:] for row in rows], device=model.device)
    return [row.ids for row in made]


def _begin(frame: Frame, generator: torch.Generator) -> tuple[list[int], int]:
    """A document's first ids, and how many greedy ones follow."""
    if frame.beginning:
        return list(frame.beginning), 0
    first = _draw(len(frame.openers), generator)
    return [frame.openers[first]], GREEDY[0] + _draw(GREEDY[1] - GREEDY[0] + 1, generator)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def _add(row: _Document, frame: Frame, likeliest: int, sampled: int, length: int) -> bool:
    """Add the next token to a document; whether it goes on."""
    if row.due:
        row.ids.append(row.due.pop(0))
        return len(row.ids) < length
    token = likeliest if row.greedy else sampled
    row.greedy = max(row.greedy - 1, 0)
    row.ids.append(token)
    if row.turn < len(frame.turns) and token == frame.turns[row.turn][0]:
        row.due = list(frame.turns[row.turn][1:])
        row.turn += 1
        if row.turn == len(frame.turns):  # what the template writes last needs no model
            row.ids = (row.ids + row.due)[:length]
            return False
    elif token in frame.ends:
        return False
    return len(row.ids) < length


def _check(tokens: int, length: int, temperature: float, batch: int, beginning: int) -> None:
    for name, given in (("tokens", tokens), ("batch", batch)):
        if given < 1:
            raise SchemeError(f"{name} = {given} to write", "a positive number", f"Raise {name}")
    if length <= beginning:
        raise SchemeError(
            f"length = {length}", f"more than {beginning}, the tokens that a document begins with", "Raise --length"
        )
    if not 0 < temperature < float("inf"):
        raise SchemeError(f"temperature = {temperature}", "a positive number", "1 is the model's own distribution")


# --- beginnings and ends ----------------------------------------------------------------------------------------------


def frame_of(model: Any, tokenizer_dir: Path) -> Frame:
    """How the documents of `model` begin and end. Raises CalibrationError without a tokenizer that loads."""
    tokenizer = load_tokenizer(tokenizer_dir)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    openers = tuple(i for i in range(min(len(tokenizer), model.config.vocab_size)) if i not in special)
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    before, between, after = _chat(tokenizer)
    marked = bool(between and after) and between[0] in special and after[0] in special
    return Frame(before or bos, (between, after) if marked else (), _ends(model, tokenizer, tokenizer_dir), openers)


def _chat(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """What the template writes before a question, between it and the answer, and after that; nothing without one."""
    messages = [{"role": role, "content": words} for role, words in zip(("user", "assistant"), _WORDS, strict=True)]
    try:
        text = conversation(messages, tokenizer, "a conversation")
    except CalibrationError:  # no template, or one that takes other messages
        return (), (), ()
    before, _, rest = text.partition(_WORDS[0])
    between, found, after = rest.partition(_WORDS[1])
    if not found:
        return (), (), ()
    # A space before a word belongs to the word's token.
    parts = (before.rstrip(" "), between.rstrip(" "), after)
    return tuple(tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)


def _ends(model: Any, tokenizer: Any, directory: Path) -> frozenset[int]:
    """The end-of-sequence tokens: the tokenizer's, config.json's, and generation_config.json's, which has the most."""
    found = [tokenizer.eos_token_id, model.config.eos_token_id]
    file = directory / "generation_config.json"
    if file.is_file():
        found.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    lists = [ids if isinstance(ids, list) else [ids] for ids in found]
    return frozenset(i for ids in lists for i in ids if i is not None)
