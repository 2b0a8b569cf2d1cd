"""Where activations wait: in memory up to a budget, on disk above it."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BUDGET = 0
"""Bytes kept in memory by default: none, for what is on disk the kernel caches as far as it has room, and takes back
when others want it. On the demo model that costs a tenth of the time and saves 330 MiB."""


class Store:
    """Float32 tensors by name. What does not fit the budget lies in files of a directory that goes when the store does.

    They are <name>.npy. A file is read and written, never mapped: what the kernel keeps of it in its page cache is the
    machine's to take back, and counts as nobody's memory. Any thread may `get`; one of them changes what is kept.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        """`budget` in bytes; `directory` is where the files' own directory is made, the system's choice by default."""
        self.budget = budget
        self._parent = directory
        self._directory: Path | None = None
        self._held: dict[str, Tensor] = {}
        self._spilled: dict[str, Path] = {}
        self._files: set[Path] = set()  # written before: the next tensor of that name goes over the old one's pages
        self._bytes = 0
        self.spilled_bytes = 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor` under `name`, in place of what was there."""
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held.nbytes
        if self._bytes + tensor.nbytes <= self.budget:
            self._spilled.pop(name, None)
            self._held[name] = tensor
            self._bytes += tensor.nbytes
            return
        path = self._file(name)
        with open(path, "r+b" if path in self._files else "wb") as file:
            np.save(file, tensor.numpy())
            file.truncate()
        self._files.add(path)
        self._spilled[name] = path
        self.spilled_bytes += tensor.nbytes

    def names(self) -> list[str]:
        """The names of all that is kept, sorted."""
        return sorted([*self._held, *self._spilled])

    def get(self, name: str) -> Tensor:
        """The tensor of that name; KeyError if there is none."""
        if name in self._held:
            return self._held[name]
        return torch.from_numpy(np.load(self._spilled[name]))

    def drop(self, name: str) -> None:
        """Keep the tensor of that name no longer."""
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held.nbytes
        self._spilled.pop(name, None)

    def save(self, names: Iterable[str], folder: Path) -> None:
        """Leave the tensors `names` in `folder`, as <name>.npy, where they stay when the store goes.

        Those that are in files are not copied: the file moves, and is read there until another takes its place.
        """
        for name in names:
            path = folder / f"{name}.npy"
            if name in self._held:
                np.save(path, self._held[name].numpy())
            else:
                self._spilled[name].replace(path)
                self._files.discard(self._spilled[name])
                self._spilled[name] = path

    def close(self) -> None:
        """Forget all, and remove the files."""
        self._held.clear()
        self._spilled.clear()
        self._files.clear()
        self._bytes = 0
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _file(self, name: str) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="kneebench-", dir=self._parent))
        return self._directory / f"{name}.npy"
