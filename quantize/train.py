"""--method qat and qad, from a model to the shards of a checkpoint: start, student, teacher, text, loop, export.

    model ─► start (a method of `methods`, through the cache) ─► student (qat.py) ─► loop.py ─► integers ─► shards
      └────► teacher (frozen, as it was)               corpus.py, or selfwritten.py ─┘

Unlike the methods that round, this needs the whole model in memory, and more than once: the student's weights in
float32, their gradients, AdamW's two moments, and the teacher.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantize import corpus, qat, selfwritten
from quantize.checkpoint import Draft, pack_block
from quantize.dequantized import open_dequantized
from quantize.fidelity import build_model, load_original
from quantize.loop import Observer, Row, World, train, write_rows
from quantize.methods import layer_of
from quantize.recipe import Recipe
from quantize.scheme import Grid, Scheme, dequantize, search
from quantize.shards import Source
from quantize.training import Training
from quantize.training_figure import draw
from quantize.weights import ModelDir

SELF_WRITTEN = "selfwritten.jsonl"
_AT_A_TIME = 64
"""Documents: 6,200 tokens a second of the demo model on one core, 3,600 with 16."""
METRICS, FIGURE = "metrics.csv", "training.png"


def run(
    source: ModelDir,
    start: Path | None,
    recipe: Recipe,
    training: Training,
    plan: Mapping[str, Scheme | None],
    text: Path | None,
    folder: Path,
    key: str,
    *,
    among: World,
    device: str,
    observe: Observer | None = None,
) -> tuple[Any, dict[str, torch.dtype], list[Row], str]:
    """Train a student of `source`; returns it, the types its tensors are stored in, the rows, and what it read.

    start: a checkpoint of the same plan, or None for the model itself; text: what to train on, or None for what the
    teacher writes; folder: where the text, the states and the teacher's distributions lie, `key` what they belong to.
    """
    schemes = {name: scheme for name, scheme in plan.items() if scheme}
    writes = among.first and text is None and not (folder / SELF_WRITTEN).is_file()
    teacher = load_original(source.path, torch.float32).to(device) if training.taught or writes else None
    student, stored = make_student(source, start, schemes, training, device)
    text = text or folder / SELF_WRITTEN
    if writes:
        selfwritten.write(
            teacher, source.path, text, training.corpus_tokens, recipe.length, recipe.seed, batch=_AT_A_TIME
        )
    if not among.first:
        among.wait()  # for the corpus, which is then found
    opened = corpus.build(source.path, text, recipe.length, recipe.seed, folder)
    if among.first:
        among.wait()
    rows = train(
        student, teacher if training.taught else None, opened, training, folder, key,
        among=among, device=device, observe=observe,
    )  # fmt: skip
    origin = f"{opened.origin}, {opened.tokens:,} tokens"
    return student, stored, rows, origin


def make_student(
    source: ModelDir, start: Path | None, schemes: Mapping[str, Scheme], training: Training, device: str
) -> tuple[Any, dict[str, torch.dtype]]:
    """The student before its first step, and the types its tensors are stored in.

    From a checkpoint it has the dequantized weights and their grids, so its first forward pass is the checkpoint's.
    From the model itself it has the grids of least squared error.
    """
    if start is None:
        tensors = source.read(source.files)
        grids = {name: Grid(*search(tensors[f"{name}.weight"], scheme)[0][1:]) for name, scheme in schemes.items()}
    else:
        opened = open_dequantized(start)
        tensors = {}
        grids = {}
        for name in opened.files:
            module = name.removesuffix(".weight")
            if module in schemes:
                quantized = opened.integers(module)
                grids[module] = Grid(quantized.scales, quantized.zeros)
                tensors[name] = dequantize(quantized)
            else:
                tensors |= opened.read([name])
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    student = build_model(source.path, tensors, torch.float32)
    qat.prepare(student, schemes, grids, stored, training.scales == "learned")
    return student.to(device), stored


def write(
    student: Any,
    source: ModelDir,
    schemes: Mapping[str, Scheme],
    stored: Mapping[str, torch.dtype],
    format: str,
    draft: Draft,
) -> None:
    """The student as the shards of `draft`, one a block and one for all the rest."""
    integers, kept = qat.export(student)
    learned = {name: weight.detach() for name, (_, weight) in qat.quantizers(student).items()}
    tensors = {name: kept[name].to("cpu", stored[name]) for name in source.files if name in kept}
    for block in range(draft.done, int(source.config["num_hidden_layers"])):
        prefix = f"model.layers.{block}."
        own = {
            name.removeprefix(prefix): (values, schemes[name])
            for name, values in integers.items()
            if name.startswith(prefix)
        }
        plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        fates = [
            layer_of(
                prefix + name, scheme, learned[prefix + name], dequantize(values).to(learned[prefix + name].device)
            )
            for name, (values, scheme) in own.items()
        ]  # what rounding does to the weights that training ended with
        draft.add_block(pack_block(prefix, plain, own, format), fates, None)
    outside: dict[str, Source] = {name: t for name, t in tensors.items() if not name.startswith("model.layers.")}
    draft.add(outside)
    draft.finish()


def report(rows: Sequence[Row], folder: Path) -> None:
    """metrics.csv, a line a step, and its figure, training.png."""
    write_rows(rows, folder / METRICS)
    draw(rows, folder / FIGURE)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What is worth knowing of a training, for the record. The best held-out loss is that of what came out."""
    judged = [row for row in rows if row.heldout is not None]
    best = min(judged, key=lambda row: float(row.heldout or 0.0))
    return {
        "steps": rows[-1].step,
        "seconds": round(rows[-1].seconds, 3),
        "heldout_at_start": rows[0].heldout,
        "heldout": best.heldout,
        "best_step": best.step,
        "overflows": rows[-1].skipped,
    }
