"""Fixtures: the kernels' host library, and a way to run test files again under sanitizers."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from quantize.errors import InputError
from quantize.kernels import build
from tests.kernels.layers import Kernels, load

SANITIZED = os.environ.get("KNEEBENCH_SANITIZED") == "1"


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The host library, built by g++ when it is not in the cache; with sanitizers where KNEEBENCH_SANITIZED is 1."""
    return load(build.host(sanitize=SANITIZED))


@pytest.fixture
def sanitized() -> Callable[..., None]:
    """`sanitized("tests/kernels/test_x.py", ...)` runs these tests with AddressSanitizer and UBSan, which end the
    process at the first error; it fails with what they said."""

    def run(*arguments: str) -> None:
        if SANITIZED:
            pytest.skip("runs under sanitizers already")
        build.host(sanitize=True)
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = os.environ | {
            "KNEEBENCH_SANITIZED": "1",
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"

    return run


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The path of nvcc; a test that needs it is skipped where there is none, and fails where nvcc fails."""
    try:
        return build.find("nvcc")
    except InputError as error:
        pytest.skip(str(error))
