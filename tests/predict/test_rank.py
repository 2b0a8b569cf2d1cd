"""The ranking of cards: money by hand, the ends of the band, what `bench capacity` says, what cannot be ranked."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from harness.analysis.capacity import plan_cards
from harness.analysis.knee import find_knees
from harness.analysis.spend import spends
from harness.assumptions import Assumptions, load_assumptions
from harness.errors import InputError
from harness.job import SweepRequest
from harness.predict import cell as cells
from harness.predict import run as predicted
from harness.predict.bands import Band, Bands, Basis
from harness.predict.cards import Card, card
from harness.predict.rank import RankedCard, Wanted, judged, ladder, rank, ranked
from harness.predict.roofline import Coefficients
from harness.predict.shapes import shape
from harness.prices import Prices, load_prices, offer
from harness.records import Cell, RequestRecord, SweepPoint, read_table
from harness.report import ranking
from harness.report.run import load_run
from harness.scenario import load_scenario
from harness.slo import Slo, parse_slo

COEFFICIENTS = Coefficients()
EXACT, WIDE = (1.0, 1.0), (0.5, 1.6)


def bands(factors: tuple[float, float] = WIDE, points: dict[str, int] | None = None) -> Bands:
    """Made up: the same two factors for everything."""
    every = product(("tok_s", "ttft_ms", "tpot_ms"), ("one", "users", "open"), ("card", "architecture"))
    made = [Band(figure, load, basis, *factors, 40, 5, 0.1) for figure, load, basis in every]  # type: ignore[arg-type]
    return Bands(tuple(made), {"l4": 9} if points is None else points)


def wanted(
    *names: str,
    model: str = "qwen2.5-1.5b",
    slo: str = "p95=3s",
    precisions: tuple[str, ...] = ("bf16", "awq"),
    most: int = 32,
    own: bool = False,
    usd_per_kwh: float = 0.0,
    **demand: float,
) -> Wanted:
    given = load_assumptions(**(demand or {"users": 100}))
    scenario = load_scenario("chat", slo=parse_slo(slo), requests=40)
    # A window of requests, not of seconds: the tests want to be quick, and virtual time has no noise to wait out.
    scenario = replace(scenario, min_window_s=0.0)
    return Wanted(shape(model), scenario, given, precisions, tuple(map(card, names)), own, usd_per_kwh, most)


def judge(what: Wanted, one: str, known: Bands | None = None) -> list[RankedCard]:
    return judged(what, card(one), COEFFICIENTS, known or bands(), load_prices())


def row(
    name: str, usd: float | None, hi: float | None = None, cards: int | None = 2, precision: str = "bf16"
) -> RankedCard:
    return RankedCard(None, name, name.upper(), precision, cards=cards, cards_lo=cards, cards_hi=cards,
                      usd_per_month=usd, usd_per_month_lo=usd, usd_per_month_hi=hi)  # fmt: skip


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_rent_of_a_month_by_hand() -> None:
    """A minute's p95 holds at every step, so a card carries the 8 users that are tried at most, at all three ends.

    80 % of 8 are 6.4 usable; 20 / 6.4 = 3.125, so 4 cards and one in reserve: 5. An L4 on demand is 0.44 USD/h:
    5 x 24 h x 365.25 / 12 days x 0.44 = 1,607.10 USD.
    """
    first, second = judge(wanted("l4", slo="p95=60s", most=8, users=20), "l4")
    assert (first.cards_lo, first.cards, first.cards_hi) == (5, 5, 5)
    assert (first.safe_users_lo, first.safe_users, first.safe_users_hi) == (8, 8, 8)
    assert first.usd_per_hour == 0.44
    assert first.usd_per_month == pytest.approx(1607.10, abs=0.005)
    assert first.usd_per_month_lo == first.usd_per_month == first.usd_per_month_hi
    assert (first.limit, first.cause) == (None, "none")
    assert second.usd_per_month == first.usd_per_month


def test_what_owning_costs_by_hand() -> None:
    """5 L4 as above, bought: 2,500 USD over 3 years of 8,766 h are 0.095064 USD/h; 72 W at 0.10 USD/kWh 0.0072.

    5 x 24 x 30.4375 x 0.102264 = 373.52 USD a month.
    """
    what = wanted("l4", slo="p95=60s", most=8, users=20, own=True, usd_per_kwh=0.1)
    found = judge(what, "l4")[0]
    assert card("l4").power_w == 72
    assert found.usd_per_month == pytest.approx(373.52, abs=0.005)
    assert found.price.startswith("$2,500 (")


def test_requests_are_turned_into_cards_by_hand() -> None:
    """At most 4 users: the middle carries its own requests a second, the ends half and 1.6 times of them.

    The peak is ten times what 80 % of a card carry: 10 cards and one. At half the pace 20 and one, at 1.6 times the
    pace 10 / 1.6 = 6.25, so 7 and one.
    """
    safe_rps = judge(wanted("l4", slo="p95=60s", most=4), "l4")[0].safe_rps
    assert safe_rps is not None
    per_day = 10 * 0.8 * safe_rps * 86_400 / 3
    found = judge(wanted("l4", slo="p95=60s", most=4, requests_per_day=per_day, peak_factor=3), "l4")[0]
    assert (found.cards_lo, found.cards, found.cards_hi, found.bound_by) == (8, 11, 21, "requests")


def test_the_ladder() -> None:
    assert ladder(24) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24)
    assert ladder(1) == (1,)
    assert ladder(5) == (1, 2, 3, 4, 5)
    assert ladder(17)[-2:] == (16, 17)
    steps = ladder(256)
    assert steps[-1] == 256 and all(b / a <= 9 / 8 for a, b in zip(steps, steps[1:], strict=False) if a >= 8)


def test_a_rent_on_demand_goes_before_a_cheaper_one_and_spot_is_none() -> None:
    prices = load_prices()
    cheap = offer("rtx-a4000", prices)
    assert cheap is not None and (cheap.kind, cheap.usd_per_hour) == ("on-demand", 0.15)  # 0.0825 is a third party's
    spot = tuple(rent for rent in prices.rents if rent.kind == "spot")
    assert offer(spot[0].card, Prices(spot, (), (), ())) is None


# --- the three ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slo", ["p95=1500ms", "p95=60s,ttft=84ms", "p95=60s,tpot=31ms"])
def test_the_safe_loads_are_those_of_every_step_tried(slo: str) -> None:
    """Bisection against trying all: the last step inside before the first outside, with each figure times its end.

    p95 and TPOT are as wrong as throughput, the other way round: between 1 / 1.6 and 1 / 0.5 of it.
    """
    what = wanted("rtx-2000-ada", slo=slo, precisions=("bf16",), most=64)
    found = judge(what, "rtx-2000-ada")[0]
    served = cells.served(card("rtx-2000-ada"), what.model.architecture, "bf16", what.scenario, COEFFICIENTS)
    limits = what.scenario.slo
    factors = {"fast": (1 / 1.6, 0.5), "middle": (1.0, 1.0), "slow": (2.0, 1.6)}
    safe = {}
    for end, (of_p95, of_others) in factors.items():
        safe[end] = 0
        for users in ladder(64):
            seen = cells.figures(what.scenario, *cells.predict(what.scenario, Cell("bf16", users), served))
            if not _inside(seen, limits, of_p95, of_others):
                break
            safe[end] = users
    assert (found.safe_users_lo, found.safe_users, found.safe_users_hi) == tuple(
        safe[end] or None for end in ("slow", "middle", "fast")
    )
    assert len(set(safe.values())) == 3, "the ends must differ, or nothing is tested"


def _inside(seen: dict[str, float], slo: Slo, of_p95: float, of_others: float) -> bool:
    limits = ((seen["p95_ms"] * of_p95, slo.p95_s), (seen["ttft_p95_ms"] * of_others, slo.ttft_s),
              (seen["tpot_p95_ms"] * of_p95, slo.tpot_s))  # fmt: skip
    return all(limit is None or figure <= limit * 1e3 for figure, limit in limits)


def test_the_slow_end_may_carry_nobody() -> None:
    """The p95 of one user is inside 1.2 times itself, and outside when it is twice as long."""
    alone = judge(wanted("l4", slo="p95=60s", most=1), "l4")[0].p95_ms
    assert alone is not None
    found = judge(wanted("l4", slo=f"p95={1.2 * alone:.0f}ms", most=4, users=3), "l4")[0]
    assert found.cards is not None and found.cards_hi is None and found.usd_per_month_hi is None
    assert found.safe_users_lo is None
    assert ranking.banded(found.cards, found.cards_lo, found.cards_hi, "d").endswith("none]")


def test_nobody_at_all() -> None:
    found = judge(wanted("l4", slo="p95=1ms", most=4), "l4")[0]
    assert (found.cards, found.usd_per_month, found.limit) == (None, None, "p95")
    assert "safely inside p95" in found.note and "tested" not in found.note


def test_exact_bands_have_no_width() -> None:
    found = judge(wanted("l4", users=500), "l4", bands(EXACT))[0]
    assert found.cards_lo == found.cards == found.cards_hi


@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "llama-3-8b"])
@pytest.mark.parametrize("name", ["l4", "rtx-3090"])
def test_a_card_twice_as_good_never_takes_more(name: str, model: str) -> None:
    what = wanted(name, model=model, users=300, precisions=("bf16", "awq", "gptq"))
    one = card(name)
    doubled = {field: 2 * getattr(one, field) for field in
               ("memory_gib", "bandwidth_gb_s", "fp16_tflops", "bf16_tflops", "int8_tops", "fp8_tflops", "sms")
               if getattr(one, field) is not None}  # fmt: skip
    better: Card = replace(one, **doubled)
    for plain, twice in zip(
        judged(what, one, COEFFICIENTS, bands(), load_prices()),
        judged(what, better, COEFFICIENTS, bands(), load_prices()),
        strict=True,
    ):
        for end in ("cards_lo", "cards", "cards_hi"):
            fewer, more = getattr(twice, end), getattr(plain, end)
            assert fewer is not None and (more is None or fewer <= more)


# --- the oracle: a run directory and bench capacity -------------------------------------------------------------------


class Silent:
    """Watches a sweep and says nothing."""

    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("demand", [{"users": 170}, {"requests_per_day": 3e6}, {"users": 170, "requests_per_day": 3e6}])
def test_cards_and_money_are_those_of_bench_predict_and_bench_capacity(
    demand: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench predict --conc <ladder> --out RUN`, `bench capacity RUN --rent rtx-2000-ada`: read back from its files.

    Its promise is the slow end. Without the rows' ends the same commands come to the middle.
    """
    known = bands((0.75, 1.4))
    monkeypatch.setattr("harness.predict.coefficients.fitted", lambda: COEFFICIENTS)
    monkeypatch.setattr(predicted, "bands", lambda: known)
    what = wanted("rtx-2000-ada", slo="p95=1300ms", precisions=("bf16", "awq"), **demand)
    request = SweepRequest(what.scenario, ladder(32), "qwen2.5-1.5b", what.precisions, out=tmp_path / "run",
                           engine="simulated", gpu="rtx-2000-ada")  # fmt: skip
    run = load_run(predicted.sweep(request, Silent()))
    capacity = load_assumptions(rent="rtx-2000-ada", **demand)
    bare = [
        replace(point, **{name: None for name in SweepPoint.__slots__ if name.endswith(("_lo", "_hi"))})
        for point in run.points
    ]
    promised = _capacity(run.points, run.slo, capacity)
    middle = _capacity(bare, run.slo, capacity)
    for found in judge(what, "rtx-2000-ada", known):
        cards, usd, _ = middle[found.precision]
        assert (found.cards, found.usd_per_month) == (cards, pytest.approx(usd, abs=0.005))
        cards, usd, most = promised[found.precision]
        assert found.cards_hi == most
        assert found.usd_per_month_hi == pytest.approx(usd / cards * most, abs=0.005)
        if "requests_per_day" not in demand:
            assert found.cards_hi == cards


