"""How a run speaks of its own figures: as measured, or, where every row is predicted, as predicted.

A sentence is written once, as of a measurement. For a predicted run it is reworded as it leaves for a page, a workbook,
a figure or a terminal (`said`): the few words that claim that something ran are replaced, and a sentence that even then
does not own up begins with "Predicted:". Done at the door, it can be forgotten of no sentence, not even of those that
are still to be written. Names from outside stay as they are, whatever words they are made of.

Of a measured run every function here gives back what it was given.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import SweepPoint

REWORDED = {
    "measured window": "simulated window",
    "measured": "predicted",
    "tested": "simulated",
    "95 % interval": "95 % error band",
    "95 % intervals": "95 % error bands",
    "no interval": "no error band",
    "safe to promise": "safe by prediction",
}
"""What a measurement says of itself, and what a prediction says instead."""


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one run."""

    predicted: bool = False
    names: tuple[str, ...] = ()
    """Names from outside, in every spelling in which a sentence may hold them."""

    @property
    def also(self) -> str:
        """What the heading of a page, chapter or column has at its end."""
        return ", predicted" if self.predicted else ""

    def on(self, machine: str, end: str = ",") -> str:
        """How a sentence about a machine begins: "On X," or "Predicted for X:"."""
        return f"Predicted for {machine}:" if self.predicted else f"On {machine}{end}"

    def said(self, sentence: str, label: str = "Predicted:") -> str:
        """A sentence, or several that belong together, as this run may say it."""
        return f"{label} {self.reworded(sentence)}" if self.lacks(sentence) else self.reworded(sentence)

    def assumed(self, sentence: str) -> str:
        """A sentence about what was assumed, which no prediction is."""
        return f"Assumed for the prediction: {sentence}" if self.predicted else sentence

    def titled(self, title: str) -> str:
        """The title of a figure: "Predicted throughput against users"."""
        if not self.predicted:
            return title
        words = self.reworded(title)
        return f"Predicted {words if words[:2].isupper() else words[:1].lower() + words[1:]}"

    def lacks(self, text: str) -> bool:
        """Whether a text, once reworded, still does not say that it is predicted; what was not is no admission."""
        own = _names(self.names).sub("", self.reworded(text)).replace("not predicted", "")
        return self.predicted and "predict" not in own.lower()

    def reworded(self, text: str) -> str:
        """The text with other words where it speaks of measuring; nothing is put in front."""
        if not self.predicted:
            return text
        return _pattern(self.names).sub(lambda found: _OURS.get(found["ours"], found[0]), text)


MEASURED = Words()


def words_of(points: Sequence[SweepPoint], names: Sequence[str] = ()) -> Words:
    """The words of the run that has these rows; `names`: further ones from outside, beside those in the rows."""
    if not points or points[0].source != "predicted":
        return MEASURED
    own = [name for point in points for name in (point.precision, point.model, point.scenario, point.gpu, point.run_id)]
    return Words(True, tuple(dict.fromkeys(name for name in (*own, *names) if name and name not in _OURS)))


_OURS = {
    form: new for word, new in REWORDED.items() for form, new in ((word, new), (word.capitalize(), new.capitalize()))
}


@functools.lru_cache(maxsize=8)
def _names(names: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest)) or '(?!)'})(?!\w)")


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """A name from outside, or in the group "ours" a word of ours that stands alone: no part of a path or an id."""
    ours = "|".join(re.escape(word) for word in sorted(_OURS, key=len, reverse=True))
    return re.compile(rf"{_names(names).pattern}|(?<![\w/.`\\-])(?P<ours>{ours})(?![\w/`\\-])")
