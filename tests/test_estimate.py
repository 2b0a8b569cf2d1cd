"""The estimate before a quantization: bytes against what is packed, KV tokens by hand, time by its parts."""

import json
import math
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from rich.console import Console

from harness.architecture import architecture
from quantize import formats
from quantize.blocks import FAMILIES
from quantize.errors import ModelError, SchemeError
from quantize.estimate import GIB, Rates, beside_bytes, estimate, packed_bytes, show, to_json
from quantize.scheme import PER_CHANNEL, Scheme, quantize
from quantize.shapes import implied, read_header
from quantize.timing import measure
from quantize.weights import open_model

SHAPES = Path(__file__).resolve().parent.parent / "scenarios" / "shapes"
RATES = Rates(matmul=1e11, shrink_s=1e-9, column_s=1e-5, column_weight_s=1e-9, hash=1e9)
W8A8 = Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8)
KINDS = [Scheme(*parts) for parts in product((2, 3, 4, 8), (32, 128, PER_CHANNEL), (False, True))] + [W8A8]


def shape(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SHAPES / f"{name}.json").read_text())
    return config


def plan(config: Any, scheme: Scheme | None = Scheme()) -> dict[str, Scheme | None]:  # noqa: B008
    linears = FAMILIES[config["model_type"]].linears
    return {f"model.layers.{i}.{name}": scheme for i in range(config["num_hidden_layers"]) for name in linears}


def holds(format: str, scheme: Scheme) -> bool:
    try:
        formats.check(format, {"layer": scheme})
    except SchemeError:
        return False
    return True


# Bytes


