"""The engine's own counters, read from its /metrics page.

vLLM exports some six hundred lines, histograms for the most part. Only the wanted ones go through the parser: 0.2 ms
of this process instead of 7, so that a scrape can run beside a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from harness.engines import EngineCounters

# Newest name first. With several engine replicas (data parallel) there is one sample each: counts add up, and of the
# KV-cache use the fullest one counts, because that one preempts first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "preemptions_total": ("vllm:num_preemptions_total",),
    "prefix_queries_total": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits_total": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    "prompt_tokens_total": ("vllm:prompt_tokens_total",),
    "generation_tokens_total": ("vllm:generation_tokens_total",),
}


def read_counters(text: str) -> EngineCounters:
    """The counters in a /metrics page; None for each that it does not hold."""
    samples = _samples(text, {name for names in NAMES.values() for name in names})
    found: dict[str, list[float]] = {}
    for field, names in NAMES.items():
        found[field] = next((samples[name] for name in names if name in samples), [])

    def of(field: str) -> list[float]:
        """Its samples, if they are ones: what counts is finite and never below 0."""
        values = found[field]
        return values if all(math.isfinite(value) and value >= 0 for value in values) else []

    def total(field: str) -> int | None:
        return round(sum(of(field))) if of(field) else None

    return EngineCounters(
        running=total("running"),
        waiting=total("waiting"),
        kv_usage=max(of("kv_usage"), default=None),
        preemptions_total=total("preemptions_total"),
        prefix_queries_total=total("prefix_queries_total"),
        prefix_hits_total=total("prefix_hits_total"),
        prompt_tokens_total=total("prompt_tokens_total"),
        generation_tokens_total=total("generation_tokens_total"),
    )


def scrape(client: httpx.Client) -> EngineCounters:
    """Fetch and read /metrics now. All None when there is none or it cannot be read: counters never end a run."""
    try:
        reply = client.get("/metrics")
        return read_counters(reply.text) if reply.status_code == 200 else EngineCounters()
    except (httpx.HTTPError, ValueError):
        return EngineCounters()


def _samples(text: str, wanted: set[str]) -> dict[str, list[float]]:
    page = "\n".join(_lines_of(text, wanted)) + "\n"
    samples: dict[str, list[float]] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(float(sample.value))
    except OverflowError as error:  # of a number with hundreds of digits
        raise ValueError(f"a number that cannot be: {error}") from error
    return samples


def _lines_of(text: str, wanted: set[str]) -> Iterable[str]:
    for line in text.splitlines():
        if line.partition("{")[0].partition(" ")[0] in wanted:
            yield line
