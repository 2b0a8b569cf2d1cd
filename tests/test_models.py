"""Names, headers and sizes. Parameter counts are checked against the published ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from harness import models
from harness.architecture import Architecture, architecture, read_config
from harness.errors import ModelError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shape(name: str, **changes: Any) -> Architecture:
    path = models.resolve(f"shape:{name}").config_path
    assert path is not None
    found = architecture(read_config(path) | changes)
    assert found is not None
    return found


def checkpoint(directory: Path, tensors: dict[str, tuple[str, list[int], int]], **config: Any) -> Path:
    """A directory with config.json and one safetensors file of zeros."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, dims, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return directory


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("qwen2.5-0.5b", 494_032_768, 12_288),
        ("qwen2.5-1.5b", 1_543_714_304, 28_672),
        ("qwen2.5-3b", 3_085_938_688, 36_864),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
        ("llama-3.2-1b", 1_235_814_400, 32_768),
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("qwen3-0.6b", 596_049_920, 114_688),
        ("mistral-7b", 7_248_023_552, 131_072),
    ],
)
def test_known_shapes(name: str, parameters: int, kv_bytes: int) -> None:
    assert name in models.known_shapes()
    assert shape(name).parameters == parameters
    assert shape(name).weight_bytes == 2 * parameters
    assert shape(name).kv_bytes_per_token == kv_bytes


def test_quantized_weights_by_hand() -> None:
    # One block, hidden 256, intermediate 512, 2 heads of 128: q, k, v, o are 256×256, the mlp 3 × 256×512.
    fields = dict(num_hidden_layers=1, hidden_size=256, intermediate_size=512, num_attention_heads=2)
    config = {"model_type": "llama", "vocab_size": 100, "num_key_value_heads": 2, "tie_word_embeddings": True, **fields}
    plain, small = architecture(config), architecture(config | {"quantization_config": AWQ})
    assert plain is not None and small is not None
    linear = 4 * 256 * 256 + 3 * 256 * 512
    rest = 100 * 256 + 2 * 256 + 256
    assert plain.parameters == linear + rest
    groups = 4 * 2 * 256 + 2 * 2 * 512 + 4 * 256  # (in/128)·out over the seven layers
    assert small.weight_bytes == linear // 2 + groups * 2 + groups // 2 + 2 * rest
    assert small.kv_bytes_per_token == plain.kv_bytes_per_token


def test_a_quantized_seven_billion_fits_where_the_plain_one_does_not() -> None:
    assert 14.1 < shape("qwen2.5-7b").weight_bytes / models.GIB < 14.3
    assert 5.0 < shape("qwen2.5-7b", quantization_config=AWQ).weight_bytes / models.GIB < 5.5


def test_compressed_tensors_form() -> None:
    weights = {"num_bits": 4, "group_size": 64, "symmetric": True}
    config = {"config_groups": {"group_0": {"weights": weights}}, "quant_method": "compressed-tensors"}
    found = shape("qwen2.5-0.5b", quantization_config=config).quantization
    assert found is not None
    assert (found.bits, found.group_size, found.zero_points) == (4, 64, False)


def test_unknown_architecture_is_not_guessed() -> None:
    assert architecture({"model_type": "mixtral", "hidden_size": 8}) is None


def test_weights_from_headers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64), "b": ("I32", [2, 2], 16)})
    model = models.resolve(str(path))
    assert (model.name, model.path, model.is_local, model.random_weights) == ("m", path, True, False)
    assert models.weight_bytes(model) == 80
    digest = models.checkpoint_sha256(path)
    assert digest is not None and len(digest) == 64
    (path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert models.checkpoint_sha256(path) != digest


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64)})
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "consolidated.safetensors").write_bytes(b"not counted")
    index = path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', encoding="utf-8")
    assert models.weight_bytes(models.resolve(str(path))) == 64
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "gone"}}', encoding="utf-8")
    with pytest.raises(ModelError, match="1 of 2 weight files are missing, gone"):
        models.weight_bytes(models.resolve(str(path)))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 10**12) + b"{}", struct.pack("<Q", 2) + b"{x"])
