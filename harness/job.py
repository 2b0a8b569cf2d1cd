"""`bench sweep` from what the user typed to a finished run directory.

    names -> models -> checkpoints (quantized by a subprocess where missing) -> sessions -> rows

All input is checked before anything is started, so that a typing mistake costs a second and not a quarter of an hour.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from harness import checkpoints, models
from harness.engines import Engine, ServeSpec, endpoint, environment, vllm
from harness.errors import InputError
from harness.load.dataset import Prompts
from harness.load.dialect import of_model, probe, tokenizer
from harness.load.schedule import Arrival, mean_rate, read_trace
from harness.load.selftest import read_ceiling
from harness.records import Scenario, SweepPoint
from harness.redact import refuse_keys, without_keys
from harness.rundir import RunDirectory, describe_machine, remembered, run_name, without_places
from harness.scenario import context_served, read_prompts
from harness.search import Search
from harness.sweep import Observer, OpenEngine, Plan, Service, Variant, plan_sessions, run_sweep


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """What the user asked for, parsed but not yet looked at."""

    scenario: Scenario
    concurrencies: tuple[int, ...]
    model: str = "demo"
    precisions: tuple[str, ...] = ("bf16", "awq")
    repeats: int = 1
    out: Path | None = None
    endpoint: str | None = None
    engine_python: Path | None = None
    calibration: Path | None = None
    port: int | None = None
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    engine_args: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    """Requests a second of open loops; then there are no concurrencies."""
    client_processes: int | None = None
    search: Search | None = None
    """Find how many users the service level carries; `concurrencies` are where it begins."""
    engine: Literal["vllm", "simulated"] = "vllm"
    """simulated: nothing is started, every cell is predicted for the card `gpu` (harness/predict)."""
    gpu: str | None = None
    profile: Path | None = None
    """What `bench calibrate` found of that card."""
    assume: str | None = None
    """Text of a file of assumptions, which the run then carries for its reports."""


def sweep(request: SweepRequest, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Run the sweep; returns the run directory. Raises KneebenchError; finished rows stay on disk."""
    return _run(_with_rates(_without_keys(request)), observer, argv, None)


