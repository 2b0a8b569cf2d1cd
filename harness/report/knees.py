"""The knees in words and as a table: the rule of thumb, the three views side by side, the cause, the crossover.

Words only: the figures come from analysis/knee.py, usl.py and crossover.py. Everything returned is Markdown, with names
from outside escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.knee import safe_load
from harness.analysis.levels import USERS, Axis, axis, shown
from harness.analysis.usl import LEAST_LEVELS, MISFIT
from harness.analysis.words import words_of
from harness.records import Agreement, Crossover, Knee, Saturation, SweepPoint, Traffic
from harness.report.tables import escape, named, number, table

CAUSES = {
    "kv_cache": "the KV cache is full (or sequences are preempted) at the first level outside",
    "max_num_seqs": "the server's limit on running sequences (max_num_seqs): the rest wait in its queue",
    "client": "the load generator, not the server",
    "compute": "compute: nothing waits, nothing is preempted, the KV cache has room",
    "unknown": "unknown, the engine gave no counters",
}
AGREEMENTS: dict[Agreement, str] = {
    "agree": "The views agree: the SLO is crossed about where the card is saturated.",
    "latency": "The SLO is crossed before the card is saturated: it is latency-bound. Throughput would still grow, but "
    "only faster answers, or a looser SLO, carry more users.",
    "throughput": "The card is saturated before the SLO is crossed: it is throughput-bound. Beyond saturation more "
    "users only wait longer, so a tighter SLO would cost next to no throughput.",
    "mixed": "The views of saturation differ among themselves, so it is not said what comes first; levels closer "
    "together would tell.",
}
COMPARED = {
    "tok_s": "tokens per second",
    "tpot_p50_ms": "time per output token (decode)",
    "ttft_p50_ms": "time to first token (prefill)",
}
TRAFFIC: dict[Traffic, str] = {
    "decode-heavy": "decode-heavy (more of the work is output than prompt)",
    "prefill-heavy": "prefill-heavy (more of the work is prompt than output)",
}
NO_VIEWS = (
    "Kneedle, the Universal Scalability Law and the asymptotic bound are about throughput over users. In an open loop "
    "just as many requests are answered as come, until the server cannot follow: there they have nothing to say."
)


def rule_of_thumb(points: Sequence[SweepPoint], knees: Sequence[Knee], machine: str) -> str:
    """One sentence for all precisions of a run: what is safe to promise, then the knee and its interval.

    "On X, AWQ keeps p95 ≤ 3 s up to 24 users (knee 27 [24–32]); BF16 up to 14 (knee 15 [14–16])." Empty without knees.
    """
    unit, parts, said = axis(points), [], False
    for knee in knees:
        if knee.tested_lo is None:
            parts.append(f"{named(knee.precision)} has no usable figure")
            continue
        verb = "" if said else f"keeps {escape(knee.slo)} "
        parts.append(f"{named(knee.precision)} {verb}{_up_to(knee, unit, said)}")
        said = True
    return f"{words_of(points).on(escape(machine))} {'; '.join(parts)}." if parts else ""


def cause_words(knee: Knee) -> str:
    """Why a precision leaves the service level where it does; empty where it does not leave it."""
    if knee.cross is None:
        client = "Beyond the largest usable level the load generator gave out, not the server."
        return client if knee.beyond_range and knee.cause == "client" else ""
    return f"Cause: {CAUSES.get(knee.cause, escape(knee.cause))}."


def views_table(points: Sequence[SweepPoint], knees: Sequence[Knee], saturations: Sequence[Saturation]) -> str:
    """The three views of each precision: figures and 95 % intervals, in users; an open loop has the first alone."""
    unit, by_precision = axis(points), {found.precision: found for found in saturations}
    columns: dict[str, list[str]] = {
        "Precision": [named(knee.precision) for knee in knees],
        "Safe to promise": ["none" if (safe := safe_load(knee)) is None else shown(safe) for knee in knees],
        "SLO crossing": [_crossing(knee, unit) for knee in knees],
        "by noise alone": [_ends(knee.boot_lo, knee.boot_hi, unit) if knee.cross else "" for knee in knees],
    }
    if words_of(points).predicted:  # what moves one load of a prediction moves all of them
        del columns["by noise alone"]
    if unit is USERS:
        own = [by_precision.get(knee.precision, Saturation(knee.precision)) for knee in knees]
        columns |= {
            "Kneedle": ["" if found.kneedle is None else shown(found.kneedle) for found in own],
            "USL saturation": [
                _span(found.usl_saturation, found.usl_saturation_lo, found.usl_saturation_hi, unit) for found in own
            ],
            "USL peak": [_span(found.usl_peak, found.usl_peak_lo, found.usl_peak_hi, unit) for found in own],
            "Asymptotic bound": [_span(found.bound, found.bound_lo, found.bound_hi, unit) for found in own],
        }
    return table(tuple(columns), list(zip(*columns.values(), strict=True)))


def views_words(points: Sequence[SweepPoint], knees: Sequence[Knee], saturations: Sequence[Saturation]) -> list[str]:
    """A paragraph for each precision: what ends it, where its throughput is saturated, and how the two stand to each
    other. Of an open loop, why there is nothing to compare."""
    if axis(points) is not USERS:
        return [NO_VIEWS]
    by_precision, words = {knee.precision: knee for knee in knees}, []
    for found in saturations:
        knee = by_precision[found.precision]
        verdict = AGREEMENTS[found.agreement] if found.agreement else ""
        sentences = (cause_words(knee), _saturation_words(found, knee.tested_hi or 0.0), verdict)
        words.append(f"**{named(found.precision)}**: {' '.join(filter(None, sentences))}")
    return words


def crossover_words(points: Sequence[SweepPoint], crossovers: Sequence[Crossover]) -> list[str]:
    """A sentence for each precision and metric: up to which load it is ahead, and what the traffic was."""
    unit = axis(points)
    words = [_advantage(found, unit) for found in crossovers]
    kinds = {found.traffic for found in crossovers if found.traffic}
    return words + [f"This traffic is {TRAFFIC[kind]}; another may cross elsewhere." for kind in sorted(kinds)]


def _up_to(knee: Knee, unit: Axis, bare: bool) -> str:
    """Up to where the service level is kept; `bare`: without the unit, which was said before."""
    safe, at = safe_load(knee), "" if knee.cross is None else f" (knee {_crossing(knee, unit)})"
    if safe is None and knee.cross_lo is None:
        return f"at no tested {unit.noun}, {unit.amount(knee.tested_lo or 0)} included"
    if safe is None:
        return f"at no tested {unit.noun} for sure{at}"
    amount = shown(safe) if bare else unit.amount(safe)
    if not knee.beyond_range:
        return f"up to {amount}{at}"
    if safe == knee.tested_hi:
        return f"up to at least {amount}, the largest tested"
    return f"up to at least {amount}, in doubt up to {shown(knee.tested_hi or 0)}, the largest tested"


def _crossing(knee: Knee, unit: Axis) -> str:
    """27 [24–32]: the interpolated crossing, and its interval with the width of the bracket; both ends were tested."""
    if knee.beyond_range:
        return "none in range"
    if knee.cross is None or knee.cross_lo is None:
        return "" if knee.tested_lo is None else "never inside"
    high = "open" if knee.cross_hi is None else shown(knee.cross_hi)
    return f"{unit.about(knee.cross)} [{shown(knee.cross_lo)}–{high}]"


def _span(value: float | None, low: float | None, high: float | None, unit: Axis) -> str:
    return "" if value is None else f"{unit.about(value)} [{_ends(low, high, unit)}]"


def _ends(low: float | None, high: float | None, unit: Axis) -> str:
    return "" if low is None else f"{unit.about(low)}–{'open' if high is None else unit.about(high)}"


def _saturation_words(found: Saturation, largest: float) -> str:
    """Where throughput stops growing, by the views that there are; `largest`: the largest load tested."""
    if found.shape is None:
        return "Too few usable levels to say where throughput is saturated."
    if found.shape == "flat":
        return "Throughput does not surely grow with users: the smallest tested load may saturate the card already."
    if found.shape == "straight":
        return "Throughput grows about in step with users up to the largest tested: no saturation in range."
    if found.levels < LEAST_LEVELS:
        first = found.bound_from or 1
        reach = "" if first == 1 else f", an upper estimate, since the smallest load tested is {USERS.amount(first)}"
        return (
            f"With {found.levels} levels ({LEAST_LEVELS} make a curve) there is the asymptotic bound: throughput is "
            f"saturated at about {_span(found.bound, found.bound_lo, found.bound_hi, USERS)} users{reach}."
        )
    parts = [] if found.kneedle is None else [f"{shown(found.kneedle)} users by Kneedle"]
    if found.usl_saturation is not None and found.usl_misfit is not None and found.usl_misfit <= MISFIT:
        span = _span(found.usl_saturation, found.usl_saturation_lo, found.usl_saturation_hi, USERS)
        parts.append(f"{span} users by the Universal Scalability Law")
    words = (
        f"Throughput is saturated at {' and at '.join(parts)}. " if parts else "Kneedle sees no knee of throughput. "
    )
    return f"{words}{_law_words(found, largest)}"


def _law_words(found: Saturation, largest: float) -> str:
    """What the Universal Scalability Law's fit says, and how good it is."""
    if found.usl_misfit is None or found.usl_contention is None or found.usl_coherency is None:
        return "The Universal Scalability Law has no fit."
    off = f"off by {found.usl_misfit:.1%}".replace("%", " %")
    if found.usl_misfit > MISFIT:
        return f"The Universal Scalability Law does not describe this curve ({off}), so it is left out."
    words = f"The law fits ({off}): contention {number(found.usl_contention)}, coherency {found.usl_coherency:.2g}"
    if found.usl_peak is None:
        return f"{words}, no peak shown."
    span = _span(found.usl_peak, found.usl_peak_lo, found.usl_peak_hi, USERS)
    if found.usl_peak > largest:
        return f"{words}; it would peak at {span} users, an extrapolation beyond the largest load tested."
    return f"{words}; throughput peaks at {span} users and falls beyond."


