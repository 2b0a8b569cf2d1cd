"""Failures, families, patterns, noise and examples: small made runs, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import fisher_exact

from harness.analysis import failures as module
from harness.analysis.failures import (
    ALL,
    beyond_noise,
    examples,
    failures,
    outcomes,
    patterns,
    symptom_counts,
)
from harness.analysis.paired import paired_difference
from harness.analysis.symptoms import SYMPTOMS
from harness.quality.prompts import Prompt, PromptSet
from harness.records import Answer, Failure, Outcomes, Sample


def prompt(name: str, category: str = "factual", **given: object) -> Prompt:
    return Prompt(name, category, f"Question {name}?", "exact", ("Rome",), **given)  # type: ignore[arg-type]


def answer(
    name: str, precision: str, text: str, ok: bool | None, tokens: tuple[int, ...] = (), **given: object
) -> Answer:
    made = Answer(name, precision, text=text, tokens=tokens, ok=ok, finish_reason="stop")
    return replace(made, **given)  # type: ignore[arg-type]


def found(*answers: Answer) -> list[Failure]:
    names = list(dict.fromkeys(one.prompt_id for one in answers))
    return failures(PromptSet("made", tuple(map(prompt, names))), answers, "bf16")


LOOP = "The capital is the capital is the capital is the capital is the capital is the capital is the capital is"


def test_right_to_wrong_is_an_issue_and_what_both_get_wrong_is_none() -> None:
    lost, kept, both = found(
        answer("a", "bf16", "Rome", True), answer("a", "awq", "Oslo", False),
        answer("b", "bf16", "Rome", True), answer("b", "awq", "Rome", True),
        answer("c", "bf16", "Bonn", False), answer("c", "awq", "Oslo", False),
    )  # fmt: skip
    assert (lost.bf16_ok, lost.quant_ok, lost.quant_issue, lost.symptom) == (True, False, True, "wrong_answer")
    assert (kept.quant_issue, kept.symptom, kept.divergence_token) == (False, None, None)
    assert (both.quant_issue, both.symptom) == (False, "rephrasing")


def test_a_symptom_that_the_baseline_shows_by_itself_is_no_issue() -> None:
    """Both loop, in other words: the symptom is told, and it is not the precision's."""
    (own,) = found(answer("a", "bf16", "Rome", True), answer("a", "awq", LOOP, False))
    (shared,) = found(answer("a", "bf16", LOOP.replace("capital", "city"), False), answer("a", "awq", LOOP, False))
    (same,) = found(answer("a", "bf16", LOOP, False), answer("a", "awq", LOOP, False))
    assert (own.symptom, own.quant_issue) == ("repetition_loop", True)
    assert not shared.quant_issue
    assert (same.symptom, same.quant_issue) == ("repetition_loop", False)


def test_the_same_text_is_never_an_issue_whatever_its_judge_said() -> None:
    """A sandbox that was too slow once says nothing about a precision."""
    (line,) = found(answer("a", "bf16", "Rome", True), answer("a", "awq", "Rome", False, note="timeout"))
    assert not line.quant_issue and "timeout" in line.notes


def test_where_they_part_and_how_far() -> None:
    """Tokens 5 6 | 5 9: one shared. There bf16 gives 6, 9 and the rest .5, .25, .25, and awq .125, .5, .375:
    KL = .5 ln 4 + .25 ln ½ + .25 ln ⅔ = 0.693147 - 0.173287 - 0.101366 = 0.418494."""
    (line,) = found(
        answer(
            "a", "bf16", "Rome", True, (5, 6), alternatives=(((5, -0.1),), ((6, math.log(0.5)), (9, math.log(0.25))))
        ),
        answer(
            "a", "awq", "Oslo", False, (5, 9), alternatives=(((5, -2.0),), ((9, math.log(0.5)), (6, math.log(0.125))))
        ),
    )
    assert line.divergence_token == 1
    assert line.kl_at_divergence == pytest.approx(0.418494, abs=1e-6)


def test_an_answer_that_begins_the_other_has_no_distribution_to_compare() -> None:
    one = (((5, -0.1),),)
    (line,) = found(
        answer("a", "bf16", "Rome it is", True, (5, 6), alternatives=one * 2),
        answer("a", "awq", "Rome", True, (5,), alternatives=one),
    )
    assert (line.divergence_token, line.kl_at_divergence) == (1, None)


