"""What is fuzzed: every reader of bytes that somebody else wrote, each as a plain function of those bytes.

A target returns, or raises an error that its reader declares. Anything else is a find, and so is an input that takes
more than a second. `tests/fuzz/test_fuzz.py` runs some of it in CI, `python benchmarks/fuzz.py` runs millions, and
docs/fuzzing.md says what was found. Inputs that once broke a reader lie in tests/fuzz/found/<target>/ and stay there.

Over 300 lines because all targets stand in one place, beside each other: what is not here is not fuzzed.
"""

from __future__ import annotations

import atexit
import functools
import gzip
import itertools
import json
import math
import random
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness import history, models, redact, slo
from harness.architecture import architecture, read_config
from harness.assumptions import load_assumptions
from harness.engines import EngineCounters
from harness.engines.address import Address
from harness.engines.modes import diagnose
from harness.engines.vllm_log import last_error, read_log, stage
from harness.errors import KneebenchError
from harness.job import SweepRequest
from harness.load import client, dataset, schedule
from harness.load.answer import ResponseReader, StreamError
from harness.load.script import STREAM_END, STREAM_HEAD, Refusal, Script, Wording, read_request, tokenized
from harness.load.truth_socket import Connection
from harness.prices import load_prices
from harness.quality.texts import read_texts
from harness.records import RequestRecord, read_table, write_table
from harness.report.run import load_run
from harness.rundir import remembered
from harness.scenario import load_scenario
from harness.telemetry.prometheus import read_counters
from harness.telemetry.trace_files import read_trace

ROOT = Path(__file__).parents[2]
DATA, LOGS, SCENARIOS = ROOT / "tests" / "data", ROOT / "tests" / "logs", ROOT / "scenarios"
RUN = ROOT / "results" / "demo-until-p95-500ms"
TRACED = ROOT / "results" / "qwen2.5-0.5b-timeline"


@dataclass(frozen=True)
class Target:
    """A reader, the real inputs that fuzzing starts from, and how long an input may become."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    longest: int = 1 << 14
    share: float = 1.0
    """Of the inputs of a long run; slow readers get fewer."""

    @property
    def in_ci(self) -> int:
        """Inputs in the tests, which are to take seconds."""
        return round(300 * min(self.share, 3.0))


# --- the client: HTTP and server-sent events --------------------------------------------------------------------------

_BEGIN_NS = 1_700_000_000_000_000_000


def answer(data: bytes) -> None:
    """A server's bytes, in one piece and in many: what the client makes of them is the same, and makes sense."""
    assert _facts(read_answer([data])) == _facts(read_answer(_cut(data)))


def events(data: bytes) -> None:
    """The same behind sound HTTP: `data` is the body of an event stream, in one chunk and in many."""
    pieces = [STREAM_HEAD, *map(_chunk, _cut(data)), b"0\r\n\r\n"]
    assert _facts(read_answer([STREAM_HEAD + _chunk(data) + b"0\r\n\r\n"])) == _facts(read_answer(pieces))


def record(data: bytes) -> None:
    """What the client made of an event stream stands in requests.csv, and is read from it as it was."""
    reader, error = read_answer([STREAM_HEAD, _chunk(data) + b"0\r\n\r\n"])
    asked = RequestRecord("bf16-c1-r1", 0, 0, "measured", _BEGIN_NS)
    said = (error.kind, str(error)) if error else None
    made = client.fill(asked, client.Exchange(reader, _BEGIN_NS, reader.last_read_ns, True, said))
    with _File("requests.csv") as path:
        _kept(path, [made])


