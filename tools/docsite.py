"""Hook of mkdocs.yml: the site is docs/ and whatever of the repository its pages link to.

On GitHub a page links to its neighbours in the repository: docs/quality.md to ../scenarios/demo-model/README.md,
README.md to a report. The site keeps those links: what they lead to becomes part of it, pages as pages, tables and
figures as files, and the links are turned towards it. README.md is the site's first page. Links that lead nowhere are
left alone, so that `mkdocs build --strict` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import normpath, relpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<after>(?:#[^)\s]*)?\))")
"""`](path#heading)`; what has a colon is an address."""


def place(path: str) -> str:
    """Where a file of the repository stands in the site's sources: docs/a.md -> a.md, README.md -> index.md."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def origin(place_in_site: str) -> str:
    """The other way round: which file of the repository it is."""
    if place_in_site == "index.md":
        return "README.md"
    return f"docs/{place_in_site}" if (ROOT / "docs" / place_in_site).exists() else place_in_site


def linked(path: str) -> Iterator[str]:
    """Files of the repository that a page of it links to."""
    for link in LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        target = normpath(f"{Path(path).parent}/{link['target']}")
        if not target.startswith("..") and (ROOT / target).is_file():
            yield target


def on_files(files: Any, config: Any) -> Any:
    """Adds the first pages, and what is linked from any page that is in the site."""
    waiting = [*FIRST, *(origin(file.src_uri) for file in files if file.is_documentation_page())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(place(path)) is None:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting.extend(linked(path))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turns links that leave a page's folder towards where their targets stand in the site."""
    here = page.file.src_uri
    path = origin(here)

    def turned(link: re.Match[str]) -> str:
        target = normpath(f"{Path(path).parent}/{link['target']}")
        if files.get_file_from_path(place(target)) is None:
            return link[0]
        return f"{link['before']}{relpath(place(target), Path(here).parent)}{link['after']}"

    return LINK.sub(turned, markdown)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Takes out the one script that the theme's plugin `offline` fetches from elsewhere; without it a site that is read
    from a disk has no search, and one that is served has it."""
    return re.sub(r'<script src="https?://[^"]*"></script>', "", output)


def on_post_template(output: str, *, template_name: str, config: Any) -> str:
    """The same for pages that are no document, as 404.html."""
    return on_post_page(output, page=None, config=config) if template_name.endswith(".html") else output
