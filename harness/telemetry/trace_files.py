"""What `bench trace` keeps of a generation, and how it is read again: files in, paper out, on any machine.

    trace.toml                       how it was recorded: [trace], and [ceiling], what the machine can do at most
    trace-<precision>.json.gz        torch's profiler (or .sqlite: Nsight Systems), as far as it may be shown
    config-<precision>.json          the checkpoint's config.json: bytes and FLOPs are computed from it
    kernels.csv                      a KernelRow a line
    engine-<precision>.log, .json    the engine's log, and what it said of itself

`--from` takes such files one by one, or the directory; a trace that somebody else recorded needs no more than itself.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.analysis.ceilings import Ceiling
from harness.architecture import Architecture, architecture, read_config
from harness.errors import InputError
from harness.records import KernelRow, write_table
from harness.rundir import writing
from harness.telemetry import nsys, steps, torch_trace
from harness.telemetry.kernels import Trace, rows

SETTINGS, KERNELS = "trace.toml", "kernels.csv"
ENDINGS = (".pt.trace.json.gz", ".pt.trace.json", ".json.gz", ".json", ".sqlite")
"""Of trace-<precision>.*; the longer first."""

_NAMED = re.compile(r"trace-(?P<precision>[\w.+@-]+?)(?:" + "|".join(map(re.escape, ENDINGS)) + ")")
_PRECISION = re.compile(r"[\w.+@-]+")


@dataclass(frozen=True, slots=True)
class Saved:
    """Traces with what is known of them. `settings` is the table [trace] of trace.toml; empty without one."""

    files: Mapping[str, Path]
    """Precision -> file, the baseline first."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    ceiling: Ceiling | None = None
    shapes: Mapping[str, Architecture] = field(default_factory=dict)


def read_trace(precision: str, path: Path) -> Trace:
    """A trace of either profiler. Raises InputError naming the file for anything else."""
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if begin == nsys.MAGIC:
        return steps.trace(precision, nsys.read(path))
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise InputError(
            f"{path}: a report of Nsight Systems, which only nsys itself reads",
            remedy=f"nsys export --type sqlite {path.name}, and give what that writes",
        )
    if not begin:
        raise InputError(f"{path}: is empty")
    return steps.trace(precision, torch_trace.read(path))


def saved(items: Sequence[str]) -> Saved:
    """What --from names: PRECISION=FILE, a FILE named trace-<precision>.*, or a directory of such files.

    What lies beside the files is taken too, if they all lie in one directory. Raises InputError for anything else.
    """
    files: dict[str, Path] = {}
    for item in items:
        for precision, path in _named(item):
            if precision in files:
                raise InputError(f"--from names {precision} twice", allowed="each precision once")
            files[precision] = path
    directories = {path.resolve().parent for path in files.values()}
    return read_beside(files, directories.pop()) if len(directories) == 1 else Saved(files)


def read_beside(files: Mapping[str, Path], directory: Path) -> Saved:
    """Traces, with what trace.toml and the configs in the directory tell of them."""
    tables = _tables(directory / SETTINGS)
    shapes = {}
    for precision in files:
        config = directory / f"config-{precision}.json"
        if config.exists() and (shape := architecture(read_config(config))) is not None:
            shapes[precision] = shape
    return Saved(files, tables.get("trace", {}), _ceiling(tables.get("ceiling")), shapes)


def _named(item: str) -> list[tuple[str, Path]]:
    precision, equals, name = item.partition("=")
    if equals and _PRECISION.fullmatch(precision) and not Path(item).exists():
        return [(precision, Path(name).expanduser())]
    path = Path(item).expanduser()
    if path.is_dir():
        found = [(match["precision"], one) for one in path.iterdir() if (match := _NAMED.fullmatch(one.name))]
        if not found:
            raise InputError(f"--from {item}: no traces are in it", allowed="a directory that `bench trace` wrote")
        order = [str(name) for name in _tables(path / SETTINGS).get("trace", {}).get("precisions", ())]
        return sorted(found, key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair[0]))
    match = _NAMED.fullmatch(path.name)
    if match is None:
        raise InputError(
            f"--from {item}: of which precision?",
            allowed="PRECISION=FILE, or a file named trace-PRECISION.json.gz (.json, .sqlite)",
            remedy=f"--from bf16={item}",
        )
    return [(match["precision"], path)]


def _tables(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _ceiling(table: Mapping[str, Any] | None) -> Ceiling | None:
    if table is None:
        return None
    known = {field.name for field in fields(Ceiling)}
    try:
        return Ceiling(**{name: value for name, value in table.items() if name in known})
    except TypeError as error:
        raise InputError(f"{SETTINGS}: [ceiling] is not whole ({error})") from error


# --- what is written --------------------------------------------------------------------------------------------------


def write_rows(traces: Iterable[Trace], path: Path) -> None:
    """kernels.csv of all of them."""
    with writing():
        write_table(path, [row for trace in traces for row in rows(trace)], KernelRow)


def shown_config(path: Path) -> str:
    """A config.json without the place that its model was loaded from."""
    config = {name: value for name, value in read_config(path).items() if name != "_name_or_path"}
    return json.dumps(config, indent=2) + "\n"
