"""What a model writes for its own training: sampled from its own probabilities, begun and ended as its texts are."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoTokenizer

from quantize.blocks import FAMILIES
from quantize.calibration import load
from quantize.corpus import build
from quantize.errors import CalibrationError, QuantizeError, RunError, SchemeError
from quantize.fidelity import load_original
from quantize.recipe import Recipe
from quantize.selfwritten import Frame, documents, frame_of, write

DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo-model"
SMALL = 24
"""A vocabulary of which every token is common enough to be counted."""


def small_model(family: str = "qwen2") -> Any:
    """A random model of `SMALL` tokens with logits that differ from context to context.

    Those of the tokens 0 and 5, which end something in these tests, are always 0: 2 % or so.
    """
    model = tiny_model.build(
        family, torch.float32, vocab_size=SMALL, eos_token_id=0, tie_word_embeddings=False, max_position_embeddings=512
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator) * 0.1)
        model.lm_head.weight[[0, 5]] = 0
    return model.requires_grad_(False)


def generated(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """Of the token after each of `ids`: [ids, vocabulary], all at once and so without a cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return found


def ranks(model: Any, written: Sequence[Sequence[int]], sampled: Sequence[Sequence[int]]) -> Iterator[float]:
    """Where in the cumulative distribution each sampled token lies: uniform on [0, 1] if it was drawn from it.

    sampled: the positions of each document that were. The place within a token's own share is drawn at random.
    """
    numbers = random.Random(4)
    for ids, positions in zip(written, sampled, strict=True):
        p = logits_of(model, ids).softmax(dim=-1).double()
        for t in positions:
            share = p[t - 1]
            yield float(share[: ids[t]].sum() + numbers.random() * share[ids[t]])


# What is sampled


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    model, generator = small_model(), generated()
    frame = Frame((3, 5), (), frozenset(), ())
    counts = torch.zeros(SMALL)
    for _ in range(8):
        for ids in documents(model, frame, 3, temperature, 500, generator):
            assert ids[:2] == [3, 5] and len(ids) == 3
            counts[ids[2]] += 1
    logits = logits_of(model, (3, 5))[-1].double()
    for divisor, fits in ((temperature, True), (0.75, False)):
        expected = (logits / divisor).softmax(dim=-1) * 4000
        # Chi-square wants five of a kind; what is rarer is taken together.
        rare = expected < 5
        observed, wanted = ((torch.cat([x[~rare], x[rare].sum()[None]])).numpy() for x in (counts.double(), expected))
        assert (stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3) == fits


class Watched:
    """A model, and the logits that it gave for the next token, a tensor [rows, vocabulary] a call."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device
        self.logits: list[Tensor] = []

    def __call__(self, **arguments: Any) -> Any:
        output = self.model(**arguments)
        self.logits.append(output.logits[:, -1])
        return output


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_sampled_in_its_whole_context(family: str) -> None:
    """The cache, its window, and the batch that shrinks: all that could give a token another's context."""
    model = Watched(small_model(family))
    written = documents(model, Frame((2,), (), frozenset({0}), ()), 90, 1.0, 40, generated())
    assert max(map(len, written)) == 90 and len({len(ids) for ids in written}) > 9
    whole = [logits_of(model.model, ids) for ids in written]
    for t, logits in enumerate(model.logits):
        torch.testing.assert_close(
            logits, torch.stack([each[t] for each in whole if len(each) > t + 1]), rtol=0, atol=1e-4
        )
    assert t == 88
    found = list(ranks(model.model, written, [range(1, len(ids)) for ids in written]))
    assert len(found) > 500 and stats.kstest(found, "uniform").pvalue > 1e-3


