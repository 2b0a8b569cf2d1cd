"""Operating guidance and risks of a run, in words: what to set, what to watch, what happened, and what is not known.

Every figure is one of the run's own rows; what a verdict's reason means and what to do about it stands in MEANINGS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from harness.analysis.bullets import Bullet, slower
from harness.analysis.case import Case
from harness.analysis.evidence import Evidence, drop_words
from harness.analysis.knee import KV_FULL, limits, placed, reading, safe_load
from harness.analysis.levels import USERS, Axis, axis, latest, levels, load, precision_order, shown
from harness.analysis.sides import Row, percent
from harness.assumptions import Assumptions
from harness.records import Knee, SweepPoint
from harness.report.predicted import measure_command
from harness.report.run import Run
from harness.report.tables import escape, interval, named, number, reasons, table

MEANINGS = {
    "client_bound": ("the load generator was late, and its lateness is in the figures", "free the client's machine"),
    "clock_step": ("somebody set the clock while it was measured", "measure again"),
    "clock_uncertain": (
        "the load came from several nodes, whose clocks are not known well enough for these figures",
        "let NTP or PTP keep their clocks, or bring the nodes nearer to each other",
    ),
    "cache_warm": ("prompts that should be new were found in the prefix cache: too fast", "restart the engine"),
    "too_few_samples": ("too few requests for a p95", "ask for more `requests`"),
    "imprecise": ("the interval of p95 is wider than was asked for", "ask for more `requests`"),
    "drifting": ("the second half of the window was another regime than the first", "warm up and measure longer"),
    "errors": ("requests failed", "read the engine's log; requests.csv names each error"),
    "length_mismatch": ("prompts or answers were not as long as asked: another question was measured", "see dialect"),
    "foreign_load": ("somebody else used the engine", "measure on an engine of your own"),
    "tokens_lost": ("the engine made tokens that never reached the client", "look between the two"),
    "counters_short": ("the counters are not those of the engine that answered", "measure one replica"),
    "slow_kernel": ("a quantized precision ran without a fused kernel", "another layout, or another card"),
    "preempting": (
        "the KV cache was full, requests were thrown out and computed again: latency jumps, it does not rise",
        "stay below these loads; longer contexts reach it sooner",
    ),
    "throttled": ("the card was slowed down by heat or by its power supply", "cool it, then measure again"),
    "simulated_engine": ("`bench serve-simulated` answered, no engine: a prediction in real time", "measure an engine"),
    "engine_restarted": ("the engine died and was started again", "read its log before it serves anybody"),
    "engine_died": ("the engine died", "read its log before it serves anybody"),
    "gave_up": ("the cell did not come to its end", "read the engine's log"),
    "no_window": ("no steady load was reached", "measure longer"),
    "unvalidated": (
        "the card has fewer than three published points: the error band is that of other architectures",
        "measure three points on the card, and let `bench calibrate` fit them",
    ),
}
"""Reason of a verdict -> (what it means, what to do)."""


def cite(row: Row, unit: Axis) -> str:
    """A row as a reader looks it up: `points.csv`: awq, 8 users, `tok_s`."""
    columns = ", ".join(f"`{column}`" for column in row.column.split(", "))
    return ", ".join(
        [f"`{row.table}`: {escape(row.precision)}", *([] if row.at is None else [unit.amount(row.at)]), columns]
    )


def _cells(rows: Sequence[SweepPoint], what: str) -> str:
    """The cells of several rows, loads gathered by precision, and what to look for there."""
    loads: dict[str, list[str]] = {}
    for row in rows:
        found = loads.setdefault(row.precision, [])
        found += [shown(load(row))] if shown(load(row)) not in found else []
    told = "; ".join(f"{escape(name)} at {', '.join(found)} {axis(rows).unit}" for name, found in loads.items())
    return f"`points.csv`: {told}, {what}"


# --- what to set, what to watch ---------------------------------------------------------------------------------------


def guidance_table(run: Run, knees: Sequence[Knee], assumptions: Assumptions) -> str:
    """A row for each precision: what to plan for, what to set, when to alert."""
    unit = axis(run.points)
    rows = [_guidance(run, knee, unit, assumptions) for knee in knees]
    header = ("Precision", f"Safe {unit.noun}", "Plan for", "max_num_seqs", "Alert when")
    return table(header, rows, words=header)


def _guidance(run: Run, knee: Knee, unit: Axis, assumptions: Assumptions) -> tuple[str, ...]:
    safe = safe_load(knee)
    at = _level(run.points, knee.precision, safe)
    if safe is None or at is None:
        return named(knee.precision), "none", "nothing", "", ""
    usable = safe * (1 - assumptions.headroom)
    whole = int(round(usable, 9)) if unit is USERS else usable
    planned = f"{unit.amount(whole) if whole else 'less than 1 user'}, {percent(assumptions.headroom)} kept free"
    return (
        named(knee.precision),
        unit.amount(safe),
        planned,
        _max_num_seqs(run, knee, at),
        "; ".join(_alerts(run, knee, at)),
    )


def _max_num_seqs(run: Run, knee: Knee, at: SweepPoint) -> str:
    """At the knee: what ran at the safe load. Below one: as it was, for nothing says that it should be less."""
    was = run.settings.get("max_num_seqs")
    if knee.cause == "max_num_seqs":
        return f"more than {escape(was)}: it is the limit" if was else "more: it is the limit"
    if knee.beyond_range or not at.running_peak:
        return f"{escape(was)}, as measured" if was else ""
    return f"{_running(at)}{f' (measured with {escape(was)})' if was else ''}"


def _running(at: SweepPoint) -> int:
    """Sequences that run at once at a load: its users, unless some of them had to wait; a peak may come between two
    readings of the counter."""
    return (at.running_peak or 0) if at.waiting_peak else max(at.running_peak or 0, at.conc)


def _alerts(run: Run, knee: Knee, at: SweepPoint) -> list[str]:
    """Beyond what the safe load itself showed: past that the service is no longer the one that was measured."""
    alerts = []
    for limit in limits(run.slo):
        if found := reading(at, limit.column):
            if limit.column == "goodput":
                alerts.append(f"goodput < {1 - found[2]:.1%} (limit {1 - limit.most:.1%})")
            else:
                alerts.append(f"{limit.name} > {number(found[2] / 1e3)} s (limit {number(limit.most / 1e3)})")
    if at.running_peak:
        alerts.append(f"more than {_running(at)} running")
    if at.waiting_peak is not None:
        alerts.append(f"more than {at.waiting_peak} waiting" if at.waiting_peak else "any waiting")
    if at.preemptions is not None and not at.preemptions:
        alerts.append("any preemption")
    if at.kv_usage_peak is not None:
        full = at.kv_usage_peak if knee.cause == "kv_cache" else KV_FULL
        alerts.append(f"KV cache > {percent(full)}")
    return alerts


def beyond(run: Run, knee: Knee) -> str:
    """What happened at the first tested load past the safe one, beside the safe load itself."""
    unit, safe = axis(run.points), safe_load(knee)
    own = [level for level in levels(run.points) if level.precision == knee.precision]
    past = next((level for level in own if load(level) > (safe or 0.0) and placed(level, run.slo)), None)
    if past is None:
        return f"**{named(knee.precision)}**: nothing beyond {unit.amount(safe)} was tested." if safe else ""
    before = _level(run.points, knee.precision, safe)
    parts = []
    for name, column, scale, kind in (("p95", "p95_ms", 1e3, " s"), ("", "tok_s", 1.0, " tok/s")):
        value = getattr(past, column)
        if value is not None:
            ends = (getattr(past, f"{column}{end}") for end in ("", "_lo", "_hi"))
            words = f"{name} {interval(*(None if end is None else end / scale for end in ends))}{kind}".strip()
            was = getattr(before, column) if before else None
            parts.append(words + (f" ({value / was:.2f}× that of {unit.amount(safe or 0)})" if was else ""))
    if past.kv_usage_peak is not None:
        parts.append(f"KV cache {percent(past.kv_usage_peak)} full")
    parts += [
        f"{count} {what}"
        for count, what in ((past.waiting_peak, "waiting"), (past.preemptions, "preemptions"))
        if count is not None
    ]
    verdict = "" if past.verdict == "valid" else f"; {past.verdict}: {reasons(past)}"
    return f"**{named(knee.precision)}** at {unit.amount(load(past))}: {', '.join(parts)}{verdict}."


def _level(points: Sequence[SweepPoint], precision: str, at: float | None) -> SweepPoint | None:
    return next((level for level in levels(points) if (level.precision, load(level)) == (precision, at)), None)


# --- risks ------------------------------------------------------------------------------------------------------------

Risk = tuple[str, str, str]
"""The risk, the row that it stands on, what to do."""


def risks_table(run: Run, knees: Sequence[Knee], case: Case | None) -> str:
    """What may go wrong after signing, the gravest first; what nobody looked at is among it."""
    found = [risk for finder in _FINDERS for risk in finder(run, knees, case)]
    header = ("Risk", "Evidence", "What to do")
    return table(header, found, words=header)


def _prediction(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    if not run.predicted:
        return []
    return [("**These are predictions.** Nothing ran on this card: a model made the figures, and other people's "
             "published points their error bands", "`points.csv`: `source` is predicted",
             f"measure before buying: `{_in_cell(run)}`")]  # fmt: skip


def _in_cell(run: Run) -> str:
    """The command as code in a table's cell, which a bar or a backtick would end."""
    return re.sub(r"[|`]", "?", measure_command(run))


