"""The results as Markdown: every run's figures, and ours beside each peer's as ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.records import Run

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"


VERSUS = (
    ("kneebench rtn", "llmcompressor rtn"),
    ("kneebench gptq", "llmcompressor gptq"),
    ("kneebench gptq", "llmcompressor gptq-mse"),
    ("kneebench gptq", "gptqmodel gptq"),
    ("kneebench gptq", "autoround autoround"),
    ("kneebench awq+gptq", "autoround autoround"),
    ("kneebench awq", "kneebench rtn"),
    ("kneebench awq", "llmcompressor awq"),
    ("kneebench awq+gptq", "llmcompressor awq+gptq"),
)
"""Which of ours stands beside which other in the table of ratios, where both are in the same scheme."""


def table(runs: Sequence[Run], conditions: Mapping[str, Any], order: Sequence[str]) -> str:
    """Markdown: the conditions, a row for each recipe and number of bits in the `order` of the plan, the ratios."""
    parts = list(conditions["judged"])
    lines = [
        f"{conditions['cpu']}, {conditions['cores']} cores, {conditions['threads']} thread(s) for each tool; model "
        f"{conditions['model']}; {conditions['samples']} x {conditions['length']} calibration tokens, groups of "
        f"{conditions['group_size']}, seed {conditions['seed']}, peers' weights loaded as {conditions['dtype']}; "
        f"judged on {', '.join(f'{n:,} tokens of {name}' for name, n in conditions['judged'].items())}. "
        f"{'; '.join(_versions(runs))}. Seconds: median (min to max) of the repeats.",
        "",
        "| bits | zero point | tool, method | seconds | peak MiB | above imports | KL, nats | "
        + " | ".join(f"KL, {part}" for part in parts)
        + " | same top-1 | perplexity |",
        "| ---: | --- | --- | ---: | ---: | ---: " + "| ---: " * (3 + len(parts)) + "|",
    ]
    cells: dict[tuple[int, bool, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((-run.bits, not run.symmetric, run.recipe), []).append(run)
    for key in sorted(cells, key=lambda k: (k[0], k[1], order.index(k[2]) if k[2] in order else len(order))):
        lines.append(_row(cells[key], parts))
    return "\n".join([*lines, *_ratios(cells)])


def _ratios(cells: Mapping[tuple[int, bool, str], Sequence[Run]]) -> list[str]:
    """Ours over the other, of the medians: below 1 is less KL, less time, less memory."""
    lines = [
        "",
        "| bits | zero point | ours | beside | KL | seconds | peak memory | above imports |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for minus_bits, asymmetric in sorted({key[:2] for key in cells}):
        for ours, other in VERSUS:
            one, two = (_medians(cells.get((minus_bits, asymmetric, name), ())) for name in (ours, other))
            if one and two:
                ratios = " | ".join(f"{a / b:.2g}" if b else "" for a, b in zip(one, two, strict=True))
                lines.append(f"| {-minus_bits} | {'yes' if asymmetric else 'no'} | {ours} | {other} | {ratios} |")
    return lines if len(lines) > 3 else []


def _medians(repeats: Sequence[Run]) -> tuple[float, ...]:
    """KL, seconds, peak memory, and what of it lies above the imports; nothing where no run succeeded."""
    rows = [
        (run.kl or 0.0, run.seconds or 0.0, run.peak_mib or 0.0, (run.peak_mib or 0.0) - (run.before_mib or 0.0))
        for run in repeats
        if not run.error
    ]
    return tuple(map(statistics.median, zip(*rows, strict=True)))


def _row(repeats: Sequence[Run], parts: Sequence[str]) -> str:
    first = repeats[0]
    head = f"| {first.bits} | {'no' if first.symmetric else 'yes'} | {first.recipe} |"
    done = [run for run in repeats if not run.error]
    if not done:
        return f"{head} {first.error} |" + " |" * (5 + len(parts))
    seconds = sorted(run.seconds for run in done if run.seconds is not None)
    took = f"{statistics.median(seconds):.1f}" + (f" ({seconds[0]:.1f} to {seconds[-1]:.1f})" if seconds[1:] else "")
    peak = statistics.median(run.peak_mib or 0 for run in done)
    above = statistics.median((run.peak_mib or 0) - (run.before_mib or 0) for run in done)
    each = [_spread([run.kl_parts[part] for run in done], ".3g") for part in parts]
    kl = _spread([run.kl for run in done if run.kl is not None], ".3g")
    top1 = _spread([100 * run.top1 for run in done if run.top1 is not None], ".2f")
    perplexity = _spread([run.perplexity for run in done if run.perplexity is not None], ".4g")
    figures = [took, f"{peak:.0f}", f"{above:.0f}", kl, *each, f"{top1} %", perplexity]
    return f"{head} " + " | ".join(figures) + " |"


def _spread(values: Sequence[float], form: str) -> str:
    """One figure where the repeats agree in the digits shown, else the median and its range."""
    texts = {format(value, form) for value in values}
    middle = format(statistics.median(values), form)
    return middle if len(texts) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _versions(runs: Sequence[Run]) -> list[str]:
    found: dict[str, str] = {}
    for run in runs:
        if run.versions:
            found[run.tool] = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return [f"{tool}: {text}" for tool, text in found.items()]


def put(text: str, out: Path, name: str = "quantizers") -> None:
    """Write the table to `out`, or between the marks of that name where it has them."""
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = out.read_text().partition(begin) if out.is_file() else ("", "", "")
    _, ended, after = rest.partition(end)
    if bool(found) != bool(ended):
        raise SystemExit(f"{out}: only one of {begin} and {end}; put in the other")
    out.write_text(f"{before}{begin}\n{text}\n{end}{after}" if found else text + "\n")
