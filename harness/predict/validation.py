"""`bench predict --validate`: how wrong predictions are; with --refit everything is fitted anew and written down.

coefficients.toml ─► misses ─► tables (terminal, docs/predictor.md), figures, errors.csv
       ▲                 └───► bands.toml
    --refit: fit.py, all folds
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from harness.predict import cards, coefficients, fit, kv_logs, validate
from harness.predict.bands import Band, bands
from harness.predict.coefficients import Folds
from harness.predict.fit import Observation
from harness.predict.validate import Miss
from harness.scenario import scenarios_dir

DOCS = Path("docs") / "predictor"
BEGIN, END = "<!-- made by bench predict --validate: from here -->", "<!-- to here -->"
_QUANTITIES = {
    "tok_s": "tok/s",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "tpot_p50_ms": "TPOT p50",
    "tpot_p99_ms": "TPOT p99",
}


def run(console: Console, *, refit: bool, out: Path | None) -> None:
    """Print the validation. `refit`: fit first, and write catalogue and docs. `out`: write tables and figures there."""
    if refit:
        found = refitted(console)
        coefficients.write(found, scenarios_dir() / "catalogue" / coefficients.NAME)
        coefficients.folds.cache_clear()
    missed = validate.misses(coefficients.folds())
    page = tables(missed)
    if refit:
        made = validate.bands(missed)
        text = bands_text(made, validate.published_points(missed))
        (scenarios_dir() / "catalogue" / "bands.toml").write_text(text, encoding="utf-8")
        bands.cache_clear()
        write(missed, page, DOCS)
        into(Path("docs") / "predictor.md", page)
    if out is not None:
        write(missed, page, out)
    console.print(page, markup=False, highlight=False, soft_wrap=True)


def refitted(console: Console) -> Folds:
    """A fit to everything, and one without each card and each architecture."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    observed = fit.observations()
    say(f"{len(observed)} observations")
    whole = fit.fit(observed, say=say)
    by_card, by_generation = [_card(item) for item in observed], [_generation(item) for item in observed]
    folds = []
    for groups in (by_card, by_generation):
        names = sorted(set(groups))
        say(f"without {', '.join(names)}")
        folds.append(dict(zip(names, fit.without_each(observed, whole, groups, names), strict=True)))
    return Folds(whole.coefficients, *folds)


def _card(item: Observation) -> str:
    return cards.card(item.card).id


def _generation(item: Observation) -> str:
    return cards.card(item.card).generation


# --- words ------------------------------------------------------------------------------------------------------------


def tables(missed: Sequence[Miss]) -> str:
    """All tables, as Markdown."""
    kept = [miss for miss in missed if miss.case.kept]
    left = [miss for miss in missed if not miss.case.kept]
    parts = [
        f"{len(kept)} published rows that the rule keeps, of {len({miss.condition.card for miss in kept})} cards; each "
        "is predicted by a fit that has not seen its card. No card weighs more than a quarter of a median.",
        _table(("what", "rows", "cards", "median error", "promised"), _promised(kept)),
        _sign(kept),
        _kv(),
        "**By card**",
        _table(("card", "rows", "median error", "bias"), _grouped(kept, "card")),
        "**By kernel**",
        _table(("kernel", "rows", "median error", "bias"), _grouped(kept, "kernel")),
        "**By what was measured**",
        _table(("figure", "rows", "median error", "bias"), _grouped(kept, "figure")),
        "**By load**",
        _table(("load", "rows", "median error", "bias"), _grouped(kept, "load")),
        "**By engine**",
        _table(("engine", "rows", "median error", "bias"), _grouped(kept, "engine")),
        f"**Left out by the rule**: {len(left)} rows say enough to be predicted all the same.",
        _table(("why it is left out", "rows", "median error", "bias"), _grouped(left, "reason")),
    ]
    return "\n\n".join(parts)


def _promised(kept: Sequence[Miss]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, (belongs, most) in validate.PROMISES.items():
        own = [miss for miss in kept if belongs(miss)]
        error = validate.median_error(own, as_rate=belongs is validate.is_decode)
        cards_of = str(len({miss.condition.card for miss in own}))
        rows.append((name, str(len(own)), cards_of, _percent(error), f"at most {100 * most:.0f} %"))
    return rows


def _sign(kept: Sequence[Miss]) -> str:
    found = validate.pairs(kept)
    right, decided, share = validate.signs(found)
    near = len(found) - decided
    return (
        f"Whether INT4 is faster than 16 bit is told right in {right} of {decided} pairs of rows that differ in "
        f"nothing else ({_percent(share)} by weight; promised: 90 %); {near} more pairs were measured within "
        f"{100 * validate.NEAR:.0f} % of each other and have no sign."
    )


def _kv() -> str:
    logs = [log for log in kv_logs.read() if log.complete]
    errors = [abs(kv_logs.error(log)) for log in logs]
    inside = sum(error <= kv_logs.WITHIN for error in errors)
    return (
        f"KV-cache tokens are within {100 * kv_logs.WITHIN:.0f} % of what engines logged in {inside} of {len(logs)} "
        f"starts (median error {100 * float(np.median(errors)):.1f} %)."
    )


def _grouped(found: Sequence[Miss], what: str) -> Sequence[tuple[str, ...]]:
    keys: dict[str, Callable[[Miss], str]] = {
        "card": lambda miss: miss.condition.card,
        "kernel": lambda miss: miss.condition.kernel,
        "figure": lambda miss: _QUANTITIES[miss.quantity],
        "load": _load,
        "engine": lambda miss: f"{miss.case.row.engine} {miss.case.row.engine_version}",
        "reason": lambda miss: str(miss.case.left_out),
    }
    rows = validate.by(found, keys[what])
    return [(name, str(count), _percent(error), f"{100 * np.expm1(bias):+.0f} %") for name, count, error, bias in rows]


def _load(miss: Miss) -> str:
    load = miss.condition.load
    if load.kind == "users":
        return "one stream" if load.n == 1 else f"{'2 to 7' if load.n < 8 else '8 and more'} users"
    return "all at once" if load.kind == "burst" else "Poisson arrivals"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(names)} |", f"|{'|'.join(' --- ' if at == 0 else ' ---: ' for at in range(len(names)))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# --- files ------------------------------------------------------------------------------------------------------------


def bands_text(made: Sequence[Band], points: dict[str, int]) -> str:
    """bands.toml."""
    lines = ["# Made by `bench predict --validate --refit`; see harness/predict/bands.py and docs/predictor.md.\n"]
    for band in made:
        lines += [
            "[[band]]",
            *(f"{name} = {json.dumps(getattr(band, name))}" for name in ("figure", "load", "basis")),
            *(f"{name} = {round(getattr(band, name), 4)}" for name in ("low", "high")),
            f"n = {band.n}",
            f"cards = {band.cards}",
            f"median_error = {round(band.median_error, 4)}\n",
        ]
    lines += ["# Kept published rows of each card.", "[points]"]
    lines += [f"{name} = {count}" for name, count in sorted(points.items())]
    return "\n".join(lines) + "\n"


def into(page: Path, text: str) -> None:
    """Put the tables between their marks in the documentation."""
    if not page.exists():
        return
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def write(missed: Sequence[Miss], page: str, where: Path) -> None:
    """errors.csv, tables.md and a scatter plot for each promise into a directory."""
    from harness.predict.scatter import draw

    where.mkdir(parents=True, exist_ok=True)
    validate.write_csv(missed, where / "errors.csv")
    (where / "tables.md").write_text(page + "\n", encoding="utf-8")
    draw(missed, where)
