"""The service level: what the answers must keep for a load to count as carried.

    p95=3s               95 % of the answers are whole within 3 s of the moment at which they were meant to be asked for
    ttft=500ms           95 % begin within 500 ms
    tpot=50ms            95 % go on at 50 ms a token or faster
    goodput=90%          90 % of the requests keep all the limits above at once; then this alone decides

Several are joined by commas: "p95=3s,ttft=500ms". TTFT, TPOT and goodput are the field's words (DistServe, OSDI 2024,
counts as goodput the requests inside all limits).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from harness.errors import InputError
from harness.suggest import did_you_mean

_ALLOWED = "p95=3s, ttft=500ms, tpot=50ms, goodput=90%, joined by commas"
_DIGITS = r"[0-9]{1,12}(?:\.[0-9]{1,30})?"
"""As many decimals as `text` can write: 81.2 ms are 0.08120000000000001 s."""
_NAMES = {"p95": "p95_s", "ttft": "ttft_s", "tpot": "tpot_s", "goodput": "goodput"}


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds, None where there is none; `goodput` the share of requests that has to keep them all at once.

    Without `goodput` each limit stands for itself and has to be kept by the 95th percentile of its figure.
    """

    p95_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    goodput: float | None = None

    @property
    def words(self) -> str:
        """For a sentence: "p95 ≤ 3 s", "p95 ≤ 3 s and TTFT p95 ≤ 0.5 s", "90 % of requests with E2E ≤ 3 s ..."."""
        names = ("E2E", "TTFT", "TPOT") if self.goodput is not None else ("p95", "TTFT p95", "TPOT p95")
        limits = zip(names, (self.p95_s, self.ttft_s, self.tpot_s), strict=True)
        said = [f"{name} ≤ {_time(limit)}" for name, limit in limits if limit is not None]
        joined = " and ".join((", ".join(said[:-1]), said[-1])) if len(said) > 1 else "".join(said)
        return joined if self.goodput is None else f"{100 * self.goodput:.4g} % of requests with {joined}"

    @property
    def text(self) -> str:
        """As `parse_slo` reads it back: p95=3s,ttft=0.5s."""
        limits = (("p95", self.p95_s), ("ttft", self.ttft_s), ("tpot", self.tpot_s))
        parts = [f"{name}={_plain(limit)}s" for name, limit in limits if limit is not None]
        return ",".join(parts + ([] if self.goodput is None else [f"goodput={_plain(self.goodput)}"]))


def parse_slo(text: str, option: str = "--slo") -> Slo:
    """A service level as people type it; a time alone is that of p95. Raises InputError naming the option."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name, value = (name.lower(), value) if equals else ("p95", name)
        if name not in _NAMES or _NAMES[name] in found:
            what = "is given twice" if name in _NAMES else f"is no service level{did_you_mean(name, _NAMES)}"
            raise InputError(f"{option} {text!r}: {name!r} {what}", allowed=_ALLOWED)
        read = parse_share if name == "goodput" else parse_duration
        found[_NAMES[name]] = read(value, f"{option} {name}")
    if found.keys() == {"goodput"}:
        raise InputError(f"{option} {text!r}: goodput of what?", allowed=_ALLOWED, remedy="add a limit, as p95=3s")
    if found.get("goodput", 1.0) > 1 or found.get("goodput", 1.0) <= 0:
        raise InputError(f"{option} {text!r}: goodput is a share of the requests", allowed="more than 0, at most 100%")
    return Slo(**found)


def parse_duration(text: str, option: str) -> float:
    """'3s', '800ms' or '3' in seconds. Raises InputError naming the option."""
    found = re.fullmatch(rf"({_DIGITS})\s*(ms|s|)", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"{option} {text!r} is no duration", allowed="a number with s or ms, as 3s or 800ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def parse_share(text: str, option: str) -> float:
    """'5%' or '0.05' as 0.05. Raises InputError naming the option."""
    found = re.fullmatch(rf"({_DIGITS})\s*(%|)", text.strip())
    if not found:
        raise InputError(f"{option} {text!r} is no share", allowed="a share with or without %, as 5% or 0.05")
    return float(found[1]) / (100 if found[2] else 1)


def _plain(number: float) -> str:
    """Its shortest digits without an exponent, which nobody types."""
    return f"{Decimal(repr(number)).normalize():f}"


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 0.1 else f"{seconds * 1e3:g} ms"
