"""What a card costs, rented or bought, what a kilowatt-hour costs, and a million tokens from somebody's API.

Prices are data (scenarios/catalogue/prices.toml), each with the day on which it held and the place where it was read.
They age, and nothing here knows what day it is: `words` says the day along with the price, and a file of your own takes
the place of any entry. A price that nobody looked up is not made up: asking for it is an error, which names what is
there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, TypeAdapter, ValidationError

from harness.errors import InputError
from harness.files import read_text
from harness.scenario import scenarios_dir
from harness.suggest import did_you_mean

CATALOGUE = Path("catalogue") / "prices.toml"
"""In scenarios/, but a folder deeper: what lies in scenarios/ itself is a scenario."""

Kind = Literal["on-demand", "community", "spot"]
"""on-demand: yours until you give it back. community: a third party's machine, from a marketplace. spot: may be taken
away at any moment."""
_KINDS: tuple[str, ...] = get_args(Kind)

# The upper ends are far above any price: they catch cents given as dollars, and the price of a rack as that of a card.
_Text = Annotated[str, Field(min_length=1)]
_Day = Annotated[date, Field(ge=date(2015, 1, 1))]
_Gib = Annotated[float, Field(strict=True, ge=1, le=1024)]
_HourlyUsd = Annotated[float, Field(strict=True, gt=0, le=1000)]
_CardUsd = Annotated[float, Field(strict=True, gt=0, le=1_000_000)]
_KwhUsd = Annotated[float, Field(strict=True, ge=0, le=5)]
_TokensUsd = Annotated[float, Field(strict=True, ge=0, le=1000)]


@dataclass(frozen=True, slots=True)
class Rent:
    """A card for an hour, in US dollars. `card` is its id here; `memory_gib` its memory as sold."""

    card: _Text
    name: _Text
    memory_gib: _Gib
    provider: _Text
    kind: Kind
    usd_per_hour: _HourlyUsd
    as_of: _Day
    source: _Text
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.card, self.provider, self.kind

    @property
    def words(self) -> str:
        return f"{_usd(self.usd_per_hour)}/h ({self.provider}, {self.kind}, {self.as_of})"


@dataclass(frozen=True, slots=True)
class Buy:
    """A card, in US dollars, without its host."""

    card: _Text
    name: _Text
    usd: _CardUsd
    as_of: _Day
    source: _Text
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.card,)

    @property
    def words(self) -> str:
        return f"{_usd(self.usd)} ({self.as_of})"


@dataclass(frozen=True, slots=True)
class Electricity:
    """A kilowatt-hour, in US dollars. `region` also says who pays it: a household pays more than a factory."""

    region: _Text
    usd_per_kwh: _KwhUsd
    as_of: _Day
    source: _Text
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.region,)

    @property
    def words(self) -> str:
        return f"{_usd(self.usd_per_kwh)}/kWh ({self.region}, {self.as_of})"


@dataclass(frozen=True, slots=True)
class Api:
    """A million tokens in and a million out, in US dollars, from somebody else's server."""

    id: _Text
    provider: _Text
    model: _Text
    usd_per_1m_input: _TokensUsd
    usd_per_1m_output: _TokensUsd
    as_of: _Day
    source: _Text
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.id,)

    @property
    def words(self) -> str:
        both = f"{_usd(self.usd_per_1m_input)} in and {_usd(self.usd_per_1m_output)} out"
        return f"{both} for 1M tokens ({self.model}, {self.provider}, {self.as_of})"


@dataclass(frozen=True, slots=True)
class Prices:
    """A whole catalogue. Every look-up raises InputError, naming what is there, for what is not."""

    rents: tuple[Rent, ...]
    buys: tuple[Buy, ...]
    tariffs: tuple[Electricity, ...]
    apis: tuple[Api, ...]

    def rent_of(self, card: str) -> tuple[Rent, ...]:
        """All offers of a card: on-demand first, then community, then spot; the cheapest first in each."""
        offers = [rent for rent in self.rents if rent.card == card]
        if not offers:
            raise _unknown("rent", "card", card, (rent.card for rent in self.rents))
        return tuple(sorted(offers, key=lambda rent: (_KINDS.index(rent.kind), rent.usd_per_hour, rent.provider)))

    def buy_of(self, card: str) -> Buy:
        return _found("buy", "card", card, self.buys)

    def electricity(self, region: str) -> Electricity:
        return _found("electricity", "region", region, self.tariffs)

    def api(self, id: str) -> Api:
        return _found("api", "id", id, self.apis)


