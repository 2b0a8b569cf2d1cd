"""cost.xlsx as a file: what stands in it without recalculating, and that nothing from outside becomes a formula.

That its formulas come to the same is test_workbook_recalculated.py's part, through LibreOffice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest

from harness.analysis.capacity import freed_memory, plan_cards
from harness.analysis.cost import price, stated_lines
from harness.analysis.knee import find_knees, safe_load
from harness.analysis.levels import levels
from harness.analysis.saving import savings
from harness.analysis.spend import spends
from harness.assumptions import Assumptions
from harness.prices import load_prices
from harness.report.run import Run
from harness.report.workbook import write_workbook
from harness.report.workbook.pen import LONGEST, plain
from harness.slo import Slo
from tests.report.workbook_cases import CASES, PLANNED, USUAL, Case, lines, read, run_of

FUNCTIONS = {
    "ABS", "AND", "AVERAGE", "COUNT", "COUNTIF", "EXP", "IF", "INDEX", "INT", "ISNUMBER", "ISTEXT", "LN", "MATCH",
    "MAX", "MEDIAN", "MIN", "MOD", "N", "NOT", "OR", "ROUND", "ROUNDDOWN", "ROUNDUP", "SQRT", "STDEV", "TINV", "TRUNC",
}  # fmt: skip
"""All of them older than Excel 2007, and in LibreOffice."""


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`book(name)`: the workbook of one of CASES, written once."""
    folder = tmp_path_factory.mktemp("books")
    return cache(lambda name: CASES[name].write(folder / f"{name}.xlsx"))


def part(path: Path, name: str) -> str:
    with ZipFile(path) as parts:
        return parts.read(name).decode()


def test_prices_by_hand(book: Callable[[str], Path]) -> None:
    """AWQ carries 32 users inside 3 s (p95 2.5 s, at most 2.75) at 1,150 tok/s; 0.36 USD an hour, half of it used:
    0.36 / (1,150 × 0.5 × 3,600) × 1e6 = 0.173913 USD for 1M output tokens. BF16 carries 16 (32 users take 5.2 s):
    0.36 / (400 × 1,800) × 1e6 = 0.5. So AWQ cuts it by 1 − 0.173913 / 0.5 = 65.2 %.

    Input comes with 1,150 / 31 = 37.0968 requests a second of 127 tokens, 4,711.29 tok/s; with a weight of 4 for output
    0.36 / ((4,711.29 + 4 × 1,150) × 1,800) × 1e6 = 0.0214795 for input, 0.0859180 for output; blended
    0.36 / ((4,711.29 + 1,150) × 1,800) × 1e6 = 0.0341222.
    """
    case, path = CASES["as measured"], book("as measured")
    assert lines(case, path, "slo_load") == [16, 32]
    assert lines(case, path, "slo_only") == pytest.approx([0.5, 0.1739130])
    assert lines(case, path, "saving") == [None, pytest.approx(0.6521739)]
    assert lines(case, path, "slo_input")[1] == pytest.approx(0.0214795, rel=1e-5)
    assert lines(case, path, "slo_output")[1] == pytest.approx(0.0859180, rel=1e-5)
    assert lines(case, path, "slo_blended")[1] == pytest.approx(0.0341222, rel=1e-5)


def test_a_correct_answer_by_hand(book: Callable[[str], Path]) -> None:
    """AWQ at 32 users completes 1,150 / 31 = 37.0968 requests a second in half of an hour of 0.36 USD:
    0.36 / (37.0968 × 1,800) × 1,000 = 0.0053913 USD for 1,000 answers, 48 of 60 right: 0.0067391. BF16 at 16 users
    400 / 31 = 12.9032: 0.0155 for 1,000, 57 of 60: 0.0163158. AWQ pays from 0.0053913 / 0.0155 = 34.783 % of BF16's
    accuracy on, and keeps 48/57."""
    case, path = CASES["judged"], book("judged")
    assert lines(case, path, "correct") == pytest.approx([0.0163158, 0.0067391], rel=1e-5)
    assert lines(case, path, "even") == [None, pytest.approx(0.3478261)]
    assert lines(case, path, "kept") == [None, pytest.approx(48 / 57)] and lines(case, path, "pays") == [None, "yes"]
    cells = read(path)
    assert [cells["Quality", at].value for at in ("C5", "D5", "C6", "D6")] == [57, 48, 60, 60]
    assert "1,000 correct answers" in {cell.value for (sheet, _), cell in cells.items() if sheet == "Answer"}


