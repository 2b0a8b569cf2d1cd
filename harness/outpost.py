"""A session of a sweep on another machine than the one that owns its run: measured there, written here.

    node      engine ─► load ─► Outpost ── parcels, in order ──►  owner: the one RunDirectory

What a session finds goes to the owner as it goes to the disk on one machine: requests as they end, a row as its cell
ends, and a cell is done when the owner has its row. So a node that is lost costs the cell that it was measuring, and
nothing that was finished. This module knows nothing of what carries parcels and errands: that is cluster.py.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from harness.budget import Budget
from harness.engines import LOOPBACK, EngineInfo
from harness.errors import EngineError, KneebenchError, RunError
from harness.load.generators import Generators
from harness.load.selftest import read_ceiling
from harness.records import Cell, GpuSample, RequestRecord, SweepPoint
from harness.redact import redact
from harness.rundir import fresh, write_record
from harness.search import Search
from harness.sweep import Opener, Plan, Run, Session

FLUSH_S = 0.5
"""Requests and samples travel together for as long; a row takes all that is waiting with it, at once."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A session to be measured on a node, with what its owner knows of its cells."""

    session: Session
    plan: Plan
    template: SweepPoint
    opener: Opener
    done: tuple[SweepPoint, ...] = ()
    """Rows of this session's cells, which are not measured again."""
    begun: Mapping[str, int] | None = None
    """The highest attempt at each cell that was begun before, here or elsewhere."""
    away: int = 0
    """Load generators on other nodes; 0: the load is made beside the engine."""


@dataclass(frozen=True, slots=True)
class Ended:
    """In words why a session ended before its last cell; `again`: not by its engine, so it may be tried elsewhere."""

    why: str
    again: bool


@dataclass(frozen=True, slots=True)
class File:
    """A text file of the run directory: what an engine said of itself, or its log."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """Something for whoever watches; `stays`: a line of its own."""

    text: str
    stays: bool = False


Item = Cell | RequestRecord | GpuSample | SweepPoint | File | Said
"""A Cell: it begins. Everything that was found in it follows, its row at last."""


class Outpost:
    """The Rows and the Observer of a session whose run directory is elsewhere. Use as a context manager.

    `send` takes items in their order and returns when the owner has them. Raises what `send` raises.
    """

    def __init__(
        self,
        send: Callable[[tuple[Item, ...]], None],
        done: tuple[SweepPoint, ...],
        scratch: Path,
        host: str = LOOPBACK,
    ) -> None:
        self.done = done
        self.host = host
        self.scratch = scratch
        """Where this machine keeps the files of the session until they are sent."""
        self._send = send
        self._waiting: deque[Item] = deque()  # GPU samples come from a thread of their own
        self._sent_s = time.monotonic()
        self._log: Path | None = None
        """Of the engine that runs, or ran last."""
        self._stage = ""

    def __enter__(self) -> Outpost:
        return self

    def __exit__(self, *_: object) -> None:
        self._take_log()
        self._flush()

    def add_request(self, record: RequestRecord) -> None:
        self._add(record)

    def add_gpu_sample(self, sample: GpuSample) -> None:
        self._waiting.append(sample)

    def add_point(self, point: SweepPoint) -> None:
        """With the engine's log so far: a node that is lost takes no more of it along than of the cells."""
        self._take_log()
        self._waiting.append(point)
        self._flush()

    def fresh(self, stem: str, suffix: str) -> Path:
        self._take_log()  # of the engine before, which has ended
        self._log = fresh(self.scratch, stem, suffix)
        return self._log

    def describe_engine(self, log: Path, info: EngineInfo) -> None:
        """Sent at once: rows of a node that is lost later still have the settings that they were measured with."""
        path = log.with_suffix(".json")
        write_record(path, info)
        self._add(File(path.name, path.read_text(encoding="utf-8")), now=True)

    def status(self, text: str) -> None:
        """Each stage once: several sessions share the owner's one line."""
        stage = re.sub(r" \(\d+ s\)$", "", text)
        if stage != self._stage:
            self._stage = stage
            self._add(Said(text), now=True)

    def note(self, text: str) -> None:
        self._add(Said(text, stays=True))

    def cell_begins(self, cell: Cell, number: int, total: int) -> None:
        self._add(cell, now=True)

    def request_ended(self, record: RequestRecord) -> None:
        pass

    def cell_ended(self, point: SweepPoint) -> None:
        pass

    def _add(self, item: Item, *, now: bool = False) -> None:
        self._waiting.append(item)
        if now or time.monotonic() - self._sent_s > FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        items = tuple(self._waiting.popleft() for _ in range(len(self._waiting)))
        self._sent_s = time.monotonic()
        if items:
            self._send(items)

    def _take_log(self) -> None:
        if self._log is not None and self._log.exists():
            self._waiting.append(File(self._log.name, self._log.read_text(encoding="utf-8", errors="replace")))


def run(
    errand: Errand,
    send: Callable[[tuple[Item, ...]], None],
    scratch: Path,
    hired: AbstractContextManager[Generators],
    host: str = LOOPBACK,
) -> Ended | None:
    """Measure the session on this machine, whose address for the load is `host`. None: to its last cell.

    Paths in the words of an end are the node's; where they name its scratch directory, they name the run's instead.
    """
    with Outpost(send, errand.done, scratch, host) as rows:
        plan = replace(errand.plan, ceiling=read_ceiling())
        begun = errand.begun or {}
        spent_s = sum(row.duration_s or 0.0 for row in errand.done)
        budget = None
        if plan.search is not None:
            budget = Budget.share(plan.search, len(errand.done), time.monotonic() - spent_s, 1)
        try:
            with hired as generators:
                open_engine = errand.opener(rows, rows.status)
                session = Run(plan, rows, open_engine, rows, generators, [], begun, 0, budget)
                session.session(errand.session, errand.template)
        except KneebenchError as error:
            again = isinstance(error, RunError) and not isinstance(error, EngineError)
            return Ended(redact(str(error), {str(scratch): "<run>"}), again)
    return None


def share(search: Search, sessions: int) -> Search:
    """A session's even part of a search's budget: on a cluster the precisions are looked at side by side."""
    return replace(search, max_cells=math.ceil(search.max_cells / sessions), max_minutes=search.max_minutes / sessions)
