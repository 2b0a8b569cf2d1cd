"""What was found about quality, in a results directory: its own, or that of the sweep whose precisions it is about.

    quality.toml    what was asked, of which checkpoints, with which engine
    prompts.toml    the prompts, copied: what is right is judged by these
    answers.jsonl   an Answer a line          texts.jsonl     what was compared on, as token ids
    samples.csv     a Sample a row            positions.csv   a Position a row
    quality-<precision>.log, .json            the engine's log, and what it said of itself

Whatever ends a run, each finished answer and text is there, and the same command goes on with what is missing.
`.baseline.npz` is what the precisions still to come are compared with; it goes when the last has been.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines import EngineInfo
from harness.errors import InputError, RecordError, RunError
from harness.files import opened
from harness.quality.prompts import PromptSet, load_prompts
from harness.quality.prompts import to_toml as prompts_to_toml
from harness.quality.scoring import Scored
from harness.quality.texts import Text, read_texts, to_line
from harness.records import Answer, Environment, Position, Sample, TableWriter, cut_torn_line, read_table, write_table
from harness.redact import redacted
from harness.rundir import fresh, locked, to_toml, unlock, write, write_record, writing

SETTINGS, PROMPTS, ANSWERS, TEXTS = "quality.toml", "prompts.toml", "answers.jsonl", "texts.jsonl"
POSITIONS, SAMPLES = "positions.csv", "samples.csv"
_BASELINE = ".baseline.npz"
_GROWS = frozenset({"precisions", "served_as", "checkpoint_sha256", "gate"})
"""Settings that another call may add to; the others must stay what they were."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A directory, read. `settings` is the table [quality] of quality.toml."""

    name: str
    settings: Mapping[str, Any]
    prompts: PromptSet | None = None
    answers: Sequence[Answer] = ()
    positions: Sequence[Position] = ()
    samples: Sequence[Sample] = ()

    @property
    def baseline(self) -> str:
        return str(self.settings.get("baseline", "bf16"))

    @property
    def precisions(self) -> list[str]:
        """In the order in which they were asked for, the baseline first."""
        return [str(name) for name in self.settings.get("precisions", ())]


def load_quality(path: Path) -> Quality | None:
    """Read what a directory holds of quality; None for nothing. Raises InputError or RecordError for what is broken."""
    if not (path / SETTINGS).is_file():
        return None
    prompts = path / PROMPTS
    return Quality(
        path.resolve().name,
        _settings(path),
        load_prompts(str(prompts)) if prompts.is_file() else None,
        read_answers(path / ANSWERS),
        read_table(path / POSITIONS, Position) if (path / POSITIONS).is_file() else [],
        read_table(path / SAMPLES, Sample) if (path / SAMPLES).is_file() else [],
    )


def read_answers(path: Path) -> list[Answer]:
    """Raises RecordError naming the line that does not fit; a last line without its end was being written."""
    if not path.is_file():
        return []
    answers = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    answers.append(_answer(json.loads(line)))
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    raise RecordError(f"{path.name}, line {number}: is no answer ({error})") from error
    return answers


