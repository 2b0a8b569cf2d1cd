"""Finds the failure modes of the catalogue in engine logs and in the rows of a run. Pure functions.

    engine.log ─► message by message ─► signatures of catalogue.py ─┐
    points.csv ─► thresholds below ─────────────────────────────────┴─► Met: which mode, by which line, how often

A log is read in the order of its starts. What stands before «Application startup complete.» counts for the modes of a
start, and only if that start never came up: what was survived is no failure. What stands after it counts for the modes
of service, until the engine itself says that it shuts down: the errors of an orderly end are no death.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness.engines.catalogue import MODES, SILENT, STORM, STORM_IN_LOG, Mode
from harness.records import SweepPoint
from harness.redact import redact

KV_FULL = 0.95
"""As in analysis/knee.py: from here on the next sequence has to wait or to evict one."""
LONGEST = 300
"""Characters of a log line that a report shows."""

BY_ID: Mapping[str, Mode] = {mode.id: mode for mode in MODES}
_SIGNATURES = [(mode, re.compile(signature)) for mode in MODES for signature in mode.seen_in]
# One match for the many lines that are no sign of anything; a group's name may stand once in an expression.
_ANY = re.compile("|".join(re.sub(r"\(\?P<\w+>", "(?:", signature.pattern) for _, signature in _SIGNATURES))

# «(EngineCore pid=12) », «[rank0]: », «vllm-1  | »: who says it; «ERROR 11-21 20:10:06 [core.py:1512] »: how loud.
_WHO = re.compile(r"^(?:[\w.-]+\s+\| )?(?:\([A-Za-z][^()]{0,99} pid=\d+[^()]{0,99}\)\s?)?(?:\[rank\d+\]:\s?)?")
_LEVEL = re.compile(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ (?:\[[^\]]+\]|\S+\])\s?")
_RAISED = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b(?::|$)|Fatal Python error: )")
_CLASS = re.compile(r"^[\w.]*(?:Error|Exception)(?:: |$)")
_PYDANTIC = re.compile(r"^\s*Value error, |(?<!\s)\s*\[type=\w.*$")
_FRAME = re.compile(r'^\s+File ".*", line \d+, in (\S+)')

_BEGINS = re.compile(r"non-default args: |Initializing an? (?:V1 )?LLM engine|vLLM API server version ")
_STARTED = "Application startup complete."
_SERVES = re.compile(r"EngineCore encountered a fatal error|Engine \d+: Avg prompt throughput")
_ENDS = re.compile(r"\[shutdown\] (?:EngineCore: |API server: shutdown triggered)")


@dataclass(frozen=True, slots=True)
class Met:
    """A failure mode that was met, and by what."""

    mode: Mode
    line: str
    """The first line of the log that shows it, redacted; of rows, which rows show it by which figures."""
    line_number: int | None = None
    """From 1; None: found in rows."""
    count: int = 1
    """Lines (or rows) that show it; every process above the one where it happened repeats it."""
    where: str = ""
    """The log's name, or points.csv."""


@dataclass(frozen=True, slots=True)
class Message:
    """One line of a log without who says it and how loud."""

    number: int
    text: str
    raised: bool = False
    """Whether it is an exception's own line: its name and words; of pydantic's, which come in two lines, the words."""
    frames: tuple[str, ...] = ()
    """Of an exception: the functions on the traceback that led to it, the innermost last."""


def messages(log: str) -> Iterator[Message]:
    """The lines of a log, stripped to what they say."""
    frames: list[str] = []
    invalid = False
    for number, line in enumerate(log.splitlines(), 1):
        text = _PYDANTIC.sub("", _LEVEL.sub("", _WHO.sub("", line)))
        if frame := _FRAME.match(text):
            frames.append(frame[1])
        elif text.startswith("Traceback (most recent call last)"):
            frames = []
        raised, invalid = invalid or bool(_RAISED.match(text)), " validation error" in text
        raised = raised and not invalid
        yield Message(number, text.strip() if raised else text, raised, tuple(frames) if raised else ())
        if raised:
            frames = []  # its own: a log of nothing but tracebacks takes no longer than any other


