"""Models larger than memory: shards in and out, runs that are killed anywhere, one block's memory, several devices."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantize import checkpoint, job, shards, walk
from quantize.__main__ import main
from quantize.devices import in_order, parse
from quantize.errors import InputError, OutputError, RunError
from quantize.fidelity import load_dequantized
from quantize.job import BlockDone, Result, quantize_model
from quantize.recipe import Recipe, default_scheme

LIMIT = 40_000
"""Bytes of a shard: a block of the tiny model has 80,000 in 4 bits, and its largest tensor 66,000."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, with an index."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save(path, num_hidden_layers=4)
    whole = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    whole.save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def recipe(method: str, **options: Any) -> Recipe:
    return Recipe(method, default_scheme(method, group_size=64), samples=4, length=32, **options)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty sequences of token ids, of several lengths: three batches, of which a recipe takes what it wants."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    ids = torch.randint(0, 256, (80, 32), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("".join(json.dumps({"input_ids": row[: 32 - i % 5]}) + "\n" for i, row in enumerate(ids)))
    return file


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def apart(body: Callable[[], object]) -> int:
    """Run `body` in a process of its own, a copy of this one; how it ended, as os.waitstatus_to_exitcode says it."""
    child = os.fork()
    if not child:
        try:
            body()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- shards in and out ------------------------------------------------------------------------------------------------