def _chunk(data: bytes) -> bytes:
    """An HTTP chunk; none for nothing, which would be the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def read_answer(pieces: list[bytes]) -> tuple[ResponseReader, StreamError | None]:
    """The reader after all pieces, a microsecond apart, and after the end; and what it raised."""
    reader = ResponseReader()
    try:
        for number, piece in enumerate(pieces, 1):
            if piece:
                reader.feed(piece, _BEGIN_NS + 1000 * number)
        if not reader.done:
            reader.feed_eof()
    except StreamError as error:
        return _checked(reader), error
    assert reader.done
    return _checked(reader), None


def _kept(path: Path, records: list[RequestRecord]) -> None:
    """Their figures are read as they were written, and so are their texts from the second time on: what a terminal or
    a spreadsheet would obey is written another way (harness/inert.py), and an empty text is a missing one."""
    write_table(path, records, RequestRecord)
    once = read_table(path, RequestRecord)
    for field in fields(RequestRecord):
        for before, after in zip(records, once, strict=True):
            value = getattr(before, field.name)
            assert isinstance(value, str) or getattr(after, field.name) == value, field.name
    write_table(path, once, RequestRecord)
    assert read_table(path, RequestRecord) == once


def _checked(reader: ResponseReader) -> ResponseReader:
    assert len(reader.stamps) == len(reader.tokens) and reader.stamps == sorted(reader.stamps)
    assert all(count > 0 for count in reader.tokens) and len(reader.token_ids) <= sum(reader.tokens)
    assert 0 <= reader.coalesced_reads <= reader.reads
    for count in (reader.prompt_tokens, reader.completion_tokens):
        assert count is None or count >= 0, f"{count} tokens"
    return reader


def _facts(outcome: tuple[ResponseReader, StreamError | None]) -> tuple[Any, ...]:
    """All that may not hang on how the bytes were cut."""
    reader, error = outcome
    said = ("".join(reader.text), tuple(reader.token_ids), sum(reader.tokens), len(reader.tokens), reader.ids_seen)
    usage = (reader.prompt_tokens, reader.completion_tokens, reader.finish_reason)
    return reader.status, reader.done, error and error.kind, *said, *usage


def _cut(data: bytes) -> list[bytes]:
    """`data` in pieces, at places that hang on `data` alone."""
    rng = random.Random(zlib.crc32(data))
    size = rng.choice((1, 2, 7, 64, 512))
    places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(min(64, len(data) // size)))})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def _bodies() -> list[bytes]:
    """Bodies of event streams: vLLM's as they were recorded, and what the scripted server says."""
    return [(DATA / name).read_bytes() for name in ("vllm_chat_stream.txt", "vllm_completions_stream.txt")] + [
        b'data: {"choices":[{"delta":{"content":"a"},"token_ids":[1]}]}\n\n'
        b'data: {"choices":[{"delta":{"reasoning_content":"b"},"finish_reason":"stop"}]}\r\n\r\n: comment\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n',
        b'data: {"error":{"message":"no","code":500}}\n\n',
        b'event: x\nid: 1\ndata: {"choices":\ndata: [{"text":"t"}]}\n\ndata:[DONE]\n\n',
    ]


def _answers() -> list[bytes]:
    script = Script(tokens_per_chunk=2)
    asked = read_request("/v1/completions", {}, b'{"prompt":"a b","max_tokens":4,"return_token_ids":true}', script)
    wording = Wording(script, replace(asked, usage_wanted=True, stream=True), "1", 0)
    scripted = wording.tokens(0, 2, last=False, empty=False) + wording.tokens(2, 4, last=True, empty=False)
    refused = b'{"error":{"message":"slow down","code":429}}'
    return [
        STREAM_HEAD + scripted + wording.ending(4),
        *(STREAM_HEAD + _chunk(body) + STREAM_END for body in _bodies()),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + _bodies()[2],
        b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Length: 44\r\n\r\n" + refused,
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 14\r\n\r\n"
        b"data: [DONE]\n\n",
    ]


# --- the scripted server ----------------------------------------------------------------------------------------------


class _Bytes:
    """A socket from which these pieces come, and an epoll that has nothing to do."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        return next(self._pieces, b""), [], 0, None

    def setblocking(self, _: bool) -> None:
        pass

    def register(self, *_: Any) -> None:
        pass


def request(data: bytes) -> None:
    """A client's bytes at the scripted server: requests in any cutting, each understood or refused."""

    def taken(pieces: list[bytes]) -> list[tuple[str, bytes, bool]]:
        sock: Any = _Bytes(pieces)
        connection = Connection(sock, sock)
        for _ in pieces:
            if not connection.broken:
                connection.receive()
        for message in connection.messages:
            try:
                if message.url == "/tokenize":
                    json.dumps(tokenized(message.body)).encode()
                else:
                    asked = read_request(message.url, message.headers, message.body, _PATIENT)
                    assert asked.tokens >= 1 and asked.prompt_tokens >= 0
                    Wording(_PATIENT, asked, "1", 0).tokens(0, 2, last=True, empty=False)
            except Refusal:
                pass
        return [(message.url, message.body, message.keep_alive) for message in connection.messages]

    assert taken([data]) == taken(_cut(data))


