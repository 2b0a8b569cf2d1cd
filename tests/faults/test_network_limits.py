"""A network that gives no connection, cuts them, or answers before it has listened."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.engines import Target
from harness.load.generators import Generators
from harness.load.script import STREAM_END, STREAM_HEAD
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, SweepPoint, read_table
from tests.faults.hostile import (
    IDS,
    SCENARIO,
    Fault,
    Switched,
    closes,
    driven,
    event,
    hostile,
    page,
    resets,
    sends,
    swept_endpoint,
    token,
)

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["http://gone.invalid:8000", f"http://{'a' * 64}.example", "http://two..dots", "http://sp ace", "http://[::1"],
    ids=["unknown", "long-label", "empty-label", "space", "bracket"],
)
def test_a_name_that_is_none_is_bad_input(url: str, tmp_path: Path) -> None:
    done = swept_endpoint(url, tmp_path / "run")
    assert done.code == 2 and "--endpoint" in done.said and not (tmp_path / "run").exists()


def test_a_name_that_is_lost_while_measuring(tmp_path: Path) -> None:
    """It resolved when the sweep began, and no longer: every request is a failed connection, and the cell ends."""
    with Generators() as generators:
        load = generators.run(Cell("served", 2), SCENARIO, IDS, Target("http://gone.invalid:8000", "truth"))
    assert load.gave_up is not None and "connect" in load.gave_up
    assert {record.error for record in load.records} - {"cut"} == {"connect"}
    assert all(record.sent_ns is None for record in load.records)


TWO_ADDRESSES = """
import uvloop
async def resolved(self, host, port, **_):
    wheres = ("127.0.0.9", "127.0.0.1") if host == "localhost" else (host,)
    return [(2, 1, 6, "", (where, port)) for where in wheres]
uvloop.Loop.getaddrinfo = resolved
"""


def test_a_name_with_two_addresses_of_which_one_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is ::1 first on most machines, and most servers listen on 127.0.0.1 alone."""
    (tmp_path / "sitecustomize.py").write_text(TWO_ADDRESSES)  # the generators are processes of their own
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with hostile() as server:
        load, _ = driven(server.url.replace("127.0.0.1", "localhost"))
    assert load.gave_up is None and {record.error for record in load.records} <= {None, "cut"}


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [closes, resets], ids=["closes", "resets"])
def test_a_server_that_takes_only_so_many_connections(end: Fault, tmp_path: Path) -> None:
    """Beyond 4 it closes each at once. Who is in is measured; who is not is an error, and the point says so."""

    def admits(number: int, sock: socket.socket) -> None:
        if number > 6:
            end(sock)

    with hostile(admits=admits) as server:
        done = swept_endpoint(server.url, tmp_path / "run", conc=(8,))
    assert done.code in (0, 1)
    (row,) = done.rows
    assert done.errors <= {"early_close", "connect"} and done.errors and row.verdict == "invalid"
    assert {"errors", "gave_up"} & set(row.verdict_reasons)
    assert any(record.error is None for record in done.records)


