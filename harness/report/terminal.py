"""What the commands print: tables and sentences of a run, for a terminal. Every number comes from harness.analysis."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from harness.analysis.capacity import plan_cards
from harness.analysis.compare import compare, with_ends
from harness.analysis.cost import stated_lines
from harness.analysis.evidence import Evidence
from harness.analysis.gate import TASK
from harness.analysis.headline import alone, at_one_load, headlines, label
from harness.analysis.knee import find_knees
from harness.analysis.levels import axis, load, shown
from harness.analysis.spend import spends
from harness.analysis.words import Words, words_of
from harness.assumptions import Assumptions
from harness.errors import InputError
from harness.prices import Prices
from harness.records import CostLine, Knee, SweepPoint
from harness.report.planning import plan_table, spend_table
from harness.report.predicted import measure_command, told
from harness.report.run import Run
from harness.report.tables import interval, number, throughput_lines
from harness.suggest import did_you_mean
from harness.variants import SHORT, flags_varied, precision_of, setting_of
from harness.width import NO_EDGE, column_widths, shortened


def show_run(console: Console, run: Run) -> None:
    """The closing table, the knees in words, and how many times the baseline's tokens each precision delivers."""
    knees, words = find_knees(run.points, run.slo), run.words
    console.print()
    narrow = console.width < _ROOM_FOR_REASONS
    console.print(_predicted(run) if run.predicted else _measured(run, narrow))
    for line in _reasons(run) if narrow and not run.predicted else ():
        console.print(line, markup=False, highlight=False)
    if legend := _legend(run):
        console.print(legend, markup=False, highlight=False, style="dim")
    console.print()
    for knee in knees:
        told_alone = words.said(f"{label(knee.precision)} {alone(knee, run.points)}")
        console.print(told_alone, markup=False, highlight=False)
    for line in throughput_lines(compare(run.points, run.requests)):
        console.print(words.said(line), markup=False, highlight=False)
    if len(knees) > 1:
        said = headlines(run.points, knees, run.machine)
    else:  # one precision has been told above; one trace has no knee
        said = [] if knees else at_one_load(run.points, run.slo, run.machine)
    for sentence in said:
        console.print(f"\n{words.said(sentence)}", markup=False, highlight=False, style="bold")
    if run.predicted:
        for line in told(run):
            console.print(f"\n{line}", markup=False, highlight=False)
        console.print(f"\n{measure_command(run)}", markup=False, highlight=False, soft_wrap=True)  # to be copied


_ROOM_FOR_REASONS = 110
"""Columns of a terminal from which on the table of rows has the reasons of their verdicts beside them."""
_LONGEST_NAME = 13
"""Of a precision in the table of rows: awq@kneebench, awq+gptq-3bit. The sentences below have it in full."""


def _reasons(run: Run) -> list[str]:
    """'BF16 at 1, 8 users is suspect: too_few_samples, drifting', a line for all rows that are alike in that."""
    alike: dict[tuple[str, str, str], dict[float, None]] = {}  # a load once, however often repeated
    for point in run.points:
        if point.verdict_reasons:
            key = (point.precision, point.verdict, ", ".join(point.verdict_reasons))
            alike.setdefault(key, {})[load(point)] = None
    amount = axis(run.points).amount
    return [
        f"{label(precision)} at {', '.join([*map(shown, first), amount(last)])} is {verdict}: {reasons}"
        for (precision, verdict, reasons), (*first, last) in alike.items()
    ]


