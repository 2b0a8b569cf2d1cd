"""Watches an engine's counters and memory while a cell runs, from a thread: the load's event loop is left alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.engines import Engine, EngineCounters

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the counters said over a cell; None where the engine exports none."""

    running_peak: int | None = None
    waiting_peak: int | None = None
    kv_usage_peak: float | None = None
    preemptions: int | None = None
    prefix_hit_share: float | None = None
    memory_gib: float | None = None


class EngineWatch:
    """`with EngineWatch(engine) as watch: ...; watch.seen()` - scrapes at the start, once a second, and at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._samples: list[EngineCounters] = []
        self._memory: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)

    def __enter__(self) -> EngineWatch:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def seen(self) -> Seen:
        """Peaks and growth over the samples taken so far."""
        return replace(counters_seen(self._samples), memory_gib=max(self._memory, default=None))

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._take()

    def _take(self) -> None:
        self._samples.append(self._engine.counters())
        memory = self._engine.memory_gib()
        if memory is not None:
            self._memory.append(memory)


def counters_seen(samples: Sequence[EngineCounters]) -> Seen:
    """Peaks of the gauges and growth of the totals from the first sample to the last."""

    def known(name: str) -> list[Any]:
        return [value for sample in samples if (value := getattr(sample, name)) is not None]

    def growth(name: str) -> int | None:
        values = known(name)
        return values[-1] - values[0] if len(values) > 1 else None

    queries, hits = growth("prefix_queries_total"), growth("prefix_hits_total")
    return Seen(
        running_peak=max(known("running"), default=None),
        waiting_peak=max(known("waiting"), default=None),
        kv_usage_peak=max(known("kv_usage"), default=None),
        preemptions=growth("preemptions_total"),
        prefix_hit_share=hits / queries if queries and hits is not None else None,
    )
