"""Claims and trials: each claim is forced both ways with made numbers, each formula worked by hand or by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from harness.analysis.claims import AWQ_AGAINST_GPTQ, INT4_AGAINST_BF16, Claim, failures, is_int4, is_method, judge
from harness.analysis.compare import Estimate, compare, rows_ratio
from harness.analysis.sides import MOST, ONE_USER, SAFE, SOME_USERS, Row, Sides, times
from harness.analysis.trials import above, against, below, energy_ratio, equal, fading, more_users, quotient, size
from harness.records import Knee, Ratio, RequestRecord, SweepPoint

LOADS = (1, 8, 16)


def row(precision: str, conc: int, tok_s: float = 100.0, **more: object) -> SweepPoint:
    """A valid row with ± 10 % around tok_s and p99, of a GPU whose engine says everything."""
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.9, "tok_s_hi": tok_s * 1.1, "p99_ms": 900.0, "p99_ms_lo": 810.0, "p99_ms_hi": 990.0,
        "p95_ms": 800.0, "weights_gib": 8.0, "other_gib": 1.0, "kv_cache_gib": 5.0, "kv_cache_tokens": 40_000,
        "memory_kind": "gpu", "kernel": "Marlin", "energy_j_per_token": 0.5, "requests": 100, "verdict": "valid",
        "input_tokens_mean": 128.0, **more,
    }  # fmt: skip
    return SweepPoint("run", precision, conc, tok_s=tok_s, **values)  # type: ignore[arg-type]


def ratio(metric: str, conc: int, value: float, half: float = 0.05) -> Ratio:
    return Ratio("one", "other", conc, metric, value, value - half, value + half, 100, "requests")


def alike(**more: object) -> Sides:
    """Two precisions that differ in nothing, told apart in nothing: the flat run."""
    points = [row(name, conc) for name in ("one", "other") for conc in LOADS]
    ratios = [ratio(metric, conc, 1.0, 0.02) for metric in ("tok_s", "p95_ms", "ttft_p50_ms") for conc in LOADS]
    values: dict[str, object] = {"ratios": ratios, "knees": knees((8, 16), (8, 16)), "failed": {}, **more}
    return Sides("one", "other", points, **values)  # type: ignore[arg-type]


def knees(one: tuple[float, float], other: tuple[float, float]) -> dict[str, Knee]:
    """Crossings in the middle of brackets; the lower end is the safe load."""
    return {
        name: Knee(name, "p95 ≤ 3 s", int(low), (low * high) ** 0.5, low, high, tested_lo=1.0, tested_hi=64.0)
        for name, (low, high) in (("one", one), ("other", other))
    }


def rated(metric: str, value: float, *at: int) -> Sides:
    """The flat run but for one metric, everywhere or at some loads."""
    changed = [
        replace(found, ratio=value, ratio_lo=value * 0.98, ratio_hi=value * 1.02)
        if found.metric == metric and found.conc in (at or LOADS)
        else found
        for found in alike().ratios
    ]
    return alike(ratios=changed)


def with_rows(name: str = "one", **more: object) -> Sides:
    """The flat run but for columns of one side's rows."""
    flat = alike()
    points = [replace(point, **more) if point.precision == name else point for point in flat.points]  # type: ignore[arg-type]
    return replace(flat, points=points)


def p99(value: float) -> Sides:
    return with_rows(p99_ms=900 * value, p99_ms_lo=890 * value, p99_ms_hi=910 * value)


# --- the trials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lo", "hi", "border", "outcome"),
    [
        (1.01, 1.2, 1.0, "supported"),
        (0.8, 0.99, 1.0, "refuted"),
        (0.9, 1.1, 1.0, "undecided"),
        (1.0, 1.2, 1.0, "undecided"),  # touches the border
        (0.8, 1.0, 1.0, "undecided"),
        (1.2, 1.9, 2.0, "refuted"),
        (1.2, 2.1, 2.0, "undecided"),
        (None, None, 1.0, "undecided"),
        (1.5, None, 1.0, "supported"),  # an open end is no doubt on this side
        (None, 0.9, 1.0, "refuted"),
    ],
)
def test_an_interval_against_a_border(lo: float | None, hi: float | None, border: float, outcome: str) -> None:
    assert against(Estimate(1.0, lo, hi), border) == outcome


