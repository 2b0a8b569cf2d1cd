"""The input cells of cost.xlsx: what may be changed, in which unit, within which ends, and what it starts from.

A cell's defined name is the name of the assumption or of the service level's field, so a formula reads as in
harness.analysis. An empty cell is None there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from harness.analysis.levels import levels
from harness.assumptions import RANGES, Assumptions
from harness.report.run import Run

RENT_OR_OWN = "rent_or_own"
"""The one input that is a word."""


@dataclass(frozen=True, slots=True)
class Input:
    """A cell that may be changed; `needed`: not to nothing."""

    name: str
    title: str
    unit: str
    meaning: str
    form: str = "any"
    needed: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the most that is allowed in it."""
        return _ALLOWED[self.name]


_ALLOWED = RANGES | {
    "slo_p95_s": (1e-6, 1e6),
    "slo_ttft_s": (1e-6, 1e6),
    "slo_tpot_s": (1e-6, 1e6),
    "slo_goodput": (1e-6, 1.0),
}

GROUPS: tuple[tuple[str, tuple[Input, ...]], ...] = (
    ("Service level", (
        Input("slo_p95_s", "p95 of the whole answer", "s", "95 % of the answers end within this. Empty: no limit."),
        Input("slo_ttft_s", "p95 of the first token", "s", "95 % begin within this (TTFT). Empty: no limit."),
        Input("slo_tpot_s", "p95 of the time per token", "s", "95 % go on at this time a token. Empty: no limit."),
        Input("slo_goodput", "Requests inside all limits", "share", "Empty, as a rule. A share here decides alone, "
              "by the limits with which the requests were counted (Notes).", "share"),
    )),
    ("An hour of a card", (
        Input(RENT_OR_OWN, "Rent or own", "rent, own", "rent: the next cell is the price of an hour. own: those from "
              "the price of a card on make it.", "word", needed=True),
        Input("usd_per_hour", "Rent of a card, an hour", "USD", "Empty: as each row was priced."),
        Input("utilisation", "Of the hour under load", "share", "For prices of 1M tokens: the whole hour is paid, and "
              "this share of it serves. Empty: as each row says.", "share"),
        Input("card_usd", "Price of a card", "USD", "Own.", "usd"),
        Input("host_usd", "Its part of the host", "USD", "Own: machine, rack, network.", "usd", needed=True),
        Input("years", "Written off over", "years", "Own: in equal parts.", needed=True),
        Input("residual", "Residual value", "share", "Own: of the price of card and host, after those years.", "share",
              needed=True),
        Input("watts", "Power under load", "W", "Own: of a card. Empty: as measured."),
        Input("idle_watts", "Power without load", "W", "Own: of a card.", needed=True),
        Input("host_watts", "Its part of the host's power", "W", "Own: under load or not.", needed=True),
        Input("pue", "Power usage effectiveness", "ratio", "Own: watts from the grid for each watt of the machine.",
              needed=True),
        Input("usd_per_kwh", "A kilowatt-hour", "USD", "Own.", needed=True),
    )),
    ("Tokens", (
        Input("output_weight", "Weight of an output token", "ratio", "Priced as so many input tokens.", needed=True),
        Input("chat_conc", "Chat load", "users", "Prices are stated there too, inside the service level or not.",
              "count", needed=True, whole=True),
        Input("batch_conc", "Batch load", "users", "Likewise.", "count", needed=True, whole=True),
    )),
    ("Traffic", (
        Input("users", "Users at the peak", "users", "At once. Empty: not judged.", "count", whole=True),
        Input("requests_per_day", "Requests a day", "requests", "On a mean day. Empty: not judged.", "count"),
        Input("peak_factor", "Peak over the day's mean", "ratio", "Of the rate of requests.", needed=True),
        Input("peak_rps", "Requests at the peak", "req/s", "As from a trace. Empty: by the two cells above."),
        Input("headroom", "Headroom", "share", "Of a card's safe load: kept free.", "share", needed=True),
        Input("failover", "Failover", "cards", "They may be lost without leaving the service level.", "count",
              needed=True, whole=True),
        Input("users_per_tenant", "Users of a tenant", "users", "At once, at its peak.", "count", needed=True,
              whole=True),
        Input("context_tokens", "Context of a user", "tokens", "Held in the KV cache, to count what freed memory is "
              "worth.", "count", needed=True, whole=True),
    )),
    ("An API to break even against", (
        Input("api_usd_per_1m_input", "1M input tokens", "USD", "Empty: no comparison."),
        Input("api_usd_per_1m_output", "1M output tokens", "USD", "Empty: no comparison."),
    )),
)  # fmt: skip


def values(run: Run, assumptions: Assumptions) -> dict[str, float | str | None]:
    """What each input cell starts from. A price or a share that all levels have in common stands for "as the rows say",
    so that there is a figure to change."""
    found: dict[str, float | str | None] = {
        name: value for name, value in asdict(assumptions).items() if name != "api_name"
    }
    found |= {f"slo_{name}": value for name, value in asdict(run.slo).items()}
    found[RENT_OR_OWN] = "own" if assumptions.owned else "rent"
    for name in ("usd_per_hour", "utilisation"):
        if found[name] is None:
            found[name] = _in_common([getattr(level, name) for level in levels(run.points)])
    return found


def _in_common(figures: Sequence[float | None]) -> float | None:
    return figures[0] if len(set(figures)) == 1 else None


def checked(cell: Input, value: float | str | None) -> str:
    """What the check of an input comes to."""
    if value is None:
        return empty(cell)
    if isinstance(value, str):
        return "ok"
    low, high = cell.ends
    return "ok" if low <= value <= high and (not cell.whole or value == int(value)) else "outside"


def empty(cell: Input) -> str:
    return "needed" if cell.needed else "not given"
