"""A checkpoint on disk, whole or not there at all; and while it is made, a draft that a killed run goes on from.

    <out>/config.json                       the source's, with the quantization_config that vLLM and transformers read
          model-00001-of-0000N.safetensors  one shard a decoder block, the last one everything else
          model.safetensors.index.json
          quantize.json                     what made it: recipe, calibration, source, tool, hashes, each layer's fate
          README.md                         the same for a reader
          tokenizer*, chat_template*, ...   carried from the source

The draft is a hidden sibling, `.<out>.unfinished`, flushed to the disk and renamed when all is there: a reader finds a
finished checkpoint or none. After each block it holds that block's shard and the hidden states that the next block
starts from, and then a note that says so; a run with the same key (model, recipe, calibration) goes on from the note. A
draft of another key is thrown away.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize import formats, lock
from quantize.errors import OutputError, RunError
from quantize.methods import Layer
from quantize.scheme import Quantized, Scheme
from quantize.store import Store
from quantize.weights import content_hash

RECORD = "quantize.json"
_INDEX = "model.safetensors.index.json"
_NOTE = ".progress.json"
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


def pack_block(
    prefix: str, kept: Mapping[str, Tensor], quantized: Mapping[str, tuple[Quantized, Scheme]], format: str
) -> dict[str, Tensor]:
    """The tensors of one block as stored: `kept` as they are, each of `quantized` in the parts of `format`."""
    tensors = {prefix + name: tensor.contiguous() for name, tensor in kept.items()}
    for name, (values, scheme) in quantized.items():
        for part, tensor in formats.pack(format, values, scheme).items():
            tensors[f"{prefix}{name}.{part}"] = tensor.cpu().contiguous()
    return tensors


class Draft:
    """A checkpoint under way in `path`, of `shards` shards. `done` of its blocks are finished, `layers` their fate."""

    def __init__(self, path: Path, key: str, shards: int, metadata: Mapping[str, str]) -> None:
        self.path, self.key, self.shards, self.metadata = path, key, shards, metadata
        self.done = 0
        self.layers: list[Layer] = []
        self._hidden: list[str] = []
        self._read_note()

    def add_block(self, tensors: Mapping[str, Tensor], layers: Sequence[Layer], store: Store | None) -> None:
        """Write the next block's shard, then the hidden states after it, then the note that both are there."""
        self.add(tensors, self.done + 1)
        self.layers.extend(layers)
        self.done += 1
        self._write_note(self._save_hidden(store) if store else [])
        shutil.rmtree(self._hidden_of(self.done - 1), ignore_errors=True)

    def hold(self) -> None:
        """Have what lies in `path` kept for the next run, though no block is finished yet."""
        if not (self.path / _NOTE).is_file():
            self._write_note([])

    @property
    def held(self) -> bool:
        """Whether a later run can go on from what is there."""
        return (self.path / _NOTE).is_file()

    def _write_note(self, names: Sequence[str]) -> None:
        note = {
            "key": self.key,
            "done": self.done,
            "hidden": list(names),
            "layers": [asdict(layer) for layer in self.layers],
        }
        partial = self.path / (_NOTE + ".partial")
        partial.write_text(json.dumps(note))
        partial.replace(self.path / _NOTE)

    def add(self, tensors: Mapping[str, Tensor], number: int) -> None:
        """Write shard `number`, counted from 1."""
        partial = self.path / f".{number}.partial"
        save_file(dict(tensors), partial, metadata={"format": "pt", **self.metadata})
        partial.replace(self.path / self._shard(number))

    def restore(self, store: Store) -> None:
        """Put the hidden states after the last finished block into `store`, as `walk` wants them."""
        for name in self._hidden:
            store.put(name, torch.from_numpy(np.load(self._hidden_of(self.done) / f"{name}.npy")))

    def finish(self) -> None:
        """Write the index of the shards, and remove what only an unfinished run needs."""
        weight_map, total = {}, 0
        for number in range(1, self.shards + 1):
            name = self._shard(number)
            with safe_open(self.path / name, framework="pt") as shard:
                weight_map.update(dict.fromkeys(shard.keys(), name))
            with (self.path / name).open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
            total += (self.path / name).stat().st_size - 8 - header
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / _INDEX, index)
        shutil.rmtree(self._hidden_of(self.done), ignore_errors=True)
        (self.path / _NOTE).unlink(missing_ok=True)

    def _shard(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def _hidden_of(self, done: int) -> Path:
        return self.path / f".hidden-{done}"

    def _save_hidden(self, store: Store) -> list[str]:
        folder = self._hidden_of(self.done)
        folder.mkdir(exist_ok=True)
        names = [name for name in store.names() if name.startswith("hidden.")]
        store.save(names, folder)
        return names

    def _read_note(self) -> None:
        """Go on from the note, or from nothing where there is none of this key or it does not hold."""
        try:
            note = json.loads((self.path / _NOTE).read_text())
            if note["key"] != self.key:
                raise ValueError("another checkpoint's")
            for number in range(1, note["done"] + 1):
                with safe_open(self.path / self._shard(number), framework="pt"):
                    pass
            self.done, self._hidden = note["done"], note["hidden"]
            for name in self._hidden:
                np.load(self._hidden_of(self.done) / f"{name}.npy", mmap_mode="r")
            self.layers = [Layer(**layer) for layer in note["layers"]]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            self.done, self._hidden, self.layers = 0, [], []
            for item in self.path.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()


def describe(
    draft: Path,
    source: Path,
    config: Mapping[str, Any],
    plan: Mapping[str, Scheme | None],
    format: str,
    record: Mapping[str, Any],
) -> str:
    """Write into `draft` all that is not weights; returns its content hash, which quantize.json holds as well.

    With the weights there already this completes a checkpoint. Without them it makes one for vLLM's
    --load-format dummy, which times a model's shape and needs no more.
    """
    schemes = {name: scheme for name, scheme in plan.items() if scheme}
    kept = [name for name in dict.fromkeys([*plan, formats.HEAD]) if not plan.get(name)]
    quantization = formats.quantization_config(format, schemes, kept)
    write_json(draft / "config.json", dict(config) | {"quantization_config": quantization})
    carry(source, draft)
    digest = content_hash(draft)
    write_json(draft / RECORD, {**record, "checkpoint_sha256": digest})
    (draft / "README.md").write_text(_card(record, schemes, kept, format))
    return digest


def carry(source: Path, draft: Path) -> None:
    """Copy what a server needs besides weights and config.json: the tokenizer, the chat template, how to generate."""
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, draft / file.name)


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


