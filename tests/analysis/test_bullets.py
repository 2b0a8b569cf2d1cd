"""Bullets and the decision: made numbers force each of them both ways, and a flat run gives none that speaks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.analysis import bullets
from harness.analysis.bullets import AGAINST, FOR, Absent, Bullet
from harness.analysis.capacity import Freed
from harness.analysis.case import Case, make_case
from harness.analysis.decision import decide, decide_alone, validity
from harness.analysis.knee import find_knee, find_knees
from harness.analysis.saving import Saving
from harness.analysis.sides import Row
from harness.assumptions import Assumptions
from harness.records import Ratio, SweepPoint
from harness.slo import Slo

SLO = Slo(3.0)
Points = list[SweepPoint]
Change = Callable[[SweepPoint], SweepPoint]

SETTINGS = {"max_model_len": 2048, "max_num_seqs": 256}
TRAFFIC = Assumptions(users=100, context_tokens=2048)


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    """tok_s ± 5 %, p95 ± 10 %, on a card of which BF16's weights take 9 of 15 GiB and AWQ's 2.5."""
    weights, kv, tokens = (9.0, 5.0, 40_000) if precision == "bf16" else (2.5, 11.5, 92_000)
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.95, "tok_s_hi": tok_s * 1.05, "p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.1,
        "req_s": tok_s / 32, "weights_gib": weights, "kv_cache_gib": kv, "kv_cache_tokens": tokens, "other_gib": 1.0,
        "memory_kind": "gpu", "kv_usage_peak": 0.5, "kernel": "Marlin", "engine": "vLLM", "engine_version": "0.11.0",
        "energy_j_per_token": 150 / tok_s, "requests": 120, "usd_per_hour": 0.36, "utilisation": 1.0,
        "verdict": "valid", **more,
    }  # fmt: skip
    return SweepPoint("run", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **values)  # type: ignore[arg-type]


GOOD: Points = [
    row("bf16", 1, 35, 900), row("bf16", 8, 240, 1300), row("bf16", 16, 400, 2200), row("bf16", 32, 520, 5200),
    row("awq", 1, 70, 480), row("awq", 8, 420, 760), row("awq", 16, 760, 1150), row("awq", 32, 1150, 2400),
    row("awq", 64, 1200, 5000),
]  # fmt: skip
"""AWQ keeps p95 ≤ 3 s up to 32 users, BF16 up to 16, and is the faster one everywhere."""
FLAT: Points = [
    replace(one, **{name: getattr(two, name) for name in ("tok_s", "tok_s_lo", "tok_s_hi", "p95_ms", "p95_ms_lo",
            "p95_ms_hi", "req_s", "weights_gib", "kv_cache_gib", "kv_cache_tokens", "energy_j_per_token")})
    for one, two in zip([*GOOD[:4], *GOOD[4:8]], [*GOOD[:4], *GOOD[:4]], strict=True)
]  # fmt: skip
"""AWQ is BF16 under another name."""


def ratios_of(points: Points, ttft: float = 0.9) -> list[Ratio]:
    """Paired ratios as the rows have them, ± 4 %."""
    found = []
    rows = {(point.precision, point.conc): point for point in points if point.verdict != "invalid"}
    for (name, conc), one in rows.items():
        base = rows.get(("bf16", conc))
        if name == "bf16" or base is None:
            continue
        for metric, value in (("tok_s", (one.tok_s or 1) / (base.tok_s or 1)), ("ttft_p50_ms", ttft)):
            found.append(Ratio(name, "bf16", conc, metric, value, value * 0.96, value * 1.04, 100, "requests"))
    return found


def case_of(points: Points = GOOD, assumptions: Assumptions = TRAFFIC, **more: object) -> Case:
    """The case of the points; `ttft` is the ratio of the first tokens."""
    ratios = ratios_of(points, more.pop("ttft", 0.9))  # type: ignore[arg-type]
    values: dict[str, object] = {"failed": {}, "settings": SETTINGS, **more}
    found = make_case(points, find_knees(points, SLO), ratios, SLO, assumptions, **values)  # type: ignore[arg-type]
    assert found is not None
    return found


def changed(points: Points, precision: str | None = None, conc: int | None = None, **more: object) -> Points:
    """The points with other values in the rows of a precision, of a load, or of both."""
    return [
        replace(point, **more)  # type: ignore[arg-type]
        if precision in (None, point.precision) and conc in (None, point.conc)
        else point
        for point in points
    ]


def alone(points: Points = GOOD) -> Points:
    """BF16 three times as slow: it misses the service level even with one user."""
    return [
        replace(p, p95_ms=9000.0, p95_ms_lo=8000.0, p95_ms_hi=9900.0) if p.precision == "bf16" else p for p in points
    ]


# --- each bullet, both ways -------------------------------------------------------------------------------------------

GAINS = {
    "cost": "0.087 USD at 32 users against 0.25 USD at 16 users.",
    "tenants": "AWQ holds 25 tenants a card where BF16 holds 12: 32 safe users against 16, 20 % of them kept free",
    "fewer_cards": "100 users at the peak take 5 cards with AWQ and 9 with BF16, 1 of them in reserve and 20 % of each",
    "smaller_card": "BF16's 16 users take 9.25 GiB with AWQ and 12.5 GiB with BF16",
    "two_variants": "Two AWQ variants take 2 × 3.5 GiB of weights and runtime, the one BF16 10 GiB",
    "one_platform": "The gain (16 users → 32 users inside p95 ≤ 3 s) was had with the configuration that serves BF16: "
    "vLLM 0.11.0, max_model_len 2048, max_num_seqs 256. None of 1,080 requests failed.",
    "kv_room": "That is what fits into memory",
    "energy": "At 16 users a token takes 0.197 J with AWQ and 0.375 J with BF16: 0.53× [0.49–0.56], the cards alone.",
}
"""Worked by hand from GOOD:

