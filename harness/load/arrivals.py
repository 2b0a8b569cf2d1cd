"""When the next request begins: the loops that make load, as they run inside a generator's process.

    closed loop   N users, each of whom asks again as soon as it is answered (after a pause, if it thinks)
    open loop     requests come at times that were drawn before, whether or not anything was answered

A request is *intended* for a moment: in a closed loop the kernel's receipt of the last byte of the answer before it
(plus the pause), in an open one its time in the schedule. Latency counts from there, so whatever our own process
loses between the two is in the figure, as send lag, and never hidden.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from harness.engines import Target
from harness.engines.address import Address
from harness.load.alarm import Alarm
from harness.load.client import Connection, Exchange, fill
from harness.load.dataset import Prompts
from harness.load.poller import Poller
from harness.load.schedule import Arrival, arrivals, pace
from harness.load.workload import NO_HISTORY, Ask, Dialect, History, extended, make_ask
from harness.records import Cell, RequestRecord, Scenario

MAX_IN_FLIGHT = 4096
"""An open loop that a server cannot follow grows without end; at so many in flight the cell is given up."""
_BACKOFF_NS = 50_000_000
"""A server that refuses at once must not be hammered."""


@dataclass(frozen=True, slots=True)
class Job:
    """The share of one cell's load that one generator makes."""

    cell: Cell
    scenario: Scenario
    dialect: Dialect
    target: Target
    start_ns: int
    """On the generator's own clock; Begin tells it."""
    share: int = 0
    shares: int = 1
    """This generator has every `shares`-th user or arrival, from `share` on."""
    salt: str = ""
    prompts: Prompts | None = None
    trace: tuple[Arrival, ...] = ()


class Traffic:
    """What one generator has in flight. `tell` gets each record as its request ends."""

    def __init__(self, job: Job, alarm: Alarm, poller: Poller, tell: Callable[[RequestRecord], None]) -> None:
        self.job = job
        self.alarm = alarm
        self._poller = poller
        self._stopping = False
        self.next_ns: int | None = None
        """When the next arrival of an open loop is due; None: none is to come."""
        self.overloaded = asyncio.Event()
        self.exhausted = asyncio.Event()
        self._tell = tell
        self._address = Address.parse(job.target.base_url)
        self._in_flight: dict[tuple[int, int], int] = {}
        self._connections: list[Connection] = []
        self._idle: list[Connection] = []
        self._changed = asyncio.Event()
        self._chores: deque[Callable[[], None]] = deque()

    def ask(self, user: int, sequence: int, history: History = NO_HISTORY, arrival: Arrival | None = None) -> Ask:
        """What `user` asks as its `sequence`-th."""
        job, lengths = self.job, None
        if arrival is not None and arrival.input_tokens is not None and arrival.output_tokens is not None:
            lengths = (arrival.input_tokens, arrival.output_tokens)
        return make_ask(
            job.scenario, job.cell, user, sequence, job.dialect, job.target.model,
            salt=job.salt, lengths=lengths, prompts=job.prompts, history=history,
        )  # fmt: skip

    def connection(self) -> Connection:
        """An idle connection, else a new one."""
        if self._idle:
            return self._idle.pop()
        connection = Connection(self._address, self.job.target.api_key, self._poller)
        self._connections.append(connection)
        return connection

    def release(self, connection: Connection) -> None:
        self._idle.append(connection)

    def begin(self, user: int, sequence: int, ask: Ask, intended_ns: int) -> RequestRecord:
        """A request is about to be sent."""
        self._in_flight[user, sequence] = intended_ns
        if len(self._in_flight) > MAX_IN_FLIGHT // self.job.shares:
            self.overloaded.set()
        return RequestRecord(
            self.job.cell.key, user, sequence, "warmup", intended_ns, self.job.cell.attempt,
            input_tokens_asked=ask.input_tokens, output_tokens_asked=ask.output_tokens,
        )  # fmt: skip

    async def exchange(self, connection: Connection, record: RequestRecord, ask: Ask) -> Exchange:
        """Send it and wait for the end of the answer."""
        scenario = self.job.scenario
        return await connection.exchange(
            self.job.dialect.path, ask.body,
            request_id=record.request_id,
            expected_tokens=ask.output_tokens if self.job.dialect.vllm_extras else 0,
            timeout_s=scenario.request_timeout_s, token_timeout_s=scenario.token_timeout_s,
        )  # fmt: skip

    def ended(self, record: RequestRecord, exchange: Exchange) -> None:
        """A request is over, however it went."""
        self._tell(fill(record, exchange))
        del self._in_flight[record.user, record.sequence]
        self._changed.set()

    def later(self, chore: Callable[[], None]) -> None:
        """Do this when nothing is more urgent: one chore a turn of the loop, so that no answer waits for two."""
        self._chores.append(chore)
        if len(self._chores) == 1:
            asyncio.get_running_loop().call_soon(self._do_chore)

    def finish_chores(self) -> None:
        """Do what is left of them, now."""
        while self._chores:
            self._chores.popleft()()

    def _do_chore(self) -> None:
        if self._chores:
            self._chores[0]()
            self._chores.popleft()
        if self._chores:
            asyncio.get_running_loop().call_soon(self._do_chore)

    async def drained(self, close_ns: int) -> None:
        """Wait until everything that was meant to begin before `close_ns` has ended."""
        while any(intended < close_ns for intended in self._in_flight.values()) or (
            self.next_ns is not None and self.next_ns < close_ns
        ):
            self._changed.clear()
            await self._changed.wait()

    def dispatched(self, next_ns: int | None) -> None:
        """An open loop has sent all that was due; `next_ns` is what it waits for, None the end of its trace."""
        self.next_ns = next_ns
        self._changed.set()
        if next_ns is None:
            self.exhausted.set()

    def stopped(self) -> bool:
        """Whether nothing more is to begin."""
        return self._stopping

    def stop(self) -> None:
        """Begin nothing more, and end what is in flight."""
        self._stopping = True
        for connection in self._connections:
            connection.cut()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


