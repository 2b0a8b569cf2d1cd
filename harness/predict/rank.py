"""`bench gpus`: which card, in which precision, carries a model's traffic at the service level for the least money.

    card × precision ─► served ─► cells at a ladder of users ─► rows with bands ─► knee ─► cards ─► $/month ─► rank
                        or why it cannot be                         at three ends of the band

The decisions are the project's own: find_knees says how many users a card carries, plan_cards how many cards that
makes, spends what they cost. All three are asked three times, of the same rows at three ends of their error band:

    middle    the prediction itself: cards and usd_per_month, by which cards are ranked
    slow      every latency at its upper end, throughput at its lower: the most cards (_hi). Its safe load is the one
              that `bench capacity` promises of a predicted run, for a promise is made at the worse end
    fast      the other way round: the fewest cards (_lo)

A load is looked for on a fixed ladder, from 8 users on eight steps an octave, by bisection: latency is taken not to
fall as users are added. `bench predict --conc` with the loads that were tried (`tested`) comes to the same cards; with
all of the ladder too, unless a percentile's noise puts an earlier step outside. No card works with another here: each
serves the whole model by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from harness.analysis.capacity import CardPlan, operating_levels, plan_cards
from harness.analysis.knee import find_knees, placed, safe_load
from harness.analysis.spend import Spend, spends
from harness.analysis.words import Words
from harness.assumptions import Assumptions
from harness.errors import InputError
from harness.job import SweepRequest
from harness.predict import cell as cells
from harness.predict import run as predicted
from harness.predict.bands import Bands, Basis, bands
from harness.predict.cards import Card, cards
from harness.predict.cell import Served
from harness.predict.coefficients import fitted
from harness.predict.roofline import Coefficients, kernel_of
from harness.predict.shapes import Shape
from harness.prices import Prices, load_prices, offer
from harness.records import Cell, Knee, Scenario, Source, SweepPoint, Verdict
from harness.slo import Slo

MOST_USERS = 256
"""Of one card: the largest step of the ladder, unless another is asked for."""

End = Literal["middle", "slow", "fast"]
_ENDS: tuple[End, ...] = ("middle", "slow", "fast")
_LATENCIES = ("p95_ms", "p99_ms", "ttft_p95_ms", "tpot_p95_ms")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a card is looked for: a model, its traffic and service level, and how cards are paid for."""

    model: Shape
    scenario: Scenario
    """A closed loop; its service level is the one that is kept."""
    assumptions: Assumptions
    """Demand, headroom and failover; prices come from the catalogue, card by card."""
    precisions: tuple[str, ...] = ("bf16", "awq", "gptq")
    """Among equals the one that is named first wins."""
    cards: tuple[Card, ...] = ()
    """() is every card of the catalogue."""
    own: bool = False
    """Buy the cards and pay for their electricity instead of renting them."""
    usd_per_kwh: float = 0.0
    """With `own`; a card under load is taken to draw the limit of its board."""
    most_users: int = MOST_USERS


@dataclass(frozen=True, slots=True)
class RankedCard:
    """One precision on one card. Figures of a card are those at its safe load; None: not known, or there is none.

    _lo and _hi are the ends of the error band, as the module has them. cards_hi None beside `cards`: at the slow end of
    the band no load is safe, not even one user.
    """

    rank: int | None
    """Of the card, by its cheapest precision: one more than there are cheaper cards. None: no price, or no cards."""
    card: str
    name: str
    precision: str
    wins: bool = False
    """The cheapest precision on this card; without a price the one that takes the fewest cards."""
    cards: int | None = None
    cards_lo: int | None = None
    cards_hi: int | None = None
    usd_per_month: float | None = None
    usd_per_month_lo: float | None = None
    usd_per_month_hi: float | None = None
    usd_per_hour: float | None = None
    """Of one card, its energy included where it is owned."""
    bound_by: str | None = None
    """Which demand takes the more cards: users or requests."""
    safe_users: int | None = None
    safe_users_lo: int | None = None
    safe_users_hi: int | None = None
    safe_rps: float | None = None
    tok_s: float | None = None
    p95_ms: float | None = None
    limit: str | None = None
    """Which limit of the service level is left first: p95, TTFT, TPOT, goodput; None: none up to the largest load."""
    cause: str | None = None
    """Why there: kv_cache, max_num_seqs, compute; none: it is not left."""
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    kernel: str | None = None
    basis: Basis | None = None
    """What its error band stands on; architecture: the card is unvalidated."""
    published_points: int = 0
    """Published rows of this card behind the band."""
    verdict: Verdict | None = None
    price: str = ""
    """Where the price is from, and its day."""
    tested: tuple[int, ...] = ()
    """Users that were simulated."""
    source: Source = "predicted"
    note: str = ""
    """Why figures are missing, or what they leave out."""

    @property
    def unvalidated(self) -> bool:
        return self.basis == "architecture"


