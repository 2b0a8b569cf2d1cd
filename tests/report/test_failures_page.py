"""failures.md: what it finds, and that nothing a model said can break out of it."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from harness.records import Answer, Failure, Outcomes, read_table
from harness.report.failures import SHOWN_HEAD, SHOWN_TAIL, line, quoted, visible
from harness.report.html import dress
from tests.report.quality_cases import HOSTILE, answers, pages, prompt_set, quality, tasks


def test_what_fails_more_and_where_by_hand(tmp_path: Path) -> None:
    """GPTQ has 24 of 60 wrong and BF16 one of the same: 23 lost, none won, 23/60 = 38.3 pp, p = 2 × 0.5²³. AWQ loses 4,
    p = 2 × 0.5⁴ = 0.125, and (1.96 √(4/60) + 0.8416 √(4/60 − (4/60)²))² / (4/60)² = 115.2 prompts would be needed."""
    page, _ = pages(quality(), tmp_path)
    assert page.index("GPTQ fails more") < page.index("Whether AWQ"), "the gravest first"
    assert "**GPTQ fails more than BF16: 24/60 wrong against 1/60, McNemar p < 0.001, 38.3 pp [27.1 to 51.0]" in page
    assert "Whether AWQ fails more than BF16 is not decided: 5/60 wrong against 1/60, McNemar p = 0.12, 6.7 pp" in page
    assert "about 116 prompts would show it" in page
    assert "Most is lost in reasoning (4/30 wrong against 0/30, p = 0.12" in page
    assert "| AWQ | reasoning | 30 | 30 (100 %) | 26 (87 %) | 4 | 0 | 13.3 [0.5 to 29.7] | 0.12 | 4 of 30 |" in page


def test_the_engine_s_own_noise_stands_beside(tmp_path: Path) -> None:
    """BF16 asked twice has one other number among 61 answers; AWQ has four, and another explanation."""
    page, _ = pages(quality(), tmp_path)
    assert (
        "BF16 asked twice, in another order: 1 of 61 answers differ, 1 changes between right and wrong, 1 has" in page
    )
    assert "AWQ 5 of 61, 4 and 4; GPTQ 24 of 61, 23 and 23." in page
    assert "That AWQ has more flips or issues than that is not shown." in page
    assert "GPTQ has more than that: flips (23/60 against 1/60" in page
    once = quality({("bf16", 1): ["factual-01"], ("awq", 1): ["factual-02"]})
    assert "BF16 was asked once, so what the engine changes by itself is not known." in pages(once, tmp_path)[0]


def test_answers_as_good_are_called_so_only_within_a_point(tmp_path: Path) -> None:
    """400 prompts without a single flip: Tango's interval is ± 3.84 / 403.84 = 0.95 pp. Of 60 it is ± 6.0 pp."""
    prompts = prompt_set(200)
    same = {("bf16", 1): ["factual-01"], ("awq", 1): ["factual-01"]}
    settings = {"precisions": ["bf16", "awq"]}
    page, _ = pages(quality(same, prompts=prompts, **settings), tmp_path)
    assert "**AWQ answers as well as BF16: 1/400 wrong against 1/400" in page and "[−1.0 to 1.0]" in page
    few, _ = pages(quality(same, **settings), tmp_path)
    assert "Whether AWQ fails more than BF16 is not decided" in few and "As many are lost as won." in few


def test_three_examples_with_both_answers(tmp_path: Path) -> None:
    page, _ = pages(quality(), tmp_path)
    shown = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(shown) == 3 and shown[0] == "1. GPTQ, reasoning (reasoning-12): repetition loop"
    first = page.partition("### 1.")[2].partition("### 2.")[0]
    assert "What is 12 + 12? (reasoning)" in first and "It is 24." in first and "and so on and so on" in first
    assert "Right is (numeric): 24\n" in first and "BF16 answered (right):" in first
    assert (
        "The first token that differs is number 1; there the two distributions are" in first and "nats apart" in first
    )


def test_symptoms_are_counted_and_explained(tmp_path: Path) -> None:
    page, _ = pages(quality(), tmp_path)
    assert "| repetition loop | 0 | 1 | 0 |" in page and "| wrong number | 4 | 22 | 1 |" in page
    assert "| rephrasing | 0 + 1 | 0 + 1 | 0 |" in page, "another explanation is no issue"
    told = page.partition("## How to read")[2]
    assert "**repetition loop**:" in told and "**refusal**:" not in told, "those that were seen"


def test_what_was_not_judged_and_why(tmp_path: Path) -> None:
    found = quality()
    cut = [
        replace(answer, ok=None, note="not executed: no sandbox on this machine") if answer.prompt_id == "factual-03"
        else replace(answer, text="", ok=None, error="timeout <x>") if answer.prompt_id == "factual-04" else answer
        for answer in found.answers if answer.precision != "gptq"
    ]  # fmt: skip
    page, _ = pages(replace(found, answers=cut), tmp_path)
    told = page.partition("## What was not judged")[2].partition("\n## ")[0]
    assert "compare only: 1 of 61." in told
    assert "AWQ: 1 answers, not executed: no sandbox on this machine." in told
    assert r"no answer: timeout \<x\>." in told
    assert "| AWQ | factual | 28 |" in page


