"""Prompts: exact lengths, new for each cell, the same for each precision; and servers of every kind are understood."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import pytest
from scipy import stats

from harness.engines import Target
from harness.errors import EngineError
from harness.load.dataset import Prompt, Prompts
from harness.load.dialect import probe, tokenizer
from harness.load.workload import (
    NO_HISTORY,
    Dialect,
    drawn_length,
    extended,
    lognormal_mu,
    longest_length,
    make_ask,
    vocabulary,
)
from harness.records import Cell, Scenario

IDS = Dialect(vocabulary=vocabulary(1000, [0, 5]))
TEXT = Dialect(words_per_token=1.0)
CHAT = Dialect("/v1/chat/completions", chat=True, words_per_token=1.0)
PLAIN = Dialect(vocabulary=IDS.vocabulary, vllm_extras=False)
"""Takes ids, but no cache salt."""
SCENARIO = Scenario("test", input_tokens=100, output_tokens=20)
CELL = Cell("bf16", 4)


def body(cell: Cell, user: int = 0, sequence: int = 0, dialect: Dialect = IDS, **options: Any) -> dict[str, Any]:
    scenario = options.pop("scenario", SCENARIO)
    found: dict[str, Any] = json.loads(make_ask(scenario, cell, user, sequence, dialect, "m", **options).body)
    return found


def test_lengths_are_exact_and_special_tokens_are_left_out() -> None:
    for sequence in range(50):
        ask = make_ask(SCENARIO, CELL, 1, sequence, IDS, "m")
        sent = json.loads(ask.body)
        assert len(sent["prompt"]) == ask.input_tokens and 75 <= ask.input_tokens <= 125
        assert sent["max_tokens"] == sent["min_tokens"] == ask.output_tokens and 15 <= ask.output_tokens <= 25
        assert not {0, 5} & set(sent["prompt"])


def test_precisions_get_the_same_prompts_and_cells_never_share_any() -> None:
    """The trap: one seed at every concurrency and a prefix cache made others up to 2.3 times too fast."""
    assert body(Cell("bf16", 8), 3, 2)["prompt"] == body(Cell("awq", 8), 3, 2)["prompt"]
    cells = [Cell("bf16", conc, repeat) for conc in (1, 8) for repeat in (1, 2)]
    cells += [Cell("bf16", 0, repeat, rate) for rate in (1.0, 2.5) for repeat in (1, 2)]
    prompts = [
        tuple(body(cell, user, sequence)["prompt"][:16])
        for cell in cells for user in range(3) for sequence in range(3)
    ]  # fmt: skip
    assert len(set(prompts)) == len(prompts)
    assert body(Cell("bf16", 8))["cache_salt"] != body(Cell("bf16", 16))["cache_salt"]


def test_attempts_and_runs_differ_in_the_cache_salt_alone() -> None:
    """What a cell asks can be asked again, and finds no warm cache; vLLM refuses a salt with a slash."""
    sent = [body(cell, salt=salt) for salt in ("run1", "run2") for cell in (CELL, replace(CELL, attempt=2))]
    salts = [item.pop("cache_salt") for item in sent]
    assert salts == ["run1-bf16-c4-r1-a1", "run1-bf16-c4-r1-a2", "run2-bf16-c4-r1-a1", "run2-bf16-c4-r1-a2"]
    assert all(item == sent[0] for item in sent)


@pytest.mark.parametrize("dialect", [PLAIN, replace(TEXT, vllm_extras=False)], ids=["ids", "text"])
def test_without_a_cache_salt_runs_and_attempts_get_other_text_of_the_same_lengths(dialect: Dialect) -> None:
    cells = [CELL, replace(CELL, attempt=2)]
    asks = [make_ask(SCENARIO, cell, 1, 2, dialect, "m", salt=salt) for salt in ("run1", "run2") for cell in cells]
    assert len({str(json.loads(ask.body)["prompt"])[:60] for ask in asks}) == 4
    assert len({(ask.input_tokens, ask.output_tokens) for ask in asks}) == 1
    again = make_ask(SCENARIO, replace(CELL, precision="awq"), 1, 2, dialect, "m", salt="run1")
    assert again.body == asks[0].body, "both precisions of a run get the same"


# --- lengths ----------------------------------------------------------------------------------------------------------


def drawn(mean: int, count: int = 5000, **changes: Any) -> list[int]:
    scenario, rng = replace(SCENARIO, **changes), random.Random(7)
    return [drawn_length(mean, scenario, rng) for _ in range(count)]


def test_uniform_lengths_are_even_over_the_jitter() -> None:
    """100 ± 25 %: each whole number from 75 to 125 is as likely as any other."""
    found = Counter(drawn(100))
    assert sorted(found) == list(range(75, 126))
    assert stats.chisquare(list(found.values())).pvalue > 0.01


@pytest.mark.parametrize(("mean", "sigma"), [(2000, 0.5), (3000, 1.2)])
def test_lognormal_lengths_are_scipys_cut_at_the_quantile_with_the_mean_asked_for(mean: int, sigma: float) -> None:
    full = stats.lognorm(s=sigma, scale=math.exp(lognormal_mu(mean, sigma)))
    end = full.ppf(0.999)
    assert full.expect(lambda x: x, lb=0, ub=end) / 0.999 == pytest.approx(mean, rel=1e-4)
    found = drawn(mean, length_distribution="lognormal", length_jitter=sigma)
    assert stats.kstest(found, lambda x: full.cdf(x) / 0.999).pvalue > 0.01
    assert (
        stats.kstest(found, stats.lognorm(s=sigma * 1.1, scale=math.exp(lognormal_mu(mean, sigma))).cdf).pvalue < 0.01
    )
    scenario = replace(SCENARIO, length_distribution="lognormal", length_jitter=sigma)
    assert max(found) <= longest_length(mean, scenario) == pytest.approx(end, abs=1)


def test_mu_of_the_lognormal_worked_out_by_hand() -> None:
    """s = 0.5: Phi(3.0902 - 0.5) = 0.99520; ln(2000 / (0.99520 / 0.999)) - 0.125 = 7.6047 - 0.125 = 7.4797."""
    assert lognormal_mu(2000, 0.5) == pytest.approx(7.4797, abs=1e-4)


def test_fixed_lengths_are_fixed_and_none_is_below_one() -> None:
    assert set(drawn(100, 50, length_distribution="fixed")) == {100}
    assert min(drawn(1, 200, length_distribution="lognormal", length_jitter=1.5)) == 1


def test_lengths_are_jittered() -> None:
    """The trap: equal lengths with ignore_eos march in step."""
    assert len({len(body(CELL, user)["prompt"]) for user in range(20)}) > 5


def test_a_traces_lengths_are_asked_as_they_are() -> None:
    """A trace's failed request has no answer; two tokens is the least that has a TPOT."""
    ask = make_ask(SCENARIO, CELL, 1, 0, IDS, "m", lengths=(333, 44))
    sent = json.loads(ask.body)
    assert (len(sent["prompt"]), sent["max_tokens"]) == (ask.input_tokens, ask.output_tokens) == (333, 44)
    least = make_ask(SCENARIO, CELL, 1, 0, IDS, "m", lengths=(0, 0))
    assert (least.input_tokens, least.output_tokens) == (1, 2)


