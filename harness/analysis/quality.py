"""How far a precision's next-token distributions are from the baseline's: KL, perplexity, top-1 agreement, survival.

**The same text, read by both** (Position). With p the baseline's distribution of the next token and q the precision's:

    KL(p || q) = Σ p ln(p / q)                        nats; the mean over positions
    perplexity = exp(- mean ln q(token))              of the token that follows in the text
    perplexity ratio = exp(mean(ln p(token) - ln q(token)))
    agreement                                         share of positions with the same likeliest token

Each interval takes whole texts for the unit (paired.py). The baseline's own rows are those of its second round: what
the engine changes by itself, on the same text, and the floor under every figure beside it.

**Its own answer, each** (Answer). Greedy answers are the same until the first token that differs; from there on they
go on from different texts. `survival` is the share still the same after t tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.analysis.paired import (
    Interval,
    mcnemar,
    mean_interval,
    positive_mean_interval,
    share_interval,
)
from harness.analysis.percentiles import Z95
from harness.records import Answer, Fidelity, Position

Floats = NDArray[np.float64]

Alternatives = Sequence[tuple[int, float]]
"""(token id, ln p) of the likeliest next tokens."""

RESOLUTION = 1e-6
"""Servers give logarithms in float32; what hundreds of such shares leave of 1 is known no better than this."""
LEAST_LOG = -103.0
"""About the ln of the smallest float32: what a server calls impossible is taken for this, and KL stays finite."""
FIRST_EDGE = 16


@dataclass(frozen=True, slots=True)
class Survival:
    """Share of a precision's answers that are still the baseline's after `tokens[i]` tokens; it stays until the next.

    A step for each length at which an answer differs, the first being 0 tokens and share 1. `lo` and `hi` are None
    where the share is 0 or 1: Greenwood's formula has no interval there.
    """

    precision: str
    answers: int
    tokens: tuple[int, ...]
    share: tuple[float, ...]
    lo: tuple[float | None, ...]
    hi: tuple[float | None, ...]
    at_risk: tuple[int, ...]
    """Answers that were the same up to the token before."""


def exact_kl(ln_p: NDArray[np.floating], ln_q: NDArray[np.floating]) -> Floats:
    """KL(p || q) in nats over the last axis, which holds ln of the whole vocabulary; any shape of float32 or float64.

    Summed as p ln(p/q) - p + q, for p and q both add up to 1: no term is negative, and what float32 lacks to 1 cancels.
    """
    p_log = np.maximum(np.asarray(ln_p, dtype=np.float64), LEAST_LOG)
    q_log = np.maximum(np.asarray(ln_q, dtype=np.float64), LEAST_LOG)
    p = np.exp(p_log)
    return np.asarray((p * (p_log - q_log) - p + np.exp(q_log)).sum(axis=-1).clip(min=0.0))


def coarse_kl(p: Alternatives, q: Alternatives, whole: bool = False) -> float:
    """KL(p || q) in nats of the tokens that both lists name, the others together as one: at most the exact KL.

    Proof. Write KL as a sum over all tokens of g(p, q) = p ln(p/q) - p + q, which is never negative and adds up to the
    same, for Σp = Σq = 1. For the tokens R that not both lists name the log-sum inequality says

        Σ_R g(p_i, q_i) ≥ g(Σ_R p_i, Σ_R q_i)         (data-processing inequality; Cover & Thomas 2006, theorem 2.7.1)

    Σ_R p_i is what the named tokens leave of 1. Below RESOLUTION it is noise and taken for RESOLUTION: that moves the
    smaller of the two towards the larger, or both to the same, and g grows with the distance on either side of p = q.
    So clipping can only lower the sum. `whole`: both lists hold the whole vocabulary, there is no R and the sum is
    exact; ValueError where they name different tokens.
    """
    theirs = dict(q)
    both = [(log, theirs[token]) for token, log in p if token in theirs]
    if whole:
        if not len(both) == len(p) == len(q):
            raise ValueError("whole: the two lists name different tokens")
        return float(exact_kl(*np.array(both).T)) if both else 0.0
    total = 0.0
    rest_p = rest_q = 1.0
    for raw_p, raw_q in both:
        ln_p, ln_q = max(raw_p, LEAST_LOG), max(raw_q, LEAST_LOG)
        one, other = math.exp(ln_p), math.exp(ln_q)
        total += one * (ln_p - ln_q) - one + other
        rest_p, rest_q = rest_p - one, rest_q - other
    rest_p, rest_q = max(rest_p, RESOLUTION), max(rest_q, RESOLUTION)
    return max(total + rest_p * math.log(rest_p / rest_q) - rest_p + rest_q, 0.0)


def fidelity(rows: Sequence[Position]) -> list[Fidelity]:
    """A line for each precision, in the order in which they first appear, over its latest round.

    The baseline's line is its second round against its first; rows of a first round of it are no comparison, and must
    not be among `rows`.
    """
    return [_measured(precision, table) for precision, table in _tables(rows).items()]


def by_position(rows: Sequence[Position], edges: Sequence[int] | None = None) -> list[Fidelity]:
    """The same for each part of the context, which tells whether a precision decays with length.

    `edges`: the first position of each part, ascending from 1; None: 1, 16, 32, 64, 128 ... A part that no text reaches
    has no line, and the last one ends with the longest text.
    """
    lines = []
    for precision, table in _tables(rows).items():
        longest = int(table["position"].max())
        starts = list(edges) if edges is not None else [1, *_doubling(FIRST_EDGE, longest)]
        for first, following in zip(starts, [*starts[1:], longest + 1], strict=True):
            inside = (table["position"] >= first) & (table["position"] < following)
            if inside.any():
                part = {name: column[inside] for name, column in table.items()}
                lines.append(_measured(precision, part, first, following - 1))
    return lines


def divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """How many tokens two answers share before the first that differs; the shorter's length if it begins the other.

    None: they are the same.
    """
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def survival(answers: Iterable[Answer], baseline: str) -> list[Survival]:
    """Kaplan-Meier curve of "still the same" for each precision, and for the baseline's second round if there is one.

    After t tokens S(t) = Π over t_i ≤ t of (1 - d_i / n_i): of n_i answers that were the same before token t_i, d_i
    differ at it. Answers that end without a difference leave the risk set at their length (censored): a longer answer
    might still have differed. With V = Σ d_i / (n_i (n_i - d_i)) by Greenwood, the 95 % interval is that of ln(-ln S):

        S ^ exp(± 1.96 √V / ln S)        (Kalbfleisch & Prentice 2002, section 1.4; the ends stay within 0..1)

    Answers without token ids, or with an error, say nothing here.
    """
    told = [answer for answer in answers if answer.error is None and answer.tokens]
    first = {answer.prompt_id: answer for answer in told if answer.precision == baseline and answer.round == 1}
    pairs: dict[str, list[tuple[int, bool]]] = {}
    for answer in told:
        again = answer.precision == baseline
        if answer.prompt_id in first and answer.round == (2 if again else 1):
            apart = divergence(first[answer.prompt_id].tokens, answer.tokens)
            found = (len(answer.tokens), False) if apart is None else (apart + 1, True)
            pairs.setdefault(answer.precision, []).append(found)
    return [kaplan_meier(precision, found) for precision, found in pairs.items()]


def kaplan_meier(precision: str, ends: Sequence[tuple[int, bool]]) -> Survival:
    """The curve of answers each of which differs at its n-th token, (n, True), or ends the same after n, (n, False)."""
    steps: list[tuple[int, float, float | None, float | None, int]] = [(0, 1.0, None, None, len(ends))]
    share, greenwood = 1.0, 0.0
    for token in sorted({end for end, differs in ends if differs}):
        at_risk = sum(end >= token for end, _ in ends)
        differing = sum(end == token and differs for end, differs in ends)
        share *= 1 - differing / at_risk
        if at_risk > differing:
            greenwood += differing / (at_risk * (at_risk - differing))
        steps.append((token, share, *_log_log(share, greenwood), at_risk))
    tokens, shares, lows, highs, risks = zip(*steps, strict=True)
    return Survival(precision, len(ends), tokens, shares, lows, highs, risks)


def _log_log(share: float, greenwood: float) -> tuple[float | None, float | None]:
    if not 0 < share < 1:
        return None, None
    width = Z95 * math.sqrt(greenwood) / -math.log(share)
    return share ** math.exp(width), share ** math.exp(-width)


def _doubling(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def _tables(rows: Sequence[Position]) -> dict[str, dict[str, Floats]]:
    """The columns of each precision's latest round, by name; texts as numbers from 0."""
    latest: dict[str, int] = {}
    for row in rows:
        latest[row.precision] = max(row.round, latest.get(row.precision, 1))
    grouped: dict[str, list[Position]] = {precision: [] for precision in latest}
    for row in rows:
        if row.round == latest[row.precision]:
            grouped[row.precision].append(row)
    return {precision: _columns(found) for precision, found in grouped.items()}


