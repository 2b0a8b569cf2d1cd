"""Reads vLLM's log: what it says of itself when it starts, how far it has come, and why it died. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    """Of all cards; likewise the cache."""
    kv_cache_gib: float | None = None
    taken_alike: str | None = None
    """Where fewer cards told than there are: how many did. The others are then taken to be like these."""
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    cores: str | None = None
    """On a CPU, the cores that its threads are bound to; vLLM leaves one for everybody else."""


_FACTS = {
    "version": r"LLM engine \(v([^)]{1,99})\)",
    "kernel": r"(?:Using|Selected) (?=\w+(?:Kernel\b|marlin))(\w+) (?:for|kernel)",
    "attention": r"Using (\w+) (?:attention )?backend(?: out of|\.)",
    "weights_gib": r"[Mm]odel loading took (\d{1,9}(?:\.\d+)?) Gi?B",
    "kv_cache_gib": r"(?:Available KV cache memory: |(?:Explicitly|Auto) set \()(\d{1,9}(?:\.\d+)?)",
    "kv_cache_tokens": r"KV cache size: (\d[\d,]{0,19}) tokens",
    "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: (\d{1,9}(?:\.\d+)?)x",
    "cores": r"core ids=\[([\d, ]+)\]",
}


_PROCESS = re.compile(r"^\(([^()]{0,99}\bpid=\d+[^()]{0,99})\)", re.MULTILINE)
"""In front of each line: (EngineCore pid=101), (Worker_TP1 pid=103), in mid-2025 (VllmWorker rank=1 pid=103)."""


def read_log(text: str, cards: int = 1) -> LogFacts:
    """Read vLLM's start-up log. `cards`: how many the model is spread over.

    Weights and cache are told by each card's process about its own share; they are summed here. Where only the first
    process of a machine tells (0.32: `logger.info_once`) the others are taken to be like it, and `taken_alike` says so:
    tensor parallel shares are equal, the stages of a pipeline nearly. The tokens that the cache holds are the engine's
    and not a card's; where several are told, the smallest counts, for a request needs room on every card.

    It names the kernel of quantized layers only, and a layer that no fast kernel takes by a warning; that one decides
    the speed, so it is what `kernel` says then. For the others it says dtype and quantization=None, and that is what
    `kernel` then says: "unquantized bfloat16". Which matrix library multiplies is not in the log.
    """
    found = {name: match[1] for name, pattern in _FACTS.items() if (match := re.search(pattern, text))}
    kernel = found.get("kernel")
    plain = re.search(r"dtype=torch\.(\w+),.{0,2000}?\bquantization=None", text)
    if kernel is None and plain:
        kernel = f"unquantized {plain[1]}"
    if "Falling back to unoptimized AWQ kernels" in text:
        kernel = "unoptimized AWQ"

    def least(name: str) -> float | None:
        return min((float(value.replace(",", "")) for value in re.findall(_FACTS[name], text)), default=None)

    tokens = least("kv_cache_tokens")
    weights, cache = (_of_each_process(_FACTS[name], text) for name in ("weights_gib", "kv_cache_gib"))
    told = min(len(weights) or cards, len(cache) or cards)
    return LogFacts(
        version=found.get("version"),
        kernel=kernel,
        attention=found.get("attention"),
        weights_gib=_of_all(weights, cards),
        kv_cache_gib=_of_all(cache, cards),
        taken_alike=f"{told} of {cards}" if told < cards else None,
        kv_cache_tokens=None if tokens is None else int(tokens),
        max_concurrency=least("max_concurrency"),
        cores=found.get("cores"),
    )


def _of_each_process(pattern: str, text: str) -> list[float]:
    """What each process told first; lines without a process in front are one process's."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := re.search(pattern, line):
            process = _PROCESS.match(line)
            found.setdefault(process[1] if process else "", float(match[1]))
    return list(found.values())


def _of_all(told: Sequence[float], cards: int) -> float | None:
    """The sum over the cards, those that told nothing taken to be like those that did; None: nobody told."""
    return sum(told) / len(told) * max(cards, len(told)) if told else None


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
