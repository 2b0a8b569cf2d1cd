"""The decision that a run supports, in one sentence, with the load and the rows that it stands on.

It claims no more than the comparison does: a precision is preferred for users only where the knees are told apart, for
speed only where the paired ratio of a valid row is, and never without a word about its answers: that they passed the
gate, or what they lost where none was given, or that nobody has looked at them yet. One that failed is not served.
"""

from __future__ import annotations

from harness.analysis.case import Case, reasons
from harness.analysis.evidence import drop_words
from harness.analysis.headline import label
from harness.analysis.knee import Place, placed, safe_load
from harness.analysis.levels import axis, levels, load, one_trace
from harness.analysis.sides import times
from harness.analysis.trials import against, more_users
from harness.records import Knee, SweepPoint
from harness.slo import Slo

PROVIDED = "once its answers have passed a test of quality"


def decide(case: Case) -> str:
    """For a precision against the baseline: "Serve AWQ up to 24 users ..., once ...", or "Stay with BF16: ..."."""
    one, base, slo = case.one, case.base, case.slo.words
    if one_trace(case.sides.points):
        return _on_a_trace(case)
    safe = [_safe(case, name) for name in case.sides.names]
    if refusal := _refusal(case):
        if safe[1] is None:
            return f"Sign off neither: {refusal}, and {base} keeps {slo} for sure at no tested load."
        return f"Stay with {base}, up to {safe[1]} at {slo}: {refusal}."
    provided = _provided(case)
    if safe[0] is None and safe[1] is None:
        return f"Sign off neither: {one} and {base} keep {slo} for sure at no tested load."
    if safe[0] is None:
        return f"Stay with {base}, up to {safe[1]}: {one} keeps {slo} for sure at no tested load."
    if safe[1] is None:
        return f"Serve {one} up to {safe[0]} at {slo}, {provided}: {base} keeps it for sure at no tested load."
    found, care = more_users(case.sides), f" ({case.doubt()})" if case.doubt() else ""
    if found.outcome == "supported":
        return f"Serve {one} up to {safe[0]} at {slo}, {provided}: {base} is safe up to {safe[1]}{care}."
    if found.outcome == "refuted":
        return f"Stay with {base}, up to {safe[1]} at {slo}: {one} is safe up to {safe[0]} only{care}."
    at = case.sound_safe_load()
    if at is None:
        return f"Stay with {base}, up to {safe[1]} at {slo}: no valid rows of both inside it tell {one} apart from it."
    ratio = case.sides.ratio("tok_s", at)
    speed = f"{times(ratio) or 'an unknown multiple of'} the tokens a second at {case.amount(at)}"
    if against(ratio) == "supported":
        users = f"more {axis(case.sides.points).what} are not shown ({found.why})"
        return f"Serve {one} up to {safe[0]} at {slo}, {provided}: it delivers {speed}; {users}."
    speed = f"it loses some: {speed}" if against(ratio) == "refuted" else speed
    users = f"{axis(case.sides.points).what} ({found.why})"
    return (
        f"Stay with {base}, up to {safe[1]} at {slo}: {one} shows no gain, neither in speed ({speed}) nor in {users}."
    )


def _refusal(case: Case) -> str:
    """Why its answers forbid it; "" where no gate does."""
    evidence, name = case.answers, case.sides.one
    if evidence is None or evidence.passed(name) is not False:
        return ""
    return f"{case.one}'s answers did not pass the gate ({evidence.refusal(name)})"


def _provided(case: Case) -> str:
    """Under which condition about its answers it may be served."""
    evidence, name = case.answers, case.sides.one
    if evidence is None:
        return PROVIDED
    if evidence.passed(name):
        return f"as its answers passed the gate ({evidence.gate_words})"
    gate = "the gate says nothing of it" if evidence.gate_words else "no gate was given"
    whole, distance = evidence.whole(name), evidence.whole_fidelity(name)
    if whole is not None:
        return f"if it may lose {drop_words(whole)} of accuracy ({whole.items} prompts; {gate})"
    far = "" if distance is None or distance.kl_nats is None else f" (KL {distance.kl_nats:.2g} nats; {gate})"
    return f"{PROVIDED}: no answer was judged right or wrong{far}"


def decide_alone(knee: Knee | None, points: list[SweepPoint], slo: Slo) -> str:
    """For a run of one precision, which compares nothing."""
    name = label(points[0].precision)
    if knee is None:
        return f"{_kept(points, slo)} Nothing was compared with it, and no load was varied."
    safe = safe_load(knee)
    if safe is None:
        return f"Do not sign off {name}: it keeps {slo.words} for sure at no tested load. Nothing was compared with it."
    return f"{name} may be served up to {axis(points).amount(safe)} at {slo.words}. Nothing was compared with it."


def validity(case_levels: dict[str, SweepPoint], points: list[SweepPoint]) -> str:
    """What stands behind the operating points: their verdicts, and how many server sessions."""
    sessions = max((point.repeat for point in points), default=1)
    told = [
        f"{label(name)} at {axis(points).amount(load(level))} is {level.verdict}"
        + (f" ({reasons(level)})" if level.verdict != "valid" else "")
        for name, level in case_levels.items()
    ]
    spread = (
        "one server session each, so nothing is known of run-to-run spread" if sessions < 2 else f"{sessions} sessions"
    )
    words = "; ".join([*told, spread])
    return f"{words[0].upper()}{words[1:]}."


def _safe(case: Case, name: str) -> str | None:
    knee = case.sides.knee(name)
    safe = safe_load(knee) if knee else None
    return None if safe is None else case.amount(safe)


def _on_a_trace(case: Case) -> str:
    one, base = (_place(case.sides.rows(name), case.slo) for name in case.sides.names)
    told = " ".join(_kept(case.sides.rows(name), case.slo) for name in reversed(case.sides.names))
    if base and base.surely_inside:
        verb = f"Stay with {case.base}"
    elif one and one.surely_inside and not _refusal(case):
        verb = f"Serve {case.one}, {_provided(case)}"
    else:
        verb = "Sign off neither"
    verb = f"{verb}: {refusal}" if (refusal := _refusal(case)) else verb
    return f"{verb}. {told} No load was varied, so that is said of this trace alone."


def _place(rows: list[SweepPoint], slo: Slo) -> Place | None:
    row = next(iter(levels(rows)), None)
    return placed(row, slo) if row else None


def _kept(rows: list[SweepPoint], slo: Slo) -> str:
    place, name = _place(rows, slo), label(rows[0].precision)
    if place is None:
        return f"{name} has no usable figure for {slo.words}."
    verb = "keeps" if place.surely_inside else "misses" if place.surely_outside else "may keep or miss"
    return f"{name} {verb} {slo.words} on this trace."
