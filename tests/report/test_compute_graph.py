"""compute_graph.md: traces whose answer is known by construction, and the sentence that must follow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.ceilings import Ceiling, Route, tokens_to_ridge
from harness.analysis.timeline import profile
from harness.architecture import Architecture
from harness.report.compute_graph import Conditions, write
from harness.report.kind_plots import COLOURS, Side, roofline, time_by_kind
from harness.report.timeline_plots import BINS, painted, timeline, typical
from harness.telemetry.kernels import Launch, Step, Trace, rows
from tests.report.quality_cases import HOSTILE
from tests.report.trace_cases import (
    ARGMAX,
    CARD,
    CPU_ATTENTION,
    FLASH,
    GEMM,
    INT4,
    MARLIN,
    NORM,
    ONEDNN,
    SHAPE,
    WNA16,
    awq,
    bf16,
    made,
)

SHAPES = {"bf16": SHAPE, "awq": replace(SHAPE, quantization=INT4)}
CONDITIONS = Conditions(model="Qwen/Qwen2.5-7B", prompt_tokens=1024, output_tokens=41, machine="a card")


def page(
    out: Path,
    traces: Sequence[Trace],
    shapes: Mapping[str, Architecture] = SHAPES,
    ceiling: Ceiling | None = CARD,
    conditions: Conditions | None = CONDITIONS,
    *,
    figures: bool = False,
) -> str:
    """compute_graph.md; without its figures, which take a second, unless they are asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr("harness.report.compute_graph.write_timeline_figures", lambda *_: {})
        written = write(traces, shapes, ceiling, out, conditions)
    assert all(path.is_file() for path in written)
    assert written[0] == out / "compute_graph.md"
    return written[0].read_text(encoding="utf-8")


def answer_of(text: str) -> str:
    return text.split("\n\n")[1]


def bullets_of(text: str) -> list[str]:
    return [line[2:] for line in text.split("\n\n")[2].splitlines()]


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_int4_that_reads_fewer_bytes_relieved_bandwidth(tmp_path: Path) -> None:
    """Linear layers 8.6 -> 3.08 ms by construction: 2.79x. 0.32x the bytes, 3.2 operations a byte, ridge 150.
    Saved bytes at BF16's rate: 8.6 (1 - 0.317) = 5.87 ms hoped, 5.52 won: 94 %."""
    text = page(tmp_path, [bf16(), awq()])
    answer, bullets = answer_of(text), bullets_of(text)
    assert answer.startswith("**AWQ relieved bandwidth; the FLOP ceiling is no nearer.**")
    ratio = re.search(r"are (\d\.\d\d)× \[(\d\.\d\d)–(\d\.\d\d)\] as fast, with 0\.32× the bytes", answer)
    assert ratio is not None
    assert [float(end) for end in ratio.groups()] == pytest.approx([2.79, 2.79, 2.79], abs=0.011)
    assert "1.00 to 3.15 operations a byte, and the ridge is at 150" in answer
    assert 3 <= len(bullets) <= 5
    speed, where, ceilings, prefill, launches = bullets
    assert re.search(r"5\.\d\d ms in AWQ and 10\.\d in BF16: [12]\.\d\d×", speed)
    assert "fused is new, +2.4" in where
    assert "GEMM −7.9" in where
    assert re.search(
        r"BF16's 82 % of the bandwidth and 0\.5\d % of the peak, AWQ's 7[1-4] % of the bandwidth", ceilings
    )
    assert re.search(r"9[2-6] % was won", ceilings)
    routes: dict[str, Route] = {"bf16": "gemm", "awq": "fused"}
    batches = [tokens_to_ridge(SHAPES[name], route, CARD) for name, route in routes.items()]
    one, two = (math.ceil(tokens or 0) for tokens in batches)
    assert f"would bound BF16's from {one} and AWQ's from {two} tokens a step on" in ceilings
    assert "operations bound it, and fewer bits leave those as they are" in prefill
    assert re.search(r"BF16 7[0-9] % and AWQ 6\d %", prefill)
    assert launches.endswith("the decode loop of each is not launch-bound.")


