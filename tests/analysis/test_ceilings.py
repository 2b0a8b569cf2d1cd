"""Bytes and FLOPs of a step, by hand and beside LLM-Viewer's figures for Llama 2 7B."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.ceilings import (
    LINEARS,
    STEP,
    Ceiling,
    Point,
    Work,
    attention_work,
    head_work,
    linear_work,
    of_card,
    points,
    raised,
    route_of,
    side,
    step_work,
    tokens_to_ridge,
)
from harness.analysis.timeline import Profile
from harness.architecture import Architecture, Quantization
from harness.predict.cards import card

LLAMA = Architecture("llama", 32, 4096, 11008, 32, 32, 128, 32000, False, 4096)
A6000 = Ceiling("A6000", 768, 154.8385, "FP16", "as in LLM-Viewer")
INT4 = Quantization("awq", 4, 128, True)
TINY = Architecture("llama", layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=32,
                    tied=False, max_positions=64)  # fmt: skip


def test_linear_layers_of_llama_2_7b_are_those_of_llm_viewer() -> None:
    """LLM-Viewer (Yuan et al., LLM Inference Unveiled, arXiv:2402.16363; repository hahnyuan/LLM-Viewer at 472f71f) for
    Llama-2-7b, batch 1, 2,048 tokens: its seven projections in 32 layers, 12,952,010,752 operations and 12,957,007,872
    bytes a decode step, 12,952,010,752 of them weights; 26,525,718,020,096 operations in the prefill. Engines run q, k
    and v as one, and gate and up: 3 inputs of 4096 values are not read again, in 32 layers, 2 bytes each."""
    one, two = linear_work(LLAMA, 1, "gemm")["gemm"], linear_work(LLAMA, 2, "gemm")["gemm"]
    assert one.flops == 12_952_010_752
    assert 2 * one.bytes - two.bytes == 12_952_010_752  # weights: what a second token does not add
    assert one.bytes == 12_957_007_872 - 3 * 4096 * 2 * 32
    assert linear_work(LLAMA, 2048, "gemm")["gemm"].flops == 26_525_718_020_096


def test_attention_of_llama_2_7b_is_that_of_llm_viewer() -> None:
    """Its qk and sv of a decode step with 2,048 tokens: 536,870,912 operations and as many bytes of cache each, in 32
    layers. Its prefill is not causal, 1,099,511,627,776 each: ours has T (T + 1) / 2 of its T² pairs.
    Beside the cache we count the new token's keys and values, 2 · 32 · 4096 · 2 bytes, and its queries and outputs."""
    decode = attention_work(LLAMA, 1, 2047)
    assert decode.flops == 2 * 536_870_912
    assert decode.bytes == 2 * 536_870_912 + 524_288 + 524_288
    prefill = attention_work(LLAMA, 2048, 0)
    assert prefill.flops == 2 * 1_099_511_627_776 * (2048 * 2049 / 2) / 2048**2


def test_the_surveys_table_of_llama_2_7b_on_an_a6000() -> None:
    """Its table for the A6000: decode projections 1 operation a byte, bound by memory at 768 G; gate in the prefill of
    2,048: 185 G operations, 152 MB, 1,215 a byte, bound by compute at 155 T."""
    q = Architecture("phi", 1, 4096, 4096, 32, 32, 128, 0, True, None)
    decode = linear_work(q, 1, "gemm")["gemm"]
    assert decode.intensity == pytest.approx(1.0, abs=0.005)
    assert side(decode, A6000) == "memory"
    gate = Work(152_043_520, 184_683_593_728)
    assert gate.intensity == pytest.approx(1214.68, abs=0.01)
    assert side(gate, A6000) == "compute"
    prefill = linear_work(LLAMA, 2048, "gemm")["gemm"]
    assert side(prefill, A6000) == "compute"
    assert A6000.ridge == pytest.approx(201.6, abs=0.05)


