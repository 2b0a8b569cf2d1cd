"""capacity.html in a real browser: the panel says what the library says, names stay text, nothing is fetched.

Needs chromium and chromedriver on the PATH; without them the tests are skipped, in CI they fail.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from harness.analysis.capacity import operating_levels, plan_cards
from harness.analysis.compare import compare
from harness.analysis.cost import hour_usd, price
from harness.analysis.headline import label
from harness.analysis.knee import find_knees, safe_load, standing
from harness.analysis.levels import compared, load, precision_order
from harness.analysis.saving import savings
from harness.analysis.spend import spends
from harness.assumptions import Assumptions
from harness.records import SweepPoint, write_table
from harness.report.html import write_html
from harness.report.markdown import write_capacity
from harness.report.planning import percent
from harness.report.run import Run, load_run
from harness.report.tables import interval, number, points_table
from harness.slo import Slo

Asked = dict[str, float | None]
"""Knobs by name, in the units that the page shows; None: left empty."""

RUN_TOML = '[scenario]\nname = "chat"\nslo_p95_s = 3.0\n\n[run]\nmodel = "demo"\nprecisions = ["bf16", "awq"]\n'


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.9, "tok_s_hi": tok_s * 1.08, "p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.15,
        "ttft_p95_ms": p95_ms / 5, "ttft_p95_ms_lo": p95_ms / 6, "ttft_p95_ms_hi": p95_ms / 4,
        "req_s": tok_s / 31, "input_tokens_mean": 128.0, "output_tokens_mean": 31.0, "requests": 120,
        "usd_per_hour": 0.36, "utilisation": 0.5, "power_w": 150.0 + conc, "verdict": "valid", "model": "demo",
    }  # fmt: skip
    return SweepPoint("demo", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **(values | more))  # type: ignore[arg-type]


POINTS = [
    row("bf16", 1, 35.5, 900),
    row("bf16", 8, 241, 1300, repeat=1),
    row("bf16", 8, 236, 1350, repeat=2),
    row("bf16", 8, 250, 1290, repeat=3),
    row("bf16", 16, 402, 2210),
    row("bf16", 32, 520, 1700, verdict="suspect", verdict_reasons=("drifting",)),  # faster than with half the users
    row("bf16", 64, 1110, 7100),
    row("awq", 1, 71.5, 480),
    row("awq", 8, 421, 760, repeat=1),
    row("awq", 8, 433, 740, repeat=2),
    row("awq", 8, 415, 790, repeat=3),
    row("awq", 16, 0, 1150, tok_s_lo=None, tok_s_hi=None, p95_ms_lo=None, p95_ms_hi=None),
    row("awq", 24, 990, 1100, p95_ms_hi=1150.0, req_s=None),  # as slow as 16 may be
    row("awq", 32, 1150, 2500),
    row("awq", 48, 1210, 40, verdict="invalid", verdict_reasons=("client_bound",)),
    row("awq", 64, 1190, 5600),
]
"""Repeats, a level that falls, one without tokens or intervals, one without requests a second, and an invalid one."""


RATED = [
    replace(point, conc=0, rate_rps=point.conc / 8, arrivals="poisson", repeat=point.conc if point.repeat > 1 else 1)
    for point in POINTS
    if point.repeat == 1
]
"""The same as an open loop of 0.125 to 8 requests a second."""

UNITS = {"ttft": 1000, "tpot": 1000, "goodput": 100, "utilisation": 100, "headroom": 100}
"""How many of the page's units are one of the library's, where they differ."""

ASK = """
const answer = (question) => {
  for (const [name, value] of Object.entries(question)) document.getElementById(name).value = value ?? "";
  document.querySelector("#knobs input").dispatchEvent(new Event("input"));
  const cells = (row) => [...row.cells].slice(1).map((cell) => [cell.dataset.value, cell.textContent]);
  return Object.fromEntries([...document.querySelectorAll("#answers tbody tr")].map((row) => [row.id, cells(row)]));
};
return arguments[0].map(answer);
"""
"""Ask the panel many questions at once: for each, by row and precision, the figure at full length and its words."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Headless Chromium, which writes down what it fetches and what goes wrong; quit whatever happens."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI promises chromium and chromedriver")
        pytest.skip("no chromium and chromedriver on the PATH")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(autouse=True)
