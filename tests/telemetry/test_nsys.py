"""Nsight Systems' SQLite exports, made here after NVIDIA's schema reference: all columns of the tables that are read.

Kernels are named as vLLM's are on a card: AWQ through Marlin and through AWQ's own kernels, FlashAttention, cuBLAS.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.telemetry import nsys, steps
from harness.telemetry.kernels import Mark, classified, rows
from harness.telemetry.trace_files import read_trace

SCHEMA = {
    "StringIds": "id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL",
    "TARGET_INFO_SYSTEM_ENV": "globalVid INTEGER, devStateName TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, "
    "contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, "
    "globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, "
    "launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, "
    "gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, "
    "blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL, "
    "localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, "
    "sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, "
    "contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, "
    "globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, srcKind INTEGER, "
    "dstKind INTEGER, srcDeviceId INTEGER, srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER, "
    "migrationCause INTEGER, graphNodeId INTEGER, virtualAddress INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMSET": "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, "
    "contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, "
    "globalPid INTEGER, value INTEGER NOT NULL, bytes INTEGER NOT NULL, graphNodeId INTEGER, memKind INTEGER",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, "
    "globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, "
    "callchainId INTEGER",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, "
    "contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, "
    "globalPid INTEGER, graphId INTEGER NOT NULL, graphExecId INTEGER NOT NULL",
    "NVTX_EVENTS": "start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, "
    "category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, "
    "domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, "
    "int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT",
}

MARLIN = "void marlin::Marlin<__nv_bfloat16, (long)1125899906909960, 256, 1, 8, 8, 4, false>(int4 const*, int4 const*)"
AWQ = "void vllm::awq::gemm_forward_4bit_cuda_m16nXk32<128>(int, int, __half *, int *, __half *, int *, int, int)"
UNPACK = "vllm::awq::dequantize_weights(int *, __half *, int *, __half *, int)"
FLASH = (
    "void flash::flash_fwd_splitkv_kernel<flash::Flash_fwd_kernel_traits<(int)64, (int)64, (int)256, (int)4>>(Params)"
)
CUBLAS = "ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_f2f_stages_64x6_tn"
NORM = "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, (int)8>(T1 *, long, T1 *, const T1 *, float, int, int)"
ARGMAX = (
    "void at::native::reduce_kernel<(int)512, (int)1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>(T3)"
)

PID = 77 << 24
MAIN, OTHER_THREAD = PID | 78, PID | 99


class Export:
    """A database of the schema; rows give the columns that matter, the others are 0."""

    def __init__(self, path: Path, leave_out: Iterable[str] = ()) -> None:
        self.path = path
        self._left_out = set(leave_out)
        self._strings: dict[str, int] = {}
        self._columns: dict[str, list[str]] = {}
        self._base = sqlite3.connect(path)

    def string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = 1000 + len(self._strings)
            self.add("StringIds", id=self._strings[text], value=text)
        return self._strings[text]

    def add(self, table: str, **values: Any) -> None:
        """Tables are made lazily, as nsys does."""
        if table not in self._columns:
            columns = [column for column in SCHEMA[table].split(", ") if column.split()[0] not in self._left_out]
            self._columns[table] = [column.split()[0] for column in columns]
            told = ", ".join('"end"' + column[3:] if column.startswith("end ") else column for column in columns)
            self._base.execute(f"CREATE TABLE {table} ({told})")
        names = self._columns[table]
        optional = ("text", "textId", "globalPid", "graphNodeId")
        row = [values.get(name, None if name in optional else 0) for name in names]
        self._base.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)

    def kernel(self, name: str, start: int, end: int, correlation: int, **more: Any) -> None:
        short = name.split("<")[0].split("(")[0].split("::")[-1].removeprefix("void ")
        named = {"demangledName": self.string(name), "shortName": self.string(short)}
        more = {"streamId": 7, "globalPid": PID, **more}
        self.add("CUPTI_ACTIVITY_KIND_KERNEL", start=start, end=end, correlationId=correlation, **named, **more)

    def call(self, start: int, correlation: int, thread: int = MAIN) -> None:
        told = {"globalTid": thread, "correlationId": correlation, "nameId": self.string("cudaLaunchKernel_v7000")}
        self.add("CUPTI_ACTIVITY_KIND_RUNTIME", start=start, end=start + 500, **told)

    def mark(
        self, name: str, start: int, end: int | None, *, thread: int = MAIN, kind: int = 59, by_id: bool = True
    ) -> None:
        told = {"textId": self.string(name)} if by_id else {"text": name}
        self.add("NVTX_EVENTS", start=start, end=end, eventType=kind, globalTid=thread, **told)

    def done(self) -> Path:
        self._base.commit()
        self._base.close()
        return self.path


def generation(export: Export, kernels: tuple[str, ...], steps: int = 5, marks: bool = True) -> Path:
    """A prefill and decode steps of 1 ms each, the kernels 100 µs apart and 60 long; the host is 300 µs ahead. Decode
    steps are one CUDA graph: one call, and each kernel has its node.
    """
    correlation = 0
    for step in range(steps):
        begin, host = step * 1_000_000 + 500_000, step * 1_000_000 + 200_000
        if marks:
            phase = "context_1(128)_generation_0(0)" if step == 0 else "context_0(0)_generation_1(1)"
            export.mark(f"execute_{phase}", host, host + 90_000, by_id=step % 2 == 0)
        for number, name in enumerate(kernels):
            if step == 0 or number == 0:
                correlation += 1
                export.call(host + 1_000 * number, correlation)
            node = None if step == 0 else number + 1
            export.kernel(
                name, begin + number * 100_000, begin + number * 100_000 + 60_000, correlation, graphNodeId=node
            )
        correlation += 1
        export.call(host + 95_000, correlation)  # after the mark's end, as vLLM samples
        export.kernel(ARGMAX, begin + 800_000, begin + 810_000, correlation)
    return export.done()


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize(
    ("kernels", "kinds"),
    [
        ((NORM, CUBLAS, FLASH, CUBLAS), {"elementwise": 60.0, "gemm": 120.0, "attention": 60.0}),
        ((NORM, MARLIN, FLASH, MARLIN), {"elementwise": 60.0, "fused": 120.0, "attention": 60.0}),
        (
            (NORM, AWQ, FLASH, UNPACK, CUBLAS),
            {"elementwise": 60.0, "fused": 60.0, "attention": 60.0, "dequant": 60.0, "gemm": 60.0},
        ),
    ],
    ids=["bf16", "marlin", "awq"],
)
def test_an_export_by_hand(tmp_path: Path, kernels: tuple[str, ...], kinds: dict[str, float], marks: bool) -> None:
    """Each kernel 60 µs, the sampling 10: what is left of a step's 1000 µs is gap."""
    trace = read_trace("awq", generation(Export(tmp_path / "e.sqlite"), kernels, marks=marks))
    assert (trace.device, trace.profiler) == ("gpu", "nsys")
    assert [step.phase for step in trace.steps] == ["prefill", *["decode"] * 4]
    assert [step.begin_us for step in trace.steps] == [500.0, 1500.0, 2500.0, 3500.0, 4500.0]
    assert classified(trace) == 1.0
    table = [row for row in rows(trace) if row.step == 2]
    found: dict[str, float] = {}
    for row in table:
        found[row.kind] = found.get(row.kind, 0.0) + row.busy_us
    assert found == pytest.approx({**kinds, "sampling": 10.0, "host gap": 990.0 - sum(kinds.values())})
    assert table[0].step_us == 1000.0


