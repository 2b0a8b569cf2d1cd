"""What somebody may have meant who typed a name that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_ALIKE = 0.6
"""The ratio of what two names share, from which on difflib itself calls them close: `qwen7b` has 0.75 with
`qwen2.5-7b`, `foo` 0.29 with `code`."""
_BEHIND = 0.15
"""A name that is so much less alike than the best one was not meant."""
_MOST = 3


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """': did you mean chat?', to put behind a problem; '' where nothing known is alike.

    Case does not count. A name that begins with the given one, or has it in it, is alike: `4080` is `rtx-4080`.
    """
    wanted = given.strip().lower()
    alike = {name: _alike(wanted, name.lower()) for name in known}
    least = max(_ALIKE, max(alike.values(), default=0.0) - _BEHIND)
    best = sorted((name for name in alike if alike[name] >= least), key=lambda name: -alike[name])[:_MOST]
    return f": did you mean {' or '.join(best)}?" if best else ""


def _alike(wanted: str, name: str) -> float:
    """2 M / T: M the letters that are shared in order, T those of both."""
    ratio = SequenceMatcher(None, wanted, name).ratio()
    part = len(wanted) > 1 and (name.startswith(wanted) or (len(wanted) > 2 and wanted in name))
    return max(ratio, _ALIKE) if part else ratio
