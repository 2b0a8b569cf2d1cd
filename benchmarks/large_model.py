"""Does a model larger than it may hold in memory quantize, and does a run that is killed twice end in the same bytes?

    python benchmarks/large_model.py DIR [--methods awq gptq] [--blocks 28] [--samples 32] [--length 256] [--threads N]

Makes in DIR a model of Qwen2.5-1.5B's shape with random weights of a fixed seed (28 blocks, hidden 1536, intermediate
8960, vocabulary 151,936 tied; 3.09 GB of bfloat16 in four shards) and as many random token ids. Each method runs twice,
by `python -m quantize` in processes of their own: undisturbed, and killed with SIGKILL after a third and after two
thirds of the blocks, each time somewhere in the next block, then started again. Then all files are compared.

Peaks are above an interpreter that has imported what quantizing imports (torch, transformers with the model's code,
quantize.job) and done nothing, in GiB:

    resident     VmHWM, the kernel's own high-water mark of all pages, those of mapped files included
    anonymous    RssAnon, the process's own memory alone, looked at 20 times a second

The page cache is in neither: the kernel takes it back when others want it. What lies in DIR stays there: 3 GB for the
model and 1.2 GB for each of four checkpoints. Each process is noted in DIR when it has ended, and the same command goes
on behind the last one noted.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import QWEN_1_5B, VOCABULARY, make_model

GIB = 2**30
_LOOK_S = 0.05

_IDLE = """
import torch, quantize.job
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM
print(open("/proc/self/status").read())
"""


@dataclass(frozen=True)
class Memory:
    """Of a process, in bytes. resident: its VmHWM or VmRSS; anonymous: its RssAnon."""

    resident: int
    anonymous: int

    def above(self, other: "Memory") -> tuple[float, float]:
        """Resident and anonymous GiB beyond those of `other`."""
        return (self.resident - other.resident) / GIB, (self.anonymous - other.anonymous) / GIB


@dataclass(frozen=True)
class Call:
    """One process: how long it took, the most it held, the blocks it found and left, and whether it was killed."""

    seconds: float
    peak: Memory
    found: int
    left: int
    killed: bool


def memory(status: str) -> Memory:
    """From the text of /proc/PID/status."""
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in status.splitlines())}
    return Memory(int(fields["VmHWM"][0]) * 1024, int(fields["RssAnon"][0]) * 1024)


def idle() -> Memory:
    """Of an interpreter that has imported everything and done nothing. Its VmHWM is what it holds, or a little more."""
    done = subprocess.run([sys.executable, "-c", _IDLE], capture_output=True, text=True, check=True)
    return memory(done.stdout)


def blocks_done(out: Path) -> int:
    """Finished blocks of the draft of `out`."""
    try:
        return int(json.loads((out.parent / f".{out.name}.unfinished" / ".progress.json").read_text())["done"])
    except (OSError, ValueError):
        return 0


def call(arguments: Sequence[str], out: Path, log: Path, threads: int, kill_at: int | None, late_s: float) -> Call:
    """Run `python -m quantize`, watching its memory; SIGKILL it `late_s` after it has noted `kill_at` blocks."""
    found, started = blocks_done(out), time.perf_counter()
    peak, left, due = Memory(0, 0), 0, math.inf
    with log.open("a") as opened:
        command = [sys.executable, "-m", "quantize", *arguments, "--out", str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=opened, stderr=opened, env=env)
        while process.poll() is None:
            try:
                now = memory(Path(f"/proc/{process.pid}/status").read_text())
            except (OSError, KeyError):  # it has just ended
                continue
            peak = Memory(max(peak.resident, now.resident), max(peak.anonymous, now.anonymous))
            left = max(left, blocks_done(out))
            if kill_at is not None and left >= kill_at:
                due = min(due, time.perf_counter() + late_s)
            if time.perf_counter() >= due:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(_LOOK_S)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"exit code {process.returncode}, see {log}")
    return Call(time.perf_counter() - started, peak, found, left, kill_at is not None)


def digests(path: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint."""
    found = {}
    for file in sorted(path.iterdir()):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def row(method: str, name: str, noted: dict[str, Any], before: Memory, blocks: int) -> str:
    """A line of the table, from a `Call` as it was noted."""
    done = Call(**{**noted, "peak": Memory(**noted["peak"])})
    resident, anonymous = done.peak.above(before)
    span = f"{done.found + 1} to {done.left if done.killed else blocks}"
    return f"| {method} | {name} | {span} | {done.seconds:.0f} | {resident:.2f} | {anonymous:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("where", type=Path, metavar="DIR")
    parser.add_argument("--methods", nargs="+", default=["awq", "gptq"])
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    where, blocks = options.where, options.blocks
    model, tokens = where / "model", where / "tokens.jsonl"
    if not model.exists():
        make_model(model, QWEN_1_5B, blocks)
    if not tokens.exists():
        seeded = torch.Generator().manual_seed(1)
        ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=seeded)
        tokens.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    before = idle()
    print(f"the interpreter alone: {before.resident / GIB:.2f} GiB resident, {before.anonymous / GIB:.2f} anonymous\n")
    print("| method | run | blocks | seconds | peak resident, GiB | peak anonymous, GiB |")
    print("| --- | --- | --- | ---: | ---: | ---: |", flush=True)
    for method in options.methods:
        straight, disturbed = where / method, where / f"{method}-killed"
        common = ["--calibration", tokens, "--samples", options.samples, "--length", options.length]
        base = [str(part) for part in (model, "--method", method, *common)]
        planned = {
            "undisturbed": (straight, None, 0.0),
            "killed": (disturbed, blocks // 3, 2.0),
            "killed again": (disturbed, 2 * blocks // 3, 7.0),
            "finished": (disturbed, None, 0.0),
        }
        for name, (out, kill_at, late_s) in planned.items():
            noted = where / f"{method}-{name.replace(' ', '-')}.json"
            if not noted.exists():
                if name in ("undisturbed", "killed"):
                    for path in (out, out.parent / f".{out.name}.unfinished"):
                        shutil.rmtree(path, ignore_errors=True)
                done = call(base, out, where / f"{method}.log", options.threads, kill_at, late_s)
                noted.write_text(json.dumps(asdict(done)))
            print(row(method, name, json.loads(noted.read_text()), before, blocks), flush=True)
        one, other = digests(straight), digests(disturbed)
        differ = sorted(file for file in one.keys() | other.keys() if one.get(file) != other.get(file))
        said = f"{len(differ)} DIFFER: {', '.join(differ)}" if differ else "all the same, byte for byte"
        print(f"\n{method}: {len(one)} files, {said}\n", flush=True)


if __name__ == "__main__":
    main()
