"""The whole job: model in, checkpoint out, through the cache.

    key = sha256(source model, recipe, calibration tokens[, what it trains on][, the size of its shards])

decides what a checkpoint is. A finished one with the same key is returned and not made again; its bytes are checked
against the hash that was noted when it was written. An unfinished one is gone on with at its last finished block.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from quantize import formats, train
from quantize.allocate import allocate
from quantize.blocks import family_of
from quantize.calibration import CalibrationSet
from quantize.calibration import load as load_calibration
from quantize.checkpoint import RECORD, SHARD_BYTES, Draft, describe, drafted, finished, pack_block, unfinished
from quantize.corpus import key as corpus_key
from quantize.devices import in_order
from quantize.devices import parse as parse_devices
from quantize.errors import OutputError, SchemeError
from quantize.formats import HEAD
from quantize.head import check_untied, head_of, input_stats
from quantize.loop import Observer, Row, world
from quantize.methods import METHODS, Layer, quantize_block, quantize_head
from quantize.recipe import Recipe
from quantize.scheme import Scheme
from quantize.sequences import batches
from quantize.shapes import implied
from quantize.store import BUDGET, Store
from quantize.walk import Step, walk
from quantize.weights import ModelDir, check_unquantized, content_hash, locate, open_model, read_config

TRAINING = ".training"
"""Where in a draft the text, the states and the teacher's distributions lie."""

_SMALL_MATRIX = 2**21
"""Elements; a matrix multiplication of this size gains little from a second thread."""


@dataclass(frozen=True)
class BlockDone:
    """What progress is told after each block: its layers' fate, and what the process holds (bytes).

    seconds: since this call began on its first block; begun: the blocks that were there already.
    """

    done: int
    total: int
    begun: int
    seconds: float
    layers: tuple[Layer, ...]
    resident_bytes: int


_ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Progress = Callable[[BlockDone], None]


@dataclass(frozen=True)
class Result:
    """A finished checkpoint. `seconds` is the wall time of the call; `cached` says that it found the work done.

    tokens_trained: what qat and qad learned from, 0 for the others; start_seconds: what of `seconds` made their start.
    """

    path: Path
    method: str
    format: str
    recipe_sha256: str
    checkpoint_sha256: str
    seconds: float
    cached: bool
    tokens_trained: int = 0
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A request that was looked at and can be served: `plan` gives each linear layer its scheme, by full name."""

    model: str
    source: ModelDir
    recipe: Recipe
    plan: Mapping[str, Scheme | None]
    format: str
    samples: CalibrationSet | None


def default_cache() -> Path:
    """The user's cache directory for kneebench."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("kneebench"))


def prepare(
    model: str | Path,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    target_gib: float | None = None,
    device: str | None = None,
) -> Prepared:
    """Look at all of a request before anything is written. Raises a QuantizeError where it cannot be served.

    With `target_gib` the recipe comes back with exceptions for the layers that get other bits, chosen so that the
    checkpoint is no larger (see `allocate`).
    """
    path = locate(model)
    source = open_model(path)
    family = family_of(source.config.get("model_type"))
    check_unquantized(path, source.config)
    blocks = int(source.config["num_hidden_layers"])
    plan = recipe.plan(family, blocks)
    if HEAD in plan:
        check_untied(plan, implied(source.config).tied)
        if recipe.training:
            raise SchemeError(
                f"--method {recipe.method} with {HEAD} quantized",
                f"{HEAD} in 16 bits: training keeps it and the embedding as they are",
                "Leave it out of --keep, or choose a method that rounds",
            )
    samples = load_calibration(path, recipe, calibration) if recipe.calibrated or target_gib else None
    if target_gib is not None and samples:
        with _threads_that_pay(source.config):
            recipe = allocate(source, recipe, samples.sequences, target_gib, device or default_device())
        plan = recipe.plan(family, blocks)
    shapes = {name: source.matrix_shape(f"{name}.weight") for name in plan}
    return Prepared(str(model), source, recipe, plan, recipe.resolve_format(plan, shapes), samples)


