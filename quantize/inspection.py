"""What lies in a checkpoint: each linear layer's integers, scales and zero points looked at, and what is wrong with it.

    config.json ─► what must be there (`shapes.implied`), and how it is stored (`layout.parse`)
    *.safetensors ─► headers ─► one layer's tensors at a time ─► `Layer`

Memory is that of the largest layer, whatever the checkpoint's size; every weight is read once, so a large one takes as
long as its disk. What the figures of a layer are is in `examine`.

A finding is a fault where the checkpoint is damaged or would be served with other weights than were meant, else a note.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.errors import ModelError
from quantize.examine import Finding, Findings, Layer, module
from quantize.inspection_table import show
from quantize.layout import parse
from quantize.shapes import Implied, Stored, implied, read_header
from quantize.weights import content_hash, read_config

_INDEX = "model.safetensors.index.json"
_RECORD = "quantize.json"

__all__ = ["Finding", "Inspection", "Kept", "Layer", "inspect", "show", "to_json"]

Progress = Callable[[int, int], None]
"""Called with the modules read and the modules in all."""


@dataclass(frozen=True)
class Kept:
    """Tensors of one kind that are no quantized layer, and why they are as they are."""

    what: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    why: str


@dataclass(frozen=True)
class Inspection:
    """format: None for a model that is not quantized. disk_bytes: of the shards; tensor_bytes: of what they hold;
    bf16_bytes: of the same parameters at 2 bytes each. record: quantize.json, where this tool made the checkpoint."""

    path: str
    model_type: str
    format: str | None
    shards: int
    disk_bytes: int
    tensor_bytes: int
    parameters: int
    bf16_bytes: int
    tied: bool | None
    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    record: Mapping[str, Any] | None
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.fault)


def inspect(path: Path, progress: Progress | None = None) -> Inspection:
    """Look at the checkpoint or model in the directory `path`.

    What is damaged is a finding, as far as the rest can still be read. Raises ModelError for a directory that is no
    model's, SchemeError for a format that is not read here.
    """
    if not path.is_dir():
        raise ModelError(f"{path}, which is no directory", "one with config.json and *.safetensors", "Check the path")
    config = read_config(path)
    described = config.get("quantization_config")
    layout = parse(described) if described else None
    met = Findings()
    stored, files, lost = _tensors(path, met)
    known = _implied(config, met)
    record = _record(path, met)

    parts: dict[str, list[str]] = {}
    order = {name.removesuffix(".weight"): i for i, name in enumerate(known.tensors)} if known else {}
    for name in sorted(stored, key=lambda name: (order.get(name.rpartition(".")[0], len(order)), _natural(name))):
        owner, _, part = name.rpartition(".")
        parts.setdefault(owner, []).append(part)
    layers: list[Layer] = []
    kept: dict[tuple[str, str, str], list[Stored]] = {}
    with _reader(files) as read:
        for done, (owner, names) in enumerate(parts.items(), start=1):
            layer, rest = module(read, layout, owner, names, stored, known, met)
            if layer is not None:
                layers.append(layer)
            for part in rest:
                tensor = stored[name := f"{owner}.{part}" if owner else part]
                what, why = _why(name, tensor, known)
                kept.setdefault((what, tensor.dtype, why), []).append(tensor)
            if progress:
                progress(done, len(parts))
    _compare(known, {layer.name for layer in layers}, stored, lost, met)

    held = [
        Kept(what, dtype, len(t), sum(s.numel for s in t), sum(s.bytes for s in t), why)
        for (what, dtype, why), t in kept.items()
    ]
    parameters = sum(layer.parameters for layer in layers) + sum(each.parameters for each in held)
    shards = sorted(set(files.values()))
    return Inspection(
        path=str(path),
        model_type=str(config.get("model_type")),
        format=layout.format if layout else None,
        shards=len(shards),
        disk_bytes=sum(file.stat().st_size for file in shards),
        tensor_bytes=sum(tensor.bytes for tensor in stored.values()),
        parameters=parameters,
        bf16_bytes=2 * parameters,
        tied=known.tied if known else config.get("tie_word_embeddings"),
        layers=tuple(layers),
        kept=tuple(held),
        record=record,
        findings=met.all(),
    )


def to_json(inspection: Inspection) -> str:
    """All of it. A figure that is NaN or infinite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    fields = asdict(inspection)
    for layer, values in zip(inspection.layers, fields["layers"], strict=True):
        values |= {"parameters": layer.parameters, "bits_per_weight": layer.bits_per_weight}
    return json.dumps(plain(fields), indent=2, allow_nan=False)


# --- the files --------------------------------------------------------------------------------------------------------


