"""The same plan on Ray: sessions on many nodes at once, one owner of the run directory.

    owner (this process)                         nodes
    sessions ──► Errand ──► task, where there ─► outpost.run: engine and load
       ▲                    is room for it            │
       └── its node was lost: again, elsewhere        │ requests, rows, logs
    RunDirectory ◄── accept ◄── mailbox (here) ◄──────┘

One session (one engine) is one Ray task, and Ray places it: on a node with free GPUs, as many as the engine runs on;
where the cluster has none, on a node that is free altogether, so that two engines never share a processor. `--card`
chooses among nodes by Ray's own accelerator_type:X or by a resource card:X that the team gives them.

A cell is done when its row is in the run directory, here as on one machine. What a lost node was measuring is begun
again elsewhere, with the next attempt; what it had finished stays. Parcels carry the number of their errand, and one
that was given up is not listened to any more: a node that was only cut off for a while writes nothing twice.

The nodes see the same files (models, checkpoints, datasets) under the same paths: that is checked before anything is
started. Ray is for networks that are trusted; SECURITY.md says what that means.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import outpost
from harness.engines import LOOPBACK
from harness.engines.environment import EngineEnv
from harness.errors import InputError, MissingTool, RunError
from harness.likeness import Facts, check_alike, lacking, look
from harness.load.away import DOOR_VARIABLE, listen
from harness.load.generators import Generators
from harness.outpost import Ended, Errand, File, Item, Said
from harness.placing import LOAD, Demand, Node, demand, load_places, priced, width
from harness.records import Cell, Environment, GpuSample, RequestRecord, SweepPoint
from harness.redact import redact, without_keys
from harness.rundir import RunDirectory, write
from harness.sweep import Observer, Opener, Plan, Session, Variant, incomplete

ADMIT_S = 60.0
"""How long a generator on another node is waited for."""
LOSSES = 3
"""How often a session is lost with its node, or killed on it, before it is left to a resume."""
PATIENCE_S = 60.0
"""How long sessions wait when no node that is left could ever take them: one may come back."""
STOP_S = 45.0
"""How long engines get to end when a sweep is stopped; then their processes are ended."""
FORCED_S = 5.0
"""And how long their end is waited for."""
SURVEY_S = 600.0
"""Longest look at the nodes: each reads its checkpoints through, to compare their digests."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that we start: parcels are small."""
CONNECT_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a node sends: items in their order, by the number of its errand and Ray's name for the node."""

    errand: int
    node: str
    items: tuple[Item, ...]


class _Mailbox:
    """An actor on the owner's own node: what has arrived in it outlives the node that sent it."""

    def __init__(self) -> None:
        self._parcels: list[Parcel] = []
        self._forgotten = 0
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def is_open(self) -> bool:
        return not self._closed

    def put(self, parcel: Parcel) -> None:
        self._parcels.append(parcel)

    def take(self, seen: int) -> list[Parcel]:
        """What came after the first `seen` parcels, which are forgotten: an answer that a Ctrl-C tore comes again."""
        del self._parcels[: seen - self._forgotten]
        self._forgotten = seen
        return self._parcels