def test_a_broken_weight_file(tmp_path: Path, content: bytes) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64)})
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        models.weight_bytes(models.resolve(str(path)))
    assert caught.value.exit_code == 2


def test_a_cut_off_weight_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64)})
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="10 bytes are missing at its end"):
        models.weight_bytes(models.resolve(str(path)))


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelError, match="holds no .*safetensors"):
        models.weight_bytes(models.resolve(str(tmp_path)))


def test_shape_is_served_from_the_cache(cache: Path) -> None:
    model = models.resolve("shape:qwen2.5-0.5b")
    assert model.random_weights and model.is_local
    assert model.name == "shape:qwen2.5-0.5b"
    assert cache in model.path.parents
    assert [path.name for path in model.path.iterdir()] == ["config.json"]
    assert models.weight_bytes(model) == 2 * 494_032_768


def test_shape_from_a_path(tmp_path: Path) -> None:
    config = read_config(models.resolve("shape:qwen2.5-0.5b").path / "config.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    by_file = models.resolve(f"shape:{tmp_path}/mine/config.json")
    by_directory = models.resolve(f"shape:{tmp_path}/mine")
    assert by_file == by_directory
    assert by_file.name == "shape:mine"


def test_hub_name_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = models.resolve("Qwen/Qwen2.5-0.5B-Instruct")
    assert (str(model.path), model.is_local) == ("Qwen/Qwen2.5-0.5B-Instruct", False)
    assert models.weight_bytes(model) is None, "not here: unknown, not guessed"
    cached = tmp_path / "hf" / "hub" / "models--Qwen--Qwen2.5-0.5B-Instruct" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    source = models.resolve("shape:qwen2.5-0.5b").path / "config.json"
    (cached / "config.json").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    assert models.weight_bytes(model) == 2 * 494_032_768


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no/such/model", "no such directory"),
        ("", "no such directory|has no|cannot be read"),
        ("shape:nothing", "neither a known shape"),
        ("shape:", "neither a known shape|cannot be read"),
    ],
)
def test_what_is_no_model(given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=says) as caught:
        models.resolve(given)
    assert caught.value.exit_code == 2


def test_a_file_is_no_model_and_the_message_says_which_directory_is(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64)})
    with pytest.raises(ModelError, match=r"is a file; .*(?s:.*)give .*/m"):
        models.resolve(str(path / "config.json"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="config.json"):
        models.resolve(str(tmp_path))


def test_a_config_with_a_field_missing() -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        architecture({"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 1})


def test_precisions(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": ("BF16", [4, 8], 64)})
    assert models.precision("awq", ["bf16", "awq"]) == ("awq", None)
    name, model = models.precision(f"mine={path}", ["bf16", "awq"])
    assert name == "mine" and model is not None and model.path == path
    assert models.precision("theirs=Qwen/Qwen2.5-7B-Instruct-AWQ", [])[0] == "theirs"
    for wrong in ("int5", "=x", "a=", ""):
        with pytest.raises(ModelError, match="bf16, awq"):
            models.precision(wrong, ["bf16", "awq"])


def test_gpu_too_small() -> None:
    model = models.resolve("shape:qwen2.5-7b")
    with pytest.raises(ModelError, match=r"does not fit RTX 4060 Ti: 14\.2 GiB of weights") as caught:
        models.check_fits(model, "RTX 4060 Ti", 15.7, 0.9, 1024)
    assert "quantized" in str(caught.value)
    models.check_fits(model, "RTX 3090", 24.0, 0.9, 1024)
    with pytest.raises(ModelError, match=r"7\.00 GiB of KV cache for one request of 131072"):
        models.check_fits(model, "RTX 3090", 23.0, 0.9, 131_072)