def unfinished(out: Path) -> Path:
    """Where the draft of `out` lies."""
    return out.parent / f".{out.name}.unfinished"


@contextmanager
def drafted(out: Path, key: str, shards: int, metadata: Mapping[str, str]) -> Iterator[Draft]:
    """A draft that becomes `out` when the body ends. When it fails, finished blocks stay for the next run.

    Raises OutputError where another run holds the draft or `out` cannot be made, RunError where the disk is full.
    """
    path = unfinished(out)
    taken = f"{path}, which another run is writing to"
    with lock.held(path, out, taken, "Wait for it, or choose another --out"):
        draft = Draft(path, key, shards, metadata)
        try:
            yield draft
            _publish(path, out)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path} could not be written ({error})",
                "a disk with room for the checkpoint",
                f"Make room and run it again: {draft.done} finished blocks are kept",
            ) from error
        finally:
            if path.exists() and not draft.held:
                shutil.rmtree(path, ignore_errors=True)


def _publish(draft: Path, out: Path) -> None:
    draft.chmod(0o755)
    for file in draft.iterdir():
        file.chmod(0o644)  # safetensors makes its files private, and a server may run as somebody else
        _sync(file)
    _sync(draft)
    try:
        draft.rename(out)  # replaces an empty directory, and fails on any other
    except OSError as error:
        raise OutputError(
            f"{out}, which exists and is not empty", "a new or empty directory", "Another run may have written it: look"
        ) from error
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _card(record: Mapping[str, Any], schemes: Mapping[str, Scheme], kept: Sequence[str], format: str) -> str:
    """The model card: what this is, how it was made, and how to serve it."""
    linears = [name for name in kept if name != formats.HEAD]
    head = f", {formats.HEAD}" if formats.HEAD in kept else ""
    among = str(schemes.get(formats.HEAD))
    counts: dict[str, int] = {}
    for scheme in schemes.values():
        counts[str(scheme)] = counts.get(str(scheme), 0) + 1
    recipe, training = record["recipe"], record.get("training")
    trained = []
    if training:
        loss = f"{training['heldout_at_start']:.4g} before, {training['heldout']:.4g} after, nats a token"
        trained = [
            ("trained", f"{training['steps']} steps from {recipe['training']['start']}, {training['tokens']:,} tokens"),
            ("on", training["corpus"]),
            ("loss on text kept out of it", loss),
        ]
    rows = [
        ("source", f"{_title(record['source'])} (sha256 {record['source_sha256'][:16]})"),
        ("method", recipe["method"]),
        ("schemes", "; ".join(f"{s}: {n} layers{' with lm_head' if s == among else ''}" for s, n in counts.items())),
        ("in 16 bits", f"embeddings, norms{head} and {len(linears)} linear layers"),
        ("format", format),
        ("calibration", record["calibration"] or "none"),
        *trained,
        ("recipe sha256", record["recipe_sha256"][:16]),
        ("made by", record["tool"]),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# {_title(record['source'])}, quantized with {recipe['method']}\n\n| | |\n| --- | --- |\n{table}\n\n"
        "Serve it with `vllm serve` and this directory. What each layer lost is in `quantize.json`; nothing here was\n"
        "evaluated on tasks.\n"
    )


def _title(source: str) -> str:
    """A hub name as it is; of a path the last part alone, since the rest is somebody's machine."""
    return Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source