def test_above_and_below_are_each_other_turned_round() -> None:
    for value, up, down in (
        (1.3, "supported", "refuted"),
        (0.7, "refuted", "supported"),
        (1.01, "undecided", "undecided"),
    ):
        sides = rated("tok_s", value)
        assert (above("tok_s", MOST)(sides).outcome, below("tok_s", MOST)(sides).outcome) == (up, down)


@pytest.mark.parametrize(
    ("value", "half", "outcome"),
    [
        (1.0, 0.04, "supported"),
        (1.0, 0.06, "undecided"),
        (1.03, 0.03, "undecided"),
        (1.2, 0.1, "refuted"),
        (0.8, 0.1, "refuted"),
        (0.97, 0.01, "supported"),
    ],
)
def test_equal_means_the_whole_interval_within_five_percent(value: float, half: float, outcome: str) -> None:
    assert equal("tok_s", MOST)(alike(ratios=[ratio("tok_s", 16, value, half)])).outcome == outcome


def test_loads_that_claims_speak_of() -> None:
    sides = alike(knees=knees((8, 16), (16, 32)))
    assert [where.find(sides) for where in (ONE_USER, SOME_USERS, MOST, SAFE)] == [1, 16, 16, 8]
    beyond = replace(sides, points=[*sides.points, row("one", 64)])
    assert MOST.find(beyond) == 16  # both must have it
    single = replace(sides, points=[point for point in sides.points if point.conc == 8])
    assert [where.find(single) for where in (ONE_USER, SOME_USERS, MOST, SAFE)] == [None, None, None, 8]
    assert SAFE.find(replace(sides, knees={"one": Knee("one", "p95 ≤ 3 s", 8, 9, 8, 16)})) is None
    invalid = replace(sides, points=[replace(point, verdict="invalid") for point in sides.points])
    assert [where.find(invalid) for where in (ONE_USER, MOST, SAFE)] == [None, None, None]


def test_an_open_loop_has_no_users_to_speak_of() -> None:
    points = [replace(point, conc=0, rate_rps=float(point.conc), arrivals="poisson") for point in alike().points]
    sides = alike()
    sides = replace(sides, points=points, ratios=[replace(r, conc=0, rate_rps=float(r.conc)) for r in sides.ratios])
    assert (ONE_USER.find(sides), SOME_USERS.find(sides), MOST.find(sides)) == (None, None, 16.0)
    found = above("tok_s", MOST)(sides)
    assert (found.ratio.value, found.row) == (1.0, Row("points.csv", "one, other", "tok_s", 16.0))


def test_a_quotient_of_two_ratios_by_hand() -> None:
    """1 [0.8–1.25] / 2 [1.6–2.5]: four half-widths of ln 1.25, two on each side: 0.5 × e^∓(√2 ln 1.25)."""
    found = quotient(Estimate(1.0, 0.8, 1.25), Estimate(2.0, 1.6, 2.5))
    assert (found.value, found.lo, found.hi) == pytest.approx((0.5, 0.36469, 0.68553), abs=2e-5)


def test_a_quotient_leans_to_the_ends_that_it_is_made_of() -> None:
    """1 [0.5–1] / 1 [1–1]: all doubt is below, so the upper end is the value."""
    found = quotient(Estimate(1.0, 0.5, 1.0), Estimate(1.0, 1.0, 1.0))
    assert (found.lo, found.value, found.hi) == pytest.approx((0.5, 1.0, 1.0))
    turned = quotient(Estimate(1.0, 1.0, 1.0), Estimate(1.0, 0.5, 1.0))
    assert (turned.lo, turned.hi) == pytest.approx((1.0, 2.0))
    assert quotient(Estimate(), Estimate(1.0)) == Estimate() and quotient(Estimate(1.0), Estimate(2.0)) == Estimate(0.5)


