"""The client's ceiling: its own errors by hand, a short ladder for real, and what sweeps make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness import __version__
from harness.load import selftest
from harness.load.selftest import Ceiling, own_errors_ms, read_ceiling, run_ladder
from harness.records import RequestRecord, SweepPoint, read_table
from harness.telemetry.host import host

Truth = Callable[..., str]


def here(**values: object) -> Ceiling:
    machine = host()
    return replace(Ceiling(16, 700.0, machine.cpu, machine.cores, __version__), **values)  # type: ignore[arg-type]


def test_own_errors_by_hand() -> None:
    """Sent 0.3 ms late; the first token was really sent 50 ms after the request came in, the second 20 ms later.

    ms on one clock: intended 0, received by the server 0.4, sent 50.4 and 70.4, stamped 50.5 and 70.3.
    TTFT 50.5 against 50.0: 0.5. Chunks: 0.1, and -0.1, which is the server's own stamp after its send: none.
    """
    record = RequestRecord(
        "truth-c1-r1", 0, 3, "measured", 0, sent_ns=300_000, first_token_ns=50_500_000, chunk_us=(50_500, 70_300)
    )  # fmt: skip
    told = {"truth-c1-r1-a1/0/3": {"received_ns": 400_000, "sent_ns": [50_400_000, 70_400_000]}}
    ttft_ms, chunks_ms = own_errors_ms([record, replace(record, sequence=4)], told)
    assert ttft_ms == pytest.approx([0.5]) and chunks_ms == pytest.approx([0.1, 0.0])


def test_a_short_ladder_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are measured against the log of the server; two bad ones end it, the last good one is the ceiling."""
    monkeypatch.setattr(selftest, "SCENARIO", replace(selftest.SCENARIO, output_tokens=4, requests=6, min_window_s=0.2))
    steps: list[selftest.Step] = []
    monkeypatch.setattr(selftest, "LARGEST_ERROR_MS", 1e9)
    ceiling = run_ladder(steps.append, (2, 4))
    assert [step.streams for step in steps] == [2, 4]
    assert all(0 <= step.ttft_error_p50_ms <= step.ttft_error_p99_ms and step.chunks_s > 0 for step in steps)
    assert ceiling is not None and ceiling.streams == 4 and ceiling.open_end, "the ladder ended before the client"
    monkeypatch.setattr(selftest, "LARGEST_ERROR_MS", 0.0)
    assert run_ladder(steps.append, (2, 4, 8)) is None
    assert len(steps) == 4, "two bad steps in a row are enough"


def test_a_ceiling_counts_only_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_ceiling() is None
    selftest.keep_ceiling(here())
    assert read_ceiling() == here()
    for other in (here(cpu="another"), here(cores=99), here(kneebench_version="0"), here(open_end=True)):
        selftest.keep_ceiling(other)
        assert read_ceiling() is None
    selftest.ceiling_path().write_text("{half")
    assert read_ceiling() is None


@pytest.mark.parametrize(("chunks_s", "bound"), [(1.0, True), (1e9, False)])
def test_a_point_beyond_the_ceiling_is_client_bound(truth: Truth, tmp_path: Path, chunks_s: float, bound: bool) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text("input_tokens = 8\noutput_tokens = 6\nrequests = 30\nmin_window_s = 0.3\n")
    (tmp_path / "kneebench").mkdir()
    (tmp_path / "kneebench" / "client-ceiling.json").write_text(json.dumps(asdict(here(chunks_s=chunks_s))))
    done = subprocess.run(
        [
            sys.executable, "-m", "harness", "sweep", "--endpoint", truth("--ttft-ms", "40", "--gap-ms", "10"),
            "--model", "truth", "--conc", "2", "--scenario", str(scenario), "--out", str(tmp_path / "run"),
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (point,) = read_table(tmp_path / "run" / "points.csv", SweepPoint)
    assert (point.chunks_s or 0) > 1
    if bound:
        assert "client_bound" in point.verdict_reasons and point.verdict == "invalid"
    else:
        assert "client_bound" not in point.verdict_reasons or (point.send_lag_p99_ms or 0) > 2


def test_the_command_line_names_the_ceiling_and_keeps_it(tmp_path: Path) -> None:
    """`bench selftest` with a ladder of two small steps; the real one takes two minutes."""
    program = (
        "import sys; from dataclasses import replace; from harness.load import selftest;"
        "selftest.SCENARIO = replace(selftest.SCENARIO, output_tokens=4, requests=6, min_window_s=0.2);"
        "selftest.LARGEST_ERROR_MS = 1e9; ladder = selftest.run_ladder;"
        "selftest.run_ladder = lambda show: ladder(show, (2, 4));"
        "sys.argv = ['bench', 'selftest']; from harness.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "client ceiling: at least 4 streams" in done.stdout
    kept = json.loads((tmp_path / "kneebench" / "client-ceiling.json").read_text())
    assert kept["streams"] == 4 and kept["open_end"]