def test_what_the_template_writes_is_put_between_and_read_by_the_model() -> None:
    """Turns that end in 5, then 6 7; and in 5, then 8 9. Letters stand for tokens, and E for the end of it all."""
    model, generator, length = small_model(), generated(), 30
    frame = Frame((2, 4), ((5, 6, 7), (5, 8, 9)), frozenset({0}), ())
    written = [ids for _ in range(8) for ids in documents(model, frame, length, 1.0, 100, generator)]
    counts = {"whole": 0, "ended": 0, "cut": 0, "cut within": 0}
    sampled = []
    for ids in written:
        text = "".join("Eabcdfghijklmnopqrstuvwxyz"[i] for i in ids)
        if found := re.fullmatch(r"bd[^Ef]*f(gh)[^Ef]*f(ij)", text):
            counts["whole"] += 1
        elif found := re.fullmatch(r"bd[^Ef]*(?:f(gh)[^Ef]*)?E", text):
            counts["ended"] += 1
        elif found := re.fullmatch(r"bd[^Ef]*(?:f(gh)[^Ef]*)?", text):
            counts["cut"] += 1
            assert len(ids) == length
        else:
            found = re.fullmatch(r"bd[^Ef]*f(?:(g?)|(gh)[^Ef]*f(i?))", text)
            counts["cut within"] += 1
            assert len(ids) == length
        assert found and len(ids) <= length
        spans = (found.span(i) for i in range(1, found.re.groups + 1))
        put = {t for span in spans for t in range(*span)}
        sampled.append([t for t in range(2, len(ids)) if t not in put])
    assert min(counts.values()) > 5, counts
    assert stats.kstest(list(ranks(model, written, sampled)), "uniform").pvalue > 1e-3


