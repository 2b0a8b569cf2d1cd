"""The calibration set: which tokens a method looks at to learn which channels matter.

Each document is a sequence of its own, as each request to a server is, and only those longer than `length` tokens are
cut. (Joining short ones into full windows, as is common, shows a chat model many conversations at once, which it never
serves: a small one then saw texts at a perplexity of 5.6 that alone have 2.2.) Sequences are drawn with `seed` until
there are samples x length tokens, or no more.

Where the texts come from, in this order: the file that was named; calibration.jsonl in the model's own directory; else
the Python language reference as the interpreter carries it (pydoc's topics, 460 kB of English prose with code). That
last finds the channels with outliers, which are the model's more than the text's; a set from the domain that will be
served is better.

    .txt                     one document
    {"text": ...}            a document a line, encoded as a request would be (the tokenizer's own beginning)
    {"messages": [...]}      a conversation a line, through the model's chat template, which writes the beginning itself
    {"input_ids": [...]}     token ids a line, taken as they are: nothing is added, and no tokenizer is needed

A file is read once, a line at a time. Of one larger than `WHOLE`, which is many times what is drawn, that much is
kept: the lines (of a .txt, the stretches of 64 thousand characters) with the smallest of random numbers drawn for them
with `seed`, so each has the same chance, and memory and tokenizing stay bounded. Lines not kept are not checked.
"""

import hashlib
import heapq
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quantize.errors import CalibrationError
from quantize.recipe import Recipe

SHIPPED = "calibration.jsonl"
_KEYS = ("input_ids", "text", "messages")
ALLOWED = 'a .txt file, or a .jsonl file whose lines are {"text": ...}, {"input_ids": [...]} or {"messages": [...]}'

WHOLE = 4 * 2**20
"""Characters of a file that are kept at most, or 16 for each token wanted if that is more."""
_STRETCH = 2**16


@dataclass(frozen=True)
class CalibrationSet:
    """`sequences` of token ids, none longer than the recipe's length; `origin` says where they came from."""

    sequences: tuple[tuple[int, ...], ...]
    origin: str

    def sha256(self) -> str:
        """Hex digest of the token ids: it changes with the text, the tokenizer and the draw."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()


class Document(NamedTuple):
    """`where`: file and line, for what is said of it; `key`: which of `_KEYS` `content` is."""

    where: str
    key: str
    content: Any


def load(model_dir: Path, recipe: Recipe, file: Path | None = None) -> CalibrationSet:
    """The calibration set of a model: `file`, else the one it ships, else the built-in text.

    Raises CalibrationError where the file is absent, malformed, without text, or shorter than one window, and where
    there is text and no tokenizer that loads.
    """
    if file is None and (model_dir / SHIPPED).is_file():
        file = model_dir / SHIPPED
    limit = max(WHOLE, 16 * recipe.samples * recipe.length)
    documents, dropped = (built_in(), 0) if file is None else _read(file, limit, recipe.seed)
    tokenizer = None if all(document.key == "input_ids" for document in documents) else load_tokenizer(model_dir)
    vocabulary = vocabulary_size(model_dir) or (sys.maxsize if tokenizer is None else len(tokenizer))
    ids = [encode(document, tokenizer, vocabulary) for document in documents]
    origin = "built-in: pydoc topics" if file is None else file.name
    if dropped:
        origin += f", {len(documents)} of {len(documents) + dropped} parts"
    return CalibrationSet(draw(ids, recipe), origin)


def draw(documents: Sequence[Sequence[int]], recipe: Recipe) -> tuple[tuple[int, ...], ...]:
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


# --- documents --------------------------------------------------------------------------------------------------------


def built_in() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions strip it
        raise CalibrationError(
            "no calibration set, and an interpreter without pydoc's topics", ALLOWED, "Give one with --calibration"
        ) from error
    return [Document(f"pydoc topic {name}", "text", topics[name]) for name in sorted(topics)]


def _read(file: Path, limit: int, seed: int) -> tuple[list[Document], int]:
    """The documents of `file`, in its order, and how many lines or stretches were left out because it is large."""
    plain = file.suffix.lower() == ".txt"
    try:
        # A byte order mark is no text, and every kind of line end becomes "\n".
        with file.open(encoding="utf-8-sig") as opened:
            kept, dropped = _sample(stretches(opened) if plain else lines(opened, file, limit), limit, seed)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {file}: {error}", f"{ALLOWED}, in UTF-8", "Save it as UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError(f"calibration file {file}: {error}", ALLOWED, "Check the path") from error
    if plain and not dropped:
        kept = [(1, "".join(text for _, text in kept))]
    documents = []
    for number, text in kept:
        document = Document(file.name, "text", text) if plain else parse(text, f"{file}:{number}")
        if document.key != "text" or document.content.strip():
            documents.append(document)
    if not documents:
        what = "holds nothing but white space" if any(text for _, text in kept) else "is empty"
        raise CalibrationError(f"calibration file {file} {what}", ALLOWED, "Give some text")
    return documents, dropped


def stretches(opened: Any) -> Iterator[tuple[int, str]]:
    """A text in parts that end with a line, where lines are not as long as a part."""
    for number in itertools.count(1):
        text = opened.read(_STRETCH)
        if not text:
            return
        yield number, text + ("" if text.endswith("\n") else opened.readline(_STRETCH))


def lines(opened: Any, file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    for number in itertools.count(1):
        line = opened.readline(limit + 1)
        if not line:
            return
        if len(line) > limit:
            raise CalibrationError(
                f"{file}:{number}, a line of more than {limit:,} characters",
                "one document a line",
                "Cut it into several",
            )
        if line.strip():
            yield number, line


def _sample(parts: Iterable[tuple[int, str]], limit: int, seed: int) -> tuple[list[tuple[int, str]], int]:
    """As many of `parts` as have `limit` characters together, in their order, and how many were dropped.

    Those with the smallest keys stay, a random number each: whoever has the largest goes when there is too much.
    """
    keys = random.Random(seed)
    heap: list[tuple[float, int, str]] = []
    held = dropped = 0
    for number, text in parts:
        heapq.heappush(heap, (-keys.random(), number, text))
        held += len(text)
        while held > limit:
            held -= len(heapq.heappop(heap)[2])
            dropped += 1
    return sorted((number, text) for _, number, text in heap), dropped


def parse(line: str, where: str) -> Document:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith("\n") else ", the last line, which may be cut short,"
        raise CalibrationError(f"{where}{cut} is not JSON ({error})", ALLOWED, "Correct the line") from error
    if not isinstance(document, dict):
        raise CalibrationError(f"{where} is a {type(document).__name__}", ALLOWED, "Correct the line")
    key = next((key for key in _KEYS if document.get(key) is not None), None)
    if key is None:
        raise CalibrationError(f"{where} has none of the three keys", ALLOWED, "Correct the line")
    content = document[key]
    if key == "text" and not isinstance(content, str):
        raise CalibrationError(f"{where}: a text that is a {type(content).__name__}", ALLOWED, "Correct the line")
    return Document(where, key, content)


# --- token ids --------------------------------------------------------------------------------------------------------


def vocabulary_size(model_dir: Path) -> int | None:
    """How many ids the model knows, by its config.json: often more than the tokenizer's, whose rest is padding."""
    try:
        size = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def load_tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        if not any(model_dir.glob("tokenizer*")):  # transformers would make an empty one up
            raise OSError("no tokenizer files")
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CalibrationError(
            f"{model_dir} without a tokenizer that loads ({error})",
            'a model\'s directory with its tokenizer files, or a calibration file of {"input_ids": [...]}',
            "Fetch it again, or use --method rtn, which needs no calibration",
        ) from error


