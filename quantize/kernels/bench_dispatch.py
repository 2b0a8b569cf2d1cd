"""From measurements to the table that dispatch.py reads."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from quantize.errors import InputError
from quantize.kernels import dispatch
from quantize.kernels.bench_rows import Row
from quantize.kernels.dispatch import Limits


def limits(rows: Sequence[Row]) -> Limits:
    """The most tokens to which gemv, and after it gemm, was ahead at every number of tokens that was measured.

    Kernels are ranked by the geometric mean of their latencies over layers. gemv serves while it is first, gemm from
    there while it is ahead of expand. Raises InputError for rows without expand, which all others are held against.
    """
    gemv = gemm = 0
    serving = True
    for tokens in sorted({row.tokens for row in rows}):
        times = {name: _mean(rows, name, tokens) for name in ("gemv", "gemm", "expand")}
        if math.isinf(times["expand"]):
            raise InputError(f"no rows of expand at {tokens} tokens", "a whole run", "Measure again")
        serving = serving and times["gemv"] <= min(times["gemm"], times["expand"])
        if serving:
            gemv = tokens
        elif times["gemm"] <= times["expand"]:
            gemm = tokens
        else:
            break
    return Limits(gemv, gemm)


def write(rows: Sequence[Row], file: Path) -> Limits:
    """Put the limits of the card that `rows` are of into the table `file`, whose other cards stay; without one, into a
    copy of ours. Returns them."""
    found, card = limits(rows), rows[0].device
    entries = dispatch.entries(file if file.exists() else dispatch.TABLE)
    copy, matmul = rows[0].copy_gb_s, rows[0].matmul_tflop_s
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    measured = (
        f"{models}; {rows[0].dtype}, {rows[0].bits} bits in groups of {rows[0].group_size}; copy {copy:.0f} GB/s, "
        f"matmul {matmul:.0f} TFLOP/s"
    )
    entries[card] = {"measured": measured, **found._asdict()}
    head = [line for line in dispatch.TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [*head]
    for name, entry in entries.items():
        title = "default" if name == "default" else f"card.{json.dumps(name)}"
        lines += ["", f"[{title}]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def _mean(rows: Sequence[Row], method: str, tokens: int) -> float:
    """The geometric mean of a method's latencies; infinite where a layer has none."""
    layers = {(row.model, row.layer) for row in rows}
    times = {(row.model, row.layer): row.latency_us for row in rows if (row.method, row.tokens) == (method, tokens)}
    return math.exp(math.fsum(map(math.log, times.values())) / len(times)) if times.keys() == layers else math.inf
