"""The trials that a claim about two precisions can be put to: pure functions from what was measured to a finding.

    supported      the whole 95 % interval is on the claim's side of its border
    refuted        the whole interval is on the other side
    undecided      the interval holds the border, or there is none
    not measured   the run has no row that could tell

Sizes are what the engine says of itself and have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import binomtest

from harness.analysis.compare import Estimate, rows_ratio
from harness.analysis.evidence import NEGLIGIBLE, drop_words, wrong_words
from harness.analysis.headline import load_ratio
from harness.analysis.levels import load, shown
from harness.analysis.sides import MOST, ONE_USER, Row, Sides, Where, times
from harness.records import Outcomes, SweepPoint

Outcome = Literal["supported", "refuted", "undecided", "not measured"]

EQUAL_SHARE = 0.05
"""Two speeds that differ by less are called equal: less than a server's own spread from start to start."""
SIZE_SHARE = 0.1
"""How far a size may be from what is claimed of it, as a share of that."""
LONG_TOKENS = 4096
"""Mean prompt from which a run says something of long contexts: where the measurements of the claims' sources begin."""
BROKEN = ("errors", "gave_up", "engine_died", "engine_restarted", "preempting")
"""Reasons of a verdict that tell of something failing in the server."""
NOT_ASKED = "quality was not measured in this run"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a run says to a claim. `why` explains what the ratio cannot."""

    outcome: Outcome
    ratio: Estimate = Estimate()
    row: Row | None = None
    why: str = ""


Trial = Callable[[Sides], Finding]


# --- trials by figures with an interval -------------------------------------------------------------------------------


def against(ratio: Estimate, border: float = 1.0) -> Outcome:
    """Whether a ratio is more than a border: its whole interval above it, below it, or neither."""
    if ratio.lo is not None and ratio.lo > border:
        return "supported"
    if ratio.hi is not None and ratio.hi < border:
        return "refuted"
    return "undecided"


def above(metric: str, where: Where, border: float = 1.0) -> Trial:
    """The claim that a figure is more than `border` times the other's."""
    return _at(metric, where, lambda ratio: against(ratio, border))


def below(metric: str, where: Where, border: float = 1.0) -> Trial:
    """The claim that a figure is less than `border` times the other's."""
    return _at(metric, where, lambda ratio: _opposite(against(ratio, border)))


def equal(metric: str, where: Where) -> Trial:
    """The claim that two figures are the same: the whole interval inside 1 ± EQUAL_SHARE, or outside."""

    def outcome(ratio: Estimate) -> Outcome:
        over, under = against(ratio, 1 + EQUAL_SHARE), against(ratio, 1 - EQUAL_SHARE)
        if over == "supported" or under == "refuted":
            return "refuted"
        return "supported" if over == "refuted" and under == "supported" else "undecided"

    return _at(metric, where, outcome)


def fading(metric: str) -> Trial:
    """The claim that a gain shrinks from one user to the most: r_most / r_one < 1."""

    def trial(sides: Sides) -> Finding:
        few, many = ONE_USER.find(sides), MOST.find(sides)
        if few is None or many is None:
            return Finding("not measured", why="no rows of both at 1 user and at more")
        first, last = sides.ratio(metric, few), sides.ratio(metric, many)
        if first.value is None or last.value is None:
            return Finding("not measured", why=f"{metric} is missing at {shown(few)} or {shown(many)}")
        if against(first) != "supported":
            return Finding("not measured", why=f"no gain at 1 user to fade, {times(first)}")
        change = quotient(last, first)
        why = f"{first.value:.2f}× at 1 user, {last.value:.2f}× at {shown(many)}"
        return Finding(_opposite(against(change)), change, sides.row(metric, many), why)

    return trial


def quotient(upper: Estimate, lower: Estimate) -> Estimate:
    """upper / lower of two that were measured apart; MOVER on logs, as in `compare.rows_ratio`."""
    if upper.value is None or not lower.value:
        return Estimate()
    value = upper.value / lower.value
    if not (upper.lo and upper.hi and lower.lo and lower.hi):
        return Estimate(value)
    down = math.hypot(math.log(upper.value / upper.lo), math.log(lower.hi / lower.value))
    up = math.hypot(math.log(upper.hi / upper.value), math.log(lower.value / lower.lo))
    return Estimate(value, value * math.exp(-down), value * math.exp(up))


def more_users(sides: Sides) -> Finding:
    """The claim that more load fits inside the service level: the crossings' ratio, brackets included."""
    one, other = map(sides.knee, sides.names)
    if one is None or other is None or one.tested_lo is None or other.tested_lo is None:
        return Finding("not measured", why="no knee of both")
    ratio = load_ratio(other, one)
    row = Row("knees.csv", ", ".join(sides.names), "cross_lo, cross, cross_hi")
    apart = "one keeps the service level for sure where the other misses it for sure"
    if ratio.lo is not None and ratio.lo >= 1:  # a bracket's end is such a load, so at 1 they are told apart already
        return Finding("supported", ratio, row, apart)
    if ratio.hi is not None and ratio.hi <= 1:
        return Finding("refuted", ratio, row, apart)
    if one.beyond_range and other.beyond_range:
        return Finding("undecided", ratio, row, "both keep the service level over the whole tested range")
    return Finding("undecided", ratio, row, "the tested brackets overlap")


