"""Each symptom on made cases, on both sides of each threshold that its definition names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis import loops, symptoms
from harness.analysis.symptoms import DETECTORS, ISSUES, SYMPTOMS, repetition_loop, symptom, token_collapse
from harness.quality.prompts import Category, CheckKind, Form, Prompt
from harness.records import Answer

SURE = -0.02
SOUND = "The quick brown fox jumps over one lazy dog while seven small birds watch from that old fence"


def asked(
    text: str = "Tell me about it.",
    category: Category = "explain",
    check: CheckKind = "compare_only",
    form: Form = "text",
) -> Prompt:
    return Prompt("p", category, text, check, form=form)


def said(
    text: str,
    ok: bool | None = None,
    finish: str = "stop",
    logprobs: tuple[float, ...] = (),
    note: str = "",
) -> Answer:
    return Answer("p", "awq", text=text, ok=ok, finish_reason=finish, logprobs=logprobs, note=note)


def named(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str | None:
    found = symptom(prompt, baseline, answer)
    return found.name if found else None


# --- loops -----------------------------------------------------------------------------------------------------------

LOOPS = {
    "one word four times": "It is very very very very",
    "a full stop after it": "The school school school school.",
    "one more word after it": "It is very very very very good",
    "one more word after a loop that is less than half": "It is a long text that says very very very very good",
    "a unit of two words three times": "First Eva, then Eva, then Eva, then Eva.",
    "signs between the repeats": "no, no; no... no!",
    "a sentence three times": "I see. " + "The cat sat on the mat. " * 3,
    "cut inside a repeat": "Well, " + "the cat sat on the mat and " * 3 + "the cat sat",
    "capitals": "It is Very very VERY very",
    "pieces of a word eight times": "A coin is a " + "ph" * 8,
    "pieces of a word, and a piece more": "A coin is a " + "ph" * 9 + "hi",
    "a sign eight times": "Yes" + "!" * 8,
    "signs, then another": "First Paul" + "," * 8 + ".",
    "a number eight times": "It is" + " 7" * 8,
    "left again, but most of the answer": "The road road road road road road was late",
    "it only counts": "So: " + " ".join(f"Step {n}: add one." for n in range(6)),
    "without spaces between words": "我喜欢" + "非常" * 3,
}
NO_LOOPS = {
    "one word three times": "It is very very very",
    "a unit of two words twice": "First Eva, then Eva, then Eva.",
    "two words and two halves": "then Eva, then Eva, then",
    "two more words after it": "This is a longer text that says very very very very good things",
    "half of the answer": "So river river river river was ready now.",
    "pieces of a word seven times": "A coin is a " + "ph" * 7,
    "pieces of a word, and a word more": "A coin is a " + "ph" * 9 + "armacy",
    "a sign seven times": "Yes" + "!" * 7,
    "a number seven times": "It is" + " 7" * 7,
    "digits of one number": "10^20 is 1" + "0" * 20,
    "it counts only five times": " ".join(f"Step {n}: add one." for n in range(5)),
    "numbers with one word": " ".join(f"item {n}" for n in range(20)),
    "another word in each": "The cat is black. The cat is white. The cat is red. The cat is old.",
    "a list of one shape": "- red apple\n- green apple\n- yellow apple\n- blue apple",
    "a sound text": SOUND,
    "nothing": "",
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop(case: str) -> None:
    assert named(asked(), None, said(LOOPS[case])) == "repetition_loop"


@pytest.mark.parametrize("case", NO_LOOPS)
def test_no_loop(case: str) -> None:
    assert repetition_loop(asked(), None, said(NO_LOOPS[case])) == ""


def test_a_loop_says_what_is_repeated_how_often_and_from_where() -> None:
    found = symptom(asked(), None, said("It goes in the in the in the"))
    assert found is not None
    assert found.why == "'in the' 3 times in a row from word 3"
    found = symptom(asked(), None, said("Step 1: add one. Step 2: add one. " * 4))
    assert found is not None and "8 times" not in found.why, "the exact loop of both steps comes first: 4 times"
    assert "only the numbers change" in repetition_loop(asked(), None, said(LOOPS["it only counts"]))


@pytest.mark.parametrize(("repeats", "loops_"), [(5, False), (6, True)])
def test_lines_of_code_may_be_alike(repeats: int, loops_: bool) -> None:
    text = "def f():\n" + "    x = 0\n" * repeats
    assert bool(repetition_loop(asked(form="code"), None, said(text))) is loops_
    assert repetition_loop(asked(), None, said(text))


def test_a_number_in_the_prompt_asks_for_no_repeats_unless_it_is_one_of_times() -> None:
    """The farm was closed for 9 days, and nobody asked for the word 9 times."""
    prompt = asked("Summarize: Nobody saw the farm for 9 days. The farm was safe.")
    assert repetition_loop(prompt, None, said("The farm farm farm farm farm farm in and 3."))
    assert not repetition_loop(asked("Say farm 9 times."), None, said("The farm farm farm farm farm farm in and 3."))


@pytest.mark.parametrize(("repeats", "loops_"), [(20, False), (21, True)])
def test_what_the_prompt_asks_for_is_no_loop(repeats: int, loops_: bool) -> None:
    prompt = asked('Write the word "yes" 20 times.')
    assert bool(repetition_loop(prompt, None, said("yes " * repeats))) is loops_
    assert repetition_loop(prompt, None, said("no " * repeats)), "it was asked for another word"


def test_what_the_baseline_does_too_and_ends_is_no_loop() -> None:
    prompt, loop = asked("Sing."), said("la " * 12)
    assert not repetition_loop(prompt, said("Here I sing: la la la la la la."), loop), "12 is twice 6"
    assert repetition_loop(prompt, said("Here I sing: la la la la la."), loop), "12 is more than twice 5"
    assert repetition_loop(prompt, said("Here I sing: " + "la " * 50, finish="length"), loop), "it looped itself"
    assert repetition_loop(prompt, said("Here I sing: tra tra tra tra tra tra."), loop)


def test_a_unit_may_begin_anywhere_in_the_baselines_repeats() -> None:
    baseline = said("knock then wait then knock then wait then knock then wait. Done.")
    assert not repetition_loop(asked(), baseline, said("Now wait then knock then wait then knock then wait then knock"))


def test_a_unit_that_is_a_shorter_one_repeated_is_no_unit() -> None:
    """Five times "7" is not twice "7 7" and not a unit of two words."""
    assert [run.period for run in loops._runs_through(["7"] * 7, 6)] == [1]
    assert [run.period for run in loops._runs_through(list("abababab"), 7)] == [2]


@given(st.lists(st.sampled_from("ab"), max_size=40), st.integers(0, 39))
def test_runs_are_those_that_a_plain_search_finds(items: list[str], at: int) -> None:
    """Oracle: for each period, walk on from the last period up to `at` while items equal those a period away."""
    expected = []
    for period in range(1, at + 1 if at < len(items) else 1):
        start, end = at + 1 - period, at + 1
        while start > 0 and items[start - 1] == items[start - 1 + period]:
            start -= 1
        while end < len(items) and items[end] == items[end - period]:
            end += 1
        if (end - start) // period >= 2:
            expected.append(loops.Run(period, start, end))
    primitive = [
        run
        for run in expected
        if not any(
            run.period % one.period == 0 and one.start <= run.start and run.end <= one.end
            for one in expected
            if one.period < run.period
        )
    ]
    assert list(loops._runs_through(items, at)) == primitive


WORDS = st.text(alphabet="abcdefghij", min_size=2, max_size=6)


@given(st.lists(WORDS, max_size=30), st.lists(WORDS, min_size=1, max_size=8), st.integers(4, 12))
def test_a_unit_repeated_at_the_end_of_any_text_is_a_loop(text: list[str], unit: list[str], times: int) -> None:
    assert named(asked(), None, said(" ".join([*text, *unit * times]))) == "repetition_loop"


@given(st.permutations(SOUND.split()))
def test_words_in_any_order_are_no_loop(order: list[str]) -> None:
    assert repetition_loop(asked(), None, said(" ".join(order))) == ""


# --- collapse --------------------------------------------------------------------------------------------------------

BASELINE = said("A shoe cleaner is a tool that cleans shoes.", ok=True, logprobs=(SURE,) * 11)
WHAT = asked("What is a shoe cleaner?", check="exact")
TIRED = (-1.5,)
"""One token that the model was unsure of."""

COLLAPSES = {
    "two breaks": ("A shoe shoe is a a tool", 0),
    "words glued": ("A shoePaul is aFirst tool whoBelgrade the1", 0),
    "marks that cannot follow each other": ("A shoe,, then tool,,. then a", 0),
    "neighbours of no sentence": ("A drum thief is a person who steals of in what.", 0),
    "ten words apart at the most": ("A shoe shoe is a tool that cleans them and the the one", 0),
    "five words": ("peso the in of in", 0),
    "one break, and unsure": ("A drum drum capital country is whose seller item", 6),
    "unsure throughout": ("A drum capital country is whose seller item", 9),
    "characters that are no text": ("\ufffd\ufffd\ufffd shoe", 0),
    "a tenth of them are": ("A shoe\ufffd is", 0),
    "UTF-8 that was read as something else": ("Ã¶wnÃ©r", 0),
    "control characters": ("A \x01\x02 shoe", 0),
    "pieces of a template": ("A shoe <|im_end|> tool <|im_start|> shoe is", 0),
    "two scripts in one word": ("A shoeшто is a toolшто that", 0),
}
NO_COLLAPSES = {
    "wrong but well formed": ("A shoe cleaner is a person who sells shoes.", 1),
    "unsure, and well formed": ("A shoe cleaner is a box that holds shoes.", 6),
    "one slip": ("A shoe shoe cleaner is a tool that cleans shoes.", 5),
    "eleven words apart": ("A shoe shoe is a tool that cleans them and is the the one", 0),
    "sure of odd words": ("A drum capital country is whose seller item", 0),
    "one character in eleven is no text": ("A shoes\ufffd is", 0),
    "four words": ("peso the in of", 9),
    "one such character in a long text": (SOUND + " \ufffd " + SOUND, 0),
    "an end that is cut": ("A shoe cleaner is a tool that", 1),
    "the baseline's own words": (BASELINE.text, 1),
}


def unsure(text: str, tokens: int) -> Answer:
    """An answer with so many unsure tokens in a row, then sure ones."""
    return said(text, ok=False, logprobs=TIRED * tokens + (SURE,) * 14)


@pytest.mark.parametrize("case", COLLAPSES)
def test_a_collapse(case: str) -> None:
    assert named(WHAT, BASELINE, unsure(*COLLAPSES[case])) == "token_collapse"


@pytest.mark.parametrize("case", NO_COLLAPSES)
def test_no_collapse(case: str) -> None:
    assert token_collapse(WHAT, BASELINE, unsure(*NO_COLLAPSES[case])) == ""


def test_a_model_that_is_often_unsure_is_measured_by_its_own_standard() -> None:
    """The baseline's worst stretch has 3 points, of which 2 are taken off: 10 - 2 = 8, 11 - 2 = 9."""
    baseline = said("Free words of a model that may say it in many ways.", logprobs=TIRED * 3 + (SURE,) * 12)
    text = "Other words which this one has chosen for what it says"
    assert token_collapse(asked(), baseline, unsure(text, 10)) == ""
    assert "9 points of doubt" in token_collapse(asked(), baseline, unsure(text, 11))


