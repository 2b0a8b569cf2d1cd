"""What a checkpoint says of itself, and whole checkpoints that compressed-tensors and transformers read or wrote."""

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils.match import match_targets
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import AwqConfig, CompressedTensorsConfig, GPTQConfig

from quantize import formats
from quantize.errors import SchemeError
from quantize.formats import FORMATS, GPTQ_V2, pack, patterns, quantization_config, unpack
from quantize.layout import parse
from quantize.scheme import PER_CHANNEL, Quantized, Scheme, dequantize, quantize
from quantize.weights import open_model

LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
ASYMMETRIC, SYMMETRIC = Scheme(), Scheme(symmetric=True)
W8A8 = Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8)
WEIGHT_ONLY = [Scheme(*parts) for parts in product((2, 3, 4, 8), (32, 128, PER_CHANNEL), (False, True))]


def modules(layers: int = 2) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(layers) for name in LINEARS]


def everywhere(scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(modules(), scheme)


def down_as(down: Scheme, rest: Scheme) -> dict[str, Scheme]:
    return {name: down if name.endswith("down_proj") else rest for name in modules()}


def half_kept(scheme: Scheme) -> tuple[dict[str, Scheme], list[str]]:
    """All of layer 1's attention and every down_proj in 16 bit."""
    kept = [name for name in modules() if name.endswith("down_proj") or ".1.self_attn" in name]
    return {name: scheme for name in modules() if name not in kept}, ["lm_head", *kept]


# What is chosen, and what is refused


@pytest.mark.parametrize(
    ("schemes", "chosen"),
    [
        (everywhere(ASYMMETRIC), "awq"),
        (everywhere(SYMMETRIC), "gptq"),
        (everywhere(Scheme(4, PER_CHANNEL, symmetric=True)), "gptq"),
        (everywhere(Scheme(3)), "compressed-tensors"),
        (everywhere(Scheme(2, 32)), "compressed-tensors"),
        (everywhere(Scheme(8, symmetric=True)), "compressed-tensors"),
        (everywhere(W8A8), "compressed-tensors"),
        (down_as(Scheme(8), ASYMMETRIC), "compressed-tensors"),
    ],
)
def test_the_default_holds_what_it_is_chosen_for(schemes: dict[str, Scheme], chosen: str) -> None:
    assert formats.default(schemes) == chosen
    formats.check(chosen, schemes)


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, W8A8], ids=str)
def test_which_format_holds_what(scheme: Scheme) -> None:
    holds = {"compressed-tensors"}
    if scheme.bits == 4:
        holds.add("awq")
    if scheme.symmetric and scheme.bits in (4, 8) and scheme.activation_bits is None:
        holds.add("gptq")
    for format in FORMATS:
        if format in holds:
            formats.check(format, everywhere(scheme))
        else:
            with pytest.raises(SchemeError) as refused:
                formats.check(format, everywhere(scheme))
            assert all((other in refused.value.allowed.split("; ")[1]) == (other in holds) for other in FORMATS)
            assert "--format" in refused.value.remedy


@pytest.mark.parametrize(
    ("format", "schemes", "says"),
    [
        ("gptq", everywhere(ASYMMETRIC), "W4A16 g128 asym, and vLLM reads 4 or 8 bits symmetric.*awq and compressed"),
        ("awq", everywhere(W8A8), "quantizes activations, for which awq has no words.*--format compressed-tensors"),
        ("awq", down_as(Scheme(4, 32), ASYMMETRIC), "several schemes at once.*--format compressed-tensors"),
        ("awq", everywhere(Scheme(4, 16)), "groups of 16, .* 32, 64, 128, -1.*no format can hold this.*Change"),
        ("compressed-tensors", everywhere(Scheme(4, activation_bits=4)), "W4A4.*W8A8 per channel symmetric only"),
        ("compressed-tensors", everywhere(Scheme(8, 128, True, 8)), "W8A8 g128.*W8A8 per channel symmetric only"),
        ("gguf", everywhere(ASYMMETRIC), "'gguf'.*awq, gptq, compressed-tensors"),
        ("awq", {}, "nothing is quantized"),
    ],
)
def test_refusals_say_what_can_hold_it(format: str, schemes: dict[str, Scheme], says: str) -> None:
    with pytest.raises(SchemeError, match=says):
        formats.check(format, schemes)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("odd", ["self_attn.k_proj", "mlp.up_proj"])
def test_what_vllm_fuses_has_one_scheme(format: str, odd: str) -> None:
    torn = f"model.layers.1.{odd}"
    with pytest.raises(SchemeError, match=r"layers\.1\..* fuses .*no format"):
        formats.check(format, everywhere(SYMMETRIC) | {torn: Scheme(4, 32, symmetric=True)})
    left = {name: scheme for name, scheme in everywhere(SYMMETRIC).items() if name != torn}
    with pytest.raises(SchemeError, match="16 bit.* fuses"):
        formats.check(format, left, ["lm_head", torn])


def test_a_block_without_a_gate_is_not_torn() -> None:
    formats.check("gptq", {"model.layers.0.mlp.up_proj": SYMMETRIC, "model.layers.0.mlp.down_proj": SYMMETRIC})


