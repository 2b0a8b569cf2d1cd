"""Where a text breaks, seen by its letters and signs alone; `symptoms.py` says in words what a break is.

One break is no proof: sound text has one now and then, and hardly ever two within ten words. Nothing counts that
stands in the prompt or in the baseline's answer too.

The tables of neighbours name words of the closed classes only (articles, prepositions, auxiliaries, conjunctions, ...;
half of the words of a sentence), in pairs that follow each other in no sentence, or in a rare one ("the state it is in
is ..."). The English ones were kept where 1.5 million words of manuals have less than one in a hundred of what their
words would give in any order. Whose pairs are looked for is told by the answer itself: the language that most of its
small words are of.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise, product

from harness.analysis.loops import WORD, words
from harness.quality.prompts import Form

# --- tables ----------------------------------------------------------------------------------------------------------

BE, HAVE, MAY = "is are was were", "has have had", "will would can could shall should may might must"
NEVER_NEXT: Mapping[str, Sequence[tuple[str, str]]] = {
    "en": (
        ("the an", "the a an this that these those my your our their its every each of in on by for from with into"),
        ("the an", "onto upon during to about through than and or but nor if because although while as be been being"),
        ("the an", f"{BE} {HAVE} do does did would could shall should he she it they we them us him me i whose whom"),
        ("the an", "which when where how"),
        ("a", "the an this these those your its their of than are were has have does did would should we they you"),
        ("a", "at by upon during through between them whose which whom when where how there because been whether who"),
        ("my your our their its every whose", "the a an this that these those of in at by for from with to than if as"),
        ("my your our their its every whose", f"{BE} be has have may must it you we they them which when what"),
        ("of", f"to {BE} {HAVE} be been did does would could in by for with into upon during through than because nor"),
        ("in", f"{BE} {HAVE} be been of through than because would can might must"),
        ("at", f"{BE} {HAVE} be been does can would should of on by with into than for from in"),
        ("for", f"{BE} {HAVE} be been can could would should must of by from with into on during about through than"),
        ("from", f"{BE} {HAVE} be been do can should may must of by with into than for"),
        ("with", f"{BE} {HAVE} be been do does can would should of by from for into during about through than because"),
        ("on", f"{BE} {HAVE} be been does would should must of than because"),
        ("by", f"{BE} {HAVE} be been does would should may must of from into during between through than because for"),
        ("to", f"{BE} has had been am did would could shall of through than because nor although"),
        ("into onto during", f"{BE} {HAVE} be will can must on in at by for from with of to than but nor"),
        ("of in at by from with on to into during", "he she they we"),
        ("this that these those or but because if as not very it whom who which what any some no than", "than"),
        ("than", "and but whom whose must"),
        ("because", "are be been will can by or to whose"),
        ("if whether", "of into during because are been has have would could might must them whose"),
        ("and or but", "been nor whom"),
        (BE, f"{BE} {HAVE} {MAY} be did does whom than into nor"),
        (HAVE, f"are was were be am {MAY} does than whom of into"),
        ("be been being", f"{BE} {HAVE} {MAY} be been does whom than"),
        (MAY, f"{BE} {MAY} been has had does did am of to than into because whom whose"),
        ("does did", f"{BE} {MAY} been has had of than whom from"),
        ("he she we they", "the an of to be been from into than we he she they whose whom"),
        ("we they", "is was has am"),
        ("these those", "the a an this your its each is was has be they"),
        ("this", "these those your their be been they"),
        ("it", "these your their they we"),
        ("who whom which that what when where how", "been"),
        ("who whom how", "of an with from"),
        ("not", "are was were has does"),
        ("very any some no", "the a an"),
        ("very", "of in for to and is be are this"),
        ("as", "into because"),
    ),
    "de": (
        (
            "der die das des dem den ein eine einen einem einer im am zum zur vom",
            "ist sind hat wird und oder weil denn",
        ),
        ("von in auf unter mit aus bei nach durch für gegen zwischen", "und oder weil wenn dass ist sind hat wird"),
        ("von in auf unter mit aus bei nach durch für gegen zwischen", "in auf unter mit aus bei nach durch für von"),
        ("ist sind wird hat haben werden", "ist sind wird hat haben des weil"),
        ("und oder weil wenn dass aber", "weil dass ist sind hat des"),
        ("ein eine einen einem einer im am zum zur vom des", "der die das dem den des im am zum zur vom von mit aus"),
        ("die der das", "weil wenn dass"),
    ),
    "fr": (
        ("le les un une du aux ces cette", "le la les une du au aux ces cette est sont et ou mais que qui dans avec"),
        ("le les un une du aux ces cette", "par sur pour sans"),
        ("de dans avec par sur pour et ou mais", "est sont et ou mais"),
        ("est sont", "est sont et"),
        ("dans avec par sur sans", "de dans avec par sur"),
    ),
    "es": (
        ("el los las un una unos del al", "el la los las un una del al es son está y o pero con por para sin en"),
        ("de en con por para sin y o pero", "es son está y o pero"),
        ("en con sin", "en con sin por para"),
        ("es son está", "es son está"),
    ),
}
"""Words, and which ones do not stand next to any of them; by language."""

PAIRS = {
    language: frozenset(
        pair for left, right in rows for pair in product(left.split(), right.split()) if len({*pair}) == 2
    )
    for language, rows in NEVER_NEXT.items()
}
MORE = {  # other small words, by which a language is known
    "en": "",
    "de": "es sich nicht wie auch",
    "fr": "la de à que qui ne pas il elle dues",
    "es": "la de que se lo no más su sus",
}
SMALL = {
    language: frozenset(word for pair in pairs for word in pair) | frozenset(MORE[language].split())
    for language, pairs in PAIRS.items()
}
OWN = {
    language: small - frozenset().union(*(others for other, others in SMALL.items() if other != language))
    for language, small in SMALL.items()
}
"""The small words of a language that no other one of the table has."""

STUCK = re.compile(
    r"^the[bcdghjklptvwz][a-z]{2,}|[bcdfgjklmnprsv]the$|^(?:of|in|to|for|and|with|from|at|by|on)the$|^which[a-z]{3,}"
)
"""Small words glued to any other, so as no word is spelled."""
JOINED = frozenset("the and which that with from this was were through whose for than".split())
"""Words that are found at the beginning or the end of words glued together."""
NO_JOIN = frozenset("without within therefore whereas whereby wherein thereby forthat forthwith wherefore".split())
CUT = frozenset(
    "abou th tha thi whic wha fro wit woul coul shoul becaus befor afte eac ever fou firs peopl onl betwee throug unde"
    " thei migh awa agai alway".split()
)
"""Frequent words that lack their last letter, and are no words so."""
UNSPOKEN = re.compile(
    r"^(?=[a-z]{4}).*(?:q[^u]|j[b-df-hj-np-rtv-z]|v[bcfghjkmnpqtvwxz]|x[bdgjknrvxz]|z[jqvx]|[bcdfghklmpqrtw]x|[cfgkpwh]j"
    r"|[bdfghjklmprtvwxyz]q|[cfhkpw]v|[cdfhkw]z|gk)|^[b-df-hj-np-tv-xz]{6,}$"
)
"""Letters that do not follow each other within an English word: nobody could say it."""
QUESTIONS = frozenset("what which who whom whose when where how why".split())
NAMES = frozenset({"May", "Will"})
"""Names that are small words in other letters."""
KEYWORDS = frozenset("for in is if or and not with from as while do import".split())
"""Small words that code has too, with other neighbours."""

# --- characters ------------------------------------------------------------------------------------------------------

_CP1252 = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
MISREAD = re.compile(
    rf"(?:[ÂÃÅÄÐÑ][{_CP1252}]|â[€\u0080-\u0082„†ˆ‰][{_CP1252}]?|ð[Ÿ\u009f][{_CP1252}]|ï[»¿¼][{_CP1252}])+"
)
"""UTF-8 that was read as Latin-1 or CP1252: ö as Ã¶, ’ as â€™."""
TOKENS = re.compile(
    r"<\|[^|\s]{1,24}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<0x[0-9A-F]{2}>"
    r"|[<\[](?:pad|unk|bos|eos|PAD|UNK|CLS|SEP|MASK)[>\]]|(?<=\w)\s?##(?=[a-z])|[ĠĊĉ▁]"
)
"""Pieces of a chat template, marks of tokenizers."""


def is_debris(char: str) -> bool:
    """The replacement character, control characters, code points that mean nothing, a tokenizer's sign for a space."""
    return char in "\ufffdĠĊ" or (unicodedata.category(char) in {"Cc", "Cn", "Co", "Cs"} and char not in "\n\t\r")


