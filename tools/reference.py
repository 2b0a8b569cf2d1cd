"""docs/reference/*.md from the code: commands, columns, scenarios, precisions, verdicts, exit codes.

    python tools/reference.py

Nothing on these pages is written by hand, so none of it can grow old: options are read from the parsers, columns and
keys from the dataclasses and the docstrings under their fields, reasons and errors from the docstrings that list them.
tests/test_docs_reference.py holds the committed pages to what is generated.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import typer

from harness import cli, errors, listing, records
from harness.analysis import validity
from harness.scenario import scenario_names, scenarios_dir

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- made by tools/reference.py from the code: change the code, then run it again -->\n"

PARSED = {
    "quantize": "quantize.__main__",
    "kernels": "quantize.kernels.bench",
    "recover": "quantize.recover",
    "truth": "harness.load.truth",
}
"""Commands that read their arguments with argparse, in a module that works without the rest."""

TABLES: dict[str, type[Any]] = {
    "points.csv": records.SweepPoint,
    "requests.csv": records.RequestRecord,
    "gpu.csv": records.GpuSample,
    "comparison.csv": records.Ratio,
    "knees.csv": records.Knee,
    "failures.csv": records.Failure,
    "families.csv": records.Outcomes,
    "fidelity.csv": records.Fidelity,
    "positions.csv": records.Position,
    "samples.csv": records.Sample,
    "kernels.csv": records.KernelRow,
}
DOCUMENTS: dict[str, type[Any]] = {"environment.json": records.Environment, "answers.jsonl": records.Answer}

UNITS = (
    (r"^tok_s|_tok_s", "output tokens a second"),
    (r"^req_s|_rps", "requests a second"),
    (r"^chunks_s", "chunks a second"),
    (r"^usd_per_hour", "US dollars an hour"),
    (r"^usd_per_1m", "US dollars a million tokens"),
    (r"energy_j_per_token", "joules a token"),
    (r"_ms(_|$)", "ms"),
    (r"_us(_|$)", "µs"),
    (r"_ns(_|$)", "ns"),
    (r"_s(_|$)", "s"),
    (r"_gib(_|$)", "GiB (2^30 bytes)"),
    (r"_nats(_|$)|^kl_at", "nats"),
    (r"_mhz(_|$)", "MHz"),
    (r"_w$", "W"),
    (r"_j$", "J"),
    (r"_c(_max)?$", "°C"),
    (r"_share$|^goodput|^utilisation|^kv_usage|^agreement", "share, 0 to 1"),
    (r"_tokens(_|$)|^tokens", "tokens"),
)
"""What a column's name says of its unit; the first that fits."""

CONCEPTS = {
    "tok_s": "tok_s", "vram_gib": "vram-split", "weights_gib": "vram-split", "kv_cache_gib": "vram-split",
    "kv_cache_tokens": "vram-split", "other_gib": "vram-split", "memory_kind": "vram-split", "verdict": "verdict",
    "verdict_reasons": "verdict", "usd_per_1m_tokens": "1m-tokens", "window_s": "window",
    "safe_conc": "max-safe-concurrency", "cross": "knee", "cross_lo": "knee", "cross_hi": "knee", "ratio": "ratio",
}  # fmt: skip
"""Column -> the heading of docs/concepts.md that explains it."""


# --- Markdown ---------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A text on one line of a table, with nothing in it that Markdown or HTML would obey."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    safe = [part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*") for part in parts]
    return "".join(safe).replace("|", r"\|")


def code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- commands ---------------------------------------------------------------------------------------------------------


class _Asked(Exception):
    """Carries a parser out of the function that made it."""


def parser_of(module: str, command: str) -> argparse.ArgumentParser:
    """The parser that a module's `main` reads its arguments with."""

    def ask(parser: argparse.ArgumentParser, *_: object, **__: object) -> typing.NoReturn:
        raise _Asked(parser)

    main, before = importlib.import_module(module).main, argparse.ArgumentParser.parse_args
    asked = [[], f"bench {command}", str, str][: len(inspect.signature(main).parameters)]
    argparse.ArgumentParser.parse_args = ask  # type: ignore[assignment, method-assign]
    try:
        main(*asked)
    except _Asked as found:
        return typing.cast(argparse.ArgumentParser, found.args[0])
    finally:
        argparse.ArgumentParser.parse_args = before  # type: ignore[method-assign]
    raise AssertionError(f"{module} reads no arguments")


