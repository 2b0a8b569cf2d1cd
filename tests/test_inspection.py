"""`inspect`: figures against the integers that were packed, a line for each kind of damage, and a readable terminal."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize import formats
from quantize.blocks import FAMILIES
from quantize.errors import ModelError, SchemeError
from quantize.inspection import Inspection, inspect, show, to_json
from quantize.scheme import PER_CHANNEL, Quantized, Scheme, dequantize, quantize
from quantize.weights import content_hash

W8A8 = Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8)
STORED = [
    ("awq", Scheme(4, 32)),
    ("awq", Scheme(4, 128, symmetric=True)),
    ("gptq", Scheme(4, 128, symmetric=True)),
    ("gptq", Scheme(8, PER_CHANNEL, symmetric=True)),
    ("compressed-tensors", Scheme(3, 32)),
    ("compressed-tensors", Scheme(4, 128, symmetric=True)),
    ("compressed-tensors", W8A8),
]
DOWN = "model.layers.1.mlp.down_proj"
SHARD = "model-00002-of-00002.safetensors"


def made(path: Path, format: str, scheme: Scheme, down: Scheme | None = None, **options: Any) -> dict[str, Quantized]:
    """A quantized tiny model in two shards at `path`, and the integers of its layers; `down` is down_proj's scheme."""
    tiny_model.save(path, **options)
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [
        f"model.layers.{i}.{name}"
        for i in range(config["num_hidden_layers"])
        for name in FAMILIES[config["model_type"]].linears
    ]
    schemes = {name: down or scheme if name.endswith("down_proj") else scheme for name in names}
    integers = {name: quantize(tensors.pop(f"{name}.weight").float(), each) for name, each in schemes.items()}
    for name, quantized in integers.items():
        packed = formats.pack(format, quantized, schemes[name])
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    config["quantization_config"] = formats.quantization_config(format, schemes, ["lm_head"])
    (path / "config.json").write_text(json.dumps(config))
    write(path, tensors)
    return integers


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Layer 1 in the second shard, all else in the first."""
    shards = {name: SHARD if ".layers.1." in name else SHARD.replace("00002-", "00001-") for name in tensors}
    for shard in set(shards.values()):
        save_file({name: t for name, t in tensors.items() if shards[name] == shard}, path / shard, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def change(path: Path, by: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the tensors of a checkpoint again, changed."""
    tensors = {name: t for shard in path.glob("*.safetensors") for name, t in load_file(shard).items()}
    by(tensors)
    write(path, tensors)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    made(tmp_path / "awq", "awq", Scheme(4, 32))
    return tmp_path / "awq"


def faults(found: Inspection) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.text, finding.where) for finding in found.faults]


def told(found: Inspection, width: int = 80, layers: bool = False) -> list[str]:
    text = StringIO()
    show(found, Console(file=text, width=width), layers=layers)
    return text.getvalue().splitlines()


# Figures


