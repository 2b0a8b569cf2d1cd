"""A sweep on a real Ray cluster of three nodes on this machine; the engines are scripted servers.

Nodes of one CPU each: one engine a node. The nodes are raylets of their own, and killing one is killing its raylet.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import __version__, job
from harness import cluster as clusters
from harness.cluster import Cluster, attached
from harness.engines.environment import EngineEnv
from harness.errors import InputError, RunError
from harness.likeness import Facts, check_alike, digest
from harness.outpost import share
from harness.placing import Demand, Node, demand, load_places, priced, width
from harness.prices import load_prices
from harness.records import Cell, Environment, RequestRecord, Scenario, SweepPoint, read_table
from harness.rundir import RunDirectory
from harness.search import Search
from harness.slo import Slo
from harness.sweep import Opener, Plan, Session, Variant, on_cards, plan_sessions, run_sweep

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
from tests import nodes as helpers  # noqa: E402

SHORT = Scenario("test", input_tokens=20, output_tokens=6, requests=20, min_window_s=0.1)
TEMPLATE = SweepPoint("run", "", 0, model="truth", scenario="test")
STORE = 80 * 2**20
"""Bytes of a node's object store; Ray takes no less."""


# --- where an engine fits ---------------------------------------------------------------------------------------------

CPU2 = [Node("a", {"CPU": 4.0}), Node("b", {"CPU": 4.0, "card:big": 1.0}), Node("c", {"memory": 9.0})]
GPUS = [
    Node("head", {"CPU": 16.0}),
    Node("l4", {"CPU": 16.0, "GPU": 4.0, "accelerator_type:L4": 1.0}),
    Node("a4000", {"CPU": 3.0, "GPU": 4.0, "accelerator_type:RTX": 1.0, "card:rtx-a4000": 1.0}),
]


def test_without_gpus_an_engine_takes_a_whole_node() -> None:
    assert demand(CPU2) == Demand(4.0)
    assert width(CPU2, demand(CPU2)) == 2
    assert demand(CPU2, 1, "BIG") == Demand(4.0, 0, "card:big")
    assert width(CPU2, demand(CPU2, 1, "big")) == 1


