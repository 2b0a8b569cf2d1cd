"""Prompts from files: each format is read, what does not fit is named with file and line, nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.load import dataset
from harness.load.dataset import Item, Prompt, chosen, longest_tokens, read_dataset, tokenize_dataset

FORMATS = {
    "sharegpt.json": json.dumps(
        [
            {"id": "a", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
            {"id": "b", "conversations": [{"from": "gpt", "value": "Nobody asked."}]},
            {"id": "c", "conversations": []},
            {
                "id": "d",
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "human", "value": "Why?"},
                    {"from": "human", "value": "Well?"},
                ],
            },
        ]
    ),
    "prompts.jsonl": '{"prompt": "Hi?", "output_tokens": 12}\n\n{"text": "Why?", "completion": "So."}\n',
    "messages.jsonl": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}, {"type": "image_url"}]},
                      {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More."}]}
    ),
    "table.csv": '\ufeffid,prompt,output_tokens\n1,"Hi,\nyou?",12\n2,Why?,\n',
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("sharegpt.json", [Item("Hi?", "Hello."), Item("Be short.\n\nWhy?")]),
        ("prompts.jsonl", [Item("Hi?", None, 12), Item("Why?", "So.")]),
        ("messages.jsonl", [Item("Hi?", "Hello.")]),
        ("table.csv", [Item("Hi,\nyou?", None, 12), Item("Why?")]),
    ],
)
def test_each_format_is_read(tmp_path: Path, name: str, items: list[Item]) -> None:
    path = tmp_path / name
    path.write_text(FORMATS[name], encoding="utf-8")
    assert list(read_dataset(path)) == items


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("d.txt", b"hello", ".txt"),
        ("d.json", b'[{"prompt": "a"},', "no readable JSON"),
        ("d.json", b'{"prompt": "a"}', "holds no list"),
        ("d.json", b'{"prompt": "a"}\n{"prompt": "b"}', ".jsonl"),
        ("d.json", b"[]", "holds no prompt"),
        ("d.json", b'[{"prompt": "a"}, 7]', "record 2: is no object"),
        ("d.json", b'[{"conversations": "x"}]', "record 1: conversations is 'x'"),
        ("d.json", b'[{"conversations": [{"from": "human", "value": 7}]}]', "record 1: conversations: value is 7"),
        ("d.json", b"[" * 100_000, "nested too deeply"),
        ("d.json", b"[" + b"9" * 5000 + b"]", "no readable JSON"),
        ("d.jsonl", b'{"prompt": "a"}\n{"prompt": ""}', "line 2: prompt is ''"),
        ("d.jsonl", b'{"prompt": "a"}\n\n{"question": "b"}', "line 3: text is None"),
        ("d.jsonl", b'{"prompt": "a"}\nhello', "line 2: no readable JSON"),
        ("d.jsonl", b'{"prompt": "a", "output_tokens": 0}', "line 1: output_tokens is 0"),
        ("d.jsonl", b'{"prompt": "a", "output_tokens": true}', "line 1: output_tokens is True"),
        ("d.jsonl", b'{"prompt": "a", "completion": 3}', "line 1: completion is 3"),
        ("d.jsonl", b'{"prompt": "\xff"}', "is not UTF-8"),
        ("d.jsonl", "hello".encode("utf-16"), "is not UTF-8"),
        ("d.csv", b"question,answer\na,b\n", "line 1: no column prompt among question, answer"),
        ("d.csv", b"prompt,output_tokens\na,b\n", "line 2: output_tokens is 'b'"),
        ("d.csv", b"prompt,output_tokens\n", "holds no prompt"),
        ("d.csv", b"", "line 1: no column prompt"),
        ("d.csv", b"prompt\n" + b"x" * 200_000 + b"\n", "field larger"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, named: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_dataset(path)
    assert f"dataset {name}" in str(caught.value) and named in str(caught.value)


def test_a_file_that_is_too_large_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with pytest.raises(InputError, match=r"d\.jsonl: cannot be read"):
        read_dataset(path)
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # a hole: it takes no room on the disk
    with pytest.raises(InputError, match=r"3\.0 GiB\nAllowed: up to 1 GiB"):
        read_dataset(path)


def test_half_a_character_is_made_whole(tmp_path: Path) -> None:
    """JSON can spell a lone surrogate; no request body and no tokenizer can carry it."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a \\ud83d b"}')
    (item,) = read_dataset(path)
    assert item.prompt == "a ? b"


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for count in (1, 2):
        path.write_text('{"prompt": "a"}\n' * count)
        assert len(read_dataset(path)) == count


