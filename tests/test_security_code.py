"""What no source of ours does: shells, evaluated text, pickles, remote code. Each exception stands here, explained."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("harness", "quantize", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]

ALLOWED = {
    ("harness/quality/inside.py", "exec"): "the sandbox runs a model's code there, after it has locked itself in",
    ("harness/load/messages.py", "pickle"): "between us and generators that we started: a pipe, or TLS with a token",
    ("tools/failure_prompts.py", "eval"): "expressions that stand in tools/demo_tasks.py; a tool, not shipped",
}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of such an expression; whatever it hangs from is left out: `x().load` is `.load`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What is wrong, and on which line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            whole = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in whole:
                if module.partition(".")[0] in FORBIDDEN_MODULES:
                    yield module.partition(".")[0], node.lineno
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in FORBIDDEN_CALLS:
                        yield f"{node.module}.{alias.name}", node.lineno
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                yield name, node.lineno
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if "shell" in given and not _is(given["shell"], False):
                yield "shell", node.lineno
            if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
                yield "trust_remote_code", node.lineno
            if "allow_pickle" in given and not _is(given["allow_pickle"], False):
                yield "allow_pickle", node.lineno
            if name == "torch.load" and not _is(given.get("weights_only"), True):
                yield "torch.load", node.lineno
            if name == "tempfile.mktemp":
                yield name, node.lineno


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_source_does_it() -> None:
    assert len(SOURCES) > 200
    found: dict[tuple[str, str], int] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {(str(path.relative_to(ROOT)), what): line for what, line in offences(tree)}
    assert {key: line for key, line in found.items() if key not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import os\nos.system('x')", "os.system"),
        ("from os import system", "os.system"),
        ("from subprocess import getoutput", "subprocess.getoutput"),
        ("subprocess.run('x', shell=True)", "shell"),
        ("subprocess.Popen(x, shell=chosen)", "shell"),
        ("def f():\n    return eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    import yaml", "yaml"),
        ("np.load(x, allow_pickle=True)", "allow_pickle"),
        ("torch.load(f)", "torch.load"),
        ("torch.load(f, weights_only=False)", "torch.load"),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", "trust_remote_code"),
        ("AutoModel.from_pretrained(p, trust_remote_code=flag)", "trust_remote_code"),
        ("tempfile.mktemp()", "tempfile.mktemp"),
    ],
)
def test_the_rule_sees_it(source: str, what: str) -> None:
    assert [found for found, _ in offences(ast.parse(source))] == [what]


def test_the_rule_lets_the_harmless_pass() -> None:
    source = "model.eval()\nre.exec(x)\nsubprocess.run([x], shell=False)\ntorch.load(f, weights_only=True)\nnp.load(f)"
    assert list(offences(ast.parse(source))) == []


def test_vllm_gets_no_leave_to_run_remote_code() -> None:
    """Only what a user types with --engine-arg: no source of ours, and no scenario, names the flag to pass it on."""
    for path in [*(ROOT / "harness" / "engines").rglob("*.py"), *(ROOT / "scenarios").rglob("*.toml")]:
        if path.name not in ("catalogue.py",):  # advice to a reader: "read that code; then ..."
            text = path.read_text(encoding="utf-8")
            assert "trust-remote-code" not in text and "trust_remote_code" not in text, path
