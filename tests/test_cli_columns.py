"""Tables in a terminal of any width: no word is broken, no number cut."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from harness.predict.cards import card
from harness.prices import load_prices
from harness.report.ranking import show_catalogue
from harness.report.run import load_run
from harness.report.terminal import print_rows, show_run
from harness.width import column_widths

HEADER = ("Run", "Machine", "tok/s", "")
ROWS = [("a-run-with-a-name", "An EPYC of 64 cores", "12,345.6", "unfinished"), ("b", "", "7.0", "")]


def printed(width: int, *, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, no_color=True)
    print_rows(console, HEADER, ROWS, title="Runs", numbers=("tok/s",))
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]


def test_widths_by_hand() -> None:
    """10 + 20 + 5 in 28: the column of 20 gives 7. In 17: it gives 10, then it and the first in turn, until each has
    what it cannot do without: 8, 4, 5 are 17. In 16 there is no room."""
    assert column_widths([10, 20, 5], [8, 4, 5], 40) == [10, 20, 5]
    assert column_widths([10, 20, 5], [8, 4, 5], 28) == [10, 13, 5]
    assert column_widths([10, 20, 5], [8, 4, 5], 17) == [8, 4, 5]
    assert column_widths([10, 20, 5], [8, 4, 5], 16) is None


@pytest.mark.parametrize("width", [200, 80, 60, 50, 40, 30])
def test_every_word_is_there_whole(width: int) -> None:
    said = printed(width)
    assert max(len(line.rstrip()) for line in said.splitlines()) <= width
    words = said.replace(";", " ").split()
    for cell in (cell for row in ROWS for cell in row):
        assert set(cell.split()) <= set(words), width


def test_a_wide_terminal_has_a_table_and_a_narrow_one_paragraphs() -> None:
    """The longest words take 17 + 7 + 8 + 10 columns, and three gaps of two: 48."""
    assert printed(48).splitlines()[1].split() == ["Run", "Machine", "tok/s"]
    assert printed(80).splitlines()[1].split() == ["Run", "Machine", "tok/s"]
    assert "12,345.6" in printed(80).splitlines()[2]
    assert printed(47).splitlines() == [
        "Runs",
        "a-run-with-a-name",
        "  Machine An EPYC of 64 cores; tok/s 12,345.6; ",
        "  unfinished                                   ",
        "b",
        "  tok/s 7.0                                    ",
    ]


def test_a_pipe_has_no_edge() -> None:
    assert len(printed(20, terminal=False).splitlines()) == 4


def test_nothing_in_a_cell_is_markup() -> None:
    console = Console(file=io.StringIO(), width=20, force_terminal=True, no_color=True)
    print_rows(console, ("a", "b"), [("[red]x[/red]", "[bold]a-very-long-word-in-it")])
    assert "[red]x[/red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_catalogue_of_cards_at_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    show_catalogue(console, (card("rtx-2000-ada"), card("t4")), load_prices())
    said = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
    line = next(line for line in said.splitlines() if line.startswith("rtx-2000-ada "))
    assert line.split()[:3] == ["rtx-2000-ada", "15.6", "224"]
    assert "rtx-2000-ada: NVIDIA RTX 2000 Ada Generation." in said


@pytest.mark.parametrize("width", [80, 160])
def test_the_rows_of_a_sweep_with_long_names_and_reasons(width: int) -> None:
    """At 80 columns the reasons stand below; no figure is cut, and a long name in its middle."""
    name = "a-checkpoint-with-a-really-long-name"
    found = load_run(Path(__file__).parent.parent / "results" / "qwen2.5-0.5b-shape")
    points = [
        replace(
            point, precision=name if point.precision == "awq" else "bf16", tok_s=123456.0, p95_ms=654321.0,
            verdict="suspect", verdict_reasons=("too_few_samples", "drifting"),
        )
        for point in found.points
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    show_run(console, replace(found, points=points))
    said = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
    lines = [line for line in said.splitlines() if "123,456" in line and "654,321" in line]
    assert len(lines) == len(points), "each row has its figures whole"
    assert all(("too_few_samples, drifting" in line) == (width == 160) for line in lines)
    assert ("BF16 at 1, 8, 16, 32 users is suspect: too_few_samples, drifting" in said) == (width == 80)
    assert "a-chec…g-name" in said


def test_one_user_is_one() -> None:
    found = load_run(Path(__file__).parent.parent / "results" / "qwen2.5-0.5b-shape")
    why = {
        ("bf16", 1): ("client_bound",),
        ("bf16", 8): ("drifting",),
        ("awq", 1): ("errors",),
        ("awq", 16): ("errors",),
    }
    points = [
        replace(point, verdict="suspect" if (point.precision, point.conc) in why else "valid",
                verdict_reasons=why.get((point.precision, point.conc), ()))
        for point in found.points
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=80, no_color=True)
    show_run(console, replace(found, points=points))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for line in ("BF16 at 1 user is suspect: client_bound", "BF16 at 8 users is suspect: drifting",
                 "AWQ at 1, 16 users is suspect: errors"):  # fmt: skip
        assert f"{line}\n" in said
