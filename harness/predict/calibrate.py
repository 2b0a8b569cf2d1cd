"""A few measured points of one's own card, and the rest of its cells predicted with a narrower band.

    run ─► Subject ─► chosen levels ─► fit ─► Estimate (factors, covariance) ─► bands of every other cell
                                                        └─► points.py: which point next

Fitted are the logs θ of three physical factors, five on a processor (profile.FACTORS), against what is known of all
cards. Residuals are logs of measured / predicted, of four figures a cell:

    minimise  Σ cells rᵀ V⁻¹ r + Σ θ²/σ²        r = ln measured − f(θ)        V of a cell: SPREAD, SHARED, the row's own

The figures of a cell are not independent: a machine that is slow for a minute is slow in all of them. So V has a part
that the figures of a cell share, and twelve figures of three cells do not count as twelve. How far figures really lie
from f is estimated from the fit, beside what is usual (`DEGREES`), and so the band of another cell is

    ln y = f(θ) ± t(0.975, ν) · √(J Σ Jᵀ + s² SPREAD²)        Σ = (Jᵀ V⁻¹ J / s² + 1/σ²)⁻¹        s² = (ν₀ + χ²) / ν

with ν = ν₀ + figures − what the factors took of them (the trace of the hat matrix), and J by central differences wide
enough that single requests, which move a percentile by jumps, do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import least_squares
from scipy.stats import t as student_t

from harness.analysis.levels import load
from harness.errors import InputError
from harness.predict.profile import QUANTITIES, Estimate, Fitted, Floats, Profile
from harness.predict.subject import MAX_POINTS, MIN_POINTS, Server, Subject, cell_of
from harness.records import Cell, SweepPoint

Where = NDArray[np.integer[Any]]
Model = Callable[[Floats, Cell], Floats]
"""(θ, cell) -> logs of QUANTITIES; NaN where the cell has no such figure."""

SPREAD = np.array([0.07, 0.10, 0.12, 0.08])
"""What is usual between a figure and f: standard deviations of its log, QUANTITIES in order. From 84 cells of six runs
of vLLM on two processors, each run fitted by factors of its own; the noise between runs is part of it."""
SHARED = np.array([-0.95, 0.85, 0.35, 0.95])
"""How much of it a cell's figures have in common, of the same cells: their correlations are the products, -0.81 between
tok/s and p95, 0.33 between the two times per token and to the first token."""
DEGREES = 20.0
"""ν₀: what is known of the spread beforehand weighs as much as so many figures. Three cells of one afternoon tell
little of it: with 4, bands held 89 % of the tok/s of the demo run's other cells; with 20 they hold 94 %."""
STEP = 0.05
"""Of a central difference, in logs."""
_Z = 1.96


# --- the fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured cell: logs of QUANTITIES, NaN where missing, and the variances of those logs that its row tells."""

    cell: Cell
    logs: Floats
    own_variance: Floats

    @property
    def covariance(self) -> Floats:
        """V of this cell, at scale 1: what figures share, what each has alone, and the row's own noise."""
        return spread() + np.diag(self.own_variance)


def spread() -> Floats:
    """V of a cell whose rows are without noise: D (l lᵀ + diag(1 − l²)) D, D = SPREAD and l = SHARED."""
    shared = SPREAD * SHARED
    return np.outer(shared, shared) + np.diag(SPREAD**2 - shared**2)


def observed(level: SweepPoint) -> Observation:
    """A row's figures; the ends of an interval of 95 % lie 1.96 standard deviations from its middle."""
    values = [getattr(level, name) for name in QUANTITIES]
    own = [_own_variance(level, name) for name in QUANTITIES]
    return Observation(cell_of(level), np.log([value or np.nan for value in values]), np.array(own))


def _own_variance(level: SweepPoint, name: str) -> float:
    low, high = (getattr(level, f"{name}_{end}", None) for end in ("lo", "hi"))
    return float(np.log(high / low) / (2 * _Z)) ** 2 if low and high else 0.0


def fit(model: Model, observations: Sequence[Observation], prior: Mapping[str, float]) -> Estimate:
    """Factors from observations: the module's formulas. prior: σ of each log, by name."""
    sigmas = np.array(list(prior.values()))
    whiteners = [_whitener(item) for item in observations]

    def residuals(logs: Floats) -> Floats:
        left = [
            _whitened(white, item.logs - model(logs, item.cell))
            for white, item in zip(whiteners, observations, strict=True)
        ]
        return np.concatenate([*left, logs / sigmas])

    def slopes(logs: Floats) -> Floats:
        left = [
            -_whitened(white, jacobian(model, logs, item.cell))
            for white, item in zip(whiteners, observations, strict=True)
        ]
        return np.vstack([*left, np.diag(1 / sigmas)])

    found = least_squares(residuals, np.zeros(len(sigmas)), slopes, xtol=1e-3, ftol=1e-4, max_nfev=20)
    count = sum(len(rows) for _, rows in whiteners)
    chi2, told = float(found.fun[:count] @ found.fun[:count]), found.jac[:count].T @ found.jac[:count]
    taken = float(np.trace(np.linalg.solve(told + np.diag(sigmas**-2), told)))
    degrees = DEGREES + count - taken
    scale2 = (DEGREES + chi2) / degrees
    covariance = np.linalg.inv(told / scale2 + np.diag(sigmas**-2))
    return Estimate(
        names=tuple(prior),
        logs=tuple(found.x.tolist()),
        covariance=tuple(map(tuple, covariance.tolist())),
        scale=float(np.sqrt(scale2)),
        degrees=degrees,
    )


