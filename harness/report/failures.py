"""failures.md: what breaks in the answers, for a client; failures.csv and families.csv behind it.

Words and tables only: pairs, intervals and examples come from harness.analysis. What a model wrote is quoted in a fence
longer than any inside it, with whatever has no shape on paper spelled out, so it can neither break out nor turn the
text around.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from harness.analysis.evidence import (
    NEGLIGIBLE,
    Evidence,
    drop_words,
    p_words,
    points,
    prompts_needed,
    wrong_words,
)
from harness.analysis.failures import DECIDED, SymptomCount, examples, symptom_counts
from harness.analysis.gate import ALL
from harness.quality.directory import Quality
from harness.quality.prompts import Prompt
from harness.records import Answer, Failure, Outcomes, write_table
from harness.report.page import write_page
from harness.report.tables import escape, listed, named, number, table

SHOWN_HEAD, SHOWN_TAIL = 900, 400
"""Characters of a long text that are quoted, from its beginning and its end: a wrong result often stands last."""

MEANINGS = {
    "repetition_loop": "the same words again and again, to the end or for more than half of the answer",
    "token_collapse": "the text has come apart: no words, or words that cannot follow each other",
    "language_break": "readable, but in another language or script",
    "never_stop": "cut at its limit where the baseline's ended by itself",
    "early_stop": "it ended before it had answered",
    "format_break": "the form that was asked for (JSON, a number, a list, code) is not kept",
    "refusal": "it declines",
    "broken_long_context": "wrong about what stands far back in a long prompt, and the baseline's is right",
    "wrong_number": "well formed, with another number, and the baseline's is right",
    "wrong_code": "code that fails its tests, and the baseline's passes",
    "wrong_answer": "wrong in any other way, and the baseline's is right",
    "rephrasing": "other words, and nothing of the above: no issue",
}
"""What each symptom means, in a line, the gravest first; analysis/symptoms.py has the definitions."""


def write_failures(quality: Quality, evidence: Evidence, out_dir: Path) -> list[Path]:
    """Write failures.md, failures.csv and families.csv into `out_dir`, the page first."""
    tables = []
    for name, rows, record in (
        ("failures.csv", evidence.failures, Failure),
        ("families.csv", evidence.outcomes, Outcomes),
    ):
        write_table(out_dir / name, rows, record)
        tables.append(out_dir / name)
    order = sorted(evidence.precisions, key=lambda name: -(_drop(evidence.whole(name))))
    page = write_page(
        "failures.md.j2",
        out_dir / "failures.md",
        title=f"{line(quality.settings.get('model') or 'unnamed model')}, "
        f"{listed([named(name) for name in evidence.precisions])} against {named(evidence.baseline)}",
        findings=[finding(evidence, name) for name in order],
        noise=noise_words(evidence),
        caution=_many(evidence),
        families=families_table(evidence),
        prompts=line(quality.prompts.description) if quality.prompts else "",
        symptoms=symptoms_table(evidence),
        examples=_examples(quality, evidence),
        not_judged=not_judged(quality),
        meanings=[
            f"**{symptom.replace('_', ' ')}**: {words}."
            for symptom, words in MEANINGS.items()
            if symptom in _seen(evidence)
        ],
        name=line(quality.name),
    )
    return [page, *tables]


# --- text from outside ------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Whatever has no shape on paper (control characters, marks of direction) by its number: ⟨U+202E⟩."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)


def line(text: object) -> str:
    """Text from outside within a sentence or a table."""
    return escape(visible(str(text)))


def quoted(text: str) -> str:
    """Text from outside as a block that shows it literally, whatever it holds; the middle of a long one left out."""
    shown = visible(text)
    if len(shown) > SHOWN_HEAD + SHOWN_TAIL + 100:
        left_out = len(shown) - SHOWN_HEAD - SHOWN_TAIL
        shown = f"{shown[:SHOWN_HEAD]}\n[… {left_out:,} characters left out …]\n{shown[-SHOWN_TAIL:]}"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


# --- what was found ---------------------------------------------------------------------------------------------------


def finding(evidence: Evidence, precision: str) -> str:
    """Whether a precision fails more than the baseline, and where, with what decides it."""
    name, base, whole = named(precision), named(evidence.baseline), evidence.whole(precision)
    if whole is None:
        return f"**{name}: no answer that both gave could be judged.** {_issues(evidence, precision)}".rstrip()
    figures = f"{wrong_words(whole)}, McNemar {p_words(whole.p_value)}, {drop_words(whole)} of accuracy lost"
    if evidence.decided(whole):
        verb = "more" if (whole.drop or 0.0) > 0 else "less"
        said = f"{name} fails {verb} than {base}: {figures}."
    elif whole.drop_hi is not None and whole.drop_hi <= NEGLIGIBLE:
        said = f"{name} answers as well as {base}: {figures}; the whole interval is below {points(NEGLIGIBLE)} pp."
    else:
        said = f"Whether {name} fails more than {base} is not decided: {figures}.{_needed(whole)}"
    return " ".join(part for part in (f"**{said}**", _where(evidence, precision), _issues(evidence, precision)) if part)


def _where(evidence: Evidence, precision: str) -> str:
    """The family in which most is lost, and the others that are decided."""
    worst = evidence.worst(precision)
    told = [worst] if worst else []
    told += [row for row in evidence.families(precision) if row is not worst and evidence.decided(row)]
    words = [
        f"{line(row.family)} ({wrong_words(row)}, {p_words(row.p_value)}, {drop_words(row)}"
        f"{'' if evidence.decided(row) else '; not decided'})"
        for row in told
    ]
    if not words:
        return "It loses in no family."
    opening = "Most is lost in" if worst else "Told apart in"
    needed = _needed(worst) if worst and not evidence.decided(worst) else ""
    return f"{opening} {'; '.join(words)}.{needed}"


def _needed(outcome: Outcomes) -> str:
    count = prompts_needed(outcome)
    if count is None:
        return " As many are lost as won."
    if count <= outcome.items:
        return " More prompts of this family would tell."
    return f" If the difference is as large as it looks, about {count:,} prompts would show it."


def _issues(evidence: Evidence, precision: str) -> str:
    own = [row for row in evidence.failures if row.precision == precision and row.answered]
    found = len(evidence.issues(precision))
    if not own:
        return ""
    verb = "has" if found == 1 else "have"
    return f"{found} of its {len(own)} answers {verb} an issue that {named(evidence.baseline)}'s has not."


def changes(evidence: Evidence, precision: str) -> tuple[int, int, int, int]:
    """Of a precision's answers: how many, how many differ from the baseline's, change sides, have an issue."""
    own = [row for row in evidence.failures if row.precision == precision and row.answered]
    flips = sum(row.bf16_ok is not None and row.quant_ok is not None and row.bf16_ok != row.quant_ok for row in own)
    return len(own), sum(row.divergence_token is not None for row in own), flips, len(evidence.issues(precision))


def noise_words(evidence: Evidence) -> list[str]:
    """The engine's own nondeterminism, beside what each precision changes."""
    base = named(evidence.baseline)
    asked, differ, flips, issues = changes(evidence, evidence.baseline)
    if not asked:
        return [f"{base} was asked once, so what the engine changes by itself is not known."]
    said = [
        f"{base} asked twice, in another order: {differ} of {asked} answers differ, {flips} "
        f"{'changes' if flips == 1 else 'change'} between right and wrong, {issues} "
        f"{'has' if issues == 1 else 'have'} an issue. That much the engine does by itself."
    ]
    told = []
    for precision in evidence.precisions:
        count, other, turned, wrong = changes(evidence, precision)
        if count:
            told.append(f"{named(precision)} {other} of {count}, {turned} and {wrong}")
    said += [f"The same of the others: {'; '.join(told)}."] if told else []
    for precision in evidence.precisions:
        if more := evidence.beyond_noise(precision):
            which = " and ".join(f"{one.what} ({one.count}/{one.out_of} against {one.base_count}/{one.base_out_of}, "
                                 f"Fisher {p_words(one.p_value)})" for one in more)  # fmt: skip
            said.append(f"{named(precision)} has more than that: {which}.")
        elif any(one.precision == precision for one in evidence.noise):
            said.append(f"That {named(precision)} has more flips or issues than that is not shown.")
    return said


