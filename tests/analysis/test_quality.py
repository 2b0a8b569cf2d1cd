"""KL, fidelity over texts and positions, divergence and survival: by hand, and beside scipy and statsmodels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from statsmodels.duration.survfunc import SurvfuncRight

from harness.analysis.paired import mcnemar, mean_interval, positive_mean_interval, share_interval
from harness.analysis.quality import (
    by_position,
    coarse_kl,
    divergence,
    exact_kl,
    fidelity,
    kaplan_meier,
    survival,
)
from harness.records import Answer, Position

LOGIT = st.floats(min_value=-20, max_value=20)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(value - top) for value in logits)) + top
    return [value - total for value in logits]


def listed(logs: list[float], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest, as a server lists them."""
    return sorted(enumerate(logs), key=lambda pair: -pair[1])[:count]


def test_exact_kl_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): ½ ln 2 + ½ ln(2/3) = 0.346574 - 0.202733 = 0.143841."""
    assert exact_kl(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])) == pytest.approx([0.143841], abs=1e-6)


def test_coarse_kl_by_hand() -> None:
    """p = (.5, .3, .2), q = (.4, .5, .1); p lists tokens 0 and 2, q lists 1 and 0, so they share token 0 alone:
    .5 ln(.5/.4) + .5 ln(.5/.6) = 0.111572 - 0.091161 = 0.020411; exactly it is 0.096953."""
    p, q = [(0, math.log(0.5)), (2, math.log(0.2))], [(1, math.log(0.5)), (0, math.log(0.4))]
    assert coarse_kl(p, q) == pytest.approx(0.020411, abs=1e-6)
    whole_p, whole_q = np.log([0.5, 0.3, 0.2]), np.log([0.4, 0.5, 0.1])
    assert exact_kl(whole_p, whole_q) == pytest.approx(0.096953, abs=1e-6)
    assert coarse_kl(list(enumerate(whole_p)), list(enumerate(whole_q)), whole=True) == pytest.approx(
        0.096953, abs=1e-6
    )


@given(st.lists(st.tuples(LOGIT, LOGIT), min_size=2, max_size=12), st.integers(1, 12), st.integers(1, 12))
def test_coarse_is_never_above_exact_and_never_below_zero(logits: list[tuple[float, float]], k: int, m: int) -> None:
    """The data-processing inequality, and exact is scipy's relative entropy."""
    p, q = log_softmax([one for one, _ in logits]), log_softmax([other for _, other in logits])
    exact = float(exact_kl(np.array(p), np.array(q)))
    assert exact == pytest.approx(entropy(np.exp(p), np.exp(q)), rel=1e-6, abs=1e-9)
    assert 0 <= coarse_kl(listed(p, k), listed(q, m)) <= exact + 1e-9
    everything = len(p)
    assert coarse_kl(listed(p, everything), listed(q, everything), whole=True) == pytest.approx(exact, abs=1e-12)
    assert coarse_kl(listed(p, everything), listed(q, everything)) == pytest.approx(exact, abs=1e-9)


def test_a_longer_list_says_more() -> None:
    rng = np.random.default_rng(5)
    p, q = (log_softmax(list(rng.normal(0, 3, 500))) for _ in range(2))
    bounds = [coarse_kl(listed(p, k), listed(q, k)) for k in (500, 100, 20, 5)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[1] > 0


def test_float32_noise_and_impossible_tokens_leave_it_finite() -> None:
    """Shares that add up to a little more than 1 leave a negative rest; -inf is a share of 0."""
    over = [(0, math.log(0.7)), (1, math.log(0.3000001))]
    assert coarse_kl(over, over) == 0.0
    assert coarse_kl(over, [(0, math.log(0.7)), (1, math.log(0.2999999))]) < 1e-6
    certain = [(0, 0.0), (1, -math.inf)]
    assert math.isfinite(coarse_kl([(0, -0.1)], certain)) and math.isfinite(coarse_kl(certain, [(0, -0.1)]))
    assert np.isfinite(exact_kl(np.log([0.5, 0.5]), np.array([0.0, -np.inf]))).all()
    single = np.float32(log_softmax(list(np.random.default_rng(1).normal(0, 3, 1280))))
    assert exact_kl(single, single) == 0.0
    assert exact_kl(single, single + np.float32(1e-6)) < 1e-9


def test_lists_without_a_common_token_say_nothing() -> None:
    """Everything is in the rest, 1 against 1: 0, the lowest lower bound."""
    assert coarse_kl([(0, -0.1)], [(1, -0.1)]) == 0.0
    assert coarse_kl([], []) == 0.0
    with pytest.raises(ValueError, match="different tokens"):
        coarse_kl([(0, -0.1)], [(1, -0.1)], whole=True)


# --- over texts ---------------------------------------------------------------------------------------------------


def row(text: str, position: int, *, kl: float = 0.1, precision: str = "awq", **changed: object) -> Position:
    made = Position(precision, 1, text, position, 7, -2.0, -1.5, kl, True, True, True)
    return replace(made, **changed)  # type: ignore[arg-type]


def test_fidelity_by_hand() -> None:
    """Two texts, three positions. KL (0.1 + 0.2 + 0.6) / 3 = 0.3; perplexity exp((1 + 2 + 3) / 3) = e²; of the
    baseline exp((1 + 1 + 2.5) / 3) = e^1.5; the ratio e^0.5; 2 of 3 agree; one of three lost, none gained, p = 1."""
    (found,) = fidelity([
        row("a", 1, kl=0.1, logprob=-1.0, base_logprob=-1.0),
        row("a", 2, kl=0.2, logprob=-2.0, base_logprob=-1.0, agrees=False, right=False),
        row("b", 1, kl=0.6, logprob=-3.0, base_logprob=-2.5, right=False, base_right=False),
    ])  # fmt: skip
    assert (found.precision, found.first, found.last, found.texts, found.positions) == ("awq", None, None, 2, 3)
    assert found.kl_nats == pytest.approx(0.3)
    assert found.perplexity == pytest.approx(math.exp(2)) and found.base_perplexity == pytest.approx(math.exp(1.5))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.5))
    assert found.agreement == pytest.approx(2 / 3)
    assert (found.right_to_wrong, found.wrong_to_right, found.p_value) == (pytest.approx(1 / 3), 0.0, 1.0)
    assert (found.kl_nats_lo, found.perplexity_ratio_hi, found.agreement_lo) == (None, None, None)  # two texts