def commands() -> Iterator[tuple[str, Any]]:
    """("engine install", its command) for every command, in the order of `bench --help`."""

    def below(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, f"{path}{name} ")
            else:
                yield f"{path}{name}", command

    return below(typer.main.get_command(cli.app), "")


def options(name: str, command: Any) -> list[tuple[str, str, str, str]]:
    """(as it is typed, what it takes, default, meaning) of each option and argument of a command."""
    if name in PARSED:
        return [_parsed(action) for action in parser_of(PARSED[name], name)._actions if action.dest != "help"]
    hints = inspect.signature(command.callback, eval_str=True).parameters
    return [_declared(param, hints[param.name].annotation) for param in command.params if param.name != "help"]


def _declared(param: Any, hint: Any) -> tuple[str, str, str, str]:
    """`hint` is the annotation in the function's signature: `Annotated[type, typer.Option(...)]`."""
    if param.param_type_name == "argument":
        typed = param.name.upper() if param.required else f"[{param.name.upper()}]"
    else:
        typed = ", ".join([*param.opts, *param.secondary_opts])
    plain_type, about = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint, param)
    kind = "" if getattr(param, "is_flag", False) else _takes(plain_type, about.min, about.max)
    default = "required" if param.required else "" if param.default in (None, False, ()) else str(param.default)
    return typed, kind + (", repeatable" if param.multiple else ""), default, param.help or ""


def _takes(kind: Any, low: float | None, high: float | None) -> str:
    plain_types: list[Any] = [
        one for one in (kind, *typing.get_args(kind)) if isinstance(one, type) and one is not type(None)
    ]
    item = next(
        (typing.get_args(one)[0] for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is list), None
    )
    item = item or (plain_types[0] if plain_types else kind)
    name = "path" if item is Path else kind_of(item)
    if low is not None and high is not None:
        return f"{name}, {low} to {high}"
    return name if low is None else f"{name}, {low} or more"


def _parsed(action: argparse.Action) -> tuple[str, str, str, str]:
    if action.option_strings:
        typed = ", ".join(action.option_strings)
    else:
        typed = str(action.metavar or action.dest).upper()
    flag = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
    kind = "" if flag or not action.option_strings else str(action.metavar or action.dest.upper())
    if action.choices:
        kind = ", ".join(map(str, action.choices))
    default = "" if action.default in (None, False, argparse.SUPPRESS, []) else str(action.default)
    told = (action.help or "").replace("%%", "%")
    return typed, kind, "required" if action.required else default if "default" not in told else "", told


def commands_page() -> str:
    parts = [MADE, "# Commands\n", "Every command and each of its options. `bench COMMAND --help` says the same, and\n"
             "`bench --install-completion` teaches your shell all of it.\n"]  # fmt: skip
    found = list(commands())
    briefs = [(f"[`bench {name}`](#bench-{name.replace(' ', '-')})", plain(_brief(one))) for name, one in found]
    parts.append(table(("command", "what it does"), briefs))
    for name, command in found:
        about = plain(inspect.cleandoc(command.callback.__doc__ or command.help or _brief(command)))
        parts.append(f"## bench {name}\n\n{about}\n")
        rows = [(code(typed), plain(kind), code(default) if default not in ("", "required") else default, plain(told))
                for typed, kind, default, told in options(name, command)]  # fmt: skip
        parts.append(table(("option", "takes", "default", "meaning"), rows) if rows else "It takes no options.\n")
    return "\n".join(parts)


def _brief(command: Any) -> str:
    return command.short_help or command.help or ""


# --- columns and keys -------------------------------------------------------------------------------------------------


