"""The what-if panel of capacity.html: its knobs, and the island of data that whatif.js computes from.

Here is done what takes the library: levels merged out of repeats, and of each two levels the ratio of their prices with
its interval. What is left to the browser is arithmetic. The island holds

    closed, unit      users of a closed loop, or req/s
    limits            the knobs that are limits of the service level: p95, ttft, tpot (seconds), or goodput (a share)
    assumptions       what the report assumed, and those limits; null: not given, or as the rows say
    precisions        name; levels by load; per_token[i][j]: the price of a token at its level j over the baseline's at
                      its level i, were their hours alike, with the ends of its interval; empty for the baseline
    a level           load; limits: of each limited column the figure, lo and hi, where less is better (knee.reading);
                      tok_s with lo and hi; req_s; verdict; usd_per_hour and utilisation of its rows; what electricity
                      adds to an owned hour, idle and under load (cost.Hour)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.analysis.cost import hour_usd
from harness.analysis.headline import baseline_words, label
from harness.analysis.knee import limits, reading, standing
from harness.analysis.levels import USERS, axis, compared, load, one_trace, precision_order
from harness.analysis.saving import savings
from harness.assumptions import RANGES, Assumptions
from harness.records import Knee, SweepPoint
from harness.report.run import Run
from harness.slo import Slo


@dataclass(frozen=True, slots=True)
class Knob:
    """A number to change, with a slider beside it. `name` is that of the assumption or of the limit (as in --slo)."""

    name: str
    label: str
    unit: str
    value: float | None
    """What the report assumed, in the library's own unit."""
    least: float
    most: float
    """What the library allows, in `unit`."""
    low: float
    high: float
    """Ends of the slider, in `unit`."""
    step: float | None = None
    """Of the slider; None: each step is a factor."""
    parts: float = 1
    """How many of `unit` make one of the library's: 100 for percent, 1000 for ms."""
    whole: bool = False
    optional: bool = False
    """May be left empty."""

    @property
    def shown(self) -> str:
        return "" if self.value is None else f"{self.value * self.parts:.12g}"


@dataclass(frozen=True, slots=True)
class Panel:
    """The panel as templates/capacity.html.j2 wants it."""

    groups: tuple[tuple[str, Sequence[Knob]], ...]
    names: Sequence[str]
    data: dict[str, Any]


def panel(run: Run, assumptions: Assumptions) -> Panel | None:
    """The panel of a run; None where there is nothing to ask: one trace at one speed, or no level with its figures."""
    order = precision_order(run.points)
    own = {
        precision: [level for level, _ in standing([row for row in run.points if row.precision == precision], run.slo)]
        for precision in order
    }
    judged = [level for found in own.values() for level in found]
    if one_trace(run.points) or not judged:
        return None
    service = _service_knobs(run.slo, judged)
    against = compared(run.points)
    data = {
        "closed": axis(run.points) is USERS,
        "unit": axis(run.points).unit,
        "baseline": f"{baseline_words(against) or label(order[0])}{run.words.also}",
        "limits": [knob.name for knob in service],
        "assumptions": asdict(assumptions) | {knob.name: knob.value for knob in service},
        "precisions": [
            {
                "name": f"{label(precision)}{run.words.also}",
                "levels": [_level(level, run.slo, assumptions) for level in own[precision]],
                "standing": "baseline" if precision in {order[0], *against.values()} else "no baseline",
                "base": order.index(against[precision]) if precision in against else None,
                "per_token": [
                    [_per_token(run.points, base, other, assumptions) for other in own[precision]]
                    for base in (own[against[precision]] if precision in against else ())
                ],
            }
            for precision in order
        ],
    }
    groups = (
        ("Service level", service),
        ("Price", _price_knobs(run, assumptions)),
        ("Traffic", _traffic_knobs(run, assumptions)),
        ("Reserve", _reserve_knobs(assumptions)),
    )
    return Panel(groups, [label(precision) for precision in order], data)


def _level(level: SweepPoint, slo: Slo, assumptions: Assumptions) -> dict[str, Any]:
    hour = hour_usd(replace(assumptions, utilisation=1.0), level)  # its parts do not depend on the share
    return {
        "load": load(level),
        "limits": [reading(level, limit.column) for limit in limits(slo)],
        "tok_s": (level.tok_s, level.tok_s_lo, level.tok_s_hi),
        "req_s": level.req_s,
        "verdict": level.verdict,
        "usd_per_hour": level.usd_per_hour,
        "utilisation": level.utilisation,
        "idle_usd": hour.idle_usd if hour else 0.0,
        "load_usd": hour.load_usd if hour else 0.0,
    }


