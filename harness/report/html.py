"""capacity.html: one file that asks nobody for anything, and that opens in any browser in ten years' time.

    capacity.md ───────────► dress() ──────┐
    figures/*.svg ─────────► inline_svg() ─┼─► templates/capacity.html.j2 ─► capacity.html
    levels, assumptions ───► whatif.panel() ┘   capacity.css, capacity.js, whatif.js

It says what capacity.md says because it is made from its text: a table or a sentence that the one gains, the other has.
What it adds is what paper cannot do: columns that sort (capacity.js), and the what-if panel, which reads the tested
levels and the assumptions from a JSON island and computes safe load, cards and cost in the browser (whatif.js).

Text from outside passes three walls. Markdown's escapes are read back by a parser that knows no HTML, no links and no
entities, and writes text as text; the island holds no `<`; and the page's own policy runs the one script and the one
style sheet whose hashes it names, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from markupsafe import Markup, escape

from harness.analysis.headline import label
from harness.analysis.levels import precision_order
from harness.assumptions import Assumptions
from harness.files import write_whole
from harness.report.run import Run
from harness.report.whatif import panel

_READER = MarkdownIt("zero").enable(
    ["heading", "list", "blockquote", "fence", "table", "newline", "emphasis", "escape", "backticks", "image"]
)
"""Our own Markdown and no more: links, raw HTML and entities are no part of it, so no name can turn into one."""

STYLES = 7
"""Kinds of marker that a precision can have, here as in plots.STYLES; the style sheet has their shapes and inks."""

_SHAPES = ("svg", "g", "defs", "clipPath", "path", "rect", "use")
"""Elements of a figure that are kept; matplotlib draws everything, letters too, with these."""


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of the page: what stands under one `##` of the Markdown."""

    id: str
    title: str
    body: Markup


