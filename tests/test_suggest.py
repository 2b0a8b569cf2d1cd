"""Names that are not there: who is taken to be meant, and that every place says so."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import main
from harness.suggest import did_you_mean

NAMES = ("chat", "batch", "rag", "code", "agent")


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        ("chta", NAMES, ": did you mean chat?"),
        ("CHAT", NAMES, ": did you mean chat?"),
        (" chat ", NAMES, ": did you mean chat?"),
        ("xyz", NAMES, ""),
        ("", NAMES, ""),
        ("chat", (), ""),
        ("gpt", ("awq+gptq", "gptq"), ": did you mean gptq?"),
        ("awq+gtp", ("awq", "gptq", "awq+gptq"), ": did you mean awq+gptq?"),
        ("4080", ("rtx-4080", "l4", "a100"), ": did you mean rtx-4080?"),
        ("RTX", ("rtx-a2000-12gb", "RTX-6000-ADA", "l4"), ": did you mean rtx-a2000-12gb or RTX-6000-ADA?"),
        ("de", ("eu-business", "de-household"), ": did you mean de-household?"),
        ("l", ("l4", "l40s"), ": did you mean l4?"),
        ("tokens", ("input_tokens", "output_tokens"), ": did you mean input_tokens or output_tokens?"),
    ],
)
def test_who_is_meant(given: str, known: tuple[str, ...], said: str) -> None:
    """By difflib's ratio 2 M / T, M the letters shared in order and T those of both names: `chta` and `chat` share
    `cha`, 2 · 3 / 8 = 0.75. `gpt` and `gptq` 2 · 3 / 7 = 0.86; `awq+gptq`, which holds it, 2 · 3 / 11, taken for 0.6:
    more than 0.15 behind. `l` and `l4` 2 / 3, `l` and `l40s` 2 / 5. `tokens` and `input_tokens` 12 / 18, and
    `output_tokens` 12 / 19."""
    assert did_you_mean(given, known) == said


def test_three_names_at_most() -> None:
    assert did_you_mean("rtx", [f"rtx-{number}-with-a-long-name" for number in range(9)]).count("rtx") == 3


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*arguments)`: what `bench` says of a command line that must end with exit code 2."""

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        monkeypatch.setenv("COLUMNS", "500")
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return said


RUN = str(Path(__file__).parent.parent / "results" / "qwen2.5-0.5b-shape")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sweep --scenario chta", "chat"),
        ("sweep --precisions bf16,awk", "awq"),
        ("sweep --model dmeo", "demo"),
        ("sweep --model shape:qwen2.5-0.5", "qwen2.5-0.5b"),
        ("sweep --engine simulatd", "simulated"),
        ("sweep --engine simulated --gpu rtx4081", "rtx-4080"),
        ("sweep --slo p59=3s", "p95"),
        ("sweep --api chatt", "chat"),
        ("sweep --arrivals poison", "poisson"),
        ("predict --gpu l44", "l4"),
        ("predict --gpu l4 --model qwen2.5-7", "qwen2.5-7b"),
        (f"compare {RUN} {RUN} --metric toks", "tok_s"),
        ("prices rtxa4000", "rtx-a4000"),
        (f"capacity {RUN} --users 5 --rent rtxa4000", "rtx-a4000"),
        (f"capacity {RUN} --users 5 --electricity de", "de-household"),
        ("failures --prompts genral", "general"),
        ("quality --gate kll<0.02", "kl"),
    ],
)
def test_every_name_that_is_typed_wrong_is_met_with_a_right_one(
    refused: Callable[..., str], line: str, meant: str
) -> None:
    said = refused(*line.split())
    assert re.search(rf"did you mean ([\w.:+-]+ or )*{re.escape(meant)}( or |\?)", said), said
    assert "Allowed: " in said, "what is allowed is said all the same"


@pytest.mark.parametrize(
    ("line", "meant"), [("swep", "sweep"), ("engine instal", "install"), ("sweep --conk 3", "--conc")]
)
def test_the_parser_says_it_of_commands_and_options(refused: Callable[..., str], line: str, meant: str) -> None:
    assert meant in refused(*line.split())


def test_a_wrong_key_of_a_scenario(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("input_token = 12\n")
    assert "unknown key 'input_token': did you mean input_tokens?" in refused("sweep", "--scenario", str(file))