class Cluster:
    """A Ray cluster that this process is connected to. Use `attached`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def nodes(self) -> list[Node]:
        return [Node(node["NodeID"], node["Resources"]) for node in self._ray.nodes() if node["Alive"]]

    def survey(
        self, asked: Sequence[Variant], engine_python: Path | None = None, argv: Sequence[str] = ()
    ) -> tuple[EngineEnv, Environment]:
        """What the nodes that these variants may be placed on have in common, as the first of them tells it.

        Raises InputError for a node that lacks something, and for nodes that are not alike where one variant may be
        measured on either.
        """
        first: Facts | None = None
        for card_type, cards in dict.fromkeys((variant.card_type, variant.cards) for variant in asked):
            found = self._each(look, demand(self.nodes(), cards, card_type), engine_python, tuple(argv))
            first = first or found[0]
            check_alike([first, *found], card_type)
        assert first is not None
        return first.engine, first.environment

    def check_files(self, asked: Sequence[Variant], files: Mapping[Path, str | None]) -> None:
        """Have the nodes look for models, checkpoints and datasets. Raises InputError naming what they do not see."""
        for card_type, cards in dict.fromkeys((variant.card_type, variant.cards) for variant in asked):
            for missing in self._each(lacking, demand(self.nodes(), cards, card_type), dict(files)):
                if missing:
                    raise InputError(
                        f"a node of the cluster does not see {', '.join(missing)} as they are here",
                        allowed="a file system that all nodes share, under the same paths",
                        remedy="put models there, and the cache too: XDG_CACHE_HOME (docs/cluster.md)",
                    )

    @contextmanager
    def hired(self, away: int) -> Iterator[Generators]:
        """Load generators on other nodes than this one, for an endpoint."""
        load_places(self.nodes(), away)
        with _hired(away) as generators:
            yield generators

    def _each(self, finds: Any, wanted: Demand, *arguments: Any) -> list[Any]:
        """What `finds(*arguments)` finds on each node that could hold an engine, however busy it is."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        task = self._ray.remote(num_cpus=0, max_retries=0)(finds)
        asked = [
            task.options(scheduling_strategy=strategy(node.id, soft=False)).remote(*arguments)
            for node in self.nodes()
            if wanted.fits(node)
        ]
        try:
            answers: list[Any] = self._ray.get(asked, timeout=SURVEY_S)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, InputError):
                raise InputError(f"a node of the cluster cannot take an engine: {cause}") from error
            raise RunError(
                f"a node of the cluster could not be looked at: {_words(error)}",
                remedy="see that this version of kneebench is installed on every node, for the Python that runs Ray",
            ) from error
        return answers

    def run_sweep(
        self,
        sessions: Sequence[Session],
        plan: Plan,
        directory: RunDirectory,
        template: SweepPoint,
        opener: Opener,
        observer: Observer,
        *,
        price_by_card: bool = False,
        away: int = 0,
    ) -> list[SweepPoint]:
        """sweep.run_sweep on this cluster: the same rows of the same cells, in the order in which they end.

        `away`: generators on other nodes for each engine. Raises InputError where no node is for load.
        """
        if plan.search is not None:
            plan = replace(plan, search=outpost.share(plan.search, len(sessions)))
        at_once = load_places(self.nodes(), away) if away else len(sessions)
        owner = _Owner(self, sessions, plan, directory, template, opener, observer, price_by_card, away, at_once)
        try:
            owner.run()
        except self._ray.exceptions.RayError as error:
            raise RunError(
                "the Ray cluster, or this machine's node of it, is gone; every finished row is on disk",
                remedy="start Ray again, then: bench sweep --resume with the run's directory",
            ) from error
        except BaseException:
            with suppress(self._ray.exceptions.RayError):
                owner.stop()
            raise
        return owner.points


