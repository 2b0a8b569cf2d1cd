"""A distilled checkpoint on a real engine: `bench sweep --precisions bf16,gptq,qad=...`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.engines.environment import EngineEnv
from harness.records import SweepPoint, read_table

pytestmark = [pytest.mark.engine, pytest.mark.slow]
DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"


@pytest.mark.timeout(900)
def test_qad_is_served_beside_bf16_and_gptq(tmp_path: Path, engine_env: EngineEnv) -> None:
    """Symmetric 4 bits in the GPTQ layout, of which vLLM runs its INT4 kernel, trained for a few steps only."""
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    trained = tmp_path / "trained"
    options = ["--method", "qad", "--bits", "4", "--sym", "--steps", "3", "--batch", "512", "--length", "64"]
    subprocess.run(
        [sys.executable, "-m", "quantize", str(DEMO), *options, "--corpus", str(DEMO / "calibration.jsonl"),
         "--out", str(trained)],
        check=True, env=environment, timeout=400, capture_output=True,
    )  # fmt: skip
    assert json.loads((trained / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    out = tmp_path / "results" / "real"
    done = subprocess.run(
        [
            sys.executable, "-m", "harness", "sweep", "--precisions", f"bf16,gptq,qad={trained}", "--conc", "2",
            "--requests", "20", "--output-tokens", "8", "--out", str(out), "--engine-python", str(engine_env.python),
            "--kv-cache-gib", "0.5",
        ],
        capture_output=True, text=True, timeout=800, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    points = read_table(out / "points.csv", SweepPoint)
    assert [p.precision for p in points] == ["bf16", "gptq", "qad"]
    assert all(p.errors == 0 and p.requests >= 20 and p.tok_s for p in points)
    assert len({p.checkpoint_sha256 for p in points}) == 3
    if points[0].memory_kind == "host":
        assert points[1].kernel == points[2].kernel == "CPUWNA16LinearKernel"
