"""gemv and gemm under AddressSanitizer and UBSan: all their tests, on buffers of exactly the size that is asked for.

A read or write past a buffer, of global or of shared memory, ends the process; the last test sees that it does.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.kernels import build

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("file", ["test_gemv.py", "test_gemm.py"])
def test_no_access_outside_a_buffer(sanitized: Callable[..., None], file: str) -> None:
    sanitized(str(FOLDER / file))


def test_an_access_outside_shared_memory_is_seen(tmp_path: Path) -> None:
    """probes.cu's `beyond_shared`: 32 threads, 128 bytes; the last thread reads the four bytes behind them."""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-x", "c++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-fsanitize=address", f"-I{build.FOLDER}"]
    library = tmp_path / "probes.so"
    sources = [str(FOLDER / "probes.cu"), str(build.FOLDER / "checks.cu")]
    subprocess.run([compiler, *flags, "-o", str(library), *sources], check=True)
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).probe_fault(4, (ctypes.c_float * 4)())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "beyond_shared" in done.stderr