def _columns(rows: Sequence[Position]) -> dict[str, Floats]:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(row.text for row in rows))}
    read: dict[str, Callable[[Position], float]] = {
        "text": lambda row: numbers[row.text],
        "position": lambda row: row.position,
        "kl": lambda row: row.kl_nats,
        "log_ratio": lambda row: max(row.base_logprob, LEAST_LOG) - max(row.logprob, LEAST_LOG),
        "logprob": lambda row: max(row.logprob, LEAST_LOG),
        "agrees": lambda row: row.agrees,
        "lost": lambda row: row.base_right and not row.right,
        "gained": lambda row: row.right and not row.base_right,
    }
    return {name: np.fromiter(map(take, rows), dtype=np.float64, count=len(rows)) for name, take in read.items()}


def _measured(
    precision: str, table: Mapping[str, Floats], first: int | None = None, last: int | None = None
) -> Fidelity:
    """The figures of one precision over the rows of `table`."""
    numbers, texts = np.unique(table["text"], return_inverse=True)
    counts = np.bincount(texts).astype(np.float64)
    kl, log_ratio, agrees = (
        np.bincount(texts, weights=table[name]).astype(np.float64) for name in ("kl", "log_ratio", "agrees")
    )
    n = len(texts)
    mean = {name: float(column.sum()) / n for name, column in table.items()}
    kl_lo, kl_hi = _ends(positive_mean_interval(kl, counts))
    ratio_lo, ratio_hi = _ends(mean_interval(log_ratio, counts))
    agreement_lo, agreement_hi = _ends(share_interval(agrees, counts))
    return Fidelity(
        precision=precision,
        first=first,
        last=last,
        texts=len(numbers),
        positions=n,
        kl_nats=mean["kl"],
        kl_nats_lo=kl_lo,
        kl_nats_hi=kl_hi,
        perplexity=_exp(-mean["logprob"]),
        base_perplexity=_exp(-mean["logprob"] - mean["log_ratio"]),
        perplexity_ratio=_exp(mean["log_ratio"]),
        perplexity_ratio_lo=None if ratio_lo is None else _exp(ratio_lo),
        perplexity_ratio_hi=None if ratio_hi is None else _exp(ratio_hi),
        agreement=mean["agrees"],
        agreement_lo=agreement_lo,
        agreement_hi=agreement_hi,
        right_to_wrong=mean["lost"],
        wrong_to_right=mean["gained"],
        p_value=mcnemar(int(table["lost"].sum()), int(table["gained"].sum())),
    )


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return interval or (None, None)


def _exp(value: float) -> float:
    """A model that finds nothing likely has a perplexity beyond what a float holds; it ends at e^700."""
    return math.exp(min(value, 700.0))