# --- tokens -----------------------------------------------------------------------------------------------------------


def words(text: str) -> list[int]:
    """A token of each word."""
    return [len(word) for word in text.split()]


ITEMS = (Item("one four", "a b c"), Item("three", output_tokens=9), Item("a b c d e f"), Item("  "))


def test_ids_and_lengths_where_a_tokenizer_can_tell_them() -> None:
    prompts = tokenize_dataset(ITEMS, words)
    assert prompts.items == (
        Prompt("one four", (3, 4), 3),
        Prompt("three", (5,), 9),
        Prompt("a b c d e f", (1, 1, 1, 1, 1, 1), None),
    )
    assert prompts.left_out == 1, "a prompt of no tokens cannot be sent"


def test_text_and_given_lengths_where_none_can() -> None:
    prompts = tokenize_dataset(ITEMS[:3], None, context=1)
    assert [(item.ids, item.output_tokens) for item in prompts.items] == [(None, None), (None, 9), (None, None)]


def test_what_has_no_room_is_left_out_and_counted() -> None:
    """2 + 3, 1 + 9 and 6 + an unknown answer of up to 5: 10 tokens hold the first two."""
    prompts = tokenize_dataset(ITEMS[:3], words, context=10, longest_answer=5)
    assert [item.text for item in prompts.items] == ["one four", "three"] and prompts.left_out == 1
    assert tokenize_dataset(ITEMS[:3], words, context=11, longest_answer=5).left_out == 0
    with pytest.raises(InputError, match="none of the 3 prompts"):
        tokenize_dataset(ITEMS[:3], words, context=4)


def test_of_a_large_file_a_sample_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_PROMPTS", 50)
    asked: list[str] = []

    def tokenize(text: str) -> list[int]:
        asked.append(text)
        return [1]

    items = [Item(str(number)) for number in range(1000)]
    prompts = tokenize_dataset(items, tokenize, seed=3)
    assert len(asked) == len(set(asked)) == len(prompts.items) == 50 and prompts.left_out == 950
    assert prompts == tokenize_dataset(items, tokenize, seed=3)
    assert prompts != tokenize_dataset(items, tokenize, seed=4)


def test_the_longest_entry_is_bounded_by_its_bytes() -> None:
    """Two bytes a token: 5 bytes are 3 tokens at most, four Greek letters are 8 bytes and 4 tokens."""
    assert longest_tokens([Item("abcde", "αβγδ")], 100) == 3 + 4
    assert longest_tokens([Item("abcde", output_tokens=50), Item("ab")], 60) == 1 + 60


# --- order ------------------------------------------------------------------------------------------------------------


def test_no_prompt_comes_twice_before_all_have_come() -> None:
    prompts = tokenize_dataset([Item(str(number)) for number in range(20)], None)

    def taken(seed: str, first: int) -> list[Any]:
        return [chosen(prompts, number, seed) for number in range(first, first + 20)]

    assert sorted(int(prompt.text) for prompt, _ in taken("a", 0)) == list(range(20))
    assert {turn for _, turn in taken("a", 0)} == {0} and {turn for _, turn in taken("a", 20)} == {1}
    orders = [[prompt.text for prompt, _ in taken(*of)] for of in (("a", 0), ("a", 20), ("b", 0))]
    assert len({tuple(order) for order in orders}) == 3, "another order in each pass and cell"
    assert orders[0] != [str(number) for number in range(20)]