def test_tails_are_compared_by_the_rows_own_intervals() -> None:
    """p99 100 [80–125] against 200 [160–250]: 0.5 × e^∓0.31557, as throughput of two windows in test_compare."""
    one = row("one", 8, p99_ms=100.0, p99_ms_lo=80.0, p99_ms_hi=125.0)
    other = row("other", 8, p99_ms=200.0, p99_ms_lo=160.0, p99_ms_hi=250.0)
    found = rows_ratio("p99_ms", [(other, one)])
    assert (found.value, found.lo, found.hi) == pytest.approx((0.5, 0.36469, 0.68553), abs=2e-5)


def test_energy_of_one_session_each_by_hand() -> None:
    """0.4 J against 1 J, and 200 [190–250] tok/s against 100 [80–105].

    Their ratio: 2 e^−√(ln²(200/190) + ln²(105/100)) = 2 e^−0.07079 = 1.86331, 2 e^+√(2 ln² 1.25) = 2.74210. Fewer
    tokens a second, more joules each: 0.4 × 2 / 2.7421 = 0.29175, and 0.4 × 2 / 1.86331 = 0.42934.
    """
    one = row("one", 8, 200.0, tok_s_lo=190.0, tok_s_hi=250.0, energy_j_per_token=0.4)
    other = row("other", 8, 100.0, tok_s_lo=80.0, tok_s_hi=105.0, energy_j_per_token=1.0)
    found = energy_ratio(Sides("one", "other", [one, other]), 8)
    assert (found.value, found.lo, found.hi) == pytest.approx((0.4, 0.29175, 0.42934), abs=2e-5)


def test_energy_over_sessions_agrees_with_scipys_paired_t_test_on_logs() -> None:
    ours, theirs = (0.40, 0.44, 0.39), (0.80, 0.82, 0.83)
    points = [
        row(name, 8, energy_j_per_token=joules, repeat=repeat)
        for name, all_joules in (("one", ours), ("other", theirs))
        for repeat, joules in enumerate(all_joules, start=1)
    ]
    span = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    found = energy_ratio(Sides("one", "other", points), 8)
    assert (found.lo, found.hi) == (pytest.approx(np.exp(span.low)), pytest.approx(np.exp(span.high)))


@pytest.mark.parametrize(
    ("one", "other", "outcome"),
    [
        ((16, 32), (8, 16), "supported"),  # surely outside at 16 where it is surely inside
        ((8, 16), (16, 32), "refuted"),
        ((8, 16), (8, 16), "undecided"),
        ((12, 24), (8, 16), "undecided"),
    ],
)
def test_more_users_by_brackets(one: tuple[float, float], other: tuple[float, float], outcome: str) -> None:
    found = more_users(alike(knees=knees(one, other)))
    assert found.outcome == outcome
    assert (found.ratio.lo, found.ratio.hi) == (one[0] / other[1], one[1] / other[0])


def test_users_beyond_the_tested_range_are_not_decided() -> None:
    both = {
        name: replace(knee, cross=None, cross_hi=None, beyond_range=True)
        for name, knee in knees((8, 16), (8, 16)).items()
    }
    found = more_users(alike(knees=both))
    assert (found.outcome, found.why) == ("undecided", "both keep the service level over the whole tested range")
    assert more_users(alike(knees={})).outcome == "not measured"