_PATIENT = Script()


def _requests() -> list[bytes]:
    bodies = {
        b"/v1/completions": b'{"model":"m","prompt":[1,2,3],"max_tokens":5,"stream":true,"return_token_ids":true,'
        b'"stream_options":{"include_usage":true}}',
        b"/v1/chat/completions": b'{"messages":[{"role":"user","content":"a b"},{"role":"user","content":'
        b'[{"type":"text","text":"c"}]}],"max_completion_tokens":3}',
        b"/tokenize": b'{"prompt":"a b c"}',
        b"/tokenize?x": b'{"messages":[{"content":"a b"}]}',
    }
    whole = [
        b"POST %b HTTP/1.1\r\nHost: x\r\nX-Request-Id: a/1/2\r\nAuthorization: Bearer k\r\nContent-Length: %d\r\n\r\n%b"
        % (url, len(body), body)
        for url, body in bodies.items()
    ]
    return [*whole, b"".join(whole), b"GET /v1/models HTTP/1.0\r\n\r\n"]


# --- what the user writes ---------------------------------------------------------------------------------------------


def scenario(data: bytes) -> None:
    """A scenario file. What is read can be written: no figure of it is infinite."""
    _of_file("mine.toml", data, lambda path: _finite(load_scenario(str(path))))


def assumptions(data: bytes) -> None:
    """Prices and traffic for a report."""
    _of_file("mine.toml", data, lambda path: _finite(load_assumptions(path)))


def prices(data: bytes) -> None:
    """A price catalogue of one's own."""
    _of_file("mine.toml", data, load_prices)


def words(data: bytes) -> None:
    """What is typed: a service level, a duration, a share, a server's address."""
    text = data.decode("utf-8", "surrogateescape")
    readers = (slo.parse_slo, lambda text: slo.parse_duration(text, "--x"), lambda text: slo.parse_share(text, "--x"))
    for read in readers:
        try:
            found = read(text)
        except KneebenchError:
            continue
        if isinstance(found, slo.Slo):
            again = slo.parse_slo(found.text)
            assert all(
                one == other or math.isclose(one, other, rel_tol=1e-5)
                for one, other in zip(_values(found), _values(again), strict=True)
            )
            assert found.words
        else:
            assert math.isfinite(found) and found >= 0
    try:
        address = Address.parse(text)
    except KneebenchError:
        return
    assert Address.parse(address.base_url + "/v1") == address


def _values(level: slo.Slo) -> list[Any]:
    return [getattr(level, field.name) for field in fields(slo.Slo)]


def trace(data: bytes) -> None:
    """A CSV of arrivals."""

    def read(path: Path) -> None:
        rows = schedule.read_trace(path)
        assert schedule.mean_rate(rows) > 0 and all(row.offset_s >= 0 for row in rows)
        assert all(math.isfinite(row.offset_s) for row in rows)

    _of_file("trace.csv", data, read)


def dataset_json(data: bytes) -> None:
    """A list of conversations."""
    _of_file("prompts.json", data, _prompts)


def dataset_lines(data: bytes) -> None:
    """Prompts, one record a line."""
    _of_file("prompts.jsonl", data, _prompts)


def dataset_table(data: bytes) -> None:
    """Prompts in a CSV."""
    _of_file("prompts.csv", data, _prompts)


def _prompts(path: Path) -> None:
    items = dataset.read_dataset(path)
    assert dataset.longest_tokens(items, 2) > 0
    for item in items:
        item.prompt.encode()
        (item.answer or "").encode()
        assert item.prompt.strip() and (item.output_tokens is None or item.output_tokens > 0)


def _traces() -> list[bytes]:
    return [
        b"timestamp,input_length,output_length\n0,10,20\n0.5,11,1\n2,12,0\n",
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.91,396,109\n",
        b"\xef\xbb\xbfTimestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\r\n"
        b"5,ChatGPT,472,18,490,x\r\n45,ChatGPT,1087,230,1317,x\r\n",
    ]


