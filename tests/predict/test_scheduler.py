"""The scheduler: its rules beside a slow reference and vLLM's own, examples by hand, and what must always hold."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines.environment import EngineEnv
from harness.errors import InputError
from harness.predict.blocks import Blocks
from harness.predict.scheduler import Asked, Limits, Load, Request, Scheduler, simulate
from harness.predict.stretches import Served, Simulation, Stretch


@dataclass(frozen=True)
class Plain:
    """Step times linear in everything; powers of two keep sums exact, so that ties are ties in any order of adding."""

    base_s: float = 1.0
    sequence_s: float = 0.0
    context_s: float = 0.0
    prompt_s: float = 0.0
    pair_s: float = 0.0
    finish_s: float = 0.0

    def decode(self, sequences: int) -> tuple[float, float]:
        return self.base_s + self.sequence_s * sequences, self.context_s

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        assert prompt >= 1 and finishing >= 0
        a, b = self.decode(sequences)
        return a + b * context + self.prompt_s * prompt + self.pair_s * pairs + self.finish_s * finishing


@dataclass
class Open:
    """All arrivals are known."""

    asked: Sequence[Asked]

    def first(self) -> Iterable[Asked]:
        return self.asked

    def after(self, served: Served) -> Asked | None:
        return None


@dataclass
class Closed:
    """Users who ask again `think_s` after an answer, until all of `lengths` (in, out) have been asked."""

    users: int
    lengths: Sequence[tuple[int, int]]
    think_s: Sequence[float] = (0.0,)
    asked: int = 0

    def ask(self, at: float, user: int) -> Asked | None:
        if self.asked == len(self.lengths):
            return None
        number, self.asked = self.asked, self.asked + 1
        return Asked(at + self.think_s[number % len(self.think_s)], *self.lengths[number], user, number)

    def first(self) -> Iterable[Asked]:
        return [asked for user in range(self.users) if (asked := self.ask(0.0, user)) is not None]

    def after(self, served: Served) -> Asked | None:
        return self.ask(served.last_token_s, served.user)


# --- The reference: one step at a time, a list of blocks for each sequence, nothing clever. ---


@dataclass(eq=False)
class Reader:
    asked: Asked
    computed: int = 0
    decoding: bool = False
    generated: int = 0
    blocks: list[int] = field(default_factory=list)
    scheduled_s: float = math.nan
    token_s: list[float] = field(default_factory=list)
    preemptions: int = 0

    @property
    def tokens(self) -> int:
        return self.asked.input_tokens + self.generated


@dataclass
class Reference:
    served: list[Reader] = field(default_factory=list)
    steps: int = 0
    preemptions: int = 0
    running_peak: int = 0
    waiting_peak: int = 0
    kv_peak: float = 0.0
    step_s: list[tuple[float, int]] = field(default_factory=list)
    """When each step's tokens reach their clients, and how many they are."""


