"""Where the time of a traced generation goes, by kind of kernel, and what another precision changes in it.

    kernels.csv ─► Profile (a series over decode steps of each kind and each name) ─► KindTime, Gap, Change, ratios

The sample is the decode steps of one generation. Two precisions generate after the same prompt, so their k-th steps
attend to as many tokens: steps are paired by k, and both halves of a pair are resampled together,

    difference = median other_k − median base_k         ratio = median base_k / median other_k

with 95 % intervals by a moving-block bootstrap over k (metrics.py). They hold how steps scatter, and know nothing of
how generations would: another start of the engine, another clock of the card, another prompt. Nor of what the profiler
adds. The last step is left out where there is another: nothing tells when the step after it would have begun.

Medians of kinds need not add up to the median step. A prefill is one sample, so it has no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.analysis.compare import Estimate, paired_percentile_ratio
from harness.analysis.metrics import block_bootstrap
from harness.records import KernelRow
from harness.telemetry.kernels import GAP, OTHER

Floats = NDArray[np.float64]

LINEAR = ("gemm", "fused", "dequant")
"""Kinds that multiply by weights: between precisions one takes the other's place, so they are also taken as one."""

BOUND, PART = 0.5, 0.2
"""Shares of a decode step in which nothing runs, for `Gap.verdict`. Above a half, all kernels together could not save
what the gaps cost; below a fifth, gaps cost less than a fifth of the speed."""

NOTABLE = 0.02
"""Share of a step from which a change of a kind is worth a word."""

Direction = Literal["shrank", "grew", "vanished", "new", "undecided"]
LaunchBound = Literal["yes", "in part", "no", "undecided"]


@dataclass(frozen=True, eq=False)
class Profile:
    """One precision's generation as series. Milliseconds; each decode series has one value a step, 0 where nothing ran
    of that kind or name. Compared by identity: arrays have no one equality."""

    precision: str
    steps_ms: Floats
    """Decode steps, each to the begin of the next."""
    kinds: Mapping[str, Floats]
    """Of the decode steps; `host gap` is one of them."""
    names: Mapping[tuple[str, str], Floats]
    """(kind, name) of the decode steps; the gap has no name and is not here."""
    launches: Floats
    """Launches in each decode step."""
    prefill_ms: float | None
    prefill_kinds: Mapping[str, float]
    prefill_steps: int
    decode_steps: int
    """All of them, the last one too, which `steps_ms` may lack."""

    @cached_property
    def step_ms(self) -> float | None:
        """The median decode step; None without one."""
        return float(np.median(self.steps_ms)) if len(self.steps_ms) else None

    def series(self, kinds: Iterable[str]) -> Floats:
        """Several kinds as one, step by step."""
        return sum((self.kinds[kind] for kind in kinds if kind in self.kinds), np.zeros_like(self.steps_ms))

    @property
    def unclassified(self) -> float | None:
        """Share of all busy time, prefill included, whose names no pattern knows; None where nothing was busy."""
        busy, unknown = 0.0, 0.0
        for kinds in ({kind: float(series.sum()) for kind, series in self.kinds.items()}, self.prefill_kinds):
            busy += sum(ms for kind, ms in kinds.items() if kind != GAP)
            unknown += kinds.get(OTHER, 0.0)
        return unknown / busy if busy else None


@dataclass(frozen=True, slots=True)
class KindTime:
    """One kind in the decode steps: the median step and the quartiles over steps, ms."""

    kind: str
    ms: float
    q25: float
    q75: float
    share: float
    """Of the median step."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The share of a decode step in which nothing runs, and what follows."""

    share: Estimate
    verdict: LaunchBound


@dataclass(frozen=True, slots=True)
class Change:
    """A kind, or one name of it, in two precisions: median ms of a decode step."""

    kind: str
    name: str
    """ "" for a whole kind."""
    base_ms: float
    other_ms: float
    difference: Estimate
    """other − base, ms."""
    direction: Direction


def profile(rows: Sequence[KernelRow]) -> Profile:
    """The rows of one precision as series. Raises ValueError for rows of several, or of none."""
    precisions = {row.precision for row in rows}
    if len(precisions) != 1:
        raise ValueError(f"rows of one precision are wanted, not of {len(precisions)}")
    prefill = [row for row in rows if row.phase == "prefill"]
    decode = [row for row in rows if row.phase == "decode"]
    steps = sorted({row.step for row in decode})
    kept = steps[:-1] if len(steps) > 1 else steps
    place = {step: at for at, step in enumerate(kept)}
    steps_ms, launches = np.zeros(len(kept)), np.zeros(len(kept))
    kinds: dict[str, Floats] = {}
    names: dict[tuple[str, str], Floats] = {}
    for row in decode:
        at = place.get(row.step)
        if at is None:
            continue
        steps_ms[at] = row.step_us / 1e3
        launches[at] += row.launches
        kinds.setdefault(row.kind, np.zeros(len(kept)))[at] += row.busy_us / 1e3
        if row.kind != GAP:
            names.setdefault((row.kind, row.name), np.zeros(len(kept)))[at] += row.busy_us / 1e3
    prefill_kinds: dict[str, float] = {}
    for row in prefill:
        prefill_kinds[row.kind] = prefill_kinds.get(row.kind, 0.0) + row.busy_us / 1e3
    whole = {row.step: row.step_us / 1e3 for row in prefill}
    return Profile(
        precision=precisions.pop(),
        steps_ms=steps_ms,
        kinds=kinds,
        names=names,
        launches=launches,
        prefill_ms=sum(whole.values()) if whole else None,
        prefill_kinds=prefill_kinds,
        prefill_steps=len(whole),
        decode_steps=len(steps),
    )


