"""What this processor can do at most, measured with numpy: bytes a second out of memory, and float32 operations.

A card has a data sheet; a processor in a container has what its neighbours leave. So both ceilings are measured, where
a trace is made (`bench trace`), and stand in trace.toml:

    bandwidth   every thread copies, and reads (a dot product), a share of buffers that no cache holds; the faster of
                the two counts, because a kernel that only reads its weights need not write as a copy does
    operations  a square float32 matrix product, 2 n³, by the BLAS that numpy brings

Of each the best of many counts: a ceiling is what the machine can do, and whatever disturbs it only takes away. The
medians are told beside it, so that a busy machine shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from harness.analysis.ceilings import FLOAT32, Ceiling
from harness.telemetry.host import host

SECONDS, REPEATS = 1.0, 7
"""Each is repeated for so long, and at least so often."""
SIDE = 2048
"""n of the matrix product: 16 MiB a matrix, long enough for every core to be busy."""
LEAST_BYTES, CACHES = 2**28, 4
"""A buffer is the larger of 256 MiB and four times the last-level caches, if an eighth of the free memory holds it."""
FASTER_16BIT = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Flags of /proc/cpuinfo -> instructions that multiply BF16 faster than float32, the strongest first."""


def measure(threads: int | None = None, buffer_bytes: int | None = None, side: int = SIDE) -> Ceiling:
    """Measure both ceilings; some seconds. `threads`: of the bandwidth's, None: one a core; BLAS takes its own.

    Run it while nothing else runs.
    """
    machine = host()
    threads = threads or machine.cores
    size = buffer_bytes or _buffer_bytes()
    copy, read = _copied(threads, size), _read(threads, size)
    product = _rate(2e-12 * side**3, _product(side))
    return Ceiling(
        name=f"{machine.cpu}, {machine.cores} cores",
        bandwidth_gb_s=max(copy.best, read.best),
        tflops=product.best,
        kind=FLOAT32,
        source=(
            f"measured with numpy {np.__version__}, the best of many, medians in brackets: {threads} threads copy "
            f"{copy.words} GB/s (reads and writes) and read {read.words} GB/s in buffers of {size / 2**20:.0f} MiB; a "
            f"float32 matrix product of side {side} does {product.words} TFLOP/s"
        ),
        doubt=_doubt(),
    )


@dataclass(frozen=True, slots=True)
class _Rate:
    best: float
    median: float

    @property
    def words(self) -> str:
        return f"{self.best:.3g} ({self.median:.3g})"


def _copied(threads: int, size: int) -> _Rate:
    """10^9 bytes/s; a copy counts what it reads and what it writes."""
    source, target = np.ones(size // 4, dtype=np.float32), np.zeros(size // 4, dtype=np.float32)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it copies and multiplies
        return _rate(2e-9 * source.nbytes, lambda: list(pool.map(lambda pair: np.copyto(*pair), parts)))


def _read(threads: int, size: int) -> _Rate:
    """10^9 bytes/s of a dot product of a buffer with itself, which reads it once."""
    source = np.ones(size // 4, dtype=np.float32)
    parts = np.array_split(source, threads)
    with ThreadPoolExecutor(threads) as pool:
        return _rate(1e-9 * source.nbytes, lambda: list(pool.map(lambda part: float(np.dot(part, part)), parts)))


def _product(side: int) -> Callable[[], object]:
    one = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    out = np.empty_like(one)
    return lambda: np.matmul(one, one, out=out)


def _rate(amount: float, work: Callable[[], object]) -> _Rate:
    """Amount a second; the first call is not counted, for it touches pages and wakes threads."""
    work()
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < SECONDS:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return _Rate(amount / min(taken), amount / median(taken))


def _buffer_bytes() -> int:
    room = psutil.virtual_memory().available // 8
    return int(min(max(LEAST_BYTES, CACHES * _last_level_bytes()), room))


def _last_level_bytes() -> int:
    """All last-level caches of the machine together; 0 where the kernel does not tell."""
    caches: dict[str, int] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (cache / "size").read_text(encoding="ascii").strip()
            caches[(cache / "shared_cpu_list").read_text(encoding="ascii")] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(caches.values())


def _doubt() -> str:
    """Which 16-bit products this processor has beside float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    faster = next((name for flag, name in FASTER_16BIT.items() if flag in flags), None)
    words = "the peak is float32's"
    if faster:
        words += f", and this processor multiplies BF16 with {faster}, which is faster: shares of it may exceed 100 %"
    return words
