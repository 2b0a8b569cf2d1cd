"""`bench trace` on vLLM itself, BF16 and AWQ: needs an engine environment; see conftest.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from harness.engines.environment import EngineEnv
from harness.records import KernelRow, read_table
from harness.report.trace import write_trace_papers
from harness.telemetry import trace_files
from harness.telemetry.kernels import Trace, classified, kind_of
from harness.telemetry.tracing import TraceRequest, record

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 200


class Notes:
    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None:
        print(text)


@pytest.fixture(scope="module")
def run(engine_env: EngineEnv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both precisions of the demo model, traced once."""
    request = TraceRequest(
        precisions=("bf16", "awq"),
        tokens=TOKENS,
        out=tmp_path_factory.mktemp("trace") / "run",
        profiler="torch",
        engine_python=engine_env.python,
        max_num_seqs=8,
        kv_cache_gib=0.5,
    )
    return record(request, Notes())


@pytest.fixture(scope="module")
def traces(run: Path) -> dict[str, Trace]:
    found = trace_files.saved([str(run)])
    return {name: trace_files.read_trace(name, path) for name, path in found.files.items()}


@pytest.mark.parametrize("precision", ["bf16", "awq"])
def test_a_step_a_token_and_nearly_all_busy_time_of_a_known_kind(traces: dict[str, Trace], precision: str) -> None:
    trace = traces[precision]
    assert abs(len(trace.steps) - TOKENS) <= 1
    assert [step.phase for step in trace.steps] == ["prefill", *["decode"] * (len(trace.steps) - 1)]
    share = classified(trace)
    assert share is not None and share >= 0.95


def test_the_weights_are_multiplied_by_the_kernels_of_their_precision(traces: dict[str, Trace]) -> None:
    kinds = {name: {kind_of(launch.name) for launch in trace.launches} for name, trace in traces.items()}
    assert "fused" in kinds["awq"] and "fused" not in kinds["bf16"]
    for name in kinds:
        assert {"gemm", "attention", "elementwise", "sampling", "copy"} <= kinds[name]


def test_what_the_profiler_costs_is_told_and_nothing_of_it_is_left(run: Path) -> None:
    told = tomllib.loads((run / trace_files.SETTINGS).read_text(encoding="utf-8"))["trace"]
    for figure in ("traced_tpot_ms", "untraced_tpot_ms"):
        assert set(told[figure]) == {"bf16", "awq"} and min(told[figure].values()) > 0
    assert told["kernels"]["awq"] == "CPUWNA16LinearKernel"
    assert not list(run.glob(".profile-*"))
    assert {row.precision for row in read_table(run / trace_files.KERNELS, KernelRow)} == {"bf16", "awq"}


def test_the_paper_is_written_from_the_files_alone(run: Path, tmp_path: Path) -> None:
    page, *figures = write_trace_papers(trace_files.saved([str(run)]), tmp_path)
    assert page.name == "compute_graph.md" and all(path.stat().st_size for path in figures)
    before = {path.name: path.read_bytes() for path in (page, *figures)}
    again = write_trace_papers(trace_files.saved([str(run)]), tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again} == before
