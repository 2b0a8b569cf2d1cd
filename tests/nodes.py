"""Cheap engines for tests of a cluster: the scripted server, opened on whatever node a session is sent to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.engines import EngineInfo, endpoint
from harness.errors import EngineError
from harness.load.workload import Dialect
from harness.processes import die_with_parent
from harness.sweep import OpenEngine, Rows, Service, Variant

IDS = Dialect(vocabulary=range(100, 1000))


def truth_on(notes: Path, rows: Rows, on_status: Callable[[str], None]) -> OpenEngine:
    """An Opener with `notes` put before: a file there for each server tells its process id and where it runs, and
    one named `shared` that a node had two at once.

    The precision says how it behaves: `fails` does not start, `kills` ends the session's process, node or not.
    """

    @contextmanager
    def open_engine(variant: Variant, repeat: int) -> Iterator[Service]:
        log = rows.fresh(f"engine-{variant.precision}-r{repeat}", ".log")
        log.write_text(f"{variant.precision} started\n", encoding="utf-8")
        if variant.precision == "fails":
            raise EngineError(f"the engine did not start; its log, {log}, says why")
        if variant.precision == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        command = [sys.executable, "-m", "harness.load.truth", "--ttft-ms", "5", "--gap-ms", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent()) as process:
            if _node() in {other.read_text(encoding="utf-8").split()[2] for other in notes.glob("*[0-9]")}:
                (notes / "shared").touch()
            note = notes / str(process.pid)
            draft = note.with_suffix(".new")
            draft.write_text(f"{variant.precision} {repeat} {_node()}", encoding="utf-8")
            draft.rename(note)
            try:
                assert process.stdout is not None
                port = process.stdout.readline().split()[1]
                on_status("truth: ready after 0 s")
                with endpoint.attach(f"http://127.0.0.1:{port}", "truth") as engine:
                    rows.describe_engine(log, EngineInfo("truth", start_s=0.1))
                    yield Service(engine, IDS)
            finally:
                process.kill()
                process.wait()
                note.rename(note.with_suffix(".ended"))

    return open_engine


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else "here"
