"""$/1M output tokens: what the hour costs, over what the hour delivers.

    usd_per_1m = usd_per_hour / (tok_s × utilisation × 3600) × 1e6

tok_s: output tokens per second inside the measured window. utilisation: share of the hour in which the card serves
this load, 0 < u ≤ 1. The whole hour is charged to output tokens; input tokens carry no price of their own here. A price
belongs to an operating point, so every line states its own, and its interval is that of tok_s turned over: the hour's
price is taken as exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.knee import safe_load
from harness.analysis.levels import RATE, axis, levels, load, precision_order
from harness.errors import InputError
from harness.records import CostLine, Knee, SweepPoint


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


def cost_lines(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> list[CostLine]:
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
            stated = f"largest tested {unit.noun} inside {knee.slo}"
            at_knee = next((level for level in own if load(level) == safe_load(knee)), None)
            if at_knee and unit is RATE:
                stated += f": {unit.amount(load(at_knee))}"
            lines.append(_line(at_knee, stated) if at_knee else CostLine(precision, stated))
        lines += [_line(level, unit.amount(load(level))) for level in own]
    return lines


def price(point: SweepPoint) -> tuple[float | None, float | None, float | None]:
    """$/1M output tokens of one row and its interval, by the row's own hourly price and utilisation.

    The ends swap: the fewest tokens per second make the highest price.
    """
    per_hour, share = point.usd_per_hour, point.utilisation
    if per_hour is None or share is None:
        return None, None, None
    middle, low, high = (
        usd_per_1m(per_hour, tok_s, share) if tok_s else None for tok_s in (point.tok_s, point.tok_s_hi, point.tok_s_lo)
    )
    return middle, low, high


def _line(level: SweepPoint, operating_point: str) -> CostLine:
    middle, low, high = price(level)
    return CostLine(
        precision=level.precision,
        operating_point=operating_point,
        conc=level.conc,
        tok_s=level.tok_s,
        usd_per_hour=level.usd_per_hour,
        utilisation=level.utilisation,
        usd_per_1m_tokens=middle,
        usd_per_1m_tokens_lo=low,
        usd_per_1m_tokens_hi=high,
    )
