"""A predicted run: `bench predict` and `bench sweep --engine simulated` from typed names to a run directory.

    names ─► card, shape ─► served (precisions) ─► cells in virtual time ─► rows, each with its error band

The directory is like a measured one (the same tables, the same papers), and every row says source = predicted. The ends
_lo and _hi of its figures are the band of validation: where a measurement of the same would lie in 95 of 100 cases.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from harness import job
from harness.analysis.cost import price
from harness.budget import Budget
from harness.engines import ServeSpec, arguments, plugin
from harness.errors import InputError, ModelError
from harness.job import SweepRequest
from harness.models import known_shapes
from harness.predict import calibrate, coefficients
from harness.predict import cell as cells
from harness.predict import profile as profiles
from harness.predict.bands import Bands, Basis, Figure, LoadClass, bands
from harness.predict.cards import Card, card
from harness.predict.cell import Served
from harness.predict.profile import Profile
from harness.predict.roofline import AS_PREDICTED
from harness.predict.shapes import shape
from harness.predict.subject import Server
from harness.prices import load_prices, offer
from harness.progress import Progress
from harness.records import Cell, Scenario, SweepPoint, Verdict
from harness.report.run import load_run
from harness.report.terminal import show_run
from harness.rundir import RunDirectory, describe_machine
from harness.scenario import context_served
from harness.sweep import Observer, Session, Variant, plan_sessions
from harness.variants import precision_of

ENGINE = "vllm (predicted)"
NO_BF16 = "{card} has no BF16: its 16-bit precision is FP16"

_BANDED: tuple[tuple[str, Figure], ...] = (
    ("tok_s", "tok_s"),
    ("p95_ms", "tpot_ms"),  # an answer is its TPOT, many times over
    ("p99_ms", "tpot_ms"),
    ("ttft_p95_ms", "ttft_ms"),
    ("tpot_p95_ms", "tpot_ms"),
)
"""Column, and the figure whose band it has."""
_TOLD: tuple[Figure, ...] = ("tok_s", "ttft_ms", "tpot_ms")
Ends = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What all cells of a predicted run have in common."""

    request: SweepRequest
    card: Card
    served: dict[str, Served]
    """By the name of its variant, in the order in which they are predicted."""
    variants: tuple[Variant, ...]
    """Those served."""
    basis: Basis
    bands: Bands
    profile: Profile | None = None
    unfit: tuple[str, ...] = ()
    """Why variants are left out that the card cannot hold."""


def planned(request: SweepRequest) -> Plan:
    """Check what was typed and put together what is served. Raises KneebenchError before anything is written."""
    if request.repeats > 1:
        raise InputError(
            f"--repeats {request.repeats} of a prediction, which is the same each time",
            allowed="one; its error band stands in place of the spread of repeats",
        )
    cells.check_scenario(request.scenario)
    profile = None if request.profile is None else profiles.read(request.profile)
    found, model, known = _card(request.gpu, profile), shape(request.model), bands()
    names = [without_bf16(name, found) for name in request.precisions]
    served: dict[str, Served] = {}
    unfit: list[ModelError] = []
    variants = job.varied(request, [Variant(name) for name in dict.fromkeys(names)])
    for variant in variants:
        limits = _limits(request, variant)
        try:
            served[variant.precision] = cells.served(
                found,
                model.architecture,
                precision_of(variant.precision),
                replace(request.scenario, max_model_len=limits.max_model_len),
                coefficients.fitted(),
                factors=AS_PREDICTED if profile is None else profile.estimate.factors,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                gpu_memory_utilization=limits.gpu_memory_utilization,
                kv_cache_gib=request.kv_cache_gib,
            )
        except ModelError as error:
            unfit.append(error)
    if not served:
        raise unfit[0]
    basis = "calibrated" if profile else known.basis(found.id)
    kept = tuple(variant for variant in variants if variant.precision in served)
    return Plan(request, found, served, kept, basis, known, profile, tuple(dict.fromkeys(map(str, unfit))))


def _limits(request: SweepRequest, variant: Variant) -> ServeSpec:
    """What its server would be started with. Raises InputError for an argument that virtual time does not know."""
    plain = ServeSpec(Path(), "", max_model_len=context_served(request.scenario))
    limits = arguments.placed(plain, variant.engine_args)
    unknown = list(limits.extra_args)
    unknown += ["--kv-cache-dtype"] if limits.kv_cache_dtype is not None else []
    unknown += ["--tensor-parallel-size or --pipeline-parallel-size"] if limits.cards > 1 else []
    varied = [flag for flag, _ in request.vary]
    if request.kv_cache_gib is not None and "gpu_memory_utilization" in varied:
        unknown.append("gpu_memory_utilization beside --kv-cache-gib, which says how large the cache is")
    if unknown:
        raise InputError(
            f"{unknown[0]} cannot be predicted: no published row says what it does",
            allowed="max_num_seqs, max_num_batched_tokens, gpu_memory_utilization and max_model_len",
            remedy="measure it on the card: bench sweep without --engine simulated",
        )
    return limits