def less_energy(sides: Sides) -> Finding:
    """The claim that a token takes less energy, at the largest load of both."""
    at = max(sides.loads(), default=None)
    ratio = Estimate() if at is None else energy_ratio(sides, at)
    if at is None or ratio.value is None:
        return Finding("not measured", why="power was not measured")
    row = sides.row("energy_j_per_token", at)
    return Finding(_opposite(against(ratio)), ratio, row, sides.suspicions(at))


def energy_ratio(sides: Sides, at: float) -> Estimate:
    """J per token of the precision over the other's, at one load.

    Over sessions: their paired ratios. Of one session of each the reading of the power is taken as exact and the
    interval is that of tok_s, turned over, for J/token = W / (tok/s).
    """
    pairs = [pair for pair in sides.pairs(at) if all(point.energy_j_per_token for point in pair)]
    if len(pairs) != 1:
        return rows_ratio("energy_j_per_token", pairs)
    ((base, other),) = pairs
    value = (other.energy_j_per_token or 0.0) / (base.energy_j_per_token or 1.0)
    speed = rows_ratio("tok_s", pairs)
    if not (speed.value and speed.lo and speed.hi):
        return Estimate(value)
    return Estimate(value, value * speed.value / speed.hi, value * speed.value / speed.lo)


def _at(metric: str, where: Where, outcome: Callable[[Estimate], Outcome]) -> Trial:
    def trial(sides: Sides) -> Finding:
        at = where.find(sides)
        if at is None:
            return Finding("not measured", why=f"no row of both {where.words}")
        ratio = sides.ratio(metric, at)
        if ratio.value is None:
            return Finding("not measured", why=f"{metric} is missing at {shown(at)}")
        return Finding(outcome(ratio), ratio, sides.row(metric, at), sides.suspicions(at))

    return trial


def _opposite(outcome: Outcome) -> Outcome:
    turned: dict[Outcome, Outcome] = {"supported": "refuted", "refuted": "supported"}
    return turned.get(outcome, outcome)


# --- trials by sizes --------------------------------------------------------------------------------------------------


def size(column: str, least: float = 0.0, most: float = math.inf, gpu: bool = False) -> Trial:
    """The claim that what the engine holds is `least` to `most` times the other's; a column of `MemoryLine`.

    `gpu`: only where the engine fills a card by itself; elsewhere the size was set from outside.
    """

    def trial(sides: Sides) -> Finding:
        one, other = map(sides.memory, sides.names)
        if gpu and "gpu" not in (one.kind, other.kind):
            return Finding("not measured", why="the engine filled no card: it did not run on a GPU, or does not say")
        return _sized(getattr(one, column), getattr(other, column), least, most, sides.row(column))

    return trial


def file_size(least: float = 0.0, most: float = math.inf) -> Trial:
    """The claim that a checkpoint is `least` to `most` times as large as the other."""

    def trial(sides: Sides) -> Finding:
        one, other = ((sides.checkpoint_bytes or {}).get(name) for name in sides.names)
        return _sized(one, other, least, most, Row("run.toml", ", ".join(sides.names), "checkpoint_bytes"))

    return trial


def _sized(one: float | None, other: float | None, least: float, most: float, row: Row) -> Finding:
    if not one or not other:
        return Finding("not measured", why=f"the run does not say {row.column.replace('_', ' ')}")
    ratio, unit = one / other, "GiB" if row.column.endswith("_gib") else row.column.rpartition("_")[2]
    sizes = [f"{size:,.3g}" if unit == "GiB" else f"{size:,}" for size in (one, other)]
    outcome: Outcome = "supported" if least <= ratio <= most else "refuted"
    return Finding(outcome, Estimate(ratio, ratio, ratio), row, f"{sizes[0]} against {sizes[1]} {unit}")


# --- trials by what failed, and what ran ------------------------------------------------------------------------------


def long_prompts(sides: Sides) -> Finding:
    """The claim that long prompts are served as steadily as by the other: nothing breaks but where it breaks too.

    Of the answers to them nothing is said here.
    """
    longest = max((point.input_tokens_mean or 0.0 for point in sides.points), default=0.0)
    if longest < LONG_TOKENS:
        said = f"of {longest:,.0f} tokens on average" if longest else "of unknown length"
        return Finding("not measured", why=f"prompts {said}; long ones begin at {LONG_TOKENS:,}")
    one, other = (
        [point for point in sides.rows(name) if (point.input_tokens_mean or 0.0) >= LONG_TOKENS] for name in sides.names
    )
    if not one or not other:
        return Finding("not measured", why="no long prompts of both")
    broken = {load(point) for point in one if _broken(point)} - {load(point) for point in other if _broken(point)}
    row = sides.row("errors, verdict_reasons")
    if broken:
        return Finding("refuted", row=row, why=f"it alone broke at {', '.join(map(shown, sorted(broken)))}")
    return Finding("supported", row=row, why=f"{_share_failed(one)}; the answers were not judged")


