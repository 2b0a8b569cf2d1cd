"""The training text: token ids on disk, in an order that a seed decides and a checkpoint can name a place in.

It comes from where a calibration set comes from and in the same formats (`calibration`), but all of it: each document
is encoded once, as a request would be, cut into windows of at most `length` tokens, and written to a folder. Windows of
one token are left out, for there is nothing in them to predict. "Document" below is such a window.

    corpus.ids     int32, little-endian: the token ids of all documents, one after the other
    corpus.ends    int64, little-endian: where in them each document ends
    corpus.json    what they were made from (`key`), the counts, and the sha256 of the two files' bytes, in that order

The note is written last. A second call with the same text, length and tokenizer finds it and makes nothing, if the
files still have that sha256. Memory stays bounded whatever the size: the text is read a document at a time (a .txt of
more than 4 million characters in stretches that end with a line, each a document), and the ids are mapped, not read.

A few documents, drawn by seed, are held out: training never sees them. The others come in another order each epoch:

    numpy.random.default_rng([seed, epoch]).permutation(the others)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize import calibration
from quantize.calibration import ALLOWED, SHIPPED, Document
from quantize.errors import CalibrationError, RunError, SchemeError

HELDOUT = 2**14
"""Tokens that are held out by default, where they are no more than a tenth."""

_REVISION = 1  # raise it when a change of code changes what is written
_LARGEST = 2**31  # ids are int32
_IDS, _ENDS, _NOTE = "corpus.ids", "corpus.ends", "corpus.json"
_TOKENIZER = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True)
class Place:
    """Where in the order training is: `index` documents of that epoch are used up."""

    epoch: int = 0
    index: int = 0


class Corpus:
    """Documents of token ids, by number, in mapped files of `folder`. `build` makes one.

    documents, tokens: how many there are, held out ones included; origin: where the text came from; sha256: hex digest
    of the ids and of where the documents end; lengths: int64 [documents], in tokens; heldout: the numbers of the
    documents that `batch` never gives.
    """

    def __init__(self, folder: Path, origin: str, sha256: str, seed: int, heldout: int) -> None:
        self.origin, self.sha256 = origin, sha256
        self._ids = np.memmap(folder / _IDS, "<i4", "r")
        self._ends = np.memmap(folder / _ENDS, "<i8", "r")
        self.documents, self.tokens = len(self._ends), len(self._ids)
        self.lengths: NDArray[np.int64] = np.diff(np.asarray(self._ends), prepend=0)
        self._seed = seed
        self.heldout = self.split(seed, heldout)
        self._training = np.delete(np.arange(self.documents), self.heldout)
        self._epoch, self._order = -1, self._training

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, i: int) -> list[int]:
        """The token ids of document `i`, at least two."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        ids: list[int] = self._ids[self._ends[i] - self.lengths[i] : self._ends[i]].tolist()
        return ids

    def split(self, seed: int, tokens: int) -> list[int]:
        """The numbers of documents drawn until they hold `tokens` tokens, or a tenth of all if that is less.

        At least one is drawn and at least one is left. Sorted.
        """
        # A third number, for a seed's generator is the same with a zero behind it: that would be the first epoch's.
        drawn = np.random.default_rng([seed, 0, 1]).permutation(self.documents)
        held = self.lengths[drawn].cumsum()
        count = 1 + int(np.searchsorted(held, min(tokens, self.tokens / 10)))
        return sorted(drawn[: min(count, self.documents - 1)].tolist())

    def batch(self, place: Place, tokens: int) -> tuple[list[int], Place]:
        """The numbers of the next documents, until they hold `tokens` tokens or the epoch ends, and the place after.

        Never none: after the last document of an epoch comes the first of the next.
        """
        if place.index >= len(self._training):
            place = Place(place.epoch + 1)
        order = self._order_of(place.epoch)
        chosen: list[int] = []
        held = 0
        for i in order[place.index :]:
            chosen.append(int(i))
            held += int(self.lengths[i])
            if held >= tokens:
                break
        index = place.index + len(chosen)
        return chosen, Place(place.epoch + 1) if index == len(order) else Place(place.epoch, index)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._training)
        return self._order