def ladder(most: int) -> tuple[int, ...]:
    """Loads that are tried: 1 to 8, then eight in each octave, up to `most`: 1 2 ... 8 9 ... 16 18 20 ... 32 36 ..."""
    steps = {*range(1, 9), *(eighth << octave for octave in range(most.bit_length()) for eighth in range(8, 16)), most}
    return tuple(sorted(step for step in steps if step <= most))


def check(wanted: Wanted) -> None:
    """Raises InputError for what cannot be ranked, before anything is predicted."""
    given, scenario = wanted.assumptions, wanted.scenario
    cells.check_scenario(scenario)
    if scenario.arrivals != "closed":
        raise InputError(
            f"{scenario.name}: arrivals = {scenario.arrivals}: cards are ranked by the users that they carry",
            allowed="a closed loop; a rate is turned into cards by --requests-per-day",
        )
    if given.users is None and given.peak is None:
        raise InputError("no traffic to rank cards for", allowed="--users N, --requests-per-day N, or both")
    if given.usd_per_hour is not None or given.owned:
        raise InputError(
            "one price for all cards", allowed="a price for each: the catalogue's, or --prices with a file of your own"
        )
    if wanted.most_users < 1:
        raise InputError(f"{wanted.most_users} users at most", allowed="1 or more")
    if not wanted.precisions:
        raise InputError("no precision to rank", allowed="one or more, as bf16,awq")
    for precision in wanted.precisions:
        _check_precision(precision)


def _check_precision(precision: str) -> None:
    """Raises InputError for one that no card of the catalogue has a kernel for: it is no precision."""
    problem: InputError | None = None
    for card in cards():
        try:
            kernel_of(card, predicted.without_bf16(precision, card))
            return
        except InputError as error:
            problem = error
    assert problem is not None
    raise problem


def rank(
    wanted: Wanted,
    coefficients: Coefficients | None = None,
    known: Bands | None = None,
    prices: Prices | None = None,
) -> list[RankedCard]:
    """Every card in every precision, in order; coefficients, bands and prices are those that ship if None.

    Raises InputError for what cannot be ranked. What does not fit a card is a row that says so.
    """
    check(wanted)
    return ranked(row for card in wanted.cards or cards() for row in judged(wanted, card, coefficients, known, prices))


def ranked(rows: Iterable[RankedCard]) -> list[RankedCard]:
    """The rows of `judged`, cheapest card first, each card's rows together and its winner the first of them.

    Cards without a price come after, fewest cards first, then those that carry nothing. Money is compared to the cent.
    Of equals the one that is cheaper at the slow end of its band goes first, else the one that came first.
    """
    by_card: dict[str, list[RankedCard]] = {}
    for row in rows:
        by_card.setdefault(row.card, []).append(row)
    groups = sorted((sorted(group, key=_merit) for group in by_card.values()), key=lambda group: _merit(group[0]))
    paid = [_cents(group[0].usd_per_month) for group in groups if group[0].usd_per_month is not None]
    found = []
    for first, *others in groups:
        place = None
        if first.usd_per_month is not None:
            place = 1 + sum(usd < _cents(first.usd_per_month) for usd in paid)
        found += [
            replace(first, rank=place, wins=first.cards is not None),
            *(replace(one, rank=place) for one in others),
        ]
    return found


