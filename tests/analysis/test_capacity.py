"""The headline says what the knees support and nothing more; ratios and memory by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.capacity import capacity_lines, memory_split
from harness.analysis.compare import Estimate
from harness.analysis.headline import at_one_load, headlines, load_ratio
from harness.analysis.knee import find_knee, find_knees
from harness.records import Knee, SweepPoint
from harness.slo import Slo

SLO = Slo(3.0)

CONCS = (1, 8, 16, 32)


def row(
    precision: str, conc: int, p95_s: float | None = 1.0, tok_s: float | None = 100.0, **more: object
) -> SweepPoint:
    values: dict[str, object] = {"verdict": "valid", **more}
    if tok_s is not None:
        values |= {"tok_s": tok_s, "tok_s_lo": tok_s * 0.99, "tok_s_hi": tok_s * 1.01}
    return SweepPoint("run", precision, conc, p95_ms=None if p95_s is None else p95_s * 1e3, **values)  # type: ignore[arg-type]


def curve(precision: str, p95_s: tuple[float | None, ...], tok_s: float = 100.0, **more: object) -> list[SweepPoint]:
    return [row(precision, conc, p95, tok_s, **more) for conc, p95 in zip(CONCS, p95_s, strict=False)]


def said(points: list[SweepPoint]) -> list[str]:
    return headlines(points, find_knees(points, SLO), "X")


def test_gain() -> None:
    """BF16: 1.5 s at 8, 6 s at 16: crosses half-way on logs at 8√2 = 11.3. AWQ one step later: 22.6. Ratio 2.0."""
    (sentence,) = said(curve("bf16", (1, 1.5, 6, 9)) + curve("awq", (1, 1, 1.5, 6)))
    assert sentence == (
        "On X, AWQ sustains 2.0× more users than BF16 at p95 ≤ 3 s (knees 11 → 23, interval 1.00–4.00× with the width "
        "of the tested brackets; safe to promise: 8 → 16)."
    )


def test_gain_beyond_the_range_is_at_least() -> None:
    """32 safe over a crossing at 8√2 = 11.3: at least 2.8."""
    (sentence,) = said(curve("bf16", (1, 1.5, 6, 9)) + curve("awq", (1, 1, 1, 1)))
    assert "AWQ sustains at least 2.8× more users than BF16" in sentence
    assert "BF16 leaves at 11, between 8 and 16; AWQ holds up to 32 with no knee in range" in sentence


@pytest.mark.parametrize("base", [(1, 1, 1, 1), (1, 1, 1.5, 6)])
def test_no_gain(base: tuple[float, ...]) -> None:
    (sentence,) = said(curve("bf16", base) + curve("awq", (1, 1.5, 6, 9)))
    assert "AWQ brings no gain: it sustains fewer users than BF16" in sentence


def test_same_bracket_shows_no_gain_in_users() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 2.8, 6)) + curve("awq", (1, 1, 1.5, 4), tok_s=150.0))
    assert "no gain in users of AWQ over BF16 at p95 ≤ 3 s is shown" in sentence
    assert "(BF16 between 16 and 32, AWQ between 16 and 32)" in sentence
    assert sentence.endswith("At 16 users AWQ delivers 1.50× the tokens per second of BF16 (1.48–1.52×).")


def test_both_inside_the_whole_range_compares_tokens() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1, 1)) + curve("awq", (1, 1, 1, 1), tok_s=80.0))
    assert "not decided: both stay inside it over the whole tested range (up to 32 users)" in sentence
    assert sentence.endswith("At 32 users AWQ delivers only 0.80× the tokens per second of BF16 (0.79–0.81×): no gain.")


def test_equal_servers_show_no_gain() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1, 1)) + curve("awq", (1, 1, 1, 1)))
    assert sentence.endswith("it delivers 1.00× the tokens per second (0.99–1.01×): no gain shown.")


def test_baseline_never_inside_gives_no_ratio() -> None:
    (sentence,) = said(curve("bf16", (4, 5, 6, 9)) + curve("awq", (1, 1, 1.5, 6)))
    assert sentence == "On X, AWQ sustains 16 users at p95 ≤ 3 s; BF16 misses it even at 1 user: no ratio."


def test_other_never_inside_is_no_gain() -> None:
    (sentence,) = said(curve("bf16", (1, 1, 1.5, 6)) + curve("awq", (4, 5, 6, 9)))
    assert sentence == "On X, AWQ brings no gain: it misses p95 ≤ 3 s even at 1 user, while BF16 sustains 16."


def test_neither_inside() -> None:
    (sentence,) = said(curve("bf16", (4, 5)) + curve("awq", (4, 5)))
    assert "neither BF16 nor AWQ safely meets p95 ≤ 3 s at any tested concurrency" in sentence


def test_verdicts_are_mentioned_and_invalid_rows_not_used() -> None:
    points = curve("bf16", (1, 1, 1, 9)) + curve("awq", (1, 1, 1, 1))
    points[-1] = row("awq", 32, 1.0, verdict="invalid", verdict_reasons=("errors",))
    points[-2] = row("awq", 16, 1.0, verdict="suspect")
    (sentence,) = said(points)
    assert "not told apart (BF16 between 16 and 32, AWQ above 16)" in sentence
    assert sentence.endswith("Suspect rows: AWQ at 16. Invalid and left out: AWQ at 32.")


def test_precision_without_a_usable_row() -> None:
    (sentence,) = said(curve("bf16", (1, 1)) + curve("awq", (None, None), verdict="invalid"))
    assert sentence.startswith("On X, AWQ against BF16 is not decided: no usable p95 for AWQ.")


def test_one_precision_alone() -> None:
    (sentence,) = said(curve("awq", (1, 1, 1.5, 6)))
    assert sentence == "On X, AWQ sustains 16 users at p95 ≤ 3 s; its knee is at 23 (between 16 and 32)."


def test_three_precisions_get_a_sentence_each_against_bf16() -> None:
    flat = (1, 1, 1, 1)
    sentences = said(curve("gptq", flat) + curve("bf16", flat) + curve("awq", flat))
    assert ["GPTQ gains over BF16" in sentences[0], "AWQ gains over BF16" in sentences[1]] == [True, True]


def test_without_bf16_the_first_is_the_baseline() -> None:
    assert "GPTQ gains over AWQ" in said(curve("awq", (1, 1)) + curve("gptq", (1, 1)))[0]


def rates(precision: str, p95_s: tuple[float, ...], tok_s: float = 100.0, **more: object) -> list[SweepPoint]:
    """An open loop at 0.5, 1, 2.5 and 5 requests a second."""
    pairs = zip((0.5, 1.0, 2.5, 5.0), p95_s, strict=False)
    return [row(precision, 0, p95, tok_s, arrivals="poisson", rate_rps=rate, **more) for rate, p95 in pairs]


@pytest.mark.parametrize(
    ("base", "other", "part"),
    [
        (
            (1, 1.5, 6, 9), (1, 1, 1, 9),
            "AWQ sustains 2.2× more requests per second than BF16 at p95 ≤ 3 s (knees 1.58 → 3.54, interval 1.00–5.00× "
            "with the width of the tested brackets; safe to promise: 1 → 2.5).",
        ),
        (
            (1, 1.5, 6, 9), (1, 1, 1, 1),
            "AWQ sustains at least 3.2× more requests per second than BF16 at p95 ≤ 3 s (BF16 leaves at 1.58, between "
            "1 and 2.5; AWQ holds up to 5 with no knee in range",
        ),
        ((1, 1, 1, 1), (1, 1.5, 6, 9), "it sustains fewer requests per second than BF16 at p95 ≤ 3 s"),
        ((1, 1, 1, 1), (1, 1, 1, 1), "over the whole tested range (up to 5 req/s)"),
        ((1, 1, 1, 1), (1, 1, 1, 1), "At 5 req/s it delivers 1.00× the tokens per second"),
        ((1, 1, 2.8, 6), (1, 1, 1.5, 4), "finer rates or more requests would decide."),
        ((4, 5, 6, 9), (1, 1, 1.5, 6), "AWQ sustains 2.5 req/s at p95 ≤ 3 s; BF16 misses it even at 0.5 req/s"),
        ((1, 1, 1.5, 6), (4, 5, 6, 9), "misses p95 ≤ 3 s even at 0.5 req/s, while BF16 sustains 2.5."),
        ((4, 5, 6, 9), (4, 5, 6, 9), "at any tested rate: no gain in requests per second can be claimed."),
    ],
)  # fmt: skip
def test_open_loops_speak_of_requests_per_second(base: tuple[float, ...], other: tuple[float, ...], part: str) -> None:
    """Crossings by hand: BF16 at 2.5^(1/2) = 1.58; AWQ at 2.5 · 2^(ln 3 / ln 9) = 2.5 · √2 = 3.54: 2.2 times."""
    (sentence,) = said(rates("bf16", base) + rates("awq", other))
    assert part in sentence
    assert "user" not in sentence and "concurrenc" not in sentence


@pytest.mark.parametrize(
    ("p95_s", "part"),
    [
        ((1, 1, 1.5, 6), "AWQ sustains 2.5 req/s at p95 ≤ 3 s; its knee is at 3.54 (between 2.5 and 5)."),
        ((1, 1, 1, 1), "sustains 5 req/s at p95 ≤ 3 s, the largest usable rate tested: no knee in range."),
        ((4, 5, 6, 9), "misses p95 ≤ 3 s at every tested rate, 0.5 req/s included."),
    ],
)
def test_one_precision_alone_in_an_open_loop(p95_s: tuple[float, ...], part: str) -> None:
    (sentence,) = said(rates("awq", p95_s))
    assert part in sentence


def test_verdicts_in_an_open_loop_name_rates() -> None:
    points = [*rates("awq", (1, 1)), row("awq", 0, 1.0, verdict="invalid", arrivals="poisson", rate_rps=2.5)]
    assert said(points)[0].endswith("Invalid and left out: AWQ at 2.5 req/s.")


def test_a_row_that_was_measured_again_is_no_caution() -> None:
    points = [*curve("awq", (1,)), row("awq", 8, 1.0, verdict="invalid"), row("awq", 8, 1.0, attempt=2)]
    assert "Invalid" not in said(points)[0]


def test_one_trace_against_the_slo() -> None:
    """p95 of 2 s [1.8–2.2] keeps 3 s, 2.9 s [2.7–3.1] may, 4 s [3.8–4.2] does not; a failed one has none."""
    points = [
        row(name, 0, p95, verdict=verdict, arrivals="trace", rate_rps=2.5, p95_ms_lo=low * 1e3, p95_ms_hi=high * 1e3)
        for name, p95, low, high, verdict in (
            ("awq", 2.0, 1.8, 2.2, "valid"), ("bf16", 4.0, 3.8, 4.2, "valid"),
            ("rtn", 2.9, 2.7, 3.1, "valid"), ("bad", 1.0, 1.0, 1.0, "invalid"),
        )
    ]  # fmt: skip
    assert said(points) == []
    assert at_one_load(points, SLO, "X") == [
        "On X, BF16 misses p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 4 s (3.8–4.2 s).",
        "On X, AWQ keeps p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 2 s (1.8–2.2 s).",
        "On X, RTN may keep or miss p95 ≤ 3 s on this trace, 2.5 req/s: its p95 is 2.9 s (2.7–3.1 s).",
        "On X, BAD has no usable p95 for this trace. Invalid and left out: BAD at 2.5 req/s.",
    ]


def test_repeats_compare_their_tokens_in_pairs() -> None:
    """Sessions of 100, 200, 400 against 110, 220, 440: apart nothing is known, in pairs it is 1.1 each time."""
    points = [
        row(name, 8, 1.0, speed * gain, repeat=repeat)
        for name, gain in (("bf16", 1.0), ("awq", 1.1))
        for repeat, speed in ((1, 100.0), (2, 200.0), (3, 400.0))
    ]
    (sentence,) = said(points)
    assert sentence.endswith("At 8 users AWQ delivers 1.10× the tokens per second of BF16 (1.10–1.10×).")


def test_load_ratio_by_hand() -> None:
    """20 [16–32] against 40 [32–64]: 2, from 32/32 = 1 to 64/16 = 4."""
    base, other = Knee("bf16", "p95 ≤ 3 s", 16, 20.0, 16.0, 32.0), Knee("awq", "p95 ≤ 3 s", 32, 40.0, 32.0, 64.0)
    assert load_ratio(base, other) == Estimate(2.0, 1.0, 4.0)


def test_memory_counts_rows_whose_load_was_invalid() -> None:
    points = [
        row("awq", 8, verdict="invalid", weights_gib=2.0, kv_cache_gib=10.0, kv_cache_tokens=9, memory_kind="gpu")
    ]
    (line,) = memory_split(points)
    assert (line.weights_gib, line.total_gib, line.kind) == (2.0, 12.0, "gpu")


def test_capacity_line_is_the_operating_point() -> None:
    points = curve("awq", (1, 1, 1.5, 6), weights_gib=2.0)
    (line,) = capacity_lines(points, [find_knee(points, SLO)])
    assert (line.users, line.p95_ms, line.weights_gib, line.verdict) == (16, 1500.0, 2.0, "valid")


def test_capacity_line_without_an_operating_point_keeps_the_memory() -> None:
    points = curve("awq", (4, 5), weights_gib=2.0)
    (line,) = capacity_lines(points, [find_knee(points, SLO)])
    assert (line.users, line.tok_s, line.weights_gib) == (None, None, 2.0)


p95s = st.lists(st.floats(0.1, 12), min_size=4, max_size=4)


@given(p95s, p95s)
def test_swapping_the_two_never_gives_a_gain_both_ways(one: list[float], two: list[float]) -> None:
    forward = said(curve("bf16", tuple(one)) + curve("awq", tuple(two)))[0]
    backward = said(curve("bf16", tuple(two)) + curve("awq", tuple(one)))[0]
    assert not ("more users" in forward and "more users" in backward)
    if "more users" in forward:
        assert "no gain" in backward
