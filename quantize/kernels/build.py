"""The kernels' shared library: nvcc's for the GPU, and g++'s of the same sources, which runs them on the CPU for tests.

    *.cu ─┬─ nvcc, machine code of each card that the toolkit knows, PTX for the rest ─► libkneebench.so
          └─ g++, plain or with AddressSanitizer and UBSan ───────────────────────────► libkneebench-host.so

A built library lies in the user's cache under a name that hashes sources, flags and compiler: it is built once. Nothing
but the standard library is imported, so that any environment with a compiler can build. In a shell:

    python -m quantize.kernels.build [--host | --sanitize] [--out FILE] [--arch 80,89]
"""

import argparse
import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from quantize.errors import InputError, QuantizeError, RunError

NAME = "libkneebench.so"
FOLDER = Path(__file__).parent
CARDS = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities: T4 and RTX 20, A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50."""

TENSOR_CORES = 80
"""From here on: mma.sync m16n8k16 and cp.async."""

_STANDARD = "-std=c++17"
_HOST = ("-x", "c++", _STANDARD, "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
_SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_WARNINGS = ("-Werror", "all-warnings")
_CUDA = ("-O3", "-shared", "-cudart", "static", "--threads", "2", *_WARNINGS)
# `#pragma unroll` is for the GPU's half of a function that both machines have; nvcc shows it to g++ too.
_CUDA_HOST = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def sources() -> list[Path]:
    """Every .cu file of this folder: a kernel joins by existing."""
    return sorted(FOLDER.glob("*.cu"))


def find(tool: str) -> str:
    """The path of nvcc, or of another program of the CUDA toolkit: on the PATH, in CUDA_HOME, or in /usr/local/cuda.

    Raises InputError where it is in none of them.
    """
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '')}/bin", "/usr/local/cuda/bin"]
    if found := shutil.which(tool, path=os.pathsep.join(folders)):
        return found
    raise InputError(
        f"no {tool}",
        "a CUDA toolkit on the PATH or in CUDA_HOME",
        "Install the CUDA toolkit; without one the torch functions of fallback.py do the same work",
    )


def architectures(nvcc: str) -> tuple[int, ...]:
    """Those of `CARDS` that this nvcc compiles for."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"\bsm_(\d+)\b", listed)}
    return tuple(card for card in CARDS if card in known)


def command(nvcc: str, cards: Sequence[int], out: Path) -> list[str]:
    """nvcc's call: machine code for each of `cards`, and PTX of the newest, which a driver compiles for later ones.

    PTX for Turing stays out: a later card would run it, and it has no gemm.
    """
    code = [f"-gencode=arch=compute_{card},code=sm_{card}" for card in cards]
    if cards[-1] >= TENSOR_CORES:
        code.append(f"-gencode=arch=compute_{cards[-1]},code=compute_{cards[-1]}")
    passed = [part for flag in _CUDA_HOST for part in ("-Xcompiler", flag)]
    return [nvcc, _STANDARD, *_CUDA, *passed, *code, "-o", str(out), *map(str, sources())]


def host_command(sanitize: bool, out: Path) -> list[str]:
    """g++'s call: what a test runs on the CPU."""
    flags = _SANITIZE if sanitize else ("-O2",)
    return [os.environ.get("CXX", "g++"), *_HOST, *flags, "-o", str(out), *map(str, sources())]


def cuda(cards: Sequence[int] = ()) -> Path:
    """The CUDA library for `cards`, else for all that the toolkit knows; built when the cache has none that serves.

    Raises InputError without nvcc, RunError where it fails.
    """
    nvcc = find("nvcc")
    if not (every := architectures(nvcc)):
        raise InputError(f"{nvcc}, which knows no card of {CARDS}", "CUDA 10 or later", "Install a newer toolkit")
    whole = functools.partial(command, nvcc, every)
    if not cards or (set(cards) <= set(every) and _place(NAME, whole).is_file()):
        return _cached(NAME, whole)
    return _cached(NAME, functools.partial(command, nvcc, sorted(cards)))


