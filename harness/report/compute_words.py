"""The sentences of compute_graph.md: the answer, and 3 to 5 bullets that the figures of a trace support.

Nothing here is said of every trace. Each sentence follows from a judgement of harness.analysis (relief.py, timeline.py)
and names the figures it stands on; what is not known is left out, or said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.ceilings import Ceiling, Point, route_of, side, tokens_to_ridge
from harness.analysis.relief import Relief, cached, linears, relief
from harness.analysis.sides import percent, times
from harness.analysis.timeline import (
    LINEAR,
    NOTABLE,
    Change,
    LaunchBound,
    Profile,
    gap,
    kind_times,
    linear_ratio,
    notable,
    prefill_ratio,
    step_ratio,
)
from harness.architecture import Architecture
from harness.report.kind_plots import SHORT, signed
from harness.report.tables import listed, named, number

MOST_NAMED = 3
"""Kinds that a bullet names."""


@dataclass(frozen=True, eq=False)
class Told:
    """What is known of one precision."""

    profile: Profile
    device: str
    """gpu, cpu"""
    points: Sequence[Point] = ()
    shape: Architecture | None = None
    prompt_tokens: int | None = None

    @property
    def name(self) -> str:
        return named(self.profile.precision)

    def bound_from(self, ceiling: Ceiling) -> float | None:
        """Tokens a step from which operations would bound its linear layers."""
        if self.shape is None:
            return None
        busy = {kind: float(series.sum()) for kind, series in self.profile.kinds.items()}
        return tokens_to_ridge(self.shape, route_of(self.shape, busy), ceiling)


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(base: Told, other: Told, ceiling: Ceiling | None) -> str:
    """Closer to the FLOP ceiling, or just relieved of bandwidth: a sentence in bold, and what it stands on."""
    found = _judged(base, other, ceiling)
    if found.ratio.value is None:
        return f"**Of {other.name} nothing is told: the traces hold no decode steps to compare.**"
    one, two = base.name, other.name
    layers = f"Its linear layers, {_part(base)} of {one}'s decode step, are {times(found.ratio)} as fast"
    if found.bytes_ratio is not None:
        layers += f", with {found.bytes_ratio:.2f}× the bytes of {one}'s"
    verdict, why = {
        "relieved": (f"{two} relieved bandwidth; the FLOP ceiling is no nearer", _ridge(found, ceiling)),
        "closer": (f"{two} moved the decode step to the FLOP ceiling", _ridge(found, ceiling)),
        "at peak": (
            f"Neither: operations bound {one}'s decode step already",
            "; bits change no operation, so that is its kernels' doing",
        ),
        "elsewhere": (f"{two} is faster, but neither ceiling held {one} back", _reached(found, ceiling, one)),
        "faster": (
            f"{two} is faster in a decode step; why cannot be told",
            "; the model's sizes or the machine's ceilings are not known",
        ),
        "slower": (
            f"Neither: {two} made the decode step's linear layers slower",
            ": what its kernels do beside reading costs more than saved bytes bring",
        ),
        "undecided": (f"Undecided: {two}'s linear layers may be faster or slower than {one}'s", ""),
    }[found.answer]
    return f"**{verdict}.** {layers}{why}."


def alone(one: Told, ceiling: Ceiling | None) -> str:
    """The same of a precision that was traced alone: what bounds it, and so what fewer bits could relieve."""
    point = linears(one.points, "decode")
    if point is None or ceiling is None:
        return f"**What bounds {one.name} cannot be told: the model's sizes or the machine's ceilings are not known.**"
    bound = {"memory": "bytes, which fewer bits would relieve", "compute": "operations, which they would not"}
    return (
        f"**At its best, a decode step of {one.name} is bound by {bound[side(point.work, ceiling)]}.** Its linear "
        f"layers do {number(point.work.intensity)} operations a byte, and the ridge is at {number(ceiling.ridge)}. "
        "Whether fewer bits are faster in fact, only a trace of them beside this one can tell."
    )


def _judged(base: Told, other: Told, ceiling: Ceiling | None) -> Relief:
    return relief("decode", base.points, other.points, linear_ratio(base.profile, other.profile), ceiling)


def _part(told: Told) -> str:
    """Of the median decode step, its linear layers: 82 %."""
    return percent(float(np.median(told.profile.series(LINEAR))) / (told.profile.step_ms or 1.0))


def _ridge(found: Relief, ceiling: Ceiling | None) -> str:
    """Where the two stand beside the ridge."""
    if found.base is None or found.other is None or ceiling is None:
        return ""
    one, two = (number(point.work.intensity) for point in (found.base, found.other))
    return f"; they went from {one} to {two} operations a byte, and the ridge is at {number(ceiling.ridge)}"


def _reached(found: Relief, ceiling: Ceiling | None, one: str) -> str:
    if found.base is None or ceiling is None:
        return ""
    bandwidth, peak = found.base.shares(ceiling)
    return f". {one}'s reached {_share(bandwidth)} of the bandwidth and {_share(peak)} of the peak"


# --- bullets ----------------------------------------------------------------------------------------------------------


def bullets(base: Told, other: Told, ceiling: Ceiling | None) -> list[str]:
    """Of one precision against the baseline: speed, where it came from, the two ceilings, the prefill, the host."""
    found = [
        _speed(base, other),
        _where(base, other),
        _ceilings([base, other], ceiling, _judged(base, other, ceiling)),
        _prefill([base, other], ceiling),
        _launches([base, other]),
    ]
    return [sentence for sentence in found if sentence]


def bullets_alone(one: Told, ceiling: Ceiling | None) -> list[str]:
    """Of a precision that was traced alone."""
    lines = kind_times(one.profile)[:MOST_NAMED]
    parts = [f"{SHORT[line.kind]} {number(line.ms)} ms ({percent(line.share)})" for line in lines]
    step = f"A decode step takes {number(one.profile.step_ms)} ms, most of it: {listed(parts)}." if parts else ""
    found = [step, _ceilings([one], ceiling, None), _prefill([one], ceiling), _launches([one])]
    return [sentence for sentence in found if sentence]


def _speed(base: Told, other: Told) -> str:
    step = step_ratio(base.profile, other.profile)
    words = []
    if step.value is not None:
        words.append(
            f"A decode step takes {number(other.profile.step_ms)} ms in {other.name} and "
            f"{number(base.profile.step_ms)} in {base.name}: {times(step)} as fast."
        )
    prefill = prefill_ratio(base.profile, other.profile)
    if prefill is not None:
        words.append(
            f"The prefill takes {number(other.profile.prefill_ms)} ms against {number(base.profile.prefill_ms)}, "
            f"{prefill:.2f}× as fast, from one sample each."
        )
    return " ".join(words)


def _where(base: Told, other: Told) -> str:
    """The linear layers as one, then the largest changes of what is not a linear layer."""
    if not (len(base.profile.steps_ms) and len(other.profile.steps_ms)):
        return ""
    changes = notable(base.profile, other.profile)
    before, after = (float(np.median(told.profile.series(LINEAR))) for told in (base, other))
    words = []
    if before or after:
        parts = "; ".join(_change(change) for change in changes if change.kind in LINEAR)
        words.append(f"Linear layers went from {number(before)} to {number(after)} ms a step{parts and f' ({parts})'}.")
    rest = [_change(change) for change in changes if change.kind not in LINEAR][:MOST_NAMED]
    words.append(
        f"Beside them: {'; '.join(rest)}."
        if rest
        else f"Of the rest nothing changed by as much as its scatter or {percent(NOTABLE)} of a step."
    )
    return " ".join(words)


def _change(change: Change) -> str:
    """GEMM −7.95 ms; fused is new, +2.39 ms."""
    fate = {"vanished": " vanished,", "new": " is new,"}.get(change.direction, "")
    return f"{SHORT[change.kind]}{fate} {signed(change.difference.value)} ms"


def _ceilings(sides: Sequence[Told], ceiling: Ceiling | None, found: Relief | None) -> str:
    """How much of the bandwidth and of the peak the decode steps' linear layers reach; what a larger batch would do."""
    placed = [(told, point) for told in sides if (point := linears(told.points, "decode"))]
    if ceiling is None or not placed:
        return ""
    reached = [
        f"{told.name}'s {_share(point.shares(ceiling)[0])} of the bandwidth and {_share(point.shares(ceiling)[1])} "
        "of the peak"
        for told, point in placed
    ]
    words = [f"In a decode step linear layers reach: {', '.join(reached)}."]
    if any(cached(point, ceiling) for _, point in placed):
        words.append(
            "Beyond 100 % weights came out of a cache, or the ceiling was measured too low: it binds nothing there."
        )
    elif found and found.realised is not None and found.answer in ("relieved", "closer"):
        words.append(
            f"Of the time that the saved bytes took at {sides[0].name}'s rate, {percent(found.realised)} was won."
        )
    batches = [
        f"{told.name}'s from {math.ceil(tokens):,}" for told, _ in placed if (tokens := told.bound_from(ceiling))
    ]
    if batches:
        words.append(f"Operations would bound {listed(batches)} tokens a step on, that is users decoding at once.")
    return " ".join(words)


