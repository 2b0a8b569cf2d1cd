"""Which bullets of a business case a run's own numbers support, and why the others are not written.

A bullet is a pure function of a `Case`: one precision against the baseline, with what was assumed of prices and
traffic. It returns the bullet with the rows that it stands on, or the reason for its absence. A bullet needs figures
that are told apart: an interval that holds "no difference", a figure that nobody measured, or a suspect or invalid row
supports nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.analysis.capacity import CardPlan, Freed
from harness.analysis.case import Case
from harness.analysis.compare import Estimate
from harness.analysis.cost import price
from harness.analysis.evidence import NEGLIGIBLE, Evidence, drop_words, p_words, points, wrong_words
from harness.analysis.knee import safe_load, standing
from harness.analysis.levels import USERS, axis, load, one_trace
from harness.analysis.saving import Saving
from harness.analysis.sides import SAFE, Row, percent, times
from harness.analysis.trials import against, energy_ratio, more_users, on_fallback, own_failures
from harness.records import SweepPoint

SMALLER = 0.9
"""A memory need counts as smaller from this share of the other's on: less would change no choice of a card."""


@dataclass(frozen=True, slots=True)
class Bullet:
    """A title, what the numbers say, and where they stand."""

    title: str
    text: str
    rows: tuple[Row, ...]
    about: Saving | Freed | None = None
    """A record that has sentences of its own (report/planning.py): they come before `text`."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A bullet that is not written."""

    title: str
    why: str


# --- for --------------------------------------------------------------------------------------------------------------


def keeps_it_alone(case: Case) -> Bullet | Absent:
    """A service level that the baseline misses at every tested load."""
    title = "The service level itself"
    one, base = case.levels.get(case.sides.one), case.levels.get(case.sides.other)
    if one_trace(case.sides.points):
        return Absent(title, case.doubt())
    if one is None or base is not None:
        return Absent(title, f"{case.one if one is None else case.base} {'misses' if one is None else 'keeps'} it")
    if one.verdict != "valid":
        return Absent(title, case.doubt())
    least, place = next(iter(standing(case.sides.rows(case.sides.other), case.slo)), (None, None))
    if least is None or place is None or least.verdict != "valid" or not place.surely_outside:
        return Absent(title, f"that {case.base} misses it from the smallest load on is not sure")
    text = (
        f"{case.one} keeps {case.slo.words} up to {case.amount(load(one))}; {case.base} misses it even at "
        f"{case.amount(load(least))}, the smallest load tested."
    )
    return Bullet(title, text, (*_knees(case), Row("points.csv", case.sides.other, "p95_ms", load(least))))


def cost(case: Case) -> Bullet | Absent:
    """A lower price inside the same service level, each precision at its own safe load."""
    title = "Lower cost a token"
    if doubt := case.doubt():
        return Absent(title, doubt)
    saving, one, base = case.saving, *_both(case)
    if saving is None or saving.share is None:
        return Absent(title, saving.note if saving else "no price of an hour is given")
    if saving.share_lo is None or saving.share_hi is None:
        return Absent(title, f"{percent(saving.share)} has no interval")
    if saving.share_lo <= 0:
        span = f"{percent(saving.share)} [{percent(saving.share_lo)} to {percent(saving.share_hi)}]"
        return Absent(title, f"a cut of {span} is none that was shown")
    prices = [price(level, case.assumptions)[0] or 0.0 for level in (one, base)]
    text = f"{prices[0]:.3g} USD at {case.amount(load(one))} against {prices[1]:.3g} USD at {case.amount(load(base))}."
    return Bullet(title, text, _at_operating(case, "tok_s"), saving)