# --- what requests have in common -------------------------------------------------------------------------------------


def test_a_shared_prefix_is_exactly_that_long_and_no_longer() -> None:
    """40 % of 100 tokens: 40 ids that every request of the cell begins with, whatever its precision, and no other."""
    scenario = replace(SCENARIO, shared_prefix=0.4)
    prompts = [body(CELL, user, sequence, scenario=scenario)["prompt"] for user in range(5) for sequence in range(5)]
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1
    assert len({prompt[40] for prompt in prompts}) > 10
    assert len({tuple(prompt[40:56]) for prompt in prompts}) == len(prompts)
    assert body(replace(CELL, precision="awq"), scenario=scenario)["prompt"] == prompts[0]
    assert body(Cell("bf16", 4, repeat=2), scenario=scenario)["prompt"][:16] != prompts[0][:16]
    # What is new has 60 ± 25 % tokens, so the mean stays 100.
    assert {len(prompt) for prompt in prompts} <= set(range(40 + 45, 40 + 76))


def test_a_shared_prefix_gives_way_to_a_traces_short_prompt() -> None:
    scenario = replace(SCENARIO, shared_prefix=0.4)
    first, second = (body(CELL, user, scenario=scenario, lengths=(30, 8))["prompt"] for user in (1, 2))
    assert len(first) == 30 and first[:29] == second[:29] and first[29] != second[29]


@pytest.mark.parametrize("dialect", [TEXT, CHAT], ids=["text", "chat"])
def test_a_shared_prefix_of_text_is_words(dialect: Dialect) -> None:
    scenario = replace(SCENARIO, shared_prefix=0.4)
    texts = [make_ask(scenario, CELL, user, 0, dialect, "m").text.split() for user in range(10)]
    assert len({tuple(words[:40]) for words in texts}) == 1
    assert len({words[40] for words in texts}) > 3


# --- conversations ----------------------------------------------------------------------------------------------------

