"""The whole job: model in, checkpoint out, through the cache.

    key = sha256(source model, recipe, calibration tokens)

decides what a checkpoint is. A finished one with the same key is returned and not made again; its bytes are checked
against the hash that was noted when it was written.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quantize import awq, rtn
from quantize.blocks import check_family, linear
from quantize.calibration import CalibrationSet
from quantize.calibration import load as load_calibration
from quantize.checkpoint import Writer, describe, finished, pack_block, whole
from quantize.recipe import Recipe
from quantize.scheme import Quantized, dequantize
from quantize.walk import Step, walk
from quantize.weights import ModelDir, check_unquantized, content_hash, locate, open_model, read_config

_SMALL_MATRIX = 2**21
"""Elements; a matrix multiplication of this size gains little from a second thread."""

Progress = Callable[[int, int], None]
"""Called after each block with the blocks done and the blocks in all."""


@dataclass(frozen=True)
class Result:
    """A finished checkpoint. `seconds` is the wall time of the call; `cached` says that it found the work done."""

    path: Path
    method: str
    recipe_sha256: str
    checkpoint_sha256: str
    seconds: float
    cached: bool


def default_cache() -> Path:
    """The user's cache directory for kneebench."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("kneebench"))


def quantize_model(
    model: str | Path,
    recipe: Recipe,
    *,
    out: Path | None = None,
    cache: Path | None = None,
    calibration: Path | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> Result:
    """Quantize `model`, a directory or a hub name, by `recipe`, unless that was done before.

    The checkpoint goes to `out`, or without it to <cache>/checkpoints/<name>-<method>-<key>, where `cache` is the
    user's cache directory by default. `calibration` is a file (see `calibration`); `device` the GPU if there is one.
    Raises a QuantizeError, and then leaves nothing behind.
    """
    started = time.perf_counter()
    path = locate(model)
    source = open_model(path)
    check_family(source.config.get("model_type"))
    check_unquantized(path, source.config)
    samples = load_calibration(path, recipe, calibration) if recipe.calibrated else None
    record = _record(str(model), content_hash(path), recipe, samples)
    name = path.name if Path(model).expanduser().is_dir() else Path(model).name
    out = out or _entry(cache, name, record)
    digest = finished(out, record["key"])
    cached = digest is not None
    if digest is None:
        with whole(out) as draft, _threads_that_pay(source.config):
            _write(source, recipe, samples, draft, record, progress, device or _default_device())
            digest = describe(draft, path, source.config, recipe.scheme, record)
    return Result(out, recipe.method, recipe.sha256(), digest, time.perf_counter() - started, cached)


def quantize_config(config: Path, recipe: Recipe, *, out: Path | None = None, cache: Path | None = None) -> Result:
    """As `quantize_model`, for a shape instead of a model: config.json or its directory in, no weights in or out.

    vLLM serves the result with --load-format dummy, which times the kernels on random weights.
    """
    started = time.perf_counter()
    source = config if config.is_dir() else config.parent
    fields = read_config(config)
    check_family(fields.get("model_type"))
    check_unquantized(config, fields)
    shape = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    record = _record(str(config), shape, recipe, None)
    name = source.resolve().name if config.stem == "config" or config.is_dir() else config.stem
    out = out or _entry(cache, f"{name}-config", record)
    digest = finished(out, record["key"])
    cached = digest is not None
    if digest is None:
        with whole(out) as draft:
            digest = describe(draft, source, fields, recipe.scheme, record)
    return Result(out, recipe.method, recipe.sha256(), digest, time.perf_counter() - started, cached)


def _record(source: str, source_sha256: str, recipe: Recipe, samples: CalibrationSet | None) -> dict[str, Any]:
    """What quantize.json says of a checkpoint; `key` is its identity."""
    calibration_sha256 = samples.sha256() if samples else None
    parts = (source_sha256, recipe.sha256(), calibration_sha256 or "")
    return {
        "key": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        "recipe": recipe.record(),
        "recipe_sha256": recipe.sha256(),
        "calibration": samples.origin if samples else None,
        "calibration_sha256": calibration_sha256,
        "source": source,
        "source_sha256": source_sha256,
        "tool": f"kneebench {_version()}",
    }


def _entry(cache: Path | None, name: str, record: Mapping[str, Any]) -> Path:
    """Where in the cache the checkpoint of `record` belongs."""
    return (cache or default_cache()) / "checkpoints" / f"{name}-{record['recipe']['method']}-{record['key'][:12]}"


def _write(
    source: ModelDir,
    recipe: Recipe,
    samples: CalibrationSet | None,
    draft: Path,
    record: Mapping[str, Any],
    progress: Progress | None,
    device: str,
) -> None:
    """Quantize block by block, a shard each, into `draft`; the last shard is all that lies outside of the blocks."""
    blocks = int(source.config["num_hidden_layers"])
    metadata = {name: str(record[name]) for name in ("tool", "recipe_sha256", "calibration_sha256", "source_sha256")}
    writer = Writer(draft, blocks + 1, metadata)
    for step in walk(source, samples.sequences if samples else (), device):
        quantized = _quantize(step, recipe)
        state = step.block.state_dict()
        packed = {f"{name}.weight" for name in quantized}
        kept = {name: state[name].to("cpu", dtype) for name, dtype in step.stored.items() if name not in packed}
        writer.add(pack_block(step.prefix, kept, quantized))
        with torch.no_grad():
            for name, values in quantized.items():  # the next block is to see what this one became
                linear(step.block, name).weight.copy_(dequantize(values))
        if progress:
            progress(step.index + 1, step.total)
    writer.add(source.read(name for name in source.files if not name.startswith("model.layers.")))
    writer.finish()


def _quantize(step: Step, recipe: Recipe) -> dict[str, Quantized]:
    if recipe.method == "awq":
        return awq.quantize_block(step.block, step.stats, recipe.scheme, step.heads, step.stored)
    return rtn.quantize_block(step.block, recipe.scheme)


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


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _version() -> str:
    try:
        return version("kneebench")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unreleased"
