"""The two figures about quality, in the style of plots.py: KL over the position in context, and how long answers agree.

Colour and marker are the precision, as in the figures of the sweep that served the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from harness.analysis.quality import Survival
from harness.records import Fidelity
from harness.report.placing import nice_ticks
from harness.report.plots import GRID, STYLES, End, end_labels, headed, save, short

LEAST_KL = 1e-6
"""Nats below which a KL is what arithmetic leaves: the foot of a log axis."""


def write_quality_figures(
    order: Sequence[str], positions: Sequence[Fidelity], curves: Sequence[Survival], out_dir: Path
) -> list[Path]:
    """Write those that have something to show, PNG and SVG of each. `order`: all precisions, the baseline first."""
    figures: dict[str, Callable[[], Figure]] = {}
    if len({row.first for row in positions if row.kl_nats is not None}) > 1:
        figures["kl_by_position"] = functools.partial(kl_by_position, order, positions)
    if any(len(curve.tokens) > 1 for curve in curves):
        figures["first_divergence"] = functools.partial(first_divergence, order, curves)
    return save(figures, out_dir) if figures else []


def kl_by_position(order: Sequence[str], positions: Sequence[Fidelity]) -> Figure:
    """KL in parts of the context, each as far from the next as any: a line that rises loses hold of long contexts."""
    figure = Figure(figsize=(7, 4.1), layout="constrained")
    axes = figure.subplots()
    headed(axes, "Distance from the baseline over the context", "KL in nats a token, log scale; bars: 95 % intervals")
    parts = sorted({(row.first or 1, row.last or 1) for row in positions})
    drawn = [name for name in order if any(row.precision == name for row in positions)]
    ends: list[End] = []
    shown: list[float] = []
    for at, precision in enumerate(drawn):
        colour, marker, dashes = _style(order, precision)
        rows = [row for row in positions if row.precision == precision and row.kl_nats is not None]
        shift = 0.03 * (at - (len(drawn) - 1) / 2)
        line = [(parts.index((row.first or 1, row.last or 1)) + shift, _seen(row.kl_nats)) for row in rows]
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=1.8, linestyle=dashes)
        for (x, y), row in zip(line, rows, strict=True):
            low, high = (y, y) if row.kl_nats_lo is None else (_seen(row.kl_nats_lo), _seen(row.kl_nats_hi))
            axes.plot([x, x], [low, high], color=colour, linewidth=1.2, marker="_", markersize=8)
            shown += [low, high]
        ends.append((_again(precision, order), colour, *line[-1]))
    low, high = min(shown) / 1.3, max(shown) * 1.3
    ticks = nice_ticks(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{'≤ ' if tick <= LEAST_KL else ''}{tick:g}" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xlim(-0.2, len(parts) - 0.8)
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(parts)))))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{first}–{last}" for first, last in parts]))
    axes.set_xlabel("tokens of the text read before the predicted one")
    end_labels(axes, ends)
    return figure


def first_divergence(order: Sequence[str], curves: Sequence[Survival]) -> Figure:
    """The share of answers that still say, token for token, what the baseline said; bands are 95 % intervals."""
    figure = Figure(figsize=(7, 4.1), layout="constrained")
    axes = figure.subplots()
    headed(axes, "How long answers agree with the baseline's", "share without a differing token; bands: 95 % intervals")
    longest = max(curve.tokens[-1] for curve in curves)
    ends: list[End] = []
    for curve in sorted(curves, key=lambda curve: order.index(curve.precision)):
        colour, _, dashes = _style(order, curve.precision)
        tokens = [*curve.tokens, longest]
        shares, lows, highs = (
            [*values, values[-1]] for values in (curve.share, _or(curve.lo, curve.share), _or(curve.hi, curve.share))
        )
        axes.fill_between(tokens, lows, highs, step="post", color=colour, alpha=0.12, linewidth=0)
        axes.step(tokens, shares, where="post", color=colour, linewidth=1.8, linestyle=dashes)
        ends.append((_again(curve.precision, order), colour, float(longest), shares[-1]))
    axes.set_xlim(0, longest * 1.02)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xlabel("tokens of the answer")
    end_labels(axes, ends)
    return figure


def _style(order: Sequence[str], precision: str) -> tuple[str, str, str]:
    """Colour and marker as in the other figures, and dashes where the colours have all been used."""
    at = order.index(precision)
    colour, marker = STYLES[at % len(STYLES)]
    return colour, marker, "-" if at < len(STYLES) else "--"


def _or(ends: Sequence[float | None], shares: Sequence[float]) -> list[float]:
    """Ends of an interval, the share itself where there is none."""
    return [share if end is None else end for end, share in zip(ends, shares, strict=True)]


def _seen(kl: float | None) -> float:
    """A KL as a log axis can hold it."""
    return max(kl or 0.0, LEAST_KL)


def _again(precision: str, order: Sequence[str]) -> str:
    """The baseline stands for its second round."""
    return f"{short(precision)}{' again' if precision == order[0] else ''}"
