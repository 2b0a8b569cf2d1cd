"""The directory: what is written is read back, a killed run goes on, and what does not belong together is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError, RecordError
from harness.quality.directory import Quality, QualityDirectory, load_quality, read_answers
from harness.quality.prompts import Prompt, PromptSet
from harness.quality.scoring import Scored
from harness.quality.texts import Text
from harness.records import Answer, Position, Sample

PROMPTS = PromptSet("few", (Prompt("p1", "factual", 'Say "4"\nnow', "exact", ("4",)),), "some")
ANSWER = Answer(
    "p1", "bf16", text="4\u2028", tokens=(1, 2), alternatives=(((1, -0.5), (3, -2.0)), ((2, 0.0),)), ok=True
)
SETTINGS = {"model": "demo", "baseline": "bf16", "precisions": ["bf16"], "checkpoint_sha256": {"bf16": "aa"}}


def position(text: str, at: int, precision: str = "awq") -> Position:
    return Position(precision, 1, text, at, 7, -0.5, -0.25, 0.125, True, True, False)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = [Sample("gsm8k", "3", "awq", "exact_match", 1.0)]
    with QualityDirectory(tmp_path / "q") as directory:
        directory.describe(SETTINGS, PROMPTS)
        directory.add_answer(ANSWER)
        directory.add_positions([position("t", 1), position("t", 2)])
        directory.add_samples(samples)
    found = load_quality(tmp_path / "q")
    assert found == Quality(
        "q", {**SETTINGS, "served_as": {}}, PROMPTS, [ANSWER], [position("t", 1), position("t", 2)], samples
    )
    assert (found.baseline, found.precisions) == ("bf16", ["bf16"])
    assert load_quality(tmp_path) is None
    assert not (tmp_path / "q" / ".lock").exists()


@given(
    st.text(),
    st.lists(st.integers(0, 2**31)),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | st.booleans(),
)
def test_any_answer_is_a_line_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, tokens: list[int], logprob: float, ok: bool | None
) -> None:
    text = text.encode("utf-8", "replace").decode()
    answer = Answer("p", "awq", 2, text, tuple(tokens), (logprob,), (((5, logprob),),), ok=ok, note=text)
    with QualityDirectory(tmp_path_factory.mktemp("q")) as directory:
        directory.add_answer(answer)
        directory.add_answer(answer)
        assert directory.answers() == [answer, answer]


def test_a_torn_last_line_is_asked_again_and_others_are_faults(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path) as directory:
        directory.add_answer(ANSWER)
    path = tmp_path / "answers.jsonl"
    with path.open("a") as file:
        file.write('{"prompt_id":"p2","prec')
    assert read_answers(path) == [ANSWER]
    with QualityDirectory(tmp_path) as directory:
        directory.add_answer(replace(ANSWER, prompt_id="p2"))
    assert [answer.prompt_id for answer in read_answers(path)] == ["p1", "p2"]
    path.write_text('{"precision": "awq"}\n')
    with pytest.raises(RecordError, match="line 1"):
        read_answers(path)


def test_errors_are_forgotten_so_that_they_are_asked_again(tmp_path: Path) -> None:
    failed = Answer("p2", "bf16", error="HTTP 500")
    others = Answer("p2", "awq", error="HTTP 500")
    with QualityDirectory(tmp_path) as directory:
        for answer in (ANSWER, failed, others):
            directory.add_answer(answer)
    with QualityDirectory(tmp_path) as directory:
        directory.forget_errors("bf16")
        directory.add_answer(replace(ANSWER, prompt_id="p2"))
        assert directory.answers() == [ANSWER, others, replace(ANSWER, prompt_id="p2")]


def test_rows_of_a_text_that_was_not_finished_go(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path) as directory:
        directory.add_positions([position("a", 1), position("a", 2), position("b", 1)])
    with QualityDirectory(tmp_path) as directory:
        directory.keep_whole_texts({"a": 2, "b": 2})
        assert directory.compared() == {("awq", 1): {"a"}}


def test_the_baseline_is_kept_until_the_end(tmp_path: Path) -> None:
    whole = Scored(
        None,
        *(np.array([[-1.0, -2.0]], dtype=np.float32), np.array([-1.0], dtype=np.float32)),
        np.array([0], dtype=np.int32),
    )
    some = Scored(np.array([[4, -1]], dtype=np.int32), *(whole.logprobs, whole.following, whole.likeliest))
    with QualityDirectory(tmp_path) as directory:
        assert directory.baseline() == {}
        directory.keep_baseline({"file.txt:1": whole, "p/2": some})
        found = directory.baseline()
        assert found.keys() == {"file.txt:1", "p/2"}
        assert found["file.txt:1"].ids is None
        np.testing.assert_array_equal(found["p/2"].ids, some.ids)
        np.testing.assert_array_equal(found["p/2"].logprobs, some.logprobs)
        np.testing.assert_array_equal(found["p/2"].following, some.following)
        np.testing.assert_array_equal(found["p/2"].likeliest, some.likeliest)
        directory.finish()
        assert directory.baseline() == {}


def test_a_second_call_adds_precisions_and_parts(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path) as directory:
        directory.describe(SETTINGS, PROMPTS)
        more = {**SETTINGS, "precisions": ["awq"], "checkpoint_sha256": {"awq": "bb"}, "text": "t.txt", "window": 64}
        directory.describe(more, None)
    found = load_quality(tmp_path)
    assert found is not None and found.precisions == ["bf16", "awq"]
    assert found.settings["checkpoint_sha256"] == {"bf16": "aa", "awq": "bb"}
    assert (found.settings["text"], found.settings["window"], found.prompts) == ("t.txt", 64, PROMPTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "other"}, "model"),
        ({"baseline": "awq"}, "baseline"),
        ({"checkpoint_sha256": {"bf16": "cc"}}, "another checkpoint"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    with QualityDirectory(tmp_path) as directory:
        directory.describe(SETTINGS, PROMPTS)
        with pytest.raises(InputError, match=said):
            directory.describe({**SETTINGS, **changed}, PROMPTS)


def test_only_one_writes_at_a_time(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path), pytest.raises(InputError, match="being written"):
        QualityDirectory(tmp_path)


def test_broken_settings_are_said(tmp_path: Path) -> None:
    (tmp_path / "quality.toml").write_text("[other]\n")
    with pytest.raises(InputError, match="quality.toml"):
        load_quality(tmp_path)


def test_texts_come_back(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path) as directory:
        directory.set_texts([Text("a", (1, 2)), Text("b", (3,))])
        assert directory.texts() == [Text("a", (1, 2)), Text("b", (3,))]
    assert [json.loads(line)["id"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()] == ["a", "b"]


def test_a_directory_into_which_nothing_came_goes(tmp_path: Path) -> None:
    with QualityDirectory(tmp_path / "q"):
        assert (tmp_path / "q").is_dir()
    assert not (tmp_path / "q").exists()
