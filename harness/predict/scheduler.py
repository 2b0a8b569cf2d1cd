"""vLLM's continuous batching in virtual time: who runs in which step, and when each token comes.

    Load ─► arrivals ─► waiting ─► running ─► a step takes StepTime ─► tokens ─► Served ─► Load (closed loops)
                           ▲──preempted──┘

One set of rules, `Scheduler.next_step`, serves the simulation and the real-time server. They are those of vLLM's own
scheduler (vllm/v1/core/sched/scheduler.py, read at 0.32; tests/predict/test_scheduler.py runs it beside ours):

1. Running requests come first, in order of admission; one that decodes takes 1 of max_num_batched_tokens, a prompt
   that is not yet whole takes what is left. Blocks are taken as tokens are computed. Where none is free, the last
   running request is preempted: its blocks are free, it waits in front and later recomputes prompt and answer.
2. Then waiting ones, first come first served, while there is budget, a place among max_num_seqs and room for the
   whole prompt. The budget's end cuts a prompt: it goes on in the next step. vLLM admits none in a step that preempted,
   which needs no rule here: the one in front was preempted for want of more blocks than it gave back.

Each running request took at least one token when it was admitted, so there are never more than the budget, and none
that decodes is ever left out of a step. Only the last one's prompt can be unfinished, and running before waiting is the
order of arrival, preempted or not.

With chunked_prefill=False it is the engine before V1 (vllm/core/scheduler.py of 0.7): waiting prompts go first, whole,
and while one does, decodes wait.

Left out, for our loads have none of it: a prefix cache (prompts are new), sliding windows, several sequences a request,
priorities, swapping. Simplified: the engine before V1 wants one block more to be free for a sequence that decodes (one
of hundreds); versions before rule 2's "whole prompt" admit a little earlier and preempt instead; with asynchronous
scheduling (a default of newer versions) a step is planned while the one before still runs, so an arrival can wait one
step longer than here: milliseconds of TTFT. `kv_blocks` are usable ones: vLLM counts one more, which stays empty.

Decode steps with the same sequences are leapt over: k of them take a·k + b·(C·k + n·k·(k−1)/2), where C is the context
of the n sequences before the first. A leap ends where anything can change: a sequence ends, an arrival, no block free.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from functools import cache
from typing import NamedTuple

from harness.predict.blocks import Blocks
from harness.predict.limits import Asked, Limits, Load, StepTime
from harness.predict.stretches import Served, Simulation, Stay, Stretch

__all__ = ["Asked", "Limits", "Load", "Request", "Scheduler", "Served", "Simulation", "Step", "StepTime", "simulate"]


class Request:
    """A request inside the scheduler; `asked` and `preemptions` are for readers, the rest is the scheduler's."""

    __slots__ = (
        "asked",
        "computed",
        "ends",
        "first_s",
        "number",
        "origin",
        "preemptions",
        "scheduled_s",
        "stays",
        "tokens",
    )

    def __init__(self, asked: Asked, number: int) -> None:
        self.asked = asked
        self.number = number  # in the order of arrival
        self.tokens = asked.input_tokens  # to compute before the next token comes: the prompt, and the answer so far
        self.computed = 0  # of them, while the prompt is not whole
        self.origin = 0  # while it decodes: cached tokens = origin + number of the next decode step
        self.ends = -1  # while it decodes: number of the decode step before which it is over
        self.first_s = 0.0  # of this stay
        self.scheduled_s: float | None = None
        self.preemptions = 0
        self.stays: list[Stay] = []


class Step(NamedTuple):
    """One step, or several alike (`stretch.steps`). Each gives a token to every request of `given`, at its end."""

    stretch: Stretch
    given: list[Request]
    ended: list[Served]
    """Those of them that have their last token now, in the order of arrival."""