def build(
    model_dir: Path, file: Path | None, length: int, seed: int, folder: Path, *, heldout: int = HELDOUT
) -> Corpus:
    """The corpus of `file`, else of the calibration set that the model ships, else of the built-in text.

    It is written to `folder` unless it is there. `length` is the most tokens of a document, `heldout` those that are
    kept out of training (see `Corpus.split`). Raises CalibrationError as `calibration.load` does and where there are
    fewer than two documents, SchemeError for a length below 2 or a negative seed, RunError where the disk is full.
    """
    if length < 2:
        raise SchemeError(f"length = {length}", "at least 2, a token and the one after it", "Raise --length")
    if seed < 0:
        raise SchemeError(f"seed = {seed}", "0 or more", "Choose another --seed")
    if file is None and (model_dir / SHIPPED).is_file():
        file = model_dir / SHIPPED
    wanted = key(model_dir, file, length)
    origin = "built-in: pydoc topics" if file is None else file.name
    sha256 = _finished(folder, wanted)
    if sha256 is None:
        documents = _documents(model_dir, file)
        try:
            sha256 = _write(folder, documents, length, wanted, str(file or origin))
        except OSError as error:
            raise RunError(
                f"the training text could not be written to {folder} ({error})",
                "a directory on a disk with room, 4 bytes a token",
                "Make room and run it again",
            ) from error
    return Corpus(folder, origin, sha256, seed, heldout)


# --- files ------------------------------------------------------------------------------------------------------------


def key(model_dir: Path, file: Path | None, length: int) -> str:
    """Hex digest of all that decides the ids: the text, how it is read, the length, the tokenizer."""
    parts: list[Any] = [_REVISION, length, calibration.vocabulary_size(model_dir)]
    if file is None:
        text = json.dumps([document.content for document in calibration.built_in()])
        parts.append(hashlib.sha256(text.encode()).hexdigest())
    else:
        parts += [_plain(file), _sha256(file)]
    for found in sorted({path for pattern in _TOKENIZER for path in model_dir.glob(pattern) if path.is_file()}):
        parts.append([found.name, _sha256(found)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sha256(*files: Path) -> str:
    """Hex digest of the bytes of `files`, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise _unreadable(file, error) from error
    return digest.hexdigest()


def _finished(folder: Path, key: str) -> str | None:
    """The sha256 of the corpus in `folder`; None where there is none of that key, or none that is whole."""
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        found: str = note["sha256"]
        whole = note["key"] == key and _sha256(folder / _IDS, folder / _ENDS) == found
    except (OSError, ValueError, TypeError, KeyError, CalibrationError):
        return None
    return found if whole else None


def _write(folder: Path, documents: Iterator[list[int]], length: int, key: str, source: str) -> str:
    """Write the three files; the sha256 of the first two.

    Each takes the place of what is there when it is finished: whoever has the old one mapped goes on reading it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in (_IDS, _ENDS, _NOTE)}
    count = total = 0
    with partial[_IDS].open("wb") as ids, partial[_ENDS].open("wb") as ends:
        for document in documents:
            for i in range(0, len(document), length):
                if len(window := document[i : i + length]) > 1:
                    ids.write(np.array(window, "<i4").tobytes())
                    total += len(window)
                    ends.write(np.array(total, "<i8").tobytes())
                    count += 1
    if count < 2:
        raise CalibrationError(
            f"training text {source}, which makes {count} documents of up to {length} tokens",
            "at least two, one of which is held out; a document has two tokens or more",
            "Give more text, or a smaller --length",
        )
    sha256 = _sha256(partial[_IDS], partial[_ENDS])
    note = {"key": key, "documents": count, "tokens": total, "length": length, "sha256": sha256}
    partial[_NOTE].write_text(json.dumps(note, indent=2) + "\n")
    for name, path in partial.items():  # the note last
        path.replace(folder / name)
    return sha256


# --- text -------------------------------------------------------------------------------------------------------------


def _documents(model_dir: Path, file: Path | None) -> Iterator[list[int]]:
    """The token ids of each document, one at a time; the tokenizer is loaded when the first of them needs it."""
    tokenizer = None
    vocabulary = calibration.vocabulary_size(model_dir)
    for document in calibration.built_in() if file is None else _read(file):
        if tokenizer is None and document.key != "input_ids":
            tokenizer = calibration.load_tokenizer(model_dir)
        known = vocabulary or (_LARGEST if tokenizer is None else len(tokenizer))
        yield calibration.encode(document, tokenizer, known)


def _plain(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _read(file: Path) -> Iterator[Document]:
    """What `calibration.load` reads of `file`, and the rest of it."""
    try:
        with file.open(encoding="utf-8-sig") as opened:
            if not _plain(file):
                found = (
                    calibration.parse(line, f"{file}:{number}")
                    for number, line in calibration.lines(opened, file, calibration.WHOLE)
                )
                yield from (document for document in found if document.key != "text" or document.content.strip())
            elif len(text := opened.read(calibration.WHOLE + 1)) <= calibration.WHOLE:
                yield from [Document(file.name, "text", text)] if text.strip() else []
            else:
                opened.seek(0)
                for _, text in calibration.stretches(opened):
                    if text.strip():
                        yield Document(file.name, "text", text)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"training text {file}: {error}", f"{ALLOWED}, in UTF-8", "Save it as UTF-8") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> CalibrationError:
    return CalibrationError(f"training text {file}: {error}", ALLOWED, "Check the path")
