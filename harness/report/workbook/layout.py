"""Which figure stands in which cell of cost.xlsx, worked out before any is written, since formulas point onward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xlsxwriter.utility import xl_col_to_name

from harness.analysis.levels import RATE, USERS, axis, compared, latest, levels, load, precision_order
from harness.records import SweepPoint, header
from harness.report.run import Run
from harness.report.workbook.answers import COUNTS, answers_sections
from harness.report.workbook.fleet import sections
from harness.report.workbook.lines import Line, Section, level_lines
from harness.report.workbook.merged import MERGED

HEADER = 3
"""Row of the header in every table, counted from 0; above it stand the sheet's title and what it is."""
FIRST = HEADER + 1
NAMED = ("precision", "rows", "verdict", "load")
"""Columns of Levels in front of those merged."""
ROWS_OWN = ("row_usd", "row_share")
"""Columns of Levels that are its first row's."""
_FRONT = (
    "precision", "conc", "rate_rps", "repeat", "attempt", "verdict", "verdict_reasons", "requests", "errors", "tok_s",
    "tok_s_lo", "tok_s_hi", "p95_ms", "p95_ms_lo", "p95_ms_hi", "req_s", "usd_per_hour", "utilisation",
)  # fmt: skip
POINT_COLUMNS = ("counted", *_FRONT, *(name for name in header(SweepPoint) if name not in _FRONT))
"""Columns of Points: whether the row counts, then all of points.csv, those first that people came for."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The cells of one workbook. Rows and columns are counted from 0, as XlsxWriter does."""

    precisions: tuple[str, ...]
    against: Mapping[str, str]
    """Each precision that is compared, and its baseline."""
    closed: bool
    """The load is users; else requests a second."""
    points: tuple[SweepPoint, ...]
    """Rows of Points, in their order."""
    levels: tuple[SweepPoint, ...]
    """Rows of Levels."""
    behind: tuple[tuple[int, ...], ...]
    """Of each level: the positions in `points` of the rows that it is merged from."""
    level_lines: tuple[Line, ...]
    level_columns: tuple[str, ...]
    repeats: tuple[int, ...]
    """Numbers of the server sessions, where there are several."""
    sections: tuple[Section, ...]
    lines: dict[str, int]
    """Row of each line of Workings."""
    judged: bool = False
    """There is a sheet Quality, whose columns are those of Workings."""

    @property
    def unit(self) -> str:
        return (USERS if self.closed else RATE).unit

    def standing(self, precision: str) -> str:
        """Of a precision that is not compared: why not."""
        return "the baseline" if precision in {self.precisions[0], *self.against.values()} else "no baseline"

    def block(self, precision: str) -> tuple[int, int] | None:
        """First and last row of a precision on Levels; None where it has none."""
        rows = [FIRST + at for at, level in enumerate(self.levels) if level.precision == precision]
        return (rows[0], rows[-1]) if rows else None

    def point_cell(self, at: int, column: str) -> str:
        """A figure of the row at a position in `points`."""
        return f"Points!{xl_col_to_name(POINT_COLUMNS.index(column), True)}${FIRST + at + 1}"

    def level_cells(self, row: int) -> dict[str, str]:
        """What the braces of a level's formulas mean in one row of Levels."""
        level = self.levels[row - FIRST]
        first, _ = self.block(level.precision) or (row, row)
        cells = {key: f"{xl_col_to_name(at)}{row + 1}" for at, key in enumerate(self.level_columns)}
        inside = xl_col_to_name(self.level_columns.index("inside"))
        return cells | {"upto_inside": f"{inside}${first + 1}:{inside}{row + 1}"}

    def workings_cells(self, precision: str) -> dict[str, str]:
        """What the braces of the lines of Workings mean in a precision's column."""
        baseline = self.against.get(precision, self.precisions[0])
        here, base = (xl_col_to_name(2 + self.precisions.index(name), True) for name in (precision, baseline))
        cells = {key: f"{here[1:]}{row + 1}" for key, row in self.lines.items()}
        cells |= {f"base_{key}": f"{base}{row + 1}" for key, row in self.lines.items()}
        for prefix, name in (("all_", precision), ("base_all_", baseline)):
            cells |= {f"{prefix}{key}": self.level_range(name, key) for key in self.level_columns}
        if self.judged:
            cells |= {key: f"Quality!{here}${FIRST + at + 1}" for at, key in enumerate(COUNTS)}
        rows = [FIRST + at for at, point in enumerate(self.points) if point.precision == precision]
        for at, key in enumerate(POINT_COLUMNS):
            column = xl_col_to_name(at, True)
            cells[f"raw_{key}"] = f"Points!{column}${rows[0] + 1}:{column}${rows[-1] + 1}"
        return cells

    def level_range(self, precision: str, key: str) -> str:
        """A column of Levels, the rows of a precision; an empty cell above the table where it has none."""
        first, last = self.block(precision) or (HEADER - 1, HEADER - 1)
        column = xl_col_to_name(self.level_columns.index(key), True)
        return f"Levels!{column}${first + 1}:{column}${last + 1}"


def lay_out(run: Run, with_workings: bool, judged: bool = False) -> Layout:
    """Where everything stands. Without knees (one trace at one speed) there is nothing to work out beyond Levels.

    `judged`: answers were, and there is a price of a correct one.
    """
    order = precision_order(run.points)
    closed = axis(run.points) is USERS
    points = sorted(
        run.points, key=lambda point: (order.index(point.precision), load(point), point.repeat, point.attempt)
    )
    counting = {id(point) for point in latest(run.points) if point.verdict != "invalid"}
    behind: dict[tuple[str, float], list[int]] = {}
    for at, point in enumerate(points):
        if id(point) in counting:
            behind.setdefault((point.precision, load(point)), []).append(at)
    merged = levels(run.points)
    sessions = sorted({points[at].repeat for rows in behind.values() for at in rows})
    repeats = tuple(sessions) if len(sessions) > 1 else ()
    lines = tuple(level_lines(closed))
    columns = (
        *NAMED,
        *(merged.key for merged in MERGED),
        *ROWS_OWN,
        *(line.key for line in lines),
        *(f"repeat_{repeat}" for repeat in repeats),
    )
    found = sections(closed, repeats, axis(run.points).unit) if with_workings else []
    found += answers_sections() if judged else []
    rows, row = {}, FIRST
    for section in found:
        row += 1  # its title
        for line in section.lines:
            rows[line.key] = row
            row += 1
        row += 1  # and nothing
    return Layout(
        precisions=tuple(order),
        against=compared(run.points),
        closed=closed,
        points=tuple(points),
        levels=tuple(merged),
        behind=tuple(tuple(behind[level.precision, load(level)]) for level in merged),
        level_lines=lines,
        level_columns=columns,
        repeats=repeats,
        sections=tuple(found),
        lines=rows,
        judged=judged,
    )
