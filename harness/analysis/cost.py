"""What a million tokens cost: the hour of a card over what it delivers.

An hour of a card is rented, H = usd_per_hour, or owned (straight-line, hours of a mean year):

    capital = (card_usd + host_usd) (1 − residual) / (years × 8,766)                8,766 = 365.25 × 24
    idle    = (idle_watts + host_watts) × pue / 1000 × usd_per_kwh
    load    = (watts − idle_watts) × pue / 1000 × usd_per_kwh                       watts: measured under this load
    H       = capital + idle + u × load                                             u: share of the hour under load

In that hour i × 3600 u input and o × 3600 u output tokens go through, i = req_s × input_tokens_mean and o = tok_s:

    usd_per_1m = H / (o × u × 3600) × 1e6              output only: the whole hour on the output tokens
    input      = H / ((i + w o) × u × 3600) × 1e6      w = output_weight
    output     = w × input
    blended    = H / ((i + o) × u × 3600) × 1e6

so input × tokens in + output × tokens out is the hour again. A price belongs to an operating point, so every line
states its own. Its interval is that of tok_s turned over: the hour is taken as exact, and input comes in with the
requests whose output tok_s is. What one precision saves is in saving.py, what a fleet costs in spend.py; docs/cost.md
works an example of each formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis.knee import safe_load
from harness.analysis.levels import RATE, USERS, axis, levels, load, precision_order
from harness.assumptions import Assumptions
from harness.errors import InputError
from harness.records import CostLine, Knee, SweepPoint, Verdict

YEAR_H = 365.25 * 24
AS_MEASURED = Assumptions()
"""Rented, at the price and the share of the hour that the rows were written with."""


def usd_per_1m(usd_per_hour: float, tok_s: float, utilisation: float = 1.0) -> float:
    """US dollars for a million output tokens. 0.36 USD/h at 100 tok/s, always busy: 0.36 / 360,000 × 1e6 = 1.00 USD."""
    if usd_per_hour < 0:
        raise InputError(
            f"usd_per_hour is {usd_per_hour:g}", allowed="0 or more", remedy="give the card's hourly price"
        )
    if not tok_s > 0:
        raise InputError(f"tok_s is {tok_s:g}", allowed="more than 0", remedy="a server without output has no price")
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation is {utilisation:g}", allowed="more than 0, at most 1", remedy="give a share")
    return usd_per_hour / (tok_s * utilisation * 3600) * 1e6


# --- an hour of a card ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hour:
    """What an hour of a card costs, US dollars, in its parts; the formulas stand in the module."""

    capital_usd: float
    """The rent, or the hour's part of what was paid for card and host."""
    idle_usd: float = 0.0
    load_usd: float = 0.0
    """What an hour wholly under load adds to `idle_usd`."""
    utilisation: float = 1.0
    watts: float | None = None
    """Power of the card under load that went in; None: no energy did."""
    note: str = ""
    """What was left out."""

    @property
    def energy_usd(self) -> float:
        return self.idle_usd + self.utilisation * self.load_usd

    @property
    def usd(self) -> float:
        return self.capital_usd + self.energy_usd


def hour_usd(assumptions: Assumptions, level: SweepPoint) -> Hour | None:
    """An hour of a card under the load of `level`; None where neither assumptions nor the row give a price and a share.

    Owned without a known power, or at an electricity price of 0, it holds no energy, and its note says so.
    """
    share = level.utilisation if assumptions.utilisation is None else assumptions.utilisation
    rent = level.usd_per_hour if assumptions.usd_per_hour is None else assumptions.usd_per_hour
    if share is None:
        return None
    if assumptions.card_usd is None:
        return None if rent is None else Hour(rent, utilisation=share)
    written_off = (assumptions.card_usd + assumptions.host_usd) * (1 - assumptions.residual)
    hour = Hour(written_off / (assumptions.years * YEAR_H), utilisation=share)
    watts = watts_under_load(assumptions, level)
    if not assumptions.usd_per_kwh:
        return replace(hour, note="electricity left out: its price is 0")
    if watts is None:
        return replace(hour, note="electricity left out: the card's power was not measured")
    usd_per_watt = assumptions.pue / 1000 * assumptions.usd_per_kwh
    return replace(
        hour,
        idle_usd=(assumptions.idle_watts + assumptions.host_watts) * usd_per_watt,
        load_usd=(watts - assumptions.idle_watts) * usd_per_watt,
        watts=watts,
    )


