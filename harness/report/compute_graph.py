"""compute_graph.md and its figures from traces: what quantization buys in the kernel timeline, and what it does not.

Words and tables only: every number comes from harness.analysis (timeline.py, ceilings.py, relief.py), every sentence of
the answer from compute_words.py. A pure function of what it is given: the same traces make the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.analysis.ceilings import LINEARS, STEP, Ceiling, Point, points, raised
from harness.analysis.timeline import Change, Profile, gap, kind_changes, kind_times, name_changes, profile
from harness.architecture import Architecture
from harness.report.compute_words import Told, alone, answer, bullets, bullets_alone
from harness.report.failures import line
from harness.report.kind_plots import COLOURS, NAMES, Side, signed
from harness.report.page import write_page
from harness.report.tables import interval, listed, named, number, table
from harness.report.timeline_plots import write_timeline_figures
from harness.telemetry.kernels import Trace, rows
from harness.variants import is_baseline

BEYOND = 1.1
"""Share of a peak that no clock and no rounding explains."""
MOST_KERNELS = 12
"""Lines of the table of kernels."""
LONGEST_NAME = 90
"""Characters of a kernel's name; templates have hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a trace does not say of itself, from trace.toml. Everything may be missing."""

    model: str = ""
    prompt_tokens: int | None = None
    """Of the prompt that was generated from; without it no bytes of KV cache and no work of the prefill are known."""
    output_tokens: int | None = None
    machine: str = ""
    """The card or the processor, in words."""
    engine: str = ""
    """Name and version."""
    tpot_ms: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Precision -> time per output token (under the profiler, without it): what the profiler costs."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Precision -> the trace's file name."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further lines of the conditions, name -> value, in order: engine flags, threads, ..."""


def write(
    traces: Sequence[Trace],
    shapes: Mapping[str, Architecture],
    ceiling: Ceiling | None,
    out: Path,
    conditions: Conditions | None = None,
) -> list[Path]:
    """Write compute_graph.md into the directory `out`, and its figures into out/figures; returns all, the page first.

    `traces`: at least one, and the baseline is BF16 where there is one, else the first. `shapes`: precision -> the
    architecture of *its* checkpoint, quantization included (two precisions differ in that); a precision that is missing
    has no bytes and no FLOPs, and the page says so. `ceiling`: ceilings.of_card(card) or telemetry.ceiling.measure();
    None: no shares of it, and no roofline.
    """
    told_of = conditions or Conditions()
    sides = [
        _side(trace, shapes.get(trace.precision), told_of.prompt_tokens)
        for trace in sorted(traces, key=lambda trace: not is_baseline(trace.precision))
    ]
    ceiling = raised(ceiling, [point for side in sides for point in side.points]) if ceiling else None
    told = [
        Told(side.profile, side.trace.device, side.points, shapes.get(side.trace.precision), told_of.prompt_tokens)
        for side in sides
    ]
    figures = write_timeline_figures(sides, ceiling, out / "figures")
    names = [one.name for one in told]
    page = write_page(
        "compute_graph.md.j2",
        out / "compute_graph.md",
        title=f"{line(told_of.model or 'unnamed model')}, {_against(names)}",
        verdicts=_verdicts(told, ceiling),
        cautions=_cautions(sides, shapes, ceiling, told_of),
        timelines=[(name, line(alt)) for name, alt in figures.items() if name.startswith("timeline")],
        figures=set(figures),
        alt={name: line(alt) for name, alt in figures.items()},
        device=sides[0].trace.device,
        decode=_decode_table(sides),
        decode_steps=_steps_words(sides),
        gaps=_gap_table(sides),
        prefill=_prefill_table(sides),
        kernels=[_kernels_table(sides[0].profile, side.profile) for side in sides[1:]],
        work=_work_table(sides, ceiling),
        ceiling=_ceiling_words(ceiling),
        cost=_cost_words(told_of, sides),
        unclassified=_unclassified(sides),
        setup=_setup(sides, told_of),
        pairs=len(sides) > 1,
    )
    written = [out / "figures" / f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")]
    return [page, *written]


def _side(trace: Trace, shape: Architecture | None, prompt_tokens: int | None) -> Side:
    table_rows = rows(trace)
    one = profile(table_rows)
    by_step: dict[int, dict[str, float]] = {}
    for row in table_rows:
        kinds = by_step.setdefault(row.step, {})
        kinds[row.kind] = kinds.get(row.kind, 0.0) + row.busy_us / 1e3
    return Side(trace, one, by_step, points(one, shape, prompt_tokens) if shape else ())


def _against(names: Sequence[str]) -> str:
    """AWQ against BF16."""
    return f"{listed(names[1:])} against {names[0]}" if len(names) > 1 else names[0]


def _verdicts(told: Sequence[Told], ceiling: Ceiling | None) -> list[tuple[str, list[str]]]:
    """The answer and its bullets, for each precision beside the baseline, or of a lone one."""
    if len(told) == 1:
        return [(alone(told[0], ceiling), bullets_alone(told[0], ceiling))]
    return [(answer(told[0], other, ceiling), bullets(told[0], other, ceiling)) for other in told[1:]]


def _cautions(
    sides: Sequence[Side], shapes: Mapping[str, Architecture], ceiling: Ceiling | None, conditions: Conditions
) -> list[str]:
    """What a reader must not miss."""
    found = []
    if any(side.trace.device == "cpu" for side in sides):
        found.append(
            "Traced on a CPU: it says nothing of a GPU, where other kernels run, weights come from another memory, and "
            "the host launches ahead of the device instead of computing itself."
        )
    missing = [named(side.trace.precision) for side in sides if side.trace.precision not in shapes]
    if missing:
        found.append(f"The sizes of {listed(missing)} are not known: no bytes, no FLOPs and no roofline for it.")
    elif conditions.prompt_tokens is None:
        found.append("The prompt's length is not known: no attention and no prefill among bytes and FLOPs.")
    if ceiling is None:
        found.append("No ceiling is known of this machine: no shares of it, and no roofline.")
    reached = [point.shares(ceiling)[1] for side in sides for point in side.points] if ceiling else []
    if max(reached, default=0.0) > BEYOND:
        found.append(
            f"More than the peak was reached, {100 * max(reached):.0f} % of it, which cannot be: the prompt was not "
            "read whole (a prefix cache had it), or this is not the model or the machine that was traced."
        )
    few = [named(side.trace.precision) for side in sides if len(side.profile.steps_ms) < 20]
    if few:
        found.append(f"{listed(few)}: fewer than 20 whole decode steps, too few for an interval.")
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _decode_table(sides: Sequence[Side]) -> str:
    """Median ms of each kind, with quartiles and share of the step; of each precision but the first, the difference."""
    base = sides[0].profile
    columns: dict[str, dict[str, str]] = {}
    for at, side in enumerate(sides):
        name, times = named(side.trace.precision), kind_times(side.profile)
        columns[f"{name}, ms [quartiles]"] = {
            one.kind: f"{number(one.ms)} [{number(one.q25)}–{number(one.q75)}]" for one in times
        } | {STEP: f"**{number(side.profile.step_ms)}**"}
        columns[f"of {name}'s step"] = {one.kind: f"{100 * one.share:.1f} %" for one in times}
        if at:
            changes = kind_changes(base, side.profile)
            columns[f"{name} less {named(base.precision)}, ms [95 %]"] = {one.kind: _difference(one) for one in changes}
    kinds = [kind for kind in COLOURS if any(kind in column for column in columns.values())]
    if not kinds:
        return ""
    body = [[NAMES[kind], *(column.get(kind, "") for column in columns.values())] for kind in [*kinds, STEP]]
    return table(("Kind", *columns), body, ("Kind",))


def _kernels_table(base: Profile, other: Profile) -> str:
    """Kernel by kernel, the largest changes first."""
    header = ("Kernel", "Kind", f"{named(base.precision)}, ms", f"{named(other.precision)}, ms",
              "Difference, ms [95 %]")  # fmt: skip
    body = [
        (_kernel(one.name), NAMES[one.kind], number(one.base_ms), number(one.other_ms), _difference(one))
        for one in name_changes(base, other)[:MOST_KERNELS]
        if one.difference.value
    ]
    return table(header, body, ("Kernel", "Kind")) if body else ""


def _difference(one: Change) -> str:
    """−4.10 [−4.31 to −3.92], a dash between two negative ends would not be read; what vanished or is new says so."""
    value, low, high = one.difference.value, one.difference.lo, one.difference.hi
    words = signed(value)
    if low is not None and high is not None:
        words += f" [{signed(low)} to {signed(high)}]"
    return f"{words}, {one.direction}" if one.direction in ("vanished", "new", "undecided") else words


def _kernel(name: str) -> str:
    """A kernel's name as far as a table has room for it."""
    return line(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…")


def _prefill_table(sides: Sequence[Side]) -> str:
    kinds = [kind for kind in COLOURS if any(kind in side.profile.prefill_kinds for side in sides)]
    if not kinds:
        return ""
    header = ["Kind", *(f"{named(side.trace.precision)}, ms" for side in sides)]
    body = [[NAMES[kind], *(number(side.profile.prefill_kinds.get(kind)) for side in sides)] for kind in kinds]
    whole = ["**whole prefill**", *(f"**{number(side.profile.prefill_ms)}**" for side in sides)]
    return table(header, [*body, whole], ("Kind",))


def _gap_table(sides: Sequence[Side]) -> str:
    """The share of a decode step in which nothing runs, and the verdict."""
    header = ("Precision", "Gap, % of a decode step [95 %]", "Launches a step", "Launch-bound")
    body = []
    for side in sides:
        found = gap(side.profile)
        if found is not None:
            ends = (found.share.value, found.share.lo, found.share.hi)
            cell = interval(*(None if end is None else 100 * end for end in ends))
            launches = number(float(np.median(side.profile.launches)))
            body.append((named(side.trace.precision), cell, launches, found.verdict))
    return table(header, body, ("Precision", "Launch-bound")) if body else "The traces hold no decode steps."


def _work_table(sides: Sequence[Side], ceiling: Ceiling | None) -> str:
    """Bytes, FLOPs and what was achieved, a line for each kind, phase and precision."""
    header = ["Phase", "Kind", "Precision", "ms", "MB", "MFLOP", "FLOP/byte", "GB/s", "TFLOP/s"]
    header += ["of bandwidth", "of peak"] if ceiling else []
    order = [LINEARS, *COLOURS, STEP]
    found = [(side.trace.precision, point) for side in sides for point in side.points]
    found.sort(key=lambda pair: (pair[1].phase != "decode", order.index(pair[1].kind)))
    return table(header, [_work_row(name, point, ceiling) for name, point in found], header[:3]) if found else ""


def _work_row(precision: str, point: Point, ceiling: Ceiling | None) -> list[str]:
    gb_s, tflops = point.rates
    cells = [
        "decode step" if point.phase == "decode" else "prefill",
        NAMES[point.kind],
        named(precision),
        number(point.ms),
        number(point.work.bytes / 1e6),
        number(point.work.flops / 1e6) if point.work.flops else "",
        number(point.work.intensity) if point.work.flops else "",
        number(gb_s),
        number(tflops) if point.work.flops else "",
    ]
    if ceiling:
        bandwidth, peak = point.shares(ceiling)
        cells += [f"{100 * bandwidth:.1f} %", f"{100 * peak:.2f} %" if point.work.flops else ""]
    return cells


# --- words ------------------------------------------------------------------------------------------------------------


def _steps_words(sides: Sequence[Side]) -> str:
    counts = [f"{len(side.profile.steps_ms)} of {named(side.trace.precision)}" for side in sides]
    return f"Decode steps: {listed(counts)}."


def _ceiling_words(ceiling: Ceiling | None) -> str:
    if ceiling is None:
        return ""
    words = (
        f"Ceilings of {line(ceiling.name)}: {number(ceiling.bandwidth_gb_s)} GB/s and {number(ceiling.tflops)} TFLOP/s "
        f"({line(ceiling.kind)}), so the ridge is at {number(ceiling.ridge)} FLOPs a byte. "
        f"Source: {line(ceiling.source)}."
    )
    return f"{words} In doubt: {line(ceiling.doubt)}." if ceiling.doubt else words


def _cost_words(conditions: Conditions, sides: Sequence[Side]) -> list[str]:
    """What the profiler costs, where a generation without it was timed too."""
    found = []
    for side in sides:
        traced, plain = conditions.tpot_ms.get(side.trace.precision, (None, None))
        if traced is None or plain is None or not plain:
            continue
        more = traced / plain - 1
        found.append(
            f"{named(side.trace.precision)}: {number(traced)} ms a token under the profiler, {number(plain)} without "
            f"it, {abs(100 * more):.0f} % {'more' if more >= 0 else 'less'}."
        )
    return found


def _unclassified(sides: Sequence[Side]) -> str:
    shares = [
        f"{100 * share:.1f} % of {named(side.trace.precision)}'s"
        for side in sides
        if (share := side.profile.unclassified) is not None
    ]
    return f"No pattern knows the names behind {listed(shares)} busy time." if shares else ""


def _setup(sides: Sequence[Side], conditions: Conditions) -> str:
    profilers = {"torch": "torch's profiler", "nsys": "Nsight Systems"}
    pairs = [
        ("Model", conditions.model),
        ("Machine", conditions.machine),
        ("Engine", conditions.engine),
        ("Prompt", f"{conditions.prompt_tokens:,} tokens" if conditions.prompt_tokens is not None else ""),
        ("Answer", f"{conditions.output_tokens:,} tokens" if conditions.output_tokens is not None else ""),
        ("Profiler", ", ".join(dict.fromkeys(profilers[side.trace.profiler] for side in sides))),
        *((f"Trace of {side.trace.precision}", conditions.files.get(side.trace.precision, "")) for side in sides),
        *conditions.facts.items(),
    ]
    return table(("", ""), [(line(name), line(value)) for name, value in pairs if value], ("",))
