"""The plan of cells and its execution: for each server session start the engine, run its cells, write rows as they end.

Both precisions get the same prompts, seeds, server limits and warm-up; only the checkpoint differs. With repeats the
sessions are interleaved ABBA (bf16 awq | awq bf16 | ...), so that a machine that drifts does not favour one side.

A cell is done when its row is on disk. Whatever ended a sweep before that (Ctrl-C, kill -9, a dead engine, a full
disk), the next start finds the rows that are there and goes on with the first cell that has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from harness.analysis import counters, metrics, power, validity
from harness.analysis.cost import price
from harness.budget import Budget
from harness.engines import Engine, EngineInfo
from harness.engines.arguments import written
from harness.errors import EngineError, InputError, RunError
from harness.load.dataset import Prompts
from harness.load.generators import Generators, LoadResult, processes_for
from harness.load.schedule import Arrival
from harness.load.selftest import Ceiling
from harness.load.workload import Dialect
from harness.records import Cell, GpuSample, RequestRecord, Scenario, SweepPoint
from harness.redact import without_keys
from harness.rundir import RunDirectory, writing
from harness.search import Search
from harness.telemetry.host import host
from harness.telemetry.sampler import GpuSampler
from harness.telemetry.watch import EngineWatch, Seen
from harness.variants import name_of, precision_of, setting_of

DYING_S = 10.0
"""How long an engine of ours that fails every request is watched: its last words say more than "connection refused"."""
ATTEMPTS = 2
"""How often a cell is begun in one go: an engine that died is started once more, and the cell is marked."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model in one precision, ready to be served with one set of engine arguments."""

    precision: str
    """What tables call it: awq, or awq[max_num_seqs=64] where engine arguments vary."""
    checkpoint_sha256: str | None = None
    quantized: bool = False
    checkpoint_bytes: int | None = None
    """Size of its weight files."""
    engine_args: tuple[str, ...] = ()
    """What its engine is told beyond what every engine is told, flags by name; see engines/arguments.py."""
    cards: int = 1
    """How many its engine runs on: tensor times pipeline parallel."""
    card_type: str | None = None
    """On a cluster: the type of card that it is placed on, as `--card` names it. None: whatever is there."""


@dataclass(frozen=True, slots=True)
class Session:
    """One start of the engine: a variant, and the cells that it serves before it is stopped.

    Without `cells` each next one follows from the rows so far: `Plan.search`.
    """

    variant: Variant
    repeat: int
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """An engine that answers, and how to speak to it."""

    engine: Engine
    dialect: Dialect
    prompts: Prompts | None = None
    """The scenario's dataset in this engine's tokens; None: prompts are drawn."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all cells of a sweep have in common."""

    scenario: Scenario
    processes: int | None = None
    """Load generators; None: as many as the users need."""
    salt: str = ""
    """New in each start of a sweep: keeps the prefix cache of a server that lives longer than we do from helping."""
    trace: tuple[Arrival, ...] = ()
    ceiling: Ceiling | None = None
    """What this machine's client was measured to keep up with."""
    restarts: bool = True
    """The engine is ours to start again."""
    search: Search | None = None
    """Find how many users the service level carries, instead of going through a list of loads."""


class Observer(Protocol):
    """Whoever watches a sweep (the terminal); every method may do nothing."""

    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None: ...


class Rows(Protocol):
    """Where a session puts what it finds: the run directory, or on a cluster the way to its one owner."""

    @property
    def done(self) -> Sequence[SweepPoint]:
        """Rows of cells that are not measured again."""
        ...

    @property
    def host(self) -> str:
        """This machine's address for the load: an engine listens there."""
        ...

    def add_request(self, record: RequestRecord) -> None: ...
    def add_point(self, point: SweepPoint) -> None: ...
    def add_gpu_sample(self, sample: GpuSample) -> None: ...
    def fresh(self, stem: str, suffix: str) -> Path:
        """A file of that name, for the engine's log."""
        ...

    def describe_engine(self, log: Path, info: EngineInfo) -> None: ...


OpenEngine = Callable[[Variant, int], AbstractContextManager[Service]]
"""Start (or attach to) the engine of a variant for one session; leaving the context ends what was started."""
Opener = Callable[[Rows, Callable[[str], None]], OpenEngine]
"""Makes an OpenEngine that logs there and tells how far it is; on a cluster it is sent to the node, so it pickles."""