def watts_under_load(assumptions: Assumptions, level: SweepPoint) -> float | None:
    """Power of a card: as assumed, else as measured."""
    return level.power_w if assumptions.watts is None else assumptions.watts


# --- prices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prices:
    """$/1M tokens, four ways to share out the same money. None: the tokens it divides by are not known."""

    output_only: float | None = None
    input: float | None = None
    output: float | None = None
    blended: float | None = None


def split(usd: float, input_tokens: float | None, output_tokens: float | None, output_weight: float) -> Prices:
    """Money shared out to the tokens it paid for. 1 USD, 3 M in, 1 M out, weight 3: 0.17 in, 0.50 out, 0.25 blended."""
    if not output_tokens:
        return Prices()
    only = usd / output_tokens * 1_000_000
    if input_tokens is None:
        return Prices(output_only=only)
    per_input = usd / (input_tokens + output_weight * output_tokens) * 1_000_000
    blended = usd / (input_tokens + output_tokens) * 1_000_000
    return Prices(output_only=only, input=per_input, output=output_weight * per_input, blended=blended)


def prices_at(level: SweepPoint, usd_per_hour: float, utilisation: float, output_weight: float) -> Prices:
    """$/1M tokens of an hour under the load of `level`, by the formulas of the module."""
    if not level.tok_s:
        return Prices()
    busy_s = 3600 * utilisation
    incoming = input_tok_s(level)
    per_hour = None if incoming is None else incoming * busy_s
    only = usd_per_1m(usd_per_hour, level.tok_s, utilisation)
    return replace(split(usd_per_hour, per_hour, level.tok_s * busy_s, output_weight), output_only=only)


def input_tok_s(level: SweepPoint) -> float | None:
    """Input tokens a second: those of the requests that were completed."""
    return None if level.req_s is None or level.input_tokens_mean is None else level.req_s * level.input_tokens_mean


def price(point: SweepPoint, assumptions: Assumptions = AS_MEASURED) -> tuple[float | None, float | None, float | None]:
    """$/1M output tokens of one row and its interval, the whole hour on output.

    The ends swap: the fewest tokens per second make the highest price.
    """
    hour = hour_usd(assumptions, point)
    if hour is None:
        return None, None, None
    middle, low, high = (
        usd_per_1m(hour.usd, tok_s, hour.utilisation) if tok_s else None
        for tok_s in (point.tok_s, point.tok_s_hi, point.tok_s_lo)
    )
    return middle, low, high


def cost_lines(
    points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions = AS_MEASURED
) -> list[CostLine]:
    """For each precision: its operating point (the largest load inside the SLO) first, then every level.

    A precision that is nowhere safely inside the SLO keeps its operating line, without a price; one without a knee
    (a single trace) has its levels alone. `conc` is 0 in an open loop, whose rate `operating_point` names.
    """
    by_precision = {knee.precision: knee for knee in knees}
    unit, merged = axis(points), levels(points)
    lines = []
    for precision in precision_order(points):
        own = [level for level in merged if level.precision == precision]
        if knee := by_precision.get(precision):
            lines.append(_at_slo(points, own, knee, assumptions))
        lines += [_line(level, unit.amount(load(level)), assumptions) for level in own]
    return lines


