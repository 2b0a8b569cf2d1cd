"""quality.md, and what the papers of a sweep say once the answers of its precisions were compared."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.assumptions import Assumptions
from harness.quality.directory import Quality
from harness.records import Fidelity, RequestRecord, SweepPoint, read_table, write_table
from harness.report.papers import write_papers
from harness.report.quality import evidence_of
from harness.report.run import load_run
from tests.report.quality_cases import answers, pages, prompt_set, quality, read, tasks
from tests.report.test_brief import ENVIRONMENT, FAILED, POINTS, REQUESTS, RUN_TOML

GATE = "kl<0.02, accuracy_drop<1pp"


def test_the_gate_s_verdict_comes_first(tmp_path: Path) -> None:
    """AWQ's KL is 0.01 and keeps 0.02; of 60 prompts it lost 4, 6.67 pp and at worst 15.9. GPTQ keeps neither."""
    _, page = pages(quality(gate=GATE), tmp_path)
    first = page.split("\n\n")[1]
    assert first == r"**DO NOT SHIP AWQ**: accuracy\_drop \< 1 pp: 6.67 pp, at worst 15.9 pp."
    assert re.search(r"\*\*DO NOT SHIP GPTQ\*\*: kl .*; accuracy\\_drop ", page)
    assert r"| AWQ | kl \< 0.02 nats | 0.0101 nats, at worst 0.0104 nats | yes |" in page
    assert r"| AWQ | accuracy\_drop \< 1 pp | 6.67 pp, at worst 15.9 pp | **no** |" in page
    _, kept = pages(quality(gate="kl<0.02"), tmp_path)
    assert r"**SHIP AWQ**: it keeps kl\<0.02" in kept and "**DO NOT SHIP GPTQ**" in kept


def test_without_a_gate_it_decides_nothing(tmp_path: Path) -> None:
    _, page = pages(quality(), tmp_path)
    assert "No gate was given" in page and "SHIP" not in page and "| Limit |" not in page


def test_a_limit_that_nobody_measured_does_not_ship(tmp_path: Path) -> None:
    _, page = pages(quality(positions=[], gate="kl<0.02"), tmp_path)
    assert r"**DO NOT SHIP AWQ**: kl \< 0.02 nats: not measured." in page and "**not known**" in page
    assert "## The same text" not in page and "## Over the context" not in page


def test_fidelity_by_hand(tmp_path: Path) -> None:
    """One text's worth repeated: ln q is ln p − 0.01 everywhere, so the ratio of perplexities is e^0.01 = 1.0101, and
    perplexities are e^1.01 = 2.75 and e^1 = 2.72."""
    _, page = pages(quality(), tmp_path)
    assert "| 1.0101 [1.0101–1.0101] |" in page and "| AWQ | 0.0101 [" in page and "| 2.75 |" in page
    assert "BF16 read a second time is 1e-07 nats from itself" in page
    assert "how far it is from itself" in pages(quality(positions=read("awq", 0.01)), tmp_path)[1]


def test_a_lower_bound_says_so(tmp_path: Path) -> None:
    words = "likeliest 20 and one bucket: KL is a lower bound"
    assert f"KL here is over {words}." in pages(quality(vocabulary=words), tmp_path)[1]
    assert "KL here is over" not in pages(quality(), tmp_path)[1]


def test_decay_with_the_context(tmp_path: Path) -> None:
    """GPTQ's KL is ten times as large from position 48 on; AWQ's is the same throughout."""
    _, page = pages(quality(), tmp_path)
    assert "GPTQ drifts away as the context grows: 0.0508 nats at 1–15 tokens, 0.494 at 64–95" in page
    assert "That AWQ decays with the context is not shown" in page
    shrinking = [replace(row, kl_nats=row.kl_nats / row.position) for row in read("awq", 0.01)]
    assert "AWQ comes closer as the context grows" in pages(quality(positions=shrinking), tmp_path)[1]
    parts = [row for row in read_table(tmp_path / "fidelity.csv", Fidelity) if row.first]
    assert [(row.first, row.last) for row in parts] == [(1, 15), (16, 31), (32, 63), (64, 95)]


