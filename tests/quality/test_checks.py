"""What each check takes for right; that nothing is executed here; and that code cannot pass by ending early."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from fractions import Fraction

import demo_tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.quality import checks, inside
from harness.quality.checks import Execute, Judged, code_of, judge, program
from harness.quality.prompts import CheckKind, Prompt, load_prompts
from harness.quality.sandbox import Outcome, find_runner


def asked(check: CheckKind, *expect: str, tests: str = "", prefix: str = "") -> Prompt:
    return Prompt("q", "factual", "?", check, expect, tests=tests, prefix=prefix)


def never(code: str) -> Outcome:
    raise AssertionError("nothing is to be executed")


def ok(prompt: Prompt, text: str) -> bool | None:
    return judge(prompt, text, never).ok


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Canberra", "canberra", " Canberra.\n", '"Canberra."', "**Canberra**", "**Canberra**.", "`CANBERRA`",
        "„Canberra“"[1:],
        "It is in the south-east, so not Sydney.\n\nAnswer: Canberra", "Well.\n**Final Answer:** Canberra.",
        "The answer is Canberra.", "<think>Sydney? No.</think>\nCanberra", "Answer: **Canberra**",
    ],
)  # fmt: skip
def test_exact_accepts_the_answer_alone_or_labelled(text: str) -> None:
    assert judge(asked("exact", "Canberra"), text, never) == Judged(True)


@pytest.mark.parametrize(
    "text",
    [
        "Sydney", "Canberra, of course", "The capital is Canberra.", "Canberra Canberra",
        "Canberra\nCanberra", "Canberr",
        "Canberra\nIt is the capital.", "Answer: Canberra\nor Sydney", "Answer: Sydney", "not an answer: Canberra!!",
        "<think>Canberra</think>", "<think>Canberra", "", "  \n", "...", "Canberra..",
    ],
)  # fmt: skip
def test_exact_rejects_everything_around_it(text: str) -> None:
    assert ok(asked("exact", "Canberra"), text) is False


def test_exact_takes_any_of_several_and_folds_letters_of_both_spellings() -> None:
    assert ok(asked("exact", "Jane Austen", "Austen"), "austen")
    assert ok(asked("exact", "Orléans"), "ORLE\u0301ANS")
    assert ok(asked("exact", "the dog's  bone"), "The dog’s bone")
    assert not ok(asked("exact", "x2"), "x²")


def test_a_note_says_what_was_expected_and_what_given() -> None:
    assert judge(asked("numeric", "42"), "I think 41.", never).note == "42 expected, 41 given"
    assert (
        judge(asked("exact", "Rome"), "Pa\x1b[31mris\n" + "x" * 200, never).note
        == f"Rome expected, Pa [31mris {'x' * 68}… given"
    )
    assert judge(asked("exact", "Rome"), "", never) == Judged(False, "empty answer")
    assert judge(asked("exact", "Rome"), "<think>hm", never) == Judged(False, "it never ended thinking")
    assert judge(asked("contains_all", "a", "b", "c"), "b", never).note == "missing: a, c"
    assert judge(asked("regex", r"\d"), "b", never).note == r"nothing like \d in it"


# --- numeric ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"), ("It is 42.", "42"), ("40 + 9 = 49", "49"), ("**42**", "42"), (r"\boxed{42}", "42"),
        ("= 42km", "42"),
        ("1,234,567 people", "1234567"), ("1\u202f234 m", "1234"), ("$1,331.00", "1331"), ("12 %", "12"), ("€ 5", "5"),
        ("-5", "-5"), ("\u22125 °C", "-5"), ("-$5", "-5"), ("x=-5", "-5"), ("20 - 5", "5"), ("7-5", "5"),
        ("3\u20135", "5"),
        ("f(3)-5", "5"), ("0.5", "1/2"), (".5", "1/2"), ("1/2", "1/2"), ("-3/4", "-3/4"), ("1 1/2 cups", "3/2"),
        (r"\frac{7}{12}", "7/12"), (r"$\dfrac{7}{12}$.", "7/12"), ("84/2 = 42", "42"), ("1/0", "0"),
        ("6.5e3", "6500"), ("1.5 × 10^3 m", "1500"), (r"2 \times 10^{-2}", "1/50"), ("5e", "5"), ("1{,}000", "1000"),
        ("42 tonnes of CO2", "42"), ("x1 = 7, in km2", "7"), ("42 m\u00b2", "42"), ("1,2,3", "3"), ("3,14", "14"),
        ("version 1.2.3 has 42", "42"), ("1.2.3", "1.2"), ("so...42", "42"), ("1,234,5678", "5678"), ("12:45", "45"),
        ("\u0664 or 7", "7"),
        ("<think>1</think>2", "2"), ("-1 1/2", "-3/2"), ("1e-3", "1/1000"),
    ],
)  # fmt: skip
def test_numeric_reads_the_last_number(text: str, value: str) -> None:
    assert judge(asked("numeric", value), text, never) == Judged(True)
    assert ok(asked("numeric", str(Fraction(value) + 1)), text) is False


@pytest.mark.parametrize("text", ["forty-two", "CO2", "x1", "²", "v2b"])
def test_what_is_no_number(text: str) -> None:
    judged = judge(asked("numeric", "2"), text, never)
    assert judged == Judged(False, "2 expected, no number given")


def test_a_tolerance_holds_at_both_ends_and_not_beyond() -> None:
    prompt = asked("numeric", "3.14 +- 0.01")
    assert [ok(prompt, text) for text in ("3.13", "3.15", "3.129", "3.151", "-3.14")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not ok(asked("numeric", "0.3333"), "1/3")  # exactly is exactly


def test_a_number_of_a_million_digits_is_wrong_and_no_trouble() -> None:
    assert ok(asked("numeric", "42"), "9" * 1_000_000) is False
    assert ok(asked("numeric", "42"), "." * 100_000 + " 42") is False  # nobody reads that far
    assert ok(asked("numeric", "42"), "1e999 or 42e-999") is False


@given(
    st.decimals(min_value=-(10**15), max_value=10**15, places=3, allow_nan=False),
    st.sampled_from(["", " m", "%.", ")"]),
)
def test_numeric_reads_what_python_writes(number: object, after: str) -> None:
    """Python's own formatting with thousands separators is the oracle."""
    assert ok(asked("numeric", f"{number:f}"), f"The result is {number:,f}{after}")


