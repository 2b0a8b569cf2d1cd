"""Several devices that work on one model, and give what one alone would have given, bit for bit.

Blocks follow one another, because each is rounded for the outputs of the rounded ones before it. So what is shared out
is what does not wait for the rest of it, and results are put together in the order in which one device makes them:

    without calibration    whole blocks, one on each device at a time
    with calibration       the batches of the calibration set, on copies of the block; AWQ's search, layer by layer

Each device has a thread of its own, which waits for it while Python goes on. All devices have to be of one kind:
another GPU adds up its products in another order.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

from quantize.errors import InputError

Made = TypeVar("Made")


def parse(text: str | None) -> tuple[str, ...]:
    """The devices that `--device` names, as torch calls them: those in `text`, else the GPU if there is one.

    Raises InputError for what is no device here, and for devices of several kinds.
    """
    names = tuple((text or ("cuda" if torch.cuda.is_available() else "cpu")).split(","))
    for name in names:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            allowed = "cpu, or cuda where there is a GPU; several as cuda:0,cuda:1"
            raise InputError(f"device {name!r} ({error})", allowed, "Correct --device") from error
    kinds = {kind_of(name) for name in names}
    if len(kinds) > 1:
        raise InputError(
            f"devices of several kinds: {', '.join(sorted(kinds))}",
            "devices of one kind, which round alike",
            "Name those of one kind with --device",
        )
    return names


def kind_of(device: str) -> str:
    """What rounds alike: the name of a GPU, or the type of any other device."""
    found = torch.device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def in_order(work: Callable[[int, int], Made], count: int, sides: int) -> Iterator[Made]:
    """work(side, i) for each i below `count`, in that order; i is done on side i % `sides`.

    Each side does one at a time, and none is more than `sides` ahead of whoever takes the results. One side alone works
    in the caller's thread, when it is asked.
    """
    if sides == 1:
        yield from (work(0, i) for i in range(count))
        return
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def begin() -> None:  # both are a thread's own, and as many threads make the same sums
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)

    with ExitStack() as pools:
        workers = [pools.enter_context(ThreadPoolExecutor(1, initializer=begin)) for _ in range(sides)]
        ahead: deque[Future[Made]] = deque()
        for i in range(count):
            if len(ahead) == sides:
                yield ahead.popleft().result()
            ahead.append(workers[i % sides].submit(work, i % sides, i))
        while ahead:
            yield ahead.popleft().result()


def spread(work: Callable[[str, int], Made], count: int, devices: Sequence[str]) -> list[Made]:
    """work(device, i) for each i below `count`, as a list in that order."""
    return list(in_order(lambda side, i: work(devices[side], i), count, min(len(devices), max(1, count))))