def made_rows(texts: int = 6, positions: int = 40, precision: str = "awq") -> list[Position]:
    rng = np.random.default_rng(texts)
    return [
        row(
            f"text {text}", at + 1, precision=precision, kl=float(rng.gamma(0.5, 0.1)),
            logprob=float(-rng.gamma(2, 1)), base_logprob=float(-rng.gamma(2, 0.9)), agrees=bool(rng.random() < 0.9),
            right=bool(rng.random() < 0.5), base_right=bool(rng.random() < 0.6),
        )
        for text in range(texts) for at in range(positions - 3 * text)
    ]  # fmt: skip


def test_its_intervals_are_those_over_whole_texts() -> None:
    rows = made_rows()
    (found,) = fidelity(rows)
    by_text = [[one for one in rows if one.text == name] for name in dict.fromkeys(one.text for one in rows)]
    counts = np.array([float(len(text)) for text in by_text])

    def sums(value: str) -> np.ndarray:
        return np.array([sum(getattr(one, value) for one in text) for text in by_text])

    assert (found.kl_nats_lo, found.kl_nats_hi) == pytest.approx(positive_mean_interval(sums("kl_nats"), counts))
    ends = mean_interval(sums("base_logprob") - sums("logprob"), counts) or (0, 0)
    assert (found.perplexity_ratio_lo, found.perplexity_ratio_hi) == pytest.approx(tuple(map(math.exp, ends)))
    assert (found.agreement_lo, found.agreement_hi) == pytest.approx(share_interval(sums("agrees"), counts))
    lost = sum(one.base_right and not one.right for one in rows)
    gained = sum(one.right and not one.base_right for one in rows)
    assert found.p_value == mcnemar(lost, gained) and found.right_to_wrong == pytest.approx(lost / len(rows))


