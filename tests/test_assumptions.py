"""What is assumed: read, checked and said to be wrong by name; a trace's traffic by hand and by counting."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.assumptions import (
    RANGES,
    Assumptions,
    busiest,
    check_assumptions,
    load_assumptions,
    with_trace,
)
from harness.errors import InputError
from harness.load.schedule import Arrival
from harness.prices import load_prices

DOCS = Path(__file__).parent.parent / "docs" / "cost.md"


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "ours.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_defaults_stand() -> None:
    assert load_assumptions() == Assumptions()
    assert load_assumptions(None, users=None, headroom=None) == Assumptions()


def test_the_file_changes_the_defaults_and_an_override_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'users = 120\nheadroom = 0.3\napi_name = "Some"\n')
    read = load_assumptions(path, users=60, failover=None)
    assert read == Assumptions(users=60, headroom=0.3, api_name="Some")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user = 3", ["ours.toml", "unknown key 'user'", "users_per_tenant"]),
        ("users = 2.5", ["ours.toml", "users = 2.5"]),
        ('headroom = "much"', ["headroom = 'much'"]),
        ("headroom = 1.0", ["headroom = 1.0", "0 to 0.95"]),
        ("usd_per_kwh = nan\ncard_usd = 1", ["usd_per_kwh = nan", "0 to 100"]),
        ("users 3", ["ours.toml", "no readable TOML"]),
        ("usd_per_hour = 1\ncard_usd = 400", ["usd_per_hour = 1.0 and card_usd = 400.0", "rent or own"]),
        ("host_usd = 9", ["host_usd = 9.0 without card_usd"]),
        ("usd_per_kwh = 0.3", ["usd_per_kwh = 0.3 without card_usd"]),
        ("card_usd = 1\nwatts = 9\nidle_watts = 10", ["watts = 9.0", "idle_watts = 10.0"]),
        ("api_usd_per_1m_input = 1", ["without the other"]),
        ("api_usd_per_1m_output = 1", ["without the other"]),
        ("requests_per_day = 86400\npeak_rps = 0.9", ["peak_rps = 0.9 is below the mean rate"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_assumptions(toml(tmp_path, text))
    assert all(part in str(error.value) for part in parts), error.value
    assert error.value.exit_code == 2


def test_an_override_is_checked_like_the_file() -> None:
    with pytest.raises(InputError, match="assumptions: failover = -1"):
        load_assumptions(failover=-1)
    with pytest.raises(InputError, match="unknown key 'cards'"):
        load_assumptions(cards=3)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_assumptions(tmp_path / "none.toml")


@pytest.mark.parametrize("key", sorted(RANGES))
def test_each_range_is_kept_at_both_ends(key: str) -> None:
    low, high = RANGES[key]
    for value in (low - 0.001 * max(1.0, abs(low)), high * 1.001, float("nan")):
        with pytest.raises(InputError, match=f"{key} = "):
            check_assumptions(replace(Assumptions(), **{key: value}))


def test_every_number_has_a_range() -> None:
    assert {field.name for field in fields(Assumptions)} - {"api_name", "sources"} == set(RANGES)


def test_the_docs_know_every_key() -> None:
    text = DOCS.read_text(encoding="utf-8")
    keys = {field.name for field in fields(Assumptions)} - {"sources"} | {"rent", "own", "electricity", "api"}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_the_peak_of_a_day() -> None:
    """864,000 requests / 86,400 s = 10 a second on average, × 3 = 30 at the peak. A peak that is given stands."""
    assert Assumptions(requests_per_day=864_000).peak == pytest.approx(30)
    assert Assumptions(requests_per_day=864_000, peak_rps=12.0).peak == 12.0
    assert Assumptions(requests_per_day=864_000, peak_rps=12.0).peak_over_mean == pytest.approx(1.2)
    assert Assumptions(users=5).peak is None
    assert Assumptions(peak_rps=12.0).peak_over_mean == Assumptions().peak_factor


def trace(tmp_path: Path, offsets: list[float]) -> Path:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{offset},100,10\n" for offset in offsets)
    path.write_text(f"timestamp,input_length,output_length\n{rows}", encoding="utf-8")
    return path


def test_traffic_of_a_trace_by_hand(tmp_path: Path) -> None:
    """Arrivals at 0, 30, 50, 60, 70, 85 and 240 s: 6 gaps / 240 s = 0.025 a second, 2,160 a day.

    The minute that begins at 30 s holds 30, 50, 60, 70 and 85: 5 / 60 = 0.0833 a second. That of 0 s ends before 60.
    """
    found = with_trace(Assumptions(headroom=0.1), trace(tmp_path, [0, 30, 50, 60, 70, 85, 240]))
    assert found.requests_per_day == pytest.approx(2160)
    assert found.peak_rps == pytest.approx(5 / 60)
    assert found.peak_over_mean == pytest.approx(5 / 60 / 0.025)
    assert found.headroom == 0.1


def test_the_peak_of_a_trace_is_never_below_its_mean(tmp_path: Path) -> None:
    """Ten arrivals at once, ten more 60.1 s later: no minute holds more than 10, but 19 gaps / 60.1 s is more."""
    found = with_trace(Assumptions(), trace(tmp_path, [0.0] * 10 + [60.1] * 10))
    assert found.peak_rps == pytest.approx(19 / 60.1)
    assert found.requests_per_day is not None and found.requests_per_day == pytest.approx(19 / 60.1 * 86_400)


def test_a_trace_of_seconds_has_no_busiest_minute(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lasts 59\.9 s"):
        with_trace(Assumptions(), trace(tmp_path, [0, 59.9]))


@pytest.mark.parametrize("given", [{"requests_per_day": 9.0}, {"peak_rps": 9.0}])
def test_traffic_comes_from_one_source(tmp_path: Path, given: dict[str, float]) -> None:
    with pytest.raises(InputError, match="given as well"):
        with_trace(Assumptions(**given), trace(tmp_path, [0, 60, 120]))  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 100))
def test_the_busiest_window_is_found_by_counting(seconds: list[int], window_s: int) -> None:
    """Sliding second by second over whole seconds and counting finds the same maximum."""
    offsets = sorted(seconds)
    counted = max(sum(start <= at < start + window_s for at in offsets) for start in range(401))
    assert busiest([Arrival(float(offset)) for offset in offsets], window_s) == counted


def test_prices_are_looked_up_by_name_and_say_where_they_come_from(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(
        '[[rent]]\ncard = "x1"\nname = "Card X"\nmemory_gib = 16\nprovider = "P"\nkind = "on-demand"\n'
        'usd_per_hour = 0.31\nas_of = 2026-10-01\nsource = "https://example.org/x1"\n'
        '[[api]]\nid = "m"\nprovider = "Q"\nmodel = "M"\nusd_per_1m_input = 0.05\nusd_per_1m_output = 0.08\n'
        'as_of = 2026-10-02\nsource = "https://example.org/m"\n'
    )
    found = load_assumptions(toml(tmp_path, 'rent = "x1"\napi = "m"\n'), own)
    assert (found.usd_per_hour, found.api_usd_per_1m_input, found.api_usd_per_1m_output) == (0.31, 0.05, 0.08)
    assert found.api_name == "M of Q"
    assert found.sources == (
        "Card X for $0.31/h (P, on-demand, 2026-10-01), https://example.org/x1",
        "API for $0.05 in and $0.08 out for 1M tokens (M, Q, 2026-10-02), https://example.org/m",
    )
    assert load_assumptions(None, own, rent="x1", usd_per_hour=0.2).usd_per_hour == 0.2, "what is given goes before"
    assert load_assumptions(None, own, rent="x1", usd_per_hour=0.2).sources == (), "and is not said to be looked up"


def test_owned_by_name() -> None:
    found = load_assumptions(own="rtx-a4000", electricity=load_prices().tariffs[0].region)
    assert found.card_usd == load_prices().buy_of("rtx-a4000").usd and found.usd_per_kwh > 0 and len(found.sources) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [('rent = "abacus"', "abacus"), ('sources = ["me"]', "sources"), ('rent = "t4"\nown = "t4"', "one of the two")],
)
def test_names_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_assumptions(toml(tmp_path, text))
