"""The scheduler against a clock that the test holds: the same tokens at the same times as in virtual time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from harness.predict.limits import Asked, Limits, Load
from harness.predict.realtime import Realtime, State
from harness.predict.scheduler import simulate
from harness.predict.stretches import Served

Times = dict[tuple[int, int], list[float]]
"""When each token reaches its client, of each (user, sequence)."""


@dataclass(frozen=True)
class Plain:
    """Step times linear in everything; powers of two keep sums exact, so that ties are ties."""

    base_s: float = 1.0
    context_s: float = 0.0
    prompt_s: float = 0.0

    def decode(self, sequences: int) -> tuple[float, float]:
        return self.base_s, self.context_s

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        return self.base_s + self.context_s * context + self.prompt_s * prompt


@dataclass
class Users:
    """Each asks its questions one after the other, at once, or at the times that are given (an open loop)."""

    lengths: Sequence[Sequence[tuple[int, int]]]
    at_s: Sequence[float] = field(default=())

    def first(self) -> Iterable[Asked]:
        times = self.at_s or [0.0] * len(self.lengths)
        return [Asked(times[user], *turns[0], user, 0) for user, turns in enumerate(self.lengths)]

    def after(self, served: Served) -> Asked | None:
        return self.next(served.user, served.sequence, served.last_token_s)

    def next(self, user: int, sequence: int, now: float) -> Asked | None:
        turns = self.lengths[user][sequence + 1 :]
        return Asked(now, *turns[0], user, sequence + 1) if turns else None


def in_virtual_time(load: Load, limits: Limits, steps: Plain) -> Times:
    simulation = simulate(load, limits, steps)
    return {(item.user, item.sequence): list(simulation.token_times(item)) for item in simulation.served}


def in_real_time(load: Users, limits: Limits, steps: Plain) -> Times:
    """With a clock that stands still until something is due."""
    engine, now, times = Realtime(limits, steps), 0.0, defaultdict[tuple[int, int], list[float]](list)
    for asked in load.first():
        engine.ask(asked)
    while engine.due_s < math.inf:
        now = max(now, engine.due_s)
        while (tokens := engine.advance(now)) is not None:
            assert tokens.at_s == now, "tokens that nobody was late for"
            for request in tokens.requests:
                asked = request.asked
                times[asked.user, asked.sequence].append(tokens.at_s)
                if len(times[asked.user, asked.sequence]) == asked.output_tokens:
                    question = load.next(asked.user, asked.sequence, now)
                    if question is not None:
                        engine.ask(question)
    assert engine.state(now) == State(0, 0, 0.0, engine.state(now).preemptions)
    return dict(times)


def same(one: Times, other: Times) -> None:
    assert one.keys() == other.keys()
    for key, times in one.items():
        assert len(times) == len(other[key])
        assert times == pytest.approx(other[key], rel=0, abs=1e-9)


lengths = st.tuples(st.integers(1, 40), st.integers(1, 24))
loads = st.lists(st.lists(lengths, min_size=1, max_size=3), min_size=1, max_size=8)
limits_of = st.builds(
    Limits,
    kv_blocks=st.integers(18, 40),
    block_size=st.just(4),
    max_num_seqs=st.sampled_from([1, 3, 256]),
    max_num_batched_tokens=st.sampled_from([8, 32, 64]),
    chunked_prefill=st.just(True),
    request_s=st.sampled_from([0.0, 0.5, 3.0]),
    token_s=st.sampled_from([0.0, 0.25, 4.0]),
)
steps_of = st.builds(Plain, context_s=st.sampled_from([0.0, 2**-6]), prompt_s=st.sampled_from([0.0, 2**-4]))


@settings(max_examples=150, deadline=None)
@given(loads, limits_of, steps_of)
def test_as_in_virtual_time(turns: list[list[tuple[int, int]]], limits: Limits, steps: Plain) -> None:
    """Closed loops, with ties, chunks and preemptions: each token of each request, to 1e-9."""
    load = Users(turns)
    same(in_real_time(load, limits, steps), in_virtual_time(load, limits, steps))


@pytest.mark.parametrize("chunked", [True, False])
def test_as_in_virtual_time_with_preemptions(chunked: bool) -> None:
    """Twelve requests of 20 + 30 tokens want 156 blocks of 4 where there are 40: some recompute, in both alike."""
    load = Users([[(20, 30)] * 2] * 6)
    limits = Limits(40, 4, max_num_batched_tokens=64, chunked_prefill=chunked, request_s=0.3, token_s=0.07)
    steps = Plain(0.011, 1.3e-5, 1.7e-4)
    assert simulate(load, limits, steps).preemptions > 0
    same(in_real_time(load, limits, steps), in_virtual_time(load, limits, steps))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40), st.integers(1, 24)), min_size=1, max_size=12),
       st.sampled_from([0.7, 2.3, 50.0]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_who_looks_late_finds_the_times_that_were_due(asks: list[tuple[int, int, int]], look_s: float) -> None:
    """An open loop, looked at once in a while: a late look makes tokens late and none of them later."""
    at_s = [at / 8 for at, _, _ in asks]
    load, limits = Users([[(i, o)] for _, i, o in asks], at_s), Limits(24, 4, request_s=0.25)
    engine, times = Realtime(limits, Plain(0.5, 2**-6)), defaultdict[tuple[int, int], list[float]](list)
    coming, look = sorted(load.first(), key=lambda asked: asked.arrival_s), 0
    while coming or engine.due_s < math.inf:
        look += 1
        while coming and coming[0].arrival_s <= look * look_s:
            engine.ask(coming.pop(0))
        while (tokens := engine.advance(look * look_s)) is not None:
            for request in tokens.requests:
                times[request.asked.user, 0].append(tokens.at_s)
    same(dict(times), in_virtual_time(load, limits, Plain(0.5, 2**-6)))


def test_worked_by_hand() -> None:
    """A step takes 1 s, 0.125 s to get in, 0.25 s to get out. A (5 in, 3 out) at 0, B (4 in, 1 out) at 0.5 s.

    A's steps begin at 0.125, 1.125, 2.125 s; B arrives at 0.625 s and is in the second. So A's tokens are out at
    1.375, 2.375, 3.375 s and B's at 2.375 s. Of 10 blocks of 4 tokens A has 2 in each step (5, 6, 7 tokens), and B 1 in
    the second: its 4 tokens, since the fifth is given and never cached.
    """
    engine = Realtime(Limits(10, 4, request_s=0.125, token_s=0.25), Plain())
    a, b = Asked(0.0, 5, 3, 1), Asked(0.5, 4, 1, 2)
    engine.ask(a)
    engine.ask(b)
    assert engine.state(0.1) == State(0, 0, 0.0, 0)
    assert engine.due_s == 0.125
    assert engine.advance(1.0) is None
    assert engine.due_s == 1.125
    assert engine.state(0.6) == State(1, 0, 0.2, 0)
    assert engine.state(1.0) == State(1, 1, 0.2, 0)
    given, states = [], []
    for now in (1.125, 1.375, 2.125, 2.375):
        while (tokens := engine.advance(now)) is not None:
            given.append((tokens.at_s, [request.asked for request in tokens.requests]))
        states.append(engine.state(now))
    assert given == [(1.375, [a]), (2.375, [a, b])]
    assert states == [State(2, 0, pytest.approx(0.3), 0)] * 2 + [State(1, 0, 0.2, 0)] * 2
    assert engine.due_s == 3.375, "the last step ends at 3.125 s, its tokens are out later"
    assert engine.state(3.125) == State(0, 0, 0.0, 0)
    last = engine.advance(3.375)
    assert last is not None and [request.asked for request in last.requests] == [a]
    assert engine.due_s == math.inf


def test_who_has_gone_is_served_no_more() -> None:
    """One is on its way, one waits, one runs, one is getting its last token: whoever stays is served as if alone."""
    limits, steps = Limits(100, 4, max_num_seqs=3, request_s=0.25), Plain()
    stays, runs, ends = Asked(0.0, 8, 6, 0), Asked(0.0, 8, 6, 1), Asked(0.0, 8, 2, 2)
    waits, comes = Asked(0.0, 8, 6, 3), Asked(9.0, 8, 6, 4)
    engine, times = Realtime(limits, steps), defaultdict[Asked, list[float]](list)
    for asked in (stays, runs, ends, waits, comes):
        engine.ask(asked)
    assert engine.advance(0.5) is None
    for asked in (waits, comes):
        engine.drop(asked)
    dropped = False
    while engine.due_s < math.inf:
        now = engine.due_s
        while (tokens := engine.advance(now)) is not None:
            for request in tokens.requests:
                times[request.asked].append(tokens.at_s)
        if now == 1.25 and not dropped:
            dropped = True
            assert engine.state(1.5).running == 3
            engine.drop(runs)
            engine.drop(ends)
            assert engine.state(1.5).running == 2, "the one whose last token is being made holds its place until then"
            assert engine.state(1.5).kv_usage == pytest.approx((3 + 3) / 100), "8 + 1 tokens each"
    assert dropped
    assert times[stays] == [1.25, 2.25, 3.25, 4.25, 5.25, 6.25]
    assert not times[waits] and not times[comes]
    assert len(times[runs]) <= 2
    assert engine.state(99.0) == State(0, 0, 0.0, 0)


def test_who_is_gone_already_can_go_again() -> None:
    engine = Realtime(Limits(10, 4), Plain())
    asked = Asked(0.0, 4, 1, 0)
    engine.ask(asked)
    while engine.due_s < math.inf:
        engine.advance(engine.due_s)
    assert not engine._inside, "a server runs for weeks"
    engine.drop(asked)
    engine.drop(Asked(0.0, 4, 1, 7))
    assert engine.state(9.0) == State(0, 0, 0.0, 0)


def test_what_can_never_be_served_is_refused_at_once() -> None:
    engine = Realtime(Limits(10, 4, max_model_len=30), Plain())
    with pytest.raises(InputError, match="longer than the context"):
        engine.ask(Asked(0.0, 20, 11, 0))
    assert engine.due_s == math.inf
    engine.ask(replace(Asked(0.0, 20, 11, 0), output_tokens=10))
    assert engine.due_s == 0.0
