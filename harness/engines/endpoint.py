"""A server that runs already, here or elsewhere: `--endpoint URL`. Nothing is started, nothing is stopped.

Of such an engine we know what it tells: its model names, its counters if it exports them, its version if it says.
Kernel, weights and cache stay unknown, and every row says `source=endpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from harness.analysis.validity import SIMULATED_ENGINE
from harness.engines import EngineCounters, EngineInfo, Target
from harness.engines.address import Address
from harness.engines.control import connect
from harness.errors import EngineError, InputError
from harness.keys import KEY, KEY_FILE, endpoint_key
from harness.redact import hide
from harness.telemetry import prometheus

PAGE_TIMEOUT_S = 10.0
"""For a page of the server: models, version, counters."""


class Endpoint:
    """A server at a URL. Use `attach`."""

    def __init__(self, target: Target, info: EngineInfo, client: httpx.Client) -> None:
        self._target = target
        self._info = info
        self._client = client

    @property
    def target(self) -> Target:
        return self._target

    @property
    def info(self) -> EngineInfo:
        return self._info

    def counters(self) -> EngineCounters:
        return prometheus.scrape(self._client)

    def memory_gib(self) -> float | None:
        return None  # it may be another machine's

    def pids(self) -> frozenset[int]:
        return frozenset()

    def check(self) -> None:
        try:
            self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise EngineError(
                f"{self._target.base_url} stopped answering: {_reason(error)}.", remedy="look at that server's own log"
            ) from error


@contextmanager
def attach(
    url: str, model: str | None = None, key_file: Path | None = None, warn: Callable[[str], None] = lambda text: None
) -> Iterator[Endpoint]:
    """Check that the server answers and knows the model, and yield it. `model` None: the only one that it offers.

    `key_file` holds its key; None: as the environment has it (keys.py). `warn` is told before anything is sent.
    """
    address = Address.parse(url)
    hide(*_private_parts(address, model))
    base_url = address.base_url
    api_key = endpoint_key(address.host, loopback=address.loopback, file=key_file)
    if api_key is not None and not (address.tls or address.loopback):
        warn(f"{address.host} is asked over plain http: the key and all prompts can be read on the way there")
    with connect(base_url, api_key, PAGE_TIMEOUT_S) as client:
        offered, simulated = _offered(client, base_url)
        served = _choose(base_url, model, offered)
        engine = SIMULATED_ENGINE if simulated else "endpoint"
        info = EngineInfo(engine=engine, engine_version=_version(client), source="endpoint")
        yield Endpoint(Target(base_url, served, api_key), info, client)


def _private_parts(address: Address, model: str | None) -> list[str]:
    """Parts of a URL's path that may be somebody's account or key: long, with digits, and not the model's name."""
    parts = address.prefix.split("/")
    return [part for part in parts if len(part) >= 16 and re.search(r"\d", part) and part != model]


def _offered(client: httpx.Client, base_url: str) -> tuple[list[str], bool]:
    """Its models, and whether it says that it is `bench serve-simulated`."""
    try:
        reply = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise InputError(
            f"--endpoint {base_url}: does not answer ({_reason(error)}).",
            remedy=_remedy(error),
        ) from error
    if reply.is_redirect:
        raise InputError(
            f"--endpoint {base_url}: sends us elsewhere (HTTP {reply.status_code}), to "
            f"{reply.headers.get('location', '')[:200]!r}; neither load nor key follow.",
            remedy="give the address at which the server itself answers",
        )
    if reply.status_code in (401, 403):
        raise InputError(
            f"--endpoint {base_url}: wants an API key (HTTP {reply.status_code}).",
            remedy=f"put the right one into the environment variable {KEY}, or into a file that {KEY_FILE} names",
        )
    try:
        reply.raise_for_status()
        listed: Any = reply.json()
        return [str(item["id"]) for item in listed["data"]], "x-kneebench-simulated" in reply.headers
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--endpoint {base_url}: /v1/models does not answer as an OpenAI-compatible server (HTTP "
            f"{reply.status_code}).",
            remedy="check the address: only the part before /v1 is wanted",
        ) from error


def _choose(base_url: str, model: str | None, offered: list[str]) -> str:
    if model in offered:
        return str(model)
    if model is None and len(offered) == 1:
        return offered[0]
    problem = "name one of its models" if model is None else f"serves no model named {model!r}"
    raise InputError(f"--endpoint {base_url}: {problem}.", allowed=", ".join(sorted(offered)) or "it offers none")


def _version(client: httpx.Client) -> str | None:
    """vLLM tells its version at /version; others do not."""
    try:
        reply = client.get("/version")
        told: Any = reply.json() if reply.status_code == 200 else {}
        return str(told["version"])[:100]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _reason(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


def _remedy(error: httpx.HTTPError) -> str:
    """What to do about a server that does not answer."""
    said = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return "have the server show a valid certificate for that name; one's own authority goes into SSL_CERT_FILE"
    if "[SSL" in said:
        return "that port does not speak TLS as we do: check the address, http:// or https://"
    return "check the address (http or https) and that the server runs; only the part before /v1 is wanted"
