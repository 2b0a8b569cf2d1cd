"""Fidelity: a model walked block by block gives the figures of the whole one, and each layer's are what they say."""

import csv
import dataclasses
import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantize import formats, head
from quantize.blocks import FAMILIES, apply_fold, family_of, linear, tie
from quantize.dequantized import open_dequantized
from quantize.errors import CalibrationError, ModelError, SchemeError
from quantize.fidelity import Fidelity, FidelityReport, compare, load_dequantized, load_original, report, write
from quantize.figure import draw
from quantize.job import quantize_model
from quantize.layerwise import LayerFidelity
from quantize.recipe import Recipe
from quantize.scheme import PER_CHANNEL, Scheme, dequantize, fake_quantize_tokens, quantize
from quantize.unfold import factors
from quantize.walk import Step, walk
from quantize.weights import open_model

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"
LENGTHS = (40, 40, 33, 12, 3, 1)
SEQUENCES = [
    torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(i)).tolist()
    for i, length in enumerate(LENGTHS)
]
W4, W2 = Scheme(4, 32), Scheme(2, 32)
W8 = Scheme(8, PER_CHANNEL, symmetric=True)
W8A8 = dataclasses.replace(W8, activation_bits=8)

SchemeOf = Callable[[str], Scheme | None]


def w4_but_some(module: str) -> Scheme | None:
    """4 bits, and the second block's down_proj, or what stands for it, kept."""
    return None if module.startswith("model.layers.1.mlp.") and module.endswith(("down_proj", "fc2")) else W4


def source(path: Path, family: str, **changes: Any) -> Path:
    """A tiny model whose end has something to get wrong: a norm that is not flat, logits that are not small, a bias."""
    if family == "gemma2":
        changes |= {"final_logit_softcapping": 1.0}
    tiny_model.save(path, family=family, **changes)
    model = open_model(path)
    tensors = model.read(model.files)
    generator = torch.Generator().manual_seed(7)
    final = f"model.{family_of(family).final}.weight"
    tensors[final] = (torch.rand(tensors[final].shape, generator=generator) + 0.5).bfloat16()
    for name in ("lm_head.bias", f"model.{family_of(family).final}.bias"):
        if name in tensors:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).bfloat16()
    output = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    loud = 0.05 if family.startswith("gemma") else 0.2  # theirs is tied, and multiplied by sqrt(hidden) on its way in
    tensors[output] = (torch.randn(tensors[output].shape, generator=generator) * loud).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def checkpoint(
    original: Path, out: Path, scheme_of: SchemeOf, format: str, fold: Callable[[Step], None] | None = None
) -> Path:
    """`original` with its blocks' linear layers rounded to nearest, after `fold` has changed each block."""
    model = open_model(original)
    tensors = model.read(model.files)
    schemes, kept = {}, ["lm_head"]
    for step in walk(model):
        if fold is not None:
            fold(step)
        state = step.block.state_dict()
        tensors |= {f"{step.prefix}{name}": state[name].to(stored) for name, stored in step.stored.items()}
        for name in step.family.linears:
            module, weight = f"{step.prefix}{name}", linear(step.block, name).weight
            if (scheme := scheme_of(module)) is None:
                kept.append(module)
                continue
            schemes[module] = scheme
            del tensors[f"{module}.weight"]
            parts = formats.pack(format, quantize(weight, scheme), scheme)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    words = {"quantization_config": formats.quantization_config(format, schemes, kept)}
    (out / "config.json").write_text(json.dumps(dict(model.config) | words))
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pair(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp(family)
    original = source(where / "original", family)
    return original, checkpoint(original, where / "quantized", w4_but_some, "awq")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("llama") / "original", "llama", tie_word_embeddings=False)


def assert_same(found: Fidelity, expected: Fidelity, rel: float = 2e-4) -> None:
    assert found.positions == expected.positions
    for field in ("kl_nats", "perplexity_original", "perplexity_quantized", "top1_agreement"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=rel), field
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.01)