@pytest.mark.parametrize(
    ("format", "scheme", "shape", "says"),
    [
        ("awq", ASYMMETRIC, (12, 128), "12 x 128, and 8 of its values share a word.*compressed-tensors can hold"),
        ("gptq", SYMMETRIC, (12, 128), "12 x 128.*compressed-tensors can hold"),
        ("gptq", Scheme(4, PER_CHANNEL, True), (16, 20), "16 x 20.*awq and compressed-tensors can hold"),
        ("compressed-tensors", ASYMMETRIC, (12, 128), None),
        ("awq", ASYMMETRIC, (8, 20), None),
    ],
)
def test_sizes_that_do_not_fill_words(format: str, scheme: Scheme, shape: tuple[int, int], says: str | None) -> None:
    if says is None:
        formats.check(format, {"a": scheme}, shapes={"a": shape})
    else:
        with pytest.raises(SchemeError, match=says):
            formats.check(format, {"a": scheme}, shapes={"a": shape})


def test_the_cpu_build_is_asked_for_no_more_than_it_has() -> None:
    assert formats.cpu_objection(everywhere(ASYMMETRIC)) is None
    assert formats.cpu_objection(everywhere(W8A8), {name: (33, 33) for name in modules()}) is None
    assert "W8A16" in str(formats.cpu_objection(down_as(Scheme(8), ASYMMETRIC)))
    assert "24 x 128" in str(formats.cpu_objection({"a": ASYMMETRIC}, {"a": (24, 128)}))


# config.json


def test_awq_in_autoawqs_words() -> None:
    schemes, kept = half_kept(ASYMMETRIC)
    config = quantization_config("awq", schemes, kept)
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": kept,
    }
    assert AwqConfig.from_dict(config).modules_to_not_convert == kept


def test_gptq_in_gptqmodels_words() -> None:
    schemes, kept = half_kept(SYMMETRIC)
    config = quantization_config("gptq", schemes, kept)
    read = GPTQConfig.from_dict(config)
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (4, 128, True, False)
    assert config["checkpoint_format"] == "gptq" and config["lm_head"] is False
    rules = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    assert all(pattern.startswith("-:") for pattern in config["dynamic"])

    def skipped(name: str) -> bool:
        return any(re.match(rule, name) for rule in rules)

    assert [name for name in modules() if skipped(name)] == [name for name in modules() if name in kept]
    # vLLM asks for the name of the fused matrix.
    assert [skipped(f"model.layers.{i}.self_attn.qkv_proj") for i in range(2)] == [False, True]
    assert not skipped("model.layers.0.mlp.gate_up_proj")
    assert "dynamic" not in quantization_config("gptq", everywhere(SYMMETRIC), ["lm_head"])


def test_one_scheme_is_one_group_of_all_linear_layers() -> None:
    config = quantization_config("compressed-tensors", everywhere(Scheme(3, 64)), ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert (config["ignore"], config["format"]) == (["lm_head"], "pack-quantized")
    arguments = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    assert (arguments.num_bits, arguments.group_size, arguments.symmetric) == (3, 64, False)


def test_two_schemes_are_two_groups_of_one_pattern_each() -> None:
    config = quantization_config("compressed-tensors", down_as(W8A8, SYMMETRIC), ["lm_head"])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets[1] == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    assert len(targets[0]) == 1
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]


@given(st.sets(st.sampled_from(modules(12))))
def test_patterns_match_their_names_and_no_others(chosen: set[str]) -> None:
    names = [name for name in modules(12) if name in chosen]
    found = patterns(names, modules(12))
    assert [name for name in modules(12) if any(re.match(pattern, name) for pattern in found)] == names


def test_patterns_are_short() -> None:
    names = [name for name in modules(28) if name.endswith(("up_proj", "gate_proj"))]
    assert patterns(names, modules(28)) == [r"model\.layers\.\d+\.(mlp\.gate_proj|mlp\.up_proj)$"]
    assert patterns(["lm_head"], modules()) == ["lm_head$"]


# Parts


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, W8A8], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_comes_back(format: str, scheme: Scheme) -> None:
    try:
        formats.check(format, {"a": scheme})
    except SchemeError:
        return
    quantized = quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), scheme)
    again = unpack(pack(format, quantized, scheme), format, scheme)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(again, quantized, strict=True))


def test_the_second_version_of_gptq_stores_zero_points_as_they_are() -> None:
    parts = pack("gptq", quantize(torch.randn(32, 256), SYMMETRIC), SYMMETRIC)
    assert set(unpack(parts, GPTQ_V2, SYMMETRIC).zeros.flatten().tolist()) == {7}
    assert set(unpack(parts, "gptq", SYMMETRIC).zeros.flatten().tolist()) == {8}


