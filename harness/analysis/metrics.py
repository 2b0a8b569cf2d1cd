"""From request records to figures. Pure functions; each formula stands here once.

For a request with intended send time t0, first and last token-bearing chunk t1 and tn, and n completion tokens by the
server's `usage`:

    TTFT = t1 - t0              E2E = tn - t0              TPOT = (tn - t1) / (n - 1)  =  (E2E - TTFT) / (n - 1)
    ITL  = gaps between token-bearing chunks (inter-chunk, where chunks carry more than one token)

    t0 ───────── t1 ─┬─ t2 ─┬─ … ─┬─ tn            [DONE] and the usage chunk are no tokens
       TTFT           ITL    ITL   ITL

    tok_s = output tokens that arrived inside the window / its length        (never total / duration)

Intervals are 95 %, from within this one run. Those of percentiles: percentiles.py. Those of tok_s: a moving-block
bootstrap (slices of the window in order, so that slow drifts stay together in a block; Künsch 1989). They know nothing
of run-to-run spread: repeats are for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from harness.analysis import percentiles
from harness.records import Cell, RequestRecord, SweepPoint
from harness.slo import Slo

Floats = NDArray[np.float64]

MIN_P95, FULL_P95 = 20, 100
"""Below the first, p95 is not written; below the second, the point is suspect (too_few_samples)."""
MIN_P99 = 100
"""Below, p99 is not written: it would be the maximum under another name; its interval says how much it knows."""
RESAMPLES = 1000


def ttft_ms(record: RequestRecord) -> float | None:
    """First token-bearing chunk - intended send time."""
    return None if record.first_token_ns is None else (record.first_token_ns - record.intended_ns) / 1e6


def e2e_ms(record: RequestRecord) -> float | None:
    """Last token-bearing chunk - intended send time."""
    return None if record.last_token_ns is None else (record.last_token_ns - record.intended_ns) / 1e6


def output_tokens(record: RequestRecord) -> int:
    """By the server's `usage`; by the token ids of its chunks where it sent none."""
    return record.completion_tokens if record.completion_tokens is not None else sum(record.chunk_tokens)


def tpot_ms(record: RequestRecord) -> float | None:
    """(E2E - TTFT) / (n - 1); None for a single token."""
    tokens = output_tokens(record)
    if record.first_token_ns is None or record.last_token_ns is None or tokens < 2:
        return None
    return (record.last_token_ns - record.first_token_ns) / 1e6 / (tokens - 1)


def chunk_gaps_ms(records: Iterable[RequestRecord]) -> Floats:
    """All gaps between token-bearing chunks of all requests, ms."""
    gaps = [np.diff(np.asarray(record.chunk_us, dtype=np.float64)) for record in records if len(record.chunk_us) > 1]
    return np.concatenate(gaps) / 1e3 if gaps else np.empty(0)


def tokens_in(records: Iterable[RequestRecord], edges_ns: NDArray[np.int64]) -> Floats:
    """Output tokens that arrived in each bin of `edges_ns`, whichever request they belong to.

    A chunk counts as many tokens as it carried ids; where the server sends no ids, the request's `usage` is spread
    evenly over its chunks, so that chunks are never taken for tokens.
    """
    counts = np.zeros(len(edges_ns) - 1)
    for record in records:
        if not record.chunk_us:
            continue
        stamps = record.intended_ns + np.asarray(record.chunk_us, dtype=np.int64) * 1000
        weights = np.asarray(record.chunk_tokens, dtype=np.float64)
        if not record.chunk_ids and record.completion_tokens is not None:
            weights = np.full(len(stamps), record.completion_tokens / len(stamps))
        counts += np.histogram(stamps, bins=edges_ns, weights=weights)[0]
    return counts


