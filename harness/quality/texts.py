"""What precisions are compared on, teacher-forced: texts as token ids, the same for all of them.

From a file (.txt, or .jsonl of prompt and answer or of messages), cut into windows; without one, the baseline's own
answers after their prompts: text of the kind that the model will meet. The server's own tokenizer and chat template
make the ids, once, and every precision reads those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from harness.errors import EngineError, InputError, RecordError
from harness.files import read_text
from harness.quality.prompts import PromptSet
from harness.records import Answer
from harness.redact import without_keys

LARGEST_FILE = 64 * 2**20
_SHORTEST = 8
"""Tokens that a text needs at the least: shorter ones say nothing of a context."""


@dataclass(frozen=True, slots=True)
class Text:
    """A line of texts.jsonl."""

    id: str
    ids: tuple[int, ...]


def from_file(path: Path, client: httpx.Client, model: str, window: int, count: int) -> list[Text]:
    """The first `count` windows of `window` tokens of a file. Conversations are strung together, as turns of one.

    Raises InputError for a file that cannot be read or holds too little, EngineError for a server without /tokenize.
    """
    pieces = (_tokens(client, model, piece) for piece in _pieces(path))
    texts: list[Text] = []
    held: list[int] = []
    for ids in pieces:
        held += ids
        while len(held) >= window and len(texts) < count:
            texts.append(Text(f"{path.name}:{len(texts) + 1}", tuple(held[:window])))
            held = held[window:]
        if len(texts) == count:
            return texts
    if len(held) >= _SHORTEST and (not texts or len(held) >= window // 2):
        texts.append(Text(f"{path.name}:{len(texts) + 1}", tuple(held[:window])))
    if not texts:
        raise InputError(f"--text {path.name}: {len(held)} tokens", allowed=f"{_SHORTEST} at the least")
    return texts


def from_answers(
    prompts: PromptSet, answers: Iterable[Answer], client: httpx.Client, model: str, window: int, count: int
) -> list[Text]:
    """Each prompt followed by the baseline's answer, cut at `window` tokens; every so manieth, so that all families
    are among them. Raises InputError when there are too few answers with token ids."""
    given = {answer.prompt_id: answer for answer in answers if len(answer.tokens) > 1}
    chosen = [prompt for prompt in prompts.prompts if prompt.id in given]
    if not chosen:
        raise InputError(
            "no text to compare on: the baseline's answers have no token ids",
            remedy="give a text: --text FILE (.txt or .jsonl)",
        )
    step = max(1, len(chosen) // count)
    texts = []
    for prompt in chosen[::step][:count]:
        ids = _tokens(client, model, prompt.messages) + list(given[prompt.id].tokens)
        texts.append(Text(prompt.id, tuple(ids[:window])))
    return texts


def to_line(text: Text) -> str:
    return json.dumps({"id": text.id, "ids": list(text.ids)})


def read_texts(path: Path) -> list[Text]:
    try:
        return [
            Text(str(row["id"]), tuple(row["ids"]))
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        ]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RecordError(f"{path.name}: holds a line that is no text ({error})", remedy="measure anew") from error


def _pieces(path: Path) -> Iterable[str | Sequence[Mapping[str, str]]]:
    """What a file holds: the whole of a .txt, a conversation a line of a .jsonl."""
    try:
        content = read_text(path, LARGEST_FILE)
    except OSError as error:
        raise InputError(f"--text {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {path.name}: is not UTF-8 ({error.reason})") from error
    if path.suffix != ".jsonl":
        return [content]
    return [
        _conversation(path.name, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()
    ]


def _conversation(name: str, number: int, line: str) -> str | Sequence[Mapping[str, str]]:
    try:
        row: Any = json.loads(line)
        if "messages" in row:
            return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row["messages"]]
        if "prompt" in row:
            turns = [{"role": "user", "content": str(row["prompt"])}]
            return [*turns, {"role": "assistant", "content": str(row["answer"])}]
        return str(row["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--text {name}, line {number}: cannot be read ({type(error).__name__}: {error})",
            allowed='an object with "messages", with "prompt" and "answer", or with "text"',
        ) from error


def _tokens(client: httpx.Client, model: str, piece: str | Sequence[Mapping[str, str]]) -> list[int]:
    """By the server: plain text without special tokens; messages through its chat template. A conversation that the
    user began ends with the prompt for the assistant's turn."""
    if isinstance(piece, str):
        body: dict[str, Any] = {"model": model, "prompt": piece, "add_special_tokens": False}
    else:
        open_end = piece[-1]["role"] == "user"
        body = {"model": model, "messages": list(piece), "add_generation_prompt": open_end}
    try:
        reply = client.post("/tokenize", json=body)
        if reply.status_code == 200:
            return [int(token) for token in reply.json()["tokens"]]
        said = f"HTTP {reply.status_code}: {' '.join(reply.text.split())[:200]}"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        said = str(error) or type(error).__name__
    raise EngineError(
        f"{client.base_url}/tokenize does not give token ids ({without_keys(said)})",
        remedy="this comparison needs a server like vLLM's, with /tokenize and prompt_logprobs",
    )
