"""How many streams this machine's client can time: measured against the server whose delays are known.

Each step of the ladder is a closed loop on the truth server, which logs when it really received and sent what. The
client's own error is what it reports minus that log, so a server that is late is never taken for a late client:

    TTFT      (first token's stamp - intended) - (first send - receipt at the server)
    chunks    each chunk's stamp - when the server sent it

The ceiling is the largest step whose p99 of both stays under 1 ms. Sweeps read it from the user's cache directory and
mark points that receive more chunks a second as client_bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from harness import __version__
from harness.analysis import metrics
from harness.engines import Target
from harness.errors import RunError
from harness.files import write_whole
from harness.load.generators import Generators, processes_for
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario
from harness.telemetry.host import host

LADDER = (16, 32, 64, 128, 256, 512, 1024, 2048)
LARGEST_ERROR_MS = 1.0
SCENARIO = Scenario("selftest", input_tokens=16, output_tokens=64, min_window_s=3.0, length_jitter=0.25)
TTFT_MS, GAP_MS = 50.0, 20.0


@dataclass(frozen=True, slots=True)
class Step:
    """One load, and what the client made of it."""

    streams: int
    processes: int
    chunks_s: float
    ttft_error_p50_ms: float
    ttft_error_p99_ms: float
    chunk_error_p99_ms: float
    server_late_p99_ms: float
    """How far the server itself was behind its script: the load was less than asked for by that."""
    cpu_us_per_chunk: float
    """Of the generators, their interpreters' start not included."""

    @property
    def good(self) -> bool:
        """The client's own error stays under 1 ms at p99."""
        return max(self.ttft_error_p99_ms, self.chunk_error_p99_ms) < LARGEST_ERROR_MS


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The largest load that was timed well, and where."""

    streams: int
    chunks_s: float
    cpu: str
    cores: int
    kneebench_version: str
    open_end: bool = False
    """The ladder ended before the client did: no ceiling was found, and none is applied."""


def run_ladder(on_step: Callable[[Step], None], ladder: Sequence[int] = LADDER) -> Ceiling | None:
    """Climb until two steps in a row are bad; None when not even the first is good."""
    best: Step | None = None
    bad = 0
    with Generators() as generators:
        for streams in ladder:
            step = measure(generators, streams)
            on_step(step)
            if step.good:
                best, bad = step, 0
            else:
                bad += 1
            if bad == 2:
                break
    if best is None:
        return None
    machine = host()
    return Ceiling(best.streams, best.chunks_s, machine.cpu, machine.cores, __version__, open_end=bad == 0)


def measure(generators: Generators, streams: int) -> Step:
    """One step. Raises RunError when the truth server does not start or answers with errors."""
    processes = processes_for(streams, host().cores)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        with truth_server(log) as base_url:
            load = generators.run(
                Cell("truth", streams), SCENARIO, Dialect(vocabulary=range(100, 1000)), Target(base_url, "truth"),
                processes=processes,
            )  # fmt: skip
        told = read_log(log)
    good = metrics.completed(load.records)
    if load.open_ns is None or load.close_ns is None or not good:
        raise RunError(f"the selftest at {streams} streams measured nothing: {load.gave_up or 'no request ended well'}")
    ttft_ms, chunks_ms = own_errors_ms(good, told)
    late_ms = [
        (sent - due) / 1e6 for line in told.values() for sent, due in zip(line["sent_ns"], line["due_ns"], strict=False)
    ]
    chunks = sum(len(record.chunk_us) for record in load.records)
    return Step(
        streams,
        processes,
        metrics.chunks_s(load.records, load.open_ns, load.close_ns) or 0.0,
        metrics.percentile(ttft_ms, 50) or 0.0,
        metrics.percentile(ttft_ms, 99) or 0.0,
        metrics.percentile(chunks_ms, 99) or 0.0,
        metrics.percentile(late_ms, 99) or 0.0,
        load.cpu_s / max(1, chunks) * 1e6,
    )


def own_errors_ms(
    records: Sequence[RequestRecord], told: Mapping[str, Mapping[str, Any]]
) -> tuple[list[float], list[float]]:
    """(errors of TTFT, errors of each chunk's time) of the requests that the server's log knows, ms.

    The server's stamp is taken after its send has returned, the kernel's within it: an error below zero is the
    server's own, and is counted as none.
    """
    ttft_ms, chunks_ms = [], []
    for record in records:
        truth = told.get(record.request_id)
        if truth is None or record.first_token_ns is None:
            continue
        really_ns = truth["sent_ns"][0] - truth["received_ns"]
        ttft_ms.append(max(0.0, (record.first_token_ns - record.intended_ns - really_ns) / 1e6))
        for offset_us, sent_ns in zip(record.chunk_us, truth["sent_ns"], strict=False):
            chunks_ms.append(max(0.0, (record.intended_ns + offset_us * 1000 - sent_ns) / 1e6))
    return ttft_ms, chunks_ms


@contextmanager
def truth_server(log: Path) -> Iterator[str]:
    """A truth server in a process of its own; yields its base URL, ends it by its own id."""
    command = [sys.executable, "-m", "harness.load.truth"]
    command += ["--ttft-ms", str(TTFT_MS), "--gap-ms", str(GAP_MS), "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            if said[:1] != ["listening"]:
                raise RunError("the truth server did not start", remedy="run `bench truth` to see what it says")
            yield f"http://127.0.0.1:{said[1]}"
        finally:
            process.terminate()
            process.communicate(timeout=30)


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """The truth server's log by request id."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["id"]: line for line in lines if line["id"] is not None and line["sent_ns"]}


def ceiling_path() -> Path:
    """Where the ceiling is kept: the user's cache directory."""
    return user_cache_path("kneebench") / "client-ceiling.json"


def keep_ceiling(ceiling: Ceiling) -> Path:
    """Write it down for the sweeps to come."""
    path = ceiling_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(ceiling), indent=2) + "\n")
    return path


def read_ceiling() -> Ceiling | None:
    """What `bench selftest` found on this machine with this version; None when it was not run, or found no end."""
    try:
        ceiling = Ceiling(**json.loads(ceiling_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    machine = host()
    here = (machine.cpu, machine.cores, __version__)
    known = (ceiling.cpu, ceiling.cores, ceiling.kneebench_version) == here
    return ceiling if known and not ceiling.open_end else None
