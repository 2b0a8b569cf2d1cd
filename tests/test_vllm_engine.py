"""The vLLM side without vLLM: logs recorded from it are read, and a script stands in for the server process.

What the script replaces is only the work of the model; starting, waiting, dying and stopping are the real thing.
tests/test_engine_real.py does the same with vLLM itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.vllm import checked_port, free_port, serve
from harness.engines.vllm_command import command, recorded, settings, surroundings
from harness.engines.vllm_log import LogFacts, last_error, read_log, stage
from harness.errors import EngineError, InputError, ModelError
from harness.telemetry import gpu

DATA = Path(__file__).parent / "data"
CPU = EngineEnv(Path("/opt/engine/bin/python"), "cpu", "0.32.0", "2.13.0+cpu")
CUDA = EngineEnv(Path("/opt/engine/bin/python"), "cuda", "0.32.0", "2.13.0")


def recording(name: str) -> str:
    return (DATA / f"{name}.log").read_text(encoding="utf-8")


# --- the log ----------------------------------------------------------------------------------------------------------


def test_cpu_bf16_log() -> None:
    assert read_log(recording("vllm_cpu_bf16")) == LogFacts(
        version="0.32.0",
        kernel="unquantized bfloat16",
        kv_cache_gib=2.0,
        kv_cache_tokens=174_720,
        max_concurrency=170.62,
        cores="0",
    )


def test_cpu_awq_log() -> None:
    assert read_log(recording("vllm_cpu_awq")) == LogFacts(
        version="0.32.0",
        kernel="CPUWNA16LinearKernel",
        kv_cache_gib=0.5,
        kv_cache_tokens=43_648,
        max_concurrency=42.62,
        cores="0",
    )


def test_cuda_log() -> None:
    assert read_log(recording("vllm_cuda")) == LogFacts(
        version="0.32.0",
        kernel="MarlinLinearKernel",
        attention="FLASH_ATTN",
        weights_gib=5.29,
        kv_cache_gib=7.85,
        kv_cache_tokens=146_944,
        max_concurrency=143.5,
    )


def test_a_layer_that_fell_back_decides_what_the_kernel_is() -> None:
    """vLLM 0.32 warns so (auto_awq.py) for a layer that Marlin does not take; the row is then a slow_kernel."""
    log = (DATA / "vllm_cuda.log").read_text()
    fell = log + "WARNING 11-20 20:00:00 [auto_awq.py:326] Layer 'x' is not supported by AWQMarlin. "
    assert read_log(fell + "Falling back to unoptimized AWQ kernels.\n").kernel == "unoptimized AWQ"


def test_empty_log_knows_nothing() -> None:
    assert read_log("") == LogFacts()


def test_stages_follow_the_log() -> None:
    lines = recording("vllm_cpu_awq").splitlines(keepends=True)
    seen: list[str] = []
    for end in range(len(lines) + 1):
        now = stage("".join(lines[:end]))
        if not seen or seen[-1] != now:
            seen.append(now)
    assert seen == [
        "importing libraries",
        "reading the model's configuration",
        "starting its worker",
        "loading weights",
        "warming up",
        "opening its port",
    ]


@pytest.mark.parametrize(
    ("name", "line", "remedy"),
    [
        ("kvsmall", "ValueError: No available memory for the cache blocks.", "lower max_model_len"),
        ("util", "ValueError: Available memory on node 0", "free memory"),
        ("noweights", "RuntimeError: Cannot find any model weights with `<model>`", "holds no weights"),
        ("port", "OSError: [Errno 98] Address already in use", "leave the port out"),
        ("badquant", "Unknown quantization method: nosuch.", "awq or gptq"),
        ("maxlen", "User-specified max_model_len (99999) is greater", "no longer than the model was trained for"),
        ("illegal", "Fatal Python error: Illegal instruction", "native code crashed"),
        ("badarch", "The checkpoint you are trying to load has model type `nosuch`", "does not know the architecture"),
    ],
)
def test_the_cause_is_found_in_a_recorded_death(name: str, line: str, remedy: str) -> None:
    lines, advice = last_error(recording(f"vllm_dies_{name}"))
    assert len(lines) == 1 and lines[0].startswith(line)
    assert remedy in advice


def test_what_was_survived_while_starting_is_not_the_cause() -> None:
    # The recorded start warns, with a traceback, that there is no tokenizer; then it dies of something else.
    log = recording("vllm_cpu_awq")
    assert "ValueError: Tokenizer not available" in log
    log += (
        "(EngineCore pid=1) ERROR 11-20 18:51:51 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
    )
    lines, remedy = last_error(log)
    assert lines == ["torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"]
    assert "does not fit" in remedy


def test_a_death_without_an_exception_shows_the_end() -> None:
    assert last_error("one\ntwo\n") == (["one", "two"], "")
    assert last_error("") == ([], "")


# --- the command ------------------------------------------------------------------------------------------------------


def test_cpu_command(tmp_path: Path) -> None:
    spec = ServeSpec(tmp_path, "awq", max_model_len=512, max_num_seqs=8, kv_cache_gib=0.5, extra_args=("--x", "1"))
    line = command(spec, CPU, 8000)
    assert line[:3] == ["/opt/engine/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert line[-2:] == ["--x", "1"]
    text = " ".join(line)
    assert "--kv-cache-memory-bytes 536870912" in text and "--enforce-eager" in text
    assert "--max-model-len 512 --max-num-seqs 8" in text and "--host 127.0.0.1 --port 8000" in text
    assert "gpu-memory" not in text and "dummy" not in text and "key" not in text
    assert settings(spec, CPU)["VLLM_CPU_INT4_W4A8"] == "0"
    assert settings(spec, CPU)["HF_HUB_OFFLINE"] == "1"


def test_cuda_command_compiles_and_takes_the_card() -> None:
    spec = ServeSpec(Path("Qwen/Qwen2.5-0.5B"), "bf16", gpu_memory_utilization=0.85)
    text = " ".join(command(spec, CUDA, 8000))
    assert "--model Qwen/Qwen2.5-0.5B " in text
    assert "--gpu-memory-utilization 0.85" in text
    assert "enforce-eager" not in text and "kv-cache-memory" not in text
    assert "HF_HUB_OFFLINE" not in settings(spec, CUDA), "a hub model may have to be fetched"


def test_both_precisions_get_the_same_flags(tmp_path: Path) -> None:
    lines = [command(ServeSpec(tmp_path / name, name), CPU, 8000) for name in ("bf16", "awq")]
    assert [item for item in lines[0] if "bf16" not in item] == [item for item in lines[1] if "awq" not in item]


def test_dummy_weights_skip_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    spec = ServeSpec(tmp_path, "bf16", dummy_weights=True)
    assert command(spec, CPU, 1)[-3:] == ["--load-format", "dummy", "--skip-tokenizer-init"]
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert command(spec, CPU, 1)[-2:] == ["--load-format", "dummy"]


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("VLLM_API_KEY", "inherited-key")
    spec = ServeSpec(Path("some/where"), "bf16")
    seen = recorded(command(spec, CPU, 8000), settings(spec, CPU))
    assert seen["OMP_NUM_THREADS"] == "7"
    assert seen["VLLM_CPU_INT4_W4A8"] == "0"
    assert seen["--dtype"] == "bfloat16" and seen["--enforce-eager"] == ""
    assert not {"VLLM_API_KEY", "--port", "--model"} & set(seen)


def test_surroundings_keep_our_own_environment_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    seen = surroundings(CPU, {"A": "1"}, "the-key")
    assert "/ours" not in seen.values() and "VIRTUAL_ENV" not in seen
    guard, permit = map(Path, seen["PYTHONPATH"].split(os.pathsep))
    assert (permit / "sitecustomize.py").is_file(), "lets the CPU kernels use the processor's tiles"
    assert (guard / "kneebench_guard.py").is_file()
    assert surroundings(CUDA, {}, None)["PYTHONPATH"] == str(guard)
    assert seen["PATH"].startswith("/opt/engine/bin:")
    assert (seen["A"], seen["VLLM_API_KEY"]) == ("1", "the-key")


# --- the process ------------------------------------------------------------------------------------------------------

SERVER = """
import http.server, os, subprocess, sys, time
print(open({log!r}).read(), flush=True)
print("secret", os.environ["VLLM_API_KEY"], flush=True)
ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignores], stdout=subprocess.PIPE)
child.stdout.readline()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        body = open({metrics!r}, "rb").read() if self.path == "/metrics" else b"{{}}"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(directory: Path, program: str) -> EngineEnv:
    """An engine environment whose python runs `program`, whatever module it is asked for."""
    python = directory / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    python.chmod(0o755)
    return EngineEnv(python, "cpu", "0.32.0", "2.13.0+cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A shape small enough that its size can be told from config.json."""
    fields = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=100)
    (tmp_path / "model").mkdir()
    text = json.dumps({"model_type": "llama", "num_key_value_heads": 2, **fields})
    (tmp_path / "model" / "config.json").write_text(text, encoding="utf-8")
    return tmp_path / "model"


