"""What a plan says in words and tables: the figures of the analysis, the reason where there is none, names as text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis.capacity import CardPlan, Freed, plan_cards
from harness.analysis.cost import stated_lines
from harness.analysis.saving import Saving
from harness.analysis.spend import Spend, spends
from harness.assumptions import Assumptions, load_assumptions
from harness.records import Knee, SweepPoint
from harness.report.planning import (
    demand_sentence,
    freed_sentences,
    hour_sentences,
    percent,
    plan_sentences,
    plan_table,
    planning_sentences,
    savings_sentences,
    spend_sentences,
    spend_table,
    stated_table,
    usd,
)

SLO = "p95 ≤ 3 s"
DEMAND = Assumptions(
    users=120, requests_per_day=864_000, headroom=0.25, users_per_tenant=4,
    api_usd_per_1m_input=0.5, api_usd_per_1m_output=2.0, api_name="Some\n API",
)  # fmt: skip


def row(precision: str, conc: int, tok_s: float, **more: object) -> SweepPoint:
    """5 requests a second at 500 tok/s, of 400 tokens in and 100 out."""
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.8, "tok_s_hi": tok_s * 1.25, "p95_ms": 2000.0, "req_s": tok_s / 100,
        "usd_per_hour": 0.5, "utilisation": 1.0, "verdict": "valid",
        "input_tokens_mean": 400.0, "output_tokens_mean": 100.0, **more,
    }  # fmt: skip
    return SweepPoint("run", precision, conc, tok_s=tok_s, **values)  # type: ignore[arg-type]


def knee(precision: str, safe: int | None) -> Knee:
    low = None if safe is None else float(safe)
    return Knee(precision, SLO, safe_conc=safe, cross_lo=low, tested_lo=1.0, tested_hi=32.0)


POINTS = [row("bf16", 16, 400.0), row("awq", 24, 500.0), row("awq", 16, 450.0)]
KNEES = [knee("bf16", 16), knee("awq", 24)]


def cells(table: str, name: str) -> dict[str, str]:
    """A row of a Markdown table by its first cell, as column: cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [line for line in lines[2:] if line[0] == name]
    return dict(zip(lines[0], found, strict=True))


def test_a_plan_in_a_row() -> None:
    """AWQ: the figures of test_capacity's examples: 8 cards for 30 req/s at 3.75, and 1."""
    row_of = cells(plan_table(plan_cards(POINTS, KNEES, DEMAND), DEMAND), "AWQ")
    assert row_of == {
        "Precision": "AWQ",
        "Safe users a card": "24",
        "Safe req/s a card": "5.00",
        "Cards for the load": "8",
        "Cards": "9 [8–11]",
        "Full at the peak": "67 %",
        "Full with 1 card lost": "75 %",
        "Full over the day": "22 %",
        "Tenants a card, 4 users each": "4",
    }


def test_a_plan_in_a_sentence() -> None:
    assert plan_sentences(plan_cards(POINTS, KNEES, DEMAND), DEMAND)[1] == (
        "AWQ needs 9 [8–11] cards at p95 ≤ 3 s, 8 for the load and 1 in reserve; requests decide. At the peak they are "
        "67 % full, 75 % with 1 card lost, 22 % over the day. A card holds 4 tenants of 4 users."
    )


def test_a_plan_that_has_no_safe_load_says_so_and_stays_empty() -> None:
    plans = plan_cards(POINTS, [KNEES[0], knee("awq", None)], DEMAND)
    assert plan_sentences(plans, DEMAND)[1] == (
        "AWQ: no number of cards, because no tested load is safely inside p95 ≤ 3 s."
    )
    assert set(cells(plan_table(plans, DEMAND), "AWQ").values()) == {"AWQ", ""}


def test_a_suspect_operating_point_and_a_demand_that_was_not_judged_are_said() -> None:
    plan = CardPlan(
        "awq", SLO, cards=1, cards_for_load=1, bound_by="requests", utilisation_peak=0.5, verdict="suspect",
        note="an open loop says nothing of users: judged by requests alone",
    )  # fmt: skip
    (words,) = plan_sentences([plan], replace(DEMAND, failover=0))
    assert words == (
        "AWQ needs 1 card at p95 ≤ 3 s, 1 for the load and 0 in reserve; requests decide. At the peak they are 50 % "
        "full. An open loop says nothing of users: judged by requests alone. Its operating point is suspect."
    )


