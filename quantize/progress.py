"""How far a run is, on stderr: a bar where somebody watches, one plain line a block where a log does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quantize.job import BlockDone, Progress
from quantize.loop import Observer, Row


@contextmanager
def reporter() -> Iterator[Progress]:
    """A function to call after each block; the bar goes when the body ends."""
    if not sys.stderr.isatty():
        yield lambda block: print(line(block), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("quantizing block"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda block: bar.update(task, completed=block.done, total=block.total, description=_fate(block))


@contextmanager
def step_reporter() -> Iterator[Observer]:
    """A function to call after each training step: a bar, or twenty lines and one for each held-out loss."""
    if not sys.stderr.isatty():

        def tell(row: Row, steps: int) -> None:
            if row.heldout is not None or row.step % max(1, steps // 20) == 0:
                print(step_line(row, steps), file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("training step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda row, steps: bar.update(
            task, completed=row.step, total=steps, description=_step(row, steps), visible=True
        )


def step_line(row: Row, steps: int) -> str:
    """`step 30/300  loss 0.0921, held out 0.0934  rate 1.0e-03  4,812 tok/s, 410 s left`."""
    return f"step {row.step}/{steps}  {_step(row, steps)}"


def _step(row: Row, steps: int) -> str:
    held = "" if row.heldout is None else f", held out {row.heldout:.4g}"
    scale = f"  scale {row.loss_scale:g}, {row.skipped} left out" if row.loss_scale != 1 else ""
    left = f"{row.tokens_s:,.0f} tok/s, {row.seconds / max(row.step, 1) * (steps - row.step):.0f} s left"
    return f"loss {row.loss:.4g}{held}  rate {row.learning_rate:.1e}{scale}  {left}"


def line(block: BlockDone) -> str:
    """`block 3/24  worst down_proj 21.4 dB, mean 24.0 dB  12.1 s, 88 s left  1.02 GiB`."""
    return f"block {block.done}/{block.total}  {_fate(block)}"


def _fate(block: BlockDone) -> str:
    """What the block lost, the time left at this pace, and what the process holds.

    The loss is that of the outputs where there is calibration, else of the weights.
    """
    parts = []
    known = [
        (layer.weight_sqnr_db if layer.output_sqnr_db is None else layer.output_sqnr_db, layer.name)
        for layer in block.layers
    ]
    losses = [(loss, name) for loss, name in known if loss is not None]
    if losses:
        worst, name = min(losses)
        mean = sum(loss for loss, _ in losses) / len(losses)
        parts.append(f"SQNR {mean:.1f} dB, worst {worst:.1f} ({name.rpartition('.')[2]})")
    left = block.seconds / (block.done - block.begun) * (block.total - block.done)
    parts.append(f"{block.seconds:.1f} s, {left:.0f} s left")
    parts.append(f"{block.resident_bytes / 2**30:.2f} GiB")
    return "  ".join(parts)
