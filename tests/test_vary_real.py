"""`--vary` on a real engine: vLLM's own counters say that each variant was served with its own limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from harness.engines.environment import EngineEnv
from harness.records import SweepPoint, read_table

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.timeout(1200)
def test_the_engine_never_runs_more_than_its_variant_allows(tmp_path: Path, engine_env: EngineEnv) -> None:
    """8 users, max_num_seqs 2 and 8: of the first at most 2 run and others wait; of the second up to 8 run and none has
    to wait. The peaks are polled from vLLM's /metrics (num_requests_running, num_requests_waiting)."""
    out = tmp_path / "results" / "varied"
    done = subprocess.run(
        [
            sys.executable, "-m", "harness", "sweep", "--precisions", "bf16", "--conc", "8", "--requests", "24",
            "--output-tokens", "48", "--vary", "max_num_seqs=2,8", "--engine-arg", "--block-size 64",
            "--out", str(out), "--engine-python", str(engine_env.python), "--kv-cache-gib", "0.5",
        ],
        capture_output=True, text=True, timeout=1100, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two, eight = read_table(out / "points.csv", SweepPoint)
    assert (two.precision, eight.precision) == ("bf16[max_num_seqs=2]", "bf16[max_num_seqs=8]")
    assert two.engine_args == "--block-size 64 --max-num-seqs 2"
    assert eight.engine_args == "--block-size 64 --max-num-seqs 8"
    assert two.running_peak is not None and two.waiting_peak is not None
    assert eight.running_peak is not None and eight.waiting_peak is not None
    assert two.running_peak <= 2 and two.waiting_peak >= 4, "the others of the 8 stand in the queue"
    assert 2 < eight.running_peak <= 8
    for point in (two, eight):
        assert point.requests >= 24 and point.errors == 0
        assert not {"length_mismatch", "cache_warm", "errors"} & set(point.verdict_reasons)
        said = json.loads((out / f"engine-{point.precision}-r1.json").read_text(encoding="utf-8"))["settings"]
        assert f"--max-num-seqs {said['--max-num-seqs']}" in (point.engine_args or "")
        assert said["--block-size"] == "64"
    run = tomllib.loads((out / "run.toml").read_text(encoding="utf-8"))["run"]
    assert run["vary"] == {"max_num_seqs": ["2", "8"]}
    assert run["precisions"] == ["bf16[max_num_seqs=2]", "bf16[max_num_seqs=8]"]
    page = (tmp_path / "reports" / "varied" / "capacity.md").read_text(encoding="utf-8")
    assert r"BF16\[seqs=2\]" in page and "--block-size 64 --max-num-seqs 8" in page