def own_failures(sides: Sides) -> Finding:
    """The claim that a precision fails in ways in which the other does not."""
    one, other = (_kinds(sides, name) for name in sides.names)
    row = sides.row("errors, verdict_reasons")
    if not one and not other:
        asked = " and ".join(f"{sum(point.requests for point in sides.rows(name)):,}" for name in sides.names)
        return Finding("not measured", row=row, why=f"nothing failed in {asked} requests: no kinds to compare")
    told = " against ".join(", ".join(sorted(kinds)) or "nothing" for kinds in (one, other))
    return Finding("supported" if one - other else "refuted", row=row, why=told.replace("_", " "))


def slow_on_fallback(sides: Sides) -> Finding:
    """The claim that without a fused kernel the precision is the slower one; tried only where it had none."""
    kernel = next((point.kernel for point in sides.rows(sides.one) if point.kernel), None)
    if kernel is None:
        return Finding("not measured", why="the engine names no kernel")
    if not on_fallback(sides, sides.one):
        return Finding("not measured", why=f"no fallback was in use, the kernel was {kernel}")
    return below("tok_s", MOST)(sides)


def kernels_only_for_other(sides: Sides) -> Finding:
    """The claim that the other precision has a fused kernel where this one has none."""
    if any(not any(point.kernel for point in sides.rows(name)) for name in sides.names):
        return Finding("not measured", why="the engine names no kernel")
    one, other = (on_fallback(sides, name) for name in sides.names)
    words = " against ".join("a slow fallback" if slow else "a fused kernel" for slow in (one, other))
    return Finding("supported" if one and not other else "refuted", row=sides.row("kernel"), why=words)


def on_fallback(sides: Sides, precision: str) -> bool:
    """Whether a precision ran without a fused kernel."""
    return any("slow_kernel" in point.verdict_reasons for point in sides.rows(precision))


# --- trials by answers, paired ----------------------------------------------------------------------------------------


def rivals_eight_bits(sides: Sides) -> Finding:
    """The claim that its answers are as good as an 8-bit precision's of the run: no more than NEGLIGIBLE is lost."""
    if sides.evidence is None:
        return Finding("not measured", why=NOT_ASKED)
    eight = sides.evidence.eight_bit()
    if eight is None:
        return Finding("not measured", why="no 8-bit precision among those whose answers were compared")
    pair = sides.evidence.pair(sides.one, eight)
    outcome = _lost(
        pair, lambda low, high: "supported" if high <= NEGLIGIBLE else "refuted" if low > NEGLIGIBLE else None
    )
    return _paired(pair, outcome)


def loses_less(sides: Sides) -> Finding:
    """The claim that it has more right than the other, of the same prompts."""
    if sides.evidence is None:
        return Finding("not measured", why=NOT_ASKED)
    pair = sides.evidence.pair(sides.one, sides.other)
    return _paired(pair, _lost(pair, lambda low, high: "supported" if high < 0 else "refuted" if low > 0 else None))


def _lost(pair: Outcomes | None, said: Callable[[float, float], Outcome | None]) -> Outcome:
    if pair is None or pair.drop_lo is None or pair.drop_hi is None:
        return "undecided"
    return said(pair.drop_lo, pair.drop_hi) or "undecided"


def _paired(pair: Outcomes | None, outcome: Outcome) -> Finding:
    if pair is None:
        return Finding("not measured", why="no prompt was judged for both")
    row = Row("failures.csv", pair.precision, "quant_ok")
    return Finding(outcome, row=row, why=f"{drop_words(pair)} of accuracy lost, {wrong_words(pair)}")


def _broken(point: SweepPoint) -> bool:
    return bool(point.errors) or any(reason in BROKEN for reason in point.verdict_reasons)


def _share_failed(points: Sequence[SweepPoint]) -> str:
    """Failed requests, and the most that their share may be (Clopper-Pearson, 95 %)."""
    bad, good = sum(point.errors for point in points), sum(point.requests for point in points)
    if not bad + good:
        return "no request was answered"
    most = float(binomtest(bad, bad + good).proportion_ci().high)
    return f"{bad:,} of {bad + good:,} requests failed (at most {most:.1%})"


def _kinds(sides: Sides, precision: str) -> set[str]:
    """How a precision failed: the kinds of its failed requests, and what broke in its server."""
    broken = {reason for point in sides.rows(precision) for reason in point.verdict_reasons if reason in BROKEN}
    told = set((sides.failed or {}).get(precision, ()))
    return (broken - {"errors"}) | told if told else broken