def test_without_token_ids_it_says_that_it_does_not_know() -> None:
    (line,) = found(answer("a", "bf16", "Rome", True), answer("a", "awq", "Oslo", False))
    assert line.divergence_token is None and "no token ids" in line.notes
    (same,) = found(answer("a", "bf16", "Rome", True), answer("a", "awq", "Rome", True))
    assert "no token ids" not in same.notes


def test_what_was_not_answered_is_told_and_not_judged() -> None:
    failed, missing = failures(
        PromptSet("made", (prompt("a"), prompt("b"))),
        [
            answer("a", "bf16", "Rome", True), answer("b", "bf16", "Rome", True),
            answer("a", "awq", "", False, error="HTTP 500"),
        ],
        "bf16",
    )  # fmt: skip
    assert failed.notes == "not answered by awq: HTTP 500" and missing.notes == "not answered by awq: not asked"
    for line in (failed, missing):
        assert (line.bf16_ok, line.quant_ok, line.quant_issue, line.answered) == (True, None, False, False)


def test_a_line_for_each_precision_and_prompt_and_the_baselines_second_round_last() -> None:
    lines = found(
        answer("a", "bf16", "Rome", True), answer("b", "bf16", "Rome", True),
        replace(answer("a", "bf16", "Oslo", False), round=2), replace(answer("b", "bf16", "Rome", True), round=2),
        answer("a", "awq", "Rome", True), answer("b", "awq", "Rome", True),
        answer("a", "gptq", "Rome", True), answer("b", "gptq", "Rome", True),
    )  # fmt: skip
    assert [(line.precision, line.prompt_id) for line in lines] == [
        ("awq", "a"), ("awq", "b"), ("gptq", "a"), ("gptq", "b"), ("bf16", "a"), ("bf16", "b"),
    ]  # fmt: skip
    assert [line.quant_issue for line in lines] == [False] * 4 + [True, False]


# --- what they add up to --------------------------------------------------------------------------------------------


def failure(name: str, base: bool | None, ok: bool | None, category: str = "factual", **given: object) -> Failure:
    made = Failure("awq", name, category, base, ok, quant_issue=base is True and ok is False)
    return replace(made, **given)  # type: ignore[arg-type]


def family(lost: int, gained: int, kept: int, missed: int = 0, category: str = "factual") -> list[Failure]:
    pairs = [(True, False)] * lost + [(False, True)] * gained + [(True, True)] * kept + [(False, False)] * missed
    return [failure(f"{category}-{at}", base, ok, category) for at, (base, ok) in enumerate(pairs)]


def test_outcomes_by_hand() -> None:
    """Ten judged: 4 lost, 1 gained, 3 both right, 2 both wrong; one not judged, one not answered. The baseline has 7
    right, awq 4; the drop is 3/10 and McNemar's p 2 (1 + 5) / 2^5 = 0.375; 4 issues of 11 answered."""
    lines = [
        *family(4, 1, 3, 2), failure("x", None, None), failure("y", True, None, answered=False),
    ]  # fmt: skip
    (part, whole) = outcomes(lines, [], "bf16")
    low, high = paired_difference(4, 1, 10)
    assert part == Outcomes("awq", "factual", 10, 7, 4, 4, 1, 0.3, low, high, pytest.approx(0.375), 4, 11)
    assert whole == replace(part, family=ALL)


def test_families_in_their_order_then_all_then_tasks() -> None:
    samples = [Sample("gsm8k", str(at), name, "exact_match", 1) for at in range(2) for name in ("bf16", "awq", "gptq")]
    lines = outcomes([*family(1, 0, 1, category="reasoning"), *family(0, 1, 2)], samples, "bf16")
    assert [(line.precision, line.family, line.items) for line in lines] == [
        ("awq", "reasoning", 2), ("awq", "factual", 3), ("awq", "all", 5), ("awq", "task:gsm8k", 2),
        ("gptq", "task:gsm8k", 2),
    ]  # fmt: skip
    assert lines[2].drop == 0.0 and lines[3].answered == 0


