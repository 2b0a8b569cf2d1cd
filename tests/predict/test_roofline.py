"""Step times: a hand-worked layer, what must follow from physics, and effects that others have published.

The effects are computed with the coefficients that ship (scenarios/catalogue/coefficients.toml).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.predict import cards, coefficients, shapes
from harness.predict.expect import expected
from harness.predict.published import Condition, Lengths, PublishedLoad
from harness.predict.roofline import KERNELS, NAMES, Coefficients, Factors, Steps, fused, kernel_of, weight_bytes

A10G, L4 = cards.card("a10g"), cards.card("l4")
MISTRAL = shapes.shape("mistral-7b").architecture
SHAREGPT = Lengths(217.0, 202.0)
"""Means of ShareGPT as vLLM's benchmark_serving filters it: 217,393 tokens in and 201,847 out for 1,000 prompts
(https://github.com/vllm-project/vllm, benchmarks/README of 0.6)."""


def steps(card: str, shape: str, kernel: str, **given: object) -> Steps:
    found = shapes.shape(shape).architecture
    return Steps(cards.card(card), found, KERNELS[kernel], coefficients.fitted(), **given)  # type: ignore[arg-type]


def tpot(found: Steps, sequences: int, context: int) -> float:
    base, slope = found.decode(sequences)
    return base + slope * context


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """4,096 x 4,096 on one token, 16 bit, L4 with all shares 1, a sharp corner and no multiprocessors' ceiling:

    33,554,432 bytes of weights + 2 · (4,096 + 4,096) = 16,384 moved, over 300e9 bytes/s = 111.9 us; 33.5 MFLOP over
    121e12 = 0.28 us. On 8,192 tokens: 2 · 8,192 · 4,096² = 274.9 GFLOP over 121e12 = 2,271.7 us against 559.2 us.
    """
    plain = replace(Coefficients(), read_16=1.0, mma_16=1.0, sm_16_gb_s=1e9, corner=64.0)
    found = Steps(L4, MISTRAL, KERNELS["16bit"], plain)
    assert found.linear(4096, 4096, 1) == pytest.approx((33_554_432 + 16_384) / 300e9, rel=1e-6)
    assert found.linear(4096, 4096, 8192) == pytest.approx(2 * 8192 * 4096**2 / 121e12, rel=1e-6)


def test_stored_weights_by_hand() -> None:
    """4,096 x 1,024 in 4 bits: 2,097,152 bytes, and 32 groups x 1,024 scales of 2 bytes = 65,536; AWQ's zero points are
    4 bits more each: 16,384."""
    assert weight_bytes(KERNELS["16bit"], 4096, 1024) == 4096 * 1024 * 2
    assert weight_bytes(KERNELS["marlin"], 4096, 1024) == 2_097_152 + 65_536
    assert weight_bytes(KERNELS["awq-gemm"], 4096, 1024) == 2_097_152 + 65_536 + 16_384


def test_prompt_attention_by_hand() -> None:
    """1,000 pairs, 32 heads of 128, 32 layers, QK and PV: 4 · 1,000 · 32 · 128 · 32 = 524 MFLOP, over 121e12 · 0.5."""
    found = Steps(L4, MISTRAL, KERNELS["16bit"], replace(Coefficients(), mma_attention=0.5))
    assert found._attention(1000) == pytest.approx(524_288_000 / (121e12 * 0.5), rel=1e-9)


def test_fused_linears_are_all_of_them() -> None:
    for name in ("llama-3-8b", "qwen2.5-7b", "phi-2", "gemma-2-2b"):
        shape = shapes.shape(name).architecture
        parameters = shape.layers * sum(k * n for k, n in fused(shape))
        assert parameters == shape.linear_parameters, name


# --- what follows from physics ----------------------------------------------------------------------------------------


# Those that change over to another kernel at some number of tokens do so to become faster.
@given(st.sampled_from(sorted(set(KERNELS) - {"awq-dequant"})), st.integers(1, 256), st.integers(0, 4000))
def test_more_work_takes_longer(kernel: str, sequences: int, context: int) -> None:
    found = steps("l4", "qwen2.5-7b", kernel)
    assert tpot(found, sequences + 1, context) >= tpot(found, sequences, context)
    assert tpot(found, sequences, context + 1) > tpot(found, sequences, context)
    prompt = found.mixed(sequences, context, 100, 5050, 1)
    assert found.mixed(sequences, context, 200, 20_100, 1) > prompt > tpot(found, sequences, context)


@given(st.sampled_from(["bandwidth", "tensor"]), st.integers(1, 64))
def test_a_better_card_is_not_slower(what: str, sequences: int) -> None:
    one = steps("l4", "qwen2.5-7b", "16bit")
    two = steps("l4", "qwen2.5-7b", "16bit", factors=Factors(**{what: 2.0}))
    assert tpot(two, sequences, 1000) < tpot(one, sequences, 1000)


def test_every_coefficient_matters() -> None:
    """A coefficient that changes nothing would be fitted to nothing."""
    from harness.predict import fit
    from harness.predict.expect import uses
    from harness.predict.published import cases

    used = {name for case in cases() if case.kept and case.condition for name in uses(case.condition)}
    assert used | {"plateau_awq", "row_awq"} == set(NAMES)
    for point in fit.curves():
        assert point.predicted(Coefficients()) > 0


def test_kernels_of_precisions() -> None:
    t4, volta, ada = cards.card("t4"), cards.card("v100-32gb-pcie"), cards.card("rtx-4080")
    assert kernel_of(ada, "awq") == kernel_of(t4, "gptq") == "marlin"
    assert kernel_of(volta, "gptq") == "exllama"
    assert kernel_of(ada, "fp8") == "fp8" and kernel_of(A10G, "fp8") == "fp8-marlin"
    assert kernel_of(ada, "awq@awq-gemm") == "awq-gemm"
    for card, wrong in ((volta, "awq"), (ada, "nf4"), (ada, "awq@fast")):
        with pytest.raises(InputError, match="no .*kernel"):
            kernel_of(card, wrong)


# --- published effects ------------------------------------------------------------------------------------------------


def low_rate(card: str, shape: str, kernel: str) -> float:
    """TPOT at 0.5 requests a second, ms."""
    load = PublishedLoad("poisson", 150, 0.5)
    condition = Condition(card, shape, kernel, "v0", "vLLM", "0.5.0", SHAREGPT, load)
    return expected(condition, coefficients.fitted())["tpot_p50_ms"]


def test_int4_is_more_than_three_times_as_fast_on_an_a10g_at_a_low_rate() -> None:
    """nm-vllm's nightly benchmarks (github.com/neuralmagic/nm-vllm, gh-pages, dev/bench): Mistral 7B at 0.5 requests a
    second, TPOT 36.3 ms in FP16 and 11.0 ms in Marlin: 3.3 times."""
    ratio = low_rate("a10g", "mistral-7b", "16bit") / low_rate("a10g", "mistral-7b", "marlin")
    assert 36.273 / 11.017 == pytest.approx(3.3, abs=0.05)
    assert ratio == pytest.approx(3.3, rel=0.15)


def test_the_gain_shrinks_with_model_size_context_and_faster_memory() -> None:
    """Qwen2.5 on A100 in vLLM 0.6.3 (qwen.readthedocs.io, speed benchmark), tokens/s of one stream, GPTQ over BF16:
    14B 2.12, 7B 1.83, 3B 1.32, 1.5B 1.18, 0.5B 0.84; 7B after 30,720 tokens 1.54. A10G 7B: 3.3 (above)."""

    def gain(card: str, shape: str, context: int = 1000) -> float:
        plain, int4 = (tpot(steps(card, shape, kernel, era="v0"), 1, context) for kernel in ("16bit", "marlin"))
        return plain / int4

    sizes = [gain("a100-80gb-sxm", f"qwen2.5-{size}b") for size in ("14", "7", "3", "1.5", "0.5")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == pytest.approx([2.12, 1.83, 1.32, 1.18, 0.84], rel=0.25)
    assert gain("a100-80gb-sxm", "qwen2.5-7b", 31_744) < gain("a100-80gb-sxm", "qwen2.5-7b")
    assert gain("h100-80gb-sxm", "qwen2.5-7b") < gain("a100-80gb-sxm", "qwen2.5-7b") < gain("a10g", "qwen2.5-7b")


def test_marlin_is_flat_up_to_some_tokens_and_slower_than_16_bit_on_long_prompts() -> None:
    """github.com/IST-DASLab/marlin: 3.87 times at 1 token, 3.90 at 16, 3.82 at 32, 1.56 at 128 on an A10 (18,432 x
    73,728). vllm-project/vllm pull request 2497: 0.73 at 512 tokens, 0.6 at 2,048."""
    found = steps("a10", "llama-2-7b", "marlin")

    def gain(tokens: int) -> float:
        layer = (18_432, 73_728, tokens)
        return found.linear(*layer, KERNELS["16bit"]) / found.linear(*layer)

    assert gain(1) == pytest.approx(3.87, rel=0.1)
    assert gain(16) == pytest.approx(gain(1), rel=0.1)
    assert gain(32) > 0.75 * gain(1)
    assert gain(128) == pytest.approx(1.56, rel=0.3)
    assert gain(512) < 1 and gain(2048) < gain(256) < gain(64)


def test_awqs_own_kernel_is_slower_than_16_bit_from_four_tokens() -> None:
    """The same figure of Marlin's: AWQ 3.37 times at 1 token, 1.73 at 2, 0.86 at 4, 0.44 at 8."""
    found = steps("a10", "llama-2-7b", "awq-gemm")

    def gain(tokens: int) -> float:
        layer = (18_432, 73_728, tokens)
        return found.linear(*layer, KERNELS["16bit"]) / found.linear(*layer)

    assert gain(1) > 2.5 and gain(2) > 1 > gain(4) > gain(8)


def test_16_bit_dies_of_kv_capacity_where_int4_does_not() -> None:
    """AccelMark, RTX 4090 (24 GB), Llama 3.1 8B, 10 requests a second (suite C of verified/nvidia_geforce_rtx_4090x1):
    median TTFT 18,009 ms in BF16, 142 ms in INT4. BF16 leaves a few GiB of the card to the cache, which about 60
    answers fill; requests wait for blocks, not for the processor, which is as busy in both."""
    load, lengths = PublishedLoad("poisson", 300, 10.0), Lengths(256.0, 350.0, 512, 0.65)
    ttft = {}
    for kernel in ("16bit", "marlin"):
        condition = Condition("rtx-4090", "llama-3.1-8b", kernel, "v0", "vLLM", "0.7.3", lengths, load)
        ttft[kernel] = expected(condition, coefficients.fitted())["ttft_p50_ms"]
    assert ttft["16bit"] > 5_000
    assert ttft["marlin"] < 500


def test_keys_and_values_of_every_head_fill_a_card_sooner() -> None:
    """nm-vllm's nightly benchmarks, A10G (24 GB), 5 requests a second: median TTFT 244,595 ms with Llama 2 7B in FP16,
    whose tokens take 0.5 MiB each; 162 ms with Mistral 7B in Marlin, whose tokens take a quarter of that."""
    load = PublishedLoad("poisson", 1500, 5.0)
    waits = Condition("a10g", "llama-2-7b", "16bit", "v0", "vLLM", "0.5.0", SHAREGPT, load)
    serves = replace(waits, shape="mistral-7b", kernel="marlin")
    assert expected(waits, coefficients.fitted())["ttft_p50_ms"] > 60_000
    assert expected(serves, coefficients.fitted())["ttft_p50_ms"] < 500