def test_int4_on_a_cpu_that_unpacks_longer_than_it_saves(tmp_path: Path) -> None:
    base = made("bf16", {ONEDNN: 160, CPU_ATTENTION: 50}, {ONEDNN: 1600}, gap_us=50, device="cpu")
    other = made("awq", {WNA16: 230, ONEDNN: 20, CPU_ATTENTION: 50}, {WNA16: 3300}, gap_us=50, device="cpu", seed=2)
    ceiling = Ceiling("a processor", 60, 0.4, "float32", "measured")
    tiny = Architecture("qwen2", 4, 256, 512, 4, 2, 64, 1280, True, 2048)
    shapes = {"bf16": tiny, "awq": replace(tiny, quantization=INT4)}
    text = page(tmp_path, [base, other], shapes, ceiling, replace(CONDITIONS, prompt_tokens=128))
    answer = answer_of(text)
    assert answer.startswith("**Neither: AWQ made the decode step's linear layers slower.**")
    assert "what its kernels do beside reading costs more than saved bytes bring" in answer
    assert "0.35× the bytes" in answer
    assert "> Traced on a CPU: it says nothing of a GPU" in text
    assert "was won" not in bullets_of(text)[2]
    assert "host-bound" in bullets_of(text)[-1]


def test_a_loop_that_waits_for_the_host_is_launch_bound(tmp_path: Path) -> None:
    """14 ms of gap beside 9.9 ms of kernels: 59 % of the step."""
    text = page(tmp_path, [bf16(gap_us=14000.0), awq(gap_us=14000.0)])
    assert "the decode loop of each is launch-bound, and fewer bits cannot shorten what does not run." in text
    mixed = page(tmp_path, [bf16(), awq(gap_us=14000.0)])
    assert "BF16 is not launch-bound and AWQ is launch-bound, and" in mixed


def test_a_prompt_too_short_for_operations_to_bound_it(tmp_path: Path) -> None:
    """64 tokens: 62 operations a byte, left of the ridge at 150."""
    text = page(tmp_path, [bf16(), awq()], conditions=replace(CONDITIONS, prompt_tokens=64))
    assert "the prompt is too short for operations to bound it, so bytes still count" in bullets_of(text)[3]


def test_a_card_whose_ridge_lies_between_the_two_is_brought_to_its_flop_ceiling(tmp_path: Path) -> None:
    """Ridge at 2 FLOPs a byte: BF16's 1.00 lies left of it, AWQ's 3.15 right."""
    text = page(tmp_path, [bf16(), awq()], ceiling=replace(CARD, tflops=4), conditions=Conditions())
    assert answer_of(text).startswith("**AWQ moved the decode step to the FLOP ceiling.**")


def test_a_baseline_far_from_every_ceiling_was_not_held_back_by_bytes(tmp_path: Path) -> None:
    """1,645 GB/s under a ceiling of 20,000: 8 %."""
    text = page(tmp_path, [bf16(), awq()], ceiling=replace(CARD, bandwidth_gb_s=20000))
    assert answer_of(text).startswith("**AWQ is faster, but neither ceiling held BF16 back.**")
    assert "BF16's reached 8.2 % of the bandwidth and" in answer_of(text)


def test_equal_precisions_are_undecided(tmp_path: Path) -> None:
    text = page(tmp_path, [bf16(), replace(bf16(), precision="awq")], {"bf16": SHAPE, "awq": SHAPE})
    assert answer_of(text).startswith("**Undecided: AWQ's linear layers may be faster or slower than BF16's.**")
    assert "1.00× as fast" in bullets_of(text)[0].replace(" [1.00–1.00]", "")


def test_more_than_the_peak_cannot_be_and_is_said(tmp_path: Path) -> None:
    """13.4 TFLOP of prefill in 9 ms would be 1,485 TFLOP/s of 300: the prompt was cached, say."""
    cached = made("bf16", {GEMM: 8600}, {GEMM: 9000}, gap_us=600, noise=0)
    assert "More than the peak was reached, 495 % of it, which cannot be" in page(tmp_path, [cached])
    assert "which cannot be" not in page(tmp_path, [bf16(), awq()])


# --- what is missing --------------------------------------------------------------------------------------------------


def test_without_sizes_there_are_no_bytes_and_no_roofline(tmp_path: Path) -> None:
    text = page(tmp_path, [bf16(), awq()], {}, CARD, figures=True)
    assert "**AWQ is faster in a decode step; why cannot be told.**" in text
    assert "The sizes of BF16 and AWQ are not known: no bytes, no FLOPs and no roofline" in text
    assert "GB/s" not in text
    assert not (tmp_path / "figures" / "roofline.png").exists()
    assert 3 <= len(bullets_of(text)) <= 5


