"""How far a measurement may be from a prediction: bands that validation found (scenarios/catalogue/bands.toml).

A band is two factors: 95 % of what was published lies between predicted · low and predicted · high, on cards that the
fit had not seen. `basis` says how strange they were: "card", when only the card was left out; "architecture", when all
cards of its architecture were, which is the band of a card that too little was published of (`unvalidated`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Literal

from harness.scenario import scenarios_dir

MIN_POINTS = 3
"""Published rows of a card from which its predictions have the band of cards that are known."""

Basis = Literal["card", "architecture", "calibrated"]
Figure = Literal["tok_s", "tpot_ms", "ttft_ms"]
LoadClass = Literal["one", "users", "open"]
"""one: a lone stream. users: several at once, closed loops and bursts. open: requests that come unasked, at rates that
some servers cannot follow."""


@dataclass(frozen=True, slots=True)
class Band:
    """Factors on a prediction, and what they come from."""

    figure: Figure
    load: LoadClass
    basis: Basis
    low: float
    high: float
    n: int
    """Published rows behind it."""
    cards: int
    median_error: float
    """|predicted / measured - 1| of those rows, no card above a quarter."""


@dataclass(frozen=True, slots=True)
class Use:
    """The band that a figure has: as it is, or, for `over`, that of one over the figure."""

    figure: Figure
    load: LoadClass
    over: bool = False

    def ends(self, band: Band) -> tuple[float, float]:
        """Factors on the prediction; never both on one side of it, for a band is about a figure that it holds."""
        low, high = (1 / band.high, 1 / band.low) if self.over else (band.low, band.high)
        return min(low, 1.0), max(high, 1.0)


def use(figure: Figure, load: LoadClass) -> Use:
    """Which band a figure under a load has.

    A lone stream's TPOT is one over its decode speed, and both were published. Of users in a closed loop, users = tok/s
    x mean latency / tokens (Little), so TPOT is as wrong as throughput, the other way round; and throughput of an open
    loop that is not followed is that of users.
    """
    if figure == "tpot_ms" and load != "open":
        return Use("tok_s", load, over=True)
    if figure == "tok_s" and load == "open":
        return Use("tok_s", "users")
    return Use(figure, load)


@dataclass(frozen=True, slots=True)
class Bands:
    """All bands, and the cards that have enough published points to be called validated."""

    bands: tuple[Band, ...]
    points: dict[str, int]
    """Kept published rows of each card."""

    def basis(self, card: str) -> Basis:
        return "card" if self.points.get(card, 0) >= MIN_POINTS else "architecture"

    def band(self, figure: Figure, load: LoadClass, basis: Basis) -> Band:
        """The band behind a figure under a load (`use` says how it is read)."""
        wanted = use(figure, load)
        return next(
            band for band in self.bands if (band.figure, band.load, band.basis) == (wanted.figure, wanted.load, basis)
        )

    def ends(self, figure: Figure, load: LoadClass, basis: Basis) -> tuple[float, float]:
        """Factors on a prediction between which a measurement lies in 95 of 100 cases."""
        return use(figure, load).ends(self.band(figure, load, basis))


@cache
def bands() -> Bands:
    """The bands that ship."""
    table = tomllib.loads((scenarios_dir() / "catalogue" / "bands.toml").read_text(encoding="utf-8"))
    return Bands(tuple(Band(**item) for item in table["band"]), table["points"])
