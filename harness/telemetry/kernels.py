"""A generation as a profiler saw it: launches, steps, and what kind of work each launch is.

    torch_trace.py, nsys.py ─► Recording (launches, marks) ─► steps.py ─► Trace ─► rows() ─► kernels.csv

On a card a launch is a kernel, a copy or a fill, and a lane is a stream; on a processor it is an operator that does
work, and a lane is a thread. Which kind of work a name stands for is data: scenarios/catalogue/kernels.toml, an ordered
list of patterns without a catch-all. What no pattern knows is `other`, and its share is told.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from harness.errors import InputError
from harness.records import KernelRow
from harness.scenario import scenarios_dir

CATALOGUE = Path("catalogue") / "kernels.toml"
"""In scenarios/."""

KINDS = ("gemm", "dequant", "fused", "attention", "elementwise", "sampling", "copy")
"""gemm: matrix multiplication in 16 bits or more. dequant: packed weights to 16 bits, nothing else. fused: both at
once, so that the unpacked weights never reach memory. elementwise: norms, activations, rotary positions, residuals,
embeddings and the small change of a step. copy: moves bytes, fills and index lists."""
HOST = "host"
"""In the table only: operators of a processor's trace that touch no data. They are no launches, their time is gap."""
OTHER = "other"
"""No pattern knows the name."""
GAP = "host gap"
"""Nothing runs in any lane: the device waits for the host. On a processor: between operators, in Python."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One piece of work of the device, in µs of the profiler's clock."""

    name: str
    begin_us: float
    end_us: float
    busy_us: float
    """Without what was launched inside it in its lane, so that the busy time of a lane adds up to no more than the
    time that passed: `exclusive`."""
    lane: str
    """stream 7, thread 1234."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A range that the engine named, in the time of the device: from the first launch asked for in it to the last."""

    name: str
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Range:
    """The same in the host's time, on one of its threads."""

    name: str
    thread: str
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Recording:
    """What a profiler's file holds, before anything is made of it."""

    device: Literal["gpu", "cpu"]
    profiler: Literal["torch", "nsys"]
    launches: tuple[Launch, ...]
    """By their begin."""
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass and the sampling of its token."""

    index: int
    phase: Literal["prefill", "decode"]
    begin_us: float
    end_us: float
    """Of its last launch. What lies between this and the next step's begin is host gap."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One generation of one precision."""

    precision: str
    device: Literal["gpu", "cpu"]
    profiler: Literal["torch", "nsys"]
    launches: tuple[Launch, ...]
    """By their begin; also those before the first step and after the last."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line of the table: names that match are of this kind, unless an earlier line knew them."""

    kind: str
    match: re.Pattern[str]
    what: str
    """What it is and where it was seen."""
    seen: tuple[str, ...]
    """Names as profilers show them; the tests hold the table to them."""
    whole: bool = False
    """Of an operator on a processor: what runs inside belongs to it."""


@functools.cache
def classes() -> tuple[Pattern, ...]:
    """The table of patterns, in order. Raises InputError naming the line that cannot be used."""
    return read_classes(scenarios_dir() / CATALOGUE)


def read_classes(path: Path) -> tuple[Pattern, ...]:
    """A table of patterns of one's own."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["kernel"]
        return tuple(_pattern(line) for line in table)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a table of kernels ({error})", allowed="[[kernel]] kind, match, what") from error


def _pattern(line: dict[str, object]) -> Pattern:
    kind, match = str(line["kind"]), str(line["match"])
    if kind not in (*KINDS, HOST):
        raise ValueError(f"{match}: kind {kind} is none of {', '.join((*KINDS, HOST))}")
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ValueError(f"{match}: {error}") from error
    seen = line.get("seen", ())
    examples = tuple(map(str, seen)) if isinstance(seen, list) else ()
    return Pattern(kind, pattern, str(line["what"]), examples, line.get("whole") is True)


@functools.cache
def pattern_of(name: str) -> Pattern | None:
    """The line of the table that knows the name; None: none does."""
    return next((pattern for pattern in classes() if pattern.match.search(name)), None)


def kind_of(name: str) -> str | None:
    """One of KINDS, or HOST, which no launch of a Recording is; None: no pattern knows the name."""
    pattern = pattern_of(name)
    return pattern.kind if pattern else None


# --- times ------------------------------------------------------------------------------------------------------------


def instant(told: Any) -> float:
    """A time of a profiler's file as a float. Raises ValueError: no number, or none that times can be compared with."""
    try:
        time = float(told)
    except OverflowError:
        time = math.inf
    if not math.isfinite(time):
        raise ValueError(f"{time} is no time")
    return time