def test_without_a_ceiling_there_are_rates_and_no_shares(tmp_path: Path) -> None:
    text = page(tmp_path, [bf16(), awq()], SHAPES, None, figures=True)
    assert "No ceiling is known of this machine" in text
    assert "| GB/s | TFLOP/s |" in text
    assert "of peak" not in text
    assert not (tmp_path / "figures" / "roofline.png").exists()


def test_without_the_prompts_length_there_is_no_attention_and_no_prefill(tmp_path: Path) -> None:
    text = page(tmp_path, [bf16(), awq()], conditions=Conditions())
    assert "The prompt's length is not known" in text
    work = text.split("## Bytes and FLOPs")[1].split("## Is the")[0]
    assert "attention" not in work.split("Bytes and FLOPs are the least")[0]
    assert "| prefill |" not in work


def test_one_precision_alone(tmp_path: Path) -> None:
    text = page(tmp_path, [bf16()])
    assert answer_of(text).startswith("**At its best, a decode step of BF16 is bound by bytes,")
    assert 3 <= len(bullets_of(text)) <= 5
    assert "Kernel by kernel" not in text
    assert "less" not in text.split("## Time by kind")[1].split("## Bytes")[0]
    assert "cannot be told" in answer_of(page(tmp_path, [bf16()], {}, None))


def test_three_precisions_and_the_baseline_goes_first(tmp_path: Path) -> None:
    traces = [awq(), awq("gptq"), bf16()]
    text = page(tmp_path, traces, {**SHAPES, "gptq": SHAPES["awq"]}, figures=True)
    assert text.startswith("# Kernel timeline: Qwen/Qwen2.5-7B, AWQ and GPTQ against BF16\n")
    assert text.count("relieved bandwidth") == 2
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "timeline.png", "timeline_2.png", "time_by_kind.png", "roofline.png"}  # fmt: skip
    assert "| AWQ less BF16, ms [95 %] |" in text
    assert "| GPTQ less BF16, ms [95 %] |" in text


def test_few_steps_have_no_interval_and_nothing_is_decided(tmp_path: Path) -> None:
    short = [made("bf16", {GEMM: 9000}, {GEMM: 1}, gap_us=9, steps=6), made("awq", {MARLIN: 900}, {GEMM: 1}, gap_us=9,
             steps=6)]  # fmt: skip
    text = page(tmp_path, short)
    assert "fewer than 20 whole decode steps" in text
    assert answer_of(text).startswith("**Undecided")


def test_a_prefill_alone_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    text = page(tmp_path, [made("bf16", {}, {GEMM: 9000}, gap_us=0, steps=0, noise=0),
                           made("awq", {}, {MARLIN: 9900}, gap_us=0, steps=0, noise=0)])  # fmt: skip
    assert "the traces hold no decode steps" in answer_of(text)
    assert "| **whole prefill** | **9.00** | **9.90** |" in text
    assert "The traces hold no decode steps." in text


# --- the tables and the words beside them -----------------------------------------------------------------------------


def test_the_table_by_kind_holds_the_medians(tmp_path: Path) -> None:
    """No noise: every step has 8.6 ms of GEMM, and 0.6 of 10.49 ms pass in the gap (5.7 %)."""
    base = made("bf16", {GEMM: 8600, FLASH: 500, NORM: 700, ARGMAX: 90}, {GEMM: 60000}, gap_us=600, noise=0)
    other = made("awq", {MARLIN: 2400, FLASH: 500, NORM: 700, ARGMAX: 90}, {MARLIN: 70000}, gap_us=600, noise=0)
    text = page(tmp_path, [base, other])
    assert "| GEMM | 8.60 [8.60–8.60] | 82.0 % |  |  | −8.60 [−8.60 to −8.60], vanished |" in text
    assert "| fused dequant-GEMM |  |  | 2.40 [2.40–2.40] | 55.9 % | +2.40 [+2.40 to +2.40], new |" in text
    assert "| host gap (nothing runs) | 0.600 [0.600–0.600] | 5.7 % | 0.600 [0.600–0.600] | 14.0 % |" in text
    assert "| whole step | **10.5** |  | **4.29** |  |  |" in text
    assert "| BF16 | 5.72 [5.72–5.72] | 16.0 | no |" in text
    assert "Decode steps: 39 of BF16 and 39 of AWQ." in text
    assert (
        "| decode step | linear layers | BF16 | 8.60 | 14,145 | 14,141 | 1.00 | 1,645 | 1.64 | 82.2 % | 0.55 % |"
        in text
    )


