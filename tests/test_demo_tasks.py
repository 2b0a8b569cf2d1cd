"""The demo model's questions: no leak from training to held-out, the same by seed, and every answer right."""

from __future__ import annotations

import itertools
import re

import demo_tasks
import pytest
from demo_tasks import Example

TRAIN = list(itertools.islice(demo_tasks.stream("train", seed=3), 40_000))
HELD = demo_tasks.heldout(60, seed=0) + list(itertools.islice(demo_tasks.stream("heldout", seed=4), 2_000))
BOTH = TRAIN[:8_000] + HELD


def of(family: str, examples: list[Example] = BOTH) -> list[Example]:
    return [e for e in examples if e.family == family]


@pytest.mark.parametrize("family", demo_tasks.FAMILIES)
def test_training_and_heldout_share_no_key_and_no_prompt(family: str) -> None:
    train, held = of(family, TRAIN), of(family, HELD)
    assert len(train) > 7_000 and len(held) > 400
    assert not {k for e in train for k in e.keys} & {k for e in held for k in e.keys}
    assert not {e.prompt for e in train} & {e.prompt for e in held}


def test_content_parsed_from_the_prompts_is_disjoint_too() -> None:
    """The keys are the generator's word; this one reads the prompts instead."""

    def pairs(examples: list[Example]) -> set[tuple[int, ...]]:
        return {tuple(sorted(map(int, re.findall(r"\d+", e.prompt)))) for e in of("arithmetic", examples)}

    def answers(family: str, examples: list[Example]) -> set[str]:
        return {e.answer for e in of(family, examples)}

    assert not pairs(TRAIN) & pairs(HELD)
    for chain in ("The ", "First "):  # the containments; the orders and the ways of a thing
        train, held = ({a for a in answers("reasoning", part) if a.startswith(chain)} for part in (TRAIN, HELD))
        assert train and held and not train & held
    assert not answers("summary", TRAIN) & answers("summary", HELD)
    assert not answers("code", TRAIN) & answers("code", HELD)


def test_a_heldout_claim_is_not_even_a_decoy_in_training() -> None:
    held = {e.answer[len("The ") : -1] for e in of("summary", HELD) if e.prompt.startswith("Summarize")}
    told = {claim for e in of("summary", TRAIN) for claim in re.findall(r"the (\w+ was [\w ]+)\.", e.prompt)}
    assert told and not held & told


def test_every_fact_is_trained_but_never_in_its_heldout_phrasing() -> None:
    trained = {k.rsplit("/", 1)[0] for e in of("facts", TRAIN) for k in e.keys}
    assert trained == {f"{relation}/{subject}" for relation, subject, _ in demo_tasks.FACTS}
    # and each phrasing of a relation is trained, with other subjects: held-out asks for no unknown wording
    seen = {(k.split("/")[0], k.rsplit("/", 1)[1]) for e in of("facts", TRAIN) for k in e.keys}
    assert seen == {(r, str(i)) for r, phrasings in demo_tasks.PHRASINGS.items() for i in range(len(phrasings))}


def test_the_seed_decides_everything() -> None:
    def draw(seed: int) -> list[Example]:
        return list(itertools.islice(demo_tasks.stream("train", seed), 500))

    assert draw(7) == draw(7) != draw(8)
    assert demo_tasks.heldout(20, 5) == demo_tasks.heldout(20, 5) != demo_tasks.heldout(20, 6)
    assert demo_tasks.bucket("12,34", 1 << 32) == 368594304  # pinned: another value would move the split


def test_heldout_is_balanced_and_distinct() -> None:
    held = demo_tasks.heldout(60, 0)
    assert len({e.prompt for e in held}) == len(held) == 300
    assert all(len(of(family, held)) == 60 for family in demo_tasks.FAMILIES)


def test_knowledge_is_consistent() -> None:
    table = {(relation, subject): obj for relation, subject, obj in demo_tasks.FACTS}
    assert len(table) == len(demo_tasks.FACTS)
    assert table["capital", "Kenya"] == "Nairobi" and table["continent", "Peru"] == "South America"
    assert table["number", "iron"] == "26" and table["element", "Fe"] == "iron"
    for e in of("facts"):
        relation, subject, _ = e.keys[0].split("/")
        assert subject in e.prompt and e.answer == table[relation, subject]


def test_arithmetic_is_right() -> None:
    for e in of("arithmetic"):
        a, b = map(int, re.findall(r"\d+", e.prompt))
        if e.prompt.startswith("Take"):
            a, b = b, a
        adds = any(word in e.prompt for word in ("+", "Add", "finds"))
        working, result = e.answer.split(" = ")
        assert 10 <= a <= 99 and 10 <= b <= 99 and int(result) == (a + b if adds else a - b) >= 0, e
        assert eval(working) == int(result) and int(working.split()[0]) % 10 == 0, e


RELATIONS = (r"(\w+) is (?:taller|older|faster) than (\w+)", r"(\w+) is in the (\w+)", r"(\w+) gives the \w+ to (\w+)")


