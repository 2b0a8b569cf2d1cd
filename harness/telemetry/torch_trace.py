"""Reads torch's profiler: Chrome's trace format, .json or .json.gz, of a card or of a processor.

A trace of two hundred tokens on a card is a million events, most of them the host's operators. So the file is never
held whole: events are cut out of the stream one by one, and of each only what is needed stays.

    cat                              on a card                               on a processor
    kernel, gpu_memcpy, gpu_memset   the launches                            (none)
    cuda_runtime, cuda_driver        who asked for them, by `correlation`    (none)
    cpu_op                           the host's own, left out                the launches, by thread
    user_annotation                  marks, put on the card's time           marks

Operators call operators: what counts is the exclusive time, and operators that touch no data (views, allocation,
dispatch; `host` in the table of patterns) are no launches at all. Their time is the host's, as it would be on a card.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from harness.errors import InputError
from harness.files import opened
from harness.telemetry.kernels import (
    HOST,
    Launch,
    Mark,
    Range,
    Recording,
    instant,
    ordered,
    pattern_of,
    projected,
    timed,
)

_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_CALLS = frozenset({"cuda_runtime", "cuda_driver"})
_OPERATOR, _ANNOTATION = "cpu_op", "user_annotation"
_KEPT = _WORK | _CALLS | {_OPERATOR, _ANNOTATION}
_CHUNK = 1 << 20
_LONGEST_EVENT = 16 << 20
"""Characters without the end of an event: that is no trace, however long one waits."""
_EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")
_decode = json.JSONDecoder(strict=False).raw_decode

_Span = tuple[str, float, float]
"""Name, begin and end in µs."""


def read(path: Path) -> Recording:
    """The launches and marks of a trace. Raises InputError naming the file for anything that is not a whole one."""
    work: list[_Span] = []
    lanes: list[str] = []
    correlations: list[int | None] = []
    asked_at: dict[int, tuple[str, float]] = {}
    operators: dict[str, list[_Span]] = defaultdict(list)
    ranges: list[Range] = []
    for category, event in _kept(path):
        try:
            begin_us = instant(event["ts"])
            span = (sys.intern(str(event["name"])), begin_us, begin_us + instant(event["dur"]))
            arguments = event.get("args") or {}
            correlation = arguments.get("correlation")
            if correlation is not None and not isinstance(correlation, int):
                raise TypeError("its correlation is no number")
            thread = f"thread {event.get('tid')}"
            if category in _WORK:
                work.append(span)
                lanes.append(f"stream {arguments.get('stream', event.get('tid'))}")
                correlations.append(correlation)
            elif category in _CALLS and correlation is not None:
                asked_at[correlation] = (thread, span[1])
            elif category == _OPERATOR:
                operators[thread].append(span)
            elif category == _ANNOTATION:
                ranges.append(Range(span[0], thread, span[1], span[2]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unusable(path, f"an event that is none ({type(error).__name__}: {error})") from error
    if work:
        launches = timed(work, lanes)
        asked = [asked_at.get(number) if number is not None else None for number in correlations]
        return Recording("gpu", "torch", ordered(launches), projected(ranges, launches, asked))
    if not operators:
        raise _unusable(path, "neither a kernel nor an operator is in it")
    on_threads = [launch for thread, spans in operators.items() for launch in _working(spans, thread)]
    marks = sorted((Mark(item.name, item.begin_us, item.end_us) for item in ranges), key=lambda mark: mark.begin_us)
    return Recording("cpu", "torch", ordered(on_threads), tuple(marks))


def _working(spans: Sequence[_Span], thread: str) -> list[Launch]:
    """The operators of a thread that do work, with their exclusive times."""
    looked_at = []
    whole_until = float("-inf")
    for span in sorted(spans, key=lambda span: (span[1], -span[2])):
        if span[1] < whole_until:
            continue
        pattern = pattern_of(span[0])
        if pattern is not None and pattern.whole:
            whole_until = span[2]
        looked_at.append(span)
    launches = timed(looked_at, [thread] * len(looked_at))
    return [launch for launch in launches if (pattern := pattern_of(launch.name)) is None or pattern.kind != HOST]


def rewrite(source: Path, target: Path) -> None:
    """A trace as it may be shown: what `read` takes from it and nothing else, in the same format, .json.gz.

    Without the machine's name, the places of files and the arguments of operators; times are as they were. The same
    events make the same bytes.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        with open(opened(partial), "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as out:
            out.write(b'{"schemaVersion": 1, "displayTimeUnit": "ms", "traceEvents": [')
            for number, (category, event) in enumerate(_kept(source)):
                arguments = event.get("args") or {}
                told = {name: arguments[name] for name in ("correlation", "stream") if name in arguments}
                line = {name: event.get(name) for name in ("ph", "cat", "name", "pid", "tid", "ts", "dur")}
                text = json.dumps(line | ({"args": told} if category in _WORK | _CALLS else {}))
                out.write((",\n" if number else "\n").encode() + text.encode())
            out.write(b"\n]}\n")
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# --- the stream -------------------------------------------------------------------------------------------------------


def _kept(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(category, event) of the events that matter."""
    for event in _events(path):
        category = str(event.get("cat", "")).lower()
        if event.get("ph") == "X" and category in _KEPT:
            yield category, event


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of `traceEvents`, one by one."""
    try:
        with _opened(path) as file:
            yield from _cut(file, path)
    except UnicodeDecodeError as error:
        raise _unusable(path, "it is no text") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _unusable(path, f"it cannot be unpacked ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _opened(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")


def _cut(file: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    text = ""
    found = None
    while found is None:
        more = file.read(_CHUNK)
        if not more:
            raise _unusable(path, "it has no traceEvents")
        text = text[-64:] + more  # the key may lie across two chunks
        found = _EVENTS.search(text)
    place = found.end()
    while True:
        place = _skipped(text, place)
        if text.startswith("]", place):
            return
        try:
            event, place = _decode(text, place)
        except json.JSONDecodeError as error:
            more = file.read(_CHUNK)
            if not more:
                raise _unusable(path, "it ends in the middle, or is damaged") from error
            text, place = text[place:] + more, 0
            if len(text) > _LONGEST_EVENT:
                raise _unusable(path, "it is damaged") from error
            continue
        except (ValueError, RecursionError) as error:  # a figure of 5,000 digits, deep nesting
            raise _unusable(path, "it is damaged") from error
        if not isinstance(event, dict):
            raise _unusable(path, "an event is no object")
        yield event


def _skipped(text: str, place: int) -> int:
    match = _BETWEEN.match(text, place)
    return match.end() if match else place


def _unusable(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: not a whole trace of torch's profiler: {problem}.",
        allowed="what the profiler writes, *.pt.trace.json or *.pt.trace.json.gz",
        remedy="record it again, and wait until /stop_profile has answered",
    )