class QualityDirectory:
    """An open directory, locked against a second writer. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._lock = locked(path)
        if (path / ANSWERS).exists():
            cut_torn_line(path / ANSWERS)
        self._positions: TableWriter | None = None

    def __enter__(self) -> QualityDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stack.close()
        except OSError:
            pass  # a full disk must not hide the error that it caused
        finally:
            unlock(self.path, self._lock)
            with suppress(OSError):  # one that holds nothing leaves nothing
                self.path.rmdir()

    # --- what it is about ---------------------------------------------------------------------------------------------

    def describe(self, settings: Mapping[str, Any], prompts: PromptSet | None) -> None:
        """Write quality.toml and prompts.toml, or add to them. Raises InputError where they say something else."""
        before = _settings(self.path) if (self.path / SETTINGS).is_file() else {}
        merged = _merged(before, dict(redacted(settings)), self.path)
        if prompts is not None and not (self.path / PROMPTS).is_file():
            write(self.path / PROMPTS, prompts_to_toml(prompts))
        write(self.path / SETTINGS, to_toml({"quality": merged}))

    def describe_environment(self, environment: Environment) -> None:
        path = self.path / "environment.json"
        if not path.exists():
            write_record(path, environment)

    def log_of(self, precision: str) -> Path:
        """A log that is not there yet: quality-awq.log, then quality-awq-2.log ..."""
        return fresh(self.path, f"quality-{precision}", ".log")

    def describe_engine(self, log: Path, info: EngineInfo) -> None:
        write_record(log.with_suffix(".json"), info)

    # --- answers ------------------------------------------------------------------------------------------------------

    def answers(self) -> list[Answer]:
        return read_answers(self.path / ANSWERS)

    def add_answer(self, answer: Answer) -> None:
        """Append a line; it is there when this process is killed."""
        with writing(), (self.path / ANSWERS).open("a", encoding="utf-8") as file:
            file.write(_line(answer))

    def forget_errors(self, precision: str) -> None:
        """Drop answers that are errors: a run that goes on asks again."""
        there = self.answers()
        kept = [answer for answer in there if answer.precision != precision or answer.error is None]
        if len(kept) < len(there):
            write(self.path / ANSWERS, "".join(map(_line, kept)))

    # --- texts and positions ------------------------------------------------------------------------------------------

    def texts(self) -> list[Text]:
        path = self.path / TEXTS
        return read_texts(path) if path.is_file() else []

    def set_texts(self, texts: Iterable[Text]) -> None:
        write(self.path / TEXTS, "".join(f"{to_line(text)}\n" for text in texts))

    def compared(self) -> dict[tuple[str, int], set[str]]:
        """(precision, round) -> the texts that have their rows."""
        found: dict[tuple[str, int], set[str]] = {}
        if (self.path / POSITIONS).is_file():
            TableWriter(self.path / POSITIONS, Position).close()  # cuts a torn line
            for row in read_table(self.path / POSITIONS, Position):
                found.setdefault((row.precision, row.round), set()).add(row.text)
        return found

    def keep_whole_texts(self, lengths: Mapping[str, int]) -> None:
        """Drop the rows of a text that a killed run did not finish."""
        path = self.path / POSITIONS
        if not path.is_file():
            return
        TableWriter(path, Position).close()
        rows = read_table(path, Position)
        counts: dict[tuple[str, int, str], int] = {}
        for row in rows:
            key = (row.precision, row.round, row.text)
            counts[key] = counts.get(key, 0) + 1
        whole = [row for row in rows if counts[row.precision, row.round, row.text] == lengths.get(row.text)]
        if len(whole) < len(rows):
            write_table(path, whole, Position)

    def add_positions(self, rows: Sequence[Position]) -> None:
        with writing():
            if self._positions is None:
                self._positions = self._stack.enter_context(TableWriter(self.path / POSITIONS, Position))
            for row in rows:
                self._positions.add(row)
            self._positions.flush(durable=True)

    def keep_baseline(self, scored: Mapping[str, Scored]) -> None:
        """What the other precisions will be compared with, text by text."""
        arrays = {}
        for text, found in scored.items():
            for field in fields(Scored):
                value = getattr(found, field.name)
                if value is not None:
                    arrays[f"{field.name}/{text}"] = value
        partial = self.path / f"{_BASELINE}.partial"
        with writing(), open(opened(partial), "wb") as file:
            np.savez_compressed(file, **arrays)
            partial.replace(self.path / _BASELINE)

    def baseline(self) -> dict[str, Scored]:
        """What `keep_baseline` kept; empty where there is nothing."""
        path = self.path / _BASELINE
        if not path.is_file():
            return {}
        try:
            with np.load(path) as arrays:
                names = set(arrays.files)
                return {
                    text: Scored(
                        arrays[f"ids/{text}"] if f"ids/{text}" in names else None,
                        *(arrays[f"{field}/{text}"] for field in ("logprobs", "following", "likeliest")),
                    )
                    for text in sorted({name.partition("/")[2] for name in names})
                }
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"{path} cannot be read ({error})", remedy="remove it: the baseline is read again"
            ) from error

    def finish(self) -> None:
        """Every precision has been compared."""
        (self.path / _BASELINE).unlink(missing_ok=True)

    # --- public tasks -------------------------------------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        return read_table(self.path / SAMPLES, Sample) if (self.path / SAMPLES).is_file() else []

    def add_samples(self, samples: Sequence[Sample]) -> None:
        with writing():
            write_table(self.path / SAMPLES, [*self.samples(), *samples], Sample)


def _settings(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads((path / SETTINGS).read_text(encoding="utf-8"))["quality"]
        return dict(table)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(
            f"{path / SETTINGS}: cannot be read ({error})", remedy="restore it, or measure anew"
        ) from error


def _merged(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings of an earlier call and of this one. What both say must be the same, but for what may grow."""
    for key, value in now.items():
        if key in before and key not in _GROWS and value is not None and before[key] != value:
            raise InputError(
                f"{path} was begun with {key} = {before[key]!r}, this is {value!r}",
                allowed="the same: answers are compared with those that are there",
                remedy="choose another --out",
            )
    digests = dict(before.get("checkpoint_sha256", {}))
    for name, digest in (now.get("checkpoint_sha256") or {}).items():
        if digests.setdefault(name, digest) != digest:
            raise InputError(
                f"{path}: its answers of {name} are of another checkpoint",
                allowed="the same one",
                remedy="choose another --out",
            )
    merged = {**before, **{key: value for key, value in now.items() if value is not None}}
    names = [*before.get("precisions", ()), *now.get("precisions", ())]
    return merged | {
        "precisions": list(dict.fromkeys(names)),
        "served_as": {**before.get("served_as", {}), **(now.get("served_as") or {})},
        "checkpoint_sha256": digests,
    }


def _line(answer: Answer) -> str:
    """An answer as a line of JSON, without what it does not have."""
    told = {key: value for key, value in asdict(answer).items() if value not in (None, "", ())}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("\u2028", "\\u2028") + "\n"


def _answer(row: Mapping[str, Any]) -> Answer:
    if not isinstance(row, dict):
        raise TypeError("no table")
    known = {field.name for field in fields(Answer)}
    values = {name: value for name, value in row.items() if name in known}
    values["tokens"] = tuple(values.get("tokens", ()))
    values["logprobs"] = tuple(values.get("logprobs", ()))
    values["alternatives"] = tuple(
        tuple((int(token), float(logprob)) for token, logprob in each) for each in values.get("alternatives", ())
    )
    return Answer(**values)