@pytest.mark.parametrize("shape", [(64, 256), (40, 128)], ids=str)
@pytest.mark.parametrize(("format", "scheme"), [p for p in product(formats.FORMATS, KINDS) if holds(*p)], ids=str)
def test_a_layer_takes_the_bytes_that_are_packed(format: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    if format == "gptq" and scheme.bits == 3:
        pytest.skip("words do not come out even")
    packed = formats.pack(format, quantize(weight, scheme), scheme)
    assert packed_bytes(format, scheme, *shape) == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize(
    "options", [{}, {"family": "llama", "tie_word_embeddings": False}, {"dtype": torch.float32}], ids=str
)
def test_a_model_takes_the_bytes_of_its_tensors(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Layer 0's down_proj is kept; what a checkpoint then holds is put together here, as any writer has to."""
    model = open_model(tiny_model.save(tmp_path / "tiny", **options))
    scheme = Scheme(symmetric=format == "gptq")
    schemes = plan(model.config, scheme) | {"model.layers.0.mlp.down_proj": None}
    tensors = model.read(model.files)
    before = sum(tensor.nbytes for tensor in tensors.values())
    for name in [name for name, each in schemes.items() if each]:
        packed = formats.pack(format, quantize(tensors.pop(f"{name}.weight"), scheme), scheme)
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    found = estimate(model, schemes, "rtn", 0, rates=RATES, format=format)
    assert found.before.stored_bytes == before
    assert found.after.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    halved = 2 if options.get("dtype") == torch.float32 else 1  # vLLM serves float32 in 16 bits
    assert found.before.card_bytes == before // halved


def test_a_config_alone_gives_what_its_model_gives(tmp_path: Path) -> None:
    model = open_model(tiny_model.save(tmp_path / "tiny"))
    one, other = (estimate(source, plan(model.config), "awq", 1000, rates=RATES) for source in (model, model.config))
    assert one == other


@pytest.mark.parametrize("name", sorted(path.stem for path in SHAPES.glob("*.json")))
def test_sizes_and_cache_agree_with_the_sweeps(name: str) -> None:
    """The harness computes them from formulas of its own, to choose what it serves."""
    config = shape(name)
    group = 128 if config["hidden_size"] % 128 == 0 else 64
    described = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    before, after = architecture(config), architecture(config | {"quantization_config": described})
    found = estimate(config, plan(config, Scheme(group_size=group)), "rtn", 0, rates=RATES)
    assert before and after
    assert (found.before.card_bytes, found.after.card_bytes) == (before.weight_bytes, after.weight_bytes)
    assert found.kv_bytes == before.kv_bytes_per_token


# Room on the card


def test_the_cache_by_hand() -> None:
    """Llama-3.1-8B: 8,030,261,248 parameters. A token takes 2 x 32 layers x 8 heads x 128 x 2 bytes = 131,072.

    Beside: 2,048 x (2 x 4,096 + 3 x 14,336) x 2 = 209,715,200, 256 x 128,256 x 12 = 394,002,432, and 2^29.
    On 24 GiB at 0.9 that leaves 25,769,803,776 x 0.9 - 16,060,522,496 - 1,140,588,544 = 5,991,712,358 bytes before.
    """
    config = shape("llama-3.1-8b")
    found = estimate(config, plan(config), "rtn", 0, card_gib=24, rates=RATES)
    assert found.kv_bytes == 131_072 and found.beside_bytes == beside_bytes(config) == 1_140_588_544
    assert found.before.card_bytes == 16_060_522_496
    assert found.before.kv_tokens == 5_991_712_358 // 131_072 == 45_713
    assert found.before.users == 22
    # After: 6,979,321,856 weights at 4 bits, and 20 bits for each 128 of them, in place of 16 bits.
    assert found.after.card_bytes == 16_060_522_496 - 6_979_321_856 * 2 + 6_979_321_856 * (4 + 20 / 128) / 8
    room = 24 * GIB * 0.9 - found.after.card_bytes - found.beside_bytes
    assert found.after.kv_tokens == math.floor(room / 131_072)


def test_a_model_that_does_not_fit_says_so() -> None:
    config = shape("qwen2.5-7b")
    found = estimate(config, plan(config), "rtn", 0, rates=RATES)
    assert found.before.kv_tokens < 0 and found.before.users == 0 < found.after.users
    told = StringIO()
    show(found, Console(file=told, width=80))
    rows = {line[:22].strip(): line[22:].split() for line in told.getvalue().splitlines() if "  " in line}
    assert rows["KV-cache tokens"] == ["does", "not", "fit", f"{found.after.kv_tokens:,}"]
    assert rows["users of 2,048 tokens"] == ["-", str(found.after.users)]


# Time


def test_the_work_of_a_layer_by_hand() -> None:
    """A block of hidden 1,024, wide 2,048, 8 heads of 128; GPTQ on plain grids, 1,000 tokens in sequences of 500."""
    config = shape("qwen3-0.6b") | {
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 2048,
    }
    found = estimate(
        config, plan(config, Scheme(symmetric=True)), "gptq", 1000, rates=RATES, search="minmax", length=500
    )
    square = 1024 * 1024
    linear = 4 * square + 3 * 2 * square
    assert found.seconds["forward"] == pytest.approx(1000 * (2 * linear + 4 * 1024 * 500) / 1e11)
    assert found.seconds["statistics"] == pytest.approx(1000 * 2 * (3 + 4) * square * (5 / 8) / 1e11)
    assert found.seconds["folds"] == 0
    sites = ((1024, 3 * 1024), (1024, 1024), (1024, 4096), (2048, 1024))
    expected = 0.0
    for inputs, outputs in sites:
        expected += (inputs**3 / 3 + outputs * inputs**2 + 4 * outputs * inputs**2) / 1e11
        expected += inputs * 1e-5 + inputs * outputs * (1e-9 + 2e-9)
    assert found.seconds["rounding"] == pytest.approx(expected)
    assert found.total_s == pytest.approx(sum(found.seconds.values()))


def test_methods_cost_what_they_do() -> None:
    config = shape("qwen2.5-0.5b")
    by = {m: estimate(config, plan(config), m, 65536, rates=RATES) for m in ("rtn", "gptq", "awq", "awq+gptq")}
    assert by["rtn"].seconds["forward"] == by["rtn"].seconds["statistics"] == by["gptq"].seconds["folds"] == 0
    assert by["rtn"].tokens == 0 and by["gptq"].tokens == 65536
    assert by["awq"].seconds["forward"] == by["gptq"].seconds["forward"] > 0
    assert by["awq"].seconds["folds"] == by["awq+gptq"].seconds["folds"] > 0
    assert by["rtn"].total_s < by["gptq"].total_s < by["awq"].total_s
    faster = estimate(config, plan(config), "gptq", 65536, rates=replace(RATES, matmul=2e11))
    assert faster.seconds["forward"] == by["gptq"].seconds["forward"] / 2


def test_this_machine_has_rates() -> None:
    rates = measure()
    assert rates.matmul > 1e8 and 0 < rates.shrink_s < 1e-5 and rates.hash > 1e6
    assert 0 <= rates.column_s < 0.1 and 0 <= rates.column_weight_s < 1e-4


# What is refused, and what is told


def test_what_cannot_be_estimated_is_refused() -> None:
    config = shape("qwen2.5-0.5b")
    with pytest.raises(SchemeError, match="method = 'gguf'. Allowed: rtn"):
        estimate(config, plan(config), "gguf", 0, rates=RATES)
    with pytest.raises(SchemeError, match="compressed-tensors can hold"):
        estimate(config, plan(config, Scheme(3)), "rtn", 0, rates=RATES, format="awq")
    with pytest.raises(SchemeError, match="group size = 128 for a weight with 896 inputs|divisor"):
        estimate(config | {"hidden_size": 864, "head_dim": 64}, plan(config), "rtn", 0, rates=RATES)
    with pytest.raises(SchemeError, match="a scheme for model.layers.0.mlp.experts"):
        estimate(config, plan(config) | {"model.layers.0.mlp.experts": Scheme()}, "rtn", 0, rates=RATES)
    with pytest.raises(ModelError, match="a model of type 'gpt2'"):
        estimate(config | {"model_type": "gpt2"}, {}, "rtn", 0, rates=RATES)


def test_json_and_text_hold_the_same() -> None:
    config = shape("qwen2.5-7b")
    found = estimate(config, plan(config), "gptq", 65536, rates=RATES, search="mse", card_gib=16, utilization=0.85)
    told = json.loads(to_json(found))
    assert told["after"]["kv_tokens"] == found.after.kv_tokens and told["after"]["users"] == found.after.users
    assert told["total_s"] == pytest.approx(found.total_s) and told["rates"]["matmul"] == 1e11
    for width in (80, 120):
        text = StringIO()
        show(found, Console(file=text, width=width))
        lines = text.getvalue().splitlines()
        assert all(len(line) <= width for line in lines) and len(lines) < 20
        flat = " ".join(" ".join(lines).split())
        for part in (
            "65,536 calibration tokens",
            "100 GFLOP/s",
            "16 GiB x 0.85",
            "(assumed)",
            f"about {found.total_s / 3600:.1f} h",
            "users of",
        ):
            assert part in flat, part


# What a file and a config say of themselves


def test_headers_and_implied_shapes_are_those_of_the_model(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "tiny")
    model = open_model(path)
    header, known = read_header(path / "model.safetensors"), implied(model.config)
    assert {name: tensor.shape for name, tensor in header.items()} == known.tensors and known.tied
    for name, tensor in model.read(model.files).items():
        assert header[name].bytes == tensor.nbytes and header[name].numel == tensor.numel()


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "text"])
def test_a_file_that_is_not_whole_is_refused(damage: str, tmp_path: Path) -> None:
    file = tiny_model.save(tmp_path / "tiny") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[:-7], "longer": content + b"1", "header": content[:100], "text": b"not one"}[damage]
    )
    with pytest.raises(ModelError, match=r"model\.safetensors: .*Allowed: a whole safetensors file"):
        read_header(file)