# --- regex, contains_all, compare_only -------------------------------------------------------------------------------


def test_regex_searches_with_the_flags_that_it_sets() -> None:
    assert judge(asked("regex", r"\byen\b"), "The yen, surely", never) == Judged(True)
    assert ok(asked("regex", r"^yen$"), "the\nyen") is False
    assert ok(asked("regex", r"(?im)^YEN$"), "the\nyen\n.") is True
    assert (
        ok(asked("regex", "caf\u00e9 \ud83d"), "caf\u00e9 \ud83d!") is True
    )  # half a surrogate pair, as a broken model has


def test_a_pattern_that_takes_for_ever_is_stopped_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SEARCH_S", 0.5)
    judged = judge(asked("regex", "(a+)+b"), "a" * 60, never)
    assert judged == Judged(None, "not judged: the pattern takes more than 0.5 s on this answer")


def test_contains_all_wants_whole_words_in_any_case() -> None:
    prompt = asked("contains_all", "immune system", "tea")
    assert ok(prompt, "TEA helps the Immune\n  System.") is True
    assert ok(prompt, "Steam helps the immune system.") is False
    assert ok(prompt, "Tea helps immune systems.") is False
    assert ok(asked("contains_all", "tea"), "a protea, teas") is False
    assert ok(asked("contains_all", "C++"), "written in C++, mostly") is True


def test_compare_only_is_never_judged() -> None:
    assert judge(asked("compare_only"), "", never) == judge(asked("compare_only"), "anything", None) == Judged(None)


HOSTILE = [
    "(" * 90_000,
    "\n" * 99_000,
    " " * 99_000 + "x",
    "```\n" * 30_000,
    "\x00\ud800\u202e",
    "*" * 99_000,
    "1," * 50_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:5]))
@pytest.mark.parametrize("check", ["exact", "numeric", "contains_all", "python"])
def test_hostile_text_is_read_in_linear_time(check: CheckKind, text: str) -> None:
    """A quadratic rule would take minutes, and run into the suite's own time limit."""
    prompt = asked(check, tests="assert f(1)", prefix="def f(x):") if check == "python" else asked(check, "42")
    assert judge(prompt, text, lambda code: Outcome("failed", "", "it raised")).ok is False


