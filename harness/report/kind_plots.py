"""Figures of traced kernels, in the style of plots.py: stacked bars of time by kind, and a roofline.

Here colour is the kind of work, the same in every figure; time in which nothing runs is hollow. In the roofline colour
and marker are the precision, as elsewhere; a hollow marker there is the prefill, a full one the decode step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from harness.analysis.ceilings import LINEARS, STEP, Ceiling, Point
from harness.analysis.timeline import NOTABLE, Profile, kind_times
from harness.report.placing import nice_ticks, spread
from harness.report.plots import FAINT, GRID, INK, STYLES, headed, short
from harness.report.tables import number
from harness.telemetry.kernels import GAP, OTHER, Trace

COLOURS = {
    "gemm": "#0072B2",
    "dequant": "#D55E00",
    "fused": "#E69F00",
    "attention": "#009E73",
    "elementwise": "#56B4E9",
    "sampling": "#CC79A7",
    "copy": "#8C6D31",
    OTHER: "#4D4D4D",
    GAP: "white",
}
"""Of a kind; the order is that of every stack: what multiplies by weights first, what is nobody's last."""
NAMES = {
    "gemm": "GEMM",
    "dequant": "dequantize",
    "fused": "fused dequant-GEMM",
    "attention": "attention",
    "elementwise": "norm, elementwise",
    "sampling": "sampling",
    "copy": "copy",
    OTHER: "unclassified",
    GAP: "host gap (nothing runs)",
    LINEARS: "linear layers",
    STEP: "whole step",
}
"""How a kind is called in a figure and in a table."""
SHORT = NAMES | {"fused": "fused", "elementwise": "elementwise", GAP: "host gap"}
"""The same where there is less room."""
DARK = ("gemm", "dequant", "attention", "copy", OTHER)
"""Kinds whose colour wants white figures on it."""

Stack = Mapping[str, float]
"""Kind -> ms."""


@dataclass(frozen=True, eq=False)
class Side:
    """What the figures need of one precision."""

    trace: Trace
    profile: Profile
    by_step: Mapping[int, Stack]
    """Step -> kind -> ms, the gap among them."""
    points: Sequence[Point] = ()


def signed(ms: float | None) -> str:
    """A difference in ms: +2.39, −7.95; below a µs to a tenth of one."""
    if ms is None:
        return ""
    words = number(ms) if abs(ms) >= 1e-3 else f"{ms:.4f}"
    return f"{'+' if ms > 0 else ''}{words}".replace("-", "−")


def bars(axes: Axes, runs: Sequence[tuple[float, float]], lane: tuple[float, float], kind: str) -> None:
    """Bars of one kind: (begin, length) each, in a lane (foot, height)."""
    if kind == GAP:
        axes.broken_barh(runs, lane, facecolor="white", edgecolor=FAINT, linewidth=0.5)
    else:
        axes.broken_barh(runs, lane, facecolor=COLOURS[kind], edgecolor="none")


