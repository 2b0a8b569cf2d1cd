"""What config.json says of a model: its architecture, and from that parameters, bytes of weights and of KV cache.

Exact for dense decoders of the families in `_FAMILIES` (Llama, Mistral, Qwen, Gemma, Phi), quantized or not. Of any
other architecture nothing is computed: None, not a guess.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness.errors import ModelError
from harness.files import read_text


@dataclass(frozen=True, slots=True)
class _Family:
    """How the decoders of a model_type differ from Llama, which has all the defaults. Source: transformers' modules."""

    fused: bool = False
    """q, k and v are one matrix, and so are gate and up."""
    gated: bool = True
    """The MLP has gate, up and down; else up and down."""
    norms: int = 2
    """Norms of the hidden size in a block."""
    normed_qk: bool = False
    """One norm of head_dim for the queries and one for the keys."""
    biased: Literal["as configured", "never", "qkv", "everything"] = "as configured"
    """Linear layers with a bias. everything: norms and output head too. as configured: attention_bias, mlp_bias."""
    tied: bool = False
    """The output head is the embedding, where config.json does not say."""
    head_dim: int | None = None
    """Where config.json does not say; None: hidden size / heads."""
    full_every: int | None = None
    """Of layers with a sliding window, every n-th attends to everything all the same; 0: none does. None: no windows,
    unless config.json has use_sliding_window."""


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(biased="never", full_every=0),
    "qwen2": _Family(biased="qkv"),
    "qwen3": _Family(normed_qk=True, head_dim=128),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(tied=True, head_dim=256, norms=4, full_every=2),
    "gemma3_text": _Family(tied=True, head_dim=256, norms=4, normed_qk=True, full_every=6),
    "phi": _Family(gated=False, norms=1, biased="everything"),
    "phi3": _Family(fused=True, biased="never", full_every=0),
}
FAMILIES = tuple(_FAMILIES)
"""The model_types whose sizes are computed."""

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
    biases: int = 0
    """Bias parameters of the linear layers of one block."""
    window: int | None = None
    """Tokens that a layer with a sliding window attends to; None where no layer has one."""
    windowed_layers: int = 0
    """Layers with a sliding window; the other L - windowed_layers attend to everything."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the linear layers of one block as the checkpoint has them.

        q, k, v, o, gate, up, down; Phi-3: qkv, o, gate_up, down; Phi-1 and 2: q, k, v, o, up, down.
        """
        family = _FAMILIES[self.model_type]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        if family.fused:
            return (h, q + 2 * kv), (q, h), (h, 2 * i), (i, h)
        mlp = ((h, i), (h, i), (i, h)) if family.gated else ((h, i), (i, h))
        return (h, q), (h, kv), (h, kv), (q, h), *mlp

    @property
    def linear_parameters(self) -> int:
        """Weights that quantization shrinks: L × Σ in·out."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def parameters(self) -> int:
        """V·H (twice unless tied) + L × (Σ in·out + biases + norms) + the last norm (+ the bias of Phi's head).

        Norms of a block: 2H (Gemma 2 and 3: 4H), with q/k norms 2·head_dim more. A norm of Phi is H and a bias.
        """
        family = _FAMILIES[self.model_type]
        everything = family.biased == "everything"
        norm = self.hidden * (2 if everything else 1)
        norms = family.norms * norm + (2 * self.head_dim if family.normed_qk else 0)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        head_bias = self.vocabulary if everything else 0
        return embeddings + self.linear_parameters + self.layers * (self.biases + norms) + norm + head_bias

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
        """2 (K and V) × L × kv_heads × head_dim × 2 bytes: the engine's default cache is 16 bit in every precision.

        Of every layer in full: with sliding windows this is the upper bound, and `kv_bytes` what is attended to.
        """
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def kv_bytes(self, context: int) -> int:
        """Bytes of KV cache that the next token reads after `context` tokens: a window ends what its layers read."""
        read = min(context, self.window) if self.window else context
        full = self.layers - self.windowed_layers
        return (full * context + self.windowed_layers * read) * self.kv_bytes_per_token // self.layers


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ModelError naming the file for one that is missing or broken."""
    try:
        config = json.loads(read_text(path))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}).", remedy="a model is a directory with config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({error}).", remedy="fetch or write the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type.", allowed="the config.json of a transformers checkpoint")
    return config


def architecture(config: dict[str, Any]) -> Architecture | None:
    """The architecture in a config.json; None where it is not a dense decoder whose size we know to compute."""
    family = _FAMILIES.get(config["model_type"])
    # Phi can have norms for queries and keys; no model that was published does.
    if family is None or config.get("qk_layernorm"):
        return None
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        windowed = _windowed_layers(family, config, layers)
        plain = Architecture(
            model_type=config["model_type"],
            layers=layers,
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or family.head_dim or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            max_positions=config.get("max_position_embeddings"),
            quantization=quantization(config),
            head=head_quantization(config),
            window=int(config["sliding_window"]) if windowed else None,
            windowed_layers=windowed,
        )
        sizes = (
            plain.layers,
            plain.hidden,
            plain.intermediate,
            heads,
            plain.kv_heads,
            plain.head_dim,
            plain.vocabulary,
            plain.window or 1,
        )
        if min(sizes) < 1:
            raise ValueError("a size below 1")
        return replace(plain, biases=_biases(family, config, plain))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ModelError(f"config.json of a {config['model_type']} model: {error} is missing or cannot be.") from error


def _biases(family: _Family, config: dict[str, Any], shape: Architecture) -> int:
    """Bias parameters of the linear layers of one block: a linear layer's bias is as long as its output."""
    outputs = [output for _, output in shape.linears]
    if family.biased == "everything":
        return sum(outputs)
    if family.biased == "qkv":
        return sum(outputs[:3])
    if family.biased == "never":
        return 0
    attention = sum(outputs[:4]) if config.get("attention_bias") else 0
    return attention + (sum(outputs[4:]) if config.get("mlp_bias") else 0)


def _windowed_layers(family: _Family, config: dict[str, Any], layers: int) -> int:
    """Layers with a sliding window, by what transformers reads: layer_types, sliding_window_pattern (every n-th layer
    is a full one), or max_window_layers (Qwen: those after the first n); else as the family has it."""
    if not config.get("sliding_window") or not config.get("use_sliding_window", family.full_every is not None):
        return 0
    if types := config.get("layer_types"):
        return sum(kind == "sliding_attention" for kind in types)
    if family.full_every is None:
        return max(0, layers - int(config["max_window_layers"]))
    every = int(config.get("sliding_window_pattern") or family.full_every)
    return layers - (layers // every if every else 0)


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
