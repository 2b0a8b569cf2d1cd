"""Models that are not as they should be, and those that are unusual but sound: handled, or refused with what to do."""

from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file

from quantize.errors import CalibrationError, ModelError, RunError, SchemeError
from quantize.fidelity import compare, load_dequantized, load_original
from quantize.job import quantize_model
from quantize.methods import METHODS
from quantize.recipe import Recipe, default_scheme, parse_exception
from quantize.weights import open_model

TOKENS = [list(range(i, i + 48)) for i in range(8)]


def recipe(method: str, keep: tuple[str, ...] = ()) -> Recipe:
    scheme = default_scheme(method, group_size=None if "smooth" in method else 64)
    exceptions = tuple(parse_exception(text, scheme) for text in keep)
    return Recipe(method, scheme, exceptions, samples=4, length=32)


def edited(path: Path, **changes: torch.Tensor | None) -> Path:
    """A tiny model with some tensors of its second block replaced, by their last names."""
    tiny_model.save(path)
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        full = f"model.layers.1.{name.replace('__', '.')}"
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value.to(tensors[full].dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(method: str, bad: float, tmp_path: Path) -> None:
    weight = torch.randn(256, 128)
    weight[3, 4] = bad
    path = edited(tmp_path / "model", mlp__up_proj__weight=weight)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize_model(path, recipe(method), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_zero_columns_and_a_layer_of_zeros_come_back_as_zeros(method: str, tmp_path: Path) -> None:
    down = torch.randn(128, 256) / 16
    down[:, 7] = 0
    path = edited(tmp_path / "model", mlp__down_proj__weight=down, self_attn__k_proj__weight=torch.zeros(64, 128))
    restored = load_dequantized(quantize_model(path, recipe(method), out=tmp_path / "out").path).state_dict()
    assert torch.count_nonzero(restored["model.layers.1.self_attn.k_proj.weight"]) == 0
    if "gptq" not in method:  # which may use a column of zeros to make up for others
        assert torch.count_nonzero(restored["model.layers.1.mlp.down_proj.weight"][:, 7]) == 0
    assert all(torch.isfinite(tensor).all() for tensor in restored.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_that_no_token_moves_keeps_its_weights(method: str, tmp_path: Path) -> None:
    """Rows of up_proj are zero, so down_proj never hears these channels; another text might wake them."""
    up = torch.randn(256, 128) / 11
    up[:5] = 0
    path = edited(tmp_path / "model", mlp__up_proj__weight=up)
    made = quantize_model(path, recipe(method), out=tmp_path / "out").path
    before = load_original(path).state_dict()["model.layers.1.mlp.down_proj.weight"][:, :5]
    after = load_dequantized(made).state_dict()["model.layers.1.mlp.down_proj.weight"][:, :5]
    if method in ("rtn", "gptq", "smoothquant"):  # a fold may have scaled the column, with the row before it
        assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.97
    assert torch.count_nonzero(after) > 0
    fidelity = compare(load_original(path), load_dequantized(made), TOKENS)
    assert fidelity.kl_nats < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["qwen2", "phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_biases_and_heads_tied_or_not(method: str, family: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model", family=family, tie_word_embeddings=tied)
    made = quantize_model(path, recipe(method), out=tmp_path / "out").path
    assert ("lm_head.weight" in open_model(made).files) == ("lm_head.weight" in open_model(path).files)
    assert compare(load_original(path), load_dequantized(made), TOKENS).kl_nats < 0.05


def test_layers_may_be_kept_and_mixed(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model")
    chosen = recipe("awq+gptq", ("down_proj=8bit", r"layers\.1\.self_attn=16bit", "o_proj=4bit-g32"))
    made = quantize_model(path, chosen, out=tmp_path / "out")
    assert made.format == "compressed-tensors"
    files = open_model(made.path).files
    kept = "model.layers.1.self_attn.q_proj.weight"
    assert kept in files and "model.layers.0.self_attn.q_proj.weight_packed" in files
    better = compare(load_original(path), load_dequantized(made.path), TOKENS).kl_nats
    plain = quantize_model(path, recipe("awq+gptq"), out=tmp_path / "plain").path
    assert better < compare(load_original(path), load_dequantized(plain), TOKENS).kl_nats


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("k_proj=8bit", "fuses into one matrix"),
        ("lm_head=8bit", "lm_head as W8A16 g64 sym, which is the embedding matrix here"),
        ("embed_tokens=8bit", "embeddings and norms are kept in any case"),
        ("down_proj=5bit", "2, 3, 4, 8 or 16"),
        ("(=8bit", "no PATTERN=BITS|unterminated|missing"),
    ],
)
def test_an_exception_that_cannot_be_is_refused(keep: str, message: str, tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model")
    with pytest.raises(SchemeError, match=message):
        quantize_model(path, recipe("rtn", (keep,)), out=tmp_path / "out")


def test_a_model_that_puts_out_nothing_finite_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path / "model", input_layernorm__weight=torch.full((128,), 3e38))
    with pytest.raises(RunError, match="NaN or infinity"):
        quantize_model(path, recipe("gptq"), out=tmp_path / "out")


def test_an_empty_calibration_file_is_refused(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path / "model")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CalibrationError, match="empty"):
        quantize_model(path, recipe("gptq"), out=tmp_path / "out", calibration=tmp_path / "empty.jsonl")