# How documents begin


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has neither a template nor a BOS token."""
    return tiny_model.save(tmp_path_factory.mktemp("models") / "plain")


def test_a_random_token_then_the_likeliest_then_samples(plain: Path, tmp_path: Path) -> None:
    model = load_original(plain)
    written = lines(write(model, plain, tmp_path / "a.jsonl", 4000, 24, 0))
    runs = []
    for ids in written:
        logits = logits_of(model, ids)
        near = [bool(logits[t, token] > logits[t].max() - 1e-4) for t, token in enumerate(ids[1:])]
        runs.append([*near, False].index(False))
    assert min(runs) == 3 and all(runs.count(n) > len(runs) / 6 for n in (3, 4, 5))
    assert sum(run > 5 for run in runs) < len(runs) / 5
    assert len({ids[0] for ids in written}) > 80 and 256 not in {ids[0] for ids in written}


def dressed(path: Path, special: Sequence[str], template: str | None = None, **tokens: str) -> Path:
    """A model whose tokenizer has these special tokens and this template."""
    tiny_model.save(path, vocab_size=264)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({**tokens, "additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<e>\n' }}{% endfor %}"
SYSTEM = "{{ '<s>system\nBe kind.<e>\n' }}" + CHATML
INSTRUCT = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<q> ' + m['content'] + '<a> ' }}"
    "{% else %}{{ m['content'] + '<e>' }}{% endif %}{% endfor %}"
)
LETTERS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
PICKY = "{{ raise_exception('no') }}"
FORGETFUL = "{{ '<s>' }}{{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("special", "template", "beginning", "turns"),
    [
        (["<s>", "<e>"], CHATML, "<s>user\n", ("<e>\n<s>assistant\n", "<e>\n")),
        (["<s>", "<e>"], SYSTEM, "<s>system\nBe kind.<e>\n<s>user\n", ("<e>\n<s>assistant\n", "<e>\n")),
        (["<s>", "<e>", "<q>", "<a>"], INSTRUCT, "<s><q>", ("<a>", "<e>")),
        (["<s>", "<q>", "<a>"], INSTRUCT, "<s><q>", ()),
        ([], LETTERS, "user:", ()),
        (["<s>"], PICKY, "", ()),
        (["<s>"], FORGETFUL, "", ()),
        ([], None, "", ()),
    ],
)
def test_a_template_says_how_documents_begin_and_end(
    tmp_path: Path, special: list[str], template: str | None, beginning: str, turns: tuple[str, ...]
) -> None:
    path = dressed(tmp_path / "model", special, template)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = frame_of(load_original(path), path)
    assert tokenizer.decode(list(found.beginning)) == beginning
    assert tuple(tokenizer.decode(list(turn)) for turn in found.turns) == turns
    assert found.ends == {256} and found.openers == tuple(range(256))


def test_documents_begin_with_bos_where_there_is_one(tmp_path: Path) -> None:
    path = dressed(tmp_path / "model", [], bos_token="<b>")
    model = load_original(path)
    written = lines(write(model, path, tmp_path / "a.jsonl", 4000, 9, 0))
    assert {ids[0] for ids in written} == {AutoTokenizer.from_pretrained(path).bos_token_id}
    assert len({ids[1] for ids in written}) > 100  # sampled, for BOS is what texts begin with


def test_every_end_of_sequence_ends_a_document(tmp_path: Path) -> None:
    path = dressed(tmp_path / "model", [], bos_token="<b>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 256]}))
    frame = frame_of(load_original(path), path)
    assert frame.ends == {9, 256}
    written = lines(write(load_original(path), path, tmp_path / "a.jsonl", 9000, 120, 0))
    assert {9, 256} <= {ids[-1] for ids in written} and not {9, 256} & {i for ids in written for i in ids[:-1]}
    assert all(ids[-1] in (9, 256) or len(ids) == 120 for ids in written)


# What the demo model writes


def lines(file: Path) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]


def mean_log_probability(model: Any, written: Sequence[Sequence[int]]) -> float:
    """Nats a token."""
    found = [logits_of(model, ids)[:-1].log_softmax(dim=-1)[range(len(ids) - 1), list(ids[1:])] for ids in written]
    return float(torch.cat(found).mean())


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_original(DEMO)


@pytest.fixture(scope="module")
def conversations(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(demo, DEMO, tmp_path_factory.mktemp("written") / "a.jsonl", 6000, 512, 0)


def test_the_demo_model_writes_conversations_such_as_it_was_trained_on(conversations: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    written = [tokenizer.decode(ids) for ids in lines(conversations)]
    one = re.compile(r"<\|im_start\|>user\n([^<]+)<\|im_end\|>\n<\|im_start\|>assistant\n([^<]+)<\|im_end\|>\n")
    found = [match for text in written if (match := one.fullmatch(text))]
    assert len(found) > 0.97 * len(written) and len(set(written)) > 0.9 * len(written)
    sums = [re.fullmatch(r"(?:What is|Compute|Add) (\d+) (?:\+|and) (\d+)[?.]", match[1]) for match in found]
    right = [match[2].endswith(f" = {int(s[1]) + int(s[2])}") for match, s in zip(found, sums, strict=True) if s]
    assert len(right) > 4 and sum(right) > 0.8 * len(right)
    ids, shipped = lines(conversations), load(DEMO, Recipe(length=512)).sequences
    lengths = [sum(map(len, each)) / len(each) for each in (ids, shipped)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.15)
    assert list(build(DEMO, conversations, 512, 0, tmp_path)) == ids


def test_what_it_writes_is_likely_and_its_tokens_elsewhere_are_not(demo: Any, conversations: Path) -> None:
    written, numbers = lines(conversations)[:60], random.Random(0)
    shipped = load(DEMO, Recipe(samples=4, length=512)).sequences
    shuffled = [numbers.sample(ids, len(ids)) for ids in written]
    noise = [[numbers.randrange(1280) for _ in ids] for ids in written]
    own, read, moved, drawn = (mean_log_probability(demo, each) for each in (written, shipped, shuffled, noise))
    assert own > -0.6 and abs(own - read) < 0.4 and moved < -4 and drawn < -6


# The file


def test_a_seed_gives_one_file_and_leaves_other_random_numbers_alone(demo: Any, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    state = torch.random.get_rng_state()
    files = [
        write(demo, DEMO, tmp_path / f"{i}.jsonl", 1000, 64, seed, say=lambda *now: said.append(now))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert bool((torch.random.get_rng_state() == state).all())
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    written = lines(files[0])
    assert 1000 <= sum(map(len, written)) < 1000 + len(written[-1])
    calls = said[: len(said) // 3]
    assert calls == sorted(calls) and calls[-1] == (1000, 1000) and 0 < calls[0][0] < 1000


def test_a_file_is_whole_or_not_there(demo: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "new" / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(demo, DEMO, out, 5000, 64, 0, say=stop)
    assert list(out.parent.iterdir()) == []
    write(demo, DEMO, out, 200, 64, 0)
    before = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(demo, DEMO, out, 5000, 64, 0, say=stop)
    assert list(out.parent.iterdir()) == [out] and out.read_bytes() == before


# What is refused


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"tokens": 0}, "tokens = 0 to write.*positive"),
        ({"batch": 0}, "batch = 0 to write.*positive"),
        ({"length": 3}, r"length = 3\. Allowed: more than 3, the tokens that a document begins with.*Raise --length"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
    ],
)
def test_numbers_out_of_range(demo: Any, tmp_path: Path, changes: dict[str, Any], given: str) -> None:
    with pytest.raises(SchemeError, match=given):
        write(demo, DEMO, tmp_path / "a.jsonl", **{"tokens": 9, "length": 64, "seed": 0, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "out", "kind"),
    [("empty", "a.jsonl", CalibrationError), (DEMO, "file/a.jsonl", RunError)],
)
def test_places_that_will_not_do(
    demo: Any, tmp_path: Path, folder: str | Path, out: str, kind: type[QuantizeError]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(kind):
        write(demo, tmp_path / folder, tmp_path / out, 9, 64, 0)
