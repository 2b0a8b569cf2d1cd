"""From a precision's name to a checkpoint that can be served: found, or made by `python -m quantize`.

    bf16               the model as it is
    awq, gptq, ...     made from it, once; 4 bits unless the method is for 8
    gptq-3bit          the same with other bits. No kernel serves 2 and 3 bits, so what is served is the checkpoint
                       expanded: plain 16-bit weights that answer as it would, at the original's speed and size
    NAME=CHECKPOINT    one that exists
    awq@kneebench      awq's own checkpoint, made once for both, served with our kernels; NAME@kneebench=CHECKPOINT too

Quantizing runs in a process of its own: torch never enters the process that holds the clock.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import models
from harness.architecture import quantization, read_config
from harness.engines import ServeSpec, plugin
from harness.errors import InputError, MissingTool, RunError
from harness.telemetry.gpu import gpus

METHODS = ("rtn", "awq", "gptq", "awq+gptq", "smoothquant", "qat", "qad")
"""Quantized precisions that `python -m quantize` makes; `bf16` is the model as it is."""
PRECISIONS = ("bf16", *METHODS)
LOW_BITS = tuple(f"{method}-{bits}bit" for bits in (3, 2) for method in METHODS if method != "smoothquant")
"""For their answers, not for their speed."""
_UNREAD = ("bf16", "smoothquant", *LOW_BITS)
"""Precisions that are never stored as our kernels read them."""
_NOT_READ = "is in no layout that our kernels read"
_READ = f"@{plugin.NAME} with weights of 4 or 8 bits in the AWQ or the GPTQ layout"
_LOW_BITS = re.compile(r"(?P<method>.+)-(?P<bits>[23])bit")


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint that `python -m quantize` made or found."""

    path: Path
    sha256: str


def wanted(items: Sequence[str], known: Sequence[str] = PRECISIONS) -> dict[str, models.Model | None]:
    """Precision name -> a checkpoint that exists, or None: to be made from the model."""
    found: dict[str, models.Model | None] = {}
    for item in items:
        name, equals, where = item.partition("=")
        stored_as, kernels = plugin.split(name)
        _, given = models.precision(f"{stored_as}{equals}{where}", known)
        if kernels and given is None and stored_as in _UNREAD:
            raise InputError(f"--precisions {name}: {stored_as} {_NOT_READ}", allowed=_READ)
        if given is not None:
            check_kernels(name, given)
        if name in found:
            raise InputError(f"--precisions names {name} twice", allowed="each name once")
        found[name] = given
    return found


def checkpoint(
    name: str,
    given: models.Model | None,
    model: models.Model,
    calibration: Path | None,
    on_status: Callable[[str], None],
) -> tuple[models.Model, str | None]:
    """What to serve as this precision, and its digest. Raises InputError where its kernels do not read it."""
    if given is not None or name == "bf16":
        found = given or model
        has_files = found.is_local and not found.random_weights
        return found, models.checkpoint_sha256(found.path) if has_files else None
    stored_as, _ = plugin.split(name)
    made = quantize(model, stored_as, calibration, on_status)
    found = models.Model(f"{model.name} {stored_as}", made.path, random_weights=model.random_weights)
    check_kernels(name, found)
    return found, made.sha256


def check_kernels(precision: str, model: models.Model) -> None:
    """Raise InputError where the precision names kernels that do not read this checkpoint.

    One whose config.json is not on this machine passes: the engine will see it.
    """
    if plugin.kernels_of(precision) is None or model.config_path is None:
        return
    table = read_config(model.config_path).get("quantization_config")
    method = table.get("quant_method") if isinstance(table, dict) else None
    if method not in ("awq", "gptq") or not set(_bits(table)) <= {4, 8}:
        raise InputError(f"--precisions {precision}: {model.name} {_NOT_READ}", allowed=_READ)


def servable(model: models.Model, on_status: Callable[[str], None]) -> tuple[models.Model, str | None]:
    """`model`, or its expansion where no kernel serves its bits; and what was expanded, in words."""
    bits = bits_of(model)
    if bits is None or bits >= 4:
        return model, None
    on_status(f"expanding {model.name} to 16 bits: no kernel serves {bits}")
    made = _made(["quantize.expand", str(model.path)], f"expanding {model.name}", on_status)
    return models.Model(model.name, made.path), f"16-bit weights expanded from {bits} bits: no kernel serves them"


