"""Where labels and ticks go on a figure: plain arithmetic, no figure needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SERIES = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0),
)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near to `wanted` as they can be with `gap` between neighbours; order kept, ties by index.

    Clusters are pushed apart around their own mean: [0, 1] with gap 4 gives [-1.5, 2.5].
    """
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and _start(clusters[-1], wanted, gap) < _end(clusters[-2], wanted, gap):
            last = clusters.pop()
            clusters[-1] += last
    placed = [0.0] * len(wanted)
    for cluster in clusters:
        for step, index in enumerate(cluster):
            placed[index] = _start(cluster, wanted, gap) + gap * step
    return placed


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis: the coarsest series that leaves at least four between the ends."""
    ticks: list[float] = []
    for series in _SERIES:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = (round(step * 10.0**decade, 12) for decade in decades for step in series)
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _start(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[index] for index in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _end(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _start(cluster, wanted, gap) + gap * len(cluster)
