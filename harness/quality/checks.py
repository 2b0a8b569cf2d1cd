"""Is an answer right? One rule for each check; strict, because prompts say how to answer, and the same for everyone.

What is judged is the answer proper: what follows the last `</think>`, if the model thinks aloud. An empty one is wrong.

exact         The whole answer is one of `expect`. So is one whose last line says "Answer: ..." (or "The answer is ...",
              "Final answer: ..."), by what follows there, because models like to end so. Case makes no difference, nor
              does what wraps a text: blanks, quotation marks, Markdown's * _ `, one full stop at the end.
              A sentence that contains the word, or a word said over and over, is not the word: wrong.
numeric       The last number of the answer is the one expected, within its tolerance; without one exactly, as a
              fraction (0.5 is 1/2). Read are -12, 1,234.5, .5, 3/4, "1 1/2", 6.02e23, 6.02 × 10^23 and LaTeX's \\frac;
              12 km, $12 and 12 % are 12. A comma before three digits parts thousands, no other comma belongs to a
              number; digits that follow a letter (CO2, x1) are a name; "7-5" is 7 and 5. Words are no numbers.
regex         The pattern is found somewhere (`re.search`, no flags but those it sets itself).
contains_all  Each of `expect` stands somewhere as whole words, whatever the case; any blanks count as one.
python        `program` puts the answer's code and the tests together; right if the tests ran to their end.
compare_only  Nothing to be judged by: ok is None.

Answers are text from outside. Here they are only read, and as far as _LONGEST characters; patterns run in a process
of their own that is stopped if it takes long, for with a pattern like (a+)+b a few dozen characters take hours. Code is
run by `execute` alone, and never in this process, not even parsed: a hostile text can crash Python's parser.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from harness.quality.prompts import Prompt, expected_number

if TYPE_CHECKING:
    from harness.quality.sandbox import Outcome

Execute = Callable[[str], "Outcome"]
"""Runs a program in the sandbox; the only door to execution."""

_LONGEST = 100_000
_SEARCH_S = 10.0


@dataclass(frozen=True, slots=True)
class Judged:
    ok: bool | None
    """None: there is nothing to be judged by, or it could not be executed here."""
    note: str = ""
    """In a few words why it is wrong, or was not judged; "" when it is right."""


RIGHT = Judged(True)


def judge(prompt: Prompt, text: str, execute: Execute | None) -> Judged:
    """Whether `text` answers `prompt` rightly. `execute` None: there is no sandbox, so code is not judged."""
    if prompt.check == "compare_only":
        return Judged(None)
    answer = text[:_LONGEST].rpartition("</think>")[2].strip()
    if answer.startswith("<think>"):
        return Judged(False, "it never ended thinking")
    if not answer:
        return Judged(False, "empty answer")
    if prompt.check == "exact":
        return _exact(prompt, answer)
    if prompt.check == "numeric":
        return _numeric(prompt, answer)
    if prompt.check == "regex":
        return _regex(prompt, answer)
    if prompt.check == "contains_all":
        return _contains_all(prompt, answer)
    return _python(prompt, answer, execute)


# --- text ------------------------------------------------------------------------------------------------------------

_WRAPS = " \t\r\n*_`\"'“”‘’«»"
_LABELLED = re.compile(r"[*_#\s]*(?:the |my )?(?:final )?answer(?: is\b|[*_\s]*:)[:\s]*(.*)", re.IGNORECASE)


def _exact(prompt: Prompt, answer: str) -> Judged:
    wanted = {_bare(item) for item in prompt.expect}
    labelled = _LABELLED.fullmatch(answer.splitlines()[-1])
    if _bare(answer) in wanted or (labelled and _bare(labelled[1]) in wanted):
        return RIGHT
    return Judged(False, f"{_shown(prompt.expect[0])} expected, {_shown(answer)} given")


def _contains_all(prompt: Prompt, answer: str) -> Judged:
    told = _folded(answer)
    missing = [item for item in prompt.expect if not re.search(rf"(?<!\w){re.escape(_folded(item))}(?!\w)", told)]
    return Judged(False, f"missing: {_shown(', '.join(missing))}") if missing else RIGHT


def _bare(text: str) -> str:
    """Without what wraps a text: **"Canberra".** is canberra."""
    return _folded(text.strip(_WRAPS).removesuffix(".").strip(_WRAPS))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).replace("’", "'").casefold().split())


def _shown(text: str, most: int = 80) -> str:
    """As a note says it: one line, not long, nothing that a terminal would obey."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


# --- numbers ---------------------------------------------------------------------------------------------------------

