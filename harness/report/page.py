"""A Markdown page out of its template; that of a predicted run owns up in every block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from harness.analysis.words import MEASURED, Words
from harness.files import write_whole
from harness.report.predicted import marked


def write_page(template: str, path: Path, words: Words = MEASURED, **fill: Any) -> Path:
    """Fill a template of templates/ and write it to `path`: no two empty lines in a row, one line's end at the end.

    The template finds `words` beside what fills it.
    """
    templates = Environment(
        loader=PackageLoader("harness.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML; text from outside goes through escape()
    )
    page = templates.get_template(template).render(words=words, **fill)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"
    write_whole(path, marked(whole, words))
    return path
