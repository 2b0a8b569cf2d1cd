"""The run directory: what it says of the machine, and what it keeps to itself."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.rundir import describe_machine, to_toml

SCALARS = st.one_of(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1), st.booleans())


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/srv/engines/vllm/bin/python", "<path>/python"),
        ("awq=/data/models/mine-awq", "awq=<path>/mine-awq"),
        ("~/models/x", "<path>/x"),
        ("--out=/var/tmp/run", "--out=<path>/run"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("results/mine", "results/mine"),
        ("./here/run", "./here/run"),
        ("1,8,16,32", "1,8,16,32"),
    ],
)
def test_arguments_are_recorded_without_this_machines_places(argument: str, kept: str) -> None:
    assert describe_machine("vllm", "0", [argument]).argv == (kept,)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.one_of(SCALARS, st.lists(SCALARS))))
def test_run_toml_reads_back(table: dict[str, object]) -> None:
    assert tomllib.loads(to_toml({"run": table})) == {"run": table}
