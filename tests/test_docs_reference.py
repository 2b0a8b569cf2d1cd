"""docs/reference is what the code says, all of it, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
import reference

from harness import records
from harness.analysis import validity


@pytest.mark.parametrize("name", reference.pages())
def test_the_committed_page_is_current(name: str) -> None:
    committed = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert committed == reference.pages()[name], "run: python tools/reference.py"


def test_no_page_is_left_over() -> None:
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.pages())


@pytest.mark.parametrize("command", ["sweep", "quantize", "capacity", "engine install"])
def test_a_command_is_described_with_each_option_of_its_help(command: str) -> None:
    """Against what --help prints, which the page is not made from."""
    line = [sys.executable, "-m", "harness", *command.split(), "--help"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    page = reference.commands_page()
    section = page.partition(f"\n## bench {command}\n")[2].partition("\n## ")[0]
    offered = {
        word.strip(",[]")
        for text in said.splitlines() if text.startswith("  -")
        for word in text.split()[:2] if word.startswith("--")
    } - {"--help"}  # fmt: skip
    assert offered and not [
        option for option in offered if f"`{option}" not in section and f", {option}" not in section
    ]


def test_every_reason_that_the_code_gives_is_described() -> None:
    """Against the words of the source that set a reason, and not the list that the page is made from."""
    import re
    from inspect import getsource

    given = set(re.findall(r'reasons\["(\w+)"\]', getsource(validity)))
    described = {name for names, _ in reference.reasons() for name in names.split(", ")}
    assert given and given <= described
    assert all(meaning for _, meaning in reference.reasons())


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        ("tok_s", "output tokens a second"), ("tok_s_lo", "output tokens a second"), ("p95_ms", "ms"),
        ("rate_rps", "requests a second"), ("weights_gib", "GiB (2^30 bytes)"), ("window_s", "s"),
        ("usd_per_hour", "US dollars an hour"), ("usd_per_1m_tokens", "US dollars a million tokens"),
        ("power_w", "W"), ("temperature_c_max", "°C"), ("energy_j_per_token", "joules a token"), ("conc", ""),
        ("kv_cache_tokens", "tokens"), ("throttled_share", "share, 0 to 1"),
        ("sm_clock_mhz", "MHz"), ("intended_ns", "ns"),
    ],
)  # fmt: skip
def test_the_unit_of_a_column(column: str, unit: str) -> None:
    assert reference.unit(column) == unit


def test_the_text_under_a_field_is_its_meaning_and_a_bound_explains_itself() -> None:
    told = reference.field_docs()
    assert told["SweepPoint"]["chunks_s"].startswith("Token-bearing chunks received a second")
    assert "tok_s" not in told["Scenario"]
    assert reference.meaning("p95_ms_lo", {}) == "lower end of the 95 % interval of `p95_ms`"
    assert reference.meaning("p95_ms_hi", {}).startswith("upper")
    assert reference.meaning("ttft_p50_ms", {}) == "median of [TTFT](../concepts.md#ttft)"


def test_every_table_that_a_run_holds_is_described() -> None:
    page = reference.columns_page()
    for record in reference.TABLES.values():
        assert all(f"| `{field.name}` |" in page for field in fields(record))
    assert records.SweepPoint in reference.TABLES.values()


def test_what_markdown_and_html_obey_is_escaped() -> None:
    assert reference.plain("a|b <run> *x* `<y>`") == r"a\|b &lt;run> \*x\* `<y>`"