def tenants(case: Case) -> Bullet | Absent:
    """More tenants on a card."""
    title = "Tenants a card"
    one, base = (case.plans.get(name) for name in case.sides.names)
    if axis(case.sides.points) is not USERS:
        return Absent(title, "an open loop says nothing of users")
    if one is None or base is None or one.tenants_per_card is None or base.tenants_per_card is None:
        return Absent(title, case.doubt() or "the run has no knee")
    if lacking := _no_more_users(case):
        return Absent(title, lacking)
    if one.tenants_per_card <= base.tenants_per_card:
        return Absent(title, f"{one.tenants_per_card} against {base.tenants_per_card} tenants")
    each = case.assumptions.users_per_tenant
    text = (
        f"{case.one} holds {one.tenants_per_card:,} tenants a {case.card} where {case.base} holds "
        f"{base.tenants_per_card:,}: {one.safe_users:g} safe users against {base.safe_users:g}, "
        f"{percent(case.assumptions.headroom)} of them kept free, {each} {'user' if each == 1 else 'users'} a tenant."
    )
    return Bullet(title, text, _knees(case))


def fewer_cards(case: Case) -> Bullet | Absent:
    """Fewer cards for the traffic that is expected."""
    title = "Fewer cards for the expected traffic"
    one, base = (case.plans.get(name) for name in case.sides.names)
    if one is None or base is None or one.cards is None or base.cards is None:
        notes = [plan.note for plan in (one, base) if plan and plan.note]
        return Absent(title, notes[0] if notes else "the run has no knee")
    if doubt := case.doubt():
        return Absent(title, doubt)
    by_users = "users" in (one.bound_by, base.bound_by)
    if by_users and (lacking := _no_more_users(case)):
        return Absent(title, lacking)
    if not by_users and (one.cards_hi is None or base.cards_lo is None):
        return Absent(title, "the requests a second have no interval")
    if (one.cards_hi or one.cards) >= (base.cards_lo or base.cards):
        return Absent(title, f"{_cards(one)} {case.card}s against {_cards(base)}")
    asked = [f"{one.users:,} users"] if one.users is not None else []
    asked += [f"{one.peak_rps:.3g} requests a second"] if one.peak_rps is not None else []
    text = (
        f"{' and '.join(asked)} at the peak take {_cards(one)} {case.card}s with {case.one} and {_cards(base)} with "
        f"{case.base}, {case.assumptions.failover} of them in reserve and {percent(case.assumptions.headroom)} of each "
        "kept free."
    )
    return Bullet(title, text, _knees(case) if by_users else _at_operating(case, "req_s"))


def smaller_card(case: Case) -> Bullet | Absent:
    """The baseline's users in less memory."""
    title = "The same service level in less memory"
    if not case.on_gpu:
        return Absent(title, "it was not measured on a card")
    if doubt := case.doubt():
        return Absent(title, doubt)
    at = load(case.levels[case.sides.other])
    if at > load(case.levels[case.sides.one]):
        return Absent(title, f"{case.one} does not keep it for sure at {case.amount(at)}, as {case.base} does")
    rows = [case.level(name, at) for name in case.sides.names]
    if any(row is None or row.verdict != "valid" for row in rows):
        return Absent(title, f"no valid rows of both at {case.amount(at)}")
    needs = [_need(row) for row in rows if row]
    if needs[0] is None or needs[1] is None:
        return Absent(title, "the engine does not say what it holds and how much of it is in use")
    if needs[0] > SMALLER * needs[1]:
        return Absent(title, f"{needs[0]:.3g} GiB against {needs[1]:.3g}")
    text = (
        f"{case.base}'s {case.amount(at)} take {needs[0]:.3g} GiB with {case.one} and {needs[1]:.3g} GiB with "
        f"{case.base}: weights, runtime, and the KV cache as far as it was in use. That fits a smaller card; whether "
        "a smaller card is fast enough was not measured."
    )
    return Bullet(title, text, (case.sides.row("weights_gib, other_gib, kv_cache_gib, kv_usage_peak", at),))


def two_variants(case: Case) -> Bullet | Absent:
    """Two copies for an A/B test where one baseline stood."""
    title = "Two variants on one card"
    if not case.on_gpu:
        return Absent(title, "it was not measured on a card")
    held = [case.sides.memory(name) for name in case.sides.names]
    if any(line.weights_gib is None or line.other_gib is None for line in held):
        return Absent(title, "the engine does not say what it holds")
    one, base = ((line.weights_gib or 0.0) + (line.other_gib or 0.0) for line in held)
    if 2 * one > base:
        return Absent(title, f"two take 2 × {one:.3g} GiB of weights and runtime, the one {case.base} {base:.3g}")
    text = (
        f"Two {case.one} variants take 2 × {one:.3g} GiB of weights and runtime, the one {case.base} {base:.3g} GiB: "
        "an A/B test needs no second card, and leaves the users as much KV cache as before. How fast the two are side "
        "by side was not measured."
    )
    return Bullet(title, text, (case.sides.row("weights_gib, other_gib"),))