def test_a_gain_that_fades_by_hand() -> None:
    """1.5 [1.4–1.6] at one user, 1 [0.95–1.05] at 16: r = 0.66667, and on its logs

    down √(ln²(1 / 0.95) + ln²(1.6 / 1.5)) = √(0.05129² + 0.06454²) = 0.08244: 0.66667 e^−0.08244 = 0.6139
    up   √(ln²(1.05 / 1) + ln²(1.5 / 1.4)) = √(0.04879² + 0.06899²) = 0.08450: 0.66667 e^+0.08450 = 0.7254
    """
    found = fading("tok_s")(alike(ratios=[ratio("tok_s", 1, 1.5, 0.1), ratio("tok_s", 16, 1.0, 0.05)]))
    assert (found.ratio.value, found.ratio.lo, found.ratio.hi) == pytest.approx((0.66667, 0.61391, 0.72545), abs=1e-4)
    assert (found.outcome, found.why) == ("supported", "1.50× at 1 user, 1.00× at 16")


def test_without_a_gain_there_is_none_to_fade() -> None:
    found = fading("tok_s")(alike(ratios=[ratio("tok_s", 1, 0.8), ratio("tok_s", 16, 0.5)]))
    assert (found.outcome, found.why) == ("not measured", "no gain at 1 user to fade, 0.80× [0.75–0.85]")


def test_sizes_are_exact_and_say_their_unit() -> None:
    found = size("weights_gib", most=0.275)(with_rows(weights_gib=2.1))
    assert (found.outcome, found.ratio, found.why) == (
        "supported", Estimate(0.2625, 0.2625, 0.2625), "2.1 against 8 GiB",
    )  # fmt: skip
    tokens = size("kv_cache_tokens", least=1.1, gpu=True)(with_rows(kv_cache_tokens=81_000))
    assert (tokens.outcome, tokens.why) == ("supported", "81,000 against 40,000 tokens")


def test_a_suspect_row_is_named_beside_its_figure() -> None:
    flat = alike()
    points = [
        replace(point, verdict="suspect", verdict_reasons=("too_few_samples",)) if point.conc == 16 else point
        for point in flat.points
    ]
    found = above("tok_s", MOST)(replace(flat, points=points))
    assert found.why == "suspect row: one too few samples; other too few samples"
    assert above("tok_s", ONE_USER)(replace(flat, points=points)).why == ""


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Estimate(1.312, 1.2, 1.43), "1.31× [1.20–1.43]"),
        (Estimate(1.312), "1.31×, no interval"),
        (Estimate(0.35, 0.35, 0.35), "0.35×"),
        (Estimate(2.0, 1.5), "2.00× [1.50 or more]"),
        (Estimate(None, 1.5), "[1.50 or more]"),
        (Estimate(), ""),
    ],
)
def test_a_ratio_in_words(found: Estimate, words: str) -> None:
    assert times(found) == words


# --- every claim, both ways -------------------------------------------------------------------------------------------

Both = tuple[Sides, Sides]
"""Made numbers that support the claim, and such that refute it."""


def slow(name: str, sides: Sides) -> Sides:
    points = [
        replace(point, verdict_reasons=("slow_kernel",)) if point.precision == name else point for point in sides.points
    ]
    return replace(sides, points=points)


def long_ones(broken: bool) -> Sides:
    flat = alike()
    reasons = ("errors",) if broken else ()
    points = [
        replace(point, input_tokens_mean=8000.0, errors=3 if broken and point.precision == "one" else 0,
                verdict_reasons=reasons if point.precision == "one" else ())
        for point in flat.points
    ]  # fmt: skip
    return replace(flat, points=points)


OWN_FAILURES: Both = (
    alike(failed={"one": {"timeout": 2}, "other": {}}),
    alike(failed={"one": {"timeout": 2}, "other": {"timeout": 1}}),
)
USERS: Both = (alike(knees=knees((16, 32), (8, 16))), alike(knees=knees((8, 16), (16, 32))))
LONG: Both = (long_ones(False), long_ones(True))

