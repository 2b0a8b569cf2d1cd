"""`bench gpus` on paper: the ranking for a terminal, as Markdown and as CSV; the catalogue of cards as a table.

Every heading and sentence says that it is predicted. Names from outside are escaped in Markdown, and nothing in a
terminal's cell is taken for markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from harness.analysis.headline import label
from harness.errors import InputError
from harness.files import write_whole
from harness.predict.cards import Card
from harness.predict.rank import RankedCard, Wanted
from harness.prices import Prices, offer
from harness.records import write_table
from harness.report.document import document
from harness.report.planning import demand_sentence
from harness.report.tables import escape, number, table
from harness.report.terminal import print_rows

CAUSES = {"kv_cache": "KV cache full", "max_num_seqs": "max_num_seqs", "compute": "compute"}
HEADER = ("Rank", "Card", "Precision", "Cards", "USD a month", "USD/h", "Safe users a card", "Limit", "Band")
_WORDS = ("Card", "Precision", "Limit", "Band", "Price", "Other precisions")


# --- the ranking ------------------------------------------------------------------------------------------------------


def title(wanted: Wanted) -> str:
    """ "Predicted: cards for qwen2.5-7b at p95 ≤ 3 s, by USD a month"."""
    return f"Predicted: cards for {wanted.model.name} at {wanted.scenario.slo.words}, by USD a month"


def rows(found: Sequence[RankedCard]) -> list[tuple[str, ...]]:
    """Plain text under HEADER, in the order of `rank.ranked`: those that carry the traffic, with or without a price."""
    return [
        (
            "" if row.rank is None else str(row.rank),
            row.card,
            label(row.precision),
            banded(row.cards, row.cards_lo, row.cards_hi, ",d"),
            banded(row.usd_per_month, row.usd_per_month_lo, row.usd_per_month_hi, ",.0f"),
            "no price" if row.usd_per_hour is None else f"{row.usd_per_hour:.4g}",
            _users(row),
            limit_words(row),
            band_words(row),
        )
        for row in found
        if row.cards is not None
    ]


def banded(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """A figure and its error band: "7 [5–10]"; "7 [5–none]" where the slow end has no safe load. "" for missing."""
    if value is None or low is None:
        return ""
    return f"{value:{form}} [{low:{form}}–{'none' if high is None else f'{high:{form}}'}]"


def _users(row: RankedCard) -> str:
    most = max(row.tested, default=0)
    low, *others = (
        f"{users or 0}{'+' * (users == most)}" for users in (row.safe_users_lo, row.safe_users, row.safe_users_hi)
    )
    return f"{others[0]} [{low}–{others[1]}]"


def limit_words(row: RankedCard) -> str:
    """What a card's users are bound by: "p95, by compute"."""
    if row.limit is None:
        return f"none up to {max(row.tested)} users" if row.tested else ""
    return f"{row.limit}, by {CAUSES[row.cause]}" if row.cause in CAUSES else row.limit


def band_words(row: RankedCard) -> str:
    """What the error band stands on, in a word."""
    return "unvalidated" if row.unvalidated else "calibrated" if row.basis == "calibrated" else "validated"


def sentences(found: Sequence[RankedCard], wanted: Wanted) -> list[str]:
    """Plain text: the demand, the cheapest card, what the figures are, and what cannot be ranked."""
    said = [f"Assumed, not predicted: {demand_sentence(wanted.assumptions)}"]
    first = next((row for row in found if row.rank == 1 and row.wins), None)
    if first is not None:
        cards = "1 card" if first.cards == 1 else f"{first.cards} cards"
        said.append(
            f"Predicted: {first.name} in {label(first.precision)} is the cheapest, {cards} for "
            f"{banded(first.usd_per_month, first.usd_per_month_lo, first.usd_per_month_hi, ',.0f')} USD a month "
            f"({first.price})."
        )
        others = [row for row in found if row.rank == 1 and row.wins and row.card != first.card]
        if others:
            said.append(f"Predicted to cost the same: {', '.join(row.name for row in others)}.")
    else:
        said.append("Predicted: no card with a price carries this traffic.")
    said.append(
        "Cards are ranked by the prediction itself. In brackets are the ends of its 95 % error band: the cards, money "
        "and users if the card is as fast, or as slow, as predictions were wrong in validation; none: at the slow end "
        "not even one user is safe. `bench capacity` promises the slow end of a predicted run."
    )
    if any(row.unvalidated and row.cards is not None for row in found):
        said.append(
            "Predicted and unvalidated: fewer than three points of that card are published, and its band is that of "
            "cards whose whole architecture the fit had not seen."
        )
    if wanted.own:
        said.append(
            "Assumed, not predicted: cards are bought; their hosts cost nothing unless --assume says what, and under "
            "load a card draws the limit of its board."
        )
    return said


