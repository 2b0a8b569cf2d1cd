"""The knees in words: each case of the rule of thumb, the table, the views, the crossover; names from outside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.records import Agreement, Crossover, Knee, Saturation, SweepPoint
from harness.report.knees import (
    AGREEMENTS,
    CAUSES,
    NO_VIEWS,
    cause_words,
    crossover_words,
    rule_of_thumb,
    views_table,
    views_words,
)

SLO = "p95 ≤ 3 s"
USERS = [SweepPoint("run", "awq", 8)]
RATES = [SweepPoint("run", "awq", 0, arrivals="poisson", rate_rps=2.0)]
AWQ = Knee("awq", SLO, 24, 27.3, 24.0, 32.0, False, "compute", "p95", 1.0, 64.0, 25.6, 29.1)
BF16 = Knee("bf16", SLO, 14, 14.9, 14.0, 16.0, False, "kv_cache", "p95", 1.0, 64.0, 14.2, 15.6)
OPEN = Knee("awq", SLO, 32, None, 32.0, None, True, "none", None, 1.0, 32.0)


def thumb(*knees: Knee, points: list[SweepPoint] = USERS) -> str:
    return rule_of_thumb(points, knees, "X")


def test_rule_of_thumb() -> None:
    assert thumb(AWQ, BF16) == (
        "On X, AWQ keeps p95 ≤ 3 s up to 24 users (knee 27 [24–32]); BF16 up to 14 (knee 15 [14–16])."
    )


DOUBTFUL = replace(AWQ, safe_conc=None, cross=5.7, cross_lo=0.0, cross_hi=8.0)
SMALL = replace(AWQ, safe_conc=1, cross=1.4, cross_lo=1.0, cross_hi=2.0)


@pytest.mark.parametrize(
    ("knee", "alone", "second"),
    [
        (OPEN, "up to at least 32 users, the largest tested", "up to at least 32, the largest tested"),
        (
            replace(OPEN, safe_conc=16, cross_lo=16.0),
            "up to at least 16 users, in doubt up to 32, the largest tested",
            "up to at least 16, in doubt up to 32, the largest tested",
        ),
        (replace(AWQ, cross_hi=None), "up to 24 users (knee 27 [24–open])", "up to 24 (knee 27 [24–open])"),
        (SMALL, "up to 1 user (knee 1.4 [1–2])", "up to 1 (knee 1.4 [1–2])"),
        (DOUBTFUL, *["at no tested concurrency for sure (knee 5.7 [0–8])"] * 2),
        (replace(OPEN, safe_conc=None, cross_lo=0.0), *["at no tested concurrency for sure"] * 2),
        (Knee("awq", SLO, tested_lo=1.0, tested_hi=8.0), *["at no tested concurrency, 1 user included"] * 2),
    ],
)
def test_rule_of_thumb_in_every_case(knee: Knee, alone: str, second: str) -> None:
    assert thumb(knee) == f"On X, AWQ keeps p95 ≤ 3 s {alone}."
    assert thumb(BF16, knee) == f"On X, BF16 keeps p95 ≤ 3 s up to 14 users (knee 15 [14–16]); AWQ {second}."


def test_rule_of_thumb_without_figures() -> None:
    assert thumb() == ""
    nothing = Knee("awq", SLO)
    assert thumb(nothing) == "On X, AWQ has no usable figure."
    assert thumb(nothing, BF16) == (
        "On X, AWQ has no usable figure; BF16 keeps p95 ≤ 3 s up to 14 users (knee 15 [14–16])."
    )


def test_rates() -> None:
    rated = replace(AWQ, safe_conc=None, cross=2.613, cross_lo=2.5, cross_hi=3.0)
    assert thumb(rated, points=RATES) == "On X, AWQ keeps p95 ≤ 3 s up to 2.5 req/s (knee 2.61 [2.5–3])."
    assert views_words(RATES, [rated], []) == [NO_VIEWS]
    header, _, line = views_table(RATES, [rated], []).splitlines()
    assert header == "| Precision | Safe to promise | SLO crossing | by noise alone |"
    assert line == "| AWQ | 2.5 | 2.61 [2.5–3] | 25.6–29.1 |"


SATURATION = Saturation(
    "awq", 7, "bends", 32.0, 10.0, 0.0277, 0.000104, 0.031, 22.4, 20.1, 25.2, 56.0, 48.0, 70.0, 21.0, 19.5, 22.9, 1.0,
    "agree",
)  # fmt: skip


def test_table_of_the_views() -> None:
    table = views_table(USERS, [BF16, AWQ, replace(OPEN, precision="int4")], [SATURATION, Saturation("bf16")])
    assert table.splitlines() == [
        "| Precision | Safe to promise | SLO crossing | by noise alone | Kneedle | USL saturation | USL peak "
        "| Asymptotic bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| BF16 | 14 | 15 [14–16] | 14–16 |  |  |  |  |",
        "| AWQ | 24 | 27 [24–32] | 26–29 | 32 | 22 [20–25] | 56 [48–70] | 21 [20–23] |",
        "| INT4 | 32 | none in range |  |  |  |  |  |",
    ]


def test_table_of_what_is_missing() -> None:
    never = Knee("awq", SLO, tested_lo=1.0, tested_hi=8.0)
    nothing = Knee("int4", SLO)
    open_end = replace(SATURATION, usl_peak_hi=None)
    lines = views_table(USERS, [never, nothing], [open_end]).splitlines()[2:]
    assert lines == [
        "| AWQ | none | never inside |  | 32 | 22 [20–25] | 56 [48–open] | 21 [20–23] |",
        "| INT4 | none |  |  |  |  |  |  |",
    ]


def words(found: Saturation, knee: Knee = AWQ) -> str:
    (said,) = views_words(USERS, [knee], [found])
    return said


def test_views_in_words() -> None:
    assert words(SATURATION) == (
        f"**AWQ**: Cause: {CAUSES['compute']}. Throughput is saturated at 32 users by Kneedle and at 22 [20–25] users "
        "by the Universal Scalability Law. The law fits (off by 3.1 %): contention 0.0277, coherency 0.0001; "
        f"throughput peaks at 56 [48–70] users and falls beyond. {AGREEMENTS['agree']}"
    )


@pytest.mark.parametrize("verdict", list(AGREEMENTS))
def test_agreement_in_words(verdict: Agreement) -> None:
    assert words(replace(SATURATION, agreement=verdict)).endswith(AGREEMENTS[verdict])


def test_what_a_disagreement_means() -> None:
    assert "before the card is saturated: it is latency-bound" in AGREEMENTS["latency"]
    assert "saturated before the SLO is crossed: it is throughput-bound" in AGREEMENTS["throughput"]
    assert "about where the card is saturated" in AGREEMENTS["agree"]
    assert "differ among themselves" in AGREEMENTS["mixed"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (replace(SATURATION, usl_peak=None), "coherency 0.0001, no peak shown."),
        (replace(SATURATION, usl_peak=100.0), "it would peak at 100 [48–70] users, an extrapolation beyond"),
        (replace(SATURATION, usl_misfit=0.2), "does not describe this curve (off by 20.0 %), so it is left out."),
        (replace(SATURATION, usl_misfit=0.2), "Throughput is saturated at 32 users by Kneedle. The Universal"),
        (replace(SATURATION, kneedle=None), "Throughput is saturated at 22 [20–25] users by the Universal"),
        (replace(SATURATION, kneedle=None, usl_misfit=None), "Kneedle sees no knee of throughput. The Universal Scal"),
        (Saturation("awq", 7, "flat"), "Throughput does not surely grow with users"),
        (Saturation("awq", 7, "straight"), "Throughput grows about in step with users"),
        (Saturation("awq", 1), "Too few usable levels"),
        (
            Saturation("awq", 4, "bends", bound=8.3, bound_lo=7.6, bound_hi=9.1, bound_from=1.0),
            "With 4 levels (6 make a curve) there is the asymptotic bound: throughput is saturated at about "
            "8.3 [7.6–9.1] users.",
        ),
        (
            Saturation("awq", 4, "bends", bound=20.0, bound_lo=18.0, bound_hi=22.0, bound_from=4.0),
            "20 [18–22] users, an upper estimate, since the smallest load tested is 4 users.",
        ),
    ],
)
def test_saturation_in_every_case(found: Saturation, said: str) -> None:
    assert said in words(found)


@pytest.mark.parametrize("cause", list(CAUSES))
def test_causes(cause: str) -> None:
    assert cause_words(replace(AWQ, cause=cause)) == f"Cause: {CAUSES[cause]}."


def test_what_the_causes_are() -> None:
    words = {"kv_cache": "KV cache is full", "max_num_seqs": "limit on running sequences", "client": "load generator"}
    assert all(text in CAUSES[cause] for cause, text in words.items())


def test_causes_of_no_knee() -> None:
    assert cause_words(OPEN) == ""
    assert "load generator gave out" in cause_words(replace(OPEN, cause="client"))
    assert cause_words(replace(AWQ, cause="a|b")) == "Cause: a\\|b."


def crossover(**more: object) -> Crossover:
    values: dict[str, object] = {"outcome": "always", "best": 1.312, "best_at": 1.0, **more}
    return Crossover("awq", "bf16", **{"metric": "tok_s", **values})  # type: ignore[arg-type]


IN = "In tokens per second, "
FADING = crossover(outcome="fades", ahead=(1, 8), doubt=(16, 32), fades_at=16.0, cross=19.2)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            crossover(ahead=(1, 8, 32)),
            "AWQ is ahead of BF16 from 1 to 32 users; at best 1.31× at 1 user.",
        ),
        (
            crossover(ahead=(1, 32), doubt=(8,)),
            "AWQ is ahead of BF16 from 1 to 32 users, not decided at 8 users; at best 1.31× at 1 user.",
        ),
        (
            crossover(ahead=(16,), best_at=16.0),
            "AWQ is ahead of BF16 at 16 users (the only concurrency compared); at best 1.31× at 16 users.",
        ),
        (
            crossover(outcome="gains", ahead=(8, 32), doubt=(4,), behind=(1,), cross=3.21, best_at=32.0),
            "AWQ is ahead of BF16 from 8 users on, to the largest compared, even at about 3.2; behind or not decided "
            "below it; at best 1.31× at 32 users.",
        ),
        (
            FADING,
            "AWQ is ahead of BF16 up to 8 users (at best 1.31× at 1 user); from 16 users on the advantage is not shown "
            "any more, even at about 19.",
        ),
        (
            crossover(outcome="fades", ahead=(8,), doubt=(16,), behind=(1,), fades_at=16.0, best_at=8.0),
            "AWQ is ahead of BF16 at 8 users (at best 1.31× at 8 users); from 16 users on the advantage is not shown "
            "any more.",
        ),
        (
            replace(FADING, outcome="reverses", doubt=(16,), behind=(32,), reverses_at=32.0, cross=18.0),
            "AWQ is ahead of BF16 up to 8 users (at best 1.31× at 1 user); from 16 users on the advantage is not shown "
            "any more, and at 32 users it is behind, even at about 18.",
        ),
        (
            crossover(outcome="reverses", ahead=(1,), behind=(8,), fades_at=8.0, reverses_at=8.0, cross=3.0),
            "AWQ is ahead of BF16 up to 1 user (at best 1.31× at 1 user); at 8 users it is behind, even at about 3.",
        ),
        (
            crossover(outcome="never", behind=(1, 8), doubt=(32,), best=0.984, best_at=32.0),
            "AWQ is surely ahead of BF16 nowhere, and surely behind at 1 and 8 users; at best 0.98× at 32 users.",
        ),
        (
            crossover(outcome="undecided", doubt=(1, 8)),
            "it is not decided at any concurrency compared whether AWQ or BF16 is ahead.",
        ),
        (
            crossover(outcome="undecided", doubt=(16,), best_at=16.0),
            "it is not decided at 16 users (the only concurrency compared) whether AWQ or BF16 is ahead.",
        ),
    ],
)
def test_crossover_in_every_case(found: Crossover, said: str) -> None:
    assert crossover_words(USERS, [found]) == [IN + said]


def test_crossover_says_the_traffic_once() -> None:
    one = crossover(ahead=(1.0,), traffic="prefill-heavy")
    said = crossover_words(USERS, [one, replace(one, metric="ttft_p50_ms")])
    assert len(said) == 3 and said[1].startswith("In time to first token (prefill), AWQ")
    assert said[2] == (
        "This traffic is prefill-heavy (more of the work is prompt than output); another may cross elsewhere."
    )
    assert crossover_words(USERS, []) == []


HOSTILE = "<script>|`x`[a](b)"


def test_names_from_outside_stay_text() -> None:
    knee, found = replace(AWQ, precision=HOSTILE, slo=HOSTILE), replace(SATURATION, precision=HOSTILE)
    crossed = replace(crossover(ahead=(1.0,)), precision=HOSTILE, baseline=HOSTILE, metric=HOSTILE)
    texts = [
        rule_of_thumb(USERS, [knee], HOSTILE),
        views_table(USERS, [knee], [found]),
        *views_words(USERS, [knee], [found]),
        *crossover_words(USERS, [crossed]),
    ]
    for text in texts:
        assert "<script>" not in text.lower().replace("\\<script\\>", "")
        assert "|`" not in text.replace("\\|\\`", "")
