"""Our kernels in vLLM: how a precision asks for them, and how vLLM's processes find them.

    awq              served with the kernels that vLLM chooses
    awq@kneebench    the same checkpoint with ours (quantize/kernels), by vLLM's `--quantization kneebench`

vLLM loads its plugins in each of its processes, from the entry points of the distributions on the path. So nothing is
installed anywhere: `FOLDER` holds the metadata of a distribution with such an entry point, and a package `quantize`
that leads to ours. It goes on the PYTHONPATH of the server, and what that spawns inherits it. This changes no
environment, the user's own (--engine-python) least of all; it is the same for a checkout and for an installed wheel;
and the plugin is never of another version than we are. Nothing else of ours is in sight there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from harness.engines.environment import EngineEnv
from harness.errors import EngineError, InputError

NAME = "kneebench"
"""Behind an @: our kernels. Also vLLM's name for them, and the plugin's."""
FOLDER = Path(__file__).parent / "vllm_plugin"

_OURS = "Kneebench"
"""How the kernels' names begin that the plugin writes into vLLM's log (quantize/vllm_plugin.py)."""

_ASK = """
import importlib.metadata, importlib.util, json
points = {point.name: point.value for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
module = points.get("kneebench", "").partition(":")[0]
print(json.dumps(bool(module) and importlib.util.find_spec(module) is not None))
"""


def split(precision: str) -> tuple[str, str | None]:
    """`awq@kneebench` -> awq, kneebench; `awq` -> awq, None. Raises InputError for kernels that there are not."""
    name, at, kernels = precision.partition("@")
    if at and kernels != NAME:
        raise InputError(
            f"--precisions {precision}: no kernels are called {kernels!r}",
            allowed=f"{name}@{NAME} for ours, or {name} for those that vLLM chooses",
        )
    return name, kernels or None


def kernels_of(precision: str) -> str | None:
    """The kernels that a precision names; None: vLLM chooses. Raises InputError for kernels that there are not."""
    return split(precision)[1]


def flags(precision: str) -> list[str]:
    """What the precision adds to vLLM's command line."""
    kernels = kernels_of(precision)
    return ["--quantization", kernels] if kernels else []


def surroundings(precision: str, others: Mapping[str, str]) -> dict[str, str]:
    """`others`, the environment variables of a server, with what it needs to find the kernels of this precision."""
    if kernels_of(precision) is None:
        return dict(others)
    found = {**others, "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), others.get("PYTHONPATH", "")]))}
    if "VLLM_PLUGINS" in found:  # the user's list of plugins to load, all others being left out
        found["VLLM_PLUGINS"] = ",".join(filter(None, [found["VLLM_PLUGINS"], NAME]))
    return found


def check_taken(precision: str, kernel: str | None) -> None:
    """Raise EngineError where vLLM's log names other kernels than the precision: its rows would bear a wrong name."""
    if kernels_of(precision) and kernel is not None and not kernel.startswith(_OURS):
        raise EngineError(
            f"--precisions {precision}: vLLM runs {kernel}, not the kernels that were asked for",
            remedy="leave --quantization out of --engine-arg",
        )


def is_found(env: EngineEnv) -> bool:
    """Whether this Python finds the plugin, as vLLM will look for it; imports neither vLLM nor torch."""
    around = surroundings(f"any@{NAME}", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    try:
        reply = subprocess.run([env.python, "-c", _ASK], env=around, capture_output=True, text=True, timeout=60)
        return bool(json.loads(reply.stdout))
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError):
        return False
