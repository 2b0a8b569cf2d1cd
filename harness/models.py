"""Turns what a user calls a model into something servable, and reads its size without loading it.

    demo                        the embedded demo model
    shape:qwen2.5-0.5b          a known architecture with random weights: speed without a download
    shape:path/to/config.json   the same for any architecture
    path/to/checkpoint          a local directory with config.json
    org/name                    a model on the Hugging Face hub, fetched by the engine

Weights are measured from the headers of the safetensors files (8 bytes of length, then JSON), so a 15 GB checkpoint
costs milliseconds; where there are none, they are computed from config.json (architecture.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from harness.architecture import architecture, read_config
from harness.errors import ModelError
from harness.files import read_text, readable
from harness.scenario import scenarios_dir
from harness.suggest import did_you_mean

GIB = 2**30

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FORMS = "demo, shape:NAME, shape:path/config.json, a directory with config.json, or a hub name (org/name)"
# A header that claims more than this is no header: the largest models need a few MB.
_LARGEST_HEADER = 100 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Model:
    """Something that can be served."""

    name: str
    """What reports call it: the last part of a path, the hub name, the shape's name."""
    path: Path
    """A directory with config.json, or a hub name in the form of a path."""
    is_local: bool = True
    random_weights: bool = False
    """A shape: only config.json is there, the engine fills in random weights."""

    @property
    def config_path(self) -> Path | None:
        """config.json as far as it is on this machine: in the directory, else in the hub's cache."""
        if self.is_local:
            return self.path / "config.json"
        return _cached_hub_config(str(self.path))


# --- names ------------------------------------------------------------------------------------------------------------


def resolve(value: str) -> Model:
    """The model that `value` names. Raises ModelError for one that cannot be read."""
    if value == "demo":
        return _demo()
    if value.startswith("shape:"):
        return _shape(value.removeprefix("shape:"))
    path = Path(value).expanduser()
    if path.is_dir():
        read_config(path / "config.json")
        return Model(name=path.resolve().name, path=path.resolve())
    if path.exists():
        raise ModelError(
            f"--model {value}: is a file; a model is the directory with its config.json.",
            allowed=_FORMS,
            remedy=f"give {path.parent}, or shape:{value} to measure a bare config.json",
        )
    if _HUB_ID.fullmatch(value):
        return Model(name=value, path=Path(value), is_local=False)
    meant = did_you_mean(value, ("demo", *(f"shape:{name}" for name in known_shapes())))
    raise ModelError(f"--model {value}: no such directory, and not a hub name{meant or '.'}", allowed=_FORMS)


def precision(value: str, known: Collection[str]) -> tuple[str, Model | None]:
    """A `--precisions` item: `awq` (made from the model), or `name=checkpoint` (one that exists, under any name)."""
    name, equals, where = value.partition("=")
    if equals and re.fullmatch(r"\w[\w.+-]*", name) and where:
        return name, resolve(where)
    if value in known:
        return value, None
    raise ModelError(
        f"--precisions: {value!r} is unknown{did_you_mean(value, known) or '.'}",
        allowed=f"{', '.join(known)}; or name=PATH and name=org/model for a checkpoint that exists",
    )


def known_shapes() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (scenarios_dir() / "shapes").glob("*.json")))


def _demo() -> Model:
    path = scenarios_dir() / "demo-model"
    if not (path / "config.json").is_file():
        raise ModelError(
            "--model demo: this installation holds no demo model.", remedy="install kneebench from its wheel"
        )
    return Model(name="demo", path=path)


def _shape(name: str) -> Model:
    """A served directory in the cache that holds the shape's config.json and nothing else."""
    path = Path(name).expanduser()
    if name in known_shapes():
        source, label = scenarios_dir() / "shapes" / f"{name}.json", name
    elif (path / "config.json").is_file():
        source, label = path / "config.json", path.resolve().name
    elif path.is_file():
        source, label = path, path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        raise ModelError(
            f"--model shape:{name}: neither a known shape nor a config.json{did_you_mean(name, known_shapes()) or '.'}",
            allowed=f"{', '.join(known_shapes())}; or shape:path/config.json",
        )
    config = read_config(source)
    text = json.dumps(config, indent=2) + "\n"
    # Named after its content too: two config.json of one name must not overwrite each other.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    served = Path(user_cache_dir("kneebench")) / "shapes" / f"{label}-{digest}"
    try:
        served.mkdir(parents=True, exist_ok=True)
        partial = served / f"config.json.{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(served / "config.json")
    except OSError as error:
        raise ModelError(
            f"--model shape:{name}: {served} cannot be written ({error.strerror}).",
            remedy="set XDG_CACHE_HOME to a directory of yours",
        ) from error
    return Model(name=f"shape:{label}", path=served, random_weights=True)


