"""Engine arguments that vary: from what was typed to the variants of a sweep, and how a variant is called.

    --precisions bf16,awq --vary max_num_seqs=64,128

    bf16[max_num_seqs=64]  awq[max_num_seqs=64]  bf16[max_num_seqs=128]  awq[max_num_seqs=128]

A variant's name is its precision's with its setting in square brackets. Tables, file names and keys of cells hold it as
they hold a precision's, so all that is computed for a precision is computed for a variant. Compared are variants of the
same setting: what is asked is what the precision changes (`baselines`). Nothing heavy is imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product

from harness.errors import InputError

Vary = tuple[tuple[str, tuple[str, ...]], ...]
"""Flags and their values, in the order in which they were typed: (("max_num_seqs", ("64", "128")), ...)."""
Setting = tuple[tuple[str, str], ...]
"""One value of each flag; () where nothing varies."""

MOST_SETTINGS = 64
"""Each is a server session in every precision and repeat: of more, most would be typing mistakes."""
_LONGEST_NAME = 120
"""Of a setting: it stands in names of files, which end at 255 bytes."""
BASELINE = "bf16"

SHORT = {
    "max_num_seqs": "seqs",
    "max_num_batched_tokens": "batched",
    "max_model_len": "context",
    "gpu_memory_utilization": "memory",
    "tensor_parallel_size": "tp",
    "pipeline_parallel_size": "pp",
    "kv_cache_dtype": "kv",
}
"""How flags are called where there is little room; others as they are."""
_ALSO = {"tensor_parallel": "tensor_parallel_size", "pipeline_parallel": "pipeline_parallel_size"}
"""How our own options call them."""

_FLAG = re.compile(r"[a-z][a-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""What can stand in the name of a file and in the header of a request, which the key of a cell does."""
_NAME = re.compile(r"(?P<precision>[^\[\]]*)\[(?P<setting>[^\[\]]*)\]")


def parse_vary(items: Sequence[str]) -> Vary:
    """['max_num_seqs=64,128'] -> (("max_num_seqs", ("64", "128")),); flags with _ or -, with or without -- in front.

    Raises InputError for what is no flag with values, a flag or a value twice, and too many combinations.
    """
    found: dict[str, tuple[str, ...]] = {}
    for item in items:
        typed, equals, values = item.partition("=")
        name = typed.strip().removeprefix("--").replace("-", "_")
        name = _ALSO.get(name, name)
        listed = tuple(value.strip() for value in values.split(","))
        if not equals or not _FLAG.fullmatch(name):
            raise InputError(
                f"--vary {item!r} is no engine argument with values",
                allowed="FLAG=VALUE,VALUE with a flag of vLLM, as max_num_seqs=64,128",
            )
        for value in listed:
            if not _VALUE.fullmatch(value):
                raise InputError(
                    f"--vary {item!r}: {value!r} cannot be a value",
                    allowed="letters, digits and . _ + - (it becomes part of names); true and false for a switch",
                    remedy="an argument with another value does not vary: --engine-arg",
                )
        twice = [value for value in dict.fromkeys(listed) if listed.count(value) > 1]
        if name in found or twice:
            raise InputError(
                f"--vary {item!r} names {twice[0] if twice else name} twice", allowed="each flag and each value once"
            )
        found[name] = listed
    vary = tuple(found.items())
    count = math.prod(len(values) for values in found.values())
    if count > MOST_SETTINGS:
        raise InputError(
            f"--vary makes {count} combinations, each a server session in every precision",
            allowed=f"{MOST_SETTINGS} at most",
            remedy="vary fewer flags at a time",
        )
    longest = max(map(name_of, settings(vary)), key=len)
    if len(longest) > _LONGEST_NAME:
        raise InputError(f"--vary makes names of {len(longest)} characters", allowed=f"{_LONGEST_NAME} at most")
    return vary


def settings(vary: Vary) -> list[Setting]:
    """Every combination, the last flag's values changing fastest; one empty setting where nothing varies."""
    names = [name for name, _ in vary]
    return [tuple(zip(names, values, strict=True)) for values in product(*(values for _, values in vary))]


def name_of(setting: Setting, precision: str = "") -> str:
    """awq[max_num_seqs=64,max_num_batched_tokens=2048]; the precision's own name for an empty setting."""
    inside = ",".join(f"{name}={value}" for name, value in setting)
    return f"{precision}[{inside}]" if setting else precision


def split(name: str) -> tuple[str, str]:
    """awq[max_num_seqs=64] -> awq, max_num_seqs=64; a name without a setting -> that name and ""."""
    found = _NAME.fullmatch(name)
    return (found["precision"], found["setting"]) if found else (name, "")


def precision_of(name: str) -> str:
    """The name without its setting."""
    return split(name)[0]


def setting_of(name: str) -> Setting:
    """(("max_num_seqs", "64"),) of awq[max_num_seqs=64]; () of a name without a setting."""
    pairs = (part.partition("=") for part in split(name)[1].split(",") if part)
    return tuple((flag, value) for flag, _, value in pairs)


def short_setting(name: str) -> str:
    """seqs=64,batched=2048 of awq[max_num_seqs=64,max_num_batched_tokens=2048]; "" of a name without a setting."""
    return ",".join(f"{SHORT.get(flag, flag)}={value}" for flag, value in setting_of(name))


def flags_varied(names: Sequence[str]) -> list[str]:
    """The flags that stand in any of these names, in their order."""
    return list(dict.fromkeys(flag for name in names for flag, _ in setting_of(name)))


def is_baseline(name: str) -> bool:
    """Whether it is of BF16, whatever its setting."""
    return precision_of(name).lower() == BASELINE


def ordered(names: Sequence[str]) -> list[str]:
    """Each name once, the baseline's (BF16 where there is one, else the first) in front, a precision's together."""
    seen = list(dict.fromkeys(names))
    precisions = sorted(dict.fromkeys(map(precision_of, seen)), key=lambda name: not is_baseline(name))
    return sorted(seen, key=lambda name: precisions.index(precision_of(name)))


def baselines(names: Sequence[str]) -> dict[str, str]:
    """Each name that is compared -> what it is compared with, in the order of `ordered`.

    That is the run's baseline in the same setting; where it was not measured in that, there is no comparison. With one
    precision alone its settings are what is compared, with the first of them.
    """
    order = ordered(names)
    if not order:
        return {}
    base = precision_of(order[0])
    if all(precision_of(name) == base for name in order):
        return dict.fromkeys(order[1:], order[0])
    same = {split(name)[1]: name for name in order if precision_of(name) == base}
    others = [name for name in order if precision_of(name) != base]
    return {name: same[setting] for name in others if (setting := split(name)[1]) in same}
