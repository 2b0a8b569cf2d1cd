"""`bench trace`: one generation of each precision under a profiler, into a run directory that needs no machine to read.

    each precision: serve ─► warm up ─► untraced generations ─► start ─► one generation ─► stop ─► trace-<precision>.*
                                        (what one takes alone)           (what it takes watched)

A profiler slows what it watches, so both times stand in trace.toml. It is told to record around the one generation
alone: what is cold is done before, and the trace holds nothing else. After each precision the tables are whole: an
engine that dies, or Ctrl-C, leaves the traces before it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from harness import checkpoints, models
from harness.analysis.ceilings import Ceiling, of_card
from harness.analysis.metrics import tpot_ms
from harness.engines import ServeSpec, arguments, environment, vllm
from harness.errors import InputError
from harness.predict.cards import card
from harness.records import Scenario
from harness.redact import redact, redacted, refuse_keys
from harness.rundir import describe_machine, locked, run_name, to_toml, unlock, write, write_record
from harness.scenario import context_served
from harness.telemetry import ceiling, generation, profilers, trace_files
from harness.telemetry.gpu import gpus
from harness.telemetry.kernels import Trace, classified

WARM, UNTRACED = 1, 3
"""Generations before the traced one: for what is cold, and to know what one takes without a profiler (the median)."""
_SCRATCH = ".profile-"
"""What a profiler writes before it is fit to be shown."""


class Observer(Protocol):
    """Who is told how it goes."""

    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What the user asked for, parsed but not yet looked at."""

    model: str = "demo"
    precisions: tuple[str, ...] = ("bf16", "awq")
    """The baseline first."""
    tokens: int = 200
    prompt_tokens: int = 128
    out: Path | None = None
    gpu: str | None = None
    """Whose data sheet is the ceiling; None: this machine's card, or what this processor is measured to do."""
    profiler: Literal["torch", "nsys"] | None = None
    """None: nsys where it can be, else torch."""
    engine_python: Path | None = None
    calibration: Path | None = None
    port: int | None = None
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request, looked at."""

    request: TraceRequest
    scenario: Scenario
    env: environment.EngineEnv
    profiler: Literal["torch", "nsys"]
    path: Path
    observer: Observer


@dataclass(frozen=True, slots=True)
class _Traced:
    """What was found of one precision."""

    trace: Trace
    kernel: str | None
    """Behind the linear layers, as the engine names it."""
    untraced_tpot_ms: float | None
    """The median of UNTRACED generations."""
    traced_tpot_ms: float | None
    checkpoint_sha256: str | None = None

    @property
    def precision(self) -> str:
        return self.trace.precision


def record(request: TraceRequest, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Trace every precision; returns the run directory. Raises KneebenchError; finished traces stay on disk."""
    typed: dict[str, Sequence[object]] = {
        "--model": [request.model],
        "--precisions": request.precisions,
        "--out": [request.out],
        "--engine-python": [request.engine_python],
        "--calibration": [request.calibration],
        "--engine-arg": [" ".join(request.engine_args), *request.engine_args],
    }
    refuse_keys(typed, request.engine_args)
    model = models.resolve(request.model)
    wanted = checkpoints.wanted(request.precisions)
    own_card = card(request.gpu) if request.gpu else None
    if request.port is not None:
        vllm.checked_port(request.port)
    env = environment.find(request.engine_python)
    profiler = profilers.chosen(request.profiler, on_card=env.kind == "cuda")
    scenario = _scenario(request)
    plain = ServeSpec(
        Path(), "", max_model_len=context_served(scenario), gpu_memory_utilization=request.gpu_memory_utilization
    )
    limits = arguments.placed(plain, request.engine_args)
    for served in (given or model for given in wanted.values()):
        checkpoints.check_served(served, limits)
    if any(given is None and name != "bf16" for name, given in wanted.items()):
        checkpoints.check_quantizer()

    path = request.out or Path("results") / run_name(model.name, "trace", datetime.now())
    plan = _Plan(request, scenario, env, profiler, path, observer)
    lock = locked(path)
    try:
        if any((path / name).exists() for name in (trace_files.SETTINGS, "points.csv")):
            raise InputError(f"{path} holds a run already", allowed="a new or empty directory")
        for leftover in path.glob(f"{_SCRATCH}*"):  # of one that was killed
            shutil.rmtree(leftover)
        machine = describe_machine("vllm", env.vllm_version, argv)
        write_record(path / "environment.json", machine)
        observer.status("measuring what this machine can do at most")
        limit = of_card(own_card) if own_card else _ceiling()
        settings = {
            "run_id": path.name,
            "model": model.name,
            "precisions": list(wanted),
            "tokens": request.tokens,
            "prompt_tokens": request.prompt_tokens,
            "profiler": "Nsight Systems" if profiler == "nsys" else "torch",
            "device": "gpu" if env.kind == "cuda" else "cpu",
            "machine": machine.gpu or f"{machine.cpu}, {machine.cpu_cores} cores",
            "engine": f"vllm {env.vllm_version} ({env.kind})",
            "engine_args": list(request.engine_args),
        }
        done: list[_Traced] = []
        for name, given in wanted.items():
            checkpoint, digest = checkpoints.checkpoint(name, given, model, request.calibration, observer.status)
            done.append(replace(_trace_one(plan, name, checkpoint), checkpoint_sha256=digest))
            trace_files.write_rows([one.trace for one in done], path / trace_files.KERNELS)
            tables: dict[str, Mapping[str, Any]] = {"trace": settings | _told(done)}
            if limit is not None:
                tables["ceiling"] = asdict(limit)
            write(path / trace_files.SETTINGS, to_toml(redacted(tables)))
            observer.note(_said(done[-1], request.tokens))
    finally:
        unlock(path, lock)
    return path