def test_without_a_demand_nobody_asked_for_cards() -> None:
    asked = Assumptions()
    assert plan_sentences(plan_cards(POINTS, KNEES, asked), asked) == []
    assert "Cards" not in plan_table(plan_cards(POINTS, KNEES, asked), asked)


def test_the_demand_in_a_sentence() -> None:
    assert demand_sentence(DEMAND) == (
        "Demand: 120 users at the peak; 864,000 requests a day; 30.0 requests a second at the peak, 3 times the day's "
        "mean. 25 % of each card's safe capacity kept free, 1 card in reserve."
    )
    assert demand_sentence(Assumptions(peak_rps=2.5, failover=2)) == (
        "Demand: 2.50 requests a second at the peak. 20 % of each card's safe capacity kept free, 2 cards in reserve."
    )


@pytest.mark.parametrize(
    ("freed", "words"),
    [
        (
            Freed("awq", "bf16", 2.1, 74_000, 36, 2048, measured=True),
            "AWQ frees 2.10 GiB of weights = 74,000 more KV tokens = 36 more users of 2,048 tokens each, against BF16 "
            "(measured: the engine filled the card with KV cache).",
        ),
        (
            Freed("awq", "bf16", 2.0, 65_536, 1, 65_536),
            "AWQ frees 2.00 GiB of weights = 65,536 more KV tokens = 1 more user of 65,536 tokens each, against BF16 "
            "(computed: here the KV cache had a set size, and the difference lay idle).",
        ),
        (
            Freed("rtn", "bf16", -0.5, -10_000, -4, 2048, measured=True),
            "RTN takes 0.500 GiB more of weights = 10,000 fewer KV tokens = 4 fewer users of 2,048 tokens each, "
            "against BF16 (measured: the engine filled the card with KV cache).",
        ),
        (
            Freed("rtn", "bf16", 0.5, -10_000, -4, 2048, measured=True),
            "RTN frees 0.500 GiB of weights and yet has 10,000 fewer KV tokens = 4 fewer users of 2,048 tokens each, "
            "against BF16 (measured: the engine filled the card with KV cache).",
        ),
        (
            Freed("fp8", "bf16", None, 53_248, 13, 4096, measured=True),
            "FP8 has 53,248 more KV tokens = 13 more users of 4,096 tokens each, against BF16 (measured: the engine "
            "filled the card with KV cache).",
        ),
        (Freed("awq", "bf16", 2.1), "AWQ frees 2.10 GiB of weights, against BF16."),
    ],
)
def test_freed_memory_in_a_sentence(freed: Freed, words: str) -> None:
    assert freed_sentences([freed, Freed("awq", "bf16")]) == [words]


@pytest.mark.parametrize(
    ("share", "low", "high", "words"),
    [
        (0.38, 0.354, 0.41, "AWQ cuts serving cost per 1M output tokens by 38 % [35–41] against BF16 at"),
        (-0.05, -0.08, -0.021, "AWQ raises serving cost per 1M output tokens by 5.0 % [2.1–8.0] against BF16 at"),
        (0.02, -0.03, 0.07, "It is undecided whether AWQ cuts serving cost per 1M output tokens against BF16 at"),
        (-0.02, -0.07, 0.03, "It is undecided whether AWQ cuts serving cost per 1M output tokens against BF16 at"),
        (0.38, None, None, "AWQ cuts serving cost per 1M output tokens by 38 % (no interval) against BF16 at"),
        (-0.38, None, None, "AWQ raises serving cost per 1M output tokens by 38 % (no interval) against BF16 at"),
    ],
)
def test_a_saving_in_a_sentence(share: float, low: float | None, high: float | None, words: str) -> None:
    (said,) = savings_sentences([Saving("awq", "bf16", SLO, share, low, high)])
    assert said.startswith(words)
    assert "the same service level (p95 ≤ 3 s), each at its own largest safe load" in said
    ends = {0.02: ": by 2.0 % [−3.0 to 7.0].", -0.02: ": by −2.0 % [−7.0 to 3.0]."}
    assert said.endswith(ends.get(share, "safe load."))


def test_no_saving_and_a_doubtful_one() -> None:
    said = savings_sentences(
        [Saving("awq", "bf16", SLO, note="no price"), Saving("awq", "bf16", SLO, 0.3, 0.2, 0.4, verdict="suspect")]
    )
    assert said[0] == "AWQ against BF16: no serving costs to compare, because no price."
    assert said[1].endswith("safe load. One of the two operating points is suspect.")