def _merit(row: RankedCard) -> tuple[int, float, float]:
    """What rows are ordered by, the least first."""
    if row.usd_per_month is not None:
        return 0, _cents(row.usd_per_month), _cents(row.usd_per_month_hi)
    if row.cards is not None:
        return 1, row.cards, float("inf") if row.cards_hi is None else row.cards_hi
    return 2, 0.0, 0.0


def _cents(usd: float | None) -> float:
    return float("inf") if usd is None else round(usd, 2)


# --- one card ---------------------------------------------------------------------------------------------------------


def judged(
    wanted: Wanted,
    card: Card,
    coefficients: Coefficients | None = None,
    known: Bands | None = None,
    prices: Prices | None = None,
) -> list[RankedCard]:
    """One card in each precision that was asked for, in that order, not ranked yet."""
    coefficients, known, prices = coefficients or fitted(), known or bands(), prices or load_prices()
    names = dict.fromkeys(predicted.without_bf16(precision, card) for precision in wanted.precisions)
    priced, words = _priced(wanted, card, prices)
    rows = []
    for name in names:
        row = RankedCard(
            rank=None,
            card=card.id,
            name=card.name,
            precision=name,
            basis=known.basis(card.id),
            published_points=known.points.get(card.id, 0),
            price=words,
        )
        try:
            what = cells.served(card, wanted.model.architecture, name, wanted.scenario, coefficients)
        except InputError as error:
            rows.append(replace(row, note=". ".join(line.rstrip(".") for line in str(error).splitlines())))
        else:
            rows.append(_judged(wanted, what, row, known, priced))
    return rows


def _judged(wanted: Wanted, what: Served, row: RankedCard, known: Bands, priced: Assumptions | None) -> RankedCard:
    points = predicted_points(wanted, what, known)
    slo = wanted.scenario.slo
    found = {end: _decided(at_end(points, end), slo, wanted.assumptions, priced) for end in _ENDS}
    middle = found["middle"]
    plan, spend, at = middle.plan, middle.spend, middle.at
    # Preemption can make the faster end carry fewer requests, so the ends are put in order.
    counts = [one.plan.cards for one in found.values() if one.plan.cards is not None]
    spent = [one.spend.usd_per_month for one in found.values() if one.spend and one.spend.usd_per_month is not None]
    slow_is_safe = found["slow"].plan.cards is not None
    notes = (plan.note, "no price in the catalogue") if spend is None else (spend.note,)
    return replace(
        row,
        cards=plan.cards,
        cards_lo=min(counts, default=None),
        cards_hi=max(counts) if counts and slow_is_safe else None,
        usd_per_month=None if spend is None else spend.usd_per_month,
        usd_per_month_lo=min(spent, default=None),
        usd_per_month_hi=max(spent) if spent and slow_is_safe else None,
        usd_per_hour=None if spend is None else spend.usd_per_hour,
        bound_by=plan.bound_by,
        safe_users=_users(middle),
        safe_users_lo=_users(found["slow"]),
        safe_users_hi=_users(found["fast"]),
        safe_rps=plan.safe_rps,
        tok_s=None if at is None else at.tok_s,
        p95_ms=None if at is None else at.p95_ms,
        limit=middle.knee.limit,
        cause=middle.knee.cause,
        weights_gib=what.memory.weights_gib,
        kv_cache_gib=what.memory.kv_gib,
        kv_cache_tokens=what.memory.kv_tokens,
        kernel=what.kernel,
        verdict=plan.verdict,
        tested=tuple(point.conc for point in points),
        note=Words(True).reworded("; ".join(note for note in notes if note)),
    )


