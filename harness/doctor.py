"""What is here and what is missing, for which command, and what brings it. `bench doctor` prints what `examine` finds.

Nothing here imports what it looks for: a broken torch must not break the doctor.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import __version__
from harness.engines import environment, plugin
from harness.scenario import scenarios_dir
from harness.telemetry.gpu import Gpu, gpus
from harness.telemetry.host import host

GIB = 2**30
_WANTED_DISK_GIB = 8.0
_WANTED_MEMORY_GIB = 4.0
_WANTED_FILES = 1024

State = Literal["ok", "missing", "caution"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `remedy` is empty where there is nothing to mend."""

    what: str
    state: State
    detail: str
    needed_for: str = ""
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything that a command may need, in the order of a first session."""
    cards = gpus()
    return [
        _python(),
        _processor(),
        _memory(),
        _disk(),
        _open_files(),
        _gpu(cards),
        _nvcc(cards),
        _engine("cpu", cards),
        _engine("cuda", cards),
        _kernels(),
        _extra(
            "quantize",
            ("torch", "transformers", "tokenizers", "safetensors"),
            "bench quantize, and awq/gptq in a sweep",
        ),
        _extra("tasks", ("lm_eval",), "bench quality --tasks"),
        _sandbox(),
        _extra("cluster", ("ray",), "sweeps over several machines"),
        _demo_model(),
    ]


def _python() -> Finding:
    detail = f"kneebench {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("kneebench", "ok", detail)
    return Finding(
        "kneebench",
        "caution",
        f"{detail}; only Linux stamps arrivals in the kernel",
        "latencies free of this process's own delays",
        "measure from a Linux machine",
    )


def _processor() -> Finding:
    machine = host()
    detail = f"{machine.cpu}, {machine.cores} cores for us"
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in _cpu_flags()]
    if wide:
        detail += f", {' '.join(wide)}"
    if machine.cores >= 2:
        return Finding("processor", "ok", detail)
    return Finding(
        "processor",
        "caution",
        detail,
        "bench sweep: the load and the server share one core",
        "use a machine with two cores or more, or expect points marked client_bound",
    )


def _cpu_flags() -> frozenset[str]:
    try:
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return frozenset(match[1].split()) if match else frozenset()


def _memory() -> Finding:
    machine = host()
    detail = f"{machine.memory_gib:.1f} GiB, {machine.available_gib:.1f} free"
    if machine.available_gib >= _WANTED_MEMORY_GIB:
        return Finding("memory", "ok", detail)
    return Finding(
        "memory",
        "caution",
        detail,
        "the engine on a CPU, and quantizing",
        f"free some: the demo wants {_WANTED_MEMORY_GIB:.0f} GiB",
    )


def _disk() -> Finding:
    place = environment.home("cpu").parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    detail = f"{free:.1f} GiB free under {place}"
    if free >= _WANTED_DISK_GIB:
        return Finding("disk", "ok", detail)
    return Finding(
        "disk",
        "caution",
        detail,
        "bench engine install (cpu 4 GiB, cuda 15 GiB) and quantized checkpoints",
        "free some, or point XDG_CACHE_HOME at a larger disk",
    )


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at once"
    if soft == resource.RLIM_INFINITY or soft >= _WANTED_FILES:
        return Finding("open files", "ok", detail)
    return Finding(
        "open files",
        "caution",
        detail,
        "concurrencies in the hundreds (one connection each)",
        f"ulimit -n {4 * _WANTED_FILES}",
    )


def _gpu(cards: tuple[Gpu, ...]) -> Finding:
    if not cards:
        return Finding(
            "GPU",
            "missing",
            "no NVIDIA GPU seen",
            "figures that mean something for an RTX card",
            "if there is one, see that `nvidia-smi` finds it; without one the CPU engine runs everything, slower",
        )
    listed = ", ".join(f"{card.name} ({card.memory_gib:.1f} GiB, {card.used_gib:.1f} used)" for card in cards)
    detail = f"{listed}; driver {cards[0].driver}, serves CUDA up to {cards[0].cuda}"
    return Finding("GPU", "ok", detail)


def _nvcc(cards: tuple[Gpu, ...]) -> Finding:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    if found is None:
        return Finding(
            "nvcc",
            "missing" if cards else "ok",
            "none" if cards else "none, and without a GPU nothing to compile for",
            "the CUDA kernels of quantize (their torch fallback runs without)" if cards else "",
            "install the CUDA toolkit, or set CUDA_HOME" if cards else "",
        )
    try:
        told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    release = re.search(r"release ([\d.]+)", told)
    return Finding("nvcc", "ok", f"CUDA {release[1]} at {found}" if release else found)


def _engine(kind: environment.Kind, cards: tuple[Gpu, ...]) -> Finding:
    what = f"vLLM ({kind})"
    ready = next((env for env in environment.installed() if env.kind == kind), None)
    if ready is not None:
        return Finding(what, "ok", f"vLLM {ready.vllm_version}, torch {ready.torch_version}, {environment.home(kind)}")
    suits = (kind == "cuda") == bool(cards)
    begun = environment.home(kind).exists()
    detail = "begun, not finished" if begun else "not installed"
    if not suits and not begun:
        return Finding(what, "ok", f"{detail}, and not needed on this machine")
    return Finding(
        what, "missing", detail, "bench sweep, unless --endpoint or --engine-python", f"bench engine install {kind}"
    )


def _kernels() -> Finding:
    what, ready = "kernels in vLLM", environment.installed()
    if not ready:
        return Finding(what, "ok", "no vLLM here to bring them into")
    env = ready[0]
    if not plugin.is_found(env):
        return Finding(
            what,
            "missing",
            f"vLLM {env.vllm_version} ({env.kind}) does not find our plugin",
            f"precisions with @{plugin.NAME}",
            "install kneebench again",
        )
    how = "on the GPU" if env.kind == "cuda" else "in torch, without a GPU: for their answers, not for their speed"
    return Finding(what, "ok", f"awq@{plugin.NAME} runs {how}")


def _extra(name: str, packages: tuple[str, ...], needed_for: str) -> Finding:
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    missing = [package for package in packages if package not in versions]
    if missing:
        return Finding(
            f"extra {name}", "missing", f"no {', '.join(missing)}", needed_for, f"pip install 'kneebench[{name}]'"
        )
    return Finding(f"extra {name}", "ok", ", ".join(f"{package} {version}" for package, version in versions.items()))


def _sandbox() -> Finding:
    from harness.quality.sandbox import find_runner

    runner = find_runner()
    if runner is not None:
        return Finding("sandbox", "ok", runner.name)
    return Finding(
        "sandbox",
        "missing",
        "neither bubblewrap nor user namespaces",
        "judging code that a model wrote (bench failures, bench quality)",
        "install bubblewrap (Debian: apt-get install bubblewrap), or allow unprivileged user namespaces",
    )


def _demo_model() -> Finding:
    where = scenarios_dir() / "demo-model"
    if (where / "config.json").is_file() and any(where.glob("*.safetensors")):
        return Finding("demo model", "ok", "--model demo")
    return Finding("demo model", "missing", f"not in {where}", "bench demo, --model demo", "install kneebench again")