def _many(evidence: Evidence) -> str:
    tests = sum(row.p_value is not None for row in evidence.outcomes)
    if tests < 2:
        return ""
    return (
        f"The column has each test's own p. Of {tests} tests one in twenty falls below {DECIDED} by chance, so a "
        "family is called decided only where p stays below it after Holm's correction over the families of its "
        "precision."
    )


def called(evidence: Evidence, precision: str) -> str:
    """Its name; a row of the baseline is about its second round."""
    return f"{named(precision)}{' again' if precision == evidence.baseline else ''}"


def drop_cell(outcome: Outcomes) -> str:
    """The same in a column that says pp."""
    return drop_words(outcome).replace(" pp", "")


def families_table(evidence: Evidence) -> str:
    header = ("Precision", "Family", "Judged", f"{named(evidence.baseline)} right", "Right", "Right → wrong",
              "Wrong → right", "Lost, pp [95 %]", "p", "Issues")  # fmt: skip
    rows = []
    for row in evidence.outcomes:
        rows.append((
            called(evidence, row.precision), f"**{row.family}**" if row.family == ALL else line(row.family),
            str(row.items), share(row.base_right, row.items), share(row.right, row.items), str(row.right_to_wrong),
            str(row.wrong_to_right), drop_cell(row), p_cell(row.p_value),
            f"{row.issues} of {row.answered}" if row.answered else "",
        ))  # fmt: skip
    return table(header, rows, ("Precision", "Family")) if rows else ""


def p_cell(p_value: float | None) -> str:
    """A p-value in a column that says p."""
    return "" if p_value is None else p_words(p_value).removeprefix("p = ").removeprefix("p ")


