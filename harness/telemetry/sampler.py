"""Reads power, clocks, heat and memory of the engine's cards ten times a second while a cell runs; rows of gpu.csv.

Idea: a card that was hot, or held back by its power supply, measures its chassis and not the precision; the energy of
a token belongs beside its price. So NVML is held open and read on a fixed grid, from a thread of the process that
waits for the load: load generators are processes of their own.

Constraints: the grid is absolute, so that samples neither drift nor queue up (a reading that comes late takes the
place of those that it missed). A figure that the card or its driver does not have is None. A card that vanishes (it
fell off the bus, the driver was reset) ends the sampling with the samples so far and `lost`; the load goes on. By
NVML's documentation its power reading is the mean over the last second on Ampere and newer cards (GA100 excepted), and
momentary before: over a window of seconds the energy counter is the better meter (analysis/power.py).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from harness.records import GpuSample
from harness.telemetry import gpu

PERIOD_S = 0.1

REASONS: Mapping[int, str] = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
}
"""nvmlClocksEventReason* of nvml.h that hold a working card back. Idle (0x1), clocks that somebody chose (0x2, 0x100)
and boosting in step with other cards (0x10) are no slow-down."""

UNKNOWN = "unknown"
"""In place of the reasons where the card does not tell any: an empty list says that there were none."""

_NO_ANSWER = (2**32 - 1, 2**64 - 1)
"""NVML_VALUE_NOT_AVAILABLE of nvml.h, -1, as the unsigned figures of 32 and 64 bits show it."""


class GpuSampler:
    """`with GpuSampler(pids, on_sample, cell=...) as sampler: ...; sampler.samples`.

    `pids`: only the cards on which one of these processes runs; all visible ones where no card admits to one (inside
    containers the process ids are another namespace's) and with None. Without a card there is no thread, and nothing.
    `on_sample` is called from the thread; what it raises ends the sampling and is raised again on leaving.
    """

    def __init__(
        self, pids: Collection[int] | None, on_sample: Callable[[GpuSample], None], *, cell: str, attempt: int = 1
    ) -> None:
        self.samples: list[GpuSample] = []
        self.lost: str | None = None
        """What NVML said when a card stopped answering; None: it answered to the end, or there is none."""
        self._pids, self._on_sample = pids, on_sample
        self._cell, self._attempt = cell, attempt
        self._held = ExitStack()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> GpuSampler:
        nvml = self._held.enter_context(gpu.opened())
        cards = self._cards(nvml) if nvml is not None else {}
        if cards:
            self._thread = threading.Thread(target=self._run, args=(nvml, cards), name="gpu-sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._held.close()
        if self._failure is not None and kind is None:
            raise self._failure

    def _cards(self, nvml: ModuleType) -> dict[int, Any]:
        """Handle of each card to read, by its index."""
        try:
            handles = gpu.visible(nvml)
            if self._pids is not None:
                handles = [handle for handle in handles if self._runs_on(nvml, handle)] or handles
            return {nvml.nvmlDeviceGetIndex(handle): handle for handle in handles}
        except nvml.NVMLError as error:
            self.lost = str(error)
            return {}

    def _runs_on(self, nvml: ModuleType, handle: Any) -> bool:
        running = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return any(process.pid in (self._pids or ()) for process in running)

    def _run(self, nvml: ModuleType, cards: Mapping[int, Any]) -> None:
        try:
            for _ in ticks(self._stop, PERIOD_S):
                for index, handle in cards.items():
                    sample = read(nvml, handle, cell=self._cell, attempt=self._attempt, index=index)
                    self.samples.append(sample)
                    self._on_sample(sample)
        except nvml.NVMLError as error:
            self.lost = str(error)
        except Exception as error:  # a full disk, say: the thread that leaves the context is told
            self._failure = error


def ticks(stop: threading.Event, period_s: float, now: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """At once, then at whole periods since then, and once more when `stop` is set. Missed ones are left out."""
    began = now()
    yield
    stopped = False
    while not stopped:
        passed = now() - began
        stopped = stop.wait((math.floor(passed / period_s) + 1) * period_s - passed)
        yield


def read(nvml: ModuleType, handle: Any, *, cell: str, attempt: int, index: int) -> GpuSample:
    """One reading of one card; None for each figure that it does not have. Raises NVMLError when the card is lost."""
    time_ns = time.time_ns()
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    energy_mj = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    utilisation = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return GpuSample(
        cell=cell,
        time_ns=time_ns,
        index=index,
        power_w=None if power_mw is None else power_mw / 1e3,
        energy_j=None if energy_mj is None else energy_mj / 1e3,
        sm_clock_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        utilisation=None if utilisation is None or utilisation.gpu in _NO_ANSWER else utilisation.gpu / 100,
        used_gib=None if memory is None or memory.used in _NO_ANSWER else memory.used / gpu.GIB,
        throttle=_throttle(nvml, handle),
        attempt=attempt,
    )


def reasons(bits: int) -> tuple[str, ...]:
    """The words for a mask of clock event reasons."""
    return tuple(word for bit, word in REASONS.items() if bits & bit)


def _throttle(nvml: ModuleType, handle: Any) -> tuple[str, ...]:
    # The second is the name before driver 535; the bits are the same.
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        function = getattr(nvml, name, None)
        bits = None if function is None else _ask(nvml, function, handle)
        if bits is not None:
            return reasons(bits)
    return (UNKNOWN,)


def _ask(nvml: ModuleType, function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer; None where the card, the driver or our rights do not give one. Other errors mean a lost card."""
    try:
        answer = function(*arguments)
        return None if answer in _NO_ANSWER or answer != answer else answer  # NaN is no figure either
    except nvml.NVMLError as error:
        if error.value in (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_NO_DATA,
        ):
            return None
        raise
