"""Finds the steps of a generation: the prefill, and each decode step.

vLLM marks them: its worker names every forward pass by what is in it. Where a recording holds no such mark (a timeline
of kernels alone, CUDA graphs replayed), a step is what lies between two samplings: it begins with the first launch
after the longest pause between the last sampling and the next matrix multiplication or attention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from harness.errors import InputError
from harness.telemetry.kernels import Launch, Mark, Recording, Step, Trace, kind_of

# execute_context_1(128)_generation_0(0): vLLM 0.32, v1/worker/gpu_worker.py, requests and tokens still in their prompt
# and those that generate. With detailed_trace_annotation: execute_128_context_1(sq128sk128...)_generation_0(sq0sk0...).
_CONTEXT = re.compile(r"^execute_(?:\d+_)?context_(\d{1,9})\(.*\)_generation_(\d{1,9})\(.*\)$")
# Before: execute_new_1_cached_0. The later parts of a prompt that is read in parts are among the cached.
_NEW = re.compile(r"^execute_new_(\d{1,9})_cached_(\d{1,9})$")
_MODEL = frozenset({"gemm", "fused", "dequant", "attention"})
"""Kinds that only a forward pass has."""

Phase = Literal["prefill", "decode"]


def trace(precision: str, recording: Recording) -> Trace:
    """A recording with its steps. Raises InputError when no step can be found."""
    return Trace(precision, recording.device, recording.profiler, recording.launches, find(recording))


def find(recording: Recording) -> tuple[Step, ...]:
    """The steps, by their begin. Raises InputError when there are neither marks nor samplings."""
    launches = recording.launches
    marked = [(mark.begin_us, phase_of(mark)) for mark in recording.marks if _is_step(mark)]
    if any(phase for _, phase in marked):
        return _steps(launches, marked)
    begins = _by_sampling(launches)
    if not begins:
        raise InputError(
            "no step can be found in the trace: the engine has marked none, and no kernel that samples is in it",
            allowed="a trace of a whole generation by vLLM",
            remedy="record with `bench trace`, or with vLLM's /start_profile and --profiler-config",
        )
    return _steps(launches, list(zip(begins, _phases(launches, begins), strict=True)))


def _is_step(mark: Mark) -> bool:
    return bool(_CONTEXT.match(mark.name) or _NEW.match(mark.name))


def phase_of(mark: Mark) -> Phase | None:
    """What a mark says of its step; None: nothing was in it, or it marks no step."""
    found = _CONTEXT.match(mark.name) or _NEW.match(mark.name)
    if found is None:
        return None
    reading, generating = int(found[1]), int(found[2])
    return "prefill" if reading else "decode" if generating else None


def _steps(launches: Sequence[Launch], begins: Sequence[tuple[float, Phase | None]]) -> tuple[Step, ...]:
    """Steps from their begins; each ends with its last launch before the next begin. Empty passes bound the others."""
    steps: list[Step] = []
    place = 0
    for (begin, phase), (until, _) in pairwise([*begins, (float("inf"), None)]):
        while place < len(launches) and launches[place].begin_us < begin:
            place += 1
        end = begin
        while place < len(launches) and launches[place].begin_us < until:
            end = max(end, launches[place].end_us)
            place += 1
        if phase is not None and end > begin:
            steps.append(Step(len(steps), phase, begin, min(end, until)))
    return tuple(steps)


def _by_sampling(launches: Sequence[Launch]) -> list[float]:
    """Begins of the steps of a bare timeline; a last one that has not come to its sampling is left out."""
    begins: list[float] = []
    between: list[Launch] = []  # since the last sampling, or the begin, until the model works
    working = sampled = False
    for launch in launches:
        kind = kind_of(launch.name)
        if not working or sampled:
            between.append(launch)
            if kind in _MODEL:
                begins.append(_after_pause(between, first=not begins))
                working, sampled, between = True, False, []
                continue
        if kind == "sampling" and working:
            sampled, between = True, [launch]
    return begins if sampled else begins[:-1]


def _after_pause(between: Sequence[Launch], first: bool) -> float:
    """Begin of the launch after the longest pause; of the very first step, of the first launch."""
    if first:
        return between[0].begin_us
    pauses = [after.begin_us - before.end_us for before, after in pairwise(between)]
    return between[1 + pauses.index(max(pauses))].begin_us


def _phases(launches: Sequence[Launch], begins: Sequence[float]) -> list[Phase]:
    """Decode steps launch the same kernels, one like the other: what comes before the first such step is the prefill.

    Compared by the names of matrix multiplications and attention, whose kernels differ between one token and many, as a
    rule: at least the first step is taken for a prefill, because a recording begins with its generation.
    """
    made: list[frozenset[str]] = []
    place = 0
    for _, until in pairwise([*begins, float("inf")]):
        names = set()
        while place < len(launches) and launches[place].begin_us < until:
            if kind_of(launches[place].name) in _MODEL:
                names.add(launches[place].name)
            place += 1
        made.append(frozenset(names))
    usual, _ = Counter(made).most_common(1)[0]
    first = max(1, made.index(usual))
    return ["prefill" if index < first else "decode" for index in range(len(made))]