@pytest.mark.parametrize(("format", "scheme"), STORED, ids=str)
def test_the_figures_are_those_of_what_was_packed(format: str, scheme: Scheme, tmp_path: Path) -> None:
    integers = made(tmp_path / "it", format, scheme)
    found = inspect(tmp_path / "it")
    assert found.format == format and found.findings == () and found.tied is True
    assert {layer.name for layer in found.layers} == set(integers)
    stored = {name: t for shard in (tmp_path / "it").glob("*.safetensors") for name, t in load_file(shard).items()}
    for layer in found.layers:
        q, scales, zeros = (t.double() for t in integers[layer.name])
        nbytes = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[0] == layer.name)
        biases = stored.get(f"{layer.name}.bias")
        assert layer.bytes == nbytes - (biases.nbytes if biases is not None else 0)
        assert (layer.outputs, layer.inputs) == q.shape and layer.parameters == q.numel()
        assert layer.bits_per_weight == 8 * layer.bytes / q.numel()
        what = dequantize(integers[layer.name]).double()
        assert layer.peak == pytest.approx(float(what.abs().max() / what.square().mean().sqrt()), rel=1e-6)
        figures = layer.integers
        assert figures is not None and layer.scheme is not None
        assert layer.scheme.bits == scheme.bits and figures.groups == scales.numel()
        assert figures.ends == pytest.approx(float(((q == 0) | (q == scheme.highest)).double().mean()))
        order = scales.flatten().sort().values
        median = order[(len(order) - 1) // 2]
        assert (figures.scale_min, figures.scale_median, figures.scale_max) == (order[0], median, order[-1])
        assert figures.wide == int((scales > 8 * median).sum())
        if layer.scheme.symmetric:
            assert figures.zero_mean is None
        else:
            assert figures.zero_mean == pytest.approx(float(zeros.mean()))
            assert figures.zero_lowest == float((zeros == 0).double().mean())
            assert figures.zero_highest == float((zeros == scheme.highest).double().mean())


def test_the_totals_are_those_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "it"
    made(path, "awq", Scheme(4, 32), tie_word_embeddings=False)
    found = inspect(path)
    original = tiny_model.build(tie_word_embeddings=False)
    assert found.parameters == sum(p.numel() for p in original.parameters())
    assert found.bf16_bytes == 2 * found.parameters and found.tied is False and found.shards == 2
    assert found.disk_bytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    stored = [t for shard in path.glob("*.safetensors") for t in load_file(shard).values()]
    assert found.tensor_bytes == sum(t.nbytes for t in stored)
    assert found.tensor_bytes == sum(layer.bytes for layer in found.layers) + sum(each.bytes for each in found.kept)
    why = {each.what: each.why for each in found.kept}
    assert set(why) == {"embeddings", "output head", "norms", "biases"}
    assert why["embeddings"] == "looked up, not multiplied"


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "tiny")
    found = inspect(path)
    weights = load_file(path / "model.safetensors")
    assert found.format is None and found.findings == () and len(found.layers) == 14
    for layer in found.layers:
        w = weights[f"{layer.name}.weight"].double()
        assert layer.stored == "BF16" and layer.bits_per_weight == 16 and layer.integers is None
        assert layer.peak == pytest.approx(float(w.abs().max() / w.square().mean().sqrt()), rel=1e-6)
    assert "not quantized" in told(found)[1]


def test_large_layers_are_looked_at_in_slabs(awq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect(awq)
    monkeypatch.setattr("quantize.examine._SLAB", 300)
    for one, other in zip(whole.layers, inspect(awq).layers, strict=True):
        assert one.peak == pytest.approx(other.peak) and one.integers == other.integers


def test_the_record_is_held_against_the_files(awq: Path) -> None:
    record = {"tool": "kneebench 1", "recipe": {"method": "awq"}, "calibration": "a.jsonl", "source_sha256": "f" * 64}
    record["checkpoint_sha256"] = content_hash(awq)
    (awq / "quantize.json").write_text(json.dumps(record))
    found = inspect(awq)
    assert found.record == record and not found.findings
    lines = told(found, 120)
    assert {"made by: kneebench 1", "recipe: method awq", "calibration: a.jsonl"} <= set(lines)
    change(awq, lambda tensors: tensors[f"{DOWN}.qweight"].add_(1))
    assert faults(inspect(awq)) == [("the files are not those whose hash quantize.json notes", ())]


# Faults: each is one line, and the rest is still looked at


def test_a_part_that_is_missing(awq: Path) -> None:
    change(awq, lambda tensors: [tensors.pop(f"{DOWN}.scales"), tensors.pop("model.norm.weight")])
    found = inspect(awq)
    assert faults(found) == [
        ("a awq layer without scales", (DOWN,)),
        ("tensor that config.json implies and no file holds", ("model.norm.weight",)),
    ]
    assert len(found.layers) == 13


def test_integers_that_are_missing(awq: Path) -> None:
    change(awq, lambda tensors: tensors.pop(f"{DOWN}.qweight"))
    assert faults(inspect(awq)) == [("qzeros, scales without integers", (DOWN,))]


def test_a_layer_that_is_missing_altogether(awq: Path) -> None:
    change(awq, lambda tensors: [tensors.pop(f"{DOWN}.{part}") for part in ("qweight", "qzeros", "scales")])
    text = "tensor that config.json implies and no file holds"
    assert faults(inspect(awq)) == [(text, (f"{DOWN}.weight",))]


def test_other_shapes(awq: Path) -> None:
    def smaller(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros"):
            tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"][:, :8].contiguous()
        tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:, :64].contiguous()
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)

    change(awq, smaller)
    assert faults(inspect(awq)) == [
        ("shape [64, 256] where config.json implies [128, 256]", (DOWN,)),
        ("shape [64] where config.json implies [128]", ("model.norm.weight",)),
    ]
    change(awq, lambda tensors: tensors.update({f"{DOWN}.scales": torch.ones(8, 32, dtype=torch.float16)}))
    assert faults(inspect(awq))[0][1] == (DOWN,)


