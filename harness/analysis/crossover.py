"""Where the advantage of one precision over the baseline fades, and where it turns into a loss.

    ln ratio, so that up is ahead (latencies turned over)
        │  ⊤
        │  ●   ⊤
        │  ⊥   ●   ⊤                       ahead     the whole interval on the good side of 1
      0 ┼ ─ ─  ⊥  ─● ─ ⊤ ─ ─ ─             in doubt  it holds 1: the advantage has faded
        │          ⊥   ●  ╲  ⊤             behind    the whole interval on the other side: it is reversed
        │              ⊥     ●
        └──┴───┴───┴───┴─────┴── users, or req/s (log)

Low bits save memory traffic, which decides while few are served: each step reads all the weights for a handful of
tokens. The more tokens share a step, and the longer the prompts, the more the arithmetic decides, and dequantizing adds
to that. So the advantage of INT4 is a matter of load and of traffic, and both are named with it.

Three figures, paired under the same load (compare.py): tok_s as measured; TPOT, which is decode; TTFT, which is prefill
and the wait for it. A load whose ratio has no interval is in doubt. `cross` is where the ratio is 1, on a straight line
in the logs of ratio and load, between the loads where its figure changes sides; within a doubt it may lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from harness.analysis.levels import latest
from harness.records import Advantage, Crossover, Ratio, SweepPoint, Traffic

COMPARED = {"tok_s": 1, "tpot_p50_ms": -1, "ttft_p50_ms": -1}
"""Metric -> the side of 1 that is ahead, in logs: more tokens a second, less latency."""
DECODE_WEIGHT = 8
"""Input tokens that take a card as long as one output token.

A decode step reads the weights once. With 2 operations and 2 bytes (BF16) a weight, a card of F operations and B bytes
a second could in that time compute F/B tokens of a prompt: 98 on an RTX 5070 Ti (88 TFLOP/s, 896 GB/s), 172 on an RTX
A4000 (77 and 448). The step makes a token for each of the sequences in the batch, 16 to 32 where a card is worth its
rent: an output token takes as long as 3 to 11 of a prompt's.
"""


def traffic(points: Sequence[SweepPoint]) -> Traffic | None:
    """Whether a run's requests are more prefill or more decode, an output token counting as DECODE_WEIGHT input tokens:
    the median over its rows. None: no row tells its lengths."""
    known = [
        (point.input_tokens_mean, point.output_tokens_mean)
        for point in latest(points)
        if point.input_tokens_mean is not None and point.output_tokens_mean
    ]
    if not known:
        return None
    heavy = median(given / made for given, made in known) > DECODE_WEIGHT
    return "prefill-heavy" if heavy else "decode-heavy"


def find_crossovers(points: Sequence[SweepPoint], ratios: Sequence[Ratio]) -> list[Crossover]:
    """One for each pair of precisions and each metric of COMPARED that has a ratio, from the lines of compare()."""
    kind = traffic(points)
    pairs = dict.fromkeys((ratio.precision, ratio.baseline) for ratio in ratios)
    found = []
    for precision, baseline in pairs:
        for metric in COMPARED:
            own = [
                line for line in ratios if (line.precision, line.baseline, line.metric) == (precision, baseline, metric)
            ]
            if any(line.ratio for line in own):
                found.append(find_crossover(own, kind))
    return found


def find_crossover(ratios: Sequence[Ratio], kind: Traffic | None = None) -> Crossover:
    """Of the ratios of one precision and metric, at least one of them with a figure."""
    lines = sorted((line for line in ratios if line.ratio), key=_load)
    loads, sides = [_load(line) for line in lines], [_side(line) for line in lines]
    gains = [_gain(line) for line in lines]
    ahead, doubt, behind = (
        tuple(at for at, side in zip(loads, sides, strict=True) if side == wanted) for wanted in (1, 0, -1)
    )
    outcome, cross = _outcome(sides), None
    last = max((at for at, side in enumerate(sides) if side == 1), default=-1)
    after = sides[last + 1 :]
    if outcome in ("fades", "reverses"):
        cross = _crossing(loads[last:], gains[last:])
    elif outcome == "gains":
        cross = _crossing(loads[last::-1], gains[last::-1])
    best = max(range(len(lines)), key=lambda at: gains[at])
    return Crossover(
        precision=lines[0].precision,
        baseline=lines[0].baseline,
        metric=lines[0].metric,
        outcome=outcome,
        ahead=ahead,
        doubt=doubt,
        behind=behind,
        fades_at=loads[last + 1] if outcome in ("fades", "reverses") else None,
        reverses_at=loads[last + 1 + after.index(-1)] if outcome == "reverses" else None,
        cross=cross,
        best=lines[best].ratio,
        best_at=loads[best],
        traffic=kind,
    )


def _outcome(sides: Sequence[int]) -> Advantage:
    """Of the sides of 1 in the order of the loads: 1 surely ahead, -1 surely behind, 0 in doubt."""
    if 1 not in sides:
        return "never" if -1 in sides else "undecided"
    last = len(sides) - 1 - list(reversed(sides)).index(1)
    if last < len(sides) - 1:
        return "reverses" if -1 in sides[last:] else "fades"
    return "always" if sides[0] == 1 and -1 not in sides else "gains"


def _crossing(loads: Sequence[float], gains: Sequence[float]) -> float | None:
    """The load at which the log ratio, first ahead, is first 0; None: its figure stays ahead."""
    for at in range(1, len(loads)):
        if gains[at] <= 0:
            share = gains[at - 1] / (gains[at - 1] - gains[at])
            return float(loads[at - 1] * (loads[at] / loads[at - 1]) ** share)
    return None


def _side(line: Ratio) -> int:
    """1: surely ahead, -1: surely behind, 0: in doubt."""
    if line.ratio_lo is None or line.ratio_hi is None:
        return 0
    return COMPARED[line.metric] * ((line.ratio_lo > 1) - (line.ratio_hi < 1))


def _gain(line: Ratio) -> float:
    """The log ratio, positive where it is ahead."""
    return COMPARED[line.metric] * math.log(line.ratio or 1.0)


def _load(line: Ratio) -> float:
    return line.conc if line.rate_rps is None else line.rate_rps
