"""Saturation of throughput: exact curves, published data, the shapes that have none, and how it stands to the knee."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from harness.analysis.usl import (
    Usl,
    agreement,
    find_saturation,
    find_saturations,
    fit_usl,
    kneedle,
    saturation_views,
    shape,
)
from harness.records import Agreement, Knee, Saturation, SweepPoint

GRID = (1, 2, 4, 8, 16, 32, 64)
KNEE = Knee("awq", "p95 ≤ 3 s", 16, 20.0, 16.0, 32.0, tested_lo=1.0, tested_hi=64.0)


def row(conc: int, tok_s: float | None, half: float = 0.0, **more: object) -> SweepPoint:
    """A level of tok_s ± half, as a share of it."""
    values: dict[str, object] = {"verdict": "valid", **more}
    if tok_s is not None:
        values |= {"tok_s": tok_s, "tok_s_lo": tok_s * (1 - half), "tok_s_hi": tok_s * (1 + half)}
    return SweepPoint("run", "awq", conc, **values)  # type: ignore[arg-type]


def law(rate: float, contention: float, coherency: float, grid: tuple[int, ...] = GRID) -> list[float]:
    return [rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1)) for n in grid]


def rows(tok_s: list[float], half: float = 0.01, grid: tuple[int, ...] = GRID) -> list[SweepPoint]:
    return [row(conc, figure, half) for conc, figure in zip(grid, tok_s, strict=True)]


def test_law_by_hand() -> None:
    """λ = 10, σ = 0.1, κ = 0.01: X(5) = 50 / (1 + 0.4 + 0.2) = 31.25. Peak √(0.9 / 0.01) = 9.487, where
    X = 94.87 / (1 + 0.8487 + 0.8051) = 35.75, so a lone user's line of 10 meets it at 3.575. Without κ the most is
    λ/σ = 100, and it is met at 1/σ = 10 users."""
    found = Usl(10.0, 0.1, 0.01, 0.0)
    assert float(found.throughput(np.array(5.0))) == pytest.approx(31.25)
    assert (found.peak, found.saturation) == (pytest.approx(9.487, abs=1e-3), pytest.approx(3.575, abs=1e-3))
    assert (Usl(10.0, 0.1, 0.0, 0.0).peak, Usl(10.0, 0.1, 0.0, 0.0).saturation) == (math.inf, pytest.approx(10.0))
    assert Usl(10.0, 0.0, 0.0, 0.0).saturation == math.inf
    assert Usl(10.0, 1.5, 0.01, 0.0).peak == 1.0


@settings(deadline=None, max_examples=50)
@given(st.floats(1, 1e4), st.floats(0, 0.9), st.floats(0, 0.05))
def test_its_own_curves_are_found_again(rate: float, contention: float, coherency: float) -> None:
    users = np.array(GRID, dtype=float)
    found = fit_usl(users, np.array(law(rate, contention, coherency)))
    assert found is not None and found.misfit < 1e-6
    assert (found.rate, found.contention, found.coherency) == (
        pytest.approx(rate, rel=1e-4), pytest.approx(contention, abs=1e-4), pytest.approx(coherency, abs=1e-5),
    )  # fmt: skip


SPECSDM91 = {1: 64.9, 18: 995.9, 36: 1652.4, 72: 1853.2, 108: 1828.9, 144: 1775.0, 216: 1702.2}
"""Gunther's example, a SPARCcenter 2000 under SPEC SDM91 (load: scripts/hour); data set of the R package usl."""


def test_published_data() -> None:
    """The R package usl fits absolute residuals: σ = 0.0277, κ = 0.000104, and a peak at 96.5. By relative ones, in
    which the lone user's figure counts as much as the fastest, the peak is within 5 % of that."""
    users, tok_s = np.array(list(SPECSDM91), dtype=float), np.array(list(SPECSDM91.values()))
    found = fit_usl(users, tok_s)
    assert found is not None
    assert found.peak == pytest.approx(96.5, rel=0.05)


def test_no_other_parameters_fit_better() -> None:
    """An oracle that starts elsewhere: scipy's bounded least squares, on the same relative residuals of N/X."""
    users, tok_s = np.array(list(SPECSDM91), dtype=float), np.array(list(SPECSDM91.values()))
    found = fit_usl(users, tok_s)
    assert found is not None

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.asarray(tok_s / Usl(*p, 0.0).throughput(users) - 1)

    theirs = least_squares(
        residuals, (100.0, 0.05, 1e-3), bounds=(0, np.inf), x_scale=(1, 1e-2, 1e-4), xtol=1e-15, ftol=1e-15
    )
    ours = np.array([found.rate, found.contention, found.coherency])
    np.testing.assert_allclose(ours, theirs.x, rtol=1e-3)


