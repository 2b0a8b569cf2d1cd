"""Failure modes provoked on vLLM itself: what it logs today is what the catalogue knows. Needs an engine."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest

from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.modes import diagnose
from harness.engines.vllm import serve
from harness.errors import EngineError
from harness.models import resolve

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def met(log: Path) -> list[str]:
    return [met.mode.id for met in diagnose(log.read_text(encoding="utf-8"))]


def copy_of_demo(directory: Path) -> Path:
    return Path(shutil.copytree(resolve("demo").path, directory))


def test_a_quantization_that_it_cannot_serve(tmp_path: Path, engine_env: EngineEnv) -> None:
    model = copy_of_demo(tmp_path / "bits3")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    quantization = {"quant_method": "awq", "bits": 3, "group_size": 128, "zero_point": True, "version": "gemm"}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
    log = tmp_path / "engine.log"
    with pytest.raises(EngineError, match="num_bits(?s:.*)awq or gptq with 4 bits"):
        with serve(ServeSpec(model, "awq", max_model_len=512), engine_env, log):
            pass
    assert met(log) == ["unsupported_quantization"]


def test_a_pointer_in_place_of_weights(tmp_path: Path, engine_env: EngineEnv) -> None:
    """What `git clone` leaves without Git LFS: vLLM reads its first bytes as a length, and dies with MemoryError."""
    model = copy_of_demo(tmp_path / "pointer")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    log = tmp_path / "engine.log"
    with pytest.raises(EngineError, match="MemoryError(?s:.*)fetch it again"):
        with serve(ServeSpec(model, "bf16", max_model_len=512, kv_cache_gib=0.125), engine_env, log):
            pass
    assert met(log) == ["weights_torn"]


def test_a_core_that_is_killed_in_service(tmp_path: Path, engine_env: EngineEnv) -> None:
    spec = ServeSpec(resolve("demo").path, "bf16", max_model_len=512, max_num_seqs=8, kv_cache_gib=0.125)
    log = tmp_path / "engine.log"
    with serve(spec, engine_env, log) as engine:
        core = next(process for process in map(psutil.Process, engine.pids()) if "EngineCore" in process.name())
        core.kill()
        deadline = time.monotonic() + 60
        while met(log) != ["engine_died"] and time.monotonic() < deadline:
            time.sleep(0.2)
        assert met(log) == ["engine_died"], "seen while the log is written"
        with pytest.raises(EngineError, match="exited unexpectedly(?s:.*)dmesg"):
            while time.monotonic() < deadline:
                engine.check()
                time.sleep(0.2)
    assert met(log) == ["engine_died"], "and in the log as it is kept"
