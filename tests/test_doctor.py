from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import doctor
from harness.cli import main
from harness.doctor import Finding, examine
from harness.engines import environment
from harness.telemetry import gpu, host


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def found() -> dict[str, Finding]:
    return {finding.what: finding for finding in examine()}


def test_whatever_is_missing_names_its_remedy_and_who_needs_it() -> None:
    findings = examine()
    assert len({finding.what for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail
        assert bool(finding.remedy) == bool(finding.needed_for) == (finding.state != "ok"), finding


def test_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, environment):
        monkeypatch.setattr(module, "gpus", lambda: ())
    findings = found()
    assert findings["GPU"].detail == "no NVIDIA GPU seen"
    assert findings["vLLM (cpu)"].remedy == "bench engine install cpu"
    assert findings["vLLM (cuda)"].state == "ok", "not needed here"


def test_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = gpu.Gpu(0, "NVIDIA GeForce RTX 4060 Ti", 15.7, 0.4, driver="580.65", cuda="13.0")
    for module in (doctor, environment):
        monkeypatch.setattr(module, "gpus", lambda: (card,))
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    findings = found()
    assert (
        findings["GPU"].detail
        == "NVIDIA GeForce RTX 4060 Ti (15.7 GiB, 0.4 used); driver 580.65, serves CUDA up to 13.0"
    )
    assert findings["vLLM (cuda)"].remedy == "bench engine install cuda"
    assert findings["vLLM (cpu)"].state == "ok"
    assert findings["nvcc"].state == "missing"


def test_half_made_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.home("cpu").mkdir(parents=True)
    finding = found()["vLLM (cpu)"]
    assert (finding.state, finding.detail) == ("missing", "begun, not finished")


def test_extras_are_looked_up_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = found()["extra quantize"]
    assert finding.detail == "no torch, transformers, tokenizers, safetensors"
    assert finding.remedy == "pip install 'kneebench[quantize]'"


def test_no_nvml_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert gpu.gpus() == ()
    assert gpu.processes_gib({1, 2}) is None


def test_two_cards_of_which_one_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's answers are written here (no card at hand); every function must exist in the real pynvml."""
    import pynvml

    held = {0: [(11, 3 * gpu.GIB), (99, gpu.GIB)], 1: [(11, 2 * gpu.GIB), (12, None)]}
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetIndex": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: f"RTX {handle}".encode(),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=16 * gpu.GIB, used=handle * gpu.GIB),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in held[handle]
        ],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [card.name for card in gpu.gpus()] == ["RTX 0", "RTX 1"]
    assert gpu.processes_gib({11, 12}) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.gpus() == (gpu.Gpu(1, "RTX 1", 16.0, 1.0, driver="580.65", cuda="13.0"),)
    assert gpu.processes_gib({11}) == 2
    assert gpu.processes_gib({12}) is None, "the driver does not say"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpus() == ()


def test_host() -> None:
    machine = host.host()
    assert machine.cores >= 1 and machine.memory_gib > machine.available_gib > 0 and machine.cpu


def test_tree_memory_counts_children_and_ends_with_them() -> None:
    import subprocess
    import sys

    grown = "import subprocess, sys; b = bytearray(80 << 20); print(1, flush=True); sys.stdin.read()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grown!r}])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert len(host.tree_pids(process.pid)) == 2
        held = host.tree_memory_gib(process.pid)
        assert held is not None and 80 / 1024 < held < 0.5
        process.stdin.close()
        process.wait()
    assert host.tree_memory_gib(process.pid) is None


LOGS = Path(__file__).parent / "logs"


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["bench", "doctor", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_an_engines_log_is_read_for_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = LOGS / "kv_cache_too_small.log"
    assert run("--engine-log", str(log), monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().out
    number = re.search(r"\(line (\d+)", said)
    assert number and "max_model_len" in said
    words = said.splitlines()[1].split()[:4]  # what it quotes stands in that line
    assert " ".join(words) in log.read_text().splitlines()[int(number[1]) - 1]
    assert run("--engine-log", str(LOGS / "healthy-stopped.log"), monkeypatch=monkeypatch) == 0
    assert "no failure that is known" in capsys.readouterr().out
    assert run("--engine-log", str(tmp_path / "absent"), monkeypatch=monkeypatch) == 2


def test_the_sandbox_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.quality import sandbox

    monkeypatch.setattr(sandbox, "find_runner", lambda: None)
    finding = found()["sandbox"]
    assert (finding.state, "bubblewrap" in finding.remedy) == ("missing", True)
