"""Our quantizer beside llm-compressor, AutoRound and GPTQModel: the same model, tokens, scheme and judge.

    python benchmarks/quantizers.py --prepare DIR                       environments of the peers, once
    python benchmarks/quantizers.py --model scenarios/demo-model --text demo --work WORK --json FILE \\
        --peers llmcompressor=DIR/llmcompressor/bin/python autoround=... gptqmodel=... [--bits 4,3,2] [--repeats 3] \\
        [--only REGEX] [--out docs/quantization.md]

Every run is a process of its own with one runner of benchmarks/peers, in the tool's own environment, on one file of
calibration tokens (peers/tokens.py), one after the other and in turns: ours, a peer, ours, a peer. What it leaves is
judged here, by dense float32 weights in one transformers model: teacher-forced KL(original || quantized) in nats a
token, top-1 agreement and perplexity (quantize/fidelity.py), on sequences that calibrated nothing.

Seconds are of the quantization call: for the peers without loading and saving the model, for ours with both, for it
reads and writes as it goes. Memory is the highest resident set of the process; "above imports" is what is left of it
after what it held when its libraries were loaded and the model was not. Each tool has its defaults but for what stands
in RECIPES and in its runner's docstring.

A finished run is in FILE at once. Called again with the same FILE it makes what is missing, and refuses to mix
conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import common, tokens
from peers.judge import Judge
from peers.records import Run
from peers.table import put, table

from harness.telemetry.host import host
from quantize.weights import content_hash

RUNNERS = Path(__file__).parent.resolve() / "peers"
OURS = "kneebench"
PEERS = {
    "llmcompressor": "llmcompressor==0.14.0",
    "autoround": "auto-round==0.16.1",
    "gptqmodel": "gptqmodel==7.7.0",
}
TORCH = "torch==2.13.0"
"""Left to a range, pip takes the newest build and its gigabytes of CUDA libraries."""
TIMEOUT_S = 7200.0


@dataclass(frozen=True)
class Recipe:
    """One line of the plan. `flags` go to our own command line as they are; `note` tells two such lines apart."""

    tool: str
    method: str
    symmetric: bool
    bits: tuple[int, ...] = (4, 3, 2)
    flags: tuple[str, ...] = ()
    note: str = ""

    def name(self) -> str:
        """Tool and method, as the table has them."""
        return f"{self.tool} {self.method}{f' ({self.note})' if self.note else ''}"


RECIPES = (
    Recipe(OURS, "rtn", True),
    Recipe("llmcompressor", "rtn", True),
    Recipe(OURS, "gptq", True),
    Recipe("llmcompressor", "gptq", True),
    Recipe(OURS, "gptq", True, flags=("--arithmetic", "bfloat16"), note="bfloat16 forward"),
    Recipe(
        OURS, "gptq", True, flags=("--arithmetic", "bfloat16", "--ram-gib", "0.25"), note="bfloat16 forward, in memory"
    ),
    Recipe(OURS, "awq+gptq", True),
    Recipe("llmcompressor", "gptq-mse", True),
    Recipe("gptqmodel", "gptq", True),
    Recipe("autoround", "autoround", True),
    Recipe(OURS, "rtn", False),
    Recipe("llmcompressor", "rtn", False),
    Recipe(OURS, "awq", False),
    Recipe("llmcompressor", "awq", False),
    Recipe(OURS, "awq+gptq", False),
    Recipe("llmcompressor", "awq+gptq", False),
)
"""In the order in which they run, for each number of bits."""


# --- running ---------------------------------------------------------------------------------------------------------


def execute(recipe: Recipe, bits: int, repeat: int, given: argparse.Namespace, judge: Judge) -> Run:
    """One run of one tool, and what it is worth."""
    kind = "sym" if recipe.symmetric else "asym"
    label = re.sub(r"[^a-z0-9]+", "-", f"{recipe.name()} {bits} {kind} {repeat}".lower()).strip("-")
    home = given.work / "runs" / label
    shutil.rmtree(home, ignore_errors=True)  # whole, so that nothing begun before is gone on with
    home.mkdir(parents=True)
    out = home / "checkpoint"
    command = [str(given.pythons[recipe.tool]), str(RUNNERS / f"{recipe.tool}_run.py")]
    command += ["--model", str(given.model), "--calibration", str(given.calibration), "--method", recipe.method]
    command += ["--bits", str(bits), "--group-size", str(given.group_size), "--threads", str(given.threads)]
    command += ["--seed", str(given.seed), "--dtype", given.dtype, "--out", str(out)]
    command += ["--symmetric"] if recipe.symmetric else []
    command += ["--", *recipe.flags] if recipe.tool == OURS and recipe.flags else []
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    run = Run(recipe.name(), recipe.tool, recipe.method, bits, recipe.symmetric, repeat)
    log = home / "log"
    with log.open("w") as errors:
        try:
            ended = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=TIMEOUT_S, cwd=given.work,
                env=os.environ | threads | quiet,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return replace(run, error=f"not done after {TIMEOUT_S:g} s")
    if ended.returncode:
        return replace(run, error=_reason(log.read_text()))
    said = json.loads(ended.stdout.splitlines()[-1])
    dense = out / common.DENSE
    verdict = judge(dense if dense.is_file() else None, out)
    if not given.keep:
        shutil.rmtree(out, ignore_errors=True)
    kept = {name: said[name] for name in Run.__dataclass_fields__ if name in said}
    return replace(run, **kept, **verdict)


def _reason(log: str) -> str:
    """The last line of a log that names an error, without the folders of this machine."""
    lines = [line for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"\S*(Error|error|Exception)\b", line)]
    return re.sub(r"(/[\w.+-]+)+/", "", (named or lines or ["no reason given"])[-1])[:300]


# --- the whole -------------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> None:
    """Make the tokens, run what is missing, write each result as it comes."""
    given.work.mkdir(parents=True, exist_ok=True)
    text = given.text
    if text == "demo":
        wanted = (given.samples + given.windows) * given.length
        text = tokens.demo_text(given.work / "text.jsonl", wanted, given.seed + 1000)
    made = tokens.make(given.model, text and Path(text), given.samples, given.length, given.windows, given.seed)
    given.calibration = given.work / "calibration.jsonl"
    tokens.write(given.calibration, made.calibration)
    machine = host()
    conditions = {
        "cpu": machine.cpu, "cores": machine.cores, "python": platform.python_version(), "threads": given.threads,
        "model": given.model.name, "model_sha256": content_hash(given.model), "tokens_sha256": made.sha256(),
        "samples": given.samples, "length": given.length, "group_size": given.group_size, "seed": given.seed,
        "dtype": given.dtype, "judged": {name: sum(map(len, part)) for name, part in made.parts.items()},
    }  # fmt: skip
    runs = read(given.json, conditions)
    torch.set_num_threads(given.threads)
    judge = Judge(given.model, made.parts, runs)
    done = {run.key for run in runs if not run.error}
    for repeat, bits, recipe in plan(given.bits, given.repeats, given.only, given.pythons):
        key = (recipe.name(), bits, recipe.symmetric, repeat)
        if key in done:
            continue
        run = execute(recipe, bits, repeat, given, judge)
        runs = [*(old for old in runs if old.key != key), run]
        given.json.write_text(
            json.dumps({"conditions": conditions, "runs": [asdict(r) for r in runs]}, indent=1) + "\n"
        )
        figures = f"{run.seconds:.1f} s, KL {run.kl:.3g}" if run.seconds is not None else run.error
        print(f"{run.recipe}, {bits} bits, {'sym' if run.symmetric else 'asym'}, #{repeat}: {figures}", flush=True)
    text = table(runs, conditions, [recipe.name() for recipe in RECIPES])
    if given.out:
        put(text, given.out)
    print(text)


def plan(bits: Sequence[int], repeats: int, only: str, tools: Iterable[str]) -> list[tuple[int, int, Recipe]]:
    """(repeat, bits, recipe) in the order of running; a repeat goes through everything before the next begins."""
    wanted = re.compile(only)
    return [
        (repeat, b, recipe)
        for repeat in range(1, repeats + 1)
        for b in bits
        for recipe in RECIPES
        if recipe.tool in set(tools)
        and b in recipe.bits
        and wanted.search(f"{recipe.name()} {b} {'sym' if recipe.symmetric else 'asym'}")
    ]


def read(path: Path, conditions: Mapping[str, Any]) -> list[Run]:
    """The runs in `path`, which must have been made under the same conditions."""
    if not path.is_file():
        return []
    stored = json.loads(path.read_text())
    if changed := [name for name in conditions if stored["conditions"].get(name) != conditions[name]]:
        raise SystemExit(f"{path} was made with another {', '.join(changed)}: give another --json")
    return [Run(**run) for run in stored["runs"]]


def prepare(folder: Path) -> None:
    """Environments of the peers, each with the CPU build of torch where pip's index has it."""
    for name, package in PEERS.items():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        pip = [str(folder / name / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", TORCH], check=True)
        subprocess.run([*pip, "install", "--quiet", package], check=True)
        # Builds for CUDA beside a torch for the CPU fail when transformers imports them; nothing here needs them.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make the peers' environments there, and stop")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--text", metavar="FILE", help='documents; "demo" makes the demo model\'s; default: its own')
    parser.add_argument("--bits", type=lambda text: [int(b) for b in text.split(",")], default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="of --length tokens, to judge by (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="of the peers' models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="", metavar="REGEX", help='of "tool method bits sym|asym"')
    parser.add_argument("--work", type=Path, metavar="DIR", help="for checkpoints and logs")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results, added to")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table, whole or between its marks")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
        return
    if missing := [f"--{name}" for name in ("model", "work", "json") if getattr(given, name) is None]:
        parser.error(f"{', '.join(missing)}: needed")
    given.pythons = {OURS: Path(sys.executable)}
    for peer in given.peers:
        name, _, python = peer.partition("=")
        if name not in PEERS or not Path(python).is_file():
            parser.error(f"--peers {peer}: NAME=PYTHON with a name of {', '.join(PEERS)} and an interpreter")
        given.pythons[name] = Path(python).absolute()
    given.model, given.work = given.model.resolve(), given.work.resolve()
    measure(given)


if __name__ == "__main__":
    main()
