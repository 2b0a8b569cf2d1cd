"""The timeline of a traced generation: two precisions, one above the other, on one time axis.

Colours are the kinds' (kind_plots.py). `write_timeline_figures` draws all figures of compute_graph.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from harness.analysis.ceilings import Ceiling
from harness.analysis.headline import label
from harness.analysis.timeline import Change, Profile, notable
from harness.report.kind_plots import (
    COLOURS,
    DARK,
    SHORT,
    Side,
    bars,
    legend,
    placed,
    roofline,
    signed,
    time_by_kind,
)
from harness.report.placing import spread
from harness.report.plots import FAINT, INK, headed, save, short
from harness.report.tables import number
from harness.telemetry.kernels import GAP, OTHER, Trace, kind_of, launches_of

STEPS_SHOWN = 2
"""Decode steps of the slowest precision on the time axis; a faster one shows more."""
BINS, FINE = 1400, 32
"""Of the time axis: one a printed pixel; each takes the kind that holds most of its FINE parts."""
MOST_CALLED = 5
"""Changes that are called out."""


def write_timeline_figures(sides: Sequence[Side], ceiling: Ceiling | None, out_dir: Path) -> dict[str, str]:
    """Write those that have something to show, PNG and SVG of each; returns name -> what it shows, in the page's order.

    `sides`: the baseline first. A timeline for each other precision, or one for a lone one.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    shown: dict[str, str] = {}
    drawn = [side for side in sides if side.profile.step_ms]
    for at, other in enumerate(drawn[1:] or drawn[:1], start=1):
        name = "timeline" if at == 1 else f"timeline_{at}"
        pair = (drawn[0], other) if len(drawn) > 1 else (other,)
        figures[name] = functools.partial(timeline, pair)
        shown[name] = "kernels of decode steps on one time axis: " + " above ".join(
            label(one.profile.precision) for one in pair
        )
    if drawn or any(side.profile.prefill_ms for side in sides):
        figures["time_by_kind"] = functools.partial(time_by_kind, sides)
        shown["time_by_kind"] = "time by kind of kernel, of a decode step and of the prefill"
    if ceiling and any(placed(side.points) for side in sides):
        figures["roofline"] = functools.partial(roofline, sides, ceiling)
        shown["roofline"] = f"achieved operations a second over operations a byte, under the ceilings of {ceiling.name}"
    save(figures, out_dir)
    return shown


# --- the timeline -----------------------------------------------------------------------------------------------------

LANE, SORTED, BETWEEN, FLOW = 0.9, 0.55, 0.12, 1.5
"""Heights: kernels as they ran, a step's time by kind, the space between those two, and that for the bands."""


def timeline(sides: Sequence[Side]) -> Figure:
    """One or two precisions from a typical decode step on: kernels as they ran, and each step's time sorted by kind.

    Between the two sorted lanes of the first step, a band leads from a kind's time to the same kind's; what shrank,
    grew, vanished or is new is named there, with medians over all steps.
    """
    range_ms = 1.02 * STEPS_SHOWN * max(side.profile.step_ms or 0.0 for side in sides)
    figure = Figure(figsize=(7, 4.6 if len(sides) > 1 else 2.7), layout="constrained")
    axes = figure.subplots()
    names = " above ".join(short(side.profile.precision) for side in sides)
    subtitle = "one typical decode step and what follows; each step once as it ran, once sorted by kind"
    headed(axes, f"{names} on one time axis" if len(sides) > 1 else f"{names}: decode steps", subtitle, pad=54)
    drawn = [_row(axes, side, range_ms, mirrored=at > 0) for at, side in enumerate(sides)]
    ticks = [tick for row in drawn for tick in row.ticks]
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks])
    for text in axes.get_yticklabels()[::2]:
        text.set_fontweight("bold")  # the precisions; between them stand "by kind"
    axes.tick_params(axis="y", length=0)
    if len(drawn) > 1:
        _bands(axes, drawn[0], drawn[1], range_ms)
    axes.set_xlim(0, range_ms)
    axes.set_ylim(drawn[-1].foot, drawn[0].head)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms since the begin of the first step shown")
    legend(axes, [kind for kind in COLOURS if any(kind in side.profile.kinds for side in sides)])
    return figure


