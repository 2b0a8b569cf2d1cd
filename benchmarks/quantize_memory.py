"""Is one block's memory enough, and does a killed run end in the same bytes?

    python benchmarks/quantize_memory.py [--methods awq gptq] [--samples 16] [--blocks 24]

Makes a model of Qwen2.5-0.5B's shape with random weights (24 blocks, hidden 896, intermediate 4864, vocabulary
151,936, 988 MB in bfloat16, four shards) and quantizes it in processes of their own: once straight through, and once
killed with SIGKILL in the middle and started again. Printed: the peak of resident memory above what the interpreter
holds with torch and transformers imported (ru_maxrss, which counts file pages that are mapped, too), seconds, and
whether both runs wrote the same content. `--stop-after N` ends the straight run after N blocks, to look at memory with
more tokens in less time.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import QWEN_0_5B, VOCABULARY, make_model

CHILD = """
import json, resource, sys
import torch, transformers, quantize.job
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from pathlib import Path
from quantize.recipe import Recipe, default_scheme
page = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * 4096
method, model, out, tokens, samples, stop = sys.argv[1:]
before = page()
def progress(block):
    held = block.resident_bytes / 2**20
    print(f'  block {block.done}/{block.total} {block.seconds:.0f} s {held:.0f} MiB', file=sys.stderr)
    if block.done == int(stop):
        say()
        sys.exit()
def say(**more):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({'before': before, 'peak': peak, **more}), flush=True)
recipe = Recipe(method, default_scheme(method), samples=int(samples))
made = quantize.job.quantize_model(model, recipe, out=Path(out), calibration=Path(tokens), progress=progress)
say(seconds=made.seconds, sha256=made.checkpoint_sha256)
"""


def child(method: str, model: Path, out: Path, tokens: Path, samples: int, stop: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, method, str(model), str(out), str(tokens), str(samples), str(stop)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    output, _ = process.communicate()
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def kill_in_the_middle(process: subprocess.Popen[str], draft: Path, blocks: int) -> None:
    """SIGKILL once half of the blocks are there."""
    while process.poll() is None:
        try:
            done = json.loads((draft / ".progress.json").read_text())["done"]
        except (OSError, ValueError):
            done = 0
        if done >= blocks // 2:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=["awq", "gptq"])
    parser.add_argument("--samples", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--stop-after", type=int, default=0)
    options = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="kneebench-memory-"))
    try:
        model, tokens = where / "model", where / "tokens.jsonl"
        make_model(model, QWEN_0_5B, options.blocks)
        ids = torch.randint(0, VOCABULARY, (options.samples, 512), generator=torch.Generator().manual_seed(1))
        tokens.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        for method in options.methods:
            straight = finish(child(method, model, where / method, tokens, options.samples, options.stop_after))
            above = (straight["peak"] - straight["before"]) / 2**30
            print(
                f"{method}: peak {above:.2f} GiB above the {straight['before'] / 2**30:.2f} of the interpreter",
                flush=True,
            )
            if options.stop_after:
                continue
            killed = where / f"{method}-killed"
            first = child(method, model, killed, tokens, options.samples, 0)
            kill_in_the_middle(first, where / f".{killed.name}.unfinished", options.blocks)
            resumed = finish(child(method, model, killed, tokens, options.samples, 0))
            same = resumed["sha256"] == straight["sha256"]
            bytes_say = "the same bytes" if same else "OTHER BYTES"
            print(
                f"{method}: {straight['seconds']:.0f} s straight; killed half-way, resumed in "
                f"{resumed['seconds']:.0f} s, {bytes_say}",
                flush=True,
            )
    finally:
        shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    main()
