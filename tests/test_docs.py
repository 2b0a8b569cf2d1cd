"""Every command that the documentation prints: each is read by its own parser; each block is run, or says why not.

They run as printed in a home that is empty, by the installed `bench`, page after page in one directory, so that what
one leaves the next finds. Words in capitals (MODEL, RUN, FILE) stand for what SUBSTITUTES says.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
from doc_commands import Block, Span, blocks, pages, program, spans, to_run

from harness.engines.environment import EngineEnv

ROOT = Path(__file__).resolve().parents[1]
RUN, OTHER = "demo-until-p95-500ms", "qwen2.5-0.5b-shape"
SUBSTITUTES = {
    "ORG/MODEL-AWQ": "demo",
    "ORG/MODEL": "demo",
    "results/RUN --beside results/RAG": f"results/{RUN} --beside results/{OTHER}",
    "results/BEFORE results/AFTER": f"results/{OTHER} results/{OTHER}",
    "--out results/RUN": "--out results/predicted",
    "results/RAG": "results/rag",
    "results/RUN": f"results/{RUN}",
    "results/<run>": f"results/{RUN}",
    "--engine-log FILE": f"--engine-log results/{OTHER}/engine-awq-r1.log",
    "--assume FILE": f"--assume results/{RUN}/assumptions.toml",
    "--fidelity [FILE]": "--fidelity",
    "--api ID": "--api openai-gpt-5-mini",
    "--model NAME": "--model truth",
    "quantize MODEL": "quantize demo",
    "recover MODEL": "recover demo",
    "gpus --model MODEL": "gpus --model qwen2.5-1.5b",
    "--model MODEL": "--model demo",
    "inspect DIR": f"inspect {ROOT / 'scenarios' / 'demo-model'}",
    "--out DIR": "--out made",
    "--engine-python PATH": "--engine-python python3",
}
PLACEHOLDER = re.compile(r"(?<![\w./@-])[A-Z]{2,}(?![\w-])|<\w+>|\.\.\.")

ENGINE = "bench sweep --precisions bf16,awq --conc 1,8,16,32"
"""README and tutorial begin with it: it is run once, by the real engine."""

TABLES_RUN = (
    "bench init",
    "bench sweep sweep.toml --plan",
    "bench scenarios",
    "bench precisions",
    "bench sweep --model shape:qwen2.5-7b --conc 1,8,16,32 --plan",
    "bench sweep --endpoint http://HOST:PORT --model NAME --conc 4 --json",
    "bench prices",
    "bench report results/RUN --slo p95=2s --assume FILE",
    "bench report results/RUN --beside results/RAG",
    "bench compare results/BEFORE results/AFTER",
    "bench doctor --engine-log FILE",
    "bench predict --gpu rtx-4080 --model qwen2.5-7b --precisions bf16,awq --out results/RUN",
    "bench sweep --engine simulated --gpu rtx-4080 --model qwen2.5-7b",
    "bench gpus --model MODEL --users 50 --slo p95=2s",
    "bench calibrate results/RUN --out my-card.toml",
    "bench history",
)
"""What README's tables print and costs seconds. The others there measure, train or serve; they are parsed."""