def step_by_step(load: Load, limits: Limits, steps: Plain) -> Reference:
    free = list(range(limits.kv_blocks))
    waiting: list[Reader] = []
    running: list[Reader] = []
    arrivals = [(asked.arrival_s + limits.request_s, at, asked) for at, asked in enumerate(load.first())]
    asked_for, now, found = len(arrivals), 0.0, Reference()

    def grow(sequence: Reader, tokens: int) -> bool:
        """Blocks for its computed tokens and so many more, or none at all."""
        wanted = math.ceil((sequence.computed + tokens) / limits.block_size) - len(sequence.blocks)
        if wanted > len(free):
            return False
        sequence.blocks += [free.pop() for _ in range(wanted)]
        return True

    def leave(sequence: Reader) -> None:
        running.remove(sequence)
        free.extend(sequence.blocks)
        sequence.blocks = []
        sequence.computed, sequence.decoding = 0, False

    def run_running(chunks: dict[Reader, int], budget: int) -> tuple[int, bool]:
        preempted = False
        at = 0
        while at < len(running):
            sequence = running[at]
            tokens = min(sequence.tokens - sequence.computed, budget)
            assert tokens > 0, "no running request is ever left out"
            while sequence in running and not grow(sequence, tokens):
                victim, preempted = running[-1], True
                assert victim not in chunks
                leave(victim)
                waiting.insert(0, victim)
                victim.preemptions += 1
                found.preemptions += 1
            if sequence in running:
                chunks[sequence] = tokens
                budget -= tokens
            at += 1
        return budget, preempted

    def run_waiting(chunks: dict[Reader, int], budget: int) -> None:
        while waiting and budget > 0 and len(running) < limits.max_num_seqs:
            sequence = waiting[0]
            spare = 0 if limits.chunked_prefill else limits.kv_blocks // 100
            if math.ceil(sequence.tokens / limits.block_size) > len(free) - spare:
                return
            if not limits.chunked_prefill and sequence.tokens > budget:
                return
            tokens = min(sequence.tokens, budget)
            assert grow(sequence, tokens)
            chunks[sequence] = tokens
            budget -= tokens
            running.append(waiting.pop(0))
            if math.isnan(sequence.scheduled_s):
                sequence.scheduled_s = now

    while arrivals or waiting or running:
        if not waiting and not running:
            now = max(now, min(arrivals)[0])
        for arrival in sorted(arrivals):
            if arrival[0] <= now:
                waiting.append(Reader(arrival[2]))
                arrivals.remove(arrival)
        chunks: dict[Reader, int] = {}
        budget = limits.max_num_batched_tokens
        if limits.chunked_prefill:
            budget, preempted = run_running(chunks, budget)
            if not preempted:
                run_waiting(chunks, budget)
        else:
            run_waiting(chunks, budget)
            if not chunks:
                run_running(chunks, limits.kv_blocks * limits.block_size)
        assert chunks, "something waits or runs, so something is done"
        used = limits.kv_blocks - len(free)
        found.kv_peak = max(found.kv_peak, used / limits.kv_blocks)
        found.running_peak = max(found.running_peak, len(running))
        found.waiting_peak = max(found.waiting_peak, len(waiting))

        decodes = [s for s in chunks if s.decoding]
        prompts = {s: n for s, n in chunks.items() if s not in decodes}
        context = sum(s.computed for s in decodes)
        pairs = sum(s.computed + i + 1 for s, n in prompts.items() for i in range(n))
        finishing = sum(s.computed + n == s.tokens for s, n in prompts.items())
        if prompts:
            now += steps.mixed(len(decodes), context, sum(prompts.values()), pairs, finishing)
        else:
            a, b = steps.decode(len(decodes))
            now += a + b * context
        found.steps += 1
        given, ended = 0, len(found.served)
        for sequence, tokens in chunks.items():
            sequence.computed += tokens
            if sequence.computed < sequence.tokens:
                continue
            sequence.generated += 1
            sequence.decoding = True
            given += 1
            sequence.token_s.append(now + limits.token_s)
            if sequence.generated == sequence.asked.output_tokens:
                leave(sequence)
                found.served.append(sequence)
        found.step_s.append((now + limits.token_s, given))
        for sequence in found.served[ended:]:
            asked, times = sequence.asked, sequence.token_s
            answer = Served(
                **asdict(asked), scheduled_s=0, first_token_s=0, last_token_s=times[-1], preemptions=0, stays=()
            )
            if (question := load.after(answer)) is not None:
                arrivals.append((question.arrival_s + limits.request_s, asked_for, question))
                asked_for += 1
    assert len(free) == limits.kv_blocks
    return found


def assert_same(simulated: Simulation, reference: Reference, rel: float = 1e-9) -> None:
    close = lambda value: pytest.approx(value, rel=rel, abs=1e-12)  # noqa: E731
    assert [(s.user, s.sequence) for s in simulated.served] == [
        (s.asked.user, s.asked.sequence) for s in reference.served
    ]
    for fast, slow in zip(simulated.served, reference.served, strict=True):
        times = simulated.token_times(fast)
        assert times == close(slow.token_s)
        assert (times[0], times[-1]) == (fast.first_token_s, fast.last_token_s)
        assert fast.scheduled_s == close(slow.scheduled_s)
        assert fast.preemptions == slow.preemptions
    assert (simulated.steps, simulated.preemptions) == (reference.steps, reference.preemptions)
    assert (simulated.running_peak, simulated.waiting_peak) == (reference.running_peak, reference.waiting_peak)
    assert simulated.kv_peak == close(reference.kv_peak)
    given = [stretch.sequences for stretch in simulated.stretches for _ in range(stretch.steps)]
    assert given == [tokens for _, tokens in reference.step_s]