class _Owner:
    """One run: its directory, and the errands that are out."""

    def __init__(
        self,
        cluster: Cluster,
        sessions: Sequence[Session],
        plan: Plan,
        directory: RunDirectory,
        template: SweepPoint,
        opener: Opener,
        observer: Observer,
        price_by_card: bool,
        away: int,
        at_once: int,
    ) -> None:
        self.points: list[SweepPoint] = []
        self._cluster, self._ray = cluster, cluster._ray
        self._sessions, self._plan, self._directory, self._template = sessions, plan, directory, template
        self._opener, self._observer, self._price_by_card = opener, observer, price_by_card
        self._away, self._at_once = away, at_once
        nodes = cluster.nodes()
        self._demands = [demand(nodes, one.variant.cards, one.variant.card_type) for one in sessions]
        self._total = sum(len(session.cells) for session in sessions)
        self._begun = directory.attempts()
        self._losses = [0] * len(sessions)
        self._failures: list[str] = []
        self._out: dict[int, tuple[Any, int]] = {}
        """Errands that are out: number -> task, index of its session."""
        self._names: dict[tuple[int, str], str] = {}
        """(errand, stem that the node gave an engine's files) -> stem here."""
        known = [int(row.node.removeprefix("node-")) for row in directory.done if row.node]
        self._first_node, self._nodes = max(known, default=0) + 1, list[str]()
        self._task = self._ray.remote(max_retries=0, max_calls=1)(_measure)
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self._ray.get_runtime_context().get_node_id(), soft=False
        )
        self._mail = self._ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=here).remote()
        self._arrived: deque[tuple[Parcel, Item]] = deque()
        self._seen = 0
        """Parcels that were taken out of the mailbox."""
        self._waiting: deque[int] = deque()
        self._number = 0
        self._stuck_s: float | None = None

    def run(self) -> None:
        """Send every session that has cells left, and take what comes, until each has ended."""
        self._waiting.extend(index for index in range(len(self._sessions)) if self._left(index))
        while self._waiting or self._out:
            while self._waiting and len(self._out) < self._at_once:
                self._send(self._waiting.popleft())
            self._take()
            tasks = {task: number for number, (task, _) in self._out.items()}
            ended, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
            if ended:
                self._take()  # what a task sent was here before its end was
            for task in ended:
                self._close(tasks[task])
            self._check_hope()
            time.sleep(_POLL_S)
        if self._failures:
            rows = len(self._directory.done) + len(self.points)
            planned = None if self._plan.search else self._total
            raise incomplete(self._failures, rows, planned, self._directory.path)

    def stop(self) -> None:
        """End what is out: first as Ctrl-C does, so that engines stop and logs arrive; a second Ctrl-C ends it all.

        One whose process is only starting may not hear the first: it finds the mailbox closed, and does nothing.
        """
        deadline = time.monotonic() + STOP_S
        tasks = [task for task, _ in self._out.values()]
        try:
            self._ray.get(self._mail.close.remote())
            for task in tasks:
                self._ray.cancel(task, force=False)
            while tasks and time.monotonic() < deadline:
                self._take()
                _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=_POLL_S)
            self._take()
        finally:
            for task in tasks:
                self._ray.cancel(task, force=True)
            if tasks:
                self._ray.wait(tasks, num_returns=len(tasks), timeout=FORCED_S)

    def _left(self, index: int) -> bool:
        """Whether the session has cells without a row; of a search it will find out itself."""
        done = {_key(row) for row in self._rows(index)}
        return self._plan.search is not None or any(cell.key not in done for cell in self._sessions[index].cells)

    def _rows(self, index: int) -> list[SweepPoint]:
        session = self._sessions[index]
        rows = [*self._directory.done, *self.points]
        return [row for row in rows if (row.precision, row.repeat) == (session.variant.precision, session.repeat)]

    def _send(self, index: int) -> None:
        session, plan = self._sessions[index], self._plan
        if self._price_by_card:
            plan = replace(plan, scenario=priced(plan.scenario, session.variant.card_type))
        rows, begun = tuple(self._rows(index)), dict(self._begun)
        errand = Errand(session, plan, self._template, self._opener, rows, begun, self._away)
        self._number += 1
        task = self._task.options(**self._demands[index].options()).remote(errand, self._number, self._mail)
        self._out[self._number] = task, index

    def _take(self) -> None:
        """Take what has arrived. A Ctrl-C in the middle of it leaves the rest to the next call."""
        self._accept_all()
        parcels: list[Parcel] = self._ray.get(self._mail.take.remote(self._seen))
        items = deque((parcel, item) for parcel in parcels for item in parcel.items)
        self._arrived, self._seen = items, self._seen + len(parcels)
        self._accept_all()

    def _accept_all(self) -> None:
        while self._arrived:
            parcel, item = self._arrived.popleft()
            if parcel.errand in self._out:
                self._accept(item, parcel)

    def _accept(self, item: Item, parcel: Parcel) -> None:
        match item:
            case Cell():
                self._begun[item.key] = max(item.attempt, self._begun.get(item.key, 0))
            case RequestRecord():
                self._directory.add_request(item)
            case GpuSample():
                self._directory.add_gpu_sample(item)
            case SweepPoint():
                self._finish(replace(item, node=self._node(parcel.node)))
            case File():
                write(self._path(parcel.errand, Path(item.name).name), item.text)
            case Said(text=text, stays=stays):
                session = self._sessions[self._out[parcel.errand][1]]
                tell = self._observer.note if stays else self._observer.status
                tell(f"{self._node(parcel.node)}, {session.variant.precision} r{session.repeat}: {text}")

    def _finish(self, point: SweepPoint) -> None:
        self._directory.add_point(point)
        self.points.append(point)
        number = len(self._directory.done) + len(self.points)
        total = self._plan.search.max_cells * len(self._sessions) if self._plan.search else self._total
        self._observer.cell_begins(Cell(point.precision, point.conc, point.repeat, point.rate_rps), number, total)
        self._observer.cell_ended(point)

    def _node(self, id: str) -> str:
        """What tables call a node: its own name is nobody's business. A resumed run counts on."""
        if id not in self._nodes:
            self._nodes.append(id)
        return f"node-{self._first_node + self._nodes.index(id)}"

    def _path(self, errand: int, name: str) -> Path:
        """Where a file of an engine goes: log and description of one start of an engine keep one stem."""
        stem, dot, suffix = name.rpartition(".")
        if (errand, stem) not in self._names:
            taken = {path.stem for path in self._directory.path.glob("engine-*")}
            numbered = (stem if number == 1 else f"{stem}-{number}" for number in range(1, len(taken) + 2))
            self._names[errand, stem] = next(found for found in numbered if found not in taken)
        return self._directory.path / f"{self._names[errand, stem]}{dot}{suffix}"

    def _close(self, number: int) -> None:
        """A task has ended: well, with words about its engine, or with its node."""
        task, index = self._out[number]
        session = self._sessions[index]
        name = f"{session.variant.precision} r{session.repeat}"
        try:
            ended: Ended | None = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise RunError(f"a session failed, which is a defect of kneebench:\n{_words(error)}") from error
        except self._ray.exceptions.RayError as error:
            ended = Ended(_loss(error), again=True)
        del self._out[number]
        if ended is None:
            return
        said = without_keys(ended.why)
        first = said.splitlines()[0]
        self._losses[index] += ended.again
        if ended.again and self._losses[index] < LOSSES:
            self._observer.note(f"{name}: {first}; what it was measuring is begun again")
            self._waiting.appendleft(index)
        else:
            self._failures.append(f"{name}: {said}{f', {LOSSES} times' if ended.again else ''}")
            self._observer.status(f"{name} failed: {first}")

    def _check_hope(self) -> None:
        """Raise RunError when no node is left, and none comes back in time, that could take what is out."""
        nodes = self._cluster.nodes()
        demands = [self._demands[index] for _, index in self._out.values()]
        if not demands or any(width(nodes, wanted) for wanted in demands):
            self._stuck_s = None
            return
        self._stuck_s = self._stuck_s or time.monotonic()
        if time.monotonic() - self._stuck_s > PATIENCE_S:
            raise RunError(
                "no node of the cluster is left that could take the rest; every finished row is on disk",
                remedy="start Ray on nodes again, then: bench sweep --resume with the run's directory",
            )