def test_a_lost_token_is_two_points() -> None:
    """4 lost ones are 8 points, and 9 with an unsure one; ln p of exactly -2 is unsure and not lost."""
    text = "A drum capital country is whose seller item"
    for logprobs, points in (((-2.5,) * 4, 0), ((-2.5,) * 4 + TIRED, 9), ((-2.0,) * 8, 0), ((-2.0,) * 9, 9)):
        found = token_collapse(WHAT, BASELINE, said(text, logprobs=(*logprobs, SURE, SURE)))
        assert found == (f"{points} points of doubt within 12 tokens" if points else "")


def test_what_the_baseline_breaks_itself_is_taken_off() -> None:
    """Two breaks in the answer less the baseline's one are one, three are two."""
    baseline = said("It is a machine machine that hums.")
    assert token_collapse(WHAT, baseline, said("It sits sits on on a chair.")) == ""
    assert "2 breaks" in token_collapse(WHAT, baseline, said("It sits sits on on a chair chair."))


def test_unsure_tokens_count_within_twelve_and_breaks_within_ten_words() -> None:
    """Seven unsure tokens are many in a row, and few when a dozen lie between any two."""
    text = "A cleaner a is shoe tool that"
    far = said(text, ok=False, logprobs=(TIRED + (SURE,) * 12) * 7)
    assert token_collapse(WHAT, BASELINE, far) == ""
    assert symptoms._most([0, 9], 10) == 2
    assert symptoms._most([0, 10], 10) == 1
    assert symptoms._most([], 10) == 0


