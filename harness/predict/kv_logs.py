"""What engines logged of their KV cache (scenarios/catalogue/kv_logs.csv), beside what memory.py says.

Which row counts, and what is fitted to those that do: the docstring of memory.py. Numbers only were taken from the
sources; a source without an address of its own is a public file that a line of the log leads to.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness.architecture import Architecture
from harness.models import GIB
from harness.predict.cards import Card, card, cards
from harness.predict.memory import ENGINES, Engine, Memory, captured, memory, profiled
from harness.predict.shapes import shape
from harness.scenario import scenarios_dir

WITHIN = 0.07
"""The error that is promised."""
SAME_SAMPLER = (frozenset({"v0", "v0-chunked", "v1"}), frozenset({"v1-0.17", "v1-0.18", "v1-0.21"}))
SAME_OTHER = (frozenset({"v0", "v0-chunked", "v1", "v1-0.17"}), frozenset({"v1-0.18", "v1-0.21"}))
"""Engines that share c, and those that share `other`."""


@dataclass(frozen=True, slots=True)
class KvLog:
    """One start of an engine, by the columns of the file. None: the source does not say."""

    source: str
    version: str | None
    engine: str
    """A key of memory.ENGINES."""
    card: str | None
    shape: str
    precision: str
    utilization: float | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    eager: bool
    kv_cache_dtype: str
    block_size: int
    total_memory_gib: float | None
    weights_gib: float | None
    non_torch_gib: float | None
    activation_gib: float | None
    graphs_gib: float | None
    """The engine's own estimate, whether it was subtracted or not."""
    kv_cache_gib: float | None
    """A cache of given size."""
    kv_gib: float | None
    kv_tokens: int | None
    note: str | None

    @property
    def complete(self) -> bool:
        """Whether the row counts."""
        said = (self.version, self.max_model_len, self.max_num_seqs, self.max_num_batched_tokens)
        size = self.utilization if self.kv_cache_gib is None else self.kv_cache_gib
        memory_known = self.card is not None or self.total_memory_gib is not None
        logged = self.kv_tokens is not None or self.kv_gib is not None
        return None not in (*said, size) and memory_known and logged

    @property
    def architecture(self) -> Architecture:
        return shape(self.shape).architecture

    @property
    def on(self) -> Card:
        """The card, with the memory that the log gives; without a name the catalogue's nearest stands in.

        Only memory, and how the generation stores weights, matter here.
        """
        if self.total_memory_gib is None:
            return card(self.card or "")
        total = self.total_memory_gib
        found = card(self.card) if self.card else min(cards(), key=lambda other: abs(other.memory_gib - total))
        return replace(found, memory_gib=total)


def read(path: Path | None = None) -> list[KvLog]:
    with (path or scenarios_dir() / "catalogue" / "kv_logs.csv").open(encoding="utf-8", newline="") as file:
        return [_log(row) for row in csv.DictReader(file)]


def predicted(log: KvLog, engines: dict[str, Engine] = ENGINES) -> Memory:
    """What memory.py says of a row; where a row is silent, of that engine's defaults.

    The longest context is no condition here: an engine logs the size of its cache and then finds that it is too small.
    """
    engine = engines[log.engine]
    return memory(
        log.on,
        log.architecture,
        log.precision,
        gpu_memory_utilization=0.9 if log.utilization is None else log.utilization,
        max_num_seqs=log.max_num_seqs or 256,
        max_num_batched_tokens=_tokens(log, engine),
        max_model_len=1,
        block_size=log.block_size,
        kv_cache_gib=log.kv_cache_gib,
        eager=log.eager,
        kv_bits=8 if log.kv_cache_dtype == "fp8" else 16,
        engine=engine,
    )


def error(log: KvLog, engines: dict[str, Engine] = ENGINES) -> float:
    """Predicted over logged, less one: of the tokens, else of the GiB."""
    said = predicted(log, engines)
    if log.kv_tokens is not None:
        return said.kv_tokens / log.kv_tokens - 1
    assert log.kv_gib is not None
    return said.kv_gib / log.kv_gib - 1


def fit(logs: Iterable[KvLog]) -> dict[str, Engine]:
    """The engines with their constants fitted to these logs: medians; what no log bears on stays as it is.

    c: (logged peak − T·4H) / (R·V), where the sampler makes the peak. other: what was logged beside PyTorch.
    """
    logs = [log for log in logs if log.complete and log.kv_cache_gib is None]
    fitted: dict[str, Engine] = dict(ENGINES)
    for names in SAME_SAMPLER:
        if each := [c for log in logs if log.engine in names and (c := logit_bytes(log)) is not None]:
            fitted |= {name: replace(fitted[name], logit_bytes=round(statistics.median(each), 1)) for name in names}
    for names in SAME_OTHER:
        if rest := [log.non_torch_gib for log in logs if log.engine in names and log.non_torch_gib is not None]:
            fitted |= {name: replace(fitted[name], other_gib=round(statistics.median(rest), 2)) for name in names}
    return fitted


def graphs(logs: Iterable[KvLog]) -> list[tuple[int, float]]:
    """(graphs to capture, the engine's estimate in GiB) of each log that has one."""
    return [
        (captured(log.max_num_seqs), log.graphs_gib)
        for log in logs
        if log.complete and log.graphs_gib is not None and log.max_num_seqs is not None
    ]


def _tokens(log: KvLog, engine: Engine) -> int:
    batched = log.max_num_batched_tokens or 2048
    return max(batched, log.max_model_len or 0) if engine.whole_prompts else batched


def logit_bytes(log: KvLog) -> float | None:
    """c as one log has it; None where the MLP makes the peak, or no peak was logged."""
    engine, shape = ENGINES[log.engine], log.architecture
    tokens = _tokens(log, engine)
    mlp, logits = profiled(shape, log.max_num_seqs or 0, tokens, engine)
    if log.activation_gib is None or mlp >= logits * engine.logit_bytes + tokens * 4 * shape.hidden:
        return None
    return (log.activation_gib * GIB - tokens * 4 * shape.hidden) / logits


def _log(row: dict[str, str]) -> KvLog:
    values: dict[str, object] = {}
    for field in fields(KvLog):
        cell, kind = row[field.name], str(field.type)
        if kind.startswith("bool"):
            values[field.name] = cell == "yes"
        elif not cell:
            values[field.name] = None
        else:
            values[field.name] = (
                float(cell) if kind.startswith("float") else int(cell) if kind.startswith("int") else cell
            )
    return KvLog(**values)  # type: ignore[arg-type]
