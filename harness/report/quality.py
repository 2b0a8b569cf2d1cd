"""quality.md, fidelity.csv and two figures: how far a precision is from its baseline, and whether a gate lets it ship.

`evidence_of` is where the papers get what they may say of quality; `write_quality` writes all of a directory that holds
nothing else. Every number comes from harness.analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.analysis.evidence import Evidence
from harness.analysis.failures import beyond_noise, failures, outcomes, patterns
from harness.analysis.gate import TASK, judge_gate, parse_gate
from harness.analysis.headline import label
from harness.analysis.quality import by_position, fidelity, survival
from harness.quality.directory import Quality
from harness.records import Answer, Fidelity, Position, Sample, write_table
from harness.report.failures import called, drop_cell, line, p_cell, share, write_failures
from harness.report.page import write_page
from harness.report.quality_plots import write_quality_figures
from harness.report.tables import interval, listed, named, number, table


def write_quality(quality: Quality, out_dir: Path) -> list[Path]:
    """Write every paper of what was found about quality into `out_dir`, failures.md first; returns what was written."""
    return write_quality_papers(quality, evidence_of(quality), out_dir)


def write_quality_papers(quality: Quality, evidence: Evidence, out_dir: Path) -> list[Path]:
    """The same of evidence that was gathered already."""
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = by_position(_compared(quality))
    write_table(out_dir / "fidelity.csv", [*evidence.fidelity, *parts], Fidelity)
    figures = write_quality_figures(
        [evidence.baseline, *evidence.precisions],
        parts,
        survival(quality.answers, evidence.baseline),
        out_dir / "figures",
    )
    page = _write_page(quality, evidence, parts, {path.stem for path in figures}, out_dir / "quality.md")
    return [*write_failures(quality, evidence, out_dir), page, out_dir / "fidelity.csv", *figures]


def evidence_of(quality: Quality) -> Evidence:
    """Pairs, fidelity and the gate's verdict of all that a directory holds."""
    found = failures(quality.prompts, quality.answers, quality.baseline) if quality.prompts else []
    judged = outcomes(found, quality.samples, quality.baseline)
    measured = fidelity(_compared(quality))
    gate = str(quality.settings.get("gate") or "")
    tables: tuple[Sequence[Answer | Position | Sample], ...] = (quality.answers, quality.positions, quality.samples)
    seen = dict.fromkeys([*quality.precisions, *(row.precision for rows in tables for row in rows)])
    others = tuple(name for name in seen if name != quality.baseline)
    return Evidence(
        baseline=quality.baseline,
        precisions=others,
        outcomes=judged,
        failures=found,
        fidelity=measured,
        patterns=patterns(judged, found),
        noise=beyond_noise(judged, quality.baseline),
        gate=judge_gate(parse_gate(gate), judged, measured, others) if gate else (),
        gate_words=gate,
        right=_right(quality),
    )


def _compared(quality: Quality) -> list[Position]:
    """Positions beside the baseline's: its own are those of its second round."""
    return [row for row in quality.positions if row.precision != quality.baseline or row.round > 1]


def _right(quality: Quality) -> dict[str, dict[str, bool]]:
    """Of each precision: whether it has an item right."""
    found: dict[str, dict[str, bool]] = {}
    for answer in quality.answers:
        if answer.round == 1 and answer.ok is not None:
            found.setdefault(answer.precision, {})[answer.prompt_id] = answer.ok
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def _write_page(quality: Quality, evidence: Evidence, parts: Sequence[Fidelity], figures: set[str], path: Path) -> Path:
    names = listed([named(name) for name in evidence.precisions])
    model = line(quality.settings.get("model") or "unnamed model")
    return write_page(
        "quality.md.j2",
        path,
        title=f"{model}, {names} against {named(evidence.baseline)}",
        verdicts=verdict_words(evidence),
        gate=gate_table(evidence),
        setup=_setup(quality),
        fidelity=fidelity_table(evidence),
        floor=floor_words(evidence),
        bound=_bound(quality),
        parts=parts_table(parts, evidence),
        growth=growth_words(parts, evidence),
        tasks=tasks_table(evidence),
        figures=figures,
        alt={
            "kl_by_position": f"KL from the baseline over the position in the context: {names}, {model}",
            "first_divergence": f"share of answers without a differing token over their length: {names}, {model}",
        },
        name=line(quality.name),
    )