def jacobian(model: Model, logs: Floats, cell: Cell) -> Floats:
    """∂f/∂θ of a cell, a row a quantity; 0 where one has no figure."""
    columns = []
    for at in range(len(logs)):
        step = np.zeros(len(logs))
        step[at] = STEP
        columns.append((model(logs + step, cell) - model(logs - step, cell)) / (2 * STEP))
    return np.nan_to_num(np.column_stack(columns))


def _whitener(item: Observation) -> tuple[Floats, Where]:
    """(L, which figures there are): L Lᵀ is their covariance."""
    there = np.flatnonzero(np.isfinite(item.logs))
    return np.linalg.cholesky(item.covariance[np.ix_(there, there)]), there


def _whitened(white: tuple[Floats, Where], values: Floats) -> Floats:
    """L⁻¹ values. A figure that was measured, but is predicted to have too few requests, tells nothing."""
    factor, there = white
    return np.asarray(solve_triangular(factor, np.nan_to_num(values[there]), lower=True))


# --- what follows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """A predicted figure with its 95 % band, and what was measured, where it was."""

    value: float
    lo: float
    hi: float
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """|predicted / measured − 1|."""
        return None if self.measured is None else abs(self.value / self.measured - 1)


@dataclass(frozen=True, slots=True)
class Predicted:
    """A cell, predicted by a calibrated card; figures by QUANTITIES, those it has."""

    cell: Cell
    figures: Mapping[str, Figure]


def predicted(server: Server, estimate: Estimate, cell: Cell, measured: SweepPoint | None = None) -> Predicted:
    """A cell with the bands of the module's formula. `estimate` may come from another model on the same card."""
    logs = np.array(estimate.logs)
    middle, slopes = server.predicted(logs, cell), jacobian(server.predicted, logs, cell)
    half = half_widths(slopes, estimate)
    values = zip(QUANTITIES, np.exp(middle), np.exp(middle - half), np.exp(middle + half), strict=True)
    return Predicted(
        cell,
        {
            name: Figure(float(value), float(lo), float(hi), getattr(measured, name, None))
            for name, value, lo, hi in values
            if np.isfinite(value)
        },
    )


def half_widths(slopes: Floats, estimate: Estimate) -> Floats:
    """Of 95 % bands of the logs of a cell's figures."""
    return np.asarray(student_t.ppf(0.975, estimate.degrees) * np.sqrt(variances(slopes, estimate)))


def variances(slopes: Floats, estimate: Estimate) -> Floats:
    """diag(J Σ Jᵀ) + s² SPREAD²: of the logs of a cell's figures."""
    explained = np.einsum("qi,ij,qj->q", slopes, estimate.covariance_matrix, slopes)
    return np.asarray(explained + (estimate.scale * SPREAD) ** 2)


def calibrate(what: Subject, chosen: Sequence[SweepPoint]) -> Profile:
    """Fit the card of a run to some of its levels (points.choose). Raises InputError for fewer than 3."""
    if len(chosen) < MIN_POINTS:
        raise InputError(
            f"{len(chosen)} points for {len(what.server.prior)} factors of {what.server.card.name}",
            allowed=f"{MIN_POINTS} to {MAX_POINTS} points, each a precision under a load that is not invalid",
            remedy="measure more cells: bench sweep --conc 1,8,32",
        )
    observations = [observed(level) for level in chosen]
    estimate = fit(what.server.predicted, observations, what.server.prior)
    logs = np.array(estimate.logs)
    cells = []
    for level, item in zip(chosen, observations, strict=True):
        left = item.logs - what.server.predicted(logs, item.cell)
        named = {name: round(float(x), 4) for name, x in zip(QUANTITIES, left, strict=True) if np.isfinite(x)}
        cells.append(Fitted(precision=level.precision, load=load(level), verdict=level.verdict, left=named))
    suspect = [level for level in chosen if level.verdict == "suspect"]
    notes = [f"{cell_of(level).key} is suspect ({', '.join(level.verdict_reasons)})" for level in suspect]
    return Profile(
        card=what.server.card,
        run_id=what.run.name,
        model=what.shape.name,
        scenario=what.server.scenario.name,
        day=str(what.run.environment.get("started_at") or "")[:10],
        estimate=estimate,
        cells=tuple(cells),
        notes=(*what.notes, *notes),
    )


def held_out(what: Subject, profile: Profile) -> list[Predicted]:
    """Every level of the run that the profile was not fitted to, predicted beside what was measured."""
    used = {(cell.precision, cell.load) for cell in profile.cells}
    rest = [level for level in what.levels if (level.precision, load(level)) not in used]
    return [predicted(what.server, profile.estimate, cell_of(level), level) for level in rest]


def medians(rows: Sequence[Predicted]) -> dict[str, float]:
    """Median error of each quantity over the rows that have it."""
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for row in rows:
        for name, figure in row.figures.items():
            if figure.error is not None:
                found[name].append(figure.error)
    return {name: float(np.median(errors)) for name, errors in found.items() if errors}
