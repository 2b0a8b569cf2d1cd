"""safetensors files of our own reading and writing, against the library's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantize import shards
from quantize.errors import ModelError
from quantize.shapes import read_header
from quantize.shards import Elsewhere, read, rows, split, write

NOTES = {"format": "pt", "tool": "kneebench"}


def tensors() -> dict[str, torch.Tensor]:
    """One of each type, and the odd ones: of no dimension, of no element, not contiguous."""
    torch.manual_seed(0)
    found = {f"t.{word}": torch.randint(0, 2, (3, 5)).to(dtype) for word, dtype in shards._DTYPES.items()}
    return found | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "turned": torch.randn(6, 4).T,
    }


def plain(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


def test_the_library_reads_what_is_written_and_lays_it_the_same_way(tmp_path: Path) -> None:
    write(tmp_path / "ours", tensors(), NOTES)
    save_file(plain(tensors()), tmp_path / "theirs", metadata=NOTES)
    assert same(load_file(tmp_path / "ours"), plain(tensors()))
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == NOTES
    assert {n: t.bytes for n, t in read_header(tmp_path / "ours").items()} == {
        n: t.nbytes for n, t in tensors().items()
    }
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    length = int.from_bytes(ours[:8], "little")
    assert length % 8 == 0 and ours[8 + length :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    headers = [json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) for raw in (ours, theirs)]
    assert headers[0] == headers[1]


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", tensors(), NOTES)
    write(tmp_path / "b", dict(reversed(tensors().items())), dict(reversed(NOTES.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    save_file(plain(tensors()), tmp_path / "theirs")
    assert same(read(tmp_path / "theirs", tensors()), plain(tensors()))


def test_no_page_of_the_file_is_the_process_s(tmp_path: Path) -> None:
    save_file({"x": torch.arange(50_000)}, tmp_path / "shard")
    found = read(tmp_path / "shard", ["x"])["x"], rows(tmp_path / "shard", "x", torch.tensor([3, 4, 9]))
    assert str(tmp_path / "shard") not in Path("/proc/self/maps").read_text()
    (tmp_path / "shard").write_bytes(b"")
    assert torch.equal(found[0], torch.arange(50_000)) and found[1].tolist() == [3, 4, 9]


@pytest.mark.parametrize("ids", [[], [0], [4, 5, 6], [6, 5, 5, 0], [9, 0, 1, 2, 8, 9]])
def test_rows_are_those_asked_for(ids: list[int], tmp_path: Path) -> None:
    x = torch.randn(10, 3).to(torch.bfloat16)
    save_file({"before": torch.randn(5), "x": x}, tmp_path / "shard")
    found = rows(tmp_path / "shard", "x", torch.tensor(ids, dtype=torch.int64))
    assert found.dtype == x.dtype and torch.equal(found, x[ids])


def test_a_tensor_of_another_file_is_copied_a_stretch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_STRETCH", 7)  # of 80 bytes
    x = torch.arange(10)
    save_file({"a": torch.randn(3), "x": x}, tmp_path / "from")
    write(
        tmp_path / "to",
        {"y": torch.ones(2), "x": Elsewhere(tmp_path / "from", read_header(tmp_path / "from")["x"])},
        {},
    )
    assert same(load_file(tmp_path / "to"), {"y": torch.ones(2), "x": x})


def test_shards_are_filled_in_order_up_to_the_limit() -> None:
    """Of 4, 4, 8, 20 and 4 bytes with a limit of 8: 4 + 4, then 8, then 20 by itself, then 4."""
    sizes = {"a": 4, "b": 4, "c": 8, "d": 20, "e": 4}
    parts = split({name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}, 8)
    assert [list(part) for part in parts] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(split({}, 8)) == []


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.arange(100)}, tmp_path / "shard")
    place = Elsewhere(tmp_path / "shard", read_header(tmp_path / "shard")["x"])
    (tmp_path / "shard").write_bytes((tmp_path / "shard").read_bytes()[:-1])
    for attempt in (
        lambda: read(tmp_path / "shard", ["x"]),
        lambda: rows(tmp_path / "shard", "x", torch.tensor([1])),
        lambda: write(tmp_path / "to", {"x": place}, {}),
    ):
        with pytest.raises(ModelError, match="whole safetensors file"):
            attempt()
