"""Hours of continuous sweeping: does memory stay flat, do descriptors leak, does the clock's error drift?

    python benchmarks/soak.py truth --minutes 120 --out DIR     the scripted server at 25,000 tokens a second
    python benchmarks/soak.py vllm --minutes 60 --out DIR       real vLLM on the demo model, both precisions

One `bench sweep` runs for the whole time, and is then sent the SIGINT of a Ctrl-C. Meanwhile every process of it is
looked at each five seconds from outside, and nothing is asked of it: DIR/processes.csv has resident memory, memory of
its own (USS), open descriptors, threads and processor time by role. DIR/run is the run directory; DIR/truth.jsonl is
the scripted server's own log, some 9 GB in two hours. `python benchmarks/soak_report.py DIR` makes figures of them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

import psutil

SAMPLE_S = 5.0
STREAMS = "496,512,528"
"""Users of the cells against the scripted server: 20 ms a token makes 25,000 tokens a second of them. The last needs a
second generator, so generators come and go idle too."""
SCENARIO = """\
description = "A soak"
input_tokens = 16
output_tokens = 64
length_jitter = 0.25
requests = 20
"""
TRUTH = "min_window_s = 55.0\nmax_window_s = 90.0\n"
VLLM = "min_window_s = 50.0\nmax_window_s = 90.0\nthink_s = 5.0\n"
"""Users who think: hours of an engine on a machine that others share, and servers rarely stand at their limit."""
ROLES = {"harness.load.truth": "truth", "harness.load.worker": "generator", "vllm": "engine", "VLLM": "engine"}
"""Part of a process's command line -> what it is called; any other is the sweep itself."""
COLUMNS = ("at_s", "role", "pid", "rss_bytes", "uss_bytes", "descriptors", "threads", "cpu_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=("truth", "vllm"))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    scenario = args.out / "soak.toml"
    scenario.write_text(SCENARIO + (TRUTH if args.against == "truth" else VLLM), encoding="utf-8")
    with ExitStack() as stack:
        watched = []
        if args.against == "truth":
            server = stack.enter_context(closing(_Child(_truth(args.out), args.out / "truth.out")))
            watched.append(server)
            arguments = ["--endpoint", server.address(), "--model", "truth", "--conc", STREAMS]
        else:
            arguments = ["--model", "demo", "--precisions", "bf16,awq", "--conc", "1,8,16,32"]
        arguments += ["--scenario", str(scenario), "--repeats", "1000", "--out", str(args.out / "run")]
        sweep = stack.enter_context(
            closing(_Child([sys.executable, "-m", "harness", "sweep", *arguments], args.out / "sweep.out"))
        )
        watched.append(sweep)
        watch([child.process.pid for child in watched], args.out / "processes.csv", args.minutes * 60)
        if sweep.process.poll() is not None:
            print(f"the sweep ended by itself: exit code {sweep.process.returncode}")
        sweep.interrupt()
        watched[0].interrupt()
    (args.out / "end.json").write_text(json.dumps({"sweep_exit_code": sweep.process.returncode}), encoding="utf-8")


def watch(roots: list[int], table: Path, seconds: float) -> None:
    """A row for each process below `roots` every five seconds, until the time is over or the last root has ended.

    began.txt beside it says when that was, so that rows can be laid beside the cells.
    """
    (table.parent / "began.txt").write_text(datetime.now(UTC).isoformat(), encoding="utf-8")
    began = time.monotonic()
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        while (at := time.monotonic() - began) < seconds and psutil.pid_exists(roots[-1]):
            for process in _family(roots):
                try:
                    with process.oneshot():
                        line = " ".join(process.cmdline())
                        if process.status() == psutil.STATUS_ZOMBIE:
                            continue
                        memory, cpu = process.memory_full_info(), process.cpu_times()
                        row = (f"{at:.1f}", _role(line), process.pid, memory.rss, memory.uss, process.num_fds(),
                               process.num_threads(), f"{cpu.user + cpu.system:.2f}")  # fmt: skip
                except psutil.Error:
                    continue  # it ended while it was looked at
                writer.writerow(row)
            file.flush()
            time.sleep(max(0.0, SAMPLE_S - (time.monotonic() - began - at)))


def _family(roots: list[int]) -> Iterator[psutil.Process]:
    for pid in roots:
        try:
            process = psutil.Process(pid)
            yield from [process, *process.children(recursive=True)]
        except psutil.Error:
            continue


def _role(line: str) -> str:
    return next((role for part, role in ROLES.items() if part in line), "sweep")


def _truth(out: Path) -> list[str]:
    return [sys.executable, "-m", "harness.load.truth", "--ttft-ms", "50", "--gap-ms", "20",
            "--log", str(out / "truth.jsonl")]  # fmt: skip


class _Child:
    """A process of ours whose output goes to a file; closing it ends it, by its own id."""

    def __init__(self, line: list[str], output: Path) -> None:
        self._output = output
        with output.open("wb") as file:
            # A shell's background job ignores Ctrl-C, and so would all that it starts.
            hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            self.process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, preexec_fn=hears)

    def address(self) -> str:
        """The URL that the server prints once it listens."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            said = self._output.read_text(encoding="utf-8").split()
            if said[:1] == ["listening"] and len(said) > 1:
                return f"http://127.0.0.1:{said[1]}"
            time.sleep(0.1)
        raise SystemExit("the scripted server did not start")

    def interrupt(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                pass

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    main()