def test_public_tasks_and_how_each_was_served(tmp_path: Path) -> None:
    _, page = pages(quality(samples=tasks(), tasks=["gsm8k"], fewshot=5, limit=40), tmp_path)
    assert "| gsm8k | AWQ | 40 | 40 (100 %) | 37 (92 %) | 7.5 [−1.9 to 19.9] | 0.25 |" in page
    assert "| Public tasks | gsm8k, 5 examples each, the first 40 documents |" in page
    assert "| GPTQ | bf16 weights dequantized from 3 bits |" in page
    assert "## Public tasks" not in pages(quality(), tmp_path)[1]


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    _, page = pages(quality(model="<script>x</script>", text="a | b\u202e", engine="[x](http://y)"), tmp_path)
    assert r"\<script\>" in page and r"a \| b⟨U+202E⟩" in page and r"\[x\](http://y)" in page


# --- the papers of a sweep --------------------------------------------------------------------------------------------


def papers(tmp_path: Path, found: Quality | None) -> dict[str, str]:
    directory = tmp_path / "results" / "demo"
    if not directory.exists():
        directory.mkdir(parents=True)
        write_table(directory / "points.csv", POINTS, SweepPoint)
        write_table(directory / "requests.csv", [*REQUESTS, *FAILED], RequestRecord)
        (directory / "run.toml").write_text(RUN_TOML)
        (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    written = write_papers(replace(load_run(directory), quality=found), tmp_path / "out", Assumptions(users=100))
    return {path.name: path.read_text() for path in written if path.suffix in (".md", ".html")}


def test_they_say_nothing_of_quality_where_nobody_asked(tmp_path: Path) -> None:
    said = papers(tmp_path, None)
    assert "failures.md" not in said and "## Quality" not in said["capacity.md"]
    assert "correct answers" not in said["capacity.md"] and "Quality was not measured" in said["risk_brief.md"]


def test_failed_gate_is_not_served(tmp_path: Path) -> None:
    said = papers(tmp_path, quality(gate=GATE))
    assert "Stay with BF16, up to 16 users at p95 ≤ 3 s: AWQ's answers did not pass the gate" in said["risk_brief.md"]
    assert "**AWQ did not pass the gate**" in said["risk_brief.md"]
    assert "it loses most in reasoning: 13.3 pp [0.5 to 29.7]" in said["risk_brief.md"]
    assert "- **Where its answers are worse.** AWQ did not pass the gate" in said["business_case.md"]
    assert "Answers as good: it did not pass the gate" in said["business_case.md"]
    assert "| **do not ship** |" in said["capacity.md"]
    assert "Quality was not measured" not in said["risk_brief.md"] + said["business_case.md"]


def test_passed_gate_takes_the_place_of_the_condition(tmp_path: Path) -> None:
    """GPTQ fails it, and the case is for the one that did not."""
    said = papers(tmp_path, quality(gate="kl<0.02"))
    assert r"Serve AWQ up to 32 users at p95 ≤ 3 s, as its answers passed the gate (kl\<0.02)" in said["risk_brief.md"]
    assert "**GPTQ did not pass the gate**" in said["risk_brief.md"]
    assert "among those whose answers did not fail the gate" in said["business_case.md"]


def test_the_case_is_for_the_one_that_passed(tmp_path: Path) -> None:
    """AWQ is the faster one; where it alone fails, the decision is about GPTQ."""
    swapped = {"awq": "gptq", "gptq": "awq"}
    found = quality(gate="kl<0.02")
    turned = [replace(row, precision=swapped.get(row.precision, row.precision)) for row in found.positions]
    assert "Serve GPTQ up to 32 users" in papers(tmp_path, replace(found, positions=turned))["risk_brief.md"]


def test_measured_without_a_gate_states_the_loss(tmp_path: Path) -> None:
    said = papers(tmp_path, quality())
    assert r"if it may lose 6.7 pp \[0.2 to 15.9\] of accuracy (60 prompts; no gate was given)" in said["risk_brief.md"]
    assert "**That it answers as well is not shown.** Over 60 prompts AWQ loses 6.7 pp" in said["business_case.md"]
    assert "Answers as good: 6.7 pp" in said["business_case.md"]


def test_as_good_is_claimed_only_within_a_point(tmp_path: Path) -> None:
    """400 prompts without a flip: ± 0.95 pp."""
    prompts = prompt_set(200)
    said = answers(prompts, {("bf16", 1): [], ("awq", 1): []})
    found = replace(quality(precisions=["bf16", "awq"]), prompts=prompts, answers=said)
    case = papers(tmp_path, found)["business_case.md"]
    assert "- **Answers as good.** AWQ answers as well as BF16: 0.0 pp" in case
    assert "Where its answers are worse: 0.0 pp" in case, "and that speaks against nothing"


def test_a_correct_answer_is_priced_by_hand(tmp_path: Path) -> None:
    """AWQ at 32 users completes 1,150 / 32 = 35.9375 requests a second for 0.36 USD an hour, 55 of 60 right:
    0.36 / (35.9375 × 3,600 × 0.916667) × 1,000 = 0.0030356 USD; BF16 at 16 users 12.5, 59 of 60: 0.0081356.
    An answer of AWQ costs 12.5 / 35.9375 = 34.8 % of one of BF16, and it keeps 55/59 = 93 % of its accuracy."""
    said = papers(tmp_path, quality())
    page = said["capacity.md"]
    assert "| AWQ | 55 of 60 | 91.7 [81.9–96.4] % | 6.7 [0.2 to 15.9] | 0.12 | 0.0101 [" in page
    assert re.search(r"\| AWQ \| \*\*largest tested .*\| 0.00304 \[0.00289–0.00340\] \|", page)
    assert re.search(r"\| BF16 \| \*\*largest tested .*\| 0.00814 \[", page)
    assert "An answer of AWQ, right or wrong, costs 35 % of one of BF16" in page
    assert "it keeps 93 % [86 % to 100 %], so it does" in page
    assert "1,000 correct answers cost 0.00304 USD with AWQ and 0.00814 USD with BF16" in said["business_case.md"]
    assert "Quality" in said["capacity.html"] and "0.00304" in said["capacity.html"]


def test_claims_about_quality_are_judged_by_pairs(tmp_path: Path) -> None:
    """AWQ has 5 wrong and GPTQ 24, of the same 60: 4 + 1 of AWQ's are among GPTQ's, so 19 more."""
    line = next(one for one in papers(tmp_path, quality())["risk_brief.md"].splitlines() if "AWQ loses less" in one)
    assert "**supported**" in line and "5/60 wrong against 24/60" in line and "−31.7 pp" in line
    assert "`failures.csv`: awq, `quant_ok`" in line


@pytest.mark.parametrize(
    ("lost", "said"), [(0, "**supported**"), (1, "**undecided**"), (40, "**refuted**")], ids=["none", "one", "many"]
)
def test_four_bits_against_eight(lost: int, said: str, tmp_path: Path) -> None:
    """Of 400 pairs: none lost is ± 0.95 pp, within a point; one may be 1.4; 40 are 10 pp, and at least 7."""
    prompts = prompt_set(200)
    wrong = [f"{family}-{at:02d}" for family in ("factual", "reasoning") for at in range(1, 21)][:lost]
    told = answers(prompts, {("bf16", 1): [], ("awq", 1): wrong, ("w8a8", 1): []})
    found = replace(quality(precisions=["bf16", "awq", "w8a8"]), prompts=prompts, answers=told)
    brief = papers(tmp_path, found)["risk_brief.md"]
    line = next(one for one in brief.splitlines() if "4-bit weights rival" in one and one.startswith("|"))
    assert f"AWQ {said}" in line or said in line


def test_hostile_quality_stays_text_on_the_page(tmp_path: Path) -> None:
    found = quality(gate="kl<0.02", precisions=["bf16", "awq", "<script>alert(1)</script>"])
    said = papers(tmp_path, found)
    page = said["capacity.html"].lower()  # names are written in capitals
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_a_baseline_that_is_not_the_run_s_proves_nothing(tmp_path: Path) -> None:
    found = replace(quality(baseline="awq"))
    assert evidence_of(found).baseline == "awq"
    assert "Quality was not measured" in papers(tmp_path, found)["risk_brief.md"]


def test_what_the_engine_s_logs_say(tmp_path: Path) -> None:
    papers(tmp_path, None)
    log = tmp_path / "results" / "demo" / "engine-awq-r1.log"
    log.write_text(
        "INFO 11-21 20:10:06 [x.py:1] hello\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate <b> 2 GiB\n"
    )
    said = papers(tmp_path, None)
    for page in ("capacity.md", "risk_brief.md"):
        told = said[page].partition("## What the engine's logs say")[2].partition("\n## ")[0]
        assert "engine-awq-r1.log, line 2" in told and r"\<b\>" in told and "What to do:" in told
