"""One module of a checkpoint looked at: its integers, scales and zero points, or its weights, and what is wrong there.

The figures of a layer of n weights what = (q - z) s:

    bits a weight    8 x bytes of all its tensors / n
    ends             share of integers that are 0 or 2^b - 1. Each group's range ends at its own extremes, so about 2 in
                     every group size lie there anyway (1 where symmetric); more means that the range was clipped
    zeros            mean zero point, and the shares at 0 and at 2^b - 1, where a group has one sign
    scales           smallest, median, largest
    wide             scales above 8 x the layer's median: groups with an outlier, whose other weights get a coarse step
    peak             max |what| / sqrt(mean what^2); about 5 for a million weights of a normal distribution
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize import formats
from quantize.errors import SchemeError
from quantize.layout import Layout
from quantize.scheme import Quantized, Scheme, dequantize
from quantize.shapes import Implied, Stored

WIDE = 8
"""Times the layer's median scale."""

Reader = Callable[[str], Tensor]
"""A tensor by its full name."""

_SLAB = 2**22  # weights that are looked at together: 16 MB in float32
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_MARKS = {"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_shape"}
_PARTS = _MARKS | {"g_idx", "weight", "weight_zero_point"}


@dataclass(frozen=True)
class Integers:
    """Of a quantized layer; see the module's text. Zero points are None where the scheme has none of its own."""

    ends: float
    zero_mean: float | None
    zero_lowest: float | None
    zero_highest: float | None
    scale_min: float
    scale_median: float
    scale_max: float
    wide: int
    groups: int


@dataclass(frozen=True)
class Layer:
    """A linear layer, [outputs, inputs]. stored: its scheme in words, or its type (BF16 ...) where it has none."""

    name: str
    outputs: int
    inputs: int
    stored: str
    scheme: Scheme | None
    bytes: int
    peak: float
    integers: Integers | None

    @property
    def parameters(self) -> int:
        return self.outputs * self.inputs

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters

    @property
    def kind(self) -> str:
        """The name without the block's number: model.layers.3.mlp.up_proj -> mlp.up_proj."""
        found = BLOCK.search(self.name)
        return self.name[found.end() :] if found else self.name


@dataclass(frozen=True)
class Finding:
    """`where`: the tensors, layers or files it is about."""

    fault: bool
    text: str
    where: tuple[str, ...] = ()


class Findings:
    """Those met so far; the same one at many places is one."""

    def __init__(self) -> None:
        self._met: dict[tuple[bool, str], list[str]] = {}

    def add(self, fault: bool, text: str, *where: str) -> None:
        self._met.setdefault((fault, text), []).extend(where)

    def all(self) -> tuple[Finding, ...]:
        """Faults first."""
        met = sorted(self._met.items(), key=lambda item: not item[0][0])
        return tuple(Finding(fault, text, tuple(where)) for (fault, text), where in met)


def module(
    read: Reader,
    layout: Layout | None,
    name: str,
    parts: list[str],
    stored: Mapping[str, Stored],
    known: Implied | None,
    met: Findings,
) -> tuple[Layer | None, list[str]]:
    """The layer that the module `name` with the tensors `parts` is, if it is one, and those that are no part of it."""
    layer, rest = None, parts
    if marks := sorted(_MARKS & set(parts)):
        rest = [part for part in parts if part not in _PARTS]
        if layout is None:
            met.add(True, f"{', '.join(marks)}, and config.json has no quantization_config", name)
        else:
            try:
                layer = _quantized(read, layout, name, parts, stored, known, met)
            except (SchemeError, RuntimeError, ValueError) as error:
                text = error.given if isinstance(error, SchemeError) else f"parts that do not fit ({error})"
                met.add(True, text.replace(f"{name}, ", ""), name)
    for part in rest:
        full = f"{name}.{part}" if name else part
        tensor = read(full)
        if tensor.is_floating_point() and not all(bool(torch.isfinite(slab).all()) for slab in _slabs(tensor)):
            met.add(True, "tensor with NaN or infinity", full)
        if part == "weight" and tensor.ndim == 2 and BLOCK.search(name):
            outputs, inputs = tensor.shape
            given = stored[full]
            layer = Layer(name, outputs, inputs, given.dtype, None, given.bytes, _peak(_slabs(tensor)), None)
    return layer, [part for part in rest if layer is None or layer.scheme is not None or part != "weight"]


