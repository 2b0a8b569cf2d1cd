"""The main job on a real engine: `bench sweep` on the demo model, BF16 and AWQ served by vLLM and streamed from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.engines.environment import EngineEnv
from harness.records import Knee, RequestRecord, SweepPoint, read_table

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_bf16_and_awq_are_served_streamed_from_and_compared(tmp_path: Path, engine_env: EngineEnv) -> None:
    out = tmp_path / "results" / "real"
    done = subprocess.run(
        [
            sys.executable, "-m", "harness", "sweep", "--conc", "2,4", "--requests", "24", "--output-tokens", "8",
            "--out", str(out), "--engine-python", str(engine_env.python), "--kv-cache-gib", "0.5",
        ],
        capture_output=True, text=True, timeout=800, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    points = read_table(out / "points.csv", SweepPoint)
    assert [(p.precision, p.conc) for p in points] == [("bf16", 2), ("bf16", 4), ("awq", 2), ("awq", 4)]
    for point in points:
        assert point.tok_s and point.p95_ms and point.vram_gib and point.weights_gib and point.usd_per_1m_tokens
        assert point.requests >= 24 and point.errors == 0 and point.checkpoint_sha256
        assert point.prefix_hit_share == 0, "every prompt is new"
        # 8 tokens +- 25 %, verified by the server's own count; what a busy machine does to the client is no concern.
        assert not {"length_mismatch", "cache_warm", "errors", "slow_kernel"} & set(point.verdict_reasons)
    bf16, awq = points[0], points[2]
    assert bf16.checkpoint_sha256 != awq.checkpoint_sha256
    assert (awq.weights_gib or 0) < (bf16.weights_gib or 0)
    said = json.loads((out / "engine-awq-r1.json").read_text(encoding="utf-8"))
    assert said["kernel"] == awq.kernel and "--max-model-len" in said["settings"]
    if bf16.memory_kind == "host":
        assert said["settings"]["VLLM_CPU_INT4_W4A8"] == "0"
        assert awq.kernel == "CPUWNA16LinearKernel" and bf16.kernel == "unquantized bfloat16"
    requests = [r for r in read_table(out / "requests.csv", RequestRecord) if r.phase == "measured"]
    assert all(r.chunk_ids and sum(r.chunk_tokens) == r.completion_tokens == r.output_tokens_asked for r in requests)
    assert all(r.prompt_tokens == r.input_tokens_asked for r in requests)
    pairs = {(r.cell.split("-", 1)[1], r.user, r.sequence): r.input_tokens_asked for r in requests if "bf16" in r.cell}
    for r in requests:
        if "awq" in r.cell and (key := (r.cell.split("-", 1)[1], r.user, r.sequence)) in pairs:
            assert pairs[key] == r.input_tokens_asked, "both precisions get the same prompts"
    report = (tmp_path / "reports" / "real" / "capacity.md").read_text(encoding="utf-8")
    assert "CPUWNA16LinearKernel" in report or bf16.memory_kind != "host"
    assert str(Path.home()) not in (out / "engine-awq-r1.log").read_text(encoding="utf-8")


@pytest.mark.timeout(900)
def test_a_search_ends_within_its_budget_and_writes_every_paper(tmp_path: Path, engine_env: EngineEnv) -> None:
    """`--until` on both precisions: at most five cells each, its promise kept by its own rows, all papers there."""
    out = tmp_path / "results" / "search"
    done = subprocess.run(
        [
            sys.executable, "-m", "harness", "sweep", "--until", "p95=150ms,ttft=1s", "--max-cells", "10",
            "--max-minutes", "12", "--precision", "25%", "--requests", "30", "--input-tokens", "32",
            "--output-tokens", "8", "--out", str(out), "--engine-python", str(engine_env.python),
            "--kv-cache-gib", "0.5",
        ],
        capture_output=True, text=True, timeout=850, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    points = read_table(out / "points.csv", SweepPoint)
    assert len(points) <= 10 and {point.precision for point in points} == {"bf16", "awq"}
    reports = tmp_path / "reports" / "search"
    for knee in read_table(reports / "knees.csv", Knee):
        assert knee.slo == "p95 ≤ 0.15 s and TTFT p95 ≤ 1 s" and knee.tested_lo is not None
        safe = [p for p in points if p.precision == knee.precision and p.conc == knee.safe_conc]
        assert safe or knee.safe_conc is None
        assert all((p.p95_ms_hi or 0) <= 150 and (p.ttft_p95_ms_hi or 0) <= 1000 for p in safe if p.verdict == "valid")
    for name in ("capacity.md", "capacity.html", "cost.xlsx", "risk_brief.md", "business_case.md"):
        assert (reports / name).stat().st_size > 1000
    assert str(Path.home()) not in (reports / "capacity.html").read_text(encoding="utf-8")