def test_parts_that_do_not_fit_are_refused() -> None:
    parts = pack("gptq", quantize(torch.randn(32, 256), SYMMETRIC), SYMMETRIC)
    with pytest.raises(SchemeError, match="2 scales a row.*4"):
        unpack(parts, "gptq", Scheme(4, 64, symmetric=True))
    with pytest.raises(SchemeError, match="without qzeros"):
        unpack({name: tensor for name, tensor in parts.items() if name != "qzeros"}, "gptq", SYMMETRIC)
    parts = pack("compressed-tensors", quantize(torch.randn(32, 256), ASYMMETRIC), ASYMMETRIC)
    del parts["weight_zero_point"]
    with pytest.raises(SchemeError, match="without weight_zero_point"):
        unpack(parts, "compressed-tensors", ASYMMETRIC)


# Whole checkpoints, and code that is not ours to read and write them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("source"))


def write(path: Path, source: Path, format: str, schemes: Mapping[str, Scheme]) -> dict[str, Quantized]:
    """`source` rounded to `schemes` as a checkpoint in `path`; returns what was packed."""
    model = open_model(source)
    tensors, quantized = model.read(model.files), {}
    for name, scheme in schemes.items():
        quantized[name] = quantize(tensors.pop(f"{name}.weight"), scheme)
        tensors.update({f"{name}.{part}": t for part, t in pack(format, quantized[name], scheme).items()})
    kept = ["lm_head", *(name for name in modules() if name not in schemes)]
    config = dict(model.config) | {"quantization_config": quantization_config(format, schemes, kept)}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return quantized


def load(path: Path, **options: Any) -> Any:
    build: Any = AutoModelForCausalLM.from_pretrained
    return build(path, dtype=torch.float32, **options)


def weights(model: Any) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): value for name, value in model.named_parameters()}


@pytest.mark.parametrize("scheme", [*(s for s in WEIGHT_ONLY if s.symmetric and s.group_size != 128), W8A8], ids=str)
def test_transformers_loads_the_same_weights(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    quantized = write(tmp_path, source, "compressed-tensors", everywhere(scheme))
    model = load(tmp_path)
    model(torch.zeros(1, 2, dtype=torch.int64))  # it decompresses when it is first called
    loaded = weights(model)
    assert all(torch.equal(loaded[name], dequantize(values)) for name, values in quantized.items())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", [s for s in WEIGHT_ONLY if not s.symmetric and s.group_size != 128], ids=str)
def test_transformers_dequantizes_the_same_weights(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    # compressed-tensors 0.20 refuses asymmetric checkpoints, its own too, unless it may dequantize them while loading;
    # then it computes in the type of the scales, and rounds the product once.
    quantized = write(tmp_path, source, "compressed-tensors", everywhere(scheme))
    loaded = weights(load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)))
    assert all(torch.equal(loaded[name], dequantize(values).half().float()) for name, values in quantized.items())


@pytest.mark.parametrize(
    "schemes",
    [
        down_as(W8A8, SYMMETRIC),
        down_as(Scheme(8, PER_CHANNEL), Scheme(3, 32)),
        half_kept(Scheme(2, 32))[0],
        everywhere(ASYMMETRIC),
    ],
    ids=["W8A8 and W4", "W8 and W3", "half kept", "one"],
)
def test_the_library_finds_and_undoes_each_module(schemes: dict[str, Scheme], source: Path, tmp_path: Path) -> None:
    quantized = write(tmp_path, source, "compressed-tensors", schemes)
    written = open_model(tmp_path)
    config = QuantizationConfig.model_validate(written.config["quantization_config"])
    targets = {target: group for group in config.config_groups.values() for target in group.targets}
    for name, module in tiny_model.build().named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        ignored = match_targets(name, module, config.ignore)
        assert bool(ignored) == (name not in schemes), name
        if not ignored:
            group = targets[match_targets(name, module, targets)[0]]
            parts = {key.removeprefix(f"{name}."): t for key, t in written.read(written.names(f"{name}.")).items()}
            parts["weight_scale"] = parts["weight_scale"].float()
            undone = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)
            assert torch.equal(undone["weight"], dequantize(quantized[name])), name


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, PER_CHANNEL, True), Scheme(8, 64), W8A8], ids=str)
def test_we_read_what_the_library_writes(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    config = quantization_config("compressed-tensors", everywhere(scheme), ["lm_head"])
    model = load(source)
    apply_quantization_config(model, QuantizationConfig.model_validate(config | {"quantization_status": "frozen"}))
    for name in modules():
        module = model.get_submodule(name)
        _, scales, zeros = quantize(module.weight, scheme)
        module.weight_scale.data.copy_(scales)
        if not scheme.symmetric:
            module.weight_zero_point.data.copy_(zeros.to(torch.int16) - scheme.middle)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))

    written = open_model(tmp_path)
    layout = parse(written.config["quantization_config"])
    found = layout.modules(written.files)
    assert {name: read for name, (read, _) in found.items()} == everywhere(scheme)
    compressor.decompress_model(model)
    expected = weights(model)
    for name, (read, names) in found.items():
        tensors = written.read(f"{name}.{part}" for part in names)
        undone = unpack({key.removeprefix(f"{name}."): t for key, t in tensors.items()}, layout.format, read)
        assert torch.equal(dequantize(undone), expected[name]), name
