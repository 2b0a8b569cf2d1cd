"""How wrong the predictor is, by what was published: each row is predicted by a fit that never saw its card.

    published rows ─► coefficients without the row's card ─► predicted ─► Miss ─► medians, bands, tables, figures

`bench predict --validate` computes all of it anew from the coefficients of each fold (coefficients.toml); `--refit`
fits those first. Errors are |predicted / measured - 1|. A median over several cards weighs rows so that no card has
more than a quarter of it (`weights`). Bands are quantiles of measured / predicted, weighed alike, over folds that leave
out the card, and over folds that leave out its whole architecture for cards that nobody has published enough of.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.errors import KneebenchError
from harness.predict import cards
from harness.predict.bands import Band, Basis, Figure, LoadClass, use
from harness.predict.coefficients import Folds
from harness.predict.expect import expected
from harness.predict.published import Case, Condition, Quantity, cases
from harness.predict.roofline import Coefficients

Floats = NDArray[np.float64]

CAP = 0.25
"""Largest share of a median that one card may have."""
TAIL = 0.025
"""Of measured / predicted, on each side of a band."""
BASES: tuple[Basis, ...] = ("card", "architecture")
NEAR = 0.05
"""Pairs whose measured ratio is within this of 1 have no sign to be right about."""


@dataclass(frozen=True, slots=True)
class Miss:
    """One published row beside its prediction, which a fit without its card (or architecture) made."""

    case: Case
    predicted: float
    predicted_without_architecture: float

    @property
    def condition(self) -> Condition:
        assert self.case.condition is not None
        return self.case.condition

    @property
    def quantity(self) -> Quantity:
        assert self.case.quantity is not None
        return self.case.quantity

    @property
    def measured(self) -> float:
        assert self.case.value is not None
        return self.case.value

    @property
    def error(self) -> float:
        """|predicted / measured - 1|."""
        return abs(self.predicted / self.measured - 1)

    @property
    def rate_error(self) -> float:
        """The same of tokens a second, which of a TPOT is one over it."""
        return self.error if self.quantity == "tok_s" else abs(self.measured / self.predicted - 1)

    def log(self, basis: Basis = "card") -> float:
        """ln(measured / predicted)."""
        predicted = self.predicted if basis == "card" else self.predicted_without_architecture
        return float(np.log(self.measured / predicted))


def misses(folds: Folds) -> list[Miss]:
    """Every row whose condition can be told, kept or left out by the rule, beside its prediction.

    Conditions that cannot be simulated (a model that does not fit by our reckoning) are dropped here; `dropped` counts.
    """
    known: dict[tuple[Condition, str], Mapping[Quantity, float] | None] = {}

    def predicted(condition: Condition, fold: str, coefficients: Coefficients) -> Mapping[Quantity, float] | None:
        key = condition, fold
        if key not in known:
            try:
                known[key] = expected(condition, coefficients)
            except KneebenchError:
                known[key] = None
        return known[key]

    found = []
    for case in cases():
        if case.condition is None or case.quantity is None or case.value is None:
            continue
        card = cards.card(case.condition.card)
        near = predicted(case.condition, card.id, folds.without_card.get(card.id, folds.whole))
        far = predicted(case.condition, card.generation, folds.without_generation.get(card.generation, folds.whole))
        if near is not None and far is not None and case.quantity in near:
            found.append(Miss(case, near[case.quantity], far[case.quantity]))
    return found


# --- medians ----------------------------------------------------------------------------------------------------------


def weights(names: Sequence[str]) -> Floats:
    """A weight for each row, 1 where that leaves no card more than a quarter of the sum, less where it would not.

    With fewer than four cards nobody can have less than a quarter: then all cards weigh the same.
    """
    counts = Counter(names)
    share = dict.fromkeys(counts, 1.0)
    if len(counts) <= 1 / CAP:
        return np.array([1 / counts[name] for name in names])
    for _ in range(100):
        total = sum(share[name] * counts[name] for name in counts)
        over = [name for name in counts if share[name] * counts[name] > CAP * total * (1 + 1e-9)]
        if not over:
            break
        for name in over:
            others = total - share[name] * counts[name]
            share[name] = CAP / (1 - CAP) * others / counts[name]
            total = others + share[name] * counts[name]
    return np.array([share[name] for name in names])


def quantile(values: Sequence[float] | Floats, weight: Floats, q: float) -> float:
    """The value below which the share q of the weight lies, halves of its own row counted in, linear between."""
    order = np.argsort(values)
    sorted_values, sorted_weight = np.asarray(values, dtype=float)[order], weight[order]
    middle = (np.cumsum(sorted_weight) - sorted_weight / 2) / sorted_weight.sum()
    return float(np.interp(q, middle, sorted_values))


def median_error(found: Sequence[Miss], *, as_rate: bool = False) -> float | None:
    """Of the error, no card above a quarter; None for no rows. `as_rate`: of a TPOT, the error of 1 / TPOT."""
    if not found:
        return None
    errors = [miss.rate_error if as_rate else miss.error for miss in found]
    return quantile(errors, weights([miss.condition.card for miss in found]), 0.5)


# --- what is promised -------------------------------------------------------------------------------------------------


def is_decode(miss: Miss) -> bool:
    """Decode speed of one stream: its tokens a second, or the TPOT that they are one over."""
    load = miss.condition.load
    return load.kind == "users" and load.n == 1 and miss.quantity in ("tok_s", "tpot_p50_ms")


def is_throughput(miss: Miss) -> bool:
    """Tokens a second of eight or more at once."""
    return miss.quantity == "tok_s" and miss.condition.load.kind != "poisson" and miss.condition.load.n >= 8


def is_tpot(miss: Miss) -> bool:
    return miss.quantity == "tpot_p50_ms"


PROMISES: Mapping[str, tuple[Callable[[Miss], bool], float]] = {
    "decode tok/s of one stream": (is_decode, 0.12),
    "tok/s of 8 and more at once": (is_throughput, 0.20),
    "TPOT": (is_tpot, 0.25),
}
"""What the median error of kept rows may be at most."""


@dataclass(frozen=True, slots=True)
class Pair:
    """INT4 and 16 bit measured alike: how many times faster INT4 was, and was predicted to be."""

    int4: Miss
    plain: Miss

    @property
    def measured(self) -> float:
        return self._ratio(self.int4.measured, self.plain.measured)

    @property
    def predicted(self) -> float:
        return self._ratio(self.int4.predicted, self.plain.predicted)

    def _ratio(self, int4: float, plain: float) -> float:
        return int4 / plain if self.int4.quantity == "tok_s" else plain / int4

    @property
    def right(self) -> bool:
        return (self.measured > 1) == (self.predicted > 1)


_INT4 = frozenset({"marlin", "awq-gemm", "awq-dequant", "exllama"})


def pairs(found: Sequence[Miss]) -> list[Pair]:
    """Kept rows of one source that differ in the precision alone: each INT4 one with its 16-bit one.

    Of throughput and TPOT; TTFT is not what "faster" means, and its ratio follows the queue. Both must be of one source
    and its server of one version.
    """
    plain = {_alike(miss): miss for miss in found if miss.case.kept and miss.condition.kernel == "16bit"}
    chosen = (miss for miss in found if miss.case.kept and miss.condition.kernel in _INT4)
    return [
        Pair(miss, plain[_alike(miss)])
        for miss in chosen
        if miss.quantity in ("tok_s", "tpot_p50_ms") and _alike(miss) in plain
    ]


def _alike(miss: Miss) -> tuple[object, ...]:
    row, condition = miss.case.row, miss.condition
    return (
        row.source, row.gpu, row.model.partition("-GPTQ")[0], row.engine, row.engine_version, condition.lengths,
        condition.load, row.metric,
    )  # fmt: skip


def signs(found: Sequence[Pair]) -> tuple[int, int, float | None]:
    """(right, decided, share by weight) of the pairs whose measured ratio is not within `NEAR` of 1."""
    decided = [pair for pair in found if abs(pair.measured - 1) > NEAR]
    if not decided:
        return 0, 0, None
    weight = weights([pair.int4.condition.card for pair in decided])
    right = np.array([pair.right for pair in decided])
    return int(right.sum()), len(decided), float((weight * right).sum() / weight.sum())


# --- bands ------------------------------------------------------------------------------------------------------------


_FIGURES: Mapping[Quantity, Figure] = {
    "tok_s": "tok_s",
    "tpot_p50_ms": "tpot_ms",
    "ttft_p50_ms": "ttft_ms",
    "ttft_p99_ms": "ttft_ms",
}
"""Which figure's band a quantity tells of; the far tail of TPOT tells of none."""


