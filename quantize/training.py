"""How a student is trained: the options of --method qat and qad, which are part of the recipe.

qat learns from the text (cross-entropy with the next token), qad from a frozen teacher, the model as it was (KL of the
two next-token distributions). Both begin at a quantized checkpoint or at the model itself, and both may mix the two.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from quantize.errors import SchemeError

METHODS = ("qat", "qad")
PRECISIONS = ("fp32", "bf16", "fp16")
SCALES = ("learned", "recomputed")
RATE = 0.008
"""Of a quantization step that AdamW moves a weight at a time, where no rate is given. On the demo model at 2 bits, 60
steps of 4,096 tokens from GPTQ, a rate of 0.0024, 0.0079 and 0.024 of the mean step took the held-out KL from 0.226 to
0.200, 0.075 and 0.328 nat."""


@dataclass(frozen=True)
class Training:
    """steps: of the optimizer, each on at least `batch` tokens of whole documents, `micro` at a time.

    start: the method whose result is trained on, `none` for the model itself; corpus_tokens: how much the teacher
    writes where there is no corpus. rate: of weights, norms and biases, None for `RATE` of the mean scale; it rises
    over the first `warmup` (a share of the steps) and falls along a cosine to a tenth; scale_rate: of ln s, likewise;
    freeze: the share of the steps after which the scales are constants. precision: of the products, forward and
    backward; master weights, sums and the optimizer's state are float32. loss_scale: of fp16, "dynamic" or "none".
    clip: of the gradient's norm.
    temperature, cross_entropy and hidden: of the loss (`distill`). top_k: of the teacher's distribution, kept on disk;
    0 runs the teacher each time. save: steps between states on disk; evaluate: how often the held-out loss is taken.
    """

    start: str = "gptq"
    steps: int = 150
    batch: int = 8192
    micro: int = 2048
    corpus_tokens: int = 262_144
    rate: float | None = None
    scale_rate: float = 3e-3
    warmup: float = 0.05
    freeze: float = 0.9
    scales: str = "learned"
    precision: str = "fp32"
    loss_scale: str = "dynamic"
    clip: float = 1.0
    checkpointing: bool = False
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    top_k: int = 0
    save: int = 50
    evaluate: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro", "corpus_tokens", "save", "evaluate"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "a positive number")
        for name in ("rate", "temperature", "clip"):
            value = RATE if getattr(self, name) is None else getattr(self, name)
            _check(name, value, value > 0 and math.isfinite(value), "a positive number")
        for name in ("warmup", "freeze", "cross_entropy"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share, from 0 to 1")
        for name in ("scale_rate", "hidden", "top_k"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("precision", self.precision, self.precision in PRECISIONS, ", ".join(PRECISIONS))
        _check("scales", self.scales, self.scales in SCALES, ", ".join(SCALES))
        _check("loss_scale", self.loss_scale, self.loss_scale in ("dynamic", "none"), "dynamic or none, of fp16")
        if self.top_k and self.hidden:
            raise SchemeError(
                "top_k with a loss of hidden states",
                "one of the two",
                "Leave --top-k out: only logits are kept",
            )

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed."""
        return self.cross_entropy < 1 or self.hidden > 0

    def learning_rate(self, step: int) -> float:
        """The factor on every rate at `step`, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising))) / 2

    def record(self) -> dict[str, Any]:
        """What decides the numbers: how often a state is saved does not."""
        fields = dict(vars(self))
        del fields["save"]
        return fields


def default_training(method: str, **given: Any) -> Training:
    """The training of `method`, with what was `given` (None: the default)."""
    known = {name: value for name, value in given.items() if value is not None}
    return replace(Training(cross_entropy=1.0 if method == "qat" else 0.0), **known)


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        flag = {"precision": "train-precision", "start": "start-from"}.get(name, name.replace("_", "-"))
        raise SchemeError(f"{name} = {value}", allowed, f"Correct --{flag}")
