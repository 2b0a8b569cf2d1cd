"""AWQ: folds that change nothing, a loss that is what it says, and less error than rounding to nearest."""

import json
from pathlib import Path

import pytest
import tiny_model
import torch
from torch import Tensor
from transformers import AutoTokenizer

from quantize import awq
from quantize.blocks import FAMILIES, Heads, Site, linear
from quantize.fidelity import Fidelity, compare, load_dequantized, load_original
from quantize.job import quantize_model
from quantize.methods import METHODS, quantize_block
from quantize.recipe import Recipe, default_scheme
from quantize.scheme import Scheme, dequantize, diagonal_blocks, least_error, loss, quantize, search
from quantize.walk import InputStats, Step, forward, hidden, walk
from quantize.weights import open_model

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"
SCHEME = Scheme(4, 64)
MLP = Site(("mlp.down_proj",), "mlp.up_proj", "up")
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
    return InputStats(x.T @ x / len(x), x.abs().amax(dim=0))


def test_the_trace_is_the_error_of_the_output() -> None:
    x, difference = inputs(loud=(3,)), torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    explicit = ((x.double() @ difference.double().T) ** 2).sum() / len(x)
    assert loss(difference, stats_of(x).gram) == pytest.approx(float(explicit), rel=1e-5)


def test_loud_channels_are_found_and_saved() -> None:
    """The planted outliers, 40 times louder: scaling takes off at least three quarters of the error of nearest."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    seen = stats_of(inputs(loud=(5, 77)))
    scale = awq.best_scale([(weight, Scheme())], seen, MLP, Heads(1, 1, 1))
    assert set(scale.topk(2).indices.tolist()) == {5, 77}
    nearest = loss(weight - dequantize(quantize(weight, Scheme())), seen.gram)
    _, found = search(weight * scale, Scheme(), seen.scaled(scale).gram)
    assert found < nearest / 4


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_is_worse_than_nearest_by_its_own_loss(seed: int) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) ** 3
    seen = stats_of(inputs())
    nearest = loss(weight - dequantize(quantize(weight, SCHEME)), seen.gram)
    quantized, clipped = search(weight, SCHEME, seen.gram)
    assert clipped <= nearest
    assert loss(weight - dequantize(quantized), seen.gram) == pytest.approx(clipped)


def test_the_loss_that_ranks_the_scales_is_near_the_one_that_is_left() -> None:
    """With one group there is nothing to leave out; with four, the groups' shares in each other's errors."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    for group_size, near in ((128, 1e-5), (32, 0.2)):
        scheme, gram = Scheme(group_size=group_size), stats_of(inputs()).gram
        quick = least_error(weight, scheme, diagonal_blocks(gram, 128 // group_size))
        assert quick == pytest.approx(search(weight, scheme, gram)[1], rel=near)


def statistics_of(path: Path) -> dict[Site, InputStats]:
    """What each site of the first block sees with nothing quantized."""
    found: dict[Site, InputStats] = {}
    first(path).advance(found.__setitem__)
    return found


def outputs_of_block(step: Step) -> Tensor:
    """The block's outputs on the calibration set as it is now, at the real places."""
    assert step.flow is not None
    return torch.cat([forward(step, hidden(step, b), b)[real] for b, real in enumerate(step.flow.real)])


def error_of_block(path: Path, method: str) -> float:
    """||h - h_quantized||^2 / ||h||^2 of the first block's outputs, with everything before it exact."""
    step = first(path)
    before = outputs_of_block(step)
    given = {name: hidden for name in step.flow.store.names() if (hidden := step.flow.store.get(name)) is not None}
    quantize_block(step, METHODS[method], "minmax", lambda _: SCHEME)
    for name, hidden in given.items():
        step.flow.store.put(name, hidden)
    return float(((outputs_of_block(step) - before) ** 2).sum() / (before**2).sum())


def test_on_a_block_with_planted_outliers_awq_cuts_the_error_to_a_third(tiny: Path) -> None:
    """Four channels of each norm are twenty times louder than the rest (`tools/tiny_model.py`).

    Where no fold reaches it is less: Phi's fc2 has none, and the norms behind each half of Gemma 2 and 3 weigh the
    errors anew (2.99 and 2.62 times).
    """
    least = {"phi": 2.5, "gemma2": 2.5, "gemma3_text": 2.5}.get(tiny.name, 3)
    assert error_of_block(tiny, "awq") <= error_of_block(tiny, "rtn") / least


def test_gptq_after_awq_is_better_than_either(tiny: Path) -> None:
    both = error_of_block(tiny, "awq+gptq")
    assert both < error_of_block(tiny, "awq")
    assert both < error_of_block(tiny, "gptq")


def test_the_loss_that_a_layer_reports_is_that_of_its_outputs(tiny: Path) -> None:
    step = first(tiny)
    site = step.family.stages[0].inputs
    seen = statistics_of(path=tiny)[site]
    weights = {name: linear(step.block, name).weight.clone() for name in site.linears}
    _, layers = quantize_block(step, METHODS["gptq"], "minmax", lambda _: SCHEME)
    for layer, name in zip(layers, site.linears, strict=False):
        difference = weights[name] - linear(step.block, name).weight
        ratio = loss(weights[name], seen.gram) / loss(difference, seen.gram)
        assert layer.name == step.prefix + name
        assert layer.output_sqnr_db == pytest.approx(10 * torch.log10(torch.tensor(ratio)).item(), abs=1e-3)
        assert layer.damping == 0.003


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
    for method in ("rtn", "awq", "gptq", "awq+gptq"):
        out = tmp_path_factory.mktemp("demo") / method
        quantize_model(DEMO, Recipe(method, default_scheme(method, symmetric=False)), out=out)
        found[method] = compare(original, load_dequantized(out), sequences)
    return found


def test_awq_beats_nearest_in_kl_on_the_demo_model_by_far(demo: dict[str, Fidelity]) -> None:
    assert 0 < demo["awq"].kl_nats < 0.85 * demo["rtn"].kl_nats


def test_gptq_after_awq_keeps_more_tokens_than_either(demo: dict[str, Fidelity]) -> None:
    """By top-1 agreement: with so little text a few positions decide the KL of models that are this close."""
    assert demo["awq+gptq"].top1_agreement > max(demo["awq"].top1_agreement, demo["gptq"].top1_agreement)


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
