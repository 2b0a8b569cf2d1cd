"""AWQ: folds that change nothing, a loss that is what it says, and less error than rounding to nearest."""

import copy
import json
from pathlib import Path

import pytest
import tiny_model
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantize import awq
from quantize.blocks import FAMILIES, FOLDS, LINEARS, Heads, apply_fold, heads_of, linear, tie
from quantize.fidelity import Fidelity, compare, load_dequantized, load_original
from quantize.job import quantize_model
from quantize.recipe import Recipe
from quantize.scheme import Scheme, dequantize, quantize
from quantize.walk import InputStats, Step, walk
from quantize.weights import open_model

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"
SCHEME = Scheme(4, 64)
TOKENS = [torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / request.param, family=request.param)


def first(path: Path) -> Step:
    return next(walk(open_model(path), TOKENS))


def inputs(loud: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs [tokens, 128], the channels `loud` forty times louder than the rest."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    x[:, list(loud)] *= 40
    return x


def stats_of(x: Tensor) -> InputStats:
    return InputStats(x.T @ x / len(x), x.abs().mean(dim=0))


def test_the_trace_is_the_error_of_the_output() -> None:
    x, difference = inputs(loud=(3,)), torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    explicit = ((x.double() @ difference.double().T) ** 2).sum() / len(x)
    assert awq.loss(difference, stats_of(x).gram) == pytest.approx(float(explicit), rel=1e-5)


def test_the_walk_sees_what_the_model_sees(tiny: Path) -> None:
    """Statistics of every block, gathered one at a time, are those of the whole model's own forward."""
    model = load_original(tiny)
    seen: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        for name in LINEARS:
            keep = seen.setdefault(f"{i}.{name}", [])
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0][0]))
    for ids in TOKENS:
        model(input_ids=torch.tensor([ids]))
    for step in walk(open_model(tiny), TOKENS):
        for name in LINEARS:
            expected = stats_of(torch.cat(seen[f"{step.index}.{name}"]))
            assert torch.allclose(step.stats[name].gram, expected.gram, rtol=1e-3, atol=1e-4)
            assert torch.allclose(step.stats[name].abs_mean, expected.abs_mean, rtol=1e-3, atol=1e-5)


def test_padding_is_not_counted(tiny: Path) -> None:
    """Two sequences of unlike length in one batch give the statistics that they give one by one."""
    long, short = TOKENS[0], TOKENS[1][:7]
    together = next(walk(open_model(tiny), [long, short])).stats
    alone = [next(walk(open_model(tiny), [ids])).stats for ids in (long, short)]
    for name in LINEARS:
        expected = sum(len(ids) * each[name].gram for ids, each in zip((long, short), alone, strict=True)) / (
            len(long) + len(short)
        )
        assert torch.allclose(together[name].gram, expected, rtol=1e-3, atol=1e-4)


def test_folding_leaves_the_function_as_it_was(tiny: Path) -> None:
    model = load_original(tiny)
    folded = copy.deepcopy(model)
    heads = heads_of(model.config)
    generator = torch.Generator().manual_seed(3)
    for block in folded.model.layers:
        for fold in FOLDS:
            width = linear(block, fold.linears[0]).in_features
            scale = tie(torch.rand(width, generator=generator) * 3.9 + 0.1, fold, heads)
            apply_fold(block, fold, scale, heads, torch.float32)
    ids = torch.tensor(TOKENS)
    assert torch.allclose(folded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


def test_a_norm_stored_in_bfloat16_costs_the_fold_nothing() -> None:
    """The linear layers take up what the norm loses by its rounding."""
    block = nn.ModuleDict({"input_layernorm": nn.RMSNorm(128), "self_attn": nn.ModuleDict()})
    attention = block["self_attn"]
    assert isinstance(attention, nn.ModuleDict)
    for name in ("q_proj", "k_proj", "v_proj"):
        attention[name] = nn.Linear(128, 8)
    before = copy.deepcopy(block)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(4)) + 0.3
    applied = apply_fold(block, FOLDS[0], scale, Heads(2, 2, 4), torch.bfloat16)
    norm = block["input_layernorm"].weight
    assert torch.equal(norm, norm.to(torch.bfloat16).float())
    assert torch.allclose(applied, scale, rtol=2**-7)
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(5))
    for name in ("q_proj", "k_proj", "v_proj"):
        after = attention[name](block["input_layernorm"](x))
        assert torch.allclose(after, before["self_attn"][name](before["input_layernorm"](x)), atol=1e-5)