def _tensors(path: Path, met: Findings) -> tuple[dict[str, Stored], dict[str, Path], set[str]]:
    """The tensors that can be read, their files, and the names of those that the index promises and no file gives.

    Without an index a file that cannot be read may have held anything: "*".
    """
    present = {file.name: file for file in sorted(path.glob("*.safetensors"))}
    index: Mapping[str, str] = {}
    if (file := path / _INDEX).is_file():
        try:
            index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            listed = sorted(set(index.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: {error!r}", "an index with a weight_map", "Fetch it again") from error
        for name in listed:
            if name not in present:
                met.add(True, "shard that the index names and the directory lacks", name)
        for name in sorted(present.keys() - set(listed)):
            met.add(False, "file that the index does not name, not looked at", name)
        present = {name: present[name] for name in listed if name in present}
        whole = bool(listed)
    else:
        whole = bool(present)
    if not whole:
        raise ModelError(f"{path}, which holds no weights", "a directory with *.safetensors", "Check the path")
    stored: dict[str, Stored] = {}
    files: dict[str, Path] = {}
    for file in present.values():
        try:
            header = read_header(file)
            with safe_open(file, framework="pt"):
                pass
        except (ModelError, SafetensorError) as error:
            what = error.given if isinstance(error, ModelError) else f"{file.name}: {error}"
            met.add(True, f"{what}; nothing in it was looked at", file.name)
            continue
        for name, tensor in header.items():
            if name in stored:
                met.add(True, f"tensor in {files[name].name} and in {file.name}", name)
            elif index and index.get(name) != file.name:
                met.add(False, "tensor that the index does not name, not looked at", name)
            else:
                stored[name], files[name] = tensor, file
    readable = set(files.values())
    for name, shard in index.items():
        if name not in stored and path / shard in readable:
            met.add(True, "tensor that the index names and its file lacks", name)
    broken = len(readable) < len(present) and not index
    return stored, files, {name for name in index if name not in stored} | ({"*"} if broken else set())


@contextmanager
def _reader(files: Mapping[str, Path]) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor; each file stays open, since its header is read whenever it is opened."""
    with ExitStack() as opened:
        handles = {file: opened.enter_context(safe_open(file, framework="pt")) for file in sorted(set(files.values()))}
        yield lambda name: handles[files[name]].get_tensor(name)


def _implied(config: Mapping[str, Any], met: Findings) -> Implied | None:
    try:
        return implied(config)
    except ModelError as error:
        met.add(False, f"{error.given}: not checked which tensors must be there")
        return None


def _record(path: Path, met: Findings) -> Mapping[str, Any] | None:
    """quantize.json, its hash held against the files."""
    if not (path / _RECORD).is_file():
        return None
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        noted = record.get("checkpoint_sha256")
    except (OSError, ValueError, AttributeError) as error:
        met.add(True, f"{_RECORD} cannot be read ({error})")
        return None
    try:
        if noted and content_hash(path) != noted:
            met.add(True, f"the files are not those whose hash {_RECORD} notes")
    except (OSError, ValueError, KeyError):
        pass  # a shard that is no safetensors file, which is told already
    return dict(record)


def _compare(
    known: Implied | None, layers: set[str], stored: Mapping[str, Stored], lost: set[str], met: Findings
) -> None:
    """What config.json implies, held against what is there."""
    if known is None:
        return
    for name, shape in known.tensors.items():
        module = name.removesuffix(".weight")
        if name in stored:
            if module not in layers and stored[name].shape != shape:
                found = list(stored[name].shape)
                met.add(True, f"shape {found} where config.json implies {list(shape)}", name)
        elif module not in layers and not lost & {name, "*"} and not _part_of(module, stored, lost):
            met.add(True, "tensor that config.json implies and no file holds", name)
    for name in stored:
        module, _, part = name.rpartition(".")
        if name not in known.tensors and module not in layers and f"{module}.weight" not in known.tensors:
            if known.tied and name == "lm_head.weight":
                met.add(False, "output head that is stored although it is tied to the embeddings", name)
            else:
                met.add(False, "tensor that config.json does not imply", name)


def _part_of(module: str, stored: Mapping[str, Stored], lost: set[str]) -> bool:
    """Whether something of a quantized layer is there, or was promised: then its own finding says what is not."""
    prefix = f"{module}."
    return any(name.startswith(prefix) and name.count(".") == prefix.count(".") for name in (*stored, *lost))


def _why(name: str, tensor: Stored, known: Implied | None) -> tuple[str, str]:
    """What a tensor is that is no quantized layer, and why it is not one."""
    if len(tensor.shape) == 2 and "embed" in name:
        tied = "; the output head is the same matrix" if known and known.tied else ""
        return "embeddings", f"looked up, not multiplied{tied}"
    if name.startswith("lm_head."):
        return "output head", "its error is the logits' own"
    if name.endswith(".bias"):
        return "biases", "one number an output"
    if len(tensor.shape) == 1:
        return "norms", "one number a channel"
    return "others", "not of a kind that is quantized"


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
