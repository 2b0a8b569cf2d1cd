"""Reads vLLM's log: what it says of itself when it starts, how far it has come, and why it died. Pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.engines.modes import advice, find_modes, messages, mode_of


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
# These only say that something else, further up, went wrong.
_ECHOES = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "RuntimeError: cancelled",
)


def last_error(text: str) -> tuple[list[str], str]:
    """(the engine's own last error lines, what to do about them) from its log.

    The first exception that is not an echo of another is the cause: vLLM prints it in the process where it happened,
    then every process above reports that something below it failed. One that the catalogue of failure modes knows goes
    before one that it does not: a bare TimeoutError, and what came of it. What it survived while starting is no cause.
    """
    _, started, after = text.rpartition(_STARTED)
    when: Literal["load", "service"] = "service" if started else "load"
    causes = [
        message for message in messages(after) if message.raised and not any(echo in message.text for echo in _ECHOES)
    ]
    modes = [(cause, mode) for cause in causes if (mode := mode_of(cause, when) or mode_of(cause))]
    if modes:
        cause, mode = modes[0]
        return [cause.text[:600]], advice(mode)
    if causes:
        return [causes[0].text[:600]], ""
    if met := max(find_modes(text), key=lambda met: met.line_number or 0, default=None):
        return [met.line], advice(met.mode)
    lines = [message.text for message in messages(after)]
    shown = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)][-3:]
    return [line[:600] for line in shown or [line for line in lines if line.strip()][-5:]], ""
