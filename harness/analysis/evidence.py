"""All that was seen of the answers of some precisions, gathered once: what every paper may say of quality.

It is about the answers alone. What the same precisions carry and cost is the sweep's, and correct.py joins the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.analysis.failures import Noise, Pattern
from harness.analysis.gate import ALL, GateLine
from harness.analysis.paired import mcnemar, paired_difference
from harness.analysis.percentiles import Z95
from harness.records import Failure, Fidelity, Outcomes

NEGLIGIBLE = 0.01
"""A drop of accuracy that is called none: 1 percentage point. Two precisions answer equally well where the whole 95 %
interval of their drop is below it (non-inferiority); not where a test merely fails to tell them apart."""
POWER_Z = 0.8416212335729143
"""The normal quantile of a power of 80 %."""
EIGHT_BIT = {"int8", "fp8", "w8a8", "w8a16", "8bit", "smoothquant"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rows about each quantized precision beside the baseline; those named like the baseline are of its repeat, which
    tells what the engine changes by itself."""

    baseline: str
    precisions: tuple[str, ...]
    """The quantized ones, in their order."""
    outcomes: Sequence[Outcomes] = ()
    failures: Sequence[Failure] = ()
    fidelity: Sequence[Fidelity] = ()
    """Over the whole context, a row each."""
    patterns: Sequence[Pattern] = ()
    """The families that the pairs decide, and `all` if it is."""
    noise: Sequence[Noise] = ()
    """Flips and issues beside those of the baseline asked twice."""
    gate: Sequence[GateLine] = ()
    gate_words: str = ""
    """As it was given; "" where none was."""
    right: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """Of each precision: whether it has an item (a prompt, a document of a task) right."""

    def whole(self, precision: str) -> Outcomes | None:
        """Its row over all prompts; None where nothing was judged."""
        return next(
            (row for row in self.outcomes if (row.precision, row.family) == (precision, ALL) and row.items), None
        )

    def counted(self, precision: str) -> tuple[int, int]:
        """(right, judged) of all prompts; of the baseline, on the most that it was compared on."""
        if precision != self.baseline:
            row = self.whole(precision)
            return (row.right, row.items) if row else (0, 0)
        rows = [row for name in self.precisions if (row := self.whole(name))]
        most = max(rows, key=lambda row: row.items, default=None)
        return (most.base_right, most.items) if most else (0, 0)

    def families(self, precision: str) -> list[Outcomes]:
        return [row for row in self.outcomes if row.precision == precision and row.family != ALL]

    def worst(self, precision: str) -> Outcomes | None:
        """The family in which it loses most; None where it loses in none."""
        lost = [row for row in self.families(precision) if row.drop is not None and row.drop > 0]
        return max(lost, key=lambda row: (row.drop or 0.0, row.drop_lo or 0.0), default=None)

    def decided(self, row: Outcomes) -> bool:
        """Whether the pairs tell the two apart in this family: p < 0.05, after Holm over the precision's families."""
        return any((one.precision, one.family) == (row.precision, row.family) for one in self.patterns)

    def beyond_noise(self, precision: str) -> list[Noise]:
        """Of all prompts: flips and issues that are more than the engine's own."""
        return [one for one in self.noise if (one.precision, one.family) == (precision, ALL) and one.beyond]

    def whole_fidelity(self, precision: str) -> Fidelity | None:
        return next((row for row in self.fidelity if row.precision == precision), None)

    def issues(self, precision: str) -> list[Failure]:
        return [row for row in self.failures if row.precision == precision and row.quant_issue]

    def limits(self, precision: str) -> list[GateLine]:
        """What the gate says of it, limit by limit."""
        return [line for line in self.gate if line.precision == precision]

    def passed(self, precision: str) -> bool | None:
        """Whether it keeps every limit of the gate at the worse end; None where no gate speaks of it."""
        lines = self.limits(precision)
        return all(line.ships for line in lines) if lines else None

    def refusal(self, precision: str) -> str:
        """The limits that it does not keep, in words."""
        return "; ".join(line.words for line in self.limits(precision) if not line.ships)

    def measured(self, precision: str) -> bool:
        return bool(self.whole(precision) or self.whole_fidelity(precision))

    def pair(self, one: str, other: str) -> Outcomes | None:
        """`one` beside `other` as its baseline, on the items that both were judged on; None where there are none."""
        mine, theirs = (self.right.get(name, {}) for name in (one, other))
        shared = [item for item in mine if item in theirs]
        if not shared:
            return None
        lost = sum(theirs[item] and not mine[item] for item in shared)
        won = sum(mine[item] and not theirs[item] for item in shared)
        return Outcomes(
            one, ALL, len(shared), sum(theirs[item] for item in shared), sum(mine[item] for item in shared), lost, won,
            (lost - won) / len(shared), *paired_difference(lost, won, len(shared)), mcnemar(lost, won),
            answered=len(shared),
        )  # fmt: skip

    def eight_bit(self) -> str | None:
        """The first precision whose name says 8 bits."""
        names = (self.baseline, *self.precisions)
        return next((name for name in names if set(re.split(r"[^a-z0-9]+", name.lower())) & EIGHT_BIT), None)


def prompts_needed(outcome: Outcomes) -> int | None:
    """Prompts at which a difference as large as this would be seen by McNemar's test, in 4 of 5 tries.

    n = (z₀.₉₇₅ √ψ + z₀.₈ √(ψ − d²))² / d², ψ the share of pairs that differ and d the drop, both as they were seen
    (R. J. Connor, Biometrics 43, 1987). None where the two do not differ.
    """
    if not outcome.items or outcome.right_to_wrong == outcome.wrong_to_right:
        return None
    apart = (outcome.right_to_wrong + outcome.wrong_to_right) / outcome.items
    drop = (outcome.right_to_wrong - outcome.wrong_to_right) / outcome.items
    return math.ceil((Z95 * math.sqrt(apart) + POWER_Z * math.sqrt(apart - drop * drop)) ** 2 / drop**2)


# --- in words ---------------------------------------------------------------------------------------------------------


def points(share: float) -> str:
    """A share as percentage points: 3.3, −1.1."""
    return f"{100 * share:.1f}".replace("-", "−")


def drop_words(outcome: Outcomes) -> str:
    """What was lost, with its interval: 3.3 pp [−1.1 to 7.7]."""
    if outcome.drop is None:
        return ""
    if outcome.drop_lo is None or outcome.drop_hi is None:
        return f"{points(outcome.drop)} pp"
    return f"{points(outcome.drop)} pp [{points(outcome.drop_lo)} to {points(outcome.drop_hi)}]"


def p_words(p_value: float | None) -> str:
    if p_value is None:
        return "p unknown"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def wrong_words(outcome: Outcomes) -> str:
    """9/30 wrong against 1/30."""
    wrong, base = outcome.items - outcome.right, outcome.items - outcome.base_right
    return f"{wrong}/{outcome.items} wrong against {base}/{outcome.items}"
