"""The engine's token count against ours, by hand and with counts that vLLM 0.32.0 gave."""

from __future__ import annotations

import pytest

from harness.analysis.counters import GAP_SHARE, Counted, counted, counter_gap, disagreement
from harness.records import Phase, RequestRecord


@pytest.mark.parametrize(
    ("engine", "client", "allowance", "gap"),
    [
        (1000, 1000, 0, 0.0),
        (1100, 1000, 0, 0.1),  # somebody else, or lost tokens
        (900, 1000, 0, -0.1),
        (1016, 1000, 16, 0.0),  # two requests were cut
        (1000, 1000, 16, 0.0),  # and the engine noticed at once
        (1116, 1000, 16, 0.1),
        (900, 1000, 500, -0.1),  # no cut request makes the engine count less
        (None, 1000, 0, None),
        (1000, 0, 0, None),
        (0, 0, 0, None),
    ],
)
def test_gap_by_hand(engine: int | None, client: int, allowance: int, gap: float | None) -> None:
    assert counter_gap(engine, client, allowance) == (None if gap is None else pytest.approx(gap))


def record(
    tokens: int, phase: Phase = "measured", error: str | None = None, *, usage: bool = True, ids: bool = True
) -> RequestRecord:
    """A request for 100 tokens with a prompt of 30."""
    return RequestRecord(
        cell="c",
        user=0,
        sequence=0,
        phase=phase,
        intended_ns=0,
        input_tokens_asked=30,
        output_tokens_asked=100,
        prompt_tokens=31 if usage else None,
        completion_tokens=tokens if usage else None,
        chunk_ids=ids,
        chunk_us=(1,) if tokens else (),
        chunk_tokens=(tokens,) if tokens else (),
        error=error,
    )


def test_whatever_was_received_counts() -> None:
    records = [
        record(100, "warmup"),
        record(100),
        record(100, ids=False),
        record(100, "held"),
        record(40, "held", "cut", usage=False),  # the engine counted those 40, maybe a few more, and its prompt
        record(0, "measured", "timeout", usage=False),
        record(100, usage=False),  # ended well at a server that sends no usage
    ]
    assert counted(records) == Counted(
        generation_tokens=540, generation_allowance=16, prompt_tokens=4 * 31, prompt_allowance=90
    )
    assert counted([]) == Counted(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("requests", "received", "engine"),
    [(8, 1676, 1684), (8, 1209, 1209), (32, 4917, 4948), (32, 4659, 4676)],
)
def test_requests_cut_on_a_real_engine_make_no_gap(requests: int, received: int, engine: int) -> None:
    """Streams of vLLM 0.32.0 (CPU, the demo model), all cut at once: tokens received, and what it had counted."""
    ours = counted(
        [record(received // requests, "held", "cut", usage=False) for _ in range(requests - 1)]
        + [record(received - received // requests * (requests - 1), "held", "cut", usage=False)]
    )
    assert ours.generation_tokens == received
    gap = counter_gap(engine, ours.generation_tokens, ours.generation_allowance)
    assert gap == 0.0
    assert disagreement(gap, counter_gap(30 * requests, ours.prompt_tokens, ours.prompt_allowance)) is None


@pytest.mark.parametrize(
    ("generation", "prompt", "reason"),
    [
        (0.0, 0.0, None),
        (None, None, None),
        (GAP_SHARE, GAP_SHARE, None),
        (-GAP_SHARE, 0.0, None),
        (0.2, 0.2, "foreign_load"),
        (0.2, 0.001, "foreign_load"),  # short prompts beside our long ones
        (0.0, 0.2, "foreign_load"),  # long prompts, short answers: they take the prefill
        (0.2, None, "foreign_load"),
        (0.2, 0.0, "tokens_lost"),
        (-0.2, 0.0, "counters_short"),
        (0.0, -0.5, "counters_short"),
        (-0.5, None, "counters_short"),
    ],
)
def test_what_a_disagreement_says(generation: float | None, prompt: float | None, reason: str | None) -> None:
    assert disagreement(generation, prompt) == reason
