"""Prompts: exact lengths, new for each cell, the same for each precision; and servers of every kind are understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.engines import Target
from harness.errors import EngineError
from harness.load.dialect import probe
from harness.load.workload import Dialect, make_ask, vocabulary
from harness.records import Cell, Scenario

IDS = Dialect(vocabulary=vocabulary(1000, [0, 5]))
SCENARIO = Scenario("test", input_tokens=100, output_tokens=20)


def body(cell: Cell, user: int = 0, sequence: int = 0, dialect: Dialect = IDS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(make_ask(SCENARIO, cell, user, sequence, dialect, "m").body)
    return found


def test_lengths_are_exact_and_special_tokens_are_left_out() -> None:
    for sequence in range(50):
        ask = make_ask(SCENARIO, Cell("bf16", 4), 1, sequence, IDS, "m")
        sent = json.loads(ask.body)
        assert len(sent["prompt"]) == ask.input_tokens and 75 <= ask.input_tokens <= 125
        assert sent["max_tokens"] == sent["min_tokens"] == ask.output_tokens and 15 <= ask.output_tokens <= 25
        assert not {0, 5} & set(sent["prompt"])


def test_precisions_get_the_same_prompts_and_cells_never_share_any() -> None:
    """The trap: one seed at every concurrency and a prefix cache made others up to 2.3 times too fast."""
    assert body(Cell("bf16", 8), 3, 2)["prompt"] == body(Cell("awq", 8), 3, 2)["prompt"]
    prompts = [
        tuple(body(Cell("bf16", conc, repeat), user, sequence)["prompt"][:16])
        for conc in (1, 8) for repeat in (1, 2) for user in range(3) for sequence in range(3)
    ]  # fmt: skip
    assert len(set(prompts)) == len(prompts)
    assert body(Cell("bf16", 8))["cache_salt"] != body(Cell("bf16", 16))["cache_salt"]


def test_lengths_are_jittered() -> None:
    """The trap: equal lengths with ignore_eos march in step."""
    assert len({len(body(Cell("bf16", 4), user)["prompt"]) for user in range(20)}) > 5


def test_probe_finds_what_a_server_understands(truth) -> None:  # type: ignore[no-untyped-def]
    def found(*arguments: str, chat: bool = False) -> Dialect:
        return probe(Target(truth("--ttft-ms", "1", "--gap-ms", "1", *arguments), "truth"), chat=chat)

    assert found() == Dialect("/v1/completions", words_per_token=1.0, overhead_tokens=0.0)
    assert found("--strict").vllm_extras is False
    chat = found("--chat-only")
    assert chat.chat and chat.path == "/v1/chat/completions"
    assert chat.words_per_token == pytest.approx(1.0) and chat.overhead_tokens == pytest.approx(5.0)
    assert found(chat=True).chat


def test_text_prompts_are_calibrated_by_the_servers_count() -> None:
    """0.5 words a token and 5 tokens of template: 105 tokens want (105 - 5) * 0.5 = 50 words."""
    dialect = Dialect("/v1/chat/completions", chat=True, words_per_token=0.5, overhead_tokens=5, vllm_extras=False)
    sent = body(Cell("x", 1), dialect=dialect)
    words = len(sent["messages"][0]["content"].split())
    ask = make_ask(SCENARIO, Cell("x", 1), 0, 0, dialect, "m")
    assert words == round((ask.input_tokens - 5) * 0.5)
    assert "ignore_eos" not in sent and "cache_salt" not in sent


def test_a_server_that_answers_nothing_is_an_error_with_its_words(truth) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineError, match="scripted"):
        probe(Target(truth("--status", "500"), "truth"))