def plan_sessions(
    variants: Sequence[Variant],
    concurrencies: Sequence[int],
    repeats: int = 1,
    rates: Sequence[float] = (),
) -> list[Session]:
    """Sessions in the order in which they run: ABBA over the repeats, loads ascending within each.

    `rates` (requests a second) make open loops; then `concurrencies` is empty. A search has neither.
    """
    sessions = []
    for repeat in range(1, repeats + 1):
        ordered = variants if repeat % 2 else list(reversed(variants))
        for variant in ordered:
            closed = [Cell(variant.precision, conc, repeat) for conc in sorted(set(concurrencies))]
            opened = [Cell(variant.precision, 0, repeat, rate) for rate in sorted(set(rates))]
            sessions.append(Session(variant, repeat, tuple(closed + opened)))
    return sessions


def on_cards(variants: Sequence[Variant], types: Sequence[str]) -> list[Variant]:
    """The variants on each type of card. With several, the type is part of a variant's name: awq[card=l4]."""
    if len(types) < 2:
        return [replace(variant, card_type=types[0] if types else None) for variant in variants]
    return [
        replace(
            variant,
            precision=name_of((("card", card_type), *setting_of(variant.precision)), precision_of(variant.precision)),
            card_type=card_type,
        )
        for card_type in types
        for variant in variants
    ]


def parse_concurrencies(text: str) -> list[int]:
    """'1,8,16,32' -> [1, 8, 16, 32]. Raises InputError naming the part that is no positive whole number."""
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= 4096:
            raise InputError(f"--conc {text!r}: {part.strip()!r} is no concurrency", allowed="whole numbers, 1 to 4096")
        numbers.append(int(part))
    return numbers


def parse_rates(text: str) -> list[float]:
    """'0.5,2,8' -> [0.5, 2.0, 8.0]. Raises InputError naming the part that is no positive number."""
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0.001 <= rate <= 10_000:
            raise InputError(
                f"--rate {text!r}: {part.strip()!r} is no rate", allowed="requests a second, 0.001 to 10,000"
            )
        rates.append(rate)
    return rates


def run_sweep(
    sessions: Sequence[Session],
    plan: Plan,
    directory: RunDirectory,
    template: SweepPoint,
    open_engine: OpenEngine,
    observer: Observer,
    began_s: float = 0.0,
    hired: AbstractContextManager[Generators] | None = None,
) -> list[SweepPoint]:
    """Run every session; rows are on disk as their cells end. `template` carries what all rows share (run, model).

    `directory` knows the rows of an earlier start, which are not measured again. `began_s` (time.monotonic) is when the
    sweep began, for the budget of a search. An engine that dies in a cell is started again once. If it dies again, or
    refuses every request, that ends its session, not the sweep: the cell gets an invalid row and the next session
    starts. If any session failed, RunError is raised at the end; the rows stay. `hired`: generators on other nodes.
    """
    points: list[SweepPoint] = []
    failures: list[str] = []
    begun, before = directory.attempts(), len(directory.done)
    total = plan.search.max_cells if plan.search else sum(len(session.cells) for session in sessions)
    with hired or Generators() as generators:
        for number, session in enumerate(sessions):
            budget = None
            if plan.search is not None:
                budget = Budget.share(plan.search, before + len(points), began_s, len(sessions) - number)
            run = Run(plan, directory, open_engine, observer, generators, points, begun, total, budget)
            try:
                with writing():
                    run.session(session, template)
            except EngineError as error:
                said = without_keys(str(error))
                failures.append(f"{session.variant.precision}: {said}")
                observer.status(f"{session.variant.precision} failed: {said.splitlines()[0]}")
    if failures:
        raise incomplete(failures, before + len(points), None if plan.search else total, directory.path)
    return points


def incomplete(failures: Sequence[str], rows: int, planned: int | None, path: Path) -> RunError:
    """The end of a sweep of which sessions failed. `planned` cells; None: a search, which plans as it goes."""
    cells = f"{rows} cells" if planned is None else f"{rows} of {planned} cells"
    return RunError(
        "\n".join(failures) + f"\n{cells} have rows in {path}",
        remedy="mend what the engine names, then: bench sweep --resume with that directory",
    )


