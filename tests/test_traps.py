"""The traps that other harnesses fell into (DESIGN.md lists them), each with a test that fails without its guard.

Oracles: a prefix cache built here from vLLM's rule, the truth server's own log, hand-worked figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from harness.analysis import metrics
from harness.analysis.levels import levels
from harness.engines import Target, endpoint
from harness.engines.address import Address
from harness.load.client import Connection, fill
from harness.load.dialect import probe
from harness.load.generators import Generators, LoadResult
from harness.load.selftest import read_log
from harness.load.workload import Dialect, drawn_length, make_ask
from harness.records import Cell, RequestRecord, Scenario, SweepPoint, header, to_row
from harness.scenario import load_scenario, scenario_names
from harness.sweep import Plan, Service, Variant, make_point
from harness.telemetry.watch import Seen

Truth = Callable[..., str]
MS = 1_000_000
IDS = Dialect(vocabulary=range(100, 1000))
SHORT = Scenario("test", input_tokens=40, output_tokens=8, requests=30, min_window_s=0.1)


@pytest.fixture(scope="module")
def generators() -> Iterator[Generators]:
    with Generators() as held:
        yield held


def row(url: str, load: LoadResult, scenario: Scenario = SHORT, dialect: Dialect = IDS) -> SweepPoint:
    """The row that a sweep would write of this load, whatever the server's counters say."""
    with endpoint.attach(url, "truth") as engine:
        blank = SweepPoint("run", "x", 1)
        return make_point(Cell("x", 1), Plan(scenario), blank, Variant("x"), Service(engine, dialect), load, Seen())


def measured(load: LoadResult) -> list[RequestRecord]:
    return [record for record in load.records if record.phase == "measured" and record.error is None]


def logged(log: Path, records: Iterable[RequestRecord]) -> dict[str, dict[str, Any]]:
    """The server's log, once it holds all that got a token: it is written when there is time."""
    names = {record.request_id for record in records if record.chunk_us}
    deadline = time.monotonic() + 10
    while not names <= (told := read_log(log)).keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    return told


def request(chunks_ms: Iterable[float], start_ms: float = 1000, **more: Any) -> RequestRecord:
    """A measured request of one token a chunk, its chunks so many ms after it was meant to go."""
    chunks = list(chunks_ms)
    start = round(start_ms * MS)
    record = RequestRecord(
        "x", 0, 0, "measured", start, 1, start, start + round(chunks[0] * MS), start + round(chunks[-1] * MS),
        input_tokens_asked=4, output_tokens_asked=len(chunks), prompt_tokens=4, completion_tokens=len(chunks),
        clock="kernel", chunk_ids=True, chunk_us=tuple(round(chunk * 1000) for chunk in chunks),
        chunk_tokens=(1,) * len(chunks),
    )  # fmt: skip
    return replace(record, **more)


# --- what is asked ----------------------------------------------------------------------------------------------------


class PrefixCache:
    """As vLLM's: whole blocks of 16 tokens, each known by all tokens before it, under the request's cache salt."""

    def __init__(self, *, salted: bool) -> None:
        self._known: set[tuple[object, ...]] = set()
        self._salted = salted

    def hits(self, body: bytes) -> int:
        """Tokens of a prompt that are found, in an order of asking; then they are all known."""
        asked = json.loads(body)
        salt = asked["cache_salt"] if self._salted else None
        ids = asked["prompt"]
        blocks = [(salt, *ids[:end]) for end in range(16, len(ids) + 1, 16)]
        found = 16 * sum(block in self._known for block in blocks)
        self._known.update(blocks)
        return found


def asked_by(cells: Iterable[Cell], dialect: Dialect = IDS, **options: Any) -> list[bytes]:
    """What each user of each cell asks first, and again."""
    return [
        make_ask(SHORT, cell, user, sequence, dialect, "m", **options).body
        for cell in cells for user in range(max(1, cell.conc)) for sequence in range(3)
    ]  # fmt: skip


def test_same_seed_at_each_concurrency_and_a_prefix_cache() -> None:
    """Guards: make_ask seeds with conc, rate and repeat, and salts with cell and attempt: either is enough."""
    loads = [Cell("bf16", conc, repeat) for conc in (1, 2, 8) for repeat in (1, 2)]
    loads += [Cell("bf16", 0, repeat, rate) for rate in (0.5, 2.0) for repeat in (1, 2)]
    unsalted = PrefixCache(salted=False)
    assert [unsalted.hits(body) for body in asked_by(loads)] == [0] * 78, "prompts alone keep the cells apart"
    salted = PrefixCache(salted=True)
    again = [replace(cell, attempt=2) for cell in loads]
    bodies = asked_by(loads) + asked_by(again) + asked_by(loads, salt="another run")
    assert not any(salted.hits(body) for body in bodies), "where the prompts are the same, the salt does"
    assert all(unsalted.hits(body) for body in asked_by(again)), "else this test would see nothing"