def test_stated_prices_in_a_row() -> None:
    """AWQ at 24 users: 0.50 / 1.8 M = 0.278 USD/1M [÷ 1.25, ÷ 0.8]; 500 × 4 in and as much weight out: 0.0347 input."""
    found = stated_table(stated_lines(POINTS, KNEES, Assumptions(batch_conc=20)))
    best = [line for line in found.splitlines() if line.startswith("| AWQ | largest")]
    assert best == [
        "| AWQ | largest tested concurrency inside p95 ≤ 3 s | 2.00 | 2,000 | 500 | 0.500 | 0.278 [0.222–0.347] | "
        "0.0347 [0.0278–0.0434] | 0.139 [0.111–0.174] | 0.0556 [0.0444–0.0694] | valid |"
    ]
    assert "| AWQ | batch, 20 users (interpolated between 16 and 24), inside p95 ≤ 3 s |" in found
    assert "| BF16 | batch, 20 users |  |  |  |  |  |  |  |  | outside the loads that were measured |" in found


def test_the_hour_in_a_sentence() -> None:
    """card_usd 876.6 over 1 year: 0.10 USD. 100 W at 1 USD/kWh: 0.10 USD more, when busy half the time 0.05."""
    assert hour_sentences(POINTS, KNEES, Assumptions()) == ["An hour of a card costs 0.500 USD in rent."]
    owned = Assumptions(card_usd=876.6, years=1.0, usd_per_kwh=1.0, utilisation=0.5)
    powered = [replace(POINTS[0], power_w=200.0), replace(POINTS[1], power_w=100.0)]
    assert hour_sentences(powered, KNEES, owned) == [
        "An hour of a card with BF16 costs 0.200 USD: 0.100 USD written off over 1 year, 0.100 USD for electricity "
        "(200 W under load, 50 % of the time).",
        "An hour of a card with AWQ costs 0.150 USD: 0.100 USD written off over 1 year, 0.0500 USD for electricity "
        "(100 W under load, 50 % of the time).",
    ]
    assert hour_sentences(POINTS, KNEES, owned) == [
        "An hour of a card costs 0.100 USD, written off over 1 year; electricity left out: the card's power was not "
        "measured."
    ]
    assert hour_sentences([replace(POINTS[1], usd_per_hour=None)], KNEES[1:], Assumptions()) == [
        "An hour of a card has no price."
    ]


def test_spend_and_break_even_in_a_row_and_in_sentences() -> None:
    """BF16: 16 × 0.75 = 12 users: 10 cards; 4 × 0.75 = 3 req/s: 10; and 1 = 11 cards × 12 USD = 132 USD a day. AWQ: 9 ×
    12 = 108 USD, 3,287 a month. Tokens: 86.4 M a day, 1.25 USD/1M; full 0.278. The API: 0.0004 USD a request, 345.6
    USD a day, 10,519 a month, 7,232 more. A card's 12 USD are 30,000 requests of 432,000, 6.9 %; nine cards' 270,000.
    """
    found = spends(POINTS, KNEES, DEMAND)
    assert cells(spend_table(found), "AWQ") == {
        "Precision": "AWQ",
        "Cards": "9",
        "USD a card-hour": "0.500",
        "USD a day": "108",
        "USD a month": "3,287",
        "USD/1M output, at this traffic": "1.25",
        "USD/1M output, at full load": "0.278",
        "USD/1M blended, at this traffic": "0.250",
        "USD/1M blended, at full load": "0.0556",
        "API, USD a month": "10,519",
        "Break-even, requests a day": "270,000",
    }
    assert spend_sentences(found, DEMAND)[2:] == [
        "9 cards with AWQ: 108 USD a day, 3,287 USD a month, 730 USD less than with BF16; 1.25 USD per 1M output "
        "tokens at this traffic, 0.278 USD if a card were never idle.",
        "Against Some API, one card with AWQ breaks even at 30,000 requests a day, 6.9 % of what it safely carries. "
        "9 cards do at 270,000 requests a day; at 864,000 a day, serving it oneself saves 7,232 USD a month.",
    ]


