"""Text in a given number of columns. Names are cut in the middle, for they differ at both ends; numbers are not cut."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

NO_EDGE = 500
"""Columns of what is no terminal: a file or a pipe has no edge to fold at."""


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and its end around an ellipsis, `most` letters together."""
    if len(text) <= most:
        return text
    if most < 3:
        return text[: max(0, most)]
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def wrapped(text: str, columns: int) -> str:
    """Each line of the text folded between words."""
    fold = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(fold.wrap(line)) for line in text.splitlines())


def column_widths(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Widths of a table's columns that share `room`: the widest one that can gives first, none goes below `least`.

    None: there is no room for the least of all.
    """
    if sum(least) > room:
        return None
    widths = list(natural)
    while sum(widths) > room:
        can_give = [at for at, width in enumerate(widths) if width > least[at]]
        widths[max(can_give, key=widths.__getitem__)] -= 1
    return widths
