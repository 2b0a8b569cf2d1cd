"""`bench sweep` from what the user typed to a finished run directory.

    names -> models -> checkpoints (quantized by a subprocess where missing) -> sessions -> rows

All input is checked before anything is started, so that a typing mistake costs a second and not a quarter of an hour.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from harness import checkpoints, models
from harness.engines import Engine, ServeSpec, arguments, endpoint, environment, vllm
from harness.errors import InputError
from harness.load.dataset import Prompts
from harness.load.dialect import of_model, probe, tokenizer
from harness.load.generators import processes_for
from harness.load.schedule import Arrival, mean_rate, read_trace
from harness.load.selftest import read_ceiling
from harness.records import Scenario, SweepPoint
from harness.redact import refuse_keys, without_keys
from harness.rundir import RunDirectory, describe_machine, remembered, run_name, without_places
from harness.scenario import check_scenario, context_served, read_prompts
from harness.search import Search
from harness.sweep import (
    Observer,
    OpenEngine,
    Opener,
    Plan,
    Rows,
    Service,
    Session,
    Variant,
    on_cards,
    plan_sessions,
    run_sweep,
)
from harness.variants import Setting, Vary, name_of, precision_of, settings

if TYPE_CHECKING:
    from harness.cluster import Cluster

MOST_AWAY = 64
"""As of --client-processes."""


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
    api_key_file: Path | None = None
    """Where the endpoint's key is; None: in the environment."""
    engine_python: Path | None = None
    calibration: Path | None = None
    port: int | None = None
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    engine_args: tuple[str, ...] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    kv_cache_dtype: str | None = None
    vary: Vary = ()
    """Engine arguments that vary: each combination of their values is served in each precision."""
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
    cluster: str | None = None
    """A Ray cluster's address, or auto: sessions are spread over its nodes (harness/cluster.py). None: this machine."""
    card_types: tuple[str, ...] = ()
    """On a cluster: types of cards to measure on, each precision on each."""
    load: Literal["beside", "away"] = "beside"
    """On a cluster: generators on the engine's node, or on others, which have the resource `load`."""
    price_by_card: bool = False
    """Rows are priced by the catalogue's rent of their card type, where it has one, and not by the scenario."""
    from_file: tuple[str, ...] = ()
    """Options that were given by a file and not typed, as its keys."""