MADE_INT4: dict[tuple[str, str], Both] = {
    ("throughput, 1 user", "two to three times"): (rated("tok_s", 2.2, 1), rated("tok_s", 1.8, 1)),
    ("throughput, 1 user", "one request at a time"): (rated("tok_s", 1.2, 1), rated("tok_s", 0.9, 1)),
    ("throughput, 16–32 users", "keeps its gain"): (rated("tok_s", 1.2, 16), rated("tok_s", 0.9, 16)),
    ("throughput, most users", "lower throughput"): (rated("tok_s", 0.9, 16), rated("tok_s", 1.2, 16)),
    ("throughput, most users", "fades"): (
        alike(ratios=[ratio("tok_s", 1, 2.0), ratio("tok_s", 16, 1.0)]),
        alike(ratios=[ratio("tok_s", 1, 1.2), ratio("tok_s", 16, 2.0)]),
    ),
    ("p95", "a quarter or more"): (rated("p95_ms", 0.7, 8), rated("p95_ms", 0.8, 8)),
    ("p99", "a quarter or more"): (p99(0.6), p99(0.9)),
    ("TTFT", "longer to the first token"): (rated("ttft_p50_ms", 1.3, 1), rated("ttft_p50_ms", 0.8, 1)),
    ("weights in memory", "a quarter of the memory"): (with_rows(weights_gib=2.1), with_rows(weights_gib=2.9)),
    ("VRAM", "as much of the card"): (alike(), with_rows(kv_cache_gib=1.0)),
    ("file size", "smaller by about 70"): (
        alike(checkpoint_bytes={"one": 30, "other": 100}), alike(checkpoint_bytes={"one": 40, "other": 100}),
    ),
    ("KV room", "becomes KV cache"): (with_rows(kv_cache_tokens=81_000), alike()),
    ("concurrency", "more users"): USERS,
    ("long context", "hold up"): LONG,
    ("failure kinds", "failures of its own"): OWN_FAILURES,
    ("kernels", "on a fallback"): (slow("one", rated("tok_s", 0.8)), slow("one", rated("tok_s", 1.2))),
    ("energy", "less energy"): (with_rows(energy_j_per_token=0.2), with_rows(energy_j_per_token=0.9)),
}  # fmt: skip

MADE_METHODS: dict[tuple[str, str], Both] = {
    ("throughput, 1 user", "slightly faster"): (rated("tok_s", 1.1, 1), rated("tok_s", 0.9, 1)),
    ("throughput, 1 user", "twice as fast"): (rated("tok_s", 0.45, 1), rated("tok_s", 0.6, 1)),
    ("throughput, most users", "slower one"): (rated("tok_s", 0.9, 16), rated("tok_s", 1.1, 16)),
    ("throughput, most users", "equally fast"): (alike(), rated("tok_s", 1.2, 16)),
    ("p95", "higher latency"): (rated("p95_ms", 1.2, 8), rated("p95_ms", 0.9, 8)),
    ("p99", "higher latency"): (p99(1.2), p99(0.8)),
    ("TTFT", "faster one to the first"): (rated("ttft_p50_ms", 1.3, 1), rated("ttft_p50_ms", 0.8, 1)),
    ("weights in memory", "more memory"): (with_rows(weights_gib=9.0), alike()),
    ("file size", "one size"): (
        alike(checkpoint_bytes={"one": 95, "other": 100}), alike(checkpoint_bytes={"one": 120, "other": 100}),
    ),
    ("concurrency", "many users"): USERS,
    ("long context", "steadier"): LONG,
    ("failure kinds", "fails where"): OWN_FAILURES,
    ("kernels", "AWQ has none"): (slow("one", alike()), slow("other", alike())),
}  # fmt: skip


def matched(claim: Claim, made: dict[tuple[str, str], Both]) -> Both | None:
    found = [both for (topic, words), both in made.items() if topic == claim.topic and words in claim.says]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize(("claims", "made"), [(INT4_AGAINST_BF16, MADE_INT4), (AWQ_AGAINST_GPTQ, MADE_METHODS)])