def _card(gpu: str | None, profile: Profile | None) -> Card:
    """The card that is asked for, or the profile's."""
    if profile is None:
        if gpu is None:
            raise InputError(
                "a prediction without a card",
                allowed="--gpu with a card of `bench gpus --list` or a .toml file, or --profile",
                remedy="add --gpu l4",
            )
        return card(gpu)
    if gpu is not None and card(gpu).id != profile.card.id:
        raise InputError(
            f"--gpu {gpu} with a profile of {profile.card.name}", allowed="the card that the profile was made on"
        )
    return profile.card


def without_bf16(precision: str, found: Card) -> str:
    """fp16 for bf16 on a card that has none. Raises InputError for a user's own checkpoint and for our kernels."""
    if "=" in precision:
        raise InputError(
            f"--precisions {precision}: a checkpoint of your own cannot be predicted", allowed="a method's name"
        )
    if precision.endswith(f"@{plugin.NAME}"):
        raise InputError(
            f"--precisions {precision}: our own kernels are measured, not predicted: no published row runs them",
            allowed="a method's name",
            remedy="measure them on the card: bench sweep without --engine simulated",
        )
    return "fp16" if precision == "bf16" and found.bf16_tflops is None else precision


def priced(scenario: Scenario, gpu: str | None) -> Scenario:
    """The scenario with the card's cheapest rent of the catalogue (on demand, else a third party's) as its price."""
    rent = None if gpu is None else offer(card(gpu).id, load_prices())
    return scenario if rent is None else replace(scenario, usd_per_hour=rent.usd_per_hour)


def show(console: Console, request: SweepRequest) -> None:
    """Predict into a directory that is gone afterwards, and print what a sweep ends with."""
    with TemporaryDirectory(prefix="kneebench-") as folder:
        where = Path(folder) / "predicted"
        with Progress(console) as progress:
            sweep(replace(request, out=where), progress)
        show_run(console, load_run(where))


def sweep(request: SweepRequest, observer: Observer, argv: Sequence[str] = (), resumed: Path | None = None) -> Path:
    """Predict every cell into a run directory; returns it."""
    began_s = time.monotonic()
    plan = planned(request)
    model = _as_measured(request.model)
    if "bf16" in request.precisions and plan.card.bf16_tflops is None:
        observer.note(NO_BF16.format(card=plan.card.name))
    for reason in plan.unfit:
        observer.note(reason)
    with job.run_directory(request, model, resumed) as directory:
        directory.remember(TypeAdapter(SweepRequest).dump_python(request, mode="json"))
        job.describe(directory, request, model, ENGINE, plan.variants, predicted=_told(plan))
        directory.describe_environment(describe_machine(ENGINE, None, argv))
        template = SweepPoint(
            directory.path.name, "", 0, model=model, scenario=request.scenario.name, source="predicted"
        )
        sessions = plan_sessions(plan.variants, () if request.search else request.concurrencies, 1, request.rates)
        total = request.search.max_cells if request.search else sum(len(session.cells) for session in sessions)
        points: list[SweepPoint] = []
        for number, session in enumerate(sessions):
            budget = None
            if request.search is not None:
                budget = Budget.share(request.search, len(points), began_s, len(sessions) - number)
            shared = replace(template, engine_args=arguments.written(session.variant.engine_args))
            for cell in _cells(session, budget, directory, points, plan, observer):
                observer.cell_begins(cell, len(directory.done) + len(points) + 1, total)
                point = _predicted(cell, plan, shared, directory)
                directory.add_point(point)
                points.append(point)
                observer.cell_ended(point)
        directory.finish()
        return directory.path


def _cells(
    session: Session,
    budget: Budget | None,
    directory: RunDirectory,
    points: Sequence[SweepPoint],
    plan: Plan,
    observer: Observer,
) -> Iterator[Cell]:
    """The session's cells that have no row yet; of a search, whatever the rows so far ask for."""
    done = {Cell(row.precision, row.conc, row.repeat, row.rate_rps).key for row in directory.done}
    if budget is None:
        yield from (cell for cell in session.cells if cell.key not in done)
        return
    name = session.variant.precision
    while True:
        rows = [*directory.done, *points]
        own = [row for row in rows if row.precision == name]
        # Nothing here takes the time that a measurement would: the budget of minutes is not spent by windows.
        quick = replace(plan.request.scenario, min_window_s=0.0, requests=1)
        conc, said = budget.next_load(own, len(rows), quick)
        observer.note(f"{name}: {said}")
        if conc is None:
            return
        yield Cell(name, conc)


