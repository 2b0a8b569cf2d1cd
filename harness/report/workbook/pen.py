"""Writes cells: text that stays text, figures in their formats, formulas with the figure that they show unrecalculated.

The one module that hands text from outside to XlsxWriter. It goes through `plain` and `write_string`, so that a model
named =cmd|... is a word; no formula, name or format of the file is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xlsxwriter import Workbook
from xlsxwriter.format import Format
from xlsxwriter.worksheet import Worksheet

from harness.analysis.words import MEASURED, Words

LONGEST = 500
"""Characters of a text. A cell holds 32,767; nobody reads them, and only somebody up to no good writes them."""

FORMS = {
    "any": "General",
    "word": "General",
    "count": "#,##0",
    "rate": "#,##0.0",
    "seconds": "0.000",
    "gib": "#,##0.00",
    "usd": "#,##0.00",
    "price": "#,##0.0000",
    "small_price": "#,##0.000000",
    "share": "0.0%",
}
"""Number formats, by the word that a line says for its own."""

INK, FAINT, BAND = "#1F2933", "#667085", "#E4EAF1"
_HEADER = {"bold": True, "bg_color": INK, "font_color": "white", "text_wrap": True, "valign": "top", "border": 1,
           "border_color": "#CBD2D9"}  # fmt: skip
_STYLES: dict[str, dict[str, Any]] = {
    "title": {"bold": True, "font_size": 16},
    "lead": {"font_color": FAINT},
    "caution": {"bold": True, "font_color": "#9C2A10"},
    "header": _HEADER | {"align": "left", "indent": 1},
    "header_figure": _HEADER | {"align": "right"},
    "header_live": _HEADER | {"align": "right", "bg_color": "#7A5C00"},
    "section": {"bold": True, "bg_color": BAND},
    "term": {"bold": True, "bg_color": BAND, "valign": "top"},
    "label": {},
    "part": {"indent": 1},
    "how": {"font_color": FAINT, "italic": True, "indent": 1},
    "aside": {"font_color": FAINT, "italic": True, "align": "right"},
    "wrapped": {"text_wrap": True, "valign": "top"},
    "figure": {"align": "right"},
    "strong": {"align": "right", "bold": True},
    "left_out": {"align": "right", "font_color": "#98A2B3", "font_strikeout": True},
    "input": {"align": "right", "font_color": "#0B3D91", "bg_color": "#FFF3C4", "border": 1, "border_color": "#C9A227"},
    "right": {"font_color": "#067647"},
    "wrong": {"font_color": "#B42318", "bold": True},
}


def plain(text: object) -> str:
    """Text from outside on one line, as short as a reader bears, without what XML or a sheet cannot hold."""
    seen = "".join(character if character.isprintable() else " " for character in str(text))
    words = " ".join(seen.split())
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


@dataclass(slots=True)
class Pen:
    """A workbook being written; it keeps the formats that it has made, since each may be made once."""

    book: Workbook
    words: Words = MEASURED
    """How the run speaks of its figures."""
    _made: dict[tuple[str, str, bool], Format] = field(default_factory=dict)

    def format(self, style: str, form: str = "any", quoted: bool = False) -> Format:
        """`quoted`: the cell says that it holds text; else Excel reads it anew once it was opened and left again."""
        key = style, form, quoted
        if key not in self._made:
            shape = {"font_name": "Calibri", "font_color": INK, "num_format": FORMS[form], "quote_prefix": quoted}
            self._made[key] = self.book.add_format(shape | _STYLES[style])
        return self._made[key]

    def text(self, sheet: Worksheet, row: int, column: int, text: object, style: str = "label") -> None:
        """Text, from wherever."""
        sheet.write_string(row, column, self.words.reworded(plain(text)), self.format(style, quoted=True))

    def value(
        self, sheet: Worksheet, row: int, column: int, value: object, style: str = "figure", form: str = "any"
    ) -> None:
        """A figure as it is, anything else as text; an empty, formatted cell for None."""
        if value is None or value == "":
            sheet.write_blank(row, column, None, self.format(style, form))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            sheet.write_number(row, column, value, self.format(style, form))
        else:
            self.text(sheet, row, column, value, style)

    def formula(
        self,
        sheet: Worksheet,
        row: int,
        column: int,
        formula: str,
        value: float | str | None,
        form: str = "any",
        style: str = "figure",
    ) -> None:
        """A formula of ours, and what it comes to: the library's own figure."""
        shown = self.words.reworded(value) if isinstance(value, str) else "" if value is None else value
        sheet.write_formula(row, column, self.words.reworded(formula), self.format(style, form), shown)
