"""Each reason of a verdict provoked for real: servers that misbehave, a client that is held up, engines that die.

What a busy machine does to the client or to the steadiness of a server is NOISE here, save where it is the matter.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from harness.analysis import metrics, validity
from harness.analysis.validity import Conditions, judge
from harness.engines import Engine, ServeSpec, Target, endpoint
from harness.engines.address import Address
from harness.engines.vllm import VllmServer
from harness.engines.vllm_log import read_log
from harness.errors import RunError
from harness.load import client, generators, worker
from harness.load.alarm import Alarm
from harness.load.arrivals import Job
from harness.load.client import Connection
from harness.load.dialect import probe
from harness.load.generators import Generators, LoadResult
from harness.load.messages import Done, Inbox, Stop, packed
from harness.load.selftest import Ceiling
from harness.load.window import Window
from harness.load.workload import Dialect
from harness.models import resolve
from harness.records import Cell, GpuSample, RequestRecord, Scenario, SweepPoint, read_table
from harness.rundir import RunDirectory
from harness.search import Search
from harness.slo import Slo
from harness.sweep import Plan, Service, Session, Variant, make_point, run_sweep
from harness.telemetry.watch import EngineWatch

Truth = Callable[..., str]
Measured = tuple[SweepPoint, LoadResult]
Measure = Callable[..., Measured]

IDS = Dialect(vocabulary=range(100, 1000))
SHORT = Scenario("test", input_tokens=150, output_tokens=6, requests=120, min_window_s=0.1)
CELL = Cell("served", 8)
FAST = ("--ttft-ms", "5", "--gap-ms", "1")
NOISE = {"client_bound", "drifting"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Generators]:
    with Generators() as held:
        yield held


@pytest.fixture
def measure(shared: Generators) -> Measure:
    """`measure(url, scenario, cell)`: drive the cell as a sweep does; its row and what was recorded."""

    def measured(url: str, scenario: Scenario = SHORT, cell: Cell = CELL, **options: Any) -> Measured:
        with endpoint.attach(url, "truth") as engine:
            return measured_on(engine, shared, scenario, cell, **options)

    return measured


def measured_on(
    engine: Engine,
    held: Generators,
    scenario: Scenario,
    cell: Cell,
    *,
    dialect: Dialect = IDS,
    salt: str = "",
    ceiling: Ceiling | None = None,
    samples: Callable[[LoadResult], Sequence[GpuSample]] = lambda load: (),
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> Measured:
    with EngineWatch(engine) as watch:
        load = held.run(cell, scenario, dialect, engine.target, salt=salt, on_record=on_record)
    plan, row = Plan(scenario, salt=salt, ceiling=ceiling), SweepPoint("run", cell.precision, cell.conc)
    service = Service(engine, dialect)
    return make_point(cell, plan, row, Variant(cell.precision), service, load, watch.seen(), samples(load)), load


def told(point: SweepPoint) -> set[str]:
    return set(point.verdict_reasons) - NOISE


def is_judged(point: SweepPoint, verdict: str) -> bool:
    """Neither better nor worse, save for a busy machine's client_bound."""
    return point.verdict == ("invalid" if "client_bound" in point.verdict_reasons else verdict)


def failures(load: LoadResult) -> set[str | None]:
    return {record.error for record in load.records if record.phase == "measured"} - {None}


def test_a_server_that_does_nothing_wrong_is_reproached_nothing(truth: Truth, measure: Measure) -> None:
    """Its figures at half of their bounds: 0.5 % of prefix-cache hits, 0.5 % of tokens too many in its counters."""
    point, _ = measure(truth(*FAST, "--cache-hits", "0.005", "--counter-factor", "1.005"))
    assert point.requests >= 120 and point.prefix_hit_share and point.errors == 0
    assert told(point) == set()


# --- what the server does ---------------------------------------------------------------------------------------------

SLOWING = replace(SHORT, requests=60, min_window_s=1.5, output_tokens=8)