# --- code: what is put together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("return x + 1", "return x + 1"),
        ("Sure!\n```python\ndef f(x):\n    return 1\n```\nIt returns 1.", "def f(x):\n    return 1\n"),
        ("```py\ndef f(): ...\n```\nUse it:\n```\nprint(f())\n```", "def f(): ...\n"),
        ("```\nimport math\n```\n```python\ndef f(): ...\n```", "import math\n\ndef f(): ...\n"),
        ("```\nx = 1\n```\n```\ny = 2\n```", "x = 1\n"),
        ("Cut:\n```python\ndef f(x):\n    return", "def f(x):\n    return"),
        ("- so:\n  ```python\n  def f():\n      pass\n  ```", "def f():\n    pass\n"),
    ],
)
def test_code_is_taken_out_of_fences(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize(
    "answer",
    [
        "return [x\n    for x in items if x]",
        "kept = []\nfor x in items:\n    if x:\n        kept.append(x)\nreturn kept",
        "kept = []\n    for x in items:\n        if x:\n            kept.append(x)\n    return kept",
        "if True:\n    return [x for x in items if x]",
        "if not items:\n    return []\nreturn [x for x in items if x]",
        "if not items:\n        return []\n    return [x for x in items if x]",
        "```python\n    return [x for x in items if x]\n```",
        "def kept(items):\n    return [x for x in items if x]",
        "```python\nfrom typing import Any\ndef kept(items: Any) -> Any:\n    return [x for x in items if x]\n```",
    ],
)
def test_a_body_goes_under_the_head_however_it_is_indented(answer: str) -> None:
    prefix = 'LIMIT = 3\n\ndef other(items):\n    return 0\n\ndef kept(items):\n    """Those that are true."""'
    prompt = asked("python", tests="assert kept([0, 1, 2]) == [1, 2] and LIMIT == 3", prefix=prefix)
    assert judge(prompt, answer, plain) == Judged(True)


def test_a_program_is_ascii_whatever_the_answer_is() -> None:
    made = program(asked("python", tests="assert True"), "é\ud800\x00'''\n\"\"\"", "n0nce")
    assert made.isascii() and "\x00" not in made
    ast.parse(made)


def test_without_a_sandbox_code_is_not_judged() -> None:
    assert judge(asked("python", tests="assert x"), "x = 1", None) == Judged(None, "not executed: no sandbox here")


def test_the_answer_reaches_execute_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def record(code: str) -> Outcome:
        given.append(code)
        return Outcome("timeout", "", "ran longer than 5 s")

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("compiled here")

    prompt = asked("python", tests="assert x == 1")
    with monkeypatch.context() as patched:
        for name in ("exec", "eval", "compile"):
            patched.setattr(f"builtins.{name}", forbidden)
        judged = judge(prompt, "x = 1", record)
    assert judged == Judged(False, "timeout: ran longer than 5 s")
    (code,) = given
    nonces = re.findall(r"'([0-9a-f]{32})'", code)
    assert len(nonces) == 1 and "run('x = 1', 'assert x == 1'," in code
    judge(prompt, "x = 1", record)
    assert nonces[0] not in given[1]


def test_passed_without_the_nonce_is_wrong() -> None:
    prompt = asked("python", tests="assert x")
    assert judge(prompt, "x = 1", lambda _: Outcome("passed", "0" * 32, "")).note == "it ended before its tests did"


# --- code: executed --------------------------------------------------------------------------------------------------


def plain(code: str) -> Outcome:
    """Plain Python, for code that stands in this file. It lets exit code 0 pass, as the sandbox does not."""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    status = "passed" if done.returncode == 0 else "failed"
    return Outcome(status, done.stdout + done.stderr, (done.stderr.splitlines() or [""])[-1])  # type: ignore[arg-type]


@pytest.fixture(params=["plain", "sandbox"])
def execute(request: pytest.FixtureRequest) -> Execute:
    if request.param == "plain":
        return plain
    return sandboxed()


def sandboxed() -> Execute:
    runner = find_runner()
    if runner is None:
        pytest.skip("no sandbox here (bubblewrap or user namespaces)")
    return runner.run


DOUBLE = asked("python", tests="assert double(2) == 4\nassert double(-1) == -2\n", prefix="def double(x):")


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("return x * 2", ""),
        ("```python\ndef double(x):\n    print('hello')\n    return x * 2\n```", ""),
        ("def double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(double(int(input())))", ""),
        ("def double(x):\n    return sum([x, x])\nprint(double(3))", ""),
        ("return x + 2", "failed: assert double(-1) == -2"),
        ("return x +", "failed: SyntaxError: invalid syntax"),
        ("return y", "failed: NameError: name 'y' is not defined"),
        ("This doubles a number.", "failed: SyntaxError: invalid syntax"),
    ],
)
def test_code_is_right_if_its_tests_pass(execute: Execute, answer: str, note: str) -> None:
    judged = judge(DOUBLE, answer, execute)
    assert judged.ok is (not note)
    if execute is not plain:  # whose traceback is Python's own, without the lines of what is not a file
        assert judged.note == note


