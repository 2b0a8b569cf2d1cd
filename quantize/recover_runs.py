"""The runs of `bench recover`, one after the other: made, measured, compared, and on disk before the next begins."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import QuantizeError
from quantize.measured import Ended, Watch
from quantize.recover_rows import Row, write
from quantize.training import METHODS as TRAINED

if TYPE_CHECKING:
    from quantize.fidelity import Fidelity
    from quantize.scheme import Scheme

_CHECKPOINTS = "checkpoints"

Execute = Callable[[Sequence[str], Path, Watch], Ended]
"""`measured.execute`, or what a test puts in its place."""

Judge = Callable[[Path], "Fidelity"]
"""Fidelity of the checkpoint in that directory to the original."""


@dataclass(frozen=True)
class Request:
    """What was asked: `runs` are rows without figures, in the order of running; `flags` go to trained methods' runs."""

    name: str
    model: Path
    out: Path
    runs: tuple[Row, ...]
    symmetric: bool
    group_size: int
    samples: int
    length: int
    flags: tuple[str, ...]


def run_all(
    request: Request, known: Sequence[Row], execute: Execute, judge: Judge, watch: Watch, say: Callable[[str], None]
) -> list[Row]:
    """Run what `known` rows do not have, each row on disk as soon as it is known; returns all, `known` ones first.

    A checkpoint that was made and not yet compared has a row without KL: then only that is done. Runs that failed
    before are tried again.
    """
    rows = {row.key: row for row in known}

    def keep(row: Row) -> Row:
        rows[row.key] = row
        write(rows.values(), request.out / "recover.csv")
        return row

    for run in request.runs:
        row = rows.get(run.key, run)
        if row.kl_nats is not None:
            continue
        checkpoint = request.out / _CHECKPOINTS / run.name
        if row.seconds is None or row.error or not checkpoint.is_dir():
            row = keep(_make(request, run, checkpoint, execute, watch))
        if not row.error:
            watch(f"{run.name}: comparing with the original")
            row = keep(_judged(row, checkpoint, judge))
        say(_line(row))
    return list(rows.values())


def _make(request: Request, run: Row, checkpoint: Path, execute: Execute, watch: Watch) -> Row:
    """`run` with what it cost, or with why it failed."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for left in (checkpoint, checkpoint.parent / f".{checkpoint.name}.unfinished"):
        shutil.rmtree(left, ignore_errors=True)
    watch(run.name)
    log = checkpoint.with_name(f"{run.name}.log")
    ended = execute(command(request, run, checkpoint), log, lambda line: watch(f"{run.name}: {line}"))
    row = replace(run, seconds=ended.seconds, cpu_seconds=ended.cpu_seconds, peak_mib=ended.peak_mib)
    if ended.code < 0:
        return replace(row, error=f"ended by signal {-ended.code} ({signal.strsignal(-ended.code)})")
    if ended.code:
        return replace(row, error=_shown(ended.complained) or f"exit code {ended.code}")
    trained = run.method in TRAINED
    try:
        said = json.loads(ended.said)
        return replace(
            row,
            checkpoint_sha256=said["checkpoint_sha256"],
            start_seconds=said.get("start_seconds") if trained else None,
            training_tokens=said.get("tokens_trained") if trained else None,
            calibration_tokens=_calibrated_on(request, run.seed, checkpoint),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return replace(row, error=f"its last line is no result: {_shown(ended.said) or type(error).__name__}")


def command(request: Request, run: Row, checkpoint: Path) -> list[str]:
    """The command that makes it."""
    kind = "--sym" if scheme_at(run.bits, request.group_size, request.symmetric).symmetric else "--asym"
    return [
        sys.executable, "-m", "quantize", str(request.model), "--method", run.method, "--bits", str(run.bits), kind,
        "--group-size", str(request.group_size), "--calibration", str(request.out / "calibration.jsonl"),
        "--samples", str(request.samples), "--length", str(request.length), "--seed", str(run.seed),
        "--out", str(checkpoint), *(request.flags if run.method in TRAINED else ()),
    ]  # fmt: skip


def _calibrated_on(request: Request, seed: int, checkpoint: Path) -> int | None:
    """Tokens of the calibration set, where the checkpoint says that it is the one drawn here with `seed`."""
    from quantize import calibration
    from quantize.checkpoint import RECORD
    from quantize.evaluation_text import tokens
    from quantize.recipe import Recipe

    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except OSError:
        return None
    recipe = Recipe(samples=request.samples, length=request.length, seed=seed)
    drawn = calibration.load(request.model, recipe, request.out / "calibration.jsonl")
    return tokens(drawn.sequences) if record.get("calibration_sha256") == drawn.sha256() else None


def _judged(row: Row, checkpoint: Path, judge: Judge) -> Row:
    try:
        found = judge(checkpoint)
    except QuantizeError as error:
        return replace(row, error=_shown(f"comparing with the original: {error}"))
    return replace(
        row,
        kl_nats=found.kl_nats,
        perplexity_original=found.perplexity_original,
        perplexity_quantized=found.perplexity_quantized,
        top1_agreement=found.top1_agreement,
        positions=found.positions,
    )


def scheme_at(bits: int, group_size: int, symmetric: bool) -> "Scheme":
    """That of every method at `bits`: 8 bits are symmetric, for vLLM runs no others."""
    from quantize.scheme import Scheme

    return Scheme(bits, group_size, symmetric or bits == 8)


def _line(row: Row) -> str:
    """`gptq-4-s0: 6.1 s, 466 MiB, KL 0.00788`."""
    if row.error:
        return f"{row.name}: FAILED, {row.error}"
    return f"{row.name}: {row.seconds:.1f} s, {row.peak_mib:.0f} MiB, KL {row.kl_nats:.3g}"


def _shown(line: str) -> str:
    """A line for a table: without the folders of this machine, and not endless."""
    return re.sub(r"(/[\w.+-]+)+/", "", line.removeprefix("error: "))[:300]