def load_class(condition: Condition) -> LoadClass:
    load = condition.load
    if load.kind == "poisson":
        return "open"
    return "one" if load.kind == "users" and load.n == 1 else "users"


def bands(found: Sequence[Miss]) -> list[Band]:
    """A band for each group of quantities, by both bases, from kept rows.

    That of a strange architecture is at least as wide as that of a strange card: the luck of a few rows must not make
    the unknown look better known.
    """
    groups: dict[tuple[Figure, LoadClass], list[tuple[Miss, bool]]] = defaultdict(list)
    for miss in found:
        if miss.case.kept and miss.quantity in _FIGURES:
            wanted = use(_FIGURES[miss.quantity], load_class(miss.condition))
            groups[wanted.figure, wanted.load].append((miss, wanted.over))
    made = []
    for (figure, load), own in sorted(groups.items()):
        names = [miss.condition.card for miss, _ in own]
        card, strange = (
            _band(figure, load, basis, [-miss.log(basis) if over else miss.log(basis) for miss, over in own], names)
            for basis in BASES
        )
        made += [card, replace(strange, low=min(card.low, strange.low), high=max(card.high, strange.high))]
    return made


def _band(figure: Figure, load: LoadClass, basis: Basis, logs: Sequence[float], names: Sequence[str]) -> Band:
    """`logs`: ln(measured / predicted) of each row, `names` its card."""
    weight = weights(names)
    low, high = (float(np.exp(quantile(logs, weight, q))) for q in (TAIL, 1 - TAIL))
    error = quantile([abs(np.expm1(-log)) for log in logs], weight, 0.5)
    return Band(figure, load, basis, low, high, len(logs), len(set(names)), error)


