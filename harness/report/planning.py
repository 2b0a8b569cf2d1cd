"""Cards, money and memory in words: the tables and sentences of a plan, for a page and for a terminal.

Tables are Markdown, their names escaped. Sentences are plain text, as those of analysis/headline.py: a page escapes
them, a terminal prints them (`planning_sentences`). Nothing is computed here that analysis has not.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.capacity import CardPlan, Freed, freed_memory, operating_levels, plan_cards
from harness.analysis.cost import hour_usd, stated_lines
from harness.analysis.headline import label
from harness.analysis.saving import Saving, savings
from harness.analysis.spend import BreakEven, Spend, spends
from harness.analysis.words import words_of
from harness.assumptions import Assumptions
from harness.records import CostLine, Knee, SweepPoint
from harness.report.document import document
from harness.report.run import Run
from harness.report.tables import interval, named, number, table


def planning_sentences(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[str]:
    """Everything there is to say of a run's cards and costs, in the order in which people ask."""
    plans, words = plan_cards(points, knees, assumptions), words_of(points)
    return [
        *([words.assumed(demand_sentence(assumptions))] if has_demand(assumptions) else []),
        *map(words.said, plan_sentences(plans, assumptions)),
        *map(words.said, freed_sentences(freed_memory(points, assumptions.context_tokens))),
        *map(words.said, savings_sentences(savings(points, knees, assumptions))),
        *map(words.assumed, hour_sentences(points, knees, assumptions)),
        *map(words.said, spend_sentences(spends(points, knees, assumptions), assumptions)),
    ]


def capacity_document(run: Run, knees: Sequence[Knee], assumptions: Assumptions) -> str:
    """`bench capacity --json`: cards, prices and spend as records, by which assumptions, and the same in words."""
    return document(
        "capacity",
        model=run.model,
        source=run.source,
        slo=run.slo,
        assumptions=assumptions,
        plans=plan_cards(run.points, knees, assumptions),
        prices=stated_lines(run.points, knees, assumptions),
        spend=spends(run.points, knees, assumptions),
        sentences=planning_sentences(run.points, knees, assumptions),
    )


# --- cards ------------------------------------------------------------------------------------------------------------


def has_demand(assumptions: Assumptions) -> bool:
    """Whether anybody said what the cards are for."""
    return assumptions.users is not None or assumptions.peak is not None


def demand_sentence(assumptions: Assumptions) -> str:
    """What the cards are for, and what is kept free: "Demand: 120 users at the peak; ..."."""
    parts = []
    if assumptions.users is not None:
        parts.append(f"{_many(assumptions.users, 'user')} at the peak")
    if assumptions.requests_per_day is not None:
        parts.append(f"{number(assumptions.requests_per_day)} requests a day")
    if assumptions.peak is not None:
        times = assumptions.requests_per_day and f", {assumptions.peak_over_mean:.3g} times the day's mean"
        parts.append(f"{number(assumptions.peak)} requests a second at the peak{times or ''}")
    kept = f"{percent(assumptions.headroom)} of each card's safe capacity kept free"
    return f"Demand: {'; '.join(parts)}. {kept}, {_many(assumptions.failover, 'card')} in reserve."


def plan_table(plans: Sequence[CardPlan], assumptions: Assumptions) -> str:
    """A row for each precision: what a card carries, how many cards that makes, how full they are."""
    lost = _many(assumptions.failover, "card")
    columns = {
        "Precision": [named(plan.precision) for plan in plans],
        "Safe users a card": [_whole(plan.safe_users) for plan in plans],
        "Safe req/s a card": [number(plan.safe_rps) for plan in plans],
        "Cards for the load": [_whole(plan.cards_for_load) for plan in plans],
        "Cards": [_cards(plan) for plan in plans],
        "Full at the peak": [_percent(plan.utilisation_peak) for plan in plans],
        f"Full with {lost} lost": [_percent(plan.utilisation_lost) for plan in plans],
        "Full over the day": [_percent(plan.utilisation_mean) for plan in plans],
        f"Tenants a card, {_many(assumptions.users_per_tenant, 'user')} each": [
            _whole(plan.tenants_per_card) for plan in plans
        ],
    }
    return _filled(columns)