def _capacity(points: list[SweepPoint], slo: Slo, given: Assumptions) -> dict[str, tuple[int, float, int]]:
    knees = find_knees(points, slo)
    found = {}
    for plan, spend in zip(plan_cards(points, knees, given), spends(points, knees, given), strict=True):
        assert plan.cards is not None and spend.usd_per_month is not None
        found[plan.precision] = plan.cards, spend.usd_per_month, plan.cards_hi or plan.cards
    return found


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_cheapest_card_is_first_and_equals_share_a_rank() -> None:
    found = ranked([row("c", 50.0, 60.0), row("a", 30.004, 90.0), row("b", 30.0, 80.0), row("d", 70.0)])
    assert [(one.card, one.rank) for one in found] == [("b", 1), ("a", 1), ("c", 3), ("d", 4)]


def test_without_a_price_at_the_end_and_without_cards_after_that() -> None:
    found = ranked(
        [row("none", None, cards=None), row("many", None, cards=9), row("few", None, cards=3), row("paid", 1e6)]
    )
    assert [(one.card, one.rank, one.wins) for one in found] == [
        ("paid", 1, True), ("few", None, True), ("many", None, True), ("none", None, False),
    ]  # fmt: skip


def test_one_precision_wins_on_each_card_the_first_of_equals() -> None:
    found = ranked([
        row("x", 40.0, 60.0, precision="bf16"), row("x", 20.0, 30.0, precision="awq"),
        row("x", 20.0, 30.0, precision="gptq"), row("y", 20.0, None, precision="bf16"),
        row("y", 20.0, 25.0, precision="awq"),
    ])  # fmt: skip
    assert [(one.card, one.precision, one.wins, one.rank) for one in found] == [
        ("y", "awq", True, 1), ("y", "bf16", False, 1),  # at its slow end BF16 carries nobody
        ("x", "awq", True, 1), ("x", "gptq", False, 1), ("x", "bf16", False, 1),
    ]  # fmt: skip