def test_unsure_means_less_than_one_chance_in_e() -> None:
    text = "A drum capital country is whose seller item"
    assert token_collapse(WHAT, BASELINE, said(text, logprobs=(-1.01,) * 9))
    assert token_collapse(WHAT, BASELINE, said(text, logprobs=(-1.0,) * 9)) == ""


def test_without_log_probabilities_only_what_shows_is_found() -> None:
    assert token_collapse(WHAT, BASELINE, said("A shoe shoe is in a tool")) == ""
    assert token_collapse(WHAT, BASELINE, said("A shoe shoe is in in a tool")) == "2 breaks within 10 words"
    assert token_collapse(WHAT, said("A shoe."), unsure("A drum capital country is whose seller item", 12)) == ""


def test_without_a_baseline_a_model_may_be_unsure_more_often() -> None:
    """5 points are usual then: 10 + 2 x 2 - 5 = 9, 11 + 2 - 5 = 8."""
    text = "crowded wheels book wherever night Ana boxes there"
    for tired, lost, found in ((10, 2, True), (11, 1, False)):
        answer = said(text, logprobs=TIRED * tired + (-3.0,) * lost + (SURE,) * 9)
        assert bool(token_collapse(asked(), None, answer)) is found


def test_what_loops_and_has_collapsed_is_a_loop() -> None:
    answer = unsure("A drum capital country is whose whose whose whose", 8)
    assert token_collapse(WHAT, BASELINE, answer)
    assert named(WHAT, BASELINE, answer) == "repetition_loop"


