"""The figure of `bench recover`: what is left of the error against what it cost, both on log scales.

    colour      the method          marker      the number of bits          line    joins one number of bits
    bar         ± a standard deviation over seeds       ring    the quickest within twice the least KL of its bits

Down and to the left is better. A KL of no more than float32's own error is drawn there, at `recover_words.NOISE`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quantize.recover_words import WITHIN, Point, by_bits, choice

_INK, _FAINT, _GRID = "#333333", "#767676", "#E6E6E6"
_COLOURS = {  # Okabe and Ito's, which survive the common colour blindnesses
    "rtn": "#000000",
    "awq": "#009E73",
    "gptq": "#0072B2",
    "qat": "#E69F00",
    "qad": "#D55E00",
    "awq+gptq": "#56B4E9",
    "smoothquant": "#CC79A7",
    "smoothquant+gptq": "#F0E442",
}
_TICKS = 9
"""On an axis at most."""

_MARKERS = {8: "D", 4: "o", 3: "^", 2: "s"}


def draw(found: Sequence[Point], model: str, file: Path) -> None:
    """Draw `found` into `file`, a PNG."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK}):
        figure = make(found, model)
        figure.savefig(file, metadata={"Software": None})


def make(found: Sequence[Point], model: str) -> Figure:
    """The figure itself."""
    figure = Figure(figsize=(8.0, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for bits, group in by_bits(found).items():
        seconds, kl = [point.seconds for point in group], [point.kl for point in group]
        axes.plot(seconds, kl, color=_FAINT, linewidth=1, alpha=0.6, zorder=1, gid=f"bits {bits}")
        axes.annotate(
            f"{bits} bits", (seconds[-1], kl[-1]), (12, 0), textcoords="offset points", va="center", color=_FAINT
        )
        for point in group:
            _mark(axes, point)
        chosen = choice(group)
        axes.plot(chosen.seconds, chosen.kl, "o", ms=16, mfc="none", mec=_INK, mew=1, zorder=2, gid=f"ring {bits}")
    _axes(axes)
    axes.set_xlabel("seconds of the whole run, log scale", color=_INK)
    axes.set_ylabel("KL(original || quantized), nats a token, log scale", color=_INK)
    figure.legend(handles=_legend(found), loc="outside right upper", frameon=False)
    figure.suptitle(f"{model}: quality against cost", x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def _mark(axes: Any, point: Point) -> None:
    colour = _COLOURS.get(point.method, _FAINT)
    if point.kl_sd:
        low = max(point.kl - point.kl_sd, point.kl / 10)  # a log scale has no place for less than nothing
        ends = [low, point.kl + point.kl_sd]
        axes.plot(
            [point.seconds] * 2, ends, color=colour, linewidth=1.5, zorder=3, gid=f"sd {point.method} {point.bits}"
        )
    axes.plot(
        point.seconds, point.kl, _MARKERS.get(point.bits, "o"), color=colour, markersize=8, markeredgecolor="white",
        markeredgewidth=0.6, linestyle="none", zorder=4, gid=f"{point.method} {point.bits}",
    )  # fmt: skip


def _legend(found: Sequence[Point]) -> list[Line2D]:
    methods = [name for name in _COLOURS if any(point.method == name for point in found)]
    handles = [
        Line2D([], [], color=_COLOURS[name], marker="o", linestyle="none", label=name.upper()) for name in methods
    ]
    for bits in by_bits(found):
        marker = _MARKERS.get(bits, "o")
        handles.append(Line2D([], [], color=_FAINT, marker=marker, linestyle="none", label=f"{bits} bits"))
    ring = Line2D(
        [],
        [],
        marker="o",
        ms=13,
        mfc="none",
        mec=_INK,
        linestyle="none",
        label=f"quickest within\n{WITHIN:g}x of the best",
    )
    return [*handles, ring]


def _axes(axes: Any) -> None:
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(0.15, 0.1)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(FixedLocator(ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(length=0, labelcolor=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_FAINT)


def ticks(low: float, high: float) -> list[float]:
    """Round values between the ends of a log scale, as many as can be read."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(i / 10 for i in range(10, 100, 2))):
        finer = [value for decade in decades for step in steps if low <= (value := step * 10.0**decade) <= high]
        if len(finer) > _TICKS and len(found) > 1:
            break
        found = finer
    return found