def share(right: int, items: int) -> str:
    """26 (87 %)"""
    return f"{right} ({right / items:.0%})".replace("%", " %") if items else ""


def symptoms_table(evidence: Evidence) -> str:
    """How often each precision shows each symptom: issues, and what is none after a plus."""
    counts = {
        (count.precision, count.symptom): count for count in symptom_counts(evidence.failures) if count.family == ALL
    }
    columns = [name for name in (*evidence.precisions, evidence.baseline) if any(name == key for key, _ in counts)]
    names = [called(evidence, name) for name in columns]
    rows = []
    for symptom in _seen(evidence):
        found = [counts.get((precision, symptom)) for precision in columns]
        rows.append((symptom.replace("_", " "), *(_symptom_cell(count) for count in found)))
    return table(("Symptom", *names), rows, ("Symptom",)) if rows else ""


def _symptom_cell(count: SymptomCount | None) -> str:
    if count is None:
        return "0"
    return f"{count.issues} + {count.shown - count.issues}" if count.shown > count.issues else str(count.issues)


def _seen(evidence: Evidence) -> list[str]:
    """Symptoms of any answer, the gravest first."""
    shown = {row.symptom for row in evidence.failures}
    return [symptom for symptom in MEANINGS if symptom in shown]


# --- examples, and what is not there ----------------------------------------------------------------------------------


def _examples(quality: Quality, evidence: Evidence) -> list[dict[str, str]]:
    own = [row for row in evidence.failures if row.precision != evidence.baseline]
    chosen = examples(own, quality.answers, quality.prompts)
    return [told for at, row in enumerate(chosen, start=1) if (told := _example(quality, row, at))]


def _example(quality: Quality, row: Failure, at: int) -> dict[str, str] | None:
    """One example as the page shows it; None where a text of it is not there."""
    prompt = (
        next((one for one in quality.prompts.prompts if one.id == row.prompt_id), None) if quality.prompts else None
    )
    texts = {
        answer.precision: answer
        for answer in quality.answers
        if answer.prompt_id == row.prompt_id and answer.round == 1
    }
    baseline = quality.baseline
    if prompt is None or baseline not in texts or row.precision not in texts:
        return None
    base, own = texts[baseline], texts[row.precision]
    where = "" if row.divergence_token is None else f"The first token that differs is number {row.divergence_token + 1}"
    if where and row.kl_at_divergence is not None:
        where += f"; there the two distributions are {number(row.kl_at_divergence)} nats apart (KL)"
    return {
        "title": f"{at}. {named(row.precision)}, {line(row.category)} ({line(row.prompt_id)}): "
        f"{line((row.symptom or 'another answer').replace('_', ' '))}",
        "asked": quoted(_asked(prompt)),
        "expected": _expected(prompt),
        "base": f"{named(baseline)} answered{_judged(base)}:",
        "base_text": quoted(base.text) if base.text else "*nothing*",
        "own": f"{named(row.precision)} answered{_judged(own)}:",
        "own_text": quoted(own.text) if own.text else "*nothing*",
        "why": f"{line(row.notes)}. {where + '.' if where else ''}".removeprefix(". ").rstrip(),
    }


def _asked(prompt: Prompt) -> str:
    messages = prompt.messages
    if len(messages) == 1:
        return prompt.prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _expected(prompt: Prompt) -> str:
    if prompt.check == "compare_only":
        return "Nothing decides what is right here: the two are compared."
    if prompt.check == "python":
        return "Right is what passes this prompt's tests."
    joined = {"exact": " or ", "contains_all": " and "}.get(prompt.check, ", ")
    return f"Right is ({prompt.check.replace('_', ' ')}): {line(joined.join(prompt.expect))}"


def _judged(answer: Answer) -> str:
    return {True: " (right)", False: " (wrong)", None: " (not judged)"}[answer.ok]


def not_judged(quality: Quality) -> list[str]:
    """Which answers say nothing about right and wrong, and why."""
    if quality.prompts is None:
        return ["No set of prompts is there: nothing was asked."]
    checks = {prompt.id: prompt.check for prompt in quality.prompts.prompts}
    said = []
    compared = sum(check == "compare_only" for check in checks.values())
    if compared:
        said.append(f"Prompts without a right answer, which compare only: {compared} of {len(checks)}.")
    reasons: Counter[tuple[str, str]] = Counter()
    for answer in quality.answers:
        if answer.error is not None:
            reasons[answer.precision, f"no answer: {answer.error}"] += 1
        elif answer.ok is None and checks.get(answer.prompt_id) != "compare_only":
            reasons[answer.precision, answer.note or "no reason given"] += 1
    said += [f"{named(name)}: {count} answers, {line(why)}." for (name, why), count in reasons.items()]
    return said or ["Every answer was judged."]


def _drop(outcome: Outcomes | None) -> float:
    return outcome.drop if outcome and outcome.drop is not None else float("-inf")
