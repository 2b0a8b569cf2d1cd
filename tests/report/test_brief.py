"""The two papers of a small fixed run, their golden pages, and what they say where figures are missing or hostile.

After a wanted change of a page: KNEEBENCH_UPDATE_GOLDEN=1 pytest tests/report/test_brief.py, then read the diff.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.analysis import validity
from harness.analysis.bullets import AGAINST, FOR
from harness.analysis.claims import AWQ_AGAINST_GPTQ, INT4_AGAINST_BF16
from harness.analysis.compare import compare
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions
from harness.records import Cell, RequestRecord, SweepPoint, write_table
from harness.report.brief import write_brief, write_case
from harness.report.guidance import MEANINGS
from harness.report.run import load_run

GOLDEN = Path(__file__).parents[1] / "golden"

RUN_TOML = """
[scenario]
name = "chat"
input_tokens = 128
output_tokens = 32
slo_p95_s = 3.0
usd_per_hour = 0.36

[run]
model = "demo_model"
precisions = ["bf16", "awq", "gptq", "smoothquant"]
concurrencies = [1, 8, 16, 32, 64]
max_model_len = 2048
max_num_seqs = 256

[run.checkpoint_bytes]
bf16 = 16_060_000_000
awq = 5_730_000_000
gptq = 5_700_000_000
"""
ENVIRONMENT = {
    "kneebench_version": "0.1.0",
    "gpu": "Some RTX 16 GB",
    "gpu_memory_gib": 16.0,
    "cpu": "Some CPU",
    "cpu_cores": 8,
}


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    weights, kv, tokens = {"bf16": (9.0, 4.4, 36_000), "awq": (2.5, 10.9, 89_000), "gptq": (2.4, 11.0, 90_000)}[
        precision
    ]
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.96, "tok_s_hi": tok_s * 1.04, "p95_ms_lo": p95_ms * 0.93, "p95_ms_hi": p95_ms * 1.07,
        "p99_ms": p95_ms * 1.2, "p99_ms_lo": p95_ms * 1.1, "p99_ms_hi": p95_ms * 1.4, "ttft_p50_ms": 50.0,
        "tpot_p50_ms": 20.0, "req_s": tok_s / 32, "weights_gib": weights, "kv_cache_gib": kv, "other_gib": 1.2,
        "kv_cache_tokens": tokens, "memory_kind": "gpu", "kv_usage_peak": 0.3, "preemptions": 0, "waiting_peak": 0,
        "running_peak": conc, "kernel": "Marlin", "engine": "vLLM", "engine_version": "0.11.0", "gpu": "Some RTX 16 GB",
        "model": "demo_model", "requests": 120, "input_tokens_mean": 128.0, "output_tokens_mean": 32.0,
        "power_w": 140.0, "energy_j_per_token": 140 / tok_s, "usd_per_hour": 0.36, "utilisation": 1.0,
        "verdict": "valid",
    }  # fmt: skip
    return SweepPoint("demo", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **(values | more))  # type: ignore[arg-type]


POINTS = [
    row("bf16", 1, 35, 900),
    row("bf16", 8, 240, 1300),
    row("bf16", 16, 400, 2200),
    row("bf16", 32, 520, 5200, preemptions=3, kv_usage_peak=1.0, verdict="suspect", verdict_reasons=("preempting",)),
    row("awq", 1, 70, 480),
    row("awq", 8, 420, 760),
    row("awq", 16, 760, 1150),
    row("awq", 32, 1150, 2500, running_peak=31),
    row("awq", 64, 1200, 5100, waiting_peak=2),
    row("gptq", 1, 71, 470),
    row("gptq", 8, 400, 800),
    row("gptq", 16, 720, 1210),
    row("gptq", 32, 1080, 2690),
    SweepPoint("demo", "gptq", 64, model="demo_model", errors=64, verdict="invalid", verdict_reasons=("engine_died",)),
]


def answers(cell: Cell, count: int, factor: float) -> list[RequestRecord]:
    """Requests of a cell, one begun every 50 ms: TTFT 50 ms and TPOT 20 ms, times `factor` and its prompt's own."""
    prompts, own = random.Random(f"{cell.conc}/{cell.rate_rps}"), random.Random(cell.key)
    made = []
    for index in range(count):
        start = index * 50_000_000
        scale = factor * prompts.uniform(0.7, 1.3) * own.uniform(0.97, 1.03) * 1e6
        made.append(
            RequestRecord(
                cell.key, index // 10, index % 10, "measured", start,
                first_token_ns=start + int(50 * scale), last_token_ns=start + int(830 * scale), completion_tokens=40,
            )
        )  # fmt: skip
    return made


