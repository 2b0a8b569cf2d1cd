"""What quantizing a model will give and cost, before it is done: bytes, room on a card, time. Needs config.json alone.

Bytes are exact: those of the tensors as the format stores them (the tests hold them against what is written). Beside
them a safetensors file has a header, some hundred bytes a tensor, which is not counted.

Room on a card, as vLLM computes it, with 16-bit keys and values whatever the weights are:

    KV tokens = (card x utilization - weights - beside) / KV bytes a token

`beside` is an assumption, not a measurement (`beside_bytes`). The CUDA context is not part of it: vLLM takes its share
of the card once the context is there, so the context comes out of the 1 - utilization that it leaves alone.

Time is an estimate (`timing`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quantize import formats, timing
from quantize.blocks import family_of
from quantize.errors import SchemeError
from quantize.head import check_untied
from quantize.methods import METHODS
from quantize.scheme import Scheme
from quantize.shapes import Stored, implied, read_header
from quantize.timing import Rates, measure
from quantize.training import Training
from quantize.weights import ModelDir

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
CONTEXT = 2048
"""Tokens of one user, for "how many users": a question and its answer."""

BATCHED_TOKENS, SEQUENCES = 2048, 256
"""vLLM 0.32's max_num_batched_tokens and max_num_seqs for a server on a card below 70 GiB (its arg_utils.py)."""

BESIDE_BYTES = GIB // 2
"""Workspaces of cuBLAS and attention, fragments of the allocator. An assumption."""


@dataclass(frozen=True)
class Side:
    """A model before or after. stored_bytes: of its tensors on disk; card_bytes: of its weights in vLLM, where what is
    kept is 16 bit; kv_tokens: what the rest of the card holds, negative where the weights alone do not fit."""

    stored_bytes: int
    card_bytes: int
    kv_tokens: int

    @property
    def users(self) -> int:
        """How many have `CONTEXT` tokens at once."""
        return max(0, self.kv_tokens) // CONTEXT


@dataclass(frozen=True)
class Estimate:
    """schemes: as words, each once; seconds: by kind of work; beside_bytes: assumed on the card besides weights."""

    method: str
    schemes: tuple[str, ...]
    format: str
    tokens: int
    before: Side
    after: Side
    kv_bytes: int
    beside_bytes: int
    card_gib: float
    utilization: float
    seconds: Mapping[str, float]
    rates: Rates

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def estimate(
    source: ModelDir | Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    method: str,
    tokens: int,
    card_gib: float = 16.0,
    utilization: float = 0.9,
    rates: Rates | None = None,
    *,
    format: str | None = None,
    search: str | None = None,
    length: int = 512,
    device: str = "cpu",
) -> Estimate:
    """What quantizing `source`, a model or a config.json, gives and costs.

    schemes: of each linear layer, by its full name; tokens: of the calibration set, cut to `length`; search: minmax or
    mse, None for the method's own; rates: of the machine, measured if not given. Raises SchemeError for a scheme or a
    format that cannot hold the model, ModelError for an architecture that is not known.
    """
    if method not in METHODS:
        raise SchemeError(f"method = {method!r}", ", ".join(METHODS), "Choose one of these with --method")
    config = source.config if isinstance(source, ModelDir) else source
    family, known = family_of(config.get("model_type")), implied(config)
    check_untied(schemes, known.tied)
    if isinstance(source, ModelDir):
        headers = [read_header(file) for file in sorted(set(source.files.values()))]
        stored = {name: tensor for header in headers for name, tensor in header.items()}
    else:
        stored = {name: Stored("BF16", shape, 2 * math.prod(shape)) for name, shape in known.tensors.items()}
    chosen = {name: scheme for name, scheme in schemes.items() if scheme}
    linears = [f"model.layers.{i}.{name}" for i in range(int(config["num_hidden_layers"])) for name in family.linears]
    shapes = {name: _matrix(stored, name) for name in dict.fromkeys([*linears, *schemes])}
    format = format or formats.default(chosen)
    formats.check(format, chosen, [name for name in shapes if name not in chosen], shapes)

    packed = sum(packed_bytes(format, scheme, *shapes[name]) for name, scheme in chosen.items())
    dense = sum(stored[f"{name}.weight"].bytes for name in chosen)
    # In vLLM: each implied tensor once, in 16 bits. A head that is tied and stored all the same is left out there.
    served = 2 * sum(math.prod(shape) for shape in known.tensors.values())
    dense_served = 2 * sum(math.prod(shapes[name]) for name in chosen)
    whole = sum(tensor.bytes for tensor in stored.values())
    beside = beside_bytes(config)

    def side(stored_bytes: int, card_bytes: int) -> Side:
        room = card_gib * GIB * utilization - card_bytes - beside
        return Side(stored_bytes, card_bytes, math.floor(room / known.kv_bytes))

    before, after = side(whole, served), side(whole - dense + packed, served - dense_served + packed)
    rates = rates or measure(device)
    seconds = timing.seconds(METHODS[method], search, config, family, shapes, chosen, tokens, length, rates)
    seconds["files"] = (before.stored_bytes + after.stored_bytes) / rates.hash
    return Estimate(
        method=method,
        schemes=tuple(dict.fromkeys(map(str, chosen.values()))),
        format=format,
        tokens=tokens if METHODS[method].calibrated else 0,
        before=before,
        after=after,
        kv_bytes=known.kv_bytes,
        beside_bytes=beside,
        card_gib=card_gib,
        utilization=utilization,
        seconds=seconds,
        rates=rates,
    )