# --- the others ------------------------------------------------------------------------------------------------------

PARAGRAPH = said(
    "Rain falls when warm air rises and cools. The water in it forms drops, and these grow until they fall. "
    "That is why mountains are often wet.",
    ok=True,
)
RIGHT = said("The farm was open this year.", ok=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("天气很好", "language_break"),
        ("The farm был open.", "language_break"),
        ("Die Bäuerin öffnete früh und grüßte.", "language_break"),
        ("The farm был.", "language_break"),
        ("The farm б open.", "rephrasing"),
        ("The α and β of the farm.", "rephrasing"),
        ("The café in São Paulo was open this whole year.", "rephrasing"),
        ("The farm was open.", "rephrasing"),
    ],
)
def test_language(text: str, expected: str) -> None:
    assert named(asked(), said("The farm was open this year."), said(text, ok=True)) == expected


def test_a_language_that_the_prompt_or_the_baseline_has_is_none_that_breaks() -> None:
    assert named(asked("Translate to Chinese: good"), said("good"), said("好的", ok=True)) == "language_break"
    assert named(asked("What does 好 mean?"), said("good"), said("好的", ok=True)) == "rephrasing"
    assert named(asked(), said("很好"), said("好的", ok=True)) == "rephrasing"


@pytest.mark.parametrize(
    ("finish", "baseline", "expected"),
    [("length", "stop", "never_stop"), ("length", "length", "rephrasing"), ("stop", "length", "rephrasing")],
)
def test_never_stop(finish: str, baseline: str, expected: str) -> None:
    assert named(asked(), said(SOUND, finish=baseline), said(f"So {SOUND}", finish=finish)) == expected