def host(sanitize: bool = False) -> Path:
    """The library that runs on the CPU, built when it is not in the cache. Raises RunError where g++ fails."""
    stem, _, suffix = NAME.partition(".")
    kind = "sanitized" if sanitize else "host"
    return _cached(f"{stem}-{kind}.{suffix}", functools.partial(host_command, sanitize))


def cache() -> Path:
    """Where built libraries lie: kneebench's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kneebench" / "kernels"


def build(command: Callable[[Path], list[str]], out: Path) -> Path:
    """Run `command(path)` and move what it made to `out` in one step. Raises RunError with the compiler's words."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        _run(command(made))
        os.replace(made, out)
    return out


def inspect(card: int) -> Path:
    """A folder with what nvcc makes of each source for one card: NAME.ptx, NAME.cubin, and NAME.txt, ptxas' account of
    registers, stack and spills. Raises InputError without nvcc, RunError where it fails."""
    code = f"-gencode=arch=compute_{card},code=sm_{card}"
    call = [find("nvcc"), _STANDARD, "-O3", *_WARNINGS, code, "-cubin", "-Xptxas", "-v", "--keep"]
    folder = cache() / fingerprint(call) / f"sm_{card}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        for source in sources():
            name = source.stem
            said = _run([*call, "--keep-dir", scratch, "-o", str(made / f"{name}.cubin"), str(source)])
            (made / f"{name}.txt").write_text(said)
            shutil.move(Path(scratch) / f"{name}.ptx", made)
        with contextlib.suppress(OSError):  # another process may have been quicker
            os.replace(made, folder)
    return folder


def fingerprint(call: Sequence[str]) -> str:
    """Changes with every source, flag and compiler version."""
    digest = hashlib.sha256(shlex.join(call).encode())
    digest.update(_version(call[0]).encode())
    for path in sorted(p for p in FOLDER.iterdir() if p.suffix in (".cu", ".cuh", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _place(name: str, command: Callable[[Path], list[str]]) -> Path:
    return cache() / fingerprint(command(Path(name))) / name


def _cached(name: str, command: Callable[[Path], list[str]]) -> Path:
    out = _place(name, command)
    return out if out.is_file() else build(command, out)


def _run(call: Sequence[str]) -> str:
    """What a compiler says when it succeeds."""
    try:
        run = subprocess.run(call, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"no {call[0]}", "a C++ compiler on the PATH or in CXX", "Install g++") from None
    if run.returncode:
        lines = dict.fromkeys((run.stdout + run.stderr).splitlines())  # one header's error comes from each source
        words = [line for line in lines if "error" in line.lower()]
        raise RunError(
            f"{Path(call[0]).name} failed with exit code {run.returncode}: {' | '.join(words[:5])}",
            "a build without errors and without warnings",
            f"Run it again by hand: {shlex.join(call)}",
        )
    return run.stdout + run.stderr


@functools.cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return ""  # `build` says what is missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quantize.kernels.build", description="Build the kernels' library.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--host", action="store_true", help="for the CPU: what the tests run")
    kind.add_argument("--sanitize", action="store_true", help="for the CPU, with AddressSanitizer and UBSan")
    parser.add_argument("--out", type=Path, metavar="FILE", help="copy the library there")
    parser.add_argument(
        "--arch", default="", metavar="LIST", help=f"cards, of {','.join(map(str, CARDS))}; default all"
    )
    chosen = parser.parse_args()
    try:
        cards = _cards(chosen.arch)
        made = host(chosen.sanitize) if chosen.host or chosen.sanitize else cuda(cards)
        if chosen.out:
            shutil.copyfile(made, chosen.out)
    except QuantizeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(chosen.out or made)
    return 0


def _cards(text: str) -> tuple[int, ...]:
    named = [part for part in text.split(",") if part]
    if unknown := [part for part in named if part not in map(str, CARDS)]:
        raise InputError(f"--arch {','.join(unknown)}", ", ".join(map(str, CARDS)), "Leave it out for all")
    return tuple(sorted(int(part) for part in named))


if __name__ == "__main__":
    sys.exit(main())