def one_platform(case: Case) -> Bullet | Absent:
    """A gain that asks for no platform of its own."""
    title = "One platform configuration"
    gains = [said for said in (_gain_in_users(case), _gain_in_speed(case)) if said]
    if not gains:
        return Absent(title, "no gain was shown that a platform could be shared for")
    rows = case.sides.points
    if any(row.verdict == "invalid" or row.errors for row in rows):
        return Absent(title, "not every cell of both was served without a fault")
    if any(on_fallback(case.sides, name) for name in case.sides.names):
        return Absent(title, "one of the two ran on a slow fallback kernel")
    engines = {(row.engine, row.engine_version) for row in rows}
    if len(engines) > 1 or None in next(iter(engines)):
        return Absent(title, "the engine and its version are not the same, or not known")
    ((engine, version),) = engines
    names = [name for name in ("max_model_len", "max_num_seqs") if case.settings.get(name) is not None]
    flags = "".join(f", {name} {case.settings[name]}" for name in names)
    text = (
        f"The gain ({gains[0]}) was had with the configuration that serves {case.base}: {engine} {version}"
        f"{flags}. None of {sum(row.requests for row in rows):,} requests failed."
    )
    settings = [Row("run.toml", "run", ", ".join(names))] if names else []
    return Bullet(title, text, (case.sides.row("engine_version, errors, verdict"), *settings))


def kv_room(case: Case) -> Bullet | Absent:
    """Freed memory that the engine filled with KV cache."""
    title = "Room for more or longer conversations"
    freed = case.freed
    if freed is None or freed.kv_tokens is None or freed.users is None:
        return Absent(title, "the engine does not say what its KV cache holds")
    if not freed.measured:
        return Absent(title, "the KV cache had a size that was set, and the freed memory lay idle")
    if freed.users < 1:
        return Absent(title, f"{freed.kv_tokens:,} tokens more are no conversation of {freed.context_tokens:,}")
    text = "That is what fits into memory; how many of them the service level allows, the knee says."
    return Bullet(title, text, (case.sides.row("weights_gib, kv_cache_tokens"),), freed)


def energy(case: Case) -> Bullet | Absent:
    """Less energy a token at a load that both serve."""
    title = "Less energy a token"
    at = case.sound_safe_load()
    if at is None:
        return Absent(title, _no_sound_load(case))
    ratio = energy_ratio(case.sides, at)
    if ratio.value is None:
        return Absent(title, "power was not measured")
    if against(ratio) != "refuted":
        return Absent(title, f"{times(ratio)} at {case.amount(at)} may be none")
    joules = [row.energy_j_per_token if (row := case.level(name, at)) else None for name in case.sides.names]
    text = (
        f"At {case.amount(at)} a token takes {joules[0]:.3g} J with {case.one} and {joules[1]:.3g} J with {case.base}: "
        f"{times(ratio)}, the cards alone."
    )
    return Bullet(title, text, (case.sides.row("energy_j_per_token", at),))


# --- against ----------------------------------------------------------------------------------------------------------


def slower(case: Case) -> Bullet | Absent:
    """Loads at which the precision is the slower one."""
    title = "Where it is slower"
    found = {at: ratio for at in case.sound_loads() if against(ratio := case.sides.ratio("tok_s", at)) == "refuted"}
    if not found:
        return Absent(title, "slower at no load with valid rows")
    safe = SAFE.find(case.sides) or 0.0
    told = ", ".join(f"{times(ratio)} at {case.amount(at)}" for at, ratio in found.items())
    ahead = [at for at in case.sound_loads() if against(case.sides.ratio("tok_s", at)) == "supported"]
    turn = ", ".join(f"{case.amount(at)}{'' if at <= safe else ' (beyond the service level)'}" for at in ahead)
    text = (
        f"{case.one} delivers fewer tokens a second than {case.base}: {told}. Traffic that sits there pays for it."
        f"{f' It is the faster one at {turn}.' if turn else ''}"
    )
    return Bullet(title, text, tuple(case.sides.row("tok_s", at) for at in [*found, *ahead]))


