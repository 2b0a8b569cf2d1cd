"""--vary of a predicted run: what virtual time knows is honoured, and the scheduler's own limits are the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.job import SweepRequest
from harness.predict import run
from harness.predict.subject import subject
from harness.records import Cell, RequestRecord, Scenario, SweepPoint
from harness.report.run import load_run
from harness.variants import parse_vary


class Silent:
    def status(self, text: str) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_ended(self, point: SweepPoint) -> None: ...
    def note(self, text: str) -> None: ...


def request(*vary: str, **more: Any) -> SweepRequest:
    asked = SweepRequest(
        Scenario("chat", requests=60), (16,), model="qwen2.5-1.5b", precisions=("bf16", "awq"), engine="simulated",
        gpu="l4", vary=parse_vary(vary),
    )  # fmt: skip
    return replace(asked, **more)


def predicted(tmp_path: Path, *vary: str, **more: Any) -> dict[str, SweepPoint]:
    out = tmp_path / "run"
    run.sweep(request(*vary, out=out, **more), Silent())
    return {point.precision: point for point in load_run(out).points}


def test_no_more_run_than_max_num_seqs_and_the_others_wait(tmp_path: Path) -> None:
    points = predicted(tmp_path, "max_num_seqs=4,64")
    assert list(points) == [f"{name}[max_num_seqs={n}]" for n in (4, 64) for name in ("bf16", "awq")]
    for name in ("bf16", "awq"):
        few, many = (points[f"{name}[max_num_seqs={n}]"] for n in (4, 64))
        assert (few.running_peak, few.waiting_peak) == (4, 12), "of 16 users"
        assert many.running_peak == 16
        assert few.engine_args == "--max-num-seqs 4" and few.p95_ms and many.p95_ms and few.p95_ms > many.p95_ms
    alike = predicted(tmp_path / "by option", max_num_seqs=4)["bf16"]
    varied = points["bf16[max_num_seqs=4]"]
    assert replace(varied, precision="bf16") == alike, "the same as --max-num-seqs 4"


def test_memory_follows_its_share_and_the_context_its_length(tmp_path: Path) -> None:
    """L4: 24 GB; 0.4 more of it is cache, to a block. Context alone costs nothing of the cache."""
    points = predicted(tmp_path, "gpu_memory_utilization=0.5,0.9", "max_model_len=256,2048")
    small, large = (points[f"bf16[gpu_memory_utilization={u},max_model_len=256]"] for u in (0.5, 0.9))
    card_gib = (large.vram_gib or 0) / 0.9
    assert small.vram_gib == pytest.approx(0.5 * card_gib)
    assert (large.kv_cache_gib or 0) - (small.kv_cache_gib or 0) == pytest.approx(0.4 * card_gib, abs=0.01)


def test_more_tokens_a_step_take_prompts_in_earlier(tmp_path: Path) -> None:
    long = Scenario("chat", input_tokens=400, requests=60)
    points = predicted(tmp_path, "max_num_batched_tokens=256,8192", scenario=long)
    few, many = (points[f"bf16[max_num_batched_tokens={n}]"] for n in (256, 8192))
    assert few.tok_s != many.tok_s and few.engine_args == "--max-num-batched-tokens 256"


@pytest.mark.parametrize(
    ("vary", "more", "said"),
    [
        (["kv_cache_dtype=auto,fp8"], {}, "--kv-cache-dtype cannot be predicted"),
        (["tensor_parallel_size=1,2"], {}, "--tensor-parallel-size or --pipeline-parallel-size cannot be predicted"),
        (["block_size=16,32"], {}, "--block-size cannot be predicted"),
        (["enforce_eager=true,false"], {}, "--enforce-eager cannot be predicted"),
        ([], {"engine_args": ("--block-size=32",)}, "--block-size cannot be predicted"),
        ([], {"pipeline_parallel": 2}, "cannot be predicted"),
        (["gpu_memory_utilization=0.5,0.9"], {"kv_cache_gib": 2.0}, "beside --kv-cache-gib"),
    ],
)
def test_what_virtual_time_does_not_know(vary: list[str], more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run.sweep(request(*vary, out=tmp_path / "run", **more), Silent())
    assert said in str(refused.value) and refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_nothing_is_calibrated_by_a_run_of_several_settings(tmp_path: Path) -> None:
    predicted(tmp_path, "max_num_seqs=4,64")
    rows = load_run(tmp_path / "run")
    measured = replace(rows, points=[replace(point, source="engine") for point in rows.points])
    with pytest.raises(InputError, match=r"was served with bf16\[max_num_seqs=4\]"):
        subject(measured)
    cached = [
        replace(point, source="engine", precision="bf16", engine_args="--kv-cache-dtype fp8") for point in rows.points
    ]
    with pytest.raises(InputError, match="was served with --kv-cache-dtype"):
        subject(replace(rows, points=cached))
