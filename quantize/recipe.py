"""What is to be done to a model: the part of the request that changes the numbers, and nothing else.

Two runs with the same model, recipe and calibration tokens give the same checkpoint; that is what the cache relies on.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from quantize.errors import SchemeError
from quantize.scheme import Scheme

METHODS = ("rtn", "awq")
CALIBRATED = ("awq",)  # those that look at activations

# Raise it when a change of code changes the numbers of a finished checkpoint: cached ones are then made anew.
REVISION = 1


@dataclass(frozen=True)
class Recipe:
    """`method` with `scheme`, calibrated on samples x length tokens: sequences of up to `length`, drawn with `seed`."""

    method: str = "awq"
    scheme: Scheme = field(default_factory=Scheme)
    samples: int = 128
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SchemeError(f"method = {self.method!r}", ", ".join(METHODS), "Choose one of these with --method")
        if self.scheme.bits != 4 or self.scheme.symmetric:
            kind = "symmetric" if self.scheme.symmetric else "asymmetric"
            raise SchemeError(
                f"bits = {self.scheme.bits}, {kind}",
                "4 bits, asymmetric: what vLLM reads from an AutoAWQ checkpoint",
                "Choose --bits 4",
            )
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise SchemeError(f"{name} = {getattr(self, name)}", "a positive number", f"Raise --{name}")

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations, and so at samples, length and seed."""
        return self.method in CALIBRATED

    def record(self) -> dict[str, Any]:
        """What decides the numbers, as plain data: a method without calibration leaves the calibration's fields out."""
        fields = asdict(self)
        scheme = fields.pop("scheme")
        kept = fields if self.calibrated else {"method": self.method}
        return {"revision": REVISION, **kept, **scheme}

    def sha256(self) -> str:
        """Hex digest of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()