def test_warm_up_by_one_repeated_prompt(truth: Truth, generators: Generators) -> None:
    """Guards: Window._warm_up opens for the last user, arrivals._user asks for its own from the first request on.

    So every shape is warm: before the window opens all users are in flight together, with prompts and answers that
    differ from each other as the measured ones do.
    """
    conc = 6
    load = generators.run(Cell("x", conc), SHORT, IDS, Target(truth("--ttft-ms", "60", "--gap-ms", "15"), "truth"))
    warm = [record for record in load.records if record.phase == "warmup"]
    assert load.open_ns is not None
    assert {record.user for record in warm if (record.end_ns or load.open_ns) < load.open_ns} == set(range(conc))
    edges = [(r.intended_ns, 1) for r in warm] + [(r.end_ns or 0, -1) for r in warm]
    assert max(itertools.accumulate(change for _, change in sorted(edges))) == conc
    asks = [make_ask(SHORT, Cell("x", conc), record.user, record.sequence, IDS, "truth") for record in warm]
    assert len({ask.body for ask in asks}) == len(warm) >= conc
    assert [r.prompt_tokens for r in warm] == [ask.input_tokens for ask in asks], "by the server's count"
    assert [r.completion_tokens for r in warm] == [ask.output_tokens for ask in asks]
    lengths = {(record.prompt_tokens, record.completion_tokens) for record in warm}
    assert len(lengths) > conc / 2