@functools.cache
def field_docs() -> dict[str, dict[str, str]]:
    """Record -> field -> the text under it in harness/records.py."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(records)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        told = found.setdefault(node.name, {})
        for one, following in zip(node.body, node.body[1:], strict=False):
            text = following.value.value if _is_text(following) else None  # type: ignore[attr-defined]
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and text:
                told[one.target.id] = inspect.cleandoc(text)
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def unit(column: str) -> str:
    return next((said for pattern, said in UNITS if re.search(pattern, column)), "")


def meaning(column: str, told: dict[str, str]) -> str:
    """The docstring under the field, or under a cell's of that name; else what its name says (records.py)."""
    if column in told:
        return told[column]
    bound = re.fullmatch(r"(.+)_(lo|hi)", column)
    if bound:
        return f"{'lower' if bound[2] == 'lo' else 'upper'} end of the 95 % interval of `{bound[1]}`"
    quantile = re.search(r"_?p(50|95|99)_ms$", column)
    if quantile:
        what = column[: quantile.start()].upper()
        what = {
            "": "the [end-to-end latency](../concepts.md#e2e)",
            "SEND_LAG": "sent − intended, our own lag",
            "LOOP_LAG": "how late our event loop was",
        }.get(what, what.replace("_", " "))
        at = f"[{what}](../concepts.md#{what.lower()})" if what in ("TTFT", "TPOT", "ITL") else what
        return f"{'median' if quantile[1] == '50' else quantile[1] + 'th percentile'} of {at}"
    return field_docs()["SweepPoint"].get(column, "")


def told(column: str, docs: dict[str, str]) -> str:
    """Its meaning, and where it is explained."""
    where = CONCEPTS.get(column)
    return " ".join([plain(meaning(column, docs)), f"[explained](../concepts.md#{where})" if where else ""]).strip()