def test_scales_that_are_no_numbers_or_no_bfloat16(awq: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.scales"][0, 0] = float("nan")
        tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = 1 + 2**-10

    change(awq, spoil)
    found = inspect(awq)
    assert faults(found) == [("scales that are NaN or infinite", (DOWN,))]
    notes = [(finding.text, finding.where) for finding in found.findings if not finding.fault]
    text = "scales that bfloat16 rounds: served with --dtype bfloat16, the weights are others"
    assert notes == [(text, ("model.layers.0.mlp.up_proj",))]
    spoiled = next(layer for layer in json.loads(to_json(found))["layers"] if layer["name"] == DOWN)
    assert spoiled["peak"] is None or spoiled["integers"]["scale_max"] is None


def test_weights_that_are_no_numbers(awq: Path) -> None:
    change(awq, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    assert faults(inspect(awq)) == [("tensor with NaN or infinity", ("model.norm.weight",))]


def test_values_out_of_range(tmp_path: Path) -> None:
    """Only int8 storage has room for them: 4-bit values there, and zero points of the same type."""
    path = tmp_path / "it"
    made(path, "compressed-tensors", W8A8)
    config = json.loads((path / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"num_bits": 4, "symmetric": False}
    (path / "config.json").write_text(json.dumps(config))

    def reach(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            module = name.removesuffix("_scale")
            tensors[f"{module}"].clamp_(-8, 7)
            tensors[f"{module}_zero_point"] = torch.zeros_like(tensors[name], dtype=torch.int8)
        tensors[f"{DOWN}.weight"][0, 0] = 8
        tensors[f"{DOWN}.weight_zero_point"][0, 0] = -9

    change(path, reach)
    assert faults(inspect(path)) == [("integers beyond 4 bits", (DOWN,)), ("zero points beyond 4 bits", (DOWN,))]


def test_zero_points_that_vllm_would_not_look_at(tmp_path: Path) -> None:
    path = tmp_path / "it"
    made(path, "gptq", Scheme(4, 128, symmetric=True))
    change(path, lambda tensors: tensors[f"{DOWN}.qzeros"].add_(1))
    text = "zero points other than 8 in a symmetric scheme, where vLLM looks at none"
    assert faults(inspect(path)) == [(text, (DOWN,))]


def test_a_shard_that_is_cut_short(awq: Path) -> None:
    content = (awq / SHARD).read_bytes()
    (awq / SHARD).write_bytes(content[:-10])
    found = inspect(awq)
    text = f"{SHARD}: 10 bytes are missing at its end; nothing in it was looked at"
    assert faults(found) == [(text, (SHARD,))]
    assert len(found.layers) == 7


def test_a_shard_whose_header_contradicts_itself(awq: Path) -> None:
    content = (awq / SHARD).read_bytes()
    (awq / SHARD).write_bytes(content.replace(b'"shape":[256,16]', b'"shape":[256,17]', 1))
    ((text, where),) = faults(inspect(awq))
    assert text.startswith(f"{SHARD}: ") and where == (SHARD,)


def test_a_shard_that_is_listed_and_absent(awq: Path) -> None:
    (awq / SHARD).unlink()
    assert faults(inspect(awq)) == [("shard that the index names and the directory lacks", (SHARD,))]


def test_an_index_and_files_that_do_not_agree(awq: Path) -> None:
    tensors = load_file(awq / SHARD)
    tensors["model.layers.1.extra"] = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, awq / SHARD)
    save_file({"x": torch.ones(1)}, awq / "adapter.safetensors")
    found = inspect(awq)
    lost = "model.layers.1.input_layernorm.weight"
    assert faults(found) == [("tensor that the index names and its file lacks", (lost,))]
    assert [(f.text, f.where) for f in found.findings if not f.fault] == [
        ("file that the index does not name, not looked at", ("adapter.safetensors",)),
        ("tensor that the index does not name, not looked at", ("model.layers.1.extra",)),
    ]


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "tiny")
    save_file({"model.norm.weight": torch.ones(128)}, path / "other.safetensors")
    text = "tensor in model.safetensors and in other.safetensors"
    assert faults(inspect(path)) == [(text, ("model.norm.weight",))]


def test_integers_of_which_the_config_says_nothing(awq: Path) -> None:
    config = json.loads((awq / "config.json").read_text())
    del config["quantization_config"]
    (awq / "config.json").write_text(json.dumps(config))
    ((text, where),) = faults(inspect(awq))
    assert text == "qweight, qzeros, scales, and config.json has no quantization_config" and len(where) == 14


def test_an_architecture_that_is_not_known_is_looked_at_without_expectations(awq: Path) -> None:
    config = json.loads((awq / "config.json").read_text())
    (awq / "config.json").write_text(json.dumps(config | {"model_type": "a-new-one"}))
    found = inspect(awq)
    assert len(found.layers) == 14 and not found.faults
    assert "not checked which tensors must be there" in found.findings[0].text


def test_what_is_no_checkpoint_is_refused(awq: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(awq / "config.json", tmp_path / "config.json")
    for path, given in (
        (tmp_path / "absent", "no directory"),
        (awq / "config.json", "no directory"),
        (tmp_path / "empty", "config.json"),
        (tmp_path, "no weights"),
    ):
        with pytest.raises(ModelError, match=given) as refused:
            inspect(path)
        assert refused.value.exit_code == 2
    (awq / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SchemeError, match="fp8"):
        inspect(awq)


# The terminal


@pytest.mark.parametrize("width", [80, 120])
def test_eighty_blocks_are_a_row_a_kind(width: int, tmp_path: Path) -> None:
    made(tmp_path / "it", "compressed-tensors", Scheme(4, 32), down=Scheme(8, 32), num_hidden_layers=80)
    found = inspect(tmp_path / "it")
    lines = told(found, width)
    assert all(len(line) <= width for line in lines) and len(lines) < 32, "\n".join(lines)
    rows = {line.split()[0]: line.split() for line in lines if line.split()[1:2] == ["80"]}
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(rows) == sorted(kinds)
    assert "W8" in rows["down_proj"] and "W4" in rows["up_proj"]
    assert (f"{128} x {256}" in "\n".join(lines)) == (width == 120)
    every = told(found, width, layers=True)
    assert sum("model.layers." in line for line in every) == 560


def test_faults_come_first_and_name_some_places(awq: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".scales"):
                tensor[0, 0] = float("inf")

    change(awq, spoil)
    lines = told(inspect(awq), 200)
    (line,) = [line for line in lines if line.startswith("FAULT")]
    assert line.startswith("FAULT  scales that are NaN or infinite: model.layers.0.") and line.endswith("and 11 more")
    assert lines.index(line) < next(i for i, each in enumerate(lines) if each.startswith("kept"))


def test_json_has_every_layer(awq: Path) -> None:
    found = json.loads(to_json(inspect(awq)))
    assert len(found["layers"]) == 14 and found["layers"][0]["scheme"]["bits"] == 4
    assert found["layers"][0]["bits_per_weight"] == pytest.approx(4 + 20 / 32) and found["findings"] == []


def test_progress_counts_to_the_end(awq: Path) -> None:
    seen: list[tuple[int, int]] = []
    inspect(awq, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
