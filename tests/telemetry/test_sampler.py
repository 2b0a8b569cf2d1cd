"""The NVML sampler on written readings (conftest.py), and on a real card where there is one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from harness.analysis.power import summarise_gpu
from harness.records import GpuSample
from harness.telemetry import gpu, sampler
from harness.telemetry.sampler import GpuSampler, reasons, ticks

Replaying = Callable[[str], Any]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PERIOD_S", 0.001)


def take(samples: int, pids: set[int] | None = None) -> GpuSampler:
    """Sample until so many have come."""
    come: list[GpuSample] = []
    enough = threading.Event()

    def on_sample(sample: GpuSample) -> None:
        come.append(sample)
        if len(come) >= samples:
            enough.set()

    with GpuSampler(pids, on_sample, cell="awq-c8-r1", attempt=2) as taken:
        assert enough.wait(10), taken.lost
    assert come == taken.samples
    return taken


def sampling_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "gpu-sampler"]


@pytest.mark.usefixtures("fast")
def test_units_and_figures_that_a_card_does_not_have(replay: Replaying) -> None:
    replay("steady")
    began = time.time_ns()
    first, other, second = take(3).samples[:3]
    assert began <= first.time_ns <= second.time_ns <= time.time_ns()
    assert replace(first, time_ns=0) == GpuSample(
        cell="awq-c8-r1",
        time_ns=0,
        index=0,
        power_w=30.0,
        energy_j=1000.0,
        sm_clock_mhz=210,
        memory_clock_mhz=405,
        temperature_c=41,
        utilisation=0.0,
        used_gib=14.5,
        throttle=(),
        attempt=2,
    )
    assert (second.index, second.power_w, second.energy_j, second.utilisation) == (0, 150.0, 1009.0, 0.97)
    assert (other.index, other.power_w, other.sm_clock_mhz, other.temperature_c, other.used_gib) == (1, 9, 210, 35, 0.5)
    assert (other.energy_j, other.memory_clock_mhz, other.utilisation) == (None, None, None)
    assert other.throttle == ("unknown",), "which is not the same as none"


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("pids", "cards"),
    [(None, {0, 1}), ({4001, 7}, {0}), ({7}, {0, 1})],
    ids=["all", "the engine's", "no card admits to it"],
)
def test_which_cards_are_read(replay: Replaying, pids: set[int] | None, cards: set[int]) -> None:
    replay("steady")
    assert {sample.index for sample in take(4, pids).samples} == cards


@pytest.mark.usefixtures("fast")
def test_every_card_of_an_engine_on_several_is_read(replay: Replaying, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallel: one worker a card, all in the engine's tree of processes; a stranger holds memory too."""
    replay("steady")

    def running(card: dict[str, Any]) -> list[SimpleNamespace]:
        mine, gib = 5001 + card["index"], 2**30
        return [SimpleNamespace(pid=mine, usedGpuMemory=6 * gib), SimpleNamespace(pid=7, usedGpuMemory=gib)]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", running)
    assert {sample.index for sample in take(4, {4999, 5001, 5002}).samples} == {0, 1}
    assert {sample.index for sample in take(4, {4999, 5002}).samples} == {1}
    assert gpu.processes_gib({4999, 5001, 5002}) == 12


@pytest.mark.usefixtures("fast")
def test_nvml_is_opened_once_and_closed(replay: Replaying) -> None:
    played = replay("throttling")
    take(30)
    assert played.calls["nvmlDeviceGetPowerUsage"] >= 30
    assert (played.calls["nvmlInit"], played.calls["nvmlShutdown"]) == (1, 1)
    assert not sampling_threads()


@pytest.mark.parametrize("name", ["ClocksEventReason", "ClocksThrottleReason"])
def test_reasons_are_those_of_the_header(name: str) -> None:
    words = {
        "SwPowerCap": ("sw_power_cap",),
        "HwSlowdown": ("hw_slowdown",),
        "SwThermalSlowdown": ("sw_thermal",),
        "HwThermalSlowdown": ("hw_thermal",),
        "HwPowerBrakeSlowdown": ("power_brake",),
        "GpuIdle": (),
        "ApplicationsClocksSetting": (),
        "SyncBoost": (),
        "DisplayClockSetting": (),
        "None": (),
    }
    for end, expected in words.items():
        assert reasons(getattr(pynvml, f"nvml{name}{end}")) == expected, end
    assert set(reasons(getattr(pynvml, f"nvml{name}All"))) == {word for words in words.values() for word in words}