TALK = replace(SCENARIO, turns=3)


def test_a_later_turn_is_what_was_said_with_new_ids_behind_it() -> None:
    first = make_ask(TALK, CELL, 2, 0, IDS, "m")
    history = extended(NO_HISTORY, first, [7, 8, 9], "text of no account")
    second = make_ask(TALK, CELL, 2, 1, IDS, "m", history=history)
    one, two = json.loads(first.body)["prompt"], json.loads(second.body)["prompt"]
    assert two[: len(one) + 3] == [*one, 7, 8, 9]
    assert 75 <= len(two) - len(one) - 3 <= 125
    assert second.input_tokens == len(two) and history.tokens == len(one) + 3
    third = make_ask(TALK, CELL, 2, 2, IDS, "m", history=extended(history, second, [4], ""))
    three = json.loads(third.body)["prompt"]
    assert three[: len(two) + 1] == [*two, 4] and third.input_tokens == len(three)
    assert not {tuple(two[-16:])} & {tuple(three[-16:])}


def test_a_later_turn_brings_no_second_prefix() -> None:
    scenario = replace(TALK, shared_prefix=0.4)
    first = make_ask(scenario, CELL, 2, 0, IDS, "m")
    second = make_ask(scenario, CELL, 2, 1, IDS, "m", history=extended(NO_HISTORY, first, [7], ""))
    assert second.ids[:16] != first.ids[:16]


def test_a_conversation_in_chat_is_a_list_of_messages() -> None:
    first = make_ask(TALK, CELL, 2, 0, CHAT, "m")
    history = extended(NO_HISTORY, first, [1, 2, 3, 4], "the answer")
    second = make_ask(TALK, CELL, 2, 1, CHAT, "m", history=history)
    said = json.loads(first.body)["messages"]
    assert json.loads(second.body)["messages"] == [
        *said,
        {"role": "assistant", "content": "the answer"},
        {"role": "user", "content": second.text},
    ]
    assert second.input_tokens == first.input_tokens + 4 + len(second.text.split())


def test_a_conversation_in_text_goes_on_where_the_answer_ended() -> None:
    """A server that tells no ids of its answer is taken at its word for the length."""
    first = make_ask(TALK, CELL, 2, 0, TEXT, "m")
    second = make_ask(TALK, CELL, 2, 1, TEXT, "m", history=extended(NO_HISTORY, first, [], " so it is."))
    assert json.loads(second.body)["prompt"] == first.text + " so it is." + second.text
    assert second.text[0] == " "
    assert second.input_tokens == first.input_tokens + first.output_tokens + len(second.text.split())


def test_a_server_that_takes_ids_and_tells_none_keeps_the_lengths() -> None:
    first = make_ask(TALK, CELL, 2, 0, IDS, "m")
    history = extended(NO_HISTORY, first, [], "unknown ids")
    assert history.ids[: len(first.ids)] == first.ids
    assert history.tokens == len(history.ids) == first.input_tokens + first.output_tokens


def test_a_turns_template_is_part_of_its_length() -> None:
    """0.5 words a token, 5 tokens for the first turn and 9 for a later one: (100 - 5) / 2 and (100 - 9) / 2 words."""
    scenario = replace(TALK, length_distribution="fixed")
    dialect = replace(CHAT, words_per_token=0.5, overhead_tokens=5, turn_overhead_tokens=9)
    first = make_ask(scenario, CELL, 0, 0, dialect, "m")
    second = make_ask(scenario, CELL, 0, 1, dialect, "m", history=extended(NO_HISTORY, first, [1], "a"))
    assert (len(first.text.split()), len(second.text.split())) == (48, 46)
    assert second.input_tokens == 100 + 1 + 100


# --- prompts from files -----------------------------------------------------------------------------------------------

FILE = Prompts(tuple(Prompt(f"prompt {n}", tuple(range(100 * n, 101 * n)), 10 * n) for n in range(1, 9)))
"""Eight prompts: the n-th has n ids and an answer of 10 n tokens."""
FROM_FILE = replace(SCENARIO, dataset="d.json", length_distribution="empirical")


