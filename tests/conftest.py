"""Fixtures: a real vLLM (`@pytest.mark.engine`; without one such tests skip, in CI they fail) and the truth server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv, find
from harness.engines.vllm import VllmServer, serve
from harness.errors import InputError

Serving = Callable[[ServeSpec], VllmServer]


@pytest.fixture(scope="session")
def engine_env() -> EngineEnv:
    """The environment that KNEEBENCH_ENGINE_PYTHON names, else the installed one."""
    named = os.environ.get("KNEEBENCH_ENGINE_PYTHON")
    try:
        return find(Path(named) if named else None)
    except InputError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI promises an engine: {error}")
        pytest.skip(f"no engine: {error}")


@pytest.fixture(scope="session")
def serving(engine_env: EngineEnv, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`serving(spec)`: a server for that spec, started once and stopped when the session ends, however it ends."""
    with ExitStack() as running:
        servers: dict[ServeSpec, VllmServer] = {}

        def serving_of(spec: ServeSpec) -> VllmServer:
            if spec not in servers:
                log = tmp_path_factory.mktemp("engine") / "engine.log"
                servers[spec] = running.enter_context(serve(spec, engine_env, log))
            return servers[spec]

        yield serving_of


@pytest.fixture
def truth() -> Iterator[Callable[..., str]]:
    """`truth("--ttft-ms", "50")` starts a server of known delays in a process of its own and gives its base URL.

    It has no /tokenize unless `--tokenize` is given, so that prompts go as text.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.load.truth", "--no-tokenize", *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        word, port = process.stdout.readline().split()
        assert word == "listening"
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()
