"""A finished run of one tool, as it stands in the results' file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """A finished run and its judgement. Seconds, MiB, nats a token, shares; `error` where there was no result."""

    recipe: str
    tool: str
    method: str
    bits: int
    symmetric: bool
    repeat: int
    error: str = ""
    seconds: float | None = None
    load_seconds: float | None = None
    save_seconds: float | None = None
    before_mib: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    weights_sha256: str = ""
    kl: float | None = None
    kl_parts: Mapping[str, float] = field(default_factory=dict)
    top1: float | None = None
    perplexity: float | None = None
    perplexity_original: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, bool, int]:
        """What makes it the same run."""
        return self.recipe, self.bits, self.symmetric, self.repeat