# --- what engines and profilers write ---------------------------------------------------------------------------------


def vllm_log(data: bytes) -> None:
    """An engine's log: what it says of itself, how far it is, why it died, which failures it shows."""
    text = data.decode("utf-8", "replace")
    _finite(read_log(text))
    stage(text)
    lines, advice = last_error(text)
    assert all(len(line) <= 600 for line in lines) and isinstance(advice, str)
    for met in diagnose(text):
        assert met.count >= 1 and len(met.line) <= 300


def metrics(data: bytes) -> None:
    """A /metrics page; ValueError is how its parser says that it is none."""
    try:
        counters: EngineCounters = read_counters(data.decode("utf-8", "replace"))
    except ValueError:
        return
    _finite(counters)


def torch_trace(data: bytes) -> None:
    """A trace of torch's profiler, packed or not."""
    _of_file("trace-bf16.json", data, lambda path: read_trace("bf16", path))


def nsys(data: bytes) -> None:
    """An export of Nsight Systems; whatever begins as a database does."""
    _of_file("trace-bf16.sqlite", b"SQLite format 3\0" + data, lambda path: read_trace("bf16", path))


def nsys_cells(data: bytes) -> None:
    """The same with a sound database around odd values: SQLite puts any type into any column."""

    def read(path: Path) -> None:
        _export(path, data)
        read_trace("bf16", path)

    _of_file("trace-bf16.sqlite", b"", read)


_EXPORT = """
CREATE TABLE StringIds (id, value);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start, end, streamId, correlationId, globalPid, demangledName, shortName);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start, end, streamId, correlationId, globalPid, copyKind);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start, end, streamId, correlationId, globalPid);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start, end, globalTid, correlationId);
CREATE TABLE NVTX_EVENTS (start, end, eventType, globalTid, text, textId);
"""
_PID = 77 << 24
_ROWS: dict[str, list[list[Any]]] = {
    "StringIds": [[1, "ampere_bf16_s16816gemm_bf16"], [2, "execute_context_1(8)_generation_0(0)"]],
    "CUPTI_ACTIVITY_KIND_KERNEL": [[1000, 2000, 7, 1, _PID, 1, 1], [3000, 4000, 7, 2, _PID, 1, 1]],
    "CUPTI_ACTIVITY_KIND_MEMCPY": [[2100, 2200, 7, 3, _PID, 1]],
    "CUPTI_ACTIVITY_KIND_MEMSET": [[2300, 2400, 7, 4, _PID]],
    "CUPTI_ACTIVITY_KIND_RUNTIME": [[number * 100, number * 100 + 50, _PID | 78, number] for number in (1, 2, 3, 4)],
    "NVTX_EVENTS": [[50, 2900, 59, _PID | 78, None, 2], [2950, 5000, 59, _PID | 78, "execute_new_0_cached_1", None]],
}


def _export(path: Path, data: bytes | None = None) -> None:
    """A small export; with `data`, some of its cells are what that says."""
    rows = {table: [list(row) for row in rows] for table, rows in _ROWS.items()}
    if data is not None:
        rng = random.Random(zlib.crc32(data))
        odd = [None, -1, 0, 2**63 - 1, -(2**63), 1.5, math.inf, "", "a", b"", data[:99], data.decode("latin-1")]
        for _ in range(rng.randrange(4)):
            row = rng.choice(rows[rng.choice(list(rows))])
            row[rng.randrange(len(row))] = rng.choice(odd)
    with closing(sqlite3.connect(path)) as base:
        base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _EXPORT)
        for table, lines in rows.items():
            base.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(lines[0]))})", lines)
        base.commit()