def test_all_views_of_a_curve_that_falls() -> None:
    """λ = 10, σ = 0.05, κ = 0.002: peak √(0.95 / 0.002) = 21.79 users, where X = 217.9 / (1 + 1.040 + 0.906) = 73.98:
    a lone user's 10 meet it at 7.398."""
    found = find_saturation(rows(law(10, 0.05, 0.002)), KNEE)
    assert (found.levels, found.shape, found.usl_misfit) == (7, "bends", pytest.approx(0, abs=1e-6))
    assert found.usl_peak == pytest.approx(21.79, abs=0.01)
    assert found.usl_saturation == pytest.approx(7.398, abs=0.001)
    assert found.kneedle == 16
    for name in ("usl_peak", "usl_saturation", "bound"):
        low, value, high = (getattr(found, f"{name}{end}") for end in ("_lo", "", "_hi"))
        assert low < value < high < 1.2 * low, name


def test_intervals_grow_with_those_of_the_levels() -> None:
    narrow, wide = (find_saturation(rows(law(10, 0.05, 0.002), half), KNEE) for half in (0.01, 0.05))
    for name in ("usl_peak", "usl_saturation", "bound"):
        widths = [math.log(getattr(found, f"{name}_hi") / getattr(found, f"{name}_lo")) for found in (narrow, wide)]
        assert widths[1] == pytest.approx(5 * widths[0], rel=0.35), name


def test_residuals_widen_what_the_intervals_do_not_know() -> None:
    """The same figures ± 20 % from level to level, with intervals of ± 1 %."""
    off = [figure * (1.2 if at % 2 else 1 / 1.2) for at, figure in enumerate(law(10, 0.05, 0.002))]
    smooth, rough = (find_saturation(rows(figures), KNEE) for figures in (law(10, 0.05, 0.002), off))
    assert smooth.usl_saturation_lo and smooth.usl_saturation_hi and rough.usl_saturation_lo and rough.usl_saturation_hi
    assert rough.usl_saturation_hi / rough.usl_saturation_lo > 1.5 > smooth.usl_saturation_hi / smooth.usl_saturation_lo


def test_bound_by_hand() -> None:
    """X(2) = 40, X_max = 120: N* = 2 · 120 / 40 = 6. In logs the slow level may be 0.05 less and 0.1 more, the fast one
    0.2 less and 0.15 more: the lower end √(0.2² + 0.1²) below, the upper √(0.15² + 0.05²) above."""
    ends = {2: (40.0, -0.05, 0.1), 8: (120.0, -0.2, 0.15), 16: (110.0, -0.1, 0.1)}
    levels = [
        replace(row(conc, tok_s), tok_s_lo=tok_s * math.exp(down), tok_s_hi=tok_s * math.exp(up))
        for conc, (tok_s, down, up) in ends.items()
    ]
    found = find_saturation(levels, KNEE)
    assert (found.bound, found.bound_from) == (pytest.approx(6.0), 2.0)
    assert found.bound_lo == pytest.approx(6 * math.exp(-math.hypot(0.2, 0.1)))
    assert found.bound_hi == pytest.approx(6 * math.exp(math.hypot(0.15, 0.05)))
    assert (found.levels, found.kneedle, found.usl_rate) == (3, None, None)


def test_kneedle_on_its_authors_example() -> None:
    """−1/x + 5 for x in 0..1 (Satopää et al., figure 2): the knee is at 0.22."""
    x = np.linspace(0, 1, 10)
    assert kneedle(x, -1 / (x + 0.1) + 5) == pytest.approx(0.22, abs=0.01)


def test_six_levels_make_a_curve() -> None:
    figures = law(10, 0.05, 0.002)
    six, five = (find_saturation(rows(figures[:n], grid=GRID[:n]), KNEE) for n in (6, 5))
    assert six.kneedle is not None and saturation_views(six) == [six.kneedle, six.usl_saturation]
    assert (five.usl_rate, five.usl_saturation, five.kneedle, five.levels) == (None, None, None, 5)
    assert five.bound is not None and saturation_views(five) == [five.bound]


@pytest.mark.parametrize(
    ("figures", "half", "expected"),
    [
        ([100.0] * 7, 0.01, "flat"),
        ([100.0, 120.0, 140.0, 149.0, 149.0, 149.0, 149.0], 0.0, "flat"),
        ([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0], 0.3, "flat"),
        ([10.0 * n for n in GRID], 0.05, "straight"),
        ([10.0 * n**0.96 for n in GRID], 0.05, "straight"),
        (law(10, 0.05, 0.0), 0.05, "bends"),
        ([10.0 * n for n in GRID[:-1]] + [500.0], 0.01, "bends"),
        ([10.0 * n for n in GRID[:-1]] + [500.0], 0.05, "straight"),
    ],
)
def test_shapes(figures: list[float], half: float, expected: str) -> None:
    """A straight line gives 640 at 64 users: 500 ± 1 % is surely less than 0.8 of that, 512, and ± 5 % is not."""
    found = find_saturation(rows(figures, half), KNEE)
    assert found.shape == expected
    if expected != "bends":
        assert (found.kneedle, found.usl_peak, found.usl_saturation, found.agreement) == (None,) * 4