def packed_bytes(format: str, scheme: Scheme, outputs: int, inputs: int) -> int:
    """Bytes of one layer's tensors as `formats.pack` makes them."""
    bits, groups = scheme.bits, scheme.groups(inputs)
    scales = 2 * groups * outputs
    if format == "awq":
        return (inputs + groups) * outputs * bits // 8 + scales
    if format == "gptq":
        return (inputs + groups) * outputs * bits // 8 + scales + 4 * inputs  # g_idx
    if scheme.activation_bits is not None:
        return outputs * inputs + scales
    zeros = 0 if scheme.symmetric else 4 * math.ceil(outputs * bits / 32) * groups
    return 4 * outputs * math.ceil(inputs * bits / 32) + scales + zeros + 16  # weight_shape


def beside_bytes(config: Mapping[str, Any]) -> int:
    """What vLLM is assumed to hold besides weights and cache while it works on its largest batch:

    BATCHED_TOKENS x (2 hidden + 3 intermediate) x 2 bytes: the residual stream, gate and up and their product;
    SEQUENCES x vocabulary x 3 x 4 bytes: the logits in float32, and the sampler's copies; and BESIDE_BYTES.
    """
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    activations = BATCHED_TOKENS * (2 * hidden + 3 * int(config.get("intermediate_size") or 4 * hidden)) * 2
    return activations + SEQUENCES * vocabulary * 12 + BESIDE_BYTES


def _matrix(stored: Mapping[str, Stored], name: str) -> tuple[int, int]:
    weight = stored.get(f"{name}.weight")
    if weight is None or len(weight.shape) != 2:
        raise SchemeError(f"a scheme for {name}", "linear layers of this model", "Correct the pattern")
    return weight.shape[0], weight.shape[1]


def to_json(estimate: Estimate) -> str:
    """Every figure of it, as JSON."""
    fields = asdict(estimate) | {"total_s": estimate.total_s}
    for name, side in (("before", estimate.before), ("after", estimate.after)):
        fields[name]["users"] = side.users
    return json.dumps(fields, indent=2, allow_nan=False)


def training_seconds(source: ModelDir | Mapping[str, Any], training: Training, device: str) -> float:
    """Of qat's and qad's steps: 6 operations a weight and token, 2 more for a teacher, 2 for activations made again.

    Of the products alone, in float32, whatever --train-precision makes of them.
    """
    known = implied(source.config if isinstance(source, ModelDir) else source)
    weights = sum(math.prod(shape) for name, shape in known.tensors.items() if len(shape) == 2 and "embed" not in name)
    head = 0 if "lm_head.weight" in known.tensors else math.prod(known.tensors["model.embed_tokens.weight"])
    operations = 6 + 2 * training.taught + 2 * training.checkpointing
    return operations * training.steps * training.batch * (weights + head) / timing.matmul_rate(device)


def show(estimate: Estimate, console: "Console") -> None:
    """Print it: what changes, side by side, then the time and what both rest on."""
    from rich.table import Table

    before, after = estimate.before, estimate.after
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("now", " + ".join(estimate.schemes)):
        table.add_column(title, justify="right")

    def row(what: str, of: Callable[[Side], str]) -> None:
        table.add_row(what, of(before), of(after))

    card = f"{estimate.card_gib:g} GiB card"
    row("tensors on disk", lambda side: _size(side.stored_bytes))
    row("weights on the card", lambda side: _size(side.card_bytes))
    row(f"left on a {card}", lambda side: _size(max(0, side.kv_tokens) * estimate.kv_bytes))
    row("KV-cache tokens", lambda side: f"{side.kv_tokens:,}" if side.kv_tokens > 0 else "does not fit")
    row(f"users of {CONTEXT:,} tokens", lambda side: f"{side.users:,}" if side.kv_tokens > 0 else "-")
    console.print(table)
    share = after.stored_bytes / before.stored_bytes

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    line(f"\nformat {estimate.format}, {share:.0%} of the size; a token in the cache takes {estimate.kv_bytes:,} bytes")
    line(
        f"left = {estimate.card_gib:g} GiB x {estimate.utilization:g} - weights - {_size(estimate.beside_bytes)} for "
        "activations and workspaces (assumed)"
    )
    parts = ", ".join(f"{name} {_span(s)}" for name, s in estimate.seconds.items() if s >= 0.01 * estimate.total_s)
    line(f"\ntime: about {_span(estimate.total_s)} for {estimate.method} ({parts})")
    calibrated = f"{estimate.tokens:,} calibration tokens, " if estimate.tokens else ""
    line(
        f"estimated from {calibrated}{estimate.rates.matmul / 1e9:,.0f} GFLOP/s and "
        f"{1e-6 / estimate.rates.shrink_s:,.0f} M weights/s of rounding, as measured here; the disk's time is not in it"
    )


def _size(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"


def _span(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