@dataclass(frozen=True)
class Place:
    """Where commands run."""

    work: Path
    around: dict[str, str]

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.work, env=self.around, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An empty home, and a directory with the committed runs."""
    root = tmp_path_factory.mktemp("docs")
    work, home = root / "work", root / "home"
    home.mkdir()
    shutil.copytree(ROOT / "results", work / "results", ignore=shutil.ignore_patterns("2*", "trace-*", "kernels.csv"))
    shutil.rmtree(work / "results" / "qwen2.5-0.5b-timeline", ignore_errors=True)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.defpath))
    return Place(work, {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "COLUMNS": "80"})


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def all_blocks() -> tuple[Block, ...]:
    return tuple(block for page in pages() for block in blocks(text_of(page), name_of(page)))


@cache
def all_spans() -> tuple[Span, ...]:
    return tuple(span for page in pages() for span in spans(text_of(page), name_of(page)))


def filled(command: str) -> str:
    """A command without words that stand for something. Raises ValueError for one that SUBSTITUTES does not know."""
    for word, value in SUBSTITUTES.items():
        command = command.replace(word, value)
    left = PLACEHOLDER.search(command.replace("http://HOST:PORT", ""))
    if left:
        raise ValueError(f"{command}: what does {left[0]} stand for?")
    return command


# --- each command is read by its own parser ---------------------------------------------------------------------------


@cache
def commands() -> dict[str, Any]:
    return dict(reference.commands())


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command's own parser read it. Raises AssertionError for an unknown command or option."""
    words = shlex.split(re.split(r" (?:\||>|&&) ", command)[0])
    words = words[next(i for i, word in enumerate(words) if word == "bench") + 1 :]
    if words in (["--version"], ["--help"]):
        return
    length = 2 if " ".join(words[:2]) in commands() else 1
    name, rest = " ".join(words[:length]), words[length:]
    assert name in commands(), f"no command: bench {name}"
    if rest == ["--help"]:
        return
    if name in reference.PARSED:
        parser = reference.parser_of(reference.PARSED[name], name)
        monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
        parser.parse_args(rest)
    else:
        commands()[name].make_context(name, rest)


def refuse(parser: argparse.ArgumentParser, message: str) -> None:
    raise AssertionError(f"{parser.prog}: {message}")


def is_whole(text: str) -> bool:
    """Whether a span is a command that can be typed; one with an ellipsis is not."""
    return text.startswith("bench ") and "..." not in text


def test_every_command_of_a_block_or_a_table_is_one_that_its_parser_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text('model = "demo"\n', encoding="utf-8")
    printed = [(f"{block.page}:{block.line}", line) for block in all_blocks() for line in block.commands]
    printed += [(f"{span.page}:{span.line}", span.text) for span in all_spans()
                if span.page == "README.md" and span.in_table and is_whole(span.text)]  # fmt: skip
    wrong, read = [], 0
    for where, command in printed:
        if program(command) != "bench" or "..." in command:
            continue
        read += 1
        try:
            with monkeypatch.context() as patch:
                parse(filled(command), patch)
        except (Exception, SystemExit) as error:
            wrong.append(f"{where}: {command}: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)
    assert read > 60


FOREIGN = {
    "--dtype", "--host", "--trust-remote-code",  # vLLM's own
    "--env", "--gpus", "--ipc", "--user",  # docker's
    "--node-ip-address",  # ray's
    "--strict",  # mkdocs'
}  # fmt: skip
"""Options of others that pages name."""


def known_options() -> set[str]:
    found = {"--help", "--version", "--install-completion", "--show-completion"}
    for name, command in commands().items():
        for typed, *_ in reference.options(name, command):
            found.update(re.findall(r"--[a-z0-9-]+", typed))
    return found


def test_every_option_that_a_page_names_exists() -> None:
    """Also in pieces of commands: `--until`, `bench quality --run`."""
    known = known_options() | FOREIGN
    tools = "".join(
        text_of(path) for folder in ("tools", "benchmarks", "quantize") for path in (ROOT / folder).rglob("*.py")
    )
    wrong = [
        f"{span.page}:{span.line}: {option} in `{span.text}`"
        for span in all_spans()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span.text)
        if option not in known and f'"{option}"' not in tools
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_every_target_of_make_that_a_page_names_exists() -> None:
    made = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    printed = [(f"{span.page}:{span.line}", span.text) for span in all_spans()]
    printed += [(f"{block.page}:{block.line}", line) for block in all_blocks() for line in block.commands]
    named = [(where, text.split()[1]) for where, text in printed if re.match(r"make [a-z]", text)]
    assert len(named) > 10
    assert not [one for one in named if one[1] not in made]


# --- each block is run, or says why not -------------------------------------------------------------------------------


def runnable() -> Iterator[Block]:
    return (block for block in all_blocks() if block.not_run is None)


def test_what_is_not_run_says_why() -> None:
    reasons = [block.not_run for block in all_blocks() if block.not_run is not None]
    assert reasons and all(len(reason) > 8 for reason in reasons)


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in runnable()))
def test_the_commands_of_a_page_do_what_they_say(page: str, place: Place) -> None:
    """In order, as printed. The one that measures is run by the test below."""
    for block in runnable():
        for command in block.commands if block.page == page else ():
            if command != ENGINE:
                place.run(filled(command))