def places(address: str, asked: Sequence[Variant]) -> dict[str | None, int]:
    """By card type, how many engines of these variants the cluster holds at once; {} where `auto` finds none running.

    Raises InputError as `attached` and `demand` do. Nothing is started.
    """
    _check_ray(address)
    if _where(address) is None:
        return {}
    with attached(address) as cluster:
        nodes = cluster.nodes()
        return {
            card_type: min(
                width(nodes, demand(nodes, one.cards, card_type)) for one in asked if one.card_type == card_type
            )
            for card_type in dict.fromkeys(one.card_type for one in asked)
        }


def _check_ray(address: str) -> None:
    """Raise MissingTool without Ray, InputError for an address of a kind that cannot own a run."""
    if importlib.util.find_spec("ray") is None:
        raise MissingTool(
            "--cluster needs Ray, which this environment lacks", remedy='pip install "kneebench[cluster]"'
        )
    if "://" in address:
        raise InputError(
            f"--cluster {address}: a Ray client cannot own a run",
            allowed="auto, or HOST:PORT of a cluster that this machine is a node of",
            remedy="run `ray start --address HOST:PORT --num-cpus 0` here first",
        )


@contextmanager
def attached(address: str) -> Iterator[Cluster]:
    """Connect to a Ray cluster; `auto`: one that runs on this machine, else one is started on it, and ended again.

    Raises MissingTool without Ray, InputError where nothing answers at the address.
    """
    _check_ray(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray that is started here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; the old one warns
    import ray
    import ray.util.scheduling_strategies

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    where, ours = _where(address), signal.getsignal(signal.SIGTERM)
    if where is not None:
        ray.init(where, **quiet)
    else:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    signal.signal(signal.SIGTERM, ours)  # Ray's own leaves our processes behind
    _hush()
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _hush() -> None:
    """Ray prints forty lines of a lost node's raylet; the run has one of its own. Ray has no setting for it."""
    import ray._private.worker as driver

    driver.print_to_stdstream = lambda *_, **__: None


def _where(address: str) -> str | None:
    """HOST:PORT where a cluster answers; None: `auto`, and none runs here. Ray itself waits five minutes for nobody."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        where = canonicalize_bootstrap_address(address)
        if where is not None:
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_S).close()
        return where
    except (OSError, ValueError) as error:
        if address == "auto":
            return None
        raise InputError(
            f"--cluster {address}: no Ray cluster answers there ({_words(error)})",
            allowed="auto, or HOST:PORT as `ray start --head` printed it",
            remedy="see `ray status`; this machine has to be a node of it: ray start --address HOST:PORT",
        ) from error


def _measure(errand: Errand, number: int, mail: Any) -> Ended | None:
    """The task: one session, on the node where Ray has put it."""
    import ray

    # A process that was started in the background ignores Ctrl-C, and so does all that it starts, Ray's too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not ray.get: Ray lends the processor of a task that waits in it to the next one, and that is another engine.
    if not mail.is_open.remote().future().result():
        return None
    context: Any = ray.get_runtime_context()
    node = context.get_node_id()
    with suppress(OSError):  # Ray makes its processes give way to others, and engines would inherit that
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    if os.environ.get("OMP_NUM_THREADS") == str(math.floor(context.get_assigned_resources().get("CPU", 0))):
        del os.environ["OMP_NUM_THREADS"]  # Ray's own idea; an engine knows better, and on one machine it decides

    def send(items: tuple[Item, ...]) -> None:
        mail.put.remote(Parcel(number, node, items)).future().result()

    host = _address() if errand.away else LOOPBACK
    hired = _hired(errand.away) if errand.away else Generators()
    with TemporaryDirectory(prefix="kneebench-") as scratch:
        return outpost.run(errand, send, Path(scratch), hired, host)


def _address() -> str:
    """By which the other nodes reach this one."""
    import ray

    address: Any = ray.util.get_node_ip_address
    return str(address())


@dataclass(frozen=True, slots=True)
class _DoorKey:
    """Of a door for generators (load/away.py). It is a task's argument, and never printed."""

    key: str = field(repr=False)


@contextmanager
def _hired(away: int) -> Iterator[Generators]:
    """Generators as tasks on other nodes than this one, as many as `away`, spread over those that are for load."""
    import ray

    context: Any = ray.get_runtime_context()
    elsewhere = {"ray.io/node-id": f"!{context.get_node_id()}"}
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_make_load)
    task = task.options(resources={LOAD: 1}, label_selector=elsewhere, scheduling_strategy="SPREAD")
    tasks = []
    try:
        with listen(_address()) as door, ExitStack() as let_in:
            connections = []
            for _ in range(away):
                tasks.append(task.remote(door.where, _DoorKey(door.key)))
                connections.append(door.admit(ADMIT_S))
                let_in.callback(connections[-1].end)
            with Generators(away=connections) as generators:
                let_in.pop_all()  # which ends them itself
                yield generators
    finally:
        for one in tasks:
            ray.cancel(one, force=True)


def _make_load(where: str, door: _DoorKey) -> int:
    """The task: a generator, until the owner of its door hangs up."""
    around = {**os.environ, DOOR_VARIABLE: door.key}
    return subprocess.run([sys.executable, "-m", "harness.load.away", where], env=around).returncode


def _key(point: SweepPoint) -> str:
    return Cell(point.precision, point.conc, point.repeat, point.rate_rps).key


def _loss(error: Exception) -> str:
    """In a word; what Ray says of it names addresses."""
    known = {
        "NodeDiedError": "its node was lost",
        "OutOfMemoryError": "its node ran out of memory, and Ray ended it",
        "WorkerCrashedError": "its process died",
    }
    return known.get(type(error).__name__, f"Ray gave it up ({type(error).__name__})")


def _words(error: BaseException) -> str:
    return redact(re.sub(r"\x1b\[\d+m", "", str(error))) or type(error).__name__