def test_marks_come_by_the_calls_of_their_thread(tmp_path: Path) -> None:
    """A range of another thread, one that has not ended, a mark that is no range, and one in which nothing was asked
    for put nothing on the card's time.
    """
    export = Export(tmp_path / "e.sqlite")
    export.mark("execute_new_1_cached_0", 1_000, 2_000)
    export.mark("other thread", 1_000, 2_000, thread=OTHER_THREAD)
    export.mark("open", 1_000, None)
    export.mark("an instant", 1_000, 2_000, kind=34)
    export.mark("start and end", 900, 2_100, kind=60)
    export.mark("empty", 5_000, 6_000)
    export.call(1_500, 1)
    export.kernel(MARLIN, 10_000, 30_000, 1)
    recording = nsys.read(export.done())
    assert recording.marks == (Mark("execute_new_1_cached_0", 10.0, 30.0), Mark("start and end", 10.0, 30.0))


def test_two_processes_may_count_alike(tmp_path: Path) -> None:
    """Both have a correlation 1; the second one's call was made outside of any range."""
    export = Export(tmp_path / "e.sqlite")
    export.mark("execute_new_1_cached_0", 1_000, 2_000)
    export.call(1_500, 1)
    export.call(3_000, 1, thread=(88 << 24) | 5)
    export.kernel(CUBLAS, 10_000, 20_000, 1)
    export.kernel(CUBLAS, 50_000, 90_000, 1, globalPid=88 << 24)
    assert nsys.read(export.done()).marks == (Mark("execute_new_1_cached_0", 10.0, 20.0),)


