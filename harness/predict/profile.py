"""What a calibration found of one's own card, as a file: the factors, how sure they are, and what they were fitted to.

A profile is TOML, made to be read and kept beside the run. It holds the whole card, so that it predicts where the
catalogue has no such card, and each cell that it was fitted to, with what was left unexplained there.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from harness.errors import InputError
from harness.files import read_text, write_whole
from harness.predict.cards import Card
from harness.predict.roofline import Factors
from harness.rundir import to_toml
from harness.settings import record_of

Floats = NDArray[np.floating[Any]]

FACTORS = ("bandwidth", "tensor", "host", "quantized", "unpacking")
"""Of bandwidth, of all rates of multiplying, of the host's seconds; on a processor also of its INT4 kernel (two)."""
QUANTITIES = ("tok_s", "p95_ms", "ttft_p50_ms", "tpot_p50_ms")
"""The figures of a row that are fitted and predicted."""

_Positive = Annotated[float, Field(gt=0, lt=math.inf)]
_COMMENT = """# What `bench calibrate` found of a card; `bench predict --profile` uses it.
# [factors] and [factors_sd] (of their logs) are for people; what is read back is [estimate].
"""
_SEE = "write it anew: bench calibrate RUN --out profile.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """One cell that a profile was fitted to. `left`: ln(measured / predicted) of those QUANTITIES that it has."""

    precision: str
    load: float
    """Users, or requests a second."""
    verdict: str
    left: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a fit found: logs of the factors, in the order of their names."""

    names: tuple[str, ...]
    logs: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    """Of the logs."""
    scale: _Positive
    """How far figures lie from what the factors explain, against calibrate.SPREAD: 1 is what is usual."""
    degrees: _Positive
    """Of freedom behind `scale`, for Student's t."""

    def factor(self, name: str) -> float:
        """Of that name; 1 where this kind of card has none."""
        return math.exp(self.logs[self.names.index(name)]) if name in self.names else 1.0

    def sd(self, name: str) -> float:
        """Standard deviation of the factor's log: about the share by which the factor may be off."""
        at = self.names.index(name)
        return math.sqrt(self.covariance[at][at])

    def spread(self, name: str) -> float:
        """How many times the factor may be more, or less: half of its interval of 95 %, as a ratio."""
        return math.exp(1.96 * self.sd(name))

    @property
    def factors(self) -> Factors:
        """As roofline.py takes them."""
        return Factors(**{name: self.factor(name) for name in FACTORS})

    @property
    def covariance_matrix(self) -> Floats:
        return np.array(self.covariance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A calibrated card."""

    card: Card
    run_id: str
    model: str
    scenario: str
    day: str
    """When the run was measured, as its environment.json says; "" where it does not."""
    estimate: Estimate
    cells: tuple[Fitted, ...]
    notes: tuple[str, ...] = ()
    """What a reader should know of the cells: suspect ones that were used, rows that were not."""


def write(profile: Profile, path: Path) -> None:
    """Write a profile as TOML, whole or not at all. Factors are given beside their logs, for people."""
    found = profile.estimate
    tables: dict[str, Mapping[str, Any]] = {
        "profile": {key: getattr(profile, key) for key in ("run_id", "model", "scenario", "day", "notes")},
        "card": asdict(profile.card),
        "factors": {name: round(found.factor(name), 4) for name in found.names},
        "factors_sd": {name: round(found.sd(name), 4) for name in found.names},
        "estimate": asdict(found),
    }
    cells = [to_toml({"[cell]": asdict(cell)}) for cell in profile.cells]  # [[cell]]: an array of tables
    write_whole(path, "\n".join([_COMMENT, to_toml(tables), *cells]))


def read(path: Path) -> Profile:
    """A profile from its file. Raises InputError naming the file and the key for anything that is no profile."""
    try:
        tables = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", remedy=_SEE) from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
        raise InputError(f"{path}: {error}", remedy=_SEE) from error
    needed = ("profile", "card", "estimate", "cell")
    missing = [name for name in needed if not isinstance(tables.get(name), list if name == "cell" else dict)]
    if missing:
        raise InputError(f"{path} is no profile: [{'], ['.join(missing)}] not there", remedy=_SEE)
    known = [item.name for item in fields(Profile)]
    head = {key: value for key, value in tables["profile"].items() if key in known}
    estimate = record_of(Estimate, tables["estimate"], f"{path}: [estimate]", remedy=_SEE)
    size = len(estimate.names)
    square = len(estimate.covariance) == size and all(len(row) == size for row in estimate.covariance)
    if not set(estimate.names) <= set(FACTORS) or len(estimate.logs) != size or not square:
        raise InputError(
            f"{path}: [estimate] names, logs and covariance do not fit each other",
            allowed=f"as many logs, rows and columns as names; names of {', '.join(FACTORS)}",
            remedy=_SEE,
        )
    if not np.isfinite([*estimate.logs, *np.ravel(estimate.covariance)]).all() or min(np.diag(estimate.covariance)) < 0:
        raise InputError(f"{path}: [estimate] has figures that are none", allowed="finite ones, variances from 0")
    parts = {
        "card": record_of(Card, tables["card"], f"{path}: [card]", remedy=_SEE),
        "estimate": estimate,
        "cells": tuple(record_of(Fitted, cell, f"{path}: [[cell]]", remedy=_SEE) for cell in tables["cell"]),
    }
    return record_of(Profile, head | parts, f"{path}: [profile]", remedy=_SEE)
