"""Scenarios: the shipped ones load; what does not fit is named with its file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import ScenarioError
from harness.load.workload import drawn_length
from harness.scenario import context_needed, context_served, load_scenario, scenario_names


@pytest.mark.parametrize("name", scenario_names())
def test_shipped_scenarios_load_and_stay_short(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name and scenario.description
    assert scenario.requests >= 100, "below 100 every p95 would be suspect"


def test_overrides_win_and_none_changes_nothing() -> None:
    scenario = load_scenario("chat", input_tokens=7, output_tokens=None)
    assert (scenario.input_tokens, scenario.output_tokens) == (7, 32)
    assert "128" not in scenario.description, "the file's description tells of the file's lengths"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("input_tokenz = 4", "input_tokenz"),
        ("input_tokens = 'many'", "input_tokens"),
        ("output_tokens = 1", "output_tokens"),
        ("utilisation = 0.0", "utilisation"),
        ("api = 'soap'", "api"),
        ("max_model_len = 20", "max_model_len"),
        ("input_tokens = = 3", "TOML"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(str(path))
    assert "mine.toml" in str(caught.value) and named in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ScenarioError, match="batch, chat, rag"):
        load_scenario("chatt")


def test_the_context_holds_the_longest_request_that_can_be_drawn() -> None:
    """130 ± 25 % is at most 162 (round), 40 ± 25 % at most 50: 212 tokens and a little, served in steps of 256."""
    import random

    scenario = load_scenario("chat", input_tokens=130, output_tokens=40)
    rng = random.Random(1)
    longest = max(drawn_length(130, 0.25, rng) for _ in range(5000)) + max(
        drawn_length(40, 0.25, rng) for _ in range(5000)
    )
    assert longest <= context_needed(scenario) <= context_served(scenario) == 256