def test_what_does_not_fit_is_a_row_that_says_so() -> None:
    """8 billion parameters in 16 bit are 15 GiB, and an RTX 3070 has not quite 8."""
    found = rank(wanted("rtx-3070", "l4", model="llama-3-8b", users=10), COEFFICIENTS, bands(), load_prices())
    small = [one for one in found if one.card == "rtx-3070"]
    assert [one.card for one in found] == ["l4", "l4", "rtx-3070", "rtx-3070"]
    assert next(one for one in small if one.precision == "bf16").cards is None
    assert "does not fit NVIDIA GeForce RTX 3070" in next(one for one in small if one.precision == "bf16").note


def test_a_precision_without_a_kernel_on_a_card_is_a_row_that_says_so() -> None:
    found = judge(wanted("v100-16gb-pcie", precisions=("fp8",)), "v100-16gb-pcie")[0]
    assert found.cards is None and "no kernel is known" in found.note


def test_a_card_without_bf16_serves_fp16_once() -> None:
    found = judge(wanted("t4", precisions=("bf16", "fp16")), "t4")
    assert [one.precision for one in found] == ["fp16"]


def test_no_price_no_money_but_cards() -> None:
    assert offer("a10", load_prices()) is None
    found = rank(wanted("a10", "l4"), COEFFICIENTS, bands(), load_prices())
    last = found[-1]
    assert last.card == "a10" and last.cards is not None and last.rank is None
    assert (last.usd_per_month, last.usd_per_hour) == (None, None)
    assert last.note == "no price in the catalogue"


