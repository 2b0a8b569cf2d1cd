"""What the planned cards cost a day and a month, and when an API is cheaper.

    spend a day = cards × 24 × H(u)         H of cost.py, u = mean utilisation under the expected traffic
    a month     = 365.25 / 12 days
    effective   = spend a day / tokens a day, shared out as a price is

Break-even, with F = capital + idle and L = load of the hour, Q = req_s at the safe load, and a the API's price of a
request of the measured lengths: a day of a card that serves r requests costs 24 F + 24 L r / (86,400 Q), the API's a r,

    r = 24 F / (a − 24 L / (86,400 Q))      never, if the divisor is not positive or r > 86,400 Q, a card's day at Q

A fleet of n cards, failover among them, costs 24 n F + 24 L r / (86,400 Q) and breaks even at n times as many; never,
if that is more than its cards for the load carry, headroom kept free, on a day with its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis.capacity import CardPlan, operating_levels, plan_cards
from harness.analysis.cost import Hour, Prices, hour_usd, prices_at, split
from harness.assumptions import DAY_S, Assumptions
from harness.records import Knee, SweepPoint

MONTH_DAYS = 365.25 / 12


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Requests a day at which cards cost what an API does. None: not known; with `never`, that no number does."""

    per_day: float | None = None
    most_per_day: float | None = None
    """What the cards carry in a day."""
    share: float | None = None
    """per_day / most_per_day: how full they have to be. Above 1 they are full before they cost less."""
    never: bool | None = None


@dataclass(frozen=True, slots=True)
class Spend:
    """What the cards of a CardPlan cost, and what an API would; US dollars. None: not known or not asked for."""

    precision: str
    cards: int | None = None
    usd_per_hour: float | None = None
    """Of one card that is under load for `utilisation` of the hour: its share of the expected traffic."""
    utilisation: float | None = None
    usd_per_day: float | None = None
    usd_per_month: float | None = None
    requests_per_day: float | None = None
    effective: Prices = Prices()
    """$/1M at the expected traffic: the day's spend over the day's tokens. Failover and idle hours are paid."""
    full_load: Prices = Prices()
    """$/1M of one card that is never idle, at its operating point: what `effective` comes down to at best."""
    api_usd_per_request: float | None = None
    api_usd_per_day: float | None = None
    api_usd_per_month: float | None = None
    card_break_even: BreakEven = BreakEven()
    """Of one card, full being its safe load all day."""
    fleet_break_even: BreakEven = BreakEven()
    """Of all `cards`, full being the day whose peak the cards for the load carry with their headroom kept free."""
    note: str = ""
    """Why figures are missing, or what they leave out."""


def spends(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[Spend]:
    """One for each knee: the fleet that `plan_cards` finds, by the hour of its operating point.

    Expected traffic decides how long the cards are under load, and so their energy; without requests_per_day the
    stated utilisation does.
    """
    operating = operating_levels(points, knees)
    return [_spend(plan, operating.get(plan.precision), assumptions) for plan in plan_cards(points, knees, assumptions)]


def _spend(plan: CardPlan, at: SweepPoint | None, assumptions: Assumptions) -> Spend:
    hour = None if at is None else hour_usd(assumptions, at)
    if at is None or hour is None:
        return Spend(plan.precision, plan.cards, note=plan.note if at is None else "no price of an hour is given")
    full_load = prices_at(at, replace(hour, utilisation=1.0).usd, 1.0, assumptions.output_weight)
    if plan.utilisation_mean is not None:
        hour = replace(hour, utilisation=plan.utilisation_mean)
    requests = assumptions.requests_per_day
    per_day = None if plan.cards is None else plan.cards * 24 * hour.usd
    api_per_request = api_usd_per_request(at, assumptions)
    api_per_day = _product(api_per_request, requests)
    card, fleet = _break_evens(plan, at, hour, api_per_request, assumptions)
    return Spend(
        precision=plan.precision,
        cards=plan.cards,
        usd_per_hour=hour.usd,
        utilisation=hour.utilisation,
        usd_per_day=per_day,
        usd_per_month=_product(per_day, MONTH_DAYS),
        requests_per_day=requests,
        effective=_effective(at, per_day, requests, assumptions.output_weight),
        full_load=full_load,
        api_usd_per_request=api_per_request,
        api_usd_per_day=api_per_day,
        api_usd_per_month=_product(api_per_day, MONTH_DAYS),
        card_break_even=card,
        fleet_break_even=fleet,
        note="; ".join(note for note in (plan.note, hour.note) if note),
    )


def _effective(at: SweepPoint, usd_per_day: float | None, requests: float | None, output_weight: float) -> Prices:
    if usd_per_day is None:
        return Prices()
    incoming, outgoing = _product(at.input_tokens_mean, requests), _product(at.output_tokens_mean, requests)
    return split(usd_per_day, incoming, outgoing, output_weight)


def api_usd_per_request(level: SweepPoint, assumptions: Assumptions) -> float | None:
    """What an API asks for a request of the measured lengths; None without its prices or the lengths."""
    per_input, per_output = assumptions.api_usd_per_1m_input, assumptions.api_usd_per_1m_output
    incoming, outgoing = level.input_tokens_mean, level.output_tokens_mean
    if per_input is None or per_output is None or incoming is None or outgoing is None:
        return None
    return (incoming * per_input + outgoing * per_output) / 1e6


def _break_evens(
    plan: CardPlan, at: SweepPoint, hour: Hour, api_per_request: float | None, assumptions: Assumptions
) -> tuple[BreakEven, BreakEven]:
    """Of one card, and of the fleet; the formulas stand in the module."""
    if api_per_request is None or not at.req_s:
        return BreakEven(), BreakEven()
    card_most = at.req_s * DAY_S
    fixed = 24 * (hour.capital_usd + hour.idle_usd)
    left = api_per_request - 24 * hour.load_usd / card_most
    card = _break_even(fixed, left, card_most)
    if plan.cards is None or plan.cards_for_load is None or plan.usable_rps is None:
        return card, BreakEven()
    fleet_most = plan.cards_for_load * plan.usable_rps * DAY_S / assumptions.peak_over_mean
    return card, _break_even(plan.cards * fixed, left, fleet_most)


def _break_even(fixed_usd: float, left_usd: float, most_per_day: float) -> BreakEven:
    """`left_usd`: what a request saves against the API, its own energy paid; it pays for what a day costs anyway."""
    if left_usd <= 0:
        return BreakEven(most_per_day=most_per_day, never=True)
    per_day = fixed_usd / left_usd
    return BreakEven(per_day, most_per_day, per_day / most_per_day, per_day > most_per_day)


def _product(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one * two
