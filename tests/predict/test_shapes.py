"""Shapes: their sizes against transformers' own modules and the published numbers, their names, their windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import models
from harness.architecture import Architecture, architecture, read_config
from harness.errors import InputError, ModelError
from harness.predict.shapes import shape

# What the model cards say, in billions; as published: of some without the vision tower or the biases.
PUBLISHED = {
    "gemma-2-2b": 2.61, "gemma-2-9b": 9.24, "gemma-2b": 2.51, "gemma-3-1b": 1.00, "gemma-3-12b-text": 11.77,
    "gemma-3-4b-text": 3.88, "llama-2-13b": 13.02, "llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "mistral-7b": 7.25, "mistral-7b-v0.1": 7.24, "phi-2": 2.78,
    "phi-3-medium-4k": 13.96, "phi-3-mini-4k": 3.82, "phi-3.5-mini": 3.82, "phi-4": 14.66, "qwen2-0.5b": 0.49,
    "qwen2-1.5b": 1.54, "qwen2-7b": 7.62, "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62, "qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72,
    "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "smollm2-1.7b": 1.71,
    "smollm2-135m": 0.135, "smollm2-360m": 0.362, "tinyllama-1.1b": 1.10,
}  # fmt: skip
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)


def small(model_type: str, **fields: Any) -> Architecture:
    found = architecture({"model_type": model_type, **SMALL, **fields})
    assert found is not None
    return found


def as_transformers_has_it(config: dict[str, Any], directory: Path) -> tuple[int, int, str]:
    """(parameters, layers with a sliding window, class) of the model that transformers makes of a config.json."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(read)
    types = getattr(read, "layer_types", None)
    if types is None:
        windowed = read.num_hidden_layers if getattr(read, "sliding_window", None) else 0
    else:
        windowed = sum(kind == "sliding_attention" for kind in types)
    return sum(weight.numel() for weight in model.parameters()), windowed, type(model).__name__


def test_every_shape_is_checked() -> None:
    assert set(PUBLISHED) == set(models.known_shapes())


@pytest.mark.parametrize("name", models.known_shapes())
def test_sizes_against_transformers_and_the_published_number(name: str, tmp_path: Path) -> None:
    known = shape(name)
    parameters, windowed, model_class = as_transformers_has_it(known.config, tmp_path)
    assert known.architecture.parameters == parameters
    assert known.architecture.windowed_layers == windowed
    assert known.config["architectures"] == [model_class]
    assert known.architecture.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.012)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
        ("llama", {"mlp_bias": True, "head_dim": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 8, "num_hidden_layers": 5}),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 11}),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2, "tie_word_embeddings": False}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention"] + ["full_attention"] * 3}),
        ("phi", {"num_key_value_heads": 2}),
        ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 8}),
    ],
)
def test_other_fields_against_transformers(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """What the published files leave at its default: biases, patterns of windows, head sizes."""
    config = {"model_type": model_type, "num_key_value_heads": 4, **SMALL, **fields}
    parameters, windowed, _ = as_transformers_has_it(config, tmp_path)
    found = architecture(config)
    assert found is not None
    assert (found.parameters, found.windowed_layers) == (parameters, windowed)


def test_quantized_weights_of_a_fused_and_an_ungated_block_by_hand() -> None:
    """H = 64, I = 96, 4 heads of 16, 2 of them for keys: q 64, k and v 32 each. 4 bits, groups of 32 with zero points.

    Phi-3: qkv 64x128, o 64x64, gate_up 64x192, down 96x64 = 30,720 weights a block, 15,360 bytes. Groups x outputs:
    2x128 + 2x64 + 2x192 + 3x64 = 960, each 2.5 bytes: 2,400. Four blocks: 71,040. Dense: 2 x 50x64 + 4 x 128 + 64 =
    6,976 parameters, 13,952 bytes. In all 84,992. Phi: q 64x64, k and v 64x32, o 64x64, up 64x96, down 96x64 = 24,576
    weights, 12,288 bytes; groups 2x64 + 2x32 + 2x32 + 2x64 + 2x96 + 3x64 = 768, 1,920 bytes. Four: 56,832. Dense: 2 x
    3,200 + head bias 50 + 4 x (biases 64+32+32+64+96+64 = 352, norm 128) + 128 = 8,498, 16,996 bytes. In all 73,828.
    """
    fields = {"num_key_value_heads": 2, "quantization_config": {"bits": 4, "group_size": 32, "zero_point": True}}
    assert small("phi3", **fields).weight_bytes == 84_992
    assert small("phi", **fields).weight_bytes == 73_828
    assert len(small("phi3").linears) == 4 and len(small("phi").linears) == 6 and len(small("gemma2").linears) == 7


def test_a_window_bounds_what_is_read_by_hand() -> None:
    """Gemma 2 of 5 layers, 4 heads of 256: a token is 2 x 4 x 256 x 2 = 4,096 bytes a layer, 20,480 in all. Layers 0, 2
    and 4 have a window of 8. After 20 tokens: 2 x 20 + 3 x 8 = 64 tokens of one layer, 262,144 bytes; after 5: 25.
    """
    found = small("gemma2", num_hidden_layers=5, sliding_window=8)
    assert (found.window, found.windowed_layers, found.kv_bytes_per_token) == (8, 3, 20_480)
    assert found.kv_bytes(20) == 262_144
    assert found.kv_bytes(5) == 25 * 4096
    assert found.kv_bytes(0) == 0
    full = shape("qwen2.5-7b").architecture
    assert (full.window, full.windowed_layers) == (None, 0)
    assert full.kv_bytes(1000) == 1000 * full.kv_bytes_per_token


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("qwen2.5-7b", "qwen2.5-7b"),
        ("Qwen2.5-7B", "qwen2.5-7b"),
        ("shape:mistral-7b", "mistral-7b"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
    ],
)
def test_names(given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert shape(given).name == name


def test_paths_and_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    config = {"model_type": "llama", **SMALL}
    for directory in ("mine", "hf/hub/models--org--tiny/snapshots/abc"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps(config), encoding="utf-8")
    assert shape(str(tmp_path / "mine")).name == "mine"
    assert shape(str(tmp_path / "mine" / "config.json")).name == "mine"
    assert shape(f"shape:{tmp_path}/other.json").name == "other"
    assert shape("org/tiny").name == "org/tiny"
    assert shape("org/tiny").architecture == small("llama") and shape("org/tiny").config == config


def test_the_demo_model() -> None:
    assert shape("demo").name == "demo"
    assert (
        shape("demo").architecture.layers
        == read_config(models.resolve("demo").path / "config.json")["num_hidden_layers"]
    )


@pytest.mark.parametrize("given", ["", "qwen9-7b", "no/such/place", "Qwen/Qwen9-7B-Instruct"])
def test_what_is_no_shape(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError, match="neither a known shape nor a config.json") as caught:
        shape(given)
    assert "qwen2.5-7b" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("config", [{"model_type": "mixtral"}, {"model_type": "phi", "qk_layernorm": True, **SMALL}])
def test_an_architecture_that_is_not_known(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="sizes of a .* model are not known") as caught:
        shape(str(tmp_path))
    assert "gemma2" in str(caught.value)


def test_a_new_shape_is_served_like_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = models.resolve("shape:gemma-2-9b")
    assert model.random_weights and models.weight_bytes(model) == 2 * 9_241_705_984
