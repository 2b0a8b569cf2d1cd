"""Blocks of every family: their parts are the block, folds change nothing, and the walk sees what the model sees."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from torch import Tensor, nn

from quantize.blocks import FAMILIES, Heads, Site, apply_fold, family_of, heads_of, linear, tie
from quantize.errors import ModelError
from quantize.fidelity import load_original
from quantize.store import Store
from quantize.walk import InputStats, add_gram, hidden, walk
from quantize.weights import open_model

TOKENS = [torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
RAGGED = [TOKENS[0], TOKENS[1][:7], TOKENS[2][:31]]
NORM = Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / request.param, family=request.param)


def seen_by_the_model(path: Path, sequences: list[list[int]]) -> dict[str, Tensor]:
    """The inputs of every linear layer in transformers' own forward, [tokens, in], by full name."""
    model = load_original(path)
    family = family_of(model.config.model_type)
    seen: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        for name in family.linears:
            keep = seen.setdefault(f"{i}.{name}", [])
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0][0]))
    for ids in sequences:
        model(input_ids=torch.tensor([ids]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("budget", [2**40, 0])
def test_the_walk_sees_what_the_model_sees(tiny: Path, budget: int) -> None:
    """Statistics of every block, gathered site by site and one block at a time, are those of the whole model's forward.

    Of the second block they depend on the outputs of the first. Nothing is different when all of it waits on disk.
    """
    expected = seen_by_the_model(tiny, RAGGED)
    with Store(budget) as store:
        for step in walk(open_model(tiny), RAGGED, store=store):
            found: dict[Site, InputStats] = {}
            step.advance(found.__setitem__)
            for site, stats in found.items():
                for name in site.linears:
                    x = expected[f"{step.index}.{name}"]
                    assert torch.allclose(stats.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4 * float(stats.gram.max()))
                    assert torch.allclose(stats.abs_max, x.abs().amax(dim=0), rtol=1e-3, atol=1e-4)
        assert (store.spilled_bytes > 0) == (budget == 0)


def test_a_site_sees_what_the_sites_before_it_became(tiny: Path) -> None:
    """With the first site's layers set to zero, attention has no values and the sites behind it see that."""
    step = next(walk(open_model(tiny), TOKENS))
    loudest: list[float] = []

    def silence(site: Site, stats: object) -> None:
        loudest.append(float(stats.abs_max.max()))  # type: ignore[attr-defined]
        for name in site.linears:
            linear(step.block, name).weight.zero_()
            bias = linear(step.block, name).bias
            if bias is not None:
                bias.zero_()

    step.advance(silence)
    assert loudest[0] > 0
    assert loudest[1] == 0


def test_what_waits_is_divided_by_the_factor_that_went_before_it(tiny: Path) -> None:
    """Folding every site as it is visited moves the same hidden states on as not folding at all."""
    plain, folded = (next(walk(open_model(tiny), TOKENS)) for _ in range(2))
    plain.advance()
    generator = torch.Generator().manual_seed(5)

    def fold(site: Site, stats: InputStats) -> Tensor | None:
        if site.before is None:
            return None
        scale = tie(torch.rand(len(stats.abs_max), generator=generator) * 3.9 + 0.1, site, folded.heads)
        return apply_fold(folded.block, site, scale, folded.heads, folded.family.offset)

    folded.advance(fold)
    assert plain.flow is not None and folded.flow is not None
    for name in plain.flow.store.names():
        expected = plain.flow.store.get(name)
        assert torch.allclose(folded.flow.store.get(name), expected, atol=1e-4 * float(expected.abs().max()))


def test_folding_leaves_the_function_as_it_was(tiny: Path) -> None:
    model = load_original(tiny)
    folded = copy.deepcopy(model)
    family, heads = family_of(model.config.model_type), heads_of(model.config)
    generator = torch.Generator().manual_seed(3)
    foldable = [site for site in family.sites if site.before]
    assert len(foldable) == len(family.sites) - (model.config.model_type == "phi")
    for block in folded.model.layers:
        for site in foldable:
            width = linear(block, site.linears[0]).in_features
            scale = tie(torch.rand(width, generator=generator) * 3.9 + 0.1, site, heads)
            before = [linear(block, name).weight.clone() for name in site.linears]
            assert torch.allclose(apply_fold(block, site, scale, heads, family.offset), scale, rtol=1e-4)
            assert not torch.equal(before[0], linear(block, site.linears[0]).weight)
    ids = torch.tensor(TOKENS)
    after, expected = folded(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(after, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_fold_that_ignores_shared_heads_would_be_noticed() -> None:
    """The check on the test above: with one wrong factor the function does change."""
    model = tiny_model.build(dtype=torch.float32)
    folded = copy.deepcopy(model)
    heads = heads_of(model.config)
    site = family_of("qwen2").sites[1]
    scale = torch.rand(128, generator=torch.Generator().manual_seed(3)) + 0.5  # not tied
    apply_fold(folded.model.layers[0], site, scale, heads)
    ids = torch.tensor(TOKENS)
    assert not torch.allclose(folded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)


def test_a_block_of_other_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 read with Llama's parts: its norms after each half would be lost without a word."""
    path = tiny_model.save(tmp_path / "gemma2", family="gemma2")
    monkeypatch.setitem(FAMILIES, "gemma2", FAMILIES["gemma"])
    with pytest.raises(ModelError, match="does not compute"):
        next(walk(open_model(path), TOKENS)).advance(lambda site, stats: None)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelError, match="'mamba'"):
        family_of("mamba")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_stored_in_half_precision_costs_the_fold_nothing(stored: torch.dtype, offset: float) -> None:
    """The linear layers take up what the norm loses by its rounding."""
    block = nn.ModuleDict({"input_layernorm": nn.RMSNorm(128), "self_attn": nn.ModuleDict()})
    attention = block["self_attn"]
    assert isinstance(attention, nn.ModuleDict)
    for name in ("q_proj", "k_proj", "v_proj"):
        attention[name] = nn.Linear(128, 8)
    before = copy.deepcopy(block)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(4)) + 0.3
    with torch.no_grad():
        block["input_layernorm"].weight -= offset
    applied = apply_fold(block, NORM, scale, Heads(2, 2, 4), offset, stored)
    norm = block["input_layernorm"].weight
    assert torch.equal(norm, norm.to(stored).float())
    assert torch.allclose(applied, scale, rtol=2**-6)
    with torch.no_grad():
        norm += offset
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
    site = Site(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
    applied = apply_fold(block, site, torch.full((8,), 2.0), Heads(1, 1, 8), stored=torch.float16)
    assert applied.tolist() == [2, 2, 2, 1, 2, 2, 2, 2]


def test_repeated_heads_share_a_factor() -> None:
    heads = Heads(query=4, key_value=2, size=1)
    attention, mlp = family_of("llama").sites[1], family_of("llama").sites[3]
    assert tie(torch.tensor([1.0, 3.0, 10.0, 20.0]), attention, heads).tolist() == [2, 2, 15, 15]
    assert tie(torch.tensor([1.0, 3.0, 10.0, 20.0]), mlp, heads).tolist() == [1, 3, 10, 20]


@pytest.mark.parametrize("width", [96, 1024, 1100])
def test_a_gram_matrix_cut_into_tiles_is_the_same(width: int) -> None:
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(width))
    gram = torch.zeros(width, width)
    add_gram(gram, x.T.contiguous())
    assert torch.allclose(gram.triu(), (x.T @ x).triu(), atol=1e-3)


def test_only_the_rows_of_the_embedding_that_are_looked_up_are_read(tmp_path: Path) -> None:
    """What the walk starts from is what the model's embedding gives (Gemma's is scaled)."""
    for family in ("qwen2", "gemma3_text"):
        path = tiny_model.save(tmp_path / family, family=family)
        model = load_original(path)
        step = next(walk(open_model(path), [[5, 200, 5, 9]]))
        assert step.flow is not None
        assert torch.equal(step.flow.store.get("hidden.0"), model.model.embed_tokens(torch.tensor([[5, 200, 5, 9]])))


def test_a_store_keeps_what_fits_and_spills_the_rest(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    with Store(1000, tmp_path) as store:
        for name, tensor in tensors.items():
            store.put(name, tensor)
        assert store.spilled_bytes == 3 * 400
        assert len(list(tmp_path.rglob("t*"))) == 3
        assert all(torch.equal(store.get(name), tensor) for name, tensor in tensors.items())
        store.put("t4", tensors["t0"])
        assert torch.equal(store.get("t4"), tensors["t0"])
        store.drop("t4")
        assert store.names() == ["t0", "t1", "t2", "t3"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0, 2**20])
def test_what_is_saved_stays_as_it_was_and_when_the_store_has_gone(budget: int, tmp_path: Path) -> None:
    old, new = torch.arange(6.0).view(2, 3), torch.ones(4)
    saved = tmp_path / "saved"
    saved.mkdir()
    with Store(budget, tmp_path) as store:
        for name in ("a", "b"):
            store.put(name, old)
        store.save(["a"], saved)
        assert torch.equal(store.get("a"), old)
        store.put("a", new)
        assert torch.equal(store.get("a"), new) and torch.equal(store.get("b"), old)
    assert [path.name for path in saved.iterdir()] == ["a.npy"]
    assert torch.equal(torch.from_numpy(np.load(saved / "a.npy")), old)


def test_the_last_block_is_gone_through_only_as_far_as_anybody_looks(tiny: Path) -> None:
    """Its sites see the same, wanted or not; what it puts out is computed only if it is."""
    seen: dict[bool, list[InputStats]] = {True: [], False: []}
    ends: dict[bool, Tensor] = {}
    for wanted, found in seen.items():
        for step in walk(open_model(tiny), TOKENS, to_the_end=wanted):

            def look(_: Site, stats: InputStats, found: list[InputStats] = found) -> None:
                found.append(stats)

            step.advance(look)
            ends[wanted] = hidden(step, 0)
    for a, b in zip(seen[True], seen[False], strict=True):
        assert torch.equal(a.gram, b.gram) and torch.equal(a.abs_max, b.abs_max)
    assert not torch.equal(ends[True], ends[False])
