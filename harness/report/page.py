"""A Markdown page out of its template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def write_page(template: str, path: Path, **words: Any) -> Path:
    """Fill a template of templates/ and write it to `path`: no two empty lines in a row, one line's end at the end."""
    templates = Environment(
        loader=PackageLoader("harness.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML; text from outside goes through escape()
    )
    page = templates.get_template(template).render(**words)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n", encoding="utf-8")
    return path