def test_tasks_pair_by_document_and_take_one_metric() -> None:
    """Documents 1 and 2 are common: bf16 right on both, awq on 2 alone. `f1` is no 0 or 1, `flexible` comes later."""

    def sample(document: int, precision: str, metric: str, value: float) -> Sample:
        return Sample("gsm8k", str(document), precision, metric, value)

    samples = [
        sample(1, "bf16", "f1", 0.7), sample(1, "awq", "f1", 0.0), sample(2, "bf16", "f1", 1.0),
        sample(0, "bf16", "strict", 0), sample(1, "bf16", "strict", 1), sample(2, "bf16", "strict", 1),
        sample(1, "awq", "strict", 0), sample(2, "awq", "strict", 1), sample(3, "awq", "strict", 0),
        sample(1, "awq", "flexible", 1), sample(1, "bf16", "flexible", 0),
    ]  # fmt: skip
    (line,) = outcomes([], samples, "bf16")
    assert (line.items, line.base_right, line.right, line.right_to_wrong, line.drop) == (2, 2, 1, 1, 0.5)
    assert outcomes([], [one for one in samples if one.metric == "f1"], "bf16") == []


def test_nothing_judged_is_no_share() -> None:
    (part, _) = outcomes([failure("a", None, None)], [], "bf16")
    assert (part.items, part.drop, part.drop_lo, part.p_value, part.answered) == (0, None, None, None, 1)


def test_patterns_are_what_holm_leaves() -> None:
    """reasoning loses 8 of 8: p = 2/2^8 = 0.0078, times 2 families 0.0156. factual loses 4 of 4: 0.125. All together
    12 and 0: 2/2^12 = 0.00049, one test alone."""
    lines = [*family(8, 0, 22, category="reasoning"), *family(4, 0, 26)]
    lines[0] = replace(lines[0], symptom="repetition_loop")
    lines[1:3] = [replace(line, symptom="wrong_answer") for line in lines[1:3]]
    lines[9] = replace(lines[9], symptom="rephrasing")
    whole, part = patterns(outcomes(lines, [], "bf16"), lines)
    assert (whole.family, whole.p_holm) == ("all", pytest.approx(2 / 2**12))
    assert (part.family, part.items, part.base_wrong, part.wrong) == ("reasoning", 30, 0, 8)
    assert (part.p_value, part.p_holm) == (pytest.approx(2 / 2**8), pytest.approx(4 / 2**8))
    assert part.drop == pytest.approx(8 / 30)
    assert part.symptoms == (("wrong_answer", 2), ("repetition_loop", 1))


def test_holm_takes_back_what_one_test_would_say() -> None:
    """6 of 6 lost: p = 2/2^6 = 0.031 alone, and 0.062 as one of two families; as the whole it stands."""
    lines = [*family(6, 0, 4, category="reasoning"), *family(0, 0, 10)]
    assert [one.family for one in patterns(outcomes(lines, [], "bf16"), lines)] == ["all"]


def test_a_precision_that_gains_is_a_pattern_too() -> None:
    lines = family(0, 9, 1)
    assert [one.drop for one in patterns(outcomes(lines, [], "bf16"), lines)] == [-0.9, -0.9]


def test_beyond_noise_by_hand() -> None:
    """10 of 30 flip, against 1 of 30 of the baseline against itself. Fisher, one-sided: the tables of 11 flips in 60
    with 10 or 11 in the first 30: (C(30,10) C(30,1) + C(30,11)) / C(60,11) = 0.002764."""
    lines = [*family(9, 1, 20), *(replace(line, precision="bf16") for line in family(1, 0, 29))]
    said = beyond_noise(outcomes(lines, [], "bf16"), "bf16")
    assert {one.precision for one in said} == {"awq"}
    flips = next(one for one in said if (one.what, one.family) == ("flips", ALL))
    expected = (math.comb(30, 10) * 30 + math.comb(30, 11)) / math.comb(60, 11)
    assert (flips.precision, flips.count, flips.out_of, flips.base_count, flips.base_out_of) == ("awq", 10, 30, 1, 30)
    assert flips.p_value == pytest.approx(expected) and flips.beyond
    issues = next(one for one in said if (one.what, one.family) == ("issues", ALL))
    assert (issues.count, issues.base_count) == (9, 1)
    assert issues.p_value == pytest.approx(fisher_exact([[9, 21], [1, 29]], alternative="greater").pvalue)


