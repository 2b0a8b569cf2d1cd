"""capacity.html as text: names from outside stay text, nothing is fetched, same input, same bytes.

What the page does in a browser, and whether its panel says what the library says, is in test_html_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.compare import compare
from harness.analysis.knee import find_knees
from harness.assumptions import Assumptions, check_assumptions
from harness.errors import InputError
from harness.records import SweepPoint, write_table
from harness.report import plots
from harness.report.html import STYLES, dress, inline_svg, write_html
from harness.report.markdown import write_capacity
from harness.report.run import load_run
from harness.report.tables import escape, table
from harness.report.whatif import Knob, panel

TEMPLATES = Path(plots.__file__).parent / "templates"
RUN_TOML = '[scenario]\nname = "chat"\nslo_p95_s = 3.0\n\n[run]\nmodel = "demo"\n'


def row(precision: str, conc: int, tok_s: float, p95_ms: float, **more: object) -> SweepPoint:
    values: dict[str, object] = {
        "tok_s_lo": tok_s * 0.95, "tok_s_hi": tok_s * 1.05, "p95_ms_lo": p95_ms * 0.9, "p95_ms_hi": p95_ms * 1.1,
        "req_s": tok_s / 32, "usd_per_hour": 0.36, "utilisation": 0.5, "verdict": "valid", "requests": 120,
    }  # fmt: skip
    return SweepPoint("demo", precision, conc, tok_s=tok_s, p95_ms=p95_ms, **(values | more))  # type: ignore[arg-type]


POINTS = [row("bf16", 1, 35, 900), row("bf16", 8, 240, 2200), row("awq", 1, 70, 480), row("awq", 8, 420, 760)]


def run_dir(folder: Path, points: Sequence[SweepPoint] = POINTS, toml: str = RUN_TOML) -> Path:
    folder.mkdir(parents=True)
    write_table(folder / "points.csv", points, SweepPoint)
    (folder / "run.toml").write_text(toml)
    return folder


def html(folder: Path, page: str = "# Capacity\n", figures: Sequence[Path] = (), **assumed: object) -> str:
    assumptions = Assumptions(**assumed)  # type: ignore[arg-type]
    return write_html(load_run(folder), assumptions, page, figures, folder / "capacity.html").read_text()


def markdown(folder: Path) -> tuple[str, list[Path]]:
    """The text of capacity.md, and its figures."""
    run = load_run(folder)
    knees, ratios = find_knees(run.points, run.slo), compare(run.points, run.requests)
    page, *figures = write_capacity(run, knees, ratios, Assumptions(), folder / "report")
    return page.read_text(), figures


class Reader(HTMLParser):
    """What a browser's parser makes of a page: its elements with their attributes, and its text by innermost tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        innermost = self.open[-1] if self.open else ""
        self.texts[innermost] = self.texts.get(innermost, "") + data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


# --- the words ---