def from_file(cell: Cell, number: int, dialect: Dialect = IDS, salt: str = "") -> dict[str, Any]:
    user, sequence = (number % cell.conc, number // cell.conc) if cell.conc else (number, 0)
    return body(cell, user, sequence, dialect, scenario=FROM_FILE, prompts=FILE, salt=salt)


@pytest.mark.parametrize("cell", [Cell("bf16", 3), Cell("bf16", 0, rate_rps=2.0)], ids=["closed", "open"])
def test_each_prompt_of_a_file_is_asked_once_a_pass_with_its_own_length(cell: Cell) -> None:
    for start in (0, 8):
        sent = [from_file(cell, number) for number in range(start, start + 8)]
        assert sorted(tuple(item["prompt"]) for item in sent) == sorted(prompt.ids or () for prompt in FILE.items)
        assert all(item["max_tokens"] == 10 * len(item["prompt"]) for item in sent)
        assert len({item["cache_salt"] for item in sent}) == 1
    assert from_file(cell, 7)["cache_salt"] != from_file(cell, 8)["cache_salt"], "a new pass finds no warm cache"


def test_the_order_of_a_file_is_the_same_for_each_precision_and_another_for_each_cell() -> None:
    def order(cell: Cell) -> list[list[int]]:
        return [from_file(cell, number)["prompt"] for number in range(8)]

    assert order(Cell("bf16", 2)) == order(Cell("awq", 2, attempt=2))
    assert len({str(order(Cell("bf16", conc))) for conc in (1, 2, 4)}) == 3


def test_without_a_cache_salt_a_head_keeps_cells_passes_and_runs_apart() -> None:
    """Eight drawn ids before the prompt: the same for a pass, so that it is still the prompt's own text that counts."""
    heads = set()
    for cell in (Cell("bf16", 2), Cell("bf16", 4), Cell("bf16", 2, attempt=2)):
        for salt in ("run1", "run2"):
            for start in (0, 8):
                sent = [from_file(cell, number, PLAIN, salt)["prompt"] for number in range(start, start + 8)]
                assert sorted(tuple(ids[8:]) for ids in sent) == sorted(prompt.ids or () for prompt in FILE.items)
                heads |= {tuple(ids[:8]) for ids in sent}
    assert len(heads) == 3 * 2 * 2


def test_a_prompt_without_ids_goes_as_text_and_one_without_a_length_gets_the_scenarios() -> None:
    prompts = Prompts((Prompt("Why is the sky blue?"),))
    ask = make_ask(FROM_FILE, CELL, 0, 0, replace(TEXT, overhead_tokens=2), "m", prompts=prompts)
    assert json.loads(ask.body)["prompt"] == "Why is the sky blue?"
    assert ask.input_tokens == 5 + 2 and 15 <= ask.output_tokens <= 25
    chat = body(CELL, 0, 0, CHAT, scenario=FROM_FILE, prompts=FILE)
    assert chat["messages"][0]["content"] in {prompt.text for prompt in FILE.items}


def test_a_dataset_is_never_replaced_by_drawn_prompts() -> None:
    with pytest.raises(ValueError, match="dataset"):
        make_ask(FROM_FILE, CELL, 0, 0, IDS, "m")


# --- what servers understand ------------------------------------------------------------------------------------------


def test_probe_finds_what_a_server_understands(truth) -> None:  # type: ignore[no-untyped-def]
    def found(*arguments: str, chat: bool = False) -> Dialect:
        return probe(Target(truth("--ttft-ms", "1", "--gap-ms", "1", *arguments), "truth"), chat=chat)

    assert found() == Dialect("/v1/completions", words_per_token=1.0, overhead_tokens=0.0)
    assert found("--strict").vllm_extras is False
    chat = found("--chat-only")
    assert chat.chat and chat.path == "/v1/chat/completions"
    assert chat.words_per_token == pytest.approx(1.0) and chat.overhead_tokens == pytest.approx(5.0)
    assert chat.turn_overhead_tokens == 0.0, "its template adds 5 tokens, whatever the number of messages"
    assert found(chat=True).chat


def test_a_chat_template_is_calibrated_within_a_small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens a word, 7 for the template and 4 for each further turn, on a server with room for 200 tokens."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if "messages" not in asked:
            return httpx.Response(404)
        words = sum(len(message["content"].split()) for message in asked["messages"])
        tokens = 2 * words + 7 + 4 * (len(asked["messages"]) // 2)
        return httpx.Response(200 if tokens <= 200 else 400, json={"usage": {"prompt_tokens": tokens}})

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    found = probe(Target("http://server", "m"))
    assert (found.words_per_token, found.overhead_tokens, found.turn_overhead_tokens) == (0.5, 7.0, 4.0)


def test_the_servers_tokenizer_is_used_where_there_is_one(truth) -> None:  # type: ignore[no-untyped-def]
    """The scripted server makes a token of each word, the same one for the same word."""
    tokenize = tokenizer(Target(truth("--tokenize"), "truth"))
    assert tokenize is not None
    first, second, third = tokenize("one two one")
    assert first == third != second
    assert tokenizer(Target(truth(), "truth")) is None


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