@pytest.mark.engine
def test_the_first_command_of_readme_and_tutorial_measures(place: Place, engine_env: EngineEnv, tmp_path: Path) -> None:
    """The engine is found where `bench engine install` puts it: in the user's cache."""
    assert {block.page for block in runnable() if ENGINE in block.commands} == {"README.md", "docs/tutorial.md"}
    cache_dir = tmp_path / "kneebench" / "engines"
    cache_dir.mkdir(parents=True)
    (cache_dir / engine_env.kind).symlink_to(engine_env.python.parent.parent)
    there = Place(tmp_path, {**place.around, "XDG_CACHE_HOME": str(tmp_path)})
    said = there.run(ENGINE)
    (points,) = (tmp_path / "results").glob("*-demo-chat/points.csv")
    assert len(points.read_text(encoding="utf-8").splitlines()) == 1 + 8
    assert points.relative_to(tmp_path).as_posix() in said
    run = points.parent.name
    there.run(f"bench report results/{run}")
    assert (tmp_path / "reports" / run / "capacity.html").exists()


@pytest.mark.parametrize("command", TABLES_RUN)
def test_what_the_tables_print_and_is_cheap_runs(command: str, place: Place, truth: Callable[..., str]) -> None:
    """In order: what `bench init` writes, `bench sweep sweep.toml` reads."""
    printed = {span.text for span in all_spans() if span.page == "README.md" and span.in_table}
    printed |= {line for block in all_blocks() for line in block.commands}
    assert command in printed, "printed nowhere: take it from TABLES_RUN"
    if command == "bench init":
        (place.work / "sweep.toml").unlink(missing_ok=True)  # a page before may have made it
    if "HOST:PORT" in command:
        command = command.replace("http://HOST:PORT", truth("--ttft-ms", "5", "--gap-ms", "1"))
    place.run(filled(command))


# --- the tests' own tools ---------------------------------------------------------------------------------------------


def test_blocks_are_found_marked_and_joined() -> None:
    text = """
<!-- not run: needs a GPU -->
```bash
bench sweep --conc 1 \\
  --out a     # a comment
```

    bench history

<!-- not run: needs a GPU -->

A sentence between, so the next is not marked.

    tok_s = tokens / s

    bench doctor    # says "what # is" here
"""
    first, second, third = blocks(text.replace("    tok_s = tokens / s\n\n", ""), "a.md")
    assert first == Block("a.md", 3, ("bench sweep --conc 1 --out a",), "needs a GPU")
    assert second.commands == ("bench history",) and second.not_run is None
    assert third.commands == ("bench doctor",) and third.not_run is None
    assert blocks("    tok_s = tokens / s\n", "a.md") == []


def test_a_word_that_stands_for_nothing_is_told() -> None:
    with pytest.raises(ValueError, match="UNHEARD"):
        filled("bench report UNHEARD")
    assert filled("bench report results/RUN") == f"bench report results/{RUN}"


@pytest.mark.parametrize(
    "command", ["bench dance", "bench sweep --no-such", "bench quantize demo --no-such", "bench truth --ttft-ms x"]
)
def test_a_command_that_does_not_exist_is_told(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseException, match="(?i)no such|no command|unrecognized|invalid"):
        parse(command, monkeypatch)


def test_a_fresh_user_is_given_what_is_run_once_and_told_what_is_left_out() -> None:
    first = Block("a.md", 3, ("bench report results/RUN", "bench history"))
    second = Block("a.md", 9, ("bench history", "bench compare results/BEFORE results/AFTER"))
    marked = Block("b.md", 1, ("bench sweep",), "needs a GPU")
    assert to_run([first, second, marked], "x-demo-chat") == [
        "bench report results/x-demo-chat", "bench history", "bench compare results/x-demo-chat results/x-demo-chat",
        "# b.md:1 left out: needs a GPU",
    ]  # fmt: skip
