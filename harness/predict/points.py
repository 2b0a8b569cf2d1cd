"""Which measured points a calibration takes, and which one would help it most next.

Chosen are the lowest and the highest load and what lies between, evenly on a scale of logs, each precision in turn.
The next point is the one after whose measuring the other cells' predictions would vary least (A-optimality): with J of
the candidate, Σ' = (Σ⁻¹ + Jᵀ V⁻¹ J)⁻¹, and the mean of diag(J Σ' Jᵀ) over the figures of all other cells is least. No
measurement is needed to know it, for Σ' does not depend on what comes out.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.levels import load, shown
from harness.errors import InputError
from harness.predict.calibrate import SPREAD, jacobian, spread
from harness.predict.profile import Floats, Profile
from harness.predict.subject import MAX_POINTS, MIN_POINTS, Subject, cell_of
from harness.records import Cell, SweepPoint

GRID = (1, 2, 4, 8, 16, 32, 64, 128)
"""Loads of candidates beside those of the run's plan: users; of an open loop, shares of the highest rate."""


def choose(what: Subject, use: str | None = None, points: int = MIN_POINTS) -> list[SweepPoint]:
    """The levels to fit to: those of `use` ("bf16:1,awq:8": precision and load), else `points` of them, spread out.

    Suspect levels are taken only where there are too few valid ones, or where they are named. Raises InputError for
    fewer than 3 or more than 6, and for a name that is no usable level; it says which are.
    """
    if use is not None:
        return _named(what, use)
    if not MIN_POINTS <= points <= MAX_POINTS:
        raise InputError(f"--points {points}", allowed=f"{MIN_POINTS} to {MAX_POINTS}")
    valid = [level for level in what.levels if level.verdict == "valid"]
    among = valid if len(valid) >= points else list(what.levels)
    if len(among) < MIN_POINTS:
        raise InputError(
            f"{what.run.name}: {len(among)} usable points",
            allowed=f"{MIN_POINTS} or more, each a precision under a load, none of them invalid",
            remedy="measure more cells: bench sweep --conc 1,8,32",
        )
    return spread_out(among, min(points, len(among)))


def spread_out(among: Sequence[SweepPoint], count: int) -> list[SweepPoint]:
    """`count` levels: evenly from the lowest to the highest load on a scale of logs, each precision in turn."""
    precisions = list(dict.fromkeys(level.precision for level in among))
    loads = [load(level) for level in among]
    low, high = math.log(min(loads)), math.log(max(loads))
    left, found = list(among), []
    for number in range(count):
        wanted = low + (high - low) * number / (count - 1)
        own = [level for level in left if level.precision == precisions[number % len(precisions)]] or left
        nearest = min(own, key=lambda level: abs(math.log(load(level)) - wanted))
        left.remove(nearest)
        found.append(nearest)
    return found


