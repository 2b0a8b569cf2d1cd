"""The calibration set: which tokens a method looks at to learn which channels matter.

Each document is a sequence of its own, as each request to a server is, and only those longer than `length` tokens are
cut. (Joining short ones into full windows, as is common, shows a chat model many conversations at once, which it never
serves: a small one then saw texts at a perplexity of 5.6 that alone have 2.2.) Sequences are drawn with `seed` until
there are samples x length tokens, or no more.

Where the texts come from, in this order: the file that was named; calibration.jsonl in the model's own directory; else
the Python language reference as the interpreter carries it (pydoc's topics, 460 kB of English prose with code). That
last finds the channels with outliers, which are the model's more than the text's; a set from the domain that will be
served is better.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import CalibrationError
from quantize.recipe import Recipe

SHIPPED = "calibration.jsonl"
_ALLOWED = 'a .txt file, or a .jsonl file whose lines are {"text": ...}, {"input_ids": [...]} or {"messages": [...]}'


@dataclass(frozen=True)
class CalibrationSet:
    """`sequences` of token ids, none longer than the recipe's length; `origin` says where they came from."""

    sequences: tuple[tuple[int, ...], ...]
    origin: str

    def sha256(self) -> str:
        """Hex digest of the token ids: it changes with the text, the tokenizer and the draw."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()


def load(model_dir: Path, recipe: Recipe, file: Path | None = None) -> CalibrationSet:
    """The calibration set of a model: `file`, else the one it ships, else the built-in text.

    Raises CalibrationError where the file is absent, malformed, or shorter than one window.
    """
    from transformers import AutoTokenizer

    if file is None and (model_dir / SHIPPED).is_file():
        file = model_dir / SHIPPED
    try:
        if not any(model_dir.glob("tokenizer*")):  # transformers would make an empty one up
            raise OSError("no tokenizer files")
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CalibrationError(
            f"{model_dir} without a tokenizer that loads ({error})",
            "a model's directory with its tokenizer files",
            "Fetch it again, or use --method rtn, which needs no calibration",
        ) from error
    documents = _built_in() if file is None else _read(file)
    origin = "built-in: pydoc topics" if file is None else file.name
    ids = [_encode(document, tokenizer, origin) for document in documents]
    return CalibrationSet(draw(ids, recipe), origin)


def draw(documents: list[list[int]], recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    """Cut `documents` to sequences of at most `recipe.length` tokens and draw until there are samples x length tokens.

    Fewer are accepted, down to one sequence's worth: below that a Gram matrix is mostly noise.
    """
    pieces = [tuple(ids[i : i + recipe.length]) for ids in documents for i in range(0, len(ids), recipe.length)]
    if (tokens := sum(map(len, pieces))) < recipe.length:
        raise CalibrationError(
            f"a calibration set of {tokens} tokens",
            f"at least --length, {recipe.length}",
            "Give more text, or a smaller --length",
        )
    random.Random(recipe.seed).shuffle(pieces)
    wanted = recipe.samples * recipe.length
    before = itertools.accumulate(map(len, pieces), initial=0)
    return tuple(piece for piece, held in zip(pieces, before, strict=False) if held < wanted)


def _built_in() -> list[dict[str, Any]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions strip it
        raise CalibrationError(
            "no calibration set, and an interpreter without pydoc's topics", _ALLOWED, "Give one with --calibration"
        ) from error
    return [{"text": topics[name]} for name in sorted(topics)]


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration file {file}: {error}", _ALLOWED, "Check the path") from error
    documents = [{"text": text}] if file.suffix == ".txt" else list(_lines(file, text))
    if not documents:
        raise CalibrationError(f"calibration file {file} is empty", _ALLOWED, "Give some text")
    return documents


def _lines(file: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{file}:{number} is not JSON ({error})", _ALLOWED, "Correct the line") from error
        if not isinstance(document, dict) or not document.keys() & {"text", "input_ids", "messages"}:
            raise CalibrationError(f"{file}:{number} has none of the three keys", _ALLOWED, "Correct the line")
        yield document


def _encode(document: dict[str, Any], tokenizer: Any, origin: str) -> list[int]:
    """Token ids of one document, begun as a request would be; a chat template writes the beginning itself."""
    if "input_ids" in document:
        ids = document["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
            raise CalibrationError(
                f"{origin}: input_ids outside of the vocabulary of {len(tokenizer)}",
                "a list of token ids of this model",
                "Encode the text with this model's tokenizer",
            )
        return ids
    text = document.get("text")
    templated = text is None
    if templated:
        if not tokenizer.chat_template:
            raise CalibrationError(
                f"{origin} has messages, and the model's tokenizer has no chat template",
                '{"text": ...} or {"input_ids": ...}',
                "Write the conversations as text",
            )
        text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
    if not isinstance(text, str):
        raise CalibrationError(f"{origin}: a text that is a {type(text).__name__}", _ALLOWED, "Correct the line")
    encoded: list[int] = tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]
    return encoded
