"""What config.json says of a model: its architecture, and from that parameters, bytes of weights and of KV cache.

Exact for plain dense decoders (Llama, Mistral, Qwen2, Qwen3), quantized or not. Of any other architecture nothing is
computed: None, not a guess.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ModelError

# Decoders whose parameter count follows from the fields of config.json by the formula in `Architecture`.
_BIASED_QKV = frozenset({"qwen2"})
_NORMED_QK = frozenset({"qwen3"})
_DENSE_DECODERS = frozenset({"llama", "mistral"}) | _BIASED_QKV | _NORMED_QK

_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Quantization:
    method: str
    bits: int
    group_size: int
    zero_points: bool

    def bytes(self, inputs: int, outputs: int) -> float:
        """Of a linear layer: bits/8 a weight and, for each group, a 16-bit scale and a zero point."""
        groups = 1 if self.group_size <= 0 else math.ceil(inputs / self.group_size)
        zero_bits = self.bits if self.zero_points else 0
        return inputs * outputs * self.bits / 8 + groups * outputs * (16 + zero_bits) / 8


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense decoder by the fields of its config.json. H hidden, I intermediate, L layers, V vocabulary."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    max_positions: int | None
    quantization: Quantization | None = None
    head: Quantization | None = None
    """Of the output head, where it is quantized too."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven linear layers of one block: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        return ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h))

    @property
    def linear_parameters(self) -> int:
        """Weights that quantization shrinks: L × Σ in·out."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def parameters(self) -> int:
        """V·H (twice unless tied) + L × (Σ in·out + 2H + the qkv biases of Qwen2 or the q/k norms of Qwen3) + H."""
        extra = 0
        if self.model_type in _BIASED_QKV:
            extra = (self.heads + 2 * self.kv_heads) * self.head_dim
        elif self.model_type in _NORMED_QK:
            extra = 2 * self.head_dim
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.linear_parameters + self.layers * (2 * self.hidden + extra) + self.hidden

    @property
    def weight_bytes(self) -> int:
        """2 bytes a parameter, but for what is quantized (`Quantization.bytes`)."""
        if self.quantization is None:
            return 2 * self.parameters
        small = self.layers * sum(self.quantization.bytes(*linear) for linear in self.linears)
        dense = self.parameters - self.linear_parameters
        if self.head is not None and not self.tied:
            small += self.head.bytes(self.hidden, self.vocabulary)
            dense -= self.hidden * self.vocabulary
        return round(small) + 2 * dense

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (K and V) × L × kv_heads × head_dim × 2 bytes: the engine's default cache is 16 bit in every precision."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ModelError naming the file for one that is missing or broken."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}).", remedy="a model is a directory with config.json"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}).", remedy="fetch or write the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type.", allowed="the config.json of a transformers checkpoint")
    return config


def architecture(config: dict[str, Any]) -> Architecture | None:
    """The architecture in a config.json; None where it is not a dense decoder whose size we know to compute."""
    if config["model_type"] not in _DENSE_DECODERS:
        return None
    try:
        heads = int(config["num_attention_heads"])
        return Architecture(
            model_type=config["model_type"],
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config.get("max_position_embeddings"),
            quantization=quantization(config),
            head=head_quantization(config),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"config.json of a {config['model_type']} model: {error} is missing or no number.") from error


def quantization(config: dict[str, Any]) -> Quantization | None:
    """What a quantization_config says of the weights: the AWQ and GPTQ form, and that of compressed-tensors."""
    given = config.get("quantization_config")
    if not given:
        return None
    if "config_groups" in given:
        return _of_group(given, next(iter(given["config_groups"].values())))
    return Quantization(
        method=str(given.get("quant_method", "unknown")),
        bits=int(given.get("bits", 16)),
        group_size=int(given.get("group_size", -1)),
        zero_points=bool(given.get("zero_point", not given.get("sym", True))),
    )


def head_quantization(config: dict[str, Any]) -> Quantization | None:
    """What a quantization_config says of the output head, which is left in 16 bit unless it is named."""
    given = config.get("quantization_config") or {}
    if "config_groups" in given:
        named = (group for group in given["config_groups"].values() if _HEAD in group.get("targets", ()))
        return next((_of_group(given, group) for group in named), None)
    if not given.get(_HEAD):
        return None
    # GPTQModel's rules for single modules.
    own = (rule for pattern, rule in (given.get("dynamic") or {}).items() if pattern.startswith(f"+:{_HEAD}"))
    return quantization({"quantization_config": given | next(own, {})})


def _of_group(given: dict[str, Any], group: dict[str, Any]) -> Quantization:
    """What a group of compressed-tensors' config_groups says."""
    weights = group["weights"]
    return Quantization(
        method=given.get("quant_method", "compressed-tensors"),
        bits=int(weights["num_bits"]),
        group_size=int(weights.get("group_size") or -1),
        zero_points=not weights.get("symmetric", True),
    )