def test_no_sheet_of_quality_where_nobody_asked(book: Callable[[str], Path]) -> None:
    cells = read(book("usual"))
    assert "Quality" not in {sheet for sheet, _ in cells}
    assert not [cell for cell in cells.values() if "orrect answer" in str(cell.value)]


def test_a_stated_load_between_tested_ones_by_hand(book: Callable[[str], Path]) -> None:
    """12 users between 8 (BF16: 240 tok/s) and 16 (400): ln 1.5 / ln 2 = 0.5849625 of the way, on logarithms
    240 × (400 / 240)^0.5849625 = 323.582 tok/s; 0.36 / (323.582 × 1,800) × 1e6 = 0.618080 USD. 32 users were tested."""
    case, path = CASES["usual"], book("usual")
    assert lines(case, path, "chat_tok_s")[0] == pytest.approx(323.582, rel=1e-5)
    assert lines(case, path, "chat_only")[0] == pytest.approx(0.618080, rel=1e-5)
    assert lines(case, path, "batch_tok_s") == pytest.approx([520, 1150])
    assert lines(case, path, "chat_safe") + lines(case, path, "batch_safe") == ["yes", "yes", "no", "yes"]


@pytest.mark.parametrize("name", ["usual", "owned", "three sessions", "open loop", "nothing safe", "goodput"])
def test_shows_what_the_library_says(name: str, book: Callable[[str], Path]) -> None:
    case, path = CASES[name], book(name)
    points, assumptions = case.run.points, case.assumptions
    knees = find_knees(points, case.run.slo)
    stated = stated_lines(points, knees, assumptions)
    per_knee = len(stated) // len(knees)
    expected = {
        "slo_load": [safe_load(knee) or "none" for knee in knees],
        "slo_only": [line.usd_per_1m_tokens for line in stated[::per_knee]],
        "slo_only_lo": [line.usd_per_1m_tokens_lo for line in stated[::per_knee]],
        "slo_input_hi": [line.usd_per_1m_input_hi for line in stated[::per_knee]],
        "slo_blended": [line.usd_per_1m_blended for line in stated[::per_knee]],
    }
    if per_knee == 3:
        expected["chat_output"] = [line.usd_per_1m_output for line in stated[1::3]]
        expected["batch_blended_lo"] = [line.usd_per_1m_blended_lo for line in stated[2::3]]
    plans, spent = plan_cards(points, knees, assumptions), spends(points, knees, assumptions)
    expected |= {
        "cards": [plan.cards for plan in plans],
        "cards_lo": [plan.cards_lo for plan in plans],
        "cards_hi": [plan.cards_hi for plan in plans],
        "bound_by": [plan.bound_by for plan in plans],
        "used_lost": [plan.utilisation_lost for plan in plans],
        "usd_per_month": [spend.usd_per_month for spend in spent],
        "effective_blended": [spend.effective.blended for spend in spent],
        "full_only": [spend.full_load.output_only for spend in spent],
        "api_month": [spend.api_usd_per_month for spend in spent],
        "card_even": [spend.card_break_even.per_day for spend in spent],
        "fleet_even_share": [spend.fleet_break_even.share for spend in spent],
    }
    saved = savings(points, knees, assumptions)
    expected |= {f"saving{end}": [None, *(getattr(one, f"share{end}") for one in saved)] for end in ("", "_lo", "_hi")}
    freed = freed_memory(points, assumptions.context_tokens)
    expected["freed_users"] = [None, *(line.users for line in freed)]
    for key, values in expected.items():
        wanted = [value if value is None or isinstance(value, str) else pytest.approx(value) for value in values]
        assert lines(case, path, key) == wanted, key


def test_levels_are_priced_each(book: Callable[[str], Path]) -> None:
    case, cells = CASES["owned"], read(book("owned"))
    header = {cell.value: place for (sheet, place), cell in cells.items() if sheet == "Levels" and place[-1:] == "4"}
    column = header["Output tokens, the whole hour on them, USD/1M"].rstrip("4")
    found = [cells["Levels", f"{column}{5 + at}"].value for at in range(8)]
    assert found == pytest.approx([price(level, case.assumptions)[0] for level in levels(case.run.points)])