def test_each_claim_can_be_supported_and_refuted(claims: Sequence[Claim], made: dict[tuple[str, str], Both]) -> None:
    untried = [claim.topic for claim in claims if matched(claim, made) is None]
    assert untried == ["quality"]  # no run of this kind looks at it
    for claim in claims:
        if both := matched(claim, made):
            outcomes = [claim.trial(sides).outcome for sides in both]
            assert outcomes == ["supported", "refuted"], claim.says


@pytest.mark.parametrize("claim", [*INT4_AGAINST_BF16, *AWQ_AGAINST_GPTQ], ids=lambda claim: claim.says)
def test_a_figure_has_its_row_and_its_absence_a_reason(claim: Claim) -> None:
    bare = [SweepPoint("run", name, 8, verdict="invalid") for name in ("one", "other")]
    missing = claim.trial(Sides("one", "other", bare))
    assert missing.outcome == "not measured" and missing.why
    found = claim.trial(alike())
    assert (found.row is not None) if found.outcome != "not measured" else found.why
    assert claim.source.startswith("https://")


def test_a_flat_run_supports_no_claim_of_a_difference() -> None:
    supported = {c.says for c in (*INT4_AGAINST_BF16, *AWQ_AGAINST_GPTQ) if c.trial(alike()).outcome == "supported"}
    assert supported == {
        "In vLLM a 4-bit model takes as much of the card as the original",
        "With the same kernel AWQ and GPTQ are equally fast",
    }


def test_sizes_that_somebody_set_are_not_measured() -> None:
    for topic in ("VRAM", "KV room"):
        (claim,) = (claim for claim in INT4_AGAINST_BF16 if claim.topic == topic)
        host = replace(alike(), points=[replace(point, memory_kind="host") for point in alike().points])
        assert "did not run on a GPU" in claim.trial(host).why


def test_nothing_failed_is_no_answer_about_kinds() -> None:
    (claim,) = (claim for claim in INT4_AGAINST_BF16 if claim.topic == "failure kinds")
    assert claim.trial(alike()).why == "nothing failed in 300 and 300 requests: no kinds to compare"
    died = with_rows(verdict_reasons=("engine_died",))
    assert (claim.trial(died).outcome, claim.trial(died).why) == ("supported", "engine died against nothing")


def test_long_prompts_say_how_sure_no_failure_is() -> None:
    """None of 300: the upper end of Clopper-Pearson's interval is 1 − 0.025^(1/300) = 1.22 %."""
    (claim,) = (claim for claim in INT4_AGAINST_BF16 if claim.topic == "long context")
    assert claim.trial(LONG[0]).why == "0 of 300 requests failed (at most 1.2%); the answers were not judged"
    both = replace(LONG[1], points=[replace(p, verdict_reasons=("errors",)) for p in LONG[1].points])
    assert claim.trial(both).outcome == "supported"  # the other broke there as well
    assert claim.trial(alike()).why == "prompts of 128 tokens on average; long ones begin at 4,096"


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "awq", "gptq", "int4"),
    [
        ("awq", True, False, True),
        ("AWQ-g32", True, False, True),
        ("awq+gptq", False, False, True),
        ("gptq", False, True, True),
        ("rtn", False, False, True),
        ("my_int4", False, False, True),
        ("gptq-int8", False, True, False),
        ("smoothquant", False, False, False),
        ("bf16", False, False, False),
        ("printn", False, False, False),
    ],
)
def test_what_a_precisions_name_says(name: str, awq: bool, gptq: bool, int4: bool) -> None:
    assert (is_method(name, "awq"), is_method(name, "gptq"), is_int4(name)) == (awq, gptq, int4)


def sessions(**tok_s: float) -> list[SweepPoint]:
    """Three sessions of each at 1 and 8 users; the noise is the same in all, so that ratios are sharp."""
    return [
        row(name.replace("_", "+"), conc, pace * noise, repeat=repeat, ttft_p50_ms=1e4 / pace, p95_ms=1e5 / pace)
        for name, pace in tok_s.items()
        for conc in (1, 8)
        for repeat, noise in ((1, 1.0), (2, 1.1), (3, 0.95))
    ]


