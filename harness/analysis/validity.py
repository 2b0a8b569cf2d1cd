"""A point that cannot be trusted says so: valid, suspect or invalid, with reasons.

    client_bound      our own process was late: in sending, in reading, or beyond what this machine's client can do;
                      or the machine had no descriptor or port left for a connection
    clock_step        somebody set the clock while the cell was measured
    clock_uncertain   generators on several nodes, whose clocks are not known well enough for these figures
    cache_warm        prefix-cache hits although every prompt was meant to be new
    too_few_samples   n < 100 behind p95 (suspect), n < 20: no p95 at all (invalid)
    imprecise         the interval of p95 is wider than was asked for
    drifting          the second half of the window was another regime than the first
    errors            requests failed (suspect from one on, invalid from 5 %)
    length_mismatch   prompts or answers were not as long as asked
    foreign_load, tokens_lost, counters_short
                      the engine counted other tokens than we received (counters.py)
    slow_kernel       a quantized precision ran without a fused INT4/INT8 kernel
    preempting        the KV cache was full and requests were thrown out and computed again
    throttled         the card was slowed down by heat or by its power supply
    simulated_engine  no engine at all answered, but `bench serve-simulated`: a prediction in real time
    engine_restarted  the engine died in this cell, was started again, and this is the second attempt
    engine_died, gave_up, no_window
                      the cell was not finished: the engine did not come back, every request in a row failed, or no
                      window opened
    unvalidated       predicted (harness/predict), for a card with fewer than three published points

Host CPU load is no reason: with a CPU engine, client and engine share the cores, and that is the machine measured.
What counts is what our own process did to the figures, and that is computed: each request carries when it was meant to
go and when it went, so the figures without our own lag are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis import metrics, power
from harness.records import RequestRecord, SweepPoint, Verdict

MEDIAN_LAG_MS = 2.0
"""Half of all requests later than this: every figure is shifted."""
OWN_SHARE, OWN_MS = 0.05, 2.0
"""Our own lag may make this share of a p95, or this many ms, whichever is larger."""
LOOP_LAG_MS = 5.0
COALESCED_SHARE = 0.05
CLOCK_STEP_MS = 1.0
WINDOW_DOUBT = 0.01
"""This share of the window may lie nearer to one of its edges than the clocks are known."""
CACHE_HIT_SHARE = 0.01
ERROR_SHARE = 0.05
LENGTH_SHARE = 0.01
DRIFT_RATIO = 1.25
SIMULATED_ENGINE = "kneebench-simulated"
"""What `bench serve-simulated` calls itself."""
FAST_KERNELS = (
    "wna16", "marlin", "machete", "exllama", "cutlass", "allspark", "conch", "humming", "dynamic4bit", "w8a8",
    "scaledmm", "fp8", "kneebenchcuda",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the verdict needs beside the records and the row; None: not known."""

    gave_up: str | None = None
    counters: str | None = None
    """How the engine's token count disagrees with ours (counters.disagreement)."""
    ceiling_chunks_s: float | None = None
    """Chunks a second that this machine's client was measured to keep up with (`bench selftest`)."""
    quantized: bool = False
    exact_lengths: bool = True
    """Prompts went as token ids and the server was told how many to answer, so lengths must be as asked."""
    new_prompts: bool = True
    """No request repeats another's beginning, so a prefix cache has nothing to find."""
    precision: float | None = None
    """Half-width that the interval of p95 was to have, as a share of it."""


def send_lag_p99_ms(records: Sequence[RequestRecord]) -> float | None:
    """p99 of sent - intended over the measured requests."""
    return metrics.percentile(_lags_ms([record for record in records if record.phase == "measured"]), 99)


def coalesced_share(records: Sequence[RequestRecord]) -> float | None:
    """Share of the socket reads that held more than one token-bearing chunk."""
    reads = sum(record.reads for record in records if record.phase == "measured")
    return sum(record.coalesced_reads for record in records if record.phase == "measured") / reads if reads else None


