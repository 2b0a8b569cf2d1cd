"""Checkpoints that are cut, damaged or dangerous: each command that takes one refuses it by name, before it begins.

No code of a checkpoint runs: weights are safetensors and never pickles, and what auto_map names is never imported. The
code is there in these tests, and leaves a mark where it does run.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file

from quantize.__main__ import main as quantize
from tests.faults.test_engine_process import Engine
from tests.test_resume import refused

__all__ = ["refused"]
Refused = Callable[..., str]
Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"


class Evil:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def mark(model: Path) -> Path:
    return model.parent / "it-ran"


def cut(keep: float) -> Damage:
    """Keep this share of the file's bytes."""

    def damage(model: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return damage


def instead(content: bytes) -> Damage:
    return lambda model: (model / WEIGHTS).write_bytes(content)


def headed(header: bytes) -> Damage:
    return instead(len(header).to_bytes(8, "little") + header + b"ab")


def indexed(text: str) -> Damage:
    return lambda model: (model / f"{WEIGHTS}.index.json").write_text(text)


def in_place(of: str, make: Callable[[Path], object]) -> Damage:
    def damage(model: Path) -> None:
        (model / of).unlink()
        make(model / of)

    return damage


def pickled(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / WEIGHTS).unlink()
        (model / name).write_bytes(pickle.dumps(Evil(mark(model))))

    return damage


def configured(text: str) -> Damage:
    return lambda model: (model / "config.json").write_text(text)


DEEP = "[" * 100_000
CUT: dict[str, tuple[Damage, str]] = {
    "tensors": (cut(0.9), WEIGHTS),
    "header": (cut(0.02), WEIGHTS),
    "length": (instead(b"\x10\0\0"), WEIGHTS),
    "empty": (instead(b""), WEIGHTS),
    "header of 8 EiB": (instead(b"\xff" * 16), WEIGHTS),
    "header that is no JSON": (headed(b"{'a'"), WEIGHTS),
    "header that is a list": (headed(b"[1]"), WEIGHTS),
    "bottomless header": (headed(DEEP.encode()), WEIGHTS),
    "offsets that are none": (headed(b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":["0",2]}}'), WEIGHTS),
    "offsets that go back": (headed(b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":[2,0]}}'), WEIGHTS),
    "circle": (in_place(WEIGHTS, lambda path: path.symlink_to(path.name)), WEIGHTS),
    "directory": (in_place(WEIGHTS, lambda path: path.mkdir()), WEIGHTS),
    "config.json cut": (configured('{"model_type": "qw'), "config.json"),
    "bottomless config.json": (configured(DEEP), "config.json"),
    "config.json that is a list": (configured("[1]"), "config.json"),
    "config.json that is a pipe": (in_place("config.json", os.mkfifo), "config.json"),
    "pytorch_model.bin": (pickled("pytorch_model.bin"), "pytorch_model.bin"),
    "model.pt": (pickled("model.pt"), "model.pt"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "holds no "),
}
OF_SHARDS: dict[str, tuple[Damage, str]] = {
    "index cut": (indexed('{"weight_map": {"w": "mod'), f"{WEIGHTS}.index.json"),
    "bottomless index": (indexed(DEEP), f"{WEIGHTS}.index.json"),
    "index without a map": (indexed("{}"), f"{WEIGHTS}.index.json"),
    "index that is a list": (indexed("[1]"), f"{WEIGHTS}.index.json"),
    "shard missing": (indexed('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'), "00001-of-00002"),
    "weights that are a pipe": (in_place(WEIGHTS, os.mkfifo), "model"),
}


@pytest.mark.parametrize("name", [*CUT, *OF_SHARDS])
def test_a_sweep_refuses_a_damaged_checkpoint(name: str, engine: Engine, refused: Refused, tmp_path: Path) -> None:
    """Exit code 2 before an engine is started or a run directory made, with or without a card in the machine."""
    damage, said = (CUT | OF_SHARDS)[name]
    damage(engine.model)
    out = tmp_path / "run"
    told = refused(
        "--model", str(engine.model), "--precisions", "bf16", "--engine-python", str(engine.home / "python"),
        "--out", str(out),
    )  # fmt: skip
    assert told.startswith("error: ") and said in told and "Traceback" not in told, told
    assert not out.exists() and not engine.processes() and not mark(engine.model).exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in sound.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def changed(by: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        by(tensors)
        save_file(tensors, model / WEIGHTS, {"format": "pt"})

    return damage


def twice(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    save_file({DOWN: tensors[DOWN]}, model / "more.safetensors", {"format": "pt"})


def with_code(model_type: str) -> Damage:
    """A config and a tokenizer that name code of the checkpoint's own."""

    def damage(model: Path) -> None:
        (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark(model))!r}).touch()\n")
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
        tokenizer = model / "tokenizer_config.json"
        named = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | named))

    return damage


DOWN = "model.layers.1.mlp.down_proj.weight"
VALUES: dict[str, tuple[Damage, str]] = {
    "NaN": (changed(lambda tensors: tensors[DOWN].view(-1)[7:8].fill_(float("nan"))), DOWN.removesuffix(".weight")),
    "Inf": (changed(lambda tensors: tensors[DOWN].view(-1)[7:8].fill_(float("inf"))), DOWN.removesuffix(".weight")),
    "shape": (changed(lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :128].clone()})), "down_proj"),
    "one dimension": (changed(lambda tensors: tensors.update({DOWN: tensors[DOWN].flatten()})), "down_proj"),
    "missing": (changed(lambda tensors: tensors.pop(DOWN)), DOWN),
    "twice": (twice, "more.safetensors"),
    "code of its own": (with_code("evil"), "evil"),
}


@pytest.mark.parametrize("name", [*CUT, *VALUES])
def test_quantizing_refuses_a_damaged_model(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 with the file or the tensor by its name; nothing lies at --out."""
    damage, said = (CUT | VALUES)[name]
    damage(model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what somebody in a hurry answers
    out = tmp_path / "out"
    code = quantize([str(model), "--method", "rtn", "--group-size", "64", "--out", str(out)])
    told = capsys.readouterr().err
    assert code == 2 and "error: " in told and said in told and "Allowed" in told, told
    assert not out.exists() and not mark(model).exists()


def test_code_of_a_model_that_is_known_is_not_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qwen2 whose config and tokenizer bring their own classes: the model is quantized by transformers' class, and
    where the tokenizer is needed it is refused."""
    with_code("qwen2")(model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plain = [str(model), "--method", "rtn", "--group-size", "64", "--out", str(tmp_path / "plain")]
    assert quantize(plain) == 0, capsys.readouterr().err
    needs = [str(model), "--method", "gptq", "--group-size", "64", "--samples", "2", "--length", "16", "--out",
             str(tmp_path / "needs")]  # fmt: skip
    code = quantize(needs)
    told = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in told, told
    assert not mark(model).exists()