@pytest.mark.parametrize(
    ("fault", "reason", "verdict"),
    [
        (("--cache-hits", "0.05"), "cache_warm", "invalid"),
        (("--preempt-every", "30"), "preempting", "suspect"),
        (("--short", "1"), "length_mismatch", "suspect"),
        (("--prompt-tokens-off", "1"), "length_mismatch", "suspect"),
        (("--prompt-tokens-off", "-1", "--every", "20"), "length_mismatch", "suspect"),
        (("--no-usage",), "length_mismatch", "suspect"),
        (("--counter-factor", "3"), "tokens_lost", "suspect"),
        (("--counter-factor", "0.5"), "counters_short", "suspect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_a_server_does_is_told(
    truth: Truth, measure: Measure, fault: tuple[str, ...], reason: str, verdict: str
) -> None:
    point, _ = measure(truth(*FAST, *fault))
    assert told(point) == {reason}
    assert is_judged(point, verdict)


def test_prompts_as_text_have_no_exact_length(truth: Truth, measure: Measure) -> None:
    point, _ = measure(truth(*FAST, "--prompt-tokens-off", "1"), dialect=Dialect(words_per_token=1.0))
    assert told(point) == set()


def test_a_server_that_slows_down_is_drifting(truth: Truth, measure: Measure) -> None:
    """Its gap of 3 ms grows by 300 % a second: from the first to the second half of 1.5 s it more than doubles."""
    point, _ = measure(truth("--ttft-ms", "5", "--gap-ms", "3", "--gap-growth", "3"), SLOWING)
    assert point.requests >= 60
    assert "drifting" in point.verdict_reasons


def test_somebody_else_on_the_server_is_foreign_load(truth: Truth, measure: Measure) -> None:
    """One request of a stranger, 4,000 tokens to read and 100 to write, beside some 20,000 and 800 of ours."""
    url = truth(*FAST)
    asked = {"model": "truth", "prompt": list(range(4000)), "max_tokens": 100}
    strangers: list[int] = []

    def on_record(record: RequestRecord) -> None:
        if not strangers:
            strangers.append(httpx.post(url + "/v1/completions", json=asked, timeout=20).status_code)

    point, _ = measure(url, on_record=on_record)
    assert strangers == [200]
    assert told(point) == {"foreign_load"}


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"), [(("--status", "503"), "http_503"), (("--error-after", "2"), "stream_error")]
)  # fmt: skip
@pytest.mark.parametrize(("every", "verdict"), [("45", "suspect"), ("5", "invalid")])
def test_errors(
    truth: Truth, measure: Measure, fault: tuple[str, ...], error: str, every: str, verdict: str
) -> None:  # fmt: skip
    """Each 45th request is 2 to 3.3 % of the window's 120 and more, each 5th one 20 %."""
    point, load = measure(truth(*FAST, *fault, "--every", every))
    assert failures(load) == {error} and point.errors
    assert told(point) == {"errors"}
    share = point.errors / (point.errors + point.requests)
    assert share < 0.05 if verdict == "suspect" else share >= 0.05
    assert is_judged(point, verdict)


def test_a_stalled_stream_is_an_error_and_not_a_very_slow_answer(truth: Truth, measure: Measure) -> None:
    scenario = replace(SHORT, token_timeout_s=0.3, requests=40)
    point, load = measure(truth(*FAST, "--stall-after", "2", "--every", "9"), scenario)
    assert failures(load) == {"stall"}
    assert told(point) == {"errors", "too_few_samples"} and point.verdict == "invalid"
    assert point.p50_ms is not None and point.p50_ms < 300, "what never ended is in no latency"


def test_a_server_that_fails_everything_ends_the_cell(truth: Truth, measure: Measure) -> None:
    """26 failures in a row. Whether the window had opened by then is a matter of ms: errors may be counted or not."""
    point, load = measure(truth(*FAST, "--error-after", "0"))
    assert load.gave_up is not None and "stream_error" in load.gave_up and len(load.records) < 60
    assert point.verdict == "invalid" and {"gave_up", "too_few_samples"} <= told(point)


def test_a_window_that_never_opens(truth: Truth, measure: Measure) -> None:
    """An open loop warms up for 5 s; after 26 failures in a row, a quarter of a second, no more is to be had."""
    scenario = replace(SHORT, arrivals="constant")
    point, load = measure(truth(*FAST, "--status", "500"), scenario, Cell("served", 0, rate_rps=100.0))
    assert load.open_ns is None and point.window_s is None
    assert point.verdict == "invalid" and {"gave_up", "no_window", "too_few_samples"} == told(point)


@pytest.mark.parametrize(("requests", "n", "verdict"), [(4, range(4, 20), "invalid"), (30, range(20, 100), "suspect")])
def test_too_few_samples(truth: Truth, measure: Measure, requests: int, n: range, verdict: str) -> None:
    """Two users and answers of some 60 ms: the window closes within two or three answers of what was asked for."""
    scenario = replace(SHORT, requests=requests)
    point, _ = measure(truth("--ttft-ms", "35", "--gap-ms", "5"), scenario, Cell("served", 2))
    assert point.requests in n
    assert told(point) == {"too_few_samples"}
    assert (point.p95_ms is None) == (verdict == "invalid")
    assert is_judged(point, verdict)


@pytest.mark.parametrize(("precision", "reasons"), [(0.0001, {"imprecise"}), (10.0, set())])
def test_an_interval_wider_than_was_asked_for(
    truth: Truth, measure: Measure, precision: float, reasons: set[str]
) -> None:
    """Lengths vary by a quarter, so p95 is never known to 0.01 %, and the window ends after 0.8 s without it."""
    scenario = replace(SHORT, requests=100, max_window_s=0.8, precision=precision)
    point, _ = measure(truth(*FAST), scenario)
    assert told(point) == reasons


# --- client_bound -----------------------------------------------------------------------------------------------------


@contextmanager
def held_up(held: Generators, stop_ms: float, run_ms: float) -> Iterator[None]:
    """Stop the generators again and again, as a machine does that has no core for them.

    For these times on average: with a fixed period the load falls into step with it, and never ends in a stop.
    """
    done, rng = threading.Event(), random.Random(1)

    def hold() -> None:
        while not done.wait(rng.uniform(0.5, 1.5) * run_ms / 1e3):
            pids = held.pids()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 1.5) * stop_ms / 1e3)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_client_that_cannot_send_in_time_is_the_bound(truth: Truth, measure: Measure, shared: Generators) -> None:
    """Stopped for some 40 of 60 ms: two of three answers end meanwhile, and the next question waits for it."""
    scenario = replace(SHORT, output_tokens=3, requests=40)
    with held_up(shared, stop_ms=40, run_ms=20):
        point, load = measure(truth("--ttft-ms", "70", "--gap-ms", "70"), scenario)
    lags = [((r.sent_ns or 0) - r.intended_ns) / 1e6 for r in load.records if r.phase == "measured" and r.sent_ns]
    assert (metrics.percentile(lags, 50) or 0) > 2
    assert point.verdict == "invalid" and "client_bound" in point.verdict_reasons