def _scenario(request: TraceRequest) -> Scenario:
    """One user, one length."""
    return Scenario(
        name="trace",
        input_tokens=request.prompt_tokens,
        output_tokens=request.tokens,
        length_distribution="fixed",
    )


def _ceiling() -> Ceiling | None:
    """Of this machine's first card, if the catalogue knows it; without a card, measured."""
    here = gpus()
    if not here:
        return ceiling.measure()
    try:
        return of_card(card(here[0].name))
    except InputError:
        return None


def _trace_one(plan: _Plan, name: str, model: models.Model) -> _Traced:
    """Serve one precision and trace a generation; the trace, the log and the config lie in the run directory then."""
    request, observer = plan.request, plan.observer
    log = plan.path / f"engine-{name}.log"
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{name}-", dir=plan.path) as scratch:
        watch = profilers.profiler(plan.profiler, Path(scratch).resolve())
        target = plan.path / f"trace-{name}{watch.ending}"
        spec = ServeSpec(
            model=model.path,
            precision=name,
            max_model_len=context_served(plan.scenario),
            max_num_seqs=request.max_num_seqs,
            dummy_weights=model.random_weights,
            kv_cache_gib=request.kv_cache_gib,
            gpu_memory_utilization=request.gpu_memory_utilization,
            port=request.port,
        )
        spec = arguments.placed(spec, request.engine_args)
        spec = replace(spec, extra_args=(*spec.extra_args, *watch.flags))
        try:
            with vllm.serve(spec, plan.env, log, observer.status, launcher=watch.launcher) as engine:
                info = engine.info
                flags = {key: value for key, value in info.settings.items() if not key.startswith(profilers.CONFIG)}
                write_record(log.with_suffix(".json"), replace(info, settings=flags))
                generate = generation.generator(engine, model, plan.scenario, name)
                observer.status(f"{name}: generating without the profiler")
                untraced = [tpot_ms(generate(number)) for number in range(WARM + UNTRACED)][WARM:]
                observer.status(f"{name}: generating under the profiler")
                generation.start_profile(engine)
                traced = tpot_ms(generate(WARM + UNTRACED))
                observer.status(f"{name}: the profiler writes its trace")
                generation.stop_profile(engine)
                watch.collect(target, engine.check)
        finally:
            if log.exists():  # it names the profiler's directory
                text = log.read_text(encoding="utf-8", errors="replace")
                write(log, redact(text, {str(plan.path.resolve()): "<run>"}))
    if (config := model.config_path) is not None and config.exists():
        write(plan.path / f"config-{name}.json", trace_files.shown_config(config))
    observer.status(f"{name}: reading the trace")
    known = [time for time in untraced if time is not None]
    return _Traced(trace_files.read_trace(name, target), info.kernel, median(known) if known else None, traced)


def _told(done: Sequence[_Traced]) -> dict[str, object]:
    """What trace.toml says of the precisions so far, each figure by precision."""
    figures: dict[str, dict[str, Any]] = {
        "steps": {one.precision: len(one.trace.steps) for one in done},
        "classified": {one.precision: classified(one.trace) for one in done},
        "traced_tpot_ms": {one.precision: one.traced_tpot_ms for one in done},
        "untraced_tpot_ms": {one.precision: one.untraced_tpot_ms for one in done},
        "kernels": {one.precision: one.kernel for one in done},
        "checkpoint_sha256": {one.precision: one.checkpoint_sha256 for one in done},
    }
    return {
        figure: {name: value for name, value in table.items() if value is not None} for figure, table in figures.items()
    }


def _said(one: _Traced, tokens: int) -> str:
    """One line: what was found, and what the profiler cost."""
    parts = [f"{one.precision}: {len(one.trace.steps)} steps for {tokens} tokens"]
    share = classified(one.trace)
    if share is not None:
        parts.append(f"{100 * share:.1f} % of the busy time is of a known kind")
    if one.traced_tpot_ms is not None and one.untraced_tpot_ms:
        slower = one.traced_tpot_ms / one.untraced_tpot_ms - 1
        parts.append(
            f"{one.traced_tpot_ms:.2f} ms a token under the profiler, {one.untraced_tpot_ms:.2f} ms without "
            f"({100 * slower:+.0f} %)"
        )
    return ", ".join(parts)
