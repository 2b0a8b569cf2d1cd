"""What hours of sweeping did to memory, descriptors and the clock: numbers, figures and docs/soak.md.

    python benchmarks/soak_report.py DIR [DIR ...]          DIR: what benchmarks/soak.py wrote, also while it still runs

A cell is one value. Memory rises within a cell and falls at its end, so its value is the smallest of the cell's samples
(of all processes of a role together); of descriptors it is the median. The clock's error is the client's own, request
by request (harness/load/selftest.own_errors_ms), one request in 16. Cells of other loads lie at other heights, so each
load has a level of its own and all have one slope:

    value of cell k = level(load of k) + slope * hours since the start + e(k)

Cells that began in the first ten minutes are warm-up: shown, and in no slope. The interval is 95 % and takes e for
autocorrelated, AR(1): see `slope`. The same files make the same pages, byte for byte. What DIR/conditions.txt says,
where there is one, is put into the page: what else the machine did.
"""

from __future__ import annotations

import argparse
import csv
import json
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from harness.records import Cell, RequestRecord, SweepPoint, header, long_cells, read_table
from harness.report.plots import FAINT, GRID, INK, STYLES, headed, save

DOCS = Path(__file__).resolve().parents[1] / "docs"
WARMUP_S = 600.0
ONE_IN = 16
ROLES = ("sweep", "generator", "truth", "engine")
MEMORY = {"rss_bytes": "resident", "uss_bytes": "own"}
MB = 1e6
LEAST_CELLS = 8
"""Fewer say nothing of a slope."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slope:
    """Change an hour, with a 95 % interval; `cells` is how many there are of it, `rho` how alike neighbours are."""

    value: float
    lo: float
    hi: float
    rho: float
    cells: int


def slope(hours: Sequence[float], values: Sequence[float], loads: Sequence[str]) -> Slope | None:
    """The common slope of values over hours, each load with its own level; None for too few.

    Least squares. With residuals e = M y, T values and p coefficients, and R(i, j) = rho^|i-j|:

        rho     = (T r + p + 1) / (T - 3) within 0 ... 0.97, r = sum e(k) e(k-1) / sum e(k)^2. Residuals look less
                  alike than the errors are: around a mean r is short by (1 + 3 rho) / T (Kendall 1954; Marriott and
                  Pope 1954), which gives (T r + 1) / (T - 3); p + 1 for levels and a slope is by simulation
        s^2     = e'e / trace(M R)                                            as E[e'e] = sigma^2 trace(M R)
        var     = s^2 x'R x / (x'x)^2,  x: hours without their levels by load
        freedom = T (1 - rho) / (1 + rho) - p, at least 3: so many independent values the series is worth

    Newey-West and equal-weighted cosines (Lazarus et al. 2018) were tried on 1,500 series each with a known slope: of
    90 cells with AR(1) noise of rho 0.8 they held it in 66 to 87 %, this in 94 % (tests/test_soak_report.py repeats
    ours). What no interval from one run can see is growth in rare steps: with a unit root, two hours look like a trend
    or like none by chance.
    """
    count, kinds = len(values), sorted(set(loads))
    freedom = len(kinds) + 1
    if count < max(LEAST_CELLS, freedom + 4):
        return None
    design = np.array(
        [[float(load == kind) for kind in kinds] + [hour] for load, hour in zip(loads, hours, strict=True)]
    )
    if np.linalg.matrix_rank(design) < freedom:
        return None
    y = np.asarray(values, dtype=float)
    solve = np.linalg.solve(design.T @ design, design.T)
    residuals = y - design @ (solve @ y)
    value, squares = float((solve @ y)[-1]), float(residuals @ residuals)
    if squares <= 1e-18 * float(y @ y):
        return Slope(value, value, value, 0.0, count)
    alike = float(residuals[1:] @ residuals[:-1]) / squares
    rho = min(0.97, max(0.0, (count * alike + freedom + 1) / (count - 3)))
    places = np.arange(count)
    correlation = rho ** np.abs(np.subtract.outer(places, places))
    annihilator = np.eye(count) - design @ solve
    variance = squares / float(np.trace(annihilator @ correlation))
    weights = solve[-1]
    error = float(np.sqrt(variance * (weights @ correlation @ weights)))
    reach = error * float(stats.t.ppf(0.975, max(3.0, count * (1 - rho) / (1 + rho) - freedom)))
    return Slope(value, value - reach, value + reach, rho, count)


# --- what a soak left -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CellTimes:
    """One finished cell: when, in hours since the start, and under which load."""

    point: SweepPoint
    key: str
    """As requests.csv and the server's log name it, with its attempt."""
    begin_h: float
    end_h: float

    @property
    def load(self) -> str:
        return f"{self.point.precision} {self.point.conc}"

    @property
    def warm(self) -> bool:
        return self.begin_h * 3600 >= WARMUP_S


