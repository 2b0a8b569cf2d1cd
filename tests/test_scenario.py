"""Scenarios: the shipped ones load; what does not fit is named with its file and key."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import InputError, ScenarioError
from harness.load.workload import NO_HISTORY, Dialect, drawn_length, extended, make_ask
from harness.records import Cell, Scenario
from harness.scenario import (
    context_needed,
    context_served,
    load_scenario,
    read_prompts,
    scenario_names,
    scenarios_dir,
)

TRACE = "timestamp,input_length,output_length\n0,100,10\n1,300,0\n4,200,50\n"
DATASET = '{"prompt": "one two three", "output_tokens": 8}\n{"prompt": "four", "completion": "five six"}\n'

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text)`: a scenario in a file, with a trace and a dataset beside it; gives its path."""
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "prompts.jsonl").write_text(DATASET)

    def written(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return written


@pytest.mark.parametrize("name", scenario_names())
def test_shipped_scenarios_load_and_stay_short(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name and scenario.description
    assert scenario.requests >= 100, "below 100 every p95 would be suspect"
    assert len((scenarios_dir() / f"{name}.toml").read_text().splitlines()) < 30


@pytest.mark.parametrize("name", scenario_names())
def test_the_demo_model_has_room_for_each_shipped_scenario(name: str) -> None:
    config = json.loads((scenarios_dir() / "demo-model" / "config.json").read_text())
    assert context_served(load_scenario(name)) <= config["max_position_embeddings"]


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
        ("usd_per_hour = nan", "usd_per_hour"),
        ("api = 'soap'", "api"),
        ("max_model_len = 20", "max_model_len"),
        ("input_tokens = = 3", "TOML"),
        ("arrivals = 'bus'", "arrivals"),
        ("arrivals = 'trace'", "trace"),
        ("arrivals = 'poisson'\ntrace = 'trace.csv'", 'arrivals = "poisson"'),
        ("trace = 'nothing.csv'", "trace = "),
        ("trace = 3", "trace"),
        ("dataset = 'nothing.json'", "dataset = "),
        ("arrivals = 'poisson'\nturns = 2", "turns = 2"),
        ("arrivals = 'poisson'\nthink_s = 0.5", "think_s = 0.5"),
        ("turns = 0", "turns"),
        ("think_s = -1", "think_s"),
        ("burstiness = 0.5", "burstiness = 0.5"),
        ("arrivals = 'gamma'\nburstiness = 0.0", "burstiness"),
        ("length_distribution = 'empirical'", "length_distribution"),
        ("length_distribution = 'fixed'\ndataset = 'prompts.jsonl'", "length_distribution"),
        ("length_jitter = 1.2", "length_jitter = 1.2"),
        ("length_distribution = 'lognormal'\nlength_jitter = 1.6", "length_jitter"),
        ("shared_prefix = 0.96", "shared_prefix"),
        ("shared_prefix = 0.5\ndataset = 'prompts.jsonl'", "shared_prefix"),
        ("precision = 0.004", "precision"),
        ("precision = 0.6", "precision"),
        ("max_window_s = 4.0", "max_window_s = 4.0"),
        ("warmup_s = -1", "warmup_s"),
        ("token_timeout_s = 0", "token_timeout_s"),
    ],
)
def test_what_does_not_fit_is_named(write: Write, text: str, named: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(text))
    assert "mine.toml" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "arrivals = 'gamma'\nburstiness = 0.5\nprecision = 0.005",
        "turns = 3\nthink_s = 0.5\nshared_prefix = 0.95\nprecision = 0.5",
        "length_distribution = 'lognormal'\nlength_jitter = 1.5\nmax_window_s = 5.0",
        "arrivals = 'trace'\ntrace = 'trace.csv'\nlength_distribution = 'fixed'",
        "arrivals = 'poisson'\ndataset = 'prompts.jsonl'",
    ],
)
def test_what_fits_is_taken(write: Write, text: str) -> None:
    assert load_scenario(write(text)).name == "mine"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ScenarioError, match="agent, batch, chat, code, rag"):
        load_scenario("chatt")


# --- files beside the scenario ----------------------------------------------------------------------------------------


