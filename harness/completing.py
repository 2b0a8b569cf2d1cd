"""Values that a shell completes: `bench --install-completion`, then TAB. Each takes what is typed so far.

A list that is joined by commas is completed at its last name. What is no name here (a path, a hub's model) the shell
completes as a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

RESULTS = Path("results")


def scenarios(incomplete: str) -> list[str]:
    from harness.scenario import scenario_names

    return _beginning(incomplete, scenario_names())


def models(incomplete: str) -> list[str]:
    from harness.models import known_shapes

    return _beginning(incomplete, ["demo", *(f"shape:{name}" for name in known_shapes())])


def precisions(incomplete: str) -> list[str]:
    """Those of a sweep; a name that is in the list already is not offered again."""
    from harness.checkpoints import PRECISIONS

    before, comma, last = incomplete.rpartition(",")
    there = before.split(",")
    return [f"{before}{comma}{name}" for name in _beginning(last, [one for one in PRECISIONS if one not in there])]


def gpus(incomplete: str) -> list[str]:
    from harness.predict.cards import cards

    return _beginning(incomplete, [card.id for card in cards()])


def runs(incomplete: str) -> list[str]:
    """Run directories under results/, or in the directory that is typed so far."""
    return _runs(incomplete, ("points.csv", "run.toml", "quality.toml", "trace.toml"))


def unfinished(incomplete: str) -> list[str]:
    """Runs that --resume can carry on with."""
    from harness.rundir import UNFINISHED

    return _runs(incomplete, (UNFINISHED,))


def _runs(incomplete: str, signs: tuple[str, ...]) -> list[str]:
    folder = Path(incomplete).parent if "/" in incomplete else RESULTS
    try:
        there = sorted(path for path in folder.iterdir() if any((path / sign).is_file() for sign in signs))
    except OSError:
        return []
    return _beginning(incomplete, map(str, there))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