def test_block_by_block_is_the_whole_model(pair: tuple[Path, Path]) -> None:
    original, quantized = pair
    found = report(original, quantized, SEQUENCES)
    assert_same(found.whole, compare(load_original(original), load_dequantized(quantized), SEQUENCES))
    assert found.whole.kl_nats > 1e-4  # or there would be nothing to get wrong


def test_the_whole_is_what_transformers_finds_in_float64(pair: tuple[Path, Path]) -> None:
    """One sequence at a time, so that no padding is there to be counted."""
    original, quantized = pair
    models = load_original(original).double(), load_dequantized(quantized).double()
    kl, agreed, nll = 0.0, 0, [0.0, 0.0]
    for ids in SEQUENCES:
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for model in models]
        logp, logq = (each.log_softmax(dim=-1) for each in logits)
        kl += float(nn.functional.kl_div(logq, logp, log_target=True, reduction="sum"))
        agreed += int((logp.argmax(dim=-1) == logq.argmax(dim=-1)).sum())
        for i, each in enumerate(logits):
            nll[i] += float(
                nn.functional.cross_entropy(each[:-1], torch.tensor(ids[1:], dtype=torch.long), reduction="sum")
            )
    found, count = report(original, quantized, SEQUENCES).whole, sum(LENGTHS)
    assert found.positions == count
    assert found.kl_nats == pytest.approx(kl / count, rel=1e-3)
    assert found.top1_agreement == agreed / count
    assert found.perplexity_original == pytest.approx(math.exp(nll[0] / (count - len(LENGTHS))), rel=1e-4)
    assert found.perplexity_quantized == pytest.approx(math.exp(nll[1] / (count - len(LENGTHS))), rel=1e-4)


def random_fold(seed: int) -> Callable[[Step], None]:
    """Folds factors between 1/4 and 4 into every site that takes them, and writes them down in `fold.applied`."""
    generator = torch.Generator().manual_seed(seed)
    applied: dict[str, Tensor] = {}

    def fold(step: Step) -> None:
        for site in step.family.sites:
            if site.before is not None:
                width = linear(step.block, site.linears[0]).in_features
                scale = tie(4 ** (2 * torch.rand(width, generator=generator) - 1), site, step.heads)
                stored = step.stored[f"{site.before}.weight"]
                scale = apply_fold(step.block, site, scale, step.heads, step.family.offset, stored)
                applied.update({f"{step.prefix}{name}": scale for name in site.linears})

    fold.applied = applied  # type: ignore[attr-defined]
    return fold


@pytest.mark.parametrize(("scheme", "rounding"), [(Scheme(8, 32), 1e-3), (W4, 0.01), (W2, 0.06)], ids=str)
def test_folds_are_found_again(family: str, scheme: Scheme, rounding: float, tmp_path: Path) -> None:
    """From the norms exactly, from rounded linear layers to far less than a step of their rounding."""
    original, fold = source(tmp_path / "original", family), random_fold(1)
    quantized = open_dequantized(
        checkpoint(original, tmp_path / "folded", lambda _: scheme, "compressed-tensors", fold)
    )
    for before, after in zip(walk(open_model(original), SEQUENCES), walk(quantized, SEQUENCES), strict=True):
        found = factors(before, after)
        for site in before.family.sites:
            for name in site.linears:
                scale = fold.applied.get(f"{before.prefix}{name}")  # type: ignore[attr-defined]
                if scale is None:
                    assert torch.equal(found[name].columns, torch.ones_like(found[name].columns))
                    continue
                exact = not isinstance(before.block.get_submodule(str(site.before)), nn.Linear)
                off = (found[name].columns / scale - 1).square().mean().sqrt()
                assert off < (1e-6 if exact else rounding), name
        before.advance(), after.advance()