_MATHEMATICS = (
    (re.compile(r"\\[dt]?frac\{([0-9]{1,20})\}\{([0-9]{1,20})\}"), r"\1/\2"),
    (re.compile(r"\\times"), "×"),
    (re.compile(r"\{,\}|\\[,!]"), ","),
)
"""LaTeX, as models write it."""
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}])[-−](?=[$€£¥.0-9]) )?  [$€£¥]?
    (?<![^\W_])(?<![0-9]\.)                          # not the tail of a name, nor of another number
    (?P<whole> [0-9]{1,3}(?:[,\u00a0\u202f][0-9]{3}){1,100}(?![0-9]) | [0-9]{1,300} | (?<!\.)(?=\.[0-9]) )
    (?: \.(?P<decimals>[0-9]{1,300}) )?
    (?: (?:\s?[×x*·]\s?10\^\{?|[eE])(?P<exponent>[-−+]?[0-9]{1,3})(?![0-9]) )?
    (?: (?:\s(?P<more>[0-9]{1,9}))? /(?P<below>[1-9][0-9]{0,9})(?![/0-9]) )?
    """,
    re.VERBOSE,
)


def _numeric(prompt: Prompt, answer: str) -> Judged:
    number, tolerance = expected_number(prompt.expect[0])
    for pattern, plain in _MATHEMATICS:
        answer = pattern.sub(plain, answer)
    numbers = list(_NUMBER.finditer(answer))
    if not numbers:
        return Judged(False, f"{prompt.expect[0]} expected, no number given")
    if abs(_value(numbers[-1]) - number) <= tolerance:
        return RIGHT
    return Judged(False, f"{prompt.expect[0]} expected, {_shown(numbers[-1][0])} given")


def _value(found: re.Match[str]) -> Fraction:
    whole = re.sub("[^0-9]", "", found["whole"]) or "0"
    value = Fraction(f"{whole}.{found['decimals'] or 0}")
    if found["exponent"]:
        value *= Fraction(10) ** int(found["exponent"].replace("−", "-"))
    if found["more"]:
        value += Fraction(int(found["more"]), int(found["below"]))
    elif found["below"]:
        value /= int(found["below"])
    return -value if found["sign"] else value


# --- patterns --------------------------------------------------------------------------------------------------------

_SEARCH = "import json, re, sys; pattern, text = json.load(sys.stdin); sys.exit(0 if re.search(pattern, text) else 1)"


def _regex(prompt: Prompt, answer: str) -> Judged:
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    given = json.dumps([prompt.expect[0], answer]).encode()
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_SEARCH_S, check=False)
    except subprocess.TimeoutExpired:
        return Judged(None, f"not judged: the pattern takes more than {_SEARCH_S:g} s on this answer")
    if done.stderr:
        return Judged(None, f"not judged: {_shown(done.stderr.decode(errors='replace').splitlines()[-1])}")
    return RIGHT if done.returncode == 0 else Judged(False, f"nothing like {_shown(prompt.expect[0])} in it")


# --- code ------------------------------------------------------------------------------------------------------------

_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_DEFINES = re.compile(r"^[ \t]*(?:async def|def|class|import|from) \w", re.MULTILINE)
_PROGRAM = """\
def run(answer, tests, nonce):
    import linecache, sys, types

    linecache.clearcache()  # a runner may keep this whole program there
    linecache.cache["tests.py"] = (len(tests), None, tests.splitlines(True), "tests.py")
    execute = exec  # an answer may put another in its place
    parts = [compile(answer, "answer.py", "exec"), compile(tests, "tests.py", "exec")]
    module = sys.modules["answer"] = types.ModuleType("answer")
    for part in parts:
        execute(part, vars(module))
    print(nonce)


"""


def _python(prompt: Prompt, answer: str, execute: Execute | None) -> Judged:
    if execute is None:
        return Judged(None, "not executed: no sandbox here")
    nonce = secrets.token_hex(16)
    outcome = execute(program(prompt, answer, nonce))
    if outcome.status != "passed":
        return Judged(False, _shown(f"{outcome.status}: {_failed_test(outcome) or outcome.note}"))
    return RIGHT if nonce in outcome.output else Judged(False, "it ended before its tests did")


def program(prompt: Prompt, answer: str, nonce: str) -> str:
    """One program, in ASCII: runs the answer's code, then the tests in the same module, then prints `nonce`.

    An answer that ends the process early, whatever its exit code, or that prints what it likes, does not print the
    nonce, which is nowhere that code comes by accident: in no file and no module, a local of a frame above. What
    remains: code written against this very program can walk the frames or the memory of its own process to the nonce,
    have a trace function skip the tests, or hand out objects that are equal to everything. It would lie about being
    right and do no more: what it can do to the machine is the sandbox's business.
    """
    code = _with_prefix(code_of(answer), prompt.prefix)
    return f"{_PROGRAM}run({ascii(code)}, {ascii(prompt.tests)}, {nonce!r})\n"


def code_of(answer: str) -> str:
    """The code in an answer: of its fenced blocks those that define something, else the first; without any, all of it.

    A block that was cut before its end counts as well.
    """
    blocks = [textwrap.dedent(block) for block in _FENCED.findall(answer)]
    return "\n".join(filter(_DEFINES.search, blocks)) or (blocks[0] if blocks else answer)


def _with_prefix(code: str, prefix: str) -> str:
    """`code` as the body of the function whose head `prefix` ends with, unless it has that head itself."""
    heads = list(re.finditer(r"^[ \t]*(?:async )?def (\w+)", prefix, re.MULTILINE))
    if not heads:
        return f"{prefix}\n{code}" if prefix else code
    if re.search(rf"^[ \t]*(?:async )?def {heads[-1][1]}\b", code, re.MULTILINE):
        return prefix[: heads[-1].start()] + code
    return f"{prefix}\n{_indented(code)}\n"


def _indented(code: str) -> str:
    """A function's body, four blanks deep. The first line may lack them: servers strip what an answer begins with.

    Then the lines below have theirs, one block deeper where the first line opens one.
    """
    first, *rest = code.strip("\n").split("\n")
    depths = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
    if first[:1].isspace():
        return "\n".join([first, *rest])
    if depths and min(depths) >= 4 and (depths[0] >= 8 or not first.rstrip().endswith(":")):
        return "\n".join([f"    {first}", *rest])
    return textwrap.indent("\n".join([first, *rest]), "    ")


def _failed_test(outcome: Outcome) -> str:
    """The test that a bare AssertionError came from, by its traceback; "" where it says more itself."""
    lines = [line.strip() for line in outcome.output.splitlines()]
    tests = [line for line in lines if line.startswith("assert ")]
    return tests[-1] if tests and lines[-1] == "AssertionError" else ""