def plan_sentences(plans: Sequence[CardPlan], assumptions: Assumptions) -> list[str]:
    """A sentence for each precision: its cards and what decides their number, or why there is none.

    Nobody asked for cards without a demand: then there is nothing to say.
    """
    return [_plan_words(plan, assumptions) for plan in plans] if has_demand(assumptions) else []


def _plan_words(plan: CardPlan, assumptions: Assumptions) -> str:
    name = label(plan.precision)
    if plan.cards is None:
        return f"{name}: no number of cards, because {plan.note}."
    full = f"At the peak they are {_percent(plan.utilisation_peak)} full"
    if assumptions.failover:
        full += f", {_percent(plan.utilisation_lost)} with {_many(assumptions.failover, 'card')} lost"
    if plan.utilisation_mean is not None:
        full += f", {_percent(plan.utilisation_mean)} over the day"
    words = (
        f"{name} needs {_cards(plan)} {'card' if plan.cards == 1 else 'cards'} at {plan.slo}, "
        f"{plan.cards_for_load} for the load and {assumptions.failover} in reserve; {plan.bound_by} decide. {full}."
    )
    if plan.tenants_per_card is not None:
        each = _many(assumptions.users_per_tenant, "user")
        words += f" A card holds {_many(plan.tenants_per_card, 'tenant')} of {each}."
    if plan.note:
        words += f" {plan.note[0].upper()}{plan.note[1:]}."
    return words + _care(plan.verdict)


def freed_sentences(lines: Sequence[Freed]) -> list[str]:
    """ "AWQ frees 2.10 GiB of weights = 74,000 more KV tokens = 36 more users of 2,048 tokens each, against BF16." """
    return [words for line in lines if (words := _freed_words(line))]


def _freed_words(line: Freed) -> str:
    parts = []
    if line.weights_gib is not None:
        verb, more = ("frees", "") if line.weights_gib >= 0 else ("takes", " more")
        parts.append(f"{verb} {number(abs(line.weights_gib))} GiB{more} of weights")
    if line.kv_tokens is not None and line.users is not None:
        more = "more" if line.kv_tokens >= 0 else "fewer"
        verb = "" if parts else ("has " if line.measured else "would have ")
        users = f"{_many(abs(line.users), 'user', more)} of {line.context_tokens:,} tokens each"
        parts.append(f"{verb}{abs(line.kv_tokens):,} {more} KV tokens = {users}")
    if not parts:
        return ""
    opposed = (line.weights_gib or 0) * (line.kv_tokens or 0) < 0
    words = (" and yet has " if opposed else " = ").join(parts)
    basis = ""
    if line.kv_tokens is not None:
        basis = (
            " (measured: the engine filled the card with KV cache)"
            if line.measured
            else " (computed: here the KV cache had a set size, and the difference lay idle)"
        )
    return f"{label(line.precision)} {words}, against {label(line.baseline)}{basis}."


# --- prices -----------------------------------------------------------------------------------------------------------


def stated_table(lines: Sequence[CostLine]) -> str:
    """$/1M tokens at the stated operating points, four ways to share out the hour, with intervals."""
    columns = {
        "Precision": [named(line.precision) for line in lines],
        "Operating point": [line.operating_point for line in lines],
        "p95, s": [number(None if line.p95_ms is None else line.p95_ms / 1e3) for line in lines],
        "tok/s in": [number(line.input_tok_s) for line in lines],
        "tok/s out": [number(line.tok_s) for line in lines],
        "USD/hour": [number(line.usd_per_hour) for line in lines],
        "USD/1M, all on output": [
            interval(line.usd_per_1m_tokens, line.usd_per_1m_tokens_lo, line.usd_per_1m_tokens_hi) for line in lines
        ],
        "USD/1M input": [
            interval(line.usd_per_1m_input, line.usd_per_1m_input_lo, line.usd_per_1m_input_hi) for line in lines
        ],
        "USD/1M output": [
            interval(line.usd_per_1m_output, line.usd_per_1m_output_lo, line.usd_per_1m_output_hi) for line in lines
        ],
        "USD/1M blended": [
            interval(line.usd_per_1m_blended, line.usd_per_1m_blended_lo, line.usd_per_1m_blended_hi) for line in lines
        ],
        "Verdict": [line.verdict or line.note for line in lines],
    }
    return table(tuple(columns), list(zip(*columns.values(), strict=True)))


