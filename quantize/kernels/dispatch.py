"""Which kernel a product takes, by card and number of tokens: a table that `bench kernels --write-dispatch` measures.

    [default]                       [card."NVIDIA GeForce RTX 4090"]
    measured = "no: ..."            measured = "2026-08-01, ..."
    gemv = 8                        gemv = 4
    gemm = 64                       gemm = 48

gemv and gemm are the most tokens that each serves; beyond both, the weights are expanded and torch multiplies. A card
below compute capability 8.0 has no gemm, whatever the table says.
"""

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from quantize.errors import InputError

Kernel = Literal["gemv", "gemm", "expand"]
TABLE = Path(__file__).with_name("dispatch.toml")
MOST = {"gemv": 8, "gemm": 64}
"""Tokens that the kernels take at all."""


class Limits(NamedTuple):
    """The most tokens that gemv and gemm serve; 0: none."""

    gemv: int
    gemm: int


def choose(limits: Limits, tokens: int) -> Kernel:
    """The kernel for so many tokens."""
    if tokens <= limits.gemv:
        return "gemv"
    return "gemm" if tokens <= limits.gemm else "expand"


@cache
def limits(device: torch.device) -> Limits:
    """Of the card that `device` is. The table is read once a process."""
    card, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    found = read(Path(os.environ.get("KNEEBENCH_DISPATCH") or TABLE))
    chosen = found.get(card, found["default"])
    return chosen if capability >= (8, 0) else chosen._replace(gemm=0)


def read(file: Path) -> dict[str, Limits]:
    """The limits of each card of a table, and of "default". Raises InputError for a table with a fault."""
    return {name: Limits(entry["gemv"], entry["gemm"]) for name, entry in entries(file).items()}


def entries(file: Path) -> dict[str, dict[str, Any]]:
    """Each card of a table as it stands there, "default" first. Raises InputError for a table with a fault."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        found = {"default": table["default"], **table.get("card", {})}
        for name, entry in found.items():
            for kernel, most in MOST.items():
                if type(value := entry[kernel]) is not int or not 0 <= value <= most:
                    raise ValueError(f"{kernel} = {value!r} of {name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the dispatch table {file} ({error!r})",
            "[default] and [card.NAME], each with gemv from 0 to 8 and gemm from 0 to 64",
            "Write it again with `bench kernels --write-dispatch`",
        ) from error
    return found
