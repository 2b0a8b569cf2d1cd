"""The library's own figure for each formula of the workbook, by the key of its line: what a cell shows unrecalculated.

None is an empty cell. Where a line is a step on the way to a figure of harness.analysis and has no name there, the step
is taken here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.analysis.capacity import CardPlan, Freed, MemoryLine, freed_memory, memory_split, plan_cards
from harness.analysis.compare import Estimate, throughput_ratio
from harness.analysis.cost import (
    Hour,
    Prices,
    between,
    hour_usd,
    input_tok_s,
    price,
    prices_at,
    stated_lines,
    watts_under_load,
)
from harness.analysis.knee import placed, reading, safe_load
from harness.analysis.levels import BOOTSTRAP_FROM, USERS, axis, levels, load
from harness.analysis.saving import Saving, savings
from harness.analysis.spend import BreakEven, Spend, spends
from harness.assumptions import Assumptions
from harness.records import CostLine, Knee, SweepPoint
from harness.report.workbook.lines import BARS, POINTS, PRICES
from harness.slo import Slo

Cells = dict[str, float | str | None]

Sessions = Mapping[tuple[str, float, int], SweepPoint]
"""(precision, load, repeat) -> the row that counts, with tokens."""


# --- Levels -----------------------------------------------------------------------------------------------------------


def level_cells(own: Sequence[SweepPoint], slo: Slo, assumptions: Assumptions, sessions: Sessions) -> list[Cells]:
    """The figures of each level of a precision, in their order."""
    found, safe = [], True
    repeats = sorted({repeat for _, _, repeat in sessions})
    for level in own:
        place = placed(level, slo)
        inside = "unknown" if place is None else "yes" if place.surely_inside else "no"
        safe = safe and inside != "no"
        cells = _measured(level) | _kept(level, slo)
        cells |= {"inside": inside, "promised": load(level) if safe and inside == "yes" else 0.0}
        cells |= _hour(level, assumptions) | _level_prices(level, assumptions)
        for point, users in _stated(assumptions):
            cells[f"{point}_below"] = load(level) if level.tok_s and load(level) <= users else None
            cells[f"{point}_above"] = load(level) if level.tok_s and load(level) >= users else None
        for repeat in repeats:
            row = sessions.get((level.precision, load(level), repeat))
            cells[f"repeat_{repeat}"] = None if row is None else row.tok_s
        for figure in BARS:
            cells[f"{figure}_up"] = _minus(cells[f"{figure}_hi"], cells[figure])
            cells[f"{figure}_down"] = _minus(cells[figure], cells[f"{figure}_lo"])
        found.append(cells)
    return found


def _measured(level: SweepPoint) -> Cells:
    """The figures of a level, merged from its rows; latencies in seconds, ends as knee.reading takes them."""
    cells: Cells = {
        "load": load(level),
        "verdict": level.verdict,
        **_priced_by(level, level),
    }
    for key, column in (("p95", "p95_ms"), ("ttft", "ttft_p95_ms"), ("tpot", "tpot_p95_ms")):
        read = reading(level, column) or (None, None, None)
        for end, value in zip(("", "_lo", "_hi"), read, strict=True):
            cells[key + end] = None if value is None else value / 1e3
    outside = reading(level, "goodput")
    cells |= {"goodput": level.goodput, "goodput_lo": None if outside is None else 1 - outside[2]}
    return cells


def _priced_by(level: SweepPoint, row: SweepPoint) -> Cells:
    """What the prices of a level are made from; `row`: whose price of an hour and share count."""
    return {
        "tok_s": level.tok_s,
        "tok_s_lo": level.tok_s_lo,
        "tok_s_hi": level.tok_s_hi,
        "req_s": level.req_s,
        "input_tokens": level.input_tokens_mean,
        "output_tokens": level.output_tokens_mean,
        "power": level.power_w,
        "row_usd": row.usd_per_hour,
        "row_share": row.utilisation,
    }


def _kept(level: SweepPoint, slo: Slo) -> Cells:
    each = {"p95": Slo(p95_s=slo.p95_s), "ttft": Slo(ttft_s=slo.ttft_s), "tpot": Slo(tpot_s=slo.tpot_s)}
    each["goodput"] = Slo(goodput=slo.goodput)
    words: Cells = {}
    for key, alone in each.items():
        place = placed(level, alone)
        words[f"{key}_kept"] = "unknown" if place is None else "yes" if place.surely_inside else "no"
        if alone == Slo():
            words[f"{key}_kept"] = "no limit"
    return words


def _hour(level: SweepPoint, assumptions: Assumptions) -> Cells:
    hour = hour_usd(assumptions, level)
    cells: Cells = {
        "watts": watts_under_load(assumptions, level),
        "share": level.utilisation if assumptions.utilisation is None else assumptions.utilisation,
    }
    if hour is not None:
        cells |= {"capital": hour.capital_usd, "idle": hour.idle_usd, "under_load": hour.load_usd, "hour": hour.usd}
    return cells


def _level_prices(level: SweepPoint, assumptions: Assumptions) -> Cells:
    cells: Cells = {"input_tok_s": input_tok_s(level), "only": None}
    hour = hour_usd(assumptions, level)
    if hour is not None:
        cells |= _shared("", prices_at(level, hour.usd, hour.utilisation, assumptions.output_weight))
    return cells | dict(zip(("only", "only_lo", "only_hi"), price(level, assumptions), strict=True))


def _shared(prefix: str, prices: Prices) -> Cells:
    shared = (prices.output_only, prices.input, prices.output, prices.blended)
    return {f"{prefix}{name}": value for name, value in zip(PRICES, shared, strict=True)}


def _stated(assumptions: Assumptions) -> tuple[tuple[str, int], tuple[str, int]]:
    return (POINTS[1], assumptions.chat_conc), (POINTS[2], assumptions.batch_conc)


# --- Workings ---------------------------------------------------------------------------------------------------------


def workings_cells(
    points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions, sessions: Sessions
) -> list[Cells]:
    """The figures of each knee's precision, in the order of the knees, baselines before what is compared with them."""
    merged = levels(points)
    lines: dict[str, list[CostLine]] = {}
    for line in stated_lines(points, knees, assumptions):
        lines.setdefault(line.precision, []).append(line)
    memory = {line.precision: line for line in memory_split(points)}
    saved = {line.precision: line for line in savings(points, knees, assumptions)}
    freed = {line.precision: line for line in freed_memory(points, assumptions.context_tokens)}
    plans, spent = plan_cards(points, knees, assumptions), spends(points, knees, assumptions)
    found: list[Cells] = []
    operating: dict[str, SweepPoint | None] = {}
    for knee, plan, spend in zip(knees, plans, spent, strict=True):
        own = [level for level in merged if level.precision == knee.precision]
        at = next((level for level in own if load(level) == safe_load(knee)), None)
        operating[knee.precision] = at
        cells = _at_slo(own, at, lines[knee.precision][0], assumptions)
        if axis(points) is USERS:
            for (point, users), line in zip(_stated(assumptions), lines[knee.precision][1:], strict=True):
                cells |= _at_stated(point, users, own, line, assumptions, safe_load(knee) or 0.0)
        hour = None if at is None else hour_usd(assumptions, at)
        cells |= _cards(plan, assumptions) | _spend(spend, hour) | _api(spend, hour)
        cells |= _memory(memory.get(knee.precision, MemoryLine(knee.precision)))
        if knee.precision in saved:
            base = operating.get(saved[knee.precision].baseline)  # a baseline stands before what is compared with it
            cells |= _saving(saved[knee.precision], base, at, assumptions, sessions)
            cells |= _freed(freed[knee.precision])
        found.append(cells)
    return found