def resume(path: Path, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Carry on with a sweep that was interrupted, from its directory alone; returns the run directory."""
    try:
        request: SweepRequest = TypeAdapter(SweepRequest).validate_python(remembered(path))
    except ValidationError as error:
        raise InputError(
            f"--resume {path}: what it remembers does not fit this version of kneebench ({error.error_count()} faults)",
            remedy="finish it with the version that began it (environment.json names it), or run the sweep anew",
        ) from error
    return _run(request, observer, argv, path)


def _without_keys(request: SweepRequest) -> SweepRequest:
    """Raises InputError for a key in what is typed: it would be recorded, and command lines show in `ps` besides."""
    scenario = request.scenario
    typed: dict[str, Sequence[object]] = {
        "--model": [request.model],
        "--precisions": request.precisions,
        "--out": [request.out],
        "--endpoint": [request.endpoint],
        "--engine-python": [request.engine_python],
        "--calibration": [request.calibration],
        "--engine-arg": [" ".join(request.engine_args), *request.engine_args],
        "the scenario's name, trace or dataset": [scenario.name, scenario.trace, scenario.dataset],
    }
    refuse_keys(typed, request.engine_args)
    return replace(request, scenario=replace(scenario, description=without_keys(scenario.description)))


def _with_rates(request: SweepRequest) -> SweepRequest:
    """Check that the load fits the scenario's arrivals; a trace comes at its own rate unless another is asked for."""
    arrivals = request.scenario.arrivals
    if request.search and (arrivals != "closed" or request.repeats > 1):
        what = f"arrivals = {arrivals}" if arrivals != "closed" else f"--repeats {request.repeats}"
        raise InputError(
            f"--until with {what}: it looks for a number of users, in one server session of each precision",
            allowed="a closed loop, one repeat",
            remedy="measure the loads that it found again: --conc ... --repeats 3",
        )
    if arrivals == "closed":
        if request.rates:
            raise InputError(
                "--rate with a closed loop, whose users ask when they are answered",
                allowed="--rate with arrivals = constant, poisson, gamma or trace",
                remedy="add --arrivals poisson, or say how many users: --conc",
            )
        return request
    if arrivals == "trace" and not request.rates:
        rate = round(mean_rate(read_arrivals(request.scenario)), 6)
        return replace(request, rates=(rate,), concurrencies=())
    if not request.rates:
        raise InputError(
            f"arrivals = {arrivals!r} without a rate",
            allowed="requests a second, one cell each",
            remedy="add --rate 0.5,1,2,4",
        )
    return replace(request, concurrencies=())


def read_arrivals(scenario: Scenario) -> tuple[Arrival, ...]:
    """Those of the scenario's trace; none where it replays none."""
    return read_trace(Path(scenario.trace)) if scenario.trace else ()


def _run(request: SweepRequest, observer: Observer, argv: Sequence[str], resumed: Path | None) -> Path:
    if request.engine == "simulated":
        from harness.predict import run  # which builds on what stands here

        return run.sweep(request, observer, argv, resumed)
    do = _sweep_endpoint if request.endpoint else _sweep_vllm
    return do(request, observer, argv, resumed)


def _sweep_vllm(request: SweepRequest, observer: Observer, argv: Sequence[str], resumed: Path | None) -> Path:
    began_s = time.monotonic()
    model = models.resolve(request.model)
    wanted = checkpoints.wanted(request.precisions)
    if model.random_weights and (request.scenario.api == "chat" or request.scenario.dataset):
        raise InputError(
            f"--model {request.model} with text prompts: a shape has no tokenizer and no chat template",
            allowed="--api completions, where prompts are token ids",
        )
    if request.port is not None:
        vllm.checked_port(request.port)
    env = environment.find(request.engine_python)
    for name, given in wanted.items():
        if given is None and name == "bf16":
            _check_fits(model, request)
        elif given is not None:
            _check_fits(given, request)
    if any(given is None and name != "bf16" for name, given in wanted.items()):
        checkpoints.check_quantizer()

    with run_directory(request, model.name, resumed) as directory:
        directory.remember(TypeAdapter(SweepRequest).dump_python(request, mode="json"))
        served: dict[str, models.Model] = {}
        variants = []
        for name, given in wanted.items():
            checkpoint, digest = checkpoints.checkpoint(name, given, model, request.calibration, observer.status)
            _check_fits(checkpoint, request)
            served[name] = checkpoint
            variants.append(
                Variant(name, digest, checkpoints.is_quantized(checkpoint), checkpoints.weight_bytes(checkpoint))
            )
        _check_unchanged(directory, request, variants, env.vllm_version)
        describe(directory, request, model.name, f"vllm {env.vllm_version} ({env.kind})", variants)
        directory.describe_environment(describe_machine("vllm", env.vllm_version, argv))
        directory.clean_logs()

        @contextmanager
        def open_engine(variant: Variant, repeat: int) -> Iterator[Service]:
            checkpoint = served[variant.precision]
            spec = _spec(request, variant.precision, checkpoint)
            log = directory.fresh(f"engine-{variant.precision}-r{repeat}", ".log")
            with vllm.serve(spec, env, log, observer.status) as engine:
                directory.describe_engine(log, engine.info)
                dialect = of_model(checkpoint, engine.target, chat=request.scenario.api == "chat")
                yield Service(engine, dialect, _prompts(request.scenario, engine))

        template = SweepPoint(directory.path.name, "", 0, model=model.name, scenario=request.scenario.name)
        _run_cells(request, variants, directory, template, open_engine, observer, began_s)
        return directory.path


def _sweep_endpoint(request: SweepRequest, observer: Observer, argv: Sequence[str], resumed: Path | None) -> Path:
    began_s = time.monotonic()
    if len(request.precisions) != 1:
        raise InputError(
            f"--precisions {','.join(request.precisions)} with --endpoint",
            allowed="one name: an endpoint serves what it serves, and the name only labels its rows",
            remedy="run one sweep for each endpoint",
        )
    assert request.endpoint is not None
    with endpoint.attach(request.endpoint, request.model) as engine:
        dialect = probe(engine.target, chat=request.scenario.api == "chat")
        prompts = _prompts(request.scenario, engine)
        with run_directory(request, request.model, resumed) as directory:
            info = engine.info
            directory.remember(TypeAdapter(SweepRequest).dump_python(request, mode="json"))
            variants = [Variant(request.precisions[0])]
            _check_unchanged(directory, request, variants, info.engine_version)
            describe(directory, request, request.model, "endpoint", variants)
            directory.describe_environment(describe_machine(info.engine, info.engine_version, argv))
            template = SweepPoint(directory.path.name, "", 0, model=request.model, source="endpoint")
            open_engine = _always(Service(engine, dialect, prompts))
            _run_cells(request, variants, directory, template, open_engine, observer, began_s)
            return directory.path


def _run_cells(
    request: SweepRequest,
    variants: Sequence[Variant],
    directory: RunDirectory,
    template: SweepPoint,
    open_engine: OpenEngine,
    observer: Observer,
    began_s: float,
) -> None:
    """Measure every cell that has no row yet."""
    planned = () if request.search else request.concurrencies
    sessions = plan_sessions(variants, planned, request.repeats, request.rates)
    plan = Plan(
        request.scenario,
        processes=request.client_processes,
        salt=secrets.token_hex(4),
        trace=read_arrivals(request.scenario),
        ceiling=read_ceiling(),
        restarts=request.endpoint is None,
        search=request.search,
    )
    spent_s = sum(row.duration_s or 0.0 for row in directory.done)  # by earlier starts
    run_sweep(sessions, plan, directory, template, open_engine, observer, began_s=began_s - spent_s)
    directory.finish()


def _check_unchanged(
    directory: RunDirectory, request: SweepRequest, variants: Sequence[Variant], engine_version: str | None
) -> None:
    """A run that is resumed must go on with what it began with, or its rows could not be compared."""
    begun = directory.described()
    for name, digest in _digests(request.scenario).items():
        if begun.get(name, digest) != digest:
            raise InputError(
                f"--resume: the file of the scenario's {name.partition('_')[0]} has changed since the run was begun",
                remedy="restore it, or run the sweep anew",
            )
    for variant in variants if begun else ():
        if begun.get("checkpoint_sha256", {}).get(variant.precision) != variant.checkpoint_sha256:
            raise InputError(
                f"--resume: the {variant.precision} checkpoint is not the one that the run was begun with",
                remedy="restore it, or run the sweep anew",
            )
    for row in directory.done:
        if row.engine_version != engine_version:
            raise InputError(
                f"--resume: the run was begun with engine version {row.engine_version}, this is {engine_version}",
                remedy="install that version again, or run the sweep anew",
            )


def _prompts(scenario: Scenario, engine: Engine) -> Prompts | None:
    return read_prompts(scenario, tokenizer(engine.target) if scenario.dataset else None)


def _always(service: Service) -> OpenEngine:
    """An endpoint is there before and after each session."""

    @contextmanager
    def already_open(variant: Variant, repeat: int) -> Iterator[Service]:
        yield service

    return already_open


def run_directory(request: SweepRequest, model: str, resumed: Path | None) -> AbstractContextManager[RunDirectory]:
    """The directory of a new run, or that of the one that is resumed."""
    if resumed is not None:
        return RunDirectory(resumed, resume=True)
    name = run_name(model, request.scenario.name, datetime.now())
    return RunDirectory(request.out or Path("results") / name)


def _digests(scenario: Scenario) -> dict[str, str]:
    """trace_sha256 and dataset_sha256, as far as the scenario has such files."""
    files = {"trace": scenario.trace, "dataset": scenario.dataset}
    found = {}
    for name, path in files.items():
        if path is not None:
            try:
                found[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"{name} {path}: cannot be read ({error.strerror})", remedy="restore it") from error
    return found


def describe(
    directory: RunDirectory,
    request: SweepRequest,
    model: str,
    engine: str,
    variants: Sequence[Variant],
    **more: object,
) -> None:
    """Write run.toml, with `more` in its table [run], and keep the assumptions."""
    run = {
        "run_id": directory.path.name,
        "model": model,
        "precisions": [item.partition("=")[0] for item in request.precisions],
        "concurrencies": [] if request.search else sorted(set(request.concurrencies)),
        "rates_rps": sorted(set(request.rates)),
        "repeats": request.repeats,
        "engine": engine,
        "endpoint": without_places(request.endpoint) if request.endpoint else None,
        "max_model_len": context_served(request.scenario),
        "max_num_seqs": request.max_num_seqs,
        "gpu_memory_utilization": request.gpu_memory_utilization,
        "kv_cache_gib": request.kv_cache_gib,
        "engine_args": list(request.engine_args),
        "client_processes": request.client_processes,
        **_described(request.search),
        "checkpoint_sha256": {item.precision: item.checkpoint_sha256 for item in variants if item.checkpoint_sha256}
        or None,
        "checkpoint_bytes": {item.precision: item.checkpoint_bytes for item in variants if item.checkpoint_bytes}
        or None,
        **_digests(request.scenario),
        **more,
    }
    scenario = asdict(request.scenario)
    for name in ("trace", "dataset"):
        if scenario[name]:  # which file it was, and not where it lies
            scenario[name] = Path(scenario[name]).name
    directory.describe({"run": run, "scenario": scenario})
    if request.assume is not None:
        directory.assume(request.assume)


def _described(search: Search | None) -> dict[str, object]:
    """A search as run.toml tells it."""
    if search is None:
        return {}
    return {
        "until": search.slo.text,
        "within": search.precision,
        "first": list(search.first),
        "max_conc": search.most,
        "max_cells": search.max_cells,
        "max_minutes": search.max_minutes,
    }


# --- precisions -------------------------------------------------------------------------------------------------------


def _check_fits(model: models.Model, request: SweepRequest) -> None:
    checkpoints.check_fits(model, request.gpu_memory_utilization, context_served(request.scenario))


# --- serving ----------------------------------------------------------------------------------------------------------


def _spec(request: SweepRequest, precision: str, model: models.Model) -> ServeSpec:
    return ServeSpec(
        model=model.path,
        precision=precision,
        max_model_len=context_served(request.scenario),
        max_num_seqs=request.max_num_seqs,
        dummy_weights=model.random_weights,
        kv_cache_gib=request.kv_cache_gib,
        gpu_memory_utilization=request.gpu_memory_utilization,
        port=request.port,
        extra_args=request.engine_args,
    )
