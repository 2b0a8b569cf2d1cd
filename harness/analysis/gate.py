"""The gate: what a precision must keep to be shipped, and whether it does at the worse end of each interval.

    kl<0.02                     nats a token, mean over positions
    perplexity_ratio<1.05       or 5%, perplexity that much above the baseline's
    agreement>98%               share of positions with the same likeliest token
    accuracy_drop<1pp           accuracy of the baseline - accuracy of the precision; also 1% or 0.01
    right_to_wrong<2%           share of judged answers that were right in the baseline and are wrong now
    issues<5%                   share of answers with an issue that the baseline's has not

Several are joined by commas. The last three are of all prompts, or of a family: accuracy_drop[reasoning]<2pp,
accuracy_drop[task:gsm8k]<1pp. A limit is kept if the whole 95 % interval keeps it: what too few prompts leave open does
not ship, and neither does what was not measured. Nothing is taken off for the engine's own nondeterminism.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from harness.errors import InputError
from harness.quality.prompts import CATEGORIES
from harness.records import Fidelity, Outcomes
from harness.suggest import did_you_mean

Metric = Literal["kl", "perplexity_ratio", "agreement", "accuracy_drop", "right_to_wrong", "issues"]
Sign = Literal["<", "<=", ">", ">="]

ALL, TASK = "all", "task:"
"""The family of every prompt together, public tasks not among them; and how the family of a task begins."""
_METRICS: Mapping[str, Metric] = {name: name for name in get_args(Metric)}
_OF_ANSWERS = ("accuracy_drop", "right_to_wrong", "issues")
"""These can be asked for in one family."""
_SIGNS: Mapping[str, Sign] = {"<": "<", "<=": "<=", "≤": "<=", ">": ">", ">=": ">=", "≥": ">="}
_ALLOWED = (
    "kl<0.02, perplexity_ratio<5%, agreement>98%, accuracy_drop<1pp, right_to_wrong<2%, issues<5%, joined by commas; "
    "the last three also of a family, as accuracy_drop[reasoning]<2pp or accuracy_drop[task:gsm8k]<1pp"
)
_LIMIT = re.compile(r"(\w+)\s*(?:\[\s*([^\[\]]*?)\s*\])?\s*([<>≤≥]=?)\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(nats|pp|%|)")


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure and its bound: in nats, as a ratio, or as a share of 1."""

    metric: Metric
    sign: Sign
    bound: float
    family: str = ALL

    @property
    def name(self) -> str:
        """kl, accuracy_drop[reasoning]"""
        return self.metric if self.family == ALL else f"{self.metric}[{self.family}]"

    @property
    def words(self) -> str:
        """< 1 pp"""
        return f"{self.sign.replace('<=', '≤').replace('>=', '≥')} {_said(self.metric, self.bound)}"

    def kept(self, value: float) -> bool:
        return {
            "<": value < self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            ">=": value >= self.bound,
        }[self.sign]


@dataclass(frozen=True, slots=True)
class Gate:
    """All of them have to be kept; none: there is no gate."""

    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True, slots=True)
class GateLine:
    """A precision under one limit."""

    precision: str
    metric: str
    """With its family: accuracy_drop[reasoning]."""
    limit: str
    """In words: < 1 pp."""
    value: float | None = None
    worst: float | None = None
    """The end of the 95 % interval that is nearer to the limit, or beyond it."""
    passes: bool | None = None
    """None: not measured, and so not to be shipped."""
    why: str = ""
    """In words: 3.3 pp, at worst 7.7 pp."""

    @property
    def ships(self) -> bool:
        return self.passes is True

    @property
    def words(self) -> str:
        """accuracy_drop < 1 pp: 3.3 pp, at worst 7.7 pp"""
        return f"{self.metric} {self.limit}: {self.why}"


def parse_gate(text: str, option: str = "--gate") -> Gate:
    """A gate as people type it; empty: no limit. Raises InputError naming the option and the part that is wrong."""
    limits: list[Limit] = []
    for part in re.split(r",(?![^\[]*\])", text) if text.strip() else ():
        limit = _parse_limit(part.strip(), option)
        if limit.name in (other.name for other in limits):
            raise InputError(f"{option} {text!r}: {limit.name} is given twice", allowed="each figure once")
        limits.append(limit)
    return Gate(tuple(limits))


def judge_gate(
    gate: Gate, outcomes: Sequence[Outcomes], fidelities: Sequence[Fidelity], precisions: Sequence[str] | None = None
) -> list[GateLine]:
    """A line for each precision and limit. `precisions`: who is judged, measured or not; None: all that have a line.

    Name them and leave the baseline out: its lines are about itself. Of `fidelities` those of the whole context count.
    """
    if precisions is None:
        precisions = list(dict.fromkeys([*(row.precision for row in fidelities), *(row.precision for row in outcomes)]))
    whole = {row.precision: row for row in fidelities if row.first is None and row.last is None}
    families = {(row.precision, row.family): row for row in outcomes}
    return [
        _judged(
            limit,
            name,
            _of_answers(limit, families.get((name, limit.family)))
            if limit.metric in _OF_ANSWERS
            else _of_positions(limit, whole.get(name)),
        )
        for name in precisions
        for limit in gate.limits
    ]