def quiet(browser: Chrome) -> Iterator[None]:
    """After each test: the console is empty, and nothing but the page itself was asked for, of anybody."""
    browser.set_window_size(1400, 1000)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    yield
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked, "the log of requests is not kept"
    foreign = [
        url
        for url in asked
        if not url.startswith(("file:///", "data:,")) or not url.split("#")[0].endswith((".html", "data:,"))
    ]
    assert foreign == []


@dataclass(frozen=True)
class Written:
    """A page, and what it was made of."""

    path: Path
    run: Run
    assumptions: Assumptions

    def open(self, browser: Chrome, fragment: str = "") -> None:
        browser.get("about:blank")  # a change of the fragment alone would not load the page again
        browser.get(self.path.as_uri() + fragment)


def write(
    folder: Path, points: Sequence[SweepPoint], assumptions: Assumptions, toml: str = RUN_TOML, whole: bool = False
) -> Written:
    """A run on disk and its page, out of the real capacity.md or, quicker, out of a table alone."""
    folder.mkdir(parents=True)
    write_table(folder / "points.csv", points, SweepPoint)
    (folder / "run.toml").write_text(toml)
    run = load_run(folder)
    text, figures = f"# Capacity\n\n## Every point\n\n{points_table(run.points)}\n", []
    if whole:
        knees, ratios = find_knees(run.points, run.slo), compare(run.points, run.requests)
        page, *figures = write_capacity(run, knees, ratios, assumptions, folder / "report")
        text = page.read_text()
    return Written(write_html(run, assumptions, text, figures, folder / "capacity.html"), run, assumptions)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The whole page, of two precisions that have everything that can go wrong with a level."""
    return write(tmp_path_factory.mktemp("runs") / "demo", POINTS, Assumptions(users=100), whole=True)


# --- what the panel says is what the library says ---


def library(written: Written, asked: Asked) -> dict[str, list[tuple[float | None, str | None]]]:
    """The answers by harness.analysis, in the rows of the panel; None in place of words that are not compared."""
    named = {name: value / UNITS[name] if value and name in UNITS else value for name, value in asked.items()}
    limits: Any = {f"{name}_s": named.pop(name) for name in ("p95", "ttft", "tpot") if name in named}
    limits |= {"goodput": named.pop("goodput")} if "goodput" in named else {}
    given: Any = named
    assumptions, slo = replace(written.assumptions, **given), replace(written.run.slo, **limits)
    points = written.run.points
    order = precision_order(points)
    knees = find_knees(points, slo)
    operating = operating_levels(points, knees)
    saved = {line.precision: line for line in savings(points, knees, assumptions)}
    rows: dict[str, list[tuple[float | None, str | None]]] = {}
    for precision, knee, plan, spend in zip(
        order, knees, plan_cards(points, knees, assumptions), spends(points, knees, assumptions), strict=True
    ):
        assert precision == knee.precision == plan.precision == spend.precision
        at = operating.get(precision)
        hour = hour_usd(assumptions, at) if at else None
        paid = price(at, assumptions) if at and hour else (None, None, None)
        saving = saved.get(precision)
        cards = f"{plan.cards}"
        if plan.cards_lo is not None and plan.cards_hi is not None and plan.cards_lo != plan.cards_hi:
            cards += f" [{plan.cards_lo}–{plan.cards_hi}]"
        cards += f"{plan.cards_for_load} for the {plan.bound_by}, {assumptions.failover} in reserve"
        answers: dict[str, tuple[float | None, str | None]] = {
            "tested": (None, standings([point for point in points if point.precision == precision], slo)),
            "safe": (safe_load(knee), None if at else "none"),
            "verdict": (None, at.verdict if at else ""),
            "tok_s": (at.tok_s, interval(at.tok_s, at.tok_s_lo, at.tok_s_hi)) if at else (None, ""),
            "price": (paid[0], interval(*paid)),
            "saving": (saving.share, saving_words(saving.share, saving.share_lo, saving.share_hi))
            if saving
            else (None, "baseline" if precision in {order[0], *compared(points).values()} else "no baseline"),
            "cards": (plan.cards, cards if plan.cards is not None else "no traffic is given" if at else ""),
            "peak": (plan.utilisation_peak, "" if plan.utilisation_peak is None else percent(plan.utilisation_peak)),
            "month": (spend.usd_per_month, number(spend.usd_per_month)),
        }
        for name, answer in answers.items():
            rows.setdefault(f"answer-{name}", []).append(answer)
    return rows if len(order) > 1 else {name: cells for name, cells in rows.items() if name != "answer-saving"}


def standings(points: Sequence[SweepPoint], slo: Slo) -> str:
    signs = {(True, False): "✓", (False, True): "✗", (False, False): "?"}
    levels = [(load(level), signs[place.surely_inside, place.surely_outside]) for level, place in standing(points, slo)]
    return "  ".join(f"{at:g}\u00a0{sign}" for at, sign in levels)


def saving_words(share: float | None, low: float | None, high: float | None) -> str:
    if share is None:
        return ""
    if low is None or high is None:
        return percent(share)
    ends = [percent(end).removesuffix(" %") for end in (low, high)]
    between = " to " if low < 0 or high < 0 else "–"
    return f"{percent(share)} [{between.join(ends)}]{', undecided' if low <= 0 <= high else ''}"


def check(browser: Chrome, written: Written, questions: Sequence[Asked]) -> list[dict[str, Any]]:
    """Ask page and library the same; returns the page's answers."""
    written.open(browser)
    answers = browser.execute_script(ASK, questions)
    for asked, shown in zip(questions, answers, strict=True):
        told = library(written, asked)
        assert set(shown) == set(told)
        for name, cells in told.items():
            for (value, words), (figure, text) in zip(cells, shown[name], strict=True):
                where = f"{name} at {asked}"
                assert (figure == "") == (value is None), where
                assert value is None or float(figure) == pytest.approx(value, rel=1e-12, abs=1e-14), where
                assert words is None or text == words, where
    return list(answers)