CHEATS = {
    "exit": "def double(x): pass\nimport sys\nsys.exit(0)",
    "exit in a call": "def double(x):\n    raise SystemExit",
    "hard exit": "def double(x): pass\nimport os\nos._exit(0)",
    "the sandbox's own code of success": "def double(x): pass\nimport os\nos._exit(90)",
    "hard exit in a call": "import os\ndef double(x):\n    os._exit(0)",
    "prints": "def double(x): pass\nprint('passed', 0)\nraise SystemExit(0)",
    "another exec": "import builtins\nbuiltins.exec = lambda *_: None\ndef double(x): pass",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef double(x): pass",
    "another hook": "import sys\nsys.excepthook = lambda *_: sys.exit(0)\ndef double(x): pass",
    "many prints": "def double(x): pass\nimport os\nos.write(1, b'x' * 100_000)\nos._exit(0)",
}
PEEKS = {
    "its globals": "globals()",
    "the main module": "vars(sys.modules['__main__'])",
    "every module": "[vars(module) for module in list(sys.modules.values())]",
    "the lines' cache": "__import__('linecache').cache",
    "its file": "open(sys.argv[0]).read()",
}
"""Where the nonce could be found."""


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_way_out_is_a_pass(execute: Execute, cheat: str) -> None:
    judged = judge(DOUBLE, CHEATS[cheat], execute)
    assert judged.ok is False and judged.note


@pytest.mark.parametrize("peek", PEEKS)
def test_the_nonce_is_not_to_be_found_where_one_would_look(execute: Execute, peek: str) -> None:
    """It prints what it found and leaves with the exit code of success, which would be a pass."""
    success = 0 if execute is plain else inside.FINISHED
    answer = (
        f"import os, sys\ndef double(x): pass\nos.write(1, str({PEEKS[peek]}).encode()[-60_000:])\nos._exit({success})"
    )
    assert judge(DOUBLE, answer, execute).ok is False


def test_a_right_answer_that_prints_a_lot_is_right() -> None:
    answer = "import os\ndef double(x):\n    os.write(1, b'x' * 100_000)\n    return 2 * x"
    assert judge(DOUBLE, answer, sandboxed()) == Judged(True)


def test_dataclasses_of_an_answer_find_their_module() -> None:
    answer = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int"
    assert judge(asked("python", tests="assert P(3).x == 3"), answer, plain) == Judged(True)


# --- the sets that ship: each check accepts what is right and rejects what is nearly right -------------------------


def wrong_expressions(expression: str) -> Iterator[str]:
    """Mistakes that a rounded model makes: another number, another operator, another end of the list."""
    for old, new in {
        "+": "-", "-": "+", "**": "*", "//": "/", "%": "//", ">": ">=", "<": "<=", "==": "!=", "[:": "[", ":]": "]",
        "[::": "[", ".upper": ".lower", ".lower": ".upper", ".title": ".upper", ".strip": ".lstrip", "sum": "max",
        "max": "min", "min": "max", "list": "sum", "x * 2": "x ** 2", "** 2": "** 3", "** 3": "** 2", "x // 2 ": "x ",
    }.items():  # fmt: skip
        if old in expression:
            yield expression.replace(old, new, 1)
    for number in set(re.findall(r"\d+", expression)):
        yield re.sub(rf"\b{number}\b", str(int(number) + 1), expression, count=1)


DEMO_CODE = [prompt for prompt in load_prompts("demo").prompts if prompt.category == "code"]


def values(rng: random.Random, argument: str) -> Iterator[object]:
    """Many arguments, to find out whether two expressions differ at all."""
    for _ in range(300):
        if argument == "x":
            yield rng.randint(0, 400)
        elif argument == "text":
            yield "".join(rng.choices(" \taAbBß'1", k=rng.randint(1, 8)))
        else:
            yield [rng.randint(0, 400) for _ in range(rng.randint(1, 250))]


def result(function: Callable[[object], object], value: object) -> object:
    try:
        return function(value)
    except (ValueError, IndexError):  # of the right one: it has nothing to say about that value
        return None