def paired(points: Sequence[SweepPoint] = POINTS) -> list[RequestRecord]:
    """Answers as slow as the rows' p95 say, for the cells that have one."""
    return [
        record
        for point in points
        if point.p95_ms
        for record in answers(Cell(point.precision, point.conc, 1, point.rate_rps), 40, point.p95_ms / 1000)
    ]


REQUESTS = paired()
FAILED = [RequestRecord("gptq-c64-r1", user, 0, "measured", 0, error="early_close") for user in range(64)]


def papers(
    tmp_path: Path,
    points: Sequence[SweepPoint] = POINTS,
    toml: str = RUN_TOML,
    requests: Sequence[RequestRecord] = (),
    assumptions: Assumptions | None = None,
    environment: dict[str, object] | None = None,
) -> tuple[str, str]:
    """(risk_brief.md, business_case.md) of a run directory with these files."""
    directory = tmp_path / "results" / "demo"
    directory.mkdir(parents=True, exist_ok=True)
    write_table(directory / "points.csv", points, SweepPoint)
    if requests:
        write_table(directory / "requests.csv", requests, RequestRecord)
    (directory / "run.toml").write_text(toml)
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT if environment is None else environment))
    run = load_run(directory)
    knees, ratios = find_knees(run.points, run.slo), compare(run.points, run.requests)
    assumed = assumptions or Assumptions()
    return (
        write_brief(run, knees, ratios, assumed, tmp_path / "out" / "risk_brief.md").read_text(),
        write_case(run, knees, ratios, assumed, tmp_path / "out" / "business_case.md").read_text(),
    )


