"""An inspection on the terminal: what it is, what it weighs, what is wrong, then its layers, one row for each kind.

A range is over the blocks: 80 blocks are as many rows as one has kinds of layers. Narrow terminals get fewer columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Any

from quantize.examine import WIDE, Finding, Integers, Layer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantize.inspection import Inspection

_ROOMY = 100
"""Columns of a terminal from which shapes and bytes are shown."""

_NAMED = 3
"""Places of a finding that are named; the rest is counted."""


def show(inspection: "Inspection", console: "Console", layers: bool = False) -> None:
    """Print `inspection`; with `layers` a row for each layer instead of one for each kind."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    for text in _summary(inspection):
        line(text)
    for finding in inspection.findings:
        line(f"{'FAULT' if finding.fault else 'note '}  {_finding(finding)}")
    if not inspection.findings:
        line("no faults found")
    console.print()
    console.print(_kept(inspection))
    if not inspection.layers:
        return
    console.print()
    if layers:
        rows = [(layer.name, [layer]) for layer in inspection.layers]
    else:
        rows = [(name, group) for name, group in _groups(inspection.layers)]
    console.print(_layers(rows, console.width, layers))
    quantized = any(layer.integers for layer in inspection.layers)
    z = "; z ends: zero points there" if console.width >= _ROOMY else ""
    ends = (
        f"ends: integers at 0 or the highest{z}; wide: scales above {WIDE} x the layer's median; " if quantized else ""
    )
    line(f"{ends}peak: max |w| / rms")


def _summary(inspection: "Inspection") -> list[str]:
    made = dict.fromkeys(layer.stored for layer in inspection.layers if layer.scheme)
    kind = f"{inspection.format}: {', '.join(made)}" if inspection.format else "not quantized"
    share = inspection.tensor_bytes / inspection.bf16_bytes if inspection.bf16_bytes else 0.0
    quantized = [layer for layer in inspection.layers if layer.scheme]
    head = {True: "tied to the embeddings", False: "of its own", None: "unknown"}[inspection.tied]
    lines = [
        inspection.path,
        f"{inspection.model_type}, {kind}",
        f"{_size(inspection.disk_bytes)} on disk ({inspection.shards} file{'s' * (inspection.shards != 1)}); "
        f"{_size(inspection.bf16_bytes)} in BF16, so {share:.0%} of it; {_count(inspection.parameters)} parameters",
    ]
    if quantized:
        weights = sum(layer.parameters for layer in quantized)
        bits = 8 * sum(layer.bytes for layer in quantized) / weights
        lines.append(
            f"{len(quantized)} quantized layers hold {weights / inspection.parameters:.0%} of them, at {bits:.3f} bits "
            "each, scales and zero points included"
        )
    lines.append(f"output head: {head}")
    if inspection.record:
        lines += _record(inspection.record)
    return [*lines, ""]


def _record(record: Mapping[str, Any]) -> list[str]:
    """What quantize.json says of where the checkpoint comes from: as much as is there."""
    recipe = record.get("recipe")
    words = [f"{name} {value}" for name, value in recipe.items()] if isinstance(recipe, dict) else []
    told = [
        ("made by", record.get("tool")),
        ("recipe", ", ".join(word for word in words if not word.endswith(("None", "[]", "()")))),
        ("calibration", record.get("calibration")),
        ("source", record.get("source")),
        ("hashes", _hashes(record)),
    ]
    return [f"{name}: {value}" for name, value in told if value]


def _hashes(record: Mapping[str, Any]) -> str:
    found = {name.removesuffix("_sha256"): str(value) for name, value in record.items() if name.endswith("_sha256")}
    return ", ".join(f"{name} {value[:12]}" for name, value in found.items() if value != "None")


def _finding(finding: Finding) -> str:
    if not finding.where:
        return finding.text
    named = ", ".join(finding.where[:_NAMED])
    more = len(finding.where) - _NAMED
    return f"{finding.text}: {named}{f' and {more} more' if more > 0 else ''}"


