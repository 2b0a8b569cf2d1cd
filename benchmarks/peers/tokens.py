"""What every tool is calibrated on, and what every result is judged by: token sequences, made once, kept apart.

Calibration: `samples` windows of exactly `length` tokens, for several tools refuse or cut unequal ones. Documents come
in the order in which `quantize.calibration` draws them, each only once, and are joined end to end. Judged are `windows`
more of the same kind from the documents after those, and, where the model has a heldout.jsonl, each of its
conversations as one sequence, as a server sees it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.calibration import load
from quantize.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
HELDOUT = "heldout.jsonl"


@dataclass(frozen=True)
class Tokens:
    """`calibration`, and the sequences to judge by, in `parts` by name."""

    calibration: tuple[tuple[int, ...], ...]
    parts: dict[str, tuple[tuple[int, ...], ...]]

    def sha256(self) -> str:
        """Hex digest of all of it."""
        return hashlib.sha256(json.dumps([self.calibration, self.parts]).encode()).hexdigest()


def make(model: Path, text: Path | None, samples: int, length: int, windows: int, seed: int) -> Tokens:
    """The tokens for `model` from the documents in `text`, or from its own or the built-in ones."""
    drawn = load(model, Recipe(method="awq", samples=10**9, length=length, seed=seed), text).sequences
    flow = iter(dict.fromkeys(drawn))  # a document that came twice would be judged by what calibrated
    parts = {}
    calibration = _windows(flow, samples, length)
    if windows:
        parts["windows"] = _windows(flow, windows, length)
    if (model / HELDOUT).is_file():
        parts["conversations"] = _conversations(model)
    return Tokens(calibration, parts)


def demo_text(out: Path, tokens: int, seed: int) -> Path:
    """Conversations of the demo model's tasks, on the training side of their split, for at least `tokens` tokens."""
    sys.path.insert(0, str(ROOT / "tools"))
    import demo_tasks
    from demo_model import conversation

    shortest = 20  # tokens of a conversation, about: the average is twice that
    examples = itertools.islice(demo_tasks.stream("train", seed), tokens // shortest)
    out.write_text("".join(json.dumps({"text": conversation(example)}) + "\n" for example in examples))
    return out


def write(path: Path, sequences: Iterable[Sequence[int]]) -> None:
    """A jsonl of {"input_ids": [...]}."""
    path.write_text("".join(json.dumps({"input_ids": list(ids)}) + "\n" for ids in sequences))


def _windows(flow: Iterator[tuple[int, ...]], count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """The next `count` windows of documents joined end to end; what is left of the last document is dropped."""
    joined: list[int] = []
    while len(joined) < count * length:
        document = next(flow, None)
        if document is None:
            raise SystemExit(f"the text ends {count * length - len(joined)} tokens too early: give more with --text")
        joined += document
    return tuple(tuple(joined[at * length : (at + 1) * length]) for at in range(count))


def _conversations(model: Path) -> tuple[tuple[int, ...], ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = []
    for line in map(json.loads, (model / HELDOUT).read_text().splitlines()):
        turns = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["answer"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        made.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return tuple(made)
