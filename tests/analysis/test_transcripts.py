"""The detectors beside readers: tests/data/transcripts.jsonl, answers labelled by two independent readers each.

The readers had the definitions of harness/analysis/symptoms.py and the transcripts; they saw no detector, and not each
other. Four sets: 1 to 3 showed what the detectors of their time lacked, and are development data now. Set 4 was drawn
and labelled after the detectors were frozen, from prompts that nothing was tuned on, and decides. `source` is a
precision of the demo model served by vLLM, or "made": written by somebody who saw no detector, as large models fail,
without log-probabilities. Readers and writers were agents of a language model. `doubtful`: a reader would not bet on
it; the guide asked for that mark before anything was labelled.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.symptoms import SYMPTOMS, symptom
from harness.quality.prompts import Prompt
from harness.records import Answer

FILE = Path(__file__).parent.parent / "data" / "transcripts.jsonl"
LOOP, COLLAPSE = "repetition_loop", "token_collapse"
BLIND = 4
"""The set that decides."""


@dataclass(frozen=True)
class Transcript:
    id: str
    set: int
    source: str
    labels: tuple[str, str]
    """Of each reader; "" for nothing wrong and nothing different."""
    doubtful: bool
    found: str

    @property
    def agreed(self) -> bool:
        return self.labels[0] == self.labels[1]


def answer_of(told: dict[str, Any]) -> Answer:
    return Answer(
        "p", "", text=told["text"], finish_reason=told["finish_reason"], ok=told["ok"],
        logprobs=tuple(told.get("logprobs", ())), tokens=tuple(range(len(told.get("logprobs", ())))),
    )  # fmt: skip


@pytest.fixture(scope="module")
def transcripts() -> list[Transcript]:
    read = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = Prompt(
            "p", row["category"], row["prompt"], row["check"], form=row["form"], before=tuple(row.get("before", ()))
        )
        found = symptom(prompt, answer_of(row["baseline"]), answer_of(row["answer"]))
        labels = (row["labels"][0], row["labels"][1])
        read.append(
            Transcript(row["id"], row["set"], row["source"], labels, row["doubtful"], found.name if found else "")
        )
    return read


def precision_and_recall(transcripts: list[Transcript], name: str) -> tuple[float, float]:
    right = sum(one.found == name == one.labels[0] for one in transcripts)
    return right / sum(one.found == name for one in transcripts), right / sum(
        one.labels[0] == name for one in transcripts
    )


def test_the_material_is_what_was_promised(transcripts: list[Transcript]) -> None:
    assert len({one.id for one in transcripts}) == len(transcripts) >= 200
    decides = [one for one in transcripts if one.set == BLIND]
    real = [one for one in decides if one.source.endswith(("-2bit", "-3bit"))]
    assert len(decides) >= 200 and 2 * len(real) >= len(decides)
    labels = Counter(one.labels[0] for one in decides)
    assert labels[LOOP] >= 15 and labels[COLLAPSE] >= 30
    assert {label for one in transcripts for label in one.labels} <= {"", *SYMPTOMS}


def test_the_readers_agree(transcripts: list[Transcript]) -> None:
    """Cohen's kappa: (observed - chance) / (1 - chance), chance from how often each gives each label."""
    observed = sum(one.agreed for one in transcripts) / len(transcripts)
    first, second = (Counter(one.labels[reader] for one in transcripts) for reader in (0, 1))
    chance = sum(first[label] * second[label] for label in first) / len(transcripts) ** 2
    assert (observed - chance) / (1 - chance) > 0.95


@pytest.mark.parametrize("name", [LOOP, COLLAPSE])
@pytest.mark.parametrize("blind", [True, False], ids=["blind and sure", "all"])
def test_precision_and_recall(transcripts: list[Transcript], name: str, blind: bool) -> None:
    """Where the readers agree. With the doubtful ones the blind set has 0.944 and 0.971 for collapse."""
    chosen = [one for one in transcripts if one.set == BLIND and not one.doubtful] if blind else transcripts
    judged = [one for one in chosen if one.agreed]
    precision, recall = precision_and_recall(judged, name)
    odd = [one.id for one in judged if (one.found == name) != (one.labels[0] == name)]
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, odd)


def test_the_doubtful_ones_of_the_blind_set_are_not_hidden(transcripts: list[Transcript]) -> None:
    judged = [one for one in transcripts if one.set == BLIND and one.agreed]
    assert precision_and_recall(judged, LOOP) == (1, 1)
    assert precision_and_recall(judged, COLLAPSE) == pytest.approx((34 / 36, 34 / 35))


def test_every_symptom_is_mostly_what_readers_call_it(transcripts: list[Transcript]) -> None:
    """Of all answers and labels 98.4 %; each symptom with at least 10 of them 0.9 and 0.9."""
    judged = [one for one in transcripts if one.agreed]
    assert sum(one.found == one.labels[0] for one in judged) / len(judged) > 0.98
    for name, count in Counter(one.labels[0] for one in judged).items():
        if name and count >= 10:
            assert min(precision_and_recall(judged, name)) >= 0.9, name