def _quantized(
    read: Reader,
    layout: Layout,
    module: str,
    names: list[str],
    stored: Mapping[str, Stored],
    known: Implied | None,
    met: Findings,
) -> Layer:
    found = layout.modules([f"{module}.{name}" for name in names])
    if module not in found:
        raise SchemeError(f"{', '.join(sorted(_MARKS & set(names)))} without integers", "all parts", "Fetch it again")
    scheme, parts = found[module]
    quantized = formats.unpack({part: read(f"{module}.{part}") for part in parts}, layout.format, scheme)
    q, scales, zeros = quantized
    outputs, inputs = q.shape
    if zeros.shape != scales.shape or len(scales) != outputs:
        raise SchemeError(
            f"zero points {list(zeros.shape)} and scales {list(scales.shape)} for {outputs} outputs", "", ""
        )
    shape = known.tensors.get(f"{module}.weight") if known else None
    if shape is not None and shape != (outputs, inputs):
        met.add(True, f"shape {[outputs, inputs]} where config.json implies {list(shape)}", module)
    _check_values(quantized, scheme, layout, module, met)
    return Layer(
        name=module,
        outputs=outputs,
        inputs=inputs,
        stored=str(scheme),
        scheme=scheme,
        bytes=sum(stored[f"{module}.{part}"].bytes for part in parts),
        peak=_peak(dequantize(Quantized(*(t[rows] for t in quantized))) for rows in _rows(outputs, inputs)),
        integers=_integers(quantized, scheme),
    )


def _integers(quantized: Quantized, scheme: Scheme) -> Integers:
    q, scales, zeros = quantized
    s = scales.float()
    median = float(s.median())
    own = not scheme.symmetric
    return Integers(
        ends=_share(q, 0) + _share(q, scheme.highest),
        zero_mean=float(zeros.float().mean()) if own else None,
        zero_lowest=_share(zeros, 0) if own else None,
        zero_highest=_share(zeros, scheme.highest) if own else None,
        scale_min=float(s.min()),
        scale_median=median,
        scale_max=float(s.max()),
        wide=int((s > WIDE * median).sum()),
        groups=s.numel(),
    )


def _check_values(quantized: Quantized, scheme: Scheme, layout: Layout, module: str, met: Findings) -> None:
    q, scales, zeros = quantized
    if int(q.max()) > scheme.highest:
        met.add(True, f"integers beyond {scheme.bits} bits", module)
    if int(zeros.max()) > scheme.highest:
        met.add(True, f"zero points beyond {scheme.bits} bits", module)
    if scheme.symmetric and not bool((zeros == scheme.middle).all()):
        met.add(True, f"zero points other than {scheme.middle} in a symmetric scheme, where vLLM looks at none", module)
    if not bool(torch.isfinite(scales).all()):
        met.add(True, "scales that are NaN or infinite", module)
        return
    for dtype in (torch.bfloat16, torch.float16):
        if not bool((scales.to(dtype).float() == scales.float()).all()):
            name = str(dtype).removeprefix("torch.")
            met.add(False, f"scales that {name} rounds: served with --dtype {name}, the weights are others", module)


def _slabs(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` in float32, some rows at a time."""
    rows = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
    return (rows[part].float() for part in _rows(*rows.shape))


def _rows(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _SLAB // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _peak(slabs: Iterable[Tensor]) -> float:
    """max |w| / sqrt(mean w^2); 0 where all is zero."""
    largest = total = count = 0.0
    for slab in slabs:
        largest = max(largest, float(slab.abs().max()))
        total += float(slab.square().sum(dtype=torch.float64))
        count += slab.numel()
    return largest / math.sqrt(total / count) if total else 0.0


def _share(values: Tensor, of: int) -> float:
    return int((values == of).sum()) / values.numel()
