"""`bench compare`: two run directories, before and after an upgrade; what got worse, in words, rows and a page.

Two runs can be compared where both asked the same of the server: lengths, arrivals, seed. If they did not, no ratio of
theirs means anything, and `compare_runs` refuses. What else differs (model, weights, machine, flags) may be the very
upgrade or an accident: it is said in front of every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness.analysis.compare import METRICS, MIN_PAIRS
from harness.analysis.headline import label
from harness.analysis.levels import RATE, USERS, axis, latest, load, shown
from harness.analysis.regression import (
    OUTCOMES,
    TOLERANCE,
    Change,
    LeftOut,
    Sample,
    changes,
    left_out,
    overall,
    spread_covered,
)
from harness.analysis.words import MEASURED, Words
from harness.errors import InputError
from harness.files import write_whole
from harness.inert import one_line
from harness.records import SweepPoint
from harness.report.differences import asked_differently, differences, facts, told
from harness.report.document import document
from harness.report.predicted import told as told_of
from harness.report.run import Run, load_run
from harness.report.tables import COMPARED, WORDS, escape, number, table
from harness.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class Versus:
    """Two runs compared."""

    before: Run
    after: Run
    tolerance: float
    metrics: tuple[str, ...]
    changes: list[Change]
    left_out: list[LeftOut]

    def exit_code(self, strict: bool = False) -> int:
        """For a CI: 1 where anything regressed, and with `strict` where anything is undecided; else 0.

        Of a prediction against a measurement: 1 only with `strict`, where they disagree.
        """
        if self.check:
            return int(strict and any(change.agrees is False for change in self.changes))
        bad = ("regressed", "undecided") if strict else ("regressed",)
        return int(any(change.outcome in bad for change in self.changes))

    @property
    def check(self) -> bool:
        """Whether a prediction is held against a measurement."""
        return self.before.predicted != self.after.predicted

    @property
    def words(self) -> Words:
        """How to speak of both: as of predictions where both are; of one beside a measurement it is said each time."""
        return self.before.words if self.before.predicted and self.after.predicted else MEASURED


def parse_metrics(text: str | None, option: str = "--metric") -> tuple[str, ...]:
    """'tok_s,p95_ms' as it is compared; None: all. Raises InputError naming the option."""
    if text is None:
        return METRICS
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in found if name not in METRICS]
    if unknown or not found:
        problem = f"{unknown[0]!r} is not compared{did_you_mean(unknown[0], METRICS)}" if unknown else "names none"
        raise InputError(f"{option} {text!r}: {problem}", allowed=f"{', '.join(METRICS)}, joined by commas")
    return found


def compare_runs(before: Path, after: Path, tolerance: float = TOLERANCE, metrics: Sequence[str] = METRICS) -> Versus:
    """Read two run directories and compare them; `tolerance` is a share, 0.05 for 5 %.

    Raises InputError when one is no run, when they asked different things, or when they have no cell in common.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"--tolerance {tolerance:.0%} allows anything", allowed="a share below 100%, as 5% or 0.05")
    one, two = load_run(before), load_run(after)
    different = asked_differently(one, two)
    if different:
        raise InputError(
            f"{one.name} and {two.name} did not ask the same: {'; '.join(different)}",
            allowed="two runs with the same lengths, arrivals and seed",
            remedy="measure one of them again with the other's scenario",
        )
    sides = Sample(one.points, one.requests), Sample(two.points, two.requests)
    found = Versus(
        one, two, tolerance, tuple(metrics), changes(*sides, tolerance, metrics), left_out(one.points, two.points)
    )
    if not found.changes:
        raise InputError(
            f"{one.name} and {two.name} have nothing to compare. {' '.join(_left_out_words(found))}".rstrip(),
            allowed="two runs that have a precision under the same load, not judged invalid",
            remedy="measure the same --precisions and loads in both",
        )
    return found


