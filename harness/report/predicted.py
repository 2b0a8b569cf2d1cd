"""What the papers of a predicted run say more: what a prediction is, how wrong it may be, how to measure the same.

And how each block of a page comes to say that it is predicted (`marked`); the words are those of analysis/words.py.
Text for people avoids "measured" and "tested": the words of a prediction would turn them round.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from markdown_it import MarkdownIt

from harness.analysis.words import Words
from harness.report.run import Run
from harness.report.tables import escape, number
from harness.variants import precision_of

MARK = "Predicted:"

BASES = {
    "card": "on published points of this card, predicted by a fit that had not seen the card",
    "architecture": "on published points of other cards, predicted by a fit that had seen none of their architecture",
    "calibrated": "on points that were taken on this very card and left out of its fit (bench calibrate)",
}
"""What the error band stands on, by `basis` of run.toml's table [run.predicted]."""

MEDIAN_ERROR = "median_error_"
"""How keys of that table begin that hold a median error, a share, of a metric of METRICS."""
METRICS = {"tok_s": "tok/s", "p95_ms": "p95", "ttft_ms": "TTFT", "tpot_ms": "TPOT", "kv_cache_tokens": "KV tokens"}

_READER = MarkdownIt("commonmark").enable("table")
_CODE = re.compile(r"(`[^`]*`|\]\([^)]*\))")
"""What no word is changed in: code, and where links point."""


# --- the box ----------------------------------------------------------------------------------------------------------


def box(run: Run) -> str:
    """The box at the top of each page of a predicted run, as a Markdown quote; "" of a measured one."""
    if not run.predicted:
        return ""
    what, band, measure = told(run, escape)
    command = " \\\n>   ".join(_folded(_command(run)))
    return f"> **{what}**\n>\n> {band}\n>\n> {measure}\n>\n> ```\n> {command}\n> ```"


def told(run: Run, written: Callable[[object], str] = str) -> tuple[str, str, str]:
    """What a prediction is, what its band stands on, and what to do: a sentence or two each.

    `written` is how text from outside is written where this goes.
    """
    care = "Unvalidated: fewer than three points of this card are published. " if unvalidated(run) else ""
    return (
        f"Predicted for {written(run.machine)}: nothing ran. Every figure is computed, from the card's data sheet and "
        "a simulation of vLLM's scheduler (bench predict).",
        f"{care}Square brackets, bars and shaded areas are 95 % error bands, and not the noise of a run. They come "
        f"from validation: {_basis(run, written)}.",
        "A prediction is no evidence. This would measure the same:",
    )


def unvalidated(run: Run) -> bool:
    """Whether the band is not this card's own."""
    return _table(run).get("basis") == "architecture" or any("unvalidated" in row.verdict_reasons for row in run.points)


def _table(run: Run) -> Mapping[str, Any]:
    """[run.predicted] of run.toml."""
    given = run.settings.get("predicted")
    return given if isinstance(given, dict) else {}


def _basis(run: Run, written: Callable[[object], str]) -> str:
    """What the band stands on, n, and the median errors of validation, as far as run.toml tells."""
    table = _table(run)
    basis = str(table.get("basis") or ("architecture" if unvalidated(run) else ""))
    parts = [BASES.get(basis, written(basis)) if basis else "on what is not recorded"]
    if "n" in table:
        parts.append(f"n = {written(table['n'])}")
    errors = [
        f"{METRICS.get(metric := key.removeprefix(MEDIAN_ERROR), written(metric))} {100 * value:.2g} %"
        for key, value in table.items()
        if key.startswith(MEDIAN_ERROR) and isinstance(value, int | float)
    ]
    if errors:
        parts.append(f"median error {', '.join(errors)}")
    known = {"basis", "n"}
    others = {key: value for key, value in table.items() if key not in known and not key.startswith(MEDIAN_ERROR)}
    for key, value in others.items():
        shown = number(value) if isinstance(value, float) else written(value)
        parts.append(f"{written(key.replace('_', ' '))} {shown}")
    return "; ".join(parts)


def measure_command(run: Run) -> str:
    """The command that would measure what was predicted, from run.toml; on one line, quoted for a shell."""
    return " ".join(_command(run))


