"""What one card carries, and how many cards that makes: users, requests and memory at the operating point.

The operating point is the largest tested load whose service level is safely kept (knee.safe_load). From it to cards:

    supply of a card    users U = safe load (closed loop)        requests Q = req_s of that level
    usable of it        U (1 − headroom)                         Q (1 − headroom)
    demand at the peak  users                                    requests_per_day / 86,400 × peak_factor

    cards = max(1, ⌈max(users / usable users, peak rate / usable rate)⌉) + failover

A measured user of a closed loop asks again as soon as the answer is there (after `think_s`, where the scenario has
one), so the two ways of asking are one by Little's law: users = rate × (E2E + think time). Who knows both gives both,
and the larger number of cards counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from harness.analysis.knee import safe_load
from harness.analysis.levels import USERS, axis, compared, levels, load, precision_order
from harness.assumptions import DAY_S, Assumptions
from harness.records import CapacityLine, Knee, SweepPoint, Verdict


def operating_levels(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> dict[str, SweepPoint]:
    """The level at the safe load of each precision that has one."""
    merged = {(level.precision, load(level)): level for level in levels(points)}
    found = {knee.precision: merged.get((knee.precision, safe_load(knee) or 0.0)) for knee in knees}
    return {precision: level for precision, level in found.items() if level is not None}


def capacity_lines(points: Sequence[SweepPoint], knees: Sequence[Knee]) -> list[CapacityLine]:
    """One line for each knee. Memory does not depend on the load: it is that of `memory_split`.

    `users` is None in an open loop: its safe rate stands in the knee.
    """
    operating = operating_levels(points, knees)
    memory = {line.precision: line for line in memory_split(points)}
    lines = []
    for knee in knees:
        at = operating.get(knee.precision)
        held = memory.get(knee.precision, MemoryLine(knee.precision))
        lines.append(
            CapacityLine(
                precision=knee.precision,
                slo=knee.slo,
                users=knee.safe_conc,
                tok_s=at.tok_s if at else None,
                req_s=at.req_s if at else None,
                p95_ms=at.p95_ms if at else None,
                weights_gib=held.weights_gib,
                kv_cache_gib=held.kv_cache_gib,
                kv_cache_tokens=held.kv_cache_tokens,
                verdict=at.verdict if at else None,
            )
        )
    return lines


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """What the engine of one precision holds, GiB: medians over its rows. None: the engine did not say."""

    precision: str
    kind: str | None = None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    other_gib: float | None = None

    @property
    def total_gib(self) -> float:
        """Sum of the parts that are known."""
        return sum(part for part in (self.weights_gib, self.kv_cache_gib, self.other_gib) if part)


def memory_split(points: Sequence[SweepPoint]) -> list[MemoryLine]:
    """One line for each precision. A row whose load was invalid still tells its engine's memory, so all rows count."""
    lines = []
    for precision in precision_order(points):
        own = [point for point in points if point.precision == precision]
        tokens = _median([point.kv_cache_tokens for point in own])
        lines.append(
            MemoryLine(
                precision=precision,
                kind=next((point.memory_kind for point in own if point.memory_kind), None),
                weights_gib=_median([point.weights_gib for point in own]),
                kv_cache_gib=_median([point.kv_cache_gib for point in own]),
                kv_cache_tokens=None if tokens is None else round(tokens),
                other_gib=_median([point.other_gib for point in own]),
            )
        )
    return lines


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None


# --- from demand to cards ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CardPlan:
    """Cards of one precision for the demand of an Assumptions. None: not known, not asked for, or no safe load."""

    precision: str
    slo: str
    safe_users: float | None = None
    """Supply of a card at its operating point; None in an open loop."""
    safe_rps: float | None = None
    usable_users: float | None = None
    """Supply less headroom."""
    usable_rps: float | None = None
    users: int | None = None
    """Demand at the peak."""
    peak_rps: float | None = None
    cards_for_load: int | None = None
    cards: int | None = None
    """With those kept for failover."""
    cards_lo: int | None = None
    cards_hi: int | None = None
    """By the interval of tok_s, with which requests a second rise and fall; safe users are a lower end already."""
    bound_by: Literal["users", "requests"] | None = None
    """Which of the two demands takes the more cards."""
    utilisation_peak: float | None = None
    """Demand at the peak / safe capacity of all cards."""
    utilisation_lost: float | None = None
    """The same with as many cards lost as were kept for it: at most 1 − headroom."""
    utilisation_mean: float | None = None
    """The day's mean rate / safe capacity of all cards; None without requests_per_day."""
    tenants_per_card: int | None = None
    verdict: Verdict | None = None
    """Of the operating point."""
    note: str = ""
    """Why there are no cards, or which demand could not be judged."""


