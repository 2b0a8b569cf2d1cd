"""kernels.png: a row of two panels a model.

    left     microseconds of a block's products over tokens, both on log scales: low is good
    right    the same as a share of the device's own copy bandwidth: 100 % is the ceiling while bytes decide

Ours are drawn thick. A line ends where the method takes no more tokens.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quantize.kernels.bench_rows import Block, Row, blocks

_INK, _FAINT, _GRID = "#333333", "#767676", "#E6E6E6"
_OURS = {"gemv": "#D55E00", "gemm": "#E69F00", "expand": "#B8A000", "linear": "#000000"}
_OTHERS = {  # all of Okabe and Ito's, which survive the common colour blindnesses
    "16 bit": "#767676",
    "torch int4": "#0072B2",
    "vLLM Marlin": "#009E73",
    "vLLM Machete": "#56B4E9",
    "vLLM AWQ": "#CC79A7",
    "gemlite": "#7B5EA7",
}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw `rows` into `file`, a PNG."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK}):
        make(rows).savefig(file, metadata={"Software": None})


def make(rows: Sequence[Row]) -> Figure:
    """The figure itself."""
    found = blocks(rows)
    models = list(dict.fromkeys(block.model for block in found))
    figure = Figure(figsize=(11.0, 1.1 + 3.0 * len(models)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), 2, squeeze=False, sharex=True)
    for (left, right), model in zip(panels, models, strict=True):
        own = [block for block in found if block.model == model]
        left.set_yscale("log")
        for method in dict.fromkeys(block.method for block in own):
            _line(left, own, method, "latency_us")
            _line(right, own, method, "share_of_copy")
        right.axhline(1.0, color=_FAINT, linewidth=1, linestyle="--", gid="ceiling")
        right.set_ylim(0, max(1.1, 1.05 * max(block.share_of_copy for block in own)))
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        left.yaxis.set_major_locator(FixedLocator(_steps(block.latency_us for block in own)))
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        _axes(left, sorted({block.tokens for block in own}), f"{model}: µs of a block's products")
        _axes(right, sorted({block.tokens for block in own}), "share of copy bandwidth")
    for axes in panels[-1]:
        axes.set_xlabel("tokens, log scale", color=_INK)
    figure.legend(handles=_legend(found), loc="outside right upper", frameon=False)
    first = rows[0]
    figure.suptitle(
        f"{first.device}: {first.bits}-bit weights, {first.dtype} activations\n"
        f"copy {first.copy_gb_s:,.0f} GB/s, matmul {first.matmul_tflop_s:,.2f} TFLOP/s",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK,
    )  # fmt: skip
    return figure


def _line(axes: Any, found: Sequence[Block], method: str, value: str) -> None:
    points = sorted((block.tokens, getattr(block, value)) for block in found if block.method == method)
    axes.plot(*zip(*points, strict=True), gid=f"{value} {method}", **_style(method))


def _style(method: str) -> dict[str, Any]:
    ours = method.removeprefix("fallback ")
    if ours in _OURS:
        return {"color": _OURS[ours], "marker": "o", "markersize": 4, "linewidth": 2.2, "zorder": 3}
    return {"color": _OTHERS.get(method, _FAINT), "marker": "s", "markersize": 3, "linewidth": 1.2, "zorder": 2}


def _legend(found: Sequence[Block]) -> list[Line2D]:
    return [Line2D([], [], label=name, **_style(name)) for name in dict.fromkeys(block.method for block in found)]


def _steps(values: Iterable[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten about `values`."""
    logs = [math.log10(value) for value in values]
    decades = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5)]


def _axes(axes: Any, tokens: Sequence[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(FixedLocator(list(tokens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_FAINT)