def _advantage(found: Crossover, unit: Axis) -> str:
    """Up to which load one precision is ahead in one metric."""
    one, two, what = named(found.precision), named(found.baseline), COMPARED.get(found.metric, escape(found.metric))
    best = f"{found.best:.2f}× at {unit.amount(found.best_at)}" if found.best and found.best_at else ""
    even = "" if found.cross is None else f", even at about {unit.about(found.cross)}"
    count = len(found.ahead) + len(found.doubt) + len(found.behind)
    everywhere = f"at {unit.amount(found.best_at or 0)} (the only {unit.noun} compared)"
    if found.outcome == "undecided":
        at = everywhere if count == 1 else f"at any {unit.noun} compared"
        return f"In {what}, it is not decided {at} whether {one} or {two} is ahead."
    if found.outcome == "never":
        at = f"behind at {_list(found.behind, unit)}"
        return f"In {what}, {one} is surely ahead of {two} nowhere, and surely {at}; at best {best}."
    if found.outcome == "always":
        at = everywhere if count == 1 else f"from {shown(found.ahead[0])} to {unit.amount(found.ahead[-1])}"
        doubt = f", not decided at {_list(found.doubt, unit)}" if found.doubt else ""
        return f"In {what}, {one} is ahead of {two} {at}{doubt}; at best {best}."
    if found.outcome == "gains":
        start = next(at for at in found.ahead if at > max((0.0, *found.behind, *_below(found))))
        state = " or ".join(["behind"] * bool(found.behind) + ["not decided"] * bool(_below(found)))
        return (
            f"In {what}, {one} is ahead of {two} from {unit.amount(start)} on, to the largest compared{even}; {state} "
            f"below it; at best {best}."
        )
    late = [at for at in (*found.doubt, *found.behind) if at < found.ahead[-1]]
    reach = f"at {_list(found.ahead, unit)}" if late else f"up to {unit.amount(found.ahead[-1])}"
    words = f"In {what}, {one} is ahead of {two} {reach} (at best {best})"
    fades = f"from {unit.amount(found.fades_at or 0)} on the advantage is not shown any more"
    if found.outcome == "fades":
        return f"{words}; {fades}{even}."
    reverses = f"at {unit.amount(found.reverses_at or 0)} it is behind"
    return f"{words}; {reverses if found.reverses_at == found.fades_at else f'{fades}, and {reverses}'}{even}."


def _below(found: Crossover) -> tuple[float, ...]:
    """Loads in doubt below the last sure advantage's run."""
    return tuple(at for at in found.doubt if at < found.ahead[-1])


def _list(loads: Sequence[float], unit: Axis) -> str:
    return ", ".join(shown(at) for at in loads[:-1]) + (" and " if len(loads) > 1 else "") + unit.amount(loads[-1])
