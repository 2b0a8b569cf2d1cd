"""Published measurements: how a row is read, and the rule that keeps it or leaves it out."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace

import pytest

from harness.predict import published
from harness.predict.published import Lengths, PublishedLoad, Row, case
from harness.scenario import scenarios_dir

GOOD = Row(
    source="accelmark-x",
    gpu="RTX 4090 24GB",
    model="Llama-3.1-8B-Instruct",
    engine="vLLM",
    engine_version="0.7.3",
    precision="BF16",
    group_size="",
    input_len="~256 mean (ShareGPT std v1)",
    output_len="~350 mean, cap 512",
    load="Poisson 5 QPS",
    metric="tpot_p50",
    value=50.0,
    unit="ms",
    note="Poisson arrivals, 300 requests; median of runs",
)


def test_a_row_whose_conditions_are_complete_is_kept_and_read() -> None:
    found = case(GOOD)
    assert found.kept and found.condition is not None
    assert (found.quantity, found.value) == ("tpot_p50_ms", 50.0)
    assert (found.condition.card, found.condition.shape, found.condition.kernel) == (
        "rtx-4090",
        "llama-3.1-8b",
        "16bit",
    )
    assert found.condition.era == "v0"
    assert found.condition.lengths == Lengths(256.0, 350.0, 512, 0.65)
    assert found.condition.load == PublishedLoad("poisson", 300, 5.0)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"metric": "gpu_memory"}, "1"),
        ({"metric": "elapsed"}, "1"),
        ({"gpu": "NOT STATED"}, "2"),
        ({"gpu": "A100 (n/s)"}, "2"),
        ({"model": "Qwen3-30B-A3B"}, "3"),
        ({"engine": "llama.cpp"}, "4"),
        ({"engine_version": "n/s"}, "4"),
        ({"precision": "INT4 GPTQ (auto-Marlin likely)"}, "5"),
        ({"precision": "INT4 (method n/s)"}, "5"),
        ({"input_len": "n/s"}, "6"),
        ({"output_len": "ShareGPT (not stated)"}, "6"),
        ({"load": "max that fits memory (baseline batch n/s)"}, "7"),
        ({"note": "Poisson arrivals"}, "7"),
        ({"note": "Poisson arrivals, 300 requests; quantised runs use enforce_eager"}, "8"),
        ({"precision": "BF16 (presumed)"}, "8"),
    ],
)
def test_each_part_of_the_rule_leaves_out_what_breaks_it(change: dict[str, str], part: str) -> None:
    found = case(replace(GOOD, **change))  # type: ignore[arg-type]
    assert found.left_out is not None and found.left_out.startswith(part)


@pytest.mark.parametrize(
    ("engine", "version", "precision", "kernel"),
    [
        ("vLLM", "0.4.2", "INT4 GPTQ", "marlin"),
        ("vLLM", "0.4.1", "INT4 GPTQ", "exllama"),
        ("vLLM", "0.2.7", "INT4 AWQ", "awq-gemm"),
        ("vLLM", "0.4.2", "INT4 AWQ", "awq-dequant"),
        ("vLLM", "0.19.1rc1", "INT4 GPTQ W4A16 (quantization=gptq forced => exllama kernel, NOT Marlin)", "marlin"),
        ("vLLM", "0.6.3", "INT4 AWQ", "marlin"),
        ("vLLM", "0.7.3", "INT4 GPTQ W4A16 (quantization=gptq forced => exllama kernel, NOT Marlin)", "marlin"),
        ("SGLang", "0.5.6", "INT4 GPTQ W4A16 (quantization=gptq forced => exllama kernel, NOT Marlin)", "exllama"),
        ("SGLang", "0.4.6.post1", "INT4 AWQ (awq_marlin in SGLang)", "marlin"),
        ("vLLM", "0.7.3", "INT8 W8A16 (GPTQ/Marlin-type weight-only)", "w8a16"),
        ("vLLM", "0.7.3", "INT8 W8A8", "w8a8"),
        ("vLLM", "0.7.3", "FP8 W8A8 (weight-only FP8-Marlin on Ampere)", "fp8"),
        ("vLLM", "0.6.3", "INT8 GPTQ", "w8a16"),
        ("vLLM", "0.7.3", "Q4_K_M", None),
    ],
)
def test_the_kernel_follows_from_precision_and_version(
    engine: str, version: str, precision: str, kernel: str | None
) -> None:
    row = replace(GOOD, engine=engine, engine_version=version, precision=precision)
    assert published.kernel(row) == kernel


def test_what_a_runner_forces_holds_where_it_forces_it() -> None:
    """AccelMark's runner names the method to its batch engine alone; V100 has no Marlin."""
    forced = replace(GOOD, precision="INT4 GPTQ W4A16 (quantization=gptq forced => exllama kernel, NOT Marlin)")
    assert published.kernel(forced) == "marlin"
    assert published.kernel(replace(forced, load="offline, 100 reqs at once")) == "exllama"
    assert published.kernel(replace(forced, gpu="V100S 32GB")) == "exllama"


def test_total_tokens_and_requests_become_output_tokens_by_the_lengths() -> None:
    """2,048 of 2,049 tokens are output: 100 tokens/s in all are 99.95; 2.449 requests/s of 128 tokens are 313.5."""
    row = replace(GOOD, input_len="1", output_len="2048", load="1", metric="total_throughput", value=100.0)
    assert case(row).value == pytest.approx(100 * 2048 / 2049)
    row = replace(GOOD, output_len="128", load="offline, 1000 prompts", metric="request_throughput", value=2.449)
    assert case(row).value == pytest.approx(313.472)
    row = replace(GOOD, output_len="32", load="4", metric="e2e_latency", value=0.5)
    assert case(row).value == pytest.approx(4 * 32 / 0.5)


def test_every_carried_row_is_kept_with_a_condition_or_has_a_reason() -> None:
    for found in published.cases():
        assert (found.condition is not None) or not found.kept, found.row
        assert found.value is None or found.value > 0


def test_kept_rows_come_from_many_cards_and_kernels() -> None:
    kept = [found.condition for found in published.cases() if found.kept and found.condition]
    assert len({condition.card for condition in kept}) >= 12
    assert {"16bit", "marlin", "exllama", "w8a16", "w8a8", "fp8"} <= {condition.kernel for condition in kept}
    assert Counter(condition.era for condition in kept)["v1"] > 100


def test_every_source_has_an_address() -> None:
    with (scenarios_dir() / "catalogue" / "published_sources.csv").open(encoding="utf-8", newline="") as file:
        sources = list(csv.DictReader(file))
    assert all(source["url"] for source in sources)
    assert len({source["id"] for source in sources}) == len(sources)
    assert {row.source for row in published.read()} == {source["id"] for source in sources}
