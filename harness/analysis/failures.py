"""What breaks: each answer of a precision beside the baseline's, and what the pairs add up to.

    answers ─► failures ─┬─► outcomes ─► patterns, beyond_noise
    samples ─────────────┘       └─► gate.py             failures ─► examples, symptom_counts

A pair counts only where both were answered and judged. The engine's own nondeterminism is not taken off any figure; it
stands beside them under the same formulas: the baseline's second round against its first, in lines that bear the
baseline's name. An accuracy drop needs nothing taken off, for two rounds of one model are exchangeable and flip as many
answers from right to wrong as back. Flips and issues do not cancel: `beyond_noise` says whether a precision has more of
them than the baseline has against itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.stats import fisher_exact

from harness.analysis.gate import ALL, TASK
from harness.analysis.paired import holm, mcnemar, paired_difference
from harness.analysis.quality import coarse_kl, divergence
from harness.analysis.symptoms import ISSUES, SYMPTOMS, symptom
from harness.quality.prompts import Prompt, PromptSet
from harness.records import Answer, Failure, Outcomes, Sample

DECIDED = 0.05
READABLE = 1500
"""Characters of question and both answers that a client reads in an example."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A family in which a precision answers differently well, more than chance explains."""

    precision: str
    family: str
    items: int
    base_wrong: int
    wrong: int
    drop: float
    """Above 0 it fails more than the baseline."""
    p_value: float
    p_holm: float
    """The same as one of as many tests as the precision has families; `all` is one test alone."""
    symptoms: tuple[tuple[str, int], ...] = ()
    """Of its issues in this family, the most frequent first."""


@dataclass(frozen=True, slots=True)
class SymptomCount:
    """How many answers of a precision in a family show a symptom, and how many of them are issues."""

    precision: str
    family: str
    symptom: str
    shown: int
    issues: int


@dataclass(frozen=True, slots=True)
class Noise:
    """Flips or issues of a precision beside those of the baseline asked twice."""

    precision: str
    family: str
    what: Literal["flips", "issues"]
    count: int
    out_of: int
    base_count: int
    base_out_of: int
    p_value: float
    """Fisher's exact test, one-sided: as many more or still more, were the precision only the engine's noise."""

    @property
    def beyond(self) -> bool:
        return self.p_value < DECIDED


def failures(prompts: PromptSet, answers: Sequence[Answer], baseline: str) -> list[Failure]:
    """A line for each precision but the baseline and each prompt; then the baseline's second round, if there is one.

    An issue is a symptom of harness.analysis.symptoms.ISSUES that the baseline's answer does not show by itself, or an
    answer that was right and is wrong now. The same text is never one.
    """
    first = {(answer.precision, answer.prompt_id): answer for answer in answers if answer.round == 1}
    again = {answer.prompt_id: answer for answer in answers if (answer.precision, answer.round) == (baseline, 2)}
    precisions = [name for name in dict.fromkeys(answer.precision for answer in answers) if name != baseline]
    lines = [
        _failure(prompt, precision, first.get((baseline, prompt.id)), first.get((precision, prompt.id)))
        for precision in precisions
        for prompt in prompts.prompts
    ]
    if again:
        lines += [_failure(one, baseline, first.get((baseline, one.id)), again.get(one.id)) for one in prompts.prompts]
    return lines


def outcomes(failures: Sequence[Failure], samples: Sequence[Sample], baseline: str) -> list[Outcomes]:
    """A line for each precision and family: categories in their order, then all prompts, then public tasks.

    The baseline's lines are its second round against its first. Of a task the first metric counts whose values are all
    0 or 1; nobody looks for symptoms there, and `answered` is 0.
    """
    lines = []
    for precision in dict.fromkeys(failure.precision for failure in failures):
        own = [failure for failure in failures if failure.precision == precision]
        for category in dict.fromkeys(failure.category for failure in own):
            lines.append(_prompts_outcome(precision, category, [one for one in own if one.category == category]))
        lines.append(_prompts_outcome(precision, ALL, own))
    judged = _judged(samples)
    for task, precision in judged:
        if precision != baseline and (task, baseline) in judged:
            base, other = judged[task, baseline], judged[task, precision]
            pairs = [(base[document], other[document]) for document in other if document in base]
            lines.append(_outcome(precision, TASK + task, pairs))
    order = {name: at for at, name in enumerate(dict.fromkeys(line.precision for line in lines))}
    return sorted(lines, key=lambda line: order[line.precision])