def kind_of(hint: Any, *, in_csv: bool = True) -> str:
    """A type in words: what may stand in the cell, or in a JSON document under the key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        some = [one for one in arguments if one is not type(None)]
        nothing = "empty" if in_csv else "null"
        return kind_of(some[0], in_csv=in_csv) + (f" or {nothing}" if len(some) < len(arguments) else "")
    if origin is tuple and not in_csv and arguments[-1] is not Ellipsis:
        return f"[{', '.join(kind_of(one, in_csv=False) for one in arguments)}]"
    if origin is tuple:
        return f"list of {kind_of(arguments[0], in_csv=in_csv)}" + (", joined by ;" if in_csv else "")
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}.get(
        hint, getattr(hint, "__name__", "")
    )


def columns_page() -> str:
    docs = field_docs()
    parts = [MADE, "# Files and columns\n", plain(_paragraph(records, "Missing is an empty cell")) + "\n",
             "How the figures are made: [concepts](../concepts.md).\n"]  # fmt: skip
    for file, record in {**TABLES, **DOCUMENTS}.items():
        hints, in_csv = typing.get_type_hints(record), file in TABLES
        parts.append(f"## {file}\n\n{plain(record.__doc__ or '')}\n")
        rows = [
            (
                code(one.name),
                kind_of(hints[one.name], in_csv=in_csv),
                unit(one.name),
                told(one.name, docs[record.__name__]),
            )
            for one in fields(record)
        ]
        parts.append(table(("column" if in_csv else "key", "holds", "unit", "meaning"), rows))
    return "\n".join(parts)


def _paragraph(module: types.ModuleType, beginning: str) -> str:
    return next(part for part in inspect.cleandoc(module.__doc__ or "").split("\n\n") if part.startswith(beginning))


def scenarios_page() -> str:
    told, hints = field_docs()["Scenario"], typing.get_type_hints(records.Scenario)
    rows = [
        (code(one.name), kind_of(hints[one.name]).replace("empty", "absent"), unit(one.name),
         "required" if one.default is MISSING else "" if one.default in (None, "") else code(str(one.default)),
         plain(told.get(one.name, "")))
        for one in fields(records.Scenario) if one.name != "name"
    ]  # fmt: skip
    parts = [MADE, "# Scenarios\n",
             "A load is a TOML file of these keys; its name is the file's. `bench scenarios chat`\n"
             "prints one to copy, and `bench sweep --scenario FILE.toml` measures it.\n",
             table(("key", "holds", "unit", "default", "meaning"), rows), "## Those that have a name\n"]  # fmt: skip
    for name in scenario_names():
        text = (scenarios_dir() / f"{name}.toml").read_text(encoding="utf-8").rstrip()
        parts.append(f"### {name}\n\n```toml\n{text}\n```\n")
    return "\n".join(parts)


def precisions_page() -> str:
    rows = [
        (code(one.name), str(one.bits), "16" if one.activation_bits is None else str(one.activation_bits),
         "" if one.group_size is None else "a row" if one.group_size == listing.PER_CHANNEL else str(one.group_size),
         one.layout, one.needs, plain(one.method))
        for one in listing.precisions()
    ]  # fmt: skip
    header = ("name", "bits of a weight", "of activations", "group", "layout", "needs", "method")
    notes = "".join(f"- {plain(note)}\n" for note in listing.NOTES)
    return "\n".join([MADE, "# Precisions\n",
                      "What `--precisions` takes. `bench precisions` adds the kernel that serves\n"
                      "each on your card.\n",
                      table(header, rows), notes])  # fmt: skip


# --- verdicts, exit codes ---------------------------------------------------------------------------------------------


def reasons() -> list[tuple[str, str]]:
    """(reason, what it means) of the list in the docstring of harness/analysis/validity.py."""
    found: list[tuple[str, str]] = []
    for line in inspect.cleandoc(validity.__doc__ or "").splitlines():
        entry = re.fullmatch(r"    ([a-z_]+(?:, [a-z_]+)*)(?:  +(\S.*))?", line)
        if entry:
            found.append((entry[1], entry[2] or ""))
        elif re.match(r" {8,}\S", line) and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}".strip())
    return found


def verdicts_page() -> str:
    thresholds = [
        (code(name), code(str(value))) for name, value in vars(validity).items()
        if name.isupper() and isinstance(value, float)
    ]  # fmt: skip
    last = _paragraph(validity, "Host CPU load")
    return "\n".join([
        MADE, "# Verdicts\n", "Each row of points.csv is `valid`, `suspect` or `invalid`, and `verdict_reasons` says\n"
        "why, worst first. Suspect points are drawn hollow; invalid ones are struck through and used for nothing.\n",
        table(("reason", "meaning"), [(", ".join(map(code, one.split(", "))), plain(told)) for one, told in reasons()]),
        plain(last) + "\n", "## Thresholds\n",
        "In `harness/analysis/validity.py`; why each is what it is stands there.\n",
        table(("name", "value"), thresholds),
    ])  # fmt: skip


def exits_page() -> str:
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n")
    classes = {one for one in vars(errors).values() if inspect.isclass(one)}
    own = sorted((one for one in classes if issubclass(one, errors.KneebenchError)), key=lambda one: one.__name__)
    codes = [
        ("0", "it is done"),
        ("1", "the run failed, or the answer is no: a regression (`bench compare`), a broken gate (`bench quality`), a "
              "faulty checkpoint (`bench inspect`), a known failure in a log (`bench doctor --engine-log`)"),
        ("2", "the input cannot be used; nothing was started"),
        ("130", "interrupted (Ctrl-C); finished rows are on disk, `bench sweep --resume RUN` does the rest"),
        ("141", "whoever read the output went away (`bench ... | head`)"),
    ]  # fmt: skip
    rows = [(code(one.__name__), str(one.exit_code), plain(one.__doc__ or "")) for one in own]
    return "\n".join([
        MADE, "# Exit codes and errors\n", table(("exit code", "meaning"), [(one, plain(told)) for one, told in codes]),
        plain(tree[0]) + "\n", f"```text\n{tree[1]}\n```\n", table(("error", "exit code", "meaning"), rows),
    ])  # fmt: skip


def pages() -> dict[str, str]:
    """File name -> text, for each page of docs/reference."""
    return {
        "commands.md": commands_page(),
        "columns.md": columns_page(),
        "scenarios.md": scenarios_page(),
        "precisions.md": precisions_page(),
        "verdicts.md": verdicts_page(),
        "exit-codes.md": exits_page(),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {os.path.relpath(FOLDER / name)}")


if __name__ == "__main__":
    main()
