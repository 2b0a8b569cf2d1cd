"""--vary: from what is typed to settings, names and what is compared with what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.variants import (
    baselines,
    flags_varied,
    is_baseline,
    name_of,
    ordered,
    parse_vary,
    precision_of,
    setting_of,
    settings,
    short_setting,
    split,
)

SEQS, BATCHED = "max_num_seqs=64,128", "max_num_batched_tokens=512,2048,8192"


def test_what_is_typed() -> None:
    assert parse_vary([SEQS]) == (("max_num_seqs", ("64", "128")),)
    assert parse_vary(["--max-num-seqs= 64 , 128 "]) == parse_vary([SEQS]), "as vLLM's help has it, too"
    assert parse_vary(["tensor_parallel=1,2"]) == (("tensor_parallel_size", ("1", "2")),), "as our own option is called"
    assert parse_vary([]) == ()


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["max_num_seqs"], "is no engine argument with values"),
        (["=64"], "is no engine argument with values"),
        (["--=64"], "is no engine argument with values"),
        (["Max=64"], "is no engine argument with values"),
        (["a.b=64"], "is no engine argument with values"),
        (["max num=64"], "is no engine argument with values"),
        (["max_num_seqs="], "'' cannot be a value"),
        (["max_num_seqs=64,,128"], "'' cannot be a value"),
        (["x=a/b"], "'a/b' cannot be a value"),
        (["x=[1]"], "'[1]' cannot be a value"),
        (["x=-1"], "'-1' cannot be a value"),
        (["x=a\nb"], "cannot be a value"),
        (["x=a=b"], "'a=b' cannot be a value"),
        (["x=é"], "'é' cannot be a value"),
        (["max_num_seqs=64,64"], "names 64 twice"),
        ([SEQS, "max-num-seqs=2"], "names max_num_seqs twice"),
        (["tensor-parallel=1,2", "tensor_parallel_size=4"], "names tensor_parallel_size twice"),
        ([f"a={','.join(map(str, range(13)))}", "b=1,2,3,4,5"], "makes 65 combinations"),
        ([f"x={'y' * 119}"], "names of 123 characters"),
    ],
)
def test_what_is_no_variation(items: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_vary(items)
    assert said in str(refused.value) and refused.value.exit_code == 2


def test_as_many_settings_as_allowed() -> None:
    assert len(settings(parse_vary([f"a={','.join(map(str, range(8)))}", "b=1,2,3,4,5,6,7,8"]))) == 64


def test_settings_are_the_product_in_the_order_typed() -> None:
    found = [name_of(setting, "awq") for setting in settings(parse_vary([SEQS, BATCHED]))]
    assert found[:3] == [f"awq[max_num_seqs=64,max_num_batched_tokens={tokens}]" for tokens in (512, 2048, 8192)]
    assert found[3:] == [f"awq[max_num_seqs=128,max_num_batched_tokens={tokens}]" for tokens in (512, 2048, 8192)]
    assert settings(()) == [()] and name_of((), "awq") == "awq"


def test_a_name_comes_apart_again() -> None:
    name = "awq@kneebench[max_num_seqs=64,kv_cache_dtype=fp8]"
    assert split(name) == ("awq@kneebench", "max_num_seqs=64,kv_cache_dtype=fp8")
    assert precision_of(name) == "awq@kneebench"
    assert setting_of(name) == (("max_num_seqs", "64"), ("kv_cache_dtype", "fp8"))
    assert short_setting(name) == "seqs=64,kv=fp8"
    assert split("gptq-3bit") == ("gptq-3bit", "") and setting_of("gptq-3bit") == ()
    assert flags_varied(["bf16", name, "bf16[block_size=16]"]) == ["max_num_seqs", "kv_cache_dtype", "block_size"]
    assert is_baseline("BF16[block_size=16]") and not is_baseline("fp16")


WORD = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
VALUE = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,8}", fullmatch=True)


@given(st.dictionaries(WORD, st.lists(VALUE, min_size=1, max_size=3, unique=True), min_size=1, max_size=3))
def test_what_was_parsed_is_found_again_in_the_names(typed: dict[str, list[str]]) -> None:
    vary = parse_vary([f"{flag}={','.join(values)}" for flag, values in typed.items()])
    names = [name_of(setting, "awq") for setting in settings(vary)]
    assert len(set(names)) == len(names), "no two cells have one name"
    assert [setting_of(name) for name in names] == settings(vary)
    assert {precision_of(name) for name in names} == {"awq"}
    assert not any(letter in name for name in names for letter in "/\\\n\r\t \0"), "part of a file's name and a header"


ALL = ["awq[s=1]", "bf16[s=1]", "gptq[s=1]", "awq[s=2]", "bf16[s=2]", "awq[s=3]"]


def test_the_baseline_stands_in_front_and_a_precisions_settings_together() -> None:
    assert ordered(ALL) == ["bf16[s=1]", "bf16[s=2]", "awq[s=1]", "awq[s=2]", "awq[s=3]", "gptq[s=1]"]
    assert ordered(["awq", "bf16", "awq"]) == ["bf16", "awq"]
    assert ordered(["gptq", "awq"]) == ["gptq", "awq"]


def test_compared_is_what_was_served_alike() -> None:
    assert baselines(ALL) == {"awq[s=1]": "bf16[s=1]", "awq[s=2]": "bf16[s=2]", "gptq[s=1]": "bf16[s=1]"}
    assert baselines(["bf16", "awq"]) == {"awq": "bf16"}
    assert baselines(["gptq", "awq", "rtn"]) == {"awq": "gptq", "rtn": "gptq"}
    assert baselines(["awq[s=1]", "awq[s=2]"]) == {"awq[s=2]": "awq[s=1]"}, "of one precision: its settings"
    assert baselines(["bf16"]) == baselines([]) == {}
    assert baselines(["bf16[s=1]", "awq[s=2]"]) == {}, "nothing was served alike"
