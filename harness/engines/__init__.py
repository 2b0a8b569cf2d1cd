"""Engines: whatever answers the OpenAI API. One small protocol, three ways to have one.

    vllm.py       starts vLLM in its own environment, reads its log, stops it
    endpoint.py   a URL where something runs already

Each is a context manager that yields an Engine: entering waits until it answers, leaving ends what it started.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from harness.records import Source

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `api_key` never appears in repr, records or logs."""

    base_url: str
    """Up to and without /v1: http://127.0.0.1:8000"""
    model: str
    """The name that the server knows the model by."""
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """One server to start: the same limits for every precision, or the comparison is not one."""

    model: Path
    precision: str
    """What tables call it. Behind an @ stand the kernels that are to serve it (plugin.py)."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    max_model_len: int = 1024
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """None: the engine's own for the card."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    kv_cache_dtype: str | None = None
    """None: as the model's."""
    dummy_weights: bool = False
    """`--load-format dummy`: speed needs no weights."""
    kv_cache_gib: float | None = None
    """CPU only: the KV cache's size. None: the engine's default for the machine."""
    gpu_memory_utilization: float = 0.9
    host: str = LOOPBACK
    """Where it listens: on the loopback, but for load that comes from other nodes of a cluster."""
    port: int | None = None
    extra_args: tuple[str, ...] = ()

    @property
    def cards(self) -> int:
        """How many the engine runs on."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine said of itself when it started. None: it did not say."""

    engine: str
    engine_version: str | None = None
    device: Literal["gpu", "host"] | None = None
    """Which memory the figures are about."""
    gpu: str | None = None
    kernel: str | None = None
    """The kernel behind the linear layers, as the engine names it (CPUWNA16LinearKernel, MarlinLinearKernel ...)."""
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    """How many requests of max_model_len tokens the KV cache holds at once, by the engine's own log."""
    source: Source = "engine"
    start_s: float | None = None
    """From its start to its first answer to /health, seconds: time of a card that no row shows."""
    settings: dict[str, str] = field(default_factory=dict)
    """Every flag and environment variable that we set and that bears on the numbers."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """The engine's own counters at one moment; None where it exports none. `_total` ones only ever grow."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    """0..1"""
    preemptions_total: int | None = None
    prefix_queries_total: int | None = None
    prefix_hits_total: int | None = None
    prompt_tokens_total: int | None = None
    generation_tokens_total: int | None = None


class Engine(Protocol):
    """A server under load."""

    @property
    def target(self) -> Target: ...

    @property
    def info(self) -> EngineInfo: ...

    def counters(self) -> EngineCounters:
        """Scrape the engine's counters now; all None where it has none. Never raises."""
        ...

    def memory_gib(self) -> float | None:
        """Memory that the engine holds now: NVML's figure for its processes on a GPU, resident memory on a CPU."""
        ...

    def pids(self) -> frozenset[int]:
        """Its processes on this machine; empty where they are not known."""
        ...

    def check(self) -> None:
        """Raise EngineError, with the engine's own last error lines, when it has died."""
        ...
