"""The client for a server's pages (health, models, counters): httpx, with an end to every answer.

httpx counts its timeout anew with each read and reads as much as comes. A server that drips a byte a second would hold
a sweep for ever, and one that sends 100 MB a second would fill our memory. So both are counted where all bytes pass,
at the socket, from the beginning of the request: httpcore lets its network be replaced, and this one keeps a budget.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from harness.engines.address import Address

PAGE_BYTES = 4 << 20
"""No page is larger: vLLM's counters are some 100 KB, and /tokenize of a long prompt is not 1 MB."""


def connect(
    base_url: str,
    api_key: str | None,
    timeout_s: float,
    *,
    keep_alive: bool = True,
    most_bytes: int | None = PAGE_BYTES,
) -> httpx.Client:
    """A client for the pages of a server. No proxy may stand before the loopback, and none before what it bypasses.

    An answer that is not complete after `timeout_s`, or is larger than `most_bytes` (None: no limit), or compressed
    though we did not ask for that, ends in an httpx.HTTPError. Certificates are checked as client.py checks them: by
    the machine's own authorities, or those of SSL_CERT_FILE.
    """
    address = Address.parse(base_url)
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    limits = httpx.Limits() if keep_alive else httpx.Limits(max_keepalive_connections=0)
    transport = _Transport(
        timeout_s,
        math.inf if most_bytes is None else most_bytes,
        limits=limits,
        proxy=_proxy(address),
        verify=ssl.create_default_context(),
        trust_env=False,
    )
    return httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=timeout_s,
        transport=transport,
        trust_env=False,
        event_hooks={"response": [_refuse_compressed]},
    )


def _proxy(address: Address) -> str | None:
    if address.loopback or proxy_bypass(address.host):
        return None
    proxies = getproxies()
    return proxies.get("https" if address.tls else "http") or proxies.get("all")


def _refuse_compressed(response: httpx.Response) -> None:
    """A kilobyte may unpack to a megabyte, and what is counted are the bytes of the wire."""
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise httpx.DecodingError(f"the answer is compressed ({coding[:40]}) though nobody asked for that")


class _Budget(threading.local):
    """What is left of the request that this thread is about: several threads may share a client."""

    ends_s = math.inf
    bytes_left = math.inf

    def begin(self, seconds: float, most_bytes: float) -> None:
        self.ends_s, self.bytes_left = time.monotonic() + seconds, most_bytes

    def seconds(self, asked: float | None) -> float:
        """How long the next step may take. Raises ReadTimeout when there is no time left."""
        left = self.ends_s - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the answer was not complete in time")
        return left if asked is None else min(left, asked)

    def take(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise httpcore.ReadError("the answer is larger than any such page")


class _Transport(httpx.HTTPTransport):
    def __init__(self, timeout_s: float, most_bytes: float, **options: Any) -> None:
        super().__init__(**options)
        self._limits = (timeout_s, most_bytes)
        self._budget = _Budget()
        self._pool._network_backend = _Network(self._budget)  # httpcore has an argument for it, httpx hands none on

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._budget.begin(*self._limits)
        return super().handle_request(request)


class _Network(httpcore.NetworkBackend):
    def __init__(self, budget: _Budget) -> None:
        self._plain, self._budget = httpcore.SyncBackend(), budget

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        seconds = self._budget.seconds(timeout)
        return _Stream(self._plain.connect_tcp(host, port, seconds, local_address, socket_options), self._budget)


class _Stream(httpcore.NetworkStream):
    def __init__(self, plain: httpcore.NetworkStream, budget: _Budget) -> None:
        self._plain, self._budget = plain, budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._plain.read(max_bytes, self._budget.seconds(timeout))
        self._budget.take(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._plain.write(buffer, self._budget.seconds(timeout))

    def close(self) -> None:
        self._plain.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        plain = self._plain.start_tls(ssl_context, server_hostname, self._budget.seconds(timeout))
        return _Stream(plain, self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._plain.get_extra_info(info)
