"""Graphics cards by name: memory, bandwidth and the rates of their tensor cores.

Cards are data (scenarios/catalogue/gpus.toml), each with where it was read and what is in doubt: a prediction is no
better than these figures. A card that is not there can be given as a TOML file of one's own. Prices are not here but in
prices.toml, under the same ids.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from harness.errors import InputError
from harness.files import read_text
from harness.scenario import scenarios_dir
from harness.suggest import did_you_mean

CATALOGUE = Path("catalogue") / "gpus.toml"
"""In scenarios/."""

Generation = Literal["volta", "turing", "ampere", "ada", "hopper", "blackwell", "cpu"]
"""Of tensor cores: turing knows no BF16, ampere no FP8. cpu: a processor, in a file of one's own."""

# The ends are far outside of any card: they catch MB given as GiB, and MB/s as GB/s.
_Text = Annotated[str, Field(min_length=1)]
_Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
_Gib = Annotated[float, Field(strict=True, gt=0, le=4096)]
_Bandwidth = Annotated[float, Field(strict=True, gt=0, le=100_000)]
_Rate = Annotated[float, Field(strict=True, gt=0, le=100_000)]
_Watts = Annotated[float, Field(strict=True, gt=0, le=10_000)]
_Count = Annotated[int, Field(strict=True, gt=0, le=10_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card as its driver and its maker describe it. Rates are peaks: dense, accumulating in 32 bits."""

    id: _Id
    name: _Text
    generation: Generation
    memory_gib: _Gib
    """What CUDA reports before any process holds some of it: less than the card is sold with."""
    bandwidth_gb_s: _Bandwidth
    """10**9 bytes a second."""
    fp16_tflops: _Rate
    bf16_tflops: _Rate | None = None
    """None, here and below: the tensor cores have no such type."""
    int8_tops: _Rate | None = None
    fp8_tflops: _Rate | None = None
    power_w: _Watts | None = None
    sms: _Count | None = None
    """Streaming multiprocessors."""
    aliases: tuple[_Text, ...] = ()
    source: _Text
    doubt: str = ""
    """What is derived and how, what sources disagree on, what was not read; "" where nothing is in doubt."""


@functools.cache
def cards() -> tuple[Card, ...]:
    """The packaged catalogue, in the order of its file."""
    return _read(scenarios_dir() / CATALOGUE)


def card(name: str) -> Card:
    """The card of that id, name or alias, or the one in a TOML file: `own.toml`, `own.toml:id` where it holds several.

    Case, spaces and hyphens do not count, nor do "NVIDIA", "GeForce", "Tesla" and "Generation". A bare "a100" or "h100"
    is the SXM module with 80 GB. Raises InputError, naming what is there, for any other name.
    """
    path, dot_toml, wanted = name.partition(".toml")
    if not dot_toml:
        return _found(name, cards(), "the catalogue")
    own = _read(Path(path + dot_toml).expanduser())
    if wanted.removeprefix(":"):
        return _found(wanted.removeprefix(":"), own, path + dot_toml)
    if len(own) > 1:
        raise InputError(
            f"--gpu {name}: the file holds {len(own)} cards",
            allowed=", ".join(f"{name}:{card.id}" for card in own),
            remedy="add the id of one of them",
        )
    return own[0]


def _found(name: str, among: tuple[Card, ...], where: str) -> Card:
    found = _by_key(among, where).get(_key(name))
    if found is None:
        raise InputError(
            f"--gpu {name}: no such card in {where}{did_you_mean(name, (card.id for card in among))}",
            allowed=", ".join(card.id for card in among),
            remedy=f"give a card of your own as a TOML file, --gpu own.toml; {_SEE}",
        )
    return found


def _by_key(among: Iterable[Card], where: str) -> dict[str, Card]:
    """Each card under every spelling of it. Raises InputError for a spelling of two."""
    found: dict[str, Card] = {}
    for card in among:
        for spelling in (card.id, card.name, *card.aliases):
            other = found.setdefault(_key(spelling), card)
            if other is not card:
                raise InputError(
                    f"{where}: {spelling!r} is both {other.id} and {card.id}",
                    allowed="each id, name and alias for one card",
                    remedy="take it out of one of the two",
                )
    return found


def _key(spelling: str) -> str:
    """What counts in a spelling: `NVIDIA GeForce RTX 4080` and `rtx-4080` are both `rtx4080`."""
    return re.sub(r"[\W_]|nvidia|geforce|tesla|generation", "", spelling.lower())


def _read(path: Path) -> tuple[Card, ...]:
    """Every [[card]] of a file. An error counts them from 1, since an entry may lack the id that would name it."""
    try:
        tables: dict[str, Any] = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(f"cards {path}: cannot be read ({error.strerror})", remedy="check the path") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
        raise InputError(f"{path.name}: no readable TOML: {error}", remedy=_SEE) from error
    rows = tables.pop("card", [])
    if tables or not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        given = f"[[{next(iter(tables))}]]" if tables else "no list of cards"
        raise InputError(f"{path.name}: {given}", allowed="[[card]], once or more, and nothing else", remedy=_SEE)
    found = tuple(_entry(row, f"{path.name}: [[card]] {number}") for number, row in enumerate(rows, start=1))
    _by_key(found, path.name)
    return found


def _entry(row: dict[str, Any], where: str) -> Card:
    known = [field.name for field in fields(Card)]
    for key in row:
        if key not in known:
            raise InputError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known)}", allowed=", ".join(known), remedy=_SEE
            )
    try:
        return TypeAdapter(Card).validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"no {key}" if first["type"] == "missing" else f"{key} = {first['input']!r}: {first['msg']}"
        raise InputError(f"{where}: {problem}", remedy=_SEE) from error


_SEE = f"see scenarios/{CATALOGUE.as_posix()}"