def title(versus: Versus) -> str:
    """The two runs and their engines: "march (vllm 0.32.0) → april (vllm 0.33.0)"."""
    found = facts(versus.before, versus.after)
    engines = (f" ({engine})" if engine else "" for engine in found.get("Engine", ("", "")))
    said = [run.words.also for run in (versus.before, versus.after)]
    return " → ".join(name + engine + also for name, engine, also in zip(found["Run"], engines, said, strict=True))


def headline(versus: Versus) -> str:
    """The verdict in a sentence or two, with the figure that changed most; the rest is in the table."""
    return _check_words(versus) if versus.check else versus.words.said(_verdict(versus))


def _check_words(versus: Versus) -> str:
    """How far a prediction is off: its median error by metric, and how often it agrees within the bands."""
    parts = []
    for metric in versus.metrics:
        errors = [_error(change, versus.after.predicted) for change in versus.changes if change.metric == metric]
        if errors:
            parts.append(f"{COMPARED[metric]} {_percent(median(errors))} (n = {len(errors)})")
    known = [change for change in versus.changes if change.agrees is not None]
    agree = f" {sum(change.agrees is True for change in known)} of {len(known)} figures agree within their intervals."
    return f"Predicted against measured: median error {', '.join(parts)}.{agree if known else ''}"


def _error(change: Change, after_predicted: bool) -> float:
    """|predicted − measured| / measured."""
    value = change.ratio.value or 1.0
    return abs((value if after_predicted else 1 / value) - 1)


def _verdict(versus: Versus) -> str:
    count = {name: sum(change.outcome == name for change in versus.changes) for name in OUTCOMES}
    total, share = len(versus.changes), _percent(versus.tolerance)
    rest = ", ".join(f"{count[name]} {name}" for name in OUTCOMES[1:] if count[name])
    if count["regressed"]:
        others = f" ({rest})" if rest else ""
        said = f"Regressed: {count['regressed']} of {total} figures are worse by more than {share}{others}."
        blind = any(change.outcome == "regressed" and change.basis == "requests" for change in versus.changes)
        care = " From one session of each run: a restart alone may have done that." if blind else ""
        return f"{said} {_most(versus, 'regressed')}{care}"
    better = f" {_most(versus, 'improved')}" if count["improved"] else ""
    if overall(versus.changes) == "undecided":
        return f"No regression of more than {share} is shown; not all of {total} figures are decided ({rest}).{better}"
    return f"No regression: none of {total} figures is worse by more than {share} ({rest}).{better}"


def cautions(versus: Versus) -> list[str]:
    """What differs beside the engine, and what bears on the figures; the gravest first."""
    one, two = versus.before, versus.after
    found = []
    if one.common("run_id") == two.common("run_id"):
        found.append("Both directories hold the same run: nothing can have changed.")
    first, second = facts(one, two).get("Started", ("", ""))
    if first and second and first > second:
        found.append(f"The run given first was measured later ({first}, {second}): is the order right?")
    for run in (one, two):
        found += [f"{run.name} is predicted. {told_of(run)[1]}"] if run.predicted else []
    found += differences(one, two)
    if one.source == "endpoint" or two.source == "endpoint":
        found.append("An endpoint: every latency holds the network, and the machine behind it is unknown.")
    for run, when in ((one, "before"), (two, "after")):
        rows = [point for point in latest(run.points) if point.verdict == "suspect"]
        if rows:
            found.append(f"Suspect rows {when}: {_named_rows(rows)}.")
    return found


