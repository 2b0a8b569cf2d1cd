"""What every runner shares: its arguments, its clock, its memory, the dense weights it leaves, the line it prints.

A runner is a small script that one tool's own interpreter executes, so this file asks for torch, transformers and
safetensors, and nothing else. It is given a model, one file of calibration tokens and a scheme; it leaves
OUT/dense.safetensors in float32, with exactly the weights that a kernel multiplies with: (q - z) s from what the tool
wrote to disk, not from what it held in memory, whose type may round. Its last line on stdout is one JSON object:

    seconds        the quantization call alone; load_seconds and save_seconds stand beside it
    before_mib     resident memory after the imports, before the model was loaded
    peak_mib       highest resident memory up to the end of the quantization call; saved_mib up to the end of saving
    versions       of the tool and of what it stands on
    notes          what had to be changed or set for the tool to run at all
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DENSE = "dense.safetensors"


def arguments() -> argparse.Namespace:
    """The command line of a runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help='jsonl of {"input_ids": [...]}, one length')
    parser.add_argument("--method", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="auto: as the model is stored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def sequences(path: Path) -> list[list[int]]:
    """The calibration tokens, which every tool gets in this order."""
    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]


def import_architecture(model: Path) -> None:
    """Import the code of `model`'s architecture: some tools do when they are imported, others when the model is loaded.

    Without it the same library would count as memory of the quantization for the one and not for the other.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if type(config := AutoConfig.from_pretrained(model)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SystemExit(f"{model}: transformers has no causal language model for {config.model_type!r}")
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


class Report:
    """Collects what a runner prints. Memory in MiB, times in seconds."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.fields: dict[str, Any] = {"versions": {p: version(p) for p in packages}, "notes": []}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Wall time of the body, as `name`."""
        began = time.perf_counter()
        yield
        self.fields[name] = round(time.perf_counter() - began, 3)

    def resident(self, name: str) -> None:
        """Resident memory now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.fields[name] = round(pages * resource.getpagesize() / 2**20, 1)

    def peak(self, name: str) -> None:
        """Highest resident memory so far.

        VmHWM and not ru_maxrss: the latter outlives exec, so a small child of a large parent shows the parent's.
        """
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        self.fields[name] = round(kib / 2**10, 1)

    def say(self) -> None:
        """Print the line. Call it last."""
        print(json.dumps(self.fields), flush=True)


# --- what was written to disk, as the numbers a kernel multiplies with ------------------------------------------------


def read(folder: Path, names: str = "model*.safetensors") -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob(names)):
        with safe_open(shard, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    return tensors


def fields_of(words: Tensor, bits: int, count: int) -> Tensor:
    """The unsigned `bits`-wide fields of each row of `words`, int32 [rows, words], as int64 [rows, count].

    A row is one stream of bits, lowest first; with 3 bits a field may lie across two words.
    """
    places = torch.arange(32)
    stream = ((words[..., None] >> places) & 1).flatten(1)[:, : count * bits].view(words.shape[0], count, bits)
    return (stream.long() << torch.arange(bits)).sum(dim=-1)


def grouped(q: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(q - z) s in float32 [out, in], from q [out, in] and zeros, scales [out, groups]."""
    rows, columns = q.shape
    q = q.view(rows, scales.shape[1], -1).float()
    return ((q - zeros.float()[..., None]) * scales.float()[..., None]).view(rows, columns)


def from_gptq(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Dense tensors of a GPTQ v1 checkpoint: qweight packs inputs, qzeros packs outputs and holds z - 1."""

    def weight(name: str) -> Tensor:
        scales, index = tensors[f"{name}.scales"], tensors[f"{name}.g_idx"].long()  # [groups, out], [in]
        q = fields_of(tensors[f"{name}.qweight"].T.contiguous(), bits, len(index))
        zeros = (fields_of(tensors[f"{name}.qzeros"], bits, scales.shape[1]) + 1) & (2**bits - 1)
        return (q - zeros.T[:, index]).float() * scales.T.float()[:, index]

    return _dense(tensors, (".qweight", ".qzeros", ".scales", ".g_idx"), weight)


def from_compressed(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Dense tensors of a compressed-tensors "pack-quantized" checkpoint; q and z are both stored + 2^(bits - 1)."""

    def weight(name: str) -> Tensor:
        scales = tensors[f"{name}.weight_scale"]
        rows, columns = (int(n) for n in tensors[f"{name}.weight_shape"])
        q = fields_of(tensors[f"{name}.weight_packed"], bits, columns)
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int64)
        if (packed := tensors.get(f"{name}.weight_zero_point")) is not None:
            zeros = fields_of(packed.T.contiguous(), bits, rows).T
        return grouped(q, zeros, scales)

    parts = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
    return _dense(tensors, parts, weight)


def _dense(tensors: dict[str, Tensor], parts: tuple[str, ...], weight: Callable[[str], Tensor]) -> dict[str, Tensor]:
    kept = {name: t.float() for name, t in tensors.items() if not name.endswith(parts)}
    layers = [name.removesuffix(parts[0]) for name in tensors if name.endswith(parts[0])]
    return kept | {f"{name}.weight": weight(name) for name in layers}


def save_dense(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` where the driver looks for them."""
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, folder / DENSE)
