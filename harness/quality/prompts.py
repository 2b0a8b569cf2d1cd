"""Failure prompts: TOML -> PromptSet; errors name the file, the prompt and the key.

    name = "general"
    description = "..."

    [[prompt]]
    id = "factual-01"
    category = "factual"
    prompt = "What is the capital of Australia? Answer with the city alone."
    check = "exact"
    expect = ["Canberra"]

A prompt needs these but for `expect`, which most checks need; Prompt has the other keys. `checks.py` says what each
check takes for right.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from harness import settings
from harness.errors import InputError
from harness.files import read_text
from harness.scenario import scenarios_dir
from harness.suggest import did_you_mean

Category = Literal["factual", "explain", "reasoning", "code", "summary", "long_context", "repetition"]
CATEGORIES: tuple[str, ...] = get_args(Category)

CheckKind = Literal["exact", "numeric", "regex", "contains_all", "python", "compare_only"]

Form = Literal["text", "number", "code", "json", "list"]
"""What an answer looks like when it is sound, right or wrong."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its check."""

    id: str
    category: Category
    prompt: str
    """The user's message."""
    check: CheckKind
    expect: tuple[str, ...] = ()
    """exact: any one of these; numeric: the number, as text, with its tolerance if it has one ("3.14 +- 0.01"); regex:
    the one pattern; contains_all: all of these."""
    tests: str = ""
    """python: code that runs after the answer's, and raises where that is wrong."""
    prefix: str = ""
    """python: code that the answer continues (the head of a function)."""
    before: tuple[str, ...] = ()
    """Earlier turns of the conversation: user, assistant, user, ..."""
    system: str = ""
    max_tokens: int = 256
    form: Form = "text"
    language: str = "en"
    note: str = ""
    """What a careful reader should know: where it comes from, why it is hard."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the chat API takes them."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        told += [
            {"role": "assistant" if turn % 2 else "user", "content": content}
            for turn, content in enumerate(self.before)
        ]
        return [*told, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class PromptSet:
    name: str
    prompts: tuple[Prompt, ...]
    description: str = ""

    def __getitem__(self, prompt_id: str) -> Prompt:
        """The prompt of that id; KeyError where there is none."""
        for prompt in self.prompts:
            if prompt.id == prompt_id:
                return prompt
        raise KeyError(prompt_id)


# --- reading ---------------------------------------------------------------------------------------------------------

_MOST_BYTES = 4 * 2**20
_MOST_TOKENS = 32_768
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Ids become cells of tables."""
_NEEDED = ("id", "category", "prompt", "check")
_EXPECTS = {"exact": "one text or more", "numeric": "one number", "regex": "one pattern", "contains_all": "texts"}
_PLAIN_NUMBER = r"-?[0-9]{1,18}(?:\.[0-9]{1,18}|/[1-9][0-9]{0,17})?"
_EXPECTED_NUMBER = re.compile(rf"\s*({_PLAIN_NUMBER})\s*(?:(?:\+-|±)\s*({_PLAIN_NUMBER})\s*)?")


def prompt_set_names() -> list[str]:
    """Names that `load_prompts` knows without a path."""
    return sorted(path.stem for path in (scenarios_dir() / "failures").glob("*.toml"))


