"""Checkpoints: whole or absent, reused only when the same, exact when read back, and never a pickle."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantize import job
from quantize.calibration import draw, load
from quantize.checkpoint import RECORD, drafted
from quantize.errors import CalibrationError, ModelError, OutputError, SchemeError
from quantize.fidelity import load_dequantized
from quantize.job import Result, quantize_config, quantize_model
from quantize.recipe import Recipe
from quantize.scheme import Scheme, dequantize, quantize
from quantize.weights import content_hash, locate, open_model

RTN = Recipe("rtn", Scheme(4, 64))
AWQ = Recipe("awq", Scheme(4, 64), samples=4, length=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return quantize_model(model, AWQ, out=tmp_path_factory.mktemp("made") / "awq")


def copy_of(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# What is written


def test_a_packed_model_comes_back_as_its_rounded_weights(model: Path, tmp_path: Path) -> None:
    original = open_model(model)
    weights = original.read(original.files)
    restored = load_dequantized(quantize_model(model, RTN, out=tmp_path / "rtn").path).state_dict()
    linears = [name for name in weights if name.endswith("_proj.weight")]
    assert len(linears) == 14
    for name, weight in weights.items():
        expected = dequantize(quantize(weight, RTN.scheme)) if name in linears else weight.float()
        assert torch.equal(restored[name], expected), name


def test_the_layout_is_autoawq_s(made: Result) -> None:
    config = json.loads((made.path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in made.path.glob("*.safetensors")}
    assert {name: shard for shard, tensors in files.items() for name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    tensors = {name: tensor for each in files.values() for name, tensor in each.items()}
    down = "model.layers.1.mlp.down_proj"
    assert f"{down}.weight" not in tensors
    assert tensors[f"{down}.qweight"].shape == (256, 128 // 8)
    assert tensors[f"{down}.qzeros"].shape == (256 // 64, 128 // 8)
    assert tensors[f"{down}.scales"].shape == (256 // 64, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_quantized_keeps_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model", dtype=dtype)
    made = open_model(quantize_model(path, AWQ, out=tmp_path / "awq").path)
    for name, tensor in made.read(made.files).items():
        kind = name.rpartition(".")[2]
        expected = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}.get(kind, dtype)
        assert tensor.dtype == expected, name


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model", tie_word_embeddings=False, family="llama")
    out = quantize_model(path, RTN, out=tmp_path / "rtn").path
    head = open_model(path).read(["lm_head.weight"])["lm_head.weight"]
    assert torch.equal(load_dequantized(out).state_dict()["lm_head.weight"], head.float())


def test_a_checkpoint_says_what_made_it(made: Result, model: Path) -> None:
    record = json.loads((made.path / RECORD).read_text())
    assert record["recipe"] == replace(AWQ, format="awq").record()
    assert record["recipe_sha256"] == made.recipe_sha256 == replace(AWQ, format="awq").sha256()
    assert [layer["name"] for layer in record["layers"]][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert len(record["layers"]) == 14 and all(layer["output_sqnr_db"] > 10 for layer in record["layers"])
    assert record["checkpoint_sha256"] == made.checkpoint_sha256 == content_hash(made.path)
    assert record["source_sha256"] == content_hash(model)
    assert record["calibration"] == "built-in: pydoc topics"
    with safe_open(next(iter(sorted(made.path.glob("*.safetensors")))), framework="pt") as shard:
        noted = shard.metadata()
    assert noted["recipe_sha256"] == record["recipe_sha256"] and noted["source_sha256"] == record["source_sha256"]
    assert noted["calibration_sha256"] == record["calibration_sha256"] and noted["tool"].startswith("kneebench")


def test_the_tokenizer_comes_along_and_everyone_may_read(made: Result, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.path / name).read_bytes() == (model / name).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in made.path.iterdir()} == {0o644}


def test_the_same_run_twice_gives_the_same_bytes(made: Result, model: Path, tmp_path: Path) -> None:
    again = quantize_model(model, AWQ, out=tmp_path / "again")
    assert again.checkpoint_sha256 == made.checkpoint_sha256 and not again.cached


# Whole or absent


def test_a_run_that_fails_leaves_no_checkpoint(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "describe", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, RTN, out=tmp_path / "deep" / "rtn")
    assert not (tmp_path / "deep" / "rtn").exists()


def test_a_run_that_fails_before_its_first_block_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "walk", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_model(model, RTN, out=tmp_path / "deep" / "rtn")
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_name_appears_when_the_content_is_whole(tmp_path: Path) -> None:
    with drafted(tmp_path / "out", "key", {}) as draft:
        (draft.path / "a").write_text("a")
        assert draft.path.parent == tmp_path and not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not empty"), drafted(tmp_path / "out", "key", {}) as draft:
        (draft.path / "mine").write_text("")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_occupied_place_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(OutputError, match="is not this checkpoint.*Choose another --out"):
        quantize_model(model, RTN, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# The cache


def test_a_finished_entry_is_reused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantize_model(model, RTN, cache=tmp_path)
    assert first.path.parent == tmp_path / "checkpoints" and first.path.name.startswith("tiny-rtn-")
    monkeypatch.setattr(job, "walk", None)  # it would be called if there were work
    second = quantize_model(model, RTN, cache=tmp_path)
    assert (second.cached, second.path) == (True, first.path)
    assert second.checkpoint_sha256 == first.checkpoint_sha256


def test_a_damaged_entry_is_not(model: Path, tmp_path: Path) -> None:
    entry = quantize_model(model, RTN, cache=tmp_path).path
    shard = next(entry.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OutputError, match="changed since they were written"):
        quantize_model(model, RTN, cache=tmp_path)


def test_whatever_changes_the_numbers_changes_the_entry(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_write", lambda *_: None)  # the entry's name is settled before
    other = copy_of(model, tmp_path / "tiny")
    tiny_model.build(seed=1).save_pretrained(other)
    text = tmp_path / "text.txt"
    text.write_text("Some other words. " * 40)
    runs: Sequence[tuple[Path, Recipe, Path | None]] = [
        (model, RTN, None),
        (model, AWQ, None),
        (model, Recipe("awq", Scheme(4, 64), samples=4, length=31), None),
        (model, Recipe("awq", Scheme(4, 64), samples=4, length=32, seed=1), None),
        (model, Recipe("awq", Scheme(4, 128), samples=4, length=32), None),
        (model, AWQ, text),
        (other, AWQ, None),
    ]
    entries = [quantize_model(m, recipe, cache=tmp_path, calibration=file).path for m, recipe, file in runs]
    assert len(set(entries)) == len(runs)


def test_calibration_does_not_split_the_entries_of_a_method_without(model: Path, tmp_path: Path) -> None:
    first = quantize_model(model, RTN, cache=tmp_path)
    assert quantize_model(model, Recipe("rtn", Scheme(4, 64), samples=7, seed=3), cache=tmp_path).path == first.path


def test_a_copy_under_another_name_has_the_same_content(model: Path, tmp_path: Path) -> None:
    assert content_hash(copy_of(model, tmp_path / "copy")) == content_hash(model)
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert content_hash(tmp_path / "copy") != content_hash(model)


def test_a_shape_alone_gets_a_config_alone(model: Path, tmp_path: Path) -> None:
    result = quantize_config(model / "config.json", AWQ, cache=tmp_path)
    config = json.loads((result.path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq" and config["hidden_size"] == 128
    assert not list(result.path.glob("*.safetensors"))
    assert quantize_config(model / "config.json", AWQ, cache=tmp_path).cached


# What is refused


def test_a_pickle_is_never_opened(model: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="pytorch_model.bin.*a pickle runs code"):
        quantize_model(tmp_path / "model", RTN, out=tmp_path / "out")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


def test_a_truncated_shard_is_refused(model: Path, tmp_path: Path) -> None:
    broken = copy_of(model, tmp_path / "broken")
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="model.safetensors.*whole safetensors file"):
        open_model(broken)


def test_a_config_that_contradicts_itself_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((copy_of(model, tmp_path / "model") / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="no tensor model.layers.2.*that its config.json implies"):
        quantize_model(tmp_path / "model", RTN, out=tmp_path / "out")


def test_a_missing_tensor_is_refused(model: Path, tmp_path: Path) -> None:
    tensors = load_file(copy_of(model, tmp_path / "model") / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="model.layers.1.*up_proj"):
        quantize_model(tmp_path / "model", RTN, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused_with_a_way_out(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(CalibrationError, match="--method rtn"):
        load(tmp_path, AWQ)


def test_a_quantized_model_is_not_quantized_again(made: Result, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Give the original"):
        quantize_model(made.path, RTN, out=tmp_path / "out")


def test_a_family_whose_folds_are_unknown_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((copy_of(model, tmp_path / "model") / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="'mamba'.*llama, mistral, qwen2, qwen3"):
        quantize_model(tmp_path / "model", RTN, out=tmp_path / "out")


def test_a_group_size_that_does_not_fit_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="group size = 96"):
        quantize_model(model, Recipe("rtn", Scheme(4, 96)), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        locate(tmp_path / "nothing")


# The calibration set


def test_long_documents_are_cut_and_short_ones_stand_alone() -> None:
    recipe = Recipe(samples=100, length=4)
    assert sorted(draw([[1, 2, 3, 4, 5], [6, 7]], recipe)) == [(1, 2, 3, 4), (5,), (6, 7)]


def test_the_draw_stops_at_the_tokens_asked_for_and_follows_the_seed() -> None:
    documents = [[i] * 8 for i in range(50)]
    drawn = [draw(documents, Recipe(samples=5, length=8, seed=seed)) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', "a.jsonl:2 has none"),
        ("a.jsonl", '{"text": \n', "a.jsonl:1 is not JSON"),
        ("a.jsonl", '{"input_ids": [1, 999999]}', "vocabulary"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
        ("a.jsonl", '{"text": 5}', "int"),
        ("a.jsonl", "", "empty"),
        ("a.txt", "short", "5 tokens"),
    ],
)
def test_a_bad_calibration_file_says_what_is_wrong(
    model: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(model, AWQ, tmp_path / name)


def test_a_model_brings_its_own_calibration_set(model: Path, tmp_path: Path) -> None:
    own = copy_of(model, tmp_path / "own")
    (own / "calibration.jsonl").write_text(json.dumps({"input_ids": list(range(32))}) + "\n")
    assert load(own, AWQ).sequences == (tuple(range(32)),)
    assert load(model, AWQ).origin.startswith("built-in")


def test_all_kinds_of_lines_are_read(model: Path, tmp_path: Path) -> None:
    chat = copy_of(model, tmp_path / "chat")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    lines = [{"text": "abc"}, {"messages": [{"role": "user", "content": "abc"}]}, {"input_ids": [1, 2, 3]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = load(chat, Recipe(length=3), tmp_path / "a.jsonl").sequences
    assert len(found) == 3 and len(set(found)) == 2 and (1, 2, 3) in found
