"""Text from outside stays text: on terminals, in spreadsheets, and when it comes back from a table."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from harness.cli import main
from harness.inert import cell, uncell, visible
from harness.records import SweepPoint, TableWriter, read_table, write_table
from harness.terminal import Terminal

ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202egnol\x7f"
FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1+1", "\n=1+1", "\uff1d1+1", "'=1+1", "a;=1+1", "a\n=1+1", "a\t@x")


# --- terminals --------------------------------------------------------------------------------------------------------


def test_what_a_terminal_obeys_is_shown_by_its_number() -> None:
    assert visible("a\x1b[2Jb\x9bc\u202ed\x7f\ud800") == "a⟨U+001B⟩[2Jb⟨U+009B⟩c⟨U+202E⟩d⟨U+007F⟩⟨U+D800⟩"
    assert visible("as it is: ü 日本　語\u00a0\tx\ny") == "as it is: ü 日本　語\u00a0\tx\ny"


@given(st.text())
def test_nothing_stays_that_a_terminal_obeys(text: str) -> None:
    assert not any(ord(letter) < 32 and letter not in "\n\t" or 127 <= ord(letter) < 160 for letter in visible(text))
    assert visible(visible(text)) == visible(text)


def printed(*renderables: object) -> str:
    terminal = Terminal()
    terminal.file, terminal.width = io.StringIO(), 300
    terminal._force_terminal, terminal._color_system = True, None
    for renderable in renderables:
        terminal.print(renderable)
    return terminal.file.getvalue()


def test_the_terminal_of_all_commands_obeys_nobody() -> None:
    table = Table(ESCAPES)
    table.add_row(Text(ESCAPES))
    table.add_row(ESCAPES)
    said = printed(ESCAPES, Text(ESCAPES), table, "[bold]x[/bold] :smile: [link=http://evil]y[/link]")
    for bad in ("\x1b[31m", "\x1b]", "\x9b", "\x07", "\r", "\u202e"):
        assert bad not in said
    assert said.count("⟨U+001B⟩[31m") >= 2, "shown instead"
    assert "[bold]x[/bold] :smile: [link=http://evil]y[/link]" in said, "and rich obeys nobody either"


def test_an_error_with_a_strangers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "report", str(tmp_path / ESCAPES.replace("/", ""))])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "⟨U+001B⟩[31mred" in said and "\x1b" not in said and "\x9b" not in said


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_its_apostrophe_and_loses_it_again(text: str) -> None:
    assert cell(text) != text and uncell(cell(text)) == text
    for part in cell(text).replace("\n", ";").replace("\t", ";").split(";"):
        assert not part.lstrip(" ").startswith(("=", "+", "-", "@", "\uff1d"))


@pytest.mark.parametrize("text", ["", "bf16", "awq-4bit", "it's", "'quoted'", "1-2", "a=b", "x@kneebench", "don't;do"])
def test_other_text_is_left_alone(text: str) -> None:
    assert cell(text) == text == uncell(text)


@given(st.text(alphabet="=+-@\t\n;',a\"\uff1d\r\x1b", max_size=12))
@settings(max_examples=500)
def test_every_text_comes_back_made_visible(text: str) -> None:
    assert uncell(cell(text)) == visible(text)


def test_tables_of_a_run_hold_no_formula_and_give_back_what_was_written(tmp_path: Path) -> None:
    rows = [SweepPoint("r", text, 1, model=text, kernel=text, verdict_reasons=("=x", "-y")) for text in FORMULAS]
    write_table(tmp_path / "whole.csv", rows, SweepPoint)
    with TableWriter(tmp_path / "grown.csv", SweepPoint) as table:
        for row in rows:
            table.add(row)
    for name in ("whole.csv", "grown.csv"):
        assert read_table(tmp_path / name, SweepPoint) == rows
        with (tmp_path / name).open(newline="") as file:
            read = [one for line in csv.reader(file) for one in line if one and not one.lstrip("-").replace(".", "")]
        assert read == []
        with (tmp_path / name).open(newline="") as file:
            words = [line[:2] + [line[-2]] for line in csv.reader(file)]
        assert not any(word.startswith(("=", "+", "-", "@", "\t", "\n")) for line in words for word in line)


def test_numbers_are_no_formulas(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [SweepPoint("r", "bf16", 1, clock_step_ms=-1.5)], SweepPoint)
    assert ",-1.5," in (tmp_path / "t.csv").read_text()


def test_a_name_with_a_carriage_return_is_one_row(tmp_path: Path) -> None:
    """Python 3.11 writes it unquoted: the row was torn in two when it was read, and the second half began a new one."""
    write_table(tmp_path / "t.csv", [SweepPoint("r", "a\r=1+1", 1), SweepPoint("r", "b", 2)], SweepPoint)
    assert [row.precision for row in read_table(tmp_path / "t.csv", SweepPoint)] == ["a⟨U+000D⟩=1+1", "b"]


@pytest.mark.slow
def test_a_spreadsheet_computes_nothing(tmp_path: Path) -> None:
    """LibreOffice, told to evaluate formulas and to take a comma, a semicolon and a tab for ends of cells."""
    if shutil.which("soffice") is None:
        pytest.skip("no LibreOffice")
    rows = [[cell(text), cell(f"x{text}"), "end"] for text in FORMULAS]
    with (tmp_path / "guarded.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    (tmp_path / "bare.csv").write_text("=1+1,=1+1\n")
    for name, separators in (("guarded", "44"), ("guarded", "59"), ("guarded", "44/59/9"), ("bare", "44")):
        # Tokens of the CSV filter: separators, quote, UTF-8, first row, formats, language, quote all, detect numbers,
        # as shown, formulas, spaces, sheet, evaluate formulas.
        options = f"CSV:{separators},34,76,1,,0,false,true,false,false,false,-1,true"
        subprocess.run(
            [
                "soffice", "--headless", f"-env:UserInstallation=file://{tmp_path}/office", f"--infilter={options}",
                "--convert-to", "fods", "--outdir", str(tmp_path), str(tmp_path / f"{name}.csv"),
            ],
            check=True, capture_output=True, timeout=250,
        )  # fmt: skip
        assert ("table:formula" in (tmp_path / f"{name}.fods").read_text()) == (name == "bare"), separators
