"""The figure of a training: the loss that it lowered, the held-out loss that judged it, and what the optimizer did."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.loop import Row

_INK, _FAINT, _TRAIN, _HELD, _RATE, _SCALE = "#333333", "#9A9A9A", "#9BC4DD", "#0072B2", "#D55E00", "#009E73"


def draw(rows: Sequence["Row"], file: Path) -> None:
    """Draw `rows` into `file`, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, below = figure.subplots(2, 1, height_ratios=[3, 1.2], sharex=True)
    _losses(losses, rows)
    _optimizer(below, rows)
    for axes in figure.axes:
        axes.spines["top"].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    figure.savefig(file)


def _losses(axes: Any, rows: Sequence["Row"]) -> None:
    steps = [row.step for row in rows if row.step]
    axes.plot(steps, [row.loss for row in rows if row.step], color=_TRAIN, lw=1, label="each step")
    judged = [row for row in rows if row.heldout is not None]
    held = [float(row.heldout or 0.0) for row in judged]
    axes.plot([row.step for row in judged], held, "o-", color=_HELD, ms=4, lw=1.5, label="held out")
    best = min(range(len(held)), key=held.__getitem__)
    side = "right" if judged[best].step > steps[-1] / 2 else "left"  # away from the edge
    axes.annotate(
        f"kept: {held[best]:.4g}", (judged[best].step, held[best]), textcoords="offset points", xytext=(0, 20),
        ha=side, fontsize=9, color=_HELD,
    )  # fmt: skip
    axes.axhline(held[0], color=_FAINT, lw=0.8, ls=":")
    finite = [value for value in (*held, *(row.loss for row in rows)) if value > 0 and math.isfinite(value)]
    if finite and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axes.set_title("loss, nats a token", loc="left", fontsize=10, color=_INK)
    axes.legend(frameon=False, fontsize=9)


def _optimizer(axes: Any, rows: Sequence["Row"]) -> None:
    taken = [row for row in rows if row.step]
    axes.plot([row.step for row in taken], [row.learning_rate for row in taken], color=_RATE, lw=1.2)
    axes.set_title("learning rate", loc="left", fontsize=10, color=_RATE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=_INK)
    if len({row.loss_scale for row in taken}) > 1:
        other = axes.twinx()
        other.step([row.step for row in taken], [row.loss_scale for row in taken], color=_SCALE, lw=1)
        other.set_yscale("log", base=2)
        skipped = f", {taken[-1].skipped} steps left out" if taken[-1].skipped else ""
        other.set_title(f"loss scale{skipped}", loc="right", fontsize=10, color=_SCALE)