def test_a_trace_beside_the_scenario_brings_times_and_lengths(write: Write, tmp_path: Path) -> None:
    """The means of 100, 300, 200 and of 10, 0, 50; the longest request is 300 tokens and the 2 that are the least."""
    scenario = load_scenario(write("trace = 'trace.csv'"))
    assert scenario.trace == str(tmp_path / "trace.csv") and Path(scenario.trace).is_absolute()
    assert (scenario.arrivals, scenario.length_distribution) == ("trace", "empirical")
    assert (scenario.input_tokens, scenario.output_tokens) == (200, 20)
    assert context_needed(scenario) == 300 + 2 + 2, "two to spare"
    assert load_scenario(write("trace = 'trace.csv'\ninput_tokens = 150")).input_tokens == 150


def test_a_trace_may_bring_times_alone(write: Write) -> None:
    scenario = load_scenario(write("trace = 'trace.csv'\nlength_distribution = 'fixed'"))
    assert scenario.input_tokens == 128 and 128 + 32 <= context_needed(scenario) <= 128 + 34


def test_a_file_named_in_an_override_is_looked_for_in_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.csv").write_text(TRACE)
    monkeypatch.chdir(elsewhere)
    assert load_scenario(path, trace="mine.csv").trace == str(elsewhere / "mine.csv")
    with pytest.raises(ScenarioError, match=r"trace\.csv"):
        load_scenario(path, trace="trace.csv")


def test_a_bad_trace_is_found_before_anything_starts(write: Write, tmp_path: Path) -> None:
    path = write("trace = 'trace.csv'")
    (tmp_path / "trace.csv").write_text(TRACE + "3,1,1\n")
    with pytest.raises(InputError, match=r"trace\.csv line 5: timestamp 3 is before"):
        load_scenario(path)


def test_the_prompts_of_a_dataset_have_room_in_the_context_or_are_left_out(write: Write) -> None:
    """13 bytes are 7 tokens at most, and 8 to answer; 4 bytes are 2, and 8 bytes of answer 4. 64 are set aside."""
    path = write("dataset = 'prompts.jsonl'")
    scenario = load_scenario(path)
    assert scenario.length_distribution == "empirical"
    assert context_needed(scenario) == 7 + 8 + 64 + 2

    def words(text: str) -> list[int]:
        return [1] * len(text.split())

    prompts = read_prompts(scenario, words)
    assert prompts is not None and [item.output_tokens for item in prompts.items] == [8, 2]
    small = load_scenario(path, max_model_len=64 + 10)
    prompts = read_prompts(small, words)
    assert prompts is not None and (len(prompts.items), prompts.left_out) == (1, 1), "3 + 8 tokens are more than 10"
    assert read_prompts(load_scenario("chat"), words) is None


# --- context ----------------------------------------------------------------------------------------------------------


def test_the_context_holds_the_longest_request_that_can_be_drawn() -> None:
    """130 ± 25 % is at most 162 (round), 40 ± 25 % at most 50: 212 tokens and a little, served in steps of 256."""
    scenario, rng = load_scenario("chat", input_tokens=130, output_tokens=40), random.Random(1)
    longest = max(drawn_length(130, scenario, rng) for _ in range(5000)) + max(
        drawn_length(40, scenario, rng) for _ in range(5000)
    )
    assert longest == 212 <= context_needed(scenario) <= 214
    assert context_served(scenario) == 256


def test_the_context_of_a_lognormal_ends_at_its_last_quantile() -> None:
    """s = 0.5: exp(7.4797 + 0.5 * 3.0902) = 8310 for a mean of 2000 (test_workload has mu), a quarter of it for 500."""
    scenario = load_scenario(
        "chat", input_tokens=2000, output_tokens=500, length_distribution="lognormal", length_jitter=0.5
    )
    assert context_needed(scenario) == pytest.approx(8310 * 1.25, abs=4)


@pytest.mark.parametrize("shared_prefix", [0.0, 0.6])
def test_the_context_holds_whole_conversations(shared_prefix: float) -> None:
    """Six turns of 192 ± 25 % and 48 ± 25 %: 6 * (240 + 60) = 1800 tokens, if every one were the longest."""
    scenario = load_scenario("agent", shared_prefix=shared_prefix)
    assert context_needed(scenario) == 1802
    assert longest_conversation(scenario, users=40) <= 1800


def longest_conversation(scenario: Scenario, users: int) -> int:
    dialect, longest = Dialect(vocabulary=range(1000)), 0
    for user in range(users):
        history = NO_HISTORY
        for sequence in range(scenario.turns):
            ask = make_ask(scenario, Cell("bf16", users), user, sequence, dialect, "m", history=history)
            history = extended(history, ask, [1] * ask.output_tokens, "")
        longest = max(longest, history.tokens)
    return longest
