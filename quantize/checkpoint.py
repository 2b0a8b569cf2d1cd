"""A checkpoint on disk, whole or not there at all; and while it is made, a draft that a killed run goes on from.

    <out>/config.json                       the source's, with the quantization_config that vLLM and transformers read
          model-00001-of-0000N.safetensors  a shard for each decoder block, then one for everything else; more where a
                                            block, or all else, has more bytes than a shard may have
          model.safetensors.index.json
          quantize.json                     what made it: recipe, calibration, source, tool, hashes, each layer's fate
          README.md                         the same for a reader
          tokenizer*, chat_template*, ...   carried from the source

The draft is a hidden sibling, `.<out>.unfinished`, flushed to the disk and renamed when all is there: a reader finds a
finished checkpoint or none. After each block it holds that block's shards and the hidden states that the next block
starts from, and then a note that says so, each on the disk before the next; a run with the same key (model, recipe,
calibration) goes on from the note. A draft of another key is thrown away, and so is one whose files are not whole.
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
from torch import Tensor

from quantize import formats, lock, shards
from quantize.errors import ModelError, OutputError, RunError
from quantize.methods import Layer
from quantize.scheme import Quantized, Scheme
from quantize.shapes import read_header
from quantize.shards import Source
from quantize.store import Store
from quantize.weights import content_hash

RECORD = "quantize.json"
_INDEX = "model.safetensors.index.json"
_NOTE = ".progress.json"
_HIDDEN = ".hidden-"
_SCRATCH = ".scratch"

SHARD_BYTES = 5 * 10**9
"""The most that a shard holds, unless a single tensor has more: the hub's own limit, which its readers expect."""

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
    """A checkpoint under way in `path`, in shards of at most `shard_bytes`.

    `done` of its blocks are finished, and `layers` is their fate; `scratch` is for what only this process needs.
    """

    def __init__(self, path: Path, key: str, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self.path, self.key, self.metadata, self.shard_bytes = path, key, metadata, shard_bytes
        self.scratch = path / _SCRATCH
        self.done = 0
        self.layers: list[Layer] = []
        self._shards = 0
        self._hidden: list[str] = []
        self._read_note()
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a process that was killed
        self.scratch.mkdir()

    def add_block(self, tensors: Mapping[str, Source], layers: Sequence[Layer], store: Store | None) -> None:
        """Write the next block's shards, then the hidden states after it, then the note that both are there."""
        self.add(tensors)
        names = self._save_hidden(store) if store else []
        self._write_note(self.done + 1, [*self.layers, *layers], names)
        self.layers.extend(layers)
        self.done += 1
        shutil.rmtree(self._hidden_of(self.done - 1), ignore_errors=True)

    def hold(self) -> None:
        """Have what lies in `path` kept for the next run, though no block is finished yet."""
        if not self.held:
            self._write_note(0, [], [])

    @property
    def held(self) -> bool:
        """Whether a later run can go on from what is there."""
        return (self.path / _NOTE).is_file()

    def _write_note(self, done: int, layers: Sequence[Layer], hidden: Sequence[str]) -> None:
        note = {
            "key": self.key,
            "done": done,
            "shards": self._shards,
            "hidden": list(hidden),
            "layers": [asdict(layer) for layer in layers],
        }
        partial = self.path / (_NOTE + ".partial")
        partial.write_text(json.dumps(note))
        _sync(partial)
        partial.replace(self.path / _NOTE)
        _sync(self.path)

    def add(self, tensors: Mapping[str, Source]) -> None:
        """Write the next shard, or several where `tensors` are too many for one."""
        for part in shards.split(tensors, self.shard_bytes):
            partial = self.path / ".shard.partial"
            shards.write(partial, part, {"format": "pt", **self.metadata})
            self._shards += 1
            partial.replace(self._shard(self._shards))

    def restore(self, store: Store) -> None:
        """Put the hidden states after the last finished block into `store`, as `walk` wants them."""
        for name in self._hidden:
            store.put(name, torch.from_numpy(np.load(self._hidden_of(self.done) / f"{name}.npy")))

    def finish(self) -> None:
        """Give the shards their last names and write their index.

        What a later run would go on from stays until the checkpoint has its place: the last blocks are not lost to a
        kill while all is hashed.
        """
        weight_map, total = {}, 0
        for number in range(1, self._shards + 1):
            name = f"model-{number:05d}-of-{self._shards:05d}.safetensors"
            self._shard(number).replace(self.path / name)
            header = read_header(self.path / name)
            weight_map.update(dict.fromkeys(header, name))
            total += sum(tensor.bytes for tensor in header.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / _INDEX, index)

    def _shard(self, number: int) -> Path:
        """Where a shard lies: how many there will be, which its last name says, is not known yet, unless a run was
        killed that knew it."""
        plain = self.path / f"model-{number:05d}.safetensors"
        return plain if plain.exists() else next(self.path.glob(f"model-{number:05d}-of-*.safetensors"), plain)

    def _hidden_of(self, done: int) -> Path:
        return self.path / f"{_HIDDEN}{done}"

    def _save_hidden(self, store: Store) -> list[str]:
        folder = self._hidden_of(self.done + 1)
        folder.mkdir(exist_ok=True)
        names = [name for name in store.names() if name.startswith("hidden.")]
        store.save(names, folder)
        for name in names:
            _sync(folder / f"{name}.npy")
        _sync(folder)
        return names

    def _read_note(self) -> None:
        """Go on from the note, or from nothing where there is none of this key or it does not hold."""
        try:
            note = json.loads((self.path / _NOTE).read_text())
            if note["key"] != self.key:
                raise ValueError("another checkpoint's")
            for number in range(1, note["shards"] + 1):
                read_header(self._shard(number))
            for name in note["hidden"]:
                np.load(self._hidden_of(note["done"]) / f"{name}.npy", mmap_mode="r")
            layers = [Layer(**layer) for layer in note["layers"]]
            self.done, self._shards, self._hidden, self.layers = note["done"], note["shards"], note["hidden"], layers
        except (OSError, EOFError, ValueError, KeyError, TypeError, ModelError):
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
    _tidy(path)
    return digest


def unfinished(out: Path) -> Path:
    """Where the draft of `out` lies."""
    return out.parent / f".{out.name}.unfinished"


@contextmanager
def drafted(out: Path, key: str, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> Iterator[Draft]:
    """A draft that becomes `out` when the body ends. When it fails, finished blocks stay for the next run.

    Raises OutputError where another run holds the draft or `out` cannot be made, RunError where the disk is full.
    """
    path = unfinished(out)
    taken = f"{path}, which another run is writing to"
    with lock.held(path, out, taken, "Wait for it, or choose another --out"):
        draft = Draft(path, key, metadata, shard_bytes)
        try:
            yield draft
            _publish(path, out)
        except OSError as error:
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
    shutil.rmtree(draft / _SCRATCH, ignore_errors=True)
    for file in draft.iterdir():
        if file.is_file():
            file.chmod(0o644)  # whatever the umask, for a server may run as somebody else
            _sync(file)
    _sync(draft)
    try:
        draft.rename(out)  # replaces an empty directory, and fails on any other
    except OSError as error:
        raise OutputError(
            f"{out}, which exists and is not empty", "a new or empty directory", "Another run may have written it: look"
        ) from error
    _tidy(out)
    _sync(out.parent)


def _tidy(path: Path) -> None:
    """Remove what only an unfinished run needs: it is in a finished checkpoint if the run was killed at that moment."""
    for folder in path.glob(f"{_HIDDEN}*"):
        shutil.rmtree(folder)
    if (path / _NOTE).exists():
        (path / _NOTE).unlink()


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
