"""Sets of prompts: what cannot be used is said clearly, a copy is the same set, and the two that ship are sound."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import demo_tasks
import failure_prompts
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.quality.prompts import (
    CATEGORIES,
    CheckKind,
    Form,
    Prompt,
    PromptSet,
    expected_number,
    load_prompts,
    prompt_set_names,
    to_toml,
)
from harness.scenario import scenarios_dir

GOOD = """
name = "mine"

[[prompt]]
id = "q1"
category = "factual"
prompt = "What is 6 times 7?"
check = "numeric"
expect = ["42"]
"""


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, GOOD)) == PromptSet(
        "mine", (Prompt("q1", "factual", "What is 6 times 7?", "numeric", ("42",)),)
    )


def test_without_a_name_the_set_has_the_files(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, GOOD.replace('name = "mine"', ""))).name == "mine"


def with_line(line: str) -> str:
    """GOOD with a line in the place of the key that it sets, or beside the others."""
    key = line.partition(" ")[0]
    return re.sub(rf"(?m)^{key} = .*\n", "", GOOD) + line + "\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD.replace('category = "factual"\n', ""), ["'q1'", "category is missing"]),
        (GOOD.replace('id = "q1"\n', ""), ["prompt 1", "id is missing"]),
        (with_line('category = "poetry"'), ["'q1'", "category", "'poetry'", "'factual'"]),
        (with_line('check = "sniff"'), ["'q1'", "check", "'sniff'", "'numeric'"]),
        (with_line('form = "song"'), ["'q1'", "form", "'song'"]),
        (with_line("colour = 1"), ["'q1'", "unknown key 'colour'", "max_tokens"]),
        (with_line('id = "a b"'), ["id = 'a b'", "letters"]),
        (with_line(f'id = "{"a" * 65}"'), ["id = ", "up to 64"]),
        (with_line('prompt = " "'), ["'q1'", "prompt is empty"]),
        (with_line('language = ""'), ["'q1'", "language"]),
        (with_line("max_tokens = 0"), ["'q1'", "max_tokens = 0", "1 to 32768"]),
        (with_line("max_tokens = 40000"), ["max_tokens = 40000"]),
        (with_line('before = ["Hello."]'), ["'q1'", "before", "pairs"]),
        (with_line('expect = "42"'), ["'q1'", "expect", "'42'"]),
        (with_line("expect = [42]"), ["'q1'", "expect"]),
        (with_line("expect = []"), ["'q1'", "without expect", "one number"]),
        (with_line('expect = ["4", "5"]'), ["'q1'", "2 in expect", "one number"]),
        (with_line('expect = ["many"]'), ["'q1'", "'many' is no number"]),
        (with_line('expect = ["1/0"]'), ["'q1'", "no number"]),
        (with_line('check = "exact"\nexpect = ["a", " "]').replace('expect = ["42"]\n', ""), ["empty text"]),
        (with_line('check = "regex"\nexpect = ["(a"]').replace('expect = ["42"]\n', ""), ["expect", "'(a'"]),
        (with_line('check = "python"').replace('expect = ["42"]\n', ""), ["'q1'", "without tests"]),
        (with_line('check = "python"'), ["'q1'", "with expect"]),
        (with_line('check = "compare_only"'), ["'q1'", "with expect"]),
        (with_line('tests = "assert True"'), ["'q1'", "with tests or prefix"]),
        (with_line('check = "python"\ntests = "assert ("').replace('expect = ["42"]\n', ""), ["tests", "'assert ('"]),
        (GOOD + GOOD.partition("\n\n")[2], ["prompt 2", "'q1'", "twice"]),
        ('name = "empty"', ["no prompt"]),
        ("prompt = 3", ["no list of tables"]),
        ("prompt = [3]", ["no list of tables"]),
        ("name = 3\n" + GOOD.replace('name = "mine"', ""), ["name = 3"]),
        ("author = 'me'\n" + GOOD, ["unknown key 'author'", "description"]),
        ("name = ", ["no readable TOML"]),
        (GOOD.encode("utf-16"), ["no readable TOML"]),
        ("x = " + "[" * 10_000, ["no readable TOML"]),
        (b"#" * (4 * 2**20 + 1), ["4,194,305 bytes", "4,194,304"]),
    ],
)
def test_what_cannot_be_used_names_file_prompt_and_key(tmp_path: Path, text: str | bytes, told: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_prompts(written(tmp_path, text))
    message = str(caught.value)
    assert "mine.toml" in message and len(message) < 1000
    assert all(part in message for part in told), message
    assert caught.value.exit_code == 2


def test_a_name_that_is_not_there_gets_those_that_are() -> None:
    with pytest.raises(InputError, match=r"'nowhere' are not here\nAllowed: demo, general, or the path"):
        load_prompts("nowhere")
    assert prompt_set_names() == ["demo", "general"]


def test_messages_are_system_earlier_turns_and_the_prompt() -> None:
    prompt = Prompt("q", "factual", "and now?", "compare_only", before=("one", "1", "two", "2"), system="Be brief.")
    assert [(message["role"], message["content"]) for message in prompt.messages] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"),
        ("user", "and now?"),
    ]  # fmt: skip


def test_a_set_finds_its_prompts_by_id() -> None:
    prompts = PromptSet("s", (Prompt("a", "code", "x", "compare_only"), Prompt("b", "code", "y", "compare_only")))
    assert prompts["b"].prompt == "y"
    with pytest.raises(KeyError):
        prompts["c"]


@pytest.mark.parametrize(
    ("text", "value", "tolerance"),
    [("49", 49, 0), (" -1.5 ", -1.5, 0), ("1/4", 0.25, 0), ("3.25 +- 0.5", 3.25, 0.5), ("10 ± 1/2", 10, 0.5)],
)
def test_an_expected_number(text: str, value: float, tolerance: float) -> None:
    assert expected_number(text) == (value, tolerance)


@pytest.mark.parametrize("text", ["", "1e9", "1,000", "1/0", "4 apples", "nan", "1 2", "9" * 19, "٤"])
def test_no_expected_number(text: str) -> None:
    with pytest.raises(ValueError, match="no number"):
        expected_number(text)


TEXT = st.text() | st.text(alphabet="\"'\\\n\r\t\x00\x7f\u0085\u2028 a#[]=", max_size=12)
SOUND = TEXT.filter(lambda text: text.strip() != "")


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    check = draw(st.sampled_from(get_args(CheckKind)))
    expect = {
        "exact": st.lists(SOUND, min_size=1, max_size=3),
        "contains_all": st.lists(SOUND, min_size=1, max_size=3),
        "numeric": st.sampled_from([["-7"], ["2.50 +- 0.01"]]),
        "regex": SOUND.map(lambda text: [re.escape(text)]),
    }.get(check, st.just([]))
    python = check == "python"
    return Prompt(
        draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
        draw(st.sampled_from(CATEGORIES)),  # type: ignore[arg-type]
        draw(SOUND),
        check,
        tuple(draw(expect)),
        tests=draw(SOUND.map(lambda text: f"assert x == {text!r}\n")) if python else "",
        prefix=draw(TEXT) if python else "",
        before=tuple(
            draw(st.lists(st.tuples(TEXT, TEXT), max_size=2).map(lambda pairs: [t for p in pairs for t in p]))
        ),
        system=draw(TEXT),
        max_tokens=draw(st.integers(1, 32_768)),
        form=draw(st.sampled_from(get_args(Form))),
        language=draw(SOUND),
        note=draw(TEXT),
    )


@given(
    st.lists(prompts(), min_size=1, max_size=3, unique_by=lambda prompt: prompt.id).map(tuple),
    TEXT,
    TEXT,
)
def test_a_copy_is_the_same_set(
    tmp_path_factory: pytest.TempPathFactory, chosen: tuple[Prompt, ...], name: str, description: str
) -> None:
    whole = PromptSet(name, chosen, description)
    assert load_prompts(written(tmp_path_factory.getbasetemp(), to_toml(whole))) == whole


@pytest.mark.parametrize(
    "text",
    [
        '"', '\n"', "\n''' and \"\"\"\"\"", "'''\n\"", '\'\'\'\n""', '\n"""', "a\n'", "'\\", "\\\n", "\r\n", "\n\n",
        "\x1f\n\\", "\"\n''", "\x7f", "\u2028", "a \\", "\\u0041", "\\\n'''",
    ],
)  # fmt: skip
def test_a_copy_keeps_quotes_and_escapes(tmp_path: Path, text: str) -> None:
    whole = PromptSet(text, (Prompt("q", "code", "?", "compare_only", note=text, before=(text, text)),), text)
    assert load_prompts(written(tmp_path, to_toml(whole))) == whole