def published_points(found: Sequence[Miss]) -> dict[str, int]:
    """Kept rows of each card."""
    return dict(Counter(cards.card(miss.condition.card).id for miss in found if miss.case.kept))


def by(found: Sequence[Miss], key: Callable[[Miss], str]) -> list[tuple[str, int, float, float]]:
    """(key, rows, median error, median of ln(predicted / measured)) of each group, largest first."""
    groups: dict[str, list[Miss]] = defaultdict(list)
    for miss in found:
        groups[key(miss)].append(miss)
    rows = []
    for name, own in groups.items():
        error = median_error(own)
        assert error is not None
        rows.append((name, len(own), error, float(np.median([-miss.log() for miss in own]))))
    return sorted(rows, key=lambda row: -row[1])


def write_csv(found: Sequence[Miss], path: Path) -> None:
    """Every row beside its prediction, for whoever wants to look for themselves."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["source", "card", "model", "engine", "version", "kernel", "input", "output", "load",
             "quantity", "kept", "left_out", "measured", "predicted", "error"]
        )  # fmt: skip
        for miss in found:
            row, condition = miss.case.row, miss.condition
            writer.writerow(
                [row.source, condition.card, condition.shape, row.engine, row.engine_version, condition.kernel,
                 row.input_len, row.output_len, row.load, miss.quantity, miss.case.kept, miss.case.left_out or "",
                 f"{miss.measured:.6g}", f"{miss.predicted:.6g}", f"{miss.predicted / miss.measured - 1:+.3f}"]
            )  # fmt: skip
