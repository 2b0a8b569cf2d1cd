"""The commands that the documentation prints, as data: what tests/test_docs.py runs, parses or finds marked.

    python tools/doc_commands.py README.md docs/tutorial.md              prints them, in order
    python tools/doc_commands.py --run NAME README.md docs/tutorial.md   only what is to be run, once, with RUN = NAME

A block of commands is fenced (```bash, ```console or without a language) or indented, and begins with a program that is
known here. One that no test runs has an HTML comment right before it that says why:

    <!-- not run: needs a GPU -->

Commands in code spans count as well: whole ones where they stand in a table, pieces of them elsewhere.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    "bench", "make", "pip", "python", "python3", ".", "ray", "torchrun", "docker", "nvidia-smi", "sudo", "export",
    "compute-sanitizer", "mkdocs", ".ci/run", "git", "tools/fresh.sh",
)  # fmt: skip
NOT_RUN = re.compile(r"<!-- not run(?: in CI)?: (?P<why>\S.*?) -->\s*", re.DOTALL)
SHELL = ("", "bash", "console", "sh")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of commands."""

    page: str
    line: int
    """Where it begins, from 1."""
    commands: tuple[str, ...]
    """One a line; comments are taken off, continued lines joined."""
    not_run: str | None = None
    """Why no test runs it; None: one does."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of code within a line."""

    page: str
    line: int
    text: str
    in_table: bool


def pages() -> list[Path]:
    """What is documentation: the pages at the root and in docs/ (with docs/reference, which has no blocks)."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, page: str) -> list[Block]:
    """The blocks of commands of a page, in order."""
    found: list[Block] = []
    before: Token | None = None
    for token in _tokens(text):
        if token.type in ("fence", "code_block"):
            commands = _commands(token)
            if commands:
                assert token.map is not None
                marked = NOT_RUN.fullmatch(before.content) if before and before.type == "html_block" else None
                why = " ".join(marked["why"].split()) if marked else None
                found.append(Block(page, token.map[0] + 1, commands, why))
        before = token
    return found


def spans(text: str, page: str) -> list[Span]:
    """The code spans of a page, in order."""
    found, depth, line = [], 0, 0
    for token in _tokens(text):
        line = token.map[0] + 1 if token.map else line
        depth += {"table_open": 1, "table_close": -1}.get(token.type, 0)
        for child in token.children or ():
            if child.type == "code_inline":
                found.append(Span(page, line, " ".join(child.content.split()), depth > 0))
    return found


def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def _commands(token: Token) -> tuple[str, ...]:
    if token.info.strip() not in SHELL:
        return ()
    joined = re.sub(r"[ ]*\\\n\s*", " ", token.content)
    lines = [re.sub(r"(^|\s+)#\s.*$", "", line).strip().removeprefix("$ ") for line in joined.splitlines()]
    lines = [line for line in lines if line]
    is_shell = lines and program(lines[0]) in PROGRAMS
    if token.info.strip() and not is_shell:
        raise ValueError(f"a block of shell that begins with {lines[:1]}: a program that PROGRAMS lacks?")
    return tuple(lines) if is_shell else ()


def program(command: str) -> str:
    """What a line runs: its first word that sets no variable."""
    words = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "X", command).split()
    return next((word for word in words if not re.match(r"[A-Z_]+=", word)), "")


def to_run(found: list[Block], run: str) -> list[str]:
    """Commands of blocks that are run, each once, with the words that stand for runs filled in; and, as a comment, each
    block that is left out, with the reason."""
    lines: list[str] = []
    for block in found:
        if block.not_run is not None:
            lines.append(f"# {block.page}:{block.line} left out: {block.not_run}")
        else:
            lines += [re.sub(r"\b(RUN|BEFORE|AFTER)\b", run, command) for command in block.commands]
    return list(dict.fromkeys(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="The commands that pages print.")
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--run", metavar="NAME", help="only what is to be run, with RUN = NAME")
    given = parser.parse_args()
    found = [block for name in given.pages for block in blocks(Path(name).read_text(encoding="utf-8"), name)]
    if given.run is not None:
        print("\n".join(to_run(found, given.run)))
        return
    for block in found:
        print(f"# {block.page}:{block.line}" + (f" not run: {block.not_run}" if block.not_run else ""))
        print("\n".join(block.commands))


if __name__ == "__main__":
    main()
