"""The reader of /metrics, on a page recorded from a real vLLM."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from harness.engines import EngineCounters
from harness.telemetry.prometheus import read_counters, scrape

RECORDED = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text(encoding="utf-8")


def test_recorded_page() -> None:
    # Recorded after three requests: 6 prompt tokens each, 6 + 64 + 64 generated, nothing running.
    assert read_counters(RECORDED) == EngineCounters(
        running=0,
        waiting=0,
        kv_usage=0.0,
        preemptions_total=0,
        prefix_queries_total=18,
        prefix_hits_total=0,
        prompt_tokens_total=18,
        generation_tokens_total=134,
    )


def test_page_without_our_counters_is_none_not_zero() -> None:
    assert read_counters("# TYPE other counter\nother_total 3\n") == EngineCounters()
    assert read_counters("") == EngineCounters()


def test_replicas_add_up_and_the_fullest_cache_counts() -> None:
    page = (
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 4.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n'
    )
    counters = read_counters(page)
    assert counters.running == 7
    assert counters.kv_usage == 0.75


def test_older_name_of_the_cache_use() -> None:
    assert read_counters("vllm:gpu_cache_usage_perc 0.5\n").kv_usage == 0.5


def test_waiting_by_reason_is_not_counted_as_waiting() -> None:
    page = 'vllm:num_requests_waiting{engine="0"} 2.0\nvllm:num_requests_waiting_by_reason{reason="capacity"} 2.0\n'
    assert read_counters(page).waiting == 2


@pytest.mark.parametrize(
    "reply",
    [httpx.Response(404, text="no"), httpx.Response(200, text="vllm:num_requests_running{ broken"), None],
    ids=["none there", "not a page", "no answer"],
)
def test_a_scrape_never_raises(reply: httpx.Response | None) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if reply is None:
            raise httpx.ConnectError("refused", request=request)
        return reply

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        assert scrape(client) == EngineCounters()
