"""`bench recover`: what is run, what survives a stop, what is measured, and that its words say what its rows say."""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import pytest
import tiny_model

from quantize import calibration, evaluation_text, fidelity, recover, recover_figure
from quantize.errors import CalibrationError, OutputError, RunError
from quantize.fidelity import Fidelity
from quantize.job import quantize_model
from quantize.measured import Ended, Watch, execute
from quantize.recipe import Recipe
from quantize.recover_page import markdown, table
from quantize.recover_rows import Row, read, write
from quantize.recover_runs import Request, run_all
from quantize.recover_words import NOISE, choice, differ, points, verdicts, words
from quantize.scheme import Scheme

ROOT = Path(__file__).parent.parent
SMALL = ["--samples", "4", "--length", "32", "--group-size", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "rtn"
    return quantize_model(model, Recipe("rtn", Scheme(4, 64, True)), out=out).path


def ended(
    said: str = '{"checkpoint_sha256": "ab"}', code: int = 0, complained: str = "", seconds: float = 6.0
) -> Ended:
    return Ended(code, seconds, seconds, 400.0, said, complained)


class Stub:
    """Stands for the processes: remembers the commands, leaves a directory (a copy of `checkpoint`), and ends as
    `endings` say, which are by the name of the run."""

    def __init__(self, checkpoint: Path | None = None, **endings: Ended | BaseException) -> None:
        self.checkpoint, self.endings = checkpoint, endings
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], log: Path, watch: Watch) -> Ended:
        self.commands.append(list(command))
        out = Path(command[command.index("--out") + 1])
        assert not out.exists(), "a run begins with nothing of one before"
        ending = self.endings.get(out.name.replace("-", "_"), ended())
        if isinstance(ending, BaseException):
            raise ending
        if ending.code == 0:
            shutil.copytree(self.checkpoint, out) if self.checkpoint else out.mkdir()
        return ending

    @property
    def names(self) -> list[str]:
        return [Path(command[command.index("--out") + 1]).name for command in self.commands]


def request(out: Path, *runs: Row, flags: tuple[str, ...] = (), symmetric: bool = True) -> Request:
    return Request("tiny", Path("tiny"), out, runs, symmetric, 64, 4, 32, flags)


def run(method: str, bits: int = 4, seed: int = 0) -> Row:
    return Row(method, bits, seed, "W4A16 g64 sym")


def judged(kl: float = 0.01) -> Callable[[Path], Fidelity]:
    return lambda _: Fidelity(100, kl, 2.0, 2.1, 0.9, ())


def ran(
    request: Request, stub: Stub, known: Sequence[Row] = (), judge: Callable[[Path], Fidelity] | None = None
) -> list[Row]:
    return run_all(request, known, stub, judge or judged(), lambda _: None, lambda _: None)


# --- what was asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bits", "5"], "2, 3, 4 or 8"),
        (["--bits", "4,x"], "--bits 'x'"),
        (["--bits", ","], "Name one at least"),
        (["--methods", "rtn,gguf"], "--methods gguf. Allowed: rtn, awq, gptq, smoothquant, awq+gptq"),
        (["--seeds", "0"], "1 or more"),
        (["--group-size", "96"], "96"),
        (["--samples", "0"], "Raise --samples"),
        (["--calibration", "absent.jsonl"], "absent.jsonl"),
        (["--text", "absent.jsonl"], "absent.jsonl"),
        (["--methods", "rtn,gptq", "--", "--steps", "5"], "'--steps 5' after --, and no method that trains"),
    ],
)
def test_what_cannot_be_served_is_exit_code_2_before_anything_runs(
    extra: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub()
    assert recover.main([str(model), "--out", str(tmp_path / "o"), *SMALL, *extra], execute=stub) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""
    assert not stub.commands and not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["model", "--sym", "--asym"], ["model", "--seeds", "two"], ["model", "--x"]])
def test_what_cannot_be_parsed_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        recover.main(arguments, "bench recover")
    assert stopped.value.code == 2 and "usage: bench recover" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert recover.main(["/no/such/model"]) == 2
    assert "/no/such/model" in capsys.readouterr().err


