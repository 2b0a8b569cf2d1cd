"""cost.xlsx through LibreOffice: what its formulas come to is what the library says, for whatever stands in Inputs.

The oracle is a spreadsheet that we did not write. What each formula cell shows is first overwritten with a figure that
nobody computed, so that a cell which is not recalculated cannot pass; then LibreOffice, told to recalculate every file
that it opens, turns the copies into xlsx again. All copies go through one run of it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions
from harness.slo import Slo
from tests.report.workbook_cases import CASES, OWNED, PLANNED, Case, Cell, judged, lines, read, rewritten

GARBAGE = -987654321.0
TIMEOUT_S = 240

USUAL, RENTED_FROM = CASES["usual"], CASES["owned"]
OWNING = {"card_usd": 900.0, "host_usd": 300.0, "years": 2.5, "residual": 0.2, "idle_watts": 25.0, "host_watts": 60.0,
          "pue": 1.4, "usd_per_kwh": 0.35}  # fmt: skip

CHANGES: dict[str, tuple[str, dict[str, float | str | None], Case]] = {
    "price": ("usual", {"usd_per_hour": 1.25}, replace(USUAL, assumptions=replace(PLANNED, usd_per_hour=1.25))),
    "utilisation": ("usual", {"utilisation": 0.9}, replace(USUAL, assumptions=replace(PLANNED, utilisation=0.9))),
    "service level": ("usual", {"slo_p95_s": 1.3}, Case(replace(USUAL.run, slo=Slo(1.3)), PLANNED)),
    "service level that none keeps": ("usual", {"slo_p95_s": 0.2}, Case(replace(USUAL.run, slo=Slo(0.2)), PLANNED)),
    "limit that was not measured": ("usual", {"slo_ttft_s": 0.5}, Case(replace(USUAL.run, slo=Slo(3.0, 0.5)), PLANNED)),
    "first token": (
        "three sessions",
        {"slo_ttft_s": 0.2, "slo_tpot_s": None, "slo_p95_s": 2.6},
        Case(replace(CASES["three sessions"].run, slo=Slo(2.6, 0.2)), PLANNED),
    ),
    "goodput": (
        "goodput",
        {"slo_goodput": 0.9},
        Case(replace(CASES["goodput"].run, slo=Slo(3.0, None, None, 0.9)), PLANNED),
    ),
    "traffic": (
        "usual",
        {"requests_per_day": 9e6, "users": None, "peak_factor": 2.0},
        replace(USUAL, assumptions=replace(PLANNED, requests_per_day=9e6, users=None, peak_factor=2.0)),
    ),
    "no traffic": (
        "usual",
        {"requests_per_day": None, "users": None},
        replace(USUAL, assumptions=replace(PLANNED, requests_per_day=None, users=None)),
    ),
    "reserve": (
        "usual",
        {"headroom": 0.5, "failover": 0.0, "users_per_tenant": 3.0, "context_tokens": 500.0, "peak_rps": 60.0},
        replace(
            USUAL,
            assumptions=replace(
                PLANNED, headroom=0.5, failover=0, users_per_tenant=3, context_tokens=500, peak_rps=60.0
            ),
        ),
    ),
    "stated loads": (
        "usual",
        {"chat_conc": 3.0, "batch_conc": 100.0, "output_weight": 2.5},
        replace(USUAL, assumptions=replace(PLANNED, chat_conc=3, batch_conc=100, output_weight=2.5)),
    ),
    "API": (
        "usual",
        {"api_usd_per_1m_input": 0.01, "api_usd_per_1m_output": 0.02},
        replace(USUAL, assumptions=replace(PLANNED, api_usd_per_1m_input=0.01, api_usd_per_1m_output=0.02)),
    ),
    "own": ("usual", {"rent_or_own": "own", **OWNING}, replace(USUAL, assumptions=replace(PLANNED, **OWNING))),
    "rent": (
        "owned",
        {"rent_or_own": "rent", "usd_per_hour": 0.5},
        replace(
            RENTED_FROM,
            assumptions=Assumptions(
                usd_per_hour=0.5, requests_per_day=250_000, peak_rps=9.0, users_per_tenant=5, context_tokens=1000
            ),
        ),
    ),
    "count of right answers": (
        "judged",
        {"Quality!D5": 12.0, "Quality!C5": 40.0, "Quality!C6": 50.0, "Quality!D6": 50.0, "usd_per_hour": 0.8},
        Case(USUAL.run, replace(PLANNED, usd_per_hour=0.8), judged(40, 12, 50)),
    ),
    "power": (
        "owned",
        {"watts": 333.0, "usd_per_kwh": 0.6},
        replace(RENTED_FROM, assumptions=replace(OWNED, watts=333.0, usd_per_kwh=0.6)),
    ),
}
"""Of which case, which cells (of Inputs by name) are typed over with what, and what then is the library's."""


