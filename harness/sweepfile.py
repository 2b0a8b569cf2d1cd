"""sweep.toml: the options of `bench sweep` in a file. What is typed wins over what the file says.

    model = "demo"                 keys are the command's long options, _ for -
    precisions = ["bf16", "awq"]   a list is joined by commas, or is an option that may be repeated
    assume = "prices.toml"         a path is relative to the file

The file becomes the parser's `default_map`, so every option that the command has, or will have, can stand in it, and is
read as if it had been typed.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand

from harness.errors import InputError
from harness.files import read_text
from harness.options import source_of
from harness.suggest import did_you_mean

MOST_BYTES = 1 << 20
_INIT = "`bench init` writes a good file, each option with what it means"
_NOT_IN_A_FILE = ("resume", "help")
_SEARCH = ("until", "max_cells", "max_minutes", "max_conc")
_INSTEAD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "until": ("slo", "slo_p95"),
        "slo": ("slo_p95", *_SEARCH),
        "slo_p95": ("slo", *_SEARCH),
        "conc": ("rate", "arrivals"),
        "rate": ("conc",),
    }
)
"""Options that exclude each other: one that is typed takes the place of those of the file."""
_PIECES = re.compile(r"(?P<before>[\w.+@-]+=|shape:|)(?P<path>.*?)(?P<after>(?<=\.toml):[\w.-]+|)", re.DOTALL)
"""bf16=PATH, shape:PATH, cards.toml:ID, PATH."""


class SweepCommand(TyperCommand):
    """A command whose options a file may give, and the typed ones win."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest: list[str] = super().parse_args(ctx, args)
        sources = {name: source_of(ctx, name) for name in ctx.params}
        for typed, others in _INSTEAD.items():
            for other in others if sources.get(typed) == "COMMANDLINE" else ():
                if sources.get(other) == "DEFAULT_MAP":
                    ctx.params[other] = None
                    ctx.default_map.pop(other, None)
        return rest


def read(context: typer.Context, file: Path | None) -> Path | None:
    """Callback of the argument that names the file; it is eager, so that the defaults are there for all others."""
    if file is not None and not context.resilient_parsing:
        context.default_map = defaults(file, context)
    return file


def from_file(context: typer.Context) -> tuple[str, ...]:
    """Which options have their value from the file, as its keys."""
    given = context.default_map or {}
    return tuple(
        key
        for key, option in options(context.command).items()
        if option.name in given and source_of(context, option.name) == "DEFAULT_MAP"
    )


def options(command: Any) -> dict[str, Any]:
    """What a file may say -> the command's parameter: `max_num_seqs` -> that of --max-num-seqs."""
    long = {
        next(name for name in option.opts if name.startswith("--"))[2:].replace("-", "_"): option
        for option in command.params
        if option.param_type_name == "option"
    }
    return {key: option for key, option in long.items() if key not in _NOT_IN_A_FILE}


def defaults(file: Path, context: typer.Context) -> dict[str, Any]:
    """Parameter name -> value, as the parser takes it. Raises InputError that names file, key, and what is allowed."""
    known, table = options(context.command), _table(file)
    kinds = signature(context.command.callback, eval_str=True).parameters  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(
                f"{file.name}: unknown key {key!r}{did_you_mean(key.replace('-', '_'), known)}",
                allowed=", ".join(known),
                remedy=_INIT,
            )
        param, where = known[key], f"{file.name}: {key} = {_shown(value)}"
        kind = str(kinds[param.name].annotation)
        given: Any = _typed(value, param, kind, where)
        if isinstance(given, list):
            placed = [_placed(text, file.parent, is_path="Path" in kind) for text in given]
            given = placed if param.multiple else ",".join(placed)
        try:
            param.process_value(context, given)
        except typer.BadParameter as error:
            raise InputError(f"{where}: {error.message}", allowed=_meaning(param)) from error
        found[param.name] = given
    return found


def _table(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise InputError(
            f"{file} is a directory",
            allowed="a .toml file of options, as `bench init` writes one",
            remedy=f"to finish an interrupted run: bench sweep --resume {file}",
        )
    try:
        return _parsed(read_text(file, MOST_BYTES), file)
    except OSError as error:
        meant = did_you_mean(file.name, (path.name for path in file.parent.glob("*.toml")))
        raise InputError(
            f"{file}: cannot be read ({error.strerror}){meant}",
            allowed="a .toml file of options",
            remedy=_INIT,
        ) from error
    except (ValueError, RecursionError) as error:  # of UTF-8; a figure of 5,000 digits, deep nesting
        raise InputError(f"{file.name}: no readable TOML: {error}", remedy=_INIT) from error


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = f"at line {len(text.splitlines())}, the last one"
        told = str(error).replace("at end of document", where)
        raise InputError(f"{file.name}: no readable TOML: {told}", remedy=_INIT) from error


def _typed(value: Any, param: Any, kind: str, where: str) -> bool | list[str]:
    """A value as it would have been typed: the texts of an option, or whether a switch is on."""
    if isinstance(value, bool) or param.is_flag:
        if isinstance(value, bool) and param.is_flag:
            return value
        raise InputError(where, allowed="true or false" if param.is_flag else _meaning(param))
    if isinstance(value, list) and not param.multiple and "str" not in kind:
        raise InputError(f"{where}: a list", allowed=f"one value: {_meaning(param)}")
    texts = [_text(item, where) for item in (value if isinstance(value, list) else [value])]
    if not all(texts) or not texts:
        raise InputError(f"{where}: empty", allowed=_meaning(param), remedy="give it a value, or take it out")
    return texts


def _text(item: Any, where: str) -> str:
    """A text, or a number as it is typed."""
    is_number = isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
    if not (is_number or isinstance(item, str)):
        raise InputError(where, allowed="a text, a number, true or false, or a list of texts and numbers")
    return str(item).strip()


def _placed(text: str, folder: Path, *, is_path: bool) -> str:
    """A path as seen from here. What may be a name as well is a path where it looks like one and is there."""
    if is_path:
        return str(folder / Path(text).expanduser())
    parts = _PIECES.fullmatch(text)
    assert parts is not None  # every piece may be empty
    path = parts["path"]
    if ("/" in path or path.endswith(".toml")) and (folder / path).exists():
        return f"{parts['before']}{folder / path}{parts['after']}"
    return text


def _meaning(param: Any) -> str:
    return (param.help or "a value").rstrip(".")


def _shown(value: Any) -> str:
    """As it stands in the file, nearly, and not at any length."""
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