def test_copies_and_fills_are_launches(tmp_path: Path) -> None:
    export = Export(tmp_path / "e.sqlite")
    export.kernel(CUBLAS, 0, 1_000, 1)
    for number, kind in enumerate((1, 2, 8, 99)):
        export.add("CUPTI_ACTIVITY_KIND_MEMCPY", start=2_000 + number, end=3_000, streamId=14, copyKind=kind)
    export.add("CUPTI_ACTIVITY_KIND_MEMSET", start=5_000, end=5_500, streamId=7)
    launches = nsys.read(export.done()).launches
    assert [(item.name, item.lane) for item in launches[1:]] == [
        ("[CUDA memcpy HtoD]", "stream 14"),
        ("[CUDA memcpy DtoH]", "stream 14"),
        ("[CUDA memcpy DtoD]", "stream 14"),
        ("[CUDA memcpy]", "stream 14"),
        ("[CUDA memset]", "stream 7"),
    ]
    assert launches[0].begin_us == 0.0 and launches[0].end_us == 1.0 and launches[-1].busy_us == 0.5


@pytest.mark.parametrize(
    "left_out", [("globalPid",), ("greenContextId", "mangledName"), ("demangledName",), ("textId",)]
)
def test_other_versions_have_other_columns(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    """Without textId only the marks with a text of their own are found: every second one, the decode steps 1 and 3."""
    path = generation(Export(tmp_path / "e.sqlite", left_out), (NORM, CUBLAS, FLASH))
    recording = nsys.read(path)
    assert len(recording.launches) == 20
    assert len(recording.marks) == (2 if "textId" in left_out else 5)
    if "demangledName" not in left_out:
        assert {item.name for item in recording.launches} == {NORM, CUBLAS, FLASH, ARGMAX}
    else:
        assert {item.name for item in recording.launches} == {
            "fused_add_rms_norm_kernel", CUBLAS, "flash_fwd_splitkv_kernel", "reduce_kernel",
        }  # fmt: skip


def test_without_calls_or_marks_the_samplings_are_left(tmp_path: Path) -> None:
    path = generation(Export(tmp_path / "e.sqlite"), (CUBLAS, FLASH), marks=False)
    with closing(sqlite3.connect(path)) as base:
        base.execute("DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME")
        base.commit()
    assert nsys.read(path).marks == ()
    assert len(steps.find(nsys.read(path))) == 5


# --- what may be shown ------------------------------------------------------------------------------------------------


def test_what_is_kept_reads_the_same_and_tells_nothing_else(tmp_path: Path) -> None:
    export = Export(tmp_path / "e.sqlite")
    export.add("TARGET_INFO_SYSTEM_ENV", name="Hostname", value="secret-host", devStateName="x")
    export.string("VLLM_API_KEY=secret-key")
    path = generation(export, (NORM, MARLIN, FLASH))
    nsys.rewrite(path, tmp_path / "kept.sqlite")
    assert nsys.read(tmp_path / "kept.sqlite") == nsys.read(path)
    assert b"secret" in path.read_bytes() and b"secret" not in (tmp_path / "kept.sqlite").read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["e.sqlite", "kept.sqlite"]


# --- files that are none ----------------------------------------------------------------------------------------------


def test_graphs_in_place_of_their_kernels_are_refused(tmp_path: Path) -> None:
    """nsys' own default. With the prefill's kernels beside them the file would look whole."""
    for number, eager in enumerate((False, True)):
        export = Export(tmp_path / f"{number}.sqlite")
        export.string("x")
        export.add("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", start=1, end=2, streamId=7)
        if eager:
            export.kernel(CUBLAS, 0, 1_000, 1)
        with pytest.raises(InputError, match="--cuda-graph-trace=node"):
            nsys.read(export.done())


@pytest.mark.parametrize(
    ("table", "column", "said"),
    [
        ("CUPTI_ACTIVITY_KIND_KERNEL", "streamId", "CUPTI_ACTIVITY_KIND_KERNEL has no streamId"),
        ("CUPTI_ACTIVITY_KIND_RUNTIME", "globalTid", "has no globalTid"),
        ("NVTX_EVENTS", "eventType", "NVTX_EVENTS has no eventType"),
    ],
)
def test_a_column_that_is_missing_is_named(tmp_path: Path, table: str, column: str, said: str) -> None:
    path = generation(Export(tmp_path / "e.sqlite"), (CUBLAS, FLASH))
    with closing(sqlite3.connect(path)) as base:
        base.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        base.commit()
    with pytest.raises(InputError, match=said):
        nsys.read(path)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ((), "no table CUPTI_ACTIVITY_KIND_KERNEL"),
        (("somebody",), "no table CUPTI_ACTIVITY_KIND_KERNEL"),
        (("StringIds", "NVTX_EVENTS"), "no kernel ran"),
    ],
)
def test_databases_of_others_and_empty_ones(tmp_path: Path, tables: tuple[str, ...], said: str) -> None:
    path = tmp_path / "e.sqlite"
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE made_first (x)")  # or SQLite would leave an empty file
        for table in tables:
            base.execute(f"CREATE TABLE {table} (x)")
        base.commit()
    with pytest.raises(InputError, match=said) as caught:
        nsys.read(path)
    assert str(path) in str(caught.value) and caught.value.exit_code == 2


