"""`awq@kneebench` without an engine: what the name means, when it is refused, and what a server is given to find us.

tests/test_plugin_real.py does it with vLLM itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from harness import checkpoints, doctor
from harness.analysis.claims import is_int4, is_method
from harness.analysis.validity import _is_fast
from harness.engines import ServeSpec, environment, plugin
from harness.engines.environment import EngineEnv
from harness.engines.vllm import serve
from harness.engines.vllm_command import command, recorded
from harness.engines.vllm_log import read_log
from harness.errors import EngineError, InputError
from harness.load.workload import Dialect, make_ask, vocabulary
from harness.models import Model, resolve
from harness.predict.cards import card
from harness.predict.run import without_bf16
from harness.records import Cell
from harness.rundir import to_toml
from harness.scenario import load_scenario

ROOT = Path(__file__).parent.parent
CPU = EngineEnv(Path("/opt/engine/bin/python"), "cpu", "0.32.0", "2.13.0+cpu")
LINE = "(EngineCore pid=7) INFO 11-22 04:22:05 [vllm_plugin.py:241] Using {} for 4-bit layers in the awq layout\n"


def model_of(path: Path, quantization: object) -> Path:
    path.mkdir(exist_ok=True)
    config: dict[str, object] = {"model_type": "qwen2", "hidden_size": 64}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    return path


# --- names ------------------------------------------------------------------------------------------------------------


def test_behind_the_at_stand_the_kernels() -> None:
    assert plugin.split("awq") == ("awq", None)
    assert plugin.split("awq+gptq@kneebench") == ("awq+gptq", "kneebench")
    for wrong in ("awq@marlin", "awq@", "awq@kneebench@kneebench", "awq@Kneebench"):
        with pytest.raises(InputError, match="no kernels are called") as caught:
            plugin.kernels_of(wrong)
        assert "Allowed: awq@kneebench for ours, or awq" in str(caught.value)


def test_a_precision_may_name_its_kernels(tmp_path: Path) -> None:
    given = model_of(tmp_path / "a=b@c", {"quant_method": "awq", "bits": 4})
    found = checkpoints.wanted(["bf16", "awq", "awq@kneebench", "mine=org/name", f"mine@kneebench={given}"])
    assert list(found) == ["bf16", "awq", "awq@kneebench", "mine", "mine@kneebench"]
    assert found["awq@kneebench"] is None
    model = found["mine@kneebench"]
    assert model is not None and model.path == given


@pytest.mark.parametrize("name", ["bf16@kneebench", "smoothquant@kneebench", "gptq-3bit@kneebench"])
def test_what_is_never_stored_so_is_refused_before_it_is_made(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: .* is in no layout") as caught:
        checkpoints.wanted([name], (*checkpoints.PRECISIONS, *checkpoints.LOW_BITS))
    assert "Allowed: @kneebench with weights of 4 or 8 bits in the AWQ or the GPTQ layout" in str(caught.value)


@pytest.mark.parametrize("item", ["awq@marlin", "awq@kneebench,awq@kneebench", "nf4@kneebench", "@kneebench"])
def test_other_names_are_refused(item: str) -> None:
    with pytest.raises(InputError):
        checkpoints.wanted(item.split(","))


@pytest.mark.parametrize(
    ("quantization", "is_read"),
    [
        ({"quant_method": "awq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, True),
        ({"quant_method": "awq", "w_bit": 4}, True),  # as the first AWQ files say it: left to the engine
        ({"quant_method": "gptq", "bits": 3}, False),
        ({"quant_method": "compressed-tensors", "bits": 4}, False),
        ("odd", False),
        (None, False),
    ],
)
def test_a_checkpoint_that_exists_is_looked_at_first(tmp_path: Path, quantization: object, is_read: bool) -> None:
    item = f"mine@kneebench={model_of(tmp_path / 'm', quantization)}"
    if is_read:
        assert checkpoints.wanted([item])
    else:
        with pytest.raises(InputError, match="m is in no layout that our kernels read"):
            checkpoints.wanted([item])


def test_one_of_the_hub_is_left_to_the_engine() -> None:
    assert checkpoints.wanted(["mine@kneebench=org/name"])["mine@kneebench"] == resolve("org/name")


def test_both_kernels_serve_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    stored = model_of(tmp_path, {"quant_method": "awq", "bits": 4})

    def quantize(model: Model, precision: str, *_: object) -> checkpoints.Made:
        asked.append(precision)
        return checkpoints.Made(stored, "the digest")

    monkeypatch.setattr(checkpoints, "quantize", quantize)
    demo = resolve("demo")
    theirs, ours = (checkpoints.checkpoint(name, None, demo, None, print) for name in ("awq", "awq@kneebench"))
    assert asked == ["awq", "awq"]  # the second time `python -m quantize` finds what the first one made
    assert theirs == ours == (Model("demo awq", stored), "the digest")
    model_of(tmp_path, {"quant_method": "compressed-tensors"})
    with pytest.raises(InputError, match="rtn@kneebench: demo rtn is in no layout"):
        checkpoints.checkpoint("rtn@kneebench", None, demo, None, print)


def test_it_is_a_four_bit_awq_to_the_papers_and_a_name_to_the_files() -> None:
    assert is_int4("awq@kneebench") and is_method("awq@kneebench", "awq")
    table = {"run": {"checkpoint_sha256": {"awq@kneebench": "x"}}}
    assert tomllib.loads(to_toml(table)) == table


def test_vllm_takes_the_salt_of_its_cells() -> None:
    """vLLM 0.32 answers 400 to a cache_salt with an @."""
    dialect, scenario = Dialect(vocabulary=vocabulary(100, [])), load_scenario("chat")
    salts = [
        json.loads(make_ask(scenario, Cell(name, 1), 0, 0, dialect, "m", salt="run1").body)["cache_salt"]
        for name in ("awq", "awq@kneebench")
    ]
    assert salts == ["run1-awq-c1-r1-a1", "run1-awq+kneebench-c1-r1-a1"]


def test_a_prediction_says_that_it_has_none() -> None:
    with pytest.raises(InputError, match="our own kernels are measured, not predicted"):
        without_bf16("awq@kneebench", card("l4"))
    assert without_bf16("awq@awq-gemm", card("l4")) == "awq@awq-gemm"


# --- what a server is given -------------------------------------------------------------------------------------------


def test_vllm_is_asked_for_the_kernels_by_name(tmp_path: Path) -> None:
    spec = ServeSpec(tmp_path, "awq@kneebench", extra_args=("--x", "1"))
    line = command(spec, CPU, 8000)
    assert line[line.index("--quantization") + 1] == "kneebench"
    assert line[-2:] == ["--x", "1"]
    assert recorded(line, {})["--quantization"] == "kneebench"  # so engine-awq@kneebench-r1.json says it
    assert "--quantization" not in command(ServeSpec(tmp_path, "awq"), CPU, 8000)


def test_the_path_and_the_users_list_of_plugins() -> None:
    others = {"PYTHONPATH": "/permit", "VLLM_PLUGINS": "theirs", "A": "1"}
    found = plugin.surroundings("awq@kneebench", others)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(plugin.FOLDER), "/permit"]
    assert (found["VLLM_PLUGINS"], found["A"]) == ("theirs,kneebench", "1")
    assert plugin.surroundings("awq", others) == others
    alone = plugin.surroundings("awq@kneebench", {})
    assert alone == {"PYTHONPATH": str(plugin.FOLDER)}  # without a list vLLM loads all
    assert plugin.surroundings("awq@kneebench", {"VLLM_PLUGINS": ""})["VLLM_PLUGINS"] == "kneebench"


def test_the_folder_shows_one_entry_point_and_one_package() -> None:
    (found,) = importlib.metadata.distributions(path=[str(plugin.FOLDER)])
    assert (found.metadata["Name"], found.version) == ("kneebench-vllm", "1")
    (point,) = found.entry_points
    assert (point.group, point.name, point.value) == (
        "vllm.general_plugins",
        "kneebench",
        "quantize.vllm_plugin:register",
    )
    names = {path.name for path in plugin.FOLDER.iterdir()} - {"__pycache__"}
    assert names == {"quantize", "kneebench_vllm-1.dist-info"}


SEE = """
import importlib.metadata, importlib.util, json, sys
points = importlib.metadata.entry_points(group="vllm.general_plugins")
spec = importlib.util.find_spec("quantize.vllm_plugin")
heavy = sorted({"torch", "vllm"} & set(sys.modules))
others = importlib.util.find_spec("harness") is not None
json.dump([[point.value for point in points], spec and spec.origin, others, heavy], sys.stdout)
"""


def seen(folder: Path, elsewhere: Path) -> list[object]:
    """What a Python without any packages (-S) sees with `folder` on its path."""
    around = {"PYTHONPATH": str(folder), "PATH": os.defpath}
    line = [sys.executable, "-S", "-c", SEE]
    done = subprocess.run(line, env=around, cwd=elsewhere, capture_output=True, text=True, check=True)
    found: list[object] = json.loads(done.stdout)
    return found


def test_another_python_finds_the_plugin_and_nothing_else_of_ours(tmp_path: Path) -> None:
    origin = str(ROOT / "quantize" / "vllm_plugin.py")
    assert seen(plugin.FOLDER, tmp_path) == [["quantize.vllm_plugin:register"], origin, False, []]


def test_an_installed_wheel_brings_it_too(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(line, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    origin = str(site / "quantize" / "vllm_plugin.py")
    folder = site / plugin.FOLDER.relative_to(ROOT)
    assert seen(folder, tmp_path) == [["quantize.vllm_plugin:register"], origin, False, []]


def test_a_python_that_does_not_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EngineEnv(Path(sys.executable), "cpu", "0.32.0")
    assert plugin.is_found(here)
    monkeypatch.setattr(plugin, "FOLDER", tmp_path)
    assert not plugin.is_found(here)
    assert not plugin.is_found(EngineEnv(tmp_path / "none", "cpu", "0.32.0"))


def test_the_doctor_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> doctor.Finding:
        return {found.what: found for found in doctor.examine()}["kernels in vLLM"]

    here = EngineEnv(Path(sys.executable), "cpu", "0.32.0")
    monkeypatch.setattr(environment, "installed", lambda: ())
    assert finding().detail == "no vLLM here to bring them into"
    monkeypatch.setattr(environment, "installed", lambda: (here,))
    assert finding().state == "ok" and "awq@kneebench runs in torch" in finding().detail
    monkeypatch.setattr(plugin, "FOLDER", tmp_path)
    assert (finding().state, finding().needed_for) == ("missing", "precisions with @kneebench")


# --- what the log says ------------------------------------------------------------------------------------------------


def test_the_kernel_is_read_and_judged() -> None:
    assert read_log(LINE.format("KneebenchCudaKernel")).kernel == "KneebenchCudaKernel"
    assert _is_fast("KneebenchCudaKernel")
    assert not _is_fast("KneebenchTorchKernel")  # expands to 16 bit at every step


SERVER = """#!{python}
import http.server, os, sys
print({said!r}, flush=True)
print("path", os.environ["PYTHONPATH"], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("kernel", ["KneebenchTorchKernel", "CPUWNA16LinearKernel"])
def test_another_kernel_under_our_name_is_an_error(tmp_path: Path, kernel: str) -> None:
    """As where --engine-arg says --quantization again, and the later one wins."""
    python = tmp_path / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SERVER.format(python=sys.executable, said=LINE.format(kernel)))
    python.chmod(0o755)
    spec = ServeSpec(resolve("demo").path, "awq@kneebench")
    env = EngineEnv(python, "cpu", "0.32.0")
    log = tmp_path / "engine.log"
    if kernel.startswith("Kneebench"):
        with serve(spec, env, log) as server:
            assert server.info.kernel == kernel
            assert str(plugin.FOLDER) in server.log()
    else:
        with pytest.raises(EngineError, match="vLLM runs CPUWNA16LinearKernel, not the kernels"):
            with serve(spec, env, log):
                pass
