"""Traces made up so that their answer is known: for the tests of compute_graph.md."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from harness.analysis.ceilings import Ceiling
from harness.architecture import Architecture, Quantization
from harness.telemetry.kernels import Launch, Step, Trace

GEMM = "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn"
MARLIN = "void marlin::Marlin<__nv_bfloat16, 256, 1, 8, 8, false, 4>(int4 const*, int4 const*)"
FLASH = "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4> >(flash::Flash_fwd_params)"
NORM = "void vllm::rms_norm_kernel<c10::BFloat16>(c10::BFloat16*, c10::BFloat16 const*)"
ARGMAX = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float> > >(P)"
ONEDNN, WNA16, CPU_ATTENTION = "_C::onednn_mm", "_C::cpu_gemm_wna16", "_C::cpu_attention_with_kv_cache"

SHAPE = Architecture("qwen2", layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128,
                     vocabulary=152064, tied=False, max_positions=32768)  # fmt: skip
"""Qwen2.5 7B: 13.05 GB of linear layers, 1.09 GB of head."""
INT4 = Quantization("awq", 4, 128, True)
CARD = Ceiling("a card", bandwidth_gb_s=2000, tflops=300, kind="BF16", source="made up")
"""Ridge at 150 FLOPs a byte."""


def made(
    precision: str,
    decode: Mapping[str, float],
    prefill: Mapping[str, float],
    *,
    gap_us: float,
    steps: int = 40,
    layers: int = 4,
    noise: float = 0.002,
    device: Literal["gpu", "cpu"] = "gpu",
    seed: int = 1,
) -> Trace:
    """One prefill and `steps` decode steps. `decode`, `prefill`: name -> µs a step, dealt to `layers` equal launches in
    turn; `gap_us` of nothing at the end of each step. `noise`: spread of each step's length, as a share."""
    chance = random.Random(seed)
    launches: list[Launch] = []
    found: list[Step] = []
    now = 1000.0
    for index in range(steps + 1):
        phase: Literal["prefill", "decode"] = "decode" if index else "prefill"
        begin, factor = now, 1 + noise * chance.gauss(0, 1)
        for _ in range(layers):
            for name, whole_us in (decode if index else prefill).items():
                length = factor * whole_us / layers
                launches.append(Launch(name, now, now + length, length, "stream 7"))
                now += length
        found.append(Step(index, phase, begin, now))
        now += factor * gap_us
    return Trace(precision, device, "torch", tuple(launches), tuple(found))


def bf16(**changed: float) -> Trace:
    """8.6 ms of GEMM for 14.1 GB: 1,645 GB/s, 82 % of the card's. Prefill of 1,024 tokens: 58 ms, 230 TFLOP/s."""
    decode = {GEMM: 8600.0, FLASH: 500.0, NORM: 700.0, ARGMAX: 90.0}
    return made("bf16", decode, {GEMM: 58000.0, FLASH: 1000.0, NORM: 800.0}, gap_us=changed.get("gap_us", 600.0))


def awq(precision: str = "awq", **changed: float) -> Trace:
    """Linear layers of 4.5 GB in 3.1 ms, 2.8 times as fast; the prefill 1.2 times as slow."""
    decode = {MARLIN: 2400.0, GEMM: 680.0, FLASH: 500.0, NORM: 700.0, ARGMAX: 90.0}
    prefill = {MARLIN: 70000.0, GEMM: 700.0, FLASH: 1000.0, NORM: 800.0}
    return made(precision, decode, prefill, gap_us=changed.get("gap_us", 900.0), seed=2)