@dataclass(frozen=True, slots=True)
class Series:
    """A figure by cell. `samples` is what was looked at in between, for the figure."""

    cells: tuple[CellTimes, ...]
    values: tuple[float, ...]
    samples: tuple[Floats, Floats] | None = None

    @property
    def slope(self) -> Slope | None:
        kept = [(cell, value) for cell, value in zip(self.cells, self.values, strict=True) if cell.warm]
        middle = [(cell.begin_h + cell.end_h) / 2 for cell, _ in kept]
        return slope(middle, [value for _, value in kept], [cell.load for cell, _ in kept])

    @property
    def quarters(self) -> tuple[float, float] | None:
        """Medians of the first and of the last quarter of the cells that count; None for fewer than four."""
        kept = [value for cell, value in zip(self.cells, self.values, strict=True) if cell.warm]
        quarter = len(kept) // 4
        return (median(kept[:quarter]), median(kept[-quarter:])) if quarter else None


@dataclass(frozen=True, slots=True)
class Soak:
    """One run, read. Series by (role, column), and by the name of a figure."""

    name: str
    hours: float
    cells: tuple[CellTimes, ...]
    processes: Mapping[tuple[str, str], Series]
    clock: Mapping[str, Series]
    tok_s: Series
    requests_checked: int
    exit_code: int | None
    conditions: str = ""


def read_soak(directory: Path) -> Soak:
    """Read what benchmarks/soak.py has written so far. A last line without its end is left out."""
    run = directory / "run"
    samples = list(_samples(directory / "processes.csv"))
    began = datetime.fromisoformat((directory / "began.txt").read_text(encoding="utf-8").strip())
    cells = tuple(_cells(run / "points.csv", began))
    clock, checked = _clock(directory, cells)
    end, conditions = directory / "end.json", directory / "conditions.txt"
    return Soak(
        name=directory.resolve().name,
        hours=samples[-1][0] if samples else 0.0,
        cells=cells,
        processes={
            (role, column): _of_cells(samples, role, column, cells)
            for role in ROLES
            for column in (*MEMORY, "descriptors")
            if any(seen == role for _, seen, _ in samples)
        },
        clock=clock,
        tok_s=_series(cells, lambda cell: cell.point.tok_s),
        requests_checked=checked,
        exit_code=json.loads(end.read_text(encoding="utf-8"))["sweep_exit_code"] if end.exists() else None,
        conditions=conditions.read_text(encoding="utf-8").strip() if conditions.exists() else "",
    )


_Sample = tuple[float, str, Mapping[str, float]]
"""Hours since the start, role, and the columns, summed over the processes of the role at that moment."""


def _samples(path: Path) -> Iterator[_Sample]:
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    first, sweep = "", set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            # A role is read off a command line, and that of the sweep may hold any word (--out .../vllm). But besides
            # the scripted server only the sweep is there at the first look.
            first = first or row["at_s"]
            if row["at_s"] == first and row["role"] != "truth":
                sweep.add(row["pid"])
            role = "sweep" if row["pid"] in sweep else row["role"]
            for column in (*MEMORY, "descriptors"):
                found[row["at_s"], role][column] += int(row[column])
    for (at_s, role), columns in found.items():
        yield float(at_s) / 3600, role, columns


def _cells(path: Path, began: datetime) -> Iterator[CellTimes]:
    """Finished cells in their order, by the watch's time, to the second."""
    for point in read_table(path, SweepPoint) if path.exists() else ():
        if point.started_at is not None and point.duration_s is not None:
            begin_h = (datetime.fromisoformat(point.started_at) - began).total_seconds() / 3600
            key = f"{Cell(point.precision, point.conc, point.repeat, point.rate_rps).key}-a{point.attempt}"
            yield CellTimes(point, key, begin_h, begin_h + point.duration_s / 3600)