def test_on_gpus_it_takes_as_many_as_it_runs_on_and_a_core() -> None:
    """4 GPUs and 16 cores hold 4 engines of one GPU, 2 of two; 4 GPUs and 3 cores only 3 of one GPU."""
    assert demand(GPUS) == Demand(1, 1)
    assert width(GPUS, demand(GPUS)) == 4 + 3
    assert width(GPUS, demand(GPUS, 2)) == 2 + 2
    assert width(GPUS, demand(GPUS, 1, "L4")) == 4
    assert width(GPUS, demand(GPUS, 1, "RTX A4000")) == 3
    assert demand(GPUS, 4, "l4").options() == {
        "num_cpus": 1, "num_gpus": 4, "resources": {"accelerator_type:L4": 0.001},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "cards", "card", "said"),
    [
        (GPUS, 8, None, "Allowed: 4 at most, on one node"),
        (GPUS, 1, "h100", "Allowed: L4, RTX, rtx-a4000"),
        (CPU2, 1, "l4", "Allowed: big"),
        ([], 1, "l4", "no node of this cluster names a card"),
        ([*CPU2, Node("d", {"CPU": 8.0})], 1, None, "nodes of 4, 8 CPUs"),
        ([Node("c", {"memory": 9.0})], 1, None, "no CPU either"),
    ],
)
def test_what_no_node_holds_is_refused(nodes: list[Node], cards: int, card: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        demand(nodes, cards, card)


def test_engines_are_driven_as_far_as_nodes_for_load_go() -> None:
    """Places for 4 + 3 generators: three engines with two each, and one is left over."""
    nodes = [Node("a", {"load": 4.0}), Node("b", {"load": 3.0, "CPU": 1.0}), *CPU2]
    assert [load_places(nodes, away) for away in (1, 2, 3, 7)] == [7, 3, 2, 1]
    with pytest.raises(InputError, match="with 8 generators for an engine, and nodes for 7"):
        load_places(nodes, 8)


def test_several_cards_become_part_of_a_variants_name() -> None:
    two = [Variant("bf16"), Variant("awq[max_num_seqs=64]")]
    assert [(one.precision, one.card_type) for one in on_cards(two, ("l4",))] == [
        ("bf16", "l4"), ("awq[max_num_seqs=64]", "l4"),
    ]  # fmt: skip
    assert [(one.precision, one.card_type) for one in on_cards(two, ("l4", "a4000"))] == [
        ("bf16[card=l4]", "l4"), ("awq[card=l4,max_num_seqs=64]", "l4"),
        ("bf16[card=a4000]", "a4000"), ("awq[card=a4000,max_num_seqs=64]", "a4000"),
    ]  # fmt: skip
    assert on_cards(two, ()) == two


def test_a_card_has_the_rent_of_the_catalogue() -> None:
    assert priced(SHORT, "no-such-card") == SHORT == priced(SHORT, None)
    rent = min(r.usd_per_hour for r in load_prices().rent_of("l4") if r.kind == "on-demand")
    assert priced(SHORT, "L4") == replace(SHORT, usd_per_hour=rent)


def facts(**changed: Any) -> Facts:
    machine = Environment("1", None, None, "3.11", "Linux", "EPYC", 2, 8.0, None, None, None, None, None, (), "")
    engine = EngineEnv(Path("python"), "cpu", changed.pop("vllm", "0.32.0"))
    return Facts(changed.pop("kneebench", __version__), replace(machine, **changed), engine)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kneebench": "0.0.1"}, "have kneebench 0.0.1 and"),
        ({"vllm": "0.31.0"}, "have vLLM 0.31.0 and 0.32.0"),
        ({"cpu_cores": 4}, "EPYC with 2 cores, EPYC with 4 cores"),
        ({"gpu": "NVIDIA L4"}, "not alike"),
    ],
)
def test_nodes_that_differ_are_refused(changed: dict[str, Any], said: str) -> None:
    check_alike([facts(), facts(), facts()], None)
    check_alike([facts(gpu="NVIDIA A100"), facts(gpu="NVIDIA L4"), facts(gpu="NVIDIA L4")], "l4")
    with pytest.raises(InputError, match=said):
        check_alike([facts(), facts(), facts(**changed)], None)


@pytest.mark.parametrize(
    ("address", "said"), [("ray://127.0.0.1:1", "Ray client"), ("127.0.0.1:1", "no Ray cluster answers there")]
)
def test_an_address_where_no_cluster_is(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said), attached(address):
        pass


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"port": 8000}, "--port 8000 with --cluster"), ({"endpoint": "http://127.0.0.1:1"}, "add --load away")],
)
def test_what_does_not_go_with_a_cluster(changed: dict[str, Any], said: str) -> None:
    request = replace(job.SweepRequest(SHORT, (1,), precisions=("bf16",), cluster="auto"), **changed)
    with pytest.raises(InputError, match=said):
        job.sweep(request, Watcher())


def test_generators_away_are_as_many_as_users_need_or_as_was_said() -> None:
    """One for each 512 users of the largest cell; 0: the load is made beside the engine."""
    request = job.SweepRequest(SHORT, (1, 1025), cluster="auto")
    assert job.generators_away(request) == 0
    assert job.generators_away(replace(request, load="away")) == 3
    assert job.generators_away(replace(request, load="away", client_processes=2)) == 2
    assert job.generators_away(replace(request, load="away", concurrencies=(), rates=(2.0,))) == 1