@pytest.mark.parametrize("name", ["demo", "general"])
def test_the_sets_that_ship_are_copies_of_themselves(name: str) -> None:
    file = scenarios_dir() / "failures" / f"{name}.toml"
    assert to_toml(load_prompts(name)) == file.read_text(encoding="utf-8")
    assert file.stat().st_size < 400_000


def test_the_demo_set_is_what_its_tool_makes() -> None:
    assert failure_prompts.demo_set() == load_prompts("demo")


def test_the_demo_set_has_forty_in_each_family() -> None:
    chosen = load_prompts("demo").prompts
    assert Counter(prompt.category for prompt in chosen) == dict.fromkeys(CATEGORIES, 40)
    assert len({prompt.prompt for prompt in chosen}) > 270  # hardly any is asked in two families
    assert all(prompt.check != "compare_only" for prompt in chosen)


def test_the_demo_set_asks_nothing_that_was_trained() -> None:
    """Not one of 20,000 training prompts; and of sums and points, by their keys, none that could be drawn there."""
    rng = random.Random(5)
    trained = {draw(rng, "train").prompt for draw in demo_tasks.FAMILIES.values() for _ in range(4_000)}
    asked = {prompt.prompt for prompt in load_prompts("demo").prompts}
    assert not asked & trained
    for prompt in load_prompts("demo").prompts:
        if prompt.check == "numeric":
            a, b = sorted(map(int, re.findall(r"\d+", prompt.prompt)[:2]))
            assert demo_tasks.side(f"{a},{b}") == "heldout", prompt
        if prompt.category == "summary":
            assert demo_tasks.side(f"point/{prompt.expect[0][4:-1]}") == "heldout", prompt


def test_the_general_set_covers_every_family() -> None:
    chosen = load_prompts("general").prompts
    counts = Counter(prompt.category for prompt in chosen)
    assert len(chosen) >= 40 and min(counts[category] for category in CATEGORIES) >= 5
    assert {prompt.check for prompt in chosen} == set(get_args(CheckKind))
    assert sum(prompt.check == "compare_only" for prompt in chosen) <= 6
