"""Spend and break-even by hand, as published, and against the bill of the day they speak of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.analysis.cost import Prices
from harness.analysis.spend import BreakEven, Spend, api_usd_per_request, spends
from harness.assumptions import Assumptions
from harness.records import Knee, SweepPoint

API = {"api_usd_per_1m_input": 0.5, "api_usd_per_1m_output": 2.0}


def point(users: int = 10, req_s: float | None = 2.0, **more: object) -> SweepPoint:
    """A card that answers 2 requests a second of 400 tokens in and 100 out at its safe load, for 0.50 USD an hour."""
    values: dict[str, object] = {
        "tok_s": None if req_s is None else req_s * 100,
        "usd_per_hour": 0.5,
        "utilisation": 1.0,
        "verdict": "valid",
        "input_tokens_mean": 400.0,
        "output_tokens_mean": 100.0,
        **more,
    }
    return SweepPoint("run", "awq", users, req_s=req_s, **values)  # type: ignore[arg-type]


def spent(at: SweepPoint, assumptions: Assumptions) -> Spend:
    (spend,) = spends([at], [Knee("awq", "p95 ≤ 3 s", safe_conc=at.conc, cross_lo=float(at.conc))], assumptions)
    return spend


def test_a_fleet_that_is_rented_by_hand() -> None:
    """172,800 requests a day are 2 a second, 6 at the peak; 2 × 0.8 = 1.6 usable: 4 cards and 1; 5 × 12 = 60 USD a day.

    A month: 60 × 365.25 / 12 = 1,826.25 USD. Tokens a day: 69.12 M in, 17.28 M out. At this traffic 60 / 17.28 = 3.4722
    USD/1M all on output, 60 / 86.4 = 0.69444 blended, 60 / (69.12 + 4 × 17.28) = 0.43403 input. At full load an hour
    makes 0.72 M: 0.50 / 0.72 = 0.69444 USD/1M all on output.
    """
    spend = spent(point(), Assumptions(requests_per_day=172_800))
    assert (spend.cards, spend.usd_per_hour, spend.utilisation) == (5, 0.5, pytest.approx(0.2))
    assert (spend.usd_per_day, spend.usd_per_month) == (pytest.approx(60.0), pytest.approx(1826.25))
    at = spend.effective
    assert (at.output_only, at.blended) == (pytest.approx(3.472222), pytest.approx(0.6944444))
    assert (at.input, at.output) == (pytest.approx(0.4340278), pytest.approx(4 * 0.4340278))
    assert spend.full_load.output_only == pytest.approx(0.6944444)
    assert (spend.api_usd_per_request, spend.card_break_even, spend.note) == (None, BreakEven(), "")


def test_a_fleet_that_is_owned_pays_for_the_load_it_has() -> None:
    """876.60 USD over one year are 0.10 USD an hour. At 1 USD/kWh: idle 20 W 0.02, 100 W under load 0.08 USD more.

    2 requests a second over 5 cards of 2 are 20 % of their hours: 0.10 + 0.02 + 0.2 × 0.08 = 0.136 USD; a day of 5
    cards 16.32 USD. Full load knows no idle hours: 0.20 / 0.72 = 0.27778 USD/1M.
    """
    owned = Assumptions(
        card_usd=876.6, years=1.0, watts=100.0, idle_watts=20.0, usd_per_kwh=1.0, requests_per_day=172_800
    )
    spend = spent(point(), owned)
    assert (spend.usd_per_hour, spend.utilisation) == (pytest.approx(0.136), pytest.approx(0.2))
    assert spend.usd_per_day == pytest.approx(16.32)
    assert spend.full_load.output_only == pytest.approx(0.20 / 0.72)


def test_without_requests_the_stated_share_of_the_hour_stands() -> None:
    """20 users / (10 × 0.8) = 2.5: 3 cards and 1. Half busy: 0.10 + 0.02 + 0.5 × 0.08 = 0.16 USD × 24 × 4 = 15.36 USD.

    Nobody said how many requests come, so there is no price at that traffic; full load is 0.20 USD an hour as ever.
    """
    owned = Assumptions(card_usd=876.6, years=1.0, watts=100.0, idle_watts=20.0, usd_per_kwh=1.0, users=20)
    spend = spent(point(), replace(owned, utilisation=0.5))
    assert (spend.cards, spend.usd_per_day) == (4, pytest.approx(15.36))
    assert (spend.effective, spend.requests_per_day) == (Prices(), None)
    assert spend.full_load.output_only == pytest.approx(0.20 / 0.72)


def test_a_request_to_an_api_by_hand() -> None:
    """400 tokens at 0.50 and 100 at 2.00 USD/1M: 0.0002 + 0.0002 = 0.0004 USD. 172,800 a day: 69.12 USD."""
    assert api_usd_per_request(point(), Assumptions(**API)) == pytest.approx(0.0004)
    assert api_usd_per_request(point(output_tokens_mean=None), Assumptions(**API)) is None
    spend = spent(point(), Assumptions(requests_per_day=172_800, **API))
    assert (spend.api_usd_per_day, spend.api_usd_per_month) == (pytest.approx(69.12), pytest.approx(69.12 * 30.4375))


def test_break_even_of_a_rented_card_and_fleet_by_hand() -> None:
    """A card's day: 12 USD / 0.0004 = 30,000 requests, of the 172,800 that it carries at its safe load 17.4 %.

    Five cards: 150,000. Four of them carry 4 × 1.6 × 86,400 / 3 = 184,320 a day with its peak: 81.4 % of that.
    """
    spend = spent(point(), Assumptions(requests_per_day=172_800, **API))
    card, fleet = spend.card_break_even, spend.fleet_break_even
    assert (card.per_day, card.most_per_day) == (pytest.approx(30_000), pytest.approx(172_800))
    assert (card.share, card.never) == (pytest.approx(30 / 172.8), False)
    assert (fleet.per_day, fleet.most_per_day) == (pytest.approx(150_000), pytest.approx(184_320))
    assert (fleet.share, fleet.never) == (pytest.approx(150 / 184.32), False)


def test_break_even_of_an_owner_pays_the_energy_of_each_request() -> None:
    """Fixed 24 × (0.10 + 0.02) = 2.88 USD a day; a request's energy 24 × 0.08 / 172,800 = 0.0000111 USD.

    2.88 / (0.0004 − 0.0000111) = 7,405.7 requests a day.
    """
    owned = Assumptions(card_usd=876.6, years=1.0, watts=100.0, idle_watts=20.0, usd_per_kwh=1.0, **API)
    assert spent(point(), owned).card_break_even.per_day == pytest.approx(7405.714, rel=1e-6)


def test_a_card_may_never_break_even() -> None:
    """At 0.00005 USD a request 12 USD are 240,000 of them, and a card carries 172,800: the API is always cheaper."""
    cheap = Assumptions(api_usd_per_1m_input=0.0625, api_usd_per_1m_output=0.25, users=10)
    spend = spent(point(), cheap)
    assert spend.card_break_even.per_day == pytest.approx(240_000)
    assert (spend.card_break_even.never, spend.fleet_break_even.never) == (True, True)


def test_a_request_whose_energy_costs_more_than_the_api_never_does() -> None:
    """An hour's load of 80 USD is 0.0111 USD a request, more than the API's 0.0004: no number of requests pays."""
    owned = Assumptions(card_usd=1.0, watts=80_000.0, usd_per_kwh=1.0, users=10, **API)
    spend = spent(point(), owned)
    assert (spend.card_break_even.per_day, spend.card_break_even.never) == (None, True)
    assert (spend.fleet_break_even.per_day, spend.fleet_break_even.never) == (None, True)
    assert spend.card_break_even.most_per_day == pytest.approx(172_800)


def test_a_fleet_may_be_full_before_it_pays_although_a_card_would() -> None:
    """One card for the load and three to lose: 4 × 30,000 = 120,000 a day; the one carries 1.6 × 28,800 = 46,080."""
    spend = spent(point(), Assumptions(requests_per_day=1000, failover=3, **API))
    assert (spend.card_break_even.never, spend.fleet_break_even.never) == (False, True)
    assert (spend.fleet_break_even.per_day, spend.fleet_break_even.most_per_day) == (
        pytest.approx(120_000),
        pytest.approx(46_080),
    )


def test_what_is_not_known_is_empty() -> None:
    assert spent(point(), Assumptions()).usd_per_day is None
    assert spent(point(usd_per_hour=None), Assumptions(users=9)).note == "no price of an hour is given"
    blind = spent(point(req_s=None), Assumptions(users=9, **API))
    assert (blind.cards, blind.usd_per_day, blind.card_break_even) == (3, pytest.approx(36.0), BreakEven())
    (never,) = spends([point()], [Knee("awq", "p95 ≤ 3 s")], Assumptions(users=9, **API))
    assert never == Spend("awq", note="no tested load is safely inside p95 ≤ 3 s")


def test_what_is_left_out_is_noted() -> None:
    spend = spent(point(), Assumptions(card_usd=1.0, usd_per_kwh=0.3, users=9))
    assert spend.note == "electricity left out: the card's power was not measured"


def test_a_day_as_published() -> None:
    """DeepSeek's day of 27 February 2025: 226.75 nodes of 8 cards at 2 USD an hour, 87,072 USD; 608 G tokens in, of
    which 342 G at 0.14 and 266 G at 0.55 USD/1M, 168 G out at 2.19: 562,027 USD, 545 % more than its cost
    (github.com/deepseek-ai/open-infra-index, 202502OpenSourceWeek, day 6; the tokens are rounded there).
    """
    mean_input_price = (342 * 0.14 + 266 * 0.55) / 608
    day = Assumptions(
        usd_per_hour=2.0, users=1814 * 10, headroom=0.0, failover=0, requests_per_day=1e8, peak_factor=1.0,
        api_usd_per_1m_input=mean_input_price, api_usd_per_1m_output=2.19,
    )  # fmt: skip
    spend = spent(point(req_s=100.0, input_tokens_mean=6080.0, output_tokens_mean=1680.0), day)
    assert (spend.cards, spend.usd_per_day) == (226.75 * 8, pytest.approx(87_072))
    assert spend.api_usd_per_day == pytest.approx(562_027, rel=2e-4)
    assert spend.usd_per_day is not None and spend.api_usd_per_day is not None
    assert int((spend.api_usd_per_day / spend.usd_per_day - 1) * 100) == 545


owners = st.builds(
    Assumptions,
    card_usd=st.floats(1.0, 50_000.0),
    watts=st.floats(100.0, 700.0),
    idle_watts=st.floats(0.0, 100.0),
    usd_per_kwh=st.floats(0.01, 1.0),
    users=st.integers(1, 1000),
    headroom=st.floats(0.0, 0.9),
    failover=st.integers(0, 4),
    api_usd_per_1m_input=st.floats(0.01, 10.0),
    api_usd_per_1m_output=st.floats(0.01, 40.0),
)


@given(owners, st.floats(0.1, 50.0))
def test_at_break_even_the_bill_of_the_day_is_the_apis(owner: Assumptions, req_s: float) -> None:
    """The day's own bill at that traffic, by the other way through the code; above it the API is dearer, below cheaper.

    So many users decide on the cards that the traffic does not: the fleet stays what it is.
    """
    fleet = spent(point(req_s=req_s), replace(owner, users=20_000))
    even = fleet.fleet_break_even.per_day
    assume(even is not None and even < 50 * req_s * 86_400 and even > 1)
    for times in (0.5, 1.0, 2.0):
        day = replace(owner, users=20_000, requests_per_day=even * times, peak_factor=1.0)
        bill = spent(point(req_s=req_s), day)
        assert bill.cards == fleet.cards and bill.usd_per_day and bill.api_usd_per_day
        left = bill.api_usd_per_day / bill.usd_per_day - 1
        assert abs(left) < 1e-6 if times == 1.0 else left > 0 if times > 1 else left < 0


@given(owners, st.floats(0.1, 50.0))
def test_never_means_that_the_api_is_cheaper_at_full_load(owner: Assumptions, req_s: float) -> None:
    """A request at full load costs full_load / 1e6 × its output tokens; the card breaks even if that is not more."""
    spend = spent(point(req_s=req_s), owner)
    assert spend.full_load.output_only is not None and spend.api_usd_per_request is not None
    own = spend.full_load.output_only / 1e6 * 100
    if abs(own / spend.api_usd_per_request - 1) > 1e-9:
        assert spend.card_break_even.never == (own > spend.api_usd_per_request)


@given(owners, st.floats(1.0, 1e7), st.floats(1.0, 3.0))
def test_effective_prices_never_undercut_full_load(owner: Assumptions, requests: float, more: float) -> None:
    """Idle hours, reserve and headroom are paid, so a token at any traffic costs at least what it does at full load;
    and the spend never falls with the traffic."""
    spend = spent(point(), replace(owner, requests_per_day=requests))
    assert spend.effective.output_only is not None and spend.full_load.output_only is not None
    assert spend.effective.output_only >= spend.full_load.output_only * (1 - 1e-9)
    grown = spent(point(), replace(owner, requests_per_day=requests * more))
    assert grown.usd_per_day is not None and spend.usd_per_day is not None
    assert grown.usd_per_day >= spend.usd_per_day * (1 - 1e-9)
