"""The plan of cells and its execution: for each server session start the engine, run its cells, write rows as they end.

Both precisions get the same prompts, seeds, server limits and warm-up; only the checkpoint differs. With repeats the
sessions are interleaved ABBA (bf16 awq | awq bf16 | ...), so that a machine that drifts does not favour one side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from harness.analysis import metrics, validity
from harness.analysis.cost import usd_per_1m
from harness.engines import Engine
from harness.engines.address import Address
from harness.errors import EngineError, InputError, RunError
from harness.load.arrivals import LoadResult, closed_loop
from harness.load.client import Connection
from harness.load.workload import Dialect, make_ask
from harness.records import Cell, Phase, RequestRecord, Scenario, SweepPoint
from harness.rundir import RunDirectory, full_disk
from harness.telemetry.watch import EngineWatch, Seen

DYING_S = 10.0
"""How long an engine that fails every request is watched: its last words are worth more than "connection refused"."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model in one precision, ready to be served."""

    precision: str
    checkpoint_sha256: str | None = None
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """One start of the engine: a variant, and the cells that it serves before it is stopped."""

    variant: Variant
    repeat: int
    cells: tuple[Cell, ...]


class Observer(Protocol):
    """Whoever watches a sweep (the terminal); every method may do nothing."""

    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...


OpenEngine = Callable[[Variant, int], AbstractContextManager[tuple[Engine, Dialect]]]
"""Start (or attach to) the engine of a variant for one session; leaving the context ends what was started."""


def plan_sessions(variants: Sequence[Variant], concurrencies: Sequence[int], repeats: int = 1) -> list[Session]:
    """Sessions in the order in which they run: ABBA over the repeats, concurrencies ascending within each."""
    sessions = []
    for repeat in range(1, repeats + 1):
        ordered = variants if repeat % 2 else list(reversed(variants))
        for variant in ordered:
            cells = tuple(Cell(variant.precision, conc, repeat) for conc in sorted(set(concurrencies)))
            sessions.append(Session(variant, repeat, cells))
    return sessions


def parse_concurrencies(text: str) -> list[int]:
    """'1,8,16,32' -> [1, 8, 16, 32]. Raises InputError naming the part that is no positive whole number."""
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= 4096:
            raise InputError(f"--conc {text!r}: {part.strip()!r} is no concurrency", allowed="whole numbers, 1 to 4096")
        numbers.append(int(part))
    return numbers


def run_sweep(
    sessions: Sequence[Session],
    scenario: Scenario,
    directory: RunDirectory,
    template: SweepPoint,
    open_engine: OpenEngine,
    observer: Observer,
) -> list[SweepPoint]:
    """Run every session; rows are on disk as their cells end. `template` carries what all rows share (run, model).

    An engine that dies, or fails every request, ends its session, not the sweep: the cell gets an invalid row and the
    next session starts. If any session failed, RunError is raised at the end; the rows stay.
    """
    points: list[SweepPoint] = []
    failures: list[str] = []
    total = sum(len(session.cells) for session in sessions)
    for session in sessions:
        shared = replace(
            template,
            precision=session.variant.precision,
            checkpoint_sha256=session.variant.checkpoint_sha256,
            repeat=session.repeat,
        )
        try:
            with open_engine(session.variant, session.repeat) as (engine, dialect):
                for point in _run_session(
                    session, scenario, directory, shared, engine, dialect, observer, points, total
                ):
                    points.append(point)
        except EngineError as error:
            failures.append(f"{session.variant.precision}: {error}")
            observer.status(f"{session.variant.precision} failed: {str(error).splitlines()[0]}")
        except OSError as error:
            raise full_disk(error) from error
    if failures:
        raise RunError("\n".join(failures) + f"\n{len(points)} of {total} cells have rows in {directory.path}")
    return points


def _run_session(
    session: Session,
    scenario: Scenario,
    directory: RunDirectory,
    shared: SweepPoint,
    engine: Engine,
    dialect: Dialect,
    observer: Observer,
    before: Sequence[SweepPoint],
    total: int,
) -> Iterator[SweepPoint]:
    for cell in session.cells:
        observer.cell_begins(cell, len(before) + 1, total)
        point, failure = run_cell(cell, scenario, directory, shared, session.variant, engine, dialect, observer)
        directory.requests.flush(durable=True)
        directory.points.add(point, durable=True)
        observer.cell_ended(point)
        yield point
        if failure is not None:
            raise failure