def _kept(inspection: "Inspection") -> "Table":
    """What is no quantized layer. Linear layers left in 16 bits are in the other table, and only summed up here."""
    table = _table(("kept", "type", "tensors", "parameters", "size", "why"), left=(0, 1, 5))
    quantized = inspection.format is not None
    for each in inspection.kept:
        table.add_row(
            each.what, each.dtype, str(each.tensors), _count(each.parameters), _size(each.bytes),
            each.why if quantized else "",
        )  # fmt: skip
    dense = [layer for layer in inspection.layers if layer.scheme is None]
    for dtype in dict.fromkeys(layer.stored for layer in dense):
        of = [layer for layer in dense if layer.stored == dtype]
        table.add_row(
            "linear layers", dtype, str(len(of)), _count(sum(layer.parameters for layer in of)),
            _size(sum(layer.bytes for layer in of)), "left out by the recipe" if quantized else "",
        )  # fmt: skip
    return table


def _groups(layers: Iterable[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers of one kind, shape and storage, by the kind's last name where that says which."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.kind, layer.outputs, layer.inputs, layer.stored), []).append(layer)
    leaves = [kind.rpartition(".")[2] for kind in {group[0].kind for group in found.values()}]
    unique = len(set(leaves)) == len(leaves)
    return [(g[0].kind.rpartition(".")[2] if unique else g[0].kind, g) for g in found.values()]


def _layers(rows: Sequence[tuple[str, Sequence[Layer]]], width: int, single: bool) -> "Table":
    every = [layer for _, group in rows for layer in group]
    roomy, quantized = width >= _ROOMY, any(layer.integers for layer in every)
    asymmetric = any(layer.integers and layer.integers.zero_mean is not None for layer in every)
    several = len({layer.stored for layer in every}) > 1

    def whole(of: Callable[[Integers], float | None], digits: str) -> Callable[[Sequence[Layer]], str]:
        return lambda group: _range([of(layer.integers) for layer in group if layer.integers], digits)

    columns: list[tuple[str, bool, Callable[[Sequence[Layer]], str]]] = [
        ("blocks", not single, lambda group: str(len(group))),
        ("out x in", roomy, lambda group: f"{group[0].outputs} x {group[0].inputs}"),
        ("stored", several, lambda group: group[0].stored.replace("per channel", "chan").replace("A16", "")),
        ("bits", quantized, lambda group: _range([layer.bits_per_weight for layer in group], ".2f")),
        ("size", roomy, lambda group: _size(sum(layer.bytes for layer in group))),
        ("ends %", quantized, whole(lambda i: 100 * i.ends, ".1f")),
        ("zeros", asymmetric, whole(lambda i: i.zero_mean, ".1f")),
        ("z ends %", asymmetric and roomy, _sided),
        ("scales", quantized, lambda group: _scales(group, roomy)),
        ("wide", quantized, whole(lambda i: i.wide, ".0f")),
        ("peak", True, lambda group: _range([layer.peak for layer in group], ".0f")),
    ]
    shown = [(title, of) for title, wanted, of in columns if wanted]
    table = _table(("layer", *(title for title, _ in shown)), left=(0,), gap=1)
    for name, group in rows:
        table.add_row(name, *(of(group) for _, of in shown))
    return table


def _sided(group: Sequence[Layer]) -> str:
    """The largest shares of zero points at either end, in percent."""
    low = [layer.integers.zero_lowest or 0.0 for layer in group if layer.integers]
    high = [layer.integers.zero_highest or 0.0 for layer in group if layer.integers]
    return f"{100 * max(low):.1f}|{100 * max(high):.1f}" if low else "-"


def _scales(group: Sequence[Layer], roomy: bool) -> str:
    """The smallest of all, in a wide table the middle one of the layers' medians, and the largest of all."""
    found = [layer.integers for layer in group if layer.integers]
    if not found:
        return "-"
    marks = [min(i.scale_min for i in found), max(i.scale_max for i in found)]
    if roomy:
        marks.insert(1, median_low(i.scale_median for i in found))
    return "–".join(f"{mark:.0e}".replace("e-0", "e-").replace("e+0", "e") for mark in marks)


def _range(values: Sequence[float | None], digits: str) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    low, high = f"{min(numbers):{digits}}", f"{max(numbers):{digits}}"
    return low if low == high else f"{low}–{high}"


def _table(titles: Sequence[str], left: Sequence[int], gap: int = 2) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i in left else "right", overflow="fold")
    return table


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _count(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"
