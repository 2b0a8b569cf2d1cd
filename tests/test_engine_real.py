"""vLLM itself: started, read, asked, stopped. Needs an engine environment; see conftest.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from harness.engines import ServeSpec, Target
from harness.engines.endpoint import attach
from harness.engines.environment import EngineEnv
from harness.engines.vllm import VllmServer, serve
from harness.errors import EngineError
from harness.models import GIB, resolve, weight_bytes

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

# Small, with every width a multiple of what AWQ kernels want.
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def shape(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPE | changes), encoding="utf-8")
    return directory


def living(group: int) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def complete(target: Target, prompt: list[int], tokens: int) -> list[dict[str, object]]:
    """The chunks of one streamed completion."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {target.api_key}"}
    reply = httpx.post(f"{target.base_url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False)
    reply.raise_for_status()
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def token_ids(chunks: list[dict[str, object]]) -> list[int]:
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]  # type: ignore


def test_demo_model(serving: Callable[[ServeSpec], VllmServer]) -> None:
    model = resolve("demo")
    engine = serving(ServeSpec(model.path, "bf16", max_model_len=512, max_num_seqs=16, kv_cache_gib=0.25))
    info = engine.info
    assert info.engine_version and info.source == "engine"
    assert info.kv_cache_gib == 0.25 and info.kv_cache_tokens is not None
    assert info.max_concurrency == pytest.approx(info.kv_cache_tokens / 512, rel=0.01)
    held = weight_bytes(model)
    assert held is not None and info.weights_gib == pytest.approx(held / GIB, rel=0.2)
    if info.device == "host":
        assert info.kernel == "unquantized bfloat16"
        assert info.settings["VLLM_CPU_INT4_W4A8"] == "0"
        assert info.settings["weights from"] == "safetensors headers"

    before = engine.counters()
    chunks = complete(engine.target, [11, 22, 33, 44], 8)
    after = engine.counters()
    assert len(token_ids(chunks)) == 8
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8  # type: ignore
    assert (before.generation_tokens_total or 0) + 8 == after.generation_tokens_total
    assert (before.prompt_tokens_total or 0) + 4 == after.prompt_tokens_total
    memory = engine.memory_gib()
    assert memory is not None and 0.3 < memory < 16

    # The same server as an endpoint that runs already.
    assert engine.target.api_key is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNEEBENCH_API_KEY", engine.target.api_key)
        with attach(engine.target.base_url) as endpoint:
            assert endpoint.target.model == engine.target.model
            assert endpoint.info.engine_version == info.engine_version
            assert endpoint.counters().generation_tokens_total == after.generation_tokens_total
    engine.check()


def test_awq_shape_with_random_weights_and_a_clean_stop(tmp_path: Path, engine_env: EngineEnv) -> None:
    model = resolve(f"shape:{shape(tmp_path / 'awq', quantization_config=AWQ)}")
    log, group = tmp_path / "engine.log", 0
    spec = ServeSpec(model.path, "awq", max_model_len=512, max_num_seqs=8, dummy_weights=True, kv_cache_gib=0.125)
    with serve(spec, engine_env, log) as engine:
        group = engine.pid
        assert engine.info.kernel is not None
        assert "WNA16" in engine.info.kernel or engine_env.kind == "cuda"
        assert engine.info.source == "dummy-weights"
        if engine.info.device == "host":
            # 2 (K and V) × 2 layers × 2 heads × 64 × 2 bytes a token, in whole blocks.
            assert engine.info.kv_cache_tokens == pytest.approx(0.125 * GIB / 1024, rel=0.01)
        assert len(token_ids(complete(engine.target, [5, 6, 7], 4))) == 4, "ids in, ids out: no tokenizer needed"
        assert len(living(group)) >= 2
    assert living(group) == []
    text = log.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_death_at_start(tmp_path: Path, engine_env: EngineEnv) -> None:
    path = shape(tmp_path / "odd", quantization_config={"quant_method": "nosuch", "bits": 4})
    with pytest.raises(EngineError, match="Unknown quantization method(?s:.*)To mend it"):
        with serve(ServeSpec(path, "odd", dummy_weights=True), engine_env, tmp_path / "engine.log"):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_orphan_when_we_are_killed(tmp_path: Path, engine_env: EngineEnv) -> None:
    program = f"""
import time
from pathlib import Path
from harness.engines import ServeSpec
from harness.engines.environment import probe
from harness.engines.vllm import serve
model = Path({str(shape(tmp_path / "m"))!r})
spec = ServeSpec(model, "bf16", max_model_len=512, dummy_weights=True, kv_cache_gib=0.125)
with serve(spec, probe(Path({str(engine_env.python)!r})), Path({str(tmp_path / "engine.log")!r})) as engine:
    print(engine.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        group = int(harness.stdout.readline())
        harness.kill()
        harness.wait()
    try:
        deadline = time.monotonic() + 30
        while living(group) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert living(group) == []
    finally:
        if living(group):
            os.killpg(group, signal.SIGKILL)
