"""Reading a model's directory: which tensors it has, their values one by one, and a hash of it all.

Only safetensors: a pickle runs code when it is opened. Tensors are read when asked for and not before, and no file is
mapped (`shards`), so what is held in memory is what the caller holds, whatever the size of the model.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize import shards
from quantize.errors import ModelError
from quantize.shapes import read_header
from quantize.shards import Elsewhere

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What of a hub repository is fetched: weights, configuration, tokenizer, and the calibration set where one is shipped.
_WANTED = ("*.safetensors", "*.json", "*.jsonl", "*.txt", "*.jinja", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class ModelDir:
    """A model on disk. `files` maps the name of each tensor to the shard that holds it; `config` is config.json."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors, in their stored type, on the CPU. Raises ModelError for a name that is not there."""
        tensors = {}
        for file, wanted in self._by_file(names).items():
            tensors.update(shards.read(file, wanted))
        return tensors

    def where(self, names: Iterable[str]) -> dict[str, Elsewhere]:
        """Those tensors as they lie in their files, unread. Raises ModelError as `read` does."""
        places = {}
        for file, wanted in self._by_file(names).items():
            header = read_header(file)
            places.update({name: Elsewhere(file, header[name]) for name in wanted})
        return places

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        found: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ModelError(
                    f"{self.path} has no tensor {name}", "every tensor that its config.json implies", "Fetch it again"
                )
            found.setdefault(self.files[name], []).append(name)
        return found

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Some rows of one tensor, int64 [n] -> [n, ...], reading no others. Raises ModelError as `read` does."""
        (file,) = self._by_file([name])
        return shards.rows(file, name, indices)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from its file's header. Raises ModelError as `read` does."""
        return self.where([name])[name].stored.shape

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a weight matrix. Raises ModelError where it is none."""
        shape = self.shape(name)
        if len(shape) != 2:
            raise ModelError(f"{name} of shape {shape}", "a matrix", "Fetch the model again")
        return shape[0], shape[1]

    def nbytes(self, name: str) -> int:
        """What one tensor takes in its file, in bytes. Raises ModelError as `read` does."""
        return self.where([name])[name].nbytes

    def names(self, prefix: str) -> list[str]:
        """The names of the tensors under `prefix`, sorted."""
        return sorted(name for name in self.files if name.startswith(prefix))


def locate(model: str | Path) -> Path:
    """A directory for `model`: itself if it is one, else the snapshot of the hub repository of that name."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or len(path.parts) != 2 or str(model).startswith("."):
        raise ModelError(
            f"model = {str(model)!r}, which is no directory",
            "a directory with config.json and *.safetensors, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct",
            "Check the path",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model = {str(model)!r}, which is no directory and could not be fetched ({type(error).__name__})",
            "a directory, or the name of a repository on the hub that this machine may read",
            "Check the name and the network, and log in with `hf auth login` if it is gated",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, or the file itself."""
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is a pipe or a device, and no file")
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: {error}", "a JSON object", "Give a directory that holds a model") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}", "a JSON object", "Give a model's config.json")
    return config


def check_unquantized(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that is quantized already: rounding it again would only add to its error."""
    if "quantization_config" in config:
        raise ModelError(
            f"{path}, which has a quantization_config", "a model in float16, bfloat16 or float32", "Give the original"
        )


def open_model(path: Path) -> ModelDir:
    """Open a model directory and list its tensors, reading no weights.

    Raises ModelError where there is no config.json, no safetensors (pickles are never opened), a shard cut short, or a
    tensor in two shards.
    """
    config = read_config(path)
    there = sorted(path.glob("*.safetensors"))
    if not there:
        pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
        raise ModelError(
            f"{path} holds {', '.join(pickles) if pickles else 'no weights'}",
            "*.safetensors; a pickle runs code when opened, so it never is",
            "Convert it with `model.save_pretrained(dir)` in an environment you trust" if pickles else "Fetch it again",
        )
    files: dict[str, Path] = {}
    for shard in there:
        try:
            with safe_open(shard, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard}: {error}", "a whole safetensors file", "Fetch it again") from error
        if twice := [name for name in names if name in files]:
            raise ModelError(
                f"{path} holds {twice[0]} in {files[twice[0]].name} and in {shard.name}",
                "each tensor once",
                "Remove the shards that are not named in model.safetensors.index.json",
            )
        files.update(dict.fromkeys(names, shard))
    return ModelDir(path, config, files)


def content_hash(path: Path) -> str:
    """sha256 over config.json and every tensor in *.safetensors of a directory: names, types, shapes and bytes.

    It is that of the model's content. Where it lies, when it was written and what else lies there do not count, and
    neither do the notes in a shard's header, which safetensors writes in a different order each time.
    """
    digest = hashlib.sha256()
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        with file.open("rb") as opened:
            head = b""
            if file.suffix == ".safetensors":  # 8 bytes of length, a JSON header of that length, then the tensors
                tensors = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
                tensors.pop("__metadata__", None)
                head = json.dumps(tensors, sort_keys=True).encode()
            body = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{hashlib.sha256(head).hexdigest()} {body} {file.name}\n".encode())
    return digest.hexdigest()