@pytest.mark.usefixtures("fast")
def test_throttling_from_the_driver_to_the_row(replay: Replaying) -> None:
    replay("throttling")
    samples = take(10).samples[:10]
    assert [sample.throttle for sample in samples] == [
        ("sw_power_cap",),
        ("sw_power_cap",),
        ("sw_power_cap", "sw_thermal"),
        *[("hw_slowdown", "hw_thermal")] * 4,
        (),
        ("sw_power_cap",),
        (),
    ]
    # Laid on the grid that they were written for: 0.9 s of window, nine samples in it, five of them slowed. The counter
    # grew by 116 J; sorted clocks: 1100 1100 1200 1200 [2400] 2480 2500 2500 2500.
    on_grid = [replace(sample, time_ns=10**18 + at * 10**8) for at, sample in enumerate(samples)]
    found = summarise_gpu(on_grid, on_grid[0].time_ns, on_grid[9].time_ns, output_tokens=232.0)
    assert found == {
        "power_w": pytest.approx(116 / 0.9),
        "energy_j_per_token": pytest.approx(0.5),
        "sm_clock_mhz": 2400.0,
        "temperature_c_max": 92.0,
        "throttled_share": pytest.approx(5 / 9),
    }


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("missing", ["driver", "pynvml"])
def test_older_name_of_the_reasons(replay: Replaying, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    replay("throttling")

    def unknown_function(_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    if missing == "driver":
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", unknown_function)
    else:
        monkeypatch.delattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    assert take(1).samples[0].throttle == ("sw_power_cap",)


@pytest.mark.usefixtures("fast")
def test_a_card_lost_on_the_way_leaves_what_was_read(replay: Replaying) -> None:
    played = replay("lost")
    with GpuSampler(None, lambda sample: None, cell="awq-c8-r1") as taken:
        for _ in range(1000):
            if not sampling_threads():
                break
            time.sleep(0.01)
        assert taken.lost == "GPU is lost"
        assert not sampling_threads()
    assert [sample.power_w for sample in taken.samples] == [150.0, 151.0, 152.0]
    assert played.calls["nvmlDeviceGetPowerUsage"] == 4, "it is not asked again"
    assert played.calls["nvmlShutdown"] == 1


@pytest.mark.usefixtures("fast")
def test_a_driver_that_has_gone_cannot_be_shut_and_that_is_no_error(
    replay: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay("lost")

    def gone() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    monkeypatch.setattr(pynvml, "nvmlShutdown", gone)
    assert len(take(3).samples) == 3


def test_a_card_lost_before_the_first_reading(replay: Replaying, monkeypatch: pytest.MonkeyPatch) -> None:
    replay("steady")

    def lost(_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lost)
    with GpuSampler(None, lambda sample: None, cell="awq-c8-r1") as taken:
        assert not sampling_threads()
    assert (taken.samples, taken.lost) == ([], "GPU is lost")


@pytest.mark.parametrize("why", ["no driver", "no card", "none visible"])
def test_without_a_card_there_is_no_thread(replay: Replaying, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    replay("steady")

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    if why == "no driver":
        monkeypatch.setattr(pynvml, "nvmlInit", fail)
    elif why == "no card":
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with GpuSampler({1}, lambda sample: None, cell="awq-c8-r1") as taken:
        assert not sampling_threads()
    assert (taken.samples, taken.lost) == ([], None)


@pytest.mark.usefixtures("fast")
def test_a_row_that_cannot_be_written_ends_the_cell(replay: Replaying) -> None:
    replay("steady")
    failed = threading.Event()

    def on_sample(sample: GpuSample) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), GpuSampler(None, on_sample, cell="awq-c8-r1"):
        assert failed.wait(10)
    failed.clear()
    with pytest.raises(KeyboardInterrupt), GpuSampler(None, on_sample, cell="awq-c8-r1"):
        assert failed.wait(10)
        raise KeyboardInterrupt  # what ended the cell first is what is told


class Stop(threading.Event):
    """A stop whose waiting takes no time but moves a clock; set at `end`."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.time, self.end = 100.0, 100.0 + end

    def now(self) -> float:
        return self.time

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None and timeout > 0
        self.time = min(self.time + timeout, self.end)
        return self.time >= self.end


@pytest.mark.parametrize(
    ("costs", "at"),
    [
        ([0.01, 0.01, 0.01, 0.01, 0.01], [0.0, 0.1, 0.2, 0.3, 0.35]),  # on the grid, and once more at the end
        ([0.01, 0.14, 0.01, 0.01], [0.0, 0.1, 0.3, 0.35]),  # 0.24 is late for 0.2, and does not take 0.2 again
        ([0.25, 0.01, 0.01], [0.0, 0.3, 0.35]),  # 0.1 and 0.2 are gone, not queued
    ],
    ids=["on time", "late once", "late twice over"],
)
def test_the_grid_neither_drifts_nor_queues(costs: list[float], at: list[float]) -> None:
    stop = Stop(end=0.35)
    taken = []
    for cost, _ in zip(costs, ticks(stop, 0.1, stop.now), strict=False):
        taken.append(stop.time - 100)
        stop.time += cost
    assert taken == pytest.approx(at)


@pytest.fixture
def real_card() -> gpu.Gpu:
    cards = gpu.gpus()
    if not cards:
        pytest.skip("no NVIDIA GPU on this machine")
    return cards[0]


def test_real_card(real_card: gpu.Gpu) -> None:
    samples = [sample for sample in take(20).samples if sample.index == real_card.index]
    assert 0 < (samples[-1].used_gib or 0) <= real_card.memory_gib
    assert all(0 <= (sample.utilisation or 0) <= 1 for sample in samples)
    assert all(-10 < (sample.temperature_c or 0) < 120 for sample in samples)
    counter = [sample.energy_j for sample in samples if sample.energy_j is not None]
    assert counter == sorted(counter)
    known = {*sampler.REASONS.values(), sampler.UNKNOWN}
    assert all(set(sample.throttle) <= known for sample in samples)
