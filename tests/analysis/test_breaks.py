"""Each kind of break on made cases, beside what looks like one and is none; and sound text, which has hardly any."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis import breaks as module
from harness.analysis.breaks import NEVER_NEXT, OWN, PAIRS, breaks, debris, scripts
from harness.analysis.loops import words
from harness.quality.prompts import Form

ASKED = "What is it, and what does it say in a text?"
SOUND = "The quick brown fox jumps over one lazy dog while seven small birds watch from that old fence"


def at(text: str, sound: str = ASKED, form: Form = "text", code: bool = False) -> list[int]:
    return breaks(text, sound, form, code)


BROKEN = {
    "a word said again": ("sits in in there", [2]),
    "over and over is one break": ("in in in in there", [1]),
    "a phrase said again": ("it sits on it sits on chairs", [3]),
    "a question word behind": ("sits in in what", [2, 3]),
    "articles and prepositions": ("a thief of in what is the of box", [3, 4, 7]),
    "prepositions and auxiliaries": ("a box from is by were red", [3, 5]),
    "across a line": ("a thief of\nin what", [3, 4]),
    "than, with nothing that is more": ("red boats than blue boats", [2]),
    "a stop behind an article": ("so it was the. Then rain", [3]),
    "marks": ("one,, two, three ; : four", [1, 3]),
    "operators": ("so 10 + = 12 or 2 ^^ 3", [2, 5]),
    "glued by a mark": ("one sack,The other", [1]),
    "glued, a capital within": ("then PaulThe man, whoBelgrade TextPeso", [1, 3, 4]),
    "glued, small": ("so throughthe town onthe hill", [1, 3]),
    "glued to a word of the prompt": ("peso ofpeso", [1]),
    "glued to a number": ("so 2is and the1, text22", [1, 3, 4]),
    "frequent words cut": ("it is abou tha sea", [2, 3]),
    "letters that nobody says": ("the wvumpf and jkdsa", [1, 3]),
    "two scripts in a word": ("the toolшто that", [1]),
    "replacement characters, a row of them is one": ("on Tue\ufffd\ufffdday sk\ufffd", [2, 4]),
    "control characters": ("on \x01\x02 day", [1]),
    "UTF-8 read as Latin-1 and as CP1252": ("the Ã¶wn itâ€™s", [1, 4]),
    "pieces of a template": ("so <|im_end|> it [/INST] is", [1, 4]),
    "marks of tokenizers": ("so ▁it is<0x0A> run ##ning", [1, 3, 5]),
    "a mix of scripts": ("so 天 it が is ноябрь now", [1, 3, 5]),
    "a mix of languages in one script": ("it fell dans when der was una", [2, 4, 6]),
    "German": ("Ein Berg ist der und weil aus von der Stadt", [4, 5, 7]),
    "French": ("Il est dans le de la et est une ville", [7]),
    "Spanish": ("El hielo de y en con el agua es un del mar", [3, 5, 10]),
}
WHOLE = {
    "signs between": "no, no, 3 and 3 3, Decompress   Decompress, --model MODEL",
    "in another sentence": "That is what I think of. In what way? The of-course reply",
    "named and not used": "The `if` and the 'of' are words, as the in-house style says, and the if_true block too",
    "names in code": "call isThe() then 'whoBelgrade' and forThe.one or /wvumpf/",
    "than, with something that is more": "more red boats than blue boats, bigger than that, rather than this",
    "ellipses and times": "1, 2, ..., n and so on... at 10:30:15, x..y, etc., e.g. these",
    "names": "JavaScript, TextEdit, GitHub, MacBook, float16, INT4, utf8, 5th, 20cm, 3D, x2, O'Neill, U.S., GPTQModel",
    "two words that begin with small ones": "Therefore the theatre, another island, within, without, whichever",
    "unusual words": "rhythm, strengths, catchphrase, awkward, acquire, neighbour, jazz, objects, pizza",
    "a name that is said again": "gptq is good, and gptq is fast",
    "greek letters": "Σp, Δt and µs, where α is the one",
    "two words of other scripts": "The Greek λόγος and the Russian слово mean it",
    "one word of another language": "The word λόγος means reason, and a café is open",
    "an end that is cut": "It is the",
    "code within": "Write ```return if x = = 2``` or `in in the of` there",
    "the prompt's own": "what does it say in a text, what",
    "maths": "f(x) = (-b + c) / 2a, 3 * -4 = -12, x^2 + y^2 = z^2, n = 3, a - b",
    "a table": "| Name | Number |\n|:-----|-----:|\n| Mars | 2 |\n| Venus | none |",
    "Chinese with Latin names": "我用 Python 写 API 和 TCP 的代码",
}


@pytest.mark.parametrize("case", BROKEN)
def test_where_a_text_breaks(case: str) -> None:
    """The number of words that begin before each break: "in in" is seen at the third word, so two stand before it."""
    text, expected = BROKEN[case]
    assert at(text, ASKED + " peso") == expected


@pytest.mark.parametrize("case", WHOLE)
def test_where_it_does_not(case: str) -> None:
    assert at(WHOLE[case]) == []


@pytest.mark.parametrize(
    "text", ["hey hey said the man", "a JohnThe there", "it is <|im_end|>", "one,, two", "sack,The end", "on wvumpf"]
)
def test_what_prompt_or_baseline_say_is_no_break(text: str) -> None:
    assert at(text) != []
    assert at(text, f"Say this: {text}") == []


def test_letters_that_nobody_says_are_looked_at_where_english_is_spoken() -> None:
    assert at("on wvumpf", "Jak to jest zrobione, prosze o odpowiedz.") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("return if % in == = n", 3),
        ("x = [ return ]\nfor while )", 2),
        ("return items[3]one (x)2", 2),
        ("SELECT FROM users , , WHERE = 3", 3),
        ("def f(x):\n    return not not x", 1),
        ("return items of in what", 2),
        ("if x not in y and z is not None:\n    return -x if x == -1 else [*a, **b]", 0),
        ("const f = (a, b) => { return a?.b && !b || [] } // return if in = =", 0),
        ('print("return if = = in")', 0),
        ("fooBar(a,b); x[:, 0]; for (;;) { i++; }", 0),
        ("SELECT a, b FROM t WHERE a = 1 AND b IN (SELECT c FROM u) ORDER BY a", 0),
    ],
)
def test_code(text: str, count: int) -> None:
    assert len(at(text, form="code", code=True)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('{"a": ["x x", {"b": -1.5e3, "c": true}], "d": {}, "e": []}', 0),
        ('Here you are:\n```json\n{"aB": [[1, 2], [3]]}\n```', 0),
        ("{'a': 'in in', 'b': null}", 0),
        ("The title of the film is Metropolis, and it came out in 1927.", 0),
        ('{"a":: 1,, "b" "c" {{ ] }', 5),
        ("in in [the of", 0),
    ],
)
def test_json(text: str, count: int) -> None:
    assert len(at(text, form="json")) == count


def test_characters_that_are_no_text_are_counted() -> None:
    """Ã¶ is two characters, â€™ three."""
    assert debris("a\ufffd\x01\n\tb") == 2
    assert debris("Ã¶ itâ€™s Ġx") == 6
    assert debris("São Paulo, naïve, Âge, 20 °C, “quoted” – and 3 × 4") == 0


def test_scripts_are_named() -> None:
    assert scripts("aé яЖ 漢かカ한 β") == {"LATIN": 2, "CYRILLIC": 2, "CJK": 4, "GREEK": 1}


def test_tables_are_words_that_can_be_met() -> None:
    """Each word of the tables is one word as words are counted; nothing stands in two languages' own words."""
    for language, rows in NEVER_NEXT.items():
        for left, right in rows:
            assert all(words(word) == [word] for word in (*left.split(), *right.split()) if "-" not in word), language
    for one, other in itertools.combinations(OWN.values(), 2):
        assert not one & other
    assert ("of", "in") in PAIRS["en"] and ("in", "of") in PAIRS["en"] and ("in", "the") not in PAIRS["en"]
    assert not any(one == other for pairs in PAIRS.values() for one, other in pairs), "said again, counted there"


