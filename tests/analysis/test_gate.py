"""The gate: what can be asked for, and that the worse end of an interval decides."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.analysis.gate import Gate, GateLine, Limit, judge_gate, parse_gate, verdicts
from harness.errors import InputError
from harness.records import Fidelity, Outcomes


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("kl<0.02", Limit("kl", "<", 0.02)),
        ("KL <= 2e-2 nats", Limit("kl", "<=", 0.02)),
        ("perplexity_ratio<1.05", Limit("perplexity_ratio", "<", 1.05)),
        ("perplexity_ratio<5%", Limit("perplexity_ratio", "<", 1.05)),
        ("agreement>98%", Limit("agreement", ">", 0.98)),
        ("agreement ≥ 0.98", Limit("agreement", ">=", 0.98)),
        ("accuracy_drop<1pp", Limit("accuracy_drop", "<", 0.01)),
        ("accuracy_drop<1%", Limit("accuracy_drop", "<", 0.01)),
        ("accuracy_drop<.01", Limit("accuracy_drop", "<", 0.01)),
        ("accuracy_drop[reasoning]<2pp", Limit("accuracy_drop", "<", 0.02, "reasoning")),
        ("accuracy_drop[task:gsm8k]<1pp", Limit("accuracy_drop", "<", 0.01, "task:gsm8k")),
        ("right_to_wrong<=2%", Limit("right_to_wrong", "<=", 0.02)),
        ("issues[code]<5%", Limit("issues", "<", 0.05, "code")),
    ],
)
def test_a_limit_as_people_type_it(text: str, limit: Limit) -> None:
    (found,) = parse_gate(text).limits
    assert (found.metric, found.sign, found.family) == (limit.metric, limit.sign, limit.family)
    assert found.bound == pytest.approx(limit.bound)


def test_several_and_none() -> None:
    assert [limit.name for limit in parse_gate("kl<0.02, accuracy_drop<1pp,accuracy_drop[code]<3pp").limits] == [
        "kl", "accuracy_drop", "accuracy_drop[code]",
    ]  # fmt: skip
    assert parse_gate("") == parse_gate("  ") == Gate()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kll<0.02", "did you mean kl?"),
        ("acuracy_drop<1pp", "did you mean accuracy_drop?"),
        ("speed<3", "'speed' is no figure"),
        ("kl", "is no limit"),
        ("kl<=", "is no limit"),
        ("kl=<0.1", "is no limit"),
        ("kl<-1", "is no limit"),
        ("kl<1e400", "is no limit"),
        ("kl<0.02 accuracy_drop<1pp", "is no limit"),
        ("kl<0.02,", "is no figure"),
        ("kl>0.02", "wrong way round"),
        ("agreement<98%", "wrong way round"),
        ("kl<1pp", "has the unit pp"),
        ("accuracy_drop<0.1nats", "has the unit nats"),
        ("accuracy_drop<1", "write 1% or 0.01"),
        ("agreement>100%", "is no share"),
        ("perplexity_ratio<0.05", "no ratio of perplexities"),
        ("perplexity_ratio<105%", "no ratio of perplexities"),
        ("accuracy_drop[resoning]<1pp", "did you mean reasoning?"),
        ("accuracy_drop[task:]<1pp", "no family"),
        ("accuracy_drop[]<1pp", "no family"),
        ("issues[task:gsm8k]<1%", "no family"),
        ("kl[code]<0.1", "not of a family"),
        ("kl<0.1,kl<0.2", "given twice"),
    ],
)
def test_anything_else_is_refused_with_what_is_meant(text: str, said: str) -> None:
    with pytest.raises(InputError, match=".") as raised:
        parse_gate(text)
    assert said in str(raised.value) and "--gate" in str(raised.value) and raised.value.exit_code == 2


FIDELITY = Fidelity(
    "awq", None, None, 8, 1000, 0.015, 0.01, 0.025, 9.0, 8.9, 1.01, 1.0, 1.03, 0.97, 0.95, 0.985,
)  # fmt: skip
ALL = Outcomes("awq", "all", 100, 90, 88, 4, 2, 0.02, -0.03, 0.07, 0.69, 5, 110)
CODE = Outcomes("awq", "code", 30, 20, 15, 5, 0, 1 / 6, 0.03, 0.34, 0.06, 5, 30)


def judged(gate: str) -> GateLine:
    (line,) = judge_gate(parse_gate(gate), [ALL, CODE], [FIDELITY])
    return line


@pytest.mark.parametrize(
    ("kept", "broken", "value", "worst"),
    [
        ("kl<0.0251", "kl<0.02", 0.015, 0.025),
        ("kl<=0.025", "kl<0.025", 0.015, 0.025),
        ("perplexity_ratio<3.1%", "perplexity_ratio<2%", 1.01, 1.03),
        ("agreement>94.9%", "agreement>96%", 0.97, 0.95),
        ("agreement>=95%", "agreement>95%", 0.97, 0.95),
        ("accuracy_drop<7.1pp", "accuracy_drop<5pp", 0.02, 0.07),
        ("accuracy_drop[code]<35pp", "accuracy_drop[code]<20pp", 1 / 6, 0.34),
    ],
)
def test_the_worse_end_decides(kept: str, broken: str, value: float, worst: float) -> None:
    """Each value keeps both limits; the end of its interval keeps the first alone."""
    assert judged(kept).passes is True and judged(broken).passes is False
    assert (judged(broken).value, judged(broken).worst) == (pytest.approx(value), worst)


def test_shares_of_answers_are_judged_by_wilson() -> None:
    """4 of 100 lost: (4 + 1.920729 + 1.959964 √(3.84 + 0.960365)) / 103.841459 = 0.098371. 5 of 110 with an issue:
    (5 + 1.920729 + 1.959964 √(5 · 105/110 + 0.960365)) / 113.841459 = 0.102016."""
    lost, issues = judged("right_to_wrong<10%"), judged("issues<10%")
    assert (lost.value, lost.worst, lost.passes) == (0.04, pytest.approx(0.098371, abs=2e-6), True)
    assert (issues.value, issues.worst, issues.passes) == (
        pytest.approx(5 / 110),
        pytest.approx(0.102016, abs=2e-6),
        False,
    )


def test_what_was_not_measured_does_not_ship() -> None:
    gate = parse_gate("kl<0.02, accuracy_drop[task:gsm8k]<1pp, issues[summary]<5%")
    lines = judge_gate(gate, [ALL], [], ["awq", "gptq"])
    assert [(line.precision, line.metric) for line in lines] == [
        (name, metric) for name in ("awq", "gptq") for metric in ("kl", "accuracy_drop[task:gsm8k]", "issues[summary]")
    ]
    assert {(line.passes, line.ships, line.why) for line in lines} == {(None, False, "not measured")}
    assert verdicts(lines) == {"awq": False, "gptq": False}


def test_too_few_texts_for_an_interval_do_not_ship() -> None:
    (line,) = judge_gate(parse_gate("kl<0.02"), [], [Fidelity("awq", texts=2, kl_nats=0.001)])
    assert (line.value, line.worst, line.passes) == (0.001, None, None) and "too few texts" in line.why


def test_a_part_of_the_context_is_not_the_whole() -> None:
    part = Fidelity("awq", 1, 15, 8, 100, 0.001, 0.0005, 0.002)
    (line,) = judge_gate(parse_gate("kl<0.02"), [], [part])
    assert line.passes is None
    (line,) = judge_gate(parse_gate("kl<0.02"), [], [FIDELITY, part])
    assert line.worst == 0.025


def test_verdicts_need_every_limit() -> None:
    lines = judge_gate(parse_gate("kl<0.03,accuracy_drop<5pp"), [ALL], [FIDELITY])
    assert [line.passes for line in lines] == [True, False] and verdicts(lines) == {"awq": False}
    assert verdicts(judge_gate(parse_gate("kl<0.03,accuracy_drop<8pp"), [ALL], [FIDELITY])) == {"awq": True}
    assert verdicts(lines[::-1]) == {"awq": False} and verdicts([]) == {}


def test_who_is_judged() -> None:
    """By default whoever has a line; by name, so that the baseline's lines about itself are left out."""
    own = [Outcomes("bf16", "all", 10), ALL]
    assert {line.precision for line in judge_gate(parse_gate("accuracy_drop<1pp"), own, [])} == {"bf16", "awq"}
    assert {line.precision for line in judge_gate(parse_gate("accuracy_drop<1pp"), own, [], ["awq"])} == {"awq"}


def test_words() -> None:
    assert judged("accuracy_drop[code]<=20pp").words == "accuracy_drop[code] ≤ 20 pp: 16.7 pp, at worst 34 pp"
    assert judged("kl<0.02").words == "kl < 0.02 nats: 0.015 nats, at worst 0.025 nats"
    assert judged("perplexity_ratio<2%").words == "perplexity_ratio < 1.02: 1.01, at worst 1.03"
    assert judged("agreement>96%").words == "agreement > 96 %: 97 %, at worst 95 %"


def test_reading_a_gate_loads_nothing_heavy() -> None:
    code = (
        "import sys; from harness.analysis.gate import parse_gate; parse_gate('kl<0.02, accuracy_drop[code]<1pp');"
        "print(sorted({'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