def test_unit_tests_of_the_demo_set_tell_right_from_nearly_right() -> None:
    """The right expression is drawn again; every neighbour of it that computes something else has to fail.

    What is run here is our own text.
    """
    rng = random.Random("failures/code")
    right: dict[str, str] = {}
    while len(right) < len(DEMO_CODE):
        example = demo_tasks.code(rng, "heldout")
        right.setdefault(example.prompt, example.answer.removeprefix("return "))
    wrong = 0
    for prompt in DEMO_CODE:
        name, argument = re.findall(r"def (\w+)\((\w+)\)", prompt.prefix)[0]
        given = list(values(rng, argument))

        def function(expression: str, prompt: Prompt = prompt, name: str = name) -> Callable[[object], object]:
            scope: dict[str, Callable[[object], object]] = {}
            exec(f"{prompt.prefix}\n    return {expression}", scope)
            return scope[name]

        sound = function(right[prompt.prompt])
        exec(prompt.tests, {name: sound})
        for expression in wrong_expressions(right[prompt.prompt]):
            other = function(expression)
            if any(result(sound, value) not in (None, result(other, value)) for value in given):
                wrong += 1
                with pytest.raises(Exception):  # noqa: B017 - whatever a wrong expression raises
                    exec(prompt.tests, {name: other})
    assert wrong > 60