def _prefill(sides: Sequence[Told], ceiling: Ceiling | None) -> str:
    placed = [(told, point) for told in sides if (point := linears(told.points, "prefill"))]
    if ceiling is None or not placed:
        return ""
    told, point = placed[0]
    reached = listed([f"{told.name} {_share(point.shares(ceiling)[1])}" for told, point in placed])
    start = (
        f"In the prefill of {told.prompt_tokens:,} tokens {told.name}'s linear layers do "
        f"{number(point.work.intensity)} operations a byte (ridge: {number(ceiling.ridge)})"
    )
    said = {
        "compute": "operations bound it, and fewer bits leave those as they are",
        "memory": "the prompt is too short for operations to bound it, so bytes still count",
    }
    return f"{start}: {said[side(point.work, ceiling)]}. Of the peak they reach: {reached}."


def _launches(sides: Sequence[Told]) -> str:
    """Is the decode loop launch-bound?"""
    said = []
    for told in sides:
        found = gap(told.profile)
        if found is None or found.share.value is None:
            continue
        span = ""
        if found.share.lo is not None and found.share.hi is not None:
            span = f" [{100 * found.share.lo:.0f}–{100 * found.share.hi:.0f}]"
        said.append((told, f"{100 * found.share.value:.0f}{span} % of {told.name}'s step", found.verdict))
    if not said:
        return ""
    bound = "host-bound" if sides[0].device == "cpu" else "launch-bound"
    words = f"Nothing runs in {listed([share for _, share, _ in said])}"
    verdicts = list(dict.fromkeys(verdict for *_, verdict in said))
    if len(verdicts) > 1:
        return f"{words}: {listed([f'{told.name} {_bound(verdict, bound)}' for told, _, verdict in said])}."
    subject = "the decode loop" if len(said) == 1 else "the decode loop of each"
    return f"{words}: {subject} {_bound(verdicts[0], bound)}."


def _bound(verdict: LaunchBound, bound: str) -> str:
    """The verdict as the rest of a sentence."""
    return {
        "yes": f"is {bound}, and fewer bits cannot shorten what does not run",
        "in part": f"is {bound} in part",
        "no": f"is not {bound}",
        "undecided": f"may or may not be {bound}, for the interval holds a limit",
    }[verdict]


def _share(share: float) -> str:
    """A share of a ceiling, with a digit where there are few: 83 %, 0.62 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:#.2g} %"
