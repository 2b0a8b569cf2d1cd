"""The client's clock against the truth: TTFT 50 ms, 20 ms a token, 128 tokens; errors by the server's own log.

python benchmarks/clock.py [--streams 64,256,512,2000x2] [--seconds 10]      2000x2: 2,000 streams on two processes

TTFT error: what the record says minus (first send - receipt) by the server's log, for the same request. Gap error:
|gap between two chunks by the record - the same gap by the log|. CPU: generators and parent, from the start of the job
to its end, over all chunks received. In flight: share of the window in which exactly all streams were between send and
last byte, and the mean share of streams that were.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.analysis import metrics, validity
from harness.engines import Target
from harness.load import selftest
from harness.load.generators import Generators, LoadResult
from harness.load.workload import Dialect
from harness.records import Cell, Scenario, SweepPoint

SCENARIO = Scenario("clock", input_tokens=16, output_tokens=128, length_distribution="fixed", warmup_rounds=1)
HEADER = (
    "streams x processes | requests | tok/s | TTFT error p50, p99 ms | gap error p99 ms | miscounted | CPU us/token | "
    "all in flight, mean | send lag p50, p99 ms | server late p99 ms | verdict"
)


def measure(streams: int, processes: int, seconds: float) -> str:
    """One line of the table."""
    scenario = replace(SCENARIO, requests=3 * streams, min_window_s=seconds, max_window_s=max(60.0, 2 * seconds))
    cell = Cell("truth", streams)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        with selftest.truth_server(log) as url, Generators() as generators:
            parent = time.process_time()
            load = generators.run(
                cell, scenario, Dialect(vocabulary=range(100, 1000)), Target(url, "truth"), processes=processes
            )
            cpu_s = load.cpu_s + time.process_time() - parent
        told = selftest.read_log(log)
    good = metrics.completed(load.records)
    ttft_ms, gaps_ms, late_ms = [], [], []
    for record in good:
        truth = told[record.request_id]
        ttft_ms.append((metrics.ttft_ms(record) or 0.0) - (truth["sent_ns"][0] - truth["received_ns"]) / 1e6)
        gaps_ms.extend(np.abs(np.diff(record.chunk_us) / 1e3 - np.diff(truth["sent_ns"]) / 1e6))
        late_ms.extend((np.array(truth["sent_ns"]) - np.array(truth["due_ns"])) / 1e6)
    miscounted = sum(sum(record.chunk_tokens) != 128 or record.completion_tokens != 128 for record in good)
    chunks = sum(len(record.chunk_us) for record in load.records)
    found = metrics.summarise(load.records, load.open_ns, load.close_ns)
    point = SweepPoint(
        "", "truth", streams, **found, coalesced_share=validity.coalesced_share(load.records),
        loop_lag_p99_ms=metrics.percentile(load.lags_ms, 99),
    )  # fmt: skip
    verdict, reasons = validity.judge(load.records, point, validity.Conditions(gave_up=load.gave_up))
    lags = [((record.sent_ns or 0) - record.intended_ns) / 1e6 for record in good]
    exactly, mean = in_flight(load, streams)
    return (
        f"{streams} x {processes} | {len(good)} | {found['tok_s']:,.0f} | "
        f"{np.percentile(ttft_ms, 50):.2f}, {np.percentile(ttft_ms, 99):.2f} | {np.percentile(gaps_ms, 99):.2f} | "
        f"{miscounted} | {cpu_s / chunks * 1e6:.1f} | {exactly:.3f}, {mean:.4f} | "
        f"{np.percentile(lags, 50):.2f}, {np.percentile(lags, 99):.2f} | {np.percentile(late_ms, 99):.2f} | "
        f"{verdict} {' '.join(reasons)}"
    )


def in_flight(load: LoadResult, streams: int) -> tuple[float, float]:
    """(share of the window with exactly `streams` in flight, mean share of the streams that were)."""
    assert load.open_ns is not None and load.close_ns is not None
    ends = [(r.sent_ns, 1) for r in load.records if r.sent_ns] + [(r.end_ns, -1) for r in load.records if r.end_ns]
    exactly, area, level, before = 0, 0, 0, load.open_ns
    for at, change in sorted(ends):
        inside = min(max(at, load.open_ns), load.close_ns)
        exactly += (inside - before) * (level == streams)
        area += (inside - before) * level
        level, before = level + change, inside
    window = load.close_ns - load.open_ns
    return exactly / window, area / window / streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="64,256,512,2000x2")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    print(HEADER)
    for item in given.streams.split(","):
        streams, _, processes = item.partition("x")
        print(measure(int(streams), int(processes or 1), given.seconds), flush=True)


if __name__ == "__main__":
    main()
