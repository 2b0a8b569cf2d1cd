"""The four figures of a run, as PNG for a README and SVG for print. This, quality_plots.py, kind_plots.py and
timeline_plots.py alone import matplotlib.

One reading rule for all: colour and marker are the precision, the line's name stands at its end, bars are 95 %
intervals, a hollow marker is a suspect point, a hollow one struck through is invalid and joins no line. What is
predicted says so in its title, and its line is dashed, in the shaded band of its error. Colours are Okabe and Ito's,
which survive the common colour blindnesses; the marker says the same without colour. Sizes are set for 700 px of width.
Nothing in a file depends on the day or on chance, so the same run gives the same bytes.

Over 300 lines because the four share their marks: curves, knees, label placement and axes are written once for all.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from harness.analysis.capacity import memory_split
from harness.analysis.cost import AS_MEASURED, price
from harness.analysis.headline import label
from harness.analysis.knee import safe_load
from harness.analysis.levels import Axis, axis, latest, levels, load, one_trace, precision_order, shown
from harness.analysis.words import words_of
from harness.assumptions import Assumptions
from harness.files import write_whole
from harness.records import CostLine, Knee, SweepPoint
from harness.report.placing import nice_ticks, spread
from harness.slo import Slo
from harness.variants import SHORT, flags_varied, precision_of, short_setting

STYLES = (
    ("#0072B2", "o"),  # blue
    ("#D55E00", "s"),  # vermillion
    ("#009E73", "^"),  # bluish green
    ("#CC79A7", "D"),  # reddish purple
    ("#E69F00", "v"),  # orange
    ("#56B4E9", "P"),  # sky blue
    ("#000000", "X"),
)
INK, FAINT, GRID = "#333333", "#767676", "#E6E6E6"
AXES = {
    "users": ("users", "concurrent users, log scale"),
    "req/s": ("request rate", "requests sent per second (open loop), log scale"),
}
"""What the load of a run is called in a title and under its axis."""
PARTS = (
    ("weights_gib", "weights", "#4D4D4D", "white", "#4D4D4D"),
    ("kv_cache_gib", "KV cache", "#56B4E9", "#333333", "#0F6CA6"),
    ("other_gib", "other", "#D0D0D0", "#333333", "#767676"),
)
"""Column, name, and three inks: bar, figure on the bar, name above it (dark enough for white paper)."""
CAUSES = {
    "kv_cache": "KV cache full",
    "max_num_seqs": "max_num_seqs",
    "client": "load generator",
    "compute": "compute",
    "unknown": "cause unknown",
}

PREDICTED_LINE = "--"
"""What was predicted is drawn dashed, in the band of its error."""

Figures = tuple[float | None, float | None, float | None]
"""A figure and the ends of its interval."""
Value = Callable[[SweepPoint], Figures]
End = tuple[str, str, float, float]
"""A line's end: precision or label, colour, x, y in data coordinates."""

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.hashsalt": "kneebench",
    "svg.fonttype": "path",
}


