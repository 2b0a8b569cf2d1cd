"""What is published: an sdist, the wheel that is built from it, and that wheel in an environment that has nothing else.

The wheel is installed by pip with its real dependencies and run from an empty home, away from the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = "qwen2.5-0.5b-shape"
"""A committed run, whose papers the installed command makes again."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that was built from the sdist and not from the repository."""
    folder = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(line, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel and what it asks for."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place, with_pip=True)
    (wheel,) = built.glob("*.whl")
    line = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode and os.environ.get("CI") != "true" and "No matching distribution" in done.stderr:
        pytest.skip("pip finds no index with the dependencies")
    assert done.returncode == 0, done.stderr
    return place / "bin"


@pytest.fixture
def bench(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """`bench("--version")`: what the installed command prints, with an empty home and nothing on its path of ours."""
    home = tmp_path / "home"
    home.mkdir()

    def run(*arguments: str) -> str:
        around = {"HOME": str(home), "PATH": f"{installed}{os.pathsep}{os.defpath}", "LANG": "C.UTF-8"}
        line = [str(installed / "bench"), *arguments]
        done = subprocess.run(line, env=around, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_two_packages_the_scenarios_and_no_tests(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    information = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"harness", "quantize", information}
    shipped = {path.relative_to(ROOT / "scenarios").as_posix() for path in (ROOT / "scenarios").rglob("*.toml")}
    assert {f"harness/_scenarios/{name}" for name in shipped} <= names and shipped
    assert f"{information}/licenses/LICENSE" in names


def test_the_sdist_holds_what_builds_and_tests_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {
        "pyproject.toml",
        "Makefile",
        "README.md",
        "LICENSE",
        "tests/test_package.py",
        "scenarios/chat.toml",
    } <= names
    assert not [name for name in names if name.startswith((".venv", "results/", "reports/"))]


def test_it_runs_without_the_repository(installed: Path, bench: Callable[..., str], tmp_path: Path) -> None:
    assert bench("--version").startswith("kneebench ")
    where = "import harness; print(harness.__file__)"
    done = subprocess.run([installed / "python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(installed.parent))
    assert "rtx-2000-ada" in bench("gpus", "--list")
    predicted = bench("predict", "--gpu", "rtx-2000-ada", "--model", "qwen2.5-1.5b", "--precisions", "bf16,awq",
                      "--conc", "1,8")  # fmt: skip
    assert "awq" in predicted


def test_it_measures_a_server_and_writes_the_papers(
    installed: Path, bench: Callable[..., str], tmp_path: Path, truth: Callable[..., str]
) -> None:
    address = truth("--ttft-ms", "5", "--gap-ms", "2")
    bench("sweep", "--endpoint", address, "--model", "truth", "--conc", "2", "--requests", "20", "--max-window", "20s",
          "--output-tokens", "8", "--out", "run")  # fmt: skip
    (row,) = (tmp_path / "run" / "points.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert row.startswith("run,served,2,")
    assert (tmp_path / "run" / "report" / "capacity.html").is_file()


def test_it_makes_the_papers_of_a_run_from_elsewhere(bench: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / RUN, tmp_path / "results" / RUN)
    bench("report", f"results/{RUN}")
    papers = tmp_path / "reports" / RUN
    assert {"capacity.md", "capacity.html", "cost.xlsx", "risk_brief.md"} <= {path.name for path in papers.iterdir()}
    assert (papers / "capacity.md").read_bytes() == (ROOT / "reports" / RUN / "capacity.md").read_bytes()


def test_what_it_lacks_it_names(installed: Path, tmp_path: Path) -> None:
    """Without the extra `quantize` a command that needs it says so: exit code 2, and what to install."""
    line = [str(installed / "bench"), "inspect", "nowhere"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "kneebench[quantize]" in done.stderr