def judge(
    records: Sequence[RequestRecord], point: SweepPoint, conditions: Conditions
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on a point and its reasons, worst first. `point` carries everything but the verdict."""
    good = metrics.completed(records)
    reasons: dict[str, Verdict] = {}
    if conditions.gave_up:
        reasons["gave_up"] = "invalid"
    if not point.window_s:
        reasons["no_window"] = "invalid"
    if len(good) < metrics.MIN_P95:
        reasons["too_few_samples"] = "invalid"
    elif len(good) < metrics.FULL_P95:
        reasons["too_few_samples"] = "suspect"
    if point.errors:
        reasons["errors"] = "invalid" if point.errors >= ERROR_SHARE * (len(good) + point.errors) else "suspect"
    if _client_bound(good, point, conditions) or any(record.error == "client" for record in records):
        reasons["client_bound"] = "invalid"
    if abs(point.clock_step_ms or 0.0) > CLOCK_STEP_MS:
        reasons["clock_step"] = "invalid"
    if conditions.new_prompts and (point.prefix_hit_share or 0.0) > CACHE_HIT_SHARE:
        reasons["cache_warm"] = "invalid"
    if _clock_uncertain(point):
        reasons["clock_uncertain"] = "suspect"
    if _lengths_off(good, conditions.exact_lengths):
        reasons["length_mismatch"] = "suspect"
    if conditions.counters:
        reasons[conditions.counters] = "suspect"
    if conditions.precision and (metrics.spread(_e2e(good), 95) or 0.0) > conditions.precision:
        reasons["imprecise"] = "suspect"
    if _drifting(good, point.rate_rps is not None):
        reasons["drifting"] = "suspect"
    if point.preemptions:
        reasons["preempting"] = "suspect"
    if point.engine == SIMULATED_ENGINE:
        reasons["simulated_engine"] = "suspect"
    if (point.throttled_share or 0.0) > power.THROTTLED_SHARE:
        reasons["throttled"] = "suspect"
    if conditions.quantized and point.kernel and not _is_fast(point.kernel):
        reasons["slow_kernel"] = "suspect"
    ordered = sorted(reasons, key=lambda reason: reasons[reason] != "invalid")
    verdict: Verdict = "valid" if not reasons else reasons[ordered[0]]
    return verdict, tuple(ordered)


def worsen(point: SweepPoint, reason: str, verdict: Verdict) -> SweepPoint:
    """The point with one more reason in front, and a verdict that is no better than `verdict`."""
    worst: Verdict = "invalid" if "invalid" in (verdict, point.verdict) else verdict
    return replace(point, verdict=worst, verdict_reasons=(reason, *point.verdict_reasons))


def _lags_ms(records: Sequence[RequestRecord]) -> list[float]:
    return [(record.sent_ns - record.intended_ns) / 1e6 for record in records if record.sent_ns is not None]


def _e2e(good: Sequence[RequestRecord]) -> list[float]:
    return [value for value in map(metrics.e2e_ms, good) if value is not None]


def _client_bound(good: Sequence[RequestRecord], point: SweepPoint, conditions: Conditions) -> bool:
    if (metrics.percentile(_lags_ms(good), 50) or 0.0) > MEDIAN_LAG_MS:
        return True
    ours = [replace(record, intended_ns=record.sent_ns) for record in good if record.sent_ns is not None]
    for figure in (metrics.ttft_ms, metrics.e2e_ms):
        told = metrics.percentile([value for value in map(figure, good) if value is not None], 95) or 0.0
        without = metrics.percentile([value for value in map(figure, ours) if value is not None], 95) or 0.0
        if told - without > max(OWN_MS, OWN_SHARE * without):
            return True
    if (point.coalesced_share or 0.0) > COALESCED_SHARE:
        return True
    if conditions.ceiling_chunks_s is not None and (point.chunks_s or 0.0) > conditions.ceiling_chunks_s:
        return True
    # With kernel stamps a late loop cannot falsify a time; with user stamps it is part of every one of them.
    user_clock = any(record.clock == "user" for record in good)
    allowance = OWN_SHARE * (point.ttft_p50_ms or 0.0)
    return user_clock and (point.loop_lag_p99_ms or 0.0) > max(LOOP_LAG_MS, allowance)


def _clock_uncertain(point: SweepPoint) -> bool:
    """Whether ± e, the error of the generators' clocks, is more than the figures bear.

    Latencies hold no offset: both ends of each are one clock's. What e touches is

    - the window: a token or a request within e of an edge may be counted on the wrong side, so of a steady flow up to
      2 e / window of tok_s is in doubt;
    - an open loop: generators that send e too early or late shift arrivals against each other by 2 e at most. In a
      queue served in turn, request n waits max over k of (services k to n-1) - (a_n - a_k), and each a_n - a_k is off
      by 2 e at most, so no wait is off by more. That much of a p95 we allow ourselves as own lag, too.
    """
    if point.clock_offset_error_ms is None or not point.window_s:
        return False
    doubt_ms = 2 * point.clock_offset_error_ms
    if doubt_ms > WINDOW_DOUBT * point.window_s * 1000:
        return True
    return point.rate_rps is not None and doubt_ms > max(OWN_MS, OWN_SHARE * (point.ttft_p95_ms or 0.0))


def _lengths_off(good: Sequence[RequestRecord], exact: bool) -> bool:
    if not good:
        return False
    off = 0
    for record in good:
        answered = record.completion_tokens
        ids_disagree = record.chunk_ids and answered is not None and sum(record.chunk_tokens) != answered
        asked = record.output_tokens_asked  # and more than was asked for is wrong, whoever chooses the length
        wrong_answer = answered is None or answered > asked or (exact and answered != asked) or ids_disagree
        wrong_prompt = exact and record.prompt_tokens is not None and record.prompt_tokens != record.input_tokens_asked
        off += wrong_answer or wrong_prompt
    return off > LENGTH_SHARE * len(good)


def _drifting(good: Sequence[RequestRecord], open_loop: bool) -> bool:
    """The second half of the requests against the first, in the order they began, by medians of TPOT.

    TPOT, because lengths are jittered: E2E would follow the draw of the lengths. In an open loop a server that cannot
    follow builds a queue, which shows in TTFT long before it shows in TPOT, so there E2E must hold still as well.
    """
    return _halves_differ([value for value in map(metrics.tpot_ms, good) if value]) or (
        open_loop and _halves_differ(_e2e(good))
    )


def _halves_differ(series: Sequence[float]) -> bool:
    if len(series) < 2 * metrics.MIN_P95:
        return False
    half = len(series) // 2
    early, late = metrics.percentile(series[:half], 50), metrics.percentile(series[half:], 50)
    return bool(early and late) and not 1 / DRIFT_RATIO <= (late or 0) / (early or 1) <= DRIFT_RATIO


def _is_fast(kernel: str) -> bool:
    name = kernel.lower()  # an emulation multiplies in BF16, whatever else its name promises
    return "emulation" not in name and any(fast in name for fast in FAST_KERNELS)