def write_figures(
    points: Sequence[SweepPoint],
    knees: Sequence[Knee],
    costs: Sequence[CostLine],
    out_dir: Path,
    *,
    slo: Slo,
    card_gib: float | None = None,
    assumptions: Assumptions = AS_MEASURED,
) -> list[Path]:
    """Write every figure that has something to show; PNG and SVG of each, in the order of the report.

    `card_gib` is the card's whole memory, drawn as the end of the scale where known. A single trace has no load to
    draw anything over: it gets the memory alone.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    curves = not one_trace(points)
    if curves and any(point.p95_ms is not None for point in points):
        figures["latency"] = lambda: latency(points, knees, None if slo.goodput else slo.p95_s)
    if curves and any(point.tok_s for point in points):
        figures["throughput"] = lambda: throughput(points)
    if any(line.total_gib for line in memory_split(points)):
        figures["memory"] = lambda: memory(points, card_gib)
    if curves and any(line.usd_per_1m_tokens for line in costs):
        figures["cost"] = lambda: cost(points, knees, costs, assumptions)
    return save(figures, out_dir)


def save(figures: Mapping[str, Callable[[], Figure]], out_dir: Path) -> list[Path]:
    """Draw each and write it under its name as PNG and SVG, in our style."""
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_RC):
        for name, draw in figures.items():
            figure = draw()
            for suffix, unwritten in (("png", ("Software",)), ("svg", ("Date", "Creator"))):
                path = out_dir / f"{name}.{suffix}"
                drawn = io.BytesIO()
                figure.savefig(drawn, format=suffix, dpi=200, facecolor="white", metadata=dict.fromkeys(unwritten))
                write_whole(path, drawn.getvalue())
                written.append(path)
    return written


def latency(points: Sequence[SweepPoint], knees: Sequence[Knee], slo_s: float | None) -> Figure:
    """p95 over the load, both log: the knee's interpolation is then the line itself. Below it a strip of knees."""
    figure = Figure(figsize=(_width(points, columns=2), 4.2 + 0.22 * len(knees)), layout="constrained")
    upper, strip = figure.subplots(2, 1, sharex=True, height_ratios=(12, 0.6 + 0.9 * len(knees)))
    title = words_of(points).titled(f"p95 latency against {_axis_words(points)[0]}")
    headed(upper, title, "seconds from intended send to last token, log scale")
    ends = _called(_curves(upper, points, _p95_s))
    _load_axis(upper, points)
    _log_axis(upper, [*([slo_s] if slo_s else []), *_shown(points, _p95_s)], "{:g}")
    if slo_s:
        upper.axhline(slo_s, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1.5)
        ends = [*ends, (f"SLO {slo_s:g} s", INK, upper.get_xlim()[1], slo_s)]
    end_labels(upper, ends)
    upper.tick_params(axis="x", which="both", labelbottom=False, length=0)
    upper.spines["bottom"].set_visible(False)
    _knee_strip(upper, strip, points, knees, slo_s)
    strip.set_xlabel(_axis_words(points)[1])
    _note(figure, points, _p95_s)
    return figure


