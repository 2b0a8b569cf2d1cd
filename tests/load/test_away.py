"""Generators on other nodes: here processes behind a real connection, some of them with a clock that is wrong.

What is said of time is cause and effect, which no busy machine can reverse: a request is sent before the truth server
receives it, and a chunk comes after it was due. Clocks that are seconds apart break that unless they are corrected.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness import redact
from harness.engines import Target, endpoint
from harness.errors import InputError, MissingTool, RunError
from harness.load import away, generators
from harness.load.away import DOOR_VARIABLE, Connection, Door, listen
from harness.load.generators import Generators, LoadResult
from harness.load.messages import packed
from harness.load.schedule import arrivals
from harness.load.selftest import read_log
from harness.load.workload import Dialect
from harness.records import Cell, RequestRecord, Scenario, SweepPoint
from harness.sweep import Plan, Service, Variant, make_point
from harness.telemetry.watch import EngineWatch

Truth = Callable[..., str]
Start = Callable[..., "subprocess.Popen[bytes]"]
IDS = Dialect(vocabulary=range(100, 1000))
SHORT = Scenario("test", input_tokens=8, output_tokens=4, requests=24, min_window_s=0.3, warmup_s=0.5)
SECOND = 10**9
SKEWS = (0, 17 * SECOND // 10, -3 * SECOND)


@pytest.fixture
def door() -> Iterator[Door]:
    with listen() as opened:
        yield opened


@pytest.fixture
def start(door: Door) -> Iterator[Start]:
    """`start(skew_ns)`: a generator as another node would start it; of the right clock, to the right door."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(skew_ns: int = 0, where: str | None = None, key: str | None = None) -> subprocess.Popen[bytes]:
        command = (
            ["-m", "harness.load.away"] if not skew_ns else [str(Path(__file__).with_name("skewed.py")), f"{skew_ns}"]
        )
        environment = os.environ | {DOOR_VARIABLE: door.key if key is None else key}
        started.append(
            subprocess.Popen([sys.executable, *command, where or door.where], env=environment, stderr=subprocess.PIPE)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


class Link:
    """A slow network: what comes is passed on after some time, another one each way. Keeps all it has carried."""

    def __init__(self, where: str, there_s: float, back_s: float) -> None:
        host, port = where.split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._beyond = (host, int(port))
        self._delays = there_s, back_s
        self._sockets: list[socket.socket] = []
        self.where = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.carried = bytearray()

    def __enter__(self) -> Link:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _serve(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.create_connection(self._beyond)
        self._sockets += [near, far]
        back = threading.Thread(target=self._pass, args=(far, near, self._delays[1]), daemon=True)
        back.start()
        self._pass(near, far, self._delays[0])
        back.join()
        near.close()
        far.close()

    def _pass(self, source: socket.socket, sink: socket.socket, delay_s: float) -> None:
        try:
            while data := source.recv(1 << 16):
                self.carried += data
                time.sleep(delay_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def admitted(door: Door, start: Start, skews: Sequence[int]) -> list[Connection]:
    """One after the other, so that the n-th connection is the n-th clock."""
    connections = []
    for skew_ns in skews:
        start(skew_ns)
        connections.append(door.admit(30))
    return connections


def agree(load: LoadResult, log: Path, skews: Sequence[int]) -> int:
    """Each record against the server's log, within the error of its generator's clock; how many there were."""
    told, seen = read_log(log), 0
    assert load.open_ns is not None and load.close_ns is not None
    inside = [record for record in load.records if load.open_ns <= record.intended_ns < load.close_ns]
    assert {record.phase for record in inside} == {"measured"}, "none was cut: each node knows when the window closed"
    # Users (or arrivals) are dealt out in turn: who has which clock is known.
    for record in load.records:
        if record.error is not None:
            continue
        truth, error_ns = told[record.request_id], load.clocks[record.user % len(skews)].error_ns
        assert record.intended_ns <= (record.sent_ns or 0) <= truth["received_ns"] + error_ns, "sent, then received"
        for offset_us, due_ns in zip(record.chunk_us, truth["due_ns"], strict=True):
            assert record.intended_ns + (offset_us + 1) * 1000 + error_ns >= due_ns, "due, then received"
        following = told.get(replace(record, sequence=record.sequence + 1).request_id)
        if following is not None:
            assert (record.end_ns or 0) <= following["received_ns"] + error_ns, "answered before the next was asked"
        seen += 1
    return seen


def test_clocks_that_are_wrong_are_measured_and_corrected(
    truth: Truth, door: Door, start: Start, tmp_path: Path
) -> None:
    """Three nodes, one right, one 1.7 s ahead, one 3 s behind; an answer takes 35 ms."""
    log = tmp_path / "log.jsonl"
    url, kept = truth("--ttft-ms", "20", "--gap-ms", "5", "--log", str(log)), []
    with Generators(admitted(door, start, SKEWS)) as held, endpoint.attach(url, "truth") as engine:
        with EngineWatch(engine) as watch:
            load = held.run(Cell("x", 6), SHORT, IDS, engine.target, processes=1, on_record=kept.append)
        again = held.run(Cell("x", 6, 2), SHORT, IDS, engine.target)
        assert held.pids() == () and load.processes == again.processes == 3
        plan, row = Plan(SHORT), SweepPoint("run", "x", 6)
        point = make_point(Cell("x", 6), plan, row, Variant("x"), Service(engine, IDS), load, watch.seen())
    for clock, skew_ns in zip(load.clocks, SKEWS, strict=True):
        assert abs(clock.offset_ns - skew_ns) <= clock.error_ns
    assert tuple(kept) == load.records
    assert {record.user for record in load.records if record.phase == "measured"} == set(range(6))
    keys = [(record.user, record.sequence) for record in load.records]
    assert len(keys) == len(set(keys)), "no request twice"
    assert agree(load, log, SKEWS) >= 24 and agree(again, log, SKEWS) >= 24
    assert point.clock_offset_ms == load.clocks[2].offset_ns / 1e6, "the farthest"
    assert point.clock_offset_error_ms == max(clock.error_ns for clock in load.clocks) / 1e6
    assert point.client_processes == 3 and point.clock_step_ms is not None and abs(point.clock_step_ms) < 1000


def test_an_open_loop_is_one_schedule_on_all_nodes(truth: Truth, door: Door, start: Start, tmp_path: Path) -> None:
    """Both are ahead: to them the window would long be over, if they were told its end in our time."""
    log = tmp_path / "log.jsonl"
    target = Target(truth("--ttft-ms", "700", "--gap-ms", "1", "--log", str(log)), "truth")
    cell, scenario, skews = (
        Cell("x", 0, rate_rps=40.0),
        replace(SHORT, arrivals="poisson", requests=30),
        (SECOND, 3 * SECOND),
    )
    with Generators(admitted(door, start, skews)) as held:
        load = held.run(cell, scenario, IDS, target)
    records, times = sorted(load.records, key=lambda record: record.user), arrivals(scenario, cell)
    assert [record.user for record in records] == list(range(len(records))), "each arrival once"
    begins = {record.intended_ns - round(next(times).offset_s * 1e9) for record in records}
    assert len(begins) == 1, "told in each one's own time, the start is the same in ours"
    assert load.open_ns is not None and load.open_ns - begins.pop() >= scenario.warmup_s * 1e9
    assert agree(load, log, skews) >= 30


def test_over_a_slow_and_uneven_link_the_error_says_so(truth: Truth, door: Door, start: Start) -> None:
    """40 ms from the generator to us and none back: the offset is 20 ms wrong at least, and the error knows."""
    target = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth")
    with Link(door.where, 0.04, 0.0) as link:
        start(3 * SECOND, where=link.where)
        with Generators([door.admit(30)]) as held:
            load = held.run(Cell("x", 2), SHORT, IDS, target)
    (clock,) = load.clocks
    assert abs(clock.offset_ns - 3 * SECOND) <= clock.error_ns
    assert clock.error_ns >= 20_000_000 and clock.rtt_min_ns >= 40_000_000
    assert len([record for record in load.records if record.phase == "measured"]) >= 24


def test_keys_never_go_over_the_network_in_clear(truth: Truth, door: Door, start: Start) -> None:
    target = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth", "kneebench-the-key-of-an-endpoint")
    with Link(door.where, 0.0, 0.0) as link:
        start(where=link.where)
        with Generators([door.admit(30)]) as held:
            load = held.run(Cell("x", 2), SHORT, IDS, target)
        assert len(link.carried) > 5000 and load.records
        for secret in (target.api_key, door.key, door.key[:64], door.key[64:], "RequestRecord", "chat"):
            assert secret is not None and secret.encode() not in link.carried
    assert redact.without_keys(f"it said {door.key[:64]} and {door.key}") == "it said <key> and <key>"


# --- at the door ------------------------------------------------------------------------------------------------------


def knock(door: Door) -> socket.socket:
    host, port = door.where.split(":")
    return socket.create_connection((host, int(port)), 10)


def over_tls(door: Door, *said: bytes, after: threading.Event | None = None) -> ssl.SSLSocket:
    """Somebody who reaches the port, and says this; what follows the first once `after` is set. It has a thread of its
    own, for the door is answered by the test's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sock = context.wrap_socket(knock(door), do_handshake_on_connect=False)

    def speak() -> None:
        try:
            sock.do_handshake()
            for number, data in enumerate(said):
                if number and after is not None:
                    after.wait(30)
                sock.sendall(data)
        except OSError:
            pass

    threading.Thread(target=speak, daemon=True).start()
    return sock


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1000) == b""
    except (ConnectionError, ssl.SSLError):
        return True


def test_whoever_has_no_token_is_closed_and_delays_nobody(
    door: Door, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(away, "_GREETING_S", 0.5)
    version = away.__version__.encode()
    strangers = [
        knock(door),  # silent
        over_tls(door, b""),
        over_tls(door, b"0" * 64 + b" " + version + b"\n"),
        over_tls(door, door.key[64:].encode() + b" " + version + b"\n"),  # the certificate's fingerprint is public
        over_tls(door, door.key[:63].encode() + b" " + version + b"\n"),
        over_tls(door, b" " + version + b"\n"),
        over_tls(door, b"x" * 4096),
        knock(door),
        knock(door),
    ]
    strangers[-1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    strangers[-2].sendall(door.key[:64].encode() + b" " + version + b"\n")  # the token, but in clear
    start()
    connection = door.admit(30)
    with pytest.raises(RunError, match="no load generator came"):
        door.admit(1.0)
    for number, stranger in enumerate(strangers):
        assert is_closed(stranger), number
        stranger.close()
    assert connection.peer == "127.0.0.1"
    connection.end()


def test_more_strangers_than_are_heard_out_are_closed_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(away, "_MOST_GUESTS", 2)
    strangers = [knock(door) for _ in range(3)]
    with pytest.raises(RunError, match="no load generator came"):
        door.admit(0.5)
    assert is_closed(strangers[2])
    for waiting in strangers[:2]:
        waiting.settimeout(0.1)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    for stranger in strangers:
        stranger.close()


def test_nobody_is_answered_while_nobody_is_expected(door: Door, start: Start) -> None:
    worker, silent = start(), knock(door)
    silent.settimeout(0.3)
    with pytest.raises(TimeoutError):
        silent.recv(1)
    assert worker.poll() is None, "it waits for its turn"
    door.admit(30).end()
    silent.close()


def test_several_workers_may_come_at_once(door: Door, start: Start) -> None:
    workers = [start() for _ in range(3)]
    connections = [door.admit(30) for _ in workers]
    for connection in connections:
        connection.end()
    assert [worker.wait(30) for worker in workers] == [0, 0, 0], "each ends with its connection"


def test_another_version_is_named(door: Door) -> None:
    sock = over_tls(door, door.key[:64].encode() + b" 0.0.0\n")
    with pytest.raises(RunError, match=r"kneebench 0\.0\.0 came") as error:
        door.admit(30)
    assert "same version" in str(error.value)
    assert is_closed(sock)
    sock.close()


def test_a_worker_tells_its_token_to_nobody_else(door: Door, start: Start) -> None:
    """Somebody stands where the owner should, with a certificate of its own."""
    with listen() as false_door:
        worker = start(where=false_door.where)
        with pytest.raises(RunError, match="no load generator came"):
            while worker.poll() is None:
                false_door.admit(1.0)
            false_door.admit(0.1)
        with pytest.raises(RunError):
            false_door.admit(2.0)
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 1 and b"certificate is not its own" in said


def test_a_worker_with_another_token_is_told_why_it_ends(door: Door, start: Start) -> None:
    worker = start(key="0" * 64 + door.key[64:])
    with pytest.raises(RunError, match="no load generator came"):
        door.admit(5)
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 1 and b"closed its door" in said and b"key of this very door" in said


def test_an_owner_that_cannot_be_reached(start: Start) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        worker = start(where=f"127.0.0.1:{nobody.getsockname()[1]}")
        _, said = worker.communicate(timeout=30)
    assert worker.returncode == 1 and b"cannot be reached" in said


@pytest.mark.parametrize("key", ["", "short", "0" * 127, "0" * 128 + "\n", "G" * 128])
def test_a_key_that_is_none_is_refused(start: Start, key: str) -> None:
    worker = start(key=key)
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 2 and DOOR_VARIABLE.encode() in said
    assert not key or key.encode() not in said


def test_the_key_is_in_no_command_line_and_not_kept_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    became: list[object] = []
    monkeypatch.setenv(DOOR_VARIABLE, door.key)
    monkeypatch.setattr(away, "become_generator", became.append)
    away.main([door.where])
    assert len(became) == 1 and DOOR_VARIABLE not in os.environ
    with pytest.raises(SystemExit) as refused:
        away.main([door.where, door.key])
    assert refused.value.code == 2


def test_each_door_has_a_key_of_its_own(door: Door) -> None:
    with listen() as other:
        assert door.key[:64] != other.key[:64] and door.key[64:] != other.key[64:]
    host, port = door.where.split(":")
    greeter = over_tls(door, b"x\n")
    with pytest.raises(RunError):
        door.admit(0.5)
    certificate = greeter.getpeercert(binary_form=True)
    greeter.close()
    assert certificate is not None and hashlib.sha256(certificate).hexdigest() == door.key[64:]


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::", "203.0.113.7", "no such host"])
def test_addresses_that_are_not_one_of_ours(host: str) -> None:
    with pytest.raises(InputError):
        listen(host)


def test_without_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingTool, match="openssl"):
        listen()


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_node_that_is_lost_in_the_middle_of_a_cell(truth: Truth, door: Door, start: Start) -> None:
    """Its rows until then are kept, the error says what to do, and the other node's generator ends as well."""
    target = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth")
    workers, kept = [start(), start()], []
    connections = [door.admit(30) for _ in workers]

    def on_record(record: RequestRecord) -> None:
        kept.append(record)
        if len(kept) == 20:
            workers[0].kill()

    with Generators(connections) as held:
        with pytest.raises(RunError, match="another node was lost") as error:
            held.run(Cell("x", 4), replace(SHORT, requests=10**6), IDS, target, on_record=on_record)
        assert all(connection.spoiled for connection in connections)
    assert len(kept) >= 20 and "--resume" in str(error.value) and "finished row is on disk" in str(error.value)
    assert workers[1].wait(30) == 0


def test_a_link_that_breaks_in_the_middle_of_a_cell(truth: Truth, door: Door, start: Start) -> None:
    target, kept = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth"), []
    with Link(door.where, 0.0, 0.0) as link:
        worker = start(where=link.where)

        def on_record(record: RequestRecord) -> None:
            kept.append(record)
            if len(kept) == 20:
                link.cut()

        with Generators([door.admit(30)]) as held:
            with pytest.raises(RunError, match="another node was lost"):
                held.run(Cell("x", 4), replace(SHORT, requests=10**6), IDS, target, on_record=on_record)
    assert len(kept) >= 20 and worker.wait(30) == 0


def test_a_node_that_says_nothing_any_more(
    truth: Truth, door: Door, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between two cells: its connection stands, and nobody answers."""
    monkeypatch.setattr(generators, "_ANSWER_S", 0.5)
    target, worker = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth"), start()
    with Generators([door.admit(30)]) as held:
        worker.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError, match="said nothing"):
            held.run(Cell("x", 2), SHORT, IDS, target)


def test_a_defect_in_a_generator_away_is_told(truth: Truth, door: Door, start: Start) -> None:
    target = Target(truth("--ttft-ms", "5", "--gap-ms", "1"), "truth")
    with Generators(admitted(door, start, SKEWS[:1])) as held:
        with pytest.raises(RunError, match="prompts come from a dataset"):
            held.run(Cell("x", 2), replace(SHORT, dataset="given"), IDS, target)


def test_a_vanished_node_is_noticed_by_the_kernel(door: Door, start: Start) -> None:
    """Both ends ask whether the other one is there: silence alone is no sign. On this machine nobody can vanish."""
    start()
    connection = door.admit(30)
    asks = [connection._sock.getsockopt(*option) for option in ((socket.SOL_SOCKET, socket.SO_KEEPALIVE),)]
    details = {name: connection._sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
    connection.end()
    assert asks == [1] and details == KEEPALIVE


KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000, "TCP_NODELAY": 1}


def test_messages_that_come_in_pieces_of_tls_records(door: Door) -> None:
    """A record of TLS that has come by half is waited for, not read: `receive` never blocks."""
    greeting, message, heard = f"{door.key[:64]} {away.__version__}\n".encode(), "y" * 100_000, threading.Event()
    with over_tls(door, greeting, packed(message) + packed(1), after=heard):
        connection = door.admit(30)
        assert connection.receive() == []
        heard.set()
        found: list[object] = []
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            while len(found) < 2 and selector.select(30):
                found += connection.receive()
        assert found == [message, 1]
        connection.end()