def test_the_tables_behind(tmp_path: Path) -> None:
    pages(quality(samples=tasks()), tmp_path)
    rows = read_table(tmp_path / "failures.csv", Failure)
    assert len([row for row in rows if row.precision == "awq"]) == 61
    assert sum(row.quant_issue for row in rows if row.precision == "awq") == 4
    with (tmp_path / "failures.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file))[1:4] == ["prompt_id", "category", "bf16_ok"]
    families = {(row.precision, row.family): row for row in read_table(tmp_path / "families.csv", Outcomes)}
    assert families["awq", "task:gsm8k"].right_to_wrong == 3 and families["bf16", "all"].right_to_wrong == 1


# --- text from outside ------------------------------------------------------------------------------------------------


def rendered(page: str) -> str:
    """The page as GitHub's parser would take it: CommonMark with raw HTML and links."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(page)


def hostile(tmp_path: Path) -> str:
    prompts = prompt_set(3)
    asked = replace(prompts, prompts=tuple(replace(one, prompt=f"{HOSTILE} {one.id}") for one in prompts.prompts))
    wrong = {("bf16", 1): [], ("<img src=x>", 1): [f"factual-0{at}={HOSTILE}" for at in (1, 2, 3)]}
    found = answers(asked, wrong)
    noted = [replace(answer, note=HOSTILE) for answer in found]
    case = quality(prompts=asked, model="<b>m</b> | `x`", precisions=["bf16", "<img src=x>"])
    return pages(replace(case, answers=noted, name="`x` <i>"), tmp_path)[0]


def test_what_a_model_says_stays_text(tmp_path: Path) -> None:
    page = hostile(tmp_path)
    html = rendered(page)
    assert "### 1." in page and "alert(1)" in html, "it is shown"
    for tag in ("<script", "<img", "<b>", "<i>", "onerror=alert(1)>\n"):
        assert tag not in html
    assert set(re.findall(r'href="([^"]*)"', html)) <= {"failures.csv", "families.csv", "quality.md"}
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x0b-\x1f\x7f\u2028]", page)
    assert "⟨U+202E⟩" in page and "⟨U+001B⟩" in page, "what cannot be seen is said"
    headings = re.findall(r"<h\d>(.*?)</h\d>", html)
    assert "no heading" not in headings and len([one for one in headings if one[0].isdigit()]) == 3
    opening, sections = dress(page, {}, ["bf16"])
    assert "<script" not in str(opening) + "".join(str(section.body) for section in sections)


@given(st.text(st.one_of(st.sampled_from("`~<>|\\\n*_[]#"), st.characters(blacklist_categories=("Cs",))), max_size=200))
@example("so:\n```\n# out")
@example("`````\nout\n`````")
@example("   ````\nout")
@example("~~~\nout")
def test_no_text_leaves_its_fence(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"before\n\n{quoted(text)}\n\nafter")
    assert [token.type for token in tokens] == [
        "paragraph_open", "inline", "paragraph_close", "fence", "paragraph_open", "inline", "paragraph_close"
    ]  # fmt: skip
    assert tokens[3].content.removesuffix("\n") == visible(text)
    assert tokens[5].content == "after"


@pytest.mark.parametrize("text", ["a | b", "<b>", "[x](y)", "`x`", "a\nb", "\u202ex", "*x*", "&lt;"])
def test_a_line_stays_a_line_of_text(text: str) -> None:
    html = rendered(f"| a |\n| --- |\n| {line(text)} |\n")
    assert html.count("<td") == 1
    cell = re.search(r"<td>(.*?)</td>", html, re.DOTALL)
    plain = " ".join(visible(text).split())
    assert cell and cell[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == plain


def test_the_middle_of_a_long_text_is_left_out_and_its_end_is_not() -> None:
    text = "a" * 2000 + "b" * 1000 + "the end"
    shown = quoted(text)
    assert f"[… {3007 - SHOWN_HEAD - SHOWN_TAIL:,} characters left out …]" in shown and "the end" in shown
    assert len(shown) < SHOWN_HEAD + SHOWN_TAIL + 100


def test_an_empty_answer_is_shown_as_one(tmp_path: Path) -> None:
    found = quality()
    empty = [
        replace(answer, text="", tokens=(), ok=False) if (answer.precision, answer.prompt_id) == ("awq", "factual-09")
        else answer for answer in found.answers if answer.precision != "gptq"
    ]  # fmt: skip
    page, _ = pages(replace(found, answers=empty), tmp_path)
    assert "AWQ answered (wrong):\n\n*nothing*" in page


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    assert pages(quality(samples=tasks()), tmp_path / "a") == pages(quality(samples=tasks()), tmp_path / "b")
    one, two = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b"))
    assert len(one) == 9 and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_nothing_asked_is_said(tmp_path: Path) -> None:
    found = replace(quality(), prompts=None, answers=[])
    page, _ = pages(found, tmp_path)
    assert "No set of prompts is there" in page and "no answer that both gave could be judged" in page
    assert Answer("x", "y").error is None
