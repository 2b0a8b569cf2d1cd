"""Faults put into the kernels' sources on purpose, and the quick checks that must find each.

    python -m tests.kernels.mutants LIBRARY CHECK      0: all right, 3: a result is wrong or a call is refused

Run in a process of its own, because a fault may write where it should not: AddressSanitizer then ends it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.kernels import reference
from tests.kernels.layers import Kernels, Refused, load, random_layer
from tests.kernels.products import exact_layer, exact_x, machine, multiply, true_weights


@dataclass(frozen=True, slots=True)
class Mutation:
    """In `file`, the only `old` becomes `new`; `check` must then fail. `why` says what the fault is."""

    file: str
    old: str
    new: str
    why: str
    check: str


MUTATIONS = (
    # integers and weights
    Mutation(
        "tiles.cuh",
        "    return {lane[slot.vector].word[slot.word], slot.shift};",
        "    return {lane[slot.vector].word[slot.word], slot.shift ^ 4};",
        "two nibbles are swapped",
        "gemv",
    ),
    Mutation(
        "tiles.cuh",
        "int row_of(int lane, int j) { return lane / 4 + j % 2 * 8; }",
        "int row_of(int lane, int j) { return lane % 8 + j % 2 * 8; }",
        "lanes hold other rows",
        "gemv",
    ),
    Mutation(
        "numbers.cuh",
        "bias(Base<T>::bits * 0x10001u + 0x10001u * static_cast<uint32_t>(zero))",
        "bias(Base<T>::bits * 0x10001u + 0x10001u * static_cast<uint32_t>(zero + 1))",
        "the zero point is one too large",
        "gemm",
    ),
    Mutation(
        "stored.cuh",
        "field, 1), 0) + (s.layout == KB_GPTQ);",
        "field, 1), 0);",
        "GPTQ v1 stores z - 1, and nobody adds the 1",
        "prepare",
    ),
    Mutation(
        "stored.cuh",
        "int awq_nibble(int r) { return r / 2 + r % 2 * 4; }",
        "int awq_nibble(int r) { return r; }",
        "AWQ's outputs are taken in their natural order",
        "prepare",
    ),
    Mutation(
        "prepare.cu",
        "const int input = perm ? perm[position] : position;\n    return",
        "const int input = position;\n    return",
        "act-order: the order of the inputs is ignored",
        "prepare",
    ),
    Mutation(
        "dequantize.cu",
        "const int group = s.g_idx[input + i];",
        "const int group = (input + i) / s.group_size;",
        "act-order: g_idx is ignored",
        "dequantize",
    ),
    Mutation(
        "dequantize.cu",
        "const int input = perm[position];",
        "const int input = position;",
        "act-order: weights are not put back where the model has them",
        "expand",
    ),
    Mutation(
        "dequantize.cu",
        "    const int group = group_of(tiles, column);",
        "    const int group = group_of(tiles, column + RUN);",
        "the last inputs of a group get the next one's scale",
        "expand",
    ),
    # groups
    Mutation(
        "products.cuh",
        "return group < last ? group : last;",
        "return group + 1 < last ? group + 1 : last;",
        "the group is one too far",
        "gemv",
    ),
    Mutation(
        "products.cuh",
        "return group < last ? group : last;",
        "return group;",
        "padding reads the scale of a group that is not there",
        "gemv",
    ),
    Mutation(
        "gemm.cu",
        "const auto &numbers = stage.numbers[warp][c / 2];",
        "const auto &numbers = stage.numbers[warp][0];",
        "the second half of a chunk takes the scale of its neighbour",
        "gemm",
    ),
    Mutation(
        "gemv.cu",
        "part.zero_high = __ldg(rows.zeros + group * ROWS + 8);",
        "part.zero_high = __ldg(rows.zeros + group * ROWS);",
        "row g + 8 takes the zero point of row g",
        "gemv",
    ),
    # fragments
    Mutation(
        "gemm.cu",
        "fragment<T, BITS>(weights, 2 * h + 1, low, high, odd);",
        "fragment<T, BITS>(weights, 2 * h, low, high, odd);",
        "a fragment is used twice, another not at all",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "output = row * ROWS + lane / 4 + i / 2 * 8;",
        "output = row * ROWS + lane / 4 + i % 2 * 8;",
        "accumulators are taken for other outputs",
        "gemm",
    ),
    Mutation(
        "reduce.cuh",
        "    return value + __shfl_xor_sync(everyone, value, 2);",
        "    return value;",
        "half of the lanes that share rows are left out",
        "gemv",
    ),
    # along the inputs
    Mutation(
        "gemm.cu",
        "for (int chunk = range.begin; chunk < range.end; ++chunk) {",
        "for (int chunk = range.begin; chunk < range.end - 1; ++chunk) {",
        "the last chunk is dropped",
        "gemm",
    ),
    Mutation(
        "schedule.cuh",
        "static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts)};",
        "static_cast<int>(static_cast<int64_t>(count) / parts * (part + 1))};",
        "what does not divide evenly into splits is dropped",
        "splits",
    ),
    Mutation(
        "gemv.cu",
        "for (int w = 0; w < WARPS; ++w) sum += sums",
        "for (int w = 0; w < WARPS - 1; ++w) sum += sums",
        "the last warp is left out",
        "gemv",
    ),
    Mutation(
        "reduce.cuh",
        "for (int split = 1; split < splits; ++split)",
        "for (int split = 1; split < splits - 1; ++split)",
        "the last split is left out",
        "splits",
    ),
    Mutation(
        "reduce.cuh",
        "partial[blockIdx.y * count + at] = sum;",
        "partial[at] = sum;",
        "every split writes to the same place",
        "splits",
    ),
    # copies and barriers
    Mutation(
        "gemm.cu",
        "copy_wait<DEPTH - 2>();",
        "copy_wait<DEPTH - 1>();",
        "one copy is not waited for",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "        copy_wait<DEPTH - 2>();\n        __syncthreads();",
        "        copy_wait<DEPTH - 2>();",
        "no barrier: others' copies may not be there, and buffers are filled while they are read",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "int reading = 0, filling = DEPTH - 1;",
        "int reading = 0, filling = 0;",
        "a copy goes into the buffer that is read",
        "gemm",
    ),
    Mutation(
        "gemv.cu",
        "    }\n    __syncthreads();\n    const int token",
        "    }\n    const int token",
        "no barrier before the warps' sums are added",
        "gemv",
    ),
    # guards: seen by AddressSanitizer
    Mutation(
        "gemv.cu",
        "if (token < tokens && at < k)",
        "if (token < tokens)",
        "activations are read beyond k",
        "gemv",
    ),
    Mutation(
        "gemv.cu",
        "if (token < tokens && at < k)",
        "if (at < k)",
        "activations are read beyond the last token",
        "gemv",
    ),
    Mutation(
        "gemm.cu",
        "const bool there = inside && token + i * STEP < tokens;",
        "const bool there = token + i * STEP < tokens;",
        "activations are copied from beyond k",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "const bool there = inside && token + i * STEP < tokens;",
        "const bool there = inside;",
        "activations are copied from beyond the last token",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "        if (row >= chunk_rows(tiles)) return;\n",
        "",
        "warps without a row read weights",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "if (token < tokens && output < tiles.n)",
        "if (token < tokens)",
        "outputs are written beyond n",
        "gemm",
    ),
    Mutation(
        "gemm.cu",
        "if (token < tokens && output < tiles.n)",
        "if (output < tiles.n)",
        "outputs are written beyond the last token",
        "gemm",
    ),
)


def _products(kernels: Kernels, kernel: str, tokens: tuple[int, ...]) -> bool:
    """One chunk and a bit, two groups a chunk, zero points that differ by row; then 21 chunks in whole rows of 64."""
    for (n, k, size), bits in (((24, 104, -1), 4), ((40, 160, 32), 8), ((136, 1344, 64), 4)):
        tiles = reference.prepare(exact_layer(n, k, size, bits, "float16"))
        for count in tokens:
            x = exact_x(count, k, "float16")
            wanted = reference.nearest(reference.value(x, "float16") @ true_weights(tiles).T, "float16")
            if not (multiply(kernels, kernel, tiles, x) == wanted).all():
                return False
    return True


def gemv(kernels: Kernels) -> bool:
    """Forwards and backwards: a sum that is read before it is written is right in one of the two."""
    for order in (0, 1):
        with machine(kernels, order):
            if not _products(kernels, "gemv", (1, 3)):
                return False
    return True


def gemm(kernels: Kernels) -> bool:
    for order in (0, 1):
        with machine(kernels, order, processors=1):
            if not _products(kernels, "gemm", (5, 13)):
                return False
    return True


def splits(kernels: Kernels) -> bool:
    """gemv: 194 chunks in three splits; gemm: 21 in five, which do not divide evenly."""
    for kernel, k in (("gemv", 12416), ("gemm", 1344)):
        tiles = reference.prepare(exact_layer(24, k, -1, 4, "float16"))
        x = exact_x(2, k, "float16")
        wanted = reference.nearest(reference.value(x, "float16") @ true_weights(tiles).T, "float16")
        with machine(kernels, processors=8):
            if not (multiply(kernels, kernel, tiles, x) == wanted).all():
                return False
    return True


def prepare(kernels: Kernels) -> bool:
    for layout, bits, act_order in (("awq", 4, False), ("gptq", 4, True), ("gptq_v2", 8, False)):
        layer = random_layer(24, 96, 32, layout=layout, bits=bits, act_order=act_order)
        perm = None if layer.g_idx is None else reference.act_order(layer.g_idx)
        made, wanted = kernels.prepare(layer, perm), reference.prepare(layer, perm)
        for part in ("tiles", "scales", "zeros"):
            if not (getattr(made, part) == getattr(wanted, part)).all():
                return False
    return True


def dequantize(kernels: Kernels) -> bool:
    layers = [random_layer(32, 96, 32, bits=bits, act_order=order) for bits in (3, 4) for order in (False, True)]
    return all((kernels.dequantize(layer) == reference.dequantize(layer)).all() for layer in layers)


def expand(kernels: Kernels) -> bool:
    layer = random_layer(24, 96, 32, act_order=True)
    perm = reference.act_order(layer.g_idx if layer.g_idx is not None else np.zeros(0))
    tiles = reference.prepare(layer, perm)
    return bool((kernels.expand(tiles, perm) == reference.expand(tiles, perm)).all())


CHECKS: dict[str, tuple[Callable[[Kernels], bool], tuple[str, ...]]] = {
    "gemv": (gemv, ("gemv.cu",)),
    "gemm": (gemm, ("gemm.cu",)),
    "splits": (splits, ("products.cu", "gemv.cu", "gemm.cu")),
    "prepare": (prepare, ("prepare.cu",)),
    "dequantize": (dequantize, ("dequantize.cu",)),
    "expand": (expand, ("dequantize.cu",)),
}
"""Each check, and the sources that it runs: what is compiled again when a header has changed."""


def main(library: str, check: str) -> int:
    try:
        return 0 if CHECKS[check][0](load(Path(library))) else 3
    except Refused as refused:
        print(refused)
        return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
