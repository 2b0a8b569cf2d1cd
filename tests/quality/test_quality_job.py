"""`bench failures` and `bench quality` against toy servers on sockets: what is asked, what goes on, what is refused.

The toy speaks the parts of vLLM's API that are used. Its "model" answers a sum, and knows a tenth less of it the more
`damage` it has; its next-token distribution over 8 tokens is the same everywhere, mixed with the uniform one by damage.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.errors import EngineError, InputError
from harness.quality.directory import load_quality
from harness.quality.job import QualityRequest, measure
from harness.redact import without_keys
from tests.quality.answering import serving

SHARES = (0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01)
PROMPTS = 'name = "sums"\n' + "".join(
    f'[[prompt]]\nid = "s{n}"\ncategory = "{category}"\nprompt = "{n} + {n}"\ncheck = "numeric"\nexpect = ["{2 * n}"]\n'
    for n, category in enumerate(["reasoning"] * 12 + ["factual"] * 12)
)


class Toy:
    """A model and how often it was asked; `fail_at`: the request with which its server dies."""

    def __init__(self, damage: float = 0.0, fail_at: int | None = None) -> None:
        self.damage, self.fail_at = damage, fail_at
        self.asked: list[str] = []

    def logprobs(self) -> dict[int, float]:
        return {n: math.log(p * (1 - self.damage) + self.damage / 8) for n, p in enumerate(SHARES)}

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not body:
            return 200, {"data": [{"id": "toy"}]} if path == "/v1/models" else {"version": "0.0"}
        if path == "/tokenize":
            text = body.get("prompt") or json.dumps(body["messages"])
            return 200, {"tokens": [len(word) % 8 for word in re.split(r"\W+", text)]}
        if path == "/v1/completions":
            if body["prompt_logprobs"] == -1 or body["prompt_logprobs"] > 20:
                return 400, {"error": "prompt_logprobs greater than max allowed: 20"}
            row = {str(n): {"logprob": log, "rank": n + 1} for n, log in self.logprobs().items()}
            return 200, {"choices": [{"prompt_logprobs": [None] + [row] * (len(body["prompt"]) - 1)}]}
        asked = body["messages"][-1]["content"]
        if asked != "Say yes.":
            self.asked.append(asked)
            if self.fail_at is not None and len(self.asked) > self.fail_at:
                return 0, None
        n = int(asked.split()[0]) if asked[0].isdigit() else 0
        right = (n * 7) % 10 >= 10 * self.damage
        ids = [n % 8, 3 if right else 4]
        content = [
            {"token": f"token_id:{token}", "logprob": -0.5, "top_logprobs": [
                {"token": f"token_id:{other}", "logprob": log} for other, log in self.logprobs().items()]}
            for token in ids
        ]  # fmt: skip
        text = f"It is {2 * n if right else 2 * n + 1}."
        choice = {
            "message": {"content": text},
            "finish_reason": "stop",
            "token_ids": ids,
            "logprobs": {"content": content},
        }
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 3}}


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def status(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "sums.toml"
    path.write_text(PROMPTS)
    return path


def request(prompts: Path, out: Path, toys: dict[str, str], **more: Any) -> QualityRequest:
    endpoints = tuple(f"{name}={url}" for name, url in toys.items())
    parts = more.pop("parts", ("answers", "text"))
    return QualityRequest(
        parts, model="toy", prompts=str(prompts), out=out, endpoints=endpoints, window=16, texts=4, **more
    )


def test_everything_is_asked_of_each_and_the_baseline_twice(tmp_path: Path, prompts: Path) -> None:
    toys = {"bf16": Toy(), "awq": Toy(damage=0.2)}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(toy.reply)) for name, toy in toys.items()}
        measure(request(prompts, tmp_path / "q", urls), Quiet())
    assert (len(toys["bf16"].asked), len(toys["awq"].asked)) == (48, 24)
    found = load_quality(tmp_path / "q")
    assert found is not None
    assert {(a.precision, a.round) for a in found.answers} == {("bf16", 1), ("bf16", 2), ("awq", 1)}
    assert all(a.ok for a in found.answers if a.precision == "bf16")
    assert sum(a.ok is False for a in found.answers) == sum((n * 7) % 10 < 2 for n in range(24)) > 0
    # KL by hand: the distribution is the same at every position, and all 8 tokens are named
    mixed = [0.8 * p + 0.2 / 8 for p in SHARES]
    expected = sum(p * math.log(p / q) for p, q in zip(SHARES, mixed, strict=True))
    rows = [row for row in found.positions if row.precision == "awq"]
    assert rows and all(row.kl_nats == pytest.approx(expected, abs=2e-6) for row in rows)
    assert {row.round for row in found.positions if row.precision == "bf16"} == {2}
    assert all(row.kl_nats == 0 for row in found.positions if row.precision == "bf16")
    assert found.settings["vocabulary"].startswith("likeliest 20")
    assert found.settings["text"] == "the baseline's answers"
    assert not list((tmp_path / "q").glob(".*"))


def test_what_is_there_is_not_asked_again(tmp_path: Path, prompts: Path) -> None:
    toys = {"bf16": Toy(), "awq": Toy(0.2)}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(toy.reply)) for name, toy in toys.items()}
        wanted = request(prompts, tmp_path / "q", urls)
        measure(wanted, Quiet())
        before = {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()}
        observer = Quiet()
        measure(wanted, observer)
    assert (len(toys["bf16"].asked), len(toys["awq"].asked)) == (48, 24)
    assert observer.notes == ["bf16: all of it is there", "awq: all of it is there"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()} == before


def test_a_precision_that_comes_later_is_compared_too(tmp_path: Path, prompts: Path) -> None:
    toys = {"bf16": Toy(), "awq": Toy(0.2), "gptq": Toy(0.4)}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(toy.reply)) for name, toy in toys.items()}
        measure(request(prompts, tmp_path / "q", {name: urls[name] for name in ("bf16", "awq")}), Quiet())
        measure(request(prompts, tmp_path / "q", {name: urls[name] for name in ("bf16", "gptq")}), Quiet())
    assert [len(toy.asked) for toy in toys.values()] == [48, 24, 24]
    found = load_quality(tmp_path / "q")
    assert found is not None and found.precisions == ["bf16", "awq", "gptq"]
    rows = {name: [row for row in found.positions if row.precision == name] for name in toys}
    assert len(rows["bf16"]) == len(rows["awq"]) == len(rows["gptq"]) > 0
    assert rows["gptq"][0].kl_nats > rows["awq"][0].kl_nats > 0


def test_a_window_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--window 2048"):
        measure(QualityRequest(("text",), window=2048, out=tmp_path / "q"), Quiet())


def test_a_server_that_dies_costs_nothing_that_was_answered(tmp_path: Path, prompts: Path) -> None:
    dying, sound = Toy(fail_at=30), Toy()
    with serving(dying.reply) as url, serving(Toy(0.2).reply) as other:
        with pytest.raises(EngineError, match="stopped answering"):
            measure(request(prompts, tmp_path / "q", {"bf16": url, "awq": other}, concurrency=1), Quiet())
    found = load_quality(tmp_path / "q")
    assert found is not None and len(found.answers) == 30
    with serving(sound.reply) as url, serving(Toy(0.2).reply) as other:
        measure(request(prompts, tmp_path / "q", {"bf16": url, "awq": other}, concurrency=1), Quiet())
    assert len(sound.asked) == 18  # the second round's rest
    found = load_quality(tmp_path / "q")
    assert found is not None and len(found.answers) == 72
    assert len({(a.precision, a.round, a.prompt_id) for a in found.answers}) == 72


def test_other_prompts_in_the_same_directory_are_refused(tmp_path: Path, prompts: Path) -> None:
    with serving(Toy().reply) as url:
        measure(request(prompts, tmp_path / "q", {"bf16": url}, parts=("answers",)), Quiet())
        prompts.write_text(PROMPTS.replace("0 + 0", "0 + 00"))
        fewer = request(prompts, tmp_path / "q", {"bf16": url, "awq": url}, parts=("answers",))
        with pytest.raises(InputError, match="prompts"):
            measure(fewer, Quiet())


@pytest.mark.parametrize("item", ["bf16", "=http://x", "a b=http://x", "bf16=", "../x=http://y"])
def test_endpoints_need_a_name_and_an_address(tmp_path: Path, prompts: Path, item: str) -> None:
    with pytest.raises(InputError, match="--endpoint"):
        measure(QualityRequest(("answers",), prompts=str(prompts), endpoints=(item,), out=tmp_path / "q"), Quiet())
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"model": "hf_abcdefghijklmnop1234"},
        {"out": Path("sk-abc123def456ghi789jkl0")},
        {"endpoints": ("bf16=http://host/?api_key=abcdefgh12345678",)},
        {"engine_args": ("--api-key=abcdefgh12345678",)},
        {"engine_args": ("--api-key", "abcdefgh12345678")},
    ],
)
def test_a_key_that_was_typed_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="key"):
        measure(QualityRequest(("answers",), **given), Quiet())


def test_an_account_in_an_endpoints_path_is_hidden(tmp_path: Path, prompts: Path) -> None:
    """Its error is what a terminal shows and a log keeps."""
    url = "http://127.0.0.1:9/accounts/a1b2c3d4e5f6a7b8c9/v1"
    with pytest.raises(InputError) as caught:
        measure(request(prompts, tmp_path / "q", {"bf16": url}), Quiet())
    assert "a1b2c3d4e5f6a7b8c9" not in without_keys(str(caught.value))


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_its_papers_and_the_gate_decides_the_exit_code(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "q"
    with serving(Toy().reply) as base, serving(Toy(0.2).reply) as other:
        given = [
            "--model",
            "toy",
            "--prompts",
            str(prompts),
            "--endpoint",
            f"bf16={base}",
            "--endpoint",
            f"awq={other}",
        ]
        given += ["--out", str(out)]
        assert run("quality", *given, "--window", "16", "--texts", "4", monkeypatch=monkeypatch) == 0
        assert run("failures", *given, "--gate", "accuracy_drop<1pp", monkeypatch=monkeypatch) == 1
        assert run("failures", *given, "--gate", "accuracy_drop<90pp", monkeypatch=monkeypatch) == 0
        assert run("failures", *given, "--gate", "accuracy<1pp", monkeypatch=monkeypatch) == 2
        assert "--gate" in capsys.readouterr().err
    papers = {path.name for path in (tmp_path / "reports" / "q").iterdir()}
    assert {"failures.csv", "failures.md", "families.csv", "quality.md", "fidelity.csv"} <= papers
    header = (tmp_path / "reports" / "q" / "failures.csv").read_text().splitlines()[0]
    wanted = "prompt_id,category,bf16_ok,quant_ok,quant_issue,symptom,divergence_token,kl_at_divergence,notes"
    assert wanted in header
    assert run("report", str(out), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "awq" in said and "failures.md" in said