# --- the gate ---------------------------------------------------------------------------------------------------------


def verdict_words(evidence: Evidence) -> list[str]:
    """SHIP or DO NOT SHIP of each precision, with the limits that it breaks; a word where no gate was given."""
    if not evidence.gate_words:
        return ["No gate was given: what follows measures, and decides nothing."]
    said = []
    for precision in evidence.precisions:
        lines = evidence.limits(precision)
        if refusal := evidence.refusal(precision):
            said.append(f"**DO NOT SHIP {named(precision)}**: {line(refusal)}.")
        elif lines:
            said.append(
                f"**SHIP {named(precision)}**: it keeps {line(evidence.gate_words)}, at the worse end of each interval."
            )
        else:
            said.append(f"**{named(precision)}** was not judged by the gate.")
    return said


def gate_table(evidence: Evidence) -> str:
    """Each limit of each precision: figure, worse end of its interval, and whether that keeps it."""
    header = ("Precision", "Limit", "Figure, and the worse end of its interval", "Kept")
    kept = {True: "yes", False: "**no**", None: "**not known**"}
    rows = [
        (named(one.precision), line(f"{one.metric} {one.limit}"), line(one.why), kept[one.passes])
        for one in evidence.gate
    ]
    return table(header, rows, header) if rows else ""


# --- the same text, read by both --------------------------------------------------------------------------------------


def fidelity_table(evidence: Evidence) -> str:
    header = ("Precision", "KL, nats [95 %]", "Perplexity", "Perplexity ratio [95 %]", "Same likeliest token [95 %]",
              "Right → wrong", "Wrong → right", "p")  # fmt: skip
    rows = [
        (
            called(evidence, row.precision),
            interval(row.kl_nats, row.kl_nats_lo, row.kl_nats_hi),
            number(row.perplexity),
            _close(row.perplexity_ratio, row.perplexity_ratio_lo, row.perplexity_ratio_hi),
            _shares(row.agreement, row.agreement_lo, row.agreement_hi),
            _share(row.right_to_wrong),
            _share(row.wrong_to_right),
            p_cell(row.p_value),
        )
        for row in evidence.fidelity
    ]
    return table(header, rows, ("Precision",)) if rows else ""


def parts_table(parts: Sequence[Fidelity], evidence: Evidence) -> str:
    """KL over the context: a row for each part, a column for each precision."""
    precisions = list(dict.fromkeys(row.precision for row in parts))
    cells = {(row.first, row.precision): interval(row.kl_nats, row.kl_nats_lo, row.kl_nats_hi) for row in parts}
    spans = sorted({(row.first or 1, row.last or 1) for row in parts})
    if len(spans) < 2:
        return ""
    rows = [(f"{first}–{last}", *(cells.get((first, name), "") for name in precisions)) for first, last in spans]
    return table(("Tokens read", *(called(evidence, name) for name in precisions)), rows, ())


def growth_words(parts: Sequence[Fidelity], evidence: Evidence) -> list[str]:
    """Whether KL grows with what was read, as far as the intervals of the first and the last part say."""
    said = []
    for precision in evidence.precisions:
        own = [row for row in parts if row.precision == precision and row.kl_nats_lo is not None]
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        ends = (
            f"{number(first.kl_nats)} nats at {first.first}–{first.last} tokens, "
            f"{number(last.kl_nats)} at {last.first}–{last.last}"
        )
        if (last.kl_nats_lo or 0.0) > (first.kl_nats_hi or 0.0):
            said.append(f"{named(precision)} drifts away as the context grows: {ends}; the intervals do not meet.")
        elif (last.kl_nats_hi or 0.0) < (first.kl_nats_lo or 0.0):
            said.append(f"{named(precision)} comes closer as the context grows: {ends}; the intervals do not meet.")
        else:
            said.append(f"That {named(precision)} decays with the context is not shown: {ends}; the intervals overlap.")
    return said


