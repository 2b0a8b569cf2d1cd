"""Arguments of vLLM beyond those that kneebench gives every engine: read, checked, in one order, put into a ServeSpec.

    options, --engine-arg, --vary ─► told ─► ("--kv-cache-dtype", "fp8", "--max-num-seqs", "64") ─► placed ─► ServeSpec

The middle is part of the cell: it is compared when a run is resumed, and stands in each row (`written`). An argument
that ServeSpec has a field for goes there, whichever way it was typed, so that what depends on it (does the model fit
the card, how many cards are taken) sees it. Pure functions.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.engines import ServeSpec
from harness.errors import InputError
from harness.redact import redact
from harness.rundir import without_places
from harness.variants import Setting

Argument = tuple[str, tuple[str, ...]]
"""A flag in vLLM's own spelling (--max-num-seqs), and what follows it."""

OURS = {
    "--model": "--model",
    "--model-tag": "--model",
    "--served-model-name": "--model",
    "--host": "",
    "--port": "--port",
    "--uds": "",
    "--api-key": "",
    "--root-path": "",
    "--ssl-keyfile": "",
    "--ssl-certfile": "",
    "--ssl-ca-certs": "",
    "--headless": "",
    "--config": "--engine-arg, one flag each, so that every one is recorded",
}
"""Flags that say where the engine is, who may speak to it and what it serves; and what says the same here."""

_ALSO = {
    "-tp": "--tensor-parallel-size",
    "--tensor-parallel": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "--pipeline-parallel": "--pipeline-parallel-size",
}
"""Short forms of flags that bear on how many cards are taken, and how our own options call them."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """An argument that ServeSpec has a field for."""

    field: str
    kind: Callable[[str], Any]
    low: float
    high: float
    allowed: str


_COUNT = "a whole number, 1 or more"
_PLACED = {
    "--max-num-seqs": _Placed("max_num_seqs", int, 1, 1_000_000, _COUNT),
    "--max-num-batched-tokens": _Placed("max_num_batched_tokens", int, 1, 100_000_000, _COUNT),
    "--max-model-len": _Placed("max_model_len", int, 16, 100_000_000, "a whole number of tokens, 16 or more"),
    "--gpu-memory-utilization": _Placed("gpu_memory_utilization", float, 0.05, 1.0, "0.05 to 1"),
    "--tensor-parallel-size": _Placed("tensor_parallel", int, 1, 1024, "a whole number of cards"),
    "--pipeline-parallel-size": _Placed("pipeline_parallel", int, 1, 1024, "a whole number of cards"),
}


def read(items: Sequence[str], option: str = "--engine-arg") -> list[Argument]:
    """What was passed by --engine-arg, in its order: `--x=1`, `--x 1`, `--x` and `1`, flags with _ or -.

    Raises InputError for a value without a flag, and for a flag of OURS.
    """
    found: list[Argument] = []
    for item in items:
        for part in _parts(item.strip()):
            if part.startswith("-") and not _is_number(part):
                flag, equals, value = part.partition("=")
                found.append((_spelled(flag), (value,) if equals else ()))
            elif found:
                found[-1] = found[-1][0], (*found[-1][1], part)
            else:
                raise InputError(
                    f"{option} {item!r} is no argument", allowed="a flag of vLLM, as --engine-arg=--block-size=32"
                )
    for flag, _ in found:
        check_not_ours(flag, option)
    return found


def check_not_ours(flag: str, option: str) -> None:
    """Raise InputError for a flag of OURS, or the beginning of one: vLLM's parser takes that for the whole."""
    for name, instead in OURS.items():
        if name == flag or (len(flag) > 4 and name.startswith(flag)):
            raise InputError(
                f"{option} {flag}: kneebench says that itself, and of two the engine would follow the later",
                allowed="flags of vLLM but " + ", ".join(OURS),
                remedy=f"use {instead}" if instead else "leave it out",
            )


def varied(setting: Setting) -> list[Argument]:
    """A setting of --vary as arguments. A switch is --enforce-eager for true and --no-enforce-eager for false."""
    found: list[Argument] = []
    for name, value in setting:
        flag = _spelled(f"--{name}")
        check_not_ours(flag, "--vary")
        switch = {"true": flag, "false": f"--no-{flag[2:]}"}.get(value.lower())
        found.append((switch, ()) if switch else (flag, (value,)))
    return found


def told(*sources: tuple[str, Sequence[Argument]]) -> tuple[str, ...]:
    """Everything that an engine is told, by name: what was typed in another order is the same cell.

    `sources`: the option by which it was said, and what it said. Raises InputError for a flag that two of them say.
    """
    said: dict[str, str] = {}
    for option, arguments in sources:
        for flag in dict.fromkeys(flag for flag, _ in arguments):
            name = flag.replace("--no-", "--", 1)
            if name in said:
                raise InputError(f"{name} is said twice, by {said[name]} and by {option}", allowed="one of them")
            said[name] = option
    arguments = sorted((one for _, found in sources for one in found), key=lambda one: one[0])
    return tuple(part for flag, values in arguments for part in _line(flag, values))


def placed(spec: ServeSpec, engine_args: Sequence[str]) -> ServeSpec:
    """The spec with these arguments: those that it has a field for there, the rest as they are.

    Raises InputError for a value that its field cannot have.
    """
    fields: dict[str, Any] = {}
    rest: list[str] = []
    for flag, values in read(engine_args):
        if flag == "--kv-cache-dtype" and len(values) == 1:
            fields["kv_cache_dtype"] = values[0]
        elif flag in _PLACED:
            fields[_PLACED[flag].field] = _value(flag, values)
        else:
            rest += _line(flag, values)
    return replace(spec, **fields, extra_args=(*spec.extra_args, *rest))


def written(engine_args: Sequence[str]) -> str | None:
    """The arguments as a row has them, quoted for a shell, without this machine's paths and without keys."""
    return redact(" ".join(shlex.quote(without_places(part)) for part in engine_args)) or None


def _value(flag: str, values: Sequence[str]) -> Any:
    known = _PLACED[flag]
    try:
        (text,) = values
        value = known.kind(text)
        if known.low <= value <= known.high:
            return value
    except ValueError:
        pass
    raise InputError(f"{' '.join((flag, *values))} cannot be", allowed=known.allowed)


def _parts(item: str) -> list[str]:
    """`--x 1` typed as one item is a flag and its value; a JSON value keeps its blanks."""
    if item.startswith("-") and "=" not in item.split(maxsplit=1)[0]:
        return item.split(maxsplit=1)
    return [item]


def _spelled(flag: str) -> str:
    """--max_num_seqs and -tp as vLLM's help has them; after a dot stand keys of JSON, which keep their spelling."""
    name, dot, keys = flag.partition(".")
    name = name.replace("_", "-")
    return _ALSO.get(name, name) + dot + keys


def _line(flag: str, values: Sequence[str]) -> list[str]:
    """As a command line has it. A value that looks like a flag has to hang on its own."""
    if len(values) == 1 and values[0].startswith("-") and not _is_number(values[0]):
        return [f"{flag}={values[0]}"]
    return [flag, *values]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