def test_linear_layers_by_hand() -> None:
    """TINY, T = 3, engine's layers (8, 16), (8, 8), (8, 32), (16, 8): weights 128 + 64 + 256 + 128 = 576, in two layers
    1152, 2 bytes each: 2304. Vectors: 24 + 16 + 40 + 24 = 104, x 3 tokens x 2 bytes x 2 layers = 1248. FLOPs: 2 x 3 x
    1152 = 6912."""
    assert linear_work(TINY, 3, "gemm") == {"gemm": Work(2304 + 1248, 6912)}


def test_packed_weights_by_hand_and_what_dequantizing_moves() -> None:
    """4 bits, one group a row, zero points: a layer has 576 / 2 = 288 bytes, and for each of 16 + 8 + 32 + 8 = 64
    outputs a scale of 2 bytes and half a byte of zero: 160. Two layers: 896. Written out in 16 bit: 2304, which the
    multiplication reads again."""
    shape = replace(TINY, quantization=INT4)
    assert linear_work(shape, 3, "fused") == {"fused": Work(896 + 1248, 6912)}
    assert linear_work(shape, 3, "dequant") == {"dequant": Work(896 + 2304, 0), "gemm": Work(2304 + 1248, 6912)}


def test_the_output_head_by_hand_and_where_it_counts() -> None:
    """8 x 32 weights of 2 bytes, 8 + 32 values of 2 bytes, 2 x 8 x 32 operations. In fused kernels only where it is
    quantized itself: 4 bits and a scale and a zero for 32 outputs, 128 + 80."""
    assert head_work(TINY) == Work(512 + 80, 512)
    shape = replace(TINY, quantization=INT4)
    assert set(step_work(shape, 1, None, "fused")) == {"fused", "gemm"}
    assert step_work(shape, 1, None, "fused")["gemm"] == Work(592, 512)
    both = replace(shape, head=INT4)
    assert head_work(both) == Work(128 + 80 + 80, 512)
    assert set(step_work(both, 1, None, "fused")) == {"fused"}
    assert head_work(replace(both, tied=True)) == Work(592, 512)  # the embedding's own 16 bit


def test_attention_by_hand_with_and_without_a_window() -> None:
    """TINY: a cached token has 2 x 2 x 1 x 4 x 2 = 32 bytes in two layers. Two tokens after three: pairs 4 + 5 = 9 a
    layer, FLOPs 4 x 2 x 4 x 18 = 576; read 5 x 32, written 2 x 32, vectors 2 x 2 x 2 x 8 x 2 = 128.
    One layer with a window of 3: its pairs are 3 + 3 = 6, and it reads back to 3 - 1 before the first new token: 4."""
    assert attention_work(TINY, 2, 3) == Work(160 + 64 + 128, 576)
    windowed = replace(TINY, window=3, windowed_layers=1)
    assert attention_work(windowed, 2, 3) == Work(5 * 16 + 4 * 16 + 64 + 128, 4 * 2 * 4 * (9 + 6))
    assert attention_work(replace(windowed, window=100), 2, 3) == attention_work(TINY, 2, 3)


def test_the_route_of_linear_layers_is_the_kind_that_took_longer() -> None:
    quantized = replace(TINY, quantization=INT4)
    assert route_of(TINY, {"gemm": 1, "fused": 9}) == "gemm"
    assert route_of(quantized, {"gemm": 9}) == "gemm"
    assert route_of(quantized, {"gemm": 9, "fused": 2, "dequant": 1}) == "fused"
    assert route_of(quantized, {"gemm": 9, "fused": 1, "dequant": 2}) == "dequant"


def test_rates_and_shares_by_hand() -> None:
    """200 MB and 50 GFLOP in 4 ms: 50 GB/s and 12.5 TFLOP/s; of 100 GB/s and 25 TFLOP/s a half each."""
    point = Point("decode", "gemm", 4, Work(200e6, 50e9))
    assert point.rates == (pytest.approx(50), pytest.approx(12.5))
    assert point.shares(Ceiling("", 100, 25, "BF16", "")) == (pytest.approx(0.5), pytest.approx(0.5))


