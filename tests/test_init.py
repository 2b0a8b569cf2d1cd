"""`bench init` and `bench sweep FILE`: what is written runs, what is typed wins, what is wrong is named."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from harness import cli, job, starter, sweepfile
from harness.job import SweepRequest
from harness.scenario import load_scenario
from harness.slo import parse_slo
from harness.telemetry.gpu import Gpu

Asked = Callable[..., SweepRequest]
Refused = Callable[..., str]
A4000 = Gpu(0, "NVIDIA RTX A4000", 15.73, 0.0, "570.1", "12.8")
COMMAND: Any = typer.main.get_command(cli.app)
OPTIONS = sweepfile.options(COMMAND.commands["sweep"])


class Asking(BaseException):
    """Thrown in place of a sweep."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """`asked(*arguments)`: what `bench sweep` would run."""
    caught: list[SweepRequest] = []

    def instead(request: SweepRequest, *_: object, **__: object) -> Path:
        caught.append(request)
        raise Asking

    def request(*arguments: str) -> SweepRequest:
        monkeypatch.setattr(job, "sweep", instead)
        monkeypatch.setattr(sys, "argv", ["bench", "sweep", *arguments])
        with pytest.raises(Asking):
            cli.main()
        return caught[-1]

    return request


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(*arguments)`: what `bench` says of a command line that must end with exit code 2."""

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return said


def init(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "init", *arguments])
    cli.main()


