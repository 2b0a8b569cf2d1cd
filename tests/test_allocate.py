"""Bits by sensitivity: the choice is the best that fits, and the checkpoint is no larger than asked."""

import itertools
import json
from pathlib import Path

import pytest
import tiny_model

from quantize.allocate import BITS, Choice, choose, measure
from quantize.errors import SchemeError
from quantize.fidelity import compare, load_dequantized, load_original
from quantize.job import quantize_model
from quantize.recipe import Recipe, default_scheme, parse_exception
from quantize.scheme import Scheme
from quantize.weights import open_model

GIB = 2**30
BASE = Recipe("rtn", Scheme(4, 64), samples=4, length=32)
TOKENS = [list(range(i, i + 48)) for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=3)


def made_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_the_choice_is_the_best_of_all_that_fit() -> None:
    """Against trying every combination."""
    choices = [
        Choice((f"layer{site}",), None if bits == 16 else Scheme(bits, 32), size * bits, weight / 4**bits)
        for site, (size, weight) in enumerate([(100, 5.0), (300, 1.0), (50, 40.0), (200, 2.0)])
        for bits in (4, 8, 16)
    ]
    sites = [[c for c in choices if c.site == (f"layer{i}",)] for i in range(4)]
    for budget in (2600, 3000, 4000, 6000, 20000):
        fitting = [c for c in itertools.product(*sites) if sum(x.size for x in c) <= budget]
        least = min(sum(x.damage for x in c) for c in fitting)
        found = choose(choices, budget)
        assert found is not None
        assert sum(c.size for c in found) <= budget
        assert sum(c.damage for c in found) == pytest.approx(least, rel=1e-3)
    assert choose(choices, 100) is None


def test_damage_falls_with_bits_and_is_nothing_at_16(model: Path) -> None:
    choices = measure(open_model(model), BASE, TOKENS)
    sites = {choice.site for choice in choices}
    assert len(sites) == 12
    for site in sites:
        own = [choice for choice in choices if choice.site == site]
        assert [16 if c.scheme is None else c.scheme.bits for c in own] == [bits for bits in BITS if bits >= 4]
        damages = [choice.damage for choice in own]
        assert damages[0] > 30 * damages[1] > 0 and damages[2] == 0
        assert own[0].size < own[1].size < own[2].size


def test_an_exception_of_the_user_s_stays(model: Path) -> None:
    kept = parse_exception("layers.1.mlp.down_proj=16bit", BASE.scheme)
    choices = measure(open_model(model), Recipe("rtn", BASE.scheme, (kept,)), TOKENS)
    assert [c.scheme for c in choices if c.site == ("model.layers.1.mlp.down_proj",)] == [None]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_checkpoint_is_no_larger_than_asked(share: float, model: Path, tmp_path: Path) -> None:
    least = made_of(quantize_model(model, BASE, out=tmp_path / "least").path)
    most = made_of(model)
    target = (least + share * (most - least)) / GIB
    made = quantize_model(model, BASE, out=tmp_path / "out", target_gib=target)
    headers = 40_000  # safetensors' own words, which no target counts
    assert least < made_of(made.path) <= target * GIB + headers
    original = load_original(model)
    kl = [compare(original, load_dequantized(tmp_path / name), TOKENS).kl_nats for name in ("least", "out")]
    assert kl[1] < kl[0]
    recipe = json.loads((made.path / "quantize.json").read_text())["recipe"]
    assert recipe["exceptions"] and made.format == "compressed-tensors"


def test_more_room_is_never_worse(model: Path) -> None:
    choices = measure(open_model(model), BASE, TOKENS)
    least = sum(min(c.size for c in choices if c.site == site) for site in {c.site for c in choices})
    damages = []
    for factor in (1.0, 1.3, 2.0, 5.0):
        found = choose(choices, int(least * factor))
        assert found is not None
        damages.append(sum(choice.damage for choice in found))
    assert damages == sorted(damages, reverse=True) and damages[-1] == 0


def test_a_target_below_the_smallest_says_what_that_is(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="--target-gib 1e-06.*or more with 4 bits.*larger target"):
        quantize_model(model, BASE, out=tmp_path / "out", target_gib=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_it_starts_from_the_bits_that_were_asked() -> None:
    assert default_scheme("gptq", 3) == Scheme(3, 128, symmetric=True)
    assert default_scheme("awq", 8).symmetric
    assert default_scheme("smoothquant") == Scheme(8, -1, symmetric=True, activation_bits=8)
    assert default_scheme("awq+gptq") == Scheme(4, 128)


def test_a_target_above_the_model_as_it_is_says_what_that_is(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="--target-gib 100.*less than .*, the size of the model as it is"):
        quantize_model(model, BASE, out=tmp_path / "out", target_gib=100)