def test_what_the_profiler_costs_and_what_nobody_classified(tmp_path: Path) -> None:
    unknown = made("bf16", {GEMM: 9000, "mystery": 1000}, {GEMM: 9000, "mystery": 1000}, gap_us=0)
    told = replace(CONDITIONS, tpot_ms={"bf16": (12.0, 10.0)}, files={"bf16": "trace-bf16.json.gz"})
    text = page(tmp_path, [unknown], conditions=told)
    assert "BF16: 12.0 ms a token under the profiler, 10.0 without it, 20 % more." in text
    assert "No pattern knows the names behind 10.0 % of BF16's busy time." in text
    assert "trace-bf16.json.gz" in text
    silent = page(tmp_path, [unknown], conditions=replace(told, tpot_ms={"bf16": (12.0, None)}))
    assert "What the profiler itself costs was not measured." in silent


def test_names_from_outside_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("$", "")
    traces = [replace(awq(), precision=name) for name in ("bf16", "*a*|<b>`c`")]
    launches = tuple(replace(one, name=hostile) if one.name == NORM else one for one in traces[1].launches)
    traces[1] = replace(traces[1], launches=launches)
    told = Conditions(model=hostile, machine=hostile, engine=hostile, facts={hostile: hostile}, prompt_tokens=8,
                      files={"bf16": hostile})  # fmt: skip
    text = page(
        tmp_path, traces, {"bf16": SHAPE, "*a*|<b>`c`": SHAPE}, replace(CARD, name=hostile, source=hostile), told
    )
    assert "<script" not in text.replace("\\<script", "")
    assert "](https://evil.example)" not in text.replace("\\](https://evil.example)", "")
    assert not re.search(r"^# no heading|^```", text, re.MULTILINE)
    assert not re.search(r"[\x00-\x08\x1b\u202e\u2028]", text)
    for line in text.splitlines():
        if line.startswith("| decode step"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 12


def test_the_same_traces_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        page(out, [bf16(), awq()], figures=True)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 7
    for path in files:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path


# --- figures ----------------------------------------------------------------------------------------------------------


def _side(trace: Trace) -> Side:
    table = rows(trace)
    by_step: dict[int, dict[str, float]] = {}
    for row in table:
        by_step.setdefault(row.step, {})[row.kind] = row.busy_us / 1e3
    return Side(trace, profile(table), by_step)


def _trace(*launches: tuple[str, float, float]) -> Trace:
    found = tuple(Launch(name, begin, end, end - begin, "stream 7") for name, begin, end in launches)
    return Trace("bf16", "gpu", "torch", found, (Step(0, "decode", 0, 1000),))


def test_bars_are_where_kernels_ran() -> None:
    """1 ms of axis: GEMM from 0.1 to 0.4, attention inside it from 0.2 to 0.3, nothing else."""
    bars = painted(_trace((GEMM, 100, 400), (FLASH, 200, 300)), 0.0, 1.0)
    assert bars["gemm"] == [pytest.approx((0.1, 0.1)), pytest.approx((0.3, 0.1))]
    assert bars["attention"] == [pytest.approx((0.2, 0.1))]
    assert bars["host gap"] == [pytest.approx((0.0, 0.1)), pytest.approx((0.4, 0.6))]


def test_bars_before_and_behind_the_axis_are_cut() -> None:
    bars = painted(_trace((GEMM, -500, 100), (FLASH, 900, 3000), (NORM, 4000, 5000), (NORM, -90, -80)), 0.0, 1.0)
    assert bars["gemm"] == [pytest.approx((0.0, 0.1))]
    assert bars["attention"] == [pytest.approx((0.9, 0.1))]
    assert "elementwise" not in bars


def test_a_flood_of_kernels_shorter_than_a_pixel_is_not_lost() -> None:
    """A kernel of 0.2 µs every 0.25 µs on an axis of 1 ms: each is 0.28 of a bin, together most of every bin."""
    flood = [(NORM, at * 0.25, at * 0.25 + 0.2) for at in range(4000)]
    bars = painted(_trace(*flood), 0.0, 1.0)
    assert sum(length for _, length in bars["elementwise"]) == pytest.approx(1.0, abs=2 / BINS)


def test_the_typical_step_is_nearest_to_the_medians_by_kind() -> None:
    """Steps of 10 ms each; the first has its time in other kinds, the second is the median, the third is longer."""
    side = _side(made("bf16", {GEMM: 9000, NORM: 500}, {GEMM: 1}, gap_us=500, noise=0, layers=1))
    odd = tuple(replace(one, name=FLASH) if 1 <= at < 3 else one for at, one in enumerate(side.trace.launches))
    moved = _side(replace(side.trace, launches=odd))
    assert moved.trace.steps[typical(moved, 20.0)].index == 2
    assert side.trace.steps[typical(side, 20.0)].index == 1


def test_a_step_too_late_to_fill_the_axis_is_not_typical() -> None:
    """Steps of 9 and 11 ms in turn, then two of 10, the median. The first of these has 10 ms behind it: enough for an
    axis of 10 ms, and not for one of 25. Where no step fills the axis, all are asked."""
    lengths = [9, 11, 9, 11, 9, 11, 9, 11, 10, 10]
    launches, steps, now = [], [], 0.0
    for index, ms in enumerate(lengths, start=1):
        launches.append(Launch(GEMM, now, now + 1000 * ms, 1000 * ms, "stream 7"))
        steps.append(Step(index, "decode", now, now + 1000 * ms))
        now += 1000 * ms
    side = _side(Trace("bf16", "gpu", "torch", tuple(launches), tuple(steps)))
    assert steps[typical(side, 10.0)].index == 9
    assert steps[typical(side, 25.0)].index == 1
    assert steps[typical(side, 1e6)].index == 9


def _texts(figure: object) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]  # type: ignore[attr-defined]