def spoilt(sheet: str, xml: str) -> str:
    """Every formula shows what nobody computed."""
    shows = re.compile(r'(<c r="[A-Z]+\d+"(?: s="\d+")?)(?: t="\w+")?>(<f>[^<]*</f>)<v>[^<]*</v>')
    return shows.sub(rf"\1>\2<v>{GARBAGE:.0f}</v>", xml)


def typed(path: Path, values: dict[str, float | str | None]) -> Callable[[str, str], str]:
    """Other values in input cells, by their names, and every formula spoilt."""
    cells = {cell.value: place for (sheet, place), cell in read(path).items() if (sheet, place[0]) == ("Inputs", "H")}

    def change(sheet: str, xml: str) -> str:
        xml = spoilt(sheet, xml)
        for name, value in values.items():
            at = name.partition("!")[2] if "!" in name else f"B{cells[name][1:]}"
            if sheet != (name.partition("!")[0] if "!" in name else "Inputs"):
                continue
            kind, inner = "", "" if value is None else f"<v>{value}</v>"
            if isinstance(value, str):
                kind, inner = ' t="inlineStr"', f"<is><t>{value}</t></is>"
            xml, count = re.subn(
                rf'<c r="{at}"( s="\d+")(?: t="\w+")?(?:/>|><v>[^<]*</v></c>)', rf'<c r="{at}"\1{kind}>{inner}</c>', xml
            )
            assert count == 1, name
        return xml

    return change


@pytest.fixture(scope="module")
def office() -> str:
    """LibreOffice's command. Without it the tests skip; in CI they fail."""
    found = shutil.which("soffice") or shutil.which("libreoffice")
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("LibreOffice (soffice) is not installed: Debian's package is libreoffice-calc-nogui")
    return str(found)


