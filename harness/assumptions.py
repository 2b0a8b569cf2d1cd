"""What no measurement tells: prices, traffic, and how much is kept free. One frozen record; TOML -> Assumptions.

Nothing here is measured, and every default stands in the open: a report that used one names it. docs/cost.md says what
each one means and works an example of each formula that it enters.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import settings
from harness.errors import InputError
from harness.files import read_text
from harness.load.schedule import Arrival, mean_rate, read_trace
from harness.prices import load_prices

DAY_S = 86_400
PEAK_WINDOW_S = 60.0
"""A trace's peak is its busiest minute: longer than an answer, shorter than it takes to start another card."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Prices in US dollars, powers in watts, shares 0..1. None: not given, or as measured where that is said."""

    usd_per_hour: float | None = None
    """Rent of a card for an hour. None: as the rows were priced."""
    utilisation: float | None = None
    """Share of the paid hour under this load, for $/1M. None: as the rows say."""

    card_usd: float | None = None
    """To own instead of renting: the price of a card. The hour is then computed from this and the eight below."""
    host_usd: float = 0.0
    """A card's part of its host: machine, rack, network."""
    years: float = 3.0
    """Years over which card and host are written off, in equal parts."""
    residual: float = 0.0
    """Share of their price that they still fetch after that."""
    watts: float | None = None
    """Power of a card under load. None: as measured at the operating point."""
    idle_watts: float = 0.0
    host_watts: float = 0.0
    """A card's part of its host's power, under load or not."""
    pue: float = 1.0
    """Power usage effectiveness: watts drawn from the grid for each watt of the machine; cooling, mostly."""
    usd_per_kwh: float = 0.0

    output_weight: float = 4.0
    """An output token is priced as so many input tokens, which splits the hour between the two."""

    users: int | None = None
    """Concurrent users at the peak, who ask as the users of the scenario do."""
    requests_per_day: float | None = None
    peak_factor: float = 3.0
    """Rate of requests at the peak / the day's mean rate."""
    peak_rps: float | None = None
    """Requests a second at the peak, as from a trace; None: requests_per_day / 86,400 × peak_factor."""
    headroom: float = 0.2
    """Share of a card's safe capacity that is kept free."""
    failover: int = 1
    """Cards that may be lost without leaving the service level: 1 is N+1."""
    users_per_tenant: int = 1
    """Concurrent users of one tenant at its peak."""
    context_tokens: int = 2048
    """Tokens that a user holds in the KV cache, to count what freed memory is worth."""

    chat_conc: int = 16
    batch_conc: int = 32
    """Stated operating points, users: prices are given there whatever the service level says."""

    api_usd_per_1m_input: float | None = None
    api_usd_per_1m_output: float | None = None
    """Prices of an API to break even against."""
    api_name: str = ""

    start_s: float | None = None
    """For `--plan`: seconds from an engine's start to its first answer. None: as earlier runs say."""
    cell_s: float | None = None
    """For `--plan`: seconds that a cell takes. None: as earlier runs or the predictor say."""

    sources: tuple[str, ...] = ()
    """Where prices come from that were looked up in the catalogue: what, its day, its source."""

    @property
    def owned(self) -> bool:
        return self.card_usd is not None

    @property
    def peak(self) -> float | None:
        """Requests a second at the peak. 864,000 a day with a factor of 3: 10 a second on average, 30 at the peak."""
        if self.peak_rps is not None or self.requests_per_day is None:
            return self.peak_rps
        return self.requests_per_day / DAY_S * self.peak_factor

    @property
    def peak_over_mean(self) -> float:
        """The rate at the peak over the day's mean, by a trace where both are from one."""
        if self.peak_rps is None or self.requests_per_day is None:
            return self.peak_factor
        return self.peak_rps * DAY_S / self.requests_per_day


def load_assumptions(path: Path | None = None, prices: Path | None = None, **overrides: Any) -> Assumptions:
    """The defaults, changed by a TOML file, changed by `overrides`; of these, those that are None change nothing.

    Four more keys are names of the catalogue (prices.py, with the entries of the file `prices`): rent and own of a
    card, electricity of a region, api. Raises InputError that names the file and the key for what is unknown, out of
    range or at odds with another.
    """
    table: dict[str, Any] = {}
    source = "assumptions"
    if path is not None:
        source = path.name
        try:
            table = tomllib.loads(read_text(path))
        except OSError as error:
            raise InputError(
                f"assumptions {path}: cannot be read ({error.strerror})", remedy="check the path"
            ) from error
        except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
            raise InputError(f"{source}: no readable TOML: {error}", remedy="see docs/cost.md") from error
    table |= {key: value for key, value in overrides.items() if value is not None}
    table = _looked_up(table, prices, source)
    return check_assumptions(settings.record_of(Assumptions, table, source, remedy="see docs/cost.md"), source)


_CATALOGUE = ("rent", "own", "electricity", "api")


