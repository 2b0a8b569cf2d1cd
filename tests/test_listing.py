"""`bench scenarios` and `bench precisions`: everything that has a name, as it really is."""

from __future__ import annotations

import io
import tomllib
from dataclasses import asdict

import pytest
from rich.console import Console
from rich.table import Table

from harness import checkpoints, listing
from harness.errors import InputError
from harness.listing import PER_CHANNEL, precision_table, precisions, scenario_file, scenario_table, scenarios
from harness.predict.cards import cards
from harness.predict.roofline import kernel_of
from harness.scenario import load_scenario, scenario_names
from quantize import formats
from quantize.methods import METHODS
from quantize.recipe import default_scheme


def printed(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_scenario_is_listed_as_it_is() -> None:
    assert [one.name for one in scenarios()] == scenario_names()
    lines = printed(scenario_table(scenarios()), 200).splitlines()
    (agent,) = (line.split() for line in lines if line.startswith("agent"))
    assert agent[:5] == ["agent", "192", "48", "closed", "6"] and "4 s" in " ".join(agent)
    (rag,) = (line for line in lines if line.startswith("rag"))
    assert "1,536" in rag and "Retrieval: 1,536 tokens in, 64 out" in rag


def test_a_scenarios_file_is_one_that_can_be_loaded() -> None:
    text = scenario_file("code").read_text(encoding="utf-8")
    given = asdict(load_scenario("code"))
    for key, value in tomllib.loads(text).items():
        assert given[key] == value
    with pytest.raises(InputError, match="did you mean code?"):
        scenario_file("codee")


def test_every_precision_is_listed() -> None:
    assert tuple(one.name for one in precisions()) == checkpoints.PRECISIONS


@pytest.mark.parametrize("name", checkpoints.METHODS)
def test_a_precision_is_what_the_quantizer_makes_of_its_name(name: str) -> None:
    """The oracle is the quantizer itself, which this package may not import outside of tests."""
    (one,) = (one for one in precisions() if one.name == name)
    scheme = default_scheme(name)
    assert (one.bits, one.group_size, one.symmetric, one.activation_bits) == (
        scheme.bits, scheme.group_size, scheme.symmetric, scheme.activation_bits,
    )  # fmt: skip
    assert one.layout == formats.default({"model.layers.0.mlp.up_proj": scheme})
    needs = "training" if name in ("qat", "qad") else "calibration" if METHODS[name].calibrated else "nothing"
    assert one.needs == needs


def test_kernels_are_those_of_the_predictor() -> None:
    """A checkpoint in the AWQ layout has no kernel on Volta, one in GPTQ's exllama; from Turing on Marlin."""
    by_name = {one.name: one.kernels for one in precisions()}
    for card in cards():
        assert by_name["bf16"][card.generation] == kernel_of(card, "bf16") == "16bit"
        assert by_name["gptq"][card.generation] == kernel_of(card, "gptq")
    assert by_name["gptq"]["volta"] == "exllama" and by_name["gptq"]["turing"] == "marlin"
    assert "volta" not in by_name["awq"] and "volta" not in by_name["rtn"] and by_name["awq"]["ada"] == "marlin"
    assert set(by_name["smoothquant"].values()) == {"w8a8"}
    assert "cpu" not in by_name["bf16"]


def test_tables_break_no_word_at_80_columns() -> None:
    """Each word of the table at 200 columns is one at 80."""
    for table in (precision_table(precisions()), scenario_table(scenarios())):
        narrow = printed(table)
        assert max(map(len, narrow.splitlines())) <= 80
        assert sorted(narrow.split()) == sorted(printed(table, 200).split())
        assert "…" not in narrow


def test_words_for_kernels() -> None:
    assert listing._kernels({name: "16bit" for name in listing.GENERATIONS}) == "16bit"
    assert listing._kernels({name: "marlin" for name in listing.GENERATIONS[1:]}) == "marlin, not volta"
    assert PER_CHANNEL == -1