def throughput_tok_s(records: Sequence[RequestRecord], open_ns: int, close_ns: int) -> float | None:
    """Output tokens that arrived inside the window / its length."""
    if close_ns <= open_ns:
        return None
    tokens = float(tokens_in(records, np.array([open_ns, close_ns], dtype=np.int64))[0])
    return tokens / ((close_ns - open_ns) / 1e9) or None


def chunks_s(records: Sequence[RequestRecord], open_ns: int, close_ns: int) -> float | None:
    """Token-bearing chunks of the requests that ended well inside the window / its length: the load on the client."""
    chunks = sum(len(record.chunk_us) for record in _ended_in(records, open_ns, close_ns))
    return chunks / ((close_ns - open_ns) / 1e9) or None


def _ended_in(records: Sequence[RequestRecord], open_ns: int, close_ns: int) -> list[RequestRecord]:
    return [r for r in records if r.error is None and r.last_token_ns and open_ns <= r.last_token_ns < close_ns]


def percentile(values: Sequence[float] | Floats, q: float, least: int = 1) -> float | None:
    """The q-th percentile (linear between order statistics); None with fewer than `least` values."""
    return float(np.percentile(np.asarray(values), q)) if len(values) >= max(1, least) else None


def block_bootstrap(
    values: Sequence[float] | Floats,
    statistic: Callable[[Floats], Floats],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """95 % interval of a statistic of an ordered series by moving blocks of about n^(1/3) neighbours.

    `statistic` maps [resamples, n] to [resamples]. None below 20 values: there is too little to resample.
    """
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < MIN_P95:
        return None
    length = max(1, round(n ** (1 / 3)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n - length + 1, size=(resamples, -(-n // length)))
    picks = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :n]
    low, high = np.percentile(statistic(series[picks]), [2.5, 97.5])
    return float(low), float(high)


def percentile_interval(values: Sequence[float] | Floats, q: float) -> tuple[float, float] | None:
    """95 % interval of a percentile over requests in the order in which they began; see percentiles.py."""
    return percentiles.interval(values, q)


def spread(values: Sequence[float] | Floats, q: float) -> float | None:
    """Half the width of a percentile's interval as a share of the percentile; None where there is no interval."""
    interval, middle = percentile_interval(values, q), percentile(values, q)
    return (interval[1] - interval[0]) / 2 / middle if interval and middle else None


def throughput_interval(records: Sequence[RequestRecord], open_ns: int, close_ns: int) -> tuple[float, float] | None:
    """95 % interval of tok_s over 40 equal slices of the window."""
    if throughput_tok_s(records, open_ns, close_ns) is None:
        return None
    edges = np.linspace(open_ns, close_ns, 41).astype(np.int64)
    slices = tokens_in(records, edges)
    seconds = (close_ns - open_ns) / 1e9
    return block_bootstrap(slices, lambda samples: samples.sum(axis=1) / seconds)


def completed(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """Requests begun inside the window that ended well, in the order in which they began."""
    good = [record for record in records if record.phase == "measured" and record.error is None]
    return sorted(good, key=lambda record: record.intended_ns)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def goodput(records: Iterable[RequestRecord], slo: Slo) -> tuple[float, float, float] | None:
    """Share of the requests begun inside the window that kept every limit of `slo`, and its 95 % interval.

    One that failed kept none. The interval is Wilson's (J. Am. Stat. Assoc. 22, 1927): it stays wide at 0 and 1, where
    a bootstrap would have none; it takes requests as independent. None below 20 requests.
    """
    begun = [record for record in records if record.phase == "measured"]
    if len(begun) < MIN_P95:
        return None
    kept = sum(record.error is None and _keeps(record, slo) for record in begun)
    interval = binomtest(kept, len(begun)).proportion_ci(0.95, method="wilson")
    return kept / len(begun), float(interval.low), float(interval.high)


def _keeps(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request keeps the limits; of one token there is no TPOT to keep."""
    found = ((e2e_ms(record), slo.p95_s), (ttft_ms(record), slo.ttft_s), (tpot_ms(record) or 0.0, slo.tpot_s))
    return all(limit is None or (value is not None and value <= limit * 1e3) for value, limit in found)


def summarise(
    records: Sequence[RequestRecord], open_ns: int | None, close_ns: int | None, slo: Slo | None = None
) -> dict[str, Any]:
    """The measured fields of a SweepPoint, by name. Percentiles are empty where n does not carry them."""
    good = completed(records)
    e2e = _present(map(e2e_ms, good))
    ttft = _present(map(ttft_ms, good))
    tpot = _present(map(tpot_ms, good))
    gaps = chunk_gaps_ms(good)
    p99_interval = percentile_interval(e2e, 99) if len(e2e) >= MIN_P99 else None
    measured = [record for record in records if record.phase == "measured"]
    found: dict[str, Any] = {
        "requests": len(good),
        "errors": sum(record.error is not None for record in measured),
        "p50_ms": percentile(e2e, 50),
        "p95_ms": percentile(e2e, 95, MIN_P95),
        "p99_ms": percentile(e2e, 99, MIN_P99),
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p95_ms": percentile(ttft, 95, MIN_P95),
        "tpot_p50_ms": percentile(tpot, 50),
        "tpot_p95_ms": percentile(tpot, 95, MIN_P95),
        "itl_p99_ms": percentile(gaps, 99, MIN_P99),
        "input_tokens_mean": _mean([r.prompt_tokens for r in good if r.prompt_tokens is not None]),
        "output_tokens_mean": _mean([output_tokens(record) for record in good]),
    }
    found |= latency_intervals(e2e, ttft, tpot)
    share = goodput(records, slo) if slo is not None else None
    found["goodput"], found["goodput_lo"], found["goodput_hi"] = share or (None, None, None)
    found["p99_ms_lo"], found["p99_ms_hi"] = p99_interval or (None, None)
    if open_ns is not None and close_ns is not None and close_ns > open_ns:
        seconds = (close_ns - open_ns) / 1e9
        found["window_s"] = seconds
        found["tok_s"] = throughput_tok_s(records, open_ns, close_ns)
        found["tok_s_lo"], found["tok_s_hi"] = throughput_interval(records, open_ns, close_ns) or (None, None)
        found["req_s"] = len(_ended_in(records, open_ns, close_ns)) / seconds or None
        found["chunks_s"] = chunks_s(records, open_ns, close_ns)
    return found


def latency_intervals(e2e: Sequence[float], ttft: Sequence[float], tpot: Sequence[float]) -> dict[str, float | None]:
    """The _lo and _hi fields of the three p95 that a service level may limit."""
    found: dict[str, float | None] = {}
    for name, values in (("p95_ms", e2e), ("ttft_p95_ms", ttft), ("tpot_p95_ms", tpot)):
        found[f"{name}_lo"], found[f"{name}_hi"] = percentile_interval(values, 95) or (None, None)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def judged_by(points: Sequence[SweepPoint], requests: Sequence[RequestRecord], slo: Slo) -> list[SweepPoint]:
    """Rows with what another service level than their own needs, from their requests: goodput, and ends of intervals.

    A row whose requests are not here loses its goodput, which was counted by other limits.
    """
    cells: dict[tuple[str, int], list[RequestRecord]] = {}
    for record in requests:
        cells.setdefault((record.cell, record.attempt), []).append(record)
    found = []
    for point in points:
        own = cells.get((Cell(point.precision, point.conc, point.repeat, point.rate_rps).key, point.attempt), [])
        share = goodput(own, slo)
        values: dict[str, Any] = dict(zip(("goodput", "goodput_lo", "goodput_hi"), share or (None,) * 3, strict=True))
        if own and point.ttft_p95_ms is not None and point.ttft_p95_ms_lo is None:
            good = completed(own)
            series = (_present(map(figure, good)) for figure in (e2e_ms, ttft_ms, tpot_ms))
            values |= latency_intervals(*series)
        found.append(replace(point, **values))
    return found
