"""`bench init`: a sweep.toml to begin with. starter.toml has the common options, each with its default and when to
change it; here is added what depends on the machine, and every other option, from the command itself.

Lines that are not commented out are what `bench sweep` does without any option: the file runs as it is written.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from harness.architecture import architecture, read_config
from harness.errors import InputError
from harness.files import write_whole
from harness.models import GIB
from harness.predict import cards
from harness.prices import Rent, load_prices, offer
from harness.scenario import load_scenario, scenarios_dir
from harness.telemetry.gpu import Gpu

WIDTH = 80
_LADDER = ("0.5", "1.5", "3", "7", "14", "32")
"""Billions of parameters of the Qwen2.5 models: one family whose shapes are known, from the smallest on."""
_WEIGHTS_SHARE = 0.6
"""Of a card's memory: BF16 weights up to here leave room for the KV cache of many users."""


def write(path: Path, text: str, *, force: bool = False) -> None:
    """Write the file. Raises InputError where one is there already and `force` does not say that it may go."""
    if path.exists() and not force:
        raise InputError(
            f"{path} is there already", allowed="a new name", remedy="name another file, or replace it: --force"
        )
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", remedy="name another place") from error


def text(options: Mapping[str, Any], gpus: Sequence[Gpu]) -> str:
    """The whole file. `options`: what a file may say (sweepfile.options) -> the parameter of the command."""
    template = Template(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    told = set(re.findall(r"^(?:# )?(\w+) = ", template.template, re.MULTILINE))
    others = [
        f"{_comment(option.help or '')}\n# {key} = {json.dumps(_example(key, option))}"
        for key, option in options.items()
        if key not in told
    ]
    default, rent = load_scenario("chat").usd_per_hour, _rent(gpus)
    rents = f"This card rents for {rent.words}." if rent else "`bench prices` has what cards rent for."
    return template.substitute(
        machine=_comment(_machine(gpus)),
        model=_comment(_model(gpus)),
        price=_comment(f"US dollars for an hour of the card; {default:g} where nothing is said. {rents}"),
        usd_per_hour=f"{rent.usd_per_hour if rent else default:g}",
        others="\n\n".join(others),
    )


_EXAMPLES: Mapping[str, object] = {
    "api": "chat",
    "api_key_file": "endpoint.key",
    "assume": "assumptions.toml",
    "calibration": "prompts.jsonl",
    "card": "a4000,l4",
    "client_processes": 2,
    "cluster": "auto",
    "endpoint": "http://localhost:8000",
    "engine_arg": ["--enforce-eager"],
    "engine_python": "/opt/vllm/bin/python",
    "gpu": "l4",
    "kv_cache_dtype": "fp8",
    "kv_cache_gib": 4,
    "max_cells": 24,
    "max_conc": 256,
    "max_model_len": 4096,
    "max_window": "120s",
    "port": 8000,
    "profile": "my-card.toml",
    "slo_p95": "3s",
    "vary": ["max_num_seqs=64,128,256"],
}
"""Of options without a default of their own."""


def _example(key: str, option: Any) -> object:
    """What stands in the file for an option: its default, else an example, else a placeholder of its form."""
    if option.is_flag:
        return True
    if key in _EXAMPLES or option.default is not None:
        return _EXAMPLES.get(key, option.default)
    return ["..."] if option.multiple else "..."


# --- what this machine is for -----------------------------------------------------------------------------------------


def _machine(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return (
            "Made for this machine: no NVIDIA GPU, so vLLM runs on the CPU, and its figures say nothing about a card."
        )
    return f"Made for this machine: {', '.join(f'{gpu.name}, {gpu.memory_gib:.1f} GiB' for gpu in gpus)}."


def _model(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return 'On a CPU "shape:qwen2.5-0.5b" is large enough that the effect of INT4 shows.'
    found = _largest(min(gpu.memory_gib for gpu in gpus))
    fitting = f', as "{found[0]}": its {found[1]:.1f} GiB in BF16 leave this card room for users' if found else ""
    return f"Change it first: on a card INT4 has nothing to gain with demo. Take a model of yours{fitting}."


def _largest(memory_gib: float) -> tuple[str, float] | None:
    """The largest model of the ladder whose BF16 weights leave room for users, and their GiB; None: none does."""
    fitting = None
    for size in _LADDER:
        shape = architecture(read_config(scenarios_dir() / "shapes" / f"qwen2.5-{size}b.json"))
        if shape is not None and shape.weight_bytes / GIB <= _WEIGHTS_SHARE * memory_gib:
            fitting = f"Qwen/Qwen2.5-{size}B-Instruct", shape.weight_bytes / GIB
    return fitting


def _rent(gpus: Sequence[Gpu]) -> Rent | None:
    """The first card's rent in the catalogue; None where the catalogue has none."""
    try:
        return offer(cards.card(gpus[0].name).id, load_prices()) if gpus else None
    except InputError:
        return None


def _comment(words: str) -> str:
    lines = textwrap.wrap(words, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"# {line}" for line in lines)
