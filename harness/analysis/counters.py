"""The engine's own token count against ours, over a whole cell: warm-up, window and drain.

They must agree. The engine counted more: somebody else used it, or tokens were made that never reached us. It counted
less: these are not the counters of the server that answered us (one replica behind a balancer), or it was restarted.

vLLM counts a token when it hands it to the stream, and a prompt with its first token, once a request, cached or not,
preempted or not. Of a request that is cut it counts what it makes until it notices: vLLM 0.32.0 (CPU, loopback) at most
one token for each of 8 or 32 requests cut at once, while the counts of requests that ended by themselves agreed to the
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.analysis import metrics
from harness.records import RequestRecord

GAP_SHARE = 0.01
"""Beyond this the counts disagree. They have no noise of their own; as much foreign load moves tok_s as much."""
CUT_TOKENS = 8
"""Tokens that a request may go on for after we cut it: 80 ms of way and notice at 10 ms a token."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What we received and asked in a cell, and how much more the engine may have counted for it."""

    generation_tokens: int
    generation_allowance: int
    prompt_tokens: int
    prompt_allowance: int


def counted(records: Sequence[RequestRecord]) -> Counted:
    """Over all records of a cell, of whatever phase, the failed and the cut ones too: the engine counted those as well.

    Prompts are the server's count. It comes with the end of a stream; where that did not come, what was asked may or
    may not have been counted, and so is allowed.
    """
    failed = [record for record in records if record.error is not None]
    return Counted(
        generation_tokens=sum(metrics.output_tokens(record) for record in records),
        generation_allowance=CUT_TOKENS * len(failed),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in records),
        prompt_allowance=sum(record.input_tokens_asked for record in records if record.prompt_tokens is None),
    )


def counter_gap(engine_tokens: int | None, client_tokens: int, allowance: int) -> float | None:
    """(tokens that the engine counted - tokens that we received) / tokens received; above 0: it counted more.

    A surplus is taken as 0 up to `allowance`, and less it beyond; a deficit has no excuse. None without counters, and
    where we received nothing.
    """
    if engine_tokens is None or client_tokens <= 0:
        return None
    surplus = engine_tokens - client_tokens
    return (max(0, surplus - allowance) if surplus > 0 else surplus) / client_tokens


def disagreement(generation_gap: float | None, prompt_gap: float | None) -> str | None:
    """The verdict's reason to suspect a point, from the gaps of both counts; None where they agree or are not known.

    foreign_load     the engine read prompts that we did not send
    tokens_lost      it made tokens for our prompts alone, and they did not reach us
    counters_short   it counted less than we received: they are not (all) the counters of what answered us
    """
    gaps = [gap for gap in (generation_gap, prompt_gap) if gap is not None]
    if any(gap < -GAP_SHARE for gap in gaps):
        return "counters_short"
    if all(gap <= GAP_SHARE for gap in gaps):
        return None
    return "tokens_lost" if prompt_gap is not None and prompt_gap <= 0 else "foreign_load"
