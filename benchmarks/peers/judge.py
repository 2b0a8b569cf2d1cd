"""What a quantized model is worth beside the original: one judge for every tool's result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import common
from peers.records import Run
from torch import Tensor

from quantize import fidelity


class Judge:
    """The original model and the sequences to judge by. Weights that were judged before are not judged again."""

    def __init__(self, model: Path, parts: Mapping[str, Sequence[Sequence[int]]], known: Iterable[Run]) -> None:
        self.path, self.parts = model, parts
        self.original = fidelity.load_original(model)
        self.verdicts = {run.weights_sha256: _verdict(run) for run in known if run.weights_sha256}

    def __call__(self, dense: Path | None, checkpoint: Path) -> dict[str, Any]:
        """The verdict on a file of dense weights, or else on one of our checkpoints."""
        quantized = fidelity.load_dequantized(checkpoint) if dense is None else self._filled(dense)
        sha = _weights_sha256(quantized.state_dict())
        if sha not in self.verdicts:
            found = {name: fidelity.compare(self.original, quantized, part) for name, part in self.parts.items()}
            self.verdicts[sha] = pooled(found, {name: len(part) for name, part in self.parts.items()})
        return {"weights_sha256": sha, **self.verdicts[sha]}

    def _filled(self, dense: Path) -> Any:
        model = fidelity.load_original(self.path)
        missing, unknown = model.load_state_dict(common.read(dense.parent, dense.name), strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        if unknown or set(missing) - tied:
            raise SystemExit(f"{dense}: missing {sorted(set(missing) - tied)[:3]}, unknown {sorted(unknown)[:3]}")
        return model


def pooled(found: Mapping[str, fidelity.Fidelity], sequences: Mapping[str, int]) -> dict[str, Any]:
    """One verdict from those of several parts, each position with the same weight.

    A sequence of n tokens has n positions, and n - 1 next tokens that perplexity is of.
    """
    positions = {name: one.positions for name, one in found.items()}
    predicted = {name: positions[name] - sequences[name] for name in found}

    def mean(values: Mapping[str, float], weights: Mapping[str, int]) -> float:
        return sum(values[name] * weights[name] for name in found) / sum(weights.values())

    return {
        "kl": mean({name: one.kl_nats for name, one in found.items()}, positions),
        "kl_parts": {name: one.kl_nats for name, one in found.items()},
        "top1": mean({name: one.top1_agreement for name, one in found.items()}, positions),
        "perplexity": math.exp(mean({n: math.log(one.perplexity_quantized) for n, one in found.items()}, predicted)),
        "perplexity_original": math.exp(
            mean({name: math.log(one.perplexity_original) for name, one in found.items()}, predicted)
        ),
    }


def _verdict(run: Run) -> dict[str, Any]:
    names = ("kl", "kl_parts", "top1", "perplexity", "perplexity_original")
    return {name: getattr(run, name) for name in names}


def _weights_sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()
