"""The two profilers that can watch vLLM, as what each adds to its start and where it leaves its file.

torch   vLLM's own: --profiler-config, /start_profile and /stop_profile write a trace. On a processor the only one.
nsys    Nsight Systems starts the server and waits; the same two endpoints open and close its capture through CUDA's
        profiler calls. Then the report is exported as SQLite. Kernels inside CUDA graphs are recorded one by one.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import MissingTool, RunError
from harness.telemetry import nsys, torch_trace

NAMES = ("torch", "nsys")
CONFIG = "--profiler-config"
"""vLLM's flag, since 0.13."""
REPORT_TIMEOUT_S = 600.0
"""Nsight Systems writes its report once the capture has closed: seconds, for a long generation minutes."""
_REPORT, _LOOK_S = "report", 1.0


@dataclass(frozen=True, slots=True)
class Profiler:
    """How one server is watched."""

    name: Literal["torch", "nsys"]
    flags: tuple[str, ...]
    """For vLLM."""
    launcher: tuple[str, ...]
    """Before its command line."""
    ending: str
    """Of the trace's name."""
    collect: Callable[[Path, Callable[[], None]], None]
    """collect(target, check): put the finished trace there; `check` raises when the server has died meanwhile."""


def chosen(name: str | None, on_card: bool) -> Literal["torch", "nsys"]:
    """The profiler to take: the one asked for, else nsys where it can be, else torch. Raises MissingTool."""
    found = shutil.which("nsys") is not None
    if name == "nsys" and not (found and on_card):
        raise MissingTool(
            "--profiler nsys: " + ("no nsys is on the PATH" if not found else "no card is here that it could watch"),
            remedy="install Nsight Systems, or leave the option out: torch's profiler needs nothing",
        )
    return "nsys" if found and on_card and name != "torch" else "torch"


def profiler(name: Literal["torch", "nsys"], scratch: Path) -> Profiler:
    """One that keeps its raw files in `scratch`, an empty directory of one server's."""
    return _nsys(scratch) if name == "nsys" else _torch(scratch)


def _torch(scratch: Path) -> Profiler:
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(scratch),
        # Neither Python's stacks nor the API server: they cost more than what is looked for.
        "torch_profiler_with_stack": "false",
        "ignore_frontend": "true",
        "torch_profiler_dump_cuda_time_total": "false",
    }

    def collect(target: Path, check: Callable[[], None]) -> None:
        check()
        traces = sorted(scratch.glob("*.json*"), key=lambda path: ("rank0." not in path.name, path.name))
        if not traces:
            raise RunError("vLLM's profiler has written no trace", remedy="read the engine's log in the run directory")
        torch_trace.rewrite(traces[0], target)

    flags = tuple(part for key, value in config.items() for part in (f"{CONFIG}.{key}", value))
    return Profiler("torch", flags, (), ".json.gz", collect)


def _nsys(scratch: Path) -> Profiler:
    # As vLLM's documentation has it (contributing/profiling): the worker is a child, and asks for the capture itself.
    launcher = (
        "nsys",
        "profile",
        "--trace=cuda,nvtx",
        "--sample=none",
        "--cpuctxsw=none",
        "--cuda-graph-trace=node",
        "--trace-fork-before-exec=true",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=repeat",
        "--force-overwrite=true",
        f"--output={scratch / _REPORT}",
    )

    def collect(target: Path, check: Callable[[], None]) -> None:
        report = _report(scratch, check)
        export = scratch / "export.sqlite"
        line = ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={export}", str(report)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode or not export.exists():
            said = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
            raise RunError(f"`nsys export` failed:\n{said}", remedy="trace with --profiler torch")
        nsys.rewrite(export, target)

    return Profiler("nsys", (f"{CONFIG}.profiler", "cuda"), launcher, ".sqlite", collect)


def _report(scratch: Path, check: Callable[[], None]) -> Path:
    """The report, once it is there and grows no more. The server runs on: ending it could end nsys in the middle."""
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    size = -1
    while time.monotonic() < deadline:
        check()
        for report in sorted(scratch.glob(f"{_REPORT}*.nsys-rep"))[:1]:
            if report.stat().st_size == size:
                return report
            size = report.stat().st_size
        time.sleep(_LOOK_S)
    raise RunError(
        f"Nsight Systems has written no report within {REPORT_TIMEOUT_S:.0f} s", remedy="trace with --profiler torch"
    )
