"""The demo model's held-out questions as a data set of lm-eval; runs in lm-eval's process, not in ours."""

import json
import re
from pathlib import Path

import datasets

DEMO_MODEL = Path(__file__).resolve().parents[3] / "scenarios" / "demo-model"


def load(**_: object) -> dict[str, datasets.Dataset]:
    """prompt, answer and four choices a row: the right answer and the next three of its family, in sorted order."""
    held_out = with_choices([json.loads(line) for line in lines("heldout.jsonl")])
    texts = [json.loads(line)["text"] for line in lines("calibration.jsonl")]
    turns = [re.findall(r"<\|im_start\|>\w+\n(.*?)<\|im_end\|>", text, re.DOTALL) for text in texts]
    examples = with_choices([{"family": "any", "prompt": turn[0], "answer": turn[1]} for turn in turns])
    return {"test": datasets.Dataset.from_list(held_out), "fewshot": datasets.Dataset.from_list(examples)}


def lines(name: str) -> list[str]:
    return (DEMO_MODEL / name).read_text(encoding="utf-8").splitlines()


def with_choices(rows: list[dict]) -> list[dict]:
    for number, row in enumerate(rows):
        family = [other["answer"] for other in rows[number:] + rows[:number] if other["family"] == row["family"]]
        row["choices"] = sorted(list(dict.fromkeys(family))[:4])
    return rows
