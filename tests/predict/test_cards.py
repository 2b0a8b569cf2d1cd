"""The catalogue of cards: its figures against each other, against what the prices say, and its names."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import InputError
from harness.predict.cards import Card, card, cards
from harness.prices import load_prices

SIXTEEN = {
    "rtx-2000-ada", "rtx-a4000", "rtx-4060-ti-16gb", "rtx-4070-ti-super", "rtx-4080", "rtx-4080-super",
    "rtx-5060-ti-16gb", "rtx-5070-ti", "rtx-5080", "t4", "a2",
}  # fmt: skip
OWN = """
[[card]]
id = "mine"
name = "My card"
generation = "ada"
memory_gib = 15.5
bandwidth_gb_s = 300
fp16_tflops = 50
source = "measured"
"""


def ids() -> list[str]:
    return [card.id for card in cards()]


def test_the_class_of_16_gb_is_complete() -> None:
    assert {card.id for card in cards() if 14 < card.memory_gib < 16} >= SIXTEEN
    assert len(set(ids())) == len(ids()) > 50


@pytest.mark.parametrize("each", cards(), ids=lambda each: each.id)
def test_what_a_generation_can(each: Card) -> None:
    """Volta's tensor cores know FP16 alone, Turing INT8 too, Ampere BF16, Ada and later FP8."""
    assert (each.bf16_tflops is None) == (each.generation in ("volta", "turing"))
    assert (each.int8_tops is None) == (each.generation == "volta")
    assert (each.fp8_tflops is None) == (each.generation in ("volta", "turing", "ampere"))
    assert each.bf16_tflops in (None, each.fp16_tflops), "one rate for both 16-bit types"
    assert each.source.startswith("https://")
    assert each.power_w is not None and each.sms is not None


@pytest.mark.parametrize("each", [each for each in cards() if each.bf16_tflops], ids=lambda each: each.id)
def test_rates_of_the_types_keep_their_ratio(each: Card) -> None:
    """GeForce halves what accumulates in 32 bits (BF16, FP8), not INT8: INT8 = 4 x BF16, else 2 x; FP8 = 2 x BF16.

    A sparse rate among dense ones, or one that accumulates in 16 bits, breaks the ratio by a factor of two.
    """
    assert each.bf16_tflops is not None and each.int8_tops is not None
    assert each.int8_tops / each.bf16_tflops == pytest.approx(4 if "GeForce" in each.name else 2, rel=0.02)
    if each.fp8_tflops is not None:
        assert each.fp8_tflops / each.bf16_tflops == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("each", [each for each in cards() if each.bf16_tflops], ids=lambda each: each.id)
def test_rates_fit_the_multiprocessors(each: Card) -> None:
    """Dense operations a clock of one multiprocessor, over the rate, are a clock: between 1.2 and 2.7 GHz.

    FP16 operations a clock: 512 where GeForce halves them (Ampere to Blackwell), 1024 on the workstation cards, 2048 on
    the A100, 4096 on Hopper. RTX 4080: 97.5e12 / (76 x 512) = 2.51 GHz, its boost clock. A10G and L40 are halved as
    GeForce is; the H20 is slowed to less than its multiprocessors could do.
    """
    assert each.bf16_tflops is not None and each.sms is not None
    if each.id.startswith("h20-"):
        per_clock = 1024
    elif each.generation == "hopper":
        per_clock = 4096
    elif each.id.startswith(("a100", "a800", "a30")):
        per_clock = 2048
    else:
        per_clock = 512 if "GeForce" in each.name or each.id in ("a10g", "l40") else 1024
    assert 1.2e9 < each.bf16_tflops * 1e12 / (each.sms * per_clock) < 2.7e9


def test_every_card_with_a_price_is_here_and_keeps_some_of_its_memory() -> None:
    """CUDA reports 91 % (T4, with ECC) to 99.1 % (HBM) of what a card is sold with, never more."""
    sold = {rent.card: rent.memory_gib for rent in load_prices().rents}
    assert set(sold) <= set(ids())
    for id, gib in sold.items():
        assert 0.90 < card(id).memory_gib / gib < 0.995


@pytest.mark.parametrize(
    ("id", "bandwidth", "bf16"),
    [
        ("rtx-2000-ada", 224, 48),
        ("rtx-4080", 717, 97.5),
        ("l4", 300, 121),
        ("rtx-6000-ada", 960, 364),
        ("a10g", 600, 70),
    ],
)
def test_where_sources_disagree(id: str, bandwidth: float, bf16: float) -> None:
    assert (card(id).bandwidth_gb_s, card(id).bf16_tflops) == (bandwidth, bf16)
    assert card(id).doubt


@pytest.mark.parametrize(
    ("spelling", "id"),
    [
        ("rtx-4080", "rtx-4080"),
        ("RTX 4080", "rtx-4080"),
        ("rtx4080", "rtx-4080"),
        ("RTX_4080", "rtx-4080"),
        ("4080", "rtx-4080"),
        ("GeForce 4080", "rtx-4080"),
        ("NVIDIA GeForce RTX 4080", "rtx-4080"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx-4080-super"),
        ("NVIDIA RTX 2000 Ada Generation", "rtx-2000-ada"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("A100", "a100-80gb-sxm"),
        ("RTX 4090 24GB", "rtx-4090"),
        ("Tesla V100S-PCIE-32GB", "v100s-32gb-pcie"),
    ],
)
def test_spellings(spelling: str, id: str) -> None:
    assert card(spelling).id == id


def test_a_card_that_is_not_there() -> None:
    with pytest.raises(InputError, match="RTX 9999") as caught:
        card("RTX 9999")
    assert "rtx-2000-ada" in str(caught.value) and "own.toml" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="no such card"):
        card("")


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(OWN, encoding="utf-8")
    mine = card(str(file))
    assert (mine.id, mine.memory_gib, mine.bf16_tflops, mine.aliases, mine.doubt) == ("mine", 15.5, None, (), "")
    file.write_text(OWN + OWN.replace('"mine"', '"other"').replace("My card", "Other"), encoding="utf-8")
    assert card(f"{file}:Other").id == "other"
    with pytest.raises(InputError, match="holds 2 cards") as several:
        card(str(file))
    assert f"{file}:mine" in str(several.value)
    with pytest.raises(InputError, match="no such card in .*own.toml"):
        card(f"{file}:third")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[[card]", "no readable TOML"),
        ("", "no list of cards"),
        ("[card]\nid = 'a'", "no list of cards"),
        (OWN.replace("[[card]]", "[[gpu]]"), r"\[\[gpu\]\]"),
        (OWN + "sm = 3", "unknown key 'sm'"),
        (OWN.replace("memory_gib = 15.5\n", ""), r"\[\[card\]\] 1: no memory_gib"),
        (OWN.replace("15.5", "16384"), "memory_gib = 16384"),
        (OWN.replace("15.5", "'16'"), "memory_gib = '16'"),
        (OWN.replace("bandwidth_gb_s = 300", "bandwidth_gb_s = -1"), "bandwidth_gb_s = -1"),
        (OWN.replace('"ada"', '"maxwell"'), "generation = 'maxwell'"),
        (OWN.replace('id = "mine"', 'id = "my card"'), "id = 'my card'"),
        (OWN + OWN, "both"),
        (
            OWN + OWN.replace('"mine"', '"other"').replace('"My card"', '"Other"\naliases = ["My-Card"]'),
            "both mine and",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, given: str, says: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(given, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        card(str(file))
    with pytest.raises(InputError, match="cannot be read"):
        card(str(tmp_path / "none.toml"))
