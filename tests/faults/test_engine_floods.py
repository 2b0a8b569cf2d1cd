"""An engine that sends 100 MB, wherever it finds room: our process does not hold it, and the sweep goes on.

Bounded by client.py (an event 4 MiB, an answer 64 MiB or 262,144 tokens, headers 64 KiB) and control.py (a page 4 MiB).
What is read is thrown away, so the memory of the generator is what these tests look at, by the kernel's own account.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.load.script import STREAM_HEAD
from tests.faults.hostile import Fault, chunk, driven, event, floods, hostile, swept_endpoint, token

MB = 1_000_000
BLOCK = b"x" * MB
LEAST_FREE = 48 << 20
"""Half of what is sent: a client that kept it would have to grow by more."""

FLOODS: dict[str, tuple[Fault, str, str]] = {
    "error-body": (
        floods(b"HTTP/1.1 500 Oh\r\nContent-Length: 100000000\r\n\r\nboom", BLOCK, 100), "http_500", "boom",
    ),
    "error-body-chunked": (
        floods(b"HTTP/1.1 503 Oh\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(BLOCK), 100), "http_503", "xxx",
    ),
    "page-instead-of-stream": (
        floods(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000000\r\n\r\n<html>", BLOCK, 100),
        "protocol", "<html>",
    ),
    "one-line": (floods(STREAM_HEAD, chunk(BLOCK), 100), "protocol", "an event of more than 4 MiB"),
    "one-event": (
        floods(STREAM_HEAD, chunk((b"data: " + b"x" * 4090 + b"\n") * 250), 100), "protocol", "of more than 4 MiB",
    ),
    "one-token": (
        floods(STREAM_HEAD + chunk(b'data: {"choices":[{"text":"'), chunk(BLOCK), 100), "protocol", "4 MiB",
    ),
    "one-header": (floods(b"HTTP/1.1 200 OK\r\nX-Long: ", BLOCK, 100), "protocol", "64 KiB of headers"),
    "many-headers": (floods(b"HTTP/1.1 200 OK\r\n", b"X-Many: 1\r\n" * 90_000, 100), "protocol", "64 KiB of headers"),
    "trailers": (
        floods(STREAM_HEAD + token(finish_reason="length") + b"0\r\nX-Long: ", BLOCK, 100), "protocol", "64 KiB",
    ),
    "endless-tokens": (
        floods(STREAM_HEAD, event({"choices": [{"text": " a"}] * 50}) * 1000, 100), "protocol", "262,144 tokens",
    ),
    "endless-ids": (
        floods(STREAM_HEAD, event(b'{"choices":[{"token_ids":[' + b"999," * 49_999 + b"9]}]}"), 100),
        "protocol", "262,144 tokens",
    ),
    "endless-roles": (
        floods(STREAM_HEAD, event(b'{"choices":[{"delta":{"role":"' + b"x" * 90_000 + b'"}}]}') * 10, 110),
        "protocol", "64 MiB",
    ),
    "endless-comments": (floods(STREAM_HEAD, chunk(b": keep-alive\n\n" * 70_000), 100), "protocol", "4 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_ended_and_never_held(name: str) -> None:
    fault, kind, said = FLOODS[name]
    with hostile(fault, {20}) as server:
        load, grown = driven(server.url)
    (failed,) = [record for record in load.records if record.error not in (None, "cut")]
    assert failed.error == kind and said in (failed.error_detail or "") and len(failed.error_detail or "") <= 500
    assert load.gave_up is None and sum(record.error is None for record in load.records) >= 24
    assert grown < LEAST_FREE


@pytest.mark.parametrize("url", ["/v1/models", "/version", "/metrics", "/tokenize"])
def test_a_page_of_100_mb_is_not_read(url: str, tmp_path: Path) -> None:
    """The server is left with most of it. /v1/models is bad input, the others are as if missing."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000000\r\n\r\n"
    taken: list[int] = []
    with hostile(pages={url: floods(head, BLOCK, 100, taken)}) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert 0 in taken and 50 not in taken, "a page ends at 4 MiB; what the kernel holds comes on top"
    if url == "/v1/models":
        assert done.code == 2 and "larger than any such page" in done.said
    else:
        assert done.code == 0 and done.errors == set() and done.rows[0].kv_usage_peak is None