def test_golden_pages(tmp_path: Path) -> None:
    texts = papers(tmp_path, requests=[*REQUESTS, *FAILED], assumptions=Assumptions(users=100))
    for name, text in zip(("risk_brief.md", "business_case.md"), texts, strict=True):
        if os.environ.get("KNEEBENCH_UPDATE_GOLDEN"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text()


def test_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert papers(tmp_path, requests=REQUESTS) == papers(tmp_path, requests=REQUESTS)


def test_every_claim_and_every_bullet_is_somewhere(tmp_path: Path) -> None:
    """Spoken of or not measured, written or not: none goes missing without a word."""
    for points in (POINTS, POINTS[:4], POINTS[4:9], POINTS[:9]):
        brief, case = papers(tmp_path, points)
        for claim in (*INT4_AGAINST_BF16, *AWQ_AGAINST_GPTQ):
            assert f"[{claim.says}]({claim.source})" in brief
        if "Business case" in case and "with nothing to compare" not in case:
            told = case.partition("## What was assumed")[0]
            assert told.count("\n- ") == len(FOR) + len(AGAINST)


def test_every_bullet_and_every_judged_claim_cites_its_row(tmp_path: Path) -> None:
    brief, case = papers(tmp_path, requests=REQUESTS)
    written = [line for line in case.splitlines() if line.startswith("- **")]
    assert len(written) >= 8 and all(
        re.search(r"\(`(points|comparison|knees)\.csv`: .*`\w+`\)$", line) for line in written
    )
    judged = [
        line
        for line in brief.splitlines()
        if re.search(r"\*\*(supported|refuted|undecided)\*\*", line) and line[0] == "|"
    ]
    assert len(judged) == 27 and all(re.search(r"\.(csv|toml)`: .*`\w+` \|$", line) for line in judged)


def test_a_figure_of_the_case_is_the_one_in_its_row(tmp_path: Path) -> None:
    """0.36 / (1150 × 3600) × 1e6 = 0.087 USD; 1 − 400/1150 = 65 %; ⌈100 / 25.6⌉ + 1 = 5, ⌈100 / 12.8⌉ + 1 = 9 cards."""
    _, case = papers(tmp_path, requests=REQUESTS, assumptions=Assumptions(users=100))
    for part in (
        "8 of the 9 bullets that were tested are supported.",
        "AWQ against BF16 (of it and GPTQ it delivers most inside the service level)",
        "0.087 USD at 32 users against 0.25 USD at 16 users. (`points.csv`: awq, 32 users, `tok_s`;",
        "100 users at the peak take 5 cards with AWQ and 9 with BF16, 1 of them in reserve and 20 % of each kept free.",
        "Whether AWQ answers as well as BF16 was not measured in this run",
    ):
        assert part in case
    assert re.search(r"AWQ cuts serving cost per 1M output tokens by 65 %", case)


def test_guidance_is_made_of_the_rows_at_the_safe_load(tmp_path: Path) -> None:
    brief, _ = papers(tmp_path)
    for part in (
        "**On Some RTX 16 GB: Serve AWQ up to 32 users at p95 ≤ 3 s, once its answers have passed a test of quality:",
        "BF16 at 16 users is valid; AWQ at 32 users is valid;",
        "| BF16 | 16 users | 12 users, 20 % kept free | 16 (measured with 256) | p95 > 2.35 s (limit 3.00); "
        "more than 16 running; any waiting; any preemption; KV cache > 30 % |",
        "| AWQ | 32 users | 25 users, 20 % kept free | 32 (measured with 256) |",
        "- **BF16** at 32 users: p95 5.20 [4.84–5.56] s (2.36× that of 16 users), 520 [499–541] tok/s (1.30× that of "
        "16 users), KV cache 100 % full, 0 waiting, 3 preemptions; suspect: preempting.",
        "- **AWQ** at 64 users: p95 5.10 [4.74–5.46] s (2.04× that of 32 users)",
        "- **GPTQ**: nothing beyond 32 users was tested.",
    ):
        assert part in brief


def test_risks_name_what_was_not_looked_at(tmp_path: Path) -> None:
    brief, _ = papers(tmp_path)
    for part in (
        "| **Quality was not measured in this run.** The answers may be worse |",
        "| SMOOTHQUANT may not run at all | `points.csv`: no row of it |",
        "| Suspect rows, used with care: the KV cache was full, requests were thrown out",
        "| `points.csv`: bf16 at 32 users, `preempting` |",
        "| Invalid rows, used for nothing: the engine died | `points.csv`: gptq at 64 users, `engine_died` |",
        "| The limit of GPTQ is not known: it was not reached | `points.csv`: gptq at 32 users, `p95_ms` |",
        "| Another start of the server may give other figures",
    ):
        assert part in brief
    repeated, _ = papers(tmp_path, [replace(point, repeat=n) for point in POINTS for n in (1, 2)])
    assert "Another start" not in repeated


def test_every_reason_of_a_verdict_has_a_meaning() -> None:
    told = set(
        re.findall(
            r"[a-z]+_[a-z_]+|drifting|errors|imprecise|preempting|throttled|unvalidated",
            (validity.__doc__ or "").split("Host CPU")[0],
        )
    )
    assert {"client_bound", "engine_died", "gave_up", "slow_kernel"} <= told
    assert told - {"counters_py"} == set(MEANINGS)


def test_one_precision_has_guidance_and_no_case(tmp_path: Path) -> None:
    brief, case = papers(tmp_path, POINTS[:4])
    assert "BF16 may be served up to 16 users at p95 ≤ 3 s. Nothing was compared with it." in brief
    assert "18 claims: 0 supported, 0 refuted, 0 undecided, 18 not measured." in brief
    assert "*no 4-bit precision in this run*: throughput, 1 user:" in brief
    assert "BF16 alone was measured: with nothing to compare there is no case to make." in case
    assert "## " in case and "What speaks for" not in case


def test_every_cell_failed(tmp_path: Path) -> None:
    failed = [
        SweepPoint("demo", name, conc, verdict_reasons=("errors",)) for name in ("bf16", "awq") for conc in (1, 8)
    ]
    brief, case = papers(tmp_path, failed)
    assert "Sign off neither: AWQ and BF16 keep p95 ≤ 3 s for sure at no tested load." in brief
    assert "| BF16 | none | nothing |  |  |" in brief and "0 supported, 0 refuted" in brief
    assert "0 of the 9 bullets that were tested are supported. Fewer than five are no case" in case


def test_an_open_loop_speaks_of_rates(tmp_path: Path) -> None:
    rated = [replace(point, conc=0, rate_rps=point.conc / 8, arrivals="poisson") for point in POINTS]
    brief, case = papers(tmp_path, rated, RUN_TOML.replace("concurrencies = [1, 8, 16, 32, 64]", "rates_rps = [0.125]"))
    assert "Serve AWQ up to 4 req/s at p95 ≤ 3 s" in brief and "| BF16 | 2 req/s | 1.6 req/s, 20 % kept free |" in brief
    assert "*no row of both at 1 user*" in brief
    assert (
        "4 req/s against 0.25 USD at 2 req/s" in case and "Tenants a card: an open loop says nothing of users." in case
    )


def test_one_trace_has_no_knee_and_nothing_to_set(tmp_path: Path) -> None:
    points = [replace(point, conc=0, rate_rps=2.5, arrivals="trace") for point in (POINTS[2], POINTS[6])]
    brief, case = papers(tmp_path, points, requests=paired(points))
    assert "**On Some RTX 16 GB: Stay with BF16. BF16 keeps p95 ≤ 3 s on this trace. AWQ keeps p95 ≤ 3 s" in brief
    assert "`comparison.csv`: awq, 2.5 req/s, `p95_ms`" in brief and "no knee of both" in brief
    assert "One load alone was measured: there is no knee, and nothing to set by it." in brief
    assert "max_num_seqs" not in brief and "4 of the 9 bullets that were tested are supported. Fewer" in case


def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    _, case = papers(tmp_path, [replace(point, usd_per_hour=None) for point in POINTS], "")
    assert "Lower cost a token: the hour has no price." in case and "An hour of a card has no price." in case


def test_cpu_random_weights_and_endpoint_are_said(tmp_path: Path) -> None:
    bare: dict[str, object] = {"cpu": "Some CPU", "cpu_cores": 8, "gpu": None}
    host = [replace(p, memory_kind="host" if p.memory_kind else None, gpu=None, source="dummy-weights") for p in POINTS]
    brief, case = papers(tmp_path, host, environment=bare)
    for text in (brief, case):
        assert "> Measured on a CPU." in text and "> Random weights: speed only" in text
    assert (
        "**On Some CPU (8 cores, CPU only): Serve AWQ" in brief
        and "**A CPU run predicts nothing about a GPU**" in brief
    )
    assert "The weights were random: there was nothing to judge" in brief
    assert "25 tenants a machine" in case and "Two variants on one card: it was not measured on a card." in case
    url, _ = papers(
        tmp_path, [replace(p, source="endpoint", memory_kind=None, gpu=None) for p in POINTS], environment=bare
    )
    assert "The machine behind the endpoint is unknown, and the network is in every latency" in url


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "awq|<script>`$x$\n# [a](http://b)_"
    points = [
        replace(p, precision=evil if p.precision == "awq" else p.precision, model="/home/me/e_*<b>|x", kernel="k|<i>\n")
        for p in POINTS[:9]
    ]
    points = [replace(p, verdict="suspect", verdict_reasons=("x|<u>",)) if p.conc == 1 else p for p in points]
    brief, case = papers(tmp_path, points, "", paired(points))
    for text in (brief, case):
        bare = re.sub(r"\\.", "", text)
        assert (
            "<script>" not in bare.lower()
            and "<b>" not in bare
            and "<i>" not in bare
            and "<u>" not in bare
            and "$" not in bare
        )
        assert "\n# [" not in text.lower() and "/home/me" not in text and "AWQ\\|\\<SCRIPT\\>" in text
        # Escaped pipes apart, all rows of a table have as many cells as its header.
        for block in re.findall(r"(?:^\|.*\n)+", bare, re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_requests_that_cannot_be_read_cost_the_pairs_and_not_the_papers(tmp_path: Path) -> None:
    directory = tmp_path / "results" / "demo"
    directory.mkdir(parents=True)
    (directory / "requests.csv").write_text("cell,user\nbf16-c8-r1,0\n")
    brief, case = papers(tmp_path)
    assert "| Nothing is paired by request | requests.csv: the columns are not those" in brief
    assert "tok\\_s is missing at 1" in brief or "no pair" in case


def test_the_pages_end_with_one_line_break(tmp_path: Path) -> None:
    for text in papers(tmp_path):
        assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n\n" not in text