def write_html(run: Run, assumptions: Assumptions, page: str, figures: Sequence[Path], out: Path) -> Path:
    """Write the page to `out`. `page` is the text of capacity.md, `figures` hold the SVGs that it names."""
    templates = Environment(
        loader=PackageLoader("harness.report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawings = {path.stem: path for path in figures if path.suffix == ".svg"}
    opening, sections = dress(page, drawings, precision_order(run.points))
    asked = panel(run, assumptions)
    style = _source("capacity.css")
    scripts = [_source(name) for name in ("capacity.js", *(["whatif.js"] if asked else []))]
    if run.predicted:
        scripts = [script.replace("`Tested ${", "`Simulated ${") for script in scripts]
    text = templates.get_template("capacity.html.j2").render(
        title=f"Capacity{run.words.also}: {run.model}, {run.scenario_name} scenario",
        words=run.words,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        style=style,
        scripts=scripts,
        opening=opening,
        sections=sections,
        panel=asked,
    )
    write_whole(out, text)
    return out


def _source(name: str) -> Markup:
    """A style sheet or script of ours, to stand inside its element as it is."""
    return Markup(resources.files("harness.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _hash(source: str) -> str:
    """How a content security policy names an inline script or style (CSP level 2)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


# --- the words --------------------------------------------------------------------------------------------------------


def dress(page: str, drawings: Mapping[str, Path], precisions: Sequence[str]) -> tuple[Markup, list[Section]]:
    """The Markdown of capacity.md as HTML: what stands before its first chapter, and the chapters.

    `drawings` are SVG files by the stem of what an image names; an image without one leaves its words. Precisions and
    verdicts in tables get classes, which give them a shape beside their colour.
    """
    marks = {label(precision): f"p{index % STYLES}" for index, precision in enumerate(precisions)}
    chapters: list[tuple[str, list[Markup]]] = [("", [])]
    for node in SyntaxTreeNode(_READER.parse(page)).children:
        if node.type == "heading" and node.tag == "h2":
            chapters.append((_words(node), []))
        else:
            title, body = chapters[-1]
            body.append(_block(node, title, drawings, marks))
    sections: list[Section] = []
    for title, body in chapters[1:]:
        sections.append(Section(_slug(title, {section.id for section in sections}), title, Markup("").join(body)))
    return Markup("").join(chapters[0][1]), sections


def _block(node: SyntaxTreeNode, title: str, drawings: Mapping[str, Path], marks: Mapping[str, str]) -> Markup:
    if node.type == "table":
        return _table(node, title, marks)
    if node.type == "paragraph" and [child.type for child in node.children[0].children] == ["image"]:
        image = node.children[0].children[0]
        stem = PurePosixPath(str(image.attrs["src"])).stem
        if stem in drawings:
            drawing = inline_svg(drawings[stem].read_text(encoding="utf-8"), f"{stem}-", _words(image))
            return _tag("figure", drawing, tabindex="0")
    return Markup(_READER.renderer.render(node.to_tokens(), _READER.options, {}))


def _table(node: SyntaxTreeNode, title: str, marks: Mapping[str, str]) -> Markup:
    """A table in a box that scrolls by itself. One without a header lists names and what they stand for."""
    head, *body = (row.children for part in node.children for row in part.children)
    names = [_words(cell) for cell in head]
    listing = not any(names)
    rows = [
        _tag("tr", *(_cell(cell, "row" if listing and not at else "", _mark(names[at], cell, marks))
                     for at, cell in enumerate(row)))
        for row in body
    ]  # fmt: skip
    header = [] if listing else [_tag("thead", _tag("tr", *(_cell(cell, "col") for cell in head)))]
    table = _tag("table", *header, _tag("tbody", *rows), kind="listing" if listing else "sortable")
    return _tag("div", table, kind="scroll", role="region", aria_label=f"{title}: table", tabindex="0")


def _cell(cell: SyntaxTreeNode, scope: str, mark: str = "") -> Markup:
    """A cell, a heading where it has a scope; figures stand to the right, as the Markdown says."""
    content = Markup(_READER.renderer.render(cell.children[0].to_tokens(), _READER.options, {}))
    kinds = (mark, "number" if "right" in str(cell.attrs.get("style")) else "")
    return _tag("th" if scope else "td", content, scope=scope, kind=" ".join(filter(None, kinds)))


def _mark(column: str, cell: SyntaxTreeNode, marks: Mapping[str, str]) -> str:
    """The class of a cell that says which precision it is, or how far it can be trusted."""
    words = _words(cell)
    if column.partition(",")[0] == "Precision":
        return marks.get(words, "")
    verdict = words.partition(":")[0]
    return verdict if column == "Verdict" and verdict in ("valid", "suspect", "invalid") else ""


def _tag(name: str, *content: str, kind: str = "", **attributes: str) -> Markup:
    """An element; `kind` is its class, and an attribute without a value is left out."""
    given = {"class": kind, **{key.replace("_", "-"): value for key, value in attributes.items()}}
    said = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in given.items() if value)
    return Markup("<{0}{1}>{2}</{0}>\n").format(name, said, Markup("").join(content))


def _words(node: SyntaxTreeNode) -> str:
    """The text of a node, without its marks."""
    if node.type in ("text", "text_special", "code_inline"):
        return node.content
    return " " if node.type == "softbreak" else "".join(map(_words, node.children))


def _image_words(_: object, tokens: Sequence[Token], at: int, *__: object) -> str:
    """An image without its figure leaves its words."""
    return escape(_words(SyntaxTreeNode([tokens[at]])))


_READER.add_render_rule("image", _image_words)


def _slug(title: str, taken: set[str]) -> str:
    """An id out of a title: letters and digits joined by hyphens, numbered where it would not be the first."""
    stem = "-".join(("s", *re.findall(r"[a-z0-9]+", title.lower())))
    return stem if stem not in taken else f"{stem}-{len(taken)}"


# --- the figures ------------------------------------------------------------------------------------------------------


def inline_svg(svg: str, prefix: str, alt: str) -> Markup:
    """A figure of plots.py as an element of the page, named `alt` for whoever cannot see it.

    Its ids begin with `prefix`, so that several figures can stand on one page. Styles become attributes, which the
    page's policy allows and its style sheet can recolour. What is no shape and no reference within is left out.
    """
    root = _drawn(ElementTree.fromstring(svg), prefix)
    kept = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    root.attrib = kept | {"stroke-linejoin": "round", "stroke-linecap": "butt"}  # what matplotlib's own <style> says
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _drawn(element: ElementTree.Element, prefix: str) -> ElementTree.Element:
    attributes: dict[str, str] = {}
    for name, value in element.attrib.items():
        if name == "style":
            pairs = (pair.partition(":") for pair in value.split(";") if pair.strip())
            attributes |= {key.strip(): setting.strip() for key, _, setting in pairs}
        else:
            attributes[_local(name)] = value
    made = ElementTree.Element(_local(element.tag))
    for name, value in attributes.items():
        if name == "id":
            made.set(name, prefix + value)
        elif name == "href":
            made.set(name, f"#{prefix}{value.removeprefix('#')}")
        elif not name.startswith("on"):
            made.set(name, value.replace("url(#", f"url(#{prefix}"))
    made.extend(_drawn(child, prefix) for child in element if _local(child.tag) in _SHAPES)
    return made


def _local(name: str) -> str:
    """A name without its namespace: inside HTML an SVG element needs none."""
    return name.rpartition("}")[2]
