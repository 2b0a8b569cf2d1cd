"""Training as a whole: it learns, a kill changes no bit, two processes are one, NaN stops it, 16 bits are enough."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch

from quantize import corpus, estimate, fidelity, job, qat, timing, train
from quantize.__main__ import main
from quantize.dequantized import open_dequantized
from quantize.errors import RunError, SchemeError
from quantize.job import Result, quantize_model
from quantize.loop import Row, World
from quantize.progress import step_line
from quantize.recipe import Recipe
from quantize.scheme import PER_CHANNEL, Scheme
from quantize.training import Training, default_training
from quantize.weights import open_model

ROOT = Path(__file__).parent.parent
SCHEME = Scheme(2, 32, symmetric=True)
QUICK = Training(start="rtn", steps=12, batch=256, micro=128, rate=1e-2, save=4, evaluate=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with something to learn: each counts on from where it begins."""
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    starts = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [{"input_ids": [(start + i) % 256 for i in range(12 + start % 20)]} for start in starts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def recipe(method: str = "qad", scheme: Scheme = SCHEME, **changes: Any) -> Recipe:
    fields = vars(QUICK) | {"cross_entropy": 1.0 if method == "qat" else 0.0} | changes
    return Recipe(method, scheme, length=32, training=Training(**fields))


def made(model: Path, text: Path, out: Path, chosen: Recipe, **more: Any) -> Result:
    return quantize_model(model, chosen, out=out, cache=out.parent / "cache", corpus=text, **more)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("method", ["qat", "qad"])
@pytest.mark.parametrize("scales", ["learned", "recomputed"])
def test_it_learns_and_what_is_written_is_its_best(
    method: str, scales: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """The held-out loss of the checkpoint, read back and run in float32, is the one that was noted, to the last bit."""
    chosen = recipe(method, scales=scales)
    found = made(model, text, tmp_path / "out", chosen)
    record = json.loads((found.path / "quantize.json").read_text())["training"]
    assert record["heldout"] < 0.97 * record["heldout_at_start"]
    assert record["tokens"] == found.tokens_trained == int(float(rows_of(found.path)[-1]["tokens"])) > 2000
    student, teacher = fidelity.load_dequantized(found.path), fidelity.load_original(model)
    opened = corpus.build(model, text, 32, 0, tmp_path / "corpus")
    assert chosen.training is not None
    assert judged(student, teacher, opened, chosen.training) == record["heldout"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "corpus", "out"]
    assert (found.path / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert open_dequantized(found.path).scheme_of("model.layers.0.mlp.down_proj") == SCHEME


def judged(student: Any, teacher: Any, opened: corpus.Corpus, training: Training) -> float:
    """The held-out loss as the loop takes it, with the loop's own batches."""
    from quantize.loop import _Loop

    loop = object.__new__(_Loop)
    loop.student, loop.teacher, loop.corpus, loop.training = student, teacher, opened, training
    loop.among, loop.least, loop.best = World(), float("-inf"), {}
    return loop.judge()


def test_training_does_not_do_worse_than_its_start(model: Path, text: Path, tmp_path: Path) -> None:
    """A rate that ruins it: what comes out is the start, integer for integer."""
    fine = Scheme(4, 32, symmetric=True)
    ruined = made(model, text, tmp_path / "out", recipe(scheme=fine, rate=1.0, scale_rate=0.0))
    record = json.loads((ruined.path / "quantize.json").read_text())["training"]
    assert record["best_step"] == 0
    start = quantize_model(model, Recipe("rtn", fine), out=tmp_path / "start")
    ours, theirs = open_dequantized(ruined.path), open_dequantized(start.path)
    for name in theirs.modules:
        assert torch.equal(ours.integers(name).q, theirs.integers(name).q)
        assert torch.equal(ours.integers(name).scales, theirs.integers(name).scales)


@pytest.mark.parametrize("start", ["gptq", "awq", "awq+gptq", "none"])
def test_it_starts_where_it_says(start: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Step 0 has the start's own loss, whatever folds it has; the grid of least error without one."""
    found = made(model, text, tmp_path / "out", recipe(start=start, steps=1))
    first = float(rows_of(found.path)[0]["heldout"])
    teacher = fidelity.load_original(model)
    opened = corpus.build(model, text, 32, 0, tmp_path / "corpus")
    if start == "none":
        begun = quantize_model(model, Recipe("rtn", SCHEME, search="mse"), out=tmp_path / "start")
    else:
        chosen = recipe(start=start).start
        assert chosen is not None
        begun = quantize_model(model, chosen, cache=tmp_path / "cache")
        assert begun.cached
    student = fidelity.load_dequantized(begun.path)
    assert first == pytest.approx(judged(student, teacher, opened, recipe().training or QUICK), rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"scales": "recomputed"}, {"precision": "fp16"}, {"top_k": 20}])
def test_a_run_that_is_stopped_ends_in_the_same_bits(
    changes: dict[str, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    chosen = recipe(freeze=0.5, **changes)
    straight = made(model, text, tmp_path / "straight", chosen)

    def stop(row: Row, steps: int) -> None:
        if row.step in (6, 9):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(model, text, tmp_path / "out", chosen, observe=stop)
        assert not (tmp_path / "out").exists()
        stop = after(stop, 6)
    seen: list[int] = []
    resumed = made(model, text, tmp_path / "out", chosen, observe=lambda row, steps: seen.append(row.step))
    assert seen == [9, 10, 11, 12]
    assert resumed.checkpoint_sha256 == straight.checkpoint_sha256
    same = ("step", "tokens", "loss", "kl", "grad_norm", "loss_scale", "skipped", "heldout")
    for a, b in zip(rows_of(resumed.path), rows_of(straight.path), strict=True):
        assert [a[name] for name in same] == [b[name] for name in same]


def after(stop: Any, step: int) -> Any:
    """`stop`, but for `step`."""
    return lambda row, steps: None if row.step == step else stop(row, steps)


def test_a_run_that_is_killed_ends_in_the_same_bits(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, twice, wherever it strikes; every state on disk is whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--method", "qad", "--bits", "2", "--sym", "--group-size", "32", "--length", "32", "--start-from", "rtn"]
    options += ["--steps", "24", "--batch", "256", "--save", "3", "--corpus", str(text), "--device", "cpu"]
    command = [sys.executable, "-m", "quantize", str(model), *options, "--out"]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, cwd=ROOT, capture_output=True)
    for after_state in (3, 9):
        child = subprocess.Popen([*command, str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("step") and int(line.split()[1].split("/")[0]) > after_state:
                break
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30)
        child.stderr.close()
    last = subprocess.run([*command, str(tmp_path / "out")], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "step 1/24" not in last.stderr
    said = [json.loads((tmp_path / name / "quantize.json").read_text()) for name in ("out", "straight")]
    assert said[0]["checkpoint_sha256"] == said[1]["checkpoint_sha256"]


_TWO = """
import sys, torch
from pathlib import Path
from quantize import corpus, fidelity, loop, qat, train
from quantize.scheme import Scheme
from quantize.training import Training
from quantize.weights import open_model
torch.set_num_threads(1)
model, text, folder, out = map(Path, sys.argv[1:5])
losses = {"hidden": 0.1, "cross_entropy": 0.3}
training = Training(steps=6, batch=int(sys.argv[5]), micro=100, rate=1e-3, freeze=0.5, clip=0.5, **losses)
source = open_model(model)
names = [n for n in source.files if "proj.weight" in n]
schemes = {n.removesuffix(".weight"): Scheme(4, 32, True) for n in names}
student, _ = train.make_student(source, None, schemes, training, "cpu")
start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
with loop.world("cpu") as among:
    if among.first:
        folder.mkdir()
        corpus.build(model, text, 32, 0, folder)
    among.wait()
    opened = corpus.build(model, text, 32, 0, folder)
    teacher = fidelity.load_original(model)
    rows = loop.train(student, teacher, opened, training, folder, "key", among=among)
    if among.first:
        state = torch.load(folder / loop.STATE, weights_only=True)
        torch.save({"start": start, "student": state["student"], "losses": [r.loss for r in rows],
                    "norms": [r.grad_norm for r in rows], "heldout": [r.heldout for r in rows],
                    "size": among.size}, out)
"""


@pytest.mark.parametrize("batch", ["300", "2"])
def test_two_processes_are_one(batch: str, model: Path, text: Path, tmp_path: Path) -> None:
    """torchrun with gloo: the same weights and losses as one process on the same batches, to 1e-5; documents are
    shared out unevenly (of a batch of one, one process has none), gradients added up over micro-batches, clipped, and
    the scales frozen on the way."""
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    where = [str(model), str(text)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [
            sys.executable,
            *launcher,
            str(script),
            *where,
            str(tmp_path / name),
            str(tmp_path / f"{name}.pt"),
            batch,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert (one["size"], two["size"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["norms"] == pytest.approx(two["norms"], rel=1e-4)
    for name, tensor in one["student"].items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, two["student"][name], atol=1e-5), name
        if name.endswith("weight.original"):
            assert not torch.allclose(tensor, one["start"][name], atol=1e-4), f"{name} has learned nothing"


def test_torchrun_makes_one_checkpoint(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line under torchrun: the start made once, one line of JSON, no other process writes anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--method", "qad", "--bits", "4", "--sym", "--group-size", "32", "--length", "32", "--batch", "300"]
    options += ["--start-from", "gptq", "--steps", "4", "--corpus", str(text), "--out", str(tmp_path / "out")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, "-m", "quantize", str(model), *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said["tokens_trained"] == int(rows_of(tmp_path / "out")[-1]["tokens"])
    assert done.stderr.count("block 1/2") == 1 and done.stderr.count("step 4/4") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}


def test_how_a_batch_is_cut_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    """Micro-batches of 32 and of 10,000 tokens: gradients are sums, so only the order of addition differs."""
    found = [
        made(model, text, tmp_path / str(micro), recipe(start="none", steps=3, micro=micro)) for micro in (32, 10_000)
    ]
    losses = [[float(row["loss"]) for row in rows_of(result.path)] for result in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_activations_computed_again_change_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    found = [made(model, text, tmp_path / str(again), recipe(steps=3, checkpointing=again)) for again in (False, True)]
    assert found[0].checkpoint_sha256 == found[1].checkpoint_sha256


def test_the_teacher_on_disk_teaches_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    """With all of the vocabulary kept; two epochs, so that what was kept is used again."""
    live = made(model, text, tmp_path / "live", recipe(steps=12))
    kept = made(model, text, tmp_path / "kept", recipe(steps=12, top_k=257))
    losses = [[float(row["loss"]) for row in rows_of(result.path)] for result in (live, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_nan_stops_it_with_the_last_state_kept(model: Path, text: Path, tmp_path: Path) -> None:
    """A weight turns to NaN after step 6; the state after step 4 is on disk, and the next run goes on from it."""
    chosen = recipe(steps=8)
    poisoned: list[Any] = []
    real = train.train

    def grab(student: Any, *rest: Any, **more: Any) -> Any:
        poisoned.append(student)
        return real(student, *rest, **more)

    def poison(row: Row, steps: int) -> None:
        if row.step == 6:
            norm = poisoned[-1].model.layers[0].input_layernorm
            with torch.no_grad():
                norm.parametrizations.weight.original[0] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", grab)
        with pytest.raises(RunError, match="step 7: a loss of nan.*the state after step 4 is kept"):
            made(model, text, tmp_path / "out", chosen, observe=poison)
    seen: list[int] = []
    made(model, text, tmp_path / "out", chosen, observe=lambda row, steps: seen.append(row.step))
    assert seen == [5, 6, 7, 8]


# Mixed precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_reach_the_loss_of_32(precision: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Same tokens, same order: the last loss and the held-out one within 1 %."""
    chosen = {p: recipe("qat", Scheme(4, 32, True), steps=30, precision=p) for p in ("fp32", precision)}
    found = {p: rows_of(made(model, text, tmp_path / p, one).path) for p, one in chosen.items()}
    full, half = found["fp32"], found[precision]
    assert float(full[-1]["loss"]) < 0.85 * float(full[1]["loss"])
    assert float(half[-1]["loss"]) == pytest.approx(float(full[-1]["loss"]), rel=0.01)
    assert float(half[-1]["heldout"]) == pytest.approx(float(full[-1]["heldout"]), rel=0.01)
    assert [row["loss"] for row in full] != [row["loss"] for row in half]


def test_tiny_gradients_vanish_in_fp16_unless_the_loss_is_scaled(model: Path, text: Path, tmp_path: Path) -> None:
    """A hundred-thousandth of the loss: float16 ends at 6e-8, so unscaled its gradients are exact zeros."""
    tiny = {"cross_entropy": 1e-5, "precision": "fp16", "start": "none"}
    runs = {
        name: rows_of(made(model, text, tmp_path / name, with_text_alone(recipe("qat", **tiny, **more))).path)
        for name, more in (("scaled", {}), ("unscaled", {"loss_scale": "none"}))
    }
    first, last = ({name: float(rows[i]["cross_entropy"]) for name, rows in runs.items()} for i in (1, -1))
    assert last["scaled"] < 0.95 * first["scaled"]
    assert all(float(row["grad_norm"]) == 0 for row in runs["unscaled"])
    assert float(runs["scaled"][1]["grad_norm"]) > 0


def with_text_alone(chosen: Recipe) -> Recipe:
    """A hidden weight of nothing and no teacher, though the text has less than all of the loss."""
    assert chosen.training is not None

    class Untaught(Training):
        taught = False  # type: ignore[assignment]

    return Recipe(chosen.method, chosen.scheme, length=32, training=Untaught(**vars(chosen.training)))


def test_steps_that_overflow_are_left_out_counted_and_shown(model: Path, text: Path, tmp_path: Path) -> None:
    """The scale begins at 65,536; a loss of a thousand nats is too much for it, so it halves until it fits."""
    chosen = recipe("qat", precision="fp16", hidden=1e4, start="rtn", steps=16)
    rows = rows_of(made(model, text, tmp_path / "out", chosen).path)
    scales = [float(row["loss_scale"]) for row in rows]
    skipped = [int(float(row["skipped"])) for row in rows]
    assert scales[0] == 65536 > scales[-1] and skipped[-1] > 0
    for i in range(1, len(rows) - 1):  # a step that is left out is counted, and halves the scale of the next
        left_out = skipped[i] - skipped[i - 1]
        assert left_out in (0, 1) and scales[i + 1] == scales[i] / 2**left_out


# Requests


def test_the_rate_rises_and_falls() -> None:
    training = Training(steps=100, warmup=0.1)
    rates = [training.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and max(rates) == 1
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[55] == pytest.approx(0.55, abs=0.01)
    assert 0.1 <= rates[-1] < 0.11


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "gptq", "--steps", "10"],
        ["--method", "qad", "--steps", "0"],
        ["--method", "qad", "--warmup", "2"],
        ["--method", "qad", "--train-precision", "fp8"],
        ["--method", "qad", "--scales", "guessed"],
        ["--method", "qad", "--start-from", "qat"],
        ["--method", "qad", "--top-k", "8", "--hidden", "1"],
        ["--method", "qat", "--corpus", "/nowhere.jsonl"],
        ["--method", "awq", "--corpus", "/nowhere.jsonl"],
        ["--method", "qad", "--keep", "lm_head=4bit"],
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    options: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), *options, "--group-size", "32", "--length", "32", "--cache", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Allowed: " in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dry_run_counts_the_steps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6 operations a weight and token for the student, 2 for the teacher, 2 for activations made again."""
    source = open_model(model)
    shapes = [source.shape(name) for name in source.files if "proj.weight" in name or "embed" in name]
    weights = sum(math.prod(shape) for shape in shapes)  # the tied head is the embedding's matrix

    def rated(training: Training) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, "matmul_rate", lambda device: 1e9)
            return estimate.training_seconds(source, training, "cpu") * 1e9 / training.steps / training.batch

    assert rated(Training(cross_entropy=1.0)) == pytest.approx(6 * weights)
    assert rated(Training(checkpointing=True)) == pytest.approx(10 * weights)
    command = [
        str(model),
        "--method",
        "qad",
        "--group-size",
        "32",
        "--length",
        "32",
        "--start-from",
        "rtn",
        "--dry-run",
    ]
    assert main(command) == 0
    assert "for qad" in (said := capsys.readouterr().out) and "training" in said


def test_progress_says_loss_scale_pace_and_time_left() -> None:
    row = Row(30, 122_000, 0.0921, 0.1, 0.09, 0.0, 1e-3, 0.5, 1.0, 0, 0.0934, 4812.0, 60.0)
    assert step_line(row, 150) == "step 30/150  loss 0.0921, held out 0.0934  rate 1.0e-03  4,812 tok/s, 240 s left"
    scaled = replace(row, loss_scale=32768.0, skipped=2, heldout=None)
    assert "loss 0.0921  rate 1.0e-03  scale 32768, 2 left out  4,812 tok/s" in step_line(scaled, 150)


def test_qat_has_the_text_and_qad_the_teacher() -> None:
    assert default_training("qat").cross_entropy == 1 and not default_training("qat").taught
    assert default_training("qad").cross_entropy == 0 and default_training("qad").taught
    assert default_training("qat", cross_entropy=0.5, steps=None).taught
    with pytest.raises(SchemeError):
        Recipe("rtn", SCHEME, training=Training())


def test_without_a_corpus_the_teacher_writes_it(model: Path, tmp_path: Path) -> None:
    chosen = recipe("qad", Scheme(4, 32, True), steps=2, corpus_tokens=600)
    found = quantize_model(model, chosen, out=tmp_path / "out", cache=tmp_path / "cache")
    record = json.loads((found.path / "quantize.json").read_text())["training"]
    assert record["corpus"].startswith("selfwritten") and record["tokens"] > 0


def test_w8a8_is_trained_as_it_is_served(model: Path, text: Path, tmp_path: Path) -> None:
    scheme = Scheme(8, PER_CHANNEL, True, 8)
    found = made(model, text, tmp_path / "out", recipe("qad", scheme, start="none", steps=4))
    assert found.format == "compressed-tensors"
    record = json.loads((found.path / "quantize.json").read_text())["training"]
    student, teacher = fidelity.load_dequantized(found.path), fidelity.load_original(model)
    for name, module in student.named_modules():
        if name in open_dequantized(found.path).modules:
            qat.fake_quantize_inputs(module, 8)
    opened = corpus.build(model, text, 32, 0, tmp_path / "corpus")
    assert judged(student, teacher, opened, QUICK) == record["heldout"] <= record["heldout_at_start"]


def test_a_finished_training_is_not_done_again(model: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = made(model, text, tmp_path / "out", recipe(steps=2))
    monkeypatch.setattr(job, "_train", None)
    again = made(model, text, tmp_path / "out", recipe(steps=2))
    assert again.cached and again.checkpoint_sha256 == first.checkpoint_sha256
    assert again.tokens_trained == first.tokens_trained