def _cached_hub_config(hub_id: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted((hub / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return found[-1] if found else None


# --- sizes ------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of one safetensors file, from its header alone."""
    try:
        readable(path, most=sys.maxsize)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = [tuple(tensor["data_offsets"]) for tensor in header.values()]
        if bad := [span for span in spans if len(span) != 2 or not 0 <= span[0] <= span[1]]:
            raise ValueError(f"a tensor from {bad[0][0]} to {bad[0][-1]}")
        end = max((end for _, end in spans), default=0)
        if 8 + length + end > size:
            raise ValueError(f"{8 + length + end - size} bytes are missing at its end")
        return header
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(
            f"{path}: is not a whole safetensors file ({error}).", remedy="fetch or write the checkpoint again"
        ) from error


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files that make up a checkpoint: those its index names, else all of them; () for none."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return tuple(sorted(directory.glob("*.safetensors")))
    try:
        names = sorted(set(json.loads(read_text(index, _LARGEST_HEADER))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: cannot be read ({error}).", remedy="fetch the checkpoint again") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or name != Path(name).name:
            raise ModelError(
                f"{index}: names {name!r} as a file of weights.",
                allowed="names of files in the checkpoint's own directory",
                remedy="do not use this checkpoint: an index that leads elsewhere was made by hand",
            )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing, {missing[0]} the first.",
            remedy="finish the download",
        )
    return tuple(directory / name for name in names)


def weight_bytes(model: Model) -> int | None:
    """Bytes of weights: from the files where they are here, else computed from config.json, else None.

    Raises ModelError for a local checkpoint without weights: found out now, not after a minute of starting.
    """
    if model.is_local and not model.random_weights:
        files = weight_files(model.path)
        if not files:
            pickles = sorted(file.name for suffix in _PICKLES for file in model.path.glob(f"*{suffix}"))
            raise ModelError(
                f"{model.path}: holds {', '.join(pickles[:3]) if pickles else 'no *.safetensors file'}.",
                allowed="*.safetensors; a pickle runs code when it is opened, so none is",
                remedy="convert it with `model.save_pretrained(dir)` where that may run"
                if pickles
                else f"finish the download, or measure the bare architecture with shape:{model.path}",
            )
        return sum(
            int(tensor["data_offsets"][1]) - int(tensor["data_offsets"][0])
            for file in files
            for tensor in read_header(file).values()
        )
    config = model.config_path
    shape = architecture(read_config(config)) if config else None
    return shape.weight_bytes if shape else None


def check_fits(
    model: Model,
    gpu_name: str,
    gpu_memory_gib: float,
    utilization: float,
    max_model_len: int,
    *,
    cards: int = 1,
    kv_cache_dtype: str | None = None,
) -> None:
    """Raise ModelError when weights and the KV cache of a single request cannot fit the share of the card's memory.

    `cards` (tensor times pipeline parallel) share both. Only what cannot work is refused: activations, CUDA's own
    memory and what each card holds a copy of come on top and are the engine's to judge. A `kv_cache_dtype` of 8 bits
    (fp8..., int8) halves the cache.
    """
    weights = weight_bytes(model)
    if weights is None:
        return
    config = model.config_path
    shape = architecture(read_config(config)) if config else None
    cache = shape.kv_bytes_per_token * max_model_len if shape else 0
    if kv_cache_dtype is not None and kv_cache_dtype.startswith(("fp8", "int8")):
        cache //= 2
    usable = cards * gpu_memory_gib * utilization
    needed = (weights + cache) / GIB
    if needed > usable:
        where = gpu_name if cards == 1 else f"{cards} times {gpu_name}"
        each = f"{utilization:.0%} of {gpu_memory_gib:.1f}{'' if cards == 1 else ' each'}"
        raise ModelError(
            f"{model.name} does not fit {where}: {weights / GIB:.1f} GiB of weights and {cache / GIB:.2f} GiB of "
            f"KV cache for one request of {max_model_len} tokens, where {usable:.1f} GiB may be used ({each}).",
            remedy="take a smaller model or a quantized precision, a shorter max_model_len, or a larger card",
        )


def checkpoint_sha256(directory: Path) -> str | None:
    """One digest over config.json and the weights, files by name; None for a directory without weights."""
    files = weight_files(directory)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in (directory / "config.json", *files):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.name} {inner}\n".encode())
    return digest.hexdigest()


def special_ids(directory: Path) -> tuple[int, ...]:
    """Ids of the tokenizer's special tokens (end of text and the like); () where there is no tokenizer.json."""
    try:
        tokenizer = json.loads(read_text(directory / "tokenizer.json", _LARGEST_HEADER))
    except OSError:
        return ()
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{directory / 'tokenizer.json'}: is not JSON ({error}).") from error
    try:
        return tuple(int(token["id"]) for token in tokenizer.get("added_tokens", []) if token.get("special"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{directory / 'tokenizer.json'}: is no tokenizer ({error}).", remedy="fetch the checkpoint again"
        ) from error
