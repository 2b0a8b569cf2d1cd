"""Texts: windows of a file, and the baseline's answers, as ids of a tokenizer that the test serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.errors import EngineError, InputError
from harness.quality import texts
from harness.quality.prompts import Prompt, PromptSet
from harness.records import Answer


def tokenize(request: httpx.Request) -> httpx.Response:
    """One id a word; a message is its role's first letter and its words, an open end is 0."""
    body: Any = json.loads(request.content)
    if "messages" in body:
        words = [f"{turn['role'][0]} {turn['content']}" for turn in body["messages"]]
        ids = [len(word) for word in " ".join(words).split()] + [0] * body["add_generation_prompt"]
    else:
        ids = [len(word) for word in body["prompt"].split()]
    return httpx.Response(200, json={"tokens": ids})


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(transport=httpx.MockTransport(tokenize), base_url="http://server") as client:
        yield client


def test_a_text_file_is_cut_into_windows(tmp_path: Path, client: httpx.Client) -> None:
    file = tmp_path / "t.txt"
    file.write_text(" ".join("x" * (1 + index % 9) for index in range(45)))
    found = texts.from_file(file, client, "m", window=20, count=9)
    assert [text.id for text in found] == ["t.txt:1", "t.txt:2"]  # 5 left over are less than half a window
    assert found[0].ids == tuple(1 + index % 9 for index in range(20))
    assert found[1].ids == tuple(1 + index % 9 for index in range(20, 40))
    assert len(texts.from_file(file, client, "m", window=20, count=1)) == 1
    assert [len(text.ids) for text in texts.from_file(file, client, "m", window=30, count=9)] == [30, 15]


def test_conversations_are_strung_together(tmp_path: Path, client: httpx.Client) -> None:
    file = tmp_path / "t.jsonl"
    rows = [{"prompt": "a bb", "answer": "ccc"}, {"messages": [{"role": "user", "content": "dddd"}]}, {"text": "e f"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    (found,) = texts.from_file(file, client, "m", window=50, count=4)
    assert found.ids == (1, 1, 2, 1, 3, 1, 4, 0, 1, 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"too short", "2 tokens"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}', "line 1"),
        ("a.jsonl", b"{}\nnonsense", "line 1"),
        ("a.jsonl", b'"text"', "line 1"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, client: httpx.Client, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        texts.from_file(tmp_path / name, client, "m", 8, 4)
    with pytest.raises(InputError, match="cannot be read"):
        texts.from_file(tmp_path / "absent.txt", client, "m", 8, 4)


def test_the_baselines_answers_after_their_prompts(client: httpx.Client) -> None:
    prompts = PromptSet("s", tuple(Prompt(f"p{n}", "factual", "word " * n, "compare_only") for n in range(1, 7)))
    answers = [Answer(f"p{n}", "bf16", tokens=(90 + n, 2)) for n in range(1, 7) if n != 3]
    found = texts.from_answers(prompts, answers, client, "m", window=6, count=2)
    assert found == [texts.Text("p1", (1, 4, 0, 91, 2)), texts.Text("p4", (1, 4, 4, 4, 4, 0))]
    with pytest.raises(InputError, match="no token ids"):
        texts.from_answers(prompts, [Answer("p1", "bf16", text="words")], client, "m", 6, 2)


def test_a_line_and_back(tmp_path: Path) -> None:
    text = texts.Text('odd "id"', (1, 2, 3))
    (tmp_path / "t").write_text(texts.to_line(text) + "\n")
    assert texts.read_texts(tmp_path / "t") == [text]


def test_a_server_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words " * 20)
    refuse = httpx.MockTransport(lambda request: httpx.Response(404, text="no such page"))
    with httpx.Client(transport=refuse, base_url="http://server") as client:
        with pytest.raises(EngineError, match="404"):
            texts.from_file(tmp_path / "t.txt", client, "m", 8, 4)
