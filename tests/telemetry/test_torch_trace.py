"""Traces of torch's profiler: real ones of vLLM on this project's CPU machine, and written ones of a card.

tests/data/torch_trace_*_cpu.json.gz are the prefill of 128 tokens and the first four decode steps of the demo model
(4 blocks), vLLM 0.32.0, as `bench trace` keeps them; process and thread numbers replaced.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.telemetry import steps, torch_trace
from harness.telemetry.kernels import HOST, Mark, classified, kind_of, launches_of, rows
from harness.telemetry.trace_files import read_trace

DATA = Path(__file__).parent.parent / "data"
REAL = {name: DATA / f"torch_trace_{name}_cpu.json.gz" for name in ("bf16", "awq")}


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "awq"])
def test_a_real_trace_has_its_steps_and_its_kinds(precision: str) -> None:
    trace = steps.trace(precision, torch_trace.read(REAL[precision]))
    assert (trace.device, trace.profiler) == ("cpu", "torch")
    assert [step.phase for step in trace.steps] == ["prefill", *["decode"] * 4]
    share = classified(trace)
    assert share is not None and share >= 0.95
    assert {launch.lane for launch in trace.launches} == {"thread 4242"}


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [("bf16", {"_C::onednn_mm": 17}), ("awq", {"_C::cpu_gemm_wna16": 16, "_C::onednn_mm": 1})],
)
def test_each_step_multiplies_four_layers_a_block_and_the_output_head(precision: str, wanted: dict[str, int]) -> None:
    """4 blocks with qkv, o, gate-up and down, and the head: 17; in INT4 the head stays in 16 bits."""
    trace = steps.trace(precision, torch_trace.read(REAL[precision]))
    for _, _, launches in launches_of(trace):
        assert Counter(item.name for item in launches if kind_of(item.name) in ("gemm", "fused")) == wanted


@pytest.mark.parametrize("precision", ["bf16", "awq"])
def test_the_rows_of_a_step_add_up_to_the_step(precision: str) -> None:
    table = rows(steps.trace(precision, torch_trace.read(REAL[precision])))
    for step in range(5):
        mine = [row for row in table if row.step == step]
        assert sum(row.busy_us for row in mine) == pytest.approx(mine[0].step_us)
        assert [row.kind for row in mine].count("host gap") == 1


def test_samplings_alone_find_the_same_steps() -> None:
    """The marks taken away. Where a bare step begins is later by the work before its first mark's end, at most."""
    recording = torch_trace.read(REAL["bf16"])
    marked = steps.find(recording)
    bare = steps.find(torch_trace.Recording(recording.device, recording.profiler, recording.launches, ()))
    assert [step.phase for step in bare] == [step.phase for step in marked]


def test_operators_that_touch_no_data_are_no_launches() -> None:
    names = {launch.name for launch in torch_trace.read(REAL["bf16"]).launches}
    assert not {name for name in names if kind_of(name) == HOST}
    assert "aten::as_strided" not in names and "aten::copy_" in names


# --- written ones -----------------------------------------------------------------------------------------------------


def event(category: str, name: str, begin: float, length: float, thread: int = 1, **arguments: Any) -> dict[str, Any]:
    place = {"pid": 9, "tid": thread, "ts": begin, "dur": length}
    return {"ph": "X", "cat": category, "name": name, **place, "args": arguments}


def written(path: Path, events: list[Any], **more: Any) -> Path:
    """As Kineto does it: other keys first, the events among them."""
    text = json.dumps(
        {"schemaVersion": 1, "host_name": "secret-host", **more, "traceEvents": events, "traceName": "/p"}
    )
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


MARLIN = "void marlin::Marlin<__nv_bfloat16, 256, 1, 8, 8, 4>(int4 const*)"
FLASH = "void flash_fwd_splitkv_kernel<Traits>(Flash_fwd_params)"
ARGMAX = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float> > >(R)"