def _torch_traces() -> list[bytes]:
    """The first events of real traces, and those of a card."""
    found = []
    for name in ("torch_trace_bf16_cpu.json.gz", "torch_trace_awq_cpu.json.gz"):
        with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        marks = [event for event in events if event["cat"] == "user_annotation"][:3]
        text = json.dumps({"schemaVersion": 1, "traceEvents": marks + events[:20]}).encode()
        found += [text, gzip.compress(text, mtime=0)]
    card = [
        {"ph": "X", "cat": "user_annotation", "name": "execute_context_1(8)_generation_0(0)", "tid": 1, "ts": 0,
         "dur": 9},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1, "ts": 1, "dur": 1,
         "args": {"correlation": 5}},
        {"ph": "X", "cat": "kernel", "name": "ampere_bf16_s16816gemm", "tid": 7, "ts": 2, "dur": 3,
         "args": {"correlation": 5, "stream": 7}},
    ]  # fmt: skip
    return [*found, json.dumps({"traceEvents": card}).encode()]


def _exports() -> list[bytes]:
    with _File("export.sqlite") as path:
        _export(path)
        return [path.read_bytes().removeprefix(b"SQLite format 3\0")]


# --- what runs leave --------------------------------------------------------------------------------------------------


def requests_table(data: bytes) -> None:
    """requests.csv, read, written and read again."""

    def read(path: Path) -> None:
        _kept(path, read_table(path, RequestRecord))

    _of_file("requests.csv", data, read)


def _in_run(name: str) -> Callable[[bytes], None]:
    """A run whose file `name` is what the fuzzer says, as reports, the history and `--resume` read it."""

    def read(data: bytes) -> None:
        directory = _small_run()
        (directory / name).write_bytes(data)
        for reader in (load_run, history.read_run, remembered):
            try:
                reader(directory)
            except KneebenchError:
                pass

    read.__doc__ = f"{name} of a run directory."
    return read


@functools.cache
def _small_run() -> Path:
    """A run of a few rows. It serves all inputs of one target, each of which writes the same file anew."""
    directory = _folder() / "small-run"
    directory.mkdir()
    for name in ("environment.json", "quality.toml", "run.toml"):
        shutil.copy(RUN / name, directory)
    for name, lines in {"points.csv": 3, "requests.csv": 3, "answers.jsonl": 2, "positions.csv": 5}.items():
        (directory / name).write_bytes(_beginning(RUN / name, lines))
    (directory / "prompts.toml").write_bytes(_one_prompt())
    (directory / ".unfinished.json").write_bytes(_UNFINISHED)
    return directory


_UNFINISHED = json.dumps(
    {
        "scenario": {"name": "chat", "input_tokens": 128, "slo_p95_s": 3.0},
        "concurrencies": [1, 8],
        "model": "demo",
        "precisions": ["bf16", "awq"],
        "out": "/tmp/run",
        "search": None,
    }
).encode()


@functools.cache
def _request_type() -> TypeAdapter[SweepRequest]:
    return TypeAdapter(SweepRequest)


def resumed(data: bytes) -> None:
    """What `--resume` remembers, as the sweep takes it. Nothing is started."""
    with _File(".unfinished.json") as path:
        path.write_bytes(data)
        try:
            request = _request_type().validate_python(remembered(path.parent))
        except (KneebenchError, ValidationError):  # which `job.resume` turns into an InputError
            return
    assert isinstance(request, SweepRequest)


def texts(data: bytes) -> None:
    """texts.jsonl of a quality directory."""
    _of_file("texts.jsonl", data, read_texts)


def _one_prompt() -> bytes:
    parts = (RUN / "prompts.toml").read_bytes().split(b"[[prompt]]")
    return b"[[prompt]]".join(parts[:3])


def _beginning(path: Path, lines: int) -> bytes:
    with path.open("rb") as file:
        return b"".join(itertools.islice(file, lines))


# --- models -----------------------------------------------------------------------------------------------------------


def config(data: bytes) -> None:
    """A model's config.json, and the sizes that are computed from it."""

    def read(path: Path) -> None:
        shape = architecture(read_config(path))
        if shape is not None:
            assert shape.parameters >= 0 and shape.weight_bytes >= 0 and shape.kv_bytes(1000) >= 0

    _of_file("config.json", data, read)


def header(data: bytes) -> None:
    """A safetensors file, as the harness reads its header."""
    _of_file("model.safetensors", data, lambda path: models.weight_bytes(_model_of(path)))


def _model_of(path: Path) -> models.Model:
    return models.Model("fuzzed", path.parent)


