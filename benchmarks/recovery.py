"""What training recovers of what rounding loses, on the demo model: QAT and QAD beside GPTQ, several seeds.

    python benchmarks/recovery.py --work WORK --json FILE [--bits 4,3,2] [--seeds 0,1,2] [--methods gptq,qat,qad] \\
        [--out docs/quantization.md] [-- --steps 120 --batch 4096]

Every run is `python -m quantize` in a process of its own, symmetric groups of 128; what follows `--` goes to the
training runs. All calibrate and train on one text: conversations of the demo model's tasks from the training side of
their split, which share nothing with what judges. A seed decides the draw of the calibration set, the order of the
training text and what of it is held out.

Judged is each checkpoint, dequantized, in float32, on the 300 held-out conversations
(scenarios/demo-model/heldout.jsonl): KL(BF16 || quantized) in nats a token, same top-1, loss a token of all their text
and of the answers alone, and exact greedy answers to their prompts. A finished run is in FILE at once; called again,
what is missing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import tokens
from peers.table import put

from quantize import fidelity, measured

ROOT = Path(__file__).parent.parent.resolve()
MODEL = ROOT / "scenarios" / "demo-model"
TRAINED = ("qat", "qad")
TEXT_TOKENS, TEXT_SEED = 1_600_000, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bits", type=_integers, default=[4, 3, 2])
    parser.add_argument("--seeds", type=_integers, default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["gptq", "qat", "qad"])
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    given = parser.parse_args(own)
    given.work.mkdir(parents=True, exist_ok=True)
    text = given.work / "text.jsonl"
    if not text.is_file():
        tokens.demo_text(text, TEXT_TOKENS, TEXT_SEED)
    runs: list[dict[str, Any]] = json.loads(given.json.read_text()) if given.json.is_file() else []
    done = {(run["method"], run["bits"], run["seed"]) for run in runs}
    judge = Judge()
    for seed in given.seeds:
        for bits in given.bits:
            for method in given.methods:
                if (method, bits, seed) in done:
                    continue
                run = execute(method, bits, seed, flags if method in TRAINED else [], text, given.work, judge)
                runs = [*(json.loads(given.json.read_text()) if given.json.is_file() else []), run]
                given.json.write_text(json.dumps(runs, indent=1) + "\n")
                print({k: v if not isinstance(v, float) else round(v, 4) for k, v in run.items()}, flush=True)
    table = render(runs)
    print(table)
    if given.out:
        put(table, given.out, "recovery")


def execute(
    method: str, bits: int, seed: int, flags: Sequence[str], text: Path, work: Path, judge: Judge
) -> dict[str, Any]:
    """One checkpoint: what it took and what it is worth."""
    out = work / "checkpoints" / f"{method}-{bits}-s{seed}"
    command = [sys.executable, "-m", "quantize", str(MODEL), "--method", method, "--bits", str(bits), "--sym"]
    command += ["--seed", str(seed), "--calibration", str(text), "--out", str(out)]
    command += ["--corpus", str(text), *flags] if method in TRAINED else []
    if not out.exists():
        ended = measured.execute(command, work / f"{out.name}.log", lambda line: None)
        if ended.code:
            raise SystemExit(f"{out.name}: {ended.complained}")
        (work / f"{out.name}.json").write_text(json.dumps([ended.seconds, ended.peak_mib]))
    seconds, peak = json.loads((work / f"{out.name}.json").read_text())
    record = json.loads((out / "quantize.json").read_text())
    training = record.get("training") or {}
    took = {"seconds": seconds, "peak_mib": peak, "tokens": training.get("tokens", 0), "training": training}
    return {"method": method, "bits": bits, "seed": seed, "flags": list(flags), **took, **judge(out)}


class Judge:
    """The original model, and what to judge by."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "tools"))
        import demo_model

        self.demo = demo_model
        torch.set_num_threads(1)
        self.original = fidelity.load_original(MODEL)
        _, self.tokenizer = demo_model.load(MODEL)
        self.examples = demo_model.read_heldout(MODEL)
        self.sequences = [self.tokenizer.encode(demo_model.conversation(e)).ids for e in self.examples]

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """KL, top-1, losses on the held-out conversations, and exact answers in %, of a checkpoint."""
        model = fidelity.load_dequantized(checkpoint)
        found = fidelity.compare(self.original, model, self.sequences)
        with torch.no_grad():
            exact = self.demo.accuracy(model, self.tokenizer, self.examples)["overall"]
            answers, _ = self.demo.perplexity(model, self.tokenizer, self.examples)
        return {
            "kl": found.kl_nats, "top1": found.top1_agreement, "loss": math.log(found.perplexity_quantized),
            "loss_bf16": math.log(found.perplexity_original), "answers": math.log(answers), "exact": exact,
        }  # fmt: skip


def render(runs: Sequence[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds, and how much of GPTQ's gap each closes."""
    lines = [
        "| bits | method | KL, nats | of GPTQ's KL recovered | loss of answers | of all text | exact answers, % | "
        "seconds | peak MiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for bits in sorted({run["bits"] for run in runs}, reverse=True):
        gptq = {run["seed"]: run["kl"] for run in runs if run["bits"] == bits and run["method"] == "gptq"}
        for method in dict.fromkeys(run["method"] for run in runs if run["bits"] == bits):
            own = [run for run in runs if run["bits"] == bits and run["method"] == method]
            closed = [1 - run["kl"] / gptq[run["seed"]] for run in own if run["seed"] in gptq]
            cells = [
                _spread([run["kl"] for run in own]),
                ""
                if method == "gptq" or not closed
                else f"{100 * statistics.mean(closed):.0f} ± {_deviation(closed)} %",
                _spread([run["answers"] for run in own]),
                _spread([run["loss"] for run in own]),
                _spread([run["exact"] for run in own]),
                f"{statistics.mean(run['seconds'] for run in own):.0f}",
                f"{max(run['peak_mib'] for run in own):.0f}",
            ]
            lines.append(f"| {bits} | {method} | {' | '.join(cells)} |")
    flags = {" ".join(run["flags"]) for run in runs if run["flags"]}
    trained = [run for run in runs if run["training"]]
    taken = f"{min(r['tokens'] for r in trained):,} to {max(r['tokens'] for r in trained):,}" if trained else "no"
    return (
        f"Mean ± standard deviation over {len({run['seed'] for run in runs})} seeds; BF16: loss of all text "
        f"{runs[0]['loss_bf16']:.4f}. {taken} training tokens ({'; '.join(sorted(flags)) or 'defaults'}).\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _deviation(shares: Sequence[float]) -> str:
    return f"{100 * statistics.stdev(shares):.0f}" if len(shares) > 1 else "?"


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{deviation}"


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