@dataclass(frozen=True, slots=True)
class Run:
    """A session in progress, and the rows of the sweep."""

    plan: Plan
    directory: Rows
    open_engine: OpenEngine
    observer: Observer
    generators: Generators
    points: list[SweepPoint]
    begun: Mapping[str, int]
    """The highest attempt at each cell that an earlier start has left requests of."""
    total: int
    budget: Budget | None

    def session(self, session: Session, template: SweepPoint) -> None:
        """Serve the variant and run its cells, with a second start of the engine for a cell in which it died."""
        shared = replace(
            template,
            precision=session.variant.precision,
            checkpoint_sha256=session.variant.checkpoint_sha256,
            repeat=session.repeat,
        )
        deaths: dict[str, int] = {}
        cell = self.next_cell(session)
        while cell is not None:
            with self.open_engine(session.variant, session.repeat) as service:
                while cell is not None:
                    self.observer.cell_begins(cell, len(self.directory.done) + len(self.points) + 1, self.total)
                    point, failure, died = self.cell(cell, shared, session.variant, service)
                    deaths[cell.key] = deaths.get(cell.key, 0) + died
                    if died and self.plan.restarts and deaths[cell.key] < ATTEMPTS:
                        self.observer.status(f"the engine died in {cell.key}; it is started once more")
                        cell = replace(cell, attempt=cell.attempt + 1)
                        break
                    if deaths[cell.key] > died:  # it died in an earlier try, and this is the second start's
                        point = validity.worsen(point, "engine_restarted", "suspect")
                    self.directory.add_point(point)
                    self.points.append(point)
                    self.observer.cell_ended(point)
                    if failure is not None:
                        raise failure
                    cell = self.next_cell(session)

    def next_cell(self, session: Session) -> Cell | None:
        """The first cell of the plan without a row, or the one that the search wants; None: the session is over."""
        done = [*self.directory.done, *self.points]
        if self.budget is None:
            finished = set(map(_key, done))
            cell = next((cell for cell in session.cells if cell.key not in finished), None)
        else:
            own = [point for point in done if point.precision == session.variant.precision]
            conc, said = self.budget.next_load(own, len(done), self.plan.scenario)
            self.observer.note(f"{session.variant.precision}: {said}")
            cell = None if conc is None else Cell(session.variant.precision, conc, session.repeat)
        if cell is None:
            return None
        tried = [point.attempt for point in done if _key(point) == cell.key]
        return replace(cell, attempt=max([self.begun.get(cell.key, 0), *tried]) + 1)

    def cell(
        self, cell: Cell, shared: SweepPoint, variant: Variant, service: Service
    ) -> tuple[SweepPoint, EngineError | None, bool]:
        """Drive one cell: its row, what ends the session (it died or refuses everything), and whether it died."""
        plan, engine = self.plan, service.engine

        def on_record(record: RequestRecord) -> None:
            self.directory.add_request(record)
            self.observer.request_ended(record)

        started_at, started = datetime.now(UTC), time.perf_counter()
        with ExitStack() as watching:
            sampler = None
            if engine.info.device == "gpu":  # a CPU engine or an endpoint is not what our card works for
                sampler = watching.enter_context(
                    GpuSampler(engine.pids(), self.directory.add_gpu_sample, cell=cell.key, attempt=cell.attempt)
                )
            watch = watching.enter_context(EngineWatch(engine))
            load = self.generators.run(
                cell,
                plan.scenario if self.budget is None else self.budget.window(plan.scenario),
                service.dialect,
                engine.target,
                processes=plan.processes or processes_for(cell.conc, host().cores),
                salt=plan.salt,
                prompts=service.prompts,
                trace=plan.trace,
                on_record=on_record,
            )
        if sampler is not None and sampler.lost is not None:
            self.observer.note(
                f"{cell.key}: NVML stopped answering ({sampler.lost}); power and clocks are not complete"
            )
        failure = EngineError(f"cell {cell.key}: {load.gave_up}") if load.gave_up else None
        died = False
        try:
            _check(engine, patience_s=DYING_S if load.gave_up and plan.restarts else 0.0)
        except EngineError as error:
            failure, died = error, True
        point = make_point(cell, plan, shared, variant, service, load, watch.seen(), sampler.samples if sampler else ())
        if died:
            point = validity.worsen(point, "engine_died", "invalid")
        duration = time.perf_counter() - started
        point = replace(point, started_at=started_at.isoformat(timespec="seconds"), duration_s=duration)
        return point, failure, died


def _key(point: SweepPoint) -> str:
    """Of the cell that a row is of."""
    return Cell(point.precision, point.conc, point.repeat, point.rate_rps).key