def test_never_stop_without_a_baseline() -> None:
    assert named(asked(), None, said(SOUND, finish="length")) == "never_stop"
    assert named(asked(), None, said(SOUND)) is None


@pytest.mark.parametrize(
    ("text", "ok", "expected"),
    [
        ("", None, "early_stop"),
        (" ...", None, "early_stop"),
        ("The farm was open", False, "early_stop"),
        ("The farm", False, "early_stop"),
        ("This farm was,", False, "early_stop"),
        ("This farm (was", False, "early_stop"),
        ("This farm was very open", False, "early_stop"),
        ("This farm was open.", False, "wrong_answer"),
        ("This farm was", False, "wrong_answer"),
        ("This farm was open in this very year", False, "wrong_answer"),
        ("The farm was open", True, "rephrasing"),
        ("", True, "rephrasing"),
    ],
)
def test_early_stop(text: str, ok: bool | None, expected: str) -> None:
    assert named(asked(check="exact"), RIGHT, said(text, ok=ok)) == expected


@pytest.mark.parametrize(("count", "expected"), [(6, "early_stop"), (7, "rephrasing")])
def test_less_than_a_quarter_of_a_long_answer_is_an_early_stop(count: int, expected: str) -> None:
    """The baseline's has 27 words, a quarter of which is 6.75."""
    assert len(loops.words(PARAGRAPH.text)) == 27
    text = " ".join(["Clouds", "bring", "water", "to", "each", "place", "there"][:count]) + "."
    assert named(asked(), PARAGRAPH, said(text)) == expected


def test_an_answer_without_a_word_is_early_without_a_baseline_too_and_never_beside_another() -> None:
    assert named(asked(), None, said("")) == "early_stop"
    assert named(asked(), said("+"), said("-")) == "rephrasing"


@pytest.mark.parametrize(
    ("form", "kept", "broken"),
    [
        ("json", '{"a": 1}', "{'a': 1}"),
        ("json", 'Here:\n```json\n{"a": 1}\n```', "a is 1"),
        ("number", "It is 42", "forty two it is"),
        ("list", "- red\n- green", "red green blue"),
        ("list", "red, green", "blue"),
        ("code", "return x + 1", "that one would add one"),
    ],
)
def test_format(form: Form, kept: str, broken: str) -> None:
    prompt = asked(form=form)
    assert named(prompt, said(kept), said(broken)) == "format_break"
    assert named(prompt, None, said(broken)) == "format_break"
    assert named(prompt, None, said(kept)) is None
    assert named(prompt, said(broken + " well well"), said(broken)) != "format_break", "nor does the baseline's"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that request.",
        "I cannot answer this question, for I do not know it.",
        "As an AI language model I have no view on farms.",
        "I am unable to say whether the farm was open.",
    ],
)
def test_refusal(text: str) -> None:
    assert named(asked(check="exact"), RIGHT, said(text, ok=False)) == "refusal"
    assert named(asked(), None, said(text)) == "refusal"
    assert named(asked(check="exact"), RIGHT, said(text, ok=True)) == "rephrasing"
    baseline = said("I'm sorry, I do not answer that.", ok=None)
    assert named(asked(), baseline, said(text)) == "rephrasing"


def test_to_tell_of_somebody_who_cannot_is_no_refusal() -> None:
    assert named(asked(), RIGHT, said("The fox cannot reach it, and is sorry.")) == "rephrasing"
    assert named(asked(), RIGHT, said(f"{PARAGRAPH.text} {SOUND}. I cannot say more.")) == "rephrasing"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (asked(category="long_context", check="numeric"), "broken_long_context"),
        (asked(category="reasoning", check="numeric"), "wrong_number"),
        (asked(category="code", check="python"), "wrong_code"),
        (asked(category="factual", check="exact"), "wrong_answer"),
        (asked(category="factual", check="contains_all"), "wrong_answer"),
    ],
)
def test_wrong_by_what_was_checked(prompt: Prompt, expected: str) -> None:
    right, wrong = said("return 4", ok=True), said("return 5", ok=False, note="5 is not 4")
    found = symptom(prompt, right, wrong)
    assert found is not None
    assert (found.name, found.why) == (expected, "5 is not 4")
    assert named(prompt, said("return 6", ok=False), wrong) == "rephrasing", "the baseline's is wrong too"
    assert named(prompt, said("return 6", ok=None), wrong) == "rephrasing", "nobody knows of the baseline's"
    assert named(prompt, right, said("return 2+2", ok=True)) == "rephrasing"


