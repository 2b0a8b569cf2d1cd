"""How often the intervals of harness/analysis/paired.py hold the truth, on made data whose truth is known.

    python benchmarks/quality_trials.py --trials 2000

Answers: n prompts, a share of them discordant, a share of those lost; no trials there, for the law is known. Positions:
texts of 32 to 128 tokens; within one they are autocorrelated and share a random effect, so 64 texts are far from 5,000
independent values. tests/analysis/test_paired_coverage.py holds the same cases to 93 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import multinomial, norm

from harness.analysis.paired import (
    Interval,
    mean_interval,
    paired_difference,
    positive_mean_interval,
    share_interval,
)

Floats = NDArray[np.float64]
Texts = tuple[Floats, Floats]
"""Sums and counts, each [trials, texts]."""

SHORTEST, LONGEST = 32, 128
CORRELATION = 0.5
"""Of neighbouring positions, beside what their text has in common."""


@dataclass(frozen=True)
class Case:
    """Made texts, the truth of their mean, and the interval that has to hold it."""

    draw: Callable[[np.random.Generator, int, int], Texts]
    truth: float
    interval: Callable[[Floats, Floats], Interval | None]


@dataclass(frozen=True)
class Covered:
    """Shares of the trials: held, and missed with the truth above or below; and the median width."""

    held: float
    above: float
    below: float
    width: float


def kl(text_sigma: float, token_sigma: float, law: str = "lognormal") -> Case:
    """KL-like: never negative, mean 0.02, heavy tails between texts (lognormal or gamma) and within (lognormal)."""

    def draw(rng: np.random.Generator, trials: int, texts: int) -> Texts:
        tokens = np.exp(token_sigma * _series(rng, trials, texts) - token_sigma**2 / 2)
        if law == "gamma":
            shape = 1 / (np.exp(text_sigma**2) - 1)  # as variable as the lognormal one
            effect = rng.gamma(shape, 1 / shape, (trials, texts, 1))
        else:
            effect = np.exp(text_sigma * rng.standard_normal((trials, texts, 1)) - text_sigma**2 / 2)
        return _texts(rng, 0.02 * effect * tokens)

    return Case(draw, 0.02, positive_mean_interval)


def log_ratio(mean: float, spread: float, skew: float) -> Case:
    """ln p - ln q of the following tokens, whose mean is the log of the perplexity ratio: both signs, skewed right."""

    def draw(rng: np.random.Generator, trials: int, texts: int) -> Texts:
        tokens = (np.exp(skew * _series(rng, trials, texts) - skew**2 / 2) - 1) / np.sqrt(np.exp(skew**2) - 1)
        effect = rng.gamma(4, 1 / 4, (trials, texts, 1))
        return _texts(rng, mean * effect + spread * np.sqrt(effect) * tokens)

    return Case(draw, mean, mean_interval)


def agreement(share: float, alike: float) -> Case:
    """Top-1 agreement: yes or no at each position; `alike` is the correlation of two positions of a text."""

    def draw(rng: np.random.Generator, trials: int, texts: int) -> Texts:
        both = (1 - alike) / alike
        effect = rng.beta(share * both, (1 - share) * both, (trials, texts, 1))
        return _texts(rng, (norm.cdf(_series(rng, trials, texts)) < effect).astype(np.float64))

    return Case(draw, share, share_interval)


CASES = {
    "KL, texts and tokens tame (σ 0.3, 1)": kl(0.3, 1.0),
    "KL, heavy tails (σ 0.5, 1.5)": kl(0.5, 1.5),
    "KL, heavy tails within a text (σ 0.3, 2)": kl(0.3, 2.0),
    "KL, texts very unlike (σ 1, 1)": kl(1.0, 1.0),
    "KL, gamma texts (as σ 0.5, 1.5)": kl(0.5, 1.5, "gamma"),
    "KL, gamma texts very unlike (as σ 1, 1)": kl(1.0, 1.0, "gamma"),
    "perplexity ratio 1.005": log_ratio(0.005, 0.1, 0.5),
    "perplexity ratio 1.05": log_ratio(0.05, 0.3, 1.0),
    "perplexity ratio 1.65": log_ratio(0.5, 1.0, 1.5),
    "agreement 60 %, texts alike": agreement(0.6, 0.02),
    "agreement 90 %": agreement(0.9, 0.02),
    "agreement 95 %, texts unlike": agreement(0.95, 0.05),
    "agreement 99 %": agreement(0.99, 0.005),
    "agreement 99.9 %": agreement(0.999, 0.002),
}
HARD = {
    "KL, texts and tokens wild (σ 1, 2)": kl(1.0, 2.0),
    "KL, one text in ten is most of it (σ 1.5, 1)": kl(1.5, 1.0),
    "agreement 97 %, its misses in few texts": agreement(0.97, 0.1),
}
"""Where the truth hangs on texts that are seldom drawn, and no interval from few texts can know."""
TEXTS = (8, 16, 30, 64)

PROMPTS, DISCORDANT, LOST = (30, 60, 100, 300), (0.02, 0.1, 0.3), (0.5, 0.8, 1.0)
"""Of paired answers: how many, the share of them discordant, and the share of those that were lost."""


def cover(case: Case, texts: int, trials: int, seed: int = 1) -> Covered:
    """The interval of each of `trials` made sets of texts, held against the truth."""
    sums, counts = case.draw(np.random.default_rng([seed, texts]), trials, texts)
    found = [case.interval(*one) or (-np.inf, np.inf) for one in zip(sums, counts, strict=True)]
    return _covered(np.array(found), case.truth)


def cover_pairs(prompts: int, discordant: float, lost: float) -> Covered:
    """The same of paired answers, and exactly: each (lost, gained) weighs what the trinomial law gives it."""
    shares = (discordant * lost, discordant * (1 - lost), 1 - discordant)
    tables = [(b, c, prompts - b - c) for b in range(prompts + 1) for c in range(prompts + 1 - b)]
    weights = multinomial.pmf(np.array(tables), prompts, shares)
    likely = [(table, float(weight)) for table, weight in zip(tables, weights, strict=True) if weight > 1e-12]
    found = np.array([paired_difference(b, c, prompts) for (b, c, _), _ in likely])
    return _covered(found, shares[0] - shares[1], np.array([weight for _, weight in likely]))


def cover_drawn_pairs(prompts: int, trials: int, seed: int = 1) -> float:
    """Share of trials whose interval holds the drop; each draws its discordance, to 30 %, and the share lost."""
    rng, held = np.random.default_rng([seed, prompts]), 0
    for _ in range(trials):
        discordant, lost = rng.uniform(0.01, 0.3), rng.uniform(0.5, 1)
        shares = (discordant * lost, discordant * (1 - lost), 1 - discordant)
        b, c, _ = rng.multinomial(prompts, shares)
        low, high = paired_difference(int(b), int(c), prompts)
        held += low <= shares[0] - shares[1] <= high
    return held / trials


def _covered(ends: Floats, truth: float, weights: Floats | None = None) -> Covered:
    share = np.full(len(ends), 1 / len(ends)) if weights is None else weights
    above, below = float(share[ends[:, 1] < truth].sum()), float(share[ends[:, 0] > truth].sum())
    return Covered(1 - above - below, above, below, float(np.median(ends[:, 1] - ends[:, 0])))


def _series(rng: np.random.Generator, trials: int, texts: int) -> Floats:
    """Standard normal values, autocorrelated along the last axis: [trials, texts, LONGEST]."""
    series = rng.standard_normal((trials, texts, LONGEST))
    for at in range(1, LONGEST):
        series[..., at] = CORRELATION * series[..., at - 1] + np.sqrt(1 - CORRELATION**2) * series[..., at]
    return series


def _texts(rng: np.random.Generator, values: Floats) -> Texts:
    """Cut to texts of uneven lengths, which say nothing about their values."""
    counts = rng.integers(SHORTEST, LONGEST + 1, values.shape[:2])
    inside = np.arange(LONGEST) < counts[..., None]
    return (values * inside).sum(axis=-1), counts.astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"Of {given.trials} trials, how many % of the intervals hold the truth (it is above + below); 95 promised.\n")
    print("| positions | " + " | ".join(f"{texts} texts" for texts in TEXTS) + " |")
    print("| --- |" + " ---: |" * len(TEXTS))
    for name, case in (CASES | HARD).items():
        print(
            f"| {name} | " + " | ".join(_cell(cover(case, texts, given.trials, given.seed)) for texts in TEXTS) + " |"
        )
    print("\n| prompts | discordant | " + " | ".join(f"{lost:.0%} of them lost" for lost in LOST) + " |")
    print("| ---: | ---: |" + " ---: |" * len(LOST))
    for prompts, discordant in product(PROMPTS, DISCORDANT):
        cells = " | ".join(_cell(cover_pairs(prompts, discordant, lost)) for lost in LOST)
        print(f"| {prompts} | {discordant:.0%} | {cells} |")


def _cell(found: Covered) -> str:
    return f"{100 * found.held:.1f} ({100 * found.above:.1f} + {100 * found.below:.1f})"


if __name__ == "__main__":
    main()