@dataclass(frozen=True, slots=True)
class _Row:
    """Where one precision's two lanes were drawn."""

    profile: Profile
    segments: Mapping[str, tuple[float, float]]
    """Of the first step: kind -> (begin, end) ms in the sorted lane."""
    edge: float
    """The sorted lane's side that faces the other precision."""
    ticks: Sequence[tuple[float, str]]
    foot: float
    head: float


def _row(axes: Axes, side: Side, range_ms: float, *, mirrored: bool) -> _Row:
    """Draw one precision; mirrored: below the other, its sorted lane on top."""
    lane = -(SORTED + BETWEEN + FLOW + SORTED + BETWEEN + LANE) if mirrored else 0.0
    by_kind = lane + LANE + BETWEEN if mirrored else lane - BETWEEN - SORTED
    low, high = min(lane, by_kind), max(lane + LANE, by_kind + SORTED)
    steps = launches_of(side.trace)
    first = typical(side, range_ms)
    origin = steps[first][0].begin_us
    for kind, runs in painted(side.trace, origin, range_ms).items():
        bars(axes, runs, (lane, LANE), kind)
    found: dict[str, tuple[float, float]] = {}
    for step, until, _ in steps[first:]:
        begin, end = (step.begin_us - origin) / 1e3, (until - origin) / 1e3
        if begin >= range_ms:
            break
        segments = _sorted(side, step.index, begin, end)
        found = found or segments
        for kind, (left, right) in segments.items():
            bars(axes, [(left, right - left)], (by_kind, SORTED), kind)
            if right - left > 0.05 * range_ms and right <= range_ms:
                ink = "white" if kind in DARK else INK
                middle = ((left + right) / 2, by_kind + SORTED / 2)
                axes.text(*middle, number(right - left), ha="center", va="center", fontsize=8, color=ink)
        for at in (begin, end):
            if at <= range_ms:
                axes.plot([at, at], [low - 0.1, high + 0.1], color=INK, linewidth=1.1, clip_on=False)
        if end <= range_ms:
            words = f"step {step.index} · {number(end - begin)} ms" if end - begin > 0.2 * range_ms else f"{step.index}"
            y, grows = (lane - 0.16, "top") if mirrored else (lane + LANE + 0.14, "bottom")
            axes.text((begin + end) / 2, y, words, ha="center", va=grows, fontsize=9)
    return _Row(
        profile=side.profile,
        segments=found,
        edge=by_kind + SORTED if mirrored else by_kind,
        ticks=[(lane + LANE / 2, short(side.profile.precision)), (by_kind + SORTED / 2, "by kind")],
        foot=low - 0.62,
        head=high + 0.62,
    )


def typical(side: Side, range_ms: float) -> int:
    """Place in `trace.steps` of the decode step whose kinds are nearest to their medians, Σ |ms − median|.

    Of those with steps behind them to fill the time axis; of all, where none has.
    """
    steps, kinds = side.trace.steps, side.profile.kinds.values()
    decode = [at for at, step in enumerate(steps) if step.phase == "decode"]
    kept = decode[: len(side.profile.steps_ms)]
    filling = [at for at in kept if steps[-1].begin_us - steps[at].begin_us >= 1e3 * range_ms] or kept
    away = sum((np.abs(series - np.median(series)) for series in kinds), np.zeros(len(kept)))
    return min(filling, key=lambda at: (float(away[at - decode[0]]), at))