@dataclass(frozen=True, slots=True)
class _Decision:
    """What the project decides of the rows of one precision."""

    knee: Knee
    plan: CardPlan
    at: SweepPoint | None
    spend: Spend | None


def _decided(points: Sequence[SweepPoint], slo: Slo, demand: Assumptions, priced: Assumptions | None) -> _Decision:
    knees = find_knees(points, slo)
    (plan,) = plan_cards(points, knees, demand)
    # A row carries the scenario's price, which is no card's: without one of its own there is no money.
    spend = None if priced is None else spends(points, knees, priced)[0]
    return _Decision(knees[0], plan, operating_levels(points, knees).get(plan.precision), spend)


def _users(decision: _Decision) -> int | None:
    safe = safe_load(decision.knee)
    return None if safe is None else int(safe)


# --- its rows ---------------------------------------------------------------------------------------------------------


def predicted_points(wanted: Wanted, what: Served, known: Bands) -> list[SweepPoint]:
    """Banded rows at those steps of the ladder that settle the last one inside the service level, at each end."""
    steps, slo = ladder(wanted.most_users), wanted.scenario.slo
    request = SweepRequest(
        wanted.scenario, steps, wanted.model.name, (what.precision,), engine="simulated", gpu=what.card.id
    )
    template = SweepPoint("", "", 0, model=wanted.model.name, scenario=wanted.scenario.name, source="predicted")
    basis = known.basis(what.card.id)
    found: dict[int, SweepPoint] = {}

    def inside(users: int, end: End) -> bool:
        if users not in found:
            cell = Cell(what.precision, users)
            figures = cells.figures(wanted.scenario, *cells.predict(wanted.scenario, cell, what))
            found[users] = predicted.banded(predicted.row(cell, request, what, template, figures), basis, known)
        place = placed(_at_end(found[users], end), slo)
        return place is not None and place.inside

    for end in _ENDS:
        # What is known of the other ends' steps narrows this one's: inside up to `low`, outside from `high` on.
        tried = [at for at, step in enumerate(steps) if step in found]
        low = max((at + 1 for at in tried if inside(steps[at], end)), default=0)
        high = min((at for at in tried if not inside(steps[at], end)), default=len(steps))
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if inside(steps[middle], end) else (low, middle)
    return [found[users] for users in sorted(found)]


def at_end(points: Sequence[SweepPoint], end: End) -> list[SweepPoint]:
    """The rows as if their figures were those at one end of their bands, and exact."""
    return [_at_end(point, end) for point in points]


def _at_end(point: SweepPoint, end: End) -> SweepPoint:
    """Requests come as much faster or slower as tokens do. Goodput has no band, and stays."""
    changed: dict[str, Any] = {f"{name}{side}": None for name in ("tok_s", *_LATENCIES) for side in ("_lo", "_hi")}
    if end != "middle":
        throughput, latency = ("_lo", "_hi") if end == "slow" else ("_hi", "_lo")
        changed |= {name: getattr(point, f"{name}{latency}") for name in _LATENCIES}
        tok_s = getattr(point, f"tok_s{throughput}")
        changed["tok_s"] = tok_s
        if point.req_s is not None and point.tok_s and tok_s is not None:
            changed["req_s"] = point.req_s * tok_s / point.tok_s
    return replace(point, **changed)


# --- its price --------------------------------------------------------------------------------------------------------


def _priced(wanted: Wanted, card: Card, prices: Prices) -> tuple[Assumptions | None, str]:
    """The assumptions with the card's own price, and the words for it; None where the catalogue has none."""
    given = wanted.assumptions
    if not wanted.own:
        rent = offer(card.id, prices)
        return (None, "") if rent is None else (replace(given, usd_per_hour=rent.usd_per_hour), rent.words)
    buy = next((buy for buy in prices.buys if buy.card == card.id), None)
    if buy is None:
        return None, ""
    watts = card.power_w if given.watts is None else given.watts
    return replace(given, card_usd=buy.usd, usd_per_kwh=wanted.usd_per_kwh, watts=watts), buy.words
