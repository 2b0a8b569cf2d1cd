"""A sweep of twelve cells on one machine, then on a Ray cluster of three nodes of which one is killed; and its plan.

    python benchmarks/cluster.py truth --out DIR     scripted servers: what the cluster does, in eight minutes
    python benchmarks/cluster.py vllm --out DIR      real vLLM on the demo model, BF16 and AWQ, on an idle machine

Printed: every cell both ways, and what `--plan` said beside what ran. The three nodes are raylets on this machine,
each with one place for an engine; the killed one is ended by SIGKILL in the middle of a cell. A plan goes by a run in
the same surroundings before it, for three engines that share two cores are slower than one: so there is a first run of
each kind, and the run that loses its node is planned as if it would not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness import job, outlook
from harness.cluster import attached
from harness.engines import EngineInfo, endpoint
from harness.job import SweepRequest
from harness.load.workload import Dialect
from harness.processes import die_with_parent
from harness.records import Cell, RequestRecord, Scenario, SweepPoint, read_table
from harness.rundir import RunDirectory
from harness.sweep import OpenEngine, Plan, Rows, Service, Variant, run_sweep

SCENARIO = Scenario("acceptance", input_tokens=64, output_tokens=16, requests=40, min_window_s=5.0, max_window_s=60.0)
REQUEST = SweepRequest(SCENARIO, (1, 4, 8), precisions=("bf16", "awq"), repeats=2, kv_cache_gib=0.25)
STORE = 80 * 2**20
ROWS_BEFORE = 3
"""The node is killed when so many rows are there."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished run, and what it took."""

    name: str
    rows: list[SweepPoint]
    requests: list[RequestRecord]
    engine_hours: float
    """Starts, as the engines' descriptions have them, and cells, as their rows have them."""
    wall_s: float
    planned: outlook.Outlook


class Said:
    """An Observer that prints, and does something once when enough rows are there."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self._rows, self._then = 0, then

    def status(self, text: str) -> None: ...
    def request_ended(self, record: RequestRecord) -> None: ...
    def cell_begins(self, cell: Cell, number: int, total: int) -> None: ...

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def cell_ended(self, point: SweepPoint) -> None:
        self._rows += 1
        print(f"  {self._rows:>2} {key(point):<12} {point.node or 'here'}, attempt {point.attempt}", flush=True)
        if self._then is not None and self._rows == ROWS_BEFORE:
            time.sleep(2.0)  # into the next cells
            self._then()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("truth", "vllm"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run = partial(measure, args.engine, args.out)
    run("first alone", None)
    alone = run("alone", None)
    with three_nodes() as local:
        run("first on nodes", local.address)
        whole = run("undisturbed", local.address)

        def kill() -> None:
            print("  killing a node", flush=True)
            local.remove_node(next(iter(local.worker_nodes)), allow_graceful=False)

        cluster = run("killed", local.address, kill)
    show(alone, whole, cluster)


def measure(engine: str, out: Path, name: str, address: str | None, then: Callable[[], None] | None = None) -> Ran:
    """Plan the run by the one before it, measure it, and read it back."""
    request = replace(REQUEST, cluster=address, out=out / name / "run")
    before = {"alone": "first alone", "undisturbed": "first on nodes", "killed": "undisturbed"}.get(name, "nothing")
    print(name, flush=True)
    sessions = job.sessions_of(request)
    planned = outlook.outlook(request, sessions, outlook.earlier(out / before), {None: 3 if address else 1})
    began = time.monotonic()
    if engine == "vllm":
        job.sweep(request, Said(then))
    else:
        scripted(request, Said(then))
    wall_s = time.monotonic() - began
    path = out / name / "run"
    rows = read_table(path / "points.csv", SweepPoint)
    starts_s = sum(json.loads(file.read_text())["start_s"] for file in path.glob("engine-*.json"))
    busy_s = starts_s + sum(row.duration_s or 0.0 for row in rows)
    return Ran(name, rows, read_table(path / "requests.csv", RequestRecord), busy_s / 3600, wall_s, planned)


def scripted(request: SweepRequest, observer: Said) -> None:
    """The same sweep with scripted servers as engines."""
    assert request.out is not None
    template, plan = SweepPoint("run", "", 0, model="demo", scenario=SCENARIO.name), Plan(SCENARIO)
    sessions = job.sessions_of(request)
    with RunDirectory(request.out) as directory:
        job.describe(directory, request, "demo", "truth", [session.variant for session in sessions[:2]])
        if request.cluster is None:
            run_sweep(sessions, plan, directory, template, truth(directory, observer.status), observer)
            return
        with attached(request.cluster) as cluster:
            cluster.run_sweep(sessions, plan, directory, template, truth, observer)


def truth(rows: Rows, on_status: Callable[[str], None]) -> OpenEngine:
    @contextmanager
    def open_engine(variant: Variant, repeat: int) -> Iterator[Service]:
        log = rows.fresh(f"engine-{variant.precision}-r{repeat}", ".log")
        began = time.monotonic()
        command = [sys.executable, "-m", "harness.load.truth", "--ttft-ms", "30", "--gap-ms", "8"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent()) as process:
            try:
                assert process.stdout is not None
                port = process.stdout.readline().split()[1]
                with endpoint.attach(f"http://127.0.0.1:{port}", "truth") as engine:
                    rows.describe_engine(log, EngineInfo("truth", start_s=time.monotonic() - began))
                    yield Service(engine, Dialect(vocabulary=range(100, 1000)))
            finally:
                process.kill()

    return open_engine


@contextmanager
def three_nodes() -> Iterator[Any]:
    os.environ["RAY_worker_niceness"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
    local = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            local.add_node(num_cpus=1, object_store_memory=STORE)
        yield local
    finally:
        ray.shutdown()
        local.shutdown()


def key(row: SweepPoint) -> str:
    return Cell(row.precision, row.conc, row.repeat, row.rate_rps).key


def show(*runs: Ran) -> None:
    alone, whole, killed = ({key(row): row for row in ran.rows} for ran in runs)
    cells = Table("cell", "alone: requests", "verdict", "cluster: requests", "verdict", "node", "attempt")
    for name in sorted(alone | killed):
        row, other = alone.get(name), killed.get(name)
        cells.add_row(
            name,
            *((str(row.requests), row.verdict) if row else ("–", "–")),
            *((str(other.requests), other.verdict, str(other.node), str(other.attempt)) if other else ("–",) * 4),
        )
    plan = Table("run", "", "plan", "ran", "off by")
    for ran in runs:
        usd = ran.engine_hours * SCENARIO.usd_per_hour
        for what, planned, real in (
            ("engine-hours", ran.planned.gpu_hours.lo, ran.engine_hours),
            ("$", ran.planned.usd.lo, usd),
            ("wall s", ran.planned.wall_s.lo, ran.wall_s),
        ):
            plan.add_row(ran.name, what, f"{planned:.4g}", f"{real:.4g}", f"{planned / real - 1:+.0%}")
    console = Console(width=110)
    console.print(cells, plan)
    for ran in runs:
        ids = [record.request_id for record in ran.requests]
        print(f"{ran.name}: {len(ran.rows)} rows, {len({*map(key, ran.rows)})} cells, {len(ids)} requests, "
              f"{len(ids) - len({*ids})} twice; attempts {sorted({row.attempt for row in ran.rows})}")  # fmt: skip
    print("the same cells" if alone.keys() == whole.keys() == killed.keys() else "NOT THE SAME CELLS")


if __name__ == "__main__":
    main()