def sound_texts() -> list[str]:
    """Docstrings of modules of the standard library and of this project, in pieces of 80 words or so."""
    texts = []
    for name in ("argparse", "asyncio", "difflib", "email", "json", "logging", "random", "statistics", "unittest"):
        tree = ast.parse(inspect.getsource(__import__(name)))
        texts += [ast.get_docstring(tree) or ""]
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    texts += [inspect.getdoc(found) or "" for found in sys.modules.values() if found.__name__.startswith("harness")]
    return [text for text in texts if len(text.split()) >= 12 and ">>>" not in text]


def test_sound_text_has_hardly_a_break() -> None:
    """Less than three in a thousand words of manuals; this module's own docstrings speak of breaks."""
    texts = [text for text in sound_texts() if text not in {module.__doc__} and "in in" not in text]
    assert sum(len(words(text)) for text in texts) > 8_000
    assert 1000 * sum(len(at(text)) for text in texts) < 3 * sum(len(words(text)) for text in texts)


def test_words_in_any_order_break() -> None:
    """The words of a sound sentence, backwards, break where the sentence does not."""
    text = (
        "The water that falls on the hills is led to the sea by the rivers, and from there it goes up to the sky again"
    )
    assert at(text) == []
    assert len(at(" ".join(reversed(text.split())))) >= 4


