"""Prices: each shipped one has its day and its source; a file of one's own wins; what does not fit is named."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.prices import CATALOGUE, Api, Buy, Electricity, Prices, Rent, load_prices
from harness.scenario import scenario_names, scenarios_dir

WRITTEN = date(2026, 11, 21)
"""The day on which the catalogue was put together: no price in it can be younger."""

SIXTEEN_GIB = {
    "rtx-2000-ada",
    "rtx-a4000",
    "rtx-4060-ti-16gb",
    "rtx-4070-ti-super",
    "rtx-4080",
    "rtx-4080-super",
    "rtx-5060-ti-16gb",
    "rtx-5070-ti",
    "rtx-5080",
    "t4",
}
NEIGHBOURS = {
    "l4",
    "a10g",
    "rtx-3090",
    "rtx-4090",
    "rtx-a5000",
    "rtx-a6000",
    "l40s",
    "a100-80gb-pcie",
    "h100-80gb-pcie",
}

Write = Callable[..., Path]
Entry = Rent | Buy | Electricity | Api

RENT = """
[[rent]]
card = "rtx-a4000"
name = "NVIDIA RTX A4000"
memory_gib = 16
provider = "RunPod"
kind = "community"
usd_per_hour = 0.11
as_of = 2026-11-01
source = "our invoice"
"""
BUY = """
[[buy]]
card = "rtx-a4000"
name = "NVIDIA RTX A4000"
usd = 500
as_of = 2026-11-02
source = "our invoice"
note = "second-hand"
"""
ELECTRICITY = """
[[electricity]]
region = "our-hall"
usd_per_kwh = 0.21
as_of = 2026-11-03
source = "contract"
"""
API = """
[[api]]
id = "gpt-4o-mini"
provider = "OpenAI"
model = "GPT-4o mini"
usd_per_1m_input = 0.12
usd_per_1m_output = 0.48
as_of = 2026-11-04
source = "our contract"
"""


@pytest.fixture(scope="module")
def shipped() -> Prices:
    return load_prices()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text)`: a prices file of one's own; gives its path."""

    def written(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return written


def entries(prices: Prices) -> list[Entry]:
    return [*prices.rents, *prices.buys, *prices.tariffs, *prices.apis]


def test_every_shipped_price_has_its_day_and_its_source(shipped: Prices) -> None:
    for entry in entries(shipped):
        assert date(2020, 1, 1) <= entry.as_of <= WRITTEN, entry
        assert re.fullmatch(r"https://[^\s\"<>]+", entry.source), entry
        assert str(entry.as_of) in entry.words and re.fullmatch(r"\d{4}-\d\d-\d\d", str(entry.as_of))


def test_nothing_in_the_file_is_lost_on_the_way(shipped: Prices) -> None:
    tables = tomllib.loads((scenarios_dir() / CATALOGUE).read_text())
    assert {name: len(rows) for name, rows in tables.items()} == {
        "rent": len(shipped.rents),
        "buy": len(shipped.buys),
        "electricity": len(shipped.tariffs),
        "api": len(shipped.apis),
    }
    first = tables["rent"][0]
    assert [getattr(shipped.rents[0], key) for key in first] == list(first.values())


def test_the_16_gib_class_is_there_to_rent_and_to_buy(shipped: Prices) -> None:
    assert {rent.card for rent in shipped.rents if rent.memory_gib == 16} == SIXTEEN_GIB
    assert SIXTEEN_GIB <= {buy.card for buy in shipped.buys}
    assert NEIGHBOURS <= {rent.card for rent in shipped.rents}
    assert NEIGHBOURS - {buy.card for buy in shipped.buys} == {"a10g", "a100-80gb-pcie"}, "no source was found"


def test_a_card_is_the_same_card_wherever_it_is_named(shipped: Prices) -> None:
    said = {(rent.card, rent.name, rent.memory_gib) for rent in shipped.rents}
    assert len(said) == len({rent.card for rent in shipped.rents})
    assert {(buy.card, buy.name) for buy in shipped.buys} <= {(card, name) for card, name, _ in said}


def test_shipped_prices_are_plausible(shipped: Prices) -> None:
    for rent in shipped.rents:
        low, high = (0.05, 0.7) if rent.memory_gib <= 16 else (0.1, 7)
        assert low <= rent.usd_per_hour <= high, rent
    for buy in shipped.buys:
        low, high = (400, 1800) if buy.card in SIXTEEN_GIB else (1000, 30_000)
        assert low <= buy.usd <= high, buy
    for tariff in shipped.tariffs:
        assert 0.05 <= tariff.usd_per_kwh <= 0.5, tariff
    for api in shipped.apis:
        assert 0.01 <= api.usd_per_1m_input <= api.usd_per_1m_output <= 10, api


def test_one_price_of_each_kind_against_its_source(shipped: Prices) -> None:
    """Copied by hand from the sources. eu-household: 0.2872 EUR × 1.1699 USD/EUR = 0.33600 USD."""
    assert [(rent.provider, rent.kind, rent.usd_per_hour) for rent in shipped.rent_of("rtx-2000-ada")] == [
        ("RunPod", "on-demand", 0.24)
    ]
    assert (shipped.buy_of("rtx-2000-ada").usd, shipped.buy_of("rtx-2000-ada").as_of) == (686.99, date(2025, 8, 23))
    assert shipped.electricity("us-commercial").usd_per_kwh == 0.1437
    assert shipped.electricity("eu-household").usd_per_kwh == 0.336
    llama = shipped.api("llama-3.1-8b-groq")
    assert (llama.usd_per_1m_input, llama.usd_per_1m_output) == (0.05, 0.08)


def test_the_catalogue_is_no_scenario() -> None:
    assert "prices" not in scenario_names() and "catalogue" not in scenario_names()


def test_offers_come_on_demand_first_and_the_cheapest_first_in_each_kind(shipped: Prices) -> None:
    offers = shipped.rent_of("rtx-a6000")
    assert [offer.kind for offer in offers] == ["on-demand"] * 3 + ["community"] * 2 + ["spot"]
    for kind in ("on-demand", "community"):
        prices = [offer.usd_per_hour for offer in offers if offer.kind == kind]
        assert len(prices) > 1 and prices == sorted(prices)


def test_words_say_the_price_as_given_and_its_day(write: Write) -> None:
    prices = load_prices(write(RENT + BUY + ELECTRICITY + API))
    (rent,) = (offer for offer in prices.rent_of("rtx-a4000") if offer.source == "our invoice")
    assert rent.words == "$0.11/h (RunPod, community, 2026-11-01)"
    assert prices.buy_of("rtx-a4000").words == "$500 (2026-11-02)"
    assert prices.buy_of("h100-80gb-pcie").words == "$25,249.95 (2025-07-04)"
    assert prices.electricity("our-hall").words == "$0.21/kWh (our-hall, 2026-11-03)"
    assert prices.api("gpt-4o-mini").words == "$0.12 in and $0.48 out for 1M tokens (GPT-4o mini, OpenAI, 2026-11-04)"


def test_an_entry_of_ones_own_replaces_the_whole_of_the_shipped_one(shipped: Prices, write: Write) -> None:
    prices = load_prices(write(RENT + BUY + API))
    before = {rent.key: rent for rent in shipped.rents}
    after = {rent.key: rent for rent in prices.rents}
    key = ("rtx-a4000", "RunPod", "community")
    assert list(after) == list(before), "the others stay, in their order"
    assert {changed for changed in after if after[changed] != before[changed]} == {key}
    assert (before[key].usd_per_hour, before[key].note != "") == (0.17, True)
    assert (after[key].usd_per_hour, after[key].source, after[key].note) == (0.11, "our invoice", "")
    assert (prices.buy_of("rtx-a4000").usd, prices.buy_of("rtx-a4000").note) == (500, "second-hand")
    assert prices.api("gpt-4o-mini").usd_per_1m_output == 0.48
    assert (len(prices.buys), len(prices.apis)) == (len(shipped.buys), len(shipped.apis))
    assert prices.tariffs == shipped.tariffs


def test_what_is_not_shipped_is_added(shipped: Prices, write: Write) -> None:
    other_provider = RENT.replace("RunPod", "a friend").replace("2026-11-01", '"2026-11-01"')  # quotes do no harm
    prices = load_prices(write(other_provider + RENT.replace("rtx-a4000", "quadro-p6000") + ELECTRICITY))
    assert len(prices.rents) == len(shipped.rents) + 2
    assert len(prices.rent_of("rtx-a4000")) == len(shipped.rent_of("rtx-a4000")) + 1
    assert prices.rent_of("quadro-p6000")[0].usd_per_hour == 0.11
    assert prices.electricity("our-hall").usd_per_kwh == 0.21


def test_an_empty_file_changes_nothing(shipped: Prices, write: Write) -> None:
    assert load_prices(write("# nothing yet\n")) == shipped


@pytest.mark.parametrize(
    ("look_up", "named", "there"),
    [
        (lambda prices: prices.rent_of("rtx-9090"), "[[rent]] for card 'rtx-9090'", "rtx-2000-ada, rtx-a4000"),
        (lambda prices: prices.buy_of("a10g"), "[[buy]] for card 'a10g'", "rtx-2000-ada, rtx-a4000"),
        (
            lambda prices: prices.electricity("mars"),
            "[[electricity]] for region 'mars'",
            "us-commercial, us-industrial",
        ),
        (lambda prices: prices.api("gpt-9"), "[[api]] for id 'gpt-9'", "gpt-4o-mini, gpt-4.1-nano"),
    ],
)
def test_an_unknown_price_is_an_error_that_names_what_is_there(
    shipped: Prices, look_up: Callable[[Prices], object], named: str, there: str
) -> None:
    with pytest.raises(InputError) as caught:
        look_up(shipped)
    assert named in str(caught.value) and there in str(caught.value) and "of your own" in str(caught.value)
    assert str(caught.value).count("rtx-a4000,") <= 1, "each card is named once"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RENT.replace("usd_per_hour = 0.11", "usd_per_hour = 0"), "[[rent]] 1: usd_per_hour = 0"),
        (RENT.replace("usd_per_hour = 0.11", "usd_per_hour = 1000.5"), "[[rent]] 1: usd_per_hour = 1000.5"),
        (RENT.replace("usd_per_hour = 0.11", "usd_per_hour = nan"), "[[rent]] 1: usd_per_hour = nan"),
        (RENT.replace("usd_per_hour = 0.11", "usd_per_hour = true"), "[[rent]] 1: usd_per_hour = True"),
        (RENT.replace("usd_per_hour = 0.11", 'usd_per_hour = "0.11"'), "[[rent]] 1: usd_per_hour = '0.11'"),
        (RENT.replace("memory_gib = 16", "memory_gib = 0.5"), "[[rent]] 1: memory_gib = 0.5"),
        (RENT.replace("memory_gib = 16", "memory_gib = 16384"), "[[rent]] 1: memory_gib = 16384"),
        (RENT.replace('"community"', '"reserved"'), "[[rent]] 1: kind = 'reserved'"),
        (RENT.replace('"our invoice"', '""'), "[[rent]] 1: source = ''"),
        (RENT.replace('source = "our invoice"\n', ""), "[[rent]] 1: no source"),
        (RENT.replace("as_of = 2026-11-01\n", ""), "[[rent]] 1: no as_of"),
        (RENT.replace("2026-11-01", '"November 2026"'), "[[rent]] 1: as_of = 'November 2026'"),
        (RENT.replace("2026-11-01", "1926-11-01"), "[[rent]] 1: as_of = datetime.date(1926, 11, 1)"),
        (RENT.replace("usd_per_hour", "eur_per_hour"), "[[rent]] 1: unknown key 'eur_per_hour'"),
        (RENT + RENT, "[[rent]] 2: rtx-a4000, RunPod, community is there already"),
        (BUY.replace("usd = 500", "usd = -500"), "[[buy]] 1: usd = -500"),
        (BUY + BUY, "[[buy]] 2: rtx-a4000 is there already"),
        (
            ELECTRICITY + ELECTRICITY.replace("our-hall", "b").replace("0.21", "21"),
            "[[electricity]] 2: usd_per_kwh = 21",
        ),
        (ELECTRICITY.replace("0.21", "-0.01"), "[[electricity]] 1: usd_per_kwh = -0.01"),
        (API.replace("0.12", "120000"), "[[api]] 1: usd_per_1m_input = 120000"),
        (API.replace("0.48", "-1"), "[[api]] 1: usd_per_1m_output = -1"),
        (RENT.replace("[[rent]]", "[[rents]]"), "unknown table [[rents]]"),
        (RENT.replace("[[rent]]", "[rent]"), "rent is no list of tables"),
        ("rent = [1, 2]", "rent is no list of tables"),
        ("rent = 0.25", "rent is no list of tables"),
        ("[rent]", "rent is no list of tables"),
        ("[[rent]\n", "no readable TOML"),
    ],
)
def test_what_does_not_fit_is_named_with_file_table_and_key(write: Write, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_prices(write(text))
    assert str(caught.value).startswith(f"mine.toml: {said}")


def test_what_costs_nothing_is_a_price_where_it_can_be(write: Write) -> None:
    prices = load_prices(write(ELECTRICITY.replace("0.21", "0") + API.replace("0.12", "0.0")))
    assert (prices.electricity("our-hall").usd_per_kwh, prices.api("gpt-4o-mini").usd_per_1m_input) == (0, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.toml: cannot be read"):
        load_prices(tmp_path / "absent.toml")
