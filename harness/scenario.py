"""TOML -> Scenario. An error names the file and the key, says what is allowed, and nothing has been started yet."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import settings
from harness.errors import ScenarioError
from harness.files import read_text
from harness.load.dataset import Prompts, longest_tokens, read_dataset, tokenize_dataset
from harness.load.schedule import lengths_from_trace, read_trace
from harness.load.workload import longest_length
from harness.records import Scenario
from harness.slo import Slo
from harness.suggest import did_you_mean

_PACKAGED = Path(__file__).parent / "_scenarios"
_IN_REPOSITORY = Path(__file__).parent.parent / "scenarios"
_TEXT_SLACK = 64
"""Tokens set aside in each turn where prompts go as text: for the chat template, and because lengths are estimates."""
_DESCRIBED = {"input_tokens", "output_tokens", "api", "length_distribution", "arrivals", "trace", "dataset", "turns"}
"""What a scenario's description may speak of."""


def scenarios_dir() -> Path:
    """The folder of scenarios, shapes and the demo model: packaged in a wheel, the repository's own otherwise."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_REPOSITORY


def scenario_names() -> list[str]:
    """Names that `load_scenario` knows without a path."""
    return sorted(path.stem for path in scenarios_dir().glob("*.toml"))


def load_scenario(name_or_path: str, *, slo: Slo | None = None, **overrides: Any) -> Scenario:
    """Read a scenario by name (`chat`) or by path (`mine.toml`); overrides that are None change nothing.

    `slo` takes the place of the scenario's whole service level.

    `trace` and `dataset` come out as absolute paths: in the file they stand relative to it, in an override relative to
    the working directory. They bring `arrivals = "trace"` and `length_distribution = "empirical"` with them. Raises
    ScenarioError for a file that is missing, is no TOML, or has a key or value that does not fit.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = scenarios_dir() / f"{name_or_path}.toml"
    if not path.is_file():
        raise ScenarioError(
            f"scenario {name_or_path!r} is not here{did_you_mean(name_or_path, scenario_names())}",
            allowed=f"{', '.join(scenario_names())}, or the path of a .toml file",
        )
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise ScenarioError(f"scenario {name_or_path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; a figure of 5,000 digits, deep nesting
        raise ScenarioError(f"{path.name}: no readable TOML: {error}", remedy="see scenarios/chat.toml") from error
    table.setdefault("name", path.stem)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.keys() & _DESCRIBED:
        given["description"] = ""  # it tells of the file's own load
    for values, folder in ((table, path.parent), (given, Path())):
        for key in ("trace", "dataset"):
            if isinstance(values.get(key), (str, Path)):
                values[key] = os.path.abspath(folder / values[key])
    table |= given
    if "trace" in table:
        table.setdefault("arrivals", "trace")
    if "trace" in table or "dataset" in table:
        table.setdefault("length_distribution", "empirical")
    scenario = settings.record_of(Scenario, table, path.name, error=ScenarioError)
    if slo is not None:
        scenario = replace(
            scenario,
            slo_p95_s=slo.p95_s,
            slo_ttft_s=slo.ttft_s,
            slo_tpot_s=slo.tpot_s,
            slo_goodput=slo.goodput,
        )
    return _with_means(check_scenario(scenario, path.name), table)


def _with_means(scenario: Scenario, given: Collection[str]) -> Scenario:
    """Where a trace says how long requests are, the scenario's own lengths are its means, if no others were given."""
    if scenario.trace is None or not lengths_from_trace(scenario):
        return scenario
    trace = read_trace(Path(scenario.trace))
    means: dict[str, Any] = {
        "input_tokens": max(1, round(fmean(item.input_tokens or 0 for item in trace))),
        "output_tokens": max(2, round(fmean(item.output_tokens or 0 for item in trace))),
    }
    return replace(scenario, **{key: mean for key, mean in means.items() if key not in given})


_RANGES: dict[str, tuple[float, float]] = {
    "input_tokens": (1, 1_000_000),
    "output_tokens": (2, 1_000_000),
    "length_jitter": (0.0, 1.5),
    "shared_prefix": (0.0, 0.95),
    "burstiness": (0.01, 1000.0),
    "turns": (1, 1000),
    "think_s": (0.0, 86_400.0),
    "requests": (1, 1_000_000),
    "min_window_s": (0.0, 86_400.0),
    "max_window_s": (0.1, 86_400.0),
    "precision": (0.005, 0.5),
    "warmup_rounds": (1, 100),
    "warmup_s": (0.0, 86_400.0),
    "request_timeout_s": (0.1, 86_400.0),
    "token_timeout_s": (0.1, 86_400.0),
    "slo_p95_s": (0.001, 86_400.0),
    "slo_ttft_s": (0.0001, 86_400.0),
    "slo_tpot_s": (0.0001, 86_400.0),
    "slo_goodput": (0.01, 1.0),
    "usd_per_hour": (0.0, 100_000.0),
    "utilisation": (0.001, 1.0),
    "max_model_len": (16, 100_000_000),
}
"""Two output tokens are the least because TPOT divides by (tokens - 1)."""
_MOST_UNIFORM_JITTER = 0.9


def check_scenario(scenario: Scenario, source: str) -> Scenario:
    """Return the scenario when every value is in range and fits the others; raise ScenarioError naming the key."""
    settings.check(scenario, _RANGES, _conflicts(scenario), source, error=ScenarioError)
    for key in ("trace", "dataset"):
        value = getattr(scenario, key)
        if value is not None and not Path(value).is_file():
            raise ScenarioError(f"{source}: {key} = {value}: there is no such file", allowed="the path of a file")
    longest = context_needed(scenario)
    if scenario.max_model_len is not None and scenario.max_model_len < longest and scenario.dataset is None:
        raise ScenarioError(
            f"{source}: max_model_len = {scenario.max_model_len} is too short for this scenario",
            allowed=f"{longest} or more (the longest input + output, in the last turn)",
        )
    return scenario


def _conflicts(scenario: Scenario) -> list[settings.Conflict]:
    """Of the values that have to fit each other."""
    kind, lengths = scenario.arrivals, scenario.length_distribution
    has_file = scenario.trace is not None or scenario.dataset is not None
    return [
        (
            scenario.slo_p95_s is None and scenario.slo_ttft_s is None and scenario.slo_tpot_s is None,
            "no service level",
            "slo_p95_s, slo_ttft_s or slo_tpot_s",
        ),
        (kind == "trace" and scenario.trace is None, 'arrivals = "trace" without trace', "trace = a CSV file"),
        (kind != "trace" and scenario.trace is not None, f'trace with arrivals = "{kind}"', 'arrivals = "trace"'),
        (kind != "closed" and scenario.turns > 1, f'turns = {scenario.turns} with arrivals = "{kind}"', '"closed"'),
        (
            kind != "closed" and scenario.think_s > 0,
            f'think_s = {scenario.think_s} with arrivals = "{kind}"',
            '"closed"',
        ),
        (
            kind != "gamma" and scenario.burstiness != 1,
            f'burstiness = {scenario.burstiness} with arrivals = "{kind}"',
            '"gamma"',
        ),
        (
            lengths == "empirical" and not has_file,
            'length_distribution = "empirical" without dataset or trace',
            "fixed, uniform or lognormal; or a file that has lengths",
        ),
        (
            lengths != "empirical" and scenario.dataset is not None,
            f'length_distribution = "{lengths}" with dataset',
            '"empirical": prompts from a file have their own lengths',
        ),
        (
            scenario.dataset is not None and scenario.shared_prefix > 0,
            f"shared_prefix = {scenario.shared_prefix} with dataset",
            "0: prompts from a file go as they are",
        ),
        (
            lengths != "lognormal" and scenario.length_jitter > _MOST_UNIFORM_JITTER,
            f'length_jitter = {scenario.length_jitter} with length_distribution = "{lengths}"',
            f"up to {_MOST_UNIFORM_JITTER}; only lognormal has a wider spread",
        ),
        (
            scenario.max_window_s < scenario.min_window_s,
            f"max_window_s = {scenario.max_window_s} is below min_window_s = {scenario.min_window_s}",
            "a longest window that is not shorter than the shortest",
        ),
    ]


def context_needed(scenario: Scenario) -> int:
    """Tokens of the longest request that can come: of the last turn, which carries the whole conversation.

    For a dataset this is an estimate (dataset.BYTES_A_TOKEN); prompts that do not fit into what is served are left out.
    """
    longest_out = max(2, longest_length(scenario.output_tokens, scenario))
    turn = longest_length(scenario.input_tokens, scenario) + longest_out
    if scenario.dataset is not None:
        turn = longest_tokens(read_dataset(Path(scenario.dataset)), longest_out)
    elif scenario.trace is not None and lengths_from_trace(scenario):
        trace = read_trace(Path(scenario.trace))
        turn = max(max(1, item.input_tokens or 0) + max(2, item.output_tokens or 0) for item in trace)
    if scenario.dataset is not None or scenario.api == "chat":
        turn += _TEXT_SLACK
    return scenario.turns * turn + 2


def context_served(scenario: Scenario) -> int:
    """max_model_len that every precision is started with: as asked, else what is needed in steps of 256."""
    return scenario.max_model_len or -(-context_needed(scenario) // 256) * 256


def read_prompts(scenario: Scenario, tokenize: Callable[[str], list[int]] | None) -> Prompts | None:
    """The dataset's prompts, ready to be sent in every cell of a run; None for a scenario that draws its own."""
    if scenario.dataset is None:
        return None
    return tokenize_dataset(
        read_dataset(Path(scenario.dataset)),
        tokenize,
        context=context_served(scenario) // scenario.turns - _TEXT_SLACK,
        longest_answer=max(2, longest_length(scenario.output_tokens, scenario)),
        seed=scenario.seed,
    )