def test_awq_is_judged_against_gptq_and_each_four_bit_precision_against_bf16() -> None:
    """AWQ 3, GPTQ 2, BF16 1: AWQ is 1.5 of GPTQ, and 3 of BF16."""
    points = sessions(awq=300, gptq=200, bf16=100, awq_gptq=250, smoothquant=150)
    int4, methods = judge(points, [], [], compare(points, []))
    assert len(int4) == 3 * len(INT4_AGAINST_BF16) and len(methods) == len(AWQ_AGAINST_GPTQ)
    assert {one.one for one in int4} == {"awq", "gptq", "awq+gptq"} and {one.other for one in int4} == {"bf16"}
    at_one = [one for one in int4 if "two to three times" in one.claim.says]
    assert [one.finding.ratio.value for one in at_one] == pytest.approx([3, 2, 2.5])
    assert [one.finding.row for one in at_one][:1] == [Row("comparison.csv", "awq", "tok_s", 1)]
    first = methods[0]
    assert (first.one, first.other, first.finding.outcome) == ("awq", "gptq", "supported")
    assert first.finding.ratio.value == pytest.approx(1.5)
    assert first.finding.row == Row("points.csv", "awq, gptq", "tok_s", 1)


@pytest.mark.parametrize(
    ("names", "int4_why", "methods_why"),
    [
        (("bf16", "awq"), "", "no GPTQ in this run"),
        (("awq", "gptq"), "no BF16 in this run", ""),
        (("bf16", "smoothquant"), "no 4-bit precision in this run", "no AWQ in this run"),
        (("gptq",), "no BF16 in this run", "no AWQ in this run"),
    ],
)
def test_what_a_run_lacks_is_named(names: tuple[str, ...], int4_why: str, methods_why: str) -> None:
    points = sessions(**dict.fromkeys(names, 100.0))
    for judged, why in zip(judge(points, [], [], compare(points, [])), (int4_why, methods_why), strict=True):
        reasons = {one.finding.why for one in judged}
        assert reasons == {why} if why else len(reasons) > 1


def test_requests_that_we_cut_have_not_failed() -> None:
    def record(cell: str, error: str | None) -> RequestRecord:
        return RequestRecord(cell, 0, 0, "measured", 0, error=error)

    records = [record("my-awq-c8-r1", e) for e in ("timeout", "timeout", "cut", None)] + [
        record("bf16-q2.5-r1", "stall")
    ]
    assert failures(records) == {"my-awq": {"timeout": 2}, "bf16": {"stall": 1}}
    assert failures([]) is None and failures([record("bf16-c1-r1", None)]) == {}


def test_the_baseline_of_a_comparison_can_be_chosen() -> None:
    """AWQ is 1.5 of GPTQ, GPTQ two thirds of AWQ, with the ends swapped; an unknown one is no precision of the run."""
    points = [
        replace(p, tok_s=(p.tok_s or 0) * (1.2 if (p.precision, p.repeat) == ("awq", 2) else 1))
        for p in sessions(awq=300, gptq=200)
    ]
    (one,) = (line for line in compare(points, [], baseline="gptq") if (line.metric, line.conc) == ("tok_s", 8))
    (other,) = (line for line in compare(points, [], baseline="awq") if (line.metric, line.conc) == ("tok_s", 8))
    assert (one.precision, one.baseline, other.precision, other.baseline) == ("awq", "gptq", "gptq", "awq")
    assert one.ratio and one.ratio_lo and one.ratio_hi and one.ratio_lo < one.ratio_hi
    assert (other.ratio, other.ratio_lo, other.ratio_hi) == pytest.approx(
        (1 / one.ratio, 1 / one.ratio_hi, 1 / one.ratio_lo)
    )
    assert compare(points, []) == compare(points, [], baseline="awq")
    with pytest.raises(ValueError):
        compare(points, [], baseline="bf16")
