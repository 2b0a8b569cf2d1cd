"""Runs for the workbook's tests, from the usual one to those that lack what a formula would like to have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import ZIP_DEFLATED, ZipFile

from harness.analysis.evidence import Evidence
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions
from harness.records import Outcomes, SweepPoint
from harness.report.run import Run
from harness.report.workbook import write_workbook
from harness.report.workbook.layout import lay_out
from harness.slo import Slo


@dataclass(frozen=True)
class Case:
    run: Run
    assumptions: Assumptions = Assumptions()
    evidence: Evidence | None = None

    def write(self, path: Path) -> Path:
        knees = find_knees(self.run.points, self.run.slo)
        return write_workbook(self.run, knees, self.assumptions, path, evidence=self.evidence)


def row(precision: str, conc: int, tok_s: float | None, p95_ms: float | None, **more: Any) -> SweepPoint:
    """A row with intervals, lopsided and not the same in the two precisions, and all that a price needs."""
    values: dict[str, Any] = {
        "usd_per_hour": 0.36, "utilisation": 0.5, "input_tokens_mean": 127.0, "output_tokens_mean": 32.0,
        "weights_gib": 7.6 if precision == "bf16" else 2.1, "kv_cache_gib": 5.4 if precision == "bf16" else 10.9,
        "kv_cache_tokens": 40_000 if precision == "bf16" else 81_900, "other_gib": 1.4, "memory_kind": "gpu",
        "gpu": "Some RTX 16 GB", "model": "demo", "engine": "vLLM", "engine_version": "0.11.0", "verdict": "valid",
        "started_at": "2026-11-20T18:00:00+00:00", "requests": 120,
    }  # fmt: skip
    if tok_s is not None:
        low, high = (0.95, 1.06) if precision == "bf16" else (0.92, 1.03)
        values |= {"tok_s_lo": tok_s * low, "tok_s_hi": tok_s * high, "req_s": tok_s / 31.0}
    if p95_ms is not None:
        values |= {"p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.1}
    return SweepPoint("demo", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **(values | more))


def run_of(points: Sequence[SweepPoint], slo: Slo | None = None) -> Run:
    """A run judged by p95 ≤ 3 s, or by another service level."""
    return Run("demo", list(points), slo or Slo(3.0), {"name": "chat", "description": "short turns"}, {}, {})


USUAL = (
    row("bf16", 1, 35, 900, power_w=180.0),
    row("bf16", 8, 240, 1300, power_w=230.0),
    row("bf16", 16, 400, 2200, power_w=250.0),
    row("bf16", 32, 520, 5200, power_w=255.0),
    row("awq", 1, 70, 480, power_w=120.0),
    row("awq", 8, 420, 760, power_w=160.0, verdict="suspect", verdict_reasons=("too_few_samples",)),
    row("awq", 16, 760, 1150, power_w=190.0),
    row("awq", 32, 1150, 2500, power_w=210.0),
    SweepPoint("demo", "awq", 64, model="demo", errors=64, verdict="invalid", verdict_reasons=("errors",)),
)
PLANNED = Assumptions(
    users=150, requests_per_day=1_500_000, chat_conc=12, batch_conc=32, headroom=0.15,
    api_usd_per_1m_input=0.15, api_usd_per_1m_output=0.6,
)  # fmt: skip
OWNED = Assumptions(
    card_usd=1000, host_usd=400, years=4, residual=0.1, idle_watts=20, host_watts=50, pue=1.3, usd_per_kwh=0.3,
    requests_per_day=250_000, peak_rps=9.0, users_per_tenant=5, context_tokens=1000,
)  # fmt: skip


def sessions(count: int) -> list[SweepPoint]:
    """Several server sessions of each level; the last of BF16 at 8 users failed, and is measured once more."""
    chance = random.Random(count)
    found = []
    for repeat in range(1, count + 1):
        for precision, gain in (("bf16", 1.0), ("awq", 1.7)):
            for conc, tok_s, p95 in ((1, 35.0, 900.0), (8, 240.0, 1300.0), (16, 400.0, 2100.0), (32, 520.0, 5200.0)):
                wobble = chance.uniform(0.93, 1.07)
                ends = {f"{name}_ms{end}": base * wobble / gain for end in ("", "_lo", "_hi")
                        for name, base in (("ttft_p95", p95 / 10), ("tpot_p95", p95 / 40))}  # fmt: skip
                found.append(
                    row(precision, conc, tok_s * gain * wobble, p95 / gain / wobble, repeat=repeat,
                        power_w=200 * wobble, kv_cache_tokens=40_000 + repeat, **ends)
                )  # fmt: skip
    failed = replace(found[1], verdict="invalid", verdict_reasons=("errors",))
    return [found[0], failed, *found[2:], replace(found[1], attempt=2, tok_s=251.0)]


def rates() -> list[SweepPoint]:
    """An open loop."""
    return [
        row(precision, 0, tok_s * gain, p95 / gain, rate_rps=rate, arrivals="poisson", req_s=rate * 0.98)
        for precision, gain in (("bf16", 1.0), ("awq", 1.6))
        for rate, tok_s, p95 in ((0.25, 8.0, 1100.0), (1.0, 31.0, 1500.0), (2.5, 75.0, 2800.0), (5.0, 110.0, 9000.0))
    ]


def varied(points: Sequence[SweepPoint], gain: float = 1.15) -> list[SweepPoint]:
    """The same rows in two settings of an engine argument, the second faster; BF16's largest load in the first alone,
    AWQ in a third one, in which there is no BF16."""
    faster = {
        name: lambda value, up=up: value * (gain if up else 1 / gain)
        for name, up in (("tok_s", True), ("tok_s_lo", True), ("tok_s_hi", True), ("p95_ms", False))
    }
    settings = (("16", {}), ("64", faster), ("128", faster))
    return [
        replace(
            point,
            precision=f"{point.precision}[max_num_seqs={value}]",
            engine_args=f"--max-num-seqs {value}",
            **{name: change(getattr(point, name)) for name, change in changes.items() if getattr(point, name)},
        )
        for value, changes in settings
        for point in points
        if not (point.precision == "bf16" and (value == "128" or (value == "64" and point.conc == 32)))
    ]


def bare() -> list[SweepPoint]:
    """One precision, rows without intervals, prices or tokens a request."""
    gone = ("usd_per_hour", "utilisation", "input_tokens_mean", "output_tokens_mean", "tok_s_lo", "tok_s_hi")
    nothing = dict.fromkeys((*gone, "p95_ms_lo", "p95_ms_hi", "weights_gib", "kv_cache_tokens", "memory_kind"))
    return [row("int4", conc, 30.0 * conc**0.8, 400.0 * conc**0.6, **nothing) for conc in (1, 4, 16, 64)]


def by_chance(seed: int) -> Case:
    """Anything that a table may hold, and any assumptions."""
    chance = random.Random(seed)
    points = []
    for precision in chance.sample(("bf16", "awq", "gptq", "w8a8"), chance.choice((1, 2, 2, 3))):
        gain, measured = chance.uniform(0.7, 2.5), chance.random() < 0.7
        for repeat in range(1, chance.choice((1, 1, 2, 4)) + 1):
            for conc in sorted(chance.sample((1, 2, 4, 8, 16, 32, 64), chance.choice((1, 3, 5)))):
                tok_s, p95 = 40 * gain * conc**0.8, 300 / gain * conc ** chance.uniform(0.5, 0.8)
                point = row(precision, conc, tok_s * chance.uniform(0.9, 1.1), p95 * chance.uniform(0.9, 1.1))
                point = replace(point, repeat=repeat, power_w=chance.uniform(90, 300) if measured else None)
                ttft, tpot = chance.uniform(20, 300), chance.uniform(5, 60)
                point = replace(point, ttft_p95_ms=ttft, ttft_p95_ms_hi=ttft * 1.2, tpot_p95_ms=tpot)
                share = chance.uniform(0.5, 1.0)
                point = replace(point, goodput=share, goodput_lo=share * 0.9, goodput_hi=min(1.0, share * 1.05))
                if chance.random() < 0.15:
                    point = replace(point, verdict=chance.choice(("invalid", "suspect")), verdict_reasons=("errors",))
                for name in ("tok_s", "tok_s_lo", "p95_ms", "p95_ms_hi", "req_s", "input_tokens_mean", "usd_per_hour",
                             "output_tokens_mean", "goodput_lo", "kv_cache_tokens", "kv_cache_gib"):  # fmt: skip
                    if chance.random() < 0.04:
                        point = replace(point, **{name: None})
                points.append(point)
    slo = chance.choice((Slo(2.0), Slo(4.0, 0.3), Slo(None, 0.25, 0.05), Slo(2.0, None, None, 0.8)))
    own = {
        "card_usd": chance.uniform(0, 3000), "host_usd": chance.choice((0.0, 500.0)), "years": chance.uniform(1, 6),
        "residual": chance.choice((0.0, 0.25)), "watts": chance.choice((None, 200.0)), "idle_watts": 15.0,
        "host_watts": chance.choice((0.0, 40.0)), "pue": 1.2, "usd_per_kwh": chance.choice((0.0, 0.4)),
    }  # fmt: skip
    rent = {"usd_per_hour": chance.choice((None, 0.2, 0.0))}
    traffic = {
        "users": chance.choice((None, 5, 400)), "requests_per_day": chance.choice((None, 40_000.0, 3e6)),
        "peak_rps": chance.choice((None, 50.0)), "utilisation": chance.choice((None, 0.35)),
        "chat_conc": chance.choice((1, 6, 16)), "batch_conc": chance.choice((24, 32, 200)),
        "headroom": chance.choice((0.0, 0.2, 0.9)), "failover": chance.choice((0, 2)),
    }  # fmt: skip
    api = {"api_usd_per_1m_input": chance.uniform(0, 0.2), "api_usd_per_1m_output": chance.uniform(0, 1.0)}
    given = chance.choice((own, rent)) | traffic | chance.choice((api, {}))
    return Case(run_of(points, slo), Assumptions(**given))


def judged(base_right: int, right: int, items: int = 60) -> Evidence:
    """AWQ beside BF16 on some prompts, flips in one direction alone."""
    flips = (max(base_right - right, 0), max(right - base_right, 0))
    return Evidence("bf16", ("awq",), [Outcomes("awq", "all", items, base_right, right, *flips, answered=items)])


CASES: dict[str, Case] = {
    "judged": Case(run_of(USUAL), PLANNED, judged(57, 48)),
    "judged, nothing right": Case(run_of(USUAL), OWNED, judged(57, 0)),
    "judged, all right": Case(run_of(rates()), PLANNED, judged(60, 60)),
    "judged, one never inside": Case(run_of(USUAL, Slo(0.6)), PLANNED, judged(57, 48)),
    "usual": Case(run_of(USUAL), PLANNED),
    "as measured": Case(run_of(USUAL)),
    "owned": Case(run_of(USUAL), OWNED),
    "power of one alone": Case(
        run_of([replace(point, power_w=None) if point.precision == "awq" else point for point in USUAL]), OWNED
    ),
    "three sessions": Case(run_of(sessions(3), Slo(3.0, 0.25, 0.06)), PLANNED),
    "two sessions": Case(run_of(sessions(2)), OWNED),
    "eleven sessions": Case(run_of(sessions(11)), PLANNED),
    "a hair more than a card": Case(run_of(USUAL), Assumptions(users=12, headroom=1 - 12 / 16 / (1 + 1e-10))),
    "goodput": Case(
        run_of(
            [replace(point, goodput=1 - 0.002 * point.conc, goodput_lo=1 - 0.004 * point.conc) for point in USUAL],
            Slo(3.0, None, None, 0.95),
        ),
        PLANNED,
    ),
    "varied": Case(run_of(varied(USUAL)), PLANNED),
    "varied, three sessions": Case(run_of(varied(sessions(3)), Slo(3.0, 0.25, 0.06)), OWNED),
    "varied, one precision": Case(run_of([point for point in varied(USUAL) if "awq" in point.precision]), PLANNED),
    "open loop": Case(run_of(rates()), PLANNED),
    "one trace": Case(run_of([replace(point, arrivals="trace") for point in rates() if point.rate_rps == 1.0])),
    "bare": Case(run_of(bare()), PLANNED),
    "nothing safe": Case(run_of(USUAL, Slo(0.4)), PLANNED),
    "one never inside": Case(run_of(USUAL, Slo(0.6)), PLANNED),
    "all failed": Case(run_of([replace(point, verdict="invalid") for point in USUAL]), PLANNED),
    "one failed": Case(run_of([replace(p, verdict="invalid") if p.precision == "bf16" else p for p in USUAL]), PLANNED),
    **{f"chance {seed}": by_chance(seed) for seed in range(8)},
}


# --- reading workbooks back -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What a viewer shows that recalculates nothing, and the formula behind it, if there is one."""

    value: float | str | None
    formula: str | None = None


