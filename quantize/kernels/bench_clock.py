"""How long calls take, one clock a device. Both time a pass over a set of calls, each with data of its own, after a
write that leaves nothing of the set in a cache.

    GPU   the pass is captured in a CUDA graph and replayed between two events: no launch of Python's is in the time
    CPU   time.perf_counter around the pass
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from quantize.errors import InputError

Call = Callable[[], object]


class Clock(Protocol):
    device: torch.device
    name: str
    """Of the card or the processor."""

    def passes(self, calls: Sequence[Call], runs: int) -> list[float]:
        """Seconds of each of `runs` passes over `calls`."""
        ...


class GpuClock:
    """A GPU's, by CUDA events around the replay of a graph."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, torch.cuda.get_device_name(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def passes(self, calls: Sequence[Call], runs: int) -> list[float]:
        """As `Clock.passes`. Raises RuntimeError for a call that a CUDA graph cannot capture."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # what runs for the first time may compile, choose and allocate
            for call in [*calls, *calls[:1]]:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        seconds = []
        for _ in range(runs):
            self._flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return seconds


class CpuClock:
    """A processor's, with torch's present number of threads."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.name = f"{_processor()}, {torch.get_num_threads()} threads"
        self._flush = torch.empty(2**26, dtype=torch.int8)

    def passes(self, calls: Sequence[Call], runs: int) -> list[float]:
        """As `Clock.passes`."""
        calls[0]()
        seconds = []
        for _ in range(runs):
            self._flush.zero_()
            began = time.perf_counter()
            for call in calls:
                call()
            seconds.append(time.perf_counter() - began)
        return seconds


def clock(device: str) -> Clock:
    """The clock of "cuda" or "cpu". Raises InputError for a GPU that is not there."""
    if device == "cpu":
        return CpuClock()
    if not torch.cuda.is_available():
        raise InputError(
            "no CUDA GPU here, or a torch that was built without CUDA",
            "--device cuda where there is one; --device cpu times the torch functions that stand in for the kernels",
            "Run it on the machine with the GPU, or add --device cpu",
        )
    return GpuClock(torch.device("cuda", torch.cuda.current_device()))


def ceiling(clock: Clock, dtype: torch.dtype, size: int | None = None, runs: int = 10) -> tuple[float, float]:
    """What the device does at best: bytes/s of a copy, read and written, and FLOP/s of a product, the best of `runs`.

    The copy is of 8 `size`^2 16-bit numbers (64 MiB on a CPU, 1 GiB on a GPU), the product of two matrices of `size` x
    `size`: 2 size^3 operations.
    """
    size = size or (2048 if clock.device.type == "cpu" else 8192)
    source = torch.randn(8 * size * size, device=clock.device, dtype=dtype)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / min(clock.passes([lambda: target.copy_(source)], runs))
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    return copied, 2 * size**3 / min(clock.passes([lambda: a @ b], runs))


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