cost          0.36 / (1150 × 3600) × 1e6 = 0.0870, 0.36 / (400 × 3600) × 1e6 = 0.25
tenants       ⌊32 × 0.8⌋ = 25, ⌊16 × 0.8⌋ = 12
fewer_cards   ⌈100 / 25.6⌉ + 1 = 5, ⌈100 / 12.8⌉ + 1 = 9
smaller_card  2.5 + 1 + 0.5 × 11.5 = 9.25, 9 + 1 + 0.5 × 5 = 12.5
two_variants  2 × (2.5 + 1) = 7 of 9 + 1 = 10
energy        150 / 760 = 0.197, 150 / 400 = 0.375; the ratio of tok_s 1.9 e^∓(√2 × 0.05) turned over: see test_claims
"""


@pytest.mark.parametrize("name", GAINS)
def test_a_run_that_supports_all_of_them(name: str) -> None:
    found = getattr(bullets, name)(case_of())
    assert isinstance(found, Bullet) and found.text.startswith(GAINS[name][:20]) and GAINS[name] in found.text
    assert found.rows and all(row.precision and row.column for row in found.rows)


def test_the_bullet_that_needs_a_baseline_that_fails() -> None:
    found = bullets.keeps_it_alone(case_of(alone()))
    assert isinstance(found, Bullet)
    assert found.text == "AWQ keeps p95 ≤ 3 s up to 32 users; BF16 misses it even at 1 user, the smallest load tested."
    assert found.rows[1:] == (Row("points.csv", "bf16", "p95_ms", 1),)


@pytest.mark.parametrize(
    ("name", "case", "why"),
    [
        ("keeps_it_alone", case_of(), "BF16 keeps it"),
        ("keeps_it_alone", case_of(changed(alone(), "bf16", 1, verdict="suspect")), "is not sure"),
        ("keeps_it_alone", case_of(changed(alone(), "bf16", p95_ms_lo=2000.0)), "is not sure"),
        (
            "cost",
            case_of(changed(GOOD, "awq", 32, tok_s=420.0, tok_s_lo=380.0, tok_s_hi=460.0)),
            "is none that was shown",
        ),
        ("cost", case_of(changed(GOOD, "awq", 32, tok_s_lo=None)), "has no interval"),
        ("cost", case_of(changed(GOOD, usd_per_hour=None)), "price"),
        (
            "cost",
            case_of(changed(GOOD, "awq", 32, verdict="suspect", verdict_reasons=("drifting",))),
            "AWQ is suspect: drifting",
        ),
        ("cost", case_of(alone()), "BF16 keeps p95 ≤ 3 s for sure at no tested load"),
        (
            "tenants",
            case_of(FLAT),
            "more users inside p95 ≤ 3 s are not shown (1.00× [0.50–2.00]): the tested brackets overlap",
        ),
        (
            "tenants",
            case_of(changed(GOOD, "bf16", 16, verdict="suspect", verdict_reasons=("preempting",))),
            "suspect: preempting",
        ),
        ("tenants", case_of(assumptions=Assumptions(users_per_tenant=26)), "0 against 0 tenants"),
        ("tenants", case_of([replace(p, conc=0, rate_rps=p.conc / 8, arrivals="poisson") for p in GOOD]), "users"),
        ("fewer_cards", case_of(assumptions=Assumptions()), "no demand is given"),
        ("fewer_cards", case_of(assumptions=Assumptions(users=10)), "2 cards against 2"),
        ("fewer_cards", case_of(FLAT), "are not shown"),
        (
            "fewer_cards",
            case_of(changed(GOOD, "awq", 32, req_s=12.0, tok_s_lo=500.0), Assumptions(peak_rps=100.0)),
            "cards against",
        ),
        ("fewer_cards", case_of(changed(GOOD, "awq", 32, tok_s_lo=None), Assumptions(peak_rps=100.0)), "no interval"),
        (  # 110 / (13.75 × 0.8) + 1 = 11 cards, 12 at the lower end of tok_s; 110 / (12.5 × 0.8) + 1 = 12 at both
            "fewer_cards",
            case_of(
                changed(GOOD, "awq", 32, tok_s=440.0, tok_s_lo=400.0, tok_s_hi=480.0, req_s=13.75),
                Assumptions(peak_rps=110.0),
            ),
            "11 [11–12] cards against 12 [12–13]",
        ),
        ("smaller_card", case_of(on_gpu=False), "not measured on a card"),
        ("smaller_card", case_of(FLAT), "12.5 GiB against 12.5"),
        ("smaller_card", case_of(changed(GOOD, kv_usage_peak=None)), "does not say"),
        ("smaller_card", case_of(changed(GOOD, "awq", 16, verdict="suspect")), "no valid rows of both at 16 users"),
        ("two_variants", case_of(changed(GOOD, "awq", weights_gib=4.5)), "two take 2 × 5.5 GiB"),
        ("two_variants", case_of(on_gpu=False), "not measured on a card"),
        ("two_variants", case_of(changed(GOOD, other_gib=None)), "does not say"),
        ("one_platform", case_of(FLAT), "no gain was shown"),
        ("one_platform", case_of(changed(GOOD, "bf16", 8, errors=1)), "without a fault"),
        ("one_platform", case_of(changed(GOOD, "awq", 8, verdict_reasons=("slow_kernel",))), "slow fallback"),
        ("one_platform", case_of(changed(GOOD, "awq", engine_version="0.12.0")), "not the same, or not known"),
        ("one_platform", case_of(changed(GOOD, engine_version=None)), "not the same, or not known"),
        ("kv_room", case_of(changed(GOOD, memory_kind="host")), "a size that was set"),
        ("kv_room", case_of(changed(GOOD, kv_cache_tokens=None)), "does not say"),
        (
            "kv_room",
            case_of(changed(GOOD, "awq", kv_cache_tokens=41_000)),
            "1,000 tokens more are no conversation of 2,048",
        ),
        ("energy", case_of(changed(GOOD, energy_j_per_token=0.3)), "may be none"),
        ("energy", case_of(changed(GOOD, energy_j_per_token=None)), "power was not measured"),
        ("energy", case_of(changed(GOOD, verdict="suspect")), "in valid rows"),
    ],
)
def test_what_is_not_supported_is_not_written(name: str, case: Case, why: str) -> None:
    found = getattr(bullets, name)(case)
    assert isinstance(found, Absent) and why in found.why


LOSES = changed(changed(GOOD, "awq", 32, tok_s=400.0, tok_s_lo=390.0, tok_s_hi=410.0), "bf16", 32, tok_s=520.0)


@pytest.mark.parametrize(
    ("name", "case", "text"),
    [
        (
            "slower",
            case_of(LOSES),
            "fewer tokens a second than BF16: 0.77× [0.74–0.80] at 32 users. Traffic that sits there pays for "
            "it. It is the faster one at 1 user, 8 users, 16 users.",
        ),
        (
            "no_gain",
            case_of(FLAT),
            "At 16 users, the largest where both keep p95 ≤ 3 s in valid rows, AWQ delivers 1.00× [0.96–1.04]",
        ),
        ("prefill_heavy", case_of(ttft=1.3), "The first token takes 1.30× [1.25–1.35] as long as with BF16 at 1 user"),
        ("fallback", case_of(changed(GOOD, "awq", verdict_reasons=("slow_kernel",), kernel="Exllama")), "(Exllama)"),
        (
            "broke",
            case_of(failed={"awq": {"http_5xx": 3}}),
            "AWQ failed in a way in which BF16 did not: http 5xx against nothing.",
        ),
        ("beyond", case_of(), "At 64 users AWQ misses p95 ≤ 3 s too (p95 5 s): growth beyond that takes another card"),
        ("unknown_quality", case_of(), "was not measured in this run"),
    ],
)
def test_what_speaks_against_it(name: str, case: Case, text: str) -> None:
    found = getattr(bullets, name)(case)
    assert isinstance(found, Bullet) and text in found.text and found.rows


@pytest.mark.parametrize(
    ("name", "case", "why"),
    [
        ("slower", case_of(), "slower at no load with valid rows"),
        ("slower", case_of(changed(LOSES, "bf16", 32, verdict="suspect")), "slower at no load with valid rows"),
        ("no_gain", case_of(), "the speeds at 16 users are told apart, or not known: 1.90× [1.82–1.98]"),
        ("no_gain", case_of(changed(FLAT, verdict="suspect")), "in valid rows"),
        ("no_gain", case_of(changed(FLAT, "awq", tok_s=200.0)), "are told apart, or not known: 0.50× [0.48–0.52]"),
        ("prefill_heavy", case_of(), "no later first token at 1 user: 0.90× [0.86–0.94]"),
        ("prefill_heavy", case_of(ttft=1.02), "no later first token"),
        ("fallback", case_of(), "no slow fallback"),
        ("broke", case_of(), "nothing failed in 600 and 480 requests"),
        (
            "broke",
            case_of(failed={"awq": {"stall": 1}, "bf16": {"stall": 1}}),
            "in no way of its own: stall against stall",
        ),
        ("beyond", case_of(GOOD[:8]), "at no tested load with a valid row"),
        ("beyond", case_of(changed(GOOD, "awq", 64, verdict="suspect")), "at no tested load with a valid row"),
    ],
)
def test_what_does_not_speak_against_it(name: str, case: Case, why: str) -> None:
    found = getattr(bullets, name)(case)
    assert isinstance(found, Absent) and why in found.why


def test_a_flat_run_has_nothing_that_speaks_for_it() -> None:
    case = case_of(FLAT)
    assert [bullet(case) for bullet in FOR if isinstance(bullet(case), Bullet)] == []
    spoken = [bullet.__name__ for bullet in AGAINST if isinstance(bullet(case), Bullet)]
    assert spoken == ["no_gain", "beyond", "unknown_quality"]


def test_eight_bullets_at_most_and_two_against_it_whatever_the_run() -> None:
    for points in (GOOD, FLAT, LOSES, alone()):
        case = case_of(points)
        assert sum(isinstance(bullet(case), Bullet) for bullet in FOR) <= 8
        assert sum(isinstance(bullet(case), Bullet) for bullet in AGAINST) >= 2
    assert sum(isinstance(bullet(case_of()), Bullet) for bullet in FOR) == 8


def test_a_run_of_suspect_rows_supports_nothing_that_was_timed() -> None:
    case = case_of(changed(GOOD, verdict="suspect", verdict_reasons=("drifting",)))
    held = [bullet.__name__ for bullet in FOR if isinstance(bullet(case), Bullet)]
    assert held == ["two_variants", "kv_room"]  # what the engine holds does not hang on the clock


def test_bullets_of_money_and_memory_bring_their_record_along() -> None:
    found = bullets.cost(case_of())
    assert isinstance(found, Bullet) and isinstance(found.about, Saving)
    assert found.about.share == pytest.approx(1 - 400 / 1150)
    room = bullets.kv_room(case_of())
    assert isinstance(room, Bullet) and isinstance(room.about, Freed)
    assert (room.about.kv_tokens, room.about.users) == (52_000, 25)


# --- the case ---------------------------------------------------------------------------------------------------------


def test_the_case_is_that_of_the_fastest_inside_the_service_level() -> None:
    """GPTQ has more tokens a second at 32 users, where it is outside; inside, at 16, it has fewer than AWQ at 32."""
    gptq = [
        replace(p, precision="gptq", p95_ms_hi=9e3 if p.conc == 32 else p.p95_ms_hi)
        for p in GOOD
        if p.precision == "awq"
    ]
    gptq = changed(gptq, "gptq", 32, tok_s=2000.0)
    assert case_of([*GOOD[:4], *gptq, *GOOD[4:]]).sides.names == ("awq", "bf16")
    assert case_of([*GOOD[:4], *gptq]).sides.names == ("gptq", "bf16")


def test_one_precision_is_no_case() -> None:
    knees = find_knees(GOOD[:4], SLO)
    assert make_case(GOOD[:4], knees, [], SLO, Assumptions()) is None


# --- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (
            GOOD,
            "Serve AWQ up to 32 users at p95 ≤ 3 s, once its answers have passed a test of quality: "
            "BF16 is safe up to 16 users.",
        ),
        (
            changed(GOOD, "bf16", 16, verdict="suspect", verdict_reasons=("preempting",)),
            "Serve AWQ up to 32 users at p95 ≤ 3 s, once its answers have passed a test of quality: "
            "BF16 is safe up to 16 users (the operating point of BF16 is suspect: preempting).",
        ),
        (
            alone(),
            "Serve AWQ up to 32 users at p95 ≤ 3 s, once its answers have passed a test of quality: "
            "BF16 keeps it for sure at no tested load.",
        ),
        (
            FLAT,
            "Stay with BF16, up to 16 users at p95 ≤ 3 s: AWQ shows no gain, neither in speed "
            "(1.00× [0.96–1.04] the tokens a second at 16 users) nor in users (the tested brackets overlap).",
        ),
        (
            changed(FLAT, "awq", tok_s=410.0),
            "Stay with BF16, up to 16 users at p95 ≤ 3 s: AWQ shows no gain, neither in speed "
            "(1.02× [0.98–1.07] the tokens a second at 16 users) nor in users (the tested brackets overlap).",
        ),
        (
            changed(FLAT, "awq", tok_s=800.0),
            "Serve AWQ up to 16 users at p95 ≤ 3 s, once its answers have passed a test of quality: it "
            "delivers 2.00× [1.92–2.08] the tokens a second at 16 users; "
            "more users are not shown (the tested brackets overlap).",
        ),
        (
            changed(FLAT, "awq", tok_s=200.0),
            "Stay with BF16, up to 16 users at p95 ≤ 3 s: AWQ shows no gain, neither in speed (it loses "
            "some: 0.50× [0.48–0.52] the tokens a second at 16 users) nor in users (the tested brackets overlap).",
        ),
        (
            changed(FLAT, verdict="suspect"),
            "Stay with BF16, up to 16 users at p95 ≤ 3 s: no valid rows of both inside it tell AWQ apart from it.",
        ),
        (
            [replace(p, precision={"bf16": "awq", "awq": "bf16"}[p.precision]) for p in GOOD],
            "Stay with BF16, up to 32 users at p95 ≤ 3 s: AWQ is safe up to 16 users only.",
        ),
        (
            changed(GOOD, p95_ms=9e3, p95_ms_lo=8e3, p95_ms_hi=9.9e3),
            "Sign off neither: AWQ and BF16 keep p95 ≤ 3 s for sure at no tested load.",
        ),
        (
            changed(GOOD, "awq", p95_ms=9e3, p95_ms_lo=8e3, p95_ms_hi=9.9e3),
            "Stay with BF16, up to 16 users: AWQ keeps p95 ≤ 3 s for sure at no tested load.",
        ),
    ],
)
def test_the_decision_claims_no_more_than_the_rows(points: Points, sentence: str) -> None:
    assert decide(case_of(points)) == sentence


def test_one_trace_decides_for_itself_alone() -> None:
    points = [replace(p, conc=0, rate_rps=2.5, arrivals="trace") for p in (GOOD[2], GOOD[3])]
    points[1] = replace(points[1], precision="awq")
    assert decide(case_of(points)) == (
        "Stay with BF16. BF16 keeps p95 ≤ 3 s on this trace. AWQ misses p95 ≤ 3 s on this trace. "
        "No load was varied, so that is said of this trace alone."
    )
    turned = [replace(points[1], precision="bf16"), replace(points[0], precision="awq")]
    assert decide(case_of(turned)).startswith("Serve AWQ, once its answers have passed a test of quality. BF16 misses")
    assert decide(case_of(changed(points, p95_ms_lo=2e3, p95_ms_hi=4e3))).startswith(
        "Sign off neither. BF16 may keep or miss"
    )
    assert decide_alone(None, points[:1], SLO) == (
        "BF16 keeps p95 ≤ 3 s on this trace. Nothing was compared with it, and no load was varied."
    )


def test_one_precision_is_compared_with_nothing() -> None:
    assert decide_alone(find_knee(GOOD[:4], SLO), GOOD[:4], SLO) == (
        "BF16 may be served up to 16 users at p95 ≤ 3 s. Nothing was compared with it."
    )
    slow = alone()[:4]
    assert decide_alone(find_knee(slow, SLO), slow, SLO).startswith(
        "Do not sign off BF16: it keeps p95 ≤ 3 s for sure at no"
    )


def test_what_stands_behind_the_operating_points() -> None:
    found = validity(
        {"bf16": replace(GOOD[2], verdict="suspect", verdict_reasons=("too_few_samples",)), "awq": GOOD[7]}, GOOD
    )
    assert found == (
        "BF16 at 16 users is suspect (too few samples); AWQ at 32 users is valid; one server session each, so "
        "nothing is known of run-to-run spread."
    )
    assert validity({}, [replace(p, repeat=n) for p in GOOD for n in (1, 2, 3)]) == "3 sessions."
