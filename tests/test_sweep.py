"""A whole sweep through the command line, against a server whose delays are known."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.records import Cell, RequestRecord, SweepPoint, header, read_table
from harness.sweep import Variant, parse_concurrencies, plan_sessions

Truth = Callable[..., str]
FAST = ("--ttft-ms", "5", "--gap-ms", "1")


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "120", **environment},
    )  # fmt: skip


def small(tmp_path: Path, **values: object) -> str:
    """A scenario whose cells take a second."""
    path = tmp_path / "small.toml"
    table = {"input_tokens": 12, "output_tokens": 6, "requests": 30, "min_window_s": 0.2, **values}
    path.write_text("".join(f"{key} = {value}\n" for key, value in table.items()))
    return str(path)


def test_abba_so_that_a_drifting_machine_favours_nobody() -> None:
    sessions = plan_sessions([Variant("bf16"), Variant("awq")], [8, 1, 8], repeats=2)
    assert [(s.variant.precision, s.repeat) for s in sessions] == [("bf16", 1), ("awq", 1), ("awq", 2), ("bf16", 2)]
    assert sessions[0].cells == (Cell("bf16", 1), Cell("bf16", 8))


@pytest.mark.parametrize("text", ["", "1,x", "0", "-4", "1,,2", "2.5", "5000"])
def test_concurrencies_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--conc"):
        parse_concurrencies(text)


@pytest.mark.parametrize("arguments", [("--api", "chat"), ("--api", "completions")])
def test_an_endpoint_is_measured(truth: Truth, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    url, out = truth(*FAST), tmp_path / "run"
    done = bench(
        "sweep", "--endpoint", url, "--model", "truth", "--conc", "2,4", "--scenario", small(tmp_path),
        "--out", str(out), *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = read_table(out / "points.csv", SweepPoint)
    assert [(p.precision, p.conc, p.source) for p in points] == [("served", 2, "endpoint"), ("served", 4, "endpoint")]
    for point in points:
        assert point.requests >= 30 and point.errors == 0
        assert (point.ttft_p50_ms or 0) >= 5 and (point.p95_ms or 0) > (point.ttft_p50_ms or 0)
        assert 4 <= (point.output_tokens_mean or 0) <= 8 and 9 <= (point.input_tokens_mean or 0) <= 15
        # What a busy machine may do to a client is no concern here; errors or wrong lengths would be.
        assert not set(point.verdict_reasons) - {"too_few_samples", "drifting", "client_bound"}
    requests = read_table(out / "requests.csv", RequestRecord)
    assert {r.cell for r in requests} == {"served-c2-r1", "served-c4-r1"}
    assert {r.phase for r in requests} >= {"warmup", "measured"}
    assert (out / "report" / "capacity.md").is_file()
    assert str(tmp_path) not in (out / "environment.json").read_text()
    with (out / "points.csv").open() as file:
        assert next(csv.reader(file)) == list(header(SweepPoint))


def test_keys_never_reach_the_disk(truth: Truth, tmp_path: Path) -> None:
    key = "kb-secret-0123456789abcdef"
    done = bench(
        "sweep", "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--scenario", small(tmp_path),
        "--out", str(tmp_path / "run"), KNEEBENCH_API_KEY=key,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if key.encode() in path.read_bytes()]
    assert key not in done.stdout + done.stderr


def test_a_server_that_refuses_everything_is_a_failed_run_with_its_words(truth: Truth, tmp_path: Path) -> None:
    """The probe does not stream and is answered; the load streams and gets an error object each time."""
    url = truth(*FAST, "--error-after", "0")
    done = bench(
        "sweep", "--endpoint", url, "--model", "truth", "--conc", "2", "--scenario", small(tmp_path),
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "scripted failure" in done.stderr
    (point,) = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    assert point.verdict == "invalid" and "gave_up" in point.verdict_reasons
    assert point.tok_s is None and point.p95_ms is None and point.tok_s_lo is None, "missing is empty, never 0"


def test_ctrl_c_keeps_finished_rows(truth: Truth, tmp_path: Path) -> None:
    url, out = truth(*FAST), tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "harness", "sweep", "--endpoint", url, "--model", "truth", "--conc",
            "1,2,3,4,5,6,7,8",
            "--scenario", small(tmp_path, min_window_s=1.5), "--out", str(out),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job ignores SIGINT and hands that down; the user's Ctrl-C is what is meant here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (out / "points.csv").exists():
            time.sleep(0.05)
        while time.monotonic() < deadline and len((out / "points.csv").read_text().splitlines()) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "every finished row is on disk" in said
    assert 2 <= len(read_table(out / "points.csv", SweepPoint)) < 8


def test_two_sweeps_cannot_write_one_directory(truth: Truth, tmp_path: Path) -> None:
    arguments = (
        "sweep", "--endpoint", truth(*FAST), "--model", "truth", "--conc", "1", "--scenario", small(tmp_path),
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert bench(*arguments).returncode == 0
    again = bench(*arguments)
    assert again.returncode == 2 and "holds a run already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precisions", "bf16,int3"), "'int3' is unknown"),
        (("--precisions", "bf16,bf16"), "twice"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--model", "shape:gpt-9"), "shape:gpt-9"),
        (("--conc", "1,eight"), "'eight'"),
        (("--slo-p95", "soon"), "soon"),
        (("--scenario", "nowhere.toml"), "nowhere.toml"),
        (("--usd-per-hour", "-1"), "usd_per_hour"),
        (("--endpoint", "http://127.0.0.1:9"), "--model"),
        (("--endpoint", "http://127.0.0.1:9", "--model", "m"), "does not answer"),
        (("--endpoint", "http://me:pw@127.0.0.1:9", "--model", "m"), "credentials"),
        (("--engine-python", "/no/such/python"), "/no/such/python"),
        (("--port", "eighty"), "--port"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = bench("sweep", *arguments, "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing is written before the input is known to be good"


def test_a_busy_port_is_found_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = bench("sweep", "--port", port, "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and port in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
