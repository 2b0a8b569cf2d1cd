"""What a precision's name becomes; the making itself is tested with the sweep and in test_expand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import checkpoints
from harness.errors import InputError
from harness.models import Model, resolve


def model_of(tmp_path: Path, quantization: object) -> Model:
    config: dict[str, object] = {"model_type": "qwen2", "hidden_size": 64}
    if quantization is not None:
        config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Model("m", tmp_path)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (None, None),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 2}}}}, 2),
        ({"config_groups": {"a": {"weights": None}, "b": 7}}, None),
        ({"quant_method": "fp8"}, None),
        ("odd", None),
    ],
)
def test_the_fewest_bits_of_a_config(tmp_path: Path, quantization: object, bits: int | None) -> None:
    assert checkpoints.bits_of(model_of(tmp_path, quantization)) == bits


def test_only_what_no_kernel_serves_is_expanded(tmp_path: Path) -> None:
    model = model_of(tmp_path, {"quant_method": "awq", "bits": 4})
    assert checkpoints.servable(model, print) == (model, None)


def test_three_bits_are_made_and_expanded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    demo = resolve("demo")
    small, digest = checkpoints.checkpoint("rtn-3bit", None, demo, None, said.append)
    assert checkpoints.bits_of(small) == 3
    assert digest and tmp_path in small.path.parents
    plain, words = checkpoints.servable(small, said.append)
    assert not checkpoints.is_quantized(plain)
    assert words == "16-bit weights expanded from 3 bits: no kernel serves them"
    assert any("quantizing demo with rtn-3bit" in line for line in said)


def test_names(tmp_path: Path) -> None:
    assert checkpoints.wanted(["bf16", "awq"]) == {"bf16": None, "awq": None}
    with pytest.raises(InputError, match="twice"):
        checkpoints.wanted(["awq", "awq"])
    with pytest.raises(InputError, match="unknown"):
        checkpoints.wanted(["awq-3bit"])  # not in a sweep: nothing would serve it at its speed
    assert "awq-3bit" in checkpoints.LOW_BITS and "smoothquant-2bit" not in checkpoints.LOW_BITS
    both = checkpoints.wanted(["bf16", "gptq-2bit"], (*checkpoints.PRECISIONS, *checkpoints.LOW_BITS))
    assert both == {"bf16": None, "gptq-2bit": None}
