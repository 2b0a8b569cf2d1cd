"""Where in a cluster an engine fits, how many at once, and what an hour of it costs. Pure functions of what nodes have.

A node says what it has in resources, by Ray's names. An engine asks for GPUs and a core, or for a whole node without
GPUs; Ray then finds the place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.errors import InputError
from harness.prices import load_prices, offer
from harness.records import Scenario

LABELS = ("card:", "accelerator_type:")
"""How a node's resource says what card it has: the team's word first, for Ray knows few cards of workstations."""
LOAD = "load"
"""The resource of nodes that make load for engines elsewhere; it counts the generators that they run at once."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    resources: Mapping[str, float]
    """By Ray's names, all that it has, free or not: CPU, GPU, accelerator_type:L4, card:rtx-a4000 ..."""

    def has(self, name: str) -> float:
        return self.resources.get(name, 0.0)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one engine takes of one node."""

    cpus: float
    gpus: int = 0
    label: str | None = None
    """A resource that says what card the node has; None: any node."""

    def fits(self, node: Node) -> int:
        """How many such engines the node holds at once."""
        if self.label is not None and not node.has(self.label):
            return 0
        counts = [int(node.has(name) // wanted) for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus)) if wanted]
        return min(counts)

    def options(self) -> dict[str, Any]:
        """As a Ray task is told. A label is a quality and is not used up: a crumb of it is asked for."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "resources": {} if self.label is None else {self.label: 0.001},
        }


def demand(nodes: Sequence[Node], cards: int = 1, card_type: str | None = None) -> Demand:
    """What an engine on `cards` GPUs takes: those and a core of one node; without any GPU in the cluster a whole node.

    Raises InputError where no node could ever hold it, and for nodes without GPUs that differ in size.
    """
    label = None if card_type is None else _label(nodes, card_type)
    among = [node for node in nodes if label is None or node.has(label)]
    if any(node.has("GPU") for node in nodes):
        wanted = Demand(1, cards, label)
        if not any(map(wanted.fits, among)):
            raise InputError(
                f"an engine on {cards} GPU{'s' if cards > 1 else ''}{f' of type {card_type}' if card_type else ''}: "
                "no node of the cluster holds it",
                allowed=f"{int(max((node.has('GPU') for node in among), default=0))} at most, on one node",
                remedy="ask for fewer by --tensor-parallel, or start Ray on a node that has them",
            )
        return wanted
    sizes = sorted({node.has("CPU") for node in among if node.has("CPU")})
    if len(sizes) != 1:
        raise InputError(
            "the cluster has no GPU, and "
            + (f"nodes of {', '.join(f'{size:g}' for size in sizes)} CPUs" if sizes else "no CPU either"),
            allowed="nodes that are alike: what one run measures on different machines cannot be compared",
            remedy="give alike nodes a name, ray start --resources '{\"card:big\": 1}', and add --card big",
        )
    return Demand(sizes[0], 0, label)


def width(nodes: Sequence[Node], wanted: Demand) -> int:
    """How many such engines run at once when nothing else uses the cluster."""
    return sum(map(wanted.fits, nodes))


def load_places(nodes: Sequence[Node], away: int) -> int:
    """How many engines may be driven at once by `away` generators each. Raises InputError where that is none."""
    there = int(sum(node.has(LOAD) for node in nodes))
    if there < away:
        raise InputError(
            f"--load away with {away} generator{'' if away == 1 else 's'} for an engine, and nodes for {there}",
            allowed="as many as the nodes' resource `load` counts, one process each",
            remedy="start Ray on nodes for it: ray start --address HOST:PORT --num-cpus 0 --resources '{\"load\": 4}'",
        )
    return there // away


def card_types(nodes: Sequence[Node]) -> dict[str, str]:
    """What `--card` may say here -> the resource that says it."""
    names = sorted({name for node in nodes for name in node.resources})
    return {name.removeprefix(prefix): name for prefix in reversed(LABELS) for name in names if name.startswith(prefix)}


def _label(nodes: Sequence[Node], card_type: str) -> str:
    known = card_types(nodes)
    found = {letters(name): label for name, label in known.items()}.get(letters(card_type))
    if found is None:
        raise InputError(
            f"--card {card_type}: no node of the cluster says that it has such a card",
            allowed=", ".join(known) or "none: no node of this cluster names a card",
            remedy=f"say it when the node is started: ray start --resources '{{\"card:{card_type}\": 1}}'",
        )
    return found


def letters(name: str) -> str:
    """What counts in a card's name: RTX A4000, rtx-a4000 and rtx_a4000 are one card."""
    return re.sub(r"[\W_]", "", name.lower())


def priced(scenario: Scenario, card_type: str | None) -> Scenario:
    """The scenario at the card's cheapest rent of the catalogue (on demand, else a third party's), if it has one."""
    rent = None if card_type is None else offer(card_type.lower(), load_prices())
    return scenario if rent is None else replace(scenario, usd_per_hour=rent.usd_per_hour)