def _series(cells: Sequence[CellTimes], value: Callable[[CellTimes], float | None]) -> Series:
    found = [(cell, figure) for cell in cells if (figure := value(cell)) is not None]
    return Series(tuple(cell for cell, _ in found), tuple(figure for _, figure in found))


def _of_cells(samples: Sequence[_Sample], role: str, column: str, cells: Sequence[CellTimes]) -> Series:
    own = [(at_h, columns[column]) for at_h, seen, columns in samples if seen == role]
    hours, values = np.array([at_h for at_h, _ in own]), np.array([float(value) for _, value in own])
    unit, of_cell = (1.0, np.median) if column == "descriptors" else (MB, np.min)

    def value(cell: CellTimes) -> float | None:
        inside = values[(hours >= cell.begin_h) & (hours < cell.end_h)]
        return float(of_cell(inside)) / unit if inside.size else None

    series = _series(cells, value)
    return Series(series.cells, series.values, (hours, values / unit))


# --- the clock's error ------------------------------------------------------------------------------------------------

CLOCK = {
    "ttft_p50": ("TTFT error, p50", 0, 50),
    "ttft_p99": ("TTFT error, p99", 0, 99),
    "chunk_p50": ("chunk error, p50", 1, 50),
    "chunk_p99": ("chunk error, p99", 1, 99),
}
"""Name -> words, which of the two errors, percentile."""


def _clock(directory: Path, cells: Sequence[CellTimes]) -> tuple[dict[str, Series], int]:
    """The client's own error by cell, ms, and of how many requests. Nothing without the server's log."""
    log = directory / "truth.jsonl"
    if not log.exists():
        return {}, 0
    told = dict(told_by_server(log))
    errors: dict[str, tuple[array[float], array[float]]] = defaultdict(lambda: (array("d"), array("d")))
    checked = 0
    for request, record in timed_by_client(directory / "run" / "requests.csv"):
        if request in told:
            ttft_ms, chunks_ms = errors[request.partition("/")[0]]
            one, others = own_errors_ms(record, *told[request])
            ttft_ms.append(one)
            chunks_ms.extend(others)
            checked += 1

    def of(which: int, share: float) -> Callable[[CellTimes], float | None]:
        return lambda cell: float(np.percentile(errors[cell.key][which], share)) if cell.key in errors else None

    return {name: _series(cells, of(which, share)) for name, (_, which, share) in CLOCK.items()}, checked


def told_by_server(log: Path) -> Iterator[tuple[str, tuple[int, array[int]]]]:
    """(request id, (receipt, times of sending)) of one request in 16, line by line: the log has many GB."""
    begin = b'{"id":"'
    with log.open("rb") as file:
        for line in file:
            if line.startswith(begin) and line.endswith(b"\n"):
                request = line[len(begin) : line.index(b'"', len(begin))]
                if chosen(request):
                    entry = json.loads(line)
                    if entry["sent_ns"]:
                        yield request.decode(), (entry["received_ns"], array("q", entry["sent_ns"]))


def timed_by_client(table: Path) -> Iterator[tuple[str, tuple[int, int, list[int]]]]:
    """(request id, (intended, first token, times of chunks)) of the same requests, those that were answered."""
    names = header(RequestRecord)
    cell, user, sequence, intended, attempt, first, chunks, error = (
        names.index(name)
        for name in ("cell", "user", "sequence", "intended_ns", "attempt", "first_token_ns", "chunk_us", "error")
    )
    with long_cells(), table.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(line for line in file if line.endswith("\n"))
        given = next(rows, [])
        if given != list(names[: len(given)]):
            raise SystemExit(f"{table.name} was written by another version of kneebench")
        for row in rows:
            request = f"{row[cell]}-a{row[attempt]}/{row[user]}/{row[sequence]}"
            if row[first] and not row[error] and chosen(request.encode()):
                intended_ns = int(row[intended])
                times = [intended_ns + int(offset) * 1000 for offset in row[chunks].split(";")]
                yield request, (intended_ns, int(row[first]), times)


def chosen(request: bytes) -> bool:
    """One request in 16, the same in both files, whatever its place in them."""
    return zlib.crc32(request) % ONE_IN == 0