def notes(versus: Versus) -> list[str]:
    """How the verdicts were made, what the intervals know, and what was left out."""
    share, total = _percent(versus.tolerance), len(versus.changes)
    if versus.check:
        agree = "Each ratio is after / before. They agree where its interval, from the error band and the noise of "
        return [
            f"{agree}the measurement, holds 1: then the prediction is not shown to be wrong.",
            *_left_out_words(versus),
        ]
    found = [
        f"Each ratio is after / before. Regressed or improved: its 95 % interval lies beyond {share}; unchanged: "
        f"between 1/{1 + versus.tolerance:g} and {1 + versus.tolerance:g}; anything else is undecided."
    ]
    if total > 1:
        beyond = sum(change.outcome != change.alone for change in versus.changes)
        found.append(
            f"Of {total} intervals some miss by chance, so the verdicts are drawn from all together "
            "(Benjamini and Hochberg, at most 2.5 % of what is called may be false)."
            + (f" {beyond} beyond the tolerance alone did not stand among the others: undecided." if beyond else "")
        )
    if any(change.basis == "bands" for change in versus.changes):
        found.append(
            "Predicted: an interval is that of both error bands, as if the two predictions erred on their own."
        )
    sessions = [change.sessions for change in versus.changes if change.basis == "sessions"]
    if sessions:
        few = " Two sessions hardly tell their spread: from four on most changes are decided."
        found.append(
            f"Sessions: {' and '.join(_range(side) for side in zip(*sessions, strict=True))} of the two runs; what "
            "differs from session to session is in the interval (Welch's, on logs)."
            + (few if min(map(min, sessions)) < 3 else "")
        )
    paired = [change for change in versus.changes if change.basis == "requests"]
    if paired:
        found.append(
            f"Requests: {_range([change.pairs for change in paired])} questions that both runs answered are the pairs "
            "behind a ratio, not all that were asked (tok/s: the two windows as they are). One session of each run "
            "cannot tell an upgrade from what a restart alone changes: only the tolerance covers that, up to "
            f"{spread_covered(versus.tolerance) * 100:.2g} % between sessions (standard deviation). To be sure, "
            "measure both with --repeats 4."
        )
        without = sum(change.ratio.lo is None for change in paired)
        if without:
            found.append(f"{without} have no interval: fewer than {MIN_PAIRS} requests that both runs answered.")
    for run, when in ((versus.before, "before"), (versus.after, "after")):
        if paired and run.requests_fault:
            found.append(f"Requests {when} cannot be read: {run.requests_fault}.")
    return found + _left_out_words(versus)