def test_break_even_that_never_comes_is_said() -> None:
    """At a hundredth of the API's price a card would need 3,000,000 requests a day and carries 432,000."""
    cheap = replace(DEMAND, api_usd_per_1m_input=0.005, api_usd_per_1m_output=0.02, api_name="")
    found = spends(POINTS, KNEES, cheap)
    assert cells(spend_table(found), "AWQ")["Break-even, requests a day"] == "never"
    assert spend_sentences(found, cheap)[3] == (
        "AWQ never breaks even against the API, which is cheaper even than a card at full load."
    )
    # One card for the load and nine to lose: 10 × 30,000 a day, and the one carries 3.75 × 28,800 = 108,000.
    spare = replace(DEMAND, users=1, requests_per_day=1000, failover=9)
    assert spend_sentences(spends(POINTS, KNEES, spare), spare)[3].endswith(
        "10 cards never do: they are full at 108,000 requests a day and would need 300,000."
    )


def test_an_api_that_is_cheaper_at_this_traffic() -> None:
    """100 requests a day cost 0.04 USD; two cards 24: 729.28 USD more a month."""
    few = replace(DEMAND, users=1, requests_per_day=100)
    said = spend_sentences(spends(POINTS, KNEES, few), few)[3]
    assert said.endswith("at 100 a day, serving it oneself costs 729 USD more a month.")


def test_spends_are_not_compared_where_one_lacks_its_electricity() -> None:
    owned = Assumptions(card_usd=876.6, usd_per_kwh=1.0, users=9)
    points = [POINTS[0], replace(POINTS[1], power_w=100.0)]
    one, two = spend_sentences(spends(points, KNEES, owned), owned)
    assert "Note: electricity left out: the card's power was not measured." in one
    assert "than with" not in two


def test_without_cards_there_is_no_spend_to_speak_of() -> None:
    assert spend_sentences([Spend("awq", note="x")], Assumptions()) == []
    assert cells(spend_table([Spend("awq")]), "AWQ") == {"Precision": "AWQ"}


def test_all_sentences_in_order() -> None:
    said = planning_sentences(POINTS, KNEES, DEMAND)
    starts = ["Demand:", "BF16 needs", "AWQ needs", "It is undecided whether AWQ", "An hour of a card"]
    starts += ["11 cards with BF16", "Against Some API, one card with BF16", "9 cards with AWQ", "Against Some API"]
    assert [sentence.startswith(start) for sentence, start in zip(said, starts, strict=True)] == [True] * len(starts)
    assert planning_sentences(POINTS, KNEES, Assumptions())[0].startswith("It is undecided")
    assert planning_sentences([row("awq", 0, 9.0, rate_rps=2.5, arrivals="trace")], [], DEMAND) == [
        demand_sentence(DEMAND)
    ]


def test_the_example_in_the_docs_is_what_comes_out(tmp_path: Path) -> None:
    """docs/cost.md: its TOML, the two made rows that it names, and the sentences that follow from them."""
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (sentences,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    (tmp_path / "ours.toml").write_text(toml, encoding="utf-8")
    held = ({"weights_gib": 3.0, "kv_cache_gib": 5.7, "kv_cache_tokens": 200_000},
            {"weights_gib": 0.9, "kv_cache_gib": 7.8, "kv_cache_tokens": 274_000})  # fmt: skip
    points = [
        row("bf16", 16, 400.0, tok_s_lo=380.0, tok_s_hi=420.0, memory_kind="gpu", **held[0]),
        row("awq", 24, 500.0, tok_s_lo=475.0, tok_s_hi=525.0, memory_kind="gpu", **held[1]),
    ]
    said = planning_sentences(points, KNEES, load_assumptions(tmp_path / "ours.toml"))
    assert "\n".join(said) == re.sub(r"\n  +", " ", sentences).strip()


def test_names_from_outside_stay_text() -> None:
    name = "a|b<script>*x*"
    points, knees = [row(name, 24, 500.0)], [knee(name, 24)]
    shown = r"A\|B\<SCRIPT\>\*X\*"
    for table in (
        plan_table(plan_cards(points, knees, DEMAND), DEMAND),
        spend_table(spends(points, knees, DEMAND)),
        stated_table(stated_lines(points, knees, DEMAND)),
    ):
        assert table.splitlines()[2].startswith(f"| {shown} |")


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.384, "38 %"), (0.0999, "10.0 %"), (0.0231, "2.3 %"), (0.00123, "0.12 %"), (0.0, "0 %"), (-0.021, "−2.1 %")],
)
def test_percent(share: float, words: str) -> None:
    assert percent(share) == words


def test_usd() -> None:
    assert [usd(1234.5), usd(0.0421), usd(None)] == ["1,234 USD", "0.0421 USD", ""]
