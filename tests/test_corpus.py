"""The training text: what is in it, what of it is held out, the order it comes in, and when it is made again."""

import hashlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model

from quantize import calibration
from quantize.corpus import Corpus, Place, build
from quantize.errors import CalibrationError, QuantizeError, RunError, SchemeError
from quantize.recipe import Recipe

DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo-model"
SEED = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte tokenizer and a chat template."""
    path = tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def made(model: Path, tmp_path: Path) -> Callable[..., Corpus]:
    """A corpus of lists of ids, or of the text of a file of that name."""

    def make(content: Any, name: str = "a.jsonl", length: int = 1000, seed: int = SEED, **options: int) -> Corpus:
        if isinstance(content, list):
            content = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return build(model, tmp_path / name, length, seed, tmp_path / "corpus", **options)

    return make


def lists(sizes: list[int]) -> list[list[int]]:
    """Documents of those sizes, of which no two are alike."""
    return [[size % 257, *(j % 257 for j in range(i, i + size - 1))] for i, size in enumerate(sizes)]


# What is in it


@pytest.mark.parametrize("shipped", [True, False])
def test_the_default_texts_are_those_of_a_calibration_that_leaves_none_out(
    shipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shipped:
        monkeypatch.setattr(calibration, "SHIPPED", "absent")
        monkeypatch.setattr("quantize.corpus.SHIPPED", "absent")
    found = build(DEMO, None, 64, SEED, tmp_path)
    wanted = calibration.load(DEMO, Recipe(samples=100_000, length=64))
    assert sorted(map(tuple, found)) == sorted(ids for ids in wanted.sequences if len(ids) > 1)
    assert found.origin == wanted.origin
    assert (len(found), found.tokens) == (found.documents, sum(len(ids) for ids in found))


LINES = [
    {"text": "the first one"},
    {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]},
    {"text": " \n \t"},
    {"input_ids": [7, 256, 0]},
    {"text": "w\u00f6rter\u2028am Ende"},
]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_each_kind_of_line_is_read_as_calibration_reads_it_and_in_the_files_order(
    made: Callable[..., Corpus], model: Path, tmp_path: Path, ends: str
) -> None:
    text = ends.join(json.dumps(line, ensure_ascii=False) for line in LINES)
    found = list(made(b"\xef\xbb\xbf" + text.encode()))
    wanted = calibration.load(model, Recipe(samples=9, length=30), tmp_path / "a.jsonl").sequences
    assert sorted(map(tuple, found)) == sorted(wanted)
    assert [len(ids) for ids in found] == [13, 23, 3, 17] and found[2] == [7, 256, 0]


def test_long_documents_are_cut_into_windows_and_single_tokens_left_out(made: Callable[..., Corpus]) -> None:
    found = made([[9], list(range(10)), [], list(range(20, 29)), [5, 6]], length=4)
    assert list(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [20, 21, 22, 23], [24, 25, 26, 27], [5, 6]]
    assert found.lengths.tolist() == [4, 4, 2, 4, 4, 2]
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            found[outside]


def test_the_files_are_what_they_are_said_to_be(made: Callable[..., Corpus], tmp_path: Path) -> None:
    found = made([[1, 2, 256], [4, 5]])
    ids, ends = struct.pack("<5i", 1, 2, 256, 4, 5), struct.pack("<2q", 3, 5)
    assert (tmp_path / "corpus" / "corpus.ids").read_bytes() == ids
    assert (tmp_path / "corpus" / "corpus.ends").read_bytes() == ends
    assert found.sha256 == hashlib.sha256(ids + ends).hexdigest()
    note = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert (note["documents"], note["tokens"], note["length"], note["sha256"]) == (2, 5, 1000, found.sha256)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "corpus.ends", "corpus.ids", "corpus.json"
    ]  # fmt: skip
    assert made([[1, 2], [256, 4, 5]]).sha256 != found.sha256


def test_a_text_is_one_document_until_it_is_too_large_and_then_nothing_of_it_is_lost(
    made: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = random.Random(0)
    text = "\n".join("".join(words.choices("abcdefghij", k=words.randint(2, 60))) for _ in range(60))
    whole = [i for ids in made(b"\xef\xbb\xbf" + text.encode(), "a.txt", length=100) for i in ids]
    found = made(text, "b.txt", length=100)
    assert [i for ids in found for i in ids] == whole and found.lengths.tolist()[:-1] == [100] * (len(found) - 1)
    monkeypatch.setattr(calibration, "WHOLE", 1024)
    monkeypatch.setattr(calibration, "_STRETCH", 64)
    parts = made(b"\xef\xbb\xbf" + text.encode(), "c.txt", length=1000)
    assert [i for ids in parts for i in ids] == whole
    newline = next(iter(set(whole) - set(made("abcdefghij" * 9, "d.txt", length=10)[0])))
    assert len(parts) > 20 and all(ids[-1] == newline for ids in list(parts)[:-1])


def test_memory_stays_bounded(made: Callable[..., Corpus], model: Path, tmp_path: Path) -> None:
    made(lists([9, 9]))  # imports
    with (tmp_path / "large.jsonl").open("w") as file:
        for i in range(400):
            file.write(json.dumps({"input_ids": [i % 257] * 5000}) + "\n")
    size = (tmp_path / "large.jsonl").stat().st_size
    tracemalloc.start()
    try:
        found = build(model, tmp_path / "large.jsonl", 512, SEED, tmp_path / "large")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tokens == 2_000_000 and peak < 3 * 2**20 < size / 2


# The order


def test_an_epoch_gives_every_document_but_the_held_out_ones_once_in_the_order_of_its_seed(
    made: Callable[..., Corpus],
) -> None:
    sizes = random.Random(1).choices(range(2, 60), k=300)
    found = made(lists(sizes))
    training = [i for i in range(300) if i not in found.heldout]
    place, epochs = Place(), []
    for epoch in range(3):
        order: list[int] = []
        while place.epoch == epoch:
            chosen, after = found.batch(place, 100)
            held = [sizes[i] for i in chosen]
            assert sum(held) >= 100 > sum(held[:-1]) or after == Place(epoch + 1, 0)
            assert after in (Place(epoch, place.index + len(chosen)), Place(epoch + 1, 0))
            order, place = order + chosen, after
        assert order == np.random.default_rng([SEED, epoch]).permutation(training).tolist()
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2] and sorted(epochs[1]) == training


def test_a_place_is_plain_numbers_and_training_goes_on_from_it(made: Callable[..., Corpus]) -> None:
    documents = lists([2, 3, 4, 5] * 20)
    one, place, seen = made(documents), Place(), []
    for _ in range(40):
        seen.append(one.batch(place, 17))
        place = seen[-1][1]
    for _, stored in (seen[3], seen[20], seen[39]):
        text = json.dumps(asdict(stored))
        other = made(documents)
        assert other.batch(Place(**json.loads(text)), 17) == one.batch(stored, 17)
    assert seen == [one.batch(before, 17) for before in [Place(), *(after for _, after in seen[:-1])]]
    assert json.dumps([chosen for chosen, _ in seen])  # plain numbers as well


def test_a_batch_is_never_empty(made: Callable[..., Corpus]) -> None:
    found = made(lists([5, 6, 7]))
    chosen, after = found.batch(Place(4, 2), 10**9)
    assert sorted(chosen) == [i for i in range(3) if i not in found.heldout] and after == Place(6, 0)
    assert len(found.batch(Place(), 1)[0]) == 1


# What is held out


def test_documents_are_held_out_up_to_a_tenth_or_what_is_asked_for(made: Callable[..., Corpus]) -> None:
    sizes = random.Random(2).choices(range(2, 60), k=300)
    found = made(lists(sizes), heldout=200)
    tenth, few, one = found.split(SEED, 10**9), found.split(SEED, 200), found.split(SEED, 1)
    total = sum(sizes)
    assert total / 10 <= sum(sizes[i] for i in tenth) < total / 10 + 60
    assert 200 <= sum(sizes[i] for i in few) < 260
    assert set(one) < set(few) < set(tenth) and len(one) == 1
    assert found.heldout == few and few == sorted(few)
    assert not set(few) & {i for epoch in range(3) for i in found.batch(Place(epoch), 10**9)[0]}
    assert found.split(SEED + 1, 200) != few


def test_what_is_held_out_has_nothing_to_do_with_the_first_epochs_order(made: Callable[..., Corpus]) -> None:
    """Numpy takes the seeds [s] and [s, 0] for one."""
    found = made(lists([5] * 400), seed=0)
    for epoch in range(3):
        drawn = np.random.default_rng([0, epoch]).permutation(400)[: len(found.heldout)]
        assert len(set(drawn.tolist()) & set(found.heldout)) < len(found.heldout) / 2


def test_of_two_documents_one_is_held_out(made: Callable[..., Corpus]) -> None:
    for sizes in ([2, 900], [900, 2]):
        found = made(lists(sizes))
        assert len(found.heldout) == 1 and found.batch(Place(), 5) == ([1 - found.heldout[0]], Place(1, 0))


# When it is made again


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which documents were encoded."""
    seen: list[str] = []
    encode = calibration.encode

    def counting(document: Any, *arguments: Any) -> list[int]:
        seen.append(document.where)
        return encode(document, *arguments)

    monkeypatch.setattr(calibration, "encode", counting)
    return seen


