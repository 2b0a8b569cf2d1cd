"""What one card carries: users, tokens and memory at the operating point, and the one sentence people came for.

The operating point is the largest tested concurrency whose p95 is safely inside the SLO (Knee.safe_conc). The sentence
compares knees, not operating points: N = cross_other / cross_base, with the worst case over both brackets as interval,

    lo = cross_lo_other / cross_hi_base        hi = cross_hi_other / cross_lo_base

and claims a gain or a loss only when the two intervals do not overlap. Otherwise it says that the number of users is
not decided, and falls back on what can be compared: tokens per second at the same concurrency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from harness.analysis.levels import levels, precision_order
from harness.records import CapacityLine, Knee, SweepPoint


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and its 95 % interval; an end that is None is open or unknown."""

    value: float | None = None
    lo: float | None = None
    hi: float | None = None


def capacity_lines(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> list[CapacityLine]:
    """One line for each knee. Memory does not depend on the load: it is that of `memory_split`."""
    merged = {(level.precision, level.conc): level for level in levels(points)}
    memory = {line.precision: line for line in memory_split(points)}
    lines = []
    for knee in knees:
        at = merged.get((knee.precision, knee.safe_conc)) if knee.safe_conc else None
        held = memory.get(knee.precision, MemoryLine(knee.precision))
        lines.append(
            CapacityLine(
                precision=knee.precision,
                slo_p95_s=knee.slo_p95_s,
                users=knee.safe_conc,
                tok_s=at.tok_s if at else None,
                req_s=at.req_s if at else None,
                p95_ms=at.p95_ms if at else None,
                weights_gib=held.weights_gib,
                kv_cache_gib=held.kv_cache_gib,
                kv_cache_tokens=held.kv_cache_tokens,
                verdict=at.verdict if at else None,
            )
        )
    return lines


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """What the engine of one precision holds, GiB: medians over its rows. None: the engine did not say."""

    precision: str
    kind: str | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    other_gib: float | None = None

    @property
    def total_gib(self) -> float:
        """Sum of the parts that are known."""
        return sum(part for part in (self.weights_gib, self.kv_cache_gib, self.other_gib) if part)


def memory_split(points: Sequence[SweepPoint]) -> list[MemoryLine]:
    """One line for each precision. A row whose load was invalid still tells its engine's memory, so all rows count."""
    lines = []
    for precision in precision_order(points):
        own = [point for point in points if point.precision == precision]
        tokens = _median([point.kv_cache_tokens for point in own])
        lines.append(
            MemoryLine(
                precision=precision,
                kind=next((point.memory_kind for point in own if point.memory_kind), None),
                weights_gib=_median([point.weights_gib for point in own]),
                kv_cache_gib=_median([point.kv_cache_gib for point in own]),
                kv_cache_tokens=None if tokens is None else round(tokens),
                other_gib=_median([point.other_gib for point in own]),
            )
        )
    return lines


def user_ratio(base: Knee, other: Knee) -> Ratio:
    """How many times the users of `base` does `other` sustain, by their crossings; see the module for the interval."""
    return Ratio(
        value=_divide(other.cross, base.cross),
        lo=_divide(other.cross_lo, base.cross_hi),
        hi=_divide(other.cross_hi, base.cross_lo),
    )


def throughput_ratio(base: SweepPoint, other: SweepPoint) -> Ratio:
    """tok_s of `other` over that of `base`, the two measured apart (MOVER on logs: Zou & Donner, Stat. Med. 27, 2008).

    ln lo = ln r − √((ln o − ln o_lo)² + (ln b_hi − ln b)²), and the mirror image for hi. Servers measured in turns
    allow a tighter, paired interval; this one is what two independent rows support.
    """
    value = _divide(other.tok_s, base.tok_s)
    ends = (base.tok_s_lo, base.tok_s_hi, other.tok_s_lo, other.tok_s_hi)
    if not value or not base.tok_s or not other.tok_s or not all(ends):
        return Ratio(value)
    b_lo, b_hi, o_lo, o_hi = (math.log(end) for end in ends if end)
    b, o = math.log(base.tok_s), math.log(other.tok_s)
    return Ratio(
        value, value * math.exp(-math.hypot(o - o_lo, b_hi - b)), value * math.exp(math.hypot(o_hi - o, b - b_lo))
    )


def headlines(points: Sequence[SweepPoint], knees: Sequence[Knee], machine: str) -> list[str]:
    """The one-liner for each precision against the baseline (BF16 where present, else the first).

    "On X, AWQ sustains 2.0× more users than BF16 at p95 ≤ 3 s (...)", or an honest no gain, or why it is not decided.
    With a single precision: what it sustains.
    """
    by_precision = {knee.precision: knee for knee in knees}
    order = [precision for precision in precision_order(points) if precision in by_precision]
    if not order:
        return []
    base = by_precision[order[0]]
    if len(order) == 1:
        sentences = [f"On {machine}, {label(base.precision)} {alone(base, points)}."]
    else:
        sentences = [_compare(points, base, by_precision[other], machine) for other in order[1:]]
    care = _cautions(points)
    return [f"{sentence} {care}".rstrip() for sentence in sentences]


def label(precision: str) -> str:
    """How a precision is written for people: AWQ, BF16."""
    return precision.upper()


def alone(knee: Knee, points: Sequence[SweepPoint]) -> str:
    """The knee of one precision as the rest of a sentence: "sustains 16 users at p95 ≤ 3 s ..."."""
    slo = f"p95 ≤ {knee.slo_p95_s:g} s"
    tested = _tested(points, knee.precision)
    if not tested:
        return f"has no usable p95: nothing can be said about {slo}"
    if knee.safe_conc is None:
        first = users(tested[0])
        if knee.cross_lo is None:
            return f"misses {slo} at every tested concurrency, {first} included"
        return f"may miss {slo} already at {first}, the smallest tested: no number of users is safe to promise"
    sustains = f"sustains {users(knee.safe_conc)} at {slo}"
    if not knee.beyond_range:
        return f"{sustains}; its knee is at {_number(knee.cross)} ({_span(knee)})"
    if knee.safe_conc == tested[-1]:
        return f"{sustains}, the largest usable concurrency tested: no knee in range"
    return f"{sustains}; at {tested[-1]}, the largest tested, it may or may not: no knee in range"


def _compare(points: Sequence[SweepPoint], base: Knee, other: Knee, machine: str) -> str:
    slo = f"p95 ≤ {base.slo_p95_s:g} s"
    one, two = label(base.precision), label(other.precision)
    start = f"On {machine},"
    unusable = [label(knee.precision) for knee in (base, other) if not _tested(points, knee.precision)]
    if unusable:
        return f"{start} {two} against {one} is not decided: no usable p95 for {' and '.join(unusable)}."
    if base.cross_lo is None or other.cross_lo is None:
        return _one_never_inside(points, base, other, start, slo)
    ratio = user_ratio(base, other)
    promise = f"safe to promise: {_safe(base)} → {_safe(other)}"
    knees = f"knees {_number(base.cross)} → {_number(other.cross)}"
    if ratio.lo is not None and ratio.lo >= 1:  # base is surely outside where other is surely inside: strictly more
        if other.beyond_range:
            least = _divide(other.cross_lo, base.cross)
            return (
                f"{start} {two} sustains at least {least:.1f}× more users than {one} at {slo} ({one} leaves at "
                f"{_number(base.cross)}, {_span(base)}; {two} holds up to "
                f"{_number(other.cross_lo)} with no knee in range; {promise})."
            )
        return (
            f"{start} {two} sustains {ratio.value:.1f}× more users than {one} at {slo} "
            f"({knees}, interval {_times(ratio)} with the width of the tested brackets; {promise})."
        )
    if base.cross_lo and other.cross_hi is not None and other.cross_hi <= base.cross_lo:
        holds = f"{one} holds up to {_number(base.cross_lo)}" if base.beyond_range else knees
        return f"{start} {two} brings no gain: it sustains fewer users than {one} at {slo} ({holds}; {promise})."
    return f"{start} {_undecided(points, base, other, slo)} {_throughput(points, base, other)}".rstrip()


def _one_never_inside(points: Sequence[SweepPoint], base: Knee, other: Knee, start: str, slo: str) -> str:
    one, two = label(base.precision), label(other.precision)
    least = users(_tested(points, (base if base.cross_lo is None else other).precision)[0])
    if base.safe_conc is None and other.safe_conc is None:
        rest = f"neither {one} nor {two} safely meets {slo} at any tested concurrency: no gain in users can be claimed."
        return f"{start} {rest} {_throughput(points, base, other)}".rstrip()
    if other.cross_lo is None:
        return f"{start} {two} brings no gain: it misses {slo} even at {least}, while {one} sustains {_safe(base)}."
    return f"{start} {two} sustains {_safe(other)} users at {slo}; {one} misses it even at {least}: no ratio."


def _undecided(points: Sequence[SweepPoint], base: Knee, other: Knee, slo: str) -> str:
    one, two = label(base.precision), label(other.precision)
    if base.beyond_range and other.beyond_range:
        ends = _tested(points, base.precision)[-1], _tested(points, other.precision)[-1]
        reach = f"up to {users(ends[0])}" if ends[0] == ends[1] else f"up to {ends[0]} and {ends[1]} users"
        return (
            f"the users {two} gains over {one} at {slo} are not decided: both stay inside it over the whole tested "
            f"range ({reach}), so the ratio lies beyond it."
        )
    further = "higher" if base.cross_hi is None or other.cross_hi is None else "finer"
    return (
        f"no gain in users of {two} over {one} at {slo} is shown: their knees are not told apart "
        f"({one} {_span(base)}, {two} {_span(other)}); {further} concurrencies or more requests would decide."
    )


def _throughput(points: Sequence[SweepPoint], base: Knee, other: Knee) -> str:
    """Tokens per second at the largest concurrency that both have, inside the SLO for both where there is one."""
    merged = {(level.precision, level.conc): level for level in levels(points) if level.tok_s}
    common = sorted(
        conc for precision, conc in merged if precision == base.precision and (other.precision, conc) in merged
    )
    safe = [conc for conc in common if conc <= min(base.safe_conc or 0, other.safe_conc or 0)]
    if not common:
        return ""
    conc = (safe or common)[-1]
    ratio = throughput_ratio(merged[base.precision, conc], merged[other.precision, conc])
    one, two, at = label(base.precision), label(other.precision), users(conc)
    interval = f" ({_times(ratio)})" if ratio.lo is not None else " (no interval)"
    if ratio.lo is not None and ratio.lo > 1:
        return f"At {at} {two} delivers {ratio.value:.2f}× the tokens per second of {one}{interval}."
    if ratio.hi is not None and ratio.hi < 1:
        return f"At {at} {two} delivers only {ratio.value:.2f}× the tokens per second of {one}{interval}: no gain."
    return f"At {at} it delivers {ratio.value:.2f}× the tokens per second{interval}: no gain shown."


def _cautions(points: Sequence[SweepPoint]) -> str:
    """Verdicts that bear on the sentence: which rows are suspect, and which were left out as invalid."""
    parts = []
    for verdict, lead in (("suspect", "Suspect rows"), ("invalid", "Invalid and left out")):
        concs: dict[str, list[int]] = {}
        for point in points:
            if point.verdict == verdict and point.conc not in concs.setdefault(label(point.precision), []):
                concs[label(point.precision)].append(point.conc)
        if concs:
            named = (f"{name} at {', '.join(map(str, sorted(found)))}" for name, found in concs.items())
            parts.append(f"{lead}: {'; '.join(named)}.")
    return " ".join(parts)


def _tested(points: Sequence[SweepPoint], precision: str) -> list[int]:
    """Concurrencies at which a precision has a usable p95."""
    return [level.conc for level in levels(points) if level.precision == precision and level.p95_ms is not None]


def users(conc: int) -> str:
    return f"{conc} user" if conc == 1 else f"{conc} users"


def _safe(knee: Knee) -> str:
    return str(knee.safe_conc) if knee.safe_conc is not None else "none"


def _span(knee: Knee) -> str:
    """The interval of a knee in words: "between 16 and 32"."""
    low, high = _number(knee.cross_lo), _number(knee.cross_hi)
    if knee.cross_hi is None:
        return f"above {low}" if knee.cross_lo else "not located"
    return f"between {low} and {high}" if knee.cross_lo else f"below {high}"


def _times(ratio: Ratio) -> str:
    if ratio.hi is None:
        return f"{ratio.lo:.2f}× or more"
    return f"{ratio.lo:.2f}–{ratio.hi:.2f}×"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _divide(upper: float | None, lower: float | None) -> float | None:
    return upper / lower if upper is not None and lower else None


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