def test_chapters_tables_and_lists() -> None:
    page = (
        "# Capacity: demo\n\n**So many users.**\n\n> Measured on a CPU.\n\n## Set-up & more\n\n|  |  |\n| --- | --- |\n"
        "| Model | a\\|b |\n\n## Points\n\n| Precision | tok/s | Verdict |\n| --- | ---: | --- |\n"
        "| BF16 | **35.0** | suspect: drifting |\n| W4 | 1 | odd |\n\n- **BF16** holds `x`.\n\n"
        "## Points\n\n```\nbench x\n```\n"
    )
    opening, sections = dress(page, {}, ["bf16", "awq"])
    assert opening == (
        "<h1>Capacity: demo</h1>\n<p><strong>So many users.</strong></p>\n"
        "<blockquote>\n<p>Measured on a CPU.</p>\n</blockquote>\n"
    )
    assert [(section.id, section.title) for section in sections] == [
        ("s-set-up-more", "Set-up & more"), ("s-points", "Points"), ("s-points-2", "Points"),
    ]  # fmt: skip
    listing, points, code = (str(section.body).replace("\n", "") for section in sections)
    assert '<table class="listing"><tbody><tr><th scope="row">Model</th><td>a|b</td></tr></tbody></table>' in listing
    assert '<div class="scroll" role="region" aria-label="Set-up &amp; more: table" tabindex="0">' in listing
    assert (
        '<th scope="col">Precision</th><th class="number" scope="col">tok/s</th><th scope="col">Verdict</th>' in points
    )
    assert (
        '<tr><td class="p0">BF16</td><td class="number"><strong>35.0</strong></td>'
        '<td class="suspect">suspect: drifting</td></tr>'
        '<tr><td>W4</td><td class="number">1</td><td>odd</td></tr>'
    ) in points
    assert "<li><strong>BF16</strong> holds <code>x</code>.</li>" in points
    assert "<pre><code>bench x</code></pre>" in code


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip))
def test_what_was_escaped_for_markdown_is_text_in_html(text: str) -> None:
    """Whatever a name holds, it comes out as itself, its white space on one line, and makes no element."""
    name = escape(text)
    page = f"# Of {name}\n\n## About {name}\n\n{table(('Precision', 'tok/s'), [(name, name)])}\n\n- **{name}** is it.\n"
    opening, sections = dress(page, {}, [text])
    read, plain = Reader(str(opening + sections[0].body)), " ".join(text.split())
    assert read.tags() <= {"h1", "div", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong"}
    assert (read.texts["h1"], sections[0].title) == (f"Of {plain}", f"About {plain}")
    assert read.texts["td"].strip() == plain * 2 and read.texts["strong"] == plain


def test_markdown_that_is_not_ours_stays_text() -> None:
    opening, _ = dress(
        "<b>x</b> &lt; [a](http://b) <http://c> ![e](http://f/g.png) <!-- h -->\n\n[i]: http://j\n", {}, []
    )
    assert opening == (
        "<p>&lt;b&gt;x&lt;/b&gt; &amp;lt; [a](http://b) &lt;http://c&gt; e &lt;!-- h --&gt;</p>\n<p>[i]: http://j</p>\n"
    )


# --- the figures ---

SVG = """<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" viewBox="0 0 9 9">
 <metadata>m</metadata><style>*{fill: red}</style><!-- <script>1</script> --><script>alert(1)</script>
 <defs><path id="m1" d="M 0 0" style="stroke: #333333; stroke-width: 0.8"/></defs>
 <g id="g1" clip-path="url(#c1)" onclick="alert(1)"><use xlink:href="#m1" x="1"/><use xlink:href="http://x/y"/></g>
 <clipPath id="c1"><rect width="9"/></clipPath><image xlink:href="http://x"/><foreignObject><p/></foreignObject>
</svg>"""


def test_a_figure_stands_alone() -> None:
    """Ids and references within get the prefix, styles become attributes; all that could act or fetch is gone."""
    assert str(inline_svg(SVG, "cost-", 'a "b" <c>')) == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a &quot;b&quot; &lt;c&gt;" stroke-linejoin="round" '
        'stroke-linecap="butt"><defs><path id="cost-m1" d="M 0 0" stroke="#333333" stroke-width="0.8" /></defs>'
        '<g id="cost-g1" clip-path="url(#cost-c1)"><use href="#cost-m1" x="1" /><use href="#cost-http://x/y" /></g>'
        '<clipPath id="cost-c1"><rect width="9" /></clipPath></svg>'
    )


def test_figures_of_a_report(tmp_path: Path) -> None:
    """Every figure that the Markdown names is in the page, by its words; all that it refers to is there, once."""
    page, figures = markdown(run_dir(tmp_path / "demo"))
    text = html(tmp_path / "demo", page, figures)
    named = re.findall(r"!\[(.*?)\]\(figures/", page)
    read = Reader(text)
    drawn = [attributes["aria-label"] for tag, attributes in read.elements if tag == "svg"]
    assert drawn == [re.sub(r"\\(.)", r"\1", words) for words in named] and len(drawn) == 3
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r"(?:href=\"|url\()#([^\")]+)", text)
    assert len(referred) > 100 and set(referred) <= set(ids)
    assert "style=" not in text.replace(" style-src", "")


def test_an_image_without_its_figure_leaves_its_words() -> None:
    assert dress("![p95 *of* BF16](figures/none.png)\n", {}, [])[0] == "<p>p95 of BF16</p>\n"


