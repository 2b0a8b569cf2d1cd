"""A processor's ceilings: the arithmetic under a clock that we set, and the real measurement in small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.telemetry import ceiling
from harness.telemetry.ceiling import measure


def test_the_best_of_many_counts_and_the_median_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven calls of 4, 1, 2, 2, 5, 5, 8 s, after one that is not timed: 10 units are 10/s at best, 10/4 in the middle
    of 1, 2, 2, 4, 5, 5, 8."""
    ticks: Iterator[float] = iter([0, 4, 10, 11, 20, 22, 30, 32, 40, 45, 50, 55, 60, 68])
    monkeypatch.setattr("harness.telemetry.ceiling.time.perf_counter", lambda: next(ticks))
    calls: list[int] = []
    found = ceiling._rate(10.0, lambda: calls.append(1))
    assert (found.best, found.median) == (10.0, 2.5)
    assert len(calls) == 8


def test_short_work_is_repeated_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second a call: ten of them make the second."""
    now = iter(at * 0.1 for at in range(100))
    monkeypatch.setattr("harness.telemetry.ceiling.time.perf_counter", lambda: next(now))
    calls: list[int] = []
    ceiling._rate(1.0, lambda: calls.append(1))
    assert 10 <= len(calls) - 1 <= 11


def test_what_each_measurement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB: a copy moves it twice, a read once; a product of side 64 is 2 x 64^3 = 524,288 operations."""
    amounts: list[float] = []

    def rate(amount: float, work: object) -> ceiling._Rate:
        assert callable(work)
        work()
        amounts.append(amount)
        return ceiling._Rate(amount, amount)

    monkeypatch.setattr(ceiling, "_rate", rate)
    found = measure(threads=2, buffer_bytes=2**20, side=64)
    assert amounts == pytest.approx([2 * 2**20 / 1e9, 2**20 / 1e9, 2 * 64**3 / 1e12])
    assert found.bandwidth_gb_s == amounts[0]  # the larger of the two
    assert found.tflops == amounts[2]
    assert "2 threads copy" in found.source
    assert "1 MiB" in found.source


def test_a_small_measurement_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)
    found = measure(buffer_bytes=2**20, side=64)
    assert found.bandwidth_gb_s > 0
    assert found.tflops > 0
    assert found.kind == "float32"
    assert found.ridge > 0
    assert "float32" in found.doubt


def test_buffers_are_larger_than_the_caches_and_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_last_level_bytes", lambda: 2**30)
    monkeypatch.setattr(
        "harness.telemetry.ceiling.psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**40})
    )
    assert ceiling._buffer_bytes() == 4 * 2**30
    monkeypatch.setattr(
        "harness.telemetry.ceiling.psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**30})
    )
    assert ceiling._buffer_bytes() == 2**27
    monkeypatch.setattr(ceiling, "_last_level_bytes", lambda: 0)
    monkeypatch.setattr(
        "harness.telemetry.ceiling.psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**40})
    )
    assert ceiling._buffer_bytes() == 2**28
