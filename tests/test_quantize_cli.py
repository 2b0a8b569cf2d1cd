"""`python -m quantize`: its last line, its exit codes, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model

from quantize import __main__ as cli
from quantize.errors import RunError

ROOT = Path(__file__).parent.parent
SMALL = ["--group-size", "64", "--samples", "4", "--length", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


def test_a_run_ends_in_one_line_of_json(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantize", str(model), "--method", "awq", "--out", str(tmp_path / "o"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == [
        "path",
        "method",
        "format",
        "recipe_sha256",
        "checkpoint_sha256",
        "seconds",
        "cached",
        "tokens_trained",
        "start_seconds",
    ]
    assert result["path"] == str(tmp_path / "o") and result["method"] == "awq" and result["cached"] is False
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == ["block 1/2", "block 2/2"]


def test_the_cache_is_used(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model), "--method", "rtn", "--group-size", "64", "--cache", str(tmp_path)]
    results = []
    for _ in range(2):
        assert cli.main(arguments) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [result["cached"] for result in results] == [False, True]
    assert results[0]["path"] == results[1]["path"]


def test_a_config_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model / "config.json"), "--config-only", "--out", str(tmp_path / "shape"), *SMALL]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (Path(result["path"]) / "config.json").is_file() and not list(Path(result["path"]).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "gguf"], "method = 'gguf'. Allowed: rtn, awq"),
        (["--bits", "3", "--format", "awq"], "compressed-tensors can hold this"),
        (["--bits", "5"], "2, 3, 4 or 8"),
        (["--format", "gguf"], "awq, gptq, compressed-tensors"),
        (["--format", "gptq"], "Choose --format awq"),
        (["--keep", "down_proj"], "PATTERN=BITSbit"),
        (["--keep", "experts=8bit"], "matches"),
        (["--keep", "q_proj=8bit"], "fuses into one matrix"),
        (["--search", "best"], "minmax, mse, output"),
        (["--search", "output"], "Choose --search mse"),
        (["--activation-bits", "4"], "W8A8"),
        (["--target-gib", "0.0001", *SMALL], "or more with 4 bits"),
        (["--group-size", "96"], "group size = 96"),
        (["--samples", "0"], "Raise --samples"),
        (["--calibration", "absent.jsonl", *SMALL], "absent.jsonl"),
    ],
)
def test_a_request_that_cannot_be_served_is_exit_code_2(
    extra: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "rtn" if "96" in extra else "awq"  # the one that gets to the weights at once
    assert cli.main([str(model), "--method", method, "--out", str(tmp_path / "o"), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""
    assert not (tmp_path / "o").exists()


def test_two_places_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["model", "--out", "a", "--cache", "b"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_a_run_that_fails_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise RunError("block 3 puts out NaN", "finite activations", "Check the model")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["model"]) == 1
    assert capsys.readouterr().err == "error: block 3 puts out NaN. Allowed: finite activations. Check the model.\n"


def test_the_package_and_its_errors_load_nothing_heavy() -> None:
    code = (
        "import sys, quantize, quantize.errors, quantize.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
