"""Steps: by the engine's marks, or by the sampling of a bare timeline."""

from __future__ import annotations

import pytest

from harness.errors import InputError
from harness.telemetry import steps
from harness.telemetry.kernels import Launch, Mark, Recording, ordered, timed

GEMM, BIG_GEMM = "ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_tn", "ampere_bf16_s16816gemm_bf16_128x128_ldg8_tn"
FLASH, ADD = "void flash_fwd_splitkv_kernel<Traits>(P)", "void at::native::vectorized_elementwise_kernel<4, Add>(int)"
ARGMAX = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float> > >(R)"
COPY = "[CUDA memcpy DtoH]"


def recording(launches: list[tuple[str, float, float]], marks: tuple[Mark, ...] = ()) -> Recording:
    return Recording("gpu", "nsys", ordered(timed(launches, ["stream 7"] * len(launches))), marks)


def generation(
    count: int, prefill: str = BIG_GEMM, period: float = 100.0, pause: float = 5.0
) -> list[tuple[str, float, float]]:
    """`count` steps without a mark, `period` apart: embed, two layers, logits, pick, tell the host, and then nothing.

    The pauses inside a step grow up to `pause`, the one between two steps is longer.
    """
    found = []
    for step in range(count):
        now = step * period
        gemm = prefill if step == 0 else GEMM
        for number, name in enumerate((ADD, gemm, FLASH, gemm, FLASH, gemm, ADD, ARGMAX, COPY)):
            found.append((name, now, now + 4.0))
            now += 4.0 + (pause if number % 2 else 1.0)
    return found


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("execute_context_1(128)_generation_0(0)", "prefill"),
        ("execute_context_0(0)_generation_1(1)", "decode"),
        ("execute_context_2(64)_generation_3(3)", "prefill"),
        ("execute_context_0(0)_generation_0(0)", None),
        ("execute_128_context_1(sq128sk128sqsq16384sqsk16384)_generation_0(sq0sk0sqsq0sqsk0)", "prefill"),
        ("execute_1_context_0(sq0sk0sqsq0sqsk0)_generation_1(sq1sk129sqsq1sqsk129)", "decode"),
        ("execute_new_1_cached_0", "prefill"),
        ("execute_new_0_cached_1", "decode"),
        ("gpu_model_runner: forward", None),
        ("my_execute_context_1(128)_generation_0(0)", None),
    ],
)
def test_what_a_mark_says(name: str, phase: str | None) -> None:
    assert steps.phase_of(Mark(name, 0.0, 1.0)) == phase


def test_marks_make_steps_and_an_empty_pass_ends_the_last() -> None:
    """Sampling comes after the mark's end and before the next begin: it is the step's. After the empty pass at 300 what
    runs (another request's) is nobody's."""
    launches = [
        (BIG_GEMM, 10.0, 60.0),
        (ARGMAX, 70.0, 75.0),
        (GEMM, 101.0, 120.0),
        (ARGMAX, 130.0, 140.0),
        (GEMM, 310.0, 320.0),
    ]
    marks = (
        Mark("execute_context_1(128)_generation_0(0)", 10.0, 60.0),
        Mark("other", 12.0, 13.0),
        Mark("execute_context_0(0)_generation_1(1)", 101.0, 120.0),
        Mark("execute_context_0(0)_generation_0(0)", 300.0, 300.1),
    )
    found = steps.find(recording(launches, marks))
    assert [(step.index, step.phase, step.begin_us, step.end_us) for step in found] == [
        (0, "prefill", 10.0, 75.0),
        (1, "decode", 101.0, 140.0),
    ]


def test_a_step_ends_at_the_next_begin_at_the_latest() -> None:
    marks = (Mark("execute_new_1_cached_0", 0.0, 5.0), Mark("execute_new_0_cached_1", 10.0, 15.0))
    found = steps.find(recording([(GEMM, 0.0, 12.0), (GEMM, 12.0, 20.0)], marks))
    assert [(step.begin_us, step.end_us) for step in found] == [(0.0, 10.0), (10.0, 20.0)]