def test_numbers_are_compared_where_nothing_is_checked() -> None:
    prompt = asked(form="number")
    assert named(prompt, said("About 1,200 birds."), said("About 1300 birds.")) == "wrong_number"
    assert named(prompt, said("About 1,200 birds."), said("Some 1200 birds.")) == "rephrasing"
    assert named(asked(), said("About 1,200 birds."), said("About 1300 birds.")) == "rephrasing"


def test_the_baselines_own_text_is_only_looked_at_for_what_it_shows_itself() -> None:
    assert symptom(WHAT, BASELINE, BASELINE) is None
    assert symptom(WHAT, said(BASELINE.text, ok=True), said(BASELINE.text, ok=False)) is None
    loop = said("It is very very very very", finish="length")
    assert named(asked(), loop, loop) == "repetition_loop"


def test_no_answer_has_no_symptom_and_beside_none_it_stands_alone() -> None:
    failed = Answer("p", "awq", error="connection refused")
    assert symptom(asked(), RIGHT, failed) is None
    assert symptom(asked(), failed, said("The farm was open.")) is None
    assert named(asked(), failed, said("very " * 9)) == "repetition_loop"


def test_the_graver_one_is_told() -> None:
    assert tuple(DETECTORS) == SYMPTOMS
    assert frozenset(SYMPTOMS) - ISSUES == {"rephrasing"}
    prompt = asked(category="long_context", check="numeric", form="number")
    text = "я не могу сказать"
    right, wrong = said("It was 42.", ok=True), said(text, ok=False)
    assert [name for name, look in DETECTORS.items() if look(prompt, right, wrong)] == [
        "language_break",
        "format_break",
        "broken_long_context",
        "wrong_number",
        "wrong_answer",
        "rephrasing",
    ]
    assert named(prompt, right, wrong) == "language_break"


@given(
    st.text(max_size=200),
    st.text(max_size=200),
    st.lists(st.floats(-30, 0), max_size=40),
    st.sampled_from(["text", "number", "code", "json", "list"]),
    st.sampled_from([True, False, None]),
    st.sampled_from(["stop", "length", None]),
)
def test_it_never_raises_and_every_difference_has_a_name(
    one: str, other: str, logprobs: list[float], form: Form, ok: bool | None, finish: str | None
) -> None:
    prompt = asked(one[:50], form=form)
    answer = Answer("p", "q", text=one, logprobs=tuple(logprobs), ok=ok, finish_reason=finish)
    baseline = Answer("p", "b", text=other, logprobs=tuple(logprobs[::2]), ok=True, finish_reason="stop")
    found = symptom(prompt, baseline, answer)
    assert found is not None or one == other
    assert found is None or (found.name in SYMPTOMS and found.why)
    symptom(prompt, None, answer)


@pytest.mark.parametrize(
    "text",
    [
        "a " * 50_000,
        "1 2 " * 25_000,
        "ab" * 50_000,
        ", " * 50_000,
        "[" * 100_000,
        "```json" + "\n" * 99_000,
        "aab" * 33_000,
    ],
    ids=lambda text: text[:8],
)
def test_work_on_a_long_answer_is_linear(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: what the prefix tables are asked for is a few times the text's length."""
    asked_for = 0
    plain = loops._alike

    def counted(items: list[str]) -> list[int]:
        nonlocal asked_for
        asked_for += len(items)
        return plain(items)

    monkeypatch.setattr(loops, "_alike", counted)
    for form in ("text", "json"):
        symptom(asked(form=form), RIGHT, said(text, ok=False))
    assert asked_for <= 40 * len(text)