def test_it_is_made_once(made: Callable[..., Corpus], encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], calibration.load_tokenizer
    monkeypatch.setattr(calibration, "load_tokenizer", lambda path: loaded.append(path) or load(path))
    first = made('{"text": "one"}\n{"text": "two"}\n')
    assert len(encoded) == 2 and len(loaded) == 1
    again = made('{"text": "one"}\n{"text": "two"}\n', "renamed.jsonl", seed=77)
    assert len(encoded) == 2 and list(again) == list(first) and again.sha256 == first.sha256
    assert (first.origin, again.origin) == ("a.jsonl", "renamed.jsonl")


def test_another_text_length_or_tokenizer_makes_another(model: Path, tmp_path: Path, encoded: list[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    file, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    for path in (file, plain):
        path.write_text('{"text": "one"}\n{"text": "two"}\n')
    before = (model, file, 20)
    for model_dir, text, length in ((model, file, 10), (model, plain, 20), (other, file, 20)):
        if model_dir == other:
            (other / "tokenizer_config.json").write_text(
                (other / "tokenizer_config.json").read_text().replace("[{{", "({{")
            )
        for changed in (before, (model_dir, text, length)):
            count = len(encoded)
            build(*changed, SEED, tmp_path / "corpus")
            assert len(encoded) > count or changed == before
    count = len(encoded)
    file.write_text('{"text": "one"}\n{"text": "twO"}\n')
    assert len(build(*before, SEED, tmp_path / "corpus")[1]) == 3 and len(encoded) == count + 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["corpus.ids", "corpus.ends", "corpus.json"])
@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
def test_a_damaged_one_is_made_again(
    made: Callable[..., Corpus], tmp_path: Path, encoded: list[str], name: str, damage: Callable[[Path], None]
) -> None:
    documents = lists([5, 6, 7])
    made(documents)
    damage(tmp_path / "corpus" / name)
    assert list(made(documents)) == documents and len(encoded) == 6
    assert list(made(documents)) == documents and len(encoded) == 6


def test_one_that_fails_leaves_the_one_before(made: Callable[..., Corpus], encoded: list[str]) -> None:
    documents = lists([5, 6, 7])
    before = made(documents)
    with pytest.raises(CalibrationError, match=r"b\.jsonl:3 is not JSON"):
        made('{"input_ids": [1, 2]}\n' * 2 + "oh\n", "b.jsonl")
    count = len(encoded)
    assert list(made(documents)) == documents and len(encoded) == count
    assert made(lists([50] * 9), "c.jsonl").tokens == 450
    assert list(before) == documents  # what it had mapped is still there


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "given"),
    [
        ("a.jsonl", "", r"a\.jsonl, which makes 0 documents of up to 8 tokens"),
        ("a.txt", " \n\t", r"a\.txt, which makes 0 documents of up to 8 tokens"),
        ("a.txt", "short", r"a\.txt, which makes 1 documents .* one of which is held out.* smaller --length"),
        ("a.jsonl", '{"input_ids": [1]}\n{"input_ids": [1, 2]}\n', r"a\.jsonl, which makes 1 documents"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', r"a\.jsonl:2, the last line, which may be cut short, is not JSON"),
        ("a.jsonl", '{"input_ids": [1, 2]}\n{"input_ids": [1, 257]}\n', r"a\.jsonl:2: input_ids with 257"),
        ("a.jsonl", '{"messages": "x"}\n', r"a\.jsonl:1: messages that are no list"),
        ("a.jsonl", '{"text": "one"}\n{"text": "\\ud800"}\n', r"a\.jsonl:2, which cannot be encoded"),
        ("a.txt", b"caf\xe9 au lait", r"training text .*a\.txt: .*can't decode byte 0xe9.*in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(
    made: Callable[..., Corpus], name: str, content: str | bytes, given: str
) -> None:
    with pytest.raises(CalibrationError, match=given) as refused:
        made(content, name, length=8)
    assert refused.value.exit_code == 2


def test_a_text_that_is_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"training text .*absent\.txt: .*Check the path"):
        build(model, tmp_path / "absent.txt", 8, SEED, tmp_path / "corpus")


def test_ids_need_no_tokenizer_and_fit_32_bits(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"input_ids": [1, {2**31 - 1}]}}\n' * 2)
    assert list(build(tmp_path / "bare", file, 8, SEED, tmp_path / "corpus")) == [[1, 2**31 - 1]] * 2
    file.write_text(f'{{"input_ids": [1, {2**31}]}}\n' * 2)
    with pytest.raises(CalibrationError, match="which is no id"):
        build(tmp_path / "bare", file, 8, SEED, tmp_path / "corpus")
    file.write_text('{"text": "one"}\n')
    with pytest.raises(CalibrationError, match="without a tokenizer"):
        build(tmp_path / "bare", file, 8, SEED, tmp_path / "corpus")


@pytest.mark.parametrize(
    ("changes", "kind", "given"),
    [({"length": 1}, SchemeError, "length = 1"), ({"seed": -1}, SchemeError, "seed = -1")],
)
def test_numbers_out_of_range(
    made: Callable[..., Corpus], changes: dict[str, int], kind: type[QuantizeError], given: str
) -> None:
    with pytest.raises(kind, match=given):
        made(lists([5, 6]), **changes)


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n' * 2)
    (tmp_path / "corpus").write_text("a file")
    with pytest.raises(RunError, match="could not be written"):
        build(model, tmp_path / "a.jsonl", 8, SEED, tmp_path / "corpus")
