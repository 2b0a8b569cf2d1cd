"""The figure of a fidelity report: which layers hurt, at a glance.

    line        SQNR of the residual stream after each block: where the model as a whole loses it
    upper map   each layer's own error: dark is where more bits would help
    lower map   its output error, with all that came before it

Across are the blocks, down the linear layers in the order of computing. Each map has a scale of its own, from its worst
layer down; what is far better than that is not worth telling apart, and would take the colours from what is. A cell's
number is its bits, written where the layers are not all alike. Grey has no error: it is not quantized.
"""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.fidelity import FidelityReport

_INK, _FAINT, _GRID, _EXACT, _LINE = "#333333", "#767676", "#E6E6E6", "#D0D0D0", "#0072B2"
_LEAST_SPAN, _SPAN = 6.0, 20.0
"""Of a map's colours, in dB: less than a bit's worth of difference is not to look like much; of power, 20 dB is 1 %."""
_WIDE = 32
"""Blocks from which cells are too narrow for a number in each."""


def draw(found: "FidelityReport", file: Path) -> None:
    """Draw `found` into `file`, a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(layer.layer for layer in found.layers))
    blocks = len(found.whole.sqnr_db)
    place = {(layer.layer, layer.block): layer for layer in found.layers}
    own, output = (
        [[getattr(place[name, block], field) for block in range(blocks)] for name in names]
        for field in ("own_error_db", "output_error_db")
    )
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK}):
        figure = Figure(figsize=(_width(blocks), 2.7 + 0.56 * len(names)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        stream, *maps = figure.subplots(3, 1, height_ratios=[1.5, *[0.27 * len(names)] * 2], sharex=True)
        _draw_stream(stream, found.whole.sqnr_db)
        colours = matplotlib.colormaps["magma_r"].with_extremes(bad=_EXACT)
        titles = (
            "own error: what the layer's rounding does to its outputs",
            "output error: with all that came before",
        )
        bits = [[place[name, block].bits for block in range(blocks)] for name in names]
        for axes, values, title in zip(maps, (own, output), titles, strict=True):
            shown = [[value if math.isfinite(value) else math.nan for value in row] for row in values]
            low, high = _scale(values)
            image = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_title(title, loc="left", fontsize=10, color=_INK)
            axes.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
            axes.tick_params(length=0, labelcolor=_INK)
            for spine in axes.spines.values():
                spine.set_visible(False)
            _grid(axes, blocks, len(names))
            _annotate(axes, bits, shown, low + 0.4 * (high - low))
            bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=15, extend="min")
            bar.set_label("dB (dark hurts)", color=_INK)
            bar.outline.set_visible(False)
            bar.ax.tick_params(color=_FAINT, labelcolor=_INK)
        maps[-1].set_xlabel("block", color=_INK)
        maps[-1].set_xticks(_ticks(blocks))
        figure.suptitle(_title(found), x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
        figure.savefig(file, metadata={"Software": None})


def _title(found: "FidelityReport") -> str:
    whole = found.whole
    kinds = Counter(layer.scheme for layer in found.layers)
    usual = kinds.most_common(1)[0][0]
    schemes = usual if len(kinds) == 1 else f"{len(kinds)} schemes, most layers {usual}"
    return (
        f"{found.original}: {schemes}\n"
        f"KL {whole.kl_nats:.3g} nat a token, perplexity {whole.perplexity_original:.4g} to "
        f"{whole.perplexity_quantized:.4g}, same top token {whole.top1_agreement:.1%}"
    )


def _draw_stream(axes: Any, sqnr_db: tuple[float, ...]) -> None:
    axes.plot(range(len(sqnr_db)), [db if math.isfinite(db) else math.nan for db in sqnr_db], "o-", color=_LINE, ms=3)
    axes.set_title("residual stream after the block: SQNR, dB (high is good)", loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(y=0.15)
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(_FAINT)


def _annotate(axes: Any, bits: list[list[int]], shown: list[list[float]], dark: float) -> None:
    """Bits in each cell, where they differ at all; the most frequent ones are left out where cells are narrow."""
    counts = Counter(value for row in bits for value in row)
    if len(counts) == 1:
        return
    usual = counts.most_common(1)[0][0]
    wide = len(bits[0]) < _WIDE
    for y, row in enumerate(bits):
        for x, value in enumerate(row):
            if wide or value != usual:
                ink = "white" if shown[y][x] > dark else _INK
                axes.text(x, y, str(value), ha="center", va="center_baseline", fontsize=9 if wide else 6, color=ink)


def _scale(values: list[list[float]]) -> tuple[float, float]:
    """The ends of a map's colours: its worst layer, and its best one within reason."""
    errors = [value for row in values for value in row if math.isfinite(value)]
    high = max(errors, default=0.0)
    return min(max(min(errors, default=0.0), high - _SPAN), high - _LEAST_SPAN), high


def _grid(axes: Any, columns: int, rows: int) -> None:
    """White lines between the cells."""
    axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)


def _ticks(blocks: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 10, 20) if blocks / step <= 20 or step == 20)
    return list(range(0, blocks, step))


def _width(blocks: int) -> float:
    """Inches: enough for the titles, and for a cell each."""
    return min(16.0, max(8.0, 3.0 + 0.16 * blocks))
