"""With what a run was measured, in words: the first table of a report, and what nobody may miss before reading on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from harness.analysis.levels import precision_order
from harness.report.run import Run, common
from harness.report.tables import escape, named, number, table


def cautions(run: Run) -> list[str]:
    """What a reader must not miss before reading a number."""
    found = []
    if run.predicted and run.device == "host":
        found.append("Predicted for a CPU: the figures say nothing about a GPU.")
    elif run.device == "host":
        found.append("Measured on a CPU. The figures are that machine's own and predict nothing about a GPU.")
    if any(point.source == "dummy-weights" for point in run.points):
        found.append("Random weights: speed only, no quality claim.")
    if run.source == "endpoint":
        found.append("Measured against an endpoint: every latency holds the network; the machine behind it is unknown.")
    if any("slow_kernel" in point.verdict_reasons for point in run.points):
        found.append("A slow fallback kernel was in use: a faster one exists for this card.")
    return found


def setup_table(run: Run) -> str:
    """Model, kernel of each precision, engine, machine, scenario, price, tool: two columns of Markdown."""
    points, scenario, environment = run.points, run.scenario, run.environment
    rows: list[tuple[str, str]] = [("Model", escape(run.model))]
    for precision in precision_order(points):
        own = [point for point in points if point.precision == precision]
        sha = common(own, "checkpoint_sha256")
        parts = [f"kernel {escape(common(own, 'kernel') or 'not named by the engine')}"]
        parts += [f"checkpoint sha256 {escape(str(sha)[:12])}…"] if sha else []
        told = common(own, "engine_args")
        parts += [f"engine arguments {escape(told)}"] if told else []
        rows.append((named(precision), ", ".join(parts)))
    engine = run.common("engine") or environment.get("engine") or run.settings.get("engine")
    version = run.common("engine_version") or environment.get("engine_version")
    rows.append(("Engine", escape(" ".join(str(part) for part in (engine, version) if part) or "not recorded")))
    if run.predicted:
        rows.append(("Card", f"{escape(run.machine)}, from its data sheet"))
    rows.append(("Computed on" if run.predicted else "Machine", _machine_words(run)))
    rows.append(("Scenario", escape(f"{run.scenario_name}: {scenario.get('description', '')}".rstrip(": "))))
    rows.append(("Lengths", _lengths(scenario)))
    rows.append(("Load", _load(scenario)))
    rows.append(("Service level", run.slo.words))
    rows.append(("Price", f"{per_hour(run)}, {utilisation(run)} of the hour under this load"))
    rows.append(("Tool", _tool(environment)))
    return table(("", ""), rows)


def _machine_words(run: Run) -> str:
    environment = run.environment
    if not environment:
        return "not recorded"
    gpu = environment.get("gpu")
    parts = []
    if gpu:
        memory = environment.get("gpu_memory_gib")
        parts.append(f"{gpu}{f', {memory:.1f} GiB' if memory else ''}, driver {environment.get('driver') or 'unknown'}")
    parts.append(
        f"{environment.get('cpu', 'CPU unknown')}, {environment.get('cpu_cores', '?')} cores, "
        f"{number(environment.get('memory_gib'))} GiB{'' if gpu else ', no GPU'}"
    )
    parts.append(f"{environment.get('platform', 'platform unknown')}, Python {environment.get('python', 'unknown')}")
    words = escape("; ".join(parts))
    return f"client only: {words}" if run.source == "endpoint" else words


def _load(scenario: Mapping[str, Any]) -> str:
    """Who asks, and when."""
    arrivals = scenario.get("arrivals", "closed")
    kinds = {
        "closed": "closed loop",
        "constant": "open loop, evenly spaced arrivals",
        "poisson": "open loop, Poisson arrivals",
        "gamma": f"open loop, gamma arrivals of shape {scenario.get('burstiness', 'not recorded')}",
        "trace": f"open loop, arrivals of {_file(scenario, 'trace')}",
    }
    parts = [kinds.get(arrivals, str(arrivals))]
    if scenario.get("turns", 1) > 1:
        parts.append(f"{scenario['turns']} turns a conversation")
    if scenario.get("think_s"):
        parts.append(f"a pause of {scenario['think_s']:g} s on average before each question")
    parts.append(f"seed {scenario.get('seed', 'not recorded')}")
    return escape(", ".join(parts))


def _lengths(scenario: Mapping[str, Any]) -> str:
    prefix, kind = scenario.get("shared_prefix"), scenario.get("length_distribution", "uniform")
    shared = f"; {prefix:.0%} of each prompt is common to all" if prefix else ""
    if kind == "empirical":
        return f"those of {escape(_file(scenario, 'dataset' if scenario.get('dataset') else 'trace'))}{shared}"
    if "input_tokens" not in scenario or "output_tokens" not in scenario:
        return "not recorded"
    jitter = scenario.get("length_jitter")
    spreads = {
        "uniform": f", each drawn evenly from ±{jitter:.0%}" if jitter else "",
        "lognormal": f" on average, each drawn from a log-normal distribution of sigma {jitter:g}" if jitter else "",
    }
    return f"{scenario['input_tokens']} tokens in, {scenario['output_tokens']} out{spreads.get(kind, '')}{shared}"


def _file(scenario: Mapping[str, Any], key: str) -> str:
    """A file's name without its place, which is its machine's business."""
    return PurePath(str(scenario.get(key) or "a file that is not recorded")).name


def per_hour(run: Run) -> str:
    """The hour's price in words, as the rows were priced."""
    prices = sorted({point.usd_per_hour for point in run.points if point.usd_per_hour is not None})
    prices = prices or [price for price in (run.scenario.get("usd_per_hour"),) if price is not None]
    each = ", as many cards as each takes" if len(prices) > 1 else ""
    return f"{' or '.join(f'{price:g}' for price in prices)} USD an hour{each}" if prices else "not stated"


def utilisation(run: Run) -> str:
    """The share of the hour in words, as the rows were priced."""
    share = run.common("utilisation")
    share = run.scenario.get("utilisation") if share is None else share
    return "an unstated share" if share is None else f"{share:.0%}"


def _tool(environment: Mapping[str, Any]) -> str:
    if not environment:
        return "not recorded"
    commit = environment.get("git_commit")
    state = ", with local changes" if environment.get("git_dirty") else ""
    source = f", commit {escape(str(commit)[:12])}{state}" if commit else ""
    started = f", started {escape(environment['started_at'])}" if environment.get("started_at") else ""
    return f"kneebench {escape(environment.get('kneebench_version', 'version unknown'))}{source}{started}"