@pytest.fixture
def server_env(tmp_path: Path) -> EngineEnv:
    program = SERVER.format(log=str(DATA / "vllm_cpu_awq.log"), metrics=str(DATA / "vllm_metrics.txt"))
    return stand_in(tmp_path, program)


def living(group: int) -> list[int]:
    """Processes of a group that have not ended; a zombie has."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def test_serve_reads_and_stops_everything(tmp_path: Path, model: Path, server_env: EngineEnv) -> None:
    log, statuses = tmp_path / "run" / "engine.log", list[str]()
    with serve(ServeSpec(model, "awq", dummy_weights=True), server_env, log, statuses.append) as engine:
        assert engine.info.kernel == "CPUWNA16LinearKernel"
        assert engine.info.kv_cache_tokens == 43_648
        assert (engine.info.device, engine.info.source) == ("host", "dummy-weights")
        assert engine.info.settings["weights from"] == "config.json"
        assert engine.info.settings["VLLM_CPU_INT4_W4A8"] == "0"
        assert engine.counters().generation_tokens_total == 134
        held = engine.memory_gib()
        assert held is not None and held > 0
        engine.check()
        key = engine.target.api_key
        assert key is not None and len(key) >= 24
        assert all(key not in item for item in psutil.Process(engine.pid).cmdline()), "`ps` must not show it"
        assert len(living(engine.pid)) == 2
        group = engine.pid
    assert living(group) == [], "the child that ignores SIGTERM too"
    assert statuses[-1].startswith("vLLM: ready after")
    text = log.read_text(encoding="utf-8")
    assert key not in text and "secret <key>" in text
    assert str(tmp_path) not in text


def test_an_exception_inside_stops_the_engine(tmp_path: Path, model: Path, server_env: EngineEnv) -> None:
    group = 0
    with pytest.raises(KeyboardInterrupt):
        with serve(ServeSpec(model, "awq", dummy_weights=True), server_env, tmp_path / "engine.log") as engine:
            group = engine.pid
            raise KeyboardInterrupt
    assert group and living(group) == []


def test_death_at_start_shows_its_own_lines(tmp_path: Path, model: Path) -> None:
    log = DATA / "vllm_dies_kvsmall.log"
    env = stand_in(tmp_path, f"import sys\nprint(open({str(log)!r}).read())\nsys.exit(1)")
    with pytest.raises(EngineError, match="No available memory for the cache blocks") as caught:
        with serve(ServeSpec(model, "bf16", dummy_weights=True), env, tmp_path / "engine.log"):
            pass
    message = str(caught.value)
    assert "exit code 1" in message and "To mend it: the KV cache is too small" in message
    assert str(tmp_path / "engine.log") in message
    assert caught.value.exit_code == 1


def test_killed_by_the_kernel(tmp_path: Path, model: Path) -> None:
    env = stand_in(tmp_path, "import os, signal\nprint('loading', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineError, match="ended by SIGKILL(?s:.*)memory may have run out"):
        with serve(ServeSpec(model, "bf16", dummy_weights=True), env, tmp_path / "engine.log"):
            pass


def test_death_while_serving_is_noticed(tmp_path: Path, model: Path, server_env: EngineEnv) -> None:
    with serve(ServeSpec(model, "awq", dummy_weights=True), server_env, tmp_path / "engine.log") as engine:
        os.kill(engine.pid, signal.SIGKILL)
        while engine.pid in living(engine.pid):
            time.sleep(0.01)
        with pytest.raises(EngineError, match="SIGKILL"):
            engine.check()
        assert engine.counters().running is None
        group = engine.pid
    assert living(group) == []


def test_an_engine_that_hangs(tmp_path: Path, model: Path) -> None:
    env = stand_in(tmp_path, "import time\nprint('version 1', flush=True)\ntime.sleep(600)")
    with pytest.raises(EngineError, match="did not answer within 1 s"):
        spec = ServeSpec(model, "bf16", dummy_weights=True)
        with serve(spec, env, tmp_path / "engine.log", start_timeout_s=1):
            pass


def test_an_engine_that_cannot_be_started(tmp_path: Path, model: Path) -> None:
    env = EngineEnv(tmp_path / "gone", "cpu", "0.32.0")
    with pytest.raises(EngineError, match="could not be started"):
        with serve(ServeSpec(model, "bf16", dummy_weights=True), env, tmp_path / "engine.log"):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_orphan_when_we_are_killed(tmp_path: Path, model: Path, server_env: EngineEnv) -> None:
    program = f"""
