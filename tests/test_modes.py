"""Failure modes: every excerpt is found as its own mode and as no other, and healthy logs show none.

tests/logs/<mode>[-<variant>].log are excerpts of real logs: their first line says what provoked them, or which public
thread they were taken from. healthy-*.log hold what must not be taken for a failure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis import knee, power
from harness.engines import modes
from harness.engines.catalogue import MODES, SILENT, STORM, STORM_IN_LOG
from harness.engines.modes import Met, diagnose, document, find_modes, found_in, modes_of_rows
from harness.engines.vllm_log import last_error
from harness.records import SweepPoint, Verdict

ROOT = Path(__file__).parent.parent
LOGS = sorted((ROOT / "tests" / "logs").glob("*.log"))
DEATHS = {
    "badarch": "unknown_architecture",
    "badquant": "unsupported_quantization",
    "illegal": "native_crash",
    "kvsmall": "kv_cache_too_small",
    "maxlen": "context_too_long",
    "noweights": "weights_missing",
    "port": "port_in_use",
    "util": "memory_in_use",
}
"""tests/data/vllm_dies_<name>.log, recorded whole."""
UP = "INFO:     Application startup complete.\n"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.6 GiB\n"
STATS = (
    "(APIServer pid=1) INFO 11-21 20:10:12 [loggers.py:335] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg "
    "generation throughput: 9.0 tokens/s, Running: {running} reqs, Waiting: {waiting} reqs,{more} GPU KV cache usage: "
    "{full}%, Prefix cache hit rate: 0.0%\n"
)


def ids(found: Sequence[Met]) -> list[str]:
    return [met.mode.id for met in found]


def own(path: Path) -> list[str]:
    name = path.stem.partition("-")[0]
    return [] if name == "healthy" else [name]


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_an_excerpt_shows_its_own_mode_and_no_other(path: Path) -> None:
    found = find_modes(path.read_text(encoding="utf-8"))
    assert ids(found) == own(path)
    for met in found:
        line = path.read_text(encoding="utf-8").splitlines()[(met.line_number or 0) - 1]
        assert met.line[:60] in line, "the number is that of the line"


@pytest.mark.parametrize(("name", "mode"), DEATHS.items())
def test_a_recorded_death_shows_its_own_mode_and_no_other(name: str, mode: str) -> None:
    assert ids(find_modes((ROOT / f"tests/data/vllm_dies_{name}.log").read_text(encoding="utf-8"))) == [mode]


@pytest.mark.parametrize(
    "path",
    [*sorted(ROOT.glob("results/*/engine-*.log")), *sorted(ROOT.glob("tests/data/vllm_c*.log"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_a_healthy_log_shows_none(path: Path) -> None:
    """They hold a survived traceback, warnings that quote errors, and the EngineDeadError of an orderly end."""
    text = path.read_text(encoding="utf-8")
    assert "startup complete" in text or path.name == "vllm_cuda.log"
    assert find_modes(text) == []


def test_every_mode_of_a_log_was_seen_somewhere() -> None:
    seen = {own(path)[0] for path in LOGS if own(path)} | set(DEATHS.values())
    assert {mode.id for mode in MODES if mode.seen_in} - seen == {"corrupted"}, "whose line vLLM 0.32 never writes"
    assert seen <= {mode.id for mode in MODES}


def test_sources_name_the_excerpts_and_their_threads() -> None:
    by_id = modes.BY_ID
    for path in LOGS:
        if own(path):
            first = path.read_text(encoding="utf-8").splitlines()[0]
            thread = re.search(r"https://\S+", first)
            source = thread[0] if thread else f"tests/logs/{path.name}"
            assert source in by_id[own(path)[0]].sources, path.name
    for mode in MODES:
        for source in mode.sources:
            if source.startswith("tests/"):
                assert (ROOT / source).is_file(), source


def test_the_catalogue_is_sound() -> None:
    assert len({mode.id for mode in MODES}) == len(MODES)
    for mode in MODES:
        assert mode.seen_in or mode.rows, "it shows somewhere"
        assert mode.sources and mode.means and mode.remedy
        assert not mode.means.endswith(".") and not mode.remedy.endswith("."), "clauses"
        assert set(mode.unless) <= {other.id for other in MODES} - {mode.id}


# --- what does not count ----------------------------------------------------------------------------------------------


def test_what_a_start_survived_is_no_failure() -> None:
    assert ids(find_modes(OOM)) == ["out_of_memory_at_load"]
    assert find_modes(OOM + UP) == []
    assert ids(find_modes(UP + OOM)) == ["out_of_memory_in_service"]


def test_what_shows_at_load_and_lasts_is_told_of_a_start_that_came_up() -> None:
    slow = "WARNING 11-21 20:10:06 [x.py:1] awq quantization is not fully optimized yet. The speed can be slower.\n"
    assert ids(find_modes(slow + UP)) == ids(find_modes(slow)) == ["slow_kernel"]


def test_a_second_start_in_one_log_is_a_start_again() -> None:
    again = "(APIServer pid=2) INFO 11-21 20:10:06 [api_utils.py:286] non-default args: {'port': 8000}\n"
    assert ids(find_modes(UP + again + OOM)) == ["out_of_memory_at_load"]
    assert find_modes(UP + again + OOM + UP) == []
    assert ids(find_modes(OOM + again + OOM + OOM)) == ["out_of_memory_at_load"]
    assert find_modes(OOM + again + OOM + OOM)[0].count == 3


def test_a_tail_without_a_start_is_told_apart_by_who_failed() -> None:
    head = "(EngineCore pid=1) ERROR 11-21 20:10:06 [core.py:1512] EngineCore {}.\n"
    assert ids(find_modes(head.format("encountered a fatal error") + OOM)) == ["out_of_memory_in_service"]
    assert ids(find_modes(head.format("failed to start") + OOM)) == ["out_of_memory_at_load"]


def test_an_orderly_end_is_no_death() -> None:
    died = "WARNING 11-21 20:11:47 [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly\n"
    asked = "(APIServer pid=1) INFO 11-21 20:11:47 [launcher.py:254] [shutdown] API server: shutdown triggered\n"
    ended = "(EngineCore pid=1) INFO 11-21 20:11:47 [core.py:1499] [shutdown] EngineCore: exiting busy loop\n"
    assert ids(find_modes(UP + died)) == ["engine_died"]
    assert find_modes(UP + asked + died) == find_modes(UP + ended + died) == []
    killed = "ERROR 11-21 20:11:47 [x.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: -9)\n"
    assert ids(find_modes(UP + killed)) == ["killed_by_kernel"]
    assert find_modes(UP + asked + killed) == []


@pytest.mark.parametrize(
    "line",
    [
        "WARNING 11-21 20:10:06 [x.py:1] This can cause errors like `OSError: [Errno 24] Too many open files`.\n",
        '    raise ValueError("No available memory for the cache blocks. "\n',
        "INFO 11-21 20:10:06 [x.py:1] To avoid CUDA out of memory. Tried to allocate less.\n",
        "INFO 11-21 20:10:06 [api.py:1] Received request: prompt: 'MemoryError: what is it?'\n",
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above).\n",
    ],
)
def test_a_line_that_only_mentions_an_error_is_no_sign(line: str) -> None:
    assert find_modes(line) == find_modes(UP + line) == []


@pytest.mark.parametrize(
    "who", ["", "(EngineCore_DP0 pid=12) ", "(VllmWorker rank=1 pid=2) ", "[rank0]: ", "vllm-1  | "]
)
@pytest.mark.parametrize("level", ["", "ERROR 11-21 20:10:06 [core.py:1] ", "ERROR 11-04 10:12:51 engine.py:135] "])
def test_whoever_says_it_and_however_loud(who: str, level: str) -> None:
    assert ids(find_modes(who + level + OOM)) == ["out_of_memory_at_load"]
    assert find_modes(who + level + OOM)[0].line == OOM.strip()


def test_a_function_on_the_traceback_says_more_than_the_exception() -> None:
    frames = 'Traceback (most recent call last):\n  File "utils.py", line 113, in {}\n    json.loads(x)\nMemoryError\n'
    assert ids(find_modes(frames.format("parse_safetensors_file_metadata"))) == ["weights_torn"]
    assert ids(find_modes(frames.format("allocate"))) == ["out_of_host_memory"]
    earlier = frames.format("parse_safetensors_file_metadata").replace("MemoryError", "KeyError: 1")
    assert ids(find_modes(earlier + frames.format("allocate"))) == ["out_of_host_memory"], "each traceback for itself"


def test_figures_of_the_statistics_have_thresholds() -> None:
    """Ten preemptions in a line are a storm, 95 % with somebody waiting is full, as many waiting as running a queue."""

    def said(running: int, waiting: int, full: float, preemptions: int = 0) -> list[str]:
        more = f" Preemptions: {preemptions}," if preemptions else ""
        return ids(find_modes(UP + STATS.format(running=running, waiting=waiting, full=full, more=more)))

    assert said(8, 0, 99.9) == [], "full use is what it is for"
    assert said(8, 1, 95.0) == said(8, 1, 100.0) == ["kv_cache_full"]
    assert said(8, 1, 94.9) == []
    assert said(8, 8, 50.0) == ["queueing"]
    assert said(8, 7, 50.0) == said(0, 0, 0.0) == []
    assert said(0, 1, 0.0) == ["queueing"]
    assert said(8, 0, 99.0, STORM_IN_LOG) == ["preemption_storm"]
    assert said(8, 0, 99.0, STORM_IN_LOG - 1) == []


def test_what_explains_it_is_told_instead() -> None:
    died = "ERROR 11-21 20:10:06 [core.py:1512] EngineCore encountered a fatal error.\n"
    assert ids(find_modes(UP + died + OOM)) == ["out_of_memory_in_service"]
    assert ids(find_modes(UP + died)) == ["engine_died"]
    full = STATS.format(running=8, waiting=1, full=99.0, more="")
    queue = STATS.format(running=8, waiting=9, full=50.0, more="")
    assert ids(find_modes(UP + queue + full)) == ["kv_cache_full"]


def test_lines_are_redacted_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    key = "hf_" + "a1" * 10
    (met,) = find_modes(f"OSError: You are trying to access a gated repo with {key} or hunter2hunter2 {'x' * 999}\n")
    assert met.mode.id == "gated"
    assert key not in met.line and "hunter2" not in met.line and "<key>" in met.line
    assert len(met.line) == modes.LONGEST


# --- rows -------------------------------------------------------------------------------------------------------------

POINT = SweepPoint("run", "awq", 16, requests=100, running_peak=16, waiting_peak=0, preemptions=0, kv_usage_peak=0.5)


def row(verdict: Verdict = "suspect", **changes: object) -> SweepPoint:
    return replace(POINT, verdict=verdict, **changes)  # type: ignore[arg-type]


def test_thresholds_are_those_of_the_analysis() -> None:
    assert modes.KV_FULL == knee.KV_FULL
    assert f"{100 * power.THROTTLED_SHARE:.0f} %" in modes.BY_ID["throttled"].rows
    assert f"{100 * STORM:.0f} %" in modes.BY_ID["preemption_storm"].rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"preemptions": 5}, ["preemption_storm"]),  # 5 / 100 = 5 %: the p95 is one of them
        ({"preemptions": 4}, ["kv_cache_full"]),  # 4 %
        ({"preemptions": 1, "requests": 0}, ["preemption_storm"]),
        ({"kv_usage_peak": 0.95}, ["kv_cache_full"]),
        ({"kv_usage_peak": 0.949}, []),
        ({"waiting_peak": 16}, ["queueing"]),
        ({"waiting_peak": 15}, []),
        ({"waiting_peak": 16, "kv_usage_peak": 0.97}, ["kv_cache_full"]),
        ({"waiting_peak": None, "running_peak": None, "preemptions": None, "kv_usage_peak": None}, []),
        ({"verdict_reasons": ("throttled",), "throttled_share": 0.4, "temperature_c_max": 91.0}, ["throttled"]),
        ({"throttled_share": 0.4}, []),  # the verdict decides, once
        ({"verdict_reasons": ("slow_kernel",), "kernel": "unoptimized AWQ"}, ["slow_kernel"]),
        ({"verdict_reasons": ("engine_restarted",)}, ["engine_died"]),
        ({"verdict_reasons": ("errors",), "errors": 7}, ["requests_failed"]),
        ({"verdict_reasons": ("client_bound", "drifting", "preempting")}, []),
    ],
)
def test_what_a_row_shows(changes: dict[str, object], expected: list[str]) -> None:
    assert ids(modes_of_rows([row(**changes)])) == expected


def test_rows_say_where_and_by_what() -> None:
    hot = row(verdict_reasons=("throttled",), throttled_share=0.4, temperature_c_max=91.0)
    (met,) = modes_of_rows([hot])
    assert (met.line, met.where, met.line_number) == (
        "awq, 16 users: slowed down in 40 % of the samples, up to 91 °C",
        "points.csv",
        None,
    )
    open_loop = row(conc=0, rate_rps=2.5, preemptions=30)
    (met,) = modes_of_rows([open_loop, row(preemptions=50)])
    assert met.line == "awq, 2.5 requests a second: 30 preemptions in 100 requests"
    assert met.count == 2


def test_rows_explain_nothing_of_each_other() -> None:
    """A storm of one precision does not hide that the other one queues."""
    assert ids(modes_of_rows([row(preemptions=50), row(precision="bf16", waiting_peak=99)])) == [
        "preemption_storm",
        "queueing",
    ]


def test_a_run_tells_its_logs_and_its_rows() -> None:
    logs = {"results/x/engine-awq-r1.log": OOM, "engine-bf16-r1.log": UP}
    found = found_in(logs, [row(preemptions=50)])
    assert [(met.where, met.mode.id) for met in found] == [
        ("engine-awq-r1.log", "out_of_memory_at_load"),
        ("points.csv", "preemption_storm"),
    ]
    assert found_in({}, []) == [] == diagnose("")


# --- the error of an engine, and the page -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in LOGS if own(path)], ids=lambda path: path.stem)
def test_the_error_of_an_engine_says_the_same(path: Path) -> None:
    lines, advice = last_error(path.read_text(encoding="utf-8").partition("\n")[2])
    mode = modes.BY_ID[own(path)[0]]
    assert lines and mode.remedy in advice


def test_an_unknown_exception_is_shown_without_advice() -> None:
    assert last_error("KeyError: 'rope'\nRuntimeError: Engine core initialization failed.\n") == (
        ["KeyError: 'rope'"],
        "",
    )


def test_words_of_a_validation_error_are_its_second_line() -> None:
    two = (
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, {} [type=value_error, x=1]\n"
    )
    assert last_error(two.format("odd words")) == (["odd words"], "")
    lines, advice = last_error(two.format("Unknown quantization method: nosuch."))
    assert lines == ["Unknown quantization method: nosuch."] and "awq or gptq" in advice


def test_the_first_known_exception_is_the_cause_by_when_it_came() -> None:
    full = "OSError: [Errno 28] No space left on device\n"
    assert last_error("KeyError: 1\n" + full + OOM) == ([full.strip()], modes.advice(modes.BY_ID["disk_full"]))
    assert last_error(UP + OOM)[1] == modes.advice(modes.BY_ID["out_of_memory_in_service"])
    assert last_error(OOM)[1] == modes.advice(modes.BY_ID["out_of_memory_at_load"])
    hung = "TimeoutError\nTimeoutError: RPC call to sample_tokens timed out.\n"
    assert last_error(hung)[1] == modes.advice(modes.BY_ID["engine_hung"]), "a tail does not show the start"


def test_the_page_is_that_of_the_catalogue() -> None:
    page = (ROOT / "docs" / "failure-modes.md").read_text(encoding="utf-8")
    assert page == document(), "write it anew: python -m harness.engines.modes > docs/failure-modes.md"
    for mode in MODES:
        assert page.count(f"](#{mode.id})") == page.count(f'<a id="{mode.id}"></a>') == 1
        assert all(f"`{signature}`" in page for signature in mode.seen_in)
    assert all(what in page for what, _, _ in SILENT)