async def make_load(traffic: Traffic) -> None:
    """Make the job's load until `traffic.stop()` is called, or a trace ends."""
    closed = traffic.job.cell.rate_rps is None
    await (_closed_loop(traffic) if closed else _open_loop(traffic))


async def _closed_loop(traffic: Traffic) -> None:
    job = traffic.job
    async with asyncio.TaskGroup() as group:
        for user in range(job.share, job.cell.conc, job.shares):
            group.create_task(_user(user, traffic))


async def _user(user: int, traffic: Traffic) -> None:
    job, scenario = traffic.job, traffic.job.scenario
    pauses_s = pace(scenario, job.cell, user)
    intended_ns = job.start_ns + int(next(pauses_s) * 1e9)
    connection, history, sequence = traffic.connection(), NO_HISTORY, 0
    converses = scenario.turns > 1
    ask: Ask | None = traffic.ask(user, 0)

    def prepare(number: int) -> None:
        nonlocal ask
        ask = traffic.ask(user, number)

    await traffic.alarm.until(intended_ns)
    while not traffic.stopped():
        asked = ask or traffic.ask(user, sequence, history)
        record = traffic.begin(user, sequence, asked, intended_ns)
        if not converses:  # the next question is written while the server works on this one
            ask = None
            traffic.later(functools.partial(prepare, sequence + 1))
        exchange = await traffic.exchange(connection, record, asked)
        traffic.later(functools.partial(traffic.ended, record, exchange))
        if traffic.stopped():
            break
        sequence += 1
        intended_ns = exchange.end_ns
        if exchange.error is not None:
            intended_ns += _BACKOFF_NS
        intended_ns += int(next(pauses_s) * 1e9)
        if converses:
            goes_on = sequence % scenario.turns and exchange.error is None
            reader = exchange.reader
            history = extended(history, asked, reader.token_ids, "".join(reader.text)) if goes_on else NO_HISTORY
            sequence = sequence if goes_on else -(-sequence // scenario.turns) * scenario.turns
            ask = traffic.ask(user, sequence, history)
        await traffic.alarm.until(intended_ns)


async def _open_loop(traffic: Traffic) -> None:
    job = traffic.job

    async def one(record: RequestRecord, ask: Ask) -> None:
        connection = traffic.connection()
        exchange = await traffic.exchange(connection, record, ask)
        traffic.release(connection)
        traffic.later(functools.partial(traffic.ended, record, exchange))

    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(arrivals(job.scenario, job.cell, job.trace)):
            if number % job.shares != job.share:
                continue
            intended_ns = job.start_ns + round(arrival.offset_s * 1e9)
            ask = traffic.ask(number, 0, arrival=arrival)
            traffic.dispatched(intended_ns)
            await traffic.alarm.until(intended_ns)
            if traffic.stopped():
                break
            # Counted before `next_ns` moves on, so that it is never missing from what has still to end.
            group.create_task(one(traffic.begin(number, 0, ask, intended_ns), ask))
            await asyncio.sleep(0)  # when we are late, everybody else gets a turn too
        traffic.dispatched(None)