def run_cell(
    cell: Cell,
    scenario: Scenario,
    directory: RunDirectory,
    shared: SweepPoint,
    variant: Variant,
    engine: Engine,
    dialect: Dialect,
    observer: Observer,
) -> tuple[SweepPoint, EngineError | None]:
    """Drive one cell; its row, and what ends the session if the engine died or refuses everything."""

    def on_record(record: RequestRecord) -> None:
        directory.requests.add(record)
        observer.request_ended(record)

    started_at, started = datetime.now(UTC), time.perf_counter()
    with EngineWatch(engine) as watch:
        load = drive(cell, scenario, engine, dialect, on_record)
    failure = EngineError(f"cell {cell.key}: {load.gave_up}") if load.gave_up else None
    died = False
    try:
        _check(engine, patience_s=DYING_S if load.gave_up else 0.0)
    except EngineError as error:
        failure, died = error, True
    point = make_point(cell, scenario, shared, variant, engine, dialect, load, watch.seen())
    if died:
        point = replace(point, verdict="invalid", verdict_reasons=("engine_died", *point.verdict_reasons))
    duration = time.perf_counter() - started
    return replace(point, started_at=started_at.isoformat(timespec="seconds"), duration_s=duration), failure


def _check(engine: Engine, patience_s: float) -> None:
    """Raise the engine's own last words if it died; with patience, because it refuses requests before it is gone."""
    deadline = time.monotonic() + patience_s
    engine.check()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        engine.check()


def drive(
    cell: Cell,
    scenario: Scenario,
    engine: Engine,
    dialect: Dialect,
    on_record: Callable[[RequestRecord], None],
) -> LoadResult:
    """Put the cell's load on the engine's target, on an event loop of its own."""
    import uvloop

    target = engine.target
    address = Address.parse(target.base_url)
    connections = [Connection(address, target.api_key) for _ in range(cell.conc)]

    async def send(user: int, sequence: int, phase: Phase) -> RequestRecord:
        ask = make_ask(scenario, cell, user, sequence, dialect, target.model)
        record = RequestRecord(
            cell=cell.key,
            user=user,
            sequence=sequence,
            phase=phase,
            intended_ns=time.time_ns(),
            input_tokens_asked=ask.input_tokens,
            output_tokens_asked=ask.output_tokens,
        )
        return await connections[user].request(dialect.path, ask.body, record, scenario.request_timeout_s)

    load = closed_loop(
        cell.conc,
        send,
        # Every user asks at least three times: fewer, and the window would be one wave of requests and its ebb.
        requests=max(scenario.requests, 3 * cell.conc),
        min_window_s=scenario.min_window_s,
        warmup_rounds=scenario.warmup_rounds,
        seed=scenario.seed,
        on_record=on_record,
    )
    try:
        return uvloop.run(load)
    finally:
        for connection in connections:
            connection.close()


def make_point(
    cell: Cell,
    scenario: Scenario,
    shared: SweepPoint,
    variant: Variant,
    engine: Engine,
    dialect: Dialect,
    load: LoadResult,
    seen: Seen,
) -> SweepPoint:
    """The row of a cell: metrics, memory, counters, price and verdict put together."""
    info = engine.info
    found = metrics.summarise(load.records, load.open_ns, load.close_ns)
    lag_p99_ms = metrics.percentile(load.lags_ms, 99)
    verdict, reasons = validity.judge(
        load.records,
        found.get("window_s"),
        validity.Conditions(
            gave_up=load.gave_up,
            loop_lag_p99_ms=lag_p99_ms,
            prefix_hit_share=seen.prefix_hit_share,
            preemptions=seen.preemptions,
            quantized=variant.quantized,
            kernel=info.kernel,
            exact_lengths=bool(dialect.vocabulary) and dialect.vllm_extras,
        ),
    )
    tok_s = found.get("tok_s")
    parts = (info.weights_gib, info.kv_cache_gib, seen.memory_gib)
    other = seen.memory_gib - info.weights_gib - info.kv_cache_gib if None not in parts else None  # type: ignore[operator]
    return replace(
        shared,
        conc=cell.conc,
        verdict=verdict,
        verdict_reasons=reasons,
        vram_gib=seen.memory_gib,
        memory_kind=info.device,
        weights_gib=info.weights_gib,
        kv_cache_gib=info.kv_cache_gib,
        kv_cache_tokens=info.kv_cache_tokens,
        other_gib=other if other is not None and other >= 0 else None,
        usd_per_1m_tokens=usd_per_1m(scenario.usd_per_hour, tok_s, scenario.utilisation) if tok_s else None,
        usd_per_hour=scenario.usd_per_hour,
        utilisation=scenario.utilisation,
        running_peak=seen.running_peak,
        waiting_peak=seen.waiting_peak,
        kv_usage_peak=seen.kv_usage_peak,
        preemptions=seen.preemptions,
        prefix_hit_share=seen.prefix_hit_share,
        send_lag_p99_ms=validity.send_lag_p99_ms(load.records),
        loop_lag_p99_ms=lag_p99_ms,
        coalesced_share=validity.coalesced_share(load.records),
        kernel=info.kernel,
        engine=info.engine,
        engine_version=info.engine_version,
        gpu=info.gpu,
        source=info.source,
        scenario=scenario.name,
        **found,
    )
