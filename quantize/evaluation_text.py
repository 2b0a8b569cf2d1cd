"""Which text a quantized model is compared with its original on: one that made no difference to the checkpoint.

`choose` is for a checkpoint that is there already, and looks for what was not calibrated on. `split` is for several
that are yet to be made, and keeps a part back first. Both draw as `calibration` does, whole sequences by seed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from quantize import calibration
from quantize.calibration import CalibrationSet
from quantize.errors import CalibrationError
from quantize.recipe import Recipe

EVALUATED = 16
"""Sequences of the recipe's length that are compared on, in tokens; shorter ones are as many more."""

_KEPT_BACK = 0.2
"""Of a text too short for calibration and evaluation both."""


@dataclass(frozen=True)
class Split:
    """`calibration`: what methods may see; `evaluation`: what none of them does."""

    calibration: CalibrationSet
    evaluation: CalibrationSet


def choose(model_dir: Path, recipe: Recipe, file: Path | None = None, text: Path | None = None) -> CalibrationSet:
    """Sequences to evaluate a checkpoint of `recipe` on: of `file`, else what the calibration text `text` (None: the
    model's own) has beyond those that were calibrated on; where it has no more, those, and `origin` says so."""
    if file is not None:
        return calibration.load(model_dir, replace(recipe, samples=EVALUATED), file)
    known = calibration.load(model_dir, recipe, text)
    seen = set(known.sequences) if recipe.calibrated else set()
    more = calibration.load(model_dir, replace(recipe, samples=recipe.samples + EVALUATED), text)
    sequences = tuple(ids for ids in more.sequences if ids not in seen)
    if tokens(sequences) < recipe.length:
        return replace(known, origin=f"{known.origin}, CALIBRATED ON: other text fares worse")
    return CalibrationSet(sequences, f"{known.origin}, not calibrated on")


def split(model_dir: Path, recipe: Recipe, text: Path | None = None, file: Path | None = None) -> Split:
    """What methods may see of the calibration text `text` (None: the model's own), and what they are evaluated on.

    That is of `file`, whatever the calibration text does not hold as well. Without one the calibration text is cut in
    two: samples x length tokens, and `EVALUATED` x length after those. Where it has not so many left, a fifth of it is
    kept back. A sequence that comes twice counts once, so none is in both. Raises CalibrationError as
    `calibration.load` does, and where a part is shorter than one sequence.
    """
    if file is not None:
        before = calibration.load(model_dir, recipe, text)
        after = choose(model_dir, recipe, file)
        seen = set(before.sequences)
        after = replace(after, sequences=tuple(ids for ids in after.sequences if ids not in seen))
    else:
        before, after = _cut(
            calibration.load(model_dir, replace(recipe, samples=recipe.samples + EVALUATED), text), recipe
        )
    for part, what in ((before, "to calibrate on"), (after, "to evaluate on, which was not calibrated on")):
        if tokens(part.sequences) < recipe.length:
            raise CalibrationError(
                f"{tokens(part.sequences)} tokens {what}",
                f"at least --length, {recipe.length}",
                "Give more text with --calibration, other text with --text, or a smaller --length",
            )
    return Split(before, after)


def _cut(drawn: CalibrationSet, recipe: Recipe) -> tuple[CalibrationSet, CalibrationSet]:
    sequences = tuple(dict.fromkeys(drawn.sequences))
    spare = tokens(sequences) - recipe.samples * recipe.length
    wanted = min(EVALUATED * recipe.length, max(spare, int(_KEPT_BACK * tokens(sequences))))
    first, held = len(sequences), 0
    while first and held < wanted:
        first -= 1
        held += len(sequences[first])
    kept_back = CalibrationSet(sequences[first:], f"{drawn.origin}, a part that no method was given")
    return replace(drawn, sequences=sequences[:first]), kept_back


def tokens(sequences: Iterable[tuple[int, ...]]) -> int:
    """How many there are."""
    return sum(map(len, sequences))
