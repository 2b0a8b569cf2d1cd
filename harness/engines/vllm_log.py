"""Reads vLLM's log: what it says of itself when it starts, how far it has come, and why it died. Pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogFacts:
    """What vLLM's log says; None for each thing that it does not."""

    version: str | None = None
    kernel: str | None = None
    attention: str | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    cores: str | None = None
    """On a CPU, the cores that its threads are bound to; vLLM leaves one for everybody else."""


_FACTS = {
    "version": r"LLM engine \(v([^)]+)\)",
    "kernel": r"(?:Using|Selected) (\w+(?:Kernel|marlin\w*)) (?:for|kernel)",
    "attention": r"Using (\w+) (?:attention )?backend(?: out of|\.)",
    "weights_gib": r"[Mm]odel loading took ([\d.]+) Gi?B",
    "kv_cache_gib": r"(?:Available KV cache memory: |(?:Explicitly|Auto) set \()([\d.]+)",
    "kv_cache_tokens": r"KV cache size: ([\d,]+) tokens",
    "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "cores": r"core ids=\[([\d, ]+)\]",
}


def read_log(text: str) -> LogFacts:
    """Read vLLM's start-up log.

    It names the kernel of quantized layers only, and a layer that no fast kernel takes by a warning; that one decides
    the speed, so it is what `kernel` says then. For the others it says dtype and quantization=None, and that is what
    `kernel` then says: "unquantized bfloat16". Which matrix library multiplies is not in the log.
    """
    found = {name: match[1] for name, pattern in _FACTS.items() if (match := re.search(pattern, text))}
    kernel = found.get("kernel")
    plain = re.search(r"dtype=torch\.(\w+),.*?\bquantization=None", text)
    if kernel is None and plain:
        kernel = f"unquantized {plain[1]}"
    if "Falling back to unoptimized AWQ kernels" in text:
        kernel = "unoptimized AWQ"

    def number(name: str) -> float | None:
        return float(found[name].replace(",", "")) if name in found else None

    tokens = number("kv_cache_tokens")
    return LogFacts(
        version=found.get("version"),
        kernel=kernel,
        attention=found.get("attention"),
        weights_gib=number("weights_gib"),
        kv_cache_gib=number("kv_cache_gib"),
        kv_cache_tokens=None if tokens is None else int(tokens),
        max_concurrency=number("max_concurrency"),
        cores=found.get("cores"),
    )


# What the log shows last -> what the server is doing now. Later entries are later stages.
_STAGES = (
    ("version ", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting its worker"),
    ("Starting to load model", "loading weights"),
    ("KV cache size", "warming up"),
    ("Starting vLLM", "opening its port"),
)


def stage(text: str) -> str:
    """What the server is doing, by its log so far."""
    return next((words for mark, words in reversed(_STAGES) if mark in text), "importing libraries")


_STARTED = "Application startup complete."
_PREFIX = re.compile(r"^\(\w[\w-]* pid=\d+\)\s?")
_LEVEL = re.compile(r"^(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\]\s?")
_RAISED = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b(?::|$)|Fatal Python error: )")
# These only say that something else, further up, went wrong.
_ECHOES = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "RuntimeError: cancelled",
)

# Signature in the engine's error -> what to do about it.
_REMEDIES = (
    (
        r"Fatal Python error",
        "the engine's native code crashed: try another precision or a newer engine, and report it with this log",
    ),
    (
        r"out of memory|OutOfMemory|not enough GPU memory|Cannot allocate memory|SIGKILL",
        "the model does not fit: take a quantized precision or a smaller model, lower max_model_len, or end what else "
        "uses this memory",
    ),
    (
        r"No available memory for the cache|larger than the available KV cache"
        r"|larger than the maximum number of tokens",
        "the KV cache is too small for one request: lower max_model_len, or give it more memory (GPU: "
        "--gpu-memory-utilization; CPU: kv_cache_gib)",
    ),
    (r"less than desired|less than requested memory", "free memory that other processes hold, or ask for less of it"),
    (r"[Aa]ddress already in use", "leave the port out and a free one is taken"),
    (r"max_model_len .* is greater than the derived", "ask for a context no longer than the model was trained for"),
    (
        r"Unknown quantization method|Unsupported num_bits|Cannot find the config file|not supported for quantization"
        r"|Failed to find a kernel",
        "serve a format that this engine and card support: awq or gptq with 4 bits and a group size of 128 runs widely",
    ),
    (r"Bfloat16 is only supported", "this card has no bfloat16: serve with dtype float16"),
    (r"Cannot find any model weights", "the directory holds no weights: finish the download or the quantization"),
    (
        r"does not recognize this architecture|architectures? .* (?:is|are) not supported",
        "this vLLM does not know the architecture: take a model that it supports, or a newer vLLM (--engine-python)",
    ),
    (r"Invalid repository ID|is not a local folder|offline mode|LocalEntryNotFound", "check the model's name or path"),
    (r"gated repo|401 Client Error|403 Client Error", "this model wants a login: set HF_TOKEN in the environment"),
    (
        r"Failed to infer device type|No CUDA GPUs|NVIDIA driver",
        "this environment needs an NVIDIA GPU: use the CPU one",
    ),
    (r"ModuleNotFoundError|ImportError|cannot open shared object", "reinstall it: bench engine install cpu|cuda"),
    (r"unrecognized arguments|expected one argument", "this vLLM does not know a flag: check the extra arguments"),
)


def last_error(text: str) -> tuple[list[str], str]:
    """(the engine's own last error lines, what to do about them) from its log.

    The first exception that is not an echo of another is the cause: vLLM prints it in the process where it happened,
    then every process above reports that something below it failed. What it survived while starting is no cause.
    """
    text = text.rpartition(_STARTED)[2]
    lines = [_LEVEL.sub("", _PREFIX.sub("", line)) for line in text.splitlines()]
    raised = [index for index, line in enumerate(lines) if _RAISED.match(line)]
    causes = [index for index in raised if not any(echo in lines[index] for echo in _ECHOES)]
    if causes:
        cause = causes[0]
        shown = [lines[cause]]
        if "validation error" in lines[cause]:  # pydantic: the message follows, with its input in brackets behind
            shown = [re.sub(r"^Value error, |\s*\[type=.*", "", line.strip()) for line in lines[cause + 1 : cause + 2]]
    else:
        shown = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)][-3:]
        shown = shown or [line for line in lines if line.strip()][-5:]
    said = "\n".join(shown)
    remedy = next((words for pattern, words in _REMEDIES if re.search(pattern, said)), "")
    return [line[:600] for line in shown], remedy
