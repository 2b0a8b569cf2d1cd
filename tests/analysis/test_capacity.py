"""The headline says what the knees support and nothing more; ratios, memory and cards by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.capacity import CardPlan, Freed, capacity_lines, freed_memory, memory_split, plan_cards
from harness.analysis.compare import Estimate
from harness.analysis.headline import at_one_load, headlines, load_ratio
from harness.analysis.knee import find_knee, find_knees
from harness.assumptions import Assumptions
from harness.records import Knee, SweepPoint
from harness.slo import Slo

SLO = Slo(3.0)

CONCS = (1, 8, 16, 32)


def row(
    precision: str, conc: int, p95_s: float | None = 1.0, tok_s: float | None = 100.0, **more: object
) -> SweepPoint:
    values: dict[str, object] = {"verdict": "valid", **more}
    if tok_s is not None:
        values |= {"tok_s": tok_s, "tok_s_lo": tok_s * 0.99, "tok_s_hi": tok_s * 1.01}
    return SweepPoint("run", precision, conc, p95_ms=None if p95_s is None else p95_s * 1e3, **values)  # type: ignore[arg-type]


def curve(precision: str, p95_s: tuple[float | None, ...], tok_s: float = 100.0, **more: object) -> list[SweepPoint]:
    return [row(precision, conc, p95, tok_s, **more) for conc, p95 in zip(CONCS, p95_s, strict=False)]


def said(points: list[SweepPoint]) -> list[str]:
    return headlines(points, find_knees(points, SLO), "X")


def test_gain() -> None:
    """BF16: 1.5 s at 8, 6 s at 16: crosses half-way on logs at 8√2 = 11.3. AWQ one step later: 22.6. Ratio 2.0."""
    (sentence,) = said(curve("bf16", (1, 1.5, 6, 9)) + curve("awq", (1, 1, 1.5, 6)))
    assert sentence == (
        "On X, AWQ sustains 2.0× more users than BF16 at p95 ≤ 3 s (knees 11 → 23, interval 1.00–4.00× with the width "
        "of the tested brackets; safe to promise: 8 → 16)."
    )


def test_gain_beyond_the_range_is_at_least() -> None:
    """32 safe over a crossing at 8√2 = 11.3: at least 2.8."""
    (sentence,) = said(curve("bf16", (1, 1.5, 6, 9)) + curve("awq", (1, 1, 1, 1)))
    assert "AWQ sustains at least 2.8× more users than BF16" in sentence
    assert "BF16 leaves at 11, between 8 and 16; AWQ holds up to 32 with no knee in range" in sentence


@pytest.mark.parametrize("base", [(1, 1, 1, 1), (1, 1, 1.5, 6)])
def test_no_gain(base: tuple[float, ...]) -> None:
    (sentence,) = said(curve("bf16", base) + curve("awq", (1, 1.5, 6, 9)))
    assert "AWQ brings no gain: it sustains fewer users than BF16" in sentence


def test_same_bracket_shows_no_gain_in_users() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 2.8, 6)) + curve("awq", (1, 1, 1.5, 4), tok_s=150.0))
    assert "no gain in users of AWQ over BF16 at p95 ≤ 3 s is shown" in sentence
    assert "(BF16 between 16 and 32, AWQ between 16 and 32)" in sentence
    assert sentence.endswith("At 16 users AWQ delivers 1.50× the tokens per second of BF16 (1.48–1.52×).")


def test_both_inside_the_whole_range_compares_tokens() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1, 1)) + curve("awq", (1, 1, 1, 1), tok_s=80.0))
    assert "not decided: both stay inside it over the whole tested range (up to 32 users)" in sentence
    assert sentence.endswith("At 32 users AWQ delivers only 0.80× the tokens per second of BF16 (0.79–0.81×): no gain.")


def test_what_may_miss_it_is_not_called_inside() -> None:
    """The terminal once said "may miss it already at 1 user" above a headline with "both stay inside it"."""
    points = curve("bf16", (1, 1, 1, 1)) + curve("awq", (2.5, 1, 1, 1))
    points[4] = replace(points[4], p95_ms_lo=2000.0, p95_ms_hi=4000.0)
    (sentence,) = said(points)
    assert "not decided: neither surely leaves it in the tested range (up to 32 users); more requests" in sentence


def test_equal_servers_show_no_gain() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1, 1)) + curve("awq", (1, 1, 1, 1)))
    assert sentence.endswith("it delivers 1.00× the tokens per second (0.99–1.01×): no gain shown.")


def test_baseline_never_inside_gives_no_ratio() -> None:
    (sentence,) = said(curve("bf16", (4, 5, 6, 9)) + curve("awq", (1, 1, 1.5, 6)))
    assert sentence == "On X, AWQ sustains 16 users at p95 ≤ 3 s; BF16 misses it even at 1 user: no ratio."


def test_other_never_inside_is_no_gain() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1.5, 6)) + curve("awq", (4, 5, 6, 9)))
    assert sentence == "On X, AWQ brings no gain: it misses p95 ≤ 3 s even at 1 user, while BF16 sustains 16."


def test_neither_inside() -> None:
    (sentence,) = said(curve("bf16", (4, 5)) + curve("awq", (4, 5)))
    assert "neither BF16 nor AWQ safely meets p95 ≤ 3 s at any tested concurrency" in sentence


def test_verdicts_are_mentioned_and_invalid_rows_not_used() -> None:
    points = curve("bf16", (1, 1, 1, 9)) + curve("awq", (1, 1, 1, 1))
    points[-1] = row("awq", 32, 1.0, verdict="invalid", verdict_reasons=("errors",))
    points[-2] = row("awq", 16, 1.0, verdict="suspect")
    (sentence,) = said(points)
    assert "not told apart (BF16 between 16 and 32, AWQ above 16)" in sentence
    assert sentence.endswith("Suspect rows: AWQ at 16. Invalid and left out: AWQ at 32.")


def test_precision_without_a_usable_row() -> None:
    (sentence,) = said(curve("bf16", (1, 1)) + curve("awq", (None, None), verdict="invalid"))
    assert sentence.startswith("On X, AWQ against BF16 is not decided: no usable p95 for AWQ.")


def test_one_precision_alone() -> None:
    (sentence,) = said(curve("awq", (1, 1, 1.5, 6)))
    assert sentence == "On X, AWQ sustains 16 users at p95 ≤ 3 s; its knee is at 23 (between 16 and 32)."


def test_three_precisions_get_a_sentence_each_against_bf16() -> None:
    flat = (1, 1, 1, 1)
    sentences = said(curve("gptq", flat) + curve("bf16", flat) + curve("awq", flat))
    assert ["GPTQ gains over BF16" in sentences[0], "AWQ gains over BF16" in sentences[1]] == [True, True]


def test_without_bf16_the_first_is_the_baseline() -> None:
    assert "GPTQ gains over AWQ" in said(curve("awq", (1, 1)) + curve("gptq", (1, 1)))[0]


def rates(precision: str, p95_s: tuple[float, ...], tok_s: float = 100.0, **more: object) -> list[SweepPoint]:
    """An open loop at 0.5, 1, 2.5 and 5 requests a second."""
    pairs = zip((0.5, 1.0, 2.5, 5.0), p95_s, strict=False)
    return [row(precision, 0, p95, tok_s, arrivals="poisson", rate_rps=rate, **more) for rate, p95 in pairs]


@pytest.mark.parametrize(
    ("base", "other", "part"),
    [
        (
            (1, 1.5, 6, 9), (1, 1, 1, 9),
            "AWQ sustains 2.2× more requests per second than BF16 at p95 ≤ 3 s (knees 1.58 → 3.54, interval 1.00–5.00× "
            "with the width of the tested brackets; safe to promise: 1 → 2.5).",
        ),
        (
            (1, 1.5, 6, 9), (1, 1, 1, 1),
            "AWQ sustains at least 3.2× more requests per second than BF16 at p95 ≤ 3 s (BF16 leaves at 1.58, between "
            "1 and 2.5; AWQ holds up to 5 with no knee in range",
        ),
        ((1, 1, 1, 1), (1, 1.5, 6, 9), "it sustains fewer requests per second than BF16 at p95 ≤ 3 s"),
        ((1, 1, 1, 1), (1, 1, 1, 1), "over the whole tested range (up to 5 req/s)"),
        ((1, 1, 1, 1), (1, 1, 1, 1), "At 5 req/s it delivers 1.00× the tokens per second"),
        ((1, 1, 2.8, 6), (1, 1, 1.5, 4), "finer rates or more requests would decide."),
        ((4, 5, 6, 9), (1, 1, 1.5, 6), "AWQ sustains 2.5 req/s at p95 ≤ 3 s; BF16 misses it even at 0.5 req/s"),
        ((1, 1, 1.5, 6), (4, 5, 6, 9), "misses p95 ≤ 3 s even at 0.5 req/s, while BF16 sustains 2.5."),
        ((4, 5, 6, 9), (4, 5, 6, 9), "at any tested rate: no gain in requests per second can be claimed."),
    ],
)  # fmt: skip
def test_open_loops_speak_of_requests_per_second(base: tuple[float, ...], other: tuple[float, ...], part: str) -> None:
    """Crossings by hand: BF16 at 2.5^(1/2) = 1.58; AWQ at 2.5 · 2^(ln 3 / ln 9) = 2.5 · √2 = 3.54: 2.2 times."""
    (sentence,) = said(rates("bf16", base) + rates("awq", other))
    assert part in sentence
    assert "user" not in sentence and "concurrenc" not in sentence


@pytest.mark.parametrize(
    ("p95_s", "part"),
    [
        ((1, 1, 1.5, 6), "AWQ sustains 2.5 req/s at p95 ≤ 3 s; its knee is at 3.54 (between 2.5 and 5)."),
        ((1, 1, 1, 1), "sustains 5 req/s at p95 ≤ 3 s, the largest usable rate tested: no knee in range."),
        ((4, 5, 6, 9), "misses p95 ≤ 3 s at every tested rate, 0.5 req/s included."),
    ],
)
def test_one_precision_alone_in_an_open_loop(p95_s: tuple[float, ...], part: str) -> None:
    (sentence,) = said(rates("awq", p95_s))
    assert part in sentence


def test_verdicts_in_an_open_loop_name_rates() -> None:
    points = [*rates("awq", (1, 1)), row("awq", 0, 1.0, verdict="invalid", arrivals="poisson", rate_rps=2.5)]
    assert said(points)[0].endswith("Invalid and left out: AWQ at 2.5 req/s.")


def test_a_row_that_was_measured_again_is_no_caution() -> None:
    points = [*curve("awq", (1,)), row("awq", 8, 1.0, verdict="invalid"), row("awq", 8, 1.0, attempt=2)]
    assert "Invalid" not in said(points)[0]


def test_one_trace_against_the_slo() -> None:
    """p95 of 2 s [1.8–2.2] keeps 3 s, 2.9 s [2.7–3.1] may, 4 s [3.8–4.2] does not; a failed one has none."""
    points = [
        row(name, 0, p95, verdict=verdict, arrivals="trace", rate_rps=2.5, p95_ms_lo=low * 1e3, p95_ms_hi=high * 1e3)
        for name, p95, low, high, verdict in (
            ("awq", 2.0, 1.8, 2.2, "valid"), ("bf16", 4.0, 3.8, 4.2, "valid"),
            ("rtn", 2.9, 2.7, 3.1, "valid"), ("bad", 1.0, 1.0, 1.0, "invalid"),
        )
    ]  # fmt: skip
    assert said(points) == []
    assert at_one_load(points, SLO, "X") == [
        "On X, BF16 misses p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 4 s (3.8–4.2 s).",
        "On X, AWQ keeps p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 2 s (1.8–2.2 s).",
        "On X, RTN may keep or miss p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 2.9 s (2.7–3.1 s).",
        "On X, BAD has no usable p95 for this trace. Invalid and left out: BAD at 2.5 req/s.",
    ]


def test_repeats_compare_their_tokens_in_pairs() -> None:
    """Sessions of 100, 200, 400 against 110, 220, 440: apart nothing is known, in pairs it is 1.1 each time."""
    points = [
        row(name, 8, 1.0, speed * gain, repeat=repeat)
        for name, gain in (("bf16", 1.0), ("awq", 1.1))
        for repeat, speed in ((1, 100.0), (2, 200.0), (3, 400.0))
    ]
    (sentence,) = said(points)
    assert sentence.endswith("At 8 users AWQ delivers 1.10× the tokens per second of BF16 (1.10–1.10×).")


def test_load_ratio_by_hand() -> None:
    """20 [16–32] against 40 [32–64]: 2, from 32/32 = 1 to 64/16 = 4."""
    base, other = Knee("bf16", "p95 ≤ 3 s", 16, 20.0, 16.0, 32.0), Knee("awq", "p95 ≤ 3 s", 32, 40.0, 32.0, 64.0)
    assert load_ratio(base, other) == Estimate(2.0, 1.0, 4.0)


def test_memory_counts_rows_whose_load_was_invalid() -> None:
    points = [
        row("awq", 8, verdict="invalid", weights_gib=2.0, kv_cache_gib=10.0, kv_cache_tokens=9, memory_kind="gpu")
    ]
    (line,) = memory_split(points)
    assert (line.weights_gib, line.total_gib, line.kind) == (2.0, 12.0, "gpu")


def test_capacity_line_is_the_operating_point() -> None:
    points = curve("awq", (1, 1, 1.5, 6), weights_gib=2.0)
    (line,) = capacity_lines(points, [find_knee(points, SLO)])
    assert (line.users, line.p95_ms, line.weights_gib, line.verdict) == (16, 1500.0, 2.0, "valid")


def test_capacity_line_without_an_operating_point_keeps_the_memory() -> None:
    points = curve("awq", (4, 5), weights_gib=2.0)
    (line,) = capacity_lines(points, [find_knee(points, SLO)])
    assert (line.users, line.tok_s, line.weights_gib) == (None, None, 2.0)


p95s = st.lists(st.floats(0.1, 12), min_size=4, max_size=4)


@given(p95s, p95s)
def test_swapping_the_two_never_gives_a_gain_both_ways(one: list[float], two: list[float]) -> None:
    forward = said(curve("bf16", tuple(one)) + curve("awq", tuple(two)))[0]
    backward = said(curve("bf16", tuple(two)) + curve("awq", tuple(one)))[0]
    assert not ("more users" in forward and "more users" in backward)
    if "more users" in forward:
        assert "no gain" in backward


# --- from demand to cards ---------------------------------------------------------------------------------------------


def safe_at(conc: int, req_s: float | None, **more: object) -> tuple[list[SweepPoint], list[Knee]]:
    """A precision whose safe load is `conc` users, where it answers `req_s` requests a second."""
    point = row("awq", conc, 1.0, 500.0, req_s=req_s, **more)
    return [point], [Knee("awq", SLO.words, safe_conc=conc, cross_lo=float(conc), tested_lo=1.0, tested_hi=conc)]


def planned(conc: int, req_s: float | None, assumptions: Assumptions, **more: object) -> CardPlan:
    (plan,) = plan_cards(*safe_at(conc, req_s, **more), assumptions)
    return plan


def test_cards_for_users() -> None:
    """24 safe users × (1 − 0.25) = 18 usable. 120 / 18 = 6.67: 7 cards for the load, and 1 in reserve: 8.

    At the peak 120 / (8 × 24) = 62.5 % full, with a card lost 120 / (7 × 24) = 71.4 %. Tenants of 4: 18 / 4 = 4.5: 4.
    """
    plan = planned(24, 5.0, Assumptions(users=120, headroom=0.25, users_per_tenant=4))
    assert (plan.safe_users, plan.usable_users, plan.tenants_per_card) == (24, 18, 4)
    assert (plan.cards_for_load, plan.cards, plan.bound_by) == (7, 8, "users")
    assert plan.utilisation_peak == pytest.approx(0.625)
    assert plan.utilisation_lost == pytest.approx(120 / 168)
    assert (plan.utilisation_mean, plan.note, plan.verdict) == (None, "", "valid")


def test_cards_for_requests() -> None:
    """864,000 a day are 10 a second, 30 at the peak. 5 req/s × 0.75 = 3.75 usable; 30 / 3.75 = 8 cards, and 2: 10.

    At the peak 30 / (10 × 5) = 60 % full, with both lost 30 / 40 = 75 % = 1 − headroom; over the day 10 / 50 = 20 %.
    """
    plan = planned(24, 5.0, Assumptions(requests_per_day=864_000, headroom=0.25, failover=2))
    assert (plan.safe_rps, plan.usable_rps, plan.peak_rps) == (5.0, 3.75, pytest.approx(30))
    assert (plan.cards_for_load, plan.cards, plan.bound_by) == (8, 10, "requests")
    shares = (plan.utilisation_peak, plan.utilisation_lost, plan.utilisation_mean)
    assert shares == (pytest.approx(0.6), pytest.approx(0.75), pytest.approx(0.2))


def test_the_larger_demand_counts() -> None:
    """120 users take 120 / 18 = 6.67 cards and 30 req/s take 8: requests decide. 150 users take 8.33: users do."""
    both = Assumptions(users=120, requests_per_day=864_000, headroom=0.25)
    assert (planned(24, 5.0, both).cards, planned(24, 5.0, both).bound_by) == (9, "requests")
    more = Assumptions(users=150, requests_per_day=864_000, headroom=0.25)
    assert (planned(24, 5.0, more).cards, planned(24, 5.0, more).bound_by) == (10, "users")


def test_the_interval_of_the_pace_is_that_of_the_cards() -> None:
    """500 tok/s [400–625]: 5 req/s may be 4 or 6.25, usable 3 to 4.69. 30 req/s: 8 cards [7–10], and 1: 9 [8–11]."""
    demand = Assumptions(requests_per_day=864_000, headroom=0.25)
    plan = _with_pace(demand, 400.0, 625.0)
    assert (plan.cards_lo, plan.cards, plan.cards_hi) == (8, 9, 11)


def test_users_are_a_lower_end_already() -> None:
    """For 120 users it is 8 cards whatever the pace; safe users come from the lower end of the knee."""
    plan = _with_pace(Assumptions(users=120, headroom=0.25), 400.0, 625.0)
    assert (plan.cards_lo, plan.cards, plan.cards_hi) == (8, 8, 8)
    assert _with_pace(Assumptions(users=120), None, None).cards_hi is None


def _with_pace(assumptions: Assumptions, low: float | None, high: float | None) -> CardPlan:
    (point,), knees = safe_at(24, 5.0)
    (plan,) = plan_cards([replace(point, tok_s_lo=low, tok_s_hi=high)], knees, assumptions)
    return plan


def test_one_card_carries_a_little() -> None:
    plan = planned(24, 5.0, Assumptions(users=1, failover=0))
    assert (plan.cards_for_load, plan.cards) == (1, 1)
    assert plan.utilisation_peak == plan.utilisation_lost == pytest.approx(1 / 24)
    assert planned(24, 200.0, Assumptions(requests_per_day=0.001, failover=0)).cards == 1


def test_rounding_errors_buy_no_card() -> None:
    """10 users × (1 − 0.9) carry 1 user: one card, although 1 / 0.9999999999999998 is above 1."""
    plan = planned(10, 5.0, Assumptions(users=1, headroom=0.9, failover=0))
    assert (plan.cards, plan.tenants_per_card) == (1, 1)


def test_without_a_safe_load_there_is_no_plan_and_it_says_why() -> None:
    points = curve("awq", (4, 5))
    (plan,) = plan_cards(points, find_knees(points, SLO), Assumptions(users=9, requests_per_day=9.0))
    assert (plan.cards, plan.safe_users, plan.users) == (None, None, 9)
    assert plan.note == "no tested load is safely inside p95 ≤ 3 s"


def test_without_a_demand_there_is_the_supply() -> None:
    plan = planned(24, 5.0, Assumptions(headroom=0.25))
    assert (plan.safe_users, plan.usable_rps, plan.tenants_per_card, plan.cards) == (24, 3.75, 18, None)
    assert plan.note == "no demand is given: users, requests a day or a trace"


def test_a_tenant_larger_than_a_card_gets_none() -> None:
    assert planned(4, 5.0, Assumptions(users_per_tenant=8)).tenants_per_card == 0


def test_an_open_loop_supplies_requests_alone() -> None:
    """2.4 completed a second × 0.8 = 1.92; 30 at the peak: 15.6, so 16 cards. Of users it says nothing."""
    points = [row("awq", 0, 1.0, req_s=2.4, arrivals="poisson", rate_rps=2.5)]
    knees = [Knee("awq", SLO.words, cross_lo=2.5, beyond_range=True, tested_lo=2.5, tested_hi=2.5)]
    (plan,) = plan_cards(points, knees, Assumptions(users=120, requests_per_day=864_000, failover=0))
    assert (plan.safe_users, plan.tenants_per_card, plan.cards, plan.bound_by) == (None, None, 16, "requests")
    assert plan.note == "an open loop says nothing of users: judged by requests alone"
    (plan,) = plan_cards(points, knees, Assumptions(users=120))
    assert (plan.cards, plan.note) == (None, "an open loop says nothing of users")


def test_without_requests_a_second_there_are_users() -> None:
    plan = planned(24, None, Assumptions(users=120, requests_per_day=864_000, headroom=0.25))
    assert (plan.cards, plan.utilisation_mean) == (8, None)
    assert plan.note == "no requests a second were measured: judged by users alone"


def test_one_trace_at_one_speed_plans_nothing() -> None:
    assert plan_cards([row("awq", 0, 1.0, rate_rps=2.5, arrivals="trace")], [], Assumptions(users=9)) == []


demands = st.builds(
    Assumptions,
    users=st.none() | st.integers(1, 100_000),
    requests_per_day=st.none() | st.floats(1.0, 1e9),
    headroom=st.floats(0.0, 0.9),
    failover=st.integers(0, 5),
)


@given(demands, st.integers(1, 512), st.floats(0.01, 200.0), st.floats(1.0, 3.0))
def test_cards_carry_the_demand_and_one_fewer_would_not(
    demand: Assumptions, conc: int, req_s: float, more: float
) -> None:
    plan = planned(conc, req_s, demand)
    if plan.cards is None or plan.cards_for_load is None:
        assert demand.users is None and demand.requests_per_day is None
        return
    assert plan.cards == plan.cards_for_load + demand.failover
    kept = 1 - demand.headroom
    wanted = [(demand.users or 0) / conc, (demand.peak or 0.0) / req_s]
    assert all(share <= plan.cards_for_load * kept * (1 + 1e-6) for share in wanted)
    if plan.cards_for_load > 1:
        assert max(wanted) > (plan.cards_for_load - 1) * kept * (1 - 1e-6)
    assert plan.utilisation_lost is not None and plan.utilisation_lost <= kept * (1 + 1e-6)
    assert plan.utilisation_mean is None or plan.utilisation_peak is not None
    if plan.utilisation_mean is not None and plan.utilisation_peak is not None:
        assert plan.utilisation_mean <= plan.utilisation_peak * (1 + 1e-9)
    grown = replace(
        demand,
        users=None if demand.users is None else int(demand.users * more),
        requests_per_day=None if demand.requests_per_day is None else demand.requests_per_day * more,
    )
    assert (planned(conc, req_s, grown).cards or 0) >= plan.cards


@given(st.integers(1, 64), st.floats(0.5, 30.0), st.integers(1, 5000))
def test_users_and_requests_are_one_demand_by_littles_law(conc: int, e2e_s: float, users: int) -> None:
    """N users who wait e2e for each answer ask N / e2e a second; demand in users or in that rate, the cards agree."""
    req_s = conc / e2e_s
    by_users = planned(conc, req_s, Assumptions(users=users))
    by_rate = planned(conc, req_s, Assumptions(peak_rps=users / e2e_s))
    assert by_users.cards == by_rate.cards
    assert by_users.utilisation_peak == pytest.approx(by_rate.utilisation_peak)


# --- what freed memory is worth ---------------------------------------------------------------------------------------


def memory(precision: str, kind: str, weights: float | None, kv: float | None, tokens: int | None) -> SweepPoint:
    return row(
        precision, 1, memory_kind=kind, weights_gib=weights, kv_cache_gib=kv, kv_cache_tokens=tokens
    )  # fmt: skip


def test_freed_memory_as_the_engine_filled_it() -> None:
    """3.0 − 0.9 = 2.1 GiB of weights; 274,000 − 200,000 = 74,000 tokens; 74,000 / 2,048 = 36.1: 36 users."""
    points = [memory("bf16", "gpu", 3.0, 5.7, 200_000), memory("awq", "gpu", 0.9, 7.8, 274_000)]
    (freed,) = freed_memory(points, 2048)
    assert freed == Freed("awq", "bf16", pytest.approx(2.1), 74_000, 36, 2048, measured=True)


def test_freed_memory_of_a_cache_that_was_set() -> None:
    """2 GiB hold 65,536 tokens: 32 KiB each. 3.0 − 1.0 = 2 GiB of weights would hold 65,536 more: 32 users of 2,048."""
    points = [memory("bf16", "host", 3.0, 2.0, 65_536), memory("awq", "host", 1.0, 2.0, 65_536)]
    (freed,) = freed_memory(points, 2048)
    assert freed == Freed("awq", "bf16", 2.0, 65_536, 32, 2048, measured=False)


def test_a_cache_of_one_size_on_a_gpu_was_set_too() -> None:
    points = [memory("bf16", "gpu", 3.0, 2.0, 65_536), memory("awq", "gpu", 1.0, 2.0, 65_536)]
    assert [(line.kv_tokens, line.measured) for line in freed_memory(points)] == [(65_536, False)]


def test_a_precision_may_take_more_memory() -> None:
    """1.0 − 1.5 = −0.5 GiB; 90,000 − 100,000 = −10,000 tokens; −4.9 users of 2,048: −4, towards zero."""
    points = [memory("bf16", "gpu", 1.0, 7.0, 100_000), memory("awq", "gpu", 1.5, 6.5, 90_000)]
    (freed,) = freed_memory(points, 2048)
    assert (freed.weights_gib, freed.kv_tokens, freed.users) == (-0.5, -10_000, -4)


def test_memory_that_is_not_known_frees_nothing_that_is() -> None:
    points = [memory("bf16", "gpu", None, None, None), memory("awq", "gpu", 1.0, 2.0, 65_536)]
    (freed,) = freed_memory(points)
    assert (freed.weights_gib, freed.kv_tokens, freed.users, freed.measured) == (None, None, None, False)
    assert freed_memory(points[1:]) == []


@pytest.mark.parametrize(
    ("context", "base", "other"), [(256, 1472, 1680), (1152, 327, 373), (4096, 92, 105), (8704, 43, 49)]
)
def test_users_of_freed_memory_as_published(context: int, base: int, other: int) -> None:
    """Qwen3-8B on an H100, vLLM 0.30: KV cache of 377,024 tokens in BF16 and 430,272 in FP8, and by another tool's
    count so many users of each length fit (github.com/tgarg01/silybench-data, derived/csv/runs.csv and capacity.csv).
    """
    points = [memory("bf16", "gpu", None, None, 377_024), memory("fp8", "gpu", None, None, 430_272)]
    (freed,) = freed_memory(points, context)
    assert (freed.kv_tokens, freed.users, freed.measured) == (53_248, other - base, True)
