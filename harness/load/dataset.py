"""Prompts from files: what people really ask, with the lengths that belong to it.

    ShareGPT   .json    [{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}]
    lines      .jsonl   {"prompt": ..., "output_tokens": 40}, {"messages": [...]} or {"text": ..., "completion": ...}
    table      .csv     a column prompt, and output_tokens or completion if the answers are known

Of a conversation the first question is taken, and the answer to it. A .json may hold any of the records of a .jsonl.

A prompt that is sent twice is a warm cache. So each cell goes through the file in a seeded order of its own, the same
for every precision, and takes no prompt twice before it has taken them all. When the file is used up it begins again,
and what keeps the passes apart is what keeps cells and runs apart: on vLLM the cache salt, elsewhere a few drawn words
at the head of the prompt (workload.make_ask).
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.files import readable

LARGEST_BYTES = 2**30
MOST_PROMPTS = 4096
"""More than this are sampled: each one is tokenized by the server before the run."""
BYTES_A_TOKEN = 2
"""To size a context before any tokenizer runs: we take it that tokens are longer than this. Where they are not, the
longest prompts are left out."""
_HUMAN, _ASSISTANT = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a file."""

    prompt: str
    answer: str | None = None
    output_tokens: int | None = None
    """Length of the answer, where the file gives it as a number."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready to be sent."""

    text: str
    ids: tuple[int, ...] | None = None
    """None: there is no tokenizer to ask."""
    output_tokens: int | None = None
    """None: nobody could tell; a length of the scenario's own is drawn."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a run, one or more."""

    items: tuple[Prompt, ...]
    left_out: int = 0
    """Prompts of the file that are not used: too long for the context, or more than MOST_PROMPTS."""


def chosen(prompts: Prompts, number: int, seed: str) -> tuple[Prompt, int]:
    """(prompt, pass) of a cell's request of that number, counted from 0: none comes twice within a pass."""
    passes, place = divmod(number, len(prompts.items))
    return prompts.items[_order(len(prompts.items), f"{seed}/{passes}")[place]], passes


@lru_cache(maxsize=8)
def _order(count: int, seed: str) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return tuple(order)


def tokenize_dataset(
    items: Sequence[Item],
    tokenize: Callable[[str], list[int]] | None,
    *,
    context: int | None = None,
    longest_answer: int = 2,
    seed: int = 1,
) -> Prompts:
    """Items ready to be sent: with ids and lengths where `tokenize` can tell them, else as text.

    What has no room in `context` is left out; an answer of unknown length is taken to have `longest_answer`. Raises
    InputError when nothing is left.
    """
    sample = items if len(items) <= MOST_PROMPTS else random.Random(seed).sample(items, MOST_PROMPTS)
    prompts = [
        prompt for prompt in (_ready(item, tokenize) for item in sample) if _fits(prompt, context, longest_answer)
    ]
    if not prompts:
        raise InputError(
            f"none of the {len(items)} prompts of the dataset fits into a context of {context} tokens with its answer",
            remedy="give shorter prompts, or a larger max_model_len",
        )
    return Prompts(tuple(prompts), left_out=len(items) - len(prompts))


def _ready(item: Item, tokenize: Callable[[str], list[int]] | None) -> Prompt:
    if tokenize is None:
        return Prompt(item.prompt, None, item.output_tokens)
    output_tokens = item.output_tokens
    if output_tokens is None and item.answer:
        output_tokens = len(tokenize(item.answer))
    return Prompt(item.prompt, tuple(tokenize(item.prompt)), output_tokens)


def _fits(prompt: Prompt, context: int | None, longest_answer: int) -> bool:
    if prompt.ids is None or context is None:
        return prompt.ids != ()
    return 0 < len(prompt.ids) <= context - max(2, prompt.output_tokens or longest_answer)


def longest_tokens(items: Sequence[Item], longest_answer: int) -> int:
    """Tokens of the longest prompt with its answer, by BYTES_A_TOKEN: there is no tokenizer yet."""
    return max(_bound(item.prompt) + (item.output_tokens or _bound(item.answer) or longest_answer) for item in items)


