"""`bench failures` and `bench quality` from what was typed to a finished directory.

Each precision is served once, the baseline first, because the others are compared with it. While it is up it is asked
all that is wanted of it: the prompts, the texts, the public tasks. The baseline is asked twice, so that what the engine
changes by itself is known. Nothing that is there already is asked again.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

import httpx

from harness import checkpoints, models
from harness.architecture import read_config
from harness.engines import Engine, ServeSpec, arguments, endpoint, environment, vllm
from harness.errors import InputError, RunError
from harness.quality import sandbox, scoring, tasks, texts
from harness.quality.asking import ask_all, connected
from harness.quality.checks import Execute
from harness.quality.directory import QualityDirectory
from harness.quality.prompts import PromptSet, load_prompts, to_toml
from harness.quality.texts import Text
from harness.records import Answer
from harness.redact import refuse_keys
from harness.rundir import describe_machine, run_name
from harness.scenario import scenarios_dir

Part = Literal["answers", "text", "tasks"]

LONGEST_CONTEXT = 8192
"""Context that is served where the model allows more: what the prompts need, with room."""


class Observer(Protocol):
    """Who is told how it goes."""

    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class QualityRequest:
    """What the user asked for, parsed but not yet looked at."""

    parts: tuple[Part, ...]
    model: str = "demo"
    precisions: tuple[str, ...] = ("bf16", "awq")
    """The baseline first."""
    prompts: str | None = None
    """A set's name or file; None: the demo model's own for it, general for the others."""
    out: Path | None = None
    run: Path | None = None
    """A sweep's run directory, whose precisions these are: what is found goes there, and into its papers."""
    endpoints: tuple[str, ...] = ()
    """NAME=URL of servers that run already; then they are the precisions."""
    api_key_file: Path | None = None
    """Where their key is; None: in the environment."""
    text: Path | None = None
    window: int = 512
    texts: int = 24
    tasks: tuple[str, ...] = ()
    fewshot: int | None = None
    limit: int | None = None
    include: Path | None = None
    concurrency: int = 8
    max_model_len: int | None = None
    gate: str = ""
    engine_python: Path | None = None
    calibration: Path | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request, looked at: what to ask of each precision, and of what server."""

    request: QualityRequest
    prompts: PromptSet | None
    execute: Execute | None
    precisions: tuple[str, ...]
    wanted: Mapping[str, models.Model | None]
    urls: Mapping[str, str]
    model: models.Model | None
    """None: endpoints."""

    @property
    def baseline(self) -> str:
        return self.precisions[0]


def measure(request: QualityRequest, observer: Observer, argv: Sequence[str] = ()) -> Path:
    """Ask everything that is not there yet; returns the directory. Raises KneebenchError; what was answered stays."""
    plan = _looked_at(request)
    if plan.prompts and plan.execute is None and any(prompt.check == "python" for prompt in plan.prompts.prompts):
        observer.note("no sandbox here (bubblewrap or user namespaces): code is not executed, and not judged")
    name = run_name(plan.model.name if plan.model else request.model, "quality", datetime.now())
    with QualityDirectory(request.run or request.out or Path("results") / name) as directory:
        for precision in plan.precisions:
            _measure_one(plan, precision, directory, observer, argv)
        if request.gate:  # also where nothing was left to ask
            directory.describe({"gate": request.gate}, None)
        directory.finish()
        return directory.path


def _looked_at(request: QualityRequest) -> _Plan:
    """All input is checked before anything is started."""
    typed: dict[str, Sequence[object]] = {
        "--model": [request.model],
        "--precisions": request.precisions,
        "--prompts": [request.prompts],
        "--out": [request.out],
        "--run": [request.run],
        "--endpoint": request.endpoints,
        "--api-key-file": [request.api_key_file],
        "--text": [request.text],
        "--tasks": request.tasks,
        "--include": [request.include],
        "--engine-python": [request.engine_python],
        "--calibration": [request.calibration],
        "--engine-arg": [" ".join(request.engine_args), *request.engine_args],
    }
    refuse_keys(typed, request.engine_args)
    arguments.read(request.engine_args)  # sees that none is ours
    if request.api_key_file is not None and not request.endpoints:
        raise InputError("--api-key-file without --endpoint", allowed="both: a server that we start gets a key of ours")
    if request.run is not None and not (request.run / "run.toml").is_file():
        raise InputError(
            f"--run {request.run} is no run", allowed="a directory that `bench sweep` wrote, results/<run>"
        )
    if request.run is not None and request.out is not None:
        raise InputError("--run together with --out", allowed="one of them: --run says where it goes")
    urls = _urls(request.endpoints)
    model = None if urls else models.resolve(request.model)
    if model is not None and model.random_weights:
        raise InputError(
            f"--model {request.model}: random weights answer nothing", remedy="name a model with its weights"
        )
    if model is not None and "text" in request.parts and request.window >= (request.max_model_len or _context(model)):
        raise InputError(
            f"--window {request.window} for {model.name}",
            allowed=f"less than the context that is served, {request.max_model_len or _context(model)} tokens",
        )
    wanted = {} if urls else checkpoints.wanted(request.precisions, (*checkpoints.PRECISIONS, *checkpoints.LOW_BITS))
    if any(given is None and name != "bf16" for name, given in wanted.items()):
        checkpoints.check_quantizer()
    asks = "answers" in request.parts or ("text" in request.parts and _text_file(request) is None)
    prompts = load_prompts(request.prompts or ("demo" if request.model == "demo" else "general")) if asks else None
    if "tasks" in request.parts:
        tasks.check_tasks(request.tasks, request.include)
    runner = sandbox.find_runner() if prompts and any(p.check == "python" for p in prompts.prompts) else None
    return _Plan(request, prompts, runner.run if runner else None, tuple(urls or wanted), wanted, urls, model)


def _urls(items: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, equals, url = item.partition("=")
        if not equals or not url or not all(letter.isalnum() or letter in ".+-_" for letter in name) or not name:
            raise InputError(f"--endpoint {item!r}", allowed="NAME=URL, the baseline first: bf16=http://host:8000")
        if name in found:
            raise InputError(f"--endpoint names {name} twice", allowed="each name once")
        found[name] = url
    return found


# --- one precision ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Served:
    """A precision that answers now."""

    engine: Engine
    served_as: str
    sha256: str | None = None
    tokenizer: Path | None = None
    vocabulary: int | None = None


def _measure_one(
    plan: _Plan, precision: str, directory: QualityDirectory, observer: Observer, argv: Sequence[str]
) -> None:
    rounds = (1, 2) if precision == plan.baseline else (1,)
    if not _missing(plan, precision, rounds, directory):
        observer.note(f"{precision}: all of it is there")
        return
    with _served(plan, precision, directory, observer) as served:
        _check_run(plan, precision, served)
        directory.describe(_settings(plan, precision, served), plan.prompts)
        info = served.engine.info
        directory.describe_environment(describe_machine(info.engine, info.engine_version, argv))
        if plan.prompts:
            for round in rounds:
                _ask(plan, plan.prompts, precision, round, served, directory, observer)
        if "text" in plan.request.parts:
            _score(plan, precision, rounds, served, directory, observer)
        if "tasks" in plan.request.parts:
            _ask_tasks(plan, precision, served, directory, observer)


def _check_run(plan: _Plan, precision: str, served: _Served) -> None:
    """Raise InputError when the sweep that this goes to has measured another checkpoint."""
    if plan.request.run is None:
        return
    settings = tomllib.loads((plan.request.run / "run.toml").read_text(encoding="utf-8")).get("run", {})
    measured = settings.get("checkpoint_sha256", {}).get(precision)
    if measured is not None and measured != served.sha256:
        raise InputError(
            f"--run {plan.request.run}: its {precision} is another checkpoint than this one",
            allowed="the checkpoints that the sweep has measured",
            remedy="give them, as --precisions NAME=PATH, or leave --run out",
        )


def _missing(plan: _Plan, precision: str, rounds: Sequence[int], directory: QualityDirectory) -> bool:
    """Whether anything is to be asked of a precision."""
    if plan.prompts and any(_unanswered(plan.prompts, precision, round, directory) for round in rounds):
        return True
    if "text" in plan.request.parts:
        scored, ids = directory.compared(), {text.id for text in directory.texts()}
        is_base = precision == plan.baseline
        # The baseline's first reading is what others are held to: it has no rows, and is read again for a new one.
        wanted = [(precision, round) for round in (rounds[1:] if is_base else rounds)]
        if is_base and not directory.baseline():
            wanted += [(other, 1) for other in plan.precisions[1:]]
        if not ids or any(scored.get(reading, set()) != ids for reading in wanted):
            return True
    return any((precision, task) not in _tasks_there(directory) for task in _wanted_tasks(plan))


def _unanswered(prompts: PromptSet, precision: str, round: int, directory: QualityDirectory) -> list[str]:
    there = {
        answer.prompt_id
        for answer in directory.answers()
        if (answer.precision, answer.round) == (precision, round) and answer.error is None
    }
    return [prompt.id for prompt in prompts.prompts if prompt.id not in there]


def _ask(
    plan: _Plan,
    prompts: PromptSet,
    precision: str,
    round: int,
    served: _Served,
    directory: QualityDirectory,
    observer: Observer,
) -> None:
    ids = set(_unanswered(prompts, precision, round, directory))
    if not ids:
        return
    directory.forget_errors(precision)
    asked = [prompt for prompt in prompts.prompts if prompt.id in ids]
    again = " again" if round > 1 else ""
    done = 0

    def take(answer: Answer) -> None:
        nonlocal done
        directory.add_answer(answer)
        done += 1
        observer.status(f"{precision}: answering prompts{again} ({done} of {len(asked)})")

    ask_all(served.engine.target, asked, precision, round, plan.execute, plan.request.concurrency, take)
    served.engine.check()


def _score(
    plan: _Plan,
    precision: str,
    rounds: Sequence[int],
    served: _Served,
    directory: QualityDirectory,
    observer: Observer,
) -> None:
    target = served.engine.target
    with connected(target) as client:
        found = directory.texts()
        if not found:
            found = _make_texts(plan, directory, client, target.model)
            directory.set_texts(found)
        likeliest = scoring.most_likeliest(client, target.model, served.vocabulary)
        directory.describe({"vocabulary": _vocabulary_words(likeliest)}, None)
        directory.keep_whole_texts({text.id: len(text.ids) - 1 for text in found})
        base = directory.baseline()
        is_base = precision == plan.baseline
        if is_base and set(base) != {text.id for text in found}:
            base = {}
            for number, text in enumerate(found, 1):
                base[text.id] = scoring.score(client, target.model, text, likeliest)
                observer.status(f"{precision}: reading texts ({number} of {len(found)})")
            directory.keep_baseline(base)
        there = directory.compared()
        for round in rounds[1:] if is_base else rounds:
            left = [text for text in found if text.id not in there.get((precision, round), set())]
            for number, text in enumerate(left if round == 1 else left[::-1], 1):
                read = scoring.score(client, target.model, text, likeliest)
                directory.add_positions(scoring.compare(text, base[text.id], read, precision, round))
                observer.status(f"{precision}: reading texts{' again' if round > 1 else ''} ({number} of {len(left)})")


def _make_texts(plan: _Plan, directory: QualityDirectory, client: httpx.Client, model: str) -> list[Text]:
    request, file = plan.request, _text_file(plan.request)
    if file is not None:
        return texts.from_file(file, client, model, request.window, request.texts)
    assert plan.prompts is not None
    answers = [a for a in directory.answers() if (a.precision, a.round) == (plan.baseline, 1)]
    return texts.from_answers(plan.prompts, answers, client, model, request.window, request.texts)


def _text_file(request: QualityRequest) -> Path | None:
    """What was asked for, else the demo model's own text, else none."""
    if request.text is not None or request.model != "demo" or request.endpoints:
        return request.text
    return scenarios_dir() / "demo-model" / "heldout.jsonl"


