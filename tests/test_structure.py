"""The rules that keep the rooms apart: who may import what, and what the wheel brings."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources in {package}: the rule would check nothing"
    return found


@pytest.mark.parametrize("path", sources("harness"), ids=lambda path: str(path.relative_to(ROOT)))
def test_harness_never_imports_torch_or_vllm_and_only_cli_imports_quantize(path: Path) -> None:
    names = set(imported(path))
    assert not names & {"torch", "vllm", "transformers"}
    if path != ROOT / "harness" / "cli.py":
        assert "quantize" not in names


@pytest.mark.parametrize("path", sources("quantize"), ids=lambda path: str(path.relative_to(ROOT)))
def test_quantize_never_imports_harness_and_only_its_plugin_imports_vllm(path: Path) -> None:
    names = set(imported(path))
    assert "harness" not in names
    assert ("vllm" in names) == (path.name == "vllm_plugin.py")


def test_only_the_cluster_imports_ray_and_only_when_it_is_asked_for() -> None:
    users = [path for path in sources("harness") if "ray" in set(imported(path))]
    assert users == [ROOT / "harness" / "cluster.py"]
    for node in ast.parse(users[0].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "ray" not in ast.unparse(node).replace(".", " ").split()


def test_the_rule_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import torch.nn\n    from vllm.entrypoints import x\n")
    assert set(imported(file)) == {"torch", "vllm"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['bench', '--help']\nimport harness.cli\n"
        "try:\n    harness.cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy', 'scipy', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "sweep" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_wheel_holds_two_packages_and_the_scenarios(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"harness", "quantize"}
    for needed in (
        "chat.toml",
        "catalogue/prices.toml",
        "demo-model/model.safetensors",
        "demo-model/tokenizer.json",
        "failures/demo.toml",
        "failures/general.toml",
    ):
        assert f"harness/_scenarios/{needed}" in names
    for needed in (
        "capacity.md.j2",
        "capacity.html.j2",
        "capacity.css",
        "capacity.js",
        "whatif.js",
        "risk_brief.md.j2",
        "failures.md.j2",
        "quality.md.j2",
        "compute_graph.md.j2",
    ):
        assert f"harness/report/templates/{needed}" in names
    assert "harness/engines/permit/sitecustomize.py" in names
    assert "harness/engines/vllm_plugin/kneebench_vllm-1.dist-info/entry_points.txt" in names
    for source in (ROOT / "quantize" / "kernels").iterdir():
        if source.suffix in (".cu", ".cuh", ".h", ".toml"):
            assert f"quantize/kernels/{source.name}" in names


@pytest.mark.parametrize("package", ["harness", "quantize"])
def test_what_is_imported_is_declared(package: str) -> None:
    """A package that is here because somebody installed it by hand is not there on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["quantize" if package == "quantize" else "cluster"]
    declared = {re.split(r"[^\w.-]", item)[0].lower().replace("_", "-") for item in wanted}
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for path in sources(package):
        # The plugin runs in vLLM's environment, which is never ours.
        there = {"vllm"} if path == ROOT / "quantize" / "vllm_plugin.py" else set()
        for name in set(imported(path)) - sys.stdlib_module_names - {"harness", "quantize"} - there:
            names = {item.lower().replace("_", "-") for item in distributions.get(name, [name])}
            if not names & declared:
                missing.add(f"{name} ({path.relative_to(ROOT)})")
    assert not missing