def load_prices(path: Path | None = None) -> Prices:
    """The packaged catalogue; entries of the TOML file at `path` replace those with the same key, or add to them.

    The key of a rent is card, provider and kind; of the others card, region or id. An entry is replaced whole, so that
    no price stands with the day or the source of another. Raises InputError that names file, table and key.
    """
    ours = _read(scenarios_dir() / CATALOGUE)
    if path is None:
        return ours
    theirs = _read(path)
    return Prices(
        rents=_merged(ours.rents, theirs.rents),
        buys=_merged(ours.buys, theirs.buys),
        tariffs=_merged(ours.tariffs, theirs.tariffs),
        apis=_merged(ours.apis, theirs.apis),
    )


_Entry = TypeVar("_Entry", Rent, Buy, Electricity, Api)
_TABLES = ("rent", "buy", "electricity", "api")


def offer(card: str, prices: Prices) -> Rent | None:
    """The cheapest rent on demand, else a third party's. None: there is none; spot may be taken away at any moment."""
    offers = [rent for rent in prices.rents if rent.card == card and rent.kind != "spot"]
    return min(offers, key=lambda rent: (rent.kind != "on-demand", rent.usd_per_hour, rent.provider), default=None)


def _merged(ours: tuple[_Entry, ...], theirs: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    return tuple(({entry.key: entry for entry in ours} | {entry.key: entry for entry in theirs}).values())


def _read(path: Path) -> Prices:
    try:
        tables = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(f"prices {path}: cannot be read ({error.strerror})", remedy="check the path") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
        raise InputError(f"{path.name}: no readable TOML: {error}", remedy=_SEE) from error
    for table in tables:
        if table not in _TABLES:
            raise InputError(
                f"{path.name}: unknown table [[{table}]]{did_you_mean(table, _TABLES)}",
                allowed=_listed(_TABLES),
                remedy=_SEE,
            )
    return Prices(
        rents=_entries(tables, "rent", Rent, path.name),
        buys=_entries(tables, "buy", Buy, path.name),
        tariffs=_entries(tables, "electricity", Electricity, path.name),
        apis=_entries(tables, "api", Api, path.name),
    )


def _entries(tables: dict[str, Any], table: str, form: type[_Entry], source: str) -> tuple[_Entry, ...]:
    """Every [[table]] of a file. An error counts them from 1, since an entry may lack the key that would name it."""
    rows = tables.get(table, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source}: {table} is no list of tables", allowed=f"[[{table}]], repeated", remedy=_SEE)
    known = [field.name for field in fields(form)]
    found: dict[tuple[str, ...], _Entry] = {}
    adapter = TypeAdapter(form)
    for number, row in enumerate(rows, start=1):
        where = f"{source}: [[{table}]] {number}"
        for key in row:
            if key not in known:
                meant = did_you_mean(key, known)
                raise InputError(f"{where}: unknown key {key!r}{meant}", allowed=_listed(known), remedy=_SEE)
        try:
            entry = adapter.validate_python(row)
        except ValidationError as error:
            raise InputError(f"{where}: {_problem(error)}", remedy=_SEE) from error
        if entry.key in found:
            raise InputError(f"{where}: {', '.join(entry.key)} is there already", allowed="each key once in a file")
        found[entry.key] = entry
    return tuple(found.values())


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its key: `usd_per_hour = -1: Input should be greater than 0`."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"no {key}" if first["type"] == "missing" else f"{key} = {first['input']!r}: {first['msg']}"


def _found(table: str, key: str, wanted: str, entries: tuple[_Entry, ...]) -> _Entry:
    for entry in entries:
        if entry.key == (wanted,):
            return entry
    raise _unknown(table, key, wanted, (entry.key[0] for entry in entries))


def _unknown(table: str, key: str, wanted: str, there: Iterable[str]) -> InputError:
    known = tuple(dict.fromkeys(there))
    return InputError(
        f"no price in [[{table}]] for {key} {wanted!r}{did_you_mean(wanted, known)}",
        allowed=_listed(known),
        remedy=f"add a [[{table}]] to a prices file of your own; {_SEE}",
    )


_SEE = f"see scenarios/{CATALOGUE.as_posix()}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _usd(amount: float) -> str:
    """As it was given: $0.24, $25,249.95."""
    return f"${amount:,.10g}"