def test_a_pass_in_which_nothing_ran_is_no_step() -> None:
    marks = (Mark("execute_new_1_cached_0", 0.0, 5.0), Mark("execute_new_0_cached_1", 30.0, 31.0))
    assert len(steps.find(recording([(GEMM, 0.0, 12.0)], marks))) == 1


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_bare_timeline_is_cut_at_the_pause_after_each_sampling(count: int) -> None:
    """A step takes 9 · 4 of work and 4 · 5 + 4 · 1 of pauses, 60 µs of 100; the copy after the sampling is its own."""
    found = steps.find(recording(generation(count)))
    assert [step.begin_us for step in found] == [100.0 * number for number in range(count)]
    assert [step.phase for step in found] == ["prefill", *["decode"] * (count - 1)]
    assert {round(step.end_us - step.begin_us, 9) for step in found} == {60.0}


def test_several_samplers_of_one_token_are_one_sampling() -> None:
    """Softmax, top-k and arg max of one step follow each other without a product between them."""
    launches = []
    for name, begin, end in generation(5):
        launches.append((name, begin, end))
        if name == ARGMAX:
            launches.append(("_topk_topp_kernel", end + 0.1, end + 0.2))
            launches.append(("_gumbel_sample_kernel", end + 0.3, end + 0.4))
    assert len(steps.find(recording(launches))) == 5


def test_a_pause_between_two_samplers_is_inside_a_step() -> None:
    """Top-k waits 15 µs for the first sampler, and only 3 µs pass from its end to the next step."""
    launches = []
    for step in range(4):
        begin = 100.0 * step
        launches += [
            (GEMM, begin, begin + 60.0),
            (ARGMAX, begin + 61.0, begin + 65.0),
            ("_min_p_kernel", begin + 80.0, begin + 97.0),
        ]
    assert [step.begin_us for step in steps.find(recording(launches))] == [0.0, 100.0, 200.0, 300.0]


def test_a_step_that_was_cut_off_before_its_sampling_is_left_out() -> None:
    launches = generation(4)
    assert len(steps.find(recording(launches[:-2]))) == 3
    assert len(steps.find(recording(launches[:-1]))) == 4  # the copy may be missing


def test_a_prompt_that_is_read_in_parts_is_prefill_as_long_as_its_kernels_are() -> None:
    launches = generation(6)
    two = [(BIG_GEMM if name == GEMM and begin < 200 else name, begin, end) for name, begin, end in launches]
    assert [step.phase for step in steps.find(recording(two))] == ["prefill", "prefill", *["decode"] * 4]


def test_the_first_step_of_a_bare_timeline_is_the_prefill_even_if_its_kernels_tell_nothing() -> None:
    found = steps.find(recording(generation(4, prefill=GEMM)))
    assert [step.phase for step in found] == ["prefill", "decode", "decode", "decode"]


def test_marks_are_taken_before_samplings() -> None:
    marks = (Mark("execute_context_0(0)_generation_1(1)", 0.0, 500.0),)
    assert len(steps.find(recording(generation(5), marks))) == 1


@pytest.mark.parametrize(
    "launches", [[], [(GEMM, 0.0, 1.0), (FLASH, 1.0, 2.0)], [(ARGMAX, 0.0, 1.0)], [(COPY, 0.0, 1.0)]]
)
def test_without_marks_and_samplings_it_is_said_that_there_are_no_steps(
    launches: list[tuple[str, float, float]],
) -> None:
    with pytest.raises(InputError, match="no step can be found"):
        steps.find(recording(launches))


def test_a_trace_carries_what_the_recording_says() -> None:
    found = steps.trace("awq", recording(generation(3)))
    assert (found.precision, found.device, found.profiler, len(found.steps)) == ("awq", "gpu", "nsys", 3)
    assert isinstance(found.launches[0], Launch) and len(found.launches) == 27