def test_points_hold_every_row_and_say_which_count(book: Callable[[str], Path], tmp_path: Path) -> None:
    case, cells = CASES["two sessions"], read(book("two sessions"))
    counted = [cell.value for (sheet, place), cell in cells.items() if sheet == "Points" and re.match(r"A\d+$", place)]
    above = 4  # the title, the run, its cautions, the header
    assert len(counted) - above == len(case.run.points) == 17
    assert sorted(set(counted[above:])) == ["no: invalid", "yes"]
    again = replace(case.run.points[0], attempt=3, tok_s=36.0)
    cells = read(Case(replace(case.run, points=[*case.run.points, again])).write(tmp_path / "cost.xlsx"))
    assert "no: measured again" in {cell.value for (sheet, _), cell in cells.items() if sheet == "Points"}


@pytest.mark.parametrize("name", CASES)
def test_every_formula_shows_a_figure_and_no_fault(name: str, book: Callable[[str], Path]) -> None:
    path = book(name)
    with ZipFile(path) as parts:
        assert not [name for name in parts.namelist() if "vba" in name or "externalLink" in name or "media" in name]
        names = set(re.findall(r'<definedName name="(\w+)"', parts.read("xl/workbook.xml").decode()))
        for sheet in (name for name in parts.namelist() if name.startswith("xl/worksheets/sheet")):
            xml = parts.read(sheet).decode()
            assert xml.count("<f>") == xml.count("</f><v>")
            assert "<pageSetup" in xml and ("<pane" in xml or "Notes" in xml or "<drawing" in xml or sheet[-5] != "1")
    for (sheet, place), cell in read(path).items():
        assert not str(cell.value).startswith("#"), (sheet, place)
        if cell.formula is not None:
            assert set(re.findall(r"([A-Z]+)\(", cell.formula)) <= FUNCTIONS
            words = re.sub(r'"[^"]*"', "", cell.formula)
            assert set(re.findall(r"\b[a-z]\w+", words)) <= names, cell.formula
            assert "{" not in cell.formula


def test_inputs_are_named_checked_and_kept_within_their_ends(book: Callable[[str], Path]) -> None:
    path = book("usual")
    cells, inputs = read(path), part(path, "xl/worksheets/sheet2.xml")
    names = dict(re.findall(r'<definedName name="([a-z_0-9]+)">Inputs!\$B\$(\d+)<', part(path, "xl/workbook.xml")))
    known = {field.name for field in fields(Assumptions)} - {"api_name", "sources", "start_s", "cell_s"}
    assert set(names) == known | {f"slo_{field.name}" for field in fields(Slo)} | {"rent_or_own"}
    for name, row in names.items():
        assert cells["Inputs", f"H{row}"].value == name
        ends = rf"<formula1>\$D\${row}</formula1><formula2>\$E\${row}</formula2>"
        kept = '<formula1>"rent,own"</formula1>' if name == "rent_or_own" else ends
        assert re.search(rf'<dataValidation [^>]*sqref="B{row}"[^>]*>{kept}', inputs), name
    shown = {name: cells[place].value if (place := ("Inputs", f"B{row}")) in cells else None
             for name, row in names.items()}  # fmt: skip
    assert (shown["slo_p95_s"], shown["slo_ttft_s"], shown["rent_or_own"]) == (3.0, None, "rent")
    assert (shown["usd_per_hour"], shown["utilisation"]) == (0.36, 0.5)  # as all rows were priced
    assert (shown["users"], shown["headroom"], shown["card_usd"]) == (150, 0.15, None)


def test_inputs_that_nothing_reads_are_left_out(book: Callable[[str], Path]) -> None:
    """An open loop has no users; one trace at one speed has no cards to count either."""
    loop = part(book("open loop"), "xl/workbook.xml")
    trace = part(book("one trace"), "xl/workbook.xml")
    assert '"requests_per_day"' in loop and '"users"' not in loop and '"chat_conc"' not in loop
    assert '"usd_per_hour"' in trace and '"slo_p95_s"' in trace and '"failover"' not in trace


def test_rows_with_prices_of_their_own_leave_the_input_empty(tmp_path: Path) -> None:
    points = [replace(USUAL[0], usd_per_hour=0.5), *USUAL[1:]]
    path = Case(run_of(points)).write(tmp_path / "cost.xlsx")
    row = re.search(r'name="usd_per_hour">Inputs!\$B\$(\d+)', part(path, "xl/workbook.xml"))
    assert row is not None and ("Inputs", f"B{row[1]}") not in read(path)


