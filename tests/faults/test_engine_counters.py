"""An engine whose counters are none: they are evidence, never a reason for a sweep to end or to wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines import endpoint
from tests.faults.hostile import Fault, closes, drips, hangs, hostile, page, resets, sends, swept_endpoint

NAME = b"vllm:num_requests_running"


def told(line: bytes) -> Fault:
    return sends(page(b"vllm:num_requests_waiting 0\n" + line, kind="text/plain"))


@pytest.mark.parametrize(
    "fault",
    [
        sends(page(b"", "404 Not Found")),
        sends(page(b"oh no", "500 Oh")),
        sends(page(b"", "302 Found", "Location: /v2/metrics")),
        sends(page(b"\x00\xff{{{" * 1000, kind="text/plain")),
        sends(page(b"<html>login", kind="text/html")),
        told(NAME + b" NaN\n"),
        told(NAME + b" +Inf\n"),
        told(NAME + b" -5\n"),
        told(NAME + b'{engine="0} 3\n'),
        told(NAME + b" three\n"),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + NAME, closes),
        resets,
        hangs,
        drips(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" * 9, 0.1),
    ],
    ids=["missing", "500", "redirect", "garbage", "html", "nan", "infinite", "negative", "torn-label", "text", "torn",
         "resets", "hangs", "drips"],
)  # fmt: skip
def test_counters_that_cannot_be_read_are_unknown(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty cells, never 0; the point's own figures are there all the same."""
    monkeypatch.setattr(endpoint, "PAGE_TIMEOUT_S", 0.6)
    with hostile(pages={"/metrics": fault}) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0, done.said
    (row,) = done.rows
    assert row.running_peak is None and row.preemptions is None and row.counter_gap is None
    assert row.errors == 0 and row.requests >= 24 and row.tok_s is not None


@pytest.mark.parametrize("url", ["/v1/models", "/version"])
def test_a_page_that_drips_is_given_up(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte it meets every timeout that is counted anew with each read."""
    monkeypatch.setattr(endpoint, "PAGE_TIMEOUT_S", 1.0)
    with hostile(pages={url: drips(page(b'{"data": [{"id": "truth"}]}' + b" " * 900), 0.1)}) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    if url == "/v1/models":
        assert done.code == 2 and "does not answer (" in done.said
    else:
        assert done.code == 0 and done.rows[0].engine_version is None


def test_a_server_that_stops_answering_pages_is_noticed_after_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models page answers once, for the attaching; after the cell it is found missing."""
    monkeypatch.setattr(endpoint, "PAGE_TIMEOUT_S", 0.6)
    out, calls = tmp_path / "run", list[int]()

    def once(sock: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            resets(sock)  # type: ignore[arg-type]
        else:
            sock.sendall(page(b'{"data": [{"id": "truth"}]}'))  # type: ignore[attr-defined]

    with hostile(pages={"/v1/models": once}) as server:
        done = swept_endpoint(server.url, out, conc=(2, 3))
    assert done.code == 1 and "stopped answering" in done.said and "1 of 2 cells have rows" in done.said
    (row,) = done.rows
    assert row.verdict == "invalid" and "engine_died" in row.verdict_reasons and row.requests >= 24
