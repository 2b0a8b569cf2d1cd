"""What we start listens on the loopback alone, and an engine answers nobody without its key."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest

from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.vllm import VllmServer
from harness.engines.vllm_command import command, surroundings
from harness.models import resolve

ENGINES = Path(__file__).parent.parent / "harness" / "engines"
KEY = "kneebench-0123456789abcdefghijklmnopqrstuv"


def listening(pid: int) -> set[str]:
    """Addresses on which a process or its children take connections."""
    root = psutil.Process(pid)
    sockets = [one for process in (root, *root.children(recursive=True)) for one in process.net_connections("inet")]
    return {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("arguments", [["harness.load.truth"], ["harness", "serve-simulated", "--gpu", "l4"]])
def test_servers_of_ours_listen_on_the_loopback(arguments: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            assert listening(process.pid) == {"127.0.0.1"}
        finally:
            process.terminate()


# --- the guard in front of vLLM ---------------------------------------------------------------------------------------


def guard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    spec = importlib.util.spec_from_file_location("kneebench_guard", ENGINES / "guard" / "kneebench_guard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(module: ModuleType, kind: str, headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """What a server behind the guard sends; it says only that it was reached."""
    sent: list[dict[str, Any]] = []

    async def app(scope: object, receive: object, send: Callable[[dict[str, Any]], Any]) -> None:
        await send({"type": "reached"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(module.KeyRequired(app)({"type": kind, "path": "/health", "headers": headers}, None, send))
    return sent


@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer ", b"Bearer kneebench-", KEY.encode(), f"Bearer {KEY}x".encode(), "Bearer ü".encode()]
)
def test_no_answer_without_the_key(monkeypatch: pytest.MonkeyPatch, given: bytes | None) -> None:
    module, headers = guard(monkeypatch), [] if given is None else [(b"authorization", given)]
    start, body = asked(module, "http", headers)
    assert start["status"] == 401 and dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert asked(module, "websocket", headers) == [{"type": "websocket.close", "code": 1008}]


def test_an_answer_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    module, headers = guard(monkeypatch), [(b"host", b"x"), (b"authorization", f"Bearer {KEY}".encode())]
    assert asked(module, "http", headers) == asked(module, "websocket", headers) == [{"type": "reached"}]
    assert asked(module, "lifespan", []) == [{"type": "reached"}]


# --- how vLLM is started ----------------------------------------------------------------------------------------------

SPEC = ServeSpec(Path("org/name"), "bf16")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_vllm_is_started_with_guard_loopback_and_no_key_in_sight(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = EngineEnv(Path("/env/bin/python"), kind, "0.32.0")
    monkeypatch.setenv("KNEEBENCH_API_KEY", "an endpoint's own key")
    monkeypatch.setenv("OPENAI_API_KEY", "another key")
    monkeypatch.setenv("HF_TOKEN", "the hub's")
    line, around = command(SPEC, env, 8000), surroundings(env, {}, KEY)
    assert line[line.index("--host") + 1] == "127.0.0.1" and not any(KEY in item for item in line)
    assert line[line.index("--middleware") + 1] == "kneebench_guard.KeyRequired"
    assert str(ENGINES / "guard") in around["PYTHONPATH"].split(os.pathsep)
    assert (around["VLLM_API_KEY"], around["HF_TOKEN"]) == (KEY, "the hub's"), "which fetches models"
    assert not {"an endpoint's own key", "another key"} & set(around.values())
    assert (around["VLLM_HOST_IP"], around["GLOO_SOCKET_IFNAME"], around["NCCL_SOCKET_IFNAME"]) == (
        "127.0.0.1", "lo", "lo",
    )  # fmt: skip
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert surroundings(env, {}, KEY)["NCCL_SOCKET_IFNAME"] == "eth1", "whoever has set it knows why"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_itself(serving: Callable[[ServeSpec], VllmServer]) -> None:
    """Every port of all its processes; every path that it tells of, and those that it is known to leave open."""
    spec = ServeSpec(resolve("demo").path, "bf16", max_model_len=256, max_num_seqs=4, kv_cache_gib=0.2)
    server = serving(spec)
    addresses = listening(server.pid)
    assert addresses and all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
    key, url = server.target.api_key, server.target.base_url
    assert key is not None
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as stranger:
        known = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key}"}, trust_env=False).json()
        paths = {path: list(methods) for path, methods in known["paths"].items()}
        assert "/invocations" in paths and "/v1/completions" in paths
        for path, methods in {**paths, "/openapi.json": ["get"], "/docs": ["get"], "/nowhere": ["get"]}.items():
            for method in methods:
                assert stranger.request(method, path).status_code == 401, (method, path)
    tree = psutil.Process(server.pid)
    assert not any(key in word for process in (tree, *tree.children(recursive=True)) for word in process.cmdline())