def _bound(text: str | None) -> int:
    return -(-len((text or "").encode()) // BYTES_A_TOKEN)


# --- reading files ----------------------------------------------------------------------------------------------------


def read_dataset(path: Path) -> tuple[Item, ...]:
    """The prompts of a file, in its order; one or more. Raises InputError naming the file and the line or record."""
    readers = {".json": _read_json, ".jsonl": _read_lines, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise InputError(f"dataset {path.name}: {path.suffix or 'no ending'}", allowed=", ".join(readers))
    try:
        state = readable(path, most=sys.maxsize)
        if state.st_size > LARGEST_BYTES:
            raise InputError(
                f"dataset {path.name}: {state.st_size / 2**30:.1f} GiB",
                allowed=f"up to {LARGEST_BYTES / 2**30:g} GiB",
                remedy=f"cut it down: a run uses {MOST_PROMPTS:,} prompts at most",
            )
        return _read(readers[path.suffix.lower()], path, (state.st_mtime_ns, state.st_size))
    except OSError as error:
        raise InputError(f"dataset {path.name}: cannot be read ({error.strerror})", remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"dataset {path.name}: is not UTF-8 text ({error.reason})", remedy="save it as UTF-8"
        ) from error


@lru_cache(maxsize=1)
def _read(reader: Callable[[Path], Iterator[Item]], path: Path, state: tuple[int, int]) -> tuple[Item, ...]:
    """Kept, because the context and the load both ask for it; a file in another `state` (time, size) is read anew."""
    items = tuple(reader(path))
    if not items:
        raise InputError(f"dataset {path.name}: holds no prompt")
    return items


def _read_json(path: Path) -> Iterator[Item]:
    records = _parsed(path.read_text(encoding="utf-8-sig"), f"dataset {path.name}")
    if not isinstance(records, list):
        raise InputError(f"dataset {path.name}: holds no list", allowed="a JSON list of records, or .jsonl")
    for number, record in enumerate(records, 1):
        yield from _items(record, f"dataset {path.name} record {number}")


def _read_lines(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"dataset {path.name} line {number}"
                yield from _items(_parsed(line, where), where)


def _read_csv(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            if "prompt" not in (rows.fieldnames or ()):
                found = ", ".join(rows.fieldnames or ()) or "nothing"
                raise InputError(f"dataset {path.name} line 1: no column prompt among {found}")
            for row in rows:
                where = f"dataset {path.name} line {rows.line_num}"
                length = (row.get("output_tokens") or "").strip()
                known: dict[str, Any] = {"prompt": row["prompt"], "completion": row.get("completion") or None}
                if length:
                    known["output_tokens"] = int(length) if length.isdecimal() and len(length) < 10 else length
                yield from _items(known, where)
        except csv.Error as error:
            raise InputError(f"dataset {path.name} line {rows.line_num}: {error}", allowed="a CSV file") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{where}: no readable JSON: {error}", remedy="one record a line belongs into a .jsonl"
        ) from error
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply") from None


def _items(record: Any, where: str) -> Iterator[Item]:
    """The item of one record; none for a conversation in which nobody asks anything."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object", allowed=_RECORDS)
    for key, speaker, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in record:
            yield from _exchange(record[key], speaker, content, f"{where}: {key}")
            return
    key = "prompt" if "prompt" in record else "text"
    prompt, answer, output_tokens = record.get(key), record.get("completion"), record.get("output_tokens")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: {key} is {_shown(prompt)}", allowed=_RECORDS)
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: completion is {_shown(answer)}", allowed="text")
    if output_tokens is not None and (type(output_tokens) is not int or not 1 <= output_tokens <= 1_000_000):
        raise InputError(f"{where}: output_tokens is {_shown(output_tokens)}", allowed="a whole number, 1 to 1,000,000")
    yield Item(_sound(prompt), _sound(answer) if answer else None, output_tokens)


_RECORDS = 'an object with "prompt" or "text" (text that is not empty), "messages" or "conversations"'


def _exchange(messages: Any, speaker: str, content: str, where: str) -> Iterator[Item]:
    """The first question of a conversation, with a system prompt before it, and the answer after it."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where} is {_shown(messages)}", allowed=f'a list of {{"{speaker}": ..., "{content}": ...}}')
    said = [(message.get(speaker), _text(message.get(content), f"{where}: {content}")) for message in messages]
    asked = next((place for place, (who, text) in enumerate(said) if who in _HUMAN and text.strip()), None)
    if asked is None:
        return
    prompt = "\n\n".join([text for who, text in said[:asked] if who == "system" and text] + [said[asked][1]])
    follows = said[asked + 1] if asked + 1 < len(said) else (None, "")
    yield Item(prompt, follows[1] if follows[0] in _ASSISTANT and follows[1] else None)


def _text(content: Any, where: str) -> str:
    """A message's text; its content may also be a list of parts, of which some are text."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where} is {_shown(content)}", allowed="text")
    return _sound(content or "")


def _sound(text: str) -> str:
    """Text that can be sent: JSON can spell half a character (a lone surrogate), UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    """A value of a file, short enough for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
