"""What is to be done to a model: the part of the request that changes the numbers, and nothing else.

Two runs with the same model, recipe and calibration tokens give the same checkpoint; that is what the cache relies on.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from quantize import formats
from quantize.blocks import Family
from quantize.errors import SchemeError
from quantize.formats import HEAD
from quantize.methods import METHODS, Method
from quantize.scheme import PER_CHANNEL, Scheme
from quantize.training import METHODS as TRAINED
from quantize.training import Training, default_training

# Raise it when a change of code changes the numbers of a finished checkpoint: cached ones are then made anew.
REVISION = 3

SEARCHES = ("minmax", "mse", "output")
ARITHMETICS = ("float32", "bfloat16")
NO_START = "none"
"""As the start of a training: the model itself."""

W8A8 = Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8)

_EXCEPTION = re.compile(r"(?P<pattern>[^=]+)=(?P<bits>2|3|4|8|16)(?:bit)?(?:-g(?P<group>-?\d+))?")


@dataclass(frozen=True)
class Exception_:
    """Layers whose name has a match of `pattern`, a regular expression, have `scheme`; None keeps them in 16 bits.

    Of the output head the pattern has to say the name: ".*" never means it.
    """

    pattern: str
    scheme: Scheme | None

    def matches(self, module: str) -> bool:
        """Whether it is about the module of that full name."""
        return re.search(self.pattern, module) is not None and (module != HEAD or HEAD in self.pattern)


@dataclass(frozen=True)
class Recipe:
    """`method` with `scheme`, but for the `exceptions`, of which the last that matches a layer counts.

    search: how grids are found, None for the method's own choice; format: of the checkpoint, None for the one that
    suits the schemes; calibrated on samples x length tokens: sequences of up to `length`, drawn with `seed`; the
    forward multiplies in `arithmetic` and adds in float32; training: of qat and qad, else None.
    """

    method: str = "awq"
    scheme: Scheme = field(default_factory=Scheme)
    exceptions: tuple[Exception_, ...] = ()
    search: str | None = None
    format: str | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0
    arithmetic: str = "float32"
    training: Training | None = None

    def __post_init__(self) -> None:
        known = (*METHODS, *TRAINED)
        if self.method not in known:
            raise SchemeError(f"method = {self.method!r}", ", ".join(known), "Choose one of these with --method")
        if self.method in TRAINED and self.training is None:
            object.__setattr__(self, "training", default_training(self.method))
        if self.training and self.method not in TRAINED:
            raise SchemeError(f"training options with {self.method}", ", ".join(TRAINED), "Choose --method qad")
        if self.training and self.training.start not in (*METHODS, NO_START):
            raise SchemeError(
                f"start = {self.training.start!r}",
                ", ".join((*METHODS, NO_START)),
                "Choose one of these with --start-from",
            )
        if self.search not in (None, *SEARCHES):
            raise SchemeError(f"search = {self.search!r}", ", ".join(SEARCHES), "Choose one of these with --search")
        if self.search == "output" and self.posttraining.rounding != "gptq":
            raise SchemeError("search = 'output'", "gptq, awq+gptq or smoothquant+gptq with it", "Choose --search mse")
        if self.format not in (None, *formats.FORMATS):
            raise SchemeError(f"format = {self.format!r}", ", ".join(formats.FORMATS), "Choose one with --format")
        if self.arithmetic not in ARITHMETICS:
            raise SchemeError(
                f"arithmetic = {self.arithmetic!r}", ", ".join(ARITHMETICS), "Choose one of these with --arithmetic"
            )
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise SchemeError(f"{name} = {getattr(self, name)}", "a positive number", f"Raise --{name}")

    @property
    def start(self) -> "Recipe | None":
        """The recipe of the checkpoint that training begins with; None without training, and from the model itself."""
        if self.training is None or self.training.start == NO_START:
            return None
        return replace(self, method=self.training.start, training=None)

    @property
    def posttraining(self) -> Method:
        """The method that rounds: this one, or the one that training begins with."""
        if self.training is None:
            return METHODS[self.method]
        return METHODS["rtn" if self.training.start == NO_START else self.training.start]

    @property
    def calibrated(self) -> bool:
        """Whether the method that rounds looks at activations, and so at samples, length and seed."""
        return self.posttraining.calibrated

    @property
    def grid_search(self) -> str:
        """`search`, or what the method does untold: nearest takes the plain range, GPTQ the grid of least error.

        Of the weights, and at 2 bits of the outputs (demo model, symmetric, KL over windows and conversations: 0.31 nat
        against 0.37; at 4 bits it was the worse of the two, 0.0084 against 0.0050 over conversations).
        """
        if self.search or self.posttraining.rounding != "gptq":
            return self.search or "minmax"
        return "output" if self.scheme.bits == 2 else "mse"

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of the linear layer of that full name; None where it is kept in 16 bits, as the output head is
        unless an exception says otherwise."""
        found = None if module == HEAD else self.scheme
        for exception in self.exceptions:
            if exception.matches(module):
                found = exception.scheme
        return found

    def plan(self, family: Family, blocks: int) -> dict[str, Scheme | None]:
        """The scheme of every linear layer of a model's blocks, and of its output head if it has one, by full name.

        Raises SchemeError for an exception that matches none of them, which is a typing mistake.
        """
        names = [f"model.layers.{index}.{name}" for index in range(blocks) for name in family.linears]
        for exception in self.exceptions:
            if not any(exception.matches(name) for name in (*names, HEAD)):
                raise SchemeError(
                    f"--keep {exception.pattern}, which no linear layer's name matches",
                    f"a part of a name such as {names[-1]}, or {HEAD}",
                    "Correct the pattern; embeddings and norms are kept in any case",
                )
        head = self.scheme_of(HEAD)
        return {name: self.scheme_of(name) for name in names} | ({HEAD: head} if head else {})

    def resolve_format(self, plan: Mapping[str, Scheme | None], shapes: formats.Shapes | None = None) -> str:
        """The checkpoint's format. Raises SchemeError where it cannot hold the plan."""
        schemes = {name: scheme for name, scheme in plan.items() if scheme}
        kept = [name for name, scheme in plan.items() if not scheme]
        if shapes:
            for name, scheme in schemes.items():
                scheme.groups(shapes[name][1])
        chosen = self.format or formats.default(schemes)
        formats.check(chosen, schemes, kept, shapes)
        return chosen

    def record(self) -> dict[str, Any]:
        """What decides the numbers, as plain data: a method without calibration leaves the calibration's fields out."""
        fields = asdict(self) | {"search": self.grid_search}
        fields["exceptions"] = list(fields["exceptions"])
        scheme = fields.pop("scheme")
        if not self.calibrated:
            for name in ("samples", "arithmetic") if self.training else ("samples", "length", "seed", "arithmetic"):
                del fields[name]
        del fields["training"]
        if self.training:
            fields["training"] = self.training.record()
        return {"revision": REVISION, **fields, **scheme}

    def sha256(self) -> str:
        """Hex digest of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def parse_exception(text: str, scheme: Scheme) -> Exception_:
    """`down_proj=8bit`, `layers\\.0\\.=16bit`, `lm_head=4bit-g32`: what is not said is as in `scheme`."""
    found = _EXCEPTION.fullmatch(text.strip())
    try:
        if found is None:
            raise re.error("no PATTERN=BITS")
        re.compile(found["pattern"])
    except re.error as error:
        raise SchemeError(
            f"--keep {text!r} ({error})",
            "PATTERN=BITSbit with 2, 3, 4, 8 or 16 bits, and -g32 and so on for another group size",
            'Write --keep "down_proj=8bit"',
        ) from error
    if found["bits"] == "16":
        return Exception_(found["pattern"], None)
    group = int(found["group"]) if found["group"] else scheme.group_size
    return Exception_(found["pattern"], with_bits(replace(scheme, group_size=group), int(found["bits"])))


def with_bits(scheme: Scheme, bits: int) -> Scheme:
    """`scheme` with other bits; 8 without activations are symmetric, the only ones that vLLM's Marlin kernel has."""
    if bits == 8 and scheme.activation_bits is None:
        return replace(scheme, bits=8, symmetric=True)
    return replace(scheme, bits=bits)


def default_scheme(
    method: str,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activation_bits: int | None = None,
) -> Scheme:
    """The scheme of what was asked, the rest as the field does: GPTQ and 8 bits symmetric, SmoothQuant W8A8."""
    if activation_bits is None and bits is None and method.startswith("smoothquant"):
        activation_bits = 8
    if activation_bits:
        bits, group_size = bits or activation_bits, group_size or PER_CHANNEL
        symmetric = True if symmetric is None else symmetric
    if symmetric is None:
        symmetric = method == "gptq" or bits == 8
    return Scheme(bits or 4, group_size or 128, symmetric, activation_bits)
