"""What 16-bit products do to training: step time, memory, loss, and the gradients that float16 loses.

    python benchmarks/mixed_precision.py --work WORK [--steps 40] [--batch 4096] [--out docs/training.md]

QAT of the demo model at 4 bits from GPTQ, on conversations of its tasks, once for each precision: `python -m quantize`
in a process of its own, one thread, one after the other, the same tokens in the same order. Then one backward pass of
the same 2,048 tokens in each precision and with each loss scale, as a part of a step of so many or of 131,072, and how
many of the weights' gradients came out as exact zeros (in float32: those of clipped weights). Seconds are the median
step's; memory is the process's highest resident set.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peers import tokens
from peers.table import put

from quantize import distill, measured, qat, train
from quantize.calibration import load
from quantize.recipe import Recipe
from quantize.scheme import Scheme
from quantize.sequences import batches
from quantize.training import Training
from quantize.weights import open_model

ROOT = Path(__file__).parent.parent.resolve()
MODEL = ROOT / "scenarios" / "demo-model"
RUNS = {
    "fp32": ("fp32", "dynamic"),
    "bf16": ("bf16", "dynamic"),
    "fp16": ("fp16", "dynamic"),
    "fp16, unscaled": ("fp16", "none"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    text = given.work / "text.jsonl"
    if not text.is_file():
        tokens.demo_text(text, 400_000, 7)
    curves: dict[str, list[float]] = {}
    lines = [
        "| products | seconds a step | peak MiB | first loss | last loss | held out | steps left out |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (precision, scale) in RUNS.items():
        rows, peak = run(given, text, name, precision, scale)
        steps = rows[1:]
        curves[name] = [float(row["loss"]) for row in steps]
        seconds = statistics.median(given.batch / float(row["tokens_s"]) for row in steps)
        mean = [statistics.mean(float(row["loss"]) for row in part) for part in (steps[:5], steps[-5:])]
        lines.append(
            f"| {name} | {seconds:.2f} | {peak:.0f} | {mean[0]:.4f} | {mean[1]:.4f} | "
            f"{float(rows[-1]['heldout']):.4f} | {rows[-1]['skipped']} |"
        )
    lines += [
        "",
        "| tokens of a step | products | loss scale | gradients of weights that are exactly 0 |",
        "| ---: | --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {scale:g} | {share:.2%} |" for name, scale, share in zeros(text)]
    table = "\n".join(lines) + "\n"
    print(table)
    if given.out:
        put(table, given.out, "precision")
        draw(curves, given.out.parent / "figures" / "precision.svg")


def draw(curves: dict[str, list[float]], file: Path) -> None:
    """The loss of each step, a line a precision."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    styles = zip(("#333333", "#0072B2", "#D55E00", "#009E73"), ("-", "--", "-.", ":"), strict=True)
    for (name, losses), (colour, dashes) in zip(curves.items(), styles, strict=True):
        axes.plot(range(1, len(losses) + 1), losses, dashes, color=colour, lw=1.6, label=name)
    axes.set_xlabel("step")
    axes.set_title("loss of the text, nats a token", loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def run(
    given: argparse.Namespace, text: Path, name: str, precision: str, scale: str
) -> tuple[list[dict[str, str]], float]:
    """metrics.csv of one training, and its peak of memory in MiB."""
    out = given.work / name.replace(", ", "-")
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "quantize",
        str(MODEL),
        "--method",
        "qat",
        "--bits",
        "4",
        "--sym",
        "--evaluate",
        "1",
    ]
    command += [
        "--corpus",
        str(text),
        "--calibration",
        str(text),
        "--train-precision",
        precision,
        "--loss-scale",
        scale,
    ]
    command += ["--steps", str(given.steps), "--batch", str(given.batch), "--out", str(out)]
    ended = measured.execute(command, given.work / f"{out.name}.log", lambda line: None)
    if ended.code:
        raise SystemExit(f"{name}: {ended.complained}")
    with (out / "metrics.csv").open() as opened:
        return list(csv.DictReader(opened)), ended.peak_mib


def zeros(text: Path) -> Iterator[tuple[str, float, float]]:
    """Share of the weights' gradients that one backward pass leaves at exactly zero.

    By tokens of the step, which the loss is a mean over, and precision; and by loss scale.
    """
    torch.set_num_threads(1)
    source = open_model(MODEL)
    names = [name.removesuffix(".weight") for name in source.files if "proj.weight" in name]
    schemes = dict.fromkeys(names, Scheme(4, 128, symmetric=True))
    student, _ = train.make_student(source, None, schemes, Training(), "cpu")
    sequences = load(MODEL, Recipe("gptq", samples=8), text).sequences
    (batch, *_) = batches(sequences)
    scales = (("fp32", None, 1.0), ("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 1.0))
    for places in (int(batch.real[:, 1:].sum()), 2**17):
        for name, dtype, scale in (*scales, ("fp16", torch.float16, 2.0**8), ("fp16", torch.float16, 2.0**16)):
            student.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                sums = distill.losses(student, batch, Training(cross_entropy=1.0))
            (sums.cross_entropy / places * scale).backward()
            gradients = [weight.grad for _, weight in qat.quantizers(student).values() if weight.grad is not None]
            lost = sum(int((gradient == 0).sum()) for gradient in gradients)
            yield f"{places:,} | {name}", scale, lost / sum(gradient.numel() for gradient in gradients)


if __name__ == "__main__":
    main()
