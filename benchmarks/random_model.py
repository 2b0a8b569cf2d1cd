"""Models with a real architecture's shape and random weights of a fixed seed, for benchmarks of the quantizer."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model with tied embeddings. `shared`: key and value heads; `loud`: what the embedding is scaled by."""

    hidden: int
    intermediate: int
    heads: int
    shared: int
    loud: float


QWEN_1_5B = Shape(1536, 8960, 12, 2, loud=math.sqrt(1536))


def make_model(path: Path, shape: Shape, blocks: int, shards: int = 4) -> None:
    """Write the model in bfloat16, a shard in memory at a time."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.shared,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = _weight(generator, VOCABULARY, shape.hidden) * shape.loud
        for block in range(shard * blocks // shards, (shard + 1) * blocks // shards):
            tensors |= {f"model.layers.{block}.{part}": tensor for part, tensor in _block(generator, shape)}
        if shard == shards - 1:
            tensors["model.norm.weight"] = _vector(generator, shape.hidden, 1.0)
        save_file(tensors, path / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _block(generator: torch.Generator, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one block by their names in it."""
    hidden, shared = shape.hidden, shape.hidden // shape.heads * shape.shared
    for projection, rows in (("q", hidden), ("k", shared), ("v", shared)):
        yield f"self_attn.{projection}_proj.weight", _weight(generator, rows, hidden)
        yield f"self_attn.{projection}_proj.bias", _vector(generator, rows, 0.0)
    yield "self_attn.o_proj.weight", _weight(generator, hidden, hidden)
    yield "mlp.gate_proj.weight", _weight(generator, shape.intermediate, hidden)
    yield "mlp.up_proj.weight", _weight(generator, shape.intermediate, hidden)
    yield "mlp.down_proj.weight", _weight(generator, hidden, shape.intermediate)
    yield "input_layernorm.weight", _vector(generator, hidden, 1.0)
    yield "post_attention_layernorm.weight", _vector(generator, hidden, 1.0)


def _weight(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=generator) * math.sqrt(1 / columns)
    return values.to(torch.bfloat16)


def _vector(generator: torch.Generator, size: int, mean: float) -> torch.Tensor:
    return (mean + 0.1 * torch.randn(size, generator=generator)).to(torch.bfloat16)