def stated_lines(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[CostLine]:
    """For each knee: the largest load inside the SLO, then the stated chat and batch concurrency, inside it or not.

    A stated load that was not tested is interpolated between its tested neighbours (`between`); outside the tested
    range its line has no price. An open loop has no users to state: there the first line stands alone.
    """
    closed, merged = axis(points) is USERS, levels(points)
    lines = []
    for knee in knees:
        own = [level for level in merged if level.precision == knee.precision]
        lines.append(_at_slo(points, own, knee, assumptions))
        if closed:
            lines += [
                _at_stated(own, knee, name, users, assumptions)
                for name, users in (("chat", assumptions.chat_conc), ("batch", assumptions.batch_conc))
            ]
    return lines


def _at_slo(points: Sequence[SweepPoint], own: Sequence[SweepPoint], knee: Knee, assumptions: Assumptions) -> CostLine:
    unit = axis(points)
    stated = f"largest tested {unit.noun} inside {knee.slo}"
    at = next((level for level in own if load(level) == safe_load(knee)), None)
    if at is None:
        return CostLine(knee.precision, stated, note=f"no tested load is safely inside {knee.slo}")
    return _line(at, f"{stated}: {unit.amount(load(at))}" if unit is RATE else stated, assumptions)


def _at_stated(own: Sequence[SweepPoint], knee: Knee, name: str, users: int, assumptions: Assumptions) -> CostLine:
    stated = f"{name}, {USERS.amount(users)}"
    measured = [level for level in own if level.tok_s]
    exact = next((level for level in measured if level.conc == users), None)
    below = max((level for level in measured if level.conc < users), key=load, default=None)
    above = min((level for level in measured if level.conc > users), key=load, default=None)
    if exact is not None:
        return _line(exact, f"{stated}{_standing(knee, users)}", assumptions)
    if below is None or above is None:
        return CostLine(knee.precision, stated, conc=users, note="outside the loads that were measured")
    stated += f" (interpolated between {below.conc} and {above.conc}){_standing(knee, users)}"
    return replace(_line(between(below, above, users), stated, assumptions), interpolated=True)


def _standing(knee: Knee, users: int) -> str:
    """A price outside the service level is none to promise, so it says where it stands."""
    if knee.tested_lo is None:
        return ""
    if users <= (safe_load(knee) or 0):
        return f", inside {knee.slo}"
    surely_outside = knee.cross_lo is None or (knee.cross_hi is not None and users >= knee.cross_hi)
    return f", outside {knee.slo}" if surely_outside else f", not safely inside {knee.slo}"


def between(below: SweepPoint, above: SweepPoint, users: int) -> SweepPoint:
    """The figures of a level that was not tested, on the straight line through its neighbours on log-log axes:

        ln y = (1 − s) ln y₁ + s ln y₂        s = ln(users / N₁) / ln(N₂ / N₁)

    of those that a price needs, and their intervals' ends alike; a figure that one of the two lacks, it lacks too, and
    its verdict is the worse of theirs.
    """
    share = math.log(users / below.conc) / math.log(above.conc / below.conc)

    def at(column: str) -> float | None:
        one, two = getattr(below, column), getattr(above, column)
        return math.exp((1 - share) * math.log(one) + share * math.log(two)) if one and two else None

    return replace(
        below,
        conc=users,
        tok_s=at("tok_s"),
        tok_s_lo=at("tok_s_lo"),
        tok_s_hi=at("tok_s_hi"),
        req_s=at("req_s"),
        p95_ms=at("p95_ms"),
        power_w=at("power_w"),
        input_tokens_mean=at("input_tokens_mean"),
        output_tokens_mean=at("output_tokens_mean"),
        verdict=worse_verdict(below, above),
    )


def worse_verdict(one: SweepPoint, two: SweepPoint) -> Verdict:
    """Levels are valid or suspect: invalid rows have no part in them."""
    return "suspect" if "suspect" in (one.verdict, two.verdict) else "valid"


def _line(level: SweepPoint, operating_point: str, assumptions: Assumptions) -> CostLine:
    line = CostLine(
        precision=level.precision,
        operating_point=operating_point,
        conc=level.conc,
        tok_s=level.tok_s,
        input_tok_s=input_tok_s(level),
        p95_ms=level.p95_ms,
        verdict=level.verdict,
    )
    hour = hour_usd(assumptions, level)
    if hour is None:
        return replace(line, note="no price of an hour is given")
    prices, low, high = (
        prices_at(_paced(level, tok_s), hour.usd, hour.utilisation, assumptions.output_weight)
        for tok_s in (level.tok_s, level.tok_s_hi, level.tok_s_lo)
    )
    return replace(
        line,
        usd_per_hour=hour.usd,
        utilisation=hour.utilisation,
        usd_per_1m_tokens=prices.output_only,
        usd_per_1m_tokens_lo=low.output_only,
        usd_per_1m_tokens_hi=high.output_only,
        usd_per_1m_input=prices.input,
        usd_per_1m_input_lo=low.input,
        usd_per_1m_input_hi=high.input,
        usd_per_1m_output=prices.output,
        usd_per_1m_output_lo=low.output,
        usd_per_1m_output_hi=high.output,
        usd_per_1m_blended=prices.blended,
        usd_per_1m_blended_lo=low.blended,
        usd_per_1m_blended_hi=high.blended,
        note=hour.note,
    )


def _paced(level: SweepPoint, tok_s: float | None) -> SweepPoint:
    """The level at another end of its interval: requests, and with them input, come as much faster or slower."""
    pace = tok_s / level.tok_s if tok_s and level.tok_s else None
    return replace(level, tok_s=tok_s, req_s=None if pace is None or level.req_s is None else level.req_s * pace)