def throughput(points: Sequence[SweepPoint]) -> Figure:
    """Output tokens per second over the load, from zero."""
    figure = Figure(figsize=(_width(points), 4.1), layout="constrained")
    axes = figure.subplots()
    words = words_of(points)
    subtitle = words.reworded("output tokens per second, inside the measured window")
    headed(axes, words.titled(f"Throughput against {_axis_words(points)[0]}"), subtitle)
    ends = _called(_curves(axes, points, _tok_s))
    _load_axis(axes, points)
    axes.set_ylim(0, max(_shown(points, _tok_s)) * 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xlabel(_axis_words(points)[1])
    end_labels(axes, ends)
    _note(figure, points, _tok_s)
    return figure


def memory(points: Sequence[SweepPoint], card_gib: float | None = None) -> Figure:
    """What the engine holds: weights, KV cache, other, in GiB; one bar for each precision."""
    rows = [line for line in memory_split(points) if line.total_gib]
    host = any(line.kind == "host" for line in rows)
    limit = None if host else card_gib
    reach = max([limit or 0.0, *(line.total_gib for line in rows)])
    figure = Figure(figsize=(_width(points), 1.5 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    subtitle = "GiB held by the engine" + (", on a CPU" if host else "")
    headed(axes, words_of(points).titled("Host memory split" if host else "VRAM split"), subtitle, pad=34)
    names: list[tuple[str, str, float]] = []
    for y, line in enumerate(rows):
        left = 0.0
        for field, name, colour, ink, name_ink in PARTS:
            size = getattr(line, field)
            if not size:
                continue
            axes.barh(y, size, left=left, height=0.6, color=colour, edgecolor="white", linewidth=1)
            if size > 0.07 * reach:
                axes.text(left + size / 2, y, _gib(size), ha="center", va="center", color=ink)
            if y == 0:
                names.append((name, name_ink, (left + size / 2) / reach))
            left += size
        room = f", {line.kv_cache_tokens:,} KV tokens" if line.kv_cache_tokens else ""
        axes.annotate(f"{_gib(left)} GiB{room}", (max(left, limit or 0), y), (6, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    if limit:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        names.append((f"card {limit:.1f}", INK, limit / reach))
    axes.set_xlim(0, reach * 1.005)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for (name, colour, _), x in zip(names, spread([x for _, _, x in names], 0.16), strict=True):
        axes.annotate(name, (x, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="center",
                      color=colour, fontweight="bold", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(line.precision) for line in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)  # every bar carries its figures
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def cost(
    points: Sequence[SweepPoint],
    knees: Sequence[Knee],
    costs: Sequence[CostLine],
    assumptions: Assumptions = AS_MEASURED,
) -> Figure:
    """$/1M output tokens over the load, both log; the operating points ringed, their prices at the lines' ends."""
    priced = functools.partial(price, assumptions=assumptions)
    figure = Figure(figsize=(_width(points), 4.1), layout="constrained")
    axes = figure.subplots()
    most = f"ring: operating point, most {axis(points).unit} inside the SLO"
    headed(axes, words_of(points).titled("Price of a million output tokens"), f"USD, log scale; {most}")
    # The first line of each is its operating point.
    operating = {line.precision: line for line in reversed(costs)}
    safe = {knee.precision: safe_load(knee) for knee in knees}
    ends = []
    for precision, colour, x, y in _curves(axes, points, priced):
        line, name = operating.get(precision), short(precision)
        if line is None:  # an invalid mark
            text = name
        elif line.usd_per_1m_tokens is None or not (largest := safe[line.precision]):
            text = f"{name}\nnever inside SLO"
        else:
            text = f"{name}\n{_usd(line.usd_per_1m_tokens)} at {axis(points).amount(largest)}"
            at = largest * _dodge(points, line.precision), line.usd_per_1m_tokens
            axes.plot(*at, "o", markersize=15, fillstyle="none", color=colour, markeredgewidth=1.8)
        ends.append((text, colour, x, y))
    _load_axis(axes, points)
    _log_axis(axes, _shown(points, priced), r"\${:g}")
    axes.set_xlabel(_axis_words(points)[1])
    end_labels(axes, ends)
    _note(figure, points, priced)
    return figure


def _curves(axes: Axes, points: Sequence[SweepPoint], value: Value) -> list[End]:
    """Draw a line for each precision; returns where each one ends, by the precision's name.

    An invalid mark is returned as an end without a name: labels keep clear of it.
    """
    ends: list[End] = []
    predicted = words_of(points).predicted
    for index, precision in enumerate(precision_order(points)):
        colour, _ = STYLES[index % len(STYLES)]
        _, marker = STYLES[(index + index // len(STYLES)) % len(STYLES)]  # a colour that comes again has another
        shift = _dodge(points, precision)
        own = [level for level in levels(points) if level.precision == precision]
        line = [(load(level) * shift, y, level) for level in own if (y := value(level)[0])]
        style = PREDICTED_LINE if predicted else "-"
        axes.plot([x for x, *_ in line], [y for _, y, _ in line], style, color=colour, linewidth=1.8, zorder=2)
        if predicted:
            band = [(x, low, high) for x, _, level in line for _, low, high in (value(level),) if low and high]
            at, lows, highs = ([each[end] for each in band] for end in range(3))
            axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0, zorder=1)
        for x, y, level in line:
            _, low, high = value(level)
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=colour, linewidth=1.2, marker="_", markersize=8, zorder=2)
            face = colour if level.verdict == "valid" else "white"
            axes.plot(x, y, marker, markersize=6, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3)
        for point in points:
            if point.precision == precision and point.verdict == "invalid" and (y := value(point)[0]):
                x = load(point) * shift
                axes.plot(x, y, marker, markersize=8, color=colour, markerfacecolor="white", zorder=3)
                axes.plot(x, y, "x", markersize=11, color=colour, zorder=4)
                ends.append(("", colour, x, y))
        if line:
            ends.append((precision, colour, *line[-1][:2]))
    return ends


def _width(points: Sequence[SweepPoint], columns: int = 1) -> float:
    """Inches; more than 7 where names hold settings, which stand in so many columns beside the axes."""
    longest = max(len(short(point.precision)) for point in points)
    return 7 + columns * max(0, longest - 14) * 0.085


def _called(ends: Sequence[End]) -> list[End]:
    """Ends of curves with their names as a figure has room for them."""
    return [(short(precision), colour, x, y) for precision, colour, x, y in ends]


def _knee_strip(
    upper: Axes, strip: Axes, points: Sequence[SweepPoint], knees: Sequence[Knee], slo_s: float | None
) -> None:
    """One row for each knee under the curves: the bar is its interval, the diamond the interpolated crossing."""
    order = precision_order(points)
    left, right = strip.get_xlim()
    bottom = upper.get_ylim()[0]
    for y, knee in enumerate(knees):
        colour = STYLES[order.index(knee.precision) % len(STYLES)][0]
        if knee.cross_lo is None:
            none = words_of(points).reworded(f"  no tested {axis(points).noun} is inside the SLO")
            strip.text(left, y, none, va="center", fontsize=9, color=colour)
            continue
        low, high = max(knee.cross_lo, left), knee.cross_hi or right
        strip.plot([low, high], [y, y], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        if knee.cross_hi is None:
            strip.plot(right, y, ">", color=colour, markersize=7, clip_on=False)
        x = None
        if knee.cross is not None:
            x = knee.cross * _dodge(points, knee.precision)
            strip.plot(x, y, "D", color=colour, markersize=6)
            strip.plot([x, x], [y, -0.9], color=colour, linewidth=1, linestyle=":")
            if slo_s and knee.limit == "p95":
                upper.plot([x, x], [bottom, slo_s], color=colour, linewidth=1, linestyle=":", zorder=1)
                upper.plot(x, slo_s, "D", color=colour, markersize=6, markeredgecolor="white", zorder=4)
        room_left, room_right = math.log(low / left), math.log(right / high)
        side, end, push = ("left", high, 7) if room_right > room_left else ("right", low, -7)
        place: dict[str, Any] = {"xytext": (push, 0), "textcoords": "offset points", "ha": side, "va": "center"}
        if max(room_left, room_right) < 0.45 * math.log(right / left):
            # No room beside the bar: on it, in the longer part that the diamond leaves.
            halves = ((low, x), (x, high)) if x else ((low, high),)
            end = math.sqrt(math.prod(max(halves, key=lambda half: half[1] / half[0])))
            place |= {"ha": "center", "xytext": (0, 0), "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
        strip.annotate(_knee_text(knee, axis(points)), (end, y), fontsize=9, color=colour, **place)
    strip.set_ylim(len(knees) - 0.4, -0.9)
    strip.set_yticks(range(len(knees)), [f"{short(knee.precision)} knee" for knee in knees], fontsize=9)
    strip.tick_params(axis="y", length=0)
    strip.spines["left"].set_visible(False)


def _knee_text(knee: Knee, unit: Axis) -> str:
    safe = safe_load(knee)
    if knee.beyond_range:
        return f"none in range, safe up to {safe:g}" if safe else "none in range, none safe"
    if knee.cross_hi is None:
        span = f"above {knee.cross_lo:g}" if knee.cross_lo else "not bounded"
    else:
        span = f"{knee.cross_lo:g}–{knee.cross_hi:g}" if knee.cross_lo else f"below {knee.cross_hi:g}"
    return f"at {unit.about(knee.cross or 0)} {unit.unit} ({span}), {CAUSES.get(knee.cause, knee.cause)}"


def _axis_words(points: Sequence[SweepPoint]) -> tuple[str, str]:
    return AXES[axis(points).unit]


def headed(axes: Axes, title: str, subtitle: str, pad: float = 22) -> None:
    axes.set_title(title, pad=pad)
    place: dict[str, Any] = {"xytext": (0, pad - 15), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), fontsize=9, color=FAINT, **place)


def _load_axis(axes: Axes, points: Sequence[SweepPoint]) -> None:
    """Log axis with a tick at each tested load, less those too near to the one before."""
    tested = sorted({load(point) for point in points})
    octaves = max(math.log2(tested[-1] / tested[0]), 1.0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(tested[0] / 2 ** (0.06 * octaves), tested[-1] * 2 ** (0.03 * octaves))
    ticks: list[float] = []
    for at in reversed(tested):  # from the large end: that is where the knee is
        if not ticks or math.log2(ticks[-1] / at) > 0.05 * octaves:
            ticks.append(at)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([shown(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_axis(axes: Axes, shown: Sequence[float], form: str) -> None:
    low, high = min(shown) / 1.15, max(shown) * 1.15
    ticks = nice_ticks(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([form.format(tick) for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def end_labels(axes: Axes, ends: Sequence[End]) -> None:
    """Name each line in a column behind the longest; labels that would touch move apart, a thin line leads to what ends
    earlier."""
    to_fraction = axes.transScale + axes.transLimits
    places = [to_fraction.transform((x, y)) for _, _, x, y in ends]
    gap = 0.062 * max((text.count("\n") + 1 for text, *_ in ends), default=1)
    heights = spread([float(place[1]) for place in places], gap)
    floor = gap / 2 - 0.02  # nothing below the axis
    for rank, index in enumerate(sorted(range(len(heights)), key=heights.__getitem__)):
        heights[index] = max(heights[index], floor + rank * gap)
    column = max((float(place[0]) for place in places), default=1.0)
    for (text, colour, *_), place, height in zip(ends, places, heights, strict=True):
        if text and column - place[0] > 0.06:
            axes.plot([place[0] + 0.012, column + 0.008], [place[1], height], color=colour, linewidth=0.8, alpha=0.6,
                      transform=axes.transAxes, clip_on=False, zorder=1)  # fmt: skip
        axes.annotate(text, (column, height), (13, 0), xycoords="axes fraction", textcoords="offset points",
                      va="center", color=colour, fontweight="bold", annotation_clip=False)  # fmt: skip


def _note(figure: Figure, points: Sequence[SweepPoint], value: Value) -> None:
    """Say what a band and hollow mean where there is any, and name what could not be drawn."""
    parts = []
    if words_of(points).predicted and any(None not in value(point) for point in points):
        parts.append("band: 95 % error of validation")
    if any(point.verdict == "suspect" and value(point)[0] for point in points):
        parts.append("hollow: suspect")
    if any(point.verdict == "invalid" and value(point)[0] for point in points):
        parts.append("struck through: invalid, no part of the line")
    absent = dict.fromkeys(
        f"{short(point.precision)} at {shown(load(point))}" for point in latest(points) if not value(point)[0]
    )
    if absent:
        parts.append("no figure: " + ", ".join(absent))
    varied = flags_varied([point.precision for point in points])
    parts += [f"{SHORT[flag]}: {flag}" for flag in varied if flag in SHORT]
    if parts:
        figure.supxlabel(" · ".join(parts), x=0.01, ha="left", fontsize=8.5, color=FAINT)


def _dodge(points: Sequence[SweepPoint], precision: str) -> float:
    """A few pixels sideways for each precision, as a factor on a log axis: equal points do not hide each other."""
    order = precision_order(points)
    loads = [load(point) for point in points]
    octaves = max(math.log2(max(loads) / min(loads)), 1.0)
    return float(2 ** (0.012 * octaves * (order.index(precision) - (len(order) - 1) / 2)))


def _shown(points: Sequence[SweepPoint], value: Value) -> list[float]:
    """Every positive figure that the axes must hold, interval ends included."""
    return [number for point in [*points, *levels(points)] for number in value(point) if number and number > 0]


def _p95_s(point: SweepPoint) -> Figures:
    return _seconds(point.p95_ms), _seconds(point.p95_ms_lo), _seconds(point.p95_ms_hi)


def _tok_s(point: SweepPoint) -> Figures:
    return point.tok_s, point.tok_s_lo, point.tok_s_hi


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def short(precision: str) -> str:
    """The precision as a figure has room for it: AWQ, AWQ seqs=64 (`_note` says what seqs is)."""
    name = label(precision_of(precision)).replace("$", r"\$")  # two bare dollars would be a formula
    name = name if len(name) <= 14 else name[:13] + "…"
    setting = short_setting(precision)
    return f"{name} {setting if len(setting) <= 36 else setting[:35] + '…'}" if setting else name


def _gib(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _usd(value: float) -> str:
    return rf"\${value:,.2f}" if value >= 1 else rf"\${value:#.2g}"