def floor_words(evidence: Evidence) -> str:
    """What the engine changes by itself, on the same text."""
    base, floor = named(evidence.baseline), evidence.whole_fidelity(evidence.baseline)
    if not evidence.fidelity:
        return ""
    if floor is None or floor.kl_nats is None:
        return f"{base} read the texts once: how far it is from itself, and so what the engine adds, is not known."
    return (
        f"{base} read a second time is {floor.kl_nats:.2g} nats from itself and finds the same token likeliest at "
        f"{_share(floor.agreement)} of the positions: that is the engine's own, and what a precision shows of that "
        "size is not its doing."
    )


def _bound(quality: Quality) -> str:
    vocabulary = str(quality.settings.get("vocabulary") or "")
    if not quality.positions or vocabulary in ("", "whole"):
        return ""
    return f"KL here is over {line(vocabulary)}."


def _close(value: float | None, low: float | None, high: float | None) -> str:
    """A ratio near 1, where three digits would hide it: 1.0021 [1.0013–1.0029]."""
    if value is None:
        return ""
    words = f"{value:.4f}" if value < 10 else f"{value:.3g}"
    if low is None or high is None:
        return words
    return f"{words} [{low:.4f}–{high:.4f}]" if value < 10 else f"{words} [{low:.3g}–{high:.3g}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _shares(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return _share(value)
    return f"{100 * value:.2f} [{100 * low:.2f}–{100 * high:.2f}] %"


# --- public tasks, and with what ------------------------------------------------------------------------------------


def tasks_table(evidence: Evidence) -> str:
    header = ("Task", "Precision", "Documents", f"{named(evidence.baseline)} right", "Right", "Lost, pp [95 %]", "p")
    rows = [
        (line(row.family.removeprefix(TASK)), named(row.precision), str(row.items), share(row.base_right, row.items),
         share(row.right, row.items), drop_cell(row), p_cell(row.p_value))
        for row in evidence.outcomes if row.family.startswith(TASK)
    ]  # fmt: skip
    return table(header, rows, ("Task", "Precision")) if rows else ""


def _setup(quality: Quality) -> str:
    settings = quality.settings
    rows = [
        ("Model", settings.get("model")),
        ("Engine", _joined(settings.get("engine"), settings.get("engine_version"))),
    ]
    digests = settings.get("checkpoint_sha256") or {}
    for name, how in (settings.get("served_as") or {}).items():
        digest = f", checkpoint sha256 {str(digests[name])[:12]}…" if digests.get(name) else ""
        rows.append((label(str(name)), f"{how}{digest}"))
    rows += [
        ("Text", _joined(settings.get("text"), f"({settings['texts']} texts)" if settings.get("texts") else None)),
        ("Window", f"{settings['window']} tokens" if settings.get("window") else None),
        ("Vocabulary", settings.get("vocabulary")),
        ("Prompts", _joined(settings.get("prompts"), f"(sha256 {str(settings['prompts_sha256'])[:12]}…)"
                            if settings.get("prompts_sha256") else None)),
        ("Public tasks", _tasks(quality)),
        ("Asked at once", settings.get("concurrency")),
    ]  # fmt: skip
    return table(("", ""), [(line(what), line(told)) for what, told in rows if told not in (None, "", [])], ("",))


def _tasks(quality: Quality) -> str:
    tasks = quality.settings.get("tasks") or []
    told = ", ".join(map(str, tasks)) if isinstance(tasks, list) else str(tasks)
    if not told:
        return ""
    few, limit = quality.settings.get("fewshot"), quality.settings.get("limit")
    parts = [told, f"{few} examples each" if few is not None else "", f"the first {limit} documents" if limit else ""]
    return ", ".join(part for part in parts if part)


def _joined(*parts: object) -> str:
    return " ".join(str(part) for part in parts if part)