def test_fixed_lengths_and_ignore_eos_march_in_step(truth: Truth, generators: Generators) -> None:
    """Guards: drawn_length spreads prompts and answers in each scenario that we ship; arrivals._user begins apart."""
    for name in scenario_names():
        scenario, rng = load_scenario(name), random.Random(1)
        for mean in (scenario.input_tokens, scenario.output_tokens):
            drawn = [drawn_length(mean, scenario, rng) for _ in range(200)]
            assert statistics.pstdev(drawn) > 0.05 * mean, f"{name}: uniform ± 15 % has 8.7 %"
    load = generators.run(Cell("x", 8), SHORT, IDS, Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth"))
    first = sorted(record.intended_ns for record in load.records if record.sequence == 0)
    assert len(first) == 8 and (first[-1] - first[0]) / MS > 40, "drawn from 8 * 20 ms"
    assert len({record.completion_tokens for record in measured(load)}) > 2


def test_int4_stopping_earlier_than_bf16(truth: Truth, generators: Generators) -> None:
    """Guards: ignore_eos and min_tokens in make_ask, whatever the precision; validity._lengths_off where that fails."""
    bf16, awq = (json.loads(make_ask(SHORT, Cell(name, 4), 1, 2, IDS, "m").body) for name in ("bf16", "awq"))
    assert bf16.pop("cache_salt") != awq.pop("cache_salt") and bf16 == awq
    assert bf16["ignore_eos"] is True and bf16["min_tokens"] == bf16["max_tokens"]
    url = truth("--ttft-ms", "5", "--gap-ms", "1", "--short", "2", "--every", "4")
    load = generators.run(Cell("x", 4), SHORT, IDS, Target(url, "truth"))
    assert {record.finish_reason for record in measured(load)} == {"length", "stop"}
    assert "length_mismatch" in row(url, load).verdict_reasons


def test_decoding_and_encoding_again_changes_the_length(truth: Truth, generators: Generators) -> None:
    """Guards: make_ask sends ids where dialect.probe finds that it can; metrics.summarise tells the server's count.

    And validity._lengths_off checks it: this server counts seven more than it was sent.
    """
    url = truth("--tokenize", "--ttft-ms", "5", "--gap-ms", "1", "--prompt-tokens-off", "7")
    dialect = probe(Target(url, "truth"))
    for sequence in range(20):
        ask = make_ask(SHORT, Cell("x", 4), 0, sequence, dialect, "truth")
        sent = json.loads(ask.body)["prompt"]
        assert len(sent) == ask.input_tokens and set(sent) <= set(dialect.vocabulary)
    load = generators.run(Cell("x", 4), SHORT, dialect, Target(url, "truth"))
    point = row(url, load, dialect=dialect)
    asked = [record.input_tokens_asked for record in measured(load)]
    assert point.input_tokens_mean == pytest.approx(statistics.fmean(asked) + 7)
    assert "length_mismatch" in point.verdict_reasons


# --- how figures are made ---------------------------------------------------------------------------------------------


def test_percentiles_of_percentiles(truth: Truth, generators: Generators) -> None:
    """Guards: generators hand over records, never figures (_Cell), and metrics.summarise pools them.

    Two processes share three users: the mean of what each would have told is another number. Gaps are pooled likewise.
    """
    url = truth("--ttft-ms", "5", "--gap-ms", "1")
    cell = Cell("x", 3)
    load = generators.run(cell, replace(SHORT, length_jitter=0.9), IDS, Target(url, "truth"), processes=2)
    point = row(url, load)
    e2e = {user: [metrics.e2e_ms(r) or 0 for r in measured(load) if r.user == user] for user in range(3)}
    pooled = sorted(itertools.chain.from_iterable(e2e.values()))
    at = 0.95 * (len(pooled) - 1)
    by_hand = pooled[int(at)] + (at % 1) * (pooled[int(at) + 1] - pooled[int(at)])
    assert point.p95_ms == pytest.approx(by_hand)
    # 100 requests with 20 gaps of 10 ms, five of which have ten gaps of 100 ms instead: 50 of 2,000 gaps, so p99 = 100.
    # Their own p99s are 10 and 100; the median of those is 10, the mean 14.5.
    plain = [10.0 * n for n in range(21)]
    broken = [10.0 * n if n < 11 else 100.0 + 100.0 * (n - 10) for n in range(21)]
    found = metrics.summarise([request(plain) for _ in range(95)] + [request(broken) for _ in range(5)], 0, 10**10)
    assert found["itl_p99_ms"] == 100


def test_repeats_tell_the_p95_of_a_session_and_never_a_mean_of_them() -> None:
    """Guard: levels._merge takes the median, so what a level tells was measured, and one bad session moves nothing."""
    rows = [
        SweepPoint("run", "awq", 8, p95_ms=p95, ttft_p95_ms=p95 / 2, verdict="valid", repeat=n)
        for n, p95 in enumerate((100.0, 110.0, 900.0), start=1)
    ]
    (level,) = levels(rows)
    assert (level.p95_ms, level.ttft_p95_ms) == (110.0, 55.0)


def test_the_mean_of_an_empty_list_shown_as_0_ms(truth: Truth, generators: Generators) -> None:
    """Guards: metrics.percentile and _mean give None, records.to_row writes nothing. Here no request ended well."""
    url = truth("--ttft-ms", "5", "--error-after", "0")
    load = generators.run(Cell("x", 4), SHORT, IDS, Target(url, "truth"))
    assert load.records and not measured(load)
    cells = dict(zip(header(SweepPoint), to_row(row(url, load)), strict=True))
    starts = ("tok_s", "req_s", "chunks_s", "ttft_", "tpot_", "itl_", "p50_", "p95_", "p99_", "usd_per_1m")
    figures = [name for name in cells if name.startswith(starts) or name.endswith("tokens_mean")]
    assert len(figures) == 24
    assert {name: cells[name] for name in figures if cells[name]} == {}
    assert cells["requests"] == "0" and int(cells["errors"]) > 0, "a count of nothing is 0"


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "no token ids"])
def test_chunk_counts_taken_as_tokens(truth: Truth, generators: Generators, tmp_path: Path, ids: bool) -> None:
    """Guards: metrics.tokens_in weighs chunks by their ids, else by the usage; tpot_ms divides by the usage.

    Three tokens a chunk; the server's log says when it sent each chunk and how many tokens it had sent in the end.
    """
    log = tmp_path / "log.jsonl"
    url = truth("--ttft-ms", "5", "--gap-ms", "12", "--tokens-per-chunk", "3", "--log", str(log),
                "--token-ids" if ids else "--no-token-ids")  # fmt: skip
    scenario = replace(SHORT, output_tokens=30, requests=40)
    load = generators.run(Cell("x", 8), scenario, IDS, Target(url, "truth"))
    point, good = row(url, load, scenario), measured(load)
    assert all(record.chunk_ids is ids for record in good)
    told = logged(log, load.records)
    assert load.open_ns is not None and load.close_ns is not None
    inside, gaps = 0, []
    for line in told.values():
        tokens = [min(3, line["tokens"] - 3 * n) for n in range(len(line["sent_ns"]))]
        inside += sum(
            count for count, at in zip(tokens, line["sent_ns"], strict=True) if load.open_ns <= at < load.close_ns
        )
        if line["tokens"] > 3:
            gaps.append((line["sent_ns"][-1] - line["sent_ns"][0]) / MS / (line["tokens"] - 1))
    seconds = (load.close_ns - load.open_ns) / 1e9
    assert point.tok_s == pytest.approx(inside / seconds, rel=0.1), "chunks would be a third of it"
    assert point.tpot_p50_ms == pytest.approx(statistics.median(gaps), rel=0.25), "chunks would be three times it"
    assert point.output_tokens_mean == pytest.approx(statistics.fmean(r.output_tokens_asked for r in good))