def quantize_model(
    model: str | Path,
    recipe: Recipe,
    *,
    out: Path | None = None,
    cache: Path | None = None,
    calibration: Path | None = None,
    target_gib: float | None = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
    device: str | None = None,
    corpus: Path | None = None,
    observe: Observer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Result:
    """Quantize `model`, a directory or a hub name, by `recipe`, unless that was done before.

    The checkpoint goes to `out`, or without it to <cache>/checkpoints/<name>-<method>-<key>, where `cache` is the
    user's cache directory by default. `calibration` is a file (see `calibration`); `budget` the bytes of activations
    that stay in memory; `device` the GPU if there is one, or several, as in cuda:0,cuda:1 (`devices`); `shard_bytes`
    the most that a file of the checkpoint holds. `corpus` is what qat and qad train on (see `train`), and `observe` is
    told of their steps. Raises a QuantizeError; finished blocks and steps are then kept beside `out` and the same call
    goes on from them.
    """
    started = time.perf_counter()
    devices = parse_devices(device)
    request = prepare(model, recipe, calibration=calibration, target_gib=target_gib, device=devices[0])
    path = request.source.path
    if shard_bytes < 1:
        raise OutputError(f"shards of {shard_bytes} bytes", "1 byte at least", "Leave --shard-gb out: it is 5 then")
    record = _record(request, content_hash(path), corpus, shard_bytes)
    name = path.name if Path(model).expanduser().is_dir() else Path(model).name
    out = out or _entry(cache, name, record)
    digest = finished(out, record["key"])
    cached = digest is not None
    if digest is None:
        config = request.source.config
        if request.recipe.training:
            start = partial(
                quantize_model, model, cache=cache, calibration=calibration, budget=budget, progress=progress,
                device=device,
            )  # fmt: skip
            with _threads_that_pay(config):
                digest = _train(request, record, out, start, corpus, devices[0], observe, shard_bytes)
            return _result(out, record, digest, started, cached)
        with drafted(out, record["key"], _metadata(record), shard_bytes) as draft, _threads_that_pay(config):
            _write(request, draft, budget, progress, devices)
            record |= {"layers": [asdict(layer) for layer in draft.layers]}
            digest = describe(draft.path, path, config, request.plan, request.format, record)
    return _result(out, record, digest, started, cached)


def quantize_config(config: Path, recipe: Recipe, *, out: Path | None = None, cache: Path | None = None) -> Result:
    """As `quantize_model`, for a shape instead of a model: config.json or its directory in, no weights in or out.

    vLLM serves the result with --load-format dummy, which times the kernels on random weights.
    """
    started = time.perf_counter()
    source = config if config.is_dir() else config.parent
    fields = read_config(config)
    plan = recipe.plan(family_of(fields.get("model_type")), int(fields.get("num_hidden_layers", 1)))
    check_unquantized(config, fields)
    shapes: dict[str, tuple[int, int]] = {}
    if HEAD in plan:  # which formats hold it is a matter of its size
        known = implied(fields)
        check_untied(plan, known.tied)
        sizes = {name: known.tensors[f"{name}.weight"] for name in plan}
        shapes = {name: (outputs, inputs) for name, (outputs, inputs) in sizes.items()}
    format = recipe.resolve_format(plan, shapes)
    shape = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    record = _record(Prepared(str(config), ModelDir(source, fields, {}), recipe, plan, format, None), shape)
    name = source.resolve().name if config.stem == "config" or config.is_dir() else config.stem
    out = out or _entry(cache, f"{name}-config", record)
    digest = finished(out, record["key"])
    cached = digest is not None
    if digest is None:
        with drafted(out, record["key"], {}) as draft:
            digest = describe(draft.path, source, fields, plan, format, record)
    return _result(out, record, digest, started, cached)


def _result(out: Path, record: Mapping[str, Any], digest: str, started: float, cached: bool) -> Result:
    recipe = record["recipe"]
    seconds = time.perf_counter() - started
    training = json.loads((out / RECORD).read_text()).get("training") or {}
    return Result(
        out, recipe["method"], recipe["format"], record["recipe_sha256"], digest, seconds, cached,
        training.get("tokens", 0), 0.0 if cached else training.get("start_seconds", 0.0),
    )  # fmt: skip


def _record(
    request: Prepared, source_sha256: str, corpus: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """What quantize.json says of a checkpoint; `key` is its identity."""
    recipe, source, samples = replace(request.recipe, format=request.format), request.model, request.samples
    calibration_sha256 = samples.sha256() if samples and recipe.calibrated else None
    parts = [source_sha256, recipe.sha256(), calibration_sha256 or ""]
    if recipe.training and corpus:
        parts.append(corpus_key(request.source.path, corpus, recipe.length))
    if shard_bytes != SHARD_BYTES:  # the same weights in other files
        parts.append(f"shards of {shard_bytes}")
    return {
        "key": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        "recipe": recipe.record(),
        "recipe_sha256": recipe.sha256(),
        "calibration": samples.origin if samples and recipe.calibrated else None,
        "calibration_sha256": calibration_sha256,
        "source": source,
        "source_sha256": source_sha256,
        "tool": f"kneebench {_version()}",
    }


def _metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """What each shard says of itself."""
    return {name: str(record[name]) for name in ("tool", "recipe_sha256", "calibration_sha256", "source_sha256")}


def _entry(cache: Path | None, name: str, record: Mapping[str, Any]) -> Path:
    """Where in the cache the checkpoint of `record` belongs."""
    return (cache or default_cache()) / "checkpoints" / f"{name}-{record['recipe']['method']}-{record['key'][:12]}"


def _write(request: Prepared, draft: Draft, budget: int, progress: Progress | None, devices: Sequence[str]) -> None:
    """Quantize block by block, a shard each, into `draft`, then the output head if that is asked for; last comes
    all that lies outside of the blocks.

    With calibration the devices share each block, without one they take a block each (`devices`).
    """
    source, method = request.source, METHODS[request.recipe.method]
    process = psutil.Process()
    with Store(budget, draft.scratch) as store:
        sequences = request.samples.sequences if request.samples and method.calibrated else ()
        draft.restore(store)
        begun, started = draft.done, time.perf_counter()
        total = int(source.config["num_hidden_layers"])
        arithmetic = _ARITHMETIC[request.recipe.arithmetic]
        onward = HEAD in request.plan
        if sequences:
            walks = [
                walk(source, sequences, devices[0], store=store, start=begun, arithmetic=arithmetic,
                     to_the_end=onward, beside=devices[1:])
            ]  # fmt: skip
        else:
            walks = [walk(source, (), device, start=begun + i, stride=len(devices)) for i, device in enumerate(devices)]

        def made(side: int, _: int) -> tuple[dict[str, Tensor], list[Layer], bool]:
            step = next(walks[side])
            return *_block(request, step), step.flow is not None and step.onward

        for tensors, layers, moved in in_order(made, total - begun, len(walks)):
            draft.add_block(tensors, layers, store if moved else None)
            if progress:
                seconds = time.perf_counter() - started
                held = process.memory_info().rss
                progress(BlockDone(draft.done, total, begun, seconds, tuple(layers), held))
        head = _head(request, draft, store, sequences, devices[0])
    outside = [name for name in source.files if not name.startswith("model.layers.")]
    if head:
        outside.remove(f"{HEAD}.weight")
    draft.add({**source.where(outside), **head})
    draft.finish()


def _block(request: Prepared, step: Step) -> tuple[dict[str, Tensor], list[Layer]]:
    """Quantize the block of `step`: its tensors as they are stored, and its layers' fate."""
    schemes = {n: s for n in step.family.linears if (s := request.plan[step.prefix + n])}
    quantized, layers = quantize_block(step, METHODS[request.recipe.method], request.recipe.grid_search, schemes.get)
    state = step.block.state_dict()
    integers = {name: (values, schemes[name]) for name, values in quantized.items()}
    weights = {f"{name}.weight" for name in integers}
    kept = {name: state[name].to("cpu", dtype) for name, dtype in step.stored.items() if name not in weights}
    return pack_block(step.prefix, kept, integers, request.format), layers


def _train(
    request: Prepared,
    record: dict[str, Any],
    out: Path,
    start: Callable[[Recipe], Result],
    corpus: Path | None,
    device: str,
    observe: Observer | None,
    shard_bytes: int,
) -> str:
    """Train, and write the checkpoint; returns its content hash. One of several processes (torchrun) writes it all."""
    recipe, source, config = request.recipe, request.source, request.source.config
    training = recipe.training
    assert training is not None
    schemes = {name: scheme for name, scheme in request.plan.items() if scheme}
    with world(device) as among:
        begun = None
        if recipe.start:
            if among.first:
                begun = start(recipe.start)
            among.wait()
            begun = begun or start(recipe.start)

        def learn(folder: Path) -> tuple[Any, Mapping[str, torch.dtype], Sequence[Row], str]:
            among.wait()
            return train.run(
                source, begun.path if begun else None, recipe, training, request.plan, corpus,
                folder / TRAINING, record["key"], among=among, device=device, observe=observe,
            )  # fmt: skip

        if not among.first:
            learn(unfinished(out))
            among.wait()
            return finished(out, record["key"]) or ""
        with drafted(out, record["key"], _metadata(record), shard_bytes) as draft:
            (draft.path / TRAINING).mkdir(exist_ok=True)
            draft.hold()
            student, stored, rows, origin = learn(draft.path)
            train.write(student, source, schemes, stored, request.format, draft)
            train.report(rows, draft.path)
            shutil.rmtree(draft.path / TRAINING)
            record |= {
                "layers": [asdict(layer) for layer in draft.layers],
                "training": {
                    "corpus": origin,
                    "tokens": rows[-1].tokens,
                    "start_seconds": round(begun.seconds, 3) if begun and not begun.cached else 0.0,
                    **train.summary(rows),
                },
            }
            digest = describe(draft.path, source.path, config, request.plan, request.format, record)
        among.wait()
        return digest


def _head(
    request: Prepared, draft: Draft, store: Store, sequences: Sequence[Sequence[int]], device: str
) -> dict[str, Tensor]:
    """The tensors of the output head in the parts of the format, and its fate in the draft; none where it is kept.

    `store` has the hidden states after the last block.
    """
    scheme = request.plan.get(HEAD)
    if scheme is None:
        return {}
    head = head_of(request.source, device)
    stats = input_stats(head, store, batches(sequences)) if sequences else None
    slices, layer = quantize_head(head, scheme, stats, METHODS[request.recipe.method], request.recipe.grid_search)
    draft.layers.append(layer)
    packed = formats.pack_slices(request.format, slices, scheme)
    return {f"{HEAD}.{part}": tensor.cpu().contiguous() for part, tensor in packed.items()}


@contextmanager
def _threads_that_pay(config: Mapping[str, Any]) -> Iterator[None]:
    """One thread for a small model's matrices.

    Operations on them take microseconds, and OpenMP's threads spin at the barrier after each: on two cores of which
    one was busy, AWQ of the demo model took 213 s with two threads and 10 s with one.
    """
    before = torch.get_num_threads()
    if int(config["hidden_size"]) * int(config["intermediate_size"]) < _SMALL_MATRIX:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _version() -> str:
    try:
        return version("kneebench")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unreleased"