# --- a sweep on three nodes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three() -> Iterator[Any]:
    """A Ray cluster; its first node has another card than the others. Its processes ignore SIGINT, as those do that a
    shell has started in the background."""
    from ray.cluster_utils import Cluster as Local

    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("RAY_worker_niceness", "0")
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE, "_system_config": soon}
    local = Local(initialize_head=True, head_node_args={**head, "resources": {"card:alpha": 1}})
    try:
        for _ in range(2):
            local.add_node(num_cpus=1, object_store_memory=STORE, resources={"card:beta": 1, "load": 1})
        signal.signal(signal.SIGINT, heard)
        yield local
    finally:
        signal.signal(signal.SIGINT, heard)
        with suppress(Exception):
            ray.shutdown()
        local.shutdown()


@pytest.fixture
def connected(three: Any) -> Iterator[Cluster]:
    with attached(three.address) as cluster:
        yield cluster


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """Where servers leave their process ids; whatever is left of them is ended by its own id."""
    folder = tmp_path / "notes"
    folder.mkdir()
    yield folder
    for pid in running(folder):
        os.kill(pid, signal.SIGKILL)


def running(notes: Path) -> list[int]:
    """Servers that still run, and are none that happens to have an old one's id."""
    found = []
    for note in notes.glob("[0-9]*"):
        with suppress(psutil.Error):
            process = psutil.Process(int(note.stem))
            if "harness.load.truth" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


class Watcher:
    """An Observer that does something when a row comes."""

    def __init__(self, on_row: Callable[[SweepPoint], None] = lambda point: None) -> None:
        self.said: list[str] = []
        self.rows: list[SweepPoint] = []
        self.cell_ended_does = on_row

    def status(self, text: str) -> None:
        self.said.append(text)

    note = status

    def cell_begins(self, cell: Cell, number: int, total: int) -> None:
        self.said.append(f"{number}/{total}")

    def request_ended(self, record: RequestRecord) -> None: ...

    def cell_ended(self, point: SweepPoint) -> None:
        self.rows.append(point)
        self.cell_ended_does(point)


def sessions_of(*precisions: str, repeats: int = 2) -> list[Session]:
    return plan_sessions([Variant(name) for name in precisions], [1, 2, 4], repeats)


def begun(path: Path, resume: bool = False) -> RunDirectory:
    directory = RunDirectory(path, resume=resume)
    directory.remember({})
    return directory


def rows_of(path: Path) -> list[SweepPoint]:
    return read_table(path / "points.csv", SweepPoint)


def key(row: SweepPoint) -> str:
    return Cell(row.precision, row.conc, row.repeat, row.rate_rps).key


def check_requests(path: Path) -> None:
    """The attempt that a row names has all of its requests in requests.csv, and no request is there twice."""
    records = read_table(path / "requests.csv", RequestRecord)
    assert max(Counter(record.request_id for record in records).values()) == 1
    for row in rows_of(path):
        measured = Counter(
            record.attempt
            for record in records
            if record.cell == key(row) and record.phase == "measured" and record.error is None
        )
        assert measured[row.attempt] == row.requests >= SHORT.requests
        assert max(measured) == row.attempt, "what an earlier one left is kept, and none came after it"