def _profile(kinds: dict[str, list[float]], steps_ms: list[float], prefill: dict[str, float]) -> Profile:
    series = {kind: np.array(values) for kind, values in kinds.items()}
    return Profile(
        precision="bf16",
        steps_ms=np.array(steps_ms),
        kinds=series,
        names={},
        launches=np.ones(len(steps_ms)),
        prefill_ms=sum(prefill.values()) or None,
        prefill_kinds=prefill,
        prefill_steps=1,
        decode_steps=len(steps_ms) + 1,
    )


def test_points_stand_in_the_middle_of_the_answer() -> None:
    """Five steps after a prompt of 10: the third has 10 + 2 tokens cached. Its median times are those of the points."""
    one = _profile({"gemm": [2.0] * 5, "attention": [1.0] * 5, "host gap": [1.0] * 5}, [4.0] * 5, {"gemm": 7.0})
    found = {(point.phase, point.kind): point for point in points(one, TINY, 10)}
    assert found["decode", "attention"].work == attention_work(TINY, 1, 12)
    assert found["decode", "gemm"].work == linear_work(TINY, 1, "gemm")["gemm"] + head_work(TINY)
    assert found["decode", LINEARS].work == found["decode", "gemm"].work
    whole = found["decode", "gemm"].work + found["decode", "attention"].work
    assert (found["decode", STEP].ms, found["decode", STEP].work) == (4, whole)
    assert found["prefill", "gemm"].work == linear_work(TINY, 10, "gemm")["gemm"] + head_work(TINY)
    assert ("prefill", "attention") not in found  # no time was spent in it


def test_points_without_a_known_prompt_have_no_attention_and_no_prefill() -> None:
    one = _profile({"gemm": [2.0] * 5, "attention": [1.0] * 5}, [4.0] * 5, {"gemm": 7.0})
    assert {(point.phase, point.kind) for point in points(one, TINY, None)} == {
        ("decode", "gemm"), ("decode", LINEARS), ("decode", STEP)}  # fmt: skip


def test_tokens_to_the_ridge_put_linear_layers_on_it() -> None:
    """At that many tokens the intensity is the ridge, by definition; where each token's vectors alone are more bytes
    than the ridge allows, no number of tokens gets there."""
    for shape, route in ((LLAMA, "gemm"), (replace(LLAMA, quantization=INT4), "fused")):
        tokens = tokens_to_ridge(shape, route, A6000)
        assert tokens is not None
        below, above = (linear_work(shape, at, route)[route].intensity for at in (int(tokens), int(tokens) + 1))
        assert below <= A6000.ridge <= above
    assert tokens_to_ridge(TINY, "gemm", A6000) is None


def test_a_cards_ceiling_is_its_data_sheet() -> None:
    ceiling = of_card(card("rtx-4080"))
    assert (ceiling.bandwidth_gb_s, ceiling.tflops, ceiling.kind) == (
        card("rtx-4080").bandwidth_gb_s, card("rtx-4080").bf16_tflops, "BF16")  # fmt: skip
    assert ceiling.ridge == pytest.approx(1e12 * ceiling.tflops / (1e9 * ceiling.bandwidth_gb_s))
    assert of_card(replace(card("rtx-4080"), bf16_tflops=60.0)).tflops == 60
    assert of_card(card("t4")).kind == "FP16"
    assert of_card(card("t4")).tflops == card("t4").fp16_tflops


def test_an_exceeded_float32_peak_is_raised_and_says_so() -> None:
    """0.4 GFLOP in 1 ms are 0.4 TFLOP/s, in 2 ms 0.2. A data sheet is not exceeded, and attention is no product of the
    library's."""
    low = Ceiling("cpu", 50, 0.25, "float32", "measured", "noisy")
    fast = Point("prefill", LINEARS, 1, Work(1e6, 0.4e9))
    higher = raised(low, [replace(fast, ms=2), fast])
    assert (higher.tflops, higher.kind, higher.bandwidth_gb_s) == (pytest.approx(0.4), "as reached here", 50)
    assert higher.doubt.startswith("noisy; the peak of 0.25 TFLOP/s was exceeded")
    assert raised(low, [replace(fast, ms=2)]) == low
    assert raised(low, [replace(fast, kind="attention")]) == low
    assert raised(replace(low, kind="BF16"), [fast]) == replace(low, kind="BF16")
    assert raised(low, []) == low