def links(prompt: str) -> list[str]:
    """The chain that a prompt's statements make, found by walking them from the one that nothing points at."""
    stated = dict(pair for relation in RELATIONS for pair in re.findall(relation, prompt))
    (current,) = set(stated) - set(stated.values())
    chain = [current]
    while chain[-1] in stated:
        chain.append(stated[chain[-1]])
    assert len(chain) == len(stated) + 1
    return chain


def test_reasoning_follows_from_what_is_stated() -> None:
    hops = set()
    for e in of("reasoning"):
        chain = links(e.prompt)
        hops.add(len(chain) - 1)
        if "Where" in e.prompt:
            assert e.prompt.endswith(f"Where is the {chain[0]}?"), e
            told = ", ".join(f"the {inner} is in the {outer}" for inner, outer in itertools.pairwise(chain))
            assert e.answer == f"T{told[1:]}.", e
        else:
            assert e.answer == f"First {', then '.join(chain)}.", e
    assert hops == {2, 3}


def test_no_three_in_a_row_of_a_heldout_chain_stand_in_training() -> None:
    def triples(examples: list[Example]) -> set[tuple[str, ...]]:
        chains = [links(e.prompt) for e in of("reasoning", examples)]
        return {tuple(chain[start : start + 3]) for chain in chains for start in range(len(chain) - 2)}

    assert len(triples(HELD)) > 100 and not triples(TRAIN) & triples(HELD)


def meaning(ask: str, value: object) -> object:
    """What the function's name or docstring promises, worked out without looking at the answer."""
    words = ask.replace("_", " ").split()
    ks = [int(word) for word in re.findall(r"\d+", ask)]
    if isinstance(value, str):
        for op in words:
            value = getattr(value, op)()
        return value
    k = ks[0]
    if isinstance(value, int):
        return {
            "add": value + k, "subtract": value - k, "times": value * k, "modulo": value % k, "power": value**k,
            "divide": value // k, "above": value > k, "below": value < k, "equals": value == k,
        }[words[0]]  # fmt: skip
    assert isinstance(value, list)
    if len(words) == 2:
        kept = {"first": range(k), "skip": range(k, 200), "every": range(0, 200, k)}
        kept |= {"last": range(200 - k, 200), "drop": range(200 - k)}
        return value[k] if words[0] == "at" else [value[i] for i in kept[words[0]]]
    change = {"values": 1, "doubles": 2, "squares": 0, "cubes": 0, "halves": 0}[words[1]]
    chosen = [x for x in value if {"above": x > k, "below": x < k, "multiples": x % k == 0}[words[2]]]
    power = {"squares": 2, "cubes": 3}.get(words[1])
    mapped = [x**power if power else x * change if change else x // 2 for x in chosen]
    return {"sum": sum, "max": max, "min": min, "list": list}[words[0]](mapped)


DOCS = {
    "x plus": "add", "x minus": "subtract", "x times": "times", "x modulo": "modulo", "x to the power": "power",
    "x divided by": "divide", "whether x is above": "above", "whether x is below": "below",
    "whether x equals": "equals",
    "the first": "first", "the last": "last", "all but the first": "skip", "all but the last": "drop",
    "one item in every": "every", "the item at index": "at",
}  # fmt: skip


def test_code_does_what_its_name_or_docstring_says() -> None:
    for e in of("code"):
        source = e.prompt.removeprefix("Complete:\n")
        scope: dict[str, object] = {}
        exec(f"{source}\n    {e.answer}\n", scope)  # the prompt and its answer must be one valid function
        name, argument = re.findall(r"def (\w+)\((\w+)\)", source)[0]
        doc = "".join(re.findall('"""(.*)"""', source))
        ask = name if not doc else doc.rstrip(".").removeprefix("Apply ").replace(",", "")
        if found := re.fullmatch(r"Return the (\w+) of the (\w+) of items (.*) (\d+)\.", doc):
            ask = " ".join(found.groups())
        elif found := re.fullmatch(r"Return (.*?) (\d+)(?: items)?\.", doc):
            ask = f"{DOCS[found[1]]} {found[2]}"
        values: dict[str, object] = {"x": 57, "items": list(range(200)), "text": "  aBc dEF\t"}
        function = scope[name]
        assert callable(function)
        assert function(values[argument]) == meaning(ask, values[argument]), e


def test_summaries_are_extracted_and_words_explained() -> None:
    for e in of("summary"):
        if e.prompt.startswith("Summarize"):
            cued = [s for s in re.split(r"(?<=\.) ", e.prompt) if any(cue in s for cue in demo_tasks.CUES)]
            assert len(cued) == 1 and cued[0].endswith(e.answer[len("The ") :]), e
        else:
            noun, head = re.findall(r"A (\w+) (\w+) is", e.answer)[0]
            assert f"{noun} {head}" in e.prompt and e.answer.endswith(demo_tasks.HEADS[head].format(noun) + "."), e