def test_the_order_of_rows_makes_no_difference_but_that_of_precisions_does() -> None:
    rows = [*made_rows(precision="gptq"), *made_rows(precision="awq")]
    assert [line.precision for line in fidelity(rows)] == ["gptq", "awq"]
    (once,) = fidelity(rows[: len(rows) // 2])
    again = fidelity(rows[: len(rows) // 2][::-1])[0]
    assert again.kl_nats_hi == pytest.approx(once.kl_nats_hi, rel=0.1) and again.kl_nats == pytest.approx(once.kl_nats)


def test_the_baselines_line_is_its_second_round() -> None:
    (found,) = fidelity([row("a", 1, kl=9.0, precision="bf16"), row("a", 1, kl=0.01, precision="bf16", round=2)])
    assert (found.positions, found.kl_nats) == (1, 0.01)


def test_an_impossible_token_leaves_figures() -> None:
    (found,) = fidelity([row("a", 1, logprob=-math.inf, base_logprob=-math.inf)])
    assert found.perplexity_ratio == 1.0 and math.isfinite(found.perplexity or math.inf)


def test_no_rows_no_lines() -> None:
    assert fidelity([]) == [] and by_position([]) == []


def test_parts_of_the_context_by_hand() -> None:
    """Edges 1 and 16, then doubling. Positions 15 | 16, 31 | 32, 40: three parts, the last ends with the longest."""
    rows = [row("a", at, kl=kl) for at, kl in ((15, 1.0), (16, 2.0), (31, 4.0), (32, 5.0), (40, 7.0))]
    found = [(line.first, line.last, line.positions, line.kl_nats) for line in by_position(rows)]
    assert found == [(1, 15, 1, 1.0), (16, 31, 2, 3.0), (32, 40, 2, 6.0)]


def test_parts_that_nobody_reaches_are_left_out() -> None:
    rows = [row("a", at) for at in (3, 30)] + [row("a", 5, precision="gptq")]
    assert [(line.precision, line.first, line.last) for line in by_position(rows, [1, 10, 20, 50])] == [
        ("awq", 1, 9), ("awq", 20, 49), ("gptq", 1, 9),
    ]  # fmt: skip


def test_parts_add_up_to_the_whole() -> None:
    rows = made_rows()
    (whole,), parts = fidelity(rows), by_position(rows)
    assert sum(part.positions for part in parts) == whole.positions
    total = sum((part.kl_nats or 0) * part.positions for part in parts)
    assert total / whole.positions == pytest.approx(whole.kl_nats)


# --- answers of their own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [((1, 2, 3), (1, 2, 3), None), ((1, 2, 3), (1, 5, 3), 1), ((1, 2), (1, 2, 3), 2), ((4,), (5,), 0), ((), (), None)],
)
def test_divergence(a: tuple[int, ...], b: tuple[int, ...], shared: int | None) -> None:
    assert divergence(a, b) == divergence(b, a) == shared


def test_survival_by_hand() -> None:
    """Five answers: one differs at its 2nd token, one ends the same after 2, one differs at its 3rd, two end after 5.
    S(2) = 4/5. At 3 three are left: S(3) = 4/5 · 2/3 = 8/15. Greenwood V(2) = 1/(5 · 4) = 0.05, so √V / -ln 0.8 =
    1.002079, times 1.959964 = 1.964039: 0.8^e^±1.964039 = 0.8^7.1280 = 0.2038 and 0.8^0.14029 = 0.9692."""
    found = kaplan_meier("awq", [(2, True), (2, False), (3, True), (5, False), (5, False)])
    assert (found.answers, found.tokens, found.at_risk) == (5, (0, 2, 3), (5, 5, 3))
    assert found.share == pytest.approx((1, 4 / 5, 8 / 15))
    assert found.lo[1] == pytest.approx(0.2038, abs=1e-4) and found.hi[1] == pytest.approx(0.9692, abs=1e-4)
    assert (found.lo[0], found.hi[0]) == (None, None)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=40))
def test_survival_is_that_of_statsmodels(ends: list[tuple[int, bool]]) -> None:
    found = kaplan_meier("awq", ends)
    if not any(differs for _, differs in ends):
        assert found.share == (1.0,)
        return
    oracle = SurvfuncRight([end for end, _ in ends], [int(differs) for _, differs in ends])
    at = [list(oracle.surv_times).index(token) for token in found.tokens[1:]]
    assert found.share[1:] == pytest.approx(oracle.surv_prob[at])
    assert list(found.at_risk[1:]) == list(oracle.n_risk[at])
    for share, low, high, index in zip(found.share[1:], found.lo[1:], found.hi[1:], at, strict=True):
        if share > 1e-9:  # the same interval on the log-log scale, from the standard error of the oracle
            width = 1.959964 * oracle.surv_prob_se[index] / (share * -math.log(share))
            assert (low, high) == (pytest.approx(share ** math.exp(width)), pytest.approx(share ** math.exp(-width)))
        else:
            assert low is high is None


def answer(prompt: str, precision: str, tokens: tuple[int, ...], round: int = 1, error: str | None = None) -> Answer:
    return Answer(prompt, precision, round, tokens=tokens, error=error)


def test_survival_of_answers() -> None:
    """awq differs at its second token in one of two, and ends the same after three in the other: S(2) = 1/2. bf16's
    second round never differs. What has no tokens, an error or no partner is left out."""
    found = survival(
        [
            answer("p", "bf16", (1, 2, 3)), answer("q", "bf16", (1, 2, 3)), answer("r", "bf16", ()),
            answer("p", "awq", (1, 9, 3)), answer("q", "awq", (1, 2, 3)), answer("r", "awq", (1,)),
            answer("s", "awq", (1,)), answer("q", "gptq", (1, 2, 3), error="timeout"),
            answer("p", "bf16", (1, 2, 3), round=2),
        ],
        "bf16",
    )  # fmt: skip
    assert [(one.precision, one.answers, one.tokens, one.share) for one in found] == [
        ("awq", 2, (0, 2), (1.0, 0.5)),
        ("bf16", 1, (0,), (1.0,)),
    ]


def test_an_answer_that_stops_where_the_other_goes_on_differs_there() -> None:
    (found,) = survival([answer("p", "bf16", (1, 2)), answer("p", "awq", (1, 2, 3))], "bf16")
    assert found.tokens == (0, 3) and found.share == (1.0, 0.0)