def _named(what: Subject, use: str) -> list[SweepPoint]:
    known = {f"{level.precision}:{shown(load(level))}": level for level in what.levels}
    names = [name.strip() for name in use.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(
                f"--use {name}: {what.run.name} has no such point, or it is invalid", allowed=", ".join(known)
            )
    distinct = list(dict.fromkeys(names))
    if not MIN_POINTS <= len(distinct) <= MAX_POINTS:
        raise InputError(
            f"--use names {len(distinct)} points", allowed=f"{MIN_POINTS} to {MAX_POINTS} of {', '.join(known)}"
        )
    return [known[name] for name in distinct]


@dataclass(frozen=True, slots=True)
class NextPoint:
    """The cell to measure next. Bands are half widths of 95 %, as shares: mean over the figures of the other cells."""

    cell: Cell
    is_measured: bool
    """The run has it already: it only has to be named with --use."""
    band: float
    band_then: float
    command: str
    """That measures it, or that fits to it as well."""


def next_point(what: Subject, profile: Profile) -> NextPoint:
    """Of the run's other cells and a grid of loads in its precisions, the one that narrows the rest most."""
    used = {(cell.precision, cell.load) for cell in profile.cells}
    measured = {(level.precision, load(level)): cell_of(level) for level in what.levels}
    candidates = {key: cell for key, cell in (_grid(what) | measured).items() if key not in used}
    logs, estimate = np.array(profile.estimate.logs), profile.estimate
    slopes = {key: jacobian(what.server.predicted, logs, cell) for key, cell in candidates.items()}
    best = narrowing(list(slopes.values()), estimate.covariance_matrix, estimate.scale)
    key = list(slopes)[best]
    others = [matrix for other, matrix in slopes.items() if other != key]
    then = after(slopes[key], estimate.covariance_matrix, estimate.scale)
    noise = float(np.mean((estimate.scale * SPREAD) ** 2))
    before, later = mean_variance(others, estimate.covariance_matrix), mean_variance(others, then)
    return NextPoint(
        candidates[key],
        key in measured,
        1.96 * math.sqrt(before + noise),
        1.96 * math.sqrt(later + noise),
        _command(what, profile, candidates[key], key in measured),
    )


def narrowing(slopes: Sequence[Floats], covariance: Floats, scale: float) -> int:
    """Which of the cells, if measured, leaves the least variance in the mean of the others; the first of equals."""
    left = []
    for at, own in enumerate(slopes):
        then = after(own, covariance, scale)
        left.append(mean_variance([other for number, other in enumerate(slopes) if number != at], then))
    return int(np.argmin(left))


def after(slopes: Floats, covariance: Floats, scale: float) -> Floats:
    """Σ' = (Σ⁻¹ + Jᵀ V⁻¹ J)⁻¹: of the factors' logs, once a cell with these slopes is measured."""
    told = slopes.T @ np.linalg.solve(scale**2 * spread(), slopes)
    return np.asarray(np.linalg.inv(np.linalg.inv(covariance) + told))


def mean_variance(slopes: Sequence[Floats], covariance: Floats) -> float:
    """Mean of diag(J Σ Jᵀ) over the figures of all cells; 0 without any."""
    if not slopes:
        return 0.0
    return float(np.mean([np.einsum("qi,ij,qj->q", matrix, covariance, matrix) for matrix in slopes]))


def _grid(what: Subject) -> dict[tuple[str, float], Cell]:
    precisions = list(dict.fromkeys(level.precision for level in what.levels))
    planned = (what.run.settings.get("concurrencies") or [], what.run.settings.get("rates_rps") or [])
    if what.server.scenario.arrivals == "closed":
        loads = [users for users in (*planned[0], *GRID) if users <= what.server.max_num_seqs]
        return {(name, float(users)): Cell(name, users) for name in precisions for users in loads}
    highest = max(load(level) for level in what.levels)
    rates = [*planned[1], *(highest * share / GRID[-1] for share in GRID)]
    return {(name, float(rate)): Cell(name, 0, rate_rps=float(rate)) for name in precisions for rate in rates}


def _command(what: Subject, profile: Profile, cell: Cell, is_measured: bool) -> str:
    wanted = cell.conc if cell.rate_rps is None else cell.rate_rps
    if is_measured:
        names = [f"{used.precision}:{shown(used.load)}" for used in profile.cells]
        words = ["bench", "calibrate", what.run.name, "--use", ",".join([*names, f"{cell.precision}:{shown(wanted)}"])]
    else:
        scenario = what.server.scenario
        model = str(what.run.settings.get("model") or what.run.model)
        loads = ["--conc", str(cell.conc)]
        if cell.rate_rps is not None:
            loads = ["--arrivals", scenario.arrivals, "--rate", shown(cell.rate_rps)]
        words = ["bench", "sweep", "--model", model, "--precisions", cell.precision, *loads]
        words += ["--scenario", scenario.name, "--input-tokens", str(scenario.input_tokens)]
        words += ["--output-tokens", str(scenario.output_tokens)]
        size = what.run.settings.get("kv_cache_gib")  # whose default is the card's
        words += ["--kv-cache-gib", f"{size:g}"] if isinstance(size, int | float) else []
    return " ".join(shlex.quote(" ".join(word.split())) for word in words)