def mode_of(message: Message, when: Literal["load", "service"] | None = None) -> Mode | None:
    """The mode whose signature the message is; `when` it was said, None: not known.

    Tried with the functions of its traceback first (`in load_file: MemoryError` says more than MemoryError), then as
    it stands, then without the exception's name.
    """
    bare = _CLASS.sub("", message.text, count=1)
    for text in (*(f"in {frame}: {message.text}" for frame in reversed(message.frames)), message.text, bare):
        if _ANY.match(text):
            for mode, signature in _SIGNATURES:
                if (when is None or mode.when in (when, "any")) and (found := signature.match(text)) and _enough(found):
                    return mode
    return None


def _enough(found: re.Match[str]) -> bool:
    """Whether the figures that a signature names are large enough to be a failure."""
    said = {name: float(value) for name, value in found.groupdict().items() if value is not None}
    if "preemptions" in said:
        return said["preemptions"] >= STORM_IN_LOG
    if "waiting" in said:
        return said["waiting"] >= max(1, said["running"])
    return True


def advice(mode: Mode) -> str:
    """What it means and what to do, in one line."""
    return f"{mode.means}: {mode.remedy}"


def find_modes(log: str) -> list[Met]:
    """The failure modes in an engine's log (one start or several), in the order in which they show."""
    found: list[Met] = []
    pending: list[Met] = []  # of a start that may still come up
    when: Literal["load", "service", "ended"] = "load"
    for message in messages(log):
        if message.text.endswith(_STARTED) or _SERVES.match(message.text):
            found += [met for met in pending if met.mode.when == "any"]
            pending, when = [], "service"
        elif _BEGINS.match(message.text):
            when = "load"
        elif _ENDS.match(message.text):
            when = "ended"
        if when == "ended" or (mode := mode_of(message, when)) is None:
            continue
        met = Met(mode, redact(message.text.strip())[:LONGEST], message.number)
        (pending if when == "load" else found).append(met)
    return _told_once(found + pending)


def diagnose(text: str) -> list[Met]:
    """What an engine's log says of failures, for `bench doctor --engine-log`; the kernel's log may stand in it too."""
    return find_modes(text)


def modes_of_rows(points: Sequence[SweepPoint]) -> list[Met]:
    """The failure modes that show in counters and not in logs; a mode once, with the rows that show it.

    preemption_storm   preemptions / requests ≥ STORM (5 %): p95 is then a request that was computed again. Preemptions
                       are counted over the whole cell, requests in its window: the share is an upper bound.
    kv_cache_full      kv_usage_peak ≥ KV_FULL, or a preemption below a storm
    queueing           waiting_peak ≥ running_peak ≥ 1, and neither of the above in that row. By Little's law a queue
                       as long as what is served doubles the time until an answer is complete.
    throttled, slow_kernel, engine_died, requests_failed
                       as analysis/validity.py judged them
    """
    found = [
        Met(BY_ID[id], f"{point.precision}, {_load(point)}: {evidence}", where="points.csv")
        for point in points
        for id, evidence in _of_row(point)
    ]
    return _told_once(found, apart=True)


def found_in(logs: Mapping[str, str], points: Sequence[SweepPoint]) -> list[Met]:
    """What a run's engine logs (by file name) and its rows say of failures: log by log, then the rows."""
    found = [replace(met, where=Path(name).name) for name, text in logs.items() for met in find_modes(text)]
    return found + modes_of_rows(points)


