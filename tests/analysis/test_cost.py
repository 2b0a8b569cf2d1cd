"""Prices by hand, and the operating point they belong to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.cost import cost_lines, usd_per_1m
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