def test_a_grid_of_questions(browser: Chrome, report: Written) -> None:
    """Service levels from "nothing is safe" to "all are", among them the very end of an interval (552 and 1,495 ms)."""
    limits = (0.1, 0.4, 0.552, 0.8, 1.2, 1.495, 1.6, 2.2, 2.6, 3, 6, 20)
    demands = itertools.cycle(((None, None), (100, None), (None, 1e5), (37, 2.5e6), (1, 1.0), (None, 0.001)))
    reserves = itertools.cycle(((20, 1, 3), (0, 0, 1.5), (90, 3, 1), (33.3, 2, 12)))
    questions: list[Asked] = []
    for p95, usd, share in itertools.product(limits, (0, 0.12, 0.36, 2.5), (50, 7, 100)):
        (users, daily), (headroom, failover, factor) = next(demands), next(reserves)
        questions.append({
            "p95": p95, "usd_per_hour": usd, "utilisation": share, "users": users, "requests_per_day": daily,
            "peak_factor": factor, "headroom": headroom, "failover": failover,
        })  # fmt: skip
    answers = check(browser, report, questions)
    safe = {tuple(words for _, words in answer["answer-safe"]) for answer in answers}
    assert {("none", "none"), ("8 users", "24 users"), ("64 users", "64 users")} <= safe and len(safe) >= 7
    assert {words for answer in answers for _, words in answer["answer-verdict"]} == {"", "valid", "suspect"}
    assert any("undecided" in answer["answer-saving"][1][1] for answer in answers)
    assert {figure for answer in answers for figure, _ in answer["answer-cards"]} > {"", "1", "2"}


