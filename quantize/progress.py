"""How far a run is, on stderr: a bar where somebody watches, one plain line a block where a log does."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reporter() -> Iterator[Callable[[int, int], None]]:
    """A function to call with the blocks done and the blocks in all; the bar goes when the body ends."""
    if not sys.stderr.isatty():
        started = time.perf_counter()

        def line(done: int, total: int) -> None:
            print(f"block {done}/{total}  {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("quantizing block"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("blocks", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