def test_markers_are_those_of_the_figures() -> None:
    """The seven inks and shapes of plots.STYLES, in its order: o s ^ D v P X."""
    style = (TEMPLATES / "capacity.css").read_text()
    inks = re.findall(r"^  --p(\d): (#\w{6});", style, re.MULTILINE)
    assert inks == [(str(index), ink.lower()) for index, (ink, _) in enumerate(plots.STYLES)]
    shapes = re.findall(r"\.p(\d)::before \{\n  content: \"\\(\w+)\" / \"\";\n  color: var\(--p(\d)\)", style)
    assert "".join(chr(int(code, 16)) for _, code, _ in shapes) == "●■▲◆▼✚✖" and len(shapes) == STYLES
    assert all(name == ink for name, _, ink in shapes)
    assert [marker for _, marker in plots.STYLES] == list("os^DvPX")


# --- the page ---


def test_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "demo")
    assert html(folder, *markdown(folder), users=9) == html(folder, *markdown(folder), users=9)


def test_the_page_fetches_nothing_and_runs_only_its_own(tmp_path: Path) -> None:
    """The policy names the hash of each script and style that there is, and of no other; no address is outside."""
    text = html(run_dir(tmp_path / "demo"))
    policy = next(a["content"] for tag, a in Reader(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    blocks = re.findall(r"<(?:style|script type=\"module\")>(.*?)</(?:style|script)>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    assert re.findall(r"'sha256-(.*?)'", policy) == hashes and len(hashes) == 3
    links = [value for _, a in Reader(text).elements for name, value in a.items() if name in ("href", "src", "action")]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    for source in (*TEMPLATES.glob("*.js"), TEMPLATES / "capacity.css"):
        assert not re.search(r"https?:|url\(|@import|</|<!--|innerHTML|\beval\b", source.read_text()), source.name


def test_the_island_cannot_be_left(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><!-- {{ 7 }} \"'"
    points = [replace(point, precision=name if point.precision == "awq" else "bf16") for point in POINTS]
    text = html(run_dir(tmp_path / "demo", points), api_name=name, users=9)
    island = text.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&'") & set(island)
    data = json.loads(island)
    assert data["precisions"][1]["name"] == name.upper() and data["assumptions"]["api_name"] == name
    assert text.count("<script") == 3


@pytest.mark.parametrize(
    "points",
    [
        pytest.param([row("bf16", 0, 90, 900, rate_rps=2.5, arrivals="trace")], id="one trace"),
        pytest.param([SweepPoint("demo", "bf16", 1), SweepPoint("demo", "awq", 8)], id="every cell failed"),
    ],
)
def test_no_panel_where_there_is_nothing_to_ask(tmp_path: Path, points: list[SweepPoint]) -> None:
    folder = run_dir(tmp_path / "demo", points)
    text = html(folder, *markdown(folder))
    assert "<h1>Capacity" in text and "what-if" not in text.split("<body>")[1] and text.count("<script") == 1


# --- what the panel is given ---


def test_levels_of_the_panel(tmp_path: Path) -> None:
    """Invalid rows are no levels, and neither are those without a figure for a limit; of an owned card the electricity
    is in the level: 100 W idle and 40 W of host at 0.5 USD a kWh and a PUE of 2 are 140 × 2 / 1000 × 0.5 = 0.14 USD an
    hour, the 160 W that load adds 0.16."""
    points = [
        *POINTS, row("awq", 16, 700, 1000, verdict="invalid"), row("awq", 32, 900, 2000, ttft_p95_ms=None),
    ]  # fmt: skip
    points = [replace(p, ttft_p95_ms=p.ttft_p95_ms if p.conc == 32 else 50.0, power_w=260.0) for p in points]
    toml = RUN_TOML.replace("slo_p95_s = 3.0", "slo_p95_s = 3.0\nslo_ttft_s = 0.5")
    run = load_run(run_dir(tmp_path / "demo", points, toml))
    found = panel(run, Assumptions(card_usd=1000, idle_watts=100, host_watts=40, pue=2, usd_per_kwh=0.5))
    assert found is not None and found.names == ["BF16", "AWQ"] and found.data["limits"] == ["p95", "ttft"]
    assert (found.data["assumptions"]["p95"], found.data["assumptions"]["ttft"]) == (3.0, 0.5)
    bf16, awq = found.data["precisions"]
    assert [[level["load"] for level in levels["levels"]] for levels in (bf16, awq)] == [[1, 8], [1, 8]]
    level = bf16["levels"][1]
    assert level["limits"] == [(2200, pytest.approx(1980), pytest.approx(2420)), (50, 50, 50)]
    assert (level["idle_usd"], level["load_usd"]) == (pytest.approx(0.14), pytest.approx(0.16))
    assert level["tok_s"] == (240, 228, 252) and (level["req_s"], level["verdict"]) == (7.5, "valid")


def test_prices_of_two_levels(tmp_path: Path) -> None:
    """AWQ at 8 users makes 420 tokens a second, BF16 at 1 user 35: a token costs 35 / 420 = 0.0833 of BF16's. Ends by
    MOVER: both rates are known to ±5 %, so ln ± √(ln² 1.05 + ln² 0.95) = ± 0.0708, 0.0776 to 0.0894."""
    found = panel(load_run(run_dir(tmp_path / "demo")), Assumptions())
    assert found is not None and found.data["precisions"][0]["per_token"] == []
    value, high, low = found.data["precisions"][1]["per_token"][0][1]
    assert value == pytest.approx(35 / 420)
    assert (low, high) == (pytest.approx(0.0776, abs=5e-5), pytest.approx(0.0894, abs=5e-5))


def test_prices_are_not_compared_where_only_one_pays_for_electricity(tmp_path: Path) -> None:
    points = [replace(point, power_w=200.0 if point.precision == "awq" else None) for point in POINTS]
    found = panel(load_run(run_dir(tmp_path / "demo", points)), Assumptions(card_usd=1000, usd_per_kwh=0.3))
    assert found is not None and found.data["precisions"][1]["per_token"][1][1] == [None, None, None]


ASSUMED = [
    Assumptions(),
    Assumptions(card_usd=900, users=12, requests_per_day=5e5, peak_rps=40.0),
]


@pytest.mark.parametrize("assumptions", ASSUMED, ids=["rented", "owned"])
def test_knobs_allow_what_the_library_allows(tmp_path: Path, assumptions: Assumptions) -> None:
    """Both ends of each number are assumptions that the library takes, and what lies just beyond them is none."""
    found = panel(load_run(run_dir(tmp_path / "demo")), assumptions)
    assert found is not None
    knobs = [knob for _, group in found.groups for knob in group]
    names = {"rented": {"usd_per_hour", "peak_factor"}, "owned": {"card_usd", "peak_rps"}}
    assert {knob.name for knob in knobs} == names["owned" if assumptions.owned else "rented"] | {
        "p95", "utilisation", "users", "requests_per_day", "headroom", "failover",
    }  # fmt: skip
    for knob in knobs:
        assert knob.least <= knob.low < knob.high <= knob.most
        assert knob.value is None or knob.low <= float(knob.shown) <= knob.high
        if knob.name != "p95":
            accepted(knob, knob.least), accepted(knob, knob.most)
            for beyond in (knob.least * (1 - 1e-9) - 1e-12, knob.most * (1 + 1e-9)):
                with pytest.raises(InputError):
                    accepted(knob, beyond)


def accepted(knob: Knob, figure: float) -> None:
    value = figure / knob.parts
    alone = Assumptions(card_usd=1) if knob.name == "card_usd" else Assumptions()
    check_assumptions(replace(alone, **{knob.name: value}))  # type: ignore[arg-type]


def test_a_knob_shows_what_was_assumed(tmp_path: Path) -> None:
    found = panel(load_run(run_dir(tmp_path / "demo")), Assumptions(utilisation=0.07, headroom=0.3333333333333333))
    assert found is not None
    shown = {knob.name: knob.shown for _, group in found.groups for knob in group}
    assert shown == {
        "p95": "3", "usd_per_hour": "0.36", "utilisation": "7", "users": "", "requests_per_day": "", "peak_factor": "3",
        "headroom": "33.3333333333", "failover": "1",
    }  # fmt: skip