def test_a_node_that_is_killed_costs_one_cell_and_nothing_is_there_twice(
    three: Any, connected: Cluster, notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opener: Opener = partial(helpers.truth_on, notes)
    victim: list[tuple[SweepPoint, str | None]] = []

    def kill_its_node(point: SweepPoint) -> None:
        """After the first row of a session that is not on the head, so in the middle of one of its next cells."""
        on = {note.read_text().split()[2] for note in notes.glob("*[0-9d]") if is_of(note, point)}
        node = next((node for node in three.worker_nodes if {node.node_id} == on), None)
        if node is not None and not victim and point.conc == 1:
            time.sleep(0.2)
            victim.append((point, point.node))
            three.remove_node(node, allow_graceful=False)

    watcher, sessions = Watcher(kill_its_node), sessions_of("bf16", "awq")
    with begun(tmp_path / "run") as directory:
        plan = Plan(replace(SHORT, min_window_s=1.0))
        points = connected.run_sweep(sessions, plan, directory, TEMPLATE, opener, watcher)

    ((first, where),) = victim
    rows = rows_of(tmp_path / "run")
    assert rows == points == watcher.rows
    assert sorted(map(key, rows)) == sorted(cell.key for session in sessions for cell in session.cells)
    (again,) = [row for row in rows if row.attempt != 1]
    assert (again.precision, again.repeat, again.attempt) == (first.precision, first.repeat, 2)
    assert again.conc > first.conc and again.node != where
    assert {row.node for row in rows} == {"node-1", "node-2", "node-3"}
    logs = [path.read_text() for path in (tmp_path / "run").glob(f"engine-{first.precision}-r{first.repeat}*.log")]
    assert logs == [f"{first.precision} started\n"] * 2, "that of the lost node came with its row"
    assert [said for said in watcher.said if "its node was lost" in said]
    assert "raylet" not in "".join(capfd.readouterr()), "Ray's own words of it are for Ray's logs"
    check_requests(tmp_path / "run")
    assert "12/12" in watcher.said and not running(notes)
    assert not (notes / "shared").exists(), "two engines were on one node"

    with begun(tmp_path / "alone") as directory:
        run_sweep(sessions, Plan(SHORT), directory, TEMPLATE, opener(directory, print), Watcher())
    alone = rows_of(tmp_path / "alone")
    assert sorted(map(key, alone)) == sorted(map(key, rows))
    assert header(tmp_path / "alone") == header(tmp_path / "run")


def is_of(note: Path, point: SweepPoint) -> bool:
    return note.read_text().split()[:2] == [point.precision, str(point.repeat)]


def header(path: Path) -> list[str]:
    return [(path / name).read_text().splitlines()[0] for name in ("points.csv", "requests.csv")]


def test_ctrl_c_keeps_rows_ends_every_engine_and_a_resume_finishes(
    connected: Cluster, notes: Path, tmp_path: Path
) -> None:
    opener: Opener = partial(helpers.truth_on, notes)
    sessions = sessions_of("bf16", "awq", repeats=1)

    def interrupt(point: SweepPoint) -> None:
        if len(watcher.rows) == 1:
            time.sleep(0.3)  # so that the next cells are under way
            raise KeyboardInterrupt

    watcher = Watcher(interrupt)
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "run") as directory:
        plan = Plan(replace(SHORT, min_window_s=2.0))
        connected.run_sweep(sessions, plan, directory, TEMPLATE, opener, watcher)
    assert not running(notes)
    kept = rows_of(tmp_path / "run")
    assert kept == watcher.rows and len(kept) < 6, "what came while the engines were stopped counts too"
    assert (tmp_path / "run" / f"engine-{kept[0].precision}-r1.log").read_text() == f"{kept[0].precision} started\n"

    tried = Counter(record.cell for record in read_table(tmp_path / "run" / "requests.csv", RequestRecord))
    with begun(tmp_path / "run", resume=True) as directory:
        connected.run_sweep(sessions, Plan(SHORT), directory, TEMPLATE, opener, Watcher())
    rows = rows_of(tmp_path / "run")
    assert rows[: len(kept)] == kept and len(rows) == 6
    assert [row.attempt for row in rows[len(kept) :]] == [1 + (key(row) in tried) for row in rows[len(kept) :]]
    check_requests(tmp_path / "run")
    assert not running(notes)