def weights(data: bytes) -> None:
    """The same as `quantize` opens it: names, shapes, values, and the hash of it all."""
    from safetensors import SafetensorError

    from quantize.errors import QuantizeError
    from quantize.weights import content_hash, open_model

    with _File("model.safetensors") as path:
        path.write_bytes(data)
        (path.parent / "config.json").write_text("{}")
        try:
            opened = open_model(path.parent)
            for name in opened.files:
                opened.shape(name)
                opened.nbytes(name)
                opened.read([name])
            content_hash(path.parent)
        except (QuantizeError, SafetensorError):
            pass
        finally:
            (path.parent / "config.json").unlink()


def _configs() -> list[bytes]:
    found = [path.read_bytes() for path in sorted((SCENARIOS / "shapes").glob("*.json"))]
    return found + [path.read_bytes() for path in sorted(TRACED.glob("config-*.json"))]


def _tensors() -> list[bytes]:
    """Small files of two tensors, one of them empty."""
    import quantize.weights  # noqa: F401  seconds of torch, which are not the first input's

    def file(tensors: dict[str, Any], body: bytes) -> bytes:
        head = json.dumps(tensors).encode()
        return len(head).to_bytes(8, "little") + head + body

    whole = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}
    return [
        file(whole, bytes(8)),
        file(whole | {"b": {"dtype": "I32", "shape": [0], "data_offsets": [8, 8]}}, bytes(8)),
        file({"b": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}, bytes(2)),
    ]


# --- keys -------------------------------------------------------------------------------------------------------------

_SECRET = "Zq3-fuzz+Secret/42"


def redacted(data: bytes) -> None:
    """What leaves the machine: no key that is known is left in it, wherever it stood."""
    redact.hide(_SECRET)
    text = data.decode("utf-8", "replace")
    place = zlib.crc32(data) % (len(text) + 1)
    for said in (text, text[:place] + _SECRET + text[place:]):
        shown = redact.redact(said)
        assert _SECRET not in shown
    redact.holds_key(text)


def _with_keys() -> list[bytes]:
    return [
        b"Authorization: Bearer abcdefgh12345678\nGET http://user:pass@host/v1?api_key=0123456789abcdef 10.1.2.3",
        b"sk-proj-1234567890abcdef1234 hf_abcdefghijklmnopqrstu ghp_0123456789abcdefghij xoxb-1234567890-abc",
        b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk AKIAABCDEFGHIJKLMNOP kneebench-" + b"a" * 32,
        b'{"hf_token": "abcdefghijkl", "secret-key": ["abcdefghijkl"]} --api-key abcdefghijkl /home/ann/x /tmp/y',
    ]


# --- files ------------------------------------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    """A directory in memory, where there is one, that goes with this process."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_number = itertools.count()


class _File:
    """A path of this name in a directory of its own, each time another: some readers remember what they have read."""

    def __init__(self, name: str) -> None:
        self._path = _folder() / str(next(_number)) / name

    def __enter__(self) -> Path:
        self._path.parent.mkdir()
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        self._path.parent.rmdir()


def _of_file(name: str, data: bytes, read: Callable[[Path], object]) -> None:
    """Have a file of these bytes read; the project's own errors are answers, too."""
    with _File(name) as path:
        path.write_bytes(data)
        try:
            read(path)
        except KneebenchError as error:
            assert str(error)


def _finite(found: object) -> None:
    """No figure that was read is infinite or NaN: it could not be written."""
    assert is_dataclass(found)
    for field in fields(found):
        value = getattr(found, field.name)
        assert not isinstance(value, float) or math.isfinite(value), f"{field.name} = {value}"