def _at_slo(own: Sequence[SweepPoint], at: SweepPoint | None, line: CostLine, assumptions: Assumptions) -> Cells:
    if at is None:
        return {"slo_load": "none"}
    place: Cells = {"slo_load": load(at), "slo_row": own.index(at) + 1, "slo_verdict": at.verdict}
    return place | _at_point("slo", at, at, line, assumptions)


def _at_stated(
    point: str, users: int, own: Sequence[SweepPoint], line: CostLine, assumptions: Assumptions, safe: float
) -> Cells:
    measured = [level for level in own if level.tok_s]
    below = max((level for level in measured if level.conc <= users), key=load, default=None)
    above = min((level for level in measured if level.conc >= users), key=load, default=None)
    place: Cells = {
        f"{point}_below": None if below is None else below.conc,
        f"{point}_above": None if above is None else above.conc,
        f"{point}_load": "not tested",
    }
    if below is None or above is None:
        return place
    exact = below is above
    place |= {
        f"{point}_load": users,
        f"{point}_safe": "yes" if users <= safe else "no",
        f"{point}_row": own.index(below) + 1,
        f"{point}_row_above": own.index(above) + 1,
        f"{point}_way": 0.0 if exact else math.log(users / below.conc) / math.log(above.conc / below.conc),
    }
    return place | _at_point(point, below if exact else between(below, above, users), below, line, assumptions)


def _at_point(point: str, level: SweepPoint, row: SweepPoint, line: CostLine, assumptions: Assumptions) -> Cells:
    """What a price needs and the prices, at a level that may lie between two; `row`: whose price and share count."""
    cells: Cells = {
        **_priced_by(level, row),
        "p95": None if level.p95_ms is None else level.p95_ms / 1e3,
        "input_tok_s": line.input_tok_s,
    }
    cells |= _hour(level, assumptions)
    for key, name in zip(PRICES, ("tokens", "input", "output", "blended"), strict=True):
        for end in ("", "_lo", "_hi"):
            cells[f"{key}{end}"] = getattr(line, f"usd_per_1m_{name}{end}")
    return {f"{point}_{key}": value for key, value in cells.items()}