def exclusive(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Busy time of each (begin, end) of one lane: at each instant the lane works for the one that began last.

    Nested operators leave their caller what they did not use; kernels that overlap (a launch that need not wait for the
    end of the one before) share the time that passed. So the sum is the length of the union.
    """
    order = sorted(range(len(spans)), key=lambda item: (spans[item][0], -spans[item][1]))
    busy = [0.0] * len(spans)
    open_: list[int] = []  # the latest begun last; those that ended are dropped when they come to the top
    now = 0.0

    def work_until(time: float) -> None:
        nonlocal now
        while open_ and now < time:
            top = open_[-1]
            until = min(spans[top][1], time)
            busy[top] += max(0.0, until - now)
            now = max(now, until)
            if spans[top][1] <= now:
                open_.pop()

    for item in order:
        work_until(spans[item][0])
        now = spans[item][0]
        open_.append(item)
    work_until(float("inf"))
    return busy


def covered_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def timed(spans: Sequence[tuple[str, float, float]], lanes: Sequence[str]) -> list[Launch]:
    """Launches of (name, begin, end), each with its lane, in the order given; busy times are exclusive in the lane."""
    members: dict[str, list[int]] = {}
    for item, lane in enumerate(lanes):
        members.setdefault(lane, []).append(item)
    busy = [0.0] * len(spans)
    for items in members.values():
        times = exclusive([spans[item][1:] for item in items])
        for item, time in zip(items, times, strict=True):
            busy[item] = time
    return [Launch(*span, time, lane) for span, time, lane in zip(spans, busy, lanes, strict=True)]


def ordered(launches: Iterable[Launch]) -> tuple[Launch, ...]:
    """By their begin; of two that begin together the longer first."""
    return tuple(sorted(launches, key=lambda launch: (launch.begin_us, -launch.end_us, launch.lane, launch.name)))


def projected(
    ranges: Iterable[Range], launches: Sequence[Launch], asked: Sequence[tuple[str, float] | None]
) -> tuple[Mark, ...]:
    """The host's ranges in the time of the card: from the first launch that was asked for inside to the last one's end.

    `asked`: thread and time of the call behind each launch; a graph's kernels share one call. A range inside which
    nothing was asked for has no mark.
    """
    calls: dict[str, list[tuple[float, float, float]]] = {}
    for launch, call in zip(launches, asked, strict=True):
        if call is not None:
            calls.setdefault(call[0], []).append((call[1], launch.begin_us, launch.end_us))
    for made in calls.values():
        made.sort()
    marks = []
    for item in ranges:
        made = calls.get(item.thread, [])
        first = bisect.bisect_left(made, item.begin_us, key=lambda call: call[0])
        last = bisect.bisect_right(made, item.end_us, key=lambda call: call[0])
        if first < last:
            inside = made[first:last]
            marks.append(Mark(item.name, min(call[1] for call in inside), max(call[2] for call in inside)))
    return tuple(sorted(marks, key=lambda mark: (mark.begin_us, -mark.end_us, mark.name)))


# --- rows -------------------------------------------------------------------------------------------------------------


def launches_of(trace: Trace) -> list[tuple[Step, float, list[Launch]]]:
    """Each step, the begin of the next one (its own end, for the last), and the launches that begin between the two."""
    found = []
    nexts = [*(after.begin_us for _, after in pairwise(trace.steps)), *(step.end_us for step in trace.steps[-1:])]
    place = 0
    for step, until in zip(trace.steps, nexts, strict=True):
        while place < len(trace.launches) and trace.launches[place].begin_us < step.begin_us:
            place += 1
        first = place
        while place < len(trace.launches) and trace.launches[place].begin_us < until:
            place += 1
        found.append((step, until, list(trace.launches[first:place])))
    return found


def rows(trace: Trace) -> list[KernelRow]:
    """Rows of kernels.csv: of each step its names by kind, the longest first, and its host gap.

    host gap = step_us - the time in which something works. In one lane that is the sum of the busy times, and the rows
    of a step add up to step_us. Several lanes overlap: there it is the union of their launches, and the rows of a step
    add up to more than step_us.
    """
    table = []
    origin = trace.steps[0].begin_us if trace.steps else 0.0
    for step, until, launches in launches_of(trace):
        times: dict[tuple[str, str], list[float]] = {}
        for launch in launches:
            times.setdefault((kind_of(launch.name) or OTHER, launch.name), []).append(launch.busy_us)
        found = [(kind, name, len(busy), sum(busy)) for (kind, name), busy in times.items()]
        found.sort(key=lambda line: (-line[3], line[0], line[1]))
        idle_us = max(0.0, until - step.begin_us - _working_us(launches, until))
        for kind, name, count, busy_us in [*found, (GAP, "", 0, idle_us)]:
            table.append(
                KernelRow(
                    precision=trace.precision,
                    step=step.index,
                    phase=step.phase,
                    step_begin_us=step.begin_us - origin,
                    step_us=until - step.begin_us,
                    kind=kind,
                    name=name,
                    launches=count,
                    busy_us=busy_us,
                )
            )
    return table


def _working_us(launches: Sequence[Launch], until: float) -> float:
    """How long something works. A processor's operators leave room for host work inside them, which is no work."""
    if len({launch.lane for launch in launches}) == 1:
        return sum(launch.busy_us for launch in launches)
    return covered_us((launch.begin_us, min(launch.end_us, until)) for launch in launches)


def classified(trace: Trace) -> float | None:
    """Share of the busy time inside the steps whose names the table knows; None: nothing works in them."""
    found = [launch for _, _, launches in launches_of(trace) for launch in launches]
    busy_us = sum(launch.busy_us for launch in found)
    known_us = sum(launch.busy_us for launch in found if kind_of(launch.name) is not None)
    return known_us / busy_us if busy_us else None
