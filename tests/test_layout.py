"""Reading config.json: what we wrote, what other tools write, and what is refused."""

from typing import Any

import pytest

from quantize.errors import SchemeError
from quantize.formats import FORMATS, GPTQ_V2, quantization_config
from quantize.layout import parse
from quantize.scheme import PER_CHANNEL, Scheme

LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
MODULES = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
SYMMETRIC = Scheme(symmetric=True)
W8A8 = Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8)


def everywhere(scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(MODULES, scheme)


def down_as(down: Scheme, rest: Scheme) -> dict[str, Scheme]:
    return {name: down if name.endswith("down_proj") else rest for name in MODULES}


def half_kept(scheme: Scheme) -> tuple[dict[str, Scheme], list[str]]:
    """All of layer 1's attention and every down_proj in 16 bit."""
    kept = [name for name in MODULES if name.endswith("down_proj") or ".1.self_attn" in name]
    return {name: scheme for name in MODULES if name not in kept}, ["lm_head", *kept]


@pytest.mark.parametrize(
    ("format", "schemes", "kept"),
    [
        *((format, everywhere(SYMMETRIC), ["lm_head"]) for format in FORMATS if format != "awq"),
        ("awq", everywhere(Scheme()), ["lm_head"]),
        ("awq", *half_kept(Scheme())),
        ("gptq", *half_kept(Scheme(8, 32, symmetric=True))),
        ("compressed-tensors", *half_kept(Scheme(3, PER_CHANNEL))),
        ("compressed-tensors", down_as(W8A8, Scheme(2, 64)), ["lm_head"]),
        ("compressed-tensors", down_as(Scheme(8, PER_CHANNEL), Scheme(4)), ["lm_head"]),
    ],
)
def test_what_is_written_is_read(format: str, schemes: dict[str, Scheme], kept: list[str]) -> None:
    layout = parse(quantization_config(format, schemes, kept))
    assert layout.format == format
    assert {name: layout.scheme_of(name) for name in [*MODULES, "lm_head"]} == {**dict.fromkeys(kept), **schemes}


def test_modules_are_found_by_their_parts() -> None:
    layout = parse(quantization_config("compressed-tensors", down_as(W8A8, SYMMETRIC), ["lm_head"]))
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    tensors = [f"{down}.weight", f"{down}.weight_scale", f"{up}.weight_packed", f"{up}.weight_scale"]
    found = layout.modules([*tensors, f"{up}.bias", "model.norm.weight", "lm_head.weight", "stray"])
    assert found == {
        down: (W8A8, ("weight", "weight_scale")),
        up: (SYMMETRIC, ("weight_packed", "weight_scale")),
    }
    with pytest.raises(SchemeError, match="lm_head, stored as integers"):
        layout.modules(["lm_head.weight_packed"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # AutoAWQ's, with its older names; AutoGPTQ's; GPTQModel's; llm-compressor's W4A16 and W8A8.
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, Scheme(4, 64)),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": False, "desc_act": True}, Scheme(3)),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
            Scheme(4, 32, symmetric=True),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "ignore": ["lm_head"],
                "sparsity_config": {},
                "transform_config": {},
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4,
                            "type": "int",
                            "symmetric": True,
                            "strategy": "group",
                            "group_size": 128,
                            "actorder": "static",
                        },
                        "input_activations": None,
                    }
                },
            },
            SYMMETRIC,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": [r"re:.*\.(q|k|v|o|gate|up|down)_proj$"],
                        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                        "input_activations": {
                            "num_bits": 8,
                            "type": "int",
                            "symmetric": True,
                            "strategy": "token",
                            "dynamic": True,
                        },
                    }
                },
            },
            W8A8,
        ),
    ],
)
def test_other_tools_words(config: dict[str, Any], expected: Scheme) -> None:
    layout = parse(config)
    assert {layout.scheme_of(name) for name in MODULES} == {expected}
    assert layout.scheme_of("lm_head") is None


def test_gptqmodels_rules_for_single_modules() -> None:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq_v2"}
    layout = parse(base | {"dynamic": {r"-:.*\.0\.mlp": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32}}})
    assert layout.format == GPTQ_V2
    assert layout.scheme_of("model.layers.0.mlp.down_proj") is None
    assert layout.scheme_of("model.layers.1.mlp.down_proj") == Scheme(8, 32, symmetric=True)
    assert layout.scheme_of("model.layers.1.mlp.up_proj") == SYMMETRIC


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class() -> None:
    config = quantization_config("compressed-tensors", everywhere(SYMMETRIC), ["lm_head"])
    broad = config["config_groups"]["group_0"]
    by_pattern = broad | {"targets": ["re:.*down_proj"], "weights": broad["weights"] | {"num_bits": 8}}
    by_name = broad | {"targets": ["model.layers.1.mlp.down_proj"], "weights": broad["weights"] | {"num_bits": 2}}
    layout = parse(config | {"config_groups": {"a": broad, "b": by_pattern, "c": by_name}})
    seen = [layout.scheme_of(f"model.layers.{i}.mlp.{name}_proj") for i, name in ((0, "up"), (0, "down"), (1, "down"))]
    assert [scheme.bits for scheme in seen if scheme] == [4, 8, 2]


def _changed(path: str, value: object) -> dict[str, Any]:
    config = quantization_config("compressed-tensors", everywhere(W8A8), ["lm_head"])
    place: Any = config
    *way, last = path.split("/")
    for step in way:
        place = place[step]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "fp8"}, "quant_method of 'fp8'.*awq, gptq, compressed-tensors"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemv"}, "gemv.*gemm"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "zero_point of False"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "fault"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "group_size": 128, "sym": True}, "fault.*bits"),
        (_changed("transform_config", {"config_groups": {}}), "transform_config"),
        (_changed("sparsity_config", {"format": "sparse-24-bitmask"}), "sparse-24"),
        (_changed("quantization_status", "frozen"), "frozen"),
        (_changed("config_groups/group_0/format", "float-quantized"), "float-quantized"),
        (_changed("config_groups/group_0/weights/type", "float"), "weights of"),
        (_changed("config_groups/group_0/weights/strategy", "tensor"), "tensor"),
        (_changed("config_groups/group_0/weights/actorder", "group"), "actorder"),
        (_changed("config_groups/group_0/weights/num_bits", 5), "bits = 5"),
        (_changed("config_groups/group_0/input_activations/strategy", "tensor"), "input_activations"),
        (_changed("config_groups/group_0/output_activations", {"num_bits": 8}), "output_activations"),
        (_changed("config_groups/group_0", ["Linear"]), "fault"),
    ],
)
def test_other_layouts_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(SchemeError, match=says):
        parse(config)