def test_bench_passes_everything_on_and_keeps_what_comes_after_the_dashes(tmp_path: Path) -> None:
    arguments = ["demo", "--methods", "rtn", "--out", str(tmp_path / "o"), "--", "--steps", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "harness", "recover", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "'--steps 5' after --" in done.stderr and "Traceback" not in done.stderr


def test_each_run_is_one_command(model: Path, tmp_path: Path, checkpoint: Path) -> None:
    stub = Stub(checkpoint)
    arguments = [str(model), "--out", str(tmp_path), *SMALL, "--bits", "4,8", "--methods", "rtn,qat,rtn", "--asym"]
    assert recover.main([*arguments, "--seeds", "2", "--", "--steps", "7"], execute=stub) == 0
    assert stub.names == ["rtn-4-s0", "qat-4-s0", "qat-4-s1", "rtn-8-s0", "qat-8-s0", "qat-8-s1"]
    rtn, qat = stub.commands[0], stub.commands[2]
    assert rtn[:6] == [sys.executable, "-m", "quantize", str(model), "--method", "rtn"]
    assert qat[-2:] == ["--steps", "7"] and "--steps" not in rtn
    for flag, value in (
        ("--bits", "4"),
        ("--seed", "1"),
        ("--samples", "4"),
        ("--length", "32"),
        ("--group-size", "64"),
    ):
        assert qat[qat.index(flag) + 1] == value
    assert "--asym" in rtn and "--sym" in stub.commands[3], "8 bits are symmetric whatever is asked"
    assert {row.scheme for row in read(tmp_path / "recover.csv")} == {"W4A16 g64 asym", "W8A16 g64 sym"}


# --- running and going on ---------------------------------------------------------------------------------------------


def test_a_row_says_what_the_run_said(tmp_path: Path) -> None:
    said = '{"checkpoint_sha256": "cd", "tokens_trained": 5000, "start_seconds": 1.5}'
    nothing = '{"checkpoint_sha256": "ab", "tokens_trained": 0, "start_seconds": 0.0}'
    stub = Stub(rtn_4_s0=ended(nothing), qat_4_s0=ended(said, seconds=70.0))
    rows = ran(request(tmp_path, run("rtn"), run("qat")), stub, judge=judged(0.25))
    figures = {"kl_nats": 0.25, "perplexity_original": 2.0, "perplexity_quantized": 2.1, "top1_agreement": 0.9}
    common = {"cpu_seconds": 6.0, "peak_mib": 400.0, "positions": 100, **figures}
    first = replace(run("rtn"), seconds=6.0, checkpoint_sha256="ab", **common)  # type: ignore[arg-type]
    second = {"seconds": 70.0, "checkpoint_sha256": "cd", "training_tokens": 5000, "start_seconds": 1.5}
    assert rows == [first, replace(run("qat"), **{**common, "cpu_seconds": 70.0, **second})]
    assert read(tmp_path / "recover.csv") == rows


def test_the_checkpoint_says_how_many_tokens_calibrated_it(tmp_path: Path) -> None:
    lines = [list(range(i, i + 32)) for i in range(6)]
    (tmp_path / "calibration.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lines))
    asked = replace(request(tmp_path, run("gptq"), run("rtn")), model=tmp_path)
    drawn = calibration.load(tmp_path, Recipe(samples=4, length=32), tmp_path / "calibration.jsonl")
    records = {"gptq-4-s0": drawn.sha256(), "rtn-4-s0": None}

    class Recording(Stub):
        def __call__(self, command: Sequence[str], log: Path, watch: Watch) -> Ended:
            made = super().__call__(command, log, watch)
            out = Path(command[-1])
            (out / "quantize.json").write_text(json.dumps({"calibration_sha256": records[out.name]}))
            return made

    assert [row.calibration_tokens for row in ran(asked, Recording())] == [4 * 32, None]


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    stub = Stub(
        rtn_4_s0=ended(code=2, complained="error: /some/where/model: no scale"),
        awq_4_s0=ended(code=-9),
        gptq_4_s0=ended("nonsense"),
        qat_4_s0=ended("[1]"),
    )
    rows = ran(request(tmp_path, *map(run, ("rtn", "awq", "gptq", "qat", "qad"))), stub)
    assert [row.error for row in rows] == [
        "model: no scale",
        "ended by signal 9 (Killed)",
        "its last line is no result: nonsense",
        "its last line is no result: [1]",
        "",
    ]
    assert [row.kl_nats for row in rows] == [None] * 4 + [0.01] and rows[0].seconds == 6.0
    assert read(tmp_path / "recover.csv") == rows


def test_what_cannot_be_compared_is_a_failed_row(tmp_path: Path) -> None:
    def fail(_: Path) -> Fidelity:
        raise RunError("block 1 puts out NaN", "finite activations", "Look")

    (row,) = ran(request(tmp_path, run("rtn")), Stub(), judge=fail)
    assert row.kl_nats is None and row.error.startswith("comparing with the original: block 1 puts out NaN")


def test_a_call_that_is_stopped_keeps_what_was_finished_and_the_next_goes_on(tmp_path: Path) -> None:
    asked = request(tmp_path, *map(run, ("rtn", "awq", "gptq")))
    first = Stub(awq_4_s0=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ran(asked, first)
    known = read(tmp_path / "recover.csv")
    assert [row.name for row in known] == ["rtn-4-s0"]
    (tmp_path / "checkpoints" / "awq-4-s0").mkdir()  # what it had left; Stub refuses to begin with it
    (tmp_path / "checkpoints" / ".awq-4-s0.unfinished").mkdir()
    second = Stub()
    rows = ran(asked, second, known)
    assert second.names == ["awq-4-s0", "gptq-4-s0"] and [row.error for row in rows] == [""] * 3
    assert not (tmp_path / "checkpoints" / ".awq-4-s0.unfinished").exists()
    third = Stub()
    assert ran(asked, third, rows, judged(0.5)) == rows and not third.commands


def test_a_call_that_is_stopped_while_it_compares_does_not_make_the_checkpoint_again(tmp_path: Path) -> None:
    def stop(_: Path) -> Fidelity:
        raise KeyboardInterrupt

    asked = request(tmp_path, run("qat"))
    with pytest.raises(KeyboardInterrupt):
        ran(asked, Stub(), judge=stop)
    known = read(tmp_path / "recover.csv")
    assert [(row.kl_nats, row.seconds) for row in known] == [(None, 6.0)]
    again = Stub()
    (row,) = ran(asked, again, known)
    assert not again.commands and (row.kl_nats, row.seconds) == (0.01, 6.0)
    shutil.rmtree(tmp_path / "checkpoints")
    ran(asked, again, known)
    assert again.names == ["qat-4-s0"], "without its checkpoint it is made"


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    failed = ran(request(tmp_path, run("rtn")), Stub(rtn_4_s0=ended(code=1, complained="error: disk full")))
    assert failed[0].error == "disk full"
    (tmp_path / "checkpoints" / "rtn-4-s0").mkdir()
    again = Stub()
    rows = ran(request(tmp_path, run("rtn")), again, failed)
    assert (
        again.names == ["rtn-4-s0"] and [row.error for row in rows] == [""] and read(tmp_path / "recover.csv") == rows
    )


def test_one_set_of_conditions_for_each_directory(
    model: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model), "--out", str(tmp_path / "o"), "--bits", "4", "--methods", "rtn", *SMALL]
    assert recover.main(arguments, execute=Stub(checkpoint)) == 0
    again = Stub(checkpoint)
    assert recover.main([*arguments, "--methods", "rtn,gptq"], execute=again) == 0
    assert again.names == ["gptq-4-s0"]
    capsys.readouterr()
    for extra, changed in ((["--samples", "5"], "calibration, evaluation, draw"), (["--asym"], "scheme")):
        other = Stub(checkpoint)
        assert recover.main([*arguments, *extra], execute=other) == 2
        assert f"measured with another {changed}." in capsys.readouterr().err and not other.commands
    (tmp_path / "o" / "conditions.json").unlink()
    assert recover.main(arguments, execute=Stub(checkpoint)) == 2
    assert "rows without conditions.json" in capsys.readouterr().err


def test_the_exit_code_is_1_where_a_run_failed(
    model: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model), "--out", str(tmp_path), "--bits", "4", *SMALL]
    stub = Stub(checkpoint, awq_4_s0=ended(code=1, complained="error: block 0 puts out NaN"))
    assert recover.main([*arguments, "--methods", "rtn,awq"], execute=stub) == 1
    captured = capsys.readouterr()
    assert "awq-4-s0: FAILED, block 0 puts out NaN" in captured.err and "At 4 bits only RTN was run" in captured.out
    assert "## Failed\n\n- awq-4-s0: block 0 puts out NaN" in (tmp_path / "recover.md").read_text()
    assert recover.main([*arguments, "--methods", "rtn"], execute=Stub()) == 0, "of what is asked for nothing failed"


def test_ctrl_c_is_130(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub(rtn_4_s0=KeyboardInterrupt())
    assert recover.main([str(model), "--out", str(tmp_path), *SMALL], execute=stub) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_two_calls_do_not_share_a_directory(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert recover.main([str(model), "--out", str(tmp_path), *SMALL], execute=Stub()) == 2
    assert "another run writes to" in capsys.readouterr().err
    os.close(held)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recover.csv"
    assert read(file) == []
    for text in ("a,b\n1,2\n", "", f"{','.join(asdict(run('rtn')))}\nrtn,four\n"):
        file.write_text(text)
        with pytest.raises(OutputError, match="Give another --out"):
            read(file)


def test_a_table_keeps_every_figure(tmp_path: Path) -> None:
    rows = [
        replace(run("rtn"), kl_nats=1.23457e-9, seconds=0.5, peak_mib=400.25, error='a "b", c'),
        replace(run("qad", 2, 3), start_seconds=0.0, training_tokens=2_457_600, top1_agreement=1.0),
    ]
    write(rows, tmp_path / "recover.csv")
    assert read(tmp_path / "recover.csv") == rows and [file.name for file in tmp_path.iterdir()] == ["recover.csv"]


# --- a program, measured ----------------------------------------------------------------------------------------------


def python(code: str, tmp_path: Path, watch: Watch = lambda _: None) -> Ended:
    return execute([sys.executable, "-c", code], tmp_path / "log", watch)


def test_memory_is_the_programs_own(tmp_path: Path) -> None:
    """This process holds torch, hundreds of MiB, which a child's ru_maxrss would begin at."""
    small, large = (python(f"held = b'x' * {mib} * 2**20", tmp_path) for mib in (0, 100))
    assert 4 < small.peak_mib < 40
    assert 95 < large.peak_mib - small.peak_mib < 110


def test_seconds_and_what_it_said(tmp_path: Path) -> None:
    told: list[str] = []
    code = (
        "import sys, time; time.sleep(0.3); print('a\\nb', end=''); print('c\\n\\nd \\n', file=sys.stderr); sys.exit(3)"
    )
    found = python(code, tmp_path, told.append)
    assert (found.code, found.said, found.complained, told) == (3, "b", "d", ["c", "d"])
    assert 0.3 < found.seconds < 5 and found.cpu_seconds < 0.3
    assert (tmp_path / "log").read_text() == "c\n\nd \n\n"


def test_a_program_that_is_killed(tmp_path: Path) -> None:
    found = python("import os; os.kill(os.getpid(), 9)", tmp_path)
    assert found.code == -9 and found.said == "" and found.seconds > 0


def test_an_interrupt_ends_the_program_and_what_it_started(tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(line: str) -> None:
        started.extend(map(int, line.split()))
        raise KeyboardInterrupt

    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), child.pid, file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(KeyboardInterrupt):
        python(code, tmp_path, interrupt)
    assert len(started) == 2
    for pid in started:
        deadline = time.monotonic() + 30  # it was killed; a busy machine takes a moment to notice
        while (state := _state(pid)) not in ("", "Z"):
            assert time.monotonic() < deadline, f"process {pid} is in state {state}"
            time.sleep(0.05)


def _state(pid: int) -> str:
    """R, S, Z ...; empty: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# --- the text ---------------------------------------------------------------------------------------------------------


def documents(path: Path, lengths: Sequence[int]) -> Path:
    """A file of documents of those lengths, each of tokens of its own."""
    ids = itertools.count()
    lines = (json.dumps({"input_ids": [next(ids) for _ in range(length)]}) + "\n" for length in lengths)
    path.write_text("".join(lines))
    return path


def test_no_text_is_calibrated_on_and_evaluated_on(tmp_path: Path) -> None:
    file, recipe = documents(tmp_path / "t.jsonl", [10] * 60), Recipe(samples=30, length=10)
    found = evaluation_text.split(tmp_path, recipe, file)
    assert len(found.calibration.sequences) == 30 and len(found.evaluation.sequences) == evaluation_text.EVALUATED
    assert not set(found.calibration.sequences) & set(found.evaluation.sequences)
    assert set(found.calibration.sequences) == set(calibration.load(tmp_path, recipe, file).sequences)


def test_of_a_short_text_a_fifth_is_kept_back(tmp_path: Path) -> None:
    found = evaluation_text.split(tmp_path, Recipe(samples=128, length=10), documents(tmp_path / "t.jsonl", [10] * 25))
    assert (len(found.calibration.sequences), len(found.evaluation.sequences)) == (20, 5)
    assert "a part that no method was given" in found.evaluation.origin
    with pytest.raises(CalibrationError, match="0 tokens to calibrate on"):
        evaluation_text.split(tmp_path, Recipe(samples=128, length=10), documents(tmp_path / "u.jsonl", [10]))


def test_what_comes_twice_is_in_one_part_only(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(documents(file, [10] * 10).read_text() * 4)
    found = evaluation_text.split(tmp_path, Recipe(samples=30, length=10), file)
    parts = [*found.calibration.sequences, *found.evaluation.sequences]
    assert len(parts) == len(set(parts)) == 10


def test_a_text_of_ones_own_is_left_what_was_not_calibrated_on(tmp_path: Path) -> None:
    first, both = documents(tmp_path / "a.jsonl", [10] * 4), documents(tmp_path / "b.jsonl", [10] * 9)
    found = evaluation_text.split(tmp_path, Recipe(samples=4, length=10), first, both)
    assert len(found.calibration.sequences) == 4 and len(found.evaluation.sequences) == 5
    assert found.evaluation.origin == "b.jsonl"
    with pytest.raises(CalibrationError, match="not calibrated on"):
        evaluation_text.split(tmp_path, Recipe(samples=4, length=10), first, first)


def test_a_checkpoint_that_is_there_is_evaluated_on_what_is_left(tmp_path: Path) -> None:
    recipe, file = Recipe(samples=4, length=10), documents(tmp_path / "a.jsonl", [10] * 9)
    seen = set(calibration.load(tmp_path, recipe, file).sequences)
    left = evaluation_text.choose(tmp_path, recipe, text=file)
    assert len(left.sequences) == 5 and not seen & set(left.sequences) and left.origin == "a.jsonl, not calibrated on"
    rtn = evaluation_text.choose(tmp_path, replace(recipe, method="rtn"), text=file)
    assert len(rtn.sequences) == 9, "nothing was calibrated on"
    short = evaluation_text.choose(tmp_path, Recipe(samples=99, length=10), text=file)
    assert len(short.sequences) == 9 and "CALIBRATED ON" in short.origin
    named = evaluation_text.choose(tmp_path, recipe, file, tmp_path / "absent.jsonl")
    assert len(named.sequences) == 9 and named.origin == "a.jsonl"


# --- words ------------------------------------------------------------------------------------------------------------


def row(method: str, kl: float, seconds: float, bits: int = 4, seed: int = 0, **more: float) -> Row:
    known = {"cpu_seconds": seconds, "peak_mib": 400.0, "perplexity_quantized": 2.0, "top1_agreement": 0.9, **more}
    return replace(run(method, bits, seed), kl_nats=kl, seconds=seconds, **known)  # type: ignore[arg-type]


def test_the_choice_is_the_quickest_within_twice_the_least() -> None:
    rows = [row("rtn", 0.1, 1.0), row("gptq", 0.02, 6.0), row("awq", 0.015, 14.0), row("qad", 0.01, 170.0)]
    assert choice(points(rows)).method == "gptq"
    assert choice(points([*rows[:1], row("gptq", 0.0201, 6.0), *rows[2:]])).method == "awq"
    assert choice(points([row("rtn", 0.01, 1.0), *rows[1:]])).method == "rtn"


def test_the_words_of_four_bits() -> None:
    rows = [row("rtn", 0.1, 1.0), row("gptq", 0.02, 6.0), row("qat", 0.03, 120.0), row("qad", 0.01, 168.0)]
    assert words(rows) == [
        "At 4 bits GPTQ (6.0 s, KL 0.02) is the quickest within 2x of the best, QAD (168 s, KL 0.01). "
        "GPTQ closes 80 % of the KL that RTN leaves (KL 0.1 to 0.02), for 6x the time (6.0 s). "
        "Training made it worse: QAT leaves 1.5x the KL of GPTQ (KL 0.03 and 0.02), for 20x the time (120 s). "
        "QAD closes 50 % of the KL that GPTQ leaves (KL 0.02 to 0.01), for 28x the time (168 s). "
        "QAD leaves 0.33x the KL of QAT in 1.4x its time.",
        "Trained methods ran with one seed: how far another seed would land is not known.",
    ]
    assert verdicts(points(rows)) == [
        "**RTN**: at 4 bits quicker than GPTQ, with 5x its KL.",
        "**GPTQ**: at 4 bits the choice, the quickest within 2x of the best (RTN leaves 5x its KL in 0.17x its time).",
        "**QAT**: at 4 bits not worth it: GPTQ is quicker and better.",
        "**QAD**: at 4 bits worth it where 50 % less KL than GPTQ's is worth 28x its time.",
    ]


def test_what_is_best_and_alone_and_without_training_is_said_so() -> None:
    assert words([row("gptq", 0.3, 6.0, bits=2)]) == ["At 2 bits only GPTQ was run (6.0 s, KL 0.3)."]
    assert verdicts(points([row("gptq", 0.3, 6.0, bits=2)])) == ["**GPTQ**: at 2 bits nothing was run beside it."]
    (said,) = words([row("rtn", 0.5, 1.0), row("awq", 0.004, 12.0)])
    assert said.startswith(
        "At 4 bits AWQ (12 s, KL 0.004) has the least KL, and nothing quicker is within 2x of it. AWQ "
    )
    assert "more than 99 %" in said


def test_bits_come_from_the_most_and_verdicts_join_them() -> None:
    rows = [row(m, kl, s, bits) for bits in (2, 8, 4) for m, kl, s in (("rtn", 0.5, 1.0), ("gptq", 0.1, 6.0))]
    assert [said.split(" bits")[0] for said in words(rows)] == ["At 8", "At 4", "At 2"]
    assert verdicts(points(rows))[0] == "**RTN**: at 8, 4 and 2 bits quicker than GPTQ, with 5x its KL."


def test_over_seeds_a_difference_must_exceed_two_standard_deviations() -> None:
    """Seeds at 1 ± 0.1 have sd 0.1: 0.81 is 1.9 of them away, 0.79 is 2.1."""
    seeds = [row("qat", kl, 100.0, seed=i) for i, kl in enumerate((0.9, 1.0, 1.1))]
    (point,) = points(seeds)
    assert (point.seeds, point.kl_nats, point.kl_sd) == (3, pytest.approx(1.0), pytest.approx(0.1))
    for reference, shown in ((0.81, False), (0.79, True), (1.19, False), (1.21, True)):
        rows = [row("gptq", reference, 10.0), *seeds]
        assert differ(point, points(rows)[0]) is shown
        (said,) = words(rows)
        assert ("No difference is shown between QAT and GPTQ" in said) is not shown
        assert ("Training made it worse" in said) is (shown and reference < 1)
        assert ("QAT closes 17 % of the KL" in said) is (reference == 1.21)
        assert ("that GPTQ is better than QAT is not shown" in said) is (reference == 0.81)
        assert ("that QAT is better than GPTQ is not shown" in said) is (reference == 1.19)
    both = [*seeds, *(row("qad", kl, 100.0, seed=i) for i, kl in enumerate((0.7, 0.8, 0.9)))]
    assert not differ(*points(both)), "0.2 apart, and 2 sqrt(0.01 + 0.01) is 0.28"
    assert (
        "not told apart from QAT" in verdicts(points(both))[1] or "not told apart from QAD" in verdicts(points(both))[0]
    )


def test_what_float32_cannot_tell_is_not_told_apart() -> None:
    rows = [row("rtn", -3e-9, 1.0, bits=8), row("awq", 5e-8, 9.0, bits=8)]
    (said,) = words(rows)
    assert "No difference is shown between AWQ and RTN (KL below 1e-07 and below 1e-07)." in said
    assert choice(points(rows)).method == "rtn"


def test_a_start_from_the_cache_is_charged() -> None:
    rows = [
        row("gptq", 0.1, 8.0), row("qat", 0.1, 60.0, start_seconds=10.0), row("qad", 0.1, 50.0, start_seconds=0.0),
        row("qad", 0.1, 70.0, bits=3, start_seconds=0.0),
    ]  # fmt: skip
    assert [point.seconds for point in points(rows)] == [8.0, 60.0, 60.0, 70.0]


def test_means_and_tokens() -> None:
    rows = [
        row("rtn", 0.5, 1.0),
        row("qat", 0.1, 60.0, calibration_tokens=100, training_tokens=1000, peak_mib=500.0),
        row("qat", 0.3, 80.0, seed=1, calibration_tokens=100, training_tokens=1200, peak_mib=600.0),
        replace(run("qat", seed=2), seconds=5.0, error="no"),
    ]
    rtn, qat = points(rows)
    assert (rtn.tokens, rtn.kl_sd) == (None, None)
    assert (qat.seeds, qat.seconds, qat.tokens, qat.peak_mib) == (2, 70.0, 1200.0, 600.0)
    assert "| 4 | **QAT** (2 seeds) | 70.0 | 1,200 | 600 | 0.2 ± 0.14 | 1 | 2 | 90.00 % |" in table([rtn, qat])


def test_runs_that_mostly_waited_are_named() -> None:
    rows = [row("rtn", 0.5, 8.0, cpu_seconds=3.9), row("awq", 0.1, 8.0, cpu_seconds=4.1)]
    assert words(rows)[-1].startswith("For more than half of their seconds rtn-4-s0 did not compute")


def test_the_page_has_the_words_the_table_and_the_conditions() -> None:
    rows = [row("rtn", 0.5, 1.0), row("gptq", 0.1, 6.0), replace(run("qad"), error="loss is NaN")]
    text = markdown(rows, {"model": "tiny", "calibration": "1,000 tokens"})
    assert text.startswith("# Quality against cost: tiny\n\n- At 4 bits GPTQ")
    for part in (table(points(rows)), "- calibration: 1,000 tokens\n", "- qad-4-s0: loss is NaN\n", "](recover.png)"):
        assert part in text
    assert "recover.png" not in markdown(rows[2:], {})


# --- the figure -------------------------------------------------------------------------------------------------------


def test_every_point_is_drawn(tmp_path: Path) -> None:
    rows = [row(m, kl * bits, s, bits) for bits in (4, 2) for m, kl, s in (("rtn", 0.5, 1.0), ("qad", 0.1, 60.0))]
    rows += [row("rtn", 0.0, 2.0, bits=8), row("qad", 0.3, 50.0, bits=4, seed=1)]
    found = points(rows)
    axes = recover_figure.make(found, "tiny").axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    drawn = {str(line.get_gid()): [tuple(map(float, pair)) for pair in line.get_xydata()] for line in axes.lines}
    for point in found:
        assert drawn[f"{point.method} {point.bits}"] == [(point.seconds, point.kl)]
        assert axes.get_xlim()[0] < point.seconds < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < point.kl < axes.get_ylim()[1]
        assert (point.seconds, point.kl) in drawn[f"bits {point.bits}"]
    assert drawn["rtn 8"] == [(2.0, NOISE)], "what is below is drawn at the end, not left out"
    assert drawn["ring 4"] == drawn["qad 4"] and drawn["ring 8"] == drawn["rtn 8"]
    assert [len(drawn[f"bits {bits}"]) for bits in (8, 4, 2)] == [1, 2, 2]
    bars = [line for line in axes.lines if len(line.get_xydata()) == 2 and str(line.get_gid()).startswith("sd")]
    assert [tuple(bar.get_ydata()) for bar in bars] == [pytest.approx((0.35 - 0.0707, 0.35 + 0.0707), abs=1e-3)]
    colours = {str(line.get_gid()): (line.get_color(), line.get_marker()) for line in axes.lines}
    assert colours["rtn 4"][0] == colours["rtn 2"][0] != colours["qad 4"][0]
    assert colours["rtn 4"][1] == colours["qad 4"][1] != colours["rtn 2"][1]
    recover_figure.draw(found, "tiny", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.image.imread(tmp_path / "f.png").std() > 0.05


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.9, 1100.0, [1, 10, 100, 1000]), (4.0, 300.0, [5, 10, 20, 50, 100, 200]), (6.0, 14.0, [6, 8, 10])],
)
def test_ticks_are_round_and_enough(low: float, high: float, expected: list[float]) -> None:
    found = recover_figure.ticks(low, high)
    assert set(expected) <= set(found) and 2 <= len(found) <= 9 and all(low <= tick <= high for tick in found)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_real_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert recover.main([str(model), "--bits", "4", "--methods", "rtn,gptq", "--out", str(out), *SMALL]) == 0
    text = evaluation_text.split(model, Recipe(samples=4, length=32))
    rtn, gptq = read(out / "recover.csv")
    original = fidelity.load_original(model)
    for found in (rtn, gptq):
        quantized = fidelity.load_dequantized(out / "checkpoints" / found.name)
        by_hand = fidelity.compare(original, quantized, text.evaluation.sequences)
        assert found.kl_nats == pytest.approx(by_hand.kl_nats, rel=2e-4) and by_hand.kl_nats > 1e-4
        assert found.perplexity_original == pytest.approx(by_hand.perplexity_original, rel=1e-4)
        assert found.perplexity_quantized == pytest.approx(by_hand.perplexity_quantized, rel=1e-4)
        assert (found.positions, found.error, found.scheme) == (by_hand.positions, "", "W4A16 g64 sym")
        record = json.loads((out / "checkpoints" / found.name / "quantize.json").read_text())
        assert found.checkpoint_sha256 == record["checkpoint_sha256"] and found.seconds and found.seconds > 0.5
        assert found.peak_mib and 100 < found.peak_mib < 2000
    assert (rtn.calibration_tokens, gptq.calibration_tokens) == (None, 4 * 32)
    lines = (out / "calibration.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line)["input_ids"]) for line in lines] == list(text.calibration.sequences)
    page = (out / "recover.md").read_text()
    assert "# Quality against cost: tiny" in page and table(points([rtn, gptq])) in page
    assert f"{gptq.positions} tokens of built-in" in page and str(tmp_path) not in page
    assert (out / "recover.png").read_bytes().startswith(b"\x89PNG")
    assert "At 4 bits" in capsys.readouterr().out
