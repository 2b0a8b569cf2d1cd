"""The fitted coefficients, and those of each fold of the validation: scenarios/catalogue/coefficients.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from harness.predict.roofline import Coefficients
from harness.scenario import scenarios_dir

NAME = "coefficients.toml"


@dataclass(frozen=True, slots=True)
class Folds:
    """Of a fit to everything, and of the fits that leave one card, or one architecture, out."""

    whole: Coefficients
    without_card: Mapping[str, Coefficients]
    without_generation: Mapping[str, Coefficients]


@cache
def folds() -> Folds:
    """The coefficients that ship."""
    table = tomllib.loads((scenarios_dir() / "catalogue" / NAME).read_text(encoding="utf-8"))
    return Folds(
        Coefficients(**table["all"]),
        {name: Coefficients(**values) for name, values in table["without_card"].items()},
        {name: Coefficients(**values) for name, values in table["without_architecture"].items()},
    )


def fitted() -> Coefficients:
    """Of the fit to everything that was published: what predictions are made with."""
    return folds().whole


def write(found: Folds, path: Path) -> None:
    """As TOML, four digits: more would tell nothing."""
    parts = [
        "# Fitted by `bench predict --validate --refit` to scenarios/catalogue/published.csv; see docs/predictor.md.",
        "# Meaning and units: harness/predict/roofline.py, Coefficients.\n",
        _table("all", found.whole),
    ]
    parts += [_table(f"without_card.{name}", values) for name, values in sorted(found.without_card.items())]
    parts += [_table(f"without_architecture.{name}", one) for name, one in sorted(found.without_generation.items())]
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(name: str, values: Coefficients) -> str:
    lines = [f"{item.name} = {float(f'{getattr(values, item.name):.4g}')!r}" for item in fields(Coefficients)]
    return f"[{name}]\n" + "\n".join(lines) + "\n"
