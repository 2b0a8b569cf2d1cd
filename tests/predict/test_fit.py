"""The fit: coefficients that made the observations are found back, and what is left out has no say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from harness.predict import fit
from harness.predict.expect import expected
from harness.predict.fit import Curve, Observation
from harness.predict.roofline import NAMES, Coefficients, changed

TRUE = changed(Coefficients(), read_16=-0.08, sm_16_gb_s=-0.15, step_v0_s=0.5, layer_s=0.3, call_int4_s=0.3)


@pytest.fixture(scope="module")
def made() -> list[Observation]:
    """One-stream rows and curves as they would be if TRUE were true: quick to predict, and without noise."""
    found = []
    for item in fit.observations():
        if item.curve is not None:
            found.append(replace(item, value=item.curve.predicted(TRUE)))
        elif item.condition.load.kind == "users" and item.condition.load.n == 1:
            assert item.case is not None and item.case.quantity is not None
            found.append(replace(item, value=expected(item.condition, TRUE)[item.case.quantity]))
    return found


def test_coefficients_that_made_the_observations_explain_them(made: list[Observation]) -> None:
    before = fit.errors(made, Coefficients())
    found = fit.fit(made, workers=1)
    assert np.median(np.abs(before)) > 0.05
    assert np.median(np.abs(found.errors)) < 0.025  # the priors hold it back a little
    for name in ("read_16", "step_v0_s"):
        assert getattr(found.coefficients, name) == pytest.approx(getattr(TRUE, name), rel=0.1)


def test_what_is_left_out_has_no_say(made: list[Observation]) -> None:
    """H20's rows three times too fast: a fit without them does not know."""
    whole = fit.fit(made, workers=1)
    broken = [replace(item, value=item.value * 3) if item.card == "h20-96gb" else item for item in made]
    spoilt = fit.Fit(whole.logs, fit.errors(broken, whole.coefficients), whole.jacobian)
    keep = [item.card != "h20-96gb" for item in broken]
    without = fit.without(broken, spoilt, keep)
    same = fit.without(made, whole, keep)
    assert without == same
    with_them = fit.without(broken, spoilt, [True] * len(broken))
    assert with_them != same


def test_a_robust_loss_by_hand() -> None:
    """An error of 0.15 · sqrt(3), weight 1: 2 (sqrt(1 + 3) - 1) = 2. A log that is one prior away: 1."""
    item = [Observation("l4", 1.0, 1.0, curve=Curve("l4", "marlin", 1, ((1, 1),), 1.0))]
    logs = np.zeros(len(NAMES))
    assert fit._loss(item, logs, np.array([0.15 * 3**0.5])) == pytest.approx(2.0)
    logs[NAMES.index("layer_s")] = fit.PRIOR
    assert fit._loss(item, logs, np.array([0.0])) == pytest.approx(1.0)


def test_observations_are_kept_rows_and_curves() -> None:
    found = fit.observations()
    assert all(item.case.kept for item in found if item.case is not None)
    assert sum(item.curve is not None for item in found) == len(fit.curves()) > 20
    rates = {item.condition.load.rate_rps for item in found if item.case is not None}
    assert {5.0, 10.0} <= rates and 100.0 not in rates  # of each source the lowest


def test_a_step_finds_what_a_general_minimiser_finds() -> None:
    """Errors that are straight lines of two coefficients, with unequal weights and an outlier: scipy's own minimiser of
    the same loss is the oracle."""
    rng = np.random.default_rng(3)
    count = 40
    weights = rng.uniform(0.1, 1.0, count)
    observed = [Observation("l4", float(weight), 1.0) for weight in weights]
    jacobian = np.zeros((count, len(NAMES)))
    jacobian[:, :2] = rng.normal(size=(count, 2))
    truth = np.zeros(len(NAMES))
    truth[:2] = 0.1, -0.15
    now = -jacobian @ truth + rng.normal(0, 0.05, count)
    now[0] += 3.0
    start = np.zeros(len(NAMES))

    def loss(two: NDArray[np.float64]) -> float:
        logs = start.copy()
        logs[:2] = two
        return fit._loss(observed, logs, now + jacobian @ logs)

    oracle = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    found = fit._solved(observed, start, now, jacobian)
    assert found[:2] == pytest.approx(oracle, abs=2e-3)
    assert not found[2:].any()