def load_prompts(name_or_path: str) -> PromptSet:
    """Read a set by name (`demo`, `general`) or by path (`mine.toml`).

    Raises InputError, naming file, prompt and key, for a file that is missing, too large or no TOML, for a key or value
    that does not fit, for a check without what it needs, and for two prompts of one id.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = scenarios_dir() / "failures" / f"{name_or_path}.toml"
    if not path.is_file():
        raise InputError(
            f"prompts {name_or_path!r} are not here{did_you_mean(name_or_path, prompt_set_names())}",
            allowed=f"{', '.join(prompt_set_names())}, or the path of a .toml file",
        )
    try:
        table = tomllib.loads(read_text(path, _MOST_BYTES))
    except OSError as error:
        raise InputError(f"prompts {path}: cannot be read ({error.strerror})", remedy="check the path") from error
    except (ValueError, RecursionError) as error:
        remedy = "see scenarios/failures/general.toml"
        raise InputError(f"{path.name}: no readable TOML: {error}", remedy=remedy) from error
    return _set_of({"name": path.stem} | table, path.name)


def expected_number(text: str) -> tuple[Fraction, Fraction]:
    """(number, tolerance) of a numeric check: "49", "-1.5", "2/3", "3.14 +- 0.01". Raises ValueError for others."""
    found = _EXPECTED_NUMBER.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no number")
    return Fraction(found[1]), abs(Fraction(found[2] or 0))


def _set_of(table: Mapping[str, Any], source: str) -> PromptSet:
    for key in table:
        if key not in ("name", "description", "prompt"):
            raise InputError(f"{source}: unknown key {key!r}", allowed="name, description, and tables [[prompt]]")
    for key in ("name", "description"):
        if not isinstance(table.get(key, ""), str):
            raise InputError(f"{source}: {key} = {table[key]!r}", allowed="a text")
    entries = table.get("prompt", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{source}: prompt is no list of tables", allowed="a table [[prompt]] for each prompt")
    if not entries:
        raise InputError(f"{source}: there is no prompt in it", allowed="one [[prompt]] or more")
    prompts: dict[str, Prompt] = {}
    for number, entry in enumerate(entries, start=1):
        prompt = _prompt_of(entry, f"{source}: prompt {entry.get('id', number)!r}")
        if prompt.id in prompts:
            raise InputError(f"{source}: prompt {number}: id = {prompt.id!r} stands twice", allowed="an id for each")
        prompts[prompt.id] = prompt
    return PromptSet(table["name"], tuple(prompts.values()), table.get("description", ""))


def _prompt_of(entry: Mapping[str, Any], where: str) -> Prompt:
    for key in _NEEDED:
        if key not in entry:
            raise InputError(f"{where}: {key} is missing", allowed=f"{', '.join(_NEEDED)} in each prompt")
    prompt = settings.record_of(Prompt, entry, where)
    settings.check(prompt, {"max_tokens": (1, _MOST_TOKENS)}, _conflicts(prompt), where)
    return prompt


def _conflicts(prompt: Prompt) -> Iterator[settings.Conflict]:
    """Of the values that a prompt needs, and that have to fit each other."""
    check, expect = f'check = "{prompt.check}"', prompt.expect
    yield not _ID.fullmatch(prompt.id), f"id = {prompt.id!r}", "up to 64 letters, digits, dots, dashes, underscores"
    yield not prompt.prompt.strip(), "prompt is empty", "a question"
    yield not prompt.language.strip(), "language is empty", 'a code like "en"'
    yield len(prompt.before) % 2 == 1, "before ends with a turn of the user", "user, assistant, ... in pairs"
    yield prompt.check not in _EXPECTS and bool(expect), f"{check} with expect", "no expect, for nothing would read it"
    if prompt.check in _EXPECTS:
        allowed = f"expect = [{_EXPECTS[prompt.check]}]"
        yield not expect, f"{check} without expect", allowed
        yield prompt.check in ("numeric", "regex") and len(expect) > 1, f"{check} with {len(expect)} in expect", allowed
        yield not all(item.strip() for item in expect), "expect holds an empty text", allowed
    if prompt.check == "python":
        yield not prompt.tests.strip(), f"{check} without tests", "tests = code that raises where the answer is wrong"
        yield _unreadable("tests", ast.parse, prompt.tests)
    else:
        yield bool(prompt.tests or prompt.prefix), f"{check} with tests or prefix", 'these with check = "python"'
    if prompt.check == "numeric":
        yield _unreadable("expect", expected_number, expect[0])
    if prompt.check == "regex":
        yield _unreadable("expect", re.compile, expect[0])


def _unreadable(key: str, parse: Callable[[str], object], text: str) -> settings.Conflict:
    try:
        parse(text)
    except (ValueError, SyntaxError, re.error, RecursionError, OverflowError, MemoryError) as error:
        return True, f"{key} = {text[:80]!r}: {error}", "what can be read as its check says"
    return False, "", ""


# --- writing ---------------------------------------------------------------------------------------------------------


def to_toml(prompts: PromptSet) -> str:
    """The set as a file that `load_prompts` reads back as the same set; keys that have their default are left out.

    A run keeps such a copy, so that its reports can be made again when the set itself has changed.
    """
    lines = [f"name = {_quoted(prompts.name)}", f"description = {_quoted(prompts.description)}"]
    for prompt in prompts.prompts:
        lines += ["", "[[prompt]]"]
        for field in fields(Prompt):
            value = getattr(prompt, field.name)
            if field.default is MISSING or value != field.default:
                lines.append(f"{field.name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: str | int | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        one_line = f"[{', '.join(map(_quoted, value))}]"
        if len(one_line) <= 100 and "\n" not in one_line:
            return one_line
        return "".join(["[\n", *(f"    {_quoted(item)},\n" for item in value), "]"])
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    """A TOML string, over several lines where the text has several; a literal one where that saves escaping."""
    several = "\n" in text
    escaped = "".join(map(_escaped, text))
    literal = "'''\n" if several else "'"
    closing = literal.strip()
    if escaped.replace(r"\\", "\\") == text and re.search(r'[\\"]', text) and closing not in text:
        return literal + text + closing
    if not several:
        return '"' + escaped.replace('"', r"\"") + '"'
    # Three quotes in a row would end the string; those before its end belong to it.
    return '"""\n' + re.sub(r'"(?=")', r"\"", escaped) + '"""'


def _escaped(character: str) -> str:
    """TOML allows no control character but tab and line feed; a carriage return would be read as a line's end."""
    if character == "\\":
        return r"\\"
    if character in "\t\n" or (ord(character) >= 0x20 and ord(character) != 0x7F):
        return character
    return f"\\u{ord(character):04x}"
