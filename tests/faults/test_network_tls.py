"""TLS that cannot be trusted, or is none: refused before anything is sent, and told by its reason.

An authority of our own, made for the test, is what SSL_CERT_FILE names: so both the pages' client and the load's see
the same trust. Certificates are made by openssl, for its dates may lie in the past.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.load.script import STREAM_HEAD
from tests.faults.hostile import Fault, closes, hostile, resets, sends, swept_endpoint, token

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")

CONFIG = """
[ca]
default_ca = here
[here]
dir = {home}
database = {home}/index.txt
serial = {home}/serial
new_certs_dir = {home}
certificate = {home}/ca.pem
private_key = {home}/ca.key
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = name
[name]
"""


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates; `home` is its directory."""

    home: Path

    def context(self, name: str, subject: str = "IP:127.0.0.1", until: str = "21000101000000Z") -> ssl.SSLContext:
        """What a server shows: a certificate for that subject, valid from 2020 to `until`."""
        home = self.home
        if not (home / f"{name}.pem").exists():
            _openssl(
                "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
                f"/CN={name}", "-addext", f"subjectAltName={subject}", "-config", f"{home}/config", "-keyout",
                f"{home}/{name}.key", "-out", f"{home}/{name}.csr",
            )  # fmt: skip
            _openssl(
                "ca", "-batch", "-notext", "-config", f"{home}/config", "-startdate", "20200101000000Z", "-enddate",
                until, "-in", f"{home}/{name}.csr", "-out", f"{home}/{name}.pem",
            )  # fmt: skip
        return _context(home / f"{name}.pem", home / f"{name}.key")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _self_signed(home: Path, name: str) -> None:
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "7", "-subj",
        f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{home}/{name}.key", "-out",
        f"{home}/{name}.pem",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    home = tmp_path_factory.mktemp("authority")
    (home / "config").write_text(CONFIG.format(home=home))
    (home / "index.txt").touch()
    (home / "serial").write_text("01\n")
    _self_signed(home, "ca")
    _self_signed(home, "alone")
    return Authority(home)


@pytest.fixture
def authority(made: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setenv("SSL_CERT_FILE", str(made.home / "ca.pem"))
    return made


def test_a_certificate_that_is_good_is_measured(authority: Authority, tmp_path: Path) -> None:
    """The other tests would pass on a client that trusts nobody."""
    context = authority.context("good")
    with hostile(tls=lambda number: context) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == set() and done.rows[0].requests >= 24


@pytest.mark.parametrize("fault", ["expired", "wrong-host", "self-signed"])
def test_a_certificate_that_proves_nothing_is_bad_input(fault: str, authority: Authority, tmp_path: Path) -> None:
    """Exit code 2 with the reason and the remedy; nothing was sent, and no directory was made."""
    contexts = {
        "expired": lambda: authority.context("expired", until="20210101000000Z"),
        "wrong-host": lambda: authority.context("other", "DNS:other.example"),
        "self-signed": lambda: _context(authority.home / "alone.pem", authority.home / "alone.key"),
    }
    reasons = {"expired": "has expired", "wrong-host": "IP address mismatch", "self-signed": "self-signed certificate"}
    context = contexts[fault]()
    with hostile(tls=lambda number: context) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 2 and reasons[fault] in done.said and "SSL_CERT_FILE" in done.said, done.said
    assert server.requests == 0 and not (tmp_path / "run").exists()


def test_plain_http_on_the_port_of_tls(authority: Authority, tmp_path: Path) -> None:
    with hostile() as server:
        done = swept_endpoint(server.url.replace("http:", "https:"), tmp_path / "run")
    assert done.code == 2 and "does not speak TLS" in done.said and "http://" in done.said, done.said


def test_tls_on_the_port_of_plain_http(authority: Authority, tmp_path: Path) -> None:
    context = authority.context("good")
    with hostile(tls=lambda number: context) as server:
        done = swept_endpoint(server.url.replace("https:", "http:"), tmp_path / "run")
    assert done.code == 2 and "does not answer" in done.said and "http or https" in done.said, done.said


def test_a_certificate_that_expires_while_measuring(authority: Authority, tmp_path: Path) -> None:
    """Open connections live on; each new one is refused before the request goes, and the records say why."""
    good, expired = authority.context("good"), authority.context("expired", until="20210101000000Z")
    out = tmp_path / "run"

    def shown(number: int) -> ssl.SSLContext:
        return expired if (out / "requests.csv").exists() else good

    with hostile(closes, tls=shown) as server:
        done = swept_endpoint(server.url, out)
    assert done.code == 1 and "certificate has expired" in done.details
    failed = [record for record in done.records if record.error == "connect"]
    assert failed and all(record.sent_ns is None for record in failed)
    assert any(record.error is None for record in done.records) and done.rows[0].verdict == "invalid"


@pytest.mark.parametrize(
    ("end", "kind"),
    [(resets, "early_close"), (lambda sock: _garbage(sock), "protocol")],
    ids=["cut", "garbage"],
)
def test_tls_that_breaks_within_an_answer(end: Fault, kind: str, authority: Authority, tmp_path: Path) -> None:
    """Tokens before it are kept; the rest is told."""
    context = authority.context("good")
    with hostile(sends(STREAM_HEAD + token() * 2, end), tls=lambda number: context) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == {kind}, done.details
    assert {len(record.chunk_us) for record in done.records if record.error == kind} == {2}


def _garbage(sock: object) -> None:
    """Bytes past the encryption, on the same connection."""

    os.write(sock.fileno(), b"no TLS record at all, and long enough to be taken for one's head")  # type: ignore[attr-defined]