def test_lines_without_a_knee_have_none() -> None:
    """Flat and straight, levels off by 5 % more than their intervals say: at most 3 % of 300 have a knee or a peak."""
    rng = np.random.default_rng(1)
    for line in (lambda n: 100.0 + 0 * n, lambda n: 5.0 * n):
        seen = 0
        for _ in range(150):
            figures = line(np.array(GRID, dtype=float)) * np.exp(rng.normal(0, 0.054, len(GRID)))
            found = find_saturation(rows(list(figures), 0.04), KNEE)
            seen += found.kneedle is not None or found.usl_peak is not None
        assert seen <= 0.03 * 150


def test_a_throughput_that_levels_off_has_no_peak_in_range() -> None:
    """Eight servers: straight up to 8 users, then flat. The law's curve falls beyond its peak, the data does not."""
    grid = (*GRID, 48)
    figures = [10.0 * min(n, 8) for n in sorted(grid)]
    found = find_saturation(rows(figures, 0.02, tuple(sorted(grid))), KNEE)
    fit = fit_usl(np.array(sorted(grid), dtype=float), np.array(figures))
    assert fit is not None and fit.peak < 64
    assert found.usl_peak is None and found.usl_saturation == pytest.approx(8, rel=0.35)


def test_a_peak_far_beyond_is_no_prediction() -> None:
    """κ = 1e-6: √(0.99 / 1e-6) = 995 users, more than 4 · 64."""
    assert find_saturation(rows(law(10, 0.01, 1e-6)), KNEE).usl_peak is None
    near = find_saturation(rows(law(10, 0.01, 1e-4)), KNEE)
    assert near.usl_peak == pytest.approx(math.sqrt(0.99 / 1e-4), rel=1e-3)


@pytest.mark.parametrize(
    ("kneedle_at", "law_at", "expected"),
    [
        (16.0, 20.0, "agree"),
        (11.0, 47.0, "agree"),
        (64.0, 49.0, "latency"),
        (8.0, 10.0, "throughput"),
        (8.0, 20.0, "mixed"),
        (None, 20.0, "agree"),
        (None, None, None),
    ],
)
def test_agreement(kneedle_at: float | None, law_at: float | None, expected: Agreement | None) -> None:
    """The crossing's interval is 16..32, widened to 10.7..48."""
    found = Saturation("awq", 7, "bends", kneedle=kneedle_at, usl_saturation=law_at, usl_misfit=0.02)
    assert agreement(found, KNEE) == expected


def test_agreement_at_the_edges() -> None:
    at_20 = Saturation("awq", 7, "bends", kneedle=20.0)
    assert agreement(at_20, replace(KNEE, cross_lo=64.0, cross_hi=None, cross=None)) == "throughput"
    assert agreement(at_20, replace(KNEE, cross_lo=16.0, cross_hi=None)) == "agree"
    assert agreement(at_20, replace(KNEE, cross_lo=None, cross_hi=None, tested_lo=1.0)) == "latency"
    assert agreement(at_20, replace(KNEE, tested_lo=None)) is None
    assert agreement(replace(at_20, shape="straight"), KNEE) is None


def test_a_law_that_does_not_fit_does_not_count() -> None:
    found = Saturation("awq", 7, "bends", kneedle=20.0, usl_saturation=300.0, usl_misfit=0.11)
    assert saturation_views(found) == [20.0]
    assert saturation_views(replace(found, usl_misfit=0.1)) == [20.0, 300.0]


def test_which_rows_count() -> None:
    """An invalid level and one without a figure are left out; each precision is looked at alone."""
    points = [
        *rows(law(10, 0.05, 0.002)),
        row(96, 9999.0, verdict="invalid"),
        row(128, None),
        *(replace(point, precision="bf16") for point in rows(law(20, 0.0, 0.0))),
    ]
    awq, bf16 = KNEE, replace(KNEE, precision="bf16")
    found = find_saturations(points, [awq, bf16])
    assert [(one.precision, one.levels, one.shape) for one in found] == [("bf16", 7, "straight"), ("awq", 7, "bends")]


def test_open_loops_and_single_levels_have_none() -> None:
    rates = [
        replace(point, conc=0, arrivals="poisson", rate_rps=float(point.conc)) for point in rows(law(10, 0.05, 0.0))
    ]
    assert find_saturations(rates, [KNEE]) == []
    alone = find_saturation([row(4, 100.0)], KNEE)
    assert (alone.levels, alone.shape, alone.bound, alone.agreement) == (1, None, None, None)


def test_no_fit_where_there_is_no_throughput_of_a_lone_user() -> None:
    assert fit_usl(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert fit_usl(np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 4.0])) is None
    users = np.array([2.0, 4.0, 8.0])
    assert fit_usl(users, users / np.array([0.1, 1.0, 10.0])) is None  # N/X as N³: all of it crosstalk


def test_shape_reads_the_ends_of_the_intervals() -> None:
    users = np.array([1.0, 8.0])
    figures = np.array([[10.0, 9.0, 11.0], [16.0, 15.0, 17.0]])
    assert shape(users, figures) == "bends"
    figures[1, 1] = 14.9
    assert shape(users, figures) == "flat"
    assert shape(users, np.array([[10.0, 5.0, 20.0], [30.0, 19.0, 44.0]])) == "flat"