# --- Cases for hypothesis: small enough that everything happens. Times are eighths: exact. ---

eighths = st.integers(0, 24).map(lambda n: n / 8)
step_times = st.builds(
    Plain,
    base_s=st.integers(1, 16).map(lambda n: n / 8),
    sequence_s=st.sampled_from([0.0, 0.125]),
    context_s=st.sampled_from([0.0, 0.125, 0.5]),
    prompt_s=st.sampled_from([0.0, 0.25]),
    pair_s=st.sampled_from([0.0, 0.125]),
    finish_s=st.sampled_from([0.0, 0.5]),
)


@dataclass
class Case:
    limits: Limits
    steps: Plain
    lengths: list[tuple[int, int]]
    times: list[float]
    users: int
    """0: an open loop."""

    def load(self) -> Load:
        if self.users:
            return Closed(self.users, self.lengths, self.times)
        return Open([Asked(at, *pair, n, 0) for n, (pair, at) in enumerate(zip(self.lengths, self.times, strict=True))])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.integers(1, 5))
    kv_blocks = draw(st.integers(-(-4 // block_size), 14))
    chunked = draw(st.booleans())
    room = kv_blocks * block_size
    budget = draw(st.integers(1, 12)) if chunked else draw(st.integers(room, 2 * room))
    limits = Limits(
        kv_blocks,
        block_size,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=budget,
        chunked_prefill=chunked,
        request_s=draw(st.sampled_from([0.0, 0.25])),
        token_s=draw(st.sampled_from([0.0, 0.125])),
    )
    longest = min(room, 40)
    pairs = st.integers(1, longest - 1).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, longest - n)))
    lengths = draw(st.lists(pairs, min_size=1, max_size=14))
    times = draw(st.lists(eighths, min_size=len(lengths), max_size=len(lengths)))
    return Case(limits, draw(step_times), lengths, times, draw(st.sampled_from([0, 0, 1, 2, 5])))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_leaps_are_the_steps(case: Case) -> None:
    assert_same(
        simulate(case.load(), case.limits, case.steps), step_by_step(case.load(), case.limits, case.steps), rel=0
    )


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("users", [0, 3, 40])
@pytest.mark.parametrize("kv_blocks", [60, 260, 2000])
def test_leaps_are_the_steps_at_size(kv_blocks: int, users: int, chunked: bool) -> None:
    """Hundreds of tokens a request, times with all their digits; 60 blocks of 16 thrash, 2,000 never fill."""
    rng = random.Random(kv_blocks + users)
    lengths = [(rng.randint(1, 300), rng.randint(1, 200)) for _ in range(80)]
    limits = Limits(kv_blocks, 16, 32, 512, chunked, request_s=rng.random() / 7, token_s=rng.random() / 31)
    steps = Plain(0.0123, 3.3e-4, 7.7e-7, 5.1e-5, 1.3e-8, 2.1e-4)
    at = [0.0]
    for _ in lengths:
        at.append(at[-1] + rng.expovariate(4))
    case = Case(limits, steps, lengths, at[: len(lengths)] if users == 0 else [rng.random() for _ in lengths], users)
    simulated = simulate(case.load(), limits, steps)
    assert_same(simulated, step_by_step(case.load(), limits, steps))
    assert len(simulated.stretches) < simulated.steps
    if kv_blocks != 260:
        assert (simulated.preemptions > 0) is (kv_blocks == 60)


