"""Calibration sets: every kind of file, everything that can be wrong with one, and the draw that stays as it was."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from quantize import calibration
from quantize.calibration import draw, load
from quantize.errors import CalibrationError
from quantize.recipe import Recipe
from quantize.sequences import batches

SMALL = Recipe(samples=4, length=8)
DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def chat(model: Path, tmp_path: Path) -> Path:
    """The model with a chat template that insists on a user first."""
    made = copy_of(model, tmp_path / "chat")
    settings = json.loads((made / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def copy_of(path: Path, to: Path, leave: str = "") -> Path:
    to.mkdir()
    for file in path.iterdir():
        if not leave or not file.name.startswith(leave):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def written(path: Path, content: str | bytes | list[Any]) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(line) + "\n" for line in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tokens(model: Path, text: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    return tuple(AutoTokenizer.from_pretrained(model)(text)["input_ids"])


# What is drawn


@pytest.mark.parametrize(
    ("shipped", "sequences", "sha256"), [(True, 256, "26667d1bccbb"), (False, 138, "914993d84cb0")]
)
def test_the_draw_is_what_it_has_always_been(
    shipped: bool, sequences: int, sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes are those of the first version: checkpoints made with it are still those of their keys.

    The built-in text is the interpreter's, so its hash holds for one version of Python only.
    """
    if not shipped:
        monkeypatch.setattr(calibration, "SHIPPED", "absent")
    found = load(DEMO, Recipe())
    if not shipped and (len(found.sequences), found.sha256()[:12]) != (sequences, sha256):
        from pydoc_data.topics import topics

        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        documents = [tokenizer(topics[name])["input_ids"] for name in sorted(topics)]
        assert found.sequences == draw(documents, Recipe())
        return
    assert (len(found.sequences), found.sha256()[:12]) == (sequences, sha256)


def test_token_ids_are_taken_as_they_are(model: Path, tmp_path: Path) -> None:
    """Nothing before, nothing after; longer ones are cut at the length that was asked for, and nowhere else."""
    lines = [{"input_ids": [5, 6, 7]}, {"input_ids": list(range(20))}, {"input_ids": []}]
    found = load(model, SMALL, written(tmp_path / "a.jsonl", lines)).sequences
    assert sorted(found) == sorted([(5, 6, 7), tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))])


def test_token_ids_need_no_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = copy_of(model, tmp_path / "bare", leave="tokenizer")
    ids = written(tmp_path / "ids.jsonl", [{"input_ids": list(range(8))}])
    assert load(bare, SMALL, ids).sequences == (tuple(range(8)),)
    mixed = written(tmp_path / "mixed.jsonl", [{"input_ids": list(range(8))}, {"text": "abc"}])
    with pytest.raises(CalibrationError, match=r"without a tokenizer.*Allowed: .*input_ids.*--method rtn"):
        load(bare, SMALL, mixed)


def test_the_vocabulary_is_the_models(model: Path, tmp_path: Path) -> None:
    """Embeddings are often padded beyond the tokenizer's words, and an id there can be looked up."""
    padded = copy_of(model, tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    ids = written(tmp_path / "ids.jsonl", [{"input_ids": [299] * 8}])
    assert load(padded, SMALL, ids).sequences == ((299,) * 8,)
    with pytest.raises(CalibrationError, match="ids.jsonl:1: input_ids with 299, .* vocabulary of 257"):
        load(model, SMALL, ids)
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(CalibrationError, match="a.txt, in which the tokenizer finds the token .*below .* 60"):
        load(padded, SMALL, written(tmp_path / "a.txt", "abcdefghi"))


def test_conversations_go_through_the_template(chat: Path, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}]
    found = load(chat, Recipe(length=25), written(tmp_path / "a.jsonl", lines)).sequences
    assert found == (tokens(chat, "[user]hello[assistant]yes"),)


def test_a_null_text_is_no_text(model: Path, tmp_path: Path) -> None:
    line = {"text": None, "input_ids": list(range(8))}
    assert load(model, SMALL, written(tmp_path / "a.jsonl", [line])).sequences == (tuple(range(8)),)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_marks_and_line_ends_of_windows_are_no_text(model: Path, tmp_path: Path, name: str) -> None:
    text = 'one\r\ntwo\r\n' if name == "a.txt" else '{"text": "one two"}\r\n\r\n{"text": "three"}\r\n'  # fmt: skip
    plain = load(model, SMALL, written(tmp_path / name, text.replace("\r\n", "\n"))).sequences
    windows = load(model, SMALL, written(tmp_path / name, b"\xef\xbb\xbf" + text.encode())).sequences
    assert windows == plain