def beyond_noise(outcomes: Sequence[Outcomes], baseline: str) -> list[Noise]:
    """Flips and issues of each precision and family beside the baseline's own; none where it was asked once.

    The two shares are of the same prompts, and Fisher's test does not use that: it errs towards "not beyond".
    """
    own = {line.family: line for line in outcomes if line.precision == baseline}
    lines = []
    for line in outcomes:
        floor = own.get(line.family)
        if line.precision == baseline or floor is None:
            continue
        if line.items and floor.items:
            lines.append(_noise(line, "flips", _flips(line), line.items, _flips(floor), floor.items))
        if line.answered and floor.answered:
            lines.append(_noise(line, "issues", line.issues, line.answered, floor.issues, floor.answered))
    return lines


def patterns(outcomes: Sequence[Outcomes], failures: Sequence[Failure]) -> list[Pattern]:
    """What the pairs decide: p < 0.05 by McNemar's exact test, after Holm over the families of that precision.

    The most surely decided family first. `all` holds the others and is tested by itself.
    """
    found = []
    for precision in dict.fromkeys(line.precision for line in outcomes):
        judged = [line for line in outcomes if line.precision == precision and line.items]
        parts = [line for line in judged if line.family != ALL]
        adjusted = holm([line.p_value or 0.0 for line in parts])
        tested = [(line, line.p_value or 0.0) for line in judged if line.family == ALL]
        tested += sorted(zip(parts, adjusted, strict=True), key=lambda pair: pair[1])
        found += [_pattern(line, p_holm, failures) for line, p_holm in tested if p_holm < DECIDED]
    return found


def symptom_counts(failures: Iterable[Failure]) -> list[SymptomCount]:
    """By precision, family and symptom; the gravest symptom of a family first, `all` after the categories."""
    shown: Counter[tuple[str, str, str]] = Counter()
    issues: Counter[tuple[str, str, str]] = Counter()
    for failure in failures:
        for family in (failure.category, ALL) if failure.symptom else ():
            key = (failure.precision, family, failure.symptom or "")
            shown[key] += 1
            issues[key] += failure.quant_issue
    precisions = list(dict.fromkeys(precision for precision, _, _ in shown))
    families = [*dict.fromkeys(family for _, family, _ in shown if family != ALL), ALL]
    ordered = sorted(shown, key=lambda key: (precisions.index(key[0]), families.index(key[1]), _gravity(key[2])))
    return [SymptomCount(*key, shown[key], issues[key]) for key in ordered]


def examples(
    failures: Sequence[Failure], answers: Sequence[Answer] = (), prompts: PromptSet | None = None, count: int = 3
) -> list[Failure]:
    """The issues worth showing a client, the gravest first: as many symptoms as possible, one each before a second.

    Preferred, in this order: the baseline is right; question and answers are READABLE (with `answers` and `prompts`);
    the graver symptom; the shorter. Give no lines of the baseline itself: they are noise.
    """
    asked = {prompt.id: len(prompt.prompt) for prompt in prompts.prompts} if prompts else {}
    longest: dict[str, int] = {}
    for answer in answers:
        longest[answer.prompt_id] = max(len(answer.text), longest.get(answer.prompt_id, 0))

    def rank(failure: Failure) -> tuple[bool, bool, int, int, str, str]:
        length = asked.get(failure.prompt_id, 0) + 2 * longest.get(failure.prompt_id, 0)
        gravity = _gravity(failure.symptom)
        return (failure.bf16_ok is not True, length > READABLE, gravity, length, failure.prompt_id, failure.precision)

    ranked = sorted((failure for failure in failures if failure.quant_issue), key=rank)
    chosen: list[Failure] = []
    for taken in (_symptom_of, _prompt_of):  # a new symptom each; then a new prompt each; then whatever is left
        for failure in ranked:
            if len(chosen) < count and taken(failure) not in map(taken, chosen):
                chosen.append(failure)
    chosen += [failure for failure in ranked if failure not in chosen][: count - len(chosen)]
    return sorted(chosen, key=lambda failure: (_gravity(failure.symptom), rank(failure)))


def _symptom_of(failure: Failure) -> str | None:
    return failure.symptom


def _prompt_of(failure: Failure) -> str | None:
    return failure.prompt_id