def encode(document: Document, tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids of one document. Raises CalibrationError for any that the model does not know."""
    where, key, content = document
    if key == "input_ids":
        return _check_ids(content, vocabulary, where)
    text = conversation(content, tokenizer, where) if key == "messages" else content
    try:
        encoded: list[int] = tokenizer(text, add_special_tokens=key == "text", verbose=False)["input_ids"]
    except (TypeError, ValueError) as error:  # half a surrogate pair, which JSON can hold and Unicode text cannot
        raise CalibrationError(f"{where}, which cannot be encoded ({error})", "Unicode", "Correct the line") from error
    if encoded and max(encoded) >= vocabulary:
        raise CalibrationError(
            f"{where}, in which the tokenizer finds the token {max(encoded)}",
            f"ids below the model's vocabulary, {vocabulary}",
            "Tokenizer and config.json do not belong together: fetch the model again",
        )
    return encoded


def _check_ids(ids: Any, vocabulary: int, where: str) -> list[int]:
    wrong = [type(ids).__name__]
    if isinstance(ids, list):  # a bool is an int to Python, and not to whoever wrote it
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocabulary]
    if wrong:
        raise CalibrationError(
            f"{where}: input_ids with {str(wrong[0])[:40]}, which is no id in a vocabulary of {vocabulary}",
            "one list of this model's token ids a line",
            "Encode the text with this model's tokenizer",
        )
    return list(ids)


def conversation(messages: Any, tokenizer: Any, where: str) -> str:
    """`messages` as the chat template writes them."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{where} has messages, and the model's tokenizer has no chat template",
            '{"text": ...} or {"input_ids": ...}',
            "Write the conversations as text",
        )
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise CalibrationError(
            f"{where}: messages that are no list of messages",
            '[{"role": ..., "content": ...}, ...]',
            "Correct the line",
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CalibrationError(
            f"{where}: messages that the chat template refuses ({error})", "what the model's template takes",
            "Correct the line, or write the conversation as text",
        ) from error  # fmt: skip
    return str(text)
