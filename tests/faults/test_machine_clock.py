"""Somebody sets the clock while a cell is measured: the sweep ends in time, and the point says that it is none.

The machine's clock is left alone. CLOCK_REALTIME moves only for those who ask: for us through time.time_ns, for the
generator, which is started through a script, in its kernel's stamps and its timer too.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.job import SweepRequest
from harness.load import generators
from harness.records import RequestRecord
from tests.faults.hostile import SCENARIO, hostile, swept

HOUR_NS = 3_600_000_000_000
GENERATOR = """#!{python}
import runpy, sys, time
from pathlib import Path
from harness.load import alarm, client
marker, told = Path({marker!r}), time.time_ns
step_ns = lambda: {step_ns} if marker.exists() else 0
time.time_ns = lambda: told() + step_ns()
stamped, set_timer = client._kernel_ns, alarm.Alarm._set
client._kernel_ns = lambda stamp: None if (ns := stamped(stamp)) is None else ns + step_ns()
alarm.Alarm._set = lambda self, at_ns: set_timer(self, at_ns - step_ns())
sys.argv = sys.argv[2:]
runpy.run_module("harness.load.worker", run_name="__main__")
"""


@pytest.mark.parametrize("hours", [1, -1], ids=["ahead", "back"])
@pytest.mark.parametrize("rate", [None, 40.0], ids=["closed", "open"])
def test_a_clock_that_is_set_in_a_cell(
    rate: float | None, hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell of the step ends at once, is invalid (clock_step) and keeps its requests; the next is measured anew."""
    marker, script, out = tmp_path / "set", tmp_path / "generator", tmp_path / "run"
    step_ns = hours * HOUR_NS
    script.write_text(GENERATOR.format(python=sys.executable, marker=str(marker), step_ns=step_ns))
    script.chmod(0o755)
    told = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: told() + (step_ns if marker.exists() else 0))
    monkeypatch.setattr(generators.sys, "executable", str(script))
    seen: list[str] = []

    def on_record(record: RequestRecord) -> None:
        if record.phase == "measured":
            seen.append(record.cell)
        if len(seen) == 5:
            marker.touch()

    load = (2, 3) if rate is None else ()
    rates = () if rate is None else (rate, rate + 1)
    scenario = replace(SCENARIO, arrivals="closed" if rate is None else "poisson", warmup_s=0.1, min_window_s=0.5)
    with hostile() as server:
        request = SweepRequest(scenario, load, "truth", ("served",), out=out, endpoint=server.url, rates=rates)
        done = swept(out, request, on_record)
    assert done.code == 0, done.said
    stepped, after = done.rows
    assert stepped.verdict == "invalid" and "clock_step" in stepped.verdict_reasons
    assert stepped.clock_step_ms == pytest.approx(step_ns / 1e6, abs=1000)
    assert "clock_step" not in after.verdict_reasons and after.requests >= SCENARIO.requests
    assert sum(record.cell == seen[0] for record in done.records) >= 5
