"""What nvcc makes of the kernels: registers, loads and instructions, read from ptxas' words, from PTX and from SASS.

One card with tensor cores and one without stand for all. Skipped without nvcc; SASS also wants cuobjdump, which is
looked for in the toolkit and in triton's packages, and PTX says nearly the same where it is missing.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.engines import environment
from harness.errors import InputError as NoEngine
from quantize.errors import InputError
from quantize.kernels import build

CARDS = (75, 80)
HOT = ("dequantize_gptq", "dequantize_awq", "expand_tiles", "gemv_kernel", "gemm_kernel")
"""What runs while a model answers; prepare runs once, at load."""


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel's template. sass is empty where there is no cuobjdump."""

    symbol: str
    card: int
    usage: str
    ptx: str
    sass: str

    @property
    def name(self) -> str:
        return next((name for name in HOT if name in self.symbol), "")

    @property
    def numbers(self) -> list[int]:
        """The template's integers and booleans, in their order."""
        return [int(number) for number in re.findall(r"L[ib](\d+)E", self.symbol)]

    @property
    def bits(self) -> int:
        return 4 if self.name == "dequantize_awq" else self.numbers[0]


def disassembler() -> str | None:
    """cuobjdump, of the toolkit, or of triton here or in the engine's environment."""
    try:
        return build.find("cuobjdump")
    except InputError:
        pass
    folders = []
    if (spec := find_spec("triton")) and spec.origin:
        folders.append(Path(spec.origin).parent)
    try:
        folders += environment.find(None).python.parent.parent.glob("lib/python3*/site-packages/triton")
    except NoEngine:
        pass
    return next(filter(None, (shutil.which("cuobjdump", path=f"{f}/backends/nvidia/bin") for f in folders)), None)