def test_a_word_said_twice_in_a_text_of_every_length_is_found_once() -> None:
    for before, after in itertools.product(range(3), repeat=2):
        text = " ".join([*SOUND.split()[:before], "rain", "rain", *SOUND.split()[5 : 5 + after]])
        assert at(text) == [before + 1]


@given(st.text(max_size=300), st.text(max_size=60), st.sampled_from(["text", "code", "json"]), st.booleans())
def test_it_never_raises_and_tells_places_in_order(text: str, sound: str, form: Form, code: bool) -> None:
    found = breaks(text, sound, form, code)
    assert found == sorted(found)
    assert all(0 <= place <= len(words(text)) + 1 for place in found)


@given(st.sampled_from(sorted(BROKEN)), st.integers(0, 5))
def test_sound_words_before_move_a_break_and_hide_none(case: str, count: int) -> None:
    text, expected = BROKEN[case]
    if case not in {"German", "French", "Spanish"}:
        before = " ".join(["Sound", "words", "stood", "here", "before"][:count])
        assert at(f"{before}. {text}", ASKED + " peso") == [place + count for place in expected]


@pytest.mark.parametrize(
    "text",
    [
        '"' + '\\"' * 30_000,
        "'" * 60_000,
        "```a" * 15_000,
        "thethe" * 10_000,
        "= " * 30_000,
        "a,b" * 20_000,
        "[" * 60_000,
    ],
    ids=lambda text: text[:6],
)
def test_a_long_answer_is_looked_at_in_time(text: str) -> None:
    """By squares each would take hours; nothing is timed."""
    for form, code in (("text", False), ("code", True), ("json", False)):
        assert len(breaks(text, ASKED, form, code)) <= len(text)  # type: ignore[arg-type]


def places_in(
    text: str, sound: str = "The harbour was quiet this morning, and the boats came in one by one."
) -> list[int]:
    return breaks(text, sound, "text", code=False)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("he who keeps a list of names who keeps a list of names", 1),  # six words said again at once
        ("one who keeps a list and one who keeps a map of names", 0),
        ("and the ishness of ableously made ships", 2),
        ("he was able, less so than his mentions", 0),
        ("the dispatchActionCode of boats", 1),
        ("the JavaScript of boats", 0),
        ("nahil]=]( boats", 1),
        ("boats (see the list).", 0),
        ("boats!!!! and more", 0),
    ],
)
def test_phrases_endings_programs_names_and_rows_of_signs(text: str, places: int) -> None:
    assert len(places_in(text)) == places


def test_a_programs_name_is_none_where_the_baseline_has_such() -> None:
    assert not places_in("the dispatchActionCode of boats", "Call addEventListener on the element of a page.")
