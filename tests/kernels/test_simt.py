"""The emulator that runs the kernels on the CPU (simt.h), and the launch shapes (schedule.cuh).

An emulator can be wrong in the same way as the kernel that it runs. So its instructions are held against the PTX
manual's own formulas, worked out here by hand, and it is given kernels that are wrong on purpose: each fault must show.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quantize.kernels import build, reference
from quantize.kernels.reference import Array

PROBES = Path(__file__).with_name("probes.cu")
MACHINES = (0, 1, 2, 3, 4, 5)
"""Orders of threads: forwards, backwards, four shuffles."""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """probes.cu, compiled for the CPU."""
    out = tmp_path_factory.mktemp("probes") / "probes.so"

    def command(path: Path) -> list[str]:
        flags = ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        sources = [str(PROBES), str(build.FOLDER / "checks.cu")]
        return [os.environ.get("CXX", "g++"), *flags, f"-I{build.FOLDER}", "-o", str(path), *sources]

    library = ctypes.CDLL(str(build.build(command, out)))
    library.probe_schedule.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    return library


@pytest.fixture(params=MACHINES)
def ordered(request: pytest.FixtureRequest, probes: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The probes, on machines whose threads run in different orders."""
    probes.kb_simt_set(request.param, 4, 90)
    yield probes
    probes.kb_simt_set(0, 4, 90)


def pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


# ---- instructions ----------------------------------------------------------------------------------------------------


def registers(matrix: Array, lane: int, dtype: str, part: str) -> list[int]:
    """A lane's registers of `part` of mma.m16n8k16, by the formulas of the PTX ISA 8.7, section 9.7.14.5.8.

    groupID = lane >> 2, threadID_in_group = lane % 4.
    A, ai for i = 0..7: row = groupID for 0 <= i < 2 or 4 <= i < 6, else groupID + 8;
                        col = threadID_in_group * 2 + (i & 1) for i < 4, and + 8 for i >= 4.
    B, bi for i = 0..3: row = threadID_in_group * 2 + (i & 1) for i < 2, and + 8 for i >= 2; col = groupID.
    """
    group, thread = lane >> 2, lane % 4
    values = []
    for i in range(8 if part == "a" else 4):
        if part == "a":
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
        else:
            row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            column = group
        values.append(int(reference.nearest(np.array([matrix[row, column]]), dtype)[0]))
    return [low | high << 16 for low, high in zip(values[::2], values[1::2], strict=True)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_is_a_matrix_product_by_the_manuals_fragments(ordered: ctypes.CDLL, dtype: str) -> None:
    """C, ci: row = groupID for i < 2, else groupID + 8; col = threadID_in_group * 2 + (i & 1). Integers are exact."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(-8, 9, (16, 16)).astype(float), rng.integers(-8, 9, (16, 8)).astype(float)
    before = rng.integers(-99, 99, (16, 8)).astype(float)
    a = np.array([registers(left, lane, dtype, "a") for lane in range(32)], dtype=np.uint32)
    b = np.array([registers(right, lane, dtype, "b") for lane in range(32)], dtype=np.uint32)
    places = [
        [((lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)) for i in range(4)] for lane in range(32)
    ]  # of c0..c3
    d = np.array([[before[place] for place in lane] for lane in places], dtype=np.float32)
    assert ordered.probe_product(dtype == "bfloat16", pointer(a), pointer(b), pointer(d)) == 0
    wanted = before + left @ right
    assert d.tolist() == [[wanted[place] for place in lane] for lane in places]


def test_one_element_of_a_product_by_hand(probes: ctypes.CDLL) -> None:
    """A[9, 3] = 2 is in lane (9 % 8) * 4 + 3 // 2 = 5, register a1 (row 8.., k below 8), upper half (3 is odd).
    B[3, 6] = 5 is in lane 6 * 4 + 3 // 2 = 25, register b0, upper half. D[9, 6] = 10 comes out of lane
    1 * 4 + 6 // 2 = 7 as d2 (row 8.., even column). 2 and 5 in float16 are 0x4000 and 0x4500."""
    a, b, d = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32)
    a[5, 1], b[25, 0] = 0x40000000, 0x45000000
    assert probes.probe_product(0, pointer(a), pointer(b), pointer(d)) == 0
    assert np.argwhere(d).tolist() == [[7, 2]]
    assert d[7, 2] == 10


def test_shuffles(ordered: ctypes.CDLL) -> None:
    values = np.random.default_rng(1).integers(0, 1000, 32).astype(np.int32)
    out = np.zeros((4, 32), np.int32)
    assert ordered.probe_shuffles(pointer(values), pointer(out)) == 0
    lanes = np.arange(32)
    assert (out[0] == values[lanes ^ 5]).all()
    assert (out[1] == np.where(lanes < 28, values[(lanes + 4) % 32], values)).all()  # beyond the warp: its own
    assert (out[2] == values[(7 * lanes + 3) % 32]).all()
    assert (out[3] == values.reshape(8, 4).sum(1).repeat(4)).all()