import time
from pathlib import Path
from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.vllm import serve
env = EngineEnv(Path({str(server_env.python)!r}), "cpu", "0.32.0")
spec = ServeSpec(Path({str(model)!r}), "awq", dummy_weights=True)
with serve(spec, env, Path({str(tmp_path / "engine.log")!r})) as engine:
    print(engine.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        group = int(harness.stdout.readline())
        harness.kill()
        harness.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(group) and group in living(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = living(group)
    for pid in left:  # the stand-in's deaf child; vLLM's own children end with their parent
        os.kill(pid, signal.SIGKILL)
    assert group not in left


# --- ports and cards --------------------------------------------------------------------------------------------------


def test_busy_port(tmp_path: Path, model: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} cannot be used") as caught:
            with serve(ServeSpec(model, "bf16", dummy_weights=True, port=port), CPU, tmp_path / "engine.log"):
                pass
        assert caught.value.exit_code == 2
        assert not (tmp_path / "engine.log").exists(), "nothing was started"
    assert checked_port(port) == port
    assert free_port() > 1023


def test_a_port_that_is_none() -> None:
    with pytest.raises(InputError, match="99999"):
        checked_port(99_999)


def test_gpu_too_small_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.models import resolve

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = gpu.Gpu(0, "RTX 4060 Ti", memory_gib=15.7, used_gib=0.3, driver="580.1", cuda="13.0")
    monkeypatch.setattr(gpu, "gpus", lambda: (card,))
    spec = ServeSpec(resolve("shape:qwen2.5-7b").path, "bf16", dummy_weights=True)
    with pytest.raises(ModelError, match="does not fit RTX 4060 Ti"):
        with serve(spec, CUDA, tmp_path / "engine.log"):
            pass
    assert not (tmp_path / "engine.log").exists()
