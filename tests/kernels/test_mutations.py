"""Would the tests see a fault? Each of mutants.py is put into a copy of the sources, and a quick check must fail.

All is built with AddressSanitizer, without optimisation: seconds a mutation. Objects that a mutation does not touch are
built once.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from quantize.kernels import build
from tests.kernels.mutants import CHECKS, MUTATIONS, Mutation

pytestmark = pytest.mark.slow

FLAGS = ("-std=c++17", "-fPIC", "-O0", "-fsanitize=address")
FOUND, FOUND_BY_SANITIZER = 3, "ERROR: AddressSanitizer"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compile_objects(sources: Iterable[Path], into: Path) -> None:
    """Objects of `sources`, all compilers at once."""
    into.mkdir(exist_ok=True)
    running = [
        subprocess.Popen([compiler(), "-x", "c++", *FLAGS, "-c", str(source), "-o", str(into / f"{source.stem}.o")])
        for source in sources
    ]
    assert [process.wait() for process in running] == [0] * len(running)


def link(objects: Path, first: Sequence[str] = ()) -> Path:
    """The library of all objects. Of an inline function that several have, the linker keeps the one in `first`."""
    out = objects / "library.so"
    named = [str(objects / f"{name}.o") for name in first]
    rest = [path for path in map(str, sorted(objects.glob("*.o"))) if path not in named]
    subprocess.run([compiler(), *FLAGS, "-shared", "-o", str(out), *named, *rest], check=True)
    return out


def run(library: Path, check: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.kernels.mutants", str(library), check]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the objects of the sources as they are."""
    folder = tmp_path_factory.mktemp("unchanged") / "objects"
    compile_objects(build.sources(), folder)
    return folder


@pytest.fixture
def mutated(tmp_path: Path) -> Path:
    """A copy of the sources."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for path in build.FOLDER.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            shutil.copy(path, folder)
    return folder


def test_at_least_ten_and_each_fits_the_sources() -> None:
    """The text to replace is there, once: a list that no longer fits the sources would find nothing."""
    assert len(MUTATIONS) >= 10
    for mutation in MUTATIONS:
        assert (build.FOLDER / mutation.file).read_text().count(mutation.old) == 1, (mutation.file, mutation.old)


@pytest.mark.parametrize("check", CHECKS)
def test_the_sources_as_they_are_pass(unchanged: Path, check: str) -> None:
    done = run(link(unchanged), check)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.why}")
def test_a_mutation_is_found(unchanged: Path, mutated: Path, tmp_path: Path, mutation: Mutation) -> None:
    file = mutated / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1
    file.write_text(text.replace(mutation.old, mutation.new))
    objects = Path(shutil.copytree(unchanged, tmp_path / "objects"))
    changed = [file.name] if file.suffix == ".cu" else CHECKS[mutation.check][1]
    compile_objects([mutated / name for name in changed], objects)
    done = run(link(objects, [Path(name).stem for name in changed]), mutation.check)
    assert done.returncode == FOUND or FOUND_BY_SANITIZER in done.stderr, done.stdout + done.stderr