def drive(scheduler: Scheduler, asked: Sequence[Asked]) -> tuple[list[Served], dict[int, list[float]]]:
    """As a server does: one step at a time. Gives who ended, and each request's token times."""
    arrivals = sorted(asked, key=lambda a: a.arrival_s)
    times: dict[int, list[float]] = {a.user: [] for a in asked}
    ended: list[Served] = []
    now = 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, arrivals[0].arrival_s)
        while arrivals and arrivals[0].arrival_s <= now:
            scheduler.add(arrivals.pop(0))
        step = scheduler.next_step(now)
        now = step.stretch.end_s
        assert step.stretch.steps == 1
        for request in step.given:
            times[request.asked.user].append(now)
        ended += step.ended
    return ended, times


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_server_goes_by_the_same_rules(case: Case) -> None:
    case = replace(case, users=0, limits=replace(case.limits, request_s=0.0, token_s=0.0))
    asked = list(case.load().first())
    ended, times = drive(Scheduler(case.limits, case.steps), asked)
    simulation = simulate(Open(asked), case.limits, case.steps)
    assert ended == simulation.served
    for served in simulation.served:
        assert times[served.user] == list(simulation.token_times(served))


@dataclass
class Watched:
    """Step times that remember how many tokens the last step computed, and of how many prompts' chunks."""

    plain: Plain
    tokens: int = 0
    prompt: int = 0

    def decode(self, sequences: int) -> tuple[float, float]:
        return self.plain.decode(sequences)

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        self.tokens, self.prompt = sequences + prompt, prompt
        return self.plain.mixed(sequences, context, prompt, pairs, finishing)


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_what_always_holds(case: Case, data: st.DataObject) -> None:
    """Blocks conserved, the order of arrival kept, nobody waits who could run, every token given; whoever hangs up."""
    limits, watched = case.limits, Watched(case.steps)
    scheduler = Scheduler(limits, watched)
    asked = [Asked(at, *pair, user) for user, (pair, at) in enumerate(zip(case.lengths, case.times, strict=True))]
    arrivals = sorted(asked, key=lambda a: a.arrival_s)
    handles: list[Request] = []
    dropped: set[Request] = set()
    scheduled: list[int] = []
    got: Counter[Request] = Counter()
    ended: list[int] = []
    now = 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, arrivals[0].arrival_s)
        while arrivals and arrivals[0].arrival_s <= now:
            handles.append(scheduler.add(arrivals.pop(0)))
        if data.draw(st.integers(0, 9)) == 0:
            gone = data.draw(st.sampled_from(handles))
            scheduler.drop(gone)
            if got[gone] < gone.asked.output_tokens:
                dropped.add(gone)
            if scheduler.idle:
                continue
        preemptions, free = scheduler.preemptions, round((1 - scheduler.kv_usage) * limits.kv_blocks)
        until = data.draw(st.sampled_from([None, arrivals[0].arrival_s if arrivals else math.inf]))
        watched.tokens = watched.prompt = 0
        stretch, given, over = scheduler.next_step(now, until)
        assert stretch.start_s == now < stretch.end_s
        assert stretch.sequences == len(given) >= stretch.decoding
        assert until is None or stretch.steps == 1 or stretch.after(stretch.steps - 1) < until
        now = stretch.end_s
        got.update({request: stretch.steps for request in given})
        ended += [served.user for served in over]
        order = [request.number for request in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order), "first come, first served"
        assert 0 <= scheduler.kv_usage <= scheduler.kv_peak <= 1
        assert len(scheduler.running) + len(over) <= limits.max_num_seqs
        assert scheduler.running or over, "somebody runs while somebody could"
        scheduled += [r.number for r in scheduler.running if r.scheduled_s == stretch.start_s and not r.preemptions]
        if scheduler.waiting and not over and stretch.steps == 1 and scheduler.preemptions == preemptions:
            head = scheduler.waiting[0]
            if watched.prompt or limits.chunked_prefill:  # admission came last in the step
                free = round((1 - scheduler.kv_usage) * limits.kv_blocks)
            wanted = math.ceil(head.tokens / limits.block_size) + limits.spare_blocks
            left = limits.max_num_batched_tokens - (watched.tokens or len(given))
            full = len(scheduler.running) == limits.max_num_seqs
            spent = left == 0 if limits.chunked_prefill else watched.prompt > 0 and head.tokens > left
            assert full or spent or wanted > free, "nobody waits who could run"
    assert scheduler.kv_usage == 0
    assert scheduled == sorted(scheduled)
    served = [request for request in handles if request not in dropped]
    assert all(got[request] == request.asked.output_tokens for request in served)
    assert sorted(ended) == sorted(request.asked.user for request in served)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 5))