def test_an_owned_card_and_a_peak_out_of_a_trace(browser: Chrome, tmp_path: Path) -> None:
    assumptions = Assumptions(
        card_usd=1200, host_usd=350, residual=0.1, usd_per_kwh=0.31, pue=1.3, idle_watts=20, host_watts=60,
        requests_per_day=3e5, peak_rps=11.5, context_tokens=1,
    )  # fmt: skip
    written = write(tmp_path / "own", POINTS, assumptions)
    knobs = ("p95", "card_usd", "utilisation", "requests_per_day", "peak_rps", "users")
    demands = ((3e5, 11.5, None), (None, 40, 20), (1e6, 11.58, 500))
    asked = itertools.product((0.3, 1.5, 3, 9), (0, 1200, 9000.5), (20, 100), demands)
    check(browser, written, [dict(zip(knobs, (*rest, *demand), strict=True)) for *rest, demand in asked])


def test_an_open_loop_of_two_limits(browser: Chrome, tmp_path: Path) -> None:
    toml = RUN_TOML.replace("slo_p95_s = 3.0", "slo_p95_s = 3.0\nslo_ttft_s = 0.5")
    written = write(tmp_path / "open", RATED, Assumptions(requests_per_day=1e5), toml)
    answers = check(browser, written, [
        {"p95": p95, "ttft": ttft, "usd_per_hour": 0.5, "requests_per_day": daily}
        for p95, ttft, daily in itertools.product((0.5, 1.6, 3, 20), (100, 312.5, 450, 5000), (None, 1e5, 7.5e6))
    ])  # fmt: skip
    assert {words for answer in answers for _, words in answer["answer-safe"]} >= {"none", "1 req/s", "0.125 req/s"}
    assert not browser.find_elements(By.ID, "users")


def test_goodput(browser: Chrome, tmp_path: Path) -> None:
    points = [
        replace(point, goodput=good, goodput_lo=good - 0.03, goodput_hi=min(1.0, good + 0.02))
        for point, good in zip(
            POINTS, (1, 0.99, 0.985, 0.99, 0.93, 0.95, 0.4) + (1,) * 6 + (0.97, 0.9, 0.6), strict=True
        )
    ]
    toml = RUN_TOML.replace("slo_p95_s = 3.0", "slo_p95_s = 3.0\nslo_goodput = 0.9")
    written = write(tmp_path / "good", points, Assumptions(users=50), toml)
    answers = check(browser, written, [{"goodput": share} for share in (57, 58, 88, 90, 92, 94, 97, 98.5, 100)])
    assert [answer["answer-safe"][0][1] for answer in answers] == ["32 users"] * 4 + ["8 users"] * 3 + ["none"] * 2


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(POINTS[:7], id="one precision"),
        pytest.param([POINTS[0]], id="one level"),
        pytest.param([replace(p, usd_per_hour=None, utilisation=None, req_s=None) for p in POINTS], id="no price"),
        pytest.param([*POINTS[:7], SweepPoint("demo", "awq", 8, verdict_reasons=("errors",))], id="one failed"),
    ],
)
def test_runs_that_lack_something(browser: Chrome, tmp_path: Path, points: list[SweepPoint]) -> None:
    written = write(tmp_path / "run", points, Assumptions(users=5))
    missing = points[0].usd_per_hour is None
    check(browser, written, [
        {"p95": p95, "usd_per_hour": usd, "utilisation": share, "requests_per_day": 1e4}
        for p95 in (0.2, 1.6, 20)
        for usd, share in ((0.5, 40), *([(None, 40), (0.5, None), (None, None)] if missing else []))
    ])  # fmt: skip


def test_rows_that_were_priced_apart(browser: Chrome, tmp_path: Path) -> None:
    """As long as nobody touches price and share of the hour, each precision keeps its own."""
    points = [replace(p, usd_per_hour=0.9, utilisation=0.8) if p.precision == "awq" else p for p in POINTS]
    written = write(tmp_path / "run", points, Assumptions(users=5))
    answers = check(browser, written, [{"p95": 1.6}, {"p95": 3}, {"p95": 3, "usd_per_hour": 0.4, "utilisation": 60}])
    assert len({answer["answer-saving"][1][0] for answer in answers}) == 3