def rows(versus: Versus) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the table, a row a figure, as plain text; the last column says what a ratio is made of."""
    unit = "Users" if axis(versus.before.points) is USERS else RATE.unit
    sides = [f"{name}{run.words.also}" for name, run in (("Before", versus.before), ("After", versus.after))]
    header = ("Precision", unit, "Figure", *sides, "After / before", "Verdict", "Pairs")
    body: list[tuple[str, ...]] = []
    for change in versus.changes:
        figures = number(change.before), number(change.after), _times(change)
        cell = one_line(label(change.precision)), shown(change.load), _figure(change.metric)
        body.append((*cell, *figures, _outcome(change), _basis(change)))
    return header, body


def page(versus: Versus) -> str:
    """compare.md: the verdict, what differs, every figure, and how to read it."""
    header, body = rows(versus)
    cells = [[escape(cell) for cell in row] for row in body]
    bold = [[f"**{cell}**" if cell == "regressed" else cell for cell in row] for row in cells]
    blocks = [
        f"# {escape(title(versus))}",
        escape(headline(versus)),
        *([_listed(cautions(versus))] if cautions(versus) else []),
        "## What was compared" if versus.before.predicted or versus.after.predicted else "## What was measured",
        _listed([told(name, *both) for name, both in facts(versus.before, versus.after).items()]),
        "## Figures",
        table(header, bold, (*WORDS, "Figure")),
        "## How to read it",
        _listed(notes(versus)),
    ]
    return "\n\n".join(blocks) + "\n"


def write_page(versus: Versus, out: Path) -> None:
    """Write compare.md. Raises InputError where that cannot be."""
    try:
        write_whole(out, page(versus))
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}", remedy="name another file") from error


def to_json(versus: Versus, before: Path, after: Path) -> str:
    """Every change with both figures, its ratio and its verdict, and what has no ratio; the headline in words."""
    return document(
        "compare",
        before=before,
        after=after,
        tolerance=versus.tolerance,
        metrics=versus.metrics,
        changes=versus.changes,
        left_out=versus.left_out,
        headline=headline(versus),
        cautions=[*cautions(versus), *notes(versus)],
    )


def _left_out_words(versus: Versus) -> list[str]:
    """What has no ratio: cells that only one run has, invalid rows, and figures that are missing on one side."""
    words = []
    for run, when in ((versus.before, "before"), (versus.after, "after")):
        own = [item for item in versus.left_out if item.run == when]
        absent = [item.point for item in own if item.why == "absent"]
        invalid = [item.point for item in own if item.why == "invalid"]
        if absent:
            words.append(f"Only in {one_line(run.name)}, left out: {_named_rows(absent, reasons=False)}.")
        if invalid:
            words.append(f"Invalid in {one_line(run.name)}, left out: {_named_rows(invalid)}.")
    cells: dict[tuple[str, float, float | None], set[str]] = {}
    for change in versus.changes:
        cells.setdefault((change.precision, change.load, change.rate_rps), set()).add(change.metric)
    for (precision, at, rate), have in cells.items():
        lacking = [COMPARED[metric] for metric in versus.metrics if metric not in have]
        if lacking:
            words.append(f"{_cell(precision, at, rate)} has no {', '.join(lacking)} in one of the runs.")
    return words


def _named_rows(points: Iterable[SweepPoint], reasons: bool = True) -> str:
    """BF16 at 8 users (drifting); AWQ at 16 users, repeat 2 (errors)."""
    named = []
    for point in points:
        why = f" ({', '.join(reason.replace('_', ' ') for reason in point.verdict_reasons)})"
        repeat = f", repeat {point.repeat}" if point.repeat > 1 else ""
        cell = _cell(point.precision, load(point), point.rate_rps)
        named.append(f"{cell}{repeat}{why if reasons and point.verdict_reasons else ''}")
    return one_line("; ".join(named))


def _most(versus: Versus, outcome: str) -> str:
    """The largest change of one outcome: "Most of all AWQ at 8 users: p95 1.180× [1.102–1.263]."."""
    called = [change for change in versus.changes if change.outcome == outcome]
    most = max(called, key=lambda change: abs(math.log(change.ratio.value or 1.0)))
    cell = _cell(most.precision, most.load, most.rate_rps)
    return f"{'Most of all ' if len(called) > 1 else ''}{cell}: {COMPARED[most.metric]} {_times(most)}."


def _cell(precision: str, at: float, rate_rps: float | None) -> str:
    return f"{one_line(label(precision))} at {(USERS if rate_rps is None else RATE).amount(at)}"


def _times(change: Change) -> str:
    """0.853× [0.821–0.886]: three decimals, for tolerances are a few hundredths."""
    ratio = change.ratio
    if ratio.lo is None or ratio.hi is None:
        return f"{ratio.value:.3f}×, no interval"
    return f"{ratio.value:.3f}× [{ratio.lo:.3f}–{ratio.hi:.3f}]"


def _figure(metric: str) -> str:
    return COMPARED[metric] + (", ms" if metric.endswith("_ms") else "")


def _outcome(change: Change) -> str:
    """The verdict; of a prediction beside a measurement, whether they agree."""
    if not change.check:
        return change.outcome
    return {True: "agrees", False: "disagrees", None: "no interval"}[change.agrees]


def _basis(change: Change) -> str:
    """4 + 4 sessions; 120 requests."""
    if change.basis == "bands":
        return "none: error band"
    if change.basis == "requests":
        return f"{change.pairs} requests"
    return f"{change.sessions[0]} + {change.sessions[1]} sessions"


def _range(counts: Sequence[int]) -> str:
    """4; 121–442."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escape(sentence)}" for sentence in sentences)