def _looked_up(table: dict[str, Any], prices: Path | None, source: str) -> dict[str, Any]:
    """The table with names of the catalogue replaced by their prices; a price that is given itself goes before."""
    if "sources" in table:
        raise InputError(f"{source}: sources is written, not given", remedy="name an entry of the catalogue")
    given = {key: value for key, value in table.items() if key not in _CATALOGUE}
    names = {key: str(table[key]) for key in _CATALOGUE if key in table}
    if not names and prices is None:
        return table
    catalogue = load_prices(prices)
    entries: list[tuple[dict[str, float], str]] = []
    found: dict[str, Any] = {}
    if "rent" in names:
        offer = catalogue.rent_of(names["rent"])[0]
        entries.append(({"usd_per_hour": offer.usd_per_hour}, f"{offer.name} for {offer.words}, {offer.source}"))
    if "own" in names:
        card = catalogue.buy_of(names["own"])
        entries.append(({"card_usd": card.usd}, f"{card.name} for {card.words}, {card.source}"))
    if "electricity" in names:
        tariff = catalogue.electricity(names["electricity"])
        entries.append(({"usd_per_kwh": tariff.usd_per_kwh}, f"electricity for {tariff.words}, {tariff.source}"))
    if "api" in names:
        api = catalogue.api(names["api"])
        both = {"api_usd_per_1m_input": api.usd_per_1m_input, "api_usd_per_1m_output": api.usd_per_1m_output}
        found["api_name"] = f"{api.model} of {api.provider}"
        entries.append((both, f"API for {api.words}, {api.source}"))
    for values, _ in entries:
        found |= values
    # A price that was given instead is none of the catalogue's, and is not said to be.
    sources = tuple(words for values, words in entries if not set(values) & set(given))
    return found | given | {"sources": sources}


def with_trace(assumptions: Assumptions, trace: Path) -> Assumptions:
    """The traffic of a recorded trace: its mean rate, kept up for a day, and its busiest minute. Raises InputError."""
    if assumptions.requests_per_day is not None or assumptions.peak_rps is not None:
        raise InputError(
            f"trace {trace.name}: requests_per_day or peak_rps is given as well", allowed="one source of the traffic"
        )
    rows = read_trace(trace)
    span_s = rows[-1].offset_s - rows[0].offset_s
    if span_s < PEAK_WINDOW_S:
        raise InputError(
            f"trace {trace.name}: lasts {span_s:.3g} s, and a peak is a busiest minute",
            allowed=f"{PEAK_WINDOW_S:g} s or more",
            remedy="give a longer part of it, or requests_per_day and peak_factor",
        )
    mean_rps = mean_rate(rows)
    # In a trace of little more than a minute the window may miss what the mean, taken from end to end, has in it.
    peak_rps = max(busiest(rows) / PEAK_WINDOW_S, mean_rps)
    return check_assumptions(replace(assumptions, requests_per_day=mean_rps * DAY_S, peak_rps=peak_rps), trace.name)


def busiest(trace: Sequence[Arrival], window_s: float = PEAK_WINDOW_S) -> int:
    """The most arrivals in any window [t, t + window_s); the fullest one begins at an arrival."""
    offsets = [arrival.offset_s for arrival in trace]
    return max(bisect_left(offsets, start + window_s) - at for at, start in enumerate(offsets))


RANGES: dict[str, tuple[float, float]] = {
    "usd_per_hour": (0.0, 100_000.0),
    "utilisation": (0.001, 1.0),
    "card_usd": (0.0, 10_000_000.0),
    "host_usd": (0.0, 10_000_000.0),
    "years": (0.1, 30.0),
    "residual": (0.0, 1.0),
    "watts": (0.0, 100_000.0),
    "idle_watts": (0.0, 100_000.0),
    "host_watts": (0.0, 100_000.0),
    "pue": (1.0, 10.0),
    "usd_per_kwh": (0.0, 100.0),
    "output_weight": (0.01, 1000.0),
    "users": (1, 1_000_000_000),
    "requests_per_day": (0.001, 1e12),
    "peak_factor": (1.0, 10_000.0),
    "peak_rps": (1e-6, 1e9),
    "headroom": (0.0, 0.95),
    "failover": (0, 10_000),
    "users_per_tenant": (1, 1_000_000),
    "context_tokens": (1, 100_000_000),
    "chat_conc": (1, 1_000_000),
    "batch_conc": (1, 1_000_000),
    "api_usd_per_1m_input": (0.0, 1_000_000.0),
    "api_usd_per_1m_output": (0.0, 1_000_000.0),
    "start_s": (0.0, 86_400.0),
    "cell_s": (0.0, 86_400.0),
}
"""The least and the most that each number may be, both allowed."""


def check_assumptions(assumptions: Assumptions, source: str = "assumptions") -> Assumptions:
    """Return them when every value is in range and fits the others; raise InputError naming the key."""
    settings.check(assumptions, RANGES, _conflicts(assumptions), source)
    return assumptions


def _conflicts(given: Assumptions) -> list[settings.Conflict]:
    """Of the values that have to fit each other."""
    owning = "with card_usd: who rents pays for host and electricity in usd_per_hour"
    api = (given.api_usd_per_1m_input, given.api_usd_per_1m_output)
    peak_per_day = None if given.peak_rps is None else given.peak_rps * DAY_S
    return [
        (
            given.owned and given.usd_per_hour is not None,
            f"usd_per_hour = {given.usd_per_hour} and card_usd = {given.card_usd}",
            "one of the two: rent or own",
        ),
        (not given.owned and given.host_usd > 0, f"host_usd = {given.host_usd} without card_usd", owning),
        (not given.owned and given.usd_per_kwh > 0, f"usd_per_kwh = {given.usd_per_kwh} without card_usd", owning),
        (
            given.watts is not None and given.watts < given.idle_watts,
            f"watts = {given.watts} under load and idle_watts = {given.idle_watts}",
            "watts that are not below idle_watts",
        ),
        (
            (api[0] is None) != (api[1] is None),
            "one of api_usd_per_1m_input and api_usd_per_1m_output without the other",
            "both, or neither; 0 for tokens that cost nothing",
        ),
        (
            peak_per_day is not None and given.requests_per_day is not None and peak_per_day < given.requests_per_day,
            f"peak_rps = {given.peak_rps} is below the mean rate of requests_per_day = {given.requests_per_day}",
            "a peak that is not below the mean",
        ),
    ]