def test_a_client_that_cannot_read_in_time_is_the_bound(truth: Truth, measure: Measure, shared: Generators) -> None:
    """Stopped for some 20 of 50 ms with a chunk each 2 ms: after each stop ten chunks come in one read."""
    scenario = replace(SHORT, output_tokens=40, requests=40)
    with held_up(shared, stop_ms=20, run_ms=30):
        point, _ = measure(truth("--ttft-ms", "5", "--gap-ms", "2"), scenario, Cell("served", 4))
    assert (point.coalesced_share or 0) > 0.05
    assert point.verdict == "invalid" and "client_bound" in point.verdict_reasons


def test_more_than_this_client_was_measured_to_carry(truth: Truth, measure: Measure) -> None:
    """8 users get thousands of chunks a second; a client that was measured to carry 100 has no say in how fast."""
    ceiling = Ceiling(streams=1, chunks_s=100.0, cpu="a slow one", cores=1, kneebench_version="0")
    point, _ = measure(truth(*FAST), ceiling=ceiling)
    assert (point.chunks_s or 0) > 100
    assert point.verdict == "invalid" and "client_bound" in point.verdict_reasons


def test_a_late_loop_without_kernel_stamps_is_the_bound(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that gives no stamps, and an event loop that is blocked for 30 ms at a time: every time is ours."""
    monkeypatch.setattr(client, "_ask_for_stamps", lambda sock: None)
    url = truth("--ttft-ms", "30", "--gap-ms", "35")
    asked = {"prompt": [1, 2], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}

    async def drive() -> tuple[list[RequestRecord], list[float]]:
        alarm, lags_ms = Alarm(), []
        connections = [Connection(Address.parse(url)) for _ in range(12)]
        helpers = [asyncio.create_task(worker._measure_lag(alarm, lags_ms)), asyncio.create_task(blocked())]
        records = []
        for round_ in range(2):
            started = [RequestRecord("x", n, round_, "measured", time.time_ns()) for n in range(len(connections))]
            body = json.dumps(asked).encode()
            ended = await asyncio.gather(*(one.exchange("/v1/completions", body) for one in connections))
            records += [client.fill(record, exchange) for record, exchange in zip(started, ended, strict=True)]
        for helper in helpers:
            helper.cancel()
        alarm.close()
        for connection in connections:
            connection.close()
        return records, lags_ms

    async def blocked() -> None:
        while True:
            time.sleep(0.03)
            await asyncio.sleep(0.001)

    records, lags_ms = uvloop.run(drive())
    assert {record.error for record in records} == {None} and {record.clock for record in records} == {"user"}
    lag_ms = metrics.percentile(lags_ms, 99)
    assert lag_ms is not None and lag_ms > 10
    sent_at_once = [replace(record, intended_ns=record.sent_ns or 0) for record in records]
    row = SweepPoint("run", "served", 12, window_s=1.0, ttft_p50_ms=30.0, loop_lag_p99_ms=lag_ms)
    assert "client_bound" in judge(sent_at_once, row, Conditions(exact_lengths=False))[1]
    assert "client_bound" not in judge(sent_at_once, replace(row, loop_lag_p99_ms=1.0), Conditions())[1]


# --- the clock, the card, the kernel ----------------------------------------------------------------------------------


def test_a_clock_that_is_set_is_seen_by_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLOCK_REALTIME is 250 ms behind CLOCK_MONOTONIC's pace when the job ends: somebody set it back."""
    offsets = iter([7_000_000_000, 6_750_000_000])
    monkeypatch.setattr(worker, "realtime_offset_ns", lambda: next(offsets))
    job = Job(CELL, SHORT, IDS, Target("http://127.0.0.1:9", "nobody"), time.time_ns())

    async def run() -> object:
        commands: asyncio.Queue[object] = asyncio.Queue()
        commands.put_nowait(Stop())
        return await worker._run(job, commands, lambda message: None)

    done = uvloop.run(run())
    assert isinstance(done, Done) and done.clock_step_ms == -250


class _Told:
    """A generator that has said all that it will say."""

    def __init__(self, done: Done) -> None:
        reading, writing = os.pipe()
        with open(writing, "wb") as pipe:
            pipe.write(packed(done))
        self.stdout = open(reading, "rb", buffering=0)

    def fileno(self) -> int:
        return self.stdout.fileno()

    def send(self, message: object) -> None: ...

    def receive(self) -> list[object]:
        return Inbox().feed(self.stdout.read())


def test_a_step_that_one_of_several_generators_saw_makes_the_point_invalid() -> None:
    told_steps = [_Told(Done((), 0.0, step_ms)) for step_ms in (0.2, -7.0, 3.0)]
    load = generators._Cell(told_steps, Window(SHORT, CELL), lambda record: None, [0] * 3).run()  # type: ignore[arg-type]
    assert load.clock_step_ms == -7.0
    for one in told_steps:
        one.stdout.close()
    row = SweepPoint("run", "served", 8, window_s=1.0, clock_step_ms=load.clock_step_ms)
    assert "clock_step" in judge((), row, Conditions())[1]


def test_a_card_held_back_by_its_heat_is_throttled(truth: Truth, measure: Measure) -> None:
    """Ten samples of one card over the window of a real load, written by hand, one of them with a reason."""

    def samples(throttle: tuple[str, ...]) -> Callable[[LoadResult], list[GpuSample]]:
        def of(load: LoadResult) -> list[GpuSample]:
            assert load.open_ns is not None and load.close_ns is not None
            step = (load.close_ns - load.open_ns) // 10
            times = [load.open_ns + number * step for number in range(10)]
            return [GpuSample("x", at, 0, power_w=70.0, throttle=throttle if at == times[3] else ()) for at in times]

        return of

    url = truth(*FAST)
    hot, _ = measure(url, samples=samples(("hw_thermal",)))
    capped, _ = measure(url, samples=samples(("sw_power_cap",)))
    assert (hot.throttled_share, told(hot)) == (0.1, {"throttled"})
    assert (capped.throttled_share, told(capped)) == (0.0, set())


@pytest.mark.parametrize(
    ("said", "reasons"),
    [
        ("INFO 11-20 18:49:12 [__init__.py:1028] Using EmulationMxfp4LinearKernel for MXFP4 GEMM", ("slow_kernel",)),
        ("INFO 11-20 18:49:12 [__init__.py:923] Using MarlinLinearKernel for mixed-precision linear", ()),
    ],
)
def test_a_kernel_that_the_log_names_and_that_is_no_fast_one(said: str, reasons: tuple[str, ...]) -> None:
    kernel = read_log(f"(EngineCore pid=7) {said}\n").kernel
    row = SweepPoint("run", "awq", 8, window_s=1.0, kernel=kernel)
    times = {"sent_ns": 1, "first_token_ns": 2, "last_token_ns": 3, "completion_tokens": 1, "output_tokens_asked": 1}
    healthy = [RequestRecord("x", 0, n, "measured", 1, clock="kernel", **times) for n in range(100)]  # type: ignore
    assert judge(healthy, row, Conditions(quantized=True))[1] == reasons


# --- an engine that dies ----------------------------------------------------------------------------------------------


class Deaths:
    """Engines that a sweep starts and that die in their first cell, `deaths` of them; what the sweep says of it."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.said = deaths, []  # type: int, list[str]
        self._process: subprocess.Popen[str] | None = None

    @contextmanager
    def open_engine(self, variant: Variant, repeat: int) -> Iterator[Service]:
        command = [sys.executable, "-m", "harness.load.truth", "--ttft-ms", "5", "--gap-ms", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as self._process:
            assert self._process.stdout is not None
            port = self._process.stdout.readline().split()[1]
            try:
                with endpoint.attach(f"http://127.0.0.1:{port}", "truth") as engine:
                    yield Service(engine, IDS)
            finally:
                self._process.kill()

    def request_ended(self, record: RequestRecord) -> None:
        if self.deaths and record.phase == "measured" and self._process is not None and self._process.poll() is None:
            self.deaths -= 1
            self._process.kill()
            self._process.wait()

    def status(self, text: str) -> None:
        self.said.append(text)

    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None: ...


def swept(deaths: Deaths, tmp_path: Path) -> list[SweepPoint]:
    """A sweep of two precisions with one cell each, read back from the disk."""
    sessions = [Session(Variant(name), 1, (Cell(name, 4),)) for name in ("bf16", "awq")]
    with RunDirectory(tmp_path / "run") as directory:
        run_sweep(sessions, Plan(SHORT), directory, SweepPoint("run", "", 0), deaths.open_engine, deaths)
    return read_table(tmp_path / "run" / "points.csv", SweepPoint)


def test_an_engine_that_dies_is_started_again_and_its_cell_is_marked(tmp_path: Path) -> None:
    deaths = Deaths(1)
    bf16, awq = swept(deaths, tmp_path)
    assert told(bf16) == {"engine_restarted"} and bf16.attempt == 2 and bf16.requests >= 120
    assert bf16.verdict != "valid" and bf16.verdict_reasons[0] == "engine_restarted"
    assert told(awq) == set() and awq.attempt == 1
    assert [text for text in deaths.said if "died" in text]
    attempts = {record.attempt for record in read_table(tmp_path / "run" / "requests.csv", RequestRecord)}
    assert attempts == {1, 2}, "what the first one answered is kept"


def test_a_load_that_a_search_measures_again_is_no_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One user is invalid the first time: its second row stands by itself, and nothing was started again."""
    verdicts = iter([("invalid", ("client_bound",))])
    monkeypatch.setattr(validity, "judge", lambda *_: next(verdicts, ("valid", ())))
    quiet, plan = Deaths(0), Plan(SHORT, search=Search(Slo(p95_s=60.0), max_cells=3))
    with RunDirectory(tmp_path / "run") as directory:
        began = time.monotonic()
        sessions = [Session(Variant("bf16"), 1)]
        run_sweep(sessions, plan, directory, SweepPoint("run", "", 0), quiet.open_engine, quiet, began)
    rows = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    assert [(row.conc, row.attempt, row.verdict_reasons) for row in rows] == [
        (1, 1, ("client_bound",)), (1, 2, ()), (2, 1, ()),
    ]  # fmt: skip


def test_an_engine_that_dies_twice_ends_its_session_and_not_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="2 of 2 cells"):
        swept(Deaths(2), tmp_path)
    bf16, awq = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    assert bf16.verdict == "invalid" and {"engine_died", "engine_restarted"} <= told(bf16)
    assert told(awq) == set()


# --- real vLLM --------------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_warm_prefix_cache_of_real_vllm(serving: Callable[[ServeSpec], VllmServer], shared: Generators) -> None:
    """The same prompts of 300 tokens, asked under another salt, find nothing in the cache.

    Under the same salt, on purpose, they find each whole block again: 256 tokens on a CPU, whose blocks have 128.
    """
    engine = serving(ServeSpec(resolve("demo").path, "bf16", max_model_len=512, max_num_seqs=16, kv_cache_gib=0.25))
    scenario = replace(SHORT, input_tokens=300, length_jitter=0.1, requests=24)
    dialect = probe(engine.target)

    def point(salt: str, conc: int = 2) -> SweepPoint:
        return measured_on(engine, shared, scenario, Cell("bf16", conc), dialect=dialect, salt=salt)[0]

    new, more_users, other_salt = point("one"), point("one", conc=4), point("two")
    for cold in (new, more_users, other_salt):
        assert cold.requests >= 24 and cold.errors == 0
        assert cold.prefix_hit_share == 0 and "cache_warm" not in cold.verdict_reasons
    again = point("one")
    assert (again.prefix_hit_share or 0) > 0.3
    assert again.verdict == "invalid" and "cache_warm" in again.verdict_reasons
