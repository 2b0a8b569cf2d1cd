"""What gpu.py says of a card that stops answering; cards that answer are in test_doctor.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml
import pytest

from harness.telemetry import gpu


@pytest.mark.parametrize("asked", ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetCount"])
def test_a_lost_card_holds_nothing_that_we_know_of(
    replay: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    played = replay("steady")

    def lost(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, asked, lost)
    assert gpu.processes_gib({4001}) is None
    assert played.calls["nvmlShutdown"] == 1


def test_a_lost_card_is_no_card(replay: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replay("steady")

    def lost(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.65")
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: 13000)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda card: f"RTX {card['index']}")
    assert [card.name for card in gpu.gpus()] == ["RTX 0", "RTX 1"]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lost)
    assert gpu.gpus() == ()
