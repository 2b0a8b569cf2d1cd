"""The one sentence that people came for: how many times the users of the baseline does a precision sustain?

The sentence compares knees, not operating points: N = cross_other / cross_base, with the worst case over both brackets
as interval,

    lo = cross_lo_other / cross_hi_base        hi = cross_hi_other / cross_lo_base

and claims a gain or a loss only when the two intervals do not overlap. Otherwise it says that the number of users is
not decided, and falls back on what can be compared: tokens per second under the same load. In an open loop all the
same is said of requests per second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from harness.analysis.compare import Estimate, session_pairs, throughput_ratio
from harness.analysis.knee import placed, safe_load
from harness.analysis.levels import RATE, USERS, Axis, axis, compared, latest, levels, load, precision_order, shown
from harness.analysis.words import words_of
from harness.records import Knee, SweepPoint
from harness.slo import Slo
from harness.variants import precision_of, short_setting


def load_ratio(base: Knee, other: Knee) -> Estimate:
    """How many times the load of `base` does `other` sustain, by their crossings; see the module for the interval."""
    return Estimate(
        value=_divide(other.cross, base.cross),
        lo=_divide(other.cross_lo, base.cross_hi),
        hi=_divide(other.cross_hi, base.cross_lo),
    )


def headlines(points: Sequence[SweepPoint], knees: Sequence[Knee], machine: str) -> list[str]:
    """The one-liner for each precision against the baseline (BF16 where present, else the first).

    "On X, AWQ sustains 2.0× more users than BF16 at p95 ≤ 3 s (...)", or an honest no gain, or why it is not decided.
    With a single precision: what it sustains. Without knees (one trace): nothing, see `at_one_load`.
    """
    by_precision = {knee.precision: knee for knee in knees}
    order = [precision for precision in precision_order(points) if precision in by_precision]
    if not order:
        return []
    against = compared([point for point in points if point.precision in by_precision])
    if against:
        pairs = [(by_precision[base], by_precision[other]) for other, base in against.items()]
        sentences = [_compare(points, base, other, machine) for base, other in pairs]
    else:
        start = words_of(points).on(machine)
        sentences = [f"{start} {label(name)} {alone(by_precision[name], points)}." for name in order]
    care = _cautions(points)
    return [*sentences[:-1], f"{sentences[-1]} {care}".rstrip()]


def label(precision: str) -> str:
    """How a precision is written for people: AWQ, BF16, GPTQ 3-bit, AWQ[seqs=64] (variants.SHORT)."""
    written, setting = re.sub(r"-(\d)BIT$", r" \1-bit", precision_of(precision).upper()), short_setting(precision)
    return f"{written}[{setting}]" if setting else written


def baseline_words(against: Mapping[str, str]) -> str:
    """What precisions are compared with (`levels.compared`): BF16, BF16 with the same engine arguments; "": nothing."""
    bases = list(dict.fromkeys(against.values()))
    if len(bases) > 1:
        return f"{label(precision_of(bases[0]))} with the same engine arguments"
    return label(bases[0]) if bases else ""


def alone(knee: Knee, points: Sequence[SweepPoint]) -> str:
    """The knee of one precision as the rest of a sentence: "sustains 16 users at p95 ≤ 3 s ..."."""
    slo, unit = knee.slo, axis(points)
    if knee.tested_lo is None or knee.tested_hi is None:
        return f"has no usable figure: nothing can be said about {slo}"
    safe = safe_load(knee)
    if safe is None:
        first = unit.amount(knee.tested_lo)
        if knee.cross_lo is None:
            return f"misses {slo} at every tested {unit.noun}, {first} included"
        return f"may miss {slo} already at {first}, the smallest tested: no number of {unit.what} is safe to promise"
    sustains = f"sustains {unit.amount(safe)} at {slo}"
    if not knee.beyond_range:
        return f"{sustains}; its knee is at {_number(knee.cross, unit)} ({_span(knee, unit)})"
    if safe == knee.tested_hi:
        return f"{sustains}, the largest usable {unit.noun} tested: no knee in range"
    return f"{sustains}; at {knee.tested_hi:g}, the largest tested, it may or may not: no knee in range"


def at_one_load(points: Sequence[SweepPoint], slo: Slo, machine: str) -> list[str]:
    """What each precision made of one trace, against the service level; for runs that have no knees."""
    rows = {level.precision: level for level in levels(points)}
    sentences, start = [], words_of(points).on(machine)
    for precision in precision_order(points):
        row = rows.get(precision)
        place = placed(row, slo) if row else None
        if row is None or place is None:
            sentences.append(f"{start} {label(precision)} has no usable p95 for this trace.")
            continue
        verdict = "keeps" if place.surely_inside else "misses" if place.surely_outside else "may keep or miss"
        at = f", {RATE.amount(load(row))}" if load(row) else ""
        sentence = f"{start} {label(precision)} {verdict} {slo.words} on this trace{at}"
        if row.p95_ms is not None:
            low, high = row.p95_ms_lo or row.p95_ms, row.p95_ms_hi or row.p95_ms
            span = f" ({low / 1e3:.3g}–{high / 1e3:.3g} s)" if low < high else ""
            sentence += f": its p95 is {row.p95_ms / 1e3:.3g} s{span}"
        sentences.append(f"{sentence}.")
    care = _cautions(points)
    return [*sentences[:-1], f"{sentences[-1]} {care}".rstrip()]


def _compare(points: Sequence[SweepPoint], base: Knee, other: Knee, machine: str) -> str:
    slo, unit = base.slo, axis(points)
    one, two = label(base.precision), label(other.precision)
    start = words_of(points).on(machine)
    unusable = [label(knee.precision) for knee in (base, other) if knee.tested_lo is None]
    if unusable:
        return f"{start} {two} against {one} is not decided: no usable p95 for {' and '.join(unusable)}."
    if base.cross_lo is None or other.cross_lo is None:
        return _one_never_inside(points, base, other, start, slo)
    ratio = load_ratio(base, other)
    promise = f"safe to promise: {_safe(base)} → {_safe(other)}"
    knees = f"knees {_number(base.cross, unit)} → {_number(other.cross, unit)}"
    if ratio.lo is not None and ratio.lo >= 1:  # base is surely outside where other is surely inside: strictly more
        if other.beyond_range:
            least = _divide(other.cross_lo, base.cross)
            return (
                f"{start} {two} sustains at least {least:.1f}× more {unit.what} than {one} at {slo} ({one} leaves at "
                f"{_number(base.cross, unit)}, {_span(base, unit)}; {two} holds up to "
                f"{_number(other.cross_lo, unit)} with no knee in range; {promise})."
            )
        return (
            f"{start} {two} sustains {ratio.value:.1f}× more {unit.what} than {one} at {slo} "
            f"({knees}, interval {_times(ratio)} with the width of the tested brackets; {promise})."
        )
    if base.cross_lo and other.cross_hi is not None and other.cross_hi <= base.cross_lo:
        holds = f"{one} holds up to {_number(base.cross_lo, unit)}" if base.beyond_range else knees
        return f"{start} {two} brings no gain: it sustains fewer {unit.what} than {one} at {slo} ({holds}; {promise})."
    return f"{start} {_undecided(points, base, other, slo)} {_throughput(points, base, other)}".rstrip()


def _one_never_inside(points: Sequence[SweepPoint], base: Knee, other: Knee, start: str, slo: str) -> str:
    one, two, unit = label(base.precision), label(other.precision), axis(points)
    least = unit.amount((base if base.cross_lo is None else other).tested_lo or 0)
    if safe_load(base) is None and safe_load(other) is None:
        rest = f"neither {one} nor {two} safely meets {slo} at any tested {unit.noun}: no gain in {unit.what} can be"
        return f"{start} {rest} claimed. {_throughput(points, base, other)}".rstrip()
    if other.cross_lo is None:
        return f"{start} {two} brings no gain: it misses {slo} even at {least}, while {one} sustains {_safe(base)}."
    held = unit.amount(safe_load(other) or 0)
    return f"{start} {two} sustains {held} at {slo}; {one} misses it even at {least}: no ratio."


def _undecided(points: Sequence[SweepPoint], base: Knee, other: Knee, slo: str) -> str:
    one, two, unit = label(base.precision), label(other.precision), axis(points)
    if base.beyond_range and other.beyond_range:
        ends = base.tested_hi or 0, other.tested_hi or 0
        reach = unit.amount(ends[0]) if ends[0] == ends[1] else f"{ends[0]:g} and {ends[1]:g} {unit.unit}"
        surely = all(safe_load(knee) == knee.tested_hi for knee in (base, other))
        held = (
            f"both stay inside it over the whole tested range (up to {reach}), so the ratio lies beyond it."
            if surely
            else f"neither surely leaves it in the tested range (up to {reach}); more requests would say more."
        )
        return f"the {unit.what} {two} gains over {one} at {slo} are not decided: {held}"
    further = "higher" if base.cross_hi is None or other.cross_hi is None else "finer"
    remedy = "a measurement" if words_of(points).predicted else f"{further} {unit.nouns} or more requests"
    return (
        f"no gain in {unit.what} of {two} over {one} at {slo} is shown: their knees are not told apart "
        f"({one} {_span(base, unit)}, {two} {_span(other, unit)}); {remedy} would decide."
    )


def _throughput(points: Sequence[SweepPoint], base: Knee, other: Knee) -> str:
    """Tokens per second at the largest load that both have, inside the SLO for both where there is one."""
    common = {
        load(pairs[0][0]): pairs
        for pairs in session_pairs(points, base.precision, other.precision)
        if throughput_ratio(pairs).value
    }
    if not common:
        return ""
    safe = [at for at in common if at <= min(safe_load(base) or 0, safe_load(other) or 0)]
    largest = max(safe or common)
    ratio = throughput_ratio(common[largest])
    one, two, at = label(base.precision), label(other.precision), axis(points).amount(largest)
    interval = f" ({_times(ratio)})" if ratio.lo is not None else " (no interval)"
    if ratio.lo is not None and ratio.lo > 1:
        return f"At {at} {two} delivers {ratio.value:.2f}× the tokens per second of {one}{interval}."
    if ratio.hi is not None and ratio.hi < 1:
        return f"At {at} {two} delivers only {ratio.value:.2f}× the tokens per second of {one}{interval}: no gain."
    return f"At {at} it delivers {ratio.value:.2f}× the tokens per second{interval}: no gain shown."


def _cautions(points: Sequence[SweepPoint]) -> str:
    """Verdicts that bear on the sentence: which rows are suspect, and which were left out as invalid."""
    parts, tail = [], "" if axis(points) is USERS else f" {RATE.unit}"
    for verdict, lead in (("suspect", "Suspect rows"), ("invalid", "Invalid and left out")):
        loads: dict[str, set[float]] = {}
        for point in latest(points):
            if point.verdict == verdict:
                loads.setdefault(label(point.precision), set()).add(load(point))
        if loads:
            named = (f"{name} at {', '.join(map(shown, sorted(found)))}{tail}" for name, found in loads.items())
            parts.append(f"{lead}: {'; '.join(named)}.")
    return " ".join(parts)


def _safe(knee: Knee) -> str:
    safe = safe_load(knee)
    return "none" if safe is None else f"{safe:g}"


def _span(knee: Knee, unit: Axis) -> str:
    """The interval of a knee in words: "between 16 and 32"."""
    low, high = _number(knee.cross_lo, unit), _number(knee.cross_hi, unit)
    if knee.cross_hi is None:
        return f"above {low}" if knee.cross_lo else "not located"
    return f"between {low} and {high}" if knee.cross_lo else f"below {high}"


def _times(ratio: Estimate) -> str:
    if ratio.hi is None:
        return f"{ratio.lo:.2f}× or more"
    return f"{ratio.lo:.2f}–{ratio.hi:.2f}×"


def _number(value: float | None, unit: Axis) -> str:
    return "?" if value is None else unit.about(value)


def _divide(upper: float | None, lower: float | None) -> float | None:
    return upper / lower if upper is not None and lower else None