def test_sessions_that_fail_or_die_do_not_end_the_others(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    """An engine that does not start is not tried elsewhere; a process that dies is, until it has died three times."""
    sessions, watcher = sessions_of("fails", "kills", "bf16", repeats=1), Watcher()
    with pytest.raises(RunError) as failure, begun(tmp_path / "run") as directory:
        connected.run_sweep(sessions, Plan(SHORT), directory, TEMPLATE, partial(helpers.truth_on, notes), watcher)
    assert "fails r1: the engine did not start; its log, <run>/engine-fails-r1.log" in str(failure.value)
    assert "kills r1: its process died, 3 times" in str(failure.value)
    assert "3 of 9 cells have rows" in str(failure.value)
    assert {row.precision for row in rows_of(tmp_path / "run")} == {"bf16"}
    assert (tmp_path / "run" / "engine-fails-r1.log").read_text() == "fails started\n"
    assert len([said for said in watcher.said if "begun again" in said]) == clusters.LOSSES - 1


def test_each_card_type_is_measured_on_its_own_nodes(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    sessions, opener = (
        plan_sessions(on_cards([Variant("bf16")], ("beta", "alpha")), [2]),
        partial(helpers.truth_on, notes),
    )
    with begun(tmp_path / "run") as directory:
        connected.run_sweep(sessions, Plan(SHORT), directory, TEMPLATE, opener, Watcher(), price_by_card=True)
    assert {row.precision for row in rows_of(tmp_path / "run")} == {"bf16[card=alpha]", "bf16[card=beta]"}
    cards = {node.id: next(name for name in node.resources if name.startswith("card:")) for node in connected.nodes()}
    for note in notes.glob("*[0-9d]"):
        precision, _, node = note.read_text().split()
        assert precision == f"bf16[{cards[node].replace(':', '=')}]"


def test_a_search_runs_on_nodes_within_its_share_of_the_budget(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    """7 cells and an hour for three precisions: 3 cells and 20 minutes each; of two cells for one, none is a third."""
    assert share(Search(Slo(1.0), max_cells=7, max_minutes=60), 3) == Search(Slo(1.0), max_cells=3, max_minutes=20)
    plan, opener = Plan(SHORT, search=Search(Slo(p95_s=60.0), max_cells=2)), partial(helpers.truth_on, notes)
    with begun(tmp_path / "run") as directory:
        connected.run_sweep([Session(Variant("bf16"), 1)], plan, directory, TEMPLATE, opener, Watcher())
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and rows[0].conc == 1


def test_load_comes_from_other_nodes(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    """Each engine is driven by a generator on another node, whose clock is told; the rows are like any."""
    sessions = plan_sessions([Variant("bf16")], [2], 1)
    with begun(tmp_path / "run") as directory:
        connected.run_sweep(
            sessions, Plan(SHORT), directory, TEMPLATE, partial(helpers.truth_on, notes), Watcher(), away=1
        )
    (row,) = rows_of(tmp_path / "run")
    assert row.clock_offset_ms is not None and row.clock_offset_error_ms is not None
    assert row.client_processes == 1
    check_requests(tmp_path / "run")
    with pytest.raises(InputError, match="with 3 generators for an engine, and nodes for"):
        connected.run_sweep(
            sessions, Plan(SHORT), directory, TEMPLATE, partial(helpers.truth_on, notes), Watcher(), away=3
        )


def test_an_endpoint_is_driven_from_other_nodes(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    sessions, opener = plan_sessions([Variant("bf16")], [2], 1), partial(helpers.truth_on, notes)
    with begun(tmp_path / "run") as directory:
        open_engine = opener(directory, print)
        run_sweep(sessions, Plan(SHORT), directory, TEMPLATE, open_engine, Watcher(), hired=connected.hired(1))
    (row,) = rows_of(tmp_path / "run")
    assert row.clock_offset_ms is not None


def test_what_comes_from_an_errand_that_was_given_up_is_not_written(
    connected: Cluster, notes: Path, tmp_path: Path
) -> None:
    with begun(tmp_path / "run") as directory:
        sessions, plan = sessions_of("bf16"), Plan(SHORT)
        owner = clusters._Owner(
            connected, sessions, plan, directory, TEMPLATE, partial(helpers.truth_on, notes), Watcher(), False, 0, 9
        )
        owner._mail.put.remote(clusters.Parcel(1, "there", (SweepPoint("run", "bf16", 1),)))
        owner._take()
        assert owner.points == [] and not (tmp_path / "run" / "points.csv").exists()


def test_a_ctrl_c_while_parcels_are_written_loses_none_of_them(connected: Cluster, notes: Path, tmp_path: Path) -> None:
    def interrupt(point: SweepPoint) -> None:
        if len(watcher.rows) == 2:
            raise KeyboardInterrupt

    watcher = Watcher(interrupt)
    with begun(tmp_path / "run") as directory:
        opener = partial(helpers.truth_on, notes)
        sessions, plan = sessions_of("bf16", repeats=1), Plan(SHORT)
        owner = clusters._Owner(connected, sessions, plan, directory, TEMPLATE, opener, watcher, False, 0, 9)
        owner._out[1] = None, 0
        rows = [SweepPoint("run", "bf16", conc) for conc in (1, 2, 4, 8)]
        for some in (rows[:3], rows[3:]):
            ray.get(owner._mail.put.remote(clusters.Parcel(1, "there", tuple(some))))
        ray.get(owner._mail.take.remote(0))  # an answer that never arrived
        with pytest.raises(KeyboardInterrupt):
            owner._take()
        owner._take()
    assert [row.conc for row in owner.points] == [row.conc for row in rows_of(tmp_path / "run")] == [1, 2, 4, 8]


@pytest.mark.parametrize("once", ["it is sent", "its engine runs"])
def test_when_no_node_is_left_the_sweep_says_so(
    once: str, connected: Cluster, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes are there when the session is sent, and gone when Ray is asked again: while the process that Ray starts
    for it cannot be told to stop yet, or later."""
    monkeypatch.setattr(clusters, "PATIENCE_S", 0.5)
    forced = []
    cancel = connected._ray.cancel
    monkeypatch.setattr(connected._ray, "cancel", lambda task, force: forced.append(force) or cancel(task, force=force))
    there = connected.nodes()
    first = iter([True])
    is_there = (lambda: next(first, False)) if once == "it is sent" else (lambda: not running(notes))
    monkeypatch.setattr(connected, "nodes", lambda: there if is_there() else [])
    sessions = [Session(Variant("bf16"), 1, (Cell("bf16", 1),))]
    slow = replace(SHORT, requests=4000)
    with pytest.raises(RunError, match="no node of the cluster is left"), begun(tmp_path / "run") as directory:
        connected.run_sweep(sessions, Plan(slow), directory, TEMPLATE, partial(helpers.truth_on, notes), Watcher())
    assert not running(notes)
    assert forced == [False], "it ended by itself"


def test_a_cluster_that_is_gone_is_a_failed_run_whose_rows_stay(
    connected: Cluster, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(owner: Any) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(clusters._Owner, "_take", gone)
    with pytest.raises(RunError, match="the Ray cluster, .* is gone"), begun(tmp_path / "run") as directory:
        opener = partial(helpers.truth_on, notes)
        connected.run_sweep(sessions_of("fails"), Plan(SHORT), directory, TEMPLATE, opener, Watcher())


def test_nodes_look_for_what_they_have_to_share(connected: Cluster, tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.csv"
    dataset.write_text("a,b\n")
    connected.check_files([Variant("bf16")], {dataset: digest(dataset), tmp_path: None})
    for file, expected in ((dataset, "0" * 64), (tmp_path / "awq", None)):
        with pytest.raises(InputError, match=f"does not see {file.name}"):
            connected.check_files([Variant("bf16")], {file: expected})


def test_nodes_without_an_engine_are_refused_before_anything_is_started(connected: Cluster, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot take an engine"):
        connected.survey([Variant("bf16")], tmp_path / "no-python")