def is_quantized(model: models.Model) -> bool:
    config = model.config_path
    return bool(config and quantization(read_config(config)))


def bits_of(model: models.Model) -> int | None:
    """The fewest bits that its config.json gives any weights; None where it quantizes none."""
    config = model.config_path
    table = read_config(config).get("quantization_config") if config else None
    return min(_bits(table), default=None)


def _bits(table: Any) -> list[int]:
    """AWQ and GPTQ say `bits`, compressed-tensors `num_bits` of each group's weights."""
    if not isinstance(table, dict):
        return []
    groups = table.get("config_groups")
    schemes = [table.get("bits")]
    if isinstance(groups, dict):
        schemes += [
            (group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, dict)
        ]
    return [bits for bits in schemes if isinstance(bits, int)]


def weight_bytes(model: models.Model) -> int | None:
    """Size of the weight files; None where there are none here."""
    if not model.is_local or model.random_weights:
        return None
    return sum(path.stat().st_size for path in Path(model.path).glob("*.safetensors")) or None


def check_fits(
    model: models.Model,
    utilization: float,
    max_model_len: int,
    *,
    cards: int = 1,
    kv_cache_dtype: str | None = None,
) -> None:
    """`models.check_fits` for the smallest card here; on a machine without one everything may be tried.

    `cards`: how many share the model. Raises InputError where there are fewer, and everywhere for weights that are
    damaged, or no safetensors: an engine would open a pickle, which runs code.
    """
    models.weight_bytes(model)
    here = gpus()
    if not here:
        return
    if cards > len(here):
        raise InputError(
            f"tensor times pipeline parallel is {cards}, and this machine has {len(here)}",
            allowed=f"{len(here)} at most: each part of the model takes a card of its own",
        )
    smallest = min(here, key=lambda card: card.memory_gib)
    models.check_fits(
        model,
        smallest.name,
        smallest.memory_gib,
        utilization,
        max_model_len,
        cards=cards,
        kv_cache_dtype=kv_cache_dtype,
    )


def check_served(model: models.Model, spec: ServeSpec) -> None:
    """`check_fits` for the server that `spec` would start."""
    check_fits(
        model,
        spec.gpu_memory_utilization,
        spec.max_model_len,
        cards=spec.cards,
        kv_cache_dtype=spec.kv_cache_dtype,
    )


def check_quantizer() -> None:
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingTool(
            f"quantizing needs {', '.join(missing)}, which this environment lacks",
            remedy='pip install "kneebench[quantize]", or give a finished checkpoint: --precisions bf16,awq=PATH',
        )


def quantize(model: models.Model, precision: str, calibration: Path | None, on_status: Callable[[str], None]) -> Made:
    """Run `python -m quantize` for one of PRECISIONS or LOW_BITS."""
    low = _LOW_BITS.fullmatch(precision)
    method = low["method"] if low else precision
    command = ["quantize", str(model.path), "--method", method]
    if low:
        command += ["--bits", low["bits"]]
    if model.random_weights:
        command.append("--config-only")
    if calibration is not None:
        command += ["--calibration", str(calibration)]
    on_status(f"quantizing {model.name} with {precision}")
    return _made(command, f"quantizing with {precision}", on_status)


def _made(module: Sequence[str], doing: str, on_status: Callable[[str], None]) -> Made:
    said: list[str] = []
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            assert process.stderr is not None and process.stdout is not None
            for line in process.stderr:
                said.append(line.rstrip())
                if not line.startswith("error:"):  # that one is raised below
                    on_status(f"{doing}: {line.strip()}")
            answer = process.stdout.read()
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 2:
        raise InputError("\n".join(said[-8:]).removeprefix("error: "))
    if process.returncode != 0:
        raise RunError(f"{doing} failed:\n" + "\n".join(said[-8:]))
    result = json.loads(answer.strip().splitlines()[-1])
    return Made(Path(result["path"]), result["checkpoint_sha256"])