def read(path: Path) -> dict[tuple[str, str], Cell]:
    """(sheet, cell) -> what stands there, of the cells that hold anything."""
    with ZipFile(path) as parts:
        strings = [
            "".join(text.text or "" for text in item.iter(f"{_MAIN}t"))
            for item in ElementTree.fromstring(parts.read("xl/sharedStrings.xml"))
        ]
        found = {}
        for sheet, part in sheet_parts(parts).items():
            for cell in ElementTree.fromstring(parts.read(part)).iter(f"{_MAIN}c"):
                formula, value = cell.findtext(f"{_MAIN}f"), cell.findtext(f"{_MAIN}v")
                if formula is not None or value:
                    found[sheet, cell.get("r", "")] = Cell(_value(cell.get("t"), value, strings), formula)
    return found


_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def sheet_parts(parts: ZipFile) -> dict[str, str]:
    """Sheet -> its part of the file: numbered in the order of the workbook, by XlsxWriter and LibreOffice alike."""
    sheets = ElementTree.fromstring(parts.read("xl/workbook.xml")).iter(f"{_MAIN}sheet")
    return {sheet.get("name", ""): f"xl/worksheets/sheet{at}.xml" for at, sheet in enumerate(sheets, start=1)}


def _value(kind: str | None, text: str | None, strings: Sequence[str]) -> float | str | None:
    if not text:
        return None
    if kind == "s":
        return strings[int(text)]
    return text if kind in ("str", "e") else float(text)


def rewritten(source: Path, to: Path, change: Callable[[str, str], str]) -> Path:
    """A copy of a workbook whose sheets (name, XML) are changed."""
    with ZipFile(source) as parts, ZipFile(to, "w", ZIP_DEFLATED) as copy:
        names = {part: sheet for sheet, part in sheet_parts(parts).items()}
        for part in parts.namelist():
            data = parts.read(part)
            copy.writestr(part, change(names[part], data.decode()) if part in names else data)
    return to


def lines(case: Case, path: Path, key: str) -> list[float | str | None]:
    """A line of Workings, in the order of the precisions."""
    layout, cells = lay_out(case.run, True, case.evidence is not None), read(path)
    places = [f"{'CDEFGH'[at]}{layout.lines[key] + 1}" for at in range(len(layout.precisions))]
    return [cells["Workings", place].value if ("Workings", place) in cells else None for place in places]