def _measured(run: Run, narrow: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    unit = axis(run.points).unit
    settings = flags_varied([point.precision for point in run.points])
    named = ("precision", *(SHORT.get(flag, flag) for flag in settings))
    columns = (*named, unit, "tok/s", "p95 ms", "TTFT p50", "TPOT p50", "GiB", "$/1M", "verdict")
    for column in columns:
        text = column in (*named, "verdict")
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    for point in run.points:
        table.add_row(
            *_named(point, settings),
            shown(load(point)),
            *(_figure(value, form) for value, form in (
                (point.tok_s, ",.0f"), (point.p95_ms, ",.0f"), (point.ttft_p50_ms, ",.0f"),
                (point.tpot_p50_ms, ",.1f"), (point.vram_gib, ".2f"), (point.usd_per_1m_tokens, ".2f"),
            )),
            point.verdict if narrow else f"{point.verdict} {', '.join(point.verdict_reasons)}".strip(),
        )  # fmt: skip
    return table


def _predicted(run: Run) -> Table:
    """Each figure with its error band; what is the same of every row (the verdict) is told once, below."""
    table = Table(title="Predicted [95 % error band]", title_justify="left", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    settings = flags_varied([point.precision for point in run.points])
    for column in ("precision", *(SHORT.get(flag, flag) for flag in settings)):
        table.add_column(column, overflow="fold")
    for column in (axis(run.points).unit, "tok/s", "p95 ms", "TTFT p50 ms", "TPOT p50 ms"):
        table.add_column(column, justify="right", overflow="fold")
    for point in run.points:
        figures = (interval(*with_ends(name, point)) for name in ("tok_s", "p95_ms", "ttft_p50_ms", "tpot_p50_ms"))
        table.add_row(*_named(point, settings), shown(load(point)), *map(Text, figures))
    return table


def _named(point: SweepPoint, settings: Sequence[str]) -> list[Text]:
    """The precision, and its value of each engine argument that varies: columns of their own, for a name that holds
    them all leaves the figures no room."""
    values = dict(setting_of(point.precision))
    return [
        Text(shortened(precision_of(point.precision), _LONGEST_NAME)),
        *(Text(values.get(flag, "")) for flag in settings),
    ]


def _legend(run: Run) -> str:
    """What the columns of engine arguments are, "" where none varies."""
    short = [(SHORT[flag], flag) for flag in flags_varied([point.precision for point in run.points]) if flag in SHORT]
    return ", ".join(f"{name}: {flag}" for name, flag in short)


def show_quality(console: Console, evidence: Evidence) -> None:
    """A line for each precision beside the baseline, the baseline's own repeat among them, and the gate's verdicts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("precision", "right", "drop, pp [95 %]", "p", "issues", "KL", "same", "ships"):
        table.add_column(column, justify="left" if column == "precision" else "right", no_wrap=True)
    for precision in (evidence.baseline, *evidence.precisions):
        pairs, read = evidence.whole(precision), evidence.whole_fidelity(precision)
        if pairs is None and read is None:
            continue
        ships = evidence.passed(precision)
        own = " again" if precision == evidence.baseline else ""
        table.add_row(
            Text(f"{precision}{own}"),
            f"{pairs.right}/{pairs.items}" if pairs else "–",
            _points(pairs.drop, pairs.drop_lo, pairs.drop_hi) if pairs else "–",
            "–"
            if not pairs or pairs.p_value is None
            else "<0.001"
            if pairs.p_value < 0.001
            else f"{pairs.p_value:.2g}",
            f"{pairs.issues}/{pairs.answered}" if pairs else "–",
            _figure(read.kl_nats if read else None, ".2g"),
            _figure(read.agreement if read else None, ".1%"),
            "" if ships is None else "yes" if ships else "no",
        )
    console.print()
    console.print(table)
    for row in (row for name in evidence.precisions for row in evidence.families(name) if row.family.startswith(TASK)):
        drop = _points(row.drop, row.drop_lo, row.drop_hi)
        told = f"{row.precision}, {row.family.removeprefix(TASK)}: {row.right}/{row.items}, drop {drop} pp"
        console.print(told, markup=False, highlight=False)
    for line in (line for line in evidence.gate if not line.ships):
        console.print(f"{line.precision}: {line.words}", markup=False, highlight=False)


def _points(value: float | None, low: float | None, high: float | None) -> str:
    """A difference of shares in percentage points, with its interval."""
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:+.1f}{ends}"


def capacity_tables(points: Sequence[SweepPoint], knees: Sequence[Knee], assumptions: Assumptions) -> list[Table]:
    """Cards, prices at the stated points and spend: the tables of the page, for a terminal."""
    words = words_of(points)
    return [
        _from_markdown(f"Cards{words.also}", plan_table(plan_cards(points, knees, assumptions), assumptions)),
        _prices(stated_lines(points, knees, assumptions), words),
        _from_markdown(f"Spend{words.also}", spend_table(spends(points, knees, assumptions))),
    ]


def _prices(lines: Sequence[CostLine], words: Words) -> Table:
    table = Table(
        title=f"USD for 1M tokens{words.also}", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    table.add_column("precision and point", overflow="fold")
    for column in ("tok/s", "all on output", "input", "output", "blended"):
        table.add_column(column, justify="right")
    table.add_column("verdict", overflow="fold")
    for line in lines:
        table.add_row(
            Text(words.reworded(f"{label(line.precision)}, {line.operating_point}")),
            number(line.tok_s),
            Text(interval(line.usd_per_1m_tokens, line.usd_per_1m_tokens_lo, line.usd_per_1m_tokens_hi)),
            *map(number, (line.usd_per_1m_input, line.usd_per_1m_output, line.usd_per_1m_blended)),
            line.verdict or words.reworded(line.note),
        )
    return table


def prices_of(prices: Prices, card: str | None) -> Prices:
    """What the catalogue holds of one card; all of it for None. Raises InputError for a card that it does not know."""
    if card is None:
        return prices
    found = Prices(
        tuple(rent for rent in prices.rents if rent.card == card),
        tuple(buy for buy in prices.buys if buy.card == card),
        (),
        (),
    )
    if not (found.rents or found.buys):
        known = tuple(dict.fromkeys([*(rent.card for rent in prices.rents), *(buy.card for buy in prices.buys)]))
        raise InputError(f"the catalogue has no price of {card!r}{did_you_mean(card, known)}", allowed=", ".join(known))
    return found


def price_table(prices: Prices) -> Table:
    """The catalogue, or what `prices_of` leaves of it."""
    rows = [("rent", rent.card, rent.name, rent.words, rent.source) for rent in prices.rents]
    rows += [("own", buy.card, buy.name, buy.words, buy.source) for buy in prices.buys]
    rows += [("electricity", tariff.region, "", tariff.words, tariff.source) for tariff in prices.tariffs]
    rows += [("api", api.id, api.model, api.words, api.source) for api in prices.apis]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "name", "price, its day and its source"):
        table.add_column(column, overflow="fold")
    for what, name, full, price, source in rows:
        told = Text(f"{full}: {price}" if full else price)
        table.add_row(what, Text(name, no_wrap=True), told.append(f"\n{source}", style="dim"))
    return table


_GAP = 2
"""Columns between two columns of a table: rich pads each by one."""


def print_rows(
    terminal: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    numbers: Collection[str] = (),
    lead: int = 1,
) -> None:
    """A table of plain text: nothing in a cell is taken for markup, and a file or a pipe has no edge to fold at.

    `numbers`: columns that stand to the right. Where a terminal is so narrow that words would be broken, each row is a
    paragraph: its first `lead` cells, then the others behind the names of their columns.
    """
    if not terminal.is_terminal:
        terminal.width = NO_EDGE
    columns = list(zip(header, *rows, strict=True))
    natural = [max(map(cell_len, column)) for column in columns]
    least = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    widths = column_widths(natural, least, terminal.width - _GAP * (len(header) - 1))
    if widths is not None:
        table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
        for name, width in zip(header, widths, strict=True):
            justify: JustifyMethod = "right" if name in numbers else "left"
            table.add_column(Text(name, style="bold"), justify=justify, width=width)
        for row in rows:
            table.add_row(*map(Text, row))
        terminal.print(table)
        return
    if title:
        terminal.print(Text(title, style="italic"))
    for row in rows:
        terminal.print(Text("  ".join(filter(None, row[:lead])), style="bold"))
        others = (f"{name} {cell}".strip() for name, cell in zip(header[lead:], row[lead:], strict=True) if cell)
        terminal.print(Padding(Text("; ".join(others)), (0, 0, 0, 2)))


def _from_markdown(title: str, markdown: str) -> Table:
    """A Markdown table of ours as one of rich's; its cells' escapes taken back."""
    header, marks, *body = (
        [_plain(cell) for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in markdown.splitlines()
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, mark in zip(header, marks, strict=True):
        table.add_column(name, justify="right" if mark.endswith(":") else "left", overflow="fold")
    for cells in body:
        table.add_row(*map(Text, cells))
    return table


def _plain(cell: str) -> str:
    return re.sub(r"\\(.)", r"\1", cell.strip())


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