def _vocabulary_words(likeliest: int) -> str:
    if likeliest == -1:
        return "whole"
    return f"likeliest {likeliest} and one bucket for the rest: KL is a lower bound"


def _wanted_tasks(plan: _Plan) -> tuple[str, ...]:
    return plan.request.tasks if "tasks" in plan.request.parts else ()


def _tasks_there(directory: QualityDirectory) -> set[tuple[str, str]]:
    return {(sample.precision, sample.task) for sample in directory.samples()}


def _ask_tasks(plan: _Plan, precision: str, served: _Served, directory: QualityDirectory, observer: Observer) -> None:
    request, there = plan.request, _tasks_there(directory)
    home = directory.path / "tasks"
    for task in request.tasks:
        if (precision, task) in there:
            continue
        try:
            logs = tasks.run_tasks(
                served.engine.target,
                [task],
                out_dir=home / precision,
                tokenizer=served.tokenizer,
                fewshot=request.fewshot,
                limit=request.limit,
                include=request.include,
                concurrency=request.concurrency,
                on_status=lambda text: observer.status(f"{precision}: {text}"),
            )
        except RunError:
            served.engine.check()  # a dead engine says more than its client
            raise
        directory.add_samples(tasks.read_samples(logs, precision))
    if request.tasks and precision != plan.baseline:
        tasks.check_same({name: sorted((home / name).glob("*/samples_*.jsonl")) for name in (plan.baseline, precision)})