CARD = [
    {"ph": "M", "name": "process_name", "pid": 9, "tid": 0, "ts": 0, "args": {"name": "VLLM::Worker"}},
    {"ph": "i", "s": "g", "name": "Iteration Start", "pid": "Traces", "tid": "x", "ts": 1.0},
    event("cpu_op", "aten::mm", 0.0, 500.0),
    event("user_annotation", "execute_context_1(128)_generation_0(0)", 10.0, 20.0),
    event("cuda_runtime", "cudaLaunchKernel", 12.0, 1.0, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 14.0, 1.0, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 32.0, 1.0, correlation=3),  # sampling, after the pass
    event("user_annotation", "execute_context_0(0)_generation_1(1)", 40.0, 10.0),
    event("cuda_runtime", "cudaGraphLaunch", 42.0, 1.0, correlation=4),
    event("cuda_driver", "cuLaunchKernelEx", 52.0, 1.0, correlation=5),
    event("cuda_runtime", "cudaStreamSynchronize", 60.0, 90.0),  # without a correlation
    # The card is late: it runs the first pass when the host has asked for the second.
    event("kernel", MARLIN, 50.0, 30.0, 7, stream=7, correlation=1, device=0, grid=[1, 1, 1]),
    event("kernel", FLASH, 80.0, 10.0, 7, stream=7, correlation=2),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 90.0, 2.0, 7, stream=8, correlation=3),
    event("kernel", MARLIN, 100.0, 20.0, 7, stream=7, correlation=4),
    event("kernel", FLASH, 118.0, 7.0, 7, stream=7, correlation=4),  # need not wait for Marlin's end
    event("kernel", ARGMAX, 130.0, 5.0, 7, stream=7, correlation=5),
    event("gpu_memset", "Memset (Device)", 140.0, 1.0, 7, stream=7),
    event("gpu_user_annotation", "execute_context_0(0)_generation_1(1)", 100.0, 25.0, 7),
    event("ac2g", "ac2g", 12.0, 1.0),
]


@pytest.mark.parametrize("name", ["t.json", "t.pt.trace.json.gz"])
def test_a_card_is_read_from_its_kernels_and_the_host_marks_are_put_on_its_time(tmp_path: Path, name: str) -> None:
    """Pass one is asked for at 12 and 14: it runs 50-90. Pass two is one graph: 100-125, of which Marlin works 18 µs,
    FlashAttention 7. The copy and the sampling were asked for between and after; they are the steps' all the same.
    """
    recording = torch_trace.read(written(tmp_path / name, CARD))
    assert (recording.device, recording.profiler) == ("gpu", "torch")
    assert recording.marks == (
        Mark("execute_context_1(128)_generation_0(0)", 50.0, 90.0),
        Mark("execute_context_0(0)_generation_1(1)", 100.0, 125.0),
    )
    assert [(item.name[:11], item.begin_us, item.busy_us, item.lane) for item in recording.launches] == [
        ("void marlin", 50.0, 30.0, "stream 7"),
        ("void flash_", 80.0, 10.0, "stream 7"),
        ("Memcpy DtoH", 90.0, 2.0, "stream 8"),
        ("void marlin", 100.0, 18.0, "stream 7"),
        ("void flash_", 118.0, 7.0, "stream 7"),
        ("void at::na", 130.0, 5.0, "stream 7"),
        ("Memset (Dev", 140.0, 1.0, "stream 7"),
    ]
    trace = steps.trace("awq", recording)
    assert [(step.phase, step.begin_us, step.end_us) for step in trace.steps] == [
        ("prefill", 50.0, 92.0),
        ("decode", 100.0, 141.0),
    ]


def test_exclusive_times_on_threads_and_what_belongs_to_a_whole_operator(tmp_path: Path) -> None:
    """linear 0-100 ⊃ addmm 10-90 ⊃ copy_ 20-30 and as_strided 40-50: linear 20, addmm 80 - 10 - 10 = 60, copy_ 10; the
    view's 10 µs are nobody's. Our own operator 110-150 keeps what it calls inside, on its thread; the other thread's
    operator at the same time is its own.
    """
    events = [
        event("cpu_op", "aten::linear", 0.0, 100.0),
        event("cpu_op", "aten::addmm", 10.0, 80.0),
        event("cpu_op", "aten::copy_", 20.0, 10.0),
        event("cpu_op", "aten::as_strided", 40.0, 10.0),
        event("cpu_op", "kneebench::linear", 110.0, 40.0),
        event("cpu_op", "aten::bitwise_and", 112.0, 10.0),
        event("cpu_op", "aten::mm", 125.0, 20.0),
        event("cpu_op", "aten::add", 120.0, 5.0, thread=2),
        event("cpu_op", "aten::add", 150.0, 5.0),
    ]
    launches = torch_trace.read(written(tmp_path / "t.json", events)).launches
    assert [(item.name, item.busy_us, item.lane) for item in launches] == [
        ("aten::linear", 20.0, "thread 1"),
        ("aten::addmm", 60.0, "thread 1"),
        ("aten::copy_", 10.0, "thread 1"),
        ("kneebench::linear", 40.0, "thread 1"),
        ("aten::add", 5.0, "thread 2"),
        ("aten::add", 5.0, "thread 1"),
    ]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_events_may_lie_across_the_pieces_in_which_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = written(tmp_path / "t.json", [*CARD, event("kernel", 'tricky "]}, {[" ö', 200.0, 1.0, 7, stream=7)])
    whole = torch_trace.read(path)
    monkeypatch.setattr(torch_trace, "_CHUNK", size)
    assert torch_trace.read(path) == whole
    assert whole.launches[-1].name == 'tricky "]}, {[" ö'


