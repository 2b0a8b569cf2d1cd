"""A quantized output head: when it is asked for, who can hold it, its integers, and that everyone reads it so."""

import json
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_model
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from harness import models
from harness.architecture import architecture
from harness.engines.environment import EngineEnv
from quantize import dequantized, formats, gptq, head, rtn
from quantize.__main__ import main
from quantize.blocks import FAMILIES, family_of
from quantize.checkpoint import Draft
from quantize.dequantized import open_dequantized
from quantize.errors import SchemeError
from quantize.estimate import Rates, estimate
from quantize.fidelity import compare, load_dequantized, load_original, report
from quantize.formats import HEAD
from quantize.inspection import inspect, show
from quantize.job import BlockDone, prepare, quantize_config, quantize_model
from quantize.layout import parse
from quantize.methods import METHODS
from quantize.recipe import W8A8, Recipe, default_scheme, parse_exception
from quantize.scheme import PER_CHANNEL, Quantized, Scheme, dequantize, loss, quantize, search
from quantize.weights import open_model
from tests.test_served_matrix import ENGINE, MARGIN_NAT, PROMPTS, TOLERANCE_NAT, in_engine

SYMMETRIC, ASYMMETRIC = Scheme(symmetric=True), Scheme()
ROWS = 320
"""Of most heads here: five times vLLM's padding."""
LLAMA = FAMILIES["llama"]
SEQUENCES = [
    torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (64, 64, 51, 40, 33, 20, 7) * 4
]
TOKENS = SEQUENCES[:7]
RATES = Rates(matmul=1e11, shrink_s=1e-9, column_s=1e-5, column_weight_s=1e-9, hash=1e9)


def recipe(method: str, *keep: str, format: str | None = None, **scheme: Any) -> Recipe:
    plain = default_scheme(method, **scheme)
    exceptions = tuple(parse_exception(text, plain) for text in keep)
    return Recipe(method, plain, exceptions, format=format, samples=24, length=64)


def source(path: Path, family: str = "llama", rows: int = ROWS, spread: float = 0.1) -> Path:
    """A model with a head of its own, whose inputs have a few loud channels, as trained ones have."""
    tiny_model.save(path, family=family, vocab_size=rows, tie_word_embeddings=False)
    model = open_model(path)
    tensors = model.read(model.files)
    generator = torch.Generator().manual_seed(7)
    norm = f"model.{family_of(family).final}.weight"
    tensors[norm] = (torch.rand(tensors[norm].shape, generator=generator) + 0.5).bfloat16()
    tensors[norm][::16] *= 4
    tensors[f"{HEAD}.weight"] = (torch.randn(rows, 128, generator=generator) * spread).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "calibration.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in SEQUENCES))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary is no multiple of anything."""
    return source(tmp_path_factory.mktemp("models") / "odd", rows=257)


def integers(path: Path) -> Quantized:
    """Those of the head in a checkpoint."""
    made = open_dequantized(path)
    scheme, kinds = made.modules[HEAD]
    stored = made.packed.read(f"{HEAD}.{kind}" for kind in kinds)
    return formats.unpack({kind: stored[f"{HEAD}.{kind}"] for kind in kinds}, made.format, scheme)


# When it is asked for


@pytest.mark.parametrize(
    ("keep", "bits"),
    [
        ((), None),
        ((".*=8bit",), None),
        ((r"\w+=8bit",), None),
        (("lm_head=4bit",), 4),
        (("lm_head|down_proj=8bit",), 8),
        (("lm_head=8bit", ".*=3bit"), 8),
        (("lm_head=8bit", "lm_head=3bit"), 3),
        (("lm_head=8bit", "^lm_head$=16bit"), None),
        (("^(?!lm_head)=8bit",), None),
    ],
)
def test_only_who_says_lm_head_means_it(keep: tuple[str, ...], bits: int | None) -> None:
    plan = recipe("rtn", *keep).plan(LLAMA, 2)
    assert len(plan) - (bits is not None) == 14
    assert (scheme.bits if (scheme := plan.get(HEAD)) else None) == bits


def test_its_group_size_can_be_its_own() -> None:
    assert recipe("gptq", "lm_head=4bit-g32").plan(LLAMA, 1)[HEAD] == Scheme(4, 32, symmetric=True)


