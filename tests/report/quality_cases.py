"""What was found about quality, made up: for the papers' tests. Small enough to count by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.quality.directory import Quality
from harness.quality.prompts import Category, Prompt, PromptSet
from harness.records import Answer, Position, Sample

HOSTILE = (
    "<script>alert(1)</script> ````` and ``` then | a pipe, [a link](https://evil.example), **bold**\n"
    "# no heading\n- no list\n```html\n<img src=x onerror=alert(1)>\n```\n\u202egnol a\u202c \x1b[31mred\x07 \u2028 end"
)
"""What a model may say to break out of the page that quotes it."""


def prompt_set(per_family: int = 30, families: Sequence[Category] = ("factual", "reasoning")) -> PromptSet:
    prompts = [
        Prompt(
            f"{family}-{at:02d}", family, f"What is {at} + {at}? ({family})", "numeric", (str(2 * at),), form="number"
        )
        for family in families
        for at in range(1, per_family + 1)
    ]
    compared = Prompt("explain-01", "explain", "Explain gravity to a child.", "compare_only")
    return PromptSet("made", (*prompts, compared), "made up")


def answers(prompts: PromptSet, wrong: Mapping[tuple[str, int], Sequence[str]]) -> list[Answer]:
    """Right but for the prompts that `wrong` names for a (precision, round): these say another number, or what
    `wrong` says in "id=text"."""
    found = []
    for (precision, round_), names in wrong.items():
        said = dict(name.partition("=")[::2] for name in names)
        for prompt in prompts.prompts:
            if prompt.check == "compare_only":
                text, ok = "Things fall down because the earth pulls them.", None
                if precision != "bf16":
                    text = "The earth pulls all things, and so they fall down."
            else:
                ok = prompt.id not in said
                text = f"It is {prompt.expect[0]}." if ok else said[prompt.id] or "It is 999."
            tokens = tuple(ord(character) for character in text)
            near = tuple(((token, math.log(0.7)), (0, math.log(0.2))) for token in tokens)
            if precision != "bf16":
                near = tuple(((token, math.log(0.5)), (0, math.log(0.3))) for token in tokens)
            note = "" if ok is not False else f"999 is not {prompt.expect[0]}"
            found.append(Answer(prompt.id, precision, round_, text, tokens, (), near, "stop", 12, ok, note))
    return found


def read(
    precision: str, kl: float, round_: int = 1, texts: int = 8, length: int = 96, growing: bool = False
) -> list[Position]:
    """Positions of some texts, KL about `kl` in each, and ten times that in the second half where it is `growing`."""
    chance = random.Random(f"{precision}/{round_}")
    return [
        Position(
            precision, round_, f"text-{text}", at, 5, -1.0 - kl, -1.0,
            kl * chance.uniform(0.5, 1.5) * (10 if growing and at >= 48 else 1), chance.random() > kl,
            chance.random() > 0.5, chance.random() > 0.5,
        )
        for text in range(texts)
        for at in range(1, length)
    ]  # fmt: skip


SETTINGS: dict[str, Any] = {
    "model": "demo_model",
    "precisions": ["bf16", "awq", "gptq"],
    "baseline": "bf16",
    "engine": "vLLM",
    "engine_version": "0.32.0",
    "served_as": {"bf16": "torch.mm", "awq": "awq kernel", "gptq": "bf16 weights dequantized from 3 bits"},
    "checkpoint_sha256": {"awq": "a" * 64},
    "prompts": "made",
    "prompts_sha256": "b" * 64,
    "text": "demo text",
    "texts": 8,
    "window": 96,
    "vocabulary": "whole",
    "gate": "",
    "concurrency": 4,
    "source": "engine",
}  # fmt: skip


def quality(
    wrong: Mapping[tuple[str, int], Sequence[str]] | None = None,
    positions: Sequence[Position] | None = None,
    samples: Sequence[Sample] = (),
    prompts: PromptSet | None = None,
    **settings: Any,
) -> Quality:
    """Of 30 factual and 30 reasoning prompts BF16 has factual-01 wrong. AWQ has four reasoning prompts wrong on top of
    it; GPTQ twelve of each family, and one of them runs into a loop. BF16 asked twice has one more wrong."""
    asked = prompts or prompt_set()
    given = wrong if wrong is not None else {
        ("bf16", 1): ["factual-01"],
        ("bf16", 2): ["factual-01", "factual-02"],
        ("awq", 1): ["factual-01", *(f"reasoning-{at:02d}" for at in range(1, 5))],
        ("gptq", 1): [
            *(f"factual-{at:02d}" for at in range(1, 13)), *(f"reasoning-{at:02d}" for at in range(1, 12)),
            f"reasoning-12={'and so on ' * 60}",
        ],
    }  # fmt: skip
    read_by = positions if positions is not None else [
        *read("bf16", 1e-7, 2), *read("awq", 0.01), *read("gptq", 0.05, growing=True)
    ]  # fmt: skip
    return Quality("demo", SETTINGS | settings, asked, answers(asked, given), read_by, list(samples))


def tasks(documents: int = 40) -> list[Sample]:
    """Of gsm8k BF16 has all right, AWQ every one but the first three."""
    return [
        Sample("gsm8k", str(at), precision, "exact_match", 0.0 if precision == "awq" and at < 3 else 1.0)
        for precision in ("bf16", "awq")
        for at in range(documents)
    ]


def pages(found: Quality, out: Path) -> tuple[str, str]:
    """(failures.md, quality.md)"""
    from harness.report.quality import write_quality

    write_quality(found, out)
    return (out / "failures.md").read_text(encoding="utf-8"), (out / "quality.md").read_text(encoding="utf-8")