def own_errors_ms(
    record: tuple[int, int, Sequence[int]], received_ns: int, sent_ns: Sequence[int]
) -> tuple[float, list[float]]:
    """(error of TTFT, error of each chunk's time), ms: as in harness/load/selftest.own_errors_ms.

    The server's stamp is taken after its send has returned, the kernel's within it: an error below zero is the
    server's own, and is counted as none.
    """
    intended_ns, first_ns, chunks_ns = record
    ttft_ms = (first_ns - intended_ns - (sent_ns[0] - received_ns)) / 1e6
    chunks_ms = [max(0.0, (at_ns - sent) / 1e6) for at_ns, sent in zip(chunks_ns, sent_ns, strict=False)]
    return max(0.0, ttft_ms), chunks_ms


# --- words ------------------------------------------------------------------------------------------------------------

HEAD = """# Hours of sweeping

Does memory stay flat, do descriptors leak, does the clock's error drift? `benchmarks/soak.py` swept without a pause and
looked at each process every five seconds from outside; this page is what `benchmarks/soak_report.py` made of it.

A cell is one value: of memory the smallest sample of the cell, all processes of a role together (it rises within a cell
and falls at its end), of descriptors the median. The clock's error is the client's own, against the scripted server's
log, one request in 16 ([clock.md](clock.md) says what it is). Slopes are by least squares with a level for each load,
without the cells that began in the first ten minutes. Intervals are 95 % and take neighbouring cells for alike (AR(1));
on made-up series with a known slope (45 to 90 cells, rho up to 0.8) they held it in 92 to 97 % of the cases. Growth in
rare steps they cannot tell from chance: for that, see the quarters and the figures. MB is 10^6 bytes."""


def page(soaks: Sequence[Soak]) -> str:
    """docs/soak.md."""
    return "\n\n".join([HEAD, *(_section(soak) for soak in soaks)]) + "\n"


def _section(soak: Soak) -> str:
    warm = [cell for cell in soak.cells if cell.warm]
    verdicts = Counter(cell.point.verdict for cell in soak.cells)
    reasons = Counter(reason for cell in soak.cells for reason in cell.point.verdict_reasons)
    loads = ", ".join(dict.fromkeys(cell.load for cell in soak.cells))
    ended = {None: "it still ran when this was written", 130: "ended by SIGINT, exit code 130 as meant"}.get(
        soak.exit_code, f"ended with exit code {soak.exit_code}"
    )
    requests = sum(cell.point.requests for cell in soak.cells)
    parts = [
        f"## {_TITLES.get(soak.name, soak.name)}",
        f"{soak.hours:.2f} hours, {len(soak.cells)} cells ({len(warm)} of them after the warm-up) under the loads "
        f"{loads or 'none'}; {requests:,} requests inside their windows, "
        f"{sum(cell.point.errors for cell in soak.cells):,} errors; {ended}. "
        f"Verdicts: {_counted(verdicts)}; reasons: {_counted(reasons)}.",
        *([soak.conditions] if soak.conditions else []),
        "\n".join(_table(soak)),
    ]
    if soak.requests_checked:
        parts.append(f"The clock's error is of {soak.requests_checked:,} requests.")
    parts += [f"![{what} of {soak.name}](figures/soak-{soak.name}-{what}.png)" for what in figures(soak)]
    return "\n\n".join(parts)


_TITLES = {"truth": "Against the scripted server", "vllm": "On vLLM"}


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _table(soak: Soak) -> Iterator[str]:
    yield "| what | first quarter | last quarter | change an hour | 95 % interval | cells | rho |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (role, column), series in soak.processes.items():
        if column == "descriptors":
            yield _line(f"{role}: descriptors", series, "")
        else:
            yield _line(f"{role}: {MEMORY[column]} memory", series, ", MB")
    for name, series in soak.clock.items():
        yield _line(CLOCK[name][0], series, ", ms")
    yield _line("tok/s", soak.tok_s, "")


