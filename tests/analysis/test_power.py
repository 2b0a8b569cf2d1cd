"""Power, energy and heat by hand."""

from __future__ import annotations

import pytest

from harness.analysis.power import summarise_gpu
from harness.records import GpuSample

OPEN = 1_800_000_000_000_000_000
NOTHING = {
    "power_w": None,
    "energy_j_per_token": None,
    "sm_clock_mhz": None,
    "temperature_c_max": None,
    "throttled_share": None,
}


def ns(seconds: float) -> int:
    return OPEN + round(seconds * 1e9)


def card(watts: dict[float, float], joules: dict[float, float] | None = None, index: int = 0) -> list[GpuSample]:
    """Samples of a card; keys are seconds since the window opened."""
    times = sorted({*watts, *(joules or {})})
    return [
        GpuSample("c", ns(at), index, power_w=watts.get(at), energy_j=(joules or {}).get(at), throttle=("unknown",))
        for at in times
    ]


def figures(samples: list[GpuSample], seconds: float = 1.0, tokens: float | None = 50.0) -> tuple[object, object]:
    found = summarise_gpu(samples, OPEN, ns(seconds), tokens)
    return found["power_w"], found["energy_j_per_token"]


def test_mean_is_weighted_by_time() -> None:
    # 0.9 s at 100, 0.05 s from 100 to 300, 0.05 s at 300: 90 + 10 + 15 J in one second. The samples' own mean is 200.
    samples = card({0.0: 100.0, 0.9: 100.0, 0.95: 300.0, 1.0: 300.0})
    assert figures(samples) == (pytest.approx(115.0), pytest.approx(115 / 50))


def test_edges_are_cut_between_samples() -> None:
    # P = 100 + 100 t sampled beside the edges of the window: 150 W in the mean, whatever was before and after.
    samples = card({-9.0: 5000.0, -0.25: 75.0, 0.5: 150.0, 1.25: 225.0, 9.0: 5000.0})
    assert figures(samples) == (pytest.approx(150.0), pytest.approx(3.0))


def test_order_of_the_samples_does_not_matter() -> None:
    samples = card({0.0: 100.0, 0.9: 100.0, 0.95: 300.0, 1.0: 300.0})
    assert figures(samples[::-1]) == figures(samples)


def test_the_counter_counts_where_there_is_one() -> None:
    # Power at 10 Hz missed what the counter saw: 400 J/s. From -0.5 s to 2.5 s it grew by 1,200; in [0, 2) by 800.
    samples = card({-0.5: 300.0, 2.5: 300.0}, {-0.5: 7000.0, 2.5: 8200.0})
    assert figures(samples, seconds=2.0, tokens=100.0) == (pytest.approx(300.0), pytest.approx(8.0))


def test_a_counter_that_began_anew_is_left_aside() -> None:
    samples = card({0.0: 300.0, 0.5: 300.0, 1.0: 300.0}, {0.0: 7000.0, 0.5: 20.0, 1.0: 170.0})
    assert figures(samples) == (pytest.approx(300.0), pytest.approx(6.0))


def test_cards_add_up_with_and_without_a_counter() -> None:
    # Card 0: 200 W and by its counter 210 J; card 1: 50 W and no counter.
    samples = card({0.0: 200.0, 1.0: 200.0}, {0.0: 0.0, 1.0: 210.0}) + card({0.0: 50.0, 1.0: 50.0}, index=1)
    assert figures(samples) == (pytest.approx(250.0), pytest.approx(260 / 50))


def test_a_sum_with_a_missing_part_is_not_known() -> None:
    mute = [GpuSample("c", ns(at), 1, sm_clock_mhz=2000) for at in (0.0, 1.0)]
    samples = card({0.0: 200.0, 1.0: 200.0}) + mute
    assert figures(samples) == (None, None)
    counting = card({}, {0.0: 0.0, 1.0: 100.0}, index=1)
    assert figures(card({0.0: 200.0, 1.0: 200.0}) + counting) == (None, pytest.approx(6.0)), (
        "energy is known, power not"
    )


@pytest.mark.parametrize(("last", "watts"), [(0.94, None), (0.96, 100.0)])
def test_a_card_lost_within_the_window(last: float, watts: float | None) -> None:
    # 0.96 s at 100 W are 96 J, told as the 100 J of the whole second.
    samples = card({0.0: 100.0, last: 100.0}, {0.0: 0.0, last: 100.0 * last})
    expected = (None, None) if watts is None else (pytest.approx(watts), pytest.approx(watts / 50))
    assert figures(samples) == expected


def test_nothing_known_is_none() -> None:
    some = card({0.0: 100.0, 1.0: 100.0})
    assert summarise_gpu([], OPEN, ns(1), 50.0) == NOTHING
    assert summarise_gpu(some, None, None, 50.0) == NOTHING
    assert summarise_gpu(some, OPEN, OPEN, 50.0) == NOTHING
    assert summarise_gpu([GpuSample("c", ns(0.5), 0, throttle=("unknown",))], OPEN, ns(1), 50.0) == NOTHING
    assert summarise_gpu(card({0.5: 100.0}), OPEN, ns(1), 50.0) == NOTHING, "one reading is no stretch of time"
    for tokens in (None, 0.0):
        assert figures(some, tokens=tokens) == (pytest.approx(100.0), None)


def test_clocks_and_heat_of_the_window_only() -> None:
    samples = [
        GpuSample("c", ns(-0.1), 0, sm_clock_mhz=210, temperature_c=95),
        GpuSample("c", ns(0.0), 0, sm_clock_mhz=2500, temperature_c=60),
        GpuSample("c", ns(0.5), 0, sm_clock_mhz=2400, temperature_c=71),
        GpuSample("c", ns(0.9), 0, sm_clock_mhz=1000, temperature_c=70),
        GpuSample("c", ns(1.0), 0, sm_clock_mhz=210, temperature_c=96),
    ]
    found = summarise_gpu(samples, OPEN, ns(1), None)
    assert (found["sm_clock_mhz"], found["temperature_c_max"]) == (2400.0, 71.0)


@pytest.mark.parametrize(
    ("reasons", "share"),
    [
        ([(), (), (), ()], 0.0),
        ([("sw_power_cap",)] * 4, 0.0),  # full load at the power limit is what the card is sold as
        ([("sw_power_cap", "sw_thermal"), (), (), ()], 0.25),
        ([("hw_slowdown",), ("hw_thermal",), ("power_brake",), ("sw_thermal",)], 1.0),
        ([("unknown",), ("hw_slowdown",), (), ("unknown",)], 0.5),
        ([("unknown",)] * 4, None),
    ],
)
def test_share_of_the_throttled(reasons: list[tuple[str, ...]], share: float | None) -> None:
    inside = [GpuSample("c", ns(at / 4), 0, throttle=why) for at, why in enumerate(reasons)]
    outside = [GpuSample("c", ns(at), 0, throttle=("hw_slowdown",)) for at in (-1.0, 1.0)]
    assert summarise_gpu(inside + outside, OPEN, ns(1), None)["throttled_share"] == share


def test_the_worst_card_holds_the_others_back() -> None:
    cool = [GpuSample("c", ns(at / 4), 0) for at in range(4)]
    hot = [GpuSample("c", ns(at / 4), 1, throttle=("hw_thermal",) if at else ()) for at in range(4)]
    assert summarise_gpu(cool + hot, OPEN, ns(1), None)["throttled_share"] == 0.75