def test_users_ask_one_at_a_time(case: Case, users: int) -> None:
    """A closed loop's requests of one user do not overlap, so there are never more in flight than users."""
    simulation = simulate(Closed(users, case.lengths, case.times), case.limits, case.steps)
    assert len(simulation.served) == len(case.lengths)
    for user in range(users):
        own = sorted((s for s in simulation.served if s.user == user), key=lambda s: s.sequence)
        for before, after in itertools.pairwise(own):
            assert before.last_token_s <= after.arrival_s
    assert simulation.running_peak <= users


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.integers(-4, 400).map(lambda n: n / 8), min_size=2, max_size=6))
def test_tokens_between_by_counting(case: Case, ends: list[float]) -> None:
    simulation = simulate(case.load(), case.limits, case.steps)
    times = np.concatenate([simulation.token_times(served) for served in simulation.served])
    for start_s, end_s in itertools.permutations(ends, 2):
        assert simulation.tokens_between(start_s, end_s) == np.sum((start_s <= times) & (times < end_s))
    assert simulation.tokens_between(-math.inf, math.inf) == sum(answer for _, answer in case.lengths)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 20), st.integers(0, 40))
def test_blocks_that_steps_will_need(size: int, cached: list[int], step: int, free: int) -> None:
    """By counting the blocks of each sequence before and after; and the free ones last exactly as long as they do."""
    blocks = Blocks(free, size)
    for tokens in cached:
        blocks.join(step, tokens)
    for steps in range(20):
        counted = sum(math.ceil((tokens + steps) / size) - math.ceil(tokens / size) for tokens in cached)
        assert blocks.needed(step, steps) == counted
    last = blocks.lasting(step)
    assert blocks.needed(step, last) <= free < blocks.needed(step, last + 1)
    assert blocks.take(free) and not blocks.take(1)


@settings(max_examples=500, deadline=None)
@given(st.floats(0, 1e4), st.floats(1e-4, 1), st.floats(0, 1), st.integers(1, 5000), st.sampled_from([-1, 0, 1]))
def test_a_leap_ends_at_the_very_step(start_s: float, first_s: float, growth: float, steps: int, side: int) -> None:
    """At the end of a step, and a hair before and after it, whatever the last digits do."""
    stretch = Stretch(start_s, 1, 1, first_s, growth * first_s, 1)
    time_s = stretch.after(steps)
    if side:
        time_s = math.nextafter(time_s, side * math.inf)
    found = stretch.steps_until(time_s)
    assert found == max(steps + (side == 1), 1)
    assert stretch.after(found) >= time_s


# --- By hand. ---


