"""The model that a prediction is about, by its name or its config.json: no weights are needed, nor anything served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import models
from harness.architecture import FAMILIES, Architecture, architecture, read_config
from harness.errors import ModelError
from harness.scenario import scenarios_dir
from harness.suggest import did_you_mean

# Fine-tuned models have the sizes of the model they were made from.
_TUNED = ("-instruct", "-chat-hf", "-chat", "-it", "-hf")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as far as its config.json says it."""

    name: str
    """What reports call it: the known shape's name, the hub's name, or the directory's."""
    config: dict[str, Any]
    architecture: Architecture


def shape(name: str) -> Shape:
    """The shape that `name` stands for. Raises ModelError, listing the known shapes, for what is none.

    `qwen2.5-7b`, `shape:qwen2.5-7b`: a known shape. A path to a config.json, or to a directory that has one. `demo`.
    `Qwen/Qwen2.5-7B-Instruct`: a hub's name, if its config.json is on this machine, else the known shape that it is
    called after: without the organisation, `Meta-`, and an ending such as `-Instruct`, in lower case.
    """
    given = name.removeprefix("shape:")
    path = _config_path(given)
    label = given if "/" in given else path.parent.name
    if path.parent == scenarios_dir() / "shapes":
        label = path.stem
    elif given == "demo":
        label = given
    elif Path(given).expanduser().exists():
        label = path.resolve().parent.name if path.name == "config.json" else path.stem
    config = read_config(path)
    found = architecture(config)
    if found is None:
        raise ModelError(
            f"--model {name}: sizes of a {config['model_type']} model are not known.",
            allowed=f"a dense decoder of these: {', '.join(FAMILIES)}",
            remedy="take a known shape of about the same size",
        )
    return Shape(label, config, found)


def _config_path(given: str) -> Path:
    known = {name: scenarios_dir() / "shapes" / f"{name}.json" for name in models.known_shapes()}
    if given.lower() in known:
        return known[given.lower()]
    if given == "demo":
        return models.resolve("demo").path / "config.json"
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    hub = models.Model(name=given, path=Path(given), is_local=False)
    if given.count("/") == 1 and (cached := hub.config_path):
        return cached
    base = _base(given)
    if base in known:
        return known[base]
    raise ModelError(
        f"--model {given}: neither a known shape nor a config.json{did_you_mean(base, known) or '.'}",
        allowed=f"{', '.join(known)}; or a path to a config.json, or to a directory that has one",
    )


def _base(name: str) -> str:
    """`meta-llama/Meta-Llama-3-8B-Instruct` -> `llama-3-8b`."""
    short = name.lower().rpartition("/")[2].removeprefix("meta-")
    ending = next((ending for ending in _TUNED if short.endswith(ending)), "")
    return short.removesuffix(ending)
