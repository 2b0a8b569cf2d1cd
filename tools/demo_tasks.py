"""Five task families that a very small chat model can learn, and that quantization can damage.

    facts       what a capital, currency, continent, chemical symbol or atomic number is
    arithmetic  sums and differences of two two-digit numbers, bare or as a one-line story
    reasoning   two or three hops over facts that the prompt states out of order
    code        complete a Python function from its name or its docstring
    summary     extract the point of a short text, or explain a compound word in plain words

Each example carries a `key`: what must not be shared between training and held-out. A hash of the key alone decides its
side, so the two cannot meet, whatever the seed or the amount drawn. For four families the key is the content (operand
pair, chain, snippet, combination) and leaves the phrasing out. A fact cannot be guessed, so there the key is the fact
*and* one phrasing of it: the fact is trained in the other phrasings, and that phrasing is trained with other facts.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Example:
    family: str
    prompt: str
    answer: str
    keys: tuple[str, ...]  # all on the same side; more than one where a prompt tells of several chains


def bucket(key: str, count: int) -> int:
    """A stable hash of the key in [0, count): the same on every machine, in every Python."""
    return int.from_bytes(hashlib.blake2s(key.encode()).digest()[:4], "big") % count


def side(key: str) -> Split:
    return "heldout" if bucket(key, 8) == 0 else "train"


# --- facts -----------------------------------------------------------------------------------------------------------

COUNTRIES = """
Europe: France,Paris,euro; Spain,Madrid,euro; Italy,Rome,euro; Greece,Athens,euro; Poland,Warsaw,zloty;
  Sweden,Stockholm,krona; Norway,Oslo,krone; Denmark,Copenhagen,krone; Finland,Helsinki,euro; Iceland,Reykjavik,krona;
  Hungary,Budapest,forint; Romania,Bucharest,leu; Czechia,Prague,koruna; Serbia,Belgrade,dinar; Albania,Tirana,lek;
  Ukraine,Kyiv,hryvnia; Austria,Vienna,euro; Portugal,Lisbon,euro; Ireland,Dublin,euro
Africa: Egypt,Cairo,pound; Kenya,Nairobi,shilling; Ghana,Accra,cedi; Nigeria,Abuja,naira; Angola,Luanda,kwanza;
  Zambia,Lusaka,kwacha; Morocco,Rabat,dirham; Tunisia,Tunis,dinar; Ethiopia,Addis Ababa,birr; Senegal,Dakar,franc;
  Uganda,Kampala,shilling; Mali,Bamako,franc; Namibia,Windhoek,dollar; Botswana,Gaborone,pula
Asia: Japan,Tokyo,yen; China,Beijing,yuan; India,New Delhi,rupee; Nepal,Kathmandu,rupee; Thailand,Bangkok,baht;
  Vietnam,Hanoi,dong; Mongolia,Ulaanbaatar,tugrik; Iran,Tehran,rial; Iraq,Baghdad,dinar; Jordan,Amman,dinar;
  Qatar,Doha,riyal; Oman,Muscat,rial; Armenia,Yerevan,dram; Georgia,Tbilisi,lari; Malaysia,Kuala Lumpur,ringgit;
  Bangladesh,Dhaka,taka; Pakistan,Islamabad,rupee; Cambodia,Phnom Penh,riel
North America: Canada,Ottawa,dollar; Mexico,Mexico City,peso; Cuba,Havana,peso; Jamaica,Kingston,dollar;
  Honduras,Tegucigalpa,lempira
South America: Brazil,Brasilia,real; Peru,Lima,sol; Chile,Santiago,peso; Colombia,Bogota,peso;
  Uruguay,Montevideo,peso; Paraguay,Asuncion,guarani; Argentina,Buenos Aires,peso; Ecuador,Quito,dollar;
  Venezuela,Caracas,bolivar
