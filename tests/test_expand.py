"""A checkpoint expanded to 16 bits holds the weights that its kernel would multiply with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize import expand
from quantize.errors import SchemeError
from quantize.fidelity import load_dequantized, load_original
from quantize.job import quantize_model
from quantize.recipe import Recipe, default_scheme

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"


def quantized(out: Path, method: str = "rtn", bits: int | None = 3, activation_bits: int | None = None) -> Path:
    scheme = default_scheme(method, bits, None, None, activation_bits)
    quantize_model(DEMO, Recipe(method, scheme, (), None, None, 8, 64, 0, "float32", None), out=out)
    return out


@pytest.mark.parametrize("bits", [2, 3])
def test_each_weight_is_the_dequantized_one_rounded_to_16_bits(tmp_path: Path, bits: int) -> None:
    checkpoint = quantized(tmp_path / "small", bits=bits)
    path, digest = expand.expand(checkpoint, tmp_path / "plain")
    config = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "qwen2"
    wanted, found = load_dequantized(checkpoint).state_dict(), load_original(path).state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight.to(torch.bfloat16).float()), name
    assert any(not torch.equal(load_original(DEMO).state_dict()[name], weight) for name, weight in found.items())
    assert {str(t.dtype) for file in path.glob("*.safetensors") for t in load_file(file).values()} == {"torch.bfloat16"}
    assert (path / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert json.loads((path / "quantize.json").read_text())["checkpoint_sha256"] == digest


def test_what_is_there_is_found_and_another_checkpoint_is_not_it(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "small")
    first = expand.expand(checkpoint, cache=tmp_path)
    written = {file: file.stat().st_mtime_ns for file in first[0].iterdir()}
    assert expand.expand(checkpoint, cache=tmp_path) == first
    assert {file: file.stat().st_mtime_ns for file in first[0].iterdir()} == written
    other = quantized(tmp_path / "other", bits=2)
    assert expand.expand(other, cache=tmp_path)[0] != first[0]


def test_quantized_activations_are_refused(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "w8a8", "smoothquant", None, 8)
    with pytest.raises(SchemeError, match="activations"):
        expand.expand(checkpoint, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_command_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = quantized(tmp_path / "small")
    assert expand.main([str(checkpoint), "--out", str(tmp_path / "plain")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(tmp_path / "plain")
    assert expand.main([str(DEMO), "--out", str(tmp_path / "none")]) == 2
    assert "no quantization_config" in capsys.readouterr().err
