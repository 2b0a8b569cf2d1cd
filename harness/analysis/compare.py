"""One precision against the baseline under the same load, paired: how many times its figures, with a 95 % interval.

Both precisions are sent the same prompts and lengths, and their server sessions take turns (ABBA), so what moves one
(a long prompt, a machine that drifts) moves the other alike. Paired, it cancels; two intervals side by side hold it
twice. The pair is a pair of server sessions wherever there are two or more. With x_r and b_r a figure of repeat r, in
the precision and in the baseline,

    d_r = ln x_r − ln b_r       ratio = exp(mean d)

    2..9 pairs    exp(mean d ± t(0.975, n−1) · s_d / √n)        few and positive: logs, and t knows how few
    from 10       95 % percentile bootstrap of mean d           enough to drop the assumption

One session of each can only be paired within itself. Latencies are paired by request: the same user's same question,
answered in both windows. q is the 95th percentile or the median, i = 1..n the pairs in the order in which the
baseline's requests began, and i* a resample of i in moving blocks of about n^(1/3) neighbours, taken at both alike:

    ratio = q(x_1..x_n) / q(b_1..b_n)       interval: the 2.5th and 97.5th percentiles of q(x_i*) / q(b_i*)

The two windows have no common time, so their tokens per second are no pair: each row's own interval, from the slices
of its window, goes into `throughput_ratio`. Such intervals know nothing of run-to-run spread: basis = "requests".

Of predicted rows nothing is paired: the noise of a simulation is not what a prediction is wrong by. Their ratio has the
interval of the two rows' error bands (`rows_ratio`), which is too wide as far as both are wrong alike: basis = "bands".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from harness.analysis import metrics
from harness.analysis.levels import BOOTSTRAP_FROM, compared, latest, precision_order
from harness.records import Cell, Ratio, RequestRecord, SweepPoint

Floats = NDArray[np.float64]

Pair = tuple[SweepPoint, SweepPoint]
"""The baseline's row and the precision's, of the same load and repeat."""

Answered = Mapping[tuple[str, int], Mapping[tuple[int, int], RequestRecord]]
"""(cell, attempt) -> (user, sequence) -> the request, completed inside the window; in the order in which they began."""

MIN_PAIRS = metrics.MIN_P95
"""Paired requests below which there is too little to resample: the ratio of the two rows, and no interval."""

LATENCIES: dict[str, tuple[float, Callable[[RequestRecord], float | None]]] = {
    "p95_ms": (95, metrics.e2e_ms),
    "ttft_p50_ms": (50, metrics.ttft_ms),
    "tpot_p50_ms": (50, metrics.tpot_ms),
}
"""Column -> the percentile that it is, and of what."""
METRICS = ("tok_s", *LATENCIES)
BAND_OF = {"ttft_p50_ms": "ttft_p95_ms", "tpot_p50_ms": "tpot_p95_ms"}
"""Whose error band a predicted median has, as a share: validation is of a metric, not of a percentile."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio and its 95 % interval; an end that is None is open or unknown."""

    value: float | None = None
    lo: float | None = None
    hi: float | None = None


def compare(
    points: Sequence[SweepPoint], requests: Sequence[RequestRecord], baseline: str | None = None
) -> list[Ratio]:
    """A line for each precision but the baseline, load and metric that both have; by precision, then load.

    Invalid rows and their partners are left out. Without `requests`, loads with one session of each have no line.
    `baseline`: a precision of the run (ValueError else); None: BF16 where there is one, else the first, and where
    engine arguments vary the same in the same setting.
    """
    against = compared(points)
    if baseline is not None:
        order = precision_order(points)
        order.remove(baseline)
        against = dict.fromkeys(order, baseline)
    answered = answered_in(requests)
    lines = []
    for precision, base in against.items():
        for pairs in session_pairs(points, base, precision):
            for metric in METRICS:
                line = _line(metric, pairs, answered)
                lines += [line] if line else []
    return lines


def session_pairs(points: Sequence[SweepPoint], baseline: str, precision: str) -> list[list[Pair]]:
    """For each load that both have: the pairs of their repeats, neither one invalid."""
    rows: dict[tuple[int, float], dict[tuple[str, int], SweepPoint]] = {}
    for point in latest(points):
        if point.verdict != "invalid":
            found = rows.setdefault((point.conc, point.rate_rps or 0.0), {})
            found[point.precision, point.repeat] = point
    paired = []
    for _, row in sorted(rows.items()):
        repeats = sorted(repeat for name, repeat in row if name == baseline and (precision, repeat) in row)
        paired.append([(row[baseline, repeat], row[precision, repeat]) for repeat in repeats])
    return [pairs for pairs in paired if pairs]


def throughput_ratio(pairs: Sequence[Pair]) -> Estimate:
    """tok_s of a precision over the baseline's: over the sessions, or of the only pair's rows, measured apart."""
    return rows_ratio("tok_s", pairs)


def rows_ratio(metric: str, pairs: Sequence[Pair]) -> Estimate:
    """A column with an interval of its own, over the baseline's: over the sessions, or of the only pair's two rows.

    The latter is MOVER on logs (Zou & Donner, Stat. Med. 27, 2008), what two independent intervals support:
    ln lo = ln r − √((ln x − ln x_lo)² + (ln b_hi − ln b)²), and the mirror image for hi. Of a latency it is too wide
    where both were asked the same, which it does not use.
    """
    pairs = _having(metric, pairs)
    if len(pairs) != 1:
        return _over_sessions(metric, pairs)
    base, other = ([end or 0.0 for end in with_ends(metric, row)] for row in pairs[0])
    value = float(other[0] / base[0])
    if not all((*base, *other)):
        return Estimate(value)
    (b, b_lo, b_hi), (x, x_lo, x_hi) = map(math.log, base), map(math.log, other)
    return Estimate(
        value, value * math.exp(-math.hypot(x - x_lo, b_hi - b)), value * math.exp(math.hypot(x_hi - x, b - b_lo))
    )