def _predicted(cell: Cell, plan: Plan, template: SweepPoint, directory: RunDirectory) -> SweepPoint:
    """One row; the cell's requests go to the directory."""
    scenario, what = plan.request.scenario, plan.served[cell.precision]
    load, simulation = cells.predict(scenario, cell, what, job.read_arrivals(scenario))
    for record in cells.records(cell, load, simulation):
        directory.add_request(record)
    found = cells.figures(scenario, load, simulation)
    point = row(cell, plan.request, what, template, found)
    if plan.profile is None:
        return banded(point, plan.basis, plan.bands)
    return with_ends(point, _calibrated(cell, plan.profile, what, scenario), unvalidated=False)


def _calibrated(cell: Cell, profile: Profile, what: Served, scenario: Scenario) -> dict[Figure, Ends]:
    """Factors on a prediction that a profile leaves open."""
    limits = what.limits
    server = Server(
        what.card,
        what.shape,
        scenario,
        coefficients.fitted(),
        {what.precision: limits.kv_blocks},
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
    )
    found = calibrate.predicted(server, profile.estimate, replace(cell, precision=what.precision)).figures
    names: dict[Figure, str] = {"tok_s": "tok_s", "ttft_ms": "ttft_p50_ms", "tpot_ms": "tpot_p50_ms"}
    chosen = {figure: found[name] for figure, name in names.items() if name in found}
    return {figure: (one.lo / one.value, one.hi / one.value) for figure, one in chosen.items()}


def row(cell: Cell, request: SweepRequest, what: Served, template: SweepPoint, found: dict[str, Any]) -> SweepPoint:
    """The row of a cell with these figures, without its band."""
    scenario = request.scenario
    usable = what.card.memory_gib * what.gpu_memory_utilization
    point = replace(
        template,
        precision=cell.precision,
        conc=cell.conc,
        rate_rps=cell.rate_rps,
        arrivals=scenario.arrivals,
        attempt=cell.attempt,
        vram_gib=usable if request.kv_cache_gib is None else what.memory.weights_gib + what.memory.kv_gib,
        other_gib=usable - what.memory.weights_gib - what.memory.kv_gib if request.kv_cache_gib is None else None,
        engine=ENGINE,
        source="predicted",
        usd_per_hour=scenario.usd_per_hour,
        utilisation=scenario.utilisation,
        **cells.described(what),
        **found,
    )
    return replace(point, usd_per_1m_tokens=price(point)[0])


def banded(point: SweepPoint, basis: Basis, known: Bands) -> SweepPoint:
    """The row with the bands of validation; suspect where they are another architecture's."""
    load: LoadClass = "open" if point.rate_rps is not None else "one" if point.conc == 1 else "users"
    ends = {figure: known.ends(figure, load, basis) for figure in _TOLD}
    return with_ends(point, ends, unvalidated=basis == "architecture")


def with_ends(point: SweepPoint, ends: Mapping[Figure, Ends], *, unvalidated: bool) -> SweepPoint:
    """The row with the ends of its figures, and its verdict. `ends`: factors on the prediction."""
    changed: dict[str, Any] = {}
    for name, figure in _BANDED:
        value = getattr(point, name)
        if value is not None and figure in ends:
            low, high = ends[figure]
            changed |= {f"{name}_lo": value * low, f"{name}_hi": value * high}
    reasons = ["unvalidated"] if unvalidated else []
    reasons += ["preempting"] if point.preemptions else []
    verdict: Verdict = "suspect" if reasons else "valid"
    return replace(point, verdict=verdict, verdict_reasons=tuple(reasons), **changed)


def _as_measured(model: str) -> str:
    """What `bench sweep --model` would take for the same model: a known shape by its name there."""
    name = shape(model).name
    return f"shape:{name}" if name in known_shapes() and "/" not in model else name


def _told(plan: Plan) -> dict[str, Any]:
    """What run.toml says of the prediction, for the box of its papers."""
    if plan.profile is not None:
        return {"card": plan.card.id, "basis": plan.basis, "n": len(plan.profile.cells), "of_run": plan.profile.run_id}
    users = {figure: plan.bands.band(figure, "users", plan.basis) for figure in _TOLD}
    return {
        "card": plan.card.id,
        "basis": plan.basis,
        "published_points_of_the_card": plan.bands.points.get(plan.card.id, 0),
        "n": users["tok_s"].n,
    } | {f"median_error_{figure}": round(band.median_error, 3) for figure, band in users.items()}