def _cards(plan: CardPlan, assumptions: Assumptions) -> Cells:
    cells: Cells = {
        "usable_users": plan.usable_users,
        "cards_by_users": _divide(assumptions.users, plan.usable_users),
        "tenants": plan.tenants_per_card,
        "peak": assumptions.peak,
        "usable_rps": plan.usable_rps,
        "cards_by_requests": _divide(assumptions.peak, plan.usable_rps),
        "bound_by": plan.bound_by,
        "cards_for_load": plan.cards_for_load,
        "cards": plan.cards,
        "cards_lo": plan.cards_lo,
        "cards_hi": plan.cards_hi,
        "used_peak": plan.utilisation_peak,
        "used_lost": plan.utilisation_lost,
        "used_mean": plan.utilisation_mean,
    }
    return cells | {"cards_exact": cells[f"cards_by_{plan.bound_by}"] if plan.bound_by else None}


def _spend(spend: Spend, hour: Hour | None) -> Cells:
    cells: Cells = {
        "spend_share": spend.utilisation,
        "spend_hour": spend.usd_per_hour,
        "usd_per_day": spend.usd_per_day,
        "usd_per_month": spend.usd_per_month,
        "full_hour": None if hour is None else replace(hour, utilisation=1.0).usd,
    }
    return cells | _shared("effective_", spend.effective) | _shared("full_", spend.full_load)


def _api(spend: Spend, hour: Hour | None) -> Cells:
    card, fleet = spend.card_break_even, spend.fleet_break_even
    left = None
    if spend.api_usd_per_request is not None and card.most_per_day is not None and hour is not None:
        left = spend.api_usd_per_request - 24 * hour.load_usd / card.most_per_day
    return {
        "api_request": spend.api_usd_per_request,
        "api_day": spend.api_usd_per_day,
        "api_month": spend.api_usd_per_month,
        "card_most": card.most_per_day,
        "api_left": left,
        "card_even": card.per_day,
        "card_even_share": card.share,
        "card_pays": _pays(card),
        "fleet_most": fleet.most_per_day,
        "fleet_even": fleet.per_day,
        "fleet_even_share": fleet.share,
        "fleet_pays": _pays(fleet),
    }


def _pays(even: BreakEven) -> str | None:
    return None if even.never is None else "never" if even.never else "yes"


def _saving(
    saving: Saving, base: SweepPoint | None, at: SweepPoint | None, assumptions: Assumptions, sessions: Sessions
) -> Cells:
    cells: Cells = {"saving": saving.share, "saving_lo": saving.share_lo, "saving_hi": saving.share_hi}
    powered = [level is not None and watts_under_load(assumptions, level) is not None for level in (base, at)]
    pays = assumptions.owned and assumptions.usd_per_kwh > 0
    cells |= {"pairs": 0, "alike": "no" if pays and powered[0] != powered[1] else "yes"}
    if base is None or at is None:
        return cells
    pairs = []
    for repeat in sorted({repeat for _, _, repeat in sessions}):
        one, two = (sessions.get((level.precision, load(level), repeat)) for level in (base, at))
        if one is not None and two is not None and one.tok_s and two.tok_s:
            pairs.append((one, two))
            cells[f"log_{repeat}"] = math.log(two.tok_s / one.tok_s)
    ratio = throughput_ratio(pairs if len(pairs) > 1 else [(base, at)])
    if len(pairs) >= BOOTSTRAP_FROM:  # resampled, which no formula can
        ratio = Estimate(ratio.value)
        cells |= {"saving_lo": None, "saving_hi": None}
    cells |= {"pairs": len(pairs), "ratio": ratio.value, "ratio_lo": ratio.lo, "ratio_hi": ratio.hi}
    hours = [hour_usd(assumptions, level) for level in (base, at)]
    if cells["alike"] == "yes" and hours[0] is not None and hours[1] is not None and hours[0].usd:
        cells["hours"] = (hours[1].usd / hours[1].utilisation) / (hours[0].usd / hours[0].utilisation)
    return cells


def _memory(line: MemoryLine) -> Cells:
    keys = ("weights_gib", "kv_cache_gib", "other_gib", "kv_cache_tokens")
    return {key: getattr(line, key) for key in keys} | {"memory_kind": line.kind}


def _freed(line: Freed) -> Cells:
    reported = "yes" if line.measured else "no"
    return {
        "freed_gib": line.weights_gib,
        "freed_reported": reported,
        "freed_tokens": line.kv_tokens,
        "freed_users": line.users,
    }


def _minus(one: float | str | None, other: float | str | None) -> float | None:
    return one - other if isinstance(one, int | float) and isinstance(other, int | float) else None


def _divide(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or not lower else upper / lower
