"""Make the demo model's failure prompts: questions that it answers well in BF16 and that rounding can spoil.

    python tools/failure_prompts.py > scenarios/failures/demo.toml

Everything asked comes from the held-out side of demo_tasks.py. Forms were chosen by what the BF16 model can do, single
prompts were not: no prompt was dropped because of an answer to it.

    factual        facts, in a phrasing not trained for that fact
    explain        compound words
    reasoning      20 sums and differences in two steps, 20 chains of two or three hops
    code           a function's body from its name or its docstring; its tests are worked out from the right expression
    summary        the point of a short text
    long_context   a question after 12, 24 or 40 others and their answers: some 400, 800 and 1,300 tokens. Only the
                   position and what else there is to look at are long. Finding something far back was never trained,
                   and BF16 cannot do it.
    repetition     what invites a model to go on as before: another question after eight or sixteen times the same, a
                   text that says the same sentence three or four times, a question that is put twice
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import demo_tasks
from demo_tasks import Example
from tokenizers import Tokenizer

from harness.quality.prompts import Category, Prompt, PromptSet, to_toml

EACH = 40
"""Prompts in a category. With 40 pairs, 6 answers lost and none won are p = 0.03 (McNemar, exact, two-sided)."""
MODEL = Path(__file__).parent.parent / "scenarios" / "demo-model"
DESCRIPTION = (
    "40 questions in each of seven families for the demo model, held out of its training, made by "
    "tools/failure_prompts.py; long_context asks after 12 to 40 other turns and needs nothing of them, so it is about "
    "position and not about retrieval, which this model cannot do in BF16 either"
)
SPOKEN = ("facts", "arithmetic", "reasoning", "summary")
"""Families of demo_tasks that keep their accuracy after a long context; code does not."""

Draw = Callable[[random.Random], dict[str, Any]]
"""Draws a question: the fields of Prompt but id, category and max_tokens, and `answer`, the right one."""


# --- questions -------------------------------------------------------------------------------------------------------


def checked(example: Example) -> dict[str, Any]:
    """A question of demo_tasks with the check of its family."""
    asked = {"prompt": example.prompt, "answer": example.answer}
    if example.family == "arithmetic":
        return asked | {"check": "numeric", "expect": (example.answer.rpartition(" ")[2],), "form": "number"}
    if example.family == "code":
        head = example.prompt.partition("\n")[2]
        return asked | {"check": "python", "prefix": head, "tests": unit_tests(head, example.answer), "form": "code"}
    return asked | {"check": "exact", "expect": (example.answer,)}


def of(family: Callable[[random.Random, demo_tasks.Split], Example]) -> Draw:
    return lambda rng: checked(family(rng, "heldout"))


def any_spoken(rng: random.Random) -> dict[str, Any]:
    return checked(demo_tasks.FAMILIES[rng.choice(SPOKEN)](rng, "heldout"))


def after(turns: list[Example], asked: dict[str, Any]) -> dict[str, Any]:
    return asked | {"before": tuple(text for turn in turns for text in (turn.prompt, turn.answer))}


def after_others(count: int) -> Draw:
    """A question after `count` different ones, of all families and from the training side."""

    def draw(rng: random.Random) -> dict[str, Any]:
        others = [demo_tasks.FAMILIES[rng.choice(list(demo_tasks.FAMILIES))](rng, "train") for _ in range(count)]
        return after(others, any_spoken(rng))

    return draw


def after_the_same(count: int) -> Draw:
    """A question after `count` times another one."""

    def draw(rng: random.Random) -> dict[str, Any]:
        return after([demo_tasks.FAMILIES[rng.choice(SPOKEN)](rng, "train")] * count, any_spoken(rng))

    return draw


def same_sentence(rng: random.Random) -> dict[str, Any]:
    """A text that says one detail three or four times around its point."""
    example = demo_tasks.point(rng, "heldout")
    sentences = re.split(r"(?<=\.) ", example.prompt.removeprefix("Summarize: "))
    cued = next(sentence for sentence in sentences if sentence.endswith(example.answer.removeprefix("The ")))
    detail = next(sentence for sentence in sentences if sentence != cued)
    said = [detail] * rng.choice((3, 4))
    said.insert(rng.randint(0, len(said)), cued)
    return {**checked(example), "prompt": f"Summarize: {' '.join(said)}"}


def put_twice(rng: random.Random) -> dict[str, Any]:
    asked = any_spoken(rng)
    return {**asked, "prompt": f"{asked['prompt']} {asked['prompt']}"}


# --- unit tests ------------------------------------------------------------------------------------------------------


def unit_tests(head: str, answer: str) -> str:
    """Asserts on what the function returns for a few arguments, by the right expression."""
    name, argument = re.findall(r"def (\w+)\((\w+)\)", head)[0]
    expression = answer.removeprefix("return ")
    k = max((int(number) for number in re.findall(r"\d+", head)), default=0)
    right = eval(f"lambda {argument}: {expression}")  # our own text: demo_tasks made it
    lines = []
    for value in arguments(argument, expression, k):
        try:
            result = right(value)
        except ValueError:  # the least of nothing
            continue
        equals = "is" if isinstance(result, bool) else "=="
        lines.append(f"assert {name}({literal(value)}) {equals} {literal(result)}")
    return "\n".join(lines) + "\n"


def arguments(argument: str, expression: str, k: int) -> list[Any]:
    """Values that tell the right expression from its neighbours: around k, and far from it."""
    if argument == "x":
        return [0, 1, 2, 3] if "**" in expression else [k - 1, k, k + 1, 3 * k + 7]
    if argument == "text":
        return ["  \tone Two  ", "STRASSE Straße", " x"]
    if "items[" in expression:
        return [list(range(3 * k + 4)), list(range(1, 2 * k + 3))]
    return [
        [k + 1, k - 1, k - 2, 2 * k, 3 * k, 2 * k + 1],
        [k - 1, k, k + 2, 5 * k + 5],
        [k - 2, k - 4, k + 1, k, 2 * k],
        [k, 0],
    ]


def literal(value: Any) -> str:
    """Python for it; long runs of numbers as a range."""
    if isinstance(value, list) and len(value) > 4:
        run = range(value[0], value[-1] + 1, max(1, value[1] - value[0]))
        if list(run) == value:
            return f"list({run})"
    return repr(value)


# --- the set ---------------------------------------------------------------------------------------------------------

FAMILIES: dict[Category, tuple[Draw, ...]] = {
    "factual": (of(demo_tasks.fact),),
    "explain": (of(demo_tasks.explanation),),
    "reasoning": (of(demo_tasks.arithmetic), of(demo_tasks.reasoning)),
    "code": (of(demo_tasks.code),),
    "summary": (of(demo_tasks.point),),
    "long_context": (after_others(12), after_others(24), after_others(40)),
    "repetition": (after_the_same(8), after_the_same(16), same_sentence, put_twice),
}


def prompts(category: Category, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Without end, each question once, its forms in turn."""
    rng, seen = random.Random(f"failures/{category}"), set()
    while True:
        for draw in FAMILIES[category]:
            asked = draw(rng)
            answer = asked.pop("answer")
            if asked["prompt"] not in seen:
                seen.add(asked["prompt"])
                # Four times what the answer needs: whoever has not ended then does not end. 64 show how it goes on.
                limit = max(64, 4 * len(tokenizer.encode(answer).ids))
                yield Prompt(id=f"{category}-{len(seen):02d}", category=category, max_tokens=limit, **asked)


def demo_set() -> PromptSet:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    chosen = [prompt for category in FAMILIES for prompt in islice(prompts(category, tokenizer), EACH)]
    return PromptSet("demo", tuple(chosen), DESCRIPTION)


if __name__ == "__main__":
    sys.stdout.write(to_toml(demo_set()))