def hour_sentences(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[str]:
    """What an hour of a card costs and in which parts: one sentence for all, where they are alike."""
    found: dict[str, list[str]] = {}
    for precision, level in operating_levels(points, knees).items():
        hour = hour_usd(assumptions, level)
        if hour is None:
            words = "has no price"
        elif not assumptions.owned:
            words = f"costs {usd(hour.usd)} in rent"
        elif hour.watts is None:
            words = f"costs {usd(hour.usd)}, written off over {_years(assumptions)}; {hour.note}"
        else:
            words = (
                f"costs {usd(hour.usd)}: {usd(hour.capital_usd)} written off over {_years(assumptions)}, "
                f"{usd(hour.energy_usd)} for electricity ({number(hour.watts)} W under load, "
                f"{percent(hour.utilisation)} of the time)"
            )
        found.setdefault(words, []).append(label(precision))
    return [
        f"An hour of a card{f' with {_and(names)}' if len(found) > 1 else ''} {words}."
        for words, names in found.items()
    ]


def savings_sentences(lines: Sequence[Saving]) -> list[str]:
    """ "AWQ cuts serving cost per 1M output tokens by 38 % [35–41] against BF16 at equal p95 ...", or raises it."""
    return [_saving_words(line) for line in lines]


def _saving_words(line: Saving) -> str:
    name, base = label(line.precision), label(line.baseline)
    if line.share is None:
        return f"{name} against {base}: no serving costs to compare, because {line.note}."
    level = f"at the same service level ({line.slo}), each at its own largest safe load"
    what, care = "serving cost per 1M output tokens", _care(line.verdict, "One of the two operating points")
    if line.share_lo is None or line.share_hi is None:
        verb = "cuts" if line.share >= 0 else "raises"
        return f"{name} {verb} {what} by {percent(abs(line.share))} (no interval) against {base} {level}.{care}"
    ends = _ends(line.share_lo, line.share_hi)
    if line.share_lo > 0:
        return f"{name} cuts {what} by {percent(line.share)} [{ends}] against {base} {level}.{care}"
    if line.share_hi < 0:
        ends = _ends(-line.share_hi, -line.share_lo)
        return f"{name} raises {what} by {percent(-line.share)} [{ends}] against {base} {level}.{care}"
    return (
        f"It is undecided whether {name} cuts {what} against {base} {level}: by {percent(line.share)} [{ends}].{care}"
    )


# --- spend ------------------------------------------------------------------------------------------------------------


def spend_table(lines: Sequence[Spend]) -> str:
    """A row for each precision: the fleet's day and month, its $/1M at this traffic and at full load, and the API."""
    columns = {
        "Precision": [named(line.precision) for line in lines],
        "Cards": [_whole(line.cards) for line in lines],
        "USD a card-hour": [number(line.usd_per_hour) for line in lines],
        "USD a day": [number(line.usd_per_day) for line in lines],
        "USD a month": [number(line.usd_per_month) for line in lines],
        "USD/1M output, at this traffic": [number(line.effective.output_only) for line in lines],
        "USD/1M output, at full load": [number(line.full_load.output_only) for line in lines],
        "USD/1M blended, at this traffic": [number(line.effective.blended) for line in lines],
        "USD/1M blended, at full load": [number(line.full_load.blended) for line in lines],
        "API, USD a month": [number(line.api_usd_per_month) for line in lines],
        "Break-even, requests a day": [_break_even_cell(line.fleet_break_even) for line in lines],
    }
    return _filled(columns)


def spend_sentences(lines: Sequence[Spend], assumptions: Assumptions) -> list[str]:
    """For each precision its spend, then its break-even; without cards or without an API, that much less."""
    sentences = []
    for line in lines:
        sentences += [words for words in (_spend_words(line, lines[0]), _break_even_words(line, assumptions)) if words]
    return sentences


def _spend_words(line: Spend, base: Spend) -> str:
    if line.cards is None or line.usd_per_month is None:
        return ""
    words = (
        f"{_many(line.cards, 'card')} with {label(line.precision)}: {usd(line.usd_per_day)} a day, "
        f"{usd(line.usd_per_month)} a month"
    )
    if line is not base and base.usd_per_month is not None and base.note == line.note:
        less = base.usd_per_month - line.usd_per_month
        other = label(base.precision)
        words += (
            f", {usd(abs(less))} {'less' if less > 0 else 'more'} than with {other}" if less else f", as with {other}"
        )
    if line.effective.output_only is not None and line.full_load.output_only is not None:
        words += (
            f"; {usd(line.effective.output_only)} per 1M output tokens at this traffic, "
            f"{usd(line.full_load.output_only)} if a card were never idle"
        )
    return f"{words}.{f' Note: {line.note}.' if line.note else ''}"


def _break_even_words(line: Spend, assumptions: Assumptions) -> str:
    card, fleet = line.card_break_even, line.fleet_break_even
    if card.never is None:
        return ""
    name = label(line.precision)
    api = " ".join(assumptions.api_name.split()) or "the API"
    if card.never:
        return f"{name} never breaks even against {api}, which is cheaper even than a card at full load."
    words = (
        f"Against {api}, one card with {name} breaks even at {number(card.per_day)} requests a day, "
        f"{_percent(card.share)} of what it safely carries."
    )
    if line.cards is None or fleet.never is None:
        return words
    if fleet.never:
        return (
            f"{words} {_many(line.cards, 'card')} never {_do(line.cards)}: they are full at "
            f"{number(fleet.most_per_day)} requests a day and would need {number(fleet.per_day)}."
        )
    words += f" {_many(line.cards, 'card')} {_do(line.cards)} at {number(fleet.per_day)} requests a day"
    if line.requests_per_day is None or line.usd_per_month is None or line.api_usd_per_month is None:
        return f"{words}."
    left = line.api_usd_per_month - line.usd_per_month
    verdict = f"saves {usd(left)}" if left >= 0 else f"costs {usd(-left)} more"
    return f"{words}; at {number(line.requests_per_day)} a day, serving it oneself {verdict} a month."


def _break_even_cell(even: BreakEven) -> str:
    if even.never is None:
        return ""
    return "never" if even.never else number(even.per_day)


def _filled(columns: dict[str, list[str]]) -> str:
    """A table of the columns that have anything to show, and of the names."""
    shown = {name: cells for name, cells in columns.items() if any(cells) or name == "Precision"}
    return table(tuple(shown), list(zip(*shown.values(), strict=True)))


# --- figures ----------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share for people: 38 %, 2.3 %, 0.12 %."""
    return f"{_percents(share)} %"


def usd(amount: float | None) -> str:
    """Money for people, three digits: 1,234 USD. The sign of a dollar would begin a formula to some renderers."""
    return "" if amount is None else f"{number(amount)} USD"


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _percents(share: float) -> str:
    points = abs(share) * 100
    digits = 0 if points >= 10 or points == 0 else 1 if points >= 1 else 2
    return f"{'−' if share < 0 else ''}{points:.{digits}f}"


def _ends(low: float, high: float) -> str:
    """35–41, and −3.0 to 7.0 where the dash could be taken for a sign."""
    return f"{_percents(low)}{' to ' if low < 0 or high < 0 else '–'}{_percents(high)}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,g}"


def _cards(plan: CardPlan) -> str:
    """6, and 6 [6–7] where the interval says that it may be another number."""
    if plan.cards is None:
        return ""
    if plan.cards_lo is None or plan.cards_hi is None or plan.cards_lo == plan.cards_hi:
        return f"{plan.cards:,}"
    return f"{plan.cards:,} [{plan.cards_lo:,}–{plan.cards_hi:,}]"


def _many(count: int, noun: str, more: str = "") -> str:
    """1 card, 6 cards, 36 more users."""
    return f"{count:,} {f'{more} ' if more else ''}{noun}{'' if count == 1 else 's'}"


def _years(assumptions: Assumptions) -> str:
    return f"{assumptions.years:g} year{'' if assumptions.years == 1 else 's'}"


def _do(count: int) -> str:
    return "does" if count == 1 else "do"


def _and(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)


def _care(verdict: str | None, what: str = "Its operating point") -> str:
    return f" {what} is suspect." if verdict == "suspect" else ""
