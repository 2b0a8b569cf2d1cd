"""Makes odd inputs from real ones, by chance alone: the same seed makes the same inputs on every machine.

Most of what it does is what every fuzzer does (bits, spans, splices). Two things are for text formats: a value (number,
string, list) is replaced by an odd one, which keeps the rest readable, so that code behind the parser is reached; and a
short piece is repeated a thousandfold, which is how a reader that takes quadratic time is found.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"[^"\n]*"|\btrue\b|\bfalse\b|\bnull\b|\[[^\[\]\n]*\]|\{[^{}\n]*\}')
_ODD = (
    b"0", b"-1", b"1e999", b"-1e999", b"NaN", b"nan", b"inf", b"Infinity", b"1.5", b"0.0", b"1e-320", b"1" * 25,
    b"9" * 5000, b"true", b"null", b"[]", b"{}", b"[[]]", b"[null]", b'[{"a":1}]', b'""', b'"a"', b'"\\ud800"',
    b'"\\u0000"', b'"\\n"', b'"\xe2\x80\xa8"', b"'", b"\xd9\xa3", b"2024-02-30", b"2024-02-29T00:00:00+99:99", b"\xff",
    b'{"a":[{"b":null}]}', b"[" * 3000, b'{"a":' * 3000, b"1.2.3", b",", b"1_000", b"0x10", b'"/"', b'"../../x"',
)  # fmt: skip
"""Values that are not what a reader expects: ends of ranges, other types, half characters, deep nesting."""
_BYTES = (
    b"\0", b"\r", b"\n", b"\r\n", b"\n\n", b"\t", b" ", b'"', b"'", b",", b";", b":", b"=", b"\\", b"[", b"]", b"{",
    b"}", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\xc2\x85", b"\xe2\x80\xa8", b"data: ",
    b"data:", b"[DONE]", b"0\r\n\r\n", b"ffffffff\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"HTTP/1.1 ",
)  # fmt: skip


def mutate(rng: random.Random, data: bytes, corpus: Sequence[bytes], longest: int) -> bytes:
    """One to four changes of `data`, at most `longest` bytes of it."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = _change(rng, data, corpus, longest)
    return data[:longest]


def _change(rng: random.Random, data: bytes, corpus: Sequence[bytes], longest: int) -> bytes:
    kind = rng.random()
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 256)))
    if kind < 0.35 and (values := list(_VALUE.finditer(data, start, start + 2048))):
        value = rng.choice(values)
        return data[: value.start()] + rng.choice(_ODD) + data[value.end() :]
    if kind < 0.55:
        return data[:start] + rng.choice(_BYTES) + data[start if rng.random() < 0.5 else end :]
    if kind < 0.65:
        return data[:start] + rng.randbytes(rng.choice((1, 1, 2, 4))) + data[end:]
    if kind < 0.75:
        return data[:start] + data[end:]
    if kind < 0.8:
        times = min(rng.choice((2, 3, 8, 100, 100_000)), 1 + longest // max(1, end - start))
        return data[:start] + data[start:end] * times + data[end:]
    if kind < 0.9:
        other = rng.choice(corpus)
        return data[:start] + other[rng.randrange(len(other) + 1) :]
    if kind < 0.95:
        return data[:start]
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[start:end] + data[place:]
