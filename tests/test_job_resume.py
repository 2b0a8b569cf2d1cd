"""A quantization that is stopped goes on from its last finished block, and ends in the same bytes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_model

from quantize import checkpoint, job, shards
from quantize.errors import OutputError, RunError
from quantize.job import BlockDone, quantize_model
from quantize.methods import METHODS
from quantize.recipe import Recipe, default_scheme
from quantize.shards import Source
from quantize.store import Store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=4)


def recipe(method: str) -> Recipe:
    return Recipe(method, default_scheme(method, group_size=-1 if "smooth" in method else 64), samples=4, length=32)


def stopped_after(blocks: int, model: Path, chosen: Recipe, out: Path, **options: int) -> None:
    """Ctrl-C once `blocks` are done."""

    def stop(block: BlockDone) -> None:
        if block.done == blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, chosen, out=out, progress=stop, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2**30, 0])
def test_it_goes_on_where_it_stopped(method: str, budget: int, model: Path, tmp_path: Path) -> None:
    straight = quantize_model(model, recipe(method), out=tmp_path / "straight")
    stopped_after(1, model, recipe(method), tmp_path / "out", budget=budget)
    stopped_after(3, model, recipe(method), tmp_path / "out", budget=budget)
    assert not (tmp_path / "out").exists()
    seen: list[BlockDone] = []
    resumed = quantize_model(model, recipe(method), out=tmp_path / "out", progress=seen.append, budget=budget)
    assert [(block.done, block.begun) for block in seen] == [(4, 3)]
    assert resumed.checkpoint_sha256 == straight.checkpoint_sha256
    records = [json.loads((tmp_path / name / "quantize.json").read_text()) for name in ("out", "straight")]
    assert records[0]["layers"] == records[1]["layers"] and len(records[0]["layers"]) == 28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_process_that_is_killed_loses_no_finished_block(model: Path, tmp_path: Path) -> None:
    options = [
        "--method",
        "gptq",
        "--group-size",
        "64",
        "--samples",
        "4",
        "--length",
        "32",
        "--out",
        str(tmp_path / "o"),
    ]
    command = [sys.executable, "-m", "quantize", str(model), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("block 1/4")
        os.kill(process.pid, signal.SIGSTOP)  # it may have got further meanwhile, but it will not finish
        time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    if (tmp_path / "o").exists():
        pytest.skip("it was faster than the signal")
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not again.stderr.startswith("block 1/4")
    expected = quantize_model(model, recipe("gptq"), out=tmp_path / "straight").checkpoint_sha256
    assert json.loads(again.stdout)["checkpoint_sha256"] == expected


@pytest.mark.parametrize("left", [-30, 0])
@pytest.mark.parametrize("damage", ["note", "shard", "hidden"])
def test_a_draft_that_does_not_hold_is_begun_anew(damage: str, left: int, model: Path, tmp_path: Path) -> None:
    stopped_after(2, model, recipe("gptq"), tmp_path / "out")
    draft = tmp_path / ".out.unfinished"
    victim = {
        "note": draft / ".progress.json",
        "shard": draft / "model-00002.safetensors",
        "hidden": next((draft / ".hidden-2").iterdir()),
    }[damage]
    victim.write_bytes(victim.read_bytes()[:left])
    seen: list[BlockDone] = []
    made = quantize_model(model, recipe("gptq"), out=tmp_path / "out", progress=seen.append)
    assert [block.done for block in seen] == [1, 2, 3, 4]
    assert made.checkpoint_sha256 == quantize_model(model, recipe("gptq"), out=tmp_path / "b").checkpoint_sha256


def test_another_recipe_does_not_go_on_from_it(model: Path, tmp_path: Path) -> None:
    stopped_after(2, model, recipe("gptq"), tmp_path / "out")
    seen: list[BlockDone] = []
    quantize_model(model, recipe("awq"), out=tmp_path / "out", progress=seen.append)
    assert [block.done for block in seen] == [1, 2, 3, 4]


def test_two_runs_do_not_share_a_draft(model: Path, tmp_path: Path) -> None:
    with checkpoint.drafted(tmp_path / "out", "key", {}), pytest.raises(OutputError, match="another run"):
        quantize_model(model, recipe("rtn"), out=tmp_path / "out")


def test_a_full_disk_keeps_what_is_finished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shards.write
    calls = itertools.count(1)

    def full(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(RunError, match="No space left.*2 finished blocks are kept"):
        quantize_model(model, recipe("gptq"), out=tmp_path / "out")
    monkeypatch.setattr(shards, "write", real)
    seen: list[BlockDone] = []
    quantize_model(model, recipe("gptq"), out=tmp_path / "out", progress=seen.append)
    assert [block.done for block in seen] == [3, 4]


def test_what_is_kept_in_memory_is_bounded_by_the_budget(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    class Watched(Store):
        def put(self, name: str, tensor: object) -> None:
            nonlocal most
            super().put(name, tensor)  # type: ignore[arg-type]
            most = max(most, sum(held.nbytes for held in self._held.values()))

    monkeypatch.setattr(job, "Store", Watched)
    quantize_model(model, recipe("awq+gptq"), out=tmp_path / "out", budget=200_000)
    assert 0 < most <= 200_000
