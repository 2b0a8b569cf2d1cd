"""Measured against predicted, a dot a published row: one figure for each promise of validate.PROMISES."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.predict import validate
from harness.predict.validate import Miss

STYLES = {
    "16bit": ("BF16, FP16", "#4c5a67"),
    "marlin": ("INT4, Marlin", "#d1495b"),
    "exllama": ("INT4, exllama", "#edae49"),
    "awq-gemm": ("INT4, AWQ's own", "#8d5a97"),
    "w8a16": ("INT8 weights", "#00798c"),
    "w8a8": ("INT8", "#30638e"),
    "fp8": ("FP8", "#66a182"),
}
"""Kernel -> its name in the legend, and its colour."""
FILES = {"decode tok/s of one stream": "decode", "tok/s of 8 and more at once": "throughput", "TPOT": "tpot"}


def draw(missed: Sequence[Miss], where: Path) -> list[Path]:
    """An SVG for each promise; returns them."""
    kept = [miss for miss in missed if miss.case.kept]
    paths = []
    for name, (belongs, _) in validate.PROMISES.items():
        own = [miss for miss in kept if belongs(miss)]
        if name.startswith("decode"):
            points = [(miss, *_decode(miss)) for miss in own]
        else:
            points = [(miss, miss.measured, miss.predicted) for miss in own]
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        _scatter(figure.add_subplot(), name, points)
        path = where / f"{FILES[name]}.svg"
        with matplotlib.rc_context({"svg.hashsalt": "kneebench", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None})
        paths.append(path)
    return paths


def _decode(miss: Miss) -> tuple[float, float]:
    """As tokens a second, whichever of the two was published."""
    if miss.quantity == "tok_s":
        return miss.measured, miss.predicted
    return 1e3 / miss.measured, 1e3 / miss.predicted


def _scatter(axes: Axes, name: str, points: Sequence[tuple[Miss, float, float]]) -> None:
    ends = np.array([value for _, *pair in points for value in pair])
    low, high = ends.min() / 1.3, ends.max() * 1.3
    line = np.array([low, high])
    axes.fill_between(line, line / 1.25, line * 1.25, color="#dfe5ea", linewidth=0, label="within 25 %")
    axes.plot(line, line, color="#8795a1", linewidth=1)
    for kernel, (label, colour) in STYLES.items():
        own = [(x, y) for miss, x, y in points if miss.condition.kernel.replace("dequant", "gemm") == kernel]
        if own:
            x, y = zip(*own, strict=True)
            axes.scatter(x, y, s=14, alpha=0.65, color=colour, linewidth=0, label=f"{label} ({len(own)})")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    unit = "ms" if name == "TPOT" else "tok/s"
    cards = len({miss.condition.card for miss, *_ in points})
    axes.set_xlabel(f"published, {unit}")
    axes.set_ylabel(f"predicted without the row's card, {unit}")
    axes.set_title(f"Predicted against published: {name}\n{len(points)} rows, {cards} cards", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
