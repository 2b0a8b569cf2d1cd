"""NVML without a card: the real pynvml, with the functions that we call replaying what tests/data/nvml_*.json says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

MIB = 2**20
WRITTEN = json.loads((Path(__file__).parent.parent / "data" / "nvml_written.json").read_text(encoding="utf-8"))


class Replay:
    """The n-th call of a function about a card gets the n-th reading; the last one stays. Handles are the columns."""

    def __init__(self, cards: list[dict[str, Any]]) -> None:
        self.cards = cards
        self.calls: Counter[str] = Counter()
        self._at: Counter[tuple[str, str, int]] = Counter()

    def reading(self, function: str, column: str) -> Callable[..., Any]:
        """The stand-in for `function`: answers from `column`; NOT_SUPPORTED without one, an error from its row on."""

        def answer(card: dict[str, Any], *_: object) -> Any:
            self.calls[function] += 1
            cursor = (function, column, card["index"])
            at = self._at[cursor]
            self._at[cursor] += 1
            error = card["error"][min(at, len(card["error"]) - 1)] if "error" in card else None
            if error is not None:
                raise pynvml.NVMLError(error)
            if column not in card:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return card[column][min(at, len(card[column]) - 1)]

        return answer


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Replay]:
    """`replay("steady")`: from now on NVML says what that case says. Functions that pynvml lacks cannot be replaced."""

    def begin(case: str) -> Replay:
        played = Replay(WRITTEN[case])

        def clock(card: dict[str, Any], kind: int) -> Any:
            return clocks[kind](card)

        def count(name: str) -> Callable[[], None]:
            return lambda: played.calls.update([name])

        def utilisation(card: dict[str, Any]) -> SimpleNamespace:
            return SimpleNamespace(gpu=percent(card), memory=0)

        def memory(card: dict[str, Any]) -> SimpleNamespace:
            return SimpleNamespace(total=16 * 1024 * MIB, used=mebibytes(card) * MIB)

        def running(card: dict[str, Any]) -> list[SimpleNamespace]:
            if "pids" not in card:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in card["pids"]]

        def mask(name: str) -> Callable[[dict[str, Any]], int]:
            bits = played.reading(name, "reasons")
            return lambda card: int(bits(card), 16)

        clocks = {
            pynvml.NVML_CLOCK_SM: played.reading("nvmlDeviceGetClockInfo", "sm_mhz"),
            pynvml.NVML_CLOCK_MEM: played.reading("nvmlDeviceGetClockInfo", "memory_mhz"),
        }
        percent = played.reading("nvmlDeviceGetUtilizationRates", "utilisation")
        mebibytes = played.reading("nvmlDeviceGetMemoryInfo", "used_mib")
        functions: dict[str, Callable[..., Any]] = {
            "nvmlInit": count("nvmlInit"),
            "nvmlShutdown": count("nvmlShutdown"),
            "nvmlDeviceGetCount": lambda: len(played.cards),
            "nvmlDeviceGetHandleByIndex": lambda index: played.cards[index],
            "nvmlDeviceGetIndex": lambda card: card["index"],
            "nvmlDeviceGetComputeRunningProcesses": running,
            "nvmlDeviceGetPowerUsage": played.reading("nvmlDeviceGetPowerUsage", "power_mw"),
            "nvmlDeviceGetTotalEnergyConsumption": played.reading("nvmlDeviceGetTotalEnergyConsumption", "energy_mj"),
            "nvmlDeviceGetClockInfo": clock,
            "nvmlDeviceGetTemperature": played.reading("nvmlDeviceGetTemperature", "temperature_c"),
            "nvmlDeviceGetUtilizationRates": utilisation,
            "nvmlDeviceGetMemoryInfo": memory,
        }
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            functions[name] = mask(name)
        for name, function in functions.items():
            monkeypatch.setattr(pynvml, name, function)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return played

    return begin
