"""NVIDIA cards through NVML. No driver, no library, no card, or one that was lost: an empty answer, never an error.

NVML is opened and closed around each question. It counts its references, so that costs microseconds while something
else holds it open and a few milliseconds otherwise: these are questions for before and after a measurement. What is
read while one runs stands in sampler.py, which holds NVML open.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card that this process may use."""

    index: int
    name: str
    memory_gib: float
    used_gib: float
    driver: str
    cuda: str
    """The newest CUDA that the driver serves, not the toolkit installed."""


def gpus() -> tuple[Gpu, ...]:
    """The visible cards, in the order of CUDA_VISIBLE_DEVICES; empty without NVIDIA hardware or driver."""
    with opened() as nvml:
        if nvml is None:
            return ()
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            version = nvml.nvmlSystemGetCudaDriverVersion_v2()
            cuda = f"{version // 1000}.{version % 1000 // 10}"
            return tuple(_describe(nvml, handle, driver, cuda) for handle in visible(nvml))
        except nvml.NVMLError:
            return ()


def processes_gib(pids: Collection[int]) -> float | None:
    """Memory that these processes hold on all cards; None where the driver does not say.

    It does not inside most containers (process ids of another namespace) and on WSL; `gpus()[0].used_gib` does.
    """
    with opened() as nvml:
        if nvml is None:
            return None
        try:
            held = [
                process.usedGpuMemory
                for handle in visible(nvml)
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                if process.pid in pids and process.usedGpuMemory is not None
            ]
        except nvml.NVMLError:
            return None
        return sum(held) / GIB if held else None


@contextmanager
def opened() -> Iterator[ModuleType | None]:
    """The NVML module, open; None when there is nothing to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, NVMLError of any kind, OSError from the loader: all mean "no card to ask"
        yield None
        return
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):  # the driver may have gone meanwhile
            pynvml.nvmlShutdown()


def visible(nvml: ModuleType) -> list[Any]:
    """Handles of the cards that CUDA_VISIBLE_DEVICES leaves; as CUDA does, it stops at the first unknown one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for item in filter(None, (part.strip() for part in chosen.split(","))):
        try:
            by_index = item.isdigit()
            handle = nvml.nvmlDeviceGetHandleByIndex(int(item)) if by_index else nvml.nvmlDeviceGetHandleByUUID(item)
        except nvml.NVMLError:
            break
        handles.append(handle)
    return handles


def _describe(nvml: ModuleType, handle: Any, driver: str, cuda: str) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=nvml.nvmlDeviceGetIndex(handle),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_gib=memory.total / GIB,
        used_gib=memory.used / GIB,
        driver=driver,
        cuda=cuda,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
