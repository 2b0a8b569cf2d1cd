"""How long quantizing will take: work counted from the shapes, over rates measured here in a fraction of a second.

With T calibration tokens, over the sites (layers that share an input of n channels and have m outputs together):

    forward      T (2 n m + attention's 2 length x query width)
    statistics   T 2 n^2, of which 5/8 are done (`walk.add_gram`)
    folds        AWQ: 9 scales x 6 shrinks of at most 256 rows a layer (`awq.best_scale`)
    rounding     RTN: each weight once; MSE and AWQ: 11 shrinks of each; GPTQ: n^3/3, n^2 m, and n steps of m weights

It knows nothing of other processes, of the disk, or of how small matrices fall short of the rate of large ones.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantize import awq, gptq, products
from quantize.blocks import Family
from quantize.methods import Method
from quantize.scheme import PER_CHANNEL, SHRINKS, Scheme, grid, search

_SCALES = len(awq.EXPONENTS[:: awq.STRIDES[0]]) + 2 * len(awq.STRIDES[1:])
_GROUP = 128  # of the measured search: larger groups cost more, which is added


@dataclass(frozen=True)
class Rates:
    """Of this machine. matmul: FLOP/s in float32; shrink_s: of one weight in one step of a search; column_s and
    column_weight_s: of one column of GPTQ, and of each weight in it; hash: bytes/s of sha256."""

    matmul: float
    shrink_s: float
    column_s: float
    column_weight_s: float
    hash: float


def seconds(
    method: Method,
    how: str | None,
    config: Mapping[str, Any],
    family: Family,
    shapes: Mapping[str, tuple[int, int]],
    chosen: Mapping[str, Scheme],
    tokens: int,
    length: int,
    rates: Rates,
) -> dict[str, float]:
    """Seconds by kind of work, as in the module's text. `how` is minmax, mse, output, or None for the method's own."""
    forward = statistics = folds = rounding = 0.0
    seen = tokens if method.calibrated else 0
    mse = how == "mse" or (how is None and method.rounding == "gptq")
    for block in range(int(config["num_hidden_layers"])):
        for site in family.sites:
            names = [f"model.layers.{block}.{name}" for name in site.linears]
            inputs = shapes[names[0]][1]
            forward += seen * 2 * inputs * sum(shapes[name][0] for name in names)
            if site.rows == "v":  # attention's output: its width is the queries'
                forward += seen * 4 * inputs * length
            statistics += seen * 2 * inputs**2 * 5 / 8
            schemes = {name: chosen[name] for name in names if name in chosen}
            outputs = sum(shapes[name][0] for name in schemes)
            if not outputs:
                continue
            weights = outputs * inputs
            group = max(inputs if s.group_size == PER_CHANNEL else s.group_size for s in schemes.values())
            trace = 2 * inputs * weights / rates.matmul
            # A search against a Gram matrix multiplies each group by its block of it, a search of the weights does not.
            step = weights * (rates.shrink_s + 2 * max(0, group - _GROUP) / rates.matmul)
            if method.fold is not None and site.before is not None and method.rounding != "rtn":
                sampled = sum(min(shapes[name][0], awq.ROWS) for name in schemes) / outputs
                folds += _SCALES * len(awq.CLIPPED) * step * sampled
            rounding += weights * rates.shrink_s * 2  # the grid and the packing
            if method.rounding == "awq" or how == "output":
                rounding += len(SHRINKS) * step + 2 * trace
            elif mse:
                rounding += len(SHRINKS) * weights * rates.shrink_s
            if method.rounding == "gptq":
                rounding += inputs**3 / 3 / rates.matmul + trace / 2
                rounding += inputs * rates.column_s + weights * rates.column_weight_s
            if method.calibrated:
                rounding += 2 * trace  # the layers' output error
    made = {"forward": forward / rates.matmul, "statistics": statistics / rates.matmul}
    return {**made, "folds": folds, "rounding": rounding}


def matmul_rate(device: str = "cpu", size: int = 1024) -> float:
    """FLOP/s of a float32 product of two `size` x `size` matrices, 2 size^3 each: the best of three."""
    a = torch.rand(size, size, device=device)
    return 2 * size**3 / _least(lambda: products.linear(a, a), device)


@torch.no_grad()
def measure(device: str = "cpu") -> Rates:
    """The rates of `device` under torch's present number of threads; takes about half a second."""
    rows, columns = 512, 512
    weight = torch.rand(rows, columns, device=device)
    gram = torch.eye(columns, device=device)
    scheme = Scheme(4, _GROUP)
    many = _least(lambda: search(weight, scheme, gram, SHRINKS[:6]), device)
    few = _least(lambda: search(weight, scheme, gram, SHRINKS[:2]), device)
    shrink = max((many - few) / 4, many / 18) / weight.numel()  # noise can make the difference nothing

    found = gptq.factor(torch.eye(128, device=device))
    spans = {}
    for outputs in (32, 2048):
        part = torch.rand(outputs, 128, device=device)
        spans[outputs] = _least(partial(gptq.round_columns, part, found, scheme, grid(part, scheme)), device) / 128
    per_weight = max(spans[2048] - spans[32], 0) / (2048 - 32)

    data = bytes(2**24)
    hashing = len(data) / _least(lambda: hashlib.sha256(data).digest(), "cpu")
    return Rates(matmul_rate(device), shrink, max(spans[32] - 32 * per_weight, 0), per_weight, hashing)


def _least(work: Callable[[], object], device: str, times: int = 3) -> float:
    """Seconds of the quickest of `times` runs, after one that warms up."""
    work()
    least = math.inf
    for _ in range(times):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - started)
    return least


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