# --- servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _served(plan: _Plan, precision: str, directory: QualityDirectory, observer: Observer) -> Iterator[_Served]:
    if plan.model is None:
        name = None if plan.request.model == "demo" else plan.request.model
        with endpoint.attach(plan.urls[precision], name, plan.request.api_key_file, observer.note) as attached:
            yield _Served(attached, "an endpoint")
        return
    request = plan.request
    env = environment.find(request.engine_python)
    given = plan.wanted[precision]
    checkpoint, digest = checkpoints.checkpoint(precision, given, plan.model, request.calibration, observer.status)
    runnable, expanded = checkpoints.servable(checkpoint, observer.status)
    context = request.max_model_len or _context(runnable)
    config = read_config(runnable.config_path) if runnable.config_path else {}
    vocabulary = config.get("vocab_size")
    spec = ServeSpec(
        model=runnable.path,
        precision=precision,
        max_model_len=context,
        kv_cache_gib=request.kv_cache_gib,
        gpu_memory_utilization=request.gpu_memory_utilization,
        extra_args=("--max-logprobs", "-1"),
    )
    spec = arguments.placed(spec, request.engine_args)
    checkpoints.check_served(runnable, spec)
    log = directory.log_of(precision)
    with vllm.serve(spec, env, log, observer.status) as engine:
        directory.describe_engine(log, engine.info)
        local = plan.model.path if plan.model.is_local else None
        how = expanded or engine.info.kernel or "as it is"
        yield _Served(engine, how, digest, local, vocabulary if isinstance(vocabulary, int) else None)


