"""Launches, their exclusive times, the table of kinds, and the rows of kernels.csv."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.records import KernelRow, read_table, write_table
from harness.telemetry.kernels import (
    GAP,
    HOST,
    KINDS,
    OTHER,
    Launch,
    Mark,
    Pattern,
    Range,
    Step,
    Trace,
    classes,
    classified,
    covered_us,
    exclusive,
    kind_of,
    launches_of,
    ordered,
    pattern_of,
    projected,
    read_classes,
    rows,
    timed,
)

MM, NORM, SAMPLER, STRANGE = "aten::mm", "aten::add", "aten::argmax", "void somebody::elses_kernel<float>(float*)"


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(pattern, name) for pattern in classes() for name in pattern.seen],
    ids=lambda value: value.match.pattern[:30] if isinstance(value, Pattern) else value[:40],
)
def test_every_name_in_the_table_belongs_to_its_own_line(pattern: Pattern, name: str) -> None:
    """An earlier line that took it would say something else, or nothing new."""
    assert pattern_of(name) is pattern


def test_every_line_has_names_and_every_kind_has_lines() -> None:
    assert all(pattern.seen and pattern.what for pattern in classes())
    assert {pattern.kind for pattern in classes()} == {*KINDS, HOST}


@pytest.mark.parametrize(
    "name",
    [
        "",
        STRANGE,
        "kernel",
        "void kernel<int>(int)",
        "my_model::forward",
        "aten::",
        "aten::cholesky",
        "vllm::something_new",
        "void cutlass::device_kernel<somebody::Else>(P)",
        "Marlinade",
        "triton_",
    ],
)
def test_no_pattern_takes_what_it_does_not_know(name: str) -> None:
    assert kind_of(name) is None


# Not the table's own examples: as profilers print them for other types, tiles and versions.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void marlin::Marlin<c10::Half, 256, 2, 8, 8, 4, true>(int4 const*, int4 const*, int4*, int)", "fused"),
        (
            "void gptq_marlin::Marlin<__half, 516l, 256, 4, 16, 4, 4, true, false, -1, false, false>(int4 const*)",
            "fused",
        ),
        ("void vllm::awq::gemm_forward_4bit_cuda_m16nXk32<64>(int, int, __half*, int*, __half*, int*)", "fused"),
        ("void vllm::gptq::gemm_half_q_half_gptq_8bit_kernel<false, 4>(__half const*, unsigned int const*)", "fused"),
        ("void vllm::awq::dequantize_weights(int*, __nv_bfloat16*, int*, __nv_bfloat16*, int)", "dequant"),
        ("void vllm::gptq::reconstruct_exllama_8bit_kernel(unsigned int const*, int const*)", "dequant"),
        (
            "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false> >(Flash_fwd_params)",
            "attention",
        ),
        (
            "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>, cute::C<64> > > >(P)",
            "attention",
        ),
        ("void vllm::paged_attention_v2_reduce_kernel<__half, 128, 128, 512>(__half*, float const*)", "attention"),
        ("flashinfer::BatchPrefillWithRaggedKVCacheKernel<flashinfer::KernelTraits<> >(Params)", "attention"),
        ("void flashinfer::sampling::SamplingFromProbKernel<1024u>(float*, int*)", "sampling"),
        (
            "at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::Half, at::native::ArgMaxOps<float> > >",
            "sampling",
        ),
        ("triton_red_fused_argmax_exponential_3", "sampling"),
        ("ampere_fp16_s16816gemm_fp16_64x64_sliced1x2_ldg8_f2f_stages_64x6_tn", "gemm"),
        ("ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_32x3_tn", "gemm"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize96x64x32_stage4_warpsize2x2x1_tensor16x8x16_kernel", "gemm"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("nvjet_sm100_tst_mma_64x8x64_tmaAB_bz_TNT", "gemm"),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, __half, __half, float, __half, true, false, false>(P)",
            "gemm",
        ),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x64_32x6_tn_align8>(Params)", "gemm"),
        ("triton_poi_fused_addmm_relu_0", "elementwise"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_5", "elementwise"),
        ("void vllm::rms_norm_kernel<c10::Half, 4, 3>(c10::Half*, c10::Half const*, long)", "elementwise"),
        ("void vllm::act_and_mul_kernel<__nv_bfloat16, &vllm::silu_kernel<__nv_bfloat16>, true>(P)", "elementwise"),
        ("void vllm::rotary_embedding_kernel<__nv_bfloat16, false>(long const*, __nv_bfloat16*)", "elementwise"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<MulFunctor<float> > >(int)",
            "elementwise",
        ),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<c10::BFloat16> >(int)", "copy"),
        ("void vllm::reshape_and_cache_flash_kernel<unsigned short, unsigned char, (Fp8KVCacheDataType)1>(P)", "copy"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("[CUDA memcpy HtoD]", "copy"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "copy"),
        ("_C::onednn_mm", "gemm"),
        ("_C::cpu_gemm_wna16", "fused"),
        ("aten::addmm", "gemm"),
        ("aten::mul_", "elementwise"),
        ("aten::to", HOST),
    ],
)
def test_kinds_of_names_that_the_table_does_not_list(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[kernel]]\nkind = "gemn"\nmatch = "x"\nwhat = "y"\n', "kind gemn is none of"),
        ('[[kernel]]\nkind = "gemm"\nmatch = "(x"\nwhat = "y"\n', "unterminated"),
        ('[[kernel]]\nkind = "gemm"\nmatch = "x"\n', "what"),
        ("kernel = 3\n", "not a table"),
        ("[[kernel]\n", "not a table"),
        ("", "not a table"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_classes(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_classes(tmp_path / "none.toml")


# --- times ------------------------------------------------------------------------------------------------------------


def test_exclusive_time_of_nested_operators() -> None:
    """linear 0-100 calls addmm 10-90, which calls copy_ 20-35 and copy_ 40-45; then add 100-110.

    linear 100 - 80 = 20, addmm 80 - 15 - 5 = 60, copies 15 and 5, add 10; together 110, as long as all of it took.
    """
    spans = [(0.0, 100.0), (10.0, 90.0), (20.0, 35.0), (40.0, 45.0), (100.0, 110.0)]
    assert exclusive(spans) == [20.0, 60.0, 15.0, 5.0, 10.0]
    assert exclusive(spans[::-1]) == [10.0, 5.0, 15.0, 60.0, 20.0]


def test_kernels_that_overlap_share_the_time_that_passed() -> None:
    """A 0-10 and B 8-15 in one stream (B need not wait for A's end): from 8 on the time is B's. 8 + 7 = 15."""
    assert exclusive([(0.0, 10.0), (8.0, 15.0)]) == [8.0, 7.0]
    assert exclusive([(0.0, 10.0), (12.0, 15.0)]) == [10.0, 3.0]


def test_spans_that_begin_together_nest_and_empty_ones_take_nothing() -> None:
    assert exclusive([(0.0, 4.0), (0.0, 10.0), (4.0, 4.0)]) == [4.0, 6.0, 0.0]
    assert exclusive([]) == []


_times = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(_times)
def test_exclusive_times_add_up_to_the_union(spans: list[tuple[float, float]]) -> None:
    """Counted tick by tick: integers, so a tick is in it or not."""
    ticks = {tick for begin, end in spans for tick in range(int(begin), int(end))}
    busy = exclusive(spans)
    assert sum(busy) == len(ticks) == covered_us(spans)
    assert all(0 <= time <= end - begin for time, (begin, end) in zip(busy, spans, strict=True))


def test_lanes_do_not_take_time_from_each_other() -> None:
    launches = timed([(MM, 0.0, 10.0), (NORM, 2.0, 6.0), (NORM, 4.0, 6.0)], ["stream 7", "stream 8", "stream 7"])
    assert [launch.busy_us for launch in launches] == [8.0, 4.0, 2.0]
    assert launches[1] == Launch(NORM, 2.0, 6.0, 4.0, "stream 8")


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marks_are_put_on_the_time_of_the_card() -> None:
    """The host asks ahead: pass one is asked for at 0-10 and runs at 20-40, pass two at 12-20, and runs at 45-60.

    The two kernels of a graph share one call; a call of another thread and one after the pass belong to no pass.
    """
    launches = timed(
        [
            ("a", 20.0, 30.0),
            ("b", 30.0, 40.0),
            ("a", 45.0, 50.0),
            ("b", 50.0, 60.0),
            ("other", 1.0, 2.0),
            ("late", 61.0, 62.0),
        ],
        ["stream 7"] * 6,
    )
    asked = [("t1", 3.0), ("t1", 3.0), ("t1", 13.0), ("t1", 20.0), ("t2", 5.0), ("t1", 20.1)]
    ranges = [Range("two", "t1", 12.0, 20.0), Range("one", "t1", 0.0, 10.0), Range("nothing", "t1", 30.0, 31.0)]
    assert projected(ranges, launches, asked) == (Mark("one", 20.0, 40.0), Mark("two", 45.0, 60.0))
    assert projected(ranges, launches, [None] * 6) == ()
    at_the_ends = projected([Range("one", "t1", 3.0, 13.0)], launches, asked)
    assert at_the_ends == (Mark("one", 20.0, 50.0),)


# --- rows -------------------------------------------------------------------------------------------------------------


def made(*spans: tuple[str, float, float], lanes: list[str] | None = None) -> tuple[Launch, ...]:
    return ordered(timed(spans, lanes or ["stream 7"] * len(spans)))


STEPS = (Step(0, "prefill", 100.0, 150.0), Step(1, "decode", 160.0, 190.0))


def test_rows_by_hand() -> None:
    """Step 0 from 100 to the begin of the next at 160: two products of 10 + 20, a norm of 5, a sampling of 5 after the
    step's end; 60 - 40 = 20 µs of gap. Step 1 to its own end at 190: 12 µs of a name that nobody knows, 18 of gap. What
    lies before the first step is in no row.
    """
    launches = made(
        (MM, 50.0, 60.0), (MM, 100.0, 110.0), (NORM, 112.0, 117.0), (MM, 120.0, 140.0), (SAMPLER, 151.0, 156.0),
        (STRANGE, 160.0, 172.0),
    )  # fmt: skip
    trace = Trace("awq", "gpu", "nsys", launches, STEPS)
    assert rows(trace) == [
        KernelRow("awq", 0, "prefill", 0.0, 60.0, "gemm", MM, 2, 30.0),
        KernelRow("awq", 0, "prefill", 0.0, 60.0, "elementwise", NORM, 1, 5.0),
        KernelRow("awq", 0, "prefill", 0.0, 60.0, "sampling", SAMPLER, 1, 5.0),
        KernelRow("awq", 0, "prefill", 0.0, 60.0, GAP, "", 0, 20.0),
        KernelRow("awq", 1, "decode", 60.0, 30.0, OTHER, STRANGE, 1, 12.0),
        KernelRow("awq", 1, "decode", 60.0, 30.0, GAP, "", 0, 18.0),
    ]
    assert classified(trace) == pytest.approx(40 / 52)


def test_the_gap_of_several_streams_is_what_none_of_them_fills() -> None:
    """Stream 7 works 160-170, stream 8 165-180: 20 of the 30 µs are filled, although 25 µs of work were done."""
    launches = made((MM, 160.0, 170.0), ("Memcpy HtoD", 165.0, 180.0), lanes=["stream 7", "stream 8"])
    table = rows(Trace("bf16", "gpu", "torch", launches, STEPS[1:]))
    assert [(row.kind, row.busy_us) for row in table] == [("copy", 15.0), ("gemm", 10.0), (GAP, 10.0)]
    assert table[0].step_begin_us == 0.0


def test_a_processors_gap_holds_the_host_work_inside_its_operators() -> None:
    """An operator from 160 to 180 whose own work is 8 µs: the rest was views and Python, which are the host's: 22."""
    launches = (Launch(MM, 160.0, 180.0, 8.0, "thread 1"),)
    assert rows(Trace("bf16", "cpu", "torch", launches, STEPS[1:]))[-1].busy_us == 22.0


def test_a_launch_that_runs_over_the_next_begin_leaves_no_negative_gap() -> None:
    launches = made((MM, 100.0, 170.0), (NORM, 165.0, 190.0))
    gaps = [row.busy_us for row in rows(Trace("bf16", "gpu", "torch", launches, STEPS)) if row.kind == GAP]
    assert gaps == [0.0, 5.0]


def test_what_runs_over_the_next_begin_fills_the_step_no_further() -> None:
    """Stream 7 works 100-110, stream 8 from 155 on, of which 5 µs lie before the next begin at 160: 60 - 10 - 5."""
    launches = made((MM, 100.0, 110.0), (MM, 155.0, 170.0), (MM, 160.0, 190.0), lanes=["a", "b", "a"])
    assert next(row.busy_us for row in rows(Trace("b", "gpu", "torch", launches, STEPS)) if row.kind == GAP) == 45.0


def test_launches_belong_to_the_step_in_which_they_begin() -> None:
    launches = made((MM, 99.0, 101.0), (MM, 100.0, 101.0), (MM, 159.0, 161.0), (MM, 160.0, 161.0))
    found = launches_of(Trace("bf16", "gpu", "torch", launches, STEPS))
    assert [(step.index, until, [item.begin_us for item in inside]) for step, until, inside in found] == [
        (0, 160.0, [100.0, 159.0]),
        (1, 190.0, [160.0]),
    ]


def test_nothing_in_it() -> None:
    trace = Trace("bf16", "gpu", "torch", (), ())
    assert rows(trace) == [] and launches_of(trace) == [] and classified(trace) is None


def test_rows_survive_their_table(tmp_path: Path) -> None:
    table = rows(Trace("awq+gptq", "gpu", "nsys", made(('void f<int, "a">(int)', 160.0, 170.5)), STEPS[1:]))
    write_table(tmp_path / "kernels.csv", table, KernelRow)
    assert read_table(tmp_path / "kernels.csv", KernelRow) == table
