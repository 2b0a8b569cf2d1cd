"""The knee: hand-computed crossings, honest intervals, causes, and the promise that never exceeds what was tested."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from harness.analysis.knee import find_knee, find_knees, rising, safe_load
from harness.records import Knee, SweepPoint
from harness.slo import Slo

SLO_S = 3.0
SLO = Slo(SLO_S)


def row(conc: int, p95_s: float | None, half_s: float = 0.0, **more: object) -> SweepPoint:
    """A level whose p95 is p95_s ± half_s."""
    values: dict[str, object] = {"verdict": "valid", **more}
    if p95_s is not None:
        values |= {"p95_ms": p95_s * 1e3, "p95_ms_lo": (p95_s - half_s) * 1e3, "p95_ms_hi": (p95_s + half_s) * 1e3}
    return SweepPoint("run", "awq", conc, **values)  # type: ignore[arg-type]


def knee(*rows: SweepPoint) -> Knee:
    return find_knee(rows, SLO)


def test_crossing_is_interpolated_on_log_axes() -> None:
    """8 users at 1.5 s, 32 at 6 s: slope ln 4 / ln 4 = 1, so p95 doubles to 3 s where the users double: 16."""
    found = knee(row(1, 0.5), row(8, 1.5), row(32, 6.0))
    assert found.cross == pytest.approx(16.0)
    assert (found.safe_conc, found.cross_lo, found.cross_hi, found.beyond_range) == (8, 8.0, 32.0, False)


def test_interval_grows_by_levels_in_doubt() -> None:
    """16 users at 2.9 ± 0.2 s may be outside and 32 at 3.1 ± 0.2 s may be inside: the knee is between 8 and 64."""
    found = knee(row(8, 1.0, 0.1), row(16, 2.9, 0.2), row(32, 3.1, 0.2), row(64, 6.0, 0.2))
    assert (found.safe_conc, found.cross_lo, found.cross_hi) == (8, 8.0, 64.0)
    assert found.cross is not None and 16 < found.cross < 32


def test_all_inside_is_no_knee_in_range() -> None:
    expected = Knee("awq", SLO.words, 32, None, 32.0, None, True, "none", tested_lo=1.0, tested_hi=32.0)
    assert knee(row(1, 0.5), row(32, 2.0)) == expected


def test_all_inside_but_the_last_in_doubt_promises_less() -> None:
    found = knee(row(8, 0.5), row(32, 2.9, 0.3))
    assert (found.safe_conc, found.beyond_range, found.cross_hi) == (8, True, None)


def test_none_inside() -> None:
    found = knee(row(1, 4.0), row(8, 9.0))
    assert (found.safe_conc, found.cross, found.cross_lo, found.cross_hi, found.beyond_range) == (None,) * 4 + (False,)


def test_smallest_level_in_doubt_promises_nothing() -> None:
    found = knee(row(1, 2.9, 0.2), row(8, 9.0))
    assert (found.safe_conc, found.cross_lo, found.cross_hi) == (None, 0.0, 8.0)


@pytest.mark.parametrize(("p95_s", "safe"), [(2.0, 1), (4.0, None)])
def test_single_point(p95_s: float, safe: int | None) -> None:
    found = knee(row(1, p95_s))
    assert (found.safe_conc, found.beyond_range) == (safe, safe is not None)


def test_outlier_ends_the_promise_and_widens_the_interval() -> None:
    """16 users were seen outside, 32 inside again: promise 8, and no more than that the knee lies below 64.

    The estimate takes the two together: √(3.5 · 2.5) = 2.958 s at both, so the SLO is passed between 32 and 64, at
    32 · 2^(ln(3 / 2.958) / ln(6 / 2.958)) = 32.44.
    """
    found = knee(row(8, 1.0), row(16, 3.5), row(32, 2.5), row(64, 6.0))
    assert (found.safe_conc, found.cross_lo, found.cross_hi) == (8, 8.0, 64.0)
    assert found.cross == pytest.approx(32.44, abs=0.01)


def test_a_level_that_one_with_more_users_contradicts_is_in_doubt() -> None:
    """16 users read 9 s, 32 only 5 ± 0.5: one of the two was disturbed. If it was 16, the knee may lie above it."""
    disturbed = knee(row(8, 1.0, 0.1), row(16, 9.0, 0.5), row(32, 5.0, 0.5), row(64, 12.0, 0.5))
    assert (disturbed.safe_conc, disturbed.cross_lo, disturbed.cross_hi) == (8, 8.0, 32.0)
    noisy = knee(row(8, 1.0, 0.1), row(16, 5.2, 0.5), row(32, 5.0, 0.5), row(64, 12.0, 0.5))
    assert (noisy.cross_lo, noisy.cross_hi) == (8.0, 16.0)


def test_an_open_loop_may_read_faster_at_a_higher_rate() -> None:
    """Beyond capacity p95 is as long as the window was, and windows are shorter at higher rates: no contradiction."""
    found = knee(rated(0.5, 1.0, 0.1), rated(1.0, 9.0, 0.5), rated(2.0, 5.0, 0.5))
    assert (found.cross_lo, found.cross_hi) == (0.5, 1.0)


def test_a_level_in_doubt_within_others_that_hold_is_no_knee() -> None:
    """√(3.1 · 2.4) = 2.73 s: nothing is outside. But at 16 it may be, so no more than 8 users are promised."""
    found = knee(row(8, 2.5, 0.3), row(16, 3.1, 0.4), row(32, 2.4, 0.3))
    assert (found.beyond_range, found.cross, found.safe_conc, found.cross_hi) == (True, None, 8, None)


def test_bootstrap_interval_by_hand() -> None:
    """One level in doubt, 16 users at 3 s · e^±0.2, between 8 at 1.5 and 32 at 6 s, which are exact.

    p95 doubles with the users, so the crossing is 16. A draw of 16 that is slower by e^d makes the line from 8 steeper:
    ln N = ln 8 + ln 2 / (ln 2 + d) · ln 2, at d = 0.2: 8 · 2^(0.693 / 0.893) = 13.70. One that is faster by as much is
    passed on the line to 32: 16 · 2^(0.2 / (ln 2 + 0.2)) = 18.68.
    """
    at_16 = {"p95_ms": 3000.0, "p95_ms_lo": 3000 * math.exp(-0.2), "p95_ms_hi": 3000 * math.exp(0.2)}
    found = knee(row(8, 1.5), replace(row(16, 3.0), **at_16), row(32, 6.0))
    assert found.cross == pytest.approx(16.0)
    assert (found.cross_lo, found.cross_hi) == (8.0, 32.0)
    assert found.boot_lo == pytest.approx(13.70, abs=0.12) and found.boot_hi == pytest.approx(18.68, abs=0.12)


def test_outside_at_the_smallest_level_already() -> None:
    """1 user at 8.9 s and 2 at 1 s are √8.9 = 2.98 s together, inside. With 9.1 s they are outside from the smallest
    on: the crossing is put there, and its interval begins at 0."""
    found = knee(row(1, 8.9), row(2, 1.0), row(4, 4.0))
    assert found.cross is not None and 2 < found.cross < 2.1
    found = knee(row(1, 9.1), row(2, 1.0), row(4, 4.0))
    assert (found.cross, found.cross_lo, found.cross_hi) == (1.0, 0.0, 4.0)
    assert (found.boot_lo, found.boot_hi, found.safe_conc) == (0.0, 1.0, None)


def test_no_bootstrap_without_intervals() -> None:
    bare = [replace(row(conc, p95_s), p95_ms_lo=None, p95_ms_hi=None) for conc, p95_s in ((8, 1.0), (32, 6.0))]
    found = knee(*bare)
    assert (found.cross_lo, found.cross_hi, found.boot_lo, found.boot_hi) == (8.0, 32.0, None, None)


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-50, 50)))
def test_rising_figures_are_scipys_isotonic_regression(figures: NDArray[np.float64]) -> None:
    expected = [isotonic_regression(figure).x for figure in figures]
    np.testing.assert_allclose(rising(figures), expected, atol=1e-9)


def test_invalid_points_are_left_out() -> None:
    """Without the invalid 16 the bracket is 8..32."""
    found = knee(row(8, 1.0), row(16, 99.0, verdict="invalid"), row(32, 6.0))
    assert (found.cross_lo, found.cross_hi) == (8.0, 32.0)


def test_point_without_p95_is_left_out() -> None:
    assert knee(row(8, 1.0), row(16, None)).safe_conc == 8


def test_nothing_usable() -> None:
    assert knee(row(8, None, verdict="invalid")) == Knee("awq", SLO.words)


@pytest.mark.parametrize(
    ("counters", "cause"),
    [
        ({"preemptions": 2, "waiting_peak": 3, "running_peak": 8}, "kv_cache"),
        ({"preemptions": 0, "kv_usage_peak": 0.95, "waiting_peak": 0, "running_peak": 32}, "kv_cache"),
        ({"preemptions": 0, "kv_usage_peak": 0.5, "waiting_peak": 24, "running_peak": 8}, "max_num_seqs"),
        ({"preemptions": 0, "kv_usage_peak": 0.5, "waiting_peak": 1, "running_peak": 31}, "compute"),
        ({"preemptions": 0, "kv_usage_peak": 0.5, "waiting_peak": 0, "running_peak": 32}, "compute"),
        ({"verdict": "suspect", "verdict_reasons": ("client_bound",)}, "client"),
        ({}, "unknown"),
    ],
)
def test_cause(counters: dict[str, object], cause: str) -> None:
    assert knee(row(8, 1.0, running_peak=8, waiting_peak=0), row(32, 6.0, **counters)).cause == cause


def test_range_that_the_client_ended() -> None:
    beyond = row(64, 5.0, verdict="invalid", verdict_reasons=("client_bound",))
    assert knee(row(32, 2.0), beyond).cause == "client"


def rated(rate: float, p95_s: float, half_s: float = 0.0, **more: object) -> SweepPoint:
    return row(0, p95_s, half_s, arrivals="poisson", rate_rps=rate, **more)


def test_open_loop_is_read_over_its_rates() -> None:
    """0.5 req/s at 1.5 s, 2 req/s at 6 s: the same slope of 1 as with users, so the crossing is at 1 req/s."""
    found = knee(rated(0.25, 0.5), rated(2.0, 6.0), rated(0.5, 1.5))
    assert found.cross == pytest.approx(1.0)
    assert (found.safe_conc, found.cross_lo, found.cross_hi, safe_load(found)) == (None, 0.5, 2.0, 0.5)


def test_safe_load_of_users_and_of_nothing() -> None:
    assert safe_load(knee(row(8, 1.0), row(32, 6.0))) == 8
    assert safe_load(knee(rated(0.5, 2.9, 0.2), rated(1.0, 9.0))) is None
    assert safe_load(knee(rated(0.5, 9.0))) is None


@pytest.mark.parametrize(
    ("counters", "cause"),
    [
        ({"preemptions": 2, "waiting_peak": 3, "running_peak": 64}, "kv_cache"),
        ({"preemptions": 0, "waiting_peak": 24, "running_peak": 64}, "max_num_seqs"),  # as many as at the rate above
        ({"preemptions": 0, "waiting_peak": 24, "running_peak": 8}, "compute"),  # a coincidence with the rate below
        ({"preemptions": 0, "waiting_peak": 0, "running_peak": 64}, "compute"),
    ],
)
def test_cause_in_an_open_loop(counters: dict[str, object], cause: str) -> None:
    found = knee(rated(1, 1.0, running_peak=8), rated(2, 6.0, **counters), rated(4, 9.0, running_peak=64))
    assert found.cause == cause


def test_one_trace_has_no_knee_and_two_speeds_have_one() -> None:
    trace = [row(0, 1.0, arrivals="trace", rate_rps=rate) for rate in (2.5, 5.0)]
    assert find_knees(trace[:1], SLO) == []
    assert [safe_load(found) for found in find_knees(trace, SLO)] == [5.0]


def test_two_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="one precision"):
        find_knee([SweepPoint("r", "awq", 1), SweepPoint("r", "bf16", 1)], SLO)


rows = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
        st.floats(0.01, 30),
        st.floats(0, 0.9),
        st.sampled_from(["valid", "invalid"]),
    ),
    min_size=1,
    max_size=7,
    unique_by=lambda entry: entry[0],
)


@settings(deadline=None)
@given(rows)
def test_promise_was_tested_and_every_level_up_to_it_is_surely_inside(
    entries: list[tuple[int, float, float, str]],
) -> None:
    points = [row(conc, p95, p95 * share, verdict=verdict) for conc, p95, share, verdict in entries]
    found = find_knee(points, SLO)
    usable = [point for point in points if point.verdict == "valid"]
    if found.safe_conc is not None:
        assert found.safe_conc in {point.conc for point in usable}
        assert all((point.p95_ms_hi or 0) <= SLO_S * 1e3 for point in usable if point.conc <= found.safe_conc)
    if found.cross_lo is not None:
        low = found.cross_lo if found.boot_lo is None else found.boot_lo
        high = float("inf") if found.boot_hi is None else found.boot_hi
        assert found.cross_lo * (1 - 1e-9) <= low <= high and min(high, 64) <= (found.cross_hi or 64)
    if found.cross is not None and found.cross_lo is not None:
        assert found.cross_lo - 1e-9 <= found.cross <= (found.cross_hi or float("inf")) + 1e-9
    assert (found.cross is None) == (found.beyond_range or found.cross_lo is None)
    assert found == find_knee(list(reversed(points)), SLO)


@settings(deadline=None)
@given(rows, st.floats(0.1, 10))
def test_faster_server_promises_no_less(entries: list[tuple[int, float, float, str]], factor: float) -> None:
    def safe(scale: float) -> int:
        points = [row(conc, p95 * scale, p95 * scale * share) for conc, p95, share, _ in entries]
        return find_knee(points, SLO).safe_conc or 0

    assert safe(min(factor, 1.0)) >= safe(1.0) >= safe(max(factor, 1.0))