def test_a_line_ends_where_json_says_it_does(model: Path, tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line to Python's splitlines, and stand inside a string to JSON."""
    text = "one\u2028two\u0085three"
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    assert load(model, Recipe(length=16), written(tmp_path / "a.jsonl", line)).sequences[0] == tokens(model, text)[:16]


def test_blank_texts_are_left_out(model: Path, tmp_path: Path) -> None:
    lines = [{"text": ""}, {"text": " \n\t"}, {"text": "something"}]
    found = load(model, SMALL, written(tmp_path / "a.jsonl", lines)).sequences
    assert sorted(found) == sorted([tokens(model, "something")[:8], tokens(model, "something")[8:]])


# A file that is larger than what is kept of it


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 1,024 characters were much; 16 x 4 x 8 are wanted."""
    monkeypatch.setattr(calibration, "WHOLE", 1024)
    monkeypatch.setattr(calibration, "_STRETCH", 64)


@pytest.mark.usefixtures("narrow")
def test_a_large_file_is_sampled_by_seed_and_all_of_it_has_a_chance(model: Path, tmp_path: Path) -> None:
    lines = [{"input_ids": [i % 257, i // 257, *[9] * 14]} for i in range(2000)]
    file = written(tmp_path / "a.jsonl", lines)
    found = [load(model, Recipe(samples=4, length=16, seed=seed), file) for seed in (0, 0, *range(1, 40))]
    assert found[0] == found[1] != found[2]
    assert re.fullmatch(r"a\.jsonl, \d+ of 2000 parts", found[0].origin)
    drawn = {ids[0] + 257 * ids[1] for each in found for ids in each.sequences}
    assert all(len(each.sequences) == 4 for each in found)
    assert min(drawn) < 200 and max(drawn) > 1800 and len(drawn) > 120


@pytest.mark.usefixtures("narrow")
def test_stretches_of_a_large_text_stand_in_it(model: Path, tmp_path: Path) -> None:
    words = random.Random(0)
    text = "\n".join("".join(words.choices("abcdefghij", k=words.randint(0, 90))) for _ in range(400))
    found = load(model, Recipe(samples=4, length=16), written(tmp_path / "a.txt", text))
    assert re.fullmatch(r"a\.txt, \d+ of \d+ parts", found.origin)
    whole = ",".join(map(str, tokens(model, text)))
    assert all(",".join(map(str, ids)) in whole for ids in found.sequences)


@pytest.mark.usefixtures("narrow")
def test_of_a_large_file_no_more_is_tokenized_than_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    encode = calibration.encode

    def counting(document: Any, *arguments: Any) -> list[int]:
        nonlocal seen
        seen += len(document.content)
        return encode(document, *arguments)

    monkeypatch.setattr(calibration, "encode", counting)
    load(model, SMALL, written(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(5000)]))
    assert 200 < seen <= 1024
    seen = 0
    load(model, SMALL, written(tmp_path / "a.txt", "ab\n" * 50_000))
    assert 200 < seen <= 1024


@pytest.mark.usefixtures("narrow")
def test_a_file_that_fits_is_not_sampled(model: Path, tmp_path: Path) -> None:
    text = "".join(f"{i} " for i in range(180))
    ids = list(tokens(model, text))
    found = load(model, Recipe(samples=99, length=8), written(tmp_path / "a.txt", text))
    assert found.origin == "a.txt" and found.sequences == draw([ids], Recipe(samples=99, length=8))


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "given", "allowed", "remedy"),
    [
        ("a.txt", "", "a.txt is empty", "a .txt file, or", "Give some text"),
        ("a.jsonl", "", "a.jsonl is empty", "a .txt file, or", "Give some text"),
        ("a.txt", " \n\t\n", "a.txt holds nothing but white space", "a .txt file, or", "Give some text"),
        ("a.jsonl", "\n \r\n\n", "a.jsonl is empty", "a .txt file, or", "Give some text"),
        ("a.jsonl", '{"text": " "}\n', "holds nothing but white space", "a .txt file, or", "Give some text"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "a.jsonl:2, the last line, which may be cut short, is not JSON",
         '{"text": ...}', "Correct the line"),
        ("a.jsonl", '{"text": \n{"text": "two"}\n', "a.jsonl:1 is not JSON", '{"text": ...}', "Correct the line"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1 is not JSON", '{"text": ...}', "Correct the line"),
        ("a.txt", b"caf\xe9 au lait", "can't decode byte 0xe9", "in UTF-8", "Save it as UTF-8"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "can't decode byte 0xff", "in UTF-8", "Save it as UTF-8"),
        ("a.jsonl", '{"text": "one"}\n{"text": "\\ud800"}\n', "a.jsonl:2, which cannot be encoded", "Unicode",
         "Correct the line"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1 is a list", '{"text": ...}', "Correct the line"),
        ("a.jsonl", '{"txt": "x"}\n', "a.jsonl:1 has none of the three keys", '{"text": ...}', "Correct the line"),
        ("a.jsonl", '{"text": null}\n', "a.jsonl:1 has none of the three keys", '{"text": ...}', "Correct the line"),
        ("a.jsonl", '{"text": 5}\n', "a.jsonl:1: a text that is a int", '{"text": ...}', "Correct the line"),
        ("a.jsonl", '{"input_ids": [1, 257]}\n', "a.jsonl:1: input_ids with 257, which is no id in a vocabulary of 257",
         "one list of this model's token ids a line", "Encode the text with this model's tokenizer"),
        ("a.jsonl", '{"input_ids": [-1]}\n', "with -1,", "one list", "Encode the text"),
        ("a.jsonl", '{"input_ids": [1.0]}\n', "with 1.0,", "one list", "Encode the text"),
        ("a.jsonl", '{"input_ids": [true]}\n', "with True,", "one list", "Encode the text"),
        ("a.jsonl", '{"input_ids": [[1, 2]]}\n', "with [1, 2],", "one list", "Encode the text"),
        ("a.jsonl", '{"input_ids": 7}\n', "with int,", "one list", "Encode the text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "a.jsonl:1 has messages, and the model's "
         "tokenizer has no chat template", '{"text": ...} or {"input_ids": ...}', "Write the conversations as text"),
        ("a.txt", "short", "a calibration set of 5 tokens", "at least --length, 8", "Give more text, or a smaller"),
        ("absent.jsonl", None, "absent.jsonl: [Errno 2]", "a .txt file, or", "Check the path"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(
    model: Path, tmp_path: Path, name: str, content: str | bytes | None, given: str, allowed: str, remedy: str
) -> None:
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(CalibrationError) as refused:
        load(model, SMALL, tmp_path / name)
    error = refused.value
    assert given in error.given and allowed in error.allowed and remedy in error.remedy and error.exit_code == 2


@pytest.mark.parametrize(
    ("messages", "given"),
    [
        ("hello", "are no list of messages"),
        (["hello"], "are no list of messages"),
        ([{"content": "hello"}], "are no list of messages"),
        ([{"role": "assistant", "content": "hello"}], r"the chat template refuses \(the user speaks first\)"),
        ([], "the chat template refuses"),
    ],
)
def test_messages_that_the_template_cannot_take(chat: Path, tmp_path: Path, messages: Any, given: str) -> None:
    file = written(tmp_path / "a.jsonl", [{"text": "fine"}, {"messages": messages}])
    with pytest.raises(CalibrationError, match=rf"a\.jsonl:2: messages that {given}"):
        load(chat, SMALL, file)


@pytest.mark.usefixtures("narrow")
def test_a_line_beyond_all_measure_is_not_read_to_its_end(model: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [{"text": "x" * 5000}])
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1, a line of more than 1,024 .*one document a line"):
        load(model, SMALL, file)


# Batches


def test_batches_are_the_same_whatever_order_the_sequences_come_in() -> None:
    numbers = random.Random(1)
    sequences = [[numbers.randrange(99) for _ in range(numbers.randint(1, 300))] for _ in range(200)]
    shuffled = numbers.sample(sequences, len(sequences))
    one, other = ([(b.ids.tolist(), b.real.tolist()) for b in batches(s)] for s in (sequences, shuffled))
    assert one == other
    back = sorted(ids[: sum(real)] for batch in one for ids, real in zip(*batch, strict=True))
    assert back == sorted(sequences)


def test_sequences_of_one_length_have_no_padding() -> None:
    made = batches([[i] * 512 for i in range(128)])
    assert [tuple(batch.ids.shape) for batch in made] == [(2, 512)] * 64
    assert all(bool(batch.real.all()) for batch in made)


def test_sorting_by_length_leaves_little_padding() -> None:
    numbers = random.Random(2)
    sequences = [[1] * numbers.randint(16, 512) for _ in range(400)]
    places = sum(batch.ids.numel() for batch in batches(sequences))
    assert places < 1.1 * sum(map(len, sequences))
    assert all(batch.ids.numel() <= 1024 for batch in batches(sequences))
    assert [tuple(b.ids.shape) for b in batches([[1] * 5000, [2] * 5000])] == [(1, 5000)] * 2