def left_out(found: Sequence[RankedCard]) -> list[str]:
    """A sentence for each precision of each card that carries nothing: why."""
    return [
        f"Predicted for {row.name}, {label(row.precision)}: {row.note or 'nothing'}"
        + (f" ({limit_words(row)})" if row.limit else "")
        for row in found
        if row.cards is None
    ]


def show(console: Console, found: Sequence[RankedCard], wanted: Wanted, top: int | None = None) -> None:
    """The winner of each card, the first `top` of them, and why those cards carry nothing that carry nothing at all."""
    winners = [row for row in found if row.wins]
    shown = winners if top is None else winners[:top]
    header = (*HEADER, "Other precisions")
    others = (", ".join(_beside(one) for one in found if one.card == row.card and not one.wins) for row in shown)
    cells = [(*row, other) for row, other in zip(rows(shown), others, strict=True)]
    numbers = [name for name in header if name not in _WORDS]
    print_rows(console, header, cells, title=title(wanted), numbers=numbers, lead=3)
    console.print()
    if len(shown) < len(winners):
        _say(console, f"Predicted as well: {len(winners) - len(shown)} more cards (--top, --out).")
    for sentence in sentences(found, wanted):
        _say(console, sentence)
    carrying = {row.card for row in winners}
    for sentence in left_out([row for row in found if row.card not in carrying]):
        _say(console, sentence)


def _beside(row: RankedCard) -> str:
    """A precision that does not win on its card, in a few words: "AWQ 836 USD", "BF16 none"."""
    if row.usd_per_month is not None:
        return f"{label(row.precision)} {row.usd_per_month:,.0f} USD"
    return f"{label(row.precision)} {'none' if row.cards is None else f'{row.cards} cards'}"


def _say(console: Console, sentence: str) -> None:
    console.print(f"- {sentence}", markup=False, highlight=False)


def page(found: Sequence[RankedCard], wanted: Wanted) -> str:
    """The whole ranking as Markdown: every precision of every card, the winner of each card in bold."""
    winners = {(row.card, row.precision) for row in found if row.wins}
    body = []
    for row, cells in zip([row for row in found if row.cards is not None], rows(found), strict=True):
        plain = [escape(cell) for cell in cells]
        if (row.card, row.precision) in winners:
            plain[2] = f"**{plain[2]}**"
        body.append((*plain, escape(row.price), number(row.tok_s)))
    parts = [
        f"# {escape(title(wanted))}",
        "\n".join(f"- {escape(sentence)}" for sentence in sentences(found, wanted)),
        "## The ranking, predicted",
        table((*HEADER, "Price", "tok/s a card"), body, _WORDS),
    ]
    missing = left_out(found)
    if missing:
        parts += ["## Predicted to carry nothing", "\n".join(f"- {escape(sentence)}" for sentence in missing)]
    return "\n\n".join(parts) + "\n"


def check_out(path: Path) -> Path:
    """Raises InputError for a file that is neither of the two kinds that can be written."""
    if path.suffix not in (".csv", ".md"):
        raise InputError(f"--out {path}: what kind of file?", allowed="a name that ends in .csv or .md")
    return path


def write(found: Sequence[RankedCard], wanted: Wanted, path: Path) -> None:
    """Every row: as a table of RankedCard, or as a page."""
    check_out(path).parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_table(path, found, RankedCard)
    else:
        write_whole(path, page(found, wanted))


def to_json(found: Sequence[RankedCard], wanted: Wanted) -> str:
    """`bench gpus --json`: every row, predicted as it is, and for what."""
    return document(
        "gpus",
        source="predicted",
        model=wanted.model.name,
        slo=wanted.scenario.slo,
        assumptions=wanted.assumptions,
        cards=found,
        sentences=[*sentences(found, wanted), *left_out(found)],
    )


# --- the catalogue ----------------------------------------------------------------------------------------------------


def show_catalogue(console: Console, cards: Sequence[Card], prices: Prices) -> None:
    """Cards as they are catalogued, and their cheapest rent; peaks of the data sheets, not predictions. Below, their
    names in full, and what of their figures is in doubt."""
    header = ("id", "GiB", "GB/s", "16-bit TFLOPS", "INT8 TOPS", "FP8 TFLOPS", "W", "USD/h")
    body = []
    for card in cards:
        rent = offer(card.id, prices)
        figures = (card.memory_gib, card.bandwidth_gb_s, card.bf16_tflops or card.fp16_tflops, card.int8_tops,
                   card.fp8_tflops, card.power_w, None if rent is None else rent.usd_per_hour)  # fmt: skip
        body.append((card.id, *("–" if value is None else f"{value:.4g}" for value in figures)))
    print_rows(console, header, body, numbers=header[1:])
    console.print()
    for card in cards:
        told = Text(f"{card.id}: {card.name}")
        console.print(told.append(f". {card.doubt}" if card.doubt else "", style="dim"))
