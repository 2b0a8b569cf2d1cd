"""What capacity.md says of the answers: a line for each precision, and what a correct one costs, in words."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.correct import CorrectLine
from harness.analysis.evidence import Evidence, points
from harness.analysis.paired import wilson
from harness.analysis.sides import percent
from harness.report.failures import drop_cell, p_cell
from harness.report.tables import correct_price, escape, interval, named, table

WORDS = ("Precision", "Gate")


def quality_table(evidence: Evidence, correct: Sequence[CorrectLine], order: Sequence[str]) -> str:
    """Accuracy, what was lost, distance, issues, the gate and the price of 1,000 correct answers, a line a precision.

    `order`: the precisions of the run; one that was compared and not served comes after them.
    """
    prices = {line.precision: line for line in correct}
    compared = (evidence.baseline, *evidence.precisions)
    names = [*(name for name in order if name in compared), *(name for name in compared if name not in order)]
    header = ("Precision", "Right", "Accuracy [95 %]", "Lost, pp [95 %]", "p", "KL, nats [95 %]", "Issues", "Gate",
              "USD/1,000 correct answers")  # fmt: skip
    rows = [_row(evidence, name, prices.get(name)) for name in names]
    used = [at for at in range(len(header)) if at < 3 or any(row[at] for row in rows)]
    return table([header[at] for at in used], [[row[at] for at in used] for row in rows], WORDS)


def _row(evidence: Evidence, precision: str, price: CorrectLine | None) -> tuple[str, ...]:
    right, items = evidence.counted(precision)
    low, high = wilson(right, items) if items else (None, None)
    base = precision == evidence.baseline
    whole, distance = (None, None) if base else (evidence.whole(precision), evidence.whole_fidelity(precision))
    passed = evidence.passed(precision)
    return (
        named(precision),
        f"{right} of {items}" if items else "",
        _shares(right / items, low, high) if items else "",
        drop_cell(whole) if whole else "",
        p_cell(whole.p_value) if whole else "",
        interval(distance.kl_nats, distance.kl_nats_lo, distance.kl_nats_hi) if distance else "",
        "" if whole is None else f"{whole.issues} of {whole.answered}",
        "" if passed is None else "ship" if passed else "**do not ship**",
        "" if price is None else correct_price(price),
    )


def quality_notes(evidence: Evidence, correct: Sequence[CorrectLine]) -> list[str]:
    """What the gate refused, and from which accuracy on each precision is the cheaper one for a correct answer."""
    refused = [
        f"{named(name)}: {escape(refusal)}." for name in evidence.precisions if (refusal := evidence.refusal(name))
    ]
    told = [break_even_words(line, evidence.baseline) for line in correct]
    return [*refused, *(sentence for sentence in told if sentence)]


def break_even_words(line: CorrectLine, baseline: str) -> str:
    """Cheaper or dearer for each correct answer, by what it has to keep of the baseline's accuracy and what it does."""
    if line.break_even is None or line.kept is None or line.kept_lo is None or line.kept_hi is None:
        return ""
    name, base = named(line.precision), named(baseline)
    kept = f"{percent(line.kept)} [{percent(line.kept_lo)} to {percent(line.kept_hi)}]"
    if line.kept_lo > line.break_even:
        said = "so it does"
    elif line.kept_hi < line.break_even:
        said = "so its correct answers are the dearer ones"
    else:
        said = "so which of the two does is not decided"
    return (
        f"An answer of {name}, right or wrong, costs {percent(line.break_even)} of one of {base}: {name} gives the "
        f"cheaper correct answers while it keeps more than {percent(line.break_even)} of {base}'s accuracy. On the "
        f"same prompts it keeps {kept}, {said} (speeds as measured; their own intervals are not in it)."
    )


def _shares(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{points(value)} %"
    return f"{points(value)} [{points(low)}–{points(high)}] %"