def plan_cards(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[CardPlan]:
    """One plan for each knee, in their order; by the formulas of the module. Without a demand it holds the supply."""
    operating = operating_levels(points, knees)
    closed = axis(points) is USERS
    return [_plan(knee, operating.get(knee.precision), closed, assumptions) for knee in knees]


def _plan(knee: Knee, at: SweepPoint | None, closed: bool, assumptions: Assumptions) -> CardPlan:
    plan = CardPlan(knee.precision, knee.slo, users=assumptions.users, peak_rps=assumptions.peak)
    if at is None:
        return replace(plan, note=f"no tested load is safely inside {knee.slo}")
    kept = 1 - assumptions.headroom
    safe_users = load(at) if closed else None
    usable_users = None if safe_users is None else safe_users * kept
    usable_rps = at.req_s * kept if at.req_s else None
    tenants = None if usable_users is None else _whole(math.floor, usable_users / assumptions.users_per_tenant)
    plan = replace(
        plan,
        safe_users=safe_users,
        safe_rps=at.req_s,
        usable_users=usable_users,
        usable_rps=usable_rps,
        tenants_per_card=tenants,
        verdict=at.verdict,
    )
    by_users = None if plan.users is None or usable_users is None else plan.users / usable_users
    by_requests = None if plan.peak_rps is None or usable_rps is None else plan.peak_rps / usable_rps
    blind = []
    if plan.users is not None and by_users is None:
        blind.append("an open loop says nothing of users")
    if plan.peak_rps is not None and by_requests is None:
        blind.append("no requests a second were measured")
    if by_users is None and by_requests is None:
        return replace(plan, note="; ".join(blind) or "no demand is given: users, requests a day or a trace")

    wanted = max(by_users or 0.0, by_requests or 0.0)
    bound_by: Literal["users", "requests"] = "users" if wanted == by_users else "requests"
    for_load, spare = _cards(wanted), assumptions.failover
    cards_lo, cards_hi = (
        None if pace is None else _cards(max(by_users or 0.0, (by_requests or 0.0) / pace)) + spare
        for pace in (_share(at.tok_s_hi, at.tok_s), _share(at.tok_s_lo, at.tok_s))
    )
    cards = for_load + spare
    mean_rps = None if assumptions.requests_per_day is None else assumptions.requests_per_day / DAY_S
    return replace(
        plan,
        cards_for_load=for_load,
        cards=cards,
        cards_lo=cards_lo,
        cards_hi=cards_hi,
        bound_by=bound_by,
        utilisation_peak=wanted * kept / cards,
        utilisation_lost=wanted * kept / for_load,
        utilisation_mean=None if mean_rps is None or not at.req_s else mean_rps / (cards * at.req_s),
        note="".join(f"{reason}: judged by {bound_by} alone" for reason in blind),
    )


def _cards(wanted: float) -> int:
    return max(1, _whole(math.ceil, wanted))


def _whole(rounded: Callable[[float], int], value: float) -> int:
    """Cards come whole. Nine decimals first: 10 users × (1 − 0.9) carry 1 user, although 1 / 0.9999999999999998 > 1."""
    return rounded(round(value, 9))


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


# --- what freed memory is worth ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Freed:
    """Memory that a precision frees against the baseline, and what it holds instead; negative: it takes more."""

    precision: str
    baseline: str
    weights_gib: float | None = None
    kv_tokens: int | None = None
    users: int | None = None
    """kv_tokens / context_tokens, towards zero. What fits into memory: the service level may allow fewer."""
    context_tokens: int = 2048
    measured: bool = False
    """The engine filled the card with KV cache, and kv_tokens is what it then reported; else they are computed as
    freed bytes / KV bytes a token."""


def freed_memory(points: Sequence[SweepPoint], context_tokens: int = 2048) -> list[Freed]:
    """The baseline against each other precision.

    An engine on a GPU fills what the weights leave with KV cache. Where the two caches have one size, somebody set it
    (on a CPU always), and the freed memory lies idle: then it is computed how many tokens it would hold.
    """
    lines = {line.precision: line for line in memory_split(points)}
    return [_freed(lines[base], lines[other], context_tokens) for other, base in compared(points).items()]


def _freed(base: MemoryLine, other: MemoryLine, context_tokens: int) -> Freed:
    weights = None if base.weights_gib is None or other.weights_gib is None else base.weights_gib - other.weights_gib
    filled = base.kind == other.kind == "gpu" and (base.kv_cache_gib is None or base.kv_cache_gib != other.kv_cache_gib)
    tokens, measured = None, False
    if filled and base.kv_cache_tokens is not None and other.kv_cache_tokens is not None:
        tokens, measured = other.kv_cache_tokens - base.kv_cache_tokens, True
    elif weights is not None and other.kv_cache_gib and other.kv_cache_tokens:
        tokens = int(weights / (other.kv_cache_gib / other.kv_cache_tokens))
    return Freed(
        precision=other.precision,
        baseline=base.precision,
        weights_gib=weights,
        kv_tokens=tokens,
        users=None if tokens is None else int(tokens / context_tokens),
        context_tokens=context_tokens,
        measured=measured,
    )
