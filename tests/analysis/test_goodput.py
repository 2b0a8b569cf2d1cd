"""Several limits at once, and goodput: the share of requests that keep all of them, from requests to knees."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import binom

from harness.analysis import metrics
from harness.analysis.knee import Limit, find_knee, limits, placed, reading, safe_load
from harness.records import Knee, RequestRecord, SweepPoint
from harness.slo import Slo

MS = 1_000_000


def request(number: int, ttft_ms: float = 100, e2e_ms: float = 1000, tokens: int = 10, **more: object) -> RequestRecord:
    values: dict[str, object] = {
        "first_token_ns": int(ttft_ms * MS),
        "last_token_ns": int(e2e_ms * MS),
        "completion_tokens": tokens,
        **more,
    }
    return RequestRecord("awq-c8-r1", number, 0, "measured", 0, **values)  # type: ignore[arg-type]


def test_wilson_by_hand() -> None:
    """27 of 30 kept: p = 0.9, z² = 3.8415. Middle (0.9 + z²/60) / (1 + z²/30) = 0.96402 / 1.12805 = 0.85459; half
    z √(0.9 · 0.1 / 30 + z² / 3600) / 1.12805 = 1.95996 · √(0.003 + 0.0010671) / 1.12805 = 0.11081."""
    requests = [request(at, e2e_ms=1000 if at < 27 else 4000) for at in range(30)]
    share = metrics.goodput(requests, Slo(p95_s=3.0))
    assert share == (0.9, pytest.approx(0.74378, abs=1e-4), pytest.approx(0.96540, abs=1e-4))


@pytest.mark.parametrize(
    ("slow", "slo", "kept"),
    [
        ({"e2e_ms": 3000}, Slo(p95_s=3.0), 30),
        ({"e2e_ms": 3001}, Slo(p95_s=3.0), 20),
        ({"ttft_ms": 501}, Slo(ttft_s=0.5), 20),
        ({"e2e_ms": 1001}, Slo(tpot_s=0.1), 20),  # (1001 − 100) / 9 = 100.1 ms
        ({"e2e_ms": 1000}, Slo(tpot_s=0.1), 30),
        ({"tokens": 1, "e2e_ms": 100}, Slo(tpot_s=1e-6), 10),  # one token has no time per further token to keep
        ({"ttft_ms": 501}, Slo(p95_s=3.0), 30),
        ({"error": "timeout"}, Slo(p95_s=3.0), 20),
        ({"last_token_ns": None}, Slo(p95_s=3.0), 20),
    ],
)
def test_which_requests_keep_it(slow: dict[str, object], slo: Slo, kept: int) -> None:
    """Of 30 requests ten are as named, the others 1 s long with the first token at 0.1 s: 0.1 s a token."""
    requests = [request(at, **(slow if at < 10 else {})) for at in range(30)]  # type: ignore[arg-type]
    share = metrics.goodput(requests, slo)
    assert share is not None and share[0] == kept / 30


def test_limits_are_kept_by_the_same_request() -> None:
    """Ten break one limit and ten others the other: a third keeps both."""
    requests = [
        request(at, ttft_ms=600 if at < 10 else 100, e2e_ms=4000 if 10 <= at < 20 else 1000) for at in range(30)
    ]
    share = metrics.goodput(requests, Slo(p95_s=3.0, ttft_s=0.5))
    assert share is not None and share[0] == pytest.approx(1 / 3)


def test_what_counts_as_begun() -> None:
    """Warm-up and what only held the load are no part of it; below 20 requests there is no share. All 20 kept: Wilson's
    lower end is 1 / (1 + z²/20) = 0.8389."""
    requests = [request(at) for at in range(19)]
    others = [replace(request(at, e2e_ms=9000), phase="held" if at % 2 else "warmup") for at in range(19, 60)]
    assert metrics.goodput([*requests, *others], Slo(p95_s=3.0)) is None
    found = metrics.goodput([*requests, *others, request(99)], Slo(p95_s=3.0))
    assert found == (1.0, pytest.approx(0.8389, abs=1e-4), pytest.approx(1.0))


def row(conc: int, share: float, half: float = 0.0, **more: object) -> SweepPoint:
    """A level with this goodput ± half."""
    values: dict[str, object] = {
        "verdict": "valid", "goodput": share, "goodput_lo": share - half, "goodput_hi": min(1.0, share + half), **more,
    }  # fmt: skip
    return SweepPoint("run", "awq", conc, **values)  # type: ignore[arg-type]


NINETY = Slo(p95_s=3.0, goodput=0.9)


def test_limits_of_a_service_level() -> None:
    assert limits(Slo(3.0, 0.5, 0.05)) == (
        Limit("p95_ms", 3000.0, "p95"),
        Limit("ttft_p95_ms", 500.0, "TTFT"),
        Limit("tpot_p95_ms", 50.0, "TPOT"),
    )
    (only,) = limits(NINETY)
    assert (only.column, only.name, only.most) == ("goodput", "goodput", pytest.approx(0.1))


def test_goodput_is_read_as_the_share_outside() -> None:
    """0.9 [0.8–0.95] kept is 0.1 [0.05–0.2] outside."""
    found = reading(replace(row(8, 0.9), goodput_lo=0.8, goodput_hi=0.95), "goodput")
    assert found == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.2))
    assert reading(SweepPoint("run", "awq", 8), "goodput") is None


def test_knee_of_goodput_by_hand() -> None:
    """All kept at 8 users, 64 % at 32; 90 % are asked for. On the scale arcsin √outside: 0 at 8 users, arcsin 0.6 =
    0.6435 at 32, the limit arcsin √0.1 = 0.3218: half the way, at 16 users."""
    found = find_knee([row(8, 1.0), row(32, 0.64)], NINETY)
    assert found.cross == pytest.approx(16.0, rel=1e-3)
    assert (found.safe_conc, found.cross_lo, found.cross_hi, found.limit) == (8, 8.0, 32.0, "goodput")


def test_goodput_in_doubt() -> None:
    """At 16 users 0.93 ± 0.05 may be less than 0.9, at 32 0.85 ± 0.1 may be more."""
    found = find_knee([row(8, 0.99, 0.01), row(16, 0.93, 0.05), row(32, 0.85, 0.1), row(64, 0.5, 0.1)], NINETY)
    assert (found.safe_conc, found.cross_lo, found.cross_hi) == (8, 8.0, 64.0)
    assert found.cross is not None and 16 < found.cross < 32
    assert found.boot_lo is not None and found.boot_hi is not None
    assert 8 <= found.boot_lo < found.cross < found.boot_hi <= 64


def test_all_kept_is_no_knee() -> None:
    found = find_knee([row(8, 1.0, 0.02), row(32, 1.0, 0.02)], NINETY)
    assert (found.beyond_range, found.safe_conc, found.boot_lo, found.boot_hi) == (True, 32, None, None)


def test_goodput_of_everybody_is_never_sure() -> None:
    """100 % asked, 100 % of 120 seen: the interval goes down to 97 %, so nothing is promised."""
    found = find_knee([row(8, 1.0, 0.03), row(32, 0.6, 0.1)], Slo(p95_s=3.0, goodput=1.0))
    assert (found.safe_conc, found.cross_lo, found.cross_hi) == (None, 0.0, 32.0)


def level(conc: int, p95_s: float, ttft_s: float, half: float = 0.05) -> SweepPoint:
    ends = {
        f"{name}_ms{end}": value * 1e3 * factor
        for name, value in (("p95", p95_s), ("ttft_p95", ttft_s))
        for end, factor in (("", 1), ("_lo", 1 - half), ("_hi", 1 + half))
    }
    return SweepPoint("run", "awq", conc, verdict="valid", **ends)  # type: ignore[arg-type]


BOTH = Slo(p95_s=3.0, ttft_s=0.5)


def test_the_first_limit_to_be_crossed_is_the_knee() -> None:
    """p95 doubles from 8 users (1.5 s) to 32 (6 s) twice and is 3 s at 16. TTFT goes from 0.25 to 4 s, 16 times in the
    same span, so that 0.5 s is reached after a quarter of it: 8 · 4^(1/4) = 11.31 users."""
    found = find_knee([level(8, 1.5, 0.25), level(32, 6.0, 4.0)], BOTH)
    assert (found.cross, found.limit) == (pytest.approx(8 * 4**0.25), "TTFT")
    other = find_knee([level(8, 1.5, 0.05), level(32, 6.0, 0.4)], BOTH)
    assert (other.cross, other.limit) == (pytest.approx(16.0), "p95")
    assert found.slo == "p95 ≤ 3 s and TTFT p95 ≤ 0.5 s"


def test_inside_means_inside_all_of_them_and_outside_one_is_enough() -> None:
    """16 users keep p95 surely and TTFT only perhaps; 32 break TTFT surely, whatever p95 does."""
    rows = [level(8, 1.0, 0.2), level(16, 1.5, 0.49), level(32, 2.0, 0.9), level(64, 4.0, 2.0)]
    found = find_knee(rows, BOTH)
    assert (found.safe_conc, found.cross_lo, found.cross_hi, found.limit) == (8, 8.0, 32.0, "TTFT")
    place = placed(rows[1], BOTH)
    assert place is not None and (place.inside, place.surely_inside, place.surely_outside) == (True, False, False)


def test_a_level_that_lacks_one_figure_is_left_out() -> None:
    rows = [level(8, 1.0, 0.2), replace(level(16, 1.5, 0.3), ttft_p95_ms=None), level(32, 6.0, 4.0)]
    assert find_knee(rows, BOTH).cross_lo == 8.0
    assert placed(rows[1], BOTH) is None and placed(rows[1], Slo(p95_s=3.0)) is not None


def test_a_tighter_level_promises_no_more() -> None:
    rows = [level(8, 1.0, 0.2), level(16, 2.0, 0.3), level(32, 2.5, 0.7), level(64, 6.0, 2.0)]
    loads = [safe_load(find_knee(rows, slo)) or 0 for slo in (Slo(p95_s=3.0), BOTH, Slo(2.1, 0.25))]
    assert loads == [32, 16, 8]


def measured(share: float, count: int = 120) -> list[RequestRecord]:
    return [request(at, e2e_ms=4000 if at < round(count * (1 - share)) else 1000) for at in range(count)]


def test_rows_judged_by_another_level() -> None:
    """The rows were measured for p95 ≤ 3 s. Asked for 2 s afterwards, their requests are counted again."""
    point = SweepPoint("run", "awq", 8, verdict="valid", p95_ms=4000.0, goodput=0.5, goodput_lo=0.4, goodput_hi=0.6)
    (found,) = metrics.judged_by([point], measured(0.9), Slo(p95_s=2.0, goodput=0.9))
    assert (found.goodput, found.p95_ms) == (0.9, 4000.0)
    assert found.goodput_lo is not None and found.goodput_lo < 0.9
    (gone,) = metrics.judged_by([point], [], Slo(p95_s=2.0, goodput=0.9))
    assert (gone.goodput, gone.goodput_lo, gone.goodput_hi) == (None, None, None)


def test_rows_of_before_get_the_ends_that_they_lack() -> None:
    """A run of an earlier version has TTFT p95 without an interval; its requests still tell it."""
    requests = [request(at, ttft_ms=100 + at, e2e_ms=1000 + at) for at in range(120)]
    point = SweepPoint("run", "awq", 8, verdict="valid", ttft_p95_ms=213.05)
    (found,) = metrics.judged_by([point], requests, Slo(ttft_s=0.5))
    assert found.ttft_p95_ms == 213.05
    assert found.ttft_p95_ms_lo is not None and found.ttft_p95_ms_hi is not None
    assert found.ttft_p95_ms_lo < 213.05 < found.ttft_p95_ms_hi
    known = replace(point, ttft_p95_ms_lo=1.0, ttft_p95_ms_hi=2.0)
    assert metrics.judged_by([known], requests, Slo(ttft_s=0.5))[0].ttft_p95_ms_lo == 1.0


def test_attempts_are_judged_by_their_own_requests() -> None:
    first, second = (SweepPoint("run", "awq", 8, attempt=attempt) for attempt in (1, 2))
    requests = [*measured(0.5), *(replace(one, attempt=2) for one in measured(1.0))]
    found = metrics.judged_by([first, second], requests, Slo(p95_s=3.0))
    assert [point.goodput for point in found] == [0.5, 1.0]


def test_intervals_of_goodput_are_covered() -> None:
    """Exactly: the chance that Wilson's interval of 120 requests holds a true share of 90 % is 93 to 97 %."""
    held = 0.0
    for kept in range(121):
        found = metrics.goodput(measured(kept / 120), Slo(p95_s=3.0))
        if found and found[1] <= 0.9 <= found[2]:
            held += float(binom.pmf(kept, 120, 0.9))
    assert 0.93 <= held <= 0.97


def test_knee_of_nothing() -> None:
    assert find_knee([SweepPoint("run", "awq", 8, p95_ms=1.0)], NINETY) == Knee("awq", NINETY.words)