def test_a_name_that_is_none_is_still_a_mistake() -> None:
    with pytest.raises(SchemeError, match="lm_haed.*or lm_head.*embeddings and norms are kept"):
        recipe("rtn", "lm_haed=4bit").plan(LLAMA, 2)


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--config-only"], ["--target-gib", "1"]], ids=str)
@pytest.mark.parametrize("shape", [True, False])
def test_a_tied_head_is_refused(
    options: list[str], shape: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_model.save(tmp_path / "tied")
    if shape and options not in (["--dry-run"], ["--config-only"]):
        pytest.skip("weights are needed")
    if shape:
        (path / "model.safetensors").unlink()
    arguments = [str(path), "--method", "rtn", "--keep", "lm_head=4bit", "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    assert "embedding matrix here (tie_word_embeddings)" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["tied"]


def test_left_in_16_bits_on_request_it_is_what_it_was(model: Path, tmp_path: Path) -> None:
    made = quantize_model(model, recipe("rtn", "lm_head=16bit"), out=tmp_path / "out").path
    weight = open_model(model).read([f"{HEAD}.weight"])[f"{HEAD}.weight"]
    assert torch.equal(open_model(made).read([f"{HEAD}.weight"])[f"{HEAD}.weight"], weight)


# Who can hold it


def everywhere(scheme: Scheme, head_as: Scheme) -> dict[str, Scheme]:
    return {f"model.layers.{i}.{name}": scheme for i in range(2) for name in LLAMA.linears} | {HEAD: head_as}


@pytest.mark.parametrize(
    ("format", "body", "head_as", "rows", "says"),
    [
        ("awq", ASYMMETRIC, Scheme(4, 32), ROWS, "several schemes at once.*reads from awq; compressed-tensors can"),
        ("awq", SYMMETRIC, Scheme(4, 32, True), ROWS, "several schemes.*; gptq and compressed-tensors can"),
        ("gptq", SYMMETRIC, Scheme(3, 128, True), ROWS, "4 or 8 bits symmetric.*; compressed-tensors can"),
        ("gptq", SYMMETRIC, ASYMMETRIC, ROWS, "4 or 8 bits symmetric.*; compressed-tensors can"),
        ("awq", ASYMMETRIC, ASYMMETRIC, 264, "264 x 128, and its rows.*multiple of 64.*; compressed-tensors can"),
        ("gptq", SYMMETRIC, SYMMETRIC, 264, "264 x 128, and its rows.*multiple of 64.*; compressed-tensors can"),
        ("compressed-tensors", SYMMETRIC, ASYMMETRIC, 257, "zero points of 4 bits.*end within a word.*no format"),
        ("compressed-tensors", SYMMETRIC, Scheme(3), 264, "zero points of 3 bits.*end within a word.*no format"),
    ],
)
def test_what_vllm_does_not_read_is_refused(format: str, body: Scheme, head_as: Scheme, rows: int, says: str) -> None:
    schemes = everywhere(body, head_as)
    shapes = dict.fromkeys(schemes, (128, 128)) | {HEAD: (rows, 128)}
    with pytest.raises(SchemeError, match=says):
        formats.check(format, schemes, (), shapes)


def test_a_checkpoint_that_cannot_be_served_is_not_begun(odd: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: quantize_model(odd, recipe("rtn", "lm_head=4bit"), out=tmp_path / "out"),
        lambda: quantize_config(odd, recipe("rtn", "lm_head=4bit"), out=tmp_path / "out"),
    ):
        with pytest.raises(SchemeError, match="257 x 128"):
            attempt()
    assert not any(tmp_path.iterdir())


HELD = [
    ("awq", ASYMMETRIC, ASYMMETRIC),
    ("awq", SYMMETRIC, SYMMETRIC),
    ("gptq", SYMMETRIC, SYMMETRIC),
    ("gptq", SYMMETRIC, Scheme(8, 32, symmetric=True)),
    ("compressed-tensors", ASYMMETRIC, ASYMMETRIC),
    ("compressed-tensors", ASYMMETRIC, Scheme(8, 32, symmetric=True)),
    ("compressed-tensors", SYMMETRIC, Scheme(3, PER_CHANNEL)),
    ("compressed-tensors", W8A8, W8A8),
    ("compressed-tensors", ASYMMETRIC, W8A8),
]


@pytest.mark.parametrize(("format", "body", "head_as"), HELD, ids=str)
@pytest.mark.parametrize("kept", [(), ("model.layers.1.mlp.down_proj",)], ids=str)
def test_what_is_written_of_it_is_read(format: str, body: Scheme, head_as: Scheme, kept: tuple[str, ...]) -> None:
    schemes = {name: scheme for name, scheme in everywhere(body, head_as).items() if name not in kept}
    config = formats.quantization_config(format, schemes, kept)
    layout = parse(config)
    assert {name: layout.scheme_of(name) for name in everywhere(body, head_as)} == {
        name: replace(scheme, symmetric=False) if format == "awq" else scheme for name, scheme in schemes.items()
    } | dict.fromkeys(kept)
    # What vLLM looks at: a field, or a target that is the module's own name, for its head is no Linear.
    groups = config.get("config_groups", {}).values()
    assert config.get("lm_head") or any(HEAD in group["targets"] for group in groups)
    without = {name: scheme for name, scheme in schemes.items() if name != HEAD}
    assert parse(formats.quantization_config(format, without, [*kept, HEAD])).scheme_of(HEAD) is None


def test_vllm_s_cpu_build_takes_a_vocabulary_that_it_pads() -> None:
    schemes = everywhere(SYMMETRIC, SYMMETRIC)
    shapes = dict.fromkeys(schemes, (128, 128)) | {HEAD: (257, 128)}
    assert formats.cpu_objection(schemes, shapes) is None
    assert "257 x 120" in str(formats.cpu_objection(schemes, shapes | {HEAD: (257, 120)}))
    assert "W8A16" in str(formats.cpu_objection(schemes | {HEAD: Scheme(8, symmetric=True)}, shapes))


# Its integers


def seen(path: Path) -> Tensor:
    """What the head of a checkpoint sees on the calibration set, by transformers' own forward: [tokens, in].

    Activations are not rounded, for no method looks at rounded ones.
    """
    built, found = load_dequantized(path), []
    for module in built.modules():
        module._forward_pre_hooks.clear()
    built.lm_head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    for ids in SEQUENCES:
        built(input_ids=torch.tensor([ids]))
    return torch.cat(found)


def reference(weight: Tensor, scheme: Scheme, x: Tensor, rounding: str) -> Quantized:
    """`weight` [out, in] rounded with the Gram matrix of `x` [tokens, in]."""
    gram = (x.double().T @ x.double() / len(x)).float()
    if rounding == "awq":
        return search(weight, scheme, gram)[0]
    if rounding == "gptq":
        grid = rtn.find_grid(weight, scheme, "mse", gram)
        return Quantized(gptq.round_columns(weight, gptq.factor(gram), scheme, grid), *grid)
    return quantize(weight, scheme)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_rounded_by_what_it_sees(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_ROWS", 96)  # four slices, the last of 32
    keep = "lm_head=8bit" if method.startswith("smooth") else "lm_head=4bit-g64"
    chosen = recipe(method, keep, group_size=None if method.startswith("smooth") else 64)
    made = quantize_model(model, chosen, out=tmp_path / "out").path
    drawn = prepare(model, chosen).samples
    assert drawn is None or sorted(drawn.sequences) == sorted(map(tuple, SEQUENCES))  # all of them, of many lengths

    weight = load_original(model).lm_head.weight
    scheme, x = chosen.scheme_of(HEAD), seen(made)
    assert scheme is not None and len(x) == sum(map(len, SEQUENCES))
    parts = [reference(part, scheme, x, METHODS[method].rounding) for part in torch.split(weight, 96)]
    expected = Quantized(*(torch.cat(each) for each in zip(*parts, strict=True)))
    found = integers(made)
    # Two computations of one Gram matrix differ in its last bits, which decide a rounding here and there; and where
    # scales were divided by a fold, the walk goes on with what they were before they were rounded again.
    same = [float((a == b).float().mean()) for a, b in zip(found, expected, strict=True)]
    least = 1 if METHODS[method].rounding == "rtn" else 0.9 if METHODS[method].fold == "awq" else 0.99
    assert min(same) >= least, same
    assert torch.equal(load_dequantized(made).lm_head.weight, dequantize(found))

    layers = json.loads((made / "quantize.json").read_text())["layers"]
    fate = {layer["name"]: layer for layer in layers}[HEAD]
    assert len(layers) == 15 and fate["scheme"] == str(scheme)
    lost = weight - dequantize(found)
    assert fate["weight_sqnr_db"] == pytest.approx(float(10 * torch.log10(loss(weight) / torch.tensor(loss(lost)))))
    if METHODS[method].calibrated:
        ratio = (x @ weight.T).double().square().sum() / (x @ lost.T).double().square().sum()
        assert fate["output_sqnr_db"] == pytest.approx(float(10 * torch.log10(ratio)), abs=5e-3)
    else:
        assert fate["output_sqnr_db"] is None


def test_gptq_and_awq_leave_less_of_its_error_than_rounding_to_nearest(model: Path, tmp_path: Path) -> None:
    found = {}
    for method in ("rtn", "awq", "gptq"):
        chosen = recipe(method, "layers=16bit", "lm_head=4bit", bits=4, symmetric=True, format="gptq")
        made = quantize_model(model, chosen, out=tmp_path / method).path
        found[method] = compare(load_original(model), load_dequantized(made), TOKENS).kl_nats
    assert found["gptq"] < found["awq"] < found["rtn"]


@pytest.mark.parametrize(("format", "body", "head_as"), HELD, ids=str)
def test_packed_in_slices_it_is_packed(format: str, body: Scheme, head_as: Scheme) -> None:
    whole = quantize(torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(0)), head_as)
    slices = [Quantized(*(each[start:end] for each in whole)) for start, end in pairwise((0, 128, 160, 256, ROWS))]
    packed, expected = formats.pack_slices(format, slices, head_as), formats.pack(format, whole, head_as)
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in expected)


# A run that stops


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("place", ["after the last block", "after the last shard"])
def test_stopped_before_the_end_it_goes_on_and_ends_in_the_same_bytes(
    method: str, budget: int, place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(method, "lm_head=4bit")

    def stop(block: BlockDone) -> None:
        if block.done == block.total and place == "after the last block":
            raise KeyboardInterrupt

    def finish(_: Draft) -> None:
        raise KeyboardInterrupt

    straight = quantize_model(model, chosen, out=tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "after the last shard":
            patch.setattr(Draft, "finish", finish)
        quantize_model(model, chosen, out=tmp_path / "out", progress=stop, budget=budget)
    draft = tmp_path / ".out.unfinished"
    assert json.loads((draft / ".progress.json").read_text())["done"] == 2
    again: list[BlockDone] = []
    resumed = quantize_model(model, chosen, out=tmp_path / "out", progress=again.append, budget=budget)
    assert not again and resumed.checkpoint_sha256 == straight.checkpoint_sha256
    fates = [json.loads((tmp_path / name / "quantize.json").read_text())["layers"] for name in ("out", "straight")]
    assert fates[0] == fates[1] and fates[0][-1]["name"] == HEAD
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "straight"]
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


# Who reads it


class Made(NamedTuple):
    path: Path
    recipe: Recipe


KINDS = {
    "awq": recipe("awq", "lm_head=4bit", format="awq"),
    "gptq": recipe("rtn", "lm_head=4bit-g32", format="gptq", bits=8),
    "packed": recipe("rtn", "lm_head=3bit-g64", bits=4),
    "channels": recipe("rtn", "lm_head=4bit", format="compressed-tensors", bits=4, group_size=-1),
    "W8A8": recipe("smoothquant", "lm_head=8bit"),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    chosen = KINDS[request.param]
    return Made(quantize_model(model, chosen, out=tmp_path_factory.mktemp("made") / "out").path, chosen)


def test_fidelity_has_the_head_s_error_in_it(made: Made, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_ROWS", 50)
    dense = load_dequantized(made.path)
    expected = compare(load_original(model), dense, TOKENS)
    found = report(model, made.path, TOKENS).whole
    assert found.kl_nats == pytest.approx(expected.kl_nats, rel=2e-3)
    assert found.perplexity_quantized == pytest.approx(expected.perplexity_quantized, rel=1e-4)
    assert found.top1_agreement == expected.top1_agreement
    with torch.no_grad():
        dense.lm_head.weight.copy_(load_original(model).lm_head.weight)
    assert abs(compare(load_original(model), dense, TOKENS).kl_nats / found.kl_nats - 1) > 0.02


def test_activations_that_fidelity_rounds_are_the_head_s_too(model: Path, tmp_path: Path) -> None:
    path = quantize_model(model, recipe("rtn", "layers=16bit", "lm_head=8bit"), out=tmp_path / "out").path
    plain, rounded = (report(model, path, TOKENS, activation_bits=bits).whole.kl_nats for bits in (None, 4))
    dense = load_dequantized(path)
    dense.lm_head.register_forward_pre_hook(lambda _, x: (head.fake_quantize_tokens(x[0], 4),))
    assert rounded == pytest.approx(compare(load_original(model), dense, TOKENS).kl_nats, rel=2e-3)
    assert rounded > 5 * plain


def test_some_of_its_rows_are_read_without_the_others(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, heights = open_dequantized(made.path), []
    whole = opened.read([f"{HEAD}.weight"])[f"{HEAD}.weight"]
    unpack = formats.unpack

    def watch(parts: Mapping[str, Tensor], format: str, scheme: Scheme) -> Quantized:
        found = unpack(parts, format, scheme)
        heights.append(len(found.q))
        return found

    monkeypatch.setattr(dequantized, "unpack", watch)
    for wanted in ([0], [31, 32], [100, 97, 70], list(range(250, ROWS)), [ROWS - 1]):
        assert torch.equal(opened.rows(f"{HEAD}.weight", torch.tensor(wanted)), whole[wanted])
    assert heights == [32, 64, 64, 96, 32]


def test_rows_of_a_vocabulary_that_ends_within_a_word(odd: Path, tmp_path: Path) -> None:
    path = quantize_model(odd, recipe("gptq", "lm_head=3bit"), out=tmp_path / "out").path
    opened = open_dequantized(path)
    whole = opened.read([f"{HEAD}.weight"])[f"{HEAD}.weight"]
    assert torch.equal(opened.rows(f"{HEAD}.weight", torch.tensor([256, 224])), whole[[256, 224]])


def test_inspect_shows_it(made: Made) -> None:
    found = inspect(made.path)
    assert not found.findings
    layer = {layer.name: layer for layer in found.layers}[HEAD]
    assert (layer.outputs, layer.inputs, layer.scheme) == (ROWS, 128, made.recipe.scheme_of(HEAD))
    assert "output head" not in {kept.what for kept in found.kept}
    show(found, Console(file=(shown := StringIO()), width=120))
    assert f"\n{HEAD}" in shown.getvalue()


def test_a_head_of_integers_that_config_json_does_not_name_is_a_fault(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.mkdir()
    for file in made.path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    body = {name: made.recipe.scheme for name in everywhere(ASYMMETRIC, ASYMMETRIC) if name != HEAD}
    format = config["quantization_config"]["quant_method"]
    config["quantization_config"] = formats.quantization_config(format, body, [HEAD])
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize.json").unlink()
    (fault,) = inspect(path).faults
    assert "stored as integers" in fault.text and fault.where == (HEAD,)


def test_the_sizes_before_are_those_after(made: Made, model: Path) -> None:
    request = prepare(model, made.recipe)
    sizes = estimate(request.source, request.plan, made.recipe.method, 0, rates=RATES, format=request.format)
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    written = index["metadata"]["total_size"]
    assert sizes.after.stored_bytes == sizes.after.card_bytes == written
    by_shape = estimate(request.source.config, request.plan, "rtn", 0, rates=RATES, format=request.format)
    assert by_shape.after == sizes.after
    # The sweep's own figures: of the files, and of config.json, which leaves small parts out.
    assert models.weight_bytes(models.resolve(str(made.path))) == written
    shape = architecture(json.loads((made.path / "config.json").read_text()))
    assert shape is not None and shape.weight_bytes == pytest.approx(
        written, rel=0 if request.format == "awq" else 0.05
    )
    kept = architecture(
        dict(request.source.config) | {"quantization_config": without_head(request.plan, request.format)}
    )
    assert kept is not None and kept.head is None
    scheme = made.recipe.scheme_of(HEAD)
    assert scheme and shape.head and (shape.head.bits, shape.head.group_size) == (scheme.bits, scheme.group_size)
    assert kept.weight_bytes - shape.weight_bytes > 0.45 * 2 * ROWS * 128


def without_head(plan: Mapping[str, Scheme | None], format: str) -> dict[str, Any]:
    schemes = {name: scheme for name, scheme in plan.items() if scheme and name != HEAD}
    return formats.quantization_config(format, schemes, [HEAD])


def test_a_dry_run_counts_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--method", "rtn", "--keep", "lm_head=8bit", "--dry-run"]) == 0
    assert "W4A16 g128 asym + W8A16 g128 sym" in capsys.readouterr().out


def test_config_json_alone_says_what_the_checkpoint_s_does(made: Made, model: Path, tmp_path: Path) -> None:
    path = quantize_config(model, made.recipe, out=tmp_path / "shape").path
    configs = [json.loads((each / "config.json").read_text()) for each in (path, made.path)]
    assert configs[0] == configs[1]


def test_the_model_card_says_where_it_is(model: Path, tmp_path: Path) -> None:
    quantize_model(model, recipe("rtn", "lm_head=8bit"), out=tmp_path / "with")
    quantize_model(model, recipe("rtn", "down_proj=16bit"), out=tmp_path / "without")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("with", "without")]
    assert "W4A16 g128 asym: 14 layers; W8A16 g128 sym: 1 layers with lm_head" in cards[0]
    assert "| embeddings, norms and 0 linear layers |" in cards[0]
    assert "| embeddings, norms, lm_head and 2 linear layers |" in cards[1] and "with lm_head" not in cards[1]


# Served


class Case(NamedTuple):
    recipe: Recipe
    family: str = "llama"
    rows: int = ROWS

    @property
    def name(self) -> str:
        head_as, chosen = self.recipe.scheme_of(HEAD), self.recipe
        return (
            f"{chosen.method} as {chosen.format} {chosen.scheme}, lm_head {head_as}, {self.rows} rows of {self.family}"
        )


def case(method: str, keep: str, format: str, *more: Any, **scheme: Any) -> Case:
    return Case(recipe(method, keep, format=format, **scheme), *more)


SERVED = [
    case("awq", "lm_head=4bit", "awq"),
    case("awq", "lm_head=4bit", "awq", "phi"),  # whose head has a bias
    case("gptq", "lm_head=4bit", "gptq"),
    case("gptq", "lm_head=4bit-g32", "gptq"),
    case("gptq", "lm_head=4bit", "compressed-tensors", "llama", 257),
    case("awq+gptq", "lm_head=4bit-g32", "compressed-tensors", "qwen2"),
    case("smoothquant", "lm_head=8bit", "compressed-tensors", "llama", 257),
]
NOT_READ = [  # by any build: the loader is the same
    case("rtn", "lm_head=4bit", "awq", "llama", 264, bits=4),
    case("rtn", "lm_head=4bit", "gptq", "llama", 264, symmetric=True),
    case("rtn", "lm_head=4bit", "compressed-tensors", "llama", 257),
]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_serves_what_torch_computes(
    engine_env: EngineEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine_env.kind != "cpu":
        pytest.skip("what the CPU build accepts is asked of the CPU build")
    loads = []
    for number, each in enumerate([*SERVED, *NOT_READ]):
        original = tmp_path / f"{each.family}-{each.rows}"
        if not original.exists():
            source(original, each.family, each.rows, spread=0.02)
        with monkeypatch.context() as patch:
            if each in NOT_READ:
                with pytest.raises(SchemeError, match=f"{each.rows} x 128"):
                    prepare(original, each.recipe)
                patch.setattr(formats, "check", lambda *_: None)
            path = quantize_model(original, each.recipe, out=tmp_path / f"checkpoint-{number}").path
        loads.append((each.name, str(path), "bfloat16"))
    (tmp_path / "job.json").write_text(json.dumps({"loads": loads, "prompts": PROMPTS}))
    in_engine(engine_env, ENGINE, tmp_path / "job.json", tmp_path / "answers.jsonl", timeout_s=500)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for each, (_, path, _), answer in zip(SERVED, loads, answers, strict=False):
        assert "error" not in answer, (each.name, answer["error"])
        with torch.no_grad():
            logits = load_dequantized(Path(path))(input_ids=torch.tensor(PROMPTS)).logits
        tolerance, clear = TOLERANCE_NAT["int8" if each.recipe.scheme == W8A8 else "bfloat16"], 0
        for logprobs, places in zip(torch.log_softmax(logits, dim=-1), answer["places"], strict=True):
            for place, tokens in zip(logprobs, places, strict=False):
                served = {int(token): value for token, value in tokens.items()}
                (most, second), (token, _) = (part.tolist() for part in place.topk(2))
                assert served == pytest.approx({t: float(place[t]) for t in served}, abs=tolerance), each.name
                if most - second > MARGIN_NAT:
                    clear += 1
                    assert max(served, key=lambda t: served[t]) == token, (each.name, most - second)
        assert clear > 150, each.name
    for each, answer in zip(NOT_READ, answers[len(SERVED) :], strict=True):
        assert "must match the size" in answer["error"] or "AssertionError" in answer["error"], each.name
