"""Power, energy, clocks and heat of a cell, from the samples of its cards. Pure functions.

    P(t) ─┬──┬──┬──┬──┬──┬──┬─        samples, ten a second: before, in and after the window
             ^ opens      ^ closes

    power_w = Σ over cards of ∫ P dt over the window (trapezoidal rule) / its length
    energy_j_per_token = Σ over cards of E / output tokens that arrived in the window
        E = energy counter at the close - at the open (interpolated); ∫ P dt where a card has no counter

A sum over cards is known only where every card's part is: a missing one would pass for a saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.records import GpuSample

Floats = NDArray[np.float64]

SLOWED = frozenset({"hw_slowdown", "sw_thermal", "hw_thermal", "power_brake"})
"""Reasons for which a cooler or a power supply is to blame. sw_power_cap is not among them: to work at the power limit
is a card's normal state under full load, and what it does there is what its owner gets."""
UNKNOWN = "unknown"
"""What telemetry/sampler.py writes where a card tells no reasons at all."""
THROTTLED_SHARE = 0.05
"""A larger share and the point is suspect. By NVML's documentation a hardware slowdown at least halves the clocks, so
this much of it may take 2.5 % of the speed and more; and it may be reported in passing while clocks change, which must
not count."""
COVERED_SHARE = 0.95
"""Where a card's samples span less of the window it was lost on the way, and nothing is said of its power: the part
that is known need not be like the rest. What little is missing at an edge is taken to be like the rest."""


def summarise_gpu(
    samples: Sequence[GpuSample], open_ns: int | None, close_ns: int | None, output_tokens: float | None
) -> dict[str, Any]:
    """The GPU fields of a SweepPoint, by name; None for each that is not known.

    `output_tokens`: those that arrived in the window. Clocks: the median; temperature: the maximum, over all cards.
    throttled_share: of the samples in the window those with a reason in SLOWED; of several cards the worst one's,
    because the others wait for it.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("power_w", "energy_j_per_token", "sm_clock_mhz", "temperature_c_max", "throttled_share")
    )
    if open_ns is None or close_ns is None or close_ns <= open_ns:
        return found
    cards = _by_card(samples)
    drawn_j = [_drawn_j(card, open_ns, close_ns) for card in cards]
    counted_j = [_counted_j(card, open_ns, close_ns) for card in cards]
    power_j = _total(drawn_j)
    energy_j = _total(
        [drawn if counted is None else counted for drawn, counted in zip(drawn_j, counted_j, strict=True)]
    )
    inside = [sample for sample in samples if open_ns <= sample.time_ns < close_ns]
    clocks = [sample.sm_clock_mhz for sample in inside if sample.sm_clock_mhz is not None]
    heats = [float(sample.temperature_c) for sample in inside if sample.temperature_c is not None]
    shares = [share for card in _by_card(inside) if (share := _throttled_share(card)) is not None]
    found["power_w"] = None if power_j is None else power_j / ((close_ns - open_ns) / 1e9)
    found["energy_j_per_token"] = energy_j / output_tokens if energy_j is not None and output_tokens else None
    found["sm_clock_mhz"] = float(np.median(clocks)) if clocks else None
    found["temperature_c_max"] = max(heats, default=None)
    found["throttled_share"] = max(shares, default=None)
    return found


def _by_card(samples: Sequence[GpuSample]) -> list[list[GpuSample]]:
    """Each card's samples, in the order of time."""
    cards: dict[int, list[GpuSample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.time_ns):
        cards.setdefault(sample.index, []).append(sample)
    return list(cards.values())


def _drawn_j(card: Sequence[GpuSample], open_ns: int, close_ns: int) -> float | None:
    """∫ P dt over the window; P runs straight from sample to sample."""
    times = _seconds([sample for sample in card if sample.power_w is not None], open_ns)
    watts = np.array([sample.power_w for sample in card if sample.power_w is not None], dtype=np.float64)
    window_s = (close_ns - open_ns) / 1e9
    part = _covered(times, window_s)
    if part is None:
        return None
    grid = np.concatenate([[part[0]], times[(times > part[0]) & (times < part[1])], [part[1]]])
    heights = np.interp(grid, times, watts)
    drawn = float(np.sum((heights[1:] + heights[:-1]) / 2 * np.diff(grid)))
    return drawn * window_s / (part[1] - part[0])


def _counted_j(card: Sequence[GpuSample], open_ns: int, close_ns: int) -> float | None:
    """Growth of the card's energy counter over the window; None without one, and where it began anew."""
    times = _seconds([sample for sample in card if sample.energy_j is not None], open_ns)
    joules = np.array([sample.energy_j for sample in card if sample.energy_j is not None], dtype=np.float64)
    window_s = (close_ns - open_ns) / 1e9
    part = _covered(times, window_s)
    if part is None or np.any(np.diff(joules) < 0):
        return None
    at_open, at_close = np.interp(part, times, joules)
    return float(at_close - at_open) * window_s / (part[1] - part[0])


def _seconds(card: Sequence[GpuSample], open_ns: int) -> Floats:
    """Times since the window opened; integers until then, because a float of 10**18 ns is no nanosecond exact."""
    return np.array([(sample.time_ns - open_ns) / 1e9 for sample in card], dtype=np.float64)


def _covered(times: Floats, window_s: float) -> tuple[float, float] | None:
    """The part of the window that lies between the first and the last sample; None if that is too little of it."""
    if not len(times):
        return None
    begin, end = max(0.0, float(times[0])), min(window_s, float(times[-1]))
    return (begin, end) if end - begin >= COVERED_SHARE * window_s else None


def _total(parts: Sequence[float | None]) -> float | None:
    """The sum; None if there is nothing to add or a part is missing."""
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _throttled_share(card: Sequence[GpuSample]) -> float | None:
    told = [sample for sample in card if UNKNOWN not in sample.throttle]
    return sum(not SLOWED.isdisjoint(sample.throttle) for sample in told) / len(told) if told else None
