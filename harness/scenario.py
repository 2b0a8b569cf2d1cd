"""TOML -> Scenario. An error names the file and the key, says what is allowed, and nothing has been started yet."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import ScenarioError
from harness.records import Scenario

_PACKAGED = Path(__file__).parent / "_scenarios"
_IN_REPOSITORY = Path(__file__).parent.parent / "scenarios"


def scenarios_dir() -> Path:
    """The folder of scenarios, shapes and the demo model: packaged in a wheel, the repository's own otherwise."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_REPOSITORY


def scenario_names() -> list[str]:
    """Names that `load_scenario` knows without a path."""
    return sorted(path.stem for path in scenarios_dir().glob("*.toml"))


def load_scenario(name_or_path: str, **overrides: Any) -> Scenario:
    """Read a scenario by name (`chat`) or by path (`mine.toml`); overrides that are None change nothing.

    Raises ScenarioError for a file that is missing, is no TOML, or has a key or value that does not fit.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = scenarios_dir() / f"{name_or_path}.toml"
    if not path.is_file():
        raise ScenarioError(
            f"scenario {name_or_path!r} is not here",
            allowed=f"{', '.join(scenario_names())}, or the path of a .toml file",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path.name}: no readable TOML: {error}", remedy="see scenarios/chat.toml") from error
    table.setdefault("name", path.stem)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.keys() & {"input_tokens", "output_tokens", "api"}:
        given["description"] = ""  # it tells of the file's own lengths
    return check_scenario(replace(_from_table(table, path.name), **given), path.name)


def _from_table(table: dict[str, Any], source: str) -> Scenario:
    known = [field.name for field in fields(Scenario)]
    for key in table:
        if key not in known:
            raise ScenarioError(f"{source}: unknown key {key!r}", allowed=", ".join(known))
    try:
        return TypeAdapter(Scenario).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "?"
        raise ScenarioError(f"{source}: {key} = {first.get('input')!r}: {first['msg']}") from error


_RANGES: dict[str, tuple[float, float]] = {
    "input_tokens": (1, 1_000_000),
    "output_tokens": (2, 1_000_000),
    "length_jitter": (0.0, 0.9),
    "requests": (1, 1_000_000),
    "min_window_s": (0.0, 86_400.0),
    "warmup_rounds": (1, 100),
    "request_timeout_s": (0.1, 86_400.0),
    "slo_p95_s": (0.001, 86_400.0),
    "usd_per_hour": (0.0, 100_000.0),
    "utilisation": (0.001, 1.0),
}


def check_scenario(scenario: Scenario, source: str) -> Scenario:
    """Return the scenario when every value is in range; raise ScenarioError naming the key otherwise.

    Two output tokens are the least because TPOT divides by (tokens - 1).
    """
    for key, (low, high) in _RANGES.items():
        value = getattr(scenario, key)
        if not low <= value <= high:
            raise ScenarioError(f"{source}: {key} = {value}", allowed=f"{low:g} to {high:g}")
    longest = context_needed(scenario)
    if scenario.max_model_len is not None and scenario.max_model_len < longest:
        raise ScenarioError(
            f"{source}: max_model_len = {scenario.max_model_len} holds no request of this scenario",
            allowed=f"{longest} or more (input + output tokens, jitter included)",
        )
    return scenario


def context_needed(scenario: Scenario) -> int:
    """Tokens of the longest request that the scenario can draw."""
    stretch = 1 + scenario.length_jitter
    return int(scenario.input_tokens * stretch) + int(scenario.output_tokens * stretch) + 2


def context_served(scenario: Scenario) -> int:
    """max_model_len that every precision is started with: as asked, else what is needed in steps of 256."""
    return scenario.max_model_len or -(-context_needed(scenario) // 256) * 256