def legend(axes: Axes, kinds: Sequence[str]) -> None:
    """What the colours stand for, above the axes."""
    patches = [
        Patch(facecolor=COLOURS[kind], edgecolor=FAINT if kind == GAP else "none", linewidth=0.6, label=NAMES[kind])
        for kind in kinds
    ]
    axes.legend(handles=patches, loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=min(4, len(patches)),
                frameon=False, fontsize=8.5, handlelength=1.1, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip


# --- time by kind -----------------------------------------------------------------------------------------------------


def time_by_kind(sides: Sequence[Side]) -> Figure:
    """Stacked bars of the median decode step and of the prefill, one a precision; a whisker: the steps' quartiles."""
    decode: list[Stack] = [{line.kind: line.ms for line in kind_times(side.profile)} for side in sides]
    prefill: list[Stack] = [side.profile.prefill_kinds if side.profile.prefill_ms else {} for side in sides]
    panels: list[tuple[str, list[Stack], bool]] = [
        ("a decode step, ms: medians over steps; whisker: quartiles of the whole step", decode, True),
        ("the prefill, ms", prefill, False),
    ]
    panels = [panel for panel in panels if any(panel[1])]
    figure = Figure(figsize=(7, 1.1 + len(panels) * (0.75 + 0.38 * len(sides))), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for at, (axes, (subtitle, stacks, whiskers)) in enumerate(zip(grid, panels, strict=True)):
        headed(axes, "" if at else "Time by kind of kernel", subtitle, pad=19 if at else 54)
        _stacks(axes, sides, stacks, whiskers=whiskers)
    legend(grid[0], [kind for kind in COLOURS if any(stack.get(kind) for _, stacks, _ in panels for stack in stacks)])
    return figure


def _stacks(axes: Axes, sides: Sequence[Side], stacks: Sequence[Stack], *, whiskers: bool) -> None:
    widest = max(sum(stack.values()) for stack in stacks)
    for at, (side, stack) in enumerate(zip(sides, stacks, strict=True)):
        left = 0.0
        for kind in COLOURS:
            ms = stack.get(kind, 0.0)
            if not ms:
                continue
            bars(axes, [(left, ms)], (at - 0.34, 0.68), kind)
            if ms > 0.075 * widest:
                ink = "white" if kind in DARK else INK
                axes.text(left + ms / 2, at, number(ms), ha="center", va="center", fontsize=8.5, color=ink)
            left += ms
        total = side.profile.step_ms if whiskers else side.profile.prefill_ms
        if not stack or not total:
            axes.text(0, at, "  not in the trace", va="center", fontsize=9, color=FAINT)
            continue
        end = max(left, total)
        if whiskers:
            low, high = np.percentile(side.profile.steps_ms, [25, 75])
            axes.plot([low, high], [at + 0.43, at + 0.43], color=INK, linewidth=1.2, marker="|", markersize=5)
            end = max(end, float(high))
        axes.annotate(
            f"{number(total)} ms", (end, at), (5, 0), textcoords="offset points", va="center", fontweight="bold"
        )
    axes.set_xlim(0, widest * 1.13)
    axes.set_ylim(len(sides) - 0.4, -0.55)
    axes.set_yticks(range(len(sides)), [short(side.profile.precision) for side in sides], fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


# --- the roofline -----------------------------------------------------------------------------------------------------


def roofline(sides: Sequence[Side], ceiling: Ceiling) -> Figure:
    """Achieved TFLOP/s over FLOPs a byte, both log, a point for each kind and phase of each precision."""
    figure = Figure(figsize=(7, 4.9), layout="constrained")
    axes = figure.subplots()
    subtitle = "10¹² operations/s over operations a byte, log scales; full: decode step, hollow: prefill"
    headed(axes, "Where the work stands under the ceilings", subtitle)
    drawn = [(at, point) for at, side in enumerate(sides) for point in placed(side.points)]
    intensities = [point.work.intensity for _, point in drawn]
    left, right = min(*intensities, ceiling.ridge) / 2.2, max(*intensities, ceiling.ridge) * 8
    low = min(point.rates[1] for _, point in drawn) / 3
    high = max(ceiling.tflops, *(point.rates[1] for _, point in drawn)) * 2
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    _roof(axes, ceiling, left, right)
    labels = []
    for at, point in drawn:
        colour, marker = STYLES[at % len(STYLES)]
        x, y = point.work.intensity, point.rates[1]
        face = colour if point.phase == "decode" else "white"
        axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.4, zorder=3)
        labels.append((f"{short(sides[at].profile.precision)} {SHORT[point.kind]}", colour, x, y))
    _beside(axes, labels)
    for axis, low_, high_ in ((axes.xaxis, left, right), (axes.yaxis, low, high)):
        ticks = nice_ticks(low_, high_)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([f"{tick:,.10g}" for tick in ticks]))
        axis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_xlabel("intensity: operations a byte")
    return figure


def placed(points: Sequence[Point]) -> list[Point]:
    """Kinds with FLOPs and some part of their phase's time: the output head alone, in a prefill, is no point."""
    whole = {point.phase: point.ms for point in points if point.kind == STEP}
    return [
        point
        for point in points
        if point.kind not in (LINEARS, STEP) and point.work.flops and point.ms >= NOTABLE * whole[point.phase]
    ]


def _roof(axes: Axes, ceiling: Ceiling, left: float, right: float) -> None:
    """min(peak, intensity · bandwidth), and where the two meet."""
    slope = ceiling.bandwidth_gb_s / 1e3
    axes.plot([left, ceiling.ridge, right], [left * slope, ceiling.tflops, ceiling.tflops], color=INK, linewidth=1.6)
    axes.axvline(ceiling.ridge, color=FAINT, linewidth=0.9, linestyle=":")
    peak = f"{ceiling.tflops:.3g} TFLOP/s {ceiling.kind}"
    axes.annotate(peak, (ceiling.ridge, ceiling.tflops), (-8, 3), textcoords="offset points", ha="right", fontsize=9)
    bytes_ = f"{ceiling.bandwidth_gb_s:,.0f} GB/s"
    at = math.sqrt(left * ceiling.ridge)
    axes.annotate(bytes_, (at, at * slope), (-6, 6), textcoords="offset points", ha="right", fontsize=9)
    ridge = f" ridge: {ceiling.ridge:,.3g} a byte"
    axes.annotate(
        ridge, (ceiling.ridge, axes.get_ylim()[0]), (0, 5), textcoords="offset points", fontsize=8.5, color=FAINT
    )


def _beside(axes: Axes, labels: Sequence[tuple[str, str, float, float]]) -> None:
    """Name each point to its right; names of neighbours that would touch move apart up and down."""
    to_fraction = axes.transScale + axes.transLimits
    places = [tuple(map(float, to_fraction.transform((x, y)))) for *_, x, y in labels]
    groups: list[list[int]] = []
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    for index in sorted(range(len(labels)), key=lambda at: places[at]):
        near = next((group for group in groups if places[index][0] - places[group[0]][0] < 0.24), None)
        if near is None:
            groups.append([index])
        else:
            near.append(index)
    for group in groups:
        heights = [max(height, 0.03) for height in spread([places[index][1] for index in group], 0.042)]
        column = max(places[index][0] for index in group)
        for index, height in zip(group, heights, strict=True):
            text, colour, *_ = labels[index]
            if column - places[index][0] > 0.02 or abs(height - places[index][1]) > 0.02:
                axes.plot([places[index][0] + 0.012, column + 0.016], [places[index][1], height], color=colour,
                          linewidth=0.7, alpha=0.6, transform=axes.transAxes, zorder=2)  # fmt: skip
            axes.annotate(text, (column, height), (9, 0), xycoords="axes fraction", textcoords="offset points",
                          va="center", fontsize=8.5, color=colour, bbox=behind)  # fmt: skip
