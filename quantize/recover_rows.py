"""The rows of `bench recover`: one for each run of a method, in a directory that one call at a time writes to.

recover.csv is always whole; conditions.json says what all its rows have in common.
"""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quantize import lock
from quantize.errors import OutputError, RunError


@dataclass(frozen=True)
class Row:
    """One run of `method`, a process of its own, and its checkpoint against the original. What is not known is None.

    seconds: the process's wall time, start of the interpreter and imports included; cpu_seconds: of all processors;
    start_seconds: those in which a trained method made what it starts from, 0 where it found that; calibration_tokens,
    training_tokens: seen, those of a text seen twice counted twice; peak_mib: the largest resident set of the process;
    kl_nats to positions: as in `fidelity.Fidelity`; error: why there is no more, the last line that the run said.
    """

    method: str
    bits: int
    seed: int
    scheme: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    start_seconds: float | None = None
    calibration_tokens: int | None = None
    training_tokens: int | None = None
    peak_mib: float | None = None
    kl_nats: float | None = None
    perplexity_original: float | None = None
    perplexity_quantized: float | None = None
    top1_agreement: float | None = None
    positions: int | None = None
    checkpoint_sha256: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """Which run it is: a table has one row for each."""
        return self.method, self.bits, self.seed

    @property
    def name(self) -> str:
        """Of the run, as its checkpoint's folder is called."""
        return f"{self.method}-{self.bits}-s{self.seed}"


_TYPES: dict[str, Any] = {field.name: field.type for field in fields(Row)}


def write(rows: Iterable[Row], file: Path) -> None:
    """Write the table, durably, under another name first: a reader finds this one or the one before.

    Raises RunError where the disk is full.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as opened:
            table = csv.DictWriter(opened, list(_TYPES), lineterminator="\n")
            table.writeheader()
            table.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except OSError as error:
        raise RunError(f"{file}: {error}", "a disk with room", "Make room; the rows before are kept") from error


def read(file: Path) -> list[Row]:
    """The rows in `file`, none where there is none. Raises OutputError for a table that is not one of these."""
    if not file.exists():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            table = csv.DictReader(opened)
            rows = [Row(**{name: _value(name, text) for name, text in line.items()}) for line in table]
            if table.fieldnames != list(_TYPES):
                raise ValueError(f"its columns are {', '.join(table.fieldnames or ['none'])}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
        raise OutputError(f"{file}: {error}", "a table that this command wrote", "Give another --out") from error
    return rows


def held(out: Path) -> AbstractContextManager[None]:
    """`out`, made where it is missing, for this process alone."""
    return lock.held(out, out, f"{out}, which another run writes to", "Wait for it")


def resume(out: Path, conditions: Mapping[str, str]) -> list[Row]:
    """The rows that are there, if they were made under these conditions; notes the conditions where there are none."""
    rows, note = read(out / "recover.csv"), out / "conditions.json"
    try:
        before = json.loads(note.read_text(encoding="utf-8")) if rows else None
    except (OSError, ValueError) as error:
        raise OutputError(f"{out}, rows without {note.name} ({error})", "both", "Choose another --out") from error
    if before is None:
        note.write_text(json.dumps(conditions, indent=2) + "\n", encoding="utf-8")
    elif before != conditions:
        changed = [name for name in conditions | before if conditions.get(name) != before.get(name)]
        raise OutputError(
            f"{out}, whose rows were measured with another {', '.join(changed)}",
            "one set of conditions for each --out",
            "Choose another --out, or remove this one",
        )
    return rows


def _text(value: Any) -> str:
    """Figures to six digits: a KL keeps its own however small it is."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if kind is str:
        return text
    if not text:
        return None
    return int(text) if kind in (int, int | None) else float(text)