def verdicts(lines: Sequence[GateLine]) -> dict[str, bool]:
    """Whether a precision ships: it keeps every limit, and every one was measured."""
    found: dict[str, bool] = {}
    for line in lines:
        found[line.precision] = found.get(line.precision, True) and line.ships
    return found


def _parse_limit(part: str, option: str) -> Limit:
    found = _LIMIT.fullmatch(part)
    name = (found[1] if found else re.split(r"[^\w]", part)[0]).lower()
    if name not in _METRICS:
        meant = did_you_mean(name, _METRICS)
        raise InputError(f"{option}: {name or part!r} is no figure that a gate knows{meant}", allowed=_ALLOWED)
    if found is None or found[3] not in _SIGNS or not math.isfinite(float(found[4])):
        raise InputError(f"{option}: {part!r} is no limit", allowed=_ALLOWED)
    metric, sign = _METRICS[name], _SIGNS[found[3]]
    least = metric == "agreement"
    if sign.startswith(">") != least:
        raise InputError(
            f"{option}: {part!r} is the wrong way round", allowed=f"{metric}{'>' if least else '<'}{found[4]}{found[5]}"
        )
    bound = _parse_bound(metric, float(found[4]), found[5], part, option)
    return Limit(metric, sign, bound, _parse_family(metric, found[2], part, option))


def _parse_bound(metric: Metric, number: float, unit: str, part: str, option: str) -> float:
    """In the unit of the figure: nats, a ratio, a share of 1."""
    units = {"kl": ("", "nats"), "perplexity_ratio": ("", "%"), "agreement": ("", "%")}.get(metric, ("", "%", "pp"))
    if unit not in units:
        raise InputError(
            f"{option}: {part!r} has the unit {unit}", allowed=", ".join(one or "a bare number" for one in units)
        )
    if metric == "perplexity_ratio":
        bound = 1 + number / 100 if unit else number
        if not 1 <= bound < 2:
            raise InputError(f"{option}: {part!r} is no ratio of perplexities", allowed="1.05, or 5% for 5 % more")
        return bound
    bound = number / 100 if unit in ("%", "pp") else number
    if metric != "kl" and bound >= 1:
        raise InputError(
            f"{option}: {part!r} is no share",
            allowed="less than 100 %",
            remedy=f"write {number:g}% or {number / 100:g}",
        )
    return bound


def _parse_family(metric: Metric, family: str | None, part: str, option: str) -> str:
    if family is None:
        return ALL
    if metric not in _OF_ANSWERS:
        raise InputError(f"{option}: {part!r}: {metric} is of texts, not of a family", allowed=", ".join(_OF_ANSWERS))
    known = (ALL, *CATEGORIES)
    if family in known or (family.startswith(TASK) and family != TASK and metric != "issues"):
        return family
    raise InputError(
        f"{option}: {part!r}: there is no family {family!r}{did_you_mean(family, known)}",
        allowed=f"{', '.join(known)}{'' if metric == 'issues' else ', task:NAME'}",
    )


def _of_positions(limit: Limit, row: Fidelity | None) -> tuple[float | None, float | None]:
    """(value, worse end)"""
    if row is None:
        return None, None
    if limit.metric == "kl":
        return row.kl_nats, row.kl_nats_hi
    if limit.metric == "perplexity_ratio":
        return row.perplexity_ratio, row.perplexity_ratio_hi
    return row.agreement, row.agreement_lo


def _of_answers(limit: Limit, row: Outcomes | None) -> tuple[float | None, float | None]:
    """(value, worse end)"""
    from harness.analysis.paired import wilson  # numpy and scipy: the command line reads gates without them

    if row is None:
        return None, None
    if limit.metric == "accuracy_drop":
        return row.drop, row.drop_hi
    count, out_of = (row.right_to_wrong, row.items) if limit.metric == "right_to_wrong" else (row.issues, row.answered)
    return (count / out_of, wilson(count, out_of)[1]) if out_of else (None, None)


def _judged(limit: Limit, precision: str, measured: tuple[float | None, float | None]) -> GateLine:
    value, worst = measured
    if value is None:
        return GateLine(precision, limit.name, limit.words, why="not measured")
    said = _said(limit.metric, value)
    if worst is None:
        return GateLine(precision, limit.name, limit.words, value, why=f"{said}, too few texts for an interval")
    why = f"{said}, at worst {_said(limit.metric, worst)}"
    return GateLine(precision, limit.name, limit.words, value, worst, limit.kept(worst), why)


def _said(metric: Metric, value: float) -> str:
    if metric == "kl":
        return f"{value:.3g} nats"
    if metric == "perplexity_ratio":
        return f"{value:.4g}"
    return f"{100 * value:.3g} {'pp' if metric == 'accuracy_drop' else '%'}"