def kernels_of(card: int) -> Iterator[Kernel]:
    tool = disassembler()
    folder = build.inspect(card)
    for said in sorted(folder.glob("*.txt")):
        usages = dict(re.findall(r"Function properties for (\w+)\n\s*(.*)\n", said.read_text()))
        ptx = said.with_suffix(".ptx").read_text()
        bodies = {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", ptx, re.DOTALL)}
        machine: dict[str, str] = {}
        if tool and bodies:
            command = [tool, "-sass", str(said.with_suffix(".cubin"))]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            machine = {m[1]: m[2] for m in re.finditer(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL)}
        assert set(bodies) == set(usages)
        for symbol, body in bodies.items():
            yield Kernel(symbol, card, usages[symbol], body, machine.get(symbol, ""))


@pytest.fixture(scope="session")
def hot(nvcc: str) -> list[Kernel]:
    """All instances of the hot kernels, for both cards; gemm only for the one that has it."""
    found = [kernel for card in CARDS for kernel in kernels_of(card) if kernel.name]
    return [k for k in found if not (k.name == "gemm_kernel" and k.card < build.TENSOR_CORES)]


@pytest.fixture
def with_sass(hot: list[Kernel]) -> list[Kernel]:
    if not all(kernel.sass for kernel in hot):
        pytest.skip("no cuobjdump: the checks of PTX stand alone")
    return hot


def wide(kernel: Kernel) -> bool:
    """Not the version of dequantize_awq for outputs that do not fill 16 bytes of words, which loads 4."""
    return not (kernel.name == "dequantize_awq" and kernel.numbers == [1])


def test_each_hot_kernel_is_there_in_both_types(hot: list[Kernel]) -> None:
    for card in CARDS:
        for name in HOT if card >= build.TENSOR_CORES else HOT[:-1]:
            instances = [k.symbol for k in hot if (k.card, k.name) == (card, name)]
            assert any("6__half" in s for s in instances) and any("13__nv_bfloat16" in s for s in instances), name
    for name, widths in (("dequantize_gptq", {2, 3, 4, 8}), ("expand_tiles", {4, 8}), ("gemv_kernel", {4, 8})):
        assert {k.bits for k in hot if k.name == name} == widths


def test_nothing_is_spilled_and_nothing_lies_in_local_memory(hot: list[Kernel]) -> None:
    none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert [(k.card, k.symbol, k.usage) for k in hot if k.usage != none] == []
    assert [k.symbol for k in hot if re.search(r"\.local\b", k.ptx)] == []


def test_words_are_loaded_16_bytes_at_a_time(hot: list[Kernel]) -> None:
    loads = re.compile(r"ld\.global[\w:.]*\.v4\.[bfu]32|cp\.async\.cg\.shared\.global[\w:.]* \[[^]]+\], \[[^]]+\], 16")
    assert [k.symbol for k in hot if wide(k) and not loads.search(k.ptx)] == []


def test_weights_are_stored_16_bytes_at_a_time(hot: list[Kernel]) -> None:
    # All that make weights, but for expand's scatter by perm (the template's last argument).
    makers = [k for k in hot if k.name.startswith("dequantize") or (k.name == "expand_tiles" and not k.numbers[-1])]
    assert makers
    assert [k.symbol for k in makers if not re.search(r"st\.global\.v4\.[bfu]32", k.ptx)] == []
    assert [k.symbol for k in makers if re.search(r"st\.global\.[bfu]16", k.ptx)] == []


def test_nibbles_are_unpacked_by_lop3_and_bytes_by_prmt(hot: list[Kernel]) -> None:
    # The index of act-order takes integers one by one: it alone has neither.
    plain = [k for k in hot if not (k.name == "dequantize_gptq" and k.numbers[-1])]
    mask_and_or = f", {(0xF0 & 0xCC) | 0xAA};"
    for kernel in plain:
        wanted = "prmt.b32" if kernel.bits == 8 else "lop3.b32"
        lines = [line for line in kernel.ptx.splitlines() if wanted in line]
        assert lines, kernel.symbol
        assert kernel.bits == 8 or all(line.endswith(mask_and_or) for line in lines), kernel.symbol


def test_the_product_uses_tensor_cores_and_copies_ahead(hot: list[Kernel]) -> None:
    products = [k for k in hot if k.name == "gemm_kernel"]
    assert products
    for kernel in products:
        kind = "bf16.bf16" if "bfloat16" in kernel.symbol else "f16.f16"
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32" in kernel.ptx
        assert "cp.async.commit_group" in kernel.ptx and "cp.async.wait_group" in kernel.ptx


def test_sass_has_no_local_memory(with_sass: list[Kernel]) -> None:
    assert [k.symbol for k in with_sass if re.search(r"\b(LDL|STL)\b", k.sass)] == []


def test_sass_has_wide_loads(with_sass: list[Kernel]) -> None:
    loads = re.compile(r"\bLDG\.E[.\w]*\.128\b|\bLDGSTS\.E[.\w]*\.128\b")
    assert [(k.card, k.symbol) for k in with_sass if wide(k) and not loads.search(k.sass)] == []


def test_sass_has_one_lop3_for_each_pair_of_nibbles(with_sass: list[Kernel]) -> None:
    """Of tables a & b | c (0xea, with what ptxas makes of it by turning its inputs round: 0xec, 0xf8), at least the 16
    pairs of a lane in expand_tiles."""
    expanders = [k for k in with_sass if k.name == "expand_tiles" and k.bits == 4]
    assert expanders
    for kernel in expanders:
        assert len(re.findall(r"\bLOP3\.LUT [^;]*0x(?:ea|ec|f8), ", kernel.sass)) >= 16, kernel.symbol


def test_sass_multiplies_on_tensor_cores(with_sass: list[Kernel]) -> None:
    products = [k for k in with_sass if k.name == "gemm_kernel"]
    assert products
    assert [k.symbol for k in products if "HMMA.16816.F32" not in k.sass or "LDGSTS.E" not in k.sass] == []