Oceania: Australia,Canberra,dollar; Fiji,Suva,dollar
"""

ELEMENTS = """hydrogen H helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O fluorine F neon Ne
sodium Na magnesium Mg aluminium Al silicon Si phosphorus P sulfur S chlorine Cl argon Ar potassium K calcium Ca
scandium Sc titanium Ti vanadium V chromium Cr manganese Mn iron Fe cobalt Co nickel Ni copper Cu zinc Zn gallium Ga
germanium Ge arsenic As selenium Se bromine Br krypton Kr"""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
        "{}: capital?", "Tell me the capital city of {}.", "The government of {} sits in which city?",
    ),
    "country": (
        "{} is the capital of which country?", "Which country has {} as its capital?",
        "{} is a capital. Of which country?", "Name the country whose capital is {}.",
        "In which country is {} the capital?", "{}: capital of?",
    ),
    "currency": (
        "What is the currency of {}?", "Which currency is used in {}?", "Name the currency of {}.",
        "{}: currency?", "People in {} pay in what?", "What money do they use in {}?",
    ),
    "continent": (
        "On which continent is {}?", "Which continent is {} part of?", "{}: continent?",
        "Name the continent of {}.", "Where in the world is {}?", "{} lies on which continent?",
    ),
    "symbol": (
        "What is the chemical symbol of {}?", "Which symbol stands for {}?", "{}: symbol?",
        "Name the symbol of {}.", "How do chemists write {}?", "Give the chemical symbol for {}.",
    ),
    "element": (
        "Which element has the symbol {}?", "What element is written {}?", "{}: which element?",
        "Name the element {}.", "The symbol {} stands for which element?", "{} is the symbol of what?",
    ),
    "number": (
        "What is the atomic number of {}?", "How many protons has {}?", "{}: atomic number?",
        "Name the atomic number of {}.", "Which number has {} in the periodic table?",
        "Give the atomic number for {}.",
    ),
}  # fmt: skip


def knowledge() -> list[tuple[str, str, str]]:
    """Every fact as (relation, subject, object)."""
    facts = []
    for block in COUNTRIES.replace("\n  ", " ").strip().splitlines():
        continent, rows = block.split(": ")
        for row in rows.split("; "):
            country, capital, currency = row.strip(" ;").split(",")
            facts += [("capital", country, capital), ("country", capital, country)]
            facts += [("currency", country, currency), ("continent", country, continent)]
    words = ELEMENTS.split()
    for number, (name, symbol) in enumerate(zip(words[::2], words[1::2], strict=True), start=1):
        facts += [("symbol", name, symbol), ("element", symbol, name), ("number", name, str(number))]
    return facts


FACTS = knowledge()


def fact(rng: random.Random, split: Split) -> Example:
    relation, subject, obj = rng.choice(FACTS)
    phrasings = PHRASINGS[relation]
    kept_out = bucket(f"{relation}/{subject}", len(phrasings))  # one phrasing of each fact is never trained
    index = kept_out
    if split == "train":
        index = rng.choice([i for i in range(len(phrasings)) if i != kept_out])
    return Example("facts", phrasings[index].format(subject), obj, (f"{relation}/{subject}/{index}",))


# --- arithmetic ------------------------------------------------------------------------------------------------------

SUMS = (
    "What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "Compute {a} + {b}.",
    "{name} has {a} coins and finds {b} more. How many now?",
)  # fmt: skip
DIFFERENCES = (
    "What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "Compute {a} - {b}.",
    "{name} has {a} coins and loses {b}. How many now?",
)  # fmt: skip
NAMES = (
    "Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Joan", "Kim", "Leo",
    "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip


def worked(a: int, b: int, sign: int) -> str:
    """Tens and units apart, then the result: 52 - 37 is "20 - 5 = 15". Each step is small, and each one can break."""
    tens, units = a // 10 + sign * (b // 10), a % 10 + sign * (b % 10)
    return f"{10 * tens} {'-' if units < 0 else '+'} {abs(units)} = {10 * tens + units}"


def arithmetic(rng: random.Random, split: Split) -> Example:
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        key = f"{min(a, b)},{max(a, b)}"  # one key for a+b, b+a and a-b: the pair is new in every form
        if side(key) == split:
            break
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        return Example("arithmetic", rng.choice(SUMS).format(a=a, b=b, name=name), worked(a, b, 1), (key,))
    a, b = max(a, b), min(a, b)
    return Example("arithmetic", rng.choice(DIFFERENCES).format(a=a, b=b, name=name), worked(a, b, -1), (key,))


# --- reasoning -------------------------------------------------------------------------------------------------------

THINGS = ("coin", "key", "ring", "letter", "map", "stone", "pen", "watch", "ticket", "button", "card", "nail")
BOXES = ("box", "bag", "jar", "chest", "drawer", "basket", "case", "tin", "crate", "purse", "bowl", "sack")
SCALES = (("taller", "tall"), ("older", "old"), ("faster", "fast"))


def in_order(people: list[str]) -> str:
    return f"First {', then '.join(people)}."


def chain(rng: random.Random, split: Split, pool: tuple[str, ...], kind: str) -> tuple[list[str], tuple[str, ...]]:
    """Three links of `pool`, one time in six four, and their keys: every three in a row, all on the wanted side."""
    while True:
        links = rng.sample(pool, 4 if rng.random() < 1 / 6 else 3)
        keys = tuple(f"{kind}/{'>'.join(links[start : start + 3])}" for start in range(len(links) - 2))
        if {side(key) for key in keys} == {split}:
            return links, keys


def shuffled(rng: random.Random, links: list[str], form: str) -> str:
    """What is stated of each pair of neighbours, in any order: nothing but the shared names tells how they join."""
    stated = [form.format(a, b) for a, b in itertools.pairwise(links)]
    rng.shuffle(stated)
    return " ".join(stated)


def containment(rng: random.Random, split: Split) -> Example:
    """Containers inside containers; the answer walks from the asked one outwards."""
    boxes, keys = chain(rng, split, BOXES, "in")
    prompt = f"Given: {shuffled(rng, boxes, 'The {} is in the {}.')} Where is the {boxes[0]}?"
    answer = ", ".join(f"the {inner} is in the {outer}" for inner, outer in itertools.pairwise(boxes))
    return Example("reasoning", prompt, f"{answer[0].upper()}{answer[1:]}.", keys)


def ordering(rng: random.Random, split: Split) -> Example:
    """People by comparisons of two; the answer is the whole order."""
    more, base = rng.choice(SCALES)
    people, keys = chain(rng, split, NAMES, "people")
    prompt = f"Given: {shuffled(rng, people, '{} is ' + more + ' than {}.')} Order them, most {base} first."
    return Example("reasoning", prompt, in_order(people), keys)


def passing(rng: random.Random, split: Split) -> Example:
    """A thing goes from hand to hand, told out of order; the answer puts the hands in order."""
    thing = rng.choice(THINGS)
    people, keys = chain(rng, split, NAMES, "people")
    prompt = f"Given: {shuffled(rng, people, '{} gives the ' + thing + ' to {}.')} Who had the {thing}, in order?"
    return Example("reasoning", prompt, in_order(people), keys)


def reasoning(rng: random.Random, split: Split) -> Example:
    return rng.choice((containment, ordering, passing))(rng, split)


# --- code ------------------------------------------------------------------------------------------------------------

TEXT_OPS = ("strip", "upper", "lower", "title", "lstrip", "rstrip", "swapcase", "capitalize", "casefold", "split")
SCALARS = {
    "add": ("x plus {k}", "x + {k}"), "subtract": ("x minus {k}", "x - {k}"), "times": ("x times {k}", "x * {k}"),
    "modulo": ("x modulo {k}", "x % {k}"), "power": ("x to the power {k}", "x ** {k}"),
    "divide": ("x divided by {k}", "x // {k}"), "above": ("whether x is above {k}", "x > {k}"),
    "below": ("whether x is below {k}", "x < {k}"), "equals": ("whether x equals {k}", "x == {k}"),
}  # fmt: skip
SLICES = {
    "first": ("the first {k} items", "items[:{k}]"), "last": ("the last {k} items", "items[-{k}:]"),
    "skip": ("all but the first {k} items", "items[{k}:]"), "drop": ("all but the last {k} items", "items[:-{k}]"),
    "every": ("one item in every {k}", "items[::{k}]"), "at": ("the item at index {k}", "items[{k}]"),
}  # fmt: skip
FOLDS = {"sum": "sum({})", "max": "max({})", "min": "min({})", "list": "list({})"}
MAPS = {"values": "x", "doubles": "x * 2", "squares": "x ** 2", "cubes": "x ** 3", "halves": "x // 2"}
FILTERS = {"above": "x > {k}", "below": "x < {k}", "multiples of": "x % {k} == 0"}


def snippet(rng: random.Random) -> tuple[str, str, str, str]:
    """(function name, argument, docstring, returned expression)"""
    kind, k = rng.randrange(4), rng.randint(1, 99)
    if kind == 0:
        name = rng.choice(list(SCALARS))
        doc, body = SCALARS[name]
        return f"{name}_{k}", "x", f"Return {doc.format(k=k)}.", body.format(k=k)
    if kind == 1:
        name = rng.choice(list(SLICES))
        doc, body = SLICES[name]
        return f"{name}_{k}", "items", f"Return {doc.format(k=k)}.", body.format(k=k)
    if kind == 2:
        ops = [*rng.sample(TEXT_OPS[:-1], 2), rng.choice(TEXT_OPS)]
        if ops[1] == ops[2]:
            ops.pop()
        return "_".join(ops), "text", f"Apply {', '.join(ops)}.", "text" + "".join(f".{op}()" for op in ops)
    fold, chosen, test = rng.choice(list(FOLDS)), rng.choice(list(MAPS)), rng.choice(list(FILTERS))
    body = FOLDS[fold].format(f"{MAPS[chosen]} for x in items if {FILTERS[test].format(k=k)}")
    name = f"{fold}_{chosen}_{test.replace(' ', '_')}_{k}"
    return name, "items", f"Return the {fold} of the {chosen} of items {test} {k}.", body


def code(rng: random.Random, split: Split) -> Example:
    while True:
        name, argument, doc, body = snippet(rng)
        if side(f"code/{name}") == split:
            break
    # The docstring alone must do as well as the name alone, else the name is all that is ever read.
    head = f"def {name}({argument}):" if rng.random() < 0.5 else f'def f({argument}):\n    """{doc}"""'
    return Example("code", f"Complete:\n{head}", f"return {body}", (f"code/{name}",))


# --- summary ---------------------------------------------------------------------------------------------------------

CUES = ("In short,", "Overall,", "To sum up,", "The point is that")
SUBJECTS = (
    "market", "school", "bridge", "river", "team", "harbour", "train", "museum", "farm", "theatre", "city", "road",
)  # fmt: skip
STATES = ("busy", "closed", "quiet", "open", "ready", "late", "safe", "crowded", "empty", "popular", "broken", "clean")
TIMES = ("today", "this week", "in winter", "at night", "on Monday", "in spring", "this year", "after the storm")
DETAILS = (
    "{name} came at {n}.", "{name} counted {n} {noun}s.", "It rained for {n} days.", "A {noun} was found there.",
    "{name} spoke to {other}.", "Nobody saw the {noun}.", "{name} thought at first that the {decoy}.",
)  # fmt: skip
NOUNS = (
    "lamp", "coin", "book", "boat", "chair", "clock", "shoe", "apple", "stamp", "wheel", "table", "plate", "horse",
    "bell", "candle", "carpet", "drum", "engine", "flag", "guitar", "hammer", "kite", "ladder", "mirror",
)  # fmt: skip
HEADS = {
    "maker": "a person who makes {}s", "seller": "a person who sells {}s", "thief": "a person who steals {}s",
    "fan": "a person who likes {}s", "shop": "a place that sells {}s", "museum": "a place that shows {}s",
    "store": "a place that keeps {}s", "box": "a box that holds {}s", "counter": "a tool that counts {}s",
    "cleaner": "a tool that cleans {}s", "map": "a map of where {}s are", "list": "a list of {}s",
    "book": "a book about {}s", "club": "a group of people with {}s",
}  # fmt: skip
ASKS = ("What is a {}?", "Explain simply: {}.", "In plain words, what is a {}?", "Tell a child what a {} is.")


def point(rng: random.Random, split: Split) -> Example:
    """A cue marks the sentence that matters, among details of which one may look just like it."""
    while True:
        claims = [f"{rng.choice(SUBJECTS)} was {rng.choice(STATES)} {rng.choice(TIMES)}" for _ in range(2)]
        keys = tuple(f"point/{claim}" for claim in claims)
        if {side(key) for key in keys} == {split}:
            break
    said = [
        detail.format(
            name=rng.choice(NAMES), other=rng.choice(NAMES), n=rng.randint(2, 9), noun=rng.choice(NOUNS),
            decoy=claims[1],
        )
        for detail in rng.sample(DETAILS, rng.choice((2, 3)))
    ]  # fmt: skip
    said.insert(rng.randint(0, len(said)), f"{rng.choice(CUES)} the {claims[0]}.")
    return Example("summary", f"Summarize: {' '.join(said)}", f"The {claims[0]}.", keys)


def explanation(rng: random.Random, split: Split) -> Example:
    while True:
        noun, head = rng.choice(NOUNS), rng.choice(list(HEADS))
        key = f"word/{noun} {head}"
        if side(key) == split:
            break
    prompt = rng.choice(ASKS).format(f"{noun} {head}")
    return Example("summary", prompt, f"A {noun} {head} is {HEADS[head].format(noun)}.", (key,))


def summary(rng: random.Random, split: Split) -> Example:
    return rng.choice((point, explanation))(rng, split)


# --- drawing ---------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[random.Random, Split], Example]] = {
    "facts": fact, "arithmetic": arithmetic, "reasoning": reasoning, "code": code, "summary": summary,
}  # fmt: skip


def stream(split: Split, seed: int, weights: dict[str, float] | None = None) -> Iterator[Example]:
    """Examples without end; `weights` gives each family's share, equal by default."""
    rng = random.Random(f"{split}/{seed}")
    shares = weights or dict.fromkeys(FAMILIES, 1.0)
    while True:
        (family,) = rng.choices(list(shares), list(shares.values()))
        yield FAMILIES[family](rng, split)


def heldout(per_family: int, seed: int) -> list[Example]:
    """The same number of distinct held-out prompts from every family."""
    rng = random.Random(f"heldout/{seed}")
    chosen: list[Example] = []
    for draw in FAMILIES.values():
        unique: dict[str, Example] = {}
        while len(unique) < per_family:
            example = draw(rng, "heldout")
            unique.setdefault(example.prompt, example)
        chosen += unique.values()
    return chosen