def no_gain(case: Case) -> Bullet | Absent:
    """No difference in speed where the service is run."""
    title = "Where it gains nothing"
    at = case.sound_safe_load()
    if at is None:
        return Absent(title, _no_sound_load(case))
    ratio = case.sides.ratio("tok_s", at)
    if ratio.value is None or ratio.lo is None or against(ratio) != "undecided":
        return Absent(
            title, f"the speeds at {case.amount(at)} are told apart, or not known: {times(ratio) or 'no pair'}"
        )
    trace, largest = "the load of this trace", f"the largest where both keep {case.slo.words} in valid rows"
    text = (
        f"At {case.amount(at)}, {trace if one_trace(case.sides.points) else largest}, {case.one} delivers "
        f"{times(ratio)} the tokens a second of {case.base}: no gain was shown for the risk of fewer bits."
    )
    return Bullet(title, text, (case.sides.row("tok_s", at),))


def prefill_heavy(case: Case) -> Bullet | Absent:
    """A later first token, which long prompts feel most."""
    title = "Long prompts, short answers"
    at = min(case.sound_loads(), default=None)
    if at is None:
        return Absent(title, _no_sound_load(case))
    ratio = case.sides.ratio("ttft_p50_ms", at)
    if against(ratio) != "supported":
        return Absent(title, f"no later first token at {case.amount(at)}: {times(ratio) or 'no pair'}")
    text = (
        f"The first token takes {times(ratio)} as long as with {case.base} at {case.amount(at)}: traffic that reads "
        "much and writes little loses there what it gains later."
    )
    return Bullet(title, text, (case.sides.row("ttft_p50_ms", at),))


def fallback(case: Case) -> Bullet | Absent:
    """A card without a fused kernel."""
    title = "Without a fused kernel"
    if not on_fallback(case.sides, case.sides.one):
        return Absent(title, "no slow fallback kernel was in use")
    kernel = next((row.kernel for row in case.sides.rows(case.sides.one) if row.kernel), "its kernel")
    text = f"{case.one} ran on a slow fallback here ({kernel}): on such a card its figures are no reason to take it."
    return Bullet(title, text, (case.sides.row("kernel, verdict_reasons"),))


def broke(case: Case) -> Bullet | Absent:
    """Failures that the baseline does not have."""
    title = "Where it broke"
    found = own_failures(case.sides)
    if found.outcome != "supported" or found.row is None:
        return Absent(
            title, found.why if found.outcome == "not measured" else f"it broke in no way of its own: {found.why}"
        )
    return Bullet(title, f"{case.one} failed in a way in which {case.base} did not: {found.why}.", (found.row,))


def beyond(case: Case) -> Bullet | Absent:
    """It moves the limit, and does not lift it."""
    title = "Instead of another card"
    found = standing(case.sides.rows(case.sides.one), case.slo)
    out = next((level for level, place in found if place.surely_outside and level.verdict == "valid"), None)
    if out is None:
        return Absent(title, f"{case.one} left the service level for sure at no tested load with a valid row")
    p95 = "" if out.p95_ms is None else f" (p95 {out.p95_ms / 1e3:.3g} s)"
    text = (
        f"At {case.amount(load(out))} {case.one} misses {case.slo.words} too{p95}: growth beyond that takes another "
        f"{case.card} in either precision."
    )
    return Bullet(title, text, (Row("points.csv", case.sides.one, "p95_ms", load(out)),))


def unknown_quality(case: Case) -> Bullet | Absent:
    """What the answers are worth: not known, worse, or not shown to be as good."""
    if case.answers is not None:
        return _worse_answers(case, case.answers)
    text = (
        f"Whether {case.one} answers as well as {case.base} was not measured in this run: no column of points.csv "
        "speaks of it. Where a wrong answer costs more than a card, that comes first."
    )
    return Bullet("Before its answers are judged", text, (Row("points.csv", case.sides.one, "source"),))