def _quality(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    evidence = case.evidence if case else None
    compared = [name for name in precision_order(run.points) if evidence and name in evidence.precisions]
    if evidence and compared:
        rest = [name for name in precision_order(run.points) if name not in (evidence.baseline, *compared)]
        whose = " and ".join(map(named, rest))
        unknown = (f"Nobody looked at the answers of {whose}", "`quality.toml`: not named there", "compare them too")
        return [*(_answers(evidence, name) for name in compared), *([unknown] if rest else [])]
    random = any(point.source == "dummy-weights" for point in run.points)
    what = "The weights were random: there was nothing to judge" if random else "The answers may be worse"
    do = "measure the model itself" if random else "judge both precisions on your own questions before signing"
    return [(f"**Quality was not measured in this run.** {what}", "no column of `points.csv` speaks of it", do)]


def _answers(evidence: Evidence, precision: str) -> Risk:
    """What the answers of one precision lost where they lost most, and what the gate says of it."""
    name, whole, worst = named(precision), evidence.whole(precision), evidence.worst(precision)
    said, rows = [], []
    if worst is not None:
        sure = "" if evidence.decided(worst) else ", which the pairs do not decide"
        said.append(f"it loses most in {escape(worst.family)}: {drop_words(worst)} of accuracy{sure}")
        rows.append(f"`families.csv`: {escape(precision)}, {escape(worst.family)}, `drop`, `drop_hi`")
    elif whole is not None:
        said.append(f"{drop_words(whole)} of accuracy lost over {whole.items} prompts, and in no family")
        rows.append(f"`families.csv`: {escape(precision)}, all, `drop`, `drop_hi`")
    if distance := evidence.whole_fidelity(precision):
        said.append(f"KL {interval(distance.kl_nats, distance.kl_nats_lo, distance.kl_nats_hi)} nats")
        rows.append(f"`fidelity.csv`: {escape(precision)}, `kl_nats`, `kl_nats_hi`")
    if issues := len(evidence.issues(precision)):
        counted = "1 answer" if issues == 1 else f"{issues} answers"
        said.append(f"{counted} with an issue that {named(evidence.baseline)}'s has not")
        rows.append(f"`failures.csv`: {escape(precision)}, `quant_issue`")
    passed = evidence.passed(precision)
    if passed is False:
        what = f"**{name} did not pass the gate**: {escape(evidence.refusal(precision))}"
        do = "do not serve it; [failures.md](failures.md) shows what breaks"
    elif passed:
        what = f"{name} passed the gate ({escape(evidence.gate_words)})"
        do = "read the examples in [failures.md](failures.md): the gate is no better than its prompts"
    else:
        what = f"**No gate was given for the answers of {name}**"
        do = "read [failures.md](failures.md), and say what may be lost with `--gate`"
    return "; ".join([what, *said]), "; ".join(rows) or "`quality.toml`", do


def _machine(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    if run.source == "endpoint":
        return [("The machine behind the endpoint is unknown, and the network is in every latency",
                 "`points.csv`: `source` is endpoint", "measure on the machine itself")]  # fmt: skip
    if run.device == "host":
        return [("**A CPU run predicts nothing about a GPU**", "`points.csv`: `memory_kind` is host",
                 "measure on the card that will serve")]  # fmt: skip
    return []


def _spread(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    if run.predicted or max(point.repeat for point in run.points) > 1:
        return []
    return [("Another start of the server may give other figures: the intervals know nothing of it",
             "`points.csv`: `repeat` is 1 throughout", "measure with `--repeats 3` or more")]  # fmt: skip


def _missing(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    planned = run.settings.get("precisions", ())
    have = {point.precision for point in run.points}
    lacking = [named(str(name)) for name in planned if name not in have] if isinstance(planned, list) else []
    if not lacking:
        return []
    log = "see what `bench predict` said of it" if run.predicted else "read the engine's log"
    return [(f"{' and '.join(lacking)} may not run at all", "`points.csv`: no row of it", log)]


def _unknown_limit(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    names = [knee.precision for knee in knees if knee.beyond_range and knee.tested_hi is not None]
    rows = [
        level
        for knee in knees
        if knee.precision in names and (level := _level(run.points, knee.precision, knee.tested_hi))
    ]
    if not rows:
        return []
    what = f"The limit of {' and '.join(map(named, names))} is not known: it was not reached"
    return [(what, _cells(rows, "`p95_ms`"), f"test higher {axis(run.points).nouns} before promising more")]


def _slower(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    found = slower(case) if case else None
    if not isinstance(found, Bullet):
        return []
    rows = "; ".join(cite(row, axis(run.points)) for row in found.rows)
    return [(escape(found.text), rows, "send such traffic to the other precision")]


def _judged(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    """Suspect and invalid rows, a line for each reason."""
    found = []
    for verdict, use in (("suspect", "used with care"), ("invalid", "used for nothing")):
        by_reason: dict[str, list[SweepPoint]] = {}
        for point in latest(run.points):
            if point.verdict == verdict:
                for reason in point.verdict_reasons or ("no reason given",):
                    by_reason.setdefault(reason, []).append(point)
        for reason, rows in by_reason.items():
            means, do = MEANINGS.get(reason, ("see the engine's log", "read the engine's log"))
            code = f"`{reason}`" if reason in MEANINGS else escape(reason)
            found.append((f"{verdict.capitalize()} rows, {use}: {means}", _cells(rows, code), do))
    return found


def _unpaired(run: Run, knees: Sequence[Knee], case: Case | None) -> list[Risk]:
    if not run.requests_fault or case is None or run.predicted:
        return []
    return [("Nothing is paired by request", escape(run.requests_fault), "restore requests.csv")]


_FINDERS: tuple[Callable[[Run, Sequence[Knee], Case | None], list[Risk]], ...] = (
    _prediction, _quality, _machine, _missing, _judged, _slower, _unknown_limit, _spread, _unpaired,
)  # fmt: skip