def painted(trace: Trace, origin_us: float, range_ms: float) -> dict[str, list[tuple[float, float]]]:
    """Bars of the time axis by kind, the gap among them: (begin, length) in ms since the origin.

    Each bin takes the kind that holds most of it, of launches that overlap or nest the one that began last. So what is
    drawn has at most BINS bars, and a flood of kernels too short for a pixel is not lost.
    """
    kinds = list(COLOURS)
    nothing = kinds.index(GAP)
    canvas = np.full(BINS * FINE, nothing, dtype=np.int8)
    scale = BINS * FINE / (1e3 * range_ms)
    for launch in trace.launches:
        begin, end = ((time - origin_us) * scale for time in (launch.begin_us, launch.end_us))
        if end > 0 and begin < len(canvas):
            kind = kind_of(launch.name) or OTHER
            canvas[max(0, round(begin)) : max(0, round(end))] = kinds.index(kind)
    bins = canvas.reshape(BINS, FINE)
    counts = np.stack([(bins == kind).sum(axis=1) for kind in range(len(kinds))])
    most = counts.argmax(axis=0)
    borders = [0, *(int(at) + 1 for at in np.flatnonzero(np.diff(most))), BINS]
    found: dict[str, list[tuple[float, float]]] = {}
    for begin_bin, end_bin in zip(borders, borders[1:], strict=False):
        width = range_ms / BINS
        found.setdefault(kinds[most[begin_bin]], []).append((begin_bin * width, (end_bin - begin_bin) * width))
    return found


def _sorted(side: Side, index: int, begin: float, end: float) -> dict[str, tuple[float, float]]:
    """A step's time by kind, laid end to end in the order of COLOURS; what ran at once shares the step's length."""
    rows = side.by_step.get(index, {})
    whole = sum(rows.values())
    scale = min(1.0, (end - begin) / whole) if whole else 1.0
    found, at = {}, begin
    for kind in COLOURS:
        if rows.get(kind):
            found[kind] = (at, at + scale * rows[kind])
            at += scale * rows[kind]
    return found


def _bands(axes: Axes, upper: _Row, lower: _Row, range_ms: float) -> None:
    """From each kind of the upper first step to the same kind of the lower, and the largest changes in words."""
    for kind in COLOURS:
        if kind not in upper.segments and kind not in lower.segments:
            continue
        top, bottom = (row.segments.get(kind) or _nowhere(row.segments, kind) for row in (upper, lower))
        corners = [(top[0], upper.edge), (top[1], upper.edge), (bottom[1], lower.edge), (bottom[0], lower.edge)]
        face = "#DDDDDD" if kind == GAP else COLOURS[kind]
        axes.add_patch(Polygon(corners, facecolor=face, alpha=0.22, edgecolor="none"))
    called = called_out(upper.profile, lower.profile)
    middles = [_anchor(change, upper, lower) for change in called]
    places = spread([x for x, _ in middles], width := 0.15 * range_ms)
    shift = max(0.0, 0.6 * width - min(places, default=width))
    y = (upper.edge + lower.edge) / 2
    box = {"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.6, "boxstyle": "round,pad=0.25"}
    for change, x, anchor in zip(called, places, middles, strict=True):
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        fate = [change.direction] if change.direction in ("vanished", "new") else []
        words = "\n".join([SHORT[change.kind], *fate, f"{signed(change.difference.value)} ms"])
        axes.annotate(words, anchor, (x + shift, y), fontsize=8, ha="center", va="center", bbox=box, arrowprops=line)


def _anchor(change: Change, upper: _Row, lower: _Row) -> tuple[float, float]:
    """The middle of the kind's larger segment in the two first steps, on the edge that faces the other precision."""
    begin, end, edge = max(
        ((*row.segments[change.kind], row.edge) for row in (upper, lower) if change.kind in row.segments),
        key=lambda segment: segment[1] - segment[0],
        default=(0.0, 0.0, lower.edge),
    )
    return (begin + end) / 2, edge


def called_out(base: Profile, other: Profile) -> list[Change]:
    """The changes of kinds that the figure names, from left to right."""
    return sorted(notable(base, other)[:MOST_CALLED], key=lambda change: list(COLOURS).index(change.kind))


def _nowhere(segments: Mapping[str, tuple[float, float]], kind: str) -> tuple[float, float]:
    """Where a kind would stand that is not there: behind the last one before it."""
    order = list(COLOURS)
    ends = [segments[other][1] for other in order[: order.index(kind)] if other in segments]
    at = ends[-1] if ends else 0.0
    return at, at