def _worse_answers(case: Case, evidence: Evidence) -> Bullet | Absent:
    title = "Where its answers are worse"
    name, whole = case.sides.one, evidence.whole(case.sides.one)
    rows = [Row("families.csv", name, "drop_lo, drop, drop_hi, p_value")]
    if evidence.passed(name) is False:
        return Bullet(title, f"{case.one} did not pass the gate: {evidence.refusal(name)}.", _rows_of(case))
    lost = [row for row in evidence.families(name) if evidence.decided(row) and (row.drop or 0.0) > 0]
    if whole is not None and evidence.decided(whole) and (whole.drop or 0.0) > 0:
        lost = [whole, *lost]
    if lost:
        told = "; ".join(
            f"{'of all prompts' if row is whole else row.family} {wrong_words(row)}, McNemar {p_words(row.p_value)}, "
            f"{drop_words(row)} of accuracy lost" for row in lost
        )  # fmt: skip
        return Bullet(title, f"{case.one} fails more than {case.base}: {told}.", tuple(rows))
    if whole is None or whole.drop_hi is None:
        text = f"No answer was judged right or wrong: how far {case.one} is from {case.base} is known as a KL alone."
        return Bullet("Right and wrong were not judged", text, (Row("fidelity.csv", name, "kl_nats"),))
    if whole.drop_hi > NEGLIGIBLE:
        text = (
            f"Over {whole.items} prompts {case.one} loses {drop_words(whole)} of accuracy against {case.base}: up to "
            f"{points(whole.drop_hi)} pp may be lost, and more prompts would tell. Where a wrong answer costs more "
            "than a card, that comes first."
        )
        return Bullet("That it answers as well is not shown", text, tuple(rows))
    return Absent(title, f"{drop_words(whole)} of accuracy lost over {whole.items} prompts, and in no family for sure")


# --- only where answers were compared ---------------------------------------------------------------------------------


def as_good(case: Case) -> Bullet | Absent:
    """Answers that are no worse: the whole interval of the drop within NEGLIGIBLE, and no family that is lost."""
    title = "Answers as good"
    evidence, name = case.answers, case.sides.one
    whole = evidence.whole(name) if evidence else None
    if evidence is None or whole is None or whole.drop_hi is None:
        return Absent(title, "its answers were not judged right or wrong")
    if evidence.passed(name) is False:
        return Absent(title, f"it did not pass the gate: {evidence.refusal(name)}")
    if whole.drop_hi > NEGLIGIBLE:
        most = f"more than {points(NEGLIGIBLE)} pp cannot be excluded"
        return Absent(title, f"{drop_words(whole)} of accuracy lost over {whole.items} prompts: {most}")
    lost = [row for row in evidence.families(name) if evidence.decided(row) and (row.drop or 0.0) > 0]
    if lost:
        return Absent(title, f"it loses in {lost[0].family}: {drop_words(lost[0])}")
    passed = f" It passed the gate ({evidence.gate_words})." if evidence.passed(name) else ""
    text = (
        f"{case.one} answers as well as {case.base}: {drop_words(whole)} of accuracy lost over {whole.items} prompts "
        f"that both answered, the whole interval within {points(NEGLIGIBLE)} pp.{passed}"
    )
    return Bullet(title, text, (Row("families.csv", name, "drop_lo, drop, drop_hi"),))


def cheaper_answers(case: Case) -> Bullet | Absent:
    """A lower price for each correct answer, what was lost in accuracy paid for."""
    title = "Lower cost a correct answer"
    if doubt := case.doubt():
        return Absent(title, doubt)
    one, base = (case.correct.get(name) for name in case.sides.names)
    if one is None or base is None or one.break_even is None or one.kept is None or one.kept_lo is None:
        return Absent(title, (one.note if one else "") or "its answers were not judged, or an hour has no price")
    if case.saving is None or case.saving.share_lo is None:
        return Absent(title, "the price of a token has no interval")
    needed = max(one.break_even, 1 - case.saving.share_lo)
    kept = f"{percent(one.kept)} [{percent(one.kept_lo)} to {percent(one.kept_hi or 0.0)}]"
    if one.kept_lo <= needed:
        return Absent(title, f"it has {kept} of {case.base}'s accuracy, and needs more than {percent(needed)} for sure")
    text = (
        f"1,000 correct answers cost {one.usd_per_1000_correct:.3g} USD with {case.one} and "
        f"{base.usd_per_1000_correct:.3g} USD with {case.base}. {case.one} is the cheaper one for each while it keeps "
        f"more than {percent(one.break_even)} of {case.base}'s accuracy (at the worse end of the price's interval "
        f"{percent(needed)}); it keeps {kept}."
    )
    rows = (Row("families.csv", case.sides.one, "right, base_right, items"), *_at_operating(case, "req_s"))
    return Bullet(title, text, rows)