def _of_row(point: SweepPoint) -> Iterator[tuple[str, str]]:
    reasons = point.verdict_reasons
    if point.preemptions and point.preemptions >= STORM * point.requests:
        yield "preemption_storm", f"{point.preemptions} preemptions in {point.requests} requests"
    elif point.preemptions:
        yield "kv_cache_full", f"{point.preemptions} preemptions in {point.requests} requests"
    elif (point.kv_usage_peak or 0.0) >= KV_FULL:
        yield "kv_cache_full", f"KV cache {100 * (point.kv_usage_peak or 0.0):.0f} % full"
    elif point.waiting_peak and point.running_peak and point.waiting_peak >= point.running_peak:
        yield "queueing", f"{point.waiting_peak} waiting, {point.running_peak} running"
    if "throttled" in reasons:
        heat = "" if point.temperature_c_max is None else f", up to {point.temperature_c_max:.0f} °C"
        yield "throttled", f"slowed down in {100 * (point.throttled_share or 0.0):.0f} % of the samples{heat}"
    if "slow_kernel" in reasons:
        yield "slow_kernel", f"kernel {point.kernel}"
    if died := {"engine_died", "engine_restarted"} & set(reasons):
        yield "engine_died", " and ".join(sorted(died))
    if "errors" in reasons:
        yield "requests_failed", f"{point.errors} failed, {point.requests} answered"


def _load(point: SweepPoint) -> str:
    return f"{point.conc} users" if point.rate_rps is None else f"{point.rate_rps:g} requests a second"


def _told_once(found: Sequence[Met], *, apart: bool = False) -> list[Met]:
    """Each mode once, by its first line, with the count of them; without those that another one explains.

    `apart`: the findings are of different rows, which explain nothing of each other.
    """
    first: dict[str, Met] = {}
    for met in found:
        known = first.get(met.mode.id)
        first[met.mode.id] = met if known is None else replace(known, count=known.count + met.count)
    return [met for met in first.values() if apart or first.keys().isdisjoint(met.mode.unless)]


def document() -> str:
    """docs/failure-modes.md: the catalogue as a page; written anew by `python -m harness.engines.modes > FILE`."""
    when = {"load": "at load", "service": "in service", "any": "at any time"}
    table = ["| What fails | When | What it means |", "| --- | --- | --- |"]
    table += [f"| [{mode.title}](#{mode.id}) | {when[mode.when]} | {mode.means} |" for mode in MODES]
    parts = [_HEAD, "\n".join(table)]
    for mode in MODES:
        signs = [f"- log: `{signature}`" for signature in mode.seen_in] + [f"- rows: {mode.rows}"] * bool(mode.rows)
        explained = f" Not told beside {_listed(mode.unless)}." if 0 < len(mode.unless) < len(MODES) // 2 else ""
        seen = "; ".join(_source(source) for source in mode.sources)
        parts.append(
            f'<a id="{mode.id}"></a>\n\n## {mode.title}\n\n`{mode.id}`, {when[mode.when]}: {mode.means}.{explained}\n\n'
            + "\n".join(signs)
            + f"\n\n**What to do:** {mode.remedy}.\n\nSeen: {seen}."
        )
    silent = ["| What | What was seen | How kneebench finds it |", "| --- | --- | --- |"]
    silent += [f"| {what} | {seen} | {found} |" for what, seen, found in SILENT]
    parts += [_SILENT_HEAD, "\n".join(silent)]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Failure modes of operation

How serving fails, how each failure looks, and what to do about it. This page is generated from
`harness/engines/catalogue.py`, which is also what `bench doctor --engine-log FILE`, the error of an engine that does
not start, and the reports look for; a test holds the two together.

A signature must match at the beginning of a message, after the process's name, the level and the exception's name are
taken off: a line that only quotes an error is no sign of one. `in function: ...` stands for an exception with that
function on its traceback. What an engine survived while starting, and what it says while it shuts down in order, does
not count. Thresholds on rows stand in `harness/engines/modes.py`, those of verdicts in `harness/analysis/validity.py`.

Where a mode was seen: `tests/logs` and `tests/data` hold excerpts. Those that name no thread were provoked here on vLLM
0.32.0 (CPU); paths of `vllm/` are files of that version; a link is the public thread that a line was taken from. No
signature of a CUDA error was provoked here: this catalogue was made without a card."""

_SILENT_HEAD = """## What the log does not say

Provoked on vLLM 0.32.0, and not a word in its log. So a clean log proves little."""


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(f"`{id}`" for id in ids)


def _source(source: str) -> str:
    return f"<{source}>" if source.startswith("https://") else f"`{source}`"


if __name__ == "__main__":
    print(document(), end="")