def _folded(words: list[str], width: int = 48) -> list[str]:
    """A command in lines, each option with its value; the next line begins where one is longer than `width`."""
    lines = [words[0]]
    for word in words[1:]:
        if word.startswith("--") and len(lines[-1]) > width:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines


def _command(run: Run) -> list[str]:
    settings, scenario = run.settings, run.scenario
    parts = ["bench", "sweep", "--model", settings.get("model") or run.model]
    names = settings.get("precisions") or [point.precision for point in run.points]
    parts += ["--precisions", _joined([precision_of(str(name)) for name in _list(names)])]
    parts += ["--scenario", run.scenario_name]
    arrivals = scenario.get("arrivals", "closed")
    if arrivals == "closed":
        loads = settings.get("concurrencies") or sorted(point.conc for point in run.points)
        parts += ["--conc", _joined(loads)]
    else:
        rates = settings.get("rates_rps") or [point.rate_rps for point in run.points if point.rate_rps]
        parts += ["--arrivals", arrivals, "--rate", _joined(rates)]
    for key in ("input_tokens", "output_tokens", "seed"):
        parts += [f"--{key.replace('_', '-')}", scenario[key]] if key in scenario else []
    parts += ["--slo", _slo(run)]
    for key in ("max_num_seqs", "gpu_memory_utilization", "kv_cache_gib"):
        parts += [f"--{key.replace('_', '-')}", settings[key]] if settings.get(key) is not None else []
    vary = settings.get("vary")
    for flag, values in vary.items() if isinstance(vary, dict) else ():
        parts += ["--vary", f"{flag}={_joined(values)}"]
    return [shlex.quote(" ".join(str(part).split())) for part in parts]


def _joined(values: object) -> str:
    """bf16,awq and 1,8,16; of rows each once."""
    return ",".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in _list(values)))


def _list(values: object) -> list[object]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _slo(run: Run) -> str:
    """The service level as --slo takes it."""
    limits = (("p95", run.slo.p95_s), ("ttft", run.slo.ttft_s), ("tpot", run.slo.tpot_s))
    parts = [f"{name}={seconds:g}s" for name, seconds in limits if seconds is not None]
    parts += [f"goodput={100 * run.slo.goodput:g}%"] if run.slo.goodput is not None else []
    return ",".join(parts)


# --- the blocks of a page ---------------------------------------------------------------------------------------------


def marked(page: str, words: Words) -> str:
    """A Markdown page in the words of its run, each block of which owns up; that of a measured run as it is.

    A heading and the first column of a table get ", predicted", a paragraph or an item of a list begins with MARK,
    where their own words do not say it. Code stays as it is.
    """
    if not words.predicted:
        return page
    words = replace(words, names=(*words.names, *map(escape, words.names)))
    lines = page.split("\n")
    code = {at for token in _READER.parse(page) if token.type == "fence" and token.map for at in range(*token.map)}
    lines = [line if at in code else _reworded(line, words) for at, line in enumerate(lines)]
    tokens = _READER.parse("\n".join(lines))
    for at, token in enumerate(tokens):
        if token.map is None:
            continue
        first = token.map[0]
        if token.type == "table_open":
            lines[first] = _with_column(lines[first], words)
        elif token.type == "heading_open" and words.lacks(_prose(tokens[at + 1].content)):
            lines[first] += words.also
        elif token.type == "paragraph_open" and words.lacks(_prose(tokens[at + 1].content)):
            lines[first] = re.sub(r"^((?:\s|>|-(?= ))*)", lambda start: f"{start[0]}{MARK} ", lines[first], count=1)
    return "\n".join(lines)


def _reworded(line: str, words: Words) -> str:
    return "".join(part if _CODE.fullmatch(part) else words.reworded(part) for part in _CODE.split(line))


def _prose(text: str) -> str:
    """A block's text without code and where its links point: a path that says it says it to nobody."""
    return _CODE.sub(" ", text)


def _with_column(header: str, words: Words) -> str:
    """The header of a table; one without any names lists what is what, and stands under a heading that says it."""
    start, first, rest = header.split("|", 2)
    if not header.replace("|", "").strip() or not words.lacks(header):
        return header
    name = f"{first.strip()}{words.also}" if first.strip() else "Predicted"
    return f"{start}| {name} |{rest}"
