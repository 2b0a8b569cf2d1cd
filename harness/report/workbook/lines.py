"""What stands in cost.xlsx and by which formula: data, which sheets.py writes; here prices, in fleet.py the rest.

    Inputs ─────────────┐                  named cells: usd_per_hour, slo_p95_s ...
    Points ─► Levels ───┴─► Workings ─► Answer, Charts
    raw rows  a row each    a column for each precision

A formula is a template. Words in braces are cells, words without are the named cells of Inputs:

    {tok_s}            that figure in the same row of Levels, or that line of Workings in the same column
    {base_tok_s}       that line of Workings in the column of the baseline
    {all_tok_s}        that column of Levels, the rows of this precision; {base_all_tok_s} those of the baseline
    {upto_inside}      that column of Levels, from this precision's first row to this one
    {raw_weights_gib}  that column of Points, all rows of this precision

They are the formulas of harness.analysis, one step a cell, so that whoever pays can follow a figure back to the rows
that were measured, in functions that Excel 2016 and LibreOffice both know. Nothing that came from outside is part of
one. Missing is empty text, and COUNT, which counts numbers only, asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

POINTS = ("slo", "chat", "batch")
"""Operating points: the largest load inside the service level, and the two that are stated."""
PRICES = ("only", "input", "output", "blended")
FIGURES = ("tok_s", "tok_s_lo", "tok_s_hi", "req_s", "input_tokens", "output_tokens", "p95", "power")
"""Columns of Levels that a price needs, interpolated where a stated load was not tested."""

BARS = {"tok_s": "tok/s", "p95": "p95", "ttft": "TTFT", "tpot": "TPOT", "only": "USD/1M"}
"""Columns of Levels that charts draw with their intervals."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of Workings or a column of Levels. `form` is a number format, a key of pen.FORMS."""

    key: str
    title: str
    unit: str
    form: str
    formula: str
    how: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Lines under a title. `others_only`: each precision against the baseline, whose own cells stay empty."""

    title: str
    lines: tuple[Line, ...]
    others_only: bool = False


def known(cells: str, then: str) -> str:
    """`then` where all the cells, blanks between them, hold numbers; else empty."""
    each = cells.split()
    return f'=IF(COUNT({",".join(each)})={len(each)},{then},"")'


def priced(hour: str, tok_s: str, then: str) -> str:
    """`then`, a price, where the hour has one and there are tokens to carry it; else empty."""
    return f'=IF(AND(ISNUMBER({hour}),N({tok_s})>0),{then},"")'


def at_point(lines: Sequence[Line], point: str) -> tuple[Line, ...]:
    """Lines about any operating point p, as those of one of them: {p_tok_s} is {slo_tok_s}. "": a row of Levels."""
    prefix = f"{point}_" if point else ""
    return tuple(
        replace(line, key=prefix + line.key.removeprefix("p_"), formula=line.formula.replace("{p_", "{" + prefix))
        for line in lines
    )


# --- an hour and its price, at an operating point or in a row of Levels -----------------------------------------------

_HOUR = (
    Line("p_watts", "Power of the card", "W", "rate",
         '=IF(ISNUMBER({p_load}),IF(ISNUMBER(watts),watts,IF(ISNUMBER({p_power}),{p_power},"")),"")',
         "given, else as measured"),
    Line("p_share", "Share of the hour under this load", "share", "share",
         '=IF(ISNUMBER({p_load}),IF(ISNUMBER(utilisation),utilisation,IF(ISNUMBER({p_row_share}),{p_row_share},"")),"")',
         "given, else as the row says"),
    Line("p_capital", "Rent, or what is written off", "USD/h", "price",
         '=IF(ISNUMBER({p_share}),IF(rent_or_own="own",IF(ISNUMBER(card_usd),(card_usd+host_usd)*(1-residual)'
         '/(years*8766),""),IF(ISNUMBER(usd_per_hour),usd_per_hour,IF(ISNUMBER({p_row_usd}),{p_row_usd},""))),"")',
         "owned: (card + host) × (1 − residual) / (years × 8,766 h)"),
    Line("p_idle", "Electricity without load", "USD/h", "price",
         known("{p_capital}", 'IF(AND(rent_or_own="own",ISNUMBER({p_watts})),(idle_watts+host_watts)*pue/1000'
               '*usd_per_kwh,0)'), "owned: (idle + host watts) × PUE / 1,000 × USD/kWh; 0 where no power is known"),
    Line("p_under_load", "Electricity that load adds", "USD/h", "price",
         known("{p_capital}", 'IF(AND(rent_or_own="own",ISNUMBER({p_watts})),({p_watts}-idle_watts)*pue/1000'
               '*usd_per_kwh,0)'), "owned: (watts − idle watts) × PUE / 1,000 × USD/kWh"),
    Line("p_hour", "An hour of a card", "USD/h", "price",
         known("{p_capital} {p_idle} {p_under_load}", "{p_capital}+{p_idle}+{p_share}*{p_under_load}"),
         "capital + idle + share of the hour × load"),
)  # fmt: skip

OF_A_MILLION = "USD/1M"
_PRICES = (
    Line("p_input_tok_s", "Input tokens a second", "tok/s", "rate",
         known("{p_req_s} {p_input_tokens}", "{p_req_s}*{p_input_tokens}"), "requests a second × mean input tokens"),
    Line("p_only", "Output tokens, the whole hour on them", OF_A_MILLION, "price",
         priced("{p_hour}", "{p_tok_s}", "{p_hour}/({p_tok_s}*{p_share}*3600)*1000000"),
         "hour / (tok/s × share × 3,600) × 1,000,000"),
    Line("p_only_lo", "low end of its 95 % interval", OF_A_MILLION, "price",
         priced("{p_hour}", "{p_tok_s_hi}", "{p_hour}/({p_tok_s_hi}*{p_share}*3600)*1000000"), "by the most tok/s"),
    Line("p_only_hi", "high end", OF_A_MILLION, "price",
         priced("{p_hour}", "{p_tok_s_lo}", "{p_hour}/({p_tok_s_lo}*{p_share}*3600)*1000000"), "by the fewest tok/s"),
    Line("p_input", "Input tokens", OF_A_MILLION, "price",
         known("{p_only} {p_input_tok_s}",
               "{p_hour}/(({p_input_tok_s}+output_weight*{p_tok_s})*{p_share}*3600)*1000000"),
         "hour / ((input tok/s + output weight × tok/s) × share × 3,600) × 1,000,000"),
    Line("p_output", "Output tokens", OF_A_MILLION, "price",
         known("{p_input}", "output_weight*{p_input}"), "output weight × the price of input tokens"),
    Line("p_blended", "Blended", OF_A_MILLION, "price",
         known("{p_only} {p_input_tok_s}", "{p_hour}/(({p_input_tok_s}+{p_tok_s})*{p_share}*3600)*1000000"),
         "hour / ((input tok/s + tok/s) × share × 3,600) × 1,000,000"),
)  # fmt: skip

_ENDS = tuple(
    Line(f"p_{price}_{end}", f"{title}, {words} end", OF_A_MILLION, "price",
         f'=IF(AND(ISNUMBER({{p_{price}}}),N({{p_tok_s_{pace}}})>0),{{p_{price}}}*{{p_tok_s}}/{{p_tok_s_{pace}}},"")',
         "requests, and with them input, come as much faster or slower")
    for price, title in (("input", "Input tokens"), ("output", "Output tokens"), ("blended", "Blended"))
    for end, pace, words in (("lo", "hi", "low"), ("hi", "lo", "high"))
)  # fmt: skip


# --- Levels -----------------------------------------------------------------------------------------------------------


def level_lines(closed: bool) -> list[Line]:
    """The columns of Levels that follow the inputs. `closed`: the load is users, so that one can be stated."""
    limits = (("p95", "p95"), ("ttft", "TTFT"), ("tpot", "TPOT"))
    lines = [
        Line(f"{name}_kept", f"{title} surely kept", "", "word",
             f'=IF(ISNUMBER(slo_{name}_s),IF(ISNUMBER({{{name}}}),IF({{{name}_hi}}<=slo_{name}_s,"yes","no"),"unknown"),'
             '"no limit")')
        for name, title in limits
    ]  # fmt: skip
    lines += [
        Line("goodput_kept", "Goodput surely kept", "", "word",
             '=IF(ISNUMBER(slo_goodput),IF(ISNUMBER({goodput}),IF(1-{goodput_lo}<=1-slo_goodput,"yes","no"),"unknown"),'
             '"no limit")'),
        Line("inside", "Surely inside", "", "word",
             '=IF(ISNUMBER(slo_goodput),{goodput_kept},IF(COUNTIF({p95_kept}:{tpot_kept},"no limit")=3,"unknown",'
             'IF(COUNTIF({p95_kept}:{tpot_kept},"unknown")>0,"unknown",'
             'IF(COUNTIF({p95_kept}:{tpot_kept},"no")>0,"no","yes"))))'),
        Line("promised", "Safe to promise", "load", "any",
             '=IF(AND({inside}="yes",COUNTIF({upto_inside},"no")=0),{load},0)'),
    ]  # fmt: skip
    for point in POINTS[1:] if closed else ():
        lines += [
            Line(f"{point}_{side}", f"Tested, {words} the {point} load", "users", "any",
                 f'=IF(AND(N({{tok_s}})>0,{{load}}{sign}{point}_conc),{{load}},"")')
            for side, words, sign in (("below", "up to", "<="), ("above", "from", ">="))
        ]  # fmt: skip
    bars = [
        Line(f"{figure}_{way}", f"{title}, {way} to its end", "", "any", known(f"{upper} {lower}", f"{upper}-{lower}"))
        for figure, title in BARS.items()
        for way, upper, lower in (("up", f"{{{figure}_hi}}", f"{{{figure}}}"),
                                  ("down", f"{{{figure}}}", f"{{{figure}_lo}}"))
    ]  # fmt: skip
    return [*lines, *at_point((*_HOUR, *_PRICES), ""), *bars]


# --- Workings ---------------------------------------------------------------------------------------------------------


_FIGURE_TITLES = (
    ("Output tokens a second", "tok/s", "rate"), ("low end of its 95 % interval", "tok/s", "rate"),
    ("high end", "tok/s", "rate"), ("Requests a second", "req/s", "rate"),
    ("Input tokens of a request", "tokens", "rate"), ("Output tokens of a request", "tokens", "rate"),
    ("p95 latency", "s", "seconds"), ("Power as measured", "W", "rate"),
)  # fmt: skip


def at_slo(unit: str) -> tuple[Line, ...]:
    """At the safe load, whose figures are those of its level. `unit`: of a load."""

    def picked(column: str, there: str = "ISNUMBER") -> str:
        cell = f"INDEX({{all_{column}}},{{slo_row}})"
        return f'=IF(ISNUMBER({{slo_row}}),IF({there}({cell}),{cell},""),"")'

    found = [
        Line("slo_load", "Safe load", unit, "any", '=IF(MAX({all_promised})>0,MAX({all_promised}),"none")',
             "the largest tested load up to which every level is surely inside"),
        Line("slo_row", "Its row among the levels of the precision", "", "any",
             known("{slo_load}", "MATCH({slo_load},{all_load},0)")),
    ]  # fmt: skip
    for column, (title, of, form) in zip(FIGURES, _FIGURE_TITLES, strict=True):
        found.append(Line(f"slo_{column}", title, of, form, picked(column), "as measured there"))
    found += [
        Line("slo_verdict", "Verdict", "", "word", picked("verdict", "ISTEXT"), "of the rows behind it"),
        Line("slo_row_usd", "Price of the hour in the row", "USD/h", "price", picked("row_usd")),
        Line("slo_row_share", "Share of the hour in the row", "share", "share", picked("row_share")),
    ]
    return (*found, *at_point((*_HOUR, *_PRICES, *_ENDS), "slo"))


def at_stated(point: str) -> tuple[Line, ...]:
    """At a stated load: that level's figures, or straight between its tested neighbours' on log-log axes."""

    def picked(column: str) -> str:
        cell = f"INDEX({{all_{column}}},{{p_row}})"
        return f'=IF(ISNUMBER({{p_row}}),IF(ISNUMBER({cell}),{cell},""),"")'

    def between(column: str) -> str:
        one, two = f"INDEX({{all_{column}}},{{p_row}})", f"INDEX({{all_{column}}},{{p_row_above}})"
        line = f"EXP((1-{{p_way}})*LN({one})+{{p_way}}*LN({two}))"
        return f'=IF(ISNUMBER({{p_way}}),IF(AND(N({one})>0,N({two})>0),{line},""),"")'

    found = [
        Line("p_below", "Tested neighbour below, or itself", "users", "any",
             f'=IF(COUNT({{all_{point}_below}})>0,MAX({{all_{point}_below}}),"")'),
        Line("p_above", "Tested neighbour above, or itself", "users", "any",
             f'=IF(COUNT({{all_{point}_above}})>0,MIN({{all_{point}_above}}),"")'),
        Line("p_load", "Stated load", "users", "any",
             f'=IF(COUNT({{p_below}},{{p_above}})=2,{point}_conc,"not tested")',
             "between tested loads, else no figure"),
        Line("p_safe", "Safely inside the service level", "", "word",
             known("{p_load}", 'IF({p_load}<=N({slo_load}),"yes","no")'), "up to the safe load"),
        Line("p_row", "Row of the one below", "", "any", known("{p_load}", "MATCH({p_below},{all_load},0)")),
        Line("p_row_above", "Row of the one above", "", "any", known("{p_load}", "MATCH({p_above},{all_load},0)")),
        Line("p_way", "Way from one to the other", "share", "share",
             known("{p_load}", "IF({p_above}>{p_below},LN({p_load}/{p_below})/LN({p_above}/{p_below}),0)"),
             "on a log axis; 0 where the load itself was tested"),
    ]  # fmt: skip
    for column, (title, of, form) in zip(FIGURES, _FIGURE_TITLES, strict=True):
        found.append(Line(f"p_{column}", title, of, form, between(column), "straight between the two on log-log axes"))
    found += [
        Line("p_row_usd", "Price of the hour in the row", "USD/h", "price", picked("row_usd")),
        Line("p_row_share", "Share of the hour in the row", "share", "share", picked("row_share")),
    ]
    return at_point((*found, *_HOUR, *_PRICES, *_ENDS), point)