def kind_times(one: Profile) -> list[KindTime]:
    """Every kind that ran in a decode step, the longest first; the gap among them."""
    if not one.step_ms:
        return []
    found = []
    for kind, series in one.kinds.items():
        q25, middle, q75 = (float(value) for value in np.percentile(series, [25, 50, 75]))
        found.append(KindTime(kind, middle, q25, q75, middle / one.step_ms))
    return sorted(found, key=lambda line: (-line.ms, line.kind))


def gap(one: Profile) -> Gap | None:
    """Is the decode loop launch-bound? None without decode steps.

    The share is the median over steps of gap / step, with its interval. yes: the interval lies above BOUND; no: below
    PART; in part: between the two; undecided: it holds one of them. Without an interval the share itself decides.
    """
    if not one.step_ms:
        return None
    shares = one.kinds.get(GAP, np.zeros_like(one.steps_ms)) / one.steps_ms
    low, high = block_bootstrap(shares, lambda picks: np.asarray(np.median(picks, axis=1))) or (None, None)
    share = Estimate(float(np.median(shares)), low, high)
    return Gap(share, _launch_bound(share))


def _launch_bound(share: Estimate) -> LaunchBound:
    middle = share.value or 0.0
    low, high = (middle if end is None else end for end in (share.lo, share.hi))
    if low > BOUND:
        return "yes"
    if high < PART:
        return "no"
    return "in part" if low >= PART and high <= BOUND else "undecided"


# --- two precisions ---------------------------------------------------------------------------------------------------


def kind_changes(base: Profile, other: Profile) -> list[Change]:
    """Every kind that ran in a decode step of either, the largest change first; the gap among them."""
    return _changes(
        {(kind, ""): series for kind, series in base.kinds.items()},
        {(kind, ""): series for kind, series in other.kinds.items()},
        base.steps_ms,
        other.steps_ms,
    )


def notable(base: Profile, other: Profile) -> list[Change]:
    """The changes of kinds that are sure, and at least NOTABLE of the baseline's step; the largest first."""
    least = NOTABLE * (base.step_ms or 0.0)
    changes = kind_changes(base, other)
    return [c for c in changes if c.direction != "undecided" and abs(c.difference.value or 0.0) >= least]


def name_changes(base: Profile, other: Profile) -> list[Change]:
    """The same kernel by kernel; a name that one precision alone has vanished or is new."""
    return _changes(base.names, other.names, base.steps_ms, other.steps_ms)


def step_ratio(base: Profile, other: Profile) -> Estimate:
    """How many times as fast a decode step is: median of the baseline's / median of the other's, paired by step."""
    return _ratio(base.steps_ms, other.steps_ms)


def linear_ratio(base: Profile, other: Profile) -> Estimate:
    """The same of the LINEAR kinds taken as one; empty where one of the two has none."""
    return _ratio(base.series(LINEAR), other.series(LINEAR))


def prefill_ratio(base: Profile, other: Profile) -> float | None:
    """The same of the prefill: one sample each, no interval."""
    return base.prefill_ms / other.prefill_ms if base.prefill_ms and other.prefill_ms else None


def _ratio(base: Floats, other: Floats) -> Estimate:
    one, two = _paired(base, other)
    if not len(one) or not np.median(one) or not np.median(two):
        return Estimate()
    return paired_percentile_ratio(two, one, 50)


def _changes(
    base: Mapping[tuple[str, str], Floats], other: Mapping[tuple[str, str], Floats], base_ms: Floats, other_ms: Floats
) -> list[Change]:
    found = []
    for kind, name in dict.fromkeys([*base, *other]):
        one = base.get((kind, name), np.zeros_like(base_ms))
        two = other.get((kind, name), np.zeros_like(other_ms))
        if not len(one) or not len(two):
            continue
        difference = _difference(one, two)
        direction = _direction(bool(one.any()), bool(two.any()), difference)
        found.append(Change(kind, name, float(np.median(one)), float(np.median(two)), difference, direction))
    return sorted(found, key=lambda line: (-abs(line.difference.value or 0.0), line.kind, line.name))


def _difference(base: Floats, other: Floats) -> Estimate:
    one, two = _paired(base, other)

    def medians(picks: Floats) -> Floats:
        at = picks.astype(np.intp)
        return np.asarray(np.median(two[at], axis=1) - np.median(one[at], axis=1))

    low, high = block_bootstrap(np.arange(len(one), dtype=np.float64), medians) or (None, None)
    return Estimate(float(np.median(two) - np.median(one)), low, high)


def _direction(in_base: bool, in_other: bool, difference: Estimate) -> Direction:
    """vanished and new are facts; what ran in both shrank or grew as far as the interval says."""
    if in_base and not in_other:
        return "vanished"
    if in_other and not in_base:
        return "new"
    if difference.hi is not None and difference.hi < 0:
        return "shrank"
    return "grew" if difference.lo is not None and difference.lo > 0 else "undecided"


def _paired(base: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The steps that both have, by their number."""
    steps = min(len(base), len(other))
    return base[:steps], other[:steps]