def test_a_table_of_kernels_without_names_is_refused(tmp_path: Path) -> None:
    path = generation(Export(tmp_path / "e.sqlite", ("demangledName", "shortName")), (CUBLAS,))
    with pytest.raises(InputError, match="names no kernels"):
        nsys.read(path)


@pytest.mark.parametrize(("end", "said"), [(float("inf"), "inf is no time"), ("late", "holds what its column")])
def test_an_end_that_is_no_time_is_refused(tmp_path: Path, end: Any, said: str) -> None:
    export = Export(tmp_path / "e.sqlite")
    export.kernel(CUBLAS, 1_000, end, 1)
    with pytest.raises(InputError, match=said):
        nsys.read(export.done())


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_database_that_was_cut_off_is_refused(tmp_path: Path, part: float) -> None:
    whole = generation(Export(tmp_path / "e.sqlite"), (NORM, MARLIN, FLASH), steps=400).read_bytes()
    cut = tmp_path / "cut.sqlite"
    cut.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InputError, match="SQLite says"):
        read_trace("awq", cut)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.sqlite").write_bytes(nsys.MAGIC + bytes(100))
    with pytest.raises(InputError, match="SQLite says"):
        read_trace("awq", tmp_path / "e.sqlite")
    with pytest.raises(InputError, match="no such file"):
        nsys.read(tmp_path / "none.sqlite")
    (tmp_path / "r.nsys-rep").write_bytes(b"QDSTRM something")
    with pytest.raises(InputError, match="nsys export --type sqlite"):
        read_trace("awq", tmp_path / "r.nsys-rep")