def test_charts_read_the_sheets_and_the_limit_follows_its_input(book: Callable[[str], Path]) -> None:
    path = book("usual")
    cells = read(path)
    with ZipFile(path) as parts:
        charts = [parts.read(f"xl/charts/chart{number}.xml").decode() for number in range(1, 7)]

    def columns(chart: str, element: str) -> list[object]:
        """Title of the column of Levels that each series takes its figures from, and its rows."""
        found = re.findall(rf"<c:{element}><c:numRef><c:f>Levels!\$(\w+)\$(\d+):\$\w+\$(\d+)<", chart)
        return [(cells["Levels", f"{column}4"].value, int(first), int(last)) for column, first, last in found]

    figures = ("tok/s", "p95, s", "Output tokens, the whole hour on them, USD/1M")
    for chart, title, bars in zip(charts, figures, ("tok/s", "p95", "USD/1M"), strict=False):
        assert columns(chart, "xVal") == [("Load", 5, 8), ("Load", 9, 12)]
        assert columns(chart, "yVal") == [(title, 5, 8), (title, 9, 12)]
        assert columns(chart, "plus") == [(f"{bars}, up to its end", 5, 8), (f"{bars}, up to its end", 9, 12)]
        assert columns(chart, "minus") == [(f"{bars}, down to its end", 5, 8), (f"{bars}, down to its end", 9, 12)]
    line = re.findall(r"<c:yVal><c:numRef><c:f>Charts!\$(\w+)\$(\d+):\$\w+\$(\d+)<", charts[1])
    assert [cells["Charts", f"{column}{row}"].formula for column, *rows in line for row in rows] == ["slo_p95_s"] * 2
    rows = [re.findall(r"<c:val><c:numRef><c:f>Workings!\$C\$(\d+):\$D\$\1<", chart) for chart in charts[3:]]
    said = [[cells["Workings", f"A{row}"].value for row in found] for found in rows]
    assert said == [
        ["Safe load"],
        ["Output tokens, the whole hour on them"],
        ["All cards, a month", "The API, a month"],
    ]


