"""What a correct answer costs: the hour of a card over the right answers that it gives in it.

At the operating point, R = req_s answers a second are completed, of which a share a is right:

    usd_per_1000_correct = H / (R × u × 3600 × a) × 1000          H, u: the hour and its share under load (cost.py)

The sweep's requests are not the prompts that were judged, so a is carried over: the price supposes that the traffic is
answered as well as those were. It supposes too that an answer is as long as the scenario's; where a precision rambles
on, its R is lower than was measured.

a = right / items has Wilson's interval (E. B. Wilson, JASA 1927), and the price has that one turned over. The interval
of the speed is another one and stands beside the speed: the two are of different measurements and are not combined.

Break-even. Let C = H / (R u 3600) be the price of an answer, right or wrong. A quantized precision is the cheaper one
for each correct answer as long as

    C_q / a_q < C_b / a_b     ⇔     a_q / a_b > C_q / C_b

so C_q / C_b is the share of the baseline's accuracy that it has to keep. Beside it stands the ratio of the accuracies
that was measured, of the same prompts, so it is paired: the hybrid Wilson interval of Bonett and Price (Statistics in
Medicine 25, 2006). With x₁, x₂ the right answers of the two, n₁₁ prompts that both have right, b and c that only one
has, and n* = n₁₁ + b + c,

    k = z √((b + c + 2) / ((x₁ + 1)(x₂ + 1))) / (√((1 − (x₁ + 1)/(n* + 2)) / (x₁ + 1)) + √(the same of x₂))

the ends are those of Wilson's intervals of x₁/n* and x₂/n* with k in place of z, divided crosswise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.analysis.capacity import operating_levels
from harness.analysis.compare import Estimate
from harness.analysis.cost import AS_MEASURED, hour_usd
from harness.analysis.levels import load, precision_order
from harness.analysis.paired import wilson
from harness.analysis.percentiles import Z95
from harness.assumptions import Assumptions
from harness.records import Knee, Outcomes, SweepPoint, Verdict


@dataclass(frozen=True, slots=True)
class CorrectLine:
    """US dollars for 1,000 correct answers of one precision at its operating point."""

    precision: str
    family: str = "all"
    """Which prompts its accuracy is of."""
    at: float | None = None
    """The load of the operating point; None: it has none."""
    req_s: float | None = None
    usd_per_hour: float | None = None
    utilisation: float | None = None
    right: int = 0
    items: int = 0
    accuracy: float | None = None
    accuracy_lo: float | None = None
    accuracy_hi: float | None = None
    usd_per_1000_answers: float | None = None
    """Right or wrong."""
    usd_per_1000_correct: float | None = None
    usd_per_1000_correct_lo: float | None = None
    usd_per_1000_correct_hi: float | None = None
    """None beside a price: no share of right answers above 0 is excluded, so neither is any price."""
    break_even: float | None = None
    """The share of the baseline's accuracy from which it is the cheaper one; None for the baseline itself."""
    kept: float | None = None
    """The share of the baseline's accuracy that it has, on the same prompts."""
    kept_lo: float | None = None
    kept_hi: float | None = None
    verdict: Verdict | None = None
    note: str = ""
    """Why there is no price."""


def usd_per_1000_correct(usd_per_hour: float, req_s: float, accuracy: float, utilisation: float = 1.0) -> float | None:
    """0.36 USD an hour, 2 answers a second, always busy, 4 of 5 right: 0.36 / (2 × 3,600 × 0.8) × 1,000 = 0.0625 USD.

    None where nothing is right: no money buys a correct answer.
    """
    right_per_hour = req_s * utilisation * 3600 * accuracy
    return usd_per_hour / right_per_hour * 1000 if right_per_hour > 0 else None


def correct_lines(
    points: Sequence[SweepPoint],
    knees: Sequence[Knee],
    outcomes: Sequence[Outcomes],
    baseline: str,
    assumptions: Assumptions = AS_MEASURED,
    family: str = "all",
) -> list[CorrectLine]:
    """A line for each precision that was judged in `family` and served in the sweep, the baseline first."""
    operating = operating_levels(points, knees)
    judged = {row.precision: row for row in outcomes if row.family == family and row.items}
    counts = _counts(judged, baseline)
    lines = {
        name: _line(name, family, operating.get(name), *counts[name], assumptions)
        for name in precision_order(points)
        if name in counts
    }
    base = lines.get(baseline)
    return [line if base is None or line is base else _against(line, base, judged) for line in lines.values()]


def accuracy_kept(outcome: Outcomes) -> Estimate:
    """The precision's accuracy as a share of the baseline's, on the same prompts, by the formula of the module.

    No value where the baseline has nothing right.
    """
    if not outcome.base_right:
        return Estimate()
    x, y = outcome.right, outcome.base_right
    apart = outcome.right_to_wrong + outcome.wrong_to_right
    whole = y - outcome.right_to_wrong + apart
    spread = math.sqrt((apart + 2) / ((x + 1) * (y + 1)))
    alone = (math.sqrt((1 - (count + 1) / (whole + 2)) / (count + 1)) for count in (x, y))
    k = Z95 * spread / sum(alone)
    (low, high), (base_low, base_high) = wilson(x, whole, k), wilson(y, whole, k)
    return Estimate(x / y, low / base_high, high / base_low)


def _counts(judged: Mapping[str, Outcomes], baseline: str) -> dict[str, tuple[int, int]]:
    """(right, judged) of each precision; of the baseline on the most prompts that it was compared on."""
    counts = {name: (row.right, row.items) for name, row in judged.items() if name != baseline}
    most = max((row for name, row in judged.items() if name != baseline), key=lambda row: row.items, default=None)
    return counts if most is None else {baseline: (most.base_right, most.items), **counts}


def _line(
    name: str, family: str, at: SweepPoint | None, right: int, items: int, assumptions: Assumptions
) -> CorrectLine:
    low, high = wilson(right, items)
    line = CorrectLine(name, family, right=right, items=items, accuracy=right / items, accuracy_lo=low,
                       accuracy_hi=high)  # fmt: skip
    if at is None:
        return replace(line, note="no tested load is safely inside the service level")
    line = replace(line, at=load(at), req_s=at.req_s, verdict=at.verdict)
    hour = hour_usd(assumptions, at)
    if hour is None or not at.req_s:
        return replace(line, note="no price of an hour is given" if hour is None else "requests a second are not known")
    dearest, cheapest, middle = (
        usd_per_1000_correct(hour.usd, at.req_s, share, hour.utilisation) for share in (low, high, right / items)
    )
    return replace(
        line,
        usd_per_hour=hour.usd,
        utilisation=hour.utilisation,
        usd_per_1000_answers=usd_per_1000_correct(hour.usd, at.req_s, 1.0, hour.utilisation),
        usd_per_1000_correct=middle,
        usd_per_1000_correct_lo=cheapest,
        usd_per_1000_correct_hi=dearest,
        note="" if middle is not None else "not one answer was right",
    )


def _against(line: CorrectLine, base: CorrectLine, judged: Mapping[str, Outcomes]) -> CorrectLine:
    kept = accuracy_kept(judged[line.precision])
    line = replace(line, kept=kept.value, kept_lo=kept.lo, kept_hi=kept.hi)
    if line.usd_per_1000_answers is None or not base.usd_per_1000_answers:
        return line
    return replace(line, break_even=line.usd_per_1000_answers / base.usd_per_1000_answers)