class Scheduler:
    """Who waits, who runs and what is cached. It knows no clock: `next_step` is told when the step begins.

    A request counts as arrived when it is added. All that a step does has happened when next_step returns: a server in
    real time waits until the step's end before it tells its clients.
    """

    def __init__(self, limits: Limits, steps: StepTime) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._steps = steps
        self._decode_time = cache(steps.decode)
        self._blocks = Blocks(limits.kv_blocks, limits.block_size)
        self._least_free = limits.kv_blocks
        self._requests = 0
        self._unfinished: Request | None = None  # the last running one, while its prompt is not whole
        self._decodes = 0  # decode steps so far: the number of the next one
        self._origins = 0  # sum over those that decode: their context = _origins + how many · _decodes
        self._ends: list[tuple[int, int, Request]] = []  # heap of (ends, number); preempted ones stay, and are skipped

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def kv_usage(self) -> float:
        """Share of the blocks in use."""
        return (self._blocks.total - self._blocks.free) / self._blocks.total

    @property
    def kv_peak(self) -> float:
        """The largest share that a step has held so far."""
        return (self._blocks.total - self._least_free) / self._blocks.total

    def add(self, asked: Asked) -> Request:
        """A request arrives at the scheduler. InputError where it could never be served."""
        self.limits.check(asked)
        request = Request(asked, self._requests)
        self._requests += 1
        self.waiting.append(request)
        return request

    def drop(self, request: Request) -> None:
        """Forgets a request whose client has gone; nothing happens where it is over."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._release(request)
            self.running.remove(request)

    def next_step(self, now: float, until: float | None = None) -> Step:
        """The step that begins now; some request must wait or run.

        until: repeat it as long as nothing changes and up to the first step that ends then or later; None: one step.
        """
        limits = self.limits
        if limits.chunked_prefill:
            self._make_room()
            decoding = len(self.running) - (self._unfinished is not None)
            budget = limits.max_num_batched_tokens - decoding
            chunks = self._go_on(budget)
            self._admit(now, chunks, budget - sum(chunk for _, chunk in chunks))
        else:
            chunks = []
            self._admit(now, chunks, limits.max_num_batched_tokens)
            if not chunks:
                self._make_room()
            decoding = 0 if chunks else len(self.running)

        given = self.running[:decoding]
        context = self._origins + decoding * self._decodes if decoding else 0
        if chunks:
            prompt, pairs = 0, 0
            for request, chunk in chunks:
                prompt += chunk
                pairs += chunk * request.computed + chunk * (chunk + 1) // 2
                request.computed += chunk
            whole = [request for request, _ in chunks if request.computed == request.tokens]
            given += whole
            first_s = self._steps.mixed(decoding, context, prompt, pairs, len(whole))
            stretch = Stretch(now, len(given), 1, first_s, 0.0, decoding)
            now += first_s
            self._decodes += decoding > 0
            for request in whole:
                self._begin_decoding(request, now)
            self._unfinished = None if chunks[-1][0] in whole else chunks[-1][0]
        else:
            base, slope = self._decode_time(decoding)
            stretch = Stretch(now, decoding, 1, base + slope * context, slope * decoding, decoding)
            if until is not None:
                stretch = self._leap(stretch, until)
            now = stretch.end_s
            self._decodes += stretch.steps
        self._least_free = min(self._least_free, self._blocks.free)
        return Step(stretch, given, self._end(now))

    def _make_room(self) -> None:
        """Takes the blocks that one decode step needs, in order; where none is free the last request makes room."""
        blocks = self._blocks
        if blocks.take(blocks.needed(self._decodes, 1)):
            return
        at = 0
        while at < len(self.running) and (request := self.running[at]) is not self._unfinished:
            if (request.origin + self._decodes) % blocks.size == 0:
                while not blocks.take(1):
                    if self._preempt() is request:
                        return
            at += 1

    def _go_on(self, budget: int) -> list[tuple[Request, int]]:
        """The next chunk of the prompt that is not whole, if there is one. Without blocks for it, it is the last to
        run and so makes room itself."""
        request = self._unfinished
        if request is None:
            return []
        chunk = min(request.tokens - request.computed, budget)
        holding = self._blocks.holding
        if not self._blocks.take(holding(request.computed + chunk) - holding(request.computed)):
            self._preempt()
            return []
        return [(request, chunk)]

    def _admit(self, now: float, chunks: list[tuple[Request, int]], budget: int) -> None:
        """Waiting requests begin to run, and their chunks join `chunks`."""
        limits, blocks = self.limits, self._blocks
        while self.waiting and budget > 0 and len(self.running) < limits.max_num_seqs:
            request = self.waiting[0]
            if blocks.holding(request.tokens) + limits.spare_blocks > blocks.free:
                break
            if not limits.chunked_prefill and request.tokens > budget:
                break
            chunk = min(request.tokens, budget)
            blocks.take(blocks.holding(chunk))
            budget -= chunk
            chunks.append((request, chunk))
            self.running.append(self.waiting.popleft())
            if request.scheduled_s is None:
                request.scheduled_s = now

    def _leap(self, stretch: Stretch, until: float) -> Stretch:
        """The same step so often that a request ends, the blocks end, or it is `until`, whichever is first."""
        while self._ends[0][2].ends != self._ends[0][0]:
            heapq.heappop(self._ends)
        steps = self._ends[0][0] - self._decodes
        if until < stretch.after(steps):
            steps = stretch.steps_until(until)
        blocks = self._blocks
        if not blocks.take(blocks.needed(self._decodes + 1, steps - 1)):
            steps = 1 + blocks.lasting(self._decodes + 1)
            blocks.take(blocks.needed(self._decodes + 1, steps - 1))
        return stretch._replace(steps=steps)

    def _begin_decoding(self, request: Request, now: float) -> None:
        """Its prompt is computed and gave a token; the next decode step gives it the next."""
        request.first_s = now
        request.origin = request.tokens - self._decodes
        # The last token is given, never cached: before the decode step that is not needed any more, this is cached.
        request.ends = request.asked.input_tokens + request.asked.output_tokens - 1 - request.origin
        self._origins += request.origin
        self._blocks.join(self._decodes, request.tokens)
        heapq.heappush(self._ends, (request.ends, request.number, request))

    def _release(self, request: Request) -> None:
        """A running request gives back its blocks, and what it has got of its answer is noted."""
        cached = request.computed
        if request is self._unfinished:
            self._unfinished = None
        else:
            cached = request.origin + self._decodes
            request.stays.append(Stay(request.first_s, request.tokens - request.origin, cached - request.tokens))
            request.tokens = cached + 1
            request.ends = -1
            self._origins -= request.origin
            self._blocks.leave(self._decodes, cached)
        request.computed = 0
        self._blocks.give(self._blocks.holding(cached))

    def _preempt(self) -> Request:
        """The last running request makes room, and waits in front."""
        request = self.running.pop()
        self._release(request)
        self.waiting.appendleft(request)
        request.preemptions += 1
        self.preemptions += 1
        return request

    def _end(self, now: float) -> list[Served]:
        """Those whose last token comes now."""
        ended: list[Served] = []
        while self._ends and self._ends[0][0] <= self._decodes:
            ends, _, request = heapq.heappop(self._ends)
            if request.ends != ends:
                continue
            self.running.remove(request)
            self._release(request)
            asked, late = request.asked, self.limits.token_s
            assert request.scheduled_s is not None
            ended.append(
                Served(
                    asked.arrival_s,
                    asked.input_tokens,
                    asked.output_tokens,
                    asked.user,
                    asked.sequence,
                    request.scheduled_s,
                    request.stays[0].first_s + late,
                    now + late,
                    request.preemptions,
                    tuple(request.stays),
                )
            )
        return ended


def simulate(load: Load, limits: Limits, steps: StepTime) -> Simulation:
    """Serves a load to its end. InputError, before anything runs where it is known, for what could never be served."""
    first = list(load.first())
    for asked in first:
        limits.check(asked)
    arrivals = [(asked.arrival_s + limits.request_s, number, asked) for number, asked in enumerate(first)]
    heapq.heapify(arrivals)
    asked_for = len(first)

    scheduler = Scheduler(limits, steps)
    served: list[Served] = []
    stretches: list[Stretch] = []
    running_peak = waiting_peak = step_count = 0
    now, busy_s = 0.0, 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            scheduler.add(heapq.heappop(arrivals)[2])
        stretch, given, ended = scheduler.next_step(now, arrivals[0][0] if arrivals else math.inf)
        stretches.append(stretch)
        step_count += stretch.steps
        # Those that ended ran in this step too.
        running_peak = max(running_peak, len(scheduler.running) + len(ended))
        waiting_peak = max(waiting_peak, len(scheduler.waiting))
        busy_s += stretch.end_s - now
        now = stretch.end_s
        for answer in ended:
            served.append(answer)
            question = load.after(answer)
            if question is not None:
                if question.arrival_s < answer.last_token_s:
                    raise ValueError(f"a user asks at {question.arrival_s} s, before the answer's end: {answer}")
                heapq.heappush(arrivals, (question.arrival_s + limits.request_s, asked_for, question))
                asked_for += 1
    return Simulation(
        served,
        step_count,
        scheduler.preemptions,
        running_peak,
        waiting_peak,
        scheduler.kv_peak,
        busy_s,
        now,
        limits.token_s,
        stretches,
    )