def sweep_toml(folder: Path, text: str, name: str = "sweep.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- what `bench init` writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [(), (A4000,), (A4000, A4000), (replace(A4000, name="NVIDIA of tomorrow"),)])
def test_the_file_as_it_is_written_is_the_bare_command(asked: Asked, tmp_path: Path, gpus: tuple[Gpu, ...]) -> None:
    file = sweep_toml(tmp_path, starter.text(OPTIONS, gpus))
    given, bare = asked(file), asked()
    assert bare.from_file == ()
    assert set(given.from_file) == set(tomllib.loads(Path(file).read_text()))
    assert replace(given, from_file=()) == bare


def test_every_option_is_in_the_file_once_and_none_that_is_not() -> None:
    named = re.findall(r"^(?:# )?(\w+) = ", starter.text(OPTIONS, ()), re.MULTILINE)
    assert sorted(named) == sorted(OPTIONS)
    assert {"model", "conc", "engine_arg"} <= set(named) and "resume" not in named


def test_each_commented_line_can_be_taken_in(asked: Asked, refused: Refused, tmp_path: Path) -> None:
    """The parser takes each of them; what sweep then says of the value's sense is another matter."""
    for line in re.findall(r"^# (\w+ = .*)$", starter.text(OPTIONS, (A4000,)), re.MULTILINE):
        (key,) = tomllib.loads(line)
        context = COMMAND.commands["sweep"].make_context("sweep", [])
        found = sweepfile.defaults(Path(sweep_toml(tmp_path, line)), context)
        assert list(found) == [OPTIONS[key].name], line


def test_what_the_file_calls_a_default_is_the_scenarios() -> None:
    text, chat = starter.text(OPTIONS, ()), load_scenario("chat")
    for key in ("input_tokens", "output_tokens", "requests", "seed", "usd_per_hour", "utilisation"):
        assert f"# {key} = {getattr(chat, key)}\n" in text
    slo = re.search(r'^# slo = "(.*)"$', text, re.MULTILINE)
    assert slo is not None and parse_slo(slo[1]) == chat.slo


def test_lines_fit_80_columns() -> None:
    for gpus in ((), (A4000,) * 8):
        assert max(map(len, starter.text(OPTIONS, gpus).splitlines())) <= 80


def test_hints_for_a_card() -> None:
    """Of the ladder, Qwen2.5-3B has 5.75 GiB in BF16 and 7B 14.2; 60 % of 15.73 GiB are 9.4. The A4000's rent is the
    catalogue's cheapest on demand."""
    text = " ".join(starter.text(OPTIONS, (A4000,)).replace("\n# ", " ").split())
    assert "NVIDIA RTX A4000, 15.7 GiB." in text
    assert '"Qwen/Qwen2.5-3B-Instruct": its 5.7 GiB in BF16 leave' in text
    assert re.search(r"This card rents for \$0\.\d+/h \(.*, on-demand, \d{4}-\d\d-\d\d\)", text)
    assert "Qwen/Qwen2.5-7B-Instruct" in starter.text(OPTIONS, (replace(A4000, memory_gib=24.0),))
    assert "Qwen/" not in starter.text(OPTIONS, (replace(A4000, memory_gib=1.0),))
    assert "no NVIDIA GPU" in starter.text(OPTIONS, ()) and "Qwen/" not in starter.text(OPTIONS, ())


def test_a_file_that_is_there_stays(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init(monkeypatch)
    assert "bench sweep sweep.toml" in capsys.readouterr().out
    Path("sweep.toml").write_text("mine")
    assert "--force" in refused("init")
    assert Path("sweep.toml").read_text() == "mine"
    init(monkeypatch, "--force")
    assert tomllib.loads(Path("sweep.toml").read_text())["model"] == "demo"
    init(monkeypatch, "other.toml")
    assert Path("other.toml").read_text() == Path("sweep.toml").read_text()
    assert "no/such/x.toml" in refused("init", "no/such/x.toml")


# --- what a file may say ----------------------------------------------------------------------------------------------


def test_a_file_says_what_is_typed(asked: Asked, tmp_path: Path) -> None:
    """Lists are joined, or repeated; numbers are numbers; the same request comes of it."""
    file = sweep_toml(
        tmp_path,
        """
        model = "shape:qwen2.5-0.5b"
        precisions = ["bf16", "gptq"]
        conc = [2, 4]
        slo = "p95=2s,ttft=500ms"
        requests = 7
        usd_per_hour = 0.31
        repeats = 3
        engine_arg = ["--enforce-eager", "--block-size=32"]
        """,
    )
    typed = asked(
        "--model", "shape:qwen2.5-0.5b", "--precisions", "bf16,gptq", "--conc", "2,4", "--slo", "p95=2s,ttft=500ms",
        "--requests", "7", "--usd-per-hour", "0.31", "--repeats", "3", "--engine-arg=--enforce-eager",
        "--engine-arg=--block-size=32",
    )  # fmt: skip
    given = asked(file)
    assert replace(given, from_file=()) == typed
    assert given.engine_args == ("--enforce-eager", "--block-size=32")
    assert given.from_file == (
        "model", "precisions", "conc", "requests", "slo", "usd_per_hour", "repeats", "engine_arg",
    )  # fmt: skip


def test_what_is_typed_wins(asked: Asked, tmp_path: Path) -> None:
    file = sweep_toml(tmp_path, "conc = [1, 2]\nrepeats = 3\n")
    for arguments in ((file, "--conc", "8"), ("--conc", "8", file)):
        request = asked(*arguments)
        assert request.concurrencies == (8,) and request.repeats == 3 and request.from_file == ("repeats",)


@pytest.mark.parametrize(
    ("text", "typed", "gone"),
    [
        ('until = "p95=3s"\nmax_minutes = 5', ("--slo", "p95=2s"), {"until", "max_minutes"}),
        ('slo = "p95=3s"', ("--until", "p95=2s"), {"slo"}),
        ('slo_p95 = "3s"', ("--slo", "p95=2s"), {"slo_p95"}),
        ("conc = [1]", ("--arrivals", "poisson", "--rate", "2"), {"conc"}),
        ('arrivals = "poisson"\nrate = 2', ("--conc", "2"), {"arrivals", "rate"}),
    ],
)
def test_a_typed_option_takes_the_place_of_what_it_excludes(
    asked: Asked, tmp_path: Path, text: str, typed: tuple[str, ...], gone: set[str]
) -> None:
    request = asked(sweep_toml(tmp_path, f"repeats = 1\n{text}"), *typed)
    assert replace(request, from_file=()) == asked(*typed)
    assert request.from_file == ("repeats",), f"{gone} did nothing"


def test_what_excludes_each_other_in_one_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "--until together with --slo" in refused("sweep", sweep_toml(tmp_path, 'slo = "p95=3s"\nuntil = "p95=3s"'))


def test_paths_are_relative_to_the_file(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plans"
    (folder / "models" / "m-awq").mkdir(parents=True)
    (folder / "mine.toml").write_text("input_tokens = 77\n")
    (folder / "chat").mkdir()
    file = sweep_toml(
        folder,
        """
        model = "shape:models/m-awq"
        scenario = "mine.toml"
        precisions = ["bf16", "awq=models/m-awq", "gptq=ORG/NAME"]
        out = "runs/one"
        calibration = "/there/text.jsonl"
        """,
    )
    monkeypatch.chdir(tmp_path)
    request = asked("plans/sweep.toml")
    assert request.model == "shape:plans/models/m-awq" and request.scenario.input_tokens == 77
    assert request.precisions == ("bf16", "awq=plans/models/m-awq", "gptq=ORG/NAME"), "a hub's name is no path"
    assert request.out == Path("plans/runs/one") and request.calibration == Path("/there/text.jsonl")
    assert asked(file, "--out", "mine").out == Path("mine"), "what is typed is relative to where one is"
    assert asked(sweep_toml(folder, 'scenario = "chat"')).scenario.name == "chat", "a name stays one beside a directory"


def test_a_byte_order_mark_is_no_fault(asked: Asked, tmp_path: Path) -> None:
    assert asked(sweep_toml(tmp_path, "\ufeffrepeats = 2\n")).repeats == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle = 'demo'", ["sweep.toml: unknown key 'modle': did you mean model?", "Allowed: model, precisions"]),
        ("max-minutes = 3", ["did you mean max_minutes?"]),
        ("resume = 'results/x'", ["unknown key 'resume'"]),
        ("[sweep]\nmodel = 'demo'", ["unknown key 'sweep'"]),
        ("repeats = 1.5", ["sweep.toml: repeats = 1.5", "integer", "Server sessions"]),
        ("repeats = 'two'", ["sweep.toml: repeats = 'two'"]),
        ("repeats = 0", ["sweep.toml: repeats = 0", "greater than or equal to 1"]),
        ("repeats = true", ["sweep.toml: repeats = true"]),
        ("repeats = [1]", ["sweep.toml: repeats = [1]: a list", "one value"]),
        ("usd_per_hour = nan", ["sweep.toml: usd_per_hour = nan"]),
        ("usd_per_hour = inf", ["sweep.toml: usd_per_hour = inf"]),
        ("model = 2026-01-01", ["sweep.toml: model = "]),
        ("model = {name = 'demo'}", ["sweep.toml: model = "]),
        ("conc = [1, [2]]", ["sweep.toml: conc = [1, [2]]"]),
        ("conc = []", ["sweep.toml: conc = []: empty"]),
        ("precisions = ''", ["sweep.toml: precisions = '': empty"]),
        ("out = ['a', 'b']", ["sweep.toml: out = ['a', 'b']: a list"]),
        ("model = 'demo'\nconc = ", ["sweep.toml: no readable TOML", "line 2"]),
        ("model = 'demo'\nconc", ["sweep.toml: no readable TOML", "line 2"]),
        ("model = 'a'\nmodel = 'b'", ["sweep.toml: no readable TOML", "line 2"]),
        ("a = " + "[" * 100_000, ["sweep.toml: no readable TOML"]),
        ("#" * (sweepfile.MOST_BYTES + 1), ["1,048,577 bytes"]),
    ],
)  # fmt: skip
def test_what_is_wrong_names_file_and_key(refused: Refused, tmp_path: Path, text: str, said: list[str]) -> None:
    told = refused("sweep", sweep_toml(tmp_path, text))
    for words in said:
        assert words in told
    assert "Traceback" not in told


def test_files_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    sweep_toml(tmp_path, "")
    assert "did you mean sweep.toml?" in refused("sweep", str(tmp_path / "swep.toml"))
    assert f"bench sweep --resume {tmp_path}" in refused("sweep", str(tmp_path)), "a run directory is resumed"
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    assert "latin.toml: no readable TOML" in refused("sweep", str(tmp_path / "latin.toml"))


def test_resume_stands_alone(refused: Refused, tmp_path: Path) -> None:
    file = sweep_toml(tmp_path, "repeats = 2")
    assert "--resume together with FILE" in refused("sweep", file, "--resume", str(tmp_path))