def test_the_timeline_calls_out_what_changed_and_numbers_its_steps() -> None:
    base = made("bf16", {GEMM: 8600, NORM: 700, ARGMAX: 90}, {GEMM: 1}, gap_us=600, noise=0)
    other = made("awq", {MARLIN: 2400, NORM: 500, ARGMAX: 90}, {GEMM: 1}, gap_us=600, noise=0)
    figure = timeline([_side(base), _side(other)])
    texts = _texts(figure)
    assert "GEMM\nvanished\n−8.60 ms" in texts
    assert "fused\nnew\n+2.40 ms" in texts
    assert "elementwise\n−0.200 ms" in texts
    assert not any(text.startswith(("sampling", "host gap")) for text in texts)
    assert "step 1 · 9.99 ms" in texts
    assert "step 2 · 9.99 ms" in texts
    assert sum(text.startswith(("step", "1", "2", "3", "4", "5")) for text in texts) >= 6
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["BF16", "by kind", "AWQ", "by kind"]


def test_stacked_bars_add_up_to_the_kinds() -> None:
    side = _side(made("bf16", {GEMM: 8600, NORM: 700}, {GEMM: 60000}, gap_us=700, noise=0))
    figure = time_by_kind([side])
    decode, prefill = figure.axes
    spans = sorted(
        (box.x0, box.x1) for bars in decode.collections for box in (p.get_extents() for p in bars.get_paths())
    )
    assert np.allclose(spans, [(0, 8.6), (8.6, 9.3), (9.3, 10.0)])
    assert [text.get_text() for text in decode.texts if "ms" in text.get_text()][-1] == "10.0 ms"
    assert "60.7 ms" in [text.get_text() for text in prefill.texts]


def test_the_roofline_has_a_point_for_each_kind_of_each_precision(tmp_path: Path) -> None:
    """Each point lies where the table says; what takes less than 2 % of its phase (the head in AWQ's prefill) is
    left out."""
    from harness.report.compute_graph import _side as whole  # the same that the page draws

    sides = [whole(trace, SHAPES[trace.precision], 1024) for trace in (bf16(), awq())]
    figure = roofline(sides, CARD)
    texts = _texts(figure)
    assert sorted(text for text in texts if text.startswith(("BF16", "AWQ"))) == sorted(
        [*("BF16 GEMM", "BF16 attention", "AWQ GEMM", "AWQ fused", "AWQ attention"), *("BF16 GEMM", "AWQ fused")]
    )
    marks = [line for line in figure.axes[0].lines if line.get_marker() in ("o", "s")]
    assert len(marks) == 7
    gemm = next(point for point in sides[0].points if (point.phase, point.kind) == ("decode", "gemm"))
    assert (marks[0].get_xdata()[0], marks[0].get_ydata()[0]) == pytest.approx((gemm.work.intensity, gemm.rates[1]))


def test_every_kind_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert np.all([kind in COLOURS for kind in profile(rows(awq())).kinds])