def debris(text: str) -> int:
    """Characters of a text that are none."""
    return sum(map(is_debris, text)) + sum(len(found.group()) for found in MISREAD.finditer(text))


def scripts(text: str) -> Counter[str]:
    """Letters of each script, by the first word of their Unicode names (LATIN, CJK, CYRILLIC, ...).

    Kana, Chinese characters and Hangul are one, for Japanese and Korean mix them.
    """
    found = Counter(char for char in text if char.isalpha())
    named: Counter[str] = Counter()
    for char, times in found.items():
        name = unicodedata.name(char, "").partition(" ")[0]
        named["CJK" if name in {"HIRAGANA", "KATAKANA", "HANGUL", "KATAKANA-HIRAGANA"} else name] += times
    for no_script in NO_SCRIPTS:
        del named[no_script]
    return named


NO_SCRIPTS = ("", "MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "FEMININE", "MASCULINE", "MICRO", "FULLWIDTH")

# --- signs -----------------------------------------------------------------------------------------------------------

GLUED = re.compile(
    r"(?<!\S)[^\W\d_]+(?:[,;?!](?=[^\W\d_])|(?<=[a-z]{3})[.:](?=[A-Z][a-z]))[^\W\d_]+(?=[.,;:?!]?(?:\s|$))"
)
"""Two words with a mark between them and no space."""
MARKS = re.compile(
    r"[,;:](?:\s?(?:[,;?!]|\.(?![.\w/])))+|[,;] :|(?<![:\w]):\s:|(?<=\w)\.\.(?=\s|$)|[?!]\s?[,;.](?!\.)"
    r"|(?<=\w) [,;](?=\w)|\(\s?[.,;:](?![\w.])|[a-z]{3},\d|[-+=]\?|\^\^|(?<= )\+/(?= )"
    r"|(?<=[\w)\]}] )[-+*/=] [*/=]|(?<= )[-+*/=] (?:of|is|was|than|by|from)\b"
    r"|(?<=[a-zA-Z ])\\(?:u[0-9a-f]{4}|x[0-9a-f]{2})"
)
"""Marks and operators that cannot follow each other, and escapes (\\u00e9) in the midst of prose."""
MID_STOP = re.compile(
    r"(?<![\w.`\"'‘“-])(?:the|an|their|our|your|my|every)[.,;:?!](?!\.)(?= +\S)"
    r"|\b(?:and|or|because|than|if)[.;?!](?!\.)(?= +\S)"
)
"""A stop behind a word that goes on, within a text: at its end it was only cut."""
SIGNS = re.compile(r"[^\w\s$\\]{4,}")
"""A row of signs. Where three of them are different and one is no punctuation, it is debris of code ("=]](")."""
CODE_SIGNS = frozenset("=/^&%#@+")
ENDINGS = re.compile(r"(?:ing|tion|sion|ment|ness|ity|ish|ous|ly|able|ably|ible|ful|less)+s?")
"""Words made of endings alone, as the pieces of a vocabulary are."""
ENDINGS_SAID = frozenset("able ably less ish ing ings lessness ness".split())
HUMPS, LONG_HUMPS = (re.compile(rf"{first}(?:[A-Z][a-z]+)+") for first in ("[a-z]+", "[a-z]{4,}"))
"""A name of a program's. In prose whose prompt and baseline have none, a long one is a break (iPhone is short)."""
FENCED = re.compile(r"```.*?```|`[^`\n]{1,80}`", re.DOTALL)
STRING = r"\"(?:[^\"\\\n]|\\.){0,400}\"|'(?:[^'\\\n]|\\.){0,400}'"
LITERALS = re.compile(STRING + r"|`[^`\n]{0,400}`|(?:#|//|--) .*")
"""Strings and comments; no longer ones, so that signs that nothing closes do not take a time that grows by squares."""
CODE = re.compile(
    r"\b(?:return|def|class|lambda|import|elif|while|for|in)"
    r" +(?:return|def|class|elif|while|for|import|else|if|in|and|or)\b"
    r"|(?<=[\w)\]\s])(?:[=!<>]=|//|\*\*|[=%/<>]) +(?:[=!<>]=|//|[=%/])(?= )"
    r"|(?<= )(?:[=!<>]=|[=%+/]) +(?:in|and|or|if|for|else|return|is|of)\b"
    r"|[\])][A-Za-z0-9]|[,;] +[,;]|\b(?:SELECT|FROM|WHERE|AND|OR|BY|JOIN|ON|SET) +(?:FROM|WHERE|AND|OR|[=,)])(?= )"
    r"|\b(?:if|while|for|in|def|import|and|or|not|lambda) +[\])}]|\[ *(?:return|def|import|elif|class)\b"
)
"""Operators, keywords and brackets that cannot be neighbours in code."""
JSON_ITEM = re.compile(
    rf"(?P<value>{STRING}|-?\d[\d.eE+-]*|\b(?:true|false|null)\b)|(?P<sign>[{{}}\[\]:,])|[^\s\"'{{}}\[\]:,]+"
)
NEVER_IN_JSON = frozenset("{{ {[ {: {, [: [, :: :, :} :] ,, ,: ,} ,] vv v{ v[ }v ]v }{ ][ ]{ }[ }: ]:".split())
"""Neighbours that JSON never has; v is any value but an object and a list."""


def breaks(text: str, sound: str, form: Form, code: bool) -> list[int]:
    """Where a text breaks: the number of words that begin before each break, in order.

    sound: what the answer may well take up, the prompt's text and the baseline's. code: the answer is to be code, where
    marks and glued words are none.
    """
    starts = [word.start() for word in WORD.finditer(text)]
    at = set(_debris(text, sound))
    if form == "json":
        at.update(_json(text))
    elif code:
        at.update(found.start() for found in CODE.finditer(_without(LITERALS, text)))
        at.update(_in_words(text, sound, code))
    else:
        prose = _without(FENCED, text)
        marks = (found for form_ in (GLUED, MARKS, MID_STOP) for found in form_.finditer(prose))
        at.update(found.start() for found in marks if found.group() not in sound)
        at.update(row.start() for row in SIGNS.finditer(prose) if _is_code_debris(row.group(), sound))
        at.update(_in_words(prose, sound, code))
        at.update(_in_spelling(prose, sound))
    return sorted(bisect_left(starts, place) for place in at)


def _without(form: re.Pattern[str], text: str) -> str:
    """The text with as many backticks for each place of that form."""
    return form.sub(lambda found: "`" * len(found.group()), text)


def _in_words(text: str, sound: str, code: bool) -> Iterator[int]:
    """Where words break that follow each other."""
    spoken, small = list(WORD.finditer(text)), sound.lower()
    yield from (place for place, phrase in _said_again(text, spoken) if phrase not in small)
    yield from _neighbours(text, spoken, code)
    if not code:
        yield from _baseless_than(spoken)
        yield from _foreign(spoken, sound)


def _in_spelling(text: str, sound: str) -> Iterator[int]:
    """Where a word is none."""
    known = set(words(sound))
    unknown = [word for word in WORD.finditer(text) if word.group().lower() not in known]
    times = Counter(word.group() for word in unknown)
    english, plain = _is_english(sound), not any(map(HUMPS.fullmatch, WORD.findall(sound)))
    for word in unknown:
        said = word.group()
        unspoken = english and times[said] == 1 and UNSPOKEN.search(said)  # what comes again is a name
        ending = english and said not in ENDINGS_SAID and ENDINGS.fullmatch(said)
        program = plain and LONG_HUMPS.fullmatch(said)
        if (unspoken or ending or program or said in CUT or _is_glued(said, known)) and not _is_named(text, word):
            yield word.start()


def _debris(text: str, sound: str) -> Iterator[int]:
    """Rows of characters that are no text, and marks of templates and tokenizers."""
    for no_text, row in groupby(enumerate(text), lambda pair: is_debris(pair[1])):
        if no_text:
            yield next(row)[0]
    for form in (TOKENS, MISREAD):
        yield from (found.start() for found in form.finditer(text) if found.group() not in sound)


def _is_code_debris(row: str, sound: str) -> bool:
    return len(set(row)) >= 3 and bool(CODE_SIGNS & set(row)) and row not in sound


def _said_again(text: str, spoken: Sequence[re.Match[str]]) -> Iterator[tuple[int, str]]:
    """Where a word, or a phrase of up to eight, is said again with nothing but spaces between, and both as they stand.

    What is said over and over is found once.
    """
    said = [word.group().lower() for word in spoken]
    joined = [text[one.end() : other.start()] in {" ", "\n"} for one, other in pairwise(spoken)]
    for length in range(1, 9):
        row = 0
        for place in range(length, len(said)):
            same = said[place] == said[place - length] and all(joined[place - length : place])
            row = row + 1 if same and not said[place].isdigit() else 0
            if spoken[place].group().isupper() != spoken[place - length].group().isupper():
                continue  # --model MODEL
            if row == length and (length == 1 or len(set(said[place - length + 1 : place + 1])) > 1):
                first = spoken[place - 2 * length + 1].start()
                yield spoken[place - length + 1].start(), " ".join(text[first : spoken[place].end()].lower().split())


def _neighbours(text: str, spoken: Sequence[re.Match[str]], code: bool) -> Iterator[int]:
    """Small words side by side that do not stand so in the language that most of them are of.

    Where they do not, or one is said again, a question word that follows does not belong there either ("of in what",
    "in in what").
    """
    language = _language(spoken)
    broken = False
    for one, other in pairwise(spoken):
        left, right = one.group().lower(), other.group().lower()
        between = text[one.end() : other.start()]
        named = text[one.start() - 1 : one.start()] in _BEFORE or text[other.end() : other.end() + 1] in _BEHIND
        found = ((left, right) in PAIRS[language] or (broken and right in QUESTIONS)) and not (
            (code and left in KEYWORDS and not broken)
            or (between.strip() or between.count("\n") > 1 or named or other.group().isupper())
            or {one.group(), other.group()} & NAMES
        )
        if found:
            yield other.start()
        broken = found or (left == right and left in SMALL[language])  # "in in" is seen as a word said again


_BEFORE, _BEHIND = frozenset("_-.`\"'‘“*/$\\<"), frozenset("_-`\"'’”*(/>=")
"""Signs beside a word that is named and not used (the `if`), or is a piece of a longer one (the in-house ...)."""


def _baseless_than(spoken: Sequence[re.Match[str]]) -> Iterator[int]:
    """Where something is said to be more "than" another, and nothing within ten words before says what is."""
    said = [word.group().lower() for word in spoken]
    for place, word in enumerate(said):
        if word == "than" and not any(MORE_THAN.fullmatch(one) for one in said[max(0, place - 10) : place]):
            yield spoken[place].start()


MORE_THAN = re.compile(
    r"more|less|worse|\w+er|\w+ers|rather|else|differ\w*|prefer\w*|\w+ior|elsewhere|otherwise|n?either|twice"
)


def _language(spoken: Sequence[re.Match[str]]) -> str:
    """The language that most of the small words are of, by their number; English if none are."""
    said = Counter(word.group().lower() for word in spoken)
    return max(SMALL, key=lambda language: sum(said[word] for word in SMALL[language]))


def _foreign(spoken: Sequence[re.Match[str]], sound: str) -> list[int]:
    """Where another script or language begins, in a text where that happens three times or more: a mix of languages."""
    found = Counter(script for word in spoken for script in scripts(word.group()))
    expected, known = {*scripts(sound + "a"), *(script for script, _ in found.most_common(1))}, set(words(sound))
    ours = {_language(spoken), _language([*WORD.finditer(sound)])}
    strange = frozenset().union(*(OWN[language] for language in OWN if language not in ours))
    at: dict[str, int] = {}
    inside = False
    for word in spoken:
        said = word.group()
        is_foreign = said not in known and (
            (len(said) > 1 and said in strange)
            or (not said.isascii() and any(script not in expected for script in scripts(said)))
        )
        if is_foreign and not inside and (len(said) > 1 or not {"GREEK", "LATIN"} & set(scripts(said))):
            at.setdefault(said, word.start())
        inside = is_foreign
    return [*at.values()] if len(at) >= 3 else []


def _is_english(sound: str) -> bool:
    """Whether prompt and baseline are: one word in six or more is a small English one."""
    said = words(sound)
    return 6 * sum(len(word) > 1 and word in SMALL["en"] for word in said) >= len(said) > 0


def _is_named(text: str, word: re.Match[str]) -> bool:
    """Whether signs around a word tell that it is a name of something in code, or of a file."""
    behind = text[word.end() : word.end() + 2]
    before = text[word.start() - 1 : word.start()]
    return before in _BEFORE or behind[:1] in _BEHIND or bool(re.fullmatch(r"\.\w", behind))


def _is_glued(word: str, known: set[str]) -> bool:
    """Two words in one, or letters of two scripts in it; names (JavaScript, float16, 20cm) are none."""
    if not word.isascii() and len(mixed := scripts(word)) > 1 and mixed["GREEK"] != 1:
        return True
    if pieces := re.fullmatch(r"(\d+)([^\W\d_]{2,})|([^\W\d_]{2,})(\d+)", word):
        letters = (pieces[2] or pieces[3]).lower()
        return letters in JOINED or letters in {"is", "of"} or (len(letters) > 3 and letters in known)
    if re.fullmatch(r"\d+[A-Z][a-z]{3,}", word):
        return True
    if camel := re.fullmatch(r"([A-Z]?[a-z]+)([A-Z][a-z]*)", word):
        first, second = camel[1].lower(), camel[2].lower()
        if first in known and second in known:
            return True
        small = JOINED if word[0].isupper() else SMALL["en"] | known
        return (len(first) > 1 and first in small) or (len(second) > 1 and second in small)
    if re.match(r"[A-Z]{3,}(?:[bcdfgjkmpqvxz][a-z]|ly)", word):
        return True
    if not word.islower() or word in NO_JOIN:
        return False
    if STUCK.search(word) and word != "whichever":
        return True
    for cut in range(2, min(len(word) - 1, 24)):
        one, other = word[:cut], word[cut:]
        if one in JOINED and len(other) > 2 and (other in JOINED or (len(other) > 3 and other in known)):
            return True
        if (other in JOINED and len(one) > 3 and one in known) or (one == "of" and len(other) > 3 and other in known):
            return True
    return False


def _json(text: str) -> Iterator[int]:
    """Signs and values of JSON that cannot follow each other; bare words (a sentence around it) are passed over."""
    before = ""
    for found in JSON_ITEM.finditer(text):
        now = found["sign"] or ("v" if found["value"] else "")
        if before + now in NEVER_IN_JSON:
            yield found.start()
        before = now