def _context(model: models.Model) -> int:
    config = read_config(model.config_path) if model.config_path else {}
    longest = config.get("max_position_embeddings")
    return min(longest, LONGEST_CONTEXT) if isinstance(longest, int) else LONGEST_CONTEXT


def _settings(plan: _Plan, precision: str, served: _Served) -> dict[str, object]:
    """What quality.toml says after this precision."""
    request, info = plan.request, served.engine.info
    told: dict[str, object] = {
        "model": plan.model.name if plan.model else request.model,
        "baseline": plan.baseline,
        "precisions": [precision],
        "engine": info.engine,
        "engine_version": info.engine_version,
        "source": "endpoint" if plan.model is None else "engine",
        "served_as": {precision: served.served_as},
        "checkpoint_sha256": {precision: served.sha256} if served.sha256 else {},
        "concurrency": request.concurrency,
        "gate": request.gate or None,
    }
    if plan.prompts:
        content = to_toml(plan.prompts).encode()
        told |= {"prompts": plan.prompts.name, "prompts_sha256": hashlib.sha256(content).hexdigest()}
    if "text" in request.parts:
        file = _text_file(request)
        told |= {
            "text": file.name if file else "the baseline's answers",
            "window": request.window,
            "texts": request.texts,
        }
    if "tasks" in request.parts:
        told |= {"tasks": list(request.tasks), "fewshot": request.fewshot, "limit": request.limit}
    return told
