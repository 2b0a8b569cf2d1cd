"""A generator collects no garbage while it measures, so none may be left: counting references frees a finished request.

What the collector finds after a cell is what would have grown within it. Once it was 12 kB a request: 2.8 GB in a
window of ten minutes at 390 requests a second.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import uvloop

from harness.engines import Target
from harness.load import worker
from harness.load.arrivals import Job
from harness.load.messages import Done, Stop
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario

Truth = Callable[..., str]
IDS = Dialect(vocabulary=range(100, 1000))
SHORT = Scenario("test", input_tokens=8, output_tokens=6, request_timeout_s=5.0, token_timeout_s=0.2)
CLOSED = Cell("x", 8)
REQUESTS = 200
ONCE = 30
"""Objects that a cell leaves once, however many its requests are: ctypes makes a class when the timer is opened."""


@contextmanager
def no_collections() -> Iterator[None]:
    """As in a generator: from here on only counting frees."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def left_by(url: str, scenario: Scenario, cell: Cell, requests: int = REQUESTS) -> tuple[int, set[str | None]]:
    """(objects that the collector finds after a cell of so many requests in a generator, how these ended)."""
    errors: list[str | None] = []

    async def run() -> int:
        commands: asyncio.Queue[object] = asyncio.Queue()

        def tell(message: object) -> None:
            if isinstance(message, RequestRecord):
                errors.append(message.error)
                if len(errors) == requests:
                    commands.put_nowait(Stop())

        job = Job(cell, scenario, IDS, Target(url, "truth"), time.time_ns())
        with no_collections():
            done = await worker._run(job, commands, tell)
            found = gc.collect()
        assert isinstance(done, Done), done
        return found

    return uvloop.run(run()), set(errors) - {"cut"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), None),
        (("--gap-ms", "8"), None),  # the poller reads
        (("--drip", "7"), None),
        (("--status", "503", "--every", "2"), "http_503"),
        (("--error-after", "2", "--every", "2"), "stream_error"),
        (("--close-after", "2", "--every", "2"), "early_close"),
        (("--stall-after", "2", "--every", "20"), "stall"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_requests_leave_no_garbage(truth: Truth, options: tuple[str, ...], error: str | None) -> None:
    url = truth("--ttft-ms", "2", *(() if "--gap-ms" in options else ("--gap-ms", "1")), *options)
    left, errors = left_by(url, SHORT, CLOSED)
    assert error in errors
    assert left < ONCE


def test_an_open_loop_leaves_none(truth: Truth) -> None:
    url = truth("--ttft-ms", "2", "--gap-ms", "1")
    left, errors = left_by(url, replace(SHORT, arrivals="poisson"), Cell("x", 0, rate_rps=300.0))
    assert errors == {None} and left < ONCE


def test_conversations_leave_none(truth: Truth) -> None:
    url = truth("--ttft-ms", "2", "--gap-ms", "1")
    left, errors = left_by(url, replace(SHORT, turns=3, think_s=0.01), CLOSED)
    assert errors == {None} and left < ONCE


def test_answers_that_do_not_come_in_time_leave_none(truth: Truth) -> None:
    url = truth("--ttft-ms", "1000")
    left, errors = left_by(url, replace(SHORT, request_timeout_s=0.02), CLOSED, requests=100)
    assert errors == {"timeout"} and left < ONCE


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connections_that_are_refused_leave_none(scheme: str) -> None:
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        left, errors = left_by(f"{scheme}://127.0.0.1:{held.getsockname()[1]}", SHORT, CLOSED, requests=100)
    assert errors == {"connect"} and left < ONCE


def test_a_handshake_that_fails_leaves_none(truth: Truth) -> None:
    """TLS asked of a server that speaks none."""
    url = truth().replace("http:", "https:")
    left, errors = left_by(url, SHORT, CLOSED, requests=100)
    assert errors == {"connect"} and left < ONCE
