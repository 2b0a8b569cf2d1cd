"""A server's base URL, taken apart and checked once, before anything is sent to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from harness.errors import InputError

_PATH_CHARACTERS = "/%:@!$&'()*+,;="
"""What a path may hold as it is; all else goes as its percent code, for it stands in a request's first line."""
_FORMS = "http://HOST:PORT or https://HOST[:PORT][/PREFIX], with or without /v1"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    tls: bool
    prefix: str
    """Path in front of /v1, without a trailing slash."""

    @staticmethod
    def parse(url: str) -> Address:
        """Raises InputError for what is no such URL, or holds a password (it would end up in records and logs)."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"--endpoint {url!r}: {error}", allowed=_FORMS) from error
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(  # without the URL: what it holds may be a key
                "--endpoint: the URL holds a user name, a password, a query or a fragment",
                allowed=f"a URL without credentials, {_FORMS}",
                remedy="put the API key into the environment variable KNEEBENCH_API_KEY",
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--endpoint {url!r} is no server's address", allowed=_FORMS)
        try:
            host = parts.hostname if ":" in parts.hostname else parts.hostname.encode("idna").decode()
        except UnicodeError:
            host = ""
        if not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+(?:%[\w.-]+)?", host):
            raise InputError(f"--endpoint {url!r}: {parts.hostname!r} is no host's name", allowed=_FORMS)
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        prefix = quote(prefix, _PATH_CHARACTERS, errors="surrogateescape")  # bytes as they were typed
        return Address(host, port or (443 if tls else 80), tls, prefix)

    @property
    def authority(self) -> str:
        """HOST or HOST:PORT as the Host header wants it: no default port, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")

    @property
    def base_url(self) -> str:
        """Up to and without /v1."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"