DEFINITIONS = {
    "code-01": """def is_palindrome(text):
    kept = [c.lower() for c in text if c.isalnum()]
    return kept == kept[::-1]""",
    "code-02": """def fizzbuzz(n):
    return ["Fizz" * (i % 3 == 0) + "Buzz" * (i % 5 == 0) or str(i) for i in range(1, n + 1)]""",
    "code-03": """def merge_intervals(intervals):
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged""",
    "code-04": """def to_roman(n):
    out = ""
    for v, s in zip((1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1), "M CM D CD C XC L XL X IX V IV I".split()):
        out, n = out + s * (n // v), n % v
    return out""",
    "code-05": """import re
def parse_duration(text):
    return sum(int(n) * {"h": 3600, "m": 60, "s": 1}[u] for n, u in re.findall(r"([0-9]+)([hms])", text))""",
    "code-06": """def flatten(nested):
    return [x for item in nested for x in (flatten(item) if isinstance(item, list) else [item])]""",
    "code-07": """    values = sorted(set(numbers))
    return values[-2] if len(values) > 1 else None""",
}
SLIPS = {
    "code-01": ("c.lower()", "c"),
    "code-02": ("n + 1", "n"),
    "code-03": ("max(merged[-1][1], end)", "end"),
    "code-04": ("40, 10, 9, 5, 4, 1", "40, 10, 9, 5, 3, 1"),
    "code-05": ('"m": 60', '"m": 1'),
    "code-06": ("(flatten(item)", "(item"),
    "code-07": ("set(numbers)", "numbers"),
}
JAPAN = '{"country": "Japan", "capital": "Tokyo", "currency": "Japanese yen"}'
ORDER = '{"item": "black desk lamps", "quantity": 24, "city": "Porto"}'
ANIMALS = [f"{number}. animal{number}" for number in range(1, 31)]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COUNTED = ", ".join(map(str, range(1, 61)))
SEVENS = ", ".join(map(str, range(7, 141, 7)))
SQUARES = ", ".join(str(number * number) for number in range(1, 16))
LETTERS = " ".join(map(chr, range(ord("z"), ord("a") - 1, -1)))
DIVISIBLE = sum(number % 3 == 0 or number % 5 == 0 for number in range(1, 101))
WEEKDAY = (date(2026, 11, 18) + timedelta(days=100)).strftime("%A")
"""18 November 2026 is a Wednesday."""
REFERENCES: dict[str, tuple[str, str]] = {
    "factual-01": ("Canberra", "Sydney"),
    "factual-02": ("Au", "Ag"),
    "factual-03": ("1945", "1944"),
    "factual-04": ("206", "208"),
    "factual-05": ("Jane Austen", "Emily Brontë"),
    "factual-06": ("Jupiter.", "Saturn"),
    "factual-07": ("Wien", "Vienna"),
    "factual-08": (f"```json\n{JAPAN}\n```", JAPAN.removesuffix("}")),
    "explain-01": ("Light from the sun is scattered by air, blue light most.", "Light of the sun is blue."),
    "explain-02": ("With sunlight and water and air a leaf makes sugar.", "With sunlight a leaf makes sugar."),
    "explain-03": ("The immune system learns to make antibodies.", "The immune system learns."),
    "explain-04": ("The axis of the Earth is tilted.", "The Earth is closer to the Sun in summer."),
    "explain-05": ("It finds the value of a key at once.", "It finds things at once by their key."),
    "reasoning-01": (f"18 / 3 = 6, so\n{18 // 3 * 2}", "27"),
    "reasoning-02": (f"**{2.5 * 60 + 1.5 * 80:g}**", "280"),
    "reasoning-03": (f"{47 * 23:,}", "1061"),
    "reasoning-04": (f"{240 / (15 - 3):g} minutes", "16"),
    "reasoning-05": ("Ana is 24.", "12"),
    "reasoning-06": (f"39 + 12 = {260 * 15 // 100 + 12}", "39"),
    "reasoning-07": (f"{DIVISIBLE}", "53"),
    "reasoning-08": ("1,331.00 euros", "1300"),
    "reasoning-09": ("10", "20"),
    "reasoning-10": (f"{9 + 5}", "13"),
    "reasoning-11": (str(Fraction(5, 6) - Fraction(1, 4)), "4/2"),
    "reasoning-12": ("Tom, Una, Vic, Wes.\nAnswer: Vic", "Answer: Wes"),
    "reasoning-13": (f"Answer: {WEEKDAY}", "Answer: Thursday"),
    "reasoning-14": ("Answer: No.", "Answer: yes"),
    "summary-01": ("On Thursday Marta Holub closes her bakery.", "On Thursday the bakery closes."),
    "summary-02": ("The repair for 5,600 euros, which Ms. Lindqvist will see to.", "4,200 euros, says Ms. Lindqvist."),
    "summary-03": (
        "- Priya: send the budget\n- Tomas: restart the server\n- Wei: release notes",
        "- Priya: send the budget\n- Tomas: restart the server",
    ),
    "summary-04": ("A hard winter ended with a flood that took the bridge.", "word " * 21),
    "summary-05": (ORDER, ORDER.replace("Porto", "Lisbon")),
    "long_context-01": ("140 metres", "114"),
    "long_context-02": ("In the kitchen, behind the calendar.", "In the office."),
    "long_context-03": ("Ruben Askeland", "Marta Holub"),
    "long_context-04": ("Fishermen", "Nobody"),
    "long_context-08": ("1871", "1903"),
    "long_context-09": ("Biscuit", "Nora"),
    "repetition-01": (COUNTED, COUNTED.replace("31, ", "")),
    "repetition-02": (f"{SEVENS}.", SEVENS.replace("91", "93")),
    "repetition-03": (SQUARES, SQUARES.replace("169", "159")),
    "repetition-04": (LETTERS, LETTERS[::-1]),
    "repetition-05": (" ".join(["echo"] * 12), " ".join(["echo"] * 13)),
    "repetition-06": ("\n".join(ANIMALS), "\n".join([*ANIMALS, "31. animal31"])),
    "repetition-07": ("piano", "table"),
    "repetition-08": (", ".join(DAYS * 3), ", ".join(DAYS * 2)),
}
GENERAL = load_prompts("general").prompts
for _prompt in GENERAL:  # of the log: the crates of the line of that time, and of the line before
    if "Warehouse log" in _prompt.prompt and "How many crates" in _prompt.prompt:
        _time = re.findall(r"came at (\d\d:\d\d)\?", _prompt.prompt)[0]
        _crates = dict(re.findall(r"(\d\d:\d\d) gate \d: (\d+) crates", _prompt.prompt))
        _before = list(_crates)[list(_crates).index(_time) - 1]
        REFERENCES[_prompt.id] = (_crates[_time], _crates[_before])


@pytest.mark.parametrize("prompt", GENERAL, ids=lambda prompt: prompt.id)
def test_the_general_set_accepts_what_is_right_and_rejects_what_is_not(prompt: Prompt) -> None:
    if prompt.check == "compare_only":
        assert judge(prompt, "anything", never).ok is None and prompt.id not in REFERENCES
        return
    if prompt.check == "python":
        definition = DEFINITIONS[prompt.id]
        slip = definition.replace(*SLIPS[prompt.id])
        assert slip != definition
        right, wrong = f"```python\n{definition}\n```", f"```python\n{slip}\n```"
    else:
        right, wrong = REFERENCES[prompt.id]
    assert judge(prompt, right, plain) == Judged(True)
    assert judge(prompt, wrong, plain).ok is False
