"""The sheet Notes: what the words and figures of cost.xlsx mean, and where they are from."""

from __future__ import annotations

from harness.analysis.headline import label
from harness.analysis.levels import BOOTSTRAP_FROM, latest, load, shown
from harness.report.predicted import measure_command, told
from harness.report.run import Run
from harness.report.setup import cautions
from harness.report.workbook.layout import Layout


def notes(run: Run, layout: Layout) -> list[tuple[str, str]]:
    """(term, words) for each note."""
    closed = "Concurrent users, each of whom asks again once answered."
    rate = "Requests sent a second, answered or not (an open loop)."
    found = {
        "How to read": """Answer says what was found; Inputs holds what may be changed, in yellow; Charts draws it.
            Workings has every step in between, Levels a row for each precision and load, Points the rows as measured.
            To see where a figure is from, follow its formula back: each is one step.""",
        "Measured": _measured(run),
        "Service level": f"""As measured: {run.slo.words}. A level is surely inside when the worse end of the 95 %
            interval keeps every limit. The safe load is the largest tested one up to which all levels are.""",
        "Caution": " ".join(cautions(run)),
        "Goodput": _goodput(run),
        "Load": closed if layout.closed else rate,
        "tok/s": "Output tokens that arrived within the measured window / its length.",
        "p95, TTFT, TPOT": """95th percentiles: of the time to the last token of an answer, to its first one, and for
            each further token. They count from the moment at which the request was meant to go.""",
        "Intervals": f"""95 %. Of one row: its requests resampled, which knows nothing of run-to-run spread. Of several
            rows: Student's t on logarithms, and from {BOOTSTRAP_FROM} rows on resampled. What was resampled stands as a
            figure; the interval of a saving is then left to the report.""",
        "Prices": """A price belongs to a load, so each names its own. Output tokens with the whole hour on them; input
            and output with the hour shared out by the weight of an output token; blended with all tokens alike. The
            hour is taken as exact, so a price's interval is that of tok/s.""",
        "Stated loads": """Where a stated load was not tested, its figures lie straight between those of its tested
            neighbours on log-log axes; outside the tested loads there are none.""",
        "Cards": """A card's safe load less headroom, against the peak in users and in requests. The larger number of
            cards counts, whole, with those for failover on top.""",
        "Break-even": """Requests a day at which the cards cost what the API does. Never: they are full before that, or
            their electricity alone costs more than the API's request.""",
        "Correct answers": _correct(layout),
        "Saving": """1 − price / the baseline's price, each at its own safe load. Where two or more server sessions of
            the same number have both, the interval is about their ratios; else it combines the two levels' intervals
            (MOVER, Zou & Donner 2008).""",
        "Verdicts": f"""valid; suspect, with the reasons in Points; invalid: left out of Levels and struck through in
            Points. {_left_out(run)}""",
    }
    found = _prediction(run) | found | ({"Intervals": ""} if run.predicted else {})
    return [(term, words) for term, words in found.items() if words]


def _prediction(run: Run) -> dict[str, str]:
    """What a prediction is, how wrong it may be, and how to measure it; nothing of a run that was measured."""
    if not run.predicted:
        return {}
    what, band, measure = told(run)
    return {"Prediction": what, "Error bands": band, "To measure it": f"{measure} {measure_command(run)}"}


def _measured(run: Run) -> str:
    engine = " ".join(str(part) for part in (run.common("engine"), run.common("engine_version")) if part)
    about = f"{run.scenario_name}: {run.scenario.get('description') or 'no description'}"
    version = run.environment.get("kneebench_version", "of unknown version")
    return (
        f"Model {run.model}; {run.machine}; engine {engine or 'not recorded'}; scenario {about}; run {run.name}; "
        f"kneebench {version}."
    )


def _goodput(run: Run) -> str:
    if run.slo.goodput is None:
        return ""
    return """The share of requests that kept all limits was counted request by request, by the limits above, and cannot
        be recounted here: while a share is given, changing the limits in seconds changes nothing."""


def _correct(layout: Layout) -> str:
    if not layout.judged:
        return ""
    return """The price of an answer over the share that is right. The shares are counted on the prompts of failures.md,
        so the price supposes that the traffic is answered as well as those were. Its interval is Wilson's of that
        share; that of the speed is another one. What a precision keeps of the baseline's accuracy has an interval in
        capacity.md, for it takes the pairs. A wrong answer counts as waste, and not for the harm that it does."""


def _left_out(run: Run) -> str:
    rows = [
        f"{label(point.precision)} at {shown(load(point))} ({', '.join(point.verdict_reasons) or 'no reason given'})"
        for point in latest(run.points)
        if point.verdict == "invalid"
    ]
    return f"Left out: {'; '.join(rows)}." if rows else "None was left out."
