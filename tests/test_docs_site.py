"""The documentation's site: it builds without a warning, its links lead somewhere, it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import docsite
import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = [sys.executable, "-m", "mkdocs", "build", "--strict"]
QUIETLY = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A link or an anchor that leads nowhere fails here: --strict."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([*BUILD, "--site-dir", str(folder)], cwd=ROOT, env=QUIETLY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page loads, what it links to, and the anchors it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(name for name in (given.get("id"), given.get("name")) if name)
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag == "link" and given.get("rel") in ("prev", "next", "canonical"):
            pass
        else:
            self.loads.extend(str(given[name]) for name in ("src", "href") if given.get(name))


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).scheme or urlsplit(address).netloc) and not address.startswith("data:")


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = {(page.name, what) for page in site.rglob("*.html") for what in Links(page).loads}
    assert len(loaded) > 50
    assert not [found for found in loaded if is_elsewhere(found[1])]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)


def test_its_links_lead_somewhere(site: Path) -> None:
    """Also those that mkdocs does not check: from reports and other pages of the repository, and their anchors."""
    pages = {
        page: Links(page) for page in site.rglob("*.html") if "capacity.html" != page.name and page.name != "404.html"
    }
    checked, broken = 0, []
    for page, found in pages.items():
        for link in found.links:
            if is_elsewhere(link):
                continue
            parts = urlsplit(link)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            checked += 1
            if not target.exists():
                broken.append(f"{page.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{page.relative_to(site)}: {link} (no such place)")
    assert checked > 500 and not broken, "\n".join(broken)


def test_readme_is_home_and_its_links_stay_in_the_site(site: Path) -> None:
    home = Links(site / "index.html")
    assert {"quantization.html", "reports/qwen2.5-0.5b-shape/capacity.html"} <= set(home.links)
    assert (site / "results" / "qwen2.5-0.5b-shape" / "points.csv").exists()


@pytest.mark.parametrize(
    "page", [*docsite.FIRST, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_work_on_github_too(page: str) -> None:
    """There a link is a path of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in docsite.LINK.finditer(text):
        assert ((ROOT / page).parent / link["target"]).exists(), f"{page}: {link['target']}"


def test_every_page_of_docs_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert not there - named - {"predictor/tables.md"}


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    for name in (
        "docs",
        "mkdocs.yml",
        "tools",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    with (tmp_path / "docs" / "tutorial.md").open("a", encoding="utf-8") as page:
        page.write("\nSee [nothing](nowhere.md).\n")
    done = subprocess.run([*BUILD, "--site-dir", "out"], cwd=tmp_path, env=QUIETLY, capture_output=True, text=True)
    assert done.returncode != 0 and "nowhere.md" in done.stderr