def _rows_of(case: Case) -> tuple[Row, ...]:
    """Where the gate's figures stand."""
    found = [Row("families.csv", case.sides.one, "drop, drop_hi, issues")] if case.answers and case.answers.whole(
        case.sides.one) else []  # fmt: skip
    if case.answers and case.answers.whole_fidelity(case.sides.one):
        found.append(Row("fidelity.csv", case.sides.one, "kl_nats_hi"))
    return tuple(found)


OF_ANSWERS: tuple[Callable[[Case], Bullet | Absent], ...] = (as_good, cheaper_answers)
"""For, where the run's answers were compared: of a run that asked nothing they were not tested."""
FOR: tuple[Callable[[Case], Bullet | Absent], ...] = (
    keeps_it_alone, cost, tenants, fewer_cards, smaller_card, two_variants, one_platform, kv_room, energy,
)  # fmt: skip
"""The weightiest first. At most eight hold: the first of them excludes the second and the fourth."""
AGAINST: tuple[Callable[[Case], Bullet | Absent], ...] = (
    slower, no_gain, prefill_heavy, fallback, broke, beyond, unknown_quality,
)  # fmt: skip


# --- what several of them need ----------------------------------------------------------------------------------------


def _no_more_users(case: Case) -> str:
    """Why more users are not shown; "" where they are, on valid operating points."""
    found = more_users(case.sides)
    if found.outcome == "supported":
        return case.doubt()
    words = f" ({times(found.ratio)})" if times(found.ratio) else ""
    return f"more users inside {case.slo.words} are not shown{words}: {found.why or 'they are fewer'}"


def _gain_in_users(case: Case) -> str:
    if _no_more_users(case):
        return ""
    one, base = (safe_load(knee) or 0.0 for name in case.sides.names if (knee := case.sides.knee(name)))
    return f"{case.amount(base)} → {case.amount(one)} inside {case.slo.words}"


def _gain_in_speed(case: Case) -> str:
    at = case.sound_safe_load()
    ratio = Estimate() if at is None else case.sides.ratio("tok_s", at)
    return f"{times(ratio)} the tokens a second at {case.amount(at or 0)}" if against(ratio) == "supported" else ""


def _cards(plan: CardPlan) -> str:
    return f"{plan.cards}" if plan.cards_lo == plan.cards_hi else f"{plan.cards} [{plan.cards_lo}–{plan.cards_hi}]"


def _no_sound_load(case: Case) -> str:
    return f"no load where both keep {case.slo.words} in valid rows"


def _both(case: Case) -> tuple[SweepPoint, SweepPoint]:
    return case.levels[case.sides.one], case.levels[case.sides.other]


def _knees(case: Case) -> tuple[Row, ...]:
    return (Row("knees.csv", ", ".join(case.sides.names), "cross_lo, cross, cross_hi"),)


def _at_operating(case: Case, column: str) -> tuple[Row, ...]:
    return tuple(
        Row("points.csv", name, column, load(case.levels[name])) for name in case.sides.names if name in case.levels
    )


def _need(level: SweepPoint) -> float | None:
    """Memory that a load needs, GiB: weights, runtime, and the part of the KV cache that was in use."""
    parts = (level.weights_gib, level.other_gib, level.kv_cache_gib, level.kv_usage_peak)
    if any(part is None for part in parts):
        return None
    weights, other, cache, used = (part or 0.0 for part in parts)
    return weights + other + cache * used
