"""Service levels as people type them: what is read, how it is said, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.slo import Slo, parse_duration, parse_share, parse_slo


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("p95=3s", Slo(p95_s=3.0)),
        ("3s", Slo(p95_s=3.0)),
        ("3", Slo(p95_s=3.0)),
        ("800ms", Slo(p95_s=0.8)),
        ("ttft=500ms", Slo(ttft_s=0.5)),
        ("tpot=50ms", Slo(tpot_s=0.05)),
        ("p95=3s,ttft=500ms,tpot=50ms", Slo(3.0, 0.5, 0.05)),
        (" TTFT = 0.5 s , p95=3 s ", Slo(3.0, 0.5)),
        ("p95=3s,goodput=90%", Slo(p95_s=3.0, goodput=0.9)),
        ("ttft=500ms,goodput=0.99", Slo(ttft_s=0.5, goodput=0.99)),
        ("p95=3s,goodput=100%", Slo(p95_s=3.0, goodput=1.0)),
    ],
)
def test_read(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    ("slo", "words"),
    [
        (Slo(3.0), "p95 ≤ 3 s"),
        (Slo(0.25), "p95 ≤ 0.25 s"),
        (Slo(3.0, 0.5), "p95 ≤ 3 s and TTFT p95 ≤ 0.5 s"),
        (Slo(3.0, 0.5, 0.05), "p95 ≤ 3 s, TTFT p95 ≤ 0.5 s and TPOT p95 ≤ 50 ms"),
        (Slo(tpot_s=0.1), "TPOT p95 ≤ 0.1 s"),
        (Slo(3.0, goodput=0.9), "90 % of requests with E2E ≤ 3 s"),
        (Slo(3.0, 0.5, goodput=0.995), "99.5 % of requests with E2E ≤ 3 s and TTFT ≤ 0.5 s"),
        (Slo(), ""),
    ],
)
def test_said(slo: Slo, words: str) -> None:
    assert slo.words == words


@pytest.mark.parametrize(
    ("slo", "text"),
    [
        (Slo(3.0), "p95=3s"),
        (Slo(3.0, 0.5, 0.05), "p95=3s,ttft=0.5s,tpot=0.05s"),
        (Slo(ttft_s=0.5, goodput=0.9), "ttft=0.5s,goodput=0.9"),
    ],
)
def test_written(slo: Slo, text: str) -> None:
    assert slo.text == text


limits = st.one_of(st.none(), st.integers(1, 90_000).map(lambda ms: ms / 1000))


@given(limits, limits, limits, st.one_of(st.none(), st.integers(1, 1000).map(lambda share: share / 1000)))
def test_what_is_written_is_read_back(
    p95_s: float | None, ttft_s: float | None, tpot_s: float | None, goodput: float | None
) -> None:
    slo = Slo(p95_s, ttft_s, tpot_s, goodput)
    if any((p95_s, ttft_s, tpot_s)):
        assert parse_slo(slo.text) == slo


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("soon", "is no duration"),
        ("p95=0s", "is no duration"),
        ("p95=-3s", "is no duration"),
        ("p95=3m", "is no duration"),
        ("p95=", "is no duration"),
        ("", "is no duration"),
        ("p99=3s", "'p99' is no service level"),
        ("p95=3s,p95=4s", "'p95' is given twice"),
        ("3s,p95=4s", "'p95' is given twice"),
        ("p95=3s,", "'p95' is given twice"),
        ("goodput=90%", "goodput of what?"),
        ("p95=3s,goodput=0", "is a share of the requests"),
        ("p95=3s,goodput=101%", "is a share of the requests"),
        ("p95=3s,goodput=90", "is a share of the requests"),
        ("p95=3s,goodput=most", "is no share"),
    ],
)
def test_refused(text: str, said: str) -> None:
    """Each error names the option, what was given and what is allowed."""
    with pytest.raises(InputError) as caught:
        parse_slo(text, "--until")
    message = str(caught.value)
    assert said in message and message.startswith("--until") and "Allowed: " in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("text", "seconds"), [("3s", 3.0), ("3", 3.0), ("800ms", 0.8), ("1.5 s", 1.5), (" 2s ", 2.0)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "--slo") == seconds


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("12.5 %", 0.125), ("0", 0.0), ("100%", 1.0)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, "--precision") == share


@pytest.mark.parametrize("text", ["1,5s", "s", "1e3s", "3 s s", "٣"])
def test_no_durations(text: str) -> None:
    with pytest.raises(InputError, match="--slo"):
        parse_duration(text, "--slo")
