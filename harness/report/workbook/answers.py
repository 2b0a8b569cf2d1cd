"""What a correct answer costs, in formulas: from the counts on the sheet Quality and the hour at the safe load.

The formulas are those of harness/analysis/correct.py. The counts may be typed over: with those of prompts of one's own,
say.
"""

from __future__ import annotations

from harness.analysis.correct import CorrectLine
from harness.analysis.percentiles import Z95
from harness.report.workbook.lines import Line, Section, known, priced

COUNTS = ("right", "judged")
"""Rows of the sheet Quality."""
_Z = f"{Z95:.6f}"
_ANSWERS = "USD/1,000"


def _wilson(sign: str) -> str:
    return (
        f"({{right}}+{_Z}^2/2{sign}{_Z}*SQRT({{right}}*({{judged}}-{{right}})/{{judged}}+{_Z}^2/4))/({{judged}}+{_Z}^2)"
    )


def answers_sections() -> list[Section]:
    """Lines of Workings; {right} and {judged} are cells of the sheet Quality."""
    alone = (
        Line("accuracy", "Accuracy", "share", "share", '=IF(N({judged})>0,{right}/{judged},"")', "right / judged"),
        Line("accuracy_lo", "low end of its 95 % interval", "share", "share",
             known("{accuracy}", f"IF({{right}}>0,{_wilson('-')},0)"), "Wilson"),
        Line("accuracy_hi", "high end", "share", "share", known("{accuracy}", f"MIN({_wilson('+')},1)"), "Wilson"),
        Line("an_answer", "1,000 answers, right or wrong", _ANSWERS, "small_price",
             priced("{slo_hour}", "{slo_req_s}", "{slo_hour}/({slo_req_s}*{slo_share}*3600)*1000"),
             "hour / (requests a second × share × 3,600) × 1,000"),
        Line("correct", "1,000 correct answers", _ANSWERS, "small_price", _over("accuracy"), "that / accuracy"),
        Line("correct_lo", "low end of its 95 % interval", _ANSWERS, "small_price", _over("accuracy_hi"),
             "by the highest accuracy; the speed as measured"),
        Line("correct_hi", "high end", _ANSWERS, "small_price", _over("accuracy_lo"), "by the lowest accuracy"),
    )  # fmt: skip
    against = (
        Line("even", "Share of the baseline's accuracy that pays", "share", "share",
             '=IF(AND(ISNUMBER({an_answer}),N({base_an_answer})>0),{an_answer}/{base_an_answer},"")',
             "1,000 answers / the baseline's: above it a correct one is the cheaper one"),
        Line("kept", "Share of it that is kept", "share", "share",
             '=IF(AND(ISNUMBER({accuracy}),N({base_accuracy})>0),{accuracy}/{base_accuracy},"")',
             "accuracy / the baseline's"),
        Line("pays", "A correct answer is the cheaper one", "", "word",
             known("{even} {kept}", 'IF({kept}>{even},"yes","no")'), "by these figures, without their intervals"),
    )  # fmt: skip
    return [
        Section("A correct answer at the largest load inside the service level", alone),
        Section("A correct answer against the baseline", against, others_only=True),
    ]


def _over(share: str) -> str:
    return f'=IF(AND(ISNUMBER({{an_answer}}),N({{{share}}})>0),{{an_answer}}/{{{share}}},"")'


def answers_cells(line: CorrectLine | None, base: CorrectLine | None) -> dict[str, float | str | None]:
    """The library's figure for each of these lines."""
    if line is None:
        return {}
    cells: dict[str, float | str | None] = {
        "accuracy": line.accuracy,
        "accuracy_lo": line.accuracy_lo,
        "accuracy_hi": line.accuracy_hi,
        "an_answer": line.usd_per_1000_answers,
        "correct": line.usd_per_1000_correct,
        "correct_lo": line.usd_per_1000_correct_lo,
        "correct_hi": line.usd_per_1000_correct_hi,
    }
    if base is None or line is base:
        return cells
    kept = None if line.accuracy is None or not base.accuracy else line.accuracy / base.accuracy
    pays = None if kept is None or line.break_even is None else "yes" if kept > line.break_even else "no"
    return cells | {"even": line.break_even, "kept": kept, "pays": pays}
