"""What is wrong with an answer: one word for it, found by rules that a person can apply by reading.

`symptom` gives an answer the gravest of the symptoms below that it has: where two fit, the one that stands first wins.
A reader who has only these definitions should come to the same labels. Those marked * are seen without a baseline too;
all others compare with the baseline's answer to the same prompt.

Words are counted so: a run of letters or digits is one (`swapcase`, `42`), each character is one in scripts written
without spaces, signs (, . + = [ ]) are none. Capitals make no difference.

repetition_loop *
    The same words again and again in a row: a unit of two words or more at least 3 times; one word at least 4 times; a
    number, a sign, or a piece of a word ("phphph...") at least 8 times (digits of one number: 32 times). And the loop
    goes on to the end of the answer, with one more word at the most, or it is more than half of the answer's words.
    Signs between the repeats make no difference. Count where the loop is seen best: "First Eva, then Eva, then Eva,
    then Eva." has "then Eva" 3 times; "First Eva, then Eva, then Eva." is no loop. A loop of signs or pieces of a
    word has to be at the end. In code (a prompt of category or form code) lines may be alike: 6 times for words, 16
    for signs.
    A loop that only counts ("Step 4: add one. Step 5: add one. ...") needs 6 repeats and two words that are no number.
    Items of one shape with another word in each ("The cat is black. The cat is white.") are no loop. Nor is what was
    asked for: the words stand in the prompt, and so many times or more ("20 times"); or the baseline, ending by
    itself, repeats the same words at least half as often.
token_collapse *
    The text has come apart: a reader who knows the language, but not the right answer, stumbles at least twice within
    ten words. One stumbles at each break:
    - characters that are no text: the replacement character, control characters, pieces of a chat template;
    - a word that is no word: a fragment, words glued together ("PaulThe", "2is", "sack,The"), scripts mixed in a word;
    - a word or a phrase said again at once ("in in", "is in the is in the"; over and over it is still one break), marks
      that cannot follow each other (",,");
    - two neighbours that can follow each other in no sentence, formula or code of that kind ("of in what", "10 + + 2"):
      each such place is a break.
    An answer of fewer than five words is too short to tell from a wrong word: only characters that are no text, a tenth
    of it or more, make it a collapse. None of these is one: what is wrong but well formed ("The capital is Rome.",
    "First Eva, then Eva, then Rosa."); an answer that just ends too soon, and a cut end is no break; one slip in a
    sound answer ("The market market was ready this week."); another language that can be read.
language_break
    It can be read, but not in this language: two letters or more of a script that neither the prompt nor the baseline's
    answer has (Greek letters that stand alone are mathematics), or at least three different words, and a tenth of all,
    with accented letters that neither has. Another language in plain letters is not seen.
never_stop *
    It was cut at the limit of tokens, and the baseline's ended by itself.
early_stop
    It ended by itself, is not judged right, and: has no word at all *; or is the beginning of the baseline's answer; or
    is shorter than that and breaks off (something opened is not closed, it ends in a comma or an operator, or it has
    five words or more and no mark at its end where the baseline's has one); or has less than a quarter of the words of
    a baseline's answer of twenty or more. A short answer that says all is none.
format_break *
    The form that the prompt asks for is not kept, and the baseline keeps it: json that does not parse, a number without
    a digit, a list of less than two items, code without anything that could be code.
refusal *
    It declines ("I'm sorry, but I can't help with that", "As an AI ...", in its first 200 characters), is not judged
    right, and the baseline does not decline. Known in English only.
broken_long_context
    A prompt of category long_context, judged wrong, and the baseline's is right.
wrong_number
    A numeric check, judged wrong, and the baseline's is right; or other numbers than the baseline's where the form is a
    number and nothing is checked.
wrong_code
    A python check, judged wrong, and the baseline's is right.
wrong_answer
    Any other check, judged wrong, and the baseline's is right.
rephrasing
    Another text than the baseline's and none of the above: judged right, or not judged, or wrong as the baseline's is.
    No issue.

How a collapse is seen without understanding a word: two breaks within ten words that letters and signs alone show
(`breaks.py`); or nine points, of which a break is three, and each of 12 tokens in a row one if the model was unsure of
it (ln p of the chosen one below -1) and two if it was lost (below -2). What the baseline's own answer has of both is
taken off, so that a model that is often unsure is measured by its own standard. Without log-probabilities only what
shows is found. The thresholds were set on answers of the demo model rounded to 2 and 3 bits, and on made ones; two
breaks are in 0.3 % of sound pieces of manuals of up to 120 words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from harness.analysis.breaks import breaks, debris, scripts
from harness.analysis.loops import WORD, digits_alike, sign_loop, word_loop, words
from harness.quality.prompts import Form, Prompt
from harness.records import Answer

SymptomName = Literal[
    "repetition_loop",
    "token_collapse",
    "language_break",
    "never_stop",
    "early_stop",
    "format_break",
    "refusal",
    "broken_long_context",
    "wrong_number",
    "wrong_code",
    "wrong_answer",
    "rephrasing",
]
SYMPTOMS: tuple[SymptomName, ...] = get_args(SymptomName)
"""The gravest first."""
ISSUES = frozenset(SYMPTOMS) - {"rephrasing"}

UNSURE, LOST = -1.0, -2.0
"""ln p of a chosen token (37 %, 14 %) below which the model did not know how to go on, or not at all."""
TOKENS_SEEN, WORDS_SEEN = 12, 10
"""Length of the stretch that is looked at as one."""
ORDINARY = 6
"""Points of a stretch of a sound answer in free words, where there is no baseline to tell."""
A_BREAK, APART = 3, 9
"""Points of a break, and those from which a text has come apart."""
TOO_SHORT = 5
"""Words below which an answer is too short to have collapsed."""

NUMBERS = {word: at for at, word in enumerate("four five six seven eight nine ten eleven twelve".split(), 4)}
NUMBERS |= {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "a hundred": 100}
TIMES = re.compile(
    rf"\b(\d{{1,9}}|{'|'.join(NUMBERS)})\s?(?:times|copies|lines|x\b|×|mal\b|fois|veces|vezes|volte|раз|次|回|遍)",
    re.IGNORECASE,
)
DECLINES = re.compile(
    r"\b(i|we)['’ ]?(a?m|a?re)? ?(very |so )?(sorry|unable|not able|cannot|can not|can['’]?t|won['’]?t|must decline)\b"
    r"|\bas an? (ai|artificial|language model)\b|\bi (do not|don['’]?t) have (enough|access)\b"
)


@dataclass(frozen=True, slots=True)
class Symptom:
    """What is wrong with an answer, and why it is called so, with figures."""

    name: SymptomName
    why: str


def symptom(prompt: Prompt, baseline: Answer | None, answer: Answer) -> Symptom | None:
    """The gravest symptom of an answer; None: it is the baseline's own text and nothing is wrong with it, or none came.

    Without a baseline only what a text shows by itself is found, so that the baseline's own answers can be looked at.
    A text that is the same as the baseline's is looked at in that way too.
    """
    if answer.error is not None:
        return None
    if baseline is not None and (baseline.error is not None or baseline.text == answer.text):
        baseline = None
    for name, look in DETECTORS.items():
        if why := look(prompt, baseline, answer):
            return Symptom(name, why)
    return None


# --- loops -----------------------------------------------------------------------------------------------------------


def repetition_loop(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer is a loop; "" if it is none."""
    code = _is_code(prompt)
    spoken = words(answer.text)
    for said, counts in ((spoken, False), ([digits_alike(word) for word in spoken], True)):
        if run := word_loop(said, counts, code):
            if not _allowed(said[run.start : run.start + run.period], run.times, prompt, baseline):
                shown = " ".join(spoken[run.start : run.start + run.period])
                counting = ", only the numbers change" if counts else ""
                return f"'{_short(shown)}' {run.times} times in a row from word {run.start + 1}{counting}"
    if run := sign_loop(answer.text, code):
        piece = answer.text[run.start : run.start + run.period]
        if not (baseline and baseline.finish_reason == "stop" and piece * (run.times // 2) in baseline.text):
            return f"'{_short(piece)}' {run.times} times in a row from character {run.start + 1}"
    return ""


def _allowed(unit: Sequence[str], times: int, prompt: Prompt, baseline: Answer | None) -> bool:
    """Whether the repeats were asked for, or the baseline, which ended by itself, repeats the same as often."""
    counts = (found[1].lower() for found in TIMES.finditer(prompt.prompt))
    asked_for = max((NUMBERS[count] if count in NUMBERS else int(count) for count in counts), default=0)
    if times <= asked_for and set(unit) <= set(words(prompt.prompt)):
        return True
    if baseline is None or baseline.finish_reason != "stop":
        return False
    theirs = [digits_alike(word) for word in words(baseline.text)]
    ours = [digits_alike(word) for word in unit]
    longest = max((_times_in_a_row(theirs, ours[turn:] + ours[:turn]) for turn in range(min(len(ours), 64))), default=0)
    return longest > 1 and 2 * longest >= times


def _times_in_a_row(items: Sequence[str], unit: Sequence[str]) -> int:
    """How often, at most, a unit stands in the items without anything between."""
    joined, piece = "\0" + "\0".join(items) + "\0", "\0".join(unit) + "\0"
    found = re.findall(rf"(?<=\0)(?:{re.escape(piece)})+", joined)
    return max((len(run) // len(piece) for run in found), default=0)


# --- collapse --------------------------------------------------------------------------------------------------------


def token_collapse(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer is no text any more; "" if it is one."""
    no_text = debris(answer.text)
    if no_text and 10 * no_text >= len(answer.text.strip()):
        return f"{no_text} of {len(answer.text)} characters are no text"
    said = words(answer.text)
    if len(said) < TOO_SHORT:
        return ""
    sound = _sound(prompt, baseline)
    broken = _most(breaks(answer.text, sound, prompt.form, _is_code(prompt)), WORDS_SEEN)
    if baseline:
        broken -= _most(breaks(baseline.text, _asked(prompt), prompt.form, _is_code(prompt)), WORDS_SEEN)
    if broken >= 2:
        return f"{broken} breaks within {WORDS_SEEN} words"
    doubt, theirs = _doubt(answer), _doubt(baseline) if baseline else ORDINARY
    if doubt is None or theirs is None:
        return ""
    doubt -= max(0, theirs - 1)
    if doubt + A_BREAK * max(broken, 0) >= APART:
        beside = f", and a break within {WORDS_SEEN} words" if broken > 0 else ""
        return f"{doubt} points of doubt within {TOKENS_SEEN} tokens{beside}"
    return ""


def _doubt(answer: Answer) -> int | None:
    """The most points within a stretch for tokens that the model was unsure of; None: it did not say."""
    if not answer.logprobs:
        return None
    points = [(logprob < UNSURE) + (logprob < LOST) for logprob in answer.logprobs]
    return max(sum(points[at : at + TOKENS_SEEN]) for at in range(len(points)))


def _most(places: Sequence[int], stretch: int) -> int:
    """How many of the places, in order, lie within one stretch of that length, at the most."""
    most = first = 0
    for last, place in enumerate(places):
        while places[first] <= place - stretch:
            first += 1
        most = max(most, last + 1 - first)
    return most


# --- language --------------------------------------------------------------------------------------------------------


def language_break(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer is in another language than prompt and baseline; "" if it is not, or there is no baseline."""
    if baseline is None or not baseline.text.strip():
        return ""
    sound = _sound(prompt, baseline)
    expected = scripts(sound)
    letters = scripts(answer.text)
    for script, times in letters.most_common():
        if script not in expected and times >= 2 and not (script == "GREEK" and _single_letters(answer.text)):
            return f"{times} of {letters.total()} letters are {script.title() if script != 'CJK' else script}"
    said = words(answer.text)
    accented = [word for word in said if _is_accented(word)]
    if len(set(accented)) >= 3 and 10 * len(accented) >= len(said) and not any(map(_is_accented, words(sound))):
        return f"{len(accented)} of {len(said)} words have accented letters, like '{accented[0]}'"
    return ""


def _is_accented(word: str) -> bool:
    return not word.isascii() and set(scripts(word)) == {"LATIN"}


def _single_letters(text: str) -> bool:
    """Whether Greek letters only stand alone, as they do in formulas."""
    return not any(len(word) > 1 and "GREEK" in scripts(word) for word in WORD.findall(text))


# --- where it ends ---------------------------------------------------------------------------------------------------


def never_stop(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer is one that does not stop; "" if it stops, or the baseline's does not either."""
    if answer.finish_reason != "length" or (baseline and baseline.finish_reason == "length"):
        return ""
    beside = f", the baseline's ended after {len(words(baseline.text))} words" if baseline else ""
    return f"cut at {prompt.max_tokens} tokens, {len(words(answer.text))} words{beside}"


def early_stop(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer ended too early; "" if it did not. Without a baseline only one without a word did."""
    if answer.finish_reason == "length" or answer.ok:
        return ""
    said = words(answer.text)
    if not said and not (baseline and not words(baseline.text)):
        return "no word" if not answer.text.strip() else f"no word, only '{_short(answer.text.strip())}'"
    if baseline is None:
        return ""
    theirs = words(baseline.text)
    lengths = f"{len(said)} words, the baseline's {len(theirs)}"
    if len(said) >= len(theirs):
        return ""
    if theirs[: len(said)] == said:
        return f"the beginning of the baseline's answer: {lengths}"
    if how := _breaks_off(baseline.text, answer.text):
        return f"{how}: {lengths}"
    if len(theirs) >= 20 and 4 * len(said) < len(theirs):
        return f"less than a quarter of the baseline's answer: {lengths}"
    return ""


def _breaks_off(whole: str, text: str) -> str:
    """How a text breaks off in a way in which the whole one does not; "" if it does not."""
    if _is_open(text) and not _is_open(whole):
        return "something opened is not closed"
    last, mark = text.rstrip()[-1:], whole.rstrip()[-1:]
    if last in {",", ";", ":", "(", "-", "+", "="} and mark != last:
        return f"ends in '{last}'"
    if len(words(text)) >= TOO_SHORT and mark in {".", "!", "?", "。"} and last.isalnum():
        return "ends without a mark"
    return ""


def _is_open(text: str) -> bool:
    return (
        any(text.count(opened) > text.count(closed) for opened, closed in ("()", "[]", "{}"))
        or text.count("```") % 2 == 1
    )


# --- form ------------------------------------------------------------------------------------------------------------


def format_break(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """How the prompt's form is not kept; "" if it is, or the baseline does not keep it either."""
    keeps, otherwise = FORMS[prompt.form]
    if keeps(answer.text) or (baseline and not keeps(baseline.text)):
        return ""
    return otherwise


def _is_json(text: str) -> bool:
    fenced = re.search(r"```(?:json)?[^\S\n]*\n(.*?)```", text, re.DOTALL)
    try:
        json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_listed(text: str) -> bool:
    """Two lines or more, or two items between commas."""
    return sum(bool(line.strip()) for line in text.splitlines()) >= 2 or bool(re.search(r"\w[,;、]\s?\w", text))


FORMS: Mapping[Form, tuple[Callable[[str], bool], str]] = {
    "text": (lambda text: True, ""),
    "number": (lambda text: bool(re.search(r"\d", text)), "no digit where a number is asked for"),
    "code": (
        lambda text: bool(re.search(r"[()\[\]{}=<>+*/%;]|\b(return|def|print|pass)\b", text)),
        "nothing that could be code",
    ),
    "json": (_is_json, "no JSON"),
    "list": (_is_listed, "less than two items where a list is asked for"),
}
"""How each form is known, and what is said of a text that has it not."""


# --- what it says ----------------------------------------------------------------------------------------------------


def refusal(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """How an answer declines, in English, in its first 200 characters; "" if it does not, or the baseline does too."""
    found = _declining(answer.text)
    if answer.ok or not found or (baseline and _declining(baseline.text)):
        return ""
    return f"'{found}'"


def _declining(text: str) -> str:
    found = DECLINES.search(text[:200].lower())
    return found.group() if found else ""


def broken_long_context(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer lost what a long context holds; "" if it did not."""
    return _turned_wrong(baseline, answer) if prompt.category == "long_context" else ""


def wrong_number(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Which number is wrong; "" if none is. Where nothing is checked, in what is to be a number any other one is."""
    if prompt.check == "numeric":
        return _turned_wrong(baseline, answer)
    if prompt.check == "compare_only" and prompt.form == "number" and baseline:
        ours, theirs = _numbers(answer.text), _numbers(baseline.text)
        return f"{_short(' '.join(ours))} where the baseline has {_short(' '.join(theirs))}" if ours != theirs else ""
    return ""


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))


def wrong_code(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why the code does not do what is asked; "" if it does."""
    return _turned_wrong(baseline, answer) if prompt.check == "python" else ""


def wrong_answer(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """Why an answer is wrong where the baseline's is right; "" if it is not."""
    return _turned_wrong(baseline, answer)


def _turned_wrong(baseline: Answer | None, answer: Answer) -> str:
    if baseline is None or answer.ok is not False or not baseline.ok:
        return ""
    return answer.note or "judged wrong, the baseline's right"


def rephrasing(prompt: Prompt, baseline: Answer | None, answer: Answer) -> str:
    """How far an answer that is no worse goes with the baseline's; "" without one."""
    if baseline is None:
        return ""
    judged = {True: "judged right", False: "judged wrong, as the baseline's is", None: "not judged"}[answer.ok]
    ours, theirs = words(answer.text), words(baseline.text)
    shared = next(
        (at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    return f"{judged}; the same for {shared} words"


DETECTORS: Mapping[SymptomName, Callable[[Prompt, Answer | None, Answer], str]] = {
    "repetition_loop": repetition_loop,
    "token_collapse": token_collapse,
    "language_break": language_break,
    "never_stop": never_stop,
    "early_stop": early_stop,
    "format_break": format_break,
    "refusal": refusal,
    "broken_long_context": broken_long_context,
    "wrong_number": wrong_number,
    "wrong_code": wrong_code,
    "wrong_answer": wrong_answer,
    "rephrasing": rephrasing,
}
"""In the order of SYMPTOMS."""


def _asked(prompt: Prompt) -> str:
    return "\n".join((prompt.system, *prompt.before, prompt.prompt, prompt.prefix))


def _sound(prompt: Prompt, baseline: Answer | None) -> str:
    """What an answer may well take up: the prompt's words and the baseline's."""
    return f"{_asked(prompt)}\n{baseline.text if baseline else ''}"


def _is_code(prompt: Prompt) -> bool:
    return prompt.form == "code" or prompt.category == "code"


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
