"""Tables of settings -> frozen records. An error names the source and the key, and says what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from harness.errors import InputError
from harness.suggest import did_you_mean

Record = TypeVar("Record")
Conflict = tuple[bool, str, str]
"""Whether it is so, what is wrong, what is allowed."""


def record_of(
    kind: type[Record],
    table: Mapping[str, Any],
    source: str,
    *,
    error: type[InputError] = InputError,
    remedy: str = "",
) -> Record:
    """The record that a table describes. Raises `error` for a key that is no field, or a value of another type."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise error(
                f"{source}: unknown key {key!r}{did_you_mean(key, known)}", allowed=", ".join(known), remedy=remedy
            )
    try:
        return TypeAdapter(kind).validate_python(table)
    except ValidationError as fault:
        first = fault.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "?"
        try:
            given = repr(first.get("input"))
        except ValueError:  # Python writes no number of thousands of digits
            given = "thousands of digits"
        raise error(f"{source}: {key} = {given}: {first['msg']}") from fault


def check(
    record: object,
    ranges: Mapping[str, tuple[float, float]],
    conflicts: Iterable[Conflict],
    source: str,
    *,
    error: type[InputError] = InputError,
) -> None:
    """Raise `error` for the first value out of its range, both ends allowed, or at odds with another."""
    for key, (low, high) in ranges.items():
        value = getattr(record, key)
        if value is not None and not low <= value <= high:
            raise error(f"{source}: {key} = {value}", allowed=f"{low:g} to {high:g}")
    for wrong, problem, allowed in conflicts:
        if wrong:
            raise error(f"{source}: {problem}", allowed=allowed)