def sweep(request: SweepRequest, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Run the sweep; returns the run directory. Raises KneebenchError; finished rows stay on disk."""
    return _run(checked(request), observer, argv, None)


def checked(request: SweepRequest) -> SweepRequest:
    """The request with what follows from it filled in. Raises InputError for what does not fit together."""
    return _with_rates(_without_keys(request))


def sessions_of(request: SweepRequest) -> list[Session]:
    """The plan of a request that was checked; of its variants no more than their names is known."""
    names = [request.precisions[0]] if request.endpoint else list(checkpoints.wanted(request.precisions))
    ready = [Variant(name) for name in names]
    variants = ready if request.endpoint else varied(request, ready)
    return plan_sessions(variants, () if request.search else request.concurrencies, request.repeats, request.rates)


def recalled(path: Path) -> SweepRequest:
    """What an interrupted sweep was asked for, from its directory. Raises InputError where nothing is left to do."""
    try:
        request: SweepRequest = TypeAdapter(SweepRequest).validate_python(remembered(path))
    except ValidationError as error:
        raise InputError(
            f"--resume {path}: what it remembers does not fit this version of kneebench ({error.error_count()} faults)",
            remedy="finish it with the version that began it (environment.json names it), or run the sweep anew",
        ) from error
    return request


def resume(path: Path, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Carry on with a sweep that was interrupted, from its directory alone; returns the run directory."""
    return _run(recalled(path), observer, argv, path)


def _without_keys(request: SweepRequest) -> SweepRequest:
    """Raises InputError for a key in what is typed: it would be recorded, and command lines show in `ps` besides."""
    scenario = request.scenario
    typed: dict[str, Sequence[object]] = {
        "--model": [request.model],
        "--precisions": request.precisions,
        "--out": [request.out],
        "--endpoint": [request.endpoint],
        "--api-key-file": [request.api_key_file],
        "--engine-python": [request.engine_python],
        "--calibration": [request.calibration],
        "--engine-arg": [" ".join(request.engine_args), *request.engine_args],
        "--kv-cache-dtype": [request.kv_cache_dtype],
        "--vary": [f"{flag}={value}" for flag, values in request.vary for value in values],
        "the scenario's name, trace or dataset": [scenario.name, scenario.trace, scenario.dataset],
    }
    refuse_keys(typed, [*request.engine_args, *(f"--{flag}" for flag, _ in request.vary)])
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
    if request.cluster is not None:
        from harness.cluster import attached

        _check_clustered(request)
        with attached(request.cluster) as cluster:
            if request.endpoint is not None:
                return _sweep_endpoint(request, observer, argv, resumed, cluster)
            return _sweep_vllm(request, observer, argv, resumed, cluster)
    do = _sweep_endpoint if request.endpoint else _sweep_vllm
    return do(request, observer, argv, resumed)


def _check_clustered(request: SweepRequest) -> None:
    """Raises InputError for what one machine alone can do."""
    if request.port is not None:
        raise InputError(f"--port {request.port} with --cluster", allowed="a free port on each node")
    if request.endpoint is not None and request.load == "beside":
        raise InputError(
            "--endpoint with --cluster, where no engine is started",
            allowed="load from other nodes: --load away",
            remedy="add --load away, or leave --cluster out",
        )


def _sweep_vllm(
    request: SweepRequest,
    observer: Observer,
    argv: Sequence[str],
    resumed: Path | None,
    cluster: Cluster | None = None,
) -> Path:
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
    served_with = {setting: engine_args(request, setting) for setting in settings(request.vary)}
    if cluster is None:
        env, machine = environment.find(request.engine_python), None
    else:
        asked = varied(request, [Variant(name) for name in wanted])
        env, machine = cluster.survey(asked, request.engine_python, argv)
    _check_varied(request, env)
    for name, given in wanted.items():
        for told in served_with.values():
            if given is not None or name == "bf16":
                checkpoints.check_served(given or model, spec(request, name, given or model, told))
    if any(given is None and name != "bf16" for name, given in wanted.items()):
        checkpoints.check_quantizer()

    with run_directory(request, model.name, resumed) as directory:
        directory.remember(TypeAdapter(SweepRequest).dump_python(request, mode="json"))
        served: dict[str, models.Model] = {}
        ready: dict[str, Variant] = {}
        for name, given in wanted.items():
            checkpoint, digest = checkpoints.checkpoint(name, given, model, request.calibration, observer.status)
            for told in served_with.values():
                checkpoints.check_served(checkpoint, spec(request, name, checkpoint, told))
            served[name] = checkpoint
            ready[name] = Variant(
                name, digest, checkpoints.is_quantized(checkpoint), checkpoints.weight_bytes(checkpoint)
            )
        variants = varied(request, list(ready.values()))
        _check_unchanged(directory, request, variants, env.vllm_version)
        describe(directory, request, model.name, f"vllm {env.vllm_version} ({env.kind})", variants)
        directory.describe_environment(machine or describe_machine("vllm", env.vllm_version, argv))
        directory.clean_logs()
        opener = functools.partial(_open_vllm, request, served, None if cluster else env)
        template = SweepPoint(directory.path.name, "", 0, model=model.name, scenario=request.scenario.name)
        if cluster is not None:
            cluster.check_files(variants, _shared_files(request, served))
        _run_cells(request, variants, directory, template, opener, observer, began_s, cluster)
        return directory.path


def _open_vllm(
    request: SweepRequest,
    served: Mapping[str, models.Model],
    found: environment.EngineEnv | None,
    rows: Rows,
    on_status: Callable[[str], None],
) -> OpenEngine:
    """An Opener, once it knows what is served: starts vLLM on the machine that it is called on. `found` None: the
    environment is looked for there."""
    env = found or environment.find(request.engine_python)

    @contextmanager
    def open_engine(variant: Variant, repeat: int) -> Iterator[Service]:
        name = precision_of(variant.precision)
        checkpoint = served[name]
        log = rows.fresh(f"engine-{variant.precision}-r{repeat}", ".log")
        server = replace(spec(request, name, checkpoint, variant.engine_args), host=rows.host)
        with vllm.serve(server, env, log, on_status) as engine:
            rows.describe_engine(log, engine.info)
            dialect = of_model(checkpoint, engine.target, chat=request.scenario.api == "chat")
            yield Service(engine, dialect, _prompts(request.scenario, engine))

    return open_engine


def generators_away(request: SweepRequest) -> int:
    """How many generators on other nodes drive each engine: as asked for, else one for each 512 users. 0: none."""
    if request.load == "beside":
        return 0
    users = [*request.concurrencies, request.search.most if request.search else 1]
    return request.client_processes or processes_for(max(users), cores=MOST_AWAY)


def _shared_files(request: SweepRequest, served: Mapping[str, models.Model]) -> dict[Path, str | None]:
    """What every node has to see as it is here: path -> digest; None: a shape, which has no weights."""
    files = {model.path: models.checkpoint_sha256(model.path) for model in served.values() if model.is_local}
    if request.scenario.dataset is not None:
        files[Path(request.scenario.dataset)] = _digests(request.scenario)["dataset_sha256"]
    return files


def _sweep_endpoint(
    request: SweepRequest,
    observer: Observer,
    argv: Sequence[str],
    resumed: Path | None,
    cluster: Cluster | None = None,
) -> Path:
    began_s = time.monotonic()
    if len(request.precisions) != 1:
        raise InputError(
            f"--precisions {','.join(request.precisions)} with --endpoint",
            allowed="one name: an endpoint serves what it serves, and the name only labels its rows",
            remedy="run one sweep for each endpoint",
        )
    assert request.endpoint is not None
    if told := [*engine_args(replace(request, scenario=replace(request.scenario, max_model_len=None))), *request.vary]:
        raise InputError(
            f"--endpoint together with {told[0] if isinstance(told[0], str) else '--vary'}",
            allowed="arguments for an engine that kneebench starts; an endpoint runs already, with its own",
        )
    with endpoint.attach(request.endpoint, request.model, request.api_key_file, observer.note) as engine:
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
            opener = _always(Service(engine, dialect, prompts))
            _run_cells(request, variants, directory, template, opener, observer, began_s, cluster)
            return directory.path


def _run_cells(
    request: SweepRequest,
    variants: Sequence[Variant],
    directory: RunDirectory,
    template: SweepPoint,
    opener: Opener,
    observer: Observer,
    began_s: float,
    cluster: Cluster | None = None,
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
    away = generators_away(request)
    if cluster is not None and request.endpoint is None:
        by_card = request.price_by_card
        cluster.run_sweep(sessions, plan, directory, template, opener, observer, price_by_card=by_card, away=away)
    else:
        open_engine = opener(directory, observer.status)
        hired = cluster.hired(away) if cluster else None
        run_sweep(sessions, plan, directory, template, open_engine, observer, began_s - spent_s, hired)
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
    told = {variant.precision: arguments.written(variant.engine_args) for variant in variants}
    for row in directory.done:
        if row.engine_args != told.get(row.precision, row.engine_args):
            raise InputError(
                f"--resume: {row.precision} was served with {row.engine_args or 'no engine arguments'}, "
                f"and now would be with {told[row.precision] or 'none'}",
                remedy="run the sweep anew",
            )
        if row.engine_version != engine_version:
            raise InputError(
                f"--resume: the run was begun with engine version {row.engine_version}, this is {engine_version}",
                remedy="install that version again, or run the sweep anew",
            )


def _prompts(scenario: Scenario, engine: Engine) -> Prompts | None:
    return read_prompts(scenario, tokenizer(engine.target) if scenario.dataset else None)


def _always(service: Service) -> Opener:
    """An endpoint is there before and after each session."""

    @contextmanager
    def already_open(variant: Variant, repeat: int) -> Iterator[Service]:
        yield service

    return lambda rows, on_status: already_open


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
        "precisions": [item.precision for item in variants],
        "concurrencies": [] if request.search else sorted(set(request.concurrencies)),
        "rates_rps": sorted(set(request.rates)),
        "repeats": request.repeats,
        "engine": engine,
        "endpoint": without_places(request.endpoint) if request.endpoint else None,
        "max_model_len": context_served(request.scenario),
        "max_num_seqs": request.max_num_seqs,
        "gpu_memory_utilization": request.gpu_memory_utilization,
        "kv_cache_gib": request.kv_cache_gib,
        "tensor_parallel": request.tensor_parallel if request.tensor_parallel > 1 else None,
        "pipeline_parallel": request.pipeline_parallel if request.pipeline_parallel > 1 else None,
        "kv_cache_dtype": request.kv_cache_dtype,
        "engine_args": list(request.engine_args),
        "vary": {flag: list(values) for flag, values in request.vary} or None,
        "client_processes": request.client_processes,
        "card_types": list(request.card_types) or None,
        "load": "away" if request.load == "away" else None,
        "from_file": list(request.from_file) or None,
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


# --- serving ----------------------------------------------------------------------------------------------------------


def engine_args(request: SweepRequest, setting: Setting = ()) -> tuple[str, ...]:
    """What an engine of this sweep is told beyond what kneebench tells every engine, by name; see arguments.told.

    Raises InputError for a flag that is kneebench's own, said twice, or has a value that it cannot have.
    """
    default = SweepRequest(request.scenario, ())
    typed: list[tuple[str, object, object]] = [
        ("--max-num-seqs", request.max_num_seqs, default.max_num_seqs),
        ("--gpu-memory-utilization", request.gpu_memory_utilization, default.gpu_memory_utilization),
        ("--tensor-parallel-size", request.tensor_parallel, default.tensor_parallel),
        ("--pipeline-parallel-size", request.pipeline_parallel, default.pipeline_parallel),
        ("--kv-cache-dtype", request.kv_cache_dtype, default.kv_cache_dtype),
        ("--max-model-len", request.scenario.max_model_len, None),
    ]
    told = arguments.told(
        ("an option of its own", [(flag, (str(value),)) for flag, value, usual in typed if value != usual]),
        ("--engine-arg", arguments.read(request.engine_args)),
        ("--vary", arguments.varied(setting)),
    )
    context = arguments.placed(ServeSpec(Path(), "", max_model_len=0), told).max_model_len
    if context:
        check_scenario(replace(request.scenario, max_model_len=context), request.scenario.name)
    return told


def varied(request: SweepRequest, ready: Sequence[Variant]) -> list[Variant]:
    """Each setting of --vary in each precision, one setting after the other: what is compared takes turns (ABBA).

    Without --vary: the precisions, with what their engines are told.
    """
    variants = []
    for setting in settings(request.vary):
        told = engine_args(request, setting)
        cards = arguments.placed(ServeSpec(Path(), ""), told).cards
        variants += [
            replace(one, precision=name_of(setting, one.precision), engine_args=told, cards=cards) for one in ready
        ]
    return on_cards(variants, request.card_types)


def spec(request: SweepRequest, precision: str, model: models.Model, told: Sequence[str]) -> ServeSpec:
    """The server of a precision (without its setting), told what `engine_args` says."""
    plain = ServeSpec(
        model=model.path,
        precision=precision,
        max_model_len=context_served(request.scenario),
        dummy_weights=model.random_weights,
        kv_cache_gib=request.kv_cache_gib,
        port=request.port,
    )
    return arguments.placed(plain, told)


def _check_varied(request: SweepRequest, env: environment.EngineEnv) -> None:
    """Raises InputError for what would vary in name only."""
    flags = [flag for flag, _ in request.vary]
    if env.kind == "cpu" and "gpu_memory_utilization" in flags:
        raise InputError(
            "--vary gpu_memory_utilization on a CPU, whose KV cache has the size of --kv-cache-gib",
            allowed="on a GPU",
            remedy="vary kv_cache_memory_bytes, in bytes",
        )