def _tomls(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.toml"))]


def _typed() -> list[bytes]:
    return [
        b"p95=3s", b"p95=3s,ttft=500ms,tpot=50ms,goodput=90%", b"800ms", b"0.05", b"5%", b"goodput=0.9,p95=2",
        b"http://127.0.0.1:8000/v1", b"https://example.org/a/b/", b"http://[::1]:80", b"https://user:pw@host?x#y",
    ]  # fmt: skip


def _logs() -> list[bytes]:
    files = [*sorted(LOGS.glob("*.log")), *sorted(DATA.glob("*.log"))]
    return [path.read_bytes()[:3000] for path in files]


def _run_file(name: str, share: float = 0.1) -> Target:
    return Target(_in_run(name), lambda: [(_small_run() / name).read_bytes()], share=share)


_ASSUMPTIONS = [
    b'rent = "rtx-2000-ada"\nelectricity = "us-residential"\nusers = 100\nheadroom = 0.2\n',
    b"card_usd = 1000.0\nhost_usd = 500\nyears = 3\nwatts = 70\nusd_per_kwh = 0.2\nrequests_per_day = 864000\n",
    b"usd_per_hour = 0.24\npeak_rps = 3\napi_usd_per_1m_input = 0.1\napi_usd_per_1m_output = 0.4\napi_name = 'x'\n",
]
_DATASETS = {
    "json": [
        b'[{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, '
        b'{"from": "gpt", "value": "a"}]}, {"prompt": "p", "output_tokens": 4}]',
        b'[{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, '
        b'{"text": "t", "completion": "c"}]',
    ],
    "lines": [
        b'{"prompt": "p", "output_tokens": 40}\n{"messages": [{"role": "user", "content": "q"}, '
        b'{"role": "assistant", "content": "a"}]}\n\n{"text": "t", "completion": "c"}\n'
    ],
    "table": [b'prompt,output_tokens,completion\n"a, b",12,\nc,,"d\ne"\n', b"prompt\nx\n"],
}

TARGETS: dict[str, Target] = {
    "answer": Target(answer, _answers, share=5),
    "events": Target(events, _bodies, share=5),
    "record": Target(record, _bodies, share=0.5),
    "request": Target(request, _requests, share=4),
    "words": Target(words, _typed, longest=256, share=10),
    "scenario": Target(scenario, lambda: _tomls(SCENARIOS), share=0.5),
    "assumptions": Target(assumptions, lambda: list(_ASSUMPTIONS), share=0.5),
    "prices": Target(prices, lambda: [(SCENARIOS / "catalogue" / "prices.toml").read_bytes()[:3000]], share=0.1),
    "trace": Target(trace, _traces, share=2),
    "dataset_json": Target(dataset_json, lambda: _DATASETS["json"], share=1),
    "dataset_lines": Target(dataset_lines, lambda: _DATASETS["lines"], share=1),
    "dataset_table": Target(dataset_table, lambda: _DATASETS["table"], share=1),
    "vllm_log": Target(vllm_log, _logs, longest=1 << 15, share=0.45),
    "metrics": Target(metrics, lambda: [_wanted_metrics()], share=1.5),
    "torch_trace": Target(torch_trace, _torch_traces, share=0.5),
    "nsys": Target(nsys, _exports, longest=1 << 16, share=0.5),
    "nsys_cells": Target(nsys_cells, lambda: [b"a", b"12"], longest=64, share=0.45),
    "requests_table": Target(requests_table, lambda: [_beginning(RUN / "requests.csv", 3)], share=0.5),
    "run_toml": _run_file("run.toml"),
    "environment": _run_file("environment.json"),
    "points": _run_file("points.csv", share=0.45),
    "answers": _run_file("answers.jsonl"),
    "positions": _run_file("positions.csv"),
    "quality": _run_file("quality.toml"),
    "prompts": _run_file("prompts.toml"),
    "resumed": Target(resumed, lambda: [_UNFINISHED], share=0.5),
    "texts": Target(texts, lambda: [_beginning(RUN / "texts.jsonl", 3)], share=0.5),
    "config": Target(config, _configs, share=2),
    "header": Target(header, _tensors, share=2),
    "weights": Target(weights, _tensors, share=0.5),
    "redacted": Target(redacted, _with_keys, longest=1 << 15, share=0.45),
}


def _wanted_metrics() -> bytes:
    lines = (DATA / "vllm_metrics.txt").read_bytes().splitlines(keepends=True)
    wanted = (b"num_requests", b"cache_usage", b"preemptions", b"cache_queries", b"cache_hits", b"tokens_total")
    return b"".join(line for line in lines if any(name in line for name in wanted))[:4096]


def found() -> Iterator[tuple[str, Path]]:
    """(target, file) of every input that once broke a reader."""
    for path in sorted((Path(__file__).parent / "found").glob("*/*")):
        yield path.parent.name, path
