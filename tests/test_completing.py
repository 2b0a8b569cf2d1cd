"""Shell completion: the values that are offered, and that a shell gets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import completing
from harness.checkpoints import PRECISIONS
from harness.predict.cards import cards
from harness.scenario import scenario_names

BENCH = Path(sys.executable).with_name("bench")


def test_names_that_begin_so() -> None:
    assert completing.scenarios("") == scenario_names()
    assert completing.scenarios("c") == ["chat", "code"]
    assert completing.scenarios("x") == []
    assert completing.models("d") == ["demo"] and "shape:qwen2.5-7b" in completing.models("shape:qwen2.5")
    assert completing.gpus("") == [card.id for card in cards()]
    assert "rtx-4080" in completing.gpus("rtx-4") and "l4" not in completing.gpus("rtx")


def test_a_list_is_completed_at_its_last_name() -> None:
    assert completing.precisions("") == list(PRECISIONS)
    assert completing.precisions("bf16,aw") == ["bf16,awq", "bf16,awq+gptq"]
    assert completing.precisions("bf16,") == [f"bf16,{name}" for name in PRECISIONS if name != "bf16"]
    assert completing.precisions("awq,gptq,b") == ["awq,gptq,bf16"]


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sign in (("b", "points.csv"), ("a", "run.toml"), ("q", "quality.toml"), ("t", "trace.toml"), ("x", "x")):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / sign).touch()
    (tmp_path / "results" / "b" / ".unfinished.json").touch()
    monkeypatch.chdir(tmp_path)
    assert completing.runs("") == ["results/a", "results/b", "results/q", "results/t"]
    assert completing.runs("results/a") == ["results/a"] and completing.runs("res") == completing.runs("")
    assert completing.runs(f"{tmp_path}/results/b") == [f"{tmp_path}/results/b"]
    assert completing.unfinished("") == ["results/b"]
    monkeypatch.chdir(tmp_path / "results" / "x")
    assert completing.runs("") == [], "no results/ here: the shell then offers files"


def completed(words: str, **environment: str) -> list[str]:
    """What the shell's function is told for a command line whose last word is to be completed."""
    done = subprocess.run(
        [str(BENCH)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "_BENCH_COMPLETE": "complete_bash", "COMP_WORDS": words,
             "COMP_CWORD": str(len(words.split(" ")) - 1), **environment},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("bench sweep --scenario ch", ["chat"]),
        ("bench sweep --precisions bf16,smo", ["bf16,smoothquant"]),
        ("bench sweep --engine simulated --gpu rtx-40", ["rtx-4080"]),
        ("bench predict --gpu rtx-40", ["rtx-4080"]),
        ("bench sweep --model dem", ["demo"]),
        ("bench swe", ["sweep"]),
        ("bench sweep --max-c", ["--max-cells", "--max-conc"]),
        ("bench scenarios a", ["agent"]),
    ],
)
def test_bash_is_told(words: str, offered: list[str]) -> None:
    found = completed(words)
    assert set(offered) <= set(found) and all(name.startswith(words.split(" ")[-1]) for name in found)


def test_runs_are_offered_to_commands_that_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results" / "night").mkdir(parents=True)
    (tmp_path / "results" / "night" / "points.csv").touch()
    monkeypatch.chdir(tmp_path)
    for words in ("bench report ", "bench compare results/x ", "bench capacity res", "bench calibrate "):
        assert completed(words) == ["results/night"], words
    assert completed("bench sweep --resume ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    done = subprocess.run(
        [str(BENCH)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "_BENCH_COMPLETE": f"source_{shell}"},
    )  # fmt: skip
    assert done.returncode == 0 and "bench" in done.stdout and f"complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_real_bash_completes() -> None:
    script = f"""
        PATH={BENCH.parent}:$PATH
        source <(_BENCH_COMPLETE=source_bash bench)
        COMP_WORDS=(bench sweep --scenario ba); COMP_CWORD=3
        _bench_completion bench
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "batch", done.stderr


def test_completing_names_loads_nothing_heavy() -> None:
    code = "import sys; import harness.cli; print(sorted({'numpy', 'scipy', 'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