def converted(office: str, files: list[Path], out: Path, profile: Path, *, recalculate: bool) -> None:
    """The files as LibreOffice saves them, under the same names in `out`; a profile of its own, ended if it hangs."""
    settings = profile / "user" / "registrymodifications.xcu"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<oor:items xmlns:oor="http://openoffice.org/2001/registry">\n'
        '<item oor:path="/org.openoffice.Office.Calc/Formula/Load"><prop oor:name="OOXMLRecalcMode" oor:op="fuse">'
        f"<value>{0 if recalculate else 1}</value></prop></item>\n</oor:items>\n"  # 0: always, 1: never
    )
    command = [office, f"-env:UserInstallation={profile.as_uri()}", "--headless", "--convert-to", "xlsx", "--outdir"]
    process = subprocess.Popen(
        [*command, str(out), *map(str, files)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=TIMEOUT_S) == 0
    finally:
        with suppress(ProcessLookupError):  # its children, if it hung
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def folder(office: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """written/ as shipped, spoilt/ with no figure left, recalculated/ and opened/ (not recalculated) of the spoilt."""
    root = tmp_path_factory.mktemp("office")
    for name in ("written", "spoilt", "expected", "recalculated", "opened"):
        (root / name).mkdir()
    for name, case in CASES.items():
        case.write(root / "written" / f"{name}.xlsx")
        rewritten(root / "written" / f"{name}.xlsx", root / "spoilt" / f"{name}.xlsx", spoilt)
    for name, (base, values, after) in CHANGES.items():
        source = root / "written" / f"{base}.xlsx"
        rewritten(source, root / "spoilt" / f"with another {name}.xlsx", typed(source, values))
        after.write(root / "expected" / f"with another {name}.xlsx")
    files = sorted((root / "spoilt").iterdir())
    converted(office, files, root / "recalculated", root / "profile", recalculate=True)
    converted(office, files[-1:], root / "opened", root / "other profile", recalculate=False)
    yield root


def differing(shown: dict[tuple[str, str], Cell], found: dict[tuple[str, str], Cell]) -> dict[str, object]:
    """Formula cells whose figures are not the same to a billionth, or whose words are not the same."""
    wrong: dict[str, object] = {}
    for (sheet, place), cell in shown.items():
        if cell.formula is not None:
            value = found[sheet, place].value if (sheet, place) in found else None
            if value != (cell.value if not isinstance(cell.value, float) else pytest.approx(cell.value, rel=1e-9)):
                wrong[f"{sheet}!{place} ={cell.formula}"] = (cell.value, value)
    return wrong


def test_a_figure_that_is_not_recalculated_would_be_seen(folder: Path) -> None:
    (opened,) = (folder / "opened").iterdir()
    formulas = [cell for cell in read(opened).values() if cell.formula is not None]
    assert len(formulas) > 400 and {cell.value for cell in formulas} == {GARBAGE}


@pytest.mark.parametrize("name", CASES)
def test_recalculated_it_shows_the_same(name: str, folder: Path) -> None:
    shown, found = read(folder / "written" / f"{name}.xlsx"), read(folder / "recalculated" / f"{name}.xlsx")
    assert sum(cell.formula is not None for cell in shown.values()) > 50
    assert differing(shown, found) == {}
    faults = [place for place, cell in found.items() if str(cell.value).startswith(("#", "Err:"))]
    assert faults == []


@pytest.mark.parametrize("name", CHANGES)
def test_changed_inputs_give_what_the_library_says_of_them(name: str, folder: Path) -> None:
    base, file = CHANGES[name][0], f"with another {name}.xlsx"
    before, expected = read(folder / "written" / f"{base}.xlsx"), read(folder / "expected" / file)
    found = read(folder / "recalculated" / file)
    sheets = ("Answer", "Workings", "Levels")
    worked = {at: cell for at, cell in expected.items() if at[0] in sheets}
    assert differing(worked, found) == {}
    assert differing({at: cell for at, cell in before.items() if at[0] == "Answer"}, found) != {}


def test_the_price_cell_moves_prices_and_spend_alike(folder: Path) -> None:
    """1.25 USD an hour in place of 0.36: every price and the rented cards' spend 1.25 / 0.36 times what it was."""
    before, after = folder / "written" / "usual.xlsx", folder / "recalculated" / "with another price.xlsx"
    for key in ("slo_only", "slo_only_hi", "chat_input", "batch_blended", "usd_per_month", "effective_only"):
        old, new = lines(USUAL, before, key), lines(USUAL, after, key)
        assert new == pytest.approx([float(value or 0) * 1.25 / 0.36 for value in old]), key
    for key in ("slo_load", "cards", "saving", "api_month"):
        assert lines(USUAL, after, key) == pytest.approx(lines(USUAL, before, key)), key


def test_the_limit_cell_moves_the_safe_load(folder: Path) -> None:
    """p95 ≤ 1.3 s: BF16 at 8 users is 1.3 s and up to 1.43, so 1 user is safe; AWQ at 16 is 1.15 and up to 1.265 s."""
    after = folder / "recalculated" / "with another service level.xlsx"
    assert lines(USUAL, after, "slo_load") == [1, 16]
    knees = find_knees(USUAL.run.points, Slo(1.3))
    assert [knee.safe_conc for knee in knees] == [1, 16]
