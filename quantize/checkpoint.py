"""An AutoAWQ-layout checkpoint on disk, whole or not there at all.

    <out>/config.json                       the source's, with the quantization_config that vLLM and transformers read
          model-00001-of-0000N.safetensors  one shard a decoder block, the last one everything else
          model.safetensors.index.json
          quantize.json                     what made it: recipe, calibration, source, tool, hashes
          tokenizer*, chat_template*, ...   carried from the source

It is written into a temporary sibling, flushed to the disk, and renamed: a reader finds a finished checkpoint or none,
and a run that dies leaves nothing that looks like one. One shard a block keeps one block in memory, and is what a run
that was interrupted could go on from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import OutputError
from quantize.packing import pack_awq
from quantize.scheme import Quantized, Scheme
from quantize.weights import content_hash

RECORD = "quantize.json"
_INDEX = "model.safetensors.index.json"
_CARRIED = (
    "tokenizer*",
    "chat_template*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "LICENSE*",
)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The part of config.json that says how the weights are stored, in AutoAWQ's words."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": not scheme.symmetric,
        "modules_to_not_convert": ["lm_head"],
    }


def pack_block(prefix: str, kept: Mapping[str, Tensor], quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """The tensors of one block as stored: `kept` as they are, each of `quantized` as qweight, qzeros and scales."""
    tensors = {prefix + name: tensor.contiguous() for name, tensor in kept.items()}
    for name, values in quantized.items():
        for part, tensor in pack_awq(values)._asdict().items():
            tensors[f"{prefix}{name}.{part}"] = tensor.cpu()
    return tensors


class Writer:
    """The shards of a checkpoint under way in `draft`, of which there will be `shards`."""

    def __init__(self, draft: Path, shards: int, metadata: Mapping[str, str]) -> None:
        self.draft, self.shards, self.metadata = draft, shards, metadata
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard."""
        self._written += 1
        name = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        save_file(dict(tensors), self.draft / name, metadata={"format": "pt", **self.metadata})
        self._weight_map.update(dict.fromkeys(tensors, name))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index of the shards."""
        total = {"total_size": self._bytes}
        _write_json(self.draft / _INDEX, {"metadata": total, "weight_map": dict(sorted(self._weight_map.items()))})


def describe(draft: Path, source: Path, config: Mapping[str, Any], scheme: Scheme, record: Mapping[str, Any]) -> str:
    """Write into `draft` all that is not weights; returns its content hash, which quantize.json holds as well.

    With the weights there already this completes a checkpoint. Without them it makes one for vLLM's
    --load-format dummy, which times a model's shape and needs no more.
    """
    _write_json(draft / "config.json", dict(config) | {"quantization_config": quantization_config(scheme)})
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, draft / file.name)
    digest = content_hash(draft)
    _write_json(draft / RECORD, {**record, "checkpoint_sha256": digest})
    return digest


def finished(path: Path, key: str) -> str | None:
    """The content hash of the checkpoint at `path` if it is the one of `key`; None where there is nothing.

    Raises OutputError where something else is there, or where the files no longer are what was written.
    """
    if not path.exists():
        return None
    try:
        record = json.loads((path / RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or record.get("key") != key:
        if path.is_dir() and not any(path.iterdir()):
            return None
        raise OutputError(
            f"{path}, which exists and is not this checkpoint",
            "a new or empty directory, or the finished checkpoint of the same model, recipe and calibration",
            "Choose another --out, or remove it",
        )
    try:
        digest = content_hash(path)
    except (OSError, ValueError):
        digest = ""
    if digest != record.get("checkpoint_sha256"):
        raise OutputError(f"{path}, whose files changed since they were written", "its own bytes", "Remove it")
    return digest


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A directory to write into that becomes `out` when the body ends, and disappears when the body fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: {error}", "a directory that can be created", "Choose another --out") from error
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp and safetensors make theirs private, and a server may run as somebody else
        for file in draft.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(draft)
        _rename(draft, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, out: Path) -> None:
    try:
        draft.rename(out)  # replaces an empty directory, and fails on any other
    except OSError as error:
        raise OutputError(
            f"{out}, which exists and is not empty", "a new or empty directory", "Another run may have written it: look"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