def test_engine_arguments_that_vary(browser: Chrome, tmp_path: Path) -> None:
    """Two settings of each, one of which BF16 lacks: AWQ's in that has nothing to be compared with."""
    points = [
        replace(point, precision=f"{point.precision}[max_num_seqs={seqs}]", tok_s=(point.tok_s or 0) * gain)
        for seqs, gain in ((16, 1.0), (64, 1.2), (128, 1.3))
        for point in POINTS
        if point.precision == "awq" or seqs < 128
    ]
    written = write(tmp_path / "varied", points, Assumptions(users=50))
    answers = check(browser, written, [{"p95": p95, "usd_per_hour": usd} for p95 in (1.6, 3) for usd in (0.3, 1.0)])
    assert [words for _, words in answers[0]["answer-saving"][:2]] == ["baseline", "baseline"]
    assert answers[0]["answer-saving"][-1][1] == "no baseline" and "%" in answers[0]["answer-saving"][2][1]


def test_the_command_line_says_the_same(browser: Chrome, report: Written) -> None:
    """`bench capacity` at another service level, price and traffic: its tables hold the figures of the panel."""
    options = ("--slo", "p95=1.6s", "--usd-per-hour", "0.5", "--utilisation", "80%", "--users", "70")
    command = [
        sys.executable,
        "-m",
        "harness",
        "capacity",
        str(report.path.parent),
        *options,
        "--requests-per-day",
        "2e5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "400"}, timeout=120)
    assert done.returncode == 0, done.stderr
    asked = {"p95": 1.6, "usd_per_hour": 0.5, "utilisation": 80, "users": 70, "requests_per_day": 2e5}
    answer = check(browser, report, [asked])[0]
    assert [words for _, words in answer["answer-safe"]] == ["8 users", "24 users"]
    said = [line.split() for line in done.stdout.splitlines()]
    for at, name in enumerate(("BF16", "AWQ")):
        price, month = (answer[f"answer-{row}"][at][1] for row in ("price", "month"))
        safe, cards = (answer[f"answer-{row}"][at][0] for row in ("safe", "cards"))
        assert any(line[:2] == [name, safe] and cards in line for line in said if line)
        assert any(line[0] == f"{name}," and " ".join(line).find(price) > 0 for line in said if line)
        assert any(line[0] == name and month in line for line in said if line)
    saving = answer["answer-saving"][1][1]
    assert f"by {saving} against BF16" in done.stdout


# --- hands on the knobs ---


def said(browser: Chrome) -> str:
    """What the page says when it has come to rest."""
    return str(WebDriverWait(browser, 5).until(lambda page: page.find_element(By.ID, "said").text))


def test_the_slider_of_the_slo_by_keyboard(browser: Chrome, report: Written) -> None:
    report.open(browser)
    assert said(browser).startswith("BF16: 32 users a card, 5 cards, 0.385 USD per 1M output tokens.\nAWQ: 32 users")
    slider, entry = browser.find_element(By.CSS_SELECTOR, "[data-for=p95]"), browser.find_element(By.ID, "p95")
    slider.send_keys(Keys.ARROW_LEFT * 25)
    p95 = float(entry.get_property("value"))
    assert 1 < p95 < 2.5 and slider.get_attribute("aria-valuetext") == f"{p95:g} s"
    told = library(report, {"p95": p95})
    shown = browser.execute_script(
        "return [...document.querySelector('#answer-safe').cells].map((c) => c.dataset.value)"
    )
    assert [float(value) for value in shown[1:]] == [value for value, _ in told["answer-safe"]] != [32, 32]
    WebDriverWait(browser, 5).until(lambda page: "BF16: 8 users a card" in page.find_element(By.ID, "said").text)
    slider.send_keys(Keys.END)
    assert float(entry.get_property("value")) > 8 and "64 users" in browser.find_element(By.ID, "answer-safe").text
    slider.send_keys(Keys.HOME)
    assert browser.find_element(By.ID, "answer-safe").text.endswith("none none")


def test_a_slider_whose_first_step_is_none(browser: Chrome, report: Written) -> None:
    report.open(browser)
    slider, entry = browser.find_element(By.CSS_SELECTOR, "[data-for=users]"), browser.find_element(By.ID, "users")
    slider.send_keys(Keys.HOME)
    assert (entry.get_property("value"), slider.get_attribute("aria-valuetext")) == ("", "none")
    assert browser.find_element(By.ID, "answer-cards").text == "Cards\nno traffic is given\nno traffic is given"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert entry.get_property("value") == "1" and slider.get_attribute("aria-valuetext") == "1"
    slider.send_keys(
        Keys.ARROW_RIGHT * 29
    )  # by steps that are too small for the next whole user: 10,000 ** 0.15 = 3.98
    assert entry.get_property("value") == "4"
    entry.send_keys(Keys.CONTROL, "a", Keys.NULL, "100")
    assert slider.get_property("value") == "100"  # of 200: half way between 1 and 10,000
    slider.send_keys(Keys.END)
    assert entry.get_property("value") == "10000"


def test_the_address_holds_what_was_changed(browser: Chrome, report: Written) -> None:
    report.open(browser)
    for name, value in (("p95", "1.6"), ("usd_per_hour", "0.5"), ("users", "")):
        browser.find_element(By.ID, name).send_keys(Keys.CONTROL, "a", Keys.NULL, value or Keys.BACKSPACE)
    assert browser.current_url.endswith("#p95=1.6&usd_per_hour=0.5&users=")
    changed = browser.find_element(By.ID, "answers").text
    report.open(browser, "#p95=1.6&usd_per_hour=0.5&users=")
    assert browser.find_element(By.ID, "answers").text == changed
    browser.find_element(By.LINK_TEXT, "Price").click()
    assert browser.current_url.endswith("#s-price") and browser.find_element(By.ID, "answers").text == changed
    assert browser.find_element(By.CSS_SELECTOR, "[data-for=users]").get_property("value") == "0"
    browser.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    reset = browser.find_element(By.ID, "answers").text
    assert "#" not in browser.current_url and reset != changed
    slider = browser.find_element(By.CSS_SELECTOR, "[data-for=p95]").get_property("value")
    report.open(browser)
    assert browser.find_element(By.CSS_SELECTOR, "[data-for=p95]").get_property("value") == slider != "100"
    assert browser.find_element(By.ID, "answers").text == reset


def test_an_address_that_makes_no_sense_harms_nothing(browser: Chrome, report: Written) -> None:
    report.open(browser, "#p95=<img src=x onerror=alert(1)>&headroom=1e9&nothing=1")
    assert "p95 limit" in said(browser) and "stale" in str(
        browser.find_element(By.ID, "answers").get_attribute("class")
    )
    assert browser.find_element(By.ID, "p95").get_attribute("aria-invalid") == "true"
    assert not browser.find_elements(By.CSS_SELECTOR, "img")
    report.open(browser, "#s-every-point")
    assert "BF16: 32 users a card" in said(browser)


def test_the_page_by_tab_key(browser: Chrome, report: Written) -> None:
    """The skip link first and in sight, then the chapters; in the panel each number is followed by its slider."""
    report.open(browser)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    skip = browser.switch_to.active_element
    assert skip.text == "Skip to the report" and skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    seen = []
    for _ in range(6):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        seen.append(focused.get_attribute("id") or focused.get_attribute("data-for"))
        assert focused.value_of_css_property("outline-style") != "none"
    assert seen == ["p95", "p95", "usd_per_hour", "usd_per_hour", "utilisation", "utilisation"]
    unnamed = "return [...document.querySelectorAll('input')].filter((i) => !i.labels?.length && !i.ariaLabel).length"
    assert browser.execute_script(unnamed) == 0


# --- tables ---


def column(browser: Chrome, table: int, at: int) -> list[str]:
    rows = "[...document.querySelectorAll('table.sortable')[arguments[0]].tBodies[0].rows]"
    return list(browser.execute_script(f"return {rows}.map((row) => row.cells[arguments[1]].textContent)", table, at))


def test_sorting_by_click_and_by_key(browser: Chrome, tmp_path: Path) -> None:
    written = write(tmp_path / "sort", [*POINTS, SweepPoint("demo", "awq", 128)], Assumptions())
    written.open(browser)
    buttons = browser.find_elements(By.CSS_SELECTOR, "table.sortable th button")
    names = [button.text for button in buttons]
    users, tokens, verdict = (names.index(name) for name in ("Users", "tok/s", "Verdict"))
    before = column(browser, 0, tokens)
    head = browser.find_elements(By.CSS_SELECTOR, "table.sortable th")[tokens]
    buttons[tokens].click()
    assert head.get_attribute("aria-sort") == "ascending"
    shown = column(browser, 0, tokens)
    assert shown[-1] == "" and shown[:2] == ["0.00", "35.5 [31.9–38.3]"] and shown[-2].startswith("1,210")
    buttons[tokens].send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "descending"
    shown = column(browser, 0, tokens)
    assert shown[-1] == "" and shown[0].startswith("1,210") and shown[-2] == "0.00"
    buttons[tokens].send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") is None and column(browser, 0, tokens) == before
    buttons[users].click()
    assert column(browser, 0, users)[:3] == ["1", "1", "8"] and column(browser, 0, users)[-1] == "128"
    buttons[verdict].click()
    assert column(browser, 0, verdict)[0] == "invalid" and column(browser, 0, verdict)[-1] == "valid"
    assert len(browser.find_elements(By.CSS_SELECTOR, "[aria-sort]")) == 1


# --- names from outside ---


def test_names_stay_text(browser: Chrome, tmp_path: Path) -> None:
    names = {"bf16": "bf16", "awq": "<img src=x onerror=document.title='run'>{{7*7}}"}
    model = "</script><script>document.title='run'</script><!-- \"x\" 'y' &lt;b&gt; ]]> {{ 7*7 }} {% x %} `z` **s**"
    points = [replace(point, precision=names[point.precision], model=model, kernel="<b>k</b>") for point in POINTS]
    toml = RUN_TOML.replace('"chat"', "'<script>document.title=1</script>'").replace("awq", "other")
    written = write(tmp_path / "hostile", points, Assumptions(users=9, api_name="</script><b>"), toml, whole=True)
    written.open(browser)
    assert label(names["awq"]) in said(browser)
    assert model in browser.title and browser.find_element(By.TAG_NAME, "h1").text == browser.title
    text = browser.find_element(By.TAG_NAME, "main").text
    assert model in text and label(names["awq"]) in text and "<b>k</b>" in text
    assert len(browser.find_elements(By.CSS_SELECTOR, "script")) == 3  # two of ours, and the island
    assert not browser.find_elements(By.CSS_SELECTOR, "img, b, main a")
    answers = browser.execute_script(ASK, [{"p95": 2.0}])[0]
    assert answers["answer-safe"][1][1] == "24 users"


# --- other eyes and other paper ---


def test_without_javascript(browser: Chrome, report: Written) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        report.open(browser)
        assert not browser.find_element(By.ID, "what-if").is_displayed()
        assert not browser.find_elements(By.CSS_SELECTOR, "th button")
        assert len(browser.find_elements(By.CSS_SELECTOR, "figure svg")) == 3
        assert "BF16" in browser.find_element(By.CSS_SELECTOR, "table.sortable").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_dark_narrow_and_printed(browser: Chrome, report: Written) -> None:
    def paper() -> list[int]:
        colour = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return [int(part) for part in colour.removeprefix("rgba(").removeprefix("rgb(").rstrip(")").split(",")[:3]]

    def emulate(**media: object) -> None:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    report.open(browser)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    assert min(paper()) > 200
    emulate(features=dark)
    assert max(paper()) < 60
    assert "invert" in browser.find_element(By.CSS_SELECTOR, "figure svg").value_of_css_property("filter")
    emulate(media="print", features=dark)
    assert min(paper()) > 200
    assert not browser.find_element(By.CSS_SELECTOR, "[data-for=p95]").is_displayed()
    assert browser.find_element(By.ID, "p95").is_displayed() and browser.find_element(By.ID, "answers").is_displayed()
    emulate(media="", features=[])
    for width in (400, 1400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page = "const page = document.documentElement; return [window.innerWidth, page.scrollWidth - page.clientWidth]"
        assert browser.execute_script(page) == [width, 0]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
