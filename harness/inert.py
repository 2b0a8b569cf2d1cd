"""Text from outside made harmless for programs that take some text for orders: terminals and spreadsheets.

A model's name, an engine's last words, a server's error can hold anything. Markdown, HTML and workbooks have their own
walls (report/tables.py, html.py, workbook/pen.py); keys and paths are redact.py's. terminal.py prints through here.
"""

from __future__ import annotations

import re
import unicodedata

_FORMULA = r"'*[=+\-@\t\n\uff1d\uff0b\uff0d\uff20]"
_BEGINS_FORMULA = re.compile(rf"(?:(?<=[;\t\n])|\A)(?={_FORMULA})")
_GUARD = re.compile(rf"(?:(?<=[;\t\n])|\A)'(?={_FORMULA})")


def visible(text: str) -> str:
    """`text` with whatever a terminal would obey shown by its number, as ⟨U+001B⟩: escape sequences, carriage returns,
    marks of direction; and half a surrogate, which no file takes. Line ends, tabs and all kinds of spaces stay."""
    if text.isprintable():
        return text
    return "".join(letter if _harmless(letter) else f"⟨U+{ord(letter):04X}⟩" for letter in text)


def one_line(text: object) -> str:
    """`text` on one line, with nothing in it that a terminal or a table takes for something else than text."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(str(text).split())
    )


def cell(text: str) -> str:
    """`text`, made visible, for a CSV cell that a spreadsheet shows instead of computing: an apostrophe stands before
    what would be a formula.

    One begins with = + - @, a tab, a line end, or their full-width forms (OWASP, "CSV Injection"); also behind a
    semicolon, tab or line end, where a spreadsheet that separates cells otherwise than we do begins a new one. An
    apostrophe that the text itself has there gets one more, so `uncell` gives back the text.
    """
    return _BEGINS_FORMULA.sub("'", visible(text))


def uncell(text: str) -> str:
    """What `cell` was made of, made visible."""
    return _GUARD.sub("", text) if "'" in text else text


def _harmless(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs"
