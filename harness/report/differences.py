"""Where two runs differ: in what they asked, which makes them incomparable, and in what they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from harness.analysis.headline import label
from harness.analysis.levels import precision_order
from harness.inert import one_line
from harness.records import Scenario
from harness.report.run import Run, common

_ASKED = (
    "api", "input_tokens", "output_tokens", "length_distribution", "length_jitter", "shared_prefix", "arrivals",
    "burstiness", "turns", "think_s", "seed",
)  # fmt: skip
"""Keys of a scenario that decide which questions are asked, and when."""
_MEASURED = ("requests", "precision", "min_window_s", "max_window_s", "warmup_rounds", "warmup_s")
_SERVED = (
    "max_model_len", "max_num_seqs", "gpu_memory_utilization", "kv_cache_gib", "tensor_parallel", "pipeline_parallel",
    "kv_cache_dtype", "engine_args", "vary", "client_processes",
)  # fmt: skip
_MEANT = ("Run", "Started", "Engine")
"""Facts that two runs are meant to differ in."""
_REMARKS = {
    "Model": "another model: what changed is not the upgrade alone",
    "Machine": "another machine: what changed is not the upgrade alone",
    "Service level": "no compared figure depends on it",
    "Source": "random weights and real ones, or a server of ours and an endpoint, are not the same measurement",
}


def asked_differently(one: Run, two: Run) -> list[str]:
    """Where the questions of two runs differ: "input_tokens 128 against 512". A key not told has its default."""
    default = Scenario("")
    found = [(key, *(run.scenario.get(key, getattr(default, key)) for run in (one, two))) for key in _ASKED]
    found += [(key, _content(one, key), _content(two, key)) for key in ("dataset", "trace")]
    return [f"{key} {one_line(was)} against {one_line(now)}" for key, was, now in found if was != now]


def facts(before: Run, after: Run) -> dict[str, tuple[str, str]]:
    """With what the two runs were measured, as far as one of them says: "" for what the other does not."""
    theirs = {point.precision for point in after.points}
    precisions = [name for name in precision_order(before.points) if name in theirs]
    one, two = _facts_of(before, precisions), _facts_of(after, precisions)
    return {name: (one[name], two[name]) for name in one if one[name] or two[name]}


def differences(before: Run, after: Run) -> list[str]:
    """What differs that need not: "Machine: one → another (...)". Name, date and engine are meant to."""
    found = []
    guessed = before.predicted or after.predicted  # no upgrade is looked at
    for name, (was, now) in facts(before, after).items():
        if name not in _MEANT and was != now:
            remark = f" ({_REMARKS[name]})" if name in _REMARKS and not guessed else ""
            found.append(f"{told(name, was, now)}{remark}.")
    return found


def told(name: str, was: str, now: str) -> str:
    """A fact of both runs: "Model: demo", "Machine: one → another"."""
    return f"{name}: {was}" if was == now else f"{name}: {was or 'not recorded'} → {now or 'not recorded'}"


def _content(run: Run, key: str) -> str:
    """A file by its digest, else by its name."""
    digest = run.settings.get(f"{key}_sha256")
    return str(digest)[:12] if digest else PurePath(str(run.scenario.get(key) or "none")).name


def _facts_of(run: Run, precisions: Sequence[str]) -> dict[str, str]:
    environment, settings, scenario = run.environment, run.settings, run.scenario
    version = run.common("engine_version") or environment.get("engine_version")
    facts = {
        "Run": run.name,
        "Started": environment.get("started_at"),
        "Model": run.model,
        "Engine": _joined(run.common("engine") or environment.get("engine"), version, between=" "),
        "Machine": run.machine
        if run.predicted
        else _joined(
            environment.get("gpu"), environment.get("cpu"), f"{environment.get('cpu_cores', 'unknown')} cores"
        ),
        "Driver": environment.get("driver"),
        "Source": run.source,
        "Scenario": run.scenario_name,
        "Service level": run.slo.words,
        "kneebench": environment.get("kneebench_version"),
    }
    for precision in precisions:
        own = [point for point in run.points if point.precision == precision]
        facts[f"{one_line(label(precision))} checkpoint"] = str(common(own, "checkpoint_sha256") or "")[:12]
        facts[f"{one_line(label(precision))} kernel"] = common(own, "kernel")
    default = Scenario("")
    facts |= {key: scenario.get(key, getattr(default, key)) for key in _MEASURED}
    facts |= {key: settings.get(key) for key in _SERVED}
    return {name: "" if value in (None, []) else one_line(value) for name, value in facts.items()}


def _joined(*parts: object, between: str = ", ") -> str:
    return between.join(str(part) for part in parts if part)
