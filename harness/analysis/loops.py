"""Words that are said again and again: where a text loops, in time linear in its length.

`symptoms.py` has what counts as a loop, in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, kana, Chinese characters: scripts written without spaces."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")

PIECE = 3
"""Characters that may stand behind a loop of pieces, as one more word may behind a loop of words."""


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch [start, end) of a sequence in which every item is the one `period` before it."""

    period: int
    start: int
    end: int

    @property
    def times(self) -> int:
        return (self.end - self.start) // self.period


def words(text: str) -> list[str]:
    """The words of a text as the definitions count them, small letters."""
    return WORD.findall(text.lower())


def digits_alike(word: str) -> str:
    """The word, or one and the same for all numbers."""
    return "0" if word.isdigit() else word


def word_loop(said: Sequence[str], counts: bool, code: bool) -> Run | None:
    """The loop at the end of a sequence of words, or the one that is more than half of it; None if there is none.

    counts: its numbers were made alike, see `digits_alike`. code: more repeats are wanted.
    """
    count = len(said)
    # A run of more than half that has three periods holds one that ends at the middle, or else at two thirds.
    for at in (count - 1, count - 2, count // 2, 2 * count // 3):
        for run in _runs_through(said, at):
            unit = said[run.start : run.start + run.period]
            lasts = run.end >= count - 1 or 2 * (run.end - run.start) > count
            if lasts and run.times >= _repeats_wanted(unit, counts, code):
                return run
    return None


def _repeats_wanted(unit: Sequence[str], counts: bool, code: bool) -> float:
    """Repeats from which a unit of words is a loop."""
    if counts:
        return 6 if sum(not word.isdigit() for word in unit) >= 2 else float("inf")
    if len(unit) == 1 and unit[0].isdigit():
        return 8
    return 6 if code else 4 if len(unit) == 1 else 3


def sign_loop(text: str, code: bool) -> Run | None:
    """The loop of signs, or of pieces of one word, that a text ends with, but for a piece that is not repeated."""
    text = text.rstrip()
    for at in (len(text) - 1, len(text) - 1 - PIECE):
        for run in _runs_through(text, at):
            unit = text[run.start : run.start + run.period]
            wanted = 32 if unit.isdigit() else 16 if code else 8
            whole_words = not unit.isalnum() and words(unit)  # those are counted as words
            if run.times >= wanted and run.end >= len(text) - PIECE and not whole_words and not unit.isspace():
                return run
    return None


def _runs_through(items: Sequence[str], at: int) -> Iterator[Run]:
    """For each period, the shortest first, the longest run that holds a whole period up to item `at`.

    By two prefix tables (Main & Lorentz, J. Algorithms 5, 1984), in time linear in the items: to the right of `at` the
    run goes as far as items[at + 1:] and items[at + 1 - period:] begin alike, to the left as far as what ends at `at`
    and what ends at `at - period` end alike. A unit that is itself a shorter one repeated is left out: of "a a a a"
    only "a" is a period.
    """
    count = len(items)
    if not 0 <= at < count:
        return
    left = _alike([*reversed(items[: at + 1])])
    right = _alike([*items[at + 1 :], "", *items])  # "" is no item: nothing is alike across it
    shorter: list[Run] = []
    for period in range(1, at + 1):
        after = right[count + 1 - period] if at + 1 < count else 0
        run = Run(period, at + 1 - period - left[period], at + 1 + after)
        if run.times >= 2 and not any(
            period % one.period == 0 and one.start <= run.start and run.end <= one.end for one in shorter
        ):
            shorter.append(run)
            yield run


def _alike(items: Sequence[str]) -> list[int]:
    """The Z function: for each place, how many items from there on are the same as from the beginning on."""
    count = len(items)
    alike = [0] * count
    left = right = 0
    for at in range(1, count):
        length = min(right - at, alike[at - left]) if at < right else 0
        while at + length < count and items[length] == items[at + length]:
            length += 1
        if at + length > right:
            left, right = at, at + length
        alike[at] = length
    return alike