def _check(engine: Engine, patience_s: float) -> None:
    """Raise the engine's own last words if it died; with patience, because it refuses requests before it is gone."""
    deadline = time.monotonic() + patience_s
    engine.check()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        engine.check()


def make_point(
    cell: Cell,
    plan: Plan,
    shared: SweepPoint,
    variant: Variant,
    service: Service,
    load: LoadResult,
    seen: Seen,
    gpu_samples: Sequence[GpuSample] = (),
) -> SweepPoint:
    """The row of a cell: metrics, memory, counters, power, price and verdict put together."""
    info, scenario = service.engine.info, plan.scenario
    found = metrics.summarise(load.records, load.open_ns, load.close_ns, scenario.slo)
    found |= _power(found, load, gpu_samples)
    ours = counters.counted(load.records)
    gap = counters.counter_gap(seen.generation_tokens, ours.generation_tokens, ours.generation_allowance)
    prompt_gap = counters.counter_gap(seen.prompt_tokens, ours.prompt_tokens, ours.prompt_allowance)
    parts = (info.weights_gib, info.kv_cache_gib, seen.memory_gib)
    other = seen.memory_gib - info.weights_gib - info.kv_cache_gib if None not in parts else None  # type: ignore[operator]
    point = replace(
        shared,
        conc=cell.conc,
        rate_rps=cell.rate_rps,
        arrivals=scenario.arrivals,
        attempt=cell.attempt,
        vram_gib=seen.memory_gib,
        memory_kind=info.device,
        weights_gib=info.weights_gib,
        kv_cache_gib=info.kv_cache_gib,
        kv_cache_tokens=info.kv_cache_tokens,
        other_gib=other if other is not None and other >= 0 else None,
        usd_per_hour=scenario.usd_per_hour * variant.cards,
        utilisation=scenario.utilisation,
        running_peak=seen.running_peak,
        waiting_peak=seen.waiting_peak,
        kv_usage_peak=seen.kv_usage_peak,
        preemptions=seen.preemptions,
        prefix_hit_share=seen.prefix_hit_share,
        counter_gap=gap,
        send_lag_p99_ms=validity.send_lag_p99_ms(load.records),
        loop_lag_p99_ms=metrics.percentile(load.lags_ms, 99),
        coalesced_share=validity.coalesced_share(load.records),
        clock_step_ms=load.clock_step_ms,
        client_processes=load.processes,
        clock_offset_ms=max((clock.offset_ns / 1e6 for clock in load.clocks), key=abs, default=None),
        clock_offset_error_ms=max((clock.error_ns / 1e6 for clock in load.clocks), default=None),
        kernel=info.kernel,
        engine=info.engine,
        engine_version=info.engine_version,
        gpu=info.gpu,
        source=info.source,
        scenario=scenario.name,
        engine_args=written(variant.engine_args),
        **found,
    )
    verdict, reasons = validity.judge(
        load.records,
        point,
        validity.Conditions(
            gave_up=load.gave_up,
            # The ceiling was measured on this machine, and tells nothing of generators on others.
            ceiling_chunks_s=plan.ceiling.chunks_s if plan.ceiling and not load.clocks else None,
            counters=counters.disagreement(gap, prompt_gap),
            quantized=variant.quantized,
            exact_lengths=_exact_lengths(service),
            # Texts of a dataset, turns of a conversation and a shared prefix may well begin alike.
            new_prompts=not scenario.shared_prefix and scenario.turns == 1 and scenario.dataset is None,
            precision=scenario.precision,
        ),
    )
    return replace(point, verdict=verdict, verdict_reasons=reasons, usd_per_1m_tokens=price(point)[0])


def _exact_lengths(service: Service) -> bool:
    """Whether prompts went as token ids and the server was told how many tokens to answer."""
    as_ids = service.prompts is None or all(prompt.ids is not None for prompt in service.prompts.items)
    return as_ids and bool(service.dialect.vocabulary) and service.dialect.vllm_extras


def _power(found: Mapping[str, Any], load: LoadResult, samples: Sequence[GpuSample]) -> dict[str, Any]:
    if load.open_ns is None or load.close_ns is None:
        return {}
    tok_s, window_s = found.get("tok_s"), found.get("window_s")
    return power.summarise_gpu(samples, load.open_ns, load.close_ns, tok_s * window_s if tok_s and window_s else None)