def test_worked_by_hand() -> None:
    """A (6 in, 3 out), B (10, 2), C (2, 1) at 0 s; 2 sequences and 8 tokens a step; blocks of 4.

    A step takes 1 + 0.5 a decode + 0.125 a cached token read + 0.25 a prompt token + 0.0625 a pair.

        step 1   A's 6 of 6, B's 2 of 10: pairs 6·7/2 + 2·3/2 = 24      1 + 0.25·8 + 0.0625·24            = 4.5    A1
        step 2   A after 6, B's 7 after 2: pairs 7·2 + 7·8/2 = 42       1 + 0.5 + 0.75 + 1.75 + 2.625     = 6.625  A2
        step 3   A after 7, B's last 1 after 9: pairs 9 + 1 = 10        1 + 0.5 + 0.875 + 0.25 + 0.625    = 3.25   A3 B1
        step 4   B after 10, C's 2: pairs 3 (C had no place before)     1 + 0.5 + 1.25 + 0.5 + 0.1875     = 3.4375 B2 C1

    So tokens come at 4.5, 11.125, 14.375 and 17.8125 s. Blocks: step 2 holds 7 and 9 tokens, 2 + 3 = 5 of 100.
    """
    asked = [Asked(0, 6, 3, 1), Asked(0, 10, 2, 2), Asked(0, 2, 1, 3)]
    steps = Plain(1.0, 0.5, 0.125, 0.25, 0.0625)
    simulation = simulate(Open(asked), Limits(100, 4, 2, 8), steps)
    times = {served.user: list(simulation.token_times(served)) for served in simulation.served}
    assert times == {1: [4.5, 11.125, 14.375], 2: [14.375, 17.8125], 3: [17.8125]}
    assert [served.user for served in simulation.served] == [1, 2, 3]
    assert [served.scheduled_s for served in simulation.served] == [0.0, 0.0, 14.375]
    assert (simulation.steps, simulation.running_peak, simulation.waiting_peak) == (4, 2, 1)
    assert (simulation.kv_peak, simulation.busy_s, simulation.end_s) == (0.05, 17.8125, 17.8125)
    assert simulation.tokens_between(4.5, 14.375) == 2
    assert simulation.tokens_between(14.375, 99.0) == 4


def test_preemption_by_hand() -> None:
    """Two requests of 2 in, 4 out in 4 blocks of 2; a step takes 1 s.

    Prompts in step 1 (a block each, tokens 1). Step 2 caches a third token: a second block each, all 4 are taken.
    Step 3 fills them. Step 4 wants a third block for each: the later one, B, gives up its two, and A ends with token 4.
    B has 2 + 3 tokens to compute again, in step 5, and that gives its fourth.
    """
    simulation = simulate(Open([Asked(0, 2, 4, 1), Asked(0, 2, 4, 2)]), Limits(4, 2), Plain())
    first, second = simulation.served
    assert list(simulation.token_times(first)) == [1, 2, 3, 4]
    assert list(simulation.token_times(second)) == [1, 2, 3, 5]
    assert (first.preemptions, second.preemptions, simulation.preemptions) == (0, 1, 1)
    assert (simulation.kv_peak, simulation.waiting_peak) == (1.0, 1)


def test_decodes_wait_for_prompts_before_v1() -> None:
    """A (2 in, 3 out) at 0 s, B (3, 2) at 1.5 s; a step takes 1 s. V1 runs B's prompt beside A's third token in step 3;
    the engine before runs it alone, and A's third token comes with B's second in step 4."""
    asked = [Asked(0, 2, 3, 1), Asked(1.5, 3, 2, 2)]
    found = {}
    for chunked in (True, False):
        simulation = simulate(Open(asked), Limits(100, chunked_prefill=chunked), Plain())
        found[chunked] = {s.user: list(simulation.token_times(s)) for s in simulation.served}
    assert found[True] == {1: [1, 2, 3], 2: [3, 4]}
    assert found[False] == {1: [1, 2, 4], 2: [3, 4]}


def test_the_engine_before_v1_keeps_a_hundredth_free() -> None:
    """200 blocks of 1: 2 stay free. 100 + 98 tokens of prompts may begin together; with one more the second waits."""
    for tokens, together in ((98, True), (99, False)):
        asked = [Asked(0, 100, 1, 1), Asked(0, tokens, 1, 2)]
        simulation = simulate(Open(asked), Limits(200, 1, chunked_prefill=False), Plain())
        assert (simulation.steps == 1) is together


def test_client_times() -> None:
    """0.25 s to the scheduler, 1 s a step, 0.5 s back: two tokens at 1.75 and 2.75 s, scheduled at 0.25 s."""
    limits = Limits(100, request_s=0.25, token_s=0.5)
    simulation = simulate(Open([Asked(0, 2, 2)]), limits, Plain())
    (served,) = simulation.served
    assert (served.scheduled_s, served.first_token_s, served.last_token_s) == (0.25, 1.75, 2.75)
    assert (simulation.tokens_between(1.75, 2.75), simulation.tokens_between(1.7, 2.8)) == (1, 2)