# ---- faults ----------------------------------------------------------------------------------------------------------


def reversed_by(probes: ctypes.CDLL, barrier: int) -> Array:
    x, y = np.arange(96, dtype=np.float32), np.zeros(96, np.float32)
    assert probes.probe_reverse(barrier, 96, pointer(x), pointer(y)) == 0
    return y


def test_a_missing_barrier_shows(ordered: ctypes.CDLL) -> None:
    assert (reversed_by(ordered, 1) == np.arange(95, -1, -1)).all()
    assert np.isnan(reversed_by(ordered, 0)).any()


def ring_by(probes: ctypes.CDLL, which: int) -> tuple[Array, Array]:
    """What the ring's threads sum, and what they should: thread i sums its neighbour's 8 rounds of 4 numbers."""
    x, y = np.random.default_rng(2).integers(0, 100, (8, 64, 4)).astype(np.float32), np.zeros(64, np.float32)
    assert probes.probe_ring(which, pointer(x), pointer(y)) == 0
    return y, x.sum((0, 2))[(np.arange(64) + 33) % 64]


def test_a_copy_is_there_when_it_was_waited_for(ordered: ctypes.CDLL) -> None:
    got, wanted = ring_by(ordered, 0)
    assert (got == wanted).all()


def test_a_wait_too_few_shows(ordered: ctypes.CDLL) -> None:
    assert np.isnan(ring_by(ordered, 1)[0]).any()


def test_a_copy_into_a_buffer_still_read_shows(ordered: ctypes.CDLL) -> None:
    got, wanted = ring_by(ordered, 2)
    assert (got != wanted).any()


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (0, "thread 0 waits for ever at __syncthreads"),
        (1, "thread 1: is at __syncwarp, others are at __shfl_xor_sync"),
        (2, "thread 0 waits for ever at __shfl_xor_sync"),
        (3, "thread 0: an access of 16 bytes is misaligned"),
    ],
)
def test_a_kernel_that_cannot_be_right_is_stopped(
    probes: ctypes.CDLL, capfd: pytest.CaptureFixture[str], which: int, said: str
) -> None:
    y = np.zeros(16, np.float32)
    assert probes.probe_fault(which, pointer(y)) != 0
    assert f"simt: block 0,0 {said}" in capfd.readouterr().err


# ---- schedules -------------------------------------------------------------------------------------------------------

LENGTHS = (8, 64, 72, 128, 520, 1000, 3584, 4096, 11008, 18944)


@pytest.mark.parametrize("gemm", [0, 1])
@pytest.mark.parametrize("processors", [1, 20, 84, 132])
def test_each_chunk_is_taken_once(probes: ctypes.CDLL, gemm: int, processors: int) -> None:
    for n in (8, 16, 24, 128, 136, 896, 3584):
        for k in LENGTHS:
            taken = np.zeros((-(-n // 16), -(-k // 64)), np.int32)
            splits = probes.probe_schedule(gemm, n, k, processors, taken.ctypes.data)
            assert (taken == 1).all(), (n, k)
            least = 4 if gemm else 64
            assert splits == 1 or taken.shape[1] // splits >= least, (n, k)


def test_splits_only_where_processors_would_be_idle(probes: ctypes.CDLL) -> None:
    """On 84 processors. gemv: 32 rows of 296 chunks want 84 // 32 = 2 splits, and 224 rows none. gemm: 28 blocks of 56
    chunks want 2 * 84 // 28 = 6 splits; 4 blocks want 42, but 56 chunks allow 14."""

    def splits(gemm: int, n: int, k: int) -> int:
        taken = np.zeros((-(-n // 16), -(-k // 64)), np.int32)
        return int(probes.probe_schedule(gemm, n, k, 84, taken.ctypes.data))

    assert splits(0, 512, 18944) == 2
    assert splits(0, 3584, 18944) == 1
    assert splits(1, 3584, 3584) == 6
    assert splits(1, 512, 3584) == 14


def test_groups_without_a_division(probes: ctypes.CDLL) -> None:
    """Every position of rows up to the largest k, groups of each multiple of 32 that a row may have."""
    for k in (*range(8, 1100, 8), 3584, 18944, 29568, 1 << 20):
        sizes = [size for size in (*range(32, 1025, 32), k // 2) if size % 32 == 0 and size and k % size == 0]
        for size in {*sizes, k}:
            assert probes.probe_groups(k, size) == -1, (k, size)
