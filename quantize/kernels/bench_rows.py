"""One measurement of `bench kernels`, its file, and what is computed from several. All of it pure functions."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from quantize.errors import InputError
from quantize.kernels.bench_layers import Shape
from quantize.kernels.tensors import width


@dataclass(frozen=True)
class Row:
    """A product of one layer by one method, x [tokens, k] times weights [n, k].

    layers: in the set that a pass went over; latency_us: of one product, the median over `runs` passes, and quartiles.
    gb_s: the bytes that no method can avoid (`least_bytes`) over latency, whatever a method moves besides;
    share_of_copy: of copy_gb_s, the device's own copy. tflop_s: 2 tokens n k over latency. error: ||y - Y|| / ||Y||
    against Y, the product of x and (q - z) s in float64.
    """

    device: str
    model: str
    layer: str
    n: int
    k: int
    bits: int
    group_size: int
    dtype: str
    tokens: int
    method: str
    layers: int
    runs: int
    latency_us: float
    latency_us_q1: float
    latency_us_q3: float
    gb_s: float
    share_of_copy: float
    tflop_s: float
    error: float
    copy_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class Conditions:
    """What all rows of a run share. copy: bytes/s; matmul: FLOP/s."""

    device: str
    bits: int
    group_size: int
    dtype: str
    copy: float
    matmul: float


HEADER = tuple(field.name for field in fields(Row))


def least_bytes(shape: Shape, tokens: int, bits: int, group_size: int) -> float:
    """Bytes that a product must move: packed weights, 16-bit scales, zero points of as many bits, x and y. With 16
    bits, which have no scales: the weights, x and y."""
    groups = 0 if bits == 16 else shape.k // width(group_size, shape.k)
    weights = shape.n * shape.k * bits / 8 + shape.n * groups * (2 + bits / 8)
    return weights + 2 * tokens * (shape.n + shape.k)


def row(
    conditions: Conditions,
    shape: Shape,
    tokens: int,
    method: str,
    bits: int,
    seconds: Sequence[float],
    layers: int,
    error: float,
) -> Row:
    """The row of one method, from `seconds` of each pass over `layers` products; `bits`: of the weights it reads."""
    median, low, high = (quantile(seconds, share) / layers for share in (0.5, 0.25, 0.75))
    moved = least_bytes(shape, tokens, bits, conditions.group_size) / median
    return Row(
        conditions.device,
        shape.model,
        shape.layer,
        shape.n,
        shape.k,
        bits,
        conditions.group_size,
        conditions.dtype,
        tokens,
        method,
        layers,
        len(seconds),
        median * 1e6,
        low * 1e6,
        high * 1e6,
        moved / 1e9,
        moved / conditions.copy,
        2 * tokens * shape.n * shape.k / median / 1e12,
        error,
        conditions.copy / 1e9,
        conditions.matmul / 1e12,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, linear between neighbours (numpy's default)."""
    if len(values) == 1:
        return values[0]
    if share == 0.5:
        return statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low if share == 0.25 else high


def write(rows: Iterable[Row], file: Path) -> None:
    """`rows` as CSV with a header; numbers in full. What is there stays until the new file is whole."""
    unfinished = file.with_name(f".{file.name}")
    with unfinished.open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, HEADER, lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(one) for one in rows)
    unfinished.replace(file)


def read(file: Path) -> list[Row]:
    """The rows of a file of `write`. Raises InputError for another."""
    kinds = {field.name: field.type for field in fields(Row)}
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            table = csv.DictReader(lines)
            if tuple(table.fieldnames or ()) != HEADER:
                raise ValueError("its header is another")
            return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in table]  # type: ignore[operator]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: {error}", "the kernels.csv of `bench kernels`", "Measure again") from error


@dataclass(frozen=True)
class Block:
    """All products of a decoder block by one method: microseconds, and the share of the copy bandwidth."""

    model: str
    tokens: int
    method: str
    latency_us: float
    share_of_copy: float


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Sums over the layers of each model, for methods that did all of them."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    layers: dict[str, set[str]] = {}
    for one in rows:
        found.setdefault((one.model, one.tokens, one.method), []).append(one)
        layers.setdefault(one.model, set()).add(one.layer)
    sums = []
    for (model, tokens, method), parts in found.items():
        if {part.layer for part in parts} == layers[model]:
            latency = math.fsum(part.latency_us for part in parts)
            moved = math.fsum(part.gb_s * part.latency_us for part in parts)
            sums.append(Block(model, tokens, method, latency, moved / latency / parts[0].copy_gb_s))
    return sums
