"""The simulated server's /metrics: vLLM's names and buckets, so that dashboards made for vLLM show something.

Seconds are those that clients saw. There is no prefix cache: every prompt token is looked for and none is found. Beside
them, `kneebench_simulated` says that nothing was measured, and `kneebench_lag_seconds` how far this machine kept up.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from harness.predict.realtime import State

# vllm/v1/metrics/buckets.py of 0.32.0
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                  640, 2560)  # fmt: skip
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_LAG_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1)


class Exporter:
    """Counts what happens; `page` writes it out."""

    def __init__(self, model: str, card: str, precision: str, context: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._running = self._gauge("num_requests_running", "Number of requests in model execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._preemptions = self._counter("num_preemptions", "Cumulative number of preemptions.")
        self._queries = self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.")
        self._counter("prefix_cache_hits", "Prefix cache hits, in tokens: none, nothing is cached here.")
        self._prompts = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generated = self._counter("generation_tokens", "Number of generation tokens processed.")
        self._ended = Counter(
            "vllm:request_success", "Count of processed requests.", (*self._labels, "finished_reason"),
            registry=self._registry,
        )  # fmt: skip
        sizes = [float(step * 10**power) for power in range(8) for step in (1, 2, 5) if step * 10**power <= context]
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN_S)
        self._gaps = self._histogram("inter_token_latency_seconds", "Inter-token latency.", _TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "End-to-end latency.", _REQUEST_S)
        self._queued = self._histogram("request_queue_time_seconds", "Time spent in WAITING phase.", _REQUEST_S)
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prefill tokens of a request.", sizes)
        self._answer_sizes = self._histogram("request_generation_tokens", "Generation tokens of a request.", sizes)
        self._lag = Histogram(
            "kneebench_lag_seconds", "How late tokens went out.", buckets=_LAG_S, registry=self._registry
        )
        self._told_preemptions = 0
        self.worst_lag_s = 0.0
        simulated = Gauge(
            "kneebench_simulated", "1: predicted, nothing here is measured.", ("card", "precision", "model_name"),
            registry=self._registry,
        )  # fmt: skip
        simulated.labels(card, precision, model).set(1)

    def lagged(self, seconds: float) -> None:
        """Tokens of one step went out so late."""
        self._lag.observe(seconds)
        self.worst_lag_s = max(self.worst_lag_s, seconds)

    def first_token(self, prompt_tokens: int, seconds: float, queued_s: float) -> None:
        """A request has its first token: from when it was sent, and what of that it waited for its turn."""
        self._prompts.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._generated.inc()
        self._ttft.observe(seconds)
        self._queued.observe(queued_s)

    def next_token(self, gap_s: float) -> None:
        self._generated.inc()
        self._gaps.observe(gap_s)

    def ended(self, reason: str, prompt_tokens: int, tokens: int, seconds: float) -> None:
        """A request is over; `reason` is length, stop, or abort where the client went."""
        self._ended.labels(**self._labels, finished_reason=reason).inc()
        self._e2e.observe(seconds)
        self._prompt_sizes.observe(prompt_tokens)
        self._answer_sizes.observe(tokens)

    def page(self, state: State) -> bytes:
        """The page in Prometheus' text format."""
        self._running.set(state.running)
        self._waiting.set(state.waiting)
        self._kv_usage.set(state.kv_usage)
        self._preemptions.inc(state.preemptions - self._told_preemptions)
        self._told_preemptions = state.preemptions
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, tuple(self._labels), registry=self._registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, tuple(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        found = Histogram(f"vllm:{name}", text, tuple(self._labels), buckets=buckets, registry=self._registry)
        return found.labels(**self._labels)
