"""What a node of a cluster has, and whether nodes are alike enough to measure one run on. Asked on each node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import __version__, models
from harness.engines import environment
from harness.engines.environment import EngineEnv
from harness.errors import InputError
from harness.records import Environment
from harness.rundir import describe_machine


@dataclass(frozen=True, slots=True)
class Facts:
    """What a node finds when it looks at itself."""

    kneebench: str
    environment: Environment
    engine: EngineEnv


def look(engine_python: Path | None, argv: tuple[str, ...]) -> Facts:
    """What this machine is. Raises InputError where it has no engine."""
    _show_cards()
    engine = environment.find(engine_python)
    return Facts(__version__, describe_machine("vllm", engine.vllm_version, argv), engine)


def lacking(files: dict[Path, str | None]) -> list[str]:
    """Names of those that this machine does not see with their digests."""
    return [path.name for path, sha256 in files.items() if not path.exists() or (sha256 and digest(path) != sha256)]


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or of a directory's weights; None for a directory without."""
    return models.checkpoint_sha256(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def _show_cards() -> None:
    """Ray hides the cards from a task that asks for none of them; this one only looks."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "unset"):
        del os.environ["CUDA_VISIBLE_DEVICES"]


def check_alike(found: Sequence[Facts], card_type: str | None) -> None:
    """Raises InputError for nodes that a run cannot be spread over. The first may be of another card type."""
    for what, versions in (
        ("kneebench", {__version__, *(facts.kneebench for facts in found)}),
        ("vLLM", {facts.engine.vllm_version for facts in found}),
    ):
        if len(versions) > 1:
            raise InputError(
                f"nodes of the cluster have {what} {' and '.join(sorted(versions))}",
                allowed="one version everywhere",
                remedy="bring all nodes to one version",
            )
    kinds = {_machine(facts.environment) for facts in found[1:]}
    if len(kinds) > 1:
        raise InputError(
            f"nodes {f'with {card_type} ' if card_type else ''}are not alike: {', '.join(sorted(kinds))}",
            allowed="one kind of machine for each --card: what differs besides the precision cannot be compared",
            remedy="name them apart, ray start --resources '{\"card:NAME\": 1}', and choose by --card NAME,NAME",
        )


def _machine(of: Environment) -> str:
    return of.gpu or f"{of.cpu} with {of.cpu_cores} cores"
