"""The quantizer benchmark judges what it says it judges: dense weights, tokens kept apart, one set of conditions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from quantize.fidelity import Fidelity

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DEMO = BENCHMARKS.parent / "scenarios" / "demo-model"
sys.path.insert(0, str(BENCHMARKS))
import quantizers  # noqa: E402
from peers import common, judge, table, tokens  # noqa: E402
from peers.records import Run  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dense_weights_of_a_compressed_tensors_checkpoint(bits: int, symmetric: bool) -> None:
    rows, columns, size, half = 48, 256, 64, 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-half, half, (rows, columns // size), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, columns // size, generator=generator).bfloat16()
    stored = {
        "a.weight_packed": pack_to_int32(q, bits),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([rows, columns]),
        "norm.weight": torch.ones(3).bfloat16(),
    }
    if not symmetric:
        stored["a.weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    dense = common.from_compressed(stored, bits)
    shift = torch.zeros_like(zeros) if symmetric else zeros
    expected = (q.double() - shift.double().repeat_interleave(size, 1)) * scales.double().repeat_interleave(size, 1)
    assert dense.keys() == {"a.weight", "norm.weight"}
    assert torch.equal(dense["a.weight"].double(), expected)
    assert dense["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dense_weights_of_a_gptq_checkpoint(bits: int) -> None:
    """Packed here bit by bit in Python integers: a column of qweight is one stream, a row of qzeros is one."""
    rows, columns, size = 32, 128, 64
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 2**bits, (rows, columns // size), generator=generator)
    scales = torch.rand(rows, columns // size, generator=generator).half()
    stored = {
        "a.qweight": torch.tensor([_words(row, bits) for row in q.tolist()], dtype=torch.int32).T,
        "a.qzeros": torch.tensor([_words([z - 1 for z in row], bits) for row in zeros.T.tolist()], dtype=torch.int32),
        "a.scales": scales.T,
        "a.g_idx": torch.arange(columns) // size,
    }
    expected = (q - zeros.repeat_interleave(size, 1)).double() * scales.double().repeat_interleave(size, 1)
    assert torch.equal(common.from_gptq(stored, bits)["a.weight"].double(), expected)


def _words(fields: list[int], bits: int) -> list[int]:
    stream = sum(field << (bits * at) for at, field in enumerate(fields))
    words = [(stream >> at) & 0xFFFFFFFF for at in range(0, bits * len(fields), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def test_what_judges_has_not_calibrated(tmp_path: Path) -> None:
    text = tokens.demo_text(tmp_path / "text.jsonl", 14 * 64, seed=5)
    text.write_text(2 * text.read_text())  # each document twice
    made = tokens.make(DEMO, text, samples=10, length=64, windows=4, seed=0)
    assert {len(ids) for ids in made.calibration} == {len(ids) for ids in made.parts["windows"]} == {64}
    assert len(made.calibration) == 10 and len(made.parts["windows"]) == 4 and len(made.parts["conversations"]) == 300
    start = 1  # <|im_start|> opens each conversation's two turns; a whole one lies between every second
    calibrated, judged = (_documents(part, start) for part in (made.calibration, made.parts["windows"]))
    assert len(calibrated) > 5 and len(judged) > 2
    assert not calibrated & judged
    assert tokens.make(DEMO, text, samples=10, length=64, windows=4, seed=0).sha256() == made.sha256()
    assert tokens.make(DEMO, text, samples=10, length=64, windows=4, seed=1).sha256() != made.sha256()


def _documents(windows: tuple[tuple[int, ...], ...], start: int) -> set[tuple[int, ...]]:
    flat = [i for ids in windows for i in ids]
    turns = [at for at, i in enumerate(flat) if i == start]
    return {tuple(flat[a:b]) for a, b in zip(turns[::2], turns[2::2], strict=False)}


def test_text_that_ends_too_early(tmp_path: Path) -> None:
    text = tokens.demo_text(tmp_path / "text.jsonl", 640, seed=5)
    with pytest.raises(SystemExit, match="too early: give more with --text"):
        tokens.make(DEMO, text, samples=1000, length=64, windows=4, seed=0)


def test_parts_are_pooled_by_position() -> None:
    one = Fidelity(100, 0.1, math.e, math.e**2, 0.9, ())
    two = Fidelity(300, 0.5, math.e, math.e**4, 0.5, ())
    verdict = judge.pooled({"a": one, "b": two}, {"a": 50, "b": 100})
    assert verdict["kl"] == pytest.approx((100 * 0.1 + 300 * 0.5) / 400)
    assert verdict["top1"] == pytest.approx((100 * 0.9 + 300 * 0.5) / 400)
    assert math.log(verdict["perplexity"]) == pytest.approx((50 * 2 + 200 * 4) / 250)
    assert verdict["perplexity_original"] == pytest.approx(math.e)


def test_plan_takes_turns_and_finishes_a_repeat_before_the_next() -> None:
    planned = quantizers.plan([4, 3], 2, r"gptq 4 sym", [quantizers.OURS, "llmcompressor"])
    names = [(repeat, bits, recipe.name()) for repeat, bits, recipe in planned]
    assert names[: len(names) // 2] == [
        (1, 4, "kneebench gptq"),
        (1, 4, "llmcompressor gptq"),
        (1, 4, "kneebench awq+gptq"),
    ]
    assert [(1, b, n) for _, b, n in names[3:]] == names[:3]


def test_results_of_other_conditions_are_not_added_to(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    run = Run("kneebench rtn", "kneebench", "rtn", 4, True, 1, seconds=1.5)
    file.write_text(json.dumps({"conditions": {"threads": 1}, "runs": [quantizers.asdict(run)]}))
    assert quantizers.read(file, {"threads": 1}) == [run]
    with pytest.raises(SystemExit, match="another threads"):
        quantizers.read(file, {"threads": 2})


CONDITIONS: dict[str, Any] = {
    "cpu": "CPU", "cores": 2, "threads": 1, "model": "m", "samples": 8, "length": 64, "group_size": 128, "seed": 0,
    "dtype": "auto", "judged": {"windows": 10},
}  # fmt: skip


def test_table_shows_repeats_and_reasons() -> None:
    good: dict[str, Any] = {"kl_parts": {"windows": 0.5}, "top1": 0.75, "perplexity": 2.0, "before_mib": 100.0}
    runs = [
        Run("kneebench rtn", "kneebench", "rtn", 4, True, 1, seconds=1.0, peak_mib=150.0, kl=0.25, **good),
        Run("kneebench rtn", "kneebench", "rtn", 4, True, 2, seconds=3.0, peak_mib=170.0, kl=0.25, **good),
        Run("gptqmodel gptq", "gptqmodel", "gptq", 4, True, 1, error="ValueError: no"),
    ]
    text = table.table(runs, CONDITIONS, ["kneebench rtn", "gptqmodel gptq"])
    rows = [line for line in text.splitlines() if line.startswith("| 4")]
    assert rows[0] == "| 4 | no | kneebench rtn | 2.0 (1.0 to 3.0) | 160 | 60 | 0.25 | 0.5 | 75.00 % | 2 |"
    assert rows[1].startswith("| 4 | no | gptqmodel gptq | ValueError: no |")
    assert {line.count("|") for line in rows} == {11}


def test_ratios_are_ours_over_the_other_in_the_same_scheme() -> None:
    figures: dict[str, Any] = {"kl_parts": {"windows": 0.5}, "top1": 0.75, "perplexity": 2.0, "before_mib": 100.0}
    runs = [
        Run("kneebench gptq", "", "", 4, True, 1, seconds=1.0, peak_mib=150.0, kl=0.25, **figures),
        Run("llmcompressor gptq", "", "", 4, True, 1, seconds=3.0, peak_mib=400.0, kl=0.5, **figures),
        Run("llmcompressor gptq", "", "", 4, True, 2, seconds=5.0, peak_mib=400.0, kl=0.5, **figures),
        Run("llmcompressor gptq", "", "", 3, True, 1, seconds=9.0, peak_mib=400.0, kl=9.0, **figures),
        Run("gptqmodel gptq", "", "", 4, True, 1, error="ValueError: no"),
    ]
    rows = [line for line in table.table(runs, CONDITIONS, []).splitlines() if "| kneebench gptq | " in line]
    assert rows[1:] == ["| 4 | no | kneebench gptq | llmcompressor gptq | 0.5 | 0.25 | 0.38 | 0.17 |"]


def test_a_reason_names_no_path() -> None:
    log = "Traceback\n  File\nValueError: cannot open /home/someone/peers/x.py today\nINFO done\n"
    assert quantizers._reason(log) == "ValueError: cannot open x.py today"


BEGIN, END = (mark.format("quantizers") for mark in (table.BEGIN, table.END))


def test_table_goes_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    table.put("new", page)
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text(f"{BEGIN} and no end")
    with pytest.raises(SystemExit, match="only one of"):
        table.put("new", page)
