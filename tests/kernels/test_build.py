"""The build: what the compilers are asked for, what is cached, what is said when it fails; and a library for a card."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.errors import InputError, RunError
from quantize.kernels import build
from tests.kernels.layers import Kernels


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; the cache and the sources are the test's own too."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("one.cu", "two.cu", "both.cuh", "abi.h", "notes.md"):
        (sources / name).write_text(name)
    monkeypatch.setattr(build, "FOLDER", sources)
    build._version.cache_clear()
    return folder


def compiler(folder: Path, name: str, script: str) -> str:
    """A stand-in compiler, which writes its arguments to calls.txt beside it."""
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\necho "$@" >> {folder}/calls.txt\n{script}\n')
    path.chmod(0o755)
    return str(path)


MAKES_IT = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().splitlines()


def test_nvcc_is_asked_for_each_card_and_for_ptx_of_the_newest() -> None:
    call = build.command("nvcc", (75, 80, 120), Path("x.so"))
    assert [part for part in call if part.startswith("-gencode")] == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert {"all-warnings", "static", "-std=c++17"} <= set(call)
    assert call[call.index("-Werror") + 1] == "all-warnings"
    assert {Path(part).name for part in call if part.endswith(".cu")} >= {"checks.cu", "prepare.cu", "dequantize.cu"}


def test_ptx_of_turing_is_left_out_because_it_has_no_gemm() -> None:
    call = build.command("nvcc", (75,), Path("x.so"))
    assert [part for part in call if part.startswith("-gencode")] == ["-gencode=arch=compute_75,code=sm_75"]


def test_cards_are_those_the_toolkit_knows(tools: Path) -> None:
    old = compiler(tools, "nvcc", "echo sm_50; echo sm_75; echo sm_80; echo sm_86; echo sm_87; echo sm_90a")
    assert build.architectures(old) == (75, 80, 86)


def test_a_library_for_every_card_serves_each_of_them(tools: Path) -> None:
    old = "case $1 in --list-gpu-code) echo sm_75; echo sm_80; exit;; esac; "
    compiler(tools, "nvcc", old + MAKES_IT)
    one = build.cuda((80,))
    assert build.cuda((80,)) == one
    every = build.cuda()
    assert every != one
    assert build.cuda((80,)) == build.cuda((75, 80)) == every
    built = [call for call in calls(tools) if "list-gpu" not in call]
    assert [re.findall(r",code=(\w+)", call) for call in built] == [
        ["sm_80", "compute_80"],
        ["sm_75", "sm_80", "compute_80"],
    ]


def test_a_toolkit_that_knows_no_card_is_refused(tools: Path) -> None:
    compiler(tools, "nvcc", "echo sm_35")
    with pytest.raises(InputError, match="knows no card of"):
        build.cuda()


@pytest.mark.parametrize("sanitize", [False, True])
def test_a_build_is_kept_until_a_source_or_a_flag_or_the_compiler_changes(tools: Path, sanitize: bool) -> None:
    compiler(tools, "g++", MAKES_IT)
    first = build.host(sanitize)
    assert first.read_text() == "made\n"
    assert build.host(sanitize) == first and len(calls(tools)) == 1
    (build.FOLDER / "notes.md").write_text("no source")
    assert build.host(sanitize) == first
    for name in ("one.cu", "both.cuh", "abi.h"):
        (build.FOLDER / name).write_text("changed")
        assert build.host(sanitize) != first
        (build.FOLDER / name).write_text(name)
    (build.FOLDER / "three.cu").write_text("joins by existing")
    assert build.host(sanitize) != first and "three.cu" in calls(tools)[-1]
    (build.FOLDER / "three.cu").unlink()
    assert build.host(sanitize) == first and len(calls(tools)) == 5
    assert build.host(not sanitize) != first
    path = tools / "g++"
    path.write_text(path.read_text().replace("echo 1.0", "echo 2.0"))
    build._version.cache_clear()
    assert build.host(sanitize) != first


def test_the_sanitized_build_asks_for_both_sanitizers(tools: Path) -> None:
    compiler(tools, "g++", MAKES_IT)
    build.host(sanitize=True)
    build.host()
    sanitized, plain = calls(tools)
    assert "-fsanitize=address,undefined -fno-sanitize-recover=all" in sanitized and "-fsanitize" not in plain
    assert all("-Wall -Wextra -Werror" in call for call in (sanitized, plain))


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(tools: Path) -> None:
    compiler(tools, "g++", "echo one.cu:3: error: no such thing >&2; echo made > half.so; exit 4")
    with pytest.raises(RunError, match=r"g\+\+ failed with exit code 4: one.cu:3: error: no such thing\. .*by hand: "):
        build.host()
    assert not list(build.cache().rglob("*.so"))


def test_a_missing_compiler_is_named(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no no-such-compiler"):
        build.host()
    with pytest.raises(InputError, match="no no-such-tool.*CUDA_HOME"):
        build.find("no-such-tool")


def test_the_toolkit_is_found_in_cuda_home(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    assert build.find(Path(compiler(folder, "some-tool", "")).name) == str(folder / "some-tool")


def test_an_unknown_card_is_refused_in_the_shell() -> None:
    command = [sys.executable, "-m", "quantize.kernels.build", "--arch", "80,81"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--arch 81" in done.stderr and "75, 80, 86, 89, 90, 100, 120" in done.stderr


def test_the_host_library_lands_where_the_shell_says(tmp_path: Path, kernels: Kernels) -> None:
    out = tmp_path / "here.so"
    command = [sys.executable, "-m", "quantize.kernels.build", "--host", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert ctypes.CDLL(str(out)).kb_version() == kernels.library.kb_version()


def test_header_and_library_name_the_same_functions(kernels: Kernels) -> None:
    header = (build.FOLDER / "kneebench.h").read_text()
    declared = set(re.findall(r"KB_EXPORT [\w \*]*?(kb_\w+)\(", header))
    assert {"kb_prepare", "kb_dequantize", "kb_expand", "kb_gemv", "kb_gemm", "kb_workspace"} <= declared
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", kernels.library._name], capture_output=True, text=True, check=True
    )
    exported = set(re.findall(r" T (kb_\w+)$", symbols.stdout, re.MULTILINE))
    assert declared <= exported
    assert exported - declared <= {"kb_simt_set"}  # the emulator's own


def test_nvcc_s_library_loads_without_a_gpu_and_refuses_likewise(nvcc: str) -> None:
    library = ctypes.CDLL(str(build.cuda((80,))))
    library.kb_message.restype = ctypes.c_char_p
    assert library.kb_version() == 1
    assert library.kb_check_tiles(None) == 1
    assert library.kb_message(1) == b"tiles is NULL: a prepared layer is needed"
    symbols = subprocess.run(["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert names and all(name.startswith("kb_") for name in names)


@pytest.mark.slow
def test_every_card_compiles_without_a_warning(nvcc: str) -> None:
    """Warnings are errors. 35 s on two idle cores, unless the library is in the cache."""
    assert build.cuda().is_file()