def _failure(prompt: Prompt, precision: str, base: Answer | None, answer: Answer | None) -> Failure:
    missing = [
        f"not answered by {who}: {(given.error if given else None) or 'not asked'}"
        for who, given in (("the baseline", base), (precision, answer))
        if given is None or given.error is not None
    ]
    base_ok, ok = (given.ok if given and given.error is None else None for given in (base, answer))
    if base is None or answer is None or missing:
        return Failure(precision, prompt.id, prompt.category, base_ok, ok, notes="; ".join(missing), answered=False)
    found, own = symptom(prompt, base, answer), symptom(prompt, None, base)
    new = found is not None and found.name in ISSUES and (own is None or own.name != found.name)
    apart = _apart(base, answer)
    untold = [] if base.tokens and answer.tokens else ["no token ids, so where they part is not known"]
    notes = (found.why if found else "", answer.note, *(untold if base.text != answer.text else []))
    return Failure(
        precision,
        prompt.id,
        prompt.category,
        base_ok,
        ok,
        quant_issue=base.text != answer.text and (new or (base_ok is True and ok is False)),
        symptom=found.name if found else None,
        divergence_token=apart,
        kl_at_divergence=_kl_at(base, answer, apart),
        notes="; ".join(dict.fromkeys(note for note in notes if note)),
    )


def _apart(base: Answer, answer: Answer) -> int | None:
    """None: the same, or not known."""
    return divergence(base.tokens, answer.tokens) if base.tokens and answer.tokens else None


def _kl_at(base: Answer, answer: Answer, apart: int | None) -> float | None:
    """Both have read the same up to there, so their distributions of that token can be compared."""
    if apart is None or apart >= min(len(base.alternatives), len(answer.alternatives)):
        return None
    ours, theirs = base.alternatives[apart], answer.alternatives[apart]
    return coarse_kl(ours, theirs) if ours and theirs else None


def _prompts_outcome(precision: str, family: str, lines: Sequence[Failure]) -> Outcomes:
    pairs = [(one.bf16_ok, one.quant_ok) for one in lines if one.bf16_ok is not None and one.quant_ok is not None]
    both = [one for one in lines if one.answered]
    return _outcome(precision, family, pairs, sum(one.quant_issue for one in both), len(both))


def _outcome(
    precision: str, family: str, pairs: Sequence[tuple[bool, bool]], issues: int = 0, answered: int = 0
) -> Outcomes:
    """Pairs of (the baseline's is right, the precision's is right)."""
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    counted = Outcomes(
        precision,
        family,
        items=len(pairs),
        base_right=sum(base for base, _ in pairs),
        right=sum(right for _, right in pairs),
        right_to_wrong=lost,
        wrong_to_right=gained,
        issues=issues,
        answered=answered,
    )
    if not pairs:
        return counted
    low, high = paired_difference(lost, gained, len(pairs))
    return replace(counted, drop=(lost - gained) / len(pairs), drop_lo=low, drop_hi=high, p_value=mcnemar(lost, gained))


def _judged(samples: Sequence[Sample]) -> dict[tuple[str, str], dict[str, bool]]:
    """(task, precision) -> document -> right, by the task's first metric that is 0 or 1 throughout."""
    broken = {(one.task, one.metric) for one in samples if one.value not in (0, 1)}
    metric: dict[str, str] = {}
    for one in samples:
        if (one.task, one.metric) not in broken:
            metric.setdefault(one.task, one.metric)
    judged: dict[tuple[str, str], dict[str, bool]] = {}
    for one in samples:
        if metric.get(one.task) == one.metric:
            judged.setdefault((one.task, one.precision), {})[one.doc_id] = one.value == 1
    return judged


def _flips(line: Outcomes) -> int:
    return line.right_to_wrong + line.wrong_to_right


def _noise(
    line: Outcomes, what: Literal["flips", "issues"], count: int, out_of: int, base_count: int, base_out_of: int
) -> Noise:
    table = [[count, out_of - count], [base_count, base_out_of - base_count]]
    p_value = float(fisher_exact(table, alternative="greater").pvalue)
    return Noise(line.precision, line.family, what, count, out_of, base_count, base_out_of, p_value)


def _pattern(line: Outcomes, p_holm: float, failures: Iterable[Failure]) -> Pattern:
    seen = Counter(
        failure.symptom
        for failure in failures
        if failure.precision == line.precision
        and line.family in (failure.category, ALL)
        and failure.quant_issue
        and failure.symptom is not None
    )
    return Pattern(
        line.precision,
        line.family,
        line.items,
        line.items - line.base_right,
        line.items - line.right,
        line.drop or 0.0,
        line.p_value or 0.0,
        p_holm,
        tuple(sorted(seen.items(), key=lambda pair: (-pair[1], _gravity(pair[0])))),
    )


def _gravity(name: str | None) -> int:
    """0 is the gravest."""
    return next((at for at, known in enumerate(SYMPTOMS) if known == name), len(SYMPTOMS))