def test_as_many_flips_as_the_engine_makes_by_itself_are_noise() -> None:
    lines = [*family(2, 1, 27), *(replace(line, precision="bf16") for line in family(1, 2, 27))]
    assert not any(one.beyond for one in beyond_noise(outcomes(lines, [], "bf16"), "bf16"))
    assert beyond_noise(outcomes(family(9, 1, 20), [], "bf16"), "bf16") == []


def test_symptom_counts() -> None:
    lines = [
        failure("a", True, False, symptom="wrong_answer"), failure("b", True, True, symptom="rephrasing"),
        failure("c", True, False, category="code", symptom="repetition_loop"), failure("d", True, True),
        failure("e", False, False, symptom="wrong_answer"),
    ]  # fmt: skip
    assert [(one.family, one.symptom, one.shown, one.issues) for one in symptom_counts(lines)] == [
        ("factual", "wrong_answer", 2, 1), ("factual", "rephrasing", 1, 0), ("code", "repetition_loop", 1, 1),
        (ALL, "repetition_loop", 1, 1), (ALL, "wrong_answer", 2, 1), (ALL, "rephrasing", 1, 0),
    ]  # fmt: skip


# --- what to show -----------------------------------------------------------------------------------------------------


def issue(name: str, symptom: str, base: bool | None = True, precision: str = "awq") -> Failure:
    return Failure(precision, name, "factual", base, False, True, symptom)


def test_three_examples_with_three_symptoms_the_gravest_first() -> None:
    lines = [
        issue("a", "wrong_answer"), issue("b", "wrong_answer"), issue("c", "repetition_loop"),
        issue("d", "token_collapse"), issue("e", "early_stop"), failure("f", True, True, symptom="rephrasing"),
    ]  # fmt: skip
    shown = examples(lines)
    assert [one.prompt_id for one in shown] == ["c", "d", "e"]
    assert examples(lines[::-1]) == shown
    assert SYMPTOMS.index("repetition_loop") < SYMPTOMS.index("token_collapse") < SYMPTOMS.index("early_stop")


def test_where_symptoms_run_out_another_prompt_comes() -> None:
    lines = [issue("a", "wrong_answer"), issue("a", "wrong_answer", precision="gptq"), issue("b", "wrong_answer")]
    assert [(one.prompt_id, one.precision) for one in examples(lines, count=2)] == [("a", "awq"), ("b", "awq")]
    assert examples([failure("f", True, True, symptom="rephrasing")]) == []
    assert len(examples(lines)) == 3 and examples([]) == [] and len(examples(lines, count=1)) == 1


def test_a_right_baseline_is_worth_more_than_a_graver_symptom() -> None:
    lines = [issue("a", "repetition_loop", base=False), issue("b", "wrong_answer")]
    assert [one.prompt_id for one in examples(lines, count=1)] == ["b"]
    assert [one.prompt_id for one in examples(lines, count=2)] == ["a", "b"]  # both: the graver is shown first


def test_what_is_too_long_to_read_comes_last() -> None:
    lines = [issue("a", "wrong_answer"), issue("b", "wrong_answer"), issue("c", "wrong_answer")]
    texts = [answer("a", "awq", "x" * module.READABLE, False), answer("b", "bf16", "x" * 300, True)]
    prompts = PromptSet("made", (prompt("a"), prompt("b"), prompt("c")))
    shown = examples(lines, texts, prompts, count=2)
    assert [one.prompt_id for one in shown] == ["c", "b"]
    graver = [issue("a", "repetition_loop"), issue("b", "wrong_answer")]
    assert [one.prompt_id for one in examples(graver, texts, prompts, count=1)] == ["b"]
    everywhere = PromptSet("made", (replace(prompt("c"), prompt="x" * 2000), prompt("b"), prompt("a")))
    assert [one.prompt_id for one in examples(lines, texts, everywhere, count=1)] == ["b"]