def test_a_model_in_shards_becomes_a_checkpoint_in_small_shards(model: Path, tokens: Path, tmp_path: Path) -> None:
    """No file but that of one large tensor holds more than the limit, the index says where all is, and it is all there:
    the tensors of the checkpoint in large shards."""
    small = quantize_model(model, recipe("gptq"), out=tmp_path / "small", shard_bytes=LIMIT, calibration=tokens).path
    large = quantize_model(model, recipe("gptq"), out=tmp_path / "large", calibration=tokens).path
    assert len(list(large.glob("*.safetensors"))) == 5, "a block each, and the rest"
    files = sorted(small.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    parts = {file.name: load_file(file) for file in files}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in parts.items()}
    assert [len(parts[name]) for name, size in sizes.items() if size > LIMIT] == [1], "the embedding, by itself"
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in parts.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    expected = {name: tensor for file in large.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_shards_by_their_index(model: Path, tokens: Path, tmp_path: Path) -> None:
    """transformers and compressed-tensors load what was split, and multiply by the weights that were chosen.

    Symmetric, for transformers 5.23 begins zero points as if they were not packed, and refuses those that are.
    """
    chosen = recipe("gptq", format="compressed-tensors")
    out = quantize_model(model, chosen, out=tmp_path / "out", shard_bytes=LIMIT, calibration=tokens).path
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = load_dequantized(out)(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_another_size_of_shards_is_another_checkpoint(model: Path, tmp_path: Path) -> None:
    quantize_model(model, recipe("rtn"), out=tmp_path / "out", shard_bytes=LIMIT)
    assert quantize_model(model, recipe("rtn"), out=tmp_path / "out", shard_bytes=LIMIT).cached
    with pytest.raises(OutputError, match="is not this checkpoint"):
        quantize_model(model, recipe("rtn"), out=tmp_path / "out")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_no_such_size_of_shards(size: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "rtn", "--group-size", "64", "--out", str(tmp_path / "o"), f"--shard-gb={size}"]
    assert main([str(model), *options]) == 2
    assert "--shard-gb" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- killed -----------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(path: Path, tensors: Any, metadata: Any) -> None:
    path.write_bytes(b"\x40" + bytes(100))
    die()


Change = Callable[[pytest.MonkeyPatch], object]
EARLY: dict[str, Change] = {
    "in the middle of a shard": lambda patch: patch.setattr(shards, "write", half_written),
    "in the middle of a block": lambda patch: patch.setattr(job, "pack_block", lambda *_: die()),
    "hidden states there, no note": lambda patch: patch.setattr(checkpoint.Draft, "_write_note", lambda *_: die()),
}
LATE: dict[str, Change] = {
    "before the index": lambda patch: patch.setattr(checkpoint, "write_json", lambda *_: die()),
    "before the hash": lambda patch: patch.setattr(checkpoint, "content_hash", lambda *_: die()),
    "before it has its place": lambda patch: patch.setattr(checkpoint, "_publish", lambda *_: die()),
    "in its place, not tidied": lambda patch: patch.setattr(checkpoint, "_tidy", lambda *_: die()),
}


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_killed_anywhere_it_ends_in_the_same_bytes(
    method: str, model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, killed with SIGKILL after each of the first three blocks, in the block after it, and at its end."""
    out = tmp_path / "out"
    straight = quantize_model(model, recipe(method), out=tmp_path / "straight", shard_bytes=LIMIT, calibration=tokens)

    def run(until: int = 0) -> Result:
        def stop(block: BlockDone) -> None:
            if block.done == until:
                die()

        return quantize_model(
            model, recipe(method), out=out, shard_bytes=LIMIT, calibration=tokens, progress=stop
        )  # fmt: skip

    for number, (place, change) in enumerate([*EARLY.items(), *LATE.items()], start=1):
        if place in EARLY:
            assert apart(lambda number=number: run(number)) == -signal.SIGKILL  # type: ignore[misc]
        with monkeypatch.context() as patch:
            change(patch)
            assert apart(run) == -signal.SIGKILL, place
        if place in EARLY:
            assert json.loads((tmp_path / ".out.unfinished" / ".progress.json").read_text())["done"] == number, place
        assert out.exists() == (place == "in its place, not tidied")
    assert run().cached
    assert contents(out) == contents(straight.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def test_a_disk_that_is_full_at_the_end_loses_no_block(model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk. The embedding's shard is the largest file, so that all
    blocks are written, and it is not."""
    common: dict[str, Any] = {"out": tmp_path / "out", "shard_bytes": LIMIT}

    def starved() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(RunError, match="File too large.*room for the checkpoint.*4 finished blocks are kept"):
            quantize_model(model, recipe("rtn"), **common)

    assert apart(starved) == 0
    assert not (tmp_path / "out").exists()
    seen: list[BlockDone] = []
    made = quantize_model(model, recipe("rtn"), progress=seen.append, **common)
    straight = quantize_model(model, recipe("rtn"), **common | {"out": tmp_path / "straight"})
    assert not seen and contents(made.path) == contents(straight.path)


# --- one block's memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_memory_grows_with_the_block_and_not_with_their_number(method: str, tmp_path: Path) -> None:
    """A block is 10.5 MiB in float32, so twelve blocks more would be 126 MiB if they were held, 63 as they are stored,
    and 17 in 4 bits. Each run is a new interpreter: a copy of this one would begin with whatever the tests before had
    allocated and freed."""
    torch.manual_seed(0)
    ids = [{"input_ids": torch.randint(0, 256, (64,)).tolist()} for _ in range(8)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ids))
    grown = {}
    for blocks in (4, 16):
        config = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1280, "max_position_embeddings": 64}
        tiny_model.save(tmp_path / str(blocks), num_hidden_layers=blocks, **config)
        command = [sys.executable, "-c", PEAK_OF_A_RUN, method, str(blocks)]
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | STEADY, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        before, peak = map(int, ended.stdout.split())
        grown[blocks] = (peak - before) * 1024
    assert grown[4] > 2**24, "a block and its copy, at least"
    assert abs(grown[16] - grown[4]) < 10 * 2**20, grown


PEAK_OF_A_RUN = """
import sys
from pathlib import Path
from quantize.job import quantize_model
from quantize.recipe import Recipe, default_scheme
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field))
method, model = sys.argv[1:]
recipe = Recipe(method, default_scheme(method), samples=8, length=64)
before = kib("VmRSS")
quantize_model(Path(model), recipe, out=Path(f"out-{model}"), calibration=Path("tokens.jsonl"))
print(before, kib("VmHWM"))
"""
"""Resident memory before it, and the most of it, in KiB."""

ROOT = Path(__file__).resolve().parents[1]
STEADY = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""How much two threads hold at once is a matter of their turns, and how many freed tensors malloc keeps for later of
chance: above this threshold it gives each back at once."""

# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq", "smoothquant"])
def test_two_devices_give_what_one_does(
    method: str, model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two CPUs stand in for two GPUs: the same code with a thread for each. RTN of four blocks takes two at a time."""
    scheme = default_scheme(method, group_size=None if method == "smoothquant" else 64)
    chosen = Recipe(method, scheme, samples=80, length=32)
    workers = set()
    real = {name: getattr(walk, name) for name in ("_call", "_materialise")}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            workers.add((name, threading.get_ident()))
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(walk, name, watched(name))
    one = quantize_model(model, chosen, out=tmp_path / "one", calibration=tokens, device="cpu").path
    alone = set(workers)
    two = quantize_model(model, chosen, out=tmp_path / "two", calibration=tokens, device="cpu,cpu").path
    assert {thread for _, thread in alone} == {threading.get_ident()}
    shared = "_materialise" if method == "rtn" else "_call"
    assert len({thread for name, thread in workers - alone if name == shared}) >= 2
    assert contents(two) == contents(one)


def test_a_stopped_run_goes_on_with_more_devices(model: Path, tokens: Path, tmp_path: Path) -> None:
    def stop(block: BlockDone) -> None:
        if block.done == 1:
            raise KeyboardInterrupt

    for method in ("rtn", "gptq"):
        chosen = replace(recipe(method), samples=80)
        straight = quantize_model(model, chosen, out=tmp_path / method, calibration=tokens)
        out = tmp_path / f"{method}-stopped"
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, chosen, out=out, calibration=tokens, device="cpu,cpu", progress=stop)
        seen: list[BlockDone] = []
        devices = "cpu,cpu,cpu"
        quantize_model(model, chosen, out=out, calibration=tokens, device=devices, progress=seen.append)
        assert [block.done for block in seen] == [2, 3, 4] and contents(out) == contents(straight.path)


def test_results_come_in_order_and_no_side_runs_ahead() -> None:
    """Side i % 3 does item i; when the first result is taken, three have been begun at most."""
    begun: list[tuple[int, int]] = []

    def work(side: int, i: int) -> int:
        begun.append((side, i))
        return i * i

    found = in_order(work, 7, 3)
    assert next(found) == 0 and len(begun) <= 3
    assert list(found) == [1, 4, 9, 16, 25, 36]
    assert sorted(begun) == [(0, 0), (0, 3), (0, 6), (1, 1), (1, 4), (2, 2), (2, 5)]


def test_a_side_that_fails_is_heard() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda side, i: 1 // (3 - i), 6, 2))


@pytest.mark.parametrize("text", ["gpu", "cpu,", "cpu,meta", "cuda:77"])
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="device"):
        parse(text)