def test_a_dead_channel_is_left_alone() -> None:
    block = nn.ModuleDict({"post_attention_layernorm": nn.RMSNorm(8), "mlp": nn.ModuleDict()})
    mlp = block["mlp"]
    assert isinstance(mlp, nn.ModuleDict)
    mlp["gate_proj"], mlp["up_proj"] = nn.Linear(8, 8), nn.Linear(8, 8)
    with torch.no_grad():
        block["post_attention_layernorm"].weight[3] = 0
    applied = apply_fold(block, FOLDS[2], torch.full((8,), 2.0), Heads(1, 1, 8), torch.float16)
    assert applied.tolist() == [2, 2, 2, 1, 2, 2, 2, 2]


def test_repeated_heads_share_a_factor() -> None:
    heads = Heads(query=4, key_value=2, size=1)
    assert tie(torch.tensor([1.0, 3.0, 10.0, 20.0]), FOLDS[1], heads).tolist() == [2, 2, 15, 15]
    assert tie(torch.tensor([1.0, 3.0, 10.0, 20.0]), FOLDS[3], heads).tolist() == [1, 3, 10, 20]


def test_loud_channels_are_found_and_saved() -> None:
    """The planted outliers, 40 times louder: scaling takes off at least three quarters of the error of nearest."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    seen = stats_of(inputs(loud=(5, 77)))
    scale = awq.best_scale([weight], seen, Scheme(), FOLDS[3], Heads(1, 1, 1))
    assert set(scale.topk(2).indices.tolist()) == {5, 77}
    nearest = awq.loss(weight - dequantize(quantize(weight, Scheme())), seen.gram)
    _, found = awq.clip(weight * scale, seen.gram / torch.outer(scale, scale), Scheme())
    assert found < nearest / 4


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_is_worse_than_nearest_by_its_own_loss(seed: int) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) ** 3
    seen = stats_of(inputs())
    nearest = awq.loss(weight - dequantize(quantize(weight, SCHEME)), seen.gram)
    quantized, clipped = awq.clip(weight, seen.gram, SCHEME)
    assert clipped <= nearest
    assert awq.loss(weight - dequantize(quantized), seen.gram) == pytest.approx(clipped)


def test_a_block_keeps_its_function_and_gets_closer_than_nearest(tiny: Path) -> None:
    step = first(tiny)
    weights = {name: linear(step.block, name).weight.clone() for name in LINEARS}
    quantized = awq.quantize_block(step.block, step.stats, SCHEME, step.heads, step.stored)
    for fold in FOLDS[::2]:  # these see the same input as before, over the factor that their norm was divided by
        for name in fold.linears[:1]:
            scale = (linear(step.block, name).weight / weights[name]).nanmedian(dim=0).values
            error = weights[name] - dequantize(quantized[name]) / scale
            nearest = weights[name] - dequantize(quantize(weights[name], SCHEME))
            assert awq.loss(error, step.stats[name].gram) < awq.loss(nearest, step.stats[name].gram) / 1.5


def heldout() -> list[list[int]]:
    """The demo model's held-out questions with their answers, each as the request and reply that it would be."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sequences = []
    for line in (DEMO / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        sequences.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sequences


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fidelity]:
    original, sequences = load_original(DEMO), heldout()
    found = {}
    for method in ("rtn", "awq"):
        out = tmp_path_factory.mktemp("demo") / method
        quantize_model(DEMO, Recipe(method), out=out)
        found[method] = compare(original, load_dequantized(out), sequences)
    return found


def test_awq_beats_nearest_in_kl_on_the_demo_model(demo: dict[str, Fidelity]) -> None:
    assert 0 < demo["awq"].kl_nats < demo["rtn"].kl_nats


def test_awq_beats_nearest_in_every_block_of_the_demo_model(demo: dict[str, Fidelity]) -> None:
    for awq_db, rtn_db in zip(demo["awq"].sqnr_db, demo["rtn"].sqnr_db, strict=True):
        assert awq_db > rtn_db


def test_a_model_is_faithful_to_itself(tiny: Path) -> None:
    model = load_original(tiny)
    same = compare(model, model, TOKENS)
    assert same.kl_nats == 0 and same.top1_agreement == 1
    assert same.perplexity_original == same.perplexity_quantized
    assert same.positions == sum(map(len, TOKENS))
    assert all(db == float("inf") for db in same.sqnr_db)
