"""A point that cannot be trusted says so: valid, suspect or invalid, with reasons.

    client_bound      our own process was late: send lag, loop lag where the loop is the clock, coalesced reads
    cache_warm        prefix-cache hits although every prompt was meant to be new
    too_few_samples   n < 100 behind p95 (suspect), n < 20: no p95 at all (invalid)
    drifting          the second half of the window was another regime than the first
    errors            requests failed (suspect from one on, invalid from 5 %)
    length_mismatch   prompts or answers were not as long as asked
    slow_kernel       a quantized precision ran without a fused INT4/INT8 kernel
    preempting        the KV cache was full and requests were thrown out and computed again

Host CPU load is no reason: with a CPU engine, client and engine share the cores, and that is the machine measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.analysis import metrics
from harness.records import RequestRecord, Verdict

SEND_LAG_MS, LOOP_LAG_MS = 2.0, 5.0
LAG_SHARE_OF_TTFT = 0.05
"""Lags are harmless below the floor in ms or below this share of the median TTFT, whichever is larger."""
COALESCED_SHARE = 0.05
CACHE_HIT_SHARE = 0.01
ERROR_SHARE = 0.05
LENGTH_SHARE = 0.01
DRIFT_RATIO = 1.25
FAST_KERNELS = ("wna16", "marlin", "machete", "exllama", "cutlass", "allspark", "conch", "w8a8", "scaledmm", "fp8")


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the verdict needs beside the records; None: not known."""

    gave_up: str | None = None
    loop_lag_p99_ms: float | None = None
    prefix_hit_share: float | None = None
    preemptions: int | None = None
    quantized: bool = False
    kernel: str | None = None
    exact_lengths: bool = True
    """Prompts went as token ids and the server was told how many to answer, so lengths must be as asked."""


def send_lag_p99_ms(records: Sequence[RequestRecord]) -> float | None:
    """p99 of sent - intended over the measured requests."""
    lags = [(r.sent_ns - r.intended_ns) / 1e6 for r in records if r.phase == "measured" and r.sent_ns is not None]
    return metrics.percentile(lags, 99)


def coalesced_share(records: Sequence[RequestRecord]) -> float | None:
    """Share of the socket reads that held more than one token-bearing chunk."""
    reads = sum(record.reads for record in records if record.phase == "measured")
    return sum(record.coalesced_reads for record in records if record.phase == "measured") / reads if reads else None


def judge(
    records: Sequence[RequestRecord], window_s: float | None, conditions: Conditions
) -> tuple[Verdict, tuple[str, ...]]:
    """The point's verdict and its reasons, worst first."""
    good = metrics.completed(records)
    measured = sum(record.phase == "measured" for record in records)
    reasons: dict[str, Verdict] = {}
    if conditions.gave_up:
        reasons["gave_up"] = "invalid"
    if not window_s:
        reasons["no_window"] = "invalid"
    if len(good) < metrics.MIN_P95:
        reasons["too_few_samples"] = "invalid"
    elif len(good) < metrics.FULL_P95:
        reasons["too_few_samples"] = "suspect"
    failed = measured - len(good)
    if failed:
        reasons["errors"] = "invalid" if failed >= ERROR_SHARE * measured else "suspect"
    if _client_bound(records, good, conditions):
        reasons["client_bound"] = "invalid"
    if (conditions.prefix_hit_share or 0) > CACHE_HIT_SHARE:
        reasons["cache_warm"] = "invalid"
    if _lengths_off(good, conditions.exact_lengths):
        reasons["length_mismatch"] = "suspect"
    if _drifting(good):
        reasons["drifting"] = "suspect"
    if conditions.preemptions:
        reasons["preempting"] = "suspect"
    if conditions.quantized and conditions.kernel and not _is_fast(conditions.kernel):
        reasons["slow_kernel"] = "suspect"
    ordered = sorted(reasons, key=lambda reason: reasons[reason] != "invalid")
    verdict: Verdict = "valid" if not reasons else reasons[ordered[0]]
    return verdict, tuple(ordered)


def _client_bound(records: Sequence[RequestRecord], good: Sequence[RequestRecord], conditions: Conditions) -> bool:
    ttft_ms = metrics.percentile([value for value in map(metrics.ttft_ms, good) if value is not None], 50) or 0.0
    allowance = LAG_SHARE_OF_TTFT * ttft_ms
    if (send_lag_p99_ms(records) or 0.0) > max(SEND_LAG_MS, allowance):
        return True
    if (coalesced_share(records) or 0.0) > COALESCED_SHARE:
        return True
    # With kernel stamps a late loop cannot falsify a time; with user stamps it is part of every one of them.
    user_clock = any(record.clock == "user" for record in good)
    return user_clock and (conditions.loop_lag_p99_ms or 0.0) > max(LOOP_LAG_MS, allowance)


def _lengths_off(good: Sequence[RequestRecord], exact: bool) -> bool:
    if not good:
        return False
    off = 0
    for record in good:
        answered = record.completion_tokens
        ids_disagree = record.chunk_ids and answered is not None and sum(record.chunk_tokens) != answered
        wrong_answer = answered is None or (exact and answered != record.output_tokens_asked) or ids_disagree
        wrong_prompt = exact and record.prompt_tokens is not None and record.prompt_tokens != record.input_tokens_asked
        off += wrong_answer or wrong_prompt
    return off > LENGTH_SHARE * len(good)


def _drifting(good: Sequence[RequestRecord]) -> bool:
    """Median TPOT of the second half of the requests against the first half's, in the order they began.

    TPOT, because lengths are jittered: E2E would follow the draw of the lengths.
    """
    tpots = [value for value in map(metrics.tpot_ms, good) if value]
    if len(tpots) < 2 * metrics.MIN_P95:
        return False
    half = len(tpots) // 2
    early, late = metrics.percentile(tpots[:half], 50), metrics.percentile(tpots[half:], 50)
    return bool(early and late) and not 1 / DRIFT_RATIO <= (late or 0) / (early or 1) <= DRIFT_RATIO


def _is_fast(kernel: str) -> bool:
    return any(name in kernel.lower() for name in FAST_KERNELS)