@pytest.mark.parametrize(
    ("points", "basis", "word"), [({"l4": 3}, "card", "validated"), ({}, "architecture", "unvalidated")]
)
def test_what_the_band_stands_on_is_said(points: dict[str, int], basis: Basis, word: str) -> None:
    found = judge(wanted("l4"), "l4", bands(points=points))[0]
    assert (found.basis, ranking.band_words(found), found.source) == (basis, word, "predicted")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_ranked_is_refused() -> None:
    good = wanted("l4")
    for bad, says in (
        (replace(good, assumptions=Assumptions()), "no traffic"),
        (replace(good, assumptions=Assumptions(users=3, usd_per_hour=1.0)), "one price for all"),
        (replace(good, assumptions=Assumptions(users=3, card_usd=1.0)), "one price for all"),
        (replace(good, scenario=replace(good.scenario, arrivals="poisson")), "poisson"),
        (replace(good, scenario=replace(good.scenario, turns=3)), "turns"),
        (replace(good, precisions=("int3",)), "int3"),
        (replace(good, precisions=("mine=/x",)), "mine=/x"),
        (replace(good, precisions=()), "no precision"),
        (replace(good, most_users=0), "0 users"),
    ):
        with pytest.raises(InputError, match=says):
            rank(bad, COEFFICIENTS, bands(), load_prices())
    with pytest.raises(InputError, match="no such card"):
        card("rtx-9999")
    with pytest.raises(InputError, match="what kind of file"):
        ranking.check_out(Path("ranking.pdf"))