# --- what may be shown ------------------------------------------------------------------------------------------------


def test_what_is_kept_reads_the_same_and_names_no_machine(tmp_path: Path) -> None:
    events = [*CARD, event("python_function", "/home/ann/secret.py(3): f", 3.0, 1.0)]
    source = written(tmp_path / "t.json", events, traceName="/home/ann/t.json")
    for target in (tmp_path / "a.json.gz", tmp_path / "b.json.gz"):
        torch_trace.rewrite(source, target)
    assert torch_trace.read(tmp_path / "a.json.gz") == torch_trace.read(source)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    text = gzip.decompress((tmp_path / "a.json.gz").read_bytes()).decode()
    assert "secret" not in text and "/home" not in text
    assert json.loads(text)["traceEvents"]  # and the tools that draw such files can read it


def test_a_real_trace_kept_twice_is_the_same(tmp_path: Path) -> None:
    torch_trace.rewrite(REAL["awq"], tmp_path / "t.json.gz")
    assert torch_trace.read(tmp_path / "t.json.gz") == torch_trace.read(REAL["awq"])


def test_a_damaged_trace_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"traceEvents": [' + json.dumps(CARD[2]), encoding="utf-8")
    with pytest.raises(InputError, match="ends in the middle"):
        torch_trace.rewrite(tmp_path / "t.json", tmp_path / "kept.json.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


# --- files that are none ----------------------------------------------------------------------------------------------


KERNEL = b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", '


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello", "no traceEvents"),
        (b"{}", "no traceEvents"),
        (b'{"traceEvents": []}', "neither a kernel nor an operator"),
        (b'{"traceEvents": [', "ends in the middle"),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "na', "ends in the middle"),
        (b'{"traceEvents": [{"ph": "X"} ; ]}', "ends in the middle"),
        (b'{"traceEvents": [3, 4]}', "no object"),
        (KERNEL + b'"ts": 1}]}', "KeyError: 'dur'"),
        (KERNEL + b'"ts": "now", "dur": 1}]}', "ValueError"),
        (KERNEL + b'"ts": 2, "dur": NaN}]}', "nan is no time"),
        (KERNEL + b'"ts": -Infinity, "dur": 1}]}', "inf is no time"),
        (KERNEL + b'"ts": 1, "dur": ' + b"9" * 400 + b"}]}", "inf is no time"),
        (KERNEL + b'"ts": 1, "dur": 1, "args": 3}]}', "AttributeError"),
        (KERNEL + b'"ts": 1, "dur": 1}]}', "no step can be found"),
        (b"\x1f\x8b", "cannot be unpacked"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-6], "cannot be unpacked"),
        (b"\x1f\x8b\x08" + bytes(40), "cannot be unpacked"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(128, 160)), "no text"),
    ],
)  # fmt: skip
def test_what_is_no_whole_trace_is_an_error_that_names_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace("bf16", tmp_path / "t.json")
    assert said in str(caught.value) and ("t.json" in str(caught.value) or "no step" in said)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_a_real_trace_that_was_cut_off_is_refused(tmp_path: Path, part: float) -> None:
    packed = REAL["bf16"].read_bytes()
    plain = gzip.decompress(packed)
    (tmp_path / "a.json.gz").write_bytes(packed[: int(len(packed) * part)])
    (tmp_path / "b.json").write_bytes(plain[: int(len(plain) * part)])
    for name in ("a.json.gz", "b.json"):
        with pytest.raises(InputError, match="not a whole trace"):
            torch_trace.read(tmp_path / name)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_trace("bf16", path)