def test_the_same_run_gives_the_same_bytes_and_no_clock(tmp_path: Path) -> None:
    case = CASES["usual"]
    one, two = (case.write(tmp_path / name) for name in ("a.xlsx", "b.xlsx"))
    assert one.read_bytes() == two.read_bytes()
    with ZipFile(one) as parts:
        assert {info.date_time for info in parts.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    stamps = re.findall(r">(\d{4}-[^<]+)</dcterms", part(one, "docProps/core.xml"))
    assert stamps == ["2026-11-20T18:00:00Z"] * 2  # when the first row was measured
    undated = Case(run_of([replace(point, started_at="yesterday") for point in USUAL]))
    assert ">1980-01-01T" in part(undated.write(tmp_path / "c.xlsx"), "docProps/core.xml")


def test_formulas_are_the_same_whatever_is_assumed(tmp_path: Path) -> None:
    """Only the input cells know prices, traffic and limits: a formula with a figure of theirs would not follow them."""
    usual = CASES["usual"]
    other = Case(replace(usual.run, slo=Slo(1.5)), Assumptions(usd_per_hour=2.0, users=7, chat_conc=9))
    one, two = (read(case.write(tmp_path / "cost.xlsx")) for case in (usual, other))
    assert {at: cell.formula for at, cell in one.items() if cell.formula} == {
        at: cell.formula for at, cell in two.items() if cell.formula
    }


HOSTILE = {"model": "=cmd|' /C calc'!A0", "bf16": "+1+1", "awq": "@sum(1)", "scenario": "-2+3", "kernel": "=1+1",
           "reason": '=HYPERLINK("http://x","y")', "run": "=A1", "api": "=NOW()", "engine": "http://x.y/z"}  # fmt: skip


def outside(names: dict[str, str]) -> Case:
    """The usual run under other names."""
    points = [
        replace(point, precision=names[point.precision], model=names["model"], kernel=names["kernel"],
                engine=names["engine"], verdict_reasons=(names["reason"],), scenario=names["scenario"])
        for point in USUAL
    ]  # fmt: skip
    run = Run(names["run"], points, Slo(3.0), {"name": names["scenario"], "description": names["reason"]}, {}, {})
    return Case(run, replace(PLANNED, api_name=names["api"]))


def test_names_from_outside_reach_nothing_but_text(tmp_path: Path) -> None:
    """The same run under harmless names of the same lengths differs in the table of texts, in titles, and in the
    charts' copies of texts; in no formula, name, validation or link."""
    harmless = {
        key: ("H" if text.upper() == text else "h") * (len(text) - 1) + key[0].upper() for key, text in HOSTILE.items()
    }
    paths = [outside(names).write(tmp_path / f"{at}.xlsx") for at, names in enumerate((HOSTILE, harmless))]
    with ZipFile(paths[0]) as one, ZipFile(paths[1]) as two:
        assert one.namelist() == two.namelist()
        differ = {name for name in one.namelist() if one.read(name) != two.read(name)}
        texts = {"xl/sharedStrings.xml", "docProps/core.xml"}
        charts = {name for name in differ if name.startswith("xl/charts/")}
        assert texts <= differ and differ <= texts | charts
        for name in charts:
            bare = [re.sub(r"<c:v>[^<]*</c:v>", "", parts.read(name).decode()) for parts in (one, two)]
            assert bare[0] == bare[1]
    cells = read(paths[0])
    said = {str(cell.value) for cell in cells.values() if cell.formula is None}
    for key in ("bf16", "awq", "kernel", "engine", "reason", "model"):
        assert HOSTILE[key].upper() in said or HOSTILE[key] in said, key
    assert any(HOSTILE["api"] in text for text in said) and any(HOSTILE["run"] in text for text in said)


def test_names_that_no_sheet_can_hold(tmp_path: Path) -> None:
    odd = "a\x00b\x1b[31m\ud800\u202e\n_x0041_ " + "long " * 10_000
    assert plain(odd).startswith("a b [31m _x0041_ long") and len(plain(odd)) == LONGEST
    names = dict.fromkeys(HOSTILE, odd) | {"bf16": odd, "awq": "awq" + odd}
    cells = read(outside(names).write(tmp_path / "cost.xlsx"))
    assert all("\x1b" not in str(cell.value) for cell in cells.values())
    precisions = {cell.value for (sheet, place), cell in cells.items() if sheet == "Answer" and place in ("C4", "D4")}
    assert precisions == {plain(odd).upper(), plain("awq" + odd).upper()} or len(precisions) == 2


def test_an_unwritten_file_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        CASES["usual"].write(tmp_path / "cost.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_the_catalogue_of_prices_is_there_to_read(tmp_path: Path) -> None:
    case, prices = CASES["usual"], load_prices()
    knees = find_knees(case.run.points, case.run.slo)
    path = write_workbook(case.run, knees, case.assumptions, tmp_path / "cost.xlsx", prices)
    cells = read(path)
    said = [cell.value for (sheet, place), cell in cells.items() if sheet == "Prices" and place.startswith("D")]
    count = len(prices.rents) + len(prices.buys) + len(prices.tariffs) + 2 * len(prices.apis)
    assert len(said) == count + 1
    sources = {cell.value for (sheet, place), cell in cells.items() if sheet == "Prices" and place.startswith("G")}
    assert {rent.source for rent in prices.rents} <= sources
    assert not any("Prices!" in (cell.formula or "") for cell in cells.values())


def test_one_trace_has_levels_and_prices_but_no_safe_load(book: Callable[[str], Path]) -> None:
    path = book("one trace")
    cells = read(path)
    assert {sheet for sheet, _ in cells} == {"Answer", "Inputs", "Levels", "Points", "Notes"}
    case = CASES["one trace"]
    assert cells["Answer", "G5"].value == pytest.approx(price(levels(case.run.points)[0])[0])
    assert any("no safe load" in str(cell.value) for (sheet, _), cell in cells.items() if sheet == "Answer")


def test_resampled_intervals_stand_as_figures(book: Callable[[str], Path]) -> None:
    """From ten sessions on levels() resamples, which no formula can: the ends are the library's, and they stay."""
    case, cells = CASES["eleven sessions"], read(book("eleven sessions"))
    first = levels(case.run.points)[0]
    ends = [cells["Levels", f"{column}5"] for column in "FG"]
    assert [end.formula for end in ends] == [None, None]
    assert [end.value for end in ends] == pytest.approx([first.tok_s_lo, first.tok_s_hi])
    assert cells["Levels", "E5"].formula is not None


def test_rates_have_a_unit_of_their_own(book: Callable[[str], Path]) -> None:
    case, path = CASES["open loop"], book("open loop")
    assert lines(case, path, "slo_load") == [1.0, 2.5]
    units = {cell.value for (sheet, place), cell in read(path).items() if sheet == "Answer" and place.startswith("B")}
    assert "req/s" in units