def _line(what: str, series: Series, unit: str) -> str:
    levels = "| |" if series.quarters is None else "| {:,.2f} | {:,.2f} |".format(*series.quarters)
    found = series.slope
    if found is None:
        return f"| {what}{unit} {levels} | | {sum(cell.warm for cell in series.cells)} | |"
    value, lo, hi = (f"{round(end, 2) + 0.0:+,.2f}" for end in (found.value, found.lo, found.hi))  # no -0.00
    return f"| {what}{unit} {levels} {value} | {lo} to {hi} | {found.cells} | {found.rho:.2f} |"


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(soak: Soak) -> dict[str, Callable[[], Figure]]:
    """What there is to draw, by name."""
    found: dict[str, Callable[[], Figure]] = {}
    if soak.processes:
        found["memory"] = lambda: memory(soak)
        found["descriptors"] = lambda: descriptors(soak)
    if any(series.values for series in soak.clock.values()):
        found["clock"] = lambda: clock(soak)
    return found


def memory(soak: Soak) -> Figure:
    """A row for each role: resident memory, and beside it what is its own; from zero, so that flat looks flat."""
    roles = [role for role in ROLES if (role, "rss_bytes") in soak.processes]
    figure = Figure(figsize=(9, 0.9 + 1.7 * len(roles)), layout="constrained")
    grid = figure.subplots(len(roles), 2, sharex=True, squeeze=False)
    for role, row in zip(roles, grid, strict=True):
        for (column, words), axes in zip(MEMORY.items(), row, strict=True):
            _draw(axes, soak.processes[role, column], STYLES[ROLES.index(role)])
            headed(axes, role, f"{words} memory, MB; dots: the least of each cell")
    _hours(grid[-1], soak)
    return figure


def descriptors(soak: Soak) -> Figure:
    """Open descriptors of each role, one below the other."""
    roles = [role for role in ROLES if (role, "descriptors") in soak.processes]
    figure = Figure(figsize=(7, 0.9 + 1.5 * len(roles)), layout="constrained")
    grid = figure.subplots(len(roles), 1, sharex=True, squeeze=False)
    for role, (axes,) in zip(roles, grid, strict=True):
        _draw(axes, soak.processes[role, "descriptors"], STYLES[ROLES.index(role)])
        headed(axes, role, "open descriptors; dots: the median of each cell")
    _hours(grid[-1], soak)
    return figure


def clock(soak: Soak) -> Figure:
    """The client's own error by cell: p50 and p99 of TTFT and of chunks."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, squeeze=False)
    for place, (name, series) in enumerate(soak.clock.items()):
        axes = grid[place // 2][place % 2]
        _draw(axes, series, STYLES[place // 2])
        headed(axes, CLOCK[name][0], "ms, a dot a cell")
    _hours(grid[-1], soak)
    return figure


def _draw(axes: Axes, series: Series, style: tuple[str, str]) -> None:
    """Samples faint, cells as markers (hollow in the warm-up), the slope through the cells' own middle; from zero."""
    colour, marker = style
    if series.samples is not None:
        axes.plot(*series.samples, color=FAINT, linewidth=0.6, alpha=0.7)
    for warm, face in ((True, colour), (False, "white")):
        own = [
            (cell.begin_h, value) for cell, value in zip(series.cells, series.values, strict=True) if cell.warm == warm
        ]
        if own:
            x, y = zip(*own, strict=True)
            axes.plot(x, y, linestyle="none", marker=marker, markersize=3.5, color=colour, markerfacecolor=face)
    if found := series.slope:
        kept = [(cell.begin_h, value) for cell, value in zip(series.cells, series.values, strict=True) if cell.warm]
        ends = np.array([kept[0][0], kept[-1][0]])
        middle, level = float(np.mean([at for at, _ in kept])), float(np.mean([value for _, value in kept]))
        axes.plot(ends, level + found.value * (ends - middle), color=INK, linewidth=1.2, linestyle="--")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _hours(row: Iterable[Axes], soak: Soak) -> None:
    for axes in row:
        axes.set_xlabel("hours")
        axes.set_xlim(0, max(soak.hours, 0.1))


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where soak.md and figures/soak-*.png go")
    args = parser.parse_args(argv)
    soaks = [read_soak(directory) for directory in args.directories]
    for soak in soaks:
        named = {f"soak-{soak.name}-{what}": draw for what, draw in figures(soak).items()}
        for path in save(named, args.docs / "figures"):
            if path.suffix == ".svg":
                path.unlink()  # hours of samples as lines: megabytes
    text = page(soaks)
    (args.docs / "soak.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
