"""kernels.md: the ceilings, a block's products by each method, the conditions, and what has no figure and why."""

import importlib.metadata
from collections.abc import Mapping, Sequence

import torch

from quantize.kernels.bench_rows import Row, blocks

_PACKAGES = ("torch", "triton", "vllm", "gemlite")


def line(row: Row) -> str:
    """A row for the terminal."""
    return (
        f"{row.model} {row.layer} {row.n} x {row.k}, {row.tokens:3d} tokens, {row.method}: {row.latency_us:,.1f} us "
        f"({row.latency_us_q1:,.1f} to {row.latency_us_q3:,.1f}), {row.gb_s:,.0f} GB/s, {row.share_of_copy:.0%} of "
        f"copy, {row.tflop_s:,.2f} TFLOP/s, error {row.error:.1e}"
    )


def page(rows: Sequence[Row], versions: Mapping[str, str], left_out: Sequence[tuple[str, str]]) -> str:
    """Markdown."""
    first = rows[0]
    parts = [
        "# Products with few-bit weights",
        f"{_plain(first.device)}: copy {first.copy_gb_s:,.0f} GB/s, {first.dtype} matmul "
        f"{first.matmul_tflop_s:,.2f} TFLOP/s, both measured here. Weights of {first.bits} bits, "
        f"{_groups(first.group_size)}; {first.dtype} activations.",
    ]
    if first.method.startswith("fallback") or any(row.method.startswith("fallback") for row in rows):
        parts.append(
            "Measured on a CPU: `fallback` is the torch code that stands in for the kernels where no GPU is. It says "
            "nothing of the kernels' speed."
        )
    parts.append(
        "Microseconds of all products of one decoder block, summed over its layers, each the median of passes over a "
        "set of layers read from memory. In brackets the share of the copy's bandwidth that is used by bytes which no "
        "method avoids: weights in their bits (16, for the product in 16 bit), scales, zero points, activations. The "
        "quickest is bold."
    )
    sums = blocks(rows)
    for model in dict.fromkeys(block.model for block in sums):
        found = {(block.tokens, block.method): block for block in sums if block.model == model}
        names = list(dict.fromkeys(name for _, name in found))
        parts.append(f"## {_plain(model)}")
        table = [f"| tokens | {' | '.join(map(_plain, names))} |", f"| ---: |{' ---: |' * len(names)}"]
        for tokens in sorted({count for count, _ in found}):
            here = [found.get((tokens, name)) for name in names]
            least = min(block.latency_us for block in here if block)
            cells = [
                ""
                if block is None
                else _cell(f"{block.latency_us:,.1f} ({block.share_of_copy:.0%})", block.latency_us == least)
                for block in here
            ]
            table.append(f"| {tokens} | {' | '.join(cells)} |")
        parts.append("\n".join(table))
    worst = {
        name: max(row.error for row in rows if row.method == name) for name in dict.fromkeys(r.method for r in rows)
    }
    parts += [
        "## Error",
        "The largest of ||y - Y|| / ||Y|| over layers and tokens, Y being the product with (q - z) s in float64; "
        "rounding the result alone makes about 0.0017 of bfloat16 and 0.0002 of float16.",
        "\n".join(["| method | error |", "| --- | ---: |", *(f"| {_plain(k)} | {v:.1e} |" for k, v in worst.items())]),
    ]
    if left_out:
        parts += ["## Not measured", "\n".join(f"- {_plain(name)}: {_plain(reason)}" for name, reason in left_out)]
    if versions:
        parts += ["## Conditions", "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in versions.items())]
    return "\n\n".join(parts) + "\n"


def versions(device: torch.device) -> dict[str, str]:
    """What else decides the figures: versions of packages, and on a GPU CUDA's and the card's capability."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"CUDA of torch": str(torch.version.cuda), "compute capability": f"{major}.{minor}"}
    return found


def _groups(group_size: int) -> str:
    return "one group a row" if group_size == -1 else f"groups of {group_size}"


def _cell(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _plain(text: str) -> str:
    """Text from outside, without meaning in Markdown or HTML."""
    for character in "\\`*_[]<>|#&":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