# --- on paper ---------------------------------------------------------------------------------------------------------


def test_same_input_same_bytes_and_every_row_comes_back(tmp_path: Path) -> None:
    what = wanted("l4", "t4", "rtx-3070", model="llama-3-8b")
    texts = []
    for folder in ("one", "two"):
        found = rank(what, COEFFICIENTS, bands(), load_prices())
        for name in ("ranking.csv", "ranking.md"):
            ranking.write(found, what, tmp_path / folder / name)
        texts.append([(tmp_path / folder / name).read_bytes() for name in ("ranking.csv", "ranking.md")])
    assert texts[0] == texts[1]
    assert read_table(tmp_path / "one" / "ranking.csv", RankedCard) == found
    with (tmp_path / "one" / "ranking.csv").open(encoding="utf-8", newline="") as file:
        assert {line["source"] for line in csv.DictReader(file)} == {"predicted"}


def test_every_heading_and_sentence_says_predicted_and_names_stay_text() -> None:
    what = wanted("l4", "rtx-3070", model="llama-3-8b", precisions=("bf16",))
    what = replace(what, model=replace(what.model, name="a|b[red]*x*"))
    found = rank(what, COEFFICIENTS, bands(points={}), load_prices())
    page = ranking.page(found, what)
    assert r"a\|b\[red\]\*x\*" in page and "a|b" not in page
    hostile = replace(found[0], card="c|d", precision="e|f")
    assert r"| c\|d | **E\|F** |" in ranking.page([hostile, *found[1:]], what)
    for heading in (line for line in page.splitlines() if line.startswith("#")):
        assert "predicted" in heading.lower()
    for sentence in [*ranking.sentences(found, what), *ranking.left_out(found)]:
        assert "predict" in sentence.lower()
    assert "unvalidated" in page
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    ranking.show(console, found, what)
    text = console.export_text()
    assert "a|b[red]*x*" in text and "unvalidated" in text and "does not fit" in text


def test_the_page_says_which_precision_wins() -> None:
    what = wanted("rtx-2000-ada", slo="p95=900ms")
    found = rank(what, COEFFICIENTS, bands(), load_prices())
    winner = next(one for one in found if one.wins)
    assert f"| **{winner.precision.upper()}** |" in ranking.page(found, what)
    assert ranking.page(found, what).count("**") == 2
    assert ranking.limit_words(winner) == "p95, by compute"


def test_the_catalogue_as_a_table() -> None:
    console = Console(record=True, width=240, force_terminal=False, file=io.StringIO())
    ranking.show_catalogue(console, (card("t4"), card("a10")), load_prices())
    text = console.export_text()
    assert "t4" in text and "14.58" in text and "0.526" in text and card("a10").name in text