@pytest.mark.parametrize("scheme", [W4, W2, Scheme(2, PER_CHANNEL)], ids=str)
def test_rounding_is_not_taken_for_a_fold(family: str, scheme: Scheme, tmp_path: Path) -> None:
    original = source(tmp_path / "original", family)
    quantized = open_dequantized(checkpoint(original, tmp_path / "q", lambda _: scheme, "compressed-tensors"))
    for before, after in zip(walk(open_model(original), SEQUENCES), walk(quantized, SEQUENCES), strict=True):
        for found in factors(before, after).values():
            assert torch.equal(found.columns, torch.ones_like(found.columns))
            assert torch.equal(found.rows, torch.ones_like(found.rows))
        before.advance(), after.advance()


def decibels(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().sum() / noise.double().square().sum()))


def seen_by_linears(model: Any, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The input and the output without bias of every linear layer of a whole model, over all sequences, one by one."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i, layer in enumerate(model.model.layers):
        for name in family_of(family).linears:
            keep = seen.setdefault(f"model.layers.{i}.{name}", [])

            def note(module: Any, x: Any, y: Tensor, keep: Any = keep) -> None:
                keep.append((x[0][0], y[0] if module.bias is None else y[0] - module.bias))

            layer.get_submodule(name).register_forward_hook(note)
    for ids in SEQUENCES:
        model(input_ids=torch.tensor([ids]))
    return {name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for name, pairs in seen.items()}


@pytest.mark.parametrize("folded", [False, True])
def test_each_layers_errors_are_those_of_its_formulas(family: str, folded: bool, tmp_path: Path) -> None:
    original, fold = source(tmp_path / "original", family), random_fold(2)
    quantized = checkpoint(original, tmp_path / "q", lambda _: W4, "awq", fold if folded else None)
    models = load_original(original).double(), load_dequantized(quantized).double()
    before, after = (seen_by_linears(model, family) for model in models)
    floats = {}  # the weights before rounding, by the fold that was really applied
    for step in walk(open_model(original)):
        floats |= {f"{step.prefix}{name}": linear(step.block, name).weight.double() for name in step.family.linears}
    rows = {layer: torch.ones(len(weight), dtype=torch.float64) for layer, weight in floats.items()}
    if folded:
        applied: dict[str, Tensor] = fold.applied  # type: ignore[attr-defined]
        for layer, scale in applied.items():
            floats[layer] = floats[layer] * scale
        config = models[0].config
        for layer, scale in applied.items():
            prefix = ".".join(layer.split(".")[:3])
            site = next(s for s in family_of(family).sites if layer.removeprefix(f"{prefix}.") in s.linears)
            if site.rows is not None:
                kv = config.num_key_value_heads
                r = scale.double()
                if site.rows == "v":
                    r = r.view(kv, -1, scale.numel() // config.num_attention_heads)[:, 0].reshape(-1)
                rows[f"{prefix}.{site.before}"][-len(r) :] = r
        for layer in floats:
            floats[layer] = floats[layer] / rows[layer][:, None]
    found = report(original, quantized, SEQUENCES)
    assert [layer.block for layer in found.layers] == sorted(layer.block for layer in found.layers)
    assert len(found.layers) == len(floats)
    for layer in found.layers:
        name = f"model.layers.{layer.block}.{layer.layer}"
        (_, wanted), (x, got), ideal = before[name], after[name], floats[name]
        rounded = models[1].get_submodule(name).weight
        near = 0.1 if folded else 0.01  # dB; a fold is found to within its rounding
        assert layer.weight_sqnr_db == pytest.approx(decibels(ideal, rounded - ideal), abs=near), name
        assert layer.own_error_db == pytest.approx(-decibels(x @ ideal.T, got - x @ ideal.T), abs=near), name
        assert layer.output_error_db == pytest.approx(-decibels(wanted, got * rows[name] - wanted), abs=near), name


def test_a_kept_layer_has_no_error_of_its_own(llama: Path, tmp_path: Path) -> None:
    quantized = checkpoint(llama, tmp_path / "q", w4_but_some, "awq")
    (kept,) = [layer for layer in report(llama, quantized, SEQUENCES).layers if layer.bits == 16]
    assert (kept.block, kept.layer, kept.scheme, kept.group_size) == (1, "mlp.down_proj", "16 bit", None)
    assert kept.own_error_db == -math.inf and kept.weight_sqnr_db == math.inf
    assert -60 < kept.output_error_db < 0


def test_more_bits_are_less_error(llama: Path, tmp_path: Path) -> None:
    down = "model.layers.1.mlp.down_proj"
    found = []
    for name, scheme in (("low", W2), ("high", Scheme(8, 32))):
        out = checkpoint(llama, tmp_path / name, lambda m, s=scheme: s if m == down else W4, "compressed-tensors")
        found.append({f"{x.block}.{x.layer}": x for x in report(llama, out, SEQUENCES).layers})
    low, high = found
    assert high["1.mlp.down_proj"].own_error_db < low["1.mlp.down_proj"].own_error_db - 30
    for name in low:
        if name != "1.mlp.down_proj":
            assert high[name] == low[name]  # they come before it


# What is read


@pytest.mark.parametrize(
    ("format", "scheme"),
    [("awq", W4), ("gptq", Scheme(4, 32, True)), ("gptq", Scheme(8, 64, True)), ("compressed-tensors", Scheme(3, 32))]
    + [("compressed-tensors", W8A8), ("compressed-tensors", Scheme(4, PER_CHANNEL, True))],
    ids=str,
)
def test_every_layout_comes_back_as_its_rounded_weights(
    format: str, scheme: Scheme, llama: Path, tmp_path: Path
) -> None:
    kept = "model.layers.0.mlp.down_proj"
    made = checkpoint(llama, tmp_path / "q", lambda module: None if module == kept else scheme, format)
    original = open_model(llama)
    restored = load_dequantized(made).state_dict()
    for name, weight in original.read(original.files).items():
        plain = not name.endswith("_proj.weight") or name == f"{kept}.weight"
        assert torch.equal(restored[name], weight.float() if plain else dequantize(quantize(weight, scheme))), name


def test_a_model_that_is_not_quantized_is_no_checkpoint(llama: Path) -> None:
    with pytest.raises(ModelError, match="no quantization_config"):
        load_dequantized(llama)


def test_a_truncated_layer_is_named(llama: Path, tmp_path: Path) -> None:
    made = checkpoint(llama, tmp_path / "q", lambda _: W4, "awq")
    model = open_model(made)
    tensors = model.read(model.files)
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*without qzeros"):
        load_dequantized(made)


def test_another_models_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    other = source(tmp_path / "other", "llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="num_hidden_layers is 3.*Allowed: 2"):
        report(llama, checkpoint(other, tmp_path / "q", lambda _: W4, "awq"), SEQUENCES)


@pytest.mark.parametrize("sequences", [[], [[]], [[3], [4]]])
def test_what_predicts_nothing_is_refused(sequences: list[list[int]], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="two tokens in a row"):
        report(llama, checkpoint(llama, tmp_path / "q", lambda _: W4, "awq"), sequences)


# Activations


@pytest.fixture(scope="module")
def w8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same integers twice: with activations in 16 bits, and in 8."""
    where = tmp_path_factory.mktemp("w8")
    weights = checkpoint(llama, where / "w8", lambda _: W8, "compressed-tensors")
    return weights, checkpoint(llama, where / "w8a8", lambda _: W8A8, "compressed-tensors")


def test_rounded_activations_are_part_of_the_model(llama: Path, w8: tuple[Path, Path]) -> None:
    plain, rounded = (report(llama, path, SEQUENCES) for path in w8)
    assert rounded.whole.kl_nats > 2 * plain.whole.kl_nats
    assert_same(rounded.whole, compare(load_original(llama), load_dequantized(w8[1]), SEQUENCES), rel=2e-3)
    for a, b in zip(plain.layers, rounded.layers, strict=True):
        assert b.weight_sqnr_db == a.weight_sqnr_db and b.own_error_db > a.own_error_db
        assert (a.activation_bits, b.activation_bits, b.scheme) == (16, 8, "W8A8 per channel sym")


def test_w4a4_is_evaluated_without_a_file_of_it(llama: Path, w8: tuple[Path, Path], tmp_path: Path) -> None:
    assert report(llama, w8[0], SEQUENCES, activation_bits=8).whole == report(llama, w8[1], SEQUENCES).whole
    w4 = checkpoint(llama, tmp_path / "q", w4_but_some, "awq")
    found = [report(llama, w4, SEQUENCES, activation_bits=bits) for bits in (None, 8, 4)]
    kl = [each.whole.kl_nats for each in found]
    assert kl[0] < 1.5 * kl[1] < kl[2]
    assert {layer.scheme for layer in found[2].layers} == {"W4A4 g32 asym", "16 bit"}
    with pytest.raises(SchemeError, match="activation bits = 5"):
        report(llama, w4, SEQUENCES, activation_bits=5)


def test_a_loaded_w8a8_model_rounds_what_its_layers_see(w8: tuple[Path, Path]) -> None:
    layer = load_dequantized(w8[1]).model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer(x), fake_quantize_tokens(x, 8) @ layer.weight.T)


# Memory


def test_one_block_of_each_is_held(tmp_path: Path) -> None:
    """Of six blocks, and of a vocabulary of which a slice is enough."""
    original = source(tmp_path / "original", "llama", num_hidden_layers=6, vocab_size=2048)
    made = checkpoint(original, tmp_path / "q", lambda _: W4, "awq")
    step = next(walk(open_model(original)))
    block = sum(p.numel() for p in step.block.parameters())
    del step
    held: list[int] = []

    def count(_: int, __: int) -> None:
        gc.collect()
        live = {
            p.data_ptr(): p.numel() for p in gc.get_objects() if type(p) is nn.Parameter and p.device.type != "meta"
        }
        held.append(sum(live.values()))

    gc.collect()
    already = sum(p.numel() for p in gc.get_objects() if type(p) is nn.Parameter and p.device.type != "meta")
    report(original, made, SEQUENCES, progress=count)
    assert len(held) == 6
    assert max(held) - already <= 2.1 * block


def test_a_slice_of_the_vocabulary_at_a_time(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = report(*pair, SEQUENCES).whole
    heights = []
    rows = head.Head.rows

    def watch(self: head.Head, start: int, end: int) -> Tensor:
        heights.append(end - start)
        return rows(self, start, end)

    monkeypatch.setattr(head, "_ROWS", 50)
    monkeypatch.setattr(head, "_TOKENS", 7)
    monkeypatch.setattr(head.Head, "rows", watch)
    assert_same(report(*pair, SEQUENCES).whole, whole, rel=1e-5)
    assert sum(heights) == 2 * tiny_model.VOCABULARY and max(heights) == 50


def test_what_lies_on_disk_is_the_same(llama: Path, tmp_path: Path) -> None:
    made = checkpoint(llama, tmp_path / "q", lambda _: W4, "awq")
    assert report(llama, made, SEQUENCES, memory=0) == report(llama, made, SEQUENCES)


# Files


@pytest.fixture(scope="module")
def written(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FidelityReport, Path]]:
    where = tmp_path_factory.mktemp("written")
    found = report(llama, checkpoint(llama, where / "q", w4_but_some, "awq"), SEQUENCES)
    write(found, where / "new" / "report")
    yield found, where / "new" / "report"


def test_the_table_has_a_row_for_each_layer(written: tuple[FidelityReport, Path]) -> None:
    found, where = written
    with (where / "fidelity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(LayerFidelity)]
    assert len(rows) == 14
    for row, layer in zip(rows, found.layers, strict=True):
        assert (row["block"], row["layer"], row["bits"]) == (str(layer.block), layer.layer, str(layer.bits))
        if layer.bits == 16:
            assert row["own_error_db"] == row["weight_sqnr_db"] == row["group_size"] == ""
        else:
            assert float(row["own_error_db"]) == pytest.approx(layer.own_error_db, rel=1e-4)


def test_the_summary_is_json_that_others_read(written: tuple[FidelityReport, Path]) -> None:
    found, where = written

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (where / "fidelity.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    assert summary["kl_nats"] == found.whole.kl_nats
    assert summary["mean_bits"] == pytest.approx(4 + 12 * 32768 / sum(x.weights for x in found.layers), abs=1e-3)
    worst = max(found.layers, key=lambda layer: layer.own_error_db)
    assert summary["largest_own_errors"][0]["layer"] == worst.layer
    assert str(where.parent) not in text


@pytest.mark.parametrize("blocks", [1, 80])
def test_the_figure_is_drawn_whatever_is_in_it(blocks: int, tmp_path: Path) -> None:
    """Layers without error, a single block, all figures alike."""
    kept = LayerFidelity(0, "self_attn.o_proj", "16 bit", 16, None, 16, 4, math.inf, -math.inf, -math.inf)
    layer = LayerFidelity(0, "mlp.up_proj", "W4A16 g32 asym", 4, 32, 16, 4, 20.0, -20.0, -19.0)
    layers = [dataclasses.replace(each, block=i) for i in range(blocks) for each in (kept, layer)]
    whole = Fidelity(100, 0.0, 3.0, 3.0, 1.0, (math.inf,) * blocks)
    for name, some in (("mixed", layers), ("kept", layers[::2])):
        draw(FidelityReport("a", "b", whole, tuple(some)), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# The demo model


@pytest.fixture(scope="module")
def heldout() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rows = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()[:40]]
    return [tokenizer(row["prompt"] + row["answer"])["input_ids"] for row in rows]


def test_on_the_demo_model_both_ways_agree(heldout: list[list[int]], tmp_path: Path) -> None:
    made = checkpoint(DEMO, tmp_path / "q", lambda _: Scheme(4, 128), "awq")
    found = report(DEMO, made, heldout).whole
    assert_same(found, compare(load_original(DEMO), load_dequantized(made), heldout))
    assert 0.001 < found.kl_nats < 1


@pytest.mark.parametrize(("method", "scheme"), [("awq", Scheme()), ("awq+gptq", W2), ("gptq", W2)])
def test_the_quantizer_noted_the_same_weight_errors(
    method: str, scheme: Scheme, heldout: list[list[int]], tmp_path: Path
) -> None:
    """It had the folded weights before it rounded them; the report has to find the folds again."""
    quantize_model(DEMO, Recipe(method, scheme, samples=32, length=256), out=tmp_path / "q")
    noted = {layer["name"]: layer for layer in json.loads((tmp_path / "q" / "quantize.json").read_text())["layers"]}
    near = 0.01 if method == "gptq" else 0.5
    for layer in report(DEMO, tmp_path / "q", heldout).layers:
        expected = noted[f"model.layers.{layer.block}.{layer.layer}"]["weight_sqnr_db"]
        assert layer.weight_sqnr_db == pytest.approx(expected, abs=near), layer


def test_a_model_is_no_distance_from_itself() -> None:
    """In torch nothing comes between: KL below 1e-6, every likeliest token the same."""
    original = load_original(DEMO)
    found = compare(original, original, SEQUENCES)
    assert 0 <= found.kl_nats < 1e-6
    assert found.top1_agreement == 1
    assert found.perplexity_original == found.perplexity_quantized
