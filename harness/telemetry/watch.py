"""Watches an engine's counters and memory while a cell runs, from a thread: the load's event loop is left alone.

The last scrape comes after the load has ended, and waits while the count of generated tokens still grows: a request
that was cut is worked on until the engine notices, and an engine may export its counters with a delay. (vLLM 0.32.0 on
a CPU did not: its first scrape, about 10 ms after the load, was final.) The counters are the whole engine's: what
others ask of it is in them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.engines import Engine, EngineCounters

PERIOD_S = 1.0
SETTLE_S, SETTLE_SCRAPES = 0.2, 10
"""After the load: this long between two scrapes, and at most so many. On a shared server the count never rests."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the counters said over a cell; None where the engine exports none."""

    running_peak: int | None = None
    waiting_peak: int | None = None
    kv_usage_peak: float | None = None
    preemptions: int | None = None
    prefix_hit_share: float | None = None
    prompt_tokens: int | None = None
    """Read over the whole cell, cached ones included."""
    generation_tokens: int | None = None
    """Made over the whole cell."""
    memory_gib: float | None = None


class EngineWatch:
    """`with EngineWatch(engine) as watch: ...; watch.seen()` - scrapes at the start, once a second, and at the end.

    The end waits up to 2 s for the counters to rest, 0.2 s as a rule, not at all without counters or after an error.
    """

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
        if kind is None:
            self._settle()

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

    def _settle(self) -> None:
        for _ in range(SETTLE_SCRAPES):
            before = self._samples[-1].generation_tokens_total
            if before is None:
                return
            time.sleep(SETTLE_S)
            self._samples.append(self._engine.counters())
            if self._samples[-1].generation_tokens_total == before:
                return


def counters_seen(samples: Sequence[EngineCounters]) -> Seen:
    """Peaks of the gauges and growth of the totals from the first sample to the last.

    A total that fell began anew with a restarted engine, and its growth is not known. The tokens are a cross-check of
    our own count, so theirs is known only where the first and the last sample tell them: half a count is a wrong one.
    """

    def known(name: str) -> list[Any]:
        return [value for sample in samples if (value := getattr(sample, name)) is not None]

    def growth(name: str) -> int | None:
        values = known(name)
        return values[-1] - values[0] if len(values) > 1 and values == sorted(values) else None

    def whole_growth(name: str) -> int | None:
        ends = [samples[0], samples[-1]] if samples else []
        return growth(name) if None not in [getattr(end, name) for end in ends] else None

    queries, hits = growth("prefix_queries_total"), growth("prefix_hits_total")
    return Seen(
        running_peak=max(known("running"), default=None),
        waiting_peak=max(known("waiting"), default=None),
        kv_usage_peak=max(known("kv_usage"), default=None),
        preemptions=growth("preemptions_total"),
        prefix_hit_share=hits / queries if queries and hits is not None else None,
        prompt_tokens=whole_growth("prompt_tokens_total"),
        generation_tokens=whole_growth("generation_tokens_total"),
    )
