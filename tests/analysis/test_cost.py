"""Prices by hand and as others published them, and the operating point they belong to."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.cost import (
    Hour,
    Prices,
    between,
    cost_lines,
    hour_usd,
    price,
    prices_at,
    split,
    stated_lines,
    usd_per_1m,
)
from harness.assumptions import Assumptions
from harness.errors import InputError
from harness.records import Knee, SweepPoint


@pytest.mark.parametrize(
    ("usd_per_hour", "tok_s", "utilisation", "usd"),
    [
        (0.36, 100.0, 1.0, 1.0),  # 360,000 tokens an hour for 0.36 USD
        (0.36, 100.0, 0.5, 2.0),  # the same hour, half of it idle
        (0.25, 1000.0, 1.0, 0.0694444),  # 3.6 M tokens an hour: 0.25 / 3.6
        (0.0, 100.0, 1.0, 0.0),  # a card that costs nothing
    ],
)
def test_price_by_hand(usd_per_hour: float, tok_s: float, utilisation: float, usd: float) -> None:
    assert usd_per_1m(usd_per_hour, tok_s, utilisation) == pytest.approx(usd, rel=1e-5)


@pytest.mark.parametrize(
    ("usd_per_hour", "tok_s", "utilisation", "named"),
    [
        (-1, 1, 1, "usd_per_hour"),
        (1, 0, 1, "tok_s"),
        (1, float("nan"), 1, "tok_s"),
        (1, 1, 0, "utilisation"),
        (1, 1, 1.1, "utilisation"),
    ],
)
def test_impossible_inputs_are_named(usd_per_hour: float, tok_s: float, utilisation: float, named: str) -> None:
    with pytest.raises(InputError, match=named):
        usd_per_1m(usd_per_hour, tok_s, utilisation)


def row(conc: int, tok_s: float | None, **more: object) -> SweepPoint:
    values: dict[str, object] = {"usd_per_hour": 0.36, "utilisation": 1.0, "verdict": "valid", **more}
    return SweepPoint("run", "awq", conc, tok_s=tok_s, **values)  # type: ignore[arg-type]


def test_operating_point_first_then_every_level() -> None:
    """100 tok/s [80–125] at 0.36 USD/h: 1.00 USD [0.80–1.25]; the ends swap."""
    points = [row(1, 50.0), row(8, 100.0, tok_s_lo=80.0, tok_s_hi=125.0), row(16, 200.0)]
    lines = cost_lines(points, [Knee("awq", "p95 ≤ 3 s", safe_conc=8)])
    assert [(line.operating_point, line.conc) for line in lines] == [
        ("largest tested concurrency inside p95 ≤ 3 s", 8),
        ("1 user", 1),
        ("8 users", 8),
        ("16 users", 16),
    ]
    at = lines[0]
    prices = (at.usd_per_1m_tokens_lo, at.usd_per_1m_tokens, at.usd_per_1m_tokens_hi)
    assert prices == (pytest.approx(0.80), pytest.approx(1.00), pytest.approx(1.25))


def test_open_loop_prices_name_their_rate() -> None:
    points = [row(0, tok_s, rate_rps=rate, arrivals="constant") for rate, tok_s in ((0.5, 50.0), (2.5, 100.0))]
    lines = cost_lines(points, [Knee("awq", "p95 ≤ 3 s", cross_lo=2.5, beyond_range=True)])
    assert [(line.operating_point, line.usd_per_1m_tokens) for line in lines] == [
        ("largest tested rate inside p95 ≤ 3 s: 2.5 req/s", pytest.approx(1.0)),
        ("0.5 req/s", pytest.approx(2.0)),
        ("2.5 req/s", pytest.approx(1.0)),
    ]


def test_one_trace_has_a_price_and_no_operating_point() -> None:
    (line,) = cost_lines([row(0, 100.0, rate_rps=2.5, arrivals="trace")], [])
    assert (line.operating_point, line.usd_per_1m_tokens) == ("2.5 req/s", pytest.approx(1.0))


def test_no_operating_point_has_no_price() -> None:
    first, level = cost_lines([row(1, 50.0)], [Knee("awq", "p95 ≤ 3 s")])
    assert (first.conc, first.usd_per_1m_tokens) == (None, None)
    assert level.usd_per_1m_tokens == pytest.approx(2.0)


def test_invalid_and_unpriced_rows() -> None:
    points = [row(1, 50.0, verdict="invalid"), row(8, None), row(16, 9.0, usd_per_hour=None)]
    lines = cost_lines(points, [Knee("awq", "p95 ≤ 3 s")])
    assert [(line.conc, line.usd_per_1m_tokens) for line in lines] == [(None, None), (8, None), (16, None)]


positive = st.floats(1e-3, 1e6)


@given(positive, positive, st.floats(0.01, 1.0))
def test_price_times_tokens_is_the_hour(usd_per_hour: float, tok_s: float, utilisation: float) -> None:
    tokens = tok_s * utilisation * 3600
    assert usd_per_1m(usd_per_hour, tok_s, utilisation) * tokens / 1e6 == pytest.approx(usd_per_hour)


# --- an hour of a card ------------------------------------------------------------------------------------------------


def test_an_hour_of_rent_is_the_rent() -> None:
    """As the row was priced, 0.36 USD; or as assumed, 0.20 USD for an hour that is half busy. Electricity is in it."""
    assert hour_usd(Assumptions(), row(8, 100.0)) == Hour(0.36)
    assert hour_usd(Assumptions(usd_per_hour=0.2, utilisation=0.5), row(8, 100.0)) == Hour(0.2, utilisation=0.5)
    assert hour_usd(Assumptions(), row(8, 100.0, usd_per_hour=None)) is None
    assert hour_usd(Assumptions(usd_per_hour=0.2), row(8, 100.0, utilisation=None)) is None


OWNED = Assumptions(
    card_usd=450.0, host_usd=250.0, years=4.0, residual=0.1, idle_watts=15.0, host_watts=60.0, pue=1.2, usd_per_kwh=0.3
)


def test_an_hour_of_an_own_card_by_hand() -> None:
    """Capital: (450 + 250) × 0.9 / (4 × 8,766 h) = 630 / 35,064 = 0.017967 USD.

    Power at 140 W measured: idle (15 + 60) × 1.2 / 1000 × 0.30 = 0.027 USD, load (140 − 15) × 0.36 / 1000 = 0.045 USD.
    Busy for 40 % of the hour: 0.027 + 0.4 × 0.045 = 0.045 USD of electricity, 0.062967 USD in all.
    """
    hour = hour_usd(replace(OWNED, utilisation=0.4), row(8, 100.0, power_w=140.0))
    assert hour is not None
    assert hour.capital_usd == pytest.approx(630 / 35_064)
    assert (hour.idle_usd, hour.load_usd) == (pytest.approx(0.027), pytest.approx(0.045))
    assert (hour.energy_usd, hour.usd) == (pytest.approx(0.045), pytest.approx(0.0629672, rel=1e-5))
    assert (hour.watts, hour.note) == (140.0, "")


def test_stated_watts_go_before_measured_ones() -> None:
    """100 W stated: load (100 − 15) × 0.36 / 1000 = 0.0306 USD."""
    hour = hour_usd(replace(OWNED, watts=100.0), row(8, 100.0, power_w=140.0))
    assert hour is not None and (hour.watts, hour.load_usd) == (100.0, pytest.approx(0.0306))


@pytest.mark.parametrize(
    ("assumptions", "note"),
    [
        (OWNED, "electricity left out: the card's power was not measured"),
        (replace(OWNED, usd_per_kwh=0.0, watts=100.0), "electricity left out: its price is 0"),
    ],
)
def test_electricity_that_is_left_out_is_said(assumptions: Assumptions, note: str) -> None:
    hour = hour_usd(assumptions, row(8, 100.0))
    assert hour is not None and (hour.usd, hour.note) == (pytest.approx(630 / 35_064), note)
    (line, *_) = cost_lines([row(8, 100.0)], [Knee("awq", "p95 ≤ 3 s", safe_conc=8)], assumptions)
    assert line.note == note and line.usd_per_hour == pytest.approx(630 / 35_064)


def test_electricity_as_published() -> None:
    """700 W a card, 30 % more for its host, PUE 1.3, 0.08 USD/kWh: 10,000 cards for a year of 8,760 h cost 8.3 M USD
    (aiinframap.com/tools/energy/datacenter-power-calculator). An idle card of 105 W at 0.12 USD/kWh: 0.013 USD an hour
    (nemulai.com/blog/gpu-electricity-cost-per-training-run).
    """
    farm = Assumptions(card_usd=0.0, watts=700.0, host_watts=210.0, pue=1.3, usd_per_kwh=0.08)
    hour = hour_usd(farm, row(8, 100.0))
    assert hour is not None and round(hour.usd * 10_000 * 8760 / 1e6, 1) == 8.3
    idle = hour_usd(Assumptions(card_usd=0.0, watts=700.0, idle_watts=105.0, usd_per_kwh=0.12), row(8, 100.0))
    assert idle is not None and round(idle.idle_usd, 3) == 0.013


money = st.floats(0.0, 1e6)


@given(money, money, st.floats(0.1, 30.0), st.floats(0.0, 1.0))
def test_all_hours_of_all_years_write_off_what_was_paid(
    card: float, host: float, years: float, residual: float
) -> None:
    """In fractions, without a rounding: hours × years × capital + what is left = the price."""
    hour = hour_usd(Assumptions(card_usd=card, host_usd=host, years=years, residual=residual), row(8, 100.0))
    assert hour is not None
    paid = Fraction(card) + Fraction(host)
    written = Fraction(hour.capital_usd) * Fraction(years) * Fraction(36525, 100) * 24
    assert float(written + paid * Fraction(residual)) == pytest.approx(float(paid), rel=1e-9)


# --- prices -----------------------------------------------------------------------------------------------------------


def test_input_output_and_blended_by_hand() -> None:
    """2 req/s of 300 tokens in: i = 600 tok/s; o = 100 tok/s; w = 4. An hour for 0.36 USD, half of it busy, 1,800 s.

    Output only: 0.36 / 180,000 = 2.00 USD/1M. Blended: 0.36 / (700 × 1,800) = 0.36 / 1.26 M = 0.285714 USD/1M.
    Weighted: 600 + 4 × 100 = 1,000, 0.36 / 1.8 M = 0.20 USD/1M input, × 4 = 0.80 USD/1M output.
    """
    prices = prices_at(row(8, 100.0, req_s=2.0, input_tokens_mean=300.0), 0.36, 0.5, 4.0)
    found = (prices.output_only, prices.input, prices.output, prices.blended)
    assert found == tuple(map(pytest.approx, (2.0, 0.2, 0.8, 0.36 / 1.26)))


def test_prices_without_tokens() -> None:
    assert prices_at(row(8, None), 0.36, 1.0, 4.0) == Prices()
    assert prices_at(row(8, 100.0), 0.36, 1.0, 4.0) == Prices(output_only=pytest.approx(1.0))
    assert split(1.0, 5.0, 0.0, 4.0) == Prices()


PUBLISHED = [
    (2.69, "prefill", 1024, 32.25802607049752, 4129.027337023683, 0.18096809762486116, 0.020107566402762348),
    (10.9791, "decode", 128, 14.74949037164476, 15103.478140564233, 0.20192368748554154, 0.17948772220937026),
    (3.85, "balanced", 2048, 1.7837398767000137, 3653.099267481628, 0.29274989978076826, 0.14637494989038413),
    (4.29, "long", 8192, 1.5368731646298843, 786.8790602905008, 1.5144216269101456, 0.0890836251123615),
]


@pytest.mark.parametrize(("per_hour", "kind", "input_tokens", "req_s", "tok_s", "only", "blended"), PUBLISHED)
def test_prices_as_published(
    per_hour: float, kind: str, input_tokens: int, req_s: float, tok_s: float, only: float, blended: float
) -> None:
    """Qwen3-8B in FP8 on an H100 at several rents: another tool's prices for output and for all tokens, from the same
    rates (github.com/tgarg01/silybench-data, derived/csv/hosted_costs.csv)."""
    prices = prices_at(row(8, tok_s, req_s=req_s, input_tokens_mean=float(input_tokens)), per_hour, 1.0, 4.0)
    assert prices.output_only == pytest.approx(only, rel=1e-12)
    assert prices.blended == pytest.approx(blended, rel=1e-12)


@pytest.mark.parametrize(
    ("per_hour", "tok_s", "usd"),
    [(2.49, 5500, 0.13), (3.49, 7000, 0.14), (1.40, 4200, 0.09), (4.98, 2200, 0.63), (2.49, 1800, 0.38),
     (3.49, 3000, 0.32), (4.69, 3000, 0.43), (19.92, 1000, 5.53), (13.96, 1250, 3.10), (33.86, 1000, 9.41),
     (13.96, 1050, 3.69), (19.92, 700, 7.90), (18.76, 1050, 4.96)],
)  # fmt: skip
def test_price_lists_as_published(per_hour: float, tok_s: float, usd: float) -> None:
    """Rent, tokens a second and USD/1M printed side by side, to the cent (gpuadvisor.com/cost-to-serve-1m-tokens)."""
    assert usd_per_1m(per_hour, tok_s) == pytest.approx(usd, abs=0.00501)


rational = st.fractions(min_value=Fraction(1, 1000), max_value=1_000_000)


@given(rational, rational, rational, rational)
def test_weighted_prices_add_up_to_the_money_exactly(
    usd: Fraction, incoming: Fraction, outgoing: Fraction, weight: Fraction
) -> None:
    """In fractions, without a rounding: input × tokens in + output × tokens out = blended × all tokens = the money."""
    prices = split(usd, incoming, outgoing, weight)  # type: ignore[arg-type]
    assert prices.input is not None and prices.output is not None and prices.blended is not None
    assert prices.input * incoming + prices.output * outgoing == usd * 1_000_000
    assert prices.blended * (incoming + outgoing) == usd * 1_000_000
    assert prices.output_only is not None and prices.output_only * outgoing == usd * 1_000_000


@given(positive, positive, positive, st.floats(0.01, 1.0), st.floats(0.01, 1000.0))
def test_prices_are_positive_and_ordered(
    per_hour: float, tok_s: float, req_s: float, share: float, weight: float
) -> None:
    """Output alone bears the most; the weighted two lie on either side of the blended one, by the weight."""
    prices = prices_at(row(8, tok_s, req_s=req_s, input_tokens_mean=300.0), per_hour, share, weight)
    only, one, two, blended = prices.output_only, prices.input, prices.output, prices.blended
    assert only is not None and one is not None and two is not None and blended is not None
    assert min(one, two, blended) > 0
    assert two <= only * (1 + 1e-9) and blended <= only * (1 + 1e-9)
    assert min(one, two) <= blended * (1 + 1e-9) and blended <= max(one, two) * (1 + 1e-9)


def test_intervals_of_all_prices_have_one_width() -> None:
    """100 tok/s [80–125]: every price goes from 100 / 125 = 0.8 to 100 / 80 = 1.25 of itself. Input: 0.36 / 3.6 M."""
    points = [row(8, 100.0, tok_s_lo=80.0, tok_s_hi=125.0, req_s=2.0, input_tokens_mean=300.0, p95_ms=900.0)]
    line = cost_lines(points, [Knee("awq", "p95 ≤ 3 s", safe_conc=8)])[0]
    assert (line.input_tok_s, line.p95_ms, line.verdict) == (600.0, 900.0, "valid")
    for name, value in (("tokens", 1.0), ("input", 0.1), ("output", 0.4), ("blended", 0.36 / 2.52)):
        found = [getattr(line, f"usd_per_1m_{name}{end}") for end in ("_lo", "", "_hi")]
        assert found == [pytest.approx(value * 0.8), pytest.approx(value), pytest.approx(value * 1.25)], name


def test_a_price_without_an_interval_has_no_ends() -> None:
    line = cost_lines([row(8, 100.0, req_s=2.0, input_tokens_mean=300.0)], [])[0]
    assert (line.usd_per_1m_input_lo, line.usd_per_1m_tokens_hi) == (None, None)
    assert line.usd_per_1m_input == pytest.approx(0.1)


def test_lines_are_priced_as_assumed() -> None:
    """0.72 USD an hour, half busy, at 100 tok/s: 0.72 / 180,000 = 4.00 USD/1M, on the curve as at its point."""
    assumed = Assumptions(usd_per_hour=0.72, utilisation=0.5)
    lines = cost_lines([row(8, 100.0)], [Knee("awq", "p95 ≤ 3 s", safe_conc=8)], assumed)
    assert [line.usd_per_1m_tokens for line in lines] == [pytest.approx(4.0)] * 2
    assert [(line.usd_per_hour, line.utilisation) for line in lines] == [(0.72, 0.5)] * 2
    assert price(row(8, 100.0), assumed)[0] == pytest.approx(4.0)


# --- stated operating points ------------------------------------------------------------------------------------------


def knee(**more: object) -> Knee:
    return Knee("awq", "p95 ≤ 3 s", **{"safe_conc": 8, "cross_lo": 8.0, "cross_hi": 32.0, "tested_lo": 1.0, **more})  # type: ignore[arg-type]


def test_stated_points_stand_beside_the_service_level() -> None:
    """Tokens grow with √users: 100 at 4, 200 at 16. 16 users: 0.36 / 720,000 = 0.50 USD; 32 users were not tested."""
    points = [row(1, 50.0), row(4, 100.0), row(8, 141.4), row(16, 200.0, p95_ms=3500.0)]
    lines = stated_lines(points, [knee()], Assumptions())
    assert [(line.operating_point, line.conc, line.interpolated, line.note) for line in lines] == [
        ("largest tested concurrency inside p95 ≤ 3 s", 8, False, ""),
        ("chat, 16 users, not safely inside p95 ≤ 3 s", 16, False, ""),
        ("batch, 32 users", 32, False, "outside the loads that were measured"),
    ]
    assert (lines[1].usd_per_1m_tokens, lines[1].p95_ms) == (pytest.approx(0.5), 3500.0)
    assert lines[2].usd_per_1m_tokens is None


@pytest.mark.parametrize(
    ("users", "more", "words"),
    [
        (8, {}, ", inside p95 ≤ 3 s"),
        (16, {}, ", not safely inside p95 ≤ 3 s"),
        (32, {}, ", outside p95 ≤ 3 s"),
        (32, {"cross_hi": None}, ", not safely inside p95 ≤ 3 s"),
        (8, {"safe_conc": None, "cross_lo": None, "cross_hi": None}, ", outside p95 ≤ 3 s"),
        (8, {"safe_conc": None, "cross_lo": None, "cross_hi": None, "tested_lo": None}, ""),
    ],
)
def test_a_stated_point_says_where_it_stands(users: int, more: dict[str, object], words: str) -> None:
    points = [row(users, 100.0)]
    line = stated_lines(points, [knee(**more)], Assumptions(chat_conc=users))[1]
    assert line.operating_point == f"chat, {users} users{words}"


def test_a_load_between_two_is_interpolated_and_says_so() -> None:
    """On log-log axes 16 lies half-way between 8 and 32: √(100 × 400) = 200 tok/s [√(90 × 360) – √(110 × 440)],
    √(1 × 4) = 2 req/s, √(1 × 4) = 2 s: 0.36 / 720,000 = 0.50 USD/1M [0.4545–0.5556]. One neighbour is suspect."""
    ends = [(8, 100.0, 1.0, "valid"), (32, 400.0, 4.0, "suspect")]
    points = [
        row(conc, tok_s, tok_s_lo=tok_s * 0.9, tok_s_hi=tok_s * 1.1, req_s=pace, p95_ms=pace * 1e3,
            input_tokens_mean=300.0, verdict=verdict)
        for conc, tok_s, pace, verdict in ends
    ]  # fmt: skip
    line = stated_lines(points, [knee()], Assumptions(batch_conc=8))[1]
    assert line.operating_point == "chat, 16 users (interpolated between 8 and 32), not safely inside p95 ≤ 3 s"
    assert (line.conc, line.interpolated, line.verdict) == (16, True, "suspect")
    assert (line.tok_s, line.p95_ms, line.input_tok_s) == tuple(map(pytest.approx, (200.0, 2000.0, 600.0)))
    prices = (line.usd_per_1m_tokens_lo, line.usd_per_1m_tokens, line.usd_per_1m_tokens_hi)
    assert prices == tuple(map(pytest.approx, (0.5 / 1.1, 0.5, 0.5 / 0.9)))


@given(st.floats(0.1, 1000.0), st.floats(-1.0, 2.0), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_a_power_law_is_interpolated_exactly(scale: float, power: float, one: int, two: int, three: int) -> None:
    low, users, high = one, one + two, one + two + three
    found = between(row(low, scale * low**power), row(high, scale * high**power), users)
    assert found.tok_s == pytest.approx(scale * users**power)
    assert (found.tok_s_lo, found.power_w) == (None, None)


def test_neighbours_without_tokens_are_no_neighbours() -> None:
    points = [row(4, 9.0), row(8, 100.0), row(16, None), row(24, 9.0, verdict="invalid"), row(32, 400.0), row(64, 9.0)]
    line = stated_lines(points, [knee()], Assumptions())[1]
    assert line.operating_point.startswith("chat, 16 users (interpolated between 8 and 32)")


def test_an_open_loop_has_no_users_to_state() -> None:
    points = [row(0, 100.0, rate_rps=2.5, arrivals="poisson")]
    (line,) = stated_lines(points, [Knee("awq", "p95 ≤ 3 s", cross_lo=2.5, beyond_range=True)], Assumptions())
    assert line.operating_point == "largest tested rate inside p95 ≤ 3 s: 2.5 req/s"


def test_without_a_safe_load_the_line_says_why() -> None:
    line = stated_lines([row(8, 100.0)], [Knee("awq", "p95 ≤ 3 s")], Assumptions())[0]
    assert (line.usd_per_1m_tokens, line.note) == (None, "no tested load is safely inside p95 ≤ 3 s")
    assert cost_lines([row(8, 9.0, usd_per_hour=None)], [])[0].note == "no price of an hour is given"