def test_nothing_asked() -> None:
    simulation = simulate(Open([]), Limits(4), Plain())
    assert (simulation.served, simulation.steps, simulation.end_s) == ([], 0, 0.0)
    assert simulation.tokens_between(0, 1) == 0


@pytest.mark.parametrize(
    ("limits", "pair", "words"),
    [
        (Limits(4, 16), (60, 5), "does not fit the KV cache"),
        (Limits(400, 16, max_model_len=64), (60, 5), "max_model_len"),
        (Limits(100, 1, chunked_prefill=False), (95, 5), "does not fit the KV cache"),
        (Limits(400, max_num_batched_tokens=63, chunked_prefill=False), (60, 5), "max_num_batched_tokens"),
        (Limits(400), (0, 5), "at least one token"),
        (Limits(400), (5, 0), "at least one token"),
    ],
)
def test_what_can_never_be_served(limits: Limits, pair: tuple[int, int], words: str) -> None:
    """Told before anything runs; one token less is served where that is what is wrong."""
    with pytest.raises(InputError, match=words):
        simulate(Open([Asked(0, 1, 1), Asked(9, *pair)]), limits, Plain())
    if min(pair) > 0:
        assert len(simulate(Open([Asked(0, pair[0], pair[1] - 1)]), limits, Plain()).served) == 1


def test_a_user_cannot_ask_before_the_answer() -> None:
    class Impatient(Open):
        def after(self, served: Served) -> Asked | None:
            return Asked(served.last_token_s - 1, 1, 1)

    with pytest.raises(ValueError, match="before the answer"):
        simulate(Impatient([Asked(0, 1, 3)]), Limits(4), Plain())


# --- vLLM's own scheduler. ---

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def random_case(seed: int) -> tuple[Limits, list[tuple[int, int, int]]]:
    """Limits, and (arrives before step, in, out) of 30 requests; memory from a few requests' worth to plenty."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    budget = rng.choice([8, 32, 100])
    limits = Limits(rng.randint(64, 256) // block_size, block_size, rng.randint(1, min(8, budget)), budget)
    pairs = [(rng.randint(1, 40), rng.randint(1, 20)) for _ in range(30)]
    return limits, [(rng.randint(0, 150), *pair) for pair in pairs]


@pytest.mark.engine
def test_vllm_schedules_the_same(engine_env: EngineEnv, tmp_path: Path) -> None:
    """40 random loads through vLLM's scheduler and ours: the same requests run, are preempted and wait in every step,
    and as many tokens are computed in each."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    cases = [random_case(seed) for seed in range(40)]
    told = json.dumps([{"limits": asdict(limits), "requests": requests} for limits, requests in cases])
    script = Path(__file__).with_name("vllm_scheduler.py")
    done = subprocess.run(
        [engine_env.python, script, tmp_path], input=told, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    preemptions = 0
    for (limits, requests), steps in zip(cases, theirs, strict=True):
        watched = Watched(Plain())
        scheduler = Scheduler(limits, watched)
        arrivals = sorted((at, number) for number, (at, _, _) in enumerate(requests))
        for now, scheduled, got, preempted, waiting in steps:
            while arrivals and arrivals[0][0] <= now:
                at, number = arrivals.pop(0)
                scheduler.add(Asked(at, *requests[number][1:], number))
            before = {request: request.preemptions for request in [*scheduler.running, *scheduler.waiting]}
            watched.tokens = 0
            step = scheduler.next_step(now)
            assert sorted(request.asked.user for request in step.given) == got
            assert (watched.tokens or len(step.given)) == sum(scheduled.values())
            assert sorted(r.asked.user for r, n in before.items() if r.preemptions > n) == preempted
            assert len(scheduler.waiting) == waiting
            preemptions += len(preempted)
        assert scheduler.idle and not arrivals
    assert preemptions > 50, "memory was short in some of them"
