"""Finding, building and loading the shared library, and that its structures are the header's."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantize.errors import InputError
from quantize.kernels import build, library
from quantize.kernels.native import _GEMM, _GEMV
from quantize.kernels.tensors import DTYPES, LAYOUTS


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing named, nothing loaded yet."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def shared(tmp_path: Path, code: str) -> Path:
    """A library of that C code."""
    source, out = tmp_path / "a.c", tmp_path / "liba.so"
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(out), str(source)], check=True)
    return out


def test_structures_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    """A C program, compiled against kneebench.h, says sizes, offsets and constants."""
    wanted: list[int] = []
    asked: list[str] = []
    for structure, name in ((library.StoredLayer, "kb_stored"), (library.TiledLayer, "kb_tiles")):
        asked.append(f"sizeof({name})")
        wanted.append(ctypes.sizeof(structure))
        for field, _ in structure._fields_:
            asked += [f"offsetof({name}, {field})", f"sizeof((({name} *)0)->{field})"]
            wanted += [getattr(structure, field).offset, getattr(structure, field).size]
    asked += ["KB_VERSION", "KB_FLOAT16", "KB_BFLOAT16", "KB_AWQ", "KB_GPTQ", "KB_GPTQ_V2", "KB_GEMV", "KB_GEMM"]
    wanted += [library.VERSION, *(DTYPES.index(dtype) for dtype in (torch.float16, torch.bfloat16))]
    wanted += [*(LAYOUTS.index(name) for name in ("awq", "gptq", "gptq_v2")), _GEMV, _GEMM]
    lines = "".join(f'printf("%d\\n", (int)({one}));' for one in asked)
    source, program = tmp_path / "a.c", tmp_path / "a"
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <kneebench.h>\nint main(void) {{ {lines} return 0; }}"
    )
    subprocess.run(["gcc", f"-I{build.FOLDER}", "-o", str(program), str(source)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in said.split()] == wanted


def test_each_field_of_the_header_s_structures_is_there() -> None:
    """By name and in order: `sizeof` alone would not see two fields of one size exchanged."""
    header = (build.FOLDER / "kneebench.h").read_text()
    for structure, name in ((library.StoredLayer, "kb_stored"), (library.TiledLayer, "kb_tiles")):
        body = header[: header.index(f"}} {name};")].rpartition("typedef struct {")[2]
        declared = body.replace("*", " ").replace(";", " ,").replace("const", "").split()
        types = {"int32_t", "int16_t", "void", ","}
        found = [word.strip(",") for word in declared if word not in types]
        assert [word for word in found if word not in types] == [field for field, _ in structure._fields_]


def test_the_host_library_loads_and_speaks() -> None:
    host = library.host()
    assert host.kb_version() == library.VERSION
    assert library.host() is host
    assert host.kb_message(0)


def test_a_named_file_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    file = build.host()
    monkeypatch.setenv(library.VARIABLE, str(file))
    monkeypatch.setattr(build, "cuda", lambda cards: pytest.fail("built although a file was named"))
    assert library.load()._name == str(file)
    assert library.load() is library.load()


def test_a_file_beside_the_sources_is_taken_before_one_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    beside = tmp_path / build.NAME
    beside.write_bytes(build.host().read_bytes())
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(build, "cuda", lambda cards: pytest.fail("built although it was there"))
    assert library.load()._name == str(beside)


def test_without_one_it_is_built_for_the_cards_that_are_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def cuda(cards: tuple[int, ...]) -> Path:
        asked.append(cards)
        return build.host()

    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(build, "cuda", cuda)
    monkeypatch.setattr(build, "find", lambda tool: "nvcc")
    capabilities = [(8, 9), (9, 0), (8, 9)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    library.load()
    library.load.cache_clear()
    capabilities[1] = (8, 7)  # not in build.py's list: all of them then, and PTX for this one
    library.load()
    assert asked == [(89, 90), ()]


def test_without_nvcc_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find(tool: str) -> str:
        raise InputError(f"no {tool}", "", "")

    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(build, "find", find)
    with pytest.raises(InputError) as raised:
        library.load()
    for word in ("no nvcc", "CUDA_HOME", "libkneebench.so beside", "KNEEBENCH_KERNELS=FILE", "`make kernels`"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("int kb_version(void) { return 99; }", "whose ABI is version 99. Allowed: version 1"),
        ("int another(void) { return 1; }", "as the kernels' library .*kb_version"),
    ],
)
def test_a_library_that_is_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    monkeypatch.setenv(library.VARIABLE, str(shared(tmp_path, code)))
    with pytest.raises(InputError, match=message):
        library.load()


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in (tmp_path / "absent.so", tmp_path / "text.so"):
        (tmp_path / "text.so").write_text("no library")
        monkeypatch.setenv(library.VARIABLE, str(file))
        with pytest.raises(InputError, match=f"{file.name} as the kernels' library .*unset KNEEBENCH_KERNELS"):
            library.load()
