"""`bench scenarios` and `bench precisions`: what can be named on the command line, and what each name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from rich.table import Table
from rich.text import Text

from harness import checkpoints
from harness.errors import InputError
from harness.predict.cards import Generation, cards
from harness.predict.roofline import kernel_of
from harness.records import Scenario
from harness.scenario import load_scenario, scenario_names, scenarios_dir
from harness.suggest import did_you_mean

# --- scenarios --------------------------------------------------------------------------------------------------------


def scenarios() -> list[Scenario]:
    """Those that have a name, in the order of their names."""
    return [load_scenario(name) for name in scenario_names()]


def scenario_file(name: str) -> Path:
    """The file of a named scenario. Raises InputError for a name that there is not."""
    if name not in scenario_names():
        raise InputError(
            f"scenario {name!r} is not here{did_you_mean(name, scenario_names())}", allowed=", ".join(scenario_names())
        )
    return scenarios_dir() / f"{name}.toml"


def scenario_table(found: Sequence[Scenario]) -> Table:
    """Name, mean lengths in tokens, arrivals, turns of a conversation, service level, description."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "in", "out", "arrivals", "turns", "SLO", "description"):
        right = column in ("in", "out", "turns")
        table.add_column(column, justify="right" if right else "left", no_wrap=column not in ("SLO", "description"))
    for one in found:
        lengths = (f"{one.input_tokens:,}", f"{one.output_tokens:,}")
        table.add_row(one.name, *lengths, one.arrivals, str(one.turns), one.slo.words, Text(one.description))
    return table


# --- precisions -------------------------------------------------------------------------------------------------------

PER_CHANNEL = -1
"""As a group size: all inputs of an output share one scale."""
Needs = Literal["nothing", "calibration", "training"]
"""calibration: text like what users ask, minutes; training: more of it, and hours or a GPU."""
Layout = Literal["none", "awq", "gptq", "compressed-tensors"]


@dataclass(frozen=True, slots=True)
class Precision:
    """A name that `--precisions` takes, as it is made without further options."""

    name: str
    bits: int
    """Of a weight; the activations have 16 unless `activation_bits` says otherwise."""
    group_size: int | None
    """Inputs that share a scale; None: none do, -1: all of an output's."""
    symmetric: bool | None
    """Without zero points; None: not quantized."""
    activation_bits: int | None
    layout: Layout
    """How it is stored; none: as the model is."""
    method: str
    needs: Needs
    kernels: dict[str, str]
    """Card generation -> the kernel that vLLM takes there (predict/roofline.py); one without a kernel is not in it."""


_WHAT: dict[str, tuple[str, Needs]] = {
    "bf16": ("the model as it is", "nothing"),
    "rtn": ("rounds to nearest", "nothing"),
    "awq": ("scales up the inputs that matter most, then rounds", "calibration"),
    "gptq": ("rounds column by column, each making up for those before it", "calibration"),
    "awq+gptq": ("AWQ's scales and GPTQ's rounding: the least is lost", "calibration"),
    "smoothquant": ("8-bit activations as well, their extremes moved into the weights", "calibration"),
    "qat": ("trains the rounded model on text", "training"),
    "qad": ("trains the rounded model to say what the model says", "training"),
}
NOTES = (
    "awq=PATH, awq=ORG/NAME: a checkpoint that exists, under any name.",
    "awq@kneebench: the same checkpoint, served with kneebench's own kernels (docs/kernels.md).",
    "awq-3bit, awq-2bit, and so all but smoothquant: for `bench quality` and `bench failures` alone. No kernel of vLLM "
    "has so few bits, so what is served is the checkpoint expanded to 16.",
    "fp8, w8a16: predicted alone, by `bench predict`.",
    "What a model will weigh and how long it takes: `bench quantize MODEL --method awq --dry-run`.",
)
GENERATIONS: tuple[Generation, ...] = tuple(name for name in get_args(Generation) if name != "cpu")
"""From the oldest on."""


def precisions() -> list[Precision]:
    """All that are made without further options, in the order of `checkpoints.PRECISIONS`."""
    found = []
    for name in checkpoints.PRECISIONS:
        what = _WHAT[name]
        if name == "bf16":
            found.append(Precision(name, 16, None, None, None, "none", *what, kernels_of("bf16")))
        elif name == "smoothquant":
            found.append(Precision(name, 8, PER_CHANNEL, True, 8, "compressed-tensors", *what, kernels_of("w8a8")))
        else:  # as quantize/recipe.py does where nothing is said, to which a test holds this
            layout: Layout = "gptq" if name == "gptq" else "awq"
            found.append(Precision(name, 4, 128, name == "gptq", None, layout, *what, kernels_of(layout)))
    return found


def kernels_of(precision: str) -> dict[str, str]:
    """Card generation -> kernel, of those generations that have one for it."""
    some = {card.generation: card for card in cards()}
    found = {}
    for generation in GENERATIONS:
        with suppress(InputError):
            card = some.get(generation) or replace(next(iter(some.values())), generation=generation)
            found[str(generation)] = kernel_of(card, precision)
    return found


def precision_table(found: Sequence[Precision]) -> Table:
    """A line each: what a weight becomes, how it is stored, what making it needs, and vLLM's kernel."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "weights", "stored as", "needs", "vLLM's kernel"):
        table.add_column(column, no_wrap=column != "vLLM's kernel")
    for one in found:
        layout = "the model is" if one.layout == "none" else one.layout
        table.add_row(one.name, _weights(one), layout, one.needs, _kernels(one.kernels))
    return table


def _weights(one: Precision) -> str:
    """As the field writes it, and `bench quantize`: W4A16 g128 asym."""
    if one.group_size is None:
        return f"{one.bits} bits"
    grid = "per row" if one.group_size == PER_CHANNEL else f"g{one.group_size} {'sym' if one.symmetric else 'asym'}"
    return f"W{one.bits}A{one.activation_bits or 16} {grid}"


def _kernels(kernels: dict[str, str]) -> str:
    """'marlin, volta exllama', 'marlin, not volta': that of the newest cards, and what older ones have."""
    newest = list(kernels.values())[-1]
    older = [name for name in GENERATIONS if kernels.get(name) != newest]
    others = [f"{name} {kernels[name]}" if name in kernels else f"not {name}" for name in older]
    return ", ".join([newest, *others])