def with_ends(metric: str, row: SweepPoint) -> tuple[float | None, float | None, float | None]:
    """A figure and the ends of its interval; those of a median are its 95th percentile's, scaled.

    Only predicted rows have them for their medians.
    """
    value = getattr(row, metric)
    column = BAND_OF.get(metric, metric)
    middle, low, high = (getattr(row, f"{column}{end}") for end in ("", "_lo", "_hi"))
    if value is None or not middle or low is None or high is None:
        return value, None, None
    return value, low * value / middle, high * value / middle


def paired_percentile_ratio(base_ms: Floats, other_ms: Floats, q: float) -> Estimate:
    """Ratio of the q-th percentiles of two series, paired and in order; pairs are resampled, never their halves.

    For p95 the interval errs to the wide side, because few pairs decide it: of made runs of 120 pairs, 96.5 % held
    the truth where the pairs' logs correlate with 0.78, and 99.5 % with 0.94. For medians it was 94 and 96.5 %.
    """

    def ratio(picks: Floats) -> Floats:
        at = picks.astype(np.intp)
        return np.asarray(np.percentile(other_ms[at], q, axis=1) / np.percentile(base_ms[at], q, axis=1))

    numbers = np.arange(len(base_ms), dtype=np.float64)
    low, high = metrics.block_bootstrap(numbers, ratio) or (None, None)
    return Estimate(float(np.percentile(other_ms, q) / np.percentile(base_ms, q)), low, high)


def _line(metric: str, pairs: Sequence[Pair], answered: Answered) -> Ratio | None:
    pairs = _having(metric, pairs)
    if not pairs:
        return None
    basis: Literal["sessions", "requests", "bands"] = "sessions" if len(pairs) > 1 else "requests"
    if len(pairs) > 1:
        found, count = _over_sessions(metric, pairs), len(pairs)
    elif all(row.source == "predicted" for row in pairs[0]):
        found, count, basis = rows_ratio(metric, pairs), 1, "bands"
    else:
        found, count = over_requests(metric, pairs[0], answered, answered)
    if not count:
        return None
    base, other = pairs[0]
    return Ratio(
        precision=other.precision,
        baseline=base.precision,
        conc=other.conc,
        metric=metric,
        ratio=found.value,
        ratio_lo=found.lo,
        ratio_hi=found.hi,
        pairs=count,
        basis=basis,
        rate_rps=other.rate_rps,
    )


def _having(metric: str, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose figures are both there; a ratio needs them positive."""
    return [pair for pair in pairs if all((getattr(point, metric) or 0) > 0 for point in pair)]


def _over_sessions(metric: str, pairs: Sequence[Pair]) -> Estimate:
    """The mean log ratio of two or more pairs of sessions, turned back."""
    if len(pairs) < 2:
        return Estimate()
    logs = np.log([getattr(other, metric) / getattr(base, metric) for base, other in pairs])
    n, mean = len(logs), float(logs.mean())
    if n >= BOOTSTRAP_FROM:
        means = np.random.default_rng(0).choice(logs, size=(4000, n)).mean(axis=1)
        low, high = (float(end) for end in np.quantile(means, [0.025, 0.975]))
    else:
        half = float(student_t.ppf(0.975, n - 1)) * float(logs.std(ddof=1)) / math.sqrt(n)
        low, high = mean - half, mean + half
    return Estimate(math.exp(mean), math.exp(low), math.exp(high))


def over_requests(metric: str, pair: Pair, base_answered: Answered, answered: Answered) -> tuple[Estimate, int]:
    """One session of each, and how many requests both answered; without an interval below MIN_PAIRS of them."""
    base, other = pair
    theirs, ours = base_answered.get(_cell(base), {}), answered.get(_cell(other), {})
    common = [(request, ours[key]) for key, request in theirs.items() if key in ours and _same(request, ours[key])]
    apart = Estimate(getattr(other, metric) / getattr(base, metric))
    if metric not in LATENCIES:
        return (throughput_ratio([pair]) if len(common) >= MIN_PAIRS else apart), len(common)
    q, measure = LATENCIES[metric]
    times = [(b, x) for one, two in common if (b := measure(one)) and (x := measure(two))]
    if len(times) < MIN_PAIRS:
        return apart, len(times)
    base_ms, other_ms = np.array(times).T
    return paired_percentile_ratio(base_ms, other_ms, q), len(times)


def _same(one: RequestRecord, two: RequestRecord) -> bool:
    """The same lengths were asked: what no plan made alike (a table put together by hand) is no pair."""
    return (one.input_tokens_asked, one.output_tokens_asked) == (two.input_tokens_asked, two.output_tokens_asked)


def _cell(point: SweepPoint) -> tuple[str, int]:
    return Cell(point.precision, point.conc, point.repeat, point.rate_rps).key, point.attempt


def answered_in(requests: Sequence[RequestRecord]) -> Answered:
    """The requests of a run that a pair can be made of, by cell."""
    cells: dict[tuple[str, int], dict[tuple[int, int], RequestRecord]] = {}
    for record in metrics.completed(requests):
        cells.setdefault((record.cell, record.attempt), {})[record.user, record.sequence] = record
    return cells