def test_p99_of_50_requests() -> None:
    """Guards: metrics.MIN_P99 and MIN_P95: with fewer, a percentile is the maximum under another name."""

    def found(n: int) -> dict[str, Any]:
        return metrics.summarise([request([10.0, 20.0 + n]) for n in range(n)], 0, 10**10)

    names = ("p99_ms", "p99_ms_lo", "p99_ms_hi")
    assert [[found(n)[name] is not None for name in names] for n in (50, 99, 100)] == [[False] * 3] * 2 + [[True] * 3]
    names = ("p95_ms", "ttft_p95_ms", "tpot_p95_ms", "p95_ms_lo", "p95_ms_hi")
    assert [[found(n)[name] is not None for name in names] for n in (19, 20)] == [[False] * 5, [True] * 5]


# --- from when to when ------------------------------------------------------------------------------------------------


def test_latencies_that_leave_out_the_wait_for_a_free_slot(
    truth: Truth, generators: Generators, tmp_path: Path
) -> None:
    """Guards: arrivals._open_loop sends each at its time, whatever is in flight, and metrics.ttft_ms counts from then.

    One request at a time takes 20 + 3 * 10 = 50 ms, and one comes each 25 ms: the k-th waits for k others that take
    50 ms each, and comes 25 k ms after the first. So its TTFT is 20 + 25 k ms, and more by what the server is late.
    """
    log = tmp_path / "log.jsonl"
    url = truth("--ttft-ms", "20", "--gap-ms", "10", "--max-running", "1", "--log", str(log))
    scenario = replace(
        SHORT, arrivals="constant", output_tokens=4, length_distribution="fixed", requests=20, warmup_s=0.1
    )
    load = generators.run(Cell("x", 0, rate_rps=40.0), scenario, IDS, Target(url, "truth"))
    ended = sorted((r for r in load.records if r.error is None), key=lambda r: r.user)
    assert len(ended) >= 20 and [record.user for record in ended] == list(range(len(ended)))
    assert all((metrics.ttft_ms(record) or 0) >= 20 + 25 * record.user - 1 for record in ended)
    assert {round((b.intended_ns - a.intended_ns) / MS) for a, b in itertools.pairwise(ended)} == {25}
    told = logged(log, ended)
    off_ms = [abs((r.first_token_ns or 0) - told[r.request_id]["sent_ns"][0]) / MS for r in ended]
    assert statistics.median(off_ms) < 2
    # What our own process loses before it sends is a wait too: meant for 1,000 ms, sent at 1,040, answered at 1,100.
    late = request([100.0, 130.0], sent_ns=1040 * MS)
    assert (metrics.ttft_ms(late), metrics.e2e_ms(late)) == (100, 130)


def test_one_asyncio_loop_that_adds_its_own_queueing_to_every_ttft(truth: Truth, tmp_path: Path) -> None:
    """Guard: SO_TIMESTAMPNS (client._ask_for_stamps, _receive): the kernel stamps a chunk before our loop is woken.

    The loop is blocked for 30 ms at a time, on a stream with a chunk each 40 ms, so each is read alone and up to 30 ms
    late. The server's log says when it was sent.
    """
    log = tmp_path / "log.jsonl"
    url = truth("--ttft-ms", "45", "--gap-ms", "40", "--log", str(log))
    asked = {"prompt": [1, 2], "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}}

    async def blocked() -> None:
        while True:
            time.sleep(0.03)
            await asyncio.sleep(0.001)

    async def drive() -> list[RequestRecord]:
        blocker = asyncio.create_task(blocked())
        connections = [Connection(Address.parse(url)) for _ in range(4)]
        started = [RequestRecord("x", n, 0, "measured", time.time_ns()) for n in range(len(connections))]
        ended = await asyncio.gather(*(
            connection.exchange("/v1/completions", json.dumps(asked).encode(), request_id=record.request_id)
            for record, connection in zip(started, connections, strict=True)
        ))  # fmt: skip
        blocker.cancel()
        for connection in connections:
            connection.close()
        return [fill(record, exchange) for record, exchange in zip(started, ended, strict=True)]

    records = uvloop.run(drive())
    told = logged(log, records)
    off_ms = [
        abs(record.intended_ns + offset_us * 1000 - sent_ns) / MS
        for record in records
        for offset_us, sent_ns in zip(record.chunk_us, told[record.request_id]["sent_ns"], strict=True)
    ]
    assert len(off_ms) == 48
    assert statistics.median(off_ms) < 2, "read by a loop that was late by 15 ms on average"
    assert {record.clock for record in records} == {"kernel"}