def _per_token(
    points: Sequence[SweepPoint], base: SweepPoint, other: SweepPoint, assumptions: Assumptions
) -> list[float | None]:
    """The price of a token at `other` over that at `base` for hours that cost alike: what `savings` says of the two."""
    hours = [hour_usd(replace(assumptions, utilisation=1.0), at) for at in (base, other)]
    if len({hour.note for hour in hours if hour}) > 1:
        return [None, None, None]  # one pays for electricity and the other does not
    rows = [[row for row in points if (row.precision, load(row)) == (at.precision, load(at))] for at in (base, other)]
    knees = [Knee(at.precision, "", safe_conc=at.conc or None, cross_lo=load(at)) for at in (base, other)]
    saving = savings([*rows[0], *rows[1]], knees, Assumptions(usd_per_hour=1.0, utilisation=1.0))[0]
    return [None if share is None else 1 - share for share in (saving.share, saving.share_lo, saving.share_hi)]


# --- the knobs --------------------------------------------------------------------------------------------------------


def _service_knobs(slo: Slo, judged: Sequence[SweepPoint]) -> list[Knob]:
    """One for each limit. Of goodput it is the share: the limits within it were counted when the run was read."""
    if slo.goodput is not None:
        name = "Inside all limits"
        return [Knob("goodput", name, "%", slo.goodput, 0.1, 100, 50, 100, step=0.5, parts=100)]
    limited = (
        ("p95", "p95 limit", "s", slo.p95_s, 1, "p95_ms"),
        ("ttft", "TTFT limit, p95", "ms", slo.ttft_s, 1000, "ttft_p95_ms"),
        ("tpot", "TPOT limit, p95", "ms", slo.tpot_s, 1000, "tpot_p95_ms"),
    )
    knobs = []
    for name, words, unit, value, parts, column in limited:
        if value is not None:
            ends = [value * parts]
            ends += [end / 1e3 * parts for level in judged for end in reading(level, column) or () if end > 0]
            low, high = _round(min(ends) / 1.5), _round(max(ends) * 1.5)
            knobs.append(Knob(name, words, unit, value, 0.001, 1e6, low, high, parts=parts))
    return knobs


def _price_knobs(run: Run, assumptions: Assumptions) -> list[Knob]:
    share = run.common("utilisation") if assumptions.utilisation is None else assumptions.utilisation
    busy = _knob("utilisation", "Utilisation", "%", share, 1, 100, step=1, parts=100, optional=share is None)
    if assumptions.card_usd is not None:
        low, high = _around(assumptions.card_usd, 1000)
        return [_knob("card_usd", "Price of a card", "USD", assumptions.card_usd, low, high), busy]
    rent = run.common("usd_per_hour") if assumptions.usd_per_hour is None else assumptions.usd_per_hour
    low, high = _around(rent, 1)
    return [_knob("usd_per_hour", "Card-hour", "USD", rent, low, high, optional=rent is None), busy]


def _traffic_knobs(run: Run, assumptions: Assumptions) -> list[Knob]:
    given = assumptions
    knobs = [
        _knob("requests_per_day", "Requests a day", "", given.requests_per_day, 100, 1e8, optional=True),
        _knob("peak_factor", "Peak factor", "×", given.peak_factor, 1, 20, step=0.5),
    ]
    if given.peak_rps is not None:
        low, high = _around(given.peak_rps, 1)
        knobs[1] = _knob("peak_rps", "Requests/s at the peak", "", given.peak_rps, low, high)
    if axis(run.points) is USERS:
        users = _knob("users", "Users at the peak", "", given.users, 1, 1e4, whole=True, optional=True)
        knobs.insert(0, users)
    return knobs


def _reserve_knobs(assumptions: Assumptions) -> list[Knob]:
    return [
        _knob("headroom", "Headroom", "%", assumptions.headroom, 0, 95, step=1, parts=100),
        _knob("failover", "Failover cards", "", assumptions.failover, 0, 8, step=1, whole=True),
    ]


def _knob(
    name: str, label: str, unit: str, value: float | None, low: float, high: float, *, parts: float = 1, **more: Any
) -> Knob:
    """Of an assumption, whose range the library knows."""
    least, most = (end * parts for end in RANGES[name])
    return Knob(name, label, unit, value, least, most, low, high, parts=parts, **more)


def _around(value: float | None, usual: float) -> tuple[float, float]:
    """A slider's ends, a factor of ten to each side."""
    middle = value or usual
    return _round(middle / 10), _round(middle * 10)


def _round(value: float) -> float:
    return float(f"{value:.2g}")