def test_a_backlog_that_is_full(tmp_path: Path) -> None:
    """Nobody accepts any more: the kernel drops what knocks, and to connect takes longer than a request may."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        knocking = [socket.socket() for _ in range(4)]
        for sock in knocking:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        scenario = replace(SCENARIO, request_timeout_s=0.3)
        with Generators() as generators:
            load = generators.run(Cell("served", 4), scenario, IDS, Target(f"http://127.0.0.1:{port}", "truth"))
        for sock in knocking:
            sock.close()
    assert load.gave_up is not None and "timeout" in load.gave_up
    failed = [record for record in load.records if record.error not in (None, "cut")]
    assert {record.error for record in failed} == {"timeout"}
    assert any("waiting for: connect" in (record.error_detail or "") for record in failed)


def test_a_server_that_goes_away_while_measuring(tmp_path: Path) -> None:
    """Its socket is closed for good: refused connections end the sweep, and the finished cell keeps its row."""
    out = tmp_path / "run"
    gone = Switched(lambda: (out / "points.csv").exists())

    def leave(sock: socket.socket) -> None:
        server.listener.close()
        closes(sock)

    with hostile(leave, gone) as server:
        done = swept_endpoint(server.url, out, conc=(2, 3))
    assert done.code == 1 and "--resume" in done.said and done.rows[0].errors == 0
    assert done.rows[1].verdict == "invalid" and {"gave_up", "engine_died"} & set(done.rows[1].verdict_reasons)
    assert done.errors <= {"early_close", "connect"} and "connect" in done.errors


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))


def test_no_descriptors_left_on_our_side(tmp_path: Path) -> None:
    """A limit of 40 files, 64 users: the failure is ours, and neither records nor verdict blame the server."""
    out, scenario = tmp_path / "run", tmp_path / "faults.toml"
    scenario.write_text("input_tokens = 12\noutput_tokens = 6\nrequests = 24\nmin_window_s = 0.1\n")
    line = [sys.executable, "-m", "harness", "sweep", "--model", "truth", "--conc", "64", "--scenario", str(scenario)]
    with hostile() as server:
        line += ["--endpoint", server.url, "--out", str(out)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, preexec_fn=few_descriptors)
    records = read_table(out / "requests.csv", RequestRecord)
    assert "client" in {record.error for record in records}, done.stderr
    assert {record.error for record in records} <= {None, "client", "cut"}
    assert any("Too many open files" in (record.error_detail or "") for record in records)
    (row,) = read_table(out / "points.csv", SweepPoint)
    assert row.verdict == "invalid" and "client_bound" in row.verdict_reasons


# --- answers that come too soon, elsewhere, or torn -------------------------------------------------------------------


@pytest.mark.parametrize("end", [lambda sock: None, closes, resets], ids=["keeps", "closes", "resets"])
def test_a_server_that_answers_before_it_has_read_the_request(end: Fault) -> None:
    """Ten megabytes are asked, of which it reads the head alone: the answer is its 413, and no broken pipe.

    The ids have 100 digits: so much can be written quickly, and is more than the kernel takes for a server.
    """
    long = replace(SCENARIO, input_tokens=100_000, requests=1)
    wide = Dialect(vocabulary=tuple(range(10**100, 10**100 + 900)))
    refuses = sends(page(b"too long", "413 Content Too Large"), end)
    with hostile(refuses, {2}, unread=True) as server:
        with Generators() as generators:
            load = generators.run(Cell("served", 1), long, wide, Target(server.url, "truth"))
    assert load.gave_up is None and {record.error for record in load.records} - {"cut"} == {None, "http_413"}
    assert "too long" in {record.error_detail for record in load.records}


def test_load_and_key_follow_no_redirect(tmp_path: Path) -> None:
    moved = page(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:9/v1/completions")
    with hostile(sends(moved)) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == {"http_307"} and "errors" in done.rows[0].verdict_reasons


TORN: dict[str, tuple[bytes, str, str]] = {
    "no-size": (STREAM_HEAD + token() + b"zz\r\n", "protocol", "not HTTP"),
    "negative-size": (STREAM_HEAD + b"-5\r\nhello\r\n", "protocol", "not HTTP"),
    "endless-size": (STREAM_HEAD + b"f" * 40 + b"\r\n", "protocol", "not HTTP"),
    "no-line-end": (STREAM_HEAD + b"5\r\nhelloXX", "protocol", "not HTTP"),
    "size-alone": (STREAM_HEAD + token() + b"10\r\n", "early_close", "before the end"),
    "half-a-chunk": (STREAM_HEAD + token()[:-9], "early_close", "before the end"),
    "no-last-chunk": (STREAM_HEAD + token(finish_reason="length"), "early_close", "before the end"),
    "two-lengths": (
        STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n") + token(), "protocol", "not HTTP",
    ),
    "length-too-long": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 900\r\n\r\ndata: [DONE]\n\n",
        "early_close", "before the end",
    ),
    "half-a-head": (STREAM_HEAD[:30], "early_close", "before the end"),
}  # fmt: skip


@pytest.mark.parametrize("name", TORN)
def test_torn_framing_is_told(name: str, tmp_path: Path) -> None:
    data, kind, said = TORN[name]
    with hostile(sends(data, closes)) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == {kind} and said in done.details, (done.said, done.details)
    (row,) = done.rows
    assert row.requests >= 24 and row.errors >= 2 and "errors" in row.verdict_reasons


def test_an_answer_cut_into_single_bytes_is_the_same_answer(tmp_path: Path) -> None:
    """The opposite of a fault: segments of one byte, and chunks that end within a character."""
    told = event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 6}})
    whole = STREAM_HEAD + token("世") * 5 + token(finish_reason="length") + told + STREAM_END

    def crumbs(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in whole:
            sock.sendall(bytes([byte]))

    with hostile(crumbs) as server:
        done = swept_endpoint(server.url, tmp_path / "run")
    assert done.code == 0 and done.errors == set() and done.rows[0].errors == 0
    assert {sum(record.chunk_tokens) for record in done.records if record.error is None} == {6} | {
        record.completion_tokens for record in done.records if record.error is None
    }
